//! What netfilter sees of frames between two ports of a bridge can be set while the agent runs.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Cni, Context, Family, Node, NodeSpec};
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, ask_from, eventually};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[("kproxy::a_bridge_is_looked_at_again", looked_at_again)];

fn looked_at_again(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).cni(Cni::Bridge))
            .node(NodeSpec::new("node-b", 2, &["b1"]).cni(Cni::Bridge))
    })?;
    let node = lab.node("node-a")?.clone();
    let set = |name: &str, value: &str| {
        node.netns().set_sysctl(&format!("net/bridge/bridge-nf-call-{name}"), value)
    };
    set("iptables", "1")?;
    set("ip6tables", "1")?;
    let near = Service::new("near", 10).tcp(80, TARGET).udp(80, TARGET).pods(&[lab.pod("a2")?]);
    let far = Service::new("far", 11).tcp(80, TARGET).udp(80, TARGET).pods(&[lab.pod("b1")?]);
    // Pods are served by packets, as explain must know.
    let cluster = Cluster::start(lab, &["node-a"], &["--socket-hooks", "host"], [&near, &far])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let client = Client::at(cluster.lab.pod("a1")?)?;
    let own: BTreeSet<_> = node.own_addresses()?.into_iter().collect();
    // As who the client is seen, and what explain says of that.
    let is_masked = |family: Family| -> Result<bool> {
        let to = SocketAddr::new(near.cluster_ip(family), 80);
        let (answer, _) = ask_from(&client.worker, Transport::Tcp, to)?;
        ensure!(answer.server == "a2", "answered by {answer:?}");
        Ok(own.contains(&answer.client.ip()))
    };
    let said = |service: &Service, family: Family| -> Result<String> {
        said_source(&node, cluster.lab.pod("a1")?.ip(family), service.cluster_ip(family))
    };
    let mut steps = Steps::new();
    for (v4, v6) in [("1", "1"), ("0", "1"), ("1", "0")] {
        steps.step(&format!("bridge-nf-call-iptables {v4}, bridge-nf-call-ip6tables {v6}"), || {
            set("iptables", v4)?;
            set("ip6tables", v6)?;
            for (family, value) in [(Family::V4, v4), (Family::V6, v6)] {
                let expected = value == "0";
                eventually("the client to be seen as it should", || {
                    Ok((is_masked(family)? == expected).then_some(()))
                })?;
                let word = if expected { "masked" } else { "kept" };
                let told = said(&near, family)?;
                ensure!(told == word, "explain says that the source is {told}");
                // A backend on another node answers by way of the host.
                let told = said(&far, family)?;
                ensure!(told == "kept", "explain says that the source is {told} elsewhere");
            }
            Ok(())
        });
    }
    steps.done()
}

/// What `kproxy explain` says about the source that a Service's one backend sees.
fn said_source(node: &Node, from: std::net::IpAddr, to: std::net::IpAddr) -> Result<String> {
    let to = SocketAddr::new(to, 80).to_string();
    let text =
        node.kproxy(&["explain", "--from", &from.to_string(), "--to", &to, "-o", "json"])?.success()?;
    let answer: Value = serde_json::from_str(&text)?;
    let source = answer["backends"][0]["source"].as_str();
    Ok(source.with_context(|| format!("no source in {answer:#}"))?.to_owned())
}
