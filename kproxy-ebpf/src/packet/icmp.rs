//! ICMP and ICMPv6: what a message quotes is rewritten as the packet was, the other way round.

use aya_ebpf::{
    bindings::BPF_F_PSEUDO_HDR,
    helpers::{bpf_l3_csum_replace, bpf_l4_csum_replace},
    programs::TcContext,
};
use kproxy_common::{Address, Hook, IcmpKind, IcmpMeta, IcmpVerdict, Piece, Protocol, Reason, TcpFlags};

use super::{
    access::{RewriteFailed, reach, read, store, succeeded},
    apply::{DROP, next},
    device,
    parse::{IPV4_HEADER, IPV6_HEADER, Parsed},
    refuse::{fold, send_back},
    rewrite::{difference, replace_v6, sctp_checksum_change},
};
use crate::{count::count_reason, drops, maps};

/// An ICMP message's own header; ICMPv6's too.
const ICMP_HEADER: u32 = 8;
/// What is read at the most: two IPv4 headers with options, or two IPv6 headers, and a TCP header as far as its checksum;
/// a redirect's options between.
const LONGEST: u32 = 60 + 40 + 60 + 20;
/// How many extension headers of a quoted packet are followed.
const EXTENSION_HEADERS: u32 = 4;
/// Where the options of an ICMPv6 redirect begin (RFC 4861, 4.5).
const REDIRECT_OPTIONS: u32 = 40;
/// How many of these are looked at: there are two sorts.
const MOST_OPTIONS: u32 = 3;
/// The option that quotes a packet (RFC 4861, 4.6.3).
const REDIRECTED_HEADER: u8 = 4;
const HOP_LIMIT: u8 = 64;

/// A message, and where what it quotes lies. In a place of this processor: of what is read back from there the verifier
/// knows nothing, so that it walks what follows once, instead of once for each way in which a message can be read.
pub struct Message {
    pub meta: IcmpMeta,
    network: u32,
    transport: u32,
    /// Whether it is no fragment.
    is_whole: bool,
}

const _: () = assert!(size_of::<Message>() <= size_of::<[u64; 16]>(), "what the map `message` has room for");

/// Reads a message whose own addresses and offsets were read before.
#[inline(always)]
pub fn parse(ctx: &TcContext, parsed: &Parsed) -> Result<(), Reason> {
    let at = parsed.transport;
    reach(ctx, at + ICMP_HEADER, parsed.network + LONGEST)?;
    let head: [u32; 2] = read(ctx, at).ok_or(Reason::Malformed)?;
    let kind = (u32::from_be(head[0]) >> 24) as u8;
    let is_v4 = parsed.is_v4();
    let kind = match (is_v4, kind) {
        (true, 3 | 4 | 11 | 12) | (false, 1..=4) => IcmpKind::Error,
        (true, 5) | (false, 137) => IcmpKind::Redirect,
        (true, 8) | (false, 128) => IcmpKind::Echo,
        _ => IcmpKind::Other,
    };
    let message = Message::get().ok_or(Reason::TableError)?;
    message.meta.source = parsed.meta.source;
    message.meta.destination = parsed.meta.destination;
    message.meta.kind = kind;
    message.meta.quotes = false;
    let quoted = match kind {
        IcmpKind::Echo | IcmpKind::Other => return Ok(()),
        IcmpKind::Redirect if !is_v4 => redirected(ctx, at + REDIRECT_OPTIONS),
        IcmpKind::Error | IcmpKind::Redirect => Some(at + ICMP_HEADER),
    };
    if let Some(quoted) = quoted {
        read_quoted(ctx, message, quoted, is_v4);
    }
    Ok(())
}

/// Where an ICMPv6 redirect quotes the packet.
#[inline(always)]
fn redirected(ctx: &TcContext, mut at: u32) -> Option<u32> {
    let mut seen = 0;
    while seen < MOST_OPTIONS {
        let [kind, length]: [u8; 2] = read(ctx, at)?;
        if kind == REDIRECTED_HEADER {
            return Some(at + 8);
        }
        at += u32::from(length & 0xf) * 8;
        seen += 1;
    }
    None
}

