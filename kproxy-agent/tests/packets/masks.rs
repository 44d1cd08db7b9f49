//! Ports that clients are masked with: each given out once towards a backend, none that a socket of this node has, and
//! no wrong connection when there is none left.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use kproxy::programs::Capacities;
use kproxy_common::{Behind, DeviceAddresses, PacketVerdict, Protocol, Reason};

use crate::{
    cluster::{Family, Ports, Service, Who},
    flow::Flow,
    frame::{ACK, FIN, Frame, Link, RST, SYN},
    world::{Action, At, Device, ROOM, World, in_world},
};

/// The only ports there are.
const FEW: (u16, u16) = (61_000, 32);
/// All that there are.
const ALL: (u16, u16) = (1_024, 64_512);
const CLIENTS: u16 = 200;

/// Clients ask one after the other; what they are masked with, or `None` where they are dropped.
fn ask(world: &mut World, family: Family, protocol: Protocol) -> Vec<Option<SocketAddr>> {
    let frontend = Who::Node.at(family, Ports::of(protocol).node_port(1));
    let first = |number| {
        let client = Who::Client(1).at(family, 20_000 + number);
        let packet = Frame::of(protocol, Link::Ethernet, client, frontend, SYN);
        let (_, sent) = world.meet(At::In(Device::Uplink), Link::Ethernet, &packet);
        let (verdict, sent) = world.meet(At::Out(Device::Uplink), Link::Ethernet, &sent.expect("it goes on"));
        if sent.is_none() {
            assert_eq!(verdict, PacketVerdict::Drop { reason: Reason::MaskPortsExhausted });
        }
        sent.map(|sent| sent.source())
    };
    (0..CLIENTS).map(first).collect()
}

/// Each mask once, of the ports that there are, and most of them.
fn check(masks: &[Option<SocketAddr>], free: &BTreeSet<u16>) {
    let given: Vec<u16> = masks.iter().flatten().map(SocketAddr::port).collect();
    let distinct: BTreeSet<u16> = given.iter().copied().collect();
    assert_eq!(distinct.len(), given.len(), "a port was given out twice: {given:?}");
    assert!(distinct.is_subset(free), "{distinct:?} of {free:?}");
    // Sixteen tries each, by so many clients, miss hardly one.
    assert!(distinct.len() * 10 >= free.len() * 9, "{} of {}", distinct.len(), free.len());
}

#[test]
fn exhaustion_is_a_drop_and_never_a_wrong_connection() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)]), Service::new(2, &[Who::There(2)])]);
        world.use_mask_ports(FEW);
        let free = (FEW.0..FEW.0 + FEW.1).collect();
        for family in [Family::V4, Family::V6] {
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                let masks = ask(world, family, protocol);
                assert!(masks.iter().any(Option::is_none), "so many clients cannot all be masked");
                check(&masks, &free);
                // Towards another backend they are all free.
                let client = Who::Client(2).at(family, 20_000);
                let frontend = Who::Node.at(family, Ports::of(protocol).node_port(2));
                let packet = Frame::of(protocol, Link::Ethernet, client, frontend, SYN);
                let (_, sent) = world.meet(At::In(Device::Uplink), Link::Ethernet, &packet);
                let sent = sent.expect("it goes on");
                assert!(world.meet(At::Out(Device::Uplink), Link::Ethernet, &sent).1.is_some());
            }
        }
    });
}

