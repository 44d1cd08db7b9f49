//! Rules that route what pods send by its source, as AWS's VPC CNI has them for pods on second interfaces. The answer of
//! such a pod to a client outside would leave by another interface than the client's packets came in by, and a network
//! that checks sources drops it. Programs mark such answers ([`RETURN_MARK`]), and a rule of the agent's own, before those,
//! sends what is marked by the main routing table.

use std::{collections::BTreeSet, fmt};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _};
use kproxy_common::{Address, Cidr, RETURN_MARK};
use rtnetlink::{
    Handle, IpVersion, MulticastGroup, new_multicast_connection,
    packet_route::rule::{RuleAction, RuleAttribute, RuleMessage},
};
use tokio::sync::{mpsc, watch};

const TABLE_MAIN: u32 = 254;
/// Tables that every node has: default, main, local.
const USUAL_TABLES: [u32; 3] = [253, TABLE_MAIN, 255];

/// A rule that sends what comes from a prefix by a table of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceRule {
    /// Its priority: the smallest is asked first.
    pub priority: u32,
    /// From where.
    pub source: Cidr,
    /// The routing table.
    pub table: u32,
}

/// Before which priority the agent's own rule must stand, in IPv4 and in IPv6; `None`: there must be none.
pub type Before = [Option<u32>; 2];

impl SourceRule {
    /// Whether what this address sends is routed by it.
    pub fn covers(&self, address: &Address) -> bool {
        self.source.address().is_v4() == address.is_v4() && self.source.contains(address)
    }
}

impl fmt::Display for SourceRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, table, .. } = self;
        let length = source.prefix_length() - if source.address().is_v4() { 96 } else { 0 };
        write!(f, "from {}/{length} by table {table}", source.address())
    }
}

/// Those of `rules` that route what any of `backends` sends.
pub fn for_backends(rules: &[SourceRule], backends: &BTreeSet<Address>) -> Vec<SourceRule> {
    rules.iter().filter(|rule| backends.iter().any(|address| rule.covers(address))).copied().collect()
}

/// Where the agent's own rules must stand so that they come before these.
pub fn before(rules: &[SourceRule]) -> Before {
    [true, false].map(|is_v4| {
        let of_family = rules.iter().filter(|rule| rule.source.address().is_v4() == is_v4);
        of_family.map(|rule| rule.priority).min()
    })
}

/// For people: what these rules do, and what is done about it.
pub fn text(rules: &[SourceRule]) -> String {
    let each: Vec<_> = rules.iter().map(ToString::to_string).collect();
    format!(
        "rules of this node route what backends here send by its source ({}): their answers to clients outside would leave by \
         other interfaces than the clients' packets came in by",
        each.join("; ")
    )
}

/// Tells all rules by source, now and after every change, and keeps the agent's own where it is wanted. Before that is
/// said, those of an earlier agent stay.
pub async fn follow(
    told: mpsc::Sender<Vec<SourceRule>>,
    mut wanted: watch::Receiver<Option<Before>>,
) -> Result<()> {
    let groups = [MulticastGroup::Ipv4Rule, MulticastGroup::Ipv6Rule];
    let (connection, handle, mut messages) = new_multicast_connection(&groups)
        .context("cannot listen for changes of routing rules (rtnetlink)")?;
    tokio::spawn(connection);
    let mut known = None;
    let mut failed = None;
    loop {
        let all = list(&handle).await?;
        let before = *wanted.borrow_and_update();
        let ensured = match before {
            Some(before) => ensure(&handle, &all, before).await,
            None => Ok(()),
        };
        let error = ensured.err().map(|error| format!("{error:#}"));
        if let (Some(error), true) = (&error, error != failed) {
            tracing::error!("answers of backends whose source is routed elsewhere are lost: {error}");
        }
        failed = error;
        let rules = source_rules(&all);
        if known.as_ref() != Some(&rules) {
            if told.send(rules.clone()).await.is_err() {
                return Ok(());
            }
            known = Some(rules);
        }
        tokio::select! {
            message = messages.next() => message.map(drop).context("the kernel closed the rtnetlink socket")?,
            changed = wanted.changed() => if changed.is_err() {
                return Ok(());
            },
        }
    }
}

/// The rules by source as they are now, for a command that does nothing else meanwhile.
pub fn list_now() -> Result<Vec<SourceRule>> {
    with_handle(async |handle| Ok(source_rules(&list(&handle).await?)))
}

/// Takes the agent's own rules away; how many there were.
pub fn withdraw() -> Result<usize> {
    with_handle(async |handle| {
        let all = list(&handle).await?;
        ensure(&handle, &all, [None, None]).await?;
        Ok(all.iter().filter(|rule| is_own(rule)).count())
    })
}

fn with_handle<T>(act: impl AsyncFnOnce(Handle) -> Result<T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("cannot list the routing rules (rtnetlink)")?;
        tokio::spawn(connection);
        act(handle).await
    })
}

