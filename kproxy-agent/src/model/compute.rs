//! One Service, its endpoints and its node become what the Service wants in the tables.

use std::collections::{BTreeMap, BTreeSet};

use kproxy_common::{
    Address, AddressKind, Cidr, FrontendKey, FrontendKind, Mode, Options, Protocol, TrafficPolicy,
};

use super::claims::Claims;
use super::config::NodeConfig;
use super::endpoint_sets::{EndpointSets, MAX_BACKENDS, Place, Run, Uses, endpoint_sets};
use super::frontends::{Frontend, Frontends, frontends};
use super::health_check::{WantedHealthCheck, health_check_keys, local_endpoints};
use super::local_addresses::{LocalAddresses, leftover_of};
use super::objects::{EndpointSlice, Family, ServedBy, Service};
use super::pass_through::{PassThrough, decide, inside_mode};
use super::problem::{ObjectRef, Problem, ProblemKind};
use crate::wanted::{PassThroughRule, WantedFrontend, WantedPort, WantedService, WantedSide};

/// What a Service is computed from, besides itself and its slices.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The node's flags.
    pub config: &'a NodeConfig,
    /// The node's name and zone.
    pub place: Place<'a>,
    /// The node's own addresses.
    pub node_addresses: &'a [Address],
    /// The addresses on its interfaces.
    pub local_addresses: &'a LocalAddresses,
    /// What processes listen on at ClusterIPs among these; `None`: nobody can tell.
    pub listeners: Option<&'a BTreeSet<FrontendKey>>,
    /// Who has which frontend.
    pub frontends: &'a Claims<FrontendKey>,
    /// Who has which ClusterIP.
    pub addresses: &'a Claims<Address>,
}

/// What follows from a Service.
#[derive(Clone, Debug, Default)]
pub struct Computed {
    /// What it wants in the tables, if anything.
    pub wanted: Option<WantedService>,
    /// What its `healthCheckNodePort` tells, if it has one.
    pub health_check: Option<WantedHealthCheck>,
    /// What it cannot have.
    pub problems: Vec<Problem>,
}

/// What `service` wants, and what it cannot have. `slices` are its own, by name.
pub fn compute(
    service: &Service,
    slices: &BTreeMap<Box<str>, EndpointSlice>,
    context: &Context<'_>,
) -> Computed {
    let mut problems = Problems { object: ObjectRef::service(&service.key), list: Vec::new() };
    let Frontends { mut claimed, duplicates } = frontends(service, context.config);
    for frontend in duplicates {
        let message = format!("{} belongs to a port before it; it is skipped here", Shown(&frontend));
        problems.add(ProblemKind::Duplicate, field(&frontend), message);
    }
    claimed.retain(|frontend| {
        let Some(winner) = context.frontends.rival(&frontend.key, &service.key) else { return true };
        let message = format!(
            "{} belongs to Service {winner}, which is older (or, of the same age, first by name); \
             it is skipped here until that Service gives it up",
            Shown(frontend)
        );
        problems.add(ProblemKind::ClaimedTwice, field(frontend), message);
        false
    });
    let ranges = Family::ALL.map(|family| SourceRanges::of(service, family, context.node_addresses));
    let of_one_port = |a: &Frontend, b: &Frontend| a.port == b.port && family(a) == family(b);
    let ports: Vec<_> = claimed
        .chunk_by(of_one_port)
        .map(|frontends| wanted_port(service, frontends, slices, &ranges, context, &mut problems))
        .collect();
    if !service.source_ranges.is_empty() {
        report_ranges_not_enforced(&claimed, service, context, &mut problems);
    }
    report_never_left(&claimed, service, context, &mut problems);
    let health_check = health_check(service, slices, context, &mut problems);
    let addresses = wanted_addresses(service, context, &mut problems);
    let wanted = (!ports.is_empty() || !addresses.is_empty()).then(|| WantedService {
        key: (*service.key).clone(),
        kind: service.kind,
        ports,
        addresses,
    });
    Computed { wanted, health_check, problems: problems.list }
}

struct Problems {
    object: ObjectRef,
    list: Vec<Problem>,
}

impl Problems {
    fn add(&mut self, kind: ProblemKind, field: String, message: String) {
        self.list.push(Problem { object: self.object.clone(), field, kind, message });
    }
}

