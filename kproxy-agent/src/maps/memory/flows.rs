//! The packet path's tables in memory: what the programs would do with a packet, computed on the host.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, VecDeque},
};

use kproxy_common::{
    Action, Address, AddressKind, AffinityKey, AffinityValue, Backend, BackendSlots, Block, ClientKind,
    Config, Conversation, Counters, DeviceAddresses, Flow, FlowKey, FlowStore, FlowTable, FlowTables,
    FragmentKey, FragmentPorts, FrontendKey, Hit, Hook, PacketMeta, Role, ServiceIdentity, Side, WAITING,
    flow_store as store, masqueraded_index,
};

use crate::plan::{Tables, View};

/// What packets leave behind: flows, affinity, counters; and the addresses that clients are masked with. Nothing
/// is ever evicted by itself.
#[derive(Clone, Default, Debug)]
pub struct Flows {
    /// `device`, by interface index.
    pub devices: BTreeMap<u32, DeviceAddresses>,
    /// Where sockets of the host are bound: their addresses and ports.
    pub sockets: BTreeSet<(Address, u16)>,
    /// Nanoseconds since boot.
    pub now: u64,
    flow: RefCell<BTreeMap<FlowKey, Flow>>,
    transient: RefCell<BTreeMap<FlowKey, Flow>>,
    /// Requests of flows that wait for what their ends do.
    waiting: RefCell<VecDeque<FlowKey>>,
    affinity: RefCell<BTreeMap<AffinityKey, AffinityValue>>,
    fragments: RefCell<BTreeMap<FragmentKey, FragmentPorts>>,
    masqueraded: RefCell<BTreeSet<u32>>,
    counters: RefCell<BTreeMap<u32, Counters>>,
}

impl Flows {
    /// These flows, over the tables of Services as they stand.
    pub fn over<'a>(&'a self, tables: &'a Tables, config: &Config) -> FlowView<'a> {
        FlowView { flows: self, services: View::new(tables, *config) }
    }

    /// `flow`.
    pub fn established(&self) -> BTreeMap<FlowKey, Flow> {
        self.flow.borrow().clone()
    }

    /// `flow_transient`.
    pub fn transient(&self) -> BTreeMap<FlowKey, Flow> {
        self.transient.borrow().clone()
    }

    /// Takes out the entry under this key, as the kernel does where it makes room.
    pub fn evict(&mut self, key: &FlowKey) {
        self.flow.get_mut().remove(key);
        self.transient.get_mut().remove(key);
    }

    fn table(&self, table: FlowTable) -> &RefCell<BTreeMap<FlowKey, Flow>> {
        match table {
            FlowTable::Established => &self.flow,
            FlowTable::Transient => &self.transient,
        }
    }

    /// `counter` of a number.
    pub fn counters(&self, number: u32) -> Counters {
        self.counters.borrow().get(&number).copied().unwrap_or_default()
    }
}

/// One CPU's, so that nobody else ever claims a key.
impl FlowStore for Flows {
    fn read<R>(&self, table: FlowTable, key: &FlowKey, read: impl FnOnce(&Flow) -> R) -> Option<R> {
        self.table(table).borrow().get(key).map(read)
    }

    fn insert(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool {
        let mut table = self.table(table).borrow_mut();
        let is_free = !table.contains_key(key);
        if is_free {
            table.insert(*key, *flow);
        }
        is_free
    }

    fn replace(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool {
        self.table(table).borrow_mut().get_mut(key).map(|standing| *standing = *flow).is_some()
    }

    fn remove(&self, table: FlowTable, key: &FlowKey) -> bool {
        self.table(table).borrow_mut().remove(key).is_some()
    }

    fn change(&self, table: FlowTable, key: &FlowKey, change: impl FnOnce(&mut Flow) -> bool) -> bool {
        self.table(table).borrow_mut().get_mut(key).is_some_and(change)
    }

    fn claim(&self, _: &FlowKey) -> bool {
        true
    }

    fn release(&self, _: &FlowKey) {}

    fn time(&self) -> u64 {
        self.now
    }
}

/// Everything that the decision about a packet reads and writes.
#[derive(Debug)]
pub struct FlowView<'a> {
    flows: &'a Flows,
    services: View<'a>,
}

impl FlowView<'_> {
    fn hit(map: &RefCell<BTreeMap<FlowKey, Flow>>, packet: &PacketMeta, hook: Hook) -> Option<Flow> {
        map.borrow().get(&key(packet, hook)).copied()
    }

    fn with<R>(
        map: &RefCell<BTreeMap<FlowKey, Flow>>,
        packet: &PacketMeta,
        hook: Hook,
        act: impl FnOnce(&mut Conversation) -> R,
    ) -> Option<R> {
        let flow = Self::hit(map, packet, hook)?;
        let mut whole = Conversation::EMPTY;
        whole.read_entry(&key(packet, hook), &flow);
        Some(act(&mut whole))
    }
}

