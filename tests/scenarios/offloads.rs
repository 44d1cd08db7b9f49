//! Large packets and checksums, with the interfaces doing their part of the work and without.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Context, Family, Lab, UPLINK, VXLAN, veth_name};

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET};
use crate::objects::Service;
use crate::shapes::{FAR_NODE_PORT, NODE_PORT, Shape, near_and_far};

pub const SCENARIOS: &[Scenario] = &[("kproxy::offloads_change_nothing", offloads)];

/// Each way; both ends look at each octet.
const LENGTH: u64 = 5_000_000;

/// More than any link here takes: what is longer is a packet that is still to be cut.
const LARGE: &str = "tcp and greater 3000";

fn offloads(ctx: &Context) -> Result<()> {
    Shape::each(ctx, |shape, steps| in_shape(ctx, shape, steps))
}

fn in_shape(ctx: &Context, shape: Shape, steps: &mut Steps) -> Result<()> {
    let lab = shape.lab(ctx)?;
    let [near, far] = near_and_far(&lab, |service| service.tcp(80, TARGET).udp(80, TARGET))?;
    let cluster = Cluster::start(lab, &["node-a"], &[], [&near, &far])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let lab = &cluster.lab;
    let node = lab.node("node-a")?;
    let outside = Client::at(lab.host("client")?)?;
    let unseen = Client::at(&lab.pod("a1")?.unseen())?;
    for on in [true, false] {
        switch(lab, shape, on)?;
        let mut large = node.capture("any", LARGE)?;
        for family in Family::BOTH {
            let node_port = |port| SocketAddr::new(node.ip(family), port);
            let cluster_ip = |service: &Service| SocketAddr::new(service.cluster_ip(family), 80);
            for (client, to) in [
                (&outside, node_port(NODE_PORT)),
                (&outside, node_port(FAR_NODE_PORT)),
                (&unseen, cluster_ip(&near)),
                (&unseen, cluster_ip(&far)),
            ] {
                steps.step(&format!("{shape:?}, offloads {on}, {} to {to}", client.name), || {
                    let worker = &client.worker;
                    let socket = worker.tcp_connect(to)?;
                    worker.tcp_transfer(socket.id, LENGTH, LENGTH).context("5 MB up and down")?;
                    worker.close(socket.id)?;
                    worker.ask_udp(to)?;
                    Ok(())
                });
            }
        }
        steps.step(&format!("{shape:?}: large packets, if the interfaces cut them: {on}"), || {
            let count = large.stop()?;
            ensure!((count > 0) == on, "{count} large packets");
            Ok(())
        });
    }
    steps.step(&format!("{shape:?}: no checksum was wrong"), || {
        for member in lab.members() {
            for (counter, count) in
                checksum_errors(&member.run(&["cat", COUNTERS[0], COUNTERS[1]])?.success()?)?
            {
                ensure!(count == 0, "{}: {counter} {count}", member.name());
            }
        }
        Ok(())
    });
    Ok(())
}

/// Of all interfaces that the packets pass, apart from the wire between the machines; a bridge does what its ports do.
fn switch(lab: &Lab, shape: Shape, on: bool) -> Result<()> {
    lab.host("client")?.set_offloads(UPLINK, on)?;
    for pod in lab.pods() {
        pod.set_offloads(UPLINK, on)?;
        lab.node(pod.node_name())?.set_offloads(&veth_name(pod.name()), on)?;
    }
    for node in lab.nodes() {
        node.set_offloads(UPLINK, on)?;
        if shape == Shape::Vxlan {
            node.set_offloads(VXLAN, on)?;
        }
    }
    Ok(())
}

const COUNTERS: [&str; 2] = ["/proc/net/snmp", "/proc/net/snmp6"];

/// What the kernel counted of wrong checksums: in IPv4's file names stand in one line, numbers in the next.
fn checksum_errors(text: &str) -> Result<Vec<(String, u64)>> {
    let mut found = Vec::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let Some(numbers) = lines.peek().filter(|next| next.split(' ').next() == words.first().copied()) {
            let named = words.iter().zip(numbers.split_whitespace());
            for (name, number) in named.filter(|(name, _)| name.ends_with("CsumErrors")) {
                found.push((format!("{}{name}", words[0]), number.parse()?));
            }
            lines.next();
        } else if let [name, number] = words[..]
            && name.ends_with("CsumErrors")
        {
            found.push((name.to_owned(), number.parse()?));
        }
    }
    // TCP's, UDP's and ICMP's of IPv4, UDP's and ICMP's of IPv6 at least.
    ensure!(found.len() >= 5, "only {found:?} in {text}");
    Ok(found)
}
