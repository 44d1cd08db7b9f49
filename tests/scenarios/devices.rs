//! Interfaces and addresses that come and go while the agent runs.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::Ebpf;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use kproxy_lab::{BurstSpec, Cni, Context, Family, Lab, Node, NodeSpec, SERVICES_V4, SERVICES_V6, veth_name};

use crate::Scenario;
use crate::cluster::{Client, Cluster, SILENCE, Steps, TARGET, Transport, eventually, packet_programs};
use crate::dumps::dump;
use crate::objects::{Service, cluster_ip};

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::pods_that_come_later_are_served", later_pods),
    ("kproxy::devices_are_chosen", chosen),
    ("kproxy::devices_are_attached_at_once", at_once),
    ("kproxy::devices_carry_others_programs", others),
    ("kproxy::clients_are_masqueraded_while_addresses_change", addresses_change),
];

fn lab(ctx: &Context, cni: Cni) -> Result<Lab> {
    ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).cni(cni)).client("client"))
}

fn later_pods(ctx: &Context) -> Result<()> {
    let mut steps = Steps::new();
    for cni in [Cni::RoutedVeth, Cni::Bridge] {
        let lab = lab(ctx, cni)?;
        let web = Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(30_080).local();
        let cidrs = format!("{SERVICES_V4},{SERVICES_V6}");
        let services = [web.clone().pods(&[lab.pod("a2")?])];
        let mut cluster = Cluster::start(lab, &["node-a"], &["--service-cidr", &cidrs], &services)?;
        let _server = cluster.servers(&["a2"])?;
        steps.step(&format!("{cni:?}"), || comes_and_goes(&mut cluster, &web));
        drop((cluster, _server));
        ctx.forget_labs();
    }
    steps.done()
}

fn comes_and_goes(cluster: &mut Cluster, web: &Service) -> Result<()> {
    let node = cluster.node("node-a")?.clone();
    let pod = node.add_pod("a9", 2)?;
    let veth = veth_name("a9");
    let index = node.interface_index(&veth)?;
    // Each is attached first, and pinned then.
    eventually("programs on the new interface, and their pins", || {
        Ok((packet_programs(&node, &veth)?.len() == 2 && pinned(&node, index)? == 2).then_some(()))
    })?;

    let client = Client::at(&pod)?;
    let outside = Client::at(cluster.lab.host("client")?)?;
    for family in Family::BOTH {
        for transport in Transport::ALL {
            client.reaches(transport, SocketAddr::new(web.cluster_ip(family), 80), &["a2"])?;
            // Dropped by the packet hook of its interface.
            client.gets_silence(transport, SocketAddr::new(cluster_ip(99, family), 80))?;
        }
        // A route of its own to the gateway would show.
        client.gets_silence(Transport::Tcp, "192.88.99.1:80".parse()?)?;
        ensure!(cluster.lab.strays_to(cluster_ip(99, family))? == 0, "it left the node");
    }
    eventually("another packet at the gateway", || {
        Ok((cluster.lab.strays_to("192.88.99.1".parse()?)? > 0).then_some(()))
    })?;

    // It becomes a backend, for clients inside and outside.
    let _server = pod.echo(TARGET)?;
    cluster.put(&web.clone().pods(&[cluster.lab.pod("a2")?, &pod]))?;
    let other = cluster.pod("a1")?;
    for family in Family::BOTH {
        for transport in Transport::ALL {
            let node_port = SocketAddr::new(node.ip(family), 30_080);
            other.reaches(transport, SocketAddr::new(web.cluster_ip(family), 80), &["a2", "a9"])?;
            outside.reaches(transport, node_port, &["a2", "a9"])?;
        }
    }
    cluster.put(&web.clone().pods(&[cluster.lab.pod("a2")?]))?;
    drop((client, _server));
    node.remove_pod(pod)?;
    eventually("no pins of the interface", || Ok((pinned(&node, index)? == 0).then_some(())))
}

