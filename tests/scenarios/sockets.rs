//! The socket hooks: what a process on a node sees when it asks for a Service.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use kproxy_lab::{
    Answer, Cni, Context, EchoServer, ElbSpec, Family, Lab, NodeSpec, SERVICES_V4, SERVICES_V6, Worker,
    WorkerError, wait_until,
};
use nix::errno::Errno;

use crate::Scenario;
use crate::cluster::{Cluster, SILENCE, Steps, TARGET, Transport, ask, family_of};
use crate::objects::{Service, cluster_ip};
use crate::packets::ping;
use crate::reach::refused;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::sockets_reach_services", reach_services),
    ("kproxy::sockets_are_refused_or_left_alone", refusals),
    ("kproxy::udp_sockets_speak_to_many", udp_sockets),
    ("kproxy::flags_of_addresses", flags),
    ("kproxy::unspecified_addresses_are_the_clients_own", unspecified),
];

const NODE_PORT: u16 = 30_080;
const SECOND: Duration = Duration::from_secs(1);

/// Clients: a pod beside a backend, a pod on a node without one, and both nodes' own processes.
/// Backends: one on the client's node, one elsewhere.
fn lab(ctx: &Context) -> Result<Lab> {
    ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]).cni(Cni::Bridge))
            .node(NodeSpec::new("node-c", 3, &["c1"]))
            .elb(ElbSpec::new())
    })
}

fn external_ip(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([198, 51, 100, 10]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0x198, 0, 0, 0, 0, 0x10]),
    }
}

/// A Service with every kind of address, TCP and UDP.
fn web(lab: &Lab) -> Result<Service> {
    Ok(Service::new("web", 10)
        .tcp(80, TARGET)
        .udp(80, TARGET)
        .node_port(NODE_PORT)
        .external_ip(external_ip(Family::V4))
        .external_ip(external_ip(Family::V6))
        .load_balancers(lab.elb()?.vips())
        .local())
}

fn vip(lab: &Lab, family: Family) -> Result<IpAddr> {
    let vips = lab.elb()?.vips();
    vips.iter().copied().find(|vip| vip.is_ipv4() == (family == Family::V4)).context("no such address")
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([127, 0, 0, 1]),
        Family::V6 => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
    }
}

fn reach_services(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let web = web(&lab)?.pods(&[lab.pod("a2")?, lab.pod("b1")?]);
    let mut steps = Steps::new();
    let cluster = Cluster::start(lab, &["node-a", "node-c"], &[], [&web])?;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let backends = ["a2", "b1"];
    let clients = [
        ("pod with a backend", cluster.pod("a1")?, "node-a"),
        ("pod without a backend", cluster.pod("c1")?, "node-c"),
        ("host", cluster.host("node-a")?, "node-a"),
        ("host without a backend", cluster.host("node-c")?, "node-c"),
        ("backend itself", cluster.pod("a2")?, "node-a"),
    ];
    let lab = &cluster.lab;
    for (who, client, node) in &clients {
        for family in Family::BOTH {
            let addresses = [
                ("ClusterIP", web.cluster_ip(family), 80),
                ("NodePort", lab.node(node)?.ip(family), NODE_PORT),
                ("externalIP", external_ip(family), 80),
                ("load balancer", vip(lab, family)?, 80),
            ];
            for (kind, address, port) in addresses {
                for transport in Transport::ALL {
                    steps.step(&format!("{who}, {kind}, {family:?}, {transport:?}"), || {
                        client.reaches(transport, SocketAddr::new(address, port), &backends)
                    });
                }
            }
        }
        // An IPv6 socket that speaks to an IPv4 address.
        let IpAddr::V4(v4) = web.cluster_ip(Family::V4) else { unreachable!("asked for IPv4") };
        for transport in Transport::ALL {
            steps.step(&format!("{who}, mapped ClusterIP, {transport:?}"), || {
                let mapped = SocketAddr::new(v4.to_ipv6_mapped().into(), 80);
                client.reaches(transport, mapped, &backends)
            });
        }
    }
    for family in Family::BOTH {
        let local = SocketAddr::new(loopback(family), NODE_PORT);
        for transport in Transport::ALL {
            for (who, client, _) in clients.iter().filter(|(who, ..)| who.starts_with("host")) {
                steps.step(&format!("{who}, loopback NodePort, {family:?}, {transport:?}"), || {
                    client.reaches(transport, local, &backends)
                });
            }
        }
        // A pod's own port is its own, whether it serves there or not.
        steps.step(&format!("pod, loopback NodePort, {family:?}"), || {
            let (_, pod, _) = &clients[1];
            refused(pod.worker.tcp_connect(local), Errno::ECONNREFUSED)?;
            let own = lab.pod("c1")?.echo(NODE_PORT)?;
            for transport in Transport::ALL {
                let answer = ask(&pod.worker, transport, local)?;
                ensure!(answer.server == "c1", "{transport:?}: hijacked: {answer:?}");
            }
            drop(own);
            Ok(())
        });
    }
    steps.nothing_strayed(&cluster.lab);
    steps.done()
}

