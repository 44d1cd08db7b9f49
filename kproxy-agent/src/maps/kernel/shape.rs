//! What the maps must look like: opening a pin checks nothing.

use kproxy_common::{
    Address, AddressEntry, Backend, BackendSlots, Config, Counters, DeviceAddresses, DeviceKey, DropListener,
    Flow, FlowKey, FrontendKey, OptedOut, Owner, Reason, ServiceEntry, ServiceInfo, SourceRangeKey,
    map_names,
};

use crate::{
    maps::sys::{MapAttributes, flag, kind},
    plan::Capacity,
};

/// A map is not what this version of kproxy expects.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the map {map} has {what} {found}, and this kproxy expects {expected}: it was made by another version or with \
     other flags; `kproxy cleanup` removes it"
)]
pub struct ShapeError {
    /// The map's name.
    pub map: &'static str,
    /// What differs.
    pub what: &'static str,
    /// How it is.
    pub found: u32,
    /// How it should be.
    pub expected: u32,
}

/// Whether a map is of the sort, with the sizes and flags, that this version reads and writes.
pub(super) fn check(map: &'static str, found: &MapAttributes) -> Result<(), ShapeError> {
    let Some(expected) = expected(map) else { return Ok(()) };
    let MapAttributes { kind, key_size, value_size, max_entries: _, flags, inner_map_fd: _ } = expected;
    compare(map, "the type", found.kind, kind)?;
    compare(map, "the key size", found.key_size, key_size)?;
    compare(map, "the value size", found.value_size, value_size)?;
    compare(map, "the flags", found.flags, flags)
}

/// Whether the maps hold as much as is wanted.
pub(super) fn check_capacity(found: &Capacity, expected: &Capacity) -> Result<(), ShapeError> {
    let Capacity { frontends, backends, addresses, source_ranges } = *expected;
    let what = "a capacity of";
    compare(map_names::FRONTEND, what, found.frontends, frontends)?;
    compare(map_names::BACKEND, what, found.backends, backends)?;
    compare(map_names::ADDRESS, what, found.addresses, addresses)?;
    compare(map_names::SOURCE_RANGE, what, found.source_ranges, source_ranges)
}

/// How a map of this name is made to hold this much.
pub(super) fn with_capacity(map: &str, capacity: &Capacity) -> MapAttributes {
    let max_entries = match map {
        map_names::FRONTEND | map_names::SERVICE | map_names::SERVICE_INFO | map_names::COUNTER => {
            capacity.frontends
        }
        map_names::BACKEND | map_names::BACKEND_SLOT => capacity.backends,
        map_names::ADDRESS => capacity.addresses,
        map_names::SOURCE_RANGE => capacity.source_ranges,
        map_names::REASON => Reason::ALL.len() as u32,
        _ => 1,
    };
    MapAttributes { max_entries, ..expected(map).unwrap_or_default() }
}

/// How a map of this name is made, its capacity apart.
fn expected(map: &str) -> Option<MapAttributes> {
    let hash = |key, value| (kind::HASH, key, value, 0);
    let array = |value| (kind::ARRAY, 4, value, 0);
    let mapped = |value| (kind::ARRAY, 4, value, flag::MMAPABLE);
    let (kind, key_size, value_size, flags) = match map {
        map_names::FRONTEND => hash(size_of::<FrontendKey>(), 4),
        map_names::SERVICE => mapped(size_of::<ServiceEntry>()),
        map_names::SERVICE_INFO => mapped(size_of::<ServiceInfo>()),
        map_names::BACKEND => mapped(size_of::<Backend>()),
        map_names::BACKEND_SLOT => mapped(size_of::<BackendSlots>()),
        map_names::ADDRESS => hash(size_of::<Address>(), size_of::<AddressEntry>()),
        map_names::SOURCE_RANGE => (kind::LPM_TRIE, size_of::<SourceRangeKey>(), 4, flag::NO_PREALLOC),
        map_names::FLOW | map_names::FLOW_TRANSIENT => {
            (kind::LRU_HASH, size_of::<FlowKey>(), size_of::<Flow>(), 0)
        }
        map_names::COUNTER => array(size_of::<Counters>()),
        map_names::REASON => (kind::PERCPU_ARRAY, 4, 8, 0),
        map_names::DROP_EVENT => (kind::RINGBUF, 0, 0, 0),
        map_names::DROP_LISTENER => mapped(size_of::<DropListener>()),
        map_names::CONFIG => mapped(size_of::<Config>()),
        map_names::DEVICE => hash(size_of::<DeviceKey>(), size_of::<DeviceAddresses>()),
        map_names::OPTED_OUT => hash(8, size_of::<OptedOut>()),
        map_names::OWNER => array(size_of::<Owner>()),
        _ => return None,
    };
    let (key_size, value_size) = (key_size as u32, value_size as u32);
    Some(MapAttributes { kind, key_size, value_size, flags, ..MapAttributes::default() })
}

fn compare(map: &'static str, what: &'static str, found: u32, expected: u32) -> Result<(), ShapeError> {
    if found == expected { Ok(()) } else { Err(ShapeError { map, what, found, expected }) }
}
