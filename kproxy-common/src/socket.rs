//! What the socket hooks do: a backend at connect or send, the service address back on the way to the
//! process. The reverse translation lives with the socket, where nothing can evict it.

use crate::{
    Address, Choice, Client, ClientKind, Connection, Options, Protocol, Reason, Resolution, Tables, choose,
    elapsed, resolve, still_serves,
};

/// How many services one socket can speak to before the oldest record moves to `socket_overflow`.
pub const SOCKET_RECORDS: usize = 8;

/// One service address that a socket spoke to, and the backend that stands for it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketRecord {
    /// What the process asked for; loopback where it asked for the unspecified address.
    pub service_address: Address,
    /// Where it was sent.
    pub backend_address: Address,
    /// The port that the process asked for, host order.
    pub service_port: u16,
    /// The port that it was sent to, host order.
    pub backend_port: u16,
    /// The frontend's number.
    pub number: u32,
    /// [`ServiceIdentity::service`](crate::ServiceIdentity::service) of the backend.
    pub service: u32,
    /// [`Backend::id`](crate::Backend::id) of the backend, by which it is found again.
    pub backend: u32,
    /// The last datagram (TCP: the connect), in nanoseconds since boot.
    pub last_used: u64,
}

impl SocketRecord {
    /// A place that was never used.
    pub const EMPTY: Self = Self {
        service_address: Address::UNSPECIFIED,
        backend_address: Address::UNSPECIFIED,
        service_port: 0,
        backend_port: 0,
        number: 0,
        service: 0,
        backend: 0,
        last_used: 0,
    };

    #[inline(always)]
    fn is_for(&self, address: &Address, port: u16) -> bool {
        self.service_port == port && self.service_address == *address
    }
}

/// Value of `socket`. Sockets outlive agents, hence the version.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketRecords {
    version: u32,
    used: u32,
    /// Of a UDP socket whose first record was made by connect: who it is. Zero otherwise.
    connected: SocketIdentity,
    records: [SocketRecord; SOCKET_RECORDS],
}

/// Which socket of the machine it is.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct SocketIdentity {
    /// SO_COOKIE: never given out twice while the machine runs, and never 0.
    pub socket_cookie: u64,
    /// SO_NETNS_COOKIE of its network namespace.
    pub netns_cookie: u64,
}

/// A UDP socket that was connected to a service address, as the agent asks for it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConnectedSocket {
    /// Which it is.
    pub identity: SocketIdentity,
    /// What it asked for and where it was sent.
    pub record: SocketRecord,
}

impl SocketRecords {
    const VERSION: u32 = 3;

    /// No records.
    pub const fn new() -> Self {
        Self {
            version: Self::VERSION,
            used: 0,
            connected: SocketIdentity { socket_cookie: 0, netns_cookie: 0 },
            records: [SocketRecord::EMPTY; SOCKET_RECORDS],
        }
    }

    /// Forgets everything: the socket was connected to something that is no service.
    #[inline(always)]
    pub fn clear(&mut self) {
        self.version = Self::VERSION;
        self.used = 0;
        self.connected.socket_cookie = 0;
    }

    /// Holds just this record: the socket was connected. A UDP socket says who it is.
    #[inline(always)]
    pub fn set(&mut self, record: SocketRecord, identity: SocketIdentity) {
        self.version = Self::VERSION;
        self.used = 1;
        self.connected = identity;
        self.records[0] = record;
    }

    /// The UDP socket, if it was connected to a service address.
    #[inline(always)]
    pub fn connected(&self) -> Option<ConnectedSocket> {
        let is_connected = self.in_use() > 0 && self.connected.socket_cookie != 0;
        is_connected.then(|| ConnectedSocket { identity: self.connected, record: self.records[0] })
    }

    /// The record of a service address, if the socket spoke to it.
    #[inline(always)]
    pub fn for_service(&mut self, address: &Address, port: u16) -> Option<&mut SocketRecord> {
        let used = self.in_use();
        let mut i = 0;
        while i < SOCKET_RECORDS && i < used {
            if self.records[i].is_for(address, port) {
                return Some(&mut self.records[i]);
            }
            i += 1;
        }
        None
    }

    /// The record of a backend, if the socket was sent to it. Where several service addresses lead to it, the one
    /// that the socket spoke to last: what comes back does not tell which of them it answers.
    #[inline(always)]
    pub fn for_backend(&self, address: &Address, port: u16) -> Option<&SocketRecord> {
        let used = self.in_use();
        let mut latest: Option<&SocketRecord> = None;
        let mut i = 0;
        while i < SOCKET_RECORDS && i < used {
            let record = &self.records[i];
            if record.backend_port == port
                && record.backend_address == *address
                && latest.is_none_or(|latest| record.last_used >= latest.last_used)
            {
                latest = Some(record);
            }
            i += 1;
        }
        latest
    }

