//! Probes, as traceroute sends them: packets that may go so many hops, and what comes back.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockType, SockaddrStorage, connect, getsockopt, recv, recvmsg, send,
    setsockopt, sockopt,
};

use super::protocol::Probed;
use super::sockets::{Failed, Named as _, new_socket};

/// Sends a datagram, or opens a connection, that may go so many hops. The kernel hands an ICMP error to the socket whose
/// packet it quotes: one that reaches this is about the addresses that the socket has.
pub fn probe(to: SocketAddr, tcp: bool, hops: u8, timeout: Duration) -> Result<Probed, Failed> {
    let kind = if tcp { SockType::Stream } else { SockType::Datagram };
    let socket = new_socket(to.is_ipv4(), kind)?;
    if to.is_ipv4() {
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true).named("setsockopt")?;
        setsockopt(&socket, sockopt::Ipv4Ttl, &hops.into()).named("setsockopt")?;
    } else {
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true).named("setsockopt")?;
        setsockopt(&socket, sockopt::Ipv6Ttl, &hops.into()).named("setsockopt")?;
    }
    fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).named("fcntl")?;
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(errno) => return Err(Failed { call: "connect", errno }),
    }
    if !tcp {
        send(socket.as_raw_fd(), b"probe", MsgFlags::empty()).named("send")?;
    }
    wait(&socket, if tcp { PollFlags::POLLOUT } else { PollFlags::POLLIN }, timeout)?;
    if let Some(error) = error_of(&socket)? {
        return Ok(error);
    }
    let errno = Errno::from_raw(getsockopt(&socket, sockopt::SocketError).named("getsockopt")?);
    if tcp && errno != Errno::UnknownErrno {
        return Err(Failed { call: "connect", errno });
    }
    if !tcp {
        recv(socket.as_raw_fd(), &mut [0; 2048], MsgFlags::empty()).named("recv")?;
    }
    Ok(Probed::Answered)
}

/// Waits for what is wanted, or for an error.
fn wait(socket: &OwnedFd, wanted: PollFlags, timeout: Duration) -> Result<(), Failed> {
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(socket.as_fd(), wanted)];
        match poll(&mut fds, left) {
            Ok(0) => return Err(Failed { call: "poll", errno: Errno::ETIMEDOUT }),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Failed { call: "poll", errno }),
        }
    }
}

/// The first ICMP error that the socket has got.
fn error_of(socket: &OwnedFd) -> Result<Option<Probed>, Failed> {
    let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = match recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut [], Some(&mut control), flags) {
        Ok(message) => message,
        Err(Errno::EAGAIN) => return Ok(None),
        Err(errno) => return Err(Failed { call: "recvmsg", errno }),
    };
    let error = message.cmsgs().named("recvmsg")?.find_map(|one| match one {
        ControlMessageOwned::Ipv4RecvErr(error, Some(from)) => {
            Some((error, IpAddr::from(u32::from_be(from.sin_addr.s_addr).to_be_bytes())))
        }
        ControlMessageOwned::Ipv6RecvErr(error, Some(from)) => {
            Some((error, IpAddr::from(from.sin6_addr.s6_addr)))
        }
        _ => None,
    });
    let (error, from) = error.ok_or(Failed { call: "recvmsg", errno: Errno::EPROTO })?;
    Ok(Some(Probed::Error { from, kind: error.ee_type, code: error.ee_code }))
}
