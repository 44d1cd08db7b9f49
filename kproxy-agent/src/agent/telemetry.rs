//! What the agent tells of itself: health, and metrics.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use kproxy_common::Reason;
use serde_json::json;

use super::{
    health_checks::HealthChecks,
    measures::{NoLocalEndpoints, Programming, Trigger},
    sync::Syncer,
};
use crate::{
    cli::{AgentArgs, SocketHooks},
    commands::UsageError,
    events::{EventReason, Events},
    maps::{MapWriter, Report, kernel::KernelMaps},
    model::{Change, Model, objects::Family},
    plan::split_name,
    servers::{
        BindAddress, Changed, HealthCheckListeners, KubeProxyConfiguration, ListenNews, Metrics, Moment,
        ProblemOrigin, Readings, Server, Servers, ServiceCounters, State, SyncKind, configz,
    },
    source::{PresentProblems, SourceProblem, kubernetes::WatchState},
    wanted::{ServiceKey, WantedService},
};

/// The servers, and what they answer.
pub struct Telemetry {
    state: State,
    events: Events,
    source_problems: PresentProblems,
    programming: Programming,
    no_local_endpoints: NoLocalEndpoints,
    /// News since the last sync.
    services_waiting: usize,
    endpoints_waiting: usize,
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
            "socketHooks": match args.rules.socket_hooks {
                SocketHooks::All => "all",
                SocketHooks::Host => "host",
            },
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
            programming: Programming::new(SystemTime::now()),
            no_local_endpoints: NoLocalEndpoints::default(),
            services_waiting: 0,
            endpoints_waiting: 0,
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

    /// An object came, changed or went. What it means for the measures once the model has found that it is news.
    pub fn seen(&self, change: &Change) -> News {
        let metrics = self.state.metrics();
        match change {
            Change::Service(..) => {
                metrics.changes_seen(Changed::Services, 1);
                News::Service
            }
            Change::EndpointSlice(key, slice) => {
                metrics.changes_seen(Changed::Endpoints, 1);
                News::Endpoints(slice.as_ref().and_then(|slice| Trigger::of(&key.namespace, slice)))
            }
            Change::Node(node) => {
                // After its deletion the Node as last seen counts.
                node.iter().for_each(|node| self.state.node_seen(node));
                News::Other
            }
            Change::ServiceCidr(..)
            | Change::Pod(..)
            | Change::AllPods
            | Change::LocalAddresses(_)
            | Change::Listeners(_) => News::Other,
        }
    }

    /// It is news, and waits to be written.
    pub fn waits(&mut self, news: News) {
        let metrics = self.state.metrics();
        match news {
            News::Service => {
                self.services_waiting += 1;
                metrics.changes_pending(Changed::Services, self.services_waiting);
            }
            News::Endpoints(trigger) => {
                self.endpoints_waiting += 1;
                metrics.changes_pending(Changed::Endpoints, self.endpoints_waiting);
                trigger.into_iter().for_each(|trigger| self.programming.wait(trigger));
            }
            News::Other => {}
        }
    }

    /// What an update brings is about to be written.
    pub fn computed(&mut self, services: &BTreeMap<ServiceKey, Option<WantedService>>) {
        self.no_local_endpoints.note(services);
    }

    /// Something is about to be written.
    pub fn queued(&self) {
        for family in Family::ALL {
            self.state.queued(family, Moment::now());
        }
    }

    /// A kind of object has a watch that works, or no longer.
    pub fn watch_is(&self, watch: WatchState) {
        let WatchState { plural, lost } = watch;
        let since = lost.map(|instant| {
            let wall = SystemTime::now().checked_sub(instant.elapsed());
            Moment { instant, wall: wall.unwrap_or(SystemTime::UNIX_EPOCH) }
        });
        self.state.watch_is(plural, since);
    }

    /// The source has a problem, or no longer.
    pub fn source_problem(&mut self, problem: SourceProblem) {
        self.source_problems.note(problem);
        let counts = self.source_problems.count_by_kind();
        let counts = counts.into_iter().map(|(kind, count)| (kind.label(), count));
        self.state.metrics().problems(ProblemOrigin::Source, counts);
    }

    /// What is wanted was written, or part of it could not be.
    pub fn synced<W: MapWriter>(
        &mut self,
        report: &Report,
        syncer: &Syncer<W>,
        model: &Model,
        is_first: bool,
        took: Duration,
    ) {
        let (now, metrics) = (Moment::now(), self.state.metrics());
        let kind = if is_first { SyncKind::Full } else { SyncKind::Partial };
        for family in Family::ALL {
            metrics.sync_took(family, kind, took);
            if syncer.is_failing() {
                self.state.write_failed(family, now);
            } else {
                self.state.written(family, now);
            }
        }
        // The first time this comes after the programs were attached.
        if !syncer.is_failing() {
            self.state.in_force();
        }
        for (family, triggered) in self.programming.written(|service| syncer.is_written(service)) {
            metrics.programmed(family, triggered, now.wall);
        }
        self.programming.forget(now.wall);
        (self.services_waiting, self.endpoints_waiting) = (0, 0);
        metrics.changes_pending(Changed::Services, 0);
        metrics.changes_pending(Changed::Endpoints, 0);
        for (side, family, count) in self.no_local_endpoints.sums() {
            metrics.no_local_endpoints(side, family, count);
        }
        let mut by_kind = BTreeMap::new();
        for problem in model.problems() {
            *by_kind.entry(problem.kind.word()).or_insert(0_usize) += 1;
        }
        metrics.problems(ProblemOrigin::Model, by_kind);
        let tables = syncer.tables();
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

    /// What is no longer used could not be freed.
    pub fn cleanup_failed(&self) {
        Family::ALL.into_iter().for_each(|family| self.state.metrics().cleanup_failed(family));
    }
}

/// What a change is about, for the measures.
pub enum News {
    Service,
    Endpoints(Option<Trigger>),
    Other,
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
