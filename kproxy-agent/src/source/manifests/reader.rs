//! Reads what changed below the paths, and passes on the difference by object.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::documents::{Flaw, Parsed};
use super::files::{self, ReadError, Scan, Stamp};
use super::holdings::Holdings;
use super::parallel;
use super::reading::{self, Content, DocumentRead, FileRead, KnownDocuments, Language};
use super::said::{About, Said};
use crate::model::Change;
use crate::source::Event;
use crate::source::object::ObjectKey;
use crate::source::problem::{ProblemKind, SourceProblem};
use crate::source::shrink;

/// How many names a sentence lists.
const NAMES_LISTED: usize = 3;

/// What is to be looked at.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(super) struct Work {
    /// All paths, for files that came, changed or went.
    pub(super) scan: bool,
    /// These files, which were said to have changed.
    pub(super) files: BTreeSet<PathBuf>,
    /// These files are being written: they are left alone, whatever a scan says.
    pub(super) busy: BTreeSet<PathBuf>,
    /// This is the second look after [`Reader::doubts`]: what is missing now is gone.
    pub(super) confirm: bool,
}

/// What the files held when they were read last.
#[derive(Debug)]
pub(super) struct Reader {
    paths: Vec<PathBuf>,
    node_name: String,
    files: BTreeMap<Arc<Path>, FileState>,
    holdings: Holdings,
    /// Objects that no file has any more, but too many to believe it at once.
    doubtful: BTreeSet<Arc<ObjectKey>>,
    /// Where links lead that were found by the last scan.
    links: BTreeSet<PathBuf>,
    said: Said,
    synced: bool,
}

/// What a file held.
#[derive(Default, Debug)]
struct FileState {
    stamp: Option<Stamp>,
    /// The objects of each document, by the document's text: what is known is not parsed again. Documents with
    /// a flaw are not in here.
    documents: Arc<KnownDocuments>,
    /// All objects that are served from this file, also those of a document that is broken now.
    keys: HashSet<Arc<ObjectKey>>,
}

/// A file that is being applied, document by document.
struct Pass {
    path: Arc<Path>,
    old: FileState,
    new: FileState,
    known: KnownDocuments,
    flaws: Vec<Flaw>,
    repeated: BTreeSet<Arc<ObjectKey>>,
}

impl Reader {
    /// Nothing was read yet.
    pub(super) fn new(paths: Vec<PathBuf>, node_name: String) -> Self {
        Reader {
            paths,
            node_name,
            files: BTreeMap::new(),
            holdings: Holdings::default(),
            doubtful: BTreeSet::new(),
            links: BTreeSet::new(),
            said: Said::default(),
            synced: false,
        }
    }

    /// Whether most of the objects vanished at once, so that a second look is wanted before they are deleted.
    pub(super) fn doubts(&self) -> bool {
        !self.doubtful.is_empty()
    }

    /// The files outside the paths, or hidden in them, that links below the paths lead to.
    pub(super) fn links(&self) -> &BTreeSet<PathBuf> {
        &self.links
    }

    /// Reads what `work` says and emits what it changed, problems that came and went, and a flush if there was
    /// anything. `on_folder` is called with folders to watch, see [`files::scan`].
    pub(super) fn step(&mut self, work: Work, on_folder: &mut dyn FnMut(&Path), emit: &mut dyn FnMut(Event)) {
        let emitted = Cell::new(false);
        let mut emit = |event| {
            emitted.set(true);
            emit(event);
        };
        let mut wanted: BTreeSet<Arc<Path>> = work.files.into_iter().map(Arc::from).collect();
        let mut all_there = true;
        if work.scan {
            let scan = files::scan(&self.paths, on_folder);
            all_there =
                self.paths.iter().all(|path| !scan.missing.contains(path) && !scan.unreadable.contains(path));
            self.compare(&scan, &mut wanted);
            self.links = scan.links;
            self.said.about(About::Paths, scan.problems, &mut emit);
        }
        wanted.retain(|path| !work.busy.contains(&**path));

        // Objects whose holders changed: decided on when all files have been read, so that one that moved from
        // one file to another is not gone in between.
        let mut touched = HashSet::new();
        self.read(wanted, &mut touched, &mut emit);
        // The file that counts now may not be one that changed. It is parsed afresh; if it cannot be, what was
        // passed on last stays, and the file is read again when it changes.
        let stale: BTreeSet<_> = touched.iter().filter_map(|key| self.holdings.stale(key).cloned()).collect();
        for path in &stale {
            if let Some(file) = self.files.get_mut(path) {
                file.documents = Arc::default();
            }
        }
        self.read(stale, &mut touched, &mut emit);

        self.say_duplicates(&touched, &mut emit);
        self.delete_orphans(touched, work.confirm, &mut emit);
        if !self.synced && work.scan && all_there {
            self.synced = true;
            emit(Event::Change(Change::AllPods));
            emit(Event::Synced);
        }
        if emitted.get() {
            emit(Event::Flush);
        }
    }

