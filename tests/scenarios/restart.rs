//! The agent ends, by whatever way, and comes back: the dataplane does not notice.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::worker::Id;
use kproxy_lab::{
    BurstSpec, Context, Family, HostSpec, Lab, Member, Node, Worker, kproxy_binary, wait_until,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Cluster, DEADLINE, Steps, TARGET, Transport, family_of, packet_programs, usual};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[("kproxy::restarts_are_not_noticed", restarts)];

const NODE_PORT: u16 = 30_080;
const FAR_NODE_PORT: u16 = 30_081;

/// How many connections of each burst must be made while something is tried.
const ENOUGH: u64 = 50;

/// A pod, the node itself, and two outside: one is sent to a backend here, the other, masked, to one elsewhere.
const ALL: &[&str] = &["a1", "node-a", "client", "stranger"];

fn lab(ctx: &Context) -> Result<Lab> {
    ctx.lab(|lab| usual(lab).host(HostSpec::new("stranger", 101)))
}

fn restarts(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let web = Service::new("web", 10)
        .tcp(80, TARGET)
        .udp(80, TARGET)
        .node_port(NODE_PORT)
        .load_balancers(lab.elb()?.vips())
        .local()
        .pods(&[lab.pod("a2")?, lab.pod("b1")?]);
    let later = Service::new("later", 11).tcp(80, TARGET).pods(&[lab.pod("b1")?]);
    let passed = Service::new("passed", 12)
        .tcp(81, TARGET)
        .load_balancers(lab.elb()?.vips())
        .annotation("kproxy.io/pass-through", "true")
        .source_range("198.51.100.0/24");
    let far = Service::new("far", 14)
        .tcp(80, TARGET)
        .udp(80, TARGET)
        .node_port(FAR_NODE_PORT)
        .pods(&[lab.pod("b1")?]);
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&web, &passed, &far])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let mut steps = Steps::new();
    steps.step("kill -9 under load: nothing fails, nothing is written", || {
        let numbers = numbers(&cluster)?;
        under_load(&mut cluster, &web, ALL, |cluster, load| {
            cluster.agent("node-a")?.kill(Signal::SIGKILL)?;
            load.goes_on().context("without an agent")?;
            cluster.agent("node-a")?.restart()?;
            let written = synced_with_writes(cluster)?;
            ensure!(written == 0, "the restarted agent wrote {written} times, where nothing had changed");
            load.goes_on().context("with the new agent")
        })?;
        ensure!(self::numbers(&cluster)? == numbers, "Services have other numbers");
        Ok(())
    });
    steps.step("an agent that is killed while it starts does no harm", || {
        under_load(&mut cluster, &web, ALL, |cluster, load| {
            // Each time one line of its log later.
            for lines in 0.. {
                let agent = cluster.agent("node-a")?;
                agent.restart()?;
                wait_until("the agent starting", DEADLINE, || Ok(agent.log().len() >= lines))?;
                if agent.log().iter().any(|line| line.message == "synced") {
                    break;
                }
            }
            cluster.agent("node-a")?.restart()?;
            let written = synced_with_writes(cluster)?;
            ensure!(written == 0, "it wrote {written} times, where nothing had changed");
            load.goes_on()
        })
    });
    steps.step("what changed without an agent is applied by the next", || {
        // From outside nothing can go on: no endpoint is left on this node.
        under_load(&mut cluster, &web, &ALL[..2], |cluster, load| {
            cluster.agent("node-a")?.kill(Signal::SIGKILL)?;
            let fewer = web.clone().pods(&[cluster.lab.pod("b1")?]);
            cluster.write(&fewer)?;
            cluster.write(&later)?;
            cluster.forget(&passed)?;
            let client = cluster.pod("a1")?;
            for family in Family::BOTH {
                let to = SocketAddr::new(later.cluster_ip(family), 80);
                client.gets_silence(Transport::Tcp, to)?;
            }
            cluster.agent("node-a")?.restart()?;
            let written = synced_with_writes(cluster)?;
            ensure!(written > 0, "it wrote nothing");
            for family in Family::BOTH {
                client.reaches(Transport::Tcp, SocketAddr::new(later.cluster_ip(family), 80), &["b1"])?;
                for _ in 0..10 {
                    client.reaches(Transport::Tcp, SocketAddr::new(web.cluster_ip(family), 80), &["b1"])?;
                }
            }
            let printed = cluster.node("node-a")?.kproxy(&["services", "-o", "json"])?.success()?;
            ensure!(!printed.contains("\"passed\""), "still served: {printed}");
            load.goes_on()
        })?;
        cluster.put(&web)
    });
    steps.step("SIGTERM leaves the dataplane working", || {
        under_load(&mut cluster, &web, ALL, |cluster, load| {
            for signal in [Signal::SIGTERM, Signal::SIGINT] {
                let status = cluster.agent("node-a")?.kill(signal)?;
                ensure!(status.success(), "{signal}: {status}");
                load.goes_on().with_context(|| format!("after {signal}"))?;
                let node = cluster.node("node-a")?;
                node.kproxy(&["services"])?.success()?;
                cluster.agent("node-a")?.restart()?;
                let written = synced_with_writes(cluster)?;
                ensure!(written == 0, "after {signal}, {written} writes");
            }
            load.goes_on()
        })
    });
    steps.step("an upgrade in place", || upgrade(&mut cluster, &web));
    steps.step("maps of other sizes take the place of those that are there", || sizes(&mut cluster, &web));
    steps.step("what does not fit is named with the flag that mends it", || {
        cluster.forget(&far)?;
        full(&mut cluster, &later)
    });
    steps.step("maps of another layout are not touched, but replaced", || layout(&mut cluster, &web));
    steps.step("a second agent refuses and names the first", || second(&mut cluster, &web));
    steps.done()
}

