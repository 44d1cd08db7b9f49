//! Attaching: links pinned below `links/` of the bpffs folder, exchanged in place on a restart.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use aya::programs::{
    CgroupAttachMode, LinkOrder, Program, SchedClassifier, TcAttachType,
    links::FdLink,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};

use super::{
    load::Programs,
    sys::{link_detach, link_target, link_update, open_pin},
};

/// One packet hook of an interface.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Hook {
    /// Packets that come in.
    Ingress,
    /// Packets that go out.
    Egress,
}

/// Which variants of the packet programs an interface gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceProgram {
    /// Whether its packets begin with an Ethernet header; else with the IP header.
    pub has_ethernet_header: bool,
}

impl DeviceProgram {
    fn name(self, hook: Hook) -> &'static str {
        match (hook, self.has_ethernet_header) {
            (Hook::Ingress, true) => "in_eth",
            (Hook::Ingress, false) => "in_ip",
            (Hook::Egress, true) => "out_eth",
            (Hook::Egress, false) => "out_ip",
        }
    }
}

const SOCKET_HOOKS: [&str; 8] =
    ["connect4", "connect6", "sendmsg4", "sendmsg6", "recvmsg4", "recvmsg6", "getpeername4", "getpeername6"];

/// How pins of the parts of packet programs begin.
const PARTS: &str = "parts_";

/// Of the filters on a clsact qdisc. Two handles: the new filter is in place before the old one goes.
const CLSACT_PRIORITY: u16 = 1;
const CLSACT_HANDLES: [TcHandle; 2] = [TcHandle::new(0, 0x6b70), TcHandle::new(0, 0x6b71)];

/// What is attached, and where its links are pinned.
pub struct Attached {
    links: PathBuf,
    devices: BTreeMap<u32, (String, DeviceProgram)>,
    /// Without TCX (before 6.6): filters on a clsact qdisc, which stay without a pin.
    use_clsact: bool,
    /// Interfaces that get no filters, and have none of an earlier agent's any more.
    without_filters: BTreeSet<u32>,
    /// Where the parts of these programs are pinned, once they are.
    parts: Option<PathBuf>,
}

impl Attached {
    /// `root` is the bpffs folder. `use_clsact` asks for the way of kernels without TCX.
    pub fn new(root: &Path, use_clsact: bool) -> Result<Self> {
        let links = root.join("links");
        fs::create_dir_all(&links).with_context(|| format!("cannot make the folder {}", links.display()))?;
        Ok(Self {
            links,
            devices: BTreeMap::new(),
            use_clsact,
            without_filters: BTreeSet::new(),
            parts: None,
        })
    }

    /// Puts the socket hooks on `cgroup`, or into the links that are there from an earlier agent.
    pub fn socket_hooks(&mut self, programs: &mut Programs, cgroup: &Path) -> Result<()> {
        let folder =
            File::open(cgroup).with_context(|| format!("cannot open the cgroup {}", cgroup.display()))?;
        let cgroup_id =
            folder.metadata().with_context(|| format!("cannot look at {}", cgroup.display()))?.ino();
        for name in SOCKET_HOOKS {
            let pin = self.links.join(name);
            let Some(Program::CgroupSockAddr(program)) = programs.ebpf.program_mut(name) else {
                bail!("the program {name} is missing from this binary: it was built wrongly");
            };
            let fd = program.fd()?.try_clone()?;
            if exchange(&pin, fd.as_fd(), true, cgroup_id)? {
                continue;
            }
            // "Single" by link is the kernel's multi-attach: other programs on the cgroup keep running.
            let id = program
                .attach(&folder, CgroupAttachMode::Single)
                .with_context(|| format!("cannot attach {name} to the cgroup {}", cgroup.display()))?;
            let link: FdLink = program.take_link(id)?.try_into()?;
            replace_pin(link, &pin)?;
        }
        Ok(())
    }

    /// Keeps the parts of packet programs, beside those of an earlier agent whose programs still run. To be done before
    /// [`devices`](Self::devices).
    pub fn keep_parts(&mut self, programs: &Programs) -> Result<()> {
        let newest = self.parts_pins().filter_map(|(number, _)| number).max().unwrap_or(0);
        let pin = self.links.join(format!("{PARTS}{}", newest + 1));
        programs.pin_parts(&pin)?;
        self.parts = Some(pin);
        Ok(())
    }

