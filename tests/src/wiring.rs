//! What makes interfaces, addresses and routes of a described lab: text for `ip -batch`, `bridge
//! -batch` and `nft -f`, one function for each kind of namespace. Pure.

use std::fmt::Write as _;

use crate::spec::{
    Cni, EXTERNAL_V4, EXTERNAL_V6, ElbSpec, GATEWAY_V4, GATEWAY_V6, HostSpec, LabSpec, NodeSpec, RpFilter,
    UNDERLAY_V4, UNDERLAY_V6, VIPS_V4, VIPS_V6,
};

/// The interface of a member towards the underlay, and of a pod towards its node.
pub const UPLINK: &str = "eth0";

/// The next hop of routed pods: nobody has it, the host's end of the veth answers for it.
const POD_NEXT_HOP_V4: &str = "169.254.1.1";
/// The link-local address of the host's end of each routed veth.
const POD_NEXT_HOP_V6: &str = "fe80::1";

/// 50 bytes less than the wire's: outer Ethernet, IPv4, UDP and VXLAN headers.
const VXLAN_MTU: u32 = 1450;

/// The name of a member's port on the underlay bridge.
pub fn port_name(member: &str) -> String {
    format!("u-{member}")
}

/// The name of the host's end of a pod's veth.
pub fn veth_name(pod: &str) -> String {
    format!("v-{pod}")
}

/// The name of the bridge that a node's pods are on, unless they are routed.
pub const POD_BRIDGE: &str = "cni0";
/// The name of the overlay's device.
pub const VXLAN: &str = "vxlan0";

/// Parameters that every namespace gets before it has an interface.
pub fn sysctls_everywhere() -> Vec<(&'static str, &'static str)> {
    vec![
        // Addresses are usable at once: nobody else can have them.
        ("net/ipv6/conf/all/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_ra", "0"),
        // Bursts of short connections use ports up faster than TIME-WAIT gives them back.
        ("net/ipv4/tcp_tw_reuse", "1"),
    ]
}

/// Parameters of a node, before it has an interface.
pub fn sysctls_of_node(node: &NodeSpec) -> Vec<(&'static str, &'static str)> {
    let rp_filter = match node.rp_filter {
        RpFilter::Off => "0",
        RpFilter::Strict => "1",
        RpFilter::Loose => "2",
    };
    vec![
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv6/conf/default/forwarding", "1"),
        ("net/ipv4/conf/all/rp_filter", rp_filter),
        ("net/ipv4/conf/default/rp_filter", rp_filter),
    ]
}

/// The bridge that stands for the wire, with a port for each member.
pub fn underlay(spec: &LabSpec) -> String {
    let mut text = String::from(
        "link set lo up\n\
         link add wire type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
         link set wire up\n",
    );
    let members = ["gateway"]
        .into_iter()
        .chain(spec.nodes.iter().map(|node| node.name.as_str()))
        .chain(spec.all_hosts().map(|host| host.name.as_str()));
    for member in members {
        let port = port_name(member);
        lines(
            &mut text,
            &[
                format!("link add {port} type veth peer name {UPLINK} netns {member}"),
                format!("link set {port} master wire up"),
            ],
        );
    }
    text
}

/// The dead end behind the nodes' default route.
pub fn gateway() -> String {
    uplink(GATEWAY_V4, GATEWAY_V6)
}

/// Counts, by destination, what reaches the gateway and is for somebody else; then drops it.
pub fn gateway_rules() -> String {
    format!(
        "table inet stray {{\n\
         set v4 {{ type ipv4_addr; size 65535; flags dynamic; counter; }}\n\
         set v6 {{ type ipv6_addr; size 65535; flags dynamic; counter; }}\n\
         chain arrive {{\n\
         type filter hook prerouting priority -300;\n\
         meta pkttype != host accept\n\
         ip daddr != {UNDERLAY_V4} add @v4 {{ ip daddr counter }} drop\n\
         ip6 daddr != {{ {UNDERLAY_V6}, fe80::/10, ff00::/8 }} add @v6 {{ ip6 daddr counter }} drop\n\
         }}\n\
         }}\n"
    )
}

/// A client, the control plane, or the load balancer's machine.
pub fn host(spec: &LabSpec, host: &HostSpec) -> String {
    let mut text = uplink(host.v4, host.v6);
    if let Some(elb) = &spec.elb
        && elb.host.name != host.name
    {
        lines(
            &mut text,
            &[
                format!("route add {VIPS_V4} via {}", elb.host.v4),
                format!("route add {VIPS_V6} via {}", elb.host.v6),
            ],
        );
    }
    if host.pod_routes {
        for node in &spec.nodes {
            lines(
                &mut text,
                &[
                    format!("route add {} via {}", node.pods_v4, node.v4),
                    format!("route add {} via {}", node.pods_v6, node.v6),
                ],
            );
        }
    }
    text
}

