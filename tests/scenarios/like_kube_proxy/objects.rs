//! The objects of a table's Service, as the API server is given them, for one of the two nodes as "here".

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};
use kproxy_lab::{Family, Lab, Node};
use serde_json::{Value, json};

use super::table::{Address, EndpointSpec, Port, Spec};

/// As many Services as one side has addresses for.
const MOST: u8 = 120;

/// One of the two nodes, with what is "here" for it.
pub struct Side {
    /// 1 or 2: in every address of its Services.
    pub number: u8,
    pub node: Node,
    lab: Lab,
}

/// What stands where: the names of pods behind the table's words.
const PODS: [[&str; 3]; 2] = [["k0", "k1", "k2"], ["r0", "r1", "r2"]];

impl Side {
    pub fn new(lab: &Lab, number: u8, node: &str) -> Result<Self> {
        Ok(Self { number, node: lab.node(node)?.clone(), lab: lab.clone() })
    }

    /// The pods of this node: the one that is no backend, h1 and h2.
    pub fn pods(&self) -> [&'static str; 3] {
        PODS[usize::from(self.number - 1)]
    }

    /// The member behind a backend's word.
    pub fn backend(&self, word: &str) -> Result<&str> {
        let [_, first, second] = self.pods();
        Ok(match word {
            "h1" => first,
            "h2" => second,
            "t1" => "c1",
            "t2" => "c2",
            "n" => self.node.name(),
            _ => bail!("{word} is no backend"),
        })
    }

    /// The word for a backend that answered.
    pub fn word(&self, server: &str) -> String {
        let words = ["h1", "h2", "t1", "t2", "n"];
        let word = words.into_iter().find(|word| self.backend(word).is_ok_and(|name| name == server));
        word.unwrap_or(server).to_owned()
    }

    /// The name of this side's copy of a Service.
    pub fn name(&self, spec: &Spec) -> String {
        format!("{}-{}", spec.name, self.number)
    }

    /// Where a client asks: an address of the `index`-th Service of the table.
    pub fn target(
        &self,
        specs: &[&Spec],
        index: usize,
        address: &Address,
        family: Family,
        udp: bool,
    ) -> Result<SocketAddr> {
        let spec = specs[index];
        let port = address.port.unwrap_or(spec.first_port());
        let node_port = || -> Result<u16> {
            let ports = spec.ports();
            let at = ports.iter().position(|one| one.port == port && one.udp == udp);
            Ok(self.node_port(index, at.with_context(|| format!("{} has no port {port}", spec.name))?))
        };
        let ip = match address.kind.as_str() {
            "cluster-ip" => self.cluster_ip(index, family),
            "unallocated" => self.cluster_ip(usize::from(MOST) + 1, family),
            "external-ip" => self.external_ip(index, family),
            "load-balancer" => self.load_balancer(specs, index, family)?,
            "node-address" => self.node.ip(family),
            "node-port" => return Ok(SocketAddr::new(self.node.ip(family), node_port()?)),
            "second-address" => return Ok(SocketAddr::new(self.second_address(family), node_port()?)),
            "loopback" => {
                let loopback = match family {
                    Family::V4 => Ipv4Addr::LOCALHOST.into(),
                    Family::V6 => Ipv6Addr::LOCALHOST.into(),
                };
                return Ok(SocketAddr::new(loopback, node_port()?));
            }
            other => bail!("{other} is no address"),
        };
        Ok(SocketAddr::new(ip, port))
    }

