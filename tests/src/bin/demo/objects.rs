//! The Kubernetes objects of the demo: what the user writes, and what a cluster makes of it.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use kproxy_lab::{Family, Node, Pod};
use serde_json::{Value, json};

/// What the user writes: a Deployment and a Service.
pub const WRITTEN: &str = include_str!("nginx.yaml");

/// The annotation that the demo is about.
pub const ANNOTATION: &str = "kubernetes.io/elb.pass-through";

/// The Service's port.
pub const PORT: u16 = 80;
/// The NodePort that the API server allocates.
pub const NODE_PORT: u16 = 30_080;

const CLUSTER_IPS: [&str; 2] = ["10.96.0.80", "fd00:10:96::80"];

/// How the Service says, or does not say, that its load balancer must be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Not at all.
    NoAnnotation,
    /// By the user's annotation.
    Annotation,
    /// By the cloud, in the Service's status.
    IpModeProxy,
}

impl Variant {
    /// As the reader of the demo is told.
    pub fn title(self) -> String {
        match self {
            Self::NoAnnotation => String::from("no annotation"),
            Self::Annotation => format!("annotation {ANNOTATION}: \"true\""),
            Self::IpModeProxy => String::from("no annotation, status.loadBalancer.ingress[].ipMode: Proxy"),
        }
    }

    /// Whether requests must reach the load balancer.
    pub fn passes_through(self) -> bool {
        match self {
            Self::NoAnnotation => false,
            Self::Annotation | Self::IpModeProxy => true,
        }
    }
}

/// The two objects that the user writes, each as its own text.
pub fn written() -> Result<(&'static str, &'static str)> {
    WRITTEN.split_once("---\n").context("nginx.yaml holds two objects")
}

/// The Service as it is once the API server and the cloud have added what is theirs.
pub fn service(variant: Variant, vips: &[IpAddr]) -> Result<String> {
    let mut service: Value = serde_saphyr::from_str(written()?.1).context("the Service in nginx.yaml")?;
    if variant != Variant::Annotation {
        let annotations = service["metadata"]["annotations"].as_object_mut();
        annotations.and_then(|map| map.remove(ANNOTATION)).context("the Service has the annotation")?;
    }
    let spec = &mut service["spec"];
    spec["ports"][0]["nodePort"] = json!(NODE_PORT);
    spec["clusterIP"] = json!(CLUSTER_IPS[0]);
    spec["clusterIPs"] = json!(CLUSTER_IPS);
    spec["ipFamilies"] = json!(["IPv4", "IPv6"]);
    spec["ipFamilyPolicy"] = json!("PreferDualStack");
    let mode = if variant == Variant::IpModeProxy { "Proxy" } else { "VIP" };
    let ingress: Vec<_> = vips.iter().map(|ip| json!({"ip": ip, "ipMode": mode})).collect();
    service["status"] = json!({"loadBalancer": {"ingress": ingress}});
    yaml(&[service])
}

/// The EndpointSlices that the controller makes for the Deployment's pods, one for each family.
pub fn endpoint_slices(pods: &[&Pod]) -> Result<String> {
    let slices = Family::BOTH.map(|family| {
        let (suffix, address_type) = match family {
            Family::V4 => ("ipv4", "IPv4"),
            Family::V6 => ("ipv6", "IPv6"),
        };
        let endpoints: Vec<_> = pods
            .iter()
            .map(|pod| {
                json!({
                    "addresses": [pod.ip(family)],
                    "conditions": {"ready": true, "serving": true, "terminating": false},
                    "nodeName": pod.node_name(),
                    "targetRef": {"kind": "Pod", "name": pod.name()},
                })
            })
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": format!("nginx-{suffix}"),
                "labels": {"kubernetes.io/service-name": "nginx"},
            },
            "addressType": address_type,
            "ports": [{"name": "service0", "port": PORT, "protocol": "TCP"}],
            "endpoints": endpoints,
        })
    });
    yaml(&slices)
}

/// The Nodes.
pub fn nodes<'a>(nodes: impl Iterator<Item = &'a Node>) -> Result<String> {
    let nodes: Vec<_> = nodes
        .map(|node| {
            let addresses =
                Family::BOTH.map(|family| json!({"type": "InternalIP", "address": node.ip(family)}));
            json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": node.name()},
                "status": {"addresses": addresses},
            })
        })
        .collect();
    yaml(&nodes)
}

fn yaml(objects: &[Value]) -> Result<String> {
    let documents: Result<Vec<_>, _> = objects.iter().map(serde_saphyr::to_string).collect();
    Ok(documents.context("cannot write an object as YAML")?.join("---\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variant: Variant) -> Value {
        let vips = ["203.0.113.10".parse().unwrap(), "2001:db8:113::10".parse().unwrap()];
        serde_saphyr::from_str(&service(variant, &vips).unwrap()).unwrap()
    }

    #[test]
    fn only_the_variant_differs() {
        let with = read(Variant::Annotation);
        assert_eq!(with["metadata"]["annotations"][ANNOTATION], json!("true"), "text, not a bool");
        let mut without = read(Variant::NoAnnotation);
        assert_eq!(without["status"]["loadBalancer"]["ingress"][1]["ip"], json!("2001:db8:113::10"));
        assert_eq!(without["spec"]["ports"][0]["nodePort"], json!(NODE_PORT));
        let mut proxy = read(Variant::IpModeProxy);
        for ingress in proxy["status"]["loadBalancer"]["ingress"].as_array_mut().unwrap() {
            assert_eq!(ingress["ipMode"], json!("Proxy"));
            ingress["ipMode"] = json!("VIP");
        }
        assert_eq!(proxy, without);
        without["metadata"]["annotations"][ANNOTATION] = json!("true");
        assert_eq!(with, without);
    }
}
