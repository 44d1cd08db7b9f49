//! How long a change of one EndpointSlice takes from the API server to the map: with a real kube-apiserver, from the moment
//! when the request is sent to it until the agent says that everything is written.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use kproxy_lab::{Agent, Context, ControlPlane, LogLine, Member, NodeSpec, Process};
use serde_json::{Value, json};

use crate::objects::{ENDPOINTS, PORT, TARGET};
use crate::options::Options;
use crate::print;

/// How many changes are made, one after the other.
const CHANGES: usize = 1_000;
/// What `few` is.
const FEW: usize = 10;
const LOADED: Duration = Duration::from_secs(120);
/// Connections that objects are made by.
const MAKERS: usize = 8;
/// Where `kubectl proxy` listens, on the control plane's machine: it speaks TLS for us.
const PROXY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8_001);
const NAMESPACE: &str = "default";

/// What one change took, in microseconds.
struct Change {
    /// From the request's sending to everything written.
    all: u64,
    /// Of that, until the API server had answered: it had stored the change by then.
    api: u64,
    /// In the agent, from the event on.
    agent: u64,
}

/// Measures and prints.
pub fn measure(ctx: &Context, options: &Options) -> Result<()> {
    let mut rows = Vec::new();
    for services in [FEW, options.services] {
        let changes = one(ctx, services)?;
        rows.push(row(services, &changes));
        ctx.forget_labs();
    }
    let header =
        ["", "p50, sent to written", "p99", "p50 of the API server's answer", "p50 in the agent", "p99"];
    print::table(&format!("One EndpointSlice changed at a kube-apiserver, {CHANGES} times"), &header, &rows);
    Ok(())
}

fn one(ctx: &Context, services: usize) -> Result<Vec<Change>> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1"])).control())?;
    let assets = ControlPlane::assets()?;
    let control = ControlPlane::start(&lab, &assets)?;
    control.apply("apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\n")?;
    let _proxy = proxy(&control, &assets)?;
    let start = Instant::now();
    make(control.member(), services)?;
    println!("{services} Services made at the API server in {:.0} s", start.elapsed().as_secs_f64());

    let mut agent = lab.node("node-a")?.agent().kubeconfig(&control.kubeconfig()).start()?;
    agent.wait_log("it being synced", LOADED, |line| line.message == "synced")?;
    let mut changes = Vec::with_capacity(CHANGES);
    let mut client = Client::connect(control.member())?;
    for round in 0..CHANGES {
        changes.push(change(&mut agent, &mut client, round)?);
    }
    Ok(changes)
}

/// One endpoint goes, comes back, and so on.
fn change(agent: &mut Agent, client: &mut Client, round: usize) -> Result<Change> {
    let first = ENDPOINTS - u8::try_from((round + 1) % 2)?;
    let endpoints: Vec<Value> = (0..first).map(endpoint).collect();
    let patch = json!({"endpoints": endpoints}).to_string();
    let path = format!("/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices/{}", name(0));
    agent.mark();
    let sent = SystemTime::now();
    let start = Instant::now();
    client.request("PATCH", &path, "application/merge-patch+json", &patch)?;
    let api = micros(start.elapsed());
    let synced = agent.wait_log("a change", LOADED, |line| {
        line.message == "synced" && line.field("changed").as_deref() == Some("1")
    })?;
    let since_1970 = sent.duration_since(SystemTime::UNIX_EPOCH)?;
    let all =
        micros_of(&synced)?.checked_sub(micros(since_1970)).context("it was written before it was sent")?;
    let total = synced.field("total_us").context("no total_us")?;
    Ok(Change { all, api, agent: total.parse()? })
}

fn proxy(control: &ControlPlane, assets: &std::path::Path) -> Result<Process> {
    let command = control.member().command(assets.join("kubectl"))?;
    let mut process = command
        .env("HOME", control.member().folder())
        .env("KUBECONFIG", control.kubeconfig())
        .args(["proxy", &format!("--port={}", PROXY.port())])
        .spawn()?;
    let member = control.member();
    process.wait_ready("kubectl proxy", Duration::from_secs(10), |_| {
        Ok(Client::connect(member).ok().map(drop))
    })?;
    Ok(process)
}

/// Makes Services and their slices, as fast as the API server takes them.
fn make(member: &Member, services: usize) -> Result<()> {
    let next = AtomicUsize::new(0);
    member.netns().within(|| {
        thread::scope(|scope| {
            let makers: Vec<_> = (0..MAKERS).map(|_| scope.spawn(|| make_some(&next, services))).collect();
            makers
                .into_iter()
                .try_for_each(|maker| maker.join().map_err(|_| anyhow::anyhow!("a maker panicked"))?)
        })
    })
}

