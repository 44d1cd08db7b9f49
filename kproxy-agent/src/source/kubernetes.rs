//! Objects from an API server, by lists and watches.
//!
//! One task for each kind keeps its list ([`watch`]); this merges them into one stream of events, says when the
//! first lists are complete, and which problems there are. The API servers are dialled directly ([`servers`]):
//! a proxy that needed a service address to learn about service addresses could never start on a fresh node.

mod backoff;
mod kinds;
mod recorder;
mod servers;
mod stream;
mod trouble;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::object::Kind;
use super::problem::{ProblemKind, SourceProblem};
use super::{Event, Source};
use crate::model::Change;
use servers::Servers;
use watch::{Selectors, Timing, Watch};

pub use watch::WatchState;

pub use recorder::Recorder;
pub use servers::{ConfigError, ConnectionSettings};

/// For the filter of the log: kube's client logs every try that fails, as an error or a warning, in words of its own.
/// What is wrong is said once, as a problem, and what is tried is logged here at debug. What nobody else says, as
/// of a CA bundle that cannot be read again, stays.
pub const LOG_FILTER: &str = "kube_client::client=error,kube_client::client::builder=off,\
    kube_client::client::tls=warn,kube_runtime::watcher=error";

/// How long the first list of what is not necessary is waited for: the own Node, ServiceCIDRs, and Pods.
const OPTIONAL_WAIT: Duration = Duration::from_secs(30);

/// While one batch follows the other, a flush comes after this many changes, so that the first are not kept
/// waiting by the last.
const FLUSH_CHANGES: usize = 4096;

/// Batches that wait to be merged. Each is what one read from a socket held.
const BATCHES_WAITING: usize = 16;

/// The API servers, of which one is in use: by all who have the same connection. Cheap to clone.
#[derive(Clone)]
pub struct Connection(Arc<Servers>);

/// What a watch tells. What was there at once is told together.
#[derive(Debug)]
enum Report {
    /// An object came, changed or went.
    Change(Change),
    /// An object cannot be read, or no longer so.
    Problem(SourceProblem),
    /// Whether there is a watch that works.
    Watch(WatchState),
    /// The first full list of this kind is complete, or will not be had.
    Listed(Kind),
    /// What is wrong with this kind's watch now, if anything.
    Trouble(Kind, Option<SourceProblem>),
}

/// Makes ready to speak to API servers; none is dialled yet.
///
/// # Errors
///
/// No configuration was found, or it cannot be used.
pub async fn connect(settings: &ConnectionSettings) -> Result<Connection, ConfigError> {
    Ok(Connection(Arc::new(Servers::new(settings).await?)))
}

/// Lists and watches Services, EndpointSlices, the own Node, ServiceCIDRs, and the Pods of this node. An API server that cannot be
/// reached is no error here, but a problem among the events: it is tried until it can. `node_name` is the name of this
/// node's Node object.
pub fn watch(connection: &Connection, node_name: &str) -> Source {
    start(Arc::clone(&connection.0), node_name.to_owned(), Timing::default())
}

fn start(servers: Arc<Servers>, node_name: String, timing: Timing) -> Source {
    let (reports, received) = mpsc::channel(BATCHES_WAITING);
    let mut watches = JoinSet::new();
    let all = Selectors::default();
    // All Services: the ClusterIPs of those that another proxy serves must be known too.
    let mut begin = |watched, selectors| {
        watches.spawn(Watch::new(watched, servers.clone(), selectors, timing, reports.clone()).run());
    };
    begin(&kinds::SERVICES, all.clone());
    let with_address =
        Selectors { labels: Some("!service.kubernetes.io/headless".to_owned()), ..all.clone() };
    begin(&kinds::ENDPOINT_SLICES, with_address);
    let own = Selectors { fields: Some(format!("metadata.name={node_name}")), ..all.clone() };
    begin(&kinds::NODES, own);
    begin(&kinds::SERVICE_CIDRS, all.clone());
    let here = Selectors { fields: Some(format!("spec.nodeName={node_name}")), ..all };
    begin(&kinds::PODS, here);
    drop(reports);
    Source::spawn(|events| merge(watches, received, Merged::new(node_name), events))
}

