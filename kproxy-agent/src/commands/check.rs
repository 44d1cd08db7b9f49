//! `kproxy check`: can this node run kproxy; what is missing, and what that costs.

mod node;

use std::{fs, path::Path};

use anyhow::{Result, bail};
use serde::Serialize;

use super::print;
use crate::{
    cli::{CheckArgs, Common},
    maps::kernel::probe_batches,
    node::cgroup_root,
    programs::{self, Capacities, Programs, has_set_retval, has_tcx, namespace_cookie},
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
    let (loads, programs) = loads();
    let checks = vec![
        privileges(),
        bpffs(&common.bpf_root),
        cgroup(args.cgroup.cgroup_root.as_deref()),
        loads,
        set_retval(),
        tcx(),
        batches(),
        netns_cookie(),
        node::kube_proxy(),
        node::ipvs(),
        node::forward_policy(),
        node::bridges(),
        node::reserved_ports(),
        node::forwarding(),
    ];
    let failed = checks.iter().filter(|finding| finding.status == Status::Failed).count();
    print::print(&Report { checks, programs }, args.output, text)?;
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
    let checks = print::table(&["CHECK", "STATUS", "DETAIL"], &rows);
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
        Err(error) => finding(check, Status::Failed, format!("{error:#}")),
    }
}

/// The bits of CapEff (capabilities(7)) that the agent needs, with their numbers.
const CAPABILITIES: [(&str, u32); 2] = [("CAP_NET_ADMIN", 12), ("CAP_BPF", 39)];
const CAP_SYS_ADMIN: u32 = 21;

fn privileges() -> Finding {
    let check = "privileges";
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or(0);
    let has = |bit: u32| effective & (1 << bit) != 0;
    let missing: Vec<&str> = CAPABILITIES
        .into_iter()
        .filter(|(name, bit)| !(has(*bit) || *name == "CAP_BPF" && has(CAP_SYS_ADMIN)))
        .map(|(name, _)| name)
        .collect();
    if missing.is_empty() {
        return finding(check, Status::Ok, "the capabilities that are needed are here");
    }
    let detail =
        format!("{} missing: run as root, or give the pod these capabilities", missing.join(" and "));
    finding(check, Status::Failed, detail)
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

fn loads() -> (Finding, Vec<ProgramSize>) {
    let loaded = Programs::load_unpinned(&Capacities::SMALL).map(|programs| programs.sizes());
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
    (from_result("programs", result.map_err(anyhow::Error::from)), programs)
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
