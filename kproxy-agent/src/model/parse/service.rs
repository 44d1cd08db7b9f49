//! Services.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use kproxy_common::{Address, Cidr, ServiceKind, TrafficPolicy};

use super::values::{address, cidr, port, protocol, quoted, text_or_skip};
use super::{Parsed, Report};
use crate::api::{self, Field, Text};
use crate::model::objects::{Family, LoadBalancer, PassThroughValue, ServedBy, Service, ServicePort};
use crate::model::problem::{ObjectRef, ProblemKind};
use crate::wanted::{PassThroughRule, ServiceKey};

const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
const OWN_ANNOTATION: &str = "kproxy.io/pass-through";
const ELB_ANNOTATION: &str = "kubernetes.io/elb.pass-through";
/// `sessionAffinityConfig.clientIP.timeoutSeconds` where none is written (`DefaultClientIPServiceAffinitySeconds`).
const DEFAULT_AFFINITY_TIMEOUT: u32 = 10_800;
/// Its upper bound (`MaxClientIPServiceAffinitySeconds`).
const MAX_AFFINITY_TIMEOUT: u32 = 86_400;

/// An entry of `spec.clusterIPs` with its place, or `spec.clusterIP`.
type WrittenIp<'a> = (Option<usize>, &'a str);

/// The Service `service` with namespace and name `key`. `extra_annotations` are read after
/// `kubernetes.io/elb.pass-through`, and like it.
pub fn service(
    key: &Arc<ServiceKey>,
    service: &api::Service,
    extra_annotations: &[String],
) -> Parsed<Service> {
    let mut report = Report::new(ObjectRef::service(key));
    let (no_metadata, no_spec) = (api::Metadata::default(), api::ServiceSpec::default());
    let metadata = report.read("metadata", &service.metadata).unwrap_or(&no_metadata);
    let spec = report.read("spec", &service.spec).unwrap_or(&no_spec);
    let type_ = report.text("spec.type", &spec.type_);
    let written_ips = written_cluster_ips(&mut report, spec);
    let mut value = Service {
        key: Arc::clone(key),
        created: created(&mut report, metadata),
        kind: ServiceKind::ClusterIp,
        served_by: served_by(&mut report, metadata, type_, &written_ips),
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
        report_missing_cluster_ip(&mut report, type_, &written_ips);
        return report.parsed(value);
    }
    value.kind = kind(&mut report, type_);
    value.cluster_ips = cluster_ips(&mut report, &written_ips);
    if value.served_by == ServedBy::OtherProxy {
        return report.parsed(value);
    }
    value.families = families(&mut report, spec, &value.cluster_ips);
    value.external_ips = external_ips(&mut report, spec, &value.families);
    value.load_balancers = load_balancers(&mut report, service, &value.families);
    value.ports = ports(&mut report, spec);
    value.internal_policy = policy(&mut report, "spec.internalTrafficPolicy", &spec.internal_traffic_policy);
    value.external_policy = policy(&mut report, "spec.externalTrafficPolicy", &spec.external_traffic_policy);
    value.affinity_timeout = affinity_timeout(&mut report, spec);
    value.source_ranges = source_ranges(&mut report, spec);
    if value.kind == ServiceKind::LoadBalancer && value.external_policy == TrafficPolicy::Local {
        value.health_check_node_port =
            optional_port(&mut report, "spec.healthCheckNodePort", &spec.health_check_node_port);
    }
    value.pass_through = pass_through(&mut report, metadata, extra_annotations);
    report.parsed(value)
}

fn created(report: &mut Report, metadata: &api::Metadata) -> i64 {
    const LATEST: i64 = i64::MAX;
    const FIELD: &str = "metadata.creationTimestamp";
    let Some(text) = report.text(FIELD, &metadata.creation_timestamp) else { return LATEST };
    match text.parse::<Timestamp>() {
        Ok(time) => time.as_second(),
        Err(_) => {
            let message = format!("{} is no time; the Service counts as the youngest", quoted(text));
            report.add(ProblemKind::Value, FIELD, message);
            LATEST
        }
    }
}

