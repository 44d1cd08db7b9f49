//! What inotify said and what is to be read because of it, when: editors and tools write a file in several
//! steps, and none of the steps between is a state of the folder. Pure: time comes in as an argument.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use notify::EventKind;
use notify::event::{AccessKind, AccessMode, CreateKind, ModifyKind, RemoveKind, RenameMode};

use super::files;
use super::reader::Work;

/// After a change, others that belong to it are waited for, each for this long…
const SETTLE: Duration = Duration::from_millis(20);
/// …but not longer than this together.
const SETTLE_MAX: Duration = Duration::from_millis(200);
/// A file that is written is read when it is closed. Where that is not seen: this long after the last write…
const WRITE: Duration = Duration::from_secs(1);
/// …but not later than this after the first.
const WRITE_MAX: Duration = Duration::from_secs(5);
/// A file that goes away may be about to be replaced: some editors rename the old one before they write.
const REPLACE: Duration = Duration::from_millis(250);

/// What one event says about one path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Signal {
    /// Nothing.
    Ignore,
    /// The file has its new content.
    Changed,
    /// The file is being written.
    Writing,
    /// The file went away.
    Gone,
    /// Folders or links changed: find out what there is.
    Look,
}

/// What an event of this kind at this path says. `is_link`: a link is there now.
pub(super) fn signal(
    kind: EventKind,
    path: &Path,
    is_link: bool,
    paths: &[PathBuf],
    links: &BTreeSet<PathBuf>,
) -> Signal {
    let is_manifest = is_manifest(path, paths);
    if !is_manifest && !concerns(path, paths, links) {
        return Signal::Ignore;
    }
    // Where a link leads to, and what is on the way to a path that does not exist yet, is found by a scan.
    let or_look = |signal| if is_manifest { signal } else { Signal::Look };
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) if is_manifest || links.contains(path) => {
            or_look(Signal::Changed)
        }
        EventKind::Modify(ModifyKind::Data(_)) if is_manifest => Signal::Writing,
        EventKind::Access(_) | EventKind::Modify(ModifyKind::Data(_)) => Signal::Ignore,
        EventKind::Create(CreateKind::Folder) | EventKind::Remove(RemoveKind::Folder) => Signal::Look,
        EventKind::Create(_) if is_link => Signal::Look,
        EventKind::Create(_) if is_manifest => Signal::Writing,
        EventKind::Create(_) => Signal::Ignore,
        EventKind::Remove(_) => or_look(Signal::Gone),
        EventKind::Modify(ModifyKind::Name(RenameMode::From)) => or_look(Signal::Gone),
        // Comes after From and To, and says the same.
        EventKind::Modify(ModifyKind::Name(RenameMode::Both)) => Signal::Ignore,
        EventKind::Modify(ModifyKind::Name(_)) => or_look(Signal::Changed),
        EventKind::Modify(_) => or_look(Signal::Changed),
        EventKind::Any | EventKind::Other => Signal::Look,
    }
}

/// What waits to be read.
#[derive(Default, Debug)]
pub(super) struct Pending {
    scan: bool,
    changed: BTreeSet<PathBuf>,
    /// When the first of what is settling came, and when it counts as settled.
    settling: Option<(Instant, Instant)>,
    /// Files that are not read for now: since when, and until when.
    busy: BTreeMap<PathBuf, (Instant, Instant)>,
}

impl Pending {
    /// Takes in what was said about a path.
    pub(super) fn note(&mut self, signal: Signal, path: &Path, now: Instant) {
        match signal {
            Signal::Ignore => {}
            Signal::Changed => {
                self.busy.remove(path);
                self.changed.insert(path.to_owned());
                self.settle(now);
            }
            Signal::Writing => {
                self.changed.remove(path);
                let (since, until) = self.busy.entry(path.to_owned()).or_insert((now, now));
                *until = (now + WRITE).min(*since + WRITE_MAX);
            }
            Signal::Gone => {
                self.changed.remove(path);
                self.busy.insert(path.to_owned(), (now, now + REPLACE));
            }
            Signal::Look => self.look(now),
        }
    }

    /// Asks for a scan of everything.
    pub(super) fn look(&mut self, now: Instant) {
        self.scan = true;
        self.settle(now);
    }

    /// When [`Pending::take`] will have something.
    pub(super) fn due(&self) -> Option<Instant> {
        let settled = self.settling.map(|(_, until)| until);
        self.busy.values().map(|&(_, until)| until).chain(settled).min()
    }

    /// What is to be read now; `None` if nothing is due. `scan`: everything is to be looked through anyway.
    pub(super) fn take(&mut self, now: Instant, scan: bool) -> Option<Work> {
        if !scan && self.due().is_none_or(|due| due > now) {
            return None;
        }
        let mut work = Work { scan, ..Work::default() };
        if self.settling.is_some_and(|(_, until)| until <= now) {
            self.settling = None;
            work.scan |= std::mem::take(&mut self.scan);
            work.files = std::mem::take(&mut self.changed);
        }
        let (done, busy): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.busy).into_iter().partition(|&(_, (_, until))| until <= now);
        work.files.extend(done.into_keys());
        work.busy = busy.keys().cloned().collect();
        self.busy = busy;
        Some(work)
    }

    fn settle(&mut self, now: Instant) {
        let since = self.settling.map_or(now, |(since, _)| since);
        self.settling = Some((since, (now + SETTLE).min(since + SETTLE_MAX)));
    }
}

/// Whether the path is one of `--manifests`, or a file below one that is read by its name.
fn is_manifest(path: &Path, paths: &[PathBuf]) -> bool {
    paths.iter().any(|root| match path.strip_prefix(root) {
        Ok(below) if below.as_os_str().is_empty() => true,
        Ok(below) => files::is_manifest_name(path) && !below.ancestors().any(files::is_hidden),
        Err(_) => false,
    })
}

