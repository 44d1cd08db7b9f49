//! The pins of the maps: which of those that are there are adopted, and how new ones take the place of the others.
//!
//! Maps that do not fit (another layout, another capacity) stay pinned, and with them what the running programs
//! do, until their successors are filled and the programs exchanged: till then those are pinned below `next/`.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use aya::maps::MapData;
use kproxy_common::{LAYOUT_VERSION, map_names as names};

use super::load::{Capacities, LoadError};
use crate::maps::kernel::{Carry, layout_version};

/// Below the bpffs folder: successors that are not in force yet.
pub const NEXT: &str = "next";

/// What the agent writes about Services: numbers and slots of one lead into the others, so that they are adopted
/// together or not at all.
const TABLES: [&str; 8] = [
    names::FRONTEND,
    names::SERVICE,
    names::SERVICE_INFO,
    names::BACKEND,
    names::BACKEND_SLOT,
    names::ADDRESS,
    names::SOURCE_RANGE,
    names::COUNTER,
];

/// Where each map is pinned.
#[derive(Debug)]
pub struct Pins {
    root: PathBuf,
    /// Those whose successors are below [`NEXT`].
    replaced: BTreeSet<&'static str>,
}

impl Pins {
    /// Decides what of the pins below `root` is adopted.
    pub fn choose(root: &Path, capacities: &Capacities) -> Result<Self, LoadError> {
        // Of an agent that died before they were in force.
        remove_next(root)?;
        let replaced = replaced(root, capacities);
        if !replaced.is_empty() {
            let next = root.join(NEXT);
            fs::create_dir_all(&next).map_err(|source| LoadError::Io {
                what: "make the folder",
                path: next,
                source,
            })?;
        }
        Ok(Self { root: root.to_owned(), replaced })
    }

    /// Where the map is pinned that the new programs use.
    pub fn path(&self, name: &str) -> PathBuf {
        if self.replaced.contains(name) {
            return self.root.join(NEXT).join(name);
        }
        self.root.join(name)
    }

    /// Whether the tables of Services begin anew.
    pub fn replace_tables(&self) -> bool {
        TABLES.iter().any(|name| self.replaced.contains(name))
    }

    /// Tables that programs write and whose successors have the same layout: name, old pin, new pin.
    pub fn carried(&self) -> Vec<(&'static str, PathBuf, PathBuf)> {
        if layout_version(&self.root).is_some_and(|version| version != LAYOUT_VERSION) {
            return Vec::new();
        }
        let is_same = |name: &str| {
            let info = MapData::from_pin(self.root.join(name)).ok()?.info().ok()?;
            Some(shape(name)? == (info.key_size(), info.value_size()))
        };
        let carried = Carry::TABLES.into_iter().filter(|name| self.replaced.contains(name));
        carried
            .filter(|name| is_same(name) == Some(true))
            .map(|name| (name, self.root.join(name), self.path(name)))
            .collect()
    }

    /// The new programs are in force: their maps take the places of the old ones.
    pub fn take_place(&mut self) -> Result<(), LoadError> {
        for name in &self.replaced {
            let from = self.root.join(NEXT).join(name);
            fs::rename(&from, self.root.join(name)).map_err(|source| LoadError::Io {
                what: "put into its place",
                path: from,
                source,
            })?;
        }
        self.replaced.clear();
        remove_next(&self.root)
    }
}

/// Takes away what is below [`NEXT`], and the folder.
pub fn remove_next(root: &Path) -> Result<(), LoadError> {
    let next = root.join(NEXT);
    match fs::remove_dir_all(&next) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(LoadError::Io { what: "remove the folder", path: next, source })
        }
        _ => Ok(()),
    }
}

