//! With the agent dead: the programs themselves retire what ends, so that the tables neither fill nor lose what is
//! open, however many connections come and go and whoever floods.
//!
//! `KPROXY_CONNECTIONS=1000000` takes more of a day; the tables stay as small.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use kproxy::programs::Capacities;
use kproxy_common::{Flow, FlowKey, FlowState, Protocol, Role, WAITING, map_names};

use crate::{
    cluster::{Family, Ports, Service, Who},
    frame::{ACK, FIN, Frame, Link, PSH, RST, SYN},
    hostile::Dice,
    world::{Action, At, Device, World, in_world},
};

/// Small enough to be filled many times over by what follows. Before Linux 6.16 each CPU takes free elements of an LRU
/// map by 128, so that smaller ones would measure that.
const TABLES: Capacities =
    Capacities { frontends: 64, backends: 256, source_ranges: 16, flows: 4_096, affinity: 1_024 };

/// How many connections stay open all along: a quarter of the table, at two or four entries each.
const STANDING: u16 = 256;
const CONNECTIONS: u64 = 60_000;
const FLOOD: u64 = 100_000;

/// A connection as its two ends see it.
#[derive(Clone, Copy)]
struct Connection {
    protocol: Protocol,
    client: SocketAddr,
    frontend: SocketAddr,
    backend: SocketAddr,
    peer: SocketAddr,
}

impl Connection {
    /// The client's first packet through both hooks; `None` if it does not get through.
    fn ask(world: &mut World, protocol: Protocol, client: SocketAddr, frontend: SocketAddr) -> Option<Self> {
        let sent =
            pass(world, At::In(Device::Uplink), &Frame::of(protocol, Link::Ethernet, client, frontend, SYN))?;
        let backend = sent.destination();
        let sent = pass(world, At::Out(device(backend)), &sent)?;
        Some(Self { protocol, client, frontend, backend, peer: sent.source() })
    }

    /// A packet of the client arrives at the backend.
    fn request(&self, world: &mut World, flags: u8) -> bool {
        let packet = Frame::of(self.protocol, Link::Ethernet, self.client, self.frontend, flags);
        let sent = pass(world, At::In(Device::Uplink), &packet);
        let sent = sent.and_then(|sent| pass(world, At::Out(device(self.backend)), &sent));
        sent.is_some_and(|sent| (sent.source(), sent.destination()) == (self.peer, self.backend))
    }

    /// A packet of the backend arrives at the client.
    fn reply(&self, world: &mut World, flags: u8) -> bool {
        let packet = Frame::of(self.protocol, Link::Ethernet, self.backend, self.peer, flags);
        let sent = pass(world, At::In(device(self.backend)), &packet);
        let sent = sent.and_then(|sent| pass(world, At::Out(Device::Uplink), &sent));
        sent.is_some_and(|sent| (sent.source(), sent.destination()) == (self.frontend, self.client))
    }
}

/// A packet through one program, without the host's opinion: its tables do not evict.
fn pass(world: &mut World, at: At, packet: &Frame) -> Option<Frame> {
    let outcome = world.run(at, Link::Ethernet, &packet.bytes());
    (outcome.action == Action::Next)
        .then(|| Frame::read(Link::Ethernet, &outcome.bytes).expect("it is sound"))
}

fn device(end: SocketAddr) -> Device {
    let is_here = [Family::V4, Family::V6].into_iter().any(|family| Who::Here(1).ip(family) == end.ip());
    if is_here { Device::Pod } else { Device::Uplink }
}

/// One Service with a backend here and one elsewhere.
fn with_standing(test: impl FnOnce(&mut World, &[Connection]) + Send) {
    in_world(TABLES, |world| {
        world.have(&[Service::new(1, &[Who::Here(1), Who::There(1)])]);
        let mut standing = Vec::new();
        for number in 0..STANDING {
            let protocol = if number % 4 == 0 { Protocol::Udp } else { Protocol::Tcp };
            let family = if number % 2 == 0 { Family::V4 } else { Family::V6 };
            let frontend = node_port(family, protocol);
            let client = Who::Client(1).at(family, 20_000 + number);
            let connection = Connection::ask(world, protocol, client, frontend).expect("there is room");
            assert!(connection.reply(world, SYN | ACK) && connection.request(world, ACK));
            standing.push(connection);
        }
        test(world, &standing);
    });
}

/// All of them still get through, both ways.
fn all_stand(world: &mut World, standing: &[Connection], when: &str) {
    for connection in standing {
        let Connection { client, backend, .. } = connection;
        assert!(connection.request(world, ACK | PSH), "{when}: {client} does not reach {backend}");
        assert!(connection.reply(world, ACK | PSH), "{when}: {backend} does not reach {client}");
    }
}

