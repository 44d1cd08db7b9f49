//! The control groups of a run: one folder below the cgroup v2 mount, and its children.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::wait_until;

/// Where cgroup v2 is mounted for this process, wherever that is.
///
/// # Errors
/// When there is no such mount, with what to do.
pub fn mount_point() -> Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    mount_point_in(&text)
        .context("cgroup v2 is not mounted here; mount it: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")
}

/// Makes a child group; its parents must be there.
pub(crate) fn create(path: &Path) -> Result<()> {
    fs::create_dir(path).with_context(|| format!("cannot make the cgroup {}", path.display()))
}

/// Opens the file through which a process moves itself into the group, by writing "0".
pub(crate) fn open_procs(group: &Path) -> Result<File> {
    let path = group.join("cgroup.procs");
    File::options().write(true).open(&path).with_context(|| format!("cannot open {}", path.display()))
}

/// The processes in the group itself, as ids in the caller's PID namespace.
///
/// # Errors
/// When the group cannot be read.
pub fn processes(group: &Path) -> Result<Vec<Pid>> {
    let path = group.join("cgroup.procs");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw).collect())
}

/// Ends every process in the group and below, then removes the groups, deepest first.
///
/// Only for groups that the lab made: whoever is in there was started by it.
pub(crate) fn end_and_remove(group: &Path) -> Result<()> {
    let what = format!("the cgroup {} being empty", group.display());
    wait_until(&what, Duration::from_secs(10), || {
        for child in below(group)? {
            for pid in processes(&child)? {
                // 0 is a process of another PID namespace: not ours to end, and not endable.
                if pid.as_raw() > 0 {
                    // It may have ended since it was listed.
                    let _ = kill(pid, Signal::SIGKILL);
                }
            }
        }
        match remove_empty(group) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(false),
            Err(error) => Err(error.into()),
        }
    })
}

/// Removes a group and those below it, if no process is in any of them.
pub(crate) fn remove_empty(group: &Path) -> std::io::Result<()> {
    for path in below(group)? {
        fs::remove_dir(path)?;
    }
    Ok(())
}

/// The group and all groups below it, children before parents.
fn below(group: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(below(&entry.path())?);
        }
    }
    found.push(group.to_owned());
    Ok(found)
}

/// The mount point of the first cgroup2 in the text of a mountinfo file.
fn mount_point_in(mountinfo: &str) -> Result<PathBuf> {
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        if after.split(' ').next() != Some("cgroup2") {
            continue;
        }
        let Some(path) = before.split(' ').nth(4) else {
            continue;
        };
        // Spaces, tabs, line ends and backslashes are written in octal.
        let path =
            path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
        return Ok(path.into());
    }
    bail!("no mount of type cgroup2")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_cgroup2_beside_v1() {
        let text = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                    41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw shared:9 - cgroup2 cgroup2 rw\n";
        let found = mount_point_in(text).unwrap();
        assert_eq!(found, Path::new("/sys/fs/cgroup/uni fied"));
    }

    #[test]
    fn v1_alone_is_an_error() {
        let text = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n";
        assert!(mount_point_in(text).is_err());
    }
}
