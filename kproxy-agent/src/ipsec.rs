//! IPsec policies of this thread's network namespace, asked by netlink (xfrm(8), `linux/xfrm.h`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_XFRM};

const XFRM_MSG_NEWPOLICY: u16 = 0x13;
const XFRM_MSG_GETPOLICY: u16 = 0x15;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x301;

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Length of `struct xfrm_userpolicy_id`, which a request has, zero for all policies.
const POLICY_ID: usize = 64;
/// Where `dir` stands in `struct xfrm_userpolicy_info`: behind selector, two lifetimes, priority and index.
const DIRECTION: usize = 56 + 64 + 32 + 4 + 4;

/// A policy, as far as it matters here.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Policy {
    direction: u8,
    source: (IpAddr, u8),
    destination: (IpAddr, u8),
}

impl std::fmt::Display for Policy {
    /// As `ip xfrm policy` writes it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { direction, source, destination } = self;
        let direction = match direction {
            0 => "in",
            1 => "out",
            _ => "fwd",
        };
        write!(f, "src {}/{} dst {}/{} dir {direction}", source.0, source.1, destination.0, destination.1)
    }
}

/// All policies that are no single socket's, in order.
///
/// # Errors
///
/// The kernel does not answer (CAP_NET_ADMIN is needed). One without IPsec has no policies.
pub fn policies() -> io::Result<Vec<Policy>> {
    let mut socket = match Socket::new(NETLINK_XFRM) {
        Ok(socket) => socket,
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    socket.bind_auto()?;
    let mut request = Vec::with_capacity(HEADER + POLICY_ID);
    request.extend(((HEADER + POLICY_ID) as u32).to_ne_bytes());
    request.extend(XFRM_MSG_GETPOLICY.to_ne_bytes());
    request.extend(NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.resize(HEADER + POLICY_ID, 0);
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let mut found = Vec::new();
    loop {
        let (answer, _) = socket.recv_from_full()?;
        if parse(&answer, &mut found)? {
            found.sort();
            return Ok(found);
        }
    }
}

/// Takes in the messages of one datagram; whether they were the last.
fn parse(mut datagram: &[u8], found: &mut Vec<Policy>) -> io::Result<bool> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is too short");
    while !datagram.is_empty() {
        let length: [u8; 4] = read(datagram, 0).ok_or_else(invalid)?;
        let kind = u16::from_ne_bytes(read(datagram, 4).ok_or_else(invalid)?);
        let length = u32::from_ne_bytes(length) as usize;
        let payload = datagram.get(HEADER..length).ok_or_else(invalid)?;
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = i32::from_ne_bytes(read(payload, 0).ok_or_else(invalid)?);
                return Err(io::Error::from_raw_os_error(-code));
            }
            XFRM_MSG_NEWPOLICY => found.extend(policy(payload).ok_or_else(invalid)?),
            _ => {}
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// From `struct xfrm_userpolicy_info`, whose selector comes first; `Some(None)`: a socket's own.
fn policy(info: &[u8]) -> Option<Option<Policy>> {
    let family = i32::from(u16::from_ne_bytes(read(info, 40)?));
    let [destination_bits, source_bits] = read(info, 42)?;
    let [direction] = read(info, DIRECTION)?;
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 16] = read(info, at)?;
        let [a, b, c, d, ..] = octets;
        Some(match family {
            libc::AF_INET6 => Ipv6Addr::from(octets).into(),
            _ => Ipv4Addr::new(a, b, c, d).into(),
        })
    };
    let (destination, source) = (address(0)?, address(16)?);
    Some((direction < 3).then_some(Policy {
        direction,
        source: (source, source_bits),
        destination: (destination, destination_bits),
    }))
}

fn read<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(payload);
        bytes
    }

    fn info(direction: u8) -> Vec<u8> {
        let mut info = vec![0; 168];
        info[..4].copy_from_slice(&[10, 244, 0, 0]);
        info[16..20].copy_from_slice(&[10, 0, 0, 0]);
        info[40..42].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        (info[42], info[43]) = (16, 8);
        info[DIRECTION] = direction;
        info
    }

    #[test]
    fn policies_are_read_and_sockets_own_left_out() {
        let mut found = Vec::new();
        let datagram =
            [message(XFRM_MSG_NEWPOLICY, &info(1)), message(XFRM_MSG_NEWPOLICY, &info(4))].concat();
        assert!(!parse(&datagram, &mut found).unwrap());
        assert!(parse(&message(NLMSG_DONE, &[0; 4]), &mut found).unwrap());
        let texts: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["src 10.0.0.0/8 dst 10.244.0.0/16 dir out"]);
    }

    #[test]
    fn what_is_cut_off_or_an_error_is_said() {
        let whole = message(XFRM_MSG_NEWPOLICY, &info(0));
        for length in 1..whole.len() {
            assert!(parse(&whole[..length], &mut Vec::new()).is_err(), "{length}");
        }
        let denied = message(NLMSG_ERROR, &(-libc::EPERM).to_ne_bytes());
        assert_eq!(parse(&denied, &mut Vec::new()).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }
}
