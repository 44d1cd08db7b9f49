//! The tables as they stand in the kernel, as plain values, and who owns what in them. Changed only by
//! reporting what was written.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use kproxy_common::{
    Address, AddressKind, Backend, BackendSlots, FrontendKey, Options, Protocol, ServiceEntry,
    ServiceIdentity, ServiceInfo, Side, SourceRangeKey,
};

use super::{
    Snapshot,
    backend_ids::BackendIds,
    slots::{Slots, Word},
    spans::Spans,
};
use crate::wanted::ServiceKey;

/// How much each map holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    /// Elements of `frontend`, and so of `service`, `service_info` and `counter`.
    pub frontends: u32,
    /// Elements of `backend`.
    pub backends: u32,
    /// Elements of `address`.
    pub addresses: u32,
    /// Elements of `source_range`.
    pub source_ranges: u32,
}

/// A Service port in one family: what an identity in the maps stands for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Port {
    /// [`ServiceIdentity::service`].
    pub id: u32,
    /// Whose it is.
    pub service: Arc<ServiceKey>,
    /// `spec.ports[].name`.
    pub name: Box<str>,
    /// `spec.ports[].protocol`.
    pub protocol: Protocol,
    /// Whether it is the IPv4 side.
    pub v4: bool,
}

/// The tables as they stand in the kernel. Every number, slot and element has one owner.
///
/// What is taken out of use is not free at once: a running program may hold it until a grace period has
/// passed. See [`Tables::needs_grace`].
#[derive(Clone, Debug)]
pub struct Tables {
    pub(super) capacity: Capacity,
    pub(super) frontend: BTreeMap<FrontendKey, u32>,
    pub(super) numbers: Vec<Number>,
    pub(super) backend: Vec<Option<Backend>>,
    pub(super) address: BTreeMap<Address, AddressRecord>,
    pub(super) source_range: BTreeMap<u32, BTreeSet<SourceRangeKey>>,
    pub(super) source_range_count: usize,

    pub(super) ports: BTreeMap<u32, PortRecord>,
    // Looked up by name several times for every change: hashing beats comparing names.
    pub(super) services: HashMap<Arc<ServiceKey>, Owned>,
    /// The node's addresses that should answer NodePorts, once known.
    pub(super) node_wanted: Option<BTreeSet<Address>>,
    /// Those that stand in the map for the node's sake.
    pub(super) node_present: BTreeSet<Address>,
    pub(super) leftovers: Leftovers,
    /// Whether the first full list was seen: what nobody claims is deleted from then on.
    pub(super) complete: bool,

    pub(super) slots: Slots,
    pub(super) ids: BackendIds,
    pub(super) free_numbers: Spans,
    pub(super) reserved_numbers: Vec<u32>,
    /// Numbers without a frontend whose entry still stands.
    pub(super) retired_numbers: BTreeSet<u32>,
    /// Source ranges that nothing asks for any more, to be deleted when no program still asks.
    pub(super) retired_ranges: BTreeSet<SourceRangeKey>,
    /// Which hash maps had deletions since the last grace period, and take no insertion before the next.
    pub(super) deleted: Deleted,
    pub(super) next_service: u32,
    pub(super) next_joined: u32,
}

/// What stands under a number.
#[derive(Clone, Default, Debug)]
pub(super) struct Number {
    pub words: [u64; 4],
    pub info: Option<Arc<ServiceInfo>>,
    pub frontend: Option<FrontendKey>,
    /// [`Port::id`] of the owner, as `service_info` says.
    pub port: Option<u32>,
}

/// What stands under an address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct AddressRecord {
    /// `None`: a value that this version does not know.
    pub kind: Option<AddressKind>,
    /// `None`: the node itself, or nobody yet.
    pub owner: Option<Arc<ServiceKey>>,
}

#[derive(Clone, Debug)]
pub(super) struct PortRecord {
    pub port: Arc<Port>,
    pub numbers: BTreeSet<u32>,
}

/// What one Service has in the tables.
#[derive(Clone, Default, Debug)]
pub(super) struct Owned {
    pub ports: Vec<u32>,
    pub addresses: BTreeSet<Address>,
}

