//! The host's firewall, as far as it decides whether kproxy's traffic gets through: forward chains that drop what
//! no rule accepts, and what a kube-proxy left behind. Read by the usual tools; without them nothing is known.

mod accept;
mod node_ports;

use std::{fs, io, process::Command};

use serde_json::Value;

pub use accept::{FORWARD_MARK, accept, withdraw};
pub use node_ports::early_rules;

/// A chain at the forward hook with policy DROP: what arrives for pods of this node is dropped there unless a
/// rule of that very chain accepts it; what another chain accepts does not count.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ForwardDrop {
    /// Who keeps the chain.
    pub keeper: Keeper,
    /// `ip`, `ip6` or `inet`, as nft calls the family.
    pub family: String,
    /// The table and the chain.
    pub chain: String,
}

/// By which tool a chain is kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Keeper {
    /// iptables on nf_tables.
    IptablesNft,
    /// iptables on its own tables.
    IptablesLegacy,
    /// Somebody who speaks nf_tables directly.
    Nftables,
}

/// What a kube-proxy left behind.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Leftover {
    /// What it is.
    pub what: String,
    /// How it is removed.
    pub mend: String,
}

/// Why the firewall cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// There is no tool for it.
    #[error("neither nft nor iptables is here")]
    NoTool,
    /// It failed.
    #[error("{0}")]
    Failed(String),
}

/// All forward chains with policy DROP in this network namespace.
pub fn forward_drops() -> Result<Vec<ForwardDrop>, FirewallError> {
    let mut found = Vec::new();
    let mut is_known = false;
    if let Some(text) = output("nft", &["-j", "list", "chains"])? {
        is_known = true;
        found.extend(from_nft(&text));
    }
    for (family, names, command) in LEGACY {
        // The tool would make the table that it is asked for.
        if !has_legacy_table(names, "filter") {
            continue;
        }
        if let Some(text) = output(command, &["-S", "FORWARD"])? {
            is_known = true;
            found.extend(drops_by_default(&text).then(|| ForwardDrop {
                keeper: Keeper::IptablesLegacy,
                family: (*family).to_owned(),
                chain: "filter FORWARD".to_owned(),
            }));
        }
    }
    if !is_known && output("iptables", &["-V"])?.is_none() {
        return Err(FirewallError::NoTool);
    }
    found.sort();
    Ok(found)
}

/// Rules of a kube-proxy, of any mode, in this network namespace.
pub fn kube_proxy_leftovers() -> Result<Vec<Leftover>, FirewallError> {
    let mut found = Vec::new();
    let mut is_known = false;
    if let Some(text) = output("nft", &["-j", "list", "tables"])? {
        is_known = true;
        found.extend(nft_tables(&text, "kube-proxy").into_iter().map(|family| Leftover {
            what: format!("the nftables table {family} kube-proxy"),
            mend: format!("nft delete table {family} kube-proxy"),
        }));
    }
    for command in ["iptables-nft-save", "ip6tables-nft-save"] {
        if let Some(text) = output(command, &["-t", "nat"])? {
            is_known = true;
            found.extend(has_kube_chains(&text).then(|| kube_chains(command)));
        }
    }
    for (_, names, command) in LEGACY {
        let command = format!("{command}-save");
        if has_legacy_table(names, "nat")
            && let Some(text) = output(&command, &["-t", "nat"])?
        {
            is_known = true;
            found.extend(has_kube_chains(&text).then(|| kube_chains(&command)));
        }
    }
    if !is_known {
        return Err(FirewallError::NoTool);
    }
    Ok(found)
}

/// Family, the file that names its legacy tables, and the tool for them.
const LEGACY: &[(&str, &str, &str)] = &[
    ("ip", "/proc/net/ip_tables_names", "iptables-legacy"),
    ("ip6", "/proc/net/ip6_tables_names", "ip6tables-legacy"),
];

fn has_legacy_filter(family: &str) -> bool {
    LEGACY.iter().any(|(of, names, _)| *of == family && has_legacy_table(names, "filter"))
}

fn has_legacy_table(names: &str, table: &str) -> bool {
    fs::read_to_string(names).is_ok_and(|text| text.lines().any(|line| line == table))
}

fn kube_chains(command: &str) -> Leftover {
    Leftover {
        what: format!("chains KUBE-SERVICES (by {command})"),
        mend: "run `kube-proxy --cleanup`".to_owned(),
    }
}

fn has_kube_chains(saved: &str) -> bool {
    saved.lines().any(|line| line.starts_with(":KUBE-SERVICES "))
}

fn drops_by_default(rules: &str) -> bool {
    rules.lines().any(|line| line == "-P FORWARD DROP")
}

