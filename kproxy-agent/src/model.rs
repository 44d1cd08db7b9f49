//! From Kubernetes objects to what each Service wants in the tables: the rules of kube-proxy as plain values.
//!
//! Pure: no clock, no I/O. [`Model::apply`] takes what happened, [`Model::recompute`] says what follows from
//! it. Every Service is computed by the same code from the same inputs, whether one object changed or all are
//! new; what is incremental is only the choice of the Services that are looked at.

mod change;
mod claims;
mod compute;
mod config;
mod endpoint_sets;
mod frontends;
mod health_check;
mod left_out;
mod local_addresses;
mod node;
pub mod objects;
pub mod parse;
mod pass_through;
mod problem;

pub use change::Change;
pub use config::{NodeConfig, NodePortAddresses, PassThroughConfig, PassThroughScope};
pub use health_check::WantedHealthCheck;
pub use left_out::LeftOut;
pub use local_addresses::{LocalAddresses, leftover_of};
pub use node::WantedNode;
pub use problem::{ObjectKind, ObjectRef, Problem, ProblemKind};

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use kproxy_common::{Address, Cidr, FrontendKey, Protocol, TrafficPolicy};

use crate::api;
use crate::wanted::{ServiceKey, WantedOptOuts, WantedService};
use claims::{Claimant, Claims};
use compute::{Computed, Context, compute};
use endpoint_sets::Place;
use objects::{EndpointSlice, Family, Node, ServedBy, Service};
use parse::Parsed;

/// All Services and endpoints of the cluster, as this node sees them.
#[derive(Debug, Default)]
pub struct Model {
    config: NodeConfig,
    node: Node,
    /// The node's own addresses, out of `config` and `node`.
    node_addresses: Vec<Address>,
    local_addresses: LocalAddresses,
    listeners: Option<BTreeSet<FrontendKey>>,
    service_cidrs: BTreeMap<String, Vec<Cidr>>,
    services: HashMap<Arc<ServiceKey>, Entry>,
    /// By the slice's key, the Service that it belongs to.
    slice_owners: HashMap<ServiceKey, Arc<ServiceKey>>,
    frontends: Claims<FrontendKey>,
    addresses: Claims<Address>,
    /// Services that a change may have changed, each once.
    affected: Vec<Arc<ServiceKey>>,
    /// What the last [`recompute`](Self::recompute) said of the node.
    wanted_node: Option<WantedNode>,
    current_opt_outs: WantedOptOuts,
    /// What the last update said of them.
    opt_outs: WantedOptOuts,
    problems: Problems,
}

/// What follows from the changes since the last update.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Update {
    /// The Services that want something else now; `None`: nothing any more.
    pub services: BTreeMap<ServiceKey, Option<WantedService>>,
    /// The Services whose health checks are answered otherwise now; `None`: not any more.
    pub health_checks: BTreeMap<ServiceKey, Option<WantedHealthCheck>>,
    /// What the node wants, if that changed. The first update has it always.
    pub node: Option<WantedNode>,
    /// Which Pods are opted out of the socket hooks, if that changed.
    pub opt_outs: Option<WantedOptOuts>,
    /// Problems that were not there before, sorted.
    pub new_problems: Vec<Problem>,
    /// Problems that are no more, sorted.
    pub gone_problems: Vec<Problem>,
}

/// One Service's name: the Service, if it is there, and all that was said about it.
#[derive(Debug, Default)]
struct Entry {
    service: Option<Service>,
    slices: BTreeMap<Box<str>, EndpointSlice>,
    /// What is entered in the model's claims, each sorted and once.
    frontends: Box<[FrontendKey]>,
    addresses: Box<[Address]>,
    /// What the last update said.
    wanted: Option<WantedService>,
    health_check: Option<WantedHealthCheck>,
    is_affected: bool,
}

impl Model {
    /// A model without objects.
    pub fn new(config: NodeConfig) -> Self {
        let node_addresses = node::own_addresses(&config, &Node::default());
        let local_addresses = config.local_addresses.clone();
        let listeners = Some(BTreeSet::new());
        Self { config, node_addresses, local_addresses, listeners, ..Self::default() }
    }

    /// Takes in what happened to one object.
    pub fn apply(&mut self, change: Change) {
        self.take_in(change);
    }

