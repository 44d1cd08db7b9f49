//! What comes of a verdict.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    programs::TcContext,
};
use kproxy_common::{PacketVerdict, Reason};

use super::{
    Part,
    access::RewriteFailed,
    device, go_to,
    parse::Parsed,
    rewrite::{Rewrite, set_destination, set_source},
};
use crate::{count::count_reason, drops, mark};

/// Leave the packet to the next program, and to the stack after the last.
const NEXT: i32 = TC_ACT_UNSPEC;
pub const DROP: i32 = TC_ACT_SHOT;

/// Applies a verdict about a TCP or UDP packet of the usual form, in a part that calls no functions.
#[inline(always)]
pub fn apply_quickly(ctx: &TcContext, parsed: &mut Parsed, verdict: PacketVerdict) -> i32 {
    match carry_out(ctx, &Rewrite::quick(ctx, parsed), verdict) {
        Ok(reason) => next(reason),
        Err(reason) => drop_elsewhere(ctx, parsed, reason),
    }
}

/// Applies a verdict about any packet. Refusals have a part of their own.
#[inline(always)]
pub fn apply(ctx: &TcContext, parsed: &Parsed, verdict: PacketVerdict) -> i32 {
    match carry_out(ctx, &Rewrite::any(ctx, parsed), verdict) {
        Ok(reason) => next(reason),
        Err(reason) => drop(ctx, parsed, reason),
    }
}

/// Rewrites the packet if it is to be. Why it goes on, or why it goes no further.
#[inline(always)]
fn carry_out(ctx: &TcContext, packet: &Rewrite<'_>, verdict: PacketVerdict) -> Result<Reason, Reason> {
    let rewritten = match verdict {
        PacketVerdict::Pass { reason } => return Ok(reason),
        PacketVerdict::Drop { reason } | PacketVerdict::Refuse { reason } => return Err(reason),
        PacketVerdict::SetDestination { address, port, client_port } => {
            mark::sent_on(ctx);
            set_destination(packet, &address, port, client_port)
        }
        PacketVerdict::SetSource { address, port, client_port } => {
            mark::translated(ctx);
            set_source(packet, &address, port, client_port)
        }
    };
    match rewritten {
        Ok(()) => Ok(Reason::Forwarded),
        // Half rewritten is worse than lost.
        Err(RewriteFailed) => Err(Reason::RewriteFailed),
    }
}

/// Applies a verdict where none rewrites, in a part that calls no functions.
#[inline(always)]
pub fn leave(ctx: &TcContext, parsed: &mut Parsed, verdict: PacketVerdict) -> i32 {
    match verdict {
        PacketVerdict::Pass { reason } => next(reason),
        PacketVerdict::Drop { reason } | PacketVerdict::Refuse { reason } => {
            drop_elsewhere(ctx, parsed, reason)
        }
        PacketVerdict::SetDestination { .. } | PacketVerdict::SetSource { .. } => {
            drop_elsewhere(ctx, parsed, Reason::RewriteFailed)
        }
    }
}

/// The packet goes on.
#[inline(always)]
pub fn next(reason: Reason) -> i32 {
    count_reason(reason);
    NEXT
}

/// The packet goes no further, and whoever listens is told.
#[inline(always)]
pub fn drop(ctx: &TcContext, parsed: &Parsed, reason: Reason) -> i32 {
    count_reason(reason);
    drops::packet(&parsed.meta, device(ctx), reason as u32, 0);
    DROP
}

/// The same in a part that calls no functions: the telling has a part of its own.
#[inline(always)]
pub fn drop_elsewhere(ctx: &TcContext, parsed: &mut Parsed, reason: Reason) -> i32 {
    parsed.reason = reason;
    go_to(ctx, Part::Drop);
    count_reason(reason);
    DROP
}
