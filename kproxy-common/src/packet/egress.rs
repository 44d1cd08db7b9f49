//! Packets that go out: a backend's answers to clients, clients to be masked, and what this host sends.

use super::{
    Decision, FlowTables, PacketMeta, PacketVerdict, Quick, in_service_cidr, ingress::objection, life, mask,
    node, node_egress,
};
use crate::{
    ClientKind, FlowState, Hook, Protocol, Reason, Resolution, Role, Tables, decision::find, resolve,
};

/// A packet that goes out by the interface `device`: perhaps a client's that is to be masked there, perhaps the
/// answer of a backend, perhaps something of this host that should have been translated before it got here.
#[inline(always)]
pub fn on_egress<T: FlowTables>(tables: &T, packet: &PacketMeta, device: u32) -> PacketVerdict {
    match quick_egress(tables, packet).of_any_form() {
        Quick::Verdict(verdict) => verdict,
        Quick::Known => known_egress(tables, packet, device),
        Quick::New => new_egress(tables, packet),
        Quick::Node => node_egress(tables, packet),
    }
}

/// The first part of [`on_egress`]: packets in the middle of a flow, and those that are nobody's business.
#[inline(always)]
pub fn quick_egress<T: FlowTables>(tables: &T, packet: &PacketMeta) -> Quick {
    if let Some(flow) = tables.flow(packet, Hook::Egress) {
        if flow.is_nodes() {
            return node::quick(tables, packet, &flow, true);
        }
        if packet.tcp.changes_nothing() && !life::is_due(tables, &flow) {
            return Quick::decided(flow.set_source());
        }
        return Quick::Known;
    }
    if let Some(flow) = tables.transient(packet, Hook::Egress) {
        if flow.is_nodes() {
            return node::quick(tables, packet, &flow, false);
        }
        let is_reply = matches!(flow.role, Role::Reply);
        let is_known = if is_reply {
            !matches!(flow.state, FlowState::Opening) && packet.tcp.changes_nothing()
        } else {
            flow.port != 0 && !packet.tcp.opens()
        };
        if is_known && !life::is_transient_due(tables, packet, &flow) {
            return Quick::decided(flow.set_source());
        }
        return Quick::Known;
    }
    if !packet.may_open() {
        return Quick::decided(Decision::pass(Reason::NoFlow));
    }
    // Nothing leaves for a loopback address: who sends does not matter to whether it is for a frontend.
    let is_passed = matches!(
        find(tables, &packet.connection(ClientKind::Outside)),
        Err(Resolution::Pass { reason: Reason::NotAService, .. })
    );
    if !is_passed {
        return Quick::New;
    }
    match tables.config() {
        Some(config) if node::concerns(tables, config, packet) => Quick::Node,
        _ => Quick::decided(Decision::pass(Reason::NotAService)),
    }
}

/// The part of [`on_egress`] that is for packets of a flow, wherever in it they stand.
#[inline(always)]
pub fn known_egress<T: FlowTables>(tables: &T, packet: &PacketMeta, device: u32) -> PacketVerdict {
    if let Some(flow) = tables.flow(packet, Hook::Egress) {
        if flow.is_nodes() {
            return node::known(tables, packet, &flow, true);
        }
        if life::may_be_past(tables, packet, &flow) && life::give_way(tables, packet) {
            return Decision::pass(Reason::NotAService).into();
        }
        life::advance(tables, packet, Hook::Egress, &flow);
        return flow.set_source().about(packet);
    }
    let Some(mut flow) = tables.transient(packet, Hook::Egress) else {
        // It has just been evicted.
        return Decision::drop(Reason::NoFlow).into();
    };
    if flow.is_nodes() {
        return node::known(tables, packet, &flow, false);
    }
    if life::may_be_past(tables, packet, &flow) && life::give_way(tables, packet) {
        return Decision::pass(Reason::NotAService).into();
    }
    let is_answer = matches!(flow.role, Role::Reply) && matches!(flow.state, FlowState::Opening);
    let mut reason = Reason::Forwarded;
    if flow.port == 0 {
        reason = mask::mask(tables, packet, device, &mut flow);
    } else if !is_answer && life::is_transient_due(tables, packet, &flow) {
        life::note_transient(tables, packet, Hook::Egress, flow.is_clients());
    } else if matches!(flow.role, Role::Reply) {
        life::answer(tables, packet);
    }
    let decision =
        if matches!(reason, Reason::Forwarded) { flow.set_source() } else { Decision::drop(reason) };
    decision.about(packet)
}

/// The part of [`on_egress`] that is for packets without a flow. Pods' and strangers' packets were decided about where
/// they came in: what is still addressed to a service here was sent by this host.
#[inline(always)]
pub fn new_egress<T: Tables>(tables: &T, packet: &PacketMeta) -> PacketVerdict {
    let decision = match resolve(tables, &packet.connection(ClientKind::Host)) {
        Resolution::Drop { reason, .. } => Decision::drop(reason),
        // What its sockets may connect to is answered when it sends; those of SCTP no socket hook has seen at all.
        Resolution::Reject { reason: Reason::UndefinedPort, .. } => {
            match (packet.protocol, objection(packet)) {
                (Protocol::Sctp, _) => Decision::drop(Reason::Unserved),
                (_, Reason::Forwarded) => Decision::refuse(Reason::UndefinedPort),
                (_, reason) => Decision::drop(reason),
            }
        }
        Resolution::Balance(_) | Resolution::Reject { .. }
            if in_service_cidr(tables, &packet.destination) =>
        {
            Decision::drop(Reason::Unserved)
        }
        Resolution::Balance(_) | Resolution::Reject { .. } => Decision::pass(Reason::Unserved),
        Resolution::Pass { reason, .. } => Decision::pass(reason),
    };
    decision.into()
}
