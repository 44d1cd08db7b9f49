//! What can happen to the model: one object that came, changed or went.

use std::collections::BTreeSet;

use kproxy_common::FrontendKey;

use super::local_addresses::LocalAddresses;
use crate::api::{EndpointSlice, Node, Pod, Service, ServiceCidr};
use crate::wanted::ServiceKey;

/// One object as it is now; `None`: it is gone. The key stands beside the object, since an object that is
/// gone has none, and one from a file may lack its namespace.
#[derive(Clone, Debug)]
pub enum Change {
    /// A Service.
    Service(ServiceKey, Option<Box<Service>>),
    /// An EndpointSlice; the key is the slice's own namespace and name.
    EndpointSlice(ServiceKey, Option<Box<EndpointSlice>>),
    /// This node's Node object. One with another name is ignored.
    Node(Option<Box<Node>>),
    /// A ServiceCIDR, by its name.
    ServiceCidr(String, Option<Box<ServiceCidr>>),
    /// A Pod, by its namespace and name. One of another node is ignored.
    Pod(ServiceKey, Option<Box<Pod>>),
    /// All Pods of this node have been told once.
    AllPods,
    /// All addresses that stand on interfaces of this node.
    LocalAddresses(LocalAddresses),
    /// Where processes of this node listen, of the addresses in
    /// [`Model::standing_cluster_ips`](super::Model::standing_cluster_ips): sockets that are bound to such an address, not
    /// to all. `None`: that cannot be told.
    Listeners(Option<BTreeSet<FrontendKey>>),
}
