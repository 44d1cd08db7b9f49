//! The socket hooks: connect, sendmsg, recvmsg and getpeername, of both families.

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock_addr,
    helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_set_retval},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use kproxy_common::{
    Address, Client, ClientKind, Connection, FlowTables as _, Protocol, Reason, SocketCall, SocketIdentity,
    SocketRecord, SocketRecords, SocketVerdict, Tables as _, answered, is_alive, original_address,
    socket_connection,
};

use crate::{
    count::count_reason,
    drops,
    kernel::KERNEL,
    maps::{self, OverflowKey, OverflowValue},
};

const ECONNREFUSED: i32 = 111;
/// What a sock_addr program returns to let the call go on.
const GO_ON: i32 = 1;
/// What it returns to make the call fail: with EPERM, unless another error was set.
const FAIL: i32 = 0;

/// Set by the agent when it loads: whether the kernel has bpf_set_retval (5.18).
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: u32 = 1;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect(&V4::of(&ctx))
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect(&V6::of(&ctx))
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sendmsg(&V4::of(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    sendmsg(&V6::of(&ctx))
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    recvmsg(&V4::of(&ctx))
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    recvmsg(&V6::of(&ctx))
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    getpeername(&V4::of(&ctx))
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    getpeername(&V6::of(&ctx))
}

/// The address of a socket call, in the family of the hook.
trait Call {
    fn ctx(&self) -> &SockAddrContext;
    fn address(&self) -> Address;
    fn set_address(&self, address: &Address);

    #[inline(always)]
    fn raw(&self) -> *mut bpf_sock_addr {
        self.ctx().sock_addr
    }

    #[inline(always)]
    fn port(&self) -> u16 {
        // SAFETY: the context is valid for the program's run.
        u16::from_be(unsafe { (*self.raw()).user_port } as u16)
    }

    #[inline(always)]
    fn set(&self, address: &Address, port: u16) {
        self.set_address(address);
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.raw()).user_port = u32::from(port.to_be()) };
    }

    #[inline(always)]
    fn connection(&self) -> Option<Connection> {
        // By protocol, never by socket type: a ping socket is SOCK_DGRAM too.
        // SAFETY: the context is valid for the program's run.
        let protocol = match unsafe { (*self.raw()).protocol } {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            _ => return None,
        };
        // SAFETY: the helper takes the program's own context.
        let netns_cookie = unsafe { bpf_get_netns_cookie(self.ctx().as_ptr()) };
        let is_host = match KERNEL.config() {
            Some(config) if config.host_netns_cookie == 0 => {
                // SAFETY: without a context the helper tells the initial namespace's cookie.
                netns_cookie == unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) }
            }
            Some(config) => netns_cookie == config.host_netns_cookie,
            None => return None,
        };
        Some(Connection {
            client: Client {
                kind: if is_host { ClientKind::Host } else { ClientKind::Pod },
                // None yet. Built from words: the zero of an octet array becomes a call of a loop over octets.
                address: Address::from_v4_word(0),
                netns_cookie,
            },
            destination: self.address(),
            port: self.port(),
            protocol,
        })
    }

    /// The records of this socket, if it has any.
    #[inline(always)]
    fn records(&self) -> Option<&'static mut SocketRecords> {
        // SAFETY: the pointer is null or valid for the program's run. Another CPU may use the same socket at the
        // same time; records are words that are verified before they are used.
        unsafe { maps::SOCKET.get_ptr_mut(self.ctx()).as_mut() }
    }

    /// The records of this socket, made if need be.
    #[inline(always)]
    fn records_or_new(&self) -> Option<&'static mut SocketRecords> {
        // SAFETY: as for `records`.
        unsafe { maps::SOCKET.get_or_insert_ptr_mut(self.ctx(), None).as_mut() }
    }
}

struct V4<'a>(&'a SockAddrContext);

impl<'a> V4<'a> {
    #[inline(always)]
    fn of(ctx: &'a SockAddrContext) -> Self {
        Self(ctx)
    }
}