async fn list(handle: &Handle) -> Result<Vec<RuleMessage>> {
    let mut all = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let rules = handle.rule().get(version).execute();
        let rules: Vec<_> = rules.try_collect().await.context("cannot list the routing rules (rtnetlink)")?;
        all.extend(rules);
    }
    Ok(all)
}

/// Makes the agent's own rules those that are wanted.
async fn ensure(handle: &Handle, all: &[RuleMessage], wanted: Before) -> Result<()> {
    for (is_v4, before) in [true, false].into_iter().zip(wanted) {
        let own = all.iter().filter(|rule| is_own(rule) && is_of_v4(rule) == is_v4);
        let (stand, wrong): (Vec<_>, Vec<_>) =
            own.partition(|rule| before.is_some_and(|before| priority(rule) < before));
        if let (Some(before), true) = (before, stand.is_empty()) {
            add(handle, is_v4, before).await?;
        }
        for rule in wrong.into_iter().chain(stand.into_iter().skip(1)) {
            let gone = handle.rule().del(rule.clone()).execute().await;
            gone.context("cannot take away an own routing rule that is not needed")?;
        }
    }
    Ok(())
}

async fn add(handle: &Handle, is_v4: bool, before: u32) -> Result<()> {
    // The rule for the node's own addresses is the very first.
    let priority = before.checked_sub(1).filter(|priority| *priority > 0);
    let priority = priority.with_context(|| {
        format!("a routing rule by source has the priority {before}, before which no other can stand: give it a greater one")
    })?;
    let rule = || {
        let rule = handle.rule().add().priority(priority).fw_mark(RETURN_MARK).table_id(TABLE_MAIN);
        let mut rule = rule.action(RuleAction::ToTable);
        rule.message_mut().attributes.push(RuleAttribute::FwMask(RETURN_MARK));
        rule
    };
    let added = if is_v4 { rule().v4().execute().await } else { rule().v6().execute().await };
    added.with_context(|| {
        format!("cannot add the rule `fwmark {RETURN_MARK:#x}/{RETURN_MARK:#x} lookup main pref {priority}`")
    })
}

fn source_rules(all: &[RuleMessage]) -> Vec<SourceRule> {
    let mut rules: Vec<_> = all.iter().filter_map(source_rule).collect();
    let order =
        |rule: &SourceRule| (rule.priority, rule.source.address(), rule.source.prefix_length(), rule.table);
    rules.sort_by_key(order);
    rules
}

fn source_rule(rule: &RuleMessage) -> Option<SourceRule> {
    let source = rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Source(source) => Some(*source),
        _ => None,
    })?;
    let table = table(rule);
    if rule.header.src_len == 0 || rule.header.action != RuleAction::ToTable || USUAL_TABLES.contains(&table)
    {
        return None;
    }
    let length = u32::from(rule.header.src_len) + if source.is_ipv4() { 96 } else { 0 };
    Some(SourceRule { priority: priority(rule), source: Cidr::new(source.into(), length), table })
}

fn is_own(rule: &RuleMessage) -> bool {
    let has = |wanted: &RuleAttribute| rule.attributes.contains(wanted);
    has(&RuleAttribute::FwMark(RETURN_MARK))
        && has(&RuleAttribute::FwMask(RETURN_MARK))
        && table(rule) == TABLE_MAIN
        && rule.header.src_len == 0
}

fn is_of_v4(rule: &RuleMessage) -> bool {
    i32::from(u8::from(rule.header.family)) == libc::AF_INET
}

fn priority(rule: &RuleMessage) -> u32 {
    let found = rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    found.unwrap_or(0)
}

fn table(rule: &RuleMessage) -> u32 {
    let found = rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Table(table) => Some(*table),
        _ => None,
    });
    found.unwrap_or_else(|| rule.header.table.into())
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn rule(priority: u32, source: &str, length: u32, table: u32) -> SourceRule {
        let source = Address::from(source.parse::<IpAddr>().unwrap());
        SourceRule { priority, source: Cidr::new(source, length), table }
    }

    #[test]
    fn rules_for_backends_are_told_from_others() {
        let rules = [
            rule(1_536, "10.0.1.7", 128, 2),
            rule(1_536, "10.0.2.0", 120, 3),
            rule(200, "2001:db8::", 32, 4),
            rule(100, "192.0.2.11", 128, 5),
        ];
        let backends =
            ["10.0.2.9", "10.0.3.1", "2001:db8::7"].map(|ip| ip.parse::<IpAddr>().unwrap().into()).into();
        let found = for_backends(&rules, &backends);
        assert_eq!(found, [rules[1], rules[2]]);
        assert_eq!(before(&found), [Some(1_536), Some(200)]);
        assert_eq!(before(&[]), [None, None]);
        let text = text(&found);
        assert!(text.contains("from 10.0.2.0/24 by table 3; from 2001:db8::/32 by table 4"), "{text}");
    }
}
