//! Packets that come in: from clients to frontends, and from backends to the masks of clients.

use super::{Decision, FlowTables, New, PacketMeta, PacketVerdict, Quick, entry, life, mask, node};
use crate::{
    Action, Address, Balance, Choice, ClientKind, Conversation, Ends, FlowState, Hook, REST, Reason,
    Resolution, Role, choose, is_masked, resolve,
};

/// A packet that comes in by the interface `device`.
///
/// A flow keeps its backend while it lives. Only a TCP SYN, an SCTP INIT or a datagram opens one: what else has no flow
/// passes.
#[inline(always)]
pub fn on_ingress<T: FlowTables>(tables: &T, packet: &PacketMeta, device: u32) -> PacketVerdict {
    match quick_ingress(tables, packet).of_any_form() {
        Quick::Verdict(verdict) => verdict,
        Quick::Known => known_ingress(tables, packet),
        // Said where packets leave.
        Quick::Node => Decision::pass(Reason::NotAService).into(),
        Quick::New => match new_ingress(tables, packet, device) {
            New::Verdict(verdict) => verdict,
            New::Open(balance) => open_ingress(tables, packet, device, &balance),
        },
    }
}

/// The first part of [`on_ingress`]: packets in the middle of a flow, and those that are nobody's business.
#[inline(always)]
pub fn quick_ingress<T: FlowTables>(tables: &T, packet: &PacketMeta) -> Quick {
    if let Some(flow) = tables.flow(packet, Hook::Ingress) {
        if flow.is_nodes() {
            return Quick::Known;
        }
        if packet.tcp.changes_nothing() && !life::is_due(tables, &flow) {
            return Quick::decided(flow.set_destination());
        }
        // A client's SYN on an established flow may be a new connection from a port that it uses again. A backend's is
        // of the flow, as whatever it sends to a mask.
        let is_again = packet.tcp.opens() && matches!(flow.role, Role::Request);
        return if is_again { Quick::New } else { Quick::Known };
    }
    if let Some(flow) = tables.transient(packet, Hook::Ingress)
        && (!packet.tcp.opens() || !flow.ends.is_closed() || matches!(flow.role, Role::Return))
    {
        if flow.is_nodes() {
            return Quick::Known;
        }
        if life::goes_on(packet, &flow) || life::is_transient_due(tables, packet, &flow) {
            return Quick::Known;
        }
        return Quick::decided(flow.set_destination());
    }
    if !packet.may_open() {
        return Quick::decided(Decision::pass(Reason::NoFlow));
    }
    // Pods and strangers find the same frontends.
    super::quick_stranger(tables, packet, ClientKind::Outside)
}

/// What the client has asked, if this packet is a backend's answer that goes to it as it is: the egress hook will write it
/// as the source.
#[inline(always)]
pub fn answered_frontend<T: FlowTables>(tables: &T, packet: &PacketMeta) -> Option<Address> {
    let flow = match tables.flow(packet, Hook::Egress) {
        Some(flow) => flow,
        None => tables.transient(packet, Hook::Egress)?,
    };
    matches!(flow.role, Role::Reply).then_some(flow.address)
}

/// The part of [`on_ingress`] that is for packets of a flow, wherever in it they stand.
#[inline(always)]
pub fn known_ingress<T: FlowTables>(tables: &T, packet: &PacketMeta) -> PacketVerdict {
    let decision = if let Some(flow) = tables.flow(packet, Hook::Ingress) {
        if flow.is_nodes() {
            return node::known(tables, packet, &flow, true);
        }
        life::advance(tables, packet, Hook::Ingress, &flow);
        flow.set_destination()
    } else if let Some(flow) = tables.transient(packet, Hook::Ingress) {
        if flow.is_nodes() {
            return node::known(tables, packet, &flow, false);
        }
        if life::goes_on(packet, &flow) {
            life::go_on(tables, packet);
        } else if life::is_transient_due(tables, packet, &flow) {
            life::note_transient(tables, packet, Hook::Ingress, flow.is_clients());
        }
        flow.set_destination()
    } else {
        // It has just been evicted.
        Decision::drop(Reason::NoFlow)
    };
    decision.about(packet)
}

/// The part of [`on_ingress`] that is for packets without a flow, or that begin one anew.
#[inline(always)]
pub fn new_ingress<T: FlowTables>(tables: &T, packet: &PacketMeta, device: u32) -> New {
    let kind = tables.clients_behind(device);
    let decision = match resolve(tables, &packet.connection(kind)) {
        Resolution::Pass { reason, number } => {
            if let (Reason::PassThrough, Some(number), ClientKind::Outside) = (reason, number, kind) {
                tables.count(number, false);
            }
            Decision::pass(reason)
        }
        Resolution::Drop { reason, .. } => Decision::drop(reason),
        Resolution::Reject { reason, .. } => match objection(packet) {
            Reason::Forwarded => Decision::refuse(reason),
            reason => Decision::drop(reason),
        },
        Resolution::Balance(balance) => match objection(packet) {
            Reason::Forwarded => return New::Open(balance),
            reason => Decision::drop(reason),
        },
    };
    New::Verdict(decision.into())
}

