//! The scenarios: each builds a lab, does something in it, and fails with evidence.
//!
//! One isolated run holds them all, one after the other. Arguments are libtest's: a name to filter
//! by, `--exact`, `--list`, `--skip`.

mod agent;
mod bridges;
mod closed_firewall;
mod cluster;
mod commands;
mod control;
mod devices;
mod drops;
mod dumps;
mod elb;
mod events;
mod explain;
mod fallbacks;
mod flood;
mod flows;
mod forged;
mod headers;
mod health_checks;
mod input;
mod kubernetes;
mod like_kube_proxy;
mod live;
mod local_addresses;
mod metrics;
mod node;
mod node_flows;
mod objects;
mod offloads;
mod opted_out;
mod packet_rules;
mod packets;
mod pass_through;
mod paths;
mod raw;
mod reach;
mod redirects;
mod restart;
mod safety;
mod segments;
mod shapes;
mod soak;
mod sockets;
mod source_ranges;
mod source_routes;
mod stacked;
mod tagged;
mod traceroute;
mod tunnels;
mod udp;
mod unseen;
mod uplinks;
mod workers;

use std::process::ExitCode;

use kproxy_lab::{Context, ControlPlane, KubeProxy, Run, isolated, kproxy_binary, worker};
use libtest_mimic::{Arguments, Failed, Trial};

/// A scenario's name and what it does.
pub type Scenario = (&'static str, fn(&Context) -> anyhow::Result<()>);

/// What a file of scenarios needs beyond the packages of the lab; an error says what is missing.
type Need = fn() -> anyhow::Result<()>;

/// Every file of scenarios.
const TOPICS: &[(Need, &[Scenario])] = &[
    (nothing, safety::SCENARIOS),
    (nothing, workers::SCENARIOS),
    (nothing, agent::SCENARIOS),
    (nothing, reach::SCENARIOS),
    (nothing, elb::SCENARIOS),
    (kubernetes, control::SCENARIOS),
    (kproxy, sockets::SCENARIOS),
    (kproxy, packets::SCENARIOS),
    (kproxy, flows::SCENARIOS),
    (kproxy, forged::SCENARIOS),
    (kproxy, flood::SCENARIOS),
    (kproxy, drops::SCENARIOS),
    (kproxy, soak::SCENARIOS),
    (kproxy, fallbacks::SCENARIOS),
    (kproxy, udp::SCENARIOS),
    (kproxy, unseen::SCENARIOS),
    (kproxy, opted_out::SCENARIOS),
    (kproxy, pass_through::SCENARIOS),
    (kproxy, paths::SCENARIOS),
    (kproxy, segments::SCENARIOS),
    (kproxy, traceroute::SCENARIOS),
    (kproxy, redirects::SCENARIOS),
    (kproxy, tunnels::SCENARIOS),
    (kproxy, raw::SCENARIOS),
    (kproxy, stacked::SCENARIOS),
    (kproxy, tagged::SCENARIOS),
    (kproxy, headers::SCENARIOS),
    (kproxy, packet_rules::SCENARIOS),
    (kproxy, offloads::SCENARIOS),
    (kproxy, source_ranges::SCENARIOS),
    (kproxy, live::SCENARIOS),
    (kproxy, restart::SCENARIOS),
    (kproxy, commands::SCENARIOS),
    (kproxy, explain::SCENARIOS),
    (kproxy, dumps::SCENARIOS),
    (kproxy, input::SCENARIOS),
    (kproxy, devices::SCENARIOS),
    (kproxy, local_addresses::SCENARIOS),
    (kproxy, uplinks::SCENARIOS),
    (kproxy, source_routes::SCENARIOS),
    (kproxy, bridges::SCENARIOS),
    (kproxy, health_checks::SCENARIOS),
    (kproxy, metrics::SCENARIOS),
    (kproxy, node::SCENARIOS),
    (kproxy, node_flows::SCENARIOS),
    (kproxy, closed_firewall::SCENARIOS),
    (kproxy_and_kubernetes, kubernetes::SCENARIOS),
    (kproxy_and_kubernetes, events::SCENARIOS),
    (kproxy_and_kube_proxy, like_kube_proxy::SCENARIOS),
];

/// Set where everything must be run, as in CI: what is missing is then a failure, not a skip.
const SKIP_NOTHING: &str = "KPROXY_SKIP_NOTHING";

fn main() -> ExitCode {
    if let Some(code) = worker::serve_if_asked() {
        return code;
    }
    if safety::is_held_run() {
        return safety::hold();
    }
    let mut arguments = Arguments::from_args();
    // Scenarios share the machine's two or more processors with what they start, and some measure.
    arguments.test_threads = Some(1);
    if arguments.list {
        return libtest_mimic::run(&arguments, trials(None)).exit_code();
    }
    isolated(|run| Ok(libtest_mimic::run(&arguments, trials(Some(&run))).exit_code()))
}

/// Without a run, only for listing.
fn trials(run: Option<&Run>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (need, scenarios) in TOPICS {
        let missing = match need() {
            Err(error) if std::env::var_os(SKIP_NOTHING).is_none() => Some(error),
            _ => None,
        };
        if let (Some(error), Some(_)) = (&missing, run) {
            let names: Vec<_> = scenarios.iter().map(|(name, _)| *name).collect();
            eprintln!("skipped: {}: {error:#}", names.join(", "));
        }
        for &(name, scenario) in *scenarios {
            let run = run.cloned();
            let trial = Trial::test(name, move || {
                let run = run.ok_or_else(|| Failed::from("not in an isolated run"))?;
                Context::scenario(&run, name, scenario).map_err(|error| Failed::from(causes(&error)))
            });
            trials.push(trial.with_ignored_flag(missing.is_some()));
        }
    }
    trials
}

fn nothing() -> anyhow::Result<()> {
    Ok(())
}

fn kubernetes() -> anyhow::Result<()> {
    ControlPlane::assets().map(drop)
}

fn kproxy() -> anyhow::Result<()> {
    kproxy_binary().map(drop)
}

fn kproxy_and_kubernetes() -> anyhow::Result<()> {
    kproxy()?;
    kubernetes()
}

fn kproxy_and_kube_proxy() -> anyhow::Result<()> {
    kproxy()?;
    KubeProxy::binary(&ControlPlane::assets()?).map(drop)
}

/// The error and what caused it, a line each.
fn causes(error: &anyhow::Error) -> String {
    let causes: Vec<_> = error.chain().map(ToString::to_string).collect();
    causes.join("\n  because: ")
}
