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

use std::fmt::Display;

use super::problem::{ObjectRef, Problem, ProblemKind};
use crate::api::{Field, List, Text, Value};

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

    /// The value of a field, where there is one. One of another type counts as absent, and is named.
    fn read<'a, T: Value>(&mut self, field: impl Display, value: &'a Field<T>) -> Option<&'a T> {
        self.read_or(field, value, "it counts as if it were not there")
    }

    /// As [`read`](Self::read); of another type it costs what `follows`.
    fn read_or<'a, T: Value>(
        &mut self,
        field: impl Display,
        value: &'a Field<T>,
        follows: &str,
    ) -> Option<&'a T> {
        if let Field::Mistyped(found) = value {
            let message = format!("it is {found} where {} belongs; {follows}", T::NAME);
            self.add(ProblemKind::Value, field.to_string(), message);
        }
        value.get()
    }

    fn text<'a>(&mut self, field: impl Display, value: &'a Field<Text>) -> Option<&'a str> {
        self.read(field, value).map(|text| &**text)
    }

    /// The entries of a list, each with its place. What is none of them is named.
    fn entries<'a, T: Value>(&mut self, field: &str, list: &'a Field<List<T>>) -> Vec<(usize, &'a T)> {
        let mut entries = Vec::new();
        for (at, entry) in self.read(field, list).into_iter().flatten().enumerate() {
            match entry {
                Field::Is(value) => entries.push((at, value)),
                Field::Absent => {
                    let message = format!("it is null where {} belongs; it is skipped", T::NAME);
                    self.add(ProblemKind::Value, format!("{field}[{at}]"), message);
                }
                Field::Mistyped(_) => {
                    self.read_or(format_args!("{field}[{at}]"), entry, "it is skipped");
                }
            }
        }
        entries
    }

    fn parsed<T>(self, value: T) -> Parsed<T> {
        Parsed { value, problems: self.problems }
    }
}
