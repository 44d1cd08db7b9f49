//! ICMP errors about packets of a flow: whoever sent the packet gets them about the packet that it sent, octet for octet,
//! from any router on the way, from the other end, and from this node itself.

use std::net::{IpAddr, SocketAddr};

use kproxy_common::{Protocol, Reason};

use crate::{
    cluster::Who,
    flow::Flow,
    frame::{ACK, Frame, Link, PSH, Transport},
    messages::{Kind, Message, Quoted},
    seldom,
    world::{Action, At, ROOM, World, in_world},
};

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

fn error(link: Link, kind: Kind, from: IpAddr, to: IpAddr, quoted: &Quoted) -> Vec<u8> {
    Message { kind, from, to, quoted: Some(quoted.clone()) }.bytes(link)
}

/// An error comes to one hook, and goes on as another error. So it does where octets follow that are not the packet's, and
/// where it has options itself, or an extension header.
fn becomes(
    world: &mut World,
    flow: &Flow,
    at: At,
    came: impl Fn(Link) -> Vec<u8>,
    goes: impl Fn(Link) -> Vec<u8>,
    about: &str,
) {
    let link = flow.link_at(at);
    let plain = [came(link), goes(link)];
    let odd = plain.each_ref().map(|message| seldom::any_with_header(link, message));
    let followed = plain.each_ref().map(|message| [&message[..], &[0x5a; 20]].concat());
    for [came, goes] in [plain, followed, odd] {
        let outcome = world.run(at, link, &came);
        let counted = world.newly_counted();
        assert_eq!(outcome.action, Action::Next, "{about} {at:?}: {counted:?}");
        let found = &outcome.bytes;
        assert_eq!(*found, goes, "{about} {at:?}\n{goes:02x?} expected\n{found:02x?} found");
        assert_eq!(counted, [(Reason::IcmpTranslated, 1)], "{about} {at:?}");
    }
}

/// What packet of a flow is quoted.
#[derive(Clone, Copy, Debug)]
enum Form {
    Usual,
    /// UDP that has no checksum, where it need not have one.
    Unsummed,
    /// With options, or extension headers.
    Seldom(usize),
}

impl Form {
    const ALL: [Self; 5] = [Self::Usual, Self::Unsummed, Self::Seldom(0), Self::Seldom(2), Self::Seldom(3)];

    /// The same packet of the flow between other ends.
    fn packet(self, flow: &Flow, [from, to]: [SocketAddr; 2]) -> Frame {
        let mut packet =
            Frame::of(flow.protocol, Link::Ip, from, to, ACK | PSH).with_payload(b"what was said");
        match (self, &mut packet.transport) {
            (Self::Unsummed, Transport::Udp(_, has_checksum)) => *has_checksum = false,
            (Self::Seldom(number), _) => return seldom::headers(packet, number),
            _ => {}
        }
        packet
    }
}

/// How much is quoted, from the transport header on: what IPv4 must, as far as SCTP's checksum, as TCP's, all.
const LENGTHS: [usize; 4] = [8, 12, 18, 1_000];

#[test]
fn errors_reach_who_sent_the_packet() {
    in_world(ROOM, |world| {
        Flow::each(world, &PROTOCOLS, |world, flow| {
            let Flow {
                family, client, client_device, inner, frontend, backend, backend_device, peer, ..
            } = *flow;
            let router = Who::Client(254).ip(family);
            for (kind, form) in Kind::ERRORS.into_iter().flat_map(|kind| Form::ALL.map(|form| (kind, form))) {
                let quote = |ends, length| Quoted { packet: form.packet(flow, ends), length };
                for length in LENGTHS {
                    // About a request, from a router behind this node or from the backend itself.
                    for from in [router, backend.ip()] {
                        let about = format!(
                            "{}: {kind:?} of {length}, {form:?}, from {from} about a request",
                            flow.about()
                        );
                        let seen = |link| error(link, kind, from, peer.ip(), &quote([peer, backend], length));
                        let inside =
                            |link| error(link, kind, from, client.ip(), &quote([inner, backend], length));
                        let name = if from == backend.ip() { frontend.ip() } else { from };
                        let told =
                            |link| error(link, kind, name, client.ip(), &quote([client, frontend], length));
                        if flow.is_masked() {
                            becomes(world, flow, At::In(backend_device), seen, inside, &about);
                        }
                        becomes(world, flow, At::Out(client_device), inside, told, &about);
                    }
                    // From this node, which has seen the request between its hooks.
                    let node = Who::Node.ip(family);
                    let about = format!(
                        "{}: {kind:?} of {length}, {form:?}, from the node about a request",
                        flow.about()
                    );
                    let inside =
                        |link| error(link, kind, node, client.ip(), &quote([inner, backend], length));
                    let told =
                        |link| error(link, kind, node, client.ip(), &quote([client, frontend], length));
                    becomes(world, flow, At::Out(client_device), inside, told, &about);
                    // About a reply, from a router before this node or from the client itself.
                    for from in [router, client.ip()] {
                        let about = format!(
                            "{}: {kind:?} of {length}, {form:?}, from {from} about a reply",
                            flow.about()
                        );
                        let seen =
                            |link| error(link, kind, from, frontend.ip(), &quote([frontend, client], length));
                        let inside =
                            |link| error(link, kind, from, backend.ip(), &quote([backend, inner], length));
                        // Whoever is before a masked client is behind the mask, too.
                        let told = |link| {
                            error(link, kind, peer.ip(), backend.ip(), &quote([backend, peer], length))
                        };
                        becomes(world, flow, At::In(client_device), seen, inside, &about);
                        if flow.is_masked() {
                            becomes(world, flow, At::Out(backend_device), inside, told, &about);
                        }
                    }
                }
            }
        });
    });
}
