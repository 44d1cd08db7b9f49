//! A flood of openings that nobody means: connections that are established stay.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use etherparse::PacketBuilder;
use kproxy_lab::worker::Id;
use kproxy_lab::{Context, Family, HostSpec, NodeSpec, UPLINK, Worker};
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, family_of};
use crate::flows::flows;
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[("kproxy::a_flood_of_openings_pushes_nobody_out", flood)];

const NODE_PORT: u16 = 30_080;
const FAR_NODE_PORT: u16 = 30_081;
const SILENT_NODE_PORT: u16 = 30_082;

/// As few flows as there can be, and many more openings.
const FLOWS: &[&str] = &["--max-flows", "1024"];
const OPENINGS: u32 = 16_384;

/// Open connections to each Service, in each family.
const OPEN: usize = 8;

fn flood(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]))
            .client("client")
            .host(HostSpec::new("attacker", 101))
    })?;
    let near = Service::new("near", 10).tcp(80, TARGET).node_port(NODE_PORT).pods(&[lab.pod("a2")?]);
    let far = Service::new("far", 11).tcp(80, TARGET).node_port(FAR_NODE_PORT).pods(&[lab.pod("b1")?]);
    let silent = Service::new("silent", 12).tcp(80, TARGET).node_port(SILENT_NODE_PORT);
    let silent = silent.pods(&[lab.pod("a1")?]);
    let cluster = Cluster::start(lab, &["node-a"], FLOWS, [&near, &far, &silent])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let lab = &cluster.lab;
    lab.pod("a1")?.nft(
        "table inet silent {\n chain arrive {\n type filter hook input priority 0;\n tcp flags syn drop\n }\n}\n",
    )?;
    let node = lab.node("node-a")?;
    let outside = Client::at(lab.host("client")?)?;
    let mut open = Vec::new();
    for family in Family::BOTH {
        for (port, server) in [(NODE_PORT, "a2"), (FAR_NODE_PORT, "b1")] {
            for _ in 0..OPEN {
                open.push(Standing::open(&outside.worker, SocketAddr::new(node.ip(family), port), server)?);
            }
        }
    }
    let mut steps = Steps::new();
    for (what, port) in [
        ("a backend that does not answer", SILENT_NODE_PORT),
        ("a backend here that does", NODE_PORT),
        ("a backend elsewhere that does", FAR_NODE_PORT),
    ] {
        for family in Family::BOTH {
            steps.step(&format!("{what}, {family:?}"), || {
                let wire = lab.host("attacker")?.wire(UPLINK)?;
                let frames = Frames { to: SocketAddr::new(node.ip(family), port), of: node.mac(UPLINK)? };
                for number in 0..OPENINGS {
                    wire.send(&frames.opening(number)?)?;
                }
                let established: Vec<Value> =
                    flows(node, &[])?.into_iter().filter(|row| row["table"] == "established").collect();
                ensure!(established.len() == open.len(), "{} are established", established.len());
                let standing = open.iter().filter(|one| family_of(one.to) == family);
                for one in standing.clone() {
                    let client = one.local.to_string();
                    let is_there = established.iter().any(|row| row["client"] == client);
                    ensure!(is_there, "the flow of {client} to {} is gone", one.to);
                }
                standing.clone().try_for_each(|one| one.must_go_on(&outside.worker))
            });
        }
    }
    steps.step("who comes after it is served", || {
        Family::BOTH.iter().try_for_each(|family| {
            let to = SocketAddr::new(node.ip(*family), NODE_PORT);
            outside.reaches(Transport::Tcp, to, &["a2"])
        })
    });
    steps.done()
}

/// An open connection.
struct Standing {
    id: Id,
    local: SocketAddr,
    to: SocketAddr,
    server: &'static str,
}

impl Standing {
    fn open(worker: &Worker, to: SocketAddr, server: &'static str) -> Result<Self> {
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
}

/// Openings with forged addresses.
struct Frames {
    to: SocketAddr,
    of: [u8; 6],
}

impl Frames {
    fn opening(&self, number: u32) -> Result<Vec<u8>> {
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], self.of);
        let port = 1024 + (number % 60_000) as u16;
        let mut frame = Vec::new();
        let builder = match self.to.ip() {
            IpAddr::V4(to) => {
                let from = Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 64, 0, 1)) + number);
                builder.ipv4(from.octets(), to.octets(), 64)
            }
            IpAddr::V6(to) => {
                let from = Ipv6Addr::new(0x2001, 0xdb8, 0xbad, 0, 0, 0, (number >> 16) as u16, number as u16);
                builder.ipv6(from.octets(), to.octets(), 64)
            }
        };
        builder.tcp(port, self.to.port(), number, 64_240).syn().write(&mut frame, &[])?;
        Ok(frame)
    }
}