/// What no backend answers: no endpoints, ports that nobody has, addresses that nobody has, policies.
fn refusals(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let web = web(&lab)?;
    let here = Service::new("here", 11).tcp(80, TARGET).udp(80, TARGET).internal_local();
    let here = here.pods(&[lab.pod("b1")?]);
    let foreign = Service::new("foreign", 12).tcp(80, TARGET).pods(&[lab.pod("a2")?]);
    let foreign = foreign.label("service.kubernetes.io/service-proxy-name", "another");
    let cidrs = format!("{SERVICES_V4},{SERVICES_V6}");
    let services = [web.clone(), here.clone(), foreign.clone()];
    let cluster = Cluster::start(lab, &["node-a"], &["--service-cidr", &cidrs], &services)?;
    let lab = &cluster.lab;
    let _servers = cluster.servers(&["a2", "b1"])?;
    let outside = lab.elb()?.echo(81)?;
    let beside = lab.node("node-a")?.echo(NODE_PORT + 1)?;
    let mut steps = Steps::new();
    let clients = [cluster.pod("a1")?, cluster.host("node-a")?];
    for client in &clients {
        for family in Family::BOTH {
            for transport in Transport::ALL {
                let of = |what: &str| format!("{}, {what}, {family:?}, {transport:?}", client.name);
                let mut empty = vec![
                    ("ClusterIP", web.cluster_ip(family), 80),
                    ("NodePort", lab.node("node-a")?.ip(family), NODE_PORT),
                    ("externalIP", external_ip(family), 80),
                    ("load balancer", vip(lab, family)?, 80),
                ];
                if client.name == "node-a" {
                    empty.push(("loopback NodePort", loopback(family), NODE_PORT));
                }
                for (kind, address, port) in empty {
                    steps.step(&of(&format!("no endpoints, {kind}")), || {
                        client.is_refused(transport, SocketAddr::new(address, port))
                    });
                }
                steps.step(&of("undefined port of a ClusterIP"), || {
                    let to = SocketAddr::new(web.cluster_ip(family), 81);
                    match transport {
                        // Connecting it sends nothing, and so does not fail.
                        Transport::UdpConnected => client.is_refused_by_packet(transport, to),
                        Transport::Tcp | Transport::UdpUnconnected => client.is_refused(transport, to),
                    }
                });
                steps.step(&of("unclaimed port of a load balancer"), || {
                    let to = SocketAddr::new(vip(lab, family)?, outside.port());
                    client.reaches(transport, to, &["elb"])
                });
                steps.step(&of("unclaimed port of the node"), || {
                    client.reaches(transport, beside.address(family), &["node-a"])
                });
                steps.step(&of("unallocated address"), || {
                    client.gets_silence(transport, SocketAddr::new(cluster_ip(99, family), 80))
                });
                steps.step(&of("internal policy Local, no endpoint here"), || {
                    client.gets_silence(transport, SocketAddr::new(here.cluster_ip(family), 80))
                });
            }
            let of = |what: &str| format!("{}, {what}, {family:?}", client.name);
            let member = if client.name == "a1" { &**lab.pod("a1")? } else { &**lab.node("node-a")? };
            steps.step(&of("ping to a ClusterIP"), || ping(member, web.cluster_ip(family)));
            steps.step(&of("another proxy's ClusterIP is left alone"), || {
                client.gets_silence(Transport::Tcp, SocketAddr::new(foreign.cluster_ip(family), 80))?;
                wait_until("it left the node", SECOND, || Ok(lab.strays_to(foreign.cluster_ip(family))? > 0))
            });
            // The foreign ones came later by the same way: whatever was to arrive has arrived.
            steps.step(&of("dropped ones never left the node"), || {
                for address in [cluster_ip(99, family), here.cluster_ip(family), web.cluster_ip(family)] {
                    ensure!(lab.strays_to(address)? == 0, "{address} left the node");
                }
                Ok(())
            });
        }
    }
    steps.done()
}

