//! The isolated run: the program starts itself again in namespaces of its own, so that whatever
//! happens to it, the kernel ends all that it started and nothing of it reaches the machine.
//!
//! Three processes of the same program:
//! - *outside*: the one that was called. It stays in the machine's namespaces, makes the run's
//!   cgroup and folder, waits, and removes both.
//! - *init*: the first of the new PID namespace. It makes the private mounts and collects orphans.
//!   When it ends, by whatever way, the kernel ends all others.
//! - *inside*: does the work.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Pid, Uid};
use serde::{Deserialize, Serialize};

use crate::cgroup;
use crate::cluster;
use crate::leftovers::{Owned, own_name, remove_leftovers};
use crate::netns::{NAMES, NetnsId};
use crate::worker;

/// Tells a process which of the three it is. Never handed on to what the lab starts.
pub(crate) const STAGE: &str = "KPROXY_LAB_STAGE";

/// Where a failed scenario's evidence goes; the default is a folder in the temporary folder.
const EVIDENCE: &str = "KPROXY_LAB_EVIDENCE";

/// The bpffs of the machine, hidden in a run by one of its own.
const MACHINE_BPFFS: &str = "/sys/fs/bpf";

/// The isolated run that this process is in. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Run {
    facts: Arc<Facts>,
}

/// What the outer process knows and the inner ones must not ask for themselves.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// The network namespace in which the run was started.
    pub outer_netns: NetnsId,
    /// The device number of the machine's bpffs, where it has one mounted.
    pub outer_bpffs: Option<u64>,
    /// The cgroup v2 mount.
    pub cgroup_mount: PathBuf,
    /// The run's own cgroup below it.
    pub cgroup: PathBuf,
    /// The run's own folder, a tmpfs inside.
    pub folder: PathBuf,
    /// Where evidence of failures goes; outlives the run.
    pub evidence: PathBuf,
    /// The id of *init* in the PID namespace in which the run was started.
    pub init_pid: Option<u32>,
}

#[derive(Serialize, Deserialize)]
enum Stage {
    Init(Facts),
    Inside(Facts),
}

impl Run {
    /// The run's own cgroup: the parent of every cgroup of its labs.
    pub fn cgroup(&self) -> &Path {
        &self.facts.cgroup
    }

    /// The run's own folder, which ends with it: logs, configurations, sockets.
    pub fn folder(&self) -> &Path {
        &self.facts.folder
    }

    /// The run's own bpffs, which ends with it.
    pub fn bpffs(&self) -> PathBuf {
        self.facts.folder.join("bpf")
    }

    /// Where evidence of failures is put; it outlives the run.
    pub fn evidence(&self) -> &Path {
        &self.facts.evidence
    }

    /// The id of the run's first process as the machine sees it: `nsenter --target` takes it.
    pub fn init_pid(&self) -> Option<u32> {
        self.facts.init_pid
    }

    pub(crate) fn facts(&self) -> &Facts {
        &self.facts
    }
}

