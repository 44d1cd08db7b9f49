//! Keeps the tables of flows: takes out what has idled too long, and UDP flows whose backend serves no more. Works in
//! pages, so that no step takes long, however large the tables are.

use std::{
    collections::BTreeSet,
    path::Path,
    time::{Duration, Instant},
};

use kproxy_common::{Conversation, Flow, FlowKey, FlowTable, Protocol};

use super::{Progress, ROLES, Serving, belongs};
use crate::maps::kernel::{Cursor, FlowMaps, MapError};

/// How many entries a step reads: about a millisecond.
const PAGE: u32 = 4_096;
/// Between two steps of the sweep, and at least between the beginnings of two sweeps: the shortest life is 30 s.
const STEP: Duration = Duration::from_millis(250);
const SWEEP: Duration = Duration::from_secs(10);
/// A search for flows that must move waits until this many times the length of the last one has passed: however often
/// endpoints change, it takes no more than a tenth of a CPU.
const REST: u32 = 10;
/// When a change is looked at once more: a program may have chosen just before it, and entered its flow just after.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// What a step did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// A page, or nothing that anybody must know of.
    Quiet,
    /// A table was swept: so many entries are in it.
    Swept {
        /// Which.
        table: FlowTable,
        /// Its entries.
        entries: usize,
        /// What it has room for.
        capacity: usize,
    },
    /// All flows were compared with the Services.
    Moved {
        /// The time that it took.
        took: Duration,
        /// Flows deleted, IPv4 and IPv6.
        deleted: [u64; 2],
    },
}

/// Sweeps the tables of flows.
#[derive(Debug)]
pub struct Keeper {
    maps: FlowMaps,
    sweep: Sweep,
    search: Search,
}

#[derive(Debug)]
struct Sweep {
    began: Instant,
    next: Instant,
    scan: Scan,
    entries: usize,
}

#[derive(Debug, Default)]
struct Search {
    /// When it is due, if it is.
    due: Option<Instant>,
    again: Option<Instant>,
    /// It has begun.
    scan: Option<Scan>,
    took: Duration,
    deleted: [u64; 2],
}

/// A way through both tables.
#[derive(Debug)]
struct Scan {
    began: Instant,
    table: FlowTable,
    cursor: Cursor,
}

impl Scan {
    fn new(now: Instant) -> Self {
        Self { began: now, table: FlowTable::Established, cursor: Cursor::default() }
    }

    fn page(&mut self, maps: &FlowMaps) -> Result<Page, MapError> {
        let table = self.table;
        let entries = maps.page(table, &mut self.cursor, PAGE)?;
        let ends_table = self.cursor.is_at_end();
        if ends_table && table == FlowTable::Established {
            (self.table, self.cursor) = (FlowTable::Transient, Cursor::default());
            return Ok(Page { table, entries, ends_table, ends_scan: false });
        }
        Ok(Page { table, entries, ends_table, ends_scan: ends_table })
    }
}

/// Some entries of a table.
struct Page {
    table: FlowTable,
    entries: Vec<(FlowKey, Flow)>,
    ends_table: bool,
    ends_scan: bool,
}

impl Keeper {
    /// Of the tables that are pinned below `bpf_root`.
    pub fn open(bpf_root: &Path, now: Instant) -> Result<Self, MapError> {
        Ok(Self::over(FlowMaps::open(bpf_root)?, now))
    }

    /// Of these tables.
    pub fn over(maps: FlowMaps, now: Instant) -> Self {
        let sweep = Sweep { began: now, next: now + STEP, scan: Scan::new(now), entries: 0 };
        Self { maps, sweep, search: Search::default() }
    }

    /// Some UDP backends serve no more, or the first ones do: flows are to be compared with what serves.
    pub fn must_search(&mut self, now: Instant) {
        let rested = self.search.took * REST;
        let due = self.search.due.unwrap_or(now + rested);
        // What has begun may be past what it should find now.
        self.search.due = Some(due);
        self.search.again = Some(due + SECOND_LOOK);
    }

