//! The decision: given the tables, what happens to this connection?
//!
//! [`resolve`] finds the frontend and what it does for this client; [`choose`] picks the backend. Both are
//! generic over [`Tables`], so that the programs ask the kernel's maps and the host asks memory.
//! The rules are kube-proxy's (`pkg/proxy` of Kubernetes), read for one connection.

use crate::{
    Address, AddressKind, AffinityKey, AffinityValue, Backend, BackendSlots, Block, Config, FrontendKey,
    Mode, Options, Protocol, Reason, ServiceIdentity, Side, TrafficPolicy, elapsed,
};

/// What the decision reads, and the affinity that it writes.
pub trait Tables {
    /// The node's configuration; `None` before an agent has written it.
    fn config(&self) -> Option<&Config>;
    /// The number of the frontend under exactly this key.
    fn frontend(&self, key: &FrontendKey) -> Option<u32>;
    /// What this address is, on whichever port.
    fn address(&self, address: &Address) -> Option<AddressKind>;
    /// What frontend `number` does for this side.
    fn side(&self, number: u32, from: ClientKind) -> Option<Side>;
    /// Which Service port `number` belongs to.
    fn identity(&self, number: u32) -> Option<ServiceIdentity>;
    /// All backends of `number`.
    fn block(&self, number: u32) -> Option<Block>;
    /// The backend in this slot.
    fn backend(&self, slot: u32) -> Option<Backend>;
    /// Where the backend with this [`Backend::id`] stands.
    fn slots_of(&self, backend: u32) -> Option<BackendSlots>;
    /// Whether `client` lies in a source range of frontend `number`.
    fn source_allowed(&self, number: u32, client: &Address) -> bool;
    /// Whether the pod whose network namespace has this cookie is opted out of the socket hooks.
    fn opted_out(&self, netns_cookie: u64) -> bool;
    /// Where this client went last.
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue>;
    /// Remembers where this client goes.
    fn remember(&self, key: &AffinityKey, value: &AffinityValue);
    /// Nanoseconds since boot.
    fn now(&self) -> u64;
    /// [`in_cluster_cidr`](crate::in_cluster_cidr) over these tables; a function of its own in the programs, too.
    fn is_in_cluster(&self, address: &Address) -> bool
    where
        Self: Sized,
    {
        crate::in_cluster_cidr(self, address)
    }
    /// [`search`] over these tables. The programs put it into a function of its own, which the verifier checks
    /// once instead of once for each way that leads there.
    fn locate(&self, wanted: &Wanted) -> Option<u32>
    where
        Self: Sized,
    {
        search(self, wanted)
    }
}

/// A backend to be found again, and where.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// The backend's address.
    pub address: Address,
    /// The backend's port, host order.
    pub port: u16,
    /// The Service port that its slot must belong to.
    pub service: u32,
    /// [`Backend::id`].
    pub backend: u32,
    /// The first slot that counts.
    pub first: u32,
    /// How many slots count.
    pub count: u16,
}

/// Where a client is, seen from this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClientKind {
    /// A pod of this node, by its interface or its cgroup.
    Pod,
    /// A process in the host's network namespace.
    Host,
    /// Everyone else, pods of other nodes too.
    Outside,
}

/// Who opens the connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Client {
    /// Where it is.
    pub kind: ClientKind,
    /// Its address; unspecified where a socket has none yet.
    pub address: Address,
    /// The cookie of its network namespace, if a socket hook asks; 0 for packets.
    pub netns_cookie: u64,
}

/// A connection that is being opened (UDP: the first datagram of a flow).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Connection {
    /// Who opens it.
    pub client: Client,
    /// Where to.
    pub destination: Address,
    /// The destination port, host order.
    pub port: u16,
    /// The transport protocol.
    pub protocol: Protocol,
}

