//! What the kernel says when it refuses a program. A verifier's log has tens of thousands of lines, of which the last ones
//! say why.

use std::fmt;

use aya::programs::ProgramError;

/// How many of a log's last lines are printed, and how much of a line.
const LAST_LINES: usize = 20;
const LINE: usize = 300;

/// A refusal. Printed, it is one line of bounded length.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    error: String,
    log: String,
}

impl Refusal {
    /// The whole log of the verifier; empty if it was not asked.
    pub fn log(&self) -> &str {
        &self.log
    }

    /// The last lines of the log, each of bounded length, and how many there are before them.
    pub fn last_lines(&self) -> (Vec<String>, usize) {
        let lines: Vec<&str> = self.log.lines().filter(|line| !line.trim().is_empty()).collect();
        let before = lines.len().saturating_sub(LAST_LINES);
        (lines[before..].iter().map(|line| cut(line, LINE)).collect(), before)
    }

    /// Why: the last line that is more than the verifier's statistics.
    fn reason(&self) -> Option<String> {
        let is_reason = |line: &&str| {
            let statistics = ["processed ", "verification time ", "stack depth ", "insns ", "max_states"];
            !line.trim().is_empty() && !statistics.iter().any(|word| line.trim_start().starts_with(word))
        };
        let line = self.log.lines().rev().find(is_reason)?;
        Some(cut(line.trim(), LINE))
    }
}

impl From<ProgramError> for Refusal {
    fn from(error: ProgramError) -> Self {
        match error {
            ProgramError::LoadError { io_error, verifier_log } => {
                Self { error: io_error.to_string(), log: verifier_log.to_string() }
            }
            other => Self { error: other.to_string(), log: String::new() },
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&cut(&self.error, LINE))?;
        match self.reason() {
            Some(reason) => write!(f, ": {reason}"),
            None => Ok(()),
        }
    }
}

/// At most so many characters of the text.
pub fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(log: &str) -> Refusal {
        Refusal { error: "Bad address (os error 14)".into(), log: log.into() }
    }

    #[test]
    fn the_reason_is_what_the_verifier_said_last() {
        let log = "0: R1=ctx() R10=fp0\n93: (85) call pc+312\ncallee expects 6 args, stack arg1 is not initialized\n\
                   verification time 812 usec\nstack depth 160+0\nprocessed 112 insns (limit 1000000) max_states_per_insn 0\n";
        let refusal = refusal(log);
        assert_eq!(
            refusal.to_string(),
            "Bad address (os error 14): callee expects 6 args, stack arg1 is not initialized"
        );
        let (lines, before) = refusal.last_lines();
        assert_eq!((lines.len(), before), (6, 0));
    }

    #[test]
    fn a_refusal_is_short_however_long_the_log() {
        for length in [0, 1, LINE, 65_535, 65_536, 5_000_000] {
            for piece in ["x", "é", "\n", "R1=scalar() \n"] {
                let refusal = refusal(&piece.repeat(length / piece.len()));
                assert!(refusal.to_string().chars().count() <= 2 * LINE + 4, "{length} of {piece:?}");
                let (lines, before) = refusal.last_lines();
                assert!(lines.len() <= LAST_LINES && (before == 0 || lines.len() == LAST_LINES));
                assert!(lines.iter().all(|line| line.chars().count() <= LINE + 1));
            }
        }
    }
}
