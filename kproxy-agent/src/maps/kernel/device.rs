//! What the packet programs know of interfaces.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem::offset_of,
    os::fd::OwnedFd,
    path::Path,
};

use kproxy_common::{Behind, DeviceAddresses, DeviceKey, map_names};

use super::{
    MapError,
    flows::address_at,
    grace::Grace,
    read::{failed, for_each, u32_at},
    shape,
};
use crate::maps::sys::{self, Map};

/// The map `device`. There must be one writer.
#[derive(Debug)]
pub struct DeviceMap {
    map: Map,
    grace: Grace,
    /// Whether a program may still hold an element that was deleted, whose memory the next insertion would reuse.
    must_wait: bool,
}

impl DeviceMap {
    /// The one pinned below `root`.
    pub fn open(root: &Path) -> Result<Self, MapError> {
        let path = root.join(map_names::DEVICE);
        let map = Map::open(&path).map_err(|source| MapError::Open { path, source })?;
        Self::over(map)
    }

    /// The one with this descriptor.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, MapError> {
        let open = |source| MapError::Call { what: "open", map: map_names::DEVICE, source };
        Self::over(Map::from_fd(fd).map_err(open)?)
    }

    fn over(map: Map) -> Result<Self, MapError> {
        shape::check(map_names::DEVICE, &map.attributes())?;
        Ok(Self { map, grace: Grace::default(), must_wait: false })
    }

    /// What is known of this interface.
    pub fn get(&self, index: u32) -> Result<Option<DeviceAddresses>, MapError> {
        for copy in COPIES {
            let key = key_bytes(DeviceKey { interface: index, copy });
            let value = self.map.lookup(&key).map_err(failed(map_names::DEVICE))?;
            if let Some(addresses) = value.as_deref().and_then(value_from) {
                return Ok(Some(addresses));
            }
        }
        Ok(None)
    }

    /// Makes the map say this for each interface. A program finds the old or the new at any time: what changes is there
    /// twice until no program can have looked before it was. Of several writes that fail, the first is told, and all
    /// others are made.
    ///
    /// # Errors
    /// When the map cannot be read, an interface finds no room in it, or the kernel cannot be waited for.
    pub fn write(&mut self, wanted: &BTreeMap<u32, DeviceAddresses>) -> Result<(), MapError> {
        let mut present = BTreeMap::new();
        for_each(map_names::DEVICE, &self.map, |key, value| {
            present.extend(key_from(key).zip(value_from(value)));
        })?;
        let Steps { clear, insert, delete } = Steps::between(&present, wanted);
        let mut result = Ok(());
        self.delete(&clear, &mut result);
        if !insert.is_empty() {
            self.wait_if_needed()?;
        }
        // What could not be inserted keeps what it has.
        let mut failed = BTreeSet::new();
        for (key, value) in &insert {
            let inserted = self.map.update(&key_bytes(*key), &value_bytes(value), sys::BPF_NOEXIST);
            if let Err(source) = inserted {
                failed.insert(key.interface);
                note(&mut result, "insert into", source);
            }
        }
        let delete: Vec<_> = delete.into_iter().filter(|key| !failed.contains(&key.interface)).collect();
        if !insert.is_empty() && !delete.is_empty() {
            self.grace.wait(&mut 0).map_err(MapError::Grace)?;
        }
        self.delete(&delete, &mut result);
        result
    }

    fn delete(&mut self, keys: &[DeviceKey], result: &mut Result<(), MapError>) {
        for key in keys {
            self.must_wait = true;
            if let Err(source) = self.map.delete(&key_bytes(*key)) {
                note(result, "delete from", source);
            }
        }
    }

    fn wait_if_needed(&mut self) -> Result<(), MapError> {
        if std::mem::take(&mut self.must_wait) {
            self.grace.wait(&mut 0).map_err(MapError::Grace)?;
        }
        Ok(())
    }
}

/// In the order in which programs look.
const COPIES: [u32; 2] = [0, 1];

/// How a map becomes another one under its readers: these deletions, a grace period, these insertions, a grace period,
/// these deletions, and a grace period before the next.
#[derive(Debug)]
struct Steps {
    clear: Vec<DeviceKey>,
    insert: Vec<(DeviceKey, DeviceAddresses)>,
    delete: Vec<DeviceKey>,
}

