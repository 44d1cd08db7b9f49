//! Services and their EndpointSlices as scenarios write them: as text for a folder, or for kubectl.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kproxy_lab::{Family, Node, Pod};
use serde_json::{Map, Value, json};

/// A Service in the namespace `default`, of both families, with its endpoints.
#[derive(Clone, Debug)]
pub struct Service {
    name: String,
    number: u8,
    kind: Option<&'static str>,
    created: Option<&'static str>,
    annotations: Map<String, Value>,
    labels: Map<String, Value>,
    ports: Vec<Port>,
    external_ips: Vec<IpAddr>,
    load_balancers: Vec<(IpAddr, Option<&'static str>)>,
    internal_policy: &'static str,
    external_policy: &'static str,
    source_ranges: Vec<String>,
    health_check_node_port: Option<u16>,
    affinity: &'static str,
    endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug)]
struct Port {
    protocol: &'static str,
    port: u16,
    target: u16,
    node_port: Option<u16>,
}

/// One endpoint, with an address of each family.
#[derive(Clone, Debug)]
pub struct Endpoint {
    node: String,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    ready: bool,
    terminating: bool,
}

impl Endpoint {
    /// A pod that is ready.
    pub fn of(pod: &Pod) -> Self {
        Self { node: pod.node_name().to_owned(), v4: pod.v4(), v6: pod.v6(), ready: true, terminating: false }
    }

    /// A pod with its node's network.
    pub fn on(node: &Node) -> Self {
        Self { node: node.name().to_owned(), v4: node.v4(), v6: node.v6(), ready: true, terminating: false }
    }

    /// The same, not ready.
    pub fn not_ready(mut self) -> Self {
        self.ready = false;
        self
    }

    /// The same, about to end, and still serving.
    pub fn terminating(mut self) -> Self {
        (self.ready, self.terminating) = (false, true);
        self
    }
}

impl Service {
    /// A Service without ports and endpoints, with the ClusterIPs `10.96.0.<number>` and
    /// `fd00:10:96::<number>`, the latter written with the same digits.
    pub fn new(name: &str, number: u8) -> Self {
        Self {
            name: name.to_owned(),
            number,
            kind: None,
            created: None,
            annotations: Map::new(),
            labels: Map::new(),
            ports: Vec::new(),
            external_ips: Vec::new(),
            load_balancers: Vec::new(),
            internal_policy: "Cluster",
            external_policy: "Cluster",
            source_ranges: Vec::new(),
            health_check_node_port: None,
            affinity: "None",
            endpoints: Vec::new(),
        }
    }

    /// With session affinity by client address.
    pub fn affinity(mut self) -> Self {
        self.affinity = "ClientIP";
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its ClusterIP of a family.
    pub fn cluster_ip(&self, family: Family) -> IpAddr {
        cluster_ip(self.number, family)
    }

    /// Adds a TCP port, called `tcp-<port>`.
    pub fn tcp(self, port: u16, target: u16) -> Self {
        self.port("TCP", port, target)
    }

    /// Adds a UDP port, called `udp-<port>`.
    pub fn udp(self, port: u16, target: u16) -> Self {
        self.port("UDP", port, target)
    }

    /// Adds an SCTP port, called `sctp-<port>`.
    pub fn sctp(self, port: u16, target: u16) -> Self {
        self.port("SCTP", port, target)
    }

    fn port(mut self, protocol: &'static str, port: u16, target: u16) -> Self {
        self.ports.push(Port { protocol, port, target, node_port: None });
        self
    }

    /// Gives the ports added so far this NodePort (TCP and UDP can share a number).
    pub fn node_port(mut self, node_port: u16) -> Self {
        for port in &mut self.ports {
            port.node_port = Some(node_port);
        }
        self.kind = self.kind.or(Some("NodePort"));
        self
    }

    /// Adds an external IP.
    pub fn external_ip(mut self, address: IpAddr) -> Self {
        self.external_ips.push(address);
        self
    }

    /// Adds load-balancer addresses, without an ipMode.
    pub fn load_balancers(mut self, addresses: &[IpAddr]) -> Self {
        self.load_balancers.extend(addresses.iter().map(|address| (*address, None)));
        self.kind = Some("LoadBalancer");
        self
    }

    /// Sets the ipMode of all load-balancer addresses added so far.
    pub fn ip_mode(mut self, mode: &'static str) -> Self {
        for (_, ip_mode) in &mut self.load_balancers {
            *ip_mode = Some(mode);
        }
        self
    }

    /// externalTrafficPolicy: Local.
    pub fn local(mut self) -> Self {
        self.external_policy = "Local";
        self
    }

    /// externalTrafficPolicy: Cluster, as is the default.
    pub fn cluster(mut self) -> Self {
        self.external_policy = "Cluster";
        self
    }

    /// internalTrafficPolicy: Local.
    pub fn internal_local(mut self) -> Self {
        self.internal_policy = "Local";
        self
    }

    /// Adds an annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), json!(value));
        self
    }