/// Reads the quoted packet, if it is one that can belong to a flow.
#[inline(always)]
fn read_quoted(ctx: &TcContext, message: &mut Message, at: u32, is_v4: bool) {
    let headers = if is_v4 { quoted_v4(ctx, message, at) } else { quoted_v6(ctx, message, at) };
    let Some(Quoted { protocol, transport, is_whole }) = headers else {
        return;
    };
    message.meta.quoted.protocol = match protocol {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        132 => Protocol::Sctp,
        _ => return,
    };
    let Some(ports) = read::<u32>(ctx, transport) else {
        return;
    };
    let ports = u32::from_be(ports);
    message.meta.quoted.source_port = (ports >> 16) as u16;
    message.meta.quoted.destination_port = ports as u16;
    message.meta.quoted.tcp = TcpFlags::default();
    message.meta.quoted.piece = Piece::Whole;
    message.meta.quotes = true;
    message.network = at;
    message.transport = transport;
    message.is_whole = is_whole;
}

/// What a quoted packet's IP headers say, beside its addresses.
struct Quoted {
    protocol: u8,
    transport: u32,
    /// Whether it is no fragment.
    is_whole: bool,
}

#[inline(always)]
fn quoted_v4(ctx: &TcContext, message: &mut Message, at: u32) -> Option<Quoted> {
    let header = read::<[u32; 5]>(ctx, at)?;
    let first = u32::from_be(header[0]);
    let length = (first >> 24 & 0xf) * 4;
    let fragment = u32::from_be(header[1]) & 0x3fff;
    // A later fragment has no ports.
    if first >> 28 != 4 || length < IPV4_HEADER || fragment & 0x1fff != 0 {
        return None;
    }
    message.meta.quoted.source = Address::from_v4_word(header[3]);
    message.meta.quoted.destination = Address::from_v4_word(header[4]);
    let protocol = (u32::from_be(header[2]) >> 16) as u8;
    Some(Quoted { protocol, transport: at + length, is_whole: fragment == 0 })
}

#[inline(always)]
fn quoted_v6(ctx: &TcContext, message: &mut Message, at: u32) -> Option<Quoted> {
    let header = read::<[u32; 10]>(ctx, at)?;
    if u32::from_be(header[0]) >> 28 != 6 {
        return None;
    }
    message.meta.quoted.source = Address::from_words([header[2], header[3], header[4], header[5]]);
    message.meta.quoted.destination = Address::from_words([header[6], header[7], header[8], header[9]]);
    // Those would name a flow of IPv4; see `Parsed::has_mapped_address`.
    if message.meta.quoted.source.is_v4() || message.meta.quoted.destination.is_v4() {
        return None;
    }
    let mut protocol = (u32::from_be(header[1]) >> 8) as u8;
    let mut transport = at + IPV6_HEADER;
    let mut fragment = 0;
    let mut followed = 0;
    while followed < EXTENSION_HEADERS {
        // Hop-by-hop, routing, destination options, fragment (RFC 8200, 4).
        if !matches!(protocol, 0 | 43 | 60 | 44) {
            break;
        }
        let head = u32::from_be(read::<u32>(ctx, transport)?);
        if protocol == 44 {
            if head & 0xfff8 != 0 {
                return None;
            }
            fragment |= head & 1;
            transport += 8;
        } else {
            transport += ((head >> 16 & 0xff) + 1) * 8;
        }
        protocol = (head >> 24) as u8;
        // Further than this nothing is read.
        if transport > 0x300 {
            return None;
        }
        followed += 1;
    }
    Some(Quoted { protocol, transport, is_whole: fragment == 0 })
}

/// Does what was decided about a message.
#[inline(always)]
pub fn apply(ctx: &TcContext, parsed: &Parsed, message: &Message, hook: Hook, verdict: IcmpVerdict) -> i32 {
    match verdict {
        IcmpVerdict::Pass { reason } => next(reason),
        IcmpVerdict::Drop { reason } => drop(ctx, message, reason),
        IcmpVerdict::Answer => match answer(ctx, parsed).and_then(|()| send_back(ctx, parsed)) {
            Ok(action) => {
                count_reason(Reason::EchoAnswered);
                action
            }
            Err(RewriteFailed) => drop(ctx, message, Reason::RewriteFailed),
        },
        IcmpVerdict::Translate { address, port, client_port, outer } => {
            match translate(ctx, parsed, message, hook, &address, port, client_port, outer) {
                Ok(()) => next(Reason::IcmpTranslated),
                Err(RewriteFailed) => drop(ctx, message, Reason::RewriteFailed),
            }
        }
    }
}