    /// An address of the node that is not its primary one.
    pub fn second_address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::new(192, 0, 2, 200 + self.number).into(),
            Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x200 + u16::from(self.number)).into(),
        }
    }

    /// The part of the addresses of Services, external addresses and load-balancer addresses that is this side's.
    pub fn networks(&self) -> Vec<String> {
        let side = self.number;
        let half = (side - 1) * 128;
        vec![
            format!("10.96.{side}.0/24"),
            format!("198.51.100.{half}/25"),
            format!("203.0.113.{half}/25"),
            format!("fd00:10:96::{side}00/120"),
            format!("2001:db8:198::{side}00/120"),
            format!("2001:db8:113::{side}00/120"),
        ]
    }

    /// The external and load-balancer addresses of a Service.
    pub fn outer_addresses(&self, specs: &[&Spec], index: usize) -> Result<Vec<IpAddr>> {
        let mut addresses = Vec::new();
        for family in Family::BOTH {
            addresses.push(self.external_ip(index, family));
            addresses.push(self.load_balancer(specs, index, family)?);
        }
        Ok(addresses)
    }

    fn cluster_ip(&self, index: usize, family: Family) -> IpAddr {
        let low = low(index);
        match family {
            Family::V4 => Ipv4Addr::new(10, 96, self.number, low).into(),
            Family::V6 => self.v6([0xfd00, 0x10, 0x96], low),
        }
    }

    fn external_ip(&self, index: usize, family: Family) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::new(198, 51, 100, self.half() + low(index)).into(),
            Family::V6 => self.v6([0x2001, 0xdb8, 0x198], low(index)),
        }
    }

    fn load_balancer(&self, specs: &[&Spec], index: usize, family: Family) -> Result<IpAddr> {
        let owner = match &specs[index].share {
            None => index,
            Some(name) => {
                let found = specs.iter().position(|spec| &spec.name == name);
                found.with_context(|| format!("there is no Service {name} to share with"))?
            }
        };
        Ok(match family {
            Family::V4 => Ipv4Addr::new(203, 0, 113, self.half() + low(owner)).into(),
            Family::V6 => self.v6([0x2001, 0xdb8, 0x113], low(owner)),
        })
    }

    fn half(&self) -> u8 {
        (self.number - 1) * 128
    }

    fn v6(&self, [a, b, c]: [u16; 3], low: u8) -> IpAddr {
        Ipv6Addr::new(a, b, c, 0, 0, 0, 0, u16::from(self.number) * 0x100 + u16::from(low)).into()
    }

    fn node_port(&self, index: usize, port: usize) -> u16 {
        let offset = u16::from(low(index)) * 6 + u16::try_from(port).unwrap_or(5).min(5);
        29_000 + u16::from(self.number) * 1000 + offset
    }

    /// The Service, without its status.
    pub fn service(&self, specs: &[&Spec], index: usize) -> Result<Value> {
        ensure!(index < usize::from(MOST), "there are more than {MOST} Services");
        let spec = specs[index];
        let open = ["LoadBalancer", "NodePort"].contains(&spec.kind.as_str());
        let ports: Vec<Value> = spec
            .ports()
            .iter()
            .enumerate()
            .map(|(at, port)| {
                let mut value =
                    json!({"name": port_name(port), "protocol": protocol(port), "port": port.port});
                if open {
                    value["nodePort"] = json!(self.node_port(index, at));
                }
                value
            })
            .collect();
        let mut body = json!({
            "ports": ports,
            "internalTrafficPolicy": policy(spec.internal_local),
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
        });
        match spec.kind.as_str() {
            "Headless" => {
                body["clusterIP"] = json!("None");
                body["clusterIPs"] = json!(["None"]);
            }
            "ExternalName" => {
                body = json!({"type": "ExternalName", "externalName": "example.com", "ports": ports})
            }
            kind => {
                let addresses = Family::BOTH.map(|family| self.cluster_ip(index, family));
                body["type"] = json!(kind);
                body["clusterIP"] = json!(addresses[0]);
                body["clusterIPs"] = json!(addresses);
            }
        }
        if spec.kind != "ClusterIP" {
            body["externalIPs"] = json!(Family::BOTH.map(|family| self.external_ip(index, family)));
        }
        if open {
            body["externalTrafficPolicy"] = json!(policy(spec.external_local));
        }
        if spec.kind == "LoadBalancer" && spec.external_local {
            // Chosen, or the API server may choose a NodePort of another one.
            body["healthCheckNodePort"] = json!(31_800 + u16::from(self.half()) + u16::from(low(index)));
        }
        if !spec.ranges.is_empty() {
            body["loadBalancerSourceRanges"] = json!(self.ranges(spec)?);
        }
        if let Some(seconds) = spec.affinity {
            body["sessionAffinity"] = json!("ClientIP");
            body["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
        }
        Ok(json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": self.name(spec),
                "namespace": "default",
                "labels": map(&spec.labels),
                "annotations": map(&spec.annotations),
            },
            "spec": body,
        }))
    }

    /// The Service's status as a cloud's controller writes it; `None` where it has no load balancer.
    pub fn status(&self, specs: &[&Spec], index: usize) -> Result<Option<Value>> {
        let spec = specs[index];
        if spec.kind != "LoadBalancer" {
            return Ok(None);
        }
        let ingress = Family::BOTH
            .map(|family| -> Result<Value> {
                let mut one = json!({"ip": self.load_balancer(specs, index, family)?});
                if let Some(mode) = &spec.ip_mode {
                    one["ipMode"] = json!(mode);
                }
                Ok(one)
            })
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        Ok(Some(json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name(spec), "namespace": "default"},
            "status": {"loadBalancer": {"ingress": ingress}},
        })))
    }

    /// Its EndpointSlices of both families, as their controller would label them.
    pub fn slices(&self, spec: &Spec) -> Result<Vec<Value>> {
        let mut slices = Vec::new();
        for (number, slice) in spec.slices.iter().enumerate() {
            for (family, name) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
                let mut labels = map(&spec.slice_labels);
                labels["kubernetes.io/service-name"] = json!(self.name(spec));
                let endpoints = slice.endpoints.iter().map(|one| self.endpoint(one, family));
                let ports = slice.ports.iter().map(
                    |port| json!({"name": port_name(port), "protocol": protocol(port), "port": port.target}),
                );
                slices.push(json!({
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": format!("{}-{number}-{}", self.name(spec), name.to_lowercase()),
                        "namespace": "default",
                        "labels": labels,
                    },
                    "addressType": name,
                    "endpoints": endpoints.collect::<Result<Vec<_>>>()?,
                    "ports": ports.collect::<Vec<_>>(),
                }));
            }
        }
        Ok(slices)
    }

    fn endpoint(&self, spec: &EndpointSpec, family: Family) -> Result<Value> {
        let name = self.backend(&spec.backend)?;
        let (address, node) = match self.lab.pod(name) {
            Ok(pod) => (pod.ip(family), pod.node_name()),
            Err(_) => (self.lab.node(name)?.ip(family), name),
        };
        let conditions = match spec.condition.as_deref() {
            None => json!({"ready": true, "serving": true, "terminating": false}),
            Some("unknown") => json!({}),
            Some("unready") => json!({"ready": false, "serving": false, "terminating": false}),
            Some("terminating") => json!({"ready": false, "serving": true, "terminating": true}),
            Some("dying") => json!({"ready": false, "serving": false, "terminating": true}),
            Some("published") => json!({"ready": true, "serving": false, "terminating": true}),
            Some(other) => bail!("{other} is no condition"),
        };
        let mut value = json!({"addresses": [address], "conditions": conditions, "nodeName": node});
        match spec.hint.as_deref() {
            None => {}
            Some("here") => value["hints"] = json!({"forNodes": [{"name": self.node.name()}]}),
            Some("there") => value["hints"] = json!({"forNodes": [{"name": "node-c"}]}),
            Some(zone) => value["hints"] = json!({"forZones": [{"name": zone}]}),
        }
        Ok(value)
    }

    fn ranges(&self, spec: &Spec) -> Result<Vec<String>> {
        let mut ranges = Vec::new();
        for word in &spec.ranges {
            let member = match word.as_str() {
                "client" => self.lab.host("client")?,
                "node" => &*self.node,
                cidr => {
                    ranges.push(cidr.to_owned());
                    continue;
                }
            };
            ranges.push(format!("{}/32", member.v4()));
            ranges.push(format!("{}/128", member.v6()));
        }
        Ok(ranges)
    }
}

fn low(index: usize) -> u8 {
    u8::try_from(index + 2).unwrap_or(u8::MAX)
}

fn port_name(port: &Port) -> String {
    format!("{}-{}", protocol(port).to_lowercase(), port.port)
}

fn protocol(port: &Port) -> &'static str {
    if port.udp { "UDP" } else { "TCP" }
}

fn policy(local: bool) -> &'static str {
    if local { "Local" } else { "Cluster" }
}

fn map(pairs: &[(String, String)]) -> Value {
    pairs.iter().map(|(key, value)| (key.clone(), json!(value))).collect::<serde_json::Map<_, _>>().into()
}
