//! Waiting: always for a condition, always with a deadline.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// Between two looks at a condition. Short, since a scenario is made of many waits.
const PAUSE: Duration = Duration::from_millis(5);

/// Looks at `condition` until it gives a value.
///
/// `Ok(None)` means *not yet*. An error is *not yet* as well, and is part of the message when the
/// deadline passes: a server that has not bound its port refuses connections until it has.
///
/// # Errors
/// When `deadline` has passed; the message names `what` and the last error seen.
pub fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        let last = match condition() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if start.elapsed() >= deadline {
            return match last {
                Some(error) => Err(error).with_context(|| format!("{what}: not within {deadline:?}")),
                None => bail!("{what}: not within {deadline:?}"),
            };
        }
        thread::sleep(PAUSE);
    }
}

/// Looks at `condition` until it holds; see [`wait_for`].
///
/// # Errors
/// When `deadline` has passed.
pub fn wait_until(what: &str, deadline: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    wait_for(what, deadline, || Ok(condition()?.then_some(())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_comes_true_is_seen() {
        let mut looks = 0;
        let value = wait_for("third look", Duration::from_secs(5), || {
            looks += 1;
            if looks == 1 {
                bail!("not even there");
            }
            Ok((looks == 3).then_some(looks))
        });
        assert_eq!(value.unwrap(), 3);
    }

    #[test]
    fn the_deadline_names_what_and_why() {
        let error = wait_until("the moon", Duration::from_millis(20), || bail!("too far"))
            .expect_err("the condition never holds");
        let text = format!("{error:#}");
        assert!(text.contains("the moon"), "{text}");
        assert!(text.contains("too far"), "{text}");
    }
}
