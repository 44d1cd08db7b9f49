//! Which endpoints a Service port has, and which of them are in its two sets (`CategorizeEndpoints` of
//! kube-proxy).

use kproxy_common::{Address, BackendState, Location};

use super::objects::{Endpoint, EndpointSlice, Family, Hints, ServicePort};
use crate::wanted::WantedBackend;

/// How far a block of backends can count.
pub const MAX_BACKENDS: usize = u16::MAX as usize;

/// What about this node decides on endpoints.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The node's name.
    pub node: &'a str,
    /// Its zone.
    pub zone: Option<&'a str>,
}

/// The sets that the frontends of a port lead to. What no frontend leads to is not kept apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Uses {
    /// The cluster set.
    pub cluster: bool,
    /// The local set.
    pub local: bool,
}

/// A run of backends: offset and count.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Run {
    /// Counted from the first backend.
    pub offset: u16,
    /// How many.
    pub count: u16,
}

/// The endpoints of one Service port in one family, in the order of a block: only in the cluster set, in both,
/// only in the local set, in none; within each by address and port.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EndpointSets {
    /// All that are ready or serving.
    pub backends: Vec<WantedBackend>,
    /// How many of them are in a set.
    pub in_sets: u16,
    /// The cluster set.
    pub cluster: Run,
    /// The local set.
    pub local: Run,
    /// Whether there is an endpoint anywhere: ready, or serving and terminating.
    pub has_any: bool,
    /// How many more there are than a block can hold.
    pub left_out: usize,
}

/// The sets of `port` in `family`, out of the Service's slices in the order of their names.
pub fn endpoint_sets<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    place: Place<'_>,
    uses: Uses,
) -> EndpointSets {
    let endpoints = collect(port, family, slices, place);
    let topology = Topology::of(&endpoints, place);
    let is_cluster = cluster_set(&endpoints, topology, place);
    let is_local = local_set(&endpoints);
    let class = |endpoint: &Candidate<'_>| match (
        uses.cluster && is_cluster(endpoint),
        uses.local && is_local(endpoint),
    ) {
        (true, false) => CLUSTER_ONLY,
        (true, true) => BOTH,
        (false, true) => LOCAL_ONLY,
        (false, false) => NEITHER,
    };
    let has_any = endpoints.iter().any(Candidate::is_endpoint);
    let mut sorted: Vec<_> = endpoints.iter().map(|endpoint| (class(endpoint), endpoint)).collect();
    // Stable: within a class by address and port, as collected.
    sorted.sort_by_key(|(class, _)| *class);
    let left_out = sorted.len().saturating_sub(MAX_BACKENDS);
    sorted.truncate(MAX_BACKENDS);

    let mut counts = [0_u16; 4];
    for (class, _) in &sorted {
        counts[*class] += 1;
    }
    let [cluster_only, both, local_only, _] = counts;
    EndpointSets {
        backends: sorted.iter().map(|(_, endpoint)| endpoint.backend()).collect(),
        in_sets: cluster_only + both + local_only,
        cluster: Run { offset: 0, count: cluster_only + both },
        local: Run { offset: cluster_only, count: both + local_only },
        has_any,
        left_out,
    }
}

const CLUSTER_ONLY: usize = 0;
const BOTH: usize = 1;
const LOCAL_ONLY: usize = 2;
const NEITHER: usize = 3;

/// An endpoint under one of its ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Candidate<'a> {
    pub address: Address,
    pub port: u16,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub is_local: bool,
    pub hints: Option<&'a Hints>,
}

/// Every address and port once, sorted; without those that neither take connections nor serve what they have.
fn collect<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    place: Place<'_>,
) -> Vec<Candidate<'a>> {
    let mut found = Vec::new();
    for slice in slices.filter(|slice| slice.family == family) {
        found.extend(candidates(port, slice, place).map(|(candidate, _)| candidate));
    }
    merge(&mut found);
    found.retain(|endpoint| endpoint.ready || endpoint.serving);
    found
}

