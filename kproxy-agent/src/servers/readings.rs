//! What the kernel counts, read when metrics are asked for.

use std::{collections::BTreeMap, fmt};

use kproxy_common::Reason;
use prometheus_client::{
    collector,
    encoding::{DescriptorEncoder, EncodeLabelSet},
    metrics::{MetricType, exemplar::Exemplar},
};

/// The counters of a Service port. One that has several frontends may come several times: they are added up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceCounters {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `spec.ports[].name`, empty without a name.
    pub port: String,
    /// Connections (UDP: flows) sent to a backend.
    pub connections: u64,
    /// Connections left to the load balancer.
    pub pass_through: u64,
}

/// How the kernel's counters are read. The functions may take their time, and are called on threads of their
/// own, several at once where metrics are asked for twice. What cannot be read is logged, and missing.
pub struct Readings {
    /// The counters of every Service port.
    pub services: Read<ServiceCounters>,
    /// How often each verdict was reached, by reason.
    pub verdicts: Read<(Reason, u64)>,
}

/// Reads a kind of counters from the kernel, all of them.
pub type Read<T> = Box<dyn Fn() -> anyhow::Result<Vec<T>> + Send + Sync>;

/// Writes the readings among the other metrics.
#[derive(Debug)]
pub(super) struct Collector(pub(super) Readings);

impl fmt::Debug for Readings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readings").finish_non_exhaustive()
    }
}

impl collector::Collector for Collector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Readings { services, verdicts } = &self.0;
        match services() {
            Ok(counters) => encode_services(&mut encoder, counters)?,
            Err(error) => not_read("Services' connections", &error),
        }
        match verdicts() {
            Ok(counters) => encode_verdicts(&mut encoder, counters)?,
            Err(error) => not_read("verdicts", &error),
        }
        Ok(())
    }
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, EncodeLabelSet)]
struct ByService {
    namespace: String,
    service: String,
    port: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct ByReason {
    reason: &'static str,
}

fn encode_services(encoder: &mut DescriptorEncoder<'_>, counters: Vec<ServiceCounters>) -> fmt::Result {
    let mut sums: BTreeMap<ByService, (u64, u64)> = BTreeMap::new();
    for ServiceCounters { namespace, name, port, connections, pass_through } in counters {
        let (all_connections, all_pass_through) =
            sums.entry(ByService { namespace, service: name, port }).or_default();
        *all_connections = all_connections.wrapping_add(connections);
        *all_pass_through = all_pass_through.wrapping_add(pass_through);
    }
    encode_counters(
        encoder,
        "service_connections",
        "Connections sent to backends (UDP: flows)",
        sums.iter().map(|(labels, (connections, _))| (labels, *connections)),
    )?;
    encode_counters(
        encoder,
        "service_pass_through_connections",
        "Connections left to the load balancer",
        sums.iter().map(|(labels, (_, pass_through))| (labels, *pass_through)),
    )
}

fn encode_verdicts(encoder: &mut DescriptorEncoder<'_>, counters: Vec<(Reason, u64)>) -> fmt::Result {
    let counters: Vec<_> =
        counters.into_iter().map(|(reason, count)| (ByReason { reason: reason.word() }, count)).collect();
    encode_counters(
        encoder,
        "verdicts",
        "Verdicts on connections and packets, by reason",
        counters.iter().map(|(labels, count)| (labels, *count)),
    )
}

fn encode_counters<'a, L: EncodeLabelSet + 'a>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    counters: impl Iterator<Item = (&'a L, u64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, count) in counters {
        metric.encode_family(labels)?.encode_counter(&count, None::<&Exemplar<ByReason, u64>>)?;
    }
    Ok(())
}

fn not_read(what: &str, error: &anyhow::Error) {
    tracing::warn!("{what} are left out of the metrics, since their counters cannot be read: {error:#}");
}
