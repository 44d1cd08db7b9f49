//! ICMP and ICMPv6: errors about translated packets, redirects, and echo.

use super::{FlowTables, Hit, PacketMeta, PacketVerdict, entry, on_other_protocol};
use crate::{Address, Hook, Reason, Role};

/// What an ICMP message is, as far as it is our business.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IcmpKind {
    /// Quotes a packet that could not be delivered: unreachable, time exceeded, too big, parameter problem.
    Error,
    /// Quotes a packet for whose destination there is a better way (type 5; ICMPv6 137).
    Redirect,
    /// An echo request.
    Echo,
    /// Anything else.
    Other,
}

/// An ICMP message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IcmpMeta {
    /// The message's own source.
    pub source: Address,
    /// The message's own destination.
    pub destination: Address,
    /// What it is.
    pub kind: IcmpKind,
    /// The packet that it quotes; of no meaning where it quotes none, or one that has no ports.
    pub quoted: PacketMeta,
    /// Whether it quotes one.
    pub quotes: bool,
}

/// What is done with an ICMP message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IcmpVerdict {
    /// Goes on unchanged.
    Pass { reason: Reason },
    /// Is dropped.
    Drop { reason: Reason },
    /// An echo request that is answered here.
    Answer,
    /// Goes on with other addresses. At ingress: the quoted packet's source is written, and its destination port unless
    /// `client_port` is 0. At egress: the quoted packet's destination, and its source port. If `outer`, the message's
    /// own destination (ingress) or source (egress) becomes the same address.
    Translate { address: Address, port: u16, client_port: u16, outer: bool },
}

/// An ICMP message at `hook`.
///
/// An error travels against the packet that it quotes. So what a packet of the other direction gets written here, the
/// quoted packet must get on its other end: each hook undoes in the quotation what the hooks did to the packet.
#[inline(always)]
pub fn on_icmp<T: FlowTables>(tables: &T, icmp: &IcmpMeta, hook: Hook) -> IcmpVerdict {
    match icmp.kind {
        IcmpKind::Echo => return on_echo(tables, icmp),
        IcmpKind::Error if icmp.quotes => {
            if let Some(flow) = entry(tables, &reverse(&icmp.quoted), hook) {
                return translate(icmp, hook, &flow);
            }
        }
        // Nobody routes by what this host has written into a packet.
        IcmpKind::Redirect if icmp.quotes => {
            if entry(tables, &reverse(&icmp.quoted), hook).is_some()
                || entry(tables, &icmp.quoted, hook).is_some()
            {
                return IcmpVerdict::Drop { reason: Reason::IcmpRedirect };
            }
        }
        IcmpKind::Error | IcmpKind::Redirect | IcmpKind::Other => {}
    }
    match on_other_protocol(tables, &icmp.destination) {
        PacketVerdict::Drop { reason } => IcmpVerdict::Drop { reason },
        _ => IcmpVerdict::Pass { reason: Reason::NotAService },
    }
}

#[inline(always)]
fn on_echo<T: FlowTables>(tables: &T, icmp: &IcmpMeta) -> IcmpVerdict {
    match on_other_protocol(tables, &icmp.destination) {
        PacketVerdict::Drop { reason: Reason::UndefinedPort } => {
            if icmp.source == icmp.destination || !icmp.source.is_unicast() {
                return IcmpVerdict::Drop { reason: Reason::HostileSource };
            }
            IcmpVerdict::Answer
        }
        PacketVerdict::Drop { reason } => IcmpVerdict::Drop { reason },
        _ => IcmpVerdict::Pass { reason: Reason::NotAService },
    }
}

#[inline(always)]
fn translate(icmp: &IcmpMeta, hook: Hook, flow: &Hit) -> IcmpVerdict {
    let outer = match hook {
        // An error is sent to whoever sent what it quotes.
        Hook::Ingress if icmp.destination != icmp.quoted.source => {
            return IcmpVerdict::Pass { reason: Reason::Unparsed };
        }
        Hook::Ingress => true,
        // A router on the way keeps its name; an endpoint has that of the flow. Where a client is masked, so is whoever is
        // before it: the backend's node knows no way back to that one by which it would take a packet from here.
        Hook::Egress => icmp.source == icmp.quoted.destination || matches!(flow.role, Role::Forwarded),
    };
    if flow.port == 0 {
        return IcmpVerdict::Pass { reason: Reason::NoFlow };
    }
    let (address, port) = (flow.address, flow.port);
    IcmpVerdict::Translate { address, port, client_port: flow.written_client_port(), outer }
}

/// The packet that answers this one.
#[inline(always)]
fn reverse(packet: &PacketMeta) -> PacketMeta {
    PacketMeta {
        source: packet.destination,
        destination: packet.source,
        source_port: packet.destination_port,
        destination_port: packet.source_port,
        ..*packet
    }
}
