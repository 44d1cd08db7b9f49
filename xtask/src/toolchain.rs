//! Which Rust and which bpf-linker build the eBPF programs.
//!
//! `core` has to be compiled for the BPF target, which takes a toolchain that carries the library
//! sources: a contributor's nightly with `rust-src`, or the Rust of the Linux distribution. The
//! linker reads the compiler's LLVM bitcode, so its LLVM must not be older than the compiler's.

use std::cmp::Reverse;
use std::env;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::paths::Paths;
use crate::process;

/// The version that setup builds, and the oldest that is used where one is found.
pub const LINKER_VERSION: Version = Version(0, 13, 0);
/// The LLVM that setup builds the linker with: Debian's, the same as its Rust's.
pub const LINKER_LLVM: u32 = 22;
/// The workspace's `rust-version`; the programs share `kproxy-common` with it.
const OLDEST_RUST: Version = Version(1, 95, 0);

/// A version of three numbers, without what may follow them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

/// A Rust toolchain that has the library sources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rust {
    /// As rustup names it, or `system`.
    pub name: String,
    pub cargo: PathBuf,
    pub rustc: PathBuf,
    pub version: Version,
    pub llvm: u32,
    /// Whether unstable options need no `RUSTC_BOOTSTRAP`.
    pub nightly: bool,
}

/// A bpf-linker that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linker {
    pub path: PathBuf,
    pub version: Version,
    /// Major version of the shared LLVM that it loads; none where LLVM is inside of it.
    pub llvm: Option<u32>,
}

/// A compiler and a linker that understand each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toolchain {
    pub rust: Rust,
    pub linker: Linker,
}

/// What keeps this machine from building the programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// No toolchain with sources, or none that the linker in prospect could follow.
    pub rust: bool,
    /// No linker, or only ones that are too old.
    pub linker: bool,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rust, linker } = self;
        write!(
            f,
            "rustc {} ({}), bpf-linker {} ({})",
            rust.version,
            rust.name,
            linker.version,
            linker.path.display()
        )
    }
}

/// Where setup puts the linker that it builds, keyed by version: `cargo install --root`.
pub fn linker_root(paths: &Paths) -> PathBuf {
    paths.cache.join(format!("bpf-linker-{LINKER_VERSION}"))
}

/// Looks for toolchains and linkers on this machine and pairs the best of them.
pub fn find(paths: &Paths) -> Result<Toolchain, Missing> {
    choose(installed_rust(), installed_linkers(paths))
}

/// Picks the first linker, in the order given, that can follow a compiler; of the compilers the
/// nightly ones first, the newer before the older.
fn choose(mut rust: Vec<Rust>, linkers: Vec<Linker>) -> Result<Toolchain, Missing> {
    rust.retain(|rust| rust.version >= OLDEST_RUST);
    rust.sort_by_key(|rust| Reverse((rust.nightly, rust.version)));

    for linker in &linkers {
        if linker.version < LINKER_VERSION {
            continue;
        }
        let fits = |rust: &&Rust| linker.llvm.is_none_or(|llvm| rust.llvm <= llvm);
        if let Some(rust) = rust.iter().find(fits) {
            return Ok(Toolchain { rust: rust.clone(), linker: linker.clone() });
        }
    }

    let usable = |linker: &Linker| {
        linker.version >= LINKER_VERSION && linker.llvm.is_none_or(|llvm| llvm >= LINKER_LLVM)
    };
    Err(Missing {
        rust: !rust.iter().any(|rust| rust.llvm <= LINKER_LLVM),
        linker: !linkers.iter().any(usable),
    })
}

/// Rustup's toolchains and the system's, those of them that have the sources.
fn installed_rust() -> Vec<Rust> {
    let mut found = Vec::new();
    if let Some(rustup) = process::find("rustup")
        && let Ok(list) = process::output(Command::new(rustup).args(["toolchain", "list", "-v"]))
    {
        for (name, dir) in list.lines().filter_map(rustup_line) {
            let bin = dir.join("bin");
            found.extend(rust_at(&name, &dir, bin.join("cargo"), bin.join("rustc")));
        }
    }
    found.extend(rust_at("system", Path::new("/usr"), "/usr/bin/cargo".into(), "/usr/bin/rustc".into()));
    found
}

