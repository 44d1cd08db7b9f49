//! Loading: the embedded object, over the maps that are pinned already or are made now.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Map, ProgramArray},
    programs::{Program, ProgramError, ProgramFd},
};
use kproxy_common::{Address, Behind, DeviceAddresses, PACKET_PARTS, Reason, map_names as names};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{pins::Pins, refusal::Refusal};
use crate::{
    maps::kernel::{Carry, DeviceMap, MapError},
    pretend::{Feature, lacks},
};

/// The compiled programs: an ELF file, which `cargo xtask build` puts here.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/kproxy.bpf.o"));

/// How many entries the maps have room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacities {
    /// Frontends: addresses times ports of all Services.
    pub frontends: u32,
    /// Backend slots: twice the endpoints of all Services, since a change writes anew beside the old.
    pub backends: u32,
    /// Prefixes of loadBalancerSourceRanges, for each frontend by itself.
    pub source_ranges: u32,
    /// Flows of the packet path: two entries each once they are established, one while they are opened.
    pub flows: u32,
    /// Clients with session affinity: by Service port, and by which of its two endpoint sets.
    pub affinity: u32,
}

impl Capacities {
    /// What an agent takes that is told nothing.
    pub const DEFAULT: Self = Self {
        frontends: 32_768,
        backends: 262_144,
        source_ranges: 65_536,
        flows: 65_536,
        affinity: 131_072,
    };

    /// Enough to see whether a kernel accepts maps and programs.
    pub const SMALL: Self = Self { frontends: 16, backends: 16, source_ranges: 16, flows: 16, affinity: 16 };
}

impl Default for Capacities {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Capacities {
    /// The entries of a map, where they depend on the node, or are others in another version of the same layout.
    pub(super) fn of(&self, map: &str) -> Option<u32> {
        match map {
            names::FRONTEND | names::SERVICE | names::SERVICE_INFO | names::ADDRESS | names::COUNTER => {
                Some(self.frontends)
            }
            names::BACKEND | names::BACKEND_SLOT => Some(self.backends),
            names::SOURCE_RANGE => Some(self.source_ranges),
            names::FLOW => Some(self.flows.saturating_mul(2)),
            names::FLOW_TRANSIENT => Some(self.flows),
            names::AFFINITY => Some(self.affinity),
            names::REASON => Some(Reason::ALL.len() as u32),
            _ => None,
        }
    }
}

/// What the programs are compiled against and not every kernel has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// See [`has_set_retval`].
    pub set_retval: bool,
}

impl Features {
    /// Those of this kernel.
    pub fn probe() -> Self {
        Self { set_retval: has_set_retval() }
    }
}

/// The programs could not be loaded.
#[derive(thiserror::Error, Debug)]
pub enum LoadError {
    /// The folder for pins is not on a bpffs.
    #[error(
        "{path} is not on a bpf file system, where maps and programs outlive the agent: \
         mount one (mount -t bpf bpf /sys/fs/bpf) or name another folder with --bpf-root"
    )]
    NotBpffs {
        /// `--bpf-root`.
        path: PathBuf,
    },
    /// A file operation failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel refused the maps or the object.
    #[error("the kernel refused kproxy's maps: {0}; `kproxy check` says what this kernel lacks")]
    Maps(#[source] Box<aya::EbpfError>),
    /// The kernel refused a program.
    #[error("the kernel refused the program {name}: {refusal}; `kproxy check` says what this kernel lacks")]
    Program {
        /// The program.
        name: String,
        /// What it said.
        refusal: Box<Refusal>,
    },
}

impl LoadError {
    fn program(name: &str, error: ProgramError) -> Self {
        Self::Program { name: name.to_owned(), refusal: Box::new(error.into()) }
    }
}

/// What the program that lists connected sockets iterates over.
const SOCKET_ITERATOR: &str = "bpf_sk_storage_map";

/// What programs know of an interface.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct DeviceMask {
    /// The IPv4 address that clients are masked with.
    pub v4: Option<IpAddr>,
    /// The IPv6 address.
    pub v6: Option<IpAddr>,
    /// Whether IPv4 clients behind it share a bridge with this node's pods whose frames pass netfilter by.
    pub bridged_v4: bool,
    /// Whether IPv6 clients do.
    pub bridged_v6: bool,
    /// Whether pods of this node live behind it.
    pub leads_to_pods: bool,
}

impl From<DeviceMask> for DeviceAddresses {
    fn from(mask: DeviceMask) -> Self {
        let DeviceMask { v4, v6, bridged_v4, bridged_v6, leads_to_pods } = mask;
        Self {
            v4: v4.map_or(Address::UNSPECIFIED_V4, Address::from),
            v6: v6.map_or(Address::UNSPECIFIED, Address::from),
            bridged_v4: bridged_v4.into(),
            bridged_v6: bridged_v6.into(),
            behind: if leads_to_pods { Behind::Pods } else { Behind::Outside },
            _pad: [0; 3],
        }
    }
}

