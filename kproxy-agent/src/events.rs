//! Events: what an operator must know about an object, written beside it at the API server, where
//! `kubectl describe` shows it.
//!
//! Nobody waits for an Event. The agent's loop says what is the matter ([`Events`]); a task of its own writes as
//! fast as the [`board`] lets it, which joins what belongs together, repeats nothing at once, and holds back where
//! the API server does not want any.

mod board;

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use tokio::sync::Notify;

pub use board::{Notice, Outcome};

use crate::{
    model::{ObjectRef, Problem, ProblemKind},
    servers::ListenFailure,
    source::kubernetes::Recorder,
    wanted::ServiceKey,
};
use board::{Board, Next, Topic};

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, $action:literal, $scope:ident;)*) => {
        /// Why there is an Event: its `reason`, which scripts and people look for.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub enum EventReason {
            $($(#[$doc])* $variant,)*
        }

        impl EventReason {
            /// The Event's `reason`.
            pub fn text(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }

            /// The Event's `action`: what was being done.
            pub fn action(self) -> &'static str {
                match self {
                    $(Self::$variant => $action,)*
                }
            }

            /// Who sees it.
            pub fn scope(self) -> Scope {
                match self {
                    $(Self::$variant => Scope::$scope,)*
                }
            }
        }
    };
}

/// Which agents have the same to say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// All of the cluster: it lies in the object. One Event is enough for all of them.
    Cluster,
    /// This node's: each has an Event of its own.
    Node,
}

reasons! {
    /// Values that cannot be read, or not be served.
    InvalidValue = "InvalidValue", "Serve", Cluster;
    /// Two entries of one object that claim the same.
    DuplicateEntry = "DuplicateEntry", "Serve", Cluster;
    /// Another Service has a frontend, a ClusterIP or a port already.
    FrontendClaimed = "FrontendClaimed", "Serve", Cluster;
    /// More than a table can hold of it.
    DoesNotFit = "DoesNotFit", "Serve", Cluster;
    /// `loadBalancerSourceRanges` of an address in pass-through.
    SourceRangesNotEnforced = "SourceRangesNotEnforced", "Serve", Cluster;
    /// An address in pass-through stands on an interface of the node, where what is sent to it ends.
    PassThroughOnNode = "PassThroughOnNode", "Serve", Node;
    /// A Pod that is to be opted out of the socket hooks, and cannot be.
    CannotOptOut = "CannotOptOut", "Serve", Node;
    /// This node's maps have no room for it.
    TablesFull = "TablesFull", "Serve", Node;
    /// What is wanted could not be written into this node's maps for another reason.
    FailedToWrite = "FailedToWrite", "Serve", Node;
    /// The `healthCheckNodePort` cannot be bound; called as kube-proxy calls it.
    FailedToStartServiceHealthcheck = "FailedToStartServiceHealthcheck", "Listen", Node;
    /// A forward chain drops what no rule accepts.
    ForwardPolicyDrop = "ForwardPolicyDrop", "StartKproxy", Node;
    /// Rules of the node route what backends on it send by its source.
    RoutedBySource = "RoutedBySource", "StartKproxy", Node;
    /// Rules of a kube-proxy are on the node.
    KubeProxyLeftovers = "KubeProxyLeftovers", "StartKproxy", Node;
    /// The interface is there that IPVS mode of kube-proxy puts addresses of Services on, or kube-router.
    LeftoverInterface = "LeftoverInterface", "StartKproxy", Node;
    /// `/healthz` cannot be served; called as kube-proxy calls it.
    FailedToStartProxierHealthcheck = "FailedToStartProxierHealthcheck", "StartKproxy", Node;
    /// `/metrics` cannot be served; called as kube-proxy calls it.
    FailedToStartMetricServer = "FailedToStartMetricServer", "StartKproxy", Node;
}

impl From<ProblemKind> for EventReason {
    fn from(kind: ProblemKind) -> Self {
        match kind {
            ProblemKind::Address
            | ProblemKind::Port
            | ProblemKind::Protocol
            | ProblemKind::Value
            | ProblemKind::PassThroughValue
            | ProblemKind::Family => Self::InvalidValue,
            ProblemKind::Duplicate => Self::DuplicateEntry,
            ProblemKind::ClaimedTwice => Self::FrontendClaimed,
            ProblemKind::DoesNotFit => Self::DoesNotFit,
            ProblemKind::SourceRangesNotEnforced => Self::SourceRangesNotEnforced,
            ProblemKind::PassThroughOnNode => Self::PassThroughOnNode,
            ProblemKind::CannotOptOut => Self::CannotOptOut,
        }
    }
}

/// Says what becomes Events. Cheap to clone; all clones are the same. Nothing here waits.
#[derive(Clone)]
pub struct Events(Option<Arc<Shared>>);

struct Shared {
    board: Mutex<Board>,
    /// There may be something to write.
    changed: Notify,
    node: ObjectRef,
}

impl Events {
    /// Writes no Events: there is no API server.
    pub fn none() -> Self {
        Self(None)
    }

