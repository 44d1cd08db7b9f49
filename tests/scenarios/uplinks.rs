//! Which interfaces lead to pods of the node and which to everybody else, where nobody says which addresses are the
//! node's: no Node object, and uplinks that are pairs of veths as pods' interfaces are (kind, nested clusters).

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Cni, Context, Family, HostSpec, Node, NodeSpec, RpFilter};
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, ask_from, eventually};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[("kproxy::an_uplink_is_known_by_what_it_is", known)];

const LOCAL: u16 = 30_080;
const CLUSTER: u16 = 30_081;

fn known(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).rp_filter(RpFilter::Loose))
            .node(NodeSpec::new("node-b", 2, &["b1", "b2"]).cni(Cni::Bridge))
            .client("client")
            .host(HostSpec::new("second", 101))
            .host(HostSpec::new("third", 102))
    })?;
    let local = Service::new("local", 10).tcp(80, TARGET).udp(80, TARGET).node_port(LOCAL).local();
    let local = local.pods(&[lab.pod("a2")?, lab.pod("b2")?]);
    let cluster = Service::new("cluster", 11).tcp(80, TARGET).udp(80, TARGET).node_port(CLUSTER);
    let cluster = cluster.pods(&[lab.pod("b2")?]);
    let here = Cluster::start(lab, &[], &[], [&local, &cluster])?;
    let _servers = here.servers(&["a2", "b2"])?;
    let (a, b) = (here.node("node-a")?.clone(), here.node("node-b")?.clone());
    // As a point-to-point CNI does it: a pod's gateway on each pair.
    a.ip_command("address add 10.244.1.1/32 dev v-a1")?;
    a.ip_command("address add fd00:10:244:1::1/128 dev v-a1 nodad")?;
    let mut agents = Vec::new();
    for node in [&a, &b] {
        let agent = node.agent().manifests(&here.folder).without_node_addresses().without_cluster_cidr();
        let mut agent = agent.start()?;
        agent.wait_synced()?;
        agents.push(agent);
    }
    let client = Client::at(here.lab.host("client")?)?;
    let mut steps = Steps::new();

    steps.step("explain says who is what", || {
        for family in Family::BOTH {
            for (node, from, expected) in [
                (&a, here.lab.host("client")?.ip(family), "outside"),
                (&a, here.lab.pod("a1")?.ip(family), "pod"),
                (&a, here.lab.pod("a2")?.ip(family), "pod"),
                (&a, here.lab.pod("b1")?.ip(family), "outside"),
                (&a, a.ip(family), "host"),
                (&b, here.lab.host("client")?.ip(family), "outside"),
                (&b, here.lab.pod("b1")?.ip(family), "pod"),
            ] {
                is_said(node, from, expected)?;
            }
        }
        Ok(())
    });
    steps.step("an outside client is bound by policy Local", || {
        for family in Family::BOTH {
            for transport in Transport::ALL {
                client.reaches(transport, SocketAddr::new(a.ip(family), LOCAL), &["a2"])?;
                client.reaches(transport, SocketAddr::new(b.ip(family), LOCAL), &["b2"])?;
            }
        }
        Ok(())
    });
    steps.step("and masqueraded towards another node's backend", || {
        for family in Family::BOTH {
            let to = SocketAddr::new(a.ip(family), CLUSTER);
            let (answer, _) = ask_from(&client.worker, Transport::Tcp, to)?;
            ensure!(answer.server == "b2" && a.own_addresses()?.contains(&answer.client.ip()), "{answer:?}");
        }
        Ok(())
    });
    steps.step("a pod that only packet hooks see is not", || {
        for (node, pod) in [(&a, "a1"), (&b, "b1")] {
            let unseen = Client::at(&here.lab.pod(pod)?.unseen())?;
            for family in Family::BOTH {
                unseen.reaches(Transport::Tcp, SocketAddr::new(node.ip(family), LOCAL), &["a2", "b2"])?;
            }
        }
        Ok(())
    });
    steps.step("a second uplink, with a network and no default route", || {
        let host = here.lab.host("second")?;
        a.ip_command("link add eth1 type veth peer name far netns second")?;
        a.ip_command("address add 198.18.1.1/24 dev eth1")?;
        a.ip_command("link set eth1 up")?;
        host.ip_command("address add 198.18.1.2/24 dev far")?;
        host.ip_command("link set far up")?;
        eventually("it to be told", || Ok(is_said(&a, "198.18.1.2".parse()?, "outside").ok()))?;
        let mut client = Client::at(host)?;
        client.addresses.insert("198.18.1.2".parse()?);
        client.reaches(Transport::Tcp, SocketAddr::new("198.18.1.1".parse()?, LOCAL), &["a2"])
    });
    steps.step("a third, with an address of its own alone and a default route, while it has that", || {
        let host = here.lab.host("third")?;
        a.ip_command("link add eth2 type veth peer name far netns third")?;
        a.ip_command("address add 198.18.2.1/32 dev eth2")?;
        a.ip_command("link set eth2 up")?;
        a.ip_command("route add 198.18.2.2/32 dev eth2")?;
        host.ip_command("address add 198.18.2.2/32 dev far")?;
        host.ip_command("link set far up")?;
        host.ip_command("route add 198.18.2.1/32 dev far")?;
        eventually("it to be a pod's", || Ok(is_said(&a, "198.18.2.2".parse()?, "pod").ok()))?;
        a.ip_command("route add default via 198.18.2.2 dev eth2 metric 2000 onlink")?;
        eventually("it to be outside", || Ok(is_said(&a, "198.18.2.2".parse()?, "outside").ok()))?;
        let mut client = Client::at(host)?;
        client.addresses.insert("198.18.2.2".parse()?);
        client.reaches(Transport::Tcp, SocketAddr::new("198.18.2.1".parse()?, LOCAL), &["a2"])?;
        a.ip_command("route del default via 198.18.2.2 dev eth2 metric 2000")?;
        eventually("it to be a pod's again", || Ok(is_said(&a, "198.18.2.2".parse()?, "pod").ok()))
    });
    steps.done()
}

/// What `kproxy explain` says that this client is.
fn is_said(node: &Node, from: std::net::IpAddr, expected: &str) -> Result<()> {
    let to = SocketAddr::new(if from.is_ipv4() { node.v4().into() } else { node.v6().into() }, LOCAL);
    let arguments = ["explain", "--from", &from.to_string(), "--to", &to.to_string(), "-o", "json"];
    let text = node.kproxy(&arguments)?.success()?;
    let answer: Value = serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))?;
    ensure!(answer["client"] == expected, "{from} on {} is no {expected}: {answer:#}", node.name());
    Ok(())
}
