//! How many flows there is room for.

use std::fs;

/// Of the node's memory, a flow's share: 256 KiB. So the tables take a quarter of a percent of it: a flow has two entries
/// of some 170 octets in the table of established flows (four where its client is masked), and room for one in the other.
const MEMORY_PER_FLOW: u64 = 256 * 1024;

/// As few as on a node of 4 GiB, as many as on one of 256 GiB.
const FEWEST: u32 = 16_384;
const MOST: u32 = 1_048_576;

/// How many flows there is room for on a node with this much memory (octets): the largest power of two that its share
/// allows. Powers of two, since what is free for use differs by a little from kernel to kernel, and a table of another
/// size is a new table.
pub fn automatic(memory: u64) -> u32 {
    let flows = u32::try_from(memory / MEMORY_PER_FLOW).unwrap_or(MOST).clamp(FEWEST, MOST);
    1 << flows.ilog2()
}

/// How many clients with affinity there is room for where there is room for so many flows by memory: a client has an entry
/// of some 130 octets for each of a Service port's two endpoint sets, and keeps it for three hours where nothing else is
/// said, long after its flows.
pub fn affinity(flows: u32) -> u32 {
    flows.saturating_mul(2)
}

/// The node's memory in octets.
pub fn memory() -> Option<u64> {
    memory_total(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn memory_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn tables_grow_with_memory() {
        for (memory, flows) in [
            (0, 16_384),
            (GIB, 16_384),
            (4 * GIB, 16_384),
            (16 * GIB - 300_000_000, 32_768),
            (16 * GIB, 65_536),
            (24 * GIB, 65_536),
            (64 * GIB, 262_144),
            (256 * GIB, 1_048_576),
            (4_096 * GIB, 1_048_576),
        ] {
            assert_eq!(automatic(memory), flows, "{} MiB", memory >> 20);
            assert_eq!(affinity(automatic(memory)), 2 * flows, "{} MiB", memory >> 20);
        }
    }

    #[test]
    fn memory_is_read() {
        assert_eq!(memory_total("MemTotal:       24683836 kB\nMemFree: 1 kB\n"), Some(24_683_836 * 1024));
        assert_eq!(memory_total("MemFree: 1 kB\n"), None);
        assert!(memory().is_some_and(|octets| octets > 64 << 20));
    }
}
