//! The packet hooks: one screen each of parse, decide, rewrite.

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::{
        bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_pull_data, bpf_skb_store_bytes,
    },
    macros::classifier,
    programs::TcContext,
};
use kproxy_common::{
    Address, ClientKind, PacketMeta, PacketVerdict, Protocol, Reason, TcpFlags, on_egress, on_ingress,
};

use crate::{count::count_reason, drops, kernel::Kernel, mark};

/// Leave the packet to the next program, and to the stack after the last.
const NEXT: i32 = TC_ACT_UNSPEC;
const DROP: i32 = TC_ACT_SHOT;

const ETHERNET_HEADER: u32 = 14;
const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;
/// The longest headers that are read: IPv4 with all options, or IPv6, then TCP without options.
const LONGEST: u32 = 60 + 20;

/// From strangers, on a device with Ethernet headers.
#[classifier]
pub fn outside_in_eth(ctx: TcContext) -> i32 {
    ingress(&ctx, ETHERNET_HEADER, ClientKind::Outside)
}

/// From strangers, on a device whose packets begin with the IP header.
#[classifier]
pub fn outside_in_ip(ctx: TcContext) -> i32 {
    ingress(&ctx, 0, ClientKind::Outside)
}

/// From a pod of this node, on a device with Ethernet headers.
#[classifier]
pub fn pod_in_eth(ctx: TcContext) -> i32 {
    ingress(&ctx, ETHERNET_HEADER, ClientKind::Pod)
}

/// Out of any device with Ethernet headers.
#[classifier]
pub fn out_eth(ctx: TcContext) -> i32 {
    egress(&ctx, ETHERNET_HEADER)
}

/// Out of any device whose packets begin with the IP header.
#[classifier]
pub fn out_ip(ctx: TcContext) -> i32 {
    egress(&ctx, 0)
}

#[inline(always)]
fn ingress(ctx: &TcContext, network_offset: u32, client: ClientKind) -> i32 {
    match parse(ctx, network_offset) {
        Ok(packet) => apply(ctx, &packet, on_ingress(&Kernel, &packet.meta, client)),
        Err(reason) => pass(reason),
    }
}

#[inline(always)]
fn egress(ctx: &TcContext, network_offset: u32) -> i32 {
    match parse(ctx, network_offset) {
        Ok(packet) => {
            // SAFETY: the context is valid for the program's run.
            let device = unsafe { (*ctx.skb.skb).ifindex };
            apply(ctx, &packet, on_egress(&Kernel, &packet.meta, device))
        }
        Err(reason) => pass(reason),
    }
}

#[inline(always)]
fn apply(ctx: &TcContext, packet: &Packet, verdict: PacketVerdict) -> i32 {
    let rewritten = match verdict {
        PacketVerdict::Pass { reason } => return pass(reason),
        PacketVerdict::Drop { reason } => return drop(ctx, packet, reason),
        PacketVerdict::SetDestination { address, port } => {
            mark::sent_on(ctx);
            packet.set_destination(ctx, &address, port)
        }
        PacketVerdict::SetSource { address, port } => packet.set_source(ctx, &address, port),
    };
    match rewritten {
        Ok(()) => {
            count_reason(Reason::Forwarded);
            NEXT
        }
        // Half rewritten is worse than lost.
        Err(RewriteFailed) => drop(ctx, packet, Reason::RewriteFailed),
    }
}

#[inline(always)]
fn pass(reason: Reason) -> i32 {
    count_reason(reason);
    NEXT
}

#[inline(always)]
fn drop(ctx: &TcContext, packet: &Packet, reason: Reason) -> i32 {
    count_reason(reason);
    // SAFETY: the context is valid for the program's run.
    drops::packet(&packet.meta, unsafe { (*ctx.skb.skb).ifindex }, reason as u32, 0);
    DROP
}

struct RewriteFailed;

/// A parsed packet: its headers, and where they lie.
struct Packet {
    meta: PacketMeta,
    network: u32,
    transport: u32,
}

