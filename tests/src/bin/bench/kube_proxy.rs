//! kproxy against a real kube-proxy in nftables mode: both follow one real API server, on a node each, and every
//! way through one is measured in turn with the same way through the other.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kproxy_lab::{
    Agent, Context, ControlPlane, Family, KubeProxy, KubeProxySettings, Lab, NodeSpec, Process,
};
use serde_json::{Value, json};

use crate::arms::{self, Arm, Place, Rounds, Took, Work};
use crate::objects::{ENDPOINTS, PORT, TARGET};
use crate::options::Options;
use crate::through::{self, DATAGRAM_BATCH, DATAGRAMS, OCTET_BATCH, OCTETS, Sink, Way};
use crate::{print, server};

/// What `few` is.
const FEW: usize = 10;
/// Connections in a batch.
const BATCH: usize = 200;
/// How far an A/A ratio may be off.
const STEADY: f64 = 0.02;
/// How long a first load may take.
const LOADED: Duration = Duration::from_secs(180);
/// How long the API server may take to hear of all Services.
const CREATED: Duration = Duration::from_secs(600);
/// Rounds of the ways through a node, which are long.
const ROUNDS: usize = 40;

/// What pods have addresses of.
const CLUSTER_CIDRS: &str = "10.244.0.0/16,fd00:10:244::/48";

/// The first ClusterIP's number: the API server has a Service of its own at the very first.
const FIRST_ADDRESS: usize = 512;

/// The nodes that are asked, each with a pod that asks. The first has no rule that tracks connections, as kproxy wants
/// none; the second has one, as kube-proxy's node must have.
const NODES: [(&str, &str); 3] = [("node-k", "k0"), ("node-q", "q0"), (KUBE_PROXYS, "r0")];
const KUBE_PROXYS: &str = "node-r";
/// Where backends are: a pod on each of these nodes, in their order, and one beyond them.
const PLACES: [&str; 4] = ["k1", "q1", "r1", "c1"];
const BEYOND: usize = 3;
const NODE_PORTS: u16 = 30_100;

/// The folder of the control plane's programs, if kube-proxy is among them.
pub fn binaries() -> Result<PathBuf> {
    let assets = ControlPlane::assets()?;
    KubeProxy::binary(&assets)?;
    Ok(assets)
}

/// Measures, prints, and says whether the A/A ratios allow the others to be believed.
pub fn measure(ctx: &Context, options: &Options, assets: &Path) -> Result<bool> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-k", 1, &["k0", "k1"]).keep_invalid())
            .node(NodeSpec::new("node-q", 2, &["q0", "q1"]))
            .node(NodeSpec::new(KUBE_PROXYS, 3, &["r0", "r1"]))
            .node(NodeSpec::new("node-c", 4, &["c1"]))
            .client("client")
            .control()
    })?;
    // The kernel of kube-proxy's node tells the client of shorter ways past it.
    lab.host("client")?.netns().set_sysctls(&[
        ("net/ipv4/conf/all/accept_redirects", "0"),
        ("net/ipv4/conf/eth0/accept_redirects", "0"),
    ])?;
    let mut endpoints = Vec::new();
    let mut sinks = Vec::new();
    for name in PLACES {
        let pod = lab.pod(name)?;
        endpoints.push(server::addresses(lab.node(pod.node_name())?, pod)?);
        server::start(pod)?;
        sinks.push(Sink::open(pod)?);
    }
    let cluster = Cluster { control: ControlPlane::start(&lab, assets)?, lab, endpoints, sinks };
    cluster.create_nodes()?;
    cluster.create_open_services()?;

    let mut are_steady = true;
    let mut loads = Vec::new();
    let mut made = 0;
    for services in [FEW, options.services] {
        let start = Instant::now();
        cluster.create(made..services)?;
        made = services;
        println!(
            "\n{services} Services × {ENDPOINTS} endpoints: at the API server after {:.1?}",
            start.elapsed()
        );
        let (proxies, load) = Proxies::start(&cluster, services, assets)?;
        loads.push(load);
        are_steady &= ways(&cluster, services, options)?;
        drop(proxies);
    }
    print_loads(&loads);
    Ok(are_steady)
}

struct Cluster {
    lab: Lab,
    control: ControlPlane,
    /// The addresses of the pods of [`PLACES`].
    endpoints: Vec<Vec<Ipv4Addr>>,
    sinks: Vec<Sink>,
}

