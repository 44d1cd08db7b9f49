//! What the model knows of its node besides objects: the flags, as plain values.

use kproxy_common::{Address, Cidr};

use super::local_addresses::LocalAddresses;

/// The node's configuration.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodeConfig {
    /// `--node-name`: this node's name in EndpointSlices and in its Node object.
    pub node_name: String,
    /// `--node-address`: the node's own addresses. A family without one takes the Node object's.
    pub node_addresses: Vec<Address>,
    /// `--cluster-cidr`: who asks a ClusterIP from elsewhere is masked.
    pub cluster_cidrs: Vec<Cidr>,
    /// `--service-cidr`; empty: what the ServiceCIDR objects say.
    pub service_cidrs: Vec<Cidr>,
    /// `--nodeport-addresses`.
    pub nodeport_addresses: NodePortAddresses,
    /// `--masquerade-all`: mask the client of every ClusterIP packet.
    pub masquerade_all: bool,
    /// `--disable-external-ips`: do not serve `spec.externalIPs`.
    pub disable_external_ips: bool,
    /// `--pass-through-…`.
    pub pass_through: PassThroughConfig,
    /// Whether this kernel tells network namespaces apart for processes (SO_NETNS_COOKIE, 5.14), so that single Pods can
    /// be opted out of the socket hooks.
    pub has_netns_cookies: bool,
    /// The addresses that stand on this node's interfaces when the model starts; later ones come as
    /// [`Change::LocalAddresses`](super::Change::LocalAddresses).
    pub local_addresses: LocalAddresses,
}

/// Which of the node's addresses answer NodePorts.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum NodePortAddresses {
    /// The node's own address of each family.
    #[default]
    Primary,
    /// Local addresses within one of these.
    Cidrs(Vec<Cidr>),
}

/// How pass-through is decided where the Service does not say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PassThroughConfig {
    /// `--pass-through-default`: whether addresses that no rule decides about are passed through.
    pub default: bool,
    /// `--pass-through-scope`.
    pub scope: PassThroughScope,
    /// `--pass-through-annotation`: keys that are read like `kubernetes.io/elb.pass-through`, after it.
    pub extra_annotations: Vec<String>,
}

/// Which clients inside are passed through. Traffic from outside always is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PassThroughScope {
    /// Pods and the host.
    #[default]
    All,
    /// Pods; the host is short-circuited.
    Pods,
    /// The host; pods are short-circuited.
    Nodes,
}
