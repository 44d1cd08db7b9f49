//! Bad input: whatever comes, a program leaves it as it is, drops it and says why, or translates it as the host does.
//!
//! `KPROXY_FUZZ_PACKETS=1000000 cargo test -p kproxy-agent --test packets fuzz -- --nocapture` tries more, from
//! other seeds with `KPROXY_FUZZ_SEED`.

use std::{collections::BTreeMap, time::Instant};

use kproxy_common::{Address, IcmpVerdict, PacketMeta, PacketVerdict, Piece, Protocol, Reason, TcpFlags};
use serde_json::json;

use crate::{
    answers,
    cluster::{Service, Who},
    frame::{Frame, Link},
    hostile::{Dice, Kind, packet},
    quotations::{self, Heard},
    world::{Action, At, Device, ROOM, World, in_world, is_long_enough},
};

/// Enough to meet each way through the programs many times, in seconds of a debug build.
const PACKETS: u64 = 100_000;
const SEED: u64 = 0x6b70_726f_7879;
/// After how many packets all is compared and begun anew.
const ROUND: u64 = 5_000;

const HOOKS: [(At, Link); 5] = [
    (At::In(Device::Uplink), Link::Ethernet),
    (At::In(Device::Uplink), Link::Ip),
    (At::In(Device::Pod), Link::Ethernet),
    (At::Out(Device::Uplink), Link::Ethernet),
    (At::Out(Device::Uplink), Link::Ip),
];

#[test]
fn nothing_that_comes_is_translated_wrongly() {
    let packets = number("KPROXY_FUZZ_PACKETS", PACKETS);
    let seed = number("KPROXY_FUZZ_SEED", SEED);
    in_world(ROOM, |world| {
        let start = Instant::now();
        let mut tally = Tally::default();
        for round in 0..packets.div_ceil(ROUND) {
            world.reset();
            world.have(&services());
            let mut dice = Dice::new(seed ^ round);
            for number in 0..ROUND {
                let (at, link) = dice.of(&HOOKS);
                // A third is sound, so that there are flows for the rest to meet.
                let kind = if dice.one_in(3) { Kind::Sound } else { dice.of(&Kind::ALL) };
                let bytes = std::iter::repeat_with(|| packet(&mut dice, link, kind))
                    .find(|bytes| is_long_enough(bytes));
                let bytes = bytes.expect("nearly all can");
                let outcome = judge(world, at, link, &bytes)
                    .unwrap_or_else(|error| panic!("seed {seed}, round {round}, packet {number}: {kind:?} at {at:?} {link:?}: {error}\n{bytes:02x?}"));
                tally.note(kind, (outcome.0, outcome.1));
                if let Some(translated) = &outcome.2 {
                    dice.remember(translated);
                }
            }
            world.compare_flows();
        }
        tally.print(packets, start.elapsed());
    });
}

/// What came of a packet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Came {
    Untouched,
    Translated,
    Dropped,
    Answered,
}

