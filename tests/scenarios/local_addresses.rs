//! Service addresses that stand on interfaces of the node.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use kproxy_lab::{Agent, Context, EchoServer, ElbSpec, Family, Lab, Node, NodeSpec};

use crate::Scenario;
use crate::cluster::{
    Client, Cluster, DEADLINE, Steps, TARGET, Transport, check, eventually, frontend, service_view,
};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::what_listens_at_a_cluster_ip_on_an_interface_is_left_alone", listeners),
    ("kproxy::leftovers_of_other_proxies_change_no_cluster_ip", leftovers),
];

/// Ports of the Service that stands on an interface: the cache's, one that only the backends have, and one that a
/// process of the node has at all its addresses.
const DNS: u16 = 53;
const METRICS: u16 = 9_153;
const SSH: u16 = 22;

fn lab(ctx: &Context) -> Result<Lab> {
    ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])).elb(ElbSpec::new()).client("client"))
}

/// As NodeLocal DNSCache does it: its addresses and its sockets come and go while the agent runs.
fn listeners(ctx: &Context) -> Result<()> {
    let dns = Service::new("dns", 10).tcp(DNS, TARGET).udp(DNS, TARGET);
    let dns = dns.tcp(METRICS, TARGET).udp(METRICS, TARGET).tcp(SSH, TARGET).udp(SSH, TARGET);
    let lab = lab(ctx)?;
    let dns = dns.pods(&[lab.pod("a2")?]);
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&dns])?;
    let _server = cluster.servers(&["a2"])?;
    let node = cluster.node("node-a")?.clone();
    let _ssh = node.echo(SSH)?;
    let clients = [cluster.pod("a1")?, Client::at(&cluster.lab.pod("a1")?.unseen())?];
    let addresses = Family::BOTH.map(|family| dns.cluster_ip(family));
    let is_served = |port: u16, server: &str| -> Result<()> {
        let mode = if server == "a2" { "forward" } else { "local-address" };
        for address in addresses {
            eventually(&format!("{mode} at {address}:{port}"), || {
                let view = service_view(&node, "dns")?;
                let modes = ["TCP", "UDP"].map(|protocol| {
                    frontend(&view, address, port, protocol).map(|found| found["mode"] == mode)
                });
                Ok(modes.into_iter().collect::<Result<Vec<_>>>()?.iter().all(|is| *is).then_some(()))
            })?;
            let to = SocketAddr::new(address, port);
            for client in &clients {
                Transport::ALL.iter().try_for_each(|transport| client.reaches(*transport, to, &[server]))?;
            }
        }
        Ok(())
    };
    let others_are_served = || [METRICS, SSH].iter().try_for_each(|port| is_served(*port, "a2"));
    let cache = || node.echo_at(&addresses, DNS);
    let mut running: Option<EchoServer> = None;
    let mut steps = Steps::new();
    steps.step("its addresses alone change nothing", || {
        for address in addresses {
            node.ip_command(&format!("address add {address} dev lo"))?;
        }
        is_seen(&mut cluster, &node, "dns")?;
        is_served(DNS, "a2")?;
        others_are_served()
    });
    steps.step("what it listens on is left to it, nothing else", || {
        running = Some(cache()?);
        is_served(DNS, "node-a")?;
        others_are_served()
    });
    steps.step("an agent that comes again writes nothing", || {
        cluster.start_agents(&["node-a"], &[])?;
        let log = cluster.agent("node-a")?.log();
        let writes: Vec<_> = log.iter().filter_map(|line| line.field("writes")).collect();
        ensure!(!writes.is_empty() && writes.iter().all(|count| count == "0"), "{writes:?}");
        is_served(DNS, "node-a")
    });
    steps.step("when it ends, the Service's endpoints are asked again", || {
        running = None;
        is_served(DNS, "a2")?;
        others_are_served()
    });
    steps.step("when it is back, it is asked", || {
        running = Some(cache()?);
        is_served(DNS, "node-a")
    });
    steps.step("without its addresses it is asked nothing, wherever its sockets are bound", || {
        for address in addresses {
            node.ip_command(&format!("address del {address} dev lo"))?;
        }
        is_served(DNS, "a2")
    });
    drop(running);
    steps.done()
}

/// Waits until the agent knows that the Service's ClusterIPs stand on an interface: what no port has is left alone then.
fn is_seen(cluster: &mut Cluster, node: &Node, service: &str) -> Result<()> {
    let agent = cluster.agent("node-a")?;
    agent.wait_log("the agent seeing the address", DEADLINE, |line| {
        line.message.contains("stands on an interface of this node")
    })?;
    service_view(node, service).map(drop)
}