fn replaced(root: &Path, capacities: &Capacities) -> BTreeSet<&'static str> {
    let fits = |name: &'static str| {
        let map = MapData::from_pin(root.join(name)).ok()?;
        let unfit = map.info().map_or_else(
            |error| Some(format!("it cannot be looked at: {error}")),
            |info| {
                let sizes = (info.key_size(), info.value_size());
                if shape(name).is_some_and(|expected| expected != sizes) {
                    return Some("it has another layout".to_owned());
                }
                let (found, wanted) = (info.max_entries(), capacities.of(name)?);
                (found != wanted).then(|| format!("it holds {found} elements, and {wanted} are wanted"))
            },
        );
        Some((name, unfit))
    };
    let found: Vec<_> = super::pinned_maps().iter().filter_map(|name| fits(name)).collect();
    let is_found = |name: &str| found.iter().any(|(other, _)| *other == name);
    if found.is_empty() {
        return BTreeSet::new();
    }
    let version = layout_version(root);
    if version.is_some_and(|version| version != LAYOUT_VERSION) {
        tracing::warn!(
            "the pinned maps are laid out for version {}, and this is version {LAYOUT_VERSION}: new ones are filled \
             beside them and take their place; flows and affinity begin anew",
            version.unwrap_or(0)
        );
        return super::pinned_maps().iter().copied().collect();
    }
    let mut replaced = BTreeSet::new();
    for (name, unfit) in &found {
        if let Some(why) = unfit {
            tracing::warn!(map = name, "the pinned map is not adopted: {why}; a new one takes its place");
            replaced.insert(*name);
        }
    }
    let are_torn = TABLES.iter().any(|name| is_found(name)) && !TABLES.iter().all(|name| is_found(name));
    if are_torn {
        tracing::warn!("some of the pinned tables are missing: all of them are filled anew");
    }
    if are_torn || TABLES.iter().any(|name| replaced.contains(name)) {
        replaced.extend(TABLES);
    }
    replaced
}

/// Key and value sizes in octets, as this version lays them out.
fn shape(map: &str) -> Option<(u32, u32)> {
    use kproxy_common::{
        Address, AddressEntry, AffinityKey, AffinityValue, Backend, BackendSlots, Config, Counters,
        DeviceAddresses, DeviceKey, DropBudget, DropListener, Flow, FlowKey, FragmentKey, FragmentPorts,
        FrontendKey, OptedOut, Owner, ServiceEntry, ServiceInfo, SocketRecords, SourceRangeKey,
    };
    let sizes = match map {
        names::FRONTEND => (size_of::<FrontendKey>(), 4),
        names::SERVICE => (4, size_of::<ServiceEntry>()),
        names::SERVICE_INFO => (4, size_of::<ServiceInfo>()),
        names::BACKEND => (4, size_of::<Backend>()),
        names::BACKEND_SLOT => (4, size_of::<BackendSlots>()),
        names::ADDRESS => (size_of::<Address>(), size_of::<AddressEntry>()),
        names::SOURCE_RANGE => (size_of::<SourceRangeKey>(), 4),
        names::AFFINITY => (size_of::<AffinityKey>(), size_of::<AffinityValue>()),
        names::FLOW | names::FLOW_TRANSIENT => (size_of::<FlowKey>(), size_of::<Flow>()),
        names::CLAIM => (size_of::<FlowKey>(), 4),
        names::FRAGMENT => (size_of::<FragmentKey>(), size_of::<FragmentPorts>()),
        names::SOCKET => (4, size_of::<SocketRecords>()),
        names::COUNTER => (4, size_of::<Counters>()),
        names::REASON => (4, 8),
        names::DROP_EVENT => (0, 0),
        names::DROP_LISTENER => (4, size_of::<DropListener>()),
        names::DROP_BUDGET => (4, size_of::<DropBudget>()),
        names::CONFIG => (4, size_of::<Config>()),
        names::DEVICE => (size_of::<DeviceKey>(), size_of::<DeviceAddresses>()),
        names::MASQUERADED => (4, 8),
        names::OPTED_OUT => (8, size_of::<OptedOut>()),
        names::OWNER => (4, size_of::<Owner>()),
        _ => return None,
    };
    Some((sizes.0 as u32, sizes.1 as u32))
}
