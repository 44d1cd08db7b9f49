//! The load balancer alone: HAProxy in front of servers that listen on node addresses.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use kproxy_lab::{BurstSpec, Check, Context, ElbSpec, Family, Frontend, Lab, NodeSpec};

use crate::Scenario;

pub const SCENARIOS: &[Scenario] = &[
    ("lab::elb_balances_to_node_ports", balances),
    ("lab::elb_checks_health", checks_health),
    ("lab::elb_reloads", reloads),
];

const NODE_PORT: u16 = 30_080;
const DEADLINE: Duration = Duration::from_secs(5);

fn lab(ctx: &Context) -> Result<Lab> {
    ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]).masquerade_pods())
            .elb(ElbSpec::new())
            .client("client")
    })
}

/// Port 80 of both load-balancer addresses, with the nodes' NodePort behind them, by IPv4.
fn web(lab: &Lab) -> Result<Frontend> {
    let mut web = Frontend::new("web").bind_all(lab.elb()?.vips(), 80);
    for node in lab.nodes() {
        let address = SocketAddr::new(node.ip(Family::V4), NODE_PORT);
        web = web.server(node.name(), address);
    }
    Ok(web)
}

fn balances(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let elb = lab.elb()?;
    let _servers = [lab.node("node-a")?.echo(NODE_PORT)?, lab.node("node-b")?.echo(NODE_PORT)?];
    elb.configure(&[web(&lab)?])?;
    elb.wait_servers_up("web", &["node-a", "node-b"], DEADLINE)?;
    // The health checks go to the nodes, not through the frontend.
    ensure!(elb.connections("web")? == 0);
    ensure!(elb.connections("nothing").is_err());

    let mut expected = 0;
    for member in [&**lab.pod("a1")?, lab.pod("b1")?, lab.node("node-a")?, lab.host("client")?] {
        let worker = member.worker()?;
        for vip in elb.vips() {
            let to = SocketAddr::new(*vip, 80);
            let report = worker.burst(BurstSpec::new(to).count(10))?;
            ensure!(report.ok == 10, "{} to {to}: {report:?}", member.name());
            let even = ["node-a", "node-b"].map(|name| report.servers.get(name).copied());
            ensure!(even == [Some(5), Some(5)], "{report:?}");
            expected += 10;
            ensure!(elb.connections("web")? == expected);
        }
    }
    Ok(())
}

fn checks_health(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let elb = lab.elb()?;
    let a = lab.node("node-a")?.echo(NODE_PORT)?;
    elb.configure(&[web(&lab)?])?;
    elb.wait_servers_up("web", &["node-a"], DEADLINE)?;
    let b = lab.node("node-b")?.echo(NODE_PORT)?;
    elb.wait_servers_up("web", &["node-a", "node-b"], DEADLINE)?;
    drop(a);
    elb.wait_servers_up("web", &["node-b"], DEADLINE)?;
    let worker = lab.host("client")?.worker()?;
    let to = SocketAddr::new(elb.vips()[0], 80);
    let report = worker.burst(BurstSpec::new(to).count(6))?;
    ensure!(report.servers.get("node-b") == Some(&6), "{report:?}");

    // As with a healthCheckNodePort: another port decides, over HTTP.
    let health = lab.node("node-b")?.nginx(30_999)?;
    let by_http = web(&lab)?.check(Check::Http { port: 30_999, path: String::from("/healthz") });
    elb.configure(&[by_http])?;
    elb.wait_servers_up("web", &["node-b"], DEADLINE)?;
    drop(health);
    elb.wait_servers_up("web", &[], DEADLINE)?;
    drop(b);
    Ok(())
}

fn reloads(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let elb = lab.elb()?;
    let _server = lab.node("node-a")?.echo(NODE_PORT)?;
    let _nginx = lab.node("node-b")?.nginx(80)?;
    elb.configure(&[web(&lab)?])?;
    elb.wait_servers_up("web", &["node-a"], DEADLINE)?;
    let client = lab.host("client")?;
    let worker = client.worker()?;
    let vip = elb.vips()[0];
    let open = worker.tcp_connect(SocketAddr::new(vip, 80))?;
    worker.tcp_ask(open.id, "before")?;
    ensure!(elb.connections("web")? == 1);

    let http = Frontend::new("http")
        .bind(SocketAddr::new(vip, 81))
        .server("node-b", SocketAddr::new(lab.node("node-b")?.ip(Family::V6), 80))
        .check(Check::None)
        .http();
    elb.configure(&[web(&lab)?, http])?;
    worker.tcp_ask(open.id, "the open connection lives on")?;
    ensure!(elb.connections("web")? == 1, "the count goes on");
    elb.wait_servers_up("web", &["node-a"], DEADLINE)?;
    worker.ask_tcp(SocketAddr::new(vip, 80))?;
    ensure!(elb.connections("web")? == 2);
    let text = client.run(&["curl", "-sS", &format!("http://{vip}:81/")])?.success()?;
    let answer = kproxy_lab::NginxAnswer::parse(&text)?;
    ensure!(answer.pod == "node-b", "{answer:?}");
    ensure!(answer.client == elb.v6().to_string(), "{answer:?}");
    ensure!(elb.wait_connections("http", 1, DEADLINE)? == 1);

    let wrong = Frontend::new("wrong").bind("198.51.100.9:0".parse()?);
    ensure!(elb.configure(&[wrong]).is_err());
    worker.ask_tcp(SocketAddr::new(vip, 80))?;
    Ok(())
}
