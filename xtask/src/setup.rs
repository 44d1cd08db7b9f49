//! What a contributor's machine needs: found first, named where it is missing, installed where
//! that is possible.

use std::collections::BTreeSet;
use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::apt;
use crate::kubernetes;
use crate::paths::Paths;
use crate::process;
use crate::progress::Progress;
use crate::toolchain::{self, LINKER_LLVM, LINKER_VERSION, Toolchain};

/// What the machine is set up for; each purpose includes the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Purpose {
    Build,
    Demo,
    Test,
}

/// A part of the set-up that can be there, or not, on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Compiler and linker of the eBPF programs, and a linker for the agent.
    Bpf,
    /// The programs that the image has beside kproxy.
    Image,
    /// The programs that the lab runs.
    Lab,
    /// What a full node runs, and what the images of the test cluster are made of.
    Cluster,
    /// rustfmt and clippy.
    Lint,
    /// The API server of the tests.
    Kubernetes,
}

/// What a complete set-up gives to those who build.
#[derive(Debug, Clone)]
pub struct Tools {
    pub bpf: Toolchain,
}

/// One thing that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Lack {
    /// A program, and the Debian package that has it.
    Program {
        program: &'static str,
        package: &'static str,
    },
    BpfRust,
    BpfLinker,
    RustComponent(&'static str),
    Kubernetes(String),
}

/// A Rust with the library sources, as Debian has it.
const RUST_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
/// What bpf-linker is built with. Polly is among the libraries that LLVM says it links to.
const LLVM_PACKAGES: [&str; 2] = ["llvm-22-dev", "libpolly-22-dev"];
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

const BUILD_PROGRAMS: [(&str, &str); 1] = [("cc", "gcc libc6-dev")];
const IMAGE_PROGRAMS: [(&str, &str); 4] = [
    ("ldd", "libc-bin"),
    ("nft", "nftables"),
    ("update-ca-certificates", "ca-certificates"),
    ("xtables-nft-multi", "iptables"),
];
const CLUSTER_PROGRAMS: [(&str, &str); 9] = [
    ("busybox", "busybox-static"),
    ("cc", "gcc libc6-dev"),
    ("containerd", "containerd"),
    ("ctr", "containerd"),
    ("dig", "bind9-dnsutils"),
    ("nc.openbsd", "netcat-openbsd"),
    ("openssl", "openssl"),
    ("runc", "runc"),
    ("ss", "iproute2"),
];
/// The plugins are in a folder of their own.
const CNI_PLUGIN: &str = "/usr/lib/cni/ptp";
const LAB_PROGRAMS: [(&str, &str); 12] = [
    ("bpftool", "bpftool"),
    ("conntrack", "conntrack"),
    ("curl", "curl"),
    ("haproxy", "haproxy"),
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("nft", "nftables"),
    ("nginx", "nginx-light"),
    ("nsenter", "util-linux"),
    ("ping", "iputils-ping"),
    ("sysctl", "procps"),
    ("tcpdump", "tcpdump"),
];

impl Purpose {
    fn parts(self) -> &'static [Part] {
        match self {
            Self::Build => &[Part::Bpf],
            Self::Demo => &[Part::Bpf, Part::Lab],
            Self::Test => &[Part::Bpf, Part::Lab, Part::Lint, Part::Kubernetes],
        }
    }
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Program { program, package } => write!(f, "{program} (package {package})"),
            Self::BpfRust => {
                write!(f, "a Rust toolchain with the library sources, with LLVM {LINKER_LLVM} or older")
            }
            Self::BpfLinker => write!(f, "bpf-linker {LINKER_VERSION} or newer"),
            Self::RustComponent(name) => write!(f, "{name}"),
            Self::Kubernetes(program) => write!(f, "{program}, which the tests run"),
        }
    }
}

/// Brings everything for the purpose, and returns what builds need to know of it.
pub fn run(paths: &Paths, progress: &Progress, purpose: Purpose) -> Result<Tools> {
    ensure(paths, progress, purpose.parts())?;
    tools(paths)
}

