//! What the agent counts and measures: kube-proxy's names and labels of nftables mode (`pkg/proxy/metrics`),
//! and what only kproxy has, under `kproxy_`.

mod definitions;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use prometheus_client::registry::Registry;

use self::definitions::{ByCode, ByFamily, ByMap, ByPolicy, ByProblem, Kube, Own};
use super::{
    exposition::exposition,
    readings::{Collector, Readings},
};
use crate::model::objects::Family;

/// Whether a sync looked at everything or at what had changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SyncKind {
    /// Everything: the first one, and the audit.
    Full,
    /// What had changed.
    Partial,
}

/// Which objects changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Changed {
    /// Services.
    Services,
    /// EndpointSlices.
    Endpoints,
}

/// Which of a Service's two traffic policies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PolicySide {
    /// `internalTrafficPolicy`.
    Internal,
    /// `externalTrafficPolicy`.
    External,
}

/// Who found a problem.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ProblemOrigin {
    /// Reading: the API server or the files.
    Source,
    /// Understanding what was read.
    Model,
    /// Serving: health checks whose port cannot be bound.
    Server,
}

/// All metrics. What they say at a moment: [`Metrics::exposition`].
pub struct Metrics {
    registry: Registry,
    kube: Kube,
    own: Own,
    problem_kinds: Mutex<BTreeSet<(ProblemOrigin, &'static str)>>,
}

impl Metrics {
    /// Metrics of an agent that serves these families and starts now. `readings` are asked whenever metrics are.
    pub fn new(families: impl IntoIterator<Item = Family>, now: SystemTime, readings: Readings) -> Self {
        let mut registry = Registry::default();
        let kube = Kube::register(registry.sub_registry_with_prefix("kubeproxy"));
        let kproxy = registry.sub_registry_with_prefix("kproxy");
        let own = Own::register(kproxy);
        kproxy.register_collector(Box::new(Collector(readings)));
        for family in families {
            // A rate can only be told from a counter that was there before it first counted.
            let labels = ByFamily::from(family);
            drop(own.sync_failures.get_or_create(&labels));
            drop(own.cleanup_failures.get_or_create(&labels));
            // kube-proxy, too, starts with a change that it has yet to write: all that it finds.
            kube.last_queued.get_or_create(&labels).set(seconds(now));
        }
        Self { registry, kube, own, problem_kinds: Mutex::default() }
    }

    /// All of them as they are now, in Prometheus' text format. Asks the readings, so it can take a while.
    pub fn exposition(&self) -> Result<String, fmt::Error> {
        exposition(&self.registry)
    }

    /// A sync took this long, whether it succeeded or not.
    pub fn sync_took(&self, family: Family, kind: SyncKind, took: Duration) {
        let of_kind = match kind {
            SyncKind::Full => &self.kube.sync_full_duration,
            SyncKind::Partial => &self.kube.sync_partial_duration,
        };
        for histograms in [&self.kube.sync_duration, of_kind] {
            histograms.get_or_create(&family.into()).observe(took.as_secs_f64());
        }
    }

    /// So many events came.
    pub fn changes_seen(&self, changed: Changed, count: u64) {
        let counter = match changed {
            Changed::Services => &self.kube.service_changes,
            Changed::Endpoints => &self.kube.endpoint_changes,
        };
        counter.inc_by(count);
    }

    /// So many changes are not written yet.
    pub fn changes_pending(&self, changed: Changed, count: usize) {
        let gauge = match changed {
            Changed::Services => &self.kube.service_changes_pending,
            Changed::Endpoints => &self.kube.endpoint_changes_pending,
        };
        gauge.set(as_gauge(count));
    }

    /// So many Service ports have endpoints, none on this node, and a policy of Local.
    pub fn no_local_endpoints(&self, side: PolicySide, family: Family, count: usize) {
        let traffic_policy = match side {
            PolicySide::Internal => "internal",
            PolicySide::External => "external",
        };
        let labels = ByPolicy { ip_family: family.text(), traffic_policy };
        self.kube.no_local_endpoints.get_or_create(&labels).set(as_gauge(count));
    }

