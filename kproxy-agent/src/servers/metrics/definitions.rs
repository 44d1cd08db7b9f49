//! Which metrics there are: their names, labels, texts and buckets.

use std::{iter::successors, sync::atomic::AtomicU64};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::model::objects::Family;

pub(super) type FloatGauge = Gauge<f64, AtomicU64>;
pub(super) type Histograms = family::Family<ByFamily, Histogram, fn() -> Histogram>;

/// kube-proxy's.
pub(super) struct Kube {
    pub(super) sync_duration: Histograms,
    pub(super) sync_full_duration: Histograms,
    pub(super) sync_partial_duration: Histograms,
    pub(super) last_sync: family::Family<ByFamily, FloatGauge>,
    pub(super) last_queued: family::Family<ByFamily, FloatGauge>,
    pub(super) network_programming: Histograms,
    pub(super) flows_reconciled_duration: Histograms,
    pub(super) flows_deleted: family::Family<ByFamily, Counter>,
    pub(super) no_local_endpoints: family::Family<ByPolicy, Gauge>,
    pub(super) endpoint_changes_pending: Gauge,
    pub(super) endpoint_changes: Counter,
    pub(super) service_changes_pending: Gauge,
    pub(super) service_changes: Counter,
    pub(super) healthz: family::Family<ByCode, Counter>,
    pub(super) livez: family::Family<ByCode, Counter>,
}

/// kproxy's own.
pub(super) struct Own {
    pub(super) sync_failures: family::Family<ByFamily, Counter>,
    pub(super) cleanup_failures: family::Family<ByFamily, Counter>,
    pub(super) problems: family::Family<ByProblem, Gauge>,
    pub(super) map_entries: family::Family<ByMap, Gauge>,
    pub(super) map_capacity: family::Family<ByMap, Gauge>,
    pub(super) map_writes: family::Family<ByMap, Counter>,
    pub(super) map_write_failures: family::Family<ByMap, Counter>,
    pub(super) drift: family::Family<ByMap, Counter>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct ByFamily {
    pub(super) ip_family: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct ByPolicy {
    // Prometheus sorts them so.
    pub(super) ip_family: &'static str,
    pub(super) traffic_policy: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct ByCode {
    pub(super) code: u16,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct ByProblem {
    pub(super) kind: &'static str,
    pub(super) origin: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
pub(super) struct ByMap {
    pub(super) map: &'static str,
}

impl From<Family> for ByFamily {
    fn from(family: Family) -> Self {
        Self { ip_family: family.text() }
    }
}

/// Registers a new metric; a counter's name gets `_total` when it is written.
fn register<M: prometheus_client::registry::Metric + Clone>(
    registry: &mut Registry,
    name: &str,
    help: &str,
    metric: M,
) -> M {
    registry.register(name, help, metric.clone());
    metric
}

impl Kube {
    pub(super) fn register(to: &mut Registry) -> Self {
        let sync = || Histograms::new_with_constructor(sync_histogram);
        let programming = Histograms::new_with_constructor(network_programming_histogram);
        Self {
            sync_duration: register(
                to,
                "sync_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds",
                sync(),
            ),
            sync_full_duration: register(
                to,
                "sync_full_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds for full resyncs",
                sync(),
            ),
            sync_partial_duration: register(
                to,
                "sync_partial_proxy_rules_duration_seconds",
                "SyncProxyRules latency in seconds for partial resyncs",
                sync(),
            ),
            last_sync: register(
                to,
                "sync_proxy_rules_last_timestamp_seconds",
                "The last time proxy rules were successfully synced",
                family::Family::default(),
            ),
            last_queued: register(
                to,
                "sync_proxy_rules_last_queued_timestamp_seconds",
                "The last time a sync of proxy rules was queued",
                family::Family::default(),
            ),
            network_programming: register(
                to,
                "network_programming_duration_seconds",
                "In Cluster Network Programming Latency in seconds",
                programming,
            ),
            flows_reconciled_duration: register(
                to,
                "conntrack_reconciler_sync_duration_seconds",
                "How long comparing flows with Services took, in seconds",
                sync(),
            ),
            flows_deleted: register(
                to,
                "conntrack_reconciler_deleted_entries",
                "Flows deleted because their endpoint serves no more",
                family::Family::default(),
            ),
            no_local_endpoints: register(
                to,
                "sync_proxy_rules_no_local_endpoints_total",
                "Number of services with a Local traffic policy and no endpoints",
                family::Family::default(),
            ),
            endpoint_changes_pending: register(
                to,
                "sync_proxy_rules_endpoint_changes_pending",
                "Pending proxy rules Endpoint changes",
                Gauge::default(),
            ),
            endpoint_changes: register(
                to,
                "sync_proxy_rules_endpoint_changes",
                "Cumulative proxy rules Endpoint changes",
                Counter::default(),
            ),
            service_changes_pending: register(
                to,
                "sync_proxy_rules_service_changes_pending",
                "Pending proxy rules Service changes",
                Gauge::default(),
            ),
            service_changes: register(
                to,
                "sync_proxy_rules_service_changes",
                "Cumulative proxy rules Service changes",
                Counter::default(),
            ),
            healthz: register(
                to,
                "proxy_healthz",
                "Cumulative proxy healthz HTTP status",
                family::Family::default(),
            ),
            livez: register(
                to,
                "proxy_livez",
                "Cumulative proxy livez HTTP status",
                family::Family::default(),
            ),
        }
    }
}

impl Own {
    pub(super) fn register(to: &mut Registry) -> Self {
        Self {
            // Those two without the word nftables that kube-proxy's have.
            sync_failures: register(
                to,
                "sync_proxy_rules_sync_failures",
                "Syncs that could not write everything",
                family::Family::default(),
            ),
            cleanup_failures: register(
                to,
                "sync_proxy_rules_cleanup_failures",
                "Removals of what nothing leads to any more that failed",
                family::Family::default(),
            ),
            problems: register(
                to,
                "problems",
                "What of the objects cannot be served as written, or cannot be read, by kind",
                family::Family::default(),
            ),
            map_entries: register(to, "map_entries", "Entries that a map holds", family::Family::default()),
            map_capacity: register(
                to,
                "map_capacity_entries",
                "Entries that a map has room for",
                family::Family::default(),
            ),
            map_writes: register(
                to,
                "map_writes",
                "Entries of a map written or deleted",
                family::Family::default(),
            ),
            map_write_failures: register(
                to,
                "map_write_failures",
                "Entries of a map that could not be written or deleted",
                family::Family::default(),
            ),
            drift: register(
                to,
                "map_drift",
                "Entries of a map that the audit found not to be as they had been written",
                family::Family::default(),
            ),
        }
    }
}

/// From a millisecond to sixteen seconds, doubling.
fn sync_histogram() -> Histogram {
    Histogram::new(successors(Some(0.001), |bound| Some(bound * 2.0)).take(15))
}

/// Seconds to a minute, then ever coarser up to five minutes.
fn network_programming_histogram() -> Histogram {
    let steps = |first: f64, step: f64, count: u32| (0..count).map(move |n| first + step * f64::from(n));
    let bounds = steps(0.25, 0.25, 2).chain(steps(1.0, 1.0, 59)).chain(steps(60.0, 5.0, 12));
    Histogram::new(bounds.chain(steps(120.0, 30.0, 7)))
}
