//! Addresses, ports and protocols from text and numbers that others wrote.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr};

use kproxy_common::{Address, Cidr, Protocol};

use super::Report;
use crate::api::{Field, Text};
use crate::model::problem::ProblemKind;

/// How much of a value from outside a message repeats.
const QUOTED_LENGTH: usize = 64;

/// An IP address as Kubernetes reads it: IPv4 octets may have leading zeros and are decimal all the same
/// (`ParseIPSloppy`; stored objects may contain such).
pub fn ip(text: &str) -> Option<Address> {
    let ip = text.parse().ok().or_else(|| ipv4_with_leading_zeros(text).map(IpAddr::V4))?;
    Some(Address::from(ip))
}

/// A CIDR as Kubernetes reads it, with its host bits cleared.
pub fn cidr(text: &str) -> Option<Cidr> {
    let (address, length) = text.split_once('/')?;
    // The length is digits only: u32's own parser would take a sign, too.
    if length.is_empty() || !length.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let length: u32 = length.parse().ok()?;
    // By the text, not the value: in `::ffff:10.0.0.0/104` the 96 bits are already counted.
    let (bits, before) = if address.contains(':') { (128, 0) } else { (32, 96) };
    if length > bits {
        return None;
    }
    Some(without_host_bits(ip(address)?, before + length))
}

/// The address in `text`, if it can be a frontend or an endpoint.
pub(super) fn address(report: &mut Report, field: impl Display, text: &str) -> Option<Address> {
    let Some(address) = ip(text) else {
        let message = format!("{} is no IP address; it is skipped", quoted(text));
        report.add(ProblemKind::Address, field.to_string(), message);
        return None;
    };
    if let Some(what) = unusable(&address) {
        let message = format!("{address} is {what}, which cannot be served; it is skipped");
        report.add(ProblemKind::Address, field.to_string(), message);
        return None;
    }
    Some(address)
}

/// A port, 1 to 65535.
pub(super) fn port(report: &mut Report, field: impl Display, number: i64) -> Option<u16> {
    match u16::try_from(number) {
        Ok(port @ 1..) => Some(port),
        _ => {
            let message = format!("{number} is no port (1 to 65535); it is skipped");
            report.add(ProblemKind::Port, field.to_string(), message);
            None
        }
    }
}

/// A name that decides what belongs together: none (`Some(None)`), or text. `None` where it is something else,
/// which costs the port that it is of.
pub(super) fn text_or_skip<'a>(
    report: &mut Report,
    field: impl Display,
    written: &'a Field<Text>,
) -> Option<Option<&'a str>> {
    match written {
        Field::Absent => Some(None),
        written => report.read_or(field, written, "the port is skipped").map(|text| Some(&**text)),
    }
}

/// A protocol; TCP where none is written.
pub(super) fn protocol(report: &mut Report, field: impl Display, written: &Field<Text>) -> Option<Protocol> {
    match text_or_skip(report, &field, written)? {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(other) => {
            let message = format!("{} is none of TCP, UDP and SCTP; the port is skipped", quoted(other));
            report.add(ProblemKind::Protocol, field.to_string(), message);
            None
        }
    }
}

/// `text` in quotation marks, control characters escaped, cut where it is long.
pub(super) fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED_LENGTH) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

fn ipv4_with_leading_zeros(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let digits = part.trim_start_matches('0');
        *octet = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets))
}

/// Addresses that mean no single host that a Service could be at.
fn unusable(address: &Address) -> Option<&'static str> {
    let ip = IpAddr::from(*address);
    if ip.is_unspecified() {
        return Some("the unspecified address");
    }
    if ip.is_loopback() {
        return Some("a loopback address");
    }
    if ip.is_multicast() {
        return Some("a multicast address");
    }
    matches!(ip, IpAddr::V4(Ipv4Addr::BROADCAST)).then_some("the broadcast address")
}

fn without_host_bits(address: Address, length: u32) -> Cidr {
    let bits = u128::from_be_bytes(address.octets());
    let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
    Cidr::new(Address::new((bits & mask).to_be_bytes()), length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_kubernetes_reads_them() {
        for (text, expected) in [
            ("10.0.0.1", Some("10.0.0.1")),
            ("010.000.0.08", Some("10.0.0.8")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("2001:DB8::1", Some("2001:db8::1")),
            ("10.0.0.256", None),
            ("10.0.0", None),
            ("10.0.0.1.2", None),
            ("10.0.0.+1", None),
            (" 10.0.0.1", None),
            ("10.0..1", None),
            ("fe80::1%eth0", None),
            ("", None),
            ("１０.0.0.1", None),
        ] {
            assert_eq!(ip(text).map(|address| address.to_string()).as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn cidrs_lose_their_host_bits() {
        for (text, expected) in [
            ("10.1.2.3/8", Some(("10.0.0.0", 104))),
            ("0.0.0.0/0", Some(("0.0.0.0", 96))),
            ("::/0", Some(("::", 0))),
            ("2001:db8::1/128", Some(("2001:db8::1", 128))),
            ("::ffff:10.1.0.0/104", Some(("10.0.0.0", 104))),
            ("10.0.0.0/33", None),
            ("10.0.0.0/+8", None),
            ("10.0.0.0/", None),
            ("10.0.0.0", None),
            ("::/129", None),
            ("10.0.0.0/99999999999", None),
        ] {
            let read = cidr(text).map(|cidr| (cidr.address().to_string(), cidr.prefix_length()));
            assert_eq!(read, expected.map(|(ip, length)| (ip.to_owned(), length)), "{text:?}");
        }
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        assert_eq!(quoted("a\nb"), "\"a\\nb\"");
        assert_eq!(quoted(&"ü".repeat(65)), format!("\"{}\"…", "ü".repeat(64)));
    }
}
