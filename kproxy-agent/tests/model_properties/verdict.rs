//! The naive reading goes on: what becomes of one connection, and which backend it goes to while a client stays.

use std::collections::BTreeMap;
use std::net::IpAddr;

use kproxy::model::{NodeConfig, NodePortAddresses};
use kproxy::wanted::ServiceKey;
use kproxy_common::{Address, ClientKind, FrontendKey, FrontendKind, Mode, Protocol};

use crate::generate::World;
use crate::naive::{Backends, Frontend, addresses_by_age, node_addresses};

/// A connection, by a client whose packets come in where such clients live.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    pub behind: ClientKind,
    pub client: Address,
    pub destination: Address,
    pub port: u16,
    pub protocol: Protocol,
}

/// What should become of it.
pub enum Verdict<'a> {
    Pass,
    Reject,
    Drop,
    /// To one of these; of the local set, or of the cluster set.
    Forward(&'a Frontend, &'a Backends, bool),
}

impl std::fmt::Debug for Verdict<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pass => f.write_str("Pass"),
            Self::Reject => f.write_str("Reject"),
            Self::Drop => f.write_str("Drop"),
            Self::Forward(frontend, allowed, _) => {
                write!(f, "Forward to {allowed:?} of {}", frontend.service)
            }
        }
    }
}

/// What the rules say of `question`, where these are the frontends.
pub fn verdict<'a>(
    config: &NodeConfig,
    world: &World,
    frontends: &'a BTreeMap<FrontendKey, Frontend>,
    question: &Question,
) -> Verdict<'a> {
    let Question { client, destination, .. } = question;
    let kind = question.behind;
    let Some(frontend) = asked(config, world, frontends, question) else {
        return without_frontend(config, world, destination);
    };
    let is_outside = kind == ClientKind::Outside;
    let side = if is_outside { &frontend.outside } else { &frontend.inside };
    let is_passed = match side.mode {
        Mode::PassThrough | Mode::LocalAddress => true,
        Mode::PassThroughPods => kind != ClientKind::Host,
        Mode::PassThroughHost => kind != ClientKind::Pod,
        _ => false,
    };
    let lets_in = if kind == ClientKind::Host { frontend.lets_host_in } else { (frontend.lets_in)(client) };
    match (is_passed, lets_in, side.backends.is_empty()) {
        (true, ..) => Verdict::Pass,
        (false, false, _) => Verdict::Drop,
        (false, true, false) => Verdict::Forward(frontend, &side.backends, side.is_local),
        (false, true, true) if side.mode == Mode::Drop => Verdict::Drop,
        (false, true, true) => Verdict::Reject,
    }
}

/// What becomes of what this host sends by SCTP, which no socket hook sees: it is not translated, and what lies in a
/// ServiceCIDR, or is a ClusterIP's, does not leave.
pub fn sent_unseen<'a>(
    config: &NodeConfig,
    world: &World,
    frontends: &'a BTreeMap<FrontendKey, Frontend>,
    question: &Question,
) -> Verdict<'a> {
    match verdict(config, world, frontends, question) {
        verdict @ (Verdict::Pass | Verdict::Drop) => verdict,
        Verdict::Reject if asked(config, world, frontends, question).is_none() => Verdict::Drop,
        Verdict::Reject | Verdict::Forward(..) if in_service_cidr(config, world, &question.destination) => {
            Verdict::Drop
        }
        Verdict::Reject | Verdict::Forward(..) => Verdict::Pass,
    }
}

/// The frontend that is asked.
fn asked<'a>(
    config: &NodeConfig,
    world: &World,
    frontends: &'a BTreeMap<FrontendKey, Frontend>,
    question: &Question,
) -> Option<&'a Frontend> {
    let Question { destination, port, protocol, .. } = question;
    let exact = frontends.get(&FrontendKey::new(*destination, *port, *protocol));
    let node_port = || {
        let is_loopback = destination.is_loopback() && question.behind == ClientKind::Host;
        let key = FrontendKey::node_port(destination, *port, *protocol);
        frontends.get(&key).filter(|_| is_loopback || answers_node_ports(config, world, destination))
    };
    exact.or_else(node_port)
}

