//! What the agent sets on the host beside its maps and programs.

use std::{fs, path::Path};

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

/// Where a container finds the host's: runtimes make `/proc/sys` of one that is not privileged read-only.
const MOUNTED: &str = "/host/proc/sys/net";
const NET: &str = "/proc/sys/net";

/// The folder of this network namespace's sysctls, the one that can be written if there are two.
pub fn net_sysctls() -> &'static Path {
    let mounted = Path::new(MOUNTED);
    if mounted.join("ipv4").is_dir() { mounted } else { Path::new(NET) }
}

/// Kernels before 5.11 count BPF memory against this limit.
pub fn lift_memory_limit() {
    if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        tracing::debug!(%error, "cannot lift RLIMIT_MEMLOCK, which kernels before 5.11 need");
    }
}

/// Gives back to the system what loading has freed: the text of all objects and the programs' debug information are
/// read once, and are much more than what stays.
pub fn return_memory() {
    // glibc alone keeps so much, and has the call.
    #[cfg(target_env = "gnu")]
    // SAFETY: the call has no conditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Keeps the ports that clients are masked with from being given to sockets of the host (ip-sysctl,
/// `ip_local_reserved_ports`).
pub fn reserve_ports(first: u32, count: u32) {
    let range = format!("{first}-{}", first + count - 1);
    let path = net_sysctls().join("ipv4/ip_local_reserved_ports");
    let result = fs::read_to_string(&path).and_then(|reserved| {
        let reserved = reserved.trim();
        if covers(reserved, first, first + count - 1) {
            return Ok(());
        }
        let all = if reserved.is_empty() { range.clone() } else { format!("{reserved},{range}") };
        fs::write(&path, all)
    });
    if let Err(error) = result {
        tracing::warn!(
            "cannot reserve the ports {range}, with which clients are masqueraded first ({}: {error}): a socket of this \
             host that is given one that a client has towards the same backend is seen there by another port; add them \
             with sysctl",
            path.display()
        );
    }
}

/// Whether one range of `reserved` (`8080,9148-9150`) holds all of `first` to `last`.
pub fn covers(reserved: &str, first: u32, last: u32) -> bool {
    reserved.split(',').any(|range| {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        match (low.trim().parse::<u32>(), high.trim().parse::<u32>()) {
            (Ok(low), Ok(high)) => low <= first && last <= high,
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_is_reserved_is_seen() {
        assert!(covers("8080,61000-65535", 61_000, 65_535));
        assert!(covers("1-65535", 61_000, 65_535));
        assert!(!covers("", 61_000, 65_535));
        assert!(!covers("61000-65000", 61_000, 65_535));
        assert!(!covers("nonsense,9", 61_000, 65_535));
    }
}
