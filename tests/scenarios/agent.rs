//! The handle on an agent, tried on a script in its place: starting, its log, signals, restarts.
//! What the real agent does is in files of its own.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use kproxy_lab::{Context, Manifests, NodeSpec, cgroup_processes, wait_until};
use nix::sys::signal::Signal;

use crate::Scenario;

pub const SCENARIOS: &[Scenario] = &[("lab::an_agents_handle", handle)];

/// Says "synced" at the start, and again after each change of the number of files in the folder
/// that follows `--manifests`; ends with 3 on SIGTERM.
const SCRIPT: &str = r#"#!/bin/sh
trap 'exit 3' TERM
say() { echo "{\"level\":\"INFO\",\"fields\":{\"message\":\"$1\",\"files\":$seen}}" >&2; }
echo "$@"
seen=0
for word; do [ "$last" = --manifests ] && folder=$word; last=$word; done
say synced
while :; do
  now=$(ls "$folder" | wc -l)
  if [ "$now" != "$seen" ]; then seen=$now; say change; say synced; fi
  sleep 0.01
done
"#;

fn handle(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1"])))?;
    let node = lab.node("node-a")?;
    let script = lab.folder().join("agent.sh");
    fs::write(&script, SCRIPT)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let manifests = Manifests::create(node.folder(), "manifests")?;
    let builder = node.agent().binary(&script).manifests(&manifests);

    let mut agent = builder.start()?;
    agent.wait_synced()?;
    let words = agent.process().stdout();
    for expected in [
        format!("agent --bpf-root {}", node.bpf_root().display()),
        format!("--cgroup-root {}", node.cgroup_root().display()),
        String::from("--node-name node-a"),
        String::from("--node-address 192.0.2.11 --node-address 2001:db8::11"),
        String::from("--cluster-cidr 10.244.1.0/24,fd00:10:244:1::/64"),
        format!("--manifests {}", manifests.path().display()),
    ] {
        ensure!(words.contains(&expected), "no {expected} in: {words}");
    }
    let agents = cgroup_processes(&node.cgroup_root().join("agent"))?;
    ensure!(agents.contains(&agent.process().pid()), "{agents:?}");

    agent.apply(|| manifests.write("a.yaml", "kind: Service\n"))?;
    ensure!(agent.log_since_mark()[0].field("files").as_deref() == Some("1"));
    agent.apply(|| manifests.remove("a.yaml"))?;
    // A "synced" from before a change does not count.
    agent.mark();
    let soon = Duration::from_millis(100);
    ensure!(agent.wait_log("nothing", soon, |line| line.message == "synced").is_err());

    ensure!(agent.kill(Signal::SIGTERM)?.code() == Some(3));
    // Waiting for a dead agent is an error at once.
    let error = agent.wait_synced().expect_err("it has ended");
    ensure!(format!("{error:#}").contains("exit status: 3"), "{error:#}");
    agent.restart()?;
    agent.wait_synced()?;
    let before = agent.process().pid();
    agent.restart()?;
    agent.wait_synced()?;
    ensure!(agent.process().pid() != before);
    drop(agent);
    wait_until("no agent process", Duration::from_secs(5), || {
        Ok(cgroup_processes(&node.cgroup_root().join("agent"))?.is_empty())
    })?;
    ensure!(node.dump_maps()?.is_empty(), "nobody has pinned a map");
    Ok(())
}
