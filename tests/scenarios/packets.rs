//! The packet hooks: clients outside, asking nodes for Services whose backends are there.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Cni, Context, ElbSpec, Family, Lab, Member, Node, NodeSpec};

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, ask_from, eventually, family_of, frontend};
use crate::dumps;
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::packets_reach_local_backends_routed", |ctx| outside(ctx, Cni::RoutedVeth)),
    ("kproxy::packets_reach_local_backends_bridge", |ctx| outside(ctx, Cni::Bridge)),
    ("kproxy::packets_reach_local_backends_vxlan", |ctx| outside(ctx, Cni::Vxlan)),
    ("kproxy::packets_reach_backends_without_tcx", |ctx| {
        outside_without("tcx", ctx, Cni::RoutedVeth)?;
        ctx.forget_labs();
        masked_without("tcx", ctx, Cni::RoutedVeth)
    }),
    ("kproxy::packets_reach_remote_backends_routed", |ctx| masked(ctx, Cni::RoutedVeth)),
    ("kproxy::packets_reach_remote_backends_vxlan", |ctx| masked(ctx, Cni::Vxlan)),
];

const NODE_PORT: u16 = 30_080;
const MEGABYTE: u64 = 1_000_000;

/// Where the agent's reserved range begins.
const MASK_PORTS_FIRST: u16 = 61_000;

/// Backends on two nodes, none on the third. The nodes filter strictly by reverse path, and drop
/// what conntrack finds invalid. The client sends what is for the load balancer's address to node-a.
fn lab(ctx: &Context, cni: Cni) -> Result<Lab> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).cni(cni))
            .node(NodeSpec::new("node-b", 2, &["b1"]).cni(cni))
            .node(NodeSpec::new("node-c", 3, &["c1"]).cni(cni))
            .elb(ElbSpec::new())
            .client("client")
    })?;
    let node = lab.node("node-a")?;
    for vip in lab.elb()?.vips() {
        let via = if vip.is_ipv4() { node.ip(Family::V4) } else { node.ip(Family::V6) };
        lab.host("client")?.ip_command(&format!("route add {vip} via {via}"))?;
    }
    Ok(lab)
}

fn outside(ctx: &Context, cni: Cni) -> Result<()> {
    outside_without("", ctx, cni)
}

