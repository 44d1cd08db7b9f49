//! What the interface by which a packet comes in adds to the decision: whether the backend is to see the client or the
//! node.

use crate::{Address, Backend, ClientKind, Options, Side, Tables};

/// Whether the client is masked towards `backend`. `side` is the frontend's word for this client, `behind` says who lives
/// behind the interface by which its packets come in, and `source` is its address.
#[inline(always)]
pub fn is_masked<T: Tables>(
    tables: &T,
    side: &Side,
    backend: &Backend,
    behind: ClientKind,
    source: &Address,
) -> bool {
    // What came from another node and goes to another must come back this way, also where it is a pod's.
    let is_detour = matches!(behind, ClientKind::Outside) && !backend.is_local();
    // A pod that is its own backend would take a packet from its own address for a forged one.
    let is_hairpin = backend.address() == *source;
    is_detour
        || is_hairpin
        || side.has(Options::MASQUERADE)
        || side.has(Options::MASQUERADE_REMOTE) && !backend.is_local()
        || side.has(Options::MASQUERADE_OFF_CLUSTER) && !tables.is_in_cluster(source)
}

/// Whether `--cluster-cidr` has this address within.
#[inline(always)]
pub fn in_cluster_cidr<T: Tables>(tables: &T, address: &Address) -> bool {
    let Some(config) = tables.config() else {
        return false;
    };
    for cidr in &config.cluster_cidrs {
        if cidr.is_none() {
            return false;
        }
        if cidr.contains(address) {
            return true;
        }
    }
    false
}
