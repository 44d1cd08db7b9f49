//! Valid values: what remains of Kubernetes objects once they are parsed. They are small, since all Services
//! and endpoints of a cluster are kept.

use std::sync::Arc;

use kproxy_common::{Address, Cidr, Protocol, ServiceKind, TrafficPolicy};

use crate::wanted::{PassThroughRule, ServiceKey};

/// An address family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// A Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Which.
    pub key: Arc<ServiceKey>,
    /// `metadata.creationTimestamp` in seconds since 1970; without one the latest possible, since such an
    /// object cannot claim to be older than another.
    pub created: i64,
    /// `spec.type`.
    pub kind: ServiceKind,
    /// Whether we serve it.
    pub served_by: ServedBy,
    /// `spec.clusterIPs`.
    pub cluster_ips: Box<[Address]>,
    /// The families of the ClusterIPs and of `spec.ipFamilies`, sorted.
    pub families: Box<[Family]>,
    /// `spec.externalIPs`.
    pub external_ips: Box<[Address]>,
    /// `status.loadBalancer.ingress[]` with an address.
    pub load_balancers: Box<[LoadBalancer]>,
    /// `spec.ports`.
    pub ports: Box<[ServicePort]>,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// `spec.sessionAffinityConfig.clientIP.timeoutSeconds`; 0 without affinity.
    pub affinity_timeout: u32,
    /// `spec.loadBalancerSourceRanges`, host bits cleared.
    pub source_ranges: Box<[Cidr]>,
    /// `spec.healthCheckNodePort`, host order, where it counts: of type LoadBalancer with externalTrafficPolicy
    /// Local (`NeedsHealthCheck`).
    pub health_check_node_port: Option<u16>,
    /// What its annotations say on pass-through, in the order in which they are asked.
    pub pass_through: Box<[(PassThroughRule, PassThroughValue)]>,
}

/// Who serves a Service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServedBy {
    /// kproxy.
    Us,
    /// The proxy that the label `service.kubernetes.io/service-proxy-name` names.
    OtherProxy,
    /// Nobody: it is headless or of type ExternalName.
    Nobody,
}

/// A port of a Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// `name`; empty without one.
    pub name: Box<str>,
    /// `protocol`.
    pub protocol: Protocol,
    /// `port`, host order.
    pub port: u16,
    /// `nodePort`, host order.
    pub node_port: Option<u16>,
}

/// An address of a load balancer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoadBalancer {
    /// `ip`.
    pub address: Address,
    /// Whether `ipMode` is Proxy (KEP-1860): the load balancer must see the traffic.
    pub is_proxy: bool,
}

/// What an annotation says on pass-through, as far as it decides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PassThroughValue {
    /// Pass through.
    On,
    /// Do not.
    Off,
    /// Pass through while externalTrafficPolicy is Local.
    OnlyLocal,
}

/// An EndpointSlice of a Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointSlice {
    /// The name of the Service, in the slice's namespace.
    pub service: Box<str>,
    /// `addressType`.
    pub family: Family,
    /// `ports`.
    pub ports: Box<[EndpointPort]>,
    /// `endpoints`.
    pub endpoints: Box<[Endpoint]>,
}

/// A port of a slice's endpoints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointPort {
    /// `name`; matched with the Service port's name.
    pub name: Box<str>,
    /// `protocol`.
    pub protocol: Protocol,
    /// `port`, host order.
    pub number: u16,
}

/// An endpoint of a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// `addresses[0]`.
    pub address: Address,
    /// `conditions.ready`.
    pub ready: bool,
    /// `conditions.serving`.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// `nodeName`.
    pub node: Option<Box<str>>,
    /// `hints`, where there are any.
    pub hints: Option<Box<Hints>>,
}

/// For whom an endpoint is meant. Empty: no hint of this sort.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hints {
    /// `hints.forNodes[].name`.
    pub nodes: Box<[Box<str>]>,
    /// `hints.forZones[].name`.
    pub zones: Box<[Box<str>]>,
}

/// What the own Node object says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Node {
    /// The label `topology.kubernetes.io/zone`.
    pub zone: Option<Box<str>>,
    /// Of each family the first InternalIP, else the first ExternalIP.
    pub addresses: Vec<Address>,
    /// `spec.podCIDRs`, as far as they can be read: nothing that is served depends on them.
    pub pod_cidrs: Vec<Cidr>,
}

impl Family {
    /// Both, IPv4 first.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of `address`.
    pub fn of(address: &Address) -> Self {
        if address.is_v4() { Self::V4 } else { Self::V6 }
    }

    /// The unspecified address of the family.
    pub fn unspecified(self) -> Address {
        match self {
            Self::V4 => Address::UNSPECIFIED_V4,
            Self::V6 => Address::UNSPECIFIED,
        }
    }

    /// As people write it.
    pub fn text(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}