/// One UDP socket, several partners.
fn udp_sockets(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    // Ten Services, each with a backend of its own on another port of b1; one with two.
    let b1 = lab.pod("b1")?.clone();
    let mut many: Vec<_> = (0..10)
        .map(|n| Service::new(&format!("s{n}"), 100 + n).udp(53, 9000 + u16::from(n)).pods(&[&b1]))
        .collect();
    many.push(Service::new("web", 10).udp(80, TARGET).pods(&[lab.pod("a2")?, &b1]));
    let cluster = Cluster::start(lab, &["node-a"], &[], &many)?;
    let servers = (0..10).map(|n| b1.echo(9000 + n)).collect::<Result<Vec<_>>>()?;
    let _web = cluster.servers(&["a2", "b1"])?;
    let web = many.pop().context("it was pushed")?;
    let elsewhere = cluster.lab.elb()?.echo(9999)?;
    let mut steps = Steps::new();
    for client in [cluster.pod("a1")?, cluster.host("node-a")?] {
        let worker = &client.worker;
        for family in Family::BOTH {
            let of = |what: &str| format!("{}, {what}, {family:?}", client.name);
            let all: Vec<_> = many.iter().map(|one| SocketAddr::new(one.cluster_ip(family), 53)).collect();
            steps.step(&of("two services at once"), || asks_at_once(worker, family, &all[..2]));
            steps.step(&of("ten services at once"), || asks_at_once(worker, family, &all));
            steps.step(&of("a flow keeps its backend"), || {
                keeps_backend(worker, SocketAddr::new(web.cluster_ip(family), 80))
            });
            steps.step(&of("connect to a service, then elsewhere"), || {
                connects_elsewhere(worker, all[0], all[1], &servers[0], &elsewhere, family)
            });
            steps.step(&of("connect to a service, then to a port that it does not have, and back"), || {
                let socket = worker.udp_socket(family)?;
                let undefined = SocketAddr::new(all[0].ip(), 1025);
                for _ in 0..2 {
                    ensure!(worker.udp_connect(socket.id, all[0])?.peer == Some(all[0]));
                    worker.udp_send(socket.id, "served")?;
                    ensure!(worker.udp_receive(socket.id, SECOND)?.from == all[0]);
                    ensure!(worker.udp_connect(socket.id, undefined)?.peer == Some(undefined));
                    worker.udp_send(socket.id, "refused")?;
                    refused(worker.udp_receive(socket.id, SECOND), Errno::ECONNREFUSED)?;
                }
                Ok(worker.close(socket.id)?)
            });
            steps.step(&of("send to a service, then connect elsewhere"), || {
                let socket = worker.udp_socket(family)?;
                worker.udp_send_to(socket.id, all[0], "1")?;
                ensure!(worker.udp_receive(socket.id, SECOND)?.from == all[0]);
                let backend = servers[0].address(family);
                ensure!(worker.udp_connect(socket.id, backend)?.peer == Some(backend));
                worker.udp_send(socket.id, "2")?;
                let from = worker.udp_receive(socket.id, SECOND)?.from;
                ensure!(from == backend, "{from} answered, asked was {backend} itself");
                Ok(worker.close(socket.id)?)
            });
        }
        steps.step(&format!("{}, one IPv6 socket, both families", client.name), || {
            let all: Vec<_> = many
                .iter()
                .flat_map(|one| Family::BOTH.map(|family| one.cluster_ip(family)))
                .map(|address| match address {
                    IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), 53),
                    v6 => SocketAddr::new(v6, 53),
                })
                .collect();
            asks_at_once(worker, Family::V6, &all[..4])?;
            asks_at_once(worker, Family::V6, &all)
        });
    }
    steps.done()
}

