//! Property: whatever clients, backends and Services do, in whichever order, every packet arrives as a plain model
//! of translation says, and as the host decides; and what is none of our business goes on as it came.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use kproxy_common::{PacketVerdict, Protocol};
use proptest::{
    prelude::*,
    sample::Index,
    test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner},
};
use serde_json::json;

use crate::{
    cluster::{Family, Ports, Service, Who},
    frame::{ACK, FIN, Frame, Link, PSH, RST, SYN},
    messages::{Kind, Message, Quoted},
    nat::{Fate, Nat, Session, offer},
    world::{At, Device, MASK_PORTS, ROOM, World, in_world},
};

/// How long new cases are begun. A debug build on a loaded machine runs a hundred or so in it.
const TIME: Duration = Duration::from_secs(25);
const CASES: u32 = 300;
const EVENTS: usize = 120;

/// Which histories are tried; the same in every run.
const SEED: [u8; 32] = *b"a packet's way through this node";

/// By which of its addresses a Service is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Address {
    ClusterIp,
    NodePort,
    LoadBalancer,
}

#[derive(Clone, Debug)]
enum Event {
    /// A client opens a connection, or sends a first datagram, perhaps from a port that it used before.
    Open {
        client: u8,
        port: u8,
        service: u8,
        address: Address,
        is_tcp: bool,
    },
    /// A client sends something else to a Service, perhaps without ever having opened anything.
    Blind {
        client: u8,
        port: u8,
        service: u8,
        address: Address,
        flags: u8,
    },
    /// The client of a session sends.
    Client {
        session: Index,
        flags: u8,
    },
    /// The backend of a session sends.
    Backend {
        session: Index,
        flags: u8,
    },
    /// An ICMP error about a packet of a session: a backend's, or a client's. It comes from who the packet was sent to, or
    /// from a router on the way there.
    Error {
        session: Index,
        kind: Kind,
        is_about_reply: bool,
        is_from_end: bool,
    },
    /// A packet that has nothing to do with any Service.
    Stranger {
        from: u8,
        to: u8,
        port: u8,
        is_tcp: bool,
        flags: u8,
        goes_out: bool,
    },
    /// A Service has these endpoints now, and perhaps the external policy Local.
    Change {
        service: u8,
        endpoints: u8,
        is_local: bool,
    },
    Gone {
        service: u8,
    },
}

const SERVICES: u8 = 3;
const CLIENTS: [Who; 5] = [Who::Client(1), Who::Client(2), Who::Here(5), Who::Here(6), Who::There(5)];
/// All endpoints that there ever are; which a Service has is a set of bits.
const ENDPOINTS: [Who; 5] = [Who::Here(1), Who::Here(2), Who::There(1), Who::There(2), Who::There(100)];

fn event() -> impl Strategy<Value = Event> {
    let address =
        || prop_oneof![Just(Address::ClusterIp), Just(Address::NodePort), Just(Address::LoadBalancer)];
    let client = 0..CLIENTS.len() as u8;
    let flags = || {
        prop_oneof![
            4 => Just(ACK),
            4 => Just(ACK | PSH),
            2 => Just(ACK | FIN),
            1 => Just(RST),
            1 => Just(RST | ACK),
            1 => Just(SYN),
            3 => Just(SYN | ACK),
        ]
    };
    let opens = (client.clone(), 0..3_u8, 0..SERVICES, address(), any::<bool>());
    let blind = (client, 0..3_u8, 0..SERVICES, address(), flags());
    let stranger = (0..10_u8, 0..10_u8, 0..4_u8, any::<bool>(), flags(), any::<bool>());
    prop_oneof![
        6 => opens.prop_map(|(client, port, service, address, is_tcp)| {
            Event::Open { client, port, service, address, is_tcp }
        }),
        1 => blind.prop_map(|(client, port, service, address, flags)| {
            Event::Blind { client, port, service, address, flags }
        }),
        8 => (any::<Index>(), flags()).prop_map(|(session, flags)| Event::Client { session, flags }),
        8 => (any::<Index>(), flags()).prop_map(|(session, flags)| Event::Backend { session, flags }),
        4 => (any::<Index>(), 0..Kind::ERRORS.len(), any::<bool>(), any::<bool>()).prop_map(
            |(session, kind, is_about_reply, is_from_end)| {
                Event::Error { session, kind: Kind::ERRORS[kind], is_about_reply, is_from_end }
            }
        ),
        2 => stranger.prop_map(|(from, to, port, is_tcp, flags, goes_out)| {
            Event::Stranger { from, to, port, is_tcp, flags, goes_out }
        }),
        1 => (0..SERVICES, 0..32_u8, any::<bool>()).prop_map(|(service, endpoints, is_local)| {
            Event::Change { service, endpoints, is_local }
        }),
        1 => (0..SERVICES).prop_map(|service| Event::Gone { service }),
    ]
}

