//! Properties of plans over random histories: wishes that change, writes that fail, agents that die.

mod reader;
mod world;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use kproxy_common::FrontendKey;
use proptest::{prelude::*, test_runner::Config};

use self::{
    reader::{Checked, Expected, view_of},
    world::{Event, Spec, World, event},
};
use super::{Capacity, Tables, restore};
use crate::{
    maps::{
        Reconciler, Report,
        memory::{Fail, Memory},
        status::Status,
    },
    wanted::ServiceKey,
};

const ROOMY: Capacity = Capacity { frontends: 32, backends: 160, addresses: 16, source_ranges: 32 };
/// So little that Services do not fit, and that space is used again soon.
const TIGHT: Capacity = Capacity { frontends: 5, backends: 12, addresses: 3, source_ranges: 3 };

/// One agent after the other over the same maps.
struct History {
    world: World,
    memory: Memory,
    reconciler: Reconciler,
    expected: Expected,
    now: SystemTime,
    capacity: Capacity,
}

impl History {
    fn new(capacity: Capacity) -> Self {
        let world = World::default();
        let mut reconciler = Reconciler::new(Tables::new(capacity));
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        reconciler.want_all(BTreeMap::new(), now);
        // Who takes a frontend over may not fit; its former owner does not keep it.
        let expected = Expected::new(capacity != TIGHT);
        Self { world, memory: Memory::new(capacity), reconciler, expected, now, capacity }
    }

    fn happen(&mut self, event: &Event) {
        self.now += Duration::from_secs(1);
        match event {
            Event::Change { services, node_addresses, fail } => {
                let before = self.world.wanted();
                self.world.change(services);
                let after = self.world.wanted();
                let mut changes = BTreeMap::new();
                for key in before.keys().chain(after.keys()) {
                    if before.get(key) != after.get(key) {
                        changes.insert(key.clone(), after.get(key).cloned());
                    }
                }
                self.expected.also(&self.world);
                self.reconciler.want(changes, self.now);
                if let Some(mask) = node_addresses {
                    self.world.node_addresses = *mask;
                    self.reconciler.want_node_addresses(self.world.node_addresses(), self.now);
                }
                self.memory.fail = match fail {
                    Some(after) => Fail::Nth(self.memory.attempts() + u64::from(*after)),
                    None => Fail::Never,
                };
                self.run();
            }
            Event::Settle => {
                self.settle();
            }
            Event::Wait => {
                self.now += Duration::from_secs(120);
                self.run();
            }
            Event::Die { services, after } => {
                let before = self.world.wanted();
                self.world.change(services);
                let after_change = self.world.wanted();
                let keys = before.keys().chain(after_change.keys());
                let changes = keys.map(|key| (key.clone(), after_change.get(key).cloned())).collect();
                self.expected.also(&self.world);
                self.reconciler.want(changes, self.now);
                self.memory.fail = Fail::From(self.memory.attempts() + u64::from(*after));
                self.run();
                self.settle();
                self.restart();
            }
            Event::Restart => {
                self.restart();
            }
        }
    }

    fn run(&mut self) -> Report {
        let mut checked = Checked::new(&mut self.memory, &self.expected);
        let report = self.reconciler.run(&mut checked, self.now);
        self.check();
        report
    }

    fn settle(&mut self) -> Report {
        let mut checked = Checked::new(&mut self.memory, &self.expected);
        let report = self.reconciler.settle(&mut checked, self.now);
        self.check();
        report
    }

    /// Another agent starts over what the maps hold.
    fn restart(&mut self) -> Report {
        self.memory.fail = Fail::Never;
        let numbers = self.memory.frontends().clone();
        let (tables, problems) = restore(&self.memory.snapshot(), self.capacity);
        assert!(problems.is_empty(), "what an agent leaves is sound: {problems:?}");
        self.reconciler = Reconciler::new(tables);
        self.reconciler.want_all(self.world.wanted(), self.now);
        self.reconciler.want_node_addresses(self.world.node_addresses(), self.now);
        let report = self.run();
        for (key, number) in self.memory.frontends() {
            assert!(numbers.get(key).is_none_or(|before| before == number), "{key:?} has another number now");
        }
        report
    }

