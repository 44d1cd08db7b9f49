//! Checksums, sizes and options: whatever a packet is made of, it comes out with its checksums right.

use std::{collections::BTreeSet, net::SocketAddr, sync::Mutex};

use etherparse::TcpOptionElement;
use kproxy_common::{PacketVerdict, Protocol};

use crate::{
    cluster::{Family, Ports, Service, Who},
    frame::{ACK, Frame, Link, PSH, SYN, Transport},
    hostile::Dice,
    seldom,
    world::{At, Device, ROOM, World, in_world, is_long_enough},
};

const CLIENT: Who = Who::Client(1);

/// Service 1 has one backend, on another node: its clients from outside are translated at each of the four hooks.
fn with_flow(test: impl Fn(&mut World, &Flow) + Send + Sync) {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)])]);
        for family in [Family::V4, Family::V6] {
            for link in Link::ALL {
                for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                    let flow = Flow::open(world, family, link, protocol);
                    test(world, &flow);
                }
            }
        }
    });
}

/// An established flow.
struct Flow {
    link: Link,
    protocol: Protocol,
    client: SocketAddr,
    frontend: SocketAddr,
    backend: SocketAddr,
    mask: SocketAddr,
}

impl Flow {
    fn open(world: &mut World, family: Family, link: Link, protocol: Protocol) -> Self {
        let ports = Ports::of(protocol);
        let (client, frontend) = (CLIENT.at(family, 20_000), Who::Node.at(family, ports.node_port(1)));
        let backend = Who::There(1).at(family, ports.target);
        let first = Frame::of(protocol, link, client, frontend, SYN);
        let (_, sent) = world.meet(At::In(Device::Uplink), link, &first);
        let (_, sent) = world.meet(At::Out(Device::Uplink), link, &sent.expect("it goes on"));
        let mask = sent.expect("it goes on").source();
        let flow = Self { link, protocol, client, frontend, backend, mask };
        flow.everywhere(world, |from, to| Frame::of(protocol, link, from, to, SYN | ACK));
        flow
    }

    /// A packet at each of the four hooks that those of the flow meet. Each comes out right: [`World::meet`] sees to
    /// it.
    fn everywhere(&self, world: &mut World, packet: impl Fn(SocketAddr, SocketAddr) -> Frame) {
        let Self { link, client, frontend, backend, mask, .. } = *self;
        for (hook, from, to) in [
            (At::In(Device::Uplink), client, frontend),
            (At::Out(Device::Uplink), client, backend),
            (At::In(Device::Uplink), backend, mask),
            (At::Out(Device::Uplink), backend, client),
        ] {
            let packet = packet(from, to);
            if !is_long_enough(&packet.bytes()) {
                continue;
            }
            let (verdict, _) = world.meet(hook, link, &packet);
            assert!(
                matches!(verdict, PacketVerdict::SetDestination { .. } | PacketVerdict::SetSource { .. }),
                "{hook:?} {from} to {to}: {verdict:?}"
            );
        }
    }

    fn packet(&self, from: SocketAddr, to: SocketAddr) -> Frame {
        Frame::of(self.protocol, self.link, from, to, ACK | PSH)
    }
}

#[test]
fn checksums_are_right_for_any_payload() {
    with_flow(|world, flow| {
        let mut dice = Dice::new(7);
        for length in (0..64).chain([511, 512, 1_399, 1_460]) {
            let payload = dice.bytes(length);
            flow.everywhere(world, |from, to| flow.packet(from, to).with_payload(&payload));
        }
        // Checksums all over their range.
        for word in (0..=u16::MAX).step_by(97) {
            let payload = [&word.to_be_bytes()[..], b"filled"].concat();
            flow.everywhere(world, |from, to| flow.packet(from, to).with_payload(&payload));
        }
    });
}

