//! `kproxy drops`: what is dropped and refused, as it happens, for one listener and for several.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Context, ElbSpec, Family, Node, NodeSpec, Process, kproxy_binary, veth_name};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, eventually};
use crate::dumps;
use crate::objects::{Service, cluster_ip};

pub const SCENARIOS: &[Scenario] = &[("kproxy::drops_are_told", told)];

const NODE_PORT: u16 = 30_080;

/// More than two CPUs may tell at once, and in the seconds that sending takes.
const FLOOD: u64 = 8_000;

/// `kproxy drops -o json`, and what it has told so far.
struct Listener {
    process: Process,
    told: Vec<Value>,
}

impl Listener {
    fn start(node: &Node) -> Result<Self> {
        let command =
            node.command(kproxy_binary()?)?.args(["drops", "-o", "json", "--bpf-root"]).arg(node.bpf_root());
        Ok(Self { process: command.spawn()?, told: Vec::new() })
    }

    fn look(&mut self) -> Result<&[Value]> {
        self.process.must_run()?;
        let text = self.process.stdout();
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        for line in whole.lines().skip(self.told.len()) {
            self.told.push(serde_json::from_str(line).with_context(|| format!("no JSON: {line}"))?);
        }
        Ok(&self.told)
    }

    /// Waits for an event with these fields.
    fn must_tell(&mut self, fields: &[(&str, &str)]) -> Result<()> {
        eventually("an event", || {
            let fits = |event: &Value| fields.iter().all(|(field, value)| event[*field] == *value);
            Ok(self.look()?.iter().any(fits).then_some(()))
        })
        .with_context(|| format!("expected {fields:?}, told were {:#?}", self.told))
    }
}

/// Until when somebody listens, in nanoseconds since boot.
fn listened_until(node: &Node) -> Result<u64> {
    let text = dumps::element(node, "drop_listener", 0)?;
    let element: Value = serde_json::from_str(&text)?;
    element["value"]["until"].as_u64().with_context(|| text)
}

fn since_boot() -> Result<u64> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(u64::try_from(time.tv_sec())? * 1_000_000_000 + u64::try_from(time.tv_nsec())?)
}

fn is_listened_to(node: &Node) -> Result<bool> {
    Ok(listened_until(node)? > since_boot()?)
}

