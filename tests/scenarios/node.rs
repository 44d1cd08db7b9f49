//! What else is on a node: its firewall, its sysctls, what a kube-proxy left; and flags about packets.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use kproxy_lab::{Cni, Context, Family, Lab, Node, NodeSpec};
use serde_json::json;

use crate::Scenario;
use crate::cluster::{Client, Cluster, DEADLINE, Steps, TARGET, Transport, ask_from, check, eventually};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::what_stands_in_the_way_is_told", in_the_way),
    ("kproxy::conntrack_sysctls_are_those_of_kube_proxy", sysctls),
    ("kproxy::masquerade_all_masks_pods", masquerade_all),
    ("kproxy::traffic_of_services_passes_a_closed_firewall", accept_forward),
    ("kproxy::masks_follow_the_node_object", masks_follow),
];

fn lab(ctx: &Context) -> Result<Lab> {
    ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])).node(NodeSpec::new("node-b", 2, &["b1"]))
    })
}

fn in_the_way(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]).cni(Cni::Bridge))
    })?;
    let node = lab.node("node-a")?.clone();
    let mut steps = Steps::new();
    let warns = |node: &Node, name: &str, words: &[&str]| -> Result<()> {
        let (status, detail) = check(node, name)?;
        ensure!(status == "warning", "{name}: {status}: {detail}");
        for word in words {
            ensure!(detail.contains(word), "no {word:?} in {detail}");
        }
        Ok(())
    };

    steps.step("a node with nothing in the way", || {
        for name in [
            "kube-proxy",
            "leftover interfaces",
            "FORWARD policy",
            "bridge-nf-call-iptables",
            "reserved ports",
            "forwarding",
            "firewall on NodePorts",
            "IPsec policies",
            "in-kernel clients",
        ] {
            let (status, detail) = check(&node, name)?;
            ensure!(status == "ok", "{name}: {detail}");
        }
        Ok(())
    });
    steps.step("forward chains that drop, of every kind", || {
        node.nft("table inet fw {\n chain through {\n type filter hook forward priority 0; policy drop;\n accept\n }\n}\n")?;
        node.run(&["iptables", "-P", "FORWARD", "DROP"])?.success()?;
        node.run(&["ip6tables-legacy", "-P", "FORWARD", "DROP"])?.success()?;
        let expected = [
            "nftables inet fw through",
            "nft insert rule inet fw through",
            "iptables (nf_tables) ip filter FORWARD",
            "iptables (legacy) ip6 filter FORWARD",
            "ip6tables-legacy -P FORWARD ACCEPT",
        ];
        warns(&node, "FORWARD policy", &expected)
    });
    steps.step("kube-proxy's leftovers", || {
        node.nft("add table ip6 kube-proxy")?;
        node.run(&["iptables-legacy", "-t", "nat", "-N", "KUBE-SERVICES"])?.success()?;
        let expected = [
            "nftables table ip6 kube-proxy",
            "nft delete table ip6 kube-proxy",
            "KUBE-SERVICES",
            "kube-proxy --cleanup",
        ];
        warns(&node, "kube-proxy", &expected)
    });
    steps.step("firewall rules that NodePorts' packets no longer meet", || {
        node.nft(
            "table inet early {\n chain guard {\n type filter hook prerouting priority mangle;\n \
             tcp dport 30000-32767 drop\n tcp dport 80 drop\n }\n}\n",
        )?;
        node.run(&[
            "iptables",
            "-t",
            "raw",
            "-A",
            "PREROUTING",
            "-p",
            "udp",
            "--dport",
            "30053",
            "-j",
            "DROP",
        ])?
        .success()?;
        let expected =
            ["nft inet early guard", "-A PREROUTING -p udp -m udp --dport 30053 -j DROP", "FORWARD"];
        warns(&node, "firewall on NodePorts", &expected)
    });
    steps.step("an IPsec policy", || {
        let add = "xfrm policy add src 10.0.0.0/8 dst 10.244.0.0/16 dir out tmpl src 192.0.2.1 dst 192.0.2.2 \
                   proto esp mode tunnel";
        node.ip_command(add)?;
        let six =
            "xfrm policy add src 2001:db8::/32 dst 2001:db8:1::/48 dir in tmpl proto esp mode transport";
        node.ip_command(six)?;
        let expected = [
            "src 10.0.0.0/8 dst 10.244.0.0/16 dir out",
            "src 2001:db8::/32 dst 2001:db8:1::/48 dir in",
            "transport mode",
        ];
        warns(&node, "IPsec policies", &expected)
    });
    steps.step("kube-ipvs0", || {
        // This kernel has no dummy devices: a bridge of that name is as good.
        node.ip_command("link add kube-ipvs0 type bridge")?;
        warns(&node, "leftover interfaces", &["ip link delete kube-ipvs0"])
    });
    steps.step("a bridge whose packets iptables does not see", || {
        let bridged = lab.node("node-b")?;
        let path = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        let write = |value: &str| bridged.run(&["sh", "-c", &format!("echo {value} > {path}")])?.success();
        if bridged.run(&["test", "-e", path])?.code() != Some(0) {
            return warns(bridged, "bridge-nf-call-iptables", &["modprobe br_netfilter"]);
        }
        write("0")?;
        warns(bridged, "bridge-nf-call-iptables", &["net.bridge.bridge-nf-call-iptables=1"])?;
        write("1")?;
        let (status, detail) = check(bridged, "bridge-nf-call-iptables")?;
        ensure!(status == "ok", "{detail}");
        Ok(())
    });
    steps.step("no forwarding", || {
        let set = |value: &str| {
            node.run(&["sh", "-c", &format!("echo {value} > /proc/sys/net/ipv4/ip_forward")])?.success()
        };
        set("0")?;
        warns(&node, "forwarding", &["net.ipv4.ip_forward=1"])?;
        set("1").map(drop)
    });
    steps.step("the agent tells it at its start", || {
        let mut cluster = Cluster::start(lab.clone(), &["node-a"], &[], [])?;
        let agent = cluster.agent("node-a")?;
        for word in ["inet fw through", "kube-proxy --cleanup", "ip link delete kube-ipvs0"] {
            let line = agent.wait_log("it saying so", DEADLINE, |line| line.message.contains(word))?;
            ensure!(line.level == "WARN", "{line:?}");
        }
        Ok(())
    });
    steps.done()
}

