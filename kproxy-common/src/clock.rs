//! Times of the programs' clock (CLOCK_MONOTONIC, nanoseconds since boot), and what lies between two of them.
//!
//! Times are compared by their distance, never by their size: then a time before the boot is one like any other. Nothing
//! may assume that the machine has been up for long.

/// Nanoseconds from `then` to `now`; zero if `then` is the later of both, as when another CPU has noted it since.
#[inline(always)]
pub const fn elapsed(now: u64, then: u64) -> u64 {
    let distance = now.wrapping_sub(then);
    // The circle is 584 years around: what lies behind by more than half of it lies ahead.
    if distance.cast_signed() < 0 { 0 } else { distance }
}

/// Whether `time` is before `other`.
#[inline(always)]
pub const fn is_before(time: u64, other: u64) -> bool {
    time.wrapping_sub(other).cast_signed() < 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const DAY: u64 = 86_400 * SECOND;

    #[test]
    fn an_age_does_not_depend_on_the_uptime() {
        for uptime in [0, 1, SECOND, 60 * SECOND, DAY, 10_000 * DAY] {
            for age in [0, 1, SECOND, 3 * 3_600 * SECOND, DAY, 400 * DAY] {
                let then = uptime.wrapping_sub(age);
                assert_eq!(elapsed(uptime, then), age, "up for {uptime}");
                assert_eq!(elapsed(then, uptime), 0, "what is still to come has not passed: up for {uptime}");
                assert_eq!(is_before(then, uptime), age > 0, "up for {uptime}, {age} ago");
                assert!(!is_before(uptime, then), "up for {uptime}, {age} ago");
            }
        }
    }
}
