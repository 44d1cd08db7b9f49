//! How long to wait before the next try.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Twice as long from try to try, with jitter: the nodes of a cluster must not come back to an API server that
/// restarts all at once. As client-go's reflector: 0.8 s to 30 s.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backoff {
    /// The wait after the first failure, without jitter.
    pub(super) first: Duration,
    /// The longest wait, without jitter.
    pub(super) longest: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { first: Duration::from_millis(800), longest: Duration::from_secs(30) }
    }
}

impl Backoff {
    /// The wait after so many failures in a row (from 1), between half and all of the full one.
    pub(super) fn wait(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let full = self.first.saturating_mul(1 << doublings).min(self.longest);
        full.mul_f64(0.5 + 0.5 * random_fraction())
    }
}

/// Between 0 and 1; not for secrets.
pub(super) fn random_fraction() -> f64 {
    // Every RandomState has keys of its own.
    let bits = RandomState::new().hash_one(0_u8) >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_differ() {
        let backoff = Backoff::default();
        for (failures, full) in
            [(0, 800), (1, 800), (2, 1_600), (5, 12_800), (6, 25_600), (7, 30_000), (u32::MAX, 30_000)]
        {
            let full = Duration::from_millis(full);
            let wait = backoff.wait(failures);
            assert!(full / 2 <= wait && wait <= full, "{failures}: {wait:?}");
        }
        let waits: std::collections::BTreeSet<_> = (0..10).map(|_| backoff.wait(1)).collect();
        assert!(waits.len() > 1, "no jitter: {waits:?}");
    }
}