fn served_by(
    report: &mut Report,
    metadata: &api::Metadata,
    type_: Option<&str>,
    written_ips: &[WrittenIp<'_>],
) -> ServedBy {
    if type_ == Some("ExternalName") || written_ips.is_empty() {
        return ServedBy::Nobody;
    }
    if written_ips.iter().any(|(_, text)| *text == "None") {
        return ServedBy::Nobody;
    }
    let labels = report.read("metadata.labels", &metadata.labels);
    if labels.is_some_and(|labels| labels.contains(PROXY_NAME_LABEL)) {
        return ServedBy::OtherProxy;
    }
    ServedBy::Us
}

/// An API server never leaves it empty: this is for whoever wrote the Service into a file.
fn report_missing_cluster_ip(report: &mut Report, type_: Option<&str>, written_ips: &[WrittenIp<'_>]) {
    if type_ == Some("ExternalName") || !written_ips.is_empty() {
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
fn written_cluster_ips<'a>(report: &mut Report, spec: &'a api::ServiceSpec) -> Vec<WrittenIp<'a>> {
    let many = report.entries("spec.clusterIPs", &spec.cluster_ips).into_iter();
    let mut written: Vec<WrittenIp<'a>> = many.map(|(at, text)| (Some(at), &**text)).collect();
    if spec.cluster_ips.get().is_none_or(Vec::is_empty) {
        written.extend(report.text("spec.clusterIP", &spec.cluster_ip).map(|text| (None, text)));
    }
    written.retain(|(_, text)| !text.is_empty());
    written
}

fn cluster_ips(report: &mut Report, written_ips: &[WrittenIp<'_>]) -> Box<[Address]> {
    let mut seen = BTreeSet::new();
    let read = written_ips.iter().filter_map(|(at, text)| match at {
        Some(at) => address(report, format_args!("spec.clusterIPs[{at}]"), text),
        None => address(report, "spec.clusterIP", text),
    });
    read.filter(|ip| seen.insert(*ip)).collect()
}

fn families(report: &mut Report, spec: &api::ServiceSpec, cluster_ips: &[Address]) -> Box<[Family]> {
    let mut families: BTreeSet<_> = cluster_ips.iter().map(Family::of).collect();
    for (at, text) in report.entries("spec.ipFamilies", &spec.ip_families) {
        match &**text {
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

fn external_ips(report: &mut Report, spec: &api::ServiceSpec, families: &[Family]) -> Box<[Address]> {
    let mut read = Vec::new();
    let mut seen = BTreeSet::new();
    for (at, text) in report.entries("spec.externalIPs", &spec.external_ips) {
        let field = format!("spec.externalIPs[{at}]");
        let Some(ip) = address(report, &field, text) else { continue };
        if has_family(report, &field, &ip, families) && seen.insert(ip) {
            read.push(ip);
        }
    }
    read.into_boxed_slice()
}

fn load_balancers(report: &mut Report, service: &api::Service, families: &[Family]) -> Box<[LoadBalancer]> {
    let status = report.read("status", &service.status);
    let status = status.and_then(|status| report.read("status.loadBalancer", &status.load_balancer));
    let mut read = Vec::new();
    let mut seen = BTreeSet::new();
    let written = status.map(|status| report.entries("status.loadBalancer.ingress", &status.ingress));
    for (at, ingress) in written.into_iter().flatten() {
        let field = format!("status.loadBalancer.ingress[{at}].ip");
        let Some(text) = report.text(&field, &ingress.ip).filter(|text| !text.is_empty()) else { continue };
        let Some(address) = address(report, &field, text) else { continue };
        let ip_mode = report.text(format_args!("status.loadBalancer.ingress[{at}].ipMode"), &ingress.ip_mode);
        let is_proxy = match ip_mode {
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

fn ports(report: &mut Report, spec: &api::ServiceSpec) -> Box<[ServicePort]> {
    let mut seen = BTreeSet::new();
    let mut read = Vec::new();
    for (at, written) in report.entries("spec.ports", &spec.ports) {
        let number = match &written.port {
            Field::Absent => Some(0),
            number => {
                let field = format_args!("spec.ports[{at}].port");
                report.read_or(field, number, "the port is skipped").copied()
            }
        };
        let Some(number) = number else { continue };
        let Some(number) = port(report, format_args!("spec.ports[{at}].port"), number) else {
            continue;
        };
        let field = format!("spec.ports[{at}].protocol");
        let Some(protocol) = protocol(report, field, &written.protocol) else { continue };
        let field = format_args!("spec.ports[{at}].name");
        let Some(name) = text_or_skip(report, field, &written.name) else { continue };
        let name = name.unwrap_or_default();
        // Slices are matched by name and protocol: two such ports could not be told apart.
        if !seen.insert((name, protocol)) {
            let message = format!("a port before it is called {} too; this one is skipped", quoted(name));
            report.add(ProblemKind::Duplicate, format!("spec.ports[{at}].name"), message);
            continue;
        }
        let field = format_args!("spec.ports[{at}].nodePort");
        let node_port = optional_port(report, field, &written.node_port);
        read.push(ServicePort { name: name.into(), protocol, port: number, node_port });
    }
    read.into_boxed_slice()
}

/// A port, where there is one: 0 is none.
fn optional_port(report: &mut Report, field: impl Display, written: &Field<i64>) -> Option<u16> {
    let number = report.read(&field, written).copied().filter(|number| *number != 0)?;
    port(report, field, number)
}

fn policy(report: &mut Report, field: &str, written: &Field<Text>) -> TrafficPolicy {
    match report.text(field, written) {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            let message = format!("{} is none of Cluster and Local; it counts as Cluster", quoted(other));
            report.add(ProblemKind::Value, field, message);
            TrafficPolicy::Cluster
        }
    }
}

fn affinity_timeout(report: &mut Report, spec: &api::ServiceSpec) -> u32 {
    const CONFIG: &str = "spec.sessionAffinityConfig";
    const CLIENT_IP: &str = "spec.sessionAffinityConfig.clientIP";
    const TIMEOUT: &str = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
    match report.text("spec.sessionAffinity", &spec.session_affinity) {
        None | Some("" | "None") => return 0,
        Some("ClientIP") => {}
        Some(other) => {
            let message = format!("{} is none of None and ClientIP; it counts as None", quoted(other));
            report.add(ProblemKind::Value, "spec.sessionAffinity", message);
            return 0;
        }
    }
    let config = report.read(CONFIG, &spec.session_affinity_config);
    let config = config.and_then(|config| report.read(CLIENT_IP, &config.client_ip));
    let seconds = config.and_then(|config| report.read(TIMEOUT, &config.timeout_seconds));
    match seconds.map(|seconds| u32::try_from(*seconds).map_err(|_| *seconds)) {
        None => DEFAULT_AFFINITY_TIMEOUT,
        Some(Ok(seconds @ 1..=MAX_AFFINITY_TIMEOUT)) => seconds,
        Some(other) => {
            let other = other.map_or_else(|number| number, i64::from);
            let message = format!(
                "{other} is not within 1 and {MAX_AFFINITY_TIMEOUT} seconds; {DEFAULT_AFFINITY_TIMEOUT} is used"
            );
            report.add(ProblemKind::Value, TIMEOUT, message);
            DEFAULT_AFFINITY_TIMEOUT
        }
    }
}

fn source_ranges(report: &mut Report, spec: &api::ServiceSpec) -> Box<[Cidr]> {
    const FIELD: &str = "spec.loadBalancerSourceRanges";
    let mut ranges = Vec::new();
    for (at, text) in report.entries(FIELD, &spec.load_balancer_source_ranges) {
        match cidr(text.trim()) {
            Some(range) => ranges.push(range),
            None => {
                let message = format!(
                    "{} is no CIDR; it is skipped, and with no other range of a family everyone may come in",
                    quoted(text)
                );
                report.add(ProblemKind::Address, format!("{FIELD}[{at}]"), message);
            }
        }
    }
    ranges.sort_by_key(|range: &Cidr| (range.address(), range.prefix_length()));
    ranges.dedup();
    ranges.into_boxed_slice()
}

fn pass_through(
    report: &mut Report,
    metadata: &api::Metadata,
    extra_annotations: &[String],
) -> Box<[(PassThroughRule, PassThroughValue)]> {
    let Some(annotations) = report.read("metadata.annotations", &metadata.annotations) else {
        return Box::default();
    };
    let mut said = Vec::new();
    match annotation(report, annotations, OWN_ANNOTATION) {
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

fn cloud_value(report: &mut Report, annotations: &api::Strings, key: &str) -> Option<PassThroughValue> {
    match annotation(report, annotations, key)? {
        "true" => Some(PassThroughValue::On),
        "onlyLocal" => Some(PassThroughValue::OnlyLocal),
        "" | "false" => None,
        other => {
            unknown_value(report, key, other, "\"true\", \"onlyLocal\" and \"false\"");
            None
        }
    }
}

fn annotation<'a>(report: &mut Report, annotations: &'a api::Strings, key: &str) -> Option<&'a str> {
    let field = format_args!("metadata.annotations[{key}]");
    report.read_or(field, annotations.get(key)?, "the annotation does not decide").map(|text| &**text)
}

fn unknown_value(report: &mut Report, key: &str, value: &str, known: &str) {
    let message = format!("{} is none of {known}; the annotation does not decide", quoted(value));
    report.add(ProblemKind::PassThroughValue, format!("metadata.annotations[{key}]"), message);
}
