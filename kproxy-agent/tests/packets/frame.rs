//! Packets, built and read by a library that shares nothing with the programs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use etherparse::{
    EtherType, Ethernet2Header, IpHeaders, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, TcpHeader,
    UdpHeader,
};
use kproxy_common::{PacketMeta, Piece, Protocol, TcpFlags};

pub const FIN: u8 = 1;
pub const SYN: u8 = 1 << 1;
pub const RST: u8 = 1 << 2;
pub const PSH: u8 = 1 << 3;
pub const ACK: u8 = 1 << 4;

/// What packets begin with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Link {
    /// An Ethernet header.
    Ethernet,
    /// The IP header, as on a tunnel.
    Ip,
}

impl Link {
    pub const ALL: [Self; 2] = [Self::Ethernet, Self::Ip];

    pub fn header_length(self) -> usize {
        match self {
            Self::Ethernet => Ethernet2Header::LEN,
            Self::Ip => 0,
        }
    }
}

/// A packet with the headers that translation is about. What was read comes out the same, but for checksums, which
/// are always made anew.
#[derive(Clone, PartialEq, Debug)]
pub struct Frame {
    pub ethernet: Option<Ethernet2Header>,
    pub ip: IpHeaders,
    pub transport: Transport,
    pub payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Debug)]
pub enum Transport {
    Tcp(TcpHeader),
    /// `false`: the checksum is left out.
    Udp(UdpHeader, bool),
    Sctp(Sctp),
}

/// The common header and the type of the one chunk (RFC 9260, 3), which the library does not know.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sctp {
    source_port: u16,
    destination_port: u16,
    tag: u32,
    chunk: u8,
}

impl Sctp {
    const DATA: u8 = 0;
    const COMMON_HEADER: usize = 12;
    const LENGTH: usize = Self::COMMON_HEADER + 4;

    /// Of a chunk that has this type because that is what TCP's flags would come to.
    fn chunk(flags: u8) -> u8 {
        const INIT: u8 = 1;
        const INIT_ACK: u8 = 2;
        const ABORT: u8 = 6;
        const SHUTDOWN: u8 = 7;
        match flags {
            SYN => INIT,
            _ if flags & RST != 0 => ABORT,
            _ if flags & SYN != 0 => INIT_ACK,
            _ if flags & FIN != 0 => SHUTDOWN,
            _ => Self::DATA,
        }
    }

    fn bytes(&self, payload: &[u8]) -> Vec<u8> {
        let Self { source_port, destination_port, tag, chunk } = self;
        let mut packet = [source_port.to_be_bytes(), destination_port.to_be_bytes()].concat();
        packet.extend(tag.to_be_bytes());
        packet.extend([0; 4]);
        packet.extend([*chunk, 0]);
        packet.extend(((4 + payload.len()) as u16).to_be_bytes());
        packet.extend(payload);
        let crc = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI).checksum(&packet);
        packet[8..Self::COMMON_HEADER].copy_from_slice(&crc.to_le_bytes());
        packet.truncate(Self::LENGTH);
        packet
    }
}

impl Frame {
    pub fn tcp(link: Link, from: SocketAddr, to: SocketAddr, flags: u8) -> Self {
        let mut header = TcpHeader::new(from.port(), to.port(), 0x0102_0304, 64_240);
        set_flags(&mut header, flags);
        if flags & ACK != 0 {
            header.acknowledgment_number = 0x0a0b_0c0d;
        }
        Self::new(link, from.ip(), to.ip(), Transport::Tcp(header))
    }

    pub fn udp(link: Link, from: SocketAddr, to: SocketAddr) -> Self {
        let header =
            UdpHeader { source_port: from.port(), destination_port: to.port(), length: 0, checksum: 0 };
        Self::new(link, from.ip(), to.ip(), Transport::Udp(header, true)).with_payload(b"a datagram")
    }

    /// One chunk of what these flags would come to.
    fn sctp(link: Link, from: SocketAddr, to: SocketAddr, flags: u8) -> Self {
        let (source_port, destination_port) = (from.port(), to.port());
        let header = Sctp { source_port, destination_port, tag: 0x0102_0304, chunk: Sctp::chunk(flags) };
        Self::new(link, from.ip(), to.ip(), Transport::Sctp(header)).with_payload(b"sixteen octets..")
    }

