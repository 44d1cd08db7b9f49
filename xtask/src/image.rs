//! Making container images without a container engine: `cargo xtask image`, and the images of the test cluster.

pub mod archive;
pub mod root;

use std::path::Path;

use anyhow::{Context, Result};

use crate::bpf;
use crate::build::{self, Profile};
use crate::image::archive::{Format, Image};
use crate::image::root::Root;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::setup::{self, Part};

/// The image that `manifests/daemonset.yaml` names.
const NAME: &str = concat!("kproxy:", env!("CARGO_PKG_VERSION"));

/// Where the certificates of public authorities are on Debian.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Sets up, builds, and writes `target/image/kproxy-VERSION{,.oci}.tar`.
pub fn run(paths: &Paths, progress: &Progress, profile: Profile) -> Result<()> {
    setup::ensure(paths, progress, &[Part::Bpf, Part::Image])?;
    let objects = bpf::build(paths, progress, &setup::tools(paths)?.bpf)?;
    let binary = build::agent(paths, progress, &objects, profile)?;
    let folder = paths.target.join("image");
    progress.step(format!("image {NAME}"), || {
        let root = kproxy(&binary)?;
        for (format, suffix) in [(Format::Docker, ""), (Format::Oci, ".oci")] {
            let file = folder.join(format!("kproxy-{}{suffix}.tar", env!("CARGO_PKG_VERSION")));
            write_kproxy(&root, format, &file)?;
            let size = file.metadata().with_context(|| format!("cannot look at {}", file.display()))?.len();
            progress.note(format!("{}, {:.1} MiB", paths.shown(&file), size as f64 / f64::from(1 << 20)));
        }
        Ok(())
    })
}

/// As the Dockerfile makes it, without what nobody starts: no shell, no package manager.
pub fn kproxy(binary: &Path) -> Result<Root> {
    let mut root = Root::default();
    base(&mut root);
    root.program(binary, "/usr/local/bin/kproxy")?;
    root.firewall_tools()?;
    root.file(Path::new(CERTIFICATES), CERTIFICATES).context("install the package ca-certificates")?;
    Ok(root)
}

pub fn write_kproxy(root: &Root, format: Format, file: &Path) -> Result<()> {
    let image = Image { names: &[NAME], entrypoint: &["kproxy"], arguments: &["agent"] };
    archive::write(root, image, format, file)
}

/// What programs expect to find, whatever they are.
pub fn base(root: &mut Root) {
    for path in ["/dev", "/etc", "/proc", "/run", "/sys", "/var/run"] {
        root.folder(path, 0o755);
    }
    root.folder("/tmp", 0o1777);
    root.text(
        "/etc/passwd",
        "root:x:0:0:root:/:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n",
    );
    root.text("/etc/group", "root:x:0:\nnogroup:x:65534:\n");
    root.text("/etc/nsswitch.conf", "hosts: files dns\n");
}
