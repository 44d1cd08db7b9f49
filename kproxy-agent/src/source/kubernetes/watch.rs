//! One kind of object: its list, and the watch that keeps it, for ever.
//!
//! Written over kube's requests instead of its `watcher`, for what that does not do: going on at another API
//! server without a new list, falling back from streaming lists to pages, and a second list before most of the
//! objects are given up.

use std::collections::HashMap;
use std::fmt::Debug;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::Report;
use super::backoff::Backoff;
use super::servers::{Attempt, Servers};
use super::trouble::{Meaning, Resource, WatchError};
use crate::source::object::{Kind, Object, ObjectKey};
use crate::source::problem::{ProblemKind, SourceProblem};
use crate::source::shrink;

/// How many objects a page of a list has, as in client-go.
const PAGE: u32 = 500;

/// How many events are taken together.
const BATCH: usize = 512;

/// The annotation of the bookmark that ends a streaming list (KEP-3157).
const LIST_END: &str = "k8s.io/initial-events-end";

/// A kind of object that is watched.
pub(super) trait Watched:
    kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static
{
    const KIND: Kind;
    const RESOURCE: Resource;
    /// Whether kproxy works without it.
    const OPTIONAL: bool = false;

    fn object(self) -> Object;
}

impl Watched for Service {
    const KIND: Kind = Kind::Service;
    const RESOURCE: Resource = Resource { group: "", plural: "services" };

    fn object(self) -> Object {
        Object::Service(Box::new(self))
    }
}

impl Watched for EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;
    const RESOURCE: Resource = Resource { group: "discovery.k8s.io", plural: "endpointslices" };

    fn object(self) -> Object {
        Object::EndpointSlice(Box::new(self))
    }
}

impl Watched for Node {
    const KIND: Kind = Kind::Node;
    const RESOURCE: Resource = Resource { group: "", plural: "nodes" };

    fn object(self) -> Object {
        Object::Node(Box::new(self))
    }
}

impl Watched for ServiceCIDR {
    const KIND: Kind = Kind::ServiceCidr;
    const RESOURCE: Resource = Resource { group: "networking.k8s.io", plural: "servicecidrs" };
    const OPTIONAL: bool = true;

    fn object(self) -> Object {
        Object::ServiceCidr(Box::new(self))
    }
}

/// Which objects of the kind.
#[derive(Clone, Default, Debug)]
pub(super) struct Selectors {
    pub(super) labels: Option<String>,
    pub(super) fields: Option<String>,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// Between tries.
    pub(super) backoff: Backoff,
    /// For an answer to a request, and from object to object of a streaming list.
    pub(super) answer: Duration,
    /// A watch on which nothing comes for so long is begun anew: bookmarks come every minute.
    pub(super) idle: Duration,
    /// The server ends a watch after this, so that they spread over its replicas. Whole seconds.
    pub(super) watch: Duration,
    /// A watch that ends sooner than this without an event counts as a failure.
    pub(super) short_lived: Duration,
    /// Before the second list that confirms a short one.
    pub(super) confirm: Duration,
    /// For an API that is not there, or not allowed, and not necessary.
    pub(super) optional: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            backoff: Backoff::default(),
            answer: Duration::from_secs(30),
            idle: Duration::from_secs(120),
            watch: Duration::from_secs(290),
            short_lived: Duration::from_secs(1),
            confirm: Duration::from_secs(1),
            optional: Duration::from_secs(300),
        }
    }
}

/// Lists and watches one kind.
pub(super) struct Watch<K> {
    servers: Arc<Servers>,
    selectors: Selectors,
    timing: Timing,
    reports: mpsc::Sender<Report>,
    /// What was passed on, with the version (`metadata.resourceVersion`) of each.
    known: HashMap<ObjectKey, String>,
    /// From where a watch goes on; `None`: a list is needed.
    version: Option<String>,
    /// Whether the server is asked for a streaming list.
    streaming: bool,
    listed: bool,
    trouble: Option<SourceProblem>,
    /// Tries that failed, since the last that did not.
    failures: u32,
    /// What each server said since then.
    round: Vec<SourceProblem>,
    kind: std::marker::PhantomData<fn() -> K>,
}

/// Nobody listens any more.
struct Stopped;

/// How a list or a watch ended.
enum End {
    Failed(WatchError),
    Stopped,
}

impl From<Stopped> for End {
    fn from(_: Stopped) -> Self {
        End::Stopped
    }
}

impl<E: Into<WatchError>> From<E> for End {
    fn from(error: E) -> Self {
        End::Failed(error.into())
    }
}

type Events<K> = Pin<Box<dyn Stream<Item = kube::Result<WatchEvent<K>>> + Send>>;

