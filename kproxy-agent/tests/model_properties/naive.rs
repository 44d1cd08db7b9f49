//! A second reading of the rules, straight from the objects: slow, with nothing shared with the model but the
//! types of its answer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::Endpoint;
use kproxy::model::{NodeConfig, PassThroughScope};
use kproxy::wanted::ServiceKey;
use kproxy_common::{Address, FrontendKey, FrontendKind, Mode, Options, Protocol};

use crate::generate::{EXTRA_ANNOTATION, NODE, World};

pub type Backends = BTreeSet<(Address, u16)>;

/// What a frontend should do.
pub struct Frontend {
    pub service: ServiceKey,
    pub kind: FrontendKind,
    /// The name of its port.
    pub port: String,
    pub inside: Side,
    pub outside: Side,
    pub affinity_timeout: u32,
    /// Every backend that is ready or serving.
    pub serving: Backends,
    /// Those that are on this node.
    pub here: Backends,
    /// Whether a client may use it.
    pub lets_in: Box<dyn Fn(&Address) -> bool>,
    /// Whether the node itself may, as one of its own addresses.
    pub lets_host_in: bool,
}

/// What it should do for one side.
#[derive(PartialEq, Eq, Debug)]
pub struct Side {
    pub mode: Mode,
    pub backends: Backends,
    pub masquerade: u8,
    pub affinity: bool,
    /// Whether it is the local set.
    pub is_local: bool,
}

/// The Pods that are opted out of the socket hooks, and their addresses.
pub fn opt_outs(config: &NodeConfig, world: &World) -> BTreeMap<ServiceKey, Box<[Address]>> {
    let mut out = BTreeMap::new();
    for (key, pod) in &world.pods {
        let annotations = pod.metadata.annotations.clone().unwrap_or_default();
        let (spec, status) = (pod.spec.clone().unwrap_or_default(), pod.status.clone().unwrap_or_default());
        let ips = status.pod_ips.unwrap_or_default();
        let ips: Vec<_> =
            ips.iter().filter_map(|ip| ip.ip.parse::<IpAddr>().ok()).map(Address::from).collect();
        let is_out = config.has_netns_cookies
            && annotations.get("kproxy.io/socket-hooks").is_some_and(|value| value == "false")
            && spec.node_name.is_some_and(|name| name == NODE)
            && !spec.host_network.unwrap_or_default()
            && !["Succeeded", "Failed"].contains(&status.phase.unwrap_or_default().as_str())
            && !ips.is_empty();
        if is_out {
            out.insert(key.clone(), ips.into_boxed_slice());
        }
    }
    out
}

/// Who has which frontend, and what it does.
pub fn frontends(config: &NodeConfig, world: &World) -> BTreeMap<FrontendKey, Frontend> {
    let mut taken = BTreeMap::new();
    for (key, service) in by_age(world) {
        for (frontend, kind, name, is_proxy) in candidates(config, service) {
            taken.entry(frontend).or_insert_with(|| {
                Some(decide(config, world, (key, service), &frontend, kind, &name, is_proxy))
            });
        }
        for (_, frontend) in health_check_ports(service) {
            taken.entry(frontend).or_insert(None);
        }
    }
    taken.into_iter().filter_map(|(key, frontend)| Some((key, frontend?))).collect()
}

/// What the load balancers of a Service are told: the port, and for IPv4 (true) and IPv6 how many are here.
pub type HealthCheck = (u16, BTreeMap<bool, u32>);

/// Whose health checks are answered, and what.
pub fn health_checks(config: &NodeConfig, world: &World) -> BTreeMap<ServiceKey, HealthCheck> {
    let (mut taken, mut found) = (BTreeSet::new(), BTreeMap::new());
    for (key, service) in by_age(world) {
        let own: BTreeSet<_> = candidates(config, service).into_iter().map(|(key, ..)| key).collect();
        let asked = health_check_ports(service);
        for (port, frontend) in &asked {
            // A port that is a NodePort of the same Service, too, answers no health checks at all.
            let clashes = asked.iter().any(|(_, frontend)| own.contains(frontend));
            if !clashes && !taken.contains(frontend) {
                let is_v4 = frontend.address().is_v4();
                let (_, counts) = found.entry(key.clone()).or_insert((*port, BTreeMap::new()));
                counts.insert(is_v4, ready_here(world, key, is_v4));
            }
        }
        taken.extend(own);
        taken.extend(asked.into_iter().map(|(_, frontend)| frontend));
    }
    found
}