/// One node sends as many connections at once to one backend as kube-proxy does, and none is lost; what is more than
/// there are ports is dropped, and counted.
#[test]
fn sixty_thousand_connections_to_one_backend() {
    const HELD: usize = 60_000;
    let (first, count) = ALL;
    let tables = Capacities { flows: 524_288, ..ROOM };
    in_world(tables, |world| {
        world.have(&[Service::new(1, &[Who::There(1)])]);
        world.use_mask_ports(ALL);
        let ports = Ports::of(Protocol::Tcp);
        let frontend = Who::Node.at(Family::V4, ports.node_port(1));
        let (mut given, mut dropped) = (BTreeSet::new(), 0);
        let clients = (1..=3_u8).flat_map(|host| (1_024..=u16::MAX).map(move |port| (host, port)));
        for (host, port) in clients {
            let client = Who::Client(host).at(Family::V4, port);
            let packet = Frame::of(Protocol::Tcp, Link::Ethernet, client, frontend, SYN);
            let (_, sent) = world.meet(At::In(Device::Uplink), Link::Ethernet, &packet);
            let (verdict, sent) =
                world.meet(At::Out(Device::Uplink), Link::Ethernet, &sent.expect("it goes on"));
            let Some(sent) = sent else {
                assert_eq!(verdict, PacketVerdict::Drop { reason: Reason::MaskPortsExhausted });
                assert!(given.len() >= HELD, "the one after {} is lost", given.len());
                dropped += 1;
                if dropped == 100 {
                    break;
                }
                continue;
            };
            assert!(given.insert(sent.source().port()), "{} is given out twice", sent.source());
        }
        println!("{} connections at once, then {dropped} were dropped", given.len());
        assert_eq!(dropped, 100, "there are only {count} ports, and {} were given out", given.len());
        assert!(given.iter().all(|port| *port >= first));
    });
}

#[test]
fn a_port_that_a_socket_has_is_not_given_out() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)])]);
        world.use_mask_ports(FEW);
        for family in [Family::V4, Family::V6] {
            let address = Who::Node.ip(family);
            world.have_address(Device::Uplink, address);
            let taken: Vec<UdpSocket> = (FEW.0..FEW.0 + FEW.1)
                .step_by(2)
                .map(|port| UdpSocket::bind((address, port)).expect("the address is this namespace's"))
                .collect();
            let bound: Vec<SocketAddr> = taken.iter().map(|socket| socket.local_addr().unwrap()).collect();
            world.know_sockets(&bound);
            let masks = ask(world, family, Protocol::Udp);
            let free =
                (FEW.0..FEW.0 + FEW.1).filter(|port| bound.iter().all(|socket| socket.port() != *port));
            check(&masks, &free.collect());
        }
    });
}

/// A connection of a client, from its opening to both FINs; the port that hid it, if there was one.
fn connect_and_close(world: &mut World, client: SocketAddr) -> Option<u16> {
    let ports = Ports::of(Protocol::Tcp);
    let (frontend, backend) =
        (Who::Node.at(Family::V4, ports.node_port(1)), Who::There(1).at(Family::V4, ports.target));
    let mut pass = |at, from, to, flags| {
        world.meet(at, Link::Ethernet, &Frame::of(Protocol::Tcp, Link::Ethernet, from, to, flags)).1
    };
    let (inward, outward) = (At::In(Device::Uplink), At::Out(Device::Uplink));
    pass(inward, client, frontend, SYN).expect("it goes on");
    let mask = pass(outward, client, backend, SYN)?.source();
    assert_eq!(pass(inward, backend, mask, SYN | ACK).map(|sent| sent.destination()), Some(client));
    assert_eq!(pass(outward, backend, client, SYN | ACK).map(|sent| sent.source()), Some(frontend));
    for flags in [ACK, ACK | FIN] {
        pass(inward, client, frontend, flags).expect("it goes on");
    }
    pass(outward, backend, client, ACK | FIN).expect("it goes on");
    Some(mask.port())
}

fn client(number: u16) -> SocketAddr {
    Who::Client(1).at(Family::V4, 20_000 + number)
}

/// A backend that has closed first still knows the connection before, and takes another client's for a part of it.
#[test]
fn the_port_of_a_flow_that_has_ended_rests_before_another_client_gets_it() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)])]);
        let first: BTreeSet<u16> =
            (0..200).filter_map(|number| connect_and_close(world, client(number))).collect();
        assert_eq!(first.len(), 200);
        let again = |world: &mut World, from: u16| -> BTreeSet<u16> {
            let given: BTreeSet<u16> =
                (from..from + 300).filter_map(|number| connect_and_close(world, client(number))).collect();
            assert!(given.len() > 290, "{} of 300 get a port of their own", given.len());
            given.intersection(&first).copied().collect()
        };
        assert_eq!(again(world, 1_000), BTreeSet::new(), "at once");
        world.let_pass(Duration::from_secs(55));
        assert_eq!(again(world, 2_000), BTreeSet::new(), "after 55 s");
        world.let_pass(Duration::from_secs(6));
        assert_ne!(again(world, 3_000), BTreeSet::new(), "after more than a minute they are free");
        world.compare_flows();
    });
}

