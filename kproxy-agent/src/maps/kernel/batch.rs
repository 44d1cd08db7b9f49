//! Many elements with one system call, where the kernel can (5.6); one by one where not.

use std::io;

use super::WriteError;
use crate::maps::sys::{self, Map, MapAttributes, kind};

/// How many elements one call writes. The kernel does not limit it; memory for keys and values is ours.
const CHUNK: usize = 16_384;
/// How often an element is tried again whose bucket is locked just now.
const BUSY_RETRIES: usize = 3;

/// What is known about the kernel's batches, and how many calls were made.
#[derive(Debug, Default)]
pub(super) struct Batches {
    support: Support,
    pub calls: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Support {
    #[default]
    Unknown,
    Yes,
    No,
}

#[derive(Clone, Copy)]
enum Command<'a> {
    /// Elements that are not there.
    Insert(&'a [u8]),
    /// Elements of an array.
    Replace(&'a [u8]),
    Delete,
}

impl Batches {
    /// As on a kernel without batches.
    #[cfg(test)]
    pub fn without_support() -> Self {
        Self { support: Support::No, calls: 0 }
    }

    /// Inserts elements that are not there. `keys` and `values` lie one after the other.
    pub fn insert(
        &mut self,
        name: &'static str,
        map: &Map,
        keys: &[u8],
        values: &[u8],
    ) -> Vec<Result<(), WriteError>> {
        self.run(name, map, keys, Command::Insert(values))
    }

    /// Writes elements of an array.
    pub fn replace(
        &mut self,
        name: &'static str,
        map: &Map,
        keys: &[u8],
        values: &[u8],
    ) -> Vec<Result<(), WriteError>> {
        self.run(name, map, keys, Command::Replace(values))
    }

    /// Deletes elements; one that is not there is no error.
    pub fn delete(&mut self, name: &'static str, map: &Map, keys: &[u8]) -> Vec<Result<(), WriteError>> {
        self.run(name, map, keys, Command::Delete)
    }

    /// A batch stops at the first element that fails. That one is tried by itself, for its own error, and the
    /// batch goes on after it.
    fn run(
        &mut self,
        name: &'static str,
        map: &Map,
        keys: &[u8],
        command: Command<'_>,
    ) -> Vec<Result<(), WriteError>> {
        let (key_size, value_size) = (map.attributes().key_size as usize, map.value_bytes());
        let count = keys.len() / key_size;
        let keys = |from: usize, to: usize| &keys[from * key_size..to * key_size];
        let mut results = Vec::with_capacity(count);
        while results.len() < count {
            let (from, to) = (results.len(), count.min(results.len() + CHUNK));
            if to - from > 1 && self.support != Support::No {
                self.calls += 1;
                let length = (to - from) as u32;
                let (done, result) = match command {
                    Command::Insert(all) | Command::Replace(all) => {
                        map.update_batch(keys(from, to), &all[from * value_size..to * value_size], length)
                    }
                    Command::Delete => map.delete_batch(keys(from, to), length),
                };
                results.extend((0..done).map(|_| Ok(())));
                match result {
                    Ok(()) => {
                        self.support = Support::Yes;
                        continue;
                    }
                    Err(error)
                        if done == 0 && self.support == Support::Unknown && sys::lacks_batches(&error) =>
                    {
                        self.support = Support::No;
                    }
                    Err(_) => {}
                }
            }
            let at = results.len();
            let result = self.single(map, keys(at, at + 1), at * value_size..(at + 1) * value_size, command);
            results.push(result.map_err(|error| WriteError { map: name, what: explain(&error) }));
        }
        results
    }

    fn single(
        &mut self,
        map: &Map,
        key: &[u8],
        value: std::ops::Range<usize>,
        command: Command<'_>,
    ) -> io::Result<()> {
        let mut tries = 0;
        loop {
            self.calls += 1;
            let result = match command {
                Command::Insert(values) => map.update(key, &values[value.clone()], sys::BPF_NOEXIST),
                Command::Replace(values) => map.update(key, &values[value.clone()], sys::BPF_ANY),
                Command::Delete => map.delete(key),
            };
            match result.as_ref().map_err(io::Error::raw_os_error) {
                Err(Some(libc::ENOENT)) if matches!(command, Command::Delete) => return Ok(()),
                Err(Some(libc::EBUSY | libc::EAGAIN)) if tries < BUSY_RETRIES => tries += 1,
                _ => return result,
            }
        }
    }
}

fn explain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::E2BIG | libc::ENOSPC) => format!("it is full ({error})"),
        Some(libc::EEXIST) => {
            format!("the key is there already ({error}): something else than this agent writes the map")
        }
        _ => error.to_string(),
    }
}

/// Whether this kernel writes maps in batches. Makes a small map to try it.
pub fn probe_batches() -> io::Result<bool> {
    let attributes = MapAttributes {
        kind: kind::HASH,
        key_size: 4,
        value_size: 4,
        max_entries: 2,
        ..MapAttributes::default()
    };
    let map = Map::create(attributes)?;
    let (_, result) = map.update_batch(&[1; 4], &[1; 4], 1);
    match result {
        Ok(()) => Ok(true),
        Err(error) if sys::lacks_batches(&error) => Ok(false),
        Err(error) => Err(error),
    }
}
