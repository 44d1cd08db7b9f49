//! Single rules of plans, each by an example.

mod limits;
mod restart;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::{Duration, SystemTime},
};

use kproxy_common::{
    Address, AddressKind, BackendState, Block, Cidr, Client, ClientKind, Config, Connection, FrontendKey,
    FrontendKind, Location, MAX_CIDRS, Mode, Options, Protocol, Reason, Resolution, ServiceIdentity,
    ServiceKind, SourceRangeKey, TrafficPolicy, choose, resolve,
};

use super::{Capacity, Snapshot, Tables, View, Word, restore};
use crate::{
    maps::{
        Reconciler, Report,
        memory::{Fail, Memory, Write},
        status::Status,
    },
    wanted::{
        PassThroughRule, ServiceKey, WantedBackend, WantedFrontend, WantedPort, WantedService, WantedSide,
    },
};

const CAPACITY: Capacity = Capacity { frontends: 8, backends: 64, addresses: 8, source_ranges: 8 };

/// An agent and its maps.
struct Agent {
    reconciler: Reconciler,
    memory: Memory,
    now: SystemTime,
}

impl Agent {
    fn new(capacity: Capacity) -> Self {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        Self { reconciler: Reconciler::new(Tables::new(capacity)), memory: Memory::new(capacity), now }
    }

    /// Another agent over these maps, and what it finds wrong in them.
    fn over(snapshot: &Snapshot) -> (Self, Vec<String>) {
        let (tables, problems) = restore(snapshot, CAPACITY);
        let memory = Memory::from_snapshot(snapshot, CAPACITY);
        (Self { reconciler: Reconciler::new(tables), memory, ..Self::new(CAPACITY) }, problems)
    }

    /// Makes these Services so, settles, and gives what was written, grace periods apart.
    fn change<const N: usize>(&mut self, services: [(&str, Option<WantedService>); N]) -> Vec<Write> {
        let report = self.try_change(services);
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        self.settle();
        self.memory.log.iter().filter(|write| **write != Write::Grace).copied().collect()
    }

    fn try_change<const N: usize>(&mut self, services: [(&str, Option<WantedService>); N]) -> Report {
        self.now += Duration::from_secs(10);
        self.memory.log.clear();
        let changes = services.into_iter().map(|(name, wanted)| (name_of(name), wanted)).collect();
        self.reconciler.want(changes, self.now);
        self.reconciler.run(&mut self.memory, self.now)
    }

    fn settle(&mut self) {
        let report = self.reconciler.settle(&mut self.memory, self.now);
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        assert!(!self.reconciler.tables().needs_grace());
    }

    fn tables(&self) -> &Tables {
        self.reconciler.tables()
    }

    fn number(&self, frontend: FrontendKey) -> u32 {
        self.memory.frontends()[&frontend]
    }

    fn identity(&self, frontend: FrontendKey) -> ServiceIdentity {
        ServiceIdentity::from_word(self.memory.words(self.number(frontend))[Word::Identity as usize])
    }

    /// Address and [`kproxy_common::Backend::joined`] of each backend of a frontend.
    fn joined(&self, frontend: FrontendKey) -> BTreeMap<Address, u32> {
        let block = Block::from_word(self.memory.words(self.number(frontend))[Word::Block as usize]);
        let slots = block.first_slot()..block.first_slot() + u32::from(block.serving());
        slots
            .filter_map(|slot| self.memory.backend(slot))
            .map(|slot| (slot.address(), slot.joined()))
            .collect()
    }

    fn error(&self, service: &str) -> String {
        match self.reconciler.status().service(&name_of(service)) {
            Some(Status::Failed { error, .. }) => error.clone(),
            status => panic!("{service} has not failed: {status:?}"),
        }
    }
}

fn name_of(name: &str) -> ServiceKey {
    ServiceKey { namespace: "default".to_owned(), name: name.to_owned() }
}

fn pod(last: u8) -> Address {
    IpAddr::from([10, 244, 0, last]).into()
}

fn cluster_ip(last: u8) -> Address {
    IpAddr::from([10, 96, 0, last]).into()
}

