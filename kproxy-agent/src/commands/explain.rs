//! `kproxy explain`: what happens to a connection, and why; over the maps of this node, or over tables computed
//! from manifests.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, Write as _},
    path::PathBuf,
};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{UsageError, print};
use crate::{
    agent::config,
    cli::{Common, ExplainArgs, OutputFormat, SocketHooks},
    explain::{Answer, Ground, Hooks, Live, Planned, Query, explain, text},
    maps::kernel::KernelMaps,
    model::{Change, LocalAddresses, Model},
    plan::Capacity,
    programs::Capacities,
    source::{ProblemKind, SourceProblem, manifests},
};

/// How many source ranges the agent's map holds.
const SOURCE_RANGES: u32 = 65_536;

/// Answers one question, or those of `--queries`.
pub fn run(common: &Common, args: &ExplainArgs) -> Result<()> {
    let questions = Questions::of(args)?;
    if args.manifests.is_empty() {
        let maps = KernelMaps::open(&common.bpf_root)?;
        return questions.answer(&Live::new(&maps, &common.bpf_root)?, args);
    }
    let model = model(args)?;
    let hooks = Hooks {
        loopback_node_ports: !args.rules.disable_loopback_nodeports,
        host_sockets_only: args.rules.socket_hooks == SocketHooks::Host,
    };
    let from_node = args.from_node.as_ref().map(|name| name.trim().to_lowercase());
    let planned = Planned::new(&model, hooks, capacity()).with_clients_on(from_node);
    for failed in planned.failed() {
        tracing::warn!("not in the tables: {failed}");
    }
    questions.answer(&planned, args)
}

/// What is asked, read as far as it can be before anything is opened.
enum Questions {
    One(Query),
    Lines(PathBuf),
}

impl Questions {
    fn of(args: &ExplainArgs) -> Result<Self> {
        if let Some(path) = &args.queries {
            return match args.output {
                None | Some(OutputFormat::Json) => Ok(Self::Lines(path.clone())),
                Some(_) => {
                    Err(UsageError("--queries is answered with lines of JSON: leave -o out".to_owned())
                        .into())
                }
            };
        }
        // Both are there without --queries: clap sees to it.
        let (from, to) = (args.from.as_deref().unwrap_or_default(), args.to.as_deref().unwrap_or_default());
        let query = Query::new(from, to, args.protocol.as_deref());
        Ok(Self::One(query.map_err(|error| UsageError(format!("--{error}")))?))
    }

    fn answer(&self, ground: &impl Ground, args: &ExplainArgs) -> Result<()> {
        match self {
            Self::One(query) => {
                let answer = explain(ground, query)?;
                print::print(&answer, args.output.unwrap_or(OutputFormat::Table), |answer, _| text(answer))
            }
            Self::Lines(path) => answer_lines(ground, path),
        }
    }
}

/// A line that was answered.
#[derive(Serialize)]
struct Answered {
    #[serde(flatten)]
    answer: Answer,
    /// Fields of the line that mean nothing here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ignored_fields: Vec<String>,
}

/// A line that could not be.
#[derive(Serialize)]
struct Refused {
    error: String,
    /// Counted from 1.
    line: usize,
}

/// Lines in, lines out, one for one; empty ones are skipped. Each answer is out before the next line is read.
fn answer_lines(ground: &impl Ground, path: &PathBuf) -> Result<()> {
    let mut input: Box<dyn io::BufRead> = if path.as_os_str() == "-" {
        Box::new(io::stdin().lock())
    } else {
        let file = File::open(path)
            .map_err(|error| UsageError(format!("cannot open {}: {error}", path.display())))?;
        Box::new(BufReader::new(file))
    };
    let mut out = io::stdout().lock();
    let (mut line, mut number, mut refused) = (Vec::new(), 0, 0);
    loop {
        line.clear();
        if input.read_until(b'\n', &mut line).context("cannot read the queries")? == 0 {
            break;
        }
        number += 1;
        let text = String::from_utf8_lossy(&line);
        let text = text.trim();
        if text.is_empty() {
            continue;
        }
        let written = match Query::from_json(text) {
            Ok((query, ignored_fields)) => {
                let answer = explain(ground, &query)?;
                serde_json::to_string(&Answered { answer, ignored_fields })
            }
            Err(error) => {
                refused += 1;
                serde_json::to_string(&Refused { error: error.to_string(), line: number })
            }
        };
        match writeln!(out, "{}", written.context("cannot print JSON")?).and_then(|()| out.flush()) {
            Ok(()) => {}
            // Whoever read the answers has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(error).context("cannot write the answers"),
        }
    }
    if refused > 0 {
        return Err(UsageError(format!(
            "{refused} of the queries could not be read; the others were answered"
        ))
        .into());
    }
    Ok(())
}

/// The model of all objects in the manifests. Nothing of this machine is looked at, but for its name where none
/// is given.
fn model(args: &ExplainArgs) -> Result<Model> {
    let node_name = config::node_name(&args.node)?;
    let mut model =
        Model::new(config::model(&node_name, &args.node, &args.rules, LocalAddresses::default())?);
    let loaded = manifests::load(&args.manifests, &node_name);
    // All of them are in the log already.
    let fatal: Vec<String> = loaded
        .problems
        .iter()
        .filter(|problem| is_fatal(problem))
        .map(|problem| format!("{}: {}; {}", problem.place, problem.what, problem.mend))
        .collect();
    if !fatal.is_empty() {
        return Err(UsageError(format!("the manifests cannot be read: {}", fatal.join("\n"))).into());
    }
    loaded.changes.into_iter().for_each(|change| model.apply(change));
    // The node's addresses are the only ones that are known to stand on its interfaces.
    let own = model.node_addresses().iter().copied().chain(model.config().node_addresses.iter().copied());
    let own = own.collect();
    model.apply(Change::LocalAddresses(own));
    model.recompute();
    for problem in model.problems() {
        tracing::warn!(
            kind = problem.kind.word(),
            object = %problem.object,
            field = problem.field,
            "{}",
            problem.message
        );
    }
    if model.node_addresses().is_empty() {
        tracing::warn!(
            "no address of the node {node_name} is known: no NodePort answers, and only loopback addresses are the \
             host's; add its Node object to the manifests, or give --node-address"
        );
    }
    Ok(model)
}

/// What of the manifests could hide an object that the answer depends on.
fn is_fatal(problem: &SourceProblem) -> bool {
    matches!(problem.kind, ProblemKind::MissingPath | ProblemKind::UnreadableFile | ProblemKind::Syntax)
}

/// As the agent's maps hold.
fn capacity() -> Capacity {
    let Capacities { frontends, backends, .. } = Capacities::default();
    Capacity { frontends, backends, addresses: frontends, source_ranges: SOURCE_RANGES }
}