    /// Gives up the parts of an earlier agent's programs. To be done when none of those is attached any more.
    pub fn forget_earlier_parts(&self) {
        for (_, pin) in self.parts_pins().filter(|(_, pin)| Some(pin) != self.parts.as_ref()) {
            if let Err(error) = fs::remove_file(&pin) {
                tracing::warn!(pin = %pin.display(), %error, "cannot remove the pin of an earlier agent's programs");
            }
        }
    }

    fn parts_pins(&self) -> impl Iterator<Item = (Option<u64>, PathBuf)> {
        let entries = fs::read_dir(&self.links).into_iter().flatten().flatten();
        entries.filter_map(|entry| {
            let name = entry.file_name();
            let number = name.to_str()?.strip_prefix(PARTS)?;
            Some((number.parse().ok(), entry.path()))
        })
    }

    /// Makes the packet hooks those of `wanted` (interface index to name and variant). What fails is returned
    /// by interface; the rest is attached.
    pub fn devices(
        &mut self,
        programs: &mut Programs,
        wanted: &BTreeMap<u32, (String, DeviceProgram)>,
    ) -> Vec<(String, anyhow::Error)> {
        let mut failed = Vec::new();
        let gone: Vec<u32> =
            self.devices.keys().filter(|index| !wanted.contains_key(index)).copied().collect();
        for index in gone {
            self.forget(index);
        }
        for (index, (name, program)) in wanted {
            if self.devices.get(index) == Some(&(name.clone(), *program)) {
                continue;
            }
            match self.device(programs, *index, name, *program) {
                Ok(()) => {
                    self.devices.insert(*index, (name.clone(), *program));
                }
                Err(error) => failed.push((name.clone(), error)),
            }
        }
        failed
    }

    /// How many interfaces have packet hooks.
    pub fn device_count(&self) -> usize {
        self.devices.len()
    }

    /// Removes what an earlier agent left: pins of interfaces that are not among `present`, and filters of those among
    /// `all` (index and name) that are not.
    pub fn sweep<'a>(
        &mut self,
        present: &BTreeMap<u32, (String, DeviceProgram)>,
        all: impl Iterator<Item = (u32, &'a str)>,
    ) {
        if self.use_clsact {
            let others: BTreeMap<u32, &str> = all.filter(|(index, _)| !present.contains_key(index)).collect();
            self.without_filters.retain(|index| others.contains_key(index));
            for (index, name) in others {
                if self.without_filters.insert(index) {
                    remove_clsact(name);
                }
            }
        }
        let Ok(entries) = fs::read_dir(&self.links) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let index =
                name.to_str().and_then(|name| name.strip_prefix("tc_")?.split('_').next()?.parse().ok());
            if index.is_some_and(|index: u32| !present.contains_key(&index)) {
                // Should it stay, it is a pin of a link that leads nowhere.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn device(
        &self,
        programs: &mut Programs,
        index: u32,
        device: &str,
        variant: DeviceProgram,
    ) -> Result<()> {
        // Egress first: an answer must find its way back from the first packet that was translated.
        for hook in [Hook::Egress, Hook::Ingress] {
            let name = variant.name(hook);
            let Some(Program::SchedClassifier(program)) = programs.ebpf.program_mut(name) else {
                bail!("the program {name} is missing from this binary: it was built wrongly");
            };
            if self.use_clsact {
                attach_clsact(program, device, hook)?;
                continue;
            }
            let pin = self.pin(index, hook);
            let fd = program.fd()?.try_clone()?;
            if exchange(&pin, fd.as_fd(), false, index.into())? {
                continue;
            }
            let id = program
                .attach_with_options(device, attach_type(hook), TcAttachOptions::TcxOrder(LinkOrder::first()))
                .with_context(|| format!("cannot attach {name} to the interface {device}"))?;
            let link: FdLink = program.take_link(id)?.try_into()?;
            replace_pin(link, &pin)?;
        }
        Ok(())
    }

    fn forget(&mut self, index: u32) {
        for hook in [Hook::Ingress, Hook::Egress] {
            let pin = self.pin(index, hook);
            // The interface is mostly gone, and the link with it; else it is excluded now.
            if pin.exists() {
                detach(&pin);
            }
            if let Err(error) = fs::remove_file(&pin)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(pin = %pin.display(), %error, "cannot remove the pin of an interface that is gone");
            }
        }
        if self.use_clsact
            && let Some((name, _)) = self.devices.get(&index)
        {
            remove_clsact(name);
        }
        self.devices.remove(&index);
    }