/// Whether the backend sees the node instead of the client.
pub fn is_masked(config: &NodeConfig, frontend: &Frontend, question: &Question, is_local: bool) -> bool {
    let is_cluster_ip = frontend.kind == FrontendKind::ClusterIp;
    // The only --cluster-cidr here: where it is known who is a pod of the cluster, everyone else is masked.
    let pods: ipnet::IpNet = "10.244.0.0/16".parse().unwrap();
    let is_no_pod = !config.cluster_cidrs.is_empty()
        && question.client.is_v4()
        && !pods.contains(&IpAddr::from(question.client));
    // No socket hook sees SCTP; the others' sockets on this node are at the endpoint from the start.
    let is_socket = question.protocol != Protocol::Sctp;
    match question.behind {
        ClientKind::Host if is_socket => false,
        ClientKind::Host | ClientKind::Pod => is_cluster_ip && config.masquerade_all,
        ClientKind::Outside => !is_local || (is_cluster_ip && (config.masquerade_all || is_no_pod)),
    }
}

fn without_frontend<'a>(config: &NodeConfig, world: &World, destination: &Address) -> Verdict<'a> {
    if let Some((_, is_ours)) = addresses_by_age(world).into_iter().find(|(ip, _)| ip == destination) {
        let stands_here = world.local(config).contains(destination);
        return if is_ours && !stands_here { Verdict::Reject } else { Verdict::Pass };
    }
    if answers_node_ports(config, world, destination) {
        return match in_service_cidr(config, world, destination) {
            true => Verdict::Drop,
            false => Verdict::Pass,
        };
    }
    if in_service_cidr(config, world, destination) { Verdict::Drop } else { Verdict::Pass }
}

fn in_service_cidr(config: &NodeConfig, world: &World, destination: &Address) -> bool {
    let ip = IpAddr::from(*destination);
    if !config.service_cidrs.is_empty() {
        // The only --service-cidr here.
        let flag: ipnet::IpNet = "10.96.0.0/16".parse().unwrap();
        return flag.contains(&ip);
    }
    let texts = world.service_cidrs.values().flat_map(|object| object.spec.iter());
    let texts = texts.flat_map(|spec| spec.cidrs.iter().flatten());
    texts.filter_map(|text| text.parse::<ipnet::IpNet>().ok()).any(|cidr| cidr.contains(&ip))
}

fn answers_node_ports(config: &NodeConfig, world: &World, destination: &Address) -> bool {
    let is_v4 = destination.is_v4();
    let is_local = world.local(config).contains(destination);
    let own = node_addresses(config, world, is_v4);
    let is_named = match &config.nodeport_addresses {
        NodePortAddresses::Primary if own.is_empty() => is_local,
        NodePortAddresses::Primary => own.contains(destination),
        // The only CIDR here.
        NodePortAddresses::Cidrs(_) if is_v4 => {
            let cidr: ipnet::IpNet = "10.0.0.0/30".parse().unwrap();
            is_local && cidr.contains(&IpAddr::from(*destination))
        }
        NodePortAddresses::Cidrs(_) => is_local,
    };
    let is_cluster_ip = addresses_by_age(world).iter().any(|(ip, _)| ip == destination);
    is_named && !destination.is_loopback() && !is_cluster_ip
}

/// An endpoint's address and port.
type At = (Address, u16);

/// A Service port in one family.
type Port = (ServiceKey, String, Protocol, bool);

