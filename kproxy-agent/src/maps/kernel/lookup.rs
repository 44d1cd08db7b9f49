//! The kernel's maps as the decision reads them: what a program would find at this moment, element by element.

use std::{cell::RefCell, mem::offset_of};

use kproxy_common::{
    Address, AddressKind, AffinityKey, AffinityValue, Backend, BackendSlots, Block, Cidr, ClientKind, Config,
    FrontendKey, MAX_CIDRS, ServiceIdentity, ServiceInfo, Side, SourceRangeKey, Tables, map_names,
};

use super::{
    KernelMaps, MapError,
    read::{failed, for_each, info_from_bytes, u32_at},
};
use crate::{
    maps::sys::{Map, bytes_of},
    plan::Word,
};

/// The first read that failed.
pub type FirstError = RefCell<Option<MapError>>;

/// [`KernelMaps`], read only. What cannot be read is missing to the decision, and noted.
#[derive(Debug)]
pub struct Lookup<'a> {
    maps: &'a KernelMaps,
    config: Option<Config>,
    error: &'a FirstError,
}

impl<'a> Lookup<'a> {
    /// Over `maps`, with the configuration as it is now.
    pub fn new(maps: &'a KernelMaps, error: &'a FirstError) -> Self {
        let lookup = Self { maps, config: None, error };
        let config = lookup.ok(maps.read_config());
        Self { config, ..lookup }
    }

    /// Whose number it is.
    pub fn info(&self, number: u32) -> Option<ServiceInfo> {
        let mut bytes = [0; size_of::<ServiceInfo>()];
        let read = self.maps.service_info.read(number, 0, &mut bytes);
        self.ok(read.map_err(failed(map_names::SERVICE_INFO)))?;
        info_from_bytes(&bytes)
    }

    /// Every frontend and its number.
    pub fn frontends(&self) -> Vec<(FrontendKey, u32)> {
        let mut all = Vec::new();
        let read = for_each(map_names::FRONTEND, &self.maps.frontend, |key, value| {
            let key = key.try_into().ok().and_then(|bytes| FrontendKey::from_bytes(bytes).ok());
            all.extend(key.zip(u32_at(value, 0)));
        });
        self.ok(read);
        all
    }

    /// The cookie of the network namespace of the pod with this address, if it is opted out of the socket hooks.
    pub fn opted_out_at(&self, address: &Address) -> Option<u64> {
        self.ok(self.maps.opted_out_at(address))?
    }

    fn word(&self, number: u32, word: Word) -> Option<u64> {
        self.ok(self.maps.service.load_u64(number, word as usize).map_err(failed(map_names::SERVICE)))
    }

    fn find(&self, name: &'static str, map: &Map, key: &[u8]) -> Option<Vec<u8>> {
        self.ok(map.lookup(key).map_err(failed(name)))?
    }

    fn ok<T>(&self, result: Result<T, MapError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.error.borrow_mut().get_or_insert(error);
                None
            }
        }
    }
}

