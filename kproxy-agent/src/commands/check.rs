//! `kproxy check`: can this node run kproxy; what is missing, and what that costs.

mod behaviour;
mod node;
mod order;

use std::path::Path;

use anyhow::{Result, bail};
use serde::Serialize;

use super::print;
use crate::{
    cli::{CheckArgs, Common},
    maps::kernel::probe_batches,
    node::{cgroup_root, demand_capabilities},
    programs::{self, Capacities, LoadError, Programs, has_set_retval, has_tcx, namespace_cookie},
};

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// Works, at a cost.
    Warning,
    /// kproxy cannot run.
    Failed,
}

#[derive(Serialize)]
struct Finding {
    check: &'static str,
    status: Status,
    detail: String,
}

#[derive(Serialize)]
struct Report {
    checks: Vec<Finding>,
    programs: Vec<ProgramSize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<Refused>,
}

/// A program that the kernel refused.
#[derive(Serialize)]
struct Refused {
    program: String,
    /// All that its verifier said.
    log: String,
    /// The last of it, and how many lines are before: for people.
    #[serde(skip)]
    last_lines: (Vec<String>, usize),
}

/// What a program costs to load.
#[derive(Serialize)]
struct ProgramSize {
    name: String,
    /// Those that the kernel holds.
    instructions: u32,
    /// Those that its verifier walked; not told before 5.16.
    verified: Option<u32>,
}

/// Prints what was found; an error if the node cannot run kproxy.
pub fn run(common: &Common, args: &CheckArgs) -> Result<()> {
    let privileges = privileges();
    // A kernel that does not let us ask does not say what it can do.
    let may_ask = privileges.status == Status::Ok;
    let asked = |check: &'static str, ask: fn() -> Finding| {
        if may_ask { ask() } else { finding(check, Status::Warning, "not told without these capabilities") }
    };
    let (loads, programs, refused) =
        if may_ask { loads() } else { (asked("programs", tcx), Vec::new(), None) };
    let checks = vec![
        privileges,
        bpffs(&common.bpf_root),
        cgroup(args.cgroup.cgroup_root.as_deref()),
        loads,
        asked("bpf_set_retval", set_retval),
        asked("tcx", tcx),
        asked("map batches", batches),
        netns_cookie(),
        node::kube_proxy(),
        node::leftovers(&common.bpf_root),
        node::forward_policy(),
        node::routing_by_source(&common.bpf_root),
        node::bridges(),
        node::reserved_ports(),
        node::forwarding(),
        asked("order of packet hooks", order::packet_hooks),
        behaviour::early_rules(&common.bpf_root),
        behaviour::ipsec(),
        behaviour::in_kernel_clients(),
    ];
    let failed = checks.iter().filter(|finding| finding.status == Status::Failed).count();
    print::print(&Report { checks, programs, refused }, args.output, text)?;
    if failed > 0 {
        bail!("this node cannot run kproxy: {failed} of the checks above failed");
    }
    Ok(())
}

fn text(report: &Report, wide: bool) -> String {
    let rows: Vec<Vec<String>> = report
        .checks
        .iter()
        .map(|finding| {
            let status = match finding.status {
                Status::Ok => "ok",
                Status::Warning => "warning",
                Status::Failed => "FAILED",
            };
            vec![finding.check.to_owned(), status.to_owned(), finding.detail.clone()]
        })
        .collect();
    let mut checks = print::table(&["CHECK", "STATUS", "DETAIL"], &rows);
    if let Some(Refused { program, last_lines: (lines, before), .. }) = &report.refused
        && !lines.is_empty()
    {
        checks.push_str(&format!("\nThe verifier about {program}"));
        if *before > 0 {
            checks.push_str(&format!(", the last lines ({before} before them: --output json)"));
        }
        checks.push_str(":\n");
        for line in lines {
            checks.push_str(&format!("  {line}\n"));
        }
    }
    if !wide || report.programs.is_empty() {
        return checks;
    }
    let rows: Vec<Vec<String>> = report
        .programs
        .iter()
        .map(|ProgramSize { name, instructions, verified }| {
            vec![name.clone(), instructions.to_string(), verified.map_or_else(String::new, |n| n.to_string())]
        })
        .collect();
    format!("{checks}\n{}", print::table(&["PROGRAM", "INSTRUCTIONS", "VERIFIED"], &rows))
}

