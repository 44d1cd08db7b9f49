//! Keeps the maps at what is wanted: plans what is due, runs it, takes the grace periods that it needs, and
//! tries again what failed.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::SystemTime,
};

use kproxy_common::Address;

use super::{
    Counts, MapWriter, Outcome, StepTime, execute,
    status::{Failure, Status, Statuses},
};
use crate::{
    plan::{Changes, Party, Plan, Tables, plan, settle},
    wanted::{ServiceKey, WantedService},
};

/// How often one run may wait for a grace period and plan the rest. Deleting something broken, replacing an
/// address and inserting after it take three rounds; what is still not done then waits for the next run.
const ROUNDS: u32 = 4;

/// The tables, and what is wanted of them and not done.
#[derive(Debug)]
pub struct Reconciler {
    tables: Tables,
    /// What is not done; `None`: to be removed.
    wanted: BTreeMap<ServiceKey, Option<WantedService>>,
    node_addresses: Option<BTreeSet<Address>>,
    /// The first full list has come and was not planned yet.
    complete: bool,
    status: Statuses,
}

/// What a run did.
#[derive(Clone, Default, Debug)]
pub struct Report {
    /// What failed, by whom it concerns. It is tried again.
    pub failed: Vec<(Party, String)>,
    /// What was written.
    pub counts: Counts,
    /// How often bpf(2) was called for that.
    pub calls: u64,
    /// How long each step took.
    pub times: Vec<StepTime>,
}

impl Reconciler {
    /// From the tables as they stand.
    pub fn new(tables: Tables) -> Self {
        Self {
            tables,
            wanted: BTreeMap::new(),
            node_addresses: None,
            complete: false,
            status: Statuses::default(),
        }
    }

    /// The tables as they stand.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The tables, without what is still wanted of them.
    pub fn into_tables(self) -> Tables {
        self.tables
    }

    /// How every Service fares.
    pub fn status(&self) -> &Statuses {
        &self.status
    }

    /// These Services changed; `None`: gone.
    pub fn want(&mut self, changes: BTreeMap<ServiceKey, Option<WantedService>>, now: SystemTime) {
        for (key, wanted) in changes {
            let status = Status::changed(self.status.service(&key), now);
            self.status.set(&key, status);
            self.wanted.insert(key, wanted);
        }
    }

    /// This is every Service that there is: whatever else the maps hold goes.
    pub fn want_all(&mut self, services: BTreeMap<ServiceKey, WantedService>, now: SystemTime) {
        let known = self.tables.services().chain(self.wanted.keys());
        let gone: Vec<_> = known.filter(|key| !services.contains_key(key)).cloned().collect();
        self.want(gone.into_iter().map(|key| (key, None)).collect(), now);
        self.want(services.into_iter().map(|(key, wanted)| (key, Some(wanted))).collect(), now);
        self.complete = true;
    }

    /// The node's addresses that answer NodePorts.
    pub fn want_node_addresses(&mut self, addresses: BTreeSet<Address>, now: SystemTime) {
        self.node_addresses = Some(addresses);
        self.status.node = Some(Status::changed(self.status.node.as_ref(), now));
    }

    /// Writes what is due. Afterwards, off the critical path, call [`Reconciler::settle`] if
    /// [`Tables::needs_grace`].
    pub fn run(&mut self, writer: &mut dyn MapWriter, now: SystemTime) -> Report {
        let mut report = Report::default();
        for round in 1..=ROUNDS {
            let due = self.take_due(now);
            let node_due = self.status.node.as_ref().is_some_and(|status| status.is_due(now));
            let node_addresses = self.node_addresses.as_ref().filter(|_| node_due);
            let complete = std::mem::take(&mut self.complete);
            if due.is_empty() && node_addresses.is_none() && !complete && round > 1 {
                break;
            }
            let seconds = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
            let changes = Changes { services: &due, node_addresses, complete, now: seconds };
            let plan = plan(&mut self.tables, &changes);
            let outcome = execute(&plan, &mut self.tables, writer);
            report.add(&outcome);
            self.note(&plan, outcome, due, &mut report, now);
            if plan.deferred.is_empty() || round == ROUNDS {
                break;
            }
            report.append(self.settle(writer, now));
        }
        report
    }

    /// Waits for a grace period if something needs one, and then frees and deletes what waited for it; for a
    /// second one if that deleted something. Services that failed for want of room are due afterwards.
    pub fn settle(&mut self, writer: &mut dyn MapWriter, now: SystemTime) -> Report {
        let mut report = Report::default();
        for _ in 0..2 {
            if !self.tables.needs_grace() || !report.failed.is_empty() {
                break;
            }
            let outcome = execute(&settle(&self.tables), &mut self.tables, writer);
            report.add(&outcome);
            let failures =
                outcome.results.into_iter().filter_map(|(party, result)| Some((party, result.err()?)));
            report.failed.extend(failures);
        }
        if report.counts.graces > 0 {
            self.status.room_was_made(now);
        }
        report
    }