impl kproxy_common::Tables for FlowView<'_> {
    fn config(&self) -> Option<&Config> {
        self.services.config()
    }

    fn frontend(&self, key: &FrontendKey) -> Option<u32> {
        self.services.frontend(key)
    }

    fn address(&self, address: &Address) -> Option<AddressKind> {
        self.services.address(address)
    }

    fn side(&self, number: u32, from: ClientKind) -> Option<Side> {
        self.services.side(number, from)
    }

    fn identity(&self, number: u32) -> Option<ServiceIdentity> {
        self.services.identity(number)
    }

    fn block(&self, number: u32) -> Option<Block> {
        self.services.block(number)
    }

    fn backend(&self, slot: u32) -> Option<Backend> {
        self.services.backend(slot)
    }

    fn slots_of(&self, backend: u32) -> Option<BackendSlots> {
        self.services.slots_of(backend)
    }

    fn source_allowed(&self, number: u32, client: &Address) -> bool {
        self.services.source_allowed(number, client)
    }

    fn opted_out(&self, netns_cookie: u64) -> bool {
        self.services.opted_out(netns_cookie)
    }

    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        self.flows.affinity.borrow().get(key).copied()
    }

    fn remember(&self, key: &AffinityKey, value: &AffinityValue) {
        self.flows.affinity.borrow_mut().insert(*key, *value);
    }

    fn now(&self) -> u64 {
        self.flows.now
    }
}

impl FlowTables for FlowView<'_> {
    fn flow(&self, packet: &PacketMeta, hook: Hook) -> Option<Hit> {
        Self::hit(&self.flows.flow, packet, hook).as_ref().map(Hit::from)
    }

    fn transient(&self, packet: &PacketMeta, hook: Hook) -> Option<Hit> {
        Self::hit(&self.flows.transient, packet, hook).as_ref().map(Hit::from)
    }

    fn with_flow<R>(
        &self,
        packet: &PacketMeta,
        hook: Hook,
        act: impl FnOnce(&mut Conversation) -> R,
    ) -> Option<R> {
        Self::with(&self.flows.flow, packet, hook, act)
    }

    fn with_transient<R>(
        &self,
        packet: &PacketMeta,
        hook: Hook,
        act: impl FnOnce(&mut Conversation) -> R,
    ) -> Option<R> {
        Self::with(&self.flows.transient, packet, hook, act)
    }

    fn with_new(&self, act: impl FnOnce(&mut Conversation) -> u32) -> u32 {
        act(&mut { Conversation::EMPTY })
    }

    fn act(&self, whole: &Conversation, role: Role, action: Action) -> bool {
        let (key, flow) = entry(whole, role);
        match action {
            Action::Take { rest } => store::take(self.flows, &key, &flow, rest),
            Action::Put => store::put(self.flows, &key, &flow),
            Action::Establish => store::establish(self.flows, &key, &flow),
            Action::End => store::end(self.flows, &key, &flow),
            Action::StepAside => store::step_aside(self.flows, &key),
            Action::Mark(table, marks) => store::mark(self.flows, table, &key, &flow, marks),
            Action::Keep(table, marks) => store::keep(self.flows, table, &key, &flow, marks),
        }
    }

    fn act_all(&self, whole: &Conversation, action: Action) -> bool {
        match action {
            Action::Keep(..) => store::keep_all(whole, |role| self.act(whole, role, action)),
            _ => store::for_all(whole, |role| self.act(whole, role, action)),
        }
    }

    fn occupant(&self, whole: &Conversation, role: Role) -> Option<Hit> {
        let (key, _) = entry(whole, role);
        let established = self.flows.flow.borrow().get(&key).map(Hit::from);
        established.or_else(|| self.flows.transient.borrow().get(&key).map(Hit::from))
    }

    fn wait(&self, whole: &mut Conversation) -> bool {
        let mut waiting = self.flows.waiting.borrow_mut();
        waiting.push_back(entry(whole, Role::Request).0);
        if waiting.len() <= WAITING as usize {
            return false;
        }
        let Some((key, flow)) =
            waiting.pop_front().and_then(|key| Some((key, self.flows.flow.borrow().get(&key).copied()?)))
        else {
            return false;
        };
        whole.read_entry(&key, &flow);
        true
    }

    fn mask_address(&self, device: u32, like: &Address) -> Option<Address> {
        let addresses = self.flows.devices.get(&device)?;
        let address = if like.is_v4() { addresses.v4 } else { addresses.v6 };
        (!address.is_unspecified()).then_some(address)
    }

    fn clients_behind(&self, device: u32) -> ClientKind {
        self.flows.devices.get(&device).map_or(ClientKind::Outside, DeviceAddresses::clients)
    }

    fn shares_bridge(&self, device: u32, like: &Address) -> bool {
        self.flows.devices.get(&device).is_some_and(|addresses| {
            let bridged = if like.is_v4() { addresses.bridged_v4 } else { addresses.bridged_v6 };
            bridged != 0
        })
    }

    fn has_socket(&self, whole: &Conversation) -> bool {
        self.flows.sockets.contains(&(whole.mask, whole.mask_port))
    }

    fn masquerades_towards(&self, address: &Address, port: u16) -> bool {
        self.flows.masqueraded.borrow().contains(&masqueraded_index(address, port))
    }

    fn note_masqueraded(&self, address: &Address, port: u16) {
        self.flows.masqueraded.borrow_mut().insert(masqueraded_index(address, port));
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        self.flows.fragments.borrow().get(key).copied()
    }

    fn remember_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) {
        self.flows.fragments.borrow_mut().insert(*key, *ports);
    }

    fn count(&self, number: u32, forwarded: bool) {
        let mut counters = self.flows.counters.borrow_mut();
        let counters = counters.entry(number).or_default();
        if forwarded {
            counters.connections += 1;
        } else {
            counters.pass_through += 1;
        }
    }
}

fn key(packet: &PacketMeta, hook: Hook) -> FlowKey {
    let mut key = FlowKey::EMPTY;
    packet.write_key(hook, &mut key);
    key
}

fn entry(whole: &Conversation, role: Role) -> (FlowKey, Flow) {
    let (mut key, mut flow) = (FlowKey::EMPTY, Flow::EMPTY);
    whole.write_entry(role, &mut key, &mut flow);
    (key, flow)
}
