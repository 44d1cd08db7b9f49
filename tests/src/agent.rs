//! The agent on a node: the real `kproxy agent`, and the operator's commands beside it.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::agent_log::{LogLine, parse_log};
use crate::check::{Guarded, self_check};
use crate::manifests::Manifests;
use crate::member::Node;
use crate::process::{Cmd, Output, Process};
use crate::wait::wait_for;

/// Names the `kproxy` binary; otherwise it is looked for beside this program.
const BINARY: &str = "KPROXY_BIN";

/// What the agent says when everything it was told is in the kernel.
const SYNCED: &str = "synced";

/// How long the agent may take to say something, unless told.
const DEADLINE: Duration = Duration::from_secs(10);

/// The `kproxy` binary under test.
///
/// # Errors
/// When there is none, with what to do.
pub fn kproxy_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(BINARY) {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "{BINARY} names {}, which is no file", path.display());
        return std::path::absolute(path).context("cannot make it absolute");
    }
    // Programs are in target/debug, tests in target/debug/deps.
    let here = std::env::current_exe().context("cannot tell where this program is")?;
    here.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("kproxy"))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "there is no kproxy beside {}: build it with `cargo xtask build`, or name it in {BINARY}",
                here.display()
            )
        })
}

/// An agent that is about to be started.
#[derive(Clone, Debug)]
pub struct AgentBuilder {
    node: Node,
    binary: Option<PathBuf>,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    cluster_cidr: bool,
    node_addresses: bool,
    manifests: Vec<PathBuf>,
    bpf_root: PathBuf,
    cgroup_root: PathBuf,
}

impl AgentBuilder {
    pub(crate) fn new(node: &Node) -> Self {
        Self {
            node: node.clone(),
            binary: None,
            arguments: Vec::new(),
            environment: Vec::new(),
            cluster_cidr: true,
            node_addresses: true,
            manifests: Vec::new(),
            bpf_root: node.bpf_root().to_owned(),
            cgroup_root: node.cgroup_root().to_owned(),
        }
    }

    /// Starts this binary rather than [`kproxy_binary`]'s, as for an upgrade.
    pub fn binary(mut self, path: &Path) -> Self {
        self.binary = Some(path.to_owned());
        self
    }

    /// Reads objects from a folder.
    pub fn manifests(mut self, folder: &Manifests) -> Self {
        self.manifests.push(folder.path().to_owned());
        self
    }

    /// Reads objects from an API server.
    pub fn kubeconfig(self, file: &Path) -> Self {
        self.arg("--kubeconfig").arg(file)
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    pub fn args<A: Into<OsString>>(self, arguments: impl IntoIterator<Item = A>) -> Self {
        arguments.into_iter().fold(self, Self::arg)
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((key.into(), value.into()));
        self
    }

    /// Does not tell it where pods live.
    pub fn without_cluster_cidr(mut self) -> Self {
        self.cluster_cidr = false;
        self
    }

    /// Does not tell it the node's own addresses: it has them from the Node object, or from interfaces.
    pub fn without_node_addresses(mut self) -> Self {
        self.node_addresses = false;
        self
    }

    /// Gives it another folder for its pins; it must be on the run's own bpffs.
    pub fn bpf_root(mut self, folder: &Path) -> Self {
        self.bpf_root = folder.to_owned();
        self
    }

    /// Gives it another cgroup; it must be below the run's own.
    pub fn cgroup_root(mut self, group: &Path) -> Self {
        self.cgroup_root = group.to_owned();
        self
    }

    /// Starts it, after the self-check of the whole lab.
    ///
    /// # Errors
    /// When a packet or a program could get out, or the binary cannot be started.
    pub fn start(self) -> Result<Agent> {
        let process = self.command()?.spawn()?;
        Ok(Agent { builder: self, process, mark: 0 })
    }

    /// Runs it to its end, for an agent that is expected to refuse.
    ///
    /// # Errors
    /// When it has not ended by the deadline.
    pub fn run(self, deadline: Duration) -> Result<Output> {
        self.command()?.deadline(deadline).run()
    }

    fn command(&self) -> Result<Cmd> {
        let node = &self.node;
        let guarded =
            Guarded { netns: node.netns().path(), cgroup: &self.cgroup_root, bpf_root: &self.bpf_root };
        self_check(&node.run, &[guarded]).context("not starting an agent")?;
        let group = node.cgroup_root().join("agent");
        let binary = match &self.binary {
            Some(path) => path.clone(),
            None => kproxy_binary()?,
        };
        let mut command = Cmd::new(binary, node.netns(), Some(&group), node.folder())?
            .arg("agent")
            .arg("--bpf-root")
            .arg(&self.bpf_root)
            .arg("--cgroup-root")
            .arg(&self.cgroup_root)
            .args(["--node-name", node.name()])
            .args(["--log-format", "json", "-v"]);
        if self.node_addresses {
            for address in [node.v4().to_string(), node.v6().to_string()] {
                command = command.args(["--node-address", &address]);
            }
        }
        if self.cluster_cidr {
            command = command.arg("--cluster-cidr").arg(node.cluster_cidrs.join(","));
        }
        for folder in &self.manifests {
            command = command.arg("--manifests").arg(folder);
        }
        for (key, value) in &self.environment {
            command = command.env(key, value);
        }
        Ok(command.args(&self.arguments))
    }
}

/// An agent that was started. Dropping it kills it; its maps and programs stay until the lab ends.
#[derive(Debug)]
pub struct Agent {
    builder: AgentBuilder,
    process: Process,
    /// How many log lines the last [`Agent::mark`] had seen.
    mark: usize,
}

impl Agent {
    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Everything it has logged so far.
    pub fn log(&self) -> Vec<LogLine> {
        parse_log(&self.process.stderr())
    }

