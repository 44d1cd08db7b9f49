//! A lab: from its description to standing namespaces, and down again.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};

use crate::cgroup;
use crate::check::{Guarded, self_check};
use crate::elb::Elb;
use crate::isolate::Run;
use crate::member::{Member, Node, Pod, Surroundings};
use crate::netns::Netns;
use crate::process::Cmd;
use crate::spec::{ElbSpec, GATEWAY_V4, GATEWAY_V6, HostSpec, LabSpec, NodeSpec};
use crate::strays::parse_strays;
use crate::wiring;

/// A standing lab. Cheap to clone; it is taken down with the last clone.
#[derive(Clone, Debug)]
pub struct Lab {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    run: Run,
    places: Places,
    underlay: Netns,
    gateway: Member,
    nodes: BTreeMap<String, Node>,
    pods: BTreeMap<String, Pod>,
    hosts: BTreeMap<String, Member>,
    elb: Option<Elb>,
}

/// Where a lab keeps its things; removed when dropped, with whatever processes are left in it.
#[derive(Debug)]
struct Places {
    folder: PathBuf,
    cgroup: PathBuf,
    bpf: PathBuf,
}

/// A description of a lab, as it grows.
#[derive(Clone, Debug)]
pub struct LabBuilder {
    run: Run,
    spec: LabSpec,
}

impl LabBuilder {
    /// An empty description: an underlay with a gateway.
    pub fn new(run: &Run) -> Self {
        Self { run: run.clone(), spec: LabSpec::default() }
    }

    /// Adds a node with its pods.
    pub fn node(mut self, node: NodeSpec) -> Self {
        self.spec.nodes.push(node);
        self
    }

    /// Adds a machine on the underlay.
    pub fn host(mut self, host: HostSpec) -> Self {
        self.spec.hosts.push(host);
        self
    }

    /// Adds a client: a machine on the underlay without routes to pods, at 192.0.2.100.
    pub fn client(self, name: &str) -> Self {
        self.host(HostSpec::new(name, 100))
    }

    /// Adds the control plane's machine, `control` at 192.0.2.2; see
    /// [`crate::ControlPlane::start`].
    pub fn control(self) -> Self {
        self.host(HostSpec::new("control", 2))
    }

    /// Adds the load balancer's machine.
    pub fn elb(mut self, elb: ElbSpec) -> Self {
        self.spec.elb = Some(elb);
        self
    }

    /// Builds it. What is built is checked to have no way out; see [`self_check`].
    ///
    /// # Errors
    /// When the description contradicts itself, or the kernel refuses something. What was built
    /// until then is taken down.
    pub fn build(self) -> Result<Lab> {
        self.spec.validate()?;
        let places = Places::make(&self.run)?;
        let builder = Builder { spec: &self.spec, places: &places };
        let underlay = builder.namespace("underlay")?;
        let members = builder.members()?;
        builder.wire(&underlay, &members)?;
        let cluster_cidrs: Arc<[String]> = self
            .spec
            .nodes
            .iter()
            .flat_map(|node| [node.pods_v4.to_string(), node.pods_v6.to_string()])
            .collect();
        let nodes = self
            .spec
            .nodes
            .iter()
            .map(|spec| {
                let node = Node {
                    member: members[&spec.name].clone(),
                    surroundings: builder.surroundings(spec),
                    spec: Arc::new(spec.clone()),
                    run: self.run.clone(),
                    cluster_cidrs: Arc::clone(&cluster_cidrs),
                };
                (spec.name.clone(), node)
            })
            .collect();
        let pods = self
            .spec
            .nodes
            .iter()
            .flat_map(|node| node.pods.iter().map(move |pod| (node, pod)))
            .map(|(node, pod)| {
                let member = members[pod].clone();
                let node = node.name.clone();
                (pod.clone(), Pod { member, node })
            })
            .collect();
        let hosts =
            self.spec.all_hosts().map(|host| (host.name.clone(), members[&host.name].clone())).collect();
        let elb =
            self.spec.elb.as_ref().map(|elb| Elb::new(members[&elb.host.name].clone(), elb.vips.clone()));
        let lab = Lab {
            inner: Arc::new(Inner {
                run: self.run.clone(),
                gateway: members["gateway"].clone(),
                places,
                underlay,
                nodes,
                pods,
                hosts,
                elb,
            }),
        };
        lab.self_check()?;
        Ok(lab)
    }
}

impl Lab {
    /// The run that it is in.
    pub fn run(&self) -> &Run {
        &self.inner.run
    }

