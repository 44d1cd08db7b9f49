//! The own Node, and ServiceCIDRs.

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kproxy_common::Cidr;

use super::values::{address, cidr, quoted};
use super::{Parsed, Report};
use crate::model::objects::{Family, Node};
use crate::model::problem::{ObjectRef, ProblemKind};

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// The Node `node`.
pub fn node(node: &core::Node) -> Parsed<Node> {
    let mut report = Report::new(ObjectRef::node(node.metadata.name.as_deref().unwrap_or_default()));
    let zone = node.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE_LABEL));
    let written = node.status.iter().flat_map(|status| &status.addresses).flatten();
    let mut found = Vec::new();
    for (at, entry) in written.enumerate() {
        let rank = match entry.type_.as_str() {
            "InternalIP" => 0,
            "ExternalIP" => 1,
            _ => continue,
        };
        if let Some(ip) = address(&mut report, format_args!("status.addresses[{at}].address"), &entry.address)
        {
            found.push((rank, ip));
        }
    }
    // Stable: among addresses of one type the Node's own order counts.
    found.sort_by_key(|(rank, _)| *rank);
    let first_of = |family| found.iter().map(|(_, ip)| *ip).find(|ip| Family::of(ip) == family);
    let addresses = Family::ALL.into_iter().filter_map(first_of).collect();
    let zone = zone.filter(|zone| !zone.is_empty()).map(|zone| zone.as_str().into());
    let pods = node.spec.iter().flat_map(|spec| &spec.pod_cidrs).flatten();
    let pod_cidrs = pods.filter_map(|text| cidr(text)).collect();
    report.parsed(Node { zone, addresses, pod_cidrs })
}

/// The ranges of the ServiceCIDR `object`, which is called `name`.
pub fn service_cidr(name: &str, object: &ServiceCIDR) -> Parsed<Vec<Cidr>> {
    let mut report = Report::new(ObjectRef::service_cidr(name));
    let written = object.spec.iter().flat_map(|spec| &spec.cidrs).flatten();
    let mut ranges = Vec::new();
    for (at, text) in written.enumerate() {
        match cidr(text) {
            Some(range) => ranges.push(range),
            None => {
                let message = format!("{} is no CIDR; it is skipped", quoted(text));
                report.add(ProblemKind::Address, format!("spec.cidrs[{at}]"), message);
            }
        }
    }
    report.parsed(ranges)
}
