//! Reads the table of cases. What the words mean is said at its top.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context as _, Result, bail, ensure};
use kproxy_lab::Family;

use crate::cluster::Transport;

/// Services and what clients get, by how the proxies are started.
pub struct Group {
    pub proxies: String,
    pub services: Vec<Spec>,
}

/// A Service of the table.
#[derive(Clone, Debug, Default)]
pub struct Spec {
    pub name: String,
    pub kind: String,
    pub internal_local: bool,
    pub external_local: bool,
    pub ports: Vec<Port>,
    pub slices: Vec<SliceSpec>,
    pub affinity: Option<u32>,
    pub ranges: Vec<String>,
    pub labels: Vec<(String, String)>,
    pub slice_labels: Vec<(String, String)>,
    pub annotations: Vec<(String, String)>,
    pub ip_mode: Option<String>,
    /// The Service whose load-balancer address it has.
    pub share: Option<String>,
    pub cases: Vec<Case>,
}

/// A port of a Service or of a slice. Ports of both belong together by port and protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    pub udp: bool,
    pub port: u16,
    pub target: u16,
}

#[derive(Clone, Debug)]
pub struct SliceSpec {
    pub ports: Vec<Port>,
    pub endpoints: Vec<EndpointSpec>,
}

#[derive(Clone, Debug)]
pub struct EndpointSpec {
    pub backend: String,
    pub condition: Option<String>,
    pub hint: Option<String>,
}

/// A client with the addresses that it asks, and what comes of it.
#[derive(Clone, Debug)]
pub struct Case {
    pub line: usize,
    pub client: String,
    pub addresses: Vec<Address>,
    pub transports: Vec<Transport>,
    pub families: Vec<Family>,
    /// Whether all addresses are asked from one port, by sockets that stay open.
    pub one_port: bool,
    pub ours: Outcome,
    pub theirs: Option<Difference>,
    pub pending: Option<String>,
}

/// What kube-proxy does instead, and the heading in the documentation.
#[derive(Clone, Debug)]
pub struct Difference {
    pub outcome: Outcome,
    pub heading: String,
}

/// An address of a Service, and the Service's port that is meant if it is not the first.
#[derive(Clone, Debug)]
pub struct Address {
    pub kind: String,
    pub port: Option<u16>,
}

/// What comes of asking several times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Each of these is seen, and nothing else.
    All(BTreeSet<String>),
    /// One of these is seen, always the same, however the client is seen there.
    One(BTreeSet<String>),
}

impl Outcome {
    fn parse(text: &str) -> Result<Self> {
        let words = |text: &str| -> BTreeSet<String> { text.split_whitespace().map(str::to_owned).collect() };
        let outcome = match text.trim().strip_prefix("one of ") {
            Some(rest) => Self::One(words(rest)),
            None => Self::All(words(text)),
        };
        ensure!(!outcome.words().is_empty(), "no outcome in {text:?}");
        Ok(outcome)
    }

    pub fn words(&self) -> &BTreeSet<String> {
        match self {
            Self::All(words) | Self::One(words) => words,
        }
    }

    /// Whether what was seen is this.
    pub fn is(&self, seen: &BTreeSet<String>) -> bool {
        match self {
            Self::All(words) => words == seen,
            Self::One(words) => {
                let backends: BTreeSet<_> = seen.iter().map(|one| one.replace('*', "")).collect();
                seen.is_subset(words) && backends.len() == 1
            }
        }
    }

