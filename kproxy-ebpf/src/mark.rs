//! The mark by which the host's firewall tells what a packet program sent on to a backend (`--accept-forward`).

use aya_ebpf::programs::TcContext;

/// Set by the agent when it loads: the bit, or 0 to mark nothing.
#[unsafe(no_mangle)]
static FORWARD_MARK: u32 = 0;

/// Marks the packet, if packets are to be marked. Other bits are the CNI's, and stay.
#[inline(always)]
pub fn sent_on(ctx: &TcContext) {
    // SAFETY: a static of this program; volatile, since the agent changes it before loading.
    let mark = unsafe { core::ptr::read_volatile(&raw const FORWARD_MARK) };
    if mark != 0 {
        // SAFETY: the context is valid for the program's run, and a classifier may write this field.
        unsafe { (*ctx.skb.skb).mark |= mark };
    }
}
