//! What an API server sends: lists and lines of a watch, cut into objects before any of them is read. What one
//! of them holds is no matter of the others.

use std::borrow::Cow;
use std::error::Error;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use axum::http::{HeaderValue, Request, header};
use futures::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};
use futures::{FutureExt, TryFutureExt};
use kube::Client;
use kube::core::Status;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::timeout;

use super::trouble::WatchError;
use crate::api;
use crate::source::object::{Kind, Object, ObjectKey, Unreadable, version};

/// How many events are taken together.
const BATCH: usize = 512;

/// The longest line that is read. etcd takes objects of 1.5 MiB, unless it is told otherwise.
const MAX_LINE: usize = 32 << 20;

/// The annotation of the bookmark that ends a streaming list (KEP-3157).
const LIST_END: &str = "k8s.io/initial-events-end";

/// An object, or what can be told of one that cannot be read.
pub(super) type Item = Result<(ObjectKey, Object), Unreadable>;

/// What a watch sends.
#[derive(Debug)]
pub(super) enum WatchEvent {
    /// An object came or changed.
    Upsert(Item),
    /// An object went.
    Deleted(Item),
    /// Everything up to this version was sent.
    Bookmark {
        version: Option<String>,
        /// With this, the list is complete.
        ends_list: bool,
    },
    /// The watch failed.
    Error(Box<Status>),
}

/// A list, or one page of it.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) items: Vec<Item>,
    pub(super) version: Option<String>,
    pub(super) continue_token: Option<String>,
}

/// Asks for a page.
pub(super) async fn page(client: &Client, request: Request<Vec<u8>>, kind: Kind) -> Result<Page, WatchError> {
    let mut body = Vec::new();
    let mut reader = Box::pin(client.request_stream(request).await?);
    reader.read_to_end(&mut body).await.map_err(kube::Error::ReadEvents)?;
    read_page(&String::from_utf8_lossy(&body), kind)
}

fn read_page(text: &str, kind: Kind) -> Result<Page, WatchError> {
    #[derive(Deserialize)]
    struct List<'a> {
        #[serde(borrow)]
        items: Option<Vec<&'a RawValue>>,
    }
    let no_list = |_| WatchError::Protocol("the answer is no list");
    let list: List<'_> = serde_json::from_str(text).map_err(no_list)?;
    let bare: api::Bare = serde_json::from_str(text).map_err(no_list)?;
    let metadata = bare.metadata.get().cloned().unwrap_or_default();
    let items = list.items.unwrap_or_default().into_iter();
    Ok(Page {
        items: items.map(|item| Object::from_json(kind, item.get())).collect(),
        version: version(&metadata.resource_version),
        continue_token: metadata.continue_token.text().filter(|text| !text.is_empty()).map(str::to_owned),
    })
}

/// The events of a watch.
pub(super) struct Events {
    reader: Pin<Box<dyn AsyncBufRead + Send>>,
    kind: Kind,
    /// What was read of a line whose end is not there yet.
    line: Vec<u8>,
    /// The line is too long: what comes of it is thrown away.
    is_too_long: bool,
}

impl Events {
    /// Begins a watch.
    pub(super) async fn open(
        client: &Client,
        mut request: Request<Vec<u8>>,
        kind: Kind,
    ) -> Result<Self, WatchError> {
        // Kubernetes from 1.37 on compresses each event by itself, which kube's decompression does not follow.
        request.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let reader = Box::pin(client.request_stream(request).await?);
        Ok(Events { reader, kind, line: Vec::new(), is_too_long: false })
    }

    /// The next event, and all others that are there already. `None` at the end of the watch.
    pub(super) async fn next_batch(&mut self, wait: Duration) -> Result<Option<Vec<WatchEvent>>, WatchError> {
        let first = timeout(wait, self.next()).await.map_err(|_| WatchError::Silent(wait))??;
        let Some(first) = first else { return Ok(None) };
        let mut batch = vec![first];
        // What fails or ends here does so again when it is asked for.
        while batch.len() < BATCH
            && let Some(Ok(Some(event))) = self.next().now_or_never()
        {
            batch.push(event);
        }
        Ok(Some(batch))
    }

    /// The next event. Nothing is lost when this is dropped before it is done.
    async fn next(&mut self) -> Result<Option<WatchEvent>, WatchError> {
        loop {
            let there = match self.reader.fill_buf().map_err(Ended::of).await {
                Ok(there) => there,
                Err(Ended(None)) => return Ok(None),
                Err(Ended(Some(error))) => return Err(kube::Error::ReadEvents(error).into()),
            };
            // A line without an end was cut off: what it says comes again.
            if there.is_empty() {
                return Ok(None);
            }
            let end = there.iter().position(|byte| *byte == b'\n');
            let part = &there[..end.unwrap_or(there.len())];
            self.is_too_long |= self.line.len() + part.len() > MAX_LINE;
            if !self.is_too_long {
                self.line.extend_from_slice(part);
            }
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume_unpin(used);
            if end.is_none() {
                continue;
            }
            let line = std::mem::take(&mut self.line);
            if std::mem::take(&mut self.is_too_long) {
                let why = format!("a line of the watch has more than {} MiB", MAX_LINE >> 20);
                return Ok(Some(WatchEvent::Upsert(Err(unreadable(why)))));
            }
            if !line.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some(read_event(&String::from_utf8_lossy(&line), self.kind)));
            }
        }
    }
}

