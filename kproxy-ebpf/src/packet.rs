//! The packet hooks. Each is in parts, of which the first is attached and goes on in others by tail calls. The first serves
//! packets in the middle of flows, and those that are nobody's business. Others have what changes a flow, what begins one,
//! headers that are seldom (options, extension headers, fragments, SCTP), and ICMP.
//!
//! What calls a part calls no function, and what calls functions calls no part: processors other than x86-64 do not allow both in
//! one program before Linux 6.0.

mod access;
mod apply;
mod icmp;
mod odd;
mod parse;
mod refuse;
mod rewrite;
mod steer;

use aya_ebpf::{macros::classifier, programs::TcContext};
use kproxy_common::{
    Hook, New, PacketVerdict, Quick, Reason, answered_frontend, known_egress, known_ingress, new_egress,
    new_ingress, node_egress, on_icmp, open_ingress, quick_egress, quick_ingress,
};

use self::{
    apply::{apply, apply_quickly, drop, leave, next},
    icmp::Message,
    parse::{Parsed, Unusual},
};
use crate::{
    kernel::{KERNEL, Kernel},
    maps, mark,
};

const ETHERNET_HEADER: u32 = 14;

/// Places in the map `programs`; `kproxy_common::PACKET_PARTS` says which program stands where.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Part {
    InKnown = 0,
    InNew = 1,
    InOpen = 2,
    Refused = 3,
    InOdd = 4,
    InIcmp = 5,
    OutKnown = 6,
    OutNew = 7,
    OutOdd = 8,
    OutIcmp = 9,
    Drop = 10,
    InAnswer = 11,
    OutNode = 12,
}

/// Into any device with Ethernet headers.
#[classifier]
pub fn in_eth(ctx: TcContext) -> i32 {
    ingress(&ctx, ETHERNET_HEADER)
}

