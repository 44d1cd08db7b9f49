//! One kind of object: its list, and the watch that keeps it, for ever.
//!
//! Written over kube's requests instead of its `watcher`, for what that does not do: going on at another API
//! server without a new list, falling back from streaming lists to pages, a second list before most of the
//! objects are given up, and objects that cannot be read ([`super::stream`]).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use kube::api::{ListParams, WatchParams};
use kube::core::Request;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::Report;
use super::backoff::{Backoff, random_fraction};
use super::kinds::Watched;
use super::servers::{Attempt, Servers};
use super::stream::{self, Events, Item, Page, WatchEvent};
use super::trouble::{Meaning, WatchError};
use crate::model::Change;
use crate::source::object::{Kind, Object, ObjectKey, Unreadable};
use crate::source::problem::{ProblemKind, SourceProblem};
use crate::source::shrink;

/// How many objects a page of a list has, as in client-go.
const PAGE: u32 = 500;

/// A version from which no watch can be had is given up after so many tries, and a list begun.
const TRIES_FROM_VERSION: u32 = 3;

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
    /// A watch that failed works again when it has been open for so long, or has brought an event.
    pub(super) settled: Duration,
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
            settled: Duration::from_secs(5),
            confirm: Duration::from_secs(1),
            optional: Duration::from_secs(300),
        }
    }
}

/// Lists and watches one kind.
pub(super) struct Watch {
    watched: &'static Watched,
    servers: Arc<Servers>,
    selectors: Selectors,
    timing: Timing,
    reports: mpsc::Sender<Vec<Report>>,
    /// What was passed on, with the version (`metadata.resourceVersion`) of each.
    known: HashMap<ObjectKey, String>,
    /// Objects that cannot be read, and what was said of each. Those that do not even say which they are have one
    /// entry together.
    unreadable: BTreeMap<Option<ObjectKey>, SourceProblem>,
    /// From where a watch goes on; `None`: a list is needed.
    version: Option<String>,
    /// Whether the server is asked for a streaming list.
    streaming: bool,
    /// There was a full list.
    listed: bool,
    /// What was said to be wrong.
    trouble: Option<SourceProblem>,
    failures: Failures,
    /// Since when there has been no watch that works; `None`: there is one, or none is needed.
    lost: Option<Instant>,
    /// When the watch began to be silent that was given up for that.
    silent: Option<Instant>,
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
    /// Tries to go on from the version in use that the servers refused.
    from_version: u32,
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

impl Watch {
    pub(super) fn new(
        watched: &'static Watched,
        servers: Arc<Servers>,
        selectors: Selectors,
        timing: Timing,
        reports: mpsc::Sender<Vec<Report>>,
    ) -> Self {
        Watch {
            watched,
            servers,
            selectors,
            timing,
            reports,
            known: HashMap::new(),
            unreadable: BTreeMap::new(),
            version: None,
            streaming: true,
            listed: false,
            trouble: None,
            failures: Failures::default(),
            lost: None,
            silent: None,
        }
    }