/// The programs read the addresses that clients are masqueraded with while the agent changes them. A first packet that
/// met neither the old nor the new ones would be dropped, and its client wait a second.
fn addresses_change(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1"]).cni(Cni::Vxlan))
            .node(NodeSpec::new("node-b", 2, &["b1"]).cni(Cni::Vxlan))
            .client("client")
    })?;
    let web = Service::new("web", 10).tcp(80, TARGET).node_port(30_080).pods(&[lab.pod("b1")?]);
    let cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    let _server = cluster.servers(&["b1"])?;
    let node = cluster.node("node-a")?;
    let worker = cluster.lab.host("client")?.worker()?;
    let to = SocketAddr::new(node.ip(Family::V4), 30_080);
    // Shorter than a second: after that a SYN that was dropped is sent again.
    let burst = worker.burst_start(BurstSpec::new(to).concurrency(4).timeout_ms(900))?;
    // Its clients are IPv4 ones; what is known of the interface changes all the same.
    let address = "2001:db8:9::9/64";
    for _ in 0..20 {
        for (action, is_there) in [("add", true), ("del", false)] {
            node.ip_command(&format!("address {action} {address} dev vxlan0"))?;
            eventually("the programs know it", || {
                let text: String = dump(node, "device")?.split_whitespace().collect();
                Ok((text.contains("[32,1,13,184,0,9,") == is_there).then_some(()))
            })?;
        }
    }
    let report = worker.burst_stop(burst)?;
    ensure!(report.ok > 500, "a burst of {report:?} proves nothing");
    ensure!(report.failures() == 0, "connections that were made meanwhile: {report:?}");
    Ok(())
}

/// `--devices` and `--exclude-devices`; an agent that is started with others takes its own off.
fn chosen(ctx: &Context) -> Result<()> {
    let lab = lab(ctx, Cni::RoutedVeth)?;
    let web = Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(30_080);
    let web = web.pods(&[lab.pod("a2")?]);
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    let _server = cluster.servers(&["a2"])?;
    let node = cluster.node("node-a")?.clone();
    let outside = Client::at(cluster.lab.host("client")?)?;
    let unseen = Client::at(&cluster.lab.pod("a1")?.unseen())?;
    let mut steps = Steps::new();
    for (arguments, expected) in [
        (&[][..], [2, 2, 2, 0]),
        (&["--devices", "eth*"], [2, 0, 0, 0]),
        (&["--exclude-devices", "v-a1"], [2, 0, 2, 0]),
        (&["--exclude-devices", "eth*"], [0, 2, 2, 0]),
        (&["--devices", "eth0,v-*", "--exclude-devices", "v-a2"], [2, 2, 0, 0]),
        (&[], [2, 2, 2, 0]),
    ] {
        steps.step(&format!("{arguments:?}"), || {
            cluster.start_agents(&["node-a"], arguments)?;
            let mut seen = [0; 4];
            for (name, count) in ["eth0", "v-a1", "v-a2", "lo"].iter().zip(&mut seen) {
                *count = packet_programs(&node, name)?.len();
            }
            ensure!(seen == expected, "programs on eth0, v-a1, v-a2, lo: {seen:?}, not {expected:?}");
            // Whoever is behind an interface without programs is not served.
            for family in Family::BOTH {
                let node_port = SocketAddr::new(node.ip(family), 30_080);
                let cluster_ip = SocketAddr::new(web.cluster_ip(family), 80);
                for (client, to, is_hooked) in
                    [(&outside, node_port, expected[0] == 2), (&unseen, cluster_ip, expected[1] == 2)]
                {
                    if is_hooked {
                        client.reaches(Transport::Tcp, to, &["a2"])?;
                        client.reaches(Transport::UdpUnconnected, to, &["a2"])?;
                    } else {
                        let made = client.worker.tcp_connect_with(to, None, SILENCE);
                        ensure!(made.is_err(), "{} is served at {to}", client.name);
                    }
                }
            }
            Ok(())
        });
    }
    steps.done()
}

