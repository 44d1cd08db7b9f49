//! What no socket hook can see at all: SCTP, and packets of raw sockets.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use crc::{CRC_32_ISCSI, Crc};
use kproxy_common::Reason;
use kproxy_lab::{Context, Family, Member, UPLINK, errno_of};
use nix::errno::Errno;

use crate::Scenario;
use crate::cluster::{Cluster, DEADLINE, Steps, TARGET, eventually};
use crate::objects::{Service, cluster_ip};
use crate::shapes::{FAR_NODE_PORT, NODE_PORT, Shape, counted, near_and_far};

pub const SCENARIOS: &[Scenario] =
    &[("kproxy::sctp_is_translated", sctp), ("kproxy::raw_packets_of_the_host_stay_here", of_the_host)];

const MASK_PORTS_FIRST: u16 = 61_000;
const SERVICE_CIDRS: [&str; 2] = ["--service-cidr", "10.96.0.0/16,fd00:10:96::/112"];

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

/// This kernel has no sockets of SCTP: an INIT is sent, looked at where it arrives, and refused there, since the pod's
/// kernel does not know the protocol. The refusal comes back in the Service's name.
fn sctp(ctx: &Context) -> Result<()> {
    Shape::each(ctx, |shape, steps| {
        let lab = shape.lab(ctx)?;
        let [near, far] = near_and_far(&lab, |service| service.sctp(80, TARGET))?;
        let cluster = Cluster::start(lab, &["node-a"], &[], [&near, &far])?;
        let lab = &cluster.lab;
        let (node, outside, pod) = (lab.node("node-a")?, lab.host("client")?, lab.pod("a1")?.unseen());
        for family in Family::BOTH {
            let node_port = |port| SocketAddr::new(node.ip(family), port);
            let service = |number| SocketAddr::new(cluster_ip(number, family), 80);
            let bridged = shape == Shape::BridgeUnfiltered;
            for (who, from, to, backend, masked) in [
                ("client", outside, node_port(NODE_PORT), "a2", false),
                ("client", outside, node_port(FAR_NODE_PORT), "b1", true),
                ("unseen pod", &pod, service(10), "a2", bridged),
                ("unseen pod", &pod, service(11), "b1", false),
            ] {
                steps.step(&format!("{shape:?}, {who} to {to}"), || {
                    associate(from, to, lab.pod(backend)?, masked)
                });
            }
        }
        Ok(())
    })
}

fn associate(from: &Member, to: SocketAddr, backend: &Member, masked: bool) -> Result<()> {
    let port = 40_000;
    let protocol = if to.is_ipv4() { "ip proto 132" } else { "ip6 proto 132" };
    let mut arriving = backend.capture(UPLINK, protocol)?;
    // Unreachable, or in IPv6 a parameter problem: no such protocol.
    let refusal = if to.is_ipv4() { "icmp[icmptype] == 3" } else { "icmp6 and ip6[40] == 4" };
    let mut refused = from.capture(UPLINK, &format!("{refusal} and src host {}", to.ip()))?;
    from.send_raw(to.ip(), SCTP, &init(port, to.port()))?;
    arriving.wait_count(1, DEADLINE)?;
    refused.wait_count(1, DEADLINE).context("no refusal in the Service's name")?;
    arriving.stop()?;
    refused.stop()?;
    let frames = arriving.frames()?;
    let packet = frames.first().and_then(|frame| frame.get(14..)).context("an empty frame")?;
    let (source, payload): (IpAddr, &[u8]) = if to.is_ipv4() {
        (<[u8; 4]>::try_from(&packet[12..16])?.into(), &packet[20..])
    } else {
        (<[u8; 16]>::try_from(&packet[8..24])?.into(), &packet[40..])
    };
    let number = |at: usize| u16::from_be_bytes([payload[at], payload[at + 1]]);
    ensure!(number(2) == TARGET, "sent to port {}", number(2));
    let is_masked = source != from.ip(if to.is_ipv4() { Family::V4 } else { Family::V6 });
    ensure!(is_masked == masked, "seen as {source}");
    ensure!(
        if masked { number(0) >= MASK_PORTS_FIRST } else { number(0) == port },
        "from port {}",
        number(0)
    );
    let mut blank = payload.to_vec();
    blank[8..12].fill(0);
    ensure!(checksum(&blank) == payload[8..12], "the checksum is wrong: {payload:02x?}");
    Ok(())
}

/// An INIT (RFC 9260, 3.3.2) with its checksum.
fn init(from: u16, to: u16) -> Vec<u8> {
    let mut packet = Vec::new();
    for part in [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0; 8]] {
        packet.extend(part);
    }
    // The chunk: its type, length, tag, window, streams each way, first number.
    packet.extend([1, 0, 0, 20, 0, 0, 0, 7, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 9]);
    let sum = checksum(&packet);
    packet[8..12].copy_from_slice(&sum);
    packet
}

/// CRC32c, as it stands in a packet.
fn checksum(packet: &[u8]) -> [u8; 4] {
    Crc::<u32>::new(&CRC_32_ISCSI).checksum(packet).to_le_bytes()
}

/// Addressed into a ServiceCIDR it would leave by the default route, to whoever has that address there.
fn of_the_host(ctx: &Context) -> Result<()> {
    let lab = Shape::Routed.lab(ctx)?;
    let web = Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).sctp(80, TARGET);
    let web = web.pods(&[lab.pod("a2")?]);
    let cluster = Cluster::start(lab, &["node-a"], &SERVICE_CIDRS, [&web])?;
    let lab = &cluster.lab;
    let node = lab.node("node-a")?;
    let mut steps = Steps::new();
    for family in Family::BOTH {
        for (protocol, packet) in [(TCP, syn()), (UDP, datagram()), (SCTP, init(40_000, 80))] {
            for (what, to, reason) in [
                ("a Service", web.cluster_ip(family), Reason::Unserved),
                ("nobody's address", cluster_ip(99, family), Reason::UnallocatedAddress),
            ] {
                steps.step(&format!("{family:?}, protocol {protocol}, to {what}"), || {
                    let before = counted(node, reason)?;
                    match node.send_raw(to, protocol, &packet) {
                        // So IPv6 says that an interface has dropped it.
                        Err(error) if errno_of(&error) == Some(Errno::ENOBUFS) => {}
                        other => other?,
                    }
                    eventually("it to be dropped", || {
                        Ok((counted(node, reason)? == before + 1).then_some(()))
                    })?;
                    ensure!(lab.strays_to(to)? == 0, "it was let out");
                    Ok(())
                });
            }
        }
    }
    steps.done()
}

/// To port 80. The checksum is for the receiver to look at.
fn syn() -> Vec<u8> {
    let mut packet = vec![0; 20];
    packet[..4].copy_from_slice(&[0x9c, 0x40, 0, 80]);
    packet[12..14].copy_from_slice(&[5 << 4, 2]);
    packet
}

fn datagram() -> Vec<u8> {
    vec![0x9c, 0x40, 0, 80, 0, 8, 0, 0]
}