    /// When the next step is due.
    pub fn next_step(&self) -> Instant {
        if let Some(scan) = &self.search.scan {
            return scan.began;
        }
        [self.search.due, self.search.again].into_iter().flatten().fold(self.sweep.next, Instant::min)
    }

    /// Does a page of what is due. `time` is the programs' clock, in nanoseconds since boot.
    pub fn step(&mut self, serving: &Serving, now: Instant, time: u64) -> Result<Step, MapError> {
        if self.search.scan.is_none() {
            let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
            let search = &mut self.search;
            let asked = if is_due(search.due) { search.due.take() } else { None };
            let asked = asked.or_else(|| if is_due(search.again) { search.again.take() } else { None });
            if asked.is_some() {
                (search.scan, search.took) = (Some(Scan::new(now)), Duration::ZERO);
            }
        }
        if self.search.scan.is_some() {
            return self.search(serving);
        }
        if self.sweep.next <= now { self.sweep(now, time) } else { Ok(Step::Quiet) }
    }

    fn search(&mut self, serving: &Serving) -> Result<Step, MapError> {
        let began = Instant::now();
        // Taken out, and not put back after an error: the next change begins anew.
        let Some(mut scan) = self.search.scan.take() else {
            return Ok(Step::Quiet);
        };
        let page = scan.page(&self.maps)?;
        let must_move = |whole: &Conversation| {
            whole.protocol == Protocol::Udp
                && serving.must_move(whole.service, whole.backend, whole.backend_port)
        };
        let deleted = self.delete(&page.entries, |whole, _| must_move(whole), |_| true)?;
        let search = &mut self.search;
        for (sum, more) in search.deleted.iter_mut().zip(deleted) {
            *sum += more;
        }
        search.took += began.elapsed();
        if !page.ends_scan {
            search.scan = Some(scan);
            return Ok(Step::Quiet);
        }
        Ok(Step::Moved { took: search.took, deleted: std::mem::take(&mut search.deleted) })
    }

    fn sweep(&mut self, now: Instant, time: u64) -> Result<Step, MapError> {
        self.sweep.next = now + STEP;
        let page = self.sweep.scan.page(&self.maps)?;
        self.sweep.entries += page.entries.len();
        self.delete(
            &page.entries,
            |_, progress| progress.may_be_over(time),
            |progress| progress.is_over(time),
        )?;
        if page.ends_scan {
            self.sweep.scan = Scan::new(now);
            self.sweep.next = self.sweep.next.max(self.sweep.began + SWEEP);
            self.sweep.began = self.sweep.next;
        }
        if !page.ends_table {
            return Ok(Step::Quiet);
        }
        let entries = std::mem::take(&mut self.sweep.entries);
        Ok(Step::Swept { table: page.table, entries, capacity: self.maps.capacity(page.table) as usize })
    }

    /// Deletes flows, all entries of each in both tables: those of which `one` is true by an entry and `all` by all of
    /// its entries together. How many flows, IPv4 and IPv6.
    fn delete(
        &mut self,
        page: &[(FlowKey, Flow)],
        one: impl Fn(&Conversation, &Progress) -> bool,
        all: impl Fn(&Progress) -> bool,
    ) -> Result<[u64; 2], MapError> {
        let (mut established, mut transient) = (Vec::new(), Vec::new());
        // Several entries of a flow may be in one page.
        let mut flows = BTreeSet::new();
        for (key, flow) in page {
            let mut whole = Conversation::EMPTY;
            whole.read_entry(key, flow);
            let mut progress = Progress::of(key, flow);
            if !one(&whole, &progress) {
                continue;
            }
            let mut entries = Vec::new();
            for role in ROLES {
                if let Some((table, key, flow)) = self.maps.entry(&whole, role)?
                    && belongs(&whole, &key, &flow)
                {
                    progress = progress.and(&flow);
                    entries.push((table, key));
                }
            }
            if !all(&progress) {
                continue;
            }
            flows.insert((whole.client, whole.client_port, whole.frontend, whole.frontend_port));
            for (table, key) in entries {
                match table {
                    FlowTable::Established => established.push(key),
                    FlowTable::Transient => transient.push(key),
                }
            }
        }
        self.maps.delete(FlowTable::Established, &established)?;
        self.maps.delete(FlowTable::Transient, &transient)?;
        let v4 = flows.iter().filter(|(client, ..)| client.is_v4()).count() as u64;
        Ok([v4, flows.len() as u64 - v4])
    }
}

