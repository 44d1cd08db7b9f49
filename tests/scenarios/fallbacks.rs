//! Kernels that lack something, and programs of others on the same hooks.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use aya::programs::tc::{NlOptions, TcAttachOptions, TcHandle};
use aya::programs::{SchedClassifier, TcAttachType};
use kproxy_lab::{Context, Family, Node, NodeSpec, veth_name};
use nix::errno::Errno;
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, ask, eventually, packet_programs};
use crate::objects::Service;
use crate::packets::ping;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::filters_without_tcx", filters),
    ("kproxy::filters_that_are_taken_off_come_back", filters_come_back),
    ("kproxy::links_that_are_detached_come_back", links_come_back),
    ("kproxy::sockets_without_set_retval", sockets),
];

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

/// What stands at both directions of the uplink, and a client is served.
fn is_whole(node: &Node, client: &Client) -> Result<()> {
    eventually("the filters of kproxy, one each way", || {
        let count = |way: &str| Ok::<_, anyhow::Error>(own_filters(node, way)?.len());
        Ok((count("ingress")? == 1 && count("egress")? == 1).then_some(()))
    })?;
    Family::BOTH.iter().try_for_each(|family| {
        let to = SocketAddr::new(node.ip(*family), NODE_PORT);
        Transport::ALL.iter().try_for_each(|transport| client.reaches(*transport, to, &["a2"]))
    })
}

/// kproxy's filters on the uplink: handle and name.
fn own_filters(node: &Node, way: &str) -> Result<Vec<(String, String)>> {
    let text = node.command("tc")?.args(["-j", "filter", "show", "dev", "eth0", way]).run()?.success()?;
    let filters: Vec<Value> = if text.trim().is_empty() { Vec::new() } else { serde_json::from_str(&text)? };
    let named = filters.iter().filter(|filter| filter["pref"] == 1).filter_map(|filter| {
        let options = &filter["options"];
        let name = options["bpf_name"].as_str()?;
        let is_own = ["in_eth", "out_eth"].contains(&name);
        is_own.then(|| (options["handle"].as_str().unwrap_or_default().to_owned(), name.to_owned()))
    });
    Ok(named.collect())
}

/// The program, attached by a filter at a handle of our choice.
fn put_filter(node: &Node, program: &mut SchedClassifier, way: TcAttachType, handle: u16) -> Result<()> {
    node.netns().within(|| {
        // There already or not.
        let _ = aya::programs::tc::qdisc_add_clsact("eth0");
        let handle = TcHandle::new(0, handle);
        let options = TcAttachOptions::Netlink(NlOptions { priority: 1, handle, ..NlOptions::default() });
        let id = program.attach_with_options("eth0", way, options)?;
        std::mem::forget(program.take_link(id)?);
        Ok(())
    })
}

/// Deleted filters, and every state that an agent can leave that is killed at any step.
fn filters_come_back(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])).client("client"))?;
    let node = lab.node("node-a")?.clone();
    let web =
        Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(NODE_PORT).pods(&[lab.pod("a2")?]);
    let mut cluster = Cluster::start_without("tcx", lab, &["node-a"], &[], [&web])?;
    let _servers = cluster.servers(&["a2"])?;
    let client = Client::at(cluster.lab.host("client")?)?;
    let mut steps = Steps::new();
    for (what, command) in [
        ("ingress deleted", "filter del dev eth0 ingress"),
        ("egress deleted", "filter del dev eth0 egress"),
        ("the qdisc deleted", "qdisc del dev eth0 clsact"),
    ] {
        steps.step(what, || {
            is_whole(&node, &client)?;
            let words: Vec<&str> = std::iter::once("tc").chain(command.split(' ')).collect();
            node.run(&words)?.success()?;
            is_whole(&node, &client)?;
            let told = |line: &kproxy_lab::LogLine| format!("{line:?}").contains("attached again");
            ensure!(cluster.agent("node-a")?.log().iter().any(told), "nobody was told");
            Ok(())
        });
    }
    // Programs of an agent before: the same names, other programs than the next agent's.
    let earlier = ["ingress", "egress"].map(|way| pin_program(&node, way));
    let [inward, outward] = earlier;
    let (mut inward, mut outward) = (inward?, outward?);
    for (what, states) in [
        ("a qdisc without filters", &[][..]),
        (
            "the old filter and the new one",
            &[(true, 0x6b70), (true, 0x6b71), (false, 0x6b70), (false, 0x6b71)],
        ),
        ("one way only", &[(false, 0x6b71)]),
        ("more than a crash leaves", &[(true, 0x6b70), (true, 0x6b71), (true, 0x6b72), (true, 0x6b7f)]),
    ] {
        steps.step(what, || {
            cluster.forget_agent("node-a");
            node.run(&["tc", "qdisc", "replace", "dev", "eth0", "clsact"])?;
            for way in ["ingress", "egress"] {
                node.run(&["tc", "filter", "del", "dev", "eth0", way])?;
            }
            for (is_ingress, handle) in states {
                match is_ingress {
                    true => put_filter(&node, &mut inward, TcAttachType::Ingress, *handle)?,
                    false => put_filter(&node, &mut outward, TcAttachType::Egress, *handle)?,
                }
            }
            cluster.start_agents(&["node-a"], &[])?;
            is_whole(&node, &client)
        });
    }
    steps.step("filters of others at our priority and handles", || {
        cluster.forget_agent("node-a");
        for way in ["ingress", "egress"] {
            node.run(&["tc", "filter", "del", "dev", "eth0", way])?;
            for handle in ["0x6b70", "0x6b71"] {
                let add = ["tc", "filter", "add", "dev", "eth0", way, "prio", "1", "handle", handle];
                let what = ["bpf", "bytecode", "1,6 0 0 0,"];
                node.run(&[&add[..], &what[..]].concat())?.success()?;
            }
        }
        cluster.start_agents(&["node-a"], &[])?;
        is_whole(&node, &client)?;
        let text = node.command("tc")?.args(["filter", "show", "dev", "eth0", "ingress"]).run()?.success()?;
        ensure!(text.contains("handle 0x6b70 ") && text.contains("handle 0x6b71 "), "{text}");
        Ok(())
    });
    steps.step("check tells what stands before", || {
        let add = ["tc", "filter", "add", "dev", "eth0", "ingress", "prio", "1", "handle", "0x1"];
        node.run(&[&add[..], &["bpf", "bytecode", "1,6 0 0 0,"]].concat())?.success()?;
        let output = node
            .command(kproxy_lab::kproxy_binary()?)?
            .args(["check", "--cgroup-root"])
            .arg(node.cgroup_root())
            .args(["--bpf-root"])
            .arg(node.bpf_root())
            .run()?;
        let line = output.stdout.lines().find(|line| line.starts_with("order of packet hooks"));
        let said = line.is_some_and(|line| {
            line.contains("warning") && line.contains("eth0 ingress: bpf") && line.contains("handle 0x1)")
        });
        ensure!(said, "{line:?}");
        Ok(())
    });
    steps.step("a filter of another kind where ours goes is told", || {
        cluster.forget_agent("node-a");
        node.run(&["tc", "qdisc", "del", "dev", "eth0", "clsact"])?.success()?;
        node.run(&["tc", "qdisc", "add", "dev", "eth0", "clsact"])?.success()?;
        let add = ["tc", "filter", "add", "dev", "eth0", "ingress", "prio", "1"];
        let what = ["protocol", "all", "matchall", "action", "continue"];
        let add = node.run(&[&add[..], &what[..]].concat())?;
        if add.success().is_err() {
            eprintln!("  skipped: this kernel has no matchall filter");
            return Ok(());
        }
        cluster.start_agents(&["node-a"], &[])?;
        eventually("the warning", || {
            let log = cluster.agent("node-a")?.log();
            let told = log.iter().any(|line| {
                format!("{line:?}").contains("matchall (pref 1") && format!("{line:?}").contains("eth0")
            });
            Ok(told.then_some(()))
        })?;
        node.run(&["tc", "filter", "del", "dev", "eth0", "ingress"])?.success()?;
        is_whole(&node, &client)
    });
    steps.done()
}

