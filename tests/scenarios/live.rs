//! Changes while connections are open.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Answer, BurstSpec, Check, Context, Family, Frontend, wait_until};

use crate::Scenario;
use crate::cluster::{Client, Cluster, DEADLINE, Steps, TARGET, Transport, usual};
use crate::objects::{Endpoint, Service};

pub const SCENARIOS: &[Scenario] = &[("kproxy::changes_are_live", changes)];

const NODE_PORT: u16 = 30_080;
const SECOND: Duration = Duration::from_secs(1);
const ELB: &str = "kubernetes.io/elb.pass-through";

fn changes(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(usual)?;
    let base = Service::new("web", 10)
        .tcp(80, TARGET)
        .udp(80, TARGET)
        .node_port(NODE_PORT)
        .load_balancers(lab.elb()?.vips())
        .local();
    let web = base.clone().pods(&[lab.pod("a2")?]);
    let mut cluster = Cluster::start(lab, &["node-a", "node-b"], &[], [&web])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let mut steps = Steps::new();
    for name in ["a1", "node-a"] {
        let client = if name == "a1" { cluster.pod(name)? } else { cluster.host(name)? };
        for family in Family::BOTH {
            let of = |what: &str| format!("{name}, {what}, {family:?}");
            steps.step(&of("endpoints come and go"), || endpoints(&mut cluster, &base, &client, family));
            steps.step(&of("a UDP flow moves when its backend goes"), || {
                datagrams(&mut cluster, &base, &client, family)
            });
            steps.step(&of("a Service is deleted and comes back"), || {
                deleted(&mut cluster, &base, &client, family)
            });
            steps.step(&of("pass-through is switched"), || switched(&mut cluster, &base, &client, family));
        }
    }
    for family in Family::BOTH {
        steps.step(&format!("changes under connections from outside, {family:?}"), || {
            from_outside(&mut cluster, &base, family)
        });
    }
    steps.step("many changes, one after the other", || many(&mut cluster, &base));
    steps.done()
}

/// New connections follow the endpoints, without a failure; open ones stay where they are.
fn endpoints(cluster: &mut Cluster, base: &Service, client: &Client, family: Family) -> Result<()> {
    let (a2, b1) = (cluster.lab.pod("a2")?.clone(), cluster.lab.pod("b1")?.clone());
    cluster.put(&base.clone().pods(&[&a2]))?;
    let to = SocketAddr::new(base.cluster_ip(family), 80);
    let worker = &client.worker;
    let open = worker.tcp_connect(to)?;
    ensure!(worker.tcp_ask(open.id, "1")?.server == "a2");
    let burst = worker.burst_start(BurstSpec::new(to))?;

    cluster.put(&base.clone().pods(&[&a2, &b1]))?;
    client.reaches(Transport::Tcp, to, &["a2", "b1"])?;
    cluster.put(&base.clone().pods(&[&b1]))?;
    for _ in 0..10 {
        client.reaches(Transport::Tcp, to, &["b1"])?;
    }
    // Not ready is the same as gone.
    cluster.put(&base.clone().endpoints([Endpoint::of(&a2), Endpoint::of(&b1).not_ready()]))?;
    for _ in 0..10 {
        client.reaches(Transport::Tcp, to, &["a2"])?;
    }
    cluster.put(&base.clone().pods(&[&b1]))?;
    ensure!(worker.tcp_ask(open.id, "2")?.server == "a2", "the open connection has moved");
    let report = worker.burst_stop(burst)?;
    ensure!(report.failures() == 0 && report.ok > 0, "{report:?}");
    ensure!(["a2", "b1"].iter().all(|name| report.servers.contains_key(*name)), "{report:?}");

    cluster.put(base)?;
    for transport in Transport::ALL {
        client.is_refused(transport, to)?;
    }
    ensure!(worker.tcp_ask(open.id, "3")?.server == "a2", "the open connection has moved");
    Ok(worker.close(open.id)?)
}

fn datagrams(cluster: &mut Cluster, base: &Service, client: &Client, family: Family) -> Result<()> {
    let (a2, b1) = (cluster.lab.pod("a2")?.clone(), cluster.lab.pod("b1")?.clone());
    let worker = &client.worker;
    let to = SocketAddr::new(base.cluster_ip(family), 80);
    let socket = worker.udp_socket(family)?;
    let ask = || -> Result<String> {
        worker.udp_send_to(socket.id, to, "who")?;
        let datagram = worker.udp_receive(socket.id, SECOND)?;
        ensure!(datagram.from == to, "{} answered, asked was {to}", datagram.from);
        Ok(serde_json::from_str::<Answer>(&datagram.data)?.server)
    };
    for (pods, expected) in [(&[&a2][..], "a2"), (&[&a2, &b1], "a2"), (&[&b1], "b1"), (&[&a2, &b1], "b1")] {
        cluster.put(&base.clone().pods(pods))?;
        let servers = (0..8).map(|_| ask()).collect::<Result<BTreeSet<_>>>()?;
        ensure!(servers == BTreeSet::from([expected.to_owned()]), "{servers:?}, not {expected}");
    }
    Ok(worker.close(socket.id)?)
}