fn finding(check: &'static str, status: Status, detail: impl Into<String>) -> Finding {
    Finding { check, status, detail: detail.into() }
}

fn from_result(check: &'static str, result: Result<String>) -> Finding {
    match result {
        Ok(detail) => finding(check, Status::Ok, detail),
        Err(error) => finding(check, Status::Failed, super::in_words(&error)),
    }
}

fn privileges() -> Finding {
    let result = demand_capabilities();
    from_result("privileges", result.map(|()| "the capabilities that are needed are here".to_owned()))
}

fn bpffs(root: &Path) -> Finding {
    let result = programs::check_on_bpffs(root).map_err(anyhow::Error::from);
    from_result("bpf file system", result.map(|()| format!("{} is on one", root.display())))
}

fn cgroup(given: Option<&Path>) -> Finding {
    from_result(
        "cgroup v2",
        cgroup_root(given).map(|path| format!("serves the processes of {}", path.display())),
    )
}

fn loads() -> (Finding, Vec<ProgramSize>, Option<Refused>) {
    let loaded = Programs::load_unpinned(&Capacities::SMALL).map(|programs| programs.sizes());
    let refused = loaded.as_ref().err().and_then(refused);
    let programs = loaded.iter().flatten().map(|(name, instructions, verified)| ProgramSize {
        name: name.clone(),
        instructions: *instructions,
        verified: *verified,
    });
    let programs = programs.collect();
    let result = loaded.map(|sizes| {
        let most = sizes.iter().filter_map(|(name, _, verified)| Some((verified.as_ref()?, name))).max();
        match most {
            Some((verified, name)) => {
                format!(
                    "all {} accepted; {name} cost the verifier most: {verified} instructions",
                    sizes.len()
                )
            }
            None => format!("all {} accepted", sizes.len()),
        }
    });
    (from_result("programs", result.map_err(anyhow::Error::from)), programs, refused)
}

fn refused(error: &LoadError) -> Option<Refused> {
    let LoadError::Program { name, refusal } = error else {
        return None;
    };
    let (log, last_lines) = (refusal.log().to_owned(), refusal.last_lines());
    Some(Refused { program: name.clone(), log, last_lines })
}

fn set_retval() -> Finding {
    let check = "bpf_set_retval";
    if has_set_retval() {
        return finding(check, Status::Ok, "a Service without endpoints refuses with ECONNREFUSED");
    }
    let cost = "not in this kernel (5.18): connections to a Service without endpoints are refused by way of \
                loopback, unconnected datagrams to it fail with EPERM";
    finding(check, Status::Warning, cost)
}

fn tcx() -> Finding {
    let check = "tcx";
    if has_tcx() {
        return finding(check, Status::Ok, "packet programs are attached by links, in order with others");
    }
    finding(check, Status::Warning, "not in this kernel (6.6): packet programs are attached to clsact qdiscs")
}

fn batches() -> Finding {
    match probe_batches() {
        Ok(true) => finding("map batches", Status::Ok, "hash maps are written in batches"),
        Ok(false) => {
            let cost =
                "not in this kernel (5.6): a first load of 10,000 Services takes about ten times as long";
            finding("map batches", Status::Warning, cost)
        }
        Err(error) => finding("map batches", Status::Failed, format!("no map can be made: {error}")),
    }
}

fn netns_cookie() -> Finding {
    match namespace_cookie() {
        Ok(Some(cookie)) => finding("network namespace", Status::Ok, format!("cookie {cookie}")),
        Ok(None) => {
            let cost = "SO_NETNS_COOKIE is not in this kernel (5.14): the host is taken to be the machine's first \
                        network namespace";
            finding("network namespace", Status::Warning, cost)
        }
        Err(error) => finding("network namespace", Status::Failed, format!("cannot be told: {error}")),
    }
}
