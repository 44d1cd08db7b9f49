//! The lab's own safety: nothing gets out, nothing stays.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use kproxy_lab::{
    Cni, Context, ElbSpec, Guarded, Lab, LabBuilder, Netns, NodeSpec, cgroup_mount_point, cgroup_processes,
    isolated, remove_leftovers, self_check, wait_until,
};
use nix::sched::{CloneFlags, unshare};

use crate::Scenario;

pub const SCENARIOS: &[Scenario] = &[
    ("lab::check_refuses_foreign_places", refuses_places),
    ("lab::check_refuses_the_machines_namespace", refuses_namespace),
    ("lab::check_refuses_ways_out", refuses_ways_out),
    ("lab::nothing_of_a_lab_stays", nothing_stays),
    ("lab::a_killed_run_leaves_nothing_running", killed_run),
    ("lab::people_can_enter", enter),
    ("lab::an_ended_run_leaves_nothing", ended_run),
    ("lab::evidence_of_a_failure_is_kept", evidence),
];

/// Makes this program a run that stands until it is killed or its input ends.
const HOLD: &str = "__hold";

pub fn is_held_run() -> bool {
    std::env::args_os().nth(1).is_some_and(|first| first == HOLD)
}

/// Stands: prints where its things are, then waits for the end of its input.
pub fn hold() -> ExitCode {
    isolated(|run| {
        self_check(&run, &[])?;
        let lab = LabBuilder::new(&run).node(NodeSpec::new("node-a", 1, &["a1"])).build()?;
        let _sleeper = lab.pod("a1")?.spawn(&["sleep", "1000"])?;
        println!("{}", run.cgroup().display());
        println!("{}", run.folder().display());
        println!("{}", lab.enter_command(lab.pod("a1")?));
        io::stdout().flush()?;
        io::copy(&mut io::stdin(), &mut io::sink())?;
        Ok(ExitCode::from(7))
    })
}

fn refuses_places(ctx: &Context) -> Result<()> {
    let lab = one_node(ctx)?;
    let node = lab.node("node-a")?;
    let good = Guarded { netns: node.netns().path(), cgroup: node.cgroup_root(), bpf_root: node.bpf_root() };
    self_check(ctx.run(), &[good])?;

    let mount = cgroup_mount_point()?;
    let other = mount.join("kproxy-lab-test-other");
    let refuse = |why: &str, guarded: Guarded<'_>| refuses(ctx, why, &[guarded]);
    refuse("is the root of the cgroup", Guarded { cgroup: &mount, ..good })?;
    let run = ctx.run().cgroup();
    refuse("is not below", Guarded { cgroup: run, ..good })?;
    let parent = run.join("..");
    refuse("is the root of the cgroup", Guarded { cgroup: &parent, ..good })?;
    refuse("is no cgroup v2 folder", Guarded { cgroup: Path::new("/tmp"), ..good })?;
    refuse("cannot look at", Guarded { cgroup: &other, ..good })?;

    refuse("is not on a bpffs", Guarded { bpf_root: lab.folder(), ..good })?;
    // Another bpffs, as the machine's would be.
    let strange = lab.folder().join("strange-bpffs");
    fs::create_dir(&strange)?;
    lab.node("node-a")?;
    let status = Command::new("mount").args(["-t", "bpf", "bpf"]).arg(&strange).status()?;
    ensure!(status.success(), "cannot mount a second bpffs");
    let result = refuse("is not the run's own", Guarded { bpf_root: &strange, ..good });
    let status = Command::new("umount").arg(&strange).status()?;
    ensure!(status.success(), "cannot unmount it");
    result?;

    // The agent's door uses the same check, before it looks for a binary.
    let Err(error) = node.agent().cgroup_root(&mount).start() else {
        bail!("an agent was started on the machine's root cgroup");
    };
    ensure!(format!("{error:#}").contains("root of the cgroup"), "{error:#}");
    Ok(())
}

/// The machine's namespace cannot be entered from here (that is the point), so a run's belief about
/// which one it is gets turned round: a held run takes *this* namespace for the machine's.
fn refuses_namespace(ctx: &Context) -> Result<()> {
    let lab = one_node(ctx)?;
    let facts = std::env::var("KPROXY_LAB_STAGE").context("this is no isolated run")?;
    let mut facts: serde_json::Value = serde_json::from_str(&facts)?;
    let own = kproxy_lab::NetnsId::current()?;
    facts["Inside"]["outer_netns"] = serde_json::to_value(own)?;
    let output = Command::new("/proc/self/exe")
        .arg(HOLD)
        .env("KPROXY_LAB_STAGE", facts.to_string())
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "it went on in the machine's namespace");
    ensure!(text.contains("the machine's network namespace"), "{text}");
    drop(lab);
    Ok(())
}

