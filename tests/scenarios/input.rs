//! Bad input: what cannot be served is named once, the rest is served.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Context, ElbSpec, Family, LogLine, NodeSpec, kproxy_binary};

use crate::Scenario;
use crate::cluster::{Cluster, DEADLINE, Steps, TARGET, Transport, eventually, file_name};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::bad_input_is_named_and_the_rest_served", bad_input),
    ("kproxy::a_containers_cgroup_is_refused", containers_cgroup),
    ("kproxy::labels_and_types_that_are_not_served", not_served),
];

/// A file, and what the log must say of it: exactly one line that has all of these.
struct Bad {
    file: &'static str,
    text: &'static str,
    named: &'static [&'static str],
}

const BAD: &[Bad] = &[
    Bad {
        file: "broken.yaml",
        text: "apiVersion: v1\nkind: Service\nmetadata: {name: broken\nspec:\n  - [",
        named: &["broken.yaml"],
    },
    Bad {
        file: "unknown.yaml",
        text: "apiVersion: example.com/v1\nkind: Gadget\nmetadata: {name: gadget}\n",
        named: &["unknown.yaml", "Gadget"],
    },
    Bad {
        file: "address.yaml",
        text: "apiVersion: v1\nkind: Service\nmetadata: {name: address, namespace: default}\n\
               spec: {clusterIP: 10.96.0.300, clusterIPs: [10.96.0.300], ports: [{port: 80}]}\n",
        named: &["default/address", "10.96.0.300"],
    },
    Bad {
        file: "protocol.yaml",
        text: "apiVersion: v1\nkind: Service\nmetadata: {name: protocol, namespace: default}\n\
               spec: {clusterIP: 10.96.0.31, ports: [{port: 80, protocol: ICMP}, {port: 81, name: good}]}\n",
        named: &["default/protocol", "ICMP"],
    },
    Bad {
        file: "port.yaml",
        text: "apiVersion: v1\nkind: Service\nmetadata: {name: port, namespace: default}\n\
               spec: {clusterIP: 10.96.0.32, ports: [{port: 80000}]}\n",
        named: &["default/port", "80000"],
    },
    Bad {
        file: "annotation.yaml",
        text: "apiVersion: v1\nkind: Service\nmetadata: {name: annotation, namespace: default, \
               annotations: {kproxy.io/pass-through: perhaps}}\n\
               spec: {type: LoadBalancer, clusterIP: 10.96.0.33, ports: [{port: 80}]}\n",
        named: &["default/annotation", "kproxy.io/pass-through", "perhaps"],
    },
    Bad {
        file: "balancer.yaml",
        text: "apiVersion: v1\nkind: Service\nmetadata: {name: balancer, namespace: default}\n\
               spec: {type: LoadBalancer, clusterIP: 10.96.0.34, ports: [{port: 80}]}\n\
               status: {loadBalancer: {ingress: [{ip: not-an-address}, {hostname: example.com}]}}\n",
        named: &["default/balancer", "not-an-address"],
    },
    Bad { file: "type.yaml", text: "- just\n- a list\n", named: &["type.yaml"] },
];

