//! Fragments follow their first: what is put together again behind the hook is the datagram, translated.

use std::net::SocketAddr;

use etherparse::{
    IpFragOffset, IpHeaders, IpNumber, Ipv6FragmentHeader, SlicedPacket,
    defrag::{IpDefragPayloadVec, IpDefragPool},
};
use kproxy_common::{Protocol, Reason};

use crate::{
    cluster::{Family, Service, Who},
    flow::Flow,
    frame::{ACK, Frame, Link, PSH},
    world::{Action, At, Device, ROOM, World, in_world},
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
                let payload: Vec<u8> = (0..1_200).map(|at| (at % 251) as u8).collect();
                let packet = Frame::of(flow.protocol, link, from, to, ACK | PSH).with_payload(&payload);
                // The rest in any order, as long as the first comes first.
                for order in [[0, 1, 2], [0, 2, 1]] {
                    id += 1;
                    let pieces = fragments(&packet, id);
                    assert_eq!(pieces.len(), order.len());
                    let pass = |which: usize| {
                        let outcome = world.run(at, link, &pieces[which]);
                        let counted = world.newly_counted();
                        let about = || format!("{} {at:?}, fragment {which}", flow.about());
                        assert_eq!(outcome.action, Action::Next, "{}: {counted:?}", about());
                        assert_eq!(counted, [(Reason::Forwarded, 1)], "{}", about());
                        outcome.bytes
                    };
                    let sent: Vec<_> = order.map(pass).to_vec();
                    let expected = packet.clone().with_source(then_from).with_destination(then_to);
                    let arrived = together(link, &sent, &packet).expect("they are all there");
                    assert_eq!(arrived.bytes(), expected.bytes(), "{} {at:?}", flow.about());
                }
            }
        });
    });
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
