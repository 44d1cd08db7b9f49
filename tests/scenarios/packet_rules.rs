//! The rules of Services, on packets: for clients outside and in pods that no socket hook sees, however pods are wired.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use kproxy_common::Reason;
use kproxy_lab::{Context, Family, Lab, Member, Node, UPLINK, Worker};

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, ask_from, family_of};
use crate::objects::{Service, cluster_ip};
use crate::packets::ping;
use crate::shapes::{Shape, counted};

pub const SCENARIOS: &[Scenario] = &[("kproxy::rules_bind_packets", rules)];

/// Each Service has the NodePort with its number.
const NODE_PORTS: u16 = 30_000;

const SERVICE_CIDRS: [&str; 2] = ["--service-cidr", "10.96.0.0/16,fd00:10:96::/112"];

/// Addresses of one machine outside. That all of them are sent to the same one of two backends is a matter of chance once
/// in 2^15 runs.
const CLIENTS: u8 = 16;

fn rules(ctx: &Context) -> Result<()> {
    Shape::each(ctx, |shape, steps| in_shape(ctx, shape, steps))
}

fn in_shape(ctx: &Context, shape: Shape, steps: &mut Steps) -> Result<()> {
    let lab = shape.lab(ctx)?;
    let service = |name: &str, number: u8, pods: &[&str]| {
        let port = u16::from(number);
        let service = Service::new(name, number).tcp(port, TARGET).udp(port, TARGET);
        let service = service.node_port(NODE_PORTS + port).load_balancers(lab.elb()?.vips());
        let pods = pods.iter().map(|pod| lab.pod(pod)).collect::<Result<Vec<_>>>()?;
        Ok::<_, anyhow::Error>(service.pods(&pods))
    };
    let ranged = |name, number, ranges: [String; 2]| {
        Ok::<_, anyhow::Error>(
            ranges.iter().fold(service(name, number, &["a2"])?, |service, range| service.source_range(range)),
        )
    };
    let client = lab.host("client")?;
    let sticky = service("sticky", 80, &["a2", "b1"])?.affinity();
    let for_client =
        ranged("for-client", 81, [format!("{}/32", client.v4()), format!("{}/128", client.v6())])?;
    let for_pods = ranged("for-pods", 82, ["10.244.0.0/16".to_owned(), "fd00:10:244::/48".to_owned()])?;
    let local_there = service("local-there", 83, &["b1"])?.local().internal_local();
    let empty = service("empty", 84, &[])?;
    let passed = service("passed", 85, &["a2"])?.annotation("kproxy.io/pass-through", "true");
    let services = [&sticky, &for_client, &for_pods, &local_there, &empty, &passed];
    let cluster = Cluster::start(lab, &["node-a"], &SERVICE_CIDRS, services)?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let lab = &cluster.lab;
    let _beyond = lab.elb()?.echo(85)?;
    let node = lab.node("node-a")?;
    let pod = lab.pod("a1")?.unseen();
    let outside = [Client::at(lab.host("client")?)?, Client::at(lab.host("stranger")?)?];
    let [client, stranger] = &outside;
    let unseen = Client::at(&pod)?;

    for family in Family::BOTH {
        let balancer = vip(lab, family)?;
        let at_balancer = |number: u16| SocketAddr::new(balancer, number);
        let at_node = |number: u16| SocketAddr::new(node.ip(family), NODE_PORTS + number);
        let at_cluster_ip = |service: &Service, number| SocketAddr::new(service.cluster_ip(family), number);
        have_addresses(lab.host("client")?, family)?;
        for transport in [Transport::Tcp, Transport::UdpUnconnected] {
            let of = |what: &str| format!("{shape:?}, {family:?}, {transport:?}: {what}");
            let addresses = [at_node(80), at_balancer(80)];
            steps.step(&of("affinity of clients outside"), || {
                affine_outside(&client.worker, transport, addresses)
            });
            steps.step(&of("affinity of a pod"), || {
                let all = [at_cluster_ip(&sticky, 80), at_node(80), at_balancer(80)];
                let servers = servers(&unseen.worker, transport, all.into_iter().cycle().take(12), None)?;
                ensure!(servers.len() == 1, "{servers:?}");
                Ok(())
            });
            for (who, asker, number, expected) in [
                ("one in its range", client, 81, Ok("a2")),
                ("one in none", stranger, 81, Err(Reason::SourceRange)),
                ("a pod in none", &unseen, 81, Err(Reason::SourceRange)),
                ("a pod in its range", &unseen, 82, Ok("a2")),
                ("one in none of pods", client, 82, Err(Reason::SourceRange)),
                ("policy Local without a backend here, outside", client, 83, Err(Reason::NoLocalEndpoints)),
                ("policy Local without a backend here, a pod", &unseen, 83, Ok("b1")),
                ("pass-through, outside", client, 85, Ok("elb")),
                ("pass-through, a pod", &unseen, 85, Ok("elb")),
            ] {
                // Of a connection that is answered past this node its conntrack sees one direction, and its rules drop it.
                if (who, transport) == ("pass-through, outside", Transport::Tcp) {
                    continue;
                }
                steps.step(&of(who), || gets(asker, node, transport, at_balancer(number), expected));
            }
            for (who, asker, to, expected) in [
                ("NodePort, policy Local, outside", client, at_node(83), Err(Reason::NoLocalEndpoints)),
                ("NodePort, policy Local, a pod", &unseen, at_node(83), Ok("b1")),
                ("NodePort of a Service with ranges, one in none", stranger, at_node(81), Ok("a2")),
                ("NodePort of one in pass-through", client, at_node(85), Ok("a2")),
                (
                    "internal policy Local, a pod",
                    &unseen,
                    at_cluster_ip(&local_there, 83),
                    Err(Reason::NoLocalEndpoints),
                ),
                (
                    "unallocated, a pod",
                    &unseen,
                    SocketAddr::new(cluster_ip(99, family), 80),
                    Err(Reason::UnallocatedAddress),
                ),
            ] {
                steps.step(&of(who), || gets(asker, node, transport, to, expected));
            }
        }
        steps.step(&format!("{shape:?}, {family:?}: unallocated, outside"), || {
            let to = SocketAddr::new(cluster_ip(99, family), 80);
            lab.host("client")?.ip_command(&format!("route add {} via {}", to.ip(), node.ip(family)))?;
            gets(client, node, Transport::Tcp, to, Err(Reason::UnallocatedAddress))?;
            gets(client, node, Transport::UdpUnconnected, to, Err(Reason::UnallocatedAddress))
        });
        for transport in Transport::REFUSABLE {
            steps.step(&format!("{shape:?}, {family:?}, {transport:?}: no endpoint"), || {
                client.is_refused_by_packet(transport, at_node(84))?;
                client.is_refused_by_packet(transport, at_balancer(84))?;
                unseen.is_refused_by_packet(transport, at_balancer(84))
            });
        }
        steps.step(&format!("{shape:?}, {family:?}: echo to a load balancer is the load balancer's"), || {
            let before = counted(node, Reason::EchoAnswered)?;
            ping(lab.host("client")?, balancer)?;
            ping(&pod, balancer)?;
            ensure!(counted(node, Reason::EchoAnswered)? == before, "node-a has answered");
            ping(&pod, sticky.cluster_ip(family))?;
            ensure!(counted(node, Reason::EchoAnswered)? == before + 1, "node-a has not answered");
            Ok(())
        });
    }
    steps.step(&format!("{shape:?}: nothing was sent astray"), || {
        let strays = lab.strays()?;
        ensure!(strays.is_empty(), "{strays:?}");
        Ok(())
    });
    Ok(())
}

