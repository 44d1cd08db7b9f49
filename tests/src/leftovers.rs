//! What a run leaves in the machine's file systems: its cgroup and its folder; and the removal of
//! what dead runs left.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::cgroup;
use crate::wait::wait_until;

/// Every name begins with it, so that a leftover can be told from what is not the lab's.
pub const PREFIX: &str = "kproxy-lab-";

/// A folder or cgroup that belongs to a live process, for as long as that holds the lock on it.
///
/// The name carries the process id and its start time for people to see; whether the owner lives
/// is told by the lock, which the kernel releases with the process. (An id alone says nothing to
/// an observer in another PID namespace, and ids are reused.)
#[derive(Debug)]
pub struct Owned {
    path: PathBuf,
    lock: Option<Flock<File>>,
}

impl Owned {
    /// Makes and locks a folder below `parent`; in a cgroup file system this makes a cgroup.
    ///
    /// # Errors
    /// When it is there already or cannot be made.
    pub fn create(parent: &Path, name: &str) -> Result<Self> {
        let path = parent.join(name);
        // Whoever clears leftovers may meet the folder between its making and its locking.
        for _ in 0..10 {
            fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
            let made = (|| -> Result<Option<Flock<File>>> {
                let file = File::open(&path)?;
                let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
                let there = fs::metadata(&path)?.ino();
                Ok((lock.metadata()?.ino() == there).then_some(lock))
            })();
            if let Ok(Some(lock)) = made {
                return Ok(Self { path, lock: Some(lock) });
            }
        }
        bail!("{} is removed each time it is made: another run takes it for a leftover", path.display())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // Still locked, so that nobody removes it at the same time. The kernel lets go of the
        // last processes of a cgroup a moment after they were waited for.
        let removed = wait_until("its removal", Duration::from_secs(5), || remove(&self.path).map(|()| true));
        if let Err(error) = removed {
            eprintln!("left behind: {}: {error:#}", self.path.display());
        }
        self.lock.take();
    }
}

/// The name of this process' run: prefix, process id, start time in clock ticks since boot.
///
/// # Errors
/// When /proc cannot be read.
pub fn own_name() -> Result<String> {
    let stat = fs::read_to_string("/proc/self/stat").context("cannot read /proc/self/stat")?;
    let start = start_time(&stat).context("/proc/self/stat has no start time")?;
    Ok(format!("{PREFIX}{}-{start}", process::id()))
}

/// Removes what dead runs left below `parent`, and returns what was removed.
///
/// What belongs to a live run is locked and left alone. What cannot be removed is reported on
/// stderr and left: it stops nobody.
///
/// # Errors
/// When `parent` cannot be read.
pub fn remove_leftovers(parent: &Path) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    let entries = fs::read_dir(parent).with_context(|| format!("cannot read {}", parent.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        let is_run =
            entry.file_name().to_str().and_then(|name| name.strip_prefix(PREFIX)).is_some_and(is_run_suffix);
        if !is_run || !entry.file_type()?.is_dir() {
            continue;
        }
        // In a run within a run, the outer run's folder is here as its tmpfs, and in use.
        if fs::metadata(&path)?.dev() != fs::metadata(parent)?.dev() {
            continue;
        }
        // Gone between the listing and now: another run was quicker.
        let Ok(file) = File::open(&path) else {
            continue;
        };
        let _lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => continue,
            Err((_, errno)) => {
                eprintln!("cannot lock {}: {errno}", path.display());
                continue;
            }
        };
        match remove(&path) {
            Ok(()) => removed.push(path),
            Err(error) => eprintln!("cannot remove the leftover {}: {error:#}", path.display()),
        }
    }
    Ok(removed)
}

/// Removes empty folders only: a run's files are on a tmpfs that ends with it, and a cgroup with
/// processes in it is not a leftover.
fn remove(path: &Path) -> Result<()> {
    match cgroup::remove_empty(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).context("it is not empty, or in use"),
    }
}

fn is_run_suffix(suffix: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    suffix.split_once('-').is_some_and(|(pid, start)| number(pid) && number(start))
}

/// Field 22 of a `/proc/<pid>/stat`; the second field may hold spaces and brackets.
fn start_time(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split(' ').nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn playground(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("lab-test-{name}-{}", process::id()));
        fs::create_dir(&folder).unwrap();
        folder
    }

    #[test]
    fn dead_runs_are_removed_live_ones_and_strangers_stay() {
        let folder = playground("leftovers");
        let dead = folder.join("kproxy-lab-12-345");
        fs::create_dir_all(dead.join("node-a/a1")).unwrap();
        let stranger = folder.join("kproxy-lab-evidence-12");
        fs::create_dir(&stranger).unwrap();
        let live = Owned::create(&folder, "kproxy-lab-13-345").unwrap();

        assert_eq!(remove_leftovers(&folder).unwrap(), std::slice::from_ref(&dead));
        assert!(!dead.exists());
        assert!(stranger.exists());
        assert!(live.path().exists());

        let path = live.path().to_owned();
        drop(live);
        assert!(!path.exists());
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_leftover_with_files_is_not_emptied() {
        let folder = playground("files");
        let dead = folder.join("kproxy-lab-12-345");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("somebody's"), "work").unwrap();
        assert_eq!(remove_leftovers(&folder).unwrap(), Vec::<PathBuf>::new());
        assert!(dead.join("somebody's").exists());
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn start_time_is_found_behind_any_name() {
        let mut stat = String::from("7 (a) b) c) S");
        for field in 4..=25 {
            stat.push_str(&format!(" {field}"));
        }
        assert_eq!(start_time(&stat), Some(22));
    }
}
