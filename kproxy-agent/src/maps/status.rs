//! How every Service fares: pending, done since, failed with error and next try.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use crate::wanted::ServiceKey;

/// The pause after the first failure; it doubles with each further one.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest pause.
const LAST_RETRY: Duration = Duration::from_secs(60);

/// How the latest change of a Service fares.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Status {
    /// Not written yet.
    Pending {
        /// When the oldest change came that is not written.
        since: SystemTime,
    },
    /// The maps hold what is wanted.
    Done {
        /// When the last write was made.
        since: SystemTime,
    },
    /// Not, or not wholly, written. What served before still does.
    Failed {
        /// When the oldest change came that is not written.
        since: SystemTime,
        /// What failed, and what to do.
        error: String,
        /// How often it was tried.
        attempts: u32,
        /// When it is tried again; `None`: when the Service changes.
        next_try: Option<SystemTime>,
        /// Whether it failed for want of room: it is tried as soon as something becomes free.
        no_room: bool,
    },
}

impl Status {
    /// Whether it should be written now.
    pub fn is_due(&self, now: SystemTime) -> bool {
        match self {
            Self::Pending { .. } => true,
            Self::Done { .. } => false,
            Self::Failed { next_try, .. } => next_try.is_some_and(|next| next <= now),
        }
    }

    /// When the oldest change came that is not written; `None` when all are.
    pub fn waiting_since(&self) -> Option<SystemTime> {
        match self {
            Self::Pending { since } | Self::Failed { since, .. } => Some(*since),
            Self::Done { .. } => None,
        }
    }

    /// After a change.
    pub(super) fn changed(previous: Option<&Self>, now: SystemTime) -> Self {
        Self::Pending { since: previous.and_then(Self::waiting_since).unwrap_or(now) }
    }

    /// After a failure.
    pub(super) fn failed(previous: Option<&Self>, failure: Failure, now: SystemTime) -> Self {
        let since = previous.and_then(Self::waiting_since).unwrap_or(now);
        let earlier = match previous {
            Some(Self::Failed { attempts, .. }) => *attempts,
            _ => 0,
        };
        let pause = FIRST_RETRY.saturating_mul(1 << earlier.min(10)).min(LAST_RETRY);
        let next_try = failure.retry.then_some(now + pause);
        Self::Failed {
            since,
            error: failure.error,
            attempts: earlier + 1,
            next_try,
            no_room: failure.no_room,
        }
    }
}

/// Why something was not written.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub error: String,
    /// Whether trying the same again can help.
    pub retry: bool,
    pub no_room: bool,
}

/// The status of every Service that is served or should be, and of the node's addresses.
#[derive(Clone, Default, Debug)]
pub struct Statuses {
    services: BTreeMap<ServiceKey, Status>,
    /// Those that are not done: nearly always few, and asked for after every change.
    open: BTreeSet<ServiceKey>,
    pub(super) node: Option<Status>,
    /// What an earlier agent left and nobody wants, while it could not be removed.
    pub(super) leftovers: Option<Status>,
}

impl Statuses {
    /// Every Service.
    pub fn services(&self) -> impl Iterator<Item = (&ServiceKey, &Status)> {
        self.services.iter()
    }

    /// One Service; `None` if nothing is wanted of it and nothing is left.
    pub fn service(&self, key: &ServiceKey) -> Option<&Status> {
        self.services.get(key)
    }

    /// Every Service that could not be written at the last try, why, and whether for want of room.
    pub fn failed(&self) -> impl Iterator<Item = (&ServiceKey, &str, bool)> {
        self.open.iter().filter_map(|key| match self.services.get(key)? {
            Status::Failed { error, no_room, .. } => Some((key, error.as_str(), *no_room)),
            Status::Pending { .. } | Status::Done { .. } => None,
        })
    }

    /// Whether something could not be written that should be possible. That a Service does not fit, or cannot be stored
    /// at all, is its own trouble: it is named, the rest is served, and no restart would help.
    pub fn is_failing(&self) -> bool {
        let is_failing = |status: &Status| {
            matches!(
                status,
                Status::Failed { no_room: false, next_try: Some(_), .. } | Status::Pending { .. }
            )
        };
        self.open_statuses().any(is_failing)
    }

    /// The node's addresses that answer NodePorts; `None` before they were known.
    pub fn node(&self) -> Option<&Status> {
        self.node.as_ref()
    }