/// The loaded programs. They are attached by [`crate::programs::Attached`].
pub struct Programs {
    pub(super) ebpf: Ebpf,
    /// `None`: the maps are not pinned.
    pins: Option<Pins>,
    /// Opened when it is first written.
    devices: Option<DeviceMap>,
}

impl Programs {
    /// Opens the maps pinned below `root`, makes those that are missing, and loads every program over them.
    /// Beside maps of another shape (another version, other capacities) new ones are made: the programs that run
    /// keep the old ones until they are exchanged, which happens after the new ones are filled. Then call
    /// [`Programs::maps_take_place`].
    ///
    /// Packets that are sent on to a backend get the bits of `forward_mark`; 0: none.
    pub fn load(root: &Path, capacities: &Capacities, forward_mark: u32) -> Result<Self, LoadError> {
        check_bpf_root(root)?;
        let pins = Pins::choose(root, capacities)?;
        load(Some(pins), capacities, &Features::probe(), forward_mark)
    }

    /// Whether the tables of Services are others than those that are pinned.
    pub fn replace_tables(&self) -> bool {
        self.pins.as_ref().is_some_and(Pins::replace_tables)
    }

    /// These programs are attached: from now on their maps are found under the pins.
    pub fn maps_take_place(&mut self) -> Result<(), LoadError> {
        self.pins.as_mut().map_or(Ok(()), Pins::take_place)
    }

    /// Tables that programs write, whose capacity changes: what is in them is to be carried over.
    pub fn carries(&self) -> Result<Vec<Carry>, MapError> {
        let pins = self.pins.iter().flat_map(Pins::carried);
        pins.map(|(name, old, new)| Carry::open(name, &old, &new)).collect()
    }

    /// Where a map of these programs is pinned by now.
    pub fn pin(&self, map: &str) -> Option<PathBuf> {
        Some(self.pins.as_ref()?.path(map))
    }

    /// Loads every program over maps of its own, which go with it: to see whether this kernel accepts them.
    pub fn load_unpinned(capacities: &Capacities) -> Result<Self, LoadError> {
        load(None, capacities, &Features::probe(), 0)
    }

    /// The same, as on a kernel with these features: to see what the others are given.
    pub fn load_unpinned_for(capacities: &Capacities, features: &Features) -> Result<Self, LoadError> {
        load(None, capacities, features, 0)
    }

