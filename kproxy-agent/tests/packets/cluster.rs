//! The cluster that packets are about: where everything lives, and the Services, in both families.
//!
//! A test run takes a packet's protocol from where an Ethernet header has it. In a packet that begins with its IP
//! header, that is a part of the source address: whatever sends packets here lives in 8.0.0.0/16 or in
//! 2001:db8:86dd::/48, which reads as IPv4 (0x0800) and as IPv6 (0x86dd).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use kproxy::{model::Change, wanted::ServiceKey};
use kproxy_common::Protocol;
use serde_json::{Value, json};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    V4,
    V6,
}

/// Who or what has an address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Who {
    /// Outside of the cluster.
    Client(u8),
    /// A pod of this node.
    Here(u8),
    /// A pod of another node.
    There(u8),
    /// This node.
    Node,
    /// This node, on its other interface.
    NodeAside,
    /// `spec.clusterIPs` of the Service with this number.
    ClusterIp(u8),
    /// Its `status.loadBalancer.ingress[].ip`.
    LoadBalancer(u8),
    /// Its `spec.externalIPs`.
    External(u8),
    /// Nobody, but within the ServiceCIDR.
    Unallocated,
    /// Somebody on the Internet.
    Elsewhere,
}

impl Who {
    pub fn ip(self, family: Family) -> IpAddr {
        let (v4, v6): ([u8; 4], [u16; 4]) = match self {
            Self::Client(n) => ([8, 0, 200, n], [0x86dd, 0x200, 0, n.into()]),
            Self::Here(n) => ([8, 0, 1, n], [0x86dd, 1, 0, n.into()]),
            Self::There(n) => ([8, 0, 2, n], [0x86dd, 2, 0, n.into()]),
            Self::Node => ([8, 0, 250, 10], [0x86dd, 0x250, 0, 0x10]),
            Self::NodeAside => ([8, 0, 251, 10], [0x86dd, 0x251, 0, 0x10]),
            Self::ClusterIp(n) => ([10, 96, 0, n], [0x96, 0, 0, n.into()]),
            Self::LoadBalancer(n) => ([203, 0, 113, n], [0x113, 0, 0, n.into()]),
            Self::External(n) => ([198, 51, 100, n], [0x100, 0, 0, n.into()]),
            Self::Unallocated => ([10, 96, 99, 99], [0x96, 0, 0, 0x9999]),
            Self::Elsewhere => ([192, 0, 2, 77], [0x77, 0, 0, 0x77]),
        };
        match family {
            Family::V4 => Ipv4Addr::from(v4).into(),
            Family::V6 => {
                let [a, b, c, d] = v6;
                Ipv6Addr::new(0x2001, 0xdb8, a, b, c, 0, 0, d).into()
            }
        }
    }

    pub fn at(self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(family), port)
    }
}

/// The flags that go with these addresses.
pub const CLUSTER_CIDRS: [&str; 2] = ["8.0.0.0/20", "2001:db8:86dd::/56"];
pub const SERVICE_CIDRS: [&str; 2] = ["10.96.0.0/16", "2001:db8:96::/112"];
pub const NODE_NAME: &str = "node-a";

/// A Service and its EndpointSlices.
#[derive(Clone)]
pub struct Service {
    /// Of which its name and its addresses are made.
    pub number: u8,
    /// Parts of `spec` beside those that follow from the rest.
    pub spec: Value,
    pub annotations: Value,
    pub ports: Vec<Port>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Copy)]
pub struct Port {
    pub port: u16,
    pub node_port: u16,
    pub target: u16,
    pub protocol: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    Ready(Who),
    /// It still serves, but ends.
    Terminating(Who),
}

/// Ports of every Service: its own, the first of the NodePorts (to which the Service's number is added), and that of its
/// endpoints.
pub struct Ports {
    pub port: u16,
    node_ports: u16,
    pub target: u16,
}

impl Ports {
    pub fn of(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self { port: 80, node_ports: 30_100, target: 8_080 },
            Protocol::Udp => Self { port: 53, node_ports: 30_400, target: 5_353 },
            Protocol::Sctp => Self { port: 3_868, node_ports: 30_700, target: 13_868 },
        }
    }

    pub fn node_port(&self, number: u8) -> u16 {
        self.node_ports + u16::from(number)
    }
}

