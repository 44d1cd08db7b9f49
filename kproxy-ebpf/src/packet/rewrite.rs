//! Writing other addresses and ports into a packet. Checksums change only by the helpers, which know what the device
//! has checked or is still to fill in.

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM},
    helpers::{bpf_csum_diff, bpf_csum_update, bpf_l3_csum_replace, bpf_l4_csum_replace},
    programs::TcContext,
};
use kproxy_common::{Address, PacketMeta, Piece, Protocol};

use super::{
    access::{RewriteFailed, read, store, succeeded},
    parse::{IPV6_HEADER, Parsed},
};

/// A packet to be rewritten.
pub struct Rewrite<'a> {
    ctx: &'a TcContext,
    meta: &'a PacketMeta,
    network: u32,
    transport: u32,
    /// Whether it can be something else than a whole TCP or UDP packet.
    is_any: bool,
}

impl<'a> Rewrite<'a> {
    /// A whole TCP or UDP packet.
    #[inline(always)]
    pub fn quick(ctx: &'a TcContext, parsed: &'a Parsed) -> Self {
        let Parsed { meta, network, transport, .. } = parsed;
        Self { ctx, meta, network: *network, transport: *transport, is_any: false }
    }

    /// Any packet that was parsed.
    #[inline(always)]
    pub fn any(ctx: &'a TcContext, parsed: &'a Parsed) -> Self {
        Self { is_any: true, ..Self::quick(ctx, parsed) }
    }

    #[inline(always)]
    fn is_later_fragment(&self) -> bool {
        self.is_any && matches!(self.meta.piece, Piece::Later)
    }
}

/// Another destination, and another source port unless it is 0.
#[inline(always)]
pub fn set_destination(
    packet: &Rewrite<'_>,
    address: &Address,
    port: u16,
    client_port: u16,
) -> Result<(), RewriteFailed> {
    let meta = packet.meta;
    let at = packet.network + if meta.destination.is_v4() { 16 } else { 24 };
    set_address(packet, at, &meta.destination, address)?;
    let source = if client_port == 0 { meta.source_port } else { client_port };
    set_ports(packet, source, port)
}

/// Another source, and another destination port unless it is 0.
#[inline(always)]
pub fn set_source(
    packet: &Rewrite<'_>,
    address: &Address,
    port: u16,
    client_port: u16,
) -> Result<(), RewriteFailed> {
    let meta = packet.meta;
    let at = packet.network + if meta.source.is_v4() { 12 } else { 8 };
    set_address(packet, at, &meta.source, address)?;
    let destination = if client_port == 0 { meta.destination_port } else { client_port };
    set_ports(packet, port, destination)
}

#[inline(always)]
fn set_address(packet: &Rewrite<'_>, at: u32, old: &Address, new: &Address) -> Result<(), RewriteFailed> {
    let checksum = checksum(packet);
    if old.is_v4() {
        let (from, to) = (u64::from(old.v4_word()), u64::from(new.v4_word()));
        // SAFETY: the helpers check every offset against the packet.
        unsafe {
            if let Some((checksum, flags)) = checksum {
                let flags = flags | u64::from(BPF_F_PSEUDO_HDR) | 4;
                succeeded(bpf_l4_csum_replace(packet.ctx.skb.skb, checksum, from, to, flags))?;
            }
            succeeded(bpf_l3_csum_replace(packet.ctx.skb.skb, packet.network + 10, from, to, 4))?;
        }
        return store(packet.ctx, at, &new.v4_word(), 0);
    }
    match checksum {
        Some((checksum, flags)) => {
            let flags = flags | u64::from(BPF_F_PSEUDO_HDR);
            replace_v6(packet.ctx, checksum, difference(old, new), flags)?;
            store(packet.ctx, at, new, 0)
        }
        // Nothing in this packet makes up for the address: what the device has summed up must.
        None => store(packet.ctx, at, new, BPF_F_RECOMPUTE_CSUM.into()),
    }
}

/// What an address adds to a sum in the place of another.
#[inline(always)]
pub fn difference(old: &Address, new: &Address) -> i64 {
    let (mut from, mut to) = (old.words(), new.words());
    // SAFETY: both arrays are 16 bytes, as the helper is told, which does not write.
    unsafe { bpf_csum_diff(from.as_mut_ptr(), 16, to.as_mut_ptr(), 16, 0) }
}

