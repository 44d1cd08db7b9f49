//! `kproxy services`: what is served here, read from the maps alone, so that it works with the agent stopped.

use std::{collections::BTreeMap, fmt::Write as _, net::IpAddr, time::SystemTime};

use anyhow::Result;
use kproxy_common::{
    Backend, Counters, FrontendKey, FrontendKind, Mode, Options, ServiceEntry, ServiceInfo, ServiceKind,
    Side, TrafficPolicy,
};
use serde::Serialize;

use super::print;
use crate::{
    cli::{Common, ServicesArgs},
    maps::kernel::KernelMaps,
    wanted::PassThroughRule,
};

/// Prints the Services that the maps hold.
pub fn run(common: &Common, args: &ServicesArgs) -> Result<()> {
    let maps = KernelMaps::open(&common.bpf_root)?;
    let read = maps.read_all()?;
    let counters = maps.counters()?;
    let rows = read.frontends.iter().filter_map(|(key, number)| {
        let at = *number as usize;
        let entry = ServiceEntry::from_words(*read.entries.get(at)?).ok()?;
        Some(Row {
            number: *number,
            key: *key,
            entry,
            info: read.infos.get(at)?.as_ref()?,
            counters: counters.get(at).copied()?,
        })
    });
    let backend = |slot: u32| read.backends.get(slot as usize).copied().flatten();
    let mut services = collect(rows, backend);
    if let Some(filter) = &args.filter {
        services
            .retain(|service| format!("{}/{}", service.namespace, service.name).contains(filter.as_str()));
    }
    let filter = args.filter.as_deref();
    print::print(&List { items: services }, args.output, |list, wide| match filter {
        Some(filter) if list.items.is_empty() => {
            format!("No Service here has {filter:?} in its namespace/name.\n")
        }
        _ => text(list, wide, now()),
    })
}

/// One frontend as the maps have it.
struct Row<'a> {
    number: u32,
    key: FrontendKey,
    entry: ServiceEntry,
    info: &'a ServiceInfo,
    counters: Counters,
}

