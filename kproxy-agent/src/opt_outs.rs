//! Pods that are opted out of the socket hooks: their network namespaces are found among those of this node's processes,
//! by the Pods' addresses, and entered in the map that the hooks ask.
//!
//! The work is done by a thread of its own, which enters these namespaces one after the other. Who is opted out is the
//! model's; what follows from that and from the namespaces is [`plan`]'s.

mod plan;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result};
use kproxy_common::{Address, OptedOut};
use nix::ifaddrs::getifaddrs;

use self::plan::{Namespace, Plan, plan};
use crate::{
    events::Events,
    maps::kernel::OptedOutMap,
    model::{ObjectRef, Problem, ProblemKind},
    namespaces::Namespaces,
    wanted::{ServiceKey, WantedOptOuts},
};

/// Before namespaces that are missing are looked for again; longer each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A Pod's first process comes about when its address does: only after this it is said that there is none.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a start waits for the first look.
const START: Duration = Duration::from_secs(5);

/// Keeps the map. It ends with this.
#[derive(Debug)]
pub struct OptOuts {
    tasks: Sender<Task>,
}

enum Task {
    /// From now on these are wanted.
    Want(WantedOptOuts),
    /// Namespaces may have come or gone.
    Look,
    /// Says when all that was asked before is done.
    Tell(SyncSender<()>),
}

impl OptOuts {
    /// For pods whose processes are below `cgroup`. The host's network namespace, by its cookie, is nobody's.
    pub fn start(map: OptedOutMap, cgroup: PathBuf, host_netns_cookie: u64, events: Events) -> Result<Self> {
        let (tasks, received) = channel();
        let keeper = Keeper {
            map,
            cgroup,
            host_netns_cookie,
            events,
            wanted: WantedOptOuts::default(),
            missing: BTreeMap::new(),
            problems: BTreeSet::new(),
        };
        thread::Builder::new()
            .name("opt-outs".to_owned())
            .spawn(move || keeper.run(&received))
            .context("cannot start a thread")?;
        Ok(Self { tasks })
    }

    /// These Pods are opted out.
    pub fn want(&self, wanted: WantedOptOuts) {
        self.ask(Task::Want(wanted));
    }

    /// Namespaces may have come or gone.
    pub fn look(&self) {
        self.ask(Task::Look);
    }

    /// Waits until what is wanted has been looked for once, so that programs that are attached then find it.
    pub fn finish(&self) {
        let (done, is_done) = sync_channel(1);
        self.ask(Task::Tell(done));
        if is_done.recv_timeout(START).is_err() {
            tracing::warn!(
                "finding the Pods that are opted out of the socket hooks takes long: until then they are served"
            );
        }
    }

    fn ask(&self, task: Task) {
        // The thread ends only with this sender.
        let _ = self.tasks.send(task);
    }
}

struct Keeper {
    map: OptedOutMap,
    cgroup: PathBuf,
    host_netns_cookie: u64,
    events: Events,
    wanted: WantedOptOuts,
    /// Pods without a namespace, and since when.
    missing: BTreeMap<ServiceKey, Instant>,
    /// What was said about Pods.
    problems: BTreeSet<Problem>,
}

