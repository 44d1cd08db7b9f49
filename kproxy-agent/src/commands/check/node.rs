//! What else on a node decides whether Services work: what a kube-proxy left, the firewall, bridges, sysctls.

use std::{collections::BTreeSet, fs, net::IpAddr, path::Path};

use anyhow::Result;
use kproxy_common::{Address, Backend, ClientKind, FrontendKind, Mode, Tables as _};

use super::{Finding, Status, finding};
use crate::{
    agent::{RESERVED_PORTS, net_sysctls, reserved_ports_cover},
    devices,
    firewall::{FirewallError, forward_drops, kube_proxy_leftovers},
    maps::kernel::{FirstError, KernelMaps, Lookup},
    model::leftover_of,
    source_routes,
};

/// kube-proxy's rules translate what kproxy leaves alone, pass-through addresses above all.
pub fn kube_proxy() -> Finding {
    let check = "kube-proxy";
    match kube_proxy_leftovers() {
        Ok(found) if found.is_empty() => finding(check, Status::Ok, "no rules of it are on this node"),
        Ok(found) => {
            let what: Vec<_> = found.iter().map(|leftover| leftover.what.as_str()).collect();
            let mends: Vec<_> = found.iter().map(|leftover| leftover.mend.as_str()).collect();
            let mut mends = mends;
            mends.dedup();
            let detail = format!(
                "{}: they short-circuit pass-through addresses, and translate what kproxy would: remove kube-proxy from this \
                 node, then run `kube-proxy --cleanup` ({})",
                what.join(", "),
                mends.join("; ")
            );
            finding(check, Status::Warning, detail)
        }
        Err(error) => not_looked_at(check, &error),
    }
}

/// Interfaces that other proxies have put the addresses of all Services on.
pub fn leftovers(bpf_root: &Path) -> Finding {
    let check = "leftover interfaces";
    let devices = match devices::list_now() {
        Ok(devices) => devices,
        Err(error) => return finding(check, Status::Warning, format!("{error:#}")),
    };
    let found = devices.values().filter_map(|device| Some((device, leftover_of(&device.name)?)));
    let found: Vec<_> = found.collect();
    if found.is_empty() {
        return finding(check, Status::Ok, "kube-proxy's IPVS mode and kube-router have left none");
    }
    let passed = passed_through(bpf_root).unwrap_or_default();
    let each = found.iter().map(|(device, whose)| {
        let name = &device.name;
        let swallowed: Vec<_> = device.addresses.intersection(&passed).map(ToString::to_string).collect();
        let passed = if swallowed.is_empty() {
            "no address in pass-through that the maps hold stands there".to_owned()
        } else {
            format!("{}, in pass-through, never leave this node", swallowed.join(", "))
        };
        format!("{name}, of {whose}: {passed}: ip link delete {name}")
    });
    let detail = format!(
        "{}; other load-balancer and external IPs there are affected where no Service serves them, ClusterIPs are not",
        each.collect::<Vec<_>>().join("; ")
    );
    finding(check, Status::Warning, detail)
}

/// Rules that lead a backend's answers out elsewhere than its clients came in.
pub fn routing_by_source(bpf_root: &Path) -> Finding {
    let check = "routing by source";
    let rules = match source_routes::list_now() {
        Ok(rules) => rules,
        Err(error) => return finding(check, Status::Warning, format!("{error:#}")),
    };
    let found = source_routes::for_backends(&rules, &backends_here(bpf_root).unwrap_or_default());
    if found.is_empty() {
        return finding(check, Status::Ok, "no rule routes what backends on this node send by its source");
    }
    let mut detail = format!(
        "{}: the agent marks them and sends them by the main table, where the interfaces of their pods have packet programs",
        source_routes::text(&found)
    );
    let filter = "/proc/sys/net/ipv4/conf/all/rp_filter";
    if fs::read_to_string(filter).is_ok_and(|text| text.trim() == "1") {
        detail += "; what comes in for them is dropped by strict reverse path filtering: sysctl -w net.ipv4.conf.all.rp_filter=2";
    }
    finding(check, Status::Warning, detail)
}

/// The backends on this node; none where no agent has written any maps.
fn backends_here(bpf_root: &Path) -> Option<BTreeSet<Address>> {
    let maps = KernelMaps::open(bpf_root).ok()?;
    let error = FirstError::default();
    let tables = Lookup::new(&maps, &error);
    let blocks = tables.frontends().into_iter().filter_map(|(_, number)| tables.block(number));
    let slots =
        blocks.flat_map(|block| (0..block.serving()).map(move |at| block.first_slot() + u32::from(at)));
    let backends = slots.filter_map(|slot| tables.backend(slot));
    Some(backends.filter(Backend::is_local).map(|backend| backend.address()).collect())
}