/// Those of the Service with this number.
fn ports(number: u8) -> Vec<Port> {
    [(Protocol::Tcp, "TCP"), (Protocol::Udp, "UDP"), (Protocol::Sctp, "SCTP")]
        .map(|(protocol, name)| {
            let ports = Ports::of(protocol);
            let node_port = ports.node_port(number);
            Port { port: ports.port, node_port, target: ports.target, protocol: name }
        })
        .to_vec()
}

impl Service {
    pub fn new(number: u8, endpoints: &[Who]) -> Self {
        Self {
            number,
            spec: json!({}),
            annotations: json!({}),
            ports: ports(number),
            endpoints: endpoints.iter().copied().map(Endpoint::Ready).collect(),
        }
    }

    pub fn with_spec(mut self, spec: Value) -> Self {
        self.spec = spec;
        self
    }

    pub fn with_annotations(mut self, annotations: Value) -> Self {
        self.annotations = annotations;
        self
    }

    /// What the API server would send.
    pub fn changes(&self) -> Vec<Change> {
        let mut changes = vec![Change::Service(self.key(), Some(Box::new(read(self.object()))))];
        for (family, name, kind) in FAMILIES {
            let key = ServiceKey { name: format!("{}-{name}", self.name()), ..self.key() };
            let slice = read(self.slice(family, &key.name, kind));
            changes.push(Change::EndpointSlice(key, Some(Box::new(slice))));
        }
        changes
    }

    /// The same, when it goes.
    pub fn gone(&self) -> Vec<Change> {
        let mut changes = vec![Change::Service(self.key(), None)];
        for (_, name, _) in FAMILIES {
            let key = ServiceKey { name: format!("{}-{name}", self.name()), ..self.key() };
            changes.push(Change::EndpointSlice(key, None));
        }
        changes
    }

    fn name(&self) -> String {
        format!("service-{}", self.number)
    }

    fn key(&self) -> ServiceKey {
        ServiceKey { namespace: "default".to_owned(), name: self.name() }
    }

    fn object(&self) -> Value {
        let ips = |who: Who| json!([who.ip(Family::V4), who.ip(Family::V6)]);
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|port| {
                let name = format!("p{}-{}", port.port, port.protocol.to_lowercase());
                json!({"name": name, "port": port.port, "nodePort": port.node_port, "protocol": port.protocol})
            })
            .collect();
        let mut spec = json!({
            "type": "LoadBalancer",
            "clusterIP": Who::ClusterIp(self.number).ip(Family::V4),
            "clusterIPs": ips(Who::ClusterIp(self.number)),
            "externalIPs": ips(Who::External(self.number)),
            "ports": ports,
        });
        for (key, value) in self.spec.as_object().into_iter().flatten() {
            spec[key] = value.clone();
        }
        let balancer = Who::LoadBalancer(self.number);
        json!({
            "metadata": {"namespace": "default", "name": self.name(), "annotations": self.annotations},
            "spec": spec,
            "status": {"loadBalancer": {"ingress": [
                {"ip": balancer.ip(Family::V4)}, {"ip": balancer.ip(Family::V6)},
            ]}},
        })
    }

    fn slice(&self, family: Family, name: &str, kind: &str) -> Value {
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|port| {
                let name = format!("p{}-{}", port.port, port.protocol.to_lowercase());
                json!({"name": name, "port": port.target, "protocol": port.protocol})
            })
            .collect();
        let endpoints: Vec<Value> = self
            .endpoints
            .iter()
            .map(|endpoint| {
                let (who, conditions) = match endpoint {
                    Endpoint::Ready(who) => (who, json!({"ready": true})),
                    Endpoint::Terminating(who) => {
                        (who, json!({"ready": false, "serving": true, "terminating": true}))
                    }
                };
                let node = if matches!(who, Who::Here(_)) { NODE_NAME } else { "node-b" };
                json!({"addresses": [who.ip(family)], "nodeName": node, "conditions": conditions})
            })
            .collect();
        json!({
            "metadata": {
                "namespace": "default", "name": name,
                "labels": {"kubernetes.io/service-name": self.name()},
            },
            "addressType": kind,
            "ports": ports,
            "endpoints": endpoints,
        })
    }
}

const FAMILIES: [(Family, &str, &str); 2] = [(Family::V4, "v4", "IPv4"), (Family::V6, "v6", "IPv6")];

fn read<T: serde::de::DeserializeOwned>(object: Value) -> T {
    serde_json::from_value(object).expect("an object of the cluster is what its kind says")
}