/// Runs the program, and says what is wrong with what it did.
fn judge(
    world: &mut World,
    at: At,
    link: Link,
    bytes: &[u8],
) -> Result<(Came, Option<Reason>, Option<Frame>), String> {
    let outcome = world.run(at, link, bytes);
    let counted = world.newly_counted();
    let reason = match counted[..] {
        [] => None,
        [(reason, 1)] => Some(reason),
        _ => return Err(format!("counted {counted:?}")),
    };
    let is_changed = outcome.bytes != bytes;
    let came = match outcome.action {
        Action::Drop if is_changed => return Err(format!("dropped half rewritten: {:02x?}", outcome.bytes)),
        Action::Drop if reason.is_none() => return Err("dropped and not counted".to_owned()),
        Action::Drop => Came::Dropped,
        Action::Answer if reason.is_none() => return Err("answered and not counted".to_owned()),
        Action::Answer => Came::Answered,
        Action::Next if is_changed => Came::Translated,
        Action::Next => Came::Untouched,
    };
    // A test run takes the protocol from where it stands behind an Ethernet header, with which it may lie.
    if [[0x81, 0x00], [0x88, 0xa8]].contains(&[bytes[12], bytes[13]]) {
        return match (came, reason) {
            (Came::Untouched, Some(Reason::VlanTagged)) => Ok((came, reason, None)),
            _ => Err(format!("{came:?} for {reason:?}, with a VLAN's tag")),
        };
    }
    let is_as_told =
        bytes[12..14] == [[0x86, 0xdd], [0x08, 0x00]][usize::from(bytes[link.header_length()] >> 4 == 4)];
    let is_sound = is_as_told && Frame::parse(link, bytes).is_ok_and(|frame| frame.has_no_extensions());
    let left_alone = matches!(reason, Some(Reason::Malformed | Reason::Unparsed));
    if !is_sound && left_alone && came == Came::Untouched {
        // What cannot be read is nobody's.
        return Ok((came, reason, None));
    }
    let (mut reading, fragment) = match Reading::of(link, bytes) {
        Read::Ports(reading, fragment) => (reading, fragment),
        Read::Message(transport, ends) => {
            let verdict = match quotations::read(bytes, transport, ends) {
                Heard::Message(message) => world.decide_about_message(at, &message),
                Heard::Short => IcmpVerdict::Pass { reason: Reason::Malformed },
                Heard::Far => return Ok((came, reason, None)),
            };
            return judge_message(link, bytes, &outcome.bytes, (came, reason), verdict);
        }
        Read::Other(destination) => {
            let verdict = world.decide_about_other(&destination);
            let expected = match verdict {
                PacketVerdict::Drop { reason } => (Came::Dropped, Some(reason)),
                _ => (Came::Untouched, None),
            };
            if (came, reason) != expected {
                return Err(format!("{came:?} for {reason:?}, but the host says {verdict:?}"));
            }
            return Ok((came, reason, None));
        }
        Read::Nothing => {
            return match (came, reason) {
                (Came::Untouched, None) => Ok((came, reason, None)),
                (Came::Dropped | Came::Untouched, Some(Reason::Malformed | Reason::Unparsed)) => {
                    Ok((came, reason, None))
                }
                _ => Err(format!("{came:?} for {reason:?}, and cannot be read")),
            };
        }
    };
    let verdict = match fragment {
        Some(id) => world.decide_about_fragment(at, &mut reading.meta, id),
        None => world.decide_about(at, &reading.meta),
    };
    let expected = match verdict {
        PacketVerdict::Pass { reason } => (Came::Untouched, counting(reason)),
        PacketVerdict::Drop { reason } => (Came::Dropped, Some(reason)),
        PacketVerdict::Refuse { reason } => (Came::Answered, Some(reason)),
        PacketVerdict::SetDestination { .. } | PacketVerdict::SetSource { .. } => {
            (Came::Translated, Some(Reason::Forwarded))
        }
    };
    // Rewriting to what stands there already changes nothing.
    let same = expected == (came, reason)
        || expected.0 == Came::Translated && came == Came::Untouched && reason == expected.1;
    // A rewrite of a header that ends too early fails before it begins.
    let failed = !is_sound && (came, reason) == (Came::Dropped, Some(Reason::RewriteFailed));
    // Lengths that lie get no answer.
    let is_odd = !is_sound || matches!(reason, Some(Reason::Malformed | Reason::Unparsed));
    let silent = is_odd && came == Came::Dropped && expected.0 == Came::Answered;
    if came == Came::Answered && is_as_told && Frame::parse(link, bytes).is_ok() {
        answers::check_refusal(link, bytes, &outcome.bytes)?;
    }
    if !same && !failed && !silent {
        return Err(format!("{came:?} for {reason:?}, but the host says {verdict:?}"));
    }
    if came == Came::Translated {
        reading.check(bytes, &outcome.bytes, verdict)?;
        return Ok((came, reason, Frame::parse(link, &outcome.bytes).ok()));
    }
    Ok((came, reason, None))
}

/// What is counted is not what is nobody's business.
fn counting(reason: Reason) -> Option<Reason> {
    (!matches!(reason, Reason::NotAService | Reason::NoFlow)).then_some(reason)
}

/// Addresses and ports of a packet, read as they lie, whatever its lengths say.
struct Reading {
    meta: PacketMeta,
    network: usize,
    transport: usize,
}