fn upgrade(cluster: &mut Cluster, web: &Service) -> Result<()> {
    let other: PathBuf = cluster.lab.folder().join("kproxy-next");
    // By another process: whatever forks here meanwhile would keep it from being run for a moment (ETXTBSY).
    let copied = std::process::Command::new("cp").arg(kproxy_binary()?).arg(&other).status()?;
    ensure!(copied.success(), "cp ends with {copied}");
    under_load(cluster, web, ALL, |cluster, load| {
        let node = cluster.node("node-a")?.clone();
        let before = attached(&node)?;
        for binary in [&other, &kproxy_binary()?] {
            cluster.forget_agent("node-a");
            let mut agent = node.agent().manifests(&cluster.folder).binary(binary).start()?;
            let line = agent.wait_synced()?;
            ensure!(line.field("writes").as_deref() == Some("0"), "{line:?}");
            load.goes_on().with_context(|| format!("with {}", binary.display()))?;
            drop(agent);
        }
        ensure!(before.len() >= 8 + 2 * 3, "{before:?}");
        // Exchanged, not added.
        let after = attached(&node)?;
        ensure!(before == after, "attached before: {before:?}, after: {after:?}");
        cluster.start_agents(&["node-a"], &[])
    })
}

/// The programs on the node's cgroup and on its interfaces, by name.
fn attached(node: &Node) -> Result<Vec<String>> {
    let cgroup = node.command("bpftool")?.args(["-j", "cgroup", "show"]).arg(node.cgroup_root());
    let cgroup: Value = serde_json::from_str(&cgroup.run()?.success()?)?;
    let names = cgroup.as_array().into_iter().flatten().map(|one| one["name"].to_string());
    let mut names: Vec<_> = names.collect();
    names.sort_unstable();
    for interface in ["eth0", "v-a1", "v-a2"] {
        names.extend(packet_programs(node, interface)?);
    }
    Ok(names)
}

fn sizes(cluster: &mut Cluster, web: &Service) -> Result<()> {
    const SMALL: &[&str] = &["--max-frontends", "256", "--max-backends", "512", "--max-source-ranges", "64"];
    const USUAL: &[&str] = &[];
    under_load(cluster, web, ALL, |cluster, load| {
        for (arguments, sizes) in [(SMALL, [256, 512, 64]), (USUAL, [32_768, 262_144, 65_536])] {
            let before = max_entries(cluster, "flow")?;
            cluster.start_agents(&["node-a"], arguments)?;
            load.goes_on().with_context(|| format!("with {arguments:?}"))?;
            for (map, size) in ["frontend", "backend", "source_range"].into_iter().zip(sizes) {
                let is = max_entries(cluster, map)?;
                ensure!(is == size, "{map} holds {is}, not {size}");
            }
            ensure!(max_entries(cluster, "flow")? == before, "the flows' table has another size");
            let next = cluster.node("node-a")?.bpf_root().join("next");
            ensure!(!next.exists(), "{} is left", next.display());
            let view = cluster.service("node-a", web.name())?;
            ensure!(view["frontends"].as_array().is_some_and(|frontends| frontends.len() == 12), "{view:#}");
            cluster.agent("node-a")?.restart()?;
            let written = synced_with_writes(cluster)?;
            ensure!(written == 0, "adopted with {written} writes");
        }
        load.goes_on()
    })
}

