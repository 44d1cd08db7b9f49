//! Who reaches whom in a lab without kproxy: the ground that other scenarios stand on.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{
    Cni, Context, ElbSpec, Family, HostSpec, Lab, NodeSpec, RpFilter, WorkerResult, wait_until,
};
use nix::errno::Errno;

use crate::Scenario;

pub const SCENARIOS: &[Scenario] = &[
    ("lab::pods_reach_pods_routed", |ctx| pods_reach_pods(ctx, Cni::RoutedVeth, Cni::RoutedVeth)),
    ("lab::pods_reach_pods_bridge", |ctx| pods_reach_pods(ctx, Cni::Bridge, Cni::Bridge)),
    ("lab::pods_reach_pods_vxlan", |ctx| pods_reach_pods(ctx, Cni::Vxlan, Cni::Vxlan)),
    ("lab::pods_reach_pods_mixed", |ctx| pods_reach_pods(ctx, Cni::RoutedVeth, Cni::Bridge)),
    ("lab::pods_come_and_go", pods_come_and_go),
    ("lab::overlay_is_used", overlay_is_used),
    ("lab::client_has_the_routes_it_was_given", client_routes),
    ("lab::pods_are_masked_where_asked", masquerade),
    ("lab::service_packets_die_at_the_gateway", strays),
    ("lab::invalid_packets_are_dropped", drop_invalid),
    ("lab::rp_filter_is_as_described", rp_filter),
    ("lab::builds_quickly_again_and_again", builds_quickly),
];

const PORT: u16 = 8080;

fn two_nodes(ctx: &Context, a: Cni, b: Cni) -> Result<Lab> {
    ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).cni(a))
            .node(NodeSpec::new("node-b", 2, &["b1"]).cni(b))
            .client("client")
    })
}

fn pods_reach_pods(ctx: &Context, a: Cni, b: Cni) -> Result<()> {
    let lab = two_nodes(ctx, a, b)?;
    let servers =
        ["a2", "b1"].into_iter().map(|name| lab.pod(name)?.echo(PORT)).collect::<Result<Vec<_>>>()?;
    for (from, member) in
        [("a1", &**lab.pod("a1")?), ("node-a", &**lab.node("node-a")?), ("node-b", &**lab.node("node-b")?)]
    {
        let worker = member.worker()?;
        for (name, server) in ["a2", "b1"].iter().zip(&servers) {
            for family in Family::BOTH {
                let to = server.address(family);
                let what = format!("{from} to {name}, {family:?}");
                let answer = worker.ask_tcp(to).with_context(|| what.clone())?;
                ensure!(answer.server == *name, "{what}: {answer:?}");
                ensure!(answer.local == to, "{what}: {answer:?}");
                let (answer, source) = worker.ask_udp(to).with_context(|| what.clone())?;
                ensure!(source == to, "{what}: answered from {source}");
                // A node has an address on each of its interfaces; a pod has one.
                if from == "a1" {
                    ensure!(answer.client.ip() == member.ip(family), "{what}: {answer:?}");
                }
            }
        }
    }
    Ok(())
}

fn pods_come_and_go(ctx: &Context) -> Result<()> {
    for cni in [Cni::RoutedVeth, Cni::Bridge, Cni::Vxlan] {
        let lab = two_nodes(ctx, cni, cni)?;
        let node = lab.node("node-b")?;
        ensure!(node.add_pod("b1", 1).is_err() && node.add_pod("b9", 0).is_err(), "name or number are taken");
        let pod = node.add_pod("b9", 1)?;
        let server = pod.echo(PORT)?;
        let worker = lab.pod("a1")?.worker()?;
        for family in Family::BOTH {
            let answer = worker.ask_tcp(server.address(family))?;
            ensure!(answer.server == "b9", "{cni:?}, {family:?}: {answer:?}");
        }
        let to = server.address(Family::V4);
        drop(server);
        node.remove_pod(pod)?;
        ensure!(worker.tcp_connect_with(to, None, Duration::from_millis(200)).is_err(), "it answers still");
        drop(worker);
        drop(lab);
        ctx.forget_labs();
    }
    Ok(())
}

