//! One kind of object: its list, and the watch that keeps it, for ever.
//!
//! Written over kube's requests instead of its `watcher`, for what that does not do: going on at another API
//! server without a new list, falling back from streaming lists to pages, and a second list before most of the
//! objects are given up.

use std::collections::{HashMap, HashSet};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt};
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::Report;
use super::backoff::{Backoff, random_fraction};
use super::kinds::Watched;
use super::servers::{Attempt, Servers};
use super::trouble::{Meaning, Resource, WatchError};
use crate::model::Change;
use crate::source::object::{Kind, ObjectKey};
use crate::source::problem::{ProblemKind, SourceProblem};
use crate::source::shrink;

/// How many objects a page of a list has, as in client-go.
const PAGE: u32 = 500;

/// How many events are taken together.
const BATCH: usize = 512;

/// The annotation of the bookmark that ends a streaming list (KEP-3157).
const LIST_END: &str = "k8s.io/initial-events-end";

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
    /// The server ends a watch after this or up to twice this, so that watches spread over its replicas.
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
    /// There was a full list.
    listed: bool,
    /// What was said to be wrong.
    trouble: Option<SourceProblem>,
    failures: Failures,
    kind: PhantomData<fn() -> K>,
}

/// What went wrong since the last success of its kind.
#[derive(Default)]
struct Failures {
    /// Tries that failed.
    tries: u32,
    /// What the servers said, since all of them had their turn.
    round: Vec<SourceProblem>,
    /// Versions that were too old as soon as they were used.
    expired: u32,
    /// Watches that ended as soon as they began.
    short_lived: u32,
}

