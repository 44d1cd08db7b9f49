//! Fragments follow their first: what is put together again behind the hook is the datagram, translated.

use std::net::SocketAddr;

use etherparse::{
    IpFragOffset, IpHeaders, IpNumber, Ipv6FragmentHeader, SlicedPacket,
    defrag::{IpDefragPayloadVec, IpDefragPool},
};
use kproxy_common::{Protocol, Reason, map_names};

use crate::{
    cluster::{Family, Port, Service, Who},
    flow::Flow,
    frame::{ACK, Frame, Link, PSH, SYN},
    world::{Action, At, Device, Outcome, ROOM, World, in_world},
};

/// Octets of IP payload in a fragment: a multiple of eight, and so little that there are three.
const PIECE: usize = 512;

/// The packet in fragments, as they go over a link.
fn fragments(packet: &Frame, id: u16) -> Vec<Vec<u8>> {
    let link = if packet.ethernet.is_some() { Link::Ethernet } else { Link::Ip };
    let whole = packet.bytes();
    let start = link.header_length() + packet.ip.header_len();
    let payload = &whole[start..];
    let count = payload.len().div_ceil(PIECE);
    let piece = |(number, piece): (usize, &[u8])| {
        let offset = IpFragOffset::try_new((number * PIECE / 8) as u16).expect("it is small");
        let more = number + 1 < count;
        let mut ip = packet.ip.clone();
        match &mut ip {
            IpHeaders::Ipv4(header, _) => {
                header.dont_fragment = false;
                (header.more_fragments, header.fragment_offset, header.identification) = (more, offset, id);
            }
            IpHeaders::Ipv6(header, extensions) => {
                extensions.fragment = Some(Ipv6FragmentHeader {
                    next_header: header.next_header,
                    fragment_offset: offset,
                    more_fragments: more,
                    identification: id.into(),
                });
                header.next_header = IpNumber::IPV6_FRAGMENTATION_HEADER;
            }
        }
        ip.set_payload_len(piece.len()).expect("it is short");
        if let IpHeaders::Ipv4(header, _) = &mut ip {
            header.header_checksum = header.calc_header_checksum();
        }
        let mut bytes = whole[..link.header_length()].to_vec();
        ip.write(&mut bytes).expect("memory can be written to");
        bytes.extend(piece);
        bytes
    };
    payload.chunks(PIECE).enumerate().map(piece).collect()
}

/// The packet that fragments are of, in whichever order they came.
fn together(link: Link, fragments: &[Vec<u8>], like: &Frame) -> Option<Frame> {
    let mut pool = IpDefragPool::<(), ()>::new();
    let mut whole: Option<IpDefragPayloadVec> = None;
    let mut ends: Option<(SocketAddr, SocketAddr)> = None;
    for fragment in fragments {
        let sliced = match link {
            Link::Ethernet => SlicedPacket::from_ethernet(fragment),
            Link::Ip => SlicedPacket::from_ip(fragment),
        };
        let sliced = sliced.expect("a fragment can be read");
        let (headers, _) =
            IpHeaders::from_slice(&fragment[link.header_length()..]).expect("it was just read");
        if let IpHeaders::Ipv4(header, _) = &headers {
            assert_eq!(header.header_checksum, header.calc_header_checksum(), "of a fragment");
        }
        let [from, to] = match &headers {
            IpHeaders::Ipv4(header, _) => [header.source.into(), header.destination.into()],
            IpHeaders::Ipv6(header, _) => [header.source.into(), header.destination.into()],
        };
        let these = (SocketAddr::new(from, 0), SocketAddr::new(to, 0));
        assert_eq!(*ends.get_or_insert(these), these, "fragments part");
        whole = whole.or(pool.process_sliced_packet(&sliced, (), ()).expect("they fit together"));
    }
    let (payload, (from, to)) = (whole?.payload, ends?);
    // The headers of a whole packet from and to these addresses, then what was put together.
    let mut bytes = like.clone().with_source(from).with_destination(to).bytes();
    bytes.truncate(link.header_length() + like.ip.header_len());
    bytes.extend(payload);
    Some(Frame::read(link, &bytes).expect("it is sound, its checksum too"))
}

/// What comes out of the program at this hook when the packet arrives there in fragments, in this order.
fn pass(
    world: &mut World,
    (at, link): (At, Link),
    packet: &Frame,
    id: u16,
    order: [usize; 3],
) -> Vec<(Outcome, Vec<(Reason, u64)>)> {
    let pieces = fragments(packet, id);
    assert_eq!(pieces.len(), order.len());
    let pass = |which: usize| (world.run(at, link, &pieces[which]), world.newly_counted());
    order.map(pass).to_vec()
}

/// The fragments have gone on, and are those of the packet with these ends.
fn check_follow(passed: Vec<(Outcome, Vec<(Reason, u64)>)>, packet: &Frame, expected: &Frame, about: &str) {
    let link = if packet.ethernet.is_some() { Link::Ethernet } else { Link::Ip };
    let sent = passed.into_iter().map(|(outcome, counted)| {
        assert_eq!(outcome.action, Action::Next, "{about}: {counted:?}");
        assert_eq!(counted, [(Reason::Forwarded, 1)], "{about}");
        outcome.bytes
    });
    let arrived = together(link, &sent.collect::<Vec<_>>(), packet).expect("they are all there");
    assert_eq!(arrived.bytes(), expected.bytes(), "{about}");
}

/// The rest comes in any order, as long as the first comes first.
const ORDERS: [[usize; 3]; 2] = [[0, 1, 2], [0, 2, 1]];

fn payload() -> Vec<u8> {
    (0..1_200).map(|at| (at % 251) as u8).collect()
}

