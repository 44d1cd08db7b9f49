//! The tables of flows. Programs write them; the agent sweeps them, and the commands read them, both page by page:
//! they can hold a million entries, and no one needs these at once.

use std::{io, os::fd::OwnedFd, path::Path};

use kproxy_common::{
    Address, Conversation, Flow, FlowKey, FlowTable, Role, ServiceIdentity, ServiceInfo, map_names,
};

use super::{MapError, batch::Batches, read::info_from_bytes, shape};
use crate::maps::sys::{self, Map, Mapping, Position, bytes_of};

/// Where reading a table goes on.
#[derive(Clone, Debug, Default)]
pub struct Cursor {
    place: Place,
}

#[derive(Clone, Debug, Default)]
enum Place {
    #[default]
    Start,
    Batch(Position),
    /// Without batches: after this key, with so many read since the start.
    Key(Vec<u8>, u32),
    End,
}

impl Cursor {
    /// Whether everything was read.
    pub fn is_at_end(&self) -> bool {
        matches!(self.place, Place::End)
    }
}

/// The tables of flows, and the names of the Services that they belong to.
#[derive(Debug)]
pub struct FlowMaps {
    established: Map,
    transient: Map,
    service: Mapping,
    service_info: Mapping,
    numbers: u32,
    batches: Batches,
}

impl FlowMaps {
    /// Opens the maps that are pinned below `bpf_root`.
    pub fn open(bpf_root: &Path) -> Result<Self, MapError> {
        Self::from_maps(|name| {
            let path = bpf_root.join(name);
            Map::open(&path).map_err(|source| MapError::Open { path, source })
        })
    }

