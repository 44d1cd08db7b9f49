//! ICMP redirects about flows: this host's own and those of routers beside it reach nobody who would believe them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use etherparse::{IpNumber, Ipv4Header, Ipv6Header, PacketBuilder, UdpHeader};
use kproxy_common::Reason;
use kproxy_lab::{Context, Family, Lab, Member, NodeSpec, UPLINK, wait_until};

use crate::Scenario;
use crate::cluster::{Client, Cluster, DEADLINE, Steps, TARGET, eventually};
use crate::flows::flows;
use crate::objects::Service;
use crate::shapes::counted;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::redirects_of_this_host_go_nowhere", of_this_host),
    ("kproxy::redirects_of_others_go_nowhere", of_others),
];

const NODE_PORT: u16 = 30_080;

fn cluster(ctx: &Context) -> Result<Cluster> {
    let lab = ctx.lab(|lab| {
        // Redirects are invalid for conntrack: it must not be the node's firewall that drops them.
        lab.node(NodeSpec::new("node-a", 1, &["a1"]).keep_invalid())
            .node(NodeSpec::new("node-b", 2, &["b1", "b2"]))
            .client("client")
            .host(kproxy_lab::HostSpec::new("router", 101))
    })?;
    let far = Service::new("far", 10).tcp(80, TARGET).udp(80, TARGET).node_port(NODE_PORT);
    let far = far.pods(&[lab.pod("b1")?]);
    Cluster::start(lab, &["node-a"], &[], [&far])
}

/// The link-local address of a member's uplink.
fn link_local(member: &Member) -> Result<Ipv6Addr> {
    let text = member.ip_command(&format!("-6 -o address show dev {UPLINK} scope link"))?;
    let words = text.split_whitespace();
    let address = words.filter_map(|word| word.split('/').next()?.parse().ok()).next();
    address.with_context(|| format!("no link-local address in {text:?}"))
}

/// Where a member sends packets to, as its routes and what it was told say; `None`: to the address itself.
fn next_hop(member: &Member, to: IpAddr) -> Result<Option<IpAddr>> {
    let route = member.ip_command(&format!("route get {to}"))?;
    let via = route.split_whitespace().skip_while(|word| *word != "via").nth(1);
    via.map(|word| word.parse().with_context(|| format!("strange: {route}"))).transpose()
}

fn echo(from: &Member, to: &str) -> Result<()> {
    from.run(&["ping", "-n", "-c", "1", "-W", "2", to])?.success().map(drop)
}

/// An address on the same link, as ping wants it.
fn neighbour(address: IpAddr) -> String {
    match address {
        IpAddr::V6(v6) if v6.is_unicast_link_local() => format!("{v6}%{UPLINK}"),
        other => other.to_string(),
    }
}

