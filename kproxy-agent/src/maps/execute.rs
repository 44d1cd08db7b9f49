//! Runs a plan: every write in its order, and what came of it into the tables.

use std::time::{Duration, Instant};

use kproxy_common::ServiceEntry;

use super::{MapWriter, WriteError};
use crate::plan::{Op, Party, Plan, Reserved, Step, Tables};

/// What came of a plan.
#[derive(Clone, Default, Debug)]
pub struct Outcome {
    /// Of each party, whether its writes were all made; else why not. What was written stands, also for those
    /// that failed.
    pub results: Vec<(Party, Result<(), String>)>,
    /// What was written.
    pub counts: Counts,
    /// How often bpf(2) was called for that.
    pub calls: u64,
    /// How long each step took, in their order.
    pub times: Vec<StepTime>,
}

/// How many elements were written, by map.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Slots of `backend`.
    pub backends: u64,
    /// Elements of `backend_slot`.
    pub backend_slots: u64,
    /// Elements of `service_info`.
    pub infos: u64,
    /// Words of `service`; four for a whole entry.
    pub words: u64,
    /// Elements of `counter`.
    pub counters: u64,
    /// Insertions into and deletions from `frontend`.
    pub frontends: u64,
    /// Insertions into and deletions from `address`.
    pub addresses: u64,
    /// Insertions into and deletions from `source_range`.
    pub source_ranges: u64,
    /// Grace periods.
    pub graces: u64,
}

impl Counts {
    /// All writes; grace periods are none.
    pub fn writes(&self) -> u64 {
        let Self {
            backends,
            backend_slots,
            infos,
            words,
            counters,
            frontends,
            addresses,
            source_ranges,
            graces: _,
        } = self;
        backends + backend_slots + infos + words + counters + frontends + addresses + source_ranges
    }

    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        let Self {
            backends,
            backend_slots,
            infos,
            words,
            counters,
            frontends,
            addresses,
            source_ranges,
            graces,
        } = other;
        self.backends += backends;
        self.backend_slots += backend_slots;
        self.infos += infos;
        self.words += words;
        self.counters += counters;
        self.frontends += frontends;
        self.addresses += addresses;
        self.source_ranges += source_ranges;
        self.graces += graces;
    }
}

/// How long a step took.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StepTime {
    /// Which.
    pub step: &'static str,
    /// How long.
    pub time: Duration,
}

/// Makes the writes of `plan` and brings `tables` up to date with what was written. A write that fails ends
/// that party's writes; the rest goes on.
pub fn execute(plan: &Plan, tables: &mut Tables, writer: &mut dyn MapWriter) -> Outcome {
    let calls = writer.calls();
    let mut run =
        Run { plan, tables, writer, failed: vec![None; plan.parties.len()], counts: Counts::default() };
    let mut times = Vec::with_capacity(plan.steps.len());
    for step in &plan.steps {
        let start = Instant::now();
        let go_on = run.step(step);
        times.push(StepTime { step: name(step), time: start.elapsed() });
        if !go_on {
            break;
        }
    }
    run.check_handovers();
    run.tables.release_reserved(Reserved::default());
    let Run { failed, counts, writer, .. } = run;
    let results = plan.parties.iter().cloned().zip(failed);
    let results = results.map(|(party, error)| (party, error.map_or(Ok(()), Err))).collect();
    Outcome { results, counts, calls: writer.calls() - calls, times }
}

struct Run<'a> {
    plan: &'a Plan,
    tables: &'a mut Tables,
    writer: &'a mut dyn MapWriter,
    /// Of each party, the first error.
    failed: Vec<Option<String>>,
    counts: Counts,
}

