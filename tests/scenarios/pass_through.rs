//! Pass-through: which rule decides, and which way a connection to a load-balancer address takes.
//! HAProxy's own counter is the proof.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Check, Context, Elb, ElbSpec, Family, Frontend, Lab, NodeSpec};
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Client, Cluster, DEADLINE, Steps, TARGET, Transport, among, frontend, services_view};
use crate::dumps;
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::pass_through_rules", rules),
    ("kproxy::pass_through_of_datagrams_and_ports", ports),
    ("kproxy::pass_through_leaves_the_rest_alone", the_rest),
];

const OWN: &str = "kproxy.io/pass-through";
const ELB: &str = "kubernetes.io/elb.pass-through";
const EXTRA: &str = "example.com/keep-the-load-balancer";
const BY_DEFAULT: &str = "--pass-through-default";
const BY_IP_MODE: &str = "ipMode: Proxy";
const BY_EXTRA: &str = "--pass-through-annotation";

/// The way of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// From the client's node to the backend.
    Short,
    /// Through the load balancer.
    Long,
}

use Way::{Long, Short};

/// A Service, and what becomes of connections to its load-balancer addresses.
struct Row {
    what: &'static str,
    /// Makes it of a LoadBalancer Service with policy Local and one endpoint.
    make: fn(Service) -> Service,
    pod: Way,
    host: Way,
    rule: &'static str,
}

const fn row(
    what: &'static str,
    make: fn(Service) -> Service,
    pod: Way,
    host: Way,
    rule: &'static str,
) -> Row {
    Row { what, make, pod, host, rule }
}

/// Flags of the agent, and the rows that are tried under them.
const GROUPS: &[(&[&str], &[Row])] = &[
    (
        &[],
        &[
            row("nothing said", |s| s, Short, Short, BY_DEFAULT),
            row("elb true", |s| s.annotation(ELB, "true"), Long, Long, ELB),
            row("elb true, policy Cluster", |s| s.annotation(ELB, "true").cluster(), Long, Long, ELB),
            row("elb onlyLocal", |s| s.annotation(ELB, "onlyLocal"), Long, Long, ELB),
            row(
                "elb onlyLocal, policy Cluster",
                |s| s.annotation(ELB, "onlyLocal").cluster(),
                Short,
                Short,
                BY_DEFAULT,
            ),
            row("own true", |s| s.annotation(OWN, "true"), Long, Long, OWN),
            row(
                "own false beats elb true",
                |s| s.annotation(OWN, "false").annotation(ELB, "true"),
                Short,
                Short,
                OWN,
            ),
            row("own false beats ipMode", |s| s.annotation(OWN, "false").ip_mode("Proxy"), Short, Short, OWN),
            row(
                "own true, elb false",
                |s| s.annotation(OWN, "true").annotation(ELB, "false"),
                Long,
                Long,
                OWN,
            ),
            row("ipMode Proxy", |s| s.ip_mode("Proxy"), Long, Long, BY_IP_MODE),
            row("ipMode VIP", |s| s.ip_mode("VIP"), Short, Short, BY_DEFAULT),
            row("elb true beats ipMode VIP", |s| s.annotation(ELB, "true").ip_mode("VIP"), Long, Long, ELB),
            row(
                "elb onlyLocal, policy Cluster, ipMode Proxy",
                |s| s.annotation(ELB, "onlyLocal").cluster().ip_mode("Proxy"),
                Long,
                Long,
                BY_IP_MODE,
            ),
            row(
                "elb false does not decide",
                |s| s.annotation(ELB, "false").ip_mode("Proxy"),
                Long,
                Long,
                BY_IP_MODE,
            ),
            row("elb unknown value", |s| s.annotation(ELB, "yes"), Short, Short, BY_DEFAULT),
            row("own unknown value", |s| s.annotation(OWN, "1").annotation(ELB, "true"), Long, Long, ELB),
            row("no such key", |s| s.annotation(EXTRA, "true"), Short, Short, BY_DEFAULT),
            row(
                "source ranges are the load balancer's",
                |s| {
                    s.annotation(ELB, "true")
                        .source_range("198.51.100.0/24")
                        .source_range("2001:db8:198::/64")
                },
                Long,
                Long,
                ELB,
            ),
        ],
    ),
    (
        &["--pass-through-default"],
        &[
            row("default on, nothing said", |s| s, Long, Long, BY_DEFAULT),
            row("default on, own false", |s| s.annotation(OWN, "false"), Short, Short, OWN),
            row("default on, ipMode VIP", |s| s.ip_mode("VIP"), Long, Long, BY_DEFAULT),
            row(
                "default on, elb onlyLocal, policy Cluster",
                |s| s.annotation(ELB, "onlyLocal").cluster(),
                Long,
                Long,
                BY_DEFAULT,
            ),
        ],
    ),
    (
        &["--pass-through-annotation", EXTRA, "--pass-through-annotation", "example.com/another"],
        &[
            row("extra key", |s| s.annotation(EXTRA, "true"), Long, Long, BY_EXTRA),
            row("second extra key", |s| s.annotation("example.com/another", "true"), Long, Long, BY_EXTRA),
            row("extra key onlyLocal", |s| s.annotation(EXTRA, "onlyLocal"), Long, Long, BY_EXTRA),
            row(
                "extra key onlyLocal, policy Cluster",
                |s| s.annotation(EXTRA, "onlyLocal").cluster(),
                Short,
                Short,
                BY_DEFAULT,
            ),
            row(
                "own false beats an extra key",
                |s| s.annotation(OWN, "false").annotation(EXTRA, "true"),
                Short,
                Short,
                OWN,
            ),
            row("extra keys, elb true", |s| s.annotation(ELB, "true"), Long, Long, ELB),
        ],
    ),
    (
        &["--pass-through-scope", "pods"],
        &[
            row("scope pods, elb true", |s| s.annotation(ELB, "true"), Long, Short, ELB),
            row("scope pods, ipMode Proxy", |s| s.ip_mode("Proxy"), Long, Short, BY_IP_MODE),
            row("scope pods, nothing said", |s| s, Short, Short, BY_DEFAULT),
        ],
    ),
    (
        &["--pass-through-scope", "nodes"],
        &[
            row("scope nodes, elb true", |s| s.annotation(ELB, "true"), Short, Long, ELB),
            row("scope nodes, nothing said", |s| s, Short, Short, BY_DEFAULT),
        ],
    ),
];