/// Says what is missing for the purpose, and changes nothing.
pub fn check(paths: &Paths, purpose: Purpose) -> Result<ExitCode> {
    let lacks = find(paths, purpose.parts())?;
    for lack in &lacks {
        println!("missing: {lack}");
    }
    if !lacks.is_empty() {
        return Ok(ExitCode::FAILURE);
    }
    println!("nothing is missing: {}", tools(paths)?.bpf);
    Ok(ExitCode::SUCCESS)
}

/// The tools of a set-up that is complete.
pub fn tools(paths: &Paths) -> Result<Tools> {
    let bpf = toolchain::find(paths).ok();
    let bpf = bpf.context("the eBPF toolchain is incomplete: run `cargo xtask setup --for build`")?;
    Ok(Tools { bpf })
}

/// Installs what the parts lack. Where nothing is missing, nothing is printed.
pub fn ensure(paths: &Paths, progress: &Progress, parts: &[Part]) -> Result<()> {
    let lacks = find(paths, parts)?;
    if lacks.is_empty() {
        return Ok(());
    }
    for lack in &lacks {
        println!("missing: {lack}");
    }

    let packages = packages(&lacks, Path::new(LLVM_PREFIX).join("lib").is_dir());
    if !packages.is_empty() {
        let packages: Vec<_> = packages.into_iter().collect();
        let installed = apt::install(progress, &packages);
        if lacks.contains(&Lack::BpfRust) || lacks.contains(&Lack::BpfLinker) {
            installed.context(
                "cannot install the eBPF toolchain; `rustup toolchain install nightly --component \
                 rust-src` and a bpf-linker release on PATH serve as well",
            )?;
        } else {
            installed?;
        }
    }
    if lacks.contains(&Lack::BpfLinker) {
        install_linker(paths, progress)?;
    }
    let components: Vec<_> = lacks.iter().filter_map(Lack::component).collect();
    if !components.is_empty() {
        install_components(progress, &components)?;
    }
    if parts.contains(&Part::Kubernetes) {
        kubernetes::ensure(paths, progress)?;
    }

    let still = find(paths, parts)?;
    if !still.is_empty() {
        let still: Vec<_> = still.iter().map(Lack::to_string).collect();
        bail!("still missing after the installation: {}", still.join(", "));
    }
    Ok(())
}

/// Removes what setup built outside of the tree.
pub fn clean_cache(paths: &Paths) -> Result<()> {
    // By name: the cache folder may be one that the user shares with something else.
    let own = ["bpf-linker-", "kubernetes-"];
    let entries = match fs::read_dir(&paths.cache) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("{} does not exist: nothing to do", paths.cache.display());
            return Ok(());
        }
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", paths.cache.display()));
        }
    };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if own.iter().any(|prefix| name.starts_with(prefix)) {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            println!("removed {}", path.display());
        }
    }
    Ok(())
}

fn find(paths: &Paths, parts: &[Part]) -> Result<Vec<Lack>> {
    let mut lacks = Vec::new();
    for part in parts {
        match part {
            Part::Bpf => {
                lacks.extend(absent(&BUILD_PROGRAMS));
                if let Err(missing) = toolchain::find(paths) {
                    lacks.extend(missing.rust.then_some(Lack::BpfRust));
                    lacks.extend(missing.linker.then_some(Lack::BpfLinker));
                }
            }
            Part::Cluster => {
                lacks.extend(absent(&CLUSTER_PROGRAMS));
                if !process::is_executable(Path::new(CNI_PLUGIN)) {
                    lacks.push(Lack::Program { program: CNI_PLUGIN, package: "containernetworking-plugins" });
                }
            }
            Part::Image => lacks.extend(absent(&IMAGE_PROGRAMS)),
            Part::Lab => lacks.extend(absent(&LAB_PROGRAMS)),
            Part::Lint => {
                let lint = [("cargo-fmt", "rustfmt"), ("cargo-clippy", "clippy")];
                for (program, component) in lint {
                    if !beside_cargo(program) {
                        lacks.push(Lack::RustComponent(component));
                    }
                }
            }
            Part::Kubernetes => {
                lacks.extend(kubernetes::missing(paths)?.into_iter().map(Lack::Kubernetes));
            }
        }
    }
    Ok(lacks)
}