fn sysctls(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let (a, b) = (lab.node("node-a")?.clone(), lab.node("node-b")?.clone());
    let read = |node: &Node, name: &str| -> Result<String> {
        Ok(node.run(&["cat", &format!("/proc/sys/net/netfilter/{name}")])?.success()?.trim().to_owned())
    };
    let max_before = read(&a, "nf_conntrack_max")?;
    let (established, close_wait) =
        ("nf_conntrack_tcp_timeout_established", "nf_conntrack_tcp_timeout_close_wait");
    let before = [read(&b, established)?, read(&b, close_wait)?];
    ensure!(before != ["86400", "3600"], "they are as wanted before anybody set them");
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [])?;
    ensure!(
        [read(&a, established)?, read(&a, close_wait)?] == ["86400", "3600"],
        "{}",
        read(&a, established)?
    );
    cluster.start_agents(&["node-b"], &["--disable-conntrack-sysctls"])?;
    ensure!([read(&b, established)?, read(&b, close_wait)?] == before, "{}", read(&b, established)?);
    // That of the whole machine cannot be changed from here, and is not.
    ensure!(read(&a, "nf_conntrack_max")? == max_before, "the machine's maximum has changed");
    Ok(())
}

fn masquerade_all(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let web = Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(30_080);
    let web = web.pods(&[lab.pod("a2")?, lab.pod("b1")?]);
    let mut cluster = Cluster::start(lab, &["node-a"], &["--masquerade-all"], [&web])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let (pod, host) = (cluster.pod("a1")?, cluster.host("node-a")?);
    let node = cluster.node("node-a")?.clone();
    let own: std::collections::BTreeSet<_> = node.own_addresses()?.into_iter().collect();
    let seen =
        |client: &Client, transport: Transport, to: SocketAddr, server: &str| -> Result<std::net::IpAddr> {
            for _ in 0..60 {
                let (answer, _) = ask_from(&client.worker, transport, to)?;
                if answer.server == server {
                    return Ok(answer.client.ip().to_canonical());
                }
            }
            anyhow::bail!("{server} never answered")
        };
    let mut steps = Steps::new();

    steps.step("pods are masked towards ClusterIPs, wherever the backend is", || {
        for family in Family::BOTH {
            for transport in Transport::ALL {
                for server in ["a2", "b1"] {
                    let to = SocketAddr::new(web.cluster_ip(family), 80);
                    let client = seen(&pod, transport, to, server)?;
                    ensure!(own.contains(&client), "{transport:?} to {to} at {server} is seen as {client}");
                }
            }
        }
        Ok(())
    });
    steps.step("NodePorts keep the pod's own address", || {
        let to = SocketAddr::new(node.v4().into(), 30_080);
        let client = seen(&pod, Transport::Tcp, to, "a2")?;
        ensure!(client == cluster.lab.pod("a1")?.v4(), "seen as {client}");
        Ok(())
    });
    steps.step("the host is served as ever", || {
        for family in Family::BOTH {
            for transport in Transport::ALL {
                host.reaches(transport, SocketAddr::new(web.cluster_ip(family), 80), &["a2", "b1"])?;
            }
        }
        Ok(())
    });
    steps.step("a Service without endpoints refuses at once", || {
        cluster.put(&web.clone().pods(&[]))?;
        pod.is_refused(Transport::Tcp, SocketAddr::new(web.cluster_ip(Family::V4), 80))
    });
    steps.done()
}