impl<K: Watched> Watch<K> {
    pub(super) fn new(
        servers: Arc<Servers>,
        selectors: Selectors,
        timing: Timing,
        reports: mpsc::Sender<Report>,
    ) -> Self {
        Watch {
            servers,
            selectors,
            timing,
            reports,
            known: HashMap::new(),
            version: None,
            streaming: true,
            listed: false,
            trouble: None,
            failures: 0,
            round: Vec::new(),
            kind: std::marker::PhantomData,
        }
    }

    /// Runs until nobody listens.
    pub(super) async fn run(mut self) {
        loop {
            let attempt = self.servers.attempt();
            let api = Api::all(attempt.client.clone());
            let begin = Instant::now();
            let failures = self.failures;
            let result = match self.version.clone() {
                Some(version) => self.resume(&api, &version).await,
                None if self.streaming => self.stream_list(&api).await,
                None => self.page_list(&api).await,
            };
            let wait = match result {
                // The server ended the watch, as it does from time to time.
                Ok(()) if self.failures < failures || begin.elapsed() > self.timing.short_lived => None,
                Ok(()) if self.failures == 0 && failures == 0 && self.version.is_none() => None,
                Ok(()) => {
                    self.failures += 1;
                    Some(self.timing.backoff.wait(self.failures))
                }
                Err(End::Stopped) => return,
                Err(End::Failed(error)) => match self.failed(&attempt, &error).await {
                    Ok(wait) => wait,
                    Err(Stopped) => return,
                },
            };
            if let Some(wait) = wait {
                sleep(wait).await;
            }
        }
    }

    /// Says what went wrong, and how long to wait before the next try.
    async fn failed(&mut self, attempt: &Attempt, error: &WatchError) -> Result<Option<Duration>, Stopped> {
        let plural = K::RESOURCE.plural;
        tracing::debug!(plural, url = self.servers.url(attempt), %error, "a list or watch failed");
        match error.meaning() {
            Meaning::Expired if self.version.take().is_some() => return Ok(None),
            Meaning::NoStreamingList if self.version.is_none() && self.streaming => {
                self.streaming = false;
                return Ok(None);
            }
            Meaning::WrongName if self.servers.wrong_name(attempt) => return Ok(None),
            Meaning::Unreachable | Meaning::WrongName => self.servers.unreachable(attempt),
            Meaning::Expired | Meaning::NoStreamingList | Meaning::Refused => {}
        }
        self.failures += 1;
        let problem = error.problem(K::RESOURCE, self.servers.url(attempt), self.servers.origin());
        if K::OPTIONAL && (error.is_not_found() || error.is_forbidden()) {
            let what = format!("{}; kproxy goes on without", problem.what);
            self.say_trouble(Some(SourceProblem { what, ..problem })).await?;
            self.say_listed().await?;
            return Ok(Some(self.timing.optional));
        }
        // A problem only when all servers failed; the one that is said is the first server's, until that changes,
        // so that it does not alternate.
        let is_last_of_round = self.failures as usize % self.servers.len() == 0;
        self.round.push(problem);
        if !is_last_of_round {
            return Ok(None);
        }
        let mut problem = self.round.remove(0);
        for other in self.round.drain(..).filter(|other| other.place != problem.place) {
            problem.what = format!("{}; {}: {}", problem.what, other.place, other.what);
        }
        let tries = self.failures as usize / self.servers.len();
        if self.trouble.as_ref() == Some(&problem) && tries.is_power_of_two() {
            tracing::warn!(plural, tries, place = %problem.place, "still: {}", problem.what);
        }
        self.say_trouble(Some(problem)).await?;
        Ok(Some(self.timing.backoff.wait(u32::try_from(tries).unwrap_or(u32::MAX))))
    }

    /// Goes on from a version.
    async fn resume(&mut self, api: &Api<K>, version: &str) -> Result<(), End> {
        let mut events = self.open(api, version, false).await?;
        self.follow(&mut events).await
    }

