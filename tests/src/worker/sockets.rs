//! A worker's sockets: the few system calls that the standard library does not offer.

use std::io::{self, BufRead as _, BufReader, IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrStorage, bind,
    connect, recvmsg, sendmsg, setsockopt, socket, sockopt,
};

use super::protocol::WireFamily;
use super::transfer::{self, Transfer};

/// A system call that failed.
#[derive(Clone, Copy, Debug)]
pub struct Failed {
    pub call: &'static str,
    pub errno: Errno,
}

/// Names the call that an error came from.
pub trait Named<T> {
    fn named(self, call: &'static str) -> Result<T, Failed>;
}

impl<T> Named<T> for io::Result<T> {
    fn named(self, call: &'static str) -> Result<T, Failed> {
        self.map_err(|error| Failed {
            call,
            // What has no number is the standard library's own: the other side closed.
            errno: error.raw_os_error().map_or(Errno::EPIPE, Errno::from_raw),
        })
    }
}

impl<T> Named<T> for nix::Result<T> {
    fn named(self, call: &'static str) -> Result<T, Failed> {
        self.map_err(|errno| Failed { call, errno })
    }
}

/// What stands between the IP header and the transport header of what a socket sends.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Headers {
    /// Nothing.
    #[default]
    Usual,
    /// IPv4 options, or IPv6 extension headers.
    Seldom,
}

/// Connects within a time, from an address if one is given.
pub fn tcp_connect(
    to: SocketAddr,
    from: Option<SocketAddr>,
    headers: Headers,
    timeout: Duration,
) -> Result<TcpStream, Failed> {
    let fd = new_socket(to.is_ipv4(), SockType::Stream)?;
    headers.give(&fd, to.is_ipv4())?;
    if let Some(from) = from {
        setsockopt(&fd, sockopt::ReuseAddr, &true).named("setsockopt")?;
        bind(fd.as_raw_fd(), &SockaddrStorage::from(from)).named("bind")?;
    }
    let stream = TcpStream::from(fd);
    stream.set_nonblocking(true).named("fcntl")?;
    match connect(stream.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => {}
        Err(Errno::EINPROGRESS) => wait_connected(&stream, timeout)?,
        Err(errno) => {
            return Err(Failed { call: "connect", errno });
        }
    }
    stream.set_nonblocking(false).named("fcntl")?;
    Ok(stream)
}

/// Sends a line and reads one, within a time for each.
pub fn tcp_exchange(
    stream: &mut BufReader<TcpStream>,
    send: &str,
    timeout: Duration,
) -> Result<String, Failed> {
    send_within(stream, &format!("{send}\n"), timeout)?;
    receive_line(stream)
}

/// Asks an echo server for a transfer and does its part, within a time for each system call.
pub fn tcp_transfer(
    stream: &mut BufReader<TcpStream>,
    asked: Transfer,
    timeout: Duration,
) -> Result<(), Failed> {
    send_within(stream, &format!("{}\n", asked.line()), timeout)?;
    transfer::send(stream.get_mut(), asked.up).named("send")?;
    if receive_line(stream)? != transfer::RECEIVED.trim_end() {
        return Err(Failed { call: "recv", errno: Errno::EPROTO });
    }
    transfer::receive(stream, asked.down).map_err(|error| Failed {
        call: "recv",
        errno: error.raw_os_error().map_or(Errno::EBADMSG, Errno::from_raw),
    })
}

/// Asks for `/` on a connection that stays open, and reads the answer's body, within a time for each
/// system call.
pub fn http_get(stream: &mut BufReader<TcpStream>, host: &str, timeout: Duration) -> Result<String, Failed> {
    let strange = Failed { call: "recv", errno: Errno::EPROTO };
    send_within(stream, &format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"), timeout)?;
    if !receive_line(stream)?.starts_with("HTTP/1.1 ") {
        return Err(strange);
    }
    let mut length = None;
    loop {
        let line = receive_line(stream)?;
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().ok();
        }
    }
    let mut body = vec![0; length.ok_or(strange)?];
    stream.read_exact(&mut body).named("recv")?;
    Ok(String::from_utf8_lossy(&body).into_owned())
}