impl Keeper {
    fn run(mut self, tasks: &Receiver<Task>) {
        let mut pause: Option<Duration> = None;
        loop {
            let first = match pause {
                Some(pause) => tasks.recv_timeout(pause),
                None => tasks.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            let mut done = Vec::new();
            match first {
                Ok(first) => {
                    // One look is enough for all that has been asked.
                    for task in std::iter::once(first).chain(tasks.try_iter()) {
                        match task {
                            Task::Want(wanted) => self.wanted = wanted,
                            Task::Look => {}
                            Task::Tell(to) => done.push(to),
                        }
                    }
                    pause = None;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let is_done = self.keep().unwrap_or_else(|error| {
                tracing::error!(
                    "which Pods are opted out of the socket hooks cannot be kept up with, and is tried again: {error:#}"
                );
                false
            });
            pause = match pause {
                _ if is_done => None,
                Some(pause) => Some((pause * 2).min(LONGEST_PAUSE)),
                None => Some(FIRST_PAUSE),
            };
            for to in done {
                // Whoever waited may have gone.
                let _ = to.try_send(());
            }
        }
    }

    /// Brings the map to what is wanted. Says whether nothing is left to be done.
    fn keep(&mut self) -> Result<bool> {
        let present = self.map.read()?;
        let (found, hidden) = if self.wanted.pods.is_empty() {
            (Vec::new(), 0)
        } else {
            namespaces(&self.cgroup, self.host_netns_cookie)?
        };
        let Plan { delete, insert, missing } = plan(&self.wanted, &found, &present);
        self.map.delete(&delete)?;
        for cookie in delete.iter().filter(|cookie| !insert.contains_key(cookie)) {
            let pod = present.get(cookie).map(text).unwrap_or_default();
            tracing::info!(netns_cookie = cookie, "sockets are served again of the pod at {pod}");
        }
        let since =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut problems = BTreeSet::new();
        for (cookie, (pod, [v4, v6])) in insert {
            let value = OptedOut { v4, v6, since };
            match self.map.insert(cookie, &value) {
                Ok(()) => tracing::info!(
                    %pod,
                    netns_cookie = cookie,
                    "opted out of the socket hooks: the packets of {} are served",
                    text(&value)
                ),
                Err(error) => {
                    problems
                        .insert(problem(&pod, format!("it is not opted out of the socket hooks: {error}")));
                }
            }
        }
        self.missing.retain(|pod, _| missing.contains(pod));
        for pod in &missing {
            let since = *self.missing.entry(pod.clone()).or_insert_with(Instant::now);
            if since.elapsed() >= PATIENCE {
                problems.insert(problem(pod, not_found(hidden)));
            }
        }
        let is_done = missing.is_empty() && problems.is_empty();
        self.say(problems);
        Ok(is_done)
    }

    /// What is wrong now, of which only the news is told.
    fn say(&mut self, problems: BTreeSet<Problem>) {
        let new: Vec<_> = problems.difference(&self.problems).cloned().collect();
        let gone: Vec<_> = self.problems.difference(&problems).cloned().collect();
        for Problem { object, field, kind, message } in &new {
            tracing::warn!(kind = kind.word(), %object, field, "{message}");
        }
        for Problem { object, field, message, .. } in &gone {
            tracing::info!(%object, field, "resolved: {message}");
        }
        self.events.problems(&new, &gone);
        self.problems = problems;
    }
}

/// All network namespaces but the host's; and how many processes hide theirs.
fn namespaces(cgroup: &Path, host_netns_cookie: u64) -> Result<(Vec<Namespace>, usize)> {
    let (mut found, mut failed) = (Vec::new(), None);
    let namespaces = Namespaces::of_processes(cgroup)?;
    namespaces.visit(|cookie| {
        // Without cookies (before 5.14) no Pod is wanted.
        let Some(cookie) = cookie.filter(|cookie| *cookie != host_netns_cookie) else { return };
        match getifaddrs() {
            Ok(all) => {
                let ips = all.filter_map(|one| one.address).filter_map(|address| {
                    let v4 =
                        address.as_sockaddr_in().map(|at| Address::from(std::net::IpAddr::from(at.ip())));
                    v4.or_else(|| {
                        address.as_sockaddr_in6().map(|at| Address::from(std::net::IpAddr::from(at.ip())))
                    })
                });
                found.push(Namespace { cookie, addresses: ips.collect() });
            }
            Err(error) => failed = Some(error),
        }
    })?;
    match failed {
        Some(error) if found.is_empty() => {
            Err(error).context("cannot ask for addresses in a network namespace")
        }
        _ => Ok((found, namespaces.hidden())),
    }
}

fn not_found(hidden: usize) -> String {
    let what =
        "no process below --cgroup-root is in a network namespace with its address: its sockets are served";
    match hidden {
        0 => format!("{what}, and it is looked for until one is"),
        _ => format!(
            "{what}; {hidden} processes hide theirs from the agent, which needs the host's PID namespace (hostPID: true) and \
             CAP_SYS_PTRACE"
        ),
    }
}

fn problem(pod: &ServiceKey, message: String) -> Problem {
    Problem {
        object: ObjectRef::pod(pod),
        field: "status.podIPs".to_owned(),
        kind: ProblemKind::CannotOptOut,
        message,
    }
}

fn text(value: &OptedOut) -> String {
    let addresses = [value.v4, value.v6].into_iter().filter(|address| !address.is_unspecified());
    addresses.map(|address| address.to_string()).collect::<Vec<_>>().join(", ")
}
