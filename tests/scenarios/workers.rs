//! Workers, bursts, processes and captures: what scenarios look through.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use kproxy_lab::{BurstSpec, Cni, Context, Family, Lab, NodeSpec, Process, cgroup_processes};
use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::Scenario;
use crate::reach::refused;

pub const SCENARIOS: &[Scenario] = &[
    ("lab::worker_tcp", worker_tcp),
    ("lab::worker_udp", worker_udp),
    ("lab::burst_counts", burst_counts),
    ("lab::processes_are_where_they_belong", processes),
    ("lab::commands_have_deadlines", deadlines),
    ("lab::nginx_says_who_and_whom", nginx),
    ("lab::captures_count", captures),
];

const PORT: u16 = 8080;

fn one_node(ctx: &Context) -> Result<Lab> {
    ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).cni(Cni::Bridge)))
}

fn worker_tcp(ctx: &Context) -> Result<()> {
    let lab = one_node(ctx)?;
    let server = lab.pod("a2")?.echo(PORT)?;
    let worker = lab.pod("a1")?.worker()?;
    for family in Family::BOTH {
        let to = server.address(family);
        let first = worker.tcp_connect(to)?;
        let second = worker.tcp_connect(to)?;
        ensure!(first.id != second.id && first.local != second.local);
        ensure!(first.peer == Some(to), "{first:?}");
        // Both stay open, and each keeps its own source.
        for socket in [first, second, first] {
            let answer = worker.tcp_ask(socket.id, "line")?;
            ensure!(answer.client == socket.local, "{answer:?} for {socket:?}");
            ensure!(answer.data == "line" && answer.server == "a2");
        }
        ensure!(worker.getpeername(first.id)? == to);
        worker.close(first.id)?;
        ensure!(worker.tcp_request(first.id, "x").is_err(), "closed, and answered");
        worker.tcp_ask(second.id, "still there")?;
        worker.tcp_transfer(second.id, 3_000_000, 2_000_000)?;
        worker.tcp_transfer(second.id, 0, 0)?;
        worker.tcp_ask(second.id, "after a transfer")?;

        refused(worker.tcp_connect(SocketAddr::new(to.ip(), 9)), Errno::ECONNREFUSED)?;
        let from = SocketAddr::new(lab.pod("a1")?.ip(family), 40_000);
        let bound = worker.tcp_connect_with(to, Some(from), Duration::from_secs(1))?;
        ensure!(bound.local == from, "{bound:?}");
    }
    // A server that ends is noticed.
    let open = worker.tcp_connect(server.address(Family::V4))?;
    drop(server);
    ensure!(worker.tcp_request(open.id, "x").is_err(), "nobody is there");
    Ok(())
}