/// What was found in the maps at start and has no owner.
#[derive(Clone, Default, Debug)]
pub(super) struct Leftovers {
    /// Keys whose number is out of range, or another frontend's: they must go before they can come back.
    pub frontends: BTreeSet<FrontendKey>,
    /// Numbers of frontends whose `service_info` makes no sense.
    pub numbers: BTreeSet<u32>,
    /// Addresses that no Service has claimed yet.
    pub addresses: BTreeSet<Address>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct Deleted {
    pub frontend: bool,
    pub address: bool,
    pub source_range: bool,
}

/// How many reservations were open at some time.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Reserved {
    numbers: usize,
    blocks: usize,
    ids: usize,
}

impl Tables {
    /// Empty tables.
    pub fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            frontend: BTreeMap::new(),
            numbers: Vec::new(),
            backend: Vec::new(),
            address: BTreeMap::new(),
            source_range: BTreeMap::new(),
            source_range_count: 0,
            ports: BTreeMap::new(),
            services: HashMap::new(),
            node_wanted: None,
            node_present: BTreeSet::new(),
            leftovers: Leftovers::default(),
            complete: false,
            slots: Slots::new(capacity.backends),
            ids: BackendIds::new(capacity.backends),
            free_numbers: Spans::new(capacity.frontends),
            reserved_numbers: Vec::new(),
            retired_numbers: BTreeSet::new(),
            retired_ranges: BTreeSet::new(),
            deleted: Deleted::default(),
            next_service: 1,
            next_joined: 1,
        }
    }

    /// How much the maps hold.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// `frontend`: where Services listen, and their numbers.
    pub fn frontends(&self) -> impl Iterator<Item = (&FrontendKey, u32)> {
        self.frontend.iter().map(|(key, number)| (key, *number))
    }

    /// NodePorts, of both families.
    pub fn node_ports(&self) -> impl Iterator<Item = FrontendKey> {
        let of = |address: Address| {
            let lowest = FrontendKey::new(address, 0, Protocol::Tcp);
            self.frontend.range(lowest..).map(|(key, _)| *key).take_while(move |key| key.address() == address)
        };
        of(Address::UNSPECIFIED_V4).chain(of(Address::UNSPECIFIED))
    }

    /// The number of a frontend.
    pub fn number(&self, key: &FrontendKey) -> Option<u32> {
        self.frontend.get(key).copied()
    }

    /// `service`: the words of a number's entry; all zero for a number that is not given out.
    pub fn words(&self, number: u32) -> [u64; 4] {
        self.numbers.get(number as usize).map_or([0; 4], |number| number.words)
    }

    /// `service`: a number's entry, if its bytes form one.
    pub fn entry(&self, number: u32) -> Option<ServiceEntry> {
        ServiceEntry::from_words(self.words(number)).ok()
    }

    /// `service_info`: whose number it is.
    pub fn info(&self, number: u32) -> Option<&ServiceInfo> {
        self.numbers.get(number as usize)?.info.as_deref()
    }

    /// `backend`: what stands in a slot.
    pub fn backend(&self, slot: u32) -> Option<Backend> {
        self.backend.get(slot as usize).copied().flatten()
    }

    /// `backend_slot`: where the backend with this id stands.
    pub fn slots_of(&self, backend: u32) -> Option<BackendSlots> {
        (backend < self.capacity.backends).then(|| self.ids.slots(backend))
    }

    /// `address`: what an address is.
    pub fn address(&self, address: &Address) -> Option<AddressKind> {
        self.address.get(address)?.kind
    }

    /// `source_range`: the ranges of one number.
    pub fn source_ranges(&self, number: u32) -> impl Iterator<Item = &SourceRangeKey> {
        self.source_range.get(&number).into_iter().flatten()
    }

    /// Whether a word of this number asks for source ranges.
    pub(super) fn asks_for_ranges(&self, number: u32) -> bool {
        let words = self.words(number);
        [Word::Inside, Word::Outside].into_iter().any(|word| {
            Side::from_word(words[word as usize]).is_ok_and(|side| side.has(Options::SOURCE_RANGES))
        })
    }

    /// The Services that have something in the tables, in no order.
    pub fn services(&self) -> impl Iterator<Item = &ServiceKey> {
        self.services.keys().map(AsRef::as_ref)
    }

    /// The frontends that one Service has.
    pub fn frontends_of<'a>(&'a self, service: &ServiceKey) -> impl Iterator<Item = FrontendKey> + 'a {
        self.owned_numbers(service).filter_map(|number| self.numbers[number as usize].frontend)
    }

    /// The addresses that one Service has.
    pub fn addresses_of(&self, service: &ServiceKey) -> impl Iterator<Item = Address> {
        self.services.get(service).into_iter().flat_map(|owned| owned.addresses.iter().copied())
    }

    /// How many numbers can be given out at once. Those that wait for a grace period do not count.
    pub fn free_numbers(&self) -> u32 {
        self.free_numbers.free()
    }

    /// How many slots can be given out at once. Those that wait for a grace period do not count.
    pub fn free_slots(&self) -> u32 {
        self.slots.free()
    }

    /// How many ids of backends can be given out at once. Those of slots that wait for a grace period do not count.
    pub fn free_backend_ids(&self) -> u32 {
        self.ids.free()
    }

    /// Whether something waits for a grace period: to be used again, or to be deleted.
    pub fn needs_grace(&self) -> bool {
        self.deleted != Deleted::default()
            || self.slots.any_retired()
            || !self.retired_numbers.is_empty()
            || !self.retired_ranges.is_empty()
    }

    /// The same as what reading the maps would give.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot {
            frontends: self.frontend.iter().map(|(key, number)| (*key, *number)).collect(),
            entries: self.numbers.iter().map(|number| number.words).collect(),
            infos: self.numbers.iter().map(|number| number.info.as_deref().copied()).collect(),
            backends: self.backend.clone(),
            backend_slots: self.ids.words().to_vec(),
            addresses: self.address.iter().map(|(address, record)| (*address, record.kind)).collect(),
            source_ranges: self.source_range.values().flatten().copied().collect(),
        };
        snapshot.normalize();
        snapshot
    }

    pub(super) fn number_state(&mut self, number: u32) -> &mut Number {
        let index = number as usize;
        if index >= self.numbers.len() {
            self.numbers.resize_with(index + 1, Number::default);
        }
        &mut self.numbers[index]
    }

    /// The owner of a number, as `service_info` says.
    pub(super) fn owner(&self, number: u32) -> Option<&Arc<Port>> {
        let id = self.numbers.get(number as usize)?.port?;
        Some(&self.ports.get(&id)?.port)
    }

    /// The numbers of one Service's frontends.
    pub(super) fn owned_numbers<'a>(&'a self, service: &ServiceKey) -> impl Iterator<Item = u32> + 'a {
        let ports = self.services.get(service).map_or(&[][..], |owned| &owned.ports);
        ports.iter().filter_map(|id| self.ports.get(id)).flat_map(|record| record.numbers.iter().copied())
    }

    /// A number for [`Port::id`] that nothing has.
    pub(super) fn new_service_id(&mut self) -> u32 {
        // Wrapping is for maps with garbage in them; a node does not see four billion Service ports.
        while self.next_service == 0 || self.ports.contains_key(&self.next_service) {
            self.next_service = self.next_service.wrapping_add(1);
        }
        let id = self.next_service;
        self.next_service = self.next_service.wrapping_add(1);
        id
    }

    /// A value of [`Backend::joined`] that was not used before; never 0, which no backend in a set has.
    pub(super) fn new_joined(&mut self) -> u32 {
        let joined = self.next_joined.max(1);
        self.next_joined = joined.wrapping_add(1);
        joined
    }

    /// Gives out none of the identities before `first`, which is random: for tables that begin anew while flows
    /// and affinity of the time before them are still there.
    pub fn skip_identities(&mut self, first: u32) {
        self.next_service = self.next_service.max(first);
    }

    pub(super) fn reserve_number(&mut self) -> Option<u32> {
        let number = self.free_numbers.take(1)?;
        self.reserved_numbers.push(number);
        Some(number)
    }

    /// How many reservations are open; for [`Tables::release_reserved`].
    pub(super) fn reserved(&self) -> Reserved {
        Reserved {
            numbers: self.reserved_numbers.len(),
            blocks: self.slots.reserved(),
            ids: self.ids.reserved(),
        }
    }

    /// Closes the reservations after `kept`: what was not written is free again. A number whose entry was
    /// written, but no frontend, waits for its entry to be cleared.
    pub(crate) fn release_reserved(&mut self, kept: Reserved) {
        // In this order: an id that a slot names, which is freed next, becomes free with it, and once.
        self.ids.release_reserved(kept.ids);
        self.slots.release_reserved(kept.blocks);
        self.forget_freed();
        for number in self.reserved_numbers.split_off(kept.numbers) {
            let state = self.number_state(number);
            if state.frontend.is_some() {
                continue;
            }
            let unused = state.words == [0; 4];
            self.disown(number);
            if unused && !self.source_range.contains_key(&number) {
                self.free_numbers.give(number, 1);
            } else {
                self.retire(number);
            }
        }
    }
}