/// The part of [`on_ingress`] that opens a flow to one of the backends of `balance`.
#[inline(always)]
pub fn open_ingress<T: FlowTables>(
    tables: &T,
    packet: &PacketMeta,
    device: u32,
    balance: &Balance,
) -> PacketVerdict {
    if life::goes_along(tables, packet, balance) {
        return match entry(tables, packet, Hook::Ingress) {
            Some(flow) => flow.set_destination().into(),
            // It has just been evicted.
            None => Decision::drop(Reason::NoFlow).into(),
        };
    }
    // What a connection before it, from the same port, has left.
    life::retire(tables, packet, Hook::Ingress);
    open(tables, packet, device, balance).into()
}

#[inline(always)]
fn open<T: FlowTables>(tables: &T, packet: &PacketMeta, device: u32, balance: &Balance) -> Decision {
    let behind = tables.clients_behind(device);
    let connection = packet.connection(behind);
    let Some(config) = tables.config() else {
        return Decision::pass(Reason::NotAService);
    };
    let Some(choice) = choose(tables, balance, &connection.client, packet.hash(config.hash_seed)) else {
        return Decision::drop(Reason::TableError);
    };
    let backend = &choice.backend;
    let is_masked = is_masked(tables, &balance.side, backend, behind, &packet.source)
        || backend.is_local() && tables.shares_bridge(device, &packet.source);
    let inner_port = begin(tables, packet, &choice, balance.number, is_masked);
    if inner_port == 0 {
        return Decision::drop(Reason::MaskPortsExhausted);
    }
    Decision::to(backend.address(), backend.port(), inner_port as u16)
}

/// Why nothing is opened by this packet, and nobody told so, whatever the Service says; [`Reason::Forwarded`] if there
/// is no reason.
#[inline(always)]
pub(super) fn objection(packet: &PacketMeta) -> Reason {
    if packet.is_sctp_fragment() {
        // An INIT is alone in its packet, and short (RFC 9260, 6.10).
        return Reason::SctpFragment;
    }
    if packet.is_later_fragment() {
        // Its first was not translated either: refused, dropped, or its flow is gone since.
        return Reason::EarlyFragment;
    }
    // Nobody can have sent these in good faith, or an answer would go astray: from no address, a group's, a loopback
    // device's or the destination's own, or from or to the port 0.
    if packet.source_port == 0
        || packet.destination_port == 0
        || packet.source == packet.destination
        || !packet.source.is_unicast()
    {
        return Reason::HostileSource;
    }
    Reason::Forwarded
}

/// Enters a new flow; the client's inner port, or 0 if there was none left. A function of its own, as are others that
/// change the tables: its stack is then not needed at the same time as its callers'. Their signatures hold no enums
/// with data, which BTF has no form for, and no more than five parameters: since Linux 7 the verifier counts those that
/// BTF names, also `tables`, which has no size and is never passed.
#[inline(never)]
fn begin<T: FlowTables>(
    tables: &T,
    packet: &PacketMeta,
    choice: &Choice,
    number: u32,
    is_masked: bool,
) -> u32 {
    let backend = &choice.backend;
    let inner_port = tables.with_new(|flow| {
        flow.client = packet.source;
        flow.frontend = packet.destination;
        flow.backend = backend.address();
        flow.mask = packet.source;
        flow.client_port = packet.source_port;
        flow.frontend_port = packet.destination_port;
        flow.backend_port = backend.port();
        flow.mask_port = 0;
        flow.inner_port = packet.source_port;
        flow.protocol = packet.protocol;
        flow.state = FlowState::Opening;
        flow.ends = Ends::OPEN;
        flow.number = number;
        flow.service = backend.service();
        flow.backend_id = backend.id();
        flow.last_seen = tables.now();
        if !tables.act(flow, Role::Reply, Action::Take { rest: REST }) {
            if is_own(tables, flow) {
                tables.act(flow, Role::Reply, Action::Put);
            } else if !mask::choose_inner_port(tables, packet, flow) {
                return 0;
            }
        }
        tables.act(flow, Role::Request, Action::Put);
        if is_masked {
            // Where the packet leaves, and so with which address it is masked, routing decides: the mask's port 0
            // asks for it.
            tables.act(flow, Role::Forwarded, Action::Put);
        }
        u32::from(flow.inner_port)
    });
    if inner_port != 0 {
        tables.count(number, true);
    }
    inner_port
}

/// Whether the backend's answers to this client and port belong to this frontend already.
#[inline(always)]
fn is_own<T: FlowTables>(tables: &T, flow: &Conversation) -> bool {
    tables.occupant(flow, Role::Reply).is_some_and(|other| {
        // What has ended, another may be taking.
        !other.ends.is_closed() && (other.address, other.port) == (flow.frontend, flow.frontend_port)
    })
}
