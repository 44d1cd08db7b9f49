//! An API server for tests, on 127.0.0.1: lists with pages, watches with versions and bookmarks, streaming lists,
//! and everything that can go wrong with them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The server; it ends with this.
pub(super) struct FakeApi {
    pub(super) address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    state: Mutex<ApiState>,
    /// Sent to at every change of the state.
    changed: watch::Sender<()>,
}

/// What the server has, and how it behaves.
#[derive(Default)]
pub(super) struct ApiState {
    version: u64,
    /// By resource (`services`), namespace and name.
    objects: BTreeMap<(String, String, String), Stored>,
    history: Vec<HistoryEvent>,
    /// Watches from a version before this one get 410.
    oldest: u64,
    /// Watches that began before this number are ended.
    watch_epoch: u64,
    /// Status codes for requests of a resource.
    pub(super) refuse: BTreeMap<String, u16>,
    /// Streaming lists are answered with 422, as where the feature is off.
    pub(super) no_streaming: bool,
    /// Watches bring no bookmarks, but the one that ends a streaming list.
    pub(super) no_bookmarks: bool,
    /// Watches of these resources are opened, and fail with their first event.
    pub(super) failing_watches: BTreeSet<String>,
    /// So many lists of a resource come back empty.
    pub(super) short_lists: BTreeMap<String, u32>,
    /// The requests that came: path and query.
    pub(super) requests: Vec<String>,
}

/// An object as it is sent: any text.
#[derive(Clone)]
struct Stored {
    version: u64,
    text: String,
}

struct HistoryEvent {
    resource: String,
    kind: &'static str,
    object: Stored,
}

impl FakeApi {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port of 127.0.0.1 can be bound");
        let address = listener.local_addr().expect("the listener has an address");
        let shared = Arc::new(Shared { state: Mutex::default(), changed: watch::channel(()).0 });
        let router = Router::new().fallback(answer).with_state(shared.clone());
        let task = tokio::spawn(async move {
            axum::serve(listener, router).await.expect("the fake API serves");
        });
        FakeApi { address, shared, task }
    }

    /// The state, to look at or to change.
    pub(super) fn state(&self) -> MutexGuard<'_, ApiState> {
        self.shared.lock()
    }

    /// Makes or replaces an object. Its version is set.
    pub(super) fn put(&self, resource: &str, object: Value) {
        let name = object["metadata"]["name"].as_str().expect("objects of the tests have names").to_owned();
        self.put_text(resource, &name, |version| {
            let mut object = object;
            object["metadata"]["resourceVersion"] = json!(version);
            object.to_string()
        });
    }

    /// Makes or replaces an object by what `text` makes of its version.
    pub(super) fn put_text(&self, resource: &str, name: &str, text: impl FnOnce(String) -> String) {
        let mut state = self.shared.lock();
        state.version += 1;
        let object = Stored { version: state.version, text: text(state.version.to_string()) };
        let old = state.objects.insert(key(resource, name), object.clone());
        let kind = if old.is_some() { "MODIFIED" } else { "ADDED" };
        state.remember(resource, kind, object);
        self.shared.changed.send_replace(());
    }

    /// Deletes an object.
    pub(super) fn delete(&self, resource: &str, name: &str) {
        let mut state = self.shared.lock();
        if let Some(mut object) = state.objects.remove(&key(resource, name)) {
            state.version += 1;
            let of = |version: u64| format!("\"resourceVersion\":\"{version}\"");
            object.text = object.text.replace(&of(object.version), &of(state.version));
            object.version = state.version;
            state.remember(resource, "DELETED", object);
        }
        self.shared.changed.send_replace(());
    }

    /// Ends all watches.
    pub(super) fn end_watches(&self) {
        self.shared.lock().watch_epoch += 1;
        self.shared.changed.send_replace(());
    }

    /// Forgets the history: who was not connected has to list again.
    pub(super) fn compact(&self) {
        let mut state = self.shared.lock();
        state.version += 1;
        state.oldest = state.version;
        state.history.clear();
    }

    /// The names of a resource, with the version of each.
    pub(super) fn names(&self, resource: &str) -> BTreeMap<String, String> {
        let state = self.shared.lock();
        let of = state.objects.iter().filter(|((of, ..), _)| of == resource);
        of.map(|((_, _, name), object)| (name.clone(), object.version.to_string())).collect()
    }
}

impl Drop for FakeApi {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ApiState> {
        self.state.lock().expect("no test thread panicked with the state")
    }
}

impl ApiState {
    fn remember(&mut self, resource: &str, kind: &'static str, object: Stored) {
        let event = HistoryEvent { resource: resource.to_owned(), kind, object };
        self.history.push(event);
    }

