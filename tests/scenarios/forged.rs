//! What strangers say in the names of a connection's ends, and what the tables lose: neither ends
//! what is under way.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use etherparse::PacketBuilder;
use kproxy_common::{FlowKey, Hook, Protocol};
use kproxy_lab::worker::Id;
use kproxy_lab::{Context, Family, HostSpec, Node, NodeSpec, UPLINK, Wire, Worker};

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, eventually};
use crate::flows::flows;
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::strangers_end_no_connection", strangers),
    ("kproxy::flows_whose_entries_are_evicted_go_on", evicted),
];

const NODE_PORT: u16 = 30_080;
const FAR_NODE_PORT: u16 = 30_081;

/// Somebody who knows both ports of open connections, masqueraded and not, sends RST and SYN in
/// their client's name.
fn strangers(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
            .node(NodeSpec::new("node-b", 2, &["b1", "b2"]))
            .client("client")
            .host(HostSpec::new("stranger", 101))
    })?;
    let near = |pod| -> Result<Service> {
        Ok(Service::new("near", 10).tcp(80, TARGET).node_port(NODE_PORT).pods(&[pod]))
    };
    let far = |pod| -> Result<Service> {
        Ok(Service::new("far", 11).tcp(80, TARGET).node_port(FAR_NODE_PORT).pods(&[pod]))
    };
    let services = [near(lab.pod("a2")?)?, far(lab.pod("b1")?)?];
    let others = [near(lab.pod("a1")?)?, far(lab.pod("b2")?)?];
    let mut cluster = Cluster::start(lab, &["node-a"], &[], &services)?;
    let _servers = cluster.servers(&["a1", "a2", "b1", "b2"])?;
    let node = cluster.node("node-a")?.clone();
    let outside = Client::at(cluster.lab.host("client")?)?;
    let mut open = Vec::new();
    for family in Family::BOTH {
        for (port, server) in [(NODE_PORT, "a2"), (FAR_NODE_PORT, "b1")] {
            open.push(Open::to(&outside.worker, SocketAddr::new(node.ip(family), port), server)?);
        }
    }
    let mut steps = Steps::new();
    // Whoever comes now goes elsewhere.
    cluster.change(|cluster| others.iter().try_for_each(|service| cluster.put(service)))?;
    for (port, server) in [(NODE_PORT, "a1"), (FAR_NODE_PORT, "b2")] {
        for family in Family::BOTH {
            let answer = outside.worker.ask_tcp(SocketAddr::new(node.ip(family), port))?;
            ensure!(answer.server == server, "{answer:?}, not {server}");
        }
    }
    let wire = cluster.lab.host("stranger")?.wire(UPLINK)?;
    let mac = node.mac(UPLINK)?;
    for one in &open {
        steps.step(&format!("{} to {} at {}", one.local, one.to, one.server), || {
            one.must_go_on(&outside.worker)?;
            for round in 0..3 {
                for flags in [Flags::Rst, Flags::Syn, Flags::Rst] {
                    one.forge(&wire, mac, flags, 1_000_000_000 * round)?;
                    one.must_go_on(&outside.worker)?;
                }
            }
            eventually("the flow to be established again", || {
                one.must_go_on(&outside.worker)?;
                let rows = flows(&node, &["--client", &one.local.to_string()])?;
                let [row] = &rows[..] else { anyhow::bail!("one flow: {rows:#?}") };
                let is_back = row["state"] == "established" && row["table"] == "established";
                Ok(is_back.then_some(()))
            })
        });
    }
    steps.done()
}

#[derive(Clone, Copy)]
enum Flags {
    Syn,
    Rst,
}

/// An open connection.
struct Open {
    id: Id,
    local: SocketAddr,
    to: SocketAddr,
    server: &'static str,
}

impl Open {
    fn to(worker: &Worker, to: SocketAddr, server: &'static str) -> Result<Self> {
        let socket = worker.tcp_connect(to)?;
        let open = Self { id: socket.id, local: socket.local, to, server };
        open.must_go_on(worker)?;
        Ok(open)
    }

    fn must_go_on(&self, worker: &Worker) -> Result<()> {
        let answer = worker
            .tcp_ask(self.id, "still there")
            .with_context(|| format!("{} to {}", self.local, self.to))?;
        ensure!(answer.server == self.server, "{answer:?}");
        Ok(())
    }

    /// A packet in the client's name, with a sequence number that is none of the connection's.
    fn forge(&self, wire: &Wire, of: [u8; 6], flags: Flags, number: u32) -> Result<()> {
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], of);
        let builder = match (self.local.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => builder.ipv4(from.octets(), to.octets(), 64),
            (IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), 64),
            _ => anyhow::bail!("two families"),
        };
        let builder = builder.tcp(self.local.port(), self.to.port(), number, 64_240);
        let builder = match flags {
            Flags::Syn => builder.syn(),
            Flags::Rst => builder.rst(),
        };
        let mut frame = Vec::new();
        builder.write(&mut frame, &[])?;
        wire.send(&frame)
    }
}

/// Each entry of a masqueraded UDP flow is taken away in turn, as the kernel does where it makes
/// room.
fn evicted(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &[])).node(NodeSpec::new("node-b", 2, &["b1"])).client("client")
    })?;
    let backend = lab.pod("b1")?.clone();
    let far = Service::new("far", 10).udp(80, TARGET).node_port(NODE_PORT).pods(&[lab.pod("b1")?]);
    let cluster = Cluster::start(lab, &["node-a"], &[], [&far])?;
    let _servers = cluster.servers(&["b1"])?;
    let node = cluster.node("node-a")?;
    let outside = Client::at(cluster.lab.host("client")?)?;
    let mut steps = Steps::new();
    for family in Family::BOTH {
        let frontend = SocketAddr::new(node.ip(family), NODE_PORT);
        let socket = outside.worker.udp_socket(family)?;
        let ask = || -> Result<()> {
            outside.worker.udp_send_to(socket.id, frontend, "hello")?;
            outside.worker.udp_receive(socket.id, Duration::from_millis(500))?;
            Ok(())
        };
        ask()?;
        ask()?;
        let rows = flows(node, &["--service", "default/far"])?;
        let row = rows.iter().find(|row| row["frontend"] == frontend.to_string()).context("no flow")?;
        let end = |field: &str| -> Result<SocketAddr> { Ok(row[field].as_str().context("no end")?.parse()?) };
        let (client, mask) = (end("client")?, end("mask")?);
        let backend = SocketAddr::new(backend.ip(family), TARGET);
        for (what, hook, from, to) in [
            ("the request's", Hook::Ingress, client, frontend),
            ("the forwarded one's", Hook::Egress, client, backend),
            ("the return's", Hook::Ingress, backend, mask),
            ("the reply's", Hook::Egress, backend, client),
        ] {
            steps.step(&format!("{what} entry, {family:?}"), || {
                evict(node, hook, from, to)?;
                eventually("the flow to go on", || Ok(ask().ok()))
            });
        }
    }
    steps.done()
}

fn evict(node: &Node, hook: Hook, from: SocketAddr, to: SocketAddr) -> Result<()> {
    let key = FlowKey {
        source: from.ip().into(),
        destination: to.ip().into(),
        source_port: from.port(),
        destination_port: to.port(),
        protocol: Protocol::Udp,
        hook,
        ..FlowKey::EMPTY
    };
    let bytes: Vec<String> = key.to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    let delete = node.command("bpftool")?.args(["map", "delete", "pinned"]).arg(node.bpf_root().join("flow"));
    delete.args(["key", "hex"]).args(&bytes).run()?.success()?;
    Ok(())
}
