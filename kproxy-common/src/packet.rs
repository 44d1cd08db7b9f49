//! What the packet hooks do. Ingress hooks write destinations, before routing; egress hooks write sources,
//! after it. In between the host sees ordinary packets between the client (or its mask) and the pod.

use crate::{
    Address, Backend, Choice, Client, ClientKind, Connection, Conversation, Flow, FlowKey, FlowState, Hook,
    Protocol, Reason, Resolution, Role, Tables, choose, client_of, is_masked, resolve,
};

/// How often a flow's last packet is noted: a store a second instead of one a packet.
const NOTE_EVERY: u64 = 1_000_000_000;

/// How many ports are tried for a mask before the packet is dropped. The next packet of the same flow begins
/// where its hash says again, but finds other ports taken and freed.
const MASK_TRIES: u32 = 16;

/// The tables of flows, beside the tables of Services.
pub trait FlowTables: Tables {
    /// The entry of a flow whose peer has answered, for this packet at this hook.
    fn flow(&self, packet: &PacketMeta, hook: Hook) -> Option<Hit>;
    /// The entry of a flow that is being opened or closed.
    fn transient(&self, packet: &PacketMeta, hook: Hook) -> Option<Hit>;
    /// Runs `act` on the whole of the flow that this packet belongs to, if its peer has answered.
    fn with_flow<R>(
        &self,
        packet: &PacketMeta,
        hook: Hook,
        act: impl FnOnce(&mut Conversation) -> R,
    ) -> Option<R>;
    /// Runs `act` on the whole of the flow that this packet belongs to, if it is being opened or closed.
    fn with_transient<R>(
        &self,
        packet: &PacketMeta,
        hook: Hook,
        act: impl FnOnce(&mut Conversation) -> R,
    ) -> Option<R>;
    /// Runs `act` on a new flow, whose contents are not yet of any meaning.
    fn with_new(&self, act: impl FnOnce(&mut Conversation));
    /// Adds or replaces one entry of an established flow.
    fn put_flow(&self, whole: &Conversation, role: Role);
    /// Adds or replaces one entry of a flow that is being opened or closed.
    fn put_transient(&self, whole: &Conversation, role: Role);
    /// Adds one entry of a flow that is being opened, if no flow has an entry under its key; whether it did. A flow that
    /// has ended keeps its entries for late packets only, not against another flow: else a mask's ports would be used
    /// up by connections that are long closed.
    fn put_new(&self, whole: &Conversation, role: Role) -> bool;
    /// Removes one entry of an established flow.
    fn remove_flow(&self, whole: &Conversation, role: Role);
    /// Removes one entry of a flow that is being opened or closed.
    fn remove_transient(&self, whole: &Conversation, role: Role);
    /// How far the other direction of an established flow has come: of this role's entry.
    fn state_of(&self, whole: &Conversation, role: Role) -> Option<FlowState>;
    /// Notes, in place, when an established flow was last used and how far it has come.
    fn note(&self, packet: &PacketMeta, hook: Hook, state: FlowState, last_seen: u64);
    /// The address, of the family of `like`, that clients are masked with on the interface `device`.
    fn mask_address(&self, device: u32, like: &Address) -> Option<Address>;
    /// Counts a new flow to a backend (`true`) or one that is left to the load balancer, for this frontend.
    fn count(&self, number: u32, forwarded: bool);
}

/// What an entry of a flow tells about a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hit {
    /// See [`Flow::address`].
    pub address: Address,
    /// See [`Flow::last_seen`].
    pub last_seen: u64,
    /// See [`Flow::port`].
    pub port: u16,
    /// See [`Flow::state`].
    pub state: FlowState,
    /// See [`Flow::role`].
    pub role: Role,
}

impl From<&Flow> for Hit {
    #[inline(always)]
    fn from(flow: &Flow) -> Self {
        let Flow { address, last_seen, port, state, role, .. } = *flow;
        Self { address, last_seen, port, state, role }
    }
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
    SetDestination { address: Address, port: u16 },
    /// Goes on as coming from this source.
    SetSource { address: Address, port: u16 },
}

