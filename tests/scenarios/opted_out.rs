//! Pods whose sockets are left alone: their packets are served the same, and what they connect to is what they see.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{
    Check, Cni, Context, EchoServer, ElbSpec, Family, Frontend, Lab, LogLine, Member, Node, NodeSpec, Pod,
    kproxy_binary,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Client, Cluster, DEADLINE, Steps, TARGET, Transport, ask_from, eventually, family_of};
use crate::dumps::dump;
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::socket_hooks_of_the_host_alone_routed", |ctx| flag(ctx, Cni::RoutedVeth)),
    ("kproxy::socket_hooks_of_the_host_alone_bridge", |ctx| flag(ctx, Cni::Bridge)),
    ("kproxy::a_pod_is_opted_out_routed", |ctx| annotation(ctx, Cni::RoutedVeth)),
    ("kproxy::a_pod_is_opted_out_bridge", |ctx| annotation(ctx, Cni::Bridge)),
    ("kproxy::a_pod_that_cannot_be_opted_out_is_named", named),
];

const NODE_PORT: u16 = 30_080;
const SECOND: Duration = Duration::from_secs(1);
const HOST_ONLY: &[&str] = &["--socket-hooks", "host"];

/// The Services of these scenarios.
struct Services {
    /// One endpoint on the client's node.
    near: Service,
    /// One endpoint on another node.
    far: Service,
    /// The client is its endpoint.
    own: Service,
    /// No endpoint.
    empty: Service,
    /// One endpoint on the client's node, load-balancer addresses in pass-through.
    passed: Service,
}

impl Services {
    fn new(lab: &Lab) -> Result<Self> {
        let service = |name, number| Service::new(name, number).tcp(80, TARGET).udp(80, TARGET);
        let (a1, a2, b1) = (lab.pod("a1")?, lab.pod("a2")?, lab.pod("b1")?);
        Ok(Self {
            near: service("near", 10).pods(&[a2]),
            far: service("far", 11).pods(&[b1]),
            own: service("own", 12).pods(&[a1]),
            empty: service("empty", 13),
            passed: service("passed", 14)
                .node_port(NODE_PORT)
                .load_balancers(lab.elb()?.vips())
                .local()
                .annotation("kproxy.io/pass-through", "true")
                .pods(&[a2]),
        })
    }

    fn all(&self) -> [&Service; 5] {
        let Self { near, far, own, empty, passed } = self;
        [near, far, own, empty, passed]
    }
}

fn lab(ctx: &Context, cni: Cni) -> Result<Lab> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2", "a3"]).cni(cni))
            .node(NodeSpec::new("node-b", 2, &["b1"]).cni(cni))
            .elb(ElbSpec::new())
    })?;
    // As Kubernetes wants it where pods share a bridge.
    for name in ["iptables", "ip6tables"] {
        lab.node("node-a")?.netns().set_sysctl(&format!("net/bridge/bridge-nf-call-{name}"), "1")?;
    }
    let node = SocketAddr::new(lab.node("node-a")?.v4().into(), NODE_PORT);
    let frontend = Frontend::new("passed").bind_all(lab.elb()?.vips(), 80).server("node-a", node);
    lab.elb()?.configure(&[frontend.check(Check::None)])?;
    Ok(lab)
}

fn servers(cluster: &Cluster) -> Result<Vec<EchoServer>> {
    cluster.servers(&["a1", "a2", "b1"])
}

fn flag(ctx: &Context, cni: Cni) -> Result<()> {
    let lab = lab(ctx, cni)?;
    let services = Services::new(&lab)?;
    let mut cluster = Cluster::start(lab, &["node-a"], &[], services.all())?;
    let _servers = servers(&cluster)?;
    let pod = cluster.lab.pod("a1")?.clone();
    let node = cluster.node("node-a")?.clone();
    let mut steps = Steps::new();

    let open = Family::BOTH
        .into_iter()
        .map(|family| Open::new(&pod, SocketAddr::new(services.far.cluster_ip(family), 80)))
        .collect::<Result<Vec<_>>>()?;
    steps.step("all: a pod's socket is connected to the backend", || {
        open.iter().try_for_each(|open| open.goes_on("b1"))?;
        connected_to(&pod, &services.near, Seen::Backend(TARGET))
    });
    steps.step("host: what was connected goes on", || {
        cluster.start_agents(&["node-a"], HOST_ONLY)?;
        open.iter().try_for_each(|open| open.goes_on("b1"))
    });
    steps.step("host: a process of the node is connected to the backend", || {
        connected_to(&node, &services.near, Seen::Backend(TARGET))
    });
    is_served_by_packets(&mut steps, &cluster, &services, &pod)?;
    steps.step("explain says which way", || {
        let from = |member: &Member| explained(&node, member.v4(), &services.near);
        ensure!(from(&pod)?["way"] == "packet", "{:#}", from(&pod)?);
        ensure!(from(&node)?["way"] == "socket", "{:#}", from(&node)?);
        Ok(())
    });
    steps.step("all again: a pod's socket is connected to the backend", || {
        cluster.start_agents(&["node-a"], &[])?;
        open.iter().try_for_each(|open| open.goes_on("b1"))?;
        connected_to(&pod, &services.near, Seen::Backend(TARGET))?;
        ensure!(explained(&node, pod.v4(), &services.near)?["way"] == "socket");
        Ok(())
    });
    steps.nothing_strayed(&cluster.lab);
    steps.done()
}