impl Tables for Lookup<'_> {
    fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    fn frontend(&self, key: &FrontendKey) -> Option<u32> {
        u32_at(&self.find(map_names::FRONTEND, &self.maps.frontend, &key.to_bytes())?, 0)
    }

    fn address(&self, address: &Address) -> Option<AddressKind> {
        let value = self.find(map_names::ADDRESS, &self.maps.address, &address.octets())?;
        AddressKind::try_from(*value.first()?).ok()
    }

    fn side(&self, number: u32, from: ClientKind) -> Option<Side> {
        let word = if from == ClientKind::Outside { Word::Outside } else { Word::Inside };
        Side::from_word(self.word(number, word)?).ok()
    }

    fn identity(&self, number: u32) -> Option<ServiceIdentity> {
        Some(ServiceIdentity::from_word(self.word(number, Word::Identity)?))
    }

    fn block(&self, number: u32) -> Option<Block> {
        Some(Block::from_word(self.word(number, Word::Block)?))
    }

    fn backend(&self, slot: u32) -> Option<Backend> {
        let mut bytes = [0; size_of::<Backend>()];
        self.ok(self.maps.backend.read(slot, 0, &mut bytes).map_err(failed(map_names::BACKEND)))?;
        Backend::from_bytes(&bytes).ok()
    }

    fn slots_of(&self, backend: u32) -> Option<BackendSlots> {
        let word = self.maps.backend_slot.load_u64(backend, 0);
        self.ok(word.map_err(failed(map_names::BACKEND_SLOT))).map(BackendSlots::from_word)
    }

    fn source_allowed(&self, number: u32, client: &Address) -> bool {
        let key = SourceRangeKey::new(number, &Cidr::new(*client, 128));
        self.find(map_names::SOURCE_RANGE, &self.maps.source_range, bytes_of(&[key])).is_some()
    }

    fn opted_out(&self, netns_cookie: u64) -> bool {
        let Some(map) = &self.maps.opted_out else { return false };
        self.find(map_names::OPTED_OUT, map, &netns_cookie.to_ne_bytes()).is_some()
    }

    /// None: where a client went before is a state of the node, and no rule.
    fn affinity(&self, _: &AffinityKey) -> Option<AffinityValue> {
        None
    }

    fn remember(&self, _: &AffinityKey, _: &AffinityValue) {}

    fn now(&self) -> u64 {
        0
    }
}

impl KernelMaps {
    /// What the programs know of the node.
    pub fn read_config(&self) -> Result<Config, MapError> {
        let mut bytes = [0; size_of::<Config>()];
        self.config.read(0, 0, &mut bytes).map_err(failed(map_names::CONFIG))?;
        let u32_of = |at: usize| u32_at(&bytes, at).unwrap_or(0);
        let u64_of = |at: usize| u64::from(u32_of(at)) | u64::from(u32_of(at + 4)) << 32;
        let cidrs = |at: usize| {
            let mut cidrs = [Cidr::NONE; MAX_CIDRS];
            for (index, cidr) in cidrs.iter_mut().enumerate() {
                let at = at + index * size_of::<Cidr>();
                let mut octets = [0; size_of::<Address>()];
                octets.copy_from_slice(&bytes[at..at + size_of::<Address>()]);
                *cidr = Cidr::new(Address::new(octets), u32_of(at + size_of::<Address>()));
            }
            cidrs
        };
        let u16_of = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let (seed, peer) = (offset_of!(Config, hash_seed), offset_of!(Config, remember_peer));
        Ok(Config {
            host_netns_cookie: u64_of(offset_of!(Config, host_netns_cookie)),
            udp_timeout: u64_of(offset_of!(Config, udp_timeout)),
            hash_seed: [u32_of(seed), u32_of(seed + 4)],
            loopback_node_ports: u16_of(offset_of!(Config, loopback_node_ports)),
            routes_by_source: u16_of(offset_of!(Config, routes_by_source)),
            remember_peer: u16_of(peer),
            host_sockets_only: bytes[offset_of!(Config, host_sockets_only)],
            some_opted_out: bytes[offset_of!(Config, some_opted_out)],
            mask_ports_first: u32_of(offset_of!(Config, mask_ports_first)),
            mask_ports_count: u32_of(offset_of!(Config, mask_ports_count)),
            reserved_ports_first: u32_of(offset_of!(Config, reserved_ports_first)),
            reserved_ports_count: u32_of(offset_of!(Config, reserved_ports_count)),
            node_addresses: u64_of(offset_of!(Config, node_addresses)),
            udp_node_ports_first: u16_of(offset_of!(Config, udp_node_ports_first)),
            udp_node_ports_last: u16_of(offset_of!(Config, udp_node_ports_last)),
            _pad: 0,
            service_cidrs: cidrs(offset_of!(Config, service_cidrs)),
            cluster_cidrs: cidrs(offset_of!(Config, cluster_cidrs)),
        })
    }
}
