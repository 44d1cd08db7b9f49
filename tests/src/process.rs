//! Processes in the lab: started in a namespace and a cgroup, recorded by id, ended by that id.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::cgroup;
use crate::isolate::STAGE;
use crate::netns::Netns;
use crate::wait::wait_for;

/// How long [`Cmd::run`] waits, unless told.
const DEADLINE: Duration = Duration::from_secs(10);

/// A command that will run in a network namespace and a cgroup.
///
/// Its standard output and error go to files in the member's folder, which stay when it has ended.
#[derive(Debug)]
pub struct Cmd {
    command: Command,
    words: Vec<String>,
    folder: PathBuf,
    input: Option<Vec<u8>>,
    deadline: Duration,
}

impl Cmd {
    /// `folder` is where its output goes.
    pub(crate) fn new(
        program: impl AsRef<OsStr>,
        netns: &Netns,
        group: Option<&Path>,
        folder: &Path,
    ) -> Result<Self> {
        let program = program.as_ref();
        let mut command = Command::new(program);
        // A process group of its own: its children are ended with it.
        command.process_group(0).env_remove(STAGE);
        let namespace = netns.file().try_clone().context("cannot duplicate the namespace's descriptor")?;
        let procs = group.map(cgroup::open_procs).transpose()?;
        // SAFETY: between fork and exec only write(2) and setns(2) are called, which are
        // async-signal-safe, on descriptors that the closure owns.
        unsafe {
            command.pre_exec(move || {
                if let Some(procs) = &procs {
                    // 0 means the writer. Before setns and exec, so that the program's first
                    // socket is already made in the group and in the namespace.
                    let zero = b"0";
                    if libc::write(procs.as_raw_fd(), zero.as_ptr().cast(), zero.len()) != 1 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
                Ok(())
            });
        }
        Ok(Self {
            command,
            words: vec![program.to_string_lossy().into_owned()],
            folder: folder.to_owned(),
            input: None,
            deadline: DEADLINE,
        })
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.words.push(argument.as_ref().to_string_lossy().into_owned());
        self.command.arg(argument);
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = A>) -> Self {
        arguments.into_iter().fold(self, Self::arg)
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Gives it this on standard input; otherwise that is empty.
    pub fn input(mut self, text: impl Into<Vec<u8>>) -> Self {
        self.input = Some(text.into());
        self
    }

    /// How long [`Cmd::run`] waits for its end; 10 s unless set.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When it cannot be started, or has not ended by the deadline (it is then killed). That it
    /// failed is no error here: see [`Output::success`].
    pub fn run(self) -> Result<Output> {
        let deadline = self.deadline;
        let mut process = self.spawn()?;
        let Some(status) = process.wait_deadline(deadline)? else {
            let error = process.stderr();
            bail!("{}: not done within {deadline:?}{}", process.line(), said(&error));
        };
        Ok(Output {
            line: process.line().to_owned(),
            status,
            stdout: process.stdout(),
            stderr: process.stderr(),
        })
    }

    /// Starts it; it is killed when the returned value is dropped.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(mut self) -> Result<Process> {
        let files = Files::create(&self.folder, &self.words)?;
        self.command.stdin(match self.input.take() {
            Some(text) => {
                let path = files.path("in");
                fs::write(&path, text)
                    .and_then(|()| File::open(&path))
                    .map(Stdio::from)
                    .with_context(|| format!("cannot write {}", path.display()))?
            }
            None => Stdio::null(),
        });
        self.command.stdout(files.open("out")?);
        self.start(files)
    }

    /// Starts it with pipes for standard input and output, for a conversation.
    pub(crate) fn spawn_piped(mut self) -> Result<Process> {
        let files = Files::create(&self.folder, &self.words)?;
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped());
        self.start(files)
    }

    fn start(mut self, files: Files) -> Result<Process> {
        self.command.stderr(files.open("err")?);
        let line = self.words.join(" ");
        let child = self.command.spawn().with_context(|| format!("cannot start: {line}"))?;
        Ok(Process { child, ended: None, line, files })
    }
}

/// A process that the lab started. Dropping it kills it and what it started.
#[derive(Debug)]
pub struct Process {
    pub(crate) child: Child,
    ended: Option<ExitStatus>,
    line: String,
    files: Files,
}

impl Process {
    /// Its id in the run's PID namespace.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// The command line, for messages.
    pub fn line(&self) -> &str {
        &self.line
    }

    /// Where its standard output goes.
    pub fn stdout_path(&self) -> PathBuf {
        self.files.path("out")
    }

    /// Where its standard error goes.
    pub fn stderr_path(&self) -> PathBuf {
        self.files.path("err")
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        read_lossy(&self.stdout_path())
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        read_lossy(&self.stderr_path())
    }

