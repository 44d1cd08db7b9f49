//! The operator's commands beside the agent.

pub mod check;
pub mod cleanup;
pub mod drops;
pub mod explain;
pub mod flows;
mod print;
pub mod services;

/// The call or its input was wrong: exit status 2.
#[derive(thiserror::Error, Debug)]
#[error("{0}")]
pub struct UsageError(pub String);

/// An error and its causes on one line, each once: some say their cause themselves.
pub fn in_words(error: &anyhow::Error) -> String {
    let mut words = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !words.contains(&cause) {
            words.push_str(": ");
            words.push_str(&cause);
        }
    }
    words
}

/// Whether nobody reads any more what is printed.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(thiserror::Error, Debug)]
    #[error("cannot open the map: {0}; is kproxy running?")]
    struct SaysItsCause(#[source] std::io::Error);

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow::Error::new(SaysItsCause(std::io::Error::other("no such file")));
        assert_eq!(in_words(&error), "cannot open the map: no such file; is kproxy running?");
        let error = error.context("cannot print");
        assert_eq!(in_words(&error), "cannot print: cannot open the map: no such file; is kproxy running?");
    }
}