    /// The same maps by their descriptors: for tests of programs whose maps are not pinned.
    pub fn from_fds(fd: impl Fn(&'static str) -> io::Result<OwnedFd>) -> Result<Self, MapError> {
        Self::from_maps(|name| {
            let map = fd(name).and_then(Map::from_fd);
            map.map_err(|source| MapError::Call { what: "open", map: name, source })
        })
    }

    fn from_maps(open: impl Fn(&'static str) -> Result<Map, MapError>) -> Result<Self, MapError> {
        let open = |name: &'static str| {
            let map = open(name)?;
            shape::check(name, &map.attributes())?;
            Ok::<_, MapError>(map)
        };
        let (service, service_info) = (open(map_names::SERVICE)?, open(map_names::SERVICE_INFO)?);
        let mapped = |name, map: &Map| {
            map.map_memory().map_err(|source| MapError::Call { what: "map the memory of", map: name, source })
        };
        Ok(Self {
            established: open(map_names::FLOW)?,
            transient: open(map_names::FLOW_TRANSIENT)?,
            numbers: service.attributes().max_entries.min(service_info.attributes().max_entries),
            service: mapped(map_names::SERVICE, &service)?,
            service_info: mapped(map_names::SERVICE_INFO, &service_info)?,
            batches: Batches::default(),
        })
    }

    /// How many entries a table has room for.
    pub fn capacity(&self, table: FlowTable) -> u32 {
        self.map(table).attributes().max_entries
    }

    /// About `limit` entries that follow the cursor, fewer at the end. Entries that programs add or remove
    /// meanwhile may be missed; without the kernel's batches (before 5.6) some may come twice.
    pub fn page(
        &self,
        table: FlowTable,
        cursor: &mut Cursor,
        limit: u32,
    ) -> Result<Vec<(FlowKey, Flow)>, MapError> {
        let map = self.map(table);
        let failed = |source| MapError::Call { what: "read", map: table.map(), source };
        let mut chunk = limit.clamp(1, self.capacity(table).max(1));
        let from = loop {
            let from = match &cursor.place {
                Place::Start => None,
                Place::Batch(position) => Some(position),
                Place::Key(key, read) => break Some((key.clone(), *read)),
                Place::End => return Ok(Vec::new()),
            };
            match map.lookup_batch(from, chunk) {
                Ok(elements) => {
                    let page = parse_all(&elements.keys, &elements.values);
                    cursor.place = elements.next.map_or(Place::End, Place::Batch);
                    return Ok(page);
                }
                // A bucket of the hash holds more than there is room for.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => chunk = chunk.saturating_mul(2),
                Err(error) if from.is_none() && sys::lacks_batches(&error) => break None,
                Err(error) => return Err(failed(error)),
            }
        };
        let (mut key, mut read) = match from {
            Some((key, read)) => (Some(key), read),
            None => (None, 0),
        };
        let mut page = Vec::new();
        for _ in 0..limit {
            // After a key that is gone the kernel begins anew: the count keeps that from going on for ever.
            let next = if read < self.capacity(table) {
                map.next_key(key.as_deref()).map_err(failed)?
            } else {
                None
            };
            let Some(next) = next else {
                cursor.place = Place::End;
                return Ok(page);
            };
            if let Some(value) = map.lookup(&next).map_err(failed)? {
                page.extend(parse(&next, &value));
            }
            (key, read) = (Some(next), read + 1);
        }
        cursor.place = key.map_or(Place::Start, |key| Place::Key(key, read));
        Ok(page)
    }

    /// One entry.
    pub fn get(&self, table: FlowTable, key: &FlowKey) -> Result<Option<Flow>, MapError> {
        let failed = |source| MapError::Call { what: "read", map: table.map(), source };
        let value = self.map(table).lookup(&key.to_bytes()).map_err(failed)?;
        Ok(value.and_then(|value| Flow::from_bytes(value.as_slice().try_into().ok()?).ok()))
    }

    /// The entry that the flow has in this role, in whichever table.
    pub fn entry(
        &self,
        whole: &Conversation,
        role: Role,
    ) -> Result<Option<(FlowTable, FlowKey, Flow)>, MapError> {
        let (mut key, mut flow) = (FlowKey::EMPTY, Flow::EMPTY);
        whole.write_entry(role, &mut key, &mut flow);
        for table in FlowTable::BOTH {
            // Flows of the node and those of Services have the same keys.
            if let Some(found) = self.get(table, &key)?
                && found.role == role
            {
                return Ok(Some((table, key, found)));
            }
        }
        Ok(None)
    }

    /// Deletes entries; those that are not there are no error.
    pub fn delete(&mut self, table: FlowTable, keys: &[FlowKey]) -> Result<(), MapError> {
        let map = match table {
            FlowTable::Established => &self.established,
            FlowTable::Transient => &self.transient,
        };
        for result in self.batches.delete(table.map(), map, bytes_of(keys)) {
            result.map_err(|error| MapError::Call {
                what: "delete from",
                map: table.map(),
                source: io::Error::other(error.what),
            })?;
        }
        Ok(())
    }

    /// Whose frontend a number is, if it still belongs to the Service port `service`.
    pub fn info(&self, number: u32, service: u32) -> Result<Option<ServiceInfo>, MapError> {
        if number >= self.numbers {
            return Ok(None);
        }
        let failed = |source| MapError::Call { what: "read", map: map_names::SERVICE, source };
        let identity = self.service.load_u64(number, 2).map_err(failed)?;
        if ServiceIdentity::from_word(identity).service() != service {
            return Ok(None);
        }
        self.info_now(number)
    }

    /// Whose frontend a number is now.
    pub fn info_now(&self, number: u32) -> Result<Option<ServiceInfo>, MapError> {
        if number >= self.numbers {
            return Ok(None);
        }
        let failed = |source| MapError::Call { what: "read", map: map_names::SERVICE_INFO, source };
        let mut bytes = [0; size_of::<ServiceInfo>()];
        self.service_info.read(number, 0, &mut bytes).map_err(failed)?;
        Ok(info_from_bytes(&bytes))
    }

    fn map(&self, table: FlowTable) -> &Map {
        match table {
            FlowTable::Established => &self.established,
            FlowTable::Transient => &self.transient,
        }
    }
}

/// What has no meaning to this version is left out: programs of another one may be running still.
fn parse_all(keys: &[u8], values: &[u8]) -> Vec<(FlowKey, Flow)> {
    let pairs = keys.chunks_exact(size_of::<FlowKey>()).zip(values.chunks_exact(size_of::<Flow>()));
    pairs.filter_map(|(key, value)| parse(key, value)).collect()
}

fn parse(key: &[u8], value: &[u8]) -> Option<(FlowKey, Flow)> {
    let key = FlowKey::from_bytes(key.try_into().ok()?).ok()?;
    Some((key, Flow::from_bytes(value.try_into().ok()?).ok()?))
}

pub(super) fn address_at(bytes: &[u8], at: usize) -> Option<Address> {
    Some(Address::new(bytes.get(at..at + 16)?.try_into().ok()?))
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
impl FlowMaps {
    /// Maps that belong to nobody else; none, with the reason printed, where the test may not make any.
    pub(crate) fn create(flows: u32) -> Option<Self> {
        let capacity = crate::plan::Capacity { frontends: 4, backends: 4, addresses: 4, source_ranges: 4 };
        let made =
            Self::from_maps(|name| {
                let attributes = shape::with_capacity(name, &capacity);
                let max_entries = if name.starts_with("flow") { flows } else { attributes.max_entries };
                Map::create(sys::MapAttributes { max_entries, ..attributes })
                    .map_err(|source| MapError::Call { what: "make", map: name, source })
            });
        match made {
            Ok(maps) => Some(maps),
            Err(MapError::Call { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {
                println!("skipped: making maps needs CAP_BPF: {source}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Enters a flow in a role, as a program would.
    pub(crate) fn put(&self, table: FlowTable, whole: &Conversation, role: Role) -> FlowKey {
        let (mut key, mut flow) = (FlowKey::EMPTY, Flow::EMPTY);
        whole.write_entry(role, &mut key, &mut flow);
        self.map(table).update(&key.to_bytes(), &flow.to_bytes(), sys::BPF_ANY).unwrap();
        key
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use kproxy_common::{Ends, FlowEnd, FlowState, Protocol};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The agent reads of an entry what a program has written, every field of it.
        #[test]
        fn an_entry_is_read_as_it_was_written(flow in any_flow(), role in any_role()) {
            let (mut key, mut value) = (FlowKey::EMPTY, Flow::EMPTY);
            flow.write_entry(role, &mut key, &mut value);
            let (key_bytes, value_bytes) = (bytes_of(&[key]).to_vec(), bytes_of(&[value]).to_vec());
            prop_assert_eq!(parse(&key_bytes, &value_bytes), Some((key, value)));
            prop_assert_eq!(&key.to_bytes()[..], key_bytes);
            prop_assert_eq!(&value.to_bytes()[..], value_bytes);
        }

        /// What another version has written is no entry, or one whose every byte has a meaning.
        #[test]
        fn bytes_are_an_entry_or_refused(bytes in any::<[[u8; 20]; 2]>(), value in any::<[[u8; 32]; 2]>()) {
            let (key, value) = (bytes.concat(), value.concat());
            if let Some((read, flow)) = parse(&key, &value) {
                prop_assert_eq!(&read.to_bytes()[..], key);
                prop_assert_eq!(&Flow { _pad2: 0, ..flow }.to_bytes()[..54], &value[..54]);
            }
        }
    }

    fn any_role() -> impl Strategy<Value = Role> {
        prop::sample::select(vec![Role::Request, Role::Forwarded, Role::Return, Role::Reply])
    }

    fn any_end() -> impl Strategy<Value = FlowEnd> {
        prop::sample::select(vec![FlowEnd::Open, FlowEnd::Finished, FlowEnd::Reset])
    }

    fn any_flow() -> impl Strategy<Value = Conversation> {
        let address = || any::<[u8; 16]>().prop_map(Address::new);
        let ports = prop::array::uniform5(1_u16..);
        let state = vec![FlowState::Opening, FlowState::Answered, FlowState::Established];
        let protocol = vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        let said = (prop::sample::select(state), any_end(), any_end(), prop::sample::select(protocol));
        let rest = (any::<[u32; 3]>(), any::<u64>(), any::<bool>(), said);
        let ends = (address(), address(), address(), address());
        (ends, ports, rest).prop_map(|((client, frontend, backend, mask), ports, rest)| {
            let [client_port, frontend_port, backend_port, mask_port, inner_port] = ports;
            let ([number, service, backend_id], last_seen, has_one_port, said) = rest;
            let (state, client_end, backend_end, protocol) = said;
            Conversation {
                client,
                frontend,
                backend,
                mask,
                client_port,
                frontend_port,
                backend_port,
                mask_port,
                inner_port: if has_one_port { client_port } else { inner_port },
                protocol,
                state,
                ends: Ends { client: client_end, backend: backend_end },
                number,
                service,
                backend_id,
                last_seen,
            }
        })
    }

    fn whole(client_port: u16) -> Conversation {
        Conversation {
            client: Address::from_v4_word(7),
            client_port,
            frontend_port: 80,
            backend_port: 8_080,
            last_seen: u64::from(client_port),
            ..Conversation::EMPTY
        }
    }

    fn put(maps: &FlowMaps, whole: &Conversation, role: Role) -> FlowKey {
        maps.put(FlowTable::Established, whole, role)
    }

    fn read_all(maps: &FlowMaps, mut cursor: Cursor) -> Vec<(FlowKey, Flow)> {
        let mut all = Vec::new();
        while !cursor.is_at_end() {
            let page = maps.page(FlowTable::Established, &mut cursor, 64).unwrap();
            assert!(page.len() <= 128, "a page of {}", page.len());
            all.extend(page);
        }
        all
    }

    #[test]
    fn pages_hold_every_entry_once_with_batches_and_without() {
        let Some(mut maps) = FlowMaps::create(4_096) else { return };
        let written: Vec<_> = (1..=1_000).map(|port| put(&maps, &whole(port), Role::Request)).collect();
        let one_by_one = Cursor { place: Place::Key(bytes_of(&[FlowKey::EMPTY]).to_vec(), 0) };
        for cursor in [Cursor::default(), one_by_one] {
            let read = read_all(&maps, cursor);
            assert_eq!(read.len(), written.len());
            assert_eq!(
                read.iter().map(|(key, _)| *key).collect::<BTreeSet<_>>(),
                written.iter().copied().collect()
            );
            assert!(read.iter().all(|(key, flow)| flow.last_seen == u64::from(key.source_port)));
        }
        // Some that are there, one that never was.
        let mut gone = written[..500].to_vec();
        gone.push(FlowKey { source_port: 2_000, ..written[0] });
        maps.delete(FlowTable::Established, &gone).unwrap();
        assert_eq!(read_all(&maps, Cursor::default()).len(), 500);
        assert_eq!(maps.page(FlowTable::Transient, &mut Cursor::default(), 64).unwrap(), []);
    }

    #[test]
    fn an_entry_is_found_by_its_flow() {
        let Some(maps) = FlowMaps::create(64) else { return };
        let flow = whole(9);
        let reply = put(&maps, &flow, Role::Reply);
        let found = maps.entry(&flow, Role::Reply).unwrap();
        assert_eq!(found.map(|(table, key, _)| (table, key)), Some((FlowTable::Established, reply)));
        assert_eq!(maps.entry(&flow, Role::Request).unwrap(), None);
        // Nobody has this number.
        assert_eq!(maps.info(3, 7).unwrap(), None);
        assert_eq!(maps.info(4, 7).unwrap(), None);
    }
}
