//! Folders in the cgroup v1 hierarchies of the machine, where it has these: containerd and the kubelet of a full node
//! take them for the roots.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::cgroup;
use crate::isolate::Run;
use crate::leftovers::{Owned, remove_leftovers};

/// A hierarchy, and a group in it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LegacyGroup {
    /// What it is mounted with, as `cpu` or `none,name=systemd`.
    pub options: String,
    /// The name of its folder below /sys/fs/cgroup.
    pub name: String,
    /// The group's folder.
    pub path: PathBuf,
}

/// Removes what dead runs left in the hierarchies of v1: a run that is interrupted has no time for it.
///
/// # Errors
/// When the mounts cannot be read.
pub fn remove_legacy_leftovers() -> Result<()> {
    for hierarchy in mounted()? {
        remove_leftovers(&hierarchy.mount)?;
    }
    Ok(())
}

/// The run's own folder in every hierarchy, locked for as long as the run lives.
#[derive(Debug)]
pub struct LegacyCgroups {
    groups: Vec<(Hierarchy, Owned)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    name: String,
    options: String,
}

impl LegacyCgroups {
    /// Makes them, after the removal of what dead runs left. None on a machine with cgroup v2 alone.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn create(run: &Run) -> Result<Self> {
        remove_legacy_leftovers()?;
        let name = run.cgroup().file_name().context("the run's cgroup has no name")?.to_string_lossy();
        let mut groups = Vec::new();
        for hierarchy in mounted()? {
            let owned = Owned::create(&hierarchy.mount, &name)?;
            prepare(&hierarchy, &hierarchy.mount, owned.path())?;
            groups.push((hierarchy, owned));
        }
        Ok(Self { groups })
    }

    /// A group for a node in every hierarchy.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn node(&self, name: &str) -> Result<Vec<LegacyGroup>> {
        self.groups
            .iter()
            .map(|(hierarchy, owned)| {
                let path = owned.path().join(name);
                cgroup::create(&path)?;
                prepare(hierarchy, owned.path(), &path)?;
                let Hierarchy { name, options, .. } = hierarchy;
                Ok(LegacyGroup { options: options.clone(), name: name.clone(), path })
            })
            .collect()
    }
}

/// A group of cpuset takes no process before it has CPUs and memory.
fn prepare(hierarchy: &Hierarchy, parent: &Path, group: &Path) -> Result<()> {
    if hierarchy.name != "cpuset" {
        return Ok(());
    }
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let value = fs::read_to_string(parent.join(file))?;
        let path = group.join(file);
        fs::write(&path, value).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn mounted() -> Result<Vec<Hierarchy>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    Ok(hierarchies(&text))
}

/// The hierarchies of v1 in the text of a mountinfo file, by the names of their folders.
fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let mut after = after.split(' ');
            if after.next() != Some("cgroup") {
                return None;
            }
            let mount = PathBuf::from(before.split(' ').nth(4)?);
            let name = mount.file_name()?.to_str()?.to_owned();
            let super_options = after.nth(1)?;
            let named = super_options.split(',').find(|option| option.starts_with("name="));
            let options = match named {
                Some(named) => format!("none,{named}"),
                None => {
                    let general = ["rw", "ro", "xattr", "clone_children", "noprefix"];
                    let kept: Vec<_> =
                        super_options.split(',').filter(|option| !general.contains(option)).collect();
                    kept.join(",")
                }
            };
            Some(Hierarchy { mount, name, options })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_read_from_mountinfo() {
        let text = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
                    33 31 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
                    41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        let of = |name: &str, options: &str| Hierarchy {
            mount: Path::new("/sys/fs/cgroup").join(name),
            name: name.into(),
            options: options.into(),
        };
        assert_eq!(hierarchies(text), [of("cpu,cpuacct", "cpu,cpuacct"), of("systemd", "none,name=systemd")]);
    }
}