fn frontend(last: u8) -> FrontendKey {
    FrontendKey::new(cluster_ip(last), 80, Protocol::Tcp)
}

/// A Service with one port, these endpoints in all sets, and these frontends.
fn service(name: &str, endpoints: &[u8], frontends: &[u8]) -> Option<WantedService> {
    let side = WantedSide { offset: 0, count: endpoints.len() as u16, mode: Mode::Forward, options: 0 };
    let wanted_frontend = |last: &u8| WantedFrontend {
        key: frontend(*last),
        kind: FrontendKind::ClusterIp,
        policy: TrafficPolicy::Cluster,
        inside: side,
        outside: side,
        source_ranges: Vec::new(),
        pass_through_rule: PassThroughRule::NotApplicable,
    };
    let backend = |last: &u8| WantedBackend {
        address: pod(*last),
        port: 8_080,
        location: Location::Remote,
        state: BackendState::Ready,
    };
    let port = WantedPort {
        name: "http".to_owned(),
        protocol: Protocol::Tcp,
        affinity_timeout: 0,
        backends: endpoints.iter().map(backend).collect(),
        in_sets: endpoints.len() as u16,
        frontends: frontends.iter().map(wanted_frontend).collect(),
    };
    Some(WantedService {
        key: name_of(name),
        kind: ServiceKind::ClusterIp,
        ports: vec![port],
        addresses: Vec::new(),
    })
}

fn with(mut wanted: Option<WantedService>, change: impl Fn(&mut WantedPort)) -> Option<WantedService> {
    wanted.iter_mut().flat_map(|wanted| &mut wanted.ports).for_each(change);
    wanted
}

fn with_affinity(wanted: Option<WantedService>) -> Option<WantedService> {
    with(wanted, |port| {
        port.affinity_timeout = 10_800;
        for frontend in &mut port.frontends {
            frontend.inside.options |= Options::AFFINITY;
            frontend.outside.options |= Options::AFFINITY;
        }
    })
}

fn with_ranges(wanted: Option<WantedService>, lengths: &[u32]) -> Option<WantedService> {
    with(wanted, |port| {
        for frontend in &mut port.frontends {
            frontend.inside.options |= Options::SOURCE_RANGES;
            frontend.outside.options |= Options::SOURCE_RANGES;
            frontend.source_ranges = lengths.iter().map(|length| Cidr::new(pod(77), 96 + length)).collect();
        }
    })
}

fn with_address(mut wanted: Option<WantedService>, last: u8, kind: AddressKind) -> Option<WantedService> {
    wanted.iter_mut().for_each(|wanted| wanted.addresses.push((cluster_ip(last), kind)));
    wanted
}

#[test]
fn a_new_service_is_complete_before_its_frontend_is_there() {
    let mut agent = Agent::new(CAPACITY);
    let writes = agent.change([("a", with_address(service("a", &[1, 2], &[1]), 1, AddressKind::ClusterIp))]);
    let expected = [
        Write::Backend(0),
        Write::Backend(1),
        Write::BackendSlots(0),
        Write::BackendSlots(1),
        Write::Info(0),
        Write::Counters(0),
        Write::Entry(0),
        Write::InsertFrontend(frontend(1), 0),
        Write::InsertAddress(cluster_ip(1)),
    ];
    assert_eq!(writes, expected);
    assert_eq!(agent.memory.info(0).unwrap().name(), "default/a:http");
}

#[test]
fn a_changed_endpoint_is_a_fresh_block_and_stores() {
    let mut agent = Agent::new(CAPACITY);
    agent.change([("a", service("a", &[1, 2], &[1]))]);
    let writes = agent.change([("a", service("a", &[1, 3], &[1]))]);
    let words = [Word::Block, Word::Inside, Word::Outside].map(|word| Write::Word(0, word));
    let before = [
        Write::Backend(2),
        Write::Backend(3),
        Write::BackendSlots(0),
        Write::BackendSlots(2),
        Write::Info(0),
    ];
    assert_eq!(writes[..5], before);
    assert_eq!(writes[5..], words, "the block before the sets that are picked from");
    let slots = [0, 2].map(|id| agent.memory.slots_of(id).unwrap().both());
    assert_eq!(slots, [[2, 0], [3, 3]], "one was in another slot before, the other is new");
}