/// What was written, reported by whoever wrote it.
impl Tables {
    pub(crate) fn wrote_backends(&mut self, first: u32, backends: &[Backend]) {
        let (first, end) = (first as usize, first as usize + backends.len());
        if self.backend.len() < end {
            self.backend.resize(end, None);
        }
        for (slot, backend) in self.backend[first..end].iter_mut().zip(backends) {
            *slot = Some(*backend);
        }
        for (slot, backend) in (first as u32..).zip(backends) {
            self.ids.name(slot, backend.id());
        }
    }

    pub(crate) fn stored_backend_slots(&mut self, backend: u32, slots: BackendSlots) {
        self.ids.stored(backend, slots);
    }

    pub(crate) fn wrote_info(&mut self, number: u32, info: &Arc<ServiceInfo>, port: &Arc<Port>) {
        self.number_state(number).info = Some(info.clone());
        self.leftovers.numbers.remove(&number);
        self.own(number, port);
    }

    pub(crate) fn stored_word(&mut self, number: u32, word: Word, value: u64) {
        let old = std::mem::replace(&mut self.number_state(number).words[word as usize], value);
        self.slots.refer(word, value);
        self.slots.leave(word, old);
    }

    /// The entry of a number that no frontend leads to.
    pub(crate) fn wrote_entry(&mut self, number: u32, entry: &ServiceEntry) {
        let words = entry.to_words();
        let old = std::mem::replace(&mut self.number_state(number).words, words);
        for word in Word::STORE_ORDER {
            self.slots.refer(word, words[word as usize]);
            self.slots.leave_unseen(word, old[word as usize]);
        }
        self.forget_freed();
        if words == [0; 4] && self.retired_numbers.remove(&number) {
            self.free_numbers.give(number, 1);
        }
    }

