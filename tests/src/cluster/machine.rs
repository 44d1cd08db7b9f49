//! The first processes of a full node. The lab starts this program in the node's network namespace; it enters the node's
//! cgroups, makes all other namespaces, and starts itself once more as the first process of the node's PIDs. That one
//! mounts what the node sees, starts containerd and the kubelet, and collects orphans.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sethostname};
use serde::{Deserialize, Serialize};

use crate::cluster::cgroups::LegacyGroup;
use crate::wait::wait_until;

/// The first argument of the process that makes a node.
pub const ARGUMENT: &str = "kproxy-lab-machine";
/// The first argument of a node's first process.
const FIRST: &str = "kproxy-lab-machine-first";

/// The machine-wide parameters that a kubelet wants, with the values that it wants. It is shown files of the node's own
/// in their places, and so leaves the machine's alone.
const KUBELET_SYSCTLS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// What the node's processes must know.
#[derive(Debug, Serialize, Deserialize)]
pub struct Machine {
    /// The host name.
    pub name: String,
    /// Its configurations, and its logs below `log`.
    pub folder: PathBuf,
    /// Its folder in cgroup v2.
    pub cgroup: PathBuf,
    /// Its folders in the hierarchies of v1.
    pub legacy_cgroups: Vec<LegacyGroup>,
    /// What it sees as /sys/fs/bpf.
    pub bpffs: PathBuf,
    /// What its containerd is given.
    pub images: Vec<PathBuf>,
    /// The kubelet and its arguments.
    pub kubelet: Vec<String>,
}

pub fn serve_if_asked() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let serve = match arguments.next()?.as_str() {
        ARGUMENT => outer,
        FIRST => first,
        _ => return None,
    };
    let result = arguments
        .next()
        .context("without a description of the machine")
        .and_then(|text| serve(&text, &serde_json::from_str(&text).context("a strange machine")?));
    Some(match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    })
}

/// Namespaces. The cgroups come first: they are the roots of the cgroup namespace.
fn outer(text: &str, machine: &Machine) -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    for group in &machine.legacy_cgroups {
        fs::write(group.path.join("cgroup.procs"), "0")
            .with_context(|| format!("cannot enter {}", group.path.display()))?;
    }
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWCGROUP
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWPID,
    )
    .context("cannot make the node's namespaces")?;
    let mut command = Command::new("/proc/self/exe");
    command.args([FIRST, text]);
    // SAFETY: prctl is async-signal-safe, and nothing else is done there.
    unsafe {
        command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?));
    }
    let status = command.status().context("cannot start the node's first process")?;
    ensure!(status.success(), "the node's first process ended: {status}");
    Ok(())
}

fn first(_: &str, machine: &Machine) -> Result<()> {
    sethostname(&machine.name).context("cannot set the host name")?;
    mounts(machine)?;

    let log = |name: &str| -> Result<(Stdio, Stdio)> {
        let path = Path::new("/var/log").join(name);
        let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok((file.try_clone()?.into(), file.into()))
    };
    let start = |words: &[String], name: &str| -> Result<Child> {
        let (out, err) = log(name)?;
        let (program, arguments) = words.split_first().context("an empty command")?;
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        Command::new(program)
            .args(arguments)
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .with_context(|| format!("cannot start {program}"))
    };
    let config = machine.folder.join("containerd.toml").display().to_string();
    let words = ["containerd", "--config", &config].map(String::from);
    let mut containerd = start(&words, "containerd.log")?;
    wait_until("containerd", Duration::from_secs(30), || {
        if let Some(status) = containerd.try_wait()? {
            bail!("it ended: {status}");
        }
        std::thread::sleep(Duration::from_millis(100));
        let asked =
            Command::new("ctr").arg("version").stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        Ok(asked.success())
    })?;
    for image in &machine.images {
        let output = Command::new("ctr")
            .args(["--namespace", "k8s.io", "images", "import"])
            .arg(image)
            .output()
            .context("cannot run ctr")?;
        ensure!(
            output.status.success(),
            "containerd does not take {}: {}",
            image.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let kubelet = start(&machine.kubelet, "kubelet.log")?;
    collect(&[("containerd", containerd.id()), ("kubelet", kubelet.id())])
}

/// Waits for every process that ends; one that the node cannot do without ends the node.
fn collect(vital: &[(&str, u32)]) -> Result<()> {
    loop {
        let (pid, how) = match waitpid(None, Some(WaitPidFlag::empty()))? {
            WaitStatus::Exited(pid, code) => (pid, format!("exit status {code}")),
            WaitStatus::Signaled(pid, signal, _) => (pid, format!("{signal}")),
            _ => continue,
        };
        let ended = vital.iter().find(|(_, id)| Pid::from_raw(id.cast_signed()) == pid);
        if let Some((name, _)) = ended {
            bail!("{name} ended ({how}); see /var/log/{name}.log");
        }
    }
}

/// What the node sees: nothing that it can write is the machine's.
fn mounts(machine: &Machine) -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot part the mounts")?;
    // Held in places of their own until /sys, which hides them, is the node's.
    let stage = machine.folder.join("stage");
    let (cgroup, bpffs) = (stage.join("cgroup"), stage.join("bpf"));
    bind(&machine.cgroup, &cgroup)?;
    bind(&machine.bpffs, &bpffs)?;

    new("proc", Path::new("/proc"), "")?;
    new("sysfs", Path::new("/sys"), "")?;
    bind(&bpffs, Path::new("/sys/fs/bpf"))?;
    let groups = Path::new("/sys/fs/cgroup");
    new("tmpfs", groups, "mode=755")?;
    for group in &machine.legacy_cgroups {
        let target = groups.join(&group.name);
        make(&target)?;
        new("cgroup", &target, &group.options)?;
    }
    // It ends at the node's own folder. Not by the name `unified`: there runc would move containers out of the group that
    // the agent is told of, which is below that folder since the root of a mount is refused.
    bind(&cgroup, &groups.join("v2"))?;

    for path in ["/run", "/var/lib"] {
        new("tmpfs", Path::new(path), "mode=755")?;
    }
    for path in ["/run/lock", "/run/netns", "/var/lib/cni", "/var/lib/containerd", "/var/lib/kubelet"] {
        make(Path::new(path))?;
    }
    let log = machine.folder.join("log");
    for path in ["pods", "containers"] {
        make(&log.join(path))?;
    }
    bind(&log, Path::new("/var/log"))?;
    for (key, value) in KUBELET_SYSCTLS {
        let file = machine.folder.join("sysctl").join(key);
        make(file.parent().context("a parameter's file has a folder")?)?;
        fs::write(&file, format!("{value}\n"))?;
        let target = Path::new("/proc/sys").join(key);
        mount(Some(&file), &target, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("cannot hide {}", target.display()))?;
    }
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).context("cannot share the mounts")
}

fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    if !target.is_dir() {
        make(target)?;
    }
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("cannot mount {} on {}", source.display(), target.display()))
}

fn new(kind: &str, target: &Path, options: &str) -> Result<()> {
    mount(Some(kind), target, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("cannot mount a {kind} ({options}) on {}", target.display()))
}