    /// Sends a signal to this process alone.
    ///
    /// # Errors
    /// When it has been waited for already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal)
            .with_context(|| format!("cannot send {signal} to {} ({})", self.pid(), self.line))
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When the kernel cannot say.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.ended()?.is_none())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it has not ended by then; it goes on running.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        match self.wait_deadline(deadline)? {
            Some(status) => Ok(status),
            None => bail!("{}: not done within {deadline:?}", self.line),
        }
    }

    /// Fails if it has ended, with what it said: for use while waiting for something it does.
    ///
    /// # Errors
    /// When it has ended.
    pub fn must_run(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => bail!("{} ended: {status}{}", self.line, said(&self.stderr())),
        }
    }

    /// Waits for a condition that this process brings about; fails at once when it ends first.
    ///
    /// # Errors
    /// When it ends, or the deadline passes.
    pub fn wait_ready<T>(
        &mut self,
        what: &str,
        deadline: Duration,
        mut condition: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        enum Seen<T> {
            Ready(T),
            Ended(anyhow::Error),
        }
        let seen = wait_for(what, deadline, || {
            if let Err(error) = self.must_run() {
                return Ok(Some(Seen::Ended(error)));
            }
            Ok(condition(self)?.map(Seen::Ready))
        })
        .with_context(|| format!("{} says{}", self.line, said(&self.stderr())))?;
        match seen {
            Seen::Ready(value) => Ok(value),
            Seen::Ended(error) => Err(error).with_context(|| format!("waiting for {what}")),
        }
    }

    /// How it ended, if it has.
    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
            if self.ended.is_some() {
                self.end_group();
            }
        }
        Ok(self.ended)
    }

    /// Ends what it started and did not wait for, as nginx' workers when nginx is killed: its
    /// process group, which has its id. Done before or right after the process is waited for:
    /// later the id may be somebody else's.
    fn end_group(&self) {
        let _ = killpg(self.pid(), Signal::SIGKILL);
    }

    fn wait_deadline(&mut self, deadline: Duration) -> Result<Option<ExitStatus>> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(200);
        loop {
            if let Some(status) = self.ended()? {
                return Ok(Some(status));
            }
            if start.elapsed() >= deadline {
                return Ok(None);
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended.is_none() {
            self.end_group();
            let _ = self.child.wait();
        }
    }
}

/// What a command did.
#[derive(Clone, Debug)]
pub struct Output {
    line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// The standard output of a command that must succeed.
    ///
    /// # Errors
    /// When it failed, with what it wrote to standard error.
    pub fn success(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!("{self}")
    }

    /// The exit code; `None` when a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => write!(f, "{}: exit status {code}", self.line)?,
            (None, Some(signal)) => write!(f, "{}: ended by signal {signal}", self.line)?,
            (None, None) => write!(f, "{}: {}", self.line, self.status)?,
        }
        f.write_str(&said(&self.stderr))
    }
}

/// The files of one process: `<folder>/<number>-<program>.{in,out,err}`.
#[derive(Debug)]
struct Files {
    stem: PathBuf,
}

impl Files {
    fn create(folder: &Path, words: &[String]) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let program = words.first().map(Path::new).and_then(Path::file_name);
        let program = program.map_or("process".into(), OsStr::to_string_lossy);
        let files = Self { stem: folder.join(format!("{number:04}-{program}")) };
        let mut head = files.open("err")?;
        // Evidence is read by people: which command this was.
        writeln!(head, "# {}", words.join(" ")).context("cannot write to a log")?;
        Ok(files)
    }

    fn path(&self, kind: &str) -> PathBuf {
        self.stem.with_extension(kind)
    }

    fn open(&self, kind: &str) -> Result<File> {
        let path = self.path(kind);
        File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))
    }
}

/// The error text of a process as the end of a sentence; without the head line of the log.
fn said(stderr: &str) -> String {
    let lines: Vec<&str> = stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    // The last words tell most; a log can be long.
    let tail = lines[lines.len().saturating_sub(12)..].join("\n  ");
    if tail.is_empty() { String::from(" (it said nothing)") } else { format!(":\n  {tail}") }
}

fn read_lossy(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    match text.strip_prefix("# ") {
        Some(rest) if path.extension() == Some(OsStr::new("err")) => {
            rest.split_once('\n').map_or(String::new(), |(_, after)| after.to_owned())
        }
        _ => text.into_owned(),
    }
}

/// The errno behind an error, wherever in its chain.
pub fn errno_of(error: &anyhow::Error) -> Option<Errno> {
    error.chain().find_map(|cause| {
        if let Some(errno) = cause.downcast_ref::<Errno>() {
            return Some(*errno);
        }
        let io = cause.downcast_ref::<std::io::Error>()?;
        io.raw_os_error().map(Errno::from_raw)
    })
}
