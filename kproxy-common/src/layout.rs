//! How the tables lie in BPF maps: keys, values, and what each map is for.
//!
//! Ports are in host order (a dump then shows 80, not 20480), addresses are in network order, structures
//! have no implicit padding. Whatever changes the meaning of a byte raises [`LAYOUT_VERSION`].

use crate::{Address, Cidr, ClientKind};

/// The version of everything in this module; stored in the `owner` map and compared before maps are adopted.
pub const LAYOUT_VERSION: u32 = 5;

/// The names of the maps, which are the names of their pins below the bpffs folder.
pub mod map_names {
    /// Hash, [`FrontendKey`](super::FrontendKey) to number (u32). Written by the agent, by inserting and
    /// deleting only: an element that is replaced can be reused under a reader. A miss: no Service listens
    /// there.
    pub const FRONTEND: &str = "frontend";
    /// Memory-mapped array, number to [`ServiceEntry`](super::ServiceEntry): what the frontend with this
    /// number does now. Written by the agent, each 64-bit word in one store.
    pub const SERVICE: &str = "service";
    /// Memory-mapped array, number to [`ServiceInfo`](super::ServiceInfo): whose frontend it is, for people
    /// and for an agent that restarts. Written by the agent, not read by programs.
    pub const SERVICE_INFO: &str = "service_info";
    /// Memory-mapped array, slot to [`Backend`](super::Backend). Written by the agent, only where no
    /// [`ServiceEntry`](super::ServiceEntry) points.
    pub const BACKEND: &str = "backend";
    /// Memory-mapped array, [`Backend::id`](super::Backend::id) to [`BackendSlots`](super::BackendSlots): where a backend
    /// stands now. Written by the agent, each element in one store, before any
    /// [`ServiceEntry`](super::ServiceEntry) points at the slot. What stands in the slot must be compared.
    pub const BACKEND_SLOT: &str = "backend_slot";
    /// Hash, address to [`AddressEntry`](super::AddressEntry): what an address is, on whichever port.
    /// Written by the agent, inserting and deleting only. A miss: nothing is known of it.
    pub const ADDRESS: &str = "address";
    /// Longest-prefix trie, [`SourceRangeKey`](super::SourceRangeKey) to u32 (unused). Written by the agent.
    /// A miss: the client may not use this frontend.
    pub const SOURCE_RANGE: &str = "source_range";
    /// LRU hash, [`AffinityKey`](super::AffinityKey) to [`AffinityValue`](super::AffinityValue). Written by
    /// the programs. A miss: the next connection is balanced anew.
    pub const AFFINITY: &str = "affinity";
    /// LRU hash, [`FlowKey`](crate::FlowKey) to [`Flow`](crate::Flow): packet flows whose peer has answered.
    /// Written by the programs.
    pub const FLOW: &str = "flow";
    /// LRU hash like `flow`: flows that are being opened or closed, so that a flood of them cannot push out
    /// established ones. Written by the programs.
    pub const FLOW_TRANSIENT: &str = "flow_transient";
    /// Hash, [`FlowKey`](crate::FlowKey) to u32 (unused): which flows' keys a processor is about to take from a flow that has
    /// ended. Written by the programs, for less than a microsecond each.
    pub const CLAIM: &str = "claim";
    /// Socket storage, [`SocketRecords`](crate::SocketRecords): which service addresses this socket spoke to.
    /// Written by the programs; dies with the socket.
    pub const SOCKET: &str = "socket";
    /// Program array: the parts of the packet programs, as [`PACKET_PARTS`](super::PACKET_PARTS) orders them. Each load
    /// of the programs has its own. A miss: the packet is left alone.
    pub const PROGRAMS: &str = "programs";
    /// LRU hash, [`FragmentKey`](crate::FragmentKey) to [`FragmentPorts`](crate::FragmentPorts): datagrams in
    /// fragments, by their first. Written by the programs. A miss: a later fragment has come before it.
    pub const FRAGMENT: &str = "fragment";
    /// LRU hash for sockets that speak to more services than their storage holds. Written by the programs.
    pub const SOCKET_OVERFLOW: &str = "socket_overflow";
    /// Array, number to [`Counters`](super::Counters). Counted by the programs, reset by the agent when the
    /// number is given out.
    pub const COUNTER: &str = "counter";
    /// Per-CPU array, [`Reason`](crate::Reason) to u64: verdicts by their reason. Counted by the programs.
    pub const REASON: &str = "reason";
    /// Ring buffer of [`DropEvent`](crate::DropEvent): drops and refusals as they happen. Written by the programs while
    /// somebody listens; every listener reads at a place of its own, and sees what was overwritten meanwhile by the
    /// gap in its sequence.
    pub const DROP_EVENT: &str = "drop_event";
    /// Memory-mapped array with one element, [`DropListener`](crate::DropListener). Written by `kproxy drops`.
    pub const DROP_LISTENER: &str = "drop_listener";
    /// Per-CPU array, [`DropPath`](crate::DropPath) to [`DropBudget`](crate::DropBudget). Written by the programs.
    pub const DROP_BUDGET: &str = "drop_budget";
    /// Memory-mapped array with one element, [`Config`](super::Config). Written by the agent.
    pub const CONFIG: &str = "config";
    /// Hash, [`DeviceKey`](super::DeviceKey) to [`DeviceAddresses`](super::DeviceAddresses). Written by the agent,
    /// inserting and deleting only: what changes is inserted under the other copy before it is deleted. A miss under
    /// both: clients behind it are outside, and not masked there: their packets are dropped.
    pub const DEVICE: &str = "device";
    /// Array, [`masqueraded_index`](super::masqueraded_index) to u64: 1 where a flow that is masqueraded has led to such a
    /// backend. Written by the programs. A 0: no port towards it can be held by such a flow.
    pub const MASQUERADED: &str = "masqueraded";
    /// Hash, SO_NETNS_COOKIE of a pod's network namespace (u64) to [`OptedOut`](super::OptedOut). Written by the agent,
    /// inserting and deleting only. A miss: the socket hooks serve the pod.
    pub const OPTED_OUT: &str = "opted_out";
    /// Array with one element, [`Owner`](super::Owner): who wrote these maps, in which layout.
    pub const OWNER: &str = "owner";
}