/// FORWARD drops by default: in iptables on nf_tables for IPv4, and on its own tables for IPv6.
fn accept_forward(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]))
            .client("client")
    })?;
    let node = lab.node("node-a")?.clone();
    for tool in ["iptables-nft", "ip6tables-legacy"] {
        node.run(&[tool, "-P", "FORWARD", "DROP"])?.success()?;
    }
    let web = Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(30_080);
    let web = web.pods(&[lab.pod("a2")?, lab.pod("b1")?]);
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let outside = cluster.lab.host("client")?.clone();
    let beyond = outside.echo(TARGET)?;
    let (client, pod) = (Client::at(&outside)?, cluster.pod("a1")?);
    let rules = |node: &Node| -> Result<Vec<String>> {
        let mut rules = Vec::new();
        for tool in ["iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"] {
            let listed = node.run(&[tool, "-S", "FORWARD"])?.success()?;
            let ours = listed.lines().filter(|line| line.contains("kproxy"));
            rules.extend(ours.map(|line| format!("{tool} {line}")));
        }
        Ok(rules)
    };
    // From a backend on this node, by its own name; from the other one the client is seen masked.
    let answers = |family: Family, transport: Transport| -> Result<()> {
        let to = SocketAddr::new(node.ip(family), 30_080);
        let mut missing = vec!["a2", "b1"];
        for _ in 0..60 {
            let (answer, _) = ask_from(&client.worker, transport, to)?;
            missing.retain(|server| *server != answer.server);
            if missing.is_empty() {
                return Ok(());
            }
        }
        anyhow::bail!("{missing:?} never answered at {to}")
    };
    let mut steps = Steps::new();

    steps.step("without the flag it is dropped, and told", || {
        for family in Family::BOTH {
            client.gets_silence(Transport::Tcp, SocketAddr::new(node.ip(family), 30_080))?;
        }
        let agent = cluster.agent("node-a")?;
        agent.wait_log("it saying so", DEADLINE, |line| {
            line.level == "WARN" && line.message.contains("give the agent --accept-forward")
        })?;
        ensure!(rules(&node)?.is_empty(), "{:?}", rules(&node)?);
        Ok(())
    });
    steps.step("with it traffic of Services passes", || {
        cluster.start_agents(&["node-a"], &["--accept-forward"])?;
        eventually("the rules", || Ok((rules(&node)?.len() == 4).then_some(())))?;
        for family in Family::BOTH {
            for transport in Transport::ALL {
                answers(family, transport)?;
            }
        }
        Ok(())
    });
    steps.step("and nothing else", || {
        for family in Family::BOTH {
            pod.gets_silence(Transport::Tcp, beyond.address(family))?;
        }
        Ok(())
    });
    steps.step("a restart adds none, and a rule that goes is put back at the next", || {
        node.run(&["sh", "-c", "iptables-nft -D FORWARD 1"])?.success()?;
        cluster.start_agents(&["node-a"], &["--accept-forward"])?;
        eventually("the rules", || Ok((rules(&node)?.len() == 4).then_some(())))?;
        answers(Family::V4, Transport::Tcp)
    });
    steps.step("without the flag they are withdrawn", || {
        cluster.start_agents(&["node-a"], &[])?;
        eventually("no rules", || Ok(rules(&node)?.is_empty().then_some(())))
    });
    steps.step("cleanup takes them away", || {
        cluster.start_agents(&["node-a"], &["--accept-forward"])?;
        eventually("the rules", || Ok((rules(&node)?.len() == 4).then_some(())))?;
        cluster.forget_agent("node-a");
        let cgroup = node.cgroup_root().display().to_string();
        let output = node.kproxy(&["cleanup", "--cgroup-root", &cgroup])?.success()?;
        ensure!(output.contains("4 firewall rules"), "{output}");
        ensure!(rules(&node)?.is_empty(), "{:?}", rules(&node)?);
        Ok(())
    });
    steps.done()
}

