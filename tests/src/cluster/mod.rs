//! A cluster of full nodes: containerd and a kubelet on each, in namespaces of their own, with the rest of the control
//! plane, cluster DNS, and a proxy that is installed the way a user does it.
//!
//! A full node is a [`crate::Node`] without pods of the lab's: its pods are the kubelet's. It has its own mounts, PIDs,
//! host name, cgroups (also of v1, below a folder of the run) and sees nothing else of the machine's that it could
//! change.

mod cgroups;
mod machine;
mod node;
mod objects;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::context::Context;
use crate::control::ControlPlane;
use crate::lab::Lab;
use crate::process::{Cmd, Output, Process};
use crate::spec::{HostSpec, NodeSpec};
use crate::wait::wait_for;
use cgroups::LegacyCgroups;
use node::FullNode;

pub use cgroups::remove_legacy_leftovers;
pub use node::enter_command;

/// How long a node may take until it is ready; images are brought in before.
const NODE_READY: Duration = Duration::from_secs(180);
/// How long the pods of the system may take.
const PODS_READY: Duration = Duration::from_secs(180);

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct ClusterSpec {
    /// The folder with kubelet, kube-apiserver and so on.
    pub programs: PathBuf,
    /// Archives that every node's containerd is given.
    pub images: Vec<PathBuf>,
    /// The name of CoreDNS' image.
    pub coredns: String,
    /// The name of the image of a pod's first process.
    pub pause: String,
    /// The folder with kproxy's manifests.
    pub manifests: PathBuf,
    /// How many nodes there are; every second one is in the second zone.
    pub nodes: u8,
}

/// What serves the Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterProxy {
    /// kproxy, by its manifests.
    Kproxy,
    /// A real kube-proxy in nftables mode, as a DaemonSet.
    KubeProxy,
}

/// A cluster that stands. It ends when this is dropped.
#[derive(Debug)]
pub struct Cluster {
    // Dropped in this order: nodes before what they run on.
    nodes: Vec<FullNode>,
    _controllers: Vec<Process>,
    control: ControlPlane,
    lab: Lab,
    _cgroups: LegacyCgroups,
    spec: ClusterSpec,
}

/// Does what a node's own process of this program is started for, if that is what it was started for.
pub fn serve_if_asked() -> Option<ExitCode> {
    machine::serve_if_asked()
}

