//! The agent's HTTP servers: health, metrics, and the Services' health checks, with kube-proxy's paths, status
//! codes, bodies and names.
//!
//! What they answer is a function of [`State`], which the agent's loop tells what happens; [`Servers`] and
//! [`HealthCheckListeners`] are the sockets in front of it.

mod address;
mod configz;
mod exposition;
mod health;
mod health_checks;
mod listen;
mod listeners;
mod metrics;
mod readings;
mod routes;
#[cfg(test)]
mod testing;

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use self::listen::{Bind, Listening, News, RETRY, listen};
pub use self::{
    address::{BindAddress, BindAddressError},
    configz::{KubeProxyConfiguration, configz},
    health::{FamilyReport, Health, HealthReport, Moment, TIMEOUT},
    health_checks::{HealthCheck, HealthCheckAnswer},
    listeners::{HealthCheckListeners, HealthCheckPorts, ListenFailure, ListenNews},
    metrics::{Changed, Metrics, PolicySide, ProblemOrigin, SyncKind},
    readings::{Read, Readings, ServiceCounters},
    routes::PROXY_MODE,
};
use crate::{api::Node, model::objects::Family, wanted::ServiceKey};

/// What the servers know. Cheap to clone; all clones are the same.
#[derive(Clone, Debug)]
pub struct State(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    health: Mutex<Health>,
    health_checks: Mutex<BTreeMap<u16, HealthCheck>>,
    /// Where health checks should be answered and no listener can be bound.
    unbound: Mutex<BTreeMap<SocketAddr, ListenFailure>>,
    metrics: Metrics,
    configz: String,
    /// Why the node is not ready, as the log has it.
    logged: Mutex<Vec<String>>,
}

impl State {
    /// Of an agent that starts serving these families: healthy, its node not seen yet. `configz` is the body of
    /// [`configz`].
    pub fn new(
        families: impl IntoIterator<Item = Family>,
        now: Moment,
        metrics: Metrics,
        configz: String,
    ) -> Self {
        Self(Arc::new(Inner {
            health: Mutex::new(Health::new(families, now)),
            health_checks: Mutex::default(),
            unbound: Mutex::default(),
            metrics,
            configz,
            logged: Mutex::default(),
        }))
    }

    /// Everything that is counted and measured.
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// A change came that is to be written.
    pub fn queued(&self, family: Family, now: Moment) {
        self.health().queued(family, now);
        self.0.metrics.queued(family, now.wall);
    }

    /// Everything that waited is written.
    pub fn written(&self, family: Family, now: Moment) {
        self.health().written(family, now);
        self.0.metrics.written(family, now.wall);
    }

    /// Something could not be written and is tried again.
    pub fn write_failed(&self, family: Family, now: Moment) {
        self.health().write_failed(family, now);
        self.0.metrics.write_failed(family);
    }

    /// The own Node came or changed. When it is deleted, nothing is called: the last one seen counts.
    pub fn node_seen(&self, node: &Node) {
        self.health().node_seen(node);
    }

    /// The first full lists are in force.
    pub fn in_force(&self) {
        self.health().in_force();
    }

    /// Since when there has been no working watch of a kind of object (`services`); `None`: there is one.
    pub fn watch_is(&self, plural: &'static str, lost: Option<Moment>) {
        self.health().watch_is(plural, lost);
    }

    /// What `/readyz` answers.
    pub fn readyz(&self, now: Moment) -> HealthReport {
        let report = self.health().readyz(now);
        self.log(&report.reasons);
        report
    }

    /// What `/healthz` answers; counts the answer.
    pub fn healthz(&self, now: Moment) -> HealthReport {
        let report = self.health().healthz(now);
        self.log(&report.reasons);
        self.0.metrics.healthz_answered(status(&report));
        report
    }

    /// What `/livez` answers; counts the answer.
    pub fn livez(&self, now: Moment) -> HealthReport {
        let report = self.health().livez(now);
        self.0.metrics.livez_answered(status(&report));
        report
    }

    /// What a listener of `family` on this `healthCheckNodePort` answers; `None` if no Service has the port.
    pub fn health_check(&self, port: u16, family: Family, now: Moment) -> Option<HealthCheckAnswer> {
        let is_healthy = self.health().is_healthy(now);
        self.health_checks().get(&port).map(|check| check.answer(family, is_healthy))
    }

    /// Logs why the node is not ready, once for each reason.
    fn log(&self, reasons: &[String]) {
        let mut logged = self.0.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if *logged == reasons {
            return;
        }
        for reason in reasons.iter().filter(|reason| !logged.contains(reason)) {
            tracing::warn!("not ready: {reason}");
        }
        if reasons.is_empty() {
            tracing::info!("ready");
        }
        *logged = reasons.to_vec();
    }