/// Which of an interface's addresses is the node's own, the Node object says, and may say otherwise later.
fn masks_follow(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]))
            .client("client")
    })?;
    let web = Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(30_080);
    let web = web.pods(&[lab.pod("b1")?]);
    let cluster = Cluster::start(lab, &[], &[], [&web])?;
    let _servers = cluster.servers(&["b1"])?;
    let node = cluster.lab.node("node-a")?.clone();
    let first = Family::BOTH.map(|family| node.ip(family).to_string());
    let second = ["192.0.2.200".to_owned(), "2001:db8::200".to_owned()];
    node.ip_command(&format!("address add {}/24 dev eth0", second[0]))?;
    node.ip_command(&format!("address add {}/64 dev eth0 nodad", second[1]))?;
    let is_now = |cluster: &Cluster, addresses: &[String; 2]| {
        let addresses = addresses.each_ref().map(|address| json!({"type": "InternalIP", "address": address}));
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}, "status": {"addresses": addresses},
        });
        cluster.folder.write("node.yaml", &node.to_string())
    };
    is_now(&cluster, &first)?;
    let builder = node.agent().manifests(&cluster.folder).without_node_addresses();
    let mut agent = builder.start()?;
    agent.wait_synced()?;
    let client = Client::at(cluster.lab.host("client")?)?;
    let mut steps = Steps::new();
    for addresses in [&first, &second] {
        steps.step(&format!("the node is {addresses:?}"), || {
            is_now(&cluster, addresses)?;
            for address in addresses {
                let to = SocketAddr::new(address.parse()?, 30_080);
                // A NodePort answers on the node's own address.
                eventually("an answer to that address", || {
                    let Ok((answer, _)) = ask_from(&client.worker, Transport::Tcp, to) else {
                        return Ok(None);
                    };
                    Ok((answer.client.ip() == to.ip()).then_some(()))
                })?;
            }
            Ok(())
        });
    }
    steps.done()
}
