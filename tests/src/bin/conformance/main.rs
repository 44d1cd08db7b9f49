//! Kubernetes' own tests of its network against a cluster in the lab. Started by `cargo xtask conformance`, which builds
//! what it takes and tells it by an environment variable.

mod report;
mod results;
mod tests_run;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use kproxy_lab::cluster::{Cluster, ClusterProxy, ClusterSpec, enter_command, remove_legacy_leftovers};
use kproxy_lab::{Context, Run};
use nix::sys::signal::{SigSet, Signal};
use serde::Deserialize;

use results::State;
use tests_run::TestRun;

/// What `cargo xtask conformance` says.
#[derive(Debug, Deserialize)]
struct Settings {
    programs: PathBuf,
    images: Vec<PathBuf>,
    /// The file that tells Kubernetes' tests where their images are from.
    registries: PathBuf,
    coredns: String,
    pause: String,
    manifests: PathBuf,
    /// The folder for results; this run's are in one of its own below it.
    results: PathBuf,
    /// Where the whole table goes besides, as a page.
    report: Option<PathBuf>,
    focus: String,
    skip: String,
    /// Patterns that are part of `skip`, with the reason.
    left_out: Vec<(String, String)>,
    keep: bool,
    kube_proxy: bool,
    nodes: u8,
    procs: u8,
}

const SETTINGS: &str = "KPROXY_CONFORMANCE";

fn main() -> ExitCode {
    let code = kproxy_lab::isolated(|run| {
        let text = std::env::var(SETTINGS).context("start it by `cargo xtask conformance`")?;
        let settings: Settings =
            serde_json::from_str(&text).with_context(|| format!("{SETTINGS} is strange"))?;
        let mut all_passed = false;
        Context::scenario(&run, "conformance", |ctx| {
            all_passed = inside(ctx, &run, &settings)?;
            Ok(())
        })?;
        Ok(if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    });
    // An interrupted run did not come to it.
    if let Err(error) = remove_legacy_leftovers() {
        eprintln!("left behind: {error:#}");
    }
    code
}

/// The whole run; tells whether every spec passed.
fn inside(ctx: &Context, run: &Run, settings: &Settings) -> Result<bool> {
    let start = Instant::now();
    let name = run.folder().file_name().context("the run's folder has no name")?.to_string_lossy();
    let folder = settings.results.join(name.replace("kproxy-lab-", "run-"));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let tests = TestRun::new(settings, folder.clone());
    let selected = tests.selected(&settings.focus, &settings.skip)?;
    if selected.is_empty() {
        bail!(
            "no spec matches --focus '{}'{}: names begin as in '[sig-network] Services should …'",
            settings.focus,
            if settings.skip.is_empty() { String::new() } else { format!(" without '{}'", settings.skip) }
        );
    }
    let proxy = if settings.kube_proxy { ClusterProxy::KubeProxy } else { ClusterProxy::Kproxy };
    let step = |what: &str| println!("{:>6.1} s  {what}", start.elapsed().as_secs_f64());
    let spec = ClusterSpec {
        programs: settings.programs.clone(),
        images: settings.images.clone(),
        coredns: settings.coredns.clone(),
        pause: settings.pause.clone(),
        manifests: settings.manifests.clone(),
        nodes: settings.nodes,
    };
    let cluster = Cluster::start(ctx, spec, step)?;
    let installed = cluster.install(proxy, step);
    if let Err(error) = installed {
        cluster.save_state(&folder)?;
        if settings.keep {
            eprintln!("error: {error:#}");
            keep(&cluster)?;
        }
        return Err(error.context(format!("logs are in {}", folder.display())));
    }
    step(&format!("{} specs, {} at a time", selected.len(), settings.procs));
    let results = tests.run(&cluster)?;
    cluster.save_state(&folder.join("cluster"))?;
    save_node_logs(&cluster, &folder)?;

    let failed = results.iter().filter(|result| result.state == State::Failed).count();
    report::print(&results, start.elapsed(), &folder);
    if let Some(page) = &settings.report {
        let left_out = settings
            .left_out
            .iter()
            .map(|(pattern, reason)| Ok((reason.as_str(), tests.selected(pattern, "")?)))
            .collect::<Result<Vec<_>>>()?;
        let text = report::page(&results, &left_out, start.elapsed(), settings.nodes);
        fs::write(page, text).with_context(|| format!("cannot write {}", page.display()))?;
        println!("written: {}", page.display());
    }
    if settings.keep {
        keep(&cluster)?;
    }
    Ok(failed == 0 && results.len() >= selected.len())
}

fn save_node_logs(cluster: &Cluster, folder: &std::path::Path) -> Result<()> {
    for node in cluster.nodes() {
        let target = folder.join("cluster").join(node.name());
        fs::create_dir_all(&target).with_context(|| format!("cannot make {}", target.display()))?;
        for name in ["containerd.log", "kubelet.log"] {
            let source = node.logs().join(name);
            fs::copy(&source, target.join(name))
                .with_context(|| format!("cannot copy {}", source.display()))?;
        }
    }
    Ok(())
}

/// Says how to look around, and waits for Ctrl-C.
fn keep(cluster: &Cluster) -> Result<()> {
    let control = cluster.control();
    let lab = cluster.lab();
    println!("\nThe cluster stands until Ctrl-C. In another terminal, as root:\n");
    println!("a shell with kubectl:\n    {}", lab.enter_command(control.member()));
    println!(
        "    export KUBECONFIG={} PATH={}:$PATH",
        control.kubeconfig().display(),
        cluster.programs().display()
    );
    for node in cluster.nodes() {
        println!("a shell on {}:\n    {}", node.name(), enter_command(lab, node)?);
    }
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    signals.wait()?;
    Ok(())
}
