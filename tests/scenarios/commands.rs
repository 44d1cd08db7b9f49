//! The operator's commands: what they print, what they refuse, what they leave behind.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{
    BurstSpec, Context, Family, Lab, Manifests, Node, NodeSpec, Output, kproxy_binary, wait_until,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::Scenario;
use crate::cluster::{
    Client, Cluster, DEADLINE, Steps, TARGET, Transport, frontend, packet_programs, usual, web,
};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::services_are_printed", services),
    ("kproxy::check_says_what_is_missing", check),
    ("kproxy::cleanup_leaves_nothing", cleanup),
    ("kproxy::wrong_calls_exit_with_2", wrong_calls),
];

const NODE_PORT: u16 = 30_080;

fn passed(lab: &Lab) -> Result<Service> {
    let web = web(lab, NODE_PORT)?.annotation("kubernetes.io/elb.pass-through", "true");
    Ok(web.pods(&[lab.pod("a2")?, lab.pod("b1")?]))
}

fn services(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(usual)?;
    let web = passed(&lab)?;
    let empty = Service::new("empty", 11).udp(53, TARGET);
    let services = [web.clone(), empty];
    let mut cluster = Cluster::start(lab, &["node-a"], &[], &services)?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let vip = cluster.lab.elb()?.vips()[0];
    let client = cluster.pod("a1")?;
    let mut steps = Steps::new();

    steps.step("connections are counted", || {
        let to = SocketAddr::new(web.cluster_ip(Family::V4), 80);
        let report = client.worker.burst(BurstSpec::new(to).count(7))?;
        ensure!(report.ok == 7, "{report:?}");
        let _beyond = cluster.lab.elb()?.echo(80)?;
        for _ in 0..3 {
            client.worker.ask_tcp(SocketAddr::new(vip, 80))?;
        }
        let view = cluster.service("node-a", "web")?;
        ensure!(view["connections"] == 7 && view["passThroughConnections"] == 3, "{view:#}");
        let by_ip = frontend(&view, web.cluster_ip(Family::V4), 80, "TCP")?;
        ensure!(by_ip["connections"] == 7 && by_ip["passThroughConnections"] == 0, "{by_ip:#}");
        Ok(())
    });
    steps.step("fields of the JSON", || {
        let view = cluster.service("node-a", "web")?;
        ensure!(view["type"] == "LoadBalancer", "{view:#}");
        let (a2, b1) = (cluster.lab.pod("a2")?, cluster.lab.pod("b1")?);
        let by_ip = frontend(&view, web.cluster_ip(Family::V4), 80, "TCP")?;
        let expected = [
            json!({"address": format!("{}:{TARGET}", a2.v4()), "local": true}),
            json!({"address": format!("{}:{TARGET}", b1.v4()), "local": false}),
        ];
        let mut backends = by_ip["backends"].as_array().cloned().unwrap_or_default();
        backends.sort_by_key(|one| one["address"].to_string());
        ensure!(backends == expected, "{by_ip:#}");
        ensure!(by_ip["kind"] == "ClusterIP" && by_ip["mode"] == "forward", "{by_ip:#}");
        ensure!(by_ip["portName"] == "tcp-80" && by_ip["family"] == "IPv4", "{by_ip:#}");
        ensure!(by_ip["trafficPolicy"] == "Cluster", "{by_ip:#}");
        ensure!(by_ip.get("passThroughRule").is_none(), "{by_ip:#}");
        let by_vip = frontend(&view, vip, 80, "TCP")?;
        ensure!(by_vip["kind"] == "LoadBalancer" && by_vip["mode"] == "pass-through", "{by_vip:#}");
        ensure!(by_vip["trafficPolicy"] == "Local", "{by_vip:#}");
        ensure!(by_vip["passThroughRule"] == "kubernetes.io/elb.pass-through", "{by_vip:#}");
        let node_ports: Vec<_> = view["frontends"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|one| one["kind"] == "NodePort" && one["port"] == NODE_PORT)
            .collect();
        ensure!(node_ports.len() == 2, "one for each family: {node_ports:#?}");
        for one in node_ports {
            ensure!(one["backends"].as_array().map(Vec::len) == Some(2), "{one:#}");
            ensure!(one["outsideBackends"].as_array().map(Vec::len) == Some(1), "{one:#}");
        }
        let without = cluster.service("node-a", "empty")?;
        ensure!(without["status"] != view["status"], "both are {}", view["status"]);
        Ok(())
    });
    steps.step("the table", || table(&cluster, &web));
    steps.step("other formats and the filter", || {
        let node = cluster.node("node-a")?;
        let yaml = node.kproxy(&["services", "-o", "yaml"])?.success()?;
        ensure!(yaml.contains("passThroughRule: kubernetes.io/elb.pass-through"), "{yaml}");
        let wide = node.kproxy(&["services", "-o", "wide"])?.success()?;
        ensure!(wide.contains(&format!("{}:{TARGET}", cluster.lab.pod("a2")?.v4())), "{wide}");
        let filtered = node.kproxy(&["services", "default/em"])?.success()?;
        ensure!(filtered.contains("empty") && !filtered.contains("web"), "{filtered}");
        Ok(())
    });
    steps.step("the same with the agent stopped", || {
        let printed = |cluster: &Cluster| -> Result<String> {
            let json = cluster.node("node-a")?.kproxy(&["services", "-o", "json"])?.success()?;
            let yaml = cluster.node("node-a")?.kproxy(&["services", "-o", "yaml"])?.success()?;
            Ok(json + &yaml)
        };
        let running = printed(&cluster)?;
        cluster.agent("node-a")?.kill(Signal::SIGKILL)?;
        let stopped = printed(&cluster)?;
        ensure!(running == stopped, "running: {running}\nstopped: {stopped}");
        Ok(())
    });
    steps.step("where no agent ever was", || {
        let output = cluster.node("node-b")?.kproxy(&["services"])?;
        ensure!(output.code() == Some(1), "{output}");
        let root = cluster.node("node-b")?.bpf_root().display().to_string();
        ensure!(output.stderr.contains(&root), "it does not say where: {output}");
        Ok(())
    });
    steps.done()
}

