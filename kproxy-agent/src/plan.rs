//! From what Services want to the writes that bring it about. Pure: the same tables and the same wish give the
//! same plan.
//!
//! The rules that make every prefix of a plan safe for programs that read meanwhile:
//!
//! - Backends are written only into slots that no word points at, before any word does.
//! - A backend's id names the slot in which it was just written and the one that words point at still, until the
//!   next change: whoever looks for it finds it, whichever word he has read.
//! - What changes under a number changes by single stores of 64-bit words, each of which is a whole truth.
//! - Hash maps are inserted into and deleted from, never replaced: inserts first, deletes last.
//! - What was taken out of use (numbers, slots, source ranges that nothing asks for) is used again, or deleted,
//!   only after a grace period; so is a hash map that had deletions, before its next insert. [`settle`] plans what
//!   follows one.
//! - A source range that a frontend loses while it keeps others goes at once: who was let in by it alone is not
//!   to be let in by a program that runs now either.
//!
//! A number belongs to its frontend as long as that exists, also when the frontend moves to another Service.

mod addresses;
mod backend_ids;
mod check;
mod error;
mod restore;
mod services;
mod slots;
mod spans;
mod tables;
mod view;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use kproxy_common::{
    Address, AddressKind, Backend, BackendSlots, FrontendKey, ServiceEntry, ServiceInfo, SourceRangeKey,
};

pub use self::{
    error::PlanError,
    restore::{Snapshot, restore, split_name},
    slots::Word,
    tables::{Capacity, Port, Tables},
    view::View,
};
pub(crate) use self::{restore::describe, tables::Reserved};
use crate::wanted::{ServiceKey, WantedService};

/// What changed in what is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Changes<'a> {
    /// The Services that changed; `None`: gone. A frontend that moves between two of them keeps its number.
    pub services: &'a BTreeMap<ServiceKey, Option<WantedService>>,
    /// The node's addresses that answer NodePorts, if they changed.
    pub node_addresses: Option<&'a BTreeSet<Address>>,
    /// `services` is the complete list: everything else in the tables is to be removed.
    pub complete: bool,
    /// Seconds since 1970.
    pub now: u64,
}

/// Writes, in the order in which they must be made.
#[derive(Clone, Default, Debug)]
pub struct Plan {
    /// Who wants the writes; [`Op::party`] is a place in here.
    pub parties: Vec<Party>,
    /// The writes.
    pub steps: Vec<Step>,
    /// Who is left as they are, and why.
    pub refused: Vec<(Party, PlanError)>,
    /// Whose wishes are not, or not wholly, in this plan, because a grace period must pass first: run this
    /// plan, then [`settle`], then plan the same for these again.
    pub deferred: BTreeSet<Party>,
    /// Frontends and addresses that change hands. Where the taker's writes fail, the giver still has them.
    pub handovers: Vec<Handover>,
}

/// On whose behalf something is written.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Party {
    /// A Service.
    Service(Arc<ServiceKey>),
    /// The node: its addresses.
    Node,
    /// Nobody: what was found in the maps and belongs to no one.
    Leftovers,
}

impl Party {
    /// The Service, if it is one.
    pub fn service(&self) -> Option<Arc<ServiceKey>> {
        match self {
            Self::Service(key) => Some(key.clone()),
            Self::Node | Self::Leftovers => None,
        }
    }
}

impl std::fmt::Display for Party {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Service(key) => key.fmt(f),
            Self::Node => f.write_str("the node's addresses"),
            Self::Leftovers => f.write_str("leftovers of an earlier agent"),
        }
    }
}

/// One write, and for whom. If it fails, that party's later writes must not be made.
#[derive(Clone, Debug)]
pub struct Op<T> {
    /// Place in [`Plan::parties`].
    pub party: usize,
    /// What to write.
    pub write: T,
}