/// A UDP socket. An IPv6 one is not limited to IPv6, as is the kernel's default.
pub fn udp_socket(family: WireFamily, at: Option<SocketAddr>, headers: Headers) -> Result<UdpSocket, Failed> {
    let v4 = matches!(family, WireFamily::V4);
    let fd = new_socket(v4, SockType::Datagram)?;
    headers.give(&fd, v4)?;
    if let Some(at) = at {
        bind(fd.as_raw_fd(), &SockaddrStorage::from(at)).named("bind")?;
    }
    Ok(UdpSocket::from(fd))
}

pub fn udp_connect(socket: &UdpSocket, to: Option<SocketAddr>) -> Result<(), Failed> {
    if let Some(to) = to {
        return connect(socket.as_raw_fd(), &SockaddrStorage::from(to)).named("connect");
    }
    let nobody = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the address is a live sockaddr of the length given, and the descriptor is open.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, length) };
    Errno::result(result).map(drop).named("connect")
}

/// Sends datagrams of this size by one call.
pub fn udp_send_segments(
    socket: &UdpSocket,
    to: Option<SocketAddr>,
    data: &[u8],
    size: u16,
) -> Result<(), Failed> {
    setsockopt(socket, sockopt::UdpGsoSegment, &size.into()).named("setsockopt")?;
    let sent = match to {
        Some(to) => socket.send_to(data, to).named("sendto"),
        None => socket.send(data).named("send"),
    };
    setsockopt(socket, sockopt::UdpGsoSegment, &0).named("setsockopt")?;
    sent.map(drop)
}

/// A UDP socket that serves a port at an address, or at all of its family, and knows which was asked.
pub fn udp_server(at: SocketAddr) -> Result<OwnedFd, Failed> {
    let v4 = at.is_ipv4();
    let fd = new_socket(v4, SockType::Datagram)?;
    if v4 {
        setsockopt(&fd, sockopt::Ipv4PacketInfo, &true).named("setsockopt")?;
    } else {
        setsockopt(&fd, sockopt::Ipv6V6Only, &true).named("setsockopt")?;
        setsockopt(&fd, sockopt::Ipv6RecvPacketInfo, &true).named("setsockopt")?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(at)).named("bind")?;
    Ok(fd)
}

/// A TCP listener at an address, or at all of its family.
pub fn tcp_server(at: SocketAddr) -> Result<std::net::TcpListener, Failed> {
    let v4 = at.is_ipv4();
    let fd = new_socket(v4, SockType::Stream)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true).named("setsockopt")?;
    if !v4 {
        setsockopt(&fd, sockopt::Ipv6V6Only, &true).named("setsockopt")?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(at)).named("bind")?;
    // As large as the system allows: bursts of connections are not to be refused here.
    let backlog = nix::sys::socket::Backlog::new(4096).named("listen")?;
    nix::sys::socket::listen(&fd, backlog).named("listen")?;
    Ok(fd.into())
}

/// A datagram with where it came from and which of our addresses it was for.
pub struct Asked {
    pub data: Vec<u8>,
    pub from: SocketAddr,
    pub local: SocketAddr,
    info: PacketInfo,
}

#[derive(Clone, Copy)]
enum PacketInfo {
    V4(libc::in_pktinfo),
    V6(libc::in6_pktinfo),
}

/// Waits for a datagram on a [`udp_server`]'s socket.
pub fn udp_receive(socket: &OwnedFd, port: u16) -> Result<Asked, Failed> {
    let mut buffer = vec![0; 65536];
    let mut control = nix::cmsg_space!(libc::in6_pktinfo, libc::in_pktinfo);
    let (length, from, info) = {
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let message = recvmsg::<SockaddrStorage>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::empty(),
        )
        .named("recvmsg")?;
        let info = message.cmsgs().named("recvmsg")?.find_map(|one| match one {
            ControlMessageOwned::Ipv4PacketInfo(info) => Some(PacketInfo::V4(info)),
            ControlMessageOwned::Ipv6PacketInfo(info) => Some(PacketInfo::V6(info)),
            _ => None,
        });
        (message.bytes, message.address, info)
    };
    let missing = |call| Failed { call, errno: Errno::EINVAL };
    let info = info.ok_or(missing("recvmsg"))?;
    let from = from.and_then(|from| to_std(&from)).ok_or(missing("recvmsg"))?;
    buffer.truncate(length);
    Ok(Asked { data: buffer, from, local: info.local(port), info })
}

