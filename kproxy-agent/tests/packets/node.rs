//! Flows of the node itself: what it sends past every frontend, where that could meet flows of Services.

use std::net::SocketAddr;

use kproxy_common::{PacketVerdict, Protocol, Reason};

use crate::{
    cluster::{Family, Ports, Service, Who},
    frame::{ACK, FIN, Frame, Link, PSH, RST, SYN},
    world::{At, Device, ROOM, World, in_world},
};

const IN: At = At::In(Device::Uplink);
const OUT: At = At::Out(Device::Uplink);
const UNTOUCHED: PacketVerdict = PacketVerdict::Pass { reason: Reason::NotAService };

/// A packet through a hook; it must go on.
fn pass(
    world: &mut World,
    at: At,
    protocol: Protocol,
    (from, to): (SocketAddr, SocketAddr),
    flags: u8,
) -> (SocketAddr, SocketAddr) {
    let (verdict, sent) =
        world.meet(at, Link::Ethernet, &Frame::of(protocol, Link::Ethernet, from, to, flags));
    let sent = sent.unwrap_or_else(|| panic!("{from} to {to}: {verdict:?}"));
    (sent.source(), sent.destination())
}

/// The node asks a name server from a port that is a UDP NodePort: the answer is no question to that.
#[test]
fn answers_to_what_was_sent_from_a_node_port_arrive() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::Here(1)])]);
        let ports = Ports::of(Protocol::Udp);
        for family in [Family::V4, Family::V6] {
            let node = Who::Node.at(family, ports.node_port(1));
            let server = Who::Elsewhere.at(family, 53);
            let udp = |from, to| Frame::of(Protocol::Udp, Link::Ethernet, from, to, 0);
            for _ in 0..3 {
                assert_eq!(world.meet(OUT, Link::Ethernet, &udp(node, server)).0, UNTOUCHED);
                assert_eq!(world.meet(IN, Link::Ethernet, &udp(server, node)).0, UNTOUCHED);
            }
            // A stranger's question is one, also from the server's address.
            for stranger in [Who::Client(1).at(family, 53), Who::Elsewhere.at(family, 54)] {
                let (verdict, sent) = world.meet(IN, Link::Ethernet, &udp(stranger, node));
                let backend = Who::Here(1).at(family, ports.target);
                assert_eq!(sent.map(|sent| sent.destination()), Some(backend), "{stranger}: {verdict:?}");
            }
            // And what the node sends from another port is nobody's business.
            let other = SocketAddr::new(node.ip(), 40_000);
            let before = world.all_entries();
            assert_eq!(world.meet(OUT, Link::Ethernet, &udp(other, server)).0, UNTOUCHED);
            assert_eq!(world.all_entries(), before);
        }
        world.compare_flows();
    });
}

/// As long as either direction goes on, and the UDP timeout after.
#[test]
fn an_answer_is_one_until_the_flow_has_idled() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::Here(1)])]);
        let ports = Ports::of(Protocol::Udp);
        let node = Who::Node.at(Family::V4, ports.node_port(1));
        let server = Who::Elsewhere.at(Family::V4, 53);
        let udp = |from, to| Frame::of(Protocol::Udp, Link::Ethernet, from, to, 0);
        let seconds = std::time::Duration::from_secs;
        // The programs alone: nobody sweeps the host's tables.
        let is_untouched = |world: &mut World, at, from, to| {
            let packet = udp(from, to).bytes();
            world.run(at, Link::Ethernet, &packet).bytes == packet
        };
        let is_answer = |world: &mut World| is_untouched(world, IN, server, node);
        // Unanswered for longer than such a flow is kept.
        assert!(is_untouched(world, OUT, node, server));
        world.let_pass(seconds(25));
        world.sweep();
        assert!(is_answer(world), "after 25 s");
        for _ in 0..4 {
            world.let_pass(seconds(170));
            world.sweep();
            assert!(is_answer(world), "answers alone keep it");
        }
        for _ in 0..4 {
            world.let_pass(seconds(170));
            world.sweep();
            assert!(is_untouched(world, OUT, node, server));
        }
        assert!(is_answer(world), "what the node sends keeps it");
        world.let_pass(seconds(190));
        world.sweep();
        assert!(!is_answer(world), "it has idled for more than the UDP timeout");
    });
}