    fn list(&mut self, resource: &str) -> Vec<String> {
        if let Some(left) = self.short_lists.get_mut(resource).filter(|left| **left > 0) {
            *left -= 1;
            return Vec::new();
        }
        let of = self.objects.iter().filter(|((of, ..), _)| of == resource);
        of.map(|(_, object)| object.text.clone()).collect()
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let uri = request.uri().clone();
    let query = uri.query().unwrap_or_default();
    let parameter = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    let resource = uri.path().rsplit('/').next().unwrap_or_default().to_owned();
    let mut state = shared.lock();
    state.requests.push(uri.to_string());
    if let Some(&code) = state.refuse.get(&resource) {
        return failure(code, &format!("the test refuses {resource}"));
    }
    if parameter("watch") == Some("true") {
        let initial = parameter("sendInitialEvents") == Some("true");
        if initial && state.no_streaming {
            return failure(
                422,
                "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
            );
        }
        let from: u64 = parameter("resourceVersion").unwrap_or_default().parse().unwrap_or_default();
        if !initial && from < state.oldest {
            return failure(410, "too old resource version");
        }
        if state.failing_watches.contains(&resource) {
            // As kube-apiserver when it cannot decode what etcd has.
            return event_line("ERROR", &status(500, "the test lets it fail").to_string()).into_response();
        }
        let mut lines: Vec<String> = Vec::new();
        let mut sent = from;
        if initial {
            lines.extend(state.list(&resource).into_iter().map(|object| event_line("ADDED", &object)));
            lines.push(bookmark(state.version, true));
            sent = state.version;
        }
        let watch = WatchState { resource, sent, epoch: state.watch_epoch, first: Some(lines) };
        drop(state);
        let changed = shared.changed.subscribe();
        return Body::from_stream(stream::unfold((shared, changed, watch), next_chunk)).into_response();
    }
    let all = state.list(&resource);
    let begin: usize = parameter("continue").and_then(|token| token.parse().ok()).unwrap_or_default();
    let limit: usize = parameter("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
    let end = begin.saturating_add(limit).min(all.len());
    let token = if end < all.len() { end.to_string() } else { String::new() };
    let metadata = json!({"resourceVersion": state.version.to_string(), "continue": token});
    let items = all[begin.min(end)..end].join(",");
    format!(r#"{{"kind":"List","apiVersion":"v1","metadata":{metadata},"items":[{items}]}}"#).into_response()
}

struct WatchState {
    resource: String,
    /// Everything up to this version was sent.
    sent: u64,
    epoch: u64,
    first: Option<Vec<String>>,
}

type Chunk = Result<String, std::io::Error>;
type Watching = (Arc<Shared>, watch::Receiver<()>, WatchState);

async fn next_chunk((shared, mut changed, mut watch): Watching) -> Option<(Chunk, Watching)> {
    loop {
        if let Some(lines) = watch.first.take().filter(|lines| !lines.is_empty()) {
            return Some((Ok(lines.concat()), (shared, changed, watch)));
        }
        {
            let state = shared.lock();
            if state.watch_epoch > watch.epoch {
                return None;
            }
            if watch.sent < state.oldest {
                let line =
                    json!({"type": "ERROR", "object": status(410, "too old resource version")}).to_string();
                watch.epoch = 0;
                watch.sent = u64::MAX;
                return Some((Ok(line + "\n"), (shared.clone(), changed, watch)));
            }
            let new = state
                .history
                .iter()
                .filter(|event| event.object.version > watch.sent && event.resource == watch.resource);
            let lines: String = new.map(|event| event_line(event.kind, &event.object.text)).collect();
            if watch.sent < state.version {
                watch.sent = state.version;
                let bookmark =
                    if state.no_bookmarks { String::new() } else { bookmark(state.version, false) };
                drop(state);
                let lines = lines + &bookmark;
                if lines.is_empty() {
                    continue;
                }
                return Some((Ok(lines), (shared, changed, watch)));
            }
        }
        changed.changed().await.ok()?;
    }
}

fn event_line(kind: &str, object: &str) -> String {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}

fn bookmark(version: u64, ends_list: bool) -> String {
    let annotations = if ends_list { json!({"k8s.io/initial-events-end": "true"}) } else { json!({}) };
    let metadata = json!({"resourceVersion": version.to_string(), "annotations": annotations});
    event_line("BOOKMARK", &json!({"kind": "Service", "apiVersion": "v1", "metadata": metadata}).to_string())
}

fn failure(code: u16, message: &str) -> Response {
    let http = StatusCode::from_u16(code).expect("a status code");
    (http, status(code, message).to_string()).into_response()
}

fn status(code: u16, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "code": code})
}

fn key(resource: &str, name: &str) -> (String, String, String) {
    (resource.to_owned(), "default".to_owned(), name.to_owned())
}