fn vip(lab: &Lab, family: Family) -> Result<IpAddr> {
    let vip = lab.elb()?.vips().iter().find(|vip| vip.is_ipv4() == (family == Family::V4));
    vip.copied().context("no load-balancer address of this family")
}

/// Answers of this server, or silence that is counted for this reason.
fn gets(
    client: &Client,
    node: &Node,
    transport: Transport,
    to: SocketAddr,
    expected: Result<&str, Reason>,
) -> Result<()> {
    match expected {
        Ok(server) => {
            let (answer, _) = ask_from(&client.worker, transport, to)?;
            ensure!(answer.server == server, "{} to {to}: {answer:?}", client.name);
            Ok(())
        }
        Err(reason) => {
            let before = counted(node, reason)?;
            client.gets_silence(transport, to)?;
            ensure!(counted(node, reason)? > before, "nothing was counted as {}", reason.word());
            Ok(())
        }
    }
}

/// The addresses that clients of affinity ask from.
fn client_addresses(family: Family) -> impl Iterator<Item = IpAddr> {
    (0..CLIENTS).map(move |number| {
        let text = match family {
            Family::V4 => format!("192.0.2.{}", 150 + number),
            Family::V6 => format!("2001:db8::{}", 150 + number),
        };
        text.parse().expect("an address")
    })
}

/// The machine has them all, and none is taken by one who does not ask for it.
fn have_addresses(machine: &Member, family: Family) -> Result<()> {
    let (bits, flags) = if family == Family::V4 { (32, "") } else { (128, " nodad preferred_lft 0") };
    let lines = client_addresses(family).map(|one| format!("address add {one}/{bits} dev {UPLINK}{flags}\n"));
    let command = machine.command("ip")?.args(["-batch", "-"]).input(lines.collect::<String>());
    command.run()?.success().map(drop)
}

/// Each address of the machine is a client, who always meets the same server by all addresses of the Service; not all of
/// them the same one.
fn affine_outside(worker: &Worker, transport: Transport, to: [SocketAddr; 2]) -> Result<()> {
    let mut all = BTreeSet::new();
    for client in client_addresses(family_of(to[0])) {
        let servers = servers(worker, transport, to.into_iter().cycle().take(4), Some(client))?;
        ensure!(servers.len() == 1, "{client} met {servers:?}");
        all.extend(servers);
    }
    ensure!(all.len() == 2, "all clients met {all:?}");
    Ok(())
}

/// Who answers.
fn servers(
    worker: &Worker,
    transport: Transport,
    to: impl Iterator<Item = SocketAddr>,
    from: Option<IpAddr>,
) -> Result<BTreeSet<String>> {
    let mut servers = BTreeSet::new();
    for to in to {
        let from = from.map(|address| SocketAddr::new(address, 0));
        let answer = match transport {
            Transport::Tcp => {
                let socket = worker.tcp_connect_with(to, from, Duration::from_secs(3))?;
                let answer = worker.tcp_ask(socket.id, "hello")?;
                worker.close(socket.id)?;
                answer
            }
            Transport::UdpConnected | Transport::UdpUnconnected => {
                let socket = match from {
                    Some(from) => worker.udp_socket_at(from)?,
                    None => worker.udp_socket(family_of(to))?,
                };
                worker.udp_send_to(socket.id, to, "hello")?;
                let datagram = worker.udp_receive(socket.id, Duration::from_secs(2))?;
                worker.close(socket.id)?;
                if datagram.from != to {
                    bail!("answered by {} where {to} was asked", datagram.from);
                }
                serde_json::from_str(&datagram.data)?
            }
        };
        servers.insert(answer.server);
    }
    Ok(servers)
}
