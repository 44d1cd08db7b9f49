//! Headers that are seldom: IPv4 options, IPv6 extension headers, fragments, SCTP, and protocols that no Service has.

use aya_ebpf::programs::TcContext;
use kproxy_common::{
    Address, Hook, PacketVerdict, Piece, Protocol, Quick, Reason, TcpFlags, follow_fragment,
    on_other_protocol, quick_egress, quick_ingress,
};

use super::{
    Part,
    access::read,
    apply::{leave, next},
    call,
    parse::{IPV4_HEADER, IPV6_HEADER, Parsed, Unusual, Version, ip_version, reach_all, transport},
    steer,
};
use crate::{kernel::KERNEL, mark};

/// How many extension headers are followed: each of those that Linux itself sends, and one more.
const EXTENSION_HEADERS: u32 = 6;

/// What stands behind all IP headers.
struct Payload {
    protocol: u8,
    fragment: Option<Fragment>,
}

struct Fragment {
    id: u32,
    is_first: bool,
}

/// Reads the packet, and goes on in the part that decides.
#[inline(always)]
pub fn go_on(ctx: &TcContext, hook: Hook) -> i32 {
    let Some(parsed) = Parsed::get() else {
        return next(Reason::TableError);
    };
    let Payload { protocol, fragment } = match headers(ctx, parsed) {
        Ok(payload) => payload,
        Err(reason) => return next(reason),
    };
    let icmp = match hook {
        Hook::Ingress => Part::InIcmp,
        Hook::Egress => Part::OutIcmp,
    };
    match (protocol, &fragment) {
        (6 | 17 | 132, _) => {}
        (1 | 58, None) => return call(ctx, icmp),
        _ => {
            let verdict = on_other_protocol(&KERNEL, &parsed.meta.destination);
            return leave(ctx, parsed, verdict);
        }
    }
    let piece = match &fragment {
        None => Piece::Whole,
        Some(Fragment { is_first: true, .. }) => Piece::First,
        Some(Fragment { is_first: false, .. }) => Piece::Later,
    };
    parsed.meta.piece = piece;
    if !matches!(piece, Piece::Later) {
        if let Err(reason) = transport(ctx, parsed, protocol) {
            return next(reason);
        }
    } else {
        parsed.meta.tcp = TcpFlags::of_sctp_chunk(0);
        parsed.meta.protocol = match protocol {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            _ => Protocol::Sctp,
        };
    }
    if let Some(Fragment { id, .. }) = fragment
        && let Some(verdict) = follow_fragment(&KERNEL, &mut parsed.meta, hook, id)
    {
        return leave(ctx, parsed, verdict);
    }
    let (quick, known, new) = match hook {
        Hook::Ingress => (quick_ingress(&KERNEL, &parsed.meta), Part::InKnown, Part::InNew),
        Hook::Egress => (quick_egress(&KERNEL, &parsed.meta), Part::OutKnown, Part::OutNew),
    };
    match quick.of_any_form() {
        Quick::New => call(ctx, new),
        Quick::Node if mark::is_translated(ctx) => next(Reason::NotAService),
        Quick::Node => call(ctx, Part::OutNode),
        Quick::Known => call(ctx, known),
        Quick::Verdict(PacketVerdict::Pass { reason })
            if matches!(hook, Hook::Ingress) && steer::routes_by_source() =>
        {
            parsed.reason = reason;
            call(ctx, Part::InAnswer)
        }
        Quick::Verdict(verdict) => leave(ctx, parsed, verdict),
    }
}

#[inline(always)]
fn headers(ctx: &TcContext, parsed: &mut Parsed) -> Result<Payload, Reason> {
    match ip_version(ctx) {
        Ok(Version::V4) => headers_v4(ctx, parsed),
        Ok(Version::V6) => headers_v6(ctx, parsed),
        Err(Unusual::Nobodys(reason)) => Err(reason),
        Err(Unusual::Odd | Unusual::Icmp) => Err(Reason::Unparsed),
    }
}

#[inline(always)]
fn headers_v4(ctx: &TcContext, parsed: &mut Parsed) -> Result<Payload, Reason> {
    let network = parsed.network;
    reach_all(ctx, network, IPV4_HEADER)?;
    let header: [u32; 5] = read(ctx, network).ok_or(Reason::Malformed)?;
    let first = u32::from_be(header[0]);
    let length = ((first >> 24) & 0xf) * 4;
    if first >> 28 != 4 || length < IPV4_HEADER {
        return Err(Reason::Malformed);
    }
    parsed.meta.source = Address::from_v4_word(header[3]);
    parsed.meta.destination = Address::from_v4_word(header[4]);
    parsed.transport = network + length;
    let second = u32::from_be(header[1]);
    let is_fragment = second & 0x3fff != 0;
    let fragment = Fragment { id: header[1] & 0xffff_0000_u32.to_be(), is_first: second & 0x1fff == 0 };
    let protocol = (u32::from_be(header[2]) >> 16) as u8;
    Ok(Payload { protocol, fragment: if is_fragment { Some(fragment) } else { None } })
}

#[inline(always)]
fn headers_v6(ctx: &TcContext, parsed: &mut Parsed) -> Result<Payload, Reason> {
    let network = parsed.network;
    reach_all(ctx, network, IPV6_HEADER)?;
    let header: [u32; 10] = read(ctx, network).ok_or(Reason::Malformed)?;
    if u32::from_be(header[0]) >> 28 != 6 {
        return Err(Reason::Malformed);
    }
    parsed.meta.source = Address::from_words([header[2], header[3], header[4], header[5]]);
    parsed.meta.destination = Address::from_words([header[6], header[7], header[8], header[9]]);
    if parsed.has_mapped_address() {
        return Err(Reason::Malformed);
    }
    let mut protocol = (u32::from_be(header[1]) >> 8) as u8;
    let mut at = network + IPV6_HEADER;
    let mut fragment = None;
    let mut followed = 0;
    while followed < EXTENSION_HEADERS {
        match protocol {
            // Hop-by-hop, routing, destination options (RFC 8200, 4): the length is in units of 8, without the first.
            0 | 43 | 60 => {
                let words: u32 = read(ctx, at).ok_or(Reason::Unparsed)?;
                let words = u32::from_be(words);
                protocol = (words >> 24) as u8;
                at += ((words >> 16) as u8 as u32 + 1) * 8;
            }
            44 => {
                let words: [u32; 2] = read(ctx, at).ok_or(Reason::Unparsed)?;
                let head = u32::from_be(words[0]);
                protocol = (head >> 24) as u8;
                let is_first = head & 0xfff8 == 0;
                // A whole datagram can have this header too (RFC 8200, 4.5: an atomic fragment).
                if !is_first || head & 1 != 0 {
                    fragment = Some(Fragment { id: words[1], is_first });
                }
                at += 8;
                if !is_first {
                    break;
                }
            }
            _ => break,
        }
        // Further than this nothing is read.
        if at > 0x300 {
            return Err(Reason::Unparsed);
        }
        followed += 1;
    }
    parsed.transport = at;
    Ok(Payload { protocol, fragment })
}
