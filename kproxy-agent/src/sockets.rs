//! Connected UDP sockets whose backend serves no more: they are destroyed, so that their processes see an error
//! (ECONNABORTED) and connect again. Only sockets that went through kproxy to that backend of that Service: which those
//! are, their own storage says, and the kernel destroys a socket only if its cookie is the one that stands there.
//!
//! The work is done by a thread of its own, which enters the network namespaces of this node's processes one after the
//! other.

mod diag;

pub use diag::listeners;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use kproxy_common::ConnectedSocket;

use crate::{flows::Serving, namespaces::Namespaces, programs::SocketIterator};

/// As for flows.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// Destroys sockets when it is told what serves.
#[derive(Debug)]
pub struct Destroyer {
    sender: Sender<Serving>,
}

impl Destroyer {
    /// For the processes below `cgroup`, and this network namespace.
    pub fn start(iterator: SocketIterator, cgroup: PathBuf) -> Result<Self> {
        let (sender, receiver) = channel();
        thread::Builder::new()
            .name("sockets".to_owned())
            .spawn(move || run(&iterator, &cgroup, &receiver))
            .context("cannot start a thread")?;
        Ok(Self { sender })
    }

    /// Some backends serve no more: these do.
    pub fn changed(&self, serving: &Serving) {
        // The thread ends only with this sender.
        let _ = self.sender.send(serving.clone());
    }
}

fn run(iterator: &SocketIterator, cgroup: &std::path::Path, changes: &Receiver<Serving>) {
    // What is to be looked at once more: a program may have chosen just before a change, and told so just after.
    let mut again: Option<Serving> = None;
    loop {
        let next = match &again {
            Some(_) => changes.recv_timeout(SECOND_LOOK),
            None => changes.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        let serving = match (next, again.take()) {
            // The latest counts.
            (Ok(serving), _) => {
                let latest = changes.try_iter().last().unwrap_or(serving);
                again = Some(latest.clone());
                latest
            }
            (Err(RecvTimeoutError::Timeout), Some(serving)) => serving,
            (Err(_), _) => return,
        };
        match destroy(iterator, cgroup, &serving) {
            Ok(0) => {}
            Ok(count) => tracing::info!(
                count,
                "destroyed connected UDP sockets whose backend serves no more, so that their processes connect again"
            ),
            Err(error) => {
                tracing::warn!("UDP clients whose backend serves no more may not notice: {error:#}")
            }
        }
    }
}

/// How many were destroyed.
fn destroy(iterator: &SocketIterator, cgroup: &std::path::Path, serving: &Serving) -> Result<usize> {
    let sockets = iterator.list().context("cannot list connected sockets")?;
    let mut dead = by_cookie(&sockets, serving);
    if dead.is_empty() {
        return Ok(0);
    }
    let mut count = 0;
    let mut first_error = None;
    let namespaces = Namespaces::of_processes(cgroup)?;
    namespaces.visit(|cookie| {
        // Without SO_NETNS_COOKIE (before 5.14) they are looked for everywhere; the socket's own cookie decides.
        let is_here =
            |socket: &ConnectedSocket| cookie.is_none_or(|here| here == socket.identity.netns_cookie);
        if !dead.values().any(is_here) {
            return;
        }
        match diag::destroy(&dead) {
            Ok(done) => {
                count += done.len();
                dead.retain(|cookie, _| !done.contains(cookie));
            }
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    })?;
    if let (hidden @ 1.., false) = (namespaces.hidden(), dead.is_empty()) {
        bail!(
            "{hidden} processes hide their network namespaces from the agent, which needs the host's PID namespace (hostPID: \
             true) and CAP_SYS_PTRACE"
        );
    }
    match first_error {
        // Not unusual: a process closed its socket, or connected it elsewhere.
        None => Ok(count),
        Some(error) => Err(explain(error)),
    }
}

/// Those that must go, by their cookies.
fn by_cookie(sockets: &[ConnectedSocket], serving: &Serving) -> BTreeMap<u64, ConnectedSocket> {
    let dead = sockets.iter().filter(|socket| {
        let record = &socket.record;
        serving.must_move(record.service, record.backend_address, record.backend_port)
    });
    dead.map(|socket| (socket.identity.socket_cookie, *socket)).collect()
}

/// Where the socket is connected to, in truth.
fn peer(socket: &ConnectedSocket) -> SocketAddr {
    SocketAddr::new(IpAddr::from(socket.record.backend_address), socket.record.backend_port)
}

fn explain(error: io::Error) -> anyhow::Error {
    let hint = match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOENT) => {
            "this kernel cannot destroy UDP sockets (CONFIG_INET_DIAG_DESTROY, CONFIG_INET_UDP_DIAG)"
        }
        _ => "sock_diag",
    };
    anyhow::Error::new(error).context(hint)
}

#[cfg(test)]
mod tests {
    use kproxy_common::{Address, SocketIdentity, SocketRecord};

    use super::*;

    #[test]
    fn the_true_peer_is_the_backend() {
        let socket = ConnectedSocket {
            identity: SocketIdentity { socket_cookie: 1, netns_cookie: 2 },
            record: SocketRecord {
                service_address: Address::from("10.96.0.10".parse::<IpAddr>().unwrap()),
                backend_address: Address::from("10.244.1.7".parse::<IpAddr>().unwrap()),
                service_port: 53,
                backend_port: 5_353,
                ..SocketRecord::EMPTY
            },
        };
        assert_eq!(peer(&socket), "10.244.1.7:5353".parse().unwrap());
    }
}