fn bad_input(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])).elb(ElbSpec::new()))?;
    let a2 = lab.pod("a2")?.clone();
    let good = Service::new("good", 10).tcp(80, TARGET).pods(&[&a2]);
    let vips = lab.elb()?.vips().to_vec();
    // Both want port 80 of the load balancer's addresses; the older one has it.
    let older = Service::new("older", 11).tcp(80, TARGET).load_balancers(&vips).pods(&[&a2]);
    let older = older.created("2024-01-01T00:00:00Z");
    let newer = Service::new("newer", 12).tcp(80, TARGET).load_balancers(&vips);
    let newer = newer.created("2025-01-01T00:00:00Z");
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&newer, &good])?;
    let _server = cluster.servers(&["a2"])?;
    let client = cluster.pod("a1")?;
    let mut steps = Steps::new();
    let served = |what: &str| {
        for family in Family::BOTH {
            let to = SocketAddr::new(good.cluster_ip(family), 80);
            client.reaches(Transport::Tcp, to, &["a2"]).context(what.to_owned())?;
        }
        anyhow::Ok(())
    };
    steps.step("each bad file is named in one line", || {
        cluster.agent("node-a")?.mark();
        for bad in BAD {
            cluster.folder.write(bad.file, bad.text)?;
        }
        for bad in BAD {
            let agent = cluster.agent("node-a")?;
            agent.wait_log(bad.file, DEADLINE, |line| names(line, bad.named))?;
        }
        served("with bad files beside it")?;
        // All of them are known by now: each was said once.
        let log = cluster.agent("node-a")?.log_since_mark();
        for bad in BAD {
            let lines: Vec<_> = log.iter().filter(|line| names(line, bad.named)).collect();
            ensure!(lines.len() == 1, "{}: {lines:#?}", bad.file);
        }
        // What is good in a bad object is served.
        let view = cluster.service("node-a", "protocol")?;
        ensure!(view["frontends"].as_array().map(Vec::len) == Some(1), "{view:#}");
        Ok(())
    });
    steps.step("they are counted", || {
        let node = cluster.node("node-a")?;
        let url = "http://127.0.0.1:10249/metrics";
        eventually("all of them in the metrics", || {
            let text = node.run(&["curl", "-sS", "--max-time", "2", url])?.success()?;
            let counts = text.lines().filter(|line| line.starts_with("kproxy_problems{"));
            let counts = counts.filter_map(|line| line.rsplit(' ').next()?.parse::<usize>().ok());
            let sum: usize = counts.sum();
            ensure!(sum == BAD.len(), "{} bad files, and {sum} problems: {text}", BAD.len());
            Ok(Some(()))
        })
    });
    steps.step("a frontend that two Services claim", || {
        cluster.put(&older)?;
        for vip in &vips {
            client.reaches(Transport::Tcp, SocketAddr::new(*vip, 80), &["a2"])?;
        }
        let agent = cluster.agent("node-a")?;
        let named = |line: &LogLine| names(line, &["default/newer", "default/older"]);
        agent.wait_log("the younger one being named", DEADLINE, named)?;
        served("beside two that claim the same")?;
        cluster.delete(&older)?;
        for vip in &vips {
            client.is_refused(Transport::Tcp, SocketAddr::new(*vip, 80))?;
        }
        Ok(())
    });
    steps.step("what is mended is served, and said to be gone", || {
        let mended = Service::new("address", 30).tcp(80, TARGET).pods(&[&a2]);
        cluster.agent("node-a")?.mark();
        cluster.folder.write("address.yaml", &mended.yaml())?;
        cluster
            .folder
            .write("broken.yaml", &Service::new("broken", 35).tcp(80, TARGET).pods(&[&a2]).yaml())?;
        for number in [30, 35] {
            let to = SocketAddr::new(crate::objects::cluster_ip(number, Family::V4), 80);
            eventually("the mended Service", || Ok(client.reaches(Transport::Tcp, to, &["a2"]).ok()))?;
        }
        let agent = cluster.agent("node-a")?;
        agent.wait_log("it being resolved", DEADLINE, |line| {
            line.level == "INFO" && line.mentions("resolved") && line.mentions("broken.yaml")
        })?;
        Ok(())
    });
    steps.step("a file that breaks later keeps what it had", || {
        let path = file_name(good.name());
        cluster.agent("node-a")?.mark();
        cluster.folder.write(&path, "kind: Service\nspec: [\n")?;
        cluster.agent("node-a")?.wait_log("it being named", DEADLINE, |line| names(line, &[&path]))?;
        served("after its own file broke")
    });
    steps.done()
}

/// A complaint that mentions all of these.
fn names(line: &LogLine, words: &[&str]) -> bool {
    matches!(line.level.as_str(), "WARN" | "ERROR") && words.iter().all(|word| line.mentions(word))
}

