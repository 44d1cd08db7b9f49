//! The sysctls of conntrack, as kube-proxy sets them: the packets of a Service pass the host's conntrack like any
//! others, and what is set for them must not change with the proxy.
//!
//! kube-proxy writes its maximum also over a greater one; here it is only raised, since connections die where a full table
//! is made smaller.

use std::{fs, io, path::Path};

/// kube-proxy's `--conntrack-max-per-core`, `--conntrack-min`, and the cap on their product.
const MAX_PER_CORE: u64 = 32_768;
const MIN: u64 = 131_072;
const CAP: u64 = 1_048_576;

const MAX: &str = "nf_conntrack_max";

/// kube-proxy's `--conntrack-tcp-timeout-established` and `--conntrack-tcp-timeout-close-wait`, in seconds.
const TIMEOUTS: [(&str, u64); 2] =
    [("nf_conntrack_tcp_timeout_established", 86_400), ("nf_conntrack_tcp_timeout_close_wait", 3_600)];

/// Buckets of the table; one for each four entries.
const HASH_SIZE: &str = "/sys/module/nf_conntrack/parameters/hashsize";
const ENTRIES_PER_BUCKET: u64 = 4;

/// Sets them in this network namespace; `net` is its `/proc/sys/net`. A kernel without conntrack has nothing to set.
pub fn set_sysctls(net: &Path) {
    let folder = net.join("netfilter");
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok();
    if read(TIMEOUTS[0].0).is_none() {
        tracing::debug!(folder = %folder.display(), "conntrack is not here: its sysctls are not set");
        return;
    }
    let changes = changes(cores(), read);
    let mut refused = Vec::new();
    for (name, value) in changes {
        match fs::write(folder.join(name), value.to_string()) {
            Ok(()) => {
                tracing::info!(sysctl = name, value, "set, as kube-proxy does");
                if name == MAX {
                    raise_hash_size(value);
                }
            }
            Err(error) => refused.push((name, value, error)),
        }
    }
    if let Some((.., error)) = refused.first() {
        let wanted: Vec<_> =
            refused.iter().map(|(name, value, _)| format!("net.netfilter.{name}={value}")).collect();
        tracing::warn!(
            "sysctls of conntrack that kube-proxy sets cannot be set ({error}): set {} on the node, or give \
             --disable-conntrack-sysctls",
            wanted.join(" and ")
        );
    }
}

/// What is to be written, in order.
fn changes(cores: u64, read: impl Fn(&str) -> Option<u64>) -> Vec<(&'static str, u64)> {
    let max = MAX_PER_CORE.saturating_mul(cores).clamp(MIN, CAP);
    let raised = read(MAX).filter(|now| *now < max).map(|_| (MAX, max));
    let timeouts = TIMEOUTS.into_iter().filter(|(name, value)| read(name).is_some_and(|now| now != *value));
    raised.into_iter().chain(timeouts).collect()
}

/// Only after the maximum was written, which only the machine's first namespace lets one: this is the machine's.
fn raise_hash_size(max: u64) {
    let wanted = max / ENTRIES_PER_BUCKET;
    let result = fs::read_to_string(HASH_SIZE).and_then(|text| {
        let now: u64 = text.trim().parse().map_err(io::Error::other)?;
        if now < wanted { fs::write(HASH_SIZE, wanted.to_string()) } else { Ok(()) }
    });
    if let Err(error) = result {
        tracing::debug!(%error, wanted, "{HASH_SIZE} cannot be raised: the table is slower when it is full");
    }
}

/// The machine's processors, however few of them this process may use.
fn cores() -> u64 {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    match count(online.trim()) {
        0 => std::thread::available_parallelism().map_or(1, |count| count.get() as u64),
        cores => cores,
    }
}

/// How many numbers `0-3,5` has.
fn count(ranges: &str) -> u64 {
    let of_range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        Some(last.checked_sub(first)? + 1)
    };
    ranges.split(',').filter_map(of_range).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_kube_proxy_and_nothing_is_taken_away() {
        let (established, close_wait) = (TIMEOUTS[0].0, TIMEOUTS[1].0);
        let with = |max: u64, timeouts: [u64; 2]| {
            move |name: &str| {
                Some(match name {
                    MAX => max,
                    name if name == established => timeouts[0],
                    _ => timeouts[1],
                })
            }
        };
        let kernel = [432_000, 60];
        let both = [(established, 86_400), (close_wait, 3_600)];
        assert_eq!(changes(2, with(65_536, kernel)), [&[(MAX, 131_072)][..], &both].concat());
        assert_eq!(changes(16, with(65_536, kernel))[0], (MAX, 524_288));
        assert_eq!(changes(64, with(65_536, kernel))[0], (MAX, 1_048_576), "the cap");
        assert_eq!(changes(2, with(262_144, kernel)), both, "more than kube-proxy's stays");
        assert_eq!(changes(2, with(131_072, [86_400, 3_600])), []);
        assert_eq!(changes(2, |_| None), [], "no conntrack");
    }

    #[test]
    fn processors_are_counted() {
        for (text, expected) in [("0-3", 4), ("0", 1), ("0-1,4,6-7", 5), ("", 0), ("nonsense", 0), ("3-1", 0)]
        {
            assert_eq!(count(text), expected, "{text:?}");
        }
    }

    #[test]
    fn files_are_written_and_a_kernel_without_them_is_left_alone() {
        let folder = std::env::temp_dir().join(format!("kproxy-conntrack-{}", std::process::id()));
        let netfilter = folder.join("netfilter");
        fs::create_dir_all(&netfilter).unwrap();
        set_sysctls(&folder);
        assert_eq!(fs::read_dir(&netfilter).unwrap().count(), 0);
        for (name, value) in [(TIMEOUTS[0].0, "432000\n"), (TIMEOUTS[1].0, "60\n")] {
            fs::write(netfilter.join(name), value).unwrap();
        }
        set_sysctls(&folder);
        let read = |name: &str| fs::read_to_string(netfilter.join(name)).unwrap();
        assert_eq!((read(TIMEOUTS[0].0).as_str(), read(TIMEOUTS[1].0).as_str()), ("86400", "3600"));
        fs::remove_dir_all(folder).unwrap();
    }
}