/// Every ClusterIP, the oldest claim to it first, and whether its Service is ours or another proxy's.
pub fn addresses_by_age(world: &World) -> Vec<(Address, bool)> {
    let claims = by_age(world).into_iter().flat_map(|(_, service)| {
        let is_ours = service.metadata.labels.as_ref().is_none_or(|labels| labels.is_empty());
        let mut as_if_ours = service.clone();
        as_if_ours.metadata.labels = None;
        served_ips(&as_if_ours).into_iter().map(move |ip| (ip, is_ours))
    });
    claims.collect()
}

fn by_age(world: &World) -> Vec<(&ServiceKey, &Service)> {
    let mut by_age: Vec<_> = world.services.iter().collect();
    by_age.sort_by_key(|(key, service)| (created(service), *key));
    by_age
}

/// `healthCheckNodePort` as a claim to the port of each family, where the Service needs one.
fn health_check_ports(service: &Service) -> Vec<(u16, FrontendKey)> {
    let spec = service.spec.as_ref().unwrap();
    let is_needed = spec.type_.as_deref() == Some("LoadBalancer")
        && spec.external_traffic_policy.as_deref() == Some("Local");
    let Some(port @ 1..) = spec.health_check_node_port.and_then(|number| u16::try_from(number).ok()) else {
        return Vec::new();
    };
    if !is_needed {
        return Vec::new();
    }
    let ips: BTreeSet<_> =
        served_ips(service).iter().map(|ip| FrontendKey::node_port(ip, port, Protocol::Tcp)).collect();
    ips.into_iter().map(|key| (port, key)).collect()
}

/// Addresses with a ready endpoint on this node, whatever the port.
fn ready_here(world: &World, service: &ServiceKey, is_v4: bool) -> u32 {
    let mut here = BTreeSet::new();
    // The names that the generator knows.
    for name in ["", "a", "b"] {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            let any = if is_v4 { "0.0.0.0" } else { "::" };
            let key = FrontendKey::new(Address::from(any.parse::<IpAddr>().unwrap()), 1, protocol);
            for ((ip, _), endpoint) in endpoints(world, service, &key, name) {
                if ready(endpoint) && endpoint.node_name.as_deref() == Some(NODE) {
                    here.insert(ip);
                }
            }
        }
    }
    here.len().try_into().unwrap()
}

/// Clients of this frontend's family whose answers tell source ranges apart.
pub fn sample_clients(frontend: &FrontendKey) -> Vec<Address> {
    let texts = [
        "10.1.2.3",
        "192.0.2.200",
        "203.0.113.1",
        "203.0.113.2",
        "10.96.0.1",
        "8.8.8.8",
        "2001:db8::9",
        "2001:db8:ffff::1",
        "fd00:10:96::1",
        "::2",
    ];
    let all = texts.into_iter().map(|text| Address::from(text.parse::<IpAddr>().unwrap()));
    all.filter(|client| client.is_v4() == frontend.address().is_v4()).collect()
}

fn created(service: &Service) -> i64 {
    service.metadata.creation_timestamp.as_ref().map_or(i64::MAX, |time| time.0.as_second())
}

/// Every place where the Service would listen, best claim first: key, kind, port name, ipMode Proxy.
fn candidates(config: &NodeConfig, service: &Service) -> Vec<(FrontendKey, FrontendKind, String, bool)> {
    let spec = service.spec.as_ref().unwrap();
    let cluster_ips = served_ips(service);
    let has_family = |ip: &Address| cluster_ips.iter().any(|cluster_ip| cluster_ip.is_v4() == ip.is_v4());
    let mut found = Vec::new();
    let mut names = BTreeSet::new();
    for port in spec.ports.iter().flatten() {
        let Ok(number @ 1..) = u16::try_from(port.port) else { continue };
        let Some(protocol) = protocol(port.protocol.as_deref()) else { continue };
        let name = port.name.clone().unwrap_or_default();
        if !names.insert((name.clone(), protocol)) {
            continue;
        }
        for ip in &cluster_ips {
            found.push((
                FrontendKey::new(*ip, number, protocol),
                FrontendKind::ClusterIp,
                name.clone(),
                false,
            ));
        }
        let mut seen = BTreeSet::new();
        for ingress in service
            .status
            .iter()
            .flat_map(|s| s.load_balancer.iter().flat_map(|l| l.ingress.iter().flatten()))
        {
            let Some(ip) = ingress.ip.as_deref().and_then(usable).filter(has_family) else { continue };
            let is_proxy = ingress.ip_mode.as_deref() == Some("Proxy");
            if seen.insert(ip) {
                let key = FrontendKey::new(ip, number, protocol);
                found.push((key, FrontendKind::LoadBalancer, name.clone(), is_proxy));
            }
        }
        for ip in spec.external_ips.iter().flatten().filter_map(|text| usable(text)).filter(has_family) {
            if !config.disable_external_ips {
                found.push((
                    FrontendKey::new(ip, number, protocol),
                    FrontendKind::ExternalIp,
                    name.clone(),
                    false,
                ));
            }
        }
        let node_port =
            port.node_port.and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0);
        for (number, ip) in
            node_port.iter().flat_map(|number| cluster_ips.iter().map(move |ip| (*number, ip)))
        {
            found.push((
                FrontendKey::node_port(ip, number, protocol),
                FrontendKind::NodePort,
                name.clone(),
                false,
            ));
        }
    }
    found
}