/// Answers a datagram from the address that it was sent to.
pub fn udp_answer(socket: &OwnedFd, asked: &Asked, data: &[u8]) -> Result<(), Failed> {
    let slices = [IoSlice::new(data)];
    let to = SockaddrStorage::from(asked.from);
    let sent = match asked.info {
        PacketInfo::V4(info) => {
            let from =
                libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: info.ipi_addr, ipi_addr: info.ipi_addr };
            let control = [ControlMessage::Ipv4PacketInfo(&from)];
            sendmsg(socket.as_raw_fd(), &slices, &control, MsgFlags::empty(), Some(&to))
        }
        PacketInfo::V6(info) => {
            let from = libc::in6_pktinfo { ipi6_addr: info.ipi6_addr, ipi6_ifindex: 0 };
            let control = [ControlMessage::Ipv6PacketInfo(&from)];
            sendmsg(socket.as_raw_fd(), &slices, &control, MsgFlags::empty(), Some(&to))
        }
    };
    sent.map(drop).named("sendmsg")
}

impl PacketInfo {
    fn local(self, port: u16) -> SocketAddr {
        match self {
            Self::V4(info) => {
                let address = Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr));
                SocketAddr::from((address, port))
            }
            Self::V6(info) => SocketAddr::from((Ipv6Addr::from(info.ipi6_addr.s6_addr), port)),
        }
    }
}

fn send_within(stream: &mut BufReader<TcpStream>, text: &str, timeout: Duration) -> Result<(), Failed> {
    let socket = stream.get_mut();
    socket
        .set_read_timeout(Some(timeout))
        .and_then(|()| socket.set_write_timeout(Some(timeout)))
        .named("setsockopt")?;
    socket.write_all(text.as_bytes()).named("send")
}

/// A line without its end.
fn receive_line(stream: &mut BufReader<TcpStream>) -> Result<String, Failed> {
    let mut line = String::new();
    if stream.read_line(&mut line).named("recv")? == 0 {
        return Err(Failed { call: "recv", errno: Errno::EPIPE });
    }
    line.truncate(line.trim_end().len());
    Ok(line)
}

pub fn new_socket(v4: bool, kind: SockType) -> Result<OwnedFd, Failed> {
    let family = if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, kind, SockFlag::SOCK_CLOEXEC, None).named("socket")
}

impl Headers {
    fn give(self, socket: &OwnedFd, v4: bool) -> Result<(), Failed> {
        match (self, v4) {
            (Self::Usual, _) => Ok(()),
            (Self::Seldom, true) => set_option(socket, libc::IPPROTO_IP, libc::IP_OPTIONS, &ROUTE_RECORD),
            (Self::Seldom, false) => {
                set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_HOPOPTS, &PADDING)?;
                set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS, &PADDING)
            }
        }
    }
}

/// Room for the addresses of three routers (RFC 791, 3.1), and the end of the list.
const ROUTE_RECORD: [u8; 16] = [7, 15, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// An extension header of 8 octets, all of it padding (RFC 8200, 4.2); its first octet the kernel fills in.
const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];

fn set_option(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &[u8]) -> Result<(), Failed> {
    let length = libc::socklen_t::try_from(value.len()).unwrap_or(0);
    // SAFETY: the value is as long as the kernel is told.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    Errno::result(result).named("setsockopt").map(drop)
}

fn wait_connected(stream: &TcpStream, timeout: Duration) -> Result<(), Failed> {
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut fds, left) {
            Ok(0) => {
                return Err(Failed { call: "connect", errno: Errno::ETIMEDOUT });
            }
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(errno) => {
                return Err(Failed { call: "poll", errno });
            }
        }
    }
    match stream.take_error().named("getsockopt")? {
        None => Ok(()),
        Some(error) => Err(error).named("connect"),
    }
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some((v4.ip(), v4.port()).into());
    }
    let v6 = address.as_sockaddr_in6()?;
    Some((v6.ip(), v6.port()).into())
}