impl Run<'_> {
    /// Makes the writes of one step; whether the plan goes on after it.
    fn step(&mut self, step: &Step) -> bool {
        match step {
            Step::WriteBackends(ops) => self.each(ops, |run, _, block| {
                run.writer.write_backends(block.first_slot, &block.backends)?;
                run.tables.wrote_backends(block.first_slot, &block.backends);
                run.counts.backends += block.backends.len() as u64;
                Ok(())
            }),
            Step::StoreBackendSlots(ops) => self.each(ops, |run, _, slots| {
                for (backend, slots) in slots {
                    run.writer.store_backend_slots(*backend, *slots)?;
                    run.tables.stored_backend_slots(*backend, *slots);
                    run.counts.backend_slots += 1;
                }
                Ok(())
            }),
            Step::WriteInfos(ops) => self.each(ops, |run, _, write| {
                run.writer.write_info(write.number, &write.info)?;
                run.tables.wrote_info(write.number, &write.info, &write.port);
                run.counts.infos += 1;
                Ok(())
            }),
            Step::WriteEntries(ops) => {
                self.each(ops, |run, _, (number, entry)| run.write_entry(*number, entry))
            }
            Step::StoreWords(ops) => self.each(ops, |run, _, (number, word, value)| {
                run.writer.store_word(*number, *word, *value)?;
                run.tables.stored_word(*number, *word, *value);
                run.counts.words += 1;
                Ok(())
            }),
            Step::FreeNumbers(ops) => self.each(ops, |run, _, number| {
                // The next frontend with this number would inherit what could not be deleted.
                if run.tables.source_ranges(*number).next().is_some() {
                    return Ok(());
                }
                run.write_entry(*number, &ServiceEntry::UNUSED)
            }),
            Step::AdoptAddresses(ops) => self.each(ops, |run, party, address| {
                run.tables.owns_address(*address, run.plan.parties[party].service());
                Ok(())
            }),
            Step::RetireSourceRanges(ops) => self.each(ops, |run, _, key| {
                run.tables.retired_source_range(*key);
                Ok(())
            }),
            Step::ResetCounters(ops) => self.batch(
                ops,
                |writer, writes| writer.reset_counters(writes),
                |run, _, _| {
                    run.counts.counters += 1;
                },
            ),
            Step::InsertFrontends(ops) => self.batch(
                ops,
                |writer, writes| writer.insert_frontends(writes),
                |run, _, (key, number)| {
                    run.tables.inserted_frontend(key, number);
                    run.counts.frontends += 1;
                },
            ),
            Step::DeleteFrontends(ops) => self.batch(
                ops,
                |writer, writes| writer.delete_frontends(writes),
                |run, _, key| {
                    run.tables.deleted_frontend(&key);
                    run.counts.frontends += 1;
                },
            ),
            Step::InsertAddresses(ops) => {
                self.batch(
                    ops,
                    |writer, writes| writer.insert_addresses(writes),
                    |run, party, (address, kind)| {
                        run.tables.inserted_address(address, kind, run.plan.parties[party].service());
                        run.counts.addresses += 1;
                    },
                );
            }
            Step::DeleteAddresses(ops) => self.batch(
                ops,
                |writer, writes| writer.delete_addresses(writes),
                |run, _, address| {
                    run.tables.deleted_address(&address);
                    run.counts.addresses += 1;
                },
            ),
            Step::InsertSourceRanges(ops) => self.batch(
                ops,
                |writer, writes| writer.insert_source_ranges(writes),
                |run, _, key| {
                    run.tables.inserted_source_range(key);
                    run.counts.source_ranges += 1;
                },
            ),
            Step::DeleteSourceRanges(ops) => self.batch(
                ops,
                |writer, writes| writer.delete_source_ranges(writes),
                |run, _, key| {
                    run.tables.deleted_source_range(&key);
                    run.counts.source_ranges += 1;
                },
            ),
            Step::Grace => return self.grace(),
        }
        true
    }

    /// One call for each write. A party's first failure ends its writes.
    fn each<T>(&mut self, ops: &[Op<T>], write: impl Fn(&mut Self, usize, &T) -> Result<(), WriteError>) {
        for op in ops {
            if self.may_write(op.party)
                && let Err(error) = write(self, op.party, &op.write)
            {
                self.fail(op.party, error.to_string());
            }
        }
    }

    /// One call for all writes.
    fn batch<T: Copy>(
        &mut self,
        ops: &[Op<T>],
        write: impl Fn(&mut (dyn MapWriter + '_), &[T]) -> Vec<Result<(), WriteError>>,
        done: impl Fn(&mut Self, usize, T),
    ) {
        let ops: Vec<&Op<T>> = ops.iter().filter(|op| self.may_write(op.party)).collect();
        if ops.is_empty() {
            return;
        }
        let writes: Vec<T> = ops.iter().map(|op| op.write).collect();
        let results = write(&mut *self.writer, &writes);
        for (op, result) in ops.into_iter().zip(results) {
            match result {
                Ok(()) => done(self, op.party, op.write),
                Err(error) => self.fail(op.party, error.to_string()),
            }
        }
    }

    fn write_entry(&mut self, number: u32, entry: &ServiceEntry) -> Result<(), WriteError> {
        self.writer.write_entry(number, entry)?;
        self.tables.wrote_entry(number, entry);
        self.counts.words += 4;
        Ok(())
    }

    /// Whatever follows relies on it.
    fn grace(&mut self) -> bool {
        match self.writer.grace() {
            Ok(()) => {
                self.tables.grace_passed();
                self.counts.graces += 1;
                true
            }
            Err(error) => {
                for party in 0..self.failed.len() {
                    self.fail(party, error.to_string());
                }
                false
            }
        }
    }

    /// Leftovers have nothing to do with each other.
    fn may_write(&self, party: usize) -> bool {
        self.failed[party].is_none() || self.plan.parties[party] == Party::Leftovers
    }

    fn fail(&mut self, party: usize, error: String) {
        self.failed[party].get_or_insert(error);
    }

    /// Who gives something up is not done while the one who takes it has not got it.
    fn check_handovers(&mut self) {
        for handover in &self.plan.handovers {
            if self.failed[handover.to].is_some() {
                let taker = &self.plan.parties[handover.to];
                let error = format!("{} goes to {taker}, whose writes failed", handover.what);
                self.fail(handover.from, error);
            }
        }
    }
}

fn name(step: &Step) -> &'static str {
    match step {
        Step::WriteBackends(_) => "write backends",
        Step::StoreBackendSlots(_) => "store backend slots",
        Step::WriteInfos(_) => "write service infos",
        Step::ResetCounters(_) => "reset counters",
        Step::InsertSourceRanges(_) => "insert source ranges",
        Step::WriteEntries(_) => "write service entries",
        Step::StoreWords(_) => "store words",
        Step::InsertFrontends(_) => "insert frontends",
        Step::InsertAddresses(_) => "insert addresses",
        Step::AdoptAddresses(_) => "adopt addresses",
        Step::RetireSourceRanges(_) => "retire source ranges",
        Step::DeleteFrontends(_) => "delete frontends",
        Step::DeleteAddresses(_) => "delete addresses",
        Step::Grace => "grace period",
        Step::DeleteSourceRanges(_) => "delete source ranges",
        Step::FreeNumbers(_) => "free numbers",
    }
}
