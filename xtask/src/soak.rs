//! Running the soak with everything that it needs in place: the scenario of the tests, for longer.

use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::bpf;
use crate::build::{self, Profile};
use crate::paths::Paths;
use crate::process;
use crate::progress::Progress;

/// Sets up, builds, and becomes the soak. Returns only where that failed.
pub fn run(paths: &Paths, progress: &Progress, minutes: u64) -> Result<ExitCode> {
    let (objects, binary) = build::for_lab(paths, progress, Profile::Debug, "the soak cannot run here")?;

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
