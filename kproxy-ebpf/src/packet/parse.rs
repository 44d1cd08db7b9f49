//! What a packet's headers say.

use aya_ebpf::programs::TcContext;
use kproxy_common::{Address, Balance, Hook, PacketMeta, Piece, Protocol, Reason, TcpFlags};

use super::access::{reach, read};
use crate::maps;

pub const IPV4_HEADER: u32 = 20;
pub const IPV6_HEADER: u32 = 40;
/// The longest headers that are read: IPv4 with all options, or IPv6, then TCP without options.
const LONGEST: u32 = 60 + 20;
/// The number of a VLAN in its tag.
const VLAN_ID: u32 = 0xfff;
/// What is read of a TCP header.
const TCP_FLAGS_END: u32 = 16;

/// A parsed packet: its headers, and where they lie. In a place of this processor, since its parts are programs of
/// their own.
pub struct Parsed {
    pub meta: PacketMeta,
    /// Where the IP header begins: behind an Ethernet header, or at 0.
    pub network: u32,
    /// Where the transport header begins.
    pub transport: u32,
    /// At which hook it was read.
    pub hook: Hook,
    /// Why it is refused, for the part that does so.
    pub reason: Reason,
    /// Among which backends it is balanced, for the part that opens flows.
    pub balance: Balance,
}

const _: () = assert!(size_of::<Parsed>() <= size_of::<[u64; 12]>(), "what the map `parsed` has room for");

/// Not a packet that is read here.
pub enum Unusual {
    /// Not our business, or not understood: left alone.
    Nobodys(Reason),
    /// Options, extension headers, fragments, SCTP and other protocols.
    Odd,
    /// ICMP or ICMPv6. Addresses and offsets are read.
    Icmp,
}

impl Parsed {
    /// What the part before this one has read.
    #[inline(always)]
    pub fn get() -> Option<&'static mut Self> {
        let place = maps::PARSED.get_ptr_mut(0)?.cast::<Self>();
        // SAFETY: the element is this CPU's, as long as the structure, and only one program runs on it at a time.
        Some(unsafe { &mut *place })
    }

    /// A packet of which nothing has been read yet.
    #[inline(always)]
    pub fn new(network: u32, hook: Hook) -> Option<&'static mut Self> {
        let parsed = Self::get()?;
        parsed.network = network;
        parsed.hook = hook;
        Some(parsed)
    }

    /// Whether an IPv6 header has an address that is IPv4's from here on. None may be on a wire.
    #[inline(always)]
    pub fn has_mapped_address(&self) -> bool {
        self.meta.source.is_v4() || self.meta.destination.is_v4()
    }

    /// Whether this is IPv4.
    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        self.meta.source.is_v4()
    }
}

/// Reads a packet of the usual form: IPv4 without options or IPv6 without extension headers, then TCP or UDP.
#[inline(always)]
pub fn quick(ctx: &TcContext, parsed: &mut Parsed) -> Result<(), Unusual> {
    let network = parsed.network;
    let protocol = match ip_version(ctx)? {
        Version::V4 => {
            reach(ctx, network + IPV4_HEADER, network + IPV4_HEADER + TCP_FLAGS_END)
                .map_err(Unusual::Nobodys)?;
            let header: [u32; 5] = read(ctx, network).ok_or(Unusual::Nobodys(Reason::Malformed))?;
            // Version 4, five words, no fragment.
            if u32::from_be(header[0]) >> 24 != 0x45 || u32::from_be(header[1]) & 0x3fff != 0 {
                return Err(Unusual::Odd);
            }
            parsed.meta.source = Address::from_v4_word(header[3]);
            parsed.meta.destination = Address::from_v4_word(header[4]);
            parsed.transport = network + IPV4_HEADER;
            (u32::from_be(header[2]) >> 16) as u8
        }
        Version::V6 => {
            reach(ctx, network + IPV6_HEADER, network + IPV6_HEADER + TCP_FLAGS_END)
                .map_err(Unusual::Nobodys)?;
            let header: [u32; 10] = read(ctx, network).ok_or(Unusual::Nobodys(Reason::Malformed))?;
            if u32::from_be(header[0]) >> 28 != 6 {
                return Err(Unusual::Nobodys(Reason::Malformed));
            }
            parsed.meta.source = Address::from_words([header[2], header[3], header[4], header[5]]);
            parsed.meta.destination = Address::from_words([header[6], header[7], header[8], header[9]]);
            if parsed.has_mapped_address() {
                return Err(Unusual::Nobodys(Reason::Malformed));
            }
            parsed.transport = network + IPV6_HEADER;
            (u32::from_be(header[1]) >> 8) as u8
        }
    };
    parsed.meta.piece = Piece::Whole;
    match protocol {
        6 | 17 => transport(ctx, parsed, protocol).map_err(Unusual::Nobodys),
        1 | 58 => Err(Unusual::Icmp),
        _ => Err(Unusual::Odd),
    }
}