/// From `nft -j list chains`.
fn from_nft(text: &str) -> Vec<ForwardDrop> {
    let chain = |chain: &Value| {
        let field = |name: &str| chain[name].as_str().unwrap_or_default().to_owned();
        if chain["hook"] != "forward" || chain["policy"] != "drop" {
            return None;
        }
        let (family, table, name) = (field("family"), field("table"), field("name"));
        let is_iptables = matches!(family.as_str(), "ip" | "ip6") && table == "filter" && name == "FORWARD";
        let keeper = if is_iptables { Keeper::IptablesNft } else { Keeper::Nftables };
        matches!(family.as_str(), "ip" | "ip6" | "inet").then(|| ForwardDrop {
            keeper,
            family,
            chain: format!("{table} {name}"),
        })
    };
    objects(text, "chain").iter().filter_map(chain).collect()
}

/// The families that have a table of this name, from `nft -j list tables`.
fn nft_tables(text: &str, name: &str) -> Vec<String> {
    let tables = objects(text, "table");
    let named = tables.iter().filter(|table| table["name"] == name);
    named.filter_map(|table| table["family"].as_str().map(str::to_owned)).collect()
}

fn objects(text: &str, kind: &str) -> Vec<Value> {
    let parsed: Value = serde_json::from_str(text).unwrap_or_default();
    let items = parsed["nftables"].as_array().into_iter().flatten();
    items.filter_map(|item| item.get(kind)).cloned().collect()
}

/// What a program prints; `None` if it is not here.
fn output(program: &str, arguments: &[&str]) -> Result<Option<String>, FirewallError> {
    let failed = |why: String| FirewallError::Failed(format!("{program} {}: {why}", arguments.join(" ")));
    let output = match Command::new(program).args(arguments).output() {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error.to_string())),
    };
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()))
}

impl ForwardDrop {
    /// What an operator can do about it.
    pub fn mend(&self) -> String {
        let Self { keeper, family, chain } = self;
        let six = if family == "ip6" { "6" } else { "" };
        match keeper {
            Keeper::IptablesNft => {
                format!("give the agent --accept-forward, or ip{six}tables -P FORWARD ACCEPT")
            }
            Keeper::IptablesLegacy => {
                format!("give the agent --accept-forward, or ip{six}tables-legacy -P FORWARD ACCEPT")
            }
            Keeper::Nftables => format!(
                "add a rule that accepts traffic for pods to this very chain: nft insert rule {family} {chain} …; a rule \
                 elsewhere does not help"
            ),
        }
    }
}

impl std::fmt::Display for ForwardDrop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { keeper, family, chain } = self;
        let keeper = match keeper {
            Keeper::IptablesNft => "iptables (nf_tables)",
            Keeper::IptablesLegacy => "iptables (legacy)",
            Keeper::Nftables => "nftables",
        };
        write!(f, "{keeper} {family} {chain} has policy DROP")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_that_drop_are_found_wherever_they_are() {
        let text = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}},
            {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "handle": 1, "type": "filter",
                       "hook": "forward", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "ip6", "table": "filter", "name": "FORWARD", "handle": 1, "type": "filter",
                       "hook": "forward", "prio": 0, "policy": "accept"}},
            {"chain": {"family": "inet", "table": "fw", "name": "fwd", "handle": 1, "type": "filter",
                       "hook": "forward", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "bridge", "table": "fw", "name": "fwd", "handle": 1, "type": "filter",
                       "hook": "forward", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "ip", "table": "filter", "name": "INPUT", "handle": 2, "type": "filter",
                       "hook": "input", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "ip", "table": "filter", "name": "KUBE-FORWARD", "handle": 3}}]}"#;
        let found: Vec<_> = from_nft(text).iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "iptables (nf_tables) ip filter FORWARD has policy DROP",
                "nftables inet fw fwd has policy DROP"
            ]
        );
        assert_eq!(from_nft("nonsense"), []);
        assert!(drops_by_default("-P FORWARD DROP\n-A FORWARD -j ACCEPT\n"));
        assert!(!drops_by_default("-P FORWARD ACCEPT\n"));
    }

    #[test]
    fn what_kube_proxy_left_is_found() {
        let tables = r#"{"nftables": [{"table": {"family": "ip", "name": "kube-proxy", "handle": 1}},
            {"table": {"family": "ip6", "name": "kube-proxy", "handle": 2}},
            {"table": {"family": "ip", "name": "filter", "handle": 3}}]}"#;
        assert_eq!(nft_tables(tables, "kube-proxy"), ["ip", "ip6"]);
        assert!(has_kube_chains("*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\nCOMMIT\n"));
        assert!(!has_kube_chains("*nat\n:KUBE-SERVICES-OLD - [0:0]\nCOMMIT\n"));
    }
}