    /// The maps and programs themselves: for test runs and measurements.
    pub fn object(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Pins at `pin` the array by which packet programs go on in others. The kernel empties it when nobody holds it but
    /// programs.
    pub(super) fn pin_parts(&self, pin: &Path) -> Result<()> {
        let map = self.ebpf.map(names::PROGRAMS).context("the map programs is missing from this binary")?;
        map.pin(pin).with_context(|| format!("cannot pin the parts of the programs at {}", pin.display()))
    }

    /// Makes `device` say this for each interface, see [`DeviceMap::write`].
    pub fn masks(&mut self, wanted: &BTreeMap<u32, DeviceMask>) -> Result<()> {
        let wanted = wanted.iter().map(|(index, mask)| (*index, DeviceAddresses::from(*mask))).collect();
        if self.devices.is_none() {
            self.devices = Some(self.device_map()?);
        }
        match &mut self.devices {
            Some(devices) => Ok(devices.write(&wanted)?),
            None => Ok(()),
        }
    }

    /// The map `device` of these programs.
    pub fn device_map(&self) -> Result<DeviceMap> {
        let Some(Map::HashMap(map)) = self.ebpf.map(names::DEVICE) else {
            anyhow::bail!("the map device is missing from this binary");
        };
        Ok(DeviceMap::from_fd(map.fd().as_fd().try_clone_to_owned()?)?)
    }

    /// Each program with the instructions that the kernel holds of it and those that its verifier walked.
    pub fn sizes(&self) -> Vec<(String, u32, Option<u32>)> {
        let mut sizes: Vec<_> = self
            .ebpf
            .programs()
            .filter_map(|(name, program)| {
                let info = program.info().ok()?;
                Some((
                    name.to_owned(),
                    info.size_translated().unwrap_or(0) / 8,
                    info.verified_instruction_count(),
                ))
            })
            .collect();
        sizes.sort();
        sizes
    }
}

fn load(
    pins: Option<Pins>,
    capacities: &Capacities,
    features: &Features,
    forward_mark: u32,
) -> Result<Programs, LoadError> {
    let Features { set_retval } = features;
    let set_retval = u32::from(*set_retval);
    let mut loader = EbpfLoader::new();
    loader.override_global("HAS_SET_RETVAL", &set_retval, true);
    loader.override_global("FORWARD_MARK", &forward_mark, true);
    for name in pinned_maps() {
        if let Some(pins) = &pins {
            loader.map_pin_path(name, pins.path(name));
        }
        if let Some(entries) = capacities.of(name) {
            loader.map_max_entries(name, entries);
        }
    }
    let mut ebpf = loader.load(OBJECT).map_err(|error| LoadError::Maps(Box::new(error)))?;
    for (name, program) in ebpf.programs_mut() {
        let loaded = match program {
            Program::CgroupSockAddr(program) => program.load(),
            Program::SchedClassifier(program) => program.load(),
            Program::Iter(program) => {
                // Without it (before 5.9, or without CONFIG_DEBUG_INFO_BTF) everything else works.
                let loaded = Btf::from_sys_fs()
                    .map_err(Into::into)
                    .and_then(|btf| program.load(SOCKET_ITERATOR, &btf));
                if let Err(error) = loaded.map_err(Refusal::from) {
                    tracing::warn!(
                        "UDP clients whose backend is gone are not told so: the kernel refused the program {name}: {error}"
                    );
                }
                continue;
            }
            _ => continue,
        };
        loaded.map_err(|error| LoadError::program(name, error))?;
    }
    join_parts(&mut ebpf)?;
    Ok(Programs { ebpf, pins, devices: None })
}

/// Puts the parts of the packet programs where the others go on in them.
fn join_parts(ebpf: &mut Ebpf) -> Result<(), LoadError> {
    let failed = |error: aya::maps::MapError| LoadError::Maps(Box::new(error.into()));
    let missing = |name: &str| LoadError::program(name, ProgramError::NotLoaded);
    let part = |name: &&str| {
        let Some(Program::SchedClassifier(program)) = ebpf.program(name) else {
            return Err(missing(name));
        };
        let fd = program.fd().map_err(|error| LoadError::program(name, error))?;
        fd.try_clone().map_err(|error| LoadError::program(name, error.into()))
    };
    let parts: Vec<ProgramFd> = PACKET_PARTS.iter().map(part).collect::<Result<_, _>>()?;
    let map = ebpf.map_mut(names::PROGRAMS).ok_or_else(|| missing(names::PROGRAMS))?;
    let mut map = ProgramArray::try_from(map).map_err(failed)?;
    for (place, part) in (0..).zip(&parts) {
        map.set(place, part, 0).map_err(failed)?;
    }
    Ok(())
}

/// The names of all maps that are pinned.
pub fn pinned_maps() -> &'static [&'static str] {
    &[
        names::FRONTEND,
        names::SERVICE,
        names::SERVICE_INFO,
        names::BACKEND,
        names::BACKEND_SLOT,
        names::ADDRESS,
        names::SOURCE_RANGE,
        names::AFFINITY,
        names::FLOW,
        names::FLOW_TRANSIENT,
        names::CLAIM,
        names::FRAGMENT,
        names::SOCKET,
        names::SOCKET_OVERFLOW,
        names::COUNTER,
        names::REASON,
        names::DROP_EVENT,
        names::DROP_LISTENER,
        names::DROP_BUDGET,
        names::CONFIG,
        names::DEVICE,
        names::MASQUERADED,
        names::OPTED_OUT,
        names::OWNER,
    ]
}

/// Makes the folder for pins, and makes sure that it is on a bpffs.
pub fn check_bpf_root(root: &Path) -> Result<(), LoadError> {
    check_on_bpffs(root)?;
    fs::create_dir_all(root).map_err(|source| LoadError::Io {
        what: "make the folder",
        path: root.to_owned(),
        source,
    })
}

/// Makes sure that `root`, or the folder that it would be made in, is on a bpffs.
pub fn check_on_bpffs(root: &Path) -> Result<(), LoadError> {
    let existing = root.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    let kind = statfs(existing)
        .map_err(|errno| LoadError::Io { what: "look at", path: existing.to_owned(), source: errno.into() })?
        .filesystem_type();
    if kind != BPF_FS_MAGIC {
        return Err(LoadError::NotBpffs { path: root.to_owned() });
    }
    Ok(())
}

/// Whether packet programs can be attached by TCX links (6.6).
pub fn has_tcx() -> bool {
    // Asked, not told by a version number: kernels before it do not know the question.
    !lacks(Feature::Tcx)
        && aya::programs::SchedClassifier::query_tcx("lo", aya::programs::TcAttachType::Ingress).is_ok()
}

/// Whether the kernel has `bpf_set_retval` for socket programs (5.18).
pub fn has_set_retval() -> bool {
    !lacks(Feature::SetRetval)
        && aya::sys::is_helper_supported(
            aya::programs::ProgramType::CgroupSockAddr,
            aya::sys::BpfHelper::BPF_FUNC_set_retval,
        )
        .unwrap_or(false)
}