/// Writes of one kind, which may be made in any order or at once.
#[derive(Clone, Debug)]
pub enum Step {
    /// Backends into slots that nothing points at.
    WriteBackends(Vec<Op<Block>>),
    /// Where backends stand, of the slots just written and, for who has read before, of those that they stood in.
    StoreBackendSlots(Vec<Op<Vec<(u32, BackendSlots)>>>),
    /// Whose number it is: new numbers, and numbers that change hands or get another entry.
    WriteInfos(Vec<Op<Info>>),
    /// Counters of new numbers to zero.
    ResetCounters(Vec<Op<u32>>),
    /// Source ranges, before an entry asks for them.
    InsertSourceRanges(Vec<Op<SourceRangeKey>>),
    /// Entries of new numbers.
    WriteEntries(Vec<Op<(u32, ServiceEntry)>>),
    /// Words of entries in use; those of one number in this order.
    StoreWords(Vec<Op<(u32, Word, u64)>>),
    /// Frontends, whose numbers are complete now.
    InsertFrontends(Vec<Op<(FrontendKey, u32)>>),
    /// Addresses.
    InsertAddresses(Vec<Op<(Address, AddressKind)>>),
    /// Addresses that stand already and have another owner from now on. Nothing is written.
    AdoptAddresses(Vec<Op<Address>>),
    /// Source ranges that no entry asks for any more. Nothing is written: they are deleted after a grace period.
    RetireSourceRanges(Vec<Op<SourceRangeKey>>),
    /// Frontends that nobody wants.
    DeleteFrontends(Vec<Op<FrontendKey>>),
    /// Addresses that nobody wants, or that must become something else.
    DeleteAddresses(Vec<Op<Address>>),
    /// Wait until no program holds anything that it read before.
    Grace,
    /// Source ranges that no program asks for any more, or whose clients are not let in any more.
    DeleteSourceRanges(Vec<Op<SourceRangeKey>>),
    /// Entries of numbers without a frontend to unused: the numbers are free then.
    FreeNumbers(Vec<Op<u32>>),
}

/// A run of slots.
#[derive(Clone, Debug)]
pub struct Block {
    /// Where it begins.
    pub first_slot: u32,
    /// What is written there.
    pub backends: Vec<Backend>,
}

/// Value of `service_info`, and the owner that it names.
#[derive(Clone, Debug)]
pub struct Info {
    /// Where.
    pub number: u32,
    /// What.
    pub info: Arc<ServiceInfo>,
    /// Whose number it is from then on.
    pub port: Arc<Port>,
}

/// Something passes from one Service to another.
#[derive(Clone, Debug)]
pub struct Handover {
    /// Who gives it up; place in [`Plan::parties`].
    pub from: usize,
    /// Who takes it.
    pub to: usize,
    /// What, for people.
    pub what: String,
}

impl Plan {
    /// Whether nothing would be written and nothing waits.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.refused.is_empty() && self.deferred.is_empty()
    }
}

/// Plans how to get from `tables` to what `changes` want. Numbers and slots that the plan uses are reserved in
/// `tables` until the plan was executed, or the next one is made.
pub fn plan(tables: &mut Tables, changes: &Changes<'_>) -> Plan {
    tables.release_reserved(Reserved::default());
    if let Some(addresses) = changes.node_addresses {
        tables.node_wanted = Some(addresses.clone());
    }
    tables.complete |= changes.complete;
    let mut planner = Planner::new(tables, changes);
    planner.claim();
    planner.plan_services();
    planner.settle_shortages();
    planner.plan_releases();
    planner.plan_leftovers();
    planner.plan_node();
    planner.finish()
}

/// Plans what can be done once a grace period has passed: what was taken out of use is free again. Worth
/// doing soon after each run in which [`Tables::needs_grace`] holds, off the critical path.
pub fn settle(tables: &Tables) -> Plan {
    if !tables.needs_grace() {
        return Plan::default();
    }
    let op = |write| Op { party: 0, write };
    let ranges = tables.retired_ranges.iter().copied().map(op).collect::<Vec<_>>();
    let op = |write| Op { party: 0, write };
    let numbers = tables.retired_numbers.iter().copied().map(op).collect::<Vec<_>>();
    let mut plan = Plan { parties: vec![Party::Leftovers], steps: vec![Step::Grace], ..Plan::default() };
    if !ranges.is_empty() {
        plan.steps.push(Step::DeleteSourceRanges(ranges));
    }
    if !numbers.is_empty() {
        plan.steps.push(Step::FreeNumbers(numbers));
    }
    plan
}