/// How a list or a watch ended before its time.
enum End {
    Failed(WatchError),
    /// Nobody listens any more.
    Stopped,
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
            failures: Failures::default(),
            kind: PhantomData,
        }
    }

    /// Runs until nobody listens.
    pub(super) async fn run(mut self) {
        loop {
            let attempt = self.servers.attempt();
            let api = Api::all(attempt.client.clone());
            let turn = match self.version.clone() {
                Some(version) => self.resume(&api, &version).await,
                None if self.streaming => self.stream_list(&api).await,
                None => self.page_list(&api).await,
            };
            let turn = match turn {
                Err(End::Failed(error)) => self.failed(&attempt, &error).await,
                turn => turn,
            };
            match turn {
                Ok(None) => {}
                Ok(Some(wait)) => sleep(wait).await,
                Err(_) => return,
            }
        }
    }

    /// Goes on from a version. Returns how long to wait before the next turn, as all turns do.
    async fn resume(&mut self, api: &Api<K>, version: &str) -> Result<Option<Duration>, End> {
        let begin = Instant::now();
        let mut events = self.open(api, version, false).await?;
        self.succeeded().await?;
        let had_events = self.follow(&mut events).await?;
        if had_events || begin.elapsed() >= self.timing.short_lived {
            self.failures.short_lived = 0;
            return Ok(None);
        }
        self.failures.short_lived += 1;
        Ok(Some(self.timing.backoff.wait(self.failures.short_lived)))
    }

    /// Lists by a watch that begins with everything (KEP-3157), and goes on with it.
    async fn stream_list(&mut self, api: &Api<K>) -> Result<Option<Duration>, End> {
        // No version: as new as the moment of the request, not what some cache had.
        let mut events = self.open(api, "", true).await?;
        let mut listed = Listed::default();
        loop {
            let Some(batch) = next_batch(&mut events, self.timing.answer).await? else {
                return Err(WatchError::Protocol("a streaming list ended before it was complete").into());
            };
            let mut changes = Vec::new();
            let mut end = None;
            for event in batch {
                match event {
                    Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                        self.list(object, &mut listed, &mut changes);
                    }
                    // Comes after the end of the list, in the same read.
                    Ok(WatchEvent::Deleted(object)) => self.delete(object, &mut changes),
                    Ok(WatchEvent::Bookmark(bookmark)) => {
                        if bookmark.metadata.annotations.contains_key(LIST_END) {
                            end = Some(bookmark.metadata.resource_version);
                        }
                    }
                    Ok(WatchEvent::Error(status)) => return Err(WatchError::Event(status).into()),
                    Err(kube::Error::SerdeError(error)) => listed.cannot_read(K::RESOURCE, &error),
                    Err(error) => return Err(error.into()),
                }
            }
            self.send(changes).await?;
            if let Some(version) = end {
                self.end_list(api, listed).await?;
                self.version = Some(version);
                self.follow(&mut events).await?;
                return Ok(None);
            }
        }
    }

    /// Lists page by page. The watch comes with the next turn.
    async fn page_list(&mut self, api: &Api<K>) -> Result<Option<Duration>, End> {
        let mut listed = Listed::default();
        let version = self.pages(api, &mut listed).await?;
        self.end_list(api, listed).await?;
        self.version = Some(version);
        Ok(None)
    }

    /// Passes on all pages of a list; returns its version.
    async fn pages(&mut self, api: &Api<K>, listed: &mut Listed) -> Result<String, End> {
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
            let mut changes = Vec::new();
            list.items.into_iter().for_each(|object| self.list(object, listed, &mut changes));
            self.send(changes).await?;
            parameters.continue_token = list.metadata.continue_.filter(|token| !token.is_empty());
            if parameters.continue_token.is_none() {
                let version = list.metadata.resource_version.filter(|version| !version.is_empty());
                return Ok(version.ok_or(WatchError::Protocol("a list has no metadata.resourceVersion"))?);
            }
        }
    }

    /// A list is complete: deletes what is known and was not in it. If that is most of what is known, a second
    /// list must lack it too.
    async fn end_list(&mut self, api: &Api<K>, listed: Listed) -> Result<(), End> {
        let mut missing = listed.missing(&self.known);
        if shrink::needs_confirmation(self.known.len(), missing.len()) {
            let plural = K::RESOURCE.plural;
            self.say(Some(SourceProblem::new(
                ProblemKind::ShortList,
                plural,
                format!("a list lacks {} of {} {plural}", missing.len(), self.known.len()),
                "nothing is to be done: they are deleted if a second list lacks them too",
            )))
            .await?;
            sleep(self.timing.confirm).await;
            let mut second = Listed::default();
            self.pages(api, &mut second).await?;
            missing.retain(|key| !second.keys.contains(key));
        }
        missing.sort_unstable();
        for key in &missing {
            self.known.remove(key);
        }
        self.send(missing.iter().map(ObjectKey::gone).chain(K::ALL).collect()).await?;
        self.succeeded().await?;
        self.say_listed().await
    }

    /// Passes on events until the watch ends; returns whether there were any.
    async fn follow(&mut self, events: &mut Events<K>) -> Result<bool, End> {
        let mut had_events = false;
        loop {
            // Nothing for long, or the end of the stream: the next turn goes on from the same version.
            let batch = match next_batch(events, self.timing.idle).await {
                Ok(Some(batch)) => batch,
                Ok(None) | Err(WatchError::Silent(_)) => return Ok(had_events),
                Err(error) => return Err(error.into()),
            };
            let mut changes = Vec::new();
            let mut failure: Option<WatchError> = None;
            for event in batch {
                match event {
                    Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                        self.go_on_from(object.meta().resource_version.clone());
                        self.upsert(object, &mut changes);
                    }
                    Ok(WatchEvent::Deleted(object)) => {
                        self.go_on_from(object.meta().resource_version.clone());
                        self.delete(object, &mut changes);
                    }
                    Ok(WatchEvent::Bookmark(bookmark)) => {
                        self.go_on_from(Some(bookmark.metadata.resource_version))
                    }
                    Ok(WatchEvent::Error(status)) => failure = Some(WatchError::Event(status)),
                    // Asked again, the server would send the same: the object stays as it was.
                    Err(kube::Error::SerdeError(error)) => cannot_read(K::RESOURCE, &error),
                    Err(error) => failure = Some(error.into()),
                }
            }
            self.send(changes).await?;
            if let Some(failure) = failure {
                return Err(failure.into());
            }
            had_events = true;
            self.failures.expired = 0;
        }
    }

    async fn open(&self, api: &Api<K>, version: &str, initial: bool) -> Result<Events<K>, WatchError> {
        let spread = self.timing.watch.mul_f64(1.0 + random_fraction());
        let parameters = WatchParams {
            label_selector: self.selectors.labels.clone(),
            field_selector: self.selectors.fields.clone(),
            timeout: u32::try_from(spread.as_secs()).ok(),
            bookmarks: true,
            send_initial_events: initial,
        };
        match timeout(self.timing.answer, api.watch(&parameters, version)).await {
            Ok(events) => Ok(events?.boxed()),
            Err(_) => Err(WatchError::Silent(self.timing.answer)),
        }
    }

    fn list(&mut self, object: K, listed: &mut Listed, changes: &mut Vec<Change>) {
        if let Some(key) = self.upsert(object, changes) {
            listed.keys.insert(key);
        }
    }

    /// Passes the object on, unless it is known in this version.
    fn upsert(&mut self, object: K, changes: &mut Vec<Change>) -> Option<ObjectKey> {
        let version = object.meta().resource_version.clone().unwrap_or_default();
        let mut object = object.object();
        let key = object.key()?;
        if self.known.get(&key) != Some(&version) || version.is_empty() {
            self.known.insert(key.clone(), version);
            object.trim();
            changes.push(object.change(&key));
        }
        Some(key)
    }

    fn delete(&mut self, object: K, changes: &mut Vec<Change>) {
        if let Some(key) = object.object().key()
            && self.known.remove(&key).is_some()
        {
            changes.push(key.gone());
        }
    }

    fn go_on_from(&mut self, version: Option<String>) {
        if let Some(version) = version.filter(|version| !version.is_empty()) {
            self.version = Some(version);
        }
    }

    async fn send(&self, changes: Vec<Change>) -> Result<(), End> {
        if changes.is_empty() {
            return Ok(());
        }
        self.reports.send(Report::Changes(changes)).await.map_err(|_| End::Stopped)
    }

    async fn succeeded(&mut self) -> Result<(), End> {
        self.failures.tries = 0;
        self.failures.round.clear();
        self.say(None).await
    }

    async fn say_listed(&mut self) -> Result<(), End> {
        if self.listed {
            return Ok(());
        }
        self.listed = true;
        self.reports.send(Report::Listed(K::KIND)).await.map_err(|_| End::Stopped)
    }

    async fn say(&mut self, trouble: Option<SourceProblem>) -> Result<(), End> {
        if self.trouble == trouble {
            return Ok(());
        }
        self.trouble.clone_from(&trouble);
        self.reports.send(Report::Trouble(K::KIND, trouble)).await.map_err(|_| End::Stopped)
    }

    /// Decides what to do after a failure, and says what is wrong.
    async fn failed(&mut self, attempt: &Attempt, error: &WatchError) -> Result<Option<Duration>, End> {
        let plural = K::RESOURCE.plural;
        tracing::debug!(plural, url = self.servers.url(attempt), %error, "a list or watch failed");
        match error.meaning() {
            Meaning::Expired if self.version.take().is_some() => {
                self.failures.expired += 1;
                let before = self.failures.expired - 1;
                return Ok((before > 0).then(|| self.timing.backoff.wait(before)));
            }
            Meaning::NoStreamingList if self.version.is_none() && self.streaming => {
                self.streaming = false;
                return Ok(None);
            }
            Meaning::WrongName if self.servers.wrong_name(attempt) => return Ok(None),
            Meaning::Unreachable | Meaning::WrongName => self.servers.unreachable(attempt),
            Meaning::Expired | Meaning::NoStreamingList | Meaning::Refused => {}
        }
        let problem = error.problem(K::RESOURCE, self.servers.url(attempt), self.servers.origin());
        if K::OPTIONAL && (error.is_not_found() || error.is_forbidden()) {
            let what = format!("{}; {}", problem.what, K::WITHOUT);
            self.say(Some(SourceProblem { kind: ProblemKind::ApiMissing, what, ..problem })).await?;
            self.say_listed().await?;
            return Ok(Some(self.timing.optional));
        }
        self.failures.tries += 1;
        self.failures.round.push(problem);
        if self.failures.round.len() < self.servers.len() {
            return Ok(None);
        }
        // All servers had their turn. What they said, in one sentence, and in an order that does not change.
        let mut round = std::mem::take(&mut self.failures.round);
        round.sort();
        round.dedup();
        let mut problem = round.remove(0);
        for other in round {
            problem.what = format!("{}; {}: {}", problem.what, other.place, other.what);
        }
        let rounds = self.failures.tries.div_ceil(u32::try_from(self.servers.len()).unwrap_or(u32::MAX));
        // All watches see that a server is away; one of them is enough to say so again.
        let speaks = K::KIND == Kind::Service || problem.place == plural;
        if speaks && self.trouble.as_ref() == Some(&problem) && rounds.is_power_of_two() {
            tracing::warn!(plural, tries = rounds, place = %problem.place, "still: {}", problem.what);
        }
        // An API server that restarts is away for a moment, which is no problem for what is known already.
        if !self.listed || rounds > 1 || error.meaning() == Meaning::Refused {
            self.say(Some(problem)).await?;
        }
        Ok(Some(self.timing.backoff.wait(rounds)))
    }
}

