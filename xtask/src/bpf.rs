//! Building the eBPF objects out of `kproxy-ebpf` into `target/bpf`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::paths::Paths;
use crate::process;
use crate::progress::Progress;
use crate::toolchain::Toolchain;

/// The program that the binary carries.
const PROGRAMS: &str = "kproxy";
/// Programs that exist for tests only: the same decision, behind a hook that can be test-run.
const TEST_PROGRAMS: &str = "kproxy-test";

/// The finished objects.
#[derive(Debug, Clone)]
pub struct Objects {
    pub programs: PathBuf,
    /// Absent where `kproxy-ebpf` has no such binary.
    pub test_programs: Option<PathBuf>,
}

/// Builds every binary of `kproxy-ebpf` and leaves each as `target/bpf/NAME.bpf.o`.
pub fn build(paths: &Paths, progress: &Progress, toolchain: &Toolchain) -> Result<Objects> {
    progress.step(format!("eBPF programs: {toolchain}"), || {
        ensure!(
            paths.ebpf().join("Cargo.toml").is_file(),
            "{} has no Cargo.toml: there are no eBPF programs to build",
            paths.ebpf().display()
        );
        let executables = compile(paths, toolchain)?;
        let mut objects = Vec::new();
        for (name, executable) in executables {
            let object = paths.bpf_out().join(format!("{name}.bpf.o"));
            let size = install(&executable, &object)?;
            progress.note(format!("{}, {} KiB", paths.shown(&object), size / 1024));
            objects.push((name, object));
        }
        let mut object = |name: &str| {
            let index = objects.iter().position(|(found, _)| found == name)?;
            Some(objects.swap_remove(index).1)
        };
        Ok(Objects {
            programs: object(PROGRAMS).with_context(|| {
                format!("kproxy-ebpf has no binary `{PROGRAMS}`, which the agent carries")
            })?,
            test_programs: object(TEST_PROGRAMS),
        })
    })
}

/// Hands the objects to a cargo that builds or tests what embeds or loads them.
pub fn set_env(command: &mut Command, objects: &Objects) {
    let Objects { programs, test_programs } = objects;
    command.env("KPROXY_BPF_OBJECT", programs);
    match test_programs {
        Some(object) => command.env("KPROXY_TEST_OBJECT", object),
        None => command.env_remove("KPROXY_TEST_OBJECT"),
    };
}

/// Runs cargo in the folder of the programs, whose configuration holds target and flags, and
/// returns the names and files of the binaries.
fn compile(paths: &Paths, toolchain: &Toolchain) -> Result<Vec<(String, PathBuf)>> {
    let Toolchain { rust, linker } = toolchain;
    let mut command = process::cargo_of(&rust.cargo, &rust.rustc);
    command
        .current_dir(paths.ebpf())
        .args(["build", "--release", "--bins"])
        .arg("--message-format=json-render-diagnostics")
        .arg("--target-dir")
        .arg(paths.bpf_out().join("build"))
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &linker.path);
    if env::var_os("CI").is_some() {
        command.arg("--locked");
    }
    if !rust.nightly {
        // `-Z build-std` is unstable; the compiler is a stable one that is asked to allow it.
        command.env("RUSTC_BOOTSTRAP", "1");
    }

    // Diagnostics and progress go to stderr as they come; stdout names what was built.
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", rust.cargo.display()))?;
    if !output.status.success() {
        bail!(
            "the eBPF programs do not build, see above; where it is bpf-linker that cannot read a \
             file, its LLVM is older than the compiler's {}: replace {}",
            rust.llvm,
            linker.path.display()
        );
    }
    String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| executable(line).transpose()).collect()
}

/// The name and file of a binary, out of one of cargo's messages.
fn executable(message: &str) -> Result<Option<(String, PathBuf)>> {
    let message: Value = serde_json::from_str(message)
        .with_context(|| format!("cargo said something that is no message: {message}"))?;
    if message["reason"] != "compiler-artifact" {
        return Ok(None);
    }
    match (message["target"]["name"].as_str(), message["executable"].as_str()) {
        (Some(name), Some(file)) => Ok(Some((name.to_owned(), file.into()))),
        _ => Ok(None),
    }
}

/// Copies an object to its place, in bytes. One that is the same stays untouched: the agent's
/// build watches it by its time.
fn install(from: &Path, to: &Path) -> Result<usize> {
    let new = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(new.len());
    }
    let written = || -> std::io::Result<()> {
        if let Some(dir) = to.parent() {
            fs::create_dir_all(dir)?;
        }
        let unfinished = to.with_extension("tmp");
        fs::write(&unfinished, &new)?;
        fs::rename(unfinished, to)
    };
    written().with_context(|| format!("cannot write {}", to.display()))?;
    Ok(new.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_binaries_are_taken_from_cargos_messages() {
        let binary = r#"{"reason":"compiler-artifact","target":{"name":"kproxy","kind":["bin"]},
                         "executable":"/t/kproxy"}"#;
        assert_eq!(executable(binary).unwrap(), Some(("kproxy".into(), "/t/kproxy".into())));
        let library = r#"{"reason":"compiler-artifact","target":{"name":"core","kind":["lib"]},
                          "executable":null}"#;
        assert_eq!(executable(library).unwrap(), None);
        let end = r#"{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(end).unwrap(), None);
        assert!(executable("Compiling").is_err());
    }
}