/// Interfaces that IPVS mode of kube-proxy and kube-router leave on a node.
fn leftovers(ctx: &Context) -> Result<()> {
    let lab = lab(ctx)?;
    let vips = lab.elb()?.vips().to_vec();
    let served: IpAddr = "198.51.100.77".parse()?;
    let web = Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(30_080);
    let web = web.load_balancers(&[served]).pods(&[lab.pod("a2")?]);
    let passed = Service::new("passed", 11).tcp(80, TARGET).load_balancers(&vips).local();
    let passed = passed.annotation("kproxy.io/pass-through", "true").pods(&[lab.pod("a2")?]);
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&web, &passed])?;
    let _server = cluster.servers(&["a2"])?;
    let node = cluster.node("node-a")?.clone();
    let outside = Client::at(cluster.lab.host("client")?)?;
    let mut steps = Steps::new();
    for interface in ["kube-ipvs0", "kube-dummy-if"] {
        let mend = format!("ip link delete {interface}");
        steps.step(&format!("{interface} comes with every address of every Service"), || {
            // This kernel has no dummy devices.
            node.ip_command(&format!("link add {interface} type veth peer name leftover"))?;
            cluster.agent("node-a")?.mark();
            let mut all = Family::BOTH.map(|family| web.cluster_ip(family)).to_vec();
            all.extend(vips.iter().chain([&served]));
            for address in all {
                node.ip_command(&format!("address add {address} dev {interface}"))?;
            }
            let agent = cluster.agent("node-a")?;
            for vip in &vips {
                let said = |agent: &mut Agent, words: &[&str]| {
                    agent.wait_log("it saying so", DEADLINE, |line| {
                        line.level == "WARN" && words.iter().all(|word| line.mentions(word))
                    })
                };
                said(
                    agent,
                    &["default/passed", &vip.to_string(), interface, "never leaves this node", &mend],
                )?;
            }
            let found = agent.log().iter().filter(|line| line.level == "WARN").cloned().collect::<Vec<_>>();
            ensure!(!found.iter().any(|line| line.mentions(&served.to_string())), "it is served: {found:#?}");
            Ok(())
        });
        steps.step(&format!("{interface}: every address is served as before"), || {
            let view = service_view(&node, "web")?;
            let clients =
                [cluster.pod("a1")?, Client::at(&cluster.lab.pod("a1")?.unseen())?, cluster.host("node-a")?];
            for family in Family::BOTH {
                let to = SocketAddr::new(web.cluster_ip(family), 80);
                ensure!(frontend(&view, to.ip(), 80, "TCP")?["mode"] == "forward", "{view:#}");
                for client in &clients {
                    // In IPv6 the kernel chooses the node's own address among those there: then datagrams of the node
                    // itself come from a ClusterIP.
                    let is_confused = client.name == "node-a" && family == Family::V6;
                    let transports = if is_confused { &Transport::ALL[..1] } else { &Transport::ALL };
                    transports.iter().try_for_each(|transport| client.reaches(*transport, to, &["a2"]))?;
                }
                outside.reaches(Transport::Tcp, SocketAddr::new(node.ip(family), 30_080), &["a2"])?;
            }
            clients
                .iter()
                .try_for_each(|client| client.reaches(Transport::Tcp, (served, 80).into(), &["a2"]))?;
            clients[0].is_refused(Transport::Tcp, SocketAddr::new(web.cluster_ip(Family::V4), 81))
        });
        steps.step(&format!("{interface}: kproxy check says what is affected"), || {
            let (status, detail) = check(&node, "leftover interfaces")?;
            ensure!(status == "warning", "{detail}");
            for word in [&*vips[0].to_string(), &*vips[1].to_string(), &mend] {
                ensure!(detail.contains(word), "no {word:?} in {detail}");
            }
            ensure!(!detail.contains(&served.to_string()), "it is served: {detail}");
            Ok(())
        });
        steps.step(&format!("{interface} goes"), || {
            node.ip_command(&format!("link delete {interface}"))?;
            let agent = cluster.agent("node-a")?;
            agent.wait_log("it being resolved", DEADLINE, |line| {
                line.message.contains("resolved") && line.mentions(interface)
            })?;
            let (status, detail) = check(&node, "leftover interfaces")?;
            ensure!(status == "ok", "{detail}");
            Ok(())
        });
    }
    steps.done()
}
