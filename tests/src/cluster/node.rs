//! One full node: its configuration, and the process that is its machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::cluster::ClusterSpec;
use crate::cluster::cgroups::LegacyCgroups;
use crate::cluster::machine::{ARGUMENT, Machine};
use crate::control::ControlPlane;
use crate::lab::Lab;
use crate::member::Node;
use crate::process::{Cmd, Process};

/// The address of cluster DNS in [`crate::SERVICES_V4`], as everywhere.
pub const DNS_V4: &str = "10.96.0.10";

/// A node with a kubelet. It ends when this is dropped, with all that runs on it.
#[derive(Debug)]
pub struct FullNode {
    name: String,
    folder: PathBuf,
    process: Process,
}

impl FullNode {
    /// Starts it. It is ready some seconds later.
    pub(super) fn start(
        node: &Node,
        zone: &str,
        control: &ControlPlane,
        spec: &ClusterSpec,
        cgroups: &LegacyCgroups,
    ) -> Result<Self> {
        let folder = node.folder().join("machine");
        for path in ["", "cni", "log"] {
            make(&folder.join(path))?;
        }
        let access = control.kubeconfig_for(&format!("system:node:{}", node.name()), &["system:nodes"])?;
        write(&folder.join("containerd.toml"), &containerd(&spec.pause, &folder))?;
        write(&folder.join("cni/10-lab.conflist"), &cni(node).to_string())?;
        write(&folder.join("resolv.conf"), "nameserver 127.0.0.1\n")?;
        write(&folder.join("kubelet.yaml"), &kubelet(control, &folder).to_string())?;
        let pins = node.bpf_root().parent().context("the pins' folder has a parent")?;
        let machine = Machine {
            name: node.name().to_owned(),
            folder: folder.clone(),
            cgroup: node.cgroup_root().to_owned(),
            legacy_cgroups: cgroups.node(node.name())?,
            bpffs: pins.to_owned(),
            images: spec.images.clone(),
            kubelet: vec![
                spec.programs.join("kubelet").display().to_string(),
                format!("--config={}", folder.join("kubelet.yaml").display()),
                format!("--kubeconfig={}", access.display()),
                format!("--hostname-override={}", node.name()),
                format!("--node-ip={},{}", node.v4(), node.v6()),
                format!("--node-labels=topology.kubernetes.io/zone={zone}"),
                String::from("--root-dir=/var/lib/kubelet"),
                String::from("--v=2"),
            ],
        };
        let process = node
            .command("/proc/self/exe")?
            .arg(ARGUMENT)
            .arg(serde_json::to_string(&machine)?)
            .spawn()
            .with_context(|| format!("cannot start the machine of {}", node.name()))?;
        Ok(Self { name: node.name().to_owned(), folder, process })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The logs of containerd, of the kubelet and of its pods.
    pub fn logs(&self) -> PathBuf {
        self.folder.join("log")
    }

    pub(super) fn must_run(&mut self) -> Result<()> {
        self.process.must_run()
    }

    /// The id of its first process, in the run's PID namespace.
    ///
    /// # Errors
    /// When it has not started yet.
    pub fn first_process(&self) -> Result<i32> {
        let pid = self.process.pid();
        let path = format!("/proc/{pid}/task/{pid}/children");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        text.split_whitespace()
            .next()
            .and_then(|pid| pid.parse().ok())
            .with_context(|| format!("{} has not started", self.name))
    }

    /// A command on it, in all its namespaces.
    ///
    /// # Errors
    /// When the node has not started yet.
    pub fn command(&self, node: &Node, words: &[&str]) -> Result<Cmd> {
        let pid = self.first_process()?.to_string();
        Ok(node
            .command("nsenter")?
            .args(["--target", &pid, "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--"])
            .args(words)
            .deadline(Duration::from_secs(60)))
    }
}

/// The command by which a person gets a shell on a full node, for as long as the run stands.
///
/// # Errors
/// When the node has not started yet.
pub fn enter_command(lab: &Lab, node: &FullNode) -> Result<String> {
    let init = lab.run().init_pid().unwrap_or(0);
    let pid = node.first_process()?;
    Ok(format!("nsenter --target {init} --mount --pid nsenter --target {pid} --all bash"))
}

fn containerd(pause: &str, folder: &Path) -> String {
    format!(
        "version = 2\n\
         root = \"/var/lib/containerd\"\n\
         state = \"/run/containerd\"\n\
         oom_score = 0\n\
         [grpc]\n\
         address = \"/run/containerd/containerd.sock\"\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\n\
         path = \"/var/lib/containerd/opt\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\n\
         sandbox_image = \"{pause}\"\n\
         # The lab may have no CAP_SYS_RESOURCE.\n\
         restrict_oom_score_adj = true\n\
         disable_apparmor = true\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\n\
         bin_dir = \"/usr/lib/cni\"\n\
         conf_dir = \"{}\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
         runtime_type = \"io.containerd.runc.v2\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n\
         SystemdCgroup = false\n",
        folder.join("cni").display()
    )
}

/// A veth and a host route per pod, of both families, and ports of the host.
fn cni(node: &Node) -> serde_json::Value {
    let (v4, v6) = (node.spec().pods_v4.to_string(), node.spec().pods_v6.to_string());
    json!({
        "cniVersion": "0.4.0",
        "name": "lab",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/var/lib/cni/networks",
                    "ranges": [[{"subnet": v4}], [{"subnet": v6}]],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

fn kubelet(control: &ControlPlane, folder: &Path) -> serde_json::Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": false},
            "x509": {"clientCAFile": control.file("ca.crt")},
        },
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": false,
        "failSwapOn": false,
        "clusterDNS": [DNS_V4],
        "clusterDomain": "cluster.local",
        "resolvConf": folder.join("resolv.conf"),
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "localStorageCapacityIsolation": false,
        "makeIPTablesUtilChains": false,
        "oomScoreAdj": 0,
        "protectKernelDefaults": false,
        "volumePluginDir": "/var/lib/kubelet/plugins-of-volumes",
    })
}

fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
