//! The soak: connections and datagrams by every way while endpoints change without pause and agents are killed. Nothing
//! may fail that kube-proxy would have kept: a connection stays with its backend while that runs, whatever becomes of
//! the Service, and a new one finds an endpoint.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::worker::Id;
use kproxy_lab::{
    Answer, BurstReport, BurstSpec, Context, EchoServer, Family, Member, NodeSpec, Worker, WorkerError,
};
use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::Scenario;
use crate::cluster::{Cluster, TARGET, family_of, file_name};
use crate::flows::flows;
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[("kproxy::soak", soak)];

/// How long it goes on, in seconds; set by `cargo xtask soak`.
const SECONDS: &str = "KPROXY_SOAK_SECONDS";
const USUAL: u64 = 60;

/// Between two changes of endpoints, and between two agents that are killed.
const CHANGE: Duration = Duration::from_millis(20);
const KILL: Duration = Duration::from_secs(20);

const NODE_PORT: u16 = 30_080;
const NODES: [&str; 2] = ["node-a", "node-b"];

/// Of each client: open connections, and UDP sockets of each sort.
const OPEN: usize = 8;
/// A datagram that is lost on the way is sent again so often; the lab loses none by itself.
const TRIES: u32 = 3;

fn soak(ctx: &Context) -> Result<()> {
    let seconds = match std::env::var(SECONDS) {
        Ok(text) => text.parse().with_context(|| format!("{SECONDS} is {text:?}"))?,
        Err(_) => USUAL,
    };
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2", "a3"]))
            .node(NodeSpec::new("node-b", 2, &["b1", "b2"]))
            .client("client")
    })?;
    let service = Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(NODE_PORT);
    // Two that stay, two that come and go.
    let [a2, a3, b1, b2] = ["a2", "a3", "b1", "b2"].map(|name| lab.pod(name).cloned());
    let (a2, a3, b1, b2) = (a2?, a3?, b1?, b2?);
    let variants = [
        service.clone().pods(&[&a2, &b1]),
        service.clone().pods(&[&a2, &b1, &a3]),
        service.clone().pods(&[&a2, &b1, &a3, &b2]),
        service.clone().pods(&[&a2, &b1, &b2]),
    ];
    let mut cluster = Cluster::start(lab, &NODES, &[], [&variants[2]])?;
    let _servers: Vec<EchoServer> = cluster.servers(&["a2", "a3", "b1", "b2"])?;

    let mut clients = Vec::new();
    for family in Family::BOTH {
        let cluster_ip = SocketAddr::new(service.cluster_ip(family), 80);
        clients.push(Client::start("pod", cluster.lab.pod("a1")?, cluster_ip)?);
        clients.push(Client::start("host", cluster.node("node-a")?, cluster_ip)?);
        for node in NODES {
            let to = SocketAddr::new(cluster.node(node)?.ip(family), NODE_PORT);
            clients.push(Client::start("outside", cluster.lab.host("client")?, to)?);
        }
    }
    let (done, changes) = (AtomicBool::new(false), AtomicU64::new(0));
    let (folder, texts) = (cluster.folder.clone(), variants.map(|variant| variant.yaml()));
    let mut kills = 0;
    thread::scope(|scope| {
        let changer = scope.spawn(|| {
            let mut next = Instant::now();
            while !done.load(Ordering::Relaxed) {
                let turn = changes.fetch_add(1, Ordering::Relaxed) as usize;
                folder.write(&file_name("web"), &texts[turn % texts.len()])?;
                next += CHANGE;
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            Ok::<_, anyhow::Error>(())
        });
        let result = work(&mut cluster, &mut clients, Duration::from_secs(seconds), &mut kills);
        done.store(true, Ordering::Relaxed);
        let changed =
            changer.join().map_err(|_| anyhow::anyhow!("the thread that changes endpoints panicked"))?;
        result.and(changed)
    })?;

    let mut tallies = Vec::new();
    for client in clients {
        tallies.push(client.finish()?);
    }
    let mut table = format!(
        "  {seconds} s, {} changes of endpoints, {kills} agents killed\n{}",
        changes.load(Ordering::Relaxed),
        Tally::HEADER
    );
    for tally in &tallies {
        tally.write(&mut table);
    }
    for node in NODES {
        let _ = writeln!(table, "  flows on {node}: {}", flows(cluster.node(node)?, &[])?.len());
    }
    eprint!("\n{table}");
    for tally in &tallies {
        ensure!(tally.is_clean(), "not everything went on:\n{table}");
    }
    ensure!(tallies.iter().all(|tally| tally.burst.ok > 0 && tally.asked > 0), "nothing was tried:\n{table}");
    Ok(())
}

/// Uses what is open, and kills agents, until the time is over.
fn work(cluster: &mut Cluster, clients: &mut [Client], time: Duration, kills: &mut u32) -> Result<()> {
    let start = Instant::now();
    let mut next_kill = start + KILL.min(time / 2);
    while start.elapsed() < time {
        if next_kill <= Instant::now() {
            next_kill += KILL;
            let name = NODES[*kills as usize % NODES.len()];
            *kills += 1;
            let agent = cluster.agent(name)?;
            agent.kill(Signal::SIGKILL)?;
            agent.restart()?;
        }
        for client in &mut *clients {
            client.renew_one().with_context(|| client.tally.name.clone())?;
            client.ask_all()?;
        }
        for name in NODES {
            cluster.agent(name)?.process().must_run().with_context(|| format!("the agent on {name}"))?;
        }
    }
    Ok(())
}

