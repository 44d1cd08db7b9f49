//! Reads a case and writes it back.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use kproxy::explain::Hooks;
use kproxy::model::{Change, NodeConfig, NodePortAddresses, PassThroughConfig, PassThroughScope, parse};
use kproxy::wanted::ServiceKey;
use kproxy_common::{Address, Cidr, FrontendKey, Protocol};
use serde_json::Value;

const OBJECTS: &str = "=== objects";
const TABLES: &str = "=== tables";
const EXPLAIN: &str = "=== explain";
const HEALTH: &str = "=== health";

/// A case, parsed.
pub struct Case {
    /// What stands before the first step.
    header: String,
    /// The flags, out of a document of kind NodeConfig in the first step.
    pub config: NodeConfig,
    /// What the programs are told beside the tables.
    pub hooks: Hooks,
    pub steps: Vec<Step>,
    /// The steps' YAML, as written.
    sources: Vec<String>,
}

/// Objects that come, change or go, and what the tables are then.
pub struct Step {
    pub events: Vec<Event>,
    pub printed: Printed,
}

/// What a step prints, section by section; empty without any.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Printed {
    pub tables: String,
    /// Questions and their answers.
    pub explain: String,
    /// What health checks are answered.
    pub health: String,
}

/// One object: its kind, its key, and itself unless it goes.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    kind: Kind,
    key: ServiceKey,
    object: Option<Value>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Kind {
    Service,
    EndpointSlice,
    Node,
    ServiceCidr,
    Pod,
    LocalAddresses,
    Listeners,
}

/// The flags as a document of a case.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Flags {
    kind: String,
    node_name: String,
    node_addresses: Vec<String>,
    cluster_cidrs: Vec<String>,
    service_cidrs: Vec<String>,
    nodeport_addresses: Vec<String>,
    masquerade_all: bool,
    disable_external_ips: bool,
    pass_through_default: bool,
    pass_through_scope: String,
    pass_through_annotations: Vec<String>,
    disable_loopback_nodeports: bool,
    local_addresses: Vec<String>,
}

/// Whether the tables are to be written anew.
pub fn is_update() -> bool {
    std::env::var_os("UPDATE_CASES").is_some_and(|value| value == "1")
}

impl Case {
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)?;
        let mut parts = text.split(OBJECTS);
        let header = parts.next().unwrap_or_default().to_owned();
        ensure!(
            header.lines().filter(|line| line.starts_with("# ")).count() >= 2,
            "the first lines name the rule and its source"
        );
        let config = Flags::default().config()?;
        let hooks = Hooks { loopback_node_ports: true, host_sockets_only: false };
        let mut case = Self { header, config, hooks, steps: Vec::new(), sources: Vec::new() };
        for part in parts {
            let mut sections = sections(part)?;
            let mut printed = |name| sections.remove(name).unwrap_or_default();
            let printed =
                Printed { tables: printed(TABLES), explain: printed(EXPLAIN), health: printed(HEALTH) };
            ensure!(is_update() || !printed.tables.is_empty(), "a step without {TABLES}");
            let source = sections.remove(OBJECTS).unwrap_or_default();
            let events = case.read_events(&source)?;
            case.steps.push(Step { events, printed });
            case.sources.push(source);
        }
        ensure!(!case.steps.is_empty(), "no {OBJECTS} in it");
        Ok(case)
    }

    /// Writes the case with what each step prints.
    pub fn write(&self, path: &Path, printed: &[Printed]) -> Result<()> {
        let mut out = self.header.clone();
        for (at, (source, printed)) in self.sources.iter().zip(printed).enumerate() {
            let Printed { tables, explain, health } = printed;
            let gap = if at == 0 { "" } else { "\n" };
            out += &format!("{gap}{OBJECTS}\n{source}\n{TABLES}\n{tables}");
            for (title, section) in [(EXPLAIN, explain), (HEALTH, health)] {
                if !section.is_empty() {
                    out += &format!("\n{title}\n{section}");
                }
            }
        }
        std::fs::write(path, out).context("writing the case")
    }

    /// Every object that is there after the last step, as it is then.
    pub fn left_at_end(&self) -> Vec<Event> {
        let mut left = BTreeMap::new();
        for event in self.steps.iter().flat_map(|step| &step.events) {
            left.insert((event.kind, event.key.clone()), event.clone());
        }
        left.into_values().filter(|event| event.object.is_some()).collect()
    }

    fn read_events(&mut self, source: &str) -> Result<Vec<Event>> {
        let documents: Vec<Value> = serde_saphyr::from_multiple(source)?;
        let mut events = Vec::new();
        for document in documents.into_iter().filter(|document| !document.is_null()) {
            if document["kind"] == "NodeConfig" {
                let flags: Flags = serde_json::from_value(document)?;
                self.hooks.loopback_node_ports = !flags.disable_loopback_nodeports;
                self.config = flags.config()?;
                continue;
            }
            events.push(Event::read(document)?);
        }
        Ok(events)
    }
}

