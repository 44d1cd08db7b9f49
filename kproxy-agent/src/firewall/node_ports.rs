//! Firewall rules on NodePort numbers that stand before the place where kube-proxy translates.
//!
//! kube-proxy translates a NodePort in netfilter's prerouting hook at priority -100 (dstnat): rules of raw and
//! mangle, and nftables chains before that, see the NodePort's number. kproxy translates before netfilter, so
//! that such a rule meets the backend's address and port, and does not match.

use serde_json::Value;

use super::{FirewallError, LEGACY, has_legacy_table, objects, output};

/// The priority at which destinations are translated (`NF_IP_PRI_NAT_DST`).
const DSTNAT: i64 = -100;

/// The names that nft gives to priorities, as far as they are before [`DSTNAT`].
const EARLY_NAMES: [(&str, i64); 2] = [("raw", -300), ("mangle", -150)];

/// The tables of iptables whose PREROUTING chain comes before nat's.
const EARLY_TABLES: [&str; 2] = ["raw", "mangle"];

/// The rules before [`DSTNAT`] that match on a destination port for which `is_node_port` holds, as their tools
/// write them; those that send elsewhere are named by where they stand.
///
/// # Errors
///
/// There is no tool, or it failed.
pub fn early_rules(is_node_port: impl Fn(u16) -> bool) -> Result<Vec<String>, FirewallError> {
    let mut found = Vec::new();
    let mut is_known = false;
    if let Some(text) = output("nft", &["-j", "list", "ruleset"])? {
        is_known = true;
        found.extend(from_nft(&text, &is_node_port));
    }
    // Rules of iptables on nf_tables are in nft's answer too, but as something that only iptables can read.
    for command in ["iptables-nft-save", "ip6tables-nft-save"] {
        for table in EARLY_TABLES {
            if let Some(text) = output(command, &["-t", table])? {
                is_known = true;
                found.extend(from_save(&text, command, table, &is_node_port));
            }
        }
    }
    for (_, names, command) in LEGACY {
        let command = format!("{command}-save");
        for table in EARLY_TABLES.into_iter().filter(|table| has_legacy_table(names, table)) {
            if let Some(text) = output(&command, &["-t", table])? {
                is_known = true;
                found.extend(from_save(&text, &command, table, &is_node_port));
            }
        }
    }
    if is_known { Ok(found) } else { Err(FirewallError::NoTool) }
}

/// From what `iptables-save` prints of one table, whose rules in all chains may be jumped to from PREROUTING.
fn from_save(saved: &str, command: &str, table: &str, is_node_port: &impl Fn(u16) -> bool) -> Vec<String> {
    let rules = saved.lines().filter(|line| {
        line.starts_with("-A ") && !line.starts_with("-A OUTPUT ") && !line.starts_with("-A POSTROUTING ")
    });
    let matches = rules.filter(|rule| {
        let mut words = rule.split_whitespace();
        while let Some(word) = words.next() {
            if matches!(word, "--dport" | "--dports" | "--destination-port" | "--destination-ports")
                && let Some(ports) = words.next()
                && ports.split(',').any(|ports| any_in(ports, ':', is_node_port))
            {
                return true;
            }
        }
        false
    });
    matches.map(|rule| format!("{command} -t {table}: {rule}")).collect()
}

/// From `nft -j list ruleset`: rules of base chains at ingress, or at prerouting before [`DSTNAT`].
fn from_nft(text: &str, is_node_port: &impl Fn(u16) -> bool) -> Vec<String> {
    let name = |value: &Value, of: &str| value[of].as_str().unwrap_or_default().to_owned();
    let place =
        |value: &Value, chain: &str| (name(value, "family"), name(value, "table"), name(value, chain));
    let chains = objects(text, "chain");
    let early: Vec<_> =
        chains.iter().filter(|chain| is_early(chain)).map(|chain| place(chain, "name")).collect();
    let rules = objects(text, "rule");
    let found = rules.iter().filter(|rule| {
        let expressions = rule["expr"].as_array().into_iter().flatten();
        early.contains(&place(rule, "chain"))
            && expressions.map(|expression| &expression["match"]).any(|one| {
                one["left"]["payload"]["field"] == "dport" && ports_of(&one["right"], is_node_port)
            })
    });
    found
        .map(|rule| {
            let (family, table, chain) = place(rule, "chain");
            format!("nft {family} {table} {chain}: handle {}", rule["handle"])
        })
        .collect()
}

