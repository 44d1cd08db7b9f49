//! How long flows live that nobody answers, or that are over: as long as conntrack would keep them, and as long as they go
//! on, whatever becomes of the Service.

use std::{net::SocketAddr, time::Duration};

use kproxy_common::{PacketVerdict, Protocol, Role, map_names};

use crate::{
    cluster::{Family, Ports, Service, Who},
    frame::{ACK, FIN, Frame, Link, SYN},
    world::{At, Device, ROOM, World, in_world},
};

/// Enough of them that some move when they are balanced anew among others.
const CLIENTS: u16 = 24;
const BACKENDS: [Who; 8] = [
    Who::There(1),
    Who::Here(1),
    Who::There(2),
    Who::Here(2),
    Who::There(3),
    Who::Here(3),
    Who::There(4),
    Who::Here(4),
];

/// A packet of one of the clients through both hooks: the backend, and who it thinks has sent it.
fn send(world: &mut World, family: Family, protocol: Protocol, client: u16) -> (SocketAddr, SocketAddr) {
    let from = Who::Client(1).at(family, 20_000 + client);
    let to = Who::Node.at(family, Ports::of(protocol).node_port(1));
    let packet = Frame::of(protocol, Link::Ethernet, from, to, SYN);
    let (_, sent) = world.meet(At::In(Device::Uplink), Link::Ethernet, &packet);
    let sent = sent.expect("it goes on");
    let is_here =
        BACKENDS.iter().any(|who| matches!(who, Who::Here(_)) && who.ip(family) == sent.destination().ip());
    let out = At::Out(if is_here { Device::Pod } else { Device::Uplink });
    let (_, sent) = world.meet(out, Link::Ethernet, &sent);
    let sent = sent.expect("it goes on");
    (sent.destination(), sent.source())
}

fn send_all(world: &mut World, family: Family, protocol: Protocol) -> Vec<(SocketAddr, SocketAddr)> {
    (0..CLIENTS).map(|client| send(world, family, protocol, client)).collect()
}

fn is_empty(world: &mut World) -> bool {
    [map_names::FLOW, map_names::FLOW_TRANSIENT].into_iter().all(|map| world.entries(map).is_empty())
}

/// Without an answer a flow of UDP is kept for 30 s, from its last datagram.
#[test]
fn one_way_udp_stays_at_its_backend_as_long_as_it_goes_on() {
    in_world(ROOM, |world| {
        for family in [Family::V4, Family::V6] {
            world.reset();
            world.have(&[Service::new(1, &BACKENDS[..2])]);
            let went = send_all(world, family, Protocol::Udp);
            for count in 3..=BACKENDS.len() {
                world.let_pass(Duration::from_secs(20));
                world.have(&[Service::new(1, &BACKENDS[..count])]);
                assert_eq!(send_all(world, family, Protocol::Udp), went);
                world.compare_ages();
                world.sweep();
                world.compare_flows();
            }
            world.let_pass(Duration::from_secs(25));
            world.sweep();
            world.compare_ages();
            world.let_pass(Duration::from_secs(6));
            world.sweep();
            assert!(is_empty(world), "nobody has sent anything for 31 s");
            // What kept them was not chance.
            world.forget();
            assert_ne!(send_all(world, family, Protocol::Udp), went);
        }
    });
}

/// conntrack does not renew the time of an opening either: who asks again and again without an answer would keep a
/// backend for ever, and a mask's port.
#[test]
fn an_opening_that_is_repeated_lives_no_longer() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &BACKENDS[..2])]);
        for protocol in [Protocol::Tcp, Protocol::Sctp] {
            let went = send_all(world, Family::V4, protocol);
            world.let_pass(Duration::from_secs(70));
            assert_eq!(send_all(world, Family::V4, protocol), went);
            world.sweep();
            world.compare_ages();
            world.let_pass(Duration::from_secs(51));
            world.sweep();
            assert!(is_empty(world), "{protocol:?} was begun 121 s ago");
            world.forget();
        }
    });
}