    /// Events by way of `recorder`, those on the Node on this one. Must be called in a tokio runtime.
    pub fn start(recorder: Recorder, node_name: &str) -> Self {
        let shared = Arc::new(Shared {
            board: Mutex::new(Board::new(Instant::now())),
            changed: Notify::new(),
            node: ObjectRef::node(node_name),
        });
        tokio::spawn(write(Arc::clone(&shared), recorder));
        Self(Some(shared))
    }

    /// Problems of objects that came and that went.
    pub fn problems(&self, new: &[Problem], gone: &[Problem]) {
        if new.is_empty() && gone.is_empty() {
            return;
        }
        self.change(|board, now| {
            for problem in gone {
                board.withdraw(&topic(problem), &line(problem), now);
            }
            for problem in new {
                board.say(topic(problem), line(problem), now);
            }
        });
    }

    /// These Services are not written and why, and whether for want of room; all others are.
    pub fn write_failures<'a>(&self, failed: impl IntoIterator<Item = (&'a ServiceKey, &'a str, bool)>) {
        self.change(|board, now| {
            let mut topics = BTreeSet::new();
            for (service, error, no_room) in failed {
                let reason = if no_room { EventReason::TablesFull } else { EventReason::FailedToWrite };
                let topic = Topic { object: ObjectRef::service(service), reason };
                board.keep(topic.clone(), error, now);
                topics.insert(topic);
            }
            for reason in [EventReason::TablesFull, EventReason::FailedToWrite] {
                board.withdraw_others(reason, &topics, now);
            }
        });
    }

    /// A health check's port cannot be bound.
    pub fn listen_failed(&self, failure: &ListenFailure) {
        let (topic, line) = about_listener(failure);
        self.change(|board, now| board.say(topic, line, now));
    }

    /// It can now, or need not be any more.
    pub fn listen_recovered(&self, failure: &ListenFailure) {
        let (topic, line) = about_listener(failure);
        self.change(|board, now| board.withdraw(&topic, &line, now));
    }

    /// What is wrong with the agent or its node for this reason; `None`: nothing any more.
    pub fn on_node(&self, reason: EventReason, text: Option<String>) {
        let Some(shared) = &self.0 else { return };
        let topic = Topic { object: shared.node.clone(), reason };
        self.change(|board, now| {
            board.withdraw_all(&topic, now);
            if let Some(text) = text {
                board.say(topic, text, now);
            }
        });
    }

    fn change(&self, change: impl FnOnce(&mut Board, Instant)) {
        if let Some(shared) = &self.0 {
            change(&mut shared.board(), Instant::now());
            shared.changed.notify_one();
        }
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Events").field(&self.0.is_some()).finish()
    }
}

impl Shared {
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes what the board gives, as long as the process lives.
async fn write(shared: Arc<Shared>, recorder: Recorder) {
    let mut is_forbidden = false;
    loop {
        let next = shared.board().next(Instant::now());
        let notice = match next {
            Next::Write(notice) => notice,
            Next::Wait(None) => {
                shared.changed.notified().await;
                continue;
            }
            Next::Wait(Some(until)) => {
                tokio::select! {
                    () = shared.changed.notified() => {}
                    () = tokio::time::sleep_until(until.into()) => {}
                }
                continue;
            }
        };
        let outcome = recorder.record(&notice).await;
        match &outcome {
            Outcome::Forbidden(why) if !is_forbidden => tracing::warn!(
                "Events cannot be written, so what is wrong with Services is told in this log and in the metrics alone \
                 ({why}): add to the ClusterRole: apiGroups: [\"events.k8s.io\"], resources: [\"events\"], verbs: \
                 [\"create\", \"patch\"]"
            ),
            Outcome::Refused(why) => {
                tracing::debug!(object = %notice.object, reason = notice.reason.text(), "an Event is refused: {why}");
            }
            Outcome::Later(why) => {
                tracing::debug!(object = %notice.object, reason = notice.reason.text(), "an Event has to wait: {why}");
            }
            Outcome::Forbidden(_) | Outcome::Written | Outcome::NoObject => {}
        }
        is_forbidden = match outcome {
            Outcome::Forbidden(_) => true,
            Outcome::Written => false,
            Outcome::Refused(_) | Outcome::Later(_) | Outcome::NoObject => is_forbidden,
        };
        shared.board().written(&notice, &outcome, Instant::now());
    }
}

fn about_listener(failure: &ListenFailure) -> (Topic, String) {
    let ListenFailure { service, address, error } = failure;
    let reason = EventReason::FailedToStartServiceHealthcheck;
    let line = format!("health checks cannot be answered on {address}: {error}; it is tried again");
    (Topic { object: ObjectRef::service(service), reason }, line)
}

fn topic(problem: &Problem) -> Topic {
    Topic { object: problem.object.clone(), reason: problem.kind.into() }
}

fn line(problem: &Problem) -> String {
    format!("{}: {}", problem.field, problem.message)
}
