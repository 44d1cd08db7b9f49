//! The own Node, and ServiceCIDRs.

use kproxy_common::Cidr;

use super::values::{address, cidr, quoted};
use super::{Parsed, Report};
use crate::api::{self, Field, List, Text};
use crate::model::objects::{Family, Node};
use crate::model::problem::{ObjectRef, ProblemKind};

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// The Node `node`.
pub fn node(node: &api::Node) -> Parsed<Node> {
    let metadata = node.metadata.get();
    let name = metadata.and_then(api::Metadata::name).unwrap_or_default();
    let mut report = Report::new(ObjectRef::node(name));
    let labels = metadata.and_then(|metadata| report.read("metadata.labels", &metadata.labels));
    let zone = labels.and_then(|labels| labels.get(ZONE_LABEL));
    let zone = zone.and_then(|zone| report.text(format_args!("metadata.labels[{ZONE_LABEL}]"), zone));
    let mut found = Vec::new();
    if let Some(status) = report.read("status", &node.status) {
        for (at, entry) in report.entries("status.addresses", &status.addresses) {
            let rank = match report.text(format_args!("status.addresses[{at}].type"), &entry.type_) {
                Some("InternalIP") => 0,
                Some("ExternalIP") => 1,
                _ => continue,
            };
            let field = format_args!("status.addresses[{at}].address");
            let written = report.text(field, &entry.address);
            let ip = written.and_then(|text| address(&mut report, field, text));
            found.extend(ip.map(|ip| (rank, ip)));
        }
    }
    // Stable: among addresses of one type the Node's own order counts.
    found.sort_by_key(|(rank, _)| *rank);
    let first_of = |family| found.iter().map(|(_, ip)| *ip).find(|ip| Family::of(ip) == family);
    let addresses = Family::ALL.into_iter().filter_map(first_of).collect();
    let zone = zone.filter(|zone| !zone.is_empty()).map(Into::into);
    let spec = report.read("spec", &node.spec);
    let pod_cidrs = spec.map(|spec| ranges(&mut report, "spec.podCIDRs", &spec.pod_cidrs));
    report.parsed(Node { zone, addresses, pod_cidrs: pod_cidrs.unwrap_or_default() })
}

/// The ranges of the ServiceCIDR `object`, which is called `name`.
pub fn service_cidr(name: &str, object: &api::ServiceCidr) -> Parsed<Vec<Cidr>> {
    let mut report = Report::new(ObjectRef::service_cidr(name));
    let spec = report.read("spec", &object.spec);
    let ranges = spec.map(|spec| ranges(&mut report, "spec.cidrs", &spec.cidrs));
    report.parsed(ranges.unwrap_or_default())
}

fn ranges(report: &mut Report, field: &str, written: &Field<List<Text>>) -> Vec<Cidr> {
    let mut ranges = Vec::new();
    for (at, text) in report.entries(field, written) {
        match cidr(text) {
            Some(range) => ranges.push(range),
            None => {
                let message = format!("{} is no CIDR; it is skipped", quoted(text));
                report.add(ProblemKind::Address, format!("{field}[{at}]"), message);
            }
        }
    }
    ranges
}