    /// A change of endpoints that was triggered then, by the annotation
    /// `endpoints.kubernetes.io/last-change-trigger-time`, is in the maps now. kube-proxy leaves out those from
    /// before its own start, and deletions.
    pub fn programmed(&self, family: Family, triggered: SystemTime, now: SystemTime) {
        // The other clock may be ahead of ours; nothing takes less than no time.
        let took = now.duration_since(triggered).unwrap_or_default();
        self.kube.network_programming.get_or_create(&family.into()).observe(took.as_secs_f64());
    }

    /// Flows were compared with the Services, and those deleted that lead to endpoints which serve no more.
    pub fn flows_reconciled(&self, family: Family, took: Duration, deleted: u64) {
        let labels = family.into();
        self.kube.flows_reconciled_duration.get_or_create(&labels).observe(took.as_secs_f64());
        self.kube.flows_deleted.get_or_create(&labels).inc_by(deleted);
    }

    /// Removing what nothing leads to any more failed.
    pub fn cleanup_failed(&self, family: Family) {
        self.own.cleanup_failures.get_or_create(&family.into()).inc();
    }

    /// The problems that there are now, by kind: all that `origin` knows of. A kind that was named before and is
    /// not any more is at zero.
    pub fn problems(&self, origin: ProblemOrigin, counts: impl IntoIterator<Item = (&'static str, usize)>) {
        let mut known = self.problem_kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let gauge = |kind| {
            let origin = match origin {
                ProblemOrigin::Source => "source",
                ProblemOrigin::Model => "model",
                ProblemOrigin::Server => "server",
            };
            self.own.problems.get_or_create_owned(&ByProblem { kind, origin })
        };
        let mut unnamed: BTreeSet<_> = known.iter().copied().filter(|(other, _)| *other == origin).collect();
        for (kind, count) in counts {
            gauge(kind).set(as_gauge(count));
            unnamed.remove(&(origin, kind));
            known.insert((origin, kind));
        }
        unnamed.into_iter().for_each(|(_, kind)| {
            gauge(kind).set(0);
        });
    }

    /// A map holds so many entries, and has room for so many.
    pub fn map_fill(&self, map: &'static str, entries: usize, capacity: usize) {
        self.own.map_entries.get_or_create(&ByMap { map }).set(as_gauge(entries));
        self.own.map_capacity.get_or_create(&ByMap { map }).set(as_gauge(capacity));
    }

    /// So many entries of a map were written or deleted, and so many could not be.
    pub fn map_writes(&self, map: &'static str, made: u64, failed: u64) {
        self.own.map_writes.get_or_create(&ByMap { map }).inc_by(made);
        self.own.map_write_failures.get_or_create(&ByMap { map }).inc_by(failed);
    }

    /// The audit found so many entries of a map that were not as they had been written.
    pub fn drift(&self, map: &'static str, entries: u64) {
        self.own.drift.get_or_create(&ByMap { map }).inc_by(entries);
    }

    pub(super) fn queued(&self, family: Family, now: SystemTime) {
        self.kube.last_queued.get_or_create(&family.into()).set(seconds(now));
    }

    pub(super) fn written(&self, family: Family, now: SystemTime) {
        self.kube.last_sync.get_or_create(&family.into()).set(seconds(now));
    }

    pub(super) fn write_failed(&self, family: Family) {
        self.own.sync_failures.get_or_create(&family.into()).inc();
    }

    pub(super) fn healthz_answered(&self, code: u16) {
        self.kube.healthz.get_or_create(&ByCode { code }).inc();
    }

    pub(super) fn livez_answered(&self, code: u16) {
        self.kube.livez.get_or_create(&ByCode { code }).inc();
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// Seconds since 1970.
fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn as_gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