/// On a kernel without something; see [`Cluster::start_without`].
fn outside_without(without: &str, ctx: &Context, cni: Cni) -> Result<()> {
    let lab = lab(ctx, cni)?;
    let pods = ["a1", "a2", "b1"].map(|name| lab.pod(name).cloned());
    let [a1, a2, b1] = pods;
    let web = Service::new("web", 10)
        .tcp(80, TARGET)
        .udp(80, TARGET)
        .node_port(NODE_PORT)
        .load_balancers(lab.elb()?.vips())
        .local()
        .pods(&[&a1?, &a2?, &b1?]);
    let passed = Service::new("passed", 11)
        .udp(81, TARGET)
        .node_port(NODE_PORT + 1)
        .load_balancers(lab.elb()?.vips())
        .local()
        .annotation("kproxy.io/pass-through", "true")
        .pods(&[lab.pod("a1")?]);
    // Neither has endpoints anywhere.
    let empty = Service::new("empty", 12).tcp(82, TARGET).udp(82, TARGET).node_port(NODE_PORT + 3);
    let empty = empty.load_balancers(lab.elb()?.vips()).local();
    let passed_empty = Service::new("passed-empty", 13)
        .udp(83, TARGET)
        .load_balancers(lab.elb()?.vips())
        .annotation("kproxy.io/pass-through", "true");
    let nodes = ["node-a", "node-b", "node-c"];
    let services = [&web, &passed, &empty, &passed_empty];
    let cluster = Cluster::start_without(without, lab, &nodes, &[], services)?;
    let _servers = cluster.servers(&["a1", "a2", "b1"])?;
    let lab = &cluster.lab;
    let client = Client::at(lab.host("client")?)?;
    let addresses = |node: &Node| Family::BOTH.map(|family| node.ip(family));
    let mut steps = Steps::new();

    let mut asked = Vec::new();
    for (node, backends) in [("node-a", &["a1", "a2"][..]), ("node-b", &["b1"])] {
        for address in addresses(lab.node(node)?) {
            asked.push((format!("NodePort of {node}"), SocketAddr::new(address, NODE_PORT), backends));
        }
    }
    for vip in lab.elb()?.vips() {
        asked.push((String::from("load balancer, by node-a"), SocketAddr::new(*vip, 80), &["a1", "a2"]));
    }
    for (kind, to, backends) in &asked {
        for transport in Transport::ALL {
            steps.step(&format!("{kind}, {:?}, {transport:?}", family_of(*to)), || {
                client.reaches(transport, *to, backends)
            });
        }
        steps.step(&format!("{kind}, {:?}, 5 MB down and 50 MB up", family_of(*to)), || {
            transfer(&client, *to)
        });
    }
    for address in addresses(lab.node("node-c")?) {
        let to = SocketAddr::new(address, NODE_PORT);
        for transport in Transport::ALL {
            steps.step(&format!("no endpoint on node-c, {:?}, {transport:?}", family_of(to)), || {
                client.gets_silence(transport, to)
            });
        }
    }
    let mut refusing = Vec::new();
    for family in Family::BOTH {
        refusing.push(SocketAddr::new(lab.node("node-a")?.ip(family), NODE_PORT + 3));
        refusing.push(SocketAddr::new(lab.node("node-c")?.ip(family), NODE_PORT + 3));
        // A ClusterIP on a port that it does not have; the client is told the way by node-a.
        let service = web.cluster_ip(family);
        lab.host("client")?
            .ip_command(&format!("route add {service} via {}", lab.node("node-a")?.ip(family)))?;
        refusing.push(SocketAddr::new(service, 9_999));
    }
    refusing.extend(lab.elb()?.vips().iter().map(|vip| SocketAddr::new(*vip, 82)));
    for to in &refusing {
        for transport in Transport::REFUSABLE {
            steps.step(&format!("no endpoint anywhere, or no such port: {to}, {transport:?}"), || {
                client.is_refused_by_packet(transport, *to)
            });
        }
    }
    let seldom = Client::at(lab.host("client")?)?;
    seldom.worker.use_seldom_headers()?;
    for to in &refusing {
        for transport in Transport::REFUSABLE {
            steps.step(&format!("the same to options or extension headers: {to}, {transport:?}"), || {
                seldom.is_refused_by_packet(transport, *to)
            });
        }
    }
    for (_, to, backends) in &asked {
        steps.step(&format!("options or extension headers are translated: {to}"), || {
            Transport::ALL.iter().try_for_each(|transport| seldom.reaches(*transport, *to, backends))
        });
    }
    steps.step("pass-through without endpoints is not refused here", || {
        let beyond = lab.elb()?.echo(83)?;
        for vip in lab.elb()?.vips() {
            client.reaches(Transport::UdpConnected, SocketAddr::new(*vip, beyond.port()), &["elb"])?;
        }
        Ok(())
    });
    steps.step("an echo request to a ClusterIP is answered", || {
        for family in Family::BOTH {
            ping(lab.host("client")?, web.cluster_ip(family))?;
        }
        Ok(())
    });
    steps.step("pass-through from outside goes on to the load balancer", || {
        let beyond = lab.elb()?.echo(81)?;
        for vip in lab.elb()?.vips() {
            let to = SocketAddr::new(*vip, beyond.port());
            let before = passed_through(lab.node("node-a")?, *vip)?;
            for transport in [Transport::UdpConnected, Transport::UdpUnconnected] {
                client.reaches(transport, to, &["elb"])?;
            }
            let after = passed_through(lab.node("node-a")?, *vip)?;
            ensure!(after > before, "{before} were counted before, {after} after");
        }
        Ok(())
    });
    steps.step("a port that is not theirs is the node's own", || {
        let own = lab.node("node-c")?.echo(NODE_PORT + 2)?;
        for family in Family::BOTH {
            for transport in Transport::ALL {
                client.reaches(transport, own.address(family), &["node-c"])?;
            }
        }
        Ok(())
    });
    steps.step("nothing was invalid for conntrack", || {
        for node in ["node-a", "node-b"] {
            let rules = lab.node(node)?.run(&["nft", "list", "table", "inet", "node"])?.success()?;
            ensure!(rules.contains("invalid counter packets 0 "), "{node}: {rules}");
        }
        Ok(())
    });
    steps.step("flows are retired", || flows_end(&client, lab.node("node-a")?));
    steps.done()
}

/// Under policy Cluster a node sends outside clients to backends on other nodes too, hidden behind an address of
/// its own, so that the answers come back its way.
fn masked(ctx: &Context, cni: Cni) -> Result<()> {
    masked_without("", ctx, cni)
}

