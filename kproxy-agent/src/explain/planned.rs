//! Tables that were computed from objects: no kernel, no root, any machine.

use std::{cell::OnceCell, collections::HashMap, time::SystemTime};

use anyhow::Result;
use kproxy_common::{
    Address, AddressKind, Cidr, ClientKind, Config, FrontendKey, MAX_CIDRS, ServiceInfo, Tables as _,
    TrafficPolicy, in_cluster_cidr,
};

use super::{Ground, Place, Query, ServicePort};
use crate::{
    maps::{Reconciler, memory::Memory},
    model::{LeftOut, Model},
    plan::{Capacity, Tables, View},
};

/// What the programs are told that is no business of the model's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hooks {
    /// NodePorts answer the host on loopback addresses.
    pub loopback_node_ports: bool,
    /// The socket hooks leave pods alone.
    pub host_sockets_only: bool,
}

/// A model's wish, written to tables in memory by the agent's own planner.
pub struct Planned<'a> {
    model: &'a Model,
    tables: Tables,
    config: Config,
    /// On which other node an endpoint runs; filled in when the first pod asks.
    elsewhere: OnceCell<HashMap<Address, &'a str>>,
    /// What could not be written, as `Service: why`.
    failed: Vec<String>,
    /// The node that every client is on, as far as it is a pod.
    from_node: Option<String>,
}

impl<'a> Planned<'a> {
    /// What `model` wants as of its last update, where the programs are to do this.
    pub fn new(model: &'a Model, hooks: Hooks, capacity: Capacity) -> Self {
        let now = SystemTime::UNIX_EPOCH;
        let mut reconciler = Reconciler::new(Tables::new(capacity));
        reconciler
            .want_all(model.services().map(|wanted| (wanted.key.clone(), wanted.clone())).collect(), now);
        if let Some(node) = model.wanted_node() {
            reconciler.want_node_addresses(node.node_port_addresses.clone(), now);
        }
        let report = reconciler.run(&mut Memory::new(capacity), now);
        let failed = report.failed.into_iter().map(|(party, why)| format!("{party}: {why}")).collect();
        let config = config(model, hooks);
        Self {
            model,
            tables: reconciler.into_tables(),
            config,
            elsewhere: OnceCell::new(),
            failed,
            from_node: None,
        }
    }

    /// The same, where clients in cluster CIDRs are pods of this node, by its name.
    pub fn with_clients_on(self, node: Option<String>) -> Self {
        Self { from_node: node, ..self }
    }

    /// What does not fit into the tables, for people.
    pub fn failed(&self) -> &[String] {
        &self.failed
    }

    /// The pods that are opted out, with cookies that stand for those of their network namespaces.
    fn cookies(&self) -> impl Iterator<Item = (u64, &[Address])> {
        (1..).zip(self.model.opt_outs().pods.values().map(|addresses| &**addresses))
    }

    /// The tables.
    pub fn planned(&self) -> &Tables {
        &self.tables
    }
}

/// What the programs would know of the node, as far as a new connection depends on it.
fn config(model: &Model, Hooks { loopback_node_ports, host_sockets_only }: Hooks) -> Config {
    let table = |cidrs: &[Cidr]| {
        let mut table = [Cidr::NONE; MAX_CIDRS];
        table.iter_mut().zip(cidrs).for_each(|(place, cidr)| *place = *cidr);
        table
    };
    let service_cidrs = model.wanted_node().map_or(&[][..], |node| &node.service_cidrs);
    Config {
        loopback_node_ports: u16::from(loopback_node_ports),
        host_sockets_only: u8::from(host_sockets_only),
        some_opted_out: u8::from(!model.opt_outs().pods.is_empty()),
        service_cidrs: table(service_cidrs),
        cluster_cidrs: table(&model.config().cluster_cidrs),
        ..Config::EMPTY
    }
}

impl Ground for Planned<'_> {
    fn tables(&self) -> impl kproxy_common::Tables {
        View::new(&self.tables, self.config)
            .with_opted_out(self.cookies().map(|(cookie, _)| cookie).collect())
    }

    fn info(&self, number: u32) -> Option<ServiceInfo> {
        self.tables.info(number).copied()
    }

    fn frontends(&self) -> Vec<(FrontendKey, u32)> {
        self.tables.frontends().map(|(key, number)| (*key, number)).collect()
    }

    /// A client of a cluster CIDR, or of a podCIDR of the Node, is a pod: of this node, unless something says otherwise.
    fn place(&self, query: &Query) -> Place {
        let from = &query.from;
        let netns_cookie = self.cookies().find(|(_, addresses)| addresses.contains(from));
        let netns_cookie = netns_cookie.map_or(0, |(cookie, _)| cookie);
        let place = |behind, because: &str| Place { behind, because: because.to_owned(), netns_cookie };
        if from.is_loopback() {
            return place(ClientKind::Host, "a loopback address");
        }
        let tables = self.tables();
        let is_own = self.model.node_addresses().contains(from)
            || self.model.local_addresses().contains(from)
            || tables.address(from) == Some(AddressKind::NodePort);
        if is_own {
            return place(ClientKind::Host, "an address of this node");
        }
        let own = self.model.config().node_name.as_str();
        let is_in_own = self.model.pod_cidrs().iter().any(|cidr| is_in(cidr, from));
        if !is_in_own && !in_cluster_cidr(&tables, from) {
            return place(ClientKind::Outside, "neither this node's address nor in a cluster CIDR");
        }
        if let Some(node) = &self.from_node {
            return match node == own {
                true => place(ClientKind::Pod, "a pod of this node, as asked"),
                false => place(ClientKind::Outside, &format!("a pod of the node {node}, as asked")),
            };
        }
        if netns_cookie != 0 {
            return place(ClientKind::Pod, "a Pod of this node");
        }
        let elsewhere = self
            .elsewhere
            .get_or_init(|| self.model.endpoint_nodes().filter(|(_, node)| *node != own).collect());
        if let Some(node) = elsewhere.get(from) {
            return place(ClientKind::Outside, &format!("in a cluster CIDR, an endpoint on the node {node}"));
        }
        let has_own = self.model.pod_cidrs().iter().any(|cidr| cidr.address().is_v4() == from.is_v4());
        match (is_in_own, has_own) {
            (true, _) => place(ClientKind::Pod, "in a podCIDR of this node"),
            (false, true) => place(ClientKind::Outside, "in a cluster CIDR, in no podCIDR of this node"),
            (false, false) => place(ClientKind::Pod, "in a cluster CIDR, taken to be on this node"),
        }
    }

    fn left_out(&self, port: &ServicePort, set: TrafficPolicy) -> Option<Vec<LeftOut>> {
        let ServicePort { service, name, protocol, family } = port;
        Some(self.model.left_out(service, name, *protocol, *family, set))
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// Whether an address lies in a prefix of its family.
fn is_in(cidr: &Cidr, address: &Address) -> bool {
    cidr.address().is_v4() == address.is_v4() && cidr.contains(address)
}
