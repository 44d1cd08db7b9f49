//! What the packet hooks do: translate the destination where the client's packet comes in, and the source
//! back where the answer goes out to the client.

use crate::{
    Address, Choice, Client, ClientKind, Connection, Direction, Flow, FlowKey, FlowState, Options, Protocol,
    Reason, Resolution, Tables, choose, resolve,
};

/// How often a flow's last packet is noted: a store a second instead of one a packet.
const NOTE_EVERY: u64 = 1_000_000_000;

/// The tables of flows, beside the tables of Services.
pub trait FlowTables: Tables {
    /// A flow whose peer has answered.
    fn flow(&self, key: &FlowKey) -> Option<Flow>;
    /// A flow that is being opened or closed.
    fn transient(&self, key: &FlowKey) -> Option<Flow>;
    /// Adds or replaces an established flow.
    fn insert_flow(&self, key: &FlowKey, flow: &Flow);
    /// Adds or replaces a flow that is being opened or closed.
    fn insert_transient(&self, key: &FlowKey, flow: &Flow);
    /// Removes an established flow.
    fn remove_flow(&self, key: &FlowKey);
    /// Removes a flow that is being opened or closed.
    fn remove_transient(&self, key: &FlowKey);
    /// Notes, in place, when an established flow was last used and how far it has come.
    fn note(&self, key: &FlowKey, state: FlowState, last_seen: u64);
    /// Counts a new flow to a backend (`true`) or one that is left to the load balancer, for this frontend.
    fn count(&self, number: u32, forwarded: bool);
}

/// TCP's flags, as far as flows need them; none set for other protocols.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct TcpFlags {
    /// Octet 13 of the TCP header (RFC 9293, 3.1).
    pub bits: u8,
}

impl TcpFlags {
    const FIN: u8 = 1;
    const SYN: u8 = 1 << 1;
    const RST: u8 = 1 << 2;
    const ACK: u8 = 1 << 4;

    #[inline(always)]
    fn opens(self) -> bool {
        self.bits & (Self::SYN | Self::ACK | Self::RST | Self::FIN) == Self::SYN
    }

    #[inline(always)]
    fn has(self, bit: u8) -> bool {
        self.bits & bit != 0
    }
}

/// The headers of a packet, as far as the decision needs them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PacketMeta {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port, host order.
    pub source_port: u16,
    /// Destination port, host order.
    pub destination_port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// TCP's flags.
    pub tcp: TcpFlags,
}

/// What is done with a packet. It is reached before the first octet is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PacketVerdict {
    /// Goes on unchanged.
    Pass { reason: Reason },
    /// Is dropped.
    Drop { reason: Reason },
    /// Goes on to this destination.
    ToBackend { address: Address, port: u16 },
    /// Goes on as coming from this source.
    FromFrontend { address: Address, port: u16 },
}

/// A packet that comes in by an interface behind which `client` kinds live.
///
/// A flow keeps its backend while it lives. Only a TCP SYN, an SCTP INIT or a datagram opens one: other TCP
/// without a flow passes, so that taking over from another proxy cuts nothing.
#[inline(always)]
pub fn on_ingress<T: FlowTables>(tables: &T, packet: &PacketMeta, client: ClientKind) -> PacketVerdict {
    let key = packet.key(Direction::Request);
    if let Some(flow) = tables.flow(&key) {
        // A SYN on an established flow is a new connection from a port that the client uses again.
        if !packet.tcp.opens() || matches!(flow.state, FlowState::Opening) {
            advance(tables, packet, &key, &flow);
            return PacketVerdict::ToBackend { address: flow.address, port: flow.port };
        }
        tables.remove_flow(&key);
        tables.remove_flow(&flow.other_key(&key));
    } else if let Some(flow) = tables.transient(&key)
        && (!packet.tcp.opens() || matches!(flow.state, FlowState::Opening))
    {
        return PacketVerdict::ToBackend { address: flow.address, port: flow.port };
    }
    if matches!(packet.protocol, Protocol::Tcp) && !packet.tcp.opens() {
        return PacketVerdict::Pass { reason: Reason::NoFlow };
    }
    open(tables, packet, &key, client)
}

