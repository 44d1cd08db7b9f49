//! The kinds of objects that are watched, and what the API calls them.

use std::fmt::Debug;

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use serde::de::DeserializeOwned;

use super::trouble::Resource;
use crate::model::Change;
use crate::source::object::{Kind, Object};

/// A kind of object that is watched.
pub(super) trait Watched:
    kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static
{
    const KIND: Kind;
    const RESOURCE: Resource;
    /// Whether kproxy works without it.
    const OPTIONAL: bool = false;
    /// What it does then.
    const WITHOUT: &str = "kproxy goes on without";
    /// What it means that a list of them is complete, where that is asked.
    const ALL: Option<Change> = None;

    fn object(self) -> Object;
}

impl Watched for Service {
    const KIND: Kind = Kind::Service;
    const RESOURCE: Resource = Resource { group: "", plural: "services" };

    fn object(self) -> Object {
        Object::Service(Box::new(self))
    }
}

impl Watched for EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;
    const RESOURCE: Resource = Resource { group: "discovery.k8s.io", plural: "endpointslices" };

    fn object(self) -> Object {
        Object::EndpointSlice(Box::new(self))
    }
}

impl Watched for Node {
    const KIND: Kind = Kind::Node;
    const RESOURCE: Resource = Resource { group: "", plural: "nodes" };

    fn object(self) -> Object {
        Object::Node(Box::new(self))
    }
}

impl Watched for ServiceCIDR {
    const KIND: Kind = Kind::ServiceCidr;
    const RESOURCE: Resource = Resource { group: "networking.k8s.io", plural: "servicecidrs" };
    const OPTIONAL: bool = true;

    fn object(self) -> Object {
        Object::ServiceCidr(Box::new(self))
    }
}

impl Watched for Pod {
    const KIND: Kind = Kind::Pod;
    const RESOURCE: Resource = Resource { group: "", plural: "pods" };
    const OPTIONAL: bool = true;
    const WITHOUT: &str = "kproxy goes on without: no annotation kproxy.io/socket-hooks of a Pod is read";
    const ALL: Option<Change> = Some(Change::AllPods);

    fn object(self) -> Object {
        Object::Pod(Box::new(self))
    }
}
