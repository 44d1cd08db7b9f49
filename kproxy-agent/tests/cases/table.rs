//! The tables as people read them.

use std::collections::BTreeMap;
use std::fmt::Write;

use kproxy::model::{Problem, WantedHealthCheck, WantedNode};
use kproxy::servers::HealthCheck;
use kproxy::wanted::{
    PassThroughRule, ServiceKey, WantedBackend, WantedFrontend, WantedOptOuts, WantedPort, WantedService,
    WantedSide,
};
use kproxy_common::{Address, BackendState, Cidr, Location, Options, Protocol};

/// Everything that is wanted, one line for each frontend and what it leads to.
pub fn print(
    services: &BTreeMap<ServiceKey, WantedService>,
    node: &WantedNode,
    opt_outs: &WantedOptOuts,
    problems: &[Problem],
) -> String {
    let mut out = String::new();
    let addresses: Vec<_> = node.node_port_addresses.iter().map(ToString::to_string).collect();
    let cidrs: Vec<_> = node.service_cidrs.iter().map(cidr).collect();
    let _ = writeln!(out, "node nodePorts=[{}] serviceCIDRs=[{}]", addresses.join(" "), cidrs.join(" "));
    for service in services.values() {
        let _ = writeln!(out, "{} {:?}", service.key, service.kind);
        for (address, kind) in &service.addresses {
            let _ = writeln!(out, "  address {address} {kind:?}");
        }
        for port in &service.ports {
            print_port(&mut out, service, port);
        }
    }
    for (pod, addresses) in &opt_outs.pods {
        let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        let _ = writeln!(out, "opted out {pod} [{}]", addresses.join(" "));
    }
    for problem in problems {
        let _ = writeln!(out, "! {:?} {problem}", problem.kind);
    }
    out
}

/// What is answered on each `healthCheckNodePort` over each family while the proxy is healthy: status, weight, body.
pub fn print_health(checks: &BTreeMap<ServiceKey, WantedHealthCheck>) -> String {
    let mut out = String::new();
    for (service, WantedHealthCheck { port, local_endpoints }) in checks {
        let check = HealthCheck { service: service.clone(), local_endpoints: local_endpoints.clone() };
        for family in local_endpoints.keys() {
            let answer = check.answer(*family, true);
            let status = if answer.is_ok { 200 } else { 503 };
            let body = answer.body.replace(['\n', '\t'], "");
            let _ = writeln!(out, "{} port {port}: {status} weight={} {body}", family.text(), answer.weight);
        }
    }
    out
}

fn print_port(out: &mut String, service: &WantedService, port: &WantedPort) {
    let separator = if port.name.is_empty() { "" } else { ":" };
    let name = format!("{}{separator}{}", service.key, port.name);
    for frontend in &port.frontends {
        let WantedFrontend { key, kind, policy, inside, outside, source_ranges, pass_through_rule } =
            frontend;
        let at = socket(&key.address(), key.port());
        let _ = write!(out, "  {at}/{} {kind:?} {name} policy={policy:?}", protocol(key.protocol()));
        let _ = write!(out, " inside={} outside={}", side(inside, port), side(outside, port));
        if *pass_through_rule != PassThroughRule::NotApplicable {
            let _ = write!(out, " rule={:?}", pass_through_rule.text());
        }
        if !source_ranges.is_empty() {
            let ranges: Vec<_> = source_ranges.iter().map(cidr).collect();
            let _ = write!(out, " from=[{}]", ranges.join(" "));
        }
        out.push('\n');
    }
    let (in_sets, rest) = port.backends.split_at(usize::from(port.in_sets));
    let _ = write!(out, "  backends {}: ", protocol(port.protocol));
    let _ = write!(out, "[{}]", in_sets.iter().map(backend).collect::<Vec<_>>().join(" "));
    if !rest.is_empty() {
        let _ = write!(out, " serving only [{}]", rest.iter().map(backend).collect::<Vec<_>>().join(" "));
    }
    if port.affinity_timeout > 0 {
        let _ = write!(out, " affinity={}s", port.affinity_timeout);
    }
    out.push('\n');
}

fn side(side: &WantedSide, port: &WantedPort) -> String {
    let set = &port.backends[usize::from(side.offset)..usize::from(side.offset) + usize::from(side.count)];
    let mut out = format!("{:?}", side.mode);
    if !set.is_empty() {
        let list: Vec<_> = set.iter().map(|backend| socket(&backend.address, backend.port)).collect();
        let _ = write!(out, "[{}]", list.join(" "));
    }
    let names = [
        (Options::AFFINITY, "AFFINITY"),
        (Options::SOURCE_RANGES, "SOURCE_RANGES"),
        (Options::HOST_IN_RANGES, "HOST_IN_RANGES"),
        (Options::MASQUERADE, "MASQUERADE"),
        (Options::MASQUERADE_REMOTE, "MASQUERADE_REMOTE"),
        (Options::MASQUERADE_OFF_CLUSTER, "MASQUERADE_OFF_CLUSTER"),
    ];
    for (bit, name) in names {
        if side.options & bit != 0 {
            let _ = write!(out, "+{name}");
        }
    }
    out
}

fn backend(backend: &WantedBackend) -> String {
    let local = if backend.location == Location::Local { " local" } else { "" };
    let state = if backend.state == BackendState::Ready { "" } else { " terminating" };
    format!("{}{local}{state}", socket(&backend.address, backend.port))
}

fn socket(address: &Address, port: u16) -> String {
    std::net::SocketAddr::new((*address).into(), port).to_string()
}

fn protocol(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
    }
}

fn cidr(cidr: &Cidr) -> String {
    let bits = cidr.prefix_length();
    format!("{}/{}", cidr.address(), if cidr.address().is_v4() { bits - 96 } else { bits })
}
