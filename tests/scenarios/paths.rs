//! What a path does to packets that are translated on it: links that take less than is sent, and datagrams in parts.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use kproxy_lab::{Answer, Cni, Context, Datagram, Family, HostSpec, Lab, Member, NodeSpec, TunLink, Worker};
use nix::errno::Errno;

use crate::Scenario;
use crate::cluster::{Cluster, Steps, TARGET};
use crate::objects::{Service, cluster_ip};

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::paths_tell_their_mtu_routed", |ctx| paths_tell_their_mtu(ctx, |node| node)),
    // Connection tracking puts a datagram together before its way narrows; behind a bridge, the kernel then sends it on in
    // parts as large as its own link takes, whatever the client has learned.
    ("kproxy::paths_tell_their_mtu_untracked", |ctx| paths_tell_their_mtu(ctx, NodeSpec::keep_invalid)),
    ("kproxy::paths_tell_their_mtu_bridge", |ctx| {
        paths_tell_their_mtu(ctx, |node| node.cni(Cni::Bridge).keep_invalid())
    }),
    ("kproxy::paths_tell_their_mtu_vxlan", |ctx| {
        paths_tell_their_mtu(ctx, |node| node.cni(Cni::Vxlan).keep_invalid())
    }),
    ("kproxy::paths_tell_backends_their_mtu", |ctx| {
        let mut steps = Steps::new();
        for cni in [Cni::RoutedVeth, Cni::Bridge, Cni::Vxlan] {
            backends_are_told(ctx, cni, &mut steps)?;
            ctx.forget_labs();
        }
        steps.done()
    }),
    ("kproxy::paths_carry_datagrams_in_parts_routed", |ctx| datagrams_in_parts(ctx, Cni::RoutedVeth)),
    ("kproxy::paths_carry_datagrams_in_parts_bridge", |ctx| datagrams_in_parts(ctx, Cni::Bridge)),
    ("kproxy::paths_carry_datagrams_in_parts_vxlan", |ctx| datagrams_in_parts(ctx, Cni::Vxlan)),
];

const NODE_PORT: u16 = 30_080;
const FAR_NODE_PORT: u16 = 30_081;

/// What the last link before a backend takes; IPv6 demands 1,280 at least.
const NARROW: u32 = 1_300;

/// The link to a client behind a router, and the addresses of its ends: the router's, the client's.
const LINK: &str = "tun0";
const ENDS: [[&str; 2]; 2] = [["10.255.0.1", "fd00:10:255::1"], ["10.255.0.2", "fd00:10:255::2"]];

/// More than two of a link's packets hold, as a DNS answer with signatures can be.
const LONG: usize = 4_000;

/// How long each try waits for its answer: the first is lost where the client has yet to learn what a link takes.
const PATIENCE: [Duration; 3] =
    [Duration::from_millis(300), Duration::from_millis(700), Duration::from_secs(2)];

/// A backend on the node that is asked, and one on another.
fn cluster(ctx: &Context, of: impl Fn(NodeSpec) -> NodeSpec) -> Result<Cluster> {
    let lab = ctx.lab(|lab| {
        lab.node(of(NodeSpec::new("node-a", 1, &["a1", "a2"])))
            .node(of(NodeSpec::new("node-b", 2, &["b1"])))
            .client("client")
            .host(HostSpec::new("router", 101))
    })?;
    let service = |name, number, port, pod: &str| {
        let service = Service::new(name, number).tcp(80, TARGET).udp(80, TARGET).node_port(port);
        Ok::<_, anyhow::Error>(service.pods(&[lab.pod(pod)?]))
    };
    let near = service("near", 10, NODE_PORT, "a1")?;
    let far = service("far", 11, FAR_NODE_PORT, "b1")?;
    Cluster::start(lab, &["node-a", "node-b"], &[], [&near, &far])
}

