//! What the lab needs of this machine and no package can bring: root, and a kernel that can.

use std::fs;

use nix::sys::utsname::uname;

/// The oldest kernel that kproxy supports.
const OLDEST_KERNEL: (u32, u32) = (5, 10);

const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;

/// Why the lab cannot run here; empty where it can. Each is a sentence that says what is needed.
pub fn lab_obstacles() -> Vec<String> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let release = uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    obstacles(&release, &read("/proc/self/status"), &read("/proc/filesystems"), &read("/proc/self/mountinfo"))
}

fn obstacles(release: &str, status: &str, filesystems: &str, mountinfo: &str) -> Vec<String> {
    let mut found = Vec::new();
    if !has_capability(status, CAP_SYS_ADMIN) || !has_capability(status, CAP_NET_ADMIN) {
        found.push(
            "namespaces and eBPF programs need root with CAP_SYS_ADMIN and CAP_NET_ADMIN: \
             run this as root"
                .to_owned(),
        );
    }
    let (major, minor) = OLDEST_KERNEL;
    if kernel_version(release).is_none_or(|version| version < OLDEST_KERNEL) {
        found.push(format!("Linux {major}.{minor} or newer is needed, this is {release}"));
    }
    if !filesystems.split_whitespace().any(|name| name == "bpf") {
        found.push("the kernel has no bpf filesystem: CONFIG_BPF_SYSCALL is needed".to_owned());
    }
    if !mountinfo.contains(" - cgroup2 ") {
        found.push(
            "no cgroup v2 is mounted: `mount -t cgroup2 none /sys/fs/cgroup/unified` mounts it \
             beside v1"
                .to_owned(),
        );
    }
    found
}

/// Whether `/proc/PID/status` shows the capability as effective.
fn has_capability(status: &str, number: u32) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|set| set & (1 << number) != 0)
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tx\nCapEff:\t000001ffffffffff\n";
    const FILESYSTEMS: &str = "nodev\tsysfs\nnodev\tbpf\n\text4\n";
    const MOUNTS: &str = "30 29 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn a_machine_that_has_all_is_taken() {
        assert_eq!(obstacles("6.18.5-cloud", STATUS, FILESYSTEMS, MOUNTS), Vec::<String>::new());
        assert!(obstacles("5.10.0", STATUS, FILESYSTEMS, MOUNTS).is_empty());
    }

    #[test]
    fn each_lack_is_named() {
        let only = |found: Vec<String>, word: &str| {
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains(word), "{found:?}");
        };
        only(obstacles("5.4.0", STATUS, FILESYSTEMS, MOUNTS), "5.10");
        only(obstacles("", STATUS, FILESYSTEMS, MOUNTS), "5.10");
        // A user, and a container's root without CAP_SYS_ADMIN.
        for set in ["0000000000000000", "00000000a80435fb"] {
            let status = format!("CapEff:\t{set}\n");
            only(obstacles("6.1.0", &status, FILESYSTEMS, MOUNTS), "root");
        }
        only(obstacles("6.1.0", STATUS, "\text4\n", MOUNTS), "bpf");
        only(obstacles("6.1.0", STATUS, FILESYSTEMS, ""), "cgroup");
    }
}