/// Passes on what the watches report. Ends, and ends the watches, when nobody listens.
async fn merge(
    mut watches: JoinSet<()>,
    mut reports: mpsc::Receiver<Vec<Report>>,
    mut merged: Merged,
    events: mpsc::Sender<Event>,
) {
    let deadline = Instant::now() + OPTIONAL_WAIT;
    let mut received = Vec::new();
    let mut outgoing = Vec::new();
    loop {
        tokio::select! {
            () = events.closed() => return,
            // A watch ends only by a panic: without it the stream would be wrong, so the source ends.
            _ = watches.join_next() => return,
            count = reports.recv_many(&mut received, BATCHES_WAITING) => {
                if count == 0 {
                    return;
                }
            }
            () = tokio::time::sleep_until(deadline), if !merged.waited => merged.waited = true,
        }
        loop {
            received.drain(..).flatten().for_each(|report| merged.take(report, &mut outgoing));
            merged.say_synced(&mut outgoing);
            let changes = outgoing.len();
            for event in outgoing.drain(..) {
                if events.send(event).await.is_err() {
                    return;
                }
            }
            merged.unflushed += changes;
            // More may have come meanwhile: it is taken along before the flush.
            while let Ok(report) = reports.try_recv() {
                received.push(report);
            }
            if received.is_empty() || merged.unflushed >= FLUSH_CHANGES {
                let flush = merged.synced && merged.unflushed > 0;
                merged.unflushed = 0;
                if flush && events.send(Event::Flush).await.is_err() {
                    return;
                }
            }
            if received.is_empty() {
                break;
            }
        }
    }
}

/// What the reports of all watches amount to. No I/O.
struct Merged {
    node_name: String,
    listed: [bool; 5],
    node_seen: bool,
    /// [`OPTIONAL_WAIT`] is over.
    waited: bool,
    synced: bool,
    troubles: BTreeMap<Kind, SourceProblem>,
    node_missing: Option<SourceProblem>,
    /// Events since the last flush.
    unflushed: usize,
}

impl Merged {
    fn new(node_name: String) -> Self {
        Merged {
            node_name,
            listed: [false; 5],
            node_seen: false,
            waited: false,
            synced: false,
            troubles: BTreeMap::new(),
            node_missing: None,
            unflushed: 0,
        }
    }

    fn take(&mut self, report: Report, outgoing: &mut Vec<Event>) {
        match report {
            Report::Listed(kind) => self.listed[kind as usize] = true,
            Report::Change(change) => {
                if let Change::Node(node) = &change {
                    self.see_node(node.is_some(), outgoing);
                }
                outgoing.push(Event::Change(change));
            }
            Report::Problem(problem) => say(problem, outgoing),
            Report::Watch(state) => outgoing.push(Event::Watch(state)),
            Report::Trouble(kind, trouble) => {
                // That the API server cannot be reached is one problem, however many watches see it.
                let is_there = |troubles: &BTreeMap<Kind, SourceProblem>, problem: &SourceProblem| {
                    troubles.values().any(|other| other == problem)
                };
                let new = trouble.clone().filter(|trouble| !is_there(&self.troubles, trouble));
                let old = match trouble {
                    Some(trouble) => self.troubles.insert(kind, trouble),
                    None => self.troubles.remove(&kind),
                };
                if let Some(old) = old.filter(|old| !is_there(&self.troubles, old)) {
                    say(old.resolve(), outgoing);
                }
                if let Some(new) = new {
                    say(new, outgoing);
                }
            }
        }
    }

    /// A Node that is deleted is no problem: what it was last still counts.
    fn see_node(&mut self, is_there: bool, outgoing: &mut Vec<Event>) {
        self.node_seen |= is_there;
        if let Some(problem) = self.node_missing.take_if(|_| is_there) {
            say(problem.resolve(), outgoing);
        }
    }

    /// Says that the first lists are complete, if they are.
    fn say_synced(&mut self, outgoing: &mut Vec<Event>) {
        let listed = |kind: Kind| self.listed[kind as usize];
        let optional = self.node_seen && listed(Kind::ServiceCidr) && listed(Kind::Pod);
        if self.synced || !listed(Kind::Service) || !listed(Kind::EndpointSlice) || !(optional || self.waited)
        {
            return;
        }
        self.synced = true;
        if !self.node_seen {
            let problem = SourceProblem::new(
                ProblemKind::NodeMissing,
                "nodes",
                format!("no Node {} was seen; kproxy goes on without it", self.node_name),
                "--node-name must be this node's name in the API",
            );
            say(problem.clone(), outgoing);
            self.node_missing = Some(problem);
        }
        outgoing.push(Event::Synced);
    }
}

fn say(problem: SourceProblem, outgoing: &mut Vec<Event>) {
    problem.log();
    outgoing.push(Event::Problem(problem));
}

#[cfg(test)]
mod fake_api;
#[cfg(test)]
mod odd_objects;
#[cfg(test)]
mod tests;