/// The way to a backend narrows behind the node that translates (its own error, about a packet whose
/// destination it has written) or behind the next one (an error about a packet whose source was
/// written too). Either way the client must learn it, about the address that it asked.
fn paths_tell_their_mtu(ctx: &Context, of: impl Fn(NodeSpec) -> NodeSpec) -> Result<()> {
    let cluster = cluster(ctx, of)?;
    let _servers = cluster.servers(&["a1", "b1"])?;
    let lab = &cluster.lab;
    narrow(lab, "node-a", "a1")?;
    narrow(lab, "node-b", "b1")?;
    let (outside, unseen) = (lab.host("client")?.clone(), lab.pod("a2")?.unseen());
    let mut steps = Steps::new();
    for (who, member) in [("client", &outside), ("unseen pod", &unseen)] {
        let worker = member.worker()?;
        for family in Family::BOTH {
            for (what, number, port) in
                [("a link of the node asked", 10, NODE_PORT), ("a link of another node", 11, FAR_NODE_PORT)]
            {
                let to = match who {
                    "client" => SocketAddr::new(lab.node("node-a")?.ip(family), port),
                    _ => SocketAddr::new(cluster_ip(number, family), 80),
                };
                steps.step(&format!("{who}, {what}, {family:?}"), || {
                    forget_paths(member, family)?;
                    let socket = worker.tcp_connect(to)?;
                    worker.tcp_transfer(socket.id, 5_000_000, 1).context("5 MB up")?;
                    worker.tcp_ask(socket.id, "still the same connection")?;
                    worker.close(socket.id)?;
                    let path = member.ip_command(&format!("route get {}", to.ip()))?;
                    ensure!(path.contains(&format!("mtu {NARROW}")), "the client has not learned it: {path}");
                    Ok(())
                });
                // Of IPv6 the error may quote a part: the ports stand behind an extension header.
                steps.step(&format!("{who}, {what}, {family:?}, a datagram in parts"), || {
                    forget_paths(member, family)?;
                    let socket = worker.udp_socket(family)?;
                    let data = "x".repeat(LONG);
                    let datagram = ask_until_answered(&worker, socket.id, to, &data)?;
                    ensure!(datagram.from == to, "answered by {}", datagram.from);
                    Ok(worker.close(socket.id)?)
                });
            }
        }
    }
    steps.done()
}

/// The client is behind a router and a link that takes less: what the router says about a backend's answer is about the
/// Service's address, and must come to the backend about its own, towards whom it speaks to.
fn backends_are_told(ctx: &Context, cni: Cni, steps: &mut Steps) -> Result<()> {
    let cluster = cluster(ctx, |node| node.cni(cni))?;
    let _servers = cluster.servers(&["a1", "b1"])?;
    let lab = &cluster.lab;
    let (node, router, client) = (lab.node("node-a")?, lab.host("router")?, lab.host("client")?);
    let _link = TunLink::between(router, client, LINK)?;
    for (member, mtu, own, peer) in [(router, NARROW, ENDS[0], ENDS[1]), (client, 1500, ENDS[1], ENDS[0])] {
        member.ip_command(&format!("link set {LINK} mtu {mtu} up"))?;
        for (own, peer) in own.iter().zip(peer) {
            let flags = if own.contains(':') { " nodad" } else { "" };
            member.ip_command(&format!("address add {own} peer {peer} dev {LINK}{flags}"))?;
        }
    }
    router.netns().set_sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])?;
    let worker = client.worker()?;
    for (family, end, bits) in [(Family::V4, ENDS[1][0], 32), (Family::V6, ENDS[1][1], 128)] {
        node.ip_command(&format!("route add {end}/{bits} via {}", router.ip(family)))?;
        client.ip_command(&format!("route add {}/{bits} dev {LINK}", node.ip(family)))?;
        for (backend, port) in [("a1", NODE_PORT), ("b1", FAR_NODE_PORT)] {
            let to = SocketAddr::new(node.ip(family), port);
            steps.step(&format!("{cni:?}, {backend}, {family:?}"), || {
                let socket = worker.tcp_connect(to)?;
                let answer = worker.tcp_ask(socket.id, "hello")?;
                ensure!(answer.server == backend, "answered by {answer:?}");
                worker.tcp_transfer(socket.id, 1, 5_000_000).context("5 MB down")?;
                worker.close(socket.id)?;
                let path = lab.pod(backend)?.ip_command(&format!("route get {}", answer.client.ip()))?;
                ensure!(path.contains(&format!("mtu {NARROW}")), "{backend} has not learned it: {path}");
                Ok(())
            });
        }
    }
    Ok(())
}

