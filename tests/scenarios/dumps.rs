//! What a person sees who dumps the maps with bpftool.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};
use kproxy_lab::{Context, ElbSpec, Family, Node, NodeSpec};
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Client, Cluster, Steps, TARGET, Transport, eventually, frontend};
use crate::objects::Service;
use crate::opted_out::pod_object;

pub const SCENARIOS: &[Scenario] = &[("kproxy::dumps_can_be_read", dumps)];

const NODE_PORT: u16 = 30_080;

/// Every map that is pinned, and a field that its elements must show by name.
const MAPS: &[(&str, &[&str])] = &[
    ("frontend", &["address", "port", "protocol"]),
    ("service", &["inside", "outside", "mode", "first_slot", "count"]),
    ("service_info", &["name", "frontend", "changed"]),
    ("backend", &["address", "port", "location", "state"]),
    ("address", &["kind"]),
    ("source_range", &["prefix_len", "number", "address"]),
    ("backend_slot", &["current", "previous"]),
    ("affinity", &["client", "address", "last_used"]),
    ("flow", &["source", "destination", "source_port", "protocol", "state"]),
    ("flow_transient", &["source", "destination", "state"]),
    ("counter", &["connections", "pass_through"]),
    ("reason", &[]),
    ("config", &["host_netns_cookie", "service_cidrs", "cluster_cidrs"]),
    ("owner", &["layout_version", "pid", "node", "version"]),
    ("opted_out", &["v4", "v6", "since"]),
    ("device", &["interface", "copy", "v4"]),
    ("masqueraded", &[]),
    ("claim", &["source", "destination", "source_port"]),
    ("fragment", &["source_port", "destination_port", "seen"]),
    ("socket_overflow", &["socket_cookie", "address", "port"]),
    ("drop_event", &[]),
    ("drop_listener", &["until"]),
    ("drop_budget", &["sequence", "refilled", "tokens"]),
    ("socket", &[]),
];

fn dumps(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])).elb(ElbSpec::new()).client("client")
    })?;
    let web = Service::new("web", 10)
        .tcp(80, TARGET)
        .udp(80, TARGET)
        .node_port(NODE_PORT)
        .load_balancers(lab.elb()?.vips())
        .local()
        .annotation("kproxy.io/pass-through", "true")
        .pods(&[lab.pod("a2")?]);
    let ranged = Service::new("ranged", 11)
        .tcp(81, TARGET)
        .load_balancers(lab.elb()?.vips())
        .source_range("10.244.0.0/16")
        .pods(&[lab.pod("a2")?]);
    let cluster = Cluster::start(lab, &["node-a"], &[], [&web, &ranged])?;
    let _server = cluster.servers(&["a2"])?;
    let node = cluster.node("node-a")?;
    let mut steps = Steps::new();

    // A Pod that is opted out of the socket hooks.
    cluster.folder.write("a2-pod.yaml", &pod_object(cluster.lab.pod("a2")?, Some("false")))?;
    eventually("it in the map", || Ok(dump(node, "opted_out")?.contains("\"value\":").then_some(())))?;

    // Something in the tables of flows.
    let outside = Client::at(cluster.lab.host("client")?)?;
    let open = outside.worker.tcp_connect(SocketAddr::new(node.ip(Family::V4), NODE_PORT))?;
    outside.worker.tcp_ask(open.id, "hello")?;
    outside.reaches(Transport::UdpUnconnected, SocketAddr::new(node.ip(Family::V6), NODE_PORT), &["a2"])?;

    steps.step("no map without a line here", || {
        for entry in std::fs::read_dir(node.bpf_root())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            ensure!(name == "links" || MAPS.iter().any(|(known, _)| *known == name), "{name} is pinned");
        }
        Ok(())
    });
    for (name, fields) in MAPS {
        steps.step(name, || {
            // Storage of sockets and ring buffers cannot be walked, and bpftool says so.
            if ["socket", "drop_event"].contains(name) {
                return Ok(());
            }
            let text = beginning(node, name)?;
            let may_be_empty =
                ["affinity", "flow_transient", "claim", "socket_overflow", "device", "fragment"]
                    .contains(name);
            ensure!(may_be_empty || text.contains("\"value\":"), "it is empty: {text}");
            for field in if text.contains("\"value\":") { *fields } else { &[] } {
                ensure!(text.contains(&format!("\"{field}\":")), "no {field} in: {text}");
            }
            Ok(())
        });
    }
    steps.step("an entry can be matched to its Service", || {
        for family in Family::BOTH {
            for (address, mode) in
                [(web.cluster_ip(family), "Forward"), (*vip(&cluster, family)?, "PassThrough")]
            {
                matched(node, &web, address, mode)?;
            }
        }
        Ok(())
    });
    steps.step("the owner", || {
        let text = element(node, "owner", 0)?;
        let owner: Value = serde_json::from_str(&text)?;
        ensure!(words(&owner["value"]["node"])? == "node-a", "{text}");
        Ok(())
    });
    steps.done()
}