#[test]
fn packets_arrive_as_a_plain_model_says() {
    in_world(ROOM, |world| {
        let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &SEED));
        let world = std::cell::RefCell::new(world);
        let (start, cases, packets) = (Instant::now(), std::cell::Cell::new(0), std::cell::Cell::new(0));
        let histories = (any::<bool>(), prop::collection::vec(event(), 1..EVENTS));
        let result = runner.run(&histories, |(is_v4, events)| {
            if start.elapsed() > TIME {
                return Ok(());
            }
            let mut world = world.borrow_mut();
            world.reset();
            let mut history = History {
                world: &mut world,
                family: if is_v4 { Family::V4 } else { Family::V6 },
                nat: Nat::default(),
                services: BTreeMap::new(),
                packets: 0,
            };
            history.change(0, 0b0_0101, false);
            history.change(1, 0b1_1111, true);
            events.iter().for_each(|event| history.take(event));
            history.world.compare_flows();
            cases.set(cases.get() + 1);
            packets.set(packets.get() + history.packets);
            Ok(())
        });
        println!("{} histories, {} packets in {:.1?}", cases.get(), packets.get(), start.elapsed());
        match result {
            Ok(()) => assert!(cases.get() > 10, "the machine is too slow for a property"),
            Err(TestError::Fail(reason, history)) => panic!("{reason}\nin {history:#?}"),
            Err(TestError::Abort(reason)) => panic!("{reason}"),
        }
    });
}

struct History<'a, 'w> {
    world: &'a mut &'w mut World,
    family: Family,
    nat: Nat,
    /// The endpoints of each Service, and whether its external policy is Local.
    services: BTreeMap<u8, (Vec<Who>, bool)>,
    packets: u32,
}

impl History<'_, '_> {
    fn take(&mut self, event: &Event) {
        match *event {
            Event::Open { client, port, service, address, is_tcp } => {
                let protocol = if is_tcp { Protocol::Tcp } else { Protocol::Udp };
                self.ask(client, port, service, address, protocol, SYN);
            }
            Event::Blind { client, port, service, address, flags } => {
                self.ask(client, port, service, address, Protocol::Tcp, flags);
            }
            Event::Client { session, flags } => {
                if let Some(Session { protocol, client, frontend, .. }) = self.session(session) {
                    self.client_sends(protocol, client, frontend, flags, None);
                }
            }
            Event::Backend { session, flags } => {
                if let Some(Session { protocol, backend, peer, .. }) = self.session(session) {
                    self.backend_sends(protocol, backend, peer, flags);
                }
            }
            Event::Error { session, kind, is_about_reply, is_from_end } => {
                if let Some(session) = self.session(session) {
                    self.error(&session, kind, is_about_reply, is_from_end);
                }
            }
            Event::Stranger { from, to, port, is_tcp, flags, goes_out } => {
                self.stranger(from, to, port, is_tcp, flags, goes_out);
            }
            Event::Change { service, endpoints, is_local } => self.change(service, endpoints, is_local),
            Event::Gone { service } => {
                if self.services.remove(&service).is_some() {
                    self.world.lose(&[Service::new(service, &[])]);
                }
            }
        }
    }