/// The mark of answers that are to leave by the interface that their clients' packets came in by, where the source of a
/// backend would lead them elsewhere: the agent's rule sends them by the main routing table. A bit, the others stay.
pub const RETURN_MARK: u32 = 0x1000;

/// The packet programs that others go on in, by their place in `programs`.
pub const PACKET_PARTS: [&str; 13] = [
    "in_known",
    "in_new",
    "in_open",
    "refused",
    "in_odd",
    "in_icmp",
    "out_known",
    "out_new",
    "out_odd",
    "out_icmp",
    "dropped",
    "in_answer",
    "out_node",
];

/// How many elements `masqueraded` has: a power of two, for thousands of backends to be told apart by.
pub const MASQUERADED: u32 = 16_384;

/// Where `masqueraded` tells about the backend at `address` and `port` (host order). Others can have the same place.
#[inline(always)]
pub fn masqueraded_index(address: &Address, port: u16) -> u32 {
    let [a, b, c, d] = address.words();
    // Fibonacci hashing.
    (a ^ b ^ c ^ d ^ u32::from(port)).wrapping_mul(0x9e37_79b9) >> (32 - MASQUERADED.ilog2())
}

/// The bytes of a map do not form the value that this layout expects there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InvalidLayout {
    /// What was read.
    pub what: &'static str,
    /// The number that stands there and has no meaning.
    pub value: u8,
}

impl core::fmt::Display for InvalidLayout {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} has the unknown value {} in the map", self.what, self.value)
    }
}

impl core::error::Error for InvalidLayout {}