/// Makes up for an IPv6 address that has changed by this much, in the transport checksum at `checksum`.
#[inline(always)]
pub fn replace_v6(ctx: &TcContext, checksum: u32, difference: i64, flags: u64) -> Result<(), RewriteFailed> {
    // SAFETY: the helpers check offset and packet.
    unsafe {
        succeeded(bpf_l4_csum_replace(ctx.skb.skb, checksum, 0, difference as u64, flags))?;
        if flags & u64::from(BPF_F_PSEUDO_HDR) != 0 {
            // The helper takes the address to be outside of what a device sums up (CHECKSUM_COMPLETE), as IPv4's
            // header is by its own checksum. In IPv6 address and checksum are both inside and make up for each other:
            // this takes back what the helper took off. It fails where there is no such sum, as it should. (Linux 6.16
            // has BPF_F_IPV6 for it, older kernels refuse that.)
            bpf_csum_update(ctx.skb.skb, difference as u32);
        }
    }
    Ok(())
}

#[inline(always)]
fn set_ports(packet: &Rewrite<'_>, source: u16, destination: u16) -> Result<(), RewriteFailed> {
    let meta = packet.meta;
    if packet.is_later_fragment() {
        return Ok(());
    }
    let both = |source: u16, destination: u16| (u32::from(source) << 16 | u32::from(destination)).to_be();
    let (old, new) = (both(meta.source_port, meta.destination_port), both(source, destination));
    if old == new {
        return Ok(());
    }
    match checksum(packet) {
        Some((checksum, flags)) => {
            let (from, to) = (u64::from(old), u64::from(new));
            // SAFETY: the helper checks the offset against the packet.
            succeeded(unsafe { bpf_l4_csum_replace(packet.ctx.skb.skb, checksum, from, to, flags | 4) })?;
            store(packet.ctx, packet.transport, &new, 0)
        }
        None => set_sctp_ports(packet, old, new),
    }
}

/// Where the transport checksum stands, if it covers the addresses and is in this packet; for UDP, a checksum of 0
/// means that there is none and stays so.
#[inline(always)]
fn checksum(packet: &Rewrite<'_>) -> Option<(u32, u64)> {
    if packet.is_later_fragment() || packet.is_any && matches!(packet.meta.protocol, Protocol::Sctp) {
        return None;
    }
    Some(match packet.meta.protocol {
        Protocol::Udp => (packet.transport + 6, BPF_F_MARK_MANGLED_0.into()),
        Protocol::Tcp | Protocol::Sctp => (packet.transport + 16, 0),
    })
}

/// SCTP's checksum is a CRC over the whole packet, which changes with the ports alone (RFC 9260, 6.8).
#[inline(always)]
fn set_sctp_ports(packet: &Rewrite<'_>, old: u32, new: u32) -> Result<(), RewriteFailed> {
    let Rewrite { ctx, network, transport, .. } = packet;
    let length = if packet.meta.source.is_v4() {
        let header: [u16; 2] = read(ctx, *network).ok_or(RewriteFailed)?;
        u32::from(u16::from_be(header[1]))
    } else {
        let header: [u16; 3] = read(ctx, *network).ok_or(RewriteFailed)?;
        u32::from(u16::from_be(header[2])) + IPV6_HEADER
    };
    let length = length.wrapping_sub(transport.wrapping_sub(*network));
    let checksum: u32 = read(ctx, transport + 8).ok_or(RewriteFailed)?;
    let recompute = BPF_F_RECOMPUTE_CSUM.into();
    // 0: the device is still to fill it in.
    if checksum != 0 {
        let changed = checksum ^ sctp_checksum_change(old ^ new, length);
        store(ctx, transport + 8, &changed, recompute)?;
    }
    store(ctx, *transport, &new, recompute)
}

/// [`kproxy_common::crc32c_change`] as a global function: the verifier checks its loops once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sctp_checksum_change(difference: u32, length: u32) -> u32 {
    kproxy_common::crc32c_change(difference, length)
}
