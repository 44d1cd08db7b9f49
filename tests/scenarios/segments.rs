//! Datagrams that a process hands over by one call, as QUIC does, and that pass the hooks in one packet.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use kproxy_lab::{Answer, Context, Family, NodeSpec, Worker};
use nix::errno::Errno;

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, family_of};
use crate::objects::Service;
use crate::reach::refused;

pub const SCENARIOS: &[Scenario] = &[("kproxy::datagrams_by_one_call", by_one_call)];

const NODE_PORT: u16 = 30_080;

/// Octets of a datagram: with the overlay's headers, and in an answer, it fits a link.
const SIZE: u16 = 1_100;
const COUNT: usize = 16;

fn by_one_call(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]))
            .client("client")
    })?;
    let service = |name, number, port| Service::new(name, number).udp(80, TARGET).node_port(port);
    let near = service("near", 10, NODE_PORT).pods(&[lab.pod("a2")?]);
    let far = service("far", 11, NODE_PORT + 1).pods(&[lab.pod("b1")?]);
    let empty = service("empty", 12, NODE_PORT + 2);
    let cluster = Cluster::start(lab, &["node-a", "node-b"], &[], [&near, &far, &empty])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let lab = &cluster.lab;
    let outside = Client::at(lab.host("client")?)?;
    let unseen = Client::at(&lab.pod("a1")?.unseen())?;
    let seen = cluster.pod("a1")?;
    let host = cluster.host("node-a")?;
    // They do pass in one packet: longer than any link takes.
    let mut long = lab.node("node-a")?.capture("any", "udp and greater 10000")?;
    let mut steps = Steps::new();
    for family in Family::BOTH {
        let node_port =
            |number: u16| SocketAddr::new(lab.node("node-a").unwrap().ip(family), NODE_PORT + number);
        let cluster_ip = |service: &Service| SocketAddr::new(service.cluster_ip(family), 80);
        let undefined = SocketAddr::new(near.cluster_ip(family), 9_999);
        for (who, client, to, server) in [
            ("outside", &outside, node_port(0), "a2"),
            ("outside", &outside, node_port(1), "b1"),
            ("a pod that is not seen", &unseen, cluster_ip(&near), "a2"),
            ("a pod that is not seen", &unseen, cluster_ip(&far), "b1"),
            ("a pod", &seen, cluster_ip(&far), "b1"),
        ] {
            steps.step(&format!("{who} to {to}"), || all_arrive(&client.worker, to, server));
        }
        for (who, client, to) in [
            ("outside", &outside, node_port(2)),
            ("a pod that is not seen", &unseen, cluster_ip(&empty)),
            ("a pod", &seen, undefined),
            ("the host", &host, undefined),
        ] {
            steps.step(&format!("{who} is refused by {to}"), || {
                let worker = &client.worker;
                let socket = worker.udp_socket(family)?;
                worker.udp_connect(socket.id, to)?;
                worker.udp_send_segments(socket.id, None, &datagrams(), SIZE)?;
                refused(worker.udp_receive(socket.id, Duration::from_secs(1)), Errno::ECONNREFUSED)?;
                Ok(worker.close(socket.id)?)
            });
        }
    }
    steps.step("in one packet", || {
        ensure!(long.stop()? > 0, "{:?}", long.packets()?);
        Ok(())
    });
    steps.done()
}

/// Each begins with its number.
fn datagrams() -> String {
    (0..COUNT).map(|number| format!("{number:0width$}", width = usize::from(SIZE))).collect()
}

/// Each is answered by this server, as it was sent.
fn all_arrive(worker: &Worker, to: SocketAddr, server: &str) -> Result<()> {
    let socket = worker.udp_socket(family_of(to))?;
    worker.udp_send_segments(socket.id, Some(to), &datagrams(), SIZE)?;
    let mut numbers = BTreeSet::new();
    for _ in 0..COUNT {
        let datagram = worker.udp_receive(socket.id, Duration::from_secs(3))?;
        let answer: Answer = serde_json::from_str(&datagram.data)?;
        ensure!(datagram.from == to && answer.server == server, "{} said {answer:?}", datagram.from);
        ensure!(answer.data.len() == usize::from(SIZE), "{} octets arrived", answer.data.len());
        numbers.insert(answer.data.parse::<usize>()?);
    }
    ensure!(numbers == (0..COUNT).collect(), "{numbers:?}");
    Ok(worker.close(socket.id)?)
}
