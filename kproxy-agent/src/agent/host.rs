//! What the agent sets on the host beside its maps and programs.

use std::fs;

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

const RESERVED_PORTS: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// Kernels before 5.11 count BPF memory against this limit.
pub fn lift_memory_limit() {
    if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        tracing::debug!(%error, "cannot lift RLIMIT_MEMLOCK, which kernels before 5.11 need");
    }
}

/// Keeps the ports that clients are masked with from being given to sockets of the host (ip-sysctl,
/// `ip_local_reserved_ports`).
pub fn reserve_ports(first: u32, count: u32) {
    let range = format!("{first}-{}", first + count - 1);
    let result = fs::read_to_string(RESERVED_PORTS).and_then(|reserved| {
        let reserved = reserved.trim();
        if covers(reserved, first, first + count - 1) {
            return Ok(());
        }
        let all = if reserved.is_empty() { range.clone() } else { format!("{reserved},{range}") };
        fs::write(RESERVED_PORTS, all)
    });
    if let Err(error) = result {
        tracing::warn!(
            "cannot reserve the ports {range} for masking ({RESERVED_PORTS}: {error}): a socket of this host that is \
             given one of them can lose answers to a masked client; add them with sysctl"
        );
    }
}

/// Whether one range of `reserved` (`8080,9148-9150`) holds all of `first` to `last`.
fn covers(reserved: &str, first: u32, last: u32) -> bool {
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
