//! Building `kproxy`: one file that carries the eBPF programs.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::bpf::{self, Objects};
use crate::machine;
use crate::paths::Paths;
use crate::process;
use crate::progress::Progress;
use crate::setup::{self, Purpose};

/// Cargo's two profiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    Debug,
    Release,
}

impl From<bool> for Profile {
    fn from(release: bool) -> Self {
        if release { Self::Release } else { Self::Debug }
    }
}

impl Profile {
    fn folder(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Release => "release",
        }
    }
}

/// Builds the agent around the objects and returns the binary's path.
pub fn agent(paths: &Paths, progress: &Progress, objects: &Objects, profile: Profile) -> Result<PathBuf> {
    progress.step(format!("kproxy, {} build", profile.folder()), || {
        let mut command = process::cargo();
        command.current_dir(&paths.root).args(["build", "--package", "kproxy-agent"]);
        if profile == Profile::Release {
            command.arg("--release");
        }
        bpf::set_env(&mut command, objects);
        process::run(&mut command)?;

        let binary = paths.target.join(profile.folder()).join("kproxy");
        let size = binary.metadata().with_context(|| format!("cargo left no {}", binary.display()))?.len();
        let mib = size as f64 / f64::from(1 << 20);
        progress.note(format!("{}, {mib:.1} MiB", paths.shown(&binary)));
        Ok(binary)
    })
}

/// Sets up and builds what a program that runs in the lab needs; `refusal` begins the sentence where this machine cannot.
pub fn for_lab(
    paths: &Paths,
    progress: &Progress,
    profile: Profile,
    refusal: &str,
) -> Result<(Objects, PathBuf)> {
    let obstacles = machine::lab_obstacles();
    if !obstacles.is_empty() {
        bail!("{refusal}: {}", obstacles.join("; "));
    }
    let tools = setup::run(paths, progress, Purpose::Demo)?;
    let objects = bpf::build(paths, progress, &tools.bpf)?;
    let binary = agent(paths, progress, &objects, profile)?;
    Ok((objects, binary))
}