/// What a frontend does with a connection, before a backend is picked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolution {
    /// Left alone. `number` is the frontend's, where one matched.
    Pass { reason: Reason, number: Option<u32> },
    /// Refused.
    Reject { reason: Reason, number: Option<u32> },
    /// Dropped without an answer.
    Drop { reason: Reason, number: Option<u32> },
    /// Sent to one of the backends.
    Balance(Balance),
}

/// A set of backends to pick from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Balance {
    /// The frontend's number.
    pub number: u32,
    /// Its word for this client's side: the slots of the set in force, and options.
    pub side: Side,
}

/// A backend, picked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Where to send the connection.
    pub backend: Backend,
    /// The backend's slot: a hint for later, to be verified.
    pub slot: u32,
}

/// Finds the frontend that `connection` asks for, and what it does for this client.
#[inline(always)]
pub fn resolve<T: Tables>(tables: &T, connection: &Connection) -> Resolution {
    let number = match find(tables, connection) {
        Ok(number) => number,
        Err(resolution) => return resolution,
    };
    let kind = connection.client.kind;
    let Some(side) = tables.side(number, kind) else {
        return Resolution::Pass { reason: Reason::TableError, number: None };
    };
    let some = Some(number);
    // Pass-through stands before source ranges, reject and drop: the load balancer decides about all of these.
    match side.mode() {
        Mode::Unused => return Resolution::Pass { reason: Reason::NotAService, number: None },
        Mode::PassThrough => return Resolution::Pass { reason: Reason::PassThrough, number: some },
        Mode::PassThroughPods if !matches!(kind, ClientKind::Host) => {
            return Resolution::Pass { reason: Reason::PassThrough, number: some };
        }
        Mode::PassThroughHost if !matches!(kind, ClientKind::Pod) => {
            return Resolution::Pass { reason: Reason::PassThrough, number: some };
        }
        Mode::LocalAddress => return Resolution::Pass { reason: Reason::LocalAddress, number: some },
        Mode::Forward | Mode::Reject | Mode::Drop | Mode::PassThroughPods | Mode::PassThroughHost => {}
    }
    // The host is its node address, whatever a socket is bound to or a packet has been given: so sockets and
    // packets agree, and none leaves untranslated here what was dropped there.
    let host_bits = Options::SOURCE_RANGES | Options::HOST_IN_RANGES;
    if matches!(kind, ClientKind::Host) {
        if side.options() & host_bits == Options::SOURCE_RANGES {
            return Resolution::Drop { reason: Reason::SourceRange, number: some };
        }
    } else if side.has(Options::SOURCE_RANGES) {
        let client = &connection.client.address;
        // A pod's address is known where its packets come in.
        if client.is_unspecified() {
            return Resolution::Pass { reason: Reason::LeftToPackets, number: some };
        }
        if !tables.source_allowed(number, client) {
            return Resolution::Drop { reason: Reason::SourceRange, number: some };
        }
    }
    if matches!(side.mode(), Mode::Drop) {
        return Resolution::Drop { reason: Reason::NoLocalEndpoints, number: some };
    }
    if side.count() == 0 {
        return Resolution::Reject { reason: Reason::NoEndpoints, number: some };
    }
    Resolution::Balance(Balance { number, side })
}

/// Picks a backend: one that this client went to before, if the Service has affinity and it is still in the
/// set in force; else the one that `pick`, uniform over all 32-bit numbers, falls on.
#[inline(always)]
pub fn choose<T: Tables>(tables: &T, balance: &Balance, client: &Client, pick: u32) -> Option<Choice> {
    let slot = if balance.side.has(Options::AFFINITY) {
        // Copies: a function that is called with pointers to the caller's own values keeps them in memory, and what
        // is known of them at compile time unused.
        let (balance, client) = (*balance, affinity_client(client));
        u32::try_from(slot_by_affinity(tables, &balance, &client, pick)).ok()?
    } else {
        spread(balance, pick)
    };
    Some(Choice { backend: tables.backend(slot)?, slot })
}