fn annotation(ctx: &Context, cni: Cni) -> Result<()> {
    let lab = lab(ctx, cni)?;
    let services = Services::new(&lab)?;
    let mut cluster = Cluster::start(lab, &["node-a"], &[], services.all())?;
    let _servers = servers(&cluster)?;
    let (pod, beside) = (cluster.lab.pod("a1")?.clone(), cluster.lab.pod("a3")?.clone());
    let node = cluster.node("node-a")?.clone();
    let near = &services.near;
    let mut steps = Steps::new();
    cluster.folder.write("a1.yaml", &pod_object(&pod, None))?;
    cluster.folder.write("a3.yaml", &pod_object(&beside, None))?;

    let open = Family::BOTH
        .into_iter()
        .map(|family| Open::new(&pod, SocketAddr::new(services.far.cluster_ip(family), 80)))
        .collect::<Result<Vec<_>>>()?;
    steps.step("without the annotation", || {
        open.iter().try_for_each(|open| open.goes_on("b1"))?;
        connected_to(&pod, near, Seen::Backend(TARGET))
    });
    steps.step("what cannot be is said", || {
        let (strange, host) = (with_name("strange", &pod, "off"), with_name("host", &pod, "false"));
        let host = host.replace("nodeName: node-a", "nodeName: node-a, hostNetwork: true");
        cluster.folder.write("odd.yaml", &format!("{strange}---\n{host}"))?;
        for (name, what) in [("default/strange", "off"), ("default/host", "host's network")] {
            cluster.agent("node-a")?.wait_log("it naming the Pod", DEADLINE, |line| {
                line.level == "WARN" && line.mentions(name) && line.mentions(what)
            })?;
        }
        connected_to(&pod, near, Seen::Backend(TARGET))
    });
    // Looked for in vain from now on.
    cluster.folder.write("ghost.yaml", &with_name("ghost", &pod, "false").replace("244", "245"))?;
    steps.step("the annotation comes", || {
        cluster.folder.write("a1.yaml", &pod_object(&pod, Some("false")))?;
        becomes(&pod, near, Seen::Service)?;
        open.iter().try_for_each(|open| open.goes_on("b1"))
    });
    steps.step("everyone else keeps the socket hooks", || {
        connected_to(&beside, near, Seen::Backend(TARGET))?;
        connected_to(&node, near, Seen::Backend(TARGET))
    });
    is_served_by_packets(&mut steps, &cluster, &services, &pod)?;
    steps.step("explain says which way", || {
        for (member, way) in [(&*pod, "packet"), (&beside, "socket"), (&node, "socket")] {
            let answer = explained(&node, member.v4(), near)?;
            ensure!(answer["way"] == way, "{}: {answer:#}", member.name());
        }
        Ok(())
    });
    steps.step("it stays so over a restart", || {
        let before = elements(&node)?;
        ensure!(before.as_array().is_some_and(|all| all.len() == 1), "{before:#}");
        cluster.agent("node-a")?.kill(Signal::SIGKILL)?;
        connected_to(&pod, near, Seen::Service)?;
        cluster.agent("node-a")?.restart()?;
        cluster.agent("node-a")?.wait_synced()?;
        connected_to(&pod, near, Seen::Service)?;
        ensure!(elements(&node)? == before, "written anew: {:#}", elements(&node)?);
        Ok(())
    });
    steps.step("the annotation goes", || {
        cluster.folder.write("a1.yaml", &pod_object(&pod, None))?;
        becomes(&pod, near, Seen::Backend(TARGET))?;
        is_empty(&node)?;
        open.iter().try_for_each(|open| open.goes_on("b1"))
    });
    steps.step("new maps have it from the beginning", || {
        cluster.folder.write("a1.yaml", &pod_object(&pod, Some("false")))?;
        becomes(&pod, near, Seen::Service)?;
        cluster.agent("node-a")?.kill(Signal::SIGKILL)?;
        let owner = node.bpf_root().join("owner");
        let update = node.command("bpftool")?.args(["map", "update", "pinned"]).arg(owner);
        // Of a layout that the next agent does not know.
        let value = ["99"].into_iter().chain(std::iter::repeat_n("0", 95));
        update.args(["key", "0", "0", "0", "0", "value"]).args(value).run()?.success()?;
        cluster.agent("node-a")?.restart()?;
        cluster.agent("node-a")?.wait_synced()?;
        connected_to(&pod, near, Seen::Service)?;
        connected_to(&beside, near, Seen::Backend(TARGET))
    });
    steps.step("the Pod goes while there is no agent", || {
        cluster.agent("node-a")?.kill(Signal::SIGKILL)?;
        cluster.folder.remove("a1.yaml")?;
        cluster.agent("node-a")?.restart()?;
        is_empty(&node)?;
        becomes(&pod, near, Seen::Backend(TARGET))
    });
    steps.step("a Pod without a network namespace here is named", || {
        cluster.agent("node-a")?.wait_log("it naming the Pod", DEADLINE * 2, |line| {
            line.level == "WARN" && line.mentions("default/ghost") && line.mentions("no process")
        })?;
        Ok(())
    });
    steps.nothing_strayed(&cluster.lab);
    steps.done()
}