#[cfg(test)]
mod tests {
    use kproxy_common::{Address, Ends, FlowEnd, FlowState, Role};

    use super::*;

    const SECOND: u64 = 1_000_000_000;
    /// The programs' clock: long after boot.
    const TIME: u64 = 100_000 * SECOND;

    fn flow(client_port: u16, protocol: Protocol, state: FlowState, idle_seconds: u64) -> Conversation {
        Conversation {
            client: Address::from_v4_word(1),
            client_port,
            inner_port: client_port,
            frontend: Address::from_v4_word(2),
            frontend_port: 80,
            backend: Address::from_v4_word(3),
            backend_port: 8_080,
            protocol,
            state,
            service: 7,
            last_seen: TIME - idle_seconds * SECOND,
            ..Conversation::EMPTY
        }
    }

    fn ports(keeper: &Keeper) -> BTreeSet<u16> {
        let mut ports = BTreeSet::new();
        for table in FlowTable::BOTH {
            for (key, flow) in keeper.maps.page(table, &mut Cursor::default(), PAGE).unwrap() {
                let mut whole = Conversation::EMPTY;
                whole.read_entry(&key, &flow);
                ports.insert(whole.client_port);
            }
        }
        ports
    }

    /// Steps, each when it is due, until one is told that satisfies.
    fn run(keeper: &mut Keeper, serving: &Serving, now: &mut Instant, until: impl Fn(&Step) -> bool) -> Step {
        for _ in 0..100 {
            *now = keeper.next_step().max(*now);
            let step = keeper.step(serving, *now, TIME).unwrap();
            if until(&step) {
                return step;
            }
        }
        panic!("a hundred steps, and not what is waited for");
    }

