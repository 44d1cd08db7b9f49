//! What happens in the demo, in its order.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail};
use kproxy_lab::{Context, Family, NginxAnswer, Node, Socket, Worker};
use serde_json::Value;

use crate::cluster::{Client, Cluster, HEALTHY, frontend};
use crate::dump;
use crate::keep;
use crate::objects::{self, ANNOTATION, NODE_PORT, PORT, Variant};
use crate::observe::{Expected, Observation, curl, observe};
use crate::picture::picture;
use crate::table::{self, Row};
use crate::tell::{Style, Tell};

/// The node whose maps are shown: the one without a backend, where two of the clients are.
const LOOKED_AT: &str = "node-c";

const INTRODUCTION: &str = "\
A Service of type LoadBalancer is asked at its load balancer's address, from inside the cluster.
kube-proxy short-circuits that: the request goes straight to a pod, and the load balancer never sees
it. With an annotation, kproxy leaves it alone, so that it reaches the load balancer. See for yourself.";

const WHO_MAKES_WHAT: &str = "\
kproxy reads Services, EndpointSlices and Nodes. Controllers make the EndpointSlice of the
Deployment's pods, the API server adds NodePort and ClusterIP, the cloud the ELB's address: here
all of it lies in a folder that the agents follow.";

const HOW_TO_READ: &str = "  \
  it has no web pod, and externalTrafficPolicy is Local
Below, each nginx answers with its pod's name and the client's address that it sees; ELB is
HAProxy's own count of connections, before and after the request.";

/// Tells the whole story; an error if anything was not as it must be.
pub fn tell(ctx: &Context, keep: bool) -> Result<()> {
    let mut tell = Tell::new();
    tell.blank();
    tell.block(INTRODUCTION);
    tell.step("A cluster, in network namespaces of its own");
    let cluster = Cluster::build(ctx)?;
    let [vip, vip6] = [cluster.vip(Family::V4)?, cluster.vip(Family::V6)?];
    tell.block(&picture(
        &cluster.lab,
        &format!("HAProxy: {vip}:{PORT} → NodePort {NODE_PORT} of the nodes"),
    )?);
    tell.line(format!("Everybody has an IPv6 address as well; the load balancer's is {vip6}."));
    let backends = cluster.backends()?;
    let opened = BTreeMap::new();
    Story { tell, cluster, backends, opened, rows: Vec::new(), faults: Vec::new() }.go(keep)
}

struct Story {
    tell: Tell,
    cluster: Cluster,
    /// The pods with nginx, and their nodes.
    backends: BTreeMap<String, String>,
    /// Connections that were opened from each member to the load-balancer address of each family:
    /// short-circuited, and passed through.
    opened: BTreeMap<(String, Family), [u64; 2]>,
    rows: Vec<Row>,
    faults: Vec<String>,
}

/// An HTTP connection that is kept open.
struct Open {
    worker: Worker,
    socket: Socket,
    client: Client,
    first: NginxAnswer,
}

impl Story {
    fn go(mut self, keep: bool) -> Result<()> {
        self.set_up()?;
        self.tell.step(format!("The Service has {}", Variant::NoAnnotation.title()));
        self.round(Variant::NoAnnotation)?;
        let direct = self.open(Variant::NoAnnotation, "short-circuited")?;

        let on = format!("Switched on, with that connection open: {ANNOTATION}: \"true\"");
        self.switch(Variant::Annotation, &on)?;
        self.ask_again(&direct, "open connection")?;
        self.round(Variant::Annotation)?;
        self.ask(&self.elsewhere()?, Family::V6, Variant::Annotation)?;
        let through = self.open(Variant::Annotation, "through the ELB")?;

        self.switch(Variant::NoAnnotation, "Switched off again, with both connections open")?;
        self.ask_again(&direct, "opened short-circuited")?;
        self.ask_again(&through, "opened through the ELB")?;
        self.ask(&self.elsewhere()?, Family::V4, Variant::NoAnnotation)?;

        self.switch(Variant::IpModeProxy, "Without the annotation, but the cloud says ipMode: Proxy")?;
        self.round(Variant::IpModeProxy)?;
        self.end(keep)
    }

