//! What is to be written as Events, and when. No I/O, no clock.
//!
//! All that there is to say about an object for one reason is one Event. It is written again only when there is
//! something new to say, when it comes back after it was gone, and before the API server forgets it (an hour, by
//! default). A board is bounded, and so is the rate at which it gives out.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::EventReason;
use crate::model::ObjectRef;

/// How many topics there can be: what is beyond is told in the log and the metrics alone.
const MAX_TOPICS: usize = 1_000;

/// Events that may be written at once.
const BURST: u32 = 20;

/// After that, one in so long.
const INTERVAL: Duration = Duration::from_secs(1);

/// The least time between two Events of one topic: what changes all the time is told once a minute.
const CHANGE: Duration = Duration::from_secs(60);

/// What was said, went and is back is not said again before this.
const REPEAT: Duration = Duration::from_secs(600);

/// What stays is written again before the API server forgets it (kube-apiserver's `--event-ttl` is an hour).
const REFRESH: Duration = Duration::from_secs(1_800);

/// Where Events are forbidden it is tried again after this.
const FORBIDDEN: Duration = Duration::from_secs(600);

/// Where the API server cannot take one, it is tried again after this; each further time twice as long, up to the
/// limit.
const LATER: Duration = Duration::from_secs(2);
const LATEST: Duration = Duration::from_secs(300);

/// How long an Event's note may be, in bytes (validation of events.k8s.io/v1).
const NOTE: usize = 1_024;

/// What an Event is about.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Topic {
    /// On which object.
    pub object: ObjectRef,
    /// Why.
    pub reason: EventReason,
}

/// An Event to be written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notice {
    /// On which object.
    pub object: ObjectRef,
    /// Why.
    pub reason: EventReason,
    /// What people read.
    pub note: String,
    /// 1 the first time; more where the same came back after it had gone.
    pub count: i32,
}

/// What became of a notice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is there.
    Written,
    /// The object is not there any more.
    NoObject,
    /// The API server refused this one.
    Refused(String),
    /// The API server lets us write none.
    Forbidden(String),
    /// Not now.
    Later(String),
}

/// What to do.
#[derive(PartialEq, Eq, Debug)]
pub enum Next {
    /// Write this, and say what became of it.
    Write(Notice),
    /// Nothing, until then or until something changes.
    Wait(Option<Instant>),
}

/// All topics, and when each is due.
#[derive(Debug)]
pub struct Board {
    topics: BTreeMap<Topic, Said>,
    due: BTreeSet<(Instant, Topic)>,
    /// When the burst is whole again: as a token bucket, in time.
    full_at: Instant,
    /// Nothing before this.
    paused_until: Option<Instant>,
    /// How often in a row the API server could take none.
    failures: u32,
}

/// What there is to say about a topic, and what was said.
#[derive(Default, Debug)]
struct Said {
    lines: BTreeSet<String>,
    due: Option<Instant>,
    last: Option<Last>,
}

#[derive(Debug)]
struct Last {
    note: String,
    at: Instant,
    count: i32,
    /// Whether nothing was to be said since.
    has_gone: bool,
}

impl Board {
    /// With nothing on it.
    pub fn new(now: Instant) -> Self {
        Self { topics: BTreeMap::new(), due: BTreeSet::new(), full_at: now, paused_until: None, failures: 0 }
    }

    /// `line` is true of the topic until it is withdrawn.
    pub fn say(&mut self, topic: Topic, line: String, now: Instant) {
        if self.topics.len() >= MAX_TOPICS && !self.topics.contains_key(&topic) {
            return;
        }
        let said = self.topics.entry(topic.clone()).or_default();
        if said.lines.insert(line) {
            self.plan(&topic, now);
        }
    }

    /// Something is true of the topic, which `line` says if nothing else does yet: words that differ each time
    /// are no news.
    pub fn keep(&mut self, topic: Topic, line: &str, now: Instant) {
        if self.topics.get(&topic).is_none_or(|said| said.lines.is_empty()) {
            self.say(topic, line.to_owned(), now);
        }
    }

