//! The images of the test cluster: kproxy's own, and those that Kubernetes' tests ask for, made of the same programs.
//!
//! Their names are in a registry that does not exist, so that nothing can be fetched; their tags are read from
//! Kubernetes' own list.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::image::archive::{self, Format, Image};
use crate::image::root::Root;
use crate::image::{self, base};
use crate::kubernetes;
use crate::paths::Paths;
use crate::process;
use crate::progress::Progress;

/// The registry that all of these are said to be from.
const REGISTRY: &str = "kproxy.test";

/// What the cluster must be told of its images.
#[derive(Debug)]
pub struct Images {
    pub files: Vec<PathBuf>,
    /// The file that tells Kubernetes' tests of the registry.
    pub registries: PathBuf,
    pub coredns: String,
    pub pause: String,
}

/// Like the real `wget` of busybox, of which Debian's crashes when it is given `-T`.
const WGET: &str = "\
#!/bin/sh
seconds=30
output=
while [ $# -gt 0 ]; do
    case $1 in
        -T) seconds=$2; shift ;;
        -T*) seconds=${1#-T} ;;
        --timeout=*) seconds=${1#*=} ;;
        -O) [ \"$2\" = - ] || output=\"-o $2\"; shift ;;
        -qO) shift ;;
        -*) ;;
        *) url=$1 ;;
    esac
    shift
done
exec curl -sS -f -L --connect-timeout \"$seconds\" -m $((seconds * 3)) $output \"$url\"
";

/// Makes them all, below `target/conformance/images`.
pub fn make(paths: &Paths, progress: &Progress, programs: &Path, binary: &Path) -> Result<Images> {
    let folder = paths.target.join("conformance/images");
    let sources = kubernetes::sources(paths)?;
    let list = sources.join("test/utils/image/manifest.go");
    let list = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let mut files = Vec::new();
    let mut write = |root: &Root, name: &str, entrypoint: &[&str], arguments: &[&str]| -> Result<()> {
        let stem = name.rsplit('/').next().unwrap_or(name).replace(':', "-");
        let file = folder.join(format!("{stem}.tar"));
        archive::write(root, Image { names: &[name], entrypoint, arguments }, Format::Docker, &file)?;
        progress.note(name);
        files.push(file);
        Ok(())
    };
    let e2e = |id: &str| -> Result<String> {
        let (name, tag) = tag(&list, id).with_context(|| format!("Kubernetes has no test image {id}"))?;
        Ok(format!("{REGISTRY}/e2e/{name}:{tag}"))
    };

    let pause = e2e("Pause")?;
    let mut root = Root::default();
    root.program(&compile_pause(&sources, programs)?, "/pause")?;
    write(&root, &pause, &["/pause"], &[])?;

    let mut root = Root::default();
    users(&mut root);
    root.program(&programs.join("agnhost"), "/agnhost")?;
    root.symlink("/agnhost-2", "agnhost");
    let porter = sources.join("test/images/agnhost/porter");
    for name in ["localhost.crt", "localhost.key"] {
        root.file(&porter.join(name), &format!("/{name}"))?;
    }
    root.folder("/uploads", 0o755);
    shell(&mut root)?;
    for (name, place) in [
        ("bash", "/bin/bash"),
        ("curl", "/usr/bin/curl"),
        ("conntrack", "/usr/sbin/conntrack"),
        ("dig", "/usr/bin/dig"),
        ("ip", "/usr/sbin/ip"),
        ("nc.openbsd", "/usr/bin/nc"),
        ("nslookup", "/usr/bin/nslookup"),
        ("nsenter", "/usr/bin/nsenter"),
        ("ss", "/usr/bin/ss"),
    ] {
        root.named_program(name, place)?;
    }
    root.script("/usr/bin/wget", WGET);
    write(&root, &e2e("Agnhost")?, &["/agnhost"], &["pause"])?;

    let mut root = Root::default();
    users(&mut root);
    shell(&mut root)?;
    write(&root, &e2e("BusyBox")?, &[], &["sh"])?;

    let mut root = Root::default();
    root.program(&programs.join("regression-issue-74839"), "/regression-issue-74839")?;
    write(&root, &e2e("RegressionIssue74839")?, &["/regression-issue-74839"], &[])?;

    let mut root = Root::default();
    users(&mut root);
    shell(&mut root)?;
    root.firewall_tools()?;
    root.named_program("conntrack", "/usr/sbin/conntrack")?;
    write(&root, &e2e("DistrolessIptables")?, &[], &["sh"])?;

    let coredns = format!("{REGISTRY}/coredns:{}", kubernetes::coredns_version(paths)?);
    let mut root = Root::default();
    base(&mut root);
    root.program(&programs.join("coredns"), "/coredns")?;
    write(&root, &coredns, &["/coredns"], &[])?;

    let mut root = Root::default();
    base(&mut root);
    root.program(&programs.join("kube-proxy"), "/usr/local/bin/kube-proxy")?;
    root.firewall_tools()?;
    root.named_program("conntrack", "/usr/sbin/conntrack")?;
    write(&root, &format!("{REGISTRY}/kube-proxy:test"), &["kube-proxy"], &[])?;

    let own = folder.join("kproxy.tar");
    image::write_kproxy(&image::kproxy(binary)?, Format::Docker, &own)?;
    files.push(own);

    let registries = folder.join("registries.yaml");
    let names = ["gcRegistry", "promoterE2eRegistry", "buildImageRegistry"];
    let text: String = names.map(|name| format!("{name}: {REGISTRY}/e2e\n")).concat();
    fs::write(&registries, text).with_context(|| format!("cannot write {}", registries.display()))?;
    Ok(Images { files, registries, coredns, pause })
}

