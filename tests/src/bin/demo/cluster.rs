//! The demo's cluster: three nodes with kproxy, nginx in two pods, HAProxy as the load balancer.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result};
use kproxy_lab::{
    Agent, Context, Elb, ElbSpec, Family, Frontend, Lab, Manifests, Member, Nginx, NodeSpec, Pod,
};

use crate::objects::{self, NODE_PORT, PORT, Variant};

/// The file with the Service, in the folder that the agents follow.
pub const SERVICE_FILE: &str = "service.yaml";

const BACKENDS: [&str; 2] = ["web-1", "web-2"];
/// Nodes that the load balancer must find healthy: the others have no pod of the Service.
pub const HEALTHY: [&str; 2] = ["node-a", "node-b"];

const SYNC_DEADLINE: Duration = Duration::from_secs(60);
const CHECK_DEADLINE: Duration = Duration::from_secs(20);

/// Everything that stands. Taken down when dropped.
#[derive(Debug)]
pub struct Cluster {
    /// The lab.
    pub lab: Lab,
    /// What the agents follow.
    pub manifests: Manifests,
    agents: Vec<Agent>,
    servers: Vec<Nginx>,
}

/// Somebody who asks.
#[derive(Clone, Debug)]
pub struct Client {
    /// In whose namespace and cgroup.
    pub member: Member,
    /// Who that is, for the table.
    pub title: String,
}

impl Cluster {
    /// Wires it up; nothing runs yet.
    pub fn build(ctx: &Context) -> Result<Self> {
        // As in a cloud: the load balancer knows the nodes only, and pods leave as their node.
        let lab = ctx.lab(|lab| {
            lab.node(NodeSpec::new("node-a", 1, &["web-1", "client-a"]).masquerade_pods())
                .node(NodeSpec::new("node-b", 2, &["web-2"]).masquerade_pods())
                .node(NodeSpec::new("node-c", 3, &["client-c"]).masquerade_pods())
                .elb(ElbSpec::new().without_pod_routes())
        })?;
        let manifests = Manifests::create(lab.folder(), "manifests")?;
        Ok(Self { lab, manifests, agents: Vec::new(), servers: Vec::new() })
    }

    /// The three who ask: a pod beside a backend, a pod on a node without one, a host.
    pub fn clients(&self) -> Result<[Client; 3]> {
        let pod = |name: &str, about: &str| -> Result<Client> {
            let pod = self.lab.pod(name)?;
            Ok(Client { member: (**pod).clone(), title: format!("pod on {} ({about})", pod.node_name()) })
        };
        let host = self.lab.node("node-c")?;
        Ok([
            pod("client-a", "has a backend")?,
            pod("client-c", "has none")?,
            Client { member: (**host).clone(), title: format!("host {} (has none)", host.name()) },
        ])
    }

    /// The pods with nginx, and their nodes.
    pub fn backends(&self) -> Result<BTreeMap<String, String>> {
        let pods = self.pods()?.into_iter();
        Ok(pods.map(|pod| (pod.name().to_owned(), pod.node_name().to_owned())).collect())
    }

    /// Starts nginx in its pods.
    pub fn start_servers(&mut self) -> Result<()> {
        for name in BACKENDS {
            self.servers.push(self.lab.pod(name)?.nginx(PORT)?);
        }
        Ok(())
    }

    /// Writes all objects into the folder.
    pub fn write_objects(&self) -> Result<()> {
        self.manifests.write("nodes.yaml", &objects::nodes(self.lab.nodes())?)?;
        self.manifests.write("endpointslices.yaml", &objects::endpoint_slices(&self.pods()?)?)?;
        self.write_service(Variant::NoAnnotation)
    }

    /// Starts an agent on each node, and waits until each has written what it was told.
    pub fn start_agents(&mut self) -> Result<()> {
        for node in self.lab.nodes() {
            let agent = node.agent().manifests(&self.manifests).start();
            self.agents.push(agent.with_context(|| format!("the agent of {}", node.name()))?);
        }
        self.wait_synced()
    }

    /// Starts HAProxy, and waits until its health checks have found out who serves.
    pub fn start_elb(&self) -> Result<()> {
        let elb = self.lab.elb()?;
        let frontends = Family::BOTH.map(|family| {
            let vips = elb.vips().iter().filter(|vip| vip.is_ipv4() == (family == Family::V4));
            let mut frontend = vips
                .fold(Frontend::new(frontend(family)), |made, vip| made.bind(SocketAddr::new(*vip, PORT)));
            for node in self.lab.nodes() {
                frontend = frontend.server(node.name(), SocketAddr::new(node.ip(family), NODE_PORT));
            }
            frontend
        });
        elb.configure(&frontends)?;
        for family in Family::BOTH {
            elb.wait_servers_up(frontend(family), &HEALTHY, CHECK_DEADLINE)
                .context("health checks of the NodePort, as they must come out under policy Local")?;
        }
        Ok(())
    }

    /// Replaces the Service, and waits until every agent has written the change.
    pub fn apply(&mut self, variant: Variant) -> Result<()> {
        for agent in &mut self.agents {
            agent.mark();
        }
        self.write_service(variant)?;
        self.wait_synced()
    }

    /// The load balancer.
    pub fn elb(&self) -> Result<&Elb> {
        self.lab.elb()
    }

    /// The Service's load-balancer address of a family.
    pub fn vip(&self, family: Family) -> Result<IpAddr> {
        let vips = self.elb()?.vips().iter().copied();
        vips.into_iter()
            .find(|vip| vip.is_ipv4() == (family == Family::V4))
            .context("the load balancer has an address of each family")
    }

    fn write_service(&self, variant: Variant) -> Result<()> {
        let service = objects::service(variant, self.elb()?.vips())?;
        self.manifests.write(SERVICE_FILE, &service)
    }

    fn wait_synced(&mut self) -> Result<()> {
        for agent in &mut self.agents {
            // Starting means that the verifier reads every program: long where others are at work.
            agent.wait_log("the agent being synced", SYNC_DEADLINE, |line| line.message == "synced")?;
        }
        Ok(())
    }

    fn pods(&self) -> Result<Vec<&Pod>> {
        BACKENDS.iter().map(|name| self.lab.pod(name)).collect()
    }
}

/// The load balancer's name for the Service's address of a family.
pub fn frontend(family: Family) -> &'static str {
    match family {
        Family::V4 => "nginx",
        Family::V6 => "nginx-v6",
    }
}
