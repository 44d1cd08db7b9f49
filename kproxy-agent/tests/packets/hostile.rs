//! Packets that nobody should send, beside some that anybody may: made from a seed, always the same.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpNumber, Ipv4Header, Ipv6Header,
    icmpv4, icmpv6,
};
use kproxy_common::Protocol;

use crate::{
    cluster::{Family, Ports, Who},
    frame::{ACK, FIN, Frame, Link, PSH, RST, SYN},
};

/// SplitMix64: enough to be everywhere, and the same on every machine.
pub struct Dice {
    state: u64,
    /// Ends between which something was translated.
    met: Vec<(Protocol, SocketAddr, SocketAddr)>,
}

/// How many flows are remembered.
const MEMORY: usize = 64;

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self { state: seed, met: Vec::new() }
    }

    /// This came out of a program: it goes on to the next hook, and is answered.
    pub fn remember(&mut self, packet: &Frame) {
        let (protocol, from, to) = (packet.protocol(), packet.source(), packet.destination());
        for ends in [(protocol, from, to), (protocol, to, from)] {
            if self.met.len() < MEMORY {
                self.met.push(ends);
            } else {
                let at = self.below(MEMORY);
                self.met[at] = ends;
            }
        }
    }

    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `end`.
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    pub fn one_in(&mut self, many: usize) -> bool {
        self.below(many) == 0
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

/// What is wrong with a packet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// Nothing.
    Sound,
    /// It ends too early.
    Truncated,
    /// Some of its first octets are others.
    Flipped,
    /// A length or an offset in it is a lie.
    LyingLength,
    /// A fragment, with any offset.
    Fragment,
    /// An ICMP message, its inside perhaps a lie.
    Icmp,
    /// IPv6 extension headers in any order, with any length.
    HeaderChain,
    /// Its source or destination port is 0.
    PortZero,
    /// It says that it comes from a Service.
    FromService,
    /// It says that it comes from whom it goes to.
    Land,
    /// SCTP, perhaps no such thing.
    Sctp,
    /// Another network protocol, a tag, or one family's packet said to be the other's.
    Foreign,
    /// Noise behind a header that is right.
    Noise,
    /// To or from an address that nobody has.
    OddAddress,
}

impl Kind {
    pub const ALL: [Self; 14] = [
        Self::Sound,
        Self::Truncated,
        Self::Flipped,
        Self::LyingLength,
        Self::Fragment,
        Self::Icmp,
        Self::HeaderChain,
        Self::PortZero,
        Self::FromService,
        Self::Land,
        Self::Sctp,
        Self::Foreign,
        Self::Noise,
        Self::OddAddress,
    ];
}

const FLAGS: [u8; 10] = [SYN, SYN, SYN | ACK, ACK, ACK | PSH, ACK | FIN, RST, RST | ACK, 0, 0xff];
const PEOPLE: [Who; 7] =
    [Who::Client(1), Who::Client(2), Who::Here(1), Who::Here(5), Who::There(1), Who::There(5), Who::Node];

