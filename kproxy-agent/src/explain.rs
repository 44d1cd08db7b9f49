//! What happens to a connection, and why: the decision of `kproxy_common`, asked about one client and one address,
//! over the node's maps ([`Live`]) or over tables that were computed from objects ([`Planned`]); and what it says,
//! in words.

mod answer;
mod live;
mod planned;
mod query;
mod rule;
mod text;

use anyhow::Result;
use kproxy_common::{
    Backend, Balance, Client, ClientKind, Connection, FrontendKey, FrontendKind, Options, PacketMeta,
    PacketVerdict, Piece, Protocol, Resolution, ServiceInfo, Side, SocketCall, SocketVerdict, Tables,
    TcpFlags, TrafficPolicy, choose, is_masked, new_egress, resolve, socket_connection,
};

pub use self::{
    answer::{Answer, BackendAnswer, LeftOutAnswer, Source, Verdict, Way},
    live::Live,
    planned::{Hooks, Planned},
    query::{Query, QueryError},
    text::text,
};
use crate::{
    model::{LeftOut, objects::Family},
    plan::split_name,
    wanted::ServiceKey,
};

/// Where tables are, and what is known beside them.
pub trait Ground {
    /// What the decision reads.
    fn tables(&self) -> impl Tables;
    /// Whose number it is.
    fn info(&self, number: u32) -> Option<ServiceInfo>;
    /// Every frontend and its number; asked for only where a port must be named.
    fn frontends(&self) -> Vec<(FrontendKey, u32)>;
    /// Where the client with this address is.
    fn place(&self, query: &Query) -> Place;
    /// Whether this client shares a bridge with this node's pods whose frames pass netfilter by; of no matter to what socket
    /// hooks translate. Without an interface nothing of that kind is known.
    fn shares_bridge(&self, _: &Query) -> bool {
        false
    }
    /// What the set leaves out, where more is known of it than the tables say.
    fn left_out(&self, port: &ServicePort, set: TrafficPolicy) -> Option<Vec<LeftOut>>;
    /// An error if something could not be read since the last call: what was answered since is worth nothing.
    fn check(&self) -> Result<()>;
}

/// Where a client is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// Behind which interface its packets come in: a pod's of this node, none (the host), or any other.
    pub behind: ClientKind,
    /// How that is known, for people: `an address of this node`.
    pub because: String,
    /// The cookie of its network namespace, if it is a pod that is opted out of the socket hooks; else 0.
    pub netns_cookie: u64,
}

/// A Service port in one family, by name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// The Service.
    pub service: ServiceKey,
    /// `spec.ports[].name`, empty without one.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// The family of its endpoints.
    pub family: Family,
}

/// A frontend that matched.
struct Matched {
    number: u32,
    info: ServiceInfo,
    side: Side,
    port: ServicePort,
    /// Whether the client's side is the one of traffic from outside.
    is_outside: bool,
}