fn masked_without(without: &str, ctx: &Context, cni: Cni) -> Result<()> {
    let lab = lab(ctx, cni)?;
    let web =
        Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(NODE_PORT).pods(&[lab.pod("b1")?]);
    let cluster = Cluster::start_without(without, lab, &["node-a", "node-b", "node-c"], &[], [&web])?;
    let _servers = cluster.servers(&["b1"])?;
    let lab = &cluster.lab;
    let client = Client::at(lab.host("client")?)?;
    let mut steps = Steps::new();
    for name in ["node-a", "node-c"] {
        let node = lab.node(name)?;
        steps.step(&format!("{name}: no socket is given a mask's port by itself"), || {
            let reserved = node.netns().sysctl("net/ipv4/ip_local_reserved_ports")?;
            ensure!(reserved.as_deref() == Some("61000-65535"), "reserved are {reserved:?}");
            Ok(())
        });
        // By an overlay the packet leaves with the overlay's own address.
        let masks = addresses_of(node)?;
        // Not with one that may be on another node tomorrow, though it comes first.
        for address in ["192.0.2.3/32", "192.0.2.4/24", "2001:db8::3/128 nodad"] {
            node.ip_command(&format!("address add {address} dev eth0"))?;
        }
        for family in Family::BOTH {
            let to = SocketAddr::new(node.ip(family), NODE_PORT);
            for transport in Transport::ALL {
                steps.step(&format!("{name}, {family:?}, {transport:?}"), || {
                    let (answer, _) = ask_from(&client.worker, transport, to)?;
                    ensure!(answer.server == "b1", "answered by {answer:?}");
                    ensure!(masks.contains(&answer.client.ip()), "seen as {answer:?}");
                    ensure!(answer.client.port() >= MASK_PORTS_FIRST, "seen as {answer:?}");
                    Ok(())
                });
            }
            steps.step(&format!("{name}, {family:?}, 5 MB down and 50 MB up"), || transfer(&client, to));
        }
    }
    for family in Family::BOTH {
        let to = SocketAddr::new(lab.node("node-b")?.ip(family), NODE_PORT);
        for transport in Transport::ALL {
            steps.step(&format!("node-b, {family:?}, {transport:?}: the client is not hidden"), || {
                client.reaches(transport, to, &["b1"])
            });
        }
    }
    steps.done()
}

/// All addresses on a node's interfaces.
fn addresses_of(node: &Node) -> Result<std::collections::BTreeSet<IpAddr>> {
    let text = node.run(&["ip", "-o", "addr", "show"])?.success()?;
    let words = text.split_whitespace();
    Ok(words.filter_map(|word| word.split('/').next()?.parse().ok()).collect())
}

fn transfer(client: &Client, to: SocketAddr) -> Result<()> {
    let worker = &client.worker;
    let socket = worker.tcp_connect(to)?;
    worker.tcp_transfer(socket.id, 1, 5 * MEGABYTE).context("5 MB down")?;
    worker.tcp_transfer(socket.id, 50 * MEGABYTE, 1).context("50 MB up")?;
    worker.tcp_ask(socket.id, "still the same connection")?;
    Ok(worker.close(socket.id)?)
}

/// One echo request, which must be answered by the address that was asked. Before it, ping connects a UDP socket to that
/// address, to a port that no Service has, to learn its own.
pub fn ping(from: &Member, to: IpAddr) -> Result<()> {
    let output = from.run(&["ping", "-n", "-c", "1", "-W", "2", &to.to_string()])?.success()?;
    ensure!(output.contains(&format!("from {to}")), "{output}");
    Ok(())
}

fn passed_through(node: &Node, vip: IpAddr) -> Result<u64> {
    let service = crate::cluster::service_view(node, "passed")?;
    let count = &frontend(&service, vip, 81, "UDP")?["passThroughConnections"];
    count.as_u64().with_context(|| format!("counted {count}"))
}

/// An open connection is in the table of established flows, and leaves it when it is closed.
fn flows_end(client: &Client, node: &Node) -> Result<()> {
    for family in Family::BOTH {
        let socket = client.worker.tcp_connect(SocketAddr::new(node.ip(family), NODE_PORT))?;
        client.worker.tcp_ask(socket.id, "hello")?;
        let source = format!("\"source_port\": {},", socket.local.port());
        let is_there = || Ok::<_, anyhow::Error>(dumps::dump(node, "flow")?.contains(&source));
        ensure!(is_there()?, "the open connection is in no flow");
        client.worker.close(socket.id)?;
        eventually("the closed connection out of the table", || Ok((!is_there()?).then_some(())))?;
    }
    Ok(())
}
