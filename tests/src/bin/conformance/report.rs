//! What came of it: a summary on the terminal, and the page docs/conformance.md.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use crate::results::{SpecResult, State};

pub fn print(results: &[SpecResult], elapsed: Duration, folder: &Path) {
    let (skipped, failed) = (of(results, State::Skipped), of(results, State::Failed));
    println!();
    for result in &skipped {
        println!("skipped: {}: {}", result.spec, first_line(&result.message));
    }
    for result in &failed {
        println!("FAILED: {}", result.spec);
        println!("    {}", result.log);
    }
    println!("{} in {}; {}", counts(results), minutes(elapsed), folder.display());
}

/// The page docs/conformance.md; `left_out` are specs that were not run, by the reason.
pub fn page(
    results: &[SpecResult],
    left_out: &[(&str, Vec<String>)],
    elapsed: Duration,
    nodes: u8,
) -> String {
    let mut text = format!(
        "# Kubernetes' own tests\n\n\
         Written by `cargo xtask conformance --all`: {nodes} nodes in two zones, dual-stack, with kproxy installed from\n\
         its image by `manifests/`. {} in {}.\n\n\
         | spec | seconds | result |\n|---|---:|---|\n",
        counts(results),
        minutes(elapsed)
    );
    let mut sorted: Vec<_> = results.iter().collect();
    sorted.sort_by(|a, b| a.spec.cmp(&b.spec));
    for SpecResult { spec, seconds, state, message, .. } in sorted {
        let reason = match state {
            State::Skipped | State::Failed => format!(": {}", cell(first_line(message))),
            State::Passed => String::new(),
        };
        // Writing to a String does not fail.
        let _ = writeln!(text, "| {} | {seconds:.0} | {}{reason} |", cell(spec), state.word());
    }
    text.push_str("\n## Left out\n\n| spec | because it |\n|---|---|\n");
    for (reason, specs) in left_out {
        for spec in specs {
            let _ = writeln!(text, "| {} | {reason} |", cell(spec));
        }
    }
    text
}

fn of(results: &[SpecResult], state: State) -> Vec<&SpecResult> {
    results.iter().filter(|result| result.state == state).collect()
}

fn counts(results: &[SpecResult]) -> String {
    let count = |state| of(results, state).len();
    format!(
        "{} passed, {} failed, {} skipped",
        count(State::Passed),
        count(State::Failed),
        count(State::Skipped)
    )
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn minutes(elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    format!("{} min {:02} s", seconds / 60, seconds % 60)
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_every_spec_with_its_reason() {
        let result = |spec: &str, state, message: &str| SpecResult {
            spec: spec.into(),
            state,
            seconds: 1.6,
            message: message.into(),
            log: String::new(),
        };
        let results = [
            result("b", State::Skipped, "needs | 9 nodes\nmore"),
            result("a", State::Passed, ""),
            result("c", State::Failed, "timed out"),
        ];
        let left_out = [("is too much", vec![String::from("d")])];
        let page = page(&results, &left_out, Duration::from_secs(61), 3);
        assert!(page.contains("1 passed, 1 failed, 1 skipped in 1 min 01 s"), "{page}");
        let table =
            "| a | 2 | passed |\n| b | 2 | skipped: needs \\| 9 nodes |\n| c | 2 | FAILED: timed out |\n";
        assert!(page.contains(table), "{page}");
        assert!(page.ends_with("| d | is too much |\n"), "{page}");
    }
}