fn told(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]))
            .elb(ElbSpec::new())
            .client("client")
    })?;
    for vip in lab.elb()?.vips() {
        let via = lab.node("node-a")?.ip(if vip.is_ipv4() { Family::V4 } else { Family::V6 });
        lab.host("client")?.ip_command(&format!("route add {vip} via {via}"))?;
    }
    let far = Service::new("far", 10).udp(80, TARGET).node_port(NODE_PORT).local().pods(&[lab.pod("b1")?]);
    let empty = Service::new("empty", 11).tcp(80, TARGET);
    let ranged = Service::new("ranged", 12)
        .tcp(81, TARGET)
        .load_balancers(lab.elb()?.vips())
        .source_range("10.244.0.0/16")
        .source_range("2001:db8:1234::/64")
        .pods(&[lab.pod("a1")?]);
    let cidrs = format!("{},{}", kproxy_lab::SERVICES_V4, kproxy_lab::SERVICES_V6);
    let mut cluster = Cluster::start(lab, &["node-a"], &["--service-cidr", &cidrs], [&far, &empty, &ranged])?;
    let node = cluster.node("node-a")?.clone();
    let outside = Client::at(cluster.lab.host("client")?)?;
    let pod = cluster.pod("a1")?;
    let mut steps = Steps::new();

    steps.step("nobody listens: nothing is written", || {
        ensure!(listened_until(&node)? == 0);
        outside.gets_silence(Transport::UdpUnconnected, SocketAddr::new(node.ip(Family::V4), NODE_PORT))?;
        let budgets = dumps::dump(&node, "drop_budget")?;
        let used = budgets.lines().any(|line| line.contains("\"sequence\"") && !line.contains(": 0"));
        ensure!(!used, "{budgets}");
        Ok(())
    });

    let mut first = Listener::start(&node)?;
    let mut second = Listener::start(&node)?;
    eventually("the programs being told", || Ok(is_listened_to(&node)?.then_some(())))?;
    // Each has begun to read before what follows is dropped: the first event that both told proves it.
    eventually("both listening", || {
        outside.gets_silence(Transport::UdpUnconnected, SocketAddr::new(node.ip(Family::V4), NODE_PORT))?;
        Ok((!first.look()?.is_empty() && !second.look()?.is_empty()).then_some(()))
    })?;
    for family in Family::BOTH {
        steps.step(&format!("each is told everything, {family:?}"), || {
            let vips = cluster.lab.elb()?.vips();
            let vip =
                vips.iter().find(|vip| vip.is_ipv4() == (family == Family::V4)).context("no address")?;
            let node_port = SocketAddr::new(node.ip(family), NODE_PORT);
            let load_balancer = SocketAddr::new(*vip, 81);
            let without_endpoints = SocketAddr::new(empty.cluster_ip(family), 80);
            let unallocated = SocketAddr::new(cluster_ip(99, family), 80);
            let (uplink, veth) = ("eth0", veth_name("a1"));
            outside.gets_silence(Transport::UdpUnconnected, node_port)?;
            outside.gets_silence(Transport::Tcp, load_balancer)?;
            pod.is_refused(Transport::Tcp, without_endpoints)?;
            pod.gets_silence(Transport::Tcp, unallocated)?;
            for listener in [&mut first, &mut second] {
                for (verdict, reason, service, protocol, to, interface) in [
                    ("drop", "no-local-endpoints", "far", "UDP", node_port, Some(uplink)),
                    ("drop", "source-range", "ranged", "TCP", load_balancer, Some(uplink)),
                    ("refuse", "no-endpoints", "empty", "TCP", without_endpoints, None),
                    ("drop", "unallocated-address", "", "TCP", unallocated, Some(&veth)),
                ] {
                    let to = to.to_string();
                    let mut fields = vec![
                        ("verdict", verdict),
                        ("reason", reason),
                        ("name", service),
                        ("protocol", protocol),
                        ("destination", &to),
                    ];
                    fields.extend(interface.map(|name| ("interface", name)));
                    listener.must_tell(&fields)?;
                }
                let socket = listener.told.iter().find(|event| event["reason"] == "no-endpoints");
                let socket = socket.context("no event")?;
                ensure!(socket.get("interface").is_none() && socket.get("source").is_none(), "{socket}");
                ensure!(socket["time"].as_str().is_some_and(|time| time.ends_with('Z')), "{socket}");
            }
            Ok(())
        });
    }
    steps.step("a flood is told in part, and how much of it is not", || {
        let (before, worker) = (first.look()?.len(), &outside.worker);
        let socket = worker.udp_socket(Family::V4)?;
        for _ in 0..FLOOD {
            worker.udp_send_to(socket.id, SocketAddr::new(node.ip(Family::V4), NODE_PORT), "hello")?;
        }
        worker.close(socket.id)?;
        let missed =
            |events: &[Value]| events.iter().filter_map(|event| event["missedBefore"].as_u64()).sum::<u64>();
        // What follows the flood, once there are tokens again, says what is missing of it.
        eventually("what is missing being said", || {
            outside
                .gets_silence(Transport::UdpUnconnected, SocketAddr::new(node.ip(Family::V4), NODE_PORT))?;
            Ok((missed(&first.look()?[before..]) > 0).then_some(()))
        })?;
        let events = &first.look()?[before..];
        let told = events.len() as u64;
        ensure!(told < FLOOD && missed(events) <= FLOOD, "{told} told, {} missed", missed(events));
        // The other one was told the same, in the same order.
        let keys = |listener: &mut Listener| {
            let fields = ["time", "source", "destination", "missedBefore"];
            // Clocks are compared when an event is printed: the last digits differ.
            let key =
                |event: &Value| fields[1..].iter().map(|field| event[*field].to_string()).collect::<Vec<_>>();
            Ok::<_, anyhow::Error>(listener.look()?.iter().map(key).collect::<Vec<_>>())
        };
        eventually("both having told the same", || {
            let (one, other) = (keys(&mut first)?, keys(&mut second)?);
            // One may have begun earlier, and of what came before its first event neither knows.
            let common = one.len().min(other.len()) - 5;
            Ok((one[one.len() - common..] == other[other.len() - common..]).then_some(()))
        })
    });
    steps.step("with one killed, the other goes on; with both, nobody listens", || {
        first.process.signal(Signal::SIGKILL)?;
        let count = second.look()?.len();
        eventually("another event", || {
            outside
                .gets_silence(Transport::UdpUnconnected, SocketAddr::new(node.ip(Family::V6), NODE_PORT))?;
            Ok((second.look()?.len() > count).then_some(()))
        })?;
        second.process.signal(Signal::SIGKILL)?;
        eventually("the programs' belief to end", || Ok((!is_listened_to(&node)?).then_some(())))?;
        let before = dumps::dump(&node, "drop_budget")?;
        outside.gets_silence(Transport::UdpUnconnected, SocketAddr::new(node.ip(Family::V4), NODE_PORT))?;
        let after = dumps::dump(&node, "drop_budget")?;
        ensure!(before == after, "{before} and {after}");
        Ok(())
    });
    steps.step("without the agent, for people", || {
        cluster.agent("node-a")?.kill(Signal::SIGKILL)?;
        let command = node.command(kproxy_binary()?)?.args(["drops", "--bpf-root"]).arg(node.bpf_root());
        let mut process = command.spawn()?;
        eventually("a line about a drop", || {
            process.must_run()?;
            outside
                .gets_silence(Transport::UdpUnconnected, SocketAddr::new(node.ip(Family::V4), NODE_PORT))?;
            let text = process.stdout();
            let is_told =
                text.lines().any(|line| line.contains("drop") && line.contains("default/far:udp-80"));
            Ok((text.starts_with("TIME") && is_told).then_some(()))
        })
    });
    steps.done()
}