macro_rules! wire_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $number:literal,)* }) => {
        $(#[$doc])*
        #[repr(u8)]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum $name {
            $($(#[$variant_doc])* $variant = $number,)*
        }

        impl TryFrom<u8> for $name {
            type Error = InvalidLayout;

            fn try_from(value: u8) -> Result<Self, InvalidLayout> {
                match value {
                    $($number => Ok(Self::$variant),)*
                    value => Err(InvalidLayout { what: stringify!($name), value }),
                }
            }
        }
    };
}

wire_enum! {
    /// The transport protocols that Services can have (IANA protocol numbers).
    Protocol {
        /// RFC 9293.
        Tcp = 6,
        /// RFC 768.
        Udp = 17,
        /// RFC 9260.
        Sctp = 132,
    }
}

impl core::fmt::Display for Protocol {
    /// As Kubernetes writes it.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

wire_enum! {
    /// Through which of a Service's addresses a frontend is reached.
    FrontendKind {
        /// `spec.clusterIPs`.
        ClusterIp = 1,
        /// `spec.ports[].nodePort` on this node's addresses.
        NodePort = 2,
        /// `spec.externalIPs`.
        ExternalIp = 3,
        /// `status.loadBalancer.ingress[].ip`.
        LoadBalancer = 4,
    }
}

wire_enum! {
    /// `spec.type` of a Service that is served.
    ServiceKind {
        /// Reached by ClusterIP only.
        ClusterIp = 1,
        /// By ClusterIP and NodePort.
        NodePort = 2,
        /// By ClusterIP, mostly NodePort, and load-balancer address.
        LoadBalancer = 3,
    }
}

wire_enum! {
    /// `internalTrafficPolicy` or `externalTrafficPolicy`, whichever governs the frontend.
    TrafficPolicy {
        /// All endpoints.
        Cluster = 1,
        /// Endpoints on this node.
        Local = 2,
    }
}

wire_enum! {
    /// What happens to a connection to a frontend, from one side (inside or outside).
    Mode {
        /// The number is not given out.
        Unused = 0,
        /// To one of the backends.
        Forward = 1,
        /// Left alone, so that it reaches the load balancer.
        PassThrough = 2,
        /// Left alone for pods; forwarded for the host.
        PassThroughPods = 3,
        /// Left alone for the host; forwarded for pods.
        PassThroughHost = 4,
        /// Refused: there is no endpoint.
        Reject = 5,
        /// Dropped: the policy is Local and there is no endpoint on this node.
        Drop = 6,
        /// Left alone, because the address stands on an interface of this node, and a process listens there.
        LocalAddress = 7,
    }
}

wire_enum! {
    /// Whether a backend runs on this node (`endpoint.nodeName`).
    Location {
        /// On another node.
        Remote = 0,
        /// On this one.
        Local = 1,
    }
}

wire_enum! {
    /// Whether a backend takes new connections.
    BackendState {
        /// `conditions.ready`.
        Ready = 1,
        /// `conditions.serving` and `conditions.terminating`.
        Terminating = 2,
    }
}

wire_enum! {
    /// What an address is, on whichever port.
    AddressKind {
        /// A Service's ClusterIP: ports that the Service does not have are refused.
        ClusterIp = 1,
        /// An address of this node that answers NodePorts.
        NodePort = 2,
        /// The ClusterIP of a Service that another proxy serves: left alone.
        OtherProxy = 3,
        /// A ClusterIP that stands on an interface of this node: ports that the Service does not have are left alone.
        Local = 4,
    }
}

wire_enum! {
    /// For which addresses a frontend's key stands. No client can name [`FrontendScope::NodePort`]: a
    /// process that connects to `0.0.0.0` names that address, not the NodePorts.
    FrontendScope {
        /// The key's own.
        Address = 0,
        /// All addresses of this node that answer NodePorts, in the family of the key's address.
        NodePort = 1,
    }
}

wire_enum! {
    /// Who lives behind an interface.
    Behind {
        /// Anyone: it is an uplink, a tunnel, or nobody knows what.
        Outside = 0,
        /// Pods of this node.
        Pods = 1,
    }
}

/// Key of `frontend`: where a Service listens. NodePorts stand under the unspecified address of their
/// family, in a scope of their own, since the node's addresses change without the Service knowing.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrontendKey {
    address: Address,
    port: u16,
    protocol: Protocol,
    scope: FrontendScope,
}

impl FrontendKey {
    /// The frontend at `address` and `port` (host order).
    #[inline(always)]
    pub const fn new(address: Address, port: u16, protocol: Protocol) -> Self {
        Self { address, port, protocol, scope: FrontendScope::Address }
    }

    /// The NodePort `port` (host order) on all addresses of this node in the family of `of_family`.
    #[inline(always)]
    pub fn node_port(of_family: &Address, port: u16, protocol: Protocol) -> Self {
        Self { address: of_family.any_of_family(), port, protocol, scope: FrontendScope::NodePort }
    }

    /// Whether it is a NodePort, on all addresses of this node that answer those.
    #[inline(always)]
    pub const fn is_node_port(&self) -> bool {
        matches!(self.scope, FrontendScope::NodePort)
    }

    /// The address; unspecified for NodePorts.
    #[inline(always)]
    pub const fn address(&self) -> Address {
        self.address
    }

    /// The port in host order.
    #[inline(always)]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// The transport protocol.
    #[inline(always)]
    pub const fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// As it lies in the map.
    pub fn to_bytes(&self) -> [u8; 20] {
        let mut bytes = [0; 20];
        bytes[..16].copy_from_slice(&self.address.octets());
        bytes[16..18].copy_from_slice(&self.port.to_ne_bytes());
        bytes[18] = self.protocol as u8;
        bytes[19] = self.scope as u8;
        bytes
    }

    /// From the bytes of the map.
    pub fn from_bytes(bytes: &[u8; 20]) -> Result<Self, InvalidLayout> {
        let mut octets = [0; 16];
        octets.copy_from_slice(&bytes[..16]);
        let port = u16::from_ne_bytes([bytes[16], bytes[17]]);
        Ok(Self {
            address: Address::new(octets),
            port,
            protocol: Protocol::try_from(bytes[18])?,
            scope: FrontendScope::try_from(bytes[19])?,
        })
    }
}

/// Bits of [`Side::options`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options;

impl Options {
    /// `sessionAffinity: ClientIP`; the timeout stands in [`ServiceIdentity`].
    pub const AFFINITY: u8 = 1;
    /// `loadBalancerSourceRanges` restrict who may use it; see `source_range`.
    pub const SOURCE_RANGES: u8 = 1 << 1;
    /// The client's address is masked, whichever backend is chosen.
    pub const MASQUERADE: u8 = 1 << 2;
    /// The client's address is masked where the backend is on another node.
    pub const MASQUERADE_REMOTE: u8 = 1 << 3;
    /// With [`Options::SOURCE_RANGES`]: they contain an address of this node, so that the host may use it. A socket
    /// has no source address yet when it is asked about.
    pub const HOST_IN_RANGES: u8 = 1 << 4;
    /// The run of slots is the local set (internalTrafficPolicy or externalTrafficPolicy Local), not the cluster set:
    /// a client with affinity has a backend for each.
    pub const LOCAL_SET: u8 = 1 << 5;
    /// The client's address is masked unless it lies in `--cluster-cidr`.
    pub const MASQUERADE_OFF_CLUSTER: u8 = 1 << 6;
}

/// What a frontend does for one side. Eight bytes, aligned, written by one store and read by one load, so
/// that no reader sees the slots of one change with the count of another.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Side {
    first_slot: u32,
    count: u16,
    mode: Mode,
    options: u8,
}

