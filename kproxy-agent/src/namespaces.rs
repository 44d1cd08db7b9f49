//! The network namespaces of this node's processes.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};

use crate::programs::namespace_cookie;

/// Network namespaces, each once.
#[derive(Debug)]
pub struct Namespaces {
    own: File,
    /// By device and inode, which are a namespace's identity.
    all: BTreeMap<(u64, u64), File>,
    hidden: usize,
}

impl Namespaces {
    /// This process's, and those of all processes in `cgroup` and below.
    pub fn of_processes(cgroup: &Path) -> Result<Self> {
        let path = "/proc/thread-self/ns/net";
        let own = File::open(path).with_context(|| format!("cannot open {path}"))?;
        let (mut all, mut hidden) = (BTreeMap::new(), 0);
        insert(&mut all, own.try_clone()?)?;
        let mut folders = vec![cgroup.to_owned()];
        while let Some(folder) = folders.pop() {
            for process in processes(&folder) {
                if process == HIDDEN {
                    hidden += 1;
                    continue;
                }
                match File::open(format!("/proc/{process}/ns/net")) {
                    Ok(namespace) => insert(&mut all, namespace)?,
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => hidden += 1,
                    // It has ended meanwhile, and has no sockets.
                    Err(_) => {}
                }
            }
            folders.extend(children(&folder));
        }
        Ok(Self { own, all, hidden })
    }

    /// How many processes there are whose namespaces this one may not see: it is in a PID namespace of its own, or lacks
    /// CAP_SYS_PTRACE.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Does something in each, with the namespace's cookie where the kernel tells it. This thread is moved: nothing else
    /// must happen on it meanwhile. An error if a namespace cannot be entered or, worse, left.
    pub fn visit(&self, mut act: impl FnMut(Option<u64>)) -> Result<()> {
        for namespace in self.all.values() {
            setns(namespace, CloneFlags::CLONE_NEWNET).context("cannot enter a network namespace")?;
            act(namespace_cookie().unwrap_or(None));
        }
        setns(&self.own, CloneFlags::CLONE_NEWNET).context("cannot return to the own network namespace")
    }
}

fn insert(all: &mut BTreeMap<(u64, u64), File>, namespace: File) -> io::Result<()> {
    let metadata = namespace.metadata()?;
    all.entry((metadata.dev(), metadata.ino())).or_insert(namespace);
    Ok(())
}

/// What stands in `cgroup.procs` for a process of another PID namespace.
const HIDDEN: u32 = 0;

/// The processes of a cgroup; none where it is gone, or holds threads only.
fn processes(cgroup: &Path) -> Vec<u32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

fn children(cgroup: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(cgroup) else {
        return Vec::new();
    };
    let folders = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.map(|entry| entry.path()).collect()
}
