//! A small world of Services that want the same few addresses, and what happens in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use kproxy_common::{
    Address, AddressKind, BackendState, Cidr, FrontendKey, FrontendKind, Location, Mode, Options, Protocol,
    ServiceKind, TrafficPolicy,
};
use proptest::prelude::*;

use super::reader::{FrontendView, SideView};
use crate::wanted::{
    PassThroughRule, ServiceKey, WantedBackend, WantedFrontend, WantedPort, WantedService, WantedSide,
};

/// How many Services there are.
pub const SERVICES: usize = 3;
const ENDPOINTS: usize = 4;

/// What happens.
#[derive(Clone, Debug)]
pub enum Event {
    /// Services come, change and go; a write may fail meanwhile.
    Change { services: Vec<(usize, Option<Spec>)>, node_addresses: Option<u8>, fail: Option<u8> },
    /// The grace period after a run.
    Settle,
    /// Time passes, and what failed is tried again.
    Wait,
    /// The agent dies in the middle of a change, and another one starts.
    Die { services: Vec<(usize, Option<Spec>)>, after: u8 },
    /// An agent is replaced.
    Restart,
}

/// A Service, small enough to be made at random.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Of two that want the same frontend, the one with the lower number gets it.
    age: u8,
    ports: Vec<PortSpec>,
    /// A bit for each address that it wants to be something, and what.
    addresses: u8,
    address_kind: u8,
}

#[derive(Clone, Debug)]
struct PortSpec {
    name: bool,
    udp: bool,
    affinity: bool,
    /// Of each endpoint, in which sets it is.
    endpoints: [u8; ENDPOINTS],
    frontends: Vec<FrontendSpec>,
}

#[derive(Clone, Debug)]
struct FrontendSpec {
    address: u8,
    mode: u8,
    ranges: u8,
}

pub fn event() -> impl Strategy<Value = Event> {
    let services = || prop::collection::vec((0..SERVICES, prop::option::weighted(0.8, spec())), 1..3);
    let change = (services(), prop::option::weighted(0.3, 0_u8..8), prop::option::weighted(0.4, 0_u8..40));
    prop_oneof![
        6 => change.prop_map(|(services, node_addresses, fail)| Event::Change { services, node_addresses, fail }),
        1 => Just(Event::Settle),
        1 => Just(Event::Wait),
        2 => (services(), 0_u8..40).prop_map(|(services, after)| Event::Die { services, after }),
        1 => Just(Event::Restart),
    ]
}

fn spec() -> impl Strategy<Value = Spec> {
    let frontend = (0_u8..4, 0_u8..6, 0_u8..8);
    let frontend = frontend.prop_map(|(address, mode, ranges)| FrontendSpec { address, mode, ranges });
    let port = (0_u8..8, any::<[u8; ENDPOINTS]>(), prop::collection::vec(frontend, 1..4));
    let port = port.prop_map(|(bits, endpoints, frontends)| PortSpec {
        name: bits & 1 != 0,
        udp: bits & 2 != 0,
        affinity: bits & 4 != 0,
        endpoints,
        frontends,
    });
    (0_u8..4, prop::collection::vec(port, 0..3), 0_u8..8, 0_u8..3)
        .prop_map(|(age, ports, addresses, address_kind)| Spec { age, ports, addresses, address_kind })
}

/// What there is.
#[derive(Clone, Default, Debug)]
pub struct World {
    services: BTreeMap<usize, Spec>,
    /// A bit for each address of the node.
    pub node_addresses: u8,
}

impl World {
    pub fn change(&mut self, services: &[(usize, Option<Spec>)]) {
        for (service, spec) in services {
            match spec {
                Some(spec) => self.services.insert(*service, spec.clone()),
                None => self.services.remove(service),
            };
        }
    }

    pub fn node_addresses(&self) -> BTreeSet<Address> {
        (0..3).filter(|bit| self.node_addresses & 1 << bit != 0).map(shared_address).collect()
    }

    /// What every Service wants. No two want the same frontend or address, as the model sees to.
    pub fn wanted(&self) -> BTreeMap<ServiceKey, WantedService> {
        let mut order: Vec<(&usize, &Spec)> = self.services.iter().collect();
        order.sort_by_key(|(service, spec)| (spec.age, **service));
        let (mut frontends, mut addresses) = (BTreeSet::new(), BTreeSet::new());
        let services = order.into_iter().map(|(service, spec)| {
            let key = ServiceKey { namespace: "default".to_owned(), name: format!("service-{service}") };
            (key.clone(), wanted(key, *service, spec, &mut frontends, &mut addresses))
        });
        services.collect()
    }

    /// What every address should be.
    pub fn addresses(&self, node_is_known: bool) -> BTreeMap<Address, AddressKind> {
        let mut all = BTreeMap::new();
        if node_is_known {
            all.extend(self.node_addresses().into_iter().map(|address| (address, AddressKind::NodePort)));
        }
        all.extend(self.wanted().into_values().flat_map(|service| service.addresses));
        all
    }
}

pub fn frontends(wanted: &BTreeMap<ServiceKey, WantedService>) -> impl Iterator<Item = FrontendKey> {
    let ports = wanted.values().flat_map(|service| &service.ports);
    ports.flat_map(|port| &port.frontends).map(|frontend| frontend.key)
}