/// From the call that makes an interface to both programs on it: a pod's first packets come soon after.
fn at_once(ctx: &Context) -> Result<()> {
    let cluster = Cluster::start(lab(ctx, Cni::RoutedVeth)?, &["node-a"], &[], [])?;
    let node = cluster.node("node-a")?;
    let mut times = Vec::new();
    for number in 0..15 {
        let name = format!("late{number}");
        let start = Instant::now();
        node.ip_command(&format!("link add {name} type veth peer name {name}p"))?;
        eventually("programs on it", || Ok((packet_programs(node, &name)?.len() == 2).then_some(())))?;
        times.push(start.elapsed());
        node.ip_command(&format!("link del {name}"))?;
    }
    times.sort_unstable();
    let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
    eprintln!("  median {median:?}, longest {longest:?}");
    // Of many, so that a machine that is busy elsewhere for a moment does not decide.
    ensure!(median < Duration::from_millis(100), "half of the interfaces waited longer than {median:?}");
    Ok(())
}

/// Programs of somebody else's on the same hook, before and after ours: they stay where they are, and run.
fn others(ctx: &Context) -> Result<()> {
    let Some(object) = std::env::var_os("KPROXY_TEST_OBJECT") else {
        eprintln!(
            "  skipped: KPROXY_TEST_OBJECT does not name the test object; `cargo xtask test` builds it"
        );
        return Ok(());
    };
    let lab = lab(ctx, Cni::RoutedVeth)?;
    let node = lab.node("node-a")?.clone();
    let web =
        Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(30_080).pods(&[lab.pod("a2")?]);
    let object = std::fs::read(&object).with_context(|| format!("cannot read {}", object.display()))?;
    let mut foreign = Ebpf::load(&object)?;
    // One that hands on, and one that lets packets pass: what stands behind that sees none.
    let mut attach = |name: &str, order: LinkOrder| -> Result<()> {
        let program: &mut SchedClassifier =
            foreign.program_mut(name).context("no such program")?.try_into()?;
        if program.fd().is_err() {
            program.load()?;
        }
        node.netns().within(|| {
            let options = TcAttachOptions::TcxOrder(order);
            // The link goes with the object, at the end of this scenario.
            program.attach_with_options("eth0", TcAttachType::Ingress, options)?;
            Ok(())
        })
    };
    attach("decide", LinkOrder::last())?;
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    let _servers = cluster.servers(&["a2"])?;
    let client = Client::at(cluster.lab.host("client")?)?;
    let on_eth0 = || {
        let names = packet_programs(&node, "eth0")?;
        Ok::<_, anyhow::Error>(names.into_iter().filter(|name| !name.starts_with("out_")).collect::<Vec<_>>())
    };
    let reach = || {
        Family::BOTH.iter().try_for_each(|family| {
            let to = SocketAddr::new(node.ip(*family), 30_080);
            Transport::ALL.iter().try_for_each(|transport| client.reaches(*transport, to, &["a2"]))
        })
    };
    let mut steps = Steps::new();
    steps.step("one that was there first runs after ours", || {
        let names = on_eth0()?;
        ensure!(names.len() == 2 && names[1] == "decide", "{names:?}");
        reach()
    });
    attach("empty", LinkOrder::first())?;
    steps.step("one that comes later and puts itself first", || {
        let names = on_eth0()?;
        ensure!(names.len() == 3 && names[0] == "empty" && names[2] == "decide", "{names:?}");
        reach()
    });
    steps.step("the order stays when the agent comes again", || {
        let before = on_eth0()?;
        cluster.start_agents(&["node-a"], &[])?;
        let after = on_eth0()?;
        ensure!(before == after, "{before:?}, then {after:?}");
        reach()
    });
    steps.step("ours alone goes when the interface is excluded", || {
        cluster.start_agents(&["node-a"], &["--exclude-devices", "eth0"])?;
        let names = on_eth0()?;
        ensure!(names == ["empty", "decide"], "{names:?}");
        Ok(())
    });
    steps.done()
}

/// How many links of an interface are pinned.
fn pinned(node: &Node, index: u32) -> Result<usize> {
    let folder = node.bpf_root().join("links");
    let entries = std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut count = 0;
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        count += usize::from(name.starts_with(&format!("tc_{index}_")));
    }
    Ok(count)
}