fn refuses_ways_out(ctx: &Context) -> Result<()> {
    let lab = one_node(ctx)?;
    let node = lab.node("node-a")?;

    // A veth whose other end is in a namespace that the lab does not know.
    let foreign = foreign_namespace()?;
    let pid = foreign.holder.id();
    node.ip_command(&format!("link add leak type veth peer name leak0 netns {pid}"))?;
    refuses(ctx, "the other end of leak", &[])?;
    node.ip_command("link del leak")?;
    self_check(ctx.run(), &[])?;

    // A default route to somebody who is not in the lab.
    let pod = lab.pod("a1")?;
    pod.ip_command("route replace default via 10.244.1.254")?;
    refuses(ctx, "leads to 10.244.1.254", &[])?;
    pod.ip_command("route replace default via 10.244.1.1")?;
    pod.ip_command("-6 route add default via fd00:10:244:1::dead metric 1")?;
    refuses(ctx, "leads to fd00:10:244:1::dead", &[])?;
    pod.ip_command("-6 route del default via fd00:10:244:1::dead metric 1")?;
    self_check(ctx.run(), &[])?;

    // An agent is not started as long as there is one, wherever it is.
    let other = Netns::create("somewhere")?;
    other.within(|| Ok(()))?;
    self_check(ctx.run(), &[])?;
    let pid = foreign.holder.id();
    let status = Command::new("ip")
        .args(["-n", "somewhere", "link", "add", "leak", "type", "veth"])
        .args(["peer", "name", "leak1", "netns", &pid.to_string()])
        .status()?;
    ensure!(status.success());
    let Err(error) = node.agent().start() else {
        bail!("an agent was started beside a way out");
    };
    ensure!(format!("{error:#}").contains("the other end of leak"), "{error:#}");
    Ok(())
}

fn nothing_stays(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1"])).elb(ElbSpec::new()))?;
    let folder = lab.folder().to_owned();
    let cgroup = lab.node("node-a")?.cgroup_root().to_owned();
    let pins = lab.node("node-a")?.bpf_root().to_owned();
    let netns = lab.pod("a1")?.netns().path().to_owned();
    fs::create_dir(&pins)?;
    let pod = lab.pod("a1")?.clone();
    // A grandchild that has left its parent's process group: only its cgroup tells whose it is.
    let mut process = pod.spawn(&["sh", "-c", "setsid sleep 1000 & wait"])?;
    wait_until("the grandchild", Duration::from_secs(5), || Ok(cgroup_processes(pod.cgroup())?.len() == 2))?;
    let pids = cgroup_processes(pod.cgroup())?;
    drop(lab);
    ctx.forget_labs();
    for path in [&folder, &cgroup, &pins, &netns] {
        ensure!(!path.exists(), "{} is still there", path.display());
    }
    ensure!(!process.is_running()?, "the process lives on");
    for pid in pids {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Not yet collected by its parent is dead as well.
        ensure!(stat.is_empty() || stat.contains(") Z "), "lives on: {stat}");
    }
    // The names are free, though `pod` still holds a namespace.
    let again = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1"])))?;
    drop(pod);
    ensure!(again.pod("a1")?.netns().path().exists());
    Ok(())
}

fn killed_run(ctx: &Context) -> Result<()> {
    let mut held = Held::start()?;
    let processes = processes_below(&held.cgroup)?;
    ensure!(processes >= 2, "{processes} processes in the held run");

    // A live run's things are left alone.
    let mount = cgroup_mount_point()?;
    remove_leftovers(&mount)?;
    ensure!(held.cgroup.exists(), "the things of a live run were removed");

    // The outer process is killed: it cannot clean up; the kernel ends the rest.
    held.child.kill()?;
    held.child.wait()?;
    wait_until("all processes of it being gone", Duration::from_secs(5), || {
        Ok(processes_below(&held.cgroup)? == 0)
    })?;
    ensure!(held.cgroup.exists(), "nobody was there to remove it");
    let removed = remove_leftovers(&mount)?;
    ensure!(removed.contains(&held.cgroup), "{removed:?}");
    ensure!(!held.cgroup.exists());
    let temp = held.folder.parent().context("a folder has a parent")?;
    let removed = remove_leftovers(temp)?;
    ensure!(removed.contains(&held.folder), "{removed:?}");
    ensure!(ctx.run().cgroup().exists(), "our own were removed");
    Ok(())
}

