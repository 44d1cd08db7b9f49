//! The decision's tables over planned ones: what the programs would decide, computed in memory.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
};

use kproxy_common::{
    Address, AddressKind, AffinityKey, AffinityValue, Backend, BackendSlots, Block, Cidr, ClientKind, Config,
    FrontendKey, ServiceIdentity, Side, SourceRangeKey,
};

use super::{Tables, Word};

/// [`Tables`] as the decision reads them, with a configuration, a clock that stands, and affinity of its own.
#[derive(Debug)]
pub struct View<'a> {
    tables: &'a Tables,
    config: Config,
    affinity: RefCell<BTreeMap<AffinityKey, AffinityValue>>,
    opted_out: BTreeSet<u64>,
    now: Cell<u64>,
}

impl<'a> View<'a> {
    /// Nobody has affinity yet, and the clock stands at 0.
    pub fn new(tables: &'a Tables, config: Config) -> Self {
        Self { tables, config, affinity: RefCell::default(), opted_out: BTreeSet::new(), now: Cell::new(0) }
    }

    /// The same affinity and clock over other tables.
    pub fn over<'b>(self, tables: &'b Tables) -> View<'b> {
        let Self { tables: _, config, affinity, opted_out, now } = self;
        View { tables, config, affinity, opted_out, now }
    }

    /// The same with another configuration.
    pub fn with_config(self, config: Config) -> Self {
        Self { config, ..self }
    }

    /// The same with the pods opted out whose network namespaces have these cookies.
    pub fn with_opted_out(self, opted_out: BTreeSet<u64>) -> Self {
        Self { opted_out, ..self }
    }

    /// Sets the clock, in nanoseconds since boot.
    pub fn set_now(&self, now: u64) {
        self.now.set(now);
    }

    fn word(&self, number: u32, word: Word) -> u64 {
        self.tables.words(number)[word as usize]
    }
}

impl kproxy_common::Tables for View<'_> {
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }

    fn frontend(&self, key: &FrontendKey) -> Option<u32> {
        self.tables.number(key)
    }

    fn address(&self, address: &Address) -> Option<AddressKind> {
        self.tables.address(address)
    }

    fn side(&self, number: u32, from: ClientKind) -> Option<Side> {
        let word = if from == ClientKind::Outside { Word::Outside } else { Word::Inside };
        Side::from_word(self.word(number, word)).ok()
    }

    fn identity(&self, number: u32) -> Option<ServiceIdentity> {
        Some(ServiceIdentity::from_word(self.word(number, Word::Identity)))
    }

    fn block(&self, number: u32) -> Option<Block> {
        Some(Block::from_word(self.word(number, Word::Block)))
    }

    fn backend(&self, slot: u32) -> Option<Backend> {
        self.tables.backend(slot)
    }

    fn slots_of(&self, backend: u32) -> Option<BackendSlots> {
        self.tables.slots_of(backend)
    }

    fn source_allowed(&self, number: u32, client: &Address) -> bool {
        let range = |key: &SourceRangeKey| {
            let length = key.prefix_length.saturating_sub(SourceRangeKey::NUMBER_BITS);
            Cidr::new(key.address, length)
        };
        self.tables.source_ranges(number).any(|key| range(key).contains(client))
    }

    fn opted_out(&self, netns_cookie: u64) -> bool {
        self.opted_out.contains(&netns_cookie)
    }

    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.affinity.borrow().get(key).copied()
    }

    fn remember(&self, key: &AffinityKey, value: &AffinityValue) {
        self.affinity.borrow_mut().insert(*key, *value);
    }

    fn now(&self) -> u64 {
        self.now.get()
    }
}
