//! How flows come to be established, and end.
//!
//! A FIN or RST is only ever what a packet says: its receiver may know better, by its sequence
//! number. So it is written down ([`Ends`]), and the flow goes on to be translated. One that both
//! ends have said to be over makes room, as does one that stays silent. One that a single RST has
//! broken off stays where it is: if its sender lives, that sends something else, and the RST was
//! forged. A SYN on a flow that is not over goes where the flow goes, for the same reason.

use super::{FlowTables, Hit, PacketMeta, TcpFlags};
use crate::{
    Action, Balance, Conversation, Ends, FlowEnd, FlowState, FlowTable, Hook, Marks, NOTE_EVERY, Protocol,
    QUIET, REST, Role, elapsed, is_over, still_serves,
};

/// Whether a packet of an established flow is to be noted.
#[inline(always)]
pub(super) fn is_due<T: FlowTables>(tables: &T, flow: &Hit) -> bool {
    elapsed(tables.now(), flow.last_seen) >= NOTE_EVERY
}

/// The same of a flow that is being opened or has ended. One-way UDP lives as long as it goes on;
/// what has ended comes back if it goes on. Of connections nothing is noted until they are
/// established, or a client that never gets an answer would keep its entry, and with it its backend
/// and its mask's port, for as long as it asks. conntrack does the same: it renews the time of a
/// datagram's entry with each, that of a SYN or INIT with none that is sent again.
#[inline(always)]
pub(super) fn is_transient_due<T: FlowTables>(tables: &T, packet: &PacketMeta, flow: &Hit) -> bool {
    packet.tcp.changes_nothing()
        && (matches!(packet.protocol, Protocol::Udp) || flow.ends.is_closed())
        && is_due(tables, flow)
}

/// The backend has answered. That makes no flow established: backends answer whoever asks, also
/// those who give forged addresses. An answer that closes at once (RST) ends the flow: there is
/// nobody who could know better.
#[inline(never)]
pub(super) fn answer<T: FlowTables>(tables: &T, packet: &PacketMeta) {
    tables.with_transient(packet, Hook::Egress, |flow| {
        let is_opening = matches!(flow.state, FlowState::Opening);
        if packet.tcp.has(TcpFlags::RST) {
            if !matches!(flow.ends.backend, FlowEnd::Open) {
                return;
            }
            flow.ends.backend = FlowEnd::Reset;
            if is_opening {
                flow.ends = Ends::RESET;
            }
            flow.last_seen = tables.now();
            tables.act_all(flow, Action::Mark(FlowTable::Transient, Marks::ENDS.and(Marks::SEEN)));
            return;
        }
        if is_reopened(packet, flow.ends) {
            flow.ends = Ends::OPEN;
        } else if !is_opening || flow.ends.is_closed() {
            return;
        }
        flow.state = FlowState::Answered;
        flow.last_seen = tables.now();
        let marks = Marks::STATE.and(Marks::ENDS).and(Marks::SEEN);
        if !tables.act_all(flow, Action::Mark(FlowTable::Transient, marks)) {
            // Evicted since, while the backend took its time; or the flow was begun anew.
            tables.act(flow, Role::Request, Action::Take { rest: REST });
        }
    });
}

/// Whether the backend accepts a connection on a flow that one end had broken off. The SYN went
/// where the flow did.
#[inline(always)]
fn is_reopened(packet: &PacketMeta, ends: Ends) -> bool {
    packet.tcp.accepts() && ends.is_closed() && !ends.is_done()
}

/// A packet of the client on a flow that the backend has answered.
#[inline(always)]
pub(super) fn go_on<T: FlowTables>(tables: &T, packet: &PacketMeta) {
    if packet.tcp.has(TcpFlags::RST) {
        return abandon(tables, packet);
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
        && !flow.ends.is_closed()
        && !packet.tcp.has(TcpFlags::SYN)
}

/// The client has answered the backend, so that both are there: the entries move to the table of
/// established flows, where a flood of openings cannot push them out, whether or not backends
/// answer these.
#[inline(never)]
fn establish<T: FlowTables>(tables: &T, packet: &PacketMeta) {
    tables.with_transient(packet, Hook::Ingress, |flow| {
        flow.state = FlowState::Established;
        flow.last_seen = tables.now();
        tables.act_all(flow, Action::Establish);
    });
}

/// The client has closed a flow that was never established. That may be forged, and it goes on:
/// then it is established after all.
#[inline(never)]
fn abandon<T: FlowTables>(tables: &T, packet: &PacketMeta) {
    tables.with_transient(packet, Hook::Ingress, |flow| {
        flow.ends.client = FlowEnd::Reset;
        flow.last_seen = tables.now();
        tables.act_all(flow, Action::Mark(FlowTable::Transient, Marks::CLIENT.and(Marks::SEEN)));
    });
}

/// What a packet of an established flow changes.
#[inline(always)]
pub(super) fn advance<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook, flow: &Hit) {
    let leads = matches!(flow.role, Role::Request | Role::Reply);
    if leads && !matches!(packet.protocol, Protocol::Udp) {
        if packet.tcp.has(TcpFlags::RST) {
            return reset(tables, packet, hook);
        }
        if packet.tcp.has(TcpFlags::FIN) {
            return finish(tables, packet, hook);
        }
        if matches!(flow.role, Role::Reply) && is_reopened(packet, flow.ends) {
            return reopen(tables, packet);
        }
    }
    if packet.tcp.changes_nothing() && is_due(tables, flow) {
        note(tables, packet, hook, flow.is_clients());
    }
}