/// Whether the backend at `address` and `port` still serves the Service port `service` behind frontend
/// `number`. `backend` is its [`Backend::id`].
#[inline(always)]
pub fn still_serves<T: Tables>(
    tables: &T,
    number: u32,
    service: u32,
    address: &Address,
    port: u16,
    backend: u32,
) -> bool {
    let (Some(identity), Some(block)) = (tables.identity(number), tables.block(number)) else {
        return false;
    };
    let (first, count) = (block.first_slot(), block.serving());
    identity.service() == service
        && tables.locate(&Wanted { address: *address, port, service, backend, first, count }).is_some()
}

/// The slot in which the backend stands now, among those that count.
#[inline(always)]
pub fn search<T: Tables>(tables: &T, wanted: &Wanted) -> Option<u32> {
    let Wanted { address, port, service, backend, first, count } = wanted;
    tables.slots_of(*backend)?.both().into_iter().find(|slot| {
        slot.wrapping_sub(*first) < u32::from(*count)
            && tables.backend(*slot).is_some_and(|backend| backend.is(*service, address, *port))
    })
}

/// The frontend's number; where there is none, what follows from that.
#[inline(always)]
pub(crate) fn find<T: Tables>(tables: &T, connection: &Connection) -> Result<u32, Resolution> {
    let Connection { client, destination, port, protocol } = connection;
    if let Some(number) = tables.frontend(&FrontendKey::new(*destination, *port, *protocol)) {
        return Ok(number);
    }
    let kind = tables.address(destination);
    let answers_node_ports = match kind {
        Some(AddressKind::NodePort) => true,
        Some(_) => false,
        None => {
            destination.is_loopback()
                && matches!(client.kind, ClientKind::Host)
                && tables.config().is_some_and(|config| config.loopback_node_ports != 0)
        }
    };
    if answers_node_ports
        && let Some(number) = tables.frontend(&FrontendKey::node_port(destination, *port, *protocol))
    {
        return Ok(number);
    }
    Err(not_a_frontend(tables, &connection.destination, kind))
}

#[inline(always)]
fn not_a_frontend<T: Tables>(tables: &T, destination: &Address, kind: Option<AddressKind>) -> Resolution {
    let pass = |reason| Resolution::Pass { reason, number: None };
    match kind {
        Some(AddressKind::ClusterIp) => {
            return Resolution::Reject { reason: Reason::UndefinedPort, number: None };
        }
        Some(AddressKind::OtherProxy) => return pass(Reason::OtherProxy),
        Some(AddressKind::Local) => return pass(Reason::LocalAddress),
        Some(AddressKind::NodePort) | None => {}
    }
    let Some(config) = tables.config() else {
        return pass(Reason::NotAService);
    };
    for cidr in &config.service_cidrs {
        if cidr.is_none() {
            break;
        }
        if cidr.contains(destination) {
            return Resolution::Drop { reason: Reason::UnallocatedAddress, number: None };
        }
    }
    pass(Reason::NotAService)
}

#[inline(always)]
fn spread(balance: &Balance, pick: u32) -> u32 {
    let offset = (u64::from(pick) * u64::from(balance.side.count())) >> 32;
    balance.side.first_slot().wrapping_add(offset as u32)
}

/// What [`slot_of_client`] says beside slots, which have 32 bits: the client has no backend.
const NONE: u64 = u64::MAX;
/// It has one, but not in the set in force.
const ELSEWHERE: u64 = NONE - 1;