/// Where agents run.
const NODES: &[&str] = &["node-a", "node-c"];

/// A node with the only backend and one without; the load balancer leads to the first.
fn lab(ctx: &Context) -> Result<Lab> {
    ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
            .node(NodeSpec::new("node-c", 3, &["c1"]))
            .elb(ElbSpec::new())
    })
}

/// Pods and hosts; with and without a backend on their node.
fn clients(cluster: &Cluster) -> Result<[(Client, &'static str, bool); 4]> {
    Ok([
        (cluster.pod("a1")?, "node-a", true),
        (cluster.pod("c1")?, "node-c", true),
        (cluster.host("node-a")?, "node-a", false),
        (cluster.host("node-c")?, "node-c", false),
    ])
}

/// A row as it is tried: all of them at once, each on another port of the same addresses.
struct Tried<'a> {
    row: &'a Row,
    service: Service,
    port: u16,
    node_port: u16,
}

impl Tried<'_> {
    fn way(&self, is_pod: bool) -> Way {
        if is_pod { self.row.pod } else { self.row.host }
    }
}

fn tried(lab: &Lab) -> Result<Vec<Vec<Tried<'static>>>> {
    let mut number = 0;
    let mut make = |row: &'static Row| -> Result<Tried<'static>> {
        number += 1;
        let (port, node_port) = (8000 + u16::from(number), 30_000 + u16::from(number));
        let service = Service::new(&format!("row-{number}"), number).tcp(port, TARGET).node_port(node_port);
        let service = service.load_balancers(lab.elb()?.vips()).local().pods(&[lab.pod("a2")?]);
        Ok(Tried { row, service: (row.make)(service), port, node_port })
    };
    GROUPS.iter().map(|(_, rows)| rows.iter().map(&mut make).collect()).collect()
}

fn rules(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let groups = tried(&lab)?;
    let all: Vec<_> = groups.iter().flatten().collect();
    let elb = lab.elb()?.clone();
    let node_a = lab.node("node-a")?.v4();
    let frontends: Vec<_> = all
        .iter()
        .map(|one| {
            let way_back = SocketAddr::new(node_a.into(), one.node_port);
            Frontend::new(one.service.name())
                .bind_all(elb.vips(), one.port)
                .server("node-a", way_back)
                .check(Check::None)
        })
        .collect();
    elb.configure(&frontends)?;
    let services: Vec<_> = all.iter().map(|one| one.service.clone()).collect();
    let mut cluster = Cluster::start(lab, NODES, GROUPS[0].0, &services)?;
    let _servers = cluster.servers(&["a2"])?;
    let clients = clients(&cluster)?;
    let mut steps = Steps::new();
    for ((arguments, _), rows) in GROUPS.iter().zip(&groups) {
        if !arguments.is_empty() {
            cluster.start_agents(NODES, arguments)?;
        }
        let before = views(&cluster)?;
        for one in rows {
            steps.step(one.row.what, || takes_the_way(&elb, one, &clients));
        }
        let after = views(&cluster)?;
        for one in rows {
            steps.step(&format!("{}, as the node tells it", one.row.what), || {
                for vip in elb.vips() {
                    counted(one, *vip, &clients, &before, &after)?;
                    told(&cluster, one, *vip, &after)?;
                }
                Ok(())
            });
        }
        if arguments.is_empty() {
            steps.step("unknown values and idle source ranges are reported", || reported(&mut cluster, rows));
        }
    }
    steps.done()
}

