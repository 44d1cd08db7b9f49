//! What the kproxy scenarios share: a lab with an agent on some of its nodes that follow one folder,
//! and the questions that clients ask.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use kproxy_lab::{
    Agent, Answer, EchoServer, ElbSpec, Family, Lab, LabBuilder, Manifests, Member, Node, NodeSpec, Worker,
    WorkerError, WorkerResult, wait_for,
};
use nix::errno::Errno;
use serde_json::Value;

use crate::objects::Service;

/// The port that every backend serves at, and that Services lead to.
pub const TARGET: u16 = 8080;

/// How long a call may take that must get no answer.
pub const SILENCE: Duration = Duration::from_millis(150);

/// How long something that must come may take.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// What a refusal may take that comes from this node: less than the first retransmission.
const AT_ONCE: Duration = Duration::from_millis(500);

/// Steps that take longer than this say so.
const SLOW: Duration = Duration::from_secs(1);

/// Two nodes, with pods a1, a2 and b1, a load balancer's machine and a client outside.
pub fn usual(lab: LabBuilder) -> LabBuilder {
    lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
        .node(NodeSpec::new("node-b", 2, &["b1"]))
        .elb(ElbSpec::new())
        .client("client")
}

/// The Service `web` at the load balancer's addresses, by TCP, under policy Local; without endpoints.
pub fn web(lab: &Lab, node_port: u16) -> Result<Service> {
    let web = Service::new("web", 10).tcp(80, TARGET).node_port(node_port);
    Ok(web.load_balancers(lab.elb()?.vips()).local())
}

/// A lab with agents that follow one folder.
pub struct Cluster {
    pub lab: Lab,
    pub folder: Manifests,
    agents: BTreeMap<String, Agent>,
    /// What agents take the kernel to be without; see [`Cluster::start_without`].
    without: String,
    /// What [`Cluster::put`] wrote last, by file.
    written: BTreeMap<String, String>,
}

impl Cluster {
    /// Starts an agent on each of these nodes, with these arguments and Services, and waits until
    /// all is in the kernel.
    pub fn start<'a>(
        lab: Lab,
        nodes: &[&str],
        arguments: &[&str],
        services: impl IntoIterator<Item = &'a Service>,
    ) -> Result<Self> {
        Self::start_without("", lab, nodes, arguments, services)
    }

    /// The same, with agents that take this kernel for an older one: without `tcx`, `set-retval`, `netns-cookie` or
    /// `batches`, named with commas between them.
    pub fn start_without<'a>(
        without: &str,
        lab: Lab,
        nodes: &[&str],
        arguments: &[&str],
        services: impl IntoIterator<Item = &'a Service>,
    ) -> Result<Self> {
        let folder = Manifests::create(lab.folder(), "manifests")?;
        let mut cluster = Self {
            lab,
            folder,
            agents: BTreeMap::new(),
            without: without.to_owned(),
            written: BTreeMap::new(),
        };
        for service in services {
            cluster.write(service)?;
        }
        cluster.start_agents(nodes, arguments)?;
        Ok(cluster)
    }

    /// Starts agents, in place of those that run on the same nodes.
    pub fn start_agents(&mut self, nodes: &[&str], arguments: &[&str]) -> Result<()> {
        for name in nodes {
            self.agents.remove(*name);
            let mut agent = self.node(name)?.agent().manifests(&self.folder).args(arguments);
            if !self.without.is_empty() {
                agent = agent.env("KPROXY_TEST_WITHOUT", &self.without);
            }
            let agent = agent.start()?;
            self.agents.insert((*name).to_owned(), agent);
        }
        for name in nodes {
            self.agent(name)?.wait_synced().with_context(|| format!("the agent on {name}"))?;
        }
        Ok(())
    }

    pub fn node(&self, name: &str) -> Result<&Node> {
        self.lab.node(name)
    }

    pub fn agent(&mut self, node: &str) -> Result<&mut Agent> {
        self.agents.get_mut(node).with_context(|| format!("there is no agent on {node}"))
    }

    /// Ends an agent as a crash of the whole process would, and forgets it.
    pub fn forget_agent(&mut self, node: &str) {
        self.agents.remove(node);
    }

    /// Writes a Service into the folder, and does not wait.
    pub fn write(&mut self, service: &Service) -> Result<()> {
        let (file, text) = (file_name(service.name()), service.yaml());
        self.folder.write(&file, &text)?;
        self.written.insert(file, text);
        Ok(())
    }

    /// Writes a Service into the folder and waits until every agent has it in the kernel. One that
    /// is there already is no change, and nothing is said about it.
    pub fn put(&mut self, service: &Service) -> Result<()> {
        if self.written.get(&file_name(service.name())) == Some(&service.yaml()) {
            return Ok(());
        }
        self.change(|cluster| cluster.write(service))
    }

    /// Takes a Service out of the folder and waits until every agent has noticed.
    pub fn delete(&mut self, service: &Service) -> Result<()> {
        self.change(|cluster| cluster.forget(service))
    }

    /// Takes a Service out of the folder, and does not wait.
    pub fn forget(&mut self, service: &Service) -> Result<()> {
        let file = file_name(service.name());
        self.written.remove(&file);
        self.folder.remove(&file)
    }

    /// Changes the folder and waits until every agent has said that it is in the kernel.
    pub fn change(&mut self, change: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        for agent in self.agents.values_mut() {
            agent.mark();
        }
        change(self)?;
        for (name, agent) in &mut self.agents {
            agent.wait_synced().with_context(|| format!("the agent on {name}, after a change"))?;
        }
        Ok(())
    }

    /// What `kproxy services -o json` prints on a node about one Service.
    pub fn service(&self, node: &str, name: &str) -> Result<Value> {
        service_view(self.node(node)?, name)
    }

    /// Echo servers in pods.
    pub fn servers(&self, pods: &[&str]) -> Result<Vec<EchoServer>> {
        pods.iter().map(|name| self.lab.pod(name)?.echo(TARGET)).collect()
    }

    /// A client at a pod, by its name.
    pub fn pod(&self, name: &str) -> Result<Client> {
        Client::at(self.lab.pod(name)?)
    }

    /// A client on a node itself.
    pub fn host(&self, name: &str) -> Result<Client> {
        let mut client = Client::at(self.node(name)?)?;
        client.addresses = self.node(name)?.own_addresses()?.into_iter().collect();
        Ok(client)
    }
}

