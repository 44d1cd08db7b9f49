//! The kinds of objects that are watched, and what the API calls them.

use super::trouble::Resource;
use crate::source::object::Kind;

/// A kind of object that is watched.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) kind: Kind,
    pub(super) resource: Resource,
    /// What kproxy does without it, where it works without.
    pub(super) without: Option<&'static str>,
}

pub(super) static SERVICES: Watched =
    Watched { kind: Kind::Service, resource: Resource { group: "", plural: "services" }, without: None };

pub(super) static ENDPOINT_SLICES: Watched = Watched {
    kind: Kind::EndpointSlice,
    resource: Resource { group: "discovery.k8s.io", plural: "endpointslices" },
    without: None,
};

pub(super) static NODES: Watched =
    Watched { kind: Kind::Node, resource: Resource { group: "", plural: "nodes" }, without: None };

pub(super) static SERVICE_CIDRS: Watched = Watched {
    kind: Kind::ServiceCidr,
    resource: Resource { group: "networking.k8s.io", plural: "servicecidrs" },
    without: Some("kproxy goes on without"),
};

pub(super) static PODS: Watched = Watched {
    kind: Kind::Pod,
    resource: Resource { group: "", plural: "pods" },
    without: Some("kproxy goes on without: no annotation kproxy.io/socket-hooks of a Pod is read"),
};

impl Resource {
    /// The path below which the API has it. All that are watched are of version 1.
    pub(super) fn path(self) -> String {
        match self.group {
            "" => format!("/api/v1/{}", self.plural),
            group => format!("/apis/{group}/v1/{}", self.plural),
        }
    }
}