/// The load balancer's own addresses.
pub fn vips(elb: &ElbSpec) -> String {
    elb.vips.iter().map(|vip| format!("addr add {vip} dev lo\n")).collect()
}

/// A node, with the host's ends of its pods' wires. The pods' namespaces must be there.
pub fn node(spec: &LabSpec, node: &NodeSpec) -> String {
    let mut text = uplink(node.v4, node.v6);
    lines(
        &mut text,
        &[format!("route add default via {GATEWAY_V4}"), format!("route add ::/0 via {GATEWAY_V6}")],
    );
    if let Some(elb) = &spec.elb {
        for net in [VIPS_V4, EXTERNAL_V4] {
            lines(&mut text, &[format!("route add {net} via {}", elb.host.v4)]);
        }
        for net in [VIPS_V6, EXTERNAL_V6] {
            lines(&mut text, &[format!("route add {net} via {}", elb.host.v6)]);
        }
    }
    match node.cni {
        Cni::RoutedVeth => {}
        Cni::Bridge | Cni::Vxlan => pod_bridge(&mut text, node),
    }
    if node.cni == Cni::Vxlan {
        vxlan_device(&mut text, node);
    }
    for (index, pod) in node.pods.iter().enumerate() {
        text.push_str(&pod_wire(node, index, pod));
    }
    for other in spec.nodes.iter().filter(|other| other.name != node.name) {
        pods_of(&mut text, node, other);
    }
    text
}

/// Parameters that exist only once a routed pod's veth is there.
pub fn sysctls_of_pod_wire(node: &NodeSpec, pod: &str) -> Vec<(String, &'static str)> {
    if node.cni != Cni::RoutedVeth {
        return Vec::new();
    }
    let veth = veth_name(pod);
    vec![
        (format!("net/ipv4/conf/{veth}/proxy_arp"), "1"),
        // Otherwise the answer to the pod's first question waits up to 0.8 s.
        (format!("net/ipv4/neigh/{veth}/proxy_delay"), "0"),
    ]
}

/// A pod's own side.
pub fn pod(node: &NodeSpec, v4: std::net::Ipv4Addr, v6: std::net::Ipv6Addr) -> String {
    let mut text = String::from("link set lo up\n");
    if node.cni == Cni::RoutedVeth {
        lines(
            &mut text,
            &[
                format!("addr add {v4}/32 dev {UPLINK}"),
                format!("addr add {v6}/128 dev {UPLINK} nodad"),
                format!("link set {UPLINK} up"),
                format!("route add default via {POD_NEXT_HOP_V4} dev {UPLINK} onlink"),
                format!("route add ::/0 via {POD_NEXT_HOP_V6} dev {UPLINK}"),
            ],
        );
        return text;
    }
    let (bridge_v4, bridge_v6) = node.bridge_addresses();
    lines(
        &mut text,
        &[
            format!("addr add {v4}/{} dev {UPLINK}", node.pods_v4.prefix_len()),
            format!("addr add {v6}/{} dev {UPLINK} nodad", node.pods_v6.prefix_len()),
            format!("link set {UPLINK} up"),
            format!("route add default via {bridge_v4}"),
            format!("route add ::/0 via {bridge_v6}"),
        ],
    );
    text
}

/// What the overlay must know about the other nodes' devices, for `bridge -batch`.
pub fn overlay_peers(spec: &LabSpec, node: &NodeSpec) -> String {
    let mut text = String::new();
    for other in overlay_others(spec, node) {
        lines(&mut text, &[format!("fdb append {} dev {VXLAN} dst {}", other.vtep_mac(), other.v4)]);
    }
    text
}

/// The firewall of a node; empty where it has none.
pub fn node_rules(spec: &LabSpec, node: &NodeSpec) -> String {
    let mut text = String::new();
    if node.drop_invalid {
        text.push_str(
            "table inet node {\n\
             chain forward {\n\
             type filter hook forward priority 0;\n\
             ct state invalid counter drop\n\
             }\n\
             }\n",
        );
    }
    if node.masquerade_pods {
        let all = |family: fn(&NodeSpec) -> String| -> String {
            spec.nodes.iter().map(family).collect::<Vec<_>>().join(", ")
        };
        let _ = write!(
            text,
            "table inet cni {{\n\
             chain postrouting {{\n\
             type nat hook postrouting priority 100;\n\
             ip saddr {} ip daddr != {{ {} }} oifname {UPLINK} masquerade\n\
             ip6 saddr {} ip6 daddr != {{ {} }} oifname {UPLINK} masquerade\n\
             }}\n\
             }}\n",
            node.pods_v4,
            all(|node| node.pods_v4.to_string()),
            node.pods_v6,
            all(|node| node.pods_v6.to_string()),
        );
    }
    text
}