    /// `line` is not true any more.
    pub fn withdraw(&mut self, topic: &Topic, line: &str, now: Instant) {
        let Some(said) = self.topics.get_mut(topic) else { return };
        if said.lines.remove(line) && said.lines.is_empty() {
            self.end(topic, now);
        }
    }

    /// Nothing is true of the topic any more.
    pub fn withdraw_all(&mut self, topic: &Topic, now: Instant) {
        let Some(said) = self.topics.get_mut(topic) else { return };
        if !std::mem::take(&mut said.lines).is_empty() {
            self.end(topic, now);
        }
    }

    /// Nothing is true any more of the topics with this reason, except for these.
    pub fn withdraw_others(&mut self, reason: EventReason, except: &BTreeSet<Topic>, now: Instant) {
        let is_over = |topic: &&Topic| topic.reason == reason && !except.contains(*topic);
        let over: Vec<_> = self.topics.keys().filter(is_over).cloned().collect();
        for topic in over {
            self.withdraw_all(&topic, now);
        }
    }

    /// What to do now.
    pub fn next(&mut self, now: Instant) -> Next {
        let Some((at, topic)) = self.due.first().cloned() else { return Next::Wait(None) };
        let allowed = self.full_at.checked_sub(INTERVAL * (BURST - 1)).unwrap_or(now);
        let at = at.max(allowed).max(self.paused_until.unwrap_or(now));
        if at > now {
            return Next::Wait(Some(at));
        }
        self.due.pop_first();
        let Some(said) = self.topics.get_mut(&topic) else { return self.next(now) };
        said.due = None;
        if said.lines.is_empty() {
            // Kept until now so as not to repeat it at once.
            self.topics.remove(&topic);
            return self.next(now);
        }
        self.full_at = self.full_at.max(now) + INTERVAL;
        let note = note(&said.lines);
        let again = said.last.as_ref().filter(|last| last.note == note);
        let count = again.map_or(1, |last| last.count.saturating_add(i32::from(last.has_gone)));
        Next::Write(Notice { object: topic.object, reason: topic.reason, note, count })
    }

    /// What became of a notice that [`next`](Self::next) gave.
    pub fn written(&mut self, notice: &Notice, outcome: &Outcome, now: Instant) {
        let pause = match outcome {
            Outcome::Forbidden(_) => Some(FORBIDDEN),
            Outcome::Later(_) => Some(LATER.saturating_mul(1 << self.failures.min(10)).min(LATEST)),
            Outcome::Written | Outcome::NoObject | Outcome::Refused(_) => None,
        };
        self.paused_until = pause.map(|pause| now + pause);
        self.failures = if pause.is_some() { self.failures.saturating_add(1) } else { 0 };
        let topic = Topic { object: notice.object.clone(), reason: notice.reason };
        let Some(said) = self.topics.get_mut(&topic) else { return };
        if pause.is_none() {
            let has_gone = said.lines.is_empty();
            said.last = Some(Last { note: notice.note.clone(), at: now, count: notice.count, has_gone });
        }
        self.plan(&topic, now);
    }

    /// There is nothing to say about the topic any more. It is remembered for a while, so that what comes and goes is not
    /// repeated each time.
    fn end(&mut self, topic: &Topic, now: Instant) {
        match self.topics.get_mut(topic).map(|said| &mut said.last) {
            Some(Some(last)) => last.has_gone = true,
            // Nobody was told: nobody has to be.
            _ => {
                self.set_due(topic, None);
                self.topics.remove(topic);
                return;
            }
        }
        self.plan(topic, now);
    }

    /// Says when the topic is due.
    fn plan(&mut self, topic: &Topic, now: Instant) {
        let Some(said) = self.topics.get(topic) else { return };
        let due = match &said.last {
            None => now,
            Some(last) if said.lines.is_empty() => last.at + REPEAT,
            Some(last) if last.note != note(&said.lines) => now.max(last.at + CHANGE),
            Some(last) if last.has_gone => now.max(last.at + REPEAT),
            Some(last) => last.at + REFRESH,
        };
        self.set_due(topic, Some(due));
    }