/// What `kproxy services -o json` prints.
pub fn services_view(node: &Node) -> Result<Value> {
    let text = node.kproxy(&["services", "-o", "json"])?.success()?;
    serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))
}

/// What it prints about one Service of the namespace `default`.
pub fn service_view(node: &Node, name: &str) -> Result<Value> {
    among(&services_view(node)?, name).cloned()
}

/// A Service of the namespace `default` in what `kproxy services -o json` prints.
pub fn among<'a>(view: &'a Value, name: &str) -> Result<&'a Value> {
    let mut items = view["items"].as_array().into_iter().flatten();
    let found = items.find(|item| item["namespace"] == "default" && item["name"] == name);
    found.with_context(|| format!("{name} is not among: {view}"))
}

/// The packet programs on an interface, by name, in both directions.
pub fn packet_programs(node: &Node, interface: &str) -> Result<Vec<String>> {
    node.netns().within(|| {
        let mut names = Vec::new();
        for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
            let (_, programs) = SchedClassifier::query_tcx(interface, direction)
                .with_context(|| format!("cannot ask for the programs on {interface}"))?;
            names.extend(programs.iter().filter_map(|program| program.name_as_str().map(str::to_owned)));
        }
        Ok(names)
    })
}

/// A frontend in what `kproxy services -o json` prints about a Service.
pub fn frontend<'a>(service: &'a Value, address: IpAddr, port: u16, protocol: &str) -> Result<&'a Value> {
    let is = |one: &&Value| {
        one["address"] == address.to_string() && one["port"] == port && one["protocol"] == protocol
    };
    let frontends = service["frontends"].as_array().into_iter().flatten();
    frontends.into_iter().find(is).with_context(|| format!("no {address}:{port}/{protocol} in {service:#}"))
}

/// A check of `kproxy check`, by its name: status and detail.
pub fn check(node: &Node, name: &str) -> Result<(String, String)> {
    let cgroup = node.cgroup_root().display().to_string();
    let output = node.kproxy(&["check", "--cgroup-root", &cgroup, "-o", "json"])?.success()?;
    let report: Value = serde_json::from_str(&output)?;
    let checks = report["checks"].as_array().into_iter().flatten();
    let found = checks.into_iter().find(|one| one["check"] == name);
    let found = found.with_context(|| format!("no {name} in {report:#}"))?;
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    Ok((text("status"), text("detail")))
}

/// The file of a Service in the folder.
pub fn file_name(service: &str) -> String {
    format!("{service}.yaml")
}

/// Somebody who asks, and the addresses by which servers may see them.
pub struct Client {
    pub name: String,
    pub worker: Worker,
    pub addresses: BTreeSet<IpAddr>,
}

