//! sock_diag: the sockets of this thread's network namespace: finding some by their cookies and destroying them; finding
//! out what is listened on.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
};

use kproxy_common::{Address, ConnectedSocket, FrontendKey, Protocol};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_sock_diag::{
    SockDiagDestroy, SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP},
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};

use super::peer;

/// Destroys those of `wanted` (by cookie) that are connected here to where they are said to be; the cookies of those.
pub(super) fn destroy(wanted: &BTreeMap<u64, ConnectedSocket>) -> io::Result<BTreeSet<u64>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    let mut done = BTreeSet::new();
    for (family, any) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        // Of UDP sockets: the connected ones.
        for id in dump(&socket, request(family, IPPROTO_UDP, StateFlags::ESTABLISHED, any))? {
            let cookie = cookie(id.cookie);
            let to = SocketAddr::new(id.destination_address.to_canonical(), id.destination_port);
            if wanted.get(&cookie).is_none_or(|socket| peer(socket) != to) {
                continue;
            }
            match destroy_one(&socket, family, id) {
                Ok(()) => {
                    done.insert(cookie);
                }
                // Closed, or another socket's by now: the kernel compares cookies.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(done)
}

/// What is listened on in this thread's network namespace at exactly these addresses, not at all of them: TCP listeners and
/// UDP sockets that are not connected. SCTP is not asked about: the question itself would load its module.
pub fn listeners(at: &BTreeSet<Address>) -> io::Result<BTreeSet<FrontendKey>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    let mut found = BTreeSet::new();
    for (family, any) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        for (protocol, number, states) in [
            (Protocol::Tcp, IPPROTO_TCP, StateFlags::LISTEN),
            (Protocol::Udp, IPPROTO_UDP, StateFlags::CLOSE),
        ] {
            for id in dump(&socket, request(family, number, states, any.clone()))? {
                let address = Address::from(id.source_address.to_canonical());
                if at.contains(&address) {
                    found.insert(FrontendKey::new(address, id.source_port, protocol));
                }
            }
        }
    }
    Ok(found)
}

/// All sockets that a request asks for.
fn dump(socket: &Socket, request: InetRequest) -> io::Result<Vec<SocketId>> {
    send(socket, NLM_F_REQUEST | NLM_F_DUMP, SockDiagMessage::InetRequest(request))?;
    let mut found = Vec::new();
    loop {
        for payload in receive::<SockDiagMessage>(socket)? {
            match payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                    found.push(response.header.socket_id);
                }
                NetlinkPayload::Done(_) => return Ok(found),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
        }
    }
}

fn destroy_one(socket: &Socket, family: u8, id: SocketId) -> io::Result<()> {
    let request = SockDiagDestroy::new(SockDiagMessage::InetRequest(request(
        family,
        IPPROTO_UDP,
        StateFlags::ESTABLISHED,
        id,
    )));
    send(socket, NLM_F_REQUEST | NLM_F_ACK, request)?;
    for payload in receive::<SockDiagMessage>(socket)? {
        if let NetlinkPayload::Error(error) = payload
            && error.code.is_some()
        {
            return Err(error.to_io());
        }
    }
    Ok(())
}

fn request(family: u8, protocol: u8, states: StateFlags, socket_id: SocketId) -> InetRequest {
    InetRequest { family, protocol, extensions: ExtensionFlags::empty(), states, socket_id }
}

fn send<T>(socket: &Socket, flags: u16, message: T) -> io::Result<()>
where
    T: NetlinkSerializable + Into<NetlinkPayload<T>>,
{
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut packet = NetlinkMessage::new(header, message.into());
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    socket.send(&bytes, 0).map(drop)
}

fn receive<T: NetlinkDeserializable>(socket: &Socket) -> io::Result<Vec<NetlinkPayload<T>>> {
    let (bytes, _) = socket.recv_from_full()?;
    let mut payloads = Vec::new();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let message = NetlinkMessage::<T>::deserialize(rest).map_err(io::Error::other)?;
        // Messages begin at multiples of four.
        let length = (message.header.length as usize).next_multiple_of(4).max(4);
        payloads.push(message.payload);
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(payloads)
}

/// The kernel writes its low half first, whatever the machine's byte order.
fn cookie([a, b, c, d, e, f, g, h]: [u8; 8]) -> u64 {
    u64::from(u32::from_ne_bytes([a, b, c, d])) | u64::from(u32::from_ne_bytes([e, f, g, h])) << 32
}