/// For the backend it is what it would be without a mask.
#[test]
fn a_client_that_comes_back_from_the_same_port_gets_the_same_mask_at_once() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)])]);
        for number in 0..20 {
            let mask = connect_and_close(world, client(number));
            assert_eq!(connect_and_close(world, client(number)), mask);
        }
        world.compare_flows();
    });
}

/// Where the packet would be dropped else, a port that has rested for a second must do: its backend takes most.
#[test]
fn where_no_port_has_rested_those_that_are_over_are_given_out_again() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)])]);
        world.use_mask_ports(FEW);
        // As many as there are ports: some find none, unless the machine is slow.
        for number in 0..FEW.1 {
            connect_and_close(world, client(number));
        }
        for number in 0..8 * FEW.1 {
            world.let_pass(Duration::from_secs(2));
            let mask = connect_and_close(world, client(1_000 + number));
            assert!(mask.is_some(), "connection {number}");
        }
        world.compare_flows();
    });
}

/// An end that one RST has told may be forged: nobody gets the port before the flow has been silent for a minute.
#[test]
fn the_port_of_a_flow_that_goes_on_after_a_reset_is_not_given_out() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)])]);
        world.use_mask_ports(FEW);
        let flow =
            Flow::open(world, Family::V4, Link::Ethernet, Protocol::Tcp, Who::Client(9), (1, Who::There(1)));
        let [request, .., reply] = flow.places();
        for ((at, [from, to], _), flags) in [(request, ACK), (request, RST), (request, SYN)] {
            world.meet(at, Link::Ethernet, &Frame::tcp(Link::Ethernet, from, to, flags));
        }
        for round in 0..4 {
            world.let_pass(Duration::from_secs(50));
            // Only its answers are heard at first.
            let (at, [from, to], _) = if round == 0 { reply } else { request };
            world.meet(at, Link::Ethernet, &Frame::tcp(Link::Ethernet, from, to, ACK));
            let masks = ask(world, Family::V4, Protocol::Tcp);
            assert!(!masks.iter().flatten().any(|mask| *mask == flow.peer), "round {round}");
            if round > 0 {
                continue;
            }
            let (at, [from, to], _) = request;
            world.meet(at, Link::Ethernet, &Frame::tcp(Link::Ethernet, from, to, ACK));
        }
    });
}

/// A client asks a backend by an address that hides it, is refused, and asks the same backend from the same port by one
/// that does not.
#[test]
fn a_mask_goes_with_its_flow() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::Here(1)])]);
        for (family, protocol) in [Family::V4, Family::V6]
            .into_iter()
            .flat_map(|family| [Protocol::Tcp, Protocol::Sctp].map(|protocol| (family, protocol)))
        {
            let ports = Ports::of(protocol);
            let (client, backend) =
                (Who::Client(1).at(family, 20_000), Who::Here(1).at(family, ports.target));
            let mut pass = |at, from, to, flags| {
                let packet = Frame::of(protocol, Link::Ethernet, from, to, flags);
                let (verdict, sent) = world.meet(at, Link::Ethernet, &packet);
                sent.unwrap_or_else(|| panic!("{from} to {to}: {verdict:?}"))
            };
            let hidden = Who::ClusterIp(1).at(family, ports.port);
            assert_eq!(pass(At::In(Device::Uplink), client, hidden, SYN).destination(), backend);
            let mask = pass(At::Out(Device::Pod), client, backend, SYN).source();
            assert_ne!(mask, client);
            assert_eq!(pass(At::In(Device::Pod), backend, mask, RST).destination(), client);
            assert_eq!(pass(At::Out(Device::Uplink), backend, client, RST).source(), hidden);
            let plain = Who::Node.at(family, ports.node_port(1));
            assert_eq!(pass(At::In(Device::Uplink), client, plain, SYN).destination(), backend);
            assert_eq!(pass(At::Out(Device::Pod), client, backend, SYN).source(), client);
        }
        world.compare_flows();
    });
}

