//! Filters on clsact qdiscs, for kernels without TCX (before 6.6): what stands on an interface, and kproxy's place there.
//!
//! kproxy's filters have the first priority, 1, and a handle of [`HANDLES`]; they are known by both and by the name of
//! their program. Within a priority the kernel runs the newest filter first. A change adds the new filter and then
//! deletes the others of kproxy: whatever step a crash comes after, the next agent finds its own filters, however many,
//! and ends with one. Filters of others are never touched, wherever they stand.

use std::{io, ops::RangeInclusive};

use anyhow::{Context as _, Result, bail};
use aya::programs::{
    SchedClassifier,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::attach::{Hook, attach_type, is_packet_program};

/// Of kproxy's filters.
pub const PRIORITY: u16 = 1;
/// Of kproxy's filters: the first that nobody has.
const HANDLES: RangeInclusive<u32> = 0x6b70..=0x6b7f;

/// A filter of an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Filter {
    /// Lower ones run first.
    pub priority: u16,
    /// Which of its priority.
    pub handle: u32,
    /// `bpf`, `flower`, `u32`…
    pub kind: String,
    /// Of a BPF filter: what its owner calls it.
    pub name: String,
    /// Of a BPF filter: its program.
    pub program: Option<u32>,
}

impl Filter {
    /// Whether it is kproxy's.
    pub fn is_own(&self) -> bool {
        self.priority == PRIORITY
            && HANDLES.contains(&self.handle)
            && self.kind == "bpf"
            && is_packet_program(&self.name)
    }

    /// In words.
    pub fn describe(&self) -> String {
        let Self { priority, handle, kind, name, .. } = self;
        let name = if name.is_empty() { String::new() } else { format!(" {name}") };
        format!("{kind}{name} (pref {priority} handle {handle:#x})")
    }
}

/// Whether the interface has the program there, as its only filter of kproxy's.
pub fn is_in_place(index: u32, hook: Hook, program: u32) -> io::Result<bool> {
    let filters = list(index, hook)?;
    let mut own = filters.iter().filter(|filter| filter.is_own());
    Ok(own.next().is_some_and(|filter| filter.program == Some(program)) && own.next().is_none())
}

/// Makes the program the only filter of kproxy's there, the new one first. Nothing changes where it is already.
pub fn put(program: &mut SchedClassifier, device: &str, index: u32, hook: Hook) -> Result<()> {
    let id = program.info().context("the kernel does not tell the program's id")?.id();
    if is_in_place(index, hook, id).unwrap_or(false) {
        return Ok(());
    }
    add_clsact(device)?;
    let before = list(index, hook).with_context(|| format!("cannot list the filters of {device}"))?;
    let is_taken = |handle: &u32| before.iter().any(|f| f.priority == PRIORITY && f.handle == *handle);
    let Some(handle) = HANDLES.into_iter().find(|handle| !is_taken(handle)) else {
        bail!(
            "all handles that kproxy takes are in use on {device}: see `tc filter show dev {device} {}`",
            word(hook)
        );
    };
    let new = TcHandle::new((handle >> 16) as u16, handle as u16);
    let options =
        TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle: new, ..NlOptions::default() });
    let link = program.attach_with_options(device, attach_type(hook), options).map_err(anyhow::Error::from);
    let id = link.with_context(|| {
        let others: Vec<_> =
            before.iter().filter(|f| f.priority == PRIORITY && !f.is_own()).map(Filter::describe).collect();
        let hint = if others.is_empty() {
            format!("see `tc filter show dev {device} {}`", word(hook))
        } else {
            format!(
                "{} of somebody else stands at priority {PRIORITY}, which kproxy needs: give that another one",
                others.join(", ")
            )
        };
        format!("cannot add a filter to {device}, {}: {hint}", word(hook))
    })?;
    // The filter belongs to the interface, not to this process.
    std::mem::forget(program.take_link(id)?);
    for old in before.iter().filter(|filter| filter.is_own()) {
        delete(device, hook, old.handle).with_context(|| {
            format!(
                "cannot delete the filter of an earlier agent on {device}, {}: tc filter del dev {device} {} pref \
                 {PRIORITY} handle {:#x} bpf",
                word(hook),
                word(hook),
                old.handle
            )
        })?;
    }
    Ok(())
}

/// Removes kproxy's filters from an interface; how many there were.
pub fn remove(device: &str, index: u32) -> Result<usize> {
    let mut removed = 0;
    for hook in [Hook::Ingress, Hook::Egress] {
        let filters = list(index, hook).with_context(|| format!("cannot list the filters of {device}"))?;
        for filter in filters.iter().filter(|filter| filter.is_own()) {
            delete(device, hook, filter.handle).with_context(|| {
                format!("cannot delete kproxy's filter {} of {device}, {}", filter.describe(), word(hook))
            })?;
            removed += 1;
        }
    }
    Ok(removed)
}

fn delete(device: &str, hook: Hook, handle: u32) -> Result<()> {
    let handle = TcHandle::new((handle >> 16) as u16, handle as u16);
    let link = SchedClassifierLink::attached(device, attach_type(hook), PRIORITY, handle, None)?;
    Ok(aya::programs::Link::detach(link)?)
}