    fn set_due(&mut self, topic: &Topic, due: Option<Instant>) {
        let Some(said) = self.topics.get_mut(topic) else { return };
        if let Some(before) = std::mem::replace(&mut said.due, due) {
            self.due.remove(&(before, topic.clone()));
        }
        if let Some(due) = due {
            self.due.insert((due, topic.clone()));
        }
    }
}

/// As many lines as an Event holds, and how many more there are.
fn note(lines: &BTreeSet<String>) -> String {
    /// Room for the words about those that are left out.
    const ROOM: usize = 32;
    let mut note = String::new();
    for (at, line) in lines.iter().enumerate() {
        let separator = if at == 0 { "" } else { "; " };
        if note.len() + separator.len() + line.len() > NOTE - ROOM {
            let left = lines.len() - at;
            if at == 0 {
                note.push_str(&line[..line.floor_char_boundary(NOTE - ROOM)]);
                note.push('…');
            }
            let left = left - usize::from(at == 0);
            if left > 0 {
                note.push_str(&format!("; and {left} more"));
            }
            break;
        }
        note.push_str(separator);
        note.push_str(line);
    }
    note
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topic(name: &str) -> Topic {
        let object = ObjectRef::node(name);
        Topic { object, reason: EventReason::InvalidValue }
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    /// Writes everything that is due, successfully: the notes with their counts.
    fn write_all(board: &mut Board, now: Instant) -> Vec<(String, i32)> {
        let mut notes = Vec::new();
        while let Next::Write(notice) = board.next(now) {
            board.written(&notice, &Outcome::Written, now);
            notes.push((notice.note, notice.count));
        }
        notes
    }

    fn said(note: &str, count: i32) -> Vec<(String, i32)> {
        vec![(note.to_owned(), count)]
    }

    #[test]
    fn what_belongs_together_is_one_event() {
        let now = Instant::now();
        let mut board = Board::new(now);
        board.say(topic("a"), "second".into(), now);
        board.say(topic("a"), "first".into(), now);
        assert_eq!(write_all(&mut board, now), said("first; second", 1));
        assert_eq!(board.next(now), Next::Wait(Some(now + REFRESH)));
        // Something new, a little later: not before the minute is over, and once.
        let later = now + seconds(5);
        board.say(topic("a"), "third".into(), later);
        board.say(topic("a"), "fourth".into(), later);
        assert_eq!(board.next(later), Next::Wait(Some(now + CHANGE)));
        assert_eq!(write_all(&mut board, now + CHANGE), said("first; fourth; second; third", 1));
    }

    #[test]
    fn what_comes_and_goes_is_told_every_ten_minutes() {
        let start = Instant::now();
        let mut board = Board::new(start);
        let mut told = Vec::new();
        for second in 0..3_000 {
            let now = start + seconds(second);
            if second % 2 == 0 {
                board.say(topic("a"), "it flaps".into(), now);
            } else {
                board.withdraw(&topic("a"), "it flaps", now);
            }
            told.extend(write_all(&mut board, now).into_iter().map(|(_, count)| (second, count)));
        }
        assert_eq!(told, [(0, 1), (600, 2), (1_200, 3), (1_800, 4), (2_400, 5)]);
        // What is gone is forgotten.
        assert_eq!(write_all(&mut board, start + seconds(3_600)), []);
        assert!(board.topics.is_empty() && board.due.is_empty(), "{board:?}");
    }

    #[test]
    fn what_was_never_told_and_is_gone_is_not_told() {
        let now = Instant::now();
        let mut board = Board::new(now);
        board.say(topic("a"), "short".into(), now);
        board.withdraw(&topic("a"), "short", now);
        assert_eq!(board.next(now), Next::Wait(None));
        assert!(board.topics.is_empty());
    }

    #[test]
    fn what_stays_is_told_again_before_it_is_forgotten() {
        let now = Instant::now();
        let mut board = Board::new(now);
        board.say(topic("a"), "bad".into(), now);
        assert_eq!(write_all(&mut board, now), said("bad", 1));
        assert_eq!(write_all(&mut board, now + REFRESH - seconds(1)), []);
        assert_eq!(write_all(&mut board, now + REFRESH), said("bad", 1));
    }

    #[test]
    fn a_state_is_told_in_the_words_of_its_beginning() {
        let now = Instant::now();
        let mut board = Board::new(now);
        board.keep(topic("a"), "5 more do not fit", now);
        board.keep(topic("b"), "1 more does not fit", now);
        assert_eq!(write_all(&mut board, now).len(), 2);
        board.keep(topic("a"), "4 more do not fit", now + seconds(100));
        board.withdraw_others(EventReason::InvalidValue, &[topic("a")].into(), now + seconds(100));
        assert_eq!(board.next(now + seconds(100)), Next::Wait(Some(now + REPEAT)), "b is to be forgotten");
        assert_eq!(write_all(&mut board, now + REPEAT), []);
        assert_eq!(board.topics.len(), 1);
    }

    #[test]
    fn many_are_told_one_a_second() {
        let start = Instant::now();
        let mut board = Board::new(start);
        for at in 0..2_000 {
            board.say(topic(&at.to_string()), "bad".into(), start);
        }
        assert_eq!(board.topics.len(), MAX_TOPICS);
        assert_eq!(write_all(&mut board, start).len(), BURST as usize);
        for second in 1..=5 {
            assert_eq!(write_all(&mut board, start + seconds(second)).len(), 1);
        }
        assert_eq!(write_all(&mut board, start + seconds(15)).len(), 10);
    }

    #[test]
    fn an_api_server_that_does_not_want_any_is_left_alone() {
        let now = Instant::now();
        let mut board = Board::new(now);
        for name in ["a", "b", "c"] {
            board.say(topic(name), "bad".into(), now);
        }
        let mut fail = |now, outcome| {
            let Next::Write(notice) = board.next(now) else { panic!("{:?}", board.next(now)) };
            board.written(&notice, &outcome, now);
            let Next::Wait(Some(until)) = board.next(now) else { panic!("it is tried at once") };
            until
        };
        let later = || Outcome::Later("no connection".into());
        let mut pauses = Vec::new();
        let mut at = now;
        for _ in 0..9 {
            let until = fail(at, later());
            pauses.push(until.duration_since(at).as_secs());
            at = until;
        }
        assert_eq!(pauses, [2, 4, 8, 16, 32, 64, 128, 256, 300]);
        let until = fail(at, Outcome::Forbidden("no".into()));
        assert_eq!(until - at, FORBIDDEN);
        assert_eq!(write_all(&mut board, until).len(), 3, "nothing was lost");
    }

    #[test]
    fn what_is_refused_does_not_come_back_at_once() {
        let now = Instant::now();
        let mut board = Board::new(now);
        board.say(topic("a"), "bad".into(), now);
        let Next::Write(notice) = board.next(now) else { panic!("it is due") };
        board.written(&notice, &Outcome::Refused("invalid".into()), now);
        assert_eq!(board.next(now), Next::Wait(Some(now + REFRESH)));
    }

    #[test]
    fn notes_are_as_long_as_the_api_allows() {
        let lines = |count: usize, length: usize| -> BTreeSet<String> {
            (0..count).map(|at| format!("{at:03}{}", "ü".repeat(length))).collect()
        };
        let cut = note(&lines(100, 50));
        assert!(cut.len() <= NOTE && cut.ends_with("; and 91 more"), "{cut}");
        let cut = note(&lines(2, 2_000));
        assert!(cut.len() <= NOTE && cut.ends_with("ü…; and 1 more"), "{cut}");
        assert_eq!(note(&lines(2, 0)), "000; 001");
    }
}