/// A packet from outside to a backend on another node leaves by the interface that it came in on: the kernel tells whoever
/// sent it to go there directly, about the packet that it sees. The client here listens, and has node-a for the way to
/// all pods, so that it would believe.
fn of_this_host(ctx: &Context) -> Result<()> {
    let cluster = cluster(ctx)?;
    let _servers = cluster.servers(&["b1", "b2"])?;
    let lab = &cluster.lab;
    let (a, b, client) = (lab.node("node-a")?, lab.node("node-b")?, lab.host("client")?);
    let pods = b.spec();
    for setting in ["all", UPLINK] {
        a.netns().set_sysctl(&format!("net/ipv4/conf/{setting}/send_redirects"), "1")?;
        client.netns().set_sysctls(&[
            (&format!("net/ipv4/conf/{setting}/accept_redirects"), "1"),
            (&format!("net/ipv6/conf/{setting}/accept_redirects"), "1"),
        ])?;
    }
    // A redirect of IPv6 comes from a link-local address, and names one.
    let (a6, b6) = (link_local(a)?, link_local(b)?);
    a.ip_command(&format!("-6 route replace {} via {b6} dev {UPLINK}", pods.pods_v6))?;
    client.ip_command(&format!("route add {} via {}", pods.pods_v4, a.v4()))?;
    client.ip_command(&format!("-6 route add {} via {a6} dev {UPLINK}", pods.pods_v6))?;
    let ways: [(Family, IpAddr, IpAddr); 2] =
        [(Family::V4, a.v4().into(), b.v4().into()), (Family::V6, a6.into(), b6.into())];
    let worker = client.worker()?;
    let mut steps = Steps::new();
    for (family, by_a, by_b) in ways {
        let direct = lab.pod("b2")?.ip(family);
        steps.step(&format!("{family:?}: this host sends redirects, and the client believes them"), || {
            ensure!(next_hop(client, direct)? == Some(by_a), "not by node-a");
            // Whoever cannot speak to the better router yet does not believe, and soon is told no more.
            echo(client, &neighbour(by_b))?;
            wait_until("the client to be told the direct way", DEADLINE, || {
                // A socket that a process is busy with is not told.
                echo(client, &direct.to_string())?;
                Ok(next_hop(client, direct)? == Some(by_b))
            })
        });
        let to = SocketAddr::new(a.ip(family), NODE_PORT);
        let backend = lab.pod("b1")?.ip(family);
        let ask = |udp: bool| -> Result<()> {
            let server = if udp { worker.ask_udp(to)?.0.server } else { worker.ask_tcp(to)?.server };
            ensure!(server == "b1", "{server} answers");
            ensure!(next_hop(client, to.ip())?.is_none(), "the client has another way to the Service");
            ensure!(next_hop(client, backend)? == Some(by_a), "the client has another way to b1");
            Ok(())
        };
        // Datagrams first: the kernel sends one redirect a second, and a few more at first.
        for udp in [true, false] {
            steps.step(&format!("{family:?}: none about a flow, UDP {udp}"), || {
                let before = counted(a, Reason::IcmpRedirect)?;
                wait_until("redirects to be dropped", DEADLINE, || {
                    ask(udp)?;
                    Ok(counted(a, Reason::IcmpRedirect)? > before)
                })
            });
        }
        steps.step(&format!("{family:?}: the Service goes on"), || {
            (0..20).try_for_each(|turn| ask(turn % 2 == 0))
        });
    }
    steps.done()
}

/// A router beside knows a better way for what it sees of a flow: towards a masked client (this host), and towards a pod.
fn of_others(ctx: &Context) -> Result<()> {
    let cluster = cluster(ctx)?;
    let _servers = cluster.servers(&["b1", "b2"])?;
    let lab = &cluster.lab;
    let a = lab.node("node-a")?;
    let pod = lab.pod("a1")?.unseen();
    let outside = Client::at(lab.host("client")?)?;
    let inside = pod.worker()?;
    let mut steps = Steps::new();
    for family in Family::BOTH {
        let ask = |worker: &kproxy_lab::Worker, socket: u64, to: SocketAddr| -> Result<kproxy_lab::Answer> {
            worker.udp_send_to(socket, to, "hello")?;
            let datagram = worker.udp_receive(socket, Duration::from_secs(2))?;
            ensure!(datagram.from == to, "answered by {}", datagram.from);
            Ok(serde_json::from_str(&datagram.data)?)
        };
        let backend = SocketAddr::new(lab.pod("b1")?.ip(family), TARGET);
        let cluster_ip = SocketAddr::new(crate::objects::cluster_ip(10, family), 80);
        let node_port = SocketAddr::new(a.ip(family), NODE_PORT);
        for (who, worker, to) in
            [("a masked client", &outside.worker, node_port), ("a pod's", &inside, cluster_ip)]
        {
            steps.step(&format!("{family:?}: about the flow of {who}"), || {
                let socket = worker.udp_socket(family)?;
                // What the backend sees is what a router sees.
                let seen = ask(worker, socket.id, to)?.client;
                let mut arrives = pod.capture(UPLINK, redirects(family))?;
                let before = counted(a, Reason::IcmpRedirect)?;
                for _ in 0..3 {
                    tell(lab, seen, backend)?;
                }
                eventually("them to be dropped", || {
                    Ok((counted(a, Reason::IcmpRedirect)? == before + 3).then_some(()))
                })?;
                ensure!(ask(worker, socket.id, to)?.server == "b1");
                ensure!(arrives.stop()? == 0, "{:?}", arrives.packets()?);
                let listed = flows(a, &["--backend", &backend.to_string()])?;
                ensure!(!listed.is_empty(), "the flow is gone");
                Ok(worker.close(socket.id)?)
            });
        }
        steps.step(&format!("{family:?}: one about no flow goes on"), || {
            let mut arrives = pod.capture(UPLINK, redirects(family))?;
            let before = counted(a, Reason::IcmpRedirect)?;
            tell(lab, SocketAddr::new(pod.ip(family), 9), SocketAddr::new(lab.pod("b2")?.ip(family), 9))?;
            arrives.wait_count(1, DEADLINE)?;
            ensure!(arrives.stop()? == 1 && counted(a, Reason::IcmpRedirect)? == before, "it was counted");
            Ok(())
        });
    }
    steps.done()
}

