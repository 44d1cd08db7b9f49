//! Connections per second: a ClusterIP against the same pod asked directly, with one Service and with many, and
//! a node without kproxy.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context as _, Result};
use kproxy_lab::{Agent, Context, Lab, Manifests, NodeSpec};

use crate::arms::{self, Arm, Place, Rounds, Took, Work};
use crate::objects::{self, PORT, TARGET};
use crate::options::Options;
use crate::{print, server};

/// Connections in an arm's batch.
const BATCH: usize = 100;
/// How far an A/A ratio may be off.
const STEADY: f64 = 0.02;
/// How long the agent with many Services may take.
const LOADED: Duration = Duration::from_secs(120);

/// What is compared: by the places of the arms.
struct Compared {
    what: &'static str,
    arm: usize,
    base: usize,
    /// Both are the same: the ratio says what the others are worth.
    is_same: bool,
}

/// Measures, prints, and says whether the A/A ratios allow the others to be believed.
pub fn measure(ctx: &Context, options: &Options) -> Result<bool> {
    // One Service, many, and no agent at all. A pod that asks and one that answers on each.
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
            .node(NodeSpec::new("node-b", 2, &["b1", "b2"]))
            .node(NodeSpec::new("node-c", 3, &["c1", "c2"]))
    })?;
    let one = node(&lab, "node-a", "a2", Some(1))?;
    let many = node(&lab, "node-b", "b2", Some(options.services))?;
    let none = node(&lab, "node-c", "c2", None)?;
    let arm = |name: &str, pod: &str, targets: Vec<SocketAddrV4>| {
        anyhow::Ok(Arm { name: name.to_owned(), place: Place::of(lab.pod(pod)?)?, targets })
    };
    let arms = [
        arm("one Service, direct", "a1", one.direct())?,
        arm("one Service, direct again", "a1", one.direct())?,
        arm("one Service, ClusterIP", "a1", cluster_ips(1))?,
        arm("many Services, direct", "b1", many.direct())?,
        arm("many Services, direct again", "b1", many.direct())?,
        arm("many Services, a random ClusterIP", "b1", cluster_ips(options.services))?,
        arm("without kproxy", "c1", none.direct())?,
    ];
    let compared = [
        Compared { what: "A/A, one Service", arm: 1, base: 0, is_same: true },
        Compared { what: "A/A, many Services", arm: 4, base: 3, is_same: true },
        Compared { what: "ClusterIP ÷ direct, one Service", arm: 2, base: 0, is_same: false },
        Compared { what: "ClusterIP ÷ direct, many Services", arm: 5, base: 3, is_same: false },
        Compared { what: "ClusterIP, many ÷ one Service", arm: 5, base: 2, is_same: false },
        Compared { what: "direct, with kproxy ÷ without", arm: 0, base: 6, is_same: false },
    ];
    let mut are_steady = true;
    for (title, work) in
        [("Connect, request, response, close", Work::Request), ("Connect, close", Work::Connect)]
    {
        let rounds = arms::run(&arms, work, options.rounds, BATCH)?;
        print_rates(title, &arms, &rounds);
        are_steady &= print_ratios(&compared, &rounds, options);
    }
    Ok(are_steady)
}

/// A node that is ready to be asked; its agent lives as long as this.
struct Ready {
    endpoints: Vec<Ipv4Addr>,
    _agent: Option<Agent>,
}

impl Ready {
    fn direct(&self) -> Vec<SocketAddrV4> {
        self.endpoints.iter().map(|address| SocketAddrV4::new(*address, TARGET)).collect()
    }
}

fn cluster_ips(services: usize) -> Vec<SocketAddrV4> {
    (0..services).map(|number| SocketAddrV4::new(objects::cluster_ip(number), PORT)).collect()
}

/// Every Service leads to the ten addresses of one pod, so that each can be asked.
fn node(lab: &Lab, name: &str, server: &str, services: Option<usize>) -> Result<Ready> {
    let (node, pod) = (lab.node(name)?, lab.pod(server)?);
    let endpoints = server::addresses(node, pod)?;
    server::start(pod)?;
    let agent = services.map(|services| {
        let folder = Manifests::create(node.folder(), "manifests")?;
        objects::write(&folder, services, &endpoints)?;
        let mut agent = node.agent().manifests(&folder).start()?;
        agent.wait_log("it being synced", LOADED, |line| line.message == "synced")?;
        anyhow::Ok(agent)
    });
    let agent = agent.transpose().with_context(|| format!("the agent on {name}"))?;
    Ok(Ready { endpoints, _agent: agent })
}

fn print_rates(title: &str, arms: &[Arm], rounds: &Rounds) {
    let rows: Vec<_> = arms
        .iter()
        .enumerate()
        .map(|(place, arm)| vec![arm.name.clone(), format!("{:.0}", rounds.rate(place, BATCH))])
        .collect();
    print::table(title, &["arm", "connections/s"], &rows);
}

/// Whether the A/A ratios are within bounds: by the processors' time, which other work on the machine does not
/// count for.
fn print_ratios(compared: &[Compared], rounds: &Rounds, options: &Options) -> bool {
    let mut are_steady = true;
    let rows: Vec<_> = compared
        .iter()
        .map(|Compared { what, arm, base, is_same }| {
            let wall = rounds.ratio(*arm, *base, |took: &Took| took.wall);
            let processor = rounds.ratio(*arm, *base, |took: &Took| took.processor);
            are_steady &= !is_same || (processor - 1.0).abs() <= STEADY;
            vec![(*what).to_owned(), format!("{wall:.3}"), format!("{processor:.3}")]
        })
        .collect();
    let title = format!(
        "Time of one as a multiple of the other's; medians of {} paired rounds of {BATCH} connections",
        options.rounds
    );
    print::table(&title, &["", "by the clock", "processor time"], &rows);
    are_steady
}
