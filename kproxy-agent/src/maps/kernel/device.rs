//! What the packet programs know of interfaces, read.

use std::{mem::offset_of, path::Path};

use kproxy_common::{DeviceAddresses, map_names};

use super::{
    MapError,
    read::{failed, u32_at},
};
use crate::maps::sys::Map;

/// The map `device`.
#[derive(Debug)]
pub struct DeviceMap(Map);

impl DeviceMap {
    /// The one pinned below `root`.
    pub fn open(root: &Path) -> Result<Self, MapError> {
        let map = Map::open(&root.join(map_names::DEVICE));
        let map = map.map_err(|source| MapError::Call { what: "open", map: map_names::DEVICE, source })?;
        Ok(Self(map))
    }

    /// Whether clients behind this interface share a bridge with pods of this node whose frames pass netfilter by, in
    /// IPv4 or in IPv6; an interface that is not there does not.
    pub fn shares_bridge(&self, index: u32, is_v4: bool) -> Result<bool, MapError> {
        let value = self.0.lookup(&index.to_ne_bytes()).map_err(failed(map_names::DEVICE))?;
        let at = match is_v4 {
            true => offset_of!(DeviceAddresses, bridged_v4),
            false => offset_of!(DeviceAddresses, bridged_v6),
        };
        Ok(value.and_then(|bytes| u32_at(&bytes, at)).is_some_and(|bridged| bridged != 0))
    }
}
