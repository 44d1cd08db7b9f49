//! The maps' twin in memory, for tests: it can be told to fail, remembers what was written in which order, and
//! panics where a write breaks the rules that keep reading programs safe.

mod flows;

use std::collections::{BTreeMap, BTreeSet};

use kproxy_common::{
    Address, AddressKind, Backend, BackendSlots, FrontendKey, Options, ServiceEntry, ServiceInfo, Side,
    SourceRangeKey, map_names,
};

pub use self::flows::{FlowView, Flows};
use super::{MapWriter, WriteError};
use crate::plan::{Capacity, Snapshot, Word};

/// Which writes fail. Every element counts as one write, and so does a grace period.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum Fail {
    /// None.
    #[default]
    Never,
    /// The one with this number, counted from 0 over the twin's life.
    Nth(u64),
    /// All from this number on, as if the agent had died.
    From(u64),
    /// All to this map.
    Map(&'static str),
}

/// A write that was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Write {
    /// A backend into a slot.
    Backend(u32),
    /// Where the backend with this id stands.
    BackendSlots(u32),
    /// `service_info` of a number.
    Info(u32),
    /// The entry of a number.
    Entry(u32),
    /// A word of an entry.
    Word(u32, Word),
    /// The counters of a number.
    Counters(u32),
    /// A frontend, with its number.
    InsertFrontend(FrontendKey, u32),
    /// A frontend.
    DeleteFrontend(FrontendKey),
    /// An address.
    InsertAddress(Address),
    /// An address.
    DeleteAddress(Address),
    /// A source range.
    InsertSourceRange(SourceRangeKey),
    /// A source range.
    DeleteSourceRange(SourceRangeKey),
    /// A grace period.
    Grace,
}

/// The maps, in memory.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Which writes fail from now on.
    pub fail: Fail,
    /// What was written, in its order.
    pub log: Vec<Write>,
    capacity: Capacity,
    frontend: BTreeMap<FrontendKey, u32>,
    service: Vec<[u64; 4]>,
    service_info: Vec<Option<ServiceInfo>>,
    backend: Vec<Option<Backend>>,
    backend_slot: Vec<u64>,
    address: BTreeMap<Address, Option<AddressKind>>,
    source_range: BTreeSet<SourceRangeKey>,
    attempts: u64,

    /// Maps that had deletions since the last grace period.
    deleted: BTreeSet<&'static str>,
    /// How many words point at a slot.
    pointed: BTreeMap<u32, u32>,
    /// Slots that a word pointed at since the last grace period, under a number that programs could reach.
    left: BTreeSet<u32>,
    /// Numbers that a frontend led to since the last grace period.
    reached: BTreeSet<u32>,
    /// Of these, those where a word that asks for source ranges was replaced by one that does not since the last
    /// grace period.
    asked: BTreeSet<u32>,
}

impl Memory {
    /// Empty maps.
    pub fn new(capacity: Capacity) -> Self {
        Self::from_snapshot(&Snapshot::default(), capacity)
    }

    /// Maps with this in them, as another agent may have left them.
    pub fn from_snapshot(snapshot: &Snapshot, capacity: Capacity) -> Self {
        let mut memory = Self {
            fail: Fail::Never,
            log: Vec::new(),
            capacity,
            frontend: snapshot.frontends.iter().copied().collect(),
            service: snapshot.entries.clone(),
            service_info: snapshot.infos.clone(),
            backend: snapshot.backends.clone(),
            backend_slot: snapshot.backend_slots.clone(),
            address: snapshot.addresses.iter().copied().collect(),
            source_range: snapshot.source_ranges.iter().copied().collect(),
            attempts: 0,
            deleted: BTreeSet::new(),
            pointed: BTreeMap::new(),
            left: BTreeSet::new(),
            reached: snapshot.frontends.iter().map(|(_, number)| *number).collect(),
            asked: BTreeSet::new(),
        };
        memory.service.resize(capacity.frontends as usize, [0; 4]);
        memory.service_info.resize(capacity.frontends as usize, None);
        memory.backend.resize(capacity.backends as usize, None);
        memory.backend_slot.resize(capacity.backends as usize, 0);
        for words in memory.service.clone() {
            for word in Word::STORE_ORDER {
                memory.point(word, words[word as usize]);
            }
        }
        memory
    }

    /// What the maps hold, for whoever starts: after a grace period.
    pub fn snapshot(&mut self) -> Snapshot {
        self.grace_passed();
        self.read_all()
    }

    /// What the maps hold.
    pub fn read_all(&self) -> Snapshot {
        let mut snapshot = Snapshot {
            frontends: self.frontend.iter().map(|(key, number)| (*key, *number)).collect(),
            entries: self.service.clone(),
            infos: self.service_info.clone(),
            backends: self.backend.clone(),
            backend_slots: self.backend_slot.clone(),
            addresses: self.address.iter().map(|(address, kind)| (*address, *kind)).collect(),
            source_ranges: self.source_range.iter().copied().collect(),
        };
        snapshot.normalize();
        snapshot
    }