/// As kubectl's: a head, then a line for each frontend, columns below each other.
fn table(cluster: &Cluster, web: &Service) -> Result<()> {
    let text = cluster.node("node-a")?.kproxy(&["services"])?.success()?;
    let mut lines = text.lines();
    let head = lines.next().context("it printed nothing")?;
    for word in ["NAMESPACE", "NAME", "TYPE", "MODE", "BACKENDS", "CONNECTIONS", "STATUS"] {
        ensure!(head.contains(word), "no {word} in {head:?}");
    }
    let line = |what: &str| -> Result<&str> {
        text.lines().find(|line| line.contains(what)).with_context(|| format!("no {what} in:\n{text}"))
    };
    let cluster_ip = line(&format!("{}:80/TCP", web.cluster_ip(Family::V4)))?;
    let mode = head.find("MODE").context("checked above")?;
    ensure!(cluster_ip[mode..].starts_with("forward"), "columns are not in line:\n{text}");
    let vip = line(&format!("{}:80/TCP", cluster.lab.elb()?.vips()[0]))?;
    ensure!(
        vip.contains("pass-through") && vip.contains("kubernetes.io/elb.pass-through"),
        "{vip:?} does not tell mode and rule"
    );
    ensure!(text.contains(&format!("[{}]:80/TCP", web.cluster_ip(Family::V6))), "{text}");
    Ok(())
}

fn check(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(usual)?;
    let node = lab.node("node-a")?;
    let cgroup = node.cgroup_root().display().to_string();
    let output = node.kproxy(&["check", "--cgroup-root", &cgroup, "-o", "json"])?;
    let report: Value = serde_json::from_str(&output.clone().success()?)?;
    let checks = report["checks"].as_array().context("no checks")?;
    ensure!(checks.len() >= 5, "{report:#}");
    for one in checks {
        ensure!(one["status"] == "ok", "this machine can: {one:#}");
        ensure!(one["detail"].as_str().is_some_and(|text| !text.is_empty()), "{one:#}");
    }
    let table = node.kproxy(&["check", "--cgroup-root", &cgroup])?.success()?;
    ensure!(table.lines().count() == checks.len() + 1, "{table}");

    // What is missing is named, and the status says so.
    let wrong = node.kproxy(&["check", "--cgroup-root", "/tmp"])?;
    ensure!(wrong.code() == Some(1) && wrong.stdout.contains("/tmp"), "{wrong}\n{}", wrong.stdout);
    let elsewhere = lab.folder().display().to_string();
    let command = node.command(kproxy_binary()?)?;
    let wrong = command.args(["check", "--cgroup-root", &cgroup, "--bpf-root", &elsewhere]).run()?;
    ensure!(wrong.code() == Some(1) && wrong.stdout.contains(&elsewhere), "{wrong}\n{}", wrong.stdout);
    // Without capabilities: what is needed, in a sentence.
    let bare = node.command("setpriv")?.args(["--bounding-set=-all", "--inh-caps=-all"]);
    let refused = bare.arg(kproxy_binary()?).args(["check", "--cgroup-root", &cgroup]).run()?;
    ensure!(refused.code() == Some(1), "{refused}");
    ensure!(
        refused.stdout.contains("CAP_NET_ADMIN") && refused.stdout.contains("root"),
        "{}",
        refused.stdout
    );
    // Nothing was attached for it, nothing pinned.
    let (attached, pinned) = left(node)?;
    ensure!(attached.is_empty() && pinned.is_empty(), "{attached} {pinned:?}");

    // Findings of others that stand in the way.
    node.nft("add table ip kube-proxy")?;
    let output = node.kproxy(&["check", "--cgroup-root", &cgroup])?;
    ensure!(output.stdout.contains("kube-proxy --cleanup"), "{}", output.stdout);
    ensure!(output.code() == Some(0), "a warning is no failure: {output}");
    Ok(())
}