    pub(crate) fn inserted_frontend(&mut self, key: FrontendKey, number: u32) {
        self.frontend.insert(key, number);
        self.number_state(number).frontend = Some(key);
    }

    pub(crate) fn deleted_frontend(&mut self, key: &FrontendKey) {
        self.deleted.frontend = true;
        if self.leftovers.frontends.remove(key) {
            return;
        }
        let Some(number) = self.frontend.remove(key) else { return };
        self.number_state(number).frontend = None;
        self.leftovers.numbers.remove(&number);
        self.disown(number);
        self.retire(number);
    }

    pub(crate) fn inserted_address(
        &mut self,
        address: Address,
        kind: AddressKind,
        owner: Option<Arc<ServiceKey>>,
    ) {
        self.address.insert(address, AddressRecord { kind: Some(kind), owner: owner.clone() });
        self.index_address(address, owner);
    }

    /// The address stands already; this is whose it is now. `None`: the node's.
    pub(crate) fn owns_address(&mut self, address: Address, owner: Option<Arc<ServiceKey>>) {
        self.release_address(&address);
        if let Some(record) = self.address.get_mut(&address) {
            record.owner.clone_from(&owner);
        }
        self.index_address(address, owner);
    }

    pub(crate) fn deleted_address(&mut self, address: &Address) {
        self.deleted.address = true;
        self.release_address(address);
        self.address.remove(address);
    }

