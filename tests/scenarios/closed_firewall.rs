//! Forward chains that drop by default, however pods are wired: what is of Services passes if the agent is told so, and
//! nothing else; others' rules stay as they are.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use kproxy_lab::{Context, Family, Lab, Node};

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, ask_from, eventually};
use crate::objects::Service;
use crate::shapes::Shape;

pub const SCENARIOS: &[Scenario] = &[("kproxy::a_closed_firewall_lets_services_pass", closed)];

const NODE_PORT: u16 = 30_080;
const FAR_NODE_PORT: u16 = 30_081;

/// Who keeps FORWARD here: iptables on nf_tables for IPv4, on its own tables for IPv6.
const TOOLS: [&str; 2] = ["iptables-nft", "ip6tables-legacy"];

fn closed(ctx: &Context) -> Result<()> {
    Shape::each(ctx, |shape, steps| in_shape(ctx, shape, steps))
}

/// The rules on a node that are not ours: all but two in FORWARD.
fn rules(node: &Node) -> Result<Vec<String>> {
    let mut rules = Vec::new();
    for tool in TOOLS {
        rules.extend(node.run(&[tool, "-S"])?.success()?.lines().map(str::to_owned));
    }
    let others = node.run(&["nft", "list", "table", "inet", "node"])?.success()?;
    rules.extend(others.lines().map(|line| line.split(" packets ").next().unwrap_or(line).to_owned()));
    rules.retain(|rule| !rule.contains("kproxy"));
    Ok(rules)
}

/// Routes to pods by node-a, for somebody outside.
fn pod_routes(lab: &Lab, name: &str) -> Result<()> {
    let (node, host) = (lab.node("node-a")?, lab.host(name)?);
    host.ip_command(&format!("route add {} via {}", node.spec().pods_v4, node.v4()))?;
    host.ip_command(&format!("route add {} via {}", node.spec().pods_v6, node.v6())).map(drop)
}

fn in_shape(ctx: &Context, shape: Shape, steps: &mut Steps) -> Result<()> {
    let lab = shape.lab(ctx)?;
    pod_routes(&lab, "stranger")?;
    let node = lab.node("node-a")?.clone();
    for tool in TOOLS {
        node.run(&[tool, "-P", "FORWARD", "DROP"])?.success()?;
    }
    // Between two ports of a bridge the chain sees neighbour discovery, too, without which pods on it reach nobody: its
    // keeper lets that pass.
    for kind in ["neighbour-solicitation", "neighbour-advertisement"] {
        let rule = ["-A", "FORWARD", "-p", "icmpv6", "--icmpv6-type", kind, "-j", "ACCEPT"];
        node.run(&[&[TOOLS[1]], &rule[..]].concat())?.success()?;
    }
    let before = rules(&node)?;
    let service = |name, number, port, pod: &str| {
        let service = Service::new(name, number).tcp(80, TARGET).udp(80, TARGET).node_port(port);
        Ok::<_, anyhow::Error>(service.pods(&[lab.pod(pod)?]))
    };
    let near = service("near", 10, NODE_PORT, "a2")?;
    let far = service("far", 11, FAR_NODE_PORT, "b1")?;
    let mut cluster = Cluster::start(lab, &["node-a"], &["--accept-forward"], [&near, &far])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let outside = Client::at(cluster.lab.host("client")?)?;
    let stranger = Client::at(cluster.lab.host("stranger")?)?;
    let unseen = Client::at(&cluster.lab.pod("a1")?.unseen())?;
    eventually("the rules", || {
        let listed = TOOLS.map(|tool| node.run(&[tool, "-S", "FORWARD"])?.success());
        let mut count = 0;
        for text in listed {
            count += text?.lines().filter(|line| line.contains("kproxy")).count();
        }
        Ok((count == 4).then_some(()))
    })?;
    for family in Family::BOTH {
        let node_port = |port| SocketAddr::new(node.ip(family), port);
        let cluster_ip = |service: &Service| SocketAddr::new(service.cluster_ip(family), 80);
        for (client, to, server) in [
            (&outside, node_port(NODE_PORT), "a2"),
            (&outside, node_port(FAR_NODE_PORT), "b1"),
            (&unseen, cluster_ip(&near), "a2"),
            (&unseen, cluster_ip(&far), "b1"),
        ] {
            for transport in [Transport::Tcp, Transport::UdpUnconnected] {
                steps.step(&format!("{shape:?}, {} to {to}, {transport:?}", client.name), || {
                    let (answer, _) = ask_from(&client.worker, transport, to)?;
                    ensure!(answer.server == server, "answered by {answer:?}");
                    Ok(())
                });
            }
        }
        steps.step(&format!("{shape:?}, {family:?}: a pod asked directly is not reached"), || {
            let pod = SocketAddr::new(cluster.lab.pod("a2")?.ip(family), TARGET);
            stranger.gets_silence(Transport::Tcp, pod)?;
            stranger.gets_silence(Transport::UdpUnconnected, pod)
        });
    }
    steps.step(&format!("{shape:?}: others' rules are what they were"), || {
        ensure!(rules(&node)? == before, "{:?}, then {:?}", before, rules(&node)?);
        cluster.start_agents(&["node-a"], &[])?;
        let to = SocketAddr::new(node.v4().into(), NODE_PORT);
        eventually("what is of Services to be dropped again", || {
            Ok(outside.gets_silence(Transport::Tcp, to).is_ok().then_some(()))
        })?;
        ensure!(rules(&node)? == before, "{:?}, then {:?}", before, rules(&node)?);
        Ok(())
    });
    Ok(())
}
