//! Running the demo with everything that it needs in place.

use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::bpf;
use crate::build::{self, Profile};
use crate::paths::Paths;
use crate::process;
use crate::progress::Progress;

/// Sets up, builds, and becomes the demo. Returns only where that failed.
pub fn run(paths: &Paths, progress: &Progress, args: &[String]) -> Result<ExitCode> {
    let (objects, binary) = build::for_lab(paths, progress, Profile::Debug, "the demo cannot run here")?;

    let mut command = process::cargo();
    command
        .current_dir(&paths.root)
        .args(["run", "--quiet", "--package", "kproxy-lab", "--bin", "demo"])
        .arg("--")
        .args(args)
        .env("KPROXY_BIN", binary);
    bpf::set_env(&mut command, &objects);
    // Not a child: Ctrl-C goes to the demo, which takes its lab down, and the shell waits for it.
    let error = command.exec();
    Err(error).context("cannot start cargo for the demo")
}