/// Clients are masqueraded towards a backend, from ports that then somebody on this node uses towards it; each keeps its
/// own answers.
#[test]
fn who_comes_second_gets_another_port() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)])]);
        for (family, protocol) in [Family::V4, Family::V6]
            .into_iter()
            .flat_map(|family| [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(|each| (family, each)))
        {
            let ports = Ports::of(protocol);
            let (client, frontend) =
                (Who::Client(1).at(family, 20_000), Who::Node.at(family, ports.node_port(1)));
            let backend = Who::There(1).at(family, ports.target);
            pass(world, IN, protocol, (client, frontend), SYN);
            let (mask, _) = pass(world, OUT, protocol, (client, backend), SYN);
            // A socket of the host, or what the CNI has made of a pod's connection: the same port.
            let (other, to) = pass(world, OUT, protocol, (mask, backend), SYN);
            assert_eq!((other.ip(), to), (mask.ip(), backend));
            assert_ne!(other.port(), mask.port(), "{protocol:?}: both have one port");
            for _ in 0..2 {
                assert_eq!(pass(world, IN, protocol, (backend, other), SYN | ACK).1, mask);
                assert_eq!(pass(world, IN, protocol, (backend, mask), SYN | ACK).1, client);
                assert_eq!(pass(world, OUT, protocol, (mask, backend), ACK).0, other);
            }
            // What stands already is not given out to clients.
            let mut standing = std::collections::BTreeSet::new();
            for port in 61_000..61_050 {
                let host = SocketAddr::new(mask.ip(), port);
                standing.insert(pass(world, OUT, protocol, (host, backend), SYN).0.port());
            }
            for port in 20_001..20_300 {
                let client = SocketAddr::new(client.ip(), port);
                pass(world, IN, protocol, (client, frontend), SYN);
                let (mask, _) = pass(world, OUT, protocol, (client, backend), SYN);
                assert!(standing.insert(mask.port()), "{protocol:?}: {mask} is given out twice");
            }
        }
        world.compare_flows();
    });
}

/// A connection that has ended gives its port back; one that only seems to have, keeps it.
#[test]
fn a_connection_of_the_node_ends() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)])]);
        let ports = Ports::of(Protocol::Tcp);
        let (client, frontend) =
            (Who::Client(1).at(Family::V4, 20_000), Who::Node.at(Family::V4, ports.node_port(1)));
        let backend = Who::There(1).at(Family::V4, ports.target);
        let tcp = |world: &mut World, at, from, to, flags| pass(world, at, Protocol::Tcp, (from, to), flags);
        tcp(world, IN, client, frontend, SYN);
        let (mask, _) = tcp(world, OUT, client, backend, SYN);
        for end in [RST, ACK | FIN] {
            let (other, _) = tcp(world, OUT, mask, backend, SYN);
            assert_eq!(tcp(world, IN, backend, other, SYN | ACK).1, mask);
            assert_eq!(tcp(world, OUT, mask, backend, ACK | PSH).0, other);
            let established = world.all_entries()[0].len();
            assert_eq!(established, 2, "its two entries are established");
            assert_eq!(tcp(world, IN, backend, other, end).1, mask);
            assert_eq!(world.all_entries()[0].len(), 0);
            // It goes on: the end was forged, or its other half is open still.
            assert_eq!(tcp(world, OUT, mask, backend, ACK | PSH).0, other);
            world.let_pass(std::time::Duration::from_secs(2));
            assert_eq!(tcp(world, OUT, mask, backend, ACK | PSH).0, other);
            assert_eq!(world.all_entries()[0].len(), 2, "it is established again");
            tcp(world, OUT, mask, backend, ACK | end);
            world.let_pass(std::time::Duration::from_secs(130));
            world.sweep();
            assert!(
                world
                    .all_entries()
                    .iter()
                    .flatten()
                    .all(|(key, _)| key.source_port != other.port() && key.destination_port != other.port()),
                "what has ended is taken out"
            );
            tcp(world, IN, client, frontend, SYN);
            tcp(world, OUT, client, backend, SYN);
        }
    });
}