/// The ClusterIPs; none if the Service is not ours.
fn served_ips(service: &Service) -> Vec<Address> {
    let spec = service.spec.as_ref().unwrap();
    let cluster_ips: Vec<&String> =
        spec.cluster_ips.iter().flatten().filter(|text| !text.is_empty()).collect();
    let is_headless = cluster_ips.is_empty() || cluster_ips.iter().any(|text| *text == "None");
    let is_foreign = service.metadata.labels.as_ref().is_some_and(|labels| !labels.is_empty());
    if is_headless || is_foreign || spec.type_.as_deref() == Some("ExternalName") {
        return Vec::new();
    }
    cluster_ips.into_iter().filter_map(|text| usable(text)).collect()
}

fn decide(
    config: &NodeConfig,
    world: &World,
    (key, service): (&ServiceKey, &Service),
    frontend: &FrontendKey,
    kind: FrontendKind,
    port_name: &str,
    is_proxy: bool,
) -> Frontend {
    let spec = service.spec.as_ref().unwrap();
    let endpoints = endpoints(world, key, frontend, port_name);
    let is_local = |policy: &Option<String>| policy.as_deref() == Some("Local");
    let (internal, external) =
        (is_local(&spec.internal_traffic_policy), is_local(&spec.external_traffic_policy));
    let affinity = spec.session_affinity.as_deref() == Some("ClientIP");
    let timeout = spec.session_affinity_config.as_ref().unwrap().client_ip.as_ref().unwrap().timeout_seconds;
    let any = !cluster_set(world, &endpoints).is_empty();
    let to = |local_only: bool, masquerade: u8| {
        let backends = if local_only { local_set(&endpoints) } else { cluster_set(world, &endpoints) };
        let mode = match (backends.is_empty(), any) {
            (false, _) => Mode::Forward,
            (true, true) => Mode::Drop,
            (true, false) => Mode::Reject,
        };
        Side { mode, backends, masquerade, affinity, is_local: local_only }
    };
    let leave =
        |mode| Side { mode, backends: Backends::new(), masquerade: 0, affinity: false, is_local: false };
    let passes = kind == FrontendKind::LoadBalancer && passes_through(config, service, external, is_proxy);
    let (inside, outside) = match kind {
        FrontendKind::ClusterIp
            if world.local(config).contains(&frontend.address()) && world.is_listened_on(frontend) =>
        {
            (leave(Mode::LocalAddress), leave(Mode::LocalAddress))
        }
        FrontendKind::ClusterIp if config.masquerade_all => {
            (to(internal, Options::MASQUERADE), to(internal, Options::MASQUERADE))
        }
        FrontendKind::ClusterIp => {
            // The only --cluster-cidr here is one of IPv4.
            let always = !config.cluster_cidrs.is_empty() && frontend.address().is_v4();
            let mask = if always { Options::MASQUERADE_OFF_CLUSTER } else { Options::MASQUERADE_REMOTE };
            (to(internal, 0), to(internal, mask))
        }
        _ if passes => {
            let inside = match config.pass_through.scope {
                PassThroughScope::All => leave(Mode::PassThrough),
                PassThroughScope::Pods => Side { mode: Mode::PassThroughPods, ..to(false, 0) },
                PassThroughScope::Nodes => Side { mode: Mode::PassThroughHost, ..to(false, 0) },
            };
            (inside, leave(Mode::PassThrough))
        }
        _ if external => (to(false, 0), to(true, 0)),
        _ => (to(false, 0), to(false, Options::MASQUERADE_REMOTE)),
    };
    let is_here = |endpoint: &Endpoint| endpoint.node_name.as_deref() == Some(NODE);
    let here = endpoints.iter().filter(|(_, endpoint)| is_here(endpoint)).map(|(at, _)| *at).collect();
    let serving = endpoints.iter().filter(|(_, e)| ready(e) || serving(e)).map(|(at, _)| *at).collect();
    let is_restricted = kind == FrontendKind::LoadBalancer && !passes;
    let family = frontend.address();
    let lets_in =
        if is_restricted { lets_in(config, world, service, family) } else { Box::new(|_: &_| true) };
    let node = node_addresses(config, world, family.is_v4());
    // Who lets in any address lets in a node of which none is known, too.
    let lets_host_in = lets_in(&family.any_of_family()) || node.iter().any(&lets_in);
    Frontend {
        service: key.clone(),
        kind,
        port: port_name.to_owned(),
        inside,
        outside,
        affinity_timeout: match (affinity, timeout) {
            (false, _) => 0,
            (true, Some(seconds @ 1..=86_400)) => seconds.unsigned_abs(),
            (true, _) => 10_800,
        },
        serving,
        here,
        lets_in,
        lets_host_in,
    }
}