/// Answers `query` over `ground`.
pub fn explain(ground: &impl Ground, query: &Query) -> Result<Answer> {
    let tables = ground.tables();
    let place = ground.place(query);
    let kind = place.behind;
    let mut answer = Answer::new(query, kind, &place);
    // What a socket asks for; no packet of anyone else's is addressed like this.
    let asked = query.to;
    let is_socket = place.behind != ClientKind::Outside;
    let query = &Query { to: if is_socket { asked.or_loopback() } else { asked }, ..*query };
    let client = Client { kind, address: query.from, netns_cookie: 0 };
    let connection = Connection { client, destination: query.to, port: query.port, protocol: query.protocol };
    let resolution = resolve(&tables, &connection);
    let number = match resolution {
        Resolution::Balance(balance) => Some(balance.number),
        Resolution::Pass { number, .. }
        | Resolution::Reject { number, .. }
        | Resolution::Drop { number, .. } => number,
    };
    let matched = number.and_then(|number| matched(ground, &tables, query, kind, number));
    let subject = rule::Subject { ground, tables: &tables, query, kind };
    if let Some(matched) = &matched {
        answer.service = Some(service_name(ground, query, matched));
        answer.frontend = Some(rule::frontend(matched));
        answer.port = Some(matched.port.clone());
    }
    let (verdict, reason) = match resolution {
        // No socket hook sees it.
        _ if place.behind == ClientKind::Host && query.protocol == Protocol::Sctp => unserved(&tables, query),
        Resolution::Pass { reason, .. } => (Verdict::Pass, reason),
        Resolution::Reject { reason, .. } => (Verdict::Reject, reason),
        Resolution::Drop { reason, .. } => (Verdict::Drop, reason),
        Resolution::Balance(balance) => {
            let way = way(&tables, &connection, &place);
            if let (ClientKind::Host, Way::Packet) = (place.behind, way) {
                unserved(&tables, query)
            } else {
                answer.way = Some(way);
                let beside_pods = way == Way::Packet && ground.shares_bridge(query);
                answer.backends = backends(&tables, &balance, &connection.client, &place, way, beside_pods);
                match answer.backends.is_empty() {
                    true => (Verdict::Drop, kproxy_common::Reason::TableError),
                    false => (Verdict::Forward, kproxy_common::Reason::Forwarded),
                }
            }
        }
    };
    answer.verdict = verdict;
    answer.pass_through = reason == kproxy_common::Reason::PassThrough;
    answer.reason = reason;
    if let Some(matched) = &matched {
        if verdict == Verdict::Forward && matched.side.has(Options::AFFINITY) {
            answer.affinity = tables.identity(matched.number).map(|identity| identity.affinity_timeout());
        }
        if let Some(set) = matched.set(verdict, reason) {
            answer.left_out = left_out(ground, &tables, matched, set);
        }
    }
    answer.rule = rule::sentence(&subject, matched.as_ref(), verdict, reason);
    if asked != query.to {
        answer.rule = format!("{asked} means {} to a socket; {}", query.to, answer.rule);
    }
    ground.check()?;
    Ok(answer)
}

fn matched(
    ground: &impl Ground,
    tables: &impl Tables,
    query: &Query,
    kind: ClientKind,
    number: u32,
) -> Option<Matched> {
    let info = ground.info(number)?;
    let (service, name) = split_name(info.name())?;
    let port = ServicePort {
        service,
        name: name.to_owned(),
        protocol: query.protocol,
        family: Family::of(&query.to),
    };
    let side = tables.side(number, kind)?;
    Some(Matched { number, info, side, port, is_outside: kind == ClientKind::Outside })
}

/// Which hook translates a connection to a backend: a socket hook at connect, for clients on this node, or packet
/// hooks. Asked of the decision of the socket hooks, since they leave some to the packet hooks.
fn way(tables: &impl Tables, connection: &Connection, place: &Place) -> Way {
    // Nothing runs when an SCTP socket connects.
    if place.behind == ClientKind::Outside || connection.protocol == Protocol::Sctp {
        return Way::Packet;
    }
    // A socket has no address yet when it is asked about.
    let (address, netns_cookie) = (connection.destination.any_of_family(), place.netns_cookie);
    let client = Client { address, netns_cookie, ..connection.client };
    match socket_connection(tables, &Connection { client, ..*connection }, SocketCall::Connect, || 0) {
        SocketVerdict::Translate { .. } => Way::Socket,
        SocketVerdict::Leave { .. } | SocketVerdict::Refuse { .. } => Way::Packet,
    }
}

/// What becomes of a packet that this host sends where no socket hook has translated its connection: the hook of the
/// interface that it leaves by decides.
fn unserved(tables: &impl Tables, query: &Query) -> (Verdict, kproxy_common::Reason) {
    let packet = PacketMeta {
        source: query.from,
        destination: query.to,
        // Any that a client can have.
        source_port: u16::MAX,
        destination_port: query.port,
        protocol: query.protocol,
        tcp: TcpFlags::default(),
        piece: Piece::Whole,
        has_payload: false,
    };
    match new_egress(tables, &packet) {
        PacketVerdict::Pass { reason } => (Verdict::Pass, reason),
        PacketVerdict::Refuse { reason } => (Verdict::Reject, reason),
        PacketVerdict::Drop { reason } => (Verdict::Drop, reason),
        PacketVerdict::SetDestination { .. } | PacketVerdict::SetSource { .. } => {
            (Verdict::Drop, kproxy_common::Reason::TableError)
        }
    }
}