fn cleanup(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(usual)?;
    let web = passed(&lab)?;
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let node = cluster.node("node-a")?.clone();
    let client = cluster.pod("a1")?;
    let to = SocketAddr::new(web.cluster_ip(Family::V4), 80);
    let run = || node.kproxy(&["cleanup", "--cgroup-root", &node.cgroup_root().display().to_string()]);
    let mut steps = Steps::new();

    steps.step("an agent that runs is not cleaned away", || {
        let pid = cluster.agent("node-a")?.process().pid().to_string();
        let output = run()?;
        ensure!(output.code() == Some(1) && output.stderr.contains(&pid), "{output}");
        client.reaches(Transport::Tcp, to, &["a2", "b1"])
    });
    steps.step("what is there before", || {
        let (attached, pinned) = left(&node)?;
        for word in ["connect4", "connect6", "getpeername4", "recvmsg6", "sendmsg4"] {
            ensure!(attached.contains(word), "no {word} is attached: {attached}");
        }
        ensure!(attached.contains("eth0") && attached.contains("v-a1"), "not on the interfaces: {attached}");
        ensure!(pinned.iter().any(|name| name.ends_with("frontend")), "{pinned:?}");
        Ok(())
    });
    steps.step("nothing stays", || {
        cluster.agent("node-a")?.kill(Signal::SIGTERM)?;
        client.reaches(Transport::Tcp, to, &["a2", "b1"])?;
        run()?.success()?;
        let (attached, pinned) = left(&node)?;
        ensure!(attached.is_empty(), "still attached: {attached}");
        ensure!(pinned.is_empty(), "still pinned: {pinned:?}");
        ensure!(!node.bpf_root().exists(), "{} is still there", node.bpf_root().display());
        Ok(())
    });
    steps.step("traffic is not translated any more", || {
        client.gets_silence(Transport::Tcp, to)?;
        wait_until("the packet at the gateway", Duration::from_secs(2), || {
            Ok(cluster.lab.strays_to(to.ip())? > 0)
        })?;
        let node_port = SocketAddr::new(node.ip(Family::V4), NODE_PORT);
        let outside = Client::at(cluster.lab.host("client")?)?;
        outside.is_refused(Transport::Tcp, node_port)
    });
    steps.step("again, with nothing there", || run()?.success().map(drop));
    steps.step("an agent starts anew", || {
        cluster.start_agents(&["node-a"], &[])?;
        client.reaches(Transport::Tcp, to, &["a2", "b1"])
    });
    steps.done()
}

/// What is attached to the node's cgroups and interfaces, as bpftool prints it without heads, and
/// what is pinned.
fn left(node: &Node) -> Result<(String, Vec<String>)> {
    let mut attached = String::new();
    let cgroup = node.command("bpftool")?.args(["cgroup", "tree"]).arg(node.cgroup_root()).run()?;
    for line in cgroup.success()?.lines() {
        let is_head = line.starts_with("CgroupPath") || line.starts_with("ID ") || line.starts_with('/');
        if !is_head && !line.trim().is_empty() {
            attached.push_str(line);
            attached.push('\n');
        }
    }
    let net = node.run(&["bpftool", "net", "show"])?.success()?;
    for line in net.lines() {
        if !line.ends_with(':') && !line.trim().is_empty() {
            attached.push_str(line);
            attached.push('\n');
        }
    }
    // Debian's bpftool does not know TCX.
    for interface in ["eth0", "v-a1", "v-a2"] {
        for name in packet_programs(node, interface)? {
            attached.push_str(&format!("{interface} {name}\n"));
        }
    }
    let mut pinned = Vec::new();
    let mut folders = vec![node.bpf_root().to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path.clone());
            }
            pinned.push(path.display().to_string());
        }
    }
    Ok((attached, pinned))
}

fn wrong_calls(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &[])))?;
    let node = lab.node("node-a")?;
    let folder = Manifests::create(lab.folder(), "manifests")?;
    let refused = |line: &str, output: Output| {
        ensure!(output.code() == Some(2), "{line}: {output}");
        ensure!(output.stdout.is_empty() && !output.stderr.is_empty(), "{line}: {}", output.stdout);
        Ok(())
    };
    for arguments in [
        &["--no-such-flag"][..],
        &["--cluster-cidr", "10.244.0.0"],
        &["--service-cidr", "nonsense"],
        &["--nodeport-addresses", "everywhere"],
        &["--node-address", "node-a"],
        &["--pass-through-scope", "some"],
        &["--kubeconfig", "/nowhere/config"],
        &["--api-server", "https://192.0.2.2:6443"],
    ] {
        // By the lab's own door, so that one that is not refused does no harm.
        let agent = node.agent().manifests(&folder).args(arguments.iter().copied());
        refused(&arguments.join(" "), agent.run(DEADLINE)?)?;
    }
    for arguments in [&["services", "-o", "xml"][..], &["check", "surplus"], &["nonsense"]] {
        refused(&arguments.join(" "), node.kproxy(arguments)?)?;
    }
    for arguments in [&["--help"][..], &["--version"], &["agent", "--help"]] {
        let output = node.command(kproxy_binary()?)?.args(arguments).run()?;
        ensure!(output.code() == Some(0) && !output.stdout.is_empty(), "{arguments:?}: {output}");
    }
    Ok(())
}
