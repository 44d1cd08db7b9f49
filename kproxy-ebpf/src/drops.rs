//! Drops and refusals, told to whoever listens.

use aya_ebpf::{
    bindings::BPF_RB_NO_WAKEUP,
    helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns},
};
use kproxy_common::{Address, DropEvent, DropPath, IcmpMeta, PacketMeta, Protocol, Reason};

use crate::maps;

/// A packet that is dropped, or (`refused`: 1) answered with a refusal; `reason` as a number. A function of its own: a
/// hook has many ways that lead here.
#[inline(never)]
pub fn packet(packet: &PacketMeta, device: u32, reason: u32, refused: u32) {
    let Some(now) = listened_to() else {
        return;
    };
    write(DropPath::Packet, now, reason, |event| {
        event.describe(packet);
        event.device = device;
        event.refused = refused as u8;
    });
}

/// An ICMP message that is dropped: as [`packet`], without ports.
#[inline(never)]
pub fn message(message: &IcmpMeta, device: u32, reason: u32) {
    let Some(now) = listened_to() else {
        return;
    };
    write(DropPath::Packet, now, reason, |event| {
        event.source = message.source;
        event.destination = message.destination;
        event.protocol = if message.source.is_v4() { 1 } else { 58 };
        event.device = device;
    });
}

/// A socket call to `destination` that is refused.
#[inline(always)]
pub fn socket(destination: &Address, port: u16, protocol: Protocol, reason: Reason) {
    let [a, b, c, d] = destination.words();
    socket_event(
        u64::from(a) << 32 | u64::from(b),
        u64::from(c) << 32 | u64::from(d),
        u64::from(port) << 16 | u64::from(protocol as u8) << 8 | u64::from(reason as u8),
    );
}

/// The same, from words: what is handed on by a pointer would be kept in memory by the caller, on all of its ways.
#[inline(never)]
fn socket_event(high: u64, low: u64, port_protocol_reason: u64) {
    let Some(now) = listened_to() else {
        return;
    };
    let reason = u32::from(port_protocol_reason as u8);
    write(DropPath::Socket, now, reason, |event| {
        event.destination =
            Address::from_words([(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32]);
        event.destination_port = (port_protocol_reason >> 16) as u16;
        event.protocol = (port_protocol_reason >> 8) as u8;
        event.refused = 1;
    });
}

/// The time, if somebody listens now.
#[inline(always)]
fn listened_to() -> Option<u64> {
    let listener = maps::DROP_LISTENER.get_ptr(0)?;
    // SAFETY: one aligned word, which its writer stores at once.
    let until = unsafe { core::ptr::read_volatile(&raw const (*listener).until) };
    if until == 0 {
        return None;
    }
    // SAFETY: the helper has no conditions.
    let now = unsafe { bpf_ktime_get_ns() };
    (now < until).then_some(now)
}

#[inline(always)]
fn write(path: DropPath, now: u64, reason: u32, describe: impl FnOnce(&mut DropEvent)) {
    let Some(budget) = maps::DROP_BUDGET.get_ptr_mut(path as u32) else {
        return;
    };
    // SAFETY: the element is this CPU's and this path's, and the pointer valid for the program's run. Where a socket
    // hook is preempted by another, an event more or less is written.
    let budget = unsafe { &mut *budget };
    let sequence = budget.sequence;
    budget.sequence = sequence.wrapping_add(1);
    if !budget.take(now) {
        return;
    }
    // Full, or not: the gap in the sequence says so.
    let Some(mut entry) = maps::DROP_EVENT.reserve(0) else {
        return;
    };
    // SAFETY: the helper has no conditions.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let event = entry.write(DropEvent {
        time: now,
        sequence,
        source: Address::from_v4_word(0),
        destination: Address::from_v4_word(0),
        source_port: 0,
        destination_port: 0,
        protocol: 0,
        reason: reason as u8,
        refused: 0,
        _pad: 0,
        device: 0,
        stream: cpu.wrapping_mul(DropPath::COUNT).wrapping_add(path as u32),
    });
    describe(event);
    // Listeners look by themselves many times a second: waking them would cost an interrupt here.
    entry.submit(BPF_RB_NO_WAKEUP.into());
}