/// Also by a packet that comes after more time than this machine has been up, the agent being dead: what lies before the
/// boot is not taken for what is still to come.
#[test]
fn a_packet_is_noted_whatever_the_uptime() {
    const LONG: Duration = Duration::from_secs(400 * 86_400);
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::Here(1)])]);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let ports = Ports::of(protocol);
            let (client, frontend, backend) = (
                Who::Client(1).at(Family::V4, 20_000),
                Who::Node.at(Family::V4, ports.node_port(1)),
                Who::Here(1).at(Family::V4, ports.target),
            );
            let (inward, outward) = (At::In(Device::Uplink), At::Out(Device::Uplink));
            let pass = |world: &mut World, at, from, to, flags| {
                world.meet(at, Link::Ethernet, &Frame::of(protocol, Link::Ethernet, from, to, flags)).0
            };
            pass(world, inward, client, frontend, SYN);
            pass(world, outward, backend, client, SYN | ACK);
            pass(world, inward, client, frontend, ACK);
            world.let_pass(LONG);
            world.compare_ages();
            pass(world, inward, client, frontend, ACK);
            pass(world, outward, backend, client, ACK);
            world.compare_ages();
            world.sweep();
            assert!(!is_empty(world), "{protocol:?}: both ends have just been heard");
            world.let_pass(LONG);
            world.sweep();
            assert!(is_empty(world), "{protocol:?}: nothing was heard for 400 days");
            world.forget();
        }
    });
}

/// However long it idled before: its last packets are still to come.
#[test]
fn a_connection_that_is_over_is_kept_for_stragglers() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::Here(1)])]);
        let ports = Ports::of(Protocol::Tcp);
        let (client, frontend, backend) = (
            Who::Client(1).at(Family::V4, 20_000),
            Who::Node.at(Family::V4, ports.node_port(1)),
            Who::Here(1).at(Family::V4, ports.target),
        );
        let (inward, outward) = (At::In(Device::Uplink), At::Out(Device::Uplink));
        let pass = |world: &mut World, at, from, to, flags| {
            world.meet(at, Link::Ethernet, &Frame::of(Protocol::Tcp, Link::Ethernet, from, to, flags)).0
        };
        pass(world, inward, client, frontend, SYN);
        pass(world, outward, backend, client, SYN | ACK);
        pass(world, inward, client, frontend, ACK);
        world.let_pass(Duration::from_secs(3 * 3_600));
        world.sweep();
        pass(world, inward, client, frontend, ACK | FIN);
        pass(world, outward, backend, client, ACK | FIN);
        world.let_pass(Duration::from_secs(110));
        world.sweep();
        world.compare_ages();
        let verdict = pass(world, outward, backend, client, ACK);
        assert!(matches!(verdict, PacketVerdict::SetSource { .. }), "{verdict:?}");
        world.let_pass(Duration::from_secs(11));
        world.sweep();
        assert!(is_empty(world), "it was over 121 s ago");
    });
}

/// A flow whose beginning was evicted is begun anew, and with another backend if the Service has others now. What the first
/// backend answers late does not lead the client back.
#[test]
fn a_late_answer_does_not_lead_a_flow_to_the_backend_before() {
    in_world(ROOM, |world| {
        for family in [Family::V4, Family::V6] {
            world.have(&[Service::new(1, &[Who::There(1)])]);
            let (first, mask) = send(world, family, Protocol::Udp, 0);
            let entries = world.entries(map_names::FLOW_TRANSIENT);
            let request = entries.iter().find(|(_, flow)| flow.role == Role::Request).expect("it is there");
            world.evict(request.0);
            world.have(&[Service::new(1, &[Who::There(2)])]);
            let went = send(world, family, Protocol::Udp, 0);
            assert_ne!(went.0, first);
            let late = Frame::udp(Link::Ethernet, first, mask);
            let (_, late) = world.meet(At::In(Device::Uplink), Link::Ethernet, &late);
            let (_, late) = world.meet(At::Out(Device::Uplink), Link::Ethernet, &late.expect("it goes on"));
            assert!(late.is_some());
            assert_eq!(send(world, family, Protocol::Udp, 0), went);
            world.compare_flows();
            world.forget();
        }
    });
}
