//! The agent's servers as those see them who scrape and probe: names, labels and values as of kube-proxy.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Context, NodeSpec};
use serde_json::{Value, json};

use crate::Scenario;
use crate::cluster::{Cluster, Steps, TARGET, eventually};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[("kproxy::metrics_are_those_of_kube_proxy", metrics)];

/// kube-proxy 1.36 in nftables mode (`pkg/proxy/metrics`): name, type, labels. Those of nftables alone are ours under
/// another name.
const KUBE_PROXY: &[(&str, &str, &[&str])] = &[
    ("kubeproxy_sync_proxy_rules_duration_seconds", "histogram", &["ip_family"]),
    ("kubeproxy_sync_full_proxy_rules_duration_seconds", "histogram", &["ip_family"]),
    ("kubeproxy_sync_partial_proxy_rules_duration_seconds", "histogram", &["ip_family"]),
    ("kubeproxy_sync_proxy_rules_last_timestamp_seconds", "gauge", &["ip_family"]),
    ("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", "gauge", &["ip_family"]),
    ("kubeproxy_network_programming_duration_seconds", "histogram", &["ip_family"]),
    ("kubeproxy_sync_proxy_rules_no_local_endpoints_total", "gauge", &["ip_family", "traffic_policy"]),
    ("kubeproxy_sync_proxy_rules_endpoint_changes_pending", "gauge", &[]),
    ("kubeproxy_sync_proxy_rules_endpoint_changes_total", "counter", &[]),
    ("kubeproxy_sync_proxy_rules_service_changes_pending", "gauge", &[]),
    ("kubeproxy_sync_proxy_rules_service_changes_total", "counter", &[]),
    ("kubeproxy_proxy_healthz_total", "counter", &["code"]),
    ("kubeproxy_proxy_livez_total", "counter", &["code"]),
];

const METRICS: &str = "127.0.0.1:10249";
const HEALTHZ: &str = "127.0.0.1:10256";

/// A scrape: types by name, samples by name and labels.
struct Scrape {
    text: String,
    types: BTreeMap<String, String>,
    samples: Vec<(String, BTreeMap<String, String>, f64)>,
}

impl Scrape {
    fn read(text: String) -> Result<Self> {
        let (mut types, mut samples) = (BTreeMap::new(), Vec::new());
        for line in text.lines() {
            if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                types.insert(name.to_owned(), kind.to_owned());
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').with_context(|| format!("no sample: {line}"))?;
                let (name, labels) = series.split_once('{').unwrap_or((series, ""));
                let pairs = labels.trim_end_matches('}').split("\",").filter(|pair| !pair.is_empty());
                let pairs = pairs.filter_map(|pair| pair.split_once("=\""));
                let labels =
                    pairs.map(|(key, value)| (key.to_owned(), value.trim_end_matches('"').to_owned()));
                let value = value.parse().with_context(|| format!("no value: {line}"))?;
                samples.push((name.to_owned(), labels.collect(), value));
            }
        }
        Ok(Self { text, types, samples })
    }

    fn value(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let wanted: BTreeMap<_, _> =
            labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let found = self.samples.iter().find(|(other, labels, _)| other == name && *labels == wanted);
        found.map(|(.., value)| *value).with_context(|| format!("no {name} {labels:?} in {}", self.text))
    }

    fn of_family(&self, name: &str, family: &str) -> Result<f64> {
        self.value(name, &[("ip_family", family)])
    }
}

fn scrape(cluster: &Cluster) -> Result<Scrape> {
    Scrape::read(get(cluster, &format!("http://{METRICS}/metrics"))?.1)
}

/// Status and body.
fn get(cluster: &Cluster, url: &str) -> Result<(u16, String)> {
    let curl = ["curl", "-sS", "--max-time", "3", "-w", "\n%{http_code}", url];
    let output = cluster.node("node-a")?.run(&curl)?.success()?;
    let (body, status) =
        output.trim_end().rsplit_once('\n').with_context(|| format!("no status: {output}"))?;
    Ok((status.parse()?, body.to_owned()))
}

