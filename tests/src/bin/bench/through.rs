//! What goes through a node: datagrams, and the octets of a connection.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::Member;
use nix::sys::socket::{setsockopt, sockopt};

use crate::arms::{self, Place, Took};

/// The port of every endpoint where datagrams end.
pub const DATAGRAMS: u16 = 8081;
/// The port of every endpoint where a connection's octets end.
pub const OCTETS: u16 = 8082;

/// Datagrams in a batch, of 64 octets each.
pub const DATAGRAM_BATCH: usize = 2_048;
/// Octets in a batch.
pub const OCTET_BATCH: usize = 64 << 20;
/// Octets that are handed over at a time.
const CHUNK: usize = 128 << 10;
/// Octets before a batch, until windows and buffers have grown to what they stay at.
const OCTET_WARM_UP: usize = 16 << 20;

/// Sent before they are taken out again: fewer than any queue on the way holds.
const TRAIN: usize = 64;

/// How long a train may be under way.
const PATIENCE: Duration = Duration::from_secs(1);

/// A way through a node, from a client to a sink.
pub struct Way<'a> {
    pub name: String,
    pub place: Place,
    pub datagrams: SocketAddrV4,
    pub octets: SocketAddrV4,
    pub sink: &'a Sink,
}

/// Where datagrams and octets end: sockets in a pod, emptied by whoever sends, so that nothing waits for another thread.
pub struct Sink {
    datagrams: UdpSocket,
    octets: TcpListener,
}

impl Sink {
    /// Opens the sink of a pod.
    pub fn open(pod: &Member) -> Result<Self> {
        let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let (datagrams, octets) = pod
            .netns()
            .within(|| Ok((UdpSocket::bind(any(DATAGRAMS))?, TcpListener::bind(any(OCTETS))?)))
            .with_context(|| format!("cannot listen in {}", pod.name()))?;
        datagrams.set_nonblocking(true)?;
        setsockopt(&datagrams, sockopt::RcvBuf, &(1 << 20)).context("cannot lengthen a queue")?;
        Ok(Self { datagrams, octets })
    }

    fn receive(&self) -> Result<SocketAddr> {
        let end = Instant::now() + PATIENCE;
        let mut data = [0; 64];
        loop {
            match self.datagrams.recv_from(&mut data) {
                Ok((_, from)) => return Ok(from),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ensure!(Instant::now() < end, "a datagram did not arrive within {PATIENCE:?}");
                    std::thread::yield_now();
                }
                Err(error) => return Err(error).context("cannot receive"),
            }
        }
    }
}

/// Sends a batch of datagrams on a flow that was answered once.
pub fn datagrams(way: &Way<'_>) -> Result<Took> {
    way.place.enter()?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(way.datagrams)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut data = [0; 64];
    socket.send(&data)?;
    let from = way.sink.receive().with_context(|| way.name.clone())?;
    way.sink.datagrams.send_to(&data, from)?;
    socket.recv(&mut data).with_context(|| format!("{}: no answer", way.name))?;
    arms::rest();
    arms::timed(|| {
        for _ in 0..DATAGRAM_BATCH / TRAIN {
            for _ in 0..TRAIN {
                socket.send(&data)?;
            }
            for _ in 0..TRAIN {
                way.sink.receive().with_context(|| way.name.clone())?;
            }
        }
        Ok(())
    })
}

/// Sends a batch of octets by one connection that has found its pace.
pub fn octets(way: &Way<'_>) -> Result<Took> {
    way.place.enter()?;
    let mut from = TcpStream::connect(SocketAddr::V4(way.octets)).with_context(|| way.name.clone())?;
    let (mut to, _) = way.sink.octets.accept().with_context(|| way.name.clone())?;
    from.set_nonblocking(true)?;
    to.set_nonblocking(true)?;
    let mut buffer = vec![0; CHUNK];
    let mut send = |octets: usize| {
        let end = Instant::now() + PATIENCE * 10;
        let (mut left, mut under_way) = (octets, 0);
        while left > 0 || under_way > 0 {
            let sent = ready(from.write(&buffer[..CHUNK.min(left)]))?;
            left -= sent;
            under_way += sent;
            let mut taken = 0;
            while let more @ 1.. = ready(to.read(&mut buffer))? {
                taken += more;
            }
            under_way -= taken;
            ensure!(sent + taken > 0 || Instant::now() < end, "{}: not all arrived", way.name);
        }
        Ok(())
    };
    send(OCTET_WARM_UP)?;
    arms::rest();
    arms::timed(|| send(OCTET_BATCH))
}

/// How many octets a socket took or had; none where it would have to wait.
fn ready(result: std::io::Result<usize>) -> Result<usize> {
    match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
        other => Ok(other?),
    }
}
