//! The last stages together: what the model wants into the maps.

use std::{collections::BTreeMap, time::SystemTime};

use crate::{
    maps::{MapWriter, Reconciler, Report},
    model::Update,
    plan::Tables,
    wanted::{ServiceKey, WantedService},
};

/// The reconciler and the maps that it writes.
pub struct Syncer<W> {
    reconciler: Reconciler,
    maps: W,
    is_first: bool,
}

impl<W: MapWriter> Syncer<W> {
    /// From the tables as `maps` hold them.
    pub fn new(tables: Tables, maps: W) -> Self {
        Self { reconciler: Reconciler::new(tables), maps, is_first: true }
    }

    /// Writes what `update` brings, and what failed before and is due. The first update is the complete list.
    pub fn sync(&mut self, update: Update, now: SystemTime) -> Report {
        let Update { services, health_checks: _, node, opt_outs: _, new_problems: _, gone_problems: _ } =
            update;
        if std::mem::take(&mut self.is_first) {
            let all: BTreeMap<_, WantedService> =
                services.into_iter().filter_map(|(key, wanted)| Some((key, wanted?))).collect();
            self.reconciler.want_all(all, now);
        } else {
            self.reconciler.want(services, now);
        }
        if let Some(node) = node {
            self.reconciler.want_node_addresses(node.node_port_addresses, now);
        }
        self.reconciler.run(&mut self.maps, now)
    }

    /// Makes free what the last writes took out of use; whether all of it could be.
    pub fn settle(&mut self, now: SystemTime) -> bool {
        let report = self.reconciler.settle(&mut self.maps, now);
        for (party, error) in &report.failed {
            tracing::error!(service = %party, "what is no longer used cannot be freed: {error}");
        }
        report.failed.is_empty()
    }

    /// When something that failed is tried again.
    pub fn next_try(&self) -> Option<SystemTime> {
        self.reconciler.status().next_try()
    }

    /// Whether the maps hold everything that a Service wants.
    pub fn is_written(&self, service: &ServiceKey) -> bool {
        let status = self.reconciler.status().service(service);
        status.is_none_or(|status| status.waiting_since().is_none())
    }

    /// Whether something could not be written that should be possible.
    pub fn is_failing(&self) -> bool {
        self.reconciler.status().is_failing()
    }

    /// Every Service that could not be written, why, and whether for want of room.
    pub fn failed(&self) -> impl Iterator<Item = (&ServiceKey, &str, bool)> {
        self.reconciler.status().failed()
    }

    /// The maps.
    pub fn maps(&mut self) -> &mut W {
        &mut self.maps
    }

    /// The tables as they stand.
    pub fn tables(&self) -> &Tables {
        self.reconciler.tables()
    }

    /// How many frontends the maps hold.
    pub fn frontends(&self) -> usize {
        self.reconciler.tables().frontends().count()
    }

    /// How many Services have something in the maps.
    pub fn services(&self) -> usize {
        self.reconciler.tables().services().count()
    }
}
