//! The file tree of an image, collected from programs of this machine and the libraries that they load.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process;

/// What stands at a path of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    Folder { mode: u32 },
    File { source: Source, mode: u32 },
    Symlink { target: String },
}

/// Where a file's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Bytes(Vec<u8>),
    Path(PathBuf),
}

/// Paths in the image, without a leading slash, in the order in which they are written.
#[derive(Debug, Default, Clone)]
pub struct Root {
    entries: BTreeMap<String, Entry>,
}

impl Root {
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(path, entry)| (path.as_str(), entry))
    }

    pub fn folder(&mut self, path: &str, mode: u32) {
        self.put(path, Entry::Folder { mode });
    }

    pub fn text(&mut self, path: &str, text: &str) {
        self.put(path, Entry::File { source: Source::Bytes(text.into()), mode: 0o644 });
    }

    pub fn script(&mut self, path: &str, text: &str) {
        self.put(path, Entry::File { source: Source::Bytes(text.into()), mode: 0o755 });
    }

    pub fn symlink(&mut self, path: &str, target: &str) {
        self.put(path, Entry::Symlink { target: target.to_owned() });
    }

    /// A file of this machine, at a path of the image.
    pub fn file(&mut self, source: &Path, path: &str) -> Result<()> {
        let real = fs::canonicalize(source).with_context(|| format!("cannot find {}", source.display()))?;
        let executable = fs::metadata(&real)?.permissions().mode() & 0o111 != 0;
        let mode = if executable { 0o755 } else { 0o644 };
        self.put(path, Entry::File { source: Source::Path(real), mode });
        Ok(())
    }

    /// A program of this machine with every library that it loads.
    pub fn program(&mut self, source: &Path, path: &str) -> Result<()> {
        self.file(source, path)?;
        for library in libraries(source)? {
            let place = library.to_str().context("the path of a library is not UTF-8")?;
            self.file(&library, place)?;
        }
        Ok(())
    }

    /// A program by its name, at the path at which Debian has it.
    pub fn named_program(&mut self, name: &str, path: &str) -> Result<()> {
        let source = process::find(name).with_context(|| format!("{name} is not installed"))?;
        self.program(&source, path)
    }

    /// `nft` and `iptables` with their extensions, which a program starts by name.
    pub fn firewall_tools(&mut self) -> Result<()> {
        self.named_program("nft", "/usr/sbin/nft")?;
        for flavour in ["nft", "legacy"] {
            let name = format!("xtables-{flavour}-multi");
            self.named_program(&name, &format!("/usr/sbin/{name}"))?;
        }
        for family in ["iptables", "ip6tables"] {
            for suffix in ["", "-save", "-restore"] {
                self.symlink(&format!("/usr/sbin/{family}{suffix}"), "xtables-nft-multi");
                for flavour in ["nft", "legacy"] {
                    let name = format!("/usr/sbin/{family}-{flavour}{suffix}");
                    self.symlink(&name, &format!("xtables-{flavour}-multi"));
                }
            }
        }
        let libc = libraries(&process::find("nft").context("nft is not installed")?)?;
        let libc = libc.iter().find(|path| path.ends_with("libc.so.6")).context("nft loads no libc")?;
        let folder = libc.parent().context("the libc has no folder")?.join("xtables");
        for extension in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let extension = extension?.path();
            let path = extension.to_str().context("the path of an extension is not UTF-8")?;
            let fixed = if path.starts_with("/usr/") { path.to_owned() } else { format!("/usr{path}") };
            self.file(&extension, &fixed)?;
            for library in libraries(&extension)? {
                let place = library.to_str().context("the path of a library is not UTF-8")?;
                self.file(&library, place)?;
            }
        }
        Ok(())
    }

    fn put(&mut self, path: &str, entry: Entry) {
        let path = path.trim_start_matches('/');
        for (at, _) in path.match_indices('/') {
            self.entries.entry(path[..at].to_owned()).or_insert(Entry::Folder { mode: 0o755 });
        }
        self.entries.insert(path.to_owned(), entry);
    }
}

/// The libraries that a program loads, its loader among them; none where it is static.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd (package libc-bin)")?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            stdout.contains("not a dynamic") || stderr.contains("not a dynamic"),
            "ldd {}: {}",
            program.display(),
            stderr.trim()
        );
        return Ok(Vec::new());
    }
    parse_ldd(&stdout).with_context(|| format!("{} cannot run here", program.display()))
}

fn parse_ldd(text: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        if line.ends_with("not found") {
            bail!("{line}");
        }
        let path = line.split_once(" => ").map_or(line, |(_, path)| path);
        let path = path.split(" (").next().unwrap_or(path);
        // The kernel's own page of code has no file; a static program has a sentence.
        if path.starts_with('/') {
            found.push(path.into());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found = parse_ldd(text).unwrap();
        assert_eq!(
            found,
            [Path::new("/lib/x86_64-linux-gnu/libc.so.6"), Path::new("/lib64/ld-linux-x86-64.so.2")]
        );
        assert_eq!(parse_ldd("\tstatically linked\n").unwrap(), Vec::<PathBuf>::new());
        assert!(parse_ldd("\tlibgone.so => not found\n").is_err());
    }

    #[test]
    fn folders_above_a_file_are_there() {
        let mut root = Root::default();
        root.folder("/tmp", 0o1777);
        root.text("/usr/share/a/b", "x");
        root.text("/tmp/c", "x");
        let paths: Vec<_> = root.entries().map(|(path, _)| path).collect();
        assert_eq!(paths, ["tmp", "tmp/c", "usr", "usr/share", "usr/share/a", "usr/share/a/b"]);
        assert_eq!(root.entries["tmp"], Entry::Folder { mode: 0o1777 });
    }
}
