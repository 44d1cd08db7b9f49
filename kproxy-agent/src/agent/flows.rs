//! Flows and connected sockets after a change of Services, and the sweep of the tables of flows.

use std::{
    collections::BTreeSet,
    path::Path,
    time::{Duration, Instant},
};

use crate::{
    flows::{self, Keeper, Serving, Step},
    maps::Report,
    model::objects::Family,
    plan::Tables,
    programs::{Programs, SocketIterator},
    servers::Metrics,
    sockets::Destroyer,
    wanted::ServiceKey,
};

/// After an error: the tables are looked at again then.
const PAUSE: Duration = Duration::from_secs(10);

/// What follows from Services for what is under way.
#[derive(Default)]
pub struct FlowCare {
    serving: Serving,
    /// Services whose change is not wholly in the tables yet.
    pending: BTreeSet<ServiceKey>,
    keeper: Option<Keeper>,
    destroyer: Option<Destroyer>,
    paused_until: Option<Instant>,
}

impl FlowCare {
    /// The programs are attached, and the maps under their pins.
    pub fn start(&mut self, programs: &mut Programs, bpf_root: &Path, cgroup: &Path) {
        match Keeper::open(bpf_root, Instant::now()) {
            Ok(keeper) => self.keeper = Some(keeper),
            Err(error) => tracing::error!("flows are not looked after: {error}"),
        }
        let started = SocketIterator::new(programs, bpf_root).and_then(|iterator| {
            iterator.map(|iterator| Destroyer::start(iterator, cgroup.to_owned())).transpose()
        });
        match started {
            Ok(destroyer) => self.destroyer = destroyer,
            Err(error) => tracing::error!("UDP clients whose backend is gone are not told so: {error:#}"),
        }
    }

    /// These Services changed, and this was written of it.
    pub fn synced(&mut self, tables: &Tables, changed: Vec<ServiceKey>, report: &Report) {
        self.pending.extend(changed);
        let mut must_look = false;
        for service in &self.pending {
            must_look |= self.serving.update(tables, service);
        }
        let failed = report.failed.iter().filter_map(|(party, _)| party.service());
        self.pending = failed.map(|service| ServiceKey::clone(&service)).collect();
        if must_look {
            self.look();
        }
    }

    fn look(&mut self) {
        if let Some(keeper) = &mut self.keeper {
            keeper.must_search(Instant::now());
        }
        if let Some(destroyer) = &self.destroyer {
            destroyer.changed(&self.serving);
        }
    }

    /// When there is something to do; `None`: not before the programs are attached.
    pub fn next_step(&self) -> Option<Instant> {
        let next = self.keeper.as_ref()?.next_step();
        Some(self.paused_until.map_or(next, |until| next.max(until)))
    }

    /// Does a part of it that takes about a millisecond.
    pub fn step(&mut self, metrics: &Metrics) {
        let Some(keeper) = &mut self.keeper else { return };
        let step = flows::now()
            .map_err(anyhow::Error::from)
            .and_then(|time| Ok(keeper.step(&self.serving, Instant::now(), time)?));
        self.paused_until = None;
        match step {
            Ok(Step::Quiet) => {}
            Ok(Step::Swept { table, entries, capacity }) => metrics.map_fill(table.map(), entries, capacity),
            Ok(Step::Moved { took, deleted }) => {
                for (family, deleted) in [Family::V4, Family::V6].into_iter().zip(deleted) {
                    metrics.flows_reconciled(family, took, deleted);
                }
                let [v4, v6] = deleted;
                if v4 + v6 > 0 {
                    tracing::info!(
                        v4,
                        v6,
                        took_us = took.as_micros() as u64,
                        "moved UDP flows whose backend serves no more"
                    );
                }
            }
            Err(error) => {
                tracing::warn!("flows are looked at again in {} s: {error:#}", PAUSE.as_secs());
                self.paused_until = Some(Instant::now() + PAUSE);
            }
        }
    }
}