    fn take_due(&mut self, now: SystemTime) -> BTreeMap<ServiceKey, Option<WantedService>> {
        let is_due = |key: &ServiceKey| self.status.service(key).is_none_or(|status| status.is_due(now));
        let mut due: Vec<_> = self.wanted.keys().filter(|key| is_due(key)).cloned().collect();
        if due.len() == self.wanted.len() {
            return std::mem::take(&mut self.wanted);
        }
        let mut taken = BTreeMap::new();
        while !due.is_empty() {
            let entries = due.into_iter().filter_map(|key| self.wanted.remove_entry(&key));
            let entries: Vec<_> = entries.collect();
            due = self.takers(&entries);
            taken.extend(entries);
        }
        taken
    }

    /// Who waits for another try, and takes over what one of these gives up: they are planned together, so that
    /// nothing is deleted that only changes hands.
    fn takers(&self, givers: &[(ServiceKey, Option<WantedService>)]) -> Vec<ServiceKey> {
        if self.wanted.is_empty() {
            return Vec::new();
        }
        let mut frontends = BTreeSet::new();
        let mut addresses = BTreeSet::new();
        for (key, wanted) in givers {
            frontends.extend(self.tables.frontends_of(key));
            addresses.extend(self.tables.addresses_of(key));
            for port in wanted.iter().flat_map(|wanted| &wanted.ports) {
                port.frontends.iter().for_each(|frontend| {
                    frontends.remove(&frontend.key);
                });
            }
            for (address, _) in wanted.iter().flat_map(|wanted| &wanted.addresses) {
                addresses.remove(address);
            }
        }
        let takes = |wanted: &WantedService| {
            wanted.addresses.iter().any(|(address, _)| addresses.contains(address))
                || wanted
                    .ports
                    .iter()
                    .flat_map(|port| &port.frontends)
                    .any(|frontend| frontends.contains(&frontend.key))
        };
        let waiting = self.wanted.iter();
        waiting.filter(|(_, wanted)| wanted.as_ref().is_some_and(takes)).map(|(key, _)| key.clone()).collect()
    }

    /// What became of each wish.
    fn note(
        &mut self,
        plan: &Plan,
        outcome: Outcome,
        mut due: BTreeMap<ServiceKey, Option<WantedService>>,
        report: &mut Report,
        now: SystemTime,
    ) {
        let mut failures: BTreeMap<Party, Failure> = BTreeMap::new();
        for (party, error) in &plan.refused {
            let failure = Failure {
                error: error.to_string(),
                retry: error.is_passing(),
                no_room: error.is_want_of_room(),
            };
            failures.insert(party.clone(), failure);
        }
        for (party, result) in outcome.results {
            let failure = match result {
                Ok(()) => failures.remove(&party),
                Err(error) => Some(Failure { error, retry: true, no_room: false }),
            };
            if let Some(failure) = &failure {
                report.failed.push((party.clone(), failure.error.clone()));
            }
            let again = plan.deferred.contains(&party);
            match party {
                Party::Service(key) => self.note_service(&key, &mut due, failure, again, now),
                Party::Node => {
                    let previous = self.status.node.take();
                    self.status.node = match failure {
                        Some(failure) => Some(Status::failed(previous.as_ref(), failure, now)),
                        None if again => Some(Status::changed(previous.as_ref(), now)),
                        None if self.node_addresses.is_none() => None,
                        None => Some(done(previous.as_ref(), now)),
                    };
                }
                // They are planned anew each time, as long as they are there: this says when there must be a next
                // time without any other reason. What is deferred waits for a Service, which has its own.
                Party::Leftovers => {
                    let previous = self.status.leftovers.take();
                    self.status.leftovers =
                        failure.map(|failure| Status::failed(previous.as_ref(), failure, now));
                }
            }
        }
    }

    fn note_service(
        &mut self,
        key: &ServiceKey,
        due: &mut BTreeMap<ServiceKey, Option<WantedService>>,
        failure: Option<Failure>,
        again: bool,
        now: SystemTime,
    ) {
        let previous = self.status.service(key);
        let status = match failure {
            Some(failure) => Status::failed(previous, failure, now),
            None if again => Status::changed(previous, now),
            None if due.get(key).is_none_or(Option::is_none) => {
                self.status.remove(key);
                return;
            }
            None => {
                let done = done(previous, now);
                self.status.set(key, done);
                return;
            }
        };
        self.status.set(key, status);
        let wanted = due.remove(key).flatten();
        self.wanted.insert(key.clone(), wanted);
    }
}

impl Report {
    fn add(&mut self, outcome: &Outcome) {
        self.counts.add(&outcome.counts);
        self.calls += outcome.calls;
        self.times.extend_from_slice(&outcome.times);
    }

    fn append(&mut self, other: Self) {
        self.counts.add(&other.counts);
        self.calls += other.calls;
        self.times.extend(other.times);
        self.failed.extend(other.failed);
    }
}

fn done(previous: Option<&Status>, now: SystemTime) -> Status {
    match previous {
        Some(Status::Done { since }) => Status::Done { since: *since },
        _ => Status::Done { since: now },
    }
}
