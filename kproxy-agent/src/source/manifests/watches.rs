//! The folders that inotify watches for us.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

/// What inotify said; an error means that something was missed.
pub(super) type Said = notify::Result<notify::Event>;

/// The watches. Each folder has one of its own, also those below others: so it is known which there are, and
/// links are followed.
pub(super) struct Watches {
    watcher: Option<RecommendedWatcher>,
    /// Watched folders, with device and inode.
    folders: HashMap<PathBuf, (u64, u64)>,
    failed: BTreeMap<PathBuf, String>,
}

impl Watches {
    /// Without any folder yet. What happens is sent to `said`.
    pub(super) fn new(paths: &[PathBuf], said: mpsc::UnboundedSender<Said>) -> Self {
        let watcher = notify::recommended_watcher(move |event: Said| {
            // Reading a file makes events too.
            let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
            let is_reading = event.as_ref().is_ok_and(|event| event.kind.is_access() && event.kind != closed);
            if !is_reading {
                // The receiver is gone when the source stops.
                let _ = said.send(event);
            }
        });
        let (watcher, failed) = match watcher {
            Ok(watcher) => (Some(watcher), BTreeMap::new()),
            Err(error) => (None, paths.iter().map(|path| (path.clone(), error.to_string())).collect()),
        };
        Watches { watcher, folders: HashMap::new(), failed }
    }

    /// Watches the folder, unless it is watched already.
    pub(super) fn watch(&mut self, folder: &Path) {
        let Some(watcher) = &mut self.watcher else { return };
        let Ok(metadata) = fs::metadata(folder) else { return };
        let identity = (metadata.dev(), metadata.ino());
        if self.folders.get(folder) == Some(&identity) {
            return;
        }
        if self.folders.remove(folder).is_some() {
            // Another folder took the name. The old watch may be gone with the old folder.
            let _ = watcher.unwatch(folder);
        }
        match watcher.watch(folder, RecursiveMode::NonRecursive) {
            Ok(()) => {
                self.failed.remove(folder);
                self.folders.insert(folder.to_owned(), identity);
            }
            Err(error) => {
                self.failed.insert(folder.to_owned(), error.to_string());
            }
        }
    }

    /// The folder was removed or renamed: a new one under its name, even with the same inode, is another.
    pub(super) fn forget(&mut self, folder: &Path) {
        self.failed.remove(folder);
        if self.folders.remove(folder).is_some()
            && let Some(watcher) = &mut self.watcher
        {
            // The watch is gone already if the folder is.
            let _ = watcher.unwatch(folder);
        }
    }

    /// The folders that could not be watched, and why.
    pub(super) fn failed(&self) -> &BTreeMap<PathBuf, String> {
        &self.failed
    }
}
