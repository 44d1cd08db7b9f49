//! The lab's self-check: refuses to go on where a packet or a program could get out.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use serde::Deserialize;
use serde_json::Value;

use crate::isolate::{Run, bpffs_device};
use crate::netns::{NAMES, NetnsId};

/// What an agent is about to be given.
#[derive(Clone, Copy, Debug)]
pub struct Guarded<'a> {
    /// The network namespace that it will run in.
    pub netns: &'a Path,
    /// Its `--cgroup-root`.
    pub cgroup: &'a Path,
    /// Its `--bpf-root`; the parent must exist.
    pub bpf_root: &'a Path,
}

/// Checks the run as a whole and what each agent is about to be given.
///
/// Refused are: this thread or a named namespace being the machine's; an interface that leads out
/// of the lab (a physical device, a device whose other end is in no namespace of the lab); a
/// default route to an address that is nobody's in the lab; a cgroup that is not below the run's
/// own; a folder for pins that is not on the run's own bpffs.
///
/// # Errors
/// With the first of these that was found.
pub fn self_check(run: &Run, guarded: &[Guarded<'_>]) -> Result<()> {
    check_thread(run.facts().outer_netns)?;
    let names = lab_namespaces()?;
    for name in &names {
        check_not_outer(run, &Path::new(NAMES).join(name))?;
    }
    let views =
        names.iter().map(|name| View::of(name).map(|view| (name, view))).collect::<Result<Vec<_>>>()?;
    let owned: BTreeSet<IpAddr> = views
        .iter()
        .flat_map(|(_, view)| &view.links)
        .flat_map(|link| &link.addr_info)
        .filter_map(|info| info.local)
        .collect();
    for (name, view) in &views {
        view.check(&owned).with_context(|| format!("the network namespace {name} has a way out"))?;
    }
    for agent in guarded {
        check_guarded(run, agent)?;
    }
    Ok(())
}

/// Checks what one agent is about to be given; part of [`self_check`].
///
/// # Errors
/// With the first thing that is not the lab's.
pub fn check_guarded(run: &Run, guarded: &Guarded<'_>) -> Result<()> {
    let Guarded { netns, cgroup, bpf_root } = guarded;
    check_not_outer(run, netns)?;
    check_cgroup(run, cgroup)?;
    check_bpffs(run, bpf_root)
}

fn check_thread(outer: NetnsId) -> Result<()> {
    ensure!(
        NetnsId::current()? != outer,
        "this process is in the machine's network namespace, not in one of the lab's: start it through isolated()"
    );
    Ok(())
}

fn check_not_outer(run: &Run, netns: &Path) -> Result<()> {
    ensure!(
        NetnsId::of(netns)? != run.facts().outer_netns,
        "{} is the machine's network namespace, not one of the lab's",
        netns.display()
    );
    Ok(())
}

fn check_cgroup(run: &Run, cgroup: &Path) -> Result<()> {
    let path = canonical(cgroup)?;
    let kind = statfs(&path).with_context(|| format!("cannot look at {}", path.display()))?.filesystem_type();
    ensure!(kind == CGROUP2_SUPER_MAGIC, "{} is no cgroup v2 folder", path.display());
    // Only the root of the whole hierarchy is without this file.
    ensure!(
        path.join("cgroup.events").exists(),
        "{} is the root of the cgroup hierarchy: programs there would serve the whole machine",
        path.display()
    );
    let own = canonical(run.cgroup())?;
    ensure!(
        path != own && path.starts_with(&own),
        "{} is not below the run's own cgroup {}",
        path.display(),
        own.display()
    );
    Ok(())
}

fn check_bpffs(run: &Run, bpf_root: &Path) -> Result<()> {
    let existing = if bpf_root.exists() { bpf_root } else { bpf_root.parent().unwrap_or(bpf_root) };
    let path = canonical(existing)?;
    let device = bpffs_device(&path).with_context(|| format!("{} is not on a bpffs", path.display()))?;
    let own = bpffs_device(&run.bpffs());
    ensure!(
        Some(device) == own && run.facts().outer_bpffs != own,
        "{} is on a bpffs that is not the run's own ({})",
        path.display(),
        run.bpffs().display()
    );
    Ok(())
}

fn canonical(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).with_context(|| format!("cannot look at {}", path.display()))
}

fn lab_namespaces() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(NAMES).with_context(|| format!("cannot read {NAMES}"))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

/// What a namespace's network looks like, as `ip` tells.
#[derive(Default)]
struct View {
    links: Vec<Link>,
    routes: Vec<Route>,
    known: Vec<NamedId>,
}

impl View {
    /// Looks at a named namespace, with one call for all: a check looks at every one.
    fn of(netns: &str) -> Result<Self> {
        let mut child = Command::new("ip")
            .args(["-n", netns, "-j", "-d", "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run ip (package iproute2)")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(b"address show\nroute show table all\nnetns list-id\n")?;
        }
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "ip cannot look at the network namespace {netns}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Self::parse(&output.stdout)
            .with_context(|| format!("ip printed strange JSON: {}", String::from_utf8_lossy(&output.stdout)))
    }

    /// Reads the lists, one after the other; a list without elements may be missing, so that an
    /// element is told by what it has.
    fn parse(json: &[u8]) -> Result<Self> {
        let mut view = Self::default();
        for list in serde_json::Deserializer::from_slice(json).into_iter::<Vec<Value>>() {
            for element in list? {
                let Some(object) = element.as_object() else {
                    bail!("{element} is no object");
                };
                if object.contains_key("ifname") {
                    view.links.push(serde_json::from_value(element)?);
                } else if object.contains_key("dst") {
                    view.routes.push(serde_json::from_value(element)?);
                } else if object.contains_key("nsid") {
                    view.known.push(serde_json::from_value(element)?);
                } else {
                    // Where an object does not apply, ip prints an empty one.
                    ensure!(object.is_empty(), "{element} is nothing that was asked for");
                }
            }
        }
        ensure!(!view.links.is_empty(), "not even a loopback device");
        Ok(view)
    }