    /// What it logged since the last mark, or since its start.
    pub fn log_since_mark(&self) -> Vec<LogLine> {
        self.log().into_iter().skip(self.mark).collect()
    }

    /// From here on, only later log lines count.
    pub fn mark(&mut self) {
        self.mark = self.log().len();
    }

    /// Waits for a log line since the last mark.
    ///
    /// # Errors
    /// When the agent ends, or the deadline passes.
    pub fn wait_log(
        &mut self,
        what: &str,
        deadline: Duration,
        mut predicate: impl FnMut(&LogLine) -> bool,
    ) -> Result<LogLine> {
        let mark = self.mark;
        self.process.wait_ready(what, deadline, |process| {
            let mut lines = parse_log(&process.stderr()).into_iter().skip(mark);
            Ok(lines.find(|line| predicate(line)))
        })
    }

    /// Waits until it has said "synced" since the last mark, or since its start.
    ///
    /// # Errors
    /// When the agent ends, or has not said so within 10 s.
    pub fn wait_synced(&mut self) -> Result<LogLine> {
        self.wait_log("the agent being synced", DEADLINE, |line| line.message == SYNCED)
    }

    /// Makes a change and waits until the agent has said "synced" after it.
    ///
    /// # Errors
    /// When the change fails, the agent ends, or has not said so within 10 s.
    pub fn apply<T>(&mut self, change: impl FnOnce() -> Result<T>) -> Result<T> {
        self.mark();
        let value = change()?;
        self.wait_synced()?;
        Ok(value)
    }

    /// Sends it a signal and waits for its end.
    ///
    /// # Errors
    /// When it has not ended within 10 s.
    pub fn kill(&mut self, signal: Signal) -> Result<ExitStatus> {
        self.process.signal(signal)?;
        self.process.wait(DEADLINE)
    }

    /// Starts it again as it was started, with a log of its own. The old one is killed if it
    /// still runs.
    ///
    /// # Errors
    /// As [`AgentBuilder::start`].
    pub fn restart(&mut self) -> Result<()> {
        if self.process.is_running()? {
            self.kill(Signal::SIGKILL)?;
        }
        self.process = self.builder.command()?.spawn()?;
        self.mark = 0;
        Ok(())
    }
}

impl Node {
    /// Runs another command of `kproxy` on this node, as `["services", "-o", "json"]`, with this
    /// node's `--bpf-root`.
    ///
    /// # Errors
    /// When the binary is not there, or has not ended within 10 s. That it failed is no error
    /// here.
    pub fn kproxy(&self, arguments: &[&str]) -> Result<Output> {
        let Some((subcommand, rest)) = arguments.split_first() else {
            bail!("kproxy needs a command");
        };
        self.command(kproxy_binary()?)?.args([subcommand, "--bpf-root"]).arg(self.bpf_root()).args(rest).run()
    }

    /// Prints the maps pinned by this node's agent, each by its file name below the pins' folder,
    /// as `bpftool map dump` prints it, up to a million characters: arrays have hundreds of thousands
    /// of places, and what is used of them comes first. Folders are walked; what is no map is left out.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn dump_maps(&self) -> Result<Vec<(String, String)>> {
        let mut dumps = Vec::new();
        let mut folders = vec![self.bpf_root().to_owned()];
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot read {}", folder.display()));
                }
            };
            for entry in entries {
                let path = entry?.path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let script = "bpftool map dump pinned \"$1\" | head -c 1000000";
                let output = self.command("sh")?.args(["-c", script, "sh"]).arg(&path).run()?;
                if !output.stdout.is_empty() {
                    let name = path.strip_prefix(self.bpf_root()).unwrap_or(&path);
                    dumps.push((name.display().to_string(), output.stdout));
                }
            }
        }
        dumps.sort_unstable();
        Ok(dumps)
    }
}

/// Runs a command of `kproxy` on a node (see [`Node::kproxy`]) until it prints what is expected.
///
/// # Errors
/// When the deadline passes.
pub fn wait_kproxy(
    node: &Node,
    arguments: &[&str],
    deadline: Duration,
    mut predicate: impl FnMut(&Output) -> bool,
) -> Result<Output> {
    let what = format!("`kproxy {}` printing what is expected", arguments.join(" "));
    let mut last = None;
    wait_for(&what, deadline, || {
        let output = node.kproxy(arguments)?;
        last = Some(output.stdout.clone());
        Ok(predicate(&output).then_some(output))
    })
    .with_context(|| format!("last printed: {}", last.unwrap_or_default()))
}
