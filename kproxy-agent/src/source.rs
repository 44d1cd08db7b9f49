//! Where the objects come from: an API server ([`kubernetes`]) or files ([`manifests`]), behind one stream of
//! [`Event`]s. Nothing is computed here; what an object means is the model's.

pub mod kubernetes;
pub mod manifests;
mod object;
mod problem;
mod shrink;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::model::Change;

pub use problem::{PresentProblems, ProblemKind, SourceProblem};

/// How many events may wait for the agent before a source stops reading. A batch of watch events fits, a list
/// of ten thousand objects does not: the objects that were not taken yet stay in the socket or in the file.
const EVENTS_WAITING: usize = 1024;

/// What a source tells the agent, in order.
#[derive(Debug)]
pub enum Event {
    /// An object came, changed or went.
    Change(Change),
    /// Every kind has had its first full list. Sent once; before it the changes are part of the whole, and
    /// nothing may be written.
    Synced,
    /// A kind of object has a watch that works, or no longer.
    Watch(kubernetes::WatchState),
    /// Something is wrong with the source, or (`resolved`) no longer.
    Problem(SourceProblem),
    /// The changes since the last flush belong together: a good time to plan. Sent after every batch, also
    /// after [`Event::Synced`]; never two without something between them.
    Flush,
}

/// A source that runs. Dropping it stops it.
#[derive(Debug)]
pub struct Source {
    events: mpsc::Receiver<Event>,
    task: JoinHandle<()>,
}

impl Source {
    /// The next event; waits for one. `None` when the source has ended, which it does only when it panicked.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// Starts `run` as a task of its own, which sends into this source's channel.
    fn spawn<F>(run: impl FnOnce(mpsc::Sender<Event>) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, events) = mpsc::channel(EVENTS_WAITING);
        Source { events, task: tokio::spawn(run(sender)) }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.task.abort();
    }
}