#[test]
fn what_leaves_the_backends_as_they_are_writes_no_slot() {
    let mut agent = Agent::new(CAPACITY);
    agent.change([("a", service("a", &[1, 2], &[1]))]);
    let before = agent.memory.info(0).unwrap().changed;
    assert_eq!(agent.change([("a", service("a", &[1, 2], &[1]))]), [], "nothing changed");
    assert_eq!(agent.memory.info(0).unwrap().changed, before);

    let passed = with(service("a", &[1, 2], &[1]), |port| {
        port.frontends[0].inside = WantedSide { offset: 0, count: 0, mode: Mode::PassThrough, options: 0 };
    });
    assert_eq!(agent.change([("a", passed)]), [Write::Info(0), Write::Word(0, Word::Inside)]);
    assert!(agent.memory.info(0).unwrap().changed > before);
}

#[test]
fn an_endpoint_that_stays_has_not_joined_again() {
    let mut agent = Agent::new(CAPACITY);
    agent.change([("a", service("a", &[1, 2], &[1]))]);
    let first = agent.joined(frontend(1));
    agent.change([("a", service("a", &[2, 3], &[1]))]);
    let second = agent.joined(frontend(1));
    assert_eq!(second[&pod(2)], first[&pod(2)]);
    agent.change([("a", service("a", &[1, 2, 3], &[1]))]);
    let third = agent.joined(frontend(1));
    assert_eq!((third[&pod(2)], third[&pod(3)]), (second[&pod(2)], second[&pod(3)]));
    assert!(third[&pod(1)] > second[&pod(3)], "it left, and came back");
}

#[test]
fn an_endpoint_that_only_served_joins_anew() {
    let mut agent = Agent::new(CAPACITY);
    let only_one_in_sets = |wanted| {
        with(wanted, |port| {
            port.in_sets = 1;
            (port.frontends[0].inside.count, port.frontends[0].outside.count) = (1, 1);
        })
    };
    agent.change([("a", service("a", &[1, 2], &[1]))]);
    let first = agent.joined(frontend(1));
    let writes = agent.change([("a", only_one_in_sets(service("a", &[1, 2], &[1])))]);
    assert!(
        !writes.iter().any(|write| matches!(write, Write::Backend(_))),
        "the same slots, fewer in the sets"
    );
    agent.change([("a", service("a", &[1, 2], &[1]))]);
    let again = agent.joined(frontend(1));
    assert_eq!(again[&pod(1)], first[&pod(1)]);
    assert_ne!(again[&pod(2)], first[&pod(2)]);
}

#[test]
fn affinity_that_was_switched_off_has_ended() {
    let mut agent = Agent::new(CAPACITY);
    let plain = || service("a", &[1, 2], &[1]);
    agent.change([("a", with_affinity(plain()))]);
    let first = agent.joined(frontend(1));
    agent.change([("a", plain())]);
    assert_eq!(agent.joined(frontend(1)), first, "nothing to write while it is off");
    let writes = agent.change([("a", with_affinity(plain()))]);
    let again = agent.joined(frontend(1));
    assert!(first.iter().all(|(address, joined)| again[address] > *joined));
    let words: Vec<_> = writes.iter().filter(|write| matches!(write, Write::Word(..))).collect();
    let place = |word| words.iter().position(|write| **write == Write::Word(0, word)).unwrap();
    assert!(place(Word::Identity) < place(Word::Inside), "the timeout before the option");
}

