//! The one place where Kubernetes objects become valid values: what cannot be used is skipped and reported.

mod endpoints;
mod node;
mod pod;
mod service;
mod values;

pub use endpoints::endpoint_slice;
pub use node::{node, service_cidr};
pub use pod::{OptedOutPod, pod};
pub use service::service;
pub use values::{cidr, ip};

use super::problem::{ObjectRef, Problem, ProblemKind};

/// A value, and what of its object could not become part of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parsed<T> {
    /// What can be used.
    pub value: T,
    /// What was skipped, in the order of the object.
    pub problems: Vec<Problem>,
}

/// Collects what is wrong with one object.
struct Report {
    object: ObjectRef,
    problems: Vec<Problem>,
}

impl Report {
    fn new(object: ObjectRef) -> Self {
        Self { object, problems: Vec::new() }
    }

    fn add(&mut self, kind: ProblemKind, field: impl Into<String>, message: impl Into<String>) {
        let (field, message) = (field.into(), message.into());
        self.problems.push(Problem { object: self.object.clone(), field, kind, message });
    }

    fn parsed<T>(self, value: T) -> Parsed<T> {
        Parsed { value, problems: self.problems }
    }
}
