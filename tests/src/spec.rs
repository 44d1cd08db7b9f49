//! The description of a lab: what stands where, with which addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::{Ipv4Net, Ipv6Net};

/// The wire that all nodes, the clients, the load balancer and the control plane are on.
pub const UNDERLAY_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(192, 0, 2, 0), 24);
/// See [`UNDERLAY_V4`].
pub const UNDERLAY_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 64);

/// Load-balancer addresses: nodes and clients route them to the `elb` member.
pub const VIPS_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(203, 0, 113, 0), 24);
/// See [`VIPS_V4`].
pub const VIPS_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0), 64);

/// External IPs: nodes route them to the `elb` member too; a client gets a route from the scenario.
pub const EXTERNAL_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 51, 100, 0), 24);
/// See [`EXTERNAL_V4`].
pub const EXTERNAL_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0x198, 0, 0, 0, 0, 0), 64);

/// Service addresses. Nothing routes them: they follow the default route to the gateway, and die.
pub const SERVICES_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16);
/// See [`SERVICES_V4`].
pub const SERVICES_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0), 112);

/// The gateway: the nodes' default route, and a dead end.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// See [`GATEWAY_V4`].
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// The first pod's host number in its node's CIDR; the next pods follow.
const FIRST_POD: u32 = 10;

/// How the pods of a node are wired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cni {
    /// A veth and a host route per pod, no bridge; as Calico or a VPC CNI.
    RoutedVeth,
    /// A bridge per node; as flannel's host-gw or the bridge plugin.
    Bridge,
    /// A bridge per node, and VXLAN to the other nodes that have it; as flannel.
    Vxlan,
}

/// Reverse path filtering, as in the kernel's `rp_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RpFilter {
    /// No check.
    Off,
    /// The source must be reachable by the interface that the packet came in on.
    Strict,
    /// The source must be reachable at all.
    Loose,
}

/// A node: what an agent runs on.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Its name, also as the namespace's: at most 12 characters.
    pub name: String,
    /// Its address on the underlay.
    pub v4: Ipv4Addr,
    /// Its address on the underlay.
    pub v6: Ipv6Addr,
    /// Its pods' addresses.
    pub pods_v4: Ipv4Net,
    /// Its pods' addresses.
    pub pods_v6: Ipv6Net,
    /// How its pods are wired.
    pub cni: Cni,
    /// Its pods' names, unique in the lab.
    pub pods: Vec<String>,
    /// Whether pods are seen from outside as the node (except by pods), as CNIs do it.
    pub masquerade_pods: bool,
    /// Reverse path filtering on all its interfaces.
    pub rp_filter: RpFilter,
    /// Whether forwarded packets that conntrack finds invalid are dropped, as on real nodes.
    pub drop_invalid: bool,
}