fn enter(_: &Context) -> Result<()> {
    let held = Held::start()?;
    let mut shell =
        Command::new("sh").args(["-c", &held.enter]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = shell.stdin.take().context("it has no input")?;
    stdin.write_all(b"ip -br address show eth0\ngrep 0:: /proc/self/cgroup\nls /run/netns\n")?;
    drop(stdin);
    let output = shell.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    for expected in ["10.244.1.10", "/node-a/a1\n", "gateway\n"] {
        ensure!(text.contains(expected), "no {expected} in: {text}");
    }
    Ok(())
}

fn ended_run(_: &Context) -> Result<()> {
    // Its program ends: its exit status is handed through.
    let mut held = Held::start()?;
    drop(held.child.stdin.take());
    let status = held.child.wait()?;
    ensure!(status.code() == Some(7), "{status}");
    ensure!(!held.cgroup.exists() && !held.folder.exists());

    // A signal, as from Ctrl-C or a CI that gives up.
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let mut held = Held::start()?;
        let pid = held.child.id().to_string();
        let sent = Command::new("kill").args(["-s", signal, &pid]).status()?;
        ensure!(sent.success());
        let status = held.child.wait()?;
        ensure!(status.code() == Some(code), "{signal}: {status}");
        ensure!(!held.cgroup.exists(), "{} is there", held.cgroup.display());
        ensure!(!held.folder.exists(), "{} is there", held.folder.display());
    }
    Ok(())
}

fn evidence(ctx: &Context) -> Result<()> {
    let result = Context::scenario(ctx.run(), "evidence-of-failure", |inner| {
        let lab = one_node(inner)?;
        lab.pod("a1")?.run(&["sh", "-c", "echo a last word >&2"])?;
        let node = lab.node("node-a")?;
        fs::create_dir(node.bpf_root())?;
        node.command("bpftool")?
            .args(["map", "create"])
            .arg(node.bpf_root().join("frontend"))
            .args(["type", "array", "key", "4", "value", "4", "entries", "2"])
            .args(["name", "frontend"])
            .run()?
            .success()?;
        // A panic, without the report on stderr that is not meant for anybody here.
        resume_unwind(Box::new("on purpose"));
    });
    let Err(error) = result else {
        bail!("a panic is no success");
    };
    let text = format!("{error:#}");
    ensure!(text.contains("on purpose"), "{text}");
    let folder = ctx.run().evidence().join("evidence-of-failure");
    ensure!(text.contains(&folder.display().to_string()), "{text}");
    let network = fs::read_to_string(folder.join("node-a/network.txt"))?;
    ensure!(network.contains("192.0.2.11") && network.contains("10.244.1.0/24"));
    let map = fs::read_to_string(folder.join("node-a/map-frontend.txt"))?;
    ensure!(map.contains("Found 2 elements"), "{map}");
    let mut words = String::new();
    for entry in fs::read_dir(folder.join("a1"))? {
        words.push_str(&fs::read_to_string(entry?.path())?);
    }
    ensure!(words.contains("a last word"), "{words}");
    fs::remove_dir_all(&folder)?;
    // Gone if nothing else failed before.
    let _ = fs::remove_dir(ctx.run().evidence());
    Ok(())
}

fn one_node(ctx: &Context) -> Result<Lab> {
    ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1"]).cni(Cni::Bridge)))
}

fn refuses(ctx: &Context, why: &str, guarded: &[Guarded<'_>]) -> Result<()> {
    let Err(error) = self_check(ctx.run(), guarded) else {
        bail!("the check went on, where it should have said: {why}");
    };
    let text = format!("{error:#}");
    ensure!(text.contains(why), "the check said: {text}; not: {why}");
    Ok(())
}

/// A process in a network namespace without a name, as any of the machine's would be.
struct Foreign {
    holder: Child,
}

fn foreign_namespace() -> Result<Foreign> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let made = unshare(CloneFlags::CLONE_NEWNET)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(Command::new("sleep").arg("1000").spawn()?));
        let _ = send.send(made);
    });
    let holder = receive.recv()??;
    Ok(Foreign { holder })
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A run of this program within this one.
struct Held {
    child: Child,
    cgroup: PathBuf,
    folder: PathBuf,
    /// The command by which a person enters a pod of it.
    enter: String,
}

impl Held {
    fn start() -> Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg(HOLD)
            .env_remove("KPROXY_LAB_STAGE")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().context("it has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let mut next = || -> Result<String> { Ok(lines.next().context("the held run said nothing")??) };
        let (cgroup, folder, enter) = (next()?.into(), next()?.into(), next()?);
        Ok(Self { child, cgroup, folder, enter })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // The end of its input ends it in an orderly way, if it still runs.
        self.child.stdin.take();
        let _ = self.child.wait();
    }
}

fn processes_below(group: &Path) -> Result<usize> {
    let mut count = fs::read_to_string(group.join("cgroup.procs"))?.lines().count();
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            count += processes_below(&entry.path())?;
        }
    }
    Ok(count)
}
