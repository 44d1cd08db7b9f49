//! Running the soak with everything that it needs in place: the scenario of the tests, for longer.

use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::bpf;
use crate::build::{self, Profile};
use crate::machine;
use crate::paths::Paths;
use crate::process;
use crate::progress::Progress;
use crate::setup::{self, Purpose};

/// Sets up, builds, and becomes the soak. Returns only where that failed.
pub fn run(paths: &Paths, progress: &Progress, minutes: u64) -> Result<ExitCode> {
    let obstacles = machine::lab_obstacles();
    if !obstacles.is_empty() {
        bail!("the soak cannot run here: {}", obstacles.join("; "));
    }
    let tools = setup::run(paths, progress, Purpose::Demo)?;
    let objects = bpf::build(paths, progress, &tools.bpf)?;
    let binary = build::agent(paths, progress, &objects, Profile::Debug)?;

    let mut command = process::cargo();
    command
        .current_dir(&paths.root)
        .args(["test", "--quiet", "--package", "kproxy-lab", "--test", "scenarios", "--"])
        .args(["--exact", "kproxy::soak"])
        .env("KPROXY_BIN", binary)
        .env("KPROXY_SOAK_SECONDS", (minutes * 60).to_string());
    bpf::set_env(&mut command, &objects);
    // Not a child: Ctrl-C goes to the soak, which takes its lab down, and the shell waits for it.
    let error = command.exec();
    Err(error).context("cannot start cargo for the soak")
}