    pub(crate) fn inserted_source_range(&mut self, key: SourceRangeKey) {
        self.source_range.entry(key.number).or_default().insert(key);
        self.source_range_count += 1;
    }

    /// Nothing asks for this range from now on; it can be deleted after a grace period.
    pub(crate) fn retired_source_range(&mut self, key: SourceRangeKey) {
        self.retired_ranges.insert(key);
    }

    pub(crate) fn deleted_source_range(&mut self, key: &SourceRangeKey) {
        self.deleted.source_range = true;
        self.retired_ranges.remove(key);
        let Some(keys) = self.source_range.get_mut(&key.number) else { return };
        if keys.remove(key) {
            self.source_range_count -= 1;
        }
        if keys.is_empty() {
            self.source_range.remove(&key.number);
        }
    }

    /// A grace period has passed: no program holds anything that it read before it.
    pub(crate) fn grace_passed(&mut self) {
        self.deleted = Deleted::default();
        self.slots.grace_passed();
        self.forget_freed();
    }

    /// What stood in slots that are free by now names no id any more.
    fn forget_freed(&mut self) {
        for (first, length) in self.slots.take_freed() {
            (first..first + length).for_each(|slot| self.ids.forget(slot));
        }
    }

    fn own(&mut self, number: u32, port: &Arc<Port>) {
        if self.numbers[number as usize].port == Some(port.id) {
            return;
        }
        self.disown(number);
        self.numbers[number as usize].port = Some(port.id);
        let record = self
            .ports
            .entry(port.id)
            .or_insert_with(|| PortRecord { port: port.clone(), numbers: BTreeSet::new() });
        record.numbers.insert(number);
        let owned = self.services.entry(port.service.clone()).or_default();
        if !owned.ports.contains(&port.id) {
            owned.ports.push(port.id);
        }
    }

    fn disown(&mut self, number: u32) {
        let Some(id) = self.number_state(number).port.take() else { return };
        let Some(record) = self.ports.get_mut(&id) else { return };
        record.numbers.remove(&number);
        if !record.numbers.is_empty() {
            return;
        }
        let service = record.port.service.clone();
        self.ports.remove(&id);
        if let Some(owned) = self.services.get_mut(&service) {
            owned.ports.retain(|other| *other != id);
        }
        self.drop_if_empty(&service);
    }

    fn index_address(&mut self, address: Address, owner: Option<Arc<ServiceKey>>) {
        match owner {
            Some(service) => {
                self.services.entry(service).or_default().addresses.insert(address);
            }
            None => {
                self.node_present.insert(address);
            }
        }
    }

    fn release_address(&mut self, address: &Address) {
        self.leftovers.addresses.remove(address);
        self.node_present.remove(address);
        let Some(service) = self.address.get_mut(address).and_then(|record| record.owner.take()) else {
            return;
        };
        if let Some(owned) = self.services.get_mut(&service) {
            owned.addresses.remove(address);
        }
        self.drop_if_empty(&service);
    }

    fn drop_if_empty(&mut self, service: &ServiceKey) {
        if self
            .services
            .get(service)
            .is_some_and(|owned| owned.ports.is_empty() && owned.addresses.is_empty())
        {
            self.services.remove(service);
        }
    }

    fn retire(&mut self, number: u32) {
        self.retired_numbers.insert(number);
        if let Some(keys) = self.source_range.get(&number) {
            self.retired_ranges.extend(keys.iter().copied());
        }
    }

    /// [`ServiceIdentity`] as it stands in the map.
    pub(super) fn identity(&self, number: u32) -> ServiceIdentity {
        ServiceIdentity::from_word(self.words(number)[Word::Identity as usize])
    }
}