fn worker_udp(ctx: &Context) -> Result<()> {
    let lab = one_node(ctx)?;
    let a2 = lab.pod("a2")?;
    let server = a2.echo(PORT)?;
    let host = lab.node("node-a")?.echo(PORT)?;
    let worker = lab.pod("a1")?.worker()?;
    let second = Duration::from_secs(1);
    for family in Family::BOTH {
        // One unconnected socket, two partners.
        let socket = worker.udp_socket(family)?;
        for (partner, name) in [(&server, "a2"), (&host, "node-a")] {
            let to = partner.address(family);
            worker.udp_send_to(socket.id, to, name)?;
            let datagram = worker.udp_receive(socket.id, second)?;
            ensure!(datagram.from == to, "{datagram:?}");
            ensure!(datagram.data.contains(name), "{datagram:?}");
        }
        // Connected, elsewhere, and not at all any more.
        let to = server.address(family);
        ensure!(worker.udp_connect(socket.id, to)?.peer == Some(to));
        worker.udp_send(socket.id, "connected")?;
        ensure!(worker.udp_receive(socket.id, second)?.from == to);
        let nobody = SocketAddr::new(to.ip(), 9);
        worker.udp_connect(socket.id, nobody)?;
        worker.udp_send(socket.id, "into the void")?;
        refused(worker.udp_receive(socket.id, second), Errno::ECONNREFUSED)?;
        worker.udp_disconnect(socket.id)?;
        refused(worker.getpeername(socket.id), Errno::ENOTCONN)?;
        refused(worker.udp_send(socket.id, "to whom"), Errno::EDESTADDRREQ)?;
        let short = Duration::from_millis(50);
        refused(worker.udp_receive(socket.id, short), Errno::EAGAIN)?;
    }

    // The server answers from the address that it was asked at, not from its first one.
    a2.ip_command("address add 10.244.1.77/32 dev lo")?;
    a2.ip_command("address add fd00:10:244:1::77/128 dev lo nodad")?;
    let node = lab.node("node-a")?;
    node.ip_command(&format!("route add 10.244.1.77/32 via {}", a2.v4()))?;
    node.ip_command(&format!("route add fd00:10:244:1::77/128 via {}", a2.v6()))?;
    let worker = node.worker()?;
    for second_address in ["10.244.1.77:8080", "[fd00:10:244:1::77]:8080"] {
        let to: SocketAddr = second_address.parse()?;
        let (answer, from) = worker.ask_udp(to)?;
        ensure!(from == to && answer.local == to, "{answer:?} from {from}");
    }

    // An IPv6 socket speaks IPv4 by mapped addresses.
    let worker = lab.pod("a1")?.worker()?;
    let socket = worker.udp_socket(Family::V6)?;
    let mapped = SocketAddr::new(a2.v4().to_ipv6_mapped().into(), PORT);
    worker.udp_send_to(socket.id, mapped, "mapped")?;
    ensure!(worker.udp_receive(socket.id, second)?.from == mapped);
    let stream = worker.tcp_connect(mapped)?;
    ensure!(stream.peer == Some(mapped), "{stream:?}");
    ensure!(worker.tcp_ask(stream.id, "x")?.client.is_ipv4());
    Ok(())
}

fn burst_counts(ctx: &Context) -> Result<()> {
    let lab = one_node(ctx)?;
    let server = lab.pod("a2")?.echo(PORT)?;
    let worker = lab.pod("a1")?.worker()?;
    let to = server.address(Family::V4);
    let report = worker.burst(BurstSpec::new(to).count(200).concurrency(4))?;
    ensure!(report.ok == 200 && report.failures() == 0, "{report:?}");
    ensure!(report.servers.get("a2") == Some(&200), "{report:?}");
    eprintln!("{:.0} connections a second", 200.0 / report.seconds);

    let report = worker.burst(BurstSpec::new(to).connect_only().seconds(0.1))?;
    ensure!(report.ok > 0 && report.servers.is_empty(), "{report:?}");

    // Failures are counted by what failed, while it runs; other calls go on meanwhile.
    let burst = worker.burst_start(BurstSpec::new(to))?;
    kproxy_lab::wait_until("answers", Duration::from_secs(5), || Ok(worker.burst_look(burst)?.ok >= 10))?;
    worker.ask_tcp(to)?;
    drop(server);
    kproxy_lab::wait_until("failures", Duration::from_secs(5), || {
        let failed = worker.burst_look(burst)?.failed;
        Ok(failed.get("connect ECONNREFUSED").is_some_and(|count| *count >= 10))
    })?;
    let report = worker.burst_stop(burst)?;
    ensure!(report.ok >= 10 && report.failures() >= 10, "{report:?}");
    ensure!(worker.burst_look(burst).is_err(), "it has ended");
    ensure!(worker.burst(BurstSpec::new(to)).is_err(), "it would never end");
    Ok(())
}