impl Client {
    pub fn at(member: &Member) -> Result<Self> {
        let addresses = Family::BOTH.map(|family| member.ip(family)).into();
        Ok(Self { name: member.name().to_owned(), worker: member.worker()?, addresses })
    }

    /// Asks until each of these servers has answered; every single answer must be right: from one of
    /// them, by the address that was asked, with the client's own address seen.
    pub fn reaches(&self, transport: Transport, to: SocketAddr, servers: &[&str]) -> Result<()> {
        let what = format!("{} to {to}, {transport:?}", self.name);
        let mut missing: BTreeSet<_> = servers.iter().copied().collect();
        // With two servers, one in 2^39 runs misses one of them by chance.
        for _ in 0..40 {
            let answer = ask(&self.worker, transport, to).with_context(|| what.clone())?;
            ensure!(servers.contains(&answer.server.as_str()), "{what}: answered by {answer:?}");
            ensure!(self.addresses.contains(&canonical(answer.client.ip())), "{what}: seen as {answer:?}");
            missing.remove(answer.server.as_str());
            if missing.is_empty() {
                return Ok(());
            }
        }
        bail!("{what}: {missing:?} never answered")
    }

    /// The call must fail with ECONNREFUSED, and at once.
    pub fn is_refused(&self, transport: Transport, to: SocketAddr) -> Result<()> {
        let what = format!("{} to {to}, {transport:?}", self.name);
        let start = Instant::now();
        let error = match ask(&self.worker, transport, to) {
            Err(error) => error,
            Ok(answer) => bail!("{what}: {answer:?} where a refusal was expected"),
        };
        let call = match transport {
            Transport::Tcp | Transport::UdpConnected => "connect",
            Transport::UdpUnconnected => "sendto",
        };
        match &error {
            Asked::Failed(WorkerError::Errno { call: failed, errno: Errno::ECONNREFUSED })
                if failed == call => {}
            _ => bail!("{what}: {error} where {call} was to give ECONNREFUSED"),
        }
        ensure!(start.elapsed() < AT_ONCE, "{what}: refused after {:?}", start.elapsed());
        Ok(())
    }

    /// A packet must come back that refuses, at once: a TCP reset or a port unreachable.
    pub fn is_refused_by_packet(&self, transport: Transport, to: SocketAddr) -> Result<()> {
        let what = format!("{} to {to}, {transport:?}", self.name);
        let start = Instant::now();
        let worker = &self.worker;
        let result = match transport {
            Transport::Tcp => worker.tcp_connect(to).map(|socket| format!("{socket:?}")),
            // Without IP_RECVERR no error reaches an unconnected socket.
            Transport::UdpConnected | Transport::UdpUnconnected => udp(worker, family_of(to), |id| {
                worker.udp_connect(id, to)?;
                worker.udp_send(id, "hello")?;
                Ok(worker.udp_receive(id, Duration::from_secs(2))?.data)
            }),
        };
        match result {
            Err(error) if error.errno() == Some(Errno::ECONNREFUSED) => {}
            other => bail!("{what}: {other:?} where a refusal was expected"),
        }
        ensure!(start.elapsed() < AT_ONCE, "{what}: refused after {:?}", start.elapsed());
        Ok(())
    }

    /// Nobody may answer, and nobody refuse.
    pub fn gets_silence(&self, transport: Transport, to: SocketAddr) -> Result<()> {
        let what = format!("{} to {to}, {transport:?}", self.name);
        let worker = &self.worker;
        let result = match transport {
            Transport::Tcp => worker.tcp_connect_with(to, None, SILENCE).map(|socket| format!("{socket:?}")),
            Transport::UdpConnected => udp(worker, family_of(to), |id| {
                worker.udp_connect(id, to)?;
                worker.udp_send(id, "hello")?;
                Ok(worker.udp_receive(id, SILENCE)?.data)
            }),
            Transport::UdpUnconnected => udp(worker, family_of(to), |id| {
                worker.udp_send_to(id, to, "hello")?;
                Ok(worker.udp_receive(id, SILENCE)?.data)
            }),
        };
        match result {
            Err(error) if matches!(error.errno(), Some(Errno::ETIMEDOUT | Errno::EAGAIN)) => Ok(()),
            other => bail!("{what}: {other:?} where silence was expected"),
        }
    }
}

/// How a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    UdpConnected,
    UdpUnconnected,
}

impl Transport {
    pub const ALL: [Self; 3] = [Self::Tcp, Self::UdpConnected, Self::UdpUnconnected];
    /// Those in which a refusal that comes as a packet can be seen.
    pub const REFUSABLE: [Self; 2] = [Self::Tcp, Self::UdpConnected];
}