/// A watch that was cut off; with the error, where it is one.
struct Ended(Option<io::Error>);

impl Ended {
    /// Servers and what stands before them end watches without a last word: that is an end like any other.
    fn of(error: io::Error) -> Self {
        let first: &(dyn Error + 'static) = &error;
        let mut causes =
            std::iter::successors(Some(first), |error: &&(dyn Error + 'static)| (*error).source());
        let is_end = causes.any(|cause| {
            let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
            matches!(kind, Some(io::ErrorKind::UnexpectedEof | io::ErrorKind::TimedOut))
                || cause.to_string().contains("unexpected EOF during chunk")
        });
        Ended((!is_end).then_some(error))
    }
}

fn read_event(line: &str, kind: Kind) -> WatchEvent {
    #[derive(Deserialize)]
    struct Line<'a> {
        #[serde(borrow, rename = "type")]
        type_: Cow<'a, str>,
        #[serde(borrow)]
        object: &'a RawValue,
    }
    let Line { type_, object } = match serde_json::from_str(line) {
        Ok(line) => line,
        Err(error) => return WatchEvent::Upsert(Err(unreadable(format!("a line of the watch: {error}")))),
    };
    let text = object.get();
    match &*type_ {
        "ADDED" | "MODIFIED" => WatchEvent::Upsert(Object::from_json(kind, text)),
        "DELETED" => WatchEvent::Deleted(Object::from_json(kind, text)),
        "BOOKMARK" => {
            let bare: api::Bare = serde_json::from_str(text).unwrap_or_default();
            let metadata = bare.metadata.get();
            let annotations = metadata.and_then(|metadata| metadata.annotations.get());
            WatchEvent::Bookmark {
                version: metadata.and_then(|metadata| version(&metadata.resource_version)),
                ends_list: annotations.is_some_and(|annotations| annotations.contains(LIST_END)),
            }
        }
        "ERROR" => {
            let status: api::Status = serde_json::from_str(text).unwrap_or_default();
            let code = status.code.get().and_then(|code| u16::try_from(*code).ok());
            let message = status.message.text().unwrap_or("an error without a message");
            let code = code.filter(|code| *code >= 400).unwrap_or(500);
            WatchEvent::Error(Box::new(Status::failure(message, "").with_code(code)))
        }
        other => WatchEvent::Upsert(Err(unreadable(format!("an event of the unknown type {other:.32}")))),
    }
}

fn unreadable(why: String) -> Unreadable {
    Unreadable { key: None, version: None, why }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_whatever_it_holds() {
        for (object, code, message) in [
            (r#"{"kind": "Status", "code": 410, "message": "too old"}"#, 410, "too old"),
            (r#"{"code": 0, "message": null}"#, 500, "an error without a message"),
            (r#"{"code": "x", "message": {}}"#, 500, "an error without a message"),
            ("null", 500, "an error without a message"),
        ] {
            let line = format!(r#"{{"type": "ERROR", "object": {object}}}"#);
            let WatchEvent::Error(status) = read_event(&line, Kind::Service) else { panic!("{line}") };
            assert_eq!((status.code, status.message.as_str()), (code, message));
        }
    }

    #[test]
    fn a_list_is_cut_into_objects_that_do_not_harm_each_other() {
        let deep = "[".repeat(50_000) + &"]".repeat(50_000);
        let text = format!(
            r#"{{"metadata": {{"resourceVersion": "9", "continue": "next"}}, "items": [
                {{"metadata": {{"name": "a"}}}}, null, {deep},
                {{"metadata": {{"name": "b", "labels": {{"a": 1e999}}}}}}, {{"metadata": {{"name": "c"}}}}]}}"#
        );
        let page = read_page(&text, Kind::Service).expect("it is a list");
        let names = page.items.iter().map(|item| match item {
            Ok((key, _)) => key.name.clone(),
            Err(unreadable) => format!("!{:?}", unreadable.key.as_ref().map(|key| &*key.name)),
        });
        assert_eq!(names.collect::<Vec<_>>(), ["a", "!None", "!None", "!Some(\"b\")", "c"]);
        assert_eq!((page.version.as_deref(), page.continue_token.as_deref()), (Some("9"), Some("next")));
        assert!(read_page("{}", Kind::Service).is_ok_and(|page| page.items.is_empty()));
        for text in ["", "<html>", "[]", r#"{"items": 7}"#] {
            assert!(read_page(text, Kind::Service).is_err(), "{text}");
        }
    }
}