fn rust_at(name: &str, sysroot: &Path, cargo: PathBuf, rustc: PathBuf) -> Option<Rust> {
    let sources = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if !sources.is_file() || !process::is_executable(&cargo) {
        return None;
    }
    // With cargo's variables in place a rustc that is rustup's stand-in would answer for another.
    let described = process::output(Command::new(&rustc).arg("-vV").env_remove("RUSTUP_TOOLCHAIN")).ok()?;
    let (version, llvm, nightly) = rustc_description(&described)?;
    Some(Rust { name: name.to_owned(), cargo, rustc, version, llvm, nightly })
}

/// The linkers that run: one on `PATH` or in cargo's folder first, the one that setup built last.
fn installed_linkers(paths: &Paths) -> Vec<Linker> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cargo")));
    let mut places: Vec<_> = [
        process::find("bpf-linker"),
        cargo_home.map(|home| home.join("bin/bpf-linker")),
        Some(linker_root(paths).join("bin/bpf-linker")),
    ]
    .into_iter()
    .flatten()
    .collect();
    places.dedup();
    places.iter().filter_map(|path| linker_at(path)).collect()
}

fn linker_at(path: &Path) -> Option<Linker> {
    if !process::is_executable(path) {
        return None;
    }
    let said = process::output(Command::new(path).arg("--version")).ok()?;
    Some(Linker {
        path: path.to_owned(),
        version: version_in(&said)?,
        llvm: process::output(Command::new("ldd").arg(path))
            .ok()
            .and_then(|libraries| shared_llvm(&libraries)),
    })
}

/// A line of `rustup toolchain list -v`: the name, remarks in brackets, the folder.
fn rustup_line(line: &str) -> Option<(String, PathBuf)> {
    let name = line.split_whitespace().next()?;
    let dir = &line[line.find(" /").or_else(|| line.find("\t/"))? + 1..];
    Some((name.to_owned(), PathBuf::from(dir.trim_end())))
}

/// Version, major version of LLVM and whether it is a nightly, out of `rustc -vV`.
fn rustc_description(text: &str) -> Option<(Version, u32, bool)> {
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
    let release = value("release: ")?;
    let llvm = value("LLVM version: ")?.split('.').next()?.parse().ok()?;
    let nightly = release.contains("-nightly") || release.contains("-dev");
    Some((version_in(release)?, llvm, nightly))
}

/// The first word that begins with a version of three numbers.
fn version_in(text: &str) -> Option<Version> {
    text.split_whitespace().find_map(|word| {
        let mut numbers = word.split(['.', '-', '+']).map(str::parse);
        match (numbers.next(), numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch))) => Some(Version(major, minor, patch)),
            _ => None,
        }
    })
}