fn absent(programs: &[(&'static str, &'static str)]) -> impl Iterator<Item = Lack> {
    programs
        .iter()
        .filter(|(program, _)| process::find(program).is_none())
        .map(|&(program, package)| Lack::Program { program, package })
}

/// Whether the toolchain that runs xtask has the program.
fn beside_cargo(program: &str) -> bool {
    let Some(cargo) = env::var_os("CARGO").map(PathBuf::from) else {
        return process::find(program).is_some();
    };
    cargo.parent().is_some_and(|bin| process::is_executable(&bin.join(program)))
}

impl Lack {
    fn component(&self) -> Option<&'static str> {
        match self {
            Self::RustComponent(name) => Some(name),
            _ => None,
        }
    }
}

/// The Debian packages that end the lacks. A linker is built here, which takes LLVM.
fn packages(lacks: &[Lack], llvm_is_there: bool) -> BTreeSet<&'static str> {
    let mut packages = BTreeSet::new();
    for lack in lacks {
        match lack {
            Lack::Program { package, .. } => packages.extend(package.split(' ')),
            Lack::BpfRust => packages.extend(RUST_PACKAGES),
            Lack::BpfLinker if !llvm_is_there => packages.extend(LLVM_PACKAGES),
            Lack::BpfLinker | Lack::RustComponent(_) | Lack::Kubernetes(_) => {}
        }
    }
    packages
}

fn install_linker(paths: &Paths, progress: &Progress) -> Result<()> {
    let root = toolchain::linker_root(paths);
    let title = format!("bpf-linker {LINKER_VERSION} into {} (a minute or two)", root.display());
    progress.step(title, || {
        process::run(
            process::cargo()
                .args(["install", "bpf-linker", "--locked", "--no-default-features"])
                .args(["--version", &LINKER_VERSION.to_string()])
                .args(["--features", &format!("llvm-{LINKER_LLVM}")])
                .arg("--root")
                .arg(&root)
                // Without it the build does not find -lLLVM: Debian keeps it in a folder of its own.
                .env("LLVM_PREFIX", LLVM_PREFIX)
                // Its release profile asks for debug information, of no use here and slow to make.
                .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
                .env_remove("CARGO_TARGET_DIR"),
        )
    })
}

fn install_components(progress: &Progress, components: &[&str]) -> Result<()> {
    let list = components.join(" ");
    let Some(rustup) = process::find("rustup") else {
        bail!("this Rust has no {list}, and no rustup to add it: install it by the same means as Rust");
    };
    progress.step(format!("rustup component add {list}"), || {
        process::run(Command::new(rustup).args(["component", "add"]).args(components))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(lacks: &[Lack], llvm_is_there: bool) -> String {
        let packages: Vec<_> = packages(lacks, llvm_is_there).into_iter().collect();
        packages.join(" ")
    }

    #[test]
    fn packages_are_those_of_what_is_missing() {
        assert_eq!(named(&[], false), "");
        assert_eq!(named(&[Lack::BpfRust], false), "cargo-web rust-web-src rustc-web");
        assert_eq!(named(&[Lack::BpfLinker], false), "libpolly-22-dev llvm-22-dev");
        assert_eq!(named(&[Lack::BpfLinker], true), "");
        let programs: Vec<_> = absent(&[("no-such-cc", "gcc libc6-dev"), ("sh", "dash")]).collect();
        assert_eq!(named(&programs, false), "gcc libc6-dev");
        assert_eq!(named(&[Lack::RustComponent("clippy")], false), "");
    }

    #[test]
    fn a_wider_purpose_has_all_of_the_narrower_one() {
        let [build, demo, test] = [Purpose::Build, Purpose::Demo, Purpose::Test].map(Purpose::parts);
        assert!(build.iter().all(|part| demo.contains(part)));
        assert!(demo.iter().all(|part| test.contains(part)));
    }
}