/// Only the first part of a datagram has ports; the others must go where it goes, in both directions.
fn datagrams_in_parts(ctx: &Context, cni: Cni) -> Result<()> {
    let cluster = cluster(ctx, |node| node.cni(cni))?;
    let _servers = cluster.servers(&["a1", "b1"])?;
    let lab = &cluster.lab;
    let (outside, unseen) = (lab.host("client")?.worker()?, lab.pod("a2")?.unseen().worker()?);
    let mut steps = Steps::new();
    for family in Family::BOTH {
        let node_port = |port| Ok::<_, anyhow::Error>(SocketAddr::new(lab.node("node-a")?.ip(family), port));
        let service = |number| SocketAddr::new(cluster_ip(number, family), 80);
        for (who, worker, server, to) in [
            ("client", &outside, "a1", node_port(NODE_PORT)?),
            ("client", &outside, "b1", node_port(FAR_NODE_PORT)?),
            ("unseen pod", &unseen, "a1", service(10)),
            ("unseen pod", &unseen, "b1", service(11)),
        ] {
            steps.step(&format!("{who}: {LONG} octets to {server} and back, {family:?}"), || {
                let socket = worker.udp_socket(family)?;
                for round in 0..5 {
                    let data = format!("{round}").repeat(LONG);
                    let datagram = ask_until_answered(worker, socket.id, to, &data)?;
                    ensure!(datagram.from == to, "answered by {}", datagram.from);
                    let answer: Answer = serde_json::from_str(&datagram.data)?;
                    ensure!(answer.server == server, "answered by {}", answer.server);
                    ensure!(answer.data == data, "{} octets arrived, or others", answer.data.len());
                }
                Ok(worker.close(socket.id)?)
            });
        }
    }
    steps.done()
}

/// Asks again as a resolver does: a link that takes less than the client's loses the first datagram, and the
/// client learns of it. IPv6 lets no router cut a packet.
fn ask_until_answered(worker: &Worker, socket: u64, to: SocketAddr, data: &str) -> Result<Datagram> {
    for (tries, patience) in PATIENCE.into_iter().enumerate() {
        worker.udp_send_to(socket, to, data)?;
        loop {
            match worker.udp_receive(socket, patience) {
                Ok(datagram) if datagram.data.contains(data) => return Ok(datagram),
                // To what was asked before, too late.
                Ok(_) => {}
                Err(error) if tries + 1 < PATIENCE.len() && error.errno() == Some(Errno::EAGAIN) => break,
                Err(error) => return Err(error).with_context(|| format!("after {tries} other tries")),
            }
        }
    }
    bail!("{} tries, and no answer", PATIENCE.len())
}

/// The node's way to its pod takes less, as that of a tunnel would. Forwarding minds a locked metric only.
fn narrow(lab: &Lab, node: &str, pod: &str) -> Result<()> {
    let node = lab.node(node)?;
    for (family, bits) in [(Family::V4, 32), (Family::V6, 128)] {
        let to = lab.pod(pod)?.ip(family);
        let route = node.ip_command(&format!("route get {to}"))?;
        let device = route.split_whitespace().skip_while(|word| *word != "dev").nth(1);
        let device = device.with_context(|| format!("no device in {route:?}"))?.to_owned();
        node.ip_command(&format!("route replace {to}/{bits} dev {device} mtu lock {NARROW}"))?;
    }
    Ok(())
}

/// What the client has learned of paths so far.
fn forget_paths(client: &Member, family: Family) -> Result<()> {
    let option = if family == Family::V4 { "-4" } else { "-6" };
    client.run(&["ip", option, "route", "flush", "cache"])?.success()?;
    Ok(())
}
