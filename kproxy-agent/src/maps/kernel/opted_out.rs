//! The network namespaces that the socket hooks leave alone.

use std::{collections::BTreeMap, io, mem::offset_of, path::Path};

use kproxy_common::{Address, OptedOut, map_names};

use super::{
    KernelMaps, MapError,
    flows::address_at,
    grace::Grace,
    read::{for_each, u64_at},
    shape,
};
use crate::maps::sys::{BPF_NOEXIST, Map};

const VALUE: usize = size_of::<OptedOut>();

/// `opted_out`, to be written. There must be one writer.
#[derive(Debug)]
pub struct OptedOutMap {
    map: Map,
    grace: Grace,
}

impl OptedOutMap {
    /// Opens the map that is pinned there.
    pub fn open(pin: &Path) -> Result<Self, MapError> {
        let map = Map::open(pin).map_err(|source| MapError::Open { path: pin.to_owned(), source })?;
        shape::check(map_names::OPTED_OUT, &map.attributes())?;
        Ok(Self { map, grace: Grace::default() })
    }

    /// Who is in it, by SO_NETNS_COOKIE.
    pub fn read(&self) -> Result<BTreeMap<u64, OptedOut>, MapError> {
        read(&self.map)
    }

    /// Takes these out, and waits until no program holds one of them.
    pub fn delete<'a>(&mut self, cookies: impl IntoIterator<Item = &'a u64>) -> Result<(), MapError> {
        let mut deleted = false;
        for cookie in cookies {
            match self.map.delete(&cookie.to_ne_bytes()) {
                Ok(()) => deleted = true,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    return Err(MapError::Call { what: "delete from", map: map_names::OPTED_OUT, source });
                }
            }
        }
        if deleted {
            self.grace.wait(&mut 0).map_err(MapError::Grace)?;
        }
        Ok(())
    }

    /// Puts one in that is not there yet.
    pub fn insert(&self, cookie: u64, value: &OptedOut) -> Result<(), MapError> {
        let inserted = self.map.update(&cookie.to_ne_bytes(), &to_bytes(value), BPF_NOEXIST);
        let explain = |error: io::Error| match error.raw_os_error() {
            Some(libc::E2BIG) => {
                io::Error::other(format!("it is full, of {} pods", self.map.attributes().max_entries))
            }
            _ => error,
        };
        inserted.map_err(|error| MapError::Call {
            what: "insert into",
            map: map_names::OPTED_OUT,
            source: explain(error),
        })
    }
}

impl KernelMaps {
    /// The cookie of the network namespace of the pod with this address, if it is opted out.
    pub fn opted_out_at(&self, address: &Address) -> Result<Option<u64>, MapError> {
        let Some(map) = &self.opted_out else { return Ok(None) };
        let all = read(map)?;
        Ok(all.iter().find(|(_, pod)| pod.v4 == *address || pod.v6 == *address).map(|(cookie, _)| *cookie))
    }
}

fn read(map: &Map) -> Result<BTreeMap<u64, OptedOut>, MapError> {
    let mut all = BTreeMap::new();
    for_each(map_names::OPTED_OUT, map, |key, value| all.extend(u64_at(key, 0).zip(from_bytes(value))))
        .map(|()| all)
}

fn to_bytes(value: &OptedOut) -> [u8; VALUE] {
    let OptedOut { v4, v6, since } = value;
    let mut bytes = [0; VALUE];
    bytes[offset_of!(OptedOut, v4)..][..16].copy_from_slice(&v4.octets());
    bytes[offset_of!(OptedOut, v6)..][..16].copy_from_slice(&v6.octets());
    bytes[offset_of!(OptedOut, since)..][..8].copy_from_slice(&since.to_ne_bytes());
    bytes
}

fn from_bytes(bytes: &[u8]) -> Option<OptedOut> {
    Some(OptedOut {
        v4: address_at(bytes, offset_of!(OptedOut, v4))?,
        v6: address_at(bytes, offset_of!(OptedOut, v6))?,
        since: u64_at(bytes, offset_of!(OptedOut, since))?,
    })
}