/// The slot of the backend that this client went to last, or of another that it is bound to from now on; beyond 32
/// bits where there is none. `client` is the key without its Service. A function of its own, so that its stack is
/// not needed at the same time as its callers'; and no type with data in its signature but structures, since BTF
/// knows no others.
///
/// A client keeps one backend for the cluster set and one for the local set. The one of the set in force counts first;
/// then the other, where that is in this set too.
#[inline(never)]
fn slot_by_affinity<T: Tables>(tables: &T, balance: &Balance, client: &AffinityKey, pick: u32) -> u64 {
    let Some(identity) = tables.identity(balance.number) else {
        return NONE;
    };
    let is_local = balance.side.has(Options::LOCAL_SET);
    let mut key = AffinityKey { service: identity.service(), set: set(!is_local), ..*client };
    let mut other = NONE;
    let mut own = NONE;
    let mut turn = 0;
    while turn < 2 {
        key.set = set(is_local == (turn == 0));
        let found = slot_of_client(tables, balance, &key);
        if found <= u64::from(u32::MAX) {
            return found;
        }
        (own, other) = (other, found);
        turn += 1;
    }
    let slot = spread(balance, pick);
    let Some(backend) = tables.backend(slot) else {
        return NONE;
    };
    if own == ELSEWHERE && other == NONE {
        key.set = set(is_local);
        keep_for_other_set(tables, &key);
    }
    key.set = set(is_local);
    let value = AffinityValue {
        address: backend.address(),
        port: u32::from(backend.port()),
        joined: backend.joined(),
        service: key.service,
        backend: backend.id(),
        last_used: tables.now(),
    };
    tables.remember(&key, &value);
    u64::from(slot)
}

#[inline(always)]
fn set(is_local: bool) -> TrafficPolicy {
    if is_local { TrafficPolicy::Local } else { TrafficPolicy::Cluster }
}

/// What stands under `key` is by now in the other set only, and kept as that one's. A function of its own for its
/// stack, too.
#[inline(never)]
fn keep_for_other_set<T: Tables>(tables: &T, key: &AffinityKey) {
    if let Some(value) = tables.affinity(key) {
        let other = AffinityKey { set: set(matches!(key.set, TrafficPolicy::Cluster)), ..*key };
        tables.remember(&other, &value);
    }
}

/// The slot of the backend that stands under `key`, if it is in the set in force; it is remembered for longer then.
/// Else [`ELSEWHERE`] where it is in the port's other set, and [`NONE`] where it is in none or its time is over.
#[inline(never)]
fn slot_of_client<T: Tables>(tables: &T, balance: &Balance, key: &AffinityKey) -> u64 {
    let (Some(identity), Some(block)) = (tables.identity(balance.number), tables.block(balance.number))
    else {
        return NONE;
    };
    let Some(mut value) = tables.affinity(key) else {
        return NONE;
    };
    let now = tables.now();
    let timeout = u64::from(identity.affinity_timeout()) * 1_000_000_000;
    if value.service != key.service || elapsed(now, value.last_used) > timeout {
        return NONE;
    }
    let mut wanted = Wanted {
        address: value.address,
        port: value.port as u16,
        service: key.service,
        backend: value.backend,
        first: balance.side.first_slot(),
        count: balance.side.count(),
    };
    // First the set in force, as its word was when this connection was resolved: the block can have changed since.
    let in_force = tables.locate(&wanted);
    (wanted.first, wanted.count) = (block.first_slot(), block.in_sets());
    let Some(slot) = in_force.or_else(|| tables.locate(&wanted)) else {
        return NONE;
    };
    if tables.backend(slot).is_none_or(|backend| backend.joined() != value.joined) {
        return NONE;
    }
    if in_force.is_none() {
        return ELSEWHERE;
    }
    value.last_used = now;
    tables.remember(key, &value);
    u64::from(slot)
}

/// The client as `affinity` knows it, without the Service and the set.
#[inline(always)]
fn affinity_client(client: &Client) -> AffinityKey {
    let key = AffinityKey {
        client: client.address,
        service: 0,
        by_namespace: 0,
        set: TrafficPolicy::Cluster,
        _pad: 0,
    };
    if client.netns_cookie == 0 {
        return key;
    }
    let cookie = client.netns_cookie;
    let client = Address::from_words([0, 0, (cookie >> 32) as u32, cookie as u32]);
    AffinityKey { client, by_namespace: 1, ..key }
}
