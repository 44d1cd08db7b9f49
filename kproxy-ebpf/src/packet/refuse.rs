//! Refusals: what a machine would answer on whose port nobody listens. Sent back out of the interface that the packet came
//! in by, or in by the one that it was to leave by, in the memory of that packet.
//!
//! A packet of a pod or of this host can be one whose checksum the device is still to fill in (CHECKSUM_PARTIAL). That stays so whatever is
//! written into it, and no helper tells it; but no helper either lets a packet become shorter than what the device is to fill
//! in. So it is found out by trying, and the answer is made such that it is right after that was done.

use aya_ebpf::{
    bindings::{
        BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM, TC_ACT_REDIRECT,
        bpf_adj_room_mode::{BPF_ADJ_ROOM_MAC, BPF_ADJ_ROOM_NET},
    },
    helpers::{
        bpf_csum_diff, bpf_ktime_get_ns, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail,
        bpf_skb_load_bytes,
    },
    programs::TcContext,
};
use kproxy_common::{Address, Hook, Protocol, Reason};

use super::{
    access::{RewriteFailed, read, store, succeeded},
    apply::drop,
    device,
    parse::{IPV4_HEADER, IPV6_HEADER, Parsed},
};
use crate::{count::count_reason, drops, maps};

/// How many refusals a processor sends in a period of 2^30 ns: `net.ipv4.icmp_msgs_per_sec` of Linux, for the whole
/// machine, is as many.
const LIMIT: u32 = 10_000;
/// Hops that an answer may take.
const HOP_LIMIT: u32 = 64;
/// TCP's flags RST and ACK.
const RESET: u32 = 0x14;

const ICMP: u32 = 1;
const ICMP_V6: u32 = 58;
const ICMP_HEADER: u32 = 8;
/// Destination unreachable, port unreachable (RFC 792), in the place of the first word.
const PORT_UNREACHABLE: u32 = 0x0303_0000;
/// The same (RFC 4443, 3.1).
const PORT_UNREACHABLE_V6: u32 = 0x0104_0000;

/// How much of the packet's IP headers is quoted at the most: in all usual cases, all.
const LONGEST_QUOTED: usize = 112;

/// What lies in `refusal`.
#[repr(C)]
struct Answer {
    /// The pseudo header that transport checksums begin with, of both families: IPv4's own has the same sum as that of
    /// the mapped addresses.
    pseudo: [u32; 10],
    /// The IP header, without options.
    network: [u32; 10],
    /// The TCP header, or that of ICMP.
    transport: [u32; 5],
    /// The packet's own IP headers, as they are quoted.
    quoted: [u8; LONGEST_QUOTED],
    /// The period of which `sent` counts refusals.
    period: u32,
    sent: u32,
}

const _: () = assert!(size_of::<Answer>() <= size_of::<[u64; 32]>(), "what the map `refusal` has room for");

/// Why no answer was sent.
enum Silent {
    /// There is none to this packet.
    Because(Reason),
    Failed(RewriteFailed),
}

impl From<RewriteFailed> for Silent {
    #[inline(always)]
    fn from(failed: RewriteFailed) -> Self {
        Self::Failed(failed)
    }
}

/// Answers the packet with a refusal, for the reason that was found before.
#[inline(always)]
pub fn refuse(ctx: &TcContext, parsed: &Parsed) -> i32 {
    let reason = parsed.reason;
    let Some(place) = maps::REFUSAL.get_ptr_mut(0) else {
        return drop(ctx, parsed, reason);
    };
    // SAFETY: the element is this CPU's, as long as the structure, and used by one caller at a time.
    let answer = unsafe { &mut *place.cast::<Answer>() };
    if !answer.may_send() {
        return drop(ctx, parsed, Reason::RefusalsLimited);
    }
    let answered = match parsed.meta.protocol {
        Protocol::Tcp => reset(ctx, parsed, answer),
        Protocol::Udp | Protocol::Sctp => unreachable(ctx, parsed, answer, reason),
    };
    match answered.and_then(|()| Ok(send_back(ctx, parsed)?)) {
        Ok(action) => {
            count_reason(reason);
            drops::packet(&parsed.meta, device(ctx), reason as u32, 1);
            action
        }
        Err(Silent::Because(reason)) => drop(ctx, parsed, reason),
        Err(Silent::Failed(RewriteFailed)) => drop(ctx, parsed, Reason::RewriteFailed),
    }
}

/// Sends the packet back where it came from: its Ethernet addresses change places. What this host has sent comes in by
/// the interface that it was to leave by, as an answer would.
#[inline(always)]
pub fn send_back(ctx: &TcContext, parsed: &Parsed) -> Result<i32, RewriteFailed> {
    if parsed.network != 0 {
        let [a, b, c, d, e, f] = read::<[u16; 6]>(ctx, 0).ok_or(RewriteFailed)?;
        store(ctx, 0, &[d, e, f, a, b, c], 0)?;
    }
    let flags = if matches!(parsed.hook, Hook::Egress) { BPF_F_INGRESS.into() } else { 0 };
    // SAFETY: the helper has no conditions.
    unsafe { bpf_redirect(device(ctx), flags) };
    Ok(TC_ACT_REDIRECT)
}

