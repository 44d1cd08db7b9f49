//! Workers: helper processes in members, with real sockets that live as long as a scenario wants.
//!
//! A worker is this very program, started again with an argument of its own, that is told what to
//! do over its standard input and answers over its standard output.

mod burst;
mod echo;
mod probe;
mod protocol;
mod serve;
mod sockets;
mod transfer;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::process::{ChildStdin, ChildStdout, ExitCode};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use nix::errno::Errno;
use serde::de::DeserializeOwned;

pub use protocol::{Answer, BurstReport, BurstSpec, Datagram, Id, Probed, Socket};

use crate::member::{Family, Member};
use crate::process::Process;
use protocol::{Reply, Request};

/// The argument that makes this program a worker.
const ARGUMENT: &str = "__worker";

/// What one call may take, unless told.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Serves as a worker and returns its exit code, if this process was started as one.
///
/// [`crate::isolated`] calls it; a program that does other things first must call it before them.
pub fn serve_if_asked() -> Option<ExitCode> {
    let asked = std::env::args_os().nth(1).is_some_and(|first| first == ARGUMENT);
    asked.then(serve::serve)
}

/// What a worker could not do.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A system call failed: what scenarios look at.
    #[error("{call}: {errno}")]
    Errno {
        /// The system call's name.
        call: String,
        /// What it gave.
        errno: Errno,
    },
    /// The worker itself failed or is gone.
    #[error("{0:#}")]
    Broken(anyhow::Error),
}

impl WorkerError {
    /// What the system call gave, if that was it.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Errno { errno, .. } => Some(*errno),
            Self::Broken(_) => None,
        }
    }
}

/// A result of a worker's call.
pub type WorkerResult<T> = Result<T, WorkerError>;

/// A helper process in a member. Calls are made one after the other; bursts and servers run on in
/// the background. Its sockets live until closed, or until this is dropped.
#[derive(Debug)]
pub struct Worker {
    pipes: Mutex<Pipes>,
    process: Process,
}

#[derive(Debug)]
struct Pipes {
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Worker {
    pub(crate) fn start(member: &Member) -> Result<Self> {
        let mut process = member.command("/proc/self/exe")?.arg(ARGUMENT).spawn_piped()?;
        let to = process.child.stdin.take().context("a worker has no input")?;
        let from = process.child.stdout.take();
        let from = BufReader::new(from.context("a worker has no output")?);
        Ok(Self { pipes: Mutex::new(Pipes { to, from }), process })
    }

    /// Its process, whose id can be looked up.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// All sockets that are made from now on send IPv4 options, or IPv6 extension headers.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn use_seldom_headers(&self) -> WorkerResult<()> {
        self.call(&Request::UseSeldomHeaders)
    }

    /// Makes a TCP connection, which stays open; 3 s at most.
    ///
    /// # Errors
    /// With connect's errno; ETIMEDOUT when the time is over.
    pub fn tcp_connect(&self, to: SocketAddr) -> WorkerResult<Socket> {
        self.tcp_connect_with(to, None, TIMEOUT)
    }

    /// Makes a TCP connection from an address (port 0: any), with a time limit.
    ///
    /// # Errors
    /// With bind's or connect's errno; ETIMEDOUT when the time is over.
    pub fn tcp_connect_with(
        &self,
        to: SocketAddr,
        bind: Option<SocketAddr>,
        timeout: Duration,
    ) -> WorkerResult<Socket> {
        self.call(&Request::TcpConnect { to, bind, timeout_ms: milliseconds(timeout) })
    }

    /// Sends a line on an open connection and returns the line that comes back; 3 s at most.
    ///
    /// # Errors
    /// With the errno of what failed: EAGAIN when the time is over, EPIPE when the other side has
    /// closed.
    pub fn tcp_request(&self, id: Id, send: &str) -> WorkerResult<String> {
        self.call(&Request::TcpAsk { id, send: send.to_owned(), timeout_ms: milliseconds(TIMEOUT) })
    }

    /// Asks an echo server on an open connection.
    ///
    /// # Errors
    /// As [`Worker::tcp_request`], and when the answer is no echo server's.
    pub fn tcp_ask(&self, id: Id, send: &str) -> WorkerResult<Answer> {
        answer(&self.tcp_request(id, send)?)
    }

    /// Asks for `/` by HTTP on an open connection, which stays open, and returns the body of the
    /// answer, whatever its status; 3 s at most.
    ///
    /// # Errors
    /// As [`Worker::tcp_request`]; EPROTO when the answer is not HTTP/1.1 with a Content-Length.
    pub fn http_get(&self, id: Id, host: &str) -> WorkerResult<String> {
        self.call(&Request::HttpGet { id, host: host.to_owned(), timeout_ms: milliseconds(TIMEOUT) })
    }

