//! `cargo xtask conformance`: builds what a cluster of full nodes takes, and runs Kubernetes' own tests in it.

mod images;

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::bpf;
use crate::build::{self, Profile};
use crate::kubernetes;
use crate::machine;
use crate::paths::Paths;
use crate::process;
use crate::progress::Progress;
use crate::setup::{self, Part};

/// The specs that a certified cluster must pass.
const CONFORMANCE: &str = r"\[sig-network\] Services.*\[Conformance\]";

/// All of Kubernetes' tests of the network.
const ALL: &str = r"\[sig-network\]";

/// What of that does not run here whatever the proxy is, and why.
const LEFT_OUT: [(&str, &str); 8] = [
    (r"\[Feature:SCTPConnectivity\]", "opens SCTP sockets, which the lab's kernel does not have"),
    (
        r"\[Feature:Networking-(IPv4|IPv6|DNS)\]|DNS configMap nameserver",
        "wants the internet, or a DNS server that knows it",
    ),
    (r"\[Feature:(Networking-Performance|PerformanceDNS)\]", "measures speed"),
    (r"\[Feature:NetworkPolicy\]|\[Feature:Ingress\]", "is about policies of a CNI or an ingress controller"),
    (r"\[sig-network\] LoadBalancers", "wants a controller that gives load balancers their addresses"),
    (r"\[Provider:GCE\]", "wants that cloud"),
    (r"\[Feature:KubeProxyNFAcct\]", "is about kube-proxy's iptables mode"),
    (r"\[Disruptive\]", "restarts what the lab runs in another way than the test knows"),
];

#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Only specs whose names match this; without it, the conformance specs of Services
    #[arg(long, value_name = "REGEX", conflicts_with = "all")]
    focus: Option<String>,
    /// All specs of Kubernetes' network that can run here; about a quarter of an hour, and docs/conformance.md anew
    #[arg(long)]
    all: bool,
    /// Leave out specs whose names match this
    #[arg(long, value_name = "REGEX")]
    skip: Option<String>,
    /// Leave the cluster standing afterwards and say how to look around
    #[arg(long)]
    keep: bool,
    /// What serves the Services: a failure with both is not kproxy's
    #[arg(long, value_enum, default_value_t = Proxy::Kproxy)]
    proxy: Proxy,
    /// Test this kproxy, as of another version, and not a build of the tree
    #[arg(long, value_name = "FILE", conflicts_with = "proxy")]
    binary: Option<PathBuf>,
    /// How many nodes, in two zones
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=5))]
    nodes: u8,
    /// How many specs at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
    procs: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Proxy {
    Kproxy,
    KubeProxy,
}

/// Sets up, builds, and becomes the test run. Returns only where that failed.
pub fn run(paths: &Paths, progress: &Progress, options: Options) -> Result<ExitCode> {
    let obstacles = machine::lab_obstacles();
    if !obstacles.is_empty() {
        bail!("a cluster cannot be made here: {}", obstacles.join("; "));
    }
    setup::ensure(paths, progress, &[Part::Lab, Part::Image, Part::Cluster])?;
    let programs = kubernetes::ensure_conformance(paths, progress)?;
    let binary = match &options.binary {
        Some(binary) => std::path::absolute(binary)?,
        None => {
            setup::ensure(paths, progress, &[Part::Bpf])?;
            let objects = bpf::build(paths, progress, &setup::tools(paths)?.bpf)?;
            build::agent(paths, progress, &objects, Profile::Debug)?
        }
    };
    let images =
        progress.step("images of the cluster", || images::make(paths, progress, &programs, &binary))?;

    let Options { focus, all, skip, keep, proxy, binary: other, nodes, procs } = options;
    let focus = match (focus, all) {
        (Some(focus), _) => focus,
        (None, true) => ALL.to_owned(),
        (None, false) => CONFORMANCE.to_owned(),
    };
    let left_out = if all { &LEFT_OUT[..] } else { &[] };
    let patterns = left_out.iter().map(|(pattern, _)| (*pattern).to_owned());
    let skip = skip.into_iter().chain(patterns).collect::<Vec<_>>().join("|");
    let settings = json!({
        "programs": programs,
        "images": images.files,
        "registries": images.registries,
        "coredns": images.coredns,
        "pause": images.pause,
        "manifests": paths.root.join("manifests"),
        "results": paths.target.join("conformance"),
        "report": (all && proxy == Proxy::Kproxy && other.is_none()).then(|| paths.root.join("docs/conformance.md")),
        "focus": focus,
        "skip": skip,
        "left_out": left_out,
        "keep": keep,
        "kube_proxy": proxy == Proxy::KubeProxy,
        "nodes": nodes,
        "procs": procs,
    });
    let mut command = process::cargo();
    command
        .current_dir(&paths.root)
        .args(["run", "--quiet", "--package", "kproxy-lab", "--bin", "conformance"])
        .env("KPROXY_CONFORMANCE", settings.to_string());
    // Not a child: Ctrl-C goes to the run, which takes its cluster down, and the shell waits for it.
    let error = command.exec();
    Err(error).context("cannot start cargo for the conformance tests")
}
