//! What one Service wants in the tables: the model's output and the plan's input. Plain values.

use std::collections::BTreeMap;

use kproxy_common::{
    Address, AddressKind, BackendState, Cidr, FrontendKey, FrontendKind, Location, Mode, Protocol,
    ServiceKind, TrafficPolicy,
};

/// Namespace and name of a Service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServiceKey {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl std::fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Which Pods of this node want their sockets left alone.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct WantedOptOuts {
    /// Those that do, with the addresses by which their network namespaces are found.
    pub pods: BTreeMap<ServiceKey, Box<[Address]>>,
    /// Whether all Pods of this node are known: who is not among `pods` is not opted out. Else nobody can tell.
    pub is_complete: bool,
}

/// Everything that a Service wants in the tables. A Service that wants nothing has no ports and no addresses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WantedService {
    /// Which Service.
    pub key: ServiceKey,
    /// `spec.type`.
    pub kind: ServiceKind,
    /// Its ports, one for each family that has a frontend; in a fixed order.
    pub ports: Vec<WantedPort>,
    /// Addresses that mean something on every port: ClusterIPs, of this proxy or another.
    pub addresses: Vec<(Address, AddressKind)>,
}

/// One Service port in one family: its backends once, and all frontends that lead to them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WantedPort {
    /// `spec.ports[].name`, empty without a name.
    pub name: String,
    /// `spec.ports[].protocol`.
    pub protocol: Protocol,
    /// `sessionAffinityConfig.clientIP.timeoutSeconds`, 0 without affinity.
    pub affinity_timeout: u32,
    /// In the order of a block: those only in the inside set, in both, only in the outside set, and then those
    /// that only serve what they have; within each, by address and port.
    pub backends: Vec<WantedBackend>,
    /// How many backends, from the first on, are in a set of any of the frontends.
    pub in_sets: u16,
    /// Where clients reach this port; by key.
    pub frontends: Vec<WantedFrontend>,
}

/// An endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WantedBackend {
    /// The endpoint's address.
    pub address: Address,
    /// Its port, host order.
    pub port: u16,
    /// Whether it is on this node.
    pub location: Location,
    /// Whether it takes new connections.
    pub state: BackendState,
}

/// A frontend: one address, port and protocol.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WantedFrontend {
    /// Where it listens; NodePorts under the unspecified address of their family.
    pub key: FrontendKey,
    /// Through which of the Service's addresses.
    pub kind: FrontendKind,
    /// The policy that governs it: internal for ClusterIPs, external for the rest.
    pub policy: TrafficPolicy,
    /// What it does for clients inside.
    pub inside: WantedSide,
    /// What it does for traffic from outside.
    pub outside: WantedSide,
    /// Who may use it; empty: everyone. Only where a side has the option SOURCE_RANGES.
    pub source_ranges: Vec<Cidr>,
    /// Which rule decided on pass-through.
    pub pass_through_rule: PassThroughRule,
}

/// What a frontend does for one side: a run of its port's backends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WantedSide {
    /// Where the set begins, counted from the port's first backend.
    pub offset: u16,
    /// How many backends the set has.
    pub count: u16,
    /// What is done.
    pub mode: Mode,
    /// Bits of [`kproxy_common::Options`].
    pub options: u8,
}

macro_rules! pass_through_rules {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $text:literal;)*) => {
        /// The rule that decided whether a load-balancer address is passed through. Stored in the maps by number.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        #[repr(u8)]
        pub enum PassThroughRule {
            $($(#[$doc])* $variant = $number,)*
        }

        impl PassThroughRule {
            /// From the number in the map; `None` if this version does not know it.
            pub fn from_number(number: u8) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// How people read it.
            pub fn text(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }
        }
    };
}

pass_through_rules! {
    /// The frontend is no load-balancer address.
    NotApplicable = 0, "";
    /// `kproxy.io/pass-through` on the Service.
    OwnAnnotation = 1, "kproxy.io/pass-through";
    /// `kubernetes.io/elb.pass-through` on the Service.
    ElbAnnotation = 2, "kubernetes.io/elb.pass-through";
    /// A key given with `--pass-through-annotation`.
    ExtraAnnotation = 3, "--pass-through-annotation";
    /// `status.loadBalancer.ingress[].ipMode: Proxy` (KEP-1860).
    IpMode = 4, "ipMode: Proxy";
    /// `--pass-through-default`.
    Default = 5, "--pass-through-default";
}
