//! Kubernetes' own programs that the tests run, built from the pins in `tests/go`: kube-apiserver, etcd, kubectl and
//! kube-proxy for the scenarios, and the rest of a cluster with its end-to-end tests for `cargo xtask conformance`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use sha2::{Digest as _, Sha256};

use crate::paths::Paths;
use crate::process;
use crate::progress::Progress;

/// A program, the module in `tests/go` that pins it, its Go package and the pinned requirement.
#[derive(Debug, Clone, Copy)]
struct Program {
    name: &'static str,
    pin: &'static str,
    package: &'static str,
    requirement: &'static str,
    /// Our own part of it, in the pin's folder: it is built anew where that changes.
    source: Option<&'static str>,
}

const KUBERNETES: &str = "k8s.io/kubernetes";
const ETCD: &str = "go.etcd.io/etcd/server/v3";

const PROGRAMS: [Program; 4] = [
    Program::of_kubernetes("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    Program::of_kubernetes("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    Program::of_kubernetes("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
    Program { name: "etcd", pin: "etcd", package: ETCD, requirement: ETCD, source: None },
];

const GINKGO: &str = "github.com/onsi/ginkgo/v2";
const COREDNS: &str = "github.com/coredns/coredns";

/// What a cluster of full nodes takes besides, and the tests that are run against it.
const CONFORMANCE: [Program; 8] = [
    Program::of_kubernetes("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
    Program::of_kubernetes("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    Program::of_kubernetes("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
    Program::of_kubernetes("agnhost", "k8s.io/kubernetes/test/images/agnhost"),
    Program::of_kubernetes("regression-issue-74839", "k8s.io/kubernetes/test/images/regression-issue-74839"),
    Program {
        name: "ginkgo",
        pin: "kubernetes",
        package: "github.com/onsi/ginkgo/v2/ginkgo",
        requirement: GINKGO,
        source: None,
    },
    Program {
        name: "e2e.test",
        pin: "kubernetes",
        package: "./e2e",
        requirement: KUBERNETES,
        source: Some("e2e/main_test.go"),
    },
    Program { name: "coredns", pin: "coredns", package: ".", requirement: COREDNS, source: Some("main.go") },
];

/// What a folder in `KUBEBUILDER_ASSETS` holds by convention.
const CONVENTION: [&str; 3] = ["etcd", "kube-apiserver", "kubectl"];

impl Program {
    const fn of_kubernetes(name: &'static str, package: &'static str) -> Self {
        Self { name, pin: "kubernetes", package, requirement: KUBERNETES, source: None }
    }

    fn module_dir(self, paths: &Paths) -> PathBuf {
        paths.root.join("tests/go").join(self.pin)
    }

    fn version(self, paths: &Paths) -> Result<String> {
        let file = self.module_dir(paths).join("go.mod");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let version = required_version(&text, self.requirement)
            .with_context(|| format!("{} does not require {}", file.display(), self.requirement))?;
        Ok(version.to_owned())
    }

    /// What its stamp must say: the version, and a digest of our own part.
    fn built_from(self, paths: &Paths) -> Result<String> {
        let version = self.version(paths)?;
        let Some(source) = self.source else {
            return Ok(version);
        };
        let file = self.module_dir(paths).join(source);
        let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let digest: String = Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(format!("{version} {digest}"))
    }

    /// The file beside a program that says what it was built from.
    fn stamp(self, dir: &Path) -> PathBuf {
        dir.join(format!(".{}.version", self.name))
    }

    fn is_built(self, dir: &Path, built_from: &str) -> bool {
        process::is_executable(&dir.join(self.name))
            && fs::read_to_string(self.stamp(dir)).is_ok_and(|found| found.trim() == built_from)
    }
}

/// The programs that are not there yet, as `name version`.
pub fn missing(paths: &Paths) -> Result<Vec<String>> {
    if let Some(dir) = named_folder() {
        check_named_folder(&dir)?;
        return Ok(Vec::new());
    }
    let dir = own_folder(paths)?;
    let mut missing = Vec::new();
    for program in PROGRAMS {
        let version = program.version(paths)?;
        if !program.is_built(&dir, &version) {
            missing.push(format!("{} {version}", program.name));
        }
    }
    Ok(missing)
}

/// Builds what is missing and returns the folder with the programs.
pub fn ensure(paths: &Paths, progress: &Progress) -> Result<PathBuf> {
    if let Some(dir) = named_folder() {
        check_named_folder(&dir)?;
        return Ok(dir);
    }
    ensure_programs(
        paths,
        progress,
        &PROGRAMS,
        "The tests' API server is built once",
        "250 MiB, and about 5 minutes",
    )
}

/// Builds what is missing of a whole cluster and its tests, and returns the folder with the programs.
pub fn ensure_conformance(paths: &Paths, progress: &Progress) -> Result<PathBuf> {
    ensure_programs(
        paths,
        progress,
        &PROGRAMS,
        "The API server is built once",
        "250 MiB, and about 5 minutes",
    )?;
    ensure_programs(
        paths,
        progress,
        &CONFORMANCE,
        "A cluster's programs and Kubernetes' tests are built once",
        "500 MiB, and about 8 minutes",
    )
}

/// The folder of Kubernetes' own sources, as Go has unpacked them.
pub fn sources(paths: &Paths) -> Result<PathBuf> {
    let [apiserver, ..] = PROGRAMS;
    let go = process::find("go").context("Go is needed: install Go 1.26 or newer")?;
    let mut command = Command::new(go);
    command.current_dir(apiserver.module_dir(paths)).env("GOWORK", "off");
    let dir = process::output(command.args(["list", "-m", "-f", "{{.Dir}}", KUBERNETES]))?;
    Ok(PathBuf::from(dir.trim()))
}

/// The version of the DNS server, and so of its image.
pub fn coredns_version(paths: &Paths) -> Result<String> {
    let [.., coredns] = CONFORMANCE;
    coredns.version(paths)
}

fn ensure_programs(
    paths: &Paths,
    progress: &Progress,
    programs: &[Program],
    what: &str,
    cost: &str,
) -> Result<PathBuf> {
    let dir = own_folder(paths)?;
    let mut announced = false;
    for &program in programs {
        let built_from = program.built_from(paths)?;
        if program.is_built(&dir, &built_from) {
            continue;
        }
        if !announced {
            println!("{what}, into {}: {cost} on two cores where Go has nothing cached.", dir.display());
            announced = true;
        }
        let version = program.version(paths)?;
        progress.step(format!("{} {version}", program.name), || {
            build(paths, program, &version, &built_from, &dir)
        })?;
    }
    Ok(dir)
}

fn named_folder() -> Option<PathBuf> {
    env::var_os("KUBEBUILDER_ASSETS").filter(|dir| !dir.is_empty()).map(PathBuf::from)
}

fn check_named_folder(dir: &Path) -> Result<()> {
    for name in CONVENTION {
        if !process::is_executable(&dir.join(name)) {
            bail!(
                "KUBEBUILDER_ASSETS names {}, which holds no {name}: complete it, or unset the \
                 variable and have the programs built",
                dir.display()
            );
        }
    }
    Ok(())
}

fn own_folder(paths: &Paths) -> Result<PathBuf> {
    let [apiserver, ..] = PROGRAMS;
    let version = apiserver.version(paths)?;
    Ok(paths.cache.join(format!("kubernetes-{version}")))
}

fn build(paths: &Paths, program: Program, version: &str, built_from: &str, dir: &Path) -> Result<()> {
    let go = process::find("go").context(
        "Go is needed to build the tests' API server: install Go 1.26 or newer, or name a folder \
         with etcd, kube-apiserver and kubectl in KUBEBUILDER_ASSETS",
    )?;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;

    // Two runs may build at once: each has its own file, and the last one to end wins.
    let unfinished = dir.join(format!(".{}.{}", program.name, std::process::id()));
    let built = process::run(
        Command::new(go)
            .current_dir(program.module_dir(paths))
            .env("CGO_ENABLED", "0")
            .env("GOFLAGS", "-mod=readonly")
            .env("GOWORK", "off")
            .args(if program.name.ends_with(".test") { &["test", "-c"][..] } else { &["build"] })
            .arg("-trimpath")
            .arg(format!("-ldflags={}", link_flags(program, version)))
            .arg("-o")
            .arg(&unfinished)
            .arg(program.package),
    );
    if let Err(error) = built {
        // An unfinished file is of no use; the reason of the failure is what counts.
        let _ = fs::remove_file(&unfinished);
        return Err(error);
    }
    fs::rename(&unfinished, dir.join(program.name))
        .and_then(|()| fs::write(program.stamp(dir), format!("{built_from}\n")))
        .with_context(|| format!("cannot write to {}", dir.display()))
}

/// Without symbols, and with the version that Kubernetes' own build writes into its programs.
fn link_flags(program: Program, version: &str) -> String {
    let mut flags = String::from("-s -w");
    if program.requirement == KUBERNETES {
        let package = "k8s.io/component-base/version";
        let mut numbers = version.trim_start_matches('v').split('.');
        let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
        for (name, value) in [("gitVersion", version), ("gitMajor", major), ("gitMinor", minor)] {
            flags.push_str(&format!(" -X {package}.{name}={value}"));
        }
    }
    flags
}

/// The version at which a go.mod requires a module, in a block or on a line of its own.
fn required_version<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| {
        let line = line.trim_start().trim_start_matches("require ");
        let version = line.strip_prefix(module)?.strip_prefix(' ')?;
        version.split_whitespace().next().filter(|version| version.starts_with('v'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pin_is_read_from_go_mod() {
        let text = "module x\n\ntool k8s.io/kubernetes/cmd/kubectl\n\n\
                    require k8s.io/kubernetes v1.36.3\n\n\
                    require (\n\tgo.etcd.io/etcd/server/v3 v3.6.8 // indirect\n)\n\
                    replace k8s.io/api => k8s.io/api v0.36.3\n";
        assert_eq!(required_version(text, KUBERNETES), Some("v1.36.3"));
        assert_eq!(required_version(text, ETCD), Some("v3.6.8"));
        assert_eq!(required_version(text, "k8s.io/api"), None);
        assert_eq!(required_version(text, "go.etcd.io/etcd"), None);
    }

    #[test]
    fn kubernetes_programs_know_their_version() {
        let [apiserver, .., etcd] = PROGRAMS;
        let flags = link_flags(apiserver, "v1.36.3");
        assert!(flags.starts_with("-s -w -X "), "{flags}");
        assert!(flags.contains("version.gitVersion=v1.36.3 "), "{flags}");
        assert!(flags.ends_with("version.gitMinor=36"), "{flags}");
        assert_eq!(link_flags(etcd, "v3.6.8"), "-s -w");
    }
}
