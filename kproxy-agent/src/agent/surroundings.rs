//! What on this node stands in kproxy's way, told once at the start: `kproxy check` tells it whenever it is asked.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    events::{EventReason, Events},
    firewall::{self, FirewallError, ForwardDrop, Leftover},
    model::leftover_of,
};

/// How often it is seen to that the firewall accepts: others change it, too.
const AGAIN: Duration = Duration::from_secs(60);

/// Looks around, beside everything else: the firewall's tools take their time where there are many rules. With
/// `accept_forward` traffic of Services is let through where it would be dropped.
pub fn look(events: &Events, accept_forward: bool) {
    let events = events.clone();
    tokio::spawn(async move {
        let of_task = events.clone();
        let look = move || {
            tell(&of_task, EventReason::KubeProxyLeftovers, kube_proxy(firewall::kube_proxy_leftovers()));
            if !accept_forward {
                // Of an agent that was told to.
                known(firewall::withdraw());
                tell(&of_task, EventReason::ForwardPolicyDrop, forward_policy(firewall::forward_drops()));
            }
        };
        // A panic in there is told by its hook; nothing depends on what it found.
        let _ = tokio::task::spawn_blocking(look).await;
        if !accept_forward {
            return;
        }
        let mut told = None;
        loop {
            let accept = || firewall::forward_drops().and_then(|drops| firewall::accept(&drops));
            let Ok(left) = tokio::task::spawn_blocking(accept).await else { return };
            let text = match left {
                Ok(left) => forward_policy(Ok(left)),
                Err(error) => Some(format!(
                    "--accept-forward: whether traffic from outside to pods gets through the firewall is not known: {error}"
                )),
            };
            // Once, as long as it stays the same.
            if text != told {
                tell(&events, EventReason::ForwardPolicyDrop, text.clone());
                told = text;
            }
            tokio::time::sleep(AGAIN).await;
        }
    });
}

/// Says it in the log and as an Event on the Node; `None`: it is so no more.
pub fn tell(events: &Events, reason: EventReason, text: Option<String>) {
    if let Some(text) = &text {
        tracing::warn!("{text}");
    }
    events.on_node(reason, text);
}

fn forward_policy(found: Result<Vec<ForwardDrop>, FirewallError>) -> Option<String> {
    let found = known(found)?;
    let each: Vec<_> = found.iter().map(|drop| format!("{drop}: {}", drop.mend())).collect();
    (!each.is_empty()).then(|| {
        format!("traffic from outside to pods is dropped unless a rule accepts it: {}", each.join("; "))
    })
}

fn kube_proxy(found: Result<Vec<Leftover>, FirewallError>) -> Option<String> {
    let found = known(found)?;
    let what: Vec<_> = found.iter().map(|leftover| leftover.what.as_str()).collect();
    (!what.is_empty()).then(|| {
        format!(
            "a kube-proxy is or was on this node, whose rules short-circuit pass-through addresses ({}): remove it, then run \
             `kube-proxy --cleanup`",
            what.join(", ")
        )
    })
}

/// These interfaces of other proxies are on the node now. Which addresses in pass-through they hold, the model says of each
/// Service.
pub fn tell_leftovers(events: &Events, interfaces: &BTreeSet<String>) {
    let each: Vec<_> = interfaces
        .iter()
        .filter_map(|name| {
            Some(format!("{name}, a leftover of {}: ip link delete {name}", leftover_of(name)?))
        })
        .collect();
    let text = format!(
        "what no Service serves of the load-balancer and external IPs on it ends on this node, addresses in pass-through above \
         all; ClusterIPs and what is served are not affected: {}",
        each.join("; ")
    );
    tell(events, EventReason::LeftoverInterface, (!each.is_empty()).then_some(text));
}

fn known<T>(found: Result<T, FirewallError>) -> Option<T> {
    found.inspect_err(|error| tracing::debug!("the firewall is not looked at: {error}")).ok()
}
