//! The maps of a loaded object, for the agent's own code, which takes descriptors.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use aya::{Ebpf, maps::Map};

/// A descriptor of the map with this name.
pub fn fd_of(object: &Ebpf, name: &str) -> io::Result<OwnedFd> {
    let data = match object.map(name) {
        Some(
            Map::Array(data)
            | Map::HashMap(data)
            | Map::LruHashMap(data)
            | Map::LpmTrie(data)
            | Map::PerCpuArray(data),
        ) => data,
        Some(other) => panic!("a map of an unexpected kind: {other:?}"),
        None => return Err(io::Error::other(format!("no map {name}"))),
    };
    data.fd().as_fd().try_clone_to_owned()
}
