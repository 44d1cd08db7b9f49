//! What the packet hooks do. Ingress hooks write destinations, before routing; egress hooks write sources,
//! after it. In between the host sees ordinary packets between the client (or its mask) and the pod.
//!
//! [`on_ingress`] and [`on_egress`] decide about every packet, in parts that are programs of their own: what nearly all
//! packets meet first, and which changes no table but the time of a flow's last packet; then what is for packets of a
//! flow, or for those without.

mod egress;
mod fragment;
mod icmp;
mod ingress;
mod life;
mod mask;
mod node;

pub use egress::{known_egress, new_egress, on_egress, quick_egress};
pub use fragment::{FRAGMENT_TIMEOUT, FragmentKey, FragmentPorts, Piece, follow_fragment, on_other_protocol};
pub use icmp::{IcmpKind, IcmpMeta, IcmpVerdict, on_icmp};
pub use ingress::{answered_frontend, known_ingress, new_ingress, on_ingress, open_ingress, quick_ingress};
pub use node::node_egress;

use crate::{
    Action, Address, Balance, Cidr, Client, ClientKind, Connection, Conversation, Ends, Flow, FlowKey,
    FlowState, Hook, Protocol, Reason, Resolution, Role, Tables, decision::find,
};

/// How many established flows that one end has perhaps broken off wait on each CPU for what their ends do: sixty
/// kilobytes of entries, and more than a stranger gets past whose own connections must be accepted first.
pub const WAITING: u32 = 256;

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
    /// Runs `act` on a new flow, whose contents are not yet of any meaning; what it returns, 0 where there is no room
    /// for one.
    fn with_new(&self, act: impl FnOnce(&mut Conversation) -> u32) -> u32;
    /// Does something with one entry of a flow; whether it was done.
    fn act(&self, whole: &Conversation, role: Role, action: Action) -> bool;
    /// [`Action::Take`] of the entry by which a flow holds the port that it is masqueraded with, unless a socket of this host
    /// has that. Of a flow that [`with_transient`](Self::with_transient) or [`with_new`](Self::with_new) has handed out: many
    /// ports may have to be tried.
    fn take_return(&self, whole: &Conversation, rest: u64) -> bool {
        !self.has_socket(whole) && self.act(whole, whole.port_holder(), Action::Take { rest })
    }
    /// [`act`](Self::act) with each entry that a flow has; what it says of the request's.
    fn act_all(&self, whole: &Conversation, action: Action) -> bool;
    /// What stands, in either table, under the key of one entry of a flow.
    fn occupant(&self, whole: &Conversation, role: Role) -> Option<Hit>;
    /// One end of this established flow has perhaps broken it off: it stays where it is, where no flood of openings pushes
    /// it out, until [`WAITING`] others have followed it. Whether one has waited so long that is established still: then
    /// that is what `whole` tells.
    fn wait(&self, whole: &mut Conversation) -> bool;
    /// The address, of the family of `like`, that clients are masked with on the interface `device`.
    fn mask_address(&self, device: u32, like: &Address) -> Option<Address>;
    /// Who lives behind the interface `device`: pods of this node, or anyone else where nothing is known of it.
    fn clients_behind(&self, device: u32) -> ClientKind;
    /// Whether clients behind the interface `device` share a bridge with the backends of this node, which then answer
    /// them past the host (in the family of `like`).
    fn shares_bridge(&self, device: u32, like: &Address) -> bool;
    /// Whether a socket of this host would get the packets that the backend sends to the flow's mask.
    fn has_socket(&self, whole: &Conversation) -> bool;
    /// Whether clients were masqueraded towards this backend; others can pass for it.
    fn masquerades_towards(&self, address: &Address, port: u16) -> bool;
    /// Notes that clients are.
    fn note_masqueraded(&self, address: &Address, port: u16);
    /// What the first fragment of this datagram said, and when.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts>;
    /// Remembers what a first fragment says.
    fn remember_fragment(&self, key: &FragmentKey, ports: &FragmentPorts);
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
    /// See [`Flow::client_port`].
    pub client_port: u16,
    /// See [`Flow::state`].
    pub state: FlowState,
    /// See [`Flow::role`].
    pub role: Role,
    /// See [`Flow::ends`].
    pub ends: Ends,
}

impl From<&Flow> for Hit {
    #[inline(always)]
    fn from(flow: &Flow) -> Self {
        let Flow { address, last_seen, port, client_port, state, role, ends, .. } = *flow;
        Self { address, last_seen, port, client_port, state, role, ends }
    }
}

