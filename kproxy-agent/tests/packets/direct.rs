//! Connections past every Service: what one through a Service has left behind does not stand in their way.

use std::{net::SocketAddr, time::Duration};

use kproxy_common::{PacketVerdict, Protocol};

use crate::{
    cluster::{Family, Service},
    flow::{Flow, PAIRS},
    frame::{ACK, FIN, Frame, Link, PSH, RST, SYN},
    world::{At, ROOM, World, in_world},
};

/// How a connection ends: its packets, of the client (`true`) or the backend.
const ENDS: [&[(bool, u8)]; 3] =
    [&[(true, ACK | FIN), (false, ACK | FIN), (true, ACK)], &[(true, RST)], &[(false, RST | ACK)]];

/// Clients choose ports for each destination by itself: one that a connection through a Service had is soon used again,
/// for one to the same backend.
#[test]
fn a_client_connects_to_a_backend_from_the_port_of_a_connection_that_is_over() {
    in_world(ROOM, |world| {
        for (number, (client, backend)) in (1..).zip(PAIRS) {
            world.have(&[Service::new(number, &[backend])]);
            for family in [Family::V4, Family::V6] {
                for protocol in [Protocol::Tcp, Protocol::Sctp] {
                    for ends in ENDS {
                        // One chunk of SCTP that is as FIN ends nothing.
                        if protocol == Protocol::Sctp && ends.len() > 1 {
                            continue;
                        }
                        let link = Link::Ethernet;
                        let flow = Flow::open(world, family, link, protocol, client, (number, backend));
                        connect_past(world, &flow, ends);
                        world.compare_flows();
                        world.forget();
                    }
                }
            }
        }
    });
}

fn connect_past(world: &mut World, flow: &Flow, ends: &[(bool, u8)]) {
    let [request, forwarded, returned, reply] = flow.places();
    pass(world, flow, request.0, request.1, ACK);
    for (is_clients, flags) in ends {
        let (at, ends, _) = if *is_clients { request } else { reply };
        pass(world, flow, at, ends, *flags);
    }
    if ends.len() == 1 {
        // One RST may be a stranger's: who lives is heard within this time.
        world.let_pass(Duration::from_secs(5));
    }
    let there = ([flow.client, flow.backend], [request.0, forwarded.0]);
    let back = ([flow.backend, flow.client], [returned.0, reply.0]);
    for ((ends, hooks), flags) in [
        (there, SYN),
        (back, SYN | ACK),
        (there, ACK),
        (there, ACK | PSH),
        (back, ACK | PSH),
        (back, ACK | FIN),
    ] {
        for at in hooks {
            let verdict = pass(world, flow, at, ends, flags);
            let about = || format!("{}: {at:?} {ends:?}, flags {flags:#x}: {verdict:?}", flow.about());
            assert!(matches!(verdict, PacketVerdict::Pass { .. }), "{}", about());
        }
    }
    // The Service is asked from that port again.
    let verdict = pass(world, flow, request.0, request.1, SYN);
    assert!(matches!(verdict, PacketVerdict::SetDestination { .. }), "{}: {verdict:?}", flow.about());
}

fn pass(world: &mut World, flow: &Flow, at: At, [from, to]: [SocketAddr; 2], flags: u8) -> PacketVerdict {
    let link = flow.link_at(at);
    world.meet(at, link, &Frame::of(flow.protocol, link, from, to, flags)).0
}