impl Side {
    /// A number that is not given out.
    pub const UNUSED: Self = Self { first_slot: 0, count: 0, mode: Mode::Unused, options: 0 };

    /// The set of `count` backends from `first_slot` on, and what is done with it.
    pub const fn new(first_slot: u32, count: u16, mode: Mode, options: u8) -> Self {
        Self { first_slot, count, mode, options }
    }

    /// As one word, in the byte order of the map's memory.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        let mut bytes = [0; 8];
        let first = self.first_slot.to_ne_bytes();
        let count = self.count.to_ne_bytes();
        let mut i = 0;
        while i < 4 {
            bytes[i] = first[i];
            i += 1;
        }
        bytes[4] = count[0];
        bytes[5] = count[1];
        bytes[6] = self.mode as u8;
        bytes[7] = self.options;
        u64::from_ne_bytes(bytes)
    }

    /// From one word of the map's memory.
    #[inline(always)]
    pub fn from_word(word: u64) -> Result<Self, InvalidLayout> {
        // Shifts of the little-endian value, not byte arrays: this runs in every program.
        let word = word.to_le();
        let (first_slot, count) = if cfg!(target_endian = "little") {
            (word as u32, (word >> 32) as u16)
        } else {
            ((word as u32).swap_bytes(), ((word >> 32) as u16).swap_bytes())
        };
        let mode = Mode::try_from((word >> 48) as u8)?;
        Ok(Self { first_slot, count, mode, options: (word >> 56) as u8 })
    }

    /// The first slot of the set in force for this side.
    #[inline(always)]
    pub const fn first_slot(&self) -> u32 {
        self.first_slot
    }

    /// How many backends the set in force has.
    #[inline(always)]
    pub const fn count(&self) -> u16 {
        self.count
    }

    /// What is done with a connection.
    #[inline(always)]
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// Bits of [`Options`].
    #[inline(always)]
    pub const fn options(&self) -> u8 {
        self.options
    }

    /// Whether all bits of `option` are set.
    #[inline(always)]
    pub const fn has(&self, option: u8) -> bool {
        self.options & option != 0
    }
}

/// The Service port that a number belongs to. One 64-bit word in the map.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServiceIdentity {
    service: u32,
    affinity_timeout: u32,
}

impl ServiceIdentity {
    /// `service` is never given out twice, `affinity_timeout` is in seconds, 0 without affinity.
    pub const fn new(service: u32, affinity_timeout: u32) -> Self {
        Self { service, affinity_timeout }
    }

    /// The Service port: the same for all its frontends of one family, never given out twice. Flows,
    /// affinity and socket records carry it, so that a number's next owner does not inherit them.
    #[inline(always)]
    pub const fn service(&self) -> u32 {
        self.service
    }

    /// `sessionAffinityConfig.clientIP.timeoutSeconds`, or 0 without affinity.
    #[inline(always)]
    pub const fn affinity_timeout(&self) -> u32 {
        self.affinity_timeout
    }

    /// As one word, in the byte order of the map's memory.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        pair_to_word(self.service, self.affinity_timeout)
    }

    /// From one word of the map's memory.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        let (service, affinity_timeout) = word_to_pair(word);
        Self { service, affinity_timeout }
    }
}

/// All backends of a Service port, also those that take no new connections. One 64-bit word in the map.
///
/// The order within the block: those only in the inside set, those in both sets, those only in the outside
/// set, those that only serve what they have. So every set is a run of slots.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Block {
    first_slot: u32,
    in_sets: u16,
    serving: u16,
}

impl Block {
    /// No backends.
    pub const EMPTY: Self = Self { first_slot: 0, in_sets: 0, serving: 0 };

    /// `serving` backends from `first_slot` on, of which the first `in_sets` are in a set.
    pub const fn new(first_slot: u32, in_sets: u16, serving: u16) -> Self {
        Self { first_slot, in_sets, serving }
    }