/// Sends to all of them before it reads the first answer, twice: answers are told apart by source.
fn asks_at_once(worker: &Worker, family: Family, services: &[SocketAddr]) -> Result<()> {
    let socket = worker.udp_socket(family)?;
    for round in 0..2 {
        let mut expected = BTreeMap::new();
        for to in services {
            worker.udp_send_to(socket.id, *to, &format!("{round} {to}"))?;
            expected.insert(format!("{round} {to}"), *to);
        }
        for _ in services {
            let datagram = worker.udp_receive(socket.id, SECOND)?;
            let answer: Answer = serde_json::from_str(&datagram.data)?;
            let asked = expected.remove(&answer.data).with_context(|| format!("{answer:?} came twice"))?;
            ensure!(datagram.from == asked, "{} answered what {asked} was asked", datagram.from);
        }
    }
    Ok(worker.close(socket.id)?)
}

fn keeps_backend(worker: &Worker, to: SocketAddr) -> Result<()> {
    let mut seen = BTreeSet::new();
    // As many as it takes to see both backends; see `Client::reaches`.
    for _ in 0..40 {
        let socket = worker.udp_socket(family_of(to))?;
        let mut servers = Vec::new();
        for _ in 0..6 {
            worker.udp_send_to(socket.id, to, "again")?;
            let datagram = worker.udp_receive(socket.id, SECOND)?;
            servers.push(serde_json::from_str::<Answer>(&datagram.data)?.server);
        }
        worker.close(socket.id)?;
        servers.dedup();
        ensure!(servers.len() == 1, "one socket, one service, and {servers:?} answered");
        seen.extend(servers);
        if seen.len() == 2 {
            return Ok(());
        }
    }
    bail!("forty sockets, and only {seen:?} answered")
}

/// Connected sockets forget the service that they were connected to.
fn connects_elsewhere(
    worker: &Worker,
    first: SocketAddr,
    second: SocketAddr,
    backend: &EchoServer,
    elsewhere: &EchoServer,
    family: Family,
) -> Result<()> {
    let socket = worker.udp_socket(family)?;
    let exchange = |to: SocketAddr| -> Result<()> {
        let peer = worker.udp_connect(socket.id, to)?.peer;
        ensure!(peer == Some(to), "getpeername shows {peer:?} after connect to {to}");
        worker.udp_send(socket.id, "connected")?;
        let from = worker.udp_receive(socket.id, SECOND)?.from;
        ensure!(from == to, "{from} answered, asked was {to}");
        ensure!(worker.getpeername(socket.id)? == to, "getpeername after the answer of {to}");
        Ok(())
    };
    exchange(first)?;
    exchange(elsewhere.address(family))?;
    exchange(second)?;
    // The backend of the first service, asked as itself.
    exchange(first)?;
    exchange(backend.address(family))?;
    exchange(first)?;
    worker.udp_disconnect(socket.id)?;
    refused(worker.getpeername(socket.id), Errno::ENOTCONN)?;
    worker.udp_send_to(socket.id, second, "not connected")?;
    let from = worker.udp_receive(socket.id, SECOND)?.from;
    ensure!(from == second, "{from} answered, asked was {second}");
    Ok(worker.close(socket.id)?)
}