    fn session(&self, index: Index) -> Option<Session> {
        (!self.nat.sessions.is_empty()).then(|| *index.get(&self.nat.sessions))
    }

    fn change(&mut self, service: u8, endpoints: u8, is_local: bool) {
        let bits = ENDPOINTS.iter().enumerate().filter(|(bit, _)| endpoints >> bit & 1 != 0);
        let endpoints: Vec<Who> = bits.map(|(_, who)| *who).collect();
        let policy = if is_local { "Local" } else { "Cluster" };
        let object = Service::new(service, &endpoints).with_spec(json!({"externalTrafficPolicy": policy}));
        self.world.have(&[object]);
        self.services.insert(service, (endpoints, is_local));
    }

    fn ask(&mut self, client: u8, port: u8, service: u8, address: Address, protocol: Protocol, flags: u8) {
        let client = CLIENTS[usize::from(client)];
        let ports = Ports::of(protocol);
        let frontend = match address {
            Address::ClusterIp => Who::ClusterIp(service).at(self.family, ports.port),
            Address::LoadBalancer => Who::LoadBalancer(service).at(self.family, ports.port),
            Address::NodePort => Who::Node.at(self.family, ports.node_port(service)),
        };
        // Few, so that a client uses one for several frontends, which may have a backend in common.
        let port = 20_000 + u16::from(port);
        let is_cluster_ip = address == Address::ClusterIp;
        let asked = Some((client, service, is_cluster_ip));
        self.client_sends(protocol, client.at(self.family, port), frontend, flags, asked);
    }

    /// A packet of a client, to a Service that it may open a session to (`asked`: who it is, which Service, and
    /// whether by its ClusterIP) or to one that it has a session with.
    fn client_sends(
        &mut self,
        protocol: Protocol,
        client: SocketAddr,
        frontend: SocketAddr,
        flags: u8,
        asked: Option<(Who, u8, bool)>,
    ) {
        let asked = asked.or_else(|| self.asked(client, frontend));
        let device = self.device_of(client);
        let link = self.link(device);
        let packet = Frame::of(protocol, link, client, frontend, flags);
        let (verdict, sent) = self.meet(At::In(device), link, &packet);
        let about = || format!("{protocol:?} {client} to {frontend}, flags {flags:#x}: {verdict:?}");
        let fate = self.nat.client_sends(protocol, client, frontend, flags);
        let offer = asked.and_then(|(who, service, is_cluster_ip)| {
            let (endpoints, is_local) = self.services.get(&service)?;
            Some((who, offer(endpoints, is_cluster_ip, *is_local, who)))
        });
        let before = match (fate, &offer) {
            (Fate::Along(session), _) => Some(session),
            (Fate::Again(session), Some((_, Some(_)))) => Some(session),
            // Turned away, it leaves the session as it is.
            (Fate::Again(_), _) => {
                let is_turned_away = !matches!(
                    verdict,
                    PacketVerdict::SetDestination { .. } | PacketVerdict::SetSource { .. }
                );
                assert!(is_turned_away, "{}", about());
                return;
            }
            (Fate::Late(session), _) => {
                let goes_on = sent.is_some_and(|sent| sent.destination() == session.backend);
                assert!(goes_on || matches!(verdict, PacketVerdict::Pass { .. }), "{}", about());
                return;
            }
            (Fate::Untouched, _) => {
                assert!(matches!(verdict, PacketVerdict::Pass { .. }), "{}", about());
                return;
            }
            (Fate::Begins | Fate::Either(_), None) => {
                // The Service is gone, or was never there.
                assert!(
                    matches!(
                        verdict,
                        PacketVerdict::Pass { .. }
                            | PacketVerdict::Drop { .. }
                            | PacketVerdict::Refuse { .. }
                    ) || matches!(fate, Fate::Either(_)),
                    "{}",
                    about()
                );
                self.nat.forget(protocol, client, frontend);
                return;
            }
            (Fate::Begins, Some((_, None))) => {
                let is_denied = matches!(verdict, PacketVerdict::Drop { .. } | PacketVerdict::Refuse { .. });
                assert!(is_denied, "{}", about());
                self.nat.forget(protocol, client, frontend);
                return;
            }
            (Fate::Either(session), Some(_))
                if sent.as_ref().is_some_and(|sent| sent.destination() == session.backend) =>
            {
                Some(session)
            }
            (Fate::Either(_), Some((_, None))) => return self.nat.forget(protocol, client, frontend),
            (Fate::Begins | Fate::Either(_), Some((_, Some(_)))) => None,
        };
        let sent = sent.unwrap_or_else(|| panic!("lost: {}", about()));
        let backend = sent.destination();
        if let Some(session) = before {
            assert_eq!(backend, session.backend, "a session changes its backend: {}", about());
        }
        let out = self.device_of(backend);
        let link = self.link(out);
        let leaves = Frame { ethernet: Frame::of(protocol, link, client, backend, 0).ethernet, ..sent };
        let (verdict, arrived) = self.meet(At::Out(out), link, &leaves);
        let arrived = arrived.unwrap_or_else(|| panic!("lost on its way out: {verdict:?}, {}", about()));
        let peer = arrived.source();
        if let Some(session) = before {
            assert_eq!(peer, session.peer, "a session changes its mask: {}", about());
            return;
        }
        let Some((who, Some(offer))) = offer else { unreachable!("decided above") };
        let endpoint = offer.whose(self.family, backend);
        let endpoint = endpoint.unwrap_or_else(|| panic!("{backend} is not in {offer:?}: {}", about()));
        if offer.is_hidden(who, endpoint) {
            let mask = if out == Device::Aside { Who::NodeAside } else { Who::Node };
            assert_eq!(peer.ip(), mask.ip(self.family), "{}", about());
            assert!((MASK_PORTS.0..MASK_PORTS.0 + MASK_PORTS.1).contains(&peer.port()), "{}", about());
        } else if self.nat.had_by_another(protocol, client, frontend, backend) {
            // The client speaks to the same backend by another frontend, or did so just now: from another port, so that
            // the backend can tell them apart.
            assert_eq!(peer.ip(), client.ip(), "{}", about());
        } else {
            assert_eq!(peer, client, "{}", about());
        }
        self.nat.begin(protocol, client, frontend, backend, peer);
    }