    /// TCP or SCTP with these flags, or UDP, which has none.
    pub fn of(protocol: Protocol, link: Link, from: SocketAddr, to: SocketAddr, flags: u8) -> Self {
        match protocol {
            Protocol::Tcp => Self::tcp(link, from, to, flags),
            Protocol::Udp => Self::udp(link, from, to),
            Protocol::Sctp => Self::sctp(link, from, to, flags),
        }
    }

    fn new(link: Link, from: IpAddr, to: IpAddr, transport: Transport) -> Self {
        let number = match &transport {
            Transport::Tcp(_) => IpNumber::TCP,
            Transport::Udp(..) => IpNumber::UDP,
            Transport::Sctp(_) => IpNumber::SCTP,
        };
        let ip = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let header = Ipv4Header::new(0, 61, number, from.octets(), to.octets());
                let mut header = header.expect("no payload is not too long");
                header.identification = 0x1234;
                IpHeaders::Ipv4(header, Default::default())
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let header = Ipv6Header {
                    traffic_class: 0x28,
                    flow_label: Ipv6FlowLabel::try_new(0x5_4321).expect("twenty bits"),
                    payload_length: 0,
                    next_header: number,
                    hop_limit: 61,
                    source: from.octets(),
                    destination: to.octets(),
                };
                IpHeaders::Ipv6(header, Default::default())
            }
            _ => panic!("{from} and {to} are of two families"),
        };
        let ethernet = matches!(link, Link::Ethernet).then(|| Ethernet2Header {
            source: [2, 0, 0, 0, 0, 1],
            destination: [2, 0, 0, 0, 0, 2],
            ether_type: ether_type(matches!(ip, IpHeaders::Ipv4(..))),
        });
        Self { ethernet, ip, transport, payload: Vec::new() }
    }

    pub fn with_payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// The same packet, going somewhere else.
    pub fn with_destination(mut self, to: SocketAddr) -> Self {
        match (&mut self.ip, to.ip()) {
            (IpHeaders::Ipv4(header, _), IpAddr::V4(ip)) => header.destination = ip.octets(),
            (IpHeaders::Ipv6(header, _), IpAddr::V6(ip)) => header.destination = ip.octets(),
            (_, ip) => panic!("{ip} is of the other family"),
        }
        match &mut self.transport {
            Transport::Tcp(header) => header.destination_port = to.port(),
            Transport::Udp(header, _) => header.destination_port = to.port(),
            Transport::Sctp(header) => header.destination_port = to.port(),
        }
        self
    }

    /// The same packet, coming from somewhere else.
    pub fn with_source(mut self, from: SocketAddr) -> Self {
        match (&mut self.ip, from.ip()) {
            (IpHeaders::Ipv4(header, _), IpAddr::V4(ip)) => header.source = ip.octets(),
            (IpHeaders::Ipv6(header, _), IpAddr::V6(ip)) => header.source = ip.octets(),
            (_, ip) => panic!("{ip} is of the other family"),
        }
        match &mut self.transport {
            Transport::Tcp(header) => header.source_port = from.port(),
            Transport::Udp(header, _) => header.source_port = from.port(),
            Transport::Sctp(header) => header.source_port = from.port(),
        }
        self
    }

    /// Whether the transport header follows the IP header at once.
    pub fn has_no_extensions(&self) -> bool {
        match &self.ip {
            IpHeaders::Ipv4(_, extensions) => extensions.is_empty(),
            IpHeaders::Ipv6(_, extensions) => extensions.is_empty(),
        }
    }

    pub fn source(&self) -> SocketAddr {
        let ip = match &self.ip {
            IpHeaders::Ipv4(header, _) => IpAddr::from(Ipv4Addr::from(header.source)),
            IpHeaders::Ipv6(header, _) => IpAddr::from(Ipv6Addr::from(header.source)),
        };
        SocketAddr::new(ip, self.ports().0)
    }

    pub fn destination(&self) -> SocketAddr {
        let ip = match &self.ip {
            IpHeaders::Ipv4(header, _) => IpAddr::from(Ipv4Addr::from(header.destination)),
            IpHeaders::Ipv6(header, _) => IpAddr::from(Ipv6Addr::from(header.destination)),
        };
        SocketAddr::new(ip, self.ports().1)
    }

    fn ports(&self) -> (u16, u16) {
        match &self.transport {
            Transport::Tcp(header) => (header.source_port, header.destination_port),
            Transport::Udp(header, _) => (header.source_port, header.destination_port),
            Transport::Sctp(header) => (header.source_port, header.destination_port),
        }
    }

    pub fn protocol(&self) -> Protocol {
        match &self.transport {
            Transport::Tcp(_) => Protocol::Tcp,
            Transport::Udp(..) => Protocol::Udp,
            Transport::Sctp(_) => Protocol::Sctp,
        }
    }

    /// Its TCP header, if it has one.
    pub fn tcp_header(&self) -> Option<&TcpHeader> {
        match &self.transport {
            Transport::Tcp(header) => Some(header),
            Transport::Udp(..) | Transport::Sctp(_) => None,
        }
    }

    /// What the decision needs of it.
    pub fn meta(&self) -> PacketMeta {
        let (from, to) = (self.source(), self.destination());
        PacketMeta {
            source: from.ip().into(),
            destination: to.ip().into(),
            source_port: from.port(),
            destination_port: to.port(),
            protocol: self.protocol(),
            tcp: match &self.transport {
                Transport::Tcp(header) => TcpFlags { bits: flags(header) },
                Transport::Udp(..) => TcpFlags::default(),
                Transport::Sctp(header) => TcpFlags::of_sctp_chunk(header.chunk),
            },
            piece: Piece::Whole,
            has_payload: match &self.transport {
                Transport::Tcp(_) => !self.payload.is_empty(),
                Transport::Udp(..) => true,
                Transport::Sctp(header) => header.chunk == Sctp::DATA,
            },
        }
    }

    /// As on the wire, with right lengths and checksums.
    pub fn bytes(&self) -> Vec<u8> {
        let mut ip = self.ip.clone();
        let length = match &self.transport {
            Transport::Tcp(header) => header.header_len(),
            Transport::Udp(..) => UdpHeader::LEN,
            Transport::Sctp(_) => Sctp::LENGTH,
        };
        ip.set_payload_len(length + self.payload.len()).expect("a packet is at most 64 KiB");
        if let IpHeaders::Ipv4(header, _) = &mut ip {
            header.header_checksum = header.calc_header_checksum();
        }
        let transport = self.transport.bytes(&ip, &self.payload);
        let mut out = Vec::new();
        if let Some(ethernet) = &self.ethernet {
            out.extend(ethernet.to_bytes());
        }
        ip.write(&mut out).expect("memory can be written to");
        out.extend(transport);
        out.extend(&self.payload);
        out
    }

    /// Reads a packet that is sound in every way, checksums included. Why not, otherwise.
    pub fn read(link: Link, bytes: &[u8]) -> Result<Self, String> {
        let frame = Self::parse(link, bytes)?;
        let anew = frame.bytes();
        // What is behind the packet's end pads the frame.
        if !same(&anew, &bytes[..anew.len().min(bytes.len())], frame.checksums()) {
            return Err(format!("a checksum is wrong: {anew:02x?} expected, {bytes:02x?} found"));
        }
        Ok(frame)
    }

    /// Reads a packet whose headers are sound; checksums are not looked at.
    pub fn parse(link: Link, bytes: &[u8]) -> Result<Self, String> {
        let (ethernet, rest) = match link {
            Link::Ethernet => {
                let (header, rest) = Ethernet2Header::from_slice(bytes).map_err(|error| error.to_string())?;
                (Some(header), rest)
            }
            Link::Ip => (None, bytes),
        };
        let (ip, payload) = IpHeaders::from_slice(rest).map_err(|error| error.to_string())?;
        let is_v4 = matches!(ip, IpHeaders::Ipv4(..));
        if ethernet.as_ref().is_some_and(|header| header.ether_type != ether_type(is_v4)) {
            return Err("the Ethernet header says otherwise".to_owned());
        }
        if payload.fragmented {
            return Err("a fragment".to_owned());
        }
        let (transport, body) = match payload.ip_number {
            IpNumber::TCP => {
                let (header, body) =
                    TcpHeader::from_slice(payload.payload).map_err(|error| error.to_string())?;
                (Transport::Tcp(header), body)
            }
            IpNumber::UDP => {
                let (header, body) =
                    UdpHeader::from_slice(payload.payload).map_err(|error| error.to_string())?;
                if usize::from(header.length) != payload.payload.len() {
                    return Err("UDP's length is not the packet's".to_owned());
                }
                let has_checksum = header.checksum != 0;
                (Transport::Udp(header, has_checksum), body)
            }
            IpNumber::SCTP => {
                let all = payload.payload;
                let (head, body) = all.split_at_checked(Sctp::LENGTH).ok_or("SCTP is cut short")?;
                if usize::from(u16::from_be_bytes([head[14], head[15]])) != 4 + body.len() {
                    return Err("not one chunk".to_owned());
                }
                let header = Sctp {
                    source_port: u16::from_be_bytes([head[0], head[1]]),
                    destination_port: u16::from_be_bytes([head[2], head[3]]),
                    tag: u32::from_be_bytes([head[4], head[5], head[6], head[7]]),
                    chunk: head[12],
                };
                (Transport::Sctp(header), body)
            }
            other => return Err(format!("protocol {}", other.0)),
        };
        Ok(Self { ethernet, ip, transport, payload: body.to_vec() })
    }

    /// Where checksums lie of which both forms of zero in one's complement are right. Of UDP's only one is: 0 says that
    /// there is none.
    fn checksums(&self) -> [Option<usize>; 2] {
        let network = if self.ethernet.is_some() { Ethernet2Header::LEN } else { 0 };
        let transport = network + self.ip.header_len();
        let at = match &self.transport {
            Transport::Tcp(_) => Some(transport + 16),
            Transport::Udp(..) | Transport::Sctp(_) => None,
        };
        [matches!(self.ip, IpHeaders::Ipv4(..)).then_some(network + 10), at]
    }

    /// Whether these are this packet's bytes; where a checksum may have either zero, an incremental update gives one.
    pub fn is(&self, bytes: &[u8]) -> bool {
        same(&self.bytes(), bytes, self.checksums())
    }
}

