//! UDP clients of a backend that is gone: they move, and nobody else.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use kproxy_lab::worker::Id;
use kproxy_lab::{Answer, Context, Family, Member, NodeSpec, Worker, WorkerError};
use nix::errno::Errno;

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, eventually, family_of};
use crate::flows::flows;
use crate::objects::{Endpoint, Service};

pub const SCENARIOS: &[Scenario] =
    &[("kproxy::udp_clients_move", moves), ("kproxy::udp_answers_count_while_the_flow_lives", answers)];

const NODE_PORT: u16 = 30_053;
const ANSWER: Duration = Duration::from_secs(2);

/// A connected socket.
struct Connected {
    worker: Worker,
    id: Id,
    what: String,
}

impl Connected {
    /// Connected from a member, by an IPv6 socket if the address is mapped.
    fn to(member: &Member, to: SocketAddr) -> Result<Self> {
        let worker = member.worker()?;
        let id = worker.udp_socket(family_of(to))?.id;
        worker.udp_connect(id, to)?;
        Ok(Self { worker, id, what: format!("{} to {to}", member.name()) })
    }

    /// Connects sockets until one of them leads to this server.
    fn to_server(member: &Member, to: SocketAddr, server: &str) -> Result<Self> {
        for _ in 0..40 {
            let socket = Self::to(member, to)?;
            if socket.ask()?.server == server {
                return Ok(socket);
            }
        }
        bail!("{} to {to}: {server} never answered", member.name())
    }

    fn ask(&self) -> Result<Answer, WorkerError> {
        self.worker.udp_send(self.id, "hello")?;
        let data = self.worker.udp_receive(self.id, ANSWER)?.data;
        serde_json::from_str(&data).map_err(|error| WorkerError::Broken(error.into()))
    }

    /// Still answered by this server.
    fn must_reach(&self, server: &str) -> Result<()> {
        let answer = self.ask().with_context(|| self.what.clone())?;
        ensure!(answer.server == server, "{}: {answer:?}", self.what);
        Ok(())
    }

    /// The socket is destroyed: its process is told ECONNABORTED, and can connect it again.
    fn must_be_aborted(&self, to: SocketAddr, server: &str) -> Result<()> {
        eventually("the socket to be destroyed", || {
            match self.worker.udp_receive(self.id, Duration::from_millis(100)) {
                Err(error) if error.errno() == Some(Errno::ECONNABORTED) => Ok(Some(())),
                Err(error) if error.errno() == Some(Errno::EAGAIN) => Ok(None),
                other => bail!("{other:?}"),
            }
        })
        .with_context(|| self.what.clone())?;
        self.worker.udp_connect(self.id, to)?;
        self.must_reach(server)
    }
}

/// IPv6's form of an IPv4 address.
fn mapped(to: SocketAddr) -> SocketAddr {
    match to.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), to.port()),
        IpAddr::V6(_) => to,
    }
}

fn moves(ctx: &Context) -> Result<()> {
    let lab =
        ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2", "a3", "a4"])).client("client"))?;
    let service = Service::new("dns", 10).tcp(53, TARGET).udp(53, TARGET).node_port(NODE_PORT);
    let both = service.clone().pods(&[lab.pod("a2")?, lab.pod("a3")?]);
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&both])?;
    let _servers = cluster.servers(&["a2", "a3"])?;
    let mut steps = Steps::new();
    for family in Family::BOTH {
        steps.step(&format!("sockets, {family:?}"), || sockets(&mut cluster, &service, family));
        cluster.put(&both)?;
    }
    steps.step("sockets, IPv4 by an IPv6 socket", || {
        let to = SocketAddr::new(service.cluster_ip(Family::V4), 53);
        let client = cluster.lab.pod("a1")?.clone();
        let socket = Connected::to_server(&client, mapped(to), "a3")?;
        cluster.put(&service.clone().pods(&[cluster.lab.pod("a2")?]))?;
        socket.must_be_aborted(mapped(to), "a2")
    });
    cluster.put(&both)?;
    for family in Family::BOTH {
        steps.step(&format!("packets, {family:?}"), || packets(&mut cluster, &service, family));
        cluster.put(&both)?;
    }
    steps.step("what changed without an agent", || {
        let to = SocketAddr::new(service.cluster_ip(Family::V4), 53);
        let socket = Connected::to_server(cluster.lab.pod("a1")?, to, "a3")?;
        cluster.forget_agent("node-a");
        cluster.write(&service.clone().pods(&[cluster.lab.pod("a2")?]))?;
        cluster.start_agents(&["node-a"], &[])?;
        socket.must_be_aborted(to, "a2")
    });
    steps.done()
}