    /// How many writes were tried.
    pub fn attempts(&self) -> u64 {
        self.attempts
    }

    /// `frontend`.
    pub fn frontends(&self) -> &BTreeMap<FrontendKey, u32> {
        &self.frontend
    }

    /// `service`.
    pub fn words(&self, number: u32) -> [u64; 4] {
        self.service.get(number as usize).copied().unwrap_or_default()
    }

    /// `service_info`.
    pub fn info(&self, number: u32) -> Option<&ServiceInfo> {
        self.service_info.get(number as usize)?.as_ref()
    }

    /// `backend`.
    pub fn backend(&self, slot: u32) -> Option<Backend> {
        self.backend.get(slot as usize).copied().flatten()
    }

    /// `backend_slot`.
    pub fn slots_of(&self, backend: u32) -> Option<BackendSlots> {
        self.backend_slot.get(backend as usize).copied().map(BackendSlots::from_word)
    }

    /// `address`.
    pub fn addresses(&self) -> &BTreeMap<Address, Option<AddressKind>> {
        &self.address
    }

    /// `source_range`.
    pub fn source_ranges(&self) -> &BTreeSet<SourceRangeKey> {
        &self.source_range
    }

    /// Whether a word points at this slot.
    pub fn is_pointed_at(&self, slot: u32) -> bool {
        self.pointed.contains_key(&slot)
    }

    fn attempt(&mut self, map: &'static str) -> Result<(), WriteError> {
        let number = self.attempts;
        self.attempts += 1;
        let fails = match self.fail {
            Fail::Never => false,
            Fail::Nth(nth) => number == nth,
            Fail::From(first) => number >= first,
            Fail::Map(name) => name == map,
        };
        if fails { Err(WriteError { map, what: format!("write {number} was told to fail") }) } else { Ok(()) }
    }

    fn room(&self, map: &'static str, used: usize, capacity: u32) -> Result<(), WriteError> {
        if used >= capacity as usize {
            return Err(WriteError { map, what: format!("all of its {capacity} elements are in use") });
        }
        Ok(())
    }

    fn point(&mut self, word: Word, value: u64) {
        for slot in slots(word, value) {
            *self.pointed.entry(slot).or_default() += 1;
        }
    }

    fn leave(&mut self, number: u32, word: Word, value: u64) {
        for slot in slots(word, value) {
            let pointed = self.pointed.get_mut(&slot).expect("a word that pointed was counted");
            *pointed -= 1;
            if *pointed == 0 {
                self.pointed.remove(&slot);
            }
            if self.reached.contains(&number) {
                self.left.insert(slot);
            }
        }
    }

    fn grace_passed(&mut self) {
        self.deleted.clear();
        self.left.clear();
        self.asked.clear();
        self.reached = self.frontend.values().copied().collect();
    }
}

impl MapWriter for Memory {
    fn write_backends(&mut self, first_slot: u32, backends: &[Backend]) -> Result<(), WriteError> {
        for (slot, backend) in (first_slot..).zip(backends) {
            self.attempt(map_names::BACKEND)?;
            assert!(slot < self.capacity.backends, "slot {slot} does not exist");
            assert!(!self.pointed.contains_key(&slot), "slot {slot} is written while a word points at it");
            assert!(!self.left.contains(&slot), "slot {slot} is written again without a grace period");
            self.backend[slot as usize] = Some(*backend);
            self.log.push(Write::Backend(slot));
        }
        Ok(())
    }

    fn store_backend_slots(&mut self, backend: u32, slots: BackendSlots) -> Result<(), WriteError> {
        self.attempt(map_names::BACKEND_SLOT)?;
        self.backend_slot[backend as usize] = slots.to_word();
        self.log.push(Write::BackendSlots(backend));
        Ok(())
    }

    fn write_info(&mut self, number: u32, info: &ServiceInfo) -> Result<(), WriteError> {
        self.attempt(map_names::SERVICE_INFO)?;
        self.service_info[number as usize] = Some(*info);
        self.log.push(Write::Info(number));
        Ok(())
    }

    fn write_entry(&mut self, number: u32, entry: &ServiceEntry) -> Result<(), WriteError> {
        self.attempt(map_names::SERVICE)?;
        assert!(!self.reached.contains(&number), "number {number} is used again without a grace period");
        let words = entry.to_words();
        let old = std::mem::replace(&mut self.service[number as usize], words);
        for word in Word::STORE_ORDER {
            self.point(word, words[word as usize]);
            self.leave(number, word, old[word as usize]);
        }
        self.log.push(Write::Entry(number));
        Ok(())
    }

