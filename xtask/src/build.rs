//! Building `kproxy`: one file that carries the eBPF programs.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::bpf::{self, Objects};
use crate::paths::Paths;
use crate::process;
use crate::progress::Progress;

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