fn is_early(chain: &Value) -> bool {
    let priority = match &chain["prio"] {
        Value::String(text) => {
            EARLY_NAMES.iter().find(|(name, _)| name == text).map(|(_, priority)| *priority)
        }
        number => number.as_i64(),
    };
    match chain["hook"].as_str() {
        Some("ingress") => true,
        Some("prerouting") => priority.is_some_and(|priority| priority < DSTNAT),
        _ => false,
    }
}

/// Whether the right side of a match has such a port: a number, a range, or a set of these.
fn ports_of(value: &Value, is_node_port: &impl Fn(u16) -> bool) -> bool {
    let number = |value: &Value| value.as_u64().and_then(|number| u16::try_from(number).ok());
    if let Some(port) = number(value) {
        return is_node_port(port);
    }
    if let [first, last] = value["range"].as_array().map(Vec::as_slice).unwrap_or_default() {
        return number(first).zip(number(last)).is_some_and(|(first, last)| (first..=last).any(is_node_port));
    }
    value["set"].as_array().into_iter().flatten().any(|item| ports_of(item, is_node_port))
}

/// Whether a port, or a range with this separator, has such a port. Names of services count for nothing: no
/// NodePort has one.
fn any_in(text: &str, separator: char, is_node_port: &impl Fn(u16) -> bool) -> bool {
    let (first, last) = text.split_once(separator).unwrap_or((text, text));
    match (first.parse::<u16>(), last.parse::<u16>()) {
        (Ok(first), Ok(last)) => (first..=last).any(is_node_port),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_node_port(port: u16) -> bool {
        port == 30_080
    }

    #[test]
    fn rules_of_iptables_are_found_by_their_ports() {
        let saved = "*raw\n:PREROUTING ACCEPT [0:0]\n\
            -A PREROUTING -p tcp -m tcp --dport 30080 -j DROP\n\
            -A PREROUTING -p tcp -m tcp --dport 30000:32767 -j CHECK\n\
            -A CHECK -p udp -m multiport --dports 80,30080 -j DROP\n\
            -A PREROUTING -p tcp -m tcp --dport 30081 -j DROP\n\
            -A PREROUTING -p tcp -m tcp --sport 30080 -j DROP\n\
            -A OUTPUT -p tcp -m tcp --dport 30080 -j DROP\nCOMMIT\n";
        let found = from_save(saved, "iptables-nft-save", "raw", &is_node_port);
        assert_eq!(
            found,
            [
                "iptables-nft-save -t raw: -A PREROUTING -p tcp -m tcp --dport 30080 -j DROP",
                "iptables-nft-save -t raw: -A PREROUTING -p tcp -m tcp --dport 30000:32767 -j CHECK",
                "iptables-nft-save -t raw: -A CHECK -p udp -m multiport --dports 80,30080 -j DROP",
            ]
        );
    }

    #[test]
    fn rules_of_nftables_are_found_where_they_come_before_translation() {
        let rule = |chain: &str, right: &str, handle: u32| {
            format!(
                r#"{{"rule": {{"family": "inet", "table": "fw", "chain": "{chain}", "handle": {handle}, "expr":
                [{{"match": {{"op": "==", "left": {{"payload": {{"protocol": "tcp", "field": "dport"}}}}, "right": {right}}}}},
                 {{"drop": null}}]}}}}"#
            )
        };
        let chain = |name: &str, hook: &str, prio: &str| {
            format!(
                r#"{{"chain": {{"family": "inet", "table": "fw", "name": "{name}", "hook": "{hook}", "prio": {prio}}}}}"#
            )
        };
        let items = [
            chain("early", "prerouting", "-150"),
            chain("named", "prerouting", "\"raw\""),
            chain("late", "prerouting", "-100"),
            chain("input", "input", "0"),
            chain("device", "ingress", "0"),
            rule("early", "30080", 1),
            rule("early", "30081", 2),
            rule("named", r#"{"range": [30000, 32767]}"#, 3),
            rule("late", "30080", 4),
            rule("input", "30080", 5),
            rule("device", r#"{"set": [80, {"range": [30079, 30090]}]}"#, 6),
        ];
        let text = format!(r#"{{"nftables": [{}]}}"#, items.join(","));
        assert_eq!(
            from_nft(&text, &is_node_port),
            ["nft inet fw early: handle 1", "nft inet fw named: handle 3", "nft inet fw device: handle 6"]
        );
        assert!(from_nft("nonsense", &is_node_port).is_empty());
    }
}