/// A TCP reset: to a packet without ACK, from sequence number 0, and acknowledging all of it (RFC 9293, 3.10.7.1). It has
/// no options and no extension headers, whatever the packet has.
#[inline(always)]
fn reset(ctx: &TcContext, parsed: &Parsed, answer: &mut Answer) -> Result<(), Silent> {
    let Parsed { meta, network, transport, .. } = parsed;
    let is_v4 = parsed.is_v4();
    let header = if is_v4 { IPV4_HEADER } else { IPV6_HEADER };
    let seldom = transport.wrapping_sub(*network).wrapping_sub(header);
    let tcp: [u32; 4] = read(ctx, *transport).ok_or(Silent::Because(Reason::Malformed))?;
    let segment = payload_length(ctx, *network, is_v4)
        .and_then(|length| length.checked_sub(seldom))
        .ok_or(Silent::Because(Reason::Malformed))?;
    let tcp_header = u32::from_be(tcp[3]) >> 28 << 2;
    if segment < tcp_header {
        return Err(Silent::Because(Reason::Malformed));
    }
    // Of what comes here all is a SYN, which counts as one octet.
    let acknowledged = u32::from_be(tcp[1]).wrapping_add(segment - tcp_header + 1);
    let ports = u32::from(meta.destination_port) << 16 | u32::from(meta.source_port);
    answer.transport = [ports.to_be(), 0, acknowledged.to_be(), (5 << 28 | RESET << 16_u32).to_be(), 0];
    let pseudo = answer.pseudo_sum(&meta.destination, &meta.source, 20, 6);
    let whole = fold(sum(&answer.transport, pseudo));
    answer.write_network(is_v4, &meta.destination, &meta.source, 20, 6);

    if seldom != 0 {
        // What a device is to sum up begins at the TCP header still, wherever that moves to.
        // SAFETY: the helper checks what it is given.
        succeeded(unsafe {
            bpf_skb_adjust_room(ctx.skb.skb, (seldom as i32).wrapping_neg(), BPF_ADJ_ROOM_NET, 0)
        })?;
    }
    let transport = &(network + header);
    let end = transport + 20;
    let is_partial = is_partial(ctx, end - 3);
    change_tail(ctx, end)?;
    // The device sums up from the transport header on, and finds there what it is to begin with.
    let checksum = if is_partial { fold(pseudo) } else { !whole };
    answer.transport[4] = u32::from(checksum);
    answer.store_network(ctx, *network, is_v4)?;
    store(ctx, *transport, &answer.transport, BPF_F_RECOMPUTE_CSUM.into())?;
    Ok(())
}

/// ICMP's port unreachable, which quotes the packet up to where its sender finds what it needs: the IP headers and 8
/// octets (RFC 792), with SCTP the whole common header.
#[inline(always)]
fn unreachable(ctx: &TcContext, parsed: &Parsed, answer: &mut Answer, because: Reason) -> Result<(), Silent> {
    let Parsed { meta, network, transport, .. } = parsed;
    let is_v4 = parsed.is_v4();
    let headers = transport.wrapping_sub(*network);
    if headers > LONGEST_QUOTED as u32 || headers < IPV4_HEADER {
        return Err(Silent::Because(because));
    }
    // SAFETY: the buffer has room for the length, bounded above; the helper checks the offset.
    succeeded(unsafe {
        bpf_skb_load_bytes(ctx.skb.skb.cast(), *network, answer.quoted.as_mut_ptr().cast(), headers)
    })?;
    // SAFETY: as above; all IP headers are multiples of four octets long.
    let headers_sum = unsafe {
        bpf_csum_diff(core::ptr::null_mut(), 0, answer.quoted.as_mut_ptr().cast(), headers & 0x7c, 0)
    };
    if is_v4 && fold(headers_sum as u32) != u16::MAX {
        return Err(Silent::Because(Reason::Malformed));
    }
    let head: [u32; 3] = match meta.protocol {
        Protocol::Sctp => read(ctx, *transport),
        Protocol::Udp | Protocol::Tcp => read::<[u32; 2]>(ctx, *transport).map(|[a, b]| [a, b, 0]),
    }
    .ok_or(Silent::Because(Reason::Malformed))?;
    let length = if matches!(meta.protocol, Protocol::Sctp) { 12 } else { 8 };
    let end = transport + length;
    let is_partial = matches!(meta.protocol, Protocol::Udp) && is_partial(ctx, end - 1);
    change_tail(ctx, end)?;
    if matches!(meta.protocol, Protocol::Udp) {
        // Of which the trial has cut off an octet.
        store(ctx, transport + 4, &head[1], BPF_F_RECOMPUTE_CSUM.into())?;
    }
    // Where the device is still to fill in UDP's checksum, that will make the sum of the UDP header the opposite of what
    // stands there now, whatever else is in it.
    let head_sum = if is_partial { u32::from(!((head[1] >> 16) as u16)) } else { sum(&head, 0) };

    let header = if is_v4 { IPV4_HEADER } else { IPV6_HEADER };
    let (protocol, kind) = if is_v4 { (ICMP, PORT_UNREACHABLE) } else { (ICMP_V6, PORT_UNREACHABLE_V6) };
    let message = ICMP_HEADER + headers + length;
    let seed = if is_v4 { 0 } else { answer.pseudo_sum(&meta.destination, &meta.source, message, protocol) };
    answer.transport = [kind.to_be(), 0, headers_sum as u32, head_sum, 0];
    let checksum = !fold(sum(&answer.transport, seed));
    answer.write_network(is_v4, &meta.destination, &meta.source, message, protocol);
    // SAFETY: the helper checks what it is given.
    succeeded(unsafe {
        bpf_skb_adjust_room(ctx.skb.skb, (header + ICMP_HEADER) as i32, BPF_ADJ_ROOM_MAC, 0)
    })?;
    answer.store_network(ctx, *network, is_v4)?;
    let icmp = [kind.to_be() | u32::from(checksum) << 16, 0];
    store(ctx, network + header, &icmp, BPF_F_RECOMPUTE_CSUM.into())?;
    Ok(())
}

