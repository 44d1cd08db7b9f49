//! A server that costs as little as one can: an octet in, an octet out.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result};
use kproxy_lab::Member;

use crate::arms;
use crate::objects::{ENDPOINTS, TARGET};

/// Gives a pod, on routed veths, the addresses of ten endpoints.
pub fn addresses(node: &Member, pod: &Member) -> Result<Vec<Ipv4Addr>> {
    let [a, b, c, _] = pod.v4().octets();
    let addresses: Vec<Ipv4Addr> = (0..ENDPOINTS).map(|index| Ipv4Addr::new(a, b, c, 200 + index)).collect();
    for address in &addresses {
        pod.ip_command(&format!("address add {address}/32 dev {}", kproxy_lab::UPLINK))?;
        node.ip_command(&format!("route add {address}/32 dev {}", kproxy_lab::veth_name(pod.name())))?;
    }
    Ok(addresses)
}

/// Serves all addresses of a pod on a thread of this process, as long as that lives.
pub fn start(pod: &Member) -> Result<()> {
    let listener = pod.netns().within(|| {
        let all = SocketAddr::from((Ipv4Addr::UNSPECIFIED, TARGET));
        TcpListener::bind(all).with_context(|| format!("cannot listen at {all} in {}", pod.name()))
    })?;
    deepen(&listener)?;
    std::thread::spawn(move || {
        // Where it cannot be pinned, it is not: the ratios are noisier then.
        let _ = arms::pin();
        let mut octet = [0];
        for stream in listener.incoming() {
            // A client that only connects has closed by now.
            if let Ok(mut stream) = stream
                && matches!(stream.read(&mut octet), Ok(1))
            {
                let _ = stream.write_all(&octet);
            }
        }
    });
    Ok(())
}

/// A queue that a whole batch of connections fits into.
pub fn deepen(listener: &TcpListener) -> Result<()> {
    let backlog = nix::sys::socket::Backlog::MAXCONN;
    nix::sys::socket::listen(&listener.as_fd(), backlog).context("cannot lengthen the listener's queue")
}