    /// Where the block begins.
    #[inline(always)]
    pub const fn first_slot(&self) -> u32 {
        self.first_slot
    }

    /// How many, from the first on, are in the inside set or the outside set.
    #[inline(always)]
    pub const fn in_sets(&self) -> u16 {
        self.in_sets
    }

    /// How many there are.
    #[inline(always)]
    pub const fn serving(&self) -> u16 {
        self.serving
    }

    /// As one word, in the byte order of the map's memory.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        let counts = if cfg!(target_endian = "little") {
            self.in_sets as u32 | (self.serving as u32) << 16
        } else {
            (self.in_sets as u32) << 16 | self.serving as u32
        };
        pair_to_word(self.first_slot, counts)
    }

    /// From one word of the map's memory.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        let (first_slot, counts) = word_to_pair(word);
        let (low, high) = (counts as u16, (counts >> 16) as u16);
        let (in_sets, serving) = if cfg!(target_endian = "little") { (low, high) } else { (high, low) };
        Self { first_slot, in_sets, serving }
    }
}

/// Value of `service`: four words, each read and written at once.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServiceEntry {
    /// For clients inside: this node's pods and the host.
    pub inside: Side,
    /// For traffic from outside.
    pub outside: Side,
    /// Whose number it is, and how long affinity lasts.
    pub identity: ServiceIdentity,
    /// All backends.
    pub block: Block,
}

impl ServiceEntry {
    /// A number that is not given out.
    pub const UNUSED: Self = Self {
        inside: Side::UNUSED,
        outside: Side::UNUSED,
        identity: ServiceIdentity::new(0, 0),
        block: Block::EMPTY,
    };

    /// The words in the order of the map's memory.
    pub const fn to_words(self) -> [u64; 4] {
        [self.inside.to_word(), self.outside.to_word(), self.identity.to_word(), self.block.to_word()]
    }

    /// From the words of the map's memory.
    pub fn from_words(words: [u64; 4]) -> Result<Self, InvalidLayout> {
        Ok(Self {
            inside: Side::from_word(words[0])?,
            outside: Side::from_word(words[1])?,
            identity: ServiceIdentity::from_word(words[2]),
            block: Block::from_word(words[3]),
        })
    }
}

/// Value of `backend`: where a connection is sent.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backend {
    address: Address,
    port: u16,
    location: Location,
    state: BackendState,
    service: u32,
    joined: u32,
    id: u32,
}

impl Backend {
    /// The endpoint at `address` and `port` (host order). `service` is the [`ServiceIdentity::service`] that
    /// it serves, `joined` counts up whenever an endpoint enters the sets anew, `id` is its place in `backend_slot`.
    pub const fn new(
        address: Address,
        port: u16,
        location: Location,
        state: BackendState,
        service: u32,
        joined: u32,
        id: u32,
    ) -> Self {
        Self { address, port, location, state, service, joined, id }
    }

    /// The endpoint's address.
    #[inline(always)]
    pub const fn address(&self) -> Address {
        self.address
    }

    /// The endpoint's port in host order.
    #[inline(always)]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Whether it is on this node.
    #[inline(always)]
    pub const fn location(&self) -> Location {
        self.location
    }

    /// Whether it is on this node.
    #[inline(always)]
    pub const fn is_local(&self) -> bool {
        matches!(self.location, Location::Local)
    }

    /// Whether it takes new connections.
    #[inline(always)]
    pub const fn state(&self) -> BackendState {
        self.state
    }

    /// The [`ServiceIdentity::service`] that this slot belongs to.
    #[inline(always)]
    pub const fn service(&self) -> u32 {
        self.service
    }

    /// Changes when the endpoint has left all sets and come back: affinity from before does not count then.
    #[inline(always)]
    pub const fn joined(&self) -> u32 {
        self.joined
    }

    /// The same in whatever slot the endpoint stands, for as long as it serves this Service port: its place in
    /// `backend_slot`, where it is found again when the Service's slots have changed. Given out again afterwards.
    #[inline(always)]
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// Whether this is the endpoint at `address` and `port`, in a slot of `service`.
    #[inline(always)]
    pub fn is(&self, service: u32, address: &Address, port: u16) -> bool {
        self.service == service && self.port == port && self.address == *address
    }

    /// As it lies in the map.
    pub fn to_bytes(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&self.address.octets());
        bytes[16..18].copy_from_slice(&self.port.to_ne_bytes());
        bytes[18] = self.location as u8;
        bytes[19] = self.state as u8;
        bytes[20..24].copy_from_slice(&self.service.to_ne_bytes());
        bytes[24..28].copy_from_slice(&self.joined.to_ne_bytes());
        bytes[28..32].copy_from_slice(&self.id.to_ne_bytes());
        bytes
    }

    /// From the bytes of the map.
    pub fn from_bytes(bytes: &[u8; 32]) -> Result<Self, InvalidLayout> {
        let mut octets = [0; 16];
        octets.copy_from_slice(&bytes[..16]);
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Ok(Self::new(
            Address::new(octets),
            u16::from_ne_bytes([bytes[16], bytes[17]]),
            Location::try_from(bytes[18])?,
            BackendState::try_from(bytes[19])?,
            word(20),
            word(24),
            word(28),
        ))
    }
}

