//! The load balancer: HAProxy in a machine of its own, with its statistics as the proof of what
//! went through it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::member::Member;
use crate::process::Process;
use crate::wait::{wait_for, wait_until};

/// Where HAProxy shows its statistics by HTTP, for people: in the load balancer's own namespace.
const STATISTICS: &str = "127.0.0.1:8404";

/// The load balancer's machine, with HAProxy once [`Elb::configure`] was called. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Elb {
    member: Member,
    vips: Arc<[IpAddr]>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    frontends: Vec<Frontend>,
    /// The one that listens, and before it those that only finish their connections.
    processes: Vec<Process>,
    /// What earlier processes had counted, by frontend: a reload starts at zero.
    counted: BTreeMap<String, u64>,
}

/// An address and port of the load balancer, and the servers behind it.
#[derive(Clone, Debug)]
pub struct Frontend {
    name: String,
    binds: Vec<SocketAddr>,
    servers: Vec<(String, SocketAddr)>,
    http: bool,
    check: Check,
}

/// How the load balancer finds out whether a server serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Check {
    /// Not at all: always up.
    None,
    /// A TCP connection to the server's port, every 200 ms.
    Tcp,
    /// An HTTP request to another port, every 200 ms; status 2xx and 3xx are good. As for
    /// healthCheckNodePort.
    Http {
        /// The port.
        port: u16,
        /// The path.
        path: String,
    },
}

impl Frontend {
    /// A TCP frontend without an address, with a TCP check. Names are letters, digits, - and _.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), binds: Vec::new(), servers: Vec::new(), http: false, check: Check::Tcp }
    }

    /// Listens at an address.
    pub fn bind(mut self, address: SocketAddr) -> Self {
        self.binds.push(address);
        self
    }

    /// Listens on a port of several addresses.
    pub fn bind_all(mut self, addresses: &[IpAddr], port: u16) -> Self {
        let addresses = addresses.iter().map(|ip| SocketAddr::new(*ip, port));
        self.binds.extend(addresses);
        self
    }

    /// Adds a server, as a node's address and NodePort.
    pub fn server(mut self, name: &str, address: SocketAddr) -> Self {
        self.servers.push((name.to_owned(), address));
        self
    }

    /// Balances HTTP requests rather than connections.
    pub fn http(mut self) -> Self {
        self.http = true;
        self
    }

    /// Chooses the health check.
    pub fn check(mut self, check: Check) -> Self {
        self.check = check;
        self
    }
}

impl Elb {
    pub(crate) fn new(member: Member, vips: Vec<IpAddr>) -> Self {
        Self { member, vips: vips.into(), state: Arc::default() }
    }

    /// The load-balancer addresses that stand here.
    pub fn vips(&self) -> &[IpAddr] {
        &self.vips
    }

    /// Starts HAProxy with these frontends, or reloads it. Open connections live on through a
    /// reload, and counts go on.
    ///
    /// # Errors
    /// When HAProxy refuses the configuration, with what it said.
    pub fn configure(&self, frontends: &[Frontend]) -> Result<()> {
        let mut state = self.state();
        let path = self.member.folder().join("haproxy.cfg");
        fs::write(&path, configuration(frontends, &self.socket()))
            .with_context(|| format!("cannot write {}", path.display()))?;
        let checked = self.member.command("haproxy")?.args(["-c", "-f"]).arg(&path);
        checked.run()?.success()?;

        // Counts of the process that goes; what it still finishes was counted when it began.
        for frontend in state.frontends.clone() {
            let count = self.counter(&frontend.name)?;
            *state.counted.entry(frontend.name).or_default() += count;
        }
        let mut command = self.member.command("haproxy")?.args(["-db", "-f"]).arg(&path);
        if let Some(old) = state.processes.last() {
            command = command.arg("-sf").arg(old.pid().to_string());
        }
        let mut process = command.spawn()?;
        let pid = process.pid().to_string();
        process.wait_ready("HAProxy serving", Duration::from_secs(5), |_| {
            // Until it has taken the socket over, the old one answers there.
            Ok(self
                .ask("show info")?
                .lines()
                .any(|line| line.strip_prefix("Pid: ").is_some_and(|told| told == pid)))
            .map(|new| new.then_some(()))
        })?;
        state.processes.push(process);
        state.frontends = frontends.to_vec();
        Ok(())
    }