/// Each client asks each address once.
fn takes_the_way(elb: &Elb, one: &Tried<'_>, clients: &[(Client, &str, bool)]) -> Result<()> {
    for vip in elb.vips() {
        let to = SocketAddr::new(*vip, one.port);
        for (client, _, is_pod) in clients {
            let what = format!("{} to {to}", client.name);
            let before = elb.connections(one.service.name())?;
            let answer = client.worker.ask_tcp(to).with_context(|| what.clone())?;
            ensure!(answer.server == "a2", "{what}: {answer:?}");
            let after = elb.connections(one.service.name())?;
            let seen = answer.client.ip().to_canonical();
            match one.way(*is_pod) {
                Long => {
                    ensure!(after == before + 1, "{what}: not through the load balancer: {answer:?}");
                    ensure!(seen == elb.v4(), "{what}: seen as {seen}");
                }
                Short => {
                    ensure!(after == before, "{what}: through the load balancer: {answer:?}");
                    ensure!(client.addresses.contains(&seen), "{what}: seen as {seen}");
                }
            }
        }
    }
    Ok(())
}

/// What `kproxy services -o json` prints, by node.
type Views = BTreeMap<&'static str, Value>;

fn views(cluster: &Cluster) -> Result<Views> {
    NODES.iter().map(|node| Ok((*node, services_view(cluster.node(node)?)?))).collect()
}

/// Connections are counted where they were made, as what they were.
fn counted(
    one: &Tried<'_>,
    vip: IpAddr,
    clients: &[(Client, &str, bool)],
    before: &Views,
    after: &Views,
) -> Result<()> {
    for node in NODES {
        let count = |views: &Views, name: &str| -> Result<u64> {
            let service = among(&views[node], one.service.name())?;
            let frontend = frontend(service, vip, one.port, "TCP")?;
            frontend[name].as_u64().with_context(|| format!("{name} in {frontend}"))
        };
        for (name, way) in [("connections", Short), ("passThroughConnections", Long)] {
            let here = clients.iter().filter(|(_, at, is_pod)| at == node && one.way(*is_pod) == way);
            let (expected, counted) = (here.count() as u64, count(after, name)? - count(before, name)?);
            ensure!(counted == expected, "{vip} on {node}: {counted} {name}, not {expected}");
        }
    }
    Ok(())
}

/// Mode and rule, in the command's output and in the map.
fn told(cluster: &Cluster, one: &Tried<'_>, vip: IpAddr, views: &Views) -> Result<()> {
    let service = among(&views["node-a"], one.service.name())?;
    let frontend = frontend(service, vip, one.port, "TCP")?;
    let (mode, name) = match (one.row.pod, one.row.host) {
        (Short, Short) => ("forward", "Forward"),
        (Long, Long) => ("pass-through", "PassThrough"),
        (Long, Short) => ("pass-through for pods", "PassThroughPods"),
        (Short, Long) => ("pass-through for the host", "PassThroughHost"),
    };
    ensure!(frontend["mode"] == mode, "not {mode}: {frontend}");
    ensure!(frontend["passThroughRule"] == one.row.rule, "not {}: {frontend}", one.row.rule);
    let number = frontend["number"].as_u64().with_context(|| format!("no number in {frontend}"))?;
    let text = dumps::element(cluster.node("node-a")?, "service", u32::try_from(number)?)?;
    let value: Value = serde_json::from_str(&text)?;
    ensure!(value["value"]["inside"]["mode"] == name, "no {name} in {text}");
    Ok(())
}

