//! Hiding clients behind an address of this node, or behind another port of their own.

use super::{FlowTables, Hit, PacketMeta};
use crate::{Action, Config, Conversation, HURRIED_REST, Hook, REST, Reason, Role};

/// How many ports are tried before the packet is dropped, as often as netfilter tries at first
/// (`nf_nat_l4proto_unique_tuple`). Where 60,000 of 64,512 ports are held, of 10,000 flows one finds none. The next packet of
/// the same flow begins where its hash says again, but finds other ports taken and freed.
const TRIES: u32 = 128;
/// How many of these are among the reserved ports.
const RESERVED_TRIES: u32 = 4;
/// How many other ports of its own a client is tried to be given.
const INNER_TRIES: u32 = 16;

/// The first packet of a flow to be masked has come to the interface that it leaves by: gives it a port that no
/// other flow to the same backend has, nor a socket of this host, and completes the flow's entries.
#[inline(never)]
pub(super) fn mask<T: FlowTables>(tables: &T, packet: &PacketMeta, device: u32, masked: &mut Hit) -> Reason {
    let Some(config) = tables.config() else {
        return Reason::NoMaskAddress;
    };
    let Some(address) = tables.mask_address(device, &packet.source) else {
        return Reason::NoMaskAddress;
    };
    let start = packet.hash(config.hash_seed);
    let found = tables.with_transient(packet, Hook::Egress, |flow| {
        flow.mask = address;
        if !choose_port(tables, config, start, flow) {
            return false;
        }
        tables.note_masqueraded(&flow.backend, flow.backend_port);
        tables.act(flow, Role::Request, Action::Put);
        tables.act(flow, Role::Forwarded, Action::Put);
        tables.act(flow, Role::Reply, Action::Put);
        masked.address = address;
        masked.port = flow.mask_port;
        true
    });
    match found {
        Some(true) => Reason::Forwarded,
        Some(false) => Reason::MaskPortsExhausted,
        None => Reason::NoFlow,
    }
}

/// Gives a flow that has a mask, and is what `tables` have handed out, a port towards its backend; whether one was found.
#[inline(always)]
pub(super) fn choose_port<T: FlowTables>(
    tables: &T,
    config: &Config,
    start: u32,
    flow: &mut Conversation,
) -> bool {
    let mut tries = 0;
    while tries < TRIES {
        flow.mask_port = port(config, start, tries, tries < RESERVED_TRIES);
        if tables.take_return(flow, rest(tries, TRIES)) {
            return true;
        }
        tries += 1;
    }
    false
}

/// The backend's answers to this client and port belong to another frontend: gives the client another port of its own
/// towards this backend.
#[inline(never)]
pub(super) fn choose_inner_port<T: FlowTables>(
    tables: &T,
    packet: &PacketMeta,
    flow: &mut Conversation,
) -> bool {
    let Some(config) = tables.config() else {
        return false;
    };
    let start = packet.hash(config.hash_seed);
    let mut tries = 0;
    while tries < INNER_TRIES {
        flow.inner_port = port(config, start, tries, true);
        if tables.act(flow, Role::Reply, Action::Take { rest: rest(tries, INNER_TRIES) }) {
            return true;
        }
        tries += 1;
    }
    false
}

/// How long the port of this try, of so many, must have rested. The last quarter is less choosy: after it the packet is
/// dropped for certain.
#[inline(always)]
fn rest(tries: u32, of: u32) -> u64 {
    if tries < of - of / 4 { REST } else { HURRIED_REST }
}

/// One of the ports for masking. Each try is mixed anew: tries at even steps from one another meet the same few ports
/// where a step happens to be small, and then again at each time that the packet is sent.
#[inline(always)]
fn port(config: &Config, start: u32, tries: u32, is_reserved: bool) -> u16 {
    let (first, count) = if is_reserved {
        (config.reserved_ports_first, config.reserved_ports_count)
    } else {
        (config.mask_ports_first, config.mask_ports_count)
    };
    // The multipliers of Fibonacci hashing and of a 32-bit finalizer.
    let mixed = start.wrapping_add(tries.wrapping_mul(0x9e37_79b9));
    let mixed = (mixed ^ mixed >> 16).wrapping_mul(0x7feb_352d);
    let offset = (u64::from(mixed ^ mixed >> 15) * u64::from(count)) >> 32;
    first.wrapping_add(offset as u32) as u16
}