impl Call for V4<'_> {
    #[inline(always)]
    fn ctx(&self) -> &SockAddrContext {
        self.0
    }

    #[inline(always)]
    fn address(&self) -> Address {
        // SAFETY: the context is valid for the program's run.
        Address::from_v4_word(unsafe { (*self.raw()).user_ip4 })
    }

    #[inline(always)]
    fn set_address(&self, address: &Address) {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.raw()).user_ip4 = address.v4_word() };
    }
}

struct V6<'a>(&'a SockAddrContext);

impl<'a> V6<'a> {
    #[inline(always)]
    fn of(ctx: &'a SockAddrContext) -> Self {
        Self(ctx)
    }
}

impl Call for V6<'_> {
    #[inline(always)]
    fn ctx(&self) -> &SockAddrContext {
        self.0
    }

    #[inline(always)]
    fn address(&self) -> Address {
        let raw = self.raw();
        // SAFETY: the context is valid for the program's run. Word by word: context fields are read one load each.
        unsafe {
            Address::from_words([
                core::ptr::read_volatile(&raw const (*raw).user_ip6[0]),
                core::ptr::read_volatile(&raw const (*raw).user_ip6[1]),
                core::ptr::read_volatile(&raw const (*raw).user_ip6[2]),
                core::ptr::read_volatile(&raw const (*raw).user_ip6[3]),
            ])
        }
    }

    #[inline(always)]
    fn set_address(&self, address: &Address) {
        let raw = self.raw();
        let [a, b, c, d] = address.words();
        // SAFETY: as for `address`.
        unsafe {
            core::ptr::write_volatile(&raw mut (*raw).user_ip6[0], a);
            core::ptr::write_volatile(&raw mut (*raw).user_ip6[1], b);
            core::ptr::write_volatile(&raw mut (*raw).user_ip6[2], c);
            core::ptr::write_volatile(&raw mut (*raw).user_ip6[3], d);
        }
    }
}

#[inline(always)]
fn connect(call: &impl Call) -> i32 {
    let Some(connection) = call.connection() else {
        return GO_ON;
    };
    let verdict = socket_connection(&KERNEL, &connection, SocketCall::Connect, random);
    count(&verdict);
    match verdict {
        SocketVerdict::Leave { .. } => {
            // What was said through an earlier connect of this socket no longer stands.
            if let Some(records) = call.records() {
                records.clear();
            }
            GO_ON
        }
        SocketVerdict::Refuse { reason } => {
            tell(&connection, reason);
            if set_refused() {
                return FAIL;
            }
            // An older kernel knows EPERM only. Port 0 of loopback refuses, as the service would.
            call.set(&loopback(&connection.destination), 0);
            GO_ON
        }
        SocketVerdict::Translate { record, fresh: _ } => {
            let peer_wanted = KERNEL.config().is_some_and(|config| config.remember_peer != 0);
            if (peer_wanted || matches!(connection.protocol, Protocol::Udp))
                && let Some(records) = call.records_or_new()
            {
                records.set(record, identity(call, &connection));
            }
            call.set(&record.backend_address, record.backend_port);
            GO_ON
        }
    }
}

#[inline(always)]
fn sendmsg(call: &impl Call) -> i32 {
    let Some(connection) = call.connection() else {
        return GO_ON;
    };
    let verdict = socket_connection(&KERNEL, &connection, SocketCall::Send(call.records()), random);
    count(&verdict);
    match verdict {
        SocketVerdict::Leave { .. } => GO_ON,
        SocketVerdict::Refuse { reason } => {
            tell(&connection, reason);
            // Without bpf_set_retval the datagram fails with EPERM: nothing else stops it on such kernels.
            set_refused();
            FAIL
        }
        SocketVerdict::Translate { record, fresh } => {
            if fresh
                && let Some(records) = call.records_or_new()
                && let Some(evicted) = records.insert(record)
            {
                overflow(call, &evicted);
            }
            call.set(&record.backend_address, record.backend_port);
            GO_ON
        }
    }
}

/// The process sees the address that it was connected to, not the backend's.
#[inline(always)]
fn getpeername(call: &impl Call) -> i32 {
    if let Some(records) = call.records()
        && let Some((address, port)) = original_address(records, &call.address(), call.port())
    {
        call.set(&address, port);
    }
    GO_ON
}

