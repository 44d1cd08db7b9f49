//! Frames with VLAN tags. This kernel has no VLAN devices: a frame is sent as a trunk would bring it, and a bridge carries
//! it on.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail, ensure};
use etherparse::PacketBuilder;
use kproxy_common::Reason;
use kproxy_lab::{Cni, Context, Family, NodeSpec, POD_BRIDGE, UPLINK};

use crate::Scenario;
use crate::cluster::{Cluster, DEADLINE, Steps, TARGET};
use crate::objects::Service;
use crate::shapes::counted;

pub const SCENARIOS: &[Scenario] = &[("kproxy::tagged_frames_are_left_alone", tagged)];

const NODE_PORT: u16 = 30_080;

/// Types and tags as they follow the addresses: of one VLAN, and of one within another's.
const TAGS: [(&str, &[u8]); 2] =
    [("802.1Q", &[0x81, 0, 0x60, 5]), ("802.1ad", &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6])];

/// A priority, and no VLAN.
const PRIORITY: &[u8] = &[0x81, 0, 0xe0, 0];

fn tagged(ctx: &Context) -> Result<()> {
    let lab =
        ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).cni(Cni::Bridge)).client("client"))?;
    let web = Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(NODE_PORT);
    let web = web.pods(&[lab.pod("a2")?]);
    let cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    let _servers = cluster.servers(&["a2"])?;
    let lab = &cluster.lab;
    let (node, a1, a2, client) = (lab.node("node-a")?, lab.pod("a1")?, lab.pod("a2")?, lab.host("client")?);
    let (from_pod, from_outside) = (a1.wire(UPLINK)?, client.wire(UPLINK)?);
    let mut steps = Steps::new();
    for family in Family::BOTH {
        let service = SocketAddr::new(web.cluster_ip(family), 80);
        let source = SocketAddr::new(a1.ip(family), 40_000);
        let ends = [a1.mac(UPLINK)?, a2.mac(UPLINK)?];
        for (what, tags) in TAGS {
            for tcp in [false, true] {
                steps.step(&format!("{what}, {family:?}, TCP {tcp}"), || {
                    let sent = with_tags(&frame(ends, source, service, tcp)?, tags);
                    let before = counted(node, Reason::VlanTagged)?;
                    let mut arriving = a2.capture(UPLINK, "vlan")?;
                    from_pod.send(&sent)?;
                    arriving.wait_count(1, DEADLINE)?;
                    arriving.stop()?;
                    let arrived = arriving.frames()?;
                    ensure!(arrived == [sent.clone()], "{sent:02x?} was sent, {arrived:02x?} arrived");
                    // Where it came in, and where it went out.
                    let after = counted(node, Reason::VlanTagged)?;
                    ensure!(after == before + 2, "counted {} times", after - before);
                    Ok(())
                });
            }
        }
        // Without a tag, or with one that names no VLAN, the same is served.
        let host = [a1.mac(UPLINK)?, node.mac(POD_BRIDGE)?];
        let uplink = [client.mac(UPLINK)?, node.mac(UPLINK)?];
        let outside = SocketAddr::new(client.ip(family), 40_001);
        let node_port = SocketAddr::new(node.ip(family), NODE_PORT);
        for (what, wire, ends, source, to) in [
            ("from a pod", &from_pod, host, source, service),
            ("from outside", &from_outside, uplink, outside, node_port),
        ] {
            for tags in [&[], PRIORITY] {
                steps.step(&format!("{what}, {family:?}, with {tags:02x?}: served"), || {
                    let filter = format!("udp and src port {}", source.port());
                    let mut arriving = a2.capture(UPLINK, &filter)?;
                    let before = counted(node, Reason::VlanTagged)?;
                    wire.send(&with_tags(&frame(ends, source, to, false)?, tags))?;
                    arriving.wait_count(1, DEADLINE)?;
                    arriving.stop()?;
                    ensure!(counted(node, Reason::VlanTagged)? == before, "counted as tagged");
                    Ok(())
                });
            }
        }
    }
    steps.done()
}

/// A datagram or a SYN, whole.
fn frame(
    [from, to]: [[u8; 6]; 2],
    source: SocketAddr,
    destination: SocketAddr,
    tcp: bool,
) -> Result<Vec<u8>> {
    let builder = PacketBuilder::ethernet2(from, to);
    let builder = match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => builder.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), 64),
        _ => bail!("two families"),
    };
    let mut frame = Vec::new();
    if tcp {
        builder.tcp(source.port(), destination.port(), 1, 64_240).syn().write(&mut frame, &[])?;
    } else {
        builder.udp(source.port(), destination.port()).write(&mut frame, b"tagged")?;
    }
    Ok(frame)
}

/// The frame with these tags behind its addresses.
fn with_tags(frame: &[u8], tags: &[u8]) -> Vec<u8> {
    let (addresses, rest) = frame.split_at(12);
    [addresses, tags, rest].concat()
}
