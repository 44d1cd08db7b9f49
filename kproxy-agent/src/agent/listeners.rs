//! What processes of this node listen on at ClusterIPs that stand on its interfaces, as NodeLocal DNSCache does.
//!
//! Polled: the kernel sends no notification of new sockets. Only while there are such addresses.

use std::{
    collections::BTreeSet,
    io,
    time::{Duration, Instant},
};

use kproxy_common::{Address, FrontendKey};

use crate::sockets;

/// How long a socket may be there, or gone, before it counts.
const PERIOD: Duration = Duration::from_secs(1);

/// A look may take one part in this many of the agent's time: on a node with very many UDP sockets it is had less often.
const SHARE: u32 = 50;

/// Where to look, and what was found there last.
#[derive(Debug, Default)]
pub struct Listeners {
    at: BTreeSet<Address>,
    found: Option<BTreeSet<FrontendKey>>,
    next: Option<Instant>,
    has_failed: bool,
}

impl Listeners {
    /// Looks at these addresses from now on; what listens there, if they are others than before.
    pub fn follow(&mut self, at: BTreeSet<Address>) -> Option<Option<BTreeSet<FrontendKey>>> {
        if self.at == at {
            return None;
        }
        for address in at.difference(&self.at) {
            tracing::info!(
                "the ClusterIP {address} stands on an interface of this node: what its processes listen on there is left to \
                 them, the other ports are served"
            );
        }
        self.at = at;
        self.look();
        Some(self.found.clone())
    }

    /// When to look next.
    pub fn next_look(&self) -> Option<Instant> {
        self.next
    }

    /// Looks again; what listens there, if that changed.
    pub fn look_again(&mut self) -> Option<Option<BTreeSet<FrontendKey>>> {
        let before = self.found.take();
        self.look();
        if before == self.found {
            return None;
        }
        let of = |found: &Option<BTreeSet<FrontendKey>>| found.clone().unwrap_or_default();
        let (before, now) = (of(&before), of(&self.found));
        for key in now.difference(&before) {
            tracing::info!("a process of this node listens at {}: it is left to it", shown(key));
        }
        for key in before.difference(&now) {
            tracing::info!("no process of this node listens at {} any more: it is served", shown(key));
        }
        Some(self.found.clone())
    }

    fn look(&mut self) {
        if self.at.is_empty() {
            (self.found, self.next) = (Some(BTreeSet::new()), None);
            return;
        }
        let start = Instant::now();
        let found = sockets::listeners(&self.at);
        let now = Instant::now();
        self.next = Some(now + PERIOD.max((now - start) * SHARE));
        self.tell(found.as_ref().err());
        self.found = found.ok();
    }

    fn tell(&mut self, error: Option<&io::Error>) {
        let has_failed = error.is_some();
        if let (Some(error), false) = (error, self.has_failed) {
            tracing::warn!(
                "what listens at ClusterIPs that stand on interfaces of this node cannot be told, so that all their ports are \
                 left alone: {error} (sock_diag; CONFIG_INET_DIAG, CONFIG_INET_UDP_DIAG)"
            );
        }
        self.has_failed = has_failed;
    }
}

fn shown(key: &FrontendKey) -> String {
    let to = std::net::SocketAddr::new(key.address().into(), key.port());
    format!("{to}/{}", key.protocol())
}
