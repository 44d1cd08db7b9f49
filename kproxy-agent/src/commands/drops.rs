//! `kproxy drops`: what the programs drop and refuse, as it happens. Programs tell while somebody listens; a listener
//! that ends, however it ends, is forgotten after a few seconds.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result};
use k8s_openapi::jiff::Timestamp;
use kproxy_common::{Address, DROPS_PER_SECOND, DropEvent, Protocol, elapsed};
use serde::Serialize;

use super::{is_broken_pipe, print};
use crate::{
    cli::{Common, DropsArgs, OutputFormat},
    flows,
    maps::kernel::DropMaps,
    plan::split_name,
};

/// How often events are looked for.
const LOOK: Duration = Duration::from_millis(50);
/// How often the programs are told that somebody listens, and for how long they believe it.
const REFRESH: Duration = Duration::from_secs(1);
const BELIEVED: Duration = Duration::from_secs(3);

const HEADER: [&str; 8] =
    ["TIME", "VERDICT", "REASON", "SERVICE", "PROTOCOL", "SOURCE", "DESTINATION", "INTERFACE"];

/// Prints events until it is stopped.
pub fn run(common: &Common, args: &DropsArgs) -> Result<()> {
    let maps = DropMaps::open(&common.bpf_root)?;
    match follow(maps, args.output) {
        // As with `| head`: who reads has seen enough.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        other => other,
    }
}

fn follow(mut maps: DropMaps, format: OutputFormat) -> Result<()> {
    let mut printer = Printer { out: io::stdout().lock(), format, columns: print::Columns::new(&HEADER) };
    let mut missed = Missed::default();
    let mut refreshed: Option<Instant> = None;
    loop {
        if refreshed.is_none_or(|at| at.elapsed() >= REFRESH) {
            let is_first = refreshed.is_none();
            maps.listen_until(now()? + BELIEVED.as_nanos() as u64)?;
            refreshed = Some(Instant::now());
            if is_first {
                printer.start()?;
            }
        }
        while let Some(event) = maps.next_event() {
            let row = row(&maps, &event, missed.before(event.stream, event.sequence))?;
            printer.print(row)?;
        }
        std::thread::sleep(LOOK);
    }
}

/// What a row of the table or an object says.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    /// RFC 3339.
    time: String,
    /// `drop`, or `refuse`: the other side was told.
    verdict: &'static str,
    reason: &'static str,
    /// Of the Service that was asked for; empty where none was.
    namespace: String,
    name: String,
    port_name: String,
    /// Empty if the packet could not be parsed.
    protocol: &'static str,
    /// Missing for sockets, which may have no address yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    destination: String,
    /// Missing for sockets.
    #[serde(skip_serializing_if = "Option::is_none")]
    interface: Option<String>,
    /// Events of the same CPU right before this one that are not told: there were more than it may write in a second,
    /// or than this listener could read.
    missed_before: u64,
}

fn row(maps: &DropMaps, event: &DropEvent, missed_before: u64) -> Result<Row> {
    let info = maps.asked(event)?;
    let (namespace, name, port_name) = match info.as_ref().and_then(|info| split_name(info.name())) {
        Some((key, port)) => (key.namespace, key.name, port.to_owned()),
        None => Default::default(),
    };
    let is_socket = event.device == 0;
    Ok(Row {
        time: wall_time(event.time)?,
        verdict: if event.refused == 1 { "refuse" } else { "drop" },
        reason: event.reason().map_or("unknown", |reason| reason.word()),
        namespace,
        name,
        port_name,
        protocol: match Protocol::try_from(event.protocol) {
            Ok(Protocol::Tcp) => "TCP",
            Ok(Protocol::Udp) => "UDP",
            Ok(Protocol::Sctp) => "SCTP",
            Err(_) => "",
        },
        source: (!is_socket).then(|| socket(event.source, event.source_port)),
        destination: socket(event.destination, event.destination_port),
        interface: (!is_socket).then(|| interface(event.device)),
        missed_before,
    })
}

fn socket(address: Address, port: u16) -> String {
    SocketAddr::new(address.into(), port).to_string()
}

/// Its name, or its number if it is gone.
fn interface(index: u32) -> String {
    nix::net::if_::if_indextoname(index)
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| format!("if{index}"))
}

/// From the programs' clock to the people's.
fn wall_time(since_boot: u64) -> Result<String> {
    let ago = Duration::from_nanos(elapsed(now()?, since_boot));
    let then = SystemTime::now() - ago;
    let time = Timestamp::try_from(then).context("the clock is out of range")?;
    Ok(format!("{time:.3}"))
}

