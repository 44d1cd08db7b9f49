//! An object of one of the kinds that are read, its key, and what is thrown away of it at once.

use std::fmt;

use k8s_openapi::api::core::v1::{Node, NodeStatus, Pod, PodSpec, PodStatus, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::model::Change;
use crate::wanted::ServiceKey;

/// Holds a copy of the whole object: of no use here, and often longer than the object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// The kinds that are read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum Kind {
    Service,
    EndpointSlice,
    Node,
    ServiceCidr,
    Pod,
}

impl Kind {
    /// The kind that an `apiVersion` and a `kind` name; `None` for all that are not read.
    pub(super) fn from_type(api_version: &str, kind: &str) -> Option<Self> {
        match (api_version, kind) {
            ("v1", "Service") => Some(Kind::Service),
            ("discovery.k8s.io/v1", "EndpointSlice") => Some(Kind::EndpointSlice),
            ("v1", "Node") => Some(Kind::Node),
            ("networking.k8s.io/v1", "ServiceCIDR") => Some(Kind::ServiceCidr),
            ("v1", "Pod") => Some(Kind::Pod),
            _ => None,
        }
    }

    /// As Kubernetes writes it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::Node => "Node",
            Kind::ServiceCidr => "ServiceCIDR",
            Kind::Pod => "Pod",
        }
    }
}

/// Which object, among all kinds.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct ObjectKey {
    pub(super) kind: Kind,
    /// Empty for kinds that have no namespace.
    pub(super) namespace: String,
    pub(super) name: String,
}

impl ObjectKey {
    /// The change that says that this object is gone.
    pub(super) fn gone(&self) -> Change {
        match self.kind {
            Kind::Service => Change::Service(self.service_key(), None),
            Kind::EndpointSlice => Change::EndpointSlice(self.service_key(), None),
            Kind::Node => Change::Node(None),
            Kind::ServiceCidr => Change::ServiceCidr(self.name.clone(), None),
            Kind::Pod => Change::Pod(self.service_key(), None),
        }
    }

    fn service_key(&self) -> ServiceKey {
        ServiceKey { namespace: self.namespace.clone(), name: self.name.clone() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        match self.namespace.as_str() {
            "" => write!(f, " {}", self.name),
            namespace => write!(f, " {namespace}/{}", self.name),
        }
    }
}

/// An object as it was read. Boxed: the kinds differ much in size, and all of them travel in one queue.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Object {
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    Node(Box<Node>),
    ServiceCidr(Box<ServiceCIDR>),
    Pod(Box<Pod>),
}

impl Object {
    /// The key of the object; a namespace that is not given is `default`, as kubectl has it. `None` without a
    /// name.
    pub(super) fn key(&self) -> Option<ObjectKey> {
        let (kind, metadata) = match self {
            Object::Service(object) => (Kind::Service, &object.metadata),
            Object::EndpointSlice(object) => (Kind::EndpointSlice, &object.metadata),
            Object::Node(object) => (Kind::Node, &object.metadata),
            Object::ServiceCidr(object) => (Kind::ServiceCidr, &object.metadata),
            Object::Pod(object) => (Kind::Pod, &object.metadata),
        };
        let name = metadata.name.clone().filter(|name| !name.is_empty())?;
        let namespace = match (kind, metadata.namespace.as_deref()) {
            (Kind::Node | Kind::ServiceCidr, _) => "",
            (_, None | Some("")) => "default",
            (_, Some(namespace)) => namespace,
        };
        Some(ObjectKey { kind, namespace: namespace.to_owned(), name })
    }

    /// Throws away what nobody reads, before it is kept anywhere: of a Node or a Pod that is nearly all of it.
    pub(super) fn trim(&mut self) {
        match self {
            Object::Service(object) => trim_metadata(&mut object.metadata),
            Object::EndpointSlice(object) => trim_metadata(&mut object.metadata),
            Object::ServiceCidr(object) => trim_metadata(&mut object.metadata),
            Object::Node(object) => {
                trim_metadata(&mut object.metadata);
                let addresses = object.status.take().and_then(|status| status.addresses);
                object.status = Some(NodeStatus { addresses, ..NodeStatus::default() });
            }
            Object::Pod(object) => {
                trim_metadata(&mut object.metadata);
                (object.metadata.labels, object.metadata.owner_references) = (None, None);
                object.spec = object.spec.take().map(|PodSpec { node_name, host_network, .. }| PodSpec {
                    node_name,
                    host_network,
                    ..PodSpec::default()
                });
                object.status = object.status.take().map(|PodStatus { phase, pod_ips, .. }| PodStatus {
                    phase,
                    pod_ips,
                    ..PodStatus::default()
                });
            }
        }
    }

