//! How flows come to be established, and end.

use super::{FlowTables, Hit, PacketMeta, TcpFlags};
use crate::{Conversation, FlowState, Hook, Protocol, Role, elapsed};

/// How often a flow's last packet is noted: a store a second instead of one a packet.
const NOTE_EVERY: u64 = 1_000_000_000;

/// The backend has answered. That makes no flow established: backends answer whoever asks, also those who give forged
/// addresses. An answer that closes at once (RST) ends the flow.
#[inline(never)]
pub(super) fn answer<T: FlowTables>(tables: &T, packet: &PacketMeta) {
    if packet.tcp.has(TcpFlags::RST) {
        return abandon(tables, packet, Hook::Egress);
    }
    tables.with_transient(packet, Hook::Egress, |flow| {
        if !matches!(flow.state, FlowState::Opening) {
            return;
        }
        flow.state = FlowState::Answered;
        flow.last_seen = tables.now();
        tables.mark_transient(flow, Role::Reply);
        if !tables.mark_transient(flow, Role::Request) {
            // Evicted since, while the backend took its time; or the flow was begun anew.
            tables.put_new(flow, Role::Request);
        }
    });
}

/// A packet of the client on a flow that the backend has answered.
#[inline(always)]
pub(super) fn go_on<T: FlowTables>(tables: &T, packet: &PacketMeta) {
    if packet.tcp.has(TcpFlags::RST) {
        return abandon(tables, packet, Hook::Ingress);
    }
    establish(tables, packet);
    if packet.tcp.has(TcpFlags::FIN) {
        finish(tables, packet, Hook::Ingress);
    }
}

/// Whether this packet of the client shows that it has got the backend's answer: then the flow is
/// [`FlowState::Established`].
#[inline(always)]
pub(super) fn goes_on(packet: &PacketMeta, flow: &Hit) -> bool {
    matches!(flow.state, FlowState::Answered)
        && matches!(flow.role, Role::Request)
        && !packet.tcp.has(TcpFlags::SYN)
}

/// The client has answered the backend, so that both are there: the entries move to the table of established flows, where a
/// flood of openings cannot push them out, whether or not backends answer these.
#[inline(never)]
fn establish<T: FlowTables>(tables: &T, packet: &PacketMeta) {
    tables.with_transient(packet, Hook::Ingress, |flow| {
        flow.state = FlowState::Established;
        flow.last_seen = tables.now();
        tables.put_established(flow, Role::Request);
        tables.put_established(flow, Role::Reply);
        if flow.is_masked() {
            tables.put_established(flow, Role::Forwarded);
            tables.put_established(flow, Role::Return);
        }
    });
}

/// Notes a packet of an established flow, and retires the flow when it ends.
#[inline(always)]
pub(super) fn advance<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook, flow: &Hit) {
    let leads = matches!(flow.role, Role::Request | Role::Reply);
    if leads && !matches!(packet.protocol, Protocol::Udp) {
        if packet.tcp.has(TcpFlags::RST) {
            return retire(tables, packet, hook);
        }
        if packet.tcp.has(TcpFlags::FIN) {
            return finish(tables, packet, hook);
        }
    }
    note(tables, packet, hook, flow);
}

/// Notes that a packet of an established flow was seen.
#[inline(always)]
pub(super) fn note<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook, flow: &Hit) {
    let now = tables.now();
    if elapsed(now, flow.last_seen) >= NOTE_EVERY {
        tables.note(packet, hook, flow.state, now);
    }
}

/// Notes that a datagram of a flow was seen that its peer has not answered: one-way UDP lives as long as it goes on. Of
/// connections nothing is noted until they are established, or a client that never gets an answer would keep its entry,
/// and with it its backend and its mask's port, for as long as it asks. conntrack does the same: it renews the time of a
/// datagram's entry with each, that of a SYN or INIT with none that is sent again.
#[inline(always)]
pub(super) fn note_unanswered<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook, flow: &Hit) {
    if !matches!(packet.protocol, Protocol::Udp) || matches!(flow.state, FlowState::Closed) {
        return;
    }
    let now = tables.now();
    if elapsed(now, flow.last_seen) >= NOTE_EVERY {
        tables.note_transient(packet, hook, now);
    }
}

/// Whether this packet can begin or accept a connection between a flow's ends past its frontend. While the flow lives such
/// a one is not to be told from its own; where it has ended, neither of these is of it.
#[inline(always)]
pub(super) fn may_be_past(packet: &PacketMeta, flow: &Hit) -> bool {
    matches!(flow.state, FlowState::Closed)
        && match flow.role {
            Role::Forwarded => packet.tcp.opens(),
            Role::Reply => packet.tcp.accepts(),
            Role::Request | Role::Return => false,
        }
}

/// A flow that has ended gives way to a connection past its frontend: its entries that would rewrite that are removed.
/// Whether it did: where the client is masked its SYN alone tells, since what the backend accepts with was perhaps sent to
/// the mask, and is the flow's own.
#[inline(never)]
pub(super) fn give_way<T: FlowTables>(tables: &T, packet: &PacketMeta) -> bool {
    let gives_way = tables.with_transient(packet, Hook::Egress, |flow| {
        if flow.is_masked() && packet.tcp.accepts() {
            return false;
        }
        tables.remove_ended(flow, Role::Forwarded);
        tables.remove_ended(flow, Role::Reply);
        true
    });
    gives_way.unwrap_or(true)
}

/// One direction has sent its FIN; with the other's the flow ends.
#[inline(never)]
fn finish<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook) {
    let other = if matches!(hook, Hook::Ingress) { Role::Reply } else { Role::Request };
    let other = tables.with_flow(packet, hook, |flow| tables.state_of(flow, other));
    match other {
        Some(Some(FlowState::Opening | FlowState::Answered | FlowState::Established)) => {
            tables.note(packet, hook, FlowState::Finished, tables.now());
        }
        Some(Some(FlowState::Finished | FlowState::Closed) | None) => retire(tables, packet, hook),
        None => {}
    }
}

/// A flow that was never established is closed by one of its ends: what it has taken may be given to others.
#[inline(never)]
fn abandon<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook) {
    tables.with_transient(packet, hook, |flow| end(tables, flow));
}

/// A flow that ends goes back to the transient table, since its last acknowledgements are still to come.
#[inline(never)]
pub(super) fn retire<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook) {
    tables.with_flow(packet, hook, |flow| end(tables, flow));
}

#[inline(never)]
fn end<T: FlowTables>(tables: &T, flow: &mut Conversation) {
    flow.state = FlowState::Closed;
    flow.last_seen = tables.now();
    tables.put_ended(flow, Role::Request);
    tables.put_ended(flow, Role::Reply);
    if flow.is_masked() {
        tables.put_ended(flow, Role::Forwarded);
        tables.put_ended(flow, Role::Return);
    }
}
