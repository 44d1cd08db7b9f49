//! kproxy beside a real kube-proxy: the same objects from one real kube-apiserver, a node for each, and what clients
//! get of either. The cases are in `cases.txt`, what differs on purpose in `docs/differences.md`.

mod objects;
mod observe;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use kproxy_lab::{
    Agent, Context, ControlPlane, EchoServer, ElbSpec, Family, HostSpec, KubeProxy, KubeProxySettings, Lab,
    Member, Node, NodeSpec, kproxy_binary,
};
use serde_json::{Value, json};

use crate::Scenario;
use crate::cluster::{TARGET, Transport};
use objects::Side;
use observe::Client;
use table::{Case, Group, Outcome, Spec};

pub const SCENARIOS: &[Scenario] = &[("kproxy::like_kube_proxy", like_kube_proxy)];

const CASES: &str = include_str!("cases.txt");

/// Where what differs on purpose is explained: a heading of this level for each.
const DIFFERENCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/differences.md");
const HEADING: &str = "### ";

/// What pods have addresses of, for both proxies.
const CLUSTER_CIDRS: &str = "10.244.0.0/16,fd00:10:244::/48";

/// The nodes: of kproxy, and of kube-proxy.
const NODES: [&str; 2] = ["node-k", "node-r"];

/// The label with a node's zone, and what the two nodes have there until their proxies run: kube-proxy can miss what
/// stands there when it starts, and both must follow a change.
const ZONE: &str = "topology.kubernetes.io/zone";
const ZONE_BEFORE: &str = "z0";

/// Beyond these ports of the load balancer's machine nobody answers.
const ELB_PORTS: [u16; 4] = [80, 81, 82, 99];

fn like_kube_proxy(ctx: &Context) -> Result<()> {
    let groups = table::parse(CASES).context("the table of cases")?;
    let documented = headings(&fs::read_to_string(DIFFERENCES).context(DIFFERENCES)?);
    check_headings(&groups, &documented)?;
    let specs: Vec<&Spec> = groups.iter().flat_map(|group| &group.services).collect();
    let lab = lab(ctx)?;
    let assets = ControlPlane::assets()?;
    let control = ControlPlane::start(&lab, &assets)?;
    let sides = [1, 2].map(|number| Side::new(&lab, number, NODES[usize::from(number - 1)]));
    let [ours, theirs] = sides;
    let sides = [ours?, theirs?];
    prepare(&lab, &sides, &specs)?;
    apply(&control, &lab, &sides, &specs)?;
    let _servers = servers(&lab)?;
    let clients = [clients(&lab, &sides[0])?, clients(&lab, &sides[1])?];

    let mut tally = Tally::default();
    let mut first = 0;
    for group in &groups {
        let start = Instant::now();
        let range = first..first + group.services.len();
        first = range.end;
        let proxies = match Proxies::start(&group.proxies, &sides, &control, &assets)? {
            Ok(proxies) => proxies,
            Err(reason) => {
                let cases = group.services.iter().map(|spec| spec.cases.len()).sum();
                tally.cannot(&group.proxies, cases, &reason);
                continue;
            }
        };
        let started = start.elapsed();
        let seen: Vec<Result<Vec<Seen>>> = thread::scope(|scope| {
            let asked: Vec<_> = sides
                .iter()
                .zip(&clients)
                .map(|(side, clients)| {
                    let (specs, range) = (&specs, range.clone());
                    scope.spawn(move || observe_all(side, clients, specs, range))
                })
                .collect();
            asked.into_iter().map(|one| one.join().unwrap_or_else(|_| Err(anyhow!("panicked")))).collect()
        });
        let [ours, theirs] = <[Result<Vec<Seen>>; 2]>::try_from(seen).map_err(|_| anyhow!("two sides"))?;
        let (ours, theirs) = (ours.context("asking kproxy")?, theirs.context("asking kube-proxy")?);
        for (case, spec) in
            group.services.iter().flat_map(|spec| spec.cases.iter().map(move |case| (case, spec)))
        {
            tally.case(spec, case, &ours, &theirs);
        }
        proxies.kube_proxy.must_have_synced()?;
        eprintln!(
            "  proxies {}: started in {started:.1?}, asked in {:.1?}",
            group.proxies,
            start.elapsed() - started
        );
    }
    tally.done()
}

/// A node for each proxy, one without any, two machines outside, and what stands behind the addresses that nodes
/// leave alone.
fn lab(ctx: &Context) -> Result<Lab> {
    ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-k", 1, &["k0", "k1", "k2"]))
            .node(NodeSpec::new("node-r", 2, &["r0", "r1", "r2"]))
            .node(NodeSpec::new("node-c", 3, &["c0", "c1", "c2"]))
            .elb(ElbSpec::new())
            .client("client")
            .host(HostSpec::new("stranger", 101))
            .control()
    })
}

