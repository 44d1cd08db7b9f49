//! What the agent tells of itself: health, and metrics.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use k8s_openapi::api::core::v1::Node;
use kproxy_common::Reason;
use serde_json::json;

use super::health_checks::HealthChecks;
use crate::{
    cli::AgentArgs,
    commands::UsageError,
    events::{EventReason, Events},
    maps::{Report, kernel::KernelMaps},
    model::{Change, Model, objects::Family},
    plan::{Tables, split_name},
    servers::{
        BindAddress, Changed, HealthCheckListeners, KubeProxyConfiguration, ListenNews, Metrics, Moment,
        ProblemOrigin, Readings, Server, Servers, ServiceCounters, State, SyncKind, configz,
    },
    source::{PresentProblems, SourceProblem},
};

/// The servers, and what they answer.
pub struct Telemetry {
    state: State,
    events: Events,
    source_problems: PresentProblems,
    _servers: Servers,
}

impl Telemetry {
    /// Starts the servers. Wrong addresses are an error; those that cannot be bound are tried again.
    pub fn start(args: &AgentArgs, node_name: &str, bpf_root: &Path, events: &Events) -> Result<Self> {
        let (healthz, metrics) = addresses(args)?;
        let configuration = KubeProxyConfiguration {
            hostname_override: node_name.to_owned(),
            healthz_bind_address: healthz.to_string(),
            metrics_bind_address: metrics.to_string(),
            cluster_cidr: comma_separated(&args.node.cluster_cidr),
            node_port_addresses: args.node.nodeport_addresses.clone(),
        };
        let own = json!({
            "passThroughDefault": args.rules.pass_through_default,
            "passThroughAnnotations": args.rules.pass_through_annotation,
            "serviceCIDR": comma_separated(&args.node.service_cidr),
            "bpfRoot": bpf_root,
        });
        let (for_services, for_verdicts) = (bpf_root.to_owned(), bpf_root.to_owned());
        let readings = Readings {
            services: Box::new(move || service_counters(&for_services)),
            verdicts: Box::new(move || verdicts(&for_verdicts)),
        };
        let measured = Metrics::new(Family::ALL, SystemTime::now(), readings);
        let state = State::new(Family::ALL, Moment::now(), measured, configz(&configuration, own)?);
        let on_node = events.clone();
        let servers = Servers::start(&state, healthz, metrics, move |server, text| {
            let reason = match server {
                Server::Healthz => EventReason::FailedToStartProxierHealthcheck,
                Server::Metrics => EventReason::FailedToStartMetricServer,
            };
            on_node.on_node(reason, text);
        });
        Ok(Self {
            state,
            events: events.clone(),
            source_problems: PresentProblems::default(),
            _servers: servers,
        })
    }

    /// The Services' health checks; none is answered yet.
    pub fn health_checks(&self) -> HealthChecks {
        let events = self.events.clone();
        let listeners = HealthCheckListeners::new(self.state.clone(), move |news| match news {
            ListenNews::Failed(failure) => events.listen_failed(&failure),
            ListenNews::Recovered(failure) => events.listen_recovered(&failure),
        });
        HealthChecks::new(self.state.clone(), listeners)
    }

    /// What is counted and measured.
    pub fn metrics(&self) -> &Metrics {
        self.state.metrics()
    }

    /// An object came, changed or went.
    pub fn changed(&self, change: &Change) {
        let metrics = self.state.metrics();
        match change {
            Change::Service(..) => metrics.changes_seen(Changed::Services, 1),
            Change::EndpointSlice(..) => metrics.changes_seen(Changed::Endpoints, 1),
            // After its deletion the Node as last seen counts.
            Change::Node(Some(node)) => self.node_seen(node),
            Change::Node(None) | Change::ServiceCidr(..) | Change::LocalAddresses(_) => {}
        }
    }

    /// Something is about to be written.
    pub fn queued(&self) {
        for family in Family::ALL {
            self.state.queued(family, Moment::now());
        }
    }

    /// The source has a problem, or no longer.
    pub fn source_problem(&mut self, problem: SourceProblem) {
        self.source_problems.note(problem);
        let counts = self.source_problems.count_by_kind();
        let counts = counts.into_iter().map(|(kind, count)| (kind.label(), count));
        self.state.metrics().problems(ProblemOrigin::Source, counts);
    }

    /// What is wanted was written, or part of it could not be.
    pub fn synced(&self, report: &Report, tables: &Tables, model: &Model, is_first: bool, took: Duration) {
        let metrics = self.state.metrics();
        let kind = if is_first { SyncKind::Full } else { SyncKind::Partial };
        for family in Family::ALL {
            metrics.sync_took(family, kind, took);
            if report.failed.is_empty() {
                self.state.written(family, Moment::now());
            } else {
                self.state.write_failed(family, Moment::now());
            }
        }
        let mut by_kind = std::collections::BTreeMap::new();
        for problem in model.problems() {
            *by_kind.entry(problem.kind.word()).or_insert(0_usize) += 1;
        }
        metrics.problems(ProblemOrigin::Model, by_kind);
        let capacity = tables.capacity();
        metrics.map_fill("frontend", tables.frontends().count(), capacity.frontends as usize);
        let slots = capacity.backends - tables.free_slots();
        metrics.map_fill("backend", slots as usize, capacity.backends as usize);
        let counts = &report.counts;
        for (map, made) in [
            ("backend", counts.backends),
            ("service", counts.words),
            ("service_info", counts.infos),
            ("frontend", counts.frontends),
            ("address", counts.addresses),
            ("source_range", counts.source_ranges),
        ] {
            metrics.map_writes(map, made, 0);
        }
    }

    fn node_seen(&self, node: &Node) {
        self.state.node_seen(node);
    }
}

/// The servers' addresses as the flags give them.
pub fn addresses(args: &AgentArgs) -> Result<(BindAddress, BindAddress)> {
    let usage = |error: crate::servers::BindAddressError| UsageError(error.to_string());
    let healthz = BindAddress::healthz(&args.healthz_bind_address).map_err(usage)?;
    let metrics = BindAddress::metrics(&args.metrics_bind_address).map_err(usage)?;
    Ok((healthz, metrics))
}

fn comma_separated<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

fn service_counters(bpf_root: &Path) -> Result<Vec<ServiceCounters>> {
    let maps = KernelMaps::open(bpf_root)?;
    let (snapshot, counters) = (maps.read_all()?, maps.counters()?);
    let of_number = |number: u32| {
        let info = snapshot.infos.get(number as usize)?.as_ref()?;
        let (key, port) = split_name(info.name())?;
        let counters = counters.get(number as usize)?;
        Some(ServiceCounters {
            namespace: key.namespace,
            name: key.name,
            port: port.to_owned(),
            connections: counters.connections,
            pass_through: counters.pass_through,
        })
    };
    Ok(snapshot.frontends.iter().filter_map(|(_, number)| of_number(*number)).collect())
}

fn verdicts(bpf_root: &Path) -> Result<Vec<(Reason, u64)>> {
    let reasons = KernelMaps::open(bpf_root)?.reasons()?;
    Ok(reasons.into_iter().map(|(reason, counts)| (reason, counts.iter().sum())).collect())
}
