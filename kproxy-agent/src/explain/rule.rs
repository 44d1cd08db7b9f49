//! The rule that decided, as a sentence.

use std::net::SocketAddr;

use kproxy_common::{Cidr, ClientKind, FrontendKind, Mode, Options, Protocol, Reason, Tables, TrafficPolicy};

use super::{Ground, Matched, Query, Verdict};
use crate::{plan::split_name, wanted::PassThroughRule};

/// How many ports or addresses a sentence lists.
const LISTED: usize = 8;

/// What a sentence is about.
pub(super) struct Subject<'a, G, T> {
    pub ground: &'a G,
    pub tables: &'a T,
    pub query: &'a Query,
    pub kind: ClientKind,
}

/// A frontend as people call it: `ClusterIP 10.96.0.10:80/TCP`, `NodePort 30080/TCP`.
pub(super) fn frontend(matched: &Matched) -> String {
    let key = matched.info.frontend;
    let kind = kind_name(matched.kind());
    if key.is_node_port() {
        return format!("{kind} {}/{}", key.port(), key.protocol());
    }
    format!("{kind} {}/{}", SocketAddr::new(key.address().into(), key.port()), key.protocol())
}

/// Why this verdict, in a sentence.
pub(super) fn sentence<G: Ground, T: Tables>(
    subject: &Subject<'_, G, T>,
    matched: Option<&Matched>,
    verdict: Verdict,
    reason: Reason,
) -> String {
    let Some(matched) = matched else {
        return without_frontend(subject, reason);
    };
    let (frontend, service) = (frontend(matched), &matched.port.service);
    match reason {
        Reason::Forwarded => forwarded(matched, subject.kind),
        Reason::PassThrough => {
            let rule = PassThroughRule::from_number(matched.info.pass_through_rule);
            let rule = rule.map_or("unknown", PassThroughRule::text);
            let whom = match matched.side.mode() {
                Mode::PassThroughPods => " for pods and for traffic from outside",
                Mode::PassThroughHost => " for the host and for traffic from outside",
                _ => "",
            };
            format!(
                "{frontend} of {service} is in pass-through{whom} ({rule}): the load balancer is to see it"
            )
        }
        Reason::NoEndpoints => format!("{frontend} of {service} has no endpoint, on this node or another"),
        Reason::NoLocalEndpoints => format!(
            "{frontend} of {service} sends to endpoints on this node only ({}: Local), and none is here",
            policy_field(matched.kind())
        ),
        Reason::SourceRange => {
            let who = match subject.kind {
                ClientKind::Host => "this node's address".to_owned(),
                ClientKind::Pod | ClientKind::Outside => subject.query.from.to_string(),
            };
            format!("{who} is in none of the loadBalancerSourceRanges of {service}, which bind {frontend}")
        }
        Reason::LocalAddress => format!(
            "{frontend} of {service}: the address stands on an interface of this node, and a process of the node listens there, \
             as NodeLocal DNSCache does: it is left to that"
        ),
        Reason::LeftToPackets => format!(
            "{frontend} of {service} has loadBalancerSourceRanges, and the address that {} connects with is not \
             known before its first packet",
            subject.query.from
        ),
        Reason::Unserved => {
            let then = if verdict == Verdict::Drop {
                "it lies in a ServiceCIDR, and is not to leave the node"
            } else {
                "it goes where it is addressed to"
            };
            let protocol = subject.query.protocol;
            format!(
                "{frontend} of {service}: no socket hook serves what this host sends by {protocol}; {then}"
            )
        }
        Reason::TableError => {
            format!("{frontend} of {service}: the tables contradict themselves ({verdict:?})")
        }
        other => format!("{frontend} of {service}: {}", other.word()),
    }
}

fn forwarded(matched: &Matched, kind: ClientKind) -> String {
    let (frontend, service) = (frontend(matched), &matched.port.service);
    let field = policy_field(matched.kind());
    let is_local = matched.policy() == Some(TrafficPolicy::Local);
    let is_cluster_ip = matched.kind() == Some(FrontendKind::ClusterIp);
    let sends = match (is_local, is_cluster_ip || kind == ClientKind::Outside) {
        (false, _) => format!("sends to any endpoint ({field}: Cluster)"),
        (true, true) => format!("sends to endpoints on this node only ({field}: Local)"),
        (true, false) => {
            format!("sends clients on this node to any endpoint, also under {field}: Local")
        }
    };
    let passed = match matched.side.mode() {
        Mode::PassThroughPods => "; its pass-through is for pods",
        Mode::PassThroughHost => "; its pass-through is for the host",
        _ => "",
    };
    let ranges = if matched.side.has(Options::SOURCE_RANGES) {
        "; the client is in loadBalancerSourceRanges"
    } else {
        ""
    };
    format!("{frontend} of {service} {sends}{passed}{ranges}")
}

