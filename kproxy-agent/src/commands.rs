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

/// Whether nobody reads any more what is printed.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
    })
}