/// `frontends` are those of one port in one family, and not empty.
fn wanted_port(
    service: &Service,
    frontends: &[Frontend],
    slices: &BTreeMap<Box<str>, EndpointSlice>,
    ranges: &[SourceRanges; 2],
    context: &Context<'_>,
    problems: &mut Problems,
) -> WantedPort {
    let (port, family) = (&service.ports[frontends[0].port], family(&frontends[0]));
    let mut uses = Uses::default();
    let rules: Vec<_> = frontends.iter().map(|frontend| Rule::of(frontend, service, context)).collect();
    for set in rules.iter().flat_map(|rule| [rule.inside.set, rule.outside.set]).flatten() {
        match set {
            TrafficPolicy::Cluster => uses.cluster = true,
            TrafficPolicy::Local => uses.local = true,
        }
    }
    let sets = endpoint_sets(port, family, slices.values(), context.place, uses);
    if sets.left_out > 0 {
        let message = format!(
            "port {:?} has {} {} endpoints more than the {MAX_BACKENDS} that fit; those beyond are not used",
            port.name,
            sets.left_out,
            family.text()
        );
        problems.add(ProblemKind::DoesNotFit, format!("spec.ports[{}]", frontends[0].port), message);
    }
    let frontends = frontends.iter().zip(rules);
    WantedPort {
        name: (*port.name).to_owned(),
        protocol: port.protocol,
        affinity_timeout: service.affinity_timeout,
        in_sets: sets.in_sets,
        frontends: frontends
            .map(|(frontend, rule)| wanted_frontend(frontend, rule, service, &sets, &ranges[family as usize]))
            .collect(),
        backends: sets.backends,
    }
}

fn wanted_frontend(
    frontend: &Frontend,
    rule: Rule,
    service: &Service,
    sets: &EndpointSets,
    ranges: &SourceRanges,
) -> WantedFrontend {
    let is_passed_through = rule.pass_through.is_some_and(|decision| decision.is_on);
    let is_restricted =
        frontend.kind == FrontendKind::LoadBalancer && !is_passed_through && !ranges.list.is_empty();
    let mut options = if service.affinity_timeout > 0 { Options::AFFINITY } else { 0 };
    if is_restricted {
        options |= Options::SOURCE_RANGES;
    }
    let host = if is_restricted && ranges.contain_node { Options::HOST_IN_RANGES } else { 0 };
    WantedFrontend {
        key: frontend.key,
        kind: frontend.kind,
        policy: policy(frontend.kind, service),
        inside: rule.inside.wanted(sets, options | host),
        outside: rule.outside.wanted(sets, options),
        source_ranges: if is_restricted { ranges.list.clone() } else { Vec::new() },
        pass_through_rule: rule.pass_through.map_or(PassThroughRule::NotApplicable, |decision| decision.rule),
    }
}

/// What a frontend does, before it is known which endpoints there are.
#[derive(Clone, Copy, Debug)]
struct Rule {
    inside: SideRule,
    outside: SideRule,
    pass_through: Option<PassThrough>,
}

#[derive(Clone, Copy, Debug)]
struct SideRule {
    /// The set that connections go to, if any do.
    set: Option<TrafficPolicy>,
    /// What is done as long as the set has backends, or where there is no set.
    mode: Mode,
    masquerade: u8,
}

impl Rule {
    fn of(frontend: &Frontend, service: &Service, context: &Context<'_>) -> Self {
        let Context { config, local_addresses, listeners, .. } = context;
        if let Some(load_balancer) = &frontend.load_balancer {
            let decision = decide(service, load_balancer, &config.pass_through);
            let rule = Self { pass_through: Some(decision), ..Self::external(service) };
            if !decision.is_on {
                return rule;
            }
            let inside = match inside_mode(config.pass_through.scope) {
                Mode::PassThrough => SideRule::leave(Mode::PassThrough),
                mode => SideRule { mode, ..rule.inside },
            };
            return Self { inside, outside: SideRule::leave(Mode::PassThrough), ..rule };
        }
        if frontend.kind != FrontendKind::ClusterIp {
            return Self::external(service);
        }
        let is_listened_on = || listeners.is_none_or(|keys| keys.contains(&frontend.key));
        if local_addresses.contains(&frontend.key.address()) && is_listened_on() {
            let leave = SideRule::leave(Mode::LocalAddress);
            return Self { inside: leave, outside: leave, pass_through: None };
        }
        let everyone = if config.masquerade_all { Options::MASQUERADE } else { 0 };
        let has_cluster_cidr = config.cluster_cidrs.iter().any(|c| c.address().is_v4() == is_v4(frontend));
        // Where it is known which addresses are pods', whoever has another one is masked, as kube-proxy does; where it
        // is not, only those whose answers would otherwise take another way.
        let strangers =
            if has_cluster_cidr { Options::MASQUERADE_OFF_CLUSTER } else { Options::MASQUERADE_REMOTE };
        let set = service.internal_policy;
        Self {
            inside: SideRule::forward(set, everyone),
            outside: SideRule::forward(set, if everyone != 0 { everyone } else { strangers }),
            pass_through: None,
        }
    }