fn metrics(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])).node(NodeSpec::new("node-b", 2, &["b1"]))
    })?;
    let web = Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(30_080);
    let web = web.pods(&[lab.pod("a2")?, lab.pod("b1")?]);
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    cluster.folder.write("node.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: node-a}\n")?;
    let b1 = cluster.lab.pod("b1")?.clone();
    let programming = "kubeproxy_network_programming_duration_seconds";
    let mut steps = Steps::new();

    steps.step("probes", || {
        eventually("the node being seen", || {
            Ok((get(&cluster, &format!("http://{HEALTHZ}/healthz"))?.0 == 200).then_some(()))
        })?;
        for (path, has_node) in [("healthz", true), ("livez", false)] {
            let (status, body) = get(&cluster, &format!("http://{HEALTHZ}/{path}"))?;
            let body: Value = serde_json::from_str(&body)?;
            ensure!(status == 200 && body["healthy"] == true, "{path}: {status} {body}");
            ensure!(body.get("nodeEligible").is_some() == has_node, "{path}: {body}");
            for family in ["IPv4", "IPv6"] {
                ensure!(body["status"][family]["healthy"] == true, "{path}: {body}");
            }
        }
        ensure!(get(&cluster, &format!("http://{METRICS}/healthz"))? == (200, "ok".to_owned()));
        ensure!(get(&cluster, &format!("http://{METRICS}/proxyMode"))? == (200, "kproxy".to_owned()));
        let (status, body) = get(&cluster, &format!("http://{METRICS}/configz"))?;
        let body: Value = serde_json::from_str(&body)?;
        ensure!(status == 200 && body["kubeproxy.config.k8s.io"]["hostnameOverride"] == "node-a", "{body}");
        Ok(())
    });
    steps.step("a change of endpoints is measured from its cause to the maps", || {
        // Caused before the agent was there: not measured.
        let an_hour_ago = SystemTime::now() - Duration::from_secs(3600);
        put_triggered(&mut cluster, &web.clone().pods(&[&b1]), an_hour_ago)?;
        let before = scrape(&cluster)?;
        ensure!(before.of_family(&format!("{programming}_count"), "IPv4").is_err(), "{}", before.text);
        put_triggered(&mut cluster, &web, SystemTime::now())?;
        let now = scrape(&cluster)?;
        for family in ["IPv4", "IPv6"] {
            let count = now.of_family(&format!("{programming}_count"), family)?;
            let sum = now.of_family(&format!("{programming}_sum"), family)?;
            ensure!(count == 1.0, "{family}: {count} measured");
            ensure!(sum > 0.0 && sum < 20.0, "{family}: {sum} s");
        }
        let le = |bound| now.value(&format!("{programming}_bucket"), &[("le", bound), ("ip_family", "IPv4")]);
        ensure!(le("+Inf")? == 1.0 && le("300")? == 1.0, "{}", now.text);
        ensure!(
            le("0.25").is_ok() && le("0.5").is_ok() && le("1").is_ok() && le("59").is_ok(),
            "{}",
            now.text
        );
        Ok(())
    });
    steps.step("ports without local endpoints", || {
        let name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
        let counts = |cluster: &Cluster| -> Result<[f64; 2]> {
            let now = scrape(cluster)?;
            let of = |policy| now.value(name, &[("ip_family", "IPv4"), ("traffic_policy", policy)]);
            Ok([of("internal")?, of("external")?])
        };
        ensure!(counts(&cluster)? == [0.0, 0.0], "{:?}", counts(&cluster)?);
        cluster.put(&web.clone().local().pods(&[&b1]))?;
        ensure!(counts(&cluster)? == [0.0, 2.0], "{:?}", counts(&cluster)?);
        cluster.put(&web.clone().local().internal_local().pods(&[&b1]))?;
        ensure!(counts(&cluster)? == [2.0, 2.0], "{:?}", counts(&cluster)?);
        cluster.put(&web)?;
        ensure!(counts(&cluster)? == [0.0, 0.0], "{:?}", counts(&cluster)?);
        Ok(())
    });
    steps.step("syncs and changes", || {
        let now = scrape(&cluster)?;
        for family in ["IPv4", "IPv6"] {
            let of = |name: &str| now.of_family(&format!("kubeproxy_{name}"), family);
            ensure!(of("sync_full_proxy_rules_duration_seconds_count")? == 1.0, "{}", now.text);
            let partial = of("sync_partial_proxy_rules_duration_seconds_count")?;
            ensure!(partial >= 5.0, "{partial} partial syncs");
            ensure!(of("sync_proxy_rules_duration_seconds_count")? == partial + 1.0, "{}", now.text);
            let (queued, synced) = (
                of("sync_proxy_rules_last_queued_timestamp_seconds")?,
                of("sync_proxy_rules_last_timestamp_seconds")?,
            );
            let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
            ensure!(
                queued <= synced && synced <= seconds && seconds - queued < 60.0,
                "{queued} {synced} {seconds}"
            );
        }
        for (name, least) in [("service", 4.0), ("endpoint", 6.0)] {
            let of =
                |what: &str| now.value(&format!("kubeproxy_sync_proxy_rules_{name}_changes_{what}"), &[]);
            ensure!(
                of("total")? >= least && of("pending")? == 0.0,
                "{name}: {} {}",
                of("total")?,
                of("pending")?
            );
        }
        Ok(())
    });
    steps.step("names, types and labels", || {
        let now = scrape(&cluster)?;
        for (name, kind, labels) in KUBE_PROXY {
            ensure!(
                now.types.get(*name).map(String::as_str) == Some(*kind),
                "{name}: {:?}",
                now.types.get(*name)
            );
            let series = if *kind == "histogram" { format!("{name}_count") } else { (*name).to_owned() };
            let found = now.samples.iter().find(|(other, ..)| *other == series);
            let (_, found, _) = found.with_context(|| format!("no sample of {name} in {}", now.text))?;
            let found: BTreeSet<_> = found.keys().map(String::as_str).collect();
            ensure!(found == labels.iter().copied().collect(), "{name} has {found:?}");
        }
        let known: BTreeSet<_> = KUBE_PROXY.iter().map(|(name, ..)| *name).collect();
        let unknown = |name: &&String| {
            // Fed by whoever reconciles flows.
            name.starts_with("kubeproxy_")
                && !known.contains(name.as_str())
                && !name.contains("_conntrack_reconciler_")
        };
        let unknown: Vec<_> = now.types.keys().filter(unknown).collect();
        ensure!(unknown.is_empty(), "kube-proxy does not have {unknown:?}");
        ensure!(now.value("kubeproxy_proxy_healthz_total", &[("code", "200")])? >= 2.0, "{}", now.text);
        ensure!(now.value("kubeproxy_proxy_livez_total", &[("code", "200")])? >= 1.0, "{}", now.text);
        Ok(())
    });
    steps.done()
}

/// Writes a Service whose slices say when their change was triggered, and waits until it is in the kernel.
fn put_triggered(cluster: &mut Cluster, service: &Service, triggered: SystemTime) -> Result<()> {
    let since = triggered.duration_since(SystemTime::UNIX_EPOCH)?;
    let date =
        ["date", "-u", "-d", &format!("@{}.{:09}", since.as_secs(), since.subsec_nanos()), "+%FT%T.%NZ"];
    let time = cluster.node("node-a")?.run(&date)?.success()?;
    let mut text = format!("---\n{:#}\n", service.object());
    for family in kproxy_lab::Family::BOTH {
        let mut slice = service.slice(family);
        slice["metadata"]["annotations"] =
            json!({"endpoints.kubernetes.io/last-change-trigger-time": time.trim()});
        text += &format!("---\n{slice:#}\n");
    }
    cluster.change(|cluster| cluster.folder.write(&crate::cluster::file_name(service.name()), &text))
}
