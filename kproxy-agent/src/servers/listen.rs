//! HTTP listeners that never give up: what cannot be bound is reported and tried again, what is not wanted any
//! more is closed. How an address is bound is Go's rule, since scripts and probes expect kube-proxy's.

use std::{
    fmt, io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, serve};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{oneshot, watch},
    time::{Instant, Sleep, sleep},
};

/// How long after a failed attempt to bind the next one is made: as kube-proxy.
pub(super) const RETRY: Duration = Duration::from_secs(5);

/// A connection on which nothing moved for so long is closed, so that forgotten ones do not pile up. Longer
/// than the interval at which anybody probes.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);

/// A peer that is gone without a word is noticed after 15 s of silence, asked every 15 s: Go's defaults.
const KEEP_ALIVE: u32 = 15;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// Where to listen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Bind {
    /// An address, or, where it is the unspecified one of either family, all addresses of both: Go's network
    /// "tcp".
    Both(SocketAddr),
    /// An address, or all of its family alone: Go's networks "tcp4" and "tcp6".
    OneFamily(SocketAddr),
}

/// What a listener has to say.
#[derive(Debug)]
pub(super) enum News<'a> {
    /// It cannot be bound, and is tried again. Said once as long as the reason stays the same.
    Failed(&'a io::Error),
    /// Requests are answered from now on.
    Listening(SocketAddr),
}

/// A listener, which is closed when this is dropped.
#[derive(Debug)]
pub(super) struct Listening {
    _stop: oneshot::Sender<()>,
    /// Ends when the socket is closed.
    socket: watch::Receiver<Option<SocketAddr>>,
}

/// Serves `router` at `bind` from now on, or from when that can be bound, tried every `retry`.
pub(super) fn listen(
    bind: Bind,
    router: Router,
    retry: Duration,
    report: impl Fn(News<'_>) + Send + 'static,
) -> Listening {
    let (stop, stopped) = oneshot::channel();
    let (opened, socket) = watch::channel(None);
    tokio::spawn(run(bind, router, retry, report, stopped, opened));
    Listening { _stop: stop, socket }
}

impl Listening {
    /// Closes the socket, and returns when it is: the address can be bound again. What is being answered is
    /// answered.
    pub(super) async fn close(self) {
        let Self { _stop: stop, mut socket } = self;
        drop(stop);
        while socket.changed().await.is_ok() {}
    }

    /// Waits until requests are answered, and tells where.
    #[cfg(test)]
    pub(super) async fn address(&mut self) -> SocketAddr {
        let bound = self.socket.wait_for(Option::is_some).await.expect("the listener lives as long as this");
        bound.expect("it was waited for")
    }
}

async fn run(
    bind: Bind,
    router: Router,
    retry: Duration,
    report: impl Fn(News<'_>) + Send + 'static,
    mut stopped: oneshot::Receiver<()>,
    opened: watch::Sender<Option<SocketAddr>>,
) {
    let mut said: Option<String> = None;
    let (listener, address) = loop {
        let error = match bind.listener().and_then(|listener| Ok((listener.local_addr()?, listener))) {
            Ok((address, listener)) => break (listener, address),
            Err(error) => error,
        };
        let text = error.to_string();
        if said.as_ref() != Some(&text) {
            report(News::Failed(&error));
            said = Some(text);
        }
        tokio::select! {
            _ = &mut stopped => return,
            () = sleep(retry) => {}
        }
    };
    report(News::Listening(address));
    opened.send_replace(Some(address));
    let listener = Accepting { listener, _opened: opened };
    let served = serve(listener, router).with_graceful_shutdown(async {
        let _ = stopped.await;
    });
    if let Err(error) = served.await {
        tracing::error!("the listener on {address} ended: {error}");
    }
}

impl Bind {
    /// The address as it was given.
    pub(super) fn address(&self) -> SocketAddr {
        let (Self::Both(address) | Self::OneFamily(address)) = self;
        *address
    }

    fn listener(&self) -> io::Result<TcpListener> {
        match *self {
            Self::Both(address) if address.ip().is_unspecified() => {
                let both = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), address.port());
                match open(both, false) {
                    // There is no IPv6 here, or no address of it.
                    Err(error) if address.is_ipv4() && has_no_family(&error) => open(address, false),
                    result => result,
                }
            }
            Self::Both(address) => open(address, false),
            Self::OneFamily(address) => open(address, address.is_ipv6()),
        }
    }
}

fn open(address: SocketAddr, is_v6_only: bool) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        let socket = TcpSocket::new_v6()?;
        setsockopt(&socket, sockopt::Ipv6V6Only, &is_v6_only)?;
        socket
    };
    // Connections inherit these from the listener.
    socket.set_keepalive(true)?;
    setsockopt(&socket, sockopt::TcpKeepIdle, &KEEP_ALIVE)?;
    setsockopt(&socket, sockopt::TcpKeepInterval, &KEEP_ALIVE)?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn has_no_family(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address().fmt(f)
    }
}

/// A listener whose connections are not held open for ever, and that tells when it is closed.
struct Accepting {
    // Before the sender: a socket is closed when that is dropped.
    listener: TcpListener,
    _opened: watch::Sender<Option<SocketAddr>>,
}

impl serve::Listener for Accepting {
    type Io = Impatient<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let (stream, peer) = serve::Listener::accept(&mut self.listener).await;
        (Impatient::new(stream, IDLE_TIMEOUT), peer)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A stream that fails when nothing moved on it for too long.
struct Impatient<S> {
    stream: S,
    timeout: Duration,
    deadline: Pin<Box<Sleep>>,
}

impl<S: Unpin> Impatient<S> {
    fn new(stream: S, timeout: Duration) -> Self {
        Self { stream, timeout, deadline: Box::pin(sleep(timeout)) }
    }

    /// `result`, unless that is that nothing moves, and that for too long.
    fn or_timeout<T>(
        &mut self,
        result: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.deadline.as_mut().reset(Instant::now() + self.timeout);
            return result;
        }
        self.deadline.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Impatient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.or_timeout(result, context)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Impatient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, data);
        self.or_timeout(result, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(context, data);
        self.or_timeout(result, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    #[tokio::test]
    async fn what_does_not_move_ends_and_what_moves_goes_on() {
        let timeout = Duration::from_millis(200);
        let (near, mut far) = duplex(8);
        let mut stream = Impatient::new(near, timeout);
        let start = Instant::now();
        for sent in 0..6 {
            sleep(timeout / 4).await;
            far.write_u8(sent).await.unwrap();
            assert_eq!(stream.read_u8().await.unwrap(), sent);
        }
        assert!(start.elapsed() > timeout, "it lived longer than it may rest");
        assert_eq!(stream.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);

        // Nobody reads what is written.
        let (near, _far) = duplex(8);
        let mut stream = Impatient::new(near, timeout);
        assert_eq!(stream.write_all(&[0; 9]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn both_families_can_have_a_port_each_for_itself() {
        let all = |ip: &str, port| SocketAddr::new(ip.parse().unwrap(), port);
        let v4 = Bind::OneFamily(all("0.0.0.0", 0)).listener().unwrap();
        let port = v4.local_addr().unwrap().port();
        let v6 = Bind::OneFamily(all("::", port)).listener().unwrap();
        assert_eq!(v6.local_addr().unwrap(), all("::", port));
        let error = Bind::Both(all("0.0.0.0", port)).listener().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