/// Value of `backend_slot`: where a backend stands, in one 64-bit word.
///
/// Two slots, since a change of a Service puts its backends into other slots before words point there: a program that
/// has read a word of before finds the backend in the previous slot, one that has read a word of after in the current
/// one. Either may hold another backend by now: what stands there must be compared.
#[repr(C, align(8))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BackendSlots {
    current: u32,
    previous: u32,
}

impl BackendSlots {
    /// In the slot `current`, and before that in `previous`.
    pub const fn new(current: u32, previous: u32) -> Self {
        Self { current, previous }
    }

    /// The slots in which it can be, the likely one first.
    #[inline(always)]
    pub const fn both(&self) -> [u32; 2] {
        [self.current, self.previous]
    }

    /// Whether `slot` is one of them.
    #[inline(always)]
    pub const fn contains(&self, slot: u32) -> bool {
        self.current == slot || self.previous == slot
    }

    /// As one word, in the byte order of the map's memory.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        pair_to_word(self.current, self.previous)
    }

    /// From one word of the map's memory.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        let (current, previous) = word_to_pair(word);
        Self { current, previous }
    }
}

/// Value of `address`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressEntry {
    kind: AddressKind,
    _pad: [u8; 3],
}

impl AddressEntry {
    /// An address of this kind.
    pub const fn new(kind: AddressKind) -> Self {
        Self { kind, _pad: [0; 3] }
    }

    /// What the address is.
    #[inline(always)]
    pub const fn kind(&self) -> AddressKind {
        self.kind
    }
}

/// Key of `source_range`: a prefix from which the frontend with this number may be used.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SourceRangeKey {
    /// Bits that count: 32 for the number, then those of the address in its mapped form.
    pub prefix_length: u32,
    /// The frontend's number.
    pub number: u32,
    /// The prefix's address.
    pub address: Address,
}

impl SourceRangeKey {
    /// The number's bits stand before the address's.
    pub const NUMBER_BITS: u32 = 32;

    /// The prefix `range`, for the frontend `number`.
    pub const fn new(number: u32, range: &Cidr) -> Self {
        Self { prefix_length: Self::NUMBER_BITS + range.prefix_length(), number, address: range.address() }
    }
}

/// Key of `affinity`: one client of one Service port, and of which of its two sets.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AffinityKey {
    /// The client's address; for sockets, which may have none yet, the cookie of its network namespace in
    /// the last eight octets.
    pub client: Address,
    /// [`ServiceIdentity::service`].
    pub service: u32,
    /// 1 if `client` holds a namespace cookie.
    pub by_namespace: u8,
    /// For which endpoint set the client was given the backend: that of policy Cluster, or that of policy Local.
    pub set: TrafficPolicy,
    /// Zero.
    pub _pad: u16,
}

/// Value of `affinity`: where that client went last.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AffinityValue {
    /// The backend's address.
    pub address: Address,
    /// The backend's port, host order, in the low 16 bits.
    pub port: u32,
    /// [`Backend::joined`] when it was chosen.
    pub joined: u32,
    /// [`ServiceIdentity::service`] again: a value read through a hash pointer is checked after copying.
    pub service: u32,
    /// [`Backend::id`]: where it is found.
    pub backend: u32,
    /// The last new connection, in nanoseconds since boot.
    pub last_used: u64,
}

/// Value of `counter`, by number.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counters {
    /// Connections (UDP: flows) that were sent to a backend.
    pub connections: u64,
    /// Connections that were left alone, to reach the load balancer.
    pub pass_through: u64,
}

/// How many octets a name in [`ServiceInfo`] has: namespace, name and port name of 63 each (RFC 1123
/// labels), two separators and a NUL.
pub const NAME_LENGTH: usize = 192;

/// Value of `service_info`: whose frontend a number is. For people and for a restarted agent.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServiceInfo {
    /// `namespace/name:port`, without `:port` where the port has no name; padded with NUL.
    pub name: [u8; NAME_LENGTH],
    /// When this frontend last changed, in seconds since 1970.
    pub changed: u64,
    /// The frontend, once more: found by number here.
    pub frontend: FrontendKey,
    /// [`FrontendKind`] as a number.
    pub frontend_kind: u8,
    /// [`ServiceKind`] as a number.
    pub service_kind: u8,
    /// [`TrafficPolicy`] as a number: internal for ClusterIPs, external for the rest.
    pub traffic_policy: u8,
    /// Which rule decided on pass-through; the agent's own numbering, 0 where none applies.
    pub pass_through_rule: u8,
}

