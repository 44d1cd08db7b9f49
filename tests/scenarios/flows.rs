//! Flows of the packet path, as operators see them.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{BurstSpec, Context, Family, Node, NodeSpec};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, eventually};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::flows_are_listed", listed),
    ("kproxy::flows_outlive_other_sizes", other_sizes),
    ("kproxy::flows_that_ended_free_their_ports", ended),
];

const NODE_PORT: u16 = 30_080;

/// What `kproxy flows -o json` lists on a node.
pub fn flows(node: &Node, arguments: &[&str]) -> Result<Vec<Value>> {
    let words: Vec<&str> = ["flows", "-o", "json"].into_iter().chain(arguments.iter().copied()).collect();
    let text = node.kproxy(&words)?.success()?;
    let list: Value = serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))?;
    Ok(list["items"].as_array().with_context(|| format!("no items: {list}"))?.clone())
}

fn listed(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]))
            .client("client")
    })?;
    let web = Service::new("web", 10).tcp(80, TARGET).node_port(NODE_PORT).pods(&[lab.pod("a1")?]);
    let far = Service::new("far", 11).udp(80, TARGET).node_port(NODE_PORT + 1).pods(&[lab.pod("b1")?]);
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&web, &far])?;
    let _servers = cluster.servers(&["a1", "b1"])?;
    let node = cluster.node("node-a")?.clone();
    let client = Client::at(cluster.lab.host("client")?)?;
    let worker = &client.worker;
    let mut steps = Steps::new();
    steps.step("none", || {
        ensure!(flows(&node, &[])?.is_empty());
        let printed = node.kproxy(&["flows"])?.success()?;
        ensure!(printed == "No flows.\n", "{printed}");
        Ok(())
    });
    for family in Family::BOTH {
        let ip = |member: &kproxy_lab::Member| member.ip(family);
        let (near, remote) =
            (SocketAddr::new(node.ip(family), NODE_PORT), SocketAddr::new(node.ip(family), NODE_PORT + 1));
        steps.step(&format!("an open connection and a masked flow, {family:?}"), || {
            let open = worker.tcp_connect(near)?;
            worker.tcp_ask(open.id, "hello")?;
            let datagrams = worker.udp_socket(family)?;
            worker.udp_send_to(datagrams.id, remote, "hello")?;
            let answer: Value =
                serde_json::from_str(&worker.udp_receive(datagrams.id, Duration::from_secs(2))?.data)?;

            let all = flows(&node, &["--client", &ip(cluster.lab.host("client")?).to_string()])?;
            ensure!(all.len() == 2, "two flows are open: {all:#?}");
            let web = flows(&node, &["--service", "default/web", "--client", &open.local.to_string()])?;
            let [row] = &web[..] else { anyhow::bail!("one flow of web: {web:#?}") };
            let backend = SocketAddr::new(ip(cluster.lab.pod("a1")?), TARGET);
            for (field, expected) in [
                ("namespace", "default"),
                ("name", "web"),
                ("protocol", "TCP"),
                ("client", &open.local.to_string()),
                ("frontend", &near.to_string()),
                ("backend", &backend.to_string()),
                ("state", "established"),
                ("table", "established"),
            ] {
                ensure!(row[field] == expected, "{field} of {row}, not {expected}");
            }
            ensure!(row["idleSeconds"].as_u64().is_some_and(|idle| idle < 10), "{row}");
            ensure!(row.get("mask").is_none(), "a client of a local backend is not masked: {row}");

            let backend = SocketAddr::new(ip(cluster.lab.pod("b1")?), TARGET);
            let far = || flows(&node, &["--backend", &backend.to_string()]);
            let asked = far()?;
            let [row] = &asked[..] else { anyhow::bail!("one flow of far: {asked:#?}") };
            ensure!(row["name"] == "far" && row["protocol"] == "UDP", "{row}");
            // The client has not shown yet that it got the answer.
            ensure!(row["state"] == "answered" && row["table"] == "transient", "{row}");
            worker.udp_send_to(datagrams.id, remote, "again")?;
            worker.udp_receive(datagrams.id, Duration::from_secs(2))?;
            let again = far()?;
            let [row] = &again[..] else { anyhow::bail!("one flow of far: {again:#?}") };
            ensure!(row["state"] == "established" && row["table"] == "established", "{row}");
            // What the backend saw.
            ensure!(row["mask"] == answer["client"], "{row}, and the backend saw {}", answer["client"]);

            let none = flows(
                &node,
                &["--service", "default/far", "--backend", &ip(cluster.lab.pod("a1")?).to_string()],
            )?;
            ensure!(none.is_empty(), "{none:#?}");
            worker.close(datagrams.id)?;
            worker.close(open.id)?;
            eventually("the closed connection to be said so", || {
                let rows = flows(&node, &["--client", &open.local.to_string()])?;
                let closed = rows.iter().all(|row| row["state"] == "closed" && row["table"] == "transient");
                Ok(closed.then_some(()))
            })
        });
    }
    steps.step("without the agent, as a table and as YAML", || {
        cluster.agent("node-a")?.kill(Signal::SIGKILL)?;
        let open = worker.tcp_connect(SocketAddr::new(node.ip(Family::V4), NODE_PORT))?;
        worker.tcp_ask(open.id, "hello")?;
        let source = open.local.to_string();
        let table = node.kproxy(&["flows", "--client", &source])?.success()?;
        let lines: Vec<&str> = table.lines().collect();
        ensure!(lines.len() == 2 && lines[0].starts_with("NAMESPACE"), "{table}");
        ensure!(lines[1].starts_with("default") && lines[1].contains(&source), "{table}");
        let yaml = node.kproxy(&["flows", "-o", "yaml", "--client", &source])?.success()?;
        ensure!(yaml.starts_with("items:") && yaml.contains(&source), "{yaml}");
        Ok(worker.close(open.id)?)
    });
    steps.step("wrong words", || {
        for wrong in [["--service", "web"], ["--client", "nobody"], ["--backend", "10.0.0.0/33"]] {
            let output = node.kproxy(&["flows", wrong[0], wrong[1]])?;
            ensure!(output.code() == Some(2) && output.stderr.contains(wrong[0]), "{output}");
        }
        Ok(())
    });
    steps.done()
}