fn add_clsact(device: &str) -> Result<()> {
    let Err(error) = aya::programs::tc::qdisc_add_clsact(device) else { return Ok(()) };
    let number = match &error {
        aya::programs::TcError::NetlinkError(error) => error.raw_os_error(),
        aya::programs::TcError::IoError(error) => error.raw_os_error(),
        _ => None,
    };
    // It is there already on most nodes. A qdisc `ingress` in its place has no egress: adding the filter says so.
    if number == Some(libc::EEXIST) {
        return Ok(());
    }
    Err(error).with_context(|| {
        format!("cannot add a clsact qdisc to {device} (is sch_ingress in this kernel? modprobe sch_ingress)")
    })
}

const fn word(hook: Hook) -> &'static str {
    match hook {
        Hook::Ingress => "ingress",
        Hook::Egress => "egress",
    }
}

const NLM_F_REQUEST_DUMP: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
/// `nlmsghdr` and `tcmsg`, in octets.
const HEADER: usize = 16;
const TCMSG: usize = 20;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`, and `…_EGRESS`.
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;
/// `TCA_*` and `TCA_BPF_*`.
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_ID: u16 = 11;

/// The filters of an interface in the order in which they run; none where it has no clsact qdisc.
pub fn list(index: u32, hook: Hook) -> io::Result<Vec<Filter>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let parent = match hook {
        Hook::Ingress => INGRESS,
        Hook::Egress => EGRESS,
    };
    let mut request = Vec::with_capacity(HEADER + TCMSG);
    request.extend_from_slice(&((HEADER + TCMSG) as u32).to_ne_bytes());
    request.extend_from_slice(&libc::RTM_GETTFILTER.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    for word in [0, index, 0, parent, 0] {
        request.extend_from_slice(&word.to_ne_bytes());
    }
    socket.send(&request, 0)?;
    let mut filters = Vec::new();
    loop {
        let (answer, _) = socket.recv_from_full()?;
        let mut rest = answer.as_slice();
        while let Some(length) = u32_at(rest, 0).map(|length| length as usize) {
            if length < HEADER || length > rest.len() {
                break;
            }
            let (message, kind) = (&rest[HEADER..length], u16_at(rest, 4).unwrap_or(0));
            match i32::from(kind) {
                libc::NLMSG_DONE => return Ok(filters),
                libc::NLMSG_ERROR => {
                    return match u32_at(message, 0).map(u32::cast_signed) {
                        // No such qdisc, or no such interface any more.
                        Some(0) => Ok(filters),
                        Some(error) if [libc::EINVAL, libc::ENOENT, libc::ENODEV].contains(&-error) => {
                            Ok(Vec::new())
                        }
                        Some(error) => Err(io::Error::from_raw_os_error(-error)),
                        None => Err(io::ErrorKind::UnexpectedEof.into()),
                    };
                }
                _ => filters.extend((kind == libc::RTM_NEWTFILTER).then(|| filter(message)).flatten()),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// A filter as the kernel tells it; `None` for the head of a priority, which has no handle.
fn filter(message: &[u8]) -> Option<Filter> {
    let (handle, info) = (u32_at(message, 8)?, u32_at(message, 16)?);
    if handle == 0 {
        return None;
    }
    let mut filter = Filter {
        priority: (info >> 16) as u16,
        handle,
        kind: String::new(),
        name: String::new(),
        program: None,
    };
    for (kind, value) in Attributes(message.get(TCMSG..)?) {
        match kind {
            TCA_KIND => filter.kind = text(value),
            TCA_OPTIONS => {
                for (kind, value) in Attributes(value) {
                    match kind {
                        TCA_BPF_NAME => filter.name = text(value),
                        TCA_BPF_ID => filter.program = u32_at(value, 0),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    // The options of others' kinds have other meanings.
    if filter.kind != "bpf" {
        (filter.name, filter.program) = (String::new(), None);
    }
    Some(filter)
}

/// The attributes in these octets, as far as they are whole.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        /// `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
        const FLAGS: u16 = 0xc000;
        let (length, kind) = (usize::from(u16_at(self.0, 0)?), u16_at(self.0, 2)?);
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !FLAGS, value))
    }
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|octet| *octet == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Filter {
        Filter {
            priority: PRIORITY,
            handle: 0x6b70,
            kind: "bpf".into(),
            name: "out_eth".into(),
            program: Some(7),
        }
    }

    #[test]
    fn what_is_not_whole_is_nobodys() {
        assert!(own().is_own());
        for other in [
            Filter { priority: 2, ..own() },
            Filter { handle: 1, ..own() },
            Filter { kind: "flower".into(), ..own() },
            Filter { name: "cil_from_netdev".into(), ..own() },
        ] {
            assert!(!other.is_own(), "{other:?}");
        }
    }

    #[test]
    fn no_message_is_read_past_its_end() {
        let mut message = vec![0; TCMSG];
        message[8..12].copy_from_slice(&0x6b71_u32.to_ne_bytes());
        message[16..20].copy_from_slice(&(1_u32 << 16).to_ne_bytes());
        message.extend_from_slice(&[8, 0, 1, 0]);
        message.extend_from_slice(b"bpf\0");
        message.extend_from_slice(&[24, 0, 2, 0]);
        message.extend_from_slice(&[12, 0, 7, 0]);
        message.extend_from_slice(b"out_eth\0");
        message.extend_from_slice(&[8, 0, 11, 0, 9, 0, 0, 0]);
        let whole = Filter { handle: 0x6b71, program: Some(9), ..own() };
        assert_eq!(filter(&message), Some(whole));
        for length in 0..message.len() {
            let part = filter(&message[..length]);
            assert!(part.is_none_or(|part| part.program.is_none()), "{length} octets");
        }
    }
}