/// The load-balancer addresses in pass-through; none where no agent has written any maps.
fn passed_through(bpf_root: &Path) -> Option<BTreeSet<IpAddr>> {
    let maps = KernelMaps::open(bpf_root).ok()?;
    let error = FirstError::default();
    let tables = Lookup::new(&maps, &error);
    let is_passed = |number: u32| {
        let is_load_balancer = tables
            .info(number)
            .is_some_and(|info| FrontendKind::try_from(info.frontend_kind) == Ok(FrontendKind::LoadBalancer));
        let side = tables.side(number, ClientKind::Outside);
        is_load_balancer && side.is_some_and(|side| side.mode() == Mode::PassThrough)
    };
    let frontends = tables.frontends().into_iter();
    Some(frontends.filter(|(_, number)| is_passed(*number)).map(|(key, _)| key.address().into()).collect())
}

/// Like nftables mode of kube-proxy, kproxy opens no firewall by itself.
pub fn forward_policy() -> Finding {
    let check = "FORWARD policy";
    match forward_drops() {
        Ok(found) if found.is_empty() => finding(check, Status::Ok, "no forward chain drops by default"),
        Ok(found) => {
            let each: Vec<_> = found.iter().map(|drop| format!("{drop}: {}", drop.mend())).collect();
            let detail =
                format!("what arrives for pods is dropped unless a rule accepts it: {}", each.join("; "));
            finding(check, Status::Warning, detail)
        }
        Err(error) => not_looked_at(check, &error),
    }
}

/// Where client and backend are ports of one bridge, conntrack sees both directions only with bridge-nf-call-iptables.
pub fn bridges() -> Finding {
    let check = "bridge-nf-call-iptables";
    let bridges = match bridge_names() {
        Ok(bridges) if bridges.is_empty() => return finding(check, Status::Ok, "no bridge is here"),
        Ok(bridges) => bridges.join(", "),
        Err(error) => return finding(check, Status::Warning, format!("{error:#}")),
    };
    let read =
        |family: &str| fs::read_to_string(net_sysctls().join(format!("bridge/bridge-nf-call-{family}")));
    let cost = "a pod that reaches a backend behind the same bridge by packets (no socket hook) has its connection seen in one \
                direction only, which rules against INVALID packets end";
    match (read("iptables"), read("ip6tables")) {
        (Ok(v4), Ok(v6)) if v4.trim() != "0" && v6.trim() != "0" => {
            finding(check, Status::Ok, format!("on, for {bridges}"))
        }
        (Ok(_), Ok(_)) => {
            let mend = "sysctl -w net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1";
            finding(check, Status::Warning, format!("off, with pods behind {bridges}: {cost}: {mend}"))
        }
        _ => {
            let detail = format!(
                "br_netfilter is not here, with pods behind {bridges}: {cost}: modprobe br_netfilter"
            );
            finding(check, Status::Warning, detail)
        }
    }
}

/// A socket that is given a port with which a client is masqueraded towards the same backend gets another one there.
pub fn reserved_ports() -> Finding {
    let check = "reserved ports";
    let (first, count) = RESERVED_PORTS;
    let range = format!("{first}-{}", first + count - 1);
    let path = net_sysctls().join("ipv4/ip_local_reserved_ports");
    match fs::read_to_string(&path) {
        Ok(reserved) if reserved_ports_cover(reserved.trim()) => {
            finding(check, Status::Ok, format!("{range} are reserved for masking"))
        }
        Ok(reserved) if fs::OpenOptions::new().write(true).open(&path).is_ok() => {
            let reserved = reserved.trim();
            let now = if reserved.is_empty() { "none are now" } else { reserved };
            finding(check, Status::Ok, format!("the agent reserves {range} for masking ({now})"))
        }
        Ok(reserved) => {
            let separator = if reserved.trim().is_empty() { "" } else { "," };
            let all = format!("{}{separator}{range}", reserved.trim());
            let detail = format!(
                "{range} are not reserved and cannot be from here: clients are masqueraded with these first, and a socket of \
                 this host that is given one that a client has towards the same backend is seen there by another port: \
                 sysctl -w net.ipv4.ip_local_reserved_ports={all}"
            );
            finding(check, Status::Warning, detail)
        }
        Err(error) => finding(check, Status::Warning, format!("{}: {error}", path.display())),
    }
}

/// Without it nothing that arrives for a pod gets there.
pub fn forwarding() -> Finding {
    let check = "forwarding";
    let is_off =
        |path: &str| fs::read_to_string(net_sysctls().join(path)).is_ok_and(|text| text.trim() == "0");
    let off: Vec<_> = [
        ("ipv4/ip_forward", "net.ipv4.ip_forward"),
        ("ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
    ]
    .into_iter()
    .filter(|(path, _)| is_off(path))
    .map(|(_, name)| format!("{name}=1"))
    .collect();
    if off.is_empty() {
        return finding(check, Status::Ok, "on in both families");
    }
    let detail = format!("packets for pods are not forwarded: sysctl -w {}", off.join(" "));
    finding(check, Status::Warning, detail)
}

fn bridge_names() -> Result<Vec<String>> {
    let devices = devices::list_now()?;
    Ok(devices.into_values().filter(|device| device.is_bridge).map(|device| device.name).collect())
}

pub(super) fn not_looked_at(check: &'static str, error: &FirewallError) -> Finding {
    match error {
        FirewallError::NoTool => finding(check, Status::Ok, format!("not looked at: {error}")),
        FirewallError::Failed(_) => finding(check, Status::Warning, format!("cannot be looked at: {error}")),
    }
}