/// What a program reads of a packet.
enum Read {
    /// Ports, or a fragment that follows them, with its identification.
    Ports(Reading, Option<u32>),
    /// ICMP, and where it begins and between whom it goes.
    Message(usize, [Address; 2]),
    /// A protocol without ports, to this address.
    Other(Address),
    /// Nothing that makes sense.
    Nothing,
}

impl Reading {
    fn of(link: Link, bytes: &[u8]) -> Read {
        Self::read(link, bytes).unwrap_or(Read::Nothing)
    }

    fn read(link: Link, bytes: &[u8]) -> Option<Read> {
        let network = link.header_length();
        let ip = bytes.get(network..)?;
        let kind = bytes.get(12..14)?;
        let word = |at: usize| Some(u32::from_ne_bytes(ip.get(at..at + 4)?.try_into().ok()?));
        // The fragment's identification, and whether it is the first.
        let mut fragment = None;
        let (length, number, source, destination) = match kind {
            [0x08, 0x00] if ip.len() >= 20 && ip[0] >> 4 == 4 => {
                let length = usize::from(ip[0] & 0xf) * 4;
                if length < 20 {
                    return None;
                }
                let offset = u16::from_be_bytes([ip[6], ip[7]]);
                if offset & 0x3fff != 0 {
                    fragment = Some((u32::from_ne_bytes([ip[4], ip[5], 0, 0]), offset & 0x1fff == 0));
                }
                let address = |at: usize| {
                    let octets: [u8; 4] = ip[at..at + 4].try_into().expect("four octets");
                    Address::from(std::net::IpAddr::from(octets))
                };
                (length, ip[9], address(12), address(16))
            }
            [0x86, 0xdd] if ip.len() >= 40 && ip[0] >> 4 == 6 => {
                let address = |at: usize| Address::new(ip[at..at + 16].try_into().expect("sixteen octets"));
                // Mapped addresses must not be on a wire.
                if address(8).is_v4() || address(24).is_v4() {
                    return None;
                }
                let (mut length, mut number) = (40, ip[6]);
                for _ in 0..6 {
                    match number {
                        0 | 43 | 60 => {
                            number = *ip.get(length)?;
                            length += (usize::from(*ip.get(length + 1)?) + 1) * 8;
                        }
                        44 => {
                            let offset = u16::from_be_bytes([*ip.get(length + 2)?, *ip.get(length + 3)?]);
                            number = *ip.get(length)?;
                            if offset & 0xfff9 != 0 {
                                fragment = Some((word(length + 4)?, offset & 0xfff8 == 0));
                            }
                            length += 8;
                            if offset & 0xfff8 != 0 {
                                break;
                            }
                        }
                        _ => break,
                    }
                    if network + length > 0x300 {
                        return None;
                    }
                }
                (length, number, address(8), address(24))
            }
            _ => return None,
        };
        let (protocol, least) = match (number, fragment) {
            (6, _) => (Protocol::Tcp, 16),
            (17, _) => (Protocol::Udp, 8),
            (132, _) => (Protocol::Sctp, 16),
            (1 | 58, None) => return Some(Read::Message(network + length, [source, destination])),
            _ => return Some(Read::Other(destination)),
        };
        let piece = match fragment {
            None => Piece::Whole,
            Some((_, true)) => Piece::First,
            Some((_, false)) => Piece::Later,
        };
        let mut meta = PacketMeta {
            source,
            destination,
            source_port: 0,
            destination_port: 0,
            protocol,
            tcp: TcpFlags::of_sctp_chunk(0),
            piece,
            has_payload: true,
        };
        if piece != Piece::Later {
            let rest = ip.get(length..)?;
            if rest.len() < least {
                return None;
            }
            let port = |at: usize| u16::from_be_bytes([rest[at], rest[at + 1]]);
            (meta.source_port, meta.destination_port) = (port(0), port(2));
            // As the IP header has it; that of a packet which is too long says nothing.
            let end =
                match (ip[0] >> 4, u16::from_be_bytes([ip[2], ip[3]]), u16::from_be_bytes([ip[4], ip[5]])) {
                    (4, 0, _) | (6, _, 0) => usize::MAX,
                    (4, total, _) => usize::from(total),
                    (_, _, behind) => 40 + usize::from(behind),
                };
            meta.has_payload = match protocol {
                Protocol::Tcp => end > length + usize::from(rest[12] >> 4) * 4,
                Protocol::Udp => true,
                Protocol::Sctp => matches!(rest[12], 0 | 64),
            };
            meta.tcp = match protocol {
                Protocol::Tcp => TcpFlags { bits: rest[13] },
                Protocol::Udp => TcpFlags::default(),
                Protocol::Sctp => TcpFlags::of_sctp_chunk(rest[12]),
            };
        }
        let reading = Self { meta, network, transport: network + length };
        Some(Read::Ports(reading, fragment.map(|(id, _)| id)))
    }

