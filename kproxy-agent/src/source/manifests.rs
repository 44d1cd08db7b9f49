//! Objects from files: YAML and JSON below the paths of `--manifests`, followed by inotify.
//!
//! Every file is read as Kubernetes would read it: Services, EndpointSlices, the own Node, ServiceCIDRs and Pods,
//! several documents to a file, lists too. What cannot be read is named in a [`SourceProblem`], and the rest is
//! passed on. A file that was good and is broken now keeps what it had until it can be read again; but after a
//! restart nothing is known of what it had.

mod documents;
mod files;
mod holdings;
mod json;
mod parallel;
mod pending;
mod plain;
mod reader;
mod reading;
mod said;
mod watches;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use notify::EventKind;
use notify::event::{ModifyKind, RenameMode};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::problem::SourceProblem;
use super::{Event, Source};
use crate::model::Change;
use pending::Pending;
use reader::{Reader, Work};
use watches::Watches;

/// Everything is looked through this often, whatever inotify says: it does not see what another host changes
/// on a network file system.
const SCAN_INTERVAL: Duration = Duration::from_secs(30);

/// Before most of the objects are deleted, the files are looked at again after this time.
const CONFIRM: Duration = Duration::from_secs(1);

/// What the files held, read once.
#[derive(Debug)]
pub struct Loaded {
    /// All objects.
    pub changes: Vec<Change>,
    /// What is wrong with the files, a missing path included.
    pub problems: Vec<SourceProblem>,
}

/// Reads the files once. Of Nodes only the one called `node_name` is taken.
pub fn load(paths: &[PathBuf], node_name: &str) -> Loaded {
    let mut loaded = Loaded { changes: Vec::new(), problems: Vec::new() };
    let mut reader = Reader::new(absolute(paths), node_name.to_owned());
    reader.step(Work { scan: true, ..Work::default() }, &mut |_| {}, &mut |event| match event {
        Event::Change(change) => loaded.changes.push(change),
        Event::Problem(problem) => loaded.problems.push(problem),
        Event::Synced | Event::Watch(_) | Event::Flush => {}
    });
    loaded
}

/// Reads the files and follows them from then on. [`Event::Synced`] waits until all paths exist.
/// Must be called within a tokio runtime.
pub fn follow(paths: &[PathBuf], node_name: &str) -> Source {
    let paths = absolute(paths);
    let node_name = node_name.to_owned();
    Source::spawn(|events| run(paths, node_name, events))
}

async fn run(paths: Vec<PathBuf>, node_name: String, events: mpsc::Sender<Event>) {
    let (sender, mut said) = mpsc::unbounded_channel();
    let mut watches = Watches::new(&paths, sender);
    let mut reader = Reader::new(paths.clone(), node_name);
    let mut pending = Pending::default();
    let mut work = Some(Work { scan: true, ..Work::default() });
    let mut next_scan = Instant::now() + SCAN_INTERVAL;
    let mut confirm_at: Option<Instant> = None;
    loop {
        if let Some(work) = work.take() {
            let events = events.clone();
            let done = spawn_blocking(move || {
                // Nobody listens when the source is being stopped.
                let mut emit = |event| drop(events.blocking_send(event));
                reader.step(work, &mut |folder| watches.watch(folder), &mut emit);
                reader.say_not_followed(watches.failed(), &mut emit);
                (reader, watches)
            });
            // The step panicked: the source ends, which its reader sees.
            let Ok(done) = done.await else { return };
            (reader, watches) = done;
            confirm_at = reader.doubts().then(|| confirm_at.unwrap_or_else(|| Instant::now() + CONFIRM));
        }
        let wake =
            [pending.due(), confirm_at, Some(next_scan)].into_iter().flatten().min().unwrap_or(next_scan);
        tokio::select! {
            () = events.closed() => return,
            Some(said) = said.recv() => note(said, &paths, &reader, &mut watches, &mut pending),
            () = tokio::time::sleep_until(wake.into()) => {
                let now = Instant::now();
                let confirm = confirm_at.is_some_and(|at| at <= now);
                let scan = confirm || next_scan <= now;
                if scan {
                    next_scan = now + SCAN_INTERVAL;
                }
                work = pending.take(now, scan);
                if let (true, Some(work)) = (confirm, &mut work) {
                    (confirm_at, work.confirm) = (None, true);
                }
            }
        }
    }
}

fn note(
    said: watches::Said,
    paths: &[PathBuf],
    reader: &Reader,
    watches: &mut Watches,
    pending: &mut Pending,
) {
    let now = Instant::now();
    let event = match said {
        Ok(event) if event.need_rescan() => return pending.look(now),
        Ok(event) => event,
        Err(error) => {
            tracing::debug!(%error, "inotify failed: looking through all manifests");
            return pending.look(now);
        }
    };
    for path in &event.paths {
        let signal = pending::signal(event.kind, path, path.is_symlink(), paths, reader.links());
        if matches!(event.kind, EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(RenameMode::From)))
        {
            watches.forget(path);
        }
        pending.note(signal, path, now);
    }
}

/// The paths from the root on, as inotify and the problems name them.
fn absolute(paths: &[PathBuf]) -> Vec<PathBuf> {
    paths.iter().map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone())).collect()
}

#[cfg(test)]
mod tests;
