//! What ends a flow: both its ends, or silence; never what a stranger says in their names. And what
//! befalls one of its entries befalls none of the others.

use std::{net::SocketAddr, time::Duration};

use kproxy_common::{PacketVerdict, Protocol, map_names};

use crate::{
    cluster::{Family, Service, Who},
    flow::{Flow, PAIRS},
    frame::{ACK, FIN, Frame, Link, PSH, RST, SYN},
    world::{At, ROOM, World, in_world},
};

const SECOND: Duration = Duration::from_secs(1);
const REQUEST: usize = 0;
const REPLY: usize = 3;

/// Packets are met at one of a flow's places; whether they go on as those of the flow do.
fn goes_on(world: &mut World, flow: &Flow, place: usize, flags: u8) -> bool {
    let (at, [from, to], after) = flow.places()[place];
    let link = flow.link_at(at);
    let mut packet = Frame::of(flow.protocol, link, from, to, flags);
    if flow.protocol == Protocol::Tcp && flags & PSH != 0 {
        packet = packet.with_payload(b"data");
    }
    let (_, sent) = world.meet(at, link, &packet);
    sent.is_some_and(|sent| [sent.source(), sent.destination()] == after)
}

fn must_go_on(world: &mut World, flow: &Flow, flags: u8, when: &str) {
    for place in 0..4 {
        assert!(goes_on(world, flow, place, flags), "{when}, place {place}: {}", flow.about());
    }
}

/// One of each sort, established.
fn each(protocols: &[Protocol], test: impl Fn(&mut World, &Flow, u8) + Send + Sync) {
    in_world(ROOM, |world| {
        for (number, (client, backend)) in (1..).zip(PAIRS) {
            for family in [Family::V4, Family::V6] {
                for protocol in protocols {
                    world.have(&[Service::new(number, &[backend])]);
                    let flow =
                        Flow::open(world, family, Link::Ethernet, *protocol, client, (number, backend));
                    must_go_on(world, &flow, ACK, "before");
                    test(world, &flow, number);
                    world.compare_flows();
                    world.forget();
                }
            }
        }
    });
}

fn entries(world: &mut World) -> [usize; 2] {
    [map_names::FLOW, map_names::FLOW_TRANSIENT].map(|map| world.entries(map).len())
}

/// Its receiver ignores what is outside of its window, which no hook knows.
#[test]
fn a_flow_goes_on_after_a_reset_that_its_ends_ignore() {
    each(&[Protocol::Tcp, Protocol::Sctp], |world, flow, _| {
        for place in [REQUEST, REPLY] {
            assert!(goes_on(world, flow, place, RST));
            must_go_on(world, flow, ACK, "at once");
            world.let_pass(2 * SECOND);
            must_go_on(world, flow, ACK | PSH, "two seconds later");
            // Longer than anything is kept that has ended.
            for _ in 0..3 {
                world.let_pass(700 * SECOND);
                world.sweep();
                must_go_on(world, flow, ACK | PSH, "after hours");
            }
            assert_eq!(entries(world)[1], 0, "it is established");
        }
    });
}

/// Nor does a FIN, from whom there is more to come.
#[test]
fn a_flow_goes_on_after_fins_that_its_ends_ignore() {
    each(&[Protocol::Tcp], |world, flow, _| {
        for places in [&[REQUEST][..], &[REPLY], &[REPLY, REQUEST]] {
            for place in places {
                assert!(goes_on(world, flow, *place, ACK | FIN));
            }
            world.let_pass(2 * SECOND);
            must_go_on(world, flow, ACK | PSH, "two seconds later");
            world.let_pass(7_200 * SECOND);
            world.sweep();
            must_go_on(world, flow, ACK | PSH, "after two hours");
            assert_eq!(entries(world)[1], 0, "it is established");
        }
    });
}

/// An idle connection learns of it at the latest when one asks whether the other is there.
#[test]
fn a_flow_that_was_reset_ends_by_silence_alone() {
    each(&[Protocol::Tcp, Protocol::Sctp], |world, flow, _| {
        assert!(goes_on(world, flow, REQUEST, RST));
        world.let_pass(590 * SECOND);
        world.sweep();
        must_go_on(world, flow, ACK, "nearly ten minutes later");
        assert!(goes_on(world, flow, REPLY, RST));
        world.let_pass(605 * SECOND);
        world.sweep();
        assert_eq!(entries(world), [0, 0]);
    });
}