fn passes_through(config: &NodeConfig, service: &Service, is_local_policy: bool, is_proxy: bool) -> bool {
    let annotation = |key: &str| service.metadata.annotations.as_ref()?.get(key).map(String::as_str);
    match annotation("kproxy.io/pass-through") {
        Some("true") => return true,
        Some("false") => return false,
        _ => {}
    }
    for key in ["kubernetes.io/elb.pass-through", EXTRA_ANNOTATION] {
        let value = annotation(key);
        if value == Some("true") || value == Some("onlyLocal") && is_local_policy {
            return true;
        }
    }
    is_proxy || config.pass_through.default
}

/// By address and target port; of two, the one that is not terminating, else the first.
fn endpoints<'a>(
    world: &'a World,
    service: &ServiceKey,
    frontend: &FrontendKey,
    port_name: &str,
) -> BTreeMap<(Address, u16), &'a Endpoint> {
    let family = if frontend.address().is_v4() { "IPv4" } else { "IPv6" };
    let mut found: BTreeMap<(Address, u16), &Endpoint> = BTreeMap::new();
    for slice in world.slices.values() {
        let label = |key: &str| slice.metadata.labels.as_ref().and_then(|labels| labels.get(key));
        let is_ours = label("kubernetes.io/service-name") == Some(&service.name);
        if !is_ours || label("service.kubernetes.io/headless").is_some() || slice.address_type != family {
            continue;
        }
        for port in slice.ports.iter().flatten() {
            let number = port.port.and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0);
            let Some(number) = number else { continue };
            if port.name.as_deref().unwrap_or_default() != port_name
                || protocol(port.protocol.as_deref()) != Some(frontend.protocol())
            {
                continue;
            }
            for endpoint in slice.endpoints.iter().flatten() {
                let ip = endpoint.addresses.first().and_then(|text| usable(text));
                let Some(ip) = ip.filter(|ip| ip.is_v4() == frontend.address().is_v4()) else { continue };
                let there = found.entry((ip, number)).or_insert(endpoint);
                if terminating(there) && !terminating(endpoint) {
                    *there = endpoint;
                }
            }
        }
    }
    found
}

