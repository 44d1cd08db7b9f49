//! The writes for the Services that changed: blocks, numbers, words, frontends and source ranges.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    sync::Arc,
};

use kproxy_common::{
    Address, Backend, BackendSlots, Block as BlockWord, Cidr, FrontendKey, NAME_LENGTH, Options,
    ServiceEntry, ServiceIdentity, ServiceInfo, Side, SourceRangeKey,
};

use super::{
    Block, Fate, Handover, Info, Op, PlanError, Planner, Port, Tables, Word, check, describe, error::flags,
};
use crate::wanted::{WantedBackend, WantedFrontend, WantedPort, WantedService, WantedSide};

/// Why a Service's writes are not in the plan.
pub(super) enum Obstacle {
    NeedsGrace,
    DoesNotFit(PlanError),
}

impl From<PlanError> for Obstacle {
    fn from(error: PlanError) -> Self {
        Self::DoesNotFit(error)
    }
}

impl Planner<'_> {
    /// Refuses what cannot be stored, and notes who wants which frontend and address.
    pub(super) fn claim(&mut self) {
        for index in 0..self.services.len() {
            let Some(wanted) = self.services[index].wanted else { continue };
            if let Err(error) = check::service(wanted).and_then(|()| self.claim_frontends(index, wanted)) {
                self.services[index].fate = Fate::Refused(error);
                continue;
            }
            for (address, _) in &wanted.addresses {
                self.address_claims.entry(*address).or_insert(index);
            }
        }
    }

    fn claim_frontends(&mut self, index: usize, wanted: &WantedService) -> Result<(), PlanError> {
        let frontends =
            || wanted.ports.iter().flat_map(|port| port.frontends.iter().map(move |f| (port, f.key)));
        for (place, (port, key)) in frontends().enumerate() {
            let other = match self.claims.entry(key) {
                Entry::Vacant(free) => {
                    free.insert(index);
                    continue;
                }
                Entry::Occupied(taken) => *taken.get(),
            };
            for (_, mine) in frontends().take(place) {
                self.claims.remove(&mine);
            }
            if other == index {
                let what = "a frontend occurs twice";
                return Err(PlanError::Inconsistent { port: port.name.clone(), what });
            }
            let other = self.services[other].key.to_string();
            return Err(PlanError::Claimed { frontend: describe(&key), other });
        }
        Ok(())
    }

    /// Plans each Service that wants something, all or nothing.
    pub(super) fn plan_services(&mut self) {
        for index in 0..self.services.len() {
            let candidate = &self.services[index];
            let Some(wanted) = candidate.wanted else { continue };
            if matches!(candidate.fate, Fate::Refused(_)) {
                continue;
            }
            let reserved = self.tables.reserved();
            self.before = self.writes.lengths();
            let fate = match self.plan_service(index, wanted) {
                Ok(()) => Fate::Planned,
                Err(obstacle) => {
                    self.writes.truncate(&self.before);
                    self.tables.release_reserved(reserved);
                    self.deferred.remove(&index);
                    match obstacle {
                        Obstacle::NeedsGrace => Fate::NeedsGrace,
                        Obstacle::DoesNotFit(error) => Fate::Short(error),
                    }
                }
            };
            self.services[index].fate = fate;
        }
    }

    /// A Service that does not fit is tried again after a grace period if this plan, or an earlier one, takes
    /// something out of use; else it is refused.
    pub(super) fn settle_shortages(&mut self) {
        if !self.services.iter().any(|candidate| matches!(candidate.fate, Fate::Short(_))) {
            return;
        }
        let mut frees = self.tables.needs_grace() || !self.writes.words.is_empty();
        frees |= (0..self.services.len()).any(|index| !self.unwanted_numbers(index).is_empty());
        for candidate in &mut self.services {
            if let Fate::Short(error) = &candidate.fate
                && !frees
            {
                candidate.fate = Fate::Refused(error.clone());
            }
        }
    }

    /// Deletes the frontends that a Service no longer wants, unless another one takes them.
    pub(super) fn plan_releases(&mut self) {
        for index in 0..self.services.len() {
            if !matches!(self.services[index].fate, Fate::Planned) {
                continue;
            }
            for (key, taker) in self.unwanted_numbers(index) {
                match taker.map(|taker| (taker, &self.services[taker].fate)) {
                    None | Some((_, Fate::Refused(_))) => {
                        self.writes.deleted_frontends.push(Op { party: index, write: key });
                    }
                    Some((taker, Fate::Planned)) => {
                        self.handovers.push(Handover { from: index, to: taker, what: describe(&key) });
                    }
                    Some((_, Fate::NeedsGrace | Fate::Short(_))) => {
                        self.deferred.insert(index);
                    }
                }
            }
            self.release_addresses(index);
        }
    }

    /// The frontends that this Service has and does not want, and which other Service wants them.
    fn unwanted_numbers(&self, index: usize) -> Vec<(FrontendKey, Option<usize>)> {
        let candidate = &self.services[index];
        if !matches!(candidate.fate, Fate::Planned) {
            return Vec::new();
        }
        self.tables
            .frontends_of(&candidate.key)
            .map(|key| (key, self.claims.get(&key).copied()))
            .filter(|(_, taker)| *taker != Some(index))
            .collect()
    }

    fn plan_service(&mut self, index: usize, wanted: &WantedService) -> Result<(), Obstacle> {
        for port in &wanted.ports {
            self.plan_port(index, wanted, port)?;
        }
        self.plan_addresses(index, wanted)
    }

    fn plan_port(
        &mut self,
        index: usize,
        service: &WantedService,
        wanted: &WantedPort,
    ) -> Result<(), Obstacle> {
        let Some(first) = wanted.frontends.first() else { return Ok(()) };
        let port = self.port(index, wanted, first.key.address().is_v4());
        let block = self.plan_block(index, wanted, &port)?;
        for frontend in &wanted.frontends {
            let words = words(wanted, frontend, &port, block);
            let info = Arc::new(info(service, wanted, frontend, self.now));
            match self.tables.number(&frontend.key) {
                Some(number) => {
                    self.plan_change(index, frontend, &port, number, words, info)?;
                }
                None => self.plan_new(index, frontend, &port, words, info)?,
            }
        }
        Ok(())
    }

    /// The Service port's identity: the one that it has, or a new one.
    fn port(&mut self, index: usize, wanted: &WantedPort, v4: bool) -> Arc<Port> {
        let service = &self.services[index].key;
        let owned = self.tables.services.get(service).map_or(&[][..], |owned| &owned.ports);
        let known = owned
            .iter()
            .filter_map(|id| self.tables.ports.get(id))
            .map(|record| &record.port)
            .find(|port| *port.name == *wanted.name && port.protocol == wanted.protocol && port.v4 == v4);
        if let Some(port) = known {
            return port.clone();
        }
        let id = self.tables.new_service_id();
        let (name, protocol) = (wanted.name.as_str().into(), wanted.protocol);
        Arc::new(Port { id, service: service.clone(), name, protocol, v4 })
    }

    /// The block with just these backends: one that is there, or a fresh one.
    fn plan_block(&mut self, index: usize, wanted: &WantedPort, port: &Port) -> Result<BlockWord, Obstacle> {
        let (in_sets, serving) = (wanted.in_sets, wanted.backends.len() as u16);
        if serving == 0 {
            return Ok(BlockWord::EMPTY);
        }
        let numbers = self.tables.ports.get(&port.id).map(|record| &record.numbers);
        let numbers: Vec<u32> = numbers
            .into_iter()
            .flatten()
            .copied()
            .filter(|number| self.tables.identity(*number).service() == port.id)
            .collect();
        // Affinity that was switched off has ended: clients of the time before are not bound when it comes back.
        let switched_on = wanted.affinity_timeout > 0
            && numbers.iter().any(|number| self.tables.identity(*number).affinity_timeout() == 0);
        let mut in_use: HashMap<(u32, u16), u16> = HashMap::new();
        for number in &numbers {
            let block = BlockWord::from_word(self.tables.words(*number)[Word::Block as usize]);
            if block.serving() > 0 {
                let known = in_use.entry((block.first_slot(), block.serving())).or_insert(u16::MAX);
                *known = block.in_sets().min(*known);
            }
        }
        let in_use: BTreeSet<_> =
            in_use.into_iter().map(|((first, serving), in_sets)| (first, in_sets, serving)).collect();
        let in_use: Vec<_> =
            in_use.into_iter().map(|(first, sets, all)| BlockWord::new(first, sets, all)).collect();
        let before = self.ids_before(&in_use, wanted, port);
        let blocks = if switched_on { &[] } else { in_use.as_slice() };
        if let Some(block) = blocks.iter().find(|block| self.holds(block, wanted, port)) {
            self.tables.slots.hold(block.first_slot());
            self.point_ids_at(index, block, &before);
            return Ok(BlockWord::new(block.first_slot(), in_sets, serving));
        }
        let no_room = |tables: &Tables| PlanError::NoRoom {
            needed: usize::from(serving),
            free: tables.slots.free(),
            longest: tables.slots.longest_free(),
            capacity: tables.capacity.backends,
            flag: flags::BACKENDS,
        };
        let Some(first_slot) = self.tables.slots.reserve(u32::from(serving)) else {
            return Err(no_room(self.tables).into());
        };
        let at = |backend: &WantedBackend| (backend.address, backend.port);
        let new = wanted.backends.iter().filter(|backend| !before.contains_key(&at(backend))).count();
        let Some(new) = self.tables.ids.reserve(new as u32) else {
            return Err(no_room(self.tables).into());
        };
        let mut new = new.into_iter();
        let joined = self.joined(blocks, port);
        let mut backends = Vec::with_capacity(wanted.backends.len());
        let mut backend_slots = Vec::with_capacity(wanted.backends.len());
        for ((place, backend), slot) in wanted.backends.iter().enumerate().zip(first_slot..) {
            let joined = match joined.get(&at(backend)) {
                _ if place >= usize::from(in_sets) => 0,
                Some(joined) => *joined,
                None => self.tables.new_joined(),
            };
            // As many were reserved as are needed.
            let known = before.get(&at(backend)).copied();
            let Some((id, previous)) = known.or_else(|| Some((new.next()?, slot))) else { continue };
            let WantedBackend { address, port: number, location, state } = *backend;
            backends.push(Backend::new(address, number, location, state, port.id, joined, id));
            backend_slots.push((id, BackendSlots::new(slot, previous)));
        }
        self.writes.backends.push(Op { party: index, write: Block { first_slot, backends } });
        self.writes.backend_slots.push(Op { party: index, write: backend_slots });
        Ok(BlockWord::new(first_slot, in_sets, serving))
    }

    /// The id of each backend that serves, and the slot in which words point at it. Where an agent was stopped between
    /// two blocks, either; but of a frontend that stays, before that of one that another Service is to take over.
    fn ids_before(
        &self,
        blocks: &[BlockWord],
        wanted: &WantedPort,
        port: &Port,
    ) -> HashMap<(Address, u16), (u32, u32)> {
        let block_of = |number| BlockWord::from_word(self.tables.words(number)[Word::Block as usize]);
        let numbers = wanted.frontends.iter().filter_map(|frontend| self.tables.number(&frontend.key));
        let staying: BTreeSet<u32> = numbers.map(|number| block_of(number).first_slot()).collect();
        let mut blocks: Vec<_> = blocks.iter().collect();
        blocks.sort_by_key(|block| !staying.contains(&block.first_slot()));
        let mut known = HashMap::new();
        for block in blocks {
            for slot in (block.first_slot()..).take(usize::from(block.serving())) {
                let Some(backend) = self.tables.backend(slot) else { continue };
                if backend.service() == port.id && self.tables.ids.is(slot, backend.id()) {
                    known.entry((backend.address(), backend.port())).or_insert((backend.id(), slot));
                }
            }
        }
        known
    }

    /// Words are going to point at this block, whose backends were written before: their ids must lead there.
    fn point_ids_at(
        &mut self,
        index: usize,
        block: &BlockWord,
        before: &HashMap<(Address, u16), (u32, u32)>,
    ) {
        let mut write = Vec::new();
        for slot in (block.first_slot()..).take(usize::from(block.serving())) {
            let Some(backend) = self.tables.backend(slot) else { continue };
            if !self.tables.ids.slots(backend.id()).contains(slot) {
                let previous =
                    before.get(&(backend.address(), backend.port())).map_or(slot, |(_, slot)| *slot);
                write.push((backend.id(), BackendSlots::new(slot, previous)));
            }
        }
        if !write.is_empty() {
            self.writes.backend_slots.push(Op { party: index, write });
        }
    }

    /// Whether a block that is in use holds just what is wanted. One from whose sets a backend that is wanted
    /// in them is missing does not: when it enters again it gets a new [`Backend::joined`].
    fn holds(&self, block: &BlockWord, wanted: &WantedPort, port: &Port) -> bool {
        if usize::from(block.serving()) != wanted.backends.len() || block.in_sets() < wanted.in_sets {
            return false;
        }
        wanted.backends.iter().enumerate().all(|(place, backend)| {
            self.tables.backend(block.first_slot().wrapping_add(place as u32)).is_some_and(|slot| {
                self.tables.ids.is(block.first_slot().wrapping_add(place as u32), slot.id())
                    && slot.is(port.id, &backend.address, backend.port)
                    && slot.location() == backend.location
                    && slot.state() == backend.state
                    && (place >= usize::from(wanted.in_sets) || slot.joined() != 0)
            })
        })
    }

    /// When each backend that is in the sets entered them. Where an agent was stopped between two blocks, only
    /// what both agree on counts: losing affinity is harmless, keeping it wrongly is not.
    fn joined(&self, blocks: &[BlockWord], port: &Port) -> HashMap<(Address, u16), u32> {
        let in_block = |block: &BlockWord| -> HashMap<(Address, u16), u32> {
            (0..u32::from(block.in_sets()))
                .filter_map(|offset| self.tables.backend(block.first_slot().wrapping_add(offset)))
                .filter(|backend| backend.service() == port.id && backend.joined() != 0)
                .map(|backend| ((backend.address(), backend.port()), backend.joined()))
                .collect()
        };
        let Some((first, rest)) = blocks.split_first() else { return HashMap::new() };
        let mut joined = in_block(first);
        for block in rest {
            let other = in_block(block);
            joined.retain(|backend, joined| other.get(backend) == Some(joined));
        }
        joined
    }

    fn plan_change(
        &mut self,
        index: usize,
        frontend: &WantedFrontend,
        port: &Arc<Port>,
        number: u32,
        words: [u64; 4],
        info: Arc<ServiceInfo>,
    ) -> Result<(), Obstacle> {
        let mut changed = self.plan_ranges(index, frontend, number)?;
        let current = self.tables.words(number);
        for word in Word::STORE_ORDER {
            let value = words[word as usize];
            if value != current[word as usize] {
                self.writes.words.push(Op { party: index, write: (number, word, value) });
                changed = true;
            }
        }
        let known = self.tables.info(number);
        changed |= known.is_none_or(|known| ServiceInfo { changed: info.changed, ..*known } != *info);
        changed |= self.tables.owner(number).is_none_or(|owner| owner.id != port.id);
        if changed {
            self.writes.infos.push(Op { party: index, write: Info { number, info, port: port.clone() } });
        }
        Ok(())
    }

    fn plan_new(
        &mut self,
        index: usize,
        frontend: &WantedFrontend,
        port: &Arc<Port>,
        words: [u64; 4],
        info: Arc<ServiceInfo>,
    ) -> Result<(), Obstacle> {
        let key = frontend.key;
        if self.tables.deleted.frontend || self.tables.leftovers.frontends.contains(&key) {
            return Err(Obstacle::NeedsGrace);
        }
        let in_map = self.tables.frontend.len() + self.tables.leftovers.frontends.len();
        let in_plan = self.writes.frontends.len();
        let capacity = self.tables.capacity.frontends;
        let room = in_map + in_plan < capacity as usize;
        let Some(number) = room.then(|| self.tables.reserve_number()).flatten() else {
            let free = (capacity as usize).saturating_sub(in_map + self.before.frontends);
            let (what, flag) = ("frontends", flags::FRONTENDS);
            return Err(PlanError::Full {
                what,
                needed: in_plan - self.before.frontends + 1,
                free,
                capacity,
                flag,
            }
            .into());
        };
        self.plan_ranges(index, frontend, number)?;
        self.writes.infos.push(Op { party: index, write: Info { number, info, port: port.clone() } });
        self.writes.counters.push(Op { party: index, write: number });
        self.writes.entries.push(Op { party: index, write: (number, entry(words)) });
        self.writes.frontends.push(Op { party: index, write: (key, number) });
        Ok(())
    }

    /// Ranges are there before a word asks for them, and until a grace period after none does any more. Those
    /// that go while others stay go with the change itself: afterwards nobody is let in who should not be.
    fn plan_ranges(
        &mut self,
        index: usize,
        frontend: &WantedFrontend,
        number: u32,
    ) -> Result<bool, Obstacle> {
        let asked = (frontend.inside.options | frontend.outside.options) & Options::SOURCE_RANGES != 0;
        let ranges = asked.then_some(&frontend.source_ranges).into_iter().flatten();
        let wanted: BTreeSet<SourceRangeKey> =
            ranges.map(|range| SourceRangeKey::new(number, &canonical(range))).collect();
        let mut changed = false;
        let stale: Vec<_> =
            self.tables.source_ranges(number).filter(|key| !wanted.contains(key)).copied().collect();
        if asked && !stale.is_empty() && !self.tables.asks_for_ranges(number) {
            // Left from a time before the word stopped asking, which a program may still hold: they would come
            // into force again.
            self.tables.retired_ranges.extend(stale);
            return Err(Obstacle::NeedsGrace);
        }
        for write in stale {
            if asked {
                self.writes.deleted_ranges.push(Op { party: index, write });
                changed = true;
            } else if !self.tables.retired_ranges.contains(&write) {
                self.writes.retired_ranges.push(Op { party: index, write });
                changed = true;
            }
        }
        for key in wanted {
            if self.tables.source_range.get(&number).is_some_and(|present| present.contains(&key)) {
                changed |= self.tables.retired_ranges.remove(&key);
                continue;
            }
            if self.tables.deleted.source_range {
                return Err(Obstacle::NeedsGrace);
            }
            let in_map = self.tables.source_range_count + self.before.source_ranges;
            let capacity = self.tables.capacity.source_ranges;
            let needed = self.writes.source_ranges.len() - self.before.source_ranges + 1;
            if in_map + needed > capacity as usize {
                let free = (capacity as usize).saturating_sub(in_map);
                let (what, flag) = ("source ranges", flags::SOURCE_RANGES);
                return Err(PlanError::Full { what, needed, free, capacity, flag }.into());
            }
            self.writes.source_ranges.push(Op { party: index, write: key });
            changed = true;
        }
        Ok(changed)
    }
}

