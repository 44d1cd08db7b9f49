//! The ways in which pods are wired, for scenarios that must hold in each; and what programs counted.

use anyhow::{Context as _, Result};
use kproxy_common::Reason;
use kproxy_lab::{Cni, Context, ElbSpec, Family, HostSpec, Lab, Node, NodeSpec};
use serde_json::Value;

use crate::cluster::Steps;
use crate::dumps;
use crate::objects::Service;

/// How pods are wired, and whether frames between two ports of a bridge pass netfilter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Routed,
    Bridge,
    /// `bridge-nf-call-iptables` and its twin are off.
    BridgeUnfiltered,
    Vxlan,
}

impl Shape {
    pub const ALL: [Self; 4] = [Self::Routed, Self::Bridge, Self::BridgeUnfiltered, Self::Vxlan];

    /// Does the same in a lab of each shape.
    pub fn each(ctx: &Context, mut in_shape: impl FnMut(Self, &mut Steps) -> Result<()>) -> Result<()> {
        let mut steps = Steps::new();
        for shape in Self::ALL {
            in_shape(shape, &mut steps)?;
            ctx.forget_labs();
        }
        steps.done()
    }

    pub fn cni(self) -> Cni {
        match self {
            Self::Routed => Cni::RoutedVeth,
            Self::Bridge | Self::BridgeUnfiltered => Cni::Bridge,
            Self::Vxlan => Cni::Vxlan,
        }
    }

    /// Two nodes, with pods a1, a2 and b1, the load balancer's machine, and two machines beside, `client` and
    /// `stranger`, that send what is for load-balancer addresses to node-a.
    pub fn lab(self, ctx: &Context) -> Result<Lab> {
        let lab = ctx.lab(|lab| {
            lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).cni(self.cni()))
                .node(NodeSpec::new("node-b", 2, &["b1"]).cni(self.cni()))
                .elb(ElbSpec::new())
                .client("client")
                .host(HostSpec::new("stranger", 101))
        })?;
        for node in lab.nodes() {
            self.set_bridge_filter(node)?;
        }
        for name in ["client", "stranger"] {
            // A node tells whoever it is a detour for, as it is here for what is passed through.
            for setting in ["ipv4/conf/all", "ipv4/conf/eth0", "ipv6/conf/eth0"] {
                lab.host(name)?.netns().set_sysctl(&format!("net/{setting}/accept_redirects"), "0")?;
            }
            for vip in lab.elb()?.vips() {
                let via = lab.node("node-a")?.ip(if vip.is_ipv4() { Family::V4 } else { Family::V6 });
                lab.host(name)?.ip_command(&format!("route add {vip} via {via}"))?;
            }
        }
        Ok(lab)
    }

    fn set_bridge_filter(self, node: &Node) -> Result<()> {
        let value = if self == Self::BridgeUnfiltered { "0" } else { "1" };
        ["iptables", "ip6tables"]
            .iter()
            .try_for_each(|name| node.netns().set_sysctl(&format!("net/bridge/bridge-nf-call-{name}"), value))
    }
}

/// NodePorts of [`near_and_far`].
pub const NODE_PORT: u16 = 30_080;
pub const FAR_NODE_PORT: u16 = 30_081;

/// A Service with a backend on node-a, a2, and one with a backend on node-b, b1, with these ports.
pub fn near_and_far(lab: &Lab, ports: impl Fn(Service) -> Service) -> Result<[Service; 2]> {
    let service = |name, number, node_port, pod| -> Result<Service> {
        Ok(ports(Service::new(name, number)).node_port(node_port).pods(&[lab.pod(pod)?]))
    };
    Ok([service("near", 10, NODE_PORT, "a2")?, service("far", 11, FAR_NODE_PORT, "b1")?])
}

/// How often a node's packet programs gave this reason.
pub fn counted(node: &Node, reason: Reason) -> Result<u64> {
    let text = dumps::element(node, "reason", reason as u32)?;
    let element: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let cpus = element["values"].as_array().with_context(|| format!("no values in {text}"))?;
    let counts = cpus.iter().map(|cpu| cpu["value"].as_u64());
    counts.sum::<Option<u64>>().with_context(|| format!("no numbers in {text}"))
}