    /// Asks an echo server on a connection of its own: connect, ask, close.
    ///
    /// # Errors
    /// As [`Worker::tcp_connect`] and [`Worker::tcp_ask`].
    pub fn ask_tcp(&self, to: SocketAddr) -> WorkerResult<Answer> {
        let socket = self.tcp_connect(to)?;
        let answer = self.tcp_ask(socket.id, "hello");
        self.close(socket.id)?;
        answer
    }

    /// Sends so many bytes to an echo server on an open connection, then receives so many; both
    /// sides check each byte. 10 s at most without progress.
    ///
    /// # Errors
    /// With the errno of what failed: EPIPE when the server did not get what was sent, EBADMSG when
    /// what came back is not what it sent.
    pub fn tcp_transfer(&self, id: Id, up: u64, down: u64) -> WorkerResult<()> {
        self.call(&Request::TcpTransfer { id, up, down, timeout_ms: 10_000 })
    }

    /// Makes a UDP socket.
    ///
    /// # Errors
    /// With the errno of socket or bind.
    pub fn udp_socket(&self, family: Family) -> WorkerResult<Socket> {
        self.call(&Request::UdpSocket { family: family.into(), bind: None })
    }

    /// Makes a UDP socket with an address of its own; an IPv6 one serves `::ffff:` addresses too.
    ///
    /// # Errors
    /// With the errno of socket or bind.
    pub fn udp_socket_at(&self, bind: SocketAddr) -> WorkerResult<Socket> {
        let family = match bind {
            SocketAddr::V4(_) => Family::V4,
            SocketAddr::V6(_) => Family::V6,
        };
        self.call(&Request::UdpSocket { family: family.into(), bind: Some(bind) })
    }

    /// Connects a UDP socket, or connects it elsewhere.
    ///
    /// # Errors
    /// With connect's errno.
    pub fn udp_connect(&self, id: Id, to: SocketAddr) -> WorkerResult<Socket> {
        self.call(&Request::UdpConnect { id, to: Some(to) })
    }

    /// Dissolves a UDP socket's connection (connect to AF_UNSPEC).
    ///
    /// # Errors
    /// With connect's errno.
    pub fn udp_disconnect(&self, id: Id) -> WorkerResult<Socket> {
        self.call(&Request::UdpConnect { id, to: None })
    }

    /// Sends a datagram to an address.
    ///
    /// # Errors
    /// With sendto's errno.
    pub fn udp_send_to(&self, id: Id, to: SocketAddr, data: &str) -> WorkerResult<()> {
        let data = data.to_owned();
        self.call(&Request::UdpSend { id, to: Some(to), data })
    }

    /// Sends a datagram to the connected address.
    ///
    /// # Errors
    /// With send's errno.
    pub fn udp_send(&self, id: Id, data: &str) -> WorkerResult<()> {
        let data = data.to_owned();
        self.call(&Request::UdpSend { id, to: None, data })
    }

    /// Sends datagrams of `size` octets, the last perhaps shorter, by one call (UDP_SEGMENT); to the connected address
    /// without `to`.
    ///
    /// # Errors
    /// With the errno of setsockopt or sendto.
    pub fn udp_send_segments(
        &self,
        id: Id,
        to: Option<SocketAddr>,
        data: &str,
        size: u16,
    ) -> WorkerResult<()> {
        self.call(&Request::UdpSendSegments { id, to, data: data.to_owned(), size })
    }

    /// Waits for a datagram.
    ///
    /// # Errors
    /// With recvfrom's errno: EAGAIN when the time is over, ECONNREFUSED on a connected socket
    /// when the other side said so.
    pub fn udp_receive(&self, id: Id, timeout: Duration) -> WorkerResult<Datagram> {
        self.call(&Request::UdpReceive { id, timeout_ms: milliseconds(timeout) })
    }

    /// Asks an echo server over UDP, on an unconnected socket of its own, and returns its answer
    /// with the address that the answer came from; 1 s at most.
    ///
    /// # Errors
    /// As the single calls.
    pub fn ask_udp(&self, to: SocketAddr) -> WorkerResult<(Answer, SocketAddr)> {
        let family = match to {
            SocketAddr::V4(_) => Family::V4,
            SocketAddr::V6(_) => Family::V6,
        };
        let socket = self.udp_socket(family)?;
        let result = self
            .udp_send_to(socket.id, to, "hello")
            .and_then(|()| self.udp_receive(socket.id, Duration::from_secs(1)));
        self.close(socket.id)?;
        let datagram = result?;
        Ok((answer(&datagram.data)?, datagram.from))
    }

