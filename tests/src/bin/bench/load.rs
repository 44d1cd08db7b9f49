//! What it costs to load Services, to hold them, and to change one.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kproxy_lab::{Agent, Context, LogLine, Manifests, Node, NodeSpec};
use serde_json::Value;

use crate::objects::{self, ENDPOINTS};
use crate::options::Options;
use crate::print;

/// How many changes are made, one after the other.
const CHANGES: usize = 100;
/// What `few` is.
const FEW: usize = 10;
const LOADED: Duration = Duration::from_secs(120);

/// What was seen of one agent.
struct Seen {
    services: usize,
    first: First,
    changes: Vec<Change>,
    memory: Memory,
    maps: Vec<(String, u64)>,
}

struct First {
    /// From the start of the process.
    all: Duration,
    read_us: u64,
    parse_us: u64,
    compute_us: u64,
    plan_us: u64,
    write_us: u64,
    writes: u64,
    calls: u64,
}

struct Change {
    /// From the file's writing to the log line.
    all: Duration,
    /// In the agent, from the event on.
    total_us: u64,
    writes: u64,
    calls: u64,
}

/// Of the agent's process, in KiB.
struct Memory {
    /// Resident, with what is mapped of the maps and of the binary.
    now: u64,
    /// Of that, what it has allocated.
    own: u64,
    peak: u64,
}

/// Measures and prints.
pub fn measure(ctx: &Context, options: &Options) -> Result<()> {
    let few = one(ctx, FEW)?;
    let many = one(ctx, options.services)?;
    let seen = [few, many];
    print_first(&seen);
    print_changes(&seen);
    print_memory(&seen);
    print_maps(&seen[1]);
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &[])))?;
    print_programs(lab.node("node-a")?)
}

fn one(ctx: &Context, services: usize) -> Result<Seen> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1"])))?;
    let node = lab.node("node-a")?;
    let folder = Manifests::create(node.folder(), "manifests")?;
    let endpoints: Vec<Ipv4Addr> = (0..ENDPOINTS).map(|index| Ipv4Addr::new(10, 244, 9, index)).collect();
    objects::write(&folder, services, &endpoints)?;

    let start = Instant::now();
    let mut agent = node.agent().manifests(&folder).start()?;
    let synced = agent.wait_log("it being synced", LOADED, |line| line.message == "synced")?;
    let all = start.elapsed();
    let log = agent.log();
    let read = log.iter().find(|line| line.message == "the first full lists are here");
    let read = read.context("the agent does not say what its reading took")?;
    let first = First {
        all,
        read_us: number(read, "read_us")?,
        parse_us: number(read, "parse_us")?,
        compute_us: number(&synced, "compute_us")?,
        plan_us: number(&synced, "plan_us")?,
        write_us: number(&synced, "write_us")?,
        writes: number(&synced, "writes")?,
        calls: number(&synced, "calls")?,
    };
    let memory = memory(&mut agent)?;
    let maps = maps(node)?;
    let changes = changes(&mut agent, &folder, &endpoints)?;
    drop(agent);
    ctx.forget_labs();
    Ok(Seen { services, first, changes, memory, maps })
}

/// One endpoint goes, comes back, and so on.
fn changes(agent: &mut Agent, folder: &Manifests, endpoints: &[Ipv4Addr]) -> Result<Vec<Change>> {
    let mut changes = Vec::with_capacity(CHANGES);
    for round in 0..CHANGES {
        agent.mark();
        let start = Instant::now();
        // All ten are there before the first round.
        objects::write_first_slice(folder, &endpoints[(round + 1) % 2..])?;
        let synced = agent.wait_log("a change", LOADED, |line| {
            line.message == "synced" && line.field("changed").as_deref() == Some("1")
        })?;
        changes.push(Change {
            all: start.elapsed(),
            total_us: number(&synced, "total_us")?,
            writes: number(&synced, "writes")?,
            calls: number(&synced, "calls")?,
        });
    }
    Ok(changes)
}

fn memory(agent: &mut Agent) -> Result<Memory> {
    // What the load has freed is given back after the log line.
    std::thread::sleep(Duration::from_secs(1));
    let path = format!("/proc/{}/status", agent.process().pid());
    let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok())
            .with_context(|| format!("no {name} in {path}"))
    };
    Ok(Memory { now: kib("VmRSS")?, own: kib("RssAnon")?, peak: kib("VmHWM")? })
}

/// Every pinned map and what it takes, as the kernel says.
fn maps(node: &Node) -> Result<Vec<(String, u64)>> {
    let mut maps = Vec::new();
    let root = node.bpf_root();
    for entry in fs::read_dir(root).with_context(|| format!("cannot list {}", root.display()))? {
        let path = entry?.path();
        if path.is_file()
            && let Some(octets) = map_octets(node, &path)?
        {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            maps.push((name, octets));
        }
    }
    maps.sort_by_key(|(_, octets)| std::cmp::Reverse(*octets));
    Ok(maps)
}

