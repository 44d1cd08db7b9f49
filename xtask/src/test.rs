//! Running every test that this machine can run, and counting them at the end.

use std::fmt::Display;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::bpf::{self, Objects};
use crate::build::{self, Profile};
use crate::kubernetes;
use crate::machine;
use crate::paths::Paths;
use crate::process;
use crate::progress::{Progress, duration};
use crate::setup::{self, Part};

/// Sums over all runners, and what did not run or did not hold.
#[derive(Debug, Default)]
struct Summary {
    tally: Tally,
    failures: Vec<String>,
    skips: Vec<String>,
}

/// A runner's own counts.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
}

/// Checks formatting and lints, also of the eBPF programs. Needs the objects as any build does.
pub fn lint(paths: &Paths, progress: &Progress) -> Result<ExitCode> {
    let mut summary = Summary::default();
    setup::ensure(paths, progress, &[Part::Bpf, Part::Lint])?;
    let objects = bpf::build(paths, progress, &setup::tools(paths)?.bpf)?;
    lint_steps(paths, progress, &objects, &mut summary);
    Ok(summary.close(None))
}

/// Everything, in the order in which failures are cheap to find.
pub fn run(paths: &Paths, progress: &Progress, skip_lab: bool, filter: Option<&str>) -> Result<ExitCode> {
    let start = Instant::now();
    let mut summary = Summary::default();
    if let Err(error) = steps(paths, progress, skip_lab, filter, &mut summary) {
        summary.fail("set-up and build", format!("{error:#}"));
    }
    Ok(summary.close(Some(start)))
}

/// The steps of `test`; an error is one after which nothing else can run.
fn steps(
    paths: &Paths,
    progress: &Progress,
    skip_lab: bool,
    filter: Option<&str>,
    summary: &mut Summary,
) -> Result<()> {
    setup::ensure(paths, progress, &[Part::Bpf, Part::Lint])?;
    let lab = if skip_lab { Err("--skip-lab was given".to_owned()) } else { prepare_lab(paths, progress) };
    let objects = bpf::build(paths, progress, &setup::tools(paths)?.bpf)?;
    lint_steps(paths, progress, &objects, summary);
    let binary = build::agent(paths, progress, &objects, Profile::Debug)?;

    let mut runner = |title: &str, mut command: Command| {
        // One failing test binary does not keep the others from running.
        command.current_dir(&paths.root).args(["--no-fail-fast", "--"]).args(filter);
        bpf::set_env(&mut command, &objects);
        summary.runner(progress, title, command, filter.is_some());
    };
    let mut unit = process::cargo();
    unit.args(["test", "--workspace", "--exclude", "kproxy-lab"]);
    runner("unit, property and case tests", unit);
    let mut lab_unit = process::cargo();
    lab_unit.args(["test", "--package", "kproxy-lab", "--lib", "--bins"]);
    runner("tests of the lab", lab_unit);

    match lab {
        Err(reason) => summary.skip(format!("lab scenarios: {reason}")),
        Ok(Lab { kubernetes }) => {
            let mut scenarios = process::cargo();
            scenarios
                .args(["test", "--package", "kproxy-lab", "--test", "scenarios"])
                .env("KPROXY_BIN", &binary);
            match &kubernetes {
                Ok(dir) => scenarios.env("KUBEBUILDER_ASSETS", dir),
                Err(_) => scenarios.env_remove("KUBEBUILDER_ASSETS"),
            };
            runner("lab scenarios", scenarios);
            if let Err(reason) = kubernetes {
                summary.skip(format!("scenarios with an API server: {reason}"));
            }
        }
    }

    if let Some(filter) = filter
        && summary.tally == Tally::default()
    {
        summary.fail("filter", format!("no test has `{filter}` in its name"));
    }
    Ok(())
}

/// What the scenarios can count on.
struct Lab {
    /// The folder of the API server's programs, or why there is none.
    kubernetes: Result<PathBuf, String>,
}

fn prepare_lab(paths: &Paths, progress: &Progress) -> Result<Lab, String> {
    let obstacles = machine::lab_obstacles();
    if !obstacles.is_empty() {
        return Err(obstacles.join("; "));
    }
    setup::ensure(paths, progress, &[Part::Lab]).map_err(|error| format!("{error:#}"))?;
    let kubernetes = kubernetes::ensure(paths, progress).map_err(|error| format!("{error:#}"));
    Ok(Lab { kubernetes })
}

fn lint_steps(paths: &Paths, progress: &Progress, objects: &Objects, summary: &mut Summary) {
    let mut fmt = process::cargo();
    fmt.current_dir(&paths.root).args(["fmt", "--all", "--check"]);
    summary.command(progress, "formatting", &mut fmt);

    let ebpf = paths.ebpf().join("Cargo.toml");
    let mut fmt = process::cargo();
    fmt.current_dir(&paths.root).args(["fmt", "--check", "--manifest-path"]).arg(&ebpf);
    summary.command(progress, "formatting of the eBPF programs", &mut fmt);

    let mut clippy = process::cargo();
    clippy.current_dir(&paths.root).args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    bpf::set_env(&mut clippy, objects);
    summary.command(progress, "clippy", &mut clippy);

    // For this machine instead of BPF, which takes no library sources, and from the root, where
    // the folder's own configuration does not apply. The programs use unstable features, as their
    // own build allows them to.
    let mut clippy = process::cargo();
    clippy
        .current_dir(&paths.root)
        .args(["clippy", "--bins", "--manifest-path"])
        .arg(&ebpf)
        .arg("--target-dir")
        .arg(paths.bpf_out().join("clippy"))
        .args(["--", "-D", "warnings"])
        .env("RUSTC_BOOTSTRAP", "1");
    summary.command(progress, "clippy on the eBPF programs", &mut clippy);
}

