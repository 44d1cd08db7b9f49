//! Which backends serve which UDP Service ports, so that what leads elsewhere can move.

use std::collections::{BTreeMap, BTreeSet};

use kproxy_common::{Address, Backend, Protocol};

use crate::{plan::Tables, wanted::ServiceKey};

/// A backend: address and port.
type Endpoint = (Address, u16);

/// Ready or serving backends of UDP Service ports. A flow or a connected socket that leads to another one moves, while
/// there is one to move to.
#[derive(Clone, Default, Debug)]
pub struct Serving {
    ports: BTreeMap<u32, BTreeSet<Endpoint>>,
    of: BTreeMap<ServiceKey, BTreeSet<u32>>,
}

impl Serving {
    /// Takes in how a Service stands in the tables now. Whether something may have to move.
    pub fn update(&mut self, tables: &Tables, service: &ServiceKey) -> bool {
        let mut ports: BTreeMap<u32, BTreeSet<Endpoint>> = BTreeMap::new();
        for frontend in tables.frontends_of(service) {
            let entry = (frontend.protocol() == Protocol::Udp)
                .then(|| tables.number(&frontend))
                .flatten()
                .and_then(|number| tables.entry(number));
            let Some(entry) = entry else { continue };
            let first = entry.block.first_slot();
            let slots = first..first.saturating_add(u32::from(entry.block.serving()));
            let backends = slots.filter_map(|slot| tables.backend(slot));
            let endpoints = backends.map(|backend: Backend| (backend.address(), backend.port()));
            ports.entry(entry.identity.service()).or_default().extend(endpoints);
        }
        self.replace(service, ports)
    }

    /// Whether what leads from Service port `port` (its identity) to this backend must move: it serves no more, and
    /// another one does. Of Services that are gone nothing is known, and nothing moves.
    pub fn must_move(&self, port: u32, backend: Address, backend_port: u16) -> bool {
        self.ports
            .get(&port)
            .is_some_and(|serving| !serving.is_empty() && !serving.contains(&(backend, backend_port)))
    }

    /// Of one Service with one port, as tests need it.
    #[cfg(test)]
    pub(super) fn of_port(port: u32, serving: &[(Address, u16)]) -> Self {
        let key = ServiceKey { namespace: "default".to_owned(), name: "dns".to_owned() };
        let mut all = Self::default();
        all.replace(&key, [(port, serving.iter().copied().collect())].into());
        all
    }

    fn replace(&mut self, service: &ServiceKey, ports: BTreeMap<u32, BTreeSet<Endpoint>>) -> bool {
        let gone = self.of.remove(service).unwrap_or_default();
        let before: BTreeMap<u32, BTreeSet<Endpoint>> =
            gone.iter().filter_map(|port| Some((*port, self.ports.remove(port)?))).collect();
        let must_look = ports.iter().any(|(port, now)| match before.get(port) {
            // Where none served before, flows may lead to any that once did.
            Some(before) => !now.is_empty() && (before.is_empty() || !before.is_subset(now)),
            None => !now.is_empty(),
        });
        if !ports.is_empty() {
            self.of.insert(service.clone(), ports.keys().copied().collect());
        }
        self.ports.extend(ports);
        must_look
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str) -> ServiceKey {
        ServiceKey { namespace: "default".to_owned(), name: name.to_owned() }
    }

    fn endpoint(last: u32) -> Endpoint {
        (Address::from_v4_word(last), 53)
    }

    fn ports(all: &[(u32, &[u32])]) -> BTreeMap<u32, BTreeSet<Endpoint>> {
        all.iter().map(|(port, last)| (*port, last.iter().copied().map(endpoint).collect())).collect()
    }

    #[test]
    fn only_what_leads_to_a_backend_that_serves_no_more_moves_and_only_to_another() {
        let (mut serving, dns) = (Serving::default(), service("dns"));
        let moves = |serving: &Serving, last| {
            let (address, port) = endpoint(last);
            serving.must_move(7, address, port)
        };
        assert!(
            serving.replace(&dns, ports(&[(7, &[1, 2])])),
            "new here: flows from before may lead elsewhere"
        );
        assert!(!moves(&serving, 1) && !moves(&serving, 2) && moves(&serving, 3));
        assert!(!serving.replace(&dns, ports(&[(7, &[1, 2, 3])])), "one more takes nothing away");
        assert!(serving.replace(&dns, ports(&[(7, &[1, 3])])));
        assert!(moves(&serving, 2) && !moves(&serving, 3));
        // The port of a backend counts too.
        assert!(serving.must_move(7, endpoint(1).0, 54));
        assert!(!serving.replace(&dns, ports(&[(7, &[])])), "nowhere to move to");
        assert!(!moves(&serving, 1) && !moves(&serving, 2));
        assert!(serving.replace(&dns, ports(&[(7, &[4])])), "now there is");
        assert!(moves(&serving, 1) && !moves(&serving, 4));
        // Another Service port is not concerned.
        assert!(!serving.must_move(8, endpoint(1).0, 53));
        assert!(!serving.replace(&dns, ports(&[])), "gone");
        assert!(!moves(&serving, 1));
        assert!(serving.ports.is_empty() && serving.of.is_empty());
    }
}