    fn set_up(&mut self) -> Result<()> {
        self.tell.step("What the user applies");
        let (deployment, service) = objects::written()?;
        self.tell.block(&beside(service, deployment));
        self.tell.blank();
        self.tell.block(WHO_MAKES_WHAT);
        self.cluster.start_servers()?;
        self.cluster.write_objects()?;

        self.tell.step("kproxy agent on every node, nginx in the web pods, HAProxy as the ELB");
        self.cluster.start_agents()?;
        self.tell.mark("the agents have written their maps", None);
        self.cluster.start_elb()?;
        let up = HEALTHY.join(" and ");
        self.tell.mark(
            format!("the ELB's health checks of NodePort {NODE_PORT} find {up} up, node-c down:"),
            None,
        );
        self.tell.block(HOW_TO_READ);
        Ok(())
    }

    /// A request from each client, for the table.
    fn round(&mut self, variant: Variant) -> Result<()> {
        for client in self.cluster.clients()? {
            let (observation, fault) = self.ask(&client, Family::V4, variant)?;
            self.rows.push(Row { variant, client: client.title, observation, fault });
        }
        Ok(())
    }

    /// A request on a connection of its own, and what is wrong with what came of it.
    fn ask(
        &mut self,
        client: &Client,
        family: Family,
        variant: Variant,
    ) -> Result<(Observation, Option<String>)> {
        let url = match self.cluster.vip(family)? {
            IpAddr::V4(vip) => format!("http://{vip}/"),
            IpAddr::V6(vip) => format!("http://[{vip}]/"),
        };
        let observation = self.observe(client, family, || curl(&client.member, &url))?;
        let fault = self.judge(&format!("curl {url}"), &observation, &self.expected(variant, family)?);
        Ok((observation, fault))
    }

    /// Opens a connection, which is kept, and asks on it.
    fn open(&mut self, variant: Variant, how: &str) -> Result<Option<Open>> {
        let client = self.elsewhere()?;
        self.tell.step(format!("{} opens a keep-alive connection, {how}", client.member.name()));
        let worker = client.member.worker()?;
        let vip = self.cluster.vip(Family::V4)?;
        let mut opened = None;
        let observation = self.observe(&client, Family::V4, || {
            let socket = worker.tcp_connect(SocketAddr::new(vip, PORT))?;
            opened = Some(socket);
            Ok(worker.http_get(socket.id, &vip.to_string())?)
        })?;
        self.judge("GET /", &observation, &self.expected(variant, Family::V4)?);
        // Without an answer there is nothing to keep, which was noted as wrong just now.
        Ok(opened.zip(observation.answer.ok()).map(|(socket, first)| Open { worker, socket, client, first }))
    }

    /// Asks again on an open connection, which must go on as it began.
    fn ask_again(&mut self, open: &Option<Open>, which: &str) -> Result<()> {
        let Some(Open { worker, socket, client, first }) = open else {
            return Ok(());
        };
        let vip = self.cluster.vip(Family::V4)?;
        let observation =
            self.observe(client, Family::V4, || Ok(worker.http_get(socket.id, &vip.to_string())?))?;
        self.judge(&format!("GET /, {which}"), &observation, &Expected::AsBefore(first.clone()));
        Ok(())
    }

    fn observe(
        &self,
        client: &Client,
        family: Family,
        request: impl FnOnce() -> Result<String>,
    ) -> Result<Observation> {
        let address = client.member.ip(family);
        observe(self.cluster.elb()?, frontend(family), client.member.name(), address, request)
    }

    /// What a new connection must look like.
    fn expected(&self, variant: Variant, family: Family) -> Result<Expected> {
        if !variant.passes_through() {
            return Ok(Expected::Direct);
        }
        let elb = self.cluster.elb()?.ip(family);
        Ok(Expected::ThroughElb { elb, backends: self.backends.clone() })
    }

    /// Says what was seen, and notes what is wrong with it.
    fn judge(&mut self, what: &str, seen: &Observation, expected: &Expected) -> Option<String> {
        let fault = seen.fault(expected);
        let way = match expected {
            Expected::Direct => Some(0),
            Expected::ThroughElb { .. } => Some(1),
            Expected::AsBefore(_) => None,
        };
        if let Some(way) = way {
            let family = if seen.address.is_ipv4() { Family::V4 } else { Family::V6 };
            self.opened.entry((seen.client.clone(), family)).or_default()[way] += 1;
        }
        let text = match &seen.answer {
            Ok(answer) => format!("pod={} client={}", answer.pod, answer.client),
            Err(_) => String::from("no answer"),
        };
        let what = format!("{}: {what}", seen.client);
        let elb = if seen.address.is_ipv6() { "ELB (IPv6)" } else { "ELB" };
        self.tell.mark(format!("{what:<42}  {text:<31}  {elb} {}", seen.count()), fault.as_deref());
        self.faults.extend(fault.iter().map(|fault| format!("{what}: {fault}")));
        fault
    }

