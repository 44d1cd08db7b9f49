//! What is answered. The names of the fields and their words are the operator's interface.

use std::net::SocketAddr;

use kproxy_common::{ClientKind, Reason};
use serde::{Serialize, Serializer};

use super::{Place, Query, ServicePort};

/// What happens to a connection, and why.
#[derive(Clone, PartialEq, Eq, Serialize, Debug)]
pub struct Answer {
    /// The client, as asked.
    pub from: std::net::IpAddr,
    /// The destination, as asked.
    pub to: SocketAddr,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// What the client is to the rules: `pod`, `host` or `outside`.
    pub client: &'static str,
    /// What happens.
    pub verdict: Verdict,
    /// `namespace/name:port` of the Service port that matched.
    pub service: Option<String>,
    /// The frontend that matched.
    pub frontend: Option<String>,
    /// Who translates it, where it goes to a backend.
    pub way: Option<Way>,
    /// Where the connection may go, each as likely as the other.
    pub backends: Vec<BackendAnswer>,
    /// How long the client stays with its backend, in seconds.
    pub affinity: Option<u32>,
    /// Whether it is left alone, so that it reaches the load balancer.
    pub pass_through: bool,
    /// The word of the counters and metrics.
    #[serde(serialize_with = "word")]
    pub reason: Reason,
    /// The rule that decided, as a sentence.
    pub rule: String,
    /// What the endpoint set that was chosen does not have, and why.
    pub left_out: Vec<LeftOutAnswer>,
    /// How it is known what the client is.
    #[serde(skip)]
    pub client_because: String,
    /// The Service port, where one matched.
    #[serde(skip)]
    pub port: Option<ServicePort>,
}

/// What happens to a connection.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It is sent to a backend.
    Forward,
    /// It goes where the client sends it.
    Pass,
    /// It is refused.
    Reject,
    /// It gets no answer.
    Drop,
}

/// Which hook translates a connection.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// A socket hook, at connect or at the first datagram: packets are not touched.
    Socket,
    /// Packet hooks, on the interfaces.
    Packet,
}

/// A backend that may be picked.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Debug)]
pub struct BackendAnswer {
    /// Address and port.
    pub address: SocketAddr,
    /// Which source it sees.
    pub source: Source,
    /// Whether it is on this node.
    pub local: bool,
}

/// Which source a backend sees.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The client's own address.
    Kept,
    /// An address of this node.
    Masked,
}

/// Something that an endpoint set does not have.
#[derive(Clone, PartialEq, Eq, Serialize, Debug)]
pub struct LeftOutAnswer {
    /// An endpoint as `ip:port`, or an EndpointSlice.
    pub what: String,
    /// Why.
    pub why: String,
}

impl Answer {
    /// An answer to be filled in.
    pub(super) fn new(query: &Query, kind: ClientKind, place: &Place) -> Self {
        Self {
            from: query.from.into(),
            to: query.to_socket(),
            protocol: query.protocol.to_string().to_lowercase(),
            client: match kind {
                ClientKind::Pod => "pod",
                ClientKind::Host => "host",
                ClientKind::Outside => "outside",
            },
            verdict: Verdict::Pass,
            service: None,
            frontend: None,
            way: None,
            backends: Vec::new(),
            affinity: None,
            pass_through: false,
            reason: Reason::NotAService,
            rule: String::new(),
            left_out: Vec::new(),
            client_because: match place.netns_cookie {
                0 => place.because.clone(),
                _ => format!("{}, opted out of the socket hooks", place.because),
            },
            port: None,
        }
    }
}

impl Verdict {
    /// As in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Pass => "pass",
            Self::Reject => "reject",
            Self::Drop => "drop",
        }
    }
}

impl Source {
    /// As in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Masked => "masked",
        }
    }
}

fn word<S: Serializer>(reason: &Reason, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(reason.word())
}