fn cluster_set(world: &World, endpoints: &BTreeMap<(Address, u16), &Endpoint>) -> Backends {
    let all_ready: Vec<_> = endpoints.iter().filter(|(_, endpoint)| ready(endpoint)).collect();
    if all_ready.is_empty() {
        let last = endpoints.iter().filter(|(_, endpoint)| serving(endpoint) && terminating(endpoint));
        return last.map(|(at, _)| *at).collect();
    }
    let zone = world.node.as_ref().and_then(|node| node.metadata.labels.as_ref()?.values().next());
    let zone = zone.filter(|zone| !zone.is_empty());
    let narrowed = |hints: &dyn Fn(&Endpoint) -> Vec<String>, wanted: &str| -> Option<Backends> {
        if all_ready.iter().any(|(_, endpoint)| hints(endpoint).is_empty()) {
            return None;
        }
        let meant =
            all_ready.iter().filter(|(_, endpoint)| hints(endpoint).iter().any(|hint| hint == wanted));
        let meant: Backends = meant.map(|(at, _)| **at).collect();
        (!meant.is_empty()).then_some(meant)
    };
    let nodes = |endpoint: &Endpoint| -> Vec<String> {
        endpoint.hints.iter().flat_map(|h| h.for_nodes.iter().flatten()).map(|n| n.name.clone()).collect()
    };
    let zones = |endpoint: &Endpoint| -> Vec<String> {
        endpoint.hints.iter().flat_map(|h| h.for_zones.iter().flatten()).map(|z| z.name.clone()).collect()
    };
    narrowed(&nodes, NODE)
        .or_else(|| narrowed(&zones, zone?))
        .unwrap_or_else(|| all_ready.iter().map(|(at, _)| **at).collect())
}

fn local_set(endpoints: &BTreeMap<(Address, u16), &Endpoint>) -> Backends {
    let here = |want: fn(&Endpoint) -> bool| -> Backends {
        let local = endpoints.iter().filter(|(_, endpoint)| endpoint.node_name.as_deref() == Some(NODE));
        local.filter(|(_, endpoint)| want(endpoint)).map(|(at, _)| *at).collect()
    };
    let all_ready = here(ready);
    if all_ready.is_empty() { here(|endpoint| serving(endpoint) && terminating(endpoint)) } else { all_ready }
}

/// `loadBalancerSourceRanges`, as four plain rules over the ranges that the generator knows.
fn lets_in(
    config: &NodeConfig,
    world: &World,
    service: &Service,
    frontend: Address,
) -> Box<dyn Fn(&Address) -> bool> {
    let texts = service.spec.iter().flat_map(|spec| spec.load_balancer_source_ranges.iter().flatten());
    let ranges: Vec<ipnet::IpNet> = texts.filter_map(|text| text.trim().parse().ok()).collect();
    let of_family = move |range: &ipnet::IpNet| range.addr().is_ipv4() == frontend.is_v4();
    let ranges: Vec<_> = ranges.into_iter().filter(of_family).collect();
    if ranges.is_empty() {
        return Box::new(|_| true);
    }
    let within = move |ip: &Address| ranges.iter().any(|range| range.contains(&IpAddr::from(*ip)));
    if !node_addresses(config, world, frontend.is_v4()).iter().any(&within) {
        return Box::new(within);
    }
    let ingress =
        service.status.iter().flat_map(|s| s.load_balancer.iter().flat_map(|l| l.ingress.iter().flatten()));
    let load_balancers: Vec<_> = ingress.filter_map(|ingress| usable(ingress.ip.as_deref()?)).collect();
    Box::new(move |client| within(client) || load_balancers.contains(client))
}

pub fn node_addresses(config: &NodeConfig, world: &World, is_v4: bool) -> Vec<Address> {
    let given = config.node_addresses.iter().copied();
    let given: Vec<_> = given.filter(|ip| ip.is_v4() == is_v4 && !ip.is_loopback()).collect();
    if !given.is_empty() {
        return given;
    }
    let of_type = |wanted: &str| {
        let status = world.node.iter().flat_map(|node| &node.status);
        let addresses = status.flat_map(|status| status.addresses.iter().flatten());
        let of_type = addresses.filter(|address| address.type_ == wanted);
        of_type.filter_map(|address| usable(&address.address)).find(|ip| ip.is_v4() == is_v4)
    };
    of_type("InternalIP").or_else(|| of_type("ExternalIP")).into_iter().collect()
}

fn ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().is_none_or(|conditions| conditions.ready != Some(false))
}

fn serving(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().is_none_or(|conditions| conditions.serving != Some(false))
}

fn terminating(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().is_some_and(|conditions| conditions.terminating == Some(true))
}

fn protocol(text: Option<&str>) -> Option<Protocol> {
    Some(match text {
        None | Some("TCP") => Protocol::Tcp,
        Some("UDP") => Protocol::Udp,
        Some("SCTP") => Protocol::Sctp,
        Some(_) => return None,
    })
}

fn usable(text: &str) -> Option<Address> {
    let ip: IpAddr = text.parse().ok()?;
    (!ip.is_unspecified() && !ip.is_loopback()).then(|| Address::from(ip))
}