    /// The record that a datagram from this backend answers, as [`for_backend`](Self::for_backend), of those that are not
    /// over: used within `timeout` before `now` (nanoseconds). What a connected socket sends runs no hook, so that its
    /// record is never over.
    #[inline(always)]
    pub fn for_answer(
        &mut self,
        address: &Address,
        port: u16,
        now: u64,
        timeout: u64,
    ) -> Option<&mut SocketRecord> {
        let used = self.in_use();
        let is_connected = self.connected.socket_cookie != 0;
        let mut latest = SOCKET_RECORDS;
        let mut i = 0;
        while i < SOCKET_RECORDS && i < used {
            let record = &self.records[i];
            let is_of_connect = is_connected && i == 0;
            if record.backend_port == port
                && record.backend_address == *address
                && (is_of_connect || elapsed(now, record.last_used) <= timeout)
                && (latest == SOCKET_RECORDS
                    || record.last_used >= self.records[latest & (SOCKET_RECORDS - 1)].last_used)
            {
                latest = i;
            }
            i += 1;
        }
        // The mask tells the verifier what the loop guarantees.
        (latest < SOCKET_RECORDS).then(|| &mut self.records[latest & (SOCKET_RECORDS - 1)])
    }

    /// Adds a record: in the place of the same service address, else in a free place, else in that of the
    /// one used longest ago, which is returned.
    #[inline(always)]
    pub fn insert(&mut self, record: SocketRecord) -> Option<SocketRecord> {
        let used = self.in_use();
        self.version = Self::VERSION;
        // The record of a connect goes with the next connect, not before.
        let first = usize::from(self.connected.socket_cookie != 0);
        let mut oldest = first;
        let mut i = 0;
        while i < SOCKET_RECORDS {
            if i >= used {
                self.records[i] = record;
                self.used = i as u32 + 1;
                return None;
            }
            if self.records[i].is_for(&record.service_address, record.service_port) {
                self.records[i] = record;
                return None;
            }
            if i >= first && self.records[i].last_used < self.records[oldest & (SOCKET_RECORDS - 1)].last_used
            {
                oldest = i;
            }
            i += 1;
        }
        // The mask tells the verifier what the loop guarantees.
        let oldest = oldest & (SOCKET_RECORDS - 1);
        let evicted = self.records[oldest];
        self.records[oldest] = record;
        Some(evicted)
    }

    #[inline(always)]
    fn in_use(&self) -> usize {
        if self.version == Self::VERSION { self.used as usize } else { 0 }
    }
}

impl Default for SocketRecords {
    fn default() -> Self {
        Self::new()
    }
}

/// What a process asks of its socket.
#[derive(Debug)]
pub enum SocketCall<'a> {
    /// To be connected: balanced anew, whatever the socket spoke to before.
    Connect,
    /// To send a datagram to an address, with the socket's records, if it has any: a flow keeps its backend while that
    /// serves and the flow is not idle.
    Send(Option<&'a mut SocketRecords>),
}

/// What a socket hook does with a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SocketVerdict {
    /// The call goes where the process wants.
    Leave { reason: Reason, number: Option<u32> },
    /// The call fails with ECONNREFUSED.
    Refuse { reason: Reason },
    /// The call goes to the record's backend. `fresh`: it opens a connection or flow, to be counted and
    /// recorded.
    Translate { record: SocketRecord, fresh: bool },
}

const LEFT_TO_PACKETS: SocketVerdict = SocketVerdict::Leave { reason: Reason::LeftToPackets, number: None };