/// How many ports clients on nodes have for themselves: more than all cases ask from.
const RESERVED_PORTS: u16 = 16_000;

/// Routes and settings beyond those of every lab.
fn prepare(lab: &Lab, sides: &[Side; 2], specs: &[&Spec]) -> Result<()> {
    for name in ["client", "stranger"] {
        let member = lab.host(name)?;
        for side in sides {
            for network in side.networks() {
                let family = if network.contains(':') { Family::V6 } else { Family::V4 };
                member.ip_command(&format!("route add {network} via {}", side.node.ip(family)))?;
            }
        }
        // kube-proxy's node sends redirects about translated packets, by which a client loses the Service.
        member.netns().set_sysctls(&[
            ("net/ipv4/conf/all/accept_redirects", "0"),
            ("net/ipv4/conf/eth0/accept_redirects", "0"),
            ("net/ipv6/conf/all/accept_redirects", "0"),
            ("net/ipv6/conf/eth0/accept_redirects", "0"),
        ])?;
    }
    // A connection of a proxy to the API server must not have a port that a client on its node asks from.
    let reserved = format!("{}-{}", observe::PORTS_OF_NODES, observe::PORTS_OF_NODES + RESERVED_PORTS - 1);
    for side in sides {
        side.node.netns().set_sysctl("net/ipv4/ip_local_reserved_ports", &reserved)?;
        // Refusals come as ICMP errors, and this asks faster than a client would.
        side.node
            .netns()
            .set_sysctls(&[("net/ipv4/icmp_ratelimit", "0"), ("net/ipv6/icmp/ratelimit", "0")])?;
        for family in Family::BOTH {
            let prefix = if family == Family::V4 { 24 } else { 64 };
            let address = side.second_address(family);
            // Nobody chooses it as a source.
            let how = if family == Family::V4 { "" } else { "nodad preferred_lft 0" };
            side.node.ip_command(&format!("address add {address}/{prefix} dev eth0 {how}"))?;
        }
    }
    // Each address, since an answer cannot come from a mere local route in IPv6.
    let mut addresses = BTreeSet::new();
    for side in sides {
        for index in 0..specs.len() {
            addresses.extend(side.outer_addresses(specs, index)?);
        }
    }
    let lines: String =
        addresses.iter().map(|address| format!("address replace {address} dev lo\n")).collect();
    lab.elb()?.command("ip")?.args(["-batch", "-"]).input(lines).run()?.success()?;
    Ok(())
}

/// Gives the API server the nodes and both copies of every Service.
fn apply(control: &ControlPlane, lab: &Lab, sides: &[Side; 2], specs: &[&Spec]) -> Result<()> {
    let nodes: Vec<Value> = lab.nodes().map(node_object).collect();
    let mut created = nodes.clone();
    let mut statuses = Vec::new();
    for side in sides {
        for (index, spec) in specs.iter().enumerate() {
            created.push(side.service(specs, index).with_context(|| spec.name.clone())?);
            created.extend(side.slices(spec).with_context(|| spec.name.clone())?);
            statuses.extend(side.status(specs, index)?);
        }
    }
    let list = |items: Vec<Value>| json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
    let kubectl = |arguments: &[&str], input: &str| -> Result<()> {
        control.kubectl_with(&control.kubeconfig(), arguments, input)?.success().map(drop)
    };
    kubectl(&["create", "-f", "-"], &list(created))?;
    // Applied on the server's side, a Node cannot have two addresses of one type.
    kubectl(&["replace", "--subresource=status", "-f", "-"], &list(nodes))?;
    kubectl(&["apply", "--server-side", "--subresource=status", "-f", "-"], &list(statuses))
}

fn node_object(node: &Node) -> Value {
    let zone = if node.name() == "node-c" { "z2" } else { ZONE_BEFORE };
    let addresses = Family::BOTH.map(|family| json!({"type": "InternalIP", "address": node.ip(family)}));
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name(), "labels": {ZONE: zone}},
        "status": {"addresses": addresses},
    })
}

/// Backends on two ports, and the load balancer's machine.
fn servers(lab: &Lab) -> Result<Vec<EchoServer>> {
    let mut servers = Vec::new();
    for name in ["k1", "k2", "r1", "r2", "c1", "c2"] {
        for port in [TARGET, TARGET + 1] {
            servers.push(lab.pod(name)?.echo(port)?);
        }
    }
    for name in NODES {
        servers.push(lab.node(name)?.echo(TARGET)?);
    }
    for port in ELB_PORTS {
        servers.push(lab.elb()?.echo(port)?);
    }
    Ok(servers)
}

