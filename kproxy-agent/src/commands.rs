//! The operator's commands beside the agent.

pub mod check;
pub mod cleanup;
pub mod flows;
mod print;
pub mod services;

/// The call or its input was wrong: exit status 2.
#[derive(thiserror::Error, Debug)]
#[error("{0}")]
pub struct UsageError(pub String);