fn full(cluster: &mut Cluster, later: &Service) -> Result<()> {
    let node = cluster.node("node-a")?.clone();
    cluster.forget_agent("node-a");
    let refused = node.agent().manifests(&cluster.folder).args(["--max-frontends", "5"]).run(DEADLINE)?;
    ensure!(refused.code() == Some(2) && refused.stderr.contains("16..=1048576"), "{refused}");
    // With the twelve of the Service that is there, four more fill the map.
    cluster.forget(later)?;
    let more = Service::new("more", 13).tcp(80, TARGET).udp(80, TARGET);
    cluster.write(&more)?;
    cluster.start_agents(&["node-a"], &["--max-frontends", "16"])?;
    cluster.write(later)?;
    let agent = cluster.agent("node-a")?;
    agent.wait_log("it naming the flag", DEADLINE, |line| {
        line.level == "ERROR" && line.mentions("default/later") && line.mentions("--max-frontends")
    })?;
    cluster.start_agents(&["node-a"], &["--max-frontends", "32"])?;
    let to = SocketAddr::new(later.cluster_ip(Family::V4), 80);
    cluster.pod("a1")?.reaches(Transport::Tcp, to, &["b1"])?;
    cluster.forget(&more)?;
    cluster.start_agents(&["node-a"], &[])
}

/// Clients inside notice nothing. Flows of packets begin anew, so that nobody outside is asked.
fn layout(cluster: &mut Cluster, web: &Service) -> Result<()> {
    under_load(cluster, web, &ALL[..2], |cluster, load| {
        cluster.agent("node-a")?.kill(Signal::SIGKILL)?;
        let owner = cluster.node("node-a")?.bpf_root().join("owner");
        let update =
            cluster.node("node-a")?.command("bpftool")?.args(["map", "update", "pinned"]).arg(&owner);
        // The version stands first; the rest of the 96 octets does not matter here.
        let value = ["99"].into_iter().chain(std::iter::repeat_n("0", 95));
        update.args(["key", "0", "0", "0", "0", "value"]).args(value).run()?.success()?;
        load.goes_on().context("without an agent")?;
        cluster.agent("node-a")?.restart()?;
        let written = synced_with_writes(cluster)?;
        ensure!(written > 0, "it adopted maps of a layout that it does not know");
        let log = cluster.agent("node-a")?.log();
        ensure!(log.iter().any(|line| line.level == "WARN" && line.mentions("version 99")), "{log:#?}");
        load.goes_on().context("with the new maps")?;
        cluster.agent("node-a")?.restart()?;
        let written = synced_with_writes(cluster)?;
        ensure!(written == 0, "adopted with {written} writes");
        load.goes_on()
    })
}

fn max_entries(cluster: &Cluster, map: &str) -> Result<u64> {
    let node = cluster.node("node-a")?;
    let show = node.command("bpftool")?.args(["-j", "map", "show", "pinned"]).arg(node.bpf_root().join(map));
    let shown: Value = serde_json::from_str(&show.run()?.success()?)?;
    shown["max_entries"].as_u64().with_context(|| format!("no max_entries in {shown}"))
}

fn second(cluster: &mut Cluster, web: &Service) -> Result<()> {
    let node = cluster.node("node-a")?.clone();
    let first = cluster.agent("node-a")?.process().pid();
    let output = node.agent().manifests(&cluster.folder).run(DEADLINE)?;
    ensure!(output.code() == Some(1), "{output}");
    ensure!(output.stderr.contains(&first.to_string()), "no process {first} in: {}", output.stderr);
    ensure!(output.stderr.contains("node-a"), "no node in: {}", output.stderr);
    ensure!(cluster.agent("node-a")?.process().is_running()?, "the first one has ended");
    // The first goes on.
    let client = cluster.pod("a1")?;
    let fewer = web.clone().pods(&[cluster.lab.pod("b1")?]);
    cluster.put(&fewer)?;
    client.reaches(Transport::Tcp, SocketAddr::new(web.cluster_ip(Family::V4), 80), &["b1"])?;
    cluster.put(web)
}

