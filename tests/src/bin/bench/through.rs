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
/// Octets before it, until windows and buffers have grown to what they stay at.
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

/// Where datagrams end: a socket in a pod, emptied by whoever sends, so that nothing waits for another thread.
pub struct Sink(UdpSocket);

impl Sink {
    /// Opens the sink of a pod, and starts a thread that takes connections' octets there.
    pub fn open(pod: &Member) -> Result<Self> {
        let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let (socket, listener) = pod
            .netns()
            .within(|| Ok((UdpSocket::bind(any(DATAGRAMS))?, TcpListener::bind(any(OCTETS))?)))
            .with_context(|| format!("cannot listen in {}", pod.name()))?;
        socket.set_nonblocking(true)?;
        setsockopt(&socket, sockopt::RcvBuf, &(1 << 20)).context("cannot lengthen a queue")?;
        std::thread::spawn(move || {
            // Where it cannot be pinned, it is not: the ratios are noisier then.
            let _ = arms::pin();
            for stream in listener.incoming().flatten() {
                // A client that went away in the middle says so itself.
                let _ = swallow(stream);
            }
        });
        Ok(Self(socket))
    }

    fn receive(&self) -> Result<SocketAddr> {
        let end = Instant::now() + PATIENCE;
        let mut data = [0; 64];
        loop {
            match self.0.recv_from(&mut data) {
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
    way.sink.0.send_to(&data, from)?;
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
    let mut stream = TcpStream::connect(SocketAddr::V4(way.octets)).with_context(|| way.name.clone())?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let chunk = vec![0; 128 << 10];
    let mut send = |octets: usize| {
        for _ in 0..octets / chunk.len() {
            stream.write_all(&chunk)?;
        }
        let mut done = [0];
        stream.read_exact(&mut done).with_context(|| format!("{}: not all arrived", way.name))
    };
    send(OCTET_WARM_UP)?;
    arms::rest();
    arms::timed(|| send(OCTET_BATCH))
}

/// Takes what [`octets`] sends, and says so with an octet each time.
fn swallow(mut stream: TcpStream) -> std::io::Result<()> {
    let mut chunk = vec![0; 128 << 10];
    for octets in [OCTET_WARM_UP, OCTET_BATCH] {
        let mut left = octets;
        while left > 0 {
            match stream.read(&mut chunk)? {
                0 => return Ok(()),
                length => left = left.saturating_sub(length),
            }
        }
        stream.write_all(&[1])?;
    }
    Ok(())
}
