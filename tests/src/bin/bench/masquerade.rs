//! Clients that are masqueraded, beside a real kube-proxy: how long they wait for their connections while a server that
//! closes first leaves ports in TIME_WAIT behind, and how many connections are held at once.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kproxy_lab::{Context, ControlPlane, Family, KubeProxy, KubeProxySettings, Lab, Member, NodeSpec};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt,
};
use serde_json::{Value, json};

use crate::arms::Place;
use crate::{print, server};

/// As many as a load balancer has addresses.
const ADDRESSES: u8 = 16;
/// Of these, through each node.
const CONNECTIONS_A_SECOND: u32 = 200;
const DURATION: Duration = Duration::from_secs(120);
/// What a connection may take that is held.
const PATIENCE: Duration = Duration::from_secs(2);
/// More than there are ports.
const HELD_AT_MOST: usize = 65_000;
/// Sockets of both ends, of both nodes.
const FILES: u64 = 300_000;

const KPROXYS: &str = "node-k";
const KUBE_PROXYS: &str = "node-r";
/// A port that closes first, and one that holds.
const PORTS: [(&str, u16, u16); 2] = [("closing", 8_080, 30_080), ("holding", 8_081, 30_081)];

/// Measures and prints.
pub fn measure(ctx: &Context, assets: &Path) -> Result<()> {
    if setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES).is_err() {
        let (_, most) =
            getrlimit(Resource::RLIMIT_NOFILE).context("cannot tell how many files may be open")?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most).context("cannot open so many files")?;
        println!(
            "at most {most} files may be open here, of {FILES}: fewer connections are held than could be"
        );
    }
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new(KPROXYS, 1, &["k0"]))
            .node(NodeSpec::new(KUBE_PROXYS, 2, &["r0"]))
            .node(NodeSpec::new("node-c", 3, &["c1"]))
            .client("client")
            .control()
    })?;
    let client = lab.host("client")?;
    let sources: Vec<Ipv4Addr> = (0..ADDRESSES).map(|index| Ipv4Addr::new(192, 0, 2, 200 + index)).collect();
    for source in &sources {
        client.ip_command(&format!("address add {source}/24 dev {}", kproxy_lab::UPLINK))?;
    }
    let pod = lab.pod("c1")?;
    serve(pod)?;
    let control = ControlPlane::start(&lab, assets)?;
    create(&lab, &control)?;
    let settings = KubeProxySettings { cluster_cidrs: Some(CLUSTER_CIDRS.to_owned()), ..Default::default() };
    let _kube_proxy = KubeProxy::start(lab.node(KUBE_PROXYS)?, &control, assets, &settings)?;
    let builder = lab.node(KPROXYS)?.agent().kubeconfig(&control.kubeconfig());
    let builder = builder.args(["--max-flows", "524288"]);
    let mut agent = builder.start()?;
    agent.wait_log("it being synced", Duration::from_secs(60), |line| line.message == "synced")?;

    // At the same time, so that what else the machine does slows both.
    let streams = [KPROXYS, KUBE_PROXYS].map(|name| -> Result<_> {
        let to = SocketAddrV4::new(lab.node(name)?.v4(), PORTS[0].2);
        let (place, sources) = (Place::of(client)?, sources.clone());
        Ok(std::thread::spawn(move || stream(&place, &sources, to)))
    });
    let mut rows = Vec::new();
    for (name, stream) in ["kproxy", "kube-proxy"].into_iter().zip(streams) {
        let waits = stream?.join().map_err(|_| anyhow::anyhow!("the stream to {name} panicked"))??;
        rows.push(row(name, waits));
    }
    print::table(
        &format!(
            "Connect to a NodePort, masqueraded towards a server that closes first: {ADDRESSES} client addresses, \
             {CONNECTIONS_A_SECOND} connections a second for {} s, both at the same time",
            DURATION.as_secs()
        ),
        &["", "connections", "failed", "p50", "p99", "p99.9", "longest"],
        &rows,
    );
    let mut rows = Vec::new();
    for (name, node) in [("kproxy", KPROXYS), ("kube-proxy", KUBE_PROXYS)] {
        let to = SocketAddrV4::new(lab.node(node)?.v4(), PORTS[1].2);
        let (place, sources) = (Place::of(client)?, sources.clone());
        let holding = std::thread::spawn(move || hold(&place, &sources, to));
        let held = holding.join().map_err(|_| anyhow::anyhow!("the connections to {name} panicked"))??;
        rows.push(vec![name.to_owned(), held.to_string()]);
    }
    print::table("Connections held at once by one node to one backend elsewhere", &["", "held"], &rows);
    Ok(())
}

/// What pods have addresses of.
const CLUSTER_CIDRS: &str = "10.244.0.0/16,fd00:10:244::/48";