fn sockets(cluster: &mut Cluster, service: &Service, family: Family) -> Result<()> {
    let lab = &cluster.lab;
    let (pod, node) = (lab.pod("a1")?.clone(), cluster.node("node-a")?.clone());
    let (stays, goes) = (lab.pod("a2")?.clone(), lab.pod("a3")?.clone());
    let to = SocketAddr::new(service.cluster_ip(family), 53);
    let in_pod = Connected::to_server(&pod, to, "a3")?;
    // Each pod has a network namespace of its own.
    let other_pod = lab.pod("a4")?.clone();
    let in_other_pod = Connected::to_server(&other_pod, to, "a3")?;
    let on_host = Connected::to_server(&node, to, "a3")?;
    // Not by way of the Service: left alone, whatever it once was.
    let direct = Connected::to(&pod, SocketAddr::new(goes.ip(family), TARGET))?;
    direct.must_reach("a3")?;
    let once = Connected::to_server(&pod, to, "a3")?;
    once.worker.udp_connect(once.id, SocketAddr::new(goes.ip(family), TARGET))?;
    once.must_reach("a3")?;
    let unconnected = pod.worker()?;
    let sender = unconnected.udp_socket(family)?.id;

    // Without another backend there is nowhere to move to; one that is terminating still serves.
    cluster.put(service)?;
    cluster.put(&service.clone().endpoints([Endpoint::of(&goes).terminating()]))?;
    in_pod.must_reach("a3")?;
    cluster.put(&service.clone().endpoints([Endpoint::of(&goes).terminating(), Endpoint::of(&stays)]))?;
    in_pod.must_reach("a3")?;
    let other = Connected::to_server(&pod, to, "a2")?;
    let other_there = Connected::to_server(&other_pod, to, "a2")?;

    cluster.put(&service.clone().pods(&[&stays]))?;
    in_pod.must_be_aborted(to, "a2")?;
    in_other_pod.must_be_aborted(to, "a2")?;
    other_there.must_reach("a2")?;
    on_host.must_be_aborted(to, "a2")?;
    other.must_reach("a2")?;
    direct.must_reach("a3")?;
    once.must_reach("a3")?;
    unconnected.udp_send_to(sender, to, "hello")?;
    let answer = unconnected.udp_receive(sender, ANSWER)?;
    ensure!(answer.from == to && answer.data.contains("\"a2\""), "{answer:?}");
    Ok(())
}

fn packets(cluster: &mut Cluster, service: &Service, family: Family) -> Result<()> {
    let (stays, goes) = (cluster.lab.pod("a2")?.clone(), cluster.lab.pod("a3")?.clone());
    let node = cluster.node("node-a")?.clone();
    let to = SocketAddr::new(node.ip(family), NODE_PORT);
    let outside = cluster.lab.host("client")?.clone();
    let flow = Connected::to_server(&outside, to, "a3")?;
    let other = Connected::to_server(&outside, to, "a2")?;
    // TCP is never cut.
    let tcp = outside.worker()?;
    let mut open = None;
    for _ in 0..40 {
        let socket = tcp.tcp_connect(to)?;
        if tcp.tcp_ask(socket.id, "hello")?.server == "a3" {
            open = Some(socket.id);
            break;
        }
        tcp.close(socket.id)?;
    }
    let open = open.context("a3 never answered by TCP")?;

    // Nowhere to move to: the flow stays.
    cluster.put(service)?;
    flow.must_reach("a3")?;
    let backend = SocketAddr::new(goes.ip(family), TARGET).to_string();
    let count = || {
        Ok::<_, anyhow::Error>(
            flows(&node, &["--backend", &backend])?.iter().filter(|row| row["protocol"] == "UDP").count(),
        )
    };
    ensure!(count()? > 0, "no flow to a3");
    cluster.put(&service.clone().pods(&[&stays]))?;
    eventually("the flows to a3 to be gone", || Ok((count()? == 0).then_some(())))?;
    flow.must_reach("a2")?;
    other.must_reach("a2")?;
    ensure!(tcp.tcp_ask(open, "still there")?.server == "a3", "another server answers");
    let client = Client::at(&outside)?;
    client.reaches(Transport::UdpUnconnected, to, &["a2"])
}