/// Redirects, in tcpdump's language.
fn redirects(family: Family) -> &'static str {
    match family {
        Family::V4 => "icmp[icmptype] == icmp-redirect",
        Family::V6 => "icmp6 and ip6[40] == 137",
    }
}

/// The router tells `from` that there is a better way for its datagrams to `to`.
fn tell(lab: &Lab, from: SocketAddr, to: SocketAddr) -> Result<()> {
    let router = lab.host("router")?;
    let (source, destination) = (router.mac(UPLINK)?, lab.node("node-a")?.mac(UPLINK)?);
    let builder = PacketBuilder::ethernet2(source, destination);
    let mut frame = Vec::new();
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from_ip), IpAddr::V4(to_ip)) => {
            let quoted = quoted_v4((from_ip, from.port()), (to_ip, to.port()))?;
            let gateway = router.v4().octets();
            let builder = builder.ipv4(router.v4().octets(), from_ip.octets(), 64);
            // Redirect, for the host.
            builder.icmpv4_raw(5, 1, gateway).write(&mut frame, &quoted)?;
        }
        (IpAddr::V6(from_ip), IpAddr::V6(to_ip)) => {
            let quoted = quoted_v6((from_ip, from.port()), (to_ip, to.port()))?;
            // Target and destination, then the option that quotes, in units of 8 octets (RFC 4861, 4.5, 4.6.3).
            let mut body = [router.v6().octets(), to_ip.octets()].concat();
            body.extend([4, u8::try_from((8 + quoted.len()) / 8)?, 0, 0, 0, 0, 0, 0]);
            body.extend(&quoted);
            let builder = builder.ipv6(router.v6().octets(), from_ip.octets(), 255);
            builder.icmpv6_raw(137, 0, [0; 4]).write(&mut frame, &body)?;
        }
        _ => anyhow::bail!("two families"),
    }
    router.wire(UPLINK)?.send(&frame)
}

/// A datagram of eight octets, with its header.
fn quoted_v4((from, port): (Ipv4Addr, u16), (to, to_port): (Ipv4Addr, u16)) -> Result<Vec<u8>> {
    let header = Ipv4Header::new(16, 63, IpNumber::UDP, from.octets(), to.octets())?;
    let udp = UdpHeader::with_ipv4_checksum(port, to_port, &header, &[0; 8])?;
    Ok([&header.to_bytes()[..], &udp.to_bytes(), &[0; 8]].concat())
}

fn quoted_v6((from, port): (Ipv6Addr, u16), (to, to_port): (Ipv6Addr, u16)) -> Result<Vec<u8>> {
    let header = Ipv6Header {
        payload_length: 16,
        next_header: IpNumber::UDP,
        hop_limit: 63,
        source: from.octets(),
        destination: to.octets(),
        ..Ipv6Header::default()
    };
    let udp = UdpHeader::with_ipv6_checksum(port, to_port, &header, &[0; 8])?;
    Ok([&header.to_bytes()[..], &udp.to_bytes(), &[0; 8]].concat())
}
