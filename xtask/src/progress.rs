//! What a person sees while xtask works: one line when a step starts, one when it has ended.

use std::fmt::Display;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use anyhow::Result;

/// Prints steps on stdout, in bold only where that is a terminal.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    styled: bool,
}

impl Progress {
    pub fn new() -> Self {
        Self { styled: io::stdout().is_terminal() }
    }

    /// Announces a step, does it, and says how long it took, also when it failed.
    pub fn step<T>(&self, title: impl Display, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let (bold, plain) = if self.styled { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
        println!("{bold}==> {title}{plain}");
        let start = Instant::now();
        let result = work();
        let word = if result.is_ok() { "done" } else { "failed" };
        println!("    {word} after {}", duration(start.elapsed()));
        result
    }

    /// One more line about the step that is under way.
    pub fn note(&self, text: impl Display) {
        println!("    {text}");
    }
}

/// A duration as a person reads it: `0.4 s`, `12.3 s`, `3 min 05 s`.
pub fn duration(elapsed: Duration) -> String {
    let tenths = elapsed.as_millis() / 100;
    if tenths < 600 {
        return format!("{}.{} s", tenths / 10, tenths % 10);
    }
    let seconds = elapsed.as_secs();
    format!("{} min {:02} s", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(duration(Duration::from_millis(49)), "0.0 s");
        assert_eq!(duration(Duration::from_millis(12_399)), "12.3 s");
        assert_eq!(duration(Duration::from_millis(59_999)), "59.9 s");
        assert_eq!(duration(Duration::from_secs(60)), "1 min 00 s");
        assert_eq!(duration(Duration::from_secs(185)), "3 min 05 s");
    }
}