#[inline(always)]
fn drop(ctx: &TcContext, message: &Message, reason: Reason) -> i32 {
    count_reason(reason);
    drops::message(&message.meta, device(ctx), reason as u32);
    DROP
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "a verdict's fields, one by one")]
fn translate(
    ctx: &TcContext,
    parsed: &Parsed,
    message: &Message,
    hook: Hook,
    address: &Address,
    port: u16,
    client_port: u16,
    outer: bool,
) -> Result<(), RewriteFailed> {
    let (is_v4, quoted) = (parsed.is_v4(), &message.meta.quoted);
    let checksum = parsed.transport + 2;
    let (source_at, destination_at) = if is_v4 { (12, 16) } else { (8, 24) };
    let ports = |source: u16, destination: u16| (u32::from(source) << 16 | u32::from(destination)).to_be();
    let or = |port: u16, old: u16| if port == 0 { old } else { port };
    let old_ports = ports(quoted.source_port, quoted.destination_port);
    let (outer_at, old_outer, quoted_at, old, new_ports) = match hook {
        Hook::Ingress => (
            destination_at,
            &message.meta.destination,
            source_at,
            &quoted.source,
            ports(port, or(client_port, quoted.destination_port)),
        ),
        Hook::Egress => (
            source_at,
            &message.meta.source,
            destination_at,
            &quoted.destination,
            ports(or(client_port, quoted.source_port), port),
        ),
    };
    let skb = ctx.skb.skb;
    let change = difference(old, address);
    let sum = message.checksum(ctx, parsed);
    let sum_after = message.checksum_after(&sum, change, old_ports, new_ports);
    // SAFETY: the helper checks the offset against the packet.
    succeeded(unsafe { bpf_l4_csum_replace(skb, checksum, old_ports.into(), new_ports.into(), 4) })?;
    store(ctx, message.transport, &new_ports, 0)?;
    if sum.at != 0 {
        let (from, to) = (u64::from(sum.value), u64::from(sum_after));
        // SAFETY: as above.
        succeeded(unsafe { bpf_l4_csum_replace(skb, checksum, from, to, 4) })?;
        if matches!(quoted.protocol, Protocol::Sctp) {
            store(ctx, sum.at, &sum_after, 0)?;
        } else {
            store(ctx, sum.at, &(sum_after as u16), 0)?;
        }
    }
    if is_v4 {
        let (from, to) = (u64::from(old.v4_word()), u64::from(address.v4_word()));
        // The quoted header's own checksum makes up for its address, so that the message's stays as it is.
        // SAFETY: as above.
        succeeded(unsafe { bpf_l3_csum_replace(skb, message.network + 10, from, to, 4) })?;
        store(ctx, message.network + quoted_at, &address.v4_word(), 0)?;
        if outer {
            let from = u64::from(old_outer.v4_word());
            // SAFETY: as above.
            succeeded(unsafe { bpf_l3_csum_replace(skb, parsed.network + 10, from, to, 4) })?;
            store(ctx, parsed.network + outer_at, &address.v4_word(), 0)?;
        }
        return Ok(());
    }
    replace_v6(ctx, checksum, change, 0)?;
    store(ctx, message.network + quoted_at, address, 0)?;
    if outer {
        replace_v6(ctx, checksum, difference(old_outer, address), BPF_F_PSEUDO_HDR.into())?;
        store(ctx, parsed.network + outer_at, address, 0)?;
    }
    Ok(())
}

/// The transport checksum that a message quotes.
struct Checksum {
    /// Where it lies; 0 if it is not quoted, or there is none.
    at: u32,
    /// What stands there. SCTP's has 32 bits, the others' 16.
    value: u32,
    /// How long the quoted packet was, from its transport header on.
    length: u32,
}