    /// How many connections a frontend has taken since HAProxy was first started.
    ///
    /// # Errors
    /// When there is no such frontend, or HAProxy does not answer.
    pub fn connections(&self, frontend: &str) -> Result<u64> {
        let state = self.state();
        let before = state.counted.get(frontend).copied().unwrap_or(0);
        Ok(before + self.counter(frontend)?)
    }

    /// How many connections each server of a frontend was given since the last
    /// [`Elb::configure`]. Health checks do not count.
    ///
    /// # Errors
    /// When HAProxy does not answer.
    pub fn server_connections(&self, frontend: &str) -> Result<BTreeMap<String, u64>> {
        self.servers(frontend)?
            .iter()
            .map(|row| {
                let count = row["stot"].parse();
                let count = count.with_context(|| format!("HAProxy counts {:?} sessions", row["stot"]))?;
                Ok((row["svname"].clone(), count))
            })
            .collect()
    }

    /// Where the load balancer's machine itself gets the statistics as CSV, with curl.
    pub fn statistics_url() -> String {
        format!("http://{STATISTICS}/;csv")
    }

    /// Which servers of a frontend its health checks found up.
    ///
    /// # Errors
    /// When HAProxy does not answer.
    pub fn servers_up(&self, frontend: &str) -> Result<Vec<String>> {
        Ok(names_up(&self.servers(frontend)?))
    }

    /// Waits until exactly these servers of a frontend are up, and the others were found down.
    ///
    /// # Errors
    /// When the deadline passes.
    pub fn wait_servers_up(&self, frontend: &str, names: &[&str], deadline: Duration) -> Result<()> {
        let mut wanted: Vec<String> = names.iter().map(ToString::to_string).collect();
        wanted.sort_unstable();
        let what = format!("the servers of {frontend} that are up being {names:?}");
        let mut last = Vec::new();
        wait_until(&what, deadline, || {
            let servers = self.servers(frontend)?;
            last = names_up(&servers);
            last.sort_unstable();
            // HAProxy uses a server until its first check has failed, which may take the check's
            // whole timeout.
            Ok(last == wanted && !servers.iter().any(is_unchecked))
        })
        .with_context(|| format!("up are {last:?}"))
    }

    /// Waits until a frontend has taken at least `count` connections.
    ///
    /// # Errors
    /// When the deadline passes.
    pub fn wait_connections(&self, frontend: &str, count: u64, deadline: Duration) -> Result<u64> {
        let what = format!("{count} connections through {frontend}");
        wait_for(&what, deadline, || {
            let now = self.connections(frontend)?;
            Ok((now >= count).then_some(now))
        })
    }

