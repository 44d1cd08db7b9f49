//! Devices upon devices: packets meet several hooks on their way, are translated once, and counted once.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Cni, Context, Family, GATEWAY_V4, GATEWAY_V6, Lab, NodeSpec, UPLINK};

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, ask_from};
use crate::objects::Service;
use crate::shapes::{FAR_NODE_PORT, NODE_PORT, near_and_far};

pub const SCENARIOS: &[Scenario] = &[("kproxy::stacked_devices_translate_once", stacked)];

const BRIDGE: &str = "br0";

/// How often each address is asked.
const ASKED: u64 = 10;

fn stacked(ctx: &Context) -> Result<()> {
    let mut steps = Steps::new();
    for (what, cni, on_bridge) in [
        ("an overlay upon the uplink", Cni::Vxlan, false),
        ("an uplink that is a port of a bridge", Cni::RoutedVeth, true),
        ("an overlay upon such a bridge", Cni::Vxlan, true),
    ] {
        let lab = ctx.lab(|lab| {
            lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).cni(cni))
                .node(NodeSpec::new("node-b", 2, &["b1"]).cni(cni))
                .client("client")
        })?;
        if on_bridge {
            // What netfilter sees of frames between two ports of a bridge is of no matter where pods are on none.
            let filtered = if cni == Cni::RoutedVeth { "0" } else { "1" };
            for name in ["iptables", "ip6tables"] {
                let setting = format!("net/bridge/bridge-nf-call-{name}");
                lab.node("node-a")?.netns().set_sysctl(&setting, filtered)?;
            }
            put_uplink_on_bridge(&lab)?;
        }
        asked(lab, what, &mut steps)?;
        ctx.forget_labs();
    }
    steps.done()
}

/// The node's own addresses and routes move from its uplink to a bridge above it.
fn put_uplink_on_bridge(lab: &Lab) -> Result<()> {
    let node = lab.node("node-a")?;
    let routes: Vec<String> = ["-4", "-6"]
        .into_iter()
        .map(|family| node.ip_command(&format!("{family} route show dev {UPLINK}")))
        .collect::<Result<Vec<_>>>()?
        .iter()
        .flat_map(|text| text.lines())
        .filter(|line| line.contains(" via "))
        .map(|line| line.split(" metric ").next().unwrap_or(line).to_owned())
        .collect();
    ensure!(!routes.is_empty(), "no routes by {UPLINK}");
    for command in [
        format!("link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"),
        format!("addr flush dev {UPLINK}"),
        format!("link set {UPLINK} master {BRIDGE}"),
        format!("link set {BRIDGE} up"),
        format!("addr add {}/24 dev {BRIDGE}", node.v4()),
        format!("addr add {}/64 dev {BRIDGE} nodad", node.v6()),
    ] {
        node.ip_command(&command)?;
    }
    for route in routes {
        node.ip_command(&format!("route replace {route} dev {BRIDGE}"))?;
    }
    for gateway in [IpAddr::from(GATEWAY_V4), GATEWAY_V6.into()] {
        let route = node.ip_command(&format!("route get {}", other_side(gateway)))?;
        ensure!(route.contains(BRIDGE), "{route}");
    }
    Ok(())
}

/// Somebody beyond the gateway.
fn other_side(gateway: IpAddr) -> &'static str {
    if gateway.is_ipv4() { "192.88.99.1" } else { "2001:db8:ffff::1" }
}

fn asked(lab: Lab, what: &str, steps: &mut Steps) -> Result<()> {
    let [near, far] = near_and_far(&lab, |service| service.tcp(80, TARGET).udp(80, TARGET))?;
    let cluster = Cluster::start(lab, &["node-a"], &[], [&near, &far])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let lab = &cluster.lab;
    let node = lab.node("node-a")?;
    let own = node.own_addresses()?;
    let outside = Client::at(lab.host("client")?)?;
    let unseen = Client::at(&lab.pod("a1")?.unseen())?;
    let connections = |service: &Service| -> Result<u64> {
        let count = &cluster.service("node-a", service.name())?["connections"];
        count.as_u64().with_context(|| format!("counted {count}"))
    };
    for family in Family::BOTH {
        let node_port = |port| SocketAddr::new(node.ip(family), port);
        let cluster_ip = |service: &Service| SocketAddr::new(service.cluster_ip(family), 80);
        for (client, service, to, server, masked) in [
            (&outside, &near, node_port(NODE_PORT), "a2", false),
            (&outside, &far, node_port(FAR_NODE_PORT), "b1", true),
            (&unseen, &near, cluster_ip(&near), "a2", false),
            (&unseen, &far, cluster_ip(&far), "b1", false),
        ] {
            for transport in [Transport::Tcp, Transport::UdpUnconnected] {
                steps.step(&format!("{what}: {} to {to}, {transport:?}", client.name), || {
                    let before = connections(service)?;
                    let mut ports = BTreeSet::new();
                    for _ in 0..ASKED {
                        let (answer, local) = ask_from(&client.worker, transport, to)?;
                        ensure!(answer.server == server, "answered by {answer:?}");
                        ensure!(own.contains(&answer.client.ip()) == masked, "seen as {answer:?}");
                        ensure!(masked || answer.client.port() == local.port(), "seen as {answer:?}");
                        ports.insert(local.port());
                    }
                    let counted = connections(service)? - before;
                    // A UDP socket that is given the port of one just closed goes on with its flow.
                    let made = if transport == Transport::Tcp { ASKED } else { ports.len() as u64 };
                    ensure!(counted == made, "{made} were made, {counted} counted");
                    Ok(())
                });
            }
            steps.step(&format!("{what}: {} to {to}, 5 MB each way", client.name), || {
                let socket = client.worker.tcp_connect(to)?;
                client.worker.tcp_transfer(socket.id, 5_000_000, 5_000_000)?;
                Ok(client.worker.close(socket.id)?)
            });
        }
    }
    Ok(())
}
