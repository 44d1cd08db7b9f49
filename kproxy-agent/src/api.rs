//! Kubernetes objects as they are written, as far as kproxy reads them.
//!
//! Both sources read into these types, and [`crate::model::parse`] makes valid values of them. A branch that
//! is not named here is skipped unseen, whatever it holds. A field that is named takes any value, see
//! [`Field`]: only text that is no JSON or YAML at all, or no object, is an error.

mod field;

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess};

pub use field::{Field, Found, Value};
use field::{Key, root};

/// Text of a field.
pub type Text = Box<str>;

/// A list whose entries are read one by one.
pub type List<T> = Vec<Field<T>>;

/// Holds a copy of the whole object: of no use here, and often longer than the object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Declares structs with the fields that are read, and how they are read.
macro_rules! objects {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $key:literal as $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: Field<$type>,)*
        }

        impl Value for $name {
            const NAME: &'static str = "an object";

            fn object<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<Self>, A::Error> {
                let mut read = Self::default();
                while let Some(Key(key)) = map.next_key()? {
                    match key.as_ref() {
                        $($key => read.$field = map.next_value()?,)*
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(Some(read))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                root(deserializer)
            }
        }
    )*};
}

objects! {
    /// What says of which kind an object is. Items of a list from an API server do not have it.
    TypeMeta {
        /// As `v1`, or `discovery.k8s.io/v1`.
        api_version: "apiVersion" as Text,
        /// As `Service`.
        kind: "kind" as Text,
    }
    /// Of any object, its metadata alone.
    Bare {
        /// All that is read of it.
        metadata: "metadata" as Metadata,
    }
    /// Of any object, only which it is: for those of which nothing else can be read.
    Identified {
        /// Name and version.
        metadata: "metadata" as Identity,
    }
    /// `metadata`, as far as it says which object this is.
    Identity {
        /// As in [`Metadata`].
        name: "name" as Text,
        /// As in [`Metadata`].
        namespace: "namespace" as Text,
        /// As in [`Metadata`].
        resource_version: "resourceVersion" as Text,
    }
    /// `metadata`, of an object or of a list.
    Metadata {
        /// Always there, but in objects that are broken.
        name: "name" as Text,
        /// Of what has one.
        namespace: "namespace" as Text,
        /// The version of this state of the object.
        resource_version: "resourceVersion" as Text,
        /// By key.
        labels: "labels" as Strings,
        /// By key.
        annotations: "annotations" as Strings,
        /// RFC 3339.
        creation_timestamp: "creationTimestamp" as Text,
        /// RFC 3339; where there is one, the object is being deleted.
        deletion_timestamp: "deletionTimestamp" as Text,
        /// Of a list: where the next page begins.
        continue_token: "continue" as Text,
    }

    /// `v1/Service`.
    Service {
        /// Name, labels, annotations.
        metadata: "metadata" as Metadata,
        /// What is wanted.
        spec: "spec" as ServiceSpec,
        /// What a load balancer was given.
        status: "status" as ServiceStatus,
    }
    /// `spec` of a Service.
    ServiceSpec {
        /// `ClusterIP`, `NodePort`, `LoadBalancer` or `ExternalName`.
        type_: "type" as Text,
        /// The first of `cluster_ips`.
        cluster_ip: "clusterIP" as Text,
        /// One of each family; or `None`, of a headless Service.
        cluster_ips: "clusterIPs" as List<Text>,
        /// `IPv4` and `IPv6`.
        ip_families: "ipFamilies" as List<Text>,
        /// Addresses that somebody leads to the nodes.
        external_ips: "externalIPs" as List<Text>,
        /// CIDRs of the clients of load-balancer addresses.
        load_balancer_source_ranges: "loadBalancerSourceRanges" as List<Text>,
        /// The ports.
        ports: "ports" as List<ServicePort>,
        /// `Cluster` or `Local`.
        internal_traffic_policy: "internalTrafficPolicy" as Text,
        /// `Cluster` or `Local`.
        external_traffic_policy: "externalTrafficPolicy" as Text,
        /// `None` or `ClientIP`.
        session_affinity: "sessionAffinity" as Text,
        /// Its timeout.
        session_affinity_config: "sessionAffinityConfig" as SessionAffinityConfig,
        /// Where a load balancer asks.
        health_check_node_port: "healthCheckNodePort" as i64,
    }
    /// `spec.ports[]` of a Service.
    ServicePort {
        /// What ports of EndpointSlices are matched by.
        name: "name" as Text,
        /// `TCP`, `UDP` or `SCTP`.
        protocol: "protocol" as Text,
        /// At the ClusterIP.
        port: "port" as i64,
        /// At the nodes' addresses.
        node_port: "nodePort" as i64,
    }
    /// `spec.sessionAffinityConfig` of a Service.
    SessionAffinityConfig {
        /// The only one there is.
        client_ip: "clientIP" as ClientIpConfig,
    }
    /// `spec.sessionAffinityConfig.clientIP` of a Service.
    ClientIpConfig {
        /// Seconds.
        timeout_seconds: "timeoutSeconds" as i64,
    }
    /// `status` of a Service.
    ServiceStatus {
        /// Written by the load balancer's controller.
        load_balancer: "loadBalancer" as LoadBalancerStatus,
    }
    /// `status.loadBalancer` of a Service.
    LoadBalancerStatus {
        /// Its addresses.
        ingress: "ingress" as List<LoadBalancerIngress>,
    }
    /// `status.loadBalancer.ingress[]` of a Service.
    LoadBalancerIngress {
        /// An address; a host name may stand in its place.
        ip: "ip" as Text,
        /// `VIP` or `Proxy`.
        ip_mode: "ipMode" as Text,
    }

    /// `discovery.k8s.io/v1/EndpointSlice`.
    EndpointSlice {
        /// Labels and annotations.
        metadata: "metadata" as Metadata,
        /// `IPv4`, `IPv6` or `FQDN`.
        address_type: "addressType" as Text,
        /// The ports of all its endpoints.
        ports: "ports" as List<EndpointPort>,
        /// The endpoints.
        endpoints: "endpoints" as List<Endpoint>,
    }
    /// `ports[]` of an EndpointSlice.
    EndpointPort {
        /// What Service ports are matched by.
        name: "name" as Text,
        /// `TCP`, `UDP` or `SCTP`.
        protocol: "protocol" as Text,
        /// Of the endpoint.
        port: "port" as i64,
    }
    /// `endpoints[]` of an EndpointSlice.
    Endpoint {
        /// Only the first is used.
        addresses: "addresses" as List<Text>,
        /// Whether it serves.
        conditions: "conditions" as EndpointConditions,
        /// The node that it runs on.
        node_name: "nodeName" as Text,
        /// For whom it is meant.
        hints: "hints" as EndpointHints,
    }
    /// `endpoints[].conditions` of an EndpointSlice.
    EndpointConditions {
        /// It can be sent connections.
        ready: "ready" as bool,
        /// The same, but while it ends too.
        serving: "serving" as bool,
        /// It is about to end.
        terminating: "terminating" as bool,
    }
    /// `endpoints[].hints` of an EndpointSlice.
    EndpointHints {
        /// Nodes.
        for_nodes: "forNodes" as List<Named>,
        /// Zones.
        for_zones: "forZones" as List<Named>,
    }
    /// What has a name and nothing else.
    Named {
        /// Of a node or a zone.
        name: "name" as Text,
    }

    /// `v1/Node`.
    Node {
        /// Labels, and whether it is being deleted.
        metadata: "metadata" as Metadata,
        /// Its taints.
        spec: "spec" as NodeSpec,
        /// Its addresses.
        status: "status" as NodeStatus,
    }
    /// `spec` of a Node.
    NodeSpec {
        /// Who is kept away.
        taints: "taints" as List<Taint>,
        /// The ranges of its pods.
        pod_cidrs: "podCIDRs" as List<Text>,
    }
    /// `spec.taints[]` of a Node.
    Taint {
        /// Which.
        key: "key" as Text,
    }
    /// `status` of a Node.
    NodeStatus {
        /// With the type of each.
        addresses: "addresses" as List<NodeAddress>,
    }
    /// `status.addresses[]` of a Node.
    NodeAddress {
        /// As `InternalIP`.
        type_: "type" as Text,
        /// An address, or a name.
        address: "address" as Text,
    }

    /// `networking.k8s.io/v1/ServiceCIDR`.
    ServiceCidr {
        /// Its name.
        metadata: "metadata" as Metadata,
        /// The ranges.
        spec: "spec" as ServiceCidrSpec,
    }
    /// `spec` of a ServiceCIDR.
    ServiceCidrSpec {
        /// One of each family.
        cidrs: "cidrs" as List<Text>,
    }

    /// `v1/Pod`.
    Pod {
        /// Its annotations.
        metadata: "metadata" as Metadata,
        /// Where it runs.
        spec: "spec" as PodSpec,
        /// Its addresses.
        status: "status" as PodStatus,
    }
    /// `spec` of a Pod.
    PodSpec {
        /// Its node.
        node_name: "nodeName" as Text,
        /// Whether it has the node's network.
        host_network: "hostNetwork" as bool,
    }
    /// `status` of a Pod.
    PodStatus {
        /// `Pending`, `Running`, `Succeeded`, `Failed` or `Unknown`.
        phase: "phase" as Text,
        /// One of each family.
        pod_ips: "podIPs" as List<PodIp>,
    }
    /// `status.podIPs[]` of a Pod.
    PodIp {
        /// The address.
        ip: "ip" as Text,
    }

    /// `v1/Status`: what an API server says of a failure.
    Status {
        /// What went wrong.
        message: "message" as Text,
        /// An HTTP status.
        code: "code" as i64,
    }
}

/// Labels or annotations.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Strings(BTreeMap<Text, Field<Text>>);

impl Strings {
    /// What is written under the key, if it is there at all.
    pub fn get(&self, key: &str) -> Option<&Field<Text>> {
        self.0.get(key)
    }

    /// Whether the key is there, whatever its value.
    pub fn contains(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }
}

impl Value for Strings {
    const NAME: &'static str = "an object";

    fn object<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<Self>, A::Error> {
        let mut read = BTreeMap::new();
        while let Some(Key(key)) = map.next_key()? {
            if key == LAST_APPLIED {
                map.next_value::<IgnoredAny>()?;
            } else {
                read.insert(key.into(), map.next_value()?);
            }
        }
        Ok(Some(Self(read)))
    }
}

impl Metadata {
    /// `name`, if there is one.
    pub fn name(&self) -> Option<&str> {
        self.name.text().filter(|name| !name.is_empty())
    }
}

#[cfg(test)]
mod tests;
