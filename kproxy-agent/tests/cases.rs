//! Cases as text: objects in, printed tables out, then the objects go in other orders until nothing is left.
//!
//! A case is a file in `cases/`: what rule it shows and where the rule comes from, then steps. A step is
//! YAML after a line `=== objects` (a document with `delete: Service default/nginx` takes one away), the
//! tables after it below `=== tables`, questions as `CLIENT -> ADDRESS:PORT/PROTOCOL` with their answers below
//! `=== explain`, and, where a Service has a healthCheckNodePort, what it answers below `=== health`.
//! `UPDATE_CASES=1 cargo test --test cases` writes tables and answers anew.
//!
//! Every case is also written to maps in memory by the agent's planner, once for each write with that write
//! failing: the tables are the same in the end, and empty when all objects are gone.

#[path = "cases/answers.rs"]
mod answers;
#[path = "cases/input.rs"]
mod input;
#[path = "cases/table.rs"]
mod table;
#[path = "cases/writes.rs"]
mod writes;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use input::{Case, Event, Printed, Step};
use kproxy::model::{Model, NodeConfig, Problem, Update, WantedHealthCheck, WantedNode};
use kproxy::wanted::{ServiceKey, WantedOptOuts, WantedService};

#[test]
fn cases() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no case in {}", folder.display());
    let (mut failures, mut failed_writes) = (Vec::new(), 0);
    for path in &paths {
        match run(path) {
            Ok(writes) => failed_writes += writes,
            Err(error) => failures.push(format!("{}: {error:#}", path.display())),
        }
    }
    println!("{} cases, and {failed_writes} runs with one write failing", paths.len());
    assert!(
        failures.is_empty(),
        "{} of {} cases failed:\n\n{}",
        failures.len(),
        paths.len(),
        failures.join("\n\n")
    );
}

/// How many writes were made to fail.
fn run(path: &Path) -> Result<u64> {
    let case = Case::read(path)?;
    let mut follower = Follower::new(case.config.clone());
    let mut all_printed = Vec::new();
    for (number, Step { events, printed }) in case.steps.iter().enumerate() {
        let step = || format!("step {}", number + 1);
        follower.take(events).with_context(step)?;
        let now = Printed {
            tables: follower.print(),
            explain: answers::answer(&follower.model, &case, &printed.explain).with_context(step)?,
            health: follower.print_health(),
        };
        let sections = [
            (&now.tables, &printed.tables),
            (&now.explain, &printed.explain),
            (&now.health, &printed.health),
        ];
        for (now, expected) in sections {
            if !input::is_update() && now != expected {
                bail!("step {}: expected\n{expected}\nbut is\n{now}", number + 1);
            }
        }
        all_printed.push(now);
    }
    if input::is_update() {
        case.write(path, &all_printed)?;
    }
    check_orders(&case, &follower)?;
    writes::check(&case)
}

/// The objects that are left at the end, in other orders, give the same tables; and taken away, in other
/// orders, they leave nothing.
fn check_orders(case: &Case, follower: &Follower) -> Result<()> {
    let left = case.left_at_end();
    let all = |follower: &Follower| follower.print() + &follower.print_health();
    let last = all(follower);
    let empty = all(&Follower::new(case.config.clone()).after(&[])?);
    for turn in 0..left.len().max(1) {
        let mut coming: Vec<Event> = left.clone();
        coming.rotate_left(turn);
        let mut going: Vec<Event> = left.iter().map(Event::gone).collect();
        going.rotate_right(turn / 2);
        going.reverse();
        let mut other = Follower::new(case.config.clone());
        for event in &coming {
            other.take(std::slice::from_ref(event))?;
        }
        ensure!(all(&other) == last, "in another order of arrival it is\n{}", all(&other));
        for event in &going {
            other.take(std::slice::from_ref(event))?;
        }
        ensure!(all(&other) == empty, "after all is gone, there is left\n{}", all(&other));
    }
    Ok(())
}

/// A model, and what one knows who follows its updates.
struct Follower {
    model: Model,
    services: BTreeMap<ServiceKey, WantedService>,
    health_checks: BTreeMap<ServiceKey, WantedHealthCheck>,
    node: WantedNode,
    opt_outs: WantedOptOuts,
    problems: Vec<Problem>,
}

impl Follower {
    fn new(config: NodeConfig) -> Self {
        Self {
            model: Model::new(config),
            services: BTreeMap::new(),
            health_checks: BTreeMap::new(),
            node: WantedNode::default(),
            opt_outs: WantedOptOuts::default(),
            problems: Vec::new(),
        }
    }

    fn after(mut self, events: &[Event]) -> Result<Self> {
        self.take(events)?;
        Ok(self)
    }

    fn take(&mut self, events: &[Event]) -> Result<()> {
        for event in events {
            self.model.apply(event.change());
        }
        let Update { services, health_checks, node, opt_outs, new_problems, gone_problems } =
            self.model.recompute();
        for (key, wanted) in services {
            let before = self.services.remove(&key);
            ensure!(before != wanted, "{key} is in the update, but did not change");
            if let Some(wanted) = wanted {
                self.services.insert(key, wanted);
            }
        }
        for (key, check) in health_checks {
            let before = self.health_checks.remove(&key);
            ensure!(before != check, "the health check of {key} is in the update, but did not change");
            self.health_checks.extend(check.map(|check| (key, check)));
        }
        if let Some(node) = node {
            self.node = node;
        }
        if let Some(opt_outs) = opt_outs {
            ensure!(opt_outs != self.opt_outs, "opted-out Pods are in the update, but did not change");
            self.opt_outs = opt_outs;
        }
        for problem in gone_problems {
            let at = self.problems.iter().position(|known| *known == problem);
            self.problems.remove(at.with_context(|| format!("gone, but never came: {problem}"))?);
        }
        for problem in new_problems {
            ensure!(!self.problems.contains(&problem), "came twice: {problem}");
            self.problems.push(problem);
        }
        self.problems.sort();
        let mut services: Vec<_> = self.model.services().collect();
        services.sort_by_key(|service| &service.key);
        ensure!(services.into_iter().eq(self.services.values()), "updates and model differ");
        ensure!(self.model.recompute() == Update::default(), "without a change there is an update");
        Ok(())
    }

    fn print(&self) -> String {
        table::print(&self.services, &self.node, &self.opt_outs, &self.problems)
    }

    fn print_health(&self) -> String {
        table::print_health(&self.health_checks)
    }
}