/// A datagram whose checksum comes out as 0 carries 0xffff: 0 would say that it has none.
#[test]
fn a_datagrams_checksum_never_becomes_none() {
    with_flow(|world, flow| {
        if flow.protocol != Protocol::Udp {
            return;
        }
        flow.everywhere(world, |from, to| {
            // With the checksum itself in its payload, the translated packet's sum is all ones.
            let plain = flow.packet(from, to).with_payload(&[0; 8]);
            let translated = flow.translated(plain.clone());
            let Transport::Udp(header, _) = Frame::read(flow.link, &translated.bytes()).unwrap().transport
            else {
                panic!("it is a datagram");
            };
            let mut payload = [0; 8];
            payload[..2].copy_from_slice(&header.checksum.to_be_bytes());
            let packet = flow.packet(from, to).with_payload(&payload);
            let after = flow.translated(packet.clone()).bytes();
            let at = after.len() - payload.len() - 2;
            assert_eq!(after[at..at + 2], [0xff, 0xff], "{from} to {to}");
            packet
        });
    });
}

impl Flow {
    /// What becomes of a packet of the flow.
    fn translated(&self, packet: Frame) -> Frame {
        let Self { client, frontend, backend, mask, .. } = *self;
        match (packet.source(), packet.destination()) {
            (from, to) if (from, to) == (client, frontend) => packet.with_destination(backend),
            (from, to) if (from, to) == (client, backend) => packet.with_source(mask),
            (from, to) if (from, to) == (backend, mask) => packet.with_destination(client),
            (from, to) if (from, to) == (backend, client) => packet.with_source(frontend),
            (from, to) => panic!("{from} to {to} is not of the flow"),
        }
    }
}

#[test]
fn a_datagram_without_a_checksum_stays_without() {
    with_flow(|world, flow| {
        if flow.protocol == Protocol::Udp {
            flow.everywhere(world, |from, to| {
                let mut packet = flow.packet(from, to);
                if let Transport::Udp(_, has_checksum) = &mut packet.transport {
                    *has_checksum = false;
                }
                packet
            });
        }
    });
}

#[test]
fn options_and_extension_headers_are_skipped_and_kept() {
    with_flow(|world, flow| {
        for number in 0..seldom::COUNT {
            flow.everywhere(world, |from, to| {
                seldom::headers(flow.packet(from, to).with_payload(b"behind all headers"), number)
            });
        }
        if flow.protocol == Protocol::Tcp {
            use TcpOptionElement::{
                MaximumSegmentSize, Noop, SelectiveAcknowledgement, Timestamp, WindowScale,
            };
            let sack = SelectiveAcknowledgement((1, 2), [Some((3, 4)), None, None]);
            let all: [&[TcpOptionElement]; 3] = [
                &[MaximumSegmentSize(1_460), Noop, WindowScale(7)],
                &[Noop, Noop, Timestamp(1, 2)],
                &[Noop, Noop, sack, Noop, Noop, Timestamp(5, 6)],
            ];
            for options in all {
                flow.everywhere(world, |from, to| {
                    let mut packet = flow.packet(from, to).with_payload(b"after the options");
                    if let Transport::Tcp(header) = &mut packet.transport {
                        header.set_options(options).expect("they fit");
                    }
                    packet
                });
            }
        }
    });
}

/// As large as test runs take them: what segmentation offload hands over is larger (the lab's transfers are made of
/// it), but so far from its headers nothing is read.
#[test]
fn large_packets_are_translated() {
    let skipped = Mutex::new(BTreeSet::new());
    with_flow(|world, flow| {
        let empty = flow.packet(flow.client, flow.frontend).with_payload(&[]);
        let header = empty.bytes().len() - flow.link.header_length();
        for size in [1_500, 3_000, 9_000, 65_535] {
            let payload = vec![0x5a; size - header];
            if world.can_run(&flow.packet(flow.client, flow.frontend).with_payload(&payload).bytes()) {
                flow.everywhere(world, |from, to| flow.packet(from, to).with_payload(&payload));
            } else {
                skipped.lock().unwrap().insert(size);
            }
        }
    });
    for size in skipped.into_inner().unwrap() {
        println!("skipped: this kernel's test runs take no packets of {size} octets");
    }
}