/// Flags that change which addresses are served.
fn flags(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let web = web(&lab)?.pods(&[lab.pod("a2")?]);
    let second = IpAddr::from([192, 0, 2, 77]);
    let node = lab.node("node-a")?.clone();
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    let _servers = cluster.servers(&["a2"])?;
    let pod = cluster.pod("a1")?;
    let host = cluster.host("node-a")?;
    let primary = SocketAddr::new(node.ip(Family::V4), NODE_PORT);
    let mut steps = Steps::new();

    steps.step("--disable-external-ips, --disable-loopback-nodeports", || {
        let arguments = ["--disable-external-ips", "--disable-loopback-nodeports"];
        cluster.start_agents(&["node-a"], &arguments)?;
        let elb = cluster.lab.elb()?;
        for family in Family::BOTH {
            elb.ip_command(&format!("address add {} dev lo", external_ip(family)))?;
            let local = SocketAddr::new(loopback(family), NODE_PORT);
            refused(host.worker.tcp_connect(local), Errno::ECONNREFUSED)?;
            pod.reaches(Transport::Tcp, SocketAddr::new(vip(&cluster.lab, family)?, 80), &["a2"])?;
        }
        let _holder = elb.echo(80)?;
        for client in [&pod, &host] {
            for family in Family::BOTH {
                client.reaches(Transport::Tcp, SocketAddr::new(external_ip(family), 80), &["elb"])?;
            }
        }
        Ok(())
    });
    steps.step("--nodeport-addresses, followed live", || {
        cluster.start_agents(&["node-a"], &["--nodeport-addresses", "192.0.2.64/26"])?;
        let to = SocketAddr::new(second, NODE_PORT);
        refused(pod.worker.tcp_connect(primary), Errno::ECONNREFUSED)?;
        node.ip_command(&format!("address add {second}/32 dev eth0"))?;
        wait_until("the new address answering", SECOND * 5, || {
            Ok(ask(&pod.worker, Transport::Tcp, to).is_ok_and(|answer| answer.server == "a2"))
        })?;
        pod.reaches(Transport::UdpUnconnected, to, &["a2"])?;
        node.ip_command(&format!("address del {second}/32 dev eth0"))?;
        wait_until("the address not answering any more", SECOND * 5, || {
            Ok(pod.worker.tcp_connect_with(to, None, SILENCE).is_err())
        })
    });
    steps.step("the environment stands for flags", || {
        let agent = node.agent().manifests(&cluster.folder).env("KPROXY_DISABLE_LOOPBACK_NODEPORTS", "true");
        cluster.forget_agent("node-a");
        let mut agent = agent.start()?;
        agent.wait_synced()?;
        pod.reaches(Transport::Tcp, primary, &["a2"])?;
        let local = SocketAddr::new(loopback(Family::V4), NODE_PORT);
        refused(host.worker.tcp_connect(local), Errno::ECONNREFUSED)
    });
    steps.done()
}

/// `0.0.0.0`, `::` and `::ffff:0.0.0.0`, with the address that the kernel makes of each.
const UNSPECIFIED: [(&str, &str); 3] =
    [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("::ffff:0.0.0.0", "::ffff:127.0.0.1")];