/// One who asks: by new connections, open ones, and UDP sockets that are connected or not.
struct Client {
    worker: Worker,
    to: SocketAddr,
    burst: Id,
    open: Vec<(Id, String)>,
    connected: Vec<Id>,
    unconnected: Vec<Id>,
    rounds: usize,
    tally: Tally,
}

/// What came of it.
#[derive(Default)]
struct Tally {
    name: String,
    burst: BurstReport,
    open: usize,
    /// Questions on open connections and by UDP.
    asked: u64,
    /// Open connections that failed, or changed their server.
    lost: Vec<String>,
    /// Datagrams that were sent again.
    again: u64,
    /// Connected UDP sockets that were told to connect again, as their backend was gone.
    told: u64,
    /// UDP questions without an answer.
    unanswered: Vec<String>,
}

impl Client {
    fn start(kind: &str, member: &Member, to: SocketAddr) -> Result<Self> {
        let worker = member.worker()?;
        let mut open = Vec::new();
        for _ in 0..OPEN {
            let id = worker.tcp_connect(to)?.id;
            open.push((id, worker.tcp_ask(id, "hello")?.server));
        }
        let sockets = |connect: bool| -> Result<Vec<Id>> {
            (0..OPEN)
                .map(|_| {
                    let id = worker.udp_socket(family_of(to))?.id;
                    if connect {
                        worker.udp_connect(id, to)?;
                    }
                    Ok(id)
                })
                .collect()
        };
        let (connected, unconnected) = (sockets(true)?, sockets(false)?);
        let burst = worker.burst_start(BurstSpec::new(to).concurrency(1).pause_ms(5).timeout_ms(5_000))?;
        let tally = Tally { name: format!("{kind} to {to}"), open: OPEN, ..Tally::default() };
        Ok(Self { worker, to, burst, open, connected, unconnected, rounds: 0, tally })
    }

    /// One of each sort anew, so that some always lead to endpoints that come and go.
    fn renew_one(&mut self) -> Result<()> {
        let place = self.rounds % OPEN;
        self.rounds += 1;
        self.worker.udp_connect(self.connected[place], self.to)?;
        if let Some((id, server)) = self.open.get_mut(place) {
            self.worker.close(*id)?;
            *id = self.worker.tcp_connect(self.to)?.id;
            *server = self.worker.tcp_ask(*id, "hello")?.server;
        }
        Ok(())
    }

    fn ask_all(&mut self) -> Result<()> {
        let (worker, tally) = (&self.worker, &mut self.tally);
        self.open.retain(|(id, server)| {
            tally.asked += 1;
            match worker.tcp_ask(*id, "still there") {
                Ok(answer) if answer.server == *server => true,
                other => {
                    tally.lost.push(format!("{server}: {other:?}"));
                    false
                }
            }
        });
        for (sockets, connected) in [(&self.connected, true), (&self.unconnected, false)] {
            for id in sockets {
                tally.asked += 1;
                let mut failures = Vec::new();
                while failures.len() < TRIES as usize {
                    match ask(worker, *id, self.to, connected) {
                        Ok(_) => break,
                        // Its backend is gone: a process connects again, and asks again.
                        Err(error) if connected && is_told(&error) => {
                            tally.told += 1;
                            worker.udp_connect(*id, self.to)?;
                        }
                        Err(error) => {
                            tally.again += 1;
                            failures.push(error.to_string());
                        }
                    }
                }
                if failures.len() == TRIES as usize {
                    tally.unanswered.push(failures.join(", "));
                }
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Tally> {
        self.tally.burst = self.worker.burst_stop(self.burst)?;
        Ok(self.tally)
    }
}

fn ask(worker: &Worker, id: Id, to: SocketAddr, connected: bool) -> Result<Answer, WorkerError> {
    if connected {
        worker.udp_send(id, "hello")?;
    } else {
        worker.udp_send_to(id, to, "hello")?;
    }
    let data = worker.udp_receive(id, Duration::from_secs(1))?.data;
    serde_json::from_str(&data).map_err(|error| WorkerError::Broken(error.into()))
}

/// What a process sees of a connected UDP socket that was destroyed.
fn is_told(error: &WorkerError) -> bool {
    matches!(error.errno(), Some(Errno::ECONNABORTED | Errno::EDESTADDRREQ | Errno::ENOTCONN))
}

impl Tally {
    const HEADER: &str = "  client                                connections  failed  open kept  asked  UDP told  sent again  unanswered\n";

    fn is_clean(&self) -> bool {
        self.burst.failures() == 0 && self.lost.is_empty() && self.unanswered.is_empty()
    }

    fn write(&self, table: &mut String) {
        let kept = format!("{}/{}", self.open - self.lost.len(), self.open);
        let _ = writeln!(
            table,
            "  {:<38}{:>11}{:>8}{kept:>11}{:>7}{:>10}{:>12}{:>12}",
            self.name,
            self.burst.ok,
            self.burst.failures(),
            self.asked,
            self.told,
            self.again,
            self.unanswered.len(),
        );
        for (failure, count) in &self.burst.failed {
            let _ = writeln!(table, "    {count} times: {failure}");
        }
        for what in self.lost.iter().chain(&self.unanswered).take(5) {
            let _ = writeln!(table, "    {what}");
        }
    }
}