/// Clients ask while the addresses that they are masqueraded with change: each is, with the old or the new.
#[test]
fn clients_are_masqueraded_while_addresses_change() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)])]);
        let family = Family::V4;
        let addresses = [Who::Node, Who::NodeAside].map(|who| DeviceAddresses {
            v4: who.ip(family).into(),
            v6: who.ip(Family::V6).into(),
            bridged_v4: 0,
            bridged_v6: 0,
            behind: Behind::Outside,
            _pad: [0; 3],
        });
        let (mut map, index) = (world.device_map(), world.index(Device::Uplink));
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut changes = 0;
                while !is_over.load(Ordering::Relaxed) {
                    map.write(&[(index, addresses[changes % 2])].into()).expect("it is written");
                    changes += 1;
                }
                changes
            });
            let ports = Ports::of(Protocol::Udp);
            let frontend = Who::Node.at(family, ports.node_port(1));
            let end = Instant::now() + Duration::from_secs(2);
            let mut seen = BTreeMap::<IpAddr, usize>::new();
            let mut clients = (1..=200).flat_map(|host| (1_024..=u16::MAX).map(move |port| (host, port)));
            while Instant::now() < end {
                let (host, port) = clients.next().expect("there are millions");
                let client = Who::Client(host).at(family, port);
                let packet = Frame::of(Protocol::Udp, Link::Ethernet, client, frontend, SYN);
                let sent = world.run(At::In(Device::Uplink), Link::Ethernet, &packet.bytes());
                assert_eq!(sent.action, Action::Next);
                let packet = packet.with_destination(Who::There(1).at(family, ports.target));
                let sent = world.run(At::Out(Device::Uplink), Link::Ethernet, &packet.bytes());
                // Towards one backend there are not so many ports: some are dropped for that reason.
                if sent.action == Action::Next {
                    let sent = Frame::read(Link::Ethernet, &sent.bytes).expect("it is a packet still");
                    *seen.entry(sent.source().ip()).or_default() += 1;
                }
            }
            is_over.store(true, Ordering::Relaxed);
            let changes = writer.join().expect("it does not panic");
            let counted = world.newly_counted();
            println!("{changes} changes, masqueraded: {seen:?}, {counted:?}");
            assert!(counted.iter().all(|(reason, _)| *reason != Reason::NoMaskAddress), "{counted:?}");
            assert!(changes > 20 && seen.len() == 2, "{changes} changes, {seen:?}");
        });
    });
}

/// A client that asks a backend from one port by more frontends than there are ports to tell them apart: those that get
/// one are answered each by its own frontend, the others are dropped.
#[test]
fn a_clients_other_ports_are_given_out_once_each_and_run_out() {
    in_world(ROOM, |world| {
        let services: Vec<Service> = (1..=20).map(|number| Service::new(number, &[Who::Here(1)])).collect();
        world.have(&services);
        world.use_mask_ports(FEW);
        let free: BTreeSet<u16> = (FEW.0..FEW.0 + FEW.1).collect();
        for family in [Family::V4, Family::V6] {
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                let ports = Ports::of(protocol);
                let client = Who::Here(5).at(family, 20_000);
                let frontends = (1..=20).flat_map(|number| {
                    [Who::ClusterIp(number), Who::LoadBalancer(number), Who::External(number)]
                        .map(|who| who.at(family, ports.port))
                });
                let mut pass = |at, from, to, flags| {
                    world.meet(at, Link::Ethernet, &Frame::of(protocol, Link::Ethernet, from, to, flags))
                };
                let (inward, outward) = (At::In(Device::Pod), At::Out(Device::Pod));
                let asked: Vec<(SocketAddr, Option<Frame>)> = frontends
                    .map(|frontend| {
                        let (verdict, sent) = pass(inward, client, frontend, SYN);
                        if sent.is_none() {
                            assert_eq!(verdict, PacketVerdict::Drop { reason: Reason::MaskPortsExhausted });
                        }
                        (frontend, sent)
                    })
                    .collect();
                assert_eq!(asked[0].1.as_ref().map(Frame::source), Some(client), "the first keeps its port");
                let others: Vec<_> =
                    asked[1..].iter().map(|(_, sent)| sent.as_ref().map(Frame::source)).collect();
                assert!(others.iter().any(Option::is_none), "there are not as many ports");
                check(&others, &free);
                for (frontend, sent) in asked {
                    let Some(sent) = sent else { continue };
                    let (_, answer) = pass(outward, sent.destination(), sent.source(), SYN | ACK);
                    let answer = answer.expect("it is of a flow");
                    assert_eq!((answer.source(), answer.destination()), (frontend, client));
                }
            }
        }
    });
}
