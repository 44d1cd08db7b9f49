//! The control plane alone: a real API server that nodes can reach, and that takes the manifests.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Context, ControlPlane, NodeSpec};

use crate::Scenario;

pub const SCENARIOS: &[Scenario] =
    &[("lab::control_plane_serves", serves), ("kubernetes::manifests_pass_a_dry_run", dry_run)];

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: web}
  ports: [{port: 80}]
";

fn serves(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &[])).control())?;
    let start = Instant::now();
    let mut control = ControlPlane::start(&lab, &ControlPlane::assets()?)?;
    eprintln!("the API server was ready after {:?}", start.elapsed());

    control.apply(SERVICE)?;
    let path = "jsonpath={.spec.clusterIPs}";
    let addresses = || control.kubectl(&["get", "service", "web", "-o", path])?.success();
    let before = addresses()?;
    ensure!(before.contains("\"10.96.") && before.contains("\"fd00:10:96:"), "{before}");

    // From a node, over the wire, with a name that must be in the certificate.
    let ca = control.kubeconfig().with_file_name("ca.crt");
    let reached = lab
        .node("node-a")?
        .command("curl")?
        .args(["-sS", "--max-time", "5", "--cacert"])
        .arg(ca)
        .arg(format!("{}/version", control.url()))
        .run()?
        .success()?;
    ensure!(reached.contains("gitVersion"), "{reached}");

    // Roles are enforced: by certificate, and by a ServiceAccount's token.
    control.kubectl(&["create", "serviceaccount", "reader"])?.success()?;
    let get = ["get", "services"];
    for kubeconfig in [
        control.kubeconfig_for("system:node:node-a", &["nobodies"])?,
        control.kubeconfig_for_service_account("default", "reader")?,
    ] {
        let refused = control.kubectl_with(&kubeconfig, &get, "")?;
        ensure!(refused.stderr.contains("Forbidden"), "{refused}");
    }
    let role = ["create", "clusterrole", "read", "--verb=get,list", "--resource=services"];
    control.kubectl(&role)?.success()?;
    let binding = ["create", "clusterrolebinding", "read", "--clusterrole=read"];
    let binding = [&binding[..], &["--serviceaccount=default:reader"]].concat();
    control.kubectl(&binding)?.success()?;
    let reader = control.kubeconfig_for_service_account("default", "reader")?;
    kproxy_lab::wait_until("the role being in force", Duration::from_secs(5), || {
        Ok(control.kubectl_with(&reader, &get, "")?.status.success())
    })?;

    // An outage loses nothing.
    control.stop_api_server()?;
    ensure!(!control.kubectl(&["get", "services", "--request-timeout=2s"])?.status.success());
    control.start_api_server()?;
    let after = control.kubectl(&["get", "service", "web", "-o", path])?.success()?;
    ensure!(after == before, "{after} instead of {before}");
    Ok(())
}

/// What a cluster applies.
pub fn manifests() -> Result<Vec<PathBuf>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort_unstable();
    ensure!(!files.is_empty(), "there is none in {}", folder.display());
    Ok(files)
}

fn dry_run(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.control())?;
    let control = ControlPlane::start(&lab, &ControlPlane::assets()?)?;
    let mut kinds = String::new();
    for file in manifests()? {
        let text = fs::read_to_string(&file)?;
        let arguments = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"];
        let output = control.kubectl_with(&control.kubeconfig(), &arguments, &text)?;
        ensure!(!output.stderr.contains("Warning"), "{}: {output}", file.display());
        kinds += &output.success().with_context(|| file.display().to_string())?;
    }
    for kind in ["daemonset.apps/", "serviceaccount/", "clusterrole", "clusterrolebinding"] {
        ensure!(kinds.contains(kind), "no {kind} among: {kinds}");
    }
    // It was dry: nothing stays.
    let there = control.kubectl(&["get", "daemonsets", "--all-namespaces", "-o", "name"])?.success()?;
    ensure!(there.trim().is_empty(), "{there}");
    Ok(())
}
