//! Which endpoints a set leaves out, and why: for people who ask. The sets are those of [`super::endpoint_sets`],
//! asked once more about each endpoint.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use kproxy_common::TrafficPolicy;

use super::endpoint_sets::{Candidate, Place, Topology, candidates, cluster_set, local_set, merge};
use super::objects::{Endpoint, EndpointSlice, Family, ServicePort};

/// Something that a set does not have.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct LeftOut {
    /// An endpoint as `ip:port`, or a whole EndpointSlice by name.
    pub what: String,
    /// Why not, in a few words.
    pub why: String,
}

/// What of `slices` is not in the cluster or the local set of `port` in `family`.
pub(super) fn left_out(
    port: &ServicePort,
    family: Family,
    slices: &BTreeMap<Box<str>, EndpointSlice>,
    place: Place<'_>,
    set: TrafficPolicy,
) -> Vec<LeftOut> {
    let mut left_out = Vec::new();
    let mut all = Vec::new();
    for (name, slice) in slices {
        match unmatched(port, family, slice) {
            Some(why) => left_out.push(LeftOut { what: format!("EndpointSlice {name}"), why }),
            None => all.extend(candidates(port, slice, place).map(|found| (name, found))),
        }
    }
    let mut counting: Vec<Candidate<'_>> = all.iter().map(|(_, (candidate, _))| *candidate).collect();
    merge(&mut counting);
    let mut asked = counting.clone();
    asked.retain(|endpoint| endpoint.ready || endpoint.serving);
    let topology = Topology::of(&asked, place);
    let (is_cluster, is_local) = (cluster_set(&asked, topology, place), local_set(&asked));
    let is_in = |candidate: &Candidate<'_>| match set {
        TrafficPolicy::Cluster => is_cluster(candidate),
        TrafficPolicy::Local => is_local(candidate),
    };
    let at = |candidate: &Candidate<'_>| (candidate.address, candidate.port);
    let mut said = BTreeMap::new();
    for (slice, (candidate, endpoint)) in &all {
        let counts = counting.binary_search_by_key(&at(candidate), at).map(|index| &counting[index]);
        let why = match counts {
            Ok(other) if other != candidate => {
                format!(
                    "as it stands in EndpointSlice {slice}: the same address and port is in another, which counts"
                )
            }
            _ if is_in(candidate) => continue,
            _ => why(candidate, endpoint, topology, place, set),
        };
        said.entry((at(candidate), why)).or_insert(());
    }
    left_out.extend(said.into_keys().map(|((address, port), why)| LeftOut {
        what: SocketAddr::new(address.into(), port).to_string(),
        why,
    }));
    left_out
}

/// Why nothing of a slice can be meant for this port.
fn unmatched(port: &ServicePort, family: Family, slice: &EndpointSlice) -> Option<String> {
    if slice.family != family {
        return Some(format!(
            "its addresses are {}, the frontend's is {}",
            slice.family.text(),
            family.text()
        ));
    }
    let of_protocol: Vec<_> = slice
        .ports
        .iter()
        .filter(|other| other.protocol == port.protocol)
        .map(|other| &*other.name)
        .collect();
    if of_protocol.is_empty() {
        return Some(format!("it has no {} port", port.protocol));
    }
    if of_protocol.contains(&&*port.name) {
        return None;
    }
    Some(format!("its {} ports are called {of_protocol:?}, the Service's {:?}", port.protocol, port.name))
}

/// Why an endpoint that counts is not in the set.
fn why(
    candidate: &Candidate<'_>,
    endpoint: &Endpoint,
    topology: Topology,
    place: Place<'_>,
    set: TrafficPolicy,
) -> String {
    if set == TrafficPolicy::Local && !candidate.is_local {
        return match endpoint.node.as_deref() {
            Some(node) => format!("not on this node, but on {node}"),
            None => "not on this node: it names none".to_owned(),
        };
    }
    if !candidate.ready && !candidate.is_last_resort() {
        return if candidate.terminating {
            "not ready: terminating, and no longer serving"
        } else {
            "not ready"
        }
        .to_owned();
    }
    if !candidate.ready {
        let among = if set == TrafficPolicy::Local { " on this node" } else { "" };
        return format!("terminating, and others{among} are ready");
    }
    let names = |names: &[Box<str>]| names.join(", ");
    match (topology, candidate.hints) {
        (Topology::Node, Some(hints)) => {
            format!("its hints name the node {}; others name this one", names(&hints.nodes))
        }
        (Topology::Zone, Some(hints)) => format!(
            "its hints name the zone {}; others name this node's, {}",
            names(&hints.zones),
            place.zone.unwrap_or_default()
        ),
        _ => "its hints are for others".to_owned(),
    }
}