    /// Adds the files to read, or to find gone, by what a scan found.
    fn compare(&self, scan: &Scan, wanted: &mut BTreeSet<Arc<Path>>) {
        for (path, stamp) in &scan.files {
            if self.files.get(path.as_path()).and_then(|file| file.stamp) != Some(*stamp) {
                wanted.insert(path.as_path().into());
            }
        }
        let not_seen = |path: &Path| {
            !scan.files.contains_key(path) && !scan.unreadable.iter().any(|folder| path.starts_with(folder))
        };
        wanted.extend(self.files.keys().filter(|path| not_seen(path)).cloned());
    }

    fn read(
        &mut self,
        paths: BTreeSet<Arc<Path>>,
        touched: &mut HashSet<Arc<ObjectKey>>,
        emit: &mut dyn FnMut(Event),
    ) {
        let node_name = self.node_name.clone();
        let jobs: Vec<_> = paths
            .into_iter()
            .map(|path| {
                let known = self.files.get(&path).map(|file| file.documents.clone()).unwrap_or_default();
                (path, known)
            })
            .collect();
        let mut long = Vec::new();
        parallel::in_order(
            jobs,
            |(path, known)| reading::file(path, &known, &node_name),
            |FileRead { path, content }| match content {
                Err(ReadError::Gone) => self.remove_file(&path, touched, emit),
                Err(ReadError::Flaw(flaw)) => {
                    let mut pass = self.begin(path, None);
                    pass.flaws.push(flaw);
                    self.finish(pass, touched, emit);
                }
                Ok((stamp, Content::Empty)) => {
                    let mut pass = self.begin(path, Some(stamp));
                    pass.flaws.push(Flaw {
                        kind: ProblemKind::EmptyFile,
                        what: "it is empty".to_owned(),
                        mend: "remove it, or write a comment into it, if nothing is to be served from it"
                            .to_owned(),
                    });
                    self.finish(pass, touched, emit);
                }
                Ok((stamp, Content::Long(text))) => long.push((path, stamp, text)),
                Ok((stamp, Content::Documents(documents))) => {
                    let mut pass = self.begin(path, Some(stamp));
                    documents.into_iter().for_each(|document| self.apply(&mut pass, document, touched, emit));
                    self.finish(pass, touched, emit);
                }
            },
        );
        for (path, stamp, text) in long {
            let language = Language::of(&path);
            let mut pass = self.begin(path, Some(stamp));
            let known = pass.old.documents.clone();
            parallel::in_order(
                reading::pieces(language.split(&text)),
                |piece| reading::documents(language, piece, &known, &node_name),
                |documents| {
                    documents.into_iter().for_each(|document| self.apply(&mut pass, document, touched, emit))
                },
            );
            self.finish(pass, touched, emit);
        }
    }

    fn remove_file(
        &mut self,
        path: &Path,
        touched: &mut HashSet<Arc<ObjectKey>>,
        emit: &mut dyn FnMut(Event),
    ) {
        if let Some((path, file)) = self.files.remove_entry(path) {
            self.said.about(About::File(path.clone()), Vec::new(), emit);
            for key in file.keys {
                self.holdings.release(&path, &key);
                touched.insert(key);
            }
        }
    }

    fn begin(&mut self, path: Arc<Path>, stamp: Option<Stamp>) -> Pass {
        Pass {
            old: self.files.remove(&path).unwrap_or_default(),
            new: FileState { stamp, ..FileState::default() },
            known: KnownDocuments::new(),
            flaws: Vec::new(),
            repeated: BTreeSet::new(),
            path,
        }
    }

    fn apply(
        &mut self,
        pass: &mut Pass,
        document: DocumentRead,
        touched: &mut HashSet<Arc<ObjectKey>>,
        emit: &mut dyn FnMut(Event),
    ) {
        let Some(Parsed { objects, flaws }) = document.parsed else {
            let Some(known) = pass.old.documents.get(&document.hash).cloned() else { return };
            for (key, hash) in &known {
                if self.holdings.keep(&pass.path, key, *hash) {
                    touched.insert(key.clone());
                }
                pass.has(key);
            }
            pass.known.insert(document.hash, known);
            return;
        };
        let mut keys = Vec::with_capacity(objects.len());
        for item in objects {
            let hash = item.hash;
            let (key, change) = self.holdings.put(&pass.path, item);
            if let Some(change) = change {
                emit(Event::Change(change));
            }
            touched.insert(key.clone());
            pass.has(&key);
            keys.push((key, hash));
        }
        if flaws.is_empty() {
            pass.known.insert(document.hash, keys);
        }
        pass.flaws.extend(flaws);
    }

