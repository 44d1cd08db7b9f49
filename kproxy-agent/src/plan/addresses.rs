//! The writes for addresses: those of Services, and those of the node.

use kproxy_common::AddressKind;

use super::{Fate, Handover, Op, PlanError, Planner, error::flags, services::Obstacle};
use crate::wanted::WantedService;

impl Planner<'_> {
    /// What an address is, is part of its element in a hash map: to become something else it is deleted, and
    /// inserted after a grace period.
    pub(super) fn plan_addresses(&mut self, index: usize, wanted: &WantedService) -> Result<(), Obstacle> {
        let mut again = false;
        for (address, kind) in &wanted.addresses {
            // Of two Services that want it, and of two wishes of one, the first counts.
            if self.address_claims.get(address) != Some(&index)
                || self.writes.addresses[self.before.addresses..].iter().any(|op| op.write.0 == *address)
            {
                continue;
            }
            match self.tables.address.get(address) {
                Some(record) if record.kind == Some(*kind) => {
                    if record.owner.as_ref() != Some(&self.services[index].key) {
                        self.writes.adopted_addresses.push(Op { party: index, write: *address });
                    }
                }
                Some(_) => {
                    if !self.writes.deleted_addresses[self.before.deleted_addresses..]
                        .iter()
                        .any(|op| op.write == *address)
                    {
                        self.writes.deleted_addresses.push(Op { party: index, write: *address });
                    }
                    again = true;
                }
                None => {
                    self.room_for_address()?;
                    self.writes.addresses.push(Op { party: index, write: (*address, *kind) });
                }
            }
        }
        if again {
            self.deferred.insert(index);
        }
        Ok(())
    }

    /// Deletes the addresses that a Service no longer wants, unless another one takes them.
    pub(super) fn release_addresses(&mut self, index: usize) {
        let Some(owned) = self.tables.services.get(&self.services[index].key) else { return };
        for address in &owned.addresses {
            match self.address_claims.get(address) {
                Some(taker) if *taker == index => {}
                Some(taker) if matches!(self.services[*taker].fate, Fate::Planned) => {
                    let what = address.to_string();
                    self.handovers.push(Handover { from: index, to: *taker, what });
                }
                Some(taker) if !matches!(self.services[*taker].fate, Fate::Refused(_)) => {
                    self.deferred.insert(index);
                }
                _ => {
                    self.writes.deleted_addresses.push(Op { party: index, write: *address });
                    self.released_addresses.insert(*address);
                }
            }
        }
    }

    /// Removes what was found in the maps at start and nobody wants.
    pub(super) fn plan_leftovers(&mut self) {
        let party = self.leftovers();
        let broken = &self.tables.leftovers.frontends;
        self.writes.deleted_frontends.extend(broken.iter().map(|key| Op { party, write: *key }));
        if !self.tables.complete {
            return;
        }
        for number in &self.tables.leftovers.numbers {
            let Some(key) = self.tables.numbers[*number as usize].frontend else { continue };
            match self.claims.get(&key).map(|index| &self.services[*index].fate) {
                Some(Fate::Planned) => {}
                Some(Fate::NeedsGrace | Fate::Short(_)) => {
                    self.deferred.insert(party);
                }
                Some(Fate::Refused(_)) | None => {
                    self.writes.deleted_frontends.push(Op { party, write: key });
                }
            }
        }
        for address in &self.tables.leftovers.addresses {
            match self.address_claims.get(address).map(|index| &self.services[*index].fate) {
                Some(Fate::Planned) => {}
                Some(Fate::NeedsGrace | Fate::Short(_)) => {
                    self.deferred.insert(party);
                }
                Some(Fate::Refused(_)) | None => {
                    self.writes.deleted_addresses.push(Op { party, write: *address });
                    self.released_addresses.insert(*address);
                }
            }
        }
    }

    /// The node's addresses. What a Service wants an address to be comes first.
    pub(super) fn plan_node(&mut self) {
        let Some(wanted) = self.tables.node_wanted.take() else { return };
        self.before = self.writes.lengths();
        let party = self.node();
        let claimed = |index: &usize| matches!(self.services[*index].fate, Fate::Planned);
        for address in self.tables.node_present.difference(&wanted) {
            if !self.address_claims.get(address).is_some_and(claimed) {
                self.writes.deleted_addresses.push(Op { party, write: *address });
            }
        }
        for address in wanted.difference(&self.tables.node_present) {
            if self
                .address_claims
                .get(address)
                .is_some_and(|index| !matches!(self.services[*index].fate, Fate::Refused(_)))
            {
                continue;
            }
            if self.tables.address.contains_key(address) {
                if self.released_addresses.contains(address) {
                    self.deferred.insert(party);
                }
                continue;
            }
            match self.room_for_address() {
                Ok(()) => self.writes.addresses.push(Op { party, write: (*address, AddressKind::NodePort) }),
                Err(Obstacle::NeedsGrace) => {
                    self.deferred.insert(party);
                }
                Err(Obstacle::DoesNotFit(error)) => self.node_refused = Some(error),
            }
        }
        self.tables.node_wanted = Some(wanted);
    }

    fn room_for_address(&self) -> Result<(), Obstacle> {
        if self.tables.deleted.address {
            return Err(Obstacle::NeedsGrace);
        }
        let in_map = self.tables.address.len() + self.before.addresses;
        let needed = self.writes.addresses.len() - self.before.addresses + 1;
        let capacity = self.tables.capacity.addresses;
        if in_map + needed <= capacity as usize {
            return Ok(());
        }
        let (what, flag) = ("addresses", flags::ADDRESSES);
        let free = (capacity as usize).saturating_sub(in_map);
        Err(PlanError::Full { what, needed, free, capacity, flag }.into())
    }
}