impl Cluster {
    fn create_nodes(&self) -> Result<()> {
        let nodes = self.lab.nodes().map(|node| {
            let addresses =
                Family::BOTH.map(|family| json!({"type": "InternalIP", "address": node.ip(family)}));
            json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": node.name()}, "status": {"addresses": addresses},
            })
        });
        let nodes: Vec<Value> = nodes.collect();
        let nodes = json!({"apiVersion": "v1", "kind": "List", "items": nodes}).to_string();
        let access = self.control.kubeconfig();
        self.control.kubectl_with(&access, &["create", "-f", "-"], &nodes)?.success()?;
        let status = ["replace", "--subresource=status", "-f", "-"];
        self.control.kubectl_with(&access, &status, &nodes)?.success()?;
        Ok(())
    }

    /// A Service with NodePorts for each place of the backends. Datagrams have one backend, the pod's own address, by
    /// which it answers.
    fn create_open_services(&self) -> Result<()> {
        let ports = [("http", "TCP", TARGET), ("octets", "TCP", OCTETS), ("datagrams", "UDP", DATAGRAMS)];
        let (mut services, mut slices) = (Vec::new(), Vec::new());
        for (place, pod) in PLACES.into_iter().enumerate() {
            let name = format!("open-{pod}");
            let node_ports = ports.map(|(name, protocol, target)| {
                json!({"name": name, "protocol": protocol, "port": target, "nodePort": node_port(place, target)})
            });
            // Chosen, or the API server may choose one that another is to have.
            let ip = Ipv4Addr::new(10, 96, 1, u8::try_from(place)? + 1);
            let spec = json!({"type": "NodePort", "clusterIP": ip, "ports": node_ports});
            services.push(service(&name, &spec));
            let targets = ports
                .map(|(name, protocol, target)| json!({"name": name, "protocol": protocol, "port": target}));
            let (connections, datagrams) = targets.split_at(2);
            slices.push(self.slice(&name, &name, place, &self.endpoints[place], connections)?);
            let own = [self.lab.pod(pod)?.v4()];
            slices.push(self.slice(&format!("{name}-datagrams"), &name, place, &own, datagrams)?);
        }
        self.create_all(&services, &slices)
    }

    /// Services without NodePorts, whose backends are at each place in turn.
    fn create(&self, numbers: std::ops::Range<usize>) -> Result<()> {
        let port = |number: u16| [json!({"name": "http", "protocol": "TCP", "port": number})];
        let (mut services, mut slices) = (Vec::new(), Vec::new());
        for number in numbers {
            let (name, place) = (format!("service-{number:05}"), number % PLACES.len());
            services.push(service(&name, &json!({"clusterIP": cluster_ip(number), "ports": port(PORT)})));
            slices.push(self.slice(&name, &name, place, &self.endpoints[place], &port(TARGET))?);
        }
        self.create_all(&services, &slices)
    }

    fn create_all(&self, services: &[Value], slices: &[Value]) -> Result<()> {
        self.control.create_many("/api/v1/namespaces/default/services", services, CREATED)?;
        let slices_at = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
        self.control.create_many(slices_at, slices, CREATED)
    }

    fn slice(
        &self,
        name: &str,
        service: &str,
        place: usize,
        addresses: &[Ipv4Addr],
        ports: &[Value],
    ) -> Result<Value> {
        let node = self.lab.pod(PLACES[place])?.node_name();
        let endpoints = addresses.iter().map(|address| {
            let conditions = json!({"ready": true, "serving": true, "terminating": false});
            json!({"addresses": [address], "conditions": conditions, "nodeName": node})
        });
        Ok(json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4",
            "endpoints": endpoints.collect::<Vec<_>>(),
            "ports": ports,
        }))
    }

    /// Connections through a node: of its pod to all ClusterIPs whose backends are at a place.
    fn inside(&self, node: usize, place: usize, services: usize) -> Result<Arm> {
        let (name, pod) = NODES[node];
        let numbers = (0..services).filter(|number| number % PLACES.len() == place);
        let targets = numbers.map(|number| SocketAddrV4::new(cluster_ip(number), PORT)).collect();
        Ok(Arm { name: name.to_owned(), place: Place::of(self.lab.pod(pod)?)?, targets })
    }

    /// Connections through a node: of the client outside to a NodePort whose backends are at a place.
    fn outside(&self, node: usize, place: usize) -> Result<Arm> {
        let (name, _) = NODES[node];
        let target = SocketAddrV4::new(self.lab.node(name)?.v4(), node_port(place, TARGET));
        let client = Place::of(self.lab.host("client")?)?;
        Ok(Arm { name: name.to_owned(), place: client, targets: vec![target] })
    }

    /// What else goes through a node from outside.
    fn way(&self, node: usize, place: usize) -> Result<Way<'_>> {
        let (name, _) = NODES[node];
        let address = self.lab.node(name)?.v4();
        Ok(Way {
            name: name.to_owned(),
            place: Place::of(self.lab.host("client")?)?,
            datagrams: SocketAddrV4::new(address, node_port(place, DATAGRAMS)),
            octets: SocketAddrV4::new(address, node_port(place, OCTETS)),
            sink: &self.sinks[place],
        })
    }
}