/// The state of one call of [`plan`].
struct Planner<'a> {
    tables: &'a mut Tables,
    now: u64,
    services: Vec<Candidate<'a>>,
    /// Which of `services` wants a frontend, or an address.
    claims: HashMap<FrontendKey, usize>,
    address_claims: HashMap<Address, usize>,
    writes: Writes,
    /// How long these were before the Service that is being planned.
    before: Lengths,
    deferred: BTreeSet<usize>,
    handovers: Vec<Handover>,
    released_addresses: BTreeSet<Address>,
    node_refused: Option<PlanError>,
}

impl<'a> Planner<'a> {
    fn new(tables: &'a mut Tables, changes: &Changes<'a>) -> Self {
        let mut services = Vec::with_capacity(changes.services.len());
        for (key, wanted) in changes.services {
            let known = tables.services.get_key_value(key).map(|(key, _)| key.clone());
            let key = known.unwrap_or_else(|| Arc::new(key.clone()));
            services.push(Candidate { key, wanted: wanted.as_ref(), fate: Fate::Planned });
        }
        if changes.complete {
            let gone = tables.services.keys().filter(|key| !changes.services.contains_key(key.as_ref()));
            let mut gone: Vec<_> = gone.cloned().collect();
            gone.sort_unstable();
            services.extend(gone.into_iter().map(|key| Candidate { key, wanted: None, fate: Fate::Planned }));
        }
        Self {
            tables,
            now: changes.now,
            services,
            claims: HashMap::new(),
            address_claims: HashMap::new(),
            writes: Writes::default(),
            before: Lengths::default(),
            deferred: BTreeSet::new(),
            handovers: Vec::new(),
            released_addresses: BTreeSet::new(),
            node_refused: None,
        }
    }

    /// The parties of the plan: the Services in their order, then these two.
    fn node(&self) -> usize {
        self.services.len()
    }

    fn leftovers(&self) -> usize {
        self.services.len() + 1
    }

    fn finish(self) -> Plan {
        let mut deferred = self.deferred;
        let mut refused = Vec::new();
        let mut parties = Vec::with_capacity(self.services.len() + 2);
        for (index, candidate) in self.services.into_iter().enumerate() {
            match candidate.fate {
                Fate::Planned => {}
                Fate::NeedsGrace | Fate::Short(_) => {
                    deferred.insert(index);
                }
                Fate::Refused(error) => refused.push((Party::Service(candidate.key.clone()), error)),
            }
            parties.push(Party::Service(candidate.key));
        }
        refused.extend(self.node_refused.map(|error| (Party::Node, error)));
        parties.push(Party::Node);
        parties.push(Party::Leftovers);
        let deferred = deferred.into_iter().map(|index| parties[index].clone()).collect();
        Plan { parties, steps: self.writes.into_steps(), refused, deferred, handovers: self.handovers }
    }
}

/// A Service that changed, and what became of its change in this plan.
struct Candidate<'a> {
    key: Arc<ServiceKey>,
    wanted: Option<&'a WantedService>,
    fate: Fate,
}

enum Fate {
    /// Its writes are in the plan.
    Planned,
    /// It needs an insert into a map that had deletions: first a grace period.
    NeedsGrace,
    /// It does not fit now, but may after a grace period.
    Short(PlanError),
    /// It does not fit.
    Refused(PlanError),
}

/// How long each list of [`Writes`] is.
#[derive(Clone, Copy, Default)]
struct Lengths {
    backends: usize,
    backend_slots: usize,
    infos: usize,
    counters: usize,
    source_ranges: usize,
    entries: usize,
    words: usize,
    frontends: usize,
    addresses: usize,
    adopted_addresses: usize,
    retired_ranges: usize,
    deleted_ranges: usize,
    deleted_frontends: usize,
    deleted_addresses: usize,
}

