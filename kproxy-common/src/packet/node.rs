//! Flows of the node itself: what it sends past every frontend, or a pod whose address something else (the CNI) has
//! replaced by the node's. conntrack knows these; the tables of flows do, where such a flow could meet one of a Service's:
//!
//! - UDP from a port that is a NodePort: an answer to it looks like a client's question to that NodePort.
//! - Whatever goes to a backend that clients are masqueraded towards: the port that it comes from may be one that a client is
//!   masqueraded with, or be given to one later. Whoever comes second gets another port, as conntrack would have it.
//!
//! They are established when their peer answers: who began them is on this node. A FIN or RST ends them, and what goes on
//! after that (a second later) shows that they had not ended.

use super::{
    Decision, FlowTables, Hit, PacketMeta, PacketVerdict, Quick, TcpFlags, ingress::objection, life, mask,
};
use crate::{
    Action, Config, Conversation, Ends, FlowState, FlowTable, FrontendKey, Hook, Marks, Protocol, REST,
    Reason, Role,
};

/// Whether this packet, which has no flow and is for no frontend, may begin one of the node.
#[inline(always)]
pub(super) fn concerns<T: FlowTables>(tables: &T, config: &Config, packet: &PacketMeta) -> bool {
    if config.node_addresses & packet.source.bit() == 0 {
        return false;
    }
    if matches!(packet.protocol, Protocol::Udp)
        && packet.source_port >= config.udp_node_ports_first
        && packet.source_port <= config.udp_node_ports_last
    {
        return true;
    }
    tables.masquerades_towards(&packet.destination, packet.destination_port)
}

/// A packet for which [`concerns`] holds.
#[inline(always)]
pub fn node_egress<T: FlowTables>(tables: &T, packet: &PacketMeta) -> PacketVerdict {
    let untouched = Decision::pass(Reason::NotAService).into();
    if !matches!(objection(packet), Reason::Forwarded) {
        return untouched;
    }
    let node_port = FrontendKey::node_port(&packet.source, packet.source_port, Protocol::Udp);
    let is_from_node_port = matches!(packet.protocol, Protocol::Udp) && tables.frontend(&node_port).is_some();
    if !is_from_node_port && !tables.masquerades_towards(&packet.destination, packet.destination_port) {
        return untouched;
    }
    let port = begin(tables, packet);
    if port == 0 {
        return Decision::drop(Reason::MaskPortsExhausted).into();
    }
    if port == u32::from(packet.source_port) {
        return untouched;
    }
    PacketVerdict::SetSource { address: packet.source, port: port as u16, client_port: 0 }
}

/// Enters a flow of the node; the port that its peer sees, or 0 if there was none left.
#[inline(never)]
fn begin<T: FlowTables>(tables: &T, packet: &PacketMeta) -> u32 {
    let Some(config) = tables.config() else {
        return 0;
    };
    let start = packet.hash(config.hash_seed);
    tables.with_new(|flow| {
        flow.client = packet.source;
        flow.frontend = packet.source.any_of_family();
        flow.backend = packet.destination;
        flow.mask = packet.source;
        flow.client_port = packet.source_port;
        flow.frontend_port = 0;
        flow.backend_port = packet.destination_port;
        flow.mask_port = packet.source_port;
        flow.inner_port = packet.source_port;
        flow.protocol = packet.protocol;
        flow.state = FlowState::Opening;
        flow.ends = Ends::OPEN;
        flow.number = u32::MAX;
        flow.service = 0;
        flow.backend_id = 0;
        flow.last_seen = tables.now();
        if !tables.act(flow, Role::NodeReply, Action::Take { rest: REST }) {
            if is_own(tables, flow) {
                tables.act(flow, Role::NodeReply, Action::Put);
            } else if !mask::choose_port(tables, config, start, flow) {
                return 0;
            }
        }
        tables.act(flow, Role::NodeRequest, Action::Put);
        u32::from(flow.mask_port)
    })
}

/// Whether the peer's answers to this port are the flow's already.
#[inline(always)]
fn is_own<T: FlowTables>(tables: &T, flow: &Conversation) -> bool {
    tables.occupant(flow, Role::NodeReply).is_some_and(|other| {
        matches!(other.role, Role::NodeReply)
            && (other.address, other.port) == (flow.client, flow.client_port)
    })
}

/// The first part of what is decided about a packet of a flow of the node.
#[inline(always)]
pub(super) fn quick<T: FlowTables>(
    tables: &T,
    packet: &PacketMeta,
    flow: &Hit,
    is_established: bool,
) -> Quick {
    if changes(tables, packet, flow, is_established) {
        Quick::Known
    } else {
        Quick::decided(written(packet, flow))
    }
}

/// The part that is for packets that change the flow, or that are noted.
#[inline(always)]
pub(super) fn known<T: FlowTables>(
    tables: &T,
    packet: &PacketMeta,
    flow: &Hit,
    is_established: bool,
) -> PacketVerdict {
    if changes(tables, packet, flow, is_established) {
        advance(tables, packet, is_answer(flow), is_established);
    }
    written(packet, flow).about(packet)
}

#[inline(always)]
fn is_answer(flow: &Hit) -> bool {
    matches!(flow.role, Role::NodeReply)
}

#[inline(always)]
fn changes<T: FlowTables>(tables: &T, packet: &PacketMeta, flow: &Hit, is_established: bool) -> bool {
    let is_due = life::is_due(tables, flow);
    if is_established {
        return is_due || packet.tcp.has(TcpFlags::FIN) || packet.tcp.has(TcpFlags::RST);
    }
    if flow.ends.is_closed() {
        return packet.tcp.opens() || is_due && packet.tcp.changes_nothing();
    }
    is_answer(flow) || is_due && matches!(packet.protocol, Protocol::Udp)
}

#[inline(never)]
fn advance<T: FlowTables>(tables: &T, packet: &PacketMeta, is_answer: bool, is_established: bool) {
    let hook = if is_answer { Hook::Ingress } else { Hook::Egress };
    let is_end = packet.tcp.has(TcpFlags::FIN) || packet.tcp.has(TcpFlags::RST);
    let act = |flow: &mut Conversation| {
        let is_closed = flow.ends.is_closed();
        flow.last_seen = tables.now();
        let action = if is_end {
            flow.ends = Ends::RESET;
            Action::End
        } else if packet.tcp.opens() && is_closed || !is_answer && !is_established && !is_closed {
            // Begins anew from the same port; or asks on, and was not answered yet.
            (flow.state, flow.ends) = (FlowState::Opening, Ends::OPEN);
            Action::Put
        } else {
            (flow.state, flow.ends) = (FlowState::Established, Ends::OPEN);
            // What of an established flow was evicted comes back.
            if is_established { Action::Keep(FlowTable::Established, Marks::SEEN) } else { Action::Establish }
        };
        tables.act(flow, Role::NodeRequest, action);
        tables.act(flow, Role::NodeReply, action);
    };
    if is_established {
        tables.with_flow(packet, hook, act);
    } else {
        tables.with_transient(packet, hook, act);
    }
}

/// What the flow says is written, where that is something else.
#[inline(always)]
fn written(packet: &PacketMeta, flow: &Hit) -> Decision {
    if is_answer(flow) {
        if flow.port == packet.destination_port {
            return Decision::pass(Reason::NotAService);
        }
        return flow.set_destination();
    }
    if flow.port == packet.source_port {
        return Decision::pass(Reason::NotAService);
    }
    flow.set_source()
}