/// Kubernetes' own first process of a pod, compiled without a libc to load.
fn compile_pause(sources: &Path, programs: &Path) -> Result<PathBuf> {
    let file = programs.join("pause");
    let source = sources.join("build/pause/linux/pause.c");
    let version = "-DVERSION=\"kproxy\"";
    process::run(Command::new("cc").args(["-Os", "-static", version, "-o"]).arg(&file).arg(source))?;
    Ok(file)
}

/// The name and tag of an image in Kubernetes' `manifest.go`.
fn tag<'a>(list: &'a str, id: &str) -> Option<(&'a str, &'a str)> {
    let start = format!("configs[{id}] = Config{{");
    let line = list.lines().find_map(|line| line.trim().strip_prefix(start.as_str()))?;
    let mut quoted = line.split('"').skip(1).step_by(2);
    Some((quoted.next()?, quoted.next()?))
}

/// Users whom the tests start programs as.
fn users(root: &mut Root) {
    base(root);
    root.text(
        "/etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n\
         user-defined-in-image:x:1000:1000::/home:/bin/sh\n",
    );
    root.text(
        "/etc/group",
        "root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\n\
         group-defined-in-image:x:50000:user-defined-in-image\n",
    );
    root.folder("/root", 0o755);
    root.folder("/home", 0o755);
}

/// A shell, and busybox for the small tools. The shell is dash: Debian's busybox prefers its own applets to programs
/// on PATH.
fn shell(root: &mut Root) -> Result<()> {
    root.named_program("dash", "/bin/sh")?;
    let busybox = process::find("busybox").context("busybox is not installed")?;
    root.program(&busybox, "/bin/busybox")?;
    let applets = process::output(Command::new(busybox).arg("--list"))?;
    let own = ["busybox", "sh", "ash", "wget", "nc", "ip", "nslookup", "nsenter"];
    for applet in applets.lines().filter(|applet| !own.contains(applet)) {
        root.symlink(&format!("/bin/{applet}"), "busybox");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_read_from_kubernetes_list() {
        let list = "\tconfigs[AgnhostPrev] = Config{list.E2e, \"agnhost\", \"2.55\"}\n\
                    \tconfigs[Agnhost] = Config{list.E2e, \"agnhost\", \"2.63.0\"}\n";
        assert_eq!(tag(list, "Agnhost"), Some(("agnhost", "2.63.0")));
        assert_eq!(tag(list, "Pause"), None);
    }
}
