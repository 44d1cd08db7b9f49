//! ICMP messages of all kinds, about packets of flows and of nobody's: the programs do with each what the host decides.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpHeaders, IpNumber, icmpv4, icmpv6,
};
use kproxy_common::{IcmpKind, IcmpMeta, IcmpVerdict, Protocol, Reason, TcpFlags};

use crate::{
    cluster::{Family, Ports, Service, Who},
    flow::Flow,
    frame::{ACK, Frame, Link, SYN},
    hostile::with_ip_header,
    world::{Action, At, Device, ROOM, World, in_world},
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Path MTU discovery.
    TooBig,
    /// Nobody listens.
    PortUnreachable,
    /// Traceroute.
    TimeExceeded,
    ParameterProblem,
    Redirect,
    Echo,
    EchoReply,
}

impl Kind {
    pub const ERRORS: [Self; 4] =
        [Self::TooBig, Self::PortUnreachable, Self::TimeExceeded, Self::ParameterProblem];

    fn v4(self) -> Icmpv4Type {
        use icmpv4::{
            DestUnreachableHeader as Unreachable, ParameterProblemHeader as Problem, RedirectCode,
            RedirectHeader, TimeExceededCode,
        };
        match self {
            Self::TooBig => {
                Icmpv4Type::DestinationUnreachable(Unreachable::FragmentationNeeded { next_hop_mtu: 1_400 })
            }
            Self::PortUnreachable => Icmpv4Type::DestinationUnreachable(Unreachable::Port),
            Self::TimeExceeded => Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit),
            Self::ParameterProblem => Icmpv4Type::ParameterProblem(Problem::PointerIndicatesError(9)),
            Self::Redirect => Icmpv4Type::Redirect(RedirectHeader {
                code: RedirectCode::RedirectForHost,
                gateway_internet_address: [8, 0, 250, 10],
            }),
            Self::Echo => Icmpv4Type::EchoRequest(ECHO),
            Self::EchoReply => Icmpv4Type::EchoReply(ECHO),
        }
    }

    fn v6(self) -> Icmpv6Type {
        match self {
            Self::TooBig => Icmpv6Type::PacketTooBig { mtu: 1_280 },
            Self::PortUnreachable => Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port),
            Self::TimeExceeded => Icmpv6Type::TimeExceeded(icmpv6::TimeExceededCode::HopLimitExceeded),
            Self::ParameterProblem => Icmpv6Type::ParameterProblem(icmpv6::ParameterProblemHeader {
                code: icmpv6::ParameterProblemCode::ErroneousHeaderField,
                pointer: 4,
            }),
            Self::Redirect => Icmpv6Type::Unknown { type_u8: 137, code_u8: 0, bytes5to8: [0; 4] },
            Self::Echo => Icmpv6Type::EchoRequest(ECHO),
            Self::EchoReply => Icmpv6Type::EchoReply(ECHO),
        }
    }
}

const ECHO: IcmpEchoHeader = IcmpEchoHeader { id: 7, seq: 1 };

/// What is quoted of a packet.
#[derive(Clone)]
pub struct Quoted {
    pub packet: Frame,
    /// How much of it, from its transport header on.
    pub length: usize,
}

impl Quoted {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.packet.bytes();
        bytes.truncate(self.packet.ip.header_len() + self.length);
        bytes
    }
}

#[derive(Clone)]
pub struct Message {
    pub kind: Kind,
    pub from: IpAddr,
    pub to: IpAddr,
    /// The packet that it is about. An echo has none.
    pub quoted: Option<Quoted>,
}

impl Message {
    /// As on a wire, with right lengths and checksums.
    pub fn bytes(&self, link: Link) -> Vec<u8> {
        let Self { kind, from, to, quoted } = self;
        let mut body = match quoted {
            Some(quoted) => quoted.bytes(),
            None => b"what is to come back".to_vec(),
        };
        let (number, mut message) = match (from, to) {
            (IpAddr::V4(_), IpAddr::V4(_)) => {
                (IpNumber::ICMP, Icmpv4Header::with_checksum(kind.v4(), &body).to_bytes().to_vec())
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                if *kind == Kind::Redirect {
                    body = redirect(&body);
                }
                let header = Icmpv6Header::with_checksum(kind.v6(), from.octets(), to.octets(), &body);
                (IpNumber::IPV6_ICMP, header.expect("it is short").to_bytes().to_vec())
            }
            _ => panic!("two families"),
        };
        message.extend(body);
        with_ip_header(link, *from, *to, number, &message)
    }