impl Steps {
    fn between(
        present: &BTreeMap<DeviceKey, DeviceAddresses>,
        wanted: &BTreeMap<u32, DeviceAddresses>,
    ) -> Self {
        let mut steps = Self { clear: Vec::new(), insert: Vec::new(), delete: Vec::new() };
        let interfaces: BTreeSet<u32> =
            present.keys().map(|key| key.interface).chain(wanted.keys().copied()).collect();
        for interface in interfaces {
            let key = |copy| DeviceKey { interface, copy };
            let (first, second) = (present.get(&key(0)), present.get(&key(1)));
            let Some(wanted) = wanted.get(&interface) else {
                steps.delete.extend(first.map(|_| key(0)));
                steps.delete.extend(second.map(|_| key(1)));
                continue;
            };
            match (first, second) {
                (Some(first), _) if first == wanted => steps.delete.extend(second.map(|_| key(1))),
                (Some(_), Some(second)) if second == wanted => steps.delete.push(key(0)),
                (None, Some(second)) if second == wanted => {}
                (Some(_), second) => {
                    // An agent that died between two steps has left both; the first is in force.
                    steps.clear.extend(second.map(|_| key(1)));
                    steps.insert.push((key(1), *wanted));
                    steps.delete.push(key(0));
                }
                (None, second) => {
                    steps.insert.push((key(0), *wanted));
                    steps.delete.extend(second.map(|_| key(1)));
                }
            }
        }
        steps
    }
}

fn note(result: &mut Result<(), MapError>, what: &'static str, source: std::io::Error) {
    if result.is_ok() {
        *result = Err(MapError::Call { what, map: map_names::DEVICE, source });
    }
}

fn key_bytes(key: DeviceKey) -> [u8; size_of::<DeviceKey>()] {
    let mut bytes = [0; size_of::<DeviceKey>()];
    bytes[offset_of!(DeviceKey, interface)..][..4].copy_from_slice(&key.interface.to_ne_bytes());
    bytes[offset_of!(DeviceKey, copy)..][..4].copy_from_slice(&key.copy.to_ne_bytes());
    bytes
}

fn key_from(bytes: &[u8]) -> Option<DeviceKey> {
    Some(DeviceKey {
        interface: u32_at(bytes, offset_of!(DeviceKey, interface))?,
        copy: u32_at(bytes, offset_of!(DeviceKey, copy))?,
    })
}

fn value_bytes(value: &DeviceAddresses) -> [u8; size_of::<DeviceAddresses>()] {
    let DeviceAddresses { v4, v6, bridged_v4, bridged_v6, behind, _pad } = value;
    let mut bytes = [0; size_of::<DeviceAddresses>()];
    bytes[offset_of!(DeviceAddresses, v4)..][..16].copy_from_slice(&v4.octets());
    bytes[offset_of!(DeviceAddresses, v6)..][..16].copy_from_slice(&v6.octets());
    bytes[offset_of!(DeviceAddresses, bridged_v4)..][..4].copy_from_slice(&bridged_v4.to_ne_bytes());
    bytes[offset_of!(DeviceAddresses, bridged_v6)..][..4].copy_from_slice(&bridged_v6.to_ne_bytes());
    bytes[offset_of!(DeviceAddresses, behind)] = *behind as u8;
    bytes
}

fn value_from(bytes: &[u8]) -> Option<DeviceAddresses> {
    Some(DeviceAddresses {
        v4: address_at(bytes, offset_of!(DeviceAddresses, v4))?,
        v6: address_at(bytes, offset_of!(DeviceAddresses, v6))?,
        bridged_v4: u32_at(bytes, offset_of!(DeviceAddresses, bridged_v4))?,
        bridged_v6: u32_at(bytes, offset_of!(DeviceAddresses, bridged_v6))?,
        behind: Behind::try_from(*bytes.get(offset_of!(DeviceAddresses, behind))?).ok()?,
        _pad: [0; 3],
    })
}

#[cfg(test)]
mod tests {
    use kproxy_common::Address;

    use super::*;