impl Summary {
    /// A step that passes or fails as a whole; the steps after it run in either case.
    fn command(&mut self, progress: &Progress, title: &str, command: &mut Command) {
        if let Err(error) = progress.step(title, || process::run(command)) {
            self.fail(title, format!("{error:#}"));
        }
    }

    /// A step whose program prints results of tests, which are counted. Only with a filter may
    /// there be none: a runner that has lost its tests does not pass.
    fn runner(&mut self, progress: &Progress, title: &str, mut command: Command, filtered: bool) {
        let before = self.tally;
        let tally = &mut self.tally;
        let ran = progress.step(title, || count(&mut command, tally));
        match ran {
            // Its failures are counted test by test.
            Err(error) if self.tally.failed > before.failed => {
                self.failures.push(format!("{title}: {error:#}"));
            }
            Err(error) => self.fail(title, format!("{error:#}")),
            Ok(()) if !filtered && self.tally == before => {
                self.fail(title, "no test ran".to_owned());
            }
            Ok(()) => {}
        }
    }

    /// Something other than a test that did not hold; it counts as one.
    fn fail(&mut self, title: &str, reason: String) {
        println!("    {reason}");
        self.tally.failed += 1;
        self.failures.push(format!("{title}: {reason}"));
    }

    fn skip(&mut self, reason: String) {
        println!("==> skipped: {reason}");
        self.skips.push(reason);
    }

    /// Prints what came of it all; the last line has the counts.
    fn close(self, start: Option<Instant>) -> ExitCode {
        let Self { tally, failures, skips } = self;
        println!();
        for skip in &skips {
            println!("skipped: {skip}");
        }
        for failure in &failures {
            println!("FAILED: {failure}");
        }
        match start {
            Some(start) => println!("{} ({})", tally, duration(start.elapsed())),
            None if failures.is_empty() => println!("no findings"),
            None => {}
        }
        if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

impl Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { passed, failed, ignored } = self;
        write!(f, "{passed} passed, {failed} failed, {ignored} ignored")
    }
}

/// Runs a test runner, passes its output on as it comes, and adds up its closing lines.
fn count(command: &mut Command, tally: &mut Tally) -> Result<()> {
    let shown = process::shown(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{shown}`"))?;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.with_context(|| format!("cannot read what `{shown}` prints"))?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            if let Some(Tally { passed, failed, ignored }) = closing_line(&line) {
                tally.passed += passed;
                tally.failed += failed;
                tally.ignored += ignored;
            }
        }
    }
    let status = child.wait().with_context(|| format!("cannot wait for `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` ended with {status}");
    }
    Ok(())
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; …`, as libtest and libtest-mimic end.
fn closing_line(line: &str) -> Option<Tally> {
    let counts = line.trim().strip_prefix("test result: ")?;
    let (_, counts) = counts.split_once(". ")?;
    let of =
        |word: &str| counts.split("; ").find_map(|part| part.strip_suffix(word)?.trim_end().parse().ok());
    Some(Tally { passed: of("passed")?, failed: of("failed")?, ignored: of("ignored")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_read() {
        let tally = |passed, failed, ignored| Some(Tally { passed, failed, ignored });
        assert_eq!(
            closing_line(
                "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; \
                 finished in 0.00s"
            ),
            tally(12, 0, 3)
        );
        assert_eq!(
            closing_line("test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured"),
            tally(1, 2, 0)
        );
        assert_eq!(closing_line("test model::tests::it ... ok"), None);
        assert_eq!(closing_line("test result: none"), None);
    }

    #[test]
    fn a_runner_without_a_test_does_not_pass() {
        let shell = |script: &str| {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script]);
            command
        };
        let none = "echo 'test result: ok. 0 passed; 0 failed; 0 ignored'";
        let one = "echo 'test result: FAILED. 0 passed; 1 failed; 0 ignored'; exit 1";
        let failures = |script: &str, filtered| {
            let mut summary = Summary::default();
            summary.runner(&Progress::new(), "tests", shell(script), filtered);
            (summary.failures.len(), summary.tally.failed)
        };
        assert_eq!(failures(none, false), (1, 1));
        assert_eq!(failures(none, true), (0, 0));
        // A failing test and its runner's exit status are one failure.
        assert_eq!(failures(one, false), (1, 1));
        assert_eq!(failures("exit 1", true), (1, 1));
    }

    #[test]
    fn all_runners_are_added_up_and_a_failing_one_is_an_error() {
        let mut tally = Tally::default();
        let mut run = |script: &str| count(Command::new("/bin/sh").args(["-c", script]), &mut tally);
        run("echo 'test result: ok. 2 passed; 0 failed; 1 ignored'").unwrap();
        let failing = run("echo 'test result: FAILED. 3 passed; 1 failed; 0 ignored'; exit 101");
        assert!(failing.unwrap_err().to_string().contains("exit status: 101"));
        assert_eq!(tally.to_string(), "5 passed, 1 failed, 1 ignored");
    }
}