/// Notes that a packet of an established flow was seen, in all entries of the flow, and adds those
/// that are missing: so they are evicted, and age, together.
#[inline(never)]
fn note<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook, is_clients: bool) {
    tables.with_flow(packet, hook, |flow| {
        let is_back = take_back(packet, flow, is_clients);
        if flow.ends.is_done() {
            // Both ends sent FIN at the same instant, and neither hook saw the other's.
            flow.last_seen = tables.now();
            tables.act_all(flow, Action::End);
            return;
        }
        if flow.ends.is_closed() {
            // The other end has perhaps broken it off, and only it can show that it has not.
            return;
        }
        flow.last_seen = seen(flow.ends, is_clients, tables.now());
        // What the other end says on another CPU just now stays written down.
        let marks = match (is_back, is_clients) {
            (false, _) => Marks::SEEN,
            (true, true) => Marks::CLIENT.and(Marks::SEEN),
            (true, false) => Marks::BACKEND.and(Marks::SEEN),
        };
        tables.act_all(flow, Action::Keep(FlowTable::Established, marks));
    });
}

/// When a flow was last seen whose packet has come now. Where the other end has finished, as if
/// that were long ago: the next packet may be of that one, and show that it has not.
#[inline(always)]
fn seen(ends: Ends, is_clients: bool, now: u64) -> u64 {
    let other = if is_clients { ends.backend } else { ends.client };
    if matches!(other, FlowEnd::Finished) { now.wrapping_sub(NOTE_EVERY) } else { now }
}

/// The same for a flow that is being opened, which only UDP is noted of, or has ended: whoever has
/// said so and goes on has not.
#[inline(never)]
pub(super) fn note_transient<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook, is_clients: bool) {
    tables.with_transient(packet, hook, |flow| {
        if flow.ends.is_closed() {
            if !take_back(packet, flow, is_clients) {
                return;
            }
            if flow.ends.is_closed() {
                tables.act_all(flow, Action::Mark(FlowTable::Transient, Marks::ENDS));
                return;
            }
            flow.last_seen = seen(flow.ends, is_clients, tables.now());
            if is_clients || matches!(flow.state, FlowState::Established) {
                flow.state = FlowState::Established;
                tables.act_all(flow, Action::Establish);
                return;
            }
            let marks = Marks::STATE.and(Marks::ENDS).and(Marks::SEEN);
            flow.state = FlowState::Answered;
            tables.act_all(flow, Action::Mark(FlowTable::Transient, marks));
            return;
        }
        flow.last_seen = tables.now();
        tables.act_all(flow, Action::Keep(FlowTable::Transient, Marks::SEEN));
    });
}

/// Takes back what the sender of this packet has said about its end, if the packet shows that this
/// was not so; whether it does. Who has sent RST sends nothing else; who has sent FIN, no more
/// data.
#[inline(always)]
fn take_back(packet: &PacketMeta, flow: &mut Conversation, is_clients: bool) -> bool {
    let said = if is_clients { flow.ends.client } else { flow.ends.backend };
    let is_back = match said {
        FlowEnd::Open => false,
        FlowEnd::Finished => packet.has_payload,
        FlowEnd::Reset => true,
    };
    if is_back && is_clients {
        flow.ends.client = FlowEnd::Open;
    } else if is_back {
        flow.ends.backend = FlowEnd::Open;
    }
    is_back
}

/// One end breaks an established flow off, or a stranger in its name. What is said once more is not
/// noted: else whoever repeats it keeps the end from being heard.
#[inline(never)]
fn reset<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook) {
    tables.with_flow(packet, hook, |flow| {
        let is_clients = matches!(hook, Hook::Ingress);
        let said = if is_clients { flow.ends.client } else { flow.ends.backend };
        if matches!(said, FlowEnd::Reset) {
            return;
        }
        let mark = say(flow, is_clients, FlowEnd::Reset);
        flow.last_seen = tables.now();
        if flow.ends.is_done() {
            tables.act_all(flow, Action::End);
            return;
        }
        tables.act_all(flow, Action::Mark(FlowTable::Established, mark.and(Marks::SEEN)));
        if tables.wait(flow) && flow.ends.is_closed() {
            tables.act_all(flow, Action::End);
        }
    });
}

/// The backend accepts a connection on an established flow that one end had broken off.
#[inline(never)]
fn reopen<T: FlowTables>(tables: &T, packet: &PacketMeta) {
    tables.with_flow(packet, Hook::Egress, |flow| {
        flow.ends = Ends::OPEN;
        flow.last_seen = tables.now();
        tables.act_all(flow, Action::Mark(FlowTable::Established, Marks::ENDS.and(Marks::SEEN)));
    });
}

