//! `loadBalancerSourceRanges`: whom they let in, by sockets and by packets, and from when on.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Context, Family, Lab};
use nix::errno::Errno;

use crate::Scenario;
use crate::cluster::{Client, Cluster, SILENCE, Steps, TARGET, Transport, usual};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[("kproxy::source_ranges_bind_everyone", bind_everyone)];

const SECOND: Duration = Duration::from_secs(1);
/// The pods of all nodes.
const PODS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];

/// A client outside that sends what is for the load balancer's address to node-a. Nothing listens at the load
/// balancer itself: what strays there is refused, and what the node drops gets silence.
fn lab(ctx: &Context) -> Result<Lab> {
    let lab = ctx.lab(usual)?;
    let node = lab.node("node-a")?;
    for vip in lab.elb()?.vips() {
        let via = if vip.is_ipv4() { node.ip(Family::V4) } else { node.ip(Family::V6) };
        lab.host("client")?.ip_command(&format!("route add {vip} via {via}"))?;
    }
    Ok(lab)
}

fn bind_everyone(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let pods = [lab.pod("a2")?.clone(), lab.pod("b1")?.clone()];
    let service = |name: &str, number: u8, ranges: &[String]| {
        let service =
            Service::new(name, number).tcp(u16::from(number), TARGET).udp(u16::from(number), TARGET);
        let service = service.load_balancers(lab.elb()?.vips()).local().pods(&[&pods[0], &pods[1]]);
        anyhow::Ok(ranges.iter().fold(service, |service, range| service.source_range(range)))
    };
    let node = lab.node("node-a")?;
    let outside = lab.host("client")?;
    let only = |member: &kproxy_lab::Member| {
        Family::BOTH
            .map(|family| format!("{}/{}", member.ip(family), if family == Family::V4 { 32 } else { 128 }))
    };
    let for_node = service("for-node", 81, &only(node))?;
    let for_pods = service("for-pods", 82, &PODS.map(str::to_owned))?;
    let for_outside = service("for-outside", 83, &only(outside))?;
    let both: Vec<_> = only(node).into_iter().chain(only(outside)).collect();
    let (wide, narrow) = (service("narrowed", 84, &both)?, service("narrowed", 84, &only(node))?);
    let vips = lab.elb()?.vips().to_vec();

    let services = [&for_node, &for_pods, &for_outside, &wide];
    let mut cluster = Cluster::start(lab, &["node-a"], &[], services)?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let host = cluster.host("node-a")?;
    let pod = cluster.pod("a1")?;
    let client = Client::at(cluster.lab.host("client")?)?;
    let mut steps = Steps::new();
    for vip in &vips {
        for transport in Transport::ALL {
            let of = |who: &str, what: &str| format!("{who}, {what}, {vip}, {transport:?}");
            for (name, port) in [("for-node", 81), ("for-pods", 82), ("for-outside", 83)] {
                let to = SocketAddr::new(*vip, port);
                let clients = [
                    ("host", &host, "for-node", &["a2", "b1"][..]),
                    ("pod", &pod, "for-pods", &["a2", "b1"]),
                    // Under policy Local, only what is here.
                    ("client outside", &client, "for-outside", &["a2"]),
                ];
                for (who, client, its_own, backends) in clients {
                    steps.step(&of(who, name), || {
                        if name == its_own {
                            client.reaches(transport, to, backends)
                        } else {
                            client.gets_silence(transport, to)
                        }
                    });
                }
            }
        }
        let family = if vip.is_ipv4() { Family::V4 } else { Family::V6 };
        steps.step(&format!("host, a socket that is bound, {vip}"), || bound(&cluster, &host, *vip, family));
    }
    for round in 0..5 {
        for vip in &vips {
            steps.step(&format!("round {round}: narrowed for a client outside, {vip}"), || {
                narrowed(&mut cluster, &wide, &narrow, &client, SocketAddr::new(*vip, 84))
            });
        }
    }
    steps.done()
}

/// The host is its node address, whatever a socket is bound to.
fn bound(cluster: &Cluster, host: &Client, vip: std::net::IpAddr, family: Family) -> Result<()> {
    let own = SocketAddr::new(cluster.node("node-a")?.ip(family), 0);
    let worker = &host.worker;
    let socket = worker.tcp_connect_with(SocketAddr::new(vip, 81), Some(own), SECOND)?;
    worker.tcp_ask(socket.id, "hello")?;
    worker.close(socket.id)?;
    for port in [82, 83] {
        let result = worker.tcp_connect_with(SocketAddr::new(vip, port), Some(own), SILENCE);
        let errno = result.as_ref().err().and_then(kproxy_lab::WorkerError::errno);
        ensure!(errno == Some(Errno::ETIMEDOUT), "port {port}: {result:?}");
    }
    Ok(())
}

/// Once the agent says that it is done, nobody is let in any more by a range that was taken away; whom it let in
/// before stays.
fn narrowed(
    cluster: &mut Cluster,
    wide: &Service,
    narrow: &Service,
    client: &Client,
    to: SocketAddr,
) -> Result<()> {
    cluster.put(wide)?;
    client.reaches(Transport::Tcp, to, &["a2"]).context("let in")?;
    let open = client.worker.tcp_connect(to)?;
    cluster.put(narrow)?;
    client.gets_silence(Transport::Tcp, to).context("narrowed")?;
    client.worker.tcp_ask(open.id, "still here").context("the open connection")?;
    Ok(client.worker.close(open.id)?)
}