    /// What the decision needs of it.
    pub fn meta(&self) -> IcmpMeta {
        let Self { kind, from, to, quoted } = self;
        let nobody = Frame::tcp(Link::Ip, SocketAddr::new(*from, 0), SocketAddr::new(*to, 0), 0);
        let packet = quoted.as_ref().map_or(&nobody, |quoted| &quoted.packet);
        let mut meta = packet.meta();
        meta.tcp = TcpFlags::default();
        IcmpMeta {
            source: (*from).into(),
            destination: (*to).into(),
            kind: match kind {
                Kind::Redirect => IcmpKind::Redirect,
                Kind::Echo => IcmpKind::Echo,
                Kind::EchoReply => IcmpKind::Other,
                _ => IcmpKind::Error,
            },
            quoted: meta,
            quotes: quoted.as_ref().is_some_and(|quoted| quoted.length >= 4),
        }
    }

    /// As it goes on after this verdict.
    pub fn after(&self, at: At, verdict: &IcmpVerdict) -> Self {
        let mut after = self.clone();
        match (*verdict, at) {
            (IcmpVerdict::Pass { .. } | IcmpVerdict::Drop { .. }, _) => {}
            (IcmpVerdict::Answer, _) => {
                (after.from, after.to, after.kind) = (self.to, self.from, Kind::EchoReply);
            }
            (IcmpVerdict::Translate { address, port, client_port, outer }, At::In(_)) => {
                let quoted = after.quoted.as_mut().expect("nothing else is translated");
                let mut to = quoted.packet.destination();
                if client_port != 0 {
                    to.set_port(client_port);
                }
                let from = SocketAddr::new(address.into(), port);
                quoted.packet = quoted.packet.clone().with_source(from).with_destination(to);
                after.to = if outer { from.ip() } else { self.to };
            }
            (IcmpVerdict::Translate { address, port, client_port, outer }, At::Out(_)) => {
                let quoted = after.quoted.as_mut().expect("nothing else is translated");
                let mut from = quoted.packet.source();
                if client_port != 0 {
                    from.set_port(client_port);
                }
                let to = SocketAddr::new(address.into(), port);
                quoted.packet = quoted.packet.clone().with_source(from).with_destination(to);
                after.from = if outer { to.ip() } else { self.from };
            }
        }
        after
    }
}

impl World {
    /// Lets the program and the host decide about this message; both must agree to the last bit.
    pub fn meet_message(&mut self, at: At, link: Link, message: &Message) -> IcmpVerdict {
        let bytes = message.bytes(link);
        let outcome = self.run(at, link, &bytes);
        let verdict = self.decide_about_message(at, &message.meta());
        let mut expected = message.after(at, &verdict).bytes(link);
        let (action, reason) = match verdict {
            IcmpVerdict::Pass { reason } => (Action::Next, reason),
            IcmpVerdict::Drop { reason } => (Action::Drop, reason),
            IcmpVerdict::Answer => {
                send_back(link, &mut expected);
                (Action::Answer, Reason::EchoAnswered)
            }
            IcmpVerdict::Translate { .. } => (Action::Next, Reason::IcmpTranslated),
        };
        let about = || {
            let quoted = message.quoted.as_ref().map(|quoted| &quoted.packet);
            let quoted = quoted.map(|packet| (packet.protocol(), packet.source(), packet.destination()));
            let Message { kind, from, to, .. } = message;
            format!("{at:?} {link:?} {kind:?} {from} to {to} about {quoted:?}: {verdict:?}")
        };
        assert_eq!(outcome.action, action, "{}", about());
        let found = &outcome.bytes;
        assert_eq!(*found, expected, "{}:\n{expected:02x?} expected\n{found:02x?} found", about());
        let counted = self.newly_counted();
        let is_counted = !matches!(reason, Reason::NotAService | Reason::NoFlow);
        assert_eq!(counted, Vec::from_iter(is_counted.then_some((reason, 1))), "{}", about());
        verdict
    }
}

/// Makes of a message one that goes back by the interface that another of the same length came by.
fn send_back(link: Link, message: &mut [u8]) {
    const HOP_LIMIT: u8 = 64;
    let network = link.header_length();
    if link == Link::Ethernet {
        let (to, from) = message[..12].split_at_mut(6);
        to.swap_with_slice(from);
    }
    let (mut headers, _) = IpHeaders::from_slice(&message[network..]).expect("it was made here");
    match &mut headers {
        IpHeaders::Ipv4(header, _) => {
            header.time_to_live = HOP_LIMIT;
            header.header_checksum = header.calc_header_checksum();
        }
        IpHeaders::Ipv6(header, _) => header.hop_limit = HOP_LIMIT,
    }
    let mut bytes = Vec::new();
    headers.write(&mut bytes).expect("memory can be written to");
    message[network..network + bytes.len()].copy_from_slice(&bytes);
}

/// What stands behind the first eight octets of an ICMPv6 redirect (RFC 4861, 4.5): target, destination, the target's
/// link-layer address, and the packet.
fn redirect(quoted: &[u8]) -> Vec<u8> {
    let mut body = vec![0xfe; 32];
    body.extend([2, 1, 2, 0, 0, 0, 0, 9]);
    let words = 1 + quoted.len().div_ceil(8);
    body.extend([4, words as u8, 0, 0, 0, 0, 0, 0]);
    body.extend(quoted);
    body.resize(32 + 8 + words * 8, 0);
    body
}

