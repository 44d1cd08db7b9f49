//! The files below the paths of `--manifests`: which there are, whether they changed, and their text.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::documents::Flaw;
use crate::source::problem::{ProblemKind, SourceProblem};

/// The longest file that is read. Ten thousand Services with ten endpoints each are 30 MB; the text of a file
/// is in memory as a whole while it is read.
const MAX_FILE_BYTES: u64 = 128 << 20;

/// Folders deeper than this are not looked into.
const MAX_DEPTH: usize = 32;

/// Tells whether a file was changed: a new file under the name, or other content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn new(metadata: &Metadata) -> Self {
        Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// What was found below the paths.
#[derive(Default, Debug)]
pub(super) struct Scan {
    /// Files that hold objects, by what their names say.
    pub(super) files: BTreeMap<PathBuf, Stamp>,
    /// Where the files that are links lead.
    pub(super) links: BTreeSet<PathBuf>,
    /// Paths of `--manifests` that do not exist.
    pub(super) missing: Vec<PathBuf>,
    /// Folders and files that could not be looked at: what is known from below them stays.
    pub(super) unreadable: Vec<PathBuf>,
    /// What to say about missing and unreadable ones.
    pub(super) problems: Vec<SourceProblem>,
}

/// Why a file has no text.
#[derive(Debug)]
pub(super) enum ReadError {
    /// It is gone.
    Gone,
    /// It is there, but cannot be read.
    Flaw(Flaw),
}

/// Whether a file in a folder is meant to be read: `.yaml`, `.yml` or `.json`, and not hidden. What editors
/// put beside a file (`.a.yaml.swp`, `a.yaml~`, `#a.yaml#`) is not.
pub(super) fn is_manifest_name(path: &Path) -> bool {
    let Some(extension) = path.extension() else { return false };
    !is_hidden(path)
        && !path.as_os_str().as_encoded_bytes().ends_with(b"#")
        && ["yaml", "yml", "json"].into_iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// Whether the file is JSON, by its name.
pub(super) fn is_json(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"))
}

/// Whether the last part of the path begins with a dot. The folders behind `..data` of a mounted ConfigMap are
/// hidden too: its files are reached by the links beside them.
pub(super) fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// Looks for files below `paths`. `on_folder` is called with each folder *before* it is read, and with the
/// folder of each file that a link leads to: whoever watches folders misses nothing.
pub(super) fn scan(paths: &[PathBuf], on_folder: &mut dyn FnMut(&Path)) -> Scan {
    let mut scan = Scan::default();
    for path in paths {
        if let Some(above) = nearest_folder_above(path) {
            on_folder(above);
        }
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => scan.walk(path, &mut Vec::new(), on_folder),
            Ok(metadata) => scan.take(path, &metadata, on_folder),
            Err(error) if is_gone(&error) => {
                scan.missing.push(path.clone());
                scan.problems.push(SourceProblem::new(
                    ProblemKind::MissingPath,
                    path.display().to_string(),
                    "there is no such file or folder",
                    "make it, or correct --manifests; kproxy begins its work when all of them are there",
                ));
            }
            Err(error) => scan.cannot_look_at(path, &error),
        }
    }
    scan
}

/// The text of a file.
pub(super) fn read(path: &Path) -> Result<(Stamp, String), ReadError> {
    let flaw = |what: String, mend: &str| {
        ReadError::Flaw(Flaw { kind: ProblemKind::UnreadableFile, what, mend: mend.to_owned() })
    };
    let unreadable = |error: io::Error| {
        if is_gone(&error) {
            return ReadError::Gone;
        }
        flaw(format!("it cannot be read: {error}"), "let the user that kproxy runs as read it")
    };
    // Opening a FIFO waits for its other end, unless this is said.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(flaw("it is no regular file".to_owned(), "take it out of the folder"));
    }
    if metadata.len() > MAX_FILE_BYTES {
        let what = format!("it has {} MiB; up to {} are read", metadata.len() >> 20, MAX_FILE_BYTES >> 20);
        return Err(flaw(what, "split it into several files"));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or_default());
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(unreadable)?;
    // The stamp was taken before the text: text that is newer than its stamp is read once more, not missed.
    let stamp = Stamp::new(&metadata);
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..valid].iter().filter(|&&byte| byte == b'\n').count();
        flaw(format!("it is no text: byte {valid} (line {line}) is not UTF-8"), "save it as UTF-8")
    })?;
    if let Some(at) = text.find('\0') {
        return Err(flaw(format!("it is no text: byte {at} is zero"), "take it out of the folder"));
    }
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok((stamp, text))
}

impl Scan {
    fn walk(&mut self, folder: &Path, above: &mut Vec<(u64, u64)>, on_folder: &mut dyn FnMut(&Path)) {
        on_folder(folder);
        let entries = match fs::metadata(folder).and_then(|metadata| {
            above.push((metadata.dev(), metadata.ino()));
            fs::read_dir(folder)
        }) {
            Ok(entries) => entries,
            Err(error) if is_gone(&error) => return,
            Err(error) => return self.cannot_look_at(folder, &error),
        };
        for entry in entries {
            let path = match entry {
                Ok(entry) => entry.path(),
                Err(error) => return self.cannot_look_at(folder, &error),
            };
            if is_hidden(&path) {
                continue;
            }
            match fs::metadata(&path) {
                // A link to a folder above would go round for ever.
                Ok(metadata) if metadata.is_dir() => {
                    if above.len() < MAX_DEPTH && !above.contains(&(metadata.dev(), metadata.ino())) {
                        let depth = above.len();
                        self.walk(&path, above, on_folder);
                        above.truncate(depth);
                    }
                }
                Ok(metadata) if is_manifest_name(&path) => self.take(&path, &metadata, on_folder),
                Ok(_) => {}
                // Gone since, or a link to nothing.
                Err(error) if is_gone(&error) => {}
                Err(error) => self.cannot_look_at(&path, &error),
            }
        }
    }

    fn take(&mut self, path: &Path, metadata: &Metadata, on_folder: &mut dyn FnMut(&Path)) {
        if path.is_symlink()
            && let Ok(target) = path.canonicalize()
            && let Some(folder) = target.parent()
        {
            on_folder(folder);
            self.links.insert(target);
        }
        self.files.insert(path.to_owned(), Stamp::new(metadata));
    }

    fn cannot_look_at(&mut self, path: &Path, error: &io::Error) {
        self.unreadable.push(path.to_owned());
        self.problems.push(SourceProblem::new(
            ProblemKind::UnreadableFile,
            path.display().to_string(),
            format!("it cannot be looked into: {error}; what was read from it before stays served"),
            "let the user that kproxy runs as read it",
        ));
    }
}

/// Whether the error says that there is nothing under the name (any more).
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The folder that a path that may not exist yet will appear in, or the next one above that exists.
fn nearest_folder_above(path: &Path) -> Option<&Path> {
    path.ancestors().skip(1).find(|above| above.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_manifests_are_read_not_what_editors_leave() {
        for (name, read) in [
            ("/m/a.yaml", true),
            ("/m/a.YML", true),
            ("/m/a.json", true),
            ("/m/.a.yaml", false),
            ("/m/.a.yaml.swp", false),
            ("/m/a.yaml~", false),
            ("/m/#a.yaml#", false),
            ("/m/4913", false),
            ("/m/README.md", false),
        ] {
            assert_eq!(is_manifest_name(Path::new(name)), read, "{name}");
        }
    }
}