fn overlay_is_used(ctx: &Context) -> Result<()> {
    let lab = two_nodes(ctx, Cni::Vxlan, Cni::Vxlan)?;
    let server = lab.pod("b1")?.echo(PORT)?;
    let mut wrapped = lab.node("node-a")?.capture("eth0", "udp port 4789")?;
    let mut bare = lab.node("node-a")?.capture("eth0", "tcp or ip6 proto 6")?;
    let worker = lab.pod("a1")?.worker()?;
    for family in Family::BOTH {
        worker.ask_tcp(server.address(family))?;
    }
    // Two connections: at least two handshakes of three.
    ensure!(wrapped.stop()? >= 6, "{:?}", wrapped.packets()?);
    ensure!(bare.stop()? == 0, "{:?}", bare.packets()?);
    Ok(())
}

fn client_routes(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1"]))
            .client("client")
            .host(HostSpec::new("insider", 101).pod_routes())
    })?;
    let pod = lab.pod("a1")?.echo(PORT)?;
    let node = lab.node("node-a")?.echo(PORT)?;
    let client = lab.host("client")?.worker()?;
    let insider = lab.host("insider")?.worker()?;
    for family in Family::BOTH {
        client.ask_tcp(node.address(family))?;
        refused(client.tcp_connect(pod.address(family)), Errno::ENETUNREACH)?;
        let answer = insider.ask_tcp(pod.address(family))?;
        ensure!(answer.client.ip() == lab.host("insider")?.ip(family));
    }
    // What the scenario adds is used.
    lab.host("client")?.ip_command("route add 10.244.1.0/24 via 192.0.2.11")?;
    client.ask_tcp(pod.address(Family::V4))?;
    Ok(())
}

fn masquerade(ctx: &Context) -> Result<()> {
    for masked in [true, false] {
        let lab = ctx.lab(|lab| {
            let mut node = NodeSpec::new("node-a", 1, &["a1"]).cni(Cni::Bridge);
            node.masquerade_pods = masked;
            lab.node(node).node(NodeSpec::new("node-b", 2, &["b1"]).cni(Cni::Bridge)).elb(ElbSpec::new())
        })?;
        let outside = lab.elb()?.echo(PORT)?;
        let pod = lab.pod("b1")?.echo(PORT)?;
        let worker = lab.pod("a1")?.worker()?;
        for family in Family::BOTH {
            let seen = worker.ask_tcp(outside.address(family))?.client.ip();
            let expected = if masked { lab.node("node-a")?.ip(family) } else { lab.pod("a1")?.ip(family) };
            ensure!(seen == expected, "masked {masked}: the elb saw {seen}");
            // Pods see pods as they are, either way.
            let seen = worker.ask_tcp(pod.address(family))?.client.ip();
            ensure!(seen == lab.pod("a1")?.ip(family), "b1 saw {seen}");
        }
        ctx.forget_labs();
    }
    Ok(())
}

fn strays(ctx: &Context) -> Result<()> {
    let lab = two_nodes(ctx, Cni::RoutedVeth, Cni::Bridge)?;
    for (pod, address) in [
        ("a1", "10.96.0.10:53"),
        ("b1", "10.96.0.11:53"),
        ("a1", "[fd00:10:96::10]:53"),
        ("b1", "[fd00:10:96::11]:53"),
    ] {
        let address: SocketAddr = address.parse()?;
        ensure!(lab.strays_to(address.ip())? == 0, "{address} too early");
        let worker = lab.pod(pod)?.worker()?;
        let tried = worker.tcp_connect_with(address, None, Duration::from_millis(100));
        refused(tried, Errno::ETIMEDOUT)?;
        wait_until("the packet at the gateway", Duration::from_secs(2), || {
            Ok(lab.strays_to(address.ip())? >= 1)
        })?;
    }
    ensure!(lab.strays()?.len() == 4, "{:?}", lab.strays()?);
    Ok(())
}

