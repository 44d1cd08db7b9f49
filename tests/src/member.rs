//! Members of a lab: nodes, pods, clients, the load balancer. Where commands are run.

use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;

use crate::agent::AgentBuilder;
use crate::capture::Capture;
use crate::netns::Netns;
use crate::nginx::Nginx;
use crate::process::{Cmd, Output, Process};
use crate::spec::NodeSpec;
use crate::worker::{EchoServer, Worker};

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, for loops.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

/// A network namespace, a cgroup and a folder, with addresses. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Member {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    netns: Arc<Netns>,
    cgroup: PathBuf,
    folder: PathBuf,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Member {
    pub(crate) fn new(
        netns: Netns,
        cgroup: PathBuf,
        folder: PathBuf,
        (v4, v6): (Ipv4Addr, Ipv6Addr),
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                name: netns.name().to_owned(),
                netns: Arc::new(netns),
                cgroup,
                folder,
                v4,
                v6,
            }),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.inner.netns
    }

    /// The cgroup that its processes are in.
    pub fn cgroup(&self) -> &Path {
        &self.inner.cgroup
    }

    /// Its folder: output of its processes, configurations. It ends with the run.
    pub fn folder(&self) -> &Path {
        &self.inner.folder
    }

    /// Its IPv4 address.
    pub fn v4(&self) -> Ipv4Addr {
        self.inner.v4
    }

    /// Its IPv6 address.
    pub fn v6(&self) -> Ipv6Addr {
        self.inner.v6
    }

    /// Its address of a family.
    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4().into(),
            Family::V6 => self.v6().into(),
        }
    }

    /// A command that will run here.
    ///
    /// # Errors
    /// When the namespace's or the cgroup's descriptor cannot be had.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Cmd> {
        Cmd::new(program, self.netns(), Some(self.cgroup()), self.folder())
    }

    /// Runs a command here to its end, for at most 10 s.
    ///
    /// # Errors
    /// See [`Cmd::run`].
    pub fn run(&self, words: &[&str]) -> Result<Output> {
        self.words(words)?.run()
    }

    /// Starts a command here.
    ///
    /// # Errors
    /// See [`Cmd::spawn`].
    pub fn spawn(&self, words: &[&str]) -> Result<Process> {
        self.words(words)?.spawn()
    }

    /// Runs `ip` here, as in `ip("route add 198.51.100.7 via 192.0.2.11")`; it must succeed.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn ip_command(&self, words: &str) -> Result<String> {
        self.command("ip")?.args(words.split_whitespace()).run()?.success()
    }

    /// Loads rules into the firewall here, in `nft`'s own language.
    ///
    /// # Errors
    /// When they are refused, with what nft said.
    pub fn nft(&self, rules: &str) -> Result<()> {
        self.command("nft")?.args(["-f", "-"]).input(rules).run()?.success()?;
        Ok(())
    }

    /// A helper process here, with sockets of its own; see [`Worker`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn worker(&self) -> Result<Worker> {
        Worker::start(self)
    }

    /// A server here, on a TCP and UDP port of both families, that answers with this member's name
    /// and the client's address as it sees it.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn echo(&self, port: u16) -> Result<EchoServer> {
        let all = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        self.echo_at(&all, port)
    }

    /// The same at these addresses alone.
    ///
    /// # Errors
    /// When the port is taken, or an address is not this member's.
    pub fn echo_at(&self, addresses: &[IpAddr], port: u16) -> Result<EchoServer> {
        EchoServer::start(self, self.name(), addresses, port)
    }

    /// An nginx here, on a TCP port of both families, that answers like [`Nginx`] says.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn nginx(&self, port: u16) -> Result<Nginx> {
        Nginx::start(self, port)
    }

    /// Records packets on an interface here (`any` for all), by a filter in tcpdump's language.
    ///
    /// # Errors
    /// When tcpdump refuses.
    pub fn capture(&self, interface: &str, filter: &str) -> Result<Capture> {
        Capture::start(self, interface, filter)
    }

    /// Of a node's group or a pod's: the same, in the group that the node's lies in.
    fn outside_of_node(&self) -> Self {
        let Inner { name, netns, cgroup, folder, v4, v6 } = &*self.inner;
        let cgroup = cgroup.parent().and_then(Path::parent).unwrap_or(cgroup).to_owned();
        let (name, netns, folder) = (name.clone(), Arc::clone(netns), folder.clone());
        Self { inner: Arc::new(Inner { name, netns, cgroup, folder, v4: *v4, v6: *v6 }) }
    }

    fn words(&self, words: &[&str]) -> Result<Cmd> {
        let (program, arguments) = words.split_first().unwrap_or((&"", &[]));
        Ok(self.command(program)?.args(arguments))
    }
}

/// A pod: a member whose cgroup is a child of its node's.
#[derive(Clone, Debug)]
pub struct Pod {
    pub(crate) member: Member,
    pub(crate) node: String,
}

impl Pod {
    /// The name of its node.
    pub fn node_name(&self) -> &str {
        &self.node
    }

    /// The pod's namespace, but outside of its node's cgroup: what is started here no socket hook sees, as in a virtual
    /// machine.
    pub fn unseen(&self) -> Member {
        self.member.outside_of_node()
    }
}

impl Deref for Pod {
    type Target = Member;

    fn deref(&self) -> &Member {
        &self.member
    }
}

/// A node. Its member is the host itself: processes run in its namespace, in the cgroup
/// `<node>/host`.
#[derive(Clone, Debug)]
pub struct Node {
    pub(crate) member: Member,
    pub(crate) spec: Arc<NodeSpec>,
    pub(crate) surroundings: Surroundings,
    pub(crate) run: crate::isolate::Run,
    pub(crate) cluster_cidrs: Arc<[String]>,
}

/// What an agent on a node is given, apart from the namespace.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The node's cgroup: parent of the host's and all its pods'.
    pub cgroup: PathBuf,
    /// The folder for the pins; the agent makes it, its parent is there.
    pub bpf_root: PathBuf,
}

impl Node {
    /// As it was described.
    pub fn spec(&self) -> &NodeSpec {
        &self.spec
    }

    /// The cgroup that holds all processes of the node: the agent's `--cgroup-root`.
    pub fn cgroup_root(&self) -> &Path {
        &self.surroundings.cgroup
    }

    /// The folder for the agent's pins: its `--bpf-root`. The agent makes it.
    pub fn bpf_root(&self) -> &Path {
        &self.surroundings.bpf_root
    }

    /// The node's own namespace, but outside of its cgroup: what is started here no socket hook sees, as a raw socket.
    pub fn unseen(&self) -> Member {
        self.member.outside_of_node()
    }

    /// The agent of this node, about to be started.
    pub fn agent(&self) -> AgentBuilder {
        AgentBuilder::new(self)
    }
}

impl Deref for Node {
    type Target = Member;

    fn deref(&self) -> &Member {
        &self.member
    }
}