fn service(name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
}

fn cluster_ip(number: usize) -> Ipv4Addr {
    let [.., high, low] = (number + FIRST_ADDRESS).to_be_bytes();
    Ipv4Addr::new(10, 96, high, low)
}

/// The NodePort that leads to a port of the backends at a place.
fn node_port(place: usize, target: u16) -> u16 {
    NODE_PORTS + u16::try_from(place * 10).unwrap_or_default() + (target - TARGET)
}

/// All, as they run.
struct Proxies {
    _agents: [Agent; 2],
    _kube_proxy: KubeProxy,
}

/// What a first load took, and the memory after it, in KiB: kproxy's and kube-proxy's.
struct Load {
    services: usize,
    took: [Duration; 2],
    memory: [u64; 2],
}

impl Proxies {
    /// One after the other: kproxy has nothing in the kernel before, kube-proxy what it left behind at most.
    fn start(cluster: &Cluster, services: usize, assets: &Path) -> Result<(Self, Load)> {
        let agent = |name: &str| -> Result<(Agent, Duration)> {
            let start = Instant::now();
            let builder = cluster.lab.node(name)?.agent().kubeconfig(&cluster.control.kubeconfig());
            let builder = builder.without_cluster_cidr().args(["--cluster-cidr", CLUSTER_CIDRS]);
            let mut agent = builder.start()?;
            agent.wait_log("it being synced", LOADED, |line| line.message == "synced")?;
            Ok((agent, start.elapsed()))
        };
        let (mut first, ours) = agent(NODES[0].0)?;
        let (second, _) = agent(NODES[1].0)?;
        let start = Instant::now();
        let settings =
            KubeProxySettings { cluster_cidrs: Some(CLUSTER_CIDRS.to_owned()), ..Default::default() };
        let node = cluster.lab.node(KUBE_PROXYS)?;
        let mut kube_proxy = KubeProxy::start(node, &cluster.control, assets, &settings)?;
        let took = [ours, start.elapsed()];
        let memory = [resident(first.process())?, resident(kube_proxy.process())?];
        let load = Load { services, took, memory };
        Ok((Self { _agents: [first, second], _kube_proxy: kube_proxy }, load))
    }
}

fn resident(process: &Process) -> Result<u64> {
    let path = format!("/proc/{}/status", process.pid());
    let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("no VmRSS in {path}"))
}

/// A way through a node, by any of which there is an arm on each node, one after the other.
const INSIDE_HERE: &str = "ClusterIP, backend here";
const INSIDE_THERE: &str = "ClusterIP, backend there";
const OUTSIDE_HERE: &str = "NodePort, backend here";
const OUTSIDE_THERE: &str = "NodePort, backend there";