    /// Lists by a watch that begins with everything (KEP-3157), and goes on with it.
    async fn stream_list(&mut self, api: &Api<K>) -> Result<(), End> {
        // No version: as new as the moment of the request, not what some cache had.
        let mut events = self.open(api, "", true).await?;
        let mut listed = HashMap::new();
        loop {
            let mut batch = Vec::new();
            let mut end = None;
            for event in next_batch(&mut events, self.timing.answer).await?.ok_or(WatchError::Protocol(
                "a streaming list ended before it was complete",
            ))? {
                match event {
                    Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                        self.list_object(object, &mut listed, &mut batch);
                    }
                    Ok(WatchEvent::Bookmark(bookmark)) if bookmark.metadata.annotations.contains_key(LIST_END) => {
                        end = Some(bookmark.metadata.resource_version);
                    }
                    // What comes after the end of the list, in the same read.
                    Ok(WatchEvent::Deleted(object)) => self.delete(object, &mut batch),
                    Ok(WatchEvent::Bookmark(_)) => {}
                    Ok(WatchEvent::Error(status)) => return Err(WatchError::Event(status).into()),
                    Err(error) => return Err(error.into()),
                }
            }
            self.send(batch).await?;
            if let Some(version) = end {
                self.end_list(api, listed).await?;
                self.version = Some(version);
                return self.follow(&mut events).await;
            }
        }
    }

    /// Lists page by page. The watch comes with the next turn.
    async fn page_list(&mut self, api: &Api<K>) -> Result<(), End> {
        let mut listed = HashMap::new();
        let version = self.pages(api, &mut listed).await?;
        self.end_list(api, listed).await?;
        self.version = Some(version);
        Ok(())
    }

    /// Passes on all pages of a list; returns its version.
    async fn pages(&mut self, api: &Api<K>, listed: &mut HashMap<ObjectKey, String>) -> Result<String, End> {
        let mut parameters = ListParams {
            label_selector: self.selectors.labels.clone(),
            field_selector: self.selectors.fields.clone(),
            limit: Some(PAGE),
            ..ListParams::default()
        };
        loop {
            let answer = timeout(self.timing.answer, api.list(&parameters)).await;
            let list = match answer.map_err(|_| WatchError::Silent(self.timing.answer))? {
                // The server forgot the state that the pages are of: everything in one piece, then.
                Err(kube::Error::Api(status)) if status.code == 410 && parameters.limit.is_some() => {
                    (parameters.limit, parameters.continue_token) = (None, None);
                    continue;
                }
                list => list?,
            };
            let mut batch = Vec::new();
            list.items.into_iter().for_each(|object| self.list_object(object, listed, &mut batch));
            self.send(batch).await?;
            parameters.continue_token = list.metadata.continue_.filter(|token| !token.is_empty());
            if parameters.continue_token.is_none() {
                let version = list.metadata.resource_version.filter(|version| !version.is_empty());
                return Ok(version.ok_or(WatchError::Protocol("a list has no metadata.resourceVersion"))?);
            }
        }
    }

    /// A list is complete: deletes what is known and was not in it. If that is most of what is known, a second
    /// list must lack it too.
    async fn end_list(&mut self, api: &Api<K>, listed: HashMap<ObjectKey, String>) -> Result<(), End> {
        let mut missing: Vec<_> = self.known.keys().filter(|key| !listed.contains_key(*key)).cloned().collect();
        drop(listed);
        if shrink::needs_confirmation(self.known.len(), missing.len()) {
            let plural = K::RESOURCE.plural;
            self.say_trouble(Some(SourceProblem::new(
                ProblemKind::ShortList,
                plural,
                format!("a list lacks {} of {} {plural}", missing.len(), self.known.len()),
                "nothing is to be done: they are deleted if a second list lacks them too",
            )))
            .await?;
            sleep(self.timing.confirm).await;
            let mut second = HashMap::new();
            self.pages(api, &mut second).await?;
            missing.retain(|key| !second.contains_key(key));
        }
        missing.sort_unstable();
        for key in &missing {
            self.known.remove(key);
        }
        self.send(missing.iter().map(ObjectKey::gone).collect()).await?;
        self.succeeded().await?;
        self.say_listed().await?;
        Ok(())
    }

    /// Passes on events until the watch ends.
    async fn follow(&mut self, events: &mut Events<K>) -> Result<(), End> {
        self.succeeded_if_open(events).await?;
        loop {
            // Nothing for long, or the end of the stream: the next turn goes on from the same version.
            let batch = match next_batch(events, self.timing.idle).await {
                Ok(Some(batch)) => batch,
                Ok(None) | Err(WatchError::Silent(_)) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let mut changes = Vec::new();
            let mut failure = None;
            for event in batch {
                match event {
                    Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                        self.note_version(&object);
                        self.upsert(object, &mut changes);
                    }
                    Ok(WatchEvent::Deleted(object)) => {
                        self.note_version(&object);
                        self.delete(object, &mut changes);
                    }
                    Ok(WatchEvent::Bookmark(bookmark)) => self.version = Some(bookmark.metadata.resource_version),
                    Ok(WatchEvent::Error(status)) => failure = Some(WatchError::Event(status)),
                    Err(error) => failure = Some(error.into()),
                }
            }
            self.send(changes).await?;
            if let Some(failure) = failure {
                return Err(failure.into());
            }
            self.succeeded().await?;
        }
    }
}