    /// NodePorts, external IPs and load-balancer addresses.
    fn external(service: &Service) -> Self {
        let outside = match service.external_policy {
            TrafficPolicy::Cluster => SideRule::forward(TrafficPolicy::Cluster, Options::MASQUERADE_REMOTE),
            TrafficPolicy::Local => SideRule::forward(TrafficPolicy::Local, 0),
        };
        Self { inside: SideRule::forward(TrafficPolicy::Cluster, 0), outside, pass_through: None }
    }
}

impl SideRule {
    fn forward(set: TrafficPolicy, masquerade: u8) -> Self {
        Self { set: Some(set), mode: Mode::Forward, masquerade }
    }

    fn leave(mode: Mode) -> Self {
        Self { set: None, mode, masquerade: 0 }
    }

    fn wanted(self, sets: &EndpointSets, options: u8) -> WantedSide {
        let Some(set) = self.set else {
            return WantedSide { offset: 0, count: 0, mode: self.mode, options: 0 };
        };
        let Run { offset, count } = match set {
            TrafficPolicy::Cluster => sets.cluster,
            TrafficPolicy::Local => sets.local,
        };
        let is_local = if set == TrafficPolicy::Local { Options::LOCAL_SET } else { 0 };
        let options = options | self.masquerade | is_local;
        if count > 0 {
            return WantedSide { offset, count, mode: self.mode, options };
        }
        // Pass-through beats reject and drop for those whom it is for; the programs refuse the others, since
        // the set is empty.
        let mode = match self.mode {
            Mode::Forward if sets.has_any => Mode::Drop,
            Mode::Forward => Mode::Reject,
            mode => mode,
        };
        WantedSide { offset: 0, count: 0, mode, options }
    }
}

/// The port counts as a frontend like any other: a NodePort of the same number would swallow the requests of the
/// load balancer.
fn health_check(
    service: &Service,
    slices: &BTreeMap<Box<str>, EndpointSlice>,
    context: &Context<'_>,
    problems: &mut Problems,
) -> Option<WantedHealthCheck> {
    let port = service.health_check_node_port?;
    let field = || "spec.healthCheckNodePort".to_owned();
    let is_port = |other: &super::objects::ServicePort| {
        other.node_port == Some(port) && other.protocol == Protocol::Tcp
    };
    if service.ports.iter().any(is_port) {
        let message = format!("{port} is a nodePort of this Service too; health checks are not answered");
        problems.add(ProblemKind::Duplicate, field(), message);
        return None;
    }
    let mut counts = BTreeMap::new();
    for key in health_check_keys(service) {
        let family = Family::of(&key.address());
        if let Some(winner) = context.frontends.rival(&key, &service.key) {
            let message = format!(
                "port {port} belongs to Service {winner}, which is older (or, of the same age, first by name); \
                 health checks are not answered over {} until that Service gives it up",
                family.text()
            );
            problems.add(ProblemKind::ClaimedTwice, field(), message);
            continue;
        }
        counts.insert(family, local_endpoints(family, slices.values(), context.place));
    }
    (!counts.is_empty()).then_some(WantedHealthCheck { port, local_endpoints: counts })
}

fn wanted_addresses(
    service: &Service,
    context: &Context<'_>,
    problems: &mut Problems,
) -> Vec<(Address, AddressKind)> {
    let mut wanted = Vec::with_capacity(service.cluster_ips.len());
    for ip in &service.cluster_ips {
        if let Some(winner) = context.addresses.rival(ip, &service.key) {
            let message = format!("{ip} belongs to Service {winner} too, which is older (or first by name)");
            problems.add(ProblemKind::ClaimedTwice, "spec.clusterIPs".to_owned(), message);
            continue;
        }
        let kind = match service.served_by {
            ServedBy::OtherProxy => AddressKind::OtherProxy,
            _ if context.local_addresses.contains(ip) => AddressKind::Local,
            _ => AddressKind::ClusterIp,
        };
        wanted.push((*ip, kind));
    }
    wanted
}

/// Who may use the load-balancer addresses of one family.
struct SourceRanges {
    /// Empty: everyone.
    list: Vec<Cidr>,
    /// Whether an address of this node is among them: then the host may, by sockets too.
    contain_node: bool,
}