/// Decides about a call with this address. `pick` is a random number, asked for only when a backend is picked.
///
/// A connection that must be *dropped* is left untouched here: the packet hook on the way drops it, so that
/// the process sees what it would see with any other proxy, a timeout. So is, whatever is to become of it, what a
/// client opens that is opted out: its packets are served. A flow that began before goes on.
///
/// An unspecified destination is the client's own loopback address, which the kernel makes of it after this.
#[inline(always)]
pub fn socket_connection<T: Tables>(
    tables: &T,
    connection: &Connection,
    call: SocketCall<'_>,
    pick: impl FnOnce() -> u32,
) -> SocketVerdict {
    let connection = &Connection { destination: connection.destination.or_loopback(), ..*connection };
    let balance = match resolve(tables, connection) {
        Resolution::Balance(balance) => balance,
        Resolution::Pass { reason, number } => return SocketVerdict::Leave { reason, number },
        Resolution::Drop { reason, .. } => return SocketVerdict::Leave { reason, number: None },
        Resolution::Reject { .. } if is_opted_out(tables, &connection.client) => return LEFT_TO_PACKETS,
        // Connecting a UDP socket sends nothing, and many do so only to learn their own address (ping, getaddrinfo).
        // What is sent then is refused where it leaves its pod or this host. Not so where a Service has no endpoints: what
        // the host sends to its addresses outside of ServiceCIDRs would leave.
        Resolution::Reject { reason: Reason::UndefinedPort, .. }
            if matches!((&call, connection.protocol), (SocketCall::Connect, Protocol::Udp)) =>
        {
            return LEFT_TO_PACKETS;
        }
        Resolution::Reject { reason, .. } => return SocketVerdict::Refuse { reason },
    };
    // A pod that is to be masked is so where its packets leave it. The host's own address is the node's already.
    if balance.side.has(Options::MASQUERADE) && matches!(connection.client.kind, ClientKind::Pod) {
        return LEFT_TO_PACKETS;
    }
    if let SocketCall::Send(Some(records)) = call
        && let Some(record) = records.for_service(&connection.destination, connection.port)
        && let Some(record) = continued(tables, balance.number, record)
    {
        return SocketVerdict::Translate { record, fresh: false };
    }
    if is_opted_out(tables, &connection.client) {
        return LEFT_TO_PACKETS;
    }
    let Some(Choice { backend, .. }) = choose(tables, &balance, &connection.client, pick()) else {
        return SocketVerdict::Leave { reason: Reason::TableError, number: Some(balance.number) };
    };
    let last_used = if matches!(connection.protocol, Protocol::Udp) { tables.now() } else { 0 };
    let record = SocketRecord {
        service_address: connection.destination,
        backend_address: backend.address(),
        service_port: connection.port,
        backend_port: backend.port(),
        number: balance.number,
        service: backend.service(),
        backend: backend.id(),
        last_used,
    };
    SocketVerdict::Translate { record, fresh: true }
}

/// Whether the socket hooks leave what this client opens to the packet hooks.
#[inline(always)]
fn is_opted_out<T: Tables>(tables: &T, client: &Client) -> bool {
    if !matches!(client.kind, ClientKind::Pod) {
        return false;
    }
    let Some(config) = tables.config() else {
        return false;
    };
    config.host_sockets_only != 0 || config.some_opted_out != 0 && tables.opted_out(client.netns_cookie)
}

/// The record, brought up to date, if its flow goes on.
#[inline(always)]
fn continued<T: Tables>(tables: &T, number: u32, record: &mut SocketRecord) -> Option<SocketRecord> {
    let now = tables.now();
    if !is_alive(tables, record.last_used, now) {
        return None;
    }
    let SocketRecord { service, backend_address, backend_port, backend, .. } = record;
    if !still_serves(tables, number, *service, backend_address, *backend_port, *backend) {
        return None;
    }
    record.number = number;
    record.last_used = now;
    Some(*record)
}

/// How long a UDP flow may idle, in nanoseconds.
#[inline(always)]
fn udp_timeout<T: Tables>(tables: &T) -> Option<u64> {
    Some(tables.config()?.udp_timeout)
}

/// Whether a UDP flow that was last used then (nanoseconds since boot) is not over `now`.
#[inline(always)]
pub fn is_alive<T: Tables>(tables: &T, last_used: u64, now: u64) -> bool {
    udp_timeout(tables).is_some_and(|timeout| elapsed(now, last_used) <= timeout)
}

/// The service address behind which a backend has answered, for recvmsg; the answer keeps the flow alive. A datagram
/// that comes when the flow has idled for longer than conntrack would keep it is the backend's own.
#[inline(always)]
pub fn answered<T: Tables>(
    tables: &T,
    records: &mut SocketRecords,
    address: &Address,
    port: u16,
) -> Option<(Address, u16)> {
    let (now, timeout) = (tables.now(), udp_timeout(tables)?);
    let record = records.for_answer(address, port, now, timeout)?;
    record.last_used = now;
    Some((record.service_address, record.service_port))
}

/// The service address that a socket was connected to, for getpeername. It stands as long as the connection does.
#[inline(always)]
pub fn original_address(records: &SocketRecords, address: &Address, port: u16) -> Option<(Address, u16)> {
    let record = records.for_backend(address, port)?;
    Some((record.service_address, record.service_port))
}

const _: () = {
    assert!(size_of::<SocketRecord>() == 56);
    assert!(size_of::<SocketRecords>() == 24 + SOCKET_RECORDS * 56);
    assert!(size_of::<ConnectedSocket>() == 16 + 56);
};

#[cfg(test)]
mod tests {
    use super::*;

    fn record(n: u32, last_used: u64) -> SocketRecord {
        SocketRecord {
            service_address: Address::from_v4_word(n),
            backend_address: Address::from_v4_word(n + 1_000),
            service_port: 53,
            backend_port: 5_353,
            last_used,
            ..SocketRecord::EMPTY
        }
    }

