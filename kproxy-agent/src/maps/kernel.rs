//! The kernel's maps: arrays through their memory, hash maps in batches.

mod batch;
mod carry;
mod config;
mod device;
mod drops;
mod flows;
mod grace;
mod lookup;
mod opted_out;
mod read;
mod shape;

#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use kproxy_common::{
    Address, AddressKind, Backend, BackendSlots, FrontendKey, ServiceEntry, ServiceInfo, SourceRangeKey,
    map_names,
};

use self::batch::Batches;
pub(in crate::maps) use self::grace::Grace;
use super::{
    MapWriter, WriteError,
    sys::{Map, Mapping, bytes_of},
};
use crate::plan::{Capacity, Word};

pub use self::{
    batch::probe_batches,
    carry::Carry,
    device::DeviceMap,
    drops::DropMaps,
    flows::{Cursor, FlowMaps},
    lookup::{FirstError, Lookup},
    opted_out::OptedOutMap,
    read::{layout_version, owner_text},
    shape::ShapeError,
};

/// The maps could not be opened or read.
#[derive(thiserror::Error, Debug)]
pub enum MapError {
    /// A pin could not be opened.
    #[error("cannot open the map {}: {source}; is kproxy running on this node, and --bpf-root the one that it uses?", path.display())]
    Open {
        /// The pin.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A map is not what this version expects.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// A call failed.
    #[error("cannot {what} the map {map}: {source}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// The map's name.
        map: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel offers no way to wait for programs that read.
    #[error("cannot wait for a grace period: {0}")]
    Grace(#[source] io::Error),
}

/// The maps that the agent writes and the commands read. There must be one writer.
#[derive(Debug)]
pub struct KernelMaps {
    frontend: Map,
    service: Mapping,
    service_info: Mapping,
    backend: Mapping,
    backend_slot: Mapping,
    address: Map,
    source_range: Map,
    counter: Map,
    reason: Map,
    config: Mapping,
    /// `None` among the maps of a version that had none.
    opted_out: Option<Map>,
    owner: Map,
    capacity: Capacity,
    batches: Batches,
    grace: Grace,
}

impl KernelMaps {
    /// Opens the maps that are pinned below `bpf_root`.
    pub fn open(bpf_root: &Path) -> Result<Self, MapError> {
        Self::open_pins(|name| bpf_root.join(name))
    }

    /// Opens the maps that are pinned as `pin` says.
    pub fn open_pins(pin: impl Fn(&str) -> PathBuf) -> Result<Self, MapError> {
        Self::from_maps(|name| {
            let path = pin(name);
            Map::open(&path).map_err(|source| MapError::Open { path, source })
        })
    }

    /// From open descriptors, by the names in [`map_names`].
    pub fn from_fds(mut fd: impl FnMut(&'static str) -> io::Result<OwnedFd>) -> Result<Self, MapError> {
        Self::from_maps(|name| {
            let map = fd(name).and_then(Map::from_fd);
            map.map_err(|source| MapError::Call { what: "open", map: name, source })
        })
    }

    /// Makes maps that nobody else sees and that go with this: for tests and measurements.
    pub fn create(capacity: &Capacity) -> Result<Self, MapError> {
        Self::from_maps(|name| {
            let attributes = shape::with_capacity(name, capacity);
            Map::create(attributes).map_err(|source| MapError::Call { what: "make", map: name, source })
        })
    }

    fn from_maps(mut open: impl FnMut(&'static str) -> Result<Map, MapError>) -> Result<Self, MapError> {
        let mut checked = |name: &'static str| -> Result<Map, MapError> {
            let map = open(name)?;
            shape::check(name, &map.attributes())?;
            Ok(map)
        };
        let frontend = checked(map_names::FRONTEND)?;
        let service = checked(map_names::SERVICE)?;
        let service_info = checked(map_names::SERVICE_INFO)?;
        let backend = checked(map_names::BACKEND)?;
        let backend_slot = checked(map_names::BACKEND_SLOT)?;
        let address = checked(map_names::ADDRESS)?;
        let source_range = checked(map_names::SOURCE_RANGE)?;
        let counter = checked(map_names::COUNTER)?;
        let reason = checked(map_names::REASON)?;
        let config = checked(map_names::CONFIG)?;
        let owner = checked(map_names::OWNER)?;
        let opted_out = match checked(map_names::OPTED_OUT) {
            Ok(map) => Some(map),
            Err(MapError::Open { source, .. } | MapError::Call { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                None
            }
            Err(error) => return Err(error),
        };

        let entries = |map: &Map| map.attributes().max_entries;
        let numbers = [&frontend, &service, &service_info, &counter].map(entries);
        let capacity = Capacity {
            frontends: numbers.into_iter().min().unwrap_or(0),
            backends: entries(&backend).min(entries(&backend_slot)),
            addresses: entries(&address),
            source_ranges: entries(&source_range),
        };
        let mapped = |name, map: &Map| {
            map.map_memory().map_err(|source| MapError::Call { what: "map the memory of", map: name, source })
        };
        Ok(Self {
            service: mapped(map_names::SERVICE, &service)?,
            service_info: mapped(map_names::SERVICE_INFO, &service_info)?,
            backend: mapped(map_names::BACKEND, &backend)?,
            backend_slot: mapped(map_names::BACKEND_SLOT, &backend_slot)?,
            config: mapped(map_names::CONFIG, &config)?,
            frontend,
            address,
            source_range,
            counter,
            reason,
            opted_out,
            owner,
            capacity,
            batches: Batches::default(),
            grace: Grace::default(),
        })
    }

    /// How much the maps hold.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Whether the maps hold what this agent is to hold; opening a pin checks nothing.
    pub fn check_capacity(&self, expected: &Capacity) -> Result<(), ShapeError> {
        shape::check_capacity(&self.capacity, expected)
    }
}

impl MapWriter for KernelMaps {
    fn write_backends(&mut self, first_slot: u32, backends: &[Backend]) -> Result<(), WriteError> {
        self.backend.write(first_slot, 0, bytes_of(backends)).map_err(failed(map_names::BACKEND))
    }

    fn store_backend_slots(&mut self, backend: u32, slots: BackendSlots) -> Result<(), WriteError> {
        self.backend_slot.store_u64(backend, 0, slots.to_word()).map_err(failed(map_names::BACKEND_SLOT))
    }

    fn write_info(&mut self, number: u32, info: &ServiceInfo) -> Result<(), WriteError> {
        self.service_info.write(number, 0, bytes_of(&[*info])).map_err(failed(map_names::SERVICE_INFO))
    }

    fn write_entry(&mut self, number: u32, entry: &ServiceEntry) -> Result<(), WriteError> {
        let words = entry.to_words();
        for word in Word::STORE_ORDER {
            self.store_word(number, word, words[word as usize])?;
        }
        Ok(())
    }

    fn store_word(&mut self, number: u32, word: Word, value: u64) -> Result<(), WriteError> {
        self.service.store_u64(number, word as usize, value).map_err(failed(map_names::SERVICE))
    }

    fn reset_counters(&mut self, numbers: &[u32]) -> Vec<Result<(), WriteError>> {
        let keys: Vec<u8> = numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
        let values = vec![0; numbers.len() * self.counter.value_bytes()];
        self.batches.replace(map_names::COUNTER, &self.counter, &keys, &values)
    }

    fn insert_frontends(&mut self, frontends: &[(FrontendKey, u32)]) -> Vec<Result<(), WriteError>> {
        let keys: Vec<FrontendKey> = frontends.iter().map(|(key, _)| *key).collect();
        let values: Vec<u8> = frontends.iter().flat_map(|(_, number)| number.to_ne_bytes()).collect();
        self.batches.insert(map_names::FRONTEND, &self.frontend, bytes_of(&keys), &values)
    }

    fn delete_frontends(&mut self, keys: &[FrontendKey]) -> Vec<Result<(), WriteError>> {
        self.batches.delete(map_names::FRONTEND, &self.frontend, bytes_of(keys))
    }

    fn insert_addresses(&mut self, addresses: &[(Address, AddressKind)]) -> Vec<Result<(), WriteError>> {
        let keys: Vec<Address> = addresses.iter().map(|(address, _)| *address).collect();
        let values: Vec<u8> = addresses.iter().flat_map(|(_, kind)| [*kind as u8, 0, 0, 0]).collect();
        self.batches.insert(map_names::ADDRESS, &self.address, bytes_of(&keys), &values)
    }

    fn delete_addresses(&mut self, addresses: &[Address]) -> Vec<Result<(), WriteError>> {
        self.batches.delete(map_names::ADDRESS, &self.address, bytes_of(addresses))
    }

    fn insert_source_ranges(&mut self, keys: &[SourceRangeKey]) -> Vec<Result<(), WriteError>> {
        let values = vec![0; keys.len() * self.source_range.value_bytes()];
        self.batches.insert(map_names::SOURCE_RANGE, &self.source_range, bytes_of(keys), &values)
    }

    fn delete_source_ranges(&mut self, keys: &[SourceRangeKey]) -> Vec<Result<(), WriteError>> {
        self.batches.delete(map_names::SOURCE_RANGE, &self.source_range, bytes_of(keys))
    }

    fn grace(&mut self) -> Result<(), WriteError> {
        self.grace.wait(&mut self.batches.calls).map_err(failed("(grace period)"))
    }

    fn calls(&self) -> u64 {
        self.batches.calls
    }
}

fn failed(map: &'static str) -> impl Fn(io::Error) -> WriteError {
    move |error| WriteError { map, what: error.to_string() }
}
