//! Clients in pods that no socket hook sees: the packet hooks on their interfaces serve them the same.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use kproxy_lab::{Answer, Cni, Context, ElbSpec, Family, Node, NodeSpec, Worker};

use crate::Scenario;
use crate::cluster::{Client, Cluster, SILENCE, Steps, TARGET, Transport, ask_from, family_of};
use crate::objects::Service;
use crate::packets::ping;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::unseen_pods_routed", |ctx| unseen(ctx, Cni::RoutedVeth, true)),
    ("kproxy::unseen_pods_bridge", |ctx| unseen(ctx, Cni::Bridge, true)),
    ("kproxy::unseen_pods_bridge_unfiltered", |ctx| unseen(ctx, Cni::Bridge, false)),
    ("kproxy::unseen_pods_vxlan", |ctx| unseen(ctx, Cni::Vxlan, true)),
];

const NODE_PORT: u16 = 30_080;
const EXTERNAL: [&str; 2] = ["198.51.100.7", "2001:db8:198::7"];

const SERVICE_CIDRS: [&str; 2] = ["--service-cidr", "10.96.0.0/16,fd00:10:96::/112"];

/// A port of the client's that two flows share.
const SHARED_PORT: u16 = 40_404;
/// One that flows have one after the other.
const PORT_AGAIN: u16 = 40_405;

/// `filtered`: whether frames between two ports of the bridge pass netfilter.
fn unseen(ctx: &Context, cni: Cni, filtered: bool) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).cni(cni))
            .node(NodeSpec::new("node-b", 2, &["b1"]).cni(cni))
            .elb(ElbSpec::new())
    })?;
    let node = lab.node("node-a")?;
    for name in ["iptables", "ip6tables"] {
        let value = if filtered { "1" } else { "0" };
        node.netns().set_sysctl(&format!("net/bridge/bridge-nf-call-{name}"), value)?;
    }
    let (a1, a2, b1) = (lab.pod("a1")?.clone(), lab.pod("a2")?.clone(), lab.pod("b1")?.clone());
    let service = |name, number| Service::new(name, number).tcp(80, TARGET).udp(80, TARGET);
    let near = service("near", 10).node_port(NODE_PORT).load_balancers(lab.elb()?.vips()).pods(&[&a2]);
    let near =
        EXTERNAL.iter().fold(near, |near, address| near.external_ip(address.parse().expect("an address")));
    let far = service("far", 11).pods(&[&b1]);
    let own = service("own", 12).pods(&[&a1]);
    let twin = service("twin", 13).pods(&[&a2]);
    let far_twin = service("far-twin", 14).pods(&[&b1]);
    let empty = service("empty", 15);
    let cluster = Cluster::start(
        lab,
        &["node-a", "node-b"],
        &SERVICE_CIDRS,
        [&near, &far, &own, &twin, &far_twin, &empty],
    )?;
    let _servers = cluster.servers(&["a1", "a2", "b1"])?;
    let lab = &cluster.lab;
    let node = lab.node("node-a")?;
    let pod = lab.pod("a1")?.unseen();
    let mut client = Client::at(&pod)?;
    let host = Client::at(&node.unseen())?;
    let seldom = [Client::at(&pod)?, Client::at(&node.unseen())?];
    seldom.iter().try_for_each(|client| client.worker.use_seldom_headers())?;
    let node_addresses: BTreeSet<IpAddr> = node_addresses(node)?;
    let mut steps = Steps::new();

    for family in Family::BOTH {
        let at = |service: &Service| SocketAddr::new(service.cluster_ip(family), 80);
        let external = EXTERNAL.iter().map(|text| text.parse::<IpAddr>().expect("an address"));
        let near_addresses =
            [("ClusterIP", at(&near)), ("NodePort", SocketAddr::new(node.ip(family), NODE_PORT))]
                .into_iter()
                .chain(external.map(|address| ("external IP", SocketAddr::new(address, 80))))
                .chain(lab.elb()?.vips().iter().map(|vip| ("load balancer", SocketAddr::new(*vip, 80))));
        for (kind, to) in near_addresses.filter(|(_, to)| family_of(*to) == family) {
            for transport in Transport::ALL {
                steps.step(&format!("{kind} {to}, {transport:?}"), || {
                    if filtered {
                        return client.reaches(transport, to, &["a2"]);
                    }
                    // The backend sees the bridge, so that its answers come back by way of the host.
                    let (answer, _) = ask_from(&client.worker, transport, to)?;
                    ensure!(answer.server == "a2", "answered by {answer:?}");
                    let seen = answer.client.ip().to_canonical();
                    ensure!(node_addresses.contains(&seen), "seen as {answer:?}");
                    Ok(())
                });
            }
        }
        for transport in Transport::ALL {
            steps.step(&format!("a backend on another node, {family:?}, {transport:?}"), || {
                client.reaches(transport, at(&far), &["b1"])
            });
            steps.step(&format!("itself, {family:?}, {transport:?}"), || {
                let (answer, _) = ask_from(&client.worker, transport, at(&own))?;
                ensure!(answer.server == "a1", "answered by {answer:?}");
                ensure!(node_addresses.contains(&answer.client.ip().to_canonical()), "seen as {answer:?}");
                Ok(())
            });
        }
        for (one, other, server) in [(&near, &twin, "a2"), (&far, &far_twin, "b1")] {
            let both = [at(one), at(other)];
            steps.step(
                &format!("two Services of {server} and one port of the client, {family:?}, UDP"),
                || share_udp(&client.worker, both, server),
            );
            steps.step(
                &format!("two Services of {server} and one port of the client, {family:?}, TCP"),
                || share_tcp(&client.worker, both, server),
            );
        }
        for (service, pod) in [(&near, &a2), (&far, &b1)] {
            steps.step(&format!("{} and then its pod, from one port, {family:?}", service.name()), || {
                again_from_one_port(&client.worker, at(service), SocketAddr::new(pod.ip(family), TARGET))
            });
        }
        for transport in Transport::REFUSABLE {
            steps.step(&format!("no endpoint, {family:?}, {transport:?}"), || {
                client.is_refused_by_packet(transport, at(&empty))
            });
            steps.step(&format!("an undefined port, {family:?}, {transport:?}"), || {
                client.is_refused_by_packet(transport, SocketAddr::new(near.cluster_ip(family), 9_999))
            });
        }
        steps.step(&format!("an unallocated address, {family:?}"), || {
            let to = SocketAddr::new(crate::objects::cluster_ip(77, family), 80);
            client.gets_silence(Transport::Tcp, to)?;
            client.gets_silence(Transport::UdpConnected, to)
        });
        for transport in Transport::REFUSABLE {
            steps.step(&format!("an undefined port, from the host, {family:?}, {transport:?}"), || {
                host.is_refused_by_packet(transport, SocketAddr::new(near.cluster_ip(family), 9_999))
            });
            steps.step(
                &format!("what only sockets could serve, from the host, {family:?}, {transport:?}"),
                || {
                    host.gets_silence(transport, at(&near))?;
                    host.gets_silence(transport, at(&empty))
                },
            );
        }
        for (client, transport) in
            seldom.iter().flat_map(|client| Transport::REFUSABLE.map(|way| (client, way)))
        {
            let what = format!("{}, an undefined port, with options or extension headers", client.name);
            steps.step(&format!("{what}, {family:?}, {transport:?}"), || {
                client.is_refused_by_packet(transport, SocketAddr::new(near.cluster_ip(family), 9_999))
            });
        }
        steps.step(&format!("echo, {family:?}"), || ping(&pod, near.cluster_ip(family)));
        steps.step(&format!("echo from the host, {family:?}"), || ping(node, near.cluster_ip(family)));
    }
    steps.step("nothing was sent astray", || {
        let strays = lab.strays()?;
        ensure!(strays.is_empty(), "{strays:?}");
        Ok(())
    });
    steps.step("nothing was invalid for conntrack", || {
        let rules = node.run(&["nft", "list", "table", "inet", "node"])?.success()?;
        ensure!(rules.contains("invalid counter packets 0 "), "{rules}");
        Ok(())
    });
    client.addresses.clear();
    steps.done()
}