fn vip(cluster: &Cluster, family: Family) -> Result<&IpAddr> {
    let vips = cluster.lab.elb()?.vips();
    vips.iter().find(|vip| vip.is_ipv4() == (family == Family::V4)).context("no such address")
}

/// From an address and port, by the dumps alone, to the Service's name, its mode and its backend.
fn matched(node: &Node, web: &Service, address: IpAddr, mode: &str) -> Result<()> {
    let frontends: Value = serde_json::from_str(&dump(node, "frontend")?)?;
    let octets = mapped(address);
    let entry = frontends
        .as_array()
        .into_iter()
        .flatten()
        .find(|entry| {
            entry["key"]["address"]["octets"] == octets
                && entry["key"]["port"] == 80
                && entry["key"]["protocol"] == "Tcp"
        })
        .with_context(|| format!("no entry for {address}:80/Tcp in {frontends:#}"))?;
    let number = entry["value"].as_u64().with_context(|| format!("no number in {entry}"))?;
    let number = u32::try_from(number)?;
    let info: Value = serde_json::from_str(&element(node, "service_info", number)?)?;
    let name = words(&info["value"]["name"])?;
    ensure!(name == "default/web:tcp-80", "{name}");
    let service: Value = serde_json::from_str(&element(node, "service", number)?)?;
    let inside = &service["value"]["inside"];
    ensure!(inside["mode"] == mode, "{service:#}");
    if mode == "Forward" {
        let slot = inside["first_slot"].as_u64().with_context(|| format!("no slot in {service}"))?;
        let backend: Value = serde_json::from_str(&element(node, "backend", u32::try_from(slot)?)?)?;
        let backend = &backend["value"];
        ensure!(backend["port"] == TARGET && backend["location"] == "Local", "{backend:#}");
        ensure!(backend["state"] == "Ready", "{backend:#}");
    }
    // What the command prints is what the map says.
    let view = crate::cluster::service_view(node, web.name())?;
    ensure!(frontend(&view, address, 80, "TCP")?["number"] == number, "{view:#}");
    Ok(())
}

/// A whole map, as `bpftool map dump` prints it.
pub fn dump(node: &Node, map: &str) -> Result<String> {
    let path = node.bpf_root().join(map);
    node.command("bpftool")?.args(["map", "dump", "pinned"]).arg(path).run()?.success()
}

/// The beginning of the same, for maps with hundreds of thousands of places.
fn beginning(node: &Node, map: &str) -> Result<String> {
    let path = node.bpf_root().join(map);
    let command = node.command("sh")?.args(["-c", "bpftool map dump pinned \"$1\" | head -c 5000", "sh"]);
    command.arg(path).run()?.success()
}

/// One element of an array, as `bpftool map lookup` prints it.
pub fn element(node: &Node, map: &str, index: u32) -> Result<String> {
    let key = index.to_ne_bytes().map(|byte| format!("{byte:02x}"));
    let path = node.bpf_root().join(map);
    let command = node.command("bpftool")?.args(["map", "lookup", "pinned"]).arg(path);
    command.args(["key", "hex"]).args(key).run()?.success()
}

/// An address as the maps hold it.
fn mapped(address: IpAddr) -> Value {
    let octets = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    Value::from(octets.to_vec())
}

/// Text in an array of octets, padded with NUL; bpftool prints it as text or as numbers.
fn words(value: &Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Array(octets) => {
            let octets = octets.iter().map_while(|octet| match octet.as_u64() {
                None | Some(0) => None,
                Some(octet) => u8::try_from(octet).ok(),
            });
            Ok(String::from_utf8(octets.collect())?)
        }
        other => bail!("{other} is no text"),
    }
}