fn deleted(cluster: &mut Cluster, base: &Service, client: &Client, family: Family) -> Result<()> {
    let web = base.clone().pods(&[cluster.lab.pod("b1")?]);
    cluster.put(&web)?;
    let worker = &client.worker;
    let address = base.cluster_ip(family);
    let to = SocketAddr::new(address, 80);
    let open = worker.tcp_connect(to)?;
    worker.tcp_ask(open.id, "before")?;
    let datagrams = worker.udp_socket(family)?;
    worker.udp_send_to(datagrams.id, to, "before")?;
    worker.udp_receive(datagrams.id, SECOND)?;
    let strays = cluster.lab.strays_to(address)?;

    cluster.delete(&web)?;
    ensure!(worker.tcp_ask(open.id, "after")?.server == "b1");
    for transport in Transport::ALL {
        client.gets_silence(transport, to)?;
    }
    // No Service any more: its address is any address.
    wait_until("an attempt at the gateway", SECOND, || Ok(cluster.lab.strays_to(address)? > strays))?;
    let strays = cluster.lab.strays_to(address)?;
    worker.udp_send_to(datagrams.id, to, "after")?;
    wait_until("the datagram at the gateway", SECOND, || Ok(cluster.lab.strays_to(address)? > strays))?;
    let printed = cluster.node("node-a")?.kproxy(&["services", "-o", "json"])?.success()?;
    ensure!(!printed.contains("\"web\""), "still printed: {printed}");

    cluster.put(&web)?;
    client.reaches(Transport::Tcp, to, &["b1"])?;
    worker.udp_send_to(datagrams.id, to, "again")?;
    ensure!(worker.udp_receive(datagrams.id, SECOND)?.from == to);
    ensure!(worker.tcp_ask(open.id, "again")?.server == "b1");
    worker.close(datagrams.id)?;
    Ok(worker.close(open.id)?)
}

/// What is open lives on; what is new takes the new way. HAProxy counts.
fn switched(cluster: &mut Cluster, base: &Service, client: &Client, family: Family) -> Result<()> {
    let elb = cluster.lab.elb()?.clone();
    let mut frontend = Frontend::new("web").bind_all(elb.vips(), 80).check(Check::None);
    for node in cluster.lab.nodes() {
        frontend = frontend.server(node.name(), SocketAddr::new(node.v4().into(), NODE_PORT));
    }
    elb.configure(&[frontend])?;
    let vip = elb.vips().iter().find(|vip| vip.is_ipv4() == (family == Family::V4));
    let to = SocketAddr::new(*vip.context("no address of this family")?, 80);
    let short = base.clone().pods(&[cluster.lab.pod("a2")?, cluster.lab.pod("b1")?]);
    let long = short.clone().annotation(ELB, "true");
    let worker = &client.worker;
    let mut open = Vec::new();
    let mut counted = elb.connections("web")?;
    for (round, service) in [&short, &long, &short, &long].into_iter().enumerate() {
        cluster.put(service)?;
        let is_long = round % 2 == 1;
        let socket = worker.tcp_connect(to)?;
        open.push((socket.id, is_long));
        counted += u64::from(is_long);
        for (id, is_long) in &open {
            let seen = worker.tcp_ask(*id, "hello")?.client.ip().to_canonical();
            ensure!((seen == elb.v4()) == *is_long, "round {round}: connection {id} seen as {seen}");
        }
        let now = elb.connections("web")?;
        ensure!(now == counted, "round {round}: the load balancer counted {now}, not {counted}");
    }
    for (id, _) in open {
        worker.close(id)?;
    }
    Ok(())
}

fn from_outside(cluster: &mut Cluster, base: &Service, family: Family) -> Result<()> {
    let (a1, a2) = (cluster.lab.pod("a1")?.clone(), cluster.lab.pod("a2")?.clone());
    let _server = a1.echo(TARGET)?;
    cluster.put(&base.clone().pods(&[&a2]))?;
    let client = Client::at(cluster.lab.host("client")?)?;
    let to = SocketAddr::new(cluster.node("node-a")?.ip(family), NODE_PORT);
    let worker = &client.worker;
    let open = worker.tcp_connect(to)?;
    worker.tcp_ask(open.id, "1")?;
    let burst = worker.burst_start(BurstSpec::new(to))?;
    cluster.put(&base.clone().pods(&[&a1, &a2]))?;
    client.reaches(Transport::Tcp, to, &["a1", "a2"])?;
    cluster.put(&base.clone().pods(&[&a1]))?;
    for _ in 0..10 {
        client.reaches(Transport::Tcp, to, &["a1"])?;
    }
    ensure!(worker.tcp_ask(open.id, "2")?.server == "a2", "the open connection has moved");
    let report = worker.burst_stop(burst)?;
    ensure!(report.failures() == 0 && report.ok > 0, "{report:?}");

    let open_to_a1 = worker.tcp_connect(to)?;
    cluster.delete(base)?;
    ensure!(worker.tcp_ask(open.id, "3")?.server == "a2");
    ensure!(worker.tcp_ask(open_to_a1.id, "3")?.server == "a1");
    // Not a Service any more, and the node itself does not listen there.
    client.is_refused(Transport::Tcp, to)?;
    worker.close(open_to_a1.id)?;
    Ok(worker.close(open.id)?)
}

/// Each change is applied, also when the next comes at once; none waits for the next.
fn many(cluster: &mut Cluster, base: &Service) -> Result<()> {
    let pods = [cluster.lab.pod("a2")?.clone(), cluster.lab.pod("b1")?.clone()];
    let client = cluster.pod("a1")?;
    let to = SocketAddr::new(base.cluster_ip(Family::V4), 80);
    for round in 0..20 {
        let pod = &pods[round % 2];
        cluster.put(&base.clone().pods(&[pod]))?;
        client.reaches(Transport::Tcp, to, &[pod.name()]).with_context(|| format!("change {round}"))?;
    }
    // Without waiting: the last one counts.
    for round in 0..20 {
        cluster.write(&base.clone().pods(&[&pods[round % 2]]))?;
    }
    wait_until("the last of many changes", DEADLINE, || {
        Ok((0..10).all(|_| client.reaches(Transport::Tcp, to, &["b1"]).is_ok()))
    })
}
