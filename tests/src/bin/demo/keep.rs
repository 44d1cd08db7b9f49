//! The lab left standing: how to look around from another terminal, until told to end.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufRead as _};
use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result};
use kproxy_lab::{Elb, Family, kproxy_binary};

use crate::cluster::{Cluster, SERVICE_FILE};
use crate::tell::{Style, Tell};

/// Says how to look around, and waits for Enter. A signal ends the whole run, and needs nothing here.
pub fn stand(tell: &mut Tell, cluster: &Cluster) -> Result<()> {
    let lab = &cluster.lab;
    let init = lab.run().init_pid().context("the run's first process is not known")?;
    let script = lab.folder().join("enter");
    fs::write(&script, enter_script(cluster, init)?)
        .with_context(|| format!("cannot write {}", script.display()))?;
    // The run's folder is a mount of its own: this is how the machine sees it.
    let outside = |path: &Path| format!("/proc/{init}/root{}", path.display());

    let vip = cluster.vip(Family::V4)?;
    let service = outside(&cluster.manifests.path().join(SERVICE_FILE));
    let lines = [
        ("lab client-c", "a shell in a pod, `exit` leaves it"),
        (&format!("lab client-c curl http://{vip}/"), "a request"),
        (
            &format!("lab elb curl -s '{}' | grep ^nginx | cut -d, -f1,2,8", Elb::statistics_url()),
            "connections that the ELB counted",
        ),
        ("lab node-c kproxy services", "what a node serves, from its maps"),
        ("lab node-c sh -c 'ls $KPROXY_BPF_ROOT'", "its pinned maps and programs"),
        ("lab node-c sh -c 'bpftool map dump pinned $KPROXY_BPF_ROOT/frontend'", ""),
        (&format!("vi {service}"), "the Service; change the annotation, the agents follow"),
    ];
    tell.step("The lab stands. From another terminal, as root:");
    tell.blank();
    tell.line(format!("lab() {{ sh {} \"$@\"; }}", outside(&script)));
    tell.blank();
    for (command, about) in lines {
        if !about.is_empty() {
            tell.line(tell.style(Style::Dim, format!("# {about}")));
        }
        tell.line(command);
    }
    tell.blank();
    let names: Vec<_> = lab.members().map(|member| member.name()).collect();
    tell.line(format!("Members: {}", names.join(", ")));
    tell.line(tell.style(Style::Bold, "Enter or Ctrl-C takes it down."));
    wait_for_enter()
}

/// Waits for a line on standard input; for ever where that is closed, as without a terminal.
fn wait_for_enter() -> Result<()> {
    let mut line = String::new();
    if io::stdin().lock().read_line(&mut line).context("cannot read standard input")? > 0 {
        return Ok(());
    }
    loop {
        thread::park();
    }
}

/// A shell script that runs a command, or a shell, in a member of the lab.
fn enter_script(cluster: &Cluster, init: u32) -> Result<String> {
    let lab = &cluster.lab;
    let binary = kproxy_binary()?;
    let programs = binary.parent().context("the binary is in a folder")?;
    let mut cases = String::new();
    for member in lab.members() {
        let name = member.name();
        let group = quoted(member.cgroup());
        write!(cases, "{name}) group={group}")?;
        if let Ok(node) = lab.node(name) {
            let [pins, root] = [node.bpf_root(), node.cgroup_root()].map(quoted);
            write!(cases, "; export KPROXY_BPF_ROOT={pins} KPROXY_CGROUP_ROOT={root}")?;
        }
        cases.push_str(" ;;\n");
    }
    let rc = lab.folder().join("bashrc");
    fs::write(&rc, "PS1=\"$LAB_MEMBER# \"\n").with_context(|| format!("cannot write {}", rc.display()))?;
    Ok(format!(
        "# Runs a command, or a shell, in a member of the lab: its cgroup, then its namespaces.\n\
         member=$1\n\
         [ $# -eq 0 ] || shift\n\
         case $member in\n\
         {cases}\
         *) echo \"usage: lab MEMBER [COMMAND]\" >&2; exit 2 ;;\n\
         esac\n\
         echo $$ > \"$group/cgroup.procs\" || exit 1\n\
         [ $# -gt 0 ] || set -- bash --rcfile {rc} -i\n\
         export LAB_MEMBER=$member PATH={programs}:$PATH\n\
         exec nsenter --target {init} --mount --pid nsenter --net=/run/netns/$member \"$@\"\n",
        rc = quoted(&rc),
        programs = quoted(programs),
    ))
}

/// A path as one word of a shell.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}
