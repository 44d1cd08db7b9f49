//! Network namespaces: made, named below /run/netns, entered by one thread at a time.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use serde::{Deserialize, Serialize};

/// Where `ip netns` keeps its names. Inside a run this is a tmpfs of the run's own.
pub const NAMES: &str = "/run/netns";

/// What tells one namespace from another, as long as both live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetnsId {
    device: u64,
    inode: u64,
}

impl NetnsId {
    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn current() -> Result<Self> {
        Self::of(Path::new("/proc/thread-self/ns/net"))
    }

    /// The namespace behind a name below /run/netns, or behind `/proc/<pid>/ns/net`.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn of(path: &Path) -> Result<Self> {
        let meta = fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
        Ok(Self { device: meta.dev(), inode: meta.ino() })
    }
}

/// A network namespace with a name; it ends when this is dropped and no process is in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
    file: File,
    named: AtomicBool,
}

impl Netns {
    /// Makes an empty namespace and names it.
    ///
    /// # Errors
    /// When the name is taken, or the kernel refuses.
    pub fn create(name: &str) -> Result<Self> {
        let path = Path::new(NAMES).join(name);
        File::create_new(&path)
            .with_context(|| format!("cannot name a network namespace {}", path.display()))?;
        let target = path.clone();
        // The namespace is made by a thread of its own, so that this one stays where it is.
        let made = thread::spawn(move || -> Result<()> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some("/proc/thread-self/ns/net"), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        })
        .join()
        .map_err(|_| anyhow!("the thread that makes it panicked"))
        .and_then(|made| made);
        if let Err(error) = made {
            let _ = fs::remove_file(&path);
            return Err(error).with_context(|| format!("cannot make the network namespace {name}"));
        }
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { name: name.to_owned(), path, file, named: AtomicBool::new(true) })
    }

    /// The name below /run/netns.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that `nsenter --net=` takes.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open namespace file, for `setns`.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Takes the name away, so that it is free for another; the namespace ends with its last user.
    pub(crate) fn remove_name(&self) {
        if self.named.swap(false, Ordering::Relaxed) {
            // The run's mount namespace takes both with it in any case.
            let _ = umount2(&self.path, MntFlags::MNT_DETACH);
            let _ = fs::remove_file(&self.path);
        }
    }

    /// Runs `work` on a thread that is in this namespace.
    ///
    /// Sockets made there belong to the namespace for good, also when used elsewhere; files below
    /// /proc/sys/net and /proc/net are this namespace's while `work` runs.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or `work` fails or panics.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
                        .with_context(|| format!("cannot enter the network namespace {}", self.name))?;
                    work()
                })
                .join()
                .map_err(|_| anyhow!("panicked in the network namespace {}", self.name))?
        })
    }

    /// Writes a kernel parameter of this namespace, by its path below /proc/sys, as
    /// `net/ipv4/ip_forward`.
    ///
    /// # Errors
    /// When there is no such parameter or the value is refused.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.set_sysctls(&[(key, value)])
    }

    /// Writes several kernel parameters; see [`Netns::set_sysctl`].
    ///
    /// # Errors
    /// At the first that fails.
    pub fn set_sysctls(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.within(|| {
            for (key, value) in settings {
                let path = Path::new("/proc/sys").join(key);
                fs::write(&path, value)
                    .with_context(|| format!("cannot write {value:?} to {}", path.display()))?;
            }
            Ok(())
        })
    }

    /// Reads a kernel parameter of this namespace; `None` where the kernel does not have it.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn sysctl(&self, key: &str) -> Result<Option<String>> {
        self.within(|| match fs::read_to_string(Path::new("/proc/sys").join(key)) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read the parameter {key}")),
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.remove_name();
    }
}