/// What follows each title of a step; the objects come first.
fn sections(step: &str) -> Result<BTreeMap<&'static str, String>> {
    let mut found: BTreeMap<&'static str, String> = BTreeMap::new();
    let mut title = OBJECTS;
    for line in step.trim_start_matches('\n').lines() {
        if line.starts_with("===") {
            let known = [TABLES, EXPLAIN, HEALTH].into_iter().find(|known| *known == line.trim_end());
            title = known.with_context(|| format!("no section is called {line}"))?;
            ensure!(!found.contains_key(title), "{title} twice in a step");
        }
        let section = found.entry(title).or_default();
        if !line.starts_with("===") {
            *section += &format!("{line}\n");
        }
    }
    found.values_mut().for_each(|text| *text = format!("{}\n", text.trim_matches('\n')));
    Ok(found)
}

impl Event {
    /// The same object, going away.
    pub fn gone(&self) -> Self {
        Self { object: None, ..self.clone() }
    }

    pub fn change(&self) -> Change {
        let key = self.key.clone();
        match self.kind {
            Kind::Service => Change::Service(key, self.read_as()),
            Kind::EndpointSlice => Change::EndpointSlice(key, self.read_as()),
            Kind::Node => Change::Node(self.read_as()),
            Kind::ServiceCidr => Change::ServiceCidr(key.name, self.read_as()),
            Kind::Pod => Change::Pod(key, self.read_as()),
            Kind::LocalAddresses => {
                // An address, or `ADDRESS on INTERFACE`.
                let addresses: Option<Box<Vec<String>>> = self.read_as();
                let addresses = addresses.iter().flat_map(|list| list.iter());
                let of = |text: &'_ String| match text.split_once(" on ") {
                    Some((ip, interface)) => (ip_of(ip), interface.to_owned()),
                    None => (ip_of(text), "eth0".to_owned()),
                };
                let addresses: Vec<_> = addresses.map(of).collect();
                Change::LocalAddresses(addresses.iter().map(|(ip, on)| (*ip, on.as_str())).collect())
            }
            Kind::Listeners => {
                let listeners: Option<Box<Vec<String>>> = self.read_as();
                let listeners = listeners.iter().flat_map(|list| list.iter());
                Change::Listeners(Some(listeners.map(|text| frontend_of(text)).collect()))
            }
        }
    }

    fn read(document: Value) -> Result<Self> {
        if let Some(gone) = document["delete"].as_str() {
            let (kind, name) = gone.split_once(' ').context("delete: KIND NAMESPACE/NAME")?;
            let (namespace, name) = name.split_once('/').unwrap_or(("", name));
            let key = ServiceKey { namespace: namespace.to_owned(), name: name.to_owned() };
            return Ok(Self { kind: Kind::read(kind)?, key, object: None });
        }
        let kind = Kind::read(document["kind"].as_str().context("a document without a kind")?)?;
        if matches!(kind, Kind::LocalAddresses | Kind::Listeners) {
            let key = ServiceKey { namespace: String::new(), name: String::new() };
            return Ok(Self { kind, key, object: Some(document["addresses"].clone()) });
        }
        let metadata = &document["metadata"];
        let name = metadata["name"].as_str().context("an object without a name")?.to_owned();
        let is_namespaced = matches!(kind, Kind::Service | Kind::EndpointSlice | Kind::Pod);
        let default = if is_namespaced { "default" } else { "" };
        let namespace = metadata["namespace"].as_str().unwrap_or(default).to_owned();
        let event = Self { kind, key: ServiceKey { namespace, name }, object: Some(document) };
        Ok(event)
    }

    fn read_as<T: serde::de::DeserializeOwned>(&self) -> Option<Box<T>> {
        let object = self.object.clone()?;
        Some(Box::new(serde_json::from_value(object).unwrap_or_else(|error| panic!("{self:?}: {error}"))))
    }
}