fn map_octets(node: &Node, path: &Path) -> Result<Option<u64>> {
    let output = node.command("bpftool")?.args(["-j", "map", "show", "pinned"]).arg(path).run()?.success()?;
    let shown: Value = serde_json::from_str(&output).with_context(|| format!("no JSON: {output}"))?;
    Ok(shown["bytes_memlock"].as_u64())
}

fn number(line: &LogLine, field: &str) -> Result<u64> {
    let text = line.field(field).with_context(|| format!("no {field} in {line:?}"))?;
    text.parse().with_context(|| format!("{field} is {text}"))
}

fn print_first(seen: &[Seen]) {
    let ms = |us: u64| format!("{:.1} ms", us as f64 / 1_000.0);
    let row = |what: &str, of: &dyn Fn(&First) -> String| {
        [what.to_owned()].into_iter().chain(seen.iter().map(|seen| of(&seen.first))).collect()
    };
    let rows = vec![
        row("process started to everything in force", &|first| ms(first.all.as_micros() as u64)),
        row("reading the folder, YAML and the rest", &|first| ms(first.read_us)),
        row("  of which into the model's values", &|first| ms(first.parse_us)),
        row("computing what is wanted", &|first| ms(first.compute_us)),
        row("planning the writes", &|first| ms(first.plan_us)),
        row("writing the maps", &|first| ms(first.write_us)),
        row("elements written", &|first| first.writes.to_string()),
        row("bpf() calls for that", &|first| first.calls.to_string()),
    ];
    let titles: Vec<_> = seen.iter().map(|seen| format!("{} Services", seen.services)).collect();
    let header: Vec<&str> = [""].into_iter().chain(titles.iter().map(String::as_str)).collect();
    print::table(&format!("First load, {ENDPOINTS} endpoints each"), &header, &rows);
}

fn print_changes(seen: &[Seen]) {
    let rows: Vec<_> = seen
        .iter()
        .map(|Seen { services, changes, .. }| {
            let mut agent: Vec<u64> = changes.iter().map(|change| change.total_us).collect();
            let mut all: Vec<u64> = changes.iter().map(|change| change.all.as_micros() as u64).collect();
            agent.sort_unstable();
            all.sort_unstable();
            let at = |sorted: &[u64], percent: usize| {
                let place = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
                format!("{} µs", sorted.get(place).copied().unwrap_or(0))
            };
            let most = |of: fn(&Change) -> u64| changes.iter().map(of).max().unwrap_or(0).to_string();
            vec![
                format!("{services} Services"),
                at(&agent, 50),
                at(&agent, 99),
                at(&all, 50),
                most(|change| change.writes),
                most(|change| change.calls),
            ]
        })
        .collect();
    let header = ["", "p50 in the agent", "p99", "p50 from the file", "elements, at most", "bpf() calls"];
    print::table(&format!("One endpoint changed, {CHANGES} times"), &header, &rows);
}

fn print_memory(seen: &[Seen]) {
    let mib = |kib: u64| format!("{:.1} MiB", kib as f64 / 1_024.0);
    let octets = |octets: u64| format!("{:.1} MiB", octets as f64 / f64::from(1 << 20));
    let rows: Vec<_> = seen
        .iter()
        .map(|Seen { services, memory: Memory { now, own, peak }, maps, .. }| {
            let all = maps.iter().map(|(_, octets)| octets).sum();
            vec![format!("{services} Services"), mib(*now), mib(*own), mib(*peak), octets(all)]
        })
        .collect();
    print::table(
        "Memory",
        &["", "agent, after the load", "of that its own", "at its peak", "all pinned maps"],
        &rows,
    );
}

fn print_maps(seen: &Seen) {
    let rows: Vec<_> =
        seen.maps.iter().map(|(name, octets)| vec![name.clone(), (octets / 1_024).to_string()]).collect();
    print::table(&format!("Maps, {} Services", seen.services), &["map", "KiB"], &rows);
}

fn print_programs(node: &Node) -> Result<()> {
    let output = node.kproxy(&["check", "-o", "json"])?;
    let report: Value = serde_json::from_str(&output.stdout)
        .with_context(|| format!("`kproxy check` printed no JSON: {output}"))?;
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let programs = report["programs"].as_array().into_iter().flatten();
    let rows: Vec<_> = programs
        .map(|one| ["name", "instructions", "verified"].map(|field| text(&one[field])).into())
        .collect();
    print::table("Programs", &["program", "instructions", "walked by the verifier"], &rows);
    Ok(())
}
