//! The interfaces of this network namespace: which of them get which packet programs, and the node's own
//! addresses; followed through rtnetlink.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, protocols::NETLINK_ROUTE};
use rtnetlink::{
    MulticastGroup, new_multicast_connection,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags},
        link::{InfoKind, InfoPortKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
    },
};
use tokio::{sync::mpsc, time::Instant};

use crate::programs::{DeviceMask, DeviceProgram};

mod routes;

/// Changes come in bursts (a pod's interface: five messages); they are looked at together.
const SETTLE: Duration = Duration::from_millis(5);

/// An interface, as far as its programs depend on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Whether packets on it begin with an Ethernet header; `None` for layers that carry no IP as such.
    pub has_ethernet_header: Option<bool>,
    /// Whether it is a loopback device.
    pub is_loopback: bool,
    /// Whether it is a bridge, whose ports carry the hooks instead.
    pub is_bridge: bool,
    /// The bridge that it is a port of, by its index.
    pub bridge: Option<u32>,
    /// Whether it is one end of a pair whose other end is in another network namespace.
    pub leads_to_namespace: bool,
    /// Its own addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Those of them that are not for masking while there are others: secondary, temporary or deprecated ones, and single
    /// ones beside a network's, as addresses that move between nodes are.
    pub aside: BTreeSet<IpAddr>,
    /// Those of them that stand for a network, not for themselves alone.
    pub networks: BTreeSet<IpAddr>,
    /// Whether a default route leads out by it, in any routing table.
    pub has_default_route: bool,
}

/// All interfaces by index.
pub type Devices = BTreeMap<u32, Device>;

/// Which interfaces the operator wants hooks on: `--devices` and `--exclude-devices`, patterns with `*`.
#[derive(Clone, Default, Debug)]
pub struct Selection {
    /// Only these, if any are named.
    pub only: Vec<String>,
    /// Never these.
    pub exclude: Vec<String>,
}

/// The program variant of each interface that gets hooks.
pub fn hooked(devices: &Devices, selection: &Selection) -> BTreeMap<u32, (String, DeviceProgram)> {
    devices
        .iter()
        .filter(|(_, device)| !device.is_loopback && !device.is_bridge)
        .filter(|(_, device)| selection.allows(&device.name))
        .filter_map(|(index, device)| {
            let program = DeviceProgram { has_ethernet_header: device.has_ethernet_header? };
            Some((*index, (device.name.clone(), program)))
        })
        .collect()
}

/// Whether pods of this node live behind an interface; behind a bridge, behind one of its ports.
///
/// A pod's interface is a pair that leads into another namespace. So may an uplink, as in kind and other nested clusters.
/// That is known by what it is: neither an interface by which a default route leads out, nor one with an address of the
/// node itself (`node_addresses`, as far as they are known), nor the port of such a bridge, leads to pods. Nor does a pair
/// with an address in a network: what CNIs put on the node's end of a pod's pair is a gateway that stands for itself alone.
/// The bridge of pods has the gateway of their network.
pub fn leads_to_pods(devices: &Devices, index: u32, node_addresses: &BTreeSet<IpAddr>) -> bool {
    let is_uplink =
        |device: &Device| device.has_default_route || !device.addresses.is_disjoint(node_addresses);
    let is_in_network = |device: &Device| device.networks.iter().any(|address| is_reachable(*address));
    let is_pods = |device: &Device| {
        let bridge = device.bridge.and_then(|bridge| devices.get(&bridge));
        device.leads_to_namespace
            && !is_uplink(device)
            && !is_in_network(device)
            && bridge.is_none_or(|bridge| !is_uplink(bridge))
    };
    match devices.get(&index) {
        Some(device) if device.is_bridge => {
            devices.values().any(|port| port.bridge == Some(index) && is_pods(port))
        }
        Some(device) => is_pods(device),
        None => false,
    }
}

/// Addresses on any interface, loopback devices included.
pub fn local_addresses(devices: &Devices) -> BTreeSet<IpAddr> {
    devices.values().flat_map(|device| device.addresses.iter().copied()).collect()
}