    fn store_word(&mut self, number: u32, word: Word, value: u64) -> Result<(), WriteError> {
        self.attempt(map_names::SERVICE)?;
        let old = std::mem::replace(&mut self.service[number as usize][word as usize], value);
        self.point(word, value);
        self.leave(number, word, old);
        let asked = |side: Side| side.has(Options::SOURCE_RANGES);
        let is_side = matches!(word, Word::Inside | Word::Outside);
        let [before, after] = [old, value].map(|value| Side::from_word(value).is_ok_and(asked));
        if is_side && self.reached.contains(&number) && before && !after {
            self.asked.insert(number);
        }
        self.log.push(Write::Word(number, word));
        Ok(())
    }

    fn reset_counters(&mut self, numbers: &[u32]) -> Vec<Result<(), WriteError>> {
        let mut reset = |number: &u32| {
            self.attempt(map_names::COUNTER)?;
            self.log.push(Write::Counters(*number));
            Ok(())
        };
        numbers.iter().map(&mut reset).collect()
    }

    fn insert_frontends(&mut self, frontends: &[(FrontendKey, u32)]) -> Vec<Result<(), WriteError>> {
        let mut insert = |(key, number): &(FrontendKey, u32)| {
            self.attempt(map_names::FRONTEND)?;
            let map = map_names::FRONTEND;
            self.room(map, self.frontend.len(), self.capacity.frontends)?;
            assert!(
                !self.deleted.contains(map),
                "{key:?} is inserted after a deletion without a grace period"
            );
            assert!(!self.frontend.contains_key(key), "{key:?} is replaced");
            self.frontend.insert(*key, *number);
            self.reached.insert(*number);
            self.log.push(Write::InsertFrontend(*key, *number));
            Ok(())
        };
        frontends.iter().map(&mut insert).collect()
    }

    fn delete_frontends(&mut self, keys: &[FrontendKey]) -> Vec<Result<(), WriteError>> {
        let mut delete = |key: &FrontendKey| {
            self.attempt(map_names::FRONTEND)?;
            self.frontend.remove(key);
            self.deleted.insert(map_names::FRONTEND);
            self.log.push(Write::DeleteFrontend(*key));
            Ok(())
        };
        keys.iter().map(&mut delete).collect()
    }

    fn insert_addresses(&mut self, addresses: &[(Address, AddressKind)]) -> Vec<Result<(), WriteError>> {
        let mut insert = |(address, kind): &(Address, AddressKind)| {
            self.attempt(map_names::ADDRESS)?;
            let map = map_names::ADDRESS;
            self.room(map, self.address.len(), self.capacity.addresses)?;
            assert!(
                !self.deleted.contains(map),
                "{address} is inserted after a deletion without a grace period"
            );
            let replaced = self.address.insert(*address, Some(*kind));
            assert!(replaced.is_none(), "{address} is replaced");
            self.log.push(Write::InsertAddress(*address));
            Ok(())
        };
        addresses.iter().map(&mut insert).collect()
    }

    fn delete_addresses(&mut self, addresses: &[Address]) -> Vec<Result<(), WriteError>> {
        let mut delete = |address: &Address| {
            self.attempt(map_names::ADDRESS)?;
            self.address.remove(address);
            self.deleted.insert(map_names::ADDRESS);
            self.log.push(Write::DeleteAddress(*address));
            Ok(())
        };
        addresses.iter().map(&mut delete).collect()
    }

    fn insert_source_ranges(&mut self, keys: &[SourceRangeKey]) -> Vec<Result<(), WriteError>> {
        let mut insert = |key: &SourceRangeKey| {
            self.attempt(map_names::SOURCE_RANGE)?;
            let map = map_names::SOURCE_RANGE;
            self.room(map, self.source_range.len(), self.capacity.source_ranges)?;
            assert!(
                !self.deleted.contains(map),
                "{key:?} is inserted after a deletion without a grace period"
            );
            assert!(self.source_range.insert(*key), "{key:?} is replaced");
            self.log.push(Write::InsertSourceRange(*key));
            Ok(())
        };
        keys.iter().map(&mut insert).collect()
    }

    fn delete_source_ranges(&mut self, keys: &[SourceRangeKey]) -> Vec<Result<(), WriteError>> {
        let mut delete = |key: &SourceRangeKey| {
            self.attempt(map_names::SOURCE_RANGE)?;
            assert!(!self.asked.contains(&key.number), "a program may still ask for {key:?}");
            self.source_range.remove(key);
            self.deleted.insert(map_names::SOURCE_RANGE);
            self.log.push(Write::DeleteSourceRange(*key));
            Ok(())
        };
        keys.iter().map(&mut delete).collect()
    }

    fn grace(&mut self) -> Result<(), WriteError> {
        self.attempt("(grace period)")?;
        self.grace_passed();
        self.log.push(Write::Grace);
        Ok(())
    }

    fn calls(&self) -> u64 {
        self.attempts
    }
}

fn slots(word: Word, value: u64) -> std::ops::Range<u32> {
    word.run(value).map_or(0..0, |(first, length)| first..first.saturating_add(length))
}
