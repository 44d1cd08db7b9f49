//! EndpointSlices.

use super::values::{address, port, protocol, quoted, text_or_skip};
use super::{Parsed, Report};
use crate::api::{self, Field};
use crate::model::objects::{Endpoint, EndpointPort, EndpointSlice, Family, Hints};
use crate::model::problem::{ObjectRef, ProblemKind};
use crate::wanted::ServiceKey;

const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// The EndpointSlice `slice` with namespace and name `key`; `None` if it does not count: it names no Service,
/// belongs to a headless one, or holds host names.
pub fn endpoint_slice(key: &ServiceKey, slice: &api::EndpointSlice) -> Parsed<Option<EndpointSlice>> {
    let mut report = Report::new(ObjectRef::endpoint_slice(key));
    let value = read(&mut report, slice);
    report.parsed(value)
}

fn read(report: &mut Report, slice: &api::EndpointSlice) -> Option<EndpointSlice> {
    let metadata = report.read("metadata", &slice.metadata)?;
    let labels = report.read("metadata.labels", &metadata.labels)?;
    if labels.contains(HEADLESS_LABEL) {
        return None;
    }
    let service = labels.get(SERVICE_NAME_LABEL)?;
    let service = report.text(format_args!("metadata.labels[{SERVICE_NAME_LABEL}]"), service);
    let service = service.filter(|name| !name.is_empty())?;
    let follows = "the slice is skipped";
    let address_type = match &slice.address_type {
        Field::Absent => "",
        written => report.read_or("addressType", written, follows)?,
    };
    let family = match address_type {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        "FQDN" => return None,
        other => {
            let message = format!("{} is none of IPv4, IPv6 and FQDN; the slice is skipped", quoted(other));
            report.add(ProblemKind::Value, "addressType", message);
            return None;
        }
    };
    let ports = report.entries("ports", &slice.ports).into_iter();
    let endpoints = report.entries("endpoints", &slice.endpoints).into_iter();
    Some(EndpointSlice {
        service: service.into(),
        family,
        ports: ports.filter_map(|(at, port)| read_port(report, at, port)).collect(),
        endpoints: endpoints
            .filter_map(|(at, endpoint)| read_endpoint(report, at, family, endpoint))
            .collect(),
    })
}

fn read_port(report: &mut Report, at: usize, written: &api::EndpointPort) -> Option<EndpointPort> {
    // Without a name it is the empty one, as the API server writes it.
    let name = text_or_skip(report, format_args!("ports[{at}].name"), &written.name)?;
    // A port without a number means all ports, which cannot be served.
    let follows = "the port is skipped";
    let number = *report.read_or(format_args!("ports[{at}].port"), &written.port, follows)?;
    if number == 0 {
        return None;
    }
    let number = port(report, format_args!("ports[{at}].port"), number)?;
    let protocol = protocol(report, format_args!("ports[{at}].protocol"), &written.protocol)?;
    Some(EndpointPort { name: name.unwrap_or_default().into(), protocol, number })
}

fn read_endpoint(
    report: &mut Report,
    at: usize,
    family: Family,
    written: &api::Endpoint,
) -> Option<Endpoint> {
    let follows = "the endpoint is skipped";
    let field = format_args!("endpoints[{at}].addresses");
    let addresses = match &written.addresses {
        Field::Absent => &[],
        written => &report.read_or(field, written, follows)?[..],
    };
    let Some(first) = addresses.first().filter(|first| first.is_there()) else {
        let message = "the endpoint has no address; it is skipped";
        report.add(ProblemKind::Address, format!("endpoints[{at}].addresses"), message);
        return None;
    };
    let first = report.read_or(format_args!("endpoints[{at}].addresses[0]"), first, follows)?;
    let address = address(report, format_args!("endpoints[{at}].addresses[0]"), first)?;
    if Family::of(&address) != family {
        let message =
            format!("{address} is no {} address, as addressType says; it is skipped", family.text());
        report.add(ProblemKind::Family, format!("endpoints[{at}].addresses[0]"), message);
        return None;
    }
    let conditions = report.read(format_args!("endpoints[{at}].conditions"), &written.conditions);
    let mut condition = |name: &str, written: fn(&api::EndpointConditions) -> &Field<bool>| {
        let field = format_args!("endpoints[{at}].conditions.{name}");
        report.read(field, written(conditions?)).copied()
    };
    let ready = condition("ready", |conditions| &conditions.ready);
    let serving = condition("serving", |conditions| &conditions.serving);
    let terminating = condition("terminating", |conditions| &conditions.terminating);
    let node = report.text(format_args!("endpoints[{at}].nodeName"), &written.node_name);
    let hints = report.read(format_args!("endpoints[{at}].hints"), &written.hints);
    Some(Endpoint {
        address,
        ready: ready.unwrap_or(true),
        serving: serving.unwrap_or(true),
        terminating: terminating.unwrap_or(false),
        node: node.map(Into::into),
        hints: hints.and_then(|hints| read_hints(report, at, hints)),
    })
}

fn read_hints(report: &mut Report, at: usize, written: &api::EndpointHints) -> Option<Box<Hints>> {
    let mut names = |which: &str, list: &Field<api::List<api::Named>>| -> Box<[Box<str>]> {
        let field = format!("endpoints[{at}].hints.{which}");
        let mut names = Vec::new();
        for (index, named) in report.entries(&field, list) {
            let name = report.text(format_args!("{field}[{index}].name"), &named.name);
            names.extend(name.map(Box::from));
        }
        names.into_boxed_slice()
    };
    let hints =
        Hints { nodes: names("forNodes", &written.for_nodes), zones: names("forZones", &written.for_zones) };
    (!hints.nodes.is_empty() || !hints.zones.is_empty()).then(|| Box::new(hints))
}