/// Into any device whose packets begin with the IP header.
#[classifier]
pub fn in_ip(ctx: TcContext) -> i32 {
    ingress(&ctx, 0)
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

/// Of an ingress hook: packets of a flow, also those that end it.
#[classifier]
pub fn in_known(ctx: TcContext) -> i32 {
    let Some(parsed) = Parsed::get() else {
        return next(Reason::TableError);
    };
    parsed.meta.has_payload = parse::has_payload(&ctx, parsed);
    let verdict = known_ingress(&KERNEL, &parsed.meta);
    if let PacketVerdict::SetDestination { address, .. } = &verdict
        && steer::routes_by_source()
    {
        // A masked client's answer: it would leave by what its mask is behind.
        steer::back(&ctx, &parsed.meta.source, &parsed.meta.destination, address);
    }
    apply(&ctx, parsed, verdict)
}

/// Of an ingress hook: packets without a flow.
#[classifier]
pub fn in_new(ctx: TcContext) -> i32 {
    let Some(parsed) = Parsed::get() else {
        return next(Reason::TableError);
    };
    match new_ingress(&KERNEL, &parsed.meta, device(&ctx)) {
        New::Open(balance) => {
            parsed.balance = balance;
            call(&ctx, Part::InOpen)
        }
        New::Verdict(PacketVerdict::Refuse { reason }) => {
            parsed.reason = reason;
            call(&ctx, Part::Refused)
        }
        New::Verdict(verdict) => leave(&ctx, parsed, verdict),
    }
}

/// Of an ingress hook, on nodes that route by source: packets without a flow here, which may be answers.
#[classifier]
pub fn in_answer(ctx: TcContext) -> i32 {
    let Some(parsed) = Parsed::get() else {
        return next(Reason::TableError);
    };
    if let Some(frontend) = answered_frontend(&KERNEL, &parsed.meta) {
        steer::back(&ctx, &parsed.meta.source, &frontend, &parsed.meta.destination);
    }
    next(parsed.reason)
}

/// Of an ingress hook: packets that open a flow.
#[classifier]
pub fn in_open(ctx: TcContext) -> i32 {
    let Some(parsed) = Parsed::get() else {
        return next(Reason::TableError);
    };
    let verdict = open_ingress(&KERNEL, &parsed.meta, device(&ctx), &parsed.balance);
    apply(&ctx, parsed, verdict)
}

/// Of both hooks: packets that are refused.
#[classifier]
pub fn refused(ctx: TcContext) -> i32 {
    match Parsed::get() {
        Some(parsed) => refuse::refuse(&ctx, parsed),
        None => next(Reason::TableError),
    }
}

/// Of both hooks: packets that are dropped by parts that cannot tell.
#[classifier]
pub fn dropped(ctx: TcContext) -> i32 {
    match Parsed::get() {
        Some(parsed) => drop(&ctx, parsed, parsed.reason),
        None => next(Reason::TableError),
    }
}

/// Of an egress hook: packets of a flow, also those that establish it or end it, or are the first to be masked.
#[classifier]
pub fn out_known(ctx: TcContext) -> i32 {
    let Some(parsed) = Parsed::get() else {
        return next(Reason::TableError);
    };
    parsed.meta.has_payload = parse::has_payload(&ctx, parsed);
    apply(&ctx, parsed, known_egress(&Kernel::of(ctx.skb.skb), &parsed.meta, device(&ctx)))
}

/// Of an egress hook: what this host sends to services.
#[classifier]
pub fn out_new(ctx: TcContext) -> i32 {
    let Some(parsed) = Parsed::get() else {
        return next(Reason::TableError);
    };
    match new_egress(&KERNEL, &parsed.meta) {
        PacketVerdict::Refuse { reason } => {
            parsed.reason = reason;
            call(&ctx, Part::Refused)
        }
        verdict => leave(&ctx, parsed, verdict),
    }
}

/// Of an egress hook: what may be the beginning of a flow of the node.
#[classifier]
pub fn out_node(ctx: TcContext) -> i32 {
    let Some(parsed) = Parsed::get() else {
        return next(Reason::TableError);
    };
    apply(&ctx, parsed, node_egress(&Kernel::of(ctx.skb.skb), &parsed.meta))
}

/// Of an ingress hook: headers that are seldom.
#[classifier]
pub fn in_odd(ctx: TcContext) -> i32 {
    odd::go_on(&ctx, Hook::Ingress)
}

/// Of an egress hook: headers that are seldom.
#[classifier]
pub fn out_odd(ctx: TcContext) -> i32 {
    odd::go_on(&ctx, Hook::Egress)
}

/// Of an ingress hook: ICMP and ICMPv6.
#[classifier]
pub fn in_icmp(ctx: TcContext) -> i32 {
    messages(&ctx, Hook::Ingress)
}

/// Of an egress hook: ICMP and ICMPv6.
#[classifier]
pub fn out_icmp(ctx: TcContext) -> i32 {
    messages(&ctx, Hook::Egress)
}

#[inline(always)]
fn ingress(ctx: &TcContext, network: u32) -> i32 {
    let Some(parsed) = Parsed::new(network, Hook::Ingress) else {
        return next(Reason::TableError);
    };
    match parse::quick(ctx, parsed) {
        Ok(()) => match quick_ingress(&KERNEL, &parsed.meta) {
            Quick::Verdict(verdict) => {
                if steer::routes_by_source() {
                    match verdict {
                        PacketVerdict::Pass { reason } => {
                            parsed.reason = reason;
                            return call(ctx, Part::InAnswer);
                        }
                        PacketVerdict::SetDestination { .. } => return call(ctx, Part::InKnown),
                        _ => {}
                    }
                }
                apply_quickly(ctx, parsed, verdict)
            }
            // Of a node's flow nothing begins here.
            Quick::Known | Quick::Node => call(ctx, Part::InKnown),
            Quick::New => call(ctx, Part::InNew),
        },
        Err(Unusual::Nobodys(reason)) => next(reason),
        Err(Unusual::Odd) => call(ctx, Part::InOdd),
        Err(Unusual::Icmp) => call(ctx, Part::InIcmp),
    }
}

#[inline(always)]
fn egress(ctx: &TcContext, network: u32) -> i32 {
    let Some(parsed) = Parsed::new(network, Hook::Egress) else {
        return next(Reason::TableError);
    };
    match parse::quick(ctx, parsed) {
        Ok(()) => match quick_egress(&KERNEL, &parsed.meta) {
            Quick::Verdict(verdict) => apply_quickly(ctx, parsed, verdict),
            Quick::Known => call(ctx, Part::OutKnown),
            Quick::New => call(ctx, Part::OutNew),
            // On a device below it may be what was masqueraded above.
            Quick::Node if mark::is_translated(ctx) => next(Reason::NotAService),
            Quick::Node => call(ctx, Part::OutNode),
        },
        Err(Unusual::Nobodys(reason)) => next(reason),
        Err(Unusual::Odd) => call(ctx, Part::OutOdd),
        Err(Unusual::Icmp) => call(ctx, Part::OutIcmp),
    }
}

#[inline(always)]
fn messages(ctx: &TcContext, hook: Hook) -> i32 {
    let Some(parsed) = Parsed::get() else {
        return next(Reason::TableError);
    };
    if let Err(reason) = icmp::parse(ctx, parsed) {
        return next(reason);
    }
    let Some(message) = Message::get() else {
        return next(Reason::TableError);
    };
    let verdict = on_icmp(&KERNEL, &message.meta, hook);
    icmp::apply(ctx, parsed, message, hook, verdict)
}

/// Goes on in another part. Where that is missing, the packet is left alone.
#[inline(always)]
fn call(ctx: &TcContext, part: Part) -> i32 {
    go_to(ctx, part);
    next(Reason::ProgramMissing)
}

/// Goes on in another part, and comes back only where that is missing.
#[inline(always)]
fn go_to(ctx: &TcContext, part: Part) {
    // SAFETY: nothing of this program waits for the other's end.
    unsafe { maps::PROGRAMS.tail_call(ctx, part as u32) };
}

#[inline(always)]
fn device(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid for the program's run.
    unsafe { (*ctx.skb.skb).ifindex }
}