    /// A node, by its name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        find(&self.inner.nodes, "node", name)
    }

    /// All nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.inner.nodes.values()
    }

    /// A pod, by its name.
    ///
    /// # Errors
    /// When there is none.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        find(&self.inner.pods, "pod", name)
    }

    /// All pods, by name.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.inner.pods.values()
    }

    /// A machine on the underlay that is no node, by its name.
    ///
    /// # Errors
    /// When there is none.
    pub fn host(&self, name: &str) -> Result<&Member> {
        find(&self.inner.hosts, "host", name)
    }

    /// The load balancer's machine.
    ///
    /// # Errors
    /// When the lab was described without.
    pub fn elb(&self) -> Result<&Elb> {
        self.inner.elb.as_ref().context("this lab has no load balancer: describe it with .elb(…)")
    }

    /// The dead end of the nodes' default route, for captures.
    pub fn gateway(&self) -> &Member {
        &self.inner.gateway
    }

    /// The namespace that holds the underlay's bridge.
    pub fn underlay(&self) -> &Netns {
        &self.inner.underlay
    }

    /// Everybody in the lab that can run something, by kind and name.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        let nodes = self.inner.nodes.values().map(|node| &**node);
        let pods = self.inner.pods.values().map(|pod| &**pod);
        nodes.chain(pods).chain(self.inner.hosts.values()).chain([&self.inner.gateway])
    }

    /// Its folder: a subfolder for each member. It ends with the lab.
    pub fn folder(&self) -> &Path {
        &self.inner.places.folder
    }

    /// How many packets to each destination left the nodes by the default route and died at the
    /// gateway. A service address in here got past the node's programs.
    ///
    /// # Errors
    /// When the counters cannot be read.
    pub fn strays(&self) -> Result<BTreeMap<IpAddr, u64>> {
        let text = self.inner.gateway.run(&["nft", "-j", "list", "table", "inet", "stray"])?.success()?;
        parse_strays(&text)
    }

    /// How many packets to one destination died at the gateway; see [`Lab::strays`].
    ///
    /// # Errors
    /// When the counters cannot be read.
    pub fn strays_to(&self, address: IpAddr) -> Result<u64> {
        Ok(self.strays()?.get(&address).copied().unwrap_or(0))
    }

    /// Checks that nothing can get out, for the whole lab; see [`self_check`].
    ///
    /// # Errors
    /// With the first way out that was found.
    pub fn self_check(&self) -> Result<()> {
        self_check(&self.inner.run, &[])?;
        for node in self.nodes() {
            let guarded =
                Guarded { netns: node.netns().path(), cgroup: node.cgroup_root(), bpf_root: node.bpf_root() };
            crate::check::check_guarded(&self.inner.run, &guarded)
                .with_context(|| format!("node {}", node.name()))?;
        }
        Ok(())
    }

    /// The command by which a person outside of the run gets a shell in a member, for as long as
    /// the run stands.
    pub fn enter_command(&self, member: &Member) -> String {
        let target = self.inner.run.init_pid().unwrap_or(0);
        format!(
            "sh -c 'echo $$ > {}/cgroup.procs; exec nsenter --target {target} --mount --pid nsenter --net={} bash'",
            member.cgroup().display(),
            member.netns().path().display(),
        )
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The names are free for the next lab even where a handle to a member lives on.
        for member in self
            .nodes
            .values()
            .map(|node| &node.member)
            .chain(self.pods.values().map(|pod| &pod.member))
            .chain(self.hosts.values())
            .chain([&self.gateway])
        {
            member.netns().remove_name();
        }
    }
}

impl Places {
    fn make(run: &Run) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let name = format!("lab-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let places = Self {
            folder: run.folder().join(&name),
            cgroup: run.cgroup().join(&name),
            bpf: run.bpffs().join(&name),
        };
        fs::create_dir(&places.folder)?;
        fs::create_dir(&places.bpf)?;
        cgroup::create(&places.cgroup)?;
        Ok(places)
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        // The run takes all of it with it as well; a failure here is worth a word, not a panic.
        if let Err(error) = cgroup::end_and_remove(&self.cgroup) {
            eprintln!("taking the lab down: {error:#}");
        }
        for folder in [&self.bpf, &self.folder] {
            if let Err(error) = fs::remove_dir_all(folder) {
                eprintln!("cannot remove {}: {error}", folder.display());
            }
        }
    }
}

/// A lab in the making.
struct Builder<'a> {
    spec: &'a LabSpec,
    places: &'a Places,
}

