//! What behaves otherwise than with kube-proxy, where this node has it; docs/differences.md says why.

use std::{collections::BTreeSet, fs};

use kproxy_common::FrontendKind;

use super::{Finding, Status, finding, node::not_looked_at};
use crate::{
    firewall, ipsec,
    maps::kernel::{FirstError, KernelMaps, Lookup},
};

/// The NodePorts that are looked for where no agent has written any maps: the API server's default range
/// (`--service-node-port-range`).
const DEFAULT_NODE_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;

/// How many findings of one sort are written out.
const LISTED: usize = 5;

/// File systems that the kernel itself connects, by their types in /proc/mounts.
const IN_KERNEL: [&str; 6] = ["nfs", "nfs4", "cifs", "smb3", "ceph", "9p"];

/// What IPsec policies cover is encrypted before the packet hooks see it, or decrypted behind them.
pub fn ipsec() -> Finding {
    let check = "IPsec policies";
    match ipsec::policies() {
        Ok(found) if found.is_empty() => finding(check, Status::Ok, "none are here"),
        Ok(found) => {
            let detail = format!(
                "{}: packets that such a policy covers are encrypted where the packet hooks see them: clients outside that \
                 reach this node by IPsec in transport mode are not served by NodePort, external IP or load-balancer address; \
                 and policies see pods' addresses, not those of Services: cover pods' and nodes' addresses, or encrypt in the CNI",
                listed(found.iter().map(ToString::to_string).collect())
            );
            finding(check, Status::Warning, detail)
        }
        Err(error) => finding(check, Status::Warning, format!("cannot be looked at: {error}")),
    }
}

/// Rules on a NodePort's number before kube-proxy's place no longer match.
pub fn early_rules(bpf_root: &std::path::Path) -> Finding {
    let check = "firewall on NodePorts";
    let served = node_ports(bpf_root);
    let is_node_port = |port: u16| match &served {
        Some(served) => served.contains(&port),
        None => DEFAULT_NODE_PORTS.contains(&port),
    };
    match firewall::early_rules(is_node_port) {
        Ok(found) if found.is_empty() => {
            finding(check, Status::Ok, "no rule before destination NAT matches on a NodePort's number")
        }
        Ok(found) => {
            let detail = format!(
                "{}: these match on NodePorts in raw, mangle or an early chain, and never see them: packets from outside have the \
                 backend's address and port before netfilter. Filter in FORWARD by the backend's port, or by \
                 loadBalancerSourceRanges or a NetworkPolicy",
                listed(found)
            );
            finding(check, Status::Warning, detail)
        }
        Err(error) => not_looked_at(check, &error),
    }
}

/// Before Linux 6.6 a mount that was made by a service address keeps the backend that it got first.
pub fn in_kernel_clients() -> Finding {
    let check = "in-kernel clients";
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    if is_at_least(&release, (6, 6)) {
        return finding(
            check,
            Status::Ok,
            "each connection of NFS, SMB and Ceph mounts asks for its service address",
        );
    }
    // Of the host: the agent's container has mounts of its own.
    let mounts = fs::read_to_string("/proc/1/mounts").or_else(|_| fs::read_to_string("/proc/mounts"));
    let found = in_kernel_mounts(&mounts.unwrap_or_default());
    if found.is_empty() {
        return finding(check, Status::Ok, "no NFS, SMB or Ceph mounts are here");
    }
    let detail = format!(
        "{}: on Linux {} a mount by a service address connects again to the backend that it got first, also when that is gone (mended \
         in 6.6, and in some older kernels of distributions): mount by the address of the server itself, or a newer kernel",
        listed(found),
        release.trim()
    );
    finding(check, Status::Warning, detail)
}

/// The served NodePorts; `None` where no agent has written any maps.
fn node_ports(bpf_root: &std::path::Path) -> Option<BTreeSet<u16>> {
    let maps = KernelMaps::open(bpf_root).ok()?;
    let error = FirstError::default();
    let tables = Lookup::new(&maps, &error);
    let is_node_port = |number: u32| {
        let info = tables.info(number);
        info.is_some_and(|info| FrontendKind::try_from(info.frontend_kind) == Ok(FrontendKind::NodePort))
    };
    let frontends = tables.frontends().into_iter();
    Some(frontends.filter(|(_, number)| is_node_port(*number)).map(|(key, _)| key.port()).collect())
}

/// `major.minor` at the begin of a kernel's release against a version; what cannot be read is new.
fn is_at_least(release: &str, version: (u32, u32)) -> bool {
    let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= version,
        _ => true,
    }
}

fn in_kernel_mounts(mounts: &str) -> Vec<String> {
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let found = fields.filter_map(|fields| match fields[..] {
        [what, place, kind, ..] if IN_KERNEL.contains(&kind) => Some(format!("{kind} {what} on {place}")),
        _ => None,
    });
    found.collect()
}

fn listed(mut all: Vec<String>) -> String {
    let more = all.len().saturating_sub(LISTED);
    all.truncate(LISTED);
    let text = all.join("; ");
    if more > 0 { format!("{text}; and {more} more") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_number() {
        for (release, expected) in [
            ("5.10.0-33-cloud-amd64\n", false),
            ("6.1.0", false),
            ("6.5.13", false),
            ("6.6.1", true),
            ("6.12", true),
            ("10.0", true),
            ("odd", true),
        ] {
            assert_eq!(is_at_least(release, (6, 6)), expected, "{release}");
        }
    }

    #[test]
    fn mounts_that_the_kernel_connects_are_told_by_type() {
        let mounts = "proc /proc proc rw 0 0\n10.96.0.9:/data /var/lib/kubelet/x nfs4 rw,addr=10.96.0.9 0 0\n\
            //fs/share /mnt cifs rw 0 0\nnfsd /proc/fs/nfsd nfsd rw 0 0\n";
        let expected = ["nfs4 10.96.0.9:/data on /var/lib/kubelet/x", "cifs //fs/share on /mnt"];
        assert_eq!(in_kernel_mounts(mounts), expected);
    }

    #[test]
    fn long_lists_are_cut() {
        let all: Vec<_> = (0..7).map(|n| n.to_string()).collect();
        assert_eq!(listed(all), "0; 1; 2; 3; 4; and 2 more");
        assert_eq!(listed(vec!["a".to_owned()]), "a");
    }
}
