//! From the command line to plain values: the model's configuration and the programs'.

use std::{collections::BTreeSet, hash::BuildHasher as _, net::IpAddr};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use kproxy_common::{Address, Cidr, Config, FrontendKey, MAX_CIDRS, Protocol};

use crate::{
    cli::{NodeArgs, RuleArgs, Scope, SocketHooks, TableArgs},
    commands::UsageError,
    flows::sizes,
    model::{LocalAddresses, NodeConfig, NodePortAddresses, PassThroughConfig, PassThroughScope},
    programs::Capacities,
};

/// How long a UDP flow may idle: as conntrack's `nf_conntrack_udp_timeout_stream`.
const UDP_TIMEOUT_SECONDS: u64 = 180;

/// The ports that clients are masqueraded with: those that netfilter takes for who has one above 1023
/// (`nf_nat_l4proto_unique_tuple`), as kube-proxy does.
pub const MASK_PORTS_FIRST: u32 = 1_024;
/// How many these are.
pub const MASK_PORTS_COUNT: u32 = 64_512;
/// Those of them that are tried first: above the default `ip_local_port_range` (32768 to 60999), and reserved on the node,
/// so that no socket is given one.
pub const RESERVED_PORTS_FIRST: u32 = 61_000;
/// How many these are.
pub const RESERVED_PORTS_COUNT: u32 = 4_536;

/// This node's name in EndpointSlices: as given, else the host name in lower case, as kube-proxy takes it.
pub fn node_name(args: &NodeArgs) -> Result<String> {
    if let Some(name) = &args.node_name {
        return Ok(name.trim().to_lowercase());
    }
    let name = nix::unistd::gethostname().context("cannot tell the host name; give --node-name")?;
    Ok(name.to_string_lossy().trim().to_lowercase())
}

/// The model's configuration.
pub fn model(
    node_name: &str,
    node: &NodeArgs,
    rules: &RuleArgs,
    local_addresses: LocalAddresses,
) -> Result<NodeConfig> {
    let RuleArgs {
        masquerade_all,
        disable_external_ips,
        disable_loopback_nodeports: _,
        accept_forward: _,
        disable_conntrack_sysctls: _,
        socket_hooks: _,
        pass_through_default,
        pass_through_scope,
        pass_through_annotation,
    } = rules;
    Ok(NodeConfig {
        node_name: node_name.to_owned(),
        node_addresses: node.node_address.iter().copied().map(Address::from).collect(),
        cluster_cidrs: cidrs("--cluster-cidr", &node.cluster_cidr)?,
        service_cidrs: cidrs("--service-cidr", &node.service_cidr)?,
        nodeport_addresses: nodeport_addresses(&node.nodeport_addresses)?,
        masquerade_all: *masquerade_all,
        disable_external_ips: *disable_external_ips,
        pass_through: PassThroughConfig {
            default: *pass_through_default,
            scope: match pass_through_scope {
                Scope::All => PassThroughScope::All,
                Scope::Pods => PassThroughScope::Pods,
                Scope::Nodes => PassThroughScope::Nodes,
            },
            extra_annotations: pass_through_annotation.clone(),
        },
        has_netns_cookies: true,
        local_addresses,
    })
}

/// How much the maps hold.
pub fn capacities(tables: &TableArgs) -> Capacities {
    let TableArgs { max_frontends, max_backends, max_source_ranges, max_flows, max_affinity } = *tables;
    let by_memory = sizes::memory().map(sizes::automatic);
    Capacities {
        frontends: max_frontends,
        backends: max_backends,
        source_ranges: max_source_ranges,
        flows: match max_flows {
            0 => by_memory.unwrap_or(Capacities::DEFAULT.flows),
            flows => flows,
        },
        affinity: match max_affinity {
            0 => by_memory.map_or(Capacities::DEFAULT.affinity, sizes::affinity),
            clients => clients,
        },
    }
}

/// By what programs tell packets that may begin flows of the node from all others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Watched {
    /// See [`Config::node_addresses`].
    pub addresses: u64,
    /// The lowest UDP NodePort, and the highest; that is below it where there is none.
    pub udp_node_ports: (u16, u16),
}

impl Watched {
    /// No address, no port.
    pub const NOTHING: Self = Self { addresses: 0, udp_node_ports: (1, 0) };

    /// The node has these addresses, and serves these NodePorts.
    pub fn of<'a>(
        addresses: impl IntoIterator<Item = &'a IpAddr>,
        node_ports: impl IntoIterator<Item = FrontendKey>,
    ) -> Self {
        let bits = addresses.into_iter().fold(0, |bits, address| bits | Address::from(*address).bit());
        let udp = node_ports.into_iter().filter(|key| key.protocol() == Protocol::Udp);
        let ports: BTreeSet<u16> = udp.map(|key| key.port()).collect();
        let udp_node_ports = match (ports.first(), ports.last()) {
            (Some(first), Some(last)) => (*first, *last),
            _ => (1, 0),
        };
        Self { addresses: bits, udp_node_ports }
    }
}

