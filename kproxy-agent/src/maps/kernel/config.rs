//! Writing `config`, so that no program reads half of a change.

use std::mem::offset_of;

use kproxy_common::{Address, Cidr, Config, MAX_CIDRS, map_names};

use super::{KernelMaps, MapError};
use crate::maps::MapWriter as _;

// Numbers that share a word are stored with it.
const _: () = {
    assert!(offset_of!(Config, remember_peer) == offset_of!(Config, loopback_node_ports) + 4);
    assert!(offset_of!(Config, host_sockets_only) == offset_of!(Config, remember_peer) + 2);
    assert!(offset_of!(Config, some_opted_out) == offset_of!(Config, remember_peer) + 3);
    assert!(offset_of!(Config, mask_ports_count) == offset_of!(Config, mask_ports_first) + 4);
    assert!(offset_of!(Config, reserved_ports_count) == offset_of!(Config, reserved_ports_first) + 4);
    assert!(offset_of!(Config, reserved_ports_first).is_multiple_of(8));
    assert!(offset_of!(Config, udp_node_ports_last) == offset_of!(Config, udp_node_ports_first) + 2);
    assert!(offset_of!(Config, _pad) == offset_of!(Config, udp_node_ports_first) + 4);
    assert!(offset_of!(Config, udp_node_ports_first).is_multiple_of(8));
    assert!(offset_of!(Config, loopback_node_ports).is_multiple_of(8));
    assert!(offset_of!(Config, routes_by_source) == offset_of!(Config, loopback_node_ports) + 2);
    assert!(offset_of!(Config, mask_ports_first).is_multiple_of(8));
};

/// Bytes of a [`Cidr`]: the address, then the length.
const CIDR: usize = size_of::<Cidr>();
const LENGTH: usize = size_of::<Address>();

impl KernelMaps {
    /// Brings `config` to `wanted`; writes nothing where it is that already.
    ///
    /// Numbers change by one store each. A prefix is taken out of use by one store of its length, rewritten
    /// after a grace period, and put into use by one store of its length. Programs stop at the first unused
    /// place: those behind one that changes do not count for the length of a grace period, so what is appended
    /// or cut off at the end is seamless and the rest should not move.
    pub fn write_config(&mut self, wanted: &Config) -> Result<(), MapError> {
        let Config {
            host_netns_cookie,
            udp_timeout,
            hash_seed,
            loopback_node_ports,
            routes_by_source,
            remember_peer,
            host_sockets_only,
            some_opted_out,
            mask_ports_first,
            mask_ports_count,
            reserved_ports_first,
            reserved_ports_count,
            node_addresses,
            udp_node_ports_first,
            udp_node_ports_last,
            _pad,
            service_cidrs,
            cluster_cidrs,
        } = wanted;
        self.number(offset_of!(Config, host_netns_cookie), *host_netns_cookie)?;
        self.number(offset_of!(Config, udp_timeout), *udp_timeout)?;
        self.number(offset_of!(Config, hash_seed), pair(hash_seed[0], hash_seed[1]))?;
        let [low, high] = remember_peer.to_ne_bytes();
        let sockets = u32::from_ne_bytes([low, high, *host_sockets_only, *some_opted_out]);
        self.number(
            offset_of!(Config, loopback_node_ports),
            pair(two(*loopback_node_ports, *routes_by_source), sockets),
        )?;
        self.number(offset_of!(Config, mask_ports_first), pair(*mask_ports_first, *mask_ports_count))?;
        let reserved = pair(*reserved_ports_first, *reserved_ports_count);
        self.number(offset_of!(Config, reserved_ports_first), reserved)?;
        self.number(offset_of!(Config, node_addresses), *node_addresses)?;
        let ([a, b], [c, d]) = (udp_node_ports_first.to_ne_bytes(), udp_node_ports_last.to_ne_bytes());
        let udp_node_ports = pair(u32::from_ne_bytes([a, b, c, d]), *_pad);
        self.number(offset_of!(Config, udp_node_ports_first), udp_node_ports)?;
        let lists = [
            (offset_of!(Config, service_cidrs), service_cidrs),
            (offset_of!(Config, cluster_cidrs), cluster_cidrs),
        ];
        let mut unpublished = false;
        for (list, cidrs) in lists {
            for (place, cidr) in places(list, cidrs) {
                unpublished |= self.unpublish(place, cidr)?;
            }
        }
        if unpublished {
            self.grace().map_err(|error| MapError::Grace(std::io::Error::other(error.what)))?;
        }
        for (list, cidrs) in lists {
            for (place, cidr) in places(list, cidrs) {
                self.publish(place, cidr)?;
            }
        }
        Ok(())
    }

    /// The key of the hash that picks backends for packets, as an earlier agent left it; zeroes if none did.
    pub fn hash_seed(&self) -> Result<[u32; 2], MapError> {
        let mut bytes = [0; 8];
        self.config.read(0, offset_of!(Config, hash_seed), &mut bytes).map_err(failed)?;
        let [a, b, c, d, e, f, g, h] = bytes;
        Ok([u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])])
    }

    fn number(&self, offset: usize, value: u64) -> Result<(), MapError> {
        if self.config.load_u64(0, offset / 8).map_err(failed)? == value {
            return Ok(());
        }
        self.config.store_u64(0, offset / 8, value).map_err(failed)
    }

    /// Takes a prefix out of use whose address must change. Says whether programs may have read it.
    fn unpublish(&self, place: usize, wanted: &Cidr) -> Result<bool, MapError> {
        let (address, length) = self.cidr(place)?;
        if length == Cidr::NONE.prefix_length() || (address == wanted.address() && !wanted.is_none()) {
            return Ok(false);
        }
        self.config.store_u32(0, place + LENGTH, Cidr::NONE.prefix_length()).map_err(failed)?;
        Ok(true)
    }

    fn publish(&self, place: usize, wanted: &Cidr) -> Result<(), MapError> {
        let (address, length) = self.cidr(place)?;
        if wanted.is_none() {
            return Ok(());
        }
        if address != wanted.address() {
            self.config.write(0, place, &wanted.address().octets()).map_err(failed)?;
        }
        if length != wanted.prefix_length() {
            self.config.store_u32(0, place + LENGTH, wanted.prefix_length()).map_err(failed)?;
        }
        Ok(())
    }

    fn cidr(&self, place: usize) -> Result<(Address, u32), MapError> {
        let mut bytes = [0; CIDR];
        self.config.read(0, place, &mut bytes).map_err(failed)?;
        let (mut octets, mut length) = ([0; LENGTH], [0; 4]);
        octets.copy_from_slice(&bytes[..LENGTH]);
        length.copy_from_slice(&bytes[LENGTH..]);
        Ok((Address::new(octets), u32::from_ne_bytes(length)))
    }
}

fn places(list: usize, cidrs: &[Cidr; MAX_CIDRS]) -> impl Iterator<Item = (usize, &Cidr)> {
    cidrs.iter().enumerate().map(move |(index, cidr)| (list + index * CIDR, cidr))
}

/// Two halves as they lie in the map's memory.
fn two(first: u16, second: u16) -> u32 {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// Two numbers that lie in one word.
fn pair(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

fn failed(source: std::io::Error) -> MapError {
    MapError::Call { what: "write", map: map_names::CONFIG, source }
}