/// A packet of this kind.
pub fn packet(dice: &mut Dice, link: Link, kind: Kind) -> Vec<u8> {
    let family = dice.of(&[Family::V4, Family::V6]);
    let header = link.header_length();
    match kind {
        Kind::Sound => sound(dice, link, family).bytes(),
        Kind::Truncated => {
            let mut bytes = sound(dice, link, family).bytes();
            bytes.truncate(14 + dice.below(bytes.len() - 14));
            bytes
        }
        Kind::Flipped => {
            let mut bytes = sound(dice, link, family).bytes();
            for _ in 0..1 + dice.below(4) {
                let at = dice.below(bytes.len().min(80));
                bytes[at] = dice.next() as u8;
            }
            bytes
        }
        Kind::LyingLength => {
            let mut bytes = sound(dice, link, family).bytes();
            let lie = dice.next().to_be_bytes();
            let transport = header + if family == Family::V4 { 20 } else { 40 };
            match (dice.below(4), family) {
                // Total length, or payload length.
                (0, Family::V4) => bytes[header + 2..header + 4].copy_from_slice(&lie[..2]),
                (0, Family::V6) => bytes[header + 4..header + 6].copy_from_slice(&lie[..2]),
                // A small one, which leaves no room for ports.
                (1, Family::V4) => bytes[header + 2..header + 4].copy_from_slice(&[0, lie[0] % 48]),
                (1, Family::V6) => bytes[header + 4..header + 6].copy_from_slice(&[0, lie[0] % 24]),
                // The header's length.
                (2, Family::V4) => bytes[header] = 0x40 | lie[0] & 0xf,
                // UDP's length, or TCP's sequence number, which is none.
                (2, Family::V6) => bytes[transport + 4..transport + 6].copy_from_slice(&lie[..2]),
                // TCP's data offset, or octets of the datagram.
                _ => {
                    let at = (transport + 12).min(bytes.len() - 1);
                    bytes[at] = lie[0];
                }
            }
            bytes
        }
        Kind::Fragment => fragment(dice, link, family),
        Kind::Icmp => icmp(dice, link, family),
        Kind::HeaderChain => header_chain(dice, link),
        Kind::PortZero => {
            let frame = sound(dice, link, family);
            let (from, to) = (frame.source(), frame.destination());
            if dice.one_in(2) {
                frame.with_source(SocketAddr::new(from.ip(), 0)).bytes()
            } else {
                frame.with_destination(SocketAddr::new(to.ip(), 0)).bytes()
            }
        }
        Kind::FromService => {
            let from = service(dice, family, Protocol::Tcp);
            sound(dice, link, family).with_source(from).bytes()
        }
        Kind::Land => {
            let frame = sound(dice, link, family);
            let to = frame.destination();
            frame.with_source(to).bytes()
        }
        Kind::Sctp => {
            let mut chunk = dice.bytes(16);
            chunk[0] = dice.of(&[1, 2, 0, 3, 6, 7, 14, 255]);
            let (from, to) = ends(dice, family, Protocol::Sctp);
            let mut payload = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
            payload.extend(dice.bytes(8));
            payload.extend(chunk);
            let length = 4 + dice.below(payload.len() - 3);
            payload.truncate(length);
            with_ip_header(link, from.ip(), to.ip(), IpNumber::SCTP, &payload)
        }
        Kind::Foreign => {
            let mut bytes = sound(dice, link, family).bytes();
            if link == Link::Ethernet {
                let kind: u16 = dice.of(&[0x0806, 0x8100, 0x88a8, 0x8847, 0x86dd, 0x0800, 0x0001, 0xffff]);
                bytes[12..14].copy_from_slice(&kind.to_be_bytes());
            } else {
                bytes[0] = bytes[0] & 0xf | dice.of(&[0, 0x40, 0x50, 0x60, 0xf0]);
            }
            bytes
        }
        Kind::Noise => {
            let (from, to) = ends(dice, family, Protocol::Tcp);
            let length = dice.below(64);
            let number = dice.of(&[6, 17, 132, 1, 58, 2, 4, 41, 47, 50, 51, 0, 60, 255]);
            let noise = dice.bytes(length);
            with_ip_header(link, from.ip(), to.ip(), IpNumber(number), &noise)
        }
        Kind::OddAddress => {
            let frame = sound(dice, link, family);
            let odd: IpAddr = match family {
                Family::V4 => IpAddr::from(dice.of(&[
                    [0, 0, 0, 0],
                    [127, 0, 0, 1],
                    [224, 0, 0, 1],
                    [255, 255, 255, 255],
                ])),
                Family::V6 => {
                    let mapped = [0, 0, 0, 0, 0, 0xffff, 0x0a60, 1];
                    let all = [[0; 8], [0, 0, 0, 0, 0, 0, 0, 1], [0xff02, 0, 0, 0, 0, 0, 0, 1], mapped];
                    IpAddr::from(dice.of(&all))
                }
            };
            let (from, to) = (frame.source(), frame.destination());
            if dice.one_in(2) {
                frame.with_source(SocketAddr::new(odd, from.port())).bytes()
            } else {
                frame.with_destination(SocketAddr::new(odd, to.port())).bytes()
            }
        }
    }
}

