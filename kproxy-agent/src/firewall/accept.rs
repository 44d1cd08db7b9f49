//! `--accept-forward`: rules that let traffic of Services through where iptables' chain FORWARD drops by default.
//!
//! They must be in that very chain: what another chain accepts is dropped there all the same. So they are two rules of it, known by
//! their comment: packets that a packet program has sent on to a backend, told by their mark, and the packets of connections that
//! are established, as kube-proxy's KUBE-FORWARD has them. Chains of others that speak nf_tables directly are not touched.

use std::process::Command;

use super::{FirewallError, ForwardDrop, Keeper, output};

/// The bit of the mark by which the packet programs tell what they sent on. Not one that kube-proxy has (0x4000, 0x8000): what it
/// left would mask or drop the packet.
pub const FORWARD_MARK: u32 = 0x2000;

const COMMENT: &str = "kproxy --accept-forward";

/// The tools of each keeper and family; the first that is here.
const TOOLS: [(Keeper, &str, [&str; 2]); 4] = [
    (Keeper::IptablesNft, "ip", ["iptables-nft", "iptables"]),
    (Keeper::IptablesNft, "ip6", ["ip6tables-nft", "ip6tables"]),
    (Keeper::IptablesLegacy, "ip", ["iptables-legacy", "iptables"]),
    (Keeper::IptablesLegacy, "ip6", ["ip6tables-legacy", "ip6tables"]),
];

/// Sees to it that the rules are in these chains. Returns those that it does not touch, which drop on.
pub fn accept(drops: &[ForwardDrop]) -> Result<Vec<ForwardDrop>, FirewallError> {
    let mut left = Vec::new();
    for drop in drops {
        let Some(tool) = tool(drop.keeper, &drop.family)? else {
            left.push(drop.clone());
            continue;
        };
        // The last becomes the first.
        for rule in rules().iter().rev() {
            if !runs(tool, "-C", rule)? {
                output(tool, &arguments("-I", rule))?;
                tracing::info!("{tool}: FORWARD accepts traffic of Services now: {}", rule.join(" "));
            }
        }
    }
    Ok(left)
}

/// Takes the rules out of every chain. How many there were.
pub fn withdraw() -> Result<usize, FirewallError> {
    let mut removed = 0;
    for (keeper, family, _) in TOOLS {
        // The tool would make the table that it is asked for.
        if keeper == Keeper::IptablesLegacy && !super::has_legacy_filter(family) {
            continue;
        }
        let Some(tool) = tool(keeper, family)? else { continue };
        for rule in rules() {
            while runs(tool, "-C", &rule)? && runs(tool, "-D", &rule)? {
                removed += 1;
            }
        }
    }
    Ok(removed)
}

fn rules() -> [Vec<String>; 2] {
    let mark = format!("{FORWARD_MARK:#x}/{FORWARD_MARK:#x}");
    let rule = |matches: &[&str]| {
        let comment = ["-m", "comment", "--comment", COMMENT, "-j", "ACCEPT"];
        matches.iter().chain(&comment).map(|word| (*word).to_owned()).collect()
    };
    [rule(&["-m", "mark", "--mark", &mark]), rule(&["-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED"])]
}

/// Waits for the lock of iptables, which others take, too.
fn arguments<'a>(action: &'a str, rule: &'a [String]) -> Vec<&'a str> {
    ["-w", "5", action, "FORWARD"].into_iter().chain(rule.iter().map(String::as_str)).collect()
}

fn tool(keeper: Keeper, family: &str) -> Result<Option<&'static str>, FirewallError> {
    let known = TOOLS.into_iter().find(|(other, of, _)| *other == keeper && *of == family);
    let Some((.., [exact, plain])) = known else { return Ok(None) };
    if output(exact, &["-V"])?.is_some() {
        return Ok(Some(exact));
    }
    // Elsewhere the plain name is either of the two.
    let Some(version) = output(plain, &["-V"])? else { return Ok(None) };
    let is_nft = version.contains("nf_tables");
    Ok((is_nft == (keeper == Keeper::IptablesNft)).then_some(plain))
}

/// Whether it succeeds: checking for a rule that is not there does not.
fn runs(tool: &str, action: &str, rule: &[String]) -> Result<bool, FirewallError> {
    let output = Command::new(tool).args(arguments(action, rule)).output();
    let output = output.map_err(|error| FirewallError::Failed(format!("{tool}: {error}")))?;
    Ok(output.status.success())
}
