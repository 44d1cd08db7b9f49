//! The mark by which the host's firewall tells what a packet program sent on to a backend (`--accept-forward`).

use aya_ebpf::programs::TcContext;

/// What `tc_index` says of a packet that has left with another source: on a device below (a bridge's or bond's port) it
/// meets the hook again. Since Linux 6.3 nothing else writes that field, and before it only DSCP markers.
const TRANSLATED: u32 = 0x6b70;

/// Notes that the packet has got another source.
#[inline(always)]
pub fn translated(ctx: &TcContext) {
    // SAFETY: the context is valid for the program's run, and a classifier may write this field.
    unsafe { core::ptr::write_volatile(&raw mut (*ctx.skb.skb).tc_index, TRANSLATED) };
}

/// Whether it has.
#[inline(always)]
pub fn is_translated(ctx: &TcContext) -> bool {
    // SAFETY: the context is valid for the program's run.
    unsafe { core::ptr::read_volatile(&raw const (*ctx.skb.skb).tc_index) == TRANSLATED }
}

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
