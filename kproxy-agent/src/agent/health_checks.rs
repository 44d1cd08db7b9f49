//! The Services' health checks, on their way from the model's updates to the listeners.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use tokio::sync::watch;

use crate::{
    model::{WantedHealthCheck, WantedNode, objects::Family},
    servers::{HealthCheck, HealthCheckListeners, HealthCheckPorts, State},
    wanted::ServiceKey,
};

/// What is to be answered, and what is.
pub struct HealthChecks {
    state: State,
    pending: Pending,
    addresses: BTreeSet<IpAddr>,
    addresses_changed: bool,
    listeners: watch::Sender<Listen>,
}

/// Where the listeners are to be.
#[derive(Clone, Default, Debug)]
struct Listen {
    ports: HealthCheckPorts,
    addresses: BTreeSet<IpAddr>,
}

impl HealthChecks {
    /// Nothing is answered yet. Must be called in a tokio runtime.
    pub fn new(state: State, mut listeners: HealthCheckListeners) -> Self {
        let (sender, mut receiver) = watch::channel(Listen::default());
        // Of its own: closing a listener takes until its connections are told.
        tokio::spawn(async move {
            while receiver.changed().await.is_ok() {
                let Listen { ports, addresses } = receiver.borrow_and_update().clone();
                listeners.sync(&ports, &addresses).await;
            }
        });
        Self {
            state,
            pending: Pending::default(),
            addresses: BTreeSet::new(),
            addresses_changed: false,
            listeners: sender,
        }
    }

    /// Takes in what an update brings.
    pub fn note(
        &mut self,
        changes: BTreeMap<ServiceKey, Option<WantedHealthCheck>>,
        node: Option<&WantedNode>,
    ) {
        self.pending.changes.extend(changes);
        if let Some(node) = node {
            let addresses = node.node_port_addresses.iter().copied().map(IpAddr::from).collect();
            self.addresses_changed |= self.addresses != addresses;
            self.addresses = addresses;
        }
    }

    /// Answers accordingly, as far as the tables are written: `is_written` says of which Services they are.
    pub fn answer(&mut self, is_written: impl Fn(&ServiceKey) -> bool) {
        let settled = self.pending.settle(is_written);
        let mut listen_elsewhere = std::mem::take(&mut self.addresses_changed);
        // What goes before what comes: a port may pass from one Service to another.
        for (_, before, after) in &settled {
            let is_same =
                |check: &WantedHealthCheck| after.as_ref().is_some_and(|after| after.port == check.port);
            if let Some(check) = before.as_ref().filter(|check| !is_same(check)) {
                self.state.set_health_check(check.port, None);
            }
        }
        for (service, before, after) in settled {
            listen_elsewhere |= before.as_ref().map(places) != after.as_ref().map(places);
            if let Some(WantedHealthCheck { port, local_endpoints }) = after {
                self.state.set_health_check(port, Some(HealthCheck { service, local_endpoints }));
            }
        }
        if listen_elsewhere {
            let ports = self.pending.answered.values().map(places).collect();
            self.listeners.send_replace(Listen { ports, addresses: self.addresses.clone() });
        }
    }
}

/// The port, and the families that it is answered over.
fn places(check: &WantedHealthCheck) -> (u16, BTreeSet<Family>) {
    (check.port, check.local_endpoints.keys().copied().collect())
}

/// Health checks, and changes of them that are not told yet.
#[derive(Default, Debug)]
struct Pending {
    answered: BTreeMap<ServiceKey, WantedHealthCheck>,
    changes: BTreeMap<ServiceKey, Option<WantedHealthCheck>>,
}

/// Whose health check, as it was answered, and as it is from now on.
type Settled = (ServiceKey, Option<WantedHealthCheck>, Option<WantedHealthCheck>);

impl Pending {
    /// What can be told now. That a Service is here is not told before the tables say so, or the load balancer
    /// would send what nobody serves; that it leaves is told at once.
    fn settle(&mut self, is_written: impl Fn(&ServiceKey) -> bool) -> Vec<Settled> {
        let answered = &self.answered;
        let can_be_told = |service: &ServiceKey, change: &mut Option<WantedHealthCheck>| {
            is_written(service) || !is_more(answered.get(service), change.as_ref())
        };
        let told: Vec<_> = self.changes.extract_if(.., can_be_told).collect();
        let settle = |(service, after): (ServiceKey, Option<WantedHealthCheck>)| {
            let before = match &after {
                Some(check) => self.answered.insert(service.clone(), check.clone()),
                None => self.answered.remove(&service),
            };
            (service, before, after)
        };
        told.into_iter().map(settle).collect()
    }
}

/// Whether a load balancer would send more than before.
fn is_more(before: Option<&WantedHealthCheck>, after: Option<&WantedHealthCheck>) -> bool {
    let before = before.filter(|before| after.is_some_and(|after| after.port == before.port));
    let count_before =
        |family| before.and_then(|check| check.local_endpoints.get(family)).copied().unwrap_or(0);
    after.is_some_and(|after| {
        after.local_endpoints.iter().any(|(family, count)| *count > count_before(family))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str) -> ServiceKey {
        ServiceKey { namespace: "default".to_owned(), name: name.to_owned() }
    }

    fn check(port: u16, count: u32) -> WantedHealthCheck {
        WantedHealthCheck { port, local_endpoints: [(Family::V4, count), (Family::V6, 0)].into() }
    }

    #[test]
    fn more_is_told_when_it_is_written_and_less_at_once() {
        let mut pending = Pending::default();
        let mut after = |change: Option<WantedHealthCheck>, is_written: bool| {
            pending.changes.extend(change.map(|check| (service("web"), Some(check))));
            pending.settle(|_| is_written);
            pending.answered.get(&service("web")).cloned()
        };
        assert_eq!(after(Some(check(32_000, 2)), false), None);
        assert_eq!(after(None, true), Some(check(32_000, 2)));
        assert_eq!(after(Some(check(32_000, 3)), false), Some(check(32_000, 2)));
        assert_eq!(after(Some(check(32_000, 1)), false), Some(check(32_000, 1)), "the later change counts");
        assert_eq!(after(None, true), Some(check(32_000, 1)));
        // On another port nothing was answered.
        assert_eq!(after(Some(check(32_001, 1)), false), Some(check(32_000, 1)));
        assert_eq!(after(None, true), Some(check(32_001, 1)));
    }

    #[test]
    fn what_goes_is_let_go_at_once() {
        let mut pending = Pending::default();
        pending.changes.insert(service("web"), Some(check(32_000, 1)));
        pending.settle(|_| true);
        pending.changes.insert(service("web"), None);
        pending.settle(|_| false);
        assert!(pending.answered.is_empty() && pending.changes.is_empty(), "{pending:?}");
    }
}