impl Cluster {
    /// Builds it and waits until its nodes are ready, as far as they can be without a proxy. `step` is told what is
    /// about to be done.
    ///
    /// # Errors
    /// When something does not come up in time; the context's evidence has the logs.
    pub fn start(ctx: &Context, spec: ClusterSpec, mut step: impl FnMut(&str)) -> Result<Self> {
        step("network and control plane");
        let cgroups = LegacyCgroups::create(ctx.run())?;
        let lab = ctx.lab(|mut lab| {
            for index in 1..=spec.nodes {
                // Pods are seen as their node from outside of the cluster, as CNIs do it.
                lab = lab.node(NodeSpec::new(&format!("node-{index}"), index, &[]).masquerade_pods());
            }
            // The API server asks pods directly, for `kubectl proxy` and webhooks.
            lab.host(HostSpec { pod_routes: true, ..HostSpec::new("control", 2) }).client("client")
        })?;
        let control = ControlPlane::start_full(&lab, &spec.programs)?;
        let controllers = start_controllers(&control, &spec.programs)?;

        step(&format!("{} nodes: containerd, images, kubelet", spec.nodes));
        let nodes = lab
            .nodes()
            .enumerate()
            .map(|(index, node)| {
                let zone = if index % 2 == 0 { "zone-a" } else { "zone-b" };
                FullNode::start(node, zone, &control, &spec, &cgroups)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut cluster = Self { nodes, _controllers: controllers, control, lab, _cgroups: cgroups, spec };
        cluster.wait_for_nodes()?;
        Ok(cluster)
    }

    /// Installs the proxy and then cluster DNS, whose pods reach the API server by a Service.
    ///
    /// # Errors
    /// When their pods are not ready in time.
    pub fn install(&self, proxy: ClusterProxy, mut step: impl FnMut(&str)) -> Result<()> {
        let (name, objects) = match proxy {
            ClusterProxy::Kproxy => ("kproxy", objects::kproxy(&self.spec.manifests, &self.control.url())?),
            ClusterProxy::KubeProxy => ("kube-proxy", objects::kube_proxy(&self.control.url())),
        };
        self.lab.self_check().context("not starting a proxy")?;
        step(&format!("{name}, from its image"));
        self.control.apply(&objects)?;
        self.wait_for_rollout(&format!("daemonset/{name}"))?;
        step("cluster DNS");
        self.control.apply(&objects::dns(&self.spec.coredns))?;
        self.wait_for_rollout("deployment/coredns")
    }

    /// The lab that it is in.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The control plane, with kubectl.
    pub fn control(&self) -> &ControlPlane {
        &self.control
    }

    /// The folder with kubectl.
    pub fn programs(&self) -> &Path {
        &self.spec.programs
    }

    /// The nodes.
    pub fn nodes(&self) -> &[FullNode] {
        &self.nodes
    }

    /// A command on the machine of the control plane, with kubectl on its PATH and an administrator's access.
    ///
    /// # Errors
    /// See [`crate::Member::command`].
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Cmd> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(self.spec.programs.clone()).chain(std::env::split_paths(&path));
        let control = &self.control;
        Ok(control
            .member()
            .command(program)?
            .env("PATH", std::env::join_paths(path)?)
            .env("HOME", control.member().folder())
            .env("KUBECONFIG", control.kubeconfig()))
    }

    /// Writes what tells of a failure into a folder: objects, Events, and the logs of the system's pods.
    ///
    /// # Errors
    /// When the folder cannot be written; what cannot be asked for is written there as an error.
    pub fn save_state(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let asked: [(&str, &[&str]); 4] = [
            ("objects.txt", &["get", "nodes,pods,services,endpointslices", "-A", "-o", "wide"]),
            ("nodes.yaml", &["get", "nodes", "-o", "yaml"]),
            ("events.txt", &["get", "events", "-A", "--sort-by=.lastTimestamp"]),
            ("dns.log", &["logs", "-n", "kube-system", "-l", "k8s-app=kube-dns", "--prefix", "--tail=-1"]),
        ];
        for (name, arguments) in asked {
            write(&folder.join(name), &said(self.control.kubectl(arguments)))?;
        }
        for proxy in ["kproxy", "kube-proxy"] {
            let pods = ["-l", &format!("app.kubernetes.io/name={proxy}")];
            let arguments = ["logs", "-n", "kube-system", "--prefix", "--tail=-1", "--max-log-requests=20"];
            let text = said(self.control.kubectl(&[&arguments[..], &pods[..]].concat()));
            if !text.is_empty() {
                write(&folder.join(format!("{proxy}.log")), &text)?;
            }
        }
        Ok(())
    }

    fn wait_for_nodes(&mut self) -> Result<()> {
        let wanted = self.nodes.len();
        let (nodes, control) = (&mut self.nodes, &self.control);
        wait_for("all nodes being ready", NODE_READY, || {
            for node in &mut *nodes {
                node.must_run()?;
            }
            let path =
                r#"jsonpath={range .items[*]}{.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}"#;
            let text = control.kubectl(&["get", "nodes", "-o", path])?.success()?;
            let ready = text.lines().filter(|line| *line == "True").count();
            std::thread::sleep(Duration::from_millis(300));
            Ok((ready == wanted).then_some(()))
        })
    }

    fn wait_for_rollout(&self, what: &str) -> Result<()> {
        let status = wait_for(&format!("{what} being ready"), PODS_READY, || {
            let arguments = ["rollout", "status", "-n", "kube-system", what, "--timeout=20s"];
            Ok(Some(self.control.kubectl(&arguments)?.success()?))
        });
        let pods = || said(self.control.kubectl(&["describe", "pods", "-n", "kube-system"]));
        status.map(drop).map_err(|error| {
            let pods = pods();
            let tail: Vec<_> = pods.lines().rev().take(30).collect();
            error.context(tail.into_iter().rev().collect::<Vec<_>>().join("\n"))
        })
    }
}

fn start_controllers(control: &ControlPlane, programs: &Path) -> Result<Vec<Process>> {
    let file = |name: &str| control.file(name).display().to_string();
    let access = control.kubeconfig().display().to_string();
    let start = |name: &str, more: &[String]| {
        control
            .member()
            .command(programs.join(name))?
            .arg(format!("--kubeconfig={access}"))
            .arg(format!("--authentication-kubeconfig={access}"))
            .arg(format!("--authorization-kubeconfig={access}"))
            .args(["--leader-elect=false", "--bind-address=127.0.0.1"])
            .args(more)
            .spawn()
    };
    let manager = start(
        "kube-controller-manager",
        &[
            format!("--service-account-private-key-file={}", file("server.key")),
            format!("--root-ca-file={}", file("ca.crt")),
            format!("--cluster-signing-cert-file={}", file("ca.crt")),
            format!("--cluster-signing-key-file={}", file("ca.key")),
            String::from("--controllers=*,-node-ipam-controller"),
        ],
    )?;
    Ok(vec![manager, start("kube-scheduler", &[])?])
}

fn said(output: Result<Output>) -> String {
    match output {
        Ok(output) if output.status.success() => output.stdout,
        Ok(output) => format!("{output}\n"),
        Err(error) => format!("{error:#}\n"),
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a text file of the project.
fn read(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(!text.is_empty(), "{} is empty", path.display());
    Ok(text)
}