impl Hit {
    /// Whether it is of a flow of the node.
    #[inline(always)]
    fn is_nodes(&self) -> bool {
        matches!(self.role, Role::NodeRequest | Role::NodeReply)
    }

    /// Whether the client is who sends what has this entry.
    #[inline(always)]
    fn is_clients(&self) -> bool {
        matches!(self.role, Role::Request | Role::Forwarded)
    }

    /// The client's port, where it is to be written beside the address; else 0.
    #[inline(always)]
    fn written_client_port(&self) -> u16 {
        if matches!(self.role, Role::Request | Role::Reply) { self.client_port } else { 0 }
    }

    #[inline(always)]
    fn set_destination(&self) -> Decision {
        Decision::to(self.address, self.port, self.written_client_port())
    }

    #[inline(always)]
    fn set_source(&self) -> Decision {
        Decision { what: What::SetSource, ..self.set_destination() }
    }
}

/// TCP's flags, as far as flows need them; none set for UDP. SCTP's chunks are told by what they come to: INIT opens as
/// SYN does, INIT ACK accepts as SYN with ACK does, ABORT and SHUTDOWN COMPLETE end as RST does, all others are as ACK.
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

    /// What the type of an SCTP packet's first chunk comes to (RFC 9260, 3.2).
    #[inline(always)]
    pub const fn of_sctp_chunk(kind: u8) -> Self {
        let bits = match kind {
            // INIT.
            1 => Self::SYN,
            // INIT ACK.
            2 => Self::SYN | Self::ACK,
            // ABORT, SHUTDOWN COMPLETE.
            6 | 14 => Self::RST,
            _ => Self::ACK,
        };
        Self { bits }
    }

    #[inline(always)]
    fn opens(self) -> bool {
        self.bits & (Self::SYN | Self::ACK | Self::RST | Self::FIN) == Self::SYN
    }

    #[inline(always)]
    fn accepts(self) -> bool {
        self.bits & (Self::SYN | Self::ACK | Self::RST | Self::FIN) == Self::SYN | Self::ACK
    }

    #[inline(always)]
    fn has(self, bit: u8) -> bool {
        self.bits & bit != 0
    }

    /// Whether this is a packet in the middle of a connection, after which it stands as before.
    #[inline(always)]
    fn changes_nothing(self) -> bool {
        self.bits & (Self::SYN | Self::RST | Self::FIN) == 0
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
    /// How much of its datagram it is.
    pub piece: Piece,
    /// Whether it carries data. Only what is decided about packets of a flow that changes or is noted looks at it: before
    /// that nobody needs to have found out.
    pub has_payload: bool,
}

/// What is done with a packet. It is reached before the first octet is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PacketVerdict {
    /// Goes on unchanged.
    Pass { reason: Reason },
    /// Is dropped.
    Drop { reason: Reason },
    /// Is answered with a refusal: a TCP reset, or ICMP's port unreachable.
    Refuse { reason: Reason },
    /// Goes on to this destination; from this source port, unless it is 0.
    SetDestination { address: Address, port: u16, client_port: u16 },
    /// Goes on as coming from this source; to this destination port, unless it is 0.
    SetSource { address: Address, port: u16, client_port: u16 },
}

/// What the first part of the decision says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Quick {
    /// That is all.
    Verdict(PacketVerdict),
    /// The packet is one of a flow: the part for these decides.
    Known,
    /// The packet has no flow, or begins one anew: the part for these decides.
    New,
    /// The packet has no flow and is for no frontend, but may begin a flow of the node: the part for these decides.
    Node,
}

/// What is said about a packet without a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum New {
    /// That is all.
    Verdict(PacketVerdict),
    /// It opens a flow to one of these backends: the part for that decides.
    Open(Balance),
}

impl Quick {
    #[inline(always)]
    fn decided(decision: Decision) -> Self {
        Self::Verdict(decision.into())
    }

    /// What is said about a packet that may be something else than a whole TCP or UDP packet without options: whether and
    /// how that can be rewritten, the part for packets of a flow decides.
    #[inline(always)]
    pub fn of_any_form(self) -> Self {
        match self {
            Self::Verdict(PacketVerdict::SetDestination { .. } | PacketVerdict::SetSource { .. }) => {
                Self::Known
            }
            said => said,
        }
    }
}

