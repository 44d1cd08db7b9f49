//! Why a Service cannot be put into the tables.

use kproxy_common::NAME_LENGTH;

/// Why a Service is left as it was. The rest is served; it is tried again when something becomes free.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    /// The name does not fit into `service_info`, or could not be read back from there.
    #[error(
        "the name {name:?} cannot be stored: at most {} bytes, no '/' or ':' within a part; rename the Service or its port",
        NAME_LENGTH - 1
    )]
    Name { name: String },
    /// Counts in the maps have 16 bits.
    #[error("port {port:?} has {count} endpoints, and at most {} can be served; split the Service", u16::MAX)]
    TooManyBackends { port: String, count: usize },
    /// Two ports that the tables cannot tell apart.
    #[error(
        "two ports have the name {port:?}, the same protocol and the same family; give each a name of its own"
    )]
    SamePort { port: String },
    /// What is wanted contradicts itself.
    #[error("port {port:?} is inconsistent: {what}; this is a defect of kproxy, please report it")]
    Inconsistent { port: String, what: &'static str },
    /// Another Service of the same change wants it too.
    #[error("the frontend {frontend} is claimed by {other} as well; remove it from one of the two")]
    Claimed { frontend: String, other: String },
    /// A map is full.
    #[error(
        "{needed} more {what} do not fit: {free} of {capacity} are free; raise {flag}, or remove Services that are not needed"
    )]
    Full { what: &'static str, needed: usize, free: usize, capacity: u32, flag: &'static str },
    /// Slots are free, but not in a row.
    #[error(
        "{needed} backends in a row do not fit: of {capacity} slots {free} are free, at most {longest} of them in a row; raise {flag}"
    )]
    NoRoom { needed: usize, free: u32, longest: u32, capacity: u32, flag: &'static str },
}

impl PlanError {
    /// Whether it can pass without a change of this Service.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Claimed { .. }) || self.is_want_of_room()
    }

    /// Whether it passes when something else goes.
    pub fn is_want_of_room(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::NoRoom { .. })
    }
}

/// The agent's flags that set how much the maps hold.
pub mod flags {
    /// Elements of `frontend`.
    pub const FRONTENDS: &str = "--max-frontends";
    /// Elements of `backend`.
    pub const BACKENDS: &str = "--max-backends";
    /// Elements of `address`, which has as many as `frontend`.
    pub const ADDRESSES: &str = "--max-frontends";
    /// Elements of `source_range`.
    pub const SOURCE_RANGES: &str = "--max-source-ranges";
}