fn ways(cluster: &Cluster, services: usize, options: &Options) -> Result<bool> {
    let on_each = 0..NODES.len();
    let mut arms = Vec::new();
    arms.extend(on_each.clone().map(|node| cluster.inside(node, node, services)));
    arms.extend(on_each.clone().map(|node| cluster.inside(node, BEYOND, services)));
    arms.extend(on_each.clone().map(|node| cluster.outside(node, node)));
    arms.extend(on_each.clone().map(|node| cluster.outside(node, BEYOND)));
    arms.push(cluster.outside(2, 2));
    let arms = arms.into_iter().collect::<Result<Vec<_>>>()?;
    let titles = [INSIDE_HERE, INSIDE_THERE, OUTSIDE_HERE, OUTSIDE_THERE];
    let mut table = Table::default();
    for (what, work) in [("connect, request, response", Work::Request), ("connect, close", Work::Connect)] {
        let rounds = arms::run(&arms, work, options.rounds, BATCH)?;
        table.add(what, &titles, OUTSIDE_HERE, &rounds, |rate| format!("{:.0}/s", rate * BATCH as f64));
    }

    let mut ways = Vec::new();
    ways.extend(on_each.clone().map(|node| cluster.way(node, node)));
    ways.extend(on_each.map(|node| cluster.way(node, BEYOND)));
    ways.push(cluster.way(2, 2));
    let ways = ways.into_iter().collect::<Result<Vec<_>>>()?;
    let titles = [OUTSIDE_HERE, OUTSIDE_THERE];
    let rounds = arms::in_turn(&ways, ROUNDS, through::datagrams)?;
    table.add("datagrams", &titles, OUTSIDE_HERE, &rounds, |rate| {
        format!("{:.0}/s", rate * DATAGRAM_BATCH as f64)
    });
    let rounds = arms::in_turn(&ways, ROUNDS, through::octets)?;
    let mib = OCTET_BATCH as f64 / f64::from(1 << 20);
    table.add("one TCP stream", &titles, OUTSIDE_HERE, &rounds, |rate| format!("{:.0} MiB/s", rate * mib));
    table.print(services);
    Ok(table.is_steady)
}

struct Table {
    rows: Vec<Vec<String>>,
    is_steady: bool,
}

impl Default for Table {
    fn default() -> Self {
        Self { rows: Vec::new(), is_steady: true }
    }
}

impl Table {
    /// Adds a row for each title. The arms stand in the order of the titles, and in that of the nodes; the last one is
    /// kube-proxy's of the title `again` once more.
    fn add(
        &mut self,
        what: &str,
        titles: &[&str],
        again: &str,
        rounds: &Rounds,
        rate: impl Fn(f64) -> String,
    ) {
        let ratios = |arm: usize, base: usize| {
            let wall = rounds.ratio(arm, base, |took: &Took| took.wall);
            (wall, rounds.ratio(arm, base, |took: &Took| took.processor))
        };
        for (at, title) in titles.iter().enumerate() {
            let [first, second, base] = [0, 1, 2].map(|node| at * NODES.len() + node);
            let mut row = vec![format!("{title}: {what}")];
            for arm in [first, second] {
                let (wall, processor) = ratios(arm, base);
                row.extend([format!("{wall:.3}"), format!("{processor:.3}")]);
            }
            row.extend([first, base].map(|arm| rate(rounds.rate(arm, 1))));
            self.rows.push(row);
            if *title == again {
                let (wall, processor) = ratios(titles.len() * NODES.len(), base);
                self.is_steady &= (processor - 1.0).abs() <= STEADY;
                let mut row =
                    vec![format!("  A/A of kube-proxy's"), format!("{wall:.3}"), format!("{processor:.3}")];
                row.resize(7, String::new());
                self.rows.push(row);
            }
        }
    }

    fn print(&self, services: usize) {
        print::table(
            &format!(
                "{services} Services: time of one as a multiple of kube-proxy's; medians of paired rounds"
            ),
            &["", "kproxy", "processor", "with conntrack", "processor", "kproxy", "kube-proxy"],
            &self.rows,
        );
    }
}

fn print_loads(loads: &[Load]) {
    let rows: Vec<_> = loads
        .iter()
        .map(|Load { services, took: [ours, theirs], memory: [mine, other] }| {
            let mib = |kib: &u64| format!("{:.0} MiB", *kib as f64 / 1024.0);
            vec![
                format!("{services} Services"),
                format!("{ours:.1?}"),
                format!("{theirs:.1?}"),
                format!("{:.1}", theirs.as_secs_f64() / ours.as_secs_f64()),
                mib(mine),
                mib(other),
                format!("{:.2}", *mine as f64 / *other as f64),
            ]
        })
        .collect();
    let header =
        ["", "kproxy", "kube-proxy", "kube-proxy ÷ kproxy", "kproxy's memory", "kube-proxy's", "ratio"];
    print::table("First load from the API server, from the start of the process", &header, &rows);
}
