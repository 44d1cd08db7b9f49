//! Where things are: the tree, cargo's target folder, and the cache outside of the tree.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The folders that xtask reads from and writes to. All are absolute.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The root of the workspace.
    pub root: PathBuf,
    /// Cargo's target folder: `CARGO_TARGET_DIR`, else `target` in the root.
    pub target: PathBuf,
    /// What is built once per machine and outlives a clone: `KPROXY_CACHE`, else `kproxy` in the
    /// user's cache folder.
    pub cache: PathBuf,
}

impl Paths {
    /// Finds the folders. The root is the folder above this package's manifest, as cargo names it.
    pub fn discover() -> Result<Self> {
        let manifest_dir = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest_dir.parent().context("the xtask package has no folder above it")?.to_path_buf();
        ensure!(
            root.join("kproxy-ebpf").is_dir(),
            "{} is not the kproxy tree: run `cargo xtask` inside of it",
            root.display()
        );

        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        Ok(Self { target, cache: cache_dir(|name| env::var_os(name).map(PathBuf::from))?, root })
    }

    /// The workspace of the eBPF programs: one of its own, for a toolchain of its own.
    pub fn ebpf(&self) -> PathBuf {
        self.root.join("kproxy-ebpf")
    }

    /// The finished eBPF objects, and cargo's folder for them below it.
    pub fn bpf_out(&self) -> PathBuf {
        self.target.join("bpf")
    }

    /// The path as a person would type it in the tree's root, where it lies below it.
    pub fn shown<'a>(&self, path: &'a Path) -> std::path::Display<'a> {
        path.strip_prefix(&self.root).unwrap_or(path).display()
    }
}

fn cache_dir(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf> {
    // The XDG rule: a relative path in XDG_CACHE_HOME is invalid and is to be ignored.
    let absolute = |name| variable(name).filter(|path: &PathBuf| path.is_absolute());
    if let Some(dir) = absolute("KPROXY_CACHE") {
        return Ok(dir);
    }
    if let Some(dir) = absolute("XDG_CACHE_HOME") {
        return Ok(dir.join("kproxy"));
    }
    let home = absolute("HOME")
        .context("HOME is not set: set it, or KPROXY_CACHE to a folder that may be written")?;
    Ok(home.join(".cache/kproxy"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(set: &[(&str, &str)]) -> Option<PathBuf> {
        cache_dir(|name| {
            let (_, value) = set.iter().find(|(key, _)| *key == name)?;
            Some(PathBuf::from(value))
        })
        .ok()
    }

    #[test]
    fn the_nearest_setting_names_the_cache() {
        let home = ("HOME", "/home/me");
        assert_eq!(with(&[home]), Some("/home/me/.cache/kproxy".into()));
        let xdg = ("XDG_CACHE_HOME", "/var/cache/me");
        assert_eq!(with(&[home, xdg]), Some("/var/cache/me/kproxy".into()));
        let own = ("KPROXY_CACHE", "/srv/kproxy");
        assert_eq!(with(&[home, xdg, own]), Some("/srv/kproxy".into()));
        let relative = ("XDG_CACHE_HOME", "cache");
        assert_eq!(with(&[home, relative]), Some("/home/me/.cache/kproxy".into()));
        assert_eq!(with(&[]), None);
    }
}
