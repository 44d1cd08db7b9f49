//! Reading the maps: all of them for an agent that starts and for the commands, and the counters.

use std::{
    io,
    mem::offset_of,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use kproxy_common::{
    Address, AddressKind, Backend, Counters, FrontendKey, NAME_LENGTH, Owner, Reason, ServiceInfo,
    SourceRangeKey, map_names,
};

use super::{KernelMaps, MapError};
use crate::{
    maps::{
        MapWriter as _,
        sys::{self, Map, Mapping},
    },
    plan::{Snapshot, Tables, restore},
};

/// How many elements one call reads. A bucket of a hash map must fit.
const CHUNK: u32 = 8_192;

impl KernelMaps {
    /// What the maps hold. While an agent writes them, parts may be of different times.
    pub fn read_all(&self) -> Result<Snapshot, MapError> {
        let (mut snapshot, _) = self.read_sound()?;
        snapshot.normalize();
        Ok(snapshot)
    }

    /// The tables as an earlier agent left them, and what in them does not fit together. Only for the one who
    /// writes from now on.
    pub fn restore(&mut self) -> Result<(Tables, Vec<String>), MapError> {
        // Programs may still hold what the earlier agent changed last.
        self.grace().map_err(|error| MapError::Grace(io::Error::other(error.what)))?;
        let (mut snapshot, mut problems) = self.read_sound()?;
        snapshot.normalize();
        let (tables, more) = restore(&snapshot, self.capacity);
        problems.extend(more);
        Ok((tables, problems))
    }

    /// The counters, by number.
    pub fn counters(&self) -> Result<Vec<Counters>, MapError> {
        let mut counters = vec![Counters::default(); self.counter.attributes().max_entries as usize];
        for_each(map_names::COUNTER, &self.counter, |key, value| {
            let (Some(number), Some(connections), Some(pass_through)) =
                (u32_at(key, 0), u64_at(value, 0), u64_at(value, 8))
            else {
                return;
            };
            if let Some(counter) = counters.get_mut(number as usize) {
                *counter = Counters { connections, pass_through };
            }
        })?;
        Ok(counters)
    }

    /// Verdicts by their reason, on each CPU.
    pub fn reasons(&self) -> Result<Vec<(Reason, Vec<u64>)>, MapError> {
        let mut reasons = Vec::with_capacity(Reason::ALL.len());
        for reason in Reason::ALL {
            let value =
                self.reason.lookup(&(*reason as u32).to_ne_bytes()).map_err(failed(map_names::REASON))?;
            let counts =
                value.unwrap_or_default().chunks_exact(8).filter_map(|count| u64_at(count, 0)).collect();
            reasons.push((*reason, counts));
        }
        Ok(reasons)
    }

    /// Who wrote the maps last; `None` if nobody did.
    pub fn read_owner(&self) -> Result<Option<Owner>, MapError> {
        read_owner(&self.owner)
    }

    /// Says that we write the maps from now on.
    pub fn write_owner(&mut self, owner: &Owner) -> Result<(), MapError> {
        let result = self.owner.update(&0_u32.to_ne_bytes(), sys::bytes_of(&[*owner]), sys::BPF_ANY);
        result.map_err(|source| MapError::Call { what: "write", map: map_names::OWNER, source })
    }

    /// Everything that has a meaning, and what has none.
    fn read_sound(&self) -> Result<(Snapshot, Vec<String>), MapError> {
        let mut problems = Vec::new();
        let mut snapshot = Snapshot::default();
        for_each(map_names::FRONTEND, &self.frontend, |key, value| {
            let known = key.try_into().ok().and_then(|bytes| FrontendKey::from_bytes(bytes).ok());
            match (known, u32_at(value, 0)) {
                (Some(key), Some(number)) => snapshot.frontends.push((key, number)),
                _ => problems.push(format!("a key of frontend means nothing to this version: {key:02x?}")),
            }
        })?;
        for_each(map_names::ADDRESS, &self.address, |key, value| {
            if let Ok(octets) = key.try_into() {
                let kind = value.first().and_then(|kind| AddressKind::try_from(*kind).ok());
                snapshot.addresses.push((Address::new(octets), kind));
            }
        })?;
        for_each(map_names::SOURCE_RANGE, &self.source_range, |key, _| {
            snapshot.source_ranges.extend(range_from_bytes(key));
        })?;
        let service = failed(map_names::SERVICE);
        for number in 0..self.capacity.frontends {
            let mut words = [0; 4];
            for (index, word) in words.iter_mut().enumerate() {
                *word = self.service.load_u64(number, index).map_err(&service)?;
            }
            snapshot.entries.push(words);
        }
        let numbers = self.capacity.frontends;
        snapshot.infos = each(map_names::SERVICE_INFO, &self.service_info, numbers, info_from_bytes)?;
        let slots = self.capacity.backends;
        snapshot.backends =
            each(map_names::BACKEND, &self.backend, slots, |bytes| Backend::from_bytes(bytes).ok())?;
        for backend in 0..slots {
            let word = self.backend_slot.load_u64(backend, 0).map_err(failed(map_names::BACKEND_SLOT))?;
            snapshot.backend_slots.push(word);
        }
        Ok((snapshot, problems))
    }
}

/// Who wrote the maps below `bpf_root` last, for people.
pub fn owner_text(bpf_root: &Path) -> Option<String> {
    let map = Map::open(&bpf_root.join(map_names::OWNER)).ok()?;
    super::shape::check(map_names::OWNER, &map.attributes()).ok()?;
    let owner = read_owner(&map).ok()??;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    let started = UNIX_EPOCH + Duration::from_secs(owner.started);
    let age = SystemTime::now().duration_since(started).unwrap_or_default().as_secs();
    Some(format!(
        "kproxy {} of node {}, process {}, started {age} s ago",
        text(&owner.version),
        text(&owner.node),
        owner.pid
    ))
}

/// In which layout the maps below `bpf_root` are; `None` if nobody has written them yet.
pub fn layout_version(bpf_root: &Path) -> Option<u32> {
    let map = Map::open(&bpf_root.join(map_names::OWNER)).ok()?;
    // The version stands first in every layout.
    let value = map.lookup(&0_u32.to_ne_bytes()).ok()??;
    u32_at(&value, offset_of!(Owner, layout_version)).filter(|version| *version != 0)
}

fn read_owner(map: &Map) -> Result<Option<Owner>, MapError> {
    let bytes = map.lookup(&0_u32.to_ne_bytes()).map_err(failed(map_names::OWNER))?.unwrap_or_default();
    if bytes.len() != size_of::<Owner>() || bytes.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let (mut node, mut version) = ([0; 64], [0; 16]);
    let (node_at, version_at) = (offset_of!(Owner, node), offset_of!(Owner, version));
    node.copy_from_slice(&bytes[node_at..node_at + 64]);
    version.copy_from_slice(&bytes[version_at..version_at + 16]);
    Ok(Some(Owner {
        layout_version: u32_at(&bytes, offset_of!(Owner, layout_version)).unwrap_or(0),
        pid: u32_at(&bytes, offset_of!(Owner, pid)).unwrap_or(0),
        started: u64_at(&bytes, offset_of!(Owner, started)).unwrap_or(0),
        node,
        version,
    }))
}

/// Calls `visit` with key and value of every element.
pub(super) fn for_each(
    name: &'static str,
    map: &Map,
    mut visit: impl FnMut(&[u8], &[u8]),
) -> Result<(), MapError> {
    let (key_size, value_size) = (map.attributes().key_size as usize, map.value_bytes());
    let mut position = None;
    let mut chunk = CHUNK.min(map.attributes().max_entries.max(1));
    loop {
        match map.lookup_batch(position.as_ref(), chunk) {
            Ok(elements) => {
                let pairs =
                    elements.keys.chunks_exact(key_size).zip(elements.values.chunks_exact(value_size));
                pairs.for_each(|(key, value)| visit(key, value));
                position = elements.next;
            }
            // A bucket of the hash holds more than there is room for.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                chunk = chunk.saturating_mul(2);
                continue;
            }
            Err(error) if position.is_none() && sys::lacks_batches(&error) => break,
            Err(error) => return Err(failed(name)(error)),
        }
        if position.is_none() {
            return Ok(());
        }
    }
    let mut key = map.next_key(None).map_err(failed(name))?;
    while let Some(current) = key {
        if let Some(value) = map.lookup(&current).map_err(failed(name))? {
            visit(&current, &value);
        }
        key = map.next_key(Some(&current)).map_err(failed(name))?;
    }
    Ok(())
}