    /// What must hold after every run.
    fn check(&mut self) {
        let tables = self.reconciler.tables();
        self.same_as_memory(tables);
        let wanted = self.world.wanted();
        let unfinished: BTreeSet<&ServiceKey> = self
            .reconciler
            .status()
            .services()
            .filter(|(_, status)| !matches!(status, Status::Done { .. }))
            .map(|(key, _)| key)
            .collect();
        for (key, service) in wanted.iter().filter(|(key, _)| !unfinished.contains(key)) {
            for port in &service.ports {
                for frontend in &port.frontends {
                    let is = view_of(&self.memory, &frontend.key).expect("what is done is there");
                    let should = world::view(service, port, frontend);
                    assert_eq!(is, should, "{key} is said to be done");
                }
            }
        }
        if unfinished.is_empty() && self.reconciler.status().leftovers().is_none() {
            let should: BTreeSet<FrontendKey> = world::frontends(&wanted).collect();
            let is: BTreeSet<FrontendKey> = self.memory.frontends().keys().copied().collect();
            assert_eq!(is, should);
            self.expected.only(&self.world);
            let node_done = matches!(self.reconciler.status().node(), None | Some(Status::Done { .. }));
            if node_done {
                let is =
                    self.memory.addresses().iter().map(|(address, kind)| (*address, kind.unwrap())).collect();
                assert_eq!(self.world.addresses(self.reconciler.status().node().is_some()), is);
            }
        }
    }

    /// The tables hold just what was written.
    fn same_as_memory(&self, tables: &Tables) {
        let (is, should) = (tables.snapshot(), self.memory.read_all());
        assert_eq!(is.frontends, should.frontends);
        assert_eq!(is.entries, should.entries);
        assert_eq!(is.backend_slots, should.backend_slots);
        assert_eq!(is.infos, should.infos);
        assert_eq!(is.addresses, should.addresses);
        assert_eq!(is.source_ranges, should.source_ranges);
        for (slot, backend) in is.backends.iter().enumerate() {
            if self.memory.is_pointed_at(slot as u32) {
                assert_eq!(*backend, should.backends[slot]);
            }
        }
    }

    /// Lets everything be done that can be: no write fails any more.
    fn finish(&mut self) {
        self.memory.fail = Fail::Never;
        for _ in 0..6 {
            self.now += Duration::from_secs(120);
            self.run();
            self.settle();
        }
        assert!(!self.reconciler.tables().needs_grace());
    }

    fn all_done(&self) -> bool {
        self.reconciler.status().services().all(|(_, status)| matches!(status, Status::Done { .. }))
            && matches!(self.reconciler.status().node(), None | Some(Status::Done { .. }))
            && self.reconciler.status().leftovers().is_none()
    }
}

fn history(tight: bool, events: &[Event]) {
    let capacity = if tight { TIGHT } else { ROOMY };
    let mut history = History::new(capacity);
    for event in events {
        history.happen(event);
    }
    history.finish();
    if !tight {
        assert!(history.all_done(), "{:?}", history.reconciler.status());
    }

    // A restart writes nothing when nothing changed.
    if history.all_done() && history.reconciler.status().node().is_some() {
        let report = history.restart();
        assert_eq!(report.counts.writes(), 0, "{:?}", history.memory.log);
        assert_eq!(history.settle().counts.writes(), 0);
    }

    // From scratch, the same comes out, up to numbers.
    if !tight {
        let mut memory = Memory::new(capacity);
        let mut other = Reconciler::new(Tables::new(capacity));
        other.want_all(history.world.wanted(), history.now);
        other.run(&mut memory, history.now);
        for key in memory.frontends().keys() {
            assert_eq!(view_of(&memory, key), view_of(&history.memory, key));
        }
        assert_eq!(memory.frontends().len(), history.memory.frontends().len());
    }

    // When everything goes, nothing is left, and everything is free.
    let none: Vec<(usize, Option<Spec>)> = (0..world::SERVICES).map(|service| (service, None)).collect();
    history.happen(&Event::Change { services: none, node_addresses: Some(0), fail: None });
    history.finish();
    let (tables, memory) = (history.reconciler.tables(), &history.memory);
    assert_eq!((memory.frontends().len(), memory.addresses().len(), memory.source_ranges().len()), (0, 0, 0));
    assert!((0..capacity.frontends).all(|number| memory.words(number) == [0; 4]));
    assert_eq!((tables.free_numbers(), tables.free_slots()), (capacity.frontends, capacity.backends));
    assert_eq!(tables.free_backend_ids(), capacity.backends);
    assert_eq!(tables.services().count(), 0);
}

fn config(cases: u32) -> Config {
    Config { cases, failure_persistence: None, max_shrink_iters: 4_000, ..Config::default() }
}

// Two tests, so that they run at the same time.
proptest! {
    #![proptest_config(config(7_000))]

    #[test]
    fn every_prefix_is_right_and_nothing_leaks(events in prop::collection::vec(event(), 1..7)) {
        history(false, &events);
    }
}

proptest! {
    #![proptest_config(config(4_000))]

    #[test]
    fn so_it_is_where_room_is_short(events in prop::collection::vec(event(), 1..8)) {
        history(true, &events);
    }
}
