//! Kernels that lack something, and programs of others on the same hooks.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use kproxy_lab::{Context, Family, Node, NodeSpec, veth_name};
use nix::errno::Errno;
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, ask, eventually};
use crate::objects::Service;
use crate::packets::ping;

pub const SCENARIOS: &[Scenario] =
    &[("kproxy::filters_without_tcx", filters), ("kproxy::sockets_without_set_retval", sockets)];

const NODE_PORT: u16 = 30_080;

/// Programs of kproxy's among the filters on both directions of an interface. Another's filter must stand behind them.
fn ours(node: &Node, interface: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for direction in ["ingress", "egress"] {
        let command = node.command("tc")?.args(["-j", "filter", "show", "dev", interface, direction]);
        let text = command.run()?.success()?;
        let filters: Vec<Value> =
            if text.trim().is_empty() { Vec::new() } else { serde_json::from_str(&text)? };
        let ours = filters.iter().filter(|filter| filter["pref"] == 1);
        names.extend(ours.filter_map(|filter| filter["options"]["bpf_name"].as_str().map(str::to_owned)));
        if interface == "eth0" && direction == "ingress" {
            let is_foreign = |filter: &Value| filter["pref"] == 10 && filter["options"].is_object();
            ensure!(filters.iter().any(is_foreign), "the filter of somebody else is gone: {filters:#?}");
        }
    }
    Ok(names)
}

/// Filters on a clsact qdisc: they stay, are exchanged, come with pods and go, and leave others' alone.
fn filters(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])).client("client"))?;
    let node = lab.node("node-a")?.clone();
    node.run(&["tc", "qdisc", "add", "dev", "eth0", "clsact"])?.success()?;
    // Of somebody else: matches nothing.
    let foreign =
        ["tc", "filter", "add", "dev", "eth0", "ingress", "prio", "10", "bpf", "bytecode", "1,6 0 0 0,"];
    node.run(&foreign)?.success()?;
    let web =
        Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(NODE_PORT).pods(&[lab.pod("a2")?]);
    let mut cluster = Cluster::start_without("tcx", lab, &["node-a"], &[], [&web])?;
    let _servers = cluster.servers(&["a2"])?;
    let client = Client::at(cluster.lab.host("client")?)?;
    let reach = || {
        Family::BOTH.iter().try_for_each(|family| {
            let to = SocketAddr::new(node.ip(*family), NODE_PORT);
            Transport::ALL.iter().try_for_each(|transport| client.reaches(*transport, to, &["a2"]))
        })
    };
    let mut steps = Steps::new();
    steps.step("attached, before others", || {
        let names = ours(&node, "eth0")?;
        ensure!(names.len() == 2, "{names:?}");
        reach()
    });
    steps.step("the host's own packets are answered", || {
        let host = Client::at(&node)?;
        Family::BOTH.iter().try_for_each(|family| {
            let undefined = SocketAddr::new(web.cluster_ip(*family), 9_999);
            host.is_refused_by_packet(Transport::UdpConnected, undefined)?;
            ping(&node, undefined.ip())
        })
    });
    steps.step("exchanged by the next agent, not added", || {
        let open = client.worker.tcp_connect(SocketAddr::new(node.ip(Family::V4), NODE_PORT))?;
        client.worker.tcp_ask(open.id, "hello")?;
        for _ in 0..3 {
            cluster.start_agents(&["node-a"], &[])?;
            let names = ours(&node, "eth0")?;
            ensure!(names.len() == 2, "{names:?}");
            client.worker.tcp_ask(open.id, "still there")?;
        }
        reach()
    });
    steps.step("without an agent", || {
        cluster.forget_agent("node-a");
        reach()?;
        cluster.start_agents(&["node-a"], &[])
    });
    steps.step("a pod that comes later", || {
        let pod = node.add_pod("a9", 2)?;
        let veth = veth_name("a9");
        eventually("filters on its interface", || Ok((ours(&node, &veth)?.len() == 2).then_some(())))?;
        drop(pod.echo(TARGET)?);
        node.remove_pod(pod)
    });
    steps.step("an interface that is excluded", || {
        cluster.start_agents(&["node-a"], &["--exclude-devices", "v-a1"])?;
        eventually("no filters there", || Ok(ours(&node, "v-a1")?.is_empty().then_some(())))?;
        ensure!(ours(&node, "v-a2")?.len() == 2);
        reach()
    });
    steps.step("cleaned up, and nobody else's", || {
        cluster.forget_agent("node-a");
        node.command(kproxy_lab::kproxy_binary()?)?
            .args(["cleanup", "--bpf-root"])
            .arg(node.bpf_root())
            .arg("--cgroup-root")
            .arg(node.cgroup_root())
            .run()?
            .success()?;
        for interface in ["eth0", "v-a1", "v-a2"] {
            let names = ours(&node, interface)?;
            ensure!(names.is_empty(), "{interface}: {names:?}");
        }
        Ok(())
    });
    steps.done()
}

/// Without `bpf_set_retval` (before 5.18) a refused call is sent to a port of loopback that refuses.
fn sockets(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])))?;
    let empty = Service::new("empty", 10).tcp(80, TARGET).udp(80, TARGET);
    let web = Service::new("web", 11).tcp(80, TARGET).udp(80, TARGET).pods(&[lab.pod("a2")?]);
    let cluster = Cluster::start_without("set-retval,batches", lab, &["node-a"], &[], [&empty, &web])?;
    let _servers = cluster.servers(&["a2"])?;
    let mut steps = Steps::new();
    for (name, client) in [("a1", cluster.pod("a1")?), ("node-a", Client::at(cluster.node("node-a")?)?)] {
        for family in Family::BOTH {
            let (to, serving) =
                (SocketAddr::new(empty.cluster_ip(family), 80), SocketAddr::new(web.cluster_ip(family), 80));
            let worker = &client.worker;
            steps.step(&format!("{name}, TCP, {family:?}"), || client.is_refused(Transport::Tcp, to));
            steps.step(&format!("{name}, connected UDP, {family:?}"), || {
                let socket = worker.udp_socket(family)?.id;
                // The refusal comes with the first datagram, as it does for a packet that is refused on its way.
                worker.udp_connect(socket, to)?;
                let refused = worker
                    .udp_send(socket, "hello")
                    .and_then(|()| worker.udp_receive(socket, Duration::from_secs(1)).map(drop));
                match refused {
                    Err(error) if error.errno() == Some(Errno::ECONNREFUSED) => {}
                    other => bail!("{other:?}"),
                }
                Ok(worker.close(socket)?)
            });
            steps.step(&format!("{name}, unconnected UDP, {family:?}"), || {
                let socket = worker.udp_socket(family)?.id;
                let refused = worker.udp_send_to(socket, to, "hello");
                ensure!(
                    refused.as_ref().is_err_and(|error| error.errno() == Some(Errno::EPERM)),
                    "{refused:?}"
                );
                Ok(worker.close(socket)?)
            });
            for transport in Transport::ALL {
                steps.step(&format!("{name}, served, {transport:?}, {family:?}"), || {
                    ask(worker, transport, serving)?;
                    Ok(())
                });
            }
        }
    }
    steps.done()
}