/// Every pair of ends is quoted, whether packets are sent between them or not.
#[test]
fn programs_do_with_messages_what_the_host_decides() {
    in_world(ROOM, |world| {
        let mut verdicts = Verdicts::default();
        Flow::each(world, &[Protocol::Tcp, Protocol::Udp, Protocol::Sctp], |world, flow| {
            let Flow { family, client, inner, frontend, backend, peer, .. } = *flow;
            let stranger = Who::Client(77).at(family, client.port());
            let mut ends = vec![client, inner, frontend, backend, peer, stranger];
            ends.sort();
            ends.dedup();
            for (at, ..) in flow.places() {
                verdicts.meet_all(world, at, flow.link_at(at), flow.protocol, &ends);
            }
        });
        world.compare_flows();
        verdicts.check();
    });
}

/// Where a client will be masked is not known before its first packet leaves.
#[test]
fn messages_about_flows_that_are_being_opened() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[Who::There(1)])]);
        let mut verdicts = Verdicts::default();
        for family in [Family::V4, Family::V6] {
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                let ports = Ports::of(protocol);
                let client = Who::Client(1).at(family, 20_000);
                let frontend = Who::Node.at(family, ports.node_port(1));
                let (uplink, link) = (Device::Uplink, Link::Ethernet);
                let first = Frame::of(protocol, link, client, frontend, SYN);
                let (_, sent) = world.meet(At::In(uplink), link, &first);
                let sent = sent.expect("it goes on");
                let mut ends = vec![client, frontend, sent.destination()];
                for at in [At::In(uplink), At::Out(uplink)] {
                    verdicts.meet_all(world, at, link, protocol, &ends);
                }
                let (_, sent) = world.meet(At::Out(uplink), link, &sent);
                ends.push(sent.expect("it goes on").source());
                for at in [At::In(uplink), At::Out(uplink)] {
                    verdicts.meet_all(world, at, link, protocol, &ends);
                }
            }
        }
        world.compare_flows();
        verdicts.check();
    });
}

/// How often each sort of verdict was given.
#[derive(Default, Debug)]
struct Verdicts {
    passed: u32,
    dropped: u32,
    redirects: u32,
    answered: u32,
    translated: u32,
}

impl Verdicts {
    fn meet_all(&mut self, world: &mut World, at: At, link: Link, protocol: Protocol, ends: &[SocketAddr]) {
        let family = if ends[0].is_ipv4() { Family::V4 } else { Family::V6 };
        let router = Who::Client(254).ip(family);
        let cluster_ip = Who::ClusterIp(1).ip(family);
        let mut number = 0;
        for from in ends {
            for to in ends.iter().filter(|to| *to != from) {
                let packet = Frame::of(protocol, Link::Ip, *from, *to, ACK).with_payload(b"what was said");
                for (sender, receiver) in [(router, from.ip()), (to.ip(), from.ip()), (to.ip(), cluster_ip)] {
                    number += 1;
                    let length = [8, 2, 20, 100][number % 4];
                    for kind in [Kind::ERRORS[number % 4], Kind::Redirect] {
                        let quoted = Some(Quoted { packet: packet.clone(), length });
                        self.meet(world, at, link, &Message { kind, from: sender, to: receiver, quoted });
                    }
                }
            }
        }
        let all = ends.iter().map(SocketAddr::ip).chain([cluster_ip, Who::Unallocated.ip(family)]);
        for to in all {
            for from in [router, to] {
                for kind in [Kind::Echo, Kind::EchoReply] {
                    self.meet(world, at, link, &Message { kind, from, to, quoted: None });
                }
            }
        }
    }

    fn meet(&mut self, world: &mut World, at: At, link: Link, message: &Message) {
        // A test run takes the protocol from where it stands behind an Ethernet header.
        let kind = if message.from.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xdd] };
        if message.bytes(link)[12..14] != kind {
            return;
        }
        match world.meet_message(at, link, message) {
            IcmpVerdict::Pass { .. } => self.passed += 1,
            IcmpVerdict::Drop { reason: Reason::IcmpRedirect } => self.redirects += 1,
            IcmpVerdict::Drop { .. } => self.dropped += 1,
            IcmpVerdict::Answer => self.answered += 1,
            IcmpVerdict::Translate { .. } => self.translated += 1,
        }
    }

    fn check(&self) {
        println!("{self:?}");
        let Self { passed, dropped, redirects, answered, translated } = *self;
        assert!(
            [passed, dropped, redirects, answered, translated].iter().all(|count| *count > 10),
            "{self:?}"
        );
    }
}