#[inline(always)]
fn parse(ctx: &TcContext, network: u32) -> Result<Packet, Reason> {
    // SAFETY: the context is valid for the program's run.
    let (protocol, vlan) = unsafe { ((*ctx.skb.skb).protocol, (*ctx.skb.skb).vlan_present) };
    // A tag that the device has taken off: the VLAN's own device sees the packet next.
    if vlan != 0 {
        return Err(Reason::NotAService);
    }
    match u16::from_be(protocol as u16) {
        0x0800 => parse_v4(ctx, network),
        0x86dd => parse_v6(ctx, network),
        _ => Err(Reason::NotAService),
    }
}

#[inline(always)]
fn parse_v4(ctx: &TcContext, network: u32) -> Result<Packet, Reason> {
    reach(ctx, network, IPV4_HEADER)?;
    let header: [u32; 5] = read(ctx, network).ok_or(Reason::Malformed)?;
    let first = u32::from_be(header[0]);
    let length = ((first >> 24) & 0xf) * 4;
    if first >> 28 != 4 || length < IPV4_HEADER {
        return Err(Reason::Malformed);
    }
    let second = u32::from_be(header[1]);
    // More fragments, or an offset: ports are only in the first, and the rest must follow it.
    if second & 0x3fff != 0 {
        return Err(Reason::Unparsed);
    }
    let protocol = (u32::from_be(header[2]) >> 16) as u8;
    let addresses = (Address::from_v4_word(header[3]), Address::from_v4_word(header[4]));
    parse_transport(ctx, network, network + length, protocol, addresses)
}

#[inline(always)]
fn parse_v6(ctx: &TcContext, network: u32) -> Result<Packet, Reason> {
    reach(ctx, network, IPV6_HEADER)?;
    let header: [u32; 10] = read(ctx, network).ok_or(Reason::Malformed)?;
    if u32::from_be(header[0]) >> 28 != 6 {
        return Err(Reason::Malformed);
    }
    let protocol = (u32::from_be(header[1]) >> 8) as u8;
    let source = Address::from_words([header[2], header[3], header[4], header[5]]);
    let destination = Address::from_words([header[6], header[7], header[8], header[9]]);
    parse_transport(ctx, network, network + IPV6_HEADER, protocol, (source, destination))
}

#[inline(always)]
fn parse_transport(
    ctx: &TcContext,
    network: u32,
    transport: u32,
    protocol: u8,
    (source, destination): (Address, Address),
) -> Result<Packet, Reason> {
    let (protocol, tcp, ports) = match protocol {
        6 => {
            let header: [u32; 4] = read(ctx, transport).ok_or(Reason::Malformed)?;
            let flags = TcpFlags { bits: (u32::from_be(header[3]) >> 16) as u8 };
            (Protocol::Tcp, flags, header[0])
        }
        17 => {
            let header: [u32; 2] = read(ctx, transport).ok_or(Reason::Malformed)?;
            (Protocol::Udp, TcpFlags::default(), header[0])
        }
        // ICMP, SCTP and IPv6 extension headers are left alone.
        _ => return Err(Reason::NotAService),
    };
    let ports = u32::from_be(ports);
    let meta = PacketMeta {
        source,
        destination,
        source_port: (ports >> 16) as u16,
        destination_port: ports as u16,
        protocol,
        tcp,
    };
    Ok(Packet { meta, network, transport })
}

impl Packet {
    #[inline(always)]
    fn set_destination(&self, ctx: &TcContext, address: &Address, port: u16) -> Result<(), RewriteFailed> {
        let (meta, is_v4) = (&self.meta, self.meta.destination.is_v4());
        let at = self.network + if is_v4 { 16 } else { 24 };
        self.set_address(ctx, at, &meta.destination, address)?;
        self.set_port(ctx, self.transport + 2, meta.destination_port, port)
    }

    #[inline(always)]
    fn set_source(&self, ctx: &TcContext, address: &Address, port: u16) -> Result<(), RewriteFailed> {
        let (meta, is_v4) = (&self.meta, self.meta.source.is_v4());
        let at = self.network + if is_v4 { 12 } else { 8 };
        self.set_address(ctx, at, &meta.source, address)?;
        self.set_port(ctx, self.transport, meta.source_port, port)
    }