    /// As [`apply`](Self::apply); says whether it is known already, so that nothing follows from it. Only of Services and
    /// EndpointSlices: of the rest it says no.
    pub fn take_in(&mut self, change: Change) -> bool {
        match change {
            Change::Service(key, service) => return self.apply_service(key, service.as_deref()),
            Change::EndpointSlice(key, slice) => return self.apply_slice(key, slice.as_deref()),
            Change::Node(node) => self.apply_node(node.as_deref()),
            Change::ServiceCidr(name, object) => {
                let parsed = object.map(|object| parse::service_cidr(&name, &object));
                let (ranges, problems) = split(parsed);
                self.problems.set(ObjectRef::service_cidr(&name), Stage::Parsed, problems);
                match ranges {
                    Some(ranges) => self.service_cidrs.insert(name, ranges),
                    None => self.service_cidrs.remove(&name),
                };
            }
            Change::Pod(key, pod) => {
                let (addresses, problems) = split(pod.map(|pod| parse::pod(&key, &pod, &self.config)));
                self.problems.set(ObjectRef::pod(&key), Stage::Parsed, problems);
                match addresses.flatten() {
                    Some(addresses) => self.current_opt_outs.pods.insert(key, addresses),
                    None => self.current_opt_outs.pods.remove(&key),
                };
            }
            Change::AllPods => self.current_opt_outs.is_complete = true,
            Change::LocalAddresses(addresses) => {
                let changed = addresses.changed(&self.local_addresses);
                self.affect_at(&changed);
                self.local_addresses = addresses;
            }
            Change::Listeners(listeners) => {
                let keys = |listeners: &Option<BTreeSet<FrontendKey>>| match listeners {
                    Some(keys) => keys.iter().map(FrontendKey::address).collect(),
                    None => self.standing_cluster_ips(),
                };
                let all: Vec<_> = keys(&self.listeners).union(&keys(&listeners)).copied().collect();
                if self.listeners != listeners {
                    self.affect_at(&all);
                    self.listeners = listeners;
                }
            }
        }
        false
    }

    /// What follows from everything that was applied since the last call.
    pub fn recompute(&mut self) -> Update {
        let moved = self.frontends.settle();
        self.affect(moved);
        let moved = self.addresses.settle();
        self.affect(moved);
        let mut update = Update::default();
        let affected = std::mem::take(&mut self.affected).into_iter();
        let changed = affected.filter_map(|key| {
            Some(((*key).clone(), self.recompute_service(&key, &mut update.health_checks)?))
        });
        update.services = changed.collect();
        let node = self.recompute_node();
        if self.wanted_node.as_ref() != Some(&node) {
            self.wanted_node = Some(node.clone());
            update.node = Some(node);
        }
        if self.opt_outs != self.current_opt_outs {
            self.opt_outs.clone_from(&self.current_opt_outs);
            update.opt_outs = Some(self.opt_outs.clone());
        }
        (update.new_problems, update.gone_problems) = self.problems.take_changes();
        update
    }

    /// The node's own addresses: as given, else the Node object's.
    pub fn node_addresses(&self) -> &[Address] {
        &self.node_addresses
    }

