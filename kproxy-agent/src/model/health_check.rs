//! What a `healthCheckNodePort` tells a load balancer: how many endpoints of the Service are on this node
//! (`LocalReadyEndpoints` of kube-proxy).

use std::collections::{BTreeMap, BTreeSet};

use kproxy_common::{Address, FrontendKey, Protocol};

use super::endpoint_sets::Place;
use super::objects::{EndpointSlice, Family, Service};

/// The health check of a Service of type LoadBalancer with externalTrafficPolicy Local.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WantedHealthCheck {
    /// `spec.healthCheckNodePort`, host order.
    pub port: u16,
    /// For each family of the Service how many distinct addresses of ready endpoints are on this node. Those that
    /// only terminate do not count: the load balancer is to leave before they do.
    pub local_endpoints: BTreeMap<Family, u32>,
}

/// Where `service` wants to be asked for its health: the port of each of its families.
pub fn health_check_keys(service: &Service) -> impl Iterator<Item = FrontendKey> {
    let key =
        |(port, family): (u16, &Family)| FrontendKey::node_port(&family.unspecified(), port, Protocol::Tcp);
    let families = service.families.iter();
    service
        .health_check_node_port
        .into_iter()
        .flat_map(move |port| families.clone().map(move |f| key((port, f))))
}

/// How many addresses in `family` have a ready endpoint on this node, on any port of the slices, also one that
/// the Service does not have: as kube-proxy counts.
pub fn local_endpoints<'a>(
    family: Family,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    place: Place<'_>,
) -> u32 {
    let mut found = Vec::new();
    for slice in slices.filter(|slice| slice.family == family) {
        for port in &slice.ports {
            found.extend(slice.endpoints.iter().map(|endpoint| {
                let key = (&*port.name, port.protocol, endpoint.address, port.number);
                (key, endpoint.terminating, endpoint)
            }));
        }
    }
    // Of what is twice the one that is not terminating counts, as in the sets.
    found.sort_by_key(|(key, terminating, _)| (*key, *terminating));
    found.dedup_by_key(|(key, ..)| *key);
    let is_counted =
        |endpoint: &super::objects::Endpoint| endpoint.ready && endpoint.node.as_deref() == Some(place.node);
    let counted = found.iter().filter(|(.., endpoint)| is_counted(endpoint));
    let addresses: BTreeSet<Address> = counted.map(|(.., endpoint)| endpoint.address).collect();
    u32::try_from(addresses.len()).unwrap_or(u32::MAX)
}