/// Why there is no right answer.
#[derive(Debug)]
pub enum Asked {
    Failed(WorkerError),
    /// The client saw another address than the one that it asked.
    Shown(String),
}

impl std::error::Error for Asked {}

impl Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Failed(error) => error.fmt(f),
            Self::Shown(text) => f.write_str(text),
        }
    }
}

impl From<WorkerError> for Asked {
    fn from(error: WorkerError) -> Self {
        Self::Failed(error)
    }
}

/// Asks an echo server once, on a new socket. What the client sees of the other side (getpeername,
/// recvmsg) must be the address that it asked, and the server must see the client's own port.
pub fn ask(worker: &Worker, transport: Transport, to: SocketAddr) -> Result<Answer, Asked> {
    let (answer, local) = ask_from(worker, transport, to)?;
    same_port(answer, local)
}

/// As [`ask`], whatever port the server sees; with the socket's own address.
pub fn ask_from(
    worker: &Worker,
    transport: Transport,
    to: SocketAddr,
) -> Result<(Answer, SocketAddr), Asked> {
    if transport == Transport::Tcp {
        let socket = worker.tcp_connect(to)?;
        let answer = worker.tcp_ask(socket.id, "hello");
        let peer = worker.getpeername(socket.id);
        worker.close(socket.id)?;
        shown("getpeername", to, peer?)?;
        return Ok((answer?, socket.local));
    }
    let socket = worker.udp_socket(family_of(to))?;
    let result = (|| {
        if transport == Transport::UdpConnected {
            let connected = worker.udp_connect(socket.id, to)?;
            shown("getpeername", to, connected.peer.unwrap_or(connected.local))?;
            worker.udp_send(socket.id, "hello")?;
        } else {
            worker.udp_send_to(socket.id, to, "hello")?;
        }
        let datagram = worker.udp_receive(socket.id, Duration::from_secs(2))?;
        shown("recvfrom", to, datagram.from)?;
        let answer = serde_json::from_str(&datagram.data)
            .map_err(|_| Asked::Shown(format!("no echo server answers like this: {:?}", datagram.data)))?;
        Ok((answer, worker.names(socket.id)?.local))
    })();
    worker.close(socket.id)?;
    result
}

fn shown(call: &str, asked: SocketAddr, seen: SocketAddr) -> Result<(), Asked> {
    if asked == seen {
        return Ok(());
    }
    Err(Asked::Shown(format!("{call} shows {seen} where {asked} was asked")))
}

fn same_port(answer: Answer, local: SocketAddr) -> Result<Answer, Asked> {
    if answer.client.port() == local.port() {
        return Ok(answer);
    }
    Err(Asked::Shown(format!("the server sees port {} of {local}", answer.client.port())))
}

fn udp<T>(worker: &Worker, family: Family, call: impl FnOnce(u64) -> WorkerResult<T>) -> WorkerResult<T> {
    let socket = worker.udp_socket(family)?;
    let result = call(socket.id);
    worker.close(socket.id)?;
    result
}

pub fn family_of(address: SocketAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

/// IPv4 for its mapped form.
fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// Waits until a condition about an agent's output or a map holds; see [`wait_for`].
pub fn eventually<T>(what: &str, condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    wait_for(what, DEADLINE, condition)
}

/// Does all steps, also after one that failed, and names the ones that did.
pub struct Steps {
    passed: usize,
    failed: Vec<String>,
}

impl Steps {
    pub fn new() -> Self {
        Self { passed: 0, failed: Vec::new() }
    }

    pub fn step(&mut self, name: &str, step: impl FnOnce() -> Result<()>) {
        let start = Instant::now();
        match step() {
            Ok(()) => {
                self.passed += 1;
                // What takes the run's time.
                if start.elapsed() > SLOW {
                    eprintln!("  {name}: {:?}", start.elapsed());
                }
            }
            Err(error) => {
                eprintln!("  {name}: FAILED: {error:#}");
                self.failed.push(format!("{name}: {error:#}"));
            }
        }
    }

    /// No packet for a service address left a node.
    pub fn nothing_strayed(&mut self, lab: &Lab) {
        self.step("nothing strayed", || {
            let strays = lab.strays()?;
            ensure!(strays.is_empty(), "{strays:?}");
            Ok(())
        });
    }

    pub fn done(self) -> Result<()> {
        let Self { passed, failed } = self;
        ensure!(
            failed.is_empty(),
            "{} of {} steps:\n  {}",
            failed.len(),
            failed.len() + passed,
            failed.join("\n  ")
        );
        eprintln!("  {passed} steps passed");
        Ok(())
    }
}