    /// Whether an answer that does not come is part of it.
    pub fn has_silence(&self) -> bool {
        self.words().contains("silence")
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<_> = self.words().iter().map(String::as_str).collect();
        let prefix = if matches!(self, Self::One(_)) { "one of " } else { "" };
        write!(f, "{prefix}{}", words.join(" "))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind)?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl Case {
    /// As it stands in the table.
    pub fn title(&self) -> String {
        let addresses: Vec<_> = self.addresses.iter().map(ToString::to_string).collect();
        format!("{} -> {}", self.client, addresses.join(", "))
    }
}

/// Reads the table.
pub fn parse(text: &str) -> Result<Vec<Group>> {
    let mut groups = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line_number = index + 1;
        let line = line.trim();
        if !line.is_empty() && !line.starts_with('#') {
            parse_line(&mut groups, line_number, line)
                .with_context(|| format!("line {line_number}: {line}"))?;
        }
    }
    Ok(groups)
}

fn parse_line(groups: &mut Vec<Group>, number: usize, line: &str) -> Result<()> {
    if let Some(name) = line.strip_prefix("proxies ") {
        groups.push(Group { proxies: name.to_owned(), services: Vec::new() });
        return Ok(());
    }
    let group = groups.last_mut().context("there is no line with `proxies` before")?;
    if let Some(name) = line.strip_prefix("service ") {
        group.services.push(Spec {
            name: name.to_owned(),
            kind: String::from("ClusterIP"),
            ..Spec::default()
        });
        return Ok(());
    }
    let service = group.services.last_mut().context("there is no line with `service` before")?;
    match line.split_once(" -> ") {
        Some((clients, rest)) => service.cases.extend(cases(number, clients, rest)?),
        None => service.set(line)?,
    }
    Ok(())
}

impl Spec {
    /// The first port, which is meant where none is named.
    pub fn first_port(&self) -> u16 {
        self.ports().first().map_or(80, |port| port.port)
    }

    /// Its ports: 80 for both protocols, unless told.
    pub fn ports(&self) -> Vec<Port> {
        if self.ports.is_empty() {
            [false, true].map(|udp| Port { udp, port: 80, target: 8080 }).into()
        } else {
            self.ports.clone()
        }
    }

    fn set(&mut self, line: &str) -> Result<()> {
        let (key, value) = line.split_once(' ').context("a property has a name and a value")?;
        let pair = || -> Result<(String, String)> {
            let (key, value) = value.split_once(' ').context("a key and a value are wanted")?;
            Ok((key.to_owned(), value.to_owned()))
        };
        match key {
            "type" => value.clone_into(&mut self.kind),
            "internal" => self.internal_local = is_local(value)?,
            "external" => self.external_local = is_local(value)?,
            "ports" => self.ports = ports(value)?,
            "endpoints" => self.slices.push(SliceSpec { ports: self.ports(), endpoints: endpoints(value)? }),
            "slice" => {
                let (own, rest) = value.split_once(' ').unwrap_or(("", value));
                let (own, rest) =
                    if own.contains("->") { (ports(own)?, rest) } else { (self.ports(), value) };
                self.slices.push(SliceSpec { ports: own, endpoints: endpoints(rest)? });
            }
            "affinity" => self.affinity = Some(value.parse()?),
            "ranges" => self.ranges = value.split_whitespace().map(str::to_owned).collect(),
            "label" => self.labels.push(pair()?),
            "slice-label" => self.slice_labels.push(pair()?),
            "annotation" => self.annotations.push(pair()?),
            "ip-mode" => self.ip_mode = Some(value.to_owned()),
            "share" => self.share = Some(value.to_owned()),
            _ => bail!("{key} is no property"),
        }
        Ok(())
    }
}

fn is_local(text: &str) -> Result<bool> {
    match text {
        "Local" => Ok(true),
        "Cluster" => Ok(false),
        _ => bail!("{text} is no traffic policy"),
    }
}

/// `80->8080` is for both protocols, `tcp/80->8080` for one.
fn ports(text: &str) -> Result<Vec<Port>> {
    let mut ports = Vec::new();
    for word in text.split_whitespace() {
        let (protocols, numbers): (&[bool], _) = match word.split_once('/') {
            Some(("tcp", rest)) => (&[false], rest),
            Some(("udp", rest)) => (&[true], rest),
            Some(_) => bail!("{word} has no protocol"),
            None => (&[false, true], word),
        };
        let (port, target) = numbers.split_once("->").with_context(|| format!("{word} leads nowhere"))?;
        let (port, target) = (port.parse()?, target.parse()?);
        ports.extend(protocols.iter().map(|&udp| Port { udp, port, target }));
    }
    Ok(ports)
}

