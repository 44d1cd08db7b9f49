//! Which problems were said about what, so that each is said once, and that it is gone when it is.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::source::Event;
use crate::source::object::ObjectKey;
use crate::source::problem::SourceProblem;

/// What the problems are about: those about one thing replace each other.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum About {
    /// The paths of `--manifests`.
    Paths,
    /// A file.
    File(Arc<Path>),
    /// An object that is in several files.
    Object(Arc<ObjectKey>),
    /// That most of the objects vanished.
    ShortList,
    /// That folders cannot be watched.
    Watches,
}

/// The problems that are there.
#[derive(Default, Debug)]
pub(super) struct Said(BTreeMap<About, Vec<SourceProblem>>);

impl Said {
    /// These are the problems with `about` now: says, and logs, which are new and which are gone.
    pub(super) fn about(&mut self, about: About, problems: Vec<SourceProblem>, emit: &mut dyn FnMut(Event)) {
        let old = if problems.is_empty() {
            self.0.remove(&about).unwrap_or_default()
        } else {
            self.0.insert(about, problems.clone()).unwrap_or_default()
        };
        let mut say = |problem: SourceProblem| {
            problem.log();
            emit(Event::Problem(problem));
        };
        old.iter()
            .filter(|problem| !problems.contains(problem))
            .cloned()
            .for_each(|gone| say(gone.resolve()));
        problems.into_iter().filter(|problem| !old.contains(problem)).for_each(say);
    }
}
