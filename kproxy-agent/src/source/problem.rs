//! What can be wrong with a source, as values that can be counted, shown, and cleared again.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

macro_rules! problem_kinds {
    ($($(#[$doc:meta])* $variant:ident = $label:literal;)*) => {
        /// What kind of problem: the label of its metric.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
        #[serde(rename_all = "camelCase")]
        pub enum ProblemKind {
            $($(#[$doc])* $variant,)*
        }

        impl ProblemKind {
            /// All kinds, for metrics that show zeroes.
            pub const ALL: &[ProblemKind] = &[$(ProblemKind::$variant,)*];

            /// As in metrics.
            pub fn label(self) -> &'static str {
                match self {
                    $(ProblemKind::$variant => $label,)*
                }
            }
        }
    };
}

problem_kinds! {
    /// Text that is no YAML or JSON.
    Syntax = "syntax";
    /// An object of a kind or version that is not read.
    UnknownKind = "unknown_kind";
    /// An object whose fields do not fit its kind, or that lacks its name.
    InvalidObject = "invalid_object";
    /// The same object in two places.
    Duplicate = "duplicate";
    /// A file that cannot be read, or holds no text, or too much.
    UnreadableFile = "unreadable_file";
    /// A file without anything in it.
    EmptyFile = "empty_file";
    /// A path of `--manifests` that is not there.
    MissingPath = "missing_path";
    /// Changes of a folder cannot be followed by inotify.
    NotFollowed = "not_followed";
    /// The API server cannot be reached.
    Connection = "connection";
    /// The API server's certificate is not accepted, or ours is not.
    Tls = "tls";
    /// The API server does not know who we are (401), or the credentials cannot be read.
    Authentication = "authentication";
    /// The API server does not let us (403).
    Authorization = "authorization";
    /// The API server does not have an API, or does not let us use one that is not necessary.
    ApiMissing = "api_missing";
    /// The API server answered with another error, or not as the API says.
    ApiError = "api_error";
    /// This node's Node object is not there.
    NodeMissing = "node_missing";
    /// A list came back without most of what is known; it is being confirmed.
    ShortList = "short_list";
}

impl ProblemKind {
    /// Whether someone must act before kproxy can do its work; else one object or file was skipped.
    fn must_act(self) -> bool {
        match self {
            ProblemKind::Connection
            | ProblemKind::Tls
            | ProblemKind::Authentication
            | ProblemKind::Authorization
            | ProblemKind::ApiError
            | ProblemKind::MissingPath => true,
            ProblemKind::Syntax
            | ProblemKind::UnknownKind
            | ProblemKind::InvalidObject
            | ProblemKind::Duplicate
            | ProblemKind::UnreadableFile
            | ProblemKind::EmptyFile
            | ProblemKind::NotFollowed
            | ProblemKind::ApiMissing
            | ProblemKind::NodeMissing
            | ProblemKind::ShortList => false,
        }
    }
}

/// Something that is wrong with a source. Two with the same kind, place and text are the same problem.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceProblem {
    /// What kind.
    pub kind: ProblemKind,
    /// Where: a file, or a resource of the API.
    pub place: String,
    /// What happened.
    pub what: String,
    /// What to do.
    pub mend: String,
    /// It is no longer so.
    pub resolved: bool,
}

impl SourceProblem {
    /// A problem that is there.
    pub(super) fn new(
        kind: ProblemKind,
        place: impl Into<String>,
        what: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        SourceProblem { kind, place: place.into(), what: what.into(), mend: mend.into(), resolved: false }
    }

    /// The same problem, gone.
    pub(super) fn resolve(mut self) -> Self {
        self.resolved = true;
        self
    }

    /// One line for it: error where someone must act, warn where something was skipped, info when it is gone.
    pub(super) fn log(&self) {
        let kind = self.kind.label();
        if self.resolved {
            tracing::info!(kind, place = %self.place, "resolved: {}", self.what);
        } else if self.kind.must_act() {
            tracing::error!(kind, place = %self.place, "{}; {}", self.what, self.mend);
        } else {
            tracing::warn!(kind, place = %self.place, "{}; {}", self.what, self.mend);
        }
    }
}

/// The problems that are there now, for status and metrics: feed it every [`super::Event::Problem`].
#[derive(Clone, Default, Debug)]
pub struct PresentProblems(BTreeSet<SourceProblem>);

impl PresentProblems {
    /// Takes in what a source said.
    pub fn note(&mut self, problem: SourceProblem) {
        if problem.resolved {
            self.0.remove(&SourceProblem { resolved: false, ..problem });
        } else {
            self.0.insert(problem);
        }
    }

    /// All that are there, by kind and place.
    pub fn iter(&self) -> impl Iterator<Item = &SourceProblem> {
        self.0.iter()
    }

    /// How many there are of each kind; kinds without one are left out.
    pub fn count_by_kind(&self) -> BTreeMap<ProblemKind, usize> {
        let mut counts = BTreeMap::new();
        for problem in &self.0 {
            *counts.entry(problem.kind).or_default() += 1;
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_counts_once_until_it_is_resolved() {
        let broken = SourceProblem::new(ProblemKind::Syntax, "a.yaml", "line 1", "mend it");
        let other = SourceProblem::new(ProblemKind::Syntax, "b.yaml", "line 1", "mend it");
        let mut present = PresentProblems::default();
        for problem in [&broken, &broken, &other] {
            present.note(problem.clone());
        }
        assert_eq!(present.count_by_kind(), BTreeMap::from([(ProblemKind::Syntax, 2)]));
        present.note(broken.resolve());
        assert_eq!(present.iter().collect::<Vec<_>>(), [&other]);
        present.note(other.resolve());
        assert!(present.count_by_kind().is_empty());
    }
}