/// A living backend answers with what the client's kernel knows to be its own; a dead one takes it.
#[test]
fn a_syn_on_a_flow_goes_where_the_flow_goes() {
    each(&[Protocol::Tcp, Protocol::Sctp], |world, flow, number| {
        // Whoever comes now is sent elsewhere.
        let other = if flow.is_masked() { Who::There(2) } else { Who::Here(2) };
        world.have(&[Service::new(number, &[other])]);
        for flags in [SYN, RST, SYN] {
            assert!(goes_on(world, flow, REQUEST, flags), "flags {flags:#x}: {}", flow.about());
        }
        world.let_pass(2 * SECOND);
        must_go_on(world, flow, ACK | PSH, "two seconds later");
        assert!(goes_on(world, flow, REQUEST, SYN), "it is talking: {}", flow.about());
        // The backend is gone and nothing comes of it: its client is sent to another.
        world.let_pass(6 * SECOND);
        assert!(!goes_on(world, flow, REQUEST, SYN), "nobody is there: {}", flow.about());
    });
}

/// The backend has forgotten the connection, and takes the SYN for another.
#[test]
fn a_client_that_was_reset_comes_back_by_the_same_flow() {
    each(&[Protocol::Tcp, Protocol::Sctp], |world, flow, _| {
        for (pause, resets) in [(0, REQUEST), (20, REQUEST), (0, REPLY), (20, REPLY)] {
            assert!(goes_on(world, flow, resets, RST));
            world.let_pass(pause * SECOND);
            assert!(goes_on(world, flow, REQUEST, SYN) && goes_on(world, flow, 1, SYN));
            assert!(goes_on(world, flow, 2, SYN | ACK) && goes_on(world, flow, REPLY, SYN | ACK));
            must_go_on(world, flow, ACK, "opened again");
            must_go_on(world, flow, ACK | PSH, "opened again");
        }
    });
}

/// Both have said that it is over: a client that uses its port again is balanced anew.
#[test]
fn after_both_fins_a_syn_is_another_connection() {
    each(&[Protocol::Tcp], |world, flow, number| {
        assert!(goes_on(world, flow, REQUEST, ACK | FIN) && goes_on(world, flow, REPLY, ACK | FIN));
        must_go_on(world, flow, ACK, "its last packets");
        let other = if flow.is_masked() { Who::There(2) } else { Who::Here(2) };
        world.have(&[Service::new(number, &[other])]);
        assert!(!goes_on(world, flow, REQUEST, SYN), "{}", flow.about());
    });
}

/// A client is said to have given up just when it was answered.
#[test]
fn a_client_that_was_reset_while_it_opened_goes_on() {
    in_world(ROOM, |world| {
        for (number, (client, backend)) in (1..).zip(PAIRS) {
            world.have(&[Service::new(number, &[backend])]);
            for protocol in [Protocol::Tcp, Protocol::Sctp] {
                let flow = Flow::open(world, Family::V4, Link::Ethernet, protocol, client, (number, backend));
                assert!(goes_on(world, &flow, REQUEST, RST));
                must_go_on(world, &flow, ACK, "at once");
                world.let_pass(2 * SECOND);
                must_go_on(world, &flow, ACK, "two seconds later");
                let [established, transient] = entries(world);
                assert_eq!((established, transient), (if flow.is_masked() { 4 } else { 2 }, 0));
                world.forget();
            }
        }
    });
}

/// The tables make room entry by entry.
#[test]
fn an_entry_that_was_evicted_is_put_back() {
    each(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp], |world, flow, _| {
        let all = world.all_entries();
        for evicted in all[0].keys() {
            world.evict(evicted);
            world.let_pass(2 * SECOND);
            let (at, [from, to], _) = flow.places()[REQUEST];
            let place = if key_is(evicted, at, from, to) { REPLY } else { REQUEST };
            assert!(goes_on(world, flow, place, ACK), "place {place}: {}", flow.about());
            must_go_on(world, flow, ACK, "an entry was evicted");
            let now = world.all_entries().map(|entries| entries.into_keys().collect::<Vec<_>>());
            assert_eq!(now, [all[0].keys().copied().collect(), Vec::new()], "{}", flow.about());
        }
    });
}