impl Kind {
    fn read(kind: &str) -> Result<Self> {
        Ok(match kind {
            "Service" => Self::Service,
            "EndpointSlice" => Self::EndpointSlice,
            "Node" => Self::Node,
            "ServiceCIDR" => Self::ServiceCidr,
            "Pod" => Self::Pod,
            "LocalAddresses" => Self::LocalAddresses,
            "Listeners" => Self::Listeners,
            other => bail!("cases know no kind {other}"),
        })
    }
}

impl Default for Flags {
    fn default() -> Self {
        Self {
            kind: String::new(),
            node_name: "node-a".to_owned(),
            node_addresses: Vec::new(),
            cluster_cidrs: Vec::new(),
            service_cidrs: Vec::new(),
            nodeport_addresses: vec!["primary".to_owned()],
            masquerade_all: false,
            disable_external_ips: false,
            pass_through_default: false,
            pass_through_scope: "all".to_owned(),
            pass_through_annotations: Vec::new(),
            disable_loopback_nodeports: false,
            local_addresses: Vec::new(),
        }
    }
}

impl Flags {
    fn config(self) -> Result<NodeConfig> {
        let Self {
            kind: _,
            node_name,
            node_addresses,
            cluster_cidrs,
            service_cidrs,
            nodeport_addresses,
            masquerade_all,
            disable_external_ips,
            pass_through_default,
            pass_through_scope,
            pass_through_annotations,
            disable_loopback_nodeports: _,
            local_addresses,
        } = self;
        Ok(NodeConfig {
            node_name,
            node_addresses: node_addresses.iter().map(|ip| ip_of(ip)).collect(),
            cluster_cidrs: cidrs_of(&cluster_cidrs),
            service_cidrs: cidrs_of(&service_cidrs),
            nodeport_addresses: match nodeport_addresses.as_slice() {
                [one] if one == "primary" => NodePortAddresses::Primary,
                cidrs => NodePortAddresses::Cidrs(cidrs_of(cidrs)),
            },
            masquerade_all,
            disable_external_ips,
            pass_through: PassThroughConfig {
                default: pass_through_default,
                scope: match pass_through_scope.as_str() {
                    "all" => PassThroughScope::All,
                    "pods" => PassThroughScope::Pods,
                    "nodes" => PassThroughScope::Nodes,
                    other => bail!("no scope {other}"),
                },
                extra_annotations: pass_through_annotations,
            },
            has_netns_cookies: true,
            local_addresses: local_addresses.iter().map(|ip| ip_of(ip)).collect(),
        })
    }
}

fn ip_of(text: &str) -> Address {
    parse::ip(text).unwrap_or_else(|| panic!("{text} is no address"))
}

/// `10.96.0.10:53/UDP`.
fn frontend_of(text: &str) -> FrontendKey {
    let (to, protocol) = text.split_once('/').unwrap_or((text, "TCP"));
    let to: std::net::SocketAddr = to.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
    let protocol = if protocol == "UDP" { Protocol::Udp } else { Protocol::Tcp };
    FrontendKey::new(to.ip().into(), to.port(), protocol)
}

fn cidrs_of(texts: &[String]) -> Vec<Cidr> {
    texts.iter().map(|text| parse::cidr(text).unwrap_or_else(|| panic!("{text} is no CIDR"))).collect()
}
