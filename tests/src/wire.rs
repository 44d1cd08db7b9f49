//! Frames, sent as they are: what no socket would send.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{MsgFlags, SockaddrStorage, send, sendto};

use crate::member::Member;

/// An interface of a member, to send frames by: whole ones, with their Ethernet header if it has one.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
}

impl Member {
    /// A way to send frames by an interface here.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn wire(&self, interface: &str) -> Result<Wire> {
        self.netns().within(|| {
            let index = if_nametoindex(interface).with_context(|| format!("no interface {interface}"))?;
            Ok(Wire { socket: open(index).with_context(|| format!("frames by {interface}"))? })
        })
    }

    /// Sends the payload of an IP packet of this protocol to an address, as a raw socket does: no hook of sockets sees it.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn send_raw(&self, to: IpAddr, protocol: u8, payload: &[u8]) -> Result<()> {
        self.netns().within(|| {
            let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            let socket = raw_socket(family, protocol.into())?;
            let to = SockaddrStorage::from(SocketAddr::new(to, 0));
            sendto(socket.as_raw_fd(), payload, &to, MsgFlags::empty())
                .context("cannot send a raw packet")?;
            Ok(())
        })
    }

    /// The hardware address of an interface here.
    ///
    /// # Errors
    /// When there is no such interface, or it has none.
    pub fn mac(&self, interface: &str) -> Result<[u8; 6]> {
        let text = self.ip_command(&format!("-o link show dev {interface}"))?;
        let word = text.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        let octets = word.into_iter().flat_map(|word| word.split(':'));
        let octets: Vec<u8> = octets.filter_map(|octet| u8::from_str_radix(octet, 16).ok()).collect();
        octets.try_into().ok().with_context(|| format!("no hardware address in {text:?}"))
    }
}

impl Wire {
    /// Sends a frame.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        send(self.socket.as_raw_fd(), frame, MsgFlags::empty()).context("cannot send a frame")?;
        Ok(())
    }
}

fn raw_socket(family: i32, protocol: i32) -> Result<OwnedFd> {
    // SAFETY: the call takes numbers only.
    let socket = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    let socket = Errno::result(socket).context("no raw socket")?;
    // SAFETY: it was just made, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

/// A packet socket that is bound to an interface of this thread's namespace, and receives nothing.
fn open(index: u32) -> Result<OwnedFd> {
    let socket = raw_socket(libc::AF_PACKET, 0)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as libc::sa_family_t,
        sll_protocol: 0,
        sll_ifindex: i32::try_from(index)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is a live one of the length given, and the descriptor is open.
    Errno::result(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}