    /// Sends a datagram (to an echo server), or opens a connection, that may go so many hops; 2 s at most.
    ///
    /// # Errors
    /// With the errno of what failed: ETIMEDOUT when nothing comes back.
    pub fn probe(&self, to: SocketAddr, tcp: bool, hops: u8) -> WorkerResult<Probed> {
        self.call(&Request::Probe { to, tcp, hops, timeout_ms: 2_000 })
    }

    /// What getsockname and getpeername say now.
    ///
    /// # Errors
    /// With their errno.
    pub fn names(&self, id: Id) -> WorkerResult<Socket> {
        self.call(&Request::Names { id })
    }

    /// What getpeername says now.
    ///
    /// # Errors
    /// With its errno; ENOTCONN where there is no peer.
    pub fn getpeername(&self, id: Id) -> WorkerResult<SocketAddr> {
        self.names(id)?
            .peer
            .ok_or_else(|| WorkerError::Errno { call: String::from("getpeername"), errno: Errno::ENOTCONN })
    }

    /// Closes a socket.
    ///
    /// # Errors
    /// When there is no such socket.
    pub fn close(&self, id: Id) -> WorkerResult<()> {
        self.call(&Request::Close { id })
    }

    /// Starts many short connections in the background.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn burst_start(&self, burst: BurstSpec) -> WorkerResult<Id> {
        self.call(&Request::BurstStart(burst))
    }

    /// What has come of a burst so far.
    ///
    /// # Errors
    /// When there is no such burst.
    pub fn burst_look(&self, id: Id) -> WorkerResult<BurstReport> {
        self.call(&Request::BurstLook { id })
    }

    /// Ends a burst and says what came of it.
    ///
    /// # Errors
    /// When there is no such burst.
    pub fn burst_stop(&self, id: Id) -> WorkerResult<BurstReport> {
        self.call(&Request::BurstStop { id, now: true })
    }

    /// Runs a burst to its own end, by count or time.
    ///
    /// # Errors
    /// When it has no end, or the worker is gone.
    pub fn burst(&self, burst: BurstSpec) -> WorkerResult<BurstReport> {
        let id = self.burst_start(burst)?;
        self.call(&Request::BurstStop { id, now: false })
    }

    fn call<T: DeserializeOwned>(&self, request: &Request) -> WorkerResult<T> {
        let reply = self
            .exchange(request)
            .with_context(|| {
                let said = self.process.stderr();
                format!("the worker is gone (it said: {})", said.trim())
            })
            .map_err(WorkerError::Broken)?;
        match reply {
            Reply::Done(value) => serde_json::from_value(value)
                .context("the worker answered something else")
                .map_err(WorkerError::Broken),
            Reply::Errno { call, number } => Err(WorkerError::Errno { call, errno: Errno::from_raw(number) }),
            Reply::Failed(text) => Err(WorkerError::Broken(anyhow!(text))),
        }
    }

    fn exchange(&self, request: &Request) -> Result<Reply> {
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        let mut pipes = self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
        pipes.to.write_all(line.as_bytes())?;
        line.clear();
        pipes.from.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("it answered {line:?}"))
    }
}

/// An echo server in a member: TCP and UDP, both families, one port.
#[derive(Debug)]
pub struct EchoServer {
    worker: Worker,
    member: Member,
    port: u16,
}

impl EchoServer {
    pub(crate) fn start(member: &Member, name: &str, addresses: &[IpAddr], port: u16) -> Result<Self> {
        let worker = member.worker()?;
        let (name, addresses) = (name.to_owned(), addresses.to_owned());
        let () = worker
            .call(&Request::Echo { name, addresses, port })
            .with_context(|| format!("an echo server on port {port} of {}", member.name()))?;
        Ok(Self { worker, member: member.clone(), port })
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its address in a family: the member's.
    pub fn address(&self, family: Family) -> SocketAddr {
        let ip: IpAddr = self.member.ip(family);
        SocketAddr::new(ip, self.port)
    }

    /// Its process; dropping the server ends it.
    pub fn process(&self) -> &Process {
        self.worker.process()
    }
}

/// Reads what an echo server answered.
fn answer(line: &str) -> WorkerResult<Answer> {
    serde_json::from_str(line)
        .with_context(|| format!("no echo server answers like this: {line:?}"))
        .map_err(WorkerError::Broken)
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