    fn backend_sends(&mut self, protocol: Protocol, backend: SocketAddr, peer: SocketAddr, flags: u8) {
        let device = self.device_of(backend);
        let link = self.link(device);
        let packet = Frame::of(protocol, link, backend, peer, flags);
        let (verdict, sent) = self.meet(At::In(device), link, &packet);
        let session = self.nat.backend_sends(protocol, backend, peer, flags).expect("it is of a session");
        let about =
            || format!("{protocol:?} {backend} to {peer}, flags {flags:#x}: {verdict:?}, {session:?}");
        let sent = sent.unwrap_or_else(|| panic!("a reply is lost: {}", about()));
        assert_eq!((sent.source(), sent.destination().ip()), (backend, session.client.ip()), "{}", about());
        let out = self.device_of(session.client);
        let link = self.link(out);
        let leaves =
            Frame { ethernet: Frame::of(protocol, link, backend, session.client, 0).ethernet, ..sent };
        let (verdict, arrived) = self.meet(At::Out(out), link, &leaves);
        let arrived =
            arrived.unwrap_or_else(|| panic!("a reply is lost on its way out: {verdict:?}, {}", about()));
        assert_eq!((arrived.source(), arrived.destination()), session.answers(), "{}", about());
    }

    /// Whoever sent the packet gets the error about what it sent, from whom it sent that to.
    fn error(&mut self, session: &Session, kind: Kind, is_about_reply: bool, is_from_end: bool) {
        let Session { protocol, client, frontend, backend, peer, .. } = *session;
        let (arrived, sent) = match is_about_reply {
            true => ([frontend, client], [backend, peer]),
            false if session.is_past() => ([peer, backend], [peer, backend]),
            false => ([peer, backend], [client, frontend]),
        };
        let router = Who::Client(254).ip(self.family);
        let name = |end: SocketAddr| if is_from_end { end.ip() } else { router };
        let packet = Frame::of(protocol, Link::Ip, arrived[0], arrived[1], ACK | PSH);
        let quoted = Quoted { packet: packet.with_payload(b"what was said"), length: 1_000 };
        let came = Message { kind, from: name(arrived[1]), to: arrived[0].ip(), quoted: Some(quoted) };
        let (at, out) = (At::In(self.device_of(arrived[1])), At::Out(self.device_of(sent[0])));
        let between = self.meet_message(at, &came);
        let after = self.meet_message(out, &between);
        let quoted = after.quoted.map(|quoted| [quoted.packet.source(), quoted.packet.destination()]);
        // Whoever is before a masked client is behind the mask, too.
        let is_masked = is_about_reply && peer.ip() != client.ip();
        let from = if is_masked { peer.ip() } else { name(sent[1]) };
        assert_eq!(
            (after.from, after.to, quoted),
            (from, sent[0].ip(), Some(sent)),
            "{kind:?} about {arrived:?} of {session:?}"
        );
    }