/// A datagram that nobody has answered yet waits for its answer.
#[test]
fn an_entry_of_a_flow_without_answer_that_was_evicted_is_put_back() {
    in_world(ROOM, |world| {
        for (number, (client, backend)) in (1..).zip(PAIRS) {
            world.have(&[Service::new(number, &[backend])]);
            for family in [Family::V4, Family::V6] {
                let flow = Flow::ask(world, family, Link::Ethernet, Protocol::Udp, client, (number, backend));
                let all = world.all_entries();
                for evicted in all[1].keys() {
                    let (at, [from, to], _) = flow.places()[REQUEST];
                    if key_is(evicted, at, from, to) {
                        continue;
                    }
                    world.evict(evicted);
                    world.let_pass(2 * SECOND);
                    for place in [0, 1] {
                        assert!(goes_on(world, &flow, place, 0), "place {place}: {}", flow.about());
                    }
                    let now = world.all_entries().map(|entries| entries.into_keys().collect::<Vec<_>>());
                    assert_eq!(now, [Vec::new(), all[1].keys().copied().collect()], "{}", flow.about());
                }
                must_go_on(world, &flow, 0, "answered");
                world.compare_flows();
                world.forget();
            }
        }
    });
}

/// All entries say the same of when the flow was last heard, whichever of its ends was.
#[test]
fn entries_of_a_flow_age_together() {
    each(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp], |world, flow, _| {
        for place in [REQUEST, REPLY] {
            world.let_pass(100 * SECOND);
            assert!(goes_on(world, flow, place, ACK));
            let seen: Vec<u64> = world.entries(map_names::FLOW).values().map(|flow| flow.last_seen).collect();
            assert_eq!(seen.iter().min(), seen.iter().max(), "{}", flow.about());
        }
    });
}

/// Two CPUs each see one of the FINs, and each looks for the other's before that is written.
#[test]
fn two_fins_at_the_same_instant_close() {
    each(&[Protocol::Tcp], |world, flow, _| {
        let before = world.entries(map_names::FLOW);
        assert!(goes_on(world, flow, REQUEST, ACK | FIN));
        // As the other CPU has read it, and written its own down.
        world.restore_ends(&before);
        assert!(goes_on(world, flow, REPLY, ACK | FIN));
        world.finish_clients(&before);
        assert_eq!(entries(world)[1], 0, "neither has seen the other's");
        // The acknowledgement of one of them.
        must_go_on(world, flow, ACK, "its last packets");
        assert_eq!(entries(world), [0, before.len()], "{}", flow.about());
    });
}

fn key_is(key: &kproxy_common::FlowKey, at: At, from: SocketAddr, to: SocketAddr) -> bool {
    let hook =
        if matches!(at, At::In(_)) { kproxy_common::Hook::Ingress } else { kproxy_common::Hook::Egress };
    key.hook == hook
        && (key.source, key.source_port) == (from.ip().into(), from.port())
        && (key.destination, key.destination_port) == (to.ip().into(), to.port())
}

/// Refused, it is over at once, and a verdict never depends on it.
#[test]
fn a_refusal_ends_a_flow_at_once() {
    in_world(ROOM, |world| {
        for (number, (client, backend)) in (1..).zip(PAIRS) {
            world.have(&[Service::new(number, &[backend])]);
            let flow = Flow::ask(world, Family::V4, Link::Ethernet, Protocol::Tcp, client, (number, backend));
            assert!(goes_on(world, &flow, 2, RST | ACK) && goes_on(world, &flow, REPLY, RST | ACK));
            let other = if flow.is_masked() { Who::There(2) } else { Who::Here(2) };
            world.have(&[Service::new(number, &[other])]);
            let (at, [from, to], _) = flow.places()[REQUEST];
            let packet = Frame::tcp(Link::Ethernet, from, to, SYN);
            let (verdict, sent) = world.meet(at, Link::Ethernet, &packet);
            assert!(matches!(verdict, PacketVerdict::SetDestination { .. }), "{verdict:?}");
            assert_eq!(sent.map(|sent| sent.destination().ip()), Some(other.ip(Family::V4)));
            world.compare_flows();
            world.forget();
        }
    });
}