/// Every backend that [`choose`] can pick, in the order of the set: it is asked once for each, with the random
/// number that falls on it.
fn backends(
    tables: &impl Tables,
    balance: &Balance,
    client: &Client,
    place: &Place,
    way: Way,
    beside_pods: bool,
) -> Vec<BackendAnswer> {
    let side = balance.side;
    let count = u64::from(side.count());
    // Without affinity: where a client went before is no rule, and asking must not remember anything.
    let options = side.options() & !Options::AFFINITY;
    let spread = Balance {
        number: balance.number,
        side: Side::new(side.first_slot(), side.count(), side.mode(), options),
    };
    let mut picked: Vec<Backend> = (0..count)
        .filter_map(|place| {
            let pick = (place << 32).div_ceil(count);
            choose(tables, &spread, client, u32::try_from(pick).ok()?).map(|choice| choice.backend)
        })
        .collect();
    picked.sort_by_key(|backend| (backend.address(), backend.port()));
    // A socket that was translated sends packets from the client to the backend, which nobody touches.
    let is_masked = |backend: &Backend| {
        way == Way::Packet
            && (is_masked(tables, &side, backend, place.behind, &client.address)
                || backend.is_local() && beside_pods)
    };
    let answer = |backend: &Backend| BackendAnswer {
        address: std::net::SocketAddr::new(backend.address().into(), backend.port()),
        source: if is_masked(backend) { Source::Masked } else { Source::Kept },
        local: backend.is_local(),
    };
    picked.iter().map(answer).collect()
}

/// `namespace/name:port`: the port by its name, or by its number where it has none, as in an Ingress.
fn service_name(ground: &impl Ground, query: &Query, matched: &Matched) -> String {
    let ServicePort { service, name, .. } = &matched.port;
    if !name.is_empty() {
        return format!("{service}:{name}");
    }
    if matched.kind() != Some(FrontendKind::NodePort) {
        return format!("{service}:{}", query.port);
    }
    // A NodePort's own number is not the port's: another frontend of the same port has that.
    let number = ground.frontends().into_iter().find_map(|(key, number)| {
        let info = ground.info(number)?;
        let is_it =
            key.protocol() == query.protocol && !key.is_node_port() && info.name() == matched.info.name();
        is_it.then(|| key.port())
    });
    format!("{service}:{}", number.unwrap_or(query.port))
}

fn left_out(
    ground: &impl Ground,
    tables: &impl Tables,
    matched: &Matched,
    set: TrafficPolicy,
) -> Vec<LeftOutAnswer> {
    if let Some(known) = ground.left_out(&matched.port, set) {
        return known.into_iter().map(|LeftOut { what, why }| LeftOutAnswer { what, why }).collect();
    }
    // The tables hold whatever serves; of what does not they know nothing.
    let Some(block) = tables.block(matched.number) else { return Vec::new() };
    let all = block.first_slot()..block.first_slot().saturating_add(u32::from(block.serving()));
    let in_set = |slot: u32| slot.wrapping_sub(matched.side.first_slot()) < u32::from(matched.side.count());
    let mut left_out: Vec<_> = all
        .filter(|slot| !in_set(*slot))
        .filter_map(|slot| tables.backend(slot))
        .map(|backend| LeftOutAnswer {
            what: std::net::SocketAddr::new(backend.address().into(), backend.port()).to_string(),
            why: match (set, backend.is_local(), backend.state()) {
                (TrafficPolicy::Local, false, _) => "not on this node",
                (_, _, kproxy_common::BackendState::Terminating) => {
                    "not ready, or terminating while others are"
                }
                (_, _, kproxy_common::BackendState::Ready) => "its hints are for another node or zone",
            }
            .to_owned(),
        })
        .collect();
    left_out.sort_by(|a, b| a.what.cmp(&b.what));
    left_out
}

impl Matched {
    fn kind(&self) -> Option<FrontendKind> {
        FrontendKind::try_from(self.info.frontend_kind).ok()
    }

    fn policy(&self) -> Option<TrafficPolicy> {
        TrafficPolicy::try_from(self.info.traffic_policy).ok()
    }

    /// The set that the connection was to go to; `None` where none was looked at.
    fn set(&self, verdict: Verdict, reason: kproxy_common::Reason) -> Option<TrafficPolicy> {
        use kproxy_common::Reason::{NoEndpoints, NoLocalEndpoints};
        let is_looked_at = verdict == Verdict::Forward || matches!(reason, NoEndpoints | NoLocalEndpoints);
        if !is_looked_at {
            return None;
        }
        // Clients inside are short-circuited under externalTrafficPolicy.
        if self.kind()? != FrontendKind::ClusterIp && !self.is_outside {
            return Some(TrafficPolicy::Cluster);
        }
        self.policy()
    }
}