/// The values of a mapped array, without the unused ones at its end.
fn each<T, const N: usize>(
    name: &'static str,
    mapping: &Mapping,
    count: u32,
    parse: impl Fn(&[u8; N]) -> Option<T>,
) -> Result<Vec<Option<T>>, MapError> {
    let read = |element: u32| {
        let mut bytes = [0; N];
        mapping.read(element, 0, &mut bytes).map_err(failed(name)).map(|()| bytes)
    };
    // Most of a map is unused; nothing is allocated for that.
    let mut used = count;
    while used > 0 && read(used - 1)?.iter().all(|byte| *byte == 0) {
        used -= 1;
    }
    (0..used).map(|element| Ok(parse(&read(element)?))).collect()
}

pub(super) fn info_from_bytes(bytes: &[u8; size_of::<ServiceInfo>()]) -> Option<ServiceInfo> {
    let at = offset_of!(ServiceInfo, frontend);
    let frontend = bytes[at..at + size_of::<FrontendKey>()].try_into().ok()?;
    let mut name = [0; NAME_LENGTH];
    name.copy_from_slice(&bytes[..NAME_LENGTH]);
    Some(ServiceInfo {
        name,
        changed: u64_at(bytes, offset_of!(ServiceInfo, changed))?,
        frontend: FrontendKey::from_bytes(frontend).ok()?,
        frontend_kind: bytes[offset_of!(ServiceInfo, frontend_kind)],
        service_kind: bytes[offset_of!(ServiceInfo, service_kind)],
        traffic_policy: bytes[offset_of!(ServiceInfo, traffic_policy)],
        pass_through_rule: bytes[offset_of!(ServiceInfo, pass_through_rule)],
    })
}

fn range_from_bytes(bytes: &[u8]) -> Option<SourceRangeKey> {
    let at = offset_of!(SourceRangeKey, address);
    let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
    Some(SourceRangeKey {
        prefix_length: u32_at(bytes, offset_of!(SourceRangeKey, prefix_length))?,
        number: u32_at(bytes, offset_of!(SourceRangeKey, number))?,
        address: Address::new(octets),
    })
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

pub(super) fn failed(map: &'static str) -> impl Fn(io::Error) -> MapError {
    move |source| MapError::Call { what: "read", map, source }
}