#[test]
fn a_frontend_that_changes_hands_keeps_its_number() {
    let mut agent = Agent::new(CAPACITY);
    agent.change([("a", service("a", &[1], &[1, 2])), ("b", service("b", &[2], &[3]))]);
    let before = agent.memory.frontends().clone();
    let (of_a, of_b) = (agent.identity(frontend(1)), agent.identity(frontend(3)));
    let writes = agent.change([("a", service("a", &[1], &[2])), ("b", service("b", &[2], &[1, 3]))]);
    assert_eq!(agent.memory.frontends(), &before);
    assert_eq!(agent.identity(frontend(1)), of_b);
    assert_eq!(agent.identity(frontend(2)), of_a);
    assert!(!writes.iter().any(|write| matches!(write, Write::Backend(_))), "both blocks are there already");

    // The same in two calls, the taker first.
    agent.change([("a", service("a", &[1], &[1, 2]))]);
    assert_eq!(agent.change([("b", service("b", &[2], &[3]))]), []);
    assert_eq!(agent.memory.frontends(), &before);
    assert_eq!(agent.identity(frontend(1)), of_a);
}

#[test]
fn blocks_that_change_hands_crosswise_stay_in_use() {
    let mut agent = Agent::new(CAPACITY);
    agent.change([("a", service("a", &[1], &[1])), ("b", service("b", &[2], &[2]))]);
    agent.change([("a", service("a", &[1], &[2])), ("b", service("b", &[2], &[1]))]);
    agent.change([("c", service("c", &[3, 4], &[3]))]);
    assert_eq!(agent.joined(frontend(2)).into_keys().collect::<Vec<_>>(), [pod(1)]);
    assert_eq!(agent.joined(frontend(1)).into_keys().collect::<Vec<_>>(), [pod(2)]);
    agent.change([("a", None), ("b", None), ("c", None)]);
    assert_eq!((agent.tables().free_numbers(), agent.tables().free_slots()), (8, 64));
}

#[test]
fn source_ranges_are_there_as_long_as_anyone_asks() {
    let mut agent = Agent::new(CAPACITY);
    let plain = || service("a", &[1], &[1]);
    agent.change([("a", plain())]);
    let range = |length: u32| SourceRangeKey::new(0, &Cidr::new(pod(0), 96 + length));
    let writes = agent.change([("a", with_ranges(plain(), &[24]))]);
    let expected = [
        Write::Info(0),
        Write::InsertSourceRange(range(24)),
        Write::Word(0, Word::Inside),
        Write::Word(0, Word::Outside),
    ];
    assert_eq!(writes, expected, "without the bits beyond the prefix");

    agent.try_change([("a", plain())]);
    assert_eq!(agent.memory.source_ranges().len(), 1, "a program may still ask");
    agent.settle();
    let after = [Write::Grace, Write::DeleteSourceRange(range(24)), Write::Grace];
    assert_eq!(agent.memory.log.last_chunk(), Some(&after));
}

#[test]
fn a_source_range_that_is_taken_away_does_not_count_any_more_when_the_change_is_done() {
    let mut agent = Agent::new(CAPACITY);
    let ranges = |lengths: &[u32]| with_ranges(service("a", &[1], &[1]), lengths);
    let present = |agent: &Agent| agent.memory.source_ranges().len();
    agent.change([("a", ranges(&[8, 16]))]);
    agent.try_change([("a", ranges(&[16]))]);
    assert_eq!(present(&agent), 1, "narrowed, before anything is settled");
    agent.try_change([("a", ranges(&[24]))]);
    assert_eq!(present(&agent), 1, "one in the place of the other");

    // Open to all, and closed again before what nobody asked for was deleted.
    agent.try_change([("a", service("a", &[1], &[1]))]);
    assert_eq!(present(&agent), 1, "a program may still ask");
    agent.try_change([("a", ranges(&[8]))]);
    assert_eq!(present(&agent), 1, "the one of before does not come back");
}

#[test]
fn a_grace_period_lies_between_a_deletion_and_an_insertion() {
    let mut agent = Agent::new(CAPACITY);
    agent.change([("a", service("a", &[1], &[1])), ("b", service("b", &[1], &[2]))]);
    agent.try_change([("a", service("a", &[1], &[]))]);
    assert_eq!(agent.memory.log, [Write::DeleteFrontend(frontend(1))]);
    let report = agent.try_change([("c", service("c", &[1], &[3])), ("b", service("b", &[2], &[2]))]);
    assert!(report.failed.is_empty());
    let place = |write: &Write| agent.memory.log.iter().position(|other| other == write).unwrap();
    let number = agent.number(frontend(3));
    assert!(place(&Write::Grace) < place(&Write::InsertFrontend(frontend(3), number)));
    assert!(place(&Write::Word(1, Word::Inside)) < place(&Write::Grace), "who inserts nothing does not wait");
}