fn words(port: &WantedPort, frontend: &WantedFrontend, identity: &Port, block: BlockWord) -> [u64; 4] {
    let side = |side: &WantedSide| {
        let first = if side.count == 0 { 0 } else { block.first_slot() + u32::from(side.offset) };
        Side::new(first, side.count, side.mode, side.options)
    };
    let identity = ServiceIdentity::new(identity.id, port.affinity_timeout);
    ServiceEntry { inside: side(&frontend.inside), outside: side(&frontend.outside), identity, block }
        .to_words()
}

fn entry(words: [u64; 4]) -> ServiceEntry {
    // The words were made from an entry just before.
    ServiceEntry::from_words(words).unwrap_or(ServiceEntry::UNUSED)
}

fn info(service: &WantedService, port: &WantedPort, frontend: &WantedFrontend, now: u64) -> ServiceInfo {
    let mut name = [0; NAME_LENGTH];
    let mut rest = &mut name[..NAME_LENGTH - 1];
    // That it fits was checked before.
    let _ = check::write_name(&mut rest, &service.key, &port.name);
    ServiceInfo {
        name,
        changed: now,
        frontend: frontend.key,
        frontend_kind: frontend.kind as u8,
        service_kind: service.kind as u8,
        traffic_policy: frontend.policy as u8,
        pass_through_rule: frontend.pass_through_rule as u8,
    }
}

/// The prefix without the bits that do not count: the kernel keeps them, and two that differ only there are
/// one element of the map.
fn canonical(range: &Cidr) -> Cidr {
    let length = range.prefix_length().min(128);
    let bits = u128::from_be_bytes(range.address().octets());
    let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
    Cidr::new(Address::new((bits & mask).to_be_bytes()), length)
}