/// A client that asks an unspecified address asks its own loopback address.
fn unspecified(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let web = web(&lab)?.pods(&[lab.pod("a2")?]);
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    let _servers = cluster.servers(&["a2"])?;
    let (pod, host) = (cluster.pod("a1")?, cluster.host("node-a")?);
    let mut steps = Steps::new();
    for flag in [None, Some("--disable-loopback-nodeports")] {
        if let Some(flag) = flag {
            cluster.start_agents(&["node-a"], &[flag])?;
        }
        for (asked, shown) in UNSPECIFIED {
            let [asked, shown]: [IpAddr; 2] = [asked.parse()?, shown.parse()?];
            for transport in Transport::ALL {
                let of = |who: &str| format!("{who} to {asked}, {transport:?}, {flag:?}");
                let to = SocketAddr::new(asked, NODE_PORT);
                let ask = |client: &crate::cluster::Client| {
                    ask_shown(&client.worker, transport, to, SocketAddr::new(shown, NODE_PORT))
                };
                steps.step(&of("pod, nobody listens"), || refused_somehow(ask(&pod)));
                steps.step(&of("pod, it listens itself"), || {
                    let own = cluster.lab.pod("a1")?.echo(NODE_PORT)?;
                    let answer = ask(&pod)?;
                    drop(own);
                    ensure!(answer.server == "a1", "hijacked: {answer:?}");
                    Ok(())
                });
                steps.step(&of("host"), || match flag {
                    None => {
                        let answer = ask(&host)?;
                        ensure!(answer.server == "a2", "not the NodePort: {answer:?}");
                        Ok(())
                    }
                    Some(_) => refused_somehow(ask(&host)),
                });
            }
        }
    }
    steps.step("kproxy explain, on the node", || {
        let own = cluster.lab.pod("a1")?.ip(Family::V4).to_string();
        for (from, to, word) in [
            (own.as_str(), "0.0.0.0", "client's own loopback"),
            ("127.0.0.1", "0.0.0.0", "answers on loopback"),
            ("::1", "[::]", "answers on loopback"),
        ] {
            let arguments = ["explain", "--from", from, "--to", &format!("{to}:{NODE_PORT}")];
            let text = cluster.node("node-a")?.kproxy(&arguments)?.success()?;
            ensure!(text.contains(word), "{from} to {to}: no {word:?} in\n{text}");
        }
        Ok(())
    });
    steps.done()
}

/// Asks an echo server once, on a new socket that must show `shown` as its other side.
fn ask_shown(worker: &Worker, transport: Transport, to: SocketAddr, shown: SocketAddr) -> Result<Answer> {
    if transport == Transport::Tcp {
        let socket = worker.tcp_connect(to)?;
        let peer = worker.getpeername(socket.id)?;
        ensure!(peer == shown, "getpeername shows {peer}, not {shown}");
        let answer = worker.tcp_ask(socket.id, "hello")?;
        worker.close(socket.id)?;
        return Ok(answer);
    }
    let socket = worker.udp_socket(family_of(to))?;
    let result = (|| {
        if transport == Transport::UdpConnected {
            let peer = worker.udp_connect(socket.id, to)?.peer;
            ensure!(peer == Some(shown), "getpeername shows {peer:?}, not {shown}");
            worker.udp_send(socket.id, "hello")?;
        } else {
            worker.udp_send_to(socket.id, to, "hello")?;
        }
        let datagram = worker.udp_receive(socket.id, SECOND)?;
        ensure!(datagram.from == shown, "{} answered, not {shown}", datagram.from);
        Ok(serde_json::from_str(&datagram.data)?)
    })();
    worker.close(socket.id)?;
    result
}

/// Nobody answers: by TCP, and where a UDP socket is connected, the own host refuses.
fn refused_somehow(result: Result<Answer>) -> Result<()> {
    let error = match result {
        Ok(answer) => bail!("answered: {answer:?}"),
        Err(error) => error,
    };
    let errno = error.downcast_ref::<WorkerError>().and_then(WorkerError::errno);
    match errno {
        // An unconnected socket is not told.
        Some(Errno::ECONNREFUSED | Errno::EAGAIN) => Ok(()),
        _ => Err(error),
    }
}
