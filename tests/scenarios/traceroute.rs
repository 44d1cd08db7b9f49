//! Traceroute through a Service: each hop is seen by its own name, and the last is the Service.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail, ensure};
use kproxy_common::Reason;
use kproxy_lab::{Context, Family, Member, Node, Probed, Worker};

use crate::Scenario;
use crate::cluster::{Cluster, Steps, TARGET};
use crate::objects::Service;
use crate::shapes::{Shape, counted};

pub const SCENARIOS: &[Scenario] = &[("kproxy::traceroute_shows_the_way", traceroute)];

const NODE_PORT: u16 = 30_080;
const FAR_NODE_PORT: u16 = 30_081;
const DEAF_NODE_PORT: u16 = 30_082;

fn traceroute(ctx: &Context) -> Result<()> {
    Shape::each(ctx, |shape, steps| in_shape(ctx, shape, steps))
}

fn in_shape(ctx: &Context, shape: Shape, steps: &mut Steps) -> Result<()> {
    let lab = shape.lab(ctx)?;
    for node in lab.nodes() {
        // One message a second for each client is too few here.
        node.netns().set_sysctls(&[("net/ipv4/icmp_ratelimit", "0"), ("net/ipv6/icmp/ratelimit", "0")])?;
    }
    let service = |name, number, port, pod: &str, target| {
        let service = Service::new(name, number).tcp(80, target).udp(80, target).node_port(port);
        Ok::<_, anyhow::Error>(service.pods(&[lab.pod(pod)?]))
    };
    let near = service("near", 10, NODE_PORT, "a2", TARGET)?;
    let far = service("far", 11, FAR_NODE_PORT, "b1", TARGET)?;
    // Nobody listens there.
    let deaf = service("deaf", 12, DEAF_NODE_PORT, "b1", 9)?;
    let cluster = Cluster::start(lab, &["node-a", "node-b"], &[], [&near, &far, &deaf])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let lab = &cluster.lab;
    let (a, b) = (lab.node("node-a")?, lab.node("node-b")?);
    let pod = lab.pod("a1")?.unseen();
    let clients: [(&str, &Member); 2] = [("outside", lab.host("client")?), ("unseen pod", &pod)];
    for (who, member) in clients {
        let worker = member.worker()?;
        for family in Family::BOTH {
            let of = |service: &Service, port| {
                let is_outside = who == "outside";
                if is_outside {
                    SocketAddr::new(a.ip(family), port)
                } else {
                    SocketAddr::new(service.cluster_ip(family), 80)
                }
            };
            for tcp in [false, true] {
                let mut way = |service: &Service, port, routers: &[&Node]| {
                    let (to, name) = (of(service, port), service.name());
                    steps.step(&format!("{shape:?}, {who} to {name}, {family:?}, tcp {tcp}"), || {
                        let before = counted(a, Reason::IcmpTranslated)?;
                        trace(&worker, to, tcp, routers)?;
                        let after = counted(a, Reason::IcmpTranslated)?;
                        ensure!(after > before, "node-a has translated no error");
                        Ok(())
                    });
                };
                way(&near, NODE_PORT, &[a]);
                way(&far, FAR_NODE_PORT, &[a, b]);
            }
            let to = of(&deaf, DEAF_NODE_PORT);
            steps.step(&format!("{shape:?}, {who}, a backend that does not listen, {family:?}"), || {
                // ICMP and ICMPv6: unreachable, port.
                let expected = if to.is_ipv4() { (3, 3) } else { (1, 4) };
                match worker.probe(to, false, 64)? {
                    Probed::Error { from, kind, code } => {
                        ensure!((kind, code) == expected, "type {kind}, code {code}");
                        ensure!(from == to.ip(), "{from} says so, which the client has not asked");
                        Ok(())
                    }
                    Probed::Answered => bail!("answered"),
                }
            });
        }
    }
    Ok(())
}

/// Each router tells that the time is exceeded, by an address of its own; behind the last one the Service answers.
fn trace(worker: &Worker, to: SocketAddr, tcp: bool, routers: &[&Node]) -> Result<()> {
    let exceeded = if to.is_ipv4() { 11 } else { 3 };
    let mut hops = 0;
    for router in routers {
        hops += 1;
        let own: BTreeSet<IpAddr> = router.own_addresses()?.into_iter().collect();
        match worker.probe(to, tcp, hops)? {
            Probed::Error { from, kind, code: 0 } if kind == exceeded && own.contains(&from) => {}
            other => bail!("hop {hops}: {other:?}, where {} was to be seen", router.name()),
        }
    }
    hops += 1;
    let last = worker.probe(to, tcp, hops)?;
    ensure!(last == Probed::Answered, "hop {hops}: {last:?}, where the Service was to answer");
    Ok(())
}