/// The process sees that the address answers that it asked, not the backend's.
#[inline(always)]
fn recvmsg(call: &impl Call) -> i32 {
    let Some(records) = call.records() else {
        return GO_ON;
    };
    let (address, port) = (call.address(), call.port());
    if let Some((address, port)) = answered(&KERNEL, records, &address, port) {
        call.set(&address, port);
        return GO_ON;
    }
    let key = overflow_key(call, &address, port);
    let Some(place) = maps::SOCKET_OVERFLOW.get_ptr_mut(&key) else {
        return GO_ON;
    };
    // SAFETY: the pointer is valid for the program's run. Copied at once; the value carries the cookie, compared below.
    let value = unsafe { *place };
    let now = KERNEL.now();
    if value.socket_cookie == key.socket_cookie && is_alive(&KERNEL, value.last_used, now) {
        // SAFETY: as above; the field is written by one store.
        unsafe { (*place).last_used = now };
        call.set(&value.address, value.port as u16);
    }
    GO_ON
}

/// Counts what is new: by its reason, and a connection or flow for its frontend. In one place for all verdicts, so
/// that a program has the code once.
#[inline(always)]
fn count(verdict: &SocketVerdict) {
    let (reason, number) = match *verdict {
        SocketVerdict::Leave { reason, number } => (reason, number),
        SocketVerdict::Refuse { reason } => (reason, None),
        SocketVerdict::Translate { record, fresh: true } => (Reason::Forwarded, Some(record.number)),
        SocketVerdict::Translate { .. } => return,
    };
    count_reason(reason);
    if let (Reason::PassThrough | Reason::Forwarded, Some(number)) = (reason, number) {
        KERNEL.count(number, matches!(reason, Reason::Forwarded));
    }
}

/// Tells whoever listens of a refusal.
#[inline(always)]
fn tell(connection: &Connection, reason: Reason) {
    let Connection { destination, port, protocol, client: _ } = connection;
    drops::socket(destination, *port, *protocol, reason);
}

#[inline(always)]
fn overflow(call: &impl Call, record: &SocketRecord) {
    let key = overflow_key(call, &record.backend_address, record.backend_port);
    let value = OverflowValue {
        socket_cookie: key.socket_cookie,
        address: record.service_address,
        port: u32::from(record.service_port),
        _pad: 0,
        last_used: record.last_used,
    };
    // Without room an answer of this backend would show the backend's address: the LRU makes room.
    let _ = maps::SOCKET_OVERFLOW.insert(&key, &value, 0);
}

/// Of a UDP socket. TCP connections are never cut, so nobody asks for theirs.
#[inline(always)]
fn identity(call: &impl Call, connection: &Connection) -> SocketIdentity {
    if !matches!(connection.protocol, Protocol::Udp) {
        return SocketIdentity { socket_cookie: 0, netns_cookie: 0 };
    }
    // SAFETY: the helper takes the program's own context.
    let socket_cookie = unsafe { bpf_get_socket_cookie(call.ctx().as_ptr()) };
    SocketIdentity { socket_cookie, netns_cookie: connection.client.netns_cookie }
}

#[inline(always)]
fn overflow_key(call: &impl Call, address: &Address, port: u16) -> OverflowKey {
    // SAFETY: the helper takes the program's own context.
    let socket_cookie = unsafe { bpf_get_socket_cookie(call.ctx().as_ptr()) };
    OverflowKey { socket_cookie, address: *address, port: u32::from(port), _pad: 0 }
}

#[inline(always)]
fn set_refused() -> bool {
    // SAFETY: a static of this program; volatile, since the agent changes it before loading.
    if unsafe { core::ptr::read_volatile(&raw const HAS_SET_RETVAL) } == 0 {
        return false;
    }
    // SAFETY: the helper has no conditions in connect and sendmsg programs.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    true
}

#[inline(always)]
fn loopback(family_of: &Address) -> Address {
    if family_of.is_v4() {
        Address::from_v4_word(0x7f00_0001_u32.to_be())
    } else {
        Address::from_words([0, 0, 0, 1_u32.to_be()])
    }
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: the helper has no conditions.
    unsafe { bpf_get_prandom_u32() }
}