/// The endpoints of one slice under every port of it that matches.
pub(super) fn candidates<'a, 'p>(
    port: &'p ServicePort,
    slice: &'a EndpointSlice,
    place: Place<'p>,
) -> impl Iterator<Item = (Candidate<'a>, &'a Endpoint)> + use<'a, 'p> {
    let matches = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
    matches.flat_map(move |slice_port| {
        slice.endpoints.iter().map(move |endpoint| {
            let candidate = Candidate {
                address: endpoint.address,
                port: slice_port.number,
                ready: endpoint.ready,
                serving: endpoint.serving,
                terminating: endpoint.terminating,
                is_local: endpoint.node.as_deref() == Some(place.node),
                hints: endpoint.hints.as_deref(),
            };
            (candidate, endpoint)
        })
    })
}

/// Sorted by address and port, each once. An endpoint that moves from slice to slice is in both for a while: the
/// one that is not terminating counts, even if it is not ready; of equal ones, since the sort is stable, the first.
pub(super) fn merge(found: &mut Vec<Candidate<'_>>) {
    found.sort_by_key(|endpoint| (endpoint.address, endpoint.port, endpoint.terminating));
    found.dedup_by_key(|endpoint| (endpoint.address, endpoint.port));
}

impl Candidate<'_> {
    /// Ready counts as it stands, also when terminating: that is what publishNotReadyAddresses needs.
    fn is_endpoint(&self) -> bool {
        self.ready || self.is_last_resort()
    }

    pub fn is_last_resort(&self) -> bool {
        self.serving && self.terminating
    }

    fn is_for_node(&self, place: Place<'_>) -> bool {
        self.hints.is_some_and(|hints| hints.nodes.iter().any(|node| **node == *place.node))
    }

    fn is_for_zone(&self, zone: &str) -> bool {
        self.hints.is_some_and(|hints| hints.zones.iter().any(|hint| **hint == *zone))
    }

    fn backend(&self) -> WantedBackend {
        WantedBackend {
            address: self.address,
            port: self.port,
            location: if self.is_local { Location::Local } else { Location::Remote },
            state: if self.ready { BackendState::Ready } else { BackendState::Terminating },
        }
    }
}

/// Which hints restrict the cluster set. A restriction holds only where every ready endpoint has a hint of its
/// sort: a few without one mean that the controller is still at work, and the hints cannot be trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Topology {
    None,
    Node,
    Zone,
}

impl Topology {
    pub fn of(endpoints: &[Candidate<'_>], place: Place<'_>) -> Self {
        let (mut all_nodes, mut all_zones) = (true, true);
        let (mut this_node, mut this_zone) = (false, false);
        for endpoint in endpoints.iter().filter(|endpoint| endpoint.ready) {
            all_nodes &= endpoint.hints.is_some_and(|hints| !hints.nodes.is_empty());
            all_zones &= endpoint.hints.is_some_and(|hints| !hints.zones.is_empty());
            if !all_nodes && !all_zones {
                return Self::None;
            }
            this_node |= endpoint.is_for_node(place);
            this_zone |= place.zone.is_some_and(|zone| endpoint.is_for_zone(zone));
        }
        if all_nodes && this_node {
            return Self::Node;
        }
        if all_zones && this_zone { Self::Zone } else { Self::None }
    }

    fn allows(self, endpoint: &Candidate<'_>, place: Place<'_>) -> bool {
        match self {
            Self::None => true,
            Self::Node => endpoint.is_for_node(place),
            Self::Zone => place.zone.is_some_and(|zone| endpoint.is_for_zone(zone)),
        }
    }
}

/// Ready endpoints after topology; without any, those that are serving and terminating.
pub(super) fn cluster_set<'a>(
    endpoints: &[Candidate<'_>],
    topology: Topology,
    place: Place<'a>,
) -> impl Fn(&Candidate<'_>) -> bool + use<'a> {
    // Topology leaves at least one of the ready endpoints, so it need not be asked here.
    let any_ready = endpoints.iter().any(|endpoint| endpoint.ready);
    move |endpoint| {
        if any_ready { endpoint.ready && topology.allows(endpoint, place) } else { endpoint.is_last_resort() }
    }
}

/// Ready endpoints on this node; without any, those on this node that are serving and terminating.
pub(super) fn local_set(endpoints: &[Candidate<'_>]) -> impl Fn(&Candidate<'_>) -> bool + use<> {
    let any_ready = endpoints.iter().any(|endpoint| endpoint.is_local && endpoint.ready);
    move |endpoint| endpoint.is_local && if any_ready { endpoint.ready } else { endpoint.is_last_resort() }
}