/// Which IP a packet is.
#[derive(Clone, Copy)]
pub enum Version {
    V4,
    V6,
}

#[inline(always)]
pub fn ip_version(ctx: &TcContext) -> Result<Version, Unusual> {
    // SAFETY: the context is valid for the program's run.
    let (protocol, is_tagged, tag) =
        unsafe { ((*ctx.skb.skb).protocol, (*ctx.skb.skb).vlan_present, (*ctx.skb.skb).vlan_tci) };
    // A tag that was taken off: the VLAN's own device sees the packet next. With the number 0 it says a priority alone
    // (IEEE 802.1Q, 9.6), and the packet goes on as any other.
    if is_tagged != 0 && tag & VLAN_ID != 0 {
        return Err(Unusual::Nobodys(Reason::VlanTagged));
    }
    match u16::from_be(protocol as u16) {
        0x0800 => Ok(Version::V4),
        0x86dd => Ok(Version::V6),
        // Another tag behind that one, or one that nobody has taken off.
        0x8100 | 0x88a8 => Err(Unusual::Nobodys(Reason::VlanTagged)),
        _ => Err(Unusual::Nobodys(Reason::NotAService)),
    }
}

/// Makes the longest headers readable.
#[inline(always)]
pub fn reach_all(ctx: &TcContext, network: u32, header: u32) -> Result<(), Reason> {
    reach(ctx, network + header, network + LONGEST)
}

/// Reads ports, and what opens or ends a connection.
#[inline(always)]
pub fn transport(ctx: &TcContext, parsed: &mut Parsed, protocol: u8) -> Result<(), Reason> {
    let at = parsed.transport;
    let ports = match protocol {
        6 => {
            let header: [u32; 4] = read(ctx, at).ok_or(Reason::Malformed)?;
            parsed.meta.tcp = TcpFlags { bits: (u32::from_be(header[3]) >> 16) as u8 };
            parsed.meta.protocol = Protocol::Tcp;
            header[0]
        }
        17 => {
            let header: [u32; 2] = read(ctx, at).ok_or(Reason::Malformed)?;
            parsed.meta.tcp = TcpFlags::default();
            parsed.meta.protocol = Protocol::Udp;
            header[0]
        }
        _ => {
            // The common header, and the type of the first chunk (RFC 9260, 3).
            let header: [u32; 4] = read(ctx, at).ok_or(Reason::Malformed)?;
            parsed.meta.tcp = TcpFlags::of_sctp_chunk((u32::from_be(header[3]) >> 24) as u8);
            parsed.meta.protocol = Protocol::Sctp;
            header[0]
        }
    };
    let ports = u32::from_be(ports);
    parsed.meta.source_port = (ports >> 16) as u16;
    parsed.meta.destination_port = ports as u16;
    Ok(())
}

/// Whether a packet carries data: TCP's behind its header, as the IP header has it, since a frame may be padded; of SCTP, a
/// chunk of it first. Of UDP, and of what has no transport header, nobody asks. What cannot be read counts as data.
#[inline(always)]
pub fn has_payload(ctx: &TcContext, parsed: &Parsed) -> bool {
    let (network, at) = (parsed.network, parsed.transport);
    match parsed.meta.protocol {
        Protocol::Udp => true,
        _ if matches!(parsed.meta.piece, Piece::Later) => true,
        Protocol::Tcp => {
            let (Some(end), Some(header)) = (payload_end(ctx, parsed), read::<[u32; 4]>(ctx, at)) else {
                return true;
            };
            let header_length = (u32::from_be(header[3]) >> 28) * 4;
            end > (at - network) + header_length
        }
        Protocol::Sctp => {
            let Some(header) = read::<[u32; 4]>(ctx, at) else {
                return true;
            };
            // DATA (RFC 9260, 3.3.1) and I-DATA (RFC 8260, 2.1).
            matches!(u32::from_be(header[3]) >> 24, 0 | 64)
        }
    }
}

/// Where the packet ends, from the IP header's beginning; beyond everything if it is too long for its header to say.
#[inline(always)]
fn payload_end(ctx: &TcContext, parsed: &Parsed) -> Option<u32> {
    let length = if parsed.is_v4() {
        let header: [u16; 2] = read(ctx, parsed.network)?;
        u32::from(u16::from_be(header[1]))
    } else {
        let header: [u16; 3] = read(ctx, parsed.network)?;
        match u16::from_be(header[2]) {
            0 => 0,
            length => u32::from(length) + IPV6_HEADER,
        }
    };
    Some(if length == 0 { u32::MAX } else { length })
}