    /// The verdict was carried out, and nothing else; each checksum is as right, or as wrong, as it was.
    fn check(&self, before: &[u8], after: &[u8], verdict: PacketVerdict) -> Result<(), String> {
        let is_v4 = self.meta.source.is_v4();
        let addresses = self.network + if is_v4 { 12 } else { 8 };
        let length = if is_v4 { 4 } else { 16 };
        let (address, ports, at) = match verdict {
            PacketVerdict::SetDestination { address, port, client_port } => {
                let source = if client_port == 0 { self.meta.source_port } else { client_port };
                (address, [source, port], addresses + length)
            }
            PacketVerdict::SetSource { address, port, client_port } => {
                let destination = if client_port == 0 { self.meta.destination_port } else { client_port };
                (address, [port, destination], addresses)
            }
            other => return Err(format!("changed, but {other:?}")),
        };
        let mut expected = before.to_vec();
        expected[at..at + length].copy_from_slice(&address.octets()[16 - length..]);
        let has_ports = self.meta.piece != Piece::Later;
        let checksum = self.transport
            + match self.meta.protocol {
                Protocol::Tcp => 16,
                Protocol::Udp => 6,
                Protocol::Sctp => 8,
            };
        let mut fields = Vec::from_iter(is_v4.then_some(self.network + 10));
        if has_ports {
            for (place, port) in ports.into_iter().enumerate() {
                let at = self.transport + 2 * place;
                expected[at..at + 2].copy_from_slice(&port.to_be_bytes());
            }
            fields.push(checksum);
            fields.extend((self.meta.protocol == Protocol::Sctp).then_some(checksum + 2));
        }
        for field in fields {
            expected[field..field + 2].copy_from_slice(&after[field..field + 2]);
        }
        if expected != after {
            return Err(format!("is not {verdict:?} carried out: {after:02x?}"));
        }
        if is_v4 {
            let header = self.network..self.transport;
            if sum(&before[header.clone()]) != sum(&after[header]) {
                return Err(format!("the IPv4 checksum went wrong: {after:02x?}"));
            }
        }
        if !has_ports {
            return Ok(());
        }
        if self.meta.protocol == Protocol::Sctp {
            return self.check_sctp(before, after);
        }
        if self.meta.protocol == Protocol::Udp && before[checksum..checksum + 2] == [0, 0] {
            if after[checksum..checksum + 2] != [0, 0] {
                return Err("a datagram without a checksum was given one".to_owned());
            }
            return Ok(());
        }
        // Addresses count in it, by the pseudo header.
        let covered = |bytes: &[u8]| {
            let addresses = sum(&bytes[addresses..addresses + 2 * length]);
            fold(u32::from(addresses) + u32::from(sum(&bytes[self.transport..])))
        };
        if covered(before) != covered(after) {
            return Err(format!("the transport checksum went wrong: {after:02x?}"));
        }
        Ok(())
    }
}

impl Reading {
    /// A right CRC stays right, computed from nothing; 0 stays for the device to fill in.
    fn check_sctp(&self, before: &[u8], after: &[u8]) -> Result<(), String> {
        let end = self.network
            + if self.meta.source.is_v4() {
                usize::from(u16::from_be_bytes([before[self.network + 2], before[self.network + 3]]))
            } else {
                usize::from(u16::from_be_bytes([before[self.network + 4], before[self.network + 5]])) + 40
            };
        let (Some(old), Some(new)) = (before.get(self.transport..end), after.get(self.transport..end)) else {
            // Its length lies.
            return Ok(());
        };
        if old.len() < 12 {
            return Ok(());
        }
        let field = |packet: &[u8]| u32::from_le_bytes([packet[8], packet[9], packet[10], packet[11]]);
        if field(old) == 0 {
            let stays = field(new) == 0;
            return if stays { Ok(()) } else { Err("a missing CRC was changed".to_owned()) };
        }
        // As wrong as it was.
        if field(old) ^ crc32c(old) != field(new) ^ crc32c(new) {
            return Err(format!("the CRC went wrong: {after:02x?}"));
        }
        Ok(())
    }
}