/// By an agent that lacks what it takes; everything else is served.
fn named(ctx: &Context) -> Result<()> {
    let lab = lab(ctx, Cni::RoutedVeth)?;
    let services = Services::new(&lab)?;
    let mut cluster = Cluster::start(lab, &["node-a"], &[], services.all())?;
    let _servers = servers(&cluster)?;
    let node = cluster.node("node-a")?.clone();
    let pod = cluster.lab.pod("a1")?.clone();
    let _process = pod.worker()?;
    cluster.folder.write("a1.yaml", &pod_object(&pod, Some("false")))?;
    becomes(&pod, &services.near, Seen::Service)?;
    cluster.forget_agent("node-a");

    let names_it = |what: &'static str| {
        move |line: &LogLine| line.level == "WARN" && line.mentions("default/a1") && line.mentions(what)
    };
    let mut steps = Steps::new();
    steps.step("on a kernel that does not tell namespaces apart", || {
        let agent = node.agent().manifests(&cluster.folder).env("KPROXY_TEST_WITHOUT", "netns-cookie");
        let mut agent = agent.start()?;
        agent.wait_synced()?;
        agent.wait_log("it naming the Pod", DEADLINE, names_it("before 5.14"))?;
        Ok(())
    });
    steps.step("that does not see the node's processes", || {
        let alone = cluster.lab.folder().join("kproxy-alone");
        let binary = kproxy_binary()?;
        // Ends with unshare, which the lab ends.
        let script = format!(
            "#!/bin/sh\nexec unshare --pid --fork --kill-child --mount-proc {} \"$@\"\n",
            binary.display()
        );
        fs::write(&alone, script)?;
        fs::set_permissions(&alone, fs::Permissions::from_mode(0o755))?;
        let mut agent = node.agent().manifests(&cluster.folder).binary(&alone).start()?;
        agent.wait_synced()?;
        // What the agent before took out cannot be found again.
        agent.wait_log("it naming the Pod", DEADLINE * 2, names_it("hostPID"))?;
        connected_to(&pod, &services.near, Seen::Backend(TARGET))?;
        connected_to(&node, &services.near, Seen::Backend(TARGET))
    });
    steps.done()
}