    fn finish(&mut self, pass: Pass, touched: &mut HashSet<Arc<ObjectKey>>, emit: &mut dyn FnMut(Event)) {
        let Pass { path, old, mut new, known, flaws, repeated } = pass;
        new.documents = Arc::new(known);
        let mut missing: Vec<_> = old.keys.difference(&new.keys).cloned().collect();
        missing.sort_unstable();
        touched.extend(missing.iter().cloned());
        // What is missing may be what cannot be read: it stays as it was until the file is whole again.
        let broken = flaws.iter().any(|flaw| hides_objects(flaw.kind));
        if broken {
            new.keys.extend(missing.iter().cloned());
        } else {
            missing.iter().for_each(|key| self.holdings.release(&path, key));
        }
        let kept = if broken && !missing.is_empty() {
            format!("; still served as it was before: {}", list_names(&missing))
        } else {
            String::new()
        };
        let mut problems = Vec::new();
        let place = path.display().to_string();
        for ((kind, what, mend), count) in count_flaws(flaws) {
            let times = if count > 1 { format!(" ({count} times)") } else { String::new() };
            let kept = if hides_objects(kind) { kept.as_str() } else { "" };
            problems.push(SourceProblem::new(kind, &place, format!("{what}{times}{kept}"), mend));
        }
        if !repeated.is_empty() {
            let repeated: Vec<_> = repeated.into_iter().collect();
            problems.push(SourceProblem::new(
                ProblemKind::Duplicate,
                &place,
                format!("more than once in this file: {}; the last one counts", list_names(&repeated)),
                "remove the others",
            ));
        }
        self.said.about(About::File(path.clone()), problems, emit);
        self.files.insert(path, new);
    }

    fn say_duplicates(&mut self, touched: &HashSet<Arc<ObjectKey>>, emit: &mut dyn FnMut(Event)) {
        for key in touched {
            let files: Vec<_> = self.holdings.files(key).collect();
            let mut problems = Vec::new();
            if let [others @ .., last] = &files[..]
                && let Some(other) = others.last()
            {
                problems.push(SourceProblem::new(
                    ProblemKind::Duplicate,
                    last.display().to_string(),
                    format!(
                        "{key} is in this file and in {}; this one counts, as the last in path order",
                        other.display()
                    ),
                    "remove one of them",
                ));
            }
            self.said.about(About::Object(key.clone()), problems, emit);
        }
    }

    fn delete_orphans(
        &mut self,
        touched: HashSet<Arc<ObjectKey>>,
        confirm: bool,
        emit: &mut dyn FnMut(Event),
    ) {
        let mut orphans = std::mem::take(&mut self.doubtful);
        orphans.extend(touched);
        orphans.retain(|key| self.holdings.is_orphan(key));
        let mut problems = Vec::new();
        if !confirm && shrink::needs_confirmation(self.holdings.len(), orphans.len()) {
            problems.push(SourceProblem::new(
                ProblemKind::ShortList,
                self.paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "),
                format!(
                    "{} of {} objects are gone from the files at once",
                    orphans.len(),
                    self.holdings.len()
                ),
                "nothing is to be done: they are deleted if a second look finds the same",
            ));
            self.doubtful = orphans;
        } else {
            for key in &orphans {
                if let Some(change) = self.holdings.forget(key) {
                    emit(Event::Change(change));
                }
            }
        }
        self.said.about(About::ShortList, problems, emit);
    }

    /// Says that the changes of these folders cannot be followed, or (with none) that they can again.
    pub(super) fn say_not_followed(
        &mut self,
        folders: &BTreeMap<PathBuf, String>,
        emit: &mut dyn FnMut(Event),
    ) {
        let problems = folders.iter().map(|(folder, error)| {
            SourceProblem::new(
                ProblemKind::NotFollowed,
                folder.display().to_string(),
                format!("changes in it are seen only every {} s: {error}", super::SCAN_INTERVAL.as_secs()),
                "raise fs.inotify.max_user_watches and fs.inotify.max_user_instances",
            )
        });
        self.said.about(About::Watches, problems.collect(), emit);
    }
}

impl Pass {
    fn has(&mut self, key: &Arc<ObjectKey>) {
        if !self.new.keys.insert(key.clone()) {
            self.repeated.insert(key.clone());
        }
    }
}

/// Whether an object of the file may be hidden by such a flaw. A file that was emptied is one whose text got
/// lost, by a full disk or a write that was cut off.
fn hides_objects(kind: ProblemKind) -> bool {
    matches!(
        kind,
        ProblemKind::Syntax
            | ProblemKind::InvalidObject
            | ProblemKind::UnreadableFile
            | ProblemKind::EmptyFile
    )
}

/// The same flaw is said once, with how often it is there; in the order of the first.
fn count_flaws(flaws: Vec<Flaw>) -> Vec<((ProblemKind, String, String), usize)> {
    let mut counted: Vec<((ProblemKind, String, String), usize)> = Vec::new();
    let mut index = HashMap::new();
    for Flaw { kind, what, mend } in flaws {
        let at = *index.entry((kind, what.clone())).or_insert(counted.len());
        match counted.get_mut(at) {
            Some((_, count)) => *count += 1,
            None => counted.push(((kind, what, mend), 1)),
        }
    }
    counted
}

fn list_names(keys: &[Arc<ObjectKey>]) -> String {
    let names: Vec<_> = keys.iter().take(NAMES_LISTED).map(ToString::to_string).collect();
    match keys.len().saturating_sub(NAMES_LISTED) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}