#[test]
fn fragments_follow_their_first() {
    in_world(ROOM, |world| {
        let mut id = 0;
        Flow::each(world, &[Protocol::Udp, Protocol::Tcp], |world, flow| {
            for (at, [from, to], [then_from, then_to]) in flow.places() {
                if [from, to] == [then_from, then_to] {
                    continue;
                }
                let link = flow.link_at(at);
                let packet = Frame::of(flow.protocol, link, from, to, ACK | PSH).with_payload(&payload());
                let expected = packet.clone().with_source(then_from).with_destination(then_to);
                for order in ORDERS {
                    id += 1;
                    let passed = pass(world, (at, link), &packet, id, order);
                    check_follow(passed, &packet, &expected, &format!("{} {at:?}", flow.about()));
                }
            }
        });
    });
}

/// The checksum of SCTP does not cover addresses: where these alone change, fragments follow.
#[test]
fn sctp_in_fragments_follows_where_its_ports_stay() {
    in_world(ROOM, |world| {
        let mut service = Service::new(1, &[Who::Here(1)]);
        service.ports = vec![Port { port: 3_868, node_port: 30_701, target: 3_868, protocol: "SCTP" }];
        world.have(&[service]);
        for family in [Family::V4, Family::V6] {
            let [client, frontend, backend] =
                [(Who::Client(1), 20_000), (Who::LoadBalancer(1), 3_868), (Who::Here(1), 3_868)]
                    .map(|(who, port)| who.at(family, port));
            let hook = (At::In(Device::Uplink), Link::Ethernet);
            let back = (At::Out(Device::Uplink), Link::Ethernet);
            let of = |from, to, flags| Frame::of(Protocol::Sctp, Link::Ethernet, from, to, flags);
            // While the association is opened and when it is established, both ways.
            let (_, sent) = world.meet(hook.0, hook.1, &of(client, frontend, SYN));
            assert_eq!(sent.map(|sent| sent.destination()), Some(backend));
            let mut id = 0;
            for _ in 0..2 {
                for ((from, to), (then_from, then_to), hook) in [
                    ((client, frontend), (client, backend), hook),
                    ((backend, client), (frontend, client), back),
                ] {
                    for order in ORDERS {
                        id += 1;
                        let packet = of(from, to, ACK).with_payload(&payload());
                        let passed = pass(world, hook, &packet, id, order);
                        let expected = packet.clone().with_source(then_from).with_destination(then_to);
                        check_follow(passed, &packet, &expected, &format!("{from} to {to}"));
                    }
                }
            }
        }
    });
}

/// Where ports would change, all fragments are dropped, whichever way they go: none leaves half translated, or not at all.
#[test]
fn sctp_in_fragments_goes_nowhere_where_its_ports_change() {
    in_world(ROOM, |world| {
        let mut id = 0;
        Flow::each(world, &[Protocol::Sctp], |world, flow| {
            for (at, [from, to], then) in flow.places() {
                if [from, to] == then {
                    continue;
                }
                let link = flow.link_at(at);
                let packet = Frame::of(flow.protocol, link, from, to, ACK).with_payload(&payload());
                id += 1;
                check_dropped(world, (at, link), &packet, id, &format!("{} {at:?}", flow.about()));
            }
        });
        // Nor do they open anything.
        world.forget();
        for family in [Family::V4, Family::V6] {
            let (client, frontend) = (Who::Client(9).at(family, 20_000), Who::ClusterIp(2).at(family, 3_868));
            let packet =
                Frame::of(Protocol::Sctp, Link::Ethernet, client, frontend, SYN).with_payload(&payload());
            let first = &fragments(&packet, 7)[0];
            let outcome = world.run(At::In(Device::Uplink), Link::Ethernet, first);
            assert_eq!((outcome.action, &outcome.bytes), (Action::Drop, first));
            assert_eq!(world.newly_counted(), [(Reason::SctpFragment, 1)]);
        }
        assert!(world.entries(map_names::FLOW_TRANSIENT).is_empty());
    });
}

fn check_dropped(world: &mut World, hook: (At, Link), packet: &Frame, id: u16, about: &str) {
    let pieces = fragments(packet, id);
    for (piece, (outcome, counted)) in pieces.iter().zip(pass(world, hook, packet, id, [0, 1, 2])) {
        assert_eq!((outcome.action, &outcome.bytes), (Action::Drop, piece), "{about}: {counted:?}");
        assert_eq!(counted, [(Reason::SctpFragment, 1)], "{about}");
    }
}

#[test]
fn a_fragment_before_its_first_goes_nowhere() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)])]);
        for family in [Family::V4, Family::V6] {
            let (from, to) = (Who::Here(5).at(family, 20_000), Who::ClusterIp(1).at(family, 53));
            let packet = Frame::udp(Link::Ethernet, from, to).with_payload(&[7; 1_200]);
            let pieces = fragments(&packet, 99);
            for piece in &pieces[1..] {
                let outcome = world.run(At::In(Device::Pod), Link::Ethernet, piece);
                assert_eq!((outcome.action, &outcome.bytes), (Action::Drop, piece));
                assert_eq!(world.newly_counted(), [(Reason::EarlyFragment, 1)]);
            }
            // Another datagram's first does not speak for them.
            let other = fragments(&packet, 100);
            assert_eq!(run(world, &other[0]), Action::Next);
            assert_eq!(run(world, &pieces[1]), Action::Drop);
            // Their own does.
            assert_eq!(run(world, &pieces[0]), Action::Next);
            assert_eq!(run(world, &pieces[1]), Action::Next);
        }
    });
}

fn run(world: &mut World, piece: &[u8]) -> Action {
    let action = world.run(At::In(Device::Pod), Link::Ethernet, piece).action;
    world.newly_counted();
    action
}