    #[test]
    fn what_idled_too_long_goes_with_all_its_entries() {
        let Some(maps) = FlowMaps::create(1_024) else { return };
        let both = [Role::Request, Role::Reply];
        for (table, flow) in [
            (FlowTable::Transient, flow(1, Protocol::Udp, FlowState::Opening, 31)),
            (FlowTable::Transient, flow(2, Protocol::Udp, FlowState::Opening, 29)),
            (FlowTable::Established, flow(3, Protocol::Udp, FlowState::Established, 181)),
            (FlowTable::Established, flow(4, Protocol::Tcp, FlowState::Established, 80_000)),
            (FlowTable::Established, flow(5, Protocol::Tcp, FlowState::Established, 87_000)),
        ] {
            for role in both {
                maps.put(table, &flow, role);
            }
        }
        // Masked: four entries, one of which another table has still.
        let masked =
            Conversation { mask_port: 61_000, ..flow(6, Protocol::Udp, FlowState::Established, 200) };
        for role in ROLES {
            let table = if role == Role::Return { FlowTable::Transient } else { FlowTable::Established };
            maps.put(table, &masked, role);
        }
        // Half closed, and one that only its answers keep alive.
        let finished = Ends { client: FlowEnd::Finished, ..Ends::OPEN };
        let asked = flow(7, Protocol::Tcp, FlowState::Established, 3_601);
        maps.put(FlowTable::Established, &Conversation { ends: finished, ..asked }, Role::Request);
        maps.put(FlowTable::Established, &asked, Role::Reply);
        // Both directions have finished at the same instant, and neither program saw the other's FIN.
        let finishing = |client, backend, idle| Conversation {
            ends: Ends { client, backend },
            ..flow(9, Protocol::Tcp, FlowState::Established, idle)
        };
        let (open, finished) = (FlowEnd::Open, FlowEnd::Finished);
        maps.put(FlowTable::Established, &finishing(finished, open, 121), Role::Request);
        maps.put(FlowTable::Established, &finishing(open, finished, 122), Role::Reply);
        maps.put(FlowTable::Established, &flow(8, Protocol::Udp, FlowState::Established, 500), Role::Request);
        maps.put(FlowTable::Established, &flow(8, Protocol::Udp, FlowState::Established, 1), Role::Reply);

        let mut now = Instant::now();
        let mut keeper = Keeper::over(maps, now);
        let swept =
            |table| move |step: &Step| matches!(step, Step::Swept { table: this, .. } if *this == table);
        let step = run(&mut keeper, &Serving::default(), &mut now, swept(FlowTable::Transient));
        assert_eq!(ports(&keeper), [2, 4, 8].into());
        assert_eq!(step, Step::Swept { table: FlowTable::Transient, entries: 4, capacity: 1_024 });
        // The next one counts what is left, and begins later.
        let before = now;
        let step = run(&mut keeper, &Serving::default(), &mut now, swept(FlowTable::Established));
        assert_eq!(step, Step::Swept { table: FlowTable::Established, entries: 4, capacity: 1_024 });
        assert!(now - before > Duration::from_secs(9), "after {:?}", now - before);
    }

    #[test]
    fn udp_flows_to_a_backend_that_serves_no_more_go_at_once() {
        let Some(maps) = FlowMaps::create(1_024) else { return };
        let udp = flow(1, Protocol::Udp, FlowState::Established, 1);
        let tcp = flow(2, Protocol::Tcp, FlowState::Established, 1);
        let elsewhere = Conversation { client_port: 3, inner_port: 3, backend_port: 9_090, ..udp };
        let opening = Conversation { client_port: 4, inner_port: 4, state: FlowState::Opening, ..udp };
        let other_service = Conversation { client_port: 5, inner_port: 5, service: 8, ..udp };
        for flow in [&udp, &tcp, &elsewhere, &other_service] {
            maps.put(FlowTable::Established, flow, Role::Request);
            maps.put(FlowTable::Established, flow, Role::Reply);
        }
        maps.put(FlowTable::Transient, &opening, Role::Request);
        let mut now = Instant::now();
        let mut keeper = Keeper::over(maps, now);
        let moved = |step: &Step| matches!(step, Step::Moved { .. });

        let serving = Serving::of_port(7, &[]);
        keeper.must_search(now);
        let Step::Moved { deleted, .. } = run(&mut keeper, &serving, &mut now, moved) else { unreachable!() };
        assert_eq!(deleted, [0, 0], "nowhere to move to");

        let serving = Serving::of_port(7, &[(Address::from_v4_word(3), 9_090)]);
        keeper.must_search(now);
        let asked = now;
        let Step::Moved { deleted, .. } = run(&mut keeper, &serving, &mut now, moved) else { unreachable!() };
        assert_eq!((deleted, ports(&keeper)), ([2, 0], [2, 3, 5].into()));
        assert!(now - asked < Duration::from_secs(1), "after {:?}", now - asked);
        // One that a program entered meanwhile is found by the second look.
        keeper.maps.put(FlowTable::Transient, &opening, Role::Request);
        let Step::Moved { deleted, .. } = run(&mut keeper, &serving, &mut now, moved) else { unreachable!() };
        assert_eq!((deleted, ports(&keeper)), ([1, 0], [2, 3, 5].into()));
    }
}
