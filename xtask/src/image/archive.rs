//! An image as one file, in the form of `docker save` or as an OCI layout.
//!
//! The same tree gives the same bytes: entries are sorted, owned by root, and of one point in time.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use crate::image::root::{Entry, Root, Source};

/// The two forms in which runtimes take an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// For `docker load`, `podman load`, `ctr images import`: names are completed by whoever loads it.
    Docker,
    /// For skopeo and others that read `oci-archive:`.
    Oci,
}

/// What a container runtime is told besides the files.
#[derive(Debug, Clone, Copy)]
pub struct Image<'a> {
    /// Names with tags, as `kproxy:0.1.0`.
    pub names: &'a [&'a str],
    pub entrypoint: &'a [&'a str],
    pub arguments: &'a [&'a str],
}

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Writes the archive to `file`; a name that is there is replaced only by a complete one.
pub fn write(root: &Root, image: Image<'_>, format: Format, file: &Path) -> Result<()> {
    let folder = file.parent().context("the archive has no folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let name = file.file_name().context("the archive has no name")?.to_string_lossy();
    let unfinished = folder.join(format!(".{name}.{}", std::process::id()));
    let layer = folder.join(format!(".{name}.{}.layer", std::process::id()));
    let written = write_parts(root, image, format, &layer, &unfinished)
        .and_then(|()| fs::rename(&unfinished, file).map_err(Into::into))
        .with_context(|| format!("cannot write {}", file.display()));
    // Renamed, or of no use.
    let _ = fs::remove_file(&layer);
    let _ = fs::remove_file(&unfinished);
    written
}

fn write_parts(root: &Root, image: Image<'_>, format: Format, layer: &Path, archive: &Path) -> Result<()> {
    let mut hashing = Hashing { inner: BufWriter::new(File::create(layer)?), hash: Sha256::new(), size: 0 };
    write_layer(root, &mut hashing)?;
    hashing.flush()?;
    let (layer_digest, layer_size) = (hex(hashing.hash), hashing.size);

    let Image { names, entrypoint, arguments } = image;
    let config = serde_json::to_vec(&json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {"Entrypoint": entrypoint, "Cmd": arguments, "Env": [PATH], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer_digest}")]},
        "history": [{"created_by": "cargo xtask image"}],
    }))?;
    let config_digest = digest(&config);
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(CONFIG, &config_digest, config.len() as u64),
        "layers": [descriptor(LAYER, &layer_digest, layer_size)],
    }))?;
    let manifest_digest = digest(&manifest);
    let named: Vec<Value> = names
        .iter()
        .map(|name| {
            let mut value = descriptor(MANIFEST, &manifest_digest, manifest.len() as u64);
            value["annotations"] = json!({"org.opencontainers.image.ref.name": name});
            value
        })
        .collect();
    let index = json!({"schemaVersion": 2, "manifests": named});
    let docker = json!([{
        "Config": blob(&config_digest),
        "RepoTags": names,
        "Layers": [blob(&layer_digest)],
    }]);

    let mut tar = Builder::new(BufWriter::new(File::create(archive)?));
    match format {
        Format::Docker => append(&mut tar, "manifest.json", &serde_json::to_vec(&docker)?)?,
        Format::Oci => {
            append(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
            append(&mut tar, "index.json", &serde_json::to_vec(&index)?)?;
            append(&mut tar, &blob(&manifest_digest), &manifest)?;
        }
    }
    append(&mut tar, &blob(&config_digest), &config)?;
    let mut head = header(EntryType::Regular, 0o644, layer_size);
    tar.append_data(&mut head, blob(&layer_digest), File::open(layer)?)?;
    tar.into_inner()?.flush()?;
    Ok(())
}