    fn check(&self, owned: &BTreeSet<IpAddr>) -> Result<()> {
        let Self { links, routes, known } = self;
        for link in links {
            link.check(known)?;
        }
        for route in routes {
            route.check(owned)?;
        }
        Ok(())
    }
}

/// An element of `ip -j netns list-id`: namespaces that this one knows by a number.
#[derive(Deserialize)]
struct NamedId {
    nsid: i64,
    /// Missing where the namespace has no name in the lab.
    name: Option<String>,
}

/// An element of `ip -j -d address show`.
#[derive(Deserialize)]
struct Link {
    ifname: String,
    link_type: String,
    /// The number of the namespace where the other end is, if that is another one.
    link_netnsid: Option<i64>,
    linkinfo: Option<LinkInfo>,
    #[serde(default)]
    addr_info: Vec<AddressInfo>,
}

#[derive(Deserialize)]
struct LinkInfo {
    info_kind: Option<String>,
}

#[derive(Deserialize)]
struct AddressInfo {
    local: Option<IpAddr>,
}

impl Link {
    /// Virtual devices of this namespace lead nowhere by themselves; one with its other end
    /// elsewhere leads there; one of no kind is made of hardware.
    fn check(&self, known: &[NamedId]) -> Result<()> {
        let ifname = &self.ifname;
        if self.link_type == "loopback" {
            return Ok(());
        }
        let kind = self.linkinfo.as_ref().and_then(|info| info.info_kind.as_deref());
        ensure!(kind.is_some(), "{ifname} is a physical device");
        let Some(nsid) = self.link_netnsid else {
            return Ok(());
        };
        let peer = known.iter().find(|other| other.nsid == nsid).and_then(|other| other.name.as_ref());
        ensure!(peer.is_some(), "the other end of {ifname} is in a network namespace that is not the lab's");
        Ok(())
    }
}

/// An element of `ip -j -d route show table all`.
#[derive(Deserialize)]
struct Route {
    dst: String,
    #[serde(rename = "type")]
    kind: Option<String>,
    gateway: Option<IpAddr>,
    dev: Option<String>,
}

impl Route {
    /// A default route must lead to somebody in the lab, or nowhere.
    fn check(&self, owned: &BTreeSet<IpAddr>) -> Result<()> {
        let unicast = self.kind.as_deref().is_none_or(|kind| kind == "unicast");
        if self.dst != "default" || !unicast {
            return Ok(());
        }
        let dev = self.dev.as_deref().unwrap_or("an unknown device");
        let Some(gateway) = self.gateway else {
            bail!("a default route by {dev} without a next hop");
        };
        let link_local = match gateway {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        ensure!(
            link_local || owned.contains(&gateway),
            "its default route leads to {gateway} by {dev}, which is nobody's address in the lab"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(json: &str) -> Link {
        serde_json::from_str(json).unwrap()
    }

    fn known() -> Vec<NamedId> {
        serde_json::from_str(r#"[{"nsid":0,"name":"node-a"},{"nsid":1}]"#).unwrap()
    }

    #[test]
    fn hardware_leads_out() {
        let eth = link(r#"{"ifname":"eth0","link_type":"ether"}"#);
        let error = eth.check(&known()).unwrap_err();
        assert!(error.to_string().contains("physical"), "{error}");
    }

    #[test]
    fn a_veth_leads_where_its_other_end_is() {
        let veth = |nsid: &str| {
            link(&format!(r#"{{"ifname":"v","link_type":"ether"{nsid},"linkinfo":{{"info_kind":"veth"}}}}"#))
        };
        veth("").check(&known()).unwrap();
        veth(r#","link_netnsid":0"#).check(&known()).unwrap();
        for outside in [1, 7, -1] {
            let outside = veth(&format!(r#","link_netnsid":{outside}"#));
            assert!(outside.check(&known()).is_err());
        }
    }

    #[test]
    fn what_ip_prints_is_read() {
        let json = br#"[{},{"ifname":"lo","link_type":"loopback","addr_info":
            [{"family":"inet","local":"127.0.0.1"}]}]
            [{"dst":"default","gateway":"192.0.2.1","dev":"eth0"}] [{"nsid":0,"name":"a"}]"#;
        let view = View::parse(json).unwrap();
        assert_eq!((view.links.len(), view.routes.len(), view.known.len()), (1, 1, 1));
        assert!(View::parse(b"").is_err());
        assert!(View::parse(br#"[{"ifname":"lo","link_type":"loopback"}] Error"#).is_err());
        assert!(View::parse(br#"[{"surprise":1}]"#).is_err());
    }

    #[test]
    fn a_default_route_leads_to_somebody_in_the_lab() {
        let owned = BTreeSet::from(["192.0.2.1".parse().unwrap()]);
        let route = |json: &str| serde_json::from_str::<Route>(json).unwrap().check(&owned);
        route(r#"{"dst":"default","gateway":"192.0.2.1","dev":"eth0"}"#).unwrap();
        route(r#"{"dst":"default","gateway":"fe80::1","dev":"eth0"}"#).unwrap();
        assert!(route(r#"{"dst":"default","gateway":"192.0.2.254","dev":"eth0"}"#).is_err());
        assert!(route(r#"{"dst":"default","dev":"eth0"}"#).is_err());
        route(r#"{"dst":"default","type":"unreachable","dev":"lo"}"#).unwrap();
    }
}