/// A packet that comes in by an interface behind which clients of this kind live.
///
/// A flow keeps its backend while it lives. Only a TCP SYN or a datagram opens one: other TCP without a flow
/// passes, so that taking over from another proxy cuts nothing.
#[inline(always)]
pub fn on_ingress<T: FlowTables>(tables: &T, packet: &PacketMeta, client: ClientKind) -> PacketVerdict {
    if let Some(flow) = tables.flow(packet, Hook::Ingress) {
        // A SYN on an established flow is a new connection from a port that the client uses again.
        if !packet.tcp.opens() {
            advance(tables, packet, Hook::Ingress, &flow);
            return PacketVerdict::SetDestination { address: flow.address, port: flow.port };
        }
        retire(tables, packet, Hook::Ingress);
    } else if let Some(flow) = tables.transient(packet, Hook::Ingress)
        && (!packet.tcp.opens() || matches!(flow.state, FlowState::Opening))
    {
        return PacketVerdict::SetDestination { address: flow.address, port: flow.port };
    }
    if matches!(packet.protocol, Protocol::Tcp) && !packet.tcp.opens() {
        return PacketVerdict::Pass { reason: Reason::NoFlow };
    }
    open(tables, packet, client)
}

/// A packet that goes out by the interface `device`: perhaps a client's that is to be masked there, perhaps the
/// answer of a backend, perhaps something of this host that should have been translated before it got here.
#[inline(always)]
pub fn on_egress<T: FlowTables>(tables: &T, packet: &PacketMeta, device: u32) -> PacketVerdict {
    if let Some(flow) = tables.flow(packet, Hook::Egress) {
        advance(tables, packet, Hook::Egress, &flow);
        return PacketVerdict::SetSource { address: flow.address, port: flow.port };
    }
    if let Some(mut flow) = tables.transient(packet, Hook::Egress) {
        if matches!(flow.role, Role::Reply) {
            establish(tables, packet);
        } else if flow.port == 0 {
            let reason = mask(tables, packet, device, &mut flow);
            if !matches!(reason, Reason::Forwarded) {
                return PacketVerdict::Drop { reason };
            }
        }
        return PacketVerdict::SetSource { address: flow.address, port: flow.port };
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
        Resolution::Balance(_) | Resolution::Reject { .. }
            if in_service_cidr(tables, &packet.destination) =>
        {
            PacketVerdict::Drop { reason: Reason::Unserved }
        }
        Resolution::Balance(_) | Resolution::Reject { .. } => {
            PacketVerdict::Pass { reason: Reason::Unserved }
        }
        Resolution::Pass { reason, .. } => PacketVerdict::Pass { reason },
    }
}