/// Where clients went, and when last: by client, Service port, and whether it is the backend for the local set.
///
/// kube-proxy keeps a set of clients for each endpoint, and a chain for each of the two sets: there a client goes to the
/// first endpoint of the chain that knows it, else to any, which knows it from then on. So this does, beside one rule
/// of our own: of several endpoints that know a client, the one that it was given in this set comes first; and no more
/// than two know it, one for each set.
#[derive(Default)]
pub struct Affinity {
    clients: BTreeMap<(Address, Port, bool), (At, u64)>,
    /// As in kube-proxy: which endpoints know a client, and since when it has not asked.
    known: BTreeMap<(Address, Port, At), u64>,
}

impl Affinity {
    /// The tables have changed: whoever's backend has left every set of its port is free.
    pub fn keep(&mut self, frontends: &BTreeMap<FrontendKey, Frontend>) {
        let stays = |port: &Port, backend: &(Address, u16)| {
            frontends.iter().any(|(key, frontend)| {
                let is_in =
                    frontend.inside.backends.contains(backend) || frontend.outside.backends.contains(backend);
                *port == port_of(key, frontend) && frontend.affinity_timeout > 0 && is_in
            })
        };
        self.clients.retain(|(_, port, _), (backend, _)| stays(port, backend));
        self.known.retain(|(_, port, backend), _| stays(port, backend));
    }

    /// Where the client stays at the second `now`, if these are the backends that are allowed, of the local set or of
    /// the cluster set; `None`: it goes where the dice send it, to `picked`. From then on it stays there. An error
    /// where kube-proxy would have sent it to another.
    pub fn stays(
        &mut self,
        (key, frontend): (&FrontendKey, &Frontend),
        (allowed, is_local): (&Backends, bool),
        client: Address,
        picked: (Address, u16),
        now: u64,
    ) -> Result<Option<(Address, u16)>, String> {
        if frontend.affinity_timeout == 0 {
            return Ok(None);
        }
        let port = port_of(key, frontend);
        let is_young = |last: u64| now - last <= u64::from(frontend.affinity_timeout);
        let stays = self.asks(&port, allowed, is_local, client, picked, now, is_young);
        let is_clients = |of: &(Address, Port, (Address, u16))| of.0 == client && of.1 == port;
        let candidates: Backends = self
            .known
            .iter()
            .filter(|(of, last)| is_clients(of) && is_young(**last) && allowed.contains(&of.2))
            .map(|(of, _)| of.2)
            .collect();
        let goes = stays.unwrap_or(picked);
        if !candidates.is_empty() && !candidates.contains(&goes) {
            return Err(format!("{client} goes to {goes:?}, and in kube-proxy to one of {candidates:?}"));
        }
        self.known.insert((client, port.clone(), goes), now);
        let kept = [true, false].map(|set| self.clients.get(&(client, port.clone(), set)).map(|(at, _)| *at));
        self.known.retain(|of, _| !is_clients(of) || kept.contains(&Some(of.2)));
        Ok(stays)
    }

    #[expect(clippy::too_many_arguments, reason = "one step of the function above")]
    fn asks(
        &mut self,
        port: &Port,
        allowed: &Backends,
        is_local: bool,
        client: Address,
        picked: (Address, u16),
        now: u64,
        is_young: impl Fn(u64) -> bool,
    ) -> Option<(Address, u16)> {
        let of = |set: bool| (client, port.clone(), set);
        for set in [is_local, !is_local] {
            if let Some((backend, last)) = self.clients.get_mut(&of(set))
                && is_young(*last)
                && allowed.contains(backend)
            {
                *last = now;
                return Some(*backend);
            }
        }
        // What it has of this set by now is perhaps only in the other, and is kept there if that has none.
        let own = self.clients.insert(of(is_local), (picked, now)).filter(|(_, last)| is_young(*last));
        let other = self.clients.get(&of(!is_local)).filter(|(_, last)| is_young(*last));
        if let (Some(own), None) = (own, other) {
            self.clients.insert(of(!is_local), own);
        }
        None
    }
}

fn port_of(key: &FrontendKey, frontend: &Frontend) -> Port {
    (frontend.service.clone(), frontend.port.clone(), key.protocol(), key.address().is_v4())
}