    #[test]
    fn several_services_are_remembered_at_once() {
        let mut records = SocketRecords::new();
        for n in 0..8 {
            assert_eq!(records.insert(record(n, u64::from(n) + 1)), None);
        }
        for n in 0..8 {
            let back = original_address(&records, &Address::from_v4_word(n + 1_000), 5_353);
            assert_eq!(back, Some((Address::from_v4_word(n), 53)));
        }
        assert_eq!(original_address(&records, &Address::from_v4_word(1_000), 53), None, "other port");
    }

    #[test]
    fn an_answer_comes_from_the_service_that_was_asked_last() {
        let same_backend =
            |n, last_used| SocketRecord { backend_address: Address::from_v4_word(7), ..record(n, last_used) };
        let mut records = SocketRecords::new();
        let answered = |records: &SocketRecords| original_address(records, &Address::from_v4_word(7), 5_353);
        for (n, last_used) in [(1, 10), (2, 20), (3, 15)] {
            records.insert(same_backend(n, last_used));
        }
        assert_eq!(answered(&records), Some((Address::from_v4_word(2), 53)));
        records.insert(same_backend(1, 30));
        assert_eq!(answered(&records), Some((Address::from_v4_word(1), 53)));
    }

    #[test]
    fn an_answer_is_translated_while_the_flow_lives() {
        const SECOND: u64 = 1_000_000_000;
        let mut records = SocketRecords::new();
        let is_answered = |records: &mut SocketRecords, n: u32, now: u64| {
            let record = records.for_answer(&Address::from_v4_word(n + 1_000), 5_353, now, 30 * SECOND);
            record.map(|record| record.last_used = now).is_some()
        };
        records.insert(record(1, SECOND));
        assert!(is_answered(&mut records, 1, 31 * SECOND), "at the last moment");
        assert!(is_answered(&mut records, 1, 61 * SECOND), "kept alive by the answer before");
        assert!(!is_answered(&mut records, 1, 91 * SECOND + 1));
        assert!(!is_answered(&mut records, 2, 61 * SECOND), "not asked");

        // What a connected socket sends runs no hook.
        records.set(record(3, SECOND), SocketIdentity { socket_cookie: 7, netns_cookie: 1 });
        records.insert(record(4, SECOND));
        assert!(is_answered(&mut records, 3, 10_000 * SECOND));
        assert!(!is_answered(&mut records, 4, 10_000 * SECOND));
        let peer = original_address(&records, &Address::from_v4_word(1_003), 5_353);
        assert_eq!(peer, Some((Address::from_v4_word(3), 53)), "as getpeername tells");
    }

    #[test]
    fn the_one_used_longest_ago_makes_room() {
        let mut records = SocketRecords::new();
        for n in 0..8 {
            records.insert(record(n, 100 - u64::from(n)));
        }
        assert_eq!(records.insert(record(9, 200)), Some(record(7, 93)));
        assert!(records.for_service(&Address::from_v4_word(7), 53).is_none());
        assert!(records.for_service(&Address::from_v4_word(9), 53).is_some());
    }

    #[test]
    fn the_same_service_keeps_its_place_and_a_connect_forgets_the_rest() {
        let mut records = SocketRecords::new();
        records.insert(record(1, 1));
        records.insert(record(2, 2));
        records.insert(SocketRecord { backend_port: 1, ..record(1, 3) });
        assert_eq!(records.in_use(), 2);
        records.set(record(5, 5), SocketIdentity::default());
        assert!(records.for_service(&Address::from_v4_word(2), 53).is_none());
        records.clear();
        assert!(records.for_service(&Address::from_v4_word(5), 53).is_none());
    }

    #[test]
    fn a_connected_socket_says_who_it_is_until_it_is_connected_elsewhere() {
        let identity = SocketIdentity { socket_cookie: 77, netns_cookie: 1 };
        let mut records = SocketRecords::new();
        records.insert(record(1, 1));
        assert_eq!(records.connected(), None, "it only sent");
        records.set(record(2, 0), identity);
        for n in 3..20 {
            records.insert(record(n, u64::from(n)));
        }
        assert_eq!(records.connected(), Some(ConnectedSocket { identity, record: record(2, 0) }));
        records.clear();
        assert_eq!(records.connected(), None);
        records.set(record(2, 0), SocketIdentity::default());
        assert_eq!(records.connected(), None, "not UDP");
    }

    #[test]
    fn records_of_another_version_do_not_count() {
        let mut records = SocketRecords::new();
        records.insert(record(1, 1));
        records.version = 99;
        assert!(records.for_service(&Address::from_v4_word(1), 53).is_none());
        records.insert(record(2, 2));
        assert_eq!(records.in_use(), 1);
    }
}