/// One socket asks two frontends of one backend, in turns: each answer comes from where it was asked.
fn share_udp(worker: &Worker, both: [SocketAddr; 2], server: &str) -> Result<()> {
    let socket = worker.udp_socket(family_of(both[0]))?;
    for _ in 0..2 {
        for to in both {
            worker.udp_send_to(socket.id, to, &format!("to {to}"))?;
        }
        for _ in both {
            let datagram = worker.udp_receive(socket.id, Duration::from_secs(2))?;
            let answer: Answer = serde_json::from_str(&datagram.data)?;
            ensure!(answer.server == server, "{answer:?}");
            ensure!(answer.data == format!("to {}", datagram.from), "{} said {answer:?}", datagram.from);
        }
    }
    // And nothing more.
    ensure!(worker.udp_receive(socket.id, SILENCE).is_err(), "an answer came twice");
    Ok(worker.close(socket.id)?)
}

/// A connection to the Service's pod past the Service, from the port of one through it that is over.
fn again_from_one_port(worker: &Worker, service: SocketAddr, pod: SocketAddr) -> Result<()> {
    let from = Some(any(family_of(service), PORT_AGAIN));
    let servers = [service, pod].map(|to| -> Result<String> {
        let socket = worker.tcp_connect_with(to, from, Duration::from_secs(3))?;
        let answer = worker.tcp_ask(socket.id, "hello")?;
        worker.close(socket.id)?;
        Ok(answer.server)
    });
    let [one, other] = servers;
    let (one, other) = (one?, other?);
    ensure!(one == other, "the Service is answered by {one}, its pod by {other}");
    Ok(())
}

/// Two connections from one port, to two frontends of one backend, open at the same time.
fn share_tcp(worker: &Worker, both: [SocketAddr; 2], server: &str) -> Result<()> {
    let from = any(family_of(both[0]), SHARED_PORT);
    let mut sockets = Vec::new();
    for to in both {
        sockets.push(worker.tcp_connect_with(to, Some(from), Duration::from_secs(2))?);
    }
    for _ in 0..3 {
        for socket in &sockets {
            let answer = worker.tcp_ask(socket.id, "hello")?;
            ensure!(answer.server == server, "{answer:?}");
        }
    }
    for socket in sockets {
        worker.close(socket.id)?;
    }
    Ok(())
}

fn any(family: Family, port: u16) -> SocketAddr {
    match family {
        Family::V4 => SocketAddr::new(std::net::Ipv4Addr::UNSPECIFIED.into(), port),
        Family::V6 => SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port),
    }
}

fn node_addresses(node: &Node) -> Result<BTreeSet<IpAddr>> {
    Ok(node.own_addresses()?.into_iter().collect())
}
