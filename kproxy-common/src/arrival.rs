//! What the interface by which a packet comes in adds to the decision: who its client is, and whether the
//! backend is to see the client or the node.

use crate::{Address, Backend, ClientKind, Options, Side, Tables};

/// Who the client is whose packets come from `source`, by an interface behind which clients of the kind `behind`
/// live: whoever comes from outside with an address of `--cluster-cidr` is a pod, of another node.
#[inline(always)]
pub fn client_of<T: Tables>(tables: &T, behind: ClientKind, source: &Address) -> ClientKind {
    if matches!(behind, ClientKind::Outside) && in_cluster_cidr(tables, source) {
        return ClientKind::Pod;
    }
    behind
}

/// Whether the client is masked towards `backend`. `side` is the frontend's word for this client, `behind` and `source`
/// as in [`client_of`].
#[inline(always)]
pub fn is_masked(side: &Side, backend: &Backend, behind: ClientKind, source: &Address) -> bool {
    // What came from another node and goes to another must come back this way, also where it is a pod's.
    let is_detour = matches!(behind, ClientKind::Outside) && !backend.is_local();
    // A pod that is its own backend would take a packet from its own address for a forged one.
    let is_hairpin = backend.address() == *source;
    is_detour
        || is_hairpin
        || side.has(Options::MASQUERADE)
        || side.has(Options::MASQUERADE_REMOTE) && !backend.is_local()
}

#[inline(always)]
fn in_cluster_cidr<T: Tables>(tables: &T, address: &Address) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BackendState, Location, Mode};

    #[test]
    fn a_pod_that_is_its_own_backend_is_masked() {
        let own = Backend::new(Address::UNSPECIFIED, 80, Location::Local, BackendState::Ready, 1, 1);
        let side = Side::new(0, 1, Mode::Forward, 0);
        assert!(is_masked(&side, &own, ClientKind::Pod, &Address::UNSPECIFIED));
    }

    #[test]
    fn who_is_masked() {
        let backend = |location| Backend::new(Address::UNSPECIFIED, 80, location, BackendState::Ready, 1, 1);
        let (local, remote) = (backend(Location::Local), backend(Location::Remote));
        let side = |options| Side::new(0, 1, Mode::Forward, options);
        use ClientKind::{Host, Outside, Pod};
        for (options, behind, at_local, at_remote) in [
            (0, Pod, false, false),
            (0, Host, false, false),
            (0, Outside, false, true),
            (Options::MASQUERADE_REMOTE, Pod, false, true),
            (Options::MASQUERADE_REMOTE, Outside, false, true),
            (Options::MASQUERADE, Pod, true, true),
            (Options::MASQUERADE, Outside, true, true),
        ] {
            let client = Address::UNSPECIFIED_V4;
            let is = [&local, &remote].map(|backend| is_masked(&side(options), backend, behind, &client));
            assert_eq!(is, [at_local, at_remote], "{options:#b} {behind:?}");
        }
    }
}