/// What a backend sends to a socket that is not connected comes from the Service as long as the flow lives, and from the
/// backend itself when it has idled for longer. A connected socket is answered by the Service for ever.
fn answers(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])))?;
    let service = Service::new("dns", 10).udp(53, TARGET).pods(&[lab.pod("a2")?]);
    let cluster = Cluster::start(lab, &["node-a"], &[], [&service])?;
    idle_out_after(&cluster, 1_000_000_000)?;
    let (client, backend) = (cluster.lab.pod("a1")?.worker()?, cluster.lab.pod("a2")?);
    let mut steps = Steps::new();
    for family in Family::BOTH {
        let to = SocketAddr::new(service.cluster_ip(family), 53);
        let at = SocketAddr::new(backend.ip(family), TARGET);
        let server = backend.worker()?;
        let answering = server.udp_socket_at(at)?.id;
        for is_connected in [false, true] {
            steps.step(&format!("{family:?}, connected: {is_connected}"), || {
                let socket = client.udp_socket(family)?.id;
                if is_connected {
                    client.udp_connect(socket, to)?;
                    client.udp_send(socket, "ask")?;
                } else {
                    client.udp_send_to(socket, to, "ask")?;
                }
                let asker = server.udp_receive(answering, ANSWER)?.from;
                // Each answer keeps the flow alive.
                for _ in 0..3 {
                    std::thread::sleep(Duration::from_millis(600));
                    server.udp_send_to(answering, asker, "answer")?;
                    let from = client.udp_receive(socket, ANSWER)?.from;
                    ensure!(from == to, "answered by {from}, asked was {to}");
                }
                std::thread::sleep(Duration::from_millis(1_500));
                server.udp_send_to(answering, asker, "late")?;
                let from = client.udp_receive(socket, ANSWER)?.from;
                let expected = if is_connected { to } else { at };
                ensure!(from == expected, "after the flow was over, {from} sent, not {expected}");
                Ok(client.close(socket)?)
            });
        }
    }
    steps.done()
}

/// Makes UDP flows of sockets idle out after so many nanoseconds, as the programs read it; two minutes are long.
fn idle_out_after(cluster: &Cluster, nanoseconds: u64) -> Result<()> {
    let node = cluster.node("node-a")?;
    let pin = node.bpf_root().join("config");
    let key = ["key", "hex", "00", "00", "00", "00"];
    let lookup = node.command("bpftool")?.args(["-j", "map", "lookup", "pinned"]).arg(&pin).args(key);
    let element: serde_json::Value = serde_json::from_str(&lookup.run()?.success()?)?;
    let octets = element["value"].as_array().context("bpftool printed no octets")?;
    let mut octets: Vec<String> = octets
        .iter()
        .map(|octet| octet.as_str().unwrap_or_default().trim_start_matches("0x").to_owned())
        .collect();
    // `Config::udp_timeout`, the second word.
    for (octet, byte) in octets[8..16].iter_mut().zip(nanoseconds.to_ne_bytes()) {
        *octet = format!("{byte:02x}");
    }
    let update = node.command("bpftool")?.args(["map", "update", "pinned"]).arg(&pin).args(key);
    update.args(["value", "hex"]).args(octets).run()?.success()?;
    Ok(())
}