/// What programs must know of each interface: who lives behind it, and how clients are masked on it. That is with its address of each family that others can answer to; the node's own
/// (`node_addresses`) if it is one of several. A bridge's port has the bridge's; what has none of a family borrows one of
/// another interface, as routing would.
pub fn masks(
    devices: &Devices,
    bridge_frames: BridgeFrames,
    node_addresses: &BTreeSet<IpAddr>,
) -> BTreeMap<u32, DeviceMask> {
    let rank = |device: &Device, address: IpAddr| {
        (!node_addresses.contains(&address), device.aside.contains(&address), address)
    };
    let usable = |device: &Device, v4: bool| {
        let all = device.addresses.iter().copied();
        all.filter(|address| address.is_ipv4() == v4 && is_reachable(*address))
            .min_by_key(|address| rank(device, *address))
    };
    let any = |v4: bool| {
        let others = devices.values().filter(|device| !device.is_loopback);
        let found = others.filter_map(|device| usable(device, v4));
        // The first where none is the node's.
        found.min_by_key(|address| !node_addresses.contains(address))
    };
    let (any_v4, any_v6) = (any(true), any(false));
    devices
        .iter()
        .filter(|(_, device)| !device.is_loopback)
        .map(|(index, device)| {
            let bridge = device.bridge.and_then(|bridge| devices.get(&bridge));
            let own = |v4| usable(device, v4).or_else(|| usable(bridge?, v4));
            // An uplink can be a bridge's port, too, and alone there.
            let is_beside_pods = bridge.is_some()
                && devices.iter().any(|(other, port)| {
                    other != index && port.bridge == device.bridge && port.leads_to_namespace
                });
            let mask = DeviceMask {
                v4: own(true).or(any_v4),
                v6: own(false).or(any_v6),
                bridged_v4: is_beside_pods && !bridge_frames.filtered_v4,
                bridged_v6: is_beside_pods && !bridge_frames.filtered_v6,
                leads_to_pods: leads_to_pods(devices, *index, node_addresses),
            };
            (*index, mask)
        })
        .collect()
}

/// Whether frames between two ports of a bridge pass netfilter, and with it conntrack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BridgeFrames {
    /// `net.bridge.bridge-nf-call-iptables`.
    pub filtered_v4: bool,
    /// `net.bridge.bridge-nf-call-ip6tables`.
    pub filtered_v6: bool,
}

impl BridgeFrames {
    /// As it is set in this network namespace. Without the module br_netfilter they do not.
    pub fn read() -> Self {
        let is_on = |name: &str| {
            std::fs::read_to_string(format!("/proc/sys/net/bridge/{name}"))
                .is_ok_and(|text| text.trim() != "0")
        };
        Self { filtered_v4: is_on("bridge-nf-call-iptables"), filtered_v6: is_on("bridge-nf-call-ip6tables") }
    }
}

/// Neither loopback nor link-local.
fn is_reachable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}

/// Sends all interfaces now and after every change, until the receiver is gone.
pub async fn watch(sender: mpsc::Sender<Devices>) -> Result<()> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, handle, mut messages) =
        new_multicast_connection(&groups).context("cannot listen for changes of interfaces (rtnetlink)")?;
    tokio::spawn(connection);
    let (routes_sender, mut routes_changed) = mpsc::channel(1);
    tokio::spawn(routes::watch(routes_sender));
    let mut default_routes = routes::default_routes(&handle).await?;
    let mut known: Option<Devices> = None;
    loop {
        let mut now = list(&handle).await?;
        for (index, device) in &mut now {
            device.has_default_route = default_routes.contains(index);
        }
        if known.as_ref() != Some(&now) {
            if sender.send(now.clone()).await.is_err() {
                return Ok(());
            }
            known = Some(now);
        }
        let mut are_routes_stale = false;
        let mut next = tokio::select! {
            message = messages.next() => message.context("the kernel closed the rtnetlink socket")?.into(),
            _ = routes_changed.recv() => {
                are_routes_stale = true;
                None
            }
        };
        let settled = Instant::now() + SETTLE;
        loop {
            // A route goes without a word with the interface or the address that it depends on.
            are_routes_stale |= next.is_some_and(|(message, _)| {
                routes::interface_of(&message).is_some_and(|index| default_routes.contains(&index))
            });
            match tokio::time::timeout_at(settled, messages.next()).await {
                Ok(Some(message)) => next = Some(message),
                Ok(None) | Err(_) => break,
            }
        }
        if are_routes_stale {
            default_routes = routes::default_routes(&handle).await?;
        }
    }
}

