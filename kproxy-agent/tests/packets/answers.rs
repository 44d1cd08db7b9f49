//! Answers that programs make of packets: each is read by an independent library, checksums included.

use std::net::IpAddr;

use etherparse::{
    Icmpv4Slice, Icmpv4Type, Icmpv6Slice, Icmpv6Type, IpHeaders, IpNumber, TcpHeader, icmpv4, icmpv6,
};

use crate::frame::{Frame, Link};

/// Whether `answer` refuses `packet` as it should: it goes back to who sent that, is sound, and says what was refused.
pub fn check_refusal(link: Link, packet: &[u8], answer: &[u8]) -> Result<(), String> {
    let network = link.header_length();
    let (asked, asked_payload) = ip(&packet[network..])?;
    let is_plain = match &asked {
        IpHeaders::Ipv4(header, extensions) => header.options.is_empty() && extensions.is_empty(),
        IpHeaders::Ipv6(_, extensions) => extensions.is_empty(),
    };
    if link == Link::Ip && (asked_payload.0 != IpNumber::TCP || !is_plain) {
        // Test runs give every packet the offsets of one with an Ethernet header, where room for an answer's headers is
        // then made, or taken.
        return Ok(());
    }
    if link == Link::Ethernet && (answer[..6] != packet[6..12] || answer[6..12] != packet[..6]) {
        return Err("does not go back by its Ethernet header".to_owned());
    }
    let (ip_header, payload) = ip(&answer[network..])?;
    if addresses(&ip_header) != swap(addresses(&asked)) {
        return Err(format!("goes from and to {:?}", addresses(&ip_header)));
    }
    if let IpHeaders::Ipv4(header, _) = &ip_header
        && header.header_checksum != header.calc_header_checksum()
    {
        return Err("the IPv4 checksum is wrong".to_owned());
    }
    match payload.0 {
        IpNumber::TCP => check_reset(link, asked_payload.1, answer),
        IpNumber::ICMP | IpNumber::IPV6_ICMP => {
            check_unreachable(&ip_header, payload.1, &packet[network..], asked_payload.1.len())
        }
        other => Err(format!("is of protocol {}", other.0)),
    }
}

/// RFC 9293, 3.10.7.1.
fn check_reset(link: Link, asked: &[u8], answer: &[u8]) -> Result<(), String> {
    let (header, data) = TcpHeader::from_slice(asked).map_err(|error| error.to_string())?;
    let frame = Frame::read(link, answer)?;
    let reset = frame.tcp_header().ok_or("is not TCP")?;
    let acknowledges = header.sequence_number.wrapping_add(u32::from(header.syn) + data.len() as u32);
    let ports = (reset.source_port, reset.destination_port) == (header.destination_port, header.source_port);
    let flags = reset.rst && reset.ack && !reset.syn && !reset.fin;
    if !frame.has_no_extensions() {
        return Err("has options that nobody asked for".to_owned());
    }
    if !ports || !flags || reset.sequence_number != 0 || reset.acknowledgment_number != acknowledges {
        return Err(format!("is not the reset of {header:?}: {reset:?}"));
    }
    Ok(())
}

fn check_unreachable(ip: &IpHeaders, message: &[u8], packet: &[u8], asked: usize) -> Result<(), String> {
    let quoted = match ip {
        IpHeaders::Ipv4(..) => {
            let icmp = Icmpv4Slice::from_slice(message).map_err(|error| error.to_string())?;
            let unreachable = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port);
            if icmp.icmp_type() != unreachable
                || etherparse::Icmpv4Header::with_checksum(unreachable, icmp.payload()).checksum
                    != icmp.checksum()
            {
                return Err(format!("is {:?}, or its checksum is wrong", icmp.icmp_type()));
            }
            icmp.payload()
        }
        IpHeaders::Ipv6(header, _) => {
            let icmp = Icmpv6Slice::from_slice(message).map_err(|error| error.to_string())?;
            let unreachable = Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port);
            if icmp.icmp_type() != unreachable || !icmp.is_checksum_valid(header.source, header.destination) {
                return Err(format!("is {:?}, or its checksum is wrong", icmp.icmp_type()));
            }
            icmp.payload()
        }
    };
    let headers = packet.len() - asked;
    if quoted.len() < headers + 8 || !packet.starts_with(quoted) {
        return Err(format!("quotes {quoted:02x?}"));
    }
    Ok(())
}

type Payload<'a> = (IpNumber, &'a [u8]);

fn ip(bytes: &[u8]) -> Result<(IpHeaders, Payload<'_>), String> {
    let (headers, payload) = IpHeaders::from_slice(bytes).map_err(|error| error.to_string())?;
    Ok((headers, (payload.ip_number, payload.payload)))
}

fn addresses(headers: &IpHeaders) -> (IpAddr, IpAddr) {
    match headers {
        IpHeaders::Ipv4(header, _) => (header.source.into(), header.destination.into()),
        IpHeaders::Ipv6(header, _) => (header.source.into(), header.destination.into()),
    }
}

fn swap<T>((one, other): (T, T)) -> (T, T) {
    (other, one)
}