/// The program of kproxy's filter on the uplink, to be attached again when its agent is gone.
fn pin_program(node: &Node, way: &str) -> Result<SchedClassifier> {
    let text = node.command("tc")?.args(["-j", "filter", "show", "dev", "eth0", way]).run()?.success()?;
    let filters: Vec<Value> = serde_json::from_str(&text)?;
    let id = filters.iter().find_map(|filter| filter["options"]["prog"]["id"].as_u64());
    let id = id.ok_or_else(|| anyhow::anyhow!("no program: {text}"))?.to_string();
    let pin = node.bpf_root().join(format!("earlier_{way}"));
    node.command("bpftool")?.args(["prog", "pin", "id", &id]).arg(&pin).run()?.success()?;
    let program = SchedClassifier::from_pin(&pin)?;
    std::fs::remove_file(&pin)?;
    Ok(program)
}

/// Links that somebody detaches, or whose pins somebody removes.
fn links_come_back(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])).client("client"))?;
    let node = lab.node("node-a")?.clone();
    let web =
        Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(NODE_PORT).pods(&[lab.pod("a2")?]);
    let cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    let _servers = cluster.servers(&["a2"])?;
    let outside = Client::at(cluster.lab.host("client")?)?;
    let inside = cluster.pod("a1")?;
    let links = node.bpf_root().join("links");
    let index = node.interface_index("eth0")?;
    let served = || -> Result<()> {
        Family::BOTH.iter().try_for_each(|family| {
            let to = SocketAddr::new(node.ip(*family), NODE_PORT);
            Transport::ALL.iter().try_for_each(|transport| outside.reaches(*transport, to, &["a2"]))?;
            ask(&inside.worker, Transport::Tcp, SocketAddr::new(web.cluster_ip(*family), 80))?;
            Ok(())
        })
    };
    let back = |pin: &str| {
        eventually("the link to be attached again", || {
            if pin.starts_with("tc_") {
                let both = packet_programs(&node, "eth0")?.len() == 2;
                return Ok((both && links.join(pin).exists()).then_some(()));
            }
            let output =
                node.command("bpftool")?.args(["-j", "link", "show", "pinned"]).arg(links.join(pin)).run()?;
            let link: Value = serde_json::from_str(output.stdout.trim()).unwrap_or_default();
            let leads_somewhere = link["cgroup_id"].as_u64().is_some_and(|id| id != 0);
            Ok((output.success().is_ok() && leads_somewhere).then_some(()))
        })
    };
    let mut steps = Steps::new();
    steps.step("before", served);
    for pin in [format!("tc_{index}_in"), format!("tc_{index}_out"), "connect4".to_owned()] {
        for by_pin in [false, true] {
            steps.step(&format!("{pin}, {}", if by_pin { "its pin removed" } else { "detached" }), || {
                let path = links.join(&pin);
                if by_pin {
                    node.command("rm")?.arg(&path).run()?.success()?;
                } else {
                    let detach = node.command("bpftool")?.args(["link", "detach", "pinned"]).arg(&path);
                    detach.run()?.success()?;
                }
                back(&pin)?;
                served()
            });
        }
    }
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