#[test]
fn a_day_of_connections_past_a_dead_agent() {
    let connections = std::env::var("KPROXY_CONNECTIONS").map_or(CONNECTIONS, |text| text.parse().unwrap());
    with_standing(|world, standing| {
        let start = Instant::now();
        let established = world.entries(map_names::FLOW).len();
        let mut dice = Dice::new(5);
        let mut most = 0;
        for number in 0..connections {
            let family = dice.of(&[Family::V4, Family::V6]);
            // 250 clients with 25,000 ports each: what comes again comes much later.
            let (host, port) = ((number % 250) as u8, 30_000 + (number / 250 % 25_000) as u16);
            let client = Who::Client(host.max(2)).at(family, port);
            let connection = Connection::ask(world, Protocol::Tcp, client, node_port(family, Protocol::Tcp))
                .unwrap_or_else(|| panic!("connection {number} is not taken"));
            let arrived = connection.reply(world, SYN | ACK)
                && connection.request(world, ACK)
                && connection.request(world, ACK | PSH)
                && connection.reply(world, ACK | PSH)
                && match dice.below(4) {
                    0 => connection.request(world, RST | ACK),
                    1 => connection.reply(world, RST | ACK),
                    2 => {
                        connection.request(world, ACK | FIN)
                            && connection.reply(world, ACK | FIN)
                            && connection.request(world, ACK)
                    }
                    _ => {
                        connection.reply(world, ACK | FIN)
                            && connection.request(world, ACK | FIN)
                            && connection.reply(world, ACK)
                    }
                };
            assert!(arrived, "connection {number} is cut");
            if number % 5_000 == 0 {
                all_stand(world, standing, "while others come and go");
                most = most.max(living(world));
            }
        }
        all_stand(world, standing, "after all others");
        assert_eq!(living(world), established, "what ended is still in the table");
        assert_eq!(most, established);
        // What one end alone has ended waits, but not all of it.
        let waiting = world.entries(map_names::FLOW).len() - established;
        assert!((1..=4 * WAITING as usize).contains(&waiting), "{waiting} entries wait");
        println!(
            "{connections} connections in {:.1?}; {established} entries of {STANDING} that stand, {} of others, of {}",
            start.elapsed(),
            world.entries(map_names::FLOW_TRANSIENT).len(),
            TABLES.flows
        );
    });
}

#[test]
fn a_flood_of_openings_pushes_nobody_out() {
    with_standing(|world, standing| {
        let established = timeless(world.entries(map_names::FLOW));
        let mut dice = Dice::new(6);
        for number in 0..FLOOD {
            let family = dice.of(&[Family::V4, Family::V6]);
            let protocol = dice.of(&[Protocol::Tcp, Protocol::Udp]);
            // Nobody is there to answer: the addresses are forged.
            let client = Who::Client(2 + dice.below(250) as u8).at(family, 1 + dice.below(65_535) as u16);
            Connection::ask(world, protocol, client, node_port(family, protocol));
            if number % 25_000 == 0 {
                all_stand(world, standing, "in the flood");
                // One who comes in the middle of it is served as well.
                let client = Who::Client(1).at(family, 40_000 + (number / 25_000) as u16);
                let late = Connection::ask(world, Protocol::Tcp, client, node_port(family, Protocol::Tcp));
                let late = late.expect("it is taken");
                assert!(
                    late.reply(world, SYN | ACK)
                        && late.request(world, ACK | PSH)
                        && late.reply(world, RST)
                        && late.request(world, RST)
                );
            }
        }
        all_stand(world, standing, "after the flood");
        assert_eq!(timeless(world.entries(map_names::FLOW)), established);
        let opening = world.entries(map_names::FLOW_TRANSIENT);
        let half_open = opening.values().filter(|flow| flow.state == FlowState::Opening).count();
        println!(
            "{FLOOD} openings without an answer; {half_open} entries of them are left, of {}",
            TABLES.flows
        );
        assert!(opening.len() <= TABLES.flows as usize);
    });
}

/// Backends answer whoever asks. So a flood of openings with forged addresses that a living Service answers is one of
/// half-open flows too.
#[test]
fn a_flood_that_is_answered_pushes_nobody_out() {
    with_standing(|world, standing| {
        let established = timeless(world.entries(map_names::FLOW));
        let mut dice = Dice::new(7);
        let (mut answered, mut evicted) = (0, 0);
        for number in 0..FLOOD / 4 {
            let family = dice.of(&[Family::V4, Family::V6]);
            let protocol = dice.of(&[Protocol::Tcp, Protocol::Udp]);
            let client = Who::Client(2 + dice.below(250) as u8).at(family, 1 + dice.below(65_535) as u16);
            if let Some(forged) = Connection::ask(world, protocol, client, node_port(family, protocol)) {
                answered += 1;
                evicted += u32::from(!forged.reply(world, SYN | ACK));
            }
            if number % 5_000 == 0 {
                all_stand(world, standing, "in the flood");
            }
        }
        // Once in a while a full LRU takes what it has just been given for old.
        println!("{answered} openings that are answered; of {evicted} the entry was evicted before that");
        assert!(answered > 10_000 && evicted * 100 < answered, "{evicted} of {answered}");
        all_stand(world, standing, "after the flood");
        assert_eq!(timeless(world.entries(map_names::FLOW)), established);
    });
}

