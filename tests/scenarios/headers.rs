//! IPv4 options and IPv6 extension headers, sent by a host: they go along, and what is behind them is translated.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};
use etherparse::{
    IpHeaders, IpNumber, Ipv4Header, Ipv6Extensions, Ipv6Header, Ipv6RawExtHeader, NetHeaders, PacketBuilder,
    PacketHeaders, TransportHeader,
};
use kproxy_lab::{Context, Family, NodeSpec, UPLINK};

use crate::Scenario;
use crate::cluster::{Cluster, DEADLINE, Steps, TARGET};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[("kproxy::options_go_along", options)];

const NODE_PORT: u16 = 30_080;
const FAR_NODE_PORT: u16 = 30_081;

/// No operation, three times, and the end.
const OPTIONS: [u8; 4] = [1, 1, 1, 0];
/// Destination options: padding of six octets.
const PADDING: [u8; 6] = [1, 4, 0, 0, 0, 0];

const TEXT: &[u8] = b"with more than is usual";

fn options(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]))
            .client("client")
    })?;
    let service = |name, number, port, pod: &str| {
        let service = Service::new(name, number).udp(80, TARGET).node_port(port);
        Ok::<_, anyhow::Error>(service.pods(&[lab.pod(pod)?]))
    };
    let near = service("near", 10, NODE_PORT, "a1")?;
    let far = service("far", 11, FAR_NODE_PORT, "b1")?;
    let cluster = Cluster::start(lab, &["node-a"], &[], [&near, &far])?;
    let _servers = cluster.servers(&["a1", "b1"])?;
    let lab = &cluster.lab;
    let (node, client) = (lab.node("node-a")?, lab.host("client")?);
    let wire = client.wire(UPLINK)?;
    let mut steps = Steps::new();
    for family in Family::BOTH {
        for (backend, port) in [("a1", NODE_PORT), ("b1", FAR_NODE_PORT)] {
            steps.step(&format!("to {backend}, {family:?}"), || {
                let from = SocketAddr::new(client.ip(family), 40_000);
                let to = SocketAddr::new(node.ip(family), port);
                let pod = lab.pod(backend)?;
                let mut arriving = pod.capture(
                    UPLINK,
                    &format!("dst host {} and not (icmp or icmp6 or arp)", pod.ip(family)),
                )?;
                let answered = client.capture(UPLINK, &format!("udp and src host {}", to.ip()))?;
                wire.send(&datagram([client.mac(UPLINK)?, node.mac(UPLINK)?], from, to)?)?;
                arriving.wait_count(1, DEADLINE)?;
                answered.wait_count(1, DEADLINE).context("no answer of the Service")?;
                arriving.stop()?;
                let frames = arriving.frames()?;
                let [frame] = &frames[..] else { bail!("{} frames arrived", frames.len()) };
                check(frame, SocketAddr::new(pod.ip(family), TARGET))
            });
        }
    }
    steps.done()
}

fn datagram([from_mac, to_mac]: [[u8; 6]; 2], from: SocketAddr, to: SocketAddr) -> Result<Vec<u8>> {
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = Ipv4Header::new(0, 64, IpNumber::UDP, from.octets(), to.octets())?;
            header.options = OPTIONS.into();
            IpHeaders::Ipv4(header, Default::default())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let header = Ipv6Header {
                hop_limit: 64,
                source: from.octets(),
                destination: to.octets(),
                ..Ipv6Header::default()
            };
            let padding = Ipv6RawExtHeader::new_raw(IpNumber::UDP, &PADDING)?;
            IpHeaders::Ipv6(
                header,
                Ipv6Extensions { destination_options: Some(padding), ..Default::default() },
            )
        }
        _ => bail!("two families"),
    };
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(from_mac, to_mac).ip(ip).udp(from.port(), to.port());
    builder.write(&mut frame, TEXT)?;
    Ok(frame)
}

/// What arrived is for this address, has what it was sent with, and its checksum is right.
fn check(frame: &[u8], to: SocketAddr) -> Result<()> {
    let packet = PacketHeaders::from_ethernet_slice(frame)?;
    let Some(TransportHeader::Udp(udp)) = &packet.transport else { bail!("no datagram: {packet:?}") };
    let payload = packet.payload.slice();
    let (destination, kept, checksum): (IpAddr, bool, u16) = match &packet.net {
        Some(NetHeaders::Ipv4(header, _)) => {
            let sum = udp.calc_checksum_ipv4(header, payload)?;
            ensure!(header.header_checksum == header.calc_header_checksum(), "IPv4's checksum is wrong");
            (header.destination.into(), header.options.as_slice() == OPTIONS, sum)
        }
        Some(NetHeaders::Ipv6(header, extensions)) => {
            let options = extensions.destination_options.as_ref();
            let kept = options.is_some_and(|options| options.payload() == PADDING);
            (header.destination.into(), kept, udp.calc_checksum_ipv6(header, payload)?)
        }
        other => bail!("no IP: {other:?}"),
    };
    ensure!((destination, udp.destination_port) == (to.ip(), to.port()), "for {destination}: {udp:?}");
    ensure!(kept, "without its options: {packet:?}");
    ensure!(payload == TEXT && udp.checksum == checksum, "{udp:?}, {checksum:#x} would be right");
    Ok(())
}