/// Whether a change there, of something that is no manifest, can change which manifests there are.
fn concerns(path: &Path, paths: &[PathBuf], links: &BTreeSet<PathBuf>) -> bool {
    links.contains(path) || paths.iter().any(|root| path.starts_with(root) || root.starts_with(path))
}

#[cfg(test)]
mod tests {
    use notify::event::DataChange;

    use super::*;

    const CLOSED: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));
    const WRITTEN: EventKind = EventKind::Modify(ModifyKind::Data(DataChange::Any));
    const CREATED: EventKind = EventKind::Create(CreateKind::File);
    const FROM: EventKind = EventKind::Modify(ModifyKind::Name(RenameMode::From));
    const TO: EventKind = EventKind::Modify(ModifyKind::Name(RenameMode::To));

    #[test]
    fn an_event_means_what_its_path_makes_of_it() {
        let paths = [PathBuf::from("/m"), PathBuf::from("/x/one.conf")];
        let links = BTreeSet::from([PathBuf::from("/elsewhere/target")]);
        for (kind, path, is_link, expected) in [
            (CLOSED, "/m/a.yaml", false, Signal::Changed),
            (WRITTEN, "/m/a.yaml", false, Signal::Writing),
            (CREATED, "/m/a.yaml", false, Signal::Writing),
            (CREATED, "/m/a.yaml", true, Signal::Look),
            (FROM, "/m/a.yaml", false, Signal::Gone),
            (TO, "/m/a.yaml", false, Signal::Changed),
            (EventKind::Remove(RemoveKind::File), "/m/sub/a.json", false, Signal::Gone),
            // Editors' files.
            (CREATED, "/m/.a.yaml.swp", false, Signal::Ignore),
            (WRITTEN, "/m/.a.yaml.swp", false, Signal::Ignore),
            (CLOSED, "/m/a.yaml~", false, Signal::Ignore),
            // A mounted ConfigMap.
            (TO, "/m/..data", true, Signal::Look),
            (CLOSED, "/m/..2026_01/a.yaml", false, Signal::Ignore),
            // Folders.
            (EventKind::Create(CreateKind::Folder), "/m/sub", false, Signal::Look),
            (EventKind::Remove(RemoveKind::Folder), "/m", false, Signal::Look),
            (EventKind::Create(CreateKind::Folder), "/x", false, Signal::Look),
            // A single file, whatever its name; its neighbours are nothing to us.
            (CLOSED, "/x/one.conf", false, Signal::Changed),
            (CLOSED, "/x/other.yaml", false, Signal::Ignore),
            (TO, "/x/other.yaml", false, Signal::Ignore),
            // The other end of a link.
            (CLOSED, "/elsewhere/target", false, Signal::Look),
            (WRITTEN, "/elsewhere/target", false, Signal::Ignore),
            (CLOSED, "/elsewhere/neighbour", false, Signal::Ignore),
        ] {
            assert_eq!(signal(kind, Path::new(path), is_link, &paths, &links), expected, "{kind:?} {path}");
        }
    }

    #[test]
    fn a_file_is_read_when_it_is_closed_not_while_it_is_written() {
        let path = Path::new("/m/a.yaml");
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut pending = Pending::default();
        pending.note(Signal::Writing, path, at(0));
        pending.note(Signal::Writing, path, at(900));
        assert_eq!(pending.take(at(1_000), false), None);
        // Something else asks for a scan: the half-written file is left alone.
        pending.look(at(1_000));
        let busy = BTreeSet::from([path.to_owned()]);
        assert_eq!(pending.take(at(1_100), false), Some(Work { scan: true, busy, ..Work::default() }));
        pending.note(Signal::Changed, path, at(1_200));
        assert_eq!(pending.due(), Some(at(1_220)));
        let files = BTreeSet::from([path.to_owned()]);
        assert_eq!(pending.take(at(1_220), false), Some(Work { files, ..Work::default() }));
        assert_eq!(pending.due(), None);
    }

    #[test]
    fn a_file_that_is_never_closed_is_read_in_the_end() {
        let path = Path::new("/m/a.yaml");
        let start = Instant::now();
        let mut pending = Pending::default();
        for tenth in 0..60 {
            pending.note(Signal::Writing, path, start + Duration::from_millis(100 * tenth));
        }
        assert_eq!(pending.due(), Some(start + WRITE_MAX));
    }

    #[test]
    fn a_file_that_is_replaced_by_renaming_is_never_gone() {
        let path = Path::new("/m/a.yaml");
        let start = Instant::now();
        let mut pending = Pending::default();
        pending.note(Signal::Gone, path, start);
        pending.note(Signal::Writing, path, start + Duration::from_millis(100));
        assert_eq!(pending.take(start + REPLACE, false), None, "it is being written");
        pending.note(Signal::Changed, path, start + Duration::from_millis(400));
        assert!(pending.take(start + Duration::from_millis(420), false).is_some());
    }

    #[test]
    fn a_burst_is_waited_for_but_not_for_ever() {
        let start = Instant::now();
        let mut pending = Pending::default();
        for tens in 0..100_u64 {
            let name = PathBuf::from(format!("/m/{tens}.yaml"));
            pending.note(Signal::Changed, &name, start + Duration::from_millis(10 * tens));
        }
        assert_eq!(pending.due(), Some(start + SETTLE_MAX));
        assert_eq!(pending.take(start + SETTLE_MAX, false).map(|work| work.files.len()), Some(100));
    }
}