    fn pin(&self, index: u32, hook: Hook) -> PathBuf {
        let way = match hook {
            Hook::Ingress => "in",
            Hook::Egress => "out",
        };
        self.links.join(format!("tc_{index}_{way}"))
    }
}

/// Removes kproxy's filters from the clsact qdisc of an interface; how many there were.
pub fn remove_clsact(device: &str) -> usize {
    let mut removed = 0;
    for hook in [Hook::Ingress, Hook::Egress] {
        for handle in CLSACT_HANDLES {
            let link =
                SchedClassifierLink::attached(device, attach_type(hook), CLSACT_PRIORITY, handle, None);
            removed += usize::from(link.is_ok_and(|link| aya::programs::Link::detach(link).is_ok()));
        }
    }
    removed
}

/// Detaches the link pinned at `pin`, if it is one that can be: what else is pinned is left as it is.
pub fn detach(pin: &Path) {
    if let Ok(link) = open_pin(pin)
        && let Err(error) = link_detach(link.as_fd())
    {
        // A map, a link whose interface is gone, or a kernel before 5.9: removing the pin does it then.
        tracing::debug!(pin = %pin.display(), %error, "nothing to detach");
    }
}

/// Puts `program` into the link pinned at `pin`. `false`: there is none, or it leads elsewhere.
fn exchange(pin: &Path, program: BorrowedFd<'_>, is_cgroup: bool, target: u64) -> Result<bool> {
    if !pin.exists() {
        return Ok(false);
    }
    let Ok(link) = open_pin(pin) else {
        return Ok(false);
    };
    if link_target(link.as_fd(), is_cgroup).ok() != Some(target) {
        return Ok(false);
    }
    link_update(link.as_fd(), program)
        .with_context(|| format!("cannot exchange the program of the link {}", pin.display()))?;
    Ok(true)
}

/// Pins `link`, then gives up what was pinned there before: the new program runs before the old one goes.
fn replace_pin(link: FdLink, pin: &Path) -> Result<()> {
    // bpffs takes no dots in names.
    let mut beside = pin.as_os_str().to_owned();
    beside.push("_new");
    let beside = PathBuf::from(beside);
    // From an agent that died between the two steps.
    let _ = fs::remove_file(&beside);
    drop(link.pin(&beside).with_context(|| format!("cannot pin a link at {}", beside.display()))?);
    let _ = fs::remove_file(pin);
    fs::rename(&beside, pin).with_context(|| format!("cannot pin a link at {}", pin.display()))
}

fn attach_type(hook: Hook) -> TcAttachType {
    match hook {
        Hook::Ingress => TcAttachType::Ingress,
        Hook::Egress => TcAttachType::Egress,
    }
}

fn attach_clsact(program: &mut SchedClassifier, device: &str, hook: Hook) -> Result<()> {
    // It is there already on most nodes.
    let _ = aya::programs::tc::qdisc_add_clsact(device);
    for (place, handle) in CLSACT_HANDLES.into_iter().enumerate() {
        let options =
            TcAttachOptions::Netlink(NlOptions { priority: CLSACT_PRIORITY, handle, ..NlOptions::default() });
        let Ok(id) = program.attach_with_options(device, attach_type(hook), options) else {
            continue;
        };
        // The filter belongs to the interface, not to this process.
        std::mem::forget(program.take_link(id)?);
        let other = CLSACT_HANDLES[1 - place];
        if let Ok(old) =
            SchedClassifierLink::attached(device, attach_type(hook), CLSACT_PRIORITY, other, None)
        {
            drop(old);
        }
        return Ok(());
    }
    bail!(
        "cannot add a filter to the clsact qdisc of the interface {device}: both of kproxy's handles are taken"
    )
}