/// One direction has sent its FIN; with the other's the flow ends. Both can come at the same
/// instant, on two CPUs: each writes its own down before it looks for the other's, and should both
/// look too early, the next packet, which is noted, finds them.
#[inline(never)]
fn finish<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook) {
    tables.with_flow(packet, hook, |flow| {
        let is_clients = matches!(hook, Hook::Ingress);
        let said = if is_clients { flow.ends.client } else { flow.ends.backend };
        if !matches!(said, FlowEnd::Finished) {
            let mark = say(flow, is_clients, FlowEnd::Finished);
            // As if that were long ago: the next packet is noted.
            flow.last_seen = tables.now().wrapping_sub(2 * NOTE_EVERY);
            tables.act_all(flow, Action::Mark(FlowTable::Established, mark.and(Marks::SEEN)));
        }
        let role = if is_clients { Role::Request } else { Role::Reply };
        if let Some(Hit { ends, .. }) = tables.occupant(flow, role) {
            if is_clients {
                flow.ends.backend = ends.backend;
            } else {
                flow.ends.client = ends.client;
            }
        }
        if flow.ends.is_done() {
            flow.last_seen = tables.now();
            tables.act_all(flow, Action::End);
        }
    });
}

#[inline(always)]
fn say(flow: &mut Conversation, is_clients: bool, end: FlowEnd) -> Marks {
    if is_clients {
        flow.ends.client = end;
        Marks::CLIENT
    } else {
        flow.ends.backend = end;
        Marks::BACKEND
    }
}

/// Whether this packet can begin or accept a connection between a flow's ends past its frontend.
/// While the flow lives such a one is not to be told from its own; where it has ended, neither of
/// these is of it. One that perhaps a stranger has ended must have been silent since.
#[inline(always)]
pub(super) fn may_be_past<T: FlowTables>(tables: &T, packet: &PacketMeta, flow: &Hit) -> bool {
    let may_be = match flow.role {
        Role::Forwarded => packet.tcp.opens(),
        Role::Reply => packet.tcp.accepts(),
        Role::Request | Role::Return | Role::NodeRequest | Role::NodeReply => false,
    };
    may_be && flow.ends.is_closed() && (flow.ends.is_done() || elapsed(tables.now(), flow.last_seen) >= QUIET)
}

/// A flow that has ended gives way to a connection past its frontend: its entries that would
/// rewrite that are removed. Whether it did: where the client is masked its SYN alone tells, since
/// what the backend accepts with was perhaps sent to the mask, and is the flow's own.
#[inline(never)]
pub(super) fn give_way<T: FlowTables>(tables: &T, packet: &PacketMeta) -> bool {
    let give_way = |flow: &mut Conversation| {
        if flow.is_masked() && packet.tcp.accepts() {
            return false;
        }
        tables.act(flow, Role::Forwarded, Action::StepAside);
        tables.act(flow, Role::Reply, Action::StepAside);
        true
    };
    match tables.with_flow(packet, Hook::Egress, give_way) {
        Some(gives_way) => gives_way,
        None => tables.with_transient(packet, Hook::Egress, give_way).unwrap_or(true),
    }
}

/// Whether a SYN or INIT to a frontend goes where a flow of the same ends goes: it is the client's,
/// whose backend takes it if the connection before is gone there, or else tells the client so; or a
/// stranger's, whom the backend ignores. A flow that is over makes room for a new one, as does one
/// whose backend serves no more and that is silent.
#[inline(never)]
pub(super) fn goes_along<T: FlowTables>(tables: &T, packet: &PacketMeta, balance: &Balance) -> bool {
    let goes_along = |flow: &mut Conversation, table| {
        let Conversation { protocol, state, ends, last_seen, service, backend_port, backend_id, .. } = *flow;
        let now = tables.now();
        if ends.is_done() || is_over(protocol, state, ends, last_seen, now) {
            return false;
        }
        if elapsed(now, last_seen) >= QUIET
            && !still_serves(tables, balance.number, service, &flow.backend, backend_port, backend_id)
        {
            return false;
        }
        if ends.is_closed() {
            // What the backend accepts with is the flow's own.
            flow.last_seen = now;
            tables.act_all(flow, Action::Mark(table, Marks::SEEN));
        }
        true
    };
    match tables.with_flow(packet, Hook::Ingress, |flow| goes_along(flow, FlowTable::Established)) {
        Some(goes) => goes,
        None => tables
            .with_transient(packet, Hook::Ingress, |flow| goes_along(flow, FlowTable::Transient))
            .unwrap_or(false),
    }
}

/// A flow makes room for another of its client.
#[inline(never)]
pub(super) fn retire<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook) {
    tables.with_flow(packet, hook, |flow| {
        flow.ends = Ends::RESET;
        flow.last_seen = tables.now();
        tables.act_all(flow, Action::End);
    });
}