    /// Adds a label.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), json!(value));
        self
    }

    /// Adds a loadBalancerSourceRange.
    pub fn source_range(mut self, range: &str) -> Self {
        self.source_ranges.push(range.to_owned());
        self
    }

    /// Sets the healthCheckNodePort.
    pub fn health_check_node_port(mut self, port: u16) -> Self {
        self.health_check_node_port = Some(port);
        self
    }

    /// Sets the creationTimestamp.
    pub fn created(mut self, time: &'static str) -> Self {
        self.created = Some(time);
        self
    }

    /// Replaces the endpoints.
    pub fn endpoints(mut self, endpoints: impl IntoIterator<Item = Endpoint>) -> Self {
        self.endpoints = endpoints.into_iter().collect();
        self
    }

    /// Replaces the endpoints by pods that are ready.
    pub fn pods(self, pods: &[&Pod]) -> Self {
        self.endpoints(pods.iter().map(|pod| Endpoint::of(pod)))
    }

    /// The Service and a slice for each family, as YAML documents.
    pub fn yaml(&self) -> String {
        let slices = Family::BOTH.map(|family| self.slice(family));
        let documents = [self.object()].into_iter().chain(slices);
        // JSON is YAML; a person who looks into the folder sees lines.
        documents.map(|document| format!("---\n{document:#}\n")).collect()
    }

    /// The Service alone, with its status.
    pub fn object(&self) -> Value {
        let mut spec = json!({
            "type": self.kind.unwrap_or("ClusterIP"),
            "clusterIP": self.cluster_ip(Family::V4),
            "clusterIPs": Family::BOTH.map(|family| self.cluster_ip(family)),
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "internalTrafficPolicy": self.internal_policy,
            "sessionAffinity": self.affinity,
            "ports": self.ports.iter().map(Port::in_service).collect::<Vec<_>>(),
        });
        if self.kind.is_some() {
            spec["externalTrafficPolicy"] = json!(self.external_policy);
        }
        if !self.external_ips.is_empty() {
            spec["externalIPs"] = json!(self.external_ips);
        }
        if !self.source_ranges.is_empty() {
            spec["loadBalancerSourceRanges"] = json!(self.source_ranges);
        }
        // The API server refuses it where it means nothing.
        if let Some(port) = self.health_check_node_port.filter(|_| self.external_policy == "Local") {
            spec["healthCheckNodePort"] = json!(port);
        }
        let mut metadata = json!({
            "name": self.name,
            "namespace": "default",
            "annotations": self.annotations,
            "labels": self.labels,
        });
        if let Some(created) = self.created {
            metadata["creationTimestamp"] = json!(created);
        }
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": spec,
            "status": self.status(),
        })
    }

    /// The status alone, as a load balancer's controller writes it.
    pub fn status(&self) -> Value {
        let ingress = self.load_balancers.iter().map(|(address, mode)| match mode {
            Some(mode) => json!({"ip": address, "ipMode": mode}),
            None => json!({"ip": address}),
        });
        json!({"loadBalancer": {"ingress": ingress.collect::<Vec<_>>()}})
    }

    /// The EndpointSlice of a family, as the controller for them would make it.
    pub fn slice(&self, family: Family) -> Value {
        let (family_name, suffix) = match family {
            Family::V4 => ("IPv4", "v4"),
            Family::V6 => ("IPv6", "v6"),
        };
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{suffix}", self.name),
                "namespace": "default",
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": family_name,
            "endpoints": self.endpoints.iter().map(|one| one.in_slice(family)).collect::<Vec<_>>(),
            "ports": self.ports.iter().map(Port::in_slice).collect::<Vec<_>>(),
        })
    }
}

/// The ClusterIP of a Service with this number.
pub fn cluster_ip(number: u8, family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 96, 0, number).into(),
        Family::V6 => {
            let address: Ipv6Addr = format!("fd00:10:96::{number}")
                .parse()
                .expect("the digits of a number are hexadecimal digits as well");
            address.into()
        }
    }
}

impl Port {
    fn name(&self) -> String {
        format!("{}-{}", self.protocol.to_lowercase(), self.port)
    }

    fn in_service(&self) -> Value {
        let mut value = json!({
            "name": self.name(),
            "protocol": self.protocol,
            "port": self.port,
            "targetPort": self.target,
        });
        if let Some(node_port) = self.node_port {
            value["nodePort"] = json!(node_port);
        }
        value
    }

    fn in_slice(&self) -> Value {
        json!({"name": self.name(), "protocol": self.protocol, "port": self.target})
    }
}

impl Endpoint {
    fn in_slice(&self, family: Family) -> Value {
        let address: IpAddr = match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        };
        json!({
            "addresses": [address],
            "conditions": {"ready": self.ready, "serving": self.ready || self.terminating, "terminating": self.terminating},
            "nodeName": self.node,
        })
    }
}
