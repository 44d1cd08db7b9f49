//! A case once more, through the planner and into maps in memory, of which single writes fail.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use kproxy::maps::Reconciler;
use kproxy::maps::memory::{Fail, Memory};
use kproxy::maps::status::Status;
use kproxy::model::{Model, Update};
use kproxy::plan::{Capacity, Tables, Word};
use kproxy_common::{Address, AddressKind, Block, ServiceIdentity, Side};

use super::input::{Case, Event};

/// Room for every case.
pub const CAPACITY: Capacity =
    Capacity { frontends: 256, backends: 1_024, addresses: 256, source_ranges: 256 };

/// Longer than any pause before another try.
const PAUSE: Duration = Duration::from_secs(120);

/// With no write failing the maps hold what is wanted after each step, and nothing after all objects are gone; with
/// any single write failing, the same once it was tried again. Returns how many writes were made to fail.
pub fn check(case: &Case) -> Result<u64> {
    let updates = updates(case);
    let mut sound = Written::new();
    let tables: Vec<String> = updates.iter().map(|update| sound.take(update)).collect::<Result<_>>()?;
    sound.ensure_empty()?;
    for failing in 0..sound.memory.attempts() {
        let mut written = Written::new();
        written.memory.fail = Fail::Nth(failing);
        for (number, (update, expected)) in updates.iter().zip(&tables).enumerate() {
            let is = written.take(update)?;
            ensure!(
                is == *expected,
                "write {failing} failed, and after update {} the maps hold\n{is}instead of\n{expected}",
                number + 1
            );
        }
        ensure!(written.memory.attempts() > failing, "write {failing} was never tried");
        written.ensure_empty()?;
    }
    Ok(sound.memory.attempts())
}

/// What the model says of each step, and then of the objects that go, the first to come first.
fn updates(case: &Case) -> Vec<Update> {
    let mut model = Model::new(case.config.clone());
    let steps = case.steps.iter().map(|step| step.events.clone());
    let leaving = case.left_at_end().iter().map(|event| vec![event.gone()]).collect::<Vec<_>>();
    let mut all = Vec::new();
    for events in steps.chain(leaving) {
        events.iter().map(Event::change).for_each(|change| model.apply(change));
        all.push(model.recompute());
    }
    all
}

/// An agent's last stages.
struct Written {
    memory: Memory,
    reconciler: Reconciler,
    now: SystemTime,
    is_first: bool,
}

impl Written {
    fn new() -> Self {
        Self {
            memory: Memory::new(CAPACITY),
            reconciler: Reconciler::new(Tables::new(CAPACITY)),
            now: SystemTime::UNIX_EPOCH,
            is_first: true,
        }
    }

    /// Writes an update, tries again what failed, and tells what the maps hold then.
    fn take(&mut self, update: &Update) -> Result<String> {
        self.now += PAUSE;
        if std::mem::take(&mut self.is_first) {
            let all = update.services.iter().filter_map(|(key, wanted)| Some((key.clone(), wanted.clone()?)));
            self.reconciler.want_all(all.collect(), self.now);
        } else {
            self.reconciler.want(update.services.clone(), self.now);
        }
        if let Some(node) = &update.node {
            self.reconciler.want_node_addresses(node.node_port_addresses.clone(), self.now);
        }
        // One write fails at most once: the second round makes it, the third finds nothing to do.
        for _ in 0..3 {
            self.reconciler.run(&mut self.memory, self.now);
            self.reconciler.settle(&mut self.memory, self.now);
            self.now += PAUSE;
        }
        let status = self.reconciler.status();
        let unfinished: Vec<_> = status
            .services()
            .filter(|(_, status)| !matches!(status, Status::Done { .. }))
            .map(|(key, status)| format!("{key}: {status:?}"))
            .collect();
        ensure!(unfinished.is_empty(), "not written: {unfinished:?}");
        ensure!(!self.reconciler.tables().needs_grace(), "something is left to be freed");
        Ok(print(&self.memory))
    }

    fn ensure_empty(&self) -> Result<()> {
        let memory = &self.memory;
        ensure!(memory.frontends().is_empty(), "left: {:?}", memory.frontends());
        ensure!(memory.source_ranges().is_empty(), "left: {:?}", memory.source_ranges());
        // Of the node itself addresses may be left, where flags or interfaces name them.
        let is_node_port = |kind: &Option<AddressKind>| *kind == Some(AddressKind::NodePort);
        ensure!(memory.addresses().values().all(is_node_port), "left: {:?}", memory.addresses());
        ensure!((0..CAPACITY.frontends).all(|number| memory.words(number) == [0; 4]), "an entry is left");
        let tables = self.reconciler.tables();
        let free = (tables.free_numbers(), tables.free_slots());
        ensure!(free == (CAPACITY.frontends, CAPACITY.backends), "numbers and slots are left: {free:?}");
        Ok(())
    }
}

/// What programs would find, but for numbers, slots and identities, which a failed write may change.
fn print(memory: &Memory) -> String {
    let mut out = String::new();
    for (key, number) in memory.frontends() {
        let words = memory.words(*number);
        let word = |word: Word| words[word as usize];
        let info = memory.info(*number).map(|info| {
            let kinds = (info.frontend_kind, info.service_kind, info.traffic_policy, info.pass_through_rule);
            (info.name().to_owned(), info.frontend, kinds)
        });
        let timeout = ServiceIdentity::from_word(word(Word::Identity)).affinity_timeout();
        let block = Block::from_word(word(Word::Block));
        let (inside, outside) = (side(memory, word(Word::Inside)), side(memory, word(Word::Outside)));
        let serving = backends(memory, block.first_slot(), block.serving());
        let ranges: Vec<_> = memory
            .source_ranges()
            .iter()
            .filter(|range| range.number == *number)
            .map(|range| (range.address, range.prefix_length))
            .collect();
        let _ = writeln!(
            out,
            "{key:?} {info:?} {timeout} s, inside {inside}, outside {outside}, {} in sets of {serving}, from {ranges:?}",
            block.in_sets()
        );
    }
    let addresses: BTreeMap<&Address, _> = memory.addresses().iter().collect();
    let _ = writeln!(out, "{addresses:?}");
    out
}

fn side(memory: &Memory, word: u64) -> String {
    match Side::from_word(word) {
        Ok(side) => format!(
            "{:?} {:#b} {}",
            side.mode(),
            side.options(),
            backends(memory, side.first_slot(), side.count())
        ),
        Err(error) => error.to_string(),
    }
}

fn backends(memory: &Memory, first: u32, count: u16) -> String {
    let slots = (first..first + u32::from(count)).map(|slot| memory.backend(slot));
    let list = slots.map(|backend| backend.map(|b| (b.address(), b.port(), b.location(), b.state())));
    format!("{:?}", list.collect::<Vec<_>>())
}
