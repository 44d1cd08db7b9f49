//! ICMP errors about packets of a flow: whoever sent the packet gets them about the packet that it sent, from any
//! router on the way, from the other end, and from this node itself.

use std::net::{IpAddr, SocketAddr};

use etherparse::{Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpNumber, icmpv4, icmpv6};
use kproxy_common::{Protocol, Reason};

use crate::{
    cluster::{Family, Who},
    flow::Flow,
    frame::{ACK, Frame, Link, PSH},
    hostile::with_ip_header,
    world::{Action, At, ROOM, World, in_world},
};

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Path MTU discovery.
    TooBig,
    /// Nobody listens.
    PortUnreachable,
    /// Traceroute.
    TimeExceeded,
}

const KINDS: [Kind; 3] = [Kind::TooBig, Kind::PortUnreachable, Kind::TimeExceeded];

/// What is quoted of a packet.
struct Quoted {
    packet: Frame,
    /// Whose transport checksum it has: it stays as it was where the error was made. Nobody can look at it who does not
    /// have the whole packet.
    seen: Frame,
    length: usize,
}

impl Quoted {
    fn bytes(&self) -> Vec<u8> {
        let (mut bytes, seen) = (self.packet.bytes(), self.seen.bytes());
        let transport = self.packet.ip.header_len();
        let checksum = match self.packet.protocol() {
            Protocol::Tcp => 16..18,
            Protocol::Udp => 6..8,
            Protocol::Sctp => 8..12,
        };
        let checksum = transport + checksum.start..transport + checksum.end;
        bytes[checksum.clone()].copy_from_slice(&seen[checksum]);
        bytes.truncate(self.length);
        bytes
    }
}

/// An error that `from` sends to who sent a packet.
fn error(link: Link, kind: Kind, from: IpAddr, to: IpAddr, quoted: &Quoted) -> Vec<u8> {
    let quoted = &quoted.bytes()[..];
    let (number, mut message) = match (from, to) {
        (IpAddr::V4(_), IpAddr::V4(_)) => {
            use icmpv4::{DestUnreachableHeader as Unreachable, TimeExceededCode};
            let kind = match kind {
                Kind::TooBig => {
                    let mtu = Unreachable::FragmentationNeeded { next_hop_mtu: 1_400 };
                    Icmpv4Type::DestinationUnreachable(mtu)
                }
                Kind::PortUnreachable => Icmpv4Type::DestinationUnreachable(Unreachable::Port),
                Kind::TimeExceeded => Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit),
            };
            (IpNumber::ICMP, Icmpv4Header::with_checksum(kind, quoted).to_bytes().to_vec())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let kind = match kind {
                Kind::TooBig => Icmpv6Type::PacketTooBig { mtu: 1_280 },
                Kind::PortUnreachable => {
                    Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port)
                }
                Kind::TimeExceeded => Icmpv6Type::TimeExceeded(icmpv6::TimeExceededCode::HopLimitExceeded),
            };
            let header = Icmpv6Header::with_checksum(kind, from.octets(), to.octets(), quoted);
            (IpNumber::IPV6_ICMP, header.expect("it is short").to_bytes().to_vec())
        }
        _ => panic!("two families"),
    };
    message.extend(quoted);
    with_ip_header(link, from, to, number, &message)
}

/// An error comes to one hook, and goes on as another error.
fn becomes(
    world: &mut World,
    flow: &Flow,
    at: At,
    came: impl Fn(Link) -> Vec<u8>,
    goes: impl Fn(Link) -> Vec<u8>,
    about: &str,
) {
    let link = flow.link_at(at);
    let outcome = world.run(at, link, &came(link));
    let counted = world.newly_counted();
    assert_eq!(outcome.action, Action::Next, "{about} {at:?}: {counted:?}");
    assert_eq!(
        outcome.bytes,
        goes(link),
        "{about} {at:?}\n{:02x?} expected\n{:02x?} found",
        goes(link),
        outcome.bytes
    );
    assert_eq!(counted, [(Reason::IcmpTranslated, 1)], "{about} {at:?}");
}

/// The same packet of the flow between other ends.
fn packet(flow: &Flow, [from, to]: [SocketAddr; 2]) -> Frame {
    Frame::of(flow.protocol, Link::Ip, from, to, ACK | PSH).with_payload(b"what was said")
}

/// How much is quoted: what IPv4 must, more, all.
fn lengths(family: Family) -> [usize; 3] {
    match family {
        Family::V4 => [28, 48, 1_000],
        Family::V6 => [48, 80, 1_000],
    }
}

#[test]
fn errors_reach_who_sent_the_packet() {
    in_world(ROOM, |world| {
        Flow::each(world, &PROTOCOLS, |world, flow| {
            let Flow { family, client, client_device, frontend, backend, backend_device, peer, .. } = *flow;
            let router = Who::Client(254).ip(family);
            let quote = |packet_ends, seen, length| Quoted {
                packet: packet(flow, packet_ends),
                seen: packet(flow, seen),
                length,
            };
            for kind in KINDS {
                for length in lengths(family) {
                    // About a request, from a router behind this node or from the backend itself.
                    for from in [router, backend.ip()] {
                        let about =
                            format!("{}: {kind:?} of {length} from {from} about a request", flow.about());
                        let seen = |link| {
                            error(
                                link,
                                kind,
                                from,
                                peer.ip(),
                                &quote([peer, backend], [peer, backend], length),
                            )
                        };
                        let inside = |link| {
                            error(
                                link,
                                kind,
                                from,
                                client.ip(),
                                &quote([client, backend], [peer, backend], length),
                            )
                        };
                        let name = if from == backend.ip() { frontend.ip() } else { from };
                        let told = |link| {
                            error(
                                link,
                                kind,
                                name,
                                client.ip(),
                                &quote([client, frontend], [peer, backend], length),
                            )
                        };
                        if peer != client {
                            becomes(world, flow, At::In(backend_device), seen, inside, &about);
                        }
                        becomes(world, flow, At::Out(client_device), inside, told, &about);
                    }
                    // From this node, which has seen the request between its hooks.
                    let node = Who::Node.ip(family);
                    let about =
                        format!("{}: {kind:?} of {length} from the node about a request", flow.about());
                    let inside = |link| {
                        error(
                            link,
                            kind,
                            node,
                            client.ip(),
                            &quote([client, backend], [client, backend], length),
                        )
                    };
                    let told = |link| {
                        error(
                            link,
                            kind,
                            node,
                            client.ip(),
                            &quote([client, frontend], [client, backend], length),
                        )
                    };
                    becomes(world, flow, At::Out(client_device), inside, told, &about);
                    // About a reply, from a router before this node or from the client itself.
                    for from in [router, client.ip()] {
                        let about =
                            format!("{}: {kind:?} of {length} from {from} about a reply", flow.about());
                        let seen = |link| {
                            error(
                                link,
                                kind,
                                from,
                                frontend.ip(),
                                &quote([frontend, client], [frontend, client], length),
                            )
                        };
                        let inside = |link| {
                            error(
                                link,
                                kind,
                                from,
                                backend.ip(),
                                &quote([backend, client], [frontend, client], length),
                            )
                        };
                        let name = if from == client.ip() { peer.ip() } else { from };
                        let told = |link| {
                            error(
                                link,
                                kind,
                                name,
                                backend.ip(),
                                &quote([backend, peer], [frontend, client], length),
                            )
                        };
                        becomes(world, flow, At::In(client_device), seen, inside, &about);
                        if peer != client {
                            becomes(world, flow, At::Out(backend_device), inside, told, &about);
                        }
                    }
                }
            }
        });
    });
}