impl PacketMeta {
    /// Writes the key under which this packet's entry stands at `hook`.
    #[inline(always)]
    pub fn write_key(&self, hook: Hook, key: &mut FlowKey) {
        key.source = self.source;
        key.destination = self.destination;
        key.source_port = self.source_port;
        key.destination_port = self.destination_port;
        key.protocol = self.protocol;
        key.hook = hook;
        key._pad = 0;
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
    #[inline(never)]
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
fn open<T: FlowTables>(tables: &T, packet: &PacketMeta, behind_device: ClientKind) -> PacketVerdict {
    let kind = client_of(tables, behind_device, &packet.source);
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
    let is_masked = is_masked(&balance.side, &backend, behind_device);
    begin(tables, packet, &backend, balance.number, slot, is_masked);
    PacketVerdict::SetDestination { address: backend.address(), port: backend.port() }
}

/// Enters a new flow. A function of its own, as are those below: its stack is then not needed at the same time as
/// its callers'. Their signatures hold no enums with data, which BTF has no form for.
#[inline(never)]
fn begin<T: FlowTables>(
    tables: &T,
    packet: &PacketMeta,
    backend: &Backend,
    number: u32,
    slot: u32,
    is_masked: bool,
) {
    tables.with_new(|flow| {
        flow.client = packet.source;
        flow.frontend = packet.destination;
        flow.backend = backend.address();
        flow.mask = packet.source;
        flow.client_port = packet.source_port;
        flow.frontend_port = packet.destination_port;
        flow.backend_port = backend.port();
        flow.mask_port = 0;
        flow.protocol = packet.protocol;
        flow.state = FlowState::Opening;
        flow.number = number;
        flow.service = backend.service();
        flow.slot = slot;
        flow.last_seen = tables.now();
        tables.put_transient(flow, Role::Request);
        // Where the packet leaves, and so with which address it is masked, routing decides: the port 0 asks for it.
        tables.put_transient(flow, if is_masked { Role::Forwarded } else { Role::Reply });
    });
    tables.count(number, true);
}

/// The first packet of a flow to be masked has come to the interface that it leaves by: gives it a port that no
/// other flow to the same backend has, and completes the flow's entries.
#[inline(never)]
fn mask<T: FlowTables>(tables: &T, packet: &PacketMeta, device: u32, masked: &mut Hit) -> Reason {
    let Some(config) = tables.config() else {
        return Reason::NoMaskAddress;
    };
    let Some(address) = tables.mask_address(device, &packet.source) else {
        return Reason::NoMaskAddress;
    };
    let (first, count) = (config.mask_ports_first, config.mask_ports_count);
    let start = packet.hash(config.hash_seed);
    let found = tables.with_transient(packet, Hook::Egress, |flow| {
        flow.mask = address;
        let mut tries = 0;
        while tries < MASK_TRIES {
            // An odd step, so that two flows that meet at one port part at the next.
            let offset = start.wrapping_add(tries.wrapping_mul(start.rotate_left(16) | 1));
            let port = first.wrapping_add(((u64::from(offset) * u64::from(count)) >> 32) as u32);
            flow.mask_port = port as u16;
            if tables.put_new(flow, Role::Return) {
                tables.put_transient(flow, Role::Request);
                tables.put_transient(flow, Role::Forwarded);
                tables.put_transient(flow, Role::Reply);
                masked.address = address;
                masked.port = flow.mask_port;
                return true;
            }
            tries += 1;
        }
        false
    });
    match found {
        Some(true) => Reason::Forwarded,
        Some(false) => Reason::MaskPortsExhausted,
        None => Reason::NoFlow,
    }
}

/// The backend has answered: the entries move to the table of established flows, where a flood of openings
/// cannot push them out. An answer that closes at once (RST) leaves them where they are.
#[inline(never)]
fn establish<T: FlowTables>(tables: &T, packet: &PacketMeta) {
    if packet.tcp.has(TcpFlags::RST) {
        return;
    }
    tables.with_transient(packet, Hook::Egress, |flow| {
        if matches!(flow.state, FlowState::Closed) {
            return;
        }
        flow.state = FlowState::Established;
        flow.last_seen = tables.now();
        let promote = |role| {
            tables.put_flow(flow, role);
            tables.remove_transient(flow, role);
        };
        promote(Role::Request);
        promote(Role::Reply);
        if flow.is_masked() {
            promote(Role::Forwarded);
            promote(Role::Return);
        }
    });
}

/// Notes a packet of an established flow, and retires the flow when it ends.
#[inline(always)]
fn advance<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook, flow: &Hit) {
    let leads = matches!(flow.role, Role::Request | Role::Reply);
    if leads && matches!(packet.protocol, Protocol::Tcp) {
        if packet.tcp.has(TcpFlags::RST) {
            return retire(tables, packet, hook);
        }
        if packet.tcp.has(TcpFlags::FIN) {
            return finish(tables, packet, hook);
        }
    }
    let now = tables.now();
    if now.saturating_sub(flow.last_seen) >= NOTE_EVERY {
        tables.note(packet, hook, flow.state, now);
    }
}

/// One direction has sent its FIN; with the other's the flow ends.
#[inline(never)]
fn finish<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook) {
    let other = if matches!(hook, Hook::Ingress) { Role::Reply } else { Role::Request };
    let other = tables.with_flow(packet, hook, |flow| tables.state_of(flow, other));
    match other {
        Some(Some(FlowState::Opening | FlowState::Established)) => {
            tables.note(packet, hook, FlowState::Finished, tables.now());
        }
        Some(Some(FlowState::Finished | FlowState::Closed) | None) => retire(tables, packet, hook),
        None => {}
    }
}

/// A flow that ends goes back to the transient table, since its last acknowledgements are still to come.
#[inline(never)]
fn retire<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook) {
    tables.with_flow(packet, hook, |flow| {
        flow.state = FlowState::Closed;
        let demote = |role| {
            tables.put_transient(flow, role);
            tables.remove_flow(flow, role);
        };
        demote(Role::Request);
        demote(Role::Reply);
        if flow.is_masked() {
            demote(Role::Forwarded);
            demote(Role::Return);
        }
    });
}

#[inline(always)]
fn in_service_cidr<T: Tables>(tables: &T, address: &Address) -> bool {
    tables.config().is_some_and(|config| any_contains(&config.service_cidrs, address))
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