fn reported(cluster: &mut Cluster, rows: &[Tried<'_>]) -> Result<()> {
    let name = |what: &str| -> Result<String> {
        let row = rows.iter().find(|one| one.row.what == what);
        Ok(format!("default/{}", row.context("no such row")?.service.name()))
    };
    let wanted = [
        (name("elb unknown value")?, ELB),
        (name("own unknown value")?, OWN),
        (name("source ranges are the load balancer's")?, "loadBalancerSourceRanges"),
    ];
    let log = cluster.agent("node-a")?.log();
    for (service, word) in &wanted {
        let lines: Vec<_> = log.iter().filter(|line| line.mentions(service) && line.mentions(word)).collect();
        ensure!(lines.len() == 1, "{service}, {word}: {lines:?}");
        ensure!(matches!(lines[0].level.as_str(), "WARN" | "ERROR"), "{:?}", lines[0]);
    }
    // Nobody else is complained about.
    for one in rows {
        let service = format!("default/{}", one.service.name());
        let is_wanted = wanted.iter().any(|(name, _)| *name == service);
        let lines: Vec<_> = log
            .iter()
            .filter(|line| matches!(line.level.as_str(), "WARN" | "ERROR"))
            // row-1 is part of row-10.
            .filter(|line| line.mentions(&format!("{service} ")) || line.mentions(&format!("{service}:")))
            .collect();
        ensure!(is_wanted || lines.is_empty(), "{lines:?}");
    }
    Ok(())
}

/// By address, port and protocol; for datagrams; without endpoints.
fn ports(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let vips = lab.elb()?.vips().to_vec();
    let a2 = lab.pod("a2")?.clone();
    let base = |name: &str, number| Service::new(name, number).pods(&[&a2]);
    let services = [
        base("udp-long", 10).udp(9090, TARGET).load_balancers(&vips).annotation(ELB, "true"),
        base("udp-short", 11).udp(9091, TARGET).load_balancers(&vips),
        base("tcp-of-two", 12).tcp(9092, TARGET).load_balancers(&vips).annotation(OWN, "true"),
        base("udp-of-two", 13).udp(9092, TARGET).load_balancers(&vips).annotation(OWN, "false"),
        base("by-address", 14)
            .tcp(9093, TARGET)
            .udp(9093, TARGET)
            .load_balancers(&vips[..1])
            .ip_mode("Proxy")
            .load_balancers(&vips[1..]),
        Service::new("empty", 15).tcp(9094, TARGET).load_balancers(&vips).annotation(ELB, "true"),
    ];
    let cluster = Cluster::start(lab, NODES, &[], &services)?;
    let _server = cluster.servers(&["a2"])?;
    let beyond = (9090..=9094).map(|port| cluster.lab.elb()?.echo(port)).collect::<Result<Vec<_>>>()?;
    let mut steps = Steps::new();
    let [tcp, udp, unconnected] = Transport::ALL;
    for (client, ..) in clients(&cluster)? {
        for vip in &vips {
            let family = if vip.is_ipv4() { Family::V4 } else { Family::V6 };
            let by_address = if family == Family::V4 { "elb" } else { "a2" };
            for (what, port, transports, server) in [
                ("datagrams, long way", 9090, &[udp, unconnected][..], "elb"),
                ("datagrams, short way", 9091, &[udp, unconnected], "a2"),
                ("one port, TCP passes", 9092, &[tcp], "elb"),
                ("one port, UDP does not", 9092, &[udp, unconnected], "a2"),
                ("one address is Proxy", 9093, &[tcp, udp, unconnected], by_address),
                ("no endpoints", 9094, &[tcp], "elb"),
                ("not claimed at all", 9094, &[udp, unconnected], "elb"),
            ] {
                for transport in transports {
                    steps.step(&format!("{}, {what}, {family:?}, {transport:?}", client.name), || {
                        client.reaches(*transport, SocketAddr::new(*vip, port), &[server])
                    });
                }
            }
        }
    }
    drop(beyond);
    steps.done()
}

/// ClusterIP, NodePort and externalIP go on working, for a Service that is passed through.
fn the_rest(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let external = [IpAddr::from([198, 51, 100, 7]), "2001:db8:198::7".parse()?];
    let web = Service::new("web", 10)
        .tcp(80, TARGET)
        .udp(80, TARGET)
        .node_port(30_080)
        .external_ip(external[0])
        .external_ip(external[1])
        .load_balancers(lab.elb()?.vips())
        .local()
        .annotation(ELB, "true")
        .pods(&[lab.pod("a2")?]);
    let cluster = Cluster::start(lab, NODES, &[], [&web])?;
    let _server = cluster.servers(&["a2"])?;
    let mut steps = Steps::new();
    for (client, node, _) in clients(&cluster)? {
        for (family, external) in Family::BOTH.into_iter().zip(external) {
            for (kind, address, port) in [
                ("ClusterIP", web.cluster_ip(family), 80),
                ("NodePort", cluster.node(node)?.ip(family), 30_080),
                ("externalIP", external, 80),
            ] {
                for transport in Transport::ALL {
                    steps.step(&format!("{}, {kind}, {family:?}, {transport:?}", client.name), || {
                        client.reaches(transport, SocketAddr::new(address, port), &["a2"])
                    });
                }
            }
        }
    }
    steps.step("the load balancer's check of the NodePort", || {
        let elb = cluster.lab.elb()?;
        let mut frontend = Frontend::new("web").bind_all(elb.vips(), 80);
        for node in cluster.lab.nodes() {
            frontend = frontend.server(node.name(), SocketAddr::new(node.v4().into(), 30_080));
        }
        elb.configure(&[frontend])?;
        // Only the node with an endpoint answers from outside.
        elb.wait_servers_up("web", &["node-a"], DEADLINE)
    });
    steps.done()
}
