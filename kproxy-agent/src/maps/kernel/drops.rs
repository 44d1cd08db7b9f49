//! Drops and refusals as the programs tell them, and whose they were.

use std::{mem::offset_of, path::Path};

use kproxy_common::{
    Address, AddressKind, DropEvent, DropListener, FlowKey, FlowTable, FrontendKey, Hook, Protocol,
    ServiceInfo, map_names,
};

use super::{
    FlowMaps, MapError,
    flows::{address_at, u16_at},
    read::{u32_at, u64_at},
    shape,
};
use crate::maps::{
    ring::{Read, Reader},
    sys::{Map, Mapping, bytes_of},
};

const EVENT: usize = size_of::<DropEvent>();

/// The events, and the maps that tell whose they were.
#[derive(Debug)]
pub struct DropMaps {
    listener: Mapping,
    events: Reader<EVENT>,
    frontend: Map,
    address: Map,
    flows: FlowMaps,
}

impl DropMaps {
    /// Opens the maps that are pinned below `bpf_root`. Only events from now on are read.
    pub fn open(bpf_root: &Path) -> Result<Self, MapError> {
        let open = |name: &'static str| {
            let path = bpf_root.join(name);
            let map = Map::open(&path).map_err(|source| MapError::Open { path, source })?;
            shape::check(name, &map.attributes())?;
            Ok::<_, MapError>(map)
        };
        let failed = |map| move |source| MapError::Call { what: "map the memory of", map, source };
        Ok(Self {
            listener: open(map_names::DROP_LISTENER)?
                .map_memory()
                .map_err(failed(map_names::DROP_LISTENER))?,
            events: Reader::new(&open(map_names::DROP_EVENT)?).map_err(failed(map_names::DROP_EVENT))?,
            frontend: open(map_names::FRONTEND)?,
            address: open(map_names::ADDRESS)?,
            flows: FlowMaps::open(bpf_root)?,
        })
    }

    /// Says that somebody listens until then (nanoseconds since boot), unless somebody else does so for longer.
    pub fn listen_until(&self, until: u64) -> Result<(), MapError> {
        let failed = |source| MapError::Call { what: "write", map: map_names::DROP_LISTENER, source };
        let word = offset_of!(DropListener, until) / 8;
        if self.listener.load_u64(0, word).map_err(failed)? < until {
            self.listener.store_u64(0, word, until).map_err(failed)?;
        }
        Ok(())
    }

    /// The next event, if there is one.
    pub fn next_event(&mut self) -> Option<DropEvent> {
        loop {
            match self.events.read() {
                Read::Record(bytes) => {
                    if let Some(event) = event_from_bytes(&bytes) {
                        return Some(event);
                    }
                }
                // The gap in the sequence of what follows says how many those were.
                Read::Overtaken => {}
                Read::Nothing => return None,
            }
        }
    }

    /// The Service port that was asked for, as the tables stand now.
    pub fn asked(&self, event: &DropEvent) -> Result<Option<ServiceInfo>, MapError> {
        let Ok(protocol) = Protocol::try_from(event.protocol) else {
            return Ok(None);
        };
        let (to, port) = (event.destination, event.destination_port);
        if let Some(number) = self.number(&FrontendKey::new(to, port, protocol))? {
            return self.flows.info_now(number);
        }
        if self.is_node_port_address(&to)?
            && let Some(number) = self.number(&FrontendKey::node_port(&to, port, protocol))?
        {
            return self.flows.info_now(number);
        }
        // Translated already: it was on its way to a backend.
        let key = FlowKey {
            source: event.source,
            destination: to,
            source_port: event.source_port,
            destination_port: port,
            protocol,
            hook: Hook::Egress,
            ..FlowKey::EMPTY
        };
        for table in [FlowTable::Transient, FlowTable::Established] {
            if let Some(flow) = self.flows.get(table, &key)? {
                return self.flows.info(flow.number, flow.service);
            }
        }
        Ok(None)
    }

    fn number(&self, key: &FrontendKey) -> Result<Option<u32>, MapError> {
        let failed = |source| MapError::Call { what: "read", map: map_names::FRONTEND, source };
        let value = self.frontend.lookup(bytes_of(std::slice::from_ref(key))).map_err(failed)?;
        Ok(value.and_then(|value| u32_at(&value, 0)))
    }

    fn is_node_port_address(&self, address: &Address) -> Result<bool, MapError> {
        let failed = |source| MapError::Call { what: "read", map: map_names::ADDRESS, source };
        let value = self.address.lookup(&address.octets()).map_err(failed)?;
        Ok(value.is_some_and(|value| value.first() == Some(&(AddressKind::NodePort as u8))))
    }
}

fn event_from_bytes(bytes: &[u8; EVENT]) -> Option<DropEvent> {
    Some(DropEvent {
        time: u64_at(bytes, offset_of!(DropEvent, time))?,
        sequence: u64_at(bytes, offset_of!(DropEvent, sequence))?,
        source: address_at(bytes, offset_of!(DropEvent, source))?,
        destination: address_at(bytes, offset_of!(DropEvent, destination))?,
        source_port: u16_at(bytes, offset_of!(DropEvent, source_port))?,
        destination_port: u16_at(bytes, offset_of!(DropEvent, destination_port))?,
        protocol: bytes[offset_of!(DropEvent, protocol)],
        reason: bytes[offset_of!(DropEvent, reason)],
        refused: bytes[offset_of!(DropEvent, refused)],
        _pad: 0,
        device: u32_at(bytes, offset_of!(DropEvent, device))?,
        stream: u32_at(bytes, offset_of!(DropEvent, stream))?,
    })
}
