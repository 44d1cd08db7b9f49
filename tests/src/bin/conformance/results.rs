//! Results of specs, as Kubernetes' test program writes them: a JSON line each.

use serde::Deserialize;

/// How a spec ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub enum State {
    Passed,
    Skipped,
    /// Failed, timed out, panicked, interrupted.
    Failed,
}

impl From<String> for State {
    fn from(text: String) -> Self {
        match text.as_str() {
            "passed" => Self::Passed,
            "skipped" | "pending" => Self::Skipped,
            _ => Self::Failed,
        }
    }
}

impl State {
    pub fn word(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Skipped => "skipped",
            Self::Failed => "FAILED",
        }
    }
}

/// A spec that has ended.
#[derive(Clone, Debug, Deserialize)]
pub struct SpecResult {
    pub spec: String,
    pub state: State,
    pub seconds: f64,
    /// Why it failed or was skipped.
    #[serde(default)]
    pub message: String,
    /// Where all that it printed is, if it failed.
    #[serde(default)]
    pub log: String,
}

/// Reads the complete lines of a file that grows, from `offset` on, which is moved behind them.
pub fn read_new(text: &str, offset: &mut usize) -> serde_json::Result<Vec<SpecResult>> {
    let rest = &text[*offset..];
    let complete = rest.rfind('\n').map_or(0, |at| at + 1);
    *offset += complete;
    rest[..complete].lines().map(serde_json::from_str).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_when_they_are_complete() {
        let first = "{\"spec\":\"a\",\"state\":\"passed\",\"seconds\":1.5}\n";
        let half = format!("{first}{{\"spec\":\"b\",\"sta");
        let whole = format!("{half}te\":\"timedout\",\"seconds\":2,\"message\":\"late\"}}\n");
        let mut offset = 0;
        let seen = read_new(&half, &mut offset).unwrap();
        assert_eq!((seen.len(), seen[0].state), (1, State::Passed));
        let seen = read_new(&whole, &mut offset).unwrap();
        assert_eq!((seen.len(), seen[0].state, seen[0].message.as_str()), (1, State::Failed, "late"));
        assert!(read_new(&whole, &mut offset).unwrap().is_empty());
    }
}
