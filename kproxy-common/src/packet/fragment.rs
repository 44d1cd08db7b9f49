//! Fragments, which have ports in the first of them only, and packets that have none at all.

use super::{FlowTables, PacketMeta, PacketVerdict, in_service_cidr};
use crate::{Address, AddressKind, Hook, Reason, Tables, elapsed};

/// How long a first fragment speaks for later ones, in nanoseconds: as long as Linux waits for the rest of a datagram
/// (`ipfrag_time`).
pub const FRAGMENT_TIMEOUT: u64 = 30_000_000_000;

/// How much of a datagram a packet is.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Piece {
    /// All of it.
    Whole = 0,
    /// Its first fragment, which has the ports.
    First = 1,
    /// A fragment that has no ports itself: they are those of the first.
    Later = 2,
}

/// Key of `fragment`: a datagram, at the hook where its fragments arrive.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FragmentKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// The identification that all fragments carry, 16 bits in IPv4, 32 in IPv6; in network order, as it stands there.
    pub id: u32,
    /// Transport protocol, its IANA number.
    pub protocol: u8,
    /// Where they are seen.
    pub hook: Hook,
    /// Zero.
    pub _pad: u16,
}

/// Value of `fragment`: what only the first fragment says.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FragmentPorts {
    /// When it came, in nanoseconds since boot.
    pub seen: u64,
    /// Source port, host order.
    pub source_port: u16,
    /// Destination port, host order.
    pub destination_port: u16,
    /// Zero.
    pub _pad: u32,
}

const _: () = {
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<FragmentPorts>() == 16);
};

/// A fragment with this identification. A first one is remembered, a later one gets its ports. `Some`: it came before
/// its first (or that was lost), and nothing more can be said about it.
#[inline(always)]
pub fn follow_fragment<T: FlowTables>(
    tables: &T,
    packet: &mut PacketMeta,
    hook: Hook,
    id: u32,
) -> Option<PacketVerdict> {
    let key = FragmentKey {
        source: packet.source,
        destination: packet.destination,
        id,
        protocol: packet.protocol as u8,
        hook,
        _pad: 0,
    };
    let now = tables.now();
    if !packet.is_later_fragment() {
        let (source_port, destination_port) = (packet.source_port, packet.destination_port);
        tables.remember_fragment(&key, &FragmentPorts { seen: now, source_port, destination_port, _pad: 0 });
        return None;
    }
    if let Some(first) = tables.fragment(&key)
        && elapsed(now, first.seen) <= FRAGMENT_TIMEOUT
    {
        packet.source_port = first.source_port;
        packet.destination_port = first.destination_port;
        return None;
    }
    match on_other_protocol(tables, &packet.destination) {
        // The hook cannot hold it until its first comes.
        PacketVerdict::Drop { .. } => Some(PacketVerdict::Drop { reason: Reason::EarlyFragment }),
        _ => Some(PacketVerdict::Pass { reason: Reason::Unparsed }),
    }
}

/// A packet of a protocol that Services do not have. To a ClusterIP, or an address that could be one, it has no
/// business, and must not leave the node; all else is left alone.
#[inline(always)]
pub fn on_other_protocol<T: Tables>(tables: &T, destination: &Address) -> PacketVerdict {
    match tables.address(destination) {
        Some(AddressKind::ClusterIp) => PacketVerdict::Drop { reason: Reason::UndefinedPort },
        Some(AddressKind::OtherProxy | AddressKind::Local) => {
            PacketVerdict::Pass { reason: Reason::NotAService }
        }
        Some(AddressKind::NodePort) | None => {
            if in_service_cidr(tables, destination) {
                return PacketVerdict::Drop { reason: Reason::UnallocatedAddress };
            }
            PacketVerdict::Pass { reason: Reason::NotAService }
        }
    }
}
