//! The programs: socket hooks and packet hooks. Thin: parse, decide (in kproxy-common), apply.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "an atomic add has no stable form on this target")]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "a key that is passed by value is copied to the stack, which has no room for it"
)]

mod count;
mod drops;
mod iterate;
mod kernel;
mod keys;
mod maps;
mod mark;
mod packet;
mod socket;

/// Helpers for packets and sockets are open to GPL-compatible programs only.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier would refuse a program that could get here and not return.
    loop {}
}