/// What a list held.
#[derive(Default)]
struct Listed {
    keys: HashSet<ObjectKey>,
    /// Something in it could not be read: what is missing may be that.
    is_partial: bool,
}

impl Listed {
    fn cannot_read(&mut self, resource: Resource, error: &serde_json::Error) {
        self.is_partial = true;
        cannot_read(resource, error);
    }

    fn missing(&self, known: &HashMap<ObjectKey, String>) -> Vec<ObjectKey> {
        if self.is_partial {
            return Vec::new();
        }
        known.keys().filter(|key| !self.keys.contains(*key)).cloned().collect()
    }
}

fn cannot_read(resource: Resource, error: &serde_json::Error) {
    tracing::warn!(plural = resource.plural, %error, "an object was skipped: it is not as its API says");
}

/// The next event, and all others that are there already.
async fn next_batch<K>(
    events: &mut Events<K>,
    wait: Duration,
) -> Result<Option<Vec<kube::Result<WatchEvent<K>>>>, WatchError> {
    let Some(first) = timeout(wait, events.next()).await.map_err(|_| WatchError::Silent(wait))? else {
        return Ok(None);
    };
    let mut batch = vec![first];
    while batch.len() < BATCH
        && let Some(Some(event)) = events.next().now_or_never()
    {
        batch.push(event);
    }
    Ok(Some(batch))
}
