//! A real kube-proxy on a node, in nftables mode: what kproxy is compared with.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use crate::check::{Guarded, self_check};
use crate::control::ControlPlane;
use crate::member::{Family, Node};
use crate::process::{Cmd, Process};

/// Its name in the folder of the control plane's programs.
const BINARY: &str = "kube-proxy";

/// How long its first sync may take: a second on an idle machine with few Services, half a minute with many.
const FIRST_SYNC: Duration = Duration::from_secs(180);

/// What differs from one kube-proxy to another; the rest is as in kube-proxy's defaults, apart from
/// what would reach beyond its namespace.
#[derive(Clone, Debug, Default)]
pub struct KubeProxySettings {
    /// `--cluster-cidr`, one of each family; without, it does not tell pods from others.
    pub cluster_cidrs: Option<String>,
    /// `--masquerade-all`.
    pub masquerade_all: bool,
    /// `--nodeport-addresses`; `primary` where empty.
    pub node_port_addresses: Vec<String>,
}

/// A kube-proxy that was started. Dropping it kills it; its rules stay until the lab ends.
#[derive(Debug)]
pub struct KubeProxy {
    node: Node,
    process: Process,
}

impl KubeProxy {
    /// Whether there is a binary in the folder of the control plane's programs; see
    /// [`ControlPlane::assets`].
    ///
    /// # Errors
    /// When there is none, with what to do. A scenario that can be skipped says this.
    pub fn binary(assets: &Path) -> Result<PathBuf> {
        let path = assets.join(BINARY);
        ensure!(
            path.is_file(),
            "{} has no {BINARY}: put one there, or unset KUBEBUILDER_ASSETS and run `cargo xtask setup`, which builds it",
            assets.display()
        );
        Ok(path)
    }

    /// Starts it on a node, after the self-check of the whole lab, and waits until it has written
    /// its first rules in both families. It has its node's namespace and cgroup, touches no conntrack
    /// limit or timeout, and leaves its own place in the order of the out-of-memory killer alone.
    ///
    /// # Errors
    /// When a packet could get out, or it does not come up.
    pub fn start(
        node: &Node,
        control: &ControlPlane,
        assets: &Path,
        settings: &KubeProxySettings,
    ) -> Result<Self> {
        let guarded =
            Guarded { netns: node.netns().path(), cgroup: node.cgroup_root(), bpf_root: node.bpf_root() };
        self_check(&node.run, &[guarded]).context("not starting a kube-proxy")?;
        // The user whom RBAC's bootstrap policy binds to the role of kube-proxy.
        let access = control.kubeconfig_for("system:kube-proxy", &[])?;
        let config = node.folder().join("kube-proxy.json");
        fs::write(&config, configuration(node, &access, settings).to_string())
            .with_context(|| format!("cannot write {}", config.display()))?;
        let group = node.cgroup_root().join("agent");
        let process = Cmd::new(Self::binary(assets)?, node.netns(), Some(&group), node.folder())?
            .arg("--config")
            .arg(&config)
            .arg("-v=2")
            .spawn()?;
        let mut proxy = Self { node: node.clone(), process };
        // Its log, since asking costs, and it may be busy for long.
        proxy.process.wait_ready("kube-proxy's first rules", FIRST_SYNC, |process| {
            let log = process.stderr();
            let is_done = |family: &str| {
                let family = format!("ipFamily=\"{family}\"");
                log.lines().any(|line| line.contains("SyncProxyRules complete") && line.contains(&family))
            };
            Ok((is_done("IPv4") && is_done("IPv6")).then_some(()))
        })?;
        proxy.must_have_synced()?;
        Ok(proxy)
    }

    /// Makes a change that has it write all its rules anew, as one of its node's labels, and waits until it has.
    ///
    /// # Errors
    /// When the change fails, or it does not write them.
    pub fn rewrite(&mut self, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let member = self.node.clone();
        let before = full_syncs(&member)?;
        change()?;
        self.process.wait_ready("kube-proxy's new rules", FIRST_SYNC, |_| {
            let now = full_syncs(&member)?;
            Ok(now.iter().zip(before).all(|(now, before)| *now > before).then_some(()))
        })
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// The elements of one of its maps or sets of a family, as `nft` prints them.
    ///
    /// # Errors
    /// When there is no such map or set.
    pub fn elements(&self, family: Family, kind: &str, name: &str) -> Result<String> {
        let table = match family {
            Family::V4 => "ip",
            Family::V6 => "ip6",
        };
        self.node.run(&["nft", "list", kind, table, "kube-proxy", name])?.success()
    }

    /// Fails when it has logged that a sync failed, with the line.
    ///
    /// # Errors
    /// With the first such line.
    pub fn must_have_synced(&self) -> Result<()> {
        let log = self.process.stderr();
        match log.lines().find(|line| line.contains("sync failed")) {
            Some(line) => bail!("kube-proxy on {}: {line}", self.node.name()),
            None => Ok(()),
        }
    }
}

/// How often it has written all its rules, by family, as its metrics tell.
fn full_syncs(node: &Node) -> Result<[u64; 2]> {
    let url = "http://127.0.0.1:10249/metrics";
    let metrics = node.run(&["curl", "-sS", "--max-time", "5", url])?.success()?;
    Ok(["IPv4", "IPv6"].map(|family| {
        let name =
            format!("kubeproxy_sync_full_proxy_rules_duration_seconds_count{{ip_family=\"{family}\"}} ");
        metrics.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0)
    }))
}

fn configuration(node: &Node, access: &Path, settings: &KubeProxySettings) -> serde_json::Value {
    let KubeProxySettings { cluster_cidrs, masquerade_all, node_port_addresses } = settings;
    let primary = [String::from("primary")];
    let addresses = if node_port_addresses.is_empty() { &primary[..] } else { node_port_addresses };
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": node.name(),
        "clientConnection": {"kubeconfig": access},
        "clusterCIDR": cluster_cidrs.as_deref().unwrap_or_default(),
        "nodePortAddresses": addresses,
        // A change is written at once, as kproxy does.
        "nftables": {"masqueradeAll": masquerade_all, "minSyncPeriod": "10ms", "syncPeriod": "30s"},
        // Limits are the machine's, not the namespace's.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
        "oomScoreAdj": 0,
        "healthzBindAddress": "0.0.0.0:10256",
        "metricsBindAddress": "127.0.0.1:10249",
    })
}