fn row(name: &str, mut waits: Vec<Option<Duration>>) -> Vec<String> {
    let failed = waits.iter().filter(|wait| wait.is_none()).count();
    let count = waits.len();
    let mut took: Vec<Duration> = waits.drain(..).flatten().collect();
    took.sort_unstable();
    let at = |share: f64| match took.len() {
        0 => String::from("-"),
        all => format!("{:.2?}", took[((all as f64 * share) as usize).min(all - 1)]),
    };
    let failed = failed.to_string();
    vec![name.to_owned(), count.to_string(), failed, at(0.5), at(0.99), at(0.999), at(1.0)]
}

/// A server that says an octet and closes, and one that holds what it accepts.
fn serve(pod: &Member) -> Result<()> {
    let listen = |port| -> Result<TcpListener> {
        let listener = pod.netns().within(|| {
            let all = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
            TcpListener::bind(all).with_context(|| format!("cannot listen at {all}"))
        })?;
        server::deepen(&listener)?;
        Ok(listener)
    };
    let [closing, holding] = PORTS.map(|(_, target, _)| listen(target));
    let (closing, holding) = (closing?, holding?);
    std::thread::spawn(move || {
        for mut stream in closing.incoming().flatten() {
            let _ = stream.write_all(&[1]);
        }
    });
    std::thread::spawn(move || holding.incoming().flatten().collect::<Vec<TcpStream>>());
    Ok(())
}

fn create(lab: &Lab, control: &ControlPlane) -> Result<()> {
    let nodes: Vec<Value> = lab
        .nodes()
        .map(|node| {
            let addresses =
                Family::BOTH.map(|family| json!({"type": "InternalIP", "address": node.ip(family)}));
            json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": node.name()}, "status": {"addresses": addresses},
            })
        })
        .collect();
    let nodes = json!({"apiVersion": "v1", "kind": "List", "items": nodes}).to_string();
    let access = control.kubeconfig();
    control.kubectl_with(&access, &["create", "-f", "-"], &nodes)?.success()?;
    control.kubectl_with(&access, &["replace", "--subresource=status", "-f", "-"], &nodes)?.success()?;
    let ports = PORTS.map(|(name, target, node_port)| {
        json!({"name": name, "protocol": "TCP", "port": target, "nodePort": node_port})
    });
    let targets = PORTS.map(|(name, target, _)| json!({"name": name, "protocol": "TCP", "port": target}));
    let conditions = json!({"ready": true, "serving": true, "terminating": false});
    let pod = lab.pod("c1")?;
    let endpoint = json!({"addresses": [pod.v4()], "conditions": conditions, "nodeName": pod.node_name()});
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "far"},
            "spec": {"type": "NodePort", "clusterIP": "10.96.1.1", "ports": ports},
        },
        {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "far", "labels": {"kubernetes.io/service-name": "far"}},
            "endpoints": [endpoint], "ports": targets,
        },
    ]});
    control.kubectl_with(&access, &["create", "-f", "-"], &objects.to_string())?.success()?;
    Ok(())
}

/// Connections at an even pace, one after the other from each address in turn, each until the server has closed it. How long
/// each connect took; `None` for one that failed.
fn stream(place: &Place, sources: &[Ipv4Addr], to: SocketAddrV4) -> Result<Vec<Option<Duration>>> {
    place.enter()?;
    let (start, pace) = (Instant::now(), Duration::from_secs(1) / CONNECTIONS_A_SECOND);
    let count = DURATION.as_secs() as u32 * CONNECTIONS_A_SECOND;
    let mut waits = Vec::new();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (number, source) in (0..count).zip(sources.iter().cycle()) {
            std::thread::sleep((start + pace * number).saturating_duration_since(Instant::now()));
            // A thread of its own: one that waits keeps no other waiting.
            threads.push(scope.spawn(move || {
                let begun = Instant::now();
                let mut stream = open(*source, to, Duration::from_secs(10)).ok()?;
                let took = begun.elapsed();
                let _ = stream.read_to_end(&mut Vec::new());
                Some(took)
            }));
        }
        waits.extend(threads.into_iter().map(|thread| thread.join().ok().flatten()));
    });
    Ok(waits)
}

/// How many connections are open at once before one does not come about.
fn hold(place: &Place, sources: &[Ipv4Addr], to: SocketAddrV4) -> Result<usize> {
    place.enter()?;
    let mut held = Vec::new();
    for source in sources.iter().cycle().take(HELD_AT_MOST) {
        match open(*source, to, PATIENCE) {
            Ok(stream) => held.push(stream),
            Err(_) => break,
        }
    }
    Ok(held.len())
}

/// A connection from an address, from any port of it.
fn open(source: Ipv4Addr, to: SocketAddrV4, patience: Duration) -> Result<TcpStream> {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // The port is chosen at connect, for this destination.
    setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
    // connect gives up after as long.
    let patience = nix::sys::time::TimeVal::new(patience.as_secs().cast_signed(), 0);
    setsockopt(&socket, sockopt::SendTimeout, &patience)?;
    let at = |address: SocketAddrV4| SockaddrIn::from(address);
    bind(socket.as_raw_fd(), &at(SocketAddrV4::new(source, 0)))?;
    connect(socket.as_raw_fd(), &at(to))?;
    Ok(TcpStream::from(socket))
}
