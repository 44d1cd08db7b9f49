//! What a worker is told and what it answers: one JSON object a line, each way.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::member::Family;

/// A socket or a burst, as the worker numbers them.
pub type Id = u64;

#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    UseSeldomHeaders,
    TcpConnect {
        to: SocketAddr,
        bind: Option<SocketAddr>,
        timeout_ms: u64,
    },
    TcpAsk {
        id: Id,
        send: String,
        timeout_ms: u64,
    },
    HttpGet {
        id: Id,
        host: String,
        timeout_ms: u64,
    },
    TcpTransfer {
        id: Id,
        up: u64,
        down: u64,
        timeout_ms: u64,
    },
    UdpSocket {
        family: WireFamily,
        bind: Option<SocketAddr>,
    },
    /// `None` dissolves the connection.
    UdpConnect {
        id: Id,
        to: Option<SocketAddr>,
    },
    /// `None` sends to the connected address.
    UdpSend {
        id: Id,
        to: Option<SocketAddr>,
        data: String,
    },
    /// As `UdpSend`: datagrams of `size` octets, by one call.
    UdpSendSegments {
        id: Id,
        to: Option<SocketAddr>,
        data: String,
        size: u16,
    },
    UdpReceive {
        id: Id,
        timeout_ms: u64,
    },
    Probe {
        to: SocketAddr,
        tcp: bool,
        hops: u8,
        timeout_ms: u64,
    },
    Names {
        id: Id,
    },
    Close {
        id: Id,
    },
    Echo {
        name: String,
        addresses: Vec<IpAddr>,
        port: u16,
    },
    BurstStart(BurstSpec),
    BurstStop {
        id: Id,
        /// Whether to end it now, or to wait until its count or time is reached.
        now: bool,
    },
    BurstLook {
        id: Id,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    Done(serde_json::Value),
    /// A system call failed, as scenarios expect of some.
    Errno {
        call: String,
        number: i32,
    },
    /// The worker could not do it.
    Failed(String),
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum WireFamily {
    V4,
    V6,
}

impl From<Family> for WireFamily {
    fn from(family: Family) -> Self {
        match family {
            Family::V4 => Self::V4,
            Family::V6 => Self::V6,
        }
    }
}

/// A socket that is there, with its names as the kernel tells its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// The worker's number for it.
    pub id: Id,
    /// `getsockname`.
    pub local: SocketAddr,
    /// `getpeername`; `None` where it is not connected.
    pub peer: Option<SocketAddr>,
}

/// A datagram that arrived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Its content.
    pub data: String,
    /// The sender, as `recvfrom` tells.
    pub from: SocketAddr,
}

/// What comes of a packet that may go a few hops only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Probed {
    /// The other end answered: with a datagram, or by accepting the connection.
    Answered,
    /// An ICMP or ICMPv6 error about it came.
    Error {
        /// Who says so.
        from: IpAddr,
        /// The message's type.
        kind: u8,
        /// Its code.
        code: u8,
    },
}

/// What an echo server answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The server's name: its member's.
    pub server: String,
    /// The client's address, as the server sees it.
    pub client: SocketAddr,
    /// The address that the server was asked at.
    pub local: SocketAddr,
    /// What was sent.
    pub data: String,
}

/// Many short connections, one after the other, by several threads.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BurstSpec {
    /// Where to.
    pub to: SocketAddr,
    /// How many threads connect at the same time.
    pub concurrency: usize,
    /// The end, by number of connections; `None`: no such end.
    pub count: Option<u64>,
    /// The end, by time; `None`: no such end.
    pub seconds: Option<f64>,
    /// What one connection may take, with its request, in milliseconds.
    pub timeout_ms: u64,
    /// Whether connections are only made and closed, without a request.
    pub connect_only: bool,
    /// What a thread waits between two connections, in milliseconds.
    pub pause_ms: u64,
}

impl BurstSpec {
    /// Connections with one request each to an echo server, by two threads, until told to stop;
    /// 2 s for each.
    pub fn new(to: SocketAddr) -> Self {
        Self {
            to,
            concurrency: 2,
            count: None,
            seconds: None,
            timeout_ms: 2000,
            connect_only: false,
            pause_ms: 0,
        }
    }

    /// Ends it after so many connections.
    pub fn count(mut self, count: u64) -> Self {
        self.count = Some(count);
        self
    }

    /// Ends it after so many seconds.
    pub fn seconds(mut self, seconds: f64) -> Self {
        self.seconds = Some(seconds);
        self
    }

    /// Sets how many threads connect at the same time.
    pub fn concurrency(mut self, threads: usize) -> Self {
        self.concurrency = threads;
        self
    }

    /// Sets what one connection may take.
    pub fn timeout_ms(mut self, milliseconds: u64) -> Self {
        self.timeout_ms = milliseconds;
        self
    }

    /// Sets what a thread waits between two connections: a stream that leaves the machine to others too.
    pub fn pause_ms(mut self, milliseconds: u64) -> Self {
        self.pause_ms = milliseconds;
        self
    }

    /// Only connects and closes, without a request: the server can be any.
    pub fn connect_only(mut self) -> Self {
        self.connect_only = true;
        self
    }
}

/// What came of a burst.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BurstReport {
    /// Connections that were made, asked, answered and closed.
    pub ok: u64,
    /// The others, by what failed: `connect ECONNREFUSED`.
    pub failed: BTreeMap<String, u64>,
    /// Answers, by the server's name.
    pub servers: BTreeMap<String, u64>,
    /// How long it ran.
    pub seconds: f64,
}

impl BurstReport {
    /// How many failed, whatever the reason.
    pub fn failures(&self) -> u64 {
        self.failed.values().sum()
    }
}