    fn configz(&self) -> String {
        self.0.configz.clone()
    }

    /// What is answered on this `healthCheckNodePort` from now on; `None`: no Service has it.
    pub fn set_health_check(&self, port: u16, check: Option<HealthCheck>) {
        let mut checks = self.health_checks();
        match check {
            Some(check) => checks.insert(port, check),
            None => checks.remove(&port),
        };
    }

    fn health_check_service(&self, port: u16) -> Option<ServiceKey> {
        self.health_checks().get(&port).map(|check| check.service.clone())
    }

    /// A health check's listener cannot be opened.
    fn set_unbound(&self, failure: ListenFailure) {
        let mut unbound = self.unbound();
        unbound.insert(failure.address, failure);
        self.count_unbound(unbound.len());
    }

    /// A health check's listener is open, or not wanted any more: why it could not be opened before, if so.
    fn take_unbound(&self, address: SocketAddr) -> Option<ListenFailure> {
        let mut unbound = self.unbound();
        let failure = unbound.remove(&address);
        self.count_unbound(unbound.len());
        failure
    }

    fn count_unbound(&self, count: usize) {
        self.0.metrics.problems(ProblemOrigin::Server, [("health-check-node-port", count)]);
    }

    // What is locked is whole between any two statements, so a panic elsewhere does not spoil it.

    fn health(&self) -> MutexGuard<'_, Health> {
        self.0.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unbound(&self) -> MutexGuard<'_, BTreeMap<SocketAddr, ListenFailure>> {
        self.0.unbound.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn health_checks(&self) -> MutexGuard<'_, BTreeMap<u16, HealthCheck>> {
        self.0.health_checks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The two servers of the agent itself; they are closed when this is dropped.
#[derive(Debug)]
pub struct Servers {
    _listening: Vec<Listening>,
}

impl Servers {
    /// Serves from now on. An address that cannot be bound is logged and tried again every five seconds; it
    /// never stops the agent. `tell` is told why not, and (`None`) when it works. Must be called in a tokio runtime.
    pub fn start(
        state: &State,
        healthz: BindAddress,
        metrics: BindAddress,
        tell: impl Fn(Server, Option<String>) + Clone + Send + 'static,
    ) -> Self {
        let healthz = healthz.get().map(|address| serve_healthz(state, address, tell.clone()));
        let metrics = metrics.get().map(|address| serve_metrics(state, address, tell));
        Self { _listening: healthz.into_iter().chain(metrics).collect() }
    }
}

/// One of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Server {
    /// `/healthz`, `/livez` and `/readyz`.
    Healthz,
    /// `/metrics` and the like.
    Metrics,
}

fn serve_healthz(
    state: &State,
    address: SocketAddr,
    tell: impl Fn(Server, Option<String>) + Send + 'static,
) -> Listening {
    let report = reporter(Server::Healthz, address, tell);
    listen(Bind::Both(address), routes::healthz(state), RETRY, report)
}

fn serve_metrics(
    state: &State,
    address: SocketAddr,
    tell: impl Fn(Server, Option<String>) + Send + 'static,
) -> Listening {
    let report = reporter(Server::Metrics, address, tell);
    listen(Bind::Both(address), routes::metrics(state), RETRY, report)
}

fn reporter(
    server: Server,
    address: SocketAddr,
    tell: impl Fn(Server, Option<String>) + Send + 'static,
) -> impl Fn(News<'_>) + Send + 'static {
    let (name, flag) = match server {
        Server::Healthz => ("healthz", "--healthz-bind-address"),
        Server::Metrics => ("metrics", "--metrics-bind-address"),
    };
    move |news| match news {
        News::Failed(error) => {
            let text = format!(
                "the {name} server cannot listen on {address}: {error}. {}, or give another address with {flag}; it is \
                 tried again every {} s, everything else goes on",
                mend(error),
                RETRY.as_secs()
            );
            tracing::error!("{text}");
            tell(server, Some(text));
        }
        News::Listening(address) => {
            tracing::info!("the {name} server listens on {address}");
            tell(server, None);
        }
    }
}

fn mend(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "End the program that has the port (is kube-proxy still running on this node?)"
        }
        io::ErrorKind::AddrNotAvailable => "Give the node this address",
        io::ErrorKind::PermissionDenied => "Let the agent bind ports below 1024 (CAP_NET_BIND_SERVICE)",
        _ => "Mend that",
    }
}

fn status(report: &HealthReport) -> u16 {
    if report.is_ok() { 200 } else { 503 }
}

#[cfg(test)]
mod tests;
