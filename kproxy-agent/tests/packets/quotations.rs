//! ICMP messages and what they quote, read as it lies, whatever its lengths say.

use std::net::IpAddr;

use kproxy_common::{Address, IcmpKind, IcmpMeta, PacketMeta, Piece, Protocol, TcpFlags};

/// Beyond this programs read nothing.
const FURTHEST: usize = 0x300;

/// What was read of a message.
pub enum Heard {
    Message(IcmpMeta),
    /// It ends before it begins.
    Short,
    /// What it quotes lies further than programs look.
    Far,
}

/// The message that begins at `at`, from and to these addresses.
pub fn read(bytes: &[u8], at: usize, [source, destination]: [Address; 2]) -> Heard {
    let Some(head) = bytes.get(at..at + 8) else {
        return Heard::Short;
    };
    let is_v4 = source.is_v4();
    let kind = match (is_v4, head[0]) {
        (true, 3 | 4 | 11 | 12) | (false, 1..=4) => IcmpKind::Error,
        (true, 5) | (false, 137) => IcmpKind::Redirect,
        (true, 8) | (false, 128) => IcmpKind::Echo,
        _ => IcmpKind::Other,
    };
    let nobody = PacketMeta {
        source,
        destination,
        source_port: 0,
        destination_port: 0,
        protocol: Protocol::Udp,
        tcp: TcpFlags::default(),
        piece: Piece::Whole,
        has_payload: false,
    };
    let mut message = IcmpMeta { source, destination, kind, quoted: nobody, quotes: false };
    let quoted_at = match kind {
        IcmpKind::Echo | IcmpKind::Other => None,
        IcmpKind::Redirect if !is_v4 => redirected(bytes, at + 40),
        IcmpKind::Error | IcmpKind::Redirect => Some(at + 8),
    };
    if let Some(quoted_at) = quoted_at {
        if quoted_at > FURTHEST {
            return Heard::Far;
        }
        if let Some(quoted) = quoted(bytes, quoted_at, is_v4) {
            (message.quoted, message.quotes) = (quoted, true);
        }
    }
    Heard::Message(message)
}

/// Where a redirect's options have the packet, in one of the first three.
fn redirected(bytes: &[u8], mut at: usize) -> Option<usize> {
    for _ in 0..3 {
        let option = bytes.get(at..at + 2)?;
        if option[0] == 4 {
            return Some(at + 8);
        }
        at += usize::from(option[1] & 0xf) * 8;
    }
    None
}

/// A packet that can be of a flow: with ports.
fn quoted(bytes: &[u8], at: usize, is_v4: bool) -> Option<PacketMeta> {
    let (source, destination, number, transport) = if is_v4 {
        let header = bytes.get(at..at + 20)?;
        let length = usize::from(header[0] & 0xf) * 4;
        let offset = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
        if header[0] >> 4 != 4 || length < 20 || offset != 0 {
            return None;
        }
        let address = |at: usize| {
            let octets: [u8; 4] = header[at..at + 4].try_into().expect("four octets");
            Address::from(IpAddr::from(octets))
        };
        (address(12), address(16), header[9], at + length)
    } else {
        let header = bytes.get(at..at + 40)?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let address = |at: usize| Address::new(header[at..at + 16].try_into().expect("sixteen octets"));
        let (mut number, mut transport) = (header[6], at + 40);
        for _ in 0..4 {
            if ![0, 43, 44, 60].contains(&number) {
                break;
            }
            let head = bytes.get(transport..transport + 4)?;
            if number == 44 && u16::from_be_bytes([head[2], head[3]]) & 0xfff8 != 0 {
                return None;
            }
            transport += if number == 44 { 8 } else { (usize::from(head[1]) + 1) * 8 };
            number = head[0];
            if transport > FURTHEST {
                return None;
            }
        }
        (address(8), address(24), number, transport)
    };
    let protocol = match number {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        132 => Protocol::Sctp,
        _ => return None,
    };
    let ports = bytes.get(transport..transport + 4)?;
    let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
    let tcp = TcpFlags::default();
    let (source_port, destination_port) = (port(0), port(2));
    Some(PacketMeta {
        source,
        destination,
        source_port,
        destination_port,
        protocol,
        tcp,
        piece: Piece::Whole,
        has_payload: false,
    })
}