impl NodeSpec {
    /// The `index`-th node, from 1: `192.0.2.1<index>`, `2001:db8::1<index>`,
    /// `10.244.<index>.0/24`, `fd00:10:244:<index>::/64`; routed veths, no masquerade, strict
    /// rp_filter, invalid packets dropped.
    pub fn new(name: &str, index: u8, pods: &[&str]) -> Self {
        // Addresses are read by people: node 1 is .11 and ::11.
        let last = 10 + index;
        let v6_last = u16::from(last / 10) * 16 + u16::from(last % 10);
        Self {
            name: name.to_owned(),
            v4: Ipv4Addr::new(192, 0, 2, last),
            v6: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, v6_last),
            pods_v4: Ipv4Net::new_assert(Ipv4Addr::new(10, 244, index, 0), 24),
            pods_v6: Ipv6Net::new_assert(
                Ipv6Addr::new(0xfd00, 0x10, 0x244, u16::from(index), 0, 0, 0, 0),
                64,
            ),
            cni: Cni::RoutedVeth,
            pods: pods.iter().map(ToString::to_string).collect(),
            masquerade_pods: false,
            rp_filter: RpFilter::Strict,
            drop_invalid: true,
        }
    }

    /// Chooses how its pods are wired.
    pub fn cni(mut self, cni: Cni) -> Self {
        self.cni = cni;
        self
    }

    /// Masks pods with the node's address towards everything that is no pod.
    pub fn masquerade_pods(mut self) -> Self {
        self.masquerade_pods = true;
        self
    }

    /// Sets reverse path filtering.
    pub fn rp_filter(mut self, mode: RpFilter) -> Self {
        self.rp_filter = mode;
        self
    }

    /// Leaves the node without any forward rule.
    pub fn keep_invalid(mut self) -> Self {
        self.drop_invalid = false;
        self
    }

    /// The addresses of its `index`-th pod.
    pub(crate) fn pod_addresses(&self, index: usize) -> Result<(Ipv4Addr, Ipv6Addr)> {
        let number = FIRST_POD + u32::try_from(index)?;
        let v4 = Ipv4Addr::from(u32::from(self.pods_v4.network()) + number);
        let v6 = Ipv6Addr::from(u128::from(self.pods_v6.network()) + u128::from(number));
        ensure!(
            self.pods_v4.contains(&v4) && v4 != self.pods_v4.broadcast(),
            "{} does not hold {} pods",
            self.pods_v4,
            index + 1
        );
        Ok((v4, v6))
    }

    /// The bridge's addresses: the first ones of the pod CIDRs.
    pub(crate) fn bridge_addresses(&self) -> (Ipv4Addr, Ipv6Addr) {
        (
            Ipv4Addr::from(u32::from(self.pods_v4.network()) + 1),
            Ipv6Addr::from(u128::from(self.pods_v6.network()) + 1),
        )
    }

    /// The node's end of the overlay. Not the very first IPv6 address of the CIDR, which is the
    /// subnet's anycast address on every router.
    pub(crate) fn vtep_addresses(&self) -> (Ipv4Addr, Ipv6Addr) {
        (self.pods_v4.network(), Ipv6Addr::from(u128::from(self.pods_v6.network()) + 0xffff))
    }

    /// The MAC address of its VXLAN device, known to the others without asking.
    pub(crate) fn vtep_mac(&self) -> String {
        let [a, b, c, d] = self.v4.octets();
        format!("0a:58:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
    }
}

/// A machine on the underlay that is no node: a client, the control plane.
#[derive(Clone, Debug)]
pub struct HostSpec {
    /// Its name, also as the namespace's: at most 12 characters.
    pub name: String,
    /// Its address on the underlay.
    pub v4: Ipv4Addr,
    /// Its address on the underlay.
    pub v6: Ipv6Addr,
    /// Whether it has routes to the pods, by their nodes.
    pub pod_routes: bool,
}

impl HostSpec {
    /// A host with the given last part of the address: `192.0.2.<last>`, `2001:db8::<last>`, the
    /// latter written with the same digits. It has no routes to pods.
    pub fn new(name: &str, last: u8) -> Self {
        let v6_last = format!("2001:db8::{last}")
            .parse()
            .expect("the digits of a number are hexadecimal digits as well");
        Self { name: name.to_owned(), v4: Ipv4Addr::new(192, 0, 2, last), v6: v6_last, pod_routes: false }
    }

    /// Gives it routes to the pods, by their nodes.
    pub fn pod_routes(mut self) -> Self {
        self.pod_routes = true;
        self
    }
}

/// The load balancer's machine.
#[derive(Clone, Debug)]
pub struct ElbSpec {
    /// The machine. Unless all nodes masquerade their pods, it wants routes to pods.
    pub host: HostSpec,
    /// The load-balancer addresses that it holds, of both families.
    pub vips: Vec<IpAddr>,
}

impl ElbSpec {
    /// `elb` at 192.0.2.50 with 203.0.113.10 and 2001:db8:113::10, and routes to pods.
    pub fn new() -> Self {
        Self {
            host: HostSpec::new("elb", 50).pod_routes(),
            vips: vec![
                Ipv4Addr::new(203, 0, 113, 10).into(),
                Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10).into(),
            ],
        }
    }

    /// Adds a load-balancer address.
    pub fn vip(mut self, address: IpAddr) -> Self {
        self.vips.push(address);
        self
    }

    /// Takes its routes to pods away: whoever reaches it must come as a node.
    pub fn without_pod_routes(mut self) -> Self {
        self.host.pod_routes = false;
        self
    }
}

impl Default for ElbSpec {
    fn default() -> Self {
        Self::new()
    }
}

/// A whole lab, as described.
#[derive(Clone, Debug, Default)]
pub(crate) struct LabSpec {
    pub nodes: Vec<NodeSpec>,
    pub hosts: Vec<HostSpec>,
    pub elb: Option<ElbSpec>,
}