fn now() -> Result<u64> {
    flows::now().context("cannot tell the time since boot")
}

/// How many events of each stream were not read.
#[derive(Default)]
struct Missed {
    next: BTreeMap<u32, u64>,
}

impl Missed {
    /// How many came before this one since the last that was read. Nothing is known of those before the first.
    fn before(&mut self, stream: u32, sequence: u64) -> u64 {
        let expected = self.next.insert(stream, sequence.wrapping_add(1)).unwrap_or(sequence);
        sequence.saturating_sub(expected)
    }
}

struct Printer<W> {
    out: W,
    format: OutputFormat,
    columns: print::Columns,
}

impl<W: Write> Printer<W> {
    /// Says that it listens.
    fn start(&mut self) -> Result<()> {
        if matches!(self.format, OutputFormat::Table | OutputFormat::Wide) {
            // Room for what is seen most: lines that come one by one cannot be lined up afterwards.
            let usual = [
                "2026-01-01T00:00:00.000Z",
                "refuse",
                "no-local-endpoints",
                "namespace/service:port",
                "SCTP",
            ];
            self.columns.fit(&[usual.map(str::to_owned).to_vec()]);
            self.out.write_all(self.columns.line(HEADER.into_iter()).as_bytes())?;
        }
        Ok(self.out.flush()?)
    }

    fn print(&mut self, row: Row) -> Result<()> {
        match self.format {
            OutputFormat::Json => {
                serde_json::to_writer(&mut self.out, &row).map_err(io::Error::from)?;
                self.out.write_all(b"\n")?;
            }
            OutputFormat::Yaml => {
                let text = serde_saphyr::to_string(&row).context("cannot print YAML")?;
                write!(self.out, "---\n{text}")?;
            }
            OutputFormat::Table | OutputFormat::Wide => self.line(row)?,
        }
        Ok(self.out.flush()?)
    }

    fn line(&mut self, row: Row) -> Result<()> {
        let Row {
            time,
            verdict,
            reason,
            namespace,
            name,
            port_name,
            protocol,
            source,
            destination,
            interface,
            missed_before,
        } = row;
        if missed_before > 0 {
            writeln!(
                self.out,
                "({missed_before} more are not shown: a CPU tells at most {DROPS_PER_SECOND} a second)"
            )?;
        }
        let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
        let service = match (name.as_str(), port_name.as_str()) {
            ("", _) => "-".to_owned(),
            (_, "") => format!("{namespace}/{name}"),
            _ => format!("{namespace}/{name}:{port_name}"),
        };
        let cells = vec![
            time,
            verdict.to_owned(),
            reason.to_owned(),
            service,
            or_dash(protocol.to_owned()),
            or_dash(source.unwrap_or_default()),
            destination,
            or_dash(interface.unwrap_or_default()),
        ];
        self.columns.fit(std::slice::from_ref(&cells));
        Ok(self.out.write_all(self.columns.line(cells.iter().map(String::as_str)).as_bytes())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_says_how_many_are_missing() {
        let mut missed = Missed::default();
        for (stream, sequence, expected) in
            [(0, 17, 0), (0, 18, 0), (1, 900, 0), (0, 25, 6), (1, 901, 0), (0, 26, 0), (0, 26, 0)]
        {
            assert_eq!(missed.before(stream, sequence), expected, "{stream} {sequence}");
        }
    }

    #[test]
    fn lines_say_what_is_missing() {
        let row = |missed_before| Row {
            time: "2026-01-01T00:00:00.000Z".into(),
            verdict: "drop",
            reason: "source-range",
            namespace: "default".into(),
            name: "web".into(),
            port_name: String::new(),
            protocol: "TCP",
            source: Some("192.0.2.7:40000".into()),
            destination: "203.0.113.10:80".into(),
            interface: Some("eth0".into()),
            missed_before,
        };
        let mut printer =
            Printer { out: Vec::new(), format: OutputFormat::Table, columns: print::Columns::new(&HEADER) };
        printer.start().unwrap();
        printer.print(row(0)).unwrap();
        printer.print(row(3)).unwrap();
        let text = String::from_utf8(printer.out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert_eq!(lines[1], lines[3]);
        assert!(lines[2].starts_with("(3 more"), "{text}");
        assert_eq!(lines[0].find("SERVICE"), lines[1].find("default/web"), "{text}");
    }
}
