//! Waiting until no program holds anything that it read before: an RCU grace period.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use crate::maps::sys::{self, Map, MapAttributes, kind};

/// How this kernel is made to wait.
#[derive(Debug, Default)]
pub(in crate::maps) struct Grace {
    /// An array of maps and a map to put into it: after such an update the kernel always waits. For kernels
    /// with nohz_full and machines with one CPU, where membarrier(2) does not.
    maps: Option<(Map, Map)>,
}

impl Grace {
    /// Returns after a grace period that began after the call. Adds to `calls` what bpf(2) was called.
    pub fn wait(&mut self, calls: &mut u64) -> io::Result<()> {
        match sys::membarrier_global() {
            Ok(()) => return Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EPERM)) => {
            }
            Err(error) => return Err(error),
        }
        self.wait_by_update(calls)
    }

    fn wait_by_update(&mut self, calls: &mut u64) -> io::Result<()> {
        let (outer, inner) = match self.maps.take() {
            Some(maps) => maps,
            None => {
                *calls += 2;
                make_maps()?
            }
        };
        *calls += 1;
        let result = outer.update(&0_u32.to_ne_bytes(), &inner_fd(&inner).to_ne_bytes(), sys::BPF_ANY);
        self.maps = Some((outer, inner));
        result
    }
}

fn make_maps() -> io::Result<(Map, Map)> {
    let array = MapAttributes {
        kind: kind::ARRAY,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
        ..MapAttributes::default()
    };
    let inner = Map::create(array)?;
    let outer = MapAttributes { kind: kind::ARRAY_OF_MAPS, inner_map_fd: inner_fd(&inner), ..array };
    Ok((Map::create(outer)?, inner))
}

fn inner_fd(map: &Map) -> u32 {
    map.as_fd().as_raw_fd() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_wait() {
        let mut grace = Grace::default();
        let mut calls = 0;
        match grace.wait_by_update(&mut calls) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                println!("skipped: making maps needs CAP_BPF: {error}");
                return;
            }
            result => result.unwrap(),
        }
        assert_eq!(calls, 3, "two maps and an update");
        grace.wait_by_update(&mut calls).unwrap();
        assert_eq!(calls, 4, "the maps are kept");
        grace.wait(&mut calls).unwrap();
    }
}
