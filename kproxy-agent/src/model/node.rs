//! What the tables hold about the node itself: the addresses that answer NodePorts, and the ServiceCIDRs.

use std::collections::{BTreeMap, BTreeSet};

use kproxy_common::{Address, Cidr, MAX_CIDRS};

use super::claims::Claims;
use super::config::{NodeConfig, NodePortAddresses};
use super::local_addresses::LocalAddresses;
use super::objects::{Family, Node};
use super::problem::{ObjectRef, Problem, ProblemKind};

/// What the node wants in the tables.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct WantedNode {
    /// The addresses that answer NodePorts. Loopback is never among them: the programs decide about it.
    pub node_port_addresses: BTreeSet<Address>,
    /// Unallocated addresses within are dropped. At most [`MAX_CIDRS`], by address.
    pub service_cidrs: Vec<Cidr>,
}

/// The node's own addresses: of each family those of `--node-address`, else the Node object's.
pub fn own_addresses(config: &NodeConfig, node: &Node) -> Vec<Address> {
    let mut own = Vec::new();
    for family in Family::ALL {
        let of_family = |address: &&Address| Family::of(address) == family;
        let given = config.node_addresses.iter().filter(of_family);
        let before = own.len();
        own.extend(given.filter(|address| !address.is_loopback() && !address.is_unspecified()));
        if own.len() == before {
            own.extend(node.addresses.iter().filter(of_family));
        }
    }
    own
}

/// The addresses that answer NodePorts. One that is a Service's ClusterIP (NodeLocal DNSCache puts it on an
/// interface) is not: the table says one thing about an address, and that is the Service's.
pub fn node_port_addresses(
    config: &NodeConfig,
    own: &[Address],
    local: &LocalAddresses,
    cluster_ips: &Claims<Address>,
) -> BTreeSet<Address> {
    let mut answering: BTreeSet<Address> = BTreeSet::new();
    for family in Family::ALL {
        let of_family = |address: &&Address| Family::of(address) == family;
        let all_local = local.iter().filter(of_family);
        match &config.nodeport_addresses {
            NodePortAddresses::Primary if own.iter().any(|address| of_family(&address)) => {
                answering.extend(own.iter().filter(of_family));
            }
            NodePortAddresses::Cidrs(cidrs) if cidrs.iter().any(|cidr| of_family(&&cidr.address())) => {
                let in_cidr = |address: &&Address| cidrs.iter().any(|cidr| covers(cidr, address));
                answering.extend(all_local.filter(in_cidr));
            }
            NodePortAddresses::Primary | NodePortAddresses::Cidrs(_) => answering.extend(all_local),
        }
    }
    answering.retain(|address| {
        !address.is_loopback() && !address.is_unspecified() && !cluster_ips.is_claimed(address)
    });
    answering
}

/// The ServiceCIDRs: those of the flag, else those of the objects, as far as they fit.
pub fn service_cidrs(
    config: &NodeConfig,
    objects: &BTreeMap<String, Vec<Cidr>>,
) -> (Vec<Cidr>, Vec<Problem>) {
    let flag = config.service_cidrs.iter().map(|cidr| (None, *cidr));
    let is_given = !config.service_cidrs.is_empty();
    let objects = objects.iter().filter(|_| !is_given);
    let of_objects = objects.flat_map(|(name, cidrs)| cidrs.iter().map(move |cidr| (Some(name), *cidr)));
    let mut all: Vec<_> = flag.chain(of_objects).collect();
    // Widest first: what lies within another needs no place of its own.
    all.sort_by_key(|(name, cidr)| (cidr.prefix_length(), cidr.address(), *name));
    let mut kept: Vec<Cidr> = Vec::new();
    let mut problems = Vec::new();
    for (name, cidr) in all {
        if kept.iter().any(|wider| covers(wider, &cidr.address())) {
            continue;
        }
        if kept.len() < MAX_CIDRS {
            kept.push(cidr);
            continue;
        }
        let object = match name {
            Some(name) => ObjectRef::service_cidr(name),
            None => ObjectRef::node(&config.node_name),
        };
        let message = format!(
            "{} does not fit beside {MAX_CIDRS} other ranges: unallocated addresses within are not dropped; \
             give fewer and wider ranges with --service-cidr",
            cidr.address()
        );
        problems.push(Problem {
            object,
            field: "spec.cidrs".to_owned(),
            kind: ProblemKind::DoesNotFit,
            message,
        });
    }
    kept.sort_by_key(Cidr::address);
    (kept, problems)
}

/// Whether `address` lies in `cidr` and is of its family: `::/0` has the mapped IPv4 addresses within.
fn covers(cidr: &Cidr, address: &Address) -> bool {
    cidr.address().is_v4() == address.is_v4() && cidr.contains(address)
}