/// A packet that goes out by any interface: perhaps the answer of a backend to a client there, perhaps
/// something of this host that should have been translated before it got here.
#[inline(always)]
pub fn on_egress<T: FlowTables>(tables: &T, packet: &PacketMeta) -> PacketVerdict {
    let key = packet.key(Direction::Reply);
    if let Some(flow) = tables.flow(&key) {
        advance(tables, packet, &key, &flow);
        return PacketVerdict::FromFrontend { address: flow.address, port: flow.port };
    }
    if let Some(flow) = tables.transient(&key) {
        establish(tables, packet, &key, &flow);
        return PacketVerdict::FromFrontend { address: flow.address, port: flow.port };
    }
    if matches!(packet.protocol, Protocol::Tcp) && !packet.tcp.opens() {
        return PacketVerdict::Pass { reason: Reason::NoFlow };
    }
    // Pods' and strangers' packets were decided about where they came in: what is still addressed to a
    // service here was sent by this host.
    match resolve(tables, &packet.connection(ClientKind::Host)) {
        Resolution::Drop { reason, .. } => PacketVerdict::Drop { reason },
        Resolution::Reject { reason: Reason::UndefinedPort, .. } => {
            PacketVerdict::Drop { reason: Reason::Unserved }
        }
        Resolution::Balance(_) | Resolution::Reject { .. } if in_service_cidr(tables, &packet.destination) => {
            PacketVerdict::Drop { reason: Reason::Unserved }
        }
        Resolution::Balance(_) | Resolution::Reject { .. } => PacketVerdict::Pass { reason: Reason::Unserved },
        Resolution::Pass { reason, .. } => PacketVerdict::Pass { reason },
    }
}

impl PacketMeta {
    #[inline(always)]
    fn key(&self, direction: Direction) -> FlowKey {
        FlowKey {
            source: self.source,
            destination: self.destination,
            source_port: self.source_port,
            destination_port: self.destination_port,
            protocol: self.protocol,
            direction,
            _pad: 0,
        }
    }

    #[inline(always)]
    fn connection(&self, kind: ClientKind) -> Connection {
        Connection {
            client: Client { kind, address: self.source, netns_cookie: 0 },
            destination: self.destination,
            port: self.destination_port,
            protocol: self.protocol,
        }
    }

    /// Uniform over 32-bit numbers, the same for every packet of a 5-tuple: a SYN that is sent again and
    /// one-way UDP stay where they were without any state. Keyed, so that a client cannot aim.
    #[inline(always)]
    fn hash(&self, seed: [u32; 2]) -> u32 {
        let mut state = u64::from(seed[0]) | u64::from(seed[1]) << 32;
        let (source, destination) = (self.source.words(), self.destination.words());
        let ports = u32::from(self.source_port) | u32::from(self.destination_port) << 16;
        let words = [
            (source[0], source[1]),
            (source[2], source[3]),
            (destination[0], destination[1]),
            (destination[2], destination[3]),
            (ports, self.protocol as u32),
        ];
        let mut i = 0;
        while i < words.len() {
            state ^= u64::from(words[i].0) | u64::from(words[i].1) << 32;
            // The multiplier and shifts of MurmurHash3's 64-bit finalizer: every input bit reaches the top.
            state ^= state >> 33;
            state = state.wrapping_mul(0xff51_afd7_ed55_8ccd);
            state ^= state >> 29;
            i += 1;
        }
        state = state.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        (state >> 32) as u32
    }
}

