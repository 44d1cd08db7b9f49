//! Services.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1 as k8s;
use kproxy_common::{Address, Cidr, ServiceKind, TrafficPolicy};

use super::values::{address, cidr, port, protocol, quoted};
use super::{Parsed, Report};
use crate::model::objects::{Family, LoadBalancer, PassThroughValue, ServedBy, Service, ServicePort};
use crate::model::problem::{ObjectRef, ProblemKind};
use crate::wanted::{PassThroughRule, ServiceKey};

const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
const OWN_ANNOTATION: &str = "kproxy.io/pass-through";
const ELB_ANNOTATION: &str = "kubernetes.io/elb.pass-through";
/// `sessionAffinityConfig.clientIP.timeoutSeconds` where none is written (`DefaultClientIPServiceAffinitySeconds`).
const DEFAULT_AFFINITY_TIMEOUT: u32 = 10_800;
/// Its upper bound (`MaxClientIPServiceAffinitySeconds`).
const MAX_AFFINITY_TIMEOUT: i32 = 86_400;

/// The Service `service` with namespace and name `key`. `extra_annotations` are read after
/// `kubernetes.io/elb.pass-through`, and like it.
pub fn service(
    key: &Arc<ServiceKey>,
    service: &k8s::Service,
    extra_annotations: &[String],
) -> Parsed<Service> {
    let mut report = Report::new(ObjectRef::service(key));
    let nothing = k8s::ServiceSpec::default();
    let spec = service.spec.as_ref().unwrap_or(&nothing);
    let mut value = Service {
        key: Arc::clone(key),
        created: created(service),
        kind: ServiceKind::ClusterIp,
        served_by: served_by(service, spec),
        cluster_ips: Box::default(),
        families: Box::default(),
        external_ips: Box::default(),
        load_balancers: Box::default(),
        ports: Box::default(),
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity_timeout: 0,
        source_ranges: Box::default(),
        health_check_node_port: None,
        pass_through: Box::default(),
    };
    if value.served_by == ServedBy::Nobody {
        report_missing_cluster_ip(&mut report, spec);
        return report.parsed(value);
    }
    value.kind = kind(&mut report, spec.type_.as_deref());
    value.cluster_ips = cluster_ips(&mut report, spec);
    if value.served_by == ServedBy::OtherProxy {
        return report.parsed(value);
    }
    value.families = families(&mut report, spec, &value.cluster_ips);
    value.external_ips = external_ips(&mut report, spec, &value.families);
    value.load_balancers = load_balancers(&mut report, service, &value.families);
    value.ports = ports(&mut report, spec);
    value.internal_policy =
        policy(&mut report, "spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref());
    value.external_policy =
        policy(&mut report, "spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref());
    value.affinity_timeout = affinity_timeout(&mut report, spec);
    value.source_ranges = source_ranges(&mut report, spec);
    if value.kind == ServiceKind::LoadBalancer && value.external_policy == TrafficPolicy::Local {
        let written = spec.health_check_node_port.filter(|number| *number != 0);
        value.health_check_node_port =
            written.and_then(|number| port(&mut report, "spec.healthCheckNodePort", number));
    }
    value.pass_through = pass_through(&mut report, service, extra_annotations);
    report.parsed(value)
}

fn created(service: &k8s::Service) -> i64 {
    service.metadata.creation_timestamp.as_ref().map_or(i64::MAX, |time| time.0.as_second())
}

fn served_by(service: &k8s::Service, spec: &k8s::ServiceSpec) -> ServedBy {
    let mut written = written_cluster_ips(spec).peekable();
    if spec.type_.as_deref() == Some("ExternalName") || written.peek().is_none() {
        return ServedBy::Nobody;
    }
    if written.any(|(_, text)| text == "None") {
        return ServedBy::Nobody;
    }
    let labels = service.metadata.labels.as_ref();
    if labels.is_some_and(|labels| labels.contains_key(PROXY_NAME_LABEL)) {
        return ServedBy::OtherProxy;
    }
    ServedBy::Us
}

/// An API server never leaves it empty: this is for whoever wrote the Service into a file.
fn report_missing_cluster_ip(report: &mut Report, spec: &k8s::ServiceSpec) {
    if spec.type_.as_deref() == Some("ExternalName") || written_cluster_ips(spec).next().is_some() {
        return;
    }
    let message =
        "it is empty, so the Service is not served; write the address, or None for a headless Service";
    report.add(ProblemKind::Address, "spec.clusterIP", message);
}

fn kind(report: &mut Report, written: Option<&str>) -> ServiceKind {
    match written {
        None | Some("" | "ClusterIP") => ServiceKind::ClusterIp,
        Some("NodePort") => ServiceKind::NodePort,
        Some("LoadBalancer") => ServiceKind::LoadBalancer,
        Some(other) => {
            let message =
                format!("{} is no type of Service; its addresses are served as they stand", quoted(other));
            report.add(ProblemKind::Value, "spec.type", message);
            ServiceKind::ClusterIp
        }
    }
}

/// `spec.clusterIPs`, or `spec.clusterIP` where the list is missing; each with its field.
fn written_cluster_ips(spec: &k8s::ServiceSpec) -> impl Iterator<Item = (Option<usize>, &str)> {
    let many = spec.cluster_ips.iter().flatten().enumerate().map(|(at, text)| (Some(at), text.as_str()));
    let is_empty = spec.cluster_ips.as_ref().is_none_or(Vec::is_empty);
    let one = spec.cluster_ip.iter().filter(move |_| is_empty).map(|text| (None, text.as_str()));
    many.chain(one).filter(|(_, text)| !text.is_empty())
}

fn cluster_ips(report: &mut Report, spec: &k8s::ServiceSpec) -> Box<[Address]> {
    let mut seen = BTreeSet::new();
    let read = written_cluster_ips(spec).filter_map(|(at, text)| match at {
        Some(at) => address(report, format_args!("spec.clusterIPs[{at}]"), text),
        None => address(report, "spec.clusterIP", text),
    });
    read.filter(|ip| seen.insert(*ip)).collect()
}

fn families(report: &mut Report, spec: &k8s::ServiceSpec, cluster_ips: &[Address]) -> Box<[Family]> {
    let mut families: BTreeSet<_> = cluster_ips.iter().map(Family::of).collect();
    for (at, text) in spec.ip_families.iter().flatten().enumerate() {
        match text.as_str() {
            "IPv4" => families.insert(Family::V4),
            "IPv6" => families.insert(Family::V6),
            other => {
                let message = format!("{} is none of IPv4 and IPv6; it is skipped", quoted(other));
                report.add(ProblemKind::Value, format!("spec.ipFamilies[{at}]"), message);
                continue;
            }
        };
    }
    families.into_iter().collect()
}

fn external_ips(report: &mut Report, spec: &k8s::ServiceSpec, families: &[Family]) -> Box<[Address]> {
    let mut read = Vec::new();
    let mut seen = BTreeSet::new();
    for (at, text) in spec.external_ips.iter().flatten().enumerate() {
        let field = format!("spec.externalIPs[{at}]");
        let Some(ip) = address(report, &field, text) else { continue };
        if has_family(report, &field, &ip, families) && seen.insert(ip) {
            read.push(ip);
        }
    }
    read.into_boxed_slice()
}

fn load_balancers(report: &mut Report, service: &k8s::Service, families: &[Family]) -> Box<[LoadBalancer]> {
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let mut read = Vec::new();
    let mut seen = BTreeSet::new();
    for (at, ingress) in status.iter().flat_map(|status| &status.ingress).flatten().enumerate() {
        let Some(text) = ingress.ip.as_deref().filter(|text| !text.is_empty()) else { continue };
        let field = format!("status.loadBalancer.ingress[{at}].ip");
        let Some(address) = address(report, &field, text) else { continue };
        let is_proxy = match ingress.ip_mode.as_deref() {
            None | Some("" | "VIP") => false,
            Some("Proxy") => true,
            Some(other) => {
                let message = format!("{} is none of VIP and Proxy; it does not decide", quoted(other));
                let field = format!("status.loadBalancer.ingress[{at}].ipMode");
                report.add(ProblemKind::PassThroughValue, field, message);
                false
            }
        };
        if has_family(report, &field, &address, families) && seen.insert(address) {
            read.push(LoadBalancer { address, is_proxy });
        }
    }
    read.into_boxed_slice()
}

fn has_family(report: &mut Report, field: &str, address: &Address, families: &[Family]) -> bool {
    let family = Family::of(address);
    if families.contains(&family) {
        return true;
    }
    let message = format!(
        "the Service has no {} ClusterIP, so {address} is left alone; add the family to spec.ipFamilies",
        family.text()
    );
    report.add(ProblemKind::Family, field, message);
    false
}

fn ports(report: &mut Report, spec: &k8s::ServiceSpec) -> Box<[ServicePort]> {
    let mut seen = BTreeSet::new();
    let mut read = Vec::new();
    for (at, written) in spec.ports.iter().flatten().enumerate() {
        let Some(number) = port(report, format_args!("spec.ports[{at}].port"), written.port) else {
            continue;
        };
        let field = format!("spec.ports[{at}].protocol");
        let Some(protocol) = protocol(report, field, written.protocol.as_deref()) else { continue };
        let name = written.name.as_deref().unwrap_or_default();
        // Slices are matched by name and protocol: two such ports could not be told apart.
        if !seen.insert((name, protocol)) {
            let message = format!("a port before it is called {} too; this one is skipped", quoted(name));
            report.add(ProblemKind::Duplicate, format!("spec.ports[{at}].name"), message);
            continue;
        }
        let node_port = written.node_port.filter(|number| *number != 0);
        let node_port = node_port.and_then(|n| port(report, format_args!("spec.ports[{at}].nodePort"), n));
        read.push(ServicePort { name: name.into(), protocol, port: number, node_port });
    }
    read.into_boxed_slice()
}

fn policy(report: &mut Report, field: &str, written: Option<&str>) -> TrafficPolicy {
    match written {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            let message = format!("{} is none of Cluster and Local; it counts as Cluster", quoted(other));
            report.add(ProblemKind::Value, field, message);
            TrafficPolicy::Cluster
        }
    }
}

fn affinity_timeout(report: &mut Report, spec: &k8s::ServiceSpec) -> u32 {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return 0,
        Some("ClientIP") => {}
        Some(other) => {
            let message = format!("{} is none of None and ClientIP; it counts as None", quoted(other));
            report.add(ProblemKind::Value, "spec.sessionAffinity", message);
            return 0;
        }
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    match config.and_then(|config| config.timeout_seconds) {
        None => DEFAULT_AFFINITY_TIMEOUT,
        Some(seconds @ 1..=MAX_AFFINITY_TIMEOUT) => seconds.unsigned_abs(),
        Some(other) => {
            let message = format!(
                "{other} is not within 1 and {MAX_AFFINITY_TIMEOUT} seconds; {DEFAULT_AFFINITY_TIMEOUT} is used"
            );
            let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
            report.add(ProblemKind::Value, field, message);
            DEFAULT_AFFINITY_TIMEOUT
        }
    }
}

fn source_ranges(report: &mut Report, spec: &k8s::ServiceSpec) -> Box<[Cidr]> {
    let mut ranges = Vec::new();
    for (at, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        match cidr(text.trim()) {
            Some(range) => ranges.push(range),
            None => {
                let message = format!(
                    "{} is no CIDR; it is skipped, and with no other range of a family everyone may come in",
                    quoted(text)
                );
                let field = format!("spec.loadBalancerSourceRanges[{at}]");
                report.add(ProblemKind::Address, field, message);
            }
        }
    }
    ranges.sort_by_key(|range: &Cidr| (range.address(), range.prefix_length()));
    ranges.dedup();
    ranges.into_boxed_slice()
}

fn pass_through(
    report: &mut Report,
    service: &k8s::Service,
    extra_annotations: &[String],
) -> Box<[(PassThroughRule, PassThroughValue)]> {
    let Some(annotations) = &service.metadata.annotations else {
        return Box::default();
    };
    let mut said = Vec::new();
    match annotations.get(OWN_ANNOTATION).map(String::as_str) {
        None => {}
        Some("true") => said.push((PassThroughRule::OwnAnnotation, PassThroughValue::On)),
        Some("false") => said.push((PassThroughRule::OwnAnnotation, PassThroughValue::Off)),
        Some(other) => unknown_value(report, OWN_ANNOTATION, other, "\"true\" and \"false\""),
    }
    let cloud = [(PassThroughRule::ElbAnnotation, ELB_ANNOTATION)];
    let extra = extra_annotations.iter().map(|key| (PassThroughRule::ExtraAnnotation, key.as_str()));
    for (rule, key) in cloud.into_iter().chain(extra) {
        if let Some(value) = cloud_value(report, annotations, key) {
            said.push((rule, value));
        }
    }
    said.into_boxed_slice()
}

fn cloud_value(
    report: &mut Report,
    annotations: &BTreeMap<String, String>,
    key: &str,
) -> Option<PassThroughValue> {
    match annotations.get(key)?.as_str() {
        "true" => Some(PassThroughValue::On),
        "onlyLocal" => Some(PassThroughValue::OnlyLocal),
        "" | "false" => None,
        other => {
            unknown_value(report, key, other, "\"true\", \"onlyLocal\" and \"false\"");
            None
        }
    }
}

fn unknown_value(report: &mut Report, key: &str, value: &str, known: &str) {
    let message = format!("{} is none of {known}; the annotation does not decide", quoted(value));
    report.add(ProblemKind::PassThroughValue, format!("metadata.annotations[{key}]"), message);
}