/// Whoever knows a flow's ends says that it is over, and floods: its ends, who do not listen to that, go on.
#[test]
fn a_flood_after_a_forged_reset_pushes_nobody_out() {
    with_standing(|world, standing| {
        for connection in standing.iter().filter(|connection| connection.protocol == Protocol::Tcp) {
            let Connection { protocol, client, frontend, .. } = *connection;
            for flags in [RST, SYN] {
                pass(
                    world,
                    At::In(Device::Uplink),
                    &Frame::of(protocol, Link::Ethernet, client, frontend, flags),
                );
            }
        }
        let mut dice = Dice::new(8);
        for _ in 0..FLOOD / 4 {
            let family = dice.of(&[Family::V4, Family::V6]);
            let client = Who::Client(2 + dice.below(250) as u8).at(family, 1 + dice.below(65_535) as u16);
            Connection::ask(world, Protocol::Tcp, client, node_port(family, Protocol::Tcp));
        }
        all_stand(world, standing, "after the flood");
        world.let_pass(Duration::from_secs(2));
        all_stand(world, standing, "later");
        assert!(world.entries(map_names::FLOW).values().all(|flow| !flow.ends.is_closed()));
    });
}

/// Whoever was refused, or went away at once, holds nothing: a mask's port is free for the next one.
#[test]
fn what_is_closed_before_it_is_established_holds_nothing() {
    with_standing(|world, _| {
        let established = world.entries(map_names::FLOW).len();
        let frontend = node_port(Family::V4, Protocol::Tcp);
        for (port, closed_by_the_client) in [(1, true), (2, false)] {
            let asked = Connection::ask(world, Protocol::Tcp, Who::Client(9).at(Family::V4, port), frontend);
            let asked = asked.expect("it is taken");
            if closed_by_the_client {
                assert!(asked.reply(world, SYN | ACK) && asked.request(world, RST));
            } else {
                assert!(asked.reply(world, RST | ACK));
            }
            let of_it = |key: &FlowKey| [key.source_port, key.destination_port].contains(&asked.peer.port());
            let entries = world.entries(map_names::FLOW_TRANSIENT);
            let ends: Vec<_> =
                entries.iter().filter(|(key, _)| of_it(key)).map(|(_, flow)| flow.ends).collect();
            assert!(!ends.is_empty() && ends.iter().all(|ends| ends.is_closed()), "{ends:?}");
        }
        assert_eq!(world.entries(map_names::FLOW).len(), established);
    });
}

/// A forged answer makes no flow, nor does a client alone: only what both send on a flow's own ends does.
#[test]
fn only_both_ends_make_a_flow_established() {
    with_standing(|world, _| {
        let established = world.entries(map_names::FLOW).len();
        let client = Who::Client(9).at(Family::V4, 20_000);
        let asked =
            Connection::ask(world, Protocol::Tcp, client, node_port(Family::V4, Protocol::Tcp)).unwrap();
        for flags in [ACK, ACK | PSH, ACK | FIN, RST] {
            asked.request(world, flags);
        }
        let other = Who::There(2).at(Family::V4, Ports::of(Protocol::Tcp).target);
        for flags in [SYN | ACK, ACK] {
            let forged = Frame::of(Protocol::Tcp, Link::Ethernet, other, asked.peer, flags);
            pass(world, At::In(Device::Uplink), &forged);
            let forged = Frame::of(Protocol::Tcp, Link::Ethernet, other, client, flags);
            pass(world, At::Out(Device::Uplink), &forged);
        }
        assert_eq!(world.entries(map_names::FLOW).len(), established);
        assert!(asked.reply(world, SYN | ACK));
        asked.request(world, SYN);
        asked.reply(world, SYN | ACK);
        assert_eq!(world.entries(map_names::FLOW).len(), established, "the client has not got it");
        assert!(asked.request(world, ACK));
        let roles = world.entries(map_names::FLOW).len() - established;
        assert_eq!(roles, if asked.peer == client { [Role::Request, Role::Reply].len() } else { 4 });
    });
}

fn node_port(family: Family, protocol: Protocol) -> SocketAddr {
    Who::Node.at(family, Ports::of(protocol).node_port(1))
}

/// Entries of established flows that nobody has said to be over.
fn living(world: &mut World) -> usize {
    world.entries(map_names::FLOW).values().filter(|flow| !flow.ends.is_closed()).count()
}

fn timeless(entries: BTreeMap<FlowKey, Flow>) -> BTreeMap<FlowKey, Flow> {
    entries.into_iter().map(|(key, flow)| (key, Flow { last_seen: 0, ..flow })).collect()
}
