//! `kproxy explain`: what it says of a connection is what the connection gets; from the maps and from the manifests
//! it says the same.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Cni, Context, ElbSpec, Family, NodeSpec, kproxy_binary};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::Scenario;
use crate::cluster::{Cluster, Steps, TARGET};
use crate::objects::{Endpoint, Service};

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::explain_says_what_happens_routed", |ctx| explain(ctx, Cni::RoutedVeth)),
    ("kproxy::explain_says_what_happens_bridge", |ctx| explain(ctx, Cni::Bridge)),
];

const NODE_PORT: u16 = 30_080;
const FLAGS: [&str; 4] =
    ["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48", "--service-cidr", "10.96.0.0/16"];

fn explain(ctx: &Context, cni: Cni) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).cni(cni))
            .node(NodeSpec::new("node-b", 2, &["b1"]).cni(cni))
            .elb(ElbSpec::new())
            .client("client")
    })?;
    let vips = lab.elb()?.vips().to_vec();
    let passed = Service::new("passed", 10)
        .tcp(80, TARGET)
        .node_port(NODE_PORT)
        .load_balancers(&vips)
        .local()
        .annotation("kubernetes.io/elb.pass-through", "true")
        .endpoints([
            Endpoint::of(lab.pod("a2")?),
            Endpoint::of(lab.pod("b1")?),
            Endpoint::of(lab.pod("a1")?).not_ready(),
        ]);
    let guarded = Service::new("guarded", 11)
        .tcp(80, TARGET)
        .load_balancers(&["198.51.100.77".parse()?, "198.51.100.78".parse()?])
        .source_range("203.0.113.0/24")
        .pods(&[lab.pod("a2")?]);
    let empty = Service::new("empty", 12).tcp(80, TARGET);
    let away = Service::new("away", 13).tcp(80, TARGET).internal_local().pods(&[lab.pod("b1")?]);
    let services = [passed.clone(), guarded.clone(), empty.clone(), away.clone()];
    let mut cluster = Cluster::start(lab, &["node-a"], &FLAGS, &services)?;
    let _servers = cluster.servers(&["a2", "b1"])?;

    let ip = |cluster: &Cluster, name: &str| -> Result<IpAddr> {
        Ok(cluster
            .lab
            .pod(name)
            .map(|pod| pod.v4())
            .or_else(|_| cluster.lab.host(name).map(|h| h.v4()))?
            .into())
    };
    let (a1, b1, client) = (ip(&cluster, "a1")?, ip(&cluster, "b1")?, ip(&cluster, "client")?);
    let node = IpAddr::from(cluster.node("node-a")?.v4());
    let questions: Vec<(IpAddr, SocketAddr)> = {
        let clients = [a1, b1, client, node, "127.0.0.1".parse()?];
        let destinations = [
            (passed.cluster_ip(Family::V4), 80),
            (passed.cluster_ip(Family::V4), 81),
            (vips[0], 80),
            (node, NODE_PORT),
            (guarded.cluster_ip(Family::V4), 80),
            ("198.51.100.77".parse()?, 80),
            (empty.cluster_ip(Family::V4), 80),
            (away.cluster_ip(Family::V4), 80),
            ("10.96.0.99".parse()?, 80),
            ("192.0.2.200".parse()?, 80),
        ];
        let all = clients.iter().flat_map(|from| destinations.iter().map(move |to| (*from, (*to).into())));
        all.collect()
    };

    let mut steps = Steps::new();
    steps.step("the client is told by its interface, without any flag", || {
        for (from, expected) in [(a1, "pod"), (client, "outside"), (node, "host"), (b1, "outside")] {
            let answer = ask(&cluster, from, (passed.cluster_ip(Family::V4), 80))?;
            ensure!(answer["client"] == expected, "{from} is no {expected}: {answer:#}");
        }
        Ok(())
    });
    steps.step("a pod's connection goes where it says", || {
        let asked = ask(&cluster, a1, (passed.cluster_ip(Family::V4), 80))?;
        let said = backends(&asked)?;
        let worker = cluster.pod("a1")?.worker;
        let mut seen = BTreeSet::new();
        for _ in 0..40 {
            let answer = worker.ask_tcp(SocketAddr::new(passed.cluster_ip(Family::V4), 80))?;
            ensure!(answer.client.ip() == a1, "the source was kept: {answer:?}");
            seen.insert(answer.local.to_string());
        }
        ensure!(seen == said, "it says {said:?}, and the connections reached {seen:?}");
        Ok(())
    });
    steps.step("what is left out, and what is refused, dropped and passed", || {
        let asked = ask(&cluster, client, (node, NODE_PORT))?;
        let a2 = SocketAddr::new(ip(&cluster, "a2")?, TARGET).to_string();
        ensure!(asked["backends"] == json!([{"address": a2, "source": "kept", "local": true}]), "{asked:#}");
        ensure!(asked["service"] == "default/passed:tcp-80", "{asked:#}");
        ensure!(asked["left_out"].to_string().contains("not on this node"), "{asked:#}");
        for (from, to, verdict, reason) in [
            (a1, (vips[0], 80), "pass", "pass-through"),
            (client, ("198.51.100.77".parse()?, 80), "drop", "source-range"),
            (a1, (empty.cluster_ip(Family::V4), 80), "reject", "no-endpoints"),
            (a1, (away.cluster_ip(Family::V4), 80), "drop", "no-local-endpoints"),
            (a1, (passed.cluster_ip(Family::V4), 81), "reject", "undefined-port"),
            (a1, ("10.96.0.99".parse()?, 80), "drop", "unallocated-address"),
            (a1, ("192.0.2.200".parse()?, 80), "pass", "not-a-service"),
        ] {
            let answer = ask(&cluster, from, to)?;
            ensure!(answer["verdict"] == verdict && answer["reason"] == reason, "{reason}: {answer:#}");
        }
        Ok(())
    });
    steps.step("the maps and the manifests say the same", || {
        let live = ask_all(&cluster, &questions, &[])?;
        let folder = cluster.folder.path().display().to_string();
        let name = node.to_string();
        let computed =
            [&["--manifests", &folder, "--node-name", "node-a", "--node-address", &name], &FLAGS[..]];
        let computed = ask_all(&cluster, &questions, &computed.concat())?;
        ensure!(live.len() == questions.len(), "{live:#?}");
        for (live, computed) in live.iter().zip(&computed) {
            let of = |answer: &Value| {
                let mut answer = answer.clone();
                // From the maps less is known of endpoints that do not serve.
                answer["left_out"] = Value::Null;
                answer
            };
            ensure!(of(live) == of(computed), "the maps: {live:#}\nthe manifests: {computed:#}");
        }
        Ok(())
    });
    steps.step("the same with the agent stopped, and nothing is written", || {
        let running = ask_all(&cluster, &questions, &[])?;
        let before = cluster.node("node-a")?.kproxy(&["services", "-o", "json"])?.success()?;
        cluster.agent("node-a")?.kill(Signal::SIGKILL)?;
        let stopped = ask_all(&cluster, &questions, &[])?;
        ensure!(running == stopped, "running: {running:#?}\nstopped: {stopped:#?}");
        let after = cluster.node("node-a")?.kproxy(&["services", "-o", "json"])?.success()?;
        ensure!(before == after, "asking counted or changed something");
        Ok(())
    });
    steps.step("where no agent ever was", || {
        let output =
            cluster.node("node-b")?.kproxy(&["explain", "--from", "10.244.1.1", "--to", "10.96.0.1:80"])?;
        ensure!(output.code() == Some(1), "{output}");
        let root = cluster.node("node-b")?.bpf_root().display().to_string();
        ensure!(output.stderr.contains(&root), "it does not say where: {output}");
        Ok(())
    });
    steps.done()
}