/// A packet that is as it should be: of a flow, of the beginning of one, or of nobody's.
pub fn sound(dice: &mut Dice, link: Link, family: Family) -> Frame {
    let at = dice.below(MEMORY * 3 / 2);
    let known = dice.met.get(at).copied();
    let known = known.filter(|(_, from, _)| from.is_ipv4() == (family == Family::V4));
    let (protocol, from, to) = known.unwrap_or_else(|| {
        let protocol = dice.of(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp]);
        let (from, to) = ends(dice, family, protocol);
        (protocol, from, to)
    });
    let flags = dice.of(&FLAGS);
    let length = dice.below(40);
    Frame::of(protocol, link, from, to, flags).with_payload(&dice.bytes(length))
}

/// From somebody to a Service, from a backend to somebody or to a mask, or from anybody to anybody; from few ports,
/// so that flows are met again.
fn ends(dice: &mut Dice, family: Family, protocol: Protocol) -> (SocketAddr, SocketAddr) {
    let target = Ports::of(protocol).target;
    let somebody = dice.of(&PEOPLE).at(family, 20_000 + dice.below(4) as u16);
    match dice.below(8) {
        0..5 => (somebody, service(dice, family, protocol)),
        5 => (dice.of(&PEOPLE).at(family, target), somebody),
        6 => (dice.of(&PEOPLE).at(family, target), Who::Node.at(family, 61_000 + dice.below(4_000) as u16)),
        _ => (somebody, dice.of(&PEOPLE).at(family, target)),
    }
}

fn service(dice: &mut Dice, family: Family, protocol: Protocol) -> SocketAddr {
    let number = 1 + dice.below(4) as u8;
    let ports = Ports::of(protocol);
    match dice.below(6) {
        0 | 1 => Who::ClusterIp(number).at(family, ports.port),
        2 => Who::Node.at(family, ports.node_port(number)),
        3 => Who::LoadBalancer(number).at(family, ports.port),
        4 => Who::External(number).at(family, ports.port),
        _ => Who::ClusterIp(number).at(family, 1 + dice.below(100) as u16),
    }
}

/// Payload behind an IP header that is right about it.
pub fn with_ip_header(link: Link, from: IpAddr, to: IpAddr, number: IpNumber, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    if link == Link::Ethernet {
        out.extend([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
        out.extend(if from.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xdd] });
    }
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let header = Ipv4Header::new(payload.len() as u16, 61, number, from.octets(), to.octets());
            let mut header = header.expect("it is short");
            header.header_checksum = header.calc_header_checksum();
            out.extend(header.to_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let header = Ipv6Header {
                payload_length: payload.len() as u16,
                next_header: number,
                hop_limit: 61,
                source: from.octets(),
                destination: to.octets(),
                ..Ipv6Header::default()
            };
            out.extend(header.to_bytes());
        }
        _ => panic!("two families"),
    }
    out.extend(payload);
    out
}

fn fragment(dice: &mut Dice, link: Link, family: Family) -> Vec<u8> {
    let mut bytes = sound(dice, link, family).bytes();
    let header = link.header_length();
    let offset = dice.of(&[0, 1, 2, 3, 185, 8_191]);
    let more = dice.one_in(2);
    match family {
        Family::V4 => {
            let word: u16 = offset | if more { 0x2000 } else { 0 } | if dice.one_in(8) { 0x4000 } else { 0 };
            bytes[header + 6..header + 8].copy_from_slice(&word.to_be_bytes());
            let id = dice.below(4) as u16;
            bytes[header + 4..header + 6].copy_from_slice(&id.to_be_bytes());
            fix_checksum(&mut bytes[header..]);
        }
        Family::V6 => {
            let next = std::mem::replace(&mut bytes[header + 6], 44);
            let word: u16 = offset << 3 | u16::from(more);
            let mut extension = vec![next, 0];
            extension.extend(word.to_be_bytes());
            extension.extend([0, 0, 0, dice.below(4) as u8]);
            bytes.splice(header + 40..header + 40, extension);
            let length = (bytes.len() - header - 40) as u16;
            bytes[header + 4..header + 6].copy_from_slice(&length.to_be_bytes());
        }
    }
    bytes
}

fn fix_checksum(header: &mut [u8]) {
    header[10..12].fill(0);
    let sum = etherparse::checksum::Sum16BitWords::new().add_slice(&header[..20]).ones_complement();
    // The library computes in the machine's order.
    header[10..12].copy_from_slice(&sum.to_ne_bytes());
}