/// In a private cgroup namespace, the mount's root is the container's own cgroup.
fn containers_cgroup(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1"])))?;
    let node = lab.node("node-a")?;
    let mount = node.folder().join("cgroup");
    std::fs::create_dir(&mount)?;
    let folder = kproxy_lab::Manifests::create(node.folder(), "manifests")?;
    let run = |words: &[&str]| {
        // The new namespace's root is the cgroup that `unshare` is in: the lab's own, not the machine's.
        node.command("unshare")?
            .args(["--cgroup", "--mount", "sh", "-c"])
            .arg("mount -t cgroup2 cgroup2 \"$1\" && shift && exec \"$@\"")
            .arg("sh")
            .arg(&mount)
            .arg(kproxy_binary()?)
            .args(words.iter().copied())
            .arg("--cgroup-root")
            .arg(&mount)
            .arg("--bpf-root")
            .arg(node.bpf_root())
            .deadline(DEADLINE)
            .run()
    };
    let manifests = folder.path().display().to_string();
    let output = run(&["agent", "--node-name", "node-a", "--manifests", &manifests])?;
    ensure!(output.code() == Some(1), "{output}");
    for word in [mount.display().to_string().as_str(), "container", "/sys/fs/cgroup", "--cgroup-root"] {
        ensure!(output.stderr.contains(word), "no {word} in: {}", output.stderr);
    }
    ensure!(node.dump_maps()?.is_empty(), "it refused, and left maps");
    let output = run(&["check"])?;
    ensure!(output.code() == Some(1) && output.stdout.contains("container"), "{output}\n{}", output.stdout);
    Ok(())
}

/// What is no business of ours, and becomes it or ceases to be while the agent runs.
fn not_served(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])))?;
    let a2 = lab.pod("a2")?.clone();
    let web = Service::new("web", 10).tcp(80, TARGET).pods(&[&a2]);
    let label = "service.kubernetes.io/service-proxy-name";
    let others = web.clone().label(label, "another");
    let headless = "apiVersion: v1\nkind: Service\nmetadata: {name: headless, namespace: default}\n\
                    spec: {clusterIP: None, clusterIPs: [None], ports: [{port: 80}]}\n\
                    ---\napiVersion: v1\nkind: Service\nmetadata: {name: alias, namespace: default}\n\
                    spec: {type: ExternalName, externalName: example.com}\n";
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    let _server = cluster.servers(&["a2"])?;
    let client = cluster.pod("a1")?;
    let mut steps = Steps::new();
    steps.step("headless and ExternalName", || {
        cluster.folder.write("headless.yaml", headless)?;
        cluster.put(&Service::new("after", 11).tcp(80, TARGET))?;
        let printed = cluster.node("node-a")?.kproxy(&["services", "-o", "json"])?.success()?;
        ensure!(!printed.contains("headless") && !printed.contains("alias"), "{printed}");
        ensure!(!cluster.agent("node-a")?.log().iter().any(|line| names(line, &["default/headless"])));
        Ok(())
    });
    for family in Family::BOTH {
        let to = SocketAddr::new(web.cluster_ip(family), 80);
        steps.step(&format!("another proxy's label comes and goes, {family:?}"), || {
            client.reaches(Transport::Tcp, to, &["a2"])?;
            cluster.put(&others)?;
            client.gets_silence(Transport::Tcp, to)?;
            eventually("it left alone", || Ok((cluster.lab.strays_to(to.ip())? > 0).then_some(())))?;
            cluster.put(&web)?;
            client.reaches(Transport::Tcp, to, &["a2"])
        });
    }
    steps.step("a slice of a headless Service does not count", || {
        let mut slice = web.slice(Family::V4);
        slice["metadata"]["labels"]["service.kubernetes.io/headless"] = serde_json::json!("");
        let text = format!("---\n{:#}\n---\n{slice:#}\n", web.object());
        cluster.change(|cluster| cluster.folder.write(&file_name("web"), &text))?;
        client.is_refused(Transport::Tcp, SocketAddr::new(web.cluster_ip(Family::V4), 80))
    });
    steps.done()
}