#[inline(always)]
fn open<T: FlowTables>(tables: &T, packet: &PacketMeta, key: &FlowKey, kind: ClientKind) -> PacketVerdict {
    let kind = if matches!(kind, ClientKind::Outside) && in_cluster_cidr(tables, &packet.source) {
        ClientKind::Pod
    } else {
        kind
    };
    let connection = packet.connection(kind);
    let balance = match resolve(tables, &connection) {
        Resolution::Pass { reason, number } => {
            if let (Reason::PassThrough, Some(number), ClientKind::Outside) = (reason, number, kind) {
                tables.count(number, false);
            }
            return PacketVerdict::Pass { reason };
        }
        // Refusals of packets are not sent yet: the client sees silence instead.
        Resolution::Reject { reason, .. } | Resolution::Drop { reason, .. } => {
            return PacketVerdict::Drop { reason };
        }
        Resolution::Balance(balance) => balance,
    };
    let Some(config) = tables.config() else {
        return PacketVerdict::Pass { reason: Reason::NotAService };
    };
    let Some(Choice { backend, slot }) =
        choose(tables, &balance, &connection.client, packet.hash(config.hash_seed))
    else {
        return PacketVerdict::Drop { reason: Reason::TableError };
    };
    let masquerade = balance.side.has(Options::MASQUERADE)
        || balance.side.has(Options::MASQUERADE_REMOTE) && !backend.is_local();
    if masquerade {
        return PacketVerdict::Drop { reason: Reason::NeedsMasquerade };
    }
    let flow = Flow {
        address: backend.address(),
        port: backend.port(),
        state: FlowState::Opening,
        _pad: 0,
        number: balance.number,
        service: backend.service(),
        slot,
        last_seen: tables.now(),
    };
    tables.insert_transient(key, &flow);
    tables.insert_transient(&flow.other_key(key), &flow.other(key));
    tables.count(balance.number, true);
    PacketVerdict::ToBackend { address: flow.address, port: flow.port }
}

/// The backend has answered: both directions move to the table of established flows, where a flood of
/// openings cannot push them out. An answer that closes at once (RST) ends the flow instead.
#[inline(always)]
fn establish<T: FlowTables>(tables: &T, packet: &PacketMeta, key: &FlowKey, flow: &Flow) {
    if matches!(flow.state, FlowState::Finished | FlowState::Closed) || packet.tcp.has(TcpFlags::RST) {
        return;
    }
    let now = tables.now();
    let reply = Flow { state: FlowState::Established, last_seen: now, ..*flow };
    let request_key = flow.other_key(key);
    tables.insert_flow(key, &reply);
    tables.insert_flow(&request_key, &reply.other(key));
    tables.remove_transient(key);
    tables.remove_transient(&request_key);
}

/// Notes a packet of an established flow, and retires the flow when it ends. A flow that ends goes back to
/// the transient table, since its last acknowledgements are still to come.
#[inline(always)]
fn advance<T: FlowTables>(tables: &T, packet: &PacketMeta, key: &FlowKey, flow: &Flow) {
    if matches!(packet.protocol, Protocol::Tcp) {
        if packet.tcp.has(TcpFlags::RST) {
            return retire(tables, key, flow);
        }
        if packet.tcp.has(TcpFlags::FIN) {
            let other = tables.flow(&flow.other_key(key));
            if other.is_none_or(|other| matches!(other.state, FlowState::Finished)) {
                return retire(tables, key, flow);
            }
            tables.note(key, FlowState::Finished, tables.now());
            return;
        }
    }
    let now = tables.now();
    if now.saturating_sub(flow.last_seen) >= NOTE_EVERY {
        tables.note(key, flow.state, now);
    }
}

#[inline(always)]
fn retire<T: FlowTables>(tables: &T, key: &FlowKey, flow: &Flow) {
    let ending = Flow { state: FlowState::Closed, ..*flow };
    let other_key = flow.other_key(key);
    tables.insert_transient(key, &ending);
    tables.insert_transient(&other_key, &ending.other(key));
    tables.remove_flow(key);
    tables.remove_flow(&other_key);
}

#[inline(always)]
fn in_service_cidr<T: Tables>(tables: &T, address: &Address) -> bool {
    tables.config().is_some_and(|config| any_contains(&config.service_cidrs, address))
}

#[inline(always)]
fn in_cluster_cidr<T: Tables>(tables: &T, address: &Address) -> bool {
    tables.config().is_some_and(|config| any_contains(&config.cluster_cidrs, address))
}

#[inline(always)]
fn any_contains(cidrs: &[crate::Cidr], address: &Address) -> bool {
    for cidr in cidrs {
        if cidr.is_none() {
            return false;
        }
        if cidr.contains(address) {
            return true;
        }
    }
    false
}
