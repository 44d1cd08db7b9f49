//! Reading and writing packets: the only places where packet memory is touched.

use aya_ebpf::{
    helpers::{bpf_skb_pull_data, bpf_skb_store_bytes},
    programs::TcContext,
};
use kproxy_common::Reason;

/// The packet could not be written; how much of it was is not known.
pub struct RewriteFailed;

/// Offsets in packets are below this: it tells the verifier what it cannot see.
const FURTHEST: usize = 0x3ff;

#[inline(always)]
pub fn succeeded(result: i64) -> Result<(), RewriteFailed> {
    if result == 0 { Ok(()) } else { Err(RewriteFailed) }
}

/// Writes `value` at `offset`. `flags` are those of `bpf_skb_store_bytes`.
#[inline(always)]
pub fn store<T>(ctx: &TcContext, offset: u32, value: &T, flags: u64) -> Result<(), RewriteFailed> {
    // SAFETY: the value is as long as the helper is told; the helper checks the offset against the packet.
    succeeded(unsafe {
        bpf_skb_store_bytes(
            ctx.skb.skb,
            offset,
            core::ptr::from_ref(value).cast_mut().cast(),
            size_of::<T>() as u32,
            flags,
        )
    })
}

/// Brings the first `wanted` octets, or all there are, into the part of the packet that can be read directly; an error
/// if there are fewer than `needed`.
#[inline(always)]
pub fn reach(ctx: &TcContext, needed: u32, wanted: u32) -> Result<(), Reason> {
    if ctx.data() + (wanted as usize & FURTHEST) <= ctx.data_end() {
        return Ok(());
    }
    let length = ctx.len();
    if length < needed {
        return Err(Reason::Malformed);
    }
    let pulled = if length < wanted { length } else { wanted };
    // SAFETY: the helper checks the length. Failing, it leaves what was there, and `read` finds out.
    unsafe { bpf_skb_pull_data(ctx.skb.skb, pulled) };
    Ok(())
}

/// `T` at `offset`, if the packet reaches that far.
#[inline(always)]
pub fn read<T: Copy>(ctx: &TcContext, offset: u32) -> Option<T> {
    let start = ctx.data() + (offset as usize & FURTHEST);
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: the whole value lies before the packet's end, checked above. It is read as if it were aligned, which IP
    // headers are or the processor does not ask for: where neither holds, the verifier refuses the program. Octet by octet
    // this would be half of all instructions.
    Some(unsafe { *(start as *const T) })
}