impl ServiceInfo {
    /// The name as text: what stands before the first NUL.
    pub fn name(&self) -> &str {
        let end = self.name.iter().position(|byte| *byte == 0).unwrap_or(NAME_LENGTH);
        core::str::from_utf8(&self.name[..end]).unwrap_or("(not UTF-8)")
    }
}

/// How many prefixes of one sort the configuration holds.
pub const MAX_CIDRS: usize = 8;

/// Value of `config`: what the programs know of the node.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// SO_NETNS_COOKIE of the host's network namespace; 0 where the kernel cannot tell it (before 5.14).
    pub host_netns_cookie: u64,
    /// How long a UDP flow may idle before its next datagram is balanced anew, in nanoseconds.
    pub udp_timeout: u64,
    /// Key of the hash that picks backends for packets.
    pub hash_seed: [u32; 2],
    /// 1: NodePorts answer on loopback addresses, for clients on the host.
    pub loopback_node_ports: u16,
    /// 1: rules of this node route what its backends send by its source, so that their answers are looked at.
    pub routes_by_source: u16,
    /// 1: TCP sockets remember the service address, so that getpeername() tells it.
    pub remember_peer: u16,
    /// 1: the socket hooks leave pods' processes alone, whose packets are served (`--socket-hooks host`). 0 in the maps
    /// of earlier versions too, which had it and the next as the upper half of `remember_peer`.
    pub host_sockets_only: u8,
    /// 1: `opted_out` is to be asked about pods.
    pub some_opted_out: u8,
    /// The first of the ports that clients are masked with.
    pub mask_ports_first: u32,
    /// How many these are.
    pub mask_ports_count: u32,
    /// The first of those of them that are tried before all others, since no socket is given one by itself
    /// (`ip_local_reserved_ports`).
    pub reserved_ports_first: u32,
    /// How many these are.
    pub reserved_ports_count: u32,
    /// A bit for each address of this node, see [`Address::bit`](crate::Address::bit): where a source's is 0, no other need be
    /// asked whether it is the node's.
    pub node_addresses: u64,
    /// The lowest UDP port that is a NodePort; above the highest where there is none.
    pub udp_node_ports_first: u16,
    /// The highest.
    pub udp_node_ports_last: u16,
    /// Zero.
    pub _pad: u32,
    /// ServiceCIDRs: unallocated addresses inside are dropped.
    pub service_cidrs: [Cidr; MAX_CIDRS],
    /// `--cluster-cidr`: sources that [`Options::MASQUERADE_OFF_CLUSTER`] leaves as they are.
    pub cluster_cidrs: [Cidr; MAX_CIDRS],
}

impl Config {
    /// Of a node that nothing is known of.
    pub const EMPTY: Self = Self {
        host_netns_cookie: 0,
        udp_timeout: 0,
        hash_seed: [0; 2],
        loopback_node_ports: 0,
        routes_by_source: 0,
        remember_peer: 0,
        host_sockets_only: 0,
        some_opted_out: 0,
        mask_ports_first: 0,
        mask_ports_count: 0,
        reserved_ports_first: 0,
        reserved_ports_count: 0,
        node_addresses: 0,
        udp_node_ports_first: 1,
        udp_node_ports_last: 0,
        _pad: 0,
        service_cidrs: [Cidr::NONE; MAX_CIDRS],
        cluster_cidrs: [Cidr::NONE; MAX_CIDRS],
    };
}

/// Key of `device`. An interface has one copy, and both for a moment while what is known of it changes: readers ask for
/// copy 0 first, then for copy 1, and find the old or the new.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DeviceKey {
    /// The interface's index.
    pub interface: u32,
    /// 0 or 1.
    pub copy: u32,
}

/// Value of `device`: what an interface is, for the programs and for `kproxy explain`. The addresses that clients are masked with on an interface; unspecified where it has none
/// of a family. And for which families its clients share a bridge with this node's pods whose frames pass netfilter
/// by: 1 where they do, so that they are masked.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceAddresses {
    /// The IPv4 address.
    pub v4: Address,
    /// The IPv6 address.
    pub v6: Address,
    /// Whether IPv4 clients share such a bridge.
    pub bridged_v4: u32,
    /// Whether IPv6 clients share such a bridge.
    pub bridged_v6: u32,
    /// Who lives behind it; behind a bridge, behind its ports.
    pub behind: Behind,
    /// Zero.
    pub _pad: [u8; 3],
}

impl DeviceAddresses {
    /// What the clients are whose packets come in by this interface.
    #[inline(always)]
    pub const fn clients(&self) -> ClientKind {
        match self.behind {
            Behind::Pods => ClientKind::Pod,
            Behind::Outside => ClientKind::Outside,
        }
    }
}

