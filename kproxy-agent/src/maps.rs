//! The only code that writes the kernel's maps: a small trait, the real writer behind it, its twin in memory,
//! and what runs a plan over either and remembers how every Service fares.

mod execute;
pub mod kernel;
pub mod memory;
mod reconcile;
mod ring;
pub mod status;
mod sys;

use kproxy_common::{
    Address, AddressKind, Backend, BackendSlots, FrontendKey, ServiceEntry, ServiceInfo, SourceRangeKey,
};

pub use self::{
    execute::{Counts, Outcome, StepTime, execute},
    reconcile::{Reconciler, Report},
};
use crate::plan::Word;

/// Returns when no program holds anything that it read before the call (an RCU grace period).
pub fn grace_period() -> std::io::Result<()> {
    kernel::Grace::default().wait(&mut 0)
}

/// A write that was not made.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("map {map}: {what}")]
pub struct WriteError {
    /// The map's name.
    pub map: &'static str,
    /// What went wrong.
    pub what: String,
}

/// How the maps are written. What returns several results made each write by itself: those that succeeded
/// stand, whatever became of the others.
///
/// The caller keeps the rules of [`crate::plan`]: no insert over a key that is there, none after a deletion
/// without a grace period, no backend into a slot that a word points at.
pub trait MapWriter {
    /// Backends into the slots from `first_slot` on.
    fn write_backends(&mut self, first_slot: u32, backends: &[Backend]) -> Result<(), WriteError>;
    /// Where the backend with this [`Backend::id`] stands, by one store.
    fn store_backend_slots(&mut self, backend: u32, slots: BackendSlots) -> Result<(), WriteError>;
    /// Whose number it is.
    fn write_info(&mut self, number: u32, info: &ServiceInfo) -> Result<(), WriteError>;
    /// The whole entry of a number that no frontend leads to.
    fn write_entry(&mut self, number: u32, entry: &ServiceEntry) -> Result<(), WriteError>;
    /// One word of an entry, by one store.
    fn store_word(&mut self, number: u32, word: Word, value: u64) -> Result<(), WriteError>;
    /// Counters of these numbers to zero.
    fn reset_counters(&mut self, numbers: &[u32]) -> Vec<Result<(), WriteError>>;
    /// Frontends that are not there yet, with their numbers.
    fn insert_frontends(&mut self, frontends: &[(FrontendKey, u32)]) -> Vec<Result<(), WriteError>>;
    /// Frontends; one that is not there is no error.
    fn delete_frontends(&mut self, keys: &[FrontendKey]) -> Vec<Result<(), WriteError>>;
    /// Addresses that are not there yet.
    fn insert_addresses(&mut self, addresses: &[(Address, AddressKind)]) -> Vec<Result<(), WriteError>>;
    /// Addresses; one that is not there is no error.
    fn delete_addresses(&mut self, addresses: &[Address]) -> Vec<Result<(), WriteError>>;
    /// Source ranges that are not there yet.
    fn insert_source_ranges(&mut self, keys: &[SourceRangeKey]) -> Vec<Result<(), WriteError>>;
    /// Source ranges; one that is not there is no error.
    fn delete_source_ranges(&mut self, keys: &[SourceRangeKey]) -> Vec<Result<(), WriteError>>;
    /// Returns when no program holds anything that it read before the call.
    fn grace(&mut self) -> Result<(), WriteError>;
    /// How many times bpf(2) was called so far.
    fn calls(&self) -> u64;
}