/// An error about a packet of a flow, seen from whoever may send one; or an echo, a redirect, or anything.
fn icmp(dice: &mut Dice, link: Link, family: Family) -> Vec<u8> {
    let inner_link = Link::Ip;
    let mut inner = match dice.below(8) {
        0 => header_chain(dice, inner_link),
        1 => fragment(dice, inner_link, family),
        _ => sound(dice, inner_link, family).bytes(),
    };
    match dice.below(4) {
        0 => inner.truncate(dice.below(inner.len())),
        1 => {
            let at = dice.below(inner.len().min(64));
            inner[at] = dice.next() as u8;
        }
        2 => inner.truncate(28.min(inner.len())),
        _ => {}
    }
    let from = dice.of(&PEOPLE).ip(family);
    let to =
        if dice.one_in(2) { dice.of(&PEOPLE).ip(family) } else { service(dice, family, Protocol::Tcp).ip() };
    let echo = IcmpEchoHeader { id: dice.below(4) as u16, seq: 1 };
    let mut payload = Vec::new();
    match (from, to) {
        (IpAddr::V4(_), IpAddr::V4(_)) => {
            use icmpv4::{DestUnreachableHeader as Unreachable, TimeExceededCode};
            let kind = match dice.below(6) {
                0 => Icmpv4Type::DestinationUnreachable(Unreachable::FragmentationNeeded {
                    next_hop_mtu: 1_400,
                }),
                1 => Icmpv4Type::DestinationUnreachable(Unreachable::Port),
                2 => Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit),
                3 => Icmpv4Type::EchoRequest(echo),
                4 => Icmpv4Type::Unknown { type_u8: 5, code_u8: 1, bytes5to8: [8, 0, 250, 10] },
                _ => Icmpv4Type::Unknown {
                    type_u8: dice.next() as u8,
                    code_u8: dice.next() as u8,
                    bytes5to8: [0; 4],
                },
            };
            payload.extend(Icmpv4Header::with_checksum(kind, &inner).to_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let kind = match dice.below(6) {
                0 => Icmpv6Type::PacketTooBig { mtu: 1_280 },
                1 => Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port),
                2 => Icmpv6Type::TimeExceeded(icmpv6::TimeExceededCode::HopLimitExceeded),
                3 => Icmpv6Type::EchoRequest(echo),
                4 => Icmpv6Type::Unknown { type_u8: 137, code_u8: 0, bytes5to8: [0; 4] },
                _ => Icmpv6Type::Unknown {
                    type_u8: dice.next() as u8,
                    code_u8: dice.next() as u8,
                    bytes5to8: [0; 4],
                },
            };
            let header = Icmpv6Header::with_checksum(kind, source.octets(), destination.octets(), &inner);
            payload.extend(header.expect("it is short").to_bytes());
        }
        _ => panic!("two families"),
    }
    payload.extend(&inner);
    if dice.one_in(8) {
        payload.truncate(dice.below(payload.len()));
    }
    let number = if family == Family::V4 { IpNumber::ICMP } else { IpNumber::IPV6_ICMP };
    with_ip_header(link, from, to, number, &payload)
}

/// Extension headers before TCP or UDP: sound ones, too many, ones that lead nowhere.
fn header_chain(dice: &mut Dice, link: Link) -> Vec<u8> {
    let frame = sound(dice, Link::Ip, Family::V6);
    let (from, to) = (frame.source().ip(), frame.destination().ip());
    let bytes = frame.bytes();
    let (mut next, mut payload) = (bytes[6], bytes[40..].to_vec());
    for _ in 0..dice.below(10) {
        let kind = dice.of(&[0, 43, 44, 51, 60, 135]);
        // In units of eight octets, beside the first; of four, for the authentication header.
        let length = dice.below(3) as u8;
        let octets = match kind {
            44 => 8,
            51 => (usize::from(length) + 2) * 4,
            _ => (usize::from(length) + 1) * 8,
        };
        let told = if dice.one_in(10) { dice.next() as u8 } else { length };
        let mut header = vec![next, if kind == 44 { 0 } else { told }];
        header.resize(octets, 0);
        if kind == 44 && dice.one_in(2) {
            header[2..4].copy_from_slice(&dice.of(&[0_u16, 1, 8, 1_480]).to_be_bytes());
        }
        header.extend(payload);
        (next, payload) = (kind, header);
    }
    with_ip_header(link, from, to, IpNumber(next), &payload)
}