/// The writes of a plan by their step.
#[derive(Default)]
struct Writes {
    backends: Vec<Op<Block>>,
    backend_slots: Vec<Op<Vec<(u32, BackendSlots)>>>,
    infos: Vec<Op<Info>>,
    counters: Vec<Op<u32>>,
    source_ranges: Vec<Op<SourceRangeKey>>,
    entries: Vec<Op<(u32, ServiceEntry)>>,
    words: Vec<Op<(u32, Word, u64)>>,
    frontends: Vec<Op<(FrontendKey, u32)>>,
    addresses: Vec<Op<(Address, AddressKind)>>,
    adopted_addresses: Vec<Op<Address>>,
    retired_ranges: Vec<Op<SourceRangeKey>>,
    deleted_ranges: Vec<Op<SourceRangeKey>>,
    deleted_frontends: Vec<Op<FrontendKey>>,
    deleted_addresses: Vec<Op<Address>>,
}

impl Writes {
    fn lengths(&self) -> Lengths {
        Lengths {
            backends: self.backends.len(),
            backend_slots: self.backend_slots.len(),
            infos: self.infos.len(),
            counters: self.counters.len(),
            source_ranges: self.source_ranges.len(),
            entries: self.entries.len(),
            words: self.words.len(),
            frontends: self.frontends.len(),
            addresses: self.addresses.len(),
            adopted_addresses: self.adopted_addresses.len(),
            retired_ranges: self.retired_ranges.len(),
            deleted_ranges: self.deleted_ranges.len(),
            deleted_frontends: self.deleted_frontends.len(),
            deleted_addresses: self.deleted_addresses.len(),
        }
    }

    /// Forgets what was added since the lists had these lengths.
    fn truncate(&mut self, lengths: &Lengths) {
        let Lengths {
            backends,
            backend_slots,
            infos,
            counters,
            source_ranges,
            entries,
            words,
            frontends,
            addresses,
            adopted_addresses,
            retired_ranges,
            deleted_ranges,
            deleted_frontends,
            deleted_addresses,
        } = *lengths;
        self.backends.truncate(backends);
        self.backend_slots.truncate(backend_slots);
        self.infos.truncate(infos);
        self.counters.truncate(counters);
        self.source_ranges.truncate(source_ranges);
        self.entries.truncate(entries);
        self.words.truncate(words);
        self.frontends.truncate(frontends);
        self.addresses.truncate(addresses);
        self.adopted_addresses.truncate(adopted_addresses);
        self.retired_ranges.truncate(retired_ranges);
        self.deleted_ranges.truncate(deleted_ranges);
        self.deleted_frontends.truncate(deleted_frontends);
        self.deleted_addresses.truncate(deleted_addresses);
    }

    /// In the order that the module's description demands.
    fn into_steps(self) -> Vec<Step> {
        let mut steps = Vec::new();
        push(&mut steps, self.backends, Step::WriteBackends);
        push(&mut steps, self.backend_slots, Step::StoreBackendSlots);
        push(&mut steps, self.infos, Step::WriteInfos);
        push(&mut steps, self.counters, Step::ResetCounters);
        push(&mut steps, self.source_ranges, Step::InsertSourceRanges);
        push(&mut steps, self.entries, Step::WriteEntries);
        push(&mut steps, self.words, Step::StoreWords);
        // Frontends before addresses: an address alone refuses every port.
        push(&mut steps, self.frontends, Step::InsertFrontends);
        push(&mut steps, self.addresses, Step::InsertAddresses);
        push(&mut steps, self.adopted_addresses, Step::AdoptAddresses);
        push(&mut steps, self.retired_ranges, Step::RetireSourceRanges);
        push(&mut steps, self.deleted_ranges, Step::DeleteSourceRanges);
        push(&mut steps, self.deleted_frontends, Step::DeleteFrontends);
        push(&mut steps, self.deleted_addresses, Step::DeleteAddresses);
        steps
    }
}

fn push<T>(steps: &mut Vec<Step>, ops: Vec<Op<T>>, step: impl FnOnce(Vec<Op<T>>) -> Step) {
    if !ops.is_empty() {
        steps.push(step(ops));
    }
}