    /// Runs until nobody listens.
    pub(super) async fn run(mut self) {
        loop {
            let attempt = self.servers.attempt();
            let client = &attempt.client;
            let turn = match self.version.clone() {
                Some(version) => self.resume(client, &version).await,
                None if self.streaming => self.stream_list(client).await,
                None => self.page_list(client).await,
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
    async fn resume(&mut self, client: &Client, version: &str) -> Result<Option<Duration>, End> {
        let begin = Instant::now();
        let mut events = self.open(client, version, false).await?;
        self.succeeded().await?;
        let had_events = self.follow(&mut events).await?;
        if had_events || begin.elapsed() >= self.timing.short_lived {
            self.failures.short_lived = 0;
            return Ok(None);
        }
        self.failures.short_lived += 1;
        self.say_lost().await?;
        Ok(Some(self.timing.backoff.wait(self.failures.short_lived)))
    }

    /// Lists by a watch that begins with everything (KEP-3157), and goes on with it.
    async fn stream_list(&mut self, client: &Client) -> Result<Option<Duration>, End> {
        // No version: as new as the moment of the request, not what some cache had.
        let mut events = self.open(client, "", true).await?;
        let mut listed = Listed::default();
        loop {
            let Some(batch) = events.next_batch(self.timing.answer).await? else {
                return Err(WatchError::Protocol("a streaming list ended before it was complete").into());
            };
            let mut reports = Vec::new();
            let mut end = None;
            for event in batch {
                match event {
                    WatchEvent::Upsert(item) => self.list(item, &mut listed, &mut reports),
                    // Comes after the end of the list, in the same read.
                    WatchEvent::Deleted(item) => self.delete(item, &mut reports),
                    WatchEvent::Bookmark { version, ends_list: true } => end = Some(version),
                    WatchEvent::Bookmark { ends_list: false, .. } => {}
                    WatchEvent::Error(status) => return Err(WatchError::Event(status).into()),
                }
            }
            self.send(reports).await?;
            if let Some(version) = end {
                let version = version.ok_or(WatchError::Protocol("a streaming list has no version"))?;
                self.end_list(client, listed).await?;
                self.go_on_from(Some(version));
                self.follow(&mut events).await?;
                return Ok(None);
            }
        }
    }

    /// Lists page by page. The watch comes with the next turn.
    async fn page_list(&mut self, client: &Client) -> Result<Option<Duration>, End> {
        let mut listed = Listed::default();
        let version = self.pages(client, &mut listed).await?;
        self.end_list(client, listed).await?;
        self.go_on_from(Some(version));
        Ok(None)
    }

    /// Passes on all pages of a list; returns its version.
    async fn pages(&mut self, client: &Client, listed: &mut Listed) -> Result<String, End> {
        let mut parameters = ListParams {
            label_selector: self.selectors.labels.clone(),
            field_selector: self.selectors.fields.clone(),
            limit: Some(PAGE),
            ..ListParams::default()
        };
        loop {
            let request = Request::new(self.watched.resource.path()).list(&parameters);
            let request = request.map_err(kube::Error::BuildRequest)?;
            let answer = stream::page(client, request, self.watched.kind);
            let answer = timeout(self.timing.answer, answer).await;
            let page = match answer.map_err(|_| WatchError::Silent(self.timing.answer))? {
                // The server forgot the state that the pages are of: everything in one piece, then.
                Err(error) if error.meaning() == Meaning::Expired && parameters.limit.is_some() => {
                    (parameters.limit, parameters.continue_token) = (None, None);
                    continue;
                }
                page => page?,
            };
            let Page { items, version, continue_token } = page;
            let mut reports = Vec::new();
            items.into_iter().for_each(|item| self.list(item, listed, &mut reports));
            self.send(reports).await?;
            parameters.continue_token = continue_token;
            if parameters.continue_token.is_none() {
                return Ok(version.ok_or(WatchError::Protocol("a list has no metadata.resourceVersion"))?);
            }
        }
    }

    /// A list is complete: deletes what is known and was not in it. If that is most of what is known, a second
    /// list must lack it too.
    async fn end_list(&mut self, client: &Client, listed: Listed) -> Result<(), End> {
        let mut missing = listed.missing(&self.known);
        if shrink::needs_confirmation(self.known.len(), missing.len()) {
            let plural = self.watched.resource.plural;
            self.say(Some(SourceProblem::new(
                ProblemKind::ShortList,
                plural,
                format!("a list lacks {} of {} {plural}", missing.len(), self.known.len()),
                "nothing is to be done: they are deleted if a second list lacks them too",
            )))
            .await?;
            sleep(self.timing.confirm).await;
            let mut second = Listed::default();
            self.pages(client, &mut second).await?;
            missing.retain(|key| !second.keys.contains(key));
        }
        missing.sort_unstable();
        let mut reports = Vec::new();
        for key in missing {
            self.known.remove(&key);
            reports.push(Report::Change(key.gone()));
        }
        // What could not be read and is gone, or was mended while nobody watched.
        let mended = self.unreadable.extract_if(.., |key, _| !listed.unreadable.contains(key));
        reports.extend(mended.map(|(_, problem)| Report::Problem(problem.resolve())));
        if self.watched.kind == Kind::Pod {
            reports.push(Report::Change(Change::AllPods));
        }
        self.send(reports).await?;
        self.succeeded().await?;
        self.say_listed().await
    }

    /// Passes on events until the watch ends; returns whether there were any.
    async fn follow(&mut self, events: &mut Events) -> Result<bool, End> {
        let mut had_events = false;
        let mut heard = Instant::now();
        loop {
            // One that was lost is not trusted before it has brought something, or stayed for a while.
            let is_lost = self.lost.is_some();
            let wait = if is_lost { self.timing.settled.min(self.timing.idle) } else { self.timing.idle };
            let batch = match events.next_batch(wait).await {
                Ok(Some(batch)) => batch,
                Err(WatchError::Silent(_)) if is_lost => {
                    self.say_found().await?;
                    continue;
                }
                // Nothing for long, or the end of the stream: the next turn goes on from the same version.
                Err(WatchError::Silent(_)) => {
                    self.silent = Some(heard);
                    return Ok(had_events);
                }
                Ok(None) => return Ok(had_events),
                Err(error) => return Err(error.into()),
            };
            heard = Instant::now();
            let mut reports = Vec::new();
            let mut failure: Option<WatchError> = None;
            for event in batch {
                match event {
                    WatchEvent::Upsert(item) => {
                        self.go_on_from(version_of(&item));
                        self.upsert(item, &mut reports);
                    }
                    WatchEvent::Deleted(item) => {
                        self.go_on_from(version_of(&item));
                        self.delete(item, &mut reports);
                    }
                    WatchEvent::Bookmark { version, .. } => self.go_on_from(version),
                    WatchEvent::Error(status) => failure = Some(WatchError::Event(status)),
                }
            }
            self.send(reports).await?;
            if let Some(failure) = failure {
                return Err(failure.into());
            }
            had_events = true;
            self.failures.expired = 0;
            self.say_found().await?;
        }
    }

    async fn open(&self, client: &Client, version: &str, initial: bool) -> Result<Events, WatchError> {
        let spread = self.timing.watch.mul_f64(1.0 + random_fraction());
        let parameters = WatchParams {
            label_selector: self.selectors.labels.clone(),
            field_selector: self.selectors.fields.clone(),
            timeout: u32::try_from(spread.as_secs()).ok(),
            bookmarks: true,
            send_initial_events: initial,
        };
        let request = Request::new(self.watched.resource.path()).watch(&parameters, version);
        let request = request.map_err(kube::Error::BuildRequest)?;
        let opened = timeout(self.timing.answer, Events::open(client, request, self.watched.kind)).await;
        opened.map_err(|_| WatchError::Silent(self.timing.answer))?
    }

    /// Passes an object of a list on, and notes that it was in it.
    fn list(&mut self, item: Item, listed: &mut Listed, reports: &mut Vec<Report>) {
        match &item {
            Ok((key, _)) => drop(listed.keys.insert(key.clone())),
            Err(unreadable) => {
                listed.keys.extend(unreadable.key.clone());
                listed.unreadable.insert(unreadable.key.clone());
            }
        }
        self.upsert(item, reports);
    }

    /// Passes the object on, unless it is known in this version. One that cannot be read stays as it was.
    fn upsert(&mut self, item: Item, reports: &mut Vec<Report>) {
        let (key, object) = match item {
            Ok(read) => read,
            Err(unreadable) => return self.skip(unreadable, reports),
        };
        self.is_readable(&key, reports);
        let version = object.version().unwrap_or_default();
        if self.known.get(&key) != Some(&version) || version.is_empty() {
            reports.push(Report::Change(object.change(&key)));
            self.known.insert(key, version);
        }
    }

    fn delete(&mut self, item: Item, reports: &mut Vec<Report>) {
        let key = match item {
            Ok((key, _)) => key,
            Err(Unreadable { key: Some(key), .. }) => key,
            Err(unreadable) => return self.skip(unreadable, reports),
        };
        self.is_readable(&key, reports);
        if self.known.remove(&key).is_some() {
            reports.push(Report::Change(key.gone()));
        }
    }

    /// Says that an object cannot be read. Asked again, the server would send the same.
    fn skip(&mut self, unreadable: Unreadable, reports: &mut Vec<Report>) {
        let Unreadable { key, version: _, why } = unreadable;
        let plural = self.watched.resource.plural;
        let (place, follows) = match &key {
            Some(key) if self.known.contains_key(key) => (key.to_string(), "what it was before still counts"),
            Some(key) => (key.to_string(), "it is skipped"),
            None => (plural.to_owned(), "an object that does not say which it is, is skipped"),
        };
        let problem = SourceProblem::new(
            ProblemKind::InvalidObject,
            place,
            format!("it cannot be read: {why}; {follows}"),
            format!("correct the object: look at it with kubectl get {plural} -o yaml"),
        );
        let before = self.unreadable.insert(key, problem.clone());
        if before.as_ref() == Some(&problem) {
            return;
        }
        reports.extend(before.map(|before| Report::Problem(before.resolve())));
        reports.push(Report::Problem(problem));
    }

    /// An object could be read, or is gone: what was said of it is no longer so.
    fn is_readable(&mut self, key: &ObjectKey, reports: &mut Vec<Report>) {
        if self.unreadable.is_empty() {
            return;
        }
        let said = self.unreadable.remove(&Some(key.clone()));
        reports.extend(said.map(|problem| Report::Problem(problem.resolve())));
    }

    fn go_on_from(&mut self, version: Option<String>) {
        if version.is_some() {
            self.version = version;
            self.failures.from_version = 0;
        }
    }

    async fn send(&self, reports: Vec<Report>) -> Result<(), End> {
        if reports.is_empty() {
            return Ok(());
        }
        self.reports.send(reports).await.map_err(|_| End::Stopped)
    }

    /// There is no watch that works, from now on or since it fell silent.
    async fn say_lost(&mut self) -> Result<(), End> {
        let silent = self.silent.take();
        if self.lost.is_some() {
            return Ok(());
        }
        self.lost = Some(silent.unwrap_or_else(Instant::now));
        self.say_watch().await
    }

    /// There is a watch that works, or none is needed.
    async fn say_found(&mut self) -> Result<(), End> {
        self.silent = None;
        if self.lost.take().is_none() {
            return Ok(());
        }
        self.say_watch().await
    }

    async fn say_watch(&self) -> Result<(), End> {
        let lost = self.lost.map(Instant::into_std);
        self.send(vec![Report::Watch(WatchState { plural: self.watched.resource.plural, lost })]).await
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
        self.send(vec![Report::Listed(self.watched.kind)]).await
    }

    async fn say(&mut self, trouble: Option<SourceProblem>) -> Result<(), End> {
        if self.trouble == trouble {
            return Ok(());
        }
        self.trouble.clone_from(&trouble);
        self.send(vec![Report::Trouble(self.watched.kind, trouble)]).await
    }

    /// Decides what to do after a failure, and says what is wrong.
    async fn failed(&mut self, attempt: &Attempt, error: &WatchError) -> Result<Option<Duration>, End> {
        let resource = self.watched.resource;
        let plural = resource.plural;
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
        let problem = error.problem(resource, self.servers.url(attempt), self.servers.origin());
        if let Some(without) = self.watched.without
            && (error.is_not_found() || error.is_forbidden())
        {
            let what = format!("{}; {without}", problem.what);
            self.say(Some(SourceProblem { kind: ProblemKind::ApiMissing, what, ..problem })).await?;
            self.say_listed().await?;
            self.say_found().await?;
            return Ok(Some(self.timing.optional));
        }
        self.say_lost().await?;
        // Whatever is wrong with the version, a list puts it right.
        if self.version.is_some() && error.may_be_version() {
            self.failures.from_version += 1;
            if self.failures.from_version >= TRIES_FROM_VERSION {
                self.failures.from_version = 0;
                self.version = None;
            }
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
        let speaks = self.watched.kind == Kind::Service || problem.place == plural;
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

/// Whether a kind has a watch that works.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WatchState {
    /// Like `endpointslices`.
    pub plural: &'static str,
    /// Since when there has been none.
    pub lost: Option<std::time::Instant>,
}

/// What a list held.
#[derive(Default)]
struct Listed {
    keys: HashSet<ObjectKey>,
    /// What of it could not be read.
    unreadable: HashSet<Option<ObjectKey>>,
}

impl Listed {
    fn missing(&self, known: &HashMap<ObjectKey, String>) -> Vec<ObjectKey> {
        known.keys().filter(|key| !self.keys.contains(*key)).cloned().collect()
    }
}

fn version_of(item: &Item) -> Option<String> {
    match item {
        Ok((_, object)) => Object::version(object),
        Err(unreadable) => unreadable.version.clone(),
    }
}
