//! Where a Service listens: every address, port and protocol, whether or not another Service has it already.

use kproxy_common::{Address, FrontendKey, FrontendKind};

use super::config::NodeConfig;
use super::objects::{Family, LoadBalancer, ServedBy, Service};

/// A frontend that a Service claims.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frontend {
    /// Where.
    pub key: FrontendKey,
    /// Through which of the Service's addresses.
    pub kind: FrontendKind,
    /// Which of the Service's ports, counted from 0.
    pub port: usize,
    /// Its load balancer, if it is one's address.
    pub load_balancer: Option<LoadBalancer>,
}

/// The frontends of a Service.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Frontends {
    /// Each key once; by port, family and key.
    pub claimed: Vec<Frontend>,
    /// Those that another port of the same Service has already.
    pub duplicates: Vec<Frontend>,
}

/// The frontends of `service`. Where one key comes from several of its addresses, the load balancer's counts
/// before the external IP: pass-through and source ranges must hold, whatever else the address is.
pub fn frontends(service: &Service, config: &NodeConfig) -> Frontends {
    if service.served_by != ServedBy::Us {
        return Frontends::default();
    }
    let mut all = Vec::new();
    for (at, port) in service.ports.iter().enumerate() {
        let mut add = |key, kind, load_balancer| all.push(Frontend { key, kind, port: at, load_balancer });
        let exact = |address: &Address| FrontendKey::new(*address, port.port, port.protocol);
        for ip in &service.cluster_ips {
            add(exact(ip), FrontendKind::ClusterIp, None);
        }
        for load_balancer in &service.load_balancers {
            let kind = FrontendKind::LoadBalancer;
            add(exact(&load_balancer.address), kind, Some(*load_balancer));
        }
        if !config.disable_external_ips {
            for ip in &service.external_ips {
                add(exact(ip), FrontendKind::ExternalIp, None);
            }
        }
        if let Some(node_port) = port.node_port {
            for family in &service.families {
                let key = FrontendKey::node_port(&family.unspecified(), node_port, port.protocol);
                add(key, FrontendKind::NodePort, None);
            }
        }
    }
    let mut duplicates = Vec::new();
    // Stable: the ranks of kinds are the order in which they were added above.
    all.sort_by_key(|frontend| frontend.key);
    all.dedup_by(|later, first| {
        let same = later.key == first.key;
        if same && later.port != first.port {
            duplicates.push(*later);
        }
        same
    });
    all.sort_by_key(|frontend| (frontend.port, Family::of(&frontend.key.address()), frontend.key));
    Frontends { claimed: all, duplicates }
}