    #[inline(always)]
    fn set_address(
        &self,
        ctx: &TcContext,
        at: u32,
        old: &Address,
        new: &Address,
    ) -> Result<(), RewriteFailed> {
        let (checksum, flags) = self.checksum();
        let flags = flags | u64::from(BPF_F_PSEUDO_HDR);
        let skb = ctx.skb.skb;
        if old.is_v4() {
            let (from, to) = (old.v4_word(), new.v4_word());
            // SAFETY: the helpers check every offset against the packet.
            unsafe {
                succeeded(bpf_l4_csum_replace(skb, checksum, from.into(), to.into(), flags | 4))?;
                succeeded(bpf_l3_csum_replace(skb, self.network + 10, from.into(), to.into(), 4))?;
            }
            return store(ctx, at, &to);
        }
        let (mut from, mut to) = (old.words(), new.words());
        // SAFETY: both arrays are 16 bytes, as the helper is told; the other helper checks its offset.
        unsafe {
            let difference = bpf_csum_diff(from.as_mut_ptr(), 16, to.as_mut_ptr(), 16, 0);
            succeeded(bpf_l4_csum_replace(skb, checksum, 0, difference as u64, flags))?;
        }
        store(ctx, at, &to)
    }

    #[inline(always)]
    fn set_port(&self, ctx: &TcContext, at: u32, old: u16, new: u16) -> Result<(), RewriteFailed> {
        if old == new {
            return Ok(());
        }
        let (checksum, flags) = self.checksum();
        let (from, to) = (u64::from(old.to_be()), u64::from(new.to_be()));
        // SAFETY: the helper checks the offset against the packet.
        succeeded(unsafe { bpf_l4_csum_replace(ctx.skb.skb, checksum, from, to, flags | 2) })?;
        store(ctx, at, &new.to_be())
    }

    /// Where the transport checksum stands; for UDP, a checksum of 0 means that there is none and stays so.
    #[inline(always)]
    fn checksum(&self) -> (u32, u64) {
        match self.meta.protocol {
            Protocol::Udp => (self.transport + 6, BPF_F_MARK_MANGLED_0.into()),
            Protocol::Tcp | Protocol::Sctp => (self.transport + 16, 0),
        }
    }
}

#[inline(always)]
fn succeeded(result: i64) -> Result<(), RewriteFailed> {
    if result == 0 { Ok(()) } else { Err(RewriteFailed) }
}

#[inline(always)]
fn store<T>(ctx: &TcContext, at: u32, value: &T) -> Result<(), RewriteFailed> {
    // SAFETY: the value is as long as the helper is told; the helper checks the offset against the packet.
    succeeded(unsafe {
        bpf_skb_store_bytes(
            ctx.skb.skb,
            at,
            core::ptr::from_ref(value).cast_mut().cast(),
            size_of::<T>() as u32,
            0,
        )
    })
}

/// Brings the headers into the part of the packet that can be read directly, where they are not.
#[inline(always)]
fn reach(ctx: &TcContext, network: u32, header: u32) -> Result<(), Reason> {
    let wanted = network + header + 20;
    if ctx.data() + wanted as usize <= ctx.data_end() {
        return Ok(());
    }
    let length = ctx.len();
    if length < network + header {
        return Err(Reason::Malformed);
    }
    let pulled = if length < network + LONGEST { length } else { network + LONGEST };
    // SAFETY: the helper checks the length. Failing, it leaves what was there, and `read` finds out.
    unsafe { bpf_skb_pull_data(ctx.skb.skb, pulled) };
    Ok(())
}

/// The one place where packet memory is read: `T` at `offset`, if the packet reaches that far.
#[inline(always)]
fn read<T: Copy>(ctx: &TcContext, offset: u32) -> Option<T> {
    let start = ctx.data() + offset as usize;
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: the whole value lies before the packet's end, checked above; unaligned reads are allowed for.
    Some(unsafe { core::ptr::read_unaligned(start as *const T) })
}