/// Says so whenever filters or qdiscs of any interface have changed (RTNLGRP_TC). Links of TCX are not told of.
pub fn watch_filters() -> Result<mpsc::Receiver<()>> {
    /// Others change many at once: they are looked at together.
    const SETTLE: Duration = Duration::from_millis(100);
    let mut socket = netlink_sys::TokioSocket::new(NETLINK_ROUTE)?;
    socket.socket_mut().bind_auto()?;
    socket.socket_mut().add_membership(RTNLGRP_TC)?;
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            // What has changed is looked for anyway; where messages were lost, too.
            if socket.recv_from_full().await.is_err_and(|error| error.raw_os_error() != Some(libc::ENOBUFS)) {
                // The regular look goes on.
                return;
            }
            let settled = Instant::now() + SETTLE;
            while tokio::time::timeout_at(settled, socket.recv_from_full()).await.is_ok() {}
            if sender.send(()).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// From `linux/rtnetlink.h`.
const RTNLGRP_TC: u32 = 4;

/// All interfaces as they are now, for a command that does nothing else meanwhile.
pub fn list_now() -> Result<Devices> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("cannot list the interfaces (rtnetlink)")?;
        tokio::spawn(connection);
        list(&handle).await
    })
}

/// All interfaces as they are now.
pub async fn list(handle: &rtnetlink::Handle) -> Result<Devices> {
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .context("cannot list the interfaces (rtnetlink)")?;
    let mut devices: Devices = links.iter().map(|link| (link.header.index, device(link))).collect();
    let mut addresses = handle.address().get().execute();
    while let Some(message) =
        addresses.try_next().await.context("cannot list the interfaces' addresses (rtnetlink)")?
    {
        let Some(device) = devices.get_mut(&message.header.index) else {
            continue;
        };
        // On a point-to-point link "Address" is the peer's, and "Local" ours.
        let local = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
        let address = local.or_else(|| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            })
        });
        device.addresses.extend(address);
        let bits = if address.is_some_and(|address| address.is_ipv4()) { 32 } else { 128 };
        if message.header.prefix_len < bits {
            device.networks.extend(address);
        }
        let later =
            AddressHeaderFlags::Secondary | AddressHeaderFlags::Deprecated | AddressHeaderFlags::Tentative;
        if message.header.flags.intersects(later) || message.header.prefix_len == bits {
            device.aside.extend(address);
        }
    }
    Ok(devices)
}