/// What a reader should find under a frontend.
pub fn view(service: &WantedService, port: &WantedPort, frontend: &WantedFrontend) -> FrontendView {
    let side = |side: &WantedSide| {
        let (from, to) = (usize::from(side.offset), usize::from(side.offset + side.count));
        SideView { mode: side.mode, options: side.options, backends: port.backends[from..to].to_vec() }
    };
    let asks = (frontend.inside.options | frontend.outside.options) & Options::SOURCE_RANGES != 0;
    let ranges = if asks {
        frontend.source_ranges.iter().map(|range| range.prefix_length()).collect()
    } else {
        BTreeSet::new()
    };
    FrontendView {
        owner: format!(
            "{}{}",
            service.key,
            if port.name.is_empty() { String::new() } else { format!(":{}", port.name) }
        ),
        inside: side(&frontend.inside),
        outside: side(&frontend.outside),
        affinity_timeout: port.affinity_timeout,
        in_sets: if port.backends.is_empty() { 0 } else { port.in_sets },
        serving: port.backends.clone(),
        ranges,
    }
}

fn wanted(
    key: ServiceKey,
    service: usize,
    spec: &Spec,
    frontends: &mut BTreeSet<FrontendKey>,
    addresses: &mut BTreeSet<Address>,
) -> WantedService {
    let mut ports: Vec<WantedPort> = Vec::new();
    let mut known = BTreeSet::new();
    for port in spec.ports.iter().filter(|port| known.insert((port.name, port.udp))) {
        for v4 in [true, false] {
            let wanted = wanted_port(service, port, v4, frontends);
            if !wanted.frontends.is_empty() {
                ports.push(wanted);
            }
        }
    }
    let kind =
        [AddressKind::ClusterIp, AddressKind::OtherProxy, AddressKind::Local][usize::from(spec.address_kind)];
    let mine = (0..3).filter(|bit| spec.addresses & 1 << bit != 0).map(shared_address);
    let addresses =
        mine.filter(|address| addresses.insert(*address)).map(|address| (address, kind)).collect();
    WantedService { key, kind: ServiceKind::ClusterIp, ports, addresses }
}

fn wanted_port(service: usize, spec: &PortSpec, v4: bool, taken: &mut BTreeSet<FrontendKey>) -> WantedPort {
    let protocol = if spec.udp { Protocol::Udp } else { Protocol::Tcp };
    // In the order of a block: inside only, both, outside only, serving only.
    let mut runs: [Vec<WantedBackend>; 4] = Default::default();
    for (endpoint, what) in spec.endpoints.iter().enumerate() {
        let run = match what % 8 {
            0 => 0,
            1..=3 => 1,
            4 => 2,
            5 => 3,
            _ => continue,
        };
        let last = service as u8 * 16 + endpoint as u8;
        let address = if v4 {
            IpAddr::from([10, 244, 0, last])
        } else {
            IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)])
        };
        runs[run].push(WantedBackend {
            address: address.into(),
            port: 8_080,
            location: if what & 64 != 0 { Location::Local } else { Location::Remote },
            state: if what & 128 != 0 { BackendState::Terminating } else { BackendState::Ready },
        });
    }
    let [inside, both, outside, _] = runs.each_ref().map(|run| run.len() as u16);
    let set = |offset: u16, count: u16| (offset, count);
    let (inside_set, outside_set) = (set(0, inside + both), set(inside, both + outside));
    let mut wanted = WantedPort {
        name: if spec.name { "http".to_owned() } else { String::new() },
        protocol,
        affinity_timeout: if spec.affinity { 10_800 } else { 0 },
        backends: runs.concat(),
        in_sets: inside + both + outside,
        frontends: Vec::new(),
    };
    for frontend in &spec.frontends {
        let address = if frontend.address < 3 {
            shared_address(frontend.address)
        } else {
            "fd00:10:96::1".parse::<IpAddr>().unwrap().into()
        };
        let key = FrontendKey::new(address, 80, protocol);
        if key.address().is_v4() != v4 || !taken.insert(key) {
            continue;
        }
        let affinity = if spec.affinity { Options::AFFINITY } else { 0 };
        let side = |(offset, count), options| WantedSide {
            offset,
            count,
            mode: Mode::Forward,
            options: options | affinity,
        };
        let closed = |mode| WantedSide { offset: 0, count: 0, mode, options: 0 };
        let ranged = if frontend.mode == 3 { Options::SOURCE_RANGES } else { 0 };
        let (inside, outside) = match frontend.mode {
            0 | 3 => (side(inside_set, ranged), side(outside_set, ranged)),
            1 => (closed(Mode::PassThrough), closed(Mode::PassThrough)),
            2 => (side(inside_set, 0), closed(Mode::Drop)),
            4 => (side(outside_set, 0), side(outside_set, Options::MASQUERADE)),
            _ => (closed(Mode::Reject), closed(Mode::Reject)),
        };
        wanted.frontends.push(WantedFrontend {
            key,
            kind: FrontendKind::LoadBalancer,
            policy: TrafficPolicy::Cluster,
            inside,
            outside,
            // Told apart by their length alone; bits beyond it must not matter.
            source_ranges: (0..3)
                .filter(|bit| frontend.ranges & 1 << bit != 0)
                .map(|bit| Cidr::new("10.1.2.3".parse::<IpAddr>().unwrap().into(), 96 + 8 * (bit + 1)))
                .collect(),
            pass_through_rule: PassThroughRule::NotApplicable,
        });
    }
    wanted
}

/// One of the addresses that everyone wants.
fn shared_address(index: u8) -> Address {
    IpAddr::from([10, 96, 0, index + 1]).into()
}
