//! EndpointSlices.

use k8s_openapi::api::discovery::v1 as k8s;

use super::values::{address, port, protocol, quoted};
use super::{Parsed, Report};
use crate::model::objects::{Endpoint, EndpointPort, EndpointSlice, Family, Hints};
use crate::model::problem::{ObjectRef, ProblemKind};
use crate::wanted::ServiceKey;

const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// The EndpointSlice `slice` with namespace and name `key`; `None` if it does not count: it names no Service,
/// belongs to a headless one, or holds host names.
pub fn endpoint_slice(key: &ServiceKey, slice: &k8s::EndpointSlice) -> Parsed<Option<EndpointSlice>> {
    let mut report = Report::new(ObjectRef::endpoint_slice(key));
    let value = read(&mut report, slice);
    report.parsed(value)
}

fn read(report: &mut Report, slice: &k8s::EndpointSlice) -> Option<EndpointSlice> {
    let labels = slice.metadata.labels.as_ref()?;
    if labels.contains_key(HEADLESS_LABEL) {
        return None;
    }
    let service = labels.get(SERVICE_NAME_LABEL).filter(|name| !name.is_empty())?;
    let family = match slice.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        "FQDN" => return None,
        other => {
            let message = format!("{} is none of IPv4, IPv6 and FQDN; the slice is skipped", quoted(other));
            report.add(ProblemKind::Value, "addressType", message);
            return None;
        }
    };
    let ports = slice.ports.iter().flatten().enumerate();
    let endpoints = slice.endpoints.iter().flatten().enumerate();
    Some(EndpointSlice {
        service: service.as_str().into(),
        family,
        ports: ports.filter_map(|(at, port)| read_port(report, at, port)).collect(),
        endpoints: endpoints
            .filter_map(|(at, endpoint)| read_endpoint(report, at, family, endpoint))
            .collect(),
    })
}

fn read_port(report: &mut Report, at: usize, written: &k8s::EndpointPort) -> Option<EndpointPort> {
    // A port without a number means all ports, and a name is what Services match by: neither can be served.
    let name = written.name.as_deref()?;
    let number = written.port.filter(|number| *number != 0)?;
    let number = port(report, format_args!("ports[{at}].port"), number)?;
    let protocol = protocol(report, format_args!("ports[{at}].protocol"), written.protocol.as_deref())?;
    Some(EndpointPort { name: name.into(), protocol, number })
}

fn read_endpoint(
    report: &mut Report,
    at: usize,
    family: Family,
    written: &k8s::Endpoint,
) -> Option<Endpoint> {
    let Some(first) = written.addresses.first() else {
        let message = "the endpoint has no address; it is skipped";
        report.add(ProblemKind::Address, format!("endpoints[{at}].addresses"), message);
        return None;
    };
    let address = address(report, format_args!("endpoints[{at}].addresses[0]"), first)?;
    if Family::of(&address) != family {
        let message =
            format!("{address} is no {} address, as addressType says; it is skipped", family.text());
        report.add(ProblemKind::Family, format!("endpoints[{at}].addresses[0]"), message);
        return None;
    }
    let conditions = written.conditions.as_ref();
    Some(Endpoint {
        address,
        ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
        serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(true),
        terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
        node: written.node_name.as_deref().map(Into::into),
        hints: written.hints.as_ref().and_then(read_hints),
    })
}

fn read_hints(written: &k8s::EndpointHints) -> Option<Box<Hints>> {
    let hints = Hints {
        nodes: written.for_nodes.iter().flatten().map(|node| node.name.as_str().into()).collect(),
        zones: written.for_zones.iter().flatten().map(|zone| zone.name.as_str().into()).collect(),
    };
    (!hints.nodes.is_empty() || !hints.zones.is_empty()).then(|| Box::new(hints))
}