fn drop_invalid(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]).keep_invalid())
            .host(HostSpec::new("insider", 101).pod_routes())
    })?;
    let server = lab.pod("a1")?.echo(PORT)?;
    let worker = lab.host("insider")?.worker()?;
    worker.ask_tcp(server.address(Family::V4))?;
    let flows = lab.node("node-a")?.run(&["cat", "/proc/net/nf_conntrack"])?.success()?;
    ensure!(
        flows.lines().any(|flow| flow.contains("dport=8080")),
        "conntrack did not see the connection:\n{flows}"
    );
    let rules = lab.node("node-a")?.run(&["nft", "list", "ruleset"])?.success()?;
    ensure!(rules.contains("ct state invalid"), "{rules}");
    let rules = lab.node("node-b")?.run(&["nft", "list", "ruleset"])?.success()?;
    ensure!(rules.trim().is_empty(), "{rules}");
    Ok(())
}

fn rp_filter(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]).rp_filter(RpFilter::Off))
            .host(HostSpec::new("insider", 101).pod_routes())
    })?;
    // A client with an address that the nodes route elsewhere (to the gateway, by the same
    // interface) is fine; one with a pod's address of that very node is not, where it is strict.
    for (node, pod, other, arrives) in
        [("node-a", "a1", "10.244.1.200", false), ("node-b", "b1", "10.244.2.200", true)]
    {
        let insider = lab.host("insider")?;
        let veth = kproxy_lab::veth_name(pod);
        lab.node(node)?.ip_command(&format!("route add {other}/32 dev {veth}"))?;
        insider.ip_command(&format!("address add {other}/32 dev lo"))?;
        let mut seen = lab.pod(pod)?.capture("eth0", &format!("udp and src host {other}"))?;
        let worker = insider.worker()?;
        let socket = worker.udp_socket_at(format!("{other}:0").parse()?)?;
        let to = SocketAddr::new(lab.pod(pod)?.ip(Family::V4), PORT);
        worker.udp_send_to(socket.id, to, "spoofed")?;
        // A datagram that is certain to arrive, behind it on the same wire.
        let plain = worker.udp_socket(Family::V4)?;
        let mut behind = lab.pod(pod)?.capture("eth0", "udp and src host 192.0.2.101")?;
        worker.udp_send_to(plain.id, to, "plain")?;
        behind.wait_count(1, Duration::from_secs(2))?;
        behind.stop()?;
        ensure!((seen.stop()? == 1) == arrives, "{node}: {:?}", seen.packets()?);
    }
    Ok(())
}

fn builds_quickly(ctx: &Context) -> Result<()> {
    let mut times = Vec::new();
    for _ in 0..3 {
        let start = Instant::now();
        let lab = ctx.lab(|lab| {
            lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
                .node(NodeSpec::new("node-b", 2, &["b1", "b2"]).cni(Cni::Bridge))
                .node(NodeSpec::new("node-c", 3, &["c1"]).cni(Cni::Vxlan))
                .elb(ElbSpec::new())
                .client("client")
                .control()
        })?;
        let built = start.elapsed();
        // Usable at once: no waiting for duplicate address detection or link states.
        let server = lab.pod("b1")?.echo(PORT)?;
        let worker = lab.pod("a1")?.worker()?;
        for family in Family::BOTH {
            worker.ask_tcp(server.address(family))?;
        }
        let usable = start.elapsed();
        drop((server, worker, lab));
        ctx.forget_labs();
        times.push((built, usable, start.elapsed()));
    }
    for (built, usable, gone) in &times {
        eprintln!("built in {built:?}, usable after {usable:?}, gone after {gone:?}");
    }
    let quickest = times.iter().map(|(built, ..)| *built).min();
    ensure!(quickest.is_some_and(|time| time < Duration::from_secs(5)), "{times:?}");
    Ok(())
}

/// The call must fail with this errno.
pub fn refused<T: std::fmt::Debug>(result: WorkerResult<T>, errno: Errno) -> Result<()> {
    match result {
        Err(error) if error.errno() == Some(errno) => Ok(()),
        other => anyhow::bail!("{other:?} where {errno} was expected"),
    }
}
