//! What is wrong with an object, and what to do about it: the entry is skipped, the rest is served.

use std::fmt;

use crate::wanted::ServiceKey;

/// The kinds of objects that the model reads.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ObjectKind {
    /// `v1/Service`.
    Service,
    /// `discovery.k8s.io/v1/EndpointSlice`.
    EndpointSlice,
    /// `v1/Node`.
    Node,
    /// `networking.k8s.io/v1/ServiceCIDR`.
    ServiceCidr,
    /// `v1/Pod`.
    Pod,
}

/// Which object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectRef {
    /// Of which kind.
    pub kind: ObjectKind,
    /// `metadata.namespace`; empty for Nodes and ServiceCIDRs.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

/// Sorts of problems: few and fixed, since each is a value of a metric's label.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ProblemKind {
    /// An address or CIDR that does not parse or cannot be served.
    Address,
    /// A port out of range.
    Port,
    /// An unknown protocol.
    Protocol,
    /// A field with an unknown value.
    Value,
    /// A pass-through annotation or `ipMode` with an unknown value.
    PassThroughValue,
    /// An address of a family that the Service does not have.
    Family,
    /// Two entries of one object that claim the same.
    Duplicate,
    /// Two Services that claim the same frontend or ClusterIP.
    ClaimedTwice,
    /// More than the tables hold.
    DoesNotFit,
    /// `loadBalancerSourceRanges` of an address in pass-through: the load balancer must enforce them.
    SourceRangesNotEnforced,
    /// An address in pass-through that stands on an interface of this node.
    PassThroughOnNode,
    /// A Pod that is to be opted out of the socket hooks, and cannot be.
    CannotOptOut,
}

/// Something about an object that could not be served as written.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Problem {
    /// Which object.
    pub object: ObjectRef,
    /// Where in it, as a path: `spec.ports[1].nodePort`.
    pub field: String,
    /// Of which sort.
    pub kind: ProblemKind,
    /// What is wrong, what follows, and what to do.
    pub message: String,
}

impl ProblemKind {
    /// All kinds, so that a metric can start at zero for each.
    pub const ALL: &'static [Self] = &[
        Self::Address,
        Self::Port,
        Self::Protocol,
        Self::Value,
        Self::PassThroughValue,
        Self::Family,
        Self::Duplicate,
        Self::ClaimedTwice,
        Self::DoesNotFit,
        Self::SourceRangesNotEnforced,
        Self::PassThroughOnNode,
        Self::CannotOptOut,
    ];

    /// The stable word for it in metrics and output.
    pub fn word(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Port => "port",
            Self::Protocol => "protocol",
            Self::Value => "value",
            Self::PassThroughValue => "pass-through-value",
            Self::Family => "family",
            Self::Duplicate => "duplicate",
            Self::ClaimedTwice => "claimed-twice",
            Self::DoesNotFit => "does-not-fit",
            Self::SourceRangesNotEnforced => "source-ranges-not-enforced",
            Self::PassThroughOnNode => "pass-through-on-node",
            Self::CannotOptOut => "cannot-opt-out",
        }
    }
}

impl ObjectRef {
    /// The Service with this key.
    pub fn service(key: &ServiceKey) -> Self {
        Self::namespaced(ObjectKind::Service, key)
    }

    /// The EndpointSlice with this namespace and name.
    pub fn endpoint_slice(key: &ServiceKey) -> Self {
        Self::namespaced(ObjectKind::EndpointSlice, key)
    }

    /// The Node with this name.
    pub fn node(name: &str) -> Self {
        Self { kind: ObjectKind::Node, namespace: String::new(), name: name.to_owned() }
    }

    /// The ServiceCIDR with this name.
    pub fn service_cidr(name: &str) -> Self {
        Self { kind: ObjectKind::ServiceCidr, namespace: String::new(), name: name.to_owned() }
    }

    /// The Pod with this namespace and name.
    pub fn pod(key: &ServiceKey) -> Self {
        Self::namespaced(ObjectKind::Pod, key)
    }

    fn namespaced(kind: ObjectKind, key: &ServiceKey) -> Self {
        Self { kind, namespace: key.namespace.clone(), name: key.name.clone() }
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
            Self::Pod => "Pod",
        })
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return write!(f, "{} {}", self.kind, self.name);
        }
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.object, self.field, self.message)
    }
}