/// The `main` of a program that uses the lab: does `inside` in an isolated run.
///
/// Call it before anything else that starts threads, and with the program's arguments unread or
/// read without effect: the same arguments are handed to the inner process. The lab's workers are
/// this program as well, so `main` must get here (or call [`worker::serve_if_asked`]) for any
/// arguments that begin with the worker's.
pub fn isolated(inside: impl FnOnce(Run) -> Result<ExitCode>) -> ExitCode {
    if let Some(code) = worker::serve_if_asked().or_else(cluster::serve_if_asked) {
        return code;
    }
    let result = match stage() {
        Ok(None) => outside(),
        Ok(Some(Stage::Init(facts))) => init(facts),
        Ok(Some(Stage::Inside(facts))) => inside(Run { facts: Arc::new(facts) }),
        Err(error) => Err(error),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn stage() -> Result<Option<Stage>> {
    let Some(text) = std::env::var_os(STAGE) else {
        return Ok(None);
    };
    let text = text.to_string_lossy();
    let stage = serde_json::from_str(&text)
        .with_context(|| format!("{STAGE} is the lab's own; unset it ({text})"))?;
    Ok(Some(stage))
}

/// The called process: makes the run's places, starts *init*, waits, removes the places.
fn outside() -> Result<ExitCode> {
    if !Uid::effective().is_root() {
        bail!("the lab makes network namespaces, mounts and cgroups: run it as root");
    }
    let cgroup_mount = cgroup::mount_point()?;
    let temp = std::env::temp_dir();
    for parent in [&cgroup_mount, &temp] {
        for path in remove_leftovers(parent)? {
            eprintln!("removed what a dead run left: {}", path.display());
        }
    }

    let name = own_name()?;
    let cgroup = Owned::create(&cgroup_mount, &name)?;
    let folder = Owned::create(&temp, &name)?;
    let evidence = std::env::var_os(EVIDENCE)
        .map(PathBuf::from)
        .unwrap_or_else(|| temp.join(name.replace("kproxy-lab-", "kproxy-lab-evidence-")));
    let facts = Facts {
        outer_netns: NetnsId::current()?,
        outer_bpffs: bpffs_device(Path::new(MACHINE_BPFFS)),
        cgroup_mount,
        cgroup: cgroup.path().to_owned(),
        folder: folder.path().to_owned(),
        evidence: std::path::absolute(evidence)?,
        init_pid: None,
    };

    // From here to the end: SIGINT and the like end the run, not this process before its clean-up.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block().context("cannot block signals")?;
    unshare(CloneFlags::CLONE_NEWPID).context("cannot make a PID namespace")?;
    let mut command = this_program(&Stage::Init(facts))?;
    // SAFETY: prctl and sigprocmask are async-signal-safe, and nothing else is done there.
    unsafe {
        command.pre_exec(|| {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            SigSet::empty().thread_set_mask()?;
            Ok(())
        });
    }
    let mut child = command.spawn().context("cannot start the isolated run")?;
    loop {
        let signal = signals.wait().context("cannot wait for the run")?;
        if signal == Signal::SIGCHLD {
            if let Some(status) = child.try_wait()? {
                return Ok(exit_code(status));
            }
            continue;
        }
        child.kill()?;
        child.wait()?;
        return Ok(code(128 + signal as i32));
    }
}

/// The first process of the PID namespace: private mounts, then the orphans' collector.
fn init(mut facts: Facts) -> Result<ExitCode> {
    // /proc is still the outer one: this is the id that the outer side sees.
    let outer_id = fs::read_link("/proc/self").context("cannot read /proc/self")?;
    facts.init_pid = outer_id.to_str().and_then(|id| id.parse().ok());

    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        .context("cannot make a mount and a network namespace")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("cannot make the mounts private")?;
    mount_new("proc", Path::new("/proc"))?;
    fs::create_dir_all(NAMES).with_context(|| format!("cannot make {NAMES}"))?;
    mount_new("tmpfs", Path::new(NAMES))?;
    mount_new("tmpfs", &facts.folder)?;
    let bpffs = facts.folder.join("bpf");
    fs::create_dir(&bpffs).context("cannot make the folder for the bpffs")?;
    mount_new("bpf", &bpffs)?;
    if Path::new(MACHINE_BPFFS).is_dir() {
        mount_new("bpf", Path::new(MACHINE_BPFFS))?;
    }

    // All that the run starts is in its cgroup, whatever happens to it later.
    let group = facts.cgroup.join("run");
    cgroup::create(&group)?;
    fs::write(group.join("cgroup.procs"), "0")
        .with_context(|| format!("cannot move into {}", group.display()))?;

    let child = this_program(&Stage::Inside(facts))?
        .spawn()
        .context("cannot start the program in the isolated run")?;
    let main = Pid::from_raw(child.id().cast_signed());
    loop {
        match wait().context("cannot wait for the run's processes")? {
            WaitStatus::Exited(pid, status) if pid == main => return Ok(code(status)),
            WaitStatus::Signaled(pid, signal, _) if pid == main => {
                return Ok(code(128 + signal as i32));
            }
            _ => {}
        }
    }
}

/// This program, its arguments and a stage.
fn this_program(stage: &Stage) -> Result<Command> {
    let mut arguments = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments).env(STAGE, serde_json::to_string(stage)?);
    Ok(command)
}

fn mount_new(kind: &str, target: &Path) -> Result<()> {
    mount(Some(kind), target, Some(kind), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, None::<&str>)
        .with_context(|| format!("cannot mount a {kind} on {}", target.display()))
}

/// The device number of the bpffs at `path`, if there is one.
pub(crate) fn bpffs_device(path: &Path) -> Option<u64> {
    let is_bpffs = statfs(path).ok()?.filesystem_type() == BPF_FS_MAGIC;
    is_bpffs.then(|| -> io::Result<u64> { Ok(fs::metadata(path)?.dev()) })?.ok()
}

fn exit_code(status: ExitStatus) -> ExitCode {
    match (status.code(), status.signal()) {
        (Some(number), _) => code(number),
        (None, Some(signal)) => code(128 + signal),
        (None, None) => ExitCode::FAILURE,
    }
}

fn code(number: i32) -> ExitCode {
    u8::try_from(number).map_or(ExitCode::FAILURE, ExitCode::from)
}