fn make_some(next: &AtomicUsize, services: usize) -> Result<()> {
    let mut client = Client::here()?;
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= services {
            return Ok(());
        }
        let name = name(number);
        let service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {
                "ipFamilies": ["IPv4"],
                "ports": [{"name": "http", "port": PORT, "targetPort": TARGET}],
            },
        });
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": TARGET, "protocol": "TCP"}],
            "endpoints": (0..ENDPOINTS).map(endpoint).collect::<Vec<_>>(),
        });
        for (path, object) in [
            (format!("/api/v1/namespaces/{NAMESPACE}/services"), service),
            (format!("/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"), slice),
        ] {
            client.request("POST", &path, "application/json", &object.to_string())?;
        }
    }
}

fn name(number: usize) -> String {
    format!("service-{number:05}")
}

fn endpoint(index: u8) -> Value {
    json!({
        "addresses": [Ipv4Addr::new(10, 244, 9, index)],
        "conditions": {"ready": true, "serving": true, "terminating": false},
        "nodeName": format!("node-{index}"),
    })
}

/// A connection that requests are made by, one after the other.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(member: &Member) -> Result<Self> {
        member.netns().within(Self::here)
    }

    /// In the network namespace that this thread is in.
    fn here() -> Result<Self> {
        let stream = TcpStream::connect(PROXY).context("cannot reach kubectl proxy")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn request(&mut self, method: &str, path: &str, content_type: &str, body: &str) -> Result<()> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.0.get_mut().write_all(request.as_bytes())?;
        let status = self.line()?;
        let (mut length, mut is_chunked) = (0, false);
        loop {
            let line = self.line()?.to_ascii_lowercase();
            match line.split_once(": ") {
                None => break,
                Some(("content-length", value)) => length = value.parse()?,
                Some(("transfer-encoding", value)) => is_chunked = value == "chunked",
                Some(_) => {}
            }
        }
        let mut answer = Vec::new();
        if is_chunked {
            loop {
                let size = usize::from_str_radix(&self.line()?, 16)?;
                self.read(size, &mut answer)?;
                self.line()?;
                if size == 0 {
                    break;
                }
            }
        } else {
            self.read(length, &mut answer)?;
        }
        let code = status.split(' ').nth(1).unwrap_or_default();
        if !matches!(code, "200" | "201") {
            bail!("{method} {path}: {status}: {}", String::from_utf8_lossy(&answer));
        }
        Ok(())
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.0.read_line(&mut line)? > 0, "kubectl proxy has closed the connection");
        Ok(line.trim_end().to_owned())
    }

    fn read(&mut self, size: usize, into: &mut Vec<u8>) -> Result<()> {
        let read = self.0.by_ref().take(size as u64).read_to_end(into)?;
        ensure!(read == size, "kubectl proxy has closed the connection");
        Ok(())
    }
}

/// When a line was logged, in microseconds since 1970: `2026-11-25T15:57:05.263691Z`.
fn micros_of(line: &LogLine) -> Result<u64> {
    let text = line.field("timestamp").with_context(|| format!("no timestamp in {line:?}"))?;
    let digits: Vec<u64> = text
        .split(|other: char| !other.is_ascii_digit())
        .filter(|part| !part.is_empty())
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let [year, month, day, hour, minute, second, micros] = digits[..] else { bail!("no timestamp: {text}") };
    ensure!(text.ends_with('Z') && text.len() == 27, "no timestamp in UTC and microseconds: {text}");
    // The Gregorian calendar, counted from the first of March.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = y * 365 + y / 4 - y / 100 + y / 400 + (m * 153 + 2) / 5 + day - 1 - 719_468;
    Ok((((days * 24 + hour) * 60 + minute) * 60 + second) * 1_000_000 + micros)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn row(services: usize, changes: &[Change]) -> Vec<String> {
    let at = |of: fn(&Change) -> u64, percent: usize| {
        let mut sorted: Vec<u64> = changes.iter().map(of).collect();
        sorted.sort_unstable();
        let place = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
        format!("{:.2} ms", sorted.get(place).copied().unwrap_or(0) as f64 / 1_000.0)
    };
    vec![
        format!("{services} Services"),
        at(|change| change.all, 50),
        at(|change| change.all, 99),
        at(|change| change.api, 50),
        at(|change| change.agent, 50),
        at(|change| change.agent, 99),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_read() {
        let at = |timestamp: &str| {
            let fields = [("timestamp".to_owned(), json!(timestamp))].into_iter().collect();
            micros_of(&LogLine { level: String::new(), message: String::new(), fields })
        };
        assert_eq!(at("1970-01-01T00:00:00.000000Z").unwrap(), 0);
        assert_eq!(at("2000-02-29T12:00:00.000001Z").unwrap(), 951_825_600_000_001);
        assert_eq!(at("2026-11-25T15:57:05.263691Z").unwrap(), 1_795_622_225_263_691);
        assert!(at("2026-11-25T15:57:05Z").is_err());
    }
}