impl Builder<'_> {
    /// Namespaces, cgroups and folders of all members; nothing is connected yet.
    fn members(&self) -> Result<BTreeMap<String, Member>> {
        let mut members = BTreeMap::new();
        let mut add = |name: &str, group: PathBuf, addresses: (Ipv4Addr, Ipv6Addr)| {
            self.member(name, group, addresses).map(|member| members.insert(name.to_owned(), member))
        };
        let top = &self.places.cgroup;
        add("gateway", top.join("gateway"), (GATEWAY_V4, GATEWAY_V6))?;
        for host in self.spec.all_hosts() {
            add(&host.name, top.join(&host.name), (host.v4, host.v6))?;
        }
        for node in &self.spec.nodes {
            let surroundings = self.surroundings(node);
            let root = surroundings.cgroup;
            cgroup::create(&root)?;
            cgroup::create(&root.join("agent"))?;
            add(&node.name, root.join("host"), (node.v4, node.v6))?;
            for (index, pod) in node.pods.iter().enumerate() {
                add(pod, root.join(pod), node.pod_addresses(index)?)?;
            }
            let pins = surroundings.bpf_root;
            let parent = pins.parent().context("the pins' folder has a parent")?;
            fs::create_dir(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        }
        Ok(members)
    }

    fn member(&self, name: &str, group: PathBuf, addresses: (Ipv4Addr, Ipv6Addr)) -> Result<Member> {
        let folder = self.places.folder.join(name);
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        cgroup::create(&group)?;
        Ok(Member::new(self.namespace(name)?, group, folder, addresses))
    }

    fn namespace(&self, name: &str) -> Result<Netns> {
        let netns = Netns::create(name)?;
        netns.set_sysctls(&wiring::sysctls_everywhere())?;
        Ok(netns)
    }

    fn surroundings(&self, node: &NodeSpec) -> Surroundings {
        Surroundings {
            cgroup: self.places.cgroup.join(&node.name),
            bpf_root: self.places.bpf.join(&node.name).join("kproxy"),
        }
    }

    /// Interfaces, addresses, routes and rules.
    fn wire(&self, underlay: &Netns, members: &BTreeMap<String, Member>) -> Result<()> {
        self.ip(underlay, &wiring::underlay(self.spec))?;
        let gateway = &members["gateway"];
        self.ip(gateway.netns(), &wiring::gateway())?;
        gateway.nft(&wiring::gateway_rules())?;
        for host in self.spec.all_hosts() {
            let netns = members[&host.name].netns();
            self.ip(netns, &wiring::host(self.spec, host))?;
        }
        if let Some(elb) = &self.spec.elb {
            self.ip(members[&elb.host.name].netns(), &wiring::vips(elb))?;
        }
        for node in &self.spec.nodes {
            self.wire_node(node, members)?;
        }
        Ok(())
    }

    fn wire_node(&self, node: &NodeSpec, members: &BTreeMap<String, Member>) -> Result<()> {
        let member = &members[&node.name];
        member.netns().set_sysctls(&wiring::sysctls_of_node(node))?;
        self.ip(member.netns(), &wiring::node(self.spec, node))?;
        let peers = wiring::overlay_peers(self.spec, node);
        self.batch("bridge", member.netns(), &peers)?;
        let rules = wiring::node_rules(self.spec, node);
        if !rules.is_empty() {
            member.nft(&rules)?;
        }
        for pod in &node.pods {
            let settings = wiring::sysctls_of_pod_wire(node, pod);
            let settings: Vec<_> = settings.iter().map(|(key, value)| (key.as_str(), *value)).collect();
            member.netns().set_sysctls(&settings)?;
            let pod = &members[pod];
            self.ip(pod.netns(), &wiring::pod(node, pod.v4(), pod.v6()))?;
        }
        Ok(())
    }

    fn ip(&self, netns: &Netns, text: &str) -> Result<()> {
        self.batch("ip", netns, text)
    }

    /// Runs `ip` or `bridge` in a namespace. It stays in the lab's own cgroup: moving a process
    /// costs more than what it does here.
    fn batch(&self, program: &str, netns: &Netns, text: &str) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let output =
            Cmd::new(program, netns, None, &self.places.folder)?.args(["-batch", "-"]).input(text).run()?;
        ensure!(output.status.success(), "in the namespace {}: {output}\nof:\n{text}", netns.name());
        Ok(())
    }
}

fn find<'a, T>(among: &'a BTreeMap<String, T>, kind: &str, name: &str) -> Result<&'a T> {
    among.get(name).with_context(|| {
        let known: Vec<_> = among.keys().map(String::as_str).collect();
        format!("this lab has no {kind} {name}; it has {}", known.join(", "))
    })
}
