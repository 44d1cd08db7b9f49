//! What a node sends past every frontend, by itself or for a pod that the CNI masquerades, beside flows of Services.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Answer, Context, Family, Member, NodeSpec, Worker};

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport};
use crate::objects::{Endpoint, Service};

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::answers_to_a_node_port_number_arrive", answers),
    ("kproxy::the_node_and_masqueraded_clients_share_a_backend", shared),
];

const NODE_PORT: u16 = 30_053;
const SERVER: u16 = 5_300;
const ANSWER: Duration = Duration::from_secs(2);

/// A socket that asks from a port, as a resolver may by chance.
fn ask_from_port(member: &Member, port: u16, server: SocketAddr) -> Result<Answer> {
    let worker = member.worker()?;
    let family = if server.is_ipv4() { Family::V4 } else { Family::V6 };
    let socket = worker.udp_socket_at(SocketAddr::new(member.ip(family), port))?;
    let mut answer = None;
    for _ in 0..3 {
        worker.udp_send_to(socket.id, server, "who")?;
        let datagram = worker.udp_receive(socket.id, ANSWER).context("there is no answer")?;
        ensure!(datagram.from == server, "{} answers", datagram.from);
        answer = Some(serde_json::from_str(&datagram.data)?);
    }
    answer.context("asked")
}

/// A node, and a pod that is masqueraded, ask a server from a port whose number is that of a UDP NodePort.
fn answers(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).masquerade_pods())
            .node(NodeSpec::new("node-b", 2, &[]))
            .client("client")
    })?;
    let dns = Service::new("dns", 10).udp(53, TARGET).node_port(NODE_PORT).pods(&[lab.pod("a2")?]);
    let cluster = Cluster::start(lab, &["node-a"], &[], [&dns])?;
    let _servers = cluster.servers(&["a2"])?;
    let lab = &cluster.lab;
    let (node, pod) = (lab.node("node-a")?, lab.pod("a1")?);
    let outside = lab.host("client")?.echo(SERVER)?;
    let client = Client::at(lab.host("client")?)?;
    let other = Client::at(lab.node("node-b")?)?;
    let mut steps = Steps::new();
    for family in Family::BOTH {
        let server = outside.address(family);
        steps.step(&format!("the node asks, {family:?}"), || {
            let answer = ask_from_port(node, NODE_PORT, server)?;
            ensure!(answer.client == SocketAddr::new(node.ip(family), NODE_PORT), "seen as {answer:?}");
            Ok(())
        });
        steps.step(&format!("a masqueraded pod asks, {family:?}"), || {
            // By the same port of another server: conntrack keeps the first one's.
            let server = lab.node("node-b")?.echo(SERVER)?;
            let answer = ask_from_port(pod, NODE_PORT, server.address(family))?;
            ensure!(answer.client == SocketAddr::new(node.ip(family), NODE_PORT), "seen as {answer:?}");
            Ok(())
        });
        steps.step(&format!("strangers are served, {family:?}"), || {
            let to = SocketAddr::new(node.ip(family), NODE_PORT);
            for stranger in [&client, &other] {
                stranger.reaches(Transport::UdpConnected, to, &["a2"])?;
                stranger.reaches(Transport::UdpUnconnected, to, &["a2"])?;
            }
            Ok(())
        });
    }
    steps.done()
}

/// An open connection to the echo server, and the port that it sees.
fn connect(worker: &Worker, to: SocketAddr, from: Option<SocketAddr>) -> Result<(u64, u16)> {
    let socket = worker.tcp_connect_with(to, from, Duration::from_millis(900))?;
    Ok((socket.id, worker.tcp_ask(socket.id, "hello")?.client.port()))
}

/// Clients outside are masqueraded towards a backend that the node, and a pod that the CNI masquerades, are connected to
/// directly: from the same ports.
fn shared(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1"]).masquerade_pods())
            .node(NodeSpec::new("node-b", 2, &[]))
            .client("client")
    })?;
    let backend = Endpoint::on(lab.node("node-b")?);
    let web = Service::new("web", 10).tcp(80, TARGET).node_port(30_080).endpoints([backend]);
    let cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    let lab = &cluster.lab;
    let server = lab.node("node-b")?.echo(TARGET)?;
    let (node, pod) = (lab.node("node-a")?, lab.pod("a1")?);
    let (outside, on_node, in_pod) = (lab.host("client")?.worker()?, node.worker()?, pod.worker()?);
    let mut steps = Steps::new();
    for family in Family::BOTH {
        let (frontend, backend) = (SocketAddr::new(node.ip(family), 30_080), server.address(family));
        let mut open = Vec::new();
        for (what, member, worker) in
            [("the node", &**node, &on_node), ("a masqueraded pod", &**pod, &in_pod)]
        {
            steps.step(&format!("{what} comes second, {family:?}"), || {
                for _ in 0..10 {
                    let (id, port) = connect(&outside, frontend, None)?;
                    open.push((&outside, id));
                    let from = SocketAddr::new(member.ip(family), port);
                    let (id, other) = connect(worker, backend, Some(from))
                        .with_context(|| format!("from {from}, which a client is masqueraded with"))?;
                    open.push((worker, id));
                    ensure!(other != port, "both are seen at port {port}");
                }
                Ok(())
            });
        }
        steps.step(&format!("clients come second, {family:?}"), || {
            let mut ports = BTreeSet::new();
            for port in 61_000..61_200_u16 {
                // Two of three ports; every other by a pod.
                let (member, worker) = match port % 3 {
                    0 => (&**node, &on_node),
                    1 => (&**pod, &in_pod),
                    _ => continue,
                };
                // One that is in use already.
                let from = SocketAddr::new(member.ip(family), port);
                let Ok((id, port)) = connect(worker, backend, Some(from)) else { continue };
                ensure!(ports.insert(port), "{port} is seen twice");
                open.push((worker, id));
            }
            ensure!(ports.len() > 100, "only {} connections", ports.len());
            for _ in 0..600 {
                let (id, port) = connect(&outside, frontend, None)?;
                ensure!(ports.insert(port), "{port} is seen twice");
                open.push((&outside, id));
            }
            Ok(())
        });
        steps.step(&format!("all of them are open still, {family:?}"), || {
            for (worker, id) in &open {
                worker.tcp_ask(*id, "still there")?;
            }
            for (worker, id) in &open {
                worker.close(*id)?;
            }
            Ok(())
        });
    }
    steps.done()
}