/// A verdict while it is being found. All fields always have a value: where they would be undefined in some cases, as in
/// an enum's other variants, the compiler copies undefined registers, which verifiers refuse.
#[derive(Clone, Copy)]
struct Decision {
    what: What,
    reason: Reason,
    port: u16,
    client_port: u16,
    address: Address,
}

#[derive(Clone, Copy)]
enum What {
    Pass,
    Drop,
    Refuse,
    SetDestination,
    SetSource,
}

impl Decision {
    #[inline(always)]
    fn of(what: What, reason: Reason) -> Self {
        // Not all zeroes, which a function would write.
        Self { what, reason, port: 0, client_port: 0, address: Address::from_v4_word(0) }
    }

    #[inline(always)]
    fn pass(reason: Reason) -> Self {
        Self::of(What::Pass, reason)
    }

    #[inline(always)]
    fn drop(reason: Reason) -> Self {
        Self::of(What::Drop, reason)
    }

    #[inline(always)]
    fn refuse(reason: Reason) -> Self {
        Self::of(What::Refuse, reason)
    }

    #[inline(always)]
    fn to(address: Address, port: u16, client_port: u16) -> Self {
        Self { what: What::SetDestination, reason: Reason::Forwarded, port, client_port, address }
    }
}

impl Decision {
    /// What becomes of a packet about which this was decided, whatever its form. SCTP's checksum covers all of its datagram
    /// and none of its addresses: how another port changes it depends on a length that a fragment does not tell.
    #[inline(always)]
    fn about(self, packet: &PacketMeta) -> PacketVerdict {
        if packet.is_sctp_fragment() && self.changes_ports(packet) {
            return Self::drop(Reason::SctpFragment).into();
        }
        self.into()
    }

    #[inline(always)]
    fn changes_ports(&self, packet: &PacketMeta) -> bool {
        let (old, client) = match self.what {
            What::SetDestination => (packet.destination_port, packet.source_port),
            What::SetSource => (packet.source_port, packet.destination_port),
            What::Pass | What::Drop | What::Refuse => return false,
        };
        self.port != old || self.client_port != 0 && self.client_port != client
    }
}

impl From<Decision> for PacketVerdict {
    #[inline(always)]
    fn from(decision: Decision) -> Self {
        let Decision { what, reason, port, client_port, address } = decision;
        match what {
            What::Pass => Self::Pass { reason },
            What::Drop => Self::Drop { reason },
            What::Refuse => Self::Refuse { reason },
            What::SetDestination => Self::SetDestination { address, port, client_port },
            What::SetSource => Self::SetSource { address, port, client_port },
        }
    }
}

impl PacketMeta {
    /// Writes the key under which this packet's entry stands at `hook`.
    #[inline(always)]
    pub fn write_key(&self, hook: Hook, key: &mut FlowKey) {
        self.source.copy_to(&mut key.source);
        self.destination.copy_to(&mut key.destination);
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

    #[inline(always)]
    fn is_later_fragment(&self) -> bool {
        matches!(self.piece, Piece::Later)
    }

    #[inline(always)]
    fn is_sctp_fragment(&self) -> bool {
        matches!(self.protocol, Protocol::Sctp) && !matches!(self.piece, Piece::Whole)
    }

    /// Whether a packet without a flow can begin one. Of connections only what opens them, so that taking over from
    /// another proxy cuts nothing.
    #[inline(always)]
    fn may_open(&self) -> bool {
        matches!(self.protocol, Protocol::Udp) || self.tcp.opens()
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

/// A packet without a flow that no Service has anything to do with, as nearly all that have none.
#[inline(always)]
fn quick_stranger<T: Tables>(tables: &T, packet: &PacketMeta, client: ClientKind) -> Quick {
    match find(tables, &packet.connection(client)) {
        Err(Resolution::Pass { reason: Reason::NotAService, .. }) => {
            Quick::decided(Decision::pass(Reason::NotAService))
        }
        _ => Quick::New,
    }
}

#[inline(always)]
fn in_service_cidr<T: Tables>(tables: &T, address: &Address) -> bool {
    tables.config().is_some_and(|config| any_contains(&config.service_cidrs, address))
}

#[inline(always)]
fn any_contains(cidrs: &[Cidr], address: &Address) -> bool {
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

/// The entry of a flow for this packet at this hook, in whichever table.
#[inline(always)]
fn entry<T: FlowTables>(tables: &T, packet: &PacketMeta, hook: Hook) -> Option<Hit> {
    match tables.flow(packet, hook) {
        Some(flow) => Some(flow),
        None => tables.transient(packet, hook),
    }
}
