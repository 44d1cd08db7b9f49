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
use aya::programs::{CgroupAttachMode, LinkOrder, Program, TcAttachType, links::FdLink, tc::TcAttachOptions};

use super::{
    filters,
    load::Programs,
    sys::{link_detach, link_info, link_update, open_pin},
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

/// The programs of packet hooks, which no one else's are called; the last three were an earlier version's, whose filters
/// are taken over.
const PACKET_HOOKS: [&str; 7] =
    ["in_eth", "in_ip", "out_eth", "out_ip", "pod_in_eth", "outside_in_eth", "outside_in_ip"];

/// Whether a program of this name is one of kproxy's on an interface.
pub fn is_packet_program(name: &str) -> bool {
    PACKET_HOOKS.contains(&name)
}

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

    /// Looks whether everything is still attached as it was left, and attaches again what somebody has taken off: links
    /// that were detached or whose pins are gone, filters that were deleted, alone or with their qdisc. What was put
    /// back, by name; an interface that cannot be mended is tried anew by [`devices`](Self::devices).
    pub fn verify(&mut self, programs: &mut Programs, cgroup: &Path) -> Vec<String> {
        let mut mended = Vec::new();
        match self.missing_socket_hooks(programs, cgroup) {
            Ok(missing) if missing.is_empty() => {}
            Ok(missing) => match self.socket_hooks(programs, cgroup) {
                Ok(()) => mended.push(format!("{} of the cgroup {}", missing.join(", "), cgroup.display())),
                Err(error) => {
                    tracing::error!("socket hooks that were taken off cannot be put back: {error:#}")
                }
            },
            Err(error) => {
                tracing::error!("it cannot be seen whether the socket hooks are attached: {error:#}")
            }
        }
        for (index, (device, variant)) in self.devices.clone() {
            let missing: Vec<&str> = [Hook::Egress, Hook::Ingress]
                .into_iter()
                .map(|hook| (hook, variant.name(hook)))
                .filter(|(hook, name)| !self.is_in_place(programs, index, *hook, name).unwrap_or(false))
                .map(|(_, name)| name)
                .collect();
            // One that has just gone is told by rtnetlink.
            if missing.is_empty() || nix::net::if_::if_nametoindex(device.as_str()).ok() != Some(index) {
                continue;
            }
            match self.device(programs, index, &device, variant) {
                Ok(()) => mended.push(format!("{} of the interface {device}", missing.join(", "))),
                Err(_) => _ = self.devices.remove(&index),
            }
        }
        mended
    }

    fn missing_socket_hooks(&self, programs: &Programs, cgroup: &Path) -> Result<Vec<&'static str>> {
        let id = fs::metadata(cgroup).with_context(|| format!("cannot look at {}", cgroup.display()))?.ino();
        let mut missing = Vec::new();
        for name in SOCKET_HOOKS {
            let program = programs.ebpf.program(name).context("a program is missing from this binary")?;
            if !leads_to(&self.links.join(name), true, id, program.info()?.id()) {
                missing.push(name);
            }
        }
        Ok(missing)
    }

    fn is_in_place(&self, programs: &Programs, index: u32, hook: Hook, name: &str) -> Result<bool> {
        let program = programs.ebpf.program(name).context("a program is missing from this binary")?;
        let id = program.info()?.id();
        if self.use_clsact {
            return Ok(filters::is_in_place(index, hook, id)?);
        }
        Ok(leads_to(&self.pin(index, hook), false, index.into(), id))
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
                if !self.without_filters.contains(&index) {
                    match filters::remove(name, index) {
                        Ok(_) => _ = self.without_filters.insert(index),
                        Err(error) => tracing::warn!(interface = name, "{error:#}"),
                    }
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
                filters::put(program, device, index, hook)?;
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
            // Mostly it is gone, and its filters with it.
            if let Err(error) = filters::remove(name, index) {
                tracing::warn!(interface = name.as_str(), "{error:#}");
            }
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

/// Detaches the link pinned at `pin`, if it is one that can be: what else is pinned is left as it is.
pub fn detach(pin: &Path) {
    if let Ok(link) = open_pin(pin)
        && let Err(error) = link_detach(link.as_fd())
    {
        // A map, a link whose interface is gone, or a kernel before 5.9: removing the pin does it then.
        tracing::debug!(pin = %pin.display(), %error, "nothing to detach");
    }
}

/// Whether the link pinned at `pin` is attached to `target` and runs the program with this id.
fn leads_to(pin: &Path, is_cgroup: bool, target: u64, program: u32) -> bool {
    open_pin(pin)
        .and_then(|link| link_info(link.as_fd(), is_cgroup))
        .is_ok_and(|found| found == (target, program))
}

/// Puts `program` into the link pinned at `pin`. `false`: there is none, or it leads elsewhere.
fn exchange(pin: &Path, program: BorrowedFd<'_>, is_cgroup: bool, target: u64) -> Result<bool> {
    if !pin.exists() {
        return Ok(false);
    }
    let Ok(link) = open_pin(pin) else {
        return Ok(false);
    };
    if link_info(link.as_fd(), is_cgroup).ok().map(|(leads_to, _)| leads_to) != Some(target) {
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

pub(super) fn attach_type(hook: Hook) -> TcAttachType {
    match hook {
        Hook::Ingress => TcAttachType::Ingress,
        Hook::Egress => TcAttachType::Egress,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_packet_hook_is_known_by_its_name() {
        for hook in [Hook::Ingress, Hook::Egress] {
            for has_ethernet_header in [false, true] {
                let program = DeviceProgram { has_ethernet_header };
                assert!(is_packet_program(program.name(hook)), "{hook:?} {program:?}");
            }
        }
        assert!(!is_packet_program("cil_from_netdev"));
    }
}
