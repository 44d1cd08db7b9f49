//! Bad input: whatever comes, a program leaves it as it is, drops it and says why, or translates it as the host does.
//!
//! `KPROXY_FUZZ_PACKETS=1000000 cargo test -p kproxy-agent --test packets fuzz -- --nocapture` tries more, from
//! other seeds with `KPROXY_FUZZ_SEED`.

use std::{collections::BTreeMap, time::Instant};

use kproxy_common::{Address, PacketMeta, PacketVerdict, Protocol, Reason, TcpFlags};
use serde_json::json;

use crate::{
    cluster::{Service, Who},
    frame::{Frame, Link},
    hostile::{Dice, Kind, packet},
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
        Action::Next if is_changed => Came::Translated,
        Action::Next => Came::Untouched,
    };
    // A test run takes the protocol from where it stands behind an Ethernet header, with which it may lie.
    let is_as_told =
        bytes[12..14] == [[0x86, 0xdd], [0x08, 0x00]][usize::from(bytes[link.header_length()] >> 4 == 4)];
    let is_sound = is_as_told && Frame::parse(link, bytes).is_ok_and(|frame| frame.has_no_extensions());
    let left_alone = matches!(reason, None | Some(Reason::Malformed | Reason::Unparsed));
    if !is_sound && left_alone && came == Came::Untouched {
        // What cannot be read is nobody's.
        return Ok((came, reason, None));
    }
    let Some(reading) = Reading::of(link, bytes) else {
        return match (came, reason) {
            (Came::Dropped | Came::Untouched, Some(Reason::Malformed)) => Ok((came, reason, None)),
            _ => Err(format!("{came:?} for {reason:?}, and cannot be read")),
        };
    };
    let verdict = world.decide_about(at, &reading.meta);
    let expected = match verdict {
        PacketVerdict::Pass { reason } => (Came::Untouched, counting(reason)),
        PacketVerdict::Drop { reason } => (Came::Dropped, Some(reason)),
        PacketVerdict::SetDestination { .. } | PacketVerdict::SetSource { .. } => {
            (Came::Translated, Some(Reason::Forwarded))
        }
    };
    // Rewriting to what stands there already changes nothing.
    let same = expected == (came, reason)
        || expected.0 == Came::Translated && came == Came::Untouched && reason == expected.1;
    // A rewrite of a header that ends too early fails before it begins.
    let failed = !is_sound && (came, reason) == (Came::Dropped, Some(Reason::RewriteFailed));
    if !same && !failed {
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

impl Reading {
    fn of(link: Link, bytes: &[u8]) -> Option<Self> {
        let network = link.header_length();
        let ip = bytes.get(network..)?;
        let kind = bytes.get(12..14)?;
        let (length, number, source, destination) = match kind {
            [0x08, 0x00] if ip.len() >= 20 && ip[0] >> 4 == 4 => {
                let length = usize::from(ip[0] & 0xf) * 4;
                let is_fragment = ip[6] & 0x3f != 0 || ip[7] != 0;
                if length < 20 || is_fragment {
                    return None;
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
                (40, ip[6], address(8), address(24))
            }
            _ => return None,
        };
        let rest = ip.get(length..)?;
        let (protocol, flags) = match number {
            6 if rest.len() >= 16 => (Protocol::Tcp, rest[13]),
            17 if rest.len() >= 8 => (Protocol::Udp, 0),
            _ => return None,
        };
        let port = |at: usize| u16::from_be_bytes([rest[at], rest[at + 1]]);
        let meta = PacketMeta {
            source,
            destination,
            source_port: port(0),
            destination_port: port(2),
            protocol,
            tcp: TcpFlags { bits: flags },
        };
        Some(Self { meta, network, transport: network + length })
    }

    /// The verdict was carried out, and nothing else; each checksum is as right, or as wrong, as it was.
    fn check(&self, before: &[u8], after: &[u8], verdict: PacketVerdict) -> Result<(), String> {
        let is_v4 = self.meta.source.is_v4();
        let addresses = self.network + if is_v4 { 12 } else { 8 };
        let length = if is_v4 { 4 } else { 16 };
        let (address, port, at, port_at) = match verdict {
            PacketVerdict::SetDestination { address, port } => {
                (address, port, addresses + length, self.transport + 2)
            }
            PacketVerdict::SetSource { address, port } => (address, port, addresses, self.transport),
            other => return Err(format!("changed, but {other:?}")),
        };
        let mut expected = before.to_vec();
        expected[at..at + length].copy_from_slice(&address.octets()[16 - length..]);
        expected[port_at..port_at + 2].copy_from_slice(&port.to_be_bytes());
        let checksum = self.transport + if self.meta.protocol == Protocol::Udp { 6 } else { 16 };
        let mut fields = vec![checksum];
        fields.extend(is_v4.then_some(self.network + 10));
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
    vec![
        Service::new(1, &both),
        Service::new(2, &[Who::There(1)]),
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
        println!("{:<14}{:>12}{:>12}{:>12}", "", "untouched", "translated", "dropped");
        for kind in Kind::ALL {
            let of = |came| self.counts.get(&(kind, came)).copied().unwrap_or(0);
            let kind = format!("{kind:?}");
            println!(
                "{kind:<14}{:>12}{:>12}{:>12}",
                of(Came::Untouched),
                of(Came::Translated),
                of(Came::Dropped)
            );
        }
        for (reason, count) in &self.reasons {
            println!("{:<24}{count:>10}", reason.word());
        }
    }
}