    /// All problems there were at the last update, by object.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.reported.values().flatten()
    }

    /// Every Service that wants something, as of the last update; in no order.
    pub fn services(&self) -> impl Iterator<Item = &WantedService> {
        self.services.values().filter_map(|entry| entry.wanted.as_ref())
    }

    /// What the node wants, as of the last update.
    pub fn wanted_node(&self) -> Option<&WantedNode> {
        self.wanted_node.as_ref()
    }

    /// Which Pods are opted out of the socket hooks, as of the last update.
    pub fn opt_outs(&self) -> &WantedOptOuts {
        &self.opt_outs
    }

    /// The node's configuration.
    pub fn config(&self) -> &NodeConfig {
        &self.config
    }

    /// The Node's `spec.podCIDRs`: where pods of this node have their addresses, as far as that is known.
    pub fn pod_cidrs(&self) -> &[Cidr] {
        &self.node.pod_cidrs
    }

    /// The addresses on its interfaces, as far as they were told.
    pub fn local_addresses(&self) -> &LocalAddresses {
        &self.local_addresses
    }

    /// Every endpoint's address, and the node that it says it runs on; those that say none are left out.
    pub fn endpoint_nodes(&self) -> impl Iterator<Item = (Address, &str)> {
        let slices = self.services.values().flat_map(|entry| entry.slices.values());
        let endpoints = slices.flat_map(|slice| &slice.endpoints);
        endpoints.filter_map(|endpoint| Some((endpoint.address, endpoint.node.as_deref()?)))
    }

    /// Which endpoints of a Service port are not in its cluster set or its local set, and why. Empty for a
    /// Service or a port that is not there.
    pub fn left_out(
        &self,
        service: &ServiceKey,
        port_name: &str,
        protocol: Protocol,
        family: Family,
        set: TrafficPolicy,
    ) -> Vec<LeftOut> {
        let Some(entry) = self.services.get(service) else { return Vec::new() };
        let ports = entry.service.iter().flat_map(|service| &service.ports);
        let Some(port) = ports.into_iter().find(|p| *p.name == *port_name && p.protocol == protocol) else {
            return Vec::new();
        };
        left_out::left_out(port, family, &entry.slices, self.place(), set)
    }

    /// The `spec.ports[].port` of a Service port.
    pub fn port_number(&self, service: &ServiceKey, port_name: &str, protocol: Protocol) -> Option<u16> {
        let service = self.services.get(service)?.service.as_ref()?;
        let is_it = |port: &&objects::ServicePort| *port.name == *port_name && port.protocol == protocol;
        service.ports.iter().find(is_it).map(|port| port.port)
    }

    /// The ClusterIPs that stand on interfaces of this node, leftovers of other proxies aside: what processes listen on at
    /// these is left to them.
    pub fn standing_cluster_ips(&self) -> BTreeSet<Address> {
        self.local_addresses.iter().filter(|address| self.addresses.is_claimed(address)).copied().collect()
    }

    fn place(&self) -> Place<'_> {
        Place { node: &self.config.node_name, zone: self.node.zone.as_deref() }
    }

    fn affect(&mut self, keys: impl IntoIterator<Item = Arc<ServiceKey>>) {
        for key in keys {
            if let Some(entry) = self.services.get_mut(&key) {
                entry.affect(key, &mut self.affected);
            }
        }
    }

    /// Affects the Services that have one of `addresses` as their ClusterIP or their load balancer's.
    fn affect_at(&mut self, addresses: &[Address]) {
        // Of pods' interfaces come and go addresses that no Service has.
        let addresses: Vec<_> = addresses.iter().filter(|address| !is_link_local(address)).collect();
        if addresses.is_empty() {
            return;
        }
        for (key, entry) in &mut self.services {
            let Some(service) = &entry.service else { continue };
            let load_balancers = service.load_balancers.iter().map(|load_balancer| &load_balancer.address);
            if service.cluster_ips.iter().chain(load_balancers).any(|ip| addresses.contains(&ip)) {
                entry.affect(Arc::clone(key), &mut self.affected);
            }
        }
    }

    fn apply_service(&mut self, key: ServiceKey, service: Option<&api::Service>) -> bool {
        let key = self.services.get_key_value(&key).map_or_else(|| Arc::new(key), |(key, _)| Arc::clone(key));
        let extra = &self.config.pass_through.extra_annotations;
        let (service, problems) = split(service.map(|service| parse::service(&key, service, extra)));
        self.problems.set(ObjectRef::service(&key), Stage::Parsed, problems);
        // One that has neither ports nor addresses for us need not be kept.
        let service = service.filter(|service| service.served_by != ServedBy::Nobody);
        let entry = match self.services.get_mut(&key) {
            Some(entry) => entry,
            None if service.is_none() => return true,
            None => self.services.entry(Arc::clone(&key)).or_default(),
        };
        if entry.service == service {
            return true;
        }
        let claimant = |service: &Service| Claimant { created: service.created, service: Arc::clone(&key) };
        let before = entry.service.as_ref().map(claimant);
        let after = service.as_ref().map(claimant);
        let (frontends, addresses) = match &service {
            Some(service) => claimed(service, &self.config),
            None => Default::default(),
        };
        move_claims(&mut self.frontends, &entry.frontends, &frontends, before.as_ref(), after.as_ref());
        move_claims(&mut self.addresses, &entry.addresses, &addresses, before.as_ref(), after.as_ref());
        (entry.service, entry.frontends, entry.addresses) = (service, frontends, addresses);
        entry.affect(key, &mut self.affected);
        false
    }

    fn apply_slice(&mut self, key: ServiceKey, slice: Option<&api::EndpointSlice>) -> bool {
        let (slice, problems) = split(slice.map(|slice| parse::endpoint_slice(&key, slice)));
        self.problems.set(ObjectRef::endpoint_slice(&key), Stage::Parsed, problems);
        let slice = slice.flatten();
        let owner = slice.as_ref().map(|slice| {
            let owner = ServiceKey { namespace: key.namespace.clone(), name: (*slice.service).to_owned() };
            self.services.get_key_value(&owner).map_or_else(|| Arc::new(owner), |(key, _)| Arc::clone(key))
        });
        let name = key.name.as_str();
        if let Some(before) = self.slice_owners.get(&key)
            && owner.as_ref() != Some(before)
            && let Some(entry) = self.services.get_mut(before)
        {
            entry.slices.remove(name);
            entry.affect(Arc::clone(before), &mut self.affected);
        }
        let (Some(slice), Some(owner)) = (slice, owner) else {
            return self.slice_owners.remove(&key).is_none();
        };
        let entry = self.services.entry(Arc::clone(&owner)).or_default();
        if entry.slices.get(name) == Some(&slice) {
            return true;
        }
        entry.slices.insert(name.into(), slice);
        entry.affect(Arc::clone(&owner), &mut self.affected);
        self.slice_owners.insert(key, owner);
        false
    }

    fn apply_node(&mut self, node: Option<&api::Node>) {
        let name =
            |node: &api::Node| node.metadata.get().and_then(|metadata| metadata.name()).map(str::to_owned);
        let is_other = |node: &api::Node| name(node).as_deref() != Some(self.config.node_name.as_str());
        if node.is_some_and(is_other) {
            return;
        }
        let (node, problems) = split(node.map(parse::node));
        self.problems.set(ObjectRef::node(&self.config.node_name), Stage::Parsed, problems);
        let node = node.unwrap_or_default();
        // A Node changes every few seconds: its zone and addresses hardly ever do.
        if node == self.node {
            return;
        }
        self.node_addresses = node::own_addresses(&self.config, &node);
        self.node = node;
        for (key, entry) in &mut self.services {
            entry.affect(Arc::clone(key), &mut self.affected);
        }
    }

    /// Every health check, as of the last update; in no order.
    pub fn health_checks(&self) -> impl Iterator<Item = (&ServiceKey, &WantedHealthCheck)> {
        self.services.iter().filter_map(|(key, entry)| Some((&**key, entry.health_check.as_ref()?)))
    }

    /// What the Service wants, if that changed; its health check goes into `health_checks`, if that did.
    fn recompute_service(
        &mut self,
        key: &Arc<ServiceKey>,
        health_checks: &mut BTreeMap<ServiceKey, Option<WantedHealthCheck>>,
    ) -> Option<Option<WantedService>> {
        let entry = self.services.get_mut(key)?;
        entry.is_affected = false;
        let context = Context {
            config: &self.config,
            place: Place { node: &self.config.node_name, zone: self.node.zone.as_deref() },
            node_addresses: &self.node_addresses,
            local_addresses: &self.local_addresses,
            listeners: self.listeners.as_ref(),
            frontends: &self.frontends,
            addresses: &self.addresses,
        };
        let Computed { wanted, health_check, problems } = match &entry.service {
            Some(service) => compute(service, &entry.slices, &context),
            None => Computed::default(),
        };
        self.problems.set(ObjectRef::service(key), Stage::Computed, problems);
        if entry.health_check != health_check {
            entry.health_check.clone_from(&health_check);
            health_checks.insert((**key).clone(), health_check);
        }
        let changed = (entry.wanted != wanted).then(|| {
            entry.wanted.clone_from(&wanted);
            wanted
        });
        if entry.service.is_none() && entry.slices.is_empty() {
            self.services.remove(key);
        }
        changed
    }

    fn recompute_node(&mut self) -> WantedNode {
        let (service_cidrs, problems) = node::service_cidrs(&self.config, &self.service_cidrs);
        self.problems.set(ObjectRef::node(&self.config.node_name), Stage::Computed, problems);
        let node_port_addresses = node::node_port_addresses(
            &self.config,
            &self.node_addresses,
            &self.local_addresses,
            &self.addresses,
        );
        WantedNode { node_port_addresses, service_cidrs }
    }
}