/// The Pod of a pod of the lab, as its kubelet reports it. `socket_hooks`: its annotation.
pub fn pod_object(pod: &Pod, socket_hooks: Option<&str>) -> String {
    let annotations =
        socket_hooks.map(|value| format!(", annotations: {{kproxy.io/socket-hooks: \"{value}\"}}"));
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {}{}}}\nspec: {{nodeName: {}, containers: []}}\n\
         status: {{phase: Running, podIPs: [{{ip: {}}}, {{ip: \"{}\"}}]}}\n",
        pod.name(),
        annotations.unwrap_or_default(),
        pod.node_name(),
        pod.v4(),
        pod.v6()
    )
}

/// Another Pod with the same addresses.
fn with_name(name: &str, pod: &Pod, socket_hooks: &str) -> String {
    pod_object(pod, Some(socket_hooks)).replace(&format!("name: {},", pod.name()), &format!("name: {name},"))
}

/// Waits until sockets of the member are connected to what they are to be.
pub fn becomes(member: &Member, service: &Service, seen: Seen) -> Result<()> {
    let mut last = None;
    let what = format!("{} being connected to {seen:?}", member.name());
    let became = eventually(&what, || match connected_to(member, service, seen) {
        Ok(()) => Ok(Some(())),
        Err(error) => {
            last = Some(error);
            Ok(None)
        }
    });
    became.with_context(|| last.map(|error| format!("{error:#}")).unwrap_or_default())
}

/// The map `opted_out`.
fn elements(node: &Node) -> Result<Value> {
    Ok(serde_json::from_str(&dump(node, "opted_out")?)?)
}

/// Waits until nobody is opted out any more.
fn is_empty(node: &Node) -> Result<()> {
    eventually("an empty map", || {
        let all = elements(node)?;
        Ok(all.as_array().is_some_and(Vec::is_empty).then_some(()))
    })
}

/// All that a pod may ask for, whose sockets are left alone; and it sees what it asked for.
fn is_served_by_packets(steps: &mut Steps, cluster: &Cluster, services: &Services, pod: &Pod) -> Result<()> {
    let Services { near, far, own, empty, passed } = services;
    let name = pod.name();
    let client = Client::at(pod)?;
    let elb = cluster.lab.elb()?;
    for service in [near, far] {
        steps.step(&format!("{name} is connected to {}", service.name()), || {
            connected_to(pod, service, Seen::Service)
        });
    }
    for family in Family::BOTH {
        let at = |service: &Service| SocketAddr::new(service.cluster_ip(family), 80);
        let node_port = SocketAddr::new(cluster.node("node-a")?.ip(family), NODE_PORT);
        for transport in Transport::ALL {
            for (to, server) in [(at(near), "a2"), (at(far), "b1"), (node_port, "a2")] {
                steps.step(&format!("{name} reaches {to}, {transport:?}"), || {
                    client.reaches(transport, to, &[server])
                });
            }
            steps.step(&format!("{name} reaches itself, {family:?}, {transport:?}"), || {
                // It is seen as the node, since it would answer itself past the host.
                let (answer, _) = ask_from(&client.worker, transport, at(own))?;
                ensure!(answer.server == name, "answered by {answer:?}");
                ensure!(!client.addresses.contains(&answer.client.ip().to_canonical()), "{answer:?}");
                Ok(())
            });
        }
        for transport in Transport::REFUSABLE {
            steps.step(&format!("{name} is refused, {family:?}, {transport:?}"), || {
                client.is_refused_by_packet(transport, at(empty))
            });
        }
    }
    steps.step(&format!("pass-through of {name} is left alone"), || {
        for vip in elb.vips() {
            let (to, before) = (SocketAddr::new(*vip, 80), elb.connections("passed")?);
            let counted = passed_through(cluster, passed)?;
            let answer = client.worker.ask_tcp(to)?;
            ensure!(answer.server == "a2", "{answer:?}");
            ensure!(elb.connections("passed")? == before + 1, "{to}: the load balancer did not see it");
            // Once, by whichever hook.
            ensure!(passed_through(cluster, passed)? == counted + 1, "{to}: not counted once");
        }
        Ok(())
    });
    Ok(())
}

/// How many connections to a Service have been left to the load balancer.
fn passed_through(cluster: &Cluster, service: &Service) -> Result<u64> {
    let view = cluster.service("node-a", service.name())?;
    view["passThroughConnections"].as_u64().with_context(|| format!("{view:#}"))
}

/// What a socket is connected to in truth, whatever getpeername says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// The address that was asked.
    Service,
    /// A backend, at this port.
    Backend(u16),
}

/// Connects to the ClusterIPs of a Service, and looks what the kernel thinks of the sockets.
fn connected_to(member: &Member, service: &Service, seen: Seen) -> Result<()> {
    let worker = member.worker()?;
    for family in Family::BOTH {
        let to = SocketAddr::new(service.cluster_ip(family), 80);
        let tcp = worker.tcp_connect(to)?;
        worker.tcp_ask(tcp.id, "hello")?;
        let udp = worker.udp_socket(family)?;
        let udp = worker.udp_connect(udp.id, to)?;
        worker.udp_send(udp.id, "hello")?;
        worker.udp_receive(udp.id, SECOND)?;
        for (protocol, socket) in [("tcp", tcp), ("udp", udp)] {
            let peer = true_peer(member, protocol, socket.local)?;
            let is = if peer == to { Seen::Service } else { Seen::Backend(peer.port()) };
            ensure!(is == seen, "{} to {to}: its {protocol} socket is connected to {peer}", member.name());
            ensure!(worker.getpeername(socket.id)? == to, "getpeername shows another than {to}");
        }
    }
    Ok(())
}

/// The state of a connected socket in the kernel's tables, UDP's too.
const ESTABLISHED: &str = "01";

/// The other end of a socket with this address of its own, as the tables of its namespace have it.
fn true_peer(member: &Member, protocol: &str, local: SocketAddr) -> Result<SocketAddr> {
    let version = if local.is_ipv4() { "" } else { "6" };
    let path = format!("/proc/thread-self/net/{protocol}{version}");
    let table = member.netns().within(|| fs::read_to_string(&path).with_context(|| path.clone()))?;
    for line in table.lines().skip(1) {
        let mut columns = line.split_whitespace().skip(1);
        let (Some(own), Some(peer), Some(state)) = (columns.next(), columns.next(), columns.next()) else {
            continue;
        };
        let (own, peer) = (address(own)?, address(peer)?);
        // Others that have closed may have had the same port.
        if own.port() == local.port() && state == ESTABLISHED {
            return Ok(peer);
        }
    }
    anyhow::bail!("no connected socket at {local} in {path}:\n{table}")
}

/// `0B00F40A:1F90`: words of the machine's byte order, and a port.
fn address(text: &str) -> Result<SocketAddr> {
    let (ip, port) = text.split_once(':').with_context(|| format!("{text} is no address"))?;
    let words = ip.as_bytes().chunks(8).map(|word| {
        let word = u32::from_str_radix(std::str::from_utf8(word)?, 16)?;
        Ok(word.to_ne_bytes())
    });
    let octets: Vec<u8> = words.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    let ip = match <[u8; 4]>::try_from(&octets[..]) {
        Ok(octets) => IpAddr::from(Ipv4Addr::from(octets)),
        Err(_) => {
            let octets =
                <[u8; 16]>::try_from(&octets[..]).with_context(|| format!("{text} is no address"))?;
            IpAddr::from(Ipv6Addr::from(octets))
        }
    };
    Ok(SocketAddr::new(ip, u16::from_str_radix(port, 16)?))
}

/// What `kproxy explain` says about the ClusterIP of a Service.
fn explained(node: &Node, from: Ipv4Addr, service: &Service) -> Result<Value> {
    let to = format!("{}:80", service.cluster_ip(Family::V4));
    let arguments = ["explain", "--from", &from.to_string(), "--to", &to, "-o", "json"];
    Ok(serde_json::from_str(&node.kproxy(&arguments)?.success()?)?)
}

/// Sockets that spoke to a Service.
struct Open {
    worker: kproxy_lab::Worker,
    to: SocketAddr,
    tcp: u64,
    connected: u64,
    unconnected: u64,
}

impl Open {
    fn new(member: &Member, to: SocketAddr) -> Result<Self> {
        let worker = member.worker()?;
        let tcp = worker.tcp_connect(to)?.id;
        let connected = worker.udp_socket(family_of(to))?.id;
        worker.udp_connect(connected, to)?;
        let unconnected = worker.udp_socket(family_of(to))?.id;
        Ok(Self { worker, to, tcp, connected, unconnected })
    }

    /// All of them are answered, by this server, and see the address that they asked.
    fn goes_on(&self, server: &str) -> Result<()> {
        let Self { worker, to, tcp, connected, unconnected } = self;
        let answer = worker.tcp_ask(*tcp, "still there")?;
        ensure!(answer.server == server, "{to}: {answer:?}");
        ensure!(worker.getpeername(*tcp)? == *to, "getpeername shows {}", worker.getpeername(*tcp)?);
        worker.udp_send(*connected, "still there")?;
        worker.udp_send_to(*unconnected, *to, "still there")?;
        for socket in [connected, unconnected] {
            let datagram = worker.udp_receive(*socket, SECOND).with_context(|| format!("from {to}"))?;
            ensure!(datagram.from == *to, "{} answered for {to}", datagram.from);
            ensure!(datagram.data.contains(server), "{to}: {}", datagram.data);
        }
        Ok(())
    }
}