/// The clients of a side, by the table's words.
fn clients(lab: &Lab, side: &Side) -> Result<BTreeMap<&'static str, Client>> {
    let [pod, first, _] = side.pods();
    let members: [(&'static str, &Member); 6] = [
        ("pod", lab.pod(pod)?),
        ("itself", lab.pod(first)?),
        ("host", &side.node),
        ("far", lab.pod("c0")?),
        ("outside", lab.host("client")?),
        ("stranger", lab.host("stranger")?),
    ];
    let clients = members.into_iter().map(|(word, member)| {
        let addresses = match word {
            "host" => side.node.own_addresses()?.into_iter().collect(),
            _ => Family::BOTH.map(|family| member.ip(family)).into(),
        };
        Ok((word, Client::at(member, side, addresses)?))
    });
    clients.collect()
}

/// Both proxies, as they run.
struct Proxies {
    _agent: Agent,
    kube_proxy: KubeProxy,
}

impl Proxies {
    /// Starts both on top of what stands in the API server, and waits until both have written it. The inner error
    /// says why these cannot be compared yet.
    fn start(
        name: &str,
        [ours, theirs]: &[Side; 2],
        control: &ControlPlane,
        assets: &Path,
    ) -> Result<Result<Self, String>> {
        let mut settings =
            KubeProxySettings { cluster_cidrs: Some(CLUSTER_CIDRS.to_owned()), ..Default::default() };
        let mut arguments = vec!["--cluster-cidr", CLUSTER_CIDRS];
        match name {
            "default" => {}
            "without-cluster-cidr" => {
                settings.cluster_cidrs = None;
                arguments.clear();
            }
            "masquerade-all" => {
                settings.masquerade_all = true;
                arguments.push("--masquerade-all");
            }
            "node-port-addresses" => {
                let cidrs = Family::BOTH.map(|family| {
                    let address = ours.second_address(family);
                    let of_theirs = theirs.second_address(family);
                    let bits = if family == Family::V4 { 32 } else { 128 };
                    [format!("{address}/{bits}"), format!("{of_theirs}/{bits}")]
                });
                settings.node_port_addresses = cidrs.concat();
            }
            other => return Err(anyhow!("the table starts proxies in a way that is not known: {other}")),
        }
        let node_port_addresses = settings.node_port_addresses.join(",");
        if !node_port_addresses.is_empty() {
            arguments.extend(["--nodeport-addresses", &node_port_addresses]);
        }
        let help = ours.node.run(&[&kproxy_binary()?.display().to_string(), "agent", "--help"])?.success()?;
        if let Some(missing) = arguments.iter().find(|word| word.starts_with("--") && !help.contains(*word)) {
            return Ok(Err(format!("kproxy has no {missing}")));
        }
        let builder =
            ours.node.agent().without_cluster_cidr().kubeconfig(&control.kubeconfig()).args(&arguments);
        let mut agent = builder.start()?;
        let mut kube_proxy = KubeProxy::start(&theirs.node, control, assets, &settings)?;
        agent.wait_synced()?;
        if name == "default" {
            agent.mark();
            kube_proxy.rewrite(|| {
                let zone = format!("{ZONE}=z1");
                let label = [&["label", "node", "--overwrite"][..], &NODES, &[&zone]].concat();
                control.kubectl(&label)?.success().map(drop)
            })?;
            agent.wait_synced()?;
        }
        Ok(Ok(Self { _agent: agent, kube_proxy }))
    }
}

/// What one case gave over one protocol in one family.
struct Seen {
    line: usize,
    title: String,
    transport: Transport,
    family: Family,
    outcome: BTreeSet<String>,
    took: Duration,
}

fn observe_all(
    side: &Side,
    clients: &BTreeMap<&str, Client>,
    specs: &[&Spec],
    range: std::ops::Range<usize>,
) -> Result<Vec<Seen>> {
    let node_addresses: BTreeSet<IpAddr> = side.node.own_addresses()?.into_iter().collect();
    let is_ours = side.number == 1;
    let mut all = Vec::new();
    for index in range {
        for case in &specs[index].cases {
            let client =
                clients.get(case.client.as_str()).with_context(|| format!("{} is no client", case.client))?;
            let expected = match &case.theirs {
                Some(theirs) if !is_ours => &theirs.outcome,
                _ => &case.ours,
            };
            for &family in &case.families {
                for &transport in &case.transports {
                    let what = || format!("line {}: {}, {family:?}, {transport:?}", case.line, case.title());
                    let udp = transport != Transport::Tcp;
                    let start = Instant::now();
                    let to = case.addresses.iter().map(|one| side.target(specs, index, one, family, udp));
                    let to = to.collect::<Result<Vec<SocketAddr>>>().with_context(what)?;
                    let outcome = client
                        .observe(side, &node_addresses, transport, &to, case, expected)
                        .with_context(what)?;
                    all.push(Seen {
                        line: case.line,
                        title: case.title(),
                        transport,
                        family,
                        outcome,
                        took: start.elapsed(),
                    });
                }
            }
        }
    }
    Ok(all)
}