    /// Whether kproxy counted what was done above, at each load-balancer address.
    fn compare_counts(&mut self, node: &Node) -> Result<()> {
        let text = node.kproxy(&["services", "nginx", "-o", "json"])?.success()?;
        let services: Value = serde_json::from_str(&text).context("kproxy services printed strange JSON")?;
        let frontends = services["items"][0]["frontends"].as_array();
        let frontends = frontends.context("kproxy services lists no frontends of nginx")?;
        let on_node: Vec<_> = self
            .cluster
            .lab
            .pods()
            .filter(|pod| pod.node_name() == node.name())
            .map(|pod| pod.name())
            .collect();
        for family in Family::BOTH {
            let vip = self.cluster.vip(family)?.to_string();
            let frontend = frontends.iter().find(|frontend| frontend["address"] == vip.as_str());
            let frontend = frontend.with_context(|| format!("kproxy services lists no frontend at {vip}"))?;
            let count = |name: &str| {
                frontend[name].as_u64().with_context(|| format!("kproxy services tells no {name} of {vip}"))
            };
            let counted = [count("connections")?, count("passThroughConnections")?];
            let mut done = [0; 2];
            for ((name, _), counts) in self.opened.iter().filter(|((_, of), _)| *of == family) {
                if name == node.name() || on_node.contains(&name.as_str()) {
                    done = [done[0] + counts[0], done[1] + counts[1]];
                }
            }
            let what = format!(
                "{vip}: from here, {} connections above were short-circuited, {} passed through",
                done[0], done[1]
            );
            let fault =
                (counted != done).then(|| format!("kproxy counted {} and {}", counted[0], counted[1]));
            self.tell.mark(&what, fault.as_deref());
            self.faults.extend(fault.map(|fault| format!("{what}: {fault}")));
        }
        Ok(())
    }

    /// The client whose node has no backend.
    fn elsewhere(&self) -> Result<Client> {
        let [_, client, _] = self.cluster.clients()?;
        Ok(client)
    }

    /// Replaces the Service.
    fn switch(&mut self, variant: Variant, title: &str) -> Result<()> {
        self.tell.step(title);
        self.cluster.apply(variant)
    }

    fn end(mut self, keep: bool) -> Result<()> {
        self.tell.step("What each request met");
        table::print(&self.tell, &self.rows);

        let node = self.cluster.lab.node(LOOKED_AT)?.clone();
        self.tell.step(format!("kproxy services, on {}", node.name()));
        self.tell.block(&node.kproxy(&["services"])?.success()?);
        self.compare_counts(&node)?;

        self.tell.step("The same in its maps, as bpftool reads them");
        dump::print(&self.tell, &node, self.cluster.vip(Family::V4)?, PORT)?;

        self.tell.blank();
        if self.faults.is_empty() {
            let seconds = self.tell.elapsed().as_secs_f64();
            let text = format!("Every request took the way it must. {seconds:.1} s.");
            self.tell.line(self.tell.style(Style::Good, text));
        } else {
            self.tell.line(self.tell.style(Style::Bad, "Not every request took the way it must."));
        }
        if keep {
            keep::stand(&mut self.tell, &self.cluster)?;
        }
        if !self.faults.is_empty() {
            bail!("not as it must be:\n  {}", self.faults.join("\n  "));
        }
        Ok(())
    }
}

/// Two texts as columns.
fn beside(left: &str, right: &str) -> String {
    let width = left.lines().map(|line| line.chars().count()).max().unwrap_or(0);
    let height = left.lines().count().max(right.lines().count());
    let line = |text: &str, index: usize| text.lines().nth(index).unwrap_or("").to_owned();
    let rows = (0..height).map(|index| format!("{:<width$}    {}", line(left, index), line(right, index)));
    rows.collect::<Vec<_>>().join("\n")
}
