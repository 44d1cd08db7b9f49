//! What the agent must know of the machine it runs on: its cgroup v2 root, and who holds the node.

use std::{
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};

/// The inode of the root of the machine's cgroup v2 hierarchy (kernfs numbers from 1).
const CGROUP_ROOT_INODE: u64 = 1;

/// The bits of CapEff (capabilities(7)) that the agent needs, with their numbers.
const CAPABILITIES: [(&str, u32); 2] = [("CAP_NET_ADMIN", 12), ("CAP_BPF", 39)];
const CAP_SYS_ADMIN: u32 = 21;

/// The capabilities that this process lacks.
pub fn missing_capabilities() -> Vec<&'static str> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or(0);
    let has = |bit: u32| effective & (1 << bit) != 0;
    CAPABILITIES
        .into_iter()
        .filter(|(name, bit)| !(has(*bit) || *name == "CAP_BPF" && has(CAP_SYS_ADMIN)))
        .map(|(name, _)| name)
        .collect()
}

/// An error that says what to do, if this process lacks capabilities.
pub fn demand_capabilities() -> Result<()> {
    let missing = missing_capabilities();
    if !missing.is_empty() {
        bail!("{} missing: run as root, or give the pod these capabilities", missing.join(" and "));
    }
    Ok(())
}

/// The cgroup v2 folder whose processes are served: `given`, or the cgroup v2 mount, wherever it is.
///
/// A mount point that shows the cgroup of a container (seen from inside a private cgroup namespace, its root
/// is that container's own) is refused: attaching there would silently serve one pod.
pub fn cgroup_root(given: Option<&Path>) -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let mounts = cgroup2_mounts(&mounts);
    let Some(path) = given.map(Path::to_owned).or_else(|| mounts.first().cloned()) else {
        bail!(
            "no cgroup v2 file system is mounted here, which the socket hooks are attached to: mount the host's \
             (in a pod: hostPath /sys/fs/cgroup) and name it with --cgroup-root"
        );
    };
    let folder = path.canonicalize().with_context(|| format!("cannot open the cgroup {}", path.display()))?;
    let inode = folder.metadata().with_context(|| format!("cannot look at {}", folder.display()))?.ino();
    if !mounts.iter().any(|mount| folder.starts_with(mount)) {
        bail!(
            "{} is not in a cgroup v2 file system; name the cgroup v2 mount of the host with --cgroup-root",
            folder.display()
        );
    }
    if mounts.contains(&folder) && inode != CGROUP_ROOT_INODE {
        bail!(
            "{} is the cgroup of one container (inode {inode}), not the root of the node's: the socket hooks would \
             serve that container alone. Mount the host's /sys/fs/cgroup into the pod (hostPath) and name it with \
             --cgroup-root, or run the agent in the host's cgroup namespace",
            folder.display()
        );
    }
    Ok(folder)
}

/// The lock on a bpffs folder: one agent a node. Released by the kernel when the process ends, however it ends.
pub struct Lock {
    _held: Flock<OwnedFd>,
}

impl Lock {
    /// Takes the lock, or says that another agent has it; who that is, `owner` tells.
    pub fn take(root: &Path, owner: impl FnOnce() -> Option<String>) -> Result<Self> {
        let folder = File::open(root).with_context(|| format!("cannot open {}", root.display()))?;
        match Flock::lock(OwnedFd::from(folder), FlockArg::LockExclusiveNonblock) {
            Ok(held) => Ok(Self { _held: held }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => bail!(
                "another kproxy agent serves this node: {} is locked by {}. Stop that one first, or give this one \
                 another --bpf-root if it serves other network namespaces",
                root.display(),
                owner().unwrap_or_else(|| "an agent that has not written its name yet".to_owned())
            ),
            Err((_, errno)) => {
                Err(io::Error::from(errno)).with_context(|| format!("cannot lock {}", root.display()))
            }
        }
    }
}

/// The mount points of cgroup v2 file systems in the text of a mountinfo file (proc_pid_mountinfo(5)); those
/// whose root is the hierarchy's root as seen from here come first.
fn cgroup2_mounts(mountinfo: &str) -> Vec<PathBuf> {
    let mut mounts: Vec<(bool, PathBuf)> = mountinfo
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            if right.split(' ').next()? != "cgroup2" {
                return None;
            }
            let mut fields = left.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            Some((root != "/", PathBuf::from(unescape(point))))
        })
        .collect();
    mounts.sort();
    mounts.into_iter().map(|(_, point)| point).collect()
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        match rest.get(at + 1..at + 4).and_then(|octal| u8::from_str_radix(octal, 8).ok()) {
            Some(octet) => {
                out.push(char::from(octet));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
24 28 0:22 / /proc rw - proc proc rw
30 24 0:26 /kubepods/pod1 /sys/fs/cgroup\\040x rw,relatime shared:4 - cgroup2 cgroup2 rw
31 24 0:26 / /sys/fs/cgroup/unified rw,relatime shared:4 master:1 - cgroup2 cgroup2 rw
32 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
";

    #[test]
    fn cgroup2_is_found_wherever_it_is() {
        let found = cgroup2_mounts(MOUNTINFO);
        assert_eq!(found, [PathBuf::from("/sys/fs/cgroup/unified"), PathBuf::from("/sys/fs/cgroup x")]);
        assert!(cgroup2_mounts("24 28 0:22 / /proc rw - proc proc rw\n").is_empty());
        assert!(cgroup2_mounts("garbage\n - cgroup2\n").is_empty());
    }

    #[test]
    fn a_folder_outside_of_cgroup2_is_refused() {
        let error = cgroup_root(Some(Path::new("/proc"))).unwrap_err().to_string();
        assert!(error.contains("--cgroup-root"), "{error}");
        assert!(cgroup_root(Some(Path::new("/does/not/exist"))).is_err());
    }
}