    /// Asks HAProxy's statistics socket, as in `show stat`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn ask(&self, command: &str) -> Result<String> {
        let path = self.socket();
        let mut stream = UnixStream::connect(&path)
            .with_context(|| format!("cannot reach HAProxy at {}", path.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    /// What HAProxy tells of a frontend's servers.
    fn servers(&self, frontend: &str) -> Result<Vec<BTreeMap<String, String>>> {
        let backend = backend_name(frontend);
        let mut rows = parse_stat(&self.ask("show stat")?)?;
        rows.retain(|row| row["pxname"] == backend && row["svname"] != "BACKEND");
        Ok(rows)
    }

    fn counter(&self, frontend: &str) -> Result<u64> {
        let rows = parse_stat(&self.ask("show stat")?)?;
        let row = rows
            .iter()
            .find(|row| row["pxname"] == frontend && row["svname"] == "FRONTEND")
            .with_context(|| format!("the load balancer has no frontend {frontend}"))?;
        row["stot"].parse().with_context(|| format!("HAProxy counts {:?} sessions", row["stot"]))
    }

    fn socket(&self) -> PathBuf {
        self.member.folder().join("haproxy.sock")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Deref for Elb {
    type Target = Member;

    fn deref(&self) -> &Member {
        &self.member
    }
}

fn names_up(servers: &[BTreeMap<String, String>]) -> Vec<String> {
    let up = servers
        .iter()
        .filter(|row| (row["status"].starts_with("UP") || row["status"] == "no check") && !is_unchecked(row));
    up.map(|row| row["svname"].clone()).collect()
}

/// Whether a server's first health check has not ended yet.
fn is_unchecked(server: &BTreeMap<String, String>) -> bool {
    server["check_status"].contains("INI")
}

fn backend_name(frontend: &str) -> String {
    format!("{frontend}-servers")
}

fn configuration(frontends: &[Frontend], socket: &Path) -> String {
    let mut text = format!(
        "global\n\
         \x20 stats socket {} mode 600 level admin\n\
         \x20 maxconn 4000\n\
         \x20 nbthread 1\n\
         defaults\n\
         \x20 timeout connect 2s\n\
         \x20 timeout client 1h\n\
         \x20 timeout server 1h\n\
         \x20 timeout check 1s\n\
         listen statistics\n\
         \x20 mode http\n\
         \x20 bind {STATISTICS}\n\
         \x20 stats enable\n\
         \x20 stats uri /\n",
        socket.display()
    );
    for frontend in frontends {
        let Frontend { name, binds, servers, http, check } = frontend;
        let mode = if *http { "http" } else { "tcp" };
        let backend = backend_name(name);
        let _ = write!(text, "frontend {name}\n  mode {mode}\n");
        for bind in binds {
            let _ = writeln!(text, "  bind {bind}");
        }
        let _ = write!(
            text,
            "  default_backend {backend}\nbackend {backend}\n  mode {mode}\n  balance roundrobin\n"
        );
        let times = "inter 200ms fastinter 50ms downinter 50ms fall 2 rise 2";
        let options = match check {
            Check::None => String::new(),
            Check::Tcp => format!(" check {times}"),
            Check::Http { port, path } => {
                let _ = writeln!(text, "  option httpchk GET {path}");
                format!(" check port {port} {times}")
            }
        };
        for (name, address) in servers {
            let _ = writeln!(text, "  server {name} {address}{options}");
        }
    }
    text
}

/// The rows of `show stat`, by column name.
fn parse_stat(csv: &str) -> Result<Vec<BTreeMap<String, String>>> {
    let mut lines = csv.lines().filter(|line| !line.is_empty());
    let head = lines.next().context("HAProxy's statistics are empty")?;
    let head =
        head.strip_prefix("# ").with_context(|| format!("HAProxy's statistics begin with {head:?}"))?;
    let names: Vec<_> = head.split(',').collect();
    for wanted in ["pxname", "svname", "stot", "status", "check_status"] {
        ensure!(names.contains(&wanted), "HAProxy's statistics have no column {wanted}");
    }
    // Free text comes last in a row and is the only thing in quotes; it may hold commas.
    Ok(lines
        .map(|line| {
            let values = line.split(',').map(str::to_owned).chain(std::iter::repeat_with(String::new));
            names.iter().map(ToString::to_string).zip(values).collect()
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_holds_what_was_asked() {
        let frontend = Frontend::new("web")
            .bind("203.0.113.10:80".parse().unwrap())
            .bind("[2001:db8:113::10]:80".parse().unwrap())
            .server("node-a", "192.0.2.11:30080".parse().unwrap())
            .check(Check::Http { port: 30999, path: String::from("/healthz") });
        let text = configuration(&[frontend], Path::new("/run/x.sock"));
        for line in
            ["  bind 203.0.113.10:80", "  bind [2001:db8:113::10]:80", "  option httpchk GET /healthz"]
        {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(text.contains("server node-a 192.0.2.11:30080 check port 30999 inter"));
    }

    #[test]
    fn statistics_are_read_by_column() {
        let csv = "# pxname,svname,stot,status,check_status,desc,\nweb,FRONTEND,7,OPEN,,\"a,b\",\n\n";
        let rows = parse_stat(csv).unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0]["stot"], "7");
        assert_eq!(rows[0]["status"], "OPEN");
        assert!(parse_stat("503\n").is_err());
    }
}
