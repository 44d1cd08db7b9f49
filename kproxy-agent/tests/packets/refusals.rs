//! Refusals of all sorts of packets.

use kproxy_common::{PacketVerdict, Protocol, Reason};

use crate::{
    cluster::{Family, Service, Who},
    frame::{Frame, Link, SYN},
    seldom,
    world::{At, Device, ROOM, in_world},
};

/// Where packets are refused, and whose.
const PLACES: [(At, Who); 3] = [
    (At::In(Device::Pod), Who::Here(5)),
    (At::In(Device::Uplink), Who::Client(1)),
    (At::Out(Device::Uplink), Who::Node),
];

/// What is answered, [`crate::answers`] looks at.
#[test]
fn options_and_extension_headers_keep_nobody_from_being_refused() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[])]);
        for (at, who) in PLACES {
            for family in [Family::V4, Family::V6] {
                for link in Link::ALL {
                    if link == Link::Ip && at == At::In(Device::Pod) {
                        continue;
                    }
                    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                        let (from, to) = (who.at(family, 20_000), Who::ClusterIp(1).at(family, 81));
                        let plain = Frame::of(protocol, link, from, to, SYN);
                        for (number, length) in (0..seldom::COUNT).flat_map(|one| [(one, 16), (one, 1_000)]) {
                            let packet = plain.clone().with_payload(&vec![0x5a; length]);
                            let packet = seldom::headers(packet, number);
                            let (verdict, _) = world.meet(at, link, &packet);
                            let expected = match (at, protocol) {
                                (At::Out(_), Protocol::Sctp) => {
                                    PacketVerdict::Drop { reason: Reason::Unserved }
                                }
                                _ => PacketVerdict::Refuse { reason: Reason::UndefinedPort },
                            };
                            assert_eq!(verdict, expected, "{at:?} {family:?} {link:?} {protocol:?} {number}");
                        }
                    }
                }
            }
        }
    });
}