#[derive(Serialize)]
struct List {
    items: Vec<Service>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Service {
    namespace: String,
    name: String,
    r#type: &'static str,
    /// Endpoints over all ports and families, each counted once.
    backends: usize,
    /// Connections (UDP: flows) sent to backends since the frontends came.
    connections: u64,
    /// Connections left to the load balancer.
    pass_through_connections: u64,
    /// `served`, or what keeps connections from being.
    status: &'static str,
    /// When a frontend last changed, in seconds since 1970.
    changed: u64,
    frontends: Vec<Frontend>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Frontend {
    /// `nodePort` stands for every node address that answers NodePorts.
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<IpAddr>,
    family: &'static str,
    port: u16,
    port_name: String,
    protocol: &'static str,
    traffic_policy: &'static str,
    /// What happens to clients inside: `forward`, `pass-through` and so on.
    mode: &'static str,
    outside_mode: &'static str,
    /// Of a load-balancer address: which rule decided about pass-through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pass_through_rule: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    affinity_seconds: Option<u32>,
    /// Where clients inside are sent.
    backends: Vec<BackendView>,
    /// Where traffic from outside is sent.
    outside_backends: Vec<BackendView>,
    connections: u64,
    pass_through_connections: u64,
    number: u32,
}

#[derive(Serialize, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "camelCase")]
struct BackendView {
    address: String,
    local: bool,
}

fn collect<'a>(
    rows: impl Iterator<Item = Row<'a>>,
    backend: impl Fn(u32) -> Option<Backend>,
) -> Vec<Service> {
    let mut services: BTreeMap<(String, String), Service> = BTreeMap::new();
    for row in rows {
        let full = row.info.name();
        let (service, port_name) = full.split_once(':').unwrap_or((full, ""));
        let (namespace, name) = service.split_once('/').unwrap_or(("", service));
        let entry = services.entry((namespace.to_owned(), name.to_owned())).or_insert_with(|| Service {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            r#type: service_type(row.info.service_kind),
            backends: 0,
            connections: 0,
            pass_through_connections: 0,
            status: "served",
            changed: 0,
            frontends: Vec::new(),
        });
        entry.connections += row.counters.connections;
        entry.pass_through_connections += row.counters.pass_through;
        entry.changed = entry.changed.max(row.info.changed);
        entry.frontends.push(frontend(&row, port_name, &backend));
    }
    let mut services: Vec<Service> = services.into_values().collect();
    for service in &mut services {
        service.frontends.sort_by_key(|frontend| {
            (kind_order(frontend.kind), frontend.family, frontend.address, frontend.port, frontend.protocol)
        });
        let all: std::collections::BTreeSet<_> =
            service.frontends.iter().flat_map(|frontend| &frontend.backends).cloned().collect();
        let all_outside = service.frontends.iter().flat_map(|frontend| &frontend.outside_backends).cloned();
        let all: std::collections::BTreeSet<_> = all.into_iter().chain(all_outside).collect();
        service.backends = all.len();
        service.status = if service.backends == 0 { "no endpoints" } else { "served" };
    }
    services
}

fn frontend(row: &Row<'_>, port_name: &str, backend: &impl Fn(u32) -> Option<Backend>) -> Frontend {
    let (key, info, entry) = (&row.key, row.info, &row.entry);
    let address = key.address();
    let is_load_balancer = info.frontend_kind == FrontendKind::LoadBalancer as u8;
    let timeout = entry.identity.affinity_timeout();
    Frontend {
        kind: frontend_kind(info.frontend_kind),
        address: (!key.is_node_port()).then(|| IpAddr::from(address)),
        family: if address.is_v4() { "IPv4" } else { "IPv6" },
        port: key.port(),
        port_name: port_name.to_owned(),
        protocol: match key.protocol() {
            kproxy_common::Protocol::Tcp => "TCP",
            kproxy_common::Protocol::Udp => "UDP",
            kproxy_common::Protocol::Sctp => "SCTP",
        },
        traffic_policy: match TrafficPolicy::try_from(info.traffic_policy) {
            Ok(TrafficPolicy::Cluster) => "Cluster",
            Ok(TrafficPolicy::Local) => "Local",
            Err(_) => "unknown",
        },
        mode: mode(&entry.inside),
        outside_mode: mode(&entry.outside),
        pass_through_rule: is_load_balancer.then(|| {
            PassThroughRule::from_number(info.pass_through_rule).map_or("unknown", PassThroughRule::text)
        }),
        affinity_seconds: (entry.inside.has(Options::AFFINITY) && timeout > 0).then_some(timeout),
        backends: backends(&entry.inside, backend),
        outside_backends: backends(&entry.outside, backend),
        connections: row.counters.connections,
        pass_through_connections: row.counters.pass_through,
        number: row.number,
    }
}

fn backends(side: &Side, backend: &impl Fn(u32) -> Option<Backend>) -> Vec<BackendView> {
    let first = side.first_slot();
    let mut views: Vec<BackendView> = (first..first.saturating_add(u32::from(side.count())))
        .filter_map(backend)
        .map(|backend| BackendView {
            address: std::net::SocketAddr::new(backend.address().into(), backend.port()).to_string(),
            local: backend.is_local(),
        })
        .collect();
    views.sort();
    views
}

fn text(list: &List, wide: bool, now: u64) -> String {
    if list.items.is_empty() {
        return "No Services are served here.\n".to_owned();
    }
    let mut rows = Vec::new();
    for service in &list.items {
        for (place, frontend) in service.frontends.iter().enumerate() {
            let first = |text: String| if place == 0 { text } else { String::new() };
            let mut row = vec![
                first(service.namespace.clone()),
                first(service.name.clone()),
                first(service.r#type.to_owned()),
                listening(frontend),
                mode_text(frontend),
                frontend.backends.len().to_string(),
                connections_text(frontend),
                first(service.status.to_owned()),
                first(age(now.saturating_sub(service.changed))),
            ];
            if wide {
                let names = |views: &[BackendView]| {
                    let mut text = String::new();
                    for (place, view) in views.iter().enumerate() {
                        let _ = write!(
                            text,
                            "{}{}{}",
                            if place == 0 { "" } else { "," },
                            view.address,
                            if view.local { "*" } else { "" }
                        );
                    }
                    text
                };
                row.extend([
                    frontend.port_name.clone(),
                    frontend.traffic_policy.to_owned(),
                    names(&frontend.backends),
                    if frontend.outside_backends == frontend.backends {
                        "same".to_owned()
                    } else {
                        names(&frontend.outside_backends)
                    },
                    frontend.number.to_string(),
                ]);
            }
            rows.push(row);
        }
    }
    let mut header =
        vec!["NAMESPACE", "NAME", "TYPE", "FRONTEND", "MODE", "BACKENDS", "CONNECTIONS", "STATUS", "CHANGED"];
    if wide {
        header.extend(["PORT", "POLICY", "INSIDE (* here)", "OUTSIDE", "NUMBER"]);
    }
    print::table(&header, &rows)
}

fn listening(frontend: &Frontend) -> String {
    let address = match frontend.address {
        Some(IpAddr::V6(address)) => format!("[{address}]"),
        Some(address) => address.to_string(),
        None => format!("node {}", frontend.family),
    };
    format!("{address}:{}/{} {}", frontend.port, frontend.protocol, frontend.kind)
}

fn mode_text(frontend: &Frontend) -> String {
    match frontend.pass_through_rule {
        Some(rule) => format!("{} ({rule})", frontend.mode),
        None => frontend.mode.to_owned(),
    }
}

fn connections_text(frontend: &Frontend) -> String {
    if frontend.pass_through_connections == 0 {
        return frontend.connections.to_string();
    }
    format!("{} + {} passed through", frontend.connections, frontend.pass_through_connections)
}

fn mode(side: &Side) -> &'static str {
    match side.mode() {
        Mode::Unused => "unused",
        Mode::Forward if side.count() == 0 => "reject",
        Mode::Forward => "forward",
        Mode::PassThrough => "pass-through",
        Mode::PassThroughPods => "pass-through for pods",
        Mode::PassThroughHost => "pass-through for the host",
        Mode::Reject => "reject",
        Mode::Drop => "drop",
        Mode::LocalAddress => "local-address",
    }
}

fn service_type(number: u8) -> &'static str {
    match ServiceKind::try_from(number) {
        Ok(ServiceKind::ClusterIp) => "ClusterIP",
        Ok(ServiceKind::NodePort) => "NodePort",
        Ok(ServiceKind::LoadBalancer) => "LoadBalancer",
        Err(_) => "unknown",
    }
}

fn frontend_kind(number: u8) -> &'static str {
    match FrontendKind::try_from(number) {
        Ok(FrontendKind::ClusterIp) => "ClusterIP",
        Ok(FrontendKind::NodePort) => "NodePort",
        Ok(FrontendKind::ExternalIp) => "ExternalIP",
        Ok(FrontendKind::LoadBalancer) => "LoadBalancer",
        Err(_) => "unknown",
    }
}

fn kind_order(kind: &str) -> usize {
    ["ClusterIP", "ExternalIP", "LoadBalancer", "NodePort"]
        .iter()
        .position(|known| *known == kind)
        .unwrap_or(9)
}

/// As kubectl prints ages.
fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