fn processes(ctx: &Context) -> Result<()> {
    let lab = one_node(ctx)?;
    let pod = lab.pod("a1")?;
    let node = lab.node("node-a")?;
    // From its first instruction: what it finds is what it was started in.
    let seen = pod.run(&["readlink", "/proc/self/ns/net"])?.success()?;
    let host = node.run(&["readlink", "/proc/self/ns/net"])?.success()?;
    ensure!(seen != host && seen.starts_with("net:["), "{seen} {host}");
    let group = pod.run(&["grep", "0::", "/proc/self/cgroup"])?.success()?;
    ensure!(group.trim().ends_with("/node-a/a1"), "{group}");
    ensure!(pod.cgroup().starts_with(node.cgroup_root()));
    ensure!(node.cgroup().starts_with(node.cgroup_root()));

    // What a process started ends with it.
    let script = "sleep 1000 & sleep 1000 & wait";
    let spawn = || -> Result<Process> {
        let process = pod.spawn(&["sh", "-c", script])?;
        kproxy_lab::wait_until("its children", Duration::from_secs(5), || {
            Ok(cgroup_processes(pod.cgroup())?.len() == 3)
        })?;
        Ok(process)
    };
    let gone = || {
        kproxy_lab::wait_until("an empty cgroup", Duration::from_secs(5), || {
            Ok(cgroup_processes(pod.cgroup())?.is_empty())
        })
    };
    drop(spawn()?);
    gone()?;
    let mut process = spawn()?;
    process.signal(Signal::SIGKILL)?;
    process.wait(Duration::from_secs(5))?;
    gone()?;

    // And the lab ends what is left, whoever holds it.
    let process = spawn()?;
    let group = lab.pod("a1")?.cgroup().to_owned();
    let orphans: BTreeSet<_> = cgroup_processes(&group)?.into_iter().collect();
    drop(lab.clone());
    ensure!(!orphans.is_empty() && group.exists());
    drop((lab, process));
    Ok(())
}

fn deadlines(ctx: &Context) -> Result<()> {
    let lab = one_node(ctx)?;
    let pod = lab.pod("a1")?;
    let Err(error) = pod
        .command("sh")?
        .args(["-c", "echo beginning >&2; exec sleep 1000"])
        .deadline(Duration::from_millis(200))
        .run()
    else {
        bail!("a command that never ends has ended");
    };
    let text = format!("{error:#}");
    ensure!(text.contains("sleep 1000") && text.contains("beginning"), "{text}");
    ensure!(cgroup_processes(pod.cgroup())?.is_empty());

    let output = pod.run(&["sh", "-c", "echo out; echo why >&2; exit 3"])?;
    ensure!(output.code() == Some(3) && output.stdout == "out\n");
    ensure!(output.stderr == "why\n", "{:?}", output.stderr);
    let text = format!("{:#}", output.success().unwrap_err());
    ensure!(text.contains("exit status 3") && text.contains("why"), "{text}");
    let echoed = pod.command("cat")?.input("in\n").run()?.success()?;
    ensure!(echoed == "in\n");
    ensure!(pod.run(&["no-such-program"]).is_err());
    Ok(())
}

fn nginx(ctx: &Context) -> Result<()> {
    let lab = one_node(ctx)?;
    let nginx = lab.pod("a2")?.nginx(80)?;
    for family in Family::BOTH {
        let url = format!("http://{}/", nginx.address(family));
        let text = lab.pod("a1")?.run(&["curl", "-sS", "-g", &url])?.success()?;
        let answer = kproxy_lab::NginxAnswer::parse(&text)?;
        ensure!(answer.pod == "a2", "{answer:?}");
        ensure!(answer.client == lab.pod("a1")?.ip(family).to_string(), "{answer:?}");
        ensure!(answer.server == lab.pod("a2")?.ip(family).to_string(), "{answer:?}");
    }
    drop(nginx);
    kproxy_lab::wait_until("no nginx process", Duration::from_secs(5), || {
        Ok(cgroup_processes(lab.pod("a2")?.cgroup())?.is_empty())
    })
}

fn captures(ctx: &Context) -> Result<()> {
    let lab = one_node(ctx)?;
    let server = lab.pod("a2")?.echo(PORT)?;
    let worker = lab.pod("a1")?.worker()?;
    let mut capture = lab.pod("a2")?.capture("eth0", "udp port 8080")?;
    ensure!(capture.count()? == 0);
    for _ in 0..3 {
        worker.ask_udp(server.address(Family::V4))?;
    }
    capture.wait_count(6, Duration::from_secs(2))?;
    ensure!(capture.stop()? == 6, "{:?}", capture.packets()?);
    ensure!(lab.pod("a2")?.capture("eth0", "no filter").is_err());
    Ok(())
}
