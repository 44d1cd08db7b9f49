//! Kubernetes' test program: which specs it has, and a run of them.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kproxy_lab::cluster::Cluster;

use crate::Settings;
use crate::results::{SpecResult, State, read_new};

/// More than all specs take on a slow machine.
const DEADLINE: Duration = Duration::from_secs(2 * 3600);

pub struct TestRun<'a> {
    settings: &'a Settings,
    folder: PathBuf,
}

impl<'a> TestRun<'a> {
    /// `folder` is where its results go.
    pub fn new(settings: &'a Settings, folder: PathBuf) -> Self {
        Self { settings, folder }
    }

    /// The names of the specs that match `focus` and not `skip`.
    pub fn selected(&self, focus: &str, skip: &str) -> Result<Vec<String>> {
        let file = self.folder.join(".selected.jsonl");
        let output = Command::new(self.settings.programs.join("e2e.test"))
            .args(["--ginkgo.dry-run", "--ginkgo.no-color", "--ginkgo.seed=1"])
            .arg(format!("--ginkgo.focus={focus}"))
            .arg(format!("--ginkgo.skip={skip}"))
            .arg(format!("--kproxy.results={}", file.display()))
            .args(["--provider=skeleton", "--kubeconfig=/nonexistent"])
            .stdin(Stdio::null())
            .output()
            .context("cannot run Kubernetes' test program")?;
        if !output.status.success() {
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
            let tail = lines[lines.len().saturating_sub(8)..].join("\n  ");
            bail!("Kubernetes' test program does not take this:\n  {tail}");
        }
        let text = match fs::read_to_string(&file) {
            // Nothing was selected, so nothing was written.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            other => other.with_context(|| format!("cannot read {}", file.display()))?,
        };
        // The next question is written to a file of the same name.
        let _ = fs::remove_file(&file);
        Ok(read_new(&text, &mut 0)?.into_iter().map(|result| result.spec).collect())
    }

    /// Runs them, printing each as it ends.
    pub fn run(&self, cluster: &Cluster) -> Result<Vec<SpecResult>> {
        let logs = self.folder.join("failed");
        fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
        let file = self.folder.join("results.jsonl");
        let settings = self.settings;
        let mut process = cluster
            .command(settings.programs.join("ginkgo"))?
            .env("KUBE_TEST_REPO_LIST", &settings.registries)
            .arg(format!("--procs={}", settings.procs))
            .args(["--no-color", "--timeout=2h", "--poll-progress-after=0"])
            .arg(format!("--focus={}", settings.focus))
            .arg(format!("--skip={}", settings.skip))
            .arg("--junit-report=junit.xml")
            .arg(format!("--output-dir={}", self.folder.display()))
            .arg(settings.programs.join("e2e.test"))
            .arg("--")
            .arg(format!("--kproxy.results={}", file.display()))
            .arg(format!("--kproxy.logs={}", logs.display()))
            .arg(format!("--kubeconfig={}", cluster.control().kubeconfig().display()))
            .args(["--provider=skeleton", "--allowed-not-ready-nodes=0"])
            .arg(format!("--num-nodes={}", settings.nodes))
            .spawn()?;
        let start = Instant::now();
        let mut offset = 0;
        let mut ended: Vec<SpecResult> = Vec::new();
        loop {
            let running = process.is_running()?;
            let text = fs::read_to_string(&file).unwrap_or_default();
            for result in read_new(&text, &mut offset)? {
                print(&result);
                ended.push(result);
            }
            if !running {
                break;
            }
            ensure!(start.elapsed() < DEADLINE, "the tests are not done within two hours");
            std::thread::sleep(Duration::from_millis(200));
        }
        for (name, path) in [("ginkgo.out", process.stdout_path()), ("ginkgo.err", process.stderr_path())] {
            fs::copy(&path, self.folder.join(name))
                .with_context(|| format!("cannot copy {}", path.display()))?;
        }
        if ended.is_empty() {
            let text = format!("{}{}", process.stdout(), process.stderr());
            let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
            bail!("no spec was run:\n  {}", lines[lines.len().saturating_sub(15)..].join("\n  "));
        }
        Ok(ended)
    }
}

fn print(result: &SpecResult) {
    println!("{:>7.1} s  {:7}  {}", result.seconds, result.state.word(), result.spec);
    if result.state == State::Failed {
        for line in result.message.lines().take(6) {
            println!("                     {line}");
        }
    }
}