fn without_frontend<G: Ground, T: Tables>(subject: &Subject<'_, G, T>, reason: Reason) -> String {
    let Subject { ground, tables, query, kind, .. } = subject;
    let (to, wanted) = (query.to, format!("{}/{}", query.port, query.protocol));
    match reason {
        Reason::UndefinedPort => {
            let then = match query.protocol {
                Protocol::Udp => "; a socket may connect to it, and is refused when it sends",
                Protocol::Tcp | Protocol::Sctp => "",
            };
            format!("{}{then}", undefined_port(*ground, query))
        }
        Reason::Unserved => format!(
            "{}; what this host sends by {} is not answered, and is not to leave the node",
            undefined_port(*ground, query),
            query.protocol
        ),
        Reason::UnallocatedAddress => {
            let cidrs = tables.config().map(|config| config.service_cidrs).unwrap_or([Cidr::NONE; 8]);
            let cidr = cidrs.iter().find(|cidr| cidr.contains(&to)).map(text_of).unwrap_or_default();
            format!("{to} lies in the ServiceCIDR {cidr}, but no Service has it: it is not to leave the node")
        }
        Reason::OtherProxy => format!(
            "{to} is the ClusterIP of a Service that another proxy serves (label \
             service.kubernetes.io/service-proxy-name)"
        ),
        Reason::LocalAddress => format!(
            "{to} stands on an interface of this node, and no Service has port {wanted} there: it is left to whatever listens \
             on the node"
        ),
        Reason::NotAService if to.is_unspecified() => {
            format!("{to} is no address of a machine: a packet that is sent to it reaches nobody")
        }
        Reason::NotAService if to.is_loopback() => match kind {
            ClientKind::Host => format!("no NodePort {wanted} answers on loopback addresses"),
            _ => format!("{to} is the client's own loopback address"),
        },
        Reason::NotAService => match at_address(*ground, query) {
            Some((service, kind, ports)) => {
                format!(
                    "{to} is {kind} of {service}, but no Service has port {wanted} there (there is {ports})"
                )
            }
            None => format!("no Service has {}/{}", query.to_socket(), query.protocol),
        },
        other => format!("{query}: {}", other.word()),
    }
}

fn undefined_port(ground: &impl Ground, query: &Query) -> String {
    let (to, wanted) = (query.to, format!("{}/{}", query.port, query.protocol));
    match at_address(ground, query) {
        Some((service, _, ports)) => {
            format!("{to} is the ClusterIP of {service}, which has no port {wanted} (it has {ports})")
        }
        None => format!("{to} is the ClusterIP of a Service that has no port {wanted}"),
    }
}

/// The Service that has the destination's address on other ports, as what, and these ports.
fn at_address(ground: &impl Ground, query: &Query) -> Option<(String, String, String)> {
    let mut found = ground.frontends();
    found.retain(|(key, _)| key.address() == query.to);
    found.sort_unstable();
    let (_, number) = found.first()?;
    let info = ground.info(*number)?;
    let (service, _) = split_name(info.name())?;
    let kind = match FrontendKind::try_from(info.frontend_kind).ok() {
        Some(FrontendKind::ExternalIp) => "an external IP",
        Some(FrontendKind::LoadBalancer) => "a load-balancer address",
        _ => "the ClusterIP",
    };
    let mut ports: Vec<_> =
        found.iter().take(LISTED).map(|(key, _)| format!("{}/{}", key.port(), key.protocol())).collect();
    if found.len() > LISTED {
        ports.push(format!("{} more", found.len() - LISTED));
    }
    Some((service.to_string(), kind.to_owned(), ports.join(", ")))
}

fn kind_name(kind: Option<FrontendKind>) -> &'static str {
    match kind {
        Some(FrontendKind::ClusterIp) => "ClusterIP",
        Some(FrontendKind::NodePort) => "NodePort",
        Some(FrontendKind::ExternalIp) => "external IP",
        Some(FrontendKind::LoadBalancer) => "load-balancer address",
        None => "frontend",
    }
}

fn policy_field(kind: Option<FrontendKind>) -> &'static str {
    if kind == Some(FrontendKind::ClusterIp) { "internalTrafficPolicy" } else { "externalTrafficPolicy" }
}

fn text_of(cidr: &Cidr) -> String {
    let length = cidr.prefix_length() - if cidr.address().is_v4() { 96 } else { 0 };
    format!("{}/{length}", cidr.address())
}