impl Entry {
    /// Puts `key`, which is this entry's, among the affected ones.
    fn affect(&mut self, key: Arc<ServiceKey>, affected: &mut Vec<Arc<ServiceKey>>) {
        if !std::mem::replace(&mut self.is_affected, true) {
            affected.push(key);
        }
    }
}

/// The keys that a Service claims, each sorted and once.
fn claimed(service: &Service, config: &NodeConfig) -> (Box<[FrontendKey]>, Box<[Address]>) {
    let frontends = frontends::frontends(service, config).claimed;
    let mut frontends: Vec<_> = frontends.iter().map(|frontend| frontend.key).collect();
    frontends.extend(health_check::health_check_keys(service));
    frontends.sort_unstable();
    frontends.dedup();
    // Without repetition already: parsing sees to that.
    let mut addresses = service.cluster_ips.clone();
    addresses.sort_unstable();
    (frontends.into_boxed_slice(), addresses)
}

/// Enters what is claimed after a change in place of what was before; both sorted.
fn move_claims<K: Copy + Ord + std::hash::Hash>(
    claims: &mut Claims<K>,
    keys_before: &[K],
    keys_after: &[K],
    before: Option<&Claimant>,
    after: Option<&Claimant>,
) {
    let is_same = before == after;
    if let Some(before) = before {
        let gone = keys_before.iter().filter(|key| !is_same || keys_after.binary_search(key).is_err());
        gone.for_each(|key| claims.remove(*key, before));
    }
    if let Some(after) = after {
        let new = keys_after.iter().filter(|key| !is_same || keys_before.binary_search(key).is_err());
        new.for_each(|key| claims.add(*key, after.clone()));
    }
}

