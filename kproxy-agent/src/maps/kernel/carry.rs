//! From a table that programs write into a successor of another size: flows and affinity outlive the change.
//!
//! The programs that run write the old table, those that are about to be attached the new one. So it is copied twice:
//! all of it before the programs are exchanged, and what happened meanwhile after. A connection that is being made at that
//! moment can meet one table at one hook and the other at the next: that one fails; those that are open do not notice.

use std::{io, mem::offset_of, path::Path};

use kproxy_common::{AffinityValue, Flow, map_names};

use super::{
    MapError,
    batch::Batches,
    read::{for_each, u64_at},
};
use crate::maps::sys::{self, Map};

/// How many elements are written at once.
const CHUNK: usize = 4_096;

/// A table and its successor.
#[derive(Debug)]
pub struct Carry {
    name: &'static str,
    old: Map,
    new: Map,
    /// Where in a value it stands when it was last used, in nanoseconds since boot.
    last_used: usize,
}

impl Carry {
    /// The maps that are carried over, if their capacity changes.
    pub const TABLES: [&'static str; 3] = [map_names::FLOW, map_names::FLOW_TRANSIENT, map_names::AFFINITY];

    /// From the map pinned at `old` to the one pinned at `new`, of the same layout.
    pub fn open(name: &'static str, old: &Path, new: &Path) -> Result<Self, MapError> {
        let open =
            |path: &Path| Map::open(path).map_err(|source| MapError::Open { path: path.to_owned(), source });
        let last_used = match name {
            map_names::AFFINITY => offset_of!(AffinityValue, last_used),
            _ => offset_of!(Flow, last_seen),
        };
        Self::over(name, open(old)?, open(new)?, last_used)
    }

    fn over(name: &'static str, old: Map, new: Map, last_used: usize) -> Result<Self, MapError> {
        let sizes = |map: &Map| (map.attributes().key_size, map.attributes().value_size);
        if sizes(&old) != sizes(&new) {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "its successor has another layout");
            return Err(MapError::Call { what: "copy", map: name, source });
        }
        Ok(Self { name, old, new, last_used })
    }

    /// Copies everything. No program uses the new table yet. Where that is smaller, it keeps what fits.
    pub fn copy(&self) -> Result<usize, MapError> {
        let (mut keys, mut values, mut copied) = (Vec::new(), Vec::new(), 0);
        let mut batches = Batches::default();
        let key_size = self.old.attributes().key_size as usize;
        let mut write = |keys: &mut Vec<u8>, values: &mut Vec<u8>| {
            let results = batches.insert(self.name, &self.new, keys, values);
            copied += results.iter().filter(|result| result.is_ok()).count();
            keys.clear();
            values.clear();
        };
        for_each(self.name, &self.old, |key, value| {
            keys.extend_from_slice(key);
            values.extend_from_slice(value);
            if keys.len() >= CHUNK * key_size {
                write(&mut keys, &mut values);
            }
        })?;
        write(&mut keys, &mut values);
        Ok(copied)
    }

    /// The programs are exchanged, which began at `since`: takes over what the old ones changed after the copy. What
    /// they took out is taken out; what the new ones entered stays. May be done again.
    pub fn finish(&self, since: u64) -> Result<(), MapError> {
        let mut stale = Vec::new();
        for_each(self.name, &self.new, |key, value| {
            let is_from_before = u64_at(value, self.last_used).is_some_and(|used| used < since);
            if is_from_before && self.old.lookup(key).is_ok_and(|found| found.is_none()) {
                stale.push(key.to_vec());
            }
        })?;
        for key in &stale {
            // Gone already is as good.
            let _ = self.new.delete(key);
        }
        for_each(self.name, &self.old, |key, value| {
            let Ok(present) = self.new.lookup(key) else { return };
            let is_later = present
                .is_none_or(|present| u64_at(value, self.last_used) > u64_at(&present, self.last_used));
            if is_later {
                // Without room the oldest goes, as when a program enters it.
                let _ = self.new.update(key, value, sys::BPF_ANY);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps::sys::{MapAttributes, kind};

    /// Maps from a number to a time; none where the test may not make any.
    fn carry(old: u32, new: u32) -> Option<Carry> {
        let make = |max_entries| {
            Map::create(MapAttributes {
                kind: kind::LRU_HASH,
                key_size: 4,
                value_size: 8,
                max_entries,
                ..Default::default()
            })
        };
        match (make(old), make(new)) {
            (Ok(old), Ok(new)) => Some(Carry::over("flow", old, new, 0).unwrap()),
            (Err(error), _) | (_, Err(error)) => {
                println!("skipped: making maps needs CAP_BPF: {error}");
                None
            }
        }
    }

    fn put(map: &Map, key: u32, time: u64) {
        map.update(&key.to_ne_bytes(), &time.to_ne_bytes(), sys::BPF_ANY).unwrap();
    }

    fn get(map: &Map, key: u32) -> Option<u64> {
        u64_at(&map.lookup(&key.to_ne_bytes()).unwrap()?, 0)
    }

    #[test]
    fn everything_is_copied_and_what_happens_meanwhile_is_taken_over() {
        let Some(carry) = carry(32_768, 65_536) else { return };
        for key in 0..10_000 {
            put(&carry.old, key, 100);
        }
        assert_eq!(carry.copy().unwrap(), 10_000);
        assert_eq!(get(&carry.new, 9_999), Some(100));
        // Until the exchange the old programs go on: one is new, one is used again, one is gone.
        put(&carry.old, 20_000, 150);
        put(&carry.old, 1, 160);
        carry.old.delete(&2_u32.to_ne_bytes()).unwrap();
        // After it, at 200, the new ones enter and use.
        put(&carry.new, 30_000, 210);
        put(&carry.new, 3, 220);
        carry.finish(200).unwrap();
        let now = |key| get(&carry.new, key);
        assert_eq!([now(0), now(20_000), now(1), now(2)], [Some(100), Some(150), Some(160), None]);
        assert_eq!([now(30_000), now(3)], [Some(210), Some(220)]);
    }

    #[test]
    fn a_smaller_table_keeps_what_fits() {
        let Some(carry) = carry(4_096, 512) else { return };
        for key in 0..3_000 {
            put(&carry.old, key, 100);
        }
        carry.copy().unwrap();
        let kept = (0..3_000).filter(|key| get(&carry.new, *key).is_some()).count();
        assert!((128..=512).contains(&kept), "{kept} of 3,000 in 512");
    }
}
