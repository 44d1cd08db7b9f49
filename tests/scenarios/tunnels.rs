//! Devices without Ethernet headers, as VPNs and IP tunnels have them: TUN devices with the lab between them stand in.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Context, Family, Lab, Member, NodeSpec, TunLink};

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, ask_from, eventually, packet_programs};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] =
    &[("kproxy::tunnels_bring_clients", clients), ("kproxy::tunnels_lead_to_backends", overlay)];

const NODE_PORT: u16 = 30_080;
const FAR_NODE_PORT: u16 = 30_081;
const TUNNEL: &str = "tun0";
const MEGABYTE: u64 = 1_000_000;

/// The ends' addresses: of one, then of the other.
const ENDS: [[&str; 2]; 2] = [["10.255.0.1", "fd00:10:255::1"], ["10.255.0.2", "fd00:10:255::2"]];

fn cluster(ctx: &Context) -> Result<Cluster> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]))
            .client("client")
    })?;
    let service = |name, number, port, pod: &str| {
        let service = Service::new(name, number).tcp(80, TARGET).udp(80, TARGET).node_port(port);
        Ok::<_, anyhow::Error>(service.pods(&[lab.pod(pod)?]))
    };
    let near = service("near", 10, NODE_PORT, "a2")?;
    let far = service("far", 11, FAR_NODE_PORT, "b1")?;
    Cluster::start(lab, &["node-a"], &[], [&near, &far])
}

/// A tunnel between two members, both ends up and with their addresses; it appears while the agent runs.
fn tunnel(lab: &Lab, one: &Member, other: &Member) -> Result<TunLink> {
    let link = TunLink::between(one, other, TUNNEL)?;
    for (member, own, peer) in [(one, ENDS[0], ENDS[1]), (other, ENDS[1], ENDS[0])] {
        member.ip_command(&format!("link set {TUNNEL} mtu 1400 up"))?;
        for (own, peer) in own.iter().zip(peer) {
            let flags = if own.contains(':') { " nodad" } else { "" };
            member.ip_command(&format!("address add {own} peer {peer} dev {TUNNEL}{flags}"))?;
        }
    }
    lab.self_check()?;
    let node = lab.node("node-a")?;
    eventually("programs for packets without an Ethernet header", || {
        let names = packet_programs(node, TUNNEL)?;
        Ok((names == ["in_ip", "out_ip"]).then_some(()))
    })?;
    Ok(link)
}

fn addresses_of(end: [&str; 2]) -> BTreeSet<IpAddr> {
    end.iter().map(|text| text.parse().expect("an address")).collect()
}

fn transfer(client: &Client, to: SocketAddr) -> Result<()> {
    let socket = client.worker.tcp_connect(to)?;
    client.worker.tcp_transfer(socket.id, 10 * MEGABYTE, 10 * MEGABYTE).context("10 MB up and down")?;
    Ok(client.worker.close(socket.id)?)
}

/// The node is asked through a tunnel, and beside it by Ethernet.
fn clients(ctx: &Context) -> Result<()> {
    let cluster = cluster(ctx)?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let lab = &cluster.lab;
    let (node, outside) = (lab.node("node-a")?, lab.host("client")?);
    let mut client = Client::at(outside)?;
    let mut steps = Steps::new();
    let _tunnel = tunnel(lab, node, outside)?;
    for (way, by_tunnel) in [("by the tunnel", true), ("by Ethernet beside it", false)] {
        client.addresses = Family::BOTH.map(|family| outside.ip(family)).into();
        if by_tunnel {
            client.addresses = addresses_of(ENDS[1]);
        }
        for (family, bits) in [(Family::V4, 32), (Family::V6, 128)] {
            let command = if by_tunnel { "add" } else { "del" };
            outside.ip_command(&format!("route {command} {}/{bits} dev {TUNNEL}", node.ip(family)))?;
            let (near, far) = (
                SocketAddr::new(node.ip(family), NODE_PORT),
                SocketAddr::new(node.ip(family), FAR_NODE_PORT),
            );
            let mut passing =
                outside.capture(TUNNEL, &format!("port {NODE_PORT} or port {FAR_NODE_PORT}"))?;
            for transport in Transport::ALL {
                steps.step(&format!("{way}, a backend here, {family:?}, {transport:?}"), || {
                    client.reaches(transport, near, &["a2"])
                });
                steps.step(&format!("{way}, a backend elsewhere, {family:?}, {transport:?}"), || {
                    let (answer, _) = ask_from(&client.worker, transport, far)?;
                    ensure!(answer.server == "b1", "answered by {answer:?}");
                    ensure!(answer.client.ip() == node.ip(family), "seen as {answer:?}");
                    Ok(())
                });
            }
            for to in [near, far] {
                steps.step(&format!("{way}, {to}, 10 MB each way"), || transfer(&client, to));
            }
            steps.step(&format!("{way}, {family:?}: that was the way"), || {
                let count = passing.stop()?;
                ensure!((count > 0) == by_tunnel, "{count} packets in the tunnel");
                Ok(())
            });
        }
    }
    steps.done()
}

/// The pods of the other node are behind a tunnel, as with an overlay of IP in IP or WireGuard.
fn overlay(ctx: &Context) -> Result<()> {
    let cluster = cluster(ctx)?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let lab = &cluster.lab;
    let (a, b) = (lab.node("node-a")?, lab.node("node-b")?);
    let _tunnel = tunnel(lab, a, b)?;
    for (node, other) in [(a, b), (b, a)] {
        let pods = other.spec();
        node.ip_command(&format!("route replace {} dev {TUNNEL}", pods.pods_v4))?;
        node.ip_command(&format!("route replace {} dev {TUNNEL}", pods.pods_v6))?;
    }
    let outside = Client::at(lab.host("client")?)?;
    let unseen = Client::at(&lab.pod("a1")?.unseen())?;
    let mut steps = Steps::new();
    let mut bare = b.capture("eth0", &format!("port {TARGET}"))?;
    for family in Family::BOTH {
        let far = SocketAddr::new(a.ip(family), FAR_NODE_PORT);
        let cluster_ip = SocketAddr::new(crate::objects::cluster_ip(11, family), 80);
        for transport in Transport::ALL {
            steps.step(&format!("from outside, {family:?}, {transport:?}"), || {
                let (answer, _) = ask_from(&outside.worker, transport, far)?;
                ensure!(answer.server == "b1", "answered by {answer:?}");
                ensure!(addresses_of(ENDS[0]).contains(&answer.client.ip()), "seen as {answer:?}");
                Ok(())
            });
            steps.step(&format!("from a pod that no socket hook sees, {family:?}, {transport:?}"), || {
                unseen.reaches(transport, cluster_ip, &["b1"])
            });
            steps.step(&format!("a backend here, {family:?}, {transport:?}"), || {
                outside.reaches(transport, SocketAddr::new(a.ip(family), NODE_PORT), &["a2"])
            });
        }
        for (client, to) in [(&outside, far), (&unseen, cluster_ip)] {
            steps.step(&format!("{} to {to}, 10 MB each way", client.name), || transfer(client, to));
        }
    }
    steps.step("the tunnel was the way", || {
        ensure!(bare.stop()? == 0, "{:?}", bare.packets()?);
        Ok(())
    });
    steps.done()
}