/// Of an SCTP packet (RFC 9260, appendix A), with its own field taken as 0.
fn crc32c(packet: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for (at, octet) in packet.iter().enumerate() {
        crc ^= u32::from(if (8..12).contains(&at) { 0 } else { *octet });
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    !crc
}

/// An ICMP message: what the host decided has become of it, and checksums stay as right or wrong as they were.
fn judge_message(
    link: Link,
    before: &[u8],
    after: &[u8],
    (came, reason): (Came, Option<Reason>),
    verdict: IcmpVerdict,
) -> Result<(Came, Option<Reason>, Option<Frame>), String> {
    let network = link.header_length();
    let expected = match verdict {
        IcmpVerdict::Pass { reason } => (Came::Untouched, counting(reason)),
        IcmpVerdict::Drop { reason } => (Came::Dropped, Some(reason)),
        IcmpVerdict::Answer => (Came::Answered, Some(Reason::EchoAnswered)),
        IcmpVerdict::Translate { .. } => (Came::Translated, Some(Reason::IcmpTranslated)),
    };
    if expected != (came, reason) || after.len() != before.len() {
        return Err(format!(
            "a message {came:?} for {reason:?}, but the host says {verdict:?}: {after:02x?}"
        ));
    }
    if matches!(came, Came::Translated | Came::Answered) {
        let is_v4 = before[network] >> 4 == 4;
        let header = if is_v4 { usize::from(before[network] & 0xf) * 4 } else { 40 };
        if is_v4 && sum(&before[network..network + header]) != sum(&after[network..network + header]) {
            return Err(format!("the IPv4 checksum went wrong: {after:02x?}"));
        }
        let covered = |bytes: &[u8]| {
            let from = if is_v4 { network + header } else { network + 8 };
            sum(&bytes[from..])
        };
        if covered(before) != covered(after) {
            return Err(format!("the message's checksum went wrong: {after:02x?}"));
        }
    }
    Ok((came, reason, None))
}

/// One's complement sum, with one form of zero.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    fold(words.sum())
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    if sum == 0xffff { 0 } else { sum as u16 }
}

fn services() -> Vec<Service> {
    let both = [Who::Here(1), Who::There(1)];
    let mut sctp_keeps_ports = Service::new(2, &[Who::There(1)]);
    for port in &mut sctp_keeps_ports.ports {
        if port.protocol == "SCTP" {
            port.target = port.port;
        }
    }
    vec![
        Service::new(1, &both),
        sctp_keeps_ports,
        Service::new(3, &[]),
        Service::new(4, &both).with_spec(json!({"externalTrafficPolicy": "Local"})),
    ]
}

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")),
        Err(_) => default,
    }
}

#[derive(Default)]
struct Tally {
    counts: BTreeMap<(Kind, Came), u64>,
    reasons: BTreeMap<Reason, u64>,
}

impl Tally {
    fn note(&mut self, kind: Kind, (came, reason): (Came, Option<Reason>)) {
        *self.counts.entry((kind, came)).or_default() += 1;
        if let Some(reason) = reason {
            *self.reasons.entry(reason).or_default() += 1;
        }
    }

    fn print(&self, packets: u64, time: std::time::Duration) {
        println!("{packets} packets in {time:.1?}");
        println!("{:<14}{:>12}{:>12}{:>12}{:>12}", "", "untouched", "translated", "dropped", "answered");
        for kind in Kind::ALL {
            let of = |came| self.counts.get(&(kind, came)).copied().unwrap_or(0);
            let kind = format!("{kind:?}");
            println!(
                "{kind:<14}{:>12}{:>12}{:>12}{:>12}",
                of(Came::Untouched),
                of(Came::Translated),
                of(Came::Dropped),
                of(Came::Answered)
            );
        }
        for (reason, count) in &self.reasons {
            println!("{:<24}{count:>10}", reason.word());
        }
    }
}