/// An agent that makes its tables of another size carries over what is in them: open connections, also masked ones,
/// and where clients with affinity go.
fn other_sizes(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]))
            .client("client")
    })?;
    let web =
        Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(NODE_PORT).pods(&[lab.pod("a1")?]);
    let far = Service::new("far", 11).tcp(80, TARGET).node_port(NODE_PORT + 10).pods(&[lab.pod("b1")?]);
    let sticky = Service::new("sticky", 12)
        .tcp(80, TARGET)
        .node_port(NODE_PORT + 20)
        .affinity()
        .pods(&[lab.pod("a1")?, lab.pod("a2")?]);
    let mut cluster = Cluster::start(lab, &["node-a"], &["--max-flows", "4096"], [&web, &far, &sticky])?;
    let _servers = cluster.servers(&["a1", "a2", "b1"])?;
    let node = cluster.node("node-a")?.clone();
    let outside = cluster.lab.host("client")?.clone();
    let worker = outside.worker()?;
    let mut steps = Steps::new();

    let (mut open, mut affine, mut bursts) = (Vec::new(), Vec::new(), Vec::new());
    for family in Family::BOTH {
        let at = |port| SocketAddr::new(node.ip(family), port);
        for (port, server) in [(NODE_PORT, "a1"), (NODE_PORT + 10, "b1")] {
            let socket = worker.tcp_connect(at(port))?;
            ensure!(worker.tcp_ask(socket.id, "hello")?.server == server);
            open.push((socket.id, server));
            bursts.push(worker.burst_start(BurstSpec::new(at(port)).concurrency(1).timeout_ms(10_000))?);
        }
        affine.push((at(NODE_PORT + 20), worker.ask_tcp(at(NODE_PORT + 20))?.server));
    }
    // The table of clients with affinity has a size of its own.
    let sizes = [("8192", 16_384, 2_048), ("1024", 2_048, 8_192), ("4096", 8_192, 1_024)];
    for (flows, entries, clients) in sizes {
        steps.step(&format!("--max-flows {flows}"), || {
            cluster
                .start_agents(&["node-a"], &["--max-flows", flows, "--max-affinity", &clients.to_string()])?;
            let map = node
                .command("bpftool")?
                .args(["-j", "map", "show", "pinned"])
                .arg(node.bpf_root().join("flow"));
            let map: Value = serde_json::from_str(&map.run()?.success()?)?;
            ensure!(map["max_entries"] == entries, "{map}");
            let map = node
                .command("bpftool")?
                .args(["-j", "map", "show", "pinned"])
                .arg(node.bpf_root().join("affinity"));
            let map: Value = serde_json::from_str(&map.run()?.success()?)?;
            ensure!(map["max_entries"] == clients, "{map}");
            for (id, server) in &open {
                ensure!(worker.tcp_ask(*id, "still there")?.server == *server, "another server answers");
            }
            for (to, server) in &affine {
                for _ in 0..4 {
                    let answer = worker.ask_tcp(*to)?;
                    ensure!(answer.server == *server, "{to}: {answer:?}, which was {server} before");
                }
            }
            Ok(())
        });
    }
    steps.step("connections that were made meanwhile", || {
        for burst in bursts {
            let report = worker.burst_stop(burst)?;
            // One that is being made while the programs are exchanged can meet both tables: at most one of a burst
            // that makes one at a time, each of the three times.
            ensure!(report.ok > 50 && report.failures() <= 3, "{report:?}");
        }
        Ok(())
    });
    steps.done()
}

/// Many more masked connections to one backend than there are ports for masking, one after the other, and no agent to
/// sweep.
fn ended(ctx: &Context) -> Result<()> {
    const CONNECTIONS: u64 = 12_000;
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &[])).node(NodeSpec::new("node-b", 2, &["b1"])).client("client")
    })?;
    let far = Service::new("far", 10).tcp(80, TARGET).node_port(NODE_PORT).pods(&[lab.pod("b1")?]);
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&far])?;
    let _servers = cluster.servers(&["b1"])?;
    cluster.agent("node-a")?.kill(Signal::SIGKILL)?;
    let to = SocketAddr::new(cluster.node("node-a")?.v4().into(), NODE_PORT);
    let worker = cluster.lab.host("client")?.worker()?;
    let report = worker.burst(BurstSpec::new(to).count(CONNECTIONS).concurrency(4).timeout_ms(10_000))?;
    ensure!(report.failures() == 0 && report.ok == CONNECTIONS, "{report:?}");
    Ok(())
}