impl Answer {
    #[inline(always)]
    fn may_send(&mut self) -> bool {
        // SAFETY: the helper has no conditions.
        let period = (unsafe { bpf_ktime_get_ns() } >> 30) as u32;
        if self.period != period {
            self.period = period;
            self.sent = 0;
        }
        self.sent += 1;
        self.sent <= LIMIT
    }

    /// The sum that the transport checksum begins with.
    #[inline(always)]
    fn pseudo_sum(&mut self, source: &Address, destination: &Address, length: u32, protocol: u32) -> u32 {
        let ([a, b, c, d], [e, f, g, h]) = (source.words(), destination.words());
        self.pseudo = [a, b, c, d, e, f, g, h, length.to_be(), protocol.to_be()];
        sum(&self.pseudo, 0)
    }

    #[inline(always)]
    fn write_network(
        &mut self,
        is_v4: bool,
        source: &Address,
        destination: &Address,
        payload: u32,
        protocol: u32,
    ) {
        let ([a, b, c, d], [e, f, g, h]) = (source.words(), destination.words());
        if !is_v4 {
            let second = payload << 16 | protocol << 8 | HOP_LIMIT;
            self.network = [0x6000_0000_u32.to_be(), second.to_be(), a, b, c, d, e, f, g, h];
            return;
        }
        let first = 0x4500_0000 | (IPV4_HEADER + payload);
        // Not to be fragmented, so that it needs no identification (RFC 6864).
        let (second, third) = (0x4000_u32, HOP_LIMIT << 24 | protocol << 16);
        self.network = [first.to_be(), second.to_be(), third.to_be(), d, h, 0, 0, 0, 0, 0];
        // The checksum fills the third word's second half; in memory the upper half of a little-endian word.
        let checksum = !fold(sum(&self.network, 0));
        self.network[2] |= u32::from(checksum) << 16;
    }

    #[inline(always)]
    fn store_network(&self, ctx: &TcContext, network: u32, is_v4: bool) -> Result<(), RewriteFailed> {
        let flags = BPF_F_RECOMPUTE_CSUM.into();
        if is_v4 {
            let [a, b, c, d, e, ..] = self.network;
            return store(ctx, network, &[a, b, c, d, e], flags);
        }
        store(ctx, network, &self.network, flags)
    }
}

/// How many octets stand behind the IP header, options and extension headers included.
#[inline(always)]
fn payload_length(ctx: &TcContext, network: u32, is_v4: bool) -> Option<u32> {
    if is_v4 {
        let header: [u16; 2] = read(ctx, network)?;
        return u32::from(u16::from_be(header[1])).checked_sub(IPV4_HEADER);
    }
    let header: [u16; 3] = read(ctx, network)?;
    Some(u32::from(u16::from_be(header[2])))
}

/// Whether the device is to fill in a checksum that ends behind `end`. If not, the packet ends there now.
#[inline(always)]
fn is_partial(ctx: &TcContext, end: u32) -> bool {
    change_tail(ctx, end).is_err()
}

#[inline(always)]
fn change_tail(ctx: &TcContext, end: u32) -> Result<(), RewriteFailed> {
    // SAFETY: the helper checks what it is given.
    succeeded(unsafe { bpf_skb_change_tail(ctx.skb.skb, end, 0) })
}

/// The sum of 16-bit words, not folded.
#[inline(always)]
fn sum<const N: usize>(words: &[u32; N], seed: u32) -> u32 {
    let words = words.as_ptr().cast_mut();
    // SAFETY: the array is as long as the helper is told, which does not write.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, words, (N * 4) as u32, seed) as u32 }
}

/// To 16 bits, carries added in.
#[inline(always)]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}