    fn value(number: u32) -> DeviceAddresses {
        let v4 = Address::from_v4_word(number);
        DeviceAddresses {
            v4,
            v6: Address::UNSPECIFIED,
            bridged_v4: 0,
            bridged_v6: number & 1,
            behind: if number & 2 == 0 { Behind::Outside } else { Behind::Pods },
            _pad: [0; 3],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let key = DeviceKey { interface: 7, copy: 1 };
        assert_eq!(key_from(&key_bytes(key)), Some(key));
        assert_eq!(value_from(&value_bytes(&value(5))), Some(value(5)));
    }

    #[derive(Clone, Copy)]
    enum Step {
        Delete(u32),
        Insert(u32, DeviceAddresses),
        Wait,
    }

    /// The steps for one interface, as [`DeviceMap::write`] makes them.
    fn steps(present: [Option<u32>; 2], wanted: u32) -> Vec<Step> {
        let key = |copy| DeviceKey { interface: 1, copy };
        let present =
            COPIES.into_iter().filter_map(|copy| Some((key(copy), value(present[copy as usize]?)))).collect();
        let Steps { clear, insert, delete } = Steps::between(&present, &[(1, value(wanted))].into());
        let mut steps: Vec<Step> = clear.iter().map(|key| Step::Delete(key.copy)).collect();
        steps.push(Step::Wait);
        steps.extend(insert.iter().map(|(key, value)| Step::Insert(key.copy, *value)));
        if !insert.is_empty() {
            steps.push(Step::Wait);
        }
        steps.extend(delete.iter().map(|key| Step::Delete(key.copy)));
        steps
    }

    /// A program that looks for the first copy before any step, and for the second before the same or any later one
    /// until which no grace period has passed, finds one, and the last state is what is wanted. From every state that
    /// an agent can have left.
    #[test]
    fn a_program_finds_an_interface_at_any_time() {
        let states = [None, Some(1), Some(2), Some(3)];
        for present in states.iter().flat_map(|a| states.map(|b| [*a, b])) {
            let steps = steps(present, 2);
            // The map before each step and after the last.
            let mut maps = vec![present.map(|number| number.map(value))];
            for step in &steps {
                let mut map = maps[maps.len() - 1];
                match *step {
                    Step::Delete(copy) => assert!(map[copy as usize].take().is_some()),
                    Step::Insert(copy, value) => {
                        assert!(map[copy as usize].replace(value).is_none(), "{present:?}: replaced");
                    }
                    Step::Wait => {}
                }
                maps.push(map);
            }
            let found = |first: usize, second: usize| maps[first][0].or(maps[second][1]);
            assert_eq!(found(steps.len(), steps.len()), Some(value(2)), "{present:?}");
            assert_eq!(maps[steps.len()].iter().flatten().count(), 1, "{present:?}");
            let Some(before) = found(0, 0) else { continue };
            for first in 0..maps.len() {
                for second in first..maps.len() {
                    if steps[first..second].iter().any(|step| matches!(step, Step::Wait)) {
                        break;
                    }
                    let found = found(first, second);
                    assert!(
                        found == Some(before) || found == Some(value(2)),
                        "{present:?}: looked before steps {first} and {second}: {found:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn an_interface_that_is_gone_is_taken_out() {
        let Some(mut map) = create() else { return };
        let both = [(1, value(1)), (2, value(2))].into();
        map.write(&both).unwrap();
        map.write(&[(2, value(3))].into()).unwrap();
        let mut keys = Vec::new();
        for_each(map_names::DEVICE, &map.map, |key, value| {
            keys.extend(key_from(key).zip(value_from(value)));
        })
        .unwrap();
        assert_eq!(keys, [(DeviceKey { interface: 2, copy: 1 }, value(3))]);
        let is_bridged = |index| map.get(index).unwrap().map(|known| known.bridged_v6 != 0);
        assert_eq!((is_bridged(2), is_bridged(1)), (Some(true), None));
    }

    /// A map of its own; none, with the reason printed, where the test may not make any.
    fn create() -> Option<DeviceMap> {
        let capacity = crate::plan::Capacity { frontends: 4, backends: 4, addresses: 4, source_ranges: 4 };
        let attributes = shape::with_capacity(map_names::DEVICE, &capacity);
        match Map::create(sys::MapAttributes { max_entries: 4, ..attributes }) {
            Ok(map) => Some(DeviceMap::over(map).unwrap()),
            Err(error) => {
                println!("skipped: making maps needs CAP_BPF: {error}");
                None
            }
        }
    }
}