impl Transport {
    fn bytes(&self, ip: &IpHeaders, payload: &[u8]) -> Vec<u8> {
        match self {
            Self::Tcp(header) => {
                let mut header = header.clone();
                header.checksum = match ip {
                    IpHeaders::Ipv4(ip, _) => header.calc_checksum_ipv4(ip, payload),
                    IpHeaders::Ipv6(ip, _) => header.calc_checksum_ipv6(ip, payload),
                }
                .expect("a packet is at most 64 KiB");
                header.to_bytes().to_vec()
            }
            Self::Sctp(header) => header.bytes(payload),
            Self::Udp(header, has_checksum) => {
                let mut header = header.clone();
                header.length = (UdpHeader::LEN + payload.len()) as u16;
                header.checksum = match (has_checksum, ip) {
                    (false, _) => 0,
                    (true, IpHeaders::Ipv4(ip, _)) => {
                        header.calc_checksum_ipv4(ip, payload).expect("a packet is at most 64 KiB")
                    }
                    (true, IpHeaders::Ipv6(ip, _)) => {
                        header.calc_checksum_ipv6(ip, payload).expect("a packet is at most 64 KiB")
                    }
                };
                header.to_bytes().to_vec()
            }
        }
    }
}

fn same(one: &[u8], other: &[u8], checksums: [Option<usize>; 2]) -> bool {
    if one == other {
        return true;
    }
    if one.len() != other.len() {
        return false;
    }
    let zero = |bytes: &[u8]| matches!(bytes, [0, 0] | [0xff, 0xff]);
    let (mut one, mut other) = (one.to_vec(), other.to_vec());
    for at in checksums.into_iter().flatten() {
        if zero(&one[at..at + 2]) && zero(&other[at..at + 2]) {
            one[at..at + 2].fill(0);
            other[at..at + 2].fill(0);
        }
    }
    one == other
}

fn ether_type(is_v4: bool) -> EtherType {
    if is_v4 { EtherType::IPV4 } else { EtherType::IPV6 }
}

fn set_flags(header: &mut TcpHeader, flags: u8) {
    header.fin = flags & FIN != 0;
    header.syn = flags & SYN != 0;
    header.rst = flags & RST != 0;
    header.psh = flags & PSH != 0;
    header.ack = flags & ACK != 0;
}

fn flags(header: &TcpHeader) -> u8 {
    header.to_bytes()[13]
}