impl SourceRanges {
    fn of(service: &Service, family: Family, node_addresses: &[Address]) -> Self {
        let is_of_family = |address: &Address| Family::of(address) == family;
        let mut list: Vec<Cidr> =
            service.source_ranges.iter().copied().filter(|r| is_of_family(&r.address())).collect();
        let whole_family = match family {
            Family::V4 => 96,
            Family::V6 => 0,
        };
        if list.iter().any(|range| range.prefix_length() == whole_family) {
            return Self { list: Vec::new(), contain_node: false };
        }
        let mut own = node_addresses.iter().filter(|address| is_of_family(address));
        let contain_node = own.any(|address| list.iter().any(|range| range.contains(address)));
        if contain_node {
            // What a node sends to a load-balancer address that stands on one of its interfaces has that very
            // address as its source.
            let load_balancers = service.load_balancers.iter().map(|load_balancer| load_balancer.address);
            list.extend(load_balancers.filter(is_of_family).map(|address| Cidr::new(address, 128)));
            list.sort_by_key(|range| (range.address(), range.prefix_length()));
            list.dedup();
        }
        Self { list, contain_node }
    }
}

fn report_ranges_not_enforced(
    claimed: &[Frontend],
    service: &Service,
    context: &Context<'_>,
    problems: &mut Problems,
) {
    let addresses: BTreeSet<_> =
        passed_through(claimed, service, context).iter().map(ToString::to_string).collect();
    if addresses.is_empty() {
        return;
    }
    let list = addresses.into_iter().collect::<Vec<_>>().join(", ");
    let message =
        format!("not enforced on this node for {list}, which is in pass-through; the load balancer must");
    let field = "spec.loadBalancerSourceRanges".to_owned();
    problems.add(ProblemKind::SourceRangesNotEnforced, field, message);
}

/// An address in pass-through that stands on an interface of this node ends here.
fn report_never_left(
    claimed: &[Frontend],
    service: &Service,
    context: &Context<'_>,
    problems: &mut Problems,
) {
    for address in passed_through(claimed, service, context) {
        let Some(interface) = context.local_addresses.interface(&address) else { continue };
        let (what, help) = match leftover_of(interface) {
            Some(whose) => (format!(", a leftover of {whose}"), format!("ip link delete {interface}")),
            None => (String::new(), format!("take it off {interface}, or switch pass-through off")),
        };
        let message = format!(
            "{address} is in pass-through, but stands on {interface} of this node{what}: what is sent to it never leaves \
             this node, and the load balancer is not reached: {help}"
        );
        let field = "status.loadBalancer.ingress".to_owned();
        problems.add(ProblemKind::PassThroughOnNode, field, message);
    }
}

/// The Service's load-balancer addresses in pass-through.
fn passed_through(claimed: &[Frontend], service: &Service, context: &Context<'_>) -> BTreeSet<Address> {
    let load_balancers = claimed.iter().filter_map(|frontend| frontend.load_balancer.as_ref());
    let passed = load_balancers
        .filter(|load_balancer| decide(service, load_balancer, &context.config.pass_through).is_on);
    passed.map(|load_balancer| load_balancer.address).collect()
}

fn policy(kind: FrontendKind, service: &Service) -> TrafficPolicy {
    match kind {
        FrontendKind::ClusterIp => service.internal_policy,
        FrontendKind::NodePort | FrontendKind::ExternalIp | FrontendKind::LoadBalancer => {
            service.external_policy
        }
    }
}

fn family(frontend: &Frontend) -> Family {
    Family::of(&frontend.key.address())
}

fn is_v4(frontend: &Frontend) -> bool {
    frontend.key.address().is_v4()
}

fn field(frontend: &Frontend) -> String {
    match frontend.kind {
        FrontendKind::ClusterIp => "spec.clusterIPs".to_owned(),
        FrontendKind::NodePort => format!("spec.ports[{}].nodePort", frontend.port),
        FrontendKind::ExternalIp => "spec.externalIPs".to_owned(),
        FrontendKind::LoadBalancer => "status.loadBalancer.ingress".to_owned(),
    }
}

/// A frontend as people read it.
struct Shown<'a>(&'a Frontend);

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (address, port) = (self.0.key.address(), self.0.key.port());
        let protocol = match self.0.key.protocol() {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        };
        if self.0.kind == FrontendKind::NodePort {
            return write!(f, "{} NodePort {port}/{protocol}", family(self.0).text());
        }
        if is_v4(self.0) {
            return write!(f, "{address}:{port}/{protocol}");
        }
        write!(f, "[{address}]:{port}/{protocol}")
    }
}