/// How many cases are what.
#[derive(Default)]
struct Tally {
    equal: usize,
    different: BTreeMap<String, usize>,
    pending: BTreeMap<String, usize>,
    observations: usize,
    wrong: Vec<String>,
}

impl Tally {
    fn cannot(&mut self, proxies: &str, cases: usize, reason: &str) {
        eprintln!("  proxies {proxies}: {reason}");
        *self.pending.entry(reason.to_owned()).or_default() += cases;
    }

    fn case(&mut self, spec: &Spec, case: &Case, ours: &[Seen], theirs: &[Seen]) {
        let expected = case.theirs.as_ref().map_or(&case.ours, |theirs| &theirs.outcome);
        let kube_proxy = self.check(spec, case, "kube-proxy", theirs, expected);
        let kproxy = self.check(spec, case, "kproxy", ours, &case.ours);
        // Of what is pending kube-proxy's part must hold already, and what is to be is written down.
        self.wrong.extend(kube_proxy);
        match &case.pending {
            Some(reason) if !kproxy.is_empty() => {
                *self.pending.entry(reason.clone()).or_default() += 1;
                return;
            }
            Some(reason) => {
                let title = case.title();
                eprintln!(
                    "  line {}: {title}: holds; it need not be marked as pending ({reason})",
                    case.line
                );
            }
            None => self.wrong.extend(kproxy),
        }
        match &case.theirs {
            Some(theirs) => *self.different.entry(theirs.heading.clone()).or_default() += 1,
            None => self.equal += 1,
        }
    }

    fn check(
        &mut self,
        spec: &Spec,
        case: &Case,
        who: &str,
        seen: &[Seen],
        expected: &Outcome,
    ) -> Vec<String> {
        let title = case.title();
        let of_case = seen.iter().filter(|one| one.line == case.line && one.title == title);
        let mut wrong = Vec::new();
        for one in of_case {
            self.observations += 1;
            if expected.is(&one.outcome) {
                continue;
            }
            let got: Vec<_> = one.outcome.iter().map(String::as_str).collect();
            let text = format!(
                "line {}: {}: {title}, {:?}, {:?}: {who} gives {} where {expected} was expected ({:?})",
                one.line,
                spec.name,
                one.transport,
                one.family,
                got.join(" "),
                one.took
            );
            eprintln!("  {text}");
            wrong.push(text);
        }
        wrong
    }

    fn done(self) -> Result<()> {
        let Self { equal, different, pending, observations, wrong } = self;
        let sum = |counts: &BTreeMap<String, usize>| counts.values().sum::<usize>();
        let (differ, wait) = (sum(&different), sum(&pending));
        for (heading, count) in &different {
            eprintln!("  {count:4} different on purpose: {heading}");
        }
        for (reason, count) in &pending {
            eprintln!("  {count:4} pending: {reason}");
        }
        eprintln!(
            "  compared with kube-proxy: {} cases in {observations} observations: {equal} equal, {differ} different on \
             purpose, {wait} pending",
            equal + differ + wait,
        );
        ensure!(
            wrong.is_empty(),
            "{} observations are not as they should be:\n  {}",
            wrong.len(),
            wrong.join("\n  ")
        );
        Ok(())
    }
}

/// Every difference of the table is explained, and every one that is explained is in the table.
fn check_headings(groups: &[Group], documented: &BTreeSet<String>) -> Result<()> {
    let cases = groups.iter().flat_map(|group| &group.services).flat_map(|spec| &spec.cases);
    let named: BTreeSet<String> =
        cases.filter_map(|case| case.theirs.as_ref()).map(|theirs| theirs.heading.clone()).collect();
    let missing: Vec<_> = named.difference(documented).collect();
    let unused: Vec<_> = documented.difference(&named).collect();
    ensure!(missing.is_empty(), "docs/differences.md does not explain {missing:?}");
    ensure!(unused.is_empty(), "docs/differences.md explains what no case shows: {unused:?}");
    Ok(())
}

fn headings(text: &str) -> BTreeSet<String> {
    text.lines().filter_map(|line| line.strip_prefix(HEADING)).map(|name| name.trim().to_owned()).collect()
}