/// The major version of the libLLVM among what `ldd` lists: `libLLVM.so.22.1`, `libLLVM-22.so`.
fn shared_llvm(ldd: &str) -> Option<u32> {
    ldd.lines().find_map(|line| {
        let rest = line.trim_start().strip_prefix("libLLVM")?;
        rest.split(['.', '-', ' ']).find_map(|part| part.parse().ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rust(name: &str, version: Version, llvm: u32) -> Rust {
        Rust {
            name: name.to_owned(),
            cargo: PathBuf::from(format!("/{name}/cargo")),
            rustc: PathBuf::from(format!("/{name}/rustc")),
            version,
            llvm,
            nightly: name.starts_with("nightly"),
        }
    }

    fn linker(name: &str, version: Version, llvm: Option<u32>) -> Linker {
        Linker { path: PathBuf::from(format!("/{name}/bpf-linker")), version, llvm }
    }

    fn pair(rust: Vec<Rust>, linkers: Vec<Linker>) -> Result<(String, String), Missing> {
        choose(rust, linkers).map(|pair| (pair.rust.name, pair.linker.path.display().to_string()))
    }

    const NEW: Version = Version(1, 97, 0);
    const DEBIAN: Version = Version(1, 96, 0);

    #[test]
    fn a_contributors_nightly_and_linker_come_first() {
        let found = pair(
            vec![rust("system", DEBIAN, 22), rust("nightly", NEW, 23)],
            vec![linker("path", LINKER_VERSION, None), linker("cache", LINKER_VERSION, Some(22))],
        );
        assert_eq!(found, Ok(("nightly".into(), "/path/bpf-linker".into())));
    }

    #[test]
    fn a_linker_is_never_older_than_the_compilers_llvm() {
        let compilers = vec![rust("nightly", NEW, 23), rust("system", DEBIAN, 22)];
        let found = pair(compilers, vec![linker("path", LINKER_VERSION, Some(22))]);
        assert_eq!(found, Ok(("system".into(), "/path/bpf-linker".into())));
    }

    #[test]
    fn an_old_linker_on_the_path_gives_way_to_the_one_of_setup() {
        let found = pair(
            vec![rust("system", DEBIAN, 22)],
            vec![linker("path", Version(0, 9, 15), None), linker("cache", LINKER_VERSION, Some(22))],
        );
        assert_eq!(found, Ok(("system".into(), "/cache/bpf-linker".into())));
    }

    #[test]
    fn the_newer_of_two_nightlies_is_taken() {
        let older = rust("nightly-2026-02-01", DEBIAN, 22);
        let newer = rust("nightly", NEW, 22);
        let found = pair(vec![older, newer], vec![linker("p", LINKER_VERSION, None)]);
        assert_eq!(found, Ok(("nightly".into(), "/p/bpf-linker".into())));
    }

    #[test]
    fn what_is_missing_is_what_setup_has_to_bring() {
        let system = || rust("system", DEBIAN, 22);
        let missing = |rust, linker| Err(Missing { rust, linker });
        assert_eq!(pair(vec![], vec![]), missing(true, true));
        assert_eq!(pair(vec![system()], vec![]), missing(false, true));
        let good = linker("path", LINKER_VERSION, Some(22));
        assert_eq!(pair(vec![], vec![good.clone()]), missing(true, false));
        // A nightly ahead of every linker: the system's Rust is what setup can bring.
        let ahead = vec![rust("nightly", NEW, 23)];
        assert_eq!(pair(ahead, vec![good]), missing(true, false));
        let old = linker("path", LINKER_VERSION, Some(21));
        assert_eq!(pair(vec![system()], vec![old.clone()]), missing(false, true));
        assert_eq!(pair(vec![], vec![old]), missing(true, true));
        let ancient = vec![rust("system", Version(1, 63, 0), 14)];
        assert_eq!(pair(ancient, vec![]), missing(true, true));
    }

    #[test]
    fn rustups_list_is_read() {
        assert_eq!(
            rustup_line("nightly-x86_64-unknown-linux-gnu (active, default) /home/a b/nightly"),
            Some(("nightly-x86_64-unknown-linux-gnu".into(), "/home/a b/nightly".into()))
        );
        assert_eq!(rustup_line("mine\t/opt/rust"), Some(("mine".into(), "/opt/rust".into())));
        assert_eq!(rustup_line("no installed toolchains"), None);
    }

    #[test]
    fn rustcs_description_is_read() {
        let text = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\n\
                    release: 1.97.0-nightly\nLLVM version: 22.1.4\n";
        assert_eq!(rustc_description(text), Some((Version(1, 97, 0), 22, true)));
        assert_eq!(rustc_description("rustc 1.97.0"), None);
    }

    #[test]
    fn versions_and_libraries_are_read() {
        assert_eq!(version_in("bpf-linker 0.13.0\n"), Some(LINKER_VERSION));
        assert_eq!(version_in("bpf-linker 0.14.1-rc.2"), Some(Version(0, 14, 1)));
        assert_eq!(version_in("bpf-linker"), None);
        let debian = "\tlinux-vdso.so.1 (0x1)\n\tlibLLVM.so.22.1 => /usr/lib/libLLVM.so.22.1 (0x2)";
        assert_eq!(shared_llvm(debian), Some(22));
        assert_eq!(shared_llvm("\tlibLLVM-21.so.1 => /usr/lib/x (0x2)"), Some(21));
        assert_eq!(shared_llvm("\tstatically linked"), None);
    }
}