impl Message {
    /// What was read.
    #[inline(always)]
    pub fn get() -> Option<&'static mut Self> {
        let place = maps::MESSAGE.get_ptr_mut(0)?.cast::<Self>();
        // SAFETY: the element is this CPU's, as long as the structure, and only one program runs on it at a time.
        Some(unsafe { &mut *place })
    }

    #[inline(always)]
    fn checksum(&self, ctx: &TcContext, parsed: &Parsed) -> Checksum {
        let (is_v4, transport) = (parsed.is_v4(), self.transport);
        let none = Checksum { at: 0, value: 0, length: 0 };
        let (at, size, value) = match self.meta.quoted.protocol {
            Protocol::Tcp => (transport + 16, 2, read::<u16>(ctx, transport + 16).map(u32::from)),
            Protocol::Udp => (transport + 6, 2, read::<u16>(ctx, transport + 6).map(u32::from)),
            Protocol::Sctp => (transport + 8, 4, read::<u32>(ctx, transport + 8)),
        };
        let Some(value) = value else {
            return none;
        };
        // There is none (UDP), or a device was still to fill it in (SCTP).
        if value == 0 && !matches!(self.meta.quoted.protocol, Protocol::Tcp) {
            return none;
        }
        // SCTP's covers all fragments, of which one does not tell the length.
        if matches!(self.meta.quoted.protocol, Protocol::Sctp) && !self.is_whole {
            return none;
        }
        let (Some(outer), Some(inner)) =
            (length(ctx, parsed.network, is_v4), length(ctx, self.network, is_v4))
        else {
            return none;
        };
        // What lies behind the packet's end is not the message's.
        if at + size > parsed.network + outer {
            return none;
        }
        Checksum { at, value, length: inner.wrapping_sub(transport.wrapping_sub(self.network)) }
    }

    /// The checksum, once an address before it has changed by this difference, and the ports.
    #[inline(always)]
    fn checksum_after(&self, checksum: &Checksum, difference: i64, old_ports: u32, new_ports: u32) -> u32 {
        if matches!(self.meta.quoted.protocol, Protocol::Sctp) {
            return checksum.value ^ sctp_checksum_change(old_ports ^ new_ports, checksum.length);
        }
        // In one's complement, carries beyond 32 bits added in where it is folded (RFC 1624).
        let sum = u64::from(!(checksum.value as u16))
            + u64::from(difference as u32)
            + u64::from(!old_ports)
            + u64::from(new_ports);
        let sum = (sum & 0xffff_ffff) + (sum >> 32);
        match (!fold((sum & 0xffff) as u32 + (sum >> 16) as u32), self.meta.quoted.protocol) {
            // 0 would say that it has none.
            (0, Protocol::Udp) => 0xffff,
            (sum, _) => sum.into(),
        }
    }
}

/// How long an IP packet says that it is, its header included.
#[inline(always)]
fn length(ctx: &TcContext, network: u32, is_v4: bool) -> Option<u32> {
    let header: [u16; 3] = read(ctx, network)?;
    let [_, v4, v6] = header.map(u16::from_be);
    Some(if is_v4 { v4.into() } else { u32::from(v6) + IPV6_HEADER })
}

/// Makes an echo request its own reply. Addresses that change places leave all sums as they are.
#[inline(always)]
fn answer(ctx: &TcContext, parsed: &Parsed) -> Result<(), RewriteFailed> {
    let Parsed { meta, network, transport, .. } = parsed;
    let is_v4 = parsed.is_v4();
    // The first word of the message is type and code: 8 or 128 becomes 0 or 129.
    let (request, reply): (u16, u16) = if is_v4 { (0x0800, 0) } else { (0x8000, 0x8100) };
    let (from, to) = (u64::from(request.to_be()), u64::from(reply.to_be()));
    // SAFETY: the helper checks the offset against the packet.
    succeeded(unsafe { bpf_l4_csum_replace(ctx.skb.skb, transport + 2, from, to, 2) })?;
    store(ctx, *transport, &((reply >> 8) as u8), 0)?;
    if is_v4 {
        let old: u16 = read(ctx, network + 8).ok_or(RewriteFailed)?;
        let new = old.to_be() & 0xff | u16::from(HOP_LIMIT) << 8;
        // SAFETY: as above.
        succeeded(unsafe {
            bpf_l3_csum_replace(ctx.skb.skb, network + 10, old.into(), new.to_be().into(), 2)
        })?;
        store(ctx, network + 8, &HOP_LIMIT, 0)?;
        return store(ctx, network + 12, &[meta.destination.v4_word(), meta.source.v4_word()], 0);
    }
    store(ctx, network + 7, &HOP_LIMIT, 0)?;
    store(ctx, network + 8, &[meta.destination, meta.source], 0)
}