/// Waits for the new agent to be in force, and says how often it wrote into a map for that.
fn synced_with_writes(cluster: &mut Cluster) -> Result<u64> {
    let line = cluster.agent("node-a")?.wait_synced()?;
    let writes = line.field("writes").with_context(|| format!("no field writes in {line:?}"))?;
    writes.parse().with_context(|| format!("writes is {writes}"))
}

fn numbers(cluster: &Cluster) -> Result<Vec<(Value, Value)>> {
    let text = cluster.node("node-a")?.kproxy(&["services", "-o", "json"])?.success()?;
    let list: Value = serde_json::from_str(&text)?;
    let services = list["items"].as_array().into_iter().flatten();
    let frontends = services.flat_map(|service| service["frontends"].as_array().into_iter().flatten());
    Ok(frontends.map(|one| (one["address"].clone(), one["number"].clone())).collect())
}

/// Open connections, open UDP sockets, and streams of new connections, in both families.
struct Load {
    clients: Vec<Loaded>,
}

struct Loaded {
    name: String,
    worker: Worker,
    to: SocketAddr,
    open: Id,
    datagrams: Id,
    burst: Id,
}

impl Load {
    /// Clients inside ask for the ClusterIP, those outside for NodePorts.
    fn start(cluster: &Cluster, web: &Service, clients: &[&str]) -> Result<Self> {
        let mut load = Self { clients: Vec::new() };
        for family in Family::BOTH {
            for name in clients {
                let (member, to): (&Member, _) = match *name {
                    "client" | "stranger" => {
                        let node = cluster.node("node-a")?.ip(family);
                        let port = if *name == "client" { NODE_PORT } else { FAR_NODE_PORT };
                        (cluster.lab.host(name)?, SocketAddr::new(node, port))
                    }
                    "node-a" => (cluster.node(name)?, SocketAddr::new(web.cluster_ip(family), 80)),
                    pod => (cluster.lab.pod(pod)?, SocketAddr::new(web.cluster_ip(family), 80)),
                };
                load.clients.push(Loaded::start(member, to)?);
            }
        }
        Ok(load)
    }

    fn goes_on(&self) -> Result<()> {
        self.clients.iter().try_for_each(Loaded::goes_on)
    }
}

impl Loaded {
    fn start(member: &Member, to: SocketAddr) -> Result<Self> {
        let worker = member.worker()?;
        let open = worker.tcp_connect(to)?.id;
        let datagrams = worker.udp_socket(family_of(to))?.id;
        let burst = worker.burst_start(BurstSpec::new(to).concurrency(1))?;
        let loaded = Self { name: member.name().to_owned(), worker, to, open, datagrams, burst };
        loaded.goes_on()?;
        Ok(loaded)
    }

    /// The open connection answers, datagrams are answered, and new connections are made from now on.
    fn goes_on(&self) -> Result<()> {
        let what = || format!("{} to {}", self.name, self.to);
        self.worker.tcp_ask(self.open, "still there").with_context(what)?;
        self.worker.udp_send_to(self.datagrams, self.to, "still there").with_context(what)?;
        let datagram = self.worker.udp_receive(self.datagrams, Duration::from_secs(1)).with_context(what)?;
        ensure!(datagram.from == self.to, "{}: {} answered", what(), datagram.from);
        let before = self.worker.burst_look(self.burst)?.ok;
        wait_until("new connections", DEADLINE, || {
            Ok(self.worker.burst_look(self.burst)?.ok >= before + ENOUGH)
        })
        .with_context(what)
    }
}

/// Does something under load; not one connection may fail.
fn under_load(
    cluster: &mut Cluster,
    web: &Service,
    clients: &[&str],
    what: impl FnOnce(&mut Cluster, &Load) -> Result<()>,
) -> Result<()> {
    let load = Load::start(cluster, web, clients)?;
    what(cluster, &load)?;
    for client in load.clients {
        let report = client.worker.burst_stop(client.burst)?;
        ensure!(report.failures() == 0, "{} to {}: {report:?}", client.name, client.to);
    }
    Ok(())
}