    /// The message as it goes on.
    fn meet_message(&mut self, at: At, message: &Message) -> Message {
        let (At::In(device) | At::Out(device)) = at;
        let link = self.link(device);
        self.packets += 1;
        message.after(at, &self.world.meet_message(at, link, message))
    }

    /// Any of whom there are, and somebody else, speak to each other past all Services.
    fn stranger(&mut self, from: u8, to: u8, port: u8, is_tcp: bool, flags: u8, goes_out: bool) {
        let all = [&CLIENTS[..], &ENDPOINTS[..]].concat();
        let (from, to) = (all[usize::from(from)], all[usize::from(to)]);
        let protocol = if is_tcp { Protocol::Tcp } else { Protocol::Udp };
        let (from, to) = (from.at(self.family, 8_080), to.at(self.family, 8_080 + u16::from(port)));
        let device = self.device_of(if goes_out { to } else { from });
        let link = self.link(device);
        let at = if goes_out { At::Out(device) } else { At::In(device) };
        let (verdict, _) = self.meet(at, link, &Frame::of(protocol, link, from, to, flags));
        assert!(matches!(verdict, PacketVerdict::Pass { .. }), "{from} to {to}: {verdict:?}");
    }

    fn meet(&mut self, at: At, link: Link, packet: &Frame) -> (PacketVerdict, Option<Frame>) {
        self.packets += 1;
        self.world.meet(at, link, packet)
    }

    /// Who asks for which Service, and whether by its ClusterIP.
    fn asked(&self, client: SocketAddr, frontend: SocketAddr) -> Option<(Who, u8, bool)> {
        let who = CLIENTS.into_iter().find(|who| who.ip(self.family) == client.ip())?;
        (0..SERVICES).find_map(|service| {
            let is = |of: Who| of.ip(self.family) == frontend.ip();
            let is_node_port = is(Who::Node) && frontend.port() % 100 == u16::from(service);
            let is_cluster_ip = is(Who::ClusterIp(service));
            let is_ours = is_cluster_ip || is(Who::LoadBalancer(service)) || is_node_port;
            is_ours.then_some((who, service, is_cluster_ip))
        })
    }

    fn device_of(&self, end: SocketAddr) -> Device {
        let all = CLIENTS.into_iter().chain(ENDPOINTS);
        match all.into_iter().find(|who| who.ip(self.family) == end.ip()) {
            Some(Who::Here(_)) => Device::Pod,
            Some(Who::There(100)) => Device::Aside,
            Some(_) => Device::Uplink,
            None => panic!("{end} is nowhere"),
        }
    }

    /// Packets outside come with and without an Ethernet header in turn.
    fn link(&self, device: Device) -> Link {
        if device == Device::Pod || self.packets.is_multiple_of(2) { Link::Ethernet } else { Link::Ip }
    }
}
