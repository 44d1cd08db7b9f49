//! Where a part of the packet programs is not there to go on in, a packet is left alone, counted, and nothing else is done:
//! what could not be decided is never guessed.

use std::net::{IpAddr, SocketAddr};

use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Type, IpNumber};
use kproxy_common::{PACKET_PARTS, Protocol, Reason};

use crate::{
    cluster::{Family, Ports, Service, Who},
    frame::{ACK, FIN, Frame, Link, SYN},
    hostile::with_ip_header,
    world::{Action, At, Device, Outcome, ROOM, World, in_world},
};

const IN: At = At::In(Device::Uplink);
const OUT: At = At::Out(Device::Uplink);

/// A packet that each part is needed for, and where.
fn packets() -> Vec<(&'static str, At, Vec<u8>)> {
    let ports = Ports::of(Protocol::Tcp);
    let at = |who: Who, port| who.at(Family::V4, port);
    let (client, backend) = (at(Who::Client(1), 20_000), at(Who::There(1), ports.target));
    let (web, empty) = (at(Who::Node, ports.node_port(1)), at(Who::Node, ports.node_port(2)));
    let of = |protocol, from, to, flags| Frame::of(protocol, Link::Ethernet, from, to, flags).bytes();
    let tcp = |from, to, flags| of(Protocol::Tcp, from, to, flags);
    let [other, opening] = [20_001, 20_003].map(|port| SocketAddr::new(client.ip(), port));
    vec![
        ("in_known", IN, tcp(client, web, ACK | FIN)),
        ("in_new", IN, tcp(other, web, SYN)),
        ("in_open", IN, tcp(other, web, SYN)),
        ("refused", IN, tcp(other, empty, SYN)),
        ("in_odd", IN, of(Protocol::Sctp, other, at(Who::Node, Ports::of(Protocol::Sctp).node_port(1)), SYN)),
        ("in_icmp", IN, echo(client.ip(), Who::ClusterIp(1).ip(Family::V4))),
        ("out_known", OUT, tcp(opening, backend, SYN)),
        ("out_new", OUT, tcp(at(Who::Node, 20_002), at(Who::ClusterIp(1), ports.port), SYN)),
        ("out_odd", OUT, of(Protocol::Sctp, at(Who::Node, 20_002), at(Who::ClusterIp(1), 3_868), SYN)),
        ("out_icmp", OUT, echo(Who::Node.ip(Family::V4), Who::ClusterIp(1).ip(Family::V4))),
        ("dropped", IN, tcp(other, at(Who::Unallocated, 80), SYN)),
        ("in_answer", IN, tcp(other, backend, ACK)),
        ("out_node", OUT, tcp(at(Who::Node, 20_002), backend, SYN)),
    ]
}

fn echo(from: IpAddr, to: IpAddr) -> Vec<u8> {
    let request = Icmpv4Type::EchoRequest(IcmpEchoHeader { id: 1, seq: 1 });
    let message = Icmpv4Header::with_checksum(request, &[]).to_bytes();
    with_ip_header(Link::Ethernet, from, to, IpNumber::ICMP, &message)
}

#[test]
fn without_a_part_packets_are_left_alone_and_counted() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)]), Service::new(2, &[])]);
        let packets = packets();
        let parts: Vec<&str> = packets.iter().map(|(part, ..)| *part).collect();
        assert_eq!(parts, PACKET_PARTS, "a packet for each part, in their order");
        for (part, at, packet) in &packets {
            open(world);
            let index = PACKET_PARTS.iter().position(|name| name == part).expect("just compared") as u32;
            world.route_by_source(*part == "in_answer");
            world.take_part_out(index);
            let entries = world.all_entries();
            let missing = run(world, *at, packet);
            assert_eq!(missing.0.bytes, *packet, "{part}");
            let expected = match *part {
                // Only the telling has a part of its own.
                "dropped" => (Action::Drop, vec![(Reason::UnallocatedAddress, 1)]),
                _ => (Action::Next, vec![(Reason::ProgramMissing, 1)]),
            };
            assert_eq!((missing.0.action, missing.1), expected, "{part}");
            assert_eq!(world.all_entries(), entries, "{part}");
            world.put_part_back(index);
            let (_, counted) = run(world, *at, packet);
            assert!(
                counted.iter().all(|(reason, _)| *reason != Reason::ProgramMissing),
                "{part}: {counted:?}"
            );
            // A packet without a flow is nobody's business, which is not counted.
            assert_eq!(counted.is_empty(), matches!(*part, "in_answer" | "out_node"), "{part}: {counted:?}");
            assert!(*part != "out_node" || world.all_entries() != entries, "{part} was not needed for it");
            world.route_by_source(false);
            world.forget();
        }
    });
}

/// One client's connection is established, another's has not yet come to where it leaves.
fn open(world: &mut World) {
    let ports = Ports::of(Protocol::Tcp);
    let of = |who: Who, port| who.at(Family::V4, port);
    let (client, opening) = (of(Who::Client(1), 20_000), of(Who::Client(1), 20_003));
    let (web, backend) = (of(Who::Node, ports.node_port(1)), of(Who::There(1), ports.target));
    let mut pass = |at, from, to, flags| {
        let (outcome, counted) = run(world, at, &Frame::tcp(Link::Ethernet, from, to, flags).bytes());
        assert_eq!(counted, [(Reason::Forwarded, 1)], "{from} to {to}");
        Frame::read(Link::Ethernet, &outcome.bytes).expect("it is sound")
    };
    pass(IN, client, web, SYN);
    let mask = pass(OUT, client, backend, SYN).source();
    pass(IN, backend, mask, SYN | ACK);
    pass(OUT, backend, client, SYN | ACK);
    pass(IN, client, web, ACK);
    pass(IN, opening, web, SYN);
}

fn run(world: &mut World, at: At, packet: &[u8]) -> (Outcome, Vec<(Reason, u64)>) {
    (world.run(at, Link::Ethernet, packet), world.newly_counted())
}
