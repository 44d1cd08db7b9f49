//! Running the measurements with everything that they need in place.

use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::bpf;
use crate::build::{self, Profile};
use crate::kubernetes;
use crate::paths::Paths;
use crate::process;
use crate::progress::Progress;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// What loading and changing costs, memory, and the size of the programs
    Load,
    /// How long a change takes from a kube-apiserver to the map
    Api,
    /// Connections through a ClusterIP as ratios to direct ones
    Connections,
    /// The same work beside a real kube-proxy, from inside and outside, as ratios to it
    KubeProxy,
    /// Clients that are masqueraded, beside a real kube-proxy: how long they wait for connections, how many are held
    Masquerade,
}

/// Sets up, builds, and becomes the measurement. Returns only where that failed.
pub fn run(
    paths: &Paths,
    progress: &Progress,
    only: Option<Part>,
    rounds: u32,
    services: u32,
) -> Result<ExitCode> {
    let (objects, binary) =
        build::for_lab(paths, progress, Profile::Release, "nothing can be measured here")?;

    let mut command = process::cargo();
    command
        .current_dir(&paths.root)
        .args(["run", "--quiet", "--release", "--package", "kproxy-lab", "--bin", "bench", "--"])
        .args(["--rounds", &rounds.to_string(), "--services", &services.to_string()])
        .env("KPROXY_BIN", binary);
    if only.is_none_or(|only| matches!(only, Part::Api | Part::KubeProxy | Part::Masquerade)) {
        command.env("KUBEBUILDER_ASSETS", kubernetes::ensure(paths, progress)?);
    }
    match only {
        Some(Part::Load) => command.arg("load"),
        Some(Part::Api) => command.arg("api"),
        Some(Part::Connections) => command.arg("connections"),
        Some(Part::KubeProxy) => command.arg("kube-proxy"),
        Some(Part::Masquerade) => command.arg("masquerade"),
        None => &mut command,
    };
    bpf::set_env(&mut command, &objects);
    // Not a child: Ctrl-C goes to the measurement, which takes its lab down, and the shell waits for it.
    let error = command.exec();
    Err(error).context("cannot start cargo for the measurement")
}