fn write_layer(root: &Root, out: impl Write) -> Result<()> {
    let mut tar = Builder::new(out);
    for (path, entry) in root.entries() {
        match entry {
            Entry::Folder { mode } => {
                let mut head = header(EntryType::Directory, *mode, 0);
                tar.append_data(&mut head, format!("{path}/"), io::empty())?;
            }
            Entry::Symlink { target } => {
                let mut head = header(EntryType::Symlink, 0o777, 0);
                tar.append_link(&mut head, path, target)?;
            }
            Entry::File { source: Source::Bytes(bytes), mode } => {
                let mut head = header(EntryType::Regular, *mode, bytes.len() as u64);
                tar.append_data(&mut head, path, bytes.as_slice())?;
            }
            Entry::File { source: Source::Path(source), mode } => {
                let file = File::open(source).with_context(|| format!("cannot read {}", source.display()))?;
                let size = file.metadata()?.len();
                // A file that grows meanwhile would shift all that follows.
                tar.append_data(&mut header(EntryType::Regular, *mode, size), path, file.take(size))?;
            }
        }
    }
    tar.into_inner()?.flush()?;
    Ok(())
}

fn append(tar: &mut Builder<impl Write>, path: &str, bytes: &[u8]) -> Result<()> {
    let mut head = header(EntryType::Regular, 0o644, bytes.len() as u64);
    Ok(tar.append_data(&mut head, path, bytes)?)
}

/// Root's, from 1970: only the content tells one image from another.
fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

fn descriptor(media_type: &str, digest: &str, size: u64) -> Value {
    json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size})
}

fn blob(digest: &str) -> String {
    format!("blobs/sha256/{digest}")
}

/// The architecture in the words of Go, which images use.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn digest(bytes: &[u8]) -> String {
    hex(Sha256::new().chain_update(bytes))
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hands bytes on, and knows their digest and number.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use super::*;

    fn archive(name: &str, root: &Root, format: Format) -> Vec<u8> {
        let file: PathBuf = std::env::temp_dir().join(format!("xtask-image-{}-{name}", std::process::id()));
        let image = Image { names: &["example/a:1", "example/b:2"], entrypoint: &["a"], arguments: &[] };
        write(root, image, format, &file).unwrap();
        let bytes = fs::read(&file).unwrap();
        fs::remove_file(&file).unwrap();
        bytes
    }

    fn root(text: &str) -> Root {
        let mut root = Root::default();
        root.folder("/tmp", 0o1777);
        root.text("/etc/a", text);
        root.symlink("/etc/b", "a");
        root
    }

    fn files(tar: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
        let mut archive = tar::Archive::new(tar);
        archive
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let path = entry.path().unwrap().to_string_lossy().into_owned();
                let mut content = Vec::new();
                entry.read_to_end(&mut content).unwrap();
                (path, (entry.header().mode().unwrap(), content))
            })
            .collect()
    }

    fn parsed(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes() {
        for format in [Format::Docker, Format::Oci] {
            let of = |name: &str, text: &str| archive(&format!("{name}-{format:?}"), &root(text), format);
            assert_eq!(of("one", "x"), of("two", "x"));
            assert_ne!(of("three", "x"), of("four", "y"));
        }
    }

    #[test]
    fn an_oci_layout_leads_by_digests_to_its_files() {
        let files = files(&archive("oci", &root("x"), Format::Oci));
        let follow = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
            let (_, content) = &files[&blob(digest)];
            assert_eq!(super::digest(content), digest);
            assert_eq!(content.len() as u64, descriptor["size"].as_u64().unwrap());
            content
        };
        let index = parsed(&files["index.json"].1);
        assert_eq!(index["manifests"][1]["annotations"]["org.opencontainers.image.ref.name"], "example/b:2");
        let manifest = parsed(follow(&index["manifests"][0]));
        let config = parsed(follow(&manifest["config"]));
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        let layer = self::files(follow(&manifest["layers"][0]));
        assert_eq!(layer["tmp/"].0, 0o1777);
        assert_eq!(layer["etc/a"], (0o644, b"x".to_vec()));
    }

    #[test]
    fn a_docker_archive_names_its_files() {
        let files = files(&archive("docker", &root("x"), Format::Docker));
        let manifest = parsed(&files["manifest.json"].1);
        assert_eq!(manifest[0]["RepoTags"], json!(["example/a:1", "example/b:2"]));
        for name in [&manifest[0]["Config"], &manifest[0]["Layers"][0]] {
            assert!(files.contains_key(name.as_str().unwrap()), "{name}");
        }
        assert!(!files.contains_key("index.json"), "a loader would take it for an OCI layout");
    }
}