#[test]
fn an_address_becomes_something_else_across_a_grace_period() {
    let mut agent = Agent::new(CAPACITY);
    agent.change([("a", with_address(service("a", &[1], &[1]), 1, AddressKind::ClusterIp))]);
    agent.try_change([("a", with_address(service("a", &[1], &[1]), 1, AddressKind::Local))]);
    let expected = [Write::DeleteAddress(cluster_ip(1)), Write::Grace, Write::InsertAddress(cluster_ip(1))];
    assert_eq!(agent.memory.log, expected);

    // To another Service without a write, and to the node when no Service wants it.
    let report = agent.try_change([
        ("a", service("a", &[1], &[1])),
        ("b", with_address(service("b", &[1], &[]), 1, AddressKind::Local)),
    ]);
    assert_eq!(report.counts.addresses, 0);
    agent.reconciler.want_node_addresses(BTreeSet::from([cluster_ip(1)]), agent.now);
    agent.change([]);
    assert_eq!(agent.memory.addresses()[&cluster_ip(1)], Some(AddressKind::Local));
    agent.change([("b", None)]);
    assert_eq!(agent.memory.addresses()[&cluster_ip(1)], Some(AddressKind::NodePort));
    agent.reconciler.want_node_addresses(BTreeSet::new(), agent.now);
    agent.change([]);
    assert!(agent.memory.addresses().is_empty());
}

#[test]
fn the_decision_runs_over_planned_tables() {
    let mut agent = Agent::new(CAPACITY);
    agent.change([("a", with_ranges(with_affinity(service("a", &[1, 2], &[1])), &[24]))]);
    let config = Config {
        host_netns_cookie: 1,
        udp_timeout: 0,
        hash_seed: [0; 2],
        loopback_node_ports: 0,
        routes_by_source: 0,
        remember_peer: 0,
        host_sockets_only: 0,
        some_opted_out: 0,
        mask_ports_first: 0,
        mask_ports_count: 0,
        reserved_ports_first: 0,
        reserved_ports_count: 0,
        node_addresses: 0x8000_0000_0000_0001,
        udp_node_ports_first: 30_000,
        udp_node_ports_last: 30_100,
        _pad: 0,
        service_cidrs: [Cidr::NONE; MAX_CIDRS],
        cluster_cidrs: [Cidr::NONE; MAX_CIDRS],
    };
    let connection = |client: Address| Connection {
        client: Client { kind: ClientKind::Pod, address: client, netns_cookie: 0 },
        destination: cluster_ip(1),
        port: 80,
        protocol: Protocol::Tcp,
    };
    let before = agent.tables().clone();
    let view = View::new(&before, config);
    let elsewhere = resolve(&view, &connection(IpAddr::from([10, 9, 9, 9]).into()));
    assert!(matches!(elsewhere, Resolution::Drop { reason: Reason::SourceRange, .. }), "{elsewhere:?}");
    let allowed = connection(pod(50));
    let Resolution::Balance(balance) = resolve(&view, &allowed) else { panic!("not balanced") };
    let first = choose(&view, &balance, &allowed.client, u32::MAX).unwrap();
    assert_eq!(first.backend.address(), pod(2));

    // Another endpoint comes; the client stays where it went, though the slots are others.
    agent.change([("a", with_ranges(with_affinity(service("a", &[0, 1, 2], &[1])), &[24]))]);
    let view = view.over(agent.tables());
    let Resolution::Balance(balance) = resolve(&view, &allowed) else { panic!("not balanced") };
    let second = choose(&view, &balance, &allowed.client, 0).unwrap();
    assert_eq!(second.backend.address(), pod(2));
    assert_ne!(second.slot, first.slot);
}