fn device(link: &LinkMessage) -> Device {
    let mut name = String::new();
    let (mut is_bridge, mut is_veth, mut has_peer_namespace) = (false, false, false);
    let (mut controller, mut is_port) = (None, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name.clone_from(text),
            LinkAttribute::LinkNetNsId(_) => has_peer_namespace = true,
            LinkAttribute::Controller(index) => controller = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(InfoKind::Bridge) => is_bridge = true,
                        LinkInfo::PortKind(InfoPortKind::Bridge) => is_port = true,
                        LinkInfo::Kind(InfoKind::Veth | InfoKind::Netkit) => is_veth = true,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Device {
        name,
        has_ethernet_header: match link.header.link_layer_type {
            LinkLayerType::Ether => Some(true),
            LinkLayerType::None
            | LinkLayerType::Ppp
            | LinkLayerType::Rawip
            | LinkLayerType::Tunnel
            | LinkLayerType::Tunnel6
            | LinkLayerType::Sit
            | LinkLayerType::Ipgre => Some(false),
            _ => None,
        },
        is_loopback: link.header.flags.contains(LinkFlags::Loopback),
        is_bridge,
        bridge: controller.filter(|_| is_port),
        leads_to_namespace: is_veth && has_peer_namespace,
        addresses: BTreeSet::new(),
        aside: BTreeSet::new(),
        networks: BTreeSet::new(),
        has_default_route: false,
    }
}

impl Selection {
    fn allows(&self, name: &str) -> bool {
        let among = |patterns: &[String]| patterns.iter().any(|pattern| matches(pattern, name));
        (self.only.is_empty() || among(&self.only)) && !among(&self.exclude)
    }
}

/// Whether `name` fits `pattern`, in which `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn veth(name: &str, addresses: &[&str]) -> Device {
        Device {
            name: name.to_owned(),
            has_ethernet_header: Some(true),
            is_loopback: false,
            is_bridge: false,
            bridge: None,
            leads_to_namespace: true,
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            aside: BTreeSet::new(),
            networks: BTreeSet::new(),
            has_default_route: false,
        }
    }

    #[test]
    fn pods_strangers_and_what_gets_no_hooks() {
        let devices: Devices = [
            (1, Device { is_loopback: true, ..veth("lo", &["127.0.0.1"]) }),
            (2, veth("uplink", &["192.0.2.11", "fe80::1"])),
            (3, veth("cali1", &["169.254.1.1"])),
            (4, Device { is_bridge: true, ..veth("cni0", &["10.244.1.1"]) }),
            (5, Device { leads_to_namespace: false, ..veth("vxlan0", &[]) }),
            (6, Device { has_ethernet_header: Some(false), leads_to_namespace: false, ..veth("wg0", &[]) }),
            (7, Device { has_ethernet_header: None, ..veth("can0", &[]) }),
            // The uplink of a node within another one, on a bridge with the node's address.
            (8, Device { is_bridge: true, ..veth("br0", &["192.0.2.12"]) }),
            (9, Device { bridge: Some(8), ..veth("nested", &[]) }),
        ]
        .into();
        let hooked = hooked(&devices, &Selection::default());
        let table: Vec<_> = hooked.values().map(|(name, p)| (name.as_str(), p.has_ethernet_header)).collect();
        let expected =
            [("uplink", true), ("cali1", true), ("vxlan0", true), ("wg0", false), ("nested", true)];
        assert_eq!(table, expected);
        let node = ["192.0.2.11", "192.0.2.12"].map(|text| text.parse().unwrap()).into();
        let pods: Vec<_> = hooked.keys().filter(|index| leads_to_pods(&devices, **index, &node)).collect();
        assert_eq!(pods, [&3]);
    }

    /// Where nobody says which addresses are the node's.
    #[test]
    fn an_uplink_is_known_by_what_it_is() {
        let with_network = |name: &str, address: &str| Device {
            networks: [address.parse().unwrap()].into(),
            ..veth(name, &[address])
        };
        let bridge = |name: &str, address: &str| Device { is_bridge: true, ..with_network(name, address) };
        let port = |name: &str, bridge: u32| Device { bridge: Some(bridge), ..veth(name, &[]) };
        let devices: Devices = [
            // kind's, and one in another of Docker's networks.
            (1, Device { has_default_route: true, ..with_network("eth0", "172.18.0.2") }),
            (2, with_network("eth1", "172.19.0.2")),
            // A node that is a pod of another cluster's routed CNI.
            (3, Device { has_default_route: true, ..veth("eth2", &["10.42.0.7"]) }),
            // Pods by a CNI without addresses, and by one with a gateway on each pair.
            (4, Device { networks: ["fe80::1".parse().unwrap()].into(), ..veth("cali1", &["fe80::1"]) }),
            (5, veth("veth1", &["10.244.1.1"])),
            // Pods on a bridge, and an uplink that is a bridge's port.
            (6, bridge("cni0", "10.244.2.1")),
            (7, port("veth2", 6)),
            (8, Device { has_default_route: true, ..bridge("br0", "192.0.2.12") }),
            (9, port("nested", 8)),
            (10, Device { leads_to_namespace: false, ..port("vxlan1", 6) }),
        ]
        .into();
        let pods: Vec<_> =
            devices.keys().filter(|index| leads_to_pods(&devices, **index, &BTreeSet::new())).collect();
        assert_eq!(pods, [&4, &5, &6, &7]);
    }

    #[test]
    fn a_port_masks_with_its_bridges_address() {
        let devices: Devices = [
            (1, Device { is_loopback: true, ..veth("lo", &["127.0.0.1"]) }),
            (2, veth("uplink", &["192.0.2.11", "2001:db8::11"])),
            (3, veth("cali1", &["fe80::1"])),
            (4, Device { is_bridge: true, ..veth("cni0", &["10.244.1.1"]) }),
            (5, Device { bridge: Some(4), ..veth("v1", &[]) }),
            (6, Device { bridge: Some(4), ..veth("v2", &[]) }),
            // A bridge without a pod, for the uplink alone.
            (7, Device { is_bridge: true, ..veth("br0", &["192.0.2.12"]) }),
            (8, Device { leads_to_namespace: false, bridge: Some(7), ..veth("eth1", &[]) }),
        ]
        .into();
        let frames = BridgeFrames { filtered_v4: false, filtered_v6: true };
        let masks = masks(&devices, frames, &BTreeSet::new());
        let text = |address: Option<IpAddr>| address.map(|address| address.to_string());
        let table: Vec<_> = masks
            .iter()
            .map(|(index, mask)| (*index, text(mask.v4), text(mask.v6), mask.bridged_v4, mask.bridged_v6))
            .collect();
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(
            table,
            [
                (2, some("192.0.2.11"), some("2001:db8::11"), false, false),
                (3, some("192.0.2.11"), some("2001:db8::11"), false, false),
                (4, some("10.244.1.1"), some("2001:db8::11"), false, false),
                (5, some("10.244.1.1"), some("2001:db8::11"), true, false),
                (6, some("10.244.1.1"), some("2001:db8::11"), true, false),
                (7, some("192.0.2.12"), some("2001:db8::11"), false, false),
                (8, some("192.0.2.12"), some("2001:db8::11"), false, false),
            ]
        );
    }

    #[test]
    fn an_address_that_moves_between_nodes_is_no_mask() {
        let set = |addresses: &[&str]| -> BTreeSet<IpAddr> {
            addresses.iter().map(|text| text.parse().unwrap()).collect()
        };
        let uplink = |aside: &[&str]| {
            let addresses = &["192.0.2.5", "192.0.2.11", "192.0.2.12", "2001:db8::5", "2001:db8::11"];
            Device { aside: set(aside), ..veth("eth0", addresses) }
        };
        let of = |device: Device, node: &[&str]| {
            let frames = BridgeFrames { filtered_v4: true, filtered_v6: true };
            // One that has none borrows.
            let devices: Devices = [(1, veth("cali1", &["fe80::1"])), (2, device)].into();
            let masks = masks(&devices, frames, &set(node));
            assert_eq!((masks[&1].v4, masks[&1].v6), (masks[&2].v4, masks[&2].v6));
            [masks[&2].v4, masks[&2].v6].map(|address| address.unwrap().to_string())
        };
        let aside = ["192.0.2.5", "2001:db8::5"];
        assert_eq!(of(uplink(&[]), &["192.0.2.12", "2001:db8::11"]), ["192.0.2.12", "2001:db8::11"]);
        assert_eq!(of(uplink(&aside), &[]), ["192.0.2.11", "2001:db8::11"]);
        assert_eq!(of(Device { aside: set(&aside), ..veth("vxlan0", &aside) }, &[]), aside);
    }

    #[test]
    fn patterns() {
        for (pattern, name, fits) in [
            ("eth0", "eth0", true),
            ("eth0", "eth01", false),
            ("eth*", "eth01", true),
            ("*", "anything", true),
            ("c*i*0", "cali1230", true),
            ("c*i*0", "cali123", false),
            ("*0", "eth0", true),
            ("a*a", "a", false),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
        let selection = Selection { only: vec!["eth*".into()], exclude: vec!["eth1".into()] };
        assert!(selection.allows("eth0") && !selection.allows("eth1") && !selection.allows("wlan0"));
    }
}