/// The programs' configuration. The hash's key is `seed`, that of the agent before, if there was one: flows that
/// are being opened then stay where they are over a restart.
pub fn programs(
    node: &NodeArgs,
    rules: &RuleArgs,
    host_netns_cookie: u64,
    seed: [u32; 2],
    some_opted_out: bool,
    service_cidrs: &[Cidr],
    watched: &Watched,
) -> Result<Config> {
    let table = |cidrs: &[Cidr]| {
        let mut table = [Cidr::NONE; MAX_CIDRS];
        for (place, cidr) in table.iter_mut().zip(cidrs) {
            *place = *cidr;
        }
        table
    };
    Ok(Config {
        host_netns_cookie,
        udp_timeout: UDP_TIMEOUT_SECONDS * 1_000_000_000,
        hash_seed: if seed == [0, 0] { random() } else { seed },
        loopback_node_ports: u16::from(!rules.disable_loopback_nodeports),
        routes_by_source: 0,
        remember_peer: 1,
        host_sockets_only: u8::from(rules.socket_hooks == SocketHooks::Host),
        some_opted_out: u8::from(some_opted_out),
        mask_ports_first: MASK_PORTS_FIRST,
        mask_ports_count: MASK_PORTS_COUNT,
        reserved_ports_first: RESERVED_PORTS_FIRST,
        reserved_ports_count: RESERVED_PORTS_COUNT,
        node_addresses: watched.addresses,
        udp_node_ports_first: watched.udp_node_ports.0,
        udp_node_ports_last: watched.udp_node_ports.1,
        _pad: 0,
        service_cidrs: table(service_cidrs),
        cluster_cidrs: table(&cidrs("--cluster-cidr", &node.cluster_cidr)?),
    })
}

/// A prefix in the form of the maps.
pub fn cidr(net: &IpNet) -> Cidr {
    let length = u32::from(net.prefix_len()) + if net.addr().is_ipv4() { 96 } else { 0 };
    Cidr::new(Address::from(net.network()), length)
}

fn cidrs(flag: &str, nets: &[IpNet]) -> Result<Vec<Cidr>> {
    if nets.len() > MAX_CIDRS {
        return Err(
            UsageError(format!("{flag} takes at most {MAX_CIDRS} prefixes, not {}", nets.len())).into()
        );
    }
    Ok(nets.iter().map(cidr).collect())
}

fn nodeport_addresses(given: &[String]) -> Result<NodePortAddresses> {
    if given == ["primary"] {
        return Ok(NodePortAddresses::Primary);
    }
    let parse = |text: &String| {
        let parsed =
            text.parse::<IpNet>().or_else(|error| text.parse::<IpAddr>().map(IpNet::from).map_err(|_| error));
        parsed.map(|net| cidr(&net)).map_err(|_| {
            UsageError(format!(
                "--nodeport-addresses takes `primary` alone, or CIDRs as 192.0.2.0/24; not {text:?}"
            ))
        })
    };
    Ok(NodePortAddresses::Cidrs(given.iter().map(parse).collect::<Result<_, _>>()?))
}

/// Two words that a stranger cannot guess: the standard library keys its hashes with the system's randomness.
pub fn random() -> [u32; 2] {
    let word = std::hash::RandomState::new().hash_one(0_u8);
    [word as u32 | 1, (word >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_count_in_the_mapped_form() {
        let net: IpNet = "10.96.3.4/12".parse().unwrap();
        let cidr = cidr(&net);
        assert_eq!((cidr.prefix_length(), IpAddr::from(cidr.address())), (108, "10.96.0.0".parse().unwrap()));
    }

    #[test]
    fn what_may_begin_flows_of_the_node_is_watched() {
        let addresses: [IpAddr; 2] = ["192.0.2.11".parse().unwrap(), "2001:db8::b".parse().unwrap()];
        let port = |port, protocol| FrontendKey::new(Address::UNSPECIFIED, port, protocol);
        let ports = [port(30_053, Protocol::Udp), port(30_001, Protocol::Tcp), port(31_000, Protocol::Udp)];
        let watched = Watched::of(&addresses, ports);
        assert_eq!(watched.udp_node_ports, (30_053, 31_000));
        let is_watched =
            |text: &str| watched.addresses & Address::from(text.parse::<IpAddr>().unwrap()).bit() != 0;
        assert!(is_watched("192.0.2.11") && is_watched("2001:db8::b") && !is_watched("192.0.2.12"));
        assert_eq!(Watched::of(&[], [port(30_001, Protocol::Tcp)]), Watched::NOTHING);
    }

    #[test]
    fn node_port_addresses_are_primary_or_prefixes() {
        assert_eq!(nodeport_addresses(&["primary".into()]).unwrap(), NodePortAddresses::Primary);
        let NodePortAddresses::Cidrs(given) =
            nodeport_addresses(&["192.0.2.0/24".into(), "2001:db8::1".into()]).unwrap()
        else {
            panic!("prefixes were given");
        };
        assert_eq!(given.iter().map(Cidr::prefix_length).collect::<Vec<_>>(), [120, 128]);
        let error = nodeport_addresses(&["primary".into(), "10.0.0.0/8".into()]).unwrap_err();
        assert!(error.is::<UsageError>(), "{error}");
    }
}
