//! IP headers that are seldom: IPv4's options and IPv6's extension headers.

use etherparse::{
    IpFragOffset, IpHeaders, IpNumber, Ipv6Extensions, Ipv6FragmentHeader, Ipv6RawExtHeader,
    Ipv6RoutingExtensions,
};

use crate::frame::{Frame, Link};

/// How many there are of each family.
pub const COUNT: usize = 10;

/// The packet with the options or extension headers of this number.
pub fn headers(mut packet: Frame, number: usize) -> Frame {
    match &mut packet.ip {
        IpHeaders::Ipv4(header, _) => {
            // No-operation, many times, as a router might leave it.
            header.options = [1; 40][..(number + 1) * 4].try_into().expect("at most forty octets");
        }
        IpHeaders::Ipv6(header, extensions) => {
            *extensions = chain(number);
            header.next_header = extensions.set_next_headers(header.next_header);
        }
    }
    packet
}

/// The packet with options, or a hop-by-hop header, of whatever it is made.
pub fn any_with_header(link: Link, packet: &[u8]) -> Vec<u8> {
    let network = link.header_length();
    let (mut headers, payload) = IpHeaders::from_slice(&packet[network..]).expect("it is an IP packet");
    let (number, payload) = (payload.ip_number, payload.payload);
    match &mut headers {
        IpHeaders::Ipv4(header, _) => header.options = [1; 8][..].try_into().expect("at most forty octets"),
        IpHeaders::Ipv6(header, extensions) => {
            *extensions = chain(0);
            header.next_header = extensions.set_next_headers(number);
        }
    }
    headers.set_payload_len(payload.len()).expect("it is short");
    if let IpHeaders::Ipv4(header, _) = &mut headers {
        header.header_checksum = header.calc_header_checksum();
    }
    let mut out = packet[..network].to_vec();
    headers.write(&mut out).expect("memory can be written to");
    out.extend(payload);
    out
}

fn chain(number: usize) -> Ipv6Extensions {
    let raw = |length: usize| {
        Ipv6RawExtHeader::new_raw(IpNumber(0), &vec![0; length])
            .expect("it has a length that such headers have")
    };
    let options = |length| Some(raw(length));
    let routing =
        |length| Some(Ipv6RoutingExtensions { routing: raw(length), final_destination_options: None });
    // A whole datagram that a translator in between has put into a fragment of its own.
    let atomic = Some(Ipv6FragmentHeader::new(IpNumber(0), IpFragOffset::ZERO, false, 7));
    let none = Ipv6Extensions::default();
    match number {
        0 => Ipv6Extensions { hop_by_hop_options: options(6), ..none },
        1 => Ipv6Extensions { destination_options: options(22), ..none },
        2 => Ipv6Extensions { fragment: atomic, ..none },
        3 => Ipv6Extensions {
            hop_by_hop_options: options(14),
            destination_options: options(6),
            routing: routing(22),
            fragment: atomic,
            ..none
        },
        _ => Ipv6Extensions { destination_options: options(number * 8 - 2), ..none },
    }
}