impl LabSpec {
    /// All machines on the underlay, apart from the nodes.
    pub fn all_hosts(&self) -> impl Iterator<Item = &HostSpec> {
        self.hosts.iter().chain(self.elb.iter().map(|elb| &elb.host))
    }

    /// What cannot stand is refused before anything is made.
    pub fn validate(&self) -> Result<()> {
        let mut names = vec!["underlay", "gateway"];
        let mut addresses: Vec<IpAddr> = vec![GATEWAY_V4.into(), GATEWAY_V6.into()];
        let on_wire = |v4: Ipv4Addr, v6: Ipv6Addr| UNDERLAY_V4.contains(&v4) && UNDERLAY_V6.contains(&v6);
        for node in &self.nodes {
            ensure!(
                on_wire(node.v4, node.v6),
                "{}: {} and {} are not on the underlay",
                node.name,
                node.v4,
                node.v6
            );
            names.push(&node.name);
            names.extend(node.pods.iter().map(String::as_str));
            addresses.extend([IpAddr::from(node.v4), node.v6.into()]);
            for index in 0..node.pods.len() {
                let (v4, v6) =
                    node.pod_addresses(index).with_context(|| format!("the pods of {}", node.name))?;
                addresses.extend([IpAddr::from(v4), v6.into()]);
            }
        }
        for host in self.all_hosts() {
            ensure!(
                on_wire(host.v4, host.v6),
                "{}: {} and {} are not on the underlay",
                host.name,
                host.v4,
                host.v6
            );
            names.push(&host.name);
            addresses.extend([IpAddr::from(host.v4), host.v6.into()]);
        }
        for vip in self.elb.iter().flat_map(|elb| &elb.vips) {
            let known = match vip {
                IpAddr::V4(v4) => VIPS_V4.contains(v4) || EXTERNAL_V4.contains(v4),
                IpAddr::V6(v6) => VIPS_V6.contains(v6) || EXTERNAL_V6.contains(v6),
            };
            ensure!(
                known,
                "{vip}: load-balancer addresses are from {VIPS_V4}, {VIPS_V6}, {EXTERNAL_V4} or {EXTERNAL_V6}"
            );
        }
        for name in &names {
            // An interface's name has 15 bytes, and the lab puts two before this.
            let fits = (1..=12).contains(&name.len())
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
            ensure!(fits, "{name:?}: a name is 1 to 12 of a-z, 0-9 and -");
        }
        if let Some(name) = twice(&names) {
            bail!("two members are called {name}");
        }
        if let Some(address) = twice(&addresses) {
            bail!("two members have the address {address}");
        }
        Ok(())
    }
}

fn twice<T: Ord + Copy>(values: &[T]) -> Option<T> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.windows(2).find_map(|pair| (pair[0] == pair[1]).then_some(pair[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_what_people_expect() {
        let node = NodeSpec::new("node-a", 1, &["a1", "a2"]);
        assert_eq!(node.v4.to_string(), "192.0.2.11");
        assert_eq!(node.v6.to_string(), "2001:db8::11");
        let (v4, v6) = node.pod_addresses(1).unwrap();
        assert_eq!(v4.to_string(), "10.244.1.11");
        assert_eq!(v6.to_string(), "fd00:10:244:1::b");
        assert_eq!(HostSpec::new("client", 100).v6.to_string(), "2001:db8::100");
    }

    #[test]
    fn what_cannot_stand_is_refused() {
        let two = |a: NodeSpec, b: NodeSpec| LabSpec { nodes: vec![a, b], ..LabSpec::default() };
        let refused = |spec: LabSpec| spec.validate().expect_err("must be refused").to_string();

        let same_name = two(NodeSpec::new("a", 1, &["x"]), NodeSpec::new("b", 2, &["x"]));
        assert!(refused(same_name).contains("called x"));
        let same_address = two(NodeSpec::new("a", 1, &[]), NodeSpec::new("b", 1, &[]));
        assert!(refused(same_address).contains("192.0.2.11"));
        let long = two(NodeSpec::new("a-very-long-name", 1, &[]), NodeSpec::new("b", 2, &[]));
        assert!(refused(long).contains("a-very-long-name"));
        let mut far = NodeSpec::new("a", 1, &[]);
        far.v4 = Ipv4Addr::new(192, 168, 1, 1);
        assert!(refused(two(far, NodeSpec::new("b", 2, &[]))).contains("192.168.1.1"));
    }
}