    /// The change that says that this is how the object is now. `key` is its own, which is not made twice.
    pub(super) fn change(self, key: &ObjectKey) -> Change {
        match self {
            Object::Service(object) => Change::Service(key.service_key(), Some(object)),
            Object::EndpointSlice(object) => Change::EndpointSlice(key.service_key(), Some(object)),
            Object::Node(object) => Change::Node(Some(object)),
            Object::ServiceCidr(object) => Change::ServiceCidr(key.name.clone(), Some(object)),
            Object::Pod(object) => Change::Pod(key.service_key(), Some(object)),
        }
    }
}

fn trim_metadata(metadata: &mut ObjectMeta) {
    metadata.managed_fields = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.remove(LAST_APPLIED);
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Container, ContainerImage, NodeAddress, PodIP};

    use super::*;

    #[test]
    fn a_namespace_that_is_not_given_is_default() {
        let mut service = Service::default();
        assert_eq!(Object::Service(Box::new(service.clone())).key(), None);
        service.metadata.name = Some("web".into());
        let key = Object::Service(Box::new(service)).key().expect("it has a name");
        assert_eq!(key.to_string(), "Service default/web");
    }

    #[test]
    fn of_a_node_the_addresses_labels_and_taints_stay() {
        let mut node = Node::default();
        node.metadata.name = Some("a".into());
        node.metadata.labels = Some([("zone".to_owned(), "z".to_owned())].into());
        node.metadata.managed_fields = Some(vec![]);
        node.metadata.annotations = Some([(LAST_APPLIED.to_owned(), "{}".to_owned())].into());
        let address = NodeAddress { address: "192.0.2.1".into(), type_: "InternalIP".into() };
        node.status = Some(NodeStatus {
            addresses: Some(vec![address.clone()]),
            images: Some(vec![ContainerImage::default()]),
            ..NodeStatus::default()
        });
        let mut object = Object::Node(Box::new(node));
        object.trim();
        let Object::Node(node) = object else { panic!("it was a Node") };
        assert_eq!(node.metadata.labels.map(|labels| labels.len()), Some(1));
        assert_eq!(node.metadata.managed_fields, None);
        assert_eq!(node.metadata.annotations.map(|annotations| annotations.len()), Some(0));
        let status = node.status.expect("the addresses are there");
        assert_eq!((status.addresses, status.images), (Some(vec![address]), None));
    }

    #[test]
    fn of_a_pod_stays_what_opts_it_out() {
        let mut pod = Pod::default();
        pod.metadata.name = Some("mesh".into());
        pod.metadata.labels = Some([("app".to_owned(), "mesh".to_owned())].into());
        let annotations = [("kproxy.io/socket-hooks", "false"), (LAST_APPLIED, "{}")];
        pod.metadata.annotations =
            Some(annotations.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
        pod.spec = Some(PodSpec {
            node_name: Some("node-a".to_owned()),
            host_network: Some(true),
            containers: vec![Container::default()],
            ..PodSpec::default()
        });
        let ips = vec![PodIP { ip: "10.244.1.7".to_owned() }];
        pod.status = Some(PodStatus {
            phase: Some("Running".to_owned()),
            pod_ips: Some(ips.clone()),
            message: Some("long".to_owned()),
            ..PodStatus::default()
        });
        let mut object = Object::Pod(Box::new(pod));
        object.trim();
        assert_eq!(object.key().map(|key| key.to_string()).as_deref(), Some("Pod default/mesh"));
        let Object::Pod(pod) = object else { panic!("it was a Pod") };
        let (metadata, spec, status) = (pod.metadata, pod.spec.unwrap(), pod.status.unwrap());
        let annotations = metadata.annotations.unwrap();
        assert_eq!(annotations.keys().collect::<Vec<_>>(), ["kproxy.io/socket-hooks"]);
        assert_eq!((metadata.labels, spec.containers.len()), (None, 0));
        assert_eq!((spec.node_name.as_deref(), spec.host_network), (Some("node-a"), Some(true)));
        let kept = (status.phase.as_deref(), status.pod_ips, status.message);
        assert_eq!(kept, (Some("Running"), Some(ips), None));
    }
}
