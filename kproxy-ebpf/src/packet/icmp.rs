//! ICMP and ICMPv6: what a message quotes is rewritten as the packet was, the other way round.

use aya_ebpf::{
    bindings::BPF_F_PSEUDO_HDR,
    helpers::{bpf_l3_csum_replace, bpf_l4_csum_replace},
    programs::TcContext,
};
use kproxy_common::{Address, Hook, IcmpKind, IcmpMeta, IcmpVerdict, PacketMeta, Protocol, Reason, TcpFlags};

use super::{
    access::{RewriteFailed, reach, read, store, succeeded},
    apply::{DROP, next},
    device,
    parse::{IPV4_HEADER, IPV6_HEADER, Parsed},
    refuse::send_back,
    rewrite::replace_v6,
};
use crate::{count::count_reason, drops};

/// An ICMP message's own header; ICMPv6's too.
const ICMP_HEADER: u32 = 8;
/// What is read at the most: two IPv4 headers with options, or two IPv6 headers, and ports; a redirect's options between.
const LONGEST: u32 = 60 + 40 + 60 + 8;
/// Where the options of an ICMPv6 redirect begin (RFC 4861, 4.5).
const REDIRECT_OPTIONS: u32 = 40;
/// How many of these are looked at: there are two sorts.
const MOST_OPTIONS: u32 = 3;
/// The option that quotes a packet (RFC 4861, 4.6.3).
const REDIRECTED_HEADER: u8 = 4;
const HOP_LIMIT: u8 = 64;

/// A message, and where what it quotes lies.
pub struct Message {
    pub meta: IcmpMeta,
    network: u32,
    transport: u32,
}

/// Reads a message whose own addresses and offsets were read before.
#[inline(always)]
pub fn parse(ctx: &TcContext, parsed: &Parsed) -> Result<Message, Reason> {
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
    let nothing = PacketMeta {
        source: parsed.meta.source,
        destination: parsed.meta.destination,
        source_port: 0,
        destination_port: 0,
        protocol: Protocol::Udp,
        tcp: TcpFlags::default(),
        is_later_fragment: false,
    };
    let (source, destination) = (parsed.meta.source, parsed.meta.destination);
    let mut message = Message {
        meta: IcmpMeta { source, destination, kind, quoted: nothing, quotes: false },
        network: 0,
        transport: 0,
    };
    match kind {
        IcmpKind::Echo | IcmpKind::Other => {}
        IcmpKind::Error => read_quoted(ctx, &mut message, at + ICMP_HEADER, is_v4),
        IcmpKind::Redirect if is_v4 => read_quoted(ctx, &mut message, at + ICMP_HEADER, is_v4),
        IcmpKind::Redirect => {
            if let Some(quoted) = redirected(ctx, at + REDIRECT_OPTIONS) {
                read_quoted(ctx, &mut message, quoted, is_v4);
            }
        }
    }
    Ok(message)
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
    let (protocol, transport) = if is_v4 {
        let Some(header) = read::<[u32; 5]>(ctx, at) else {
            return;
        };
        let first = u32::from_be(header[0]);
        let length = (first >> 24 & 0xf) * 4;
        // A later fragment has no ports.
        if first >> 28 != 4 || length < IPV4_HEADER || u32::from_be(header[1]) & 0x1fff != 0 {
            return;
        }
        message.meta.quoted.source = Address::from_v4_word(header[3]);
        message.meta.quoted.destination = Address::from_v4_word(header[4]);
        ((u32::from_be(header[2]) >> 16) as u8, at + length)
    } else {
        let Some(header) = read::<[u32; 10]>(ctx, at) else {
            return;
        };
        if u32::from_be(header[0]) >> 28 != 6 {
            return;
        }
        message.meta.quoted.source = Address::from_words([header[2], header[3], header[4], header[5]]);
        message.meta.quoted.destination = Address::from_words([header[6], header[7], header[8], header[9]]);
        ((u32::from_be(header[1]) >> 8) as u8, at + IPV6_HEADER)
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
    message.meta.quotes = true;
    message.network = at;
    message.transport = transport;
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
    let (outer_at, old_outer, quoted_at, old_quoted, new_ports) = match hook {
        Hook::Ingress => (
            destination_at,
            &parsed.meta.destination,
            source_at,
            &quoted.source,
            ports(port, or(client_port, quoted.destination_port)),
        ),
        Hook::Egress => (
            source_at,
            &parsed.meta.source,
            destination_at,
            &quoted.destination,
            ports(or(client_port, quoted.source_port), port),
        ),
    };
    let skb = ctx.skb.skb;
    // SAFETY: the helper checks the offset against the packet.
    succeeded(unsafe { bpf_l4_csum_replace(skb, checksum, old_ports.into(), new_ports.into(), 4) })?;
    store(ctx, message.transport, &new_ports, 0)?;
    if is_v4 {
        let (from, to) = (u64::from(old_quoted.v4_word()), u64::from(address.v4_word()));
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
    replace_v6(ctx, checksum, old_quoted, address, 0)?;
    store(ctx, message.network + quoted_at, address, 0)?;
    if outer {
        replace_v6(ctx, checksum, old_outer, address, BPF_F_PSEUDO_HDR.into())?;
        store(ctx, parsed.network + outer_at, address, 0)?;
    }
    Ok(())
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