fn ask(cluster: &Cluster, from: IpAddr, to: (IpAddr, u16)) -> Result<Value> {
    let (from, to) = (from.to_string(), SocketAddr::from(to).to_string());
    let node = cluster.node("node-a")?;
    let text = node.kproxy(&["explain", "--from", &from, "--to", &to, "-o", "json"])?.success()?;
    serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))
}

/// All answers of one process.
fn ask_all(cluster: &Cluster, questions: &[(IpAddr, SocketAddr)], arguments: &[&str]) -> Result<Vec<Value>> {
    let node = cluster.node("node-a")?;
    let lines: String =
        questions.iter().map(|(from, to)| format!("{}\n", json!({"from": from, "to": to}))).collect();
    let file = cluster.lab.folder().join("questions");
    std::fs::write(&file, lines)?;
    let command = node.command(kproxy_binary()?)?.args(["explain", "--bpf-root"]).arg(node.bpf_root());
    let text = command.arg("--queries").arg(&file).args(arguments).run()?.success()?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

fn backends(answer: &Value) -> Result<BTreeSet<String>> {
    let list = answer["backends"].as_array().with_context(|| format!("no backends: {answer:#}"))?;
    Ok(list.iter().filter_map(|backend| backend["address"].as_str().map(str::to_owned)).collect())
}