fn endpoints(text: &str) -> Result<Vec<EndpointSpec>> {
    text.split_whitespace()
        .map(|word| {
            let (word, hint) = split(word, '@');
            let (backend, condition) = split(word, ':');
            ensure!(["h1", "h2", "t1", "t2", "n"].contains(&backend), "{backend} is no backend");
            Ok(EndpointSpec { backend: backend.to_owned(), condition, hint })
        })
        .collect()
}

fn cases(line: usize, clients: &str, rest: &str) -> Result<Vec<Case>> {
    let (flow, outcome) = rest.split_once(" = ").context("there is no outcome")?;
    let (outcome, pending) = match outcome.split_once(" pending ") {
        Some((outcome, reason)) => (outcome, Some(reason.to_owned())),
        None => (outcome, None),
    };
    let (ours, theirs) = match outcome.split_once(" | ") {
        Some((ours, theirs)) => (ours, Some(difference(theirs)?)),
        None => (outcome, None),
    };
    let (flow, one_port) = match flow.strip_suffix(" from one port") {
        Some(flow) => (flow, true),
        None => (flow, false),
    };
    let (flow, as_one) = match flow.strip_suffix(" as one") {
        Some(flow) => (flow, true),
        None => (flow, one_port),
    };
    let (flow, families) = match flow.split_once(" in ") {
        Some((flow, "ipv4")) => (flow, vec![Family::V4]),
        Some((flow, "ipv6")) => (flow, vec![Family::V6]),
        Some((_, other)) => bail!("{other} is no family"),
        None => (flow, Family::BOTH.to_vec()),
    };
    let (addresses, transports) = match flow.split_once(" over ") {
        Some((addresses, names)) => (addresses, list(names).map(transport).collect::<Result<Vec<_>>>()?),
        None => (flow, vec![Transport::Tcp, Transport::UdpConnected]),
    };
    let addresses = list(addresses).map(address).collect::<Result<Vec<_>>>()?;
    let asked: Vec<Vec<Address>> =
        if as_one { vec![addresses] } else { addresses.into_iter().map(|one| vec![one]).collect() };
    let ours = Outcome::parse(ours)?;
    let mut cases = Vec::new();
    for client in list(clients) {
        for addresses in &asked {
            cases.push(Case {
                line,
                client: client.to_owned(),
                addresses: addresses.clone(),
                transports: transports.clone(),
                families: families.clone(),
                one_port,
                ours: ours.clone(),
                theirs: theirs.clone(),
                pending: pending.clone(),
            });
        }
    }
    Ok(cases)
}

fn difference(text: &str) -> Result<Difference> {
    let (outcome, heading) = text.split_once('[').context("a difference wants its heading in brackets")?;
    let heading = heading.trim_end().strip_suffix(']').context("a bracket is not closed")?.to_owned();
    Ok(Difference { outcome: Outcome::parse(outcome)?, heading })
}

fn transport(text: &str) -> Result<Transport> {
    match text {
        "tcp" => Ok(Transport::Tcp),
        "udp" => Ok(Transport::UdpConnected),
        "unconnected" => Ok(Transport::UdpUnconnected),
        _ => bail!("{text} is no protocol"),
    }
}

fn address(text: &str) -> Result<Address> {
    let (kind, port) = split(text, ':');
    let port = port.map(|port| port.parse()).transpose()?;
    Ok(Address { kind: kind.to_owned(), port })
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim)
}

fn split(text: &str, at: char) -> (&str, Option<String>) {
    match text.split_once(at) {
        Some((before, after)) => (before, Some(after.to_owned())),
        None => (text, None),
    }
}