/// Value of `opted_out`: which pod the socket hooks leave alone, by its addresses; unspecified where it has none of a
/// family.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptedOut {
    /// The pod's IPv4 address.
    pub v4: Address,
    /// Its IPv6 address.
    pub v6: Address,
    /// Since when, in seconds since 1970.
    pub since: u64,
}

/// Value of `owner`: who wrote these maps. What it says of a dead agent stays until the next one.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// [`LAYOUT_VERSION`] of the writer.
    pub layout_version: u32,
    /// The agent's process id, in its own PID namespace.
    pub pid: u32,
    /// When it started, in seconds since 1970.
    pub started: u64,
    /// The node's name, padded with NUL.
    pub node: [u8; 64],
    /// The agent's version, padded with NUL.
    pub version: [u8; 16],
}

const fn pair_to_word(first: u32, second: u32) -> u64 {
    if cfg!(target_endian = "little") {
        first as u64 | (second as u64) << 32
    } else {
        (first as u64) << 32 | second as u64
    }
}

const fn word_to_pair(word: u64) -> (u32, u32) {
    if cfg!(target_endian = "little") {
        (word as u32, (word >> 32) as u32)
    } else {
        ((word >> 32) as u32, word as u32)
    }
}

// The maps are read by programs and agents of other builds: a size that changes is a new layout.
const _: () = {
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<Side>() == 8);
    assert!(size_of::<ServiceEntry>() == 32);
    assert!(size_of::<Backend>() == 32);
    assert!(size_of::<BackendSlots>() == 8);
    assert!(size_of::<AddressEntry>() == 4);
    assert!(size_of::<SourceRangeKey>() == 24);
    assert!(size_of::<AffinityKey>() == 24);
    assert!(size_of::<AffinityValue>() == 40);
    assert!(size_of::<Counters>() == 16);
    assert!(size_of::<ServiceInfo>() == 224);
    assert!(size_of::<Config>() == 64 + 2 * MAX_CIDRS * 20);
    assert!(size_of::<DeviceKey>() == 8);
    assert!(size_of::<DeviceAddresses>() == 44);
    assert!(size_of::<OptedOut>() == 40);
    assert!(size_of::<Owner>() == 96);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_hold_what_the_structures_hold() {
        let side =
            Side::new(0x0102_0304, 0x0506, Mode::PassThroughPods, Options::AFFINITY | Options::SOURCE_RANGES);
        assert_eq!(Side::from_word(side.to_word()), Ok(side));
        // SAFETY: both are eight bytes without padding.
        let raw = unsafe { core::mem::transmute::<Side, u64>(side) };
        assert_eq!(raw, side.to_word(), "the dump shows the structure, the agent writes the word");

        let identity = ServiceIdentity::new(7, 10_800);
        // SAFETY: as above.
        assert_eq!(unsafe { core::mem::transmute::<ServiceIdentity, u64>(identity) }, identity.to_word());
        assert_eq!(ServiceIdentity::from_word(identity.to_word()), identity);

        let block = Block::new(70_000, 3, 5);
        // SAFETY: as above.
        assert_eq!(unsafe { core::mem::transmute::<Block, u64>(block) }, block.to_word());
        assert_eq!(Block::from_word(block.to_word()), block);

        let slots = BackendSlots::new(70_000, 3);
        // SAFETY: as above.
        assert_eq!(unsafe { core::mem::transmute::<BackendSlots, u64>(slots) }, slots.to_word());
        assert_eq!(BackendSlots::from_word(slots.to_word()), slots);
    }

    #[test]
    fn unknown_numbers_are_errors() {
        let word = Side::new(1, 1, Mode::Forward, 0).to_word() | 0x0078_0000_0000_0000;
        assert_eq!(Side::from_word(word).unwrap_err().what, "Mode");
        let mut bytes = FrontendKey::new(Address::UNSPECIFIED, 80, Protocol::Tcp).to_bytes();
        bytes[18] = 1;
        assert_eq!(
            FrontendKey::from_bytes(&bytes).unwrap_err(),
            InvalidLayout { what: "Protocol", value: 1 }
        );
    }

    #[test]
    fn bytes_come_back() {
        let key = FrontendKey::new(Address::from_v4_word(0x0100_600a), 8_080, Protocol::Sctp);
        assert_eq!(FrontendKey::from_bytes(&key.to_bytes()), Ok(key));
        let node_port = FrontendKey::node_port(&key.address(), 30_080, Protocol::Tcp);
        assert_eq!(FrontendKey::from_bytes(&node_port.to_bytes()), Ok(node_port));
        let spelled = FrontendKey::new(node_port.address(), 30_080, Protocol::Tcp);
        assert_ne!(spelled, node_port, "a client that names the address does not name the NodePort");
        let backend =
            Backend::new(Address::UNSPECIFIED, 9, Location::Local, BackendState::Terminating, 4, 2, 7);
        assert_eq!(Backend::from_bytes(&backend.to_bytes()), Ok(backend));
    }
}