    /// What was found in the maps at start and nobody wants; `None` unless removing it failed.
    pub fn leftovers(&self) -> Option<&Status> {
        self.leftovers.as_ref()
    }

    /// When the next failed write should be tried again.
    pub fn next_try(&self) -> Option<SystemTime> {
        let next = |status: &Status| match status {
            Status::Failed { next_try, .. } => *next_try,
            Status::Pending { since } => Some(*since),
            Status::Done { .. } => None,
        };
        self.open_statuses().filter_map(next).min()
    }

    /// When the oldest change came that is not written.
    pub fn waiting_since(&self) -> Option<SystemTime> {
        self.open_statuses().filter_map(Status::waiting_since).min()
    }

    pub(super) fn set(&mut self, key: &ServiceKey, status: Status) {
        if matches!(status, Status::Done { .. }) {
            self.open.remove(key);
        } else if !self.open.contains(key) {
            self.open.insert(key.clone());
        }
        match self.services.get_mut(key) {
            Some(known) => *known = status,
            None => {
                self.services.insert(key.clone(), status);
            }
        }
    }

    pub(super) fn remove(&mut self, key: &ServiceKey) {
        self.open.remove(key);
        self.services.remove(key);
    }

    /// Something became free: what failed for want of room is due now.
    pub(super) fn room_was_made(&mut self, now: SystemTime) {
        let due = |status: &mut Status| {
            if let Status::Failed { next_try, no_room: true, .. } = status {
                *next_try = Some(now);
            }
        };
        self.node.iter_mut().for_each(due);
        for key in &self.open {
            self.services.get_mut(key).into_iter().for_each(due);
        }
    }

    fn open_statuses(&self) -> impl Iterator<Item = &Status> {
        self.open.iter().filter_map(|key| self.services.get(key)).chain(&self.node).chain(&self.leftovers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn failure() -> Failure {
        Failure { error: "map frontend: no memory".to_owned(), retry: true, no_room: false }
    }

    #[test]
    fn pauses_double_up_to_a_minute() {
        let mut status = Status::changed(None, at(100));
        let mut pauses = Vec::new();
        for _ in 0..9 {
            status = Status::failed(Some(&status), failure(), at(100));
            let Status::Failed { next_try: Some(next), .. } = &status else { panic!("{status:?}") };
            pauses.push(next.duration_since(at(100)).unwrap().as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(status.waiting_since(), Some(at(100)), "the first change still waits");
    }

    #[test]
    fn a_change_is_due_at_once_and_what_cannot_help_is_not_retried() {
        let failed = Status::failed(None, Failure { retry: false, ..failure() }, at(5));
        assert!(!failed.is_due(at(1_000)));
        let changed = Status::changed(Some(&failed), at(9));
        assert!(changed.is_due(at(9)));
        assert_eq!(changed.waiting_since(), Some(at(5)));
    }

    #[test]
    fn what_does_not_fit_is_no_failure_of_the_whole() {
        let mut statuses = Statuses::default();
        let key = ServiceKey { namespace: "default".to_owned(), name: "a".to_owned() };
        assert!(!statuses.is_failing());
        for (status, expected) in [
            (Status::failed(None, Failure { no_room: true, ..failure() }, at(5)), false),
            (Status::failed(None, Failure { retry: false, ..failure() }, at(5)), false),
            (Status::failed(None, failure(), at(5)), true),
            (Status::Done { since: at(5) }, false),
            (Status::Pending { since: at(5) }, true),
        ] {
            statuses.set(&key, status.clone());
            assert_eq!(statuses.is_failing(), expected, "{status:?}");
        }
    }

    #[test]
    fn room_makes_those_due_that_had_none() {
        let mut statuses = Statuses::default();
        for (name, no_room) in [("a", true), ("b", false)] {
            let key = ServiceKey { namespace: "default".to_owned(), name: name.to_owned() };
            statuses.set(&key, Status::failed(None, Failure { no_room, ..failure() }, at(50)));
        }
        assert_eq!(statuses.next_try(), Some(at(51)));
        statuses.room_was_made(at(50));
        let due: Vec<bool> = statuses.services().map(|(_, status)| status.is_due(at(50))).collect();
        assert_eq!(due, [true, false]);
    }
}