fn is_link_local(address: &Address) -> bool {
    matches!(std::net::IpAddr::from(*address), std::net::IpAddr::V6(v6) if v6.is_unicast_link_local())
}

fn split<T>(parsed: Option<Parsed<T>>) -> (Option<T>, Vec<Problem>) {
    parsed.map_or((None, Vec::new()), |Parsed { value, problems }| (Some(value), problems))
}

/// In which step a problem is found: each step replaces what it said before.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Stage {
    Parsed,
    Computed,
}

/// The problems of all objects, and what of them is news.
#[derive(Debug, Default)]
struct Problems {
    current: BTreeMap<(ObjectRef, Stage), Vec<Problem>>,
    reported: BTreeMap<ObjectRef, BTreeSet<Problem>>,
    touched: BTreeSet<ObjectRef>,
}

impl Problems {
    /// `problems` are all that `stage` finds wrong with `object`.
    fn set(&mut self, object: ObjectRef, stage: Stage, problems: Vec<Problem>) {
        let key = (object, stage);
        let before = if problems.is_empty() {
            // Nearly always there were none, and then nothing is allocated.
            self.current.remove(&key)
        } else {
            self.current.insert(key.clone(), problems)
        };
        if before.is_some() || self.current.contains_key(&key) {
            self.touched.insert(key.0);
        }
    }

    /// What came and what went since the last call.
    fn take_changes(&mut self) -> (Vec<Problem>, Vec<Problem>) {
        let (mut new, mut gone) = (Vec::new(), Vec::new());
        for object in std::mem::take(&mut self.touched) {
            let stages =
                [Stage::Parsed, Stage::Computed].map(|stage| self.current.get(&(object.clone(), stage)));
            let now: BTreeSet<Problem> = stages.into_iter().flatten().flatten().cloned().collect();
            let before = self.reported.remove(&object).unwrap_or_default();
            new.extend(now.difference(&before).cloned());
            gone.extend(before.difference(&now).cloned());
            if !now.is_empty() {
                self.reported.insert(object, now);
            }
        }
        // Most stand sorted already: only what the node says of ServiceCIDRs does not.
        new.sort();
        gone.sort();
        (new, gone)
    }
}