fn uplink(v4: std::net::Ipv4Addr, v6: std::net::Ipv6Addr) -> String {
    format!(
        "link set lo up\n\
         addr add {v4}/{} dev {UPLINK}\n\
         addr add {v6}/{} dev {UPLINK} nodad\n\
         link set {UPLINK} up\n",
        UNDERLAY_V4.prefix_len(),
        UNDERLAY_V6.prefix_len()
    )
}

fn pod_bridge(text: &mut String, node: &NodeSpec) {
    let (v4, v6) = node.bridge_addresses();
    lines(
        text,
        &[
            format!("link add {POD_BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"),
            format!("addr add {v4}/{} dev {POD_BRIDGE}", node.pods_v4.prefix_len()),
            format!("addr add {v6}/{} dev {POD_BRIDGE} nodad", node.pods_v6.prefix_len()),
            format!("link set {POD_BRIDGE} up"),
        ],
    );
}

fn vxlan_device(text: &mut String, node: &NodeSpec) {
    let (v4, v6) = node.vtep_addresses();
    lines(
        text,
        &[
            format!(
                "link add {VXLAN} address {} mtu {VXLAN_MTU} type vxlan id 42 local {} dev {UPLINK} dstport 4789 nolearning",
                node.vtep_mac(),
                node.v4
            ),
            format!("addr add {v4}/32 dev {VXLAN}"),
            format!("addr add {v6}/128 dev {VXLAN} nodad"),
            format!("link set {VXLAN} up"),
        ],
    );
}

/// The host's end of a pod's wire, and the way to the pod.
pub fn pod_wire(node: &NodeSpec, index: usize, pod: &str) -> String {
    let mut text = String::new();
    let veth = veth_name(pod);
    let mtu = match node.cni {
        Cni::Vxlan => format!(" mtu {VXLAN_MTU}"),
        Cni::RoutedVeth | Cni::Bridge => String::new(),
    };
    lines(&mut text, &[format!("link add {veth}{mtu} type veth peer name {UPLINK}{mtu} netns {pod}")]);
    if node.cni != Cni::RoutedVeth {
        // Hairpin as in flannel's default configuration: a pod reaches itself by its Service.
        lines(
            &mut text,
            &[
                format!("link set {veth} master {POD_BRIDGE} up"),
                format!("link set {veth} type bridge_slave hairpin on"),
            ],
        );
        return text;
    }
    let (v4, v6) = node.pod_addresses(index).expect("a validated description has an address for each pod");
    lines(
        &mut text,
        &[
            format!("addr add {POD_NEXT_HOP_V6}/64 dev {veth} nodad"),
            format!("link set {veth} up"),
            format!("route add {v4}/32 dev {veth}"),
            format!("route add {v6}/128 dev {veth}"),
        ],
    );
    text
}

/// The way from one node to another's pods.
fn pods_of(text: &mut String, node: &NodeSpec, other: &NodeSpec) {
    if !(node.cni == Cni::Vxlan && other.cni == Cni::Vxlan) {
        lines(
            text,
            &[
                format!("route add {} via {}", other.pods_v4, other.v4),
                format!("route add {} via {}", other.pods_v6, other.v6),
            ],
        );
        return;
    }
    let (v4, v6) = other.vtep_addresses();
    let mac = other.vtep_mac();
    lines(
        text,
        &[
            format!("neigh add {v4} lladdr {mac} dev {VXLAN} nud permanent"),
            format!("neigh add {v6} lladdr {mac} dev {VXLAN} nud permanent"),
            format!("route add {} via {v4} dev {VXLAN} onlink", other.pods_v4),
            format!("route add {v6}/128 dev {VXLAN}"),
            format!("route add {} via {v6} dev {VXLAN}", other.pods_v6),
        ],
    );
}

fn overlay_others<'a>(spec: &'a LabSpec, node: &'a NodeSpec) -> impl Iterator<Item = &'a NodeSpec> {
    spec.nodes
        .iter()
        .filter(move |other| node.cni == Cni::Vxlan && other.cni == Cni::Vxlan && other.name != node.name)
}

fn lines(text: &mut String, more: &[String]) {
    for line in more {
        text.push_str(line);
        text.push('\n');
    }
}
