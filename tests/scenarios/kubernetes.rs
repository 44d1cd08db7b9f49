//! The same against a real kube-apiserver: what kubectl applies changes what a connection does.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{
    Agent, BurstSpec, Check, Context, ControlPlane, ElbSpec, Family, Frontend, Lab, LogLine, Node, NodeSpec,
};
use nix::sys::signal::Signal;

use crate::Scenario;
use crate::cluster::{Client, DEADLINE, SILENCE, Steps, TARGET, Transport, ask, eventually, service_view};
use crate::control::manifests;
use crate::dumps;
use crate::objects::{Service, cluster_ip};
use crate::opted_out::{Seen, becomes, pod_object};

pub const SCENARIOS: &[Scenario] = &[
    ("kubernetes::kubectl_changes_what_a_connection_does", connections),
    ("kubernetes::nothing_is_written_before_all_lists", all_lists),
    ("kubernetes::an_odd_object_harms_no_other", odd_objects),
];

const NODE_PORT: u16 = 30_080;
const ELB: &str = "kubernetes.io/elb.pass-through";

/// A lab with a control plane, and an agent as a cluster would run it.
struct Cluster {
    lab: Lab,
    control: ControlPlane,
    agent: Agent,
    node: Node,
}

fn start(ctx: &Context) -> Result<Cluster> {
    let lab =
        ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])).elb(ElbSpec::new()).control())?;
    let control = ControlPlane::start(&lab, &ControlPlane::assets()?)?;
    for file in manifests()? {
        control.apply(&fs::read_to_string(&file)?).with_context(|| file.display().to_string())?;
    }
    let node = lab.node("node-a")?.clone();
    control.apply(&node_object(&node))?;
    // What the manifests allow is all that it has.
    let access = control.kubeconfig_for_service_account("kube-system", "kproxy")?;
    let mut agent = node.agent().kubeconfig(&access).start()?;
    agent.wait_synced()?;
    Ok(Cluster { lab, control, agent, node })
}

fn node_object(node: &Node) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {}, labels: {{topology.kubernetes.io/zone: z1}}}}\n",
        node.name()
    )
}

impl Cluster {
    fn apply(&self, service: &Service) -> Result<()> {
        self.control.apply(&service.yaml())?;
        // As the cloud's controller does; `apply` leaves the status alone.
        let patch = format!("{{\"status\": {}}}", service.status());
        let arguments = ["patch", "service", service.name(), "--subresource=status", "--type=merge", "-p"];
        self.control.kubectl(&[&arguments[..], &[&patch]].concat())?.success()?;
        Ok(())
    }

    fn client(&self) -> Result<Client> {
        Client::at(self.lab.pod("a1")?)
    }

    fn reaches_soon(&self, client: &Client, to: SocketAddr, server: &str) -> Result<()> {
        eventually(&format!("{to} answered by {server}"), || {
            let answer = ask(&client.worker, Transport::Tcp, to)?;
            Ok((answer.server == server).then_some(()))
        })?;
        for transport in Transport::ALL {
            client.reaches(transport, to, &[server])?;
        }
        Ok(())
    }
}

fn connections(ctx: &Context) -> Result<()> {
    let mut cluster = start(ctx)?;
    let client = cluster.client()?;
    let a2 = cluster.lab.pod("a2")?.clone();
    let _server = a2.echo(TARGET)?;
    let elb = cluster.lab.elb()?.clone();
    let frontend = Frontend::new("web")
        .bind_all(elb.vips(), 80)
        .server("node-a", SocketAddr::new(cluster.node.v4().into(), NODE_PORT))
        .check(Check::None);
    elb.configure(&[frontend])?;
    let web = Service::new("web", 10)
        .tcp(80, TARGET)
        .udp(80, TARGET)
        .node_port(NODE_PORT)
        .load_balancers(elb.vips())
        .local()
        .pods(&[&a2]);
    let mut steps = Steps::new();

    steps.step("kubectl apply", || {
        cluster.apply(&web)?;
        for family in Family::BOTH {
            for (address, port) in [(web.cluster_ip(family), 80), (cluster.node.ip(family), NODE_PORT)] {
                cluster.reaches_soon(&client, SocketAddr::new(address, port), "a2")?;
            }
        }
        for vip in elb.vips() {
            cluster.reaches_soon(&client, SocketAddr::new(*vip, 80), "a2")?;
        }
        ensure!(elb.connections("web")? == 0, "the load balancer saw {}", elb.connections("web")?);
        Ok(())
    });
    steps.step("the roles of the manifests are enough", || {
        let complaints: Vec<_> = cluster.agent.log().into_iter().filter(is_complaint).collect();
        ensure!(complaints.is_empty(), "{complaints:#?}");
        Ok(())
    });
    steps.step("annotations and ipMode switch the way", || {
        for (arguments, long) in [
            (&["annotate", "service", "web", "kubernetes.io/elb.pass-through=true"][..], true),
            (&["annotate", "service", "web", "kubernetes.io/elb.pass-through-"], false),
        ] {
            cluster.control.kubectl(arguments)?.success()?;
            way_becomes(&elb, &client, long)?;
        }
        cluster.apply(&web.clone().ip_mode("Proxy"))?;
        way_becomes(&elb, &client, true)?;
        cluster.apply(&web.clone().annotation(ELB, "onlyLocal"))?;
        way_becomes(&elb, &client, true)?;
        cluster.apply(&web)?;
        way_becomes(&elb, &client, false)
    });
    steps.step("a restarted agent writes nothing", || {
        let worker = cluster.lab.pod("a1")?.worker()?;
        let burst = worker.burst_start(BurstSpec::new(SocketAddr::new(web.cluster_ip(Family::V4), 80)))?;
        cluster.agent.kill(Signal::SIGKILL)?;
        cluster.agent.restart()?;
        let line = cluster.agent.wait_synced()?;
        ensure!(line.field("writes").as_deref() == Some("0"), "{line:?}");
        let report = worker.burst_stop(burst)?;
        ensure!(report.ok > 0 && report.failures() == 0, "{report:?}");
        Ok(())
    });
    let later = Service::new("later", 11).tcp(80, TARGET).udp(80, TARGET).pods(&[&a2]);
    steps.step("an outage of the API server", || outage(&mut cluster, &client, &web, &later));
    steps.step("an agent that starts during an outage", || {
        starts_during_an_outage(&mut cluster, &client, &web)
    });
    steps.step("API servers are dialled directly, in turn", || dialled_in_turn(&mut cluster, &client, &web));
    steps.step("a Pod is opted out of the socket hooks", || opted_out(&cluster, &later));
    steps.step("another proxy's Service", || {
        let to = SocketAddr::new(later.cluster_ip(Family::V4), 80);
        cluster.reaches_soon(&client, to, "a2")?;
        let label = "service.kubernetes.io/service-proxy-name";
        cluster.control.kubectl(&["label", "service", "later", &format!("{label}=another")])?.success()?;
        eventually("it left alone", || {
            client.worker.tcp_connect_with(to, None, SILENCE).err().context("still served")?;
            Ok((cluster.lab.strays_to(to.ip())? > 0).then_some(()))
        })?;
        cluster.control.kubectl(&["label", "service", "later", &format!("{label}-")])?.success()?;
        cluster.reaches_soon(&client, to, "a2")
    });
    steps.step("slices that are called headless", || {
        // As the controller labels them, also of a Service that becomes one.
        let to = SocketAddr::new(later.cluster_ip(Family::V4), 80);
        let label = "service.kubernetes.io/headless";
        cluster.control.kubectl(&["label", "endpointslice", "later-v4", &format!("{label}=")])?.success()?;
        eventually("no endpoint any more", || {
            Ok(client.is_refused(Transport::Tcp, to).is_ok().then_some(()))
        })?;
        // Of the other family, which has a slice of its own.
        client.reaches(Transport::Tcp, SocketAddr::new(later.cluster_ip(Family::V6), 80), &["a2"])?;
        cluster.control.kubectl(&["label", "endpointslice", "later-v4", &format!("{label}-")])?.success()?;
        cluster.reaches_soon(&client, to, "a2")
    });
    steps.step("a slice that changes its Service", || {
        let (web_ip, later_ip) = (web.cluster_ip(Family::V4), later.cluster_ip(Family::V4));
        let label = |slice: &str, service: &str| {
            let label = format!("kubernetes.io/service-name={service}");
            cluster.control.kubectl(&["label", "--overwrite", "endpointslice", slice, &label])?.success()
        };
        label("later-v4", "web")?;
        eventually("no endpoint any more", || {
            Ok(client.is_refused(Transport::Tcp, SocketAddr::new(later_ip, 80)).is_ok().then_some(()))
        })?;
        client.reaches(Transport::Tcp, SocketAddr::new(web_ip, 80), &["a2"])?;
        label("later-v4", "later")?;
        cluster.reaches_soon(&client, SocketAddr::new(later_ip, 80), "a2")
    });
    steps.step("a Service that is one no more", || {
        let to = SocketAddr::new(later.cluster_ip(Family::V4), 80);
        let patch = "{\"spec\": {\"type\": \"ExternalName\", \"externalName\": \"example.com\", \"clusterIP\": null, \"clusterIPs\": null, \
                     \"ipFamilies\": null, \"ipFamilyPolicy\": null}}";
        cluster.control.kubectl(&["patch", "service", "later", "--type=merge", "-p", patch])?.success()?;
        eventually("it not served any more", || {
            Ok(client.worker.tcp_connect_with(to, None, SILENCE).is_err().then_some(()))
        })?;
        ensure!(service_view(&cluster.node, "later").is_err(), "still printed");
        Ok(())
    });
    steps.step("kubectl delete", || {
        let to = SocketAddr::new(web.cluster_ip(Family::V4), 80);
        let open = client.worker.tcp_connect(to)?;
        client.worker.tcp_ask(open.id, "before")?;
        // By kubectl with the slices left over, as it is until their controller notices.
        cluster.control.kubectl(&["delete", "service", "web"])?.success()?;
        eventually("it no longer served", || {
            Ok(client.worker.tcp_connect_with(to, None, SILENCE).is_err().then_some(()))
        })?;
        client.worker.tcp_ask(open.id, "after")?;
        ensure!(service_view(&cluster.node, "web").is_err(), "still printed");
        Ok(())
    });
    steps.done()
}

/// An agent that may not list every kind says so, and waits; what an earlier one wrote stands.
fn all_lists(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"])).control())?;
    let control = ControlPlane::start(&lab, &ControlPlane::assets()?)?;
    let node = lab.node("node-a")?;
    let _server = lab.pod("a2")?.echo(TARGET)?;
    control.apply(&node_object(node))?;
    control.apply(&Service::new("web", 10).tcp(80, TARGET).pods(&[lab.pod("a2")?]).yaml())?;
    control.kubectl(&["create", "serviceaccount", "halved"])?.success()?;
    let allow = |role: &str, resources: &str| -> Result<()> {
        let verbs = ["--verb=get,list,watch", &format!("--resource={resources}")];
        control.kubectl(&[&["create", "clusterrole", role][..], &verbs].concat())?.success()?;
        let binding = [&format!("--clusterrole={role}"), "--serviceaccount=default:halved"];
        control.kubectl(&[&["create", "clusterrolebinding", role][..], &binding].concat())?.success()?;
        Ok(())
    };
    allow("services", "services,nodes,servicecidrs.networking.k8s.io")?;
    let access = control.kubeconfig_for_service_account("default", "halved")?;
    let mut agent = node.agent().kubeconfig(&access).start()?;
    agent.wait_log("it saying what it may not list", DEADLINE, |line| {
        is_complaint(line) && line.mentions("endpointslices")
    })?;
    let client = Client::at(lab.pod("a1")?)?;
    let to = SocketAddr::new(cluster_ip(10, Family::V4), 80);
    client.gets_silence(Transport::Tcp, to)?;
    for path in ["healthz", "readyz"] {
        let (status, body) = asked(node, path)?;
        ensure!(status == 503 && body.contains("the first full lists"), "{path}: {status} {body}");
    }
    ensure!(asked(node, "livez")?.0 == 200, "a restart would mend nothing");
    let frontends = dumps::dump(node, "frontend")?;
    ensure!(!frontends.contains("\"key\""), "it wrote before it knew all: {frontends}");
    ensure!(!agent.log().iter().any(|line| line.message == "synced"), "it says that it is synced");

    // Allowed while it runs.
    allow("slices", "endpointslices.discovery.k8s.io")?;
    agent.wait_log("the agent being synced", DEADLINE * 3, |line| line.message == "synced")?;
    client.reaches(Transport::Tcp, to, &["a2"])?;
    for path in ["healthz", "readyz"] {
        eventually(path, || Ok((asked(node, path)?.0 == 200).then_some(())))?;
    }

    // Taken away again: the next agent has nothing to say, and takes nothing away.
    control.kubectl(&["delete", "clusterrolebinding", "slices"])?.success()?;
    agent.restart()?;
    agent.wait_log("it saying what it may not list", DEADLINE, |line| {
        is_complaint(line) && line.mentions("endpointslices")
    })?;
    client.reaches(Transport::Tcp, to, &["a2"])
}

/// What is legal to the API server and unlike all that is common: the Service of Kubernetes' conformance test, whose
/// status has a condition without a time, and values that nobody knows yet. Each costs what it stands in at most, for
/// an agent that runs, and for one that starts with them there.
fn odd_objects(ctx: &Context) -> Result<()> {
    let mut cluster = start(ctx)?;
    let client = cluster.client()?;
    let a2 = cluster.lab.pod("a2")?.clone();
    let _server = a2.echo(TARGET)?;
    let odd = Service::new("odd", 20).tcp(80, TARGET).udp(80, TARGET).pods(&[&a2]);
    cluster.apply(&odd)?;
    cluster.reaches_soon(&client, SocketAddr::new(odd.cluster_ip(Family::V4), 80), "a2")?;
    let patched = |what: &str, name: &str, patch: &str| {
        let arguments = ["patch", what, name, "--subresource=status", "--type=merge", "-p", patch];
        cluster.control.kubectl(&arguments)?.success()
    };
    cluster.agent.mark();
    patched(
        "service",
        "odd",
        r#"{"status": {"conditions": [{"type": "StatusUpdate", "status": "True", "reason": "E2E",
            "message": "Set from e2e test", "lastTransitionTime": null}]}}"#,
    )?;
    let written = cluster.control.kubectl(&["get", "service", "odd", "-o", "json"])?.success()?;
    ensure!(written.contains("\"lastTransitionTime\": null"), "the API server has it otherwise: {written}");
    // What a later Kubernetes may write.
    patched(
        "node",
        "node-a",
        r#"{"status": {"addresses": [{"type": "FutureIP", "address": "fd00::/8"}, {"type": "InternalIP", "address": ""}],
            "conditions": [{"type": "Future", "status": "Perhaps", "lastTransitionTime": null}]}}"#,
    )?;
    cluster
        .control
        .kubectl(&["annotate", "service", "odd", "kubernetes.io/elb.pass-through=perhaps"])?
        .success()?;
    cluster.control.apply(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: odd}\ndata: {spec: none}\n---\n\
         apiVersion: v1\nkind: Endpoints\nmetadata: {name: odd}\n",
    )?;
    // Named once, by its field; the null is nobody's matter.
    cluster.agent.wait_log("the annotation being named", DEADLINE, |line| {
        is_complaint(line) && line.mentions("elb.pass-through") && line.mentions("perhaps")
    })?;

    let later = Service::new("later", 21).tcp(80, TARGET).udp(80, TARGET).pods(&[&a2]);
    cluster.apply(&later)?;
    for service in [&odd, &later] {
        cluster.reaches_soon(&client, SocketAddr::new(service.cluster_ip(Family::V4), 80), "a2")?;
    }
    cluster.agent.restart()?;
    let line = cluster.agent.wait_synced()?;
    ensure!(line.field("writes").as_deref() == Some("0"), "{line:?}");
    let last = Service::new("last", 22).tcp(80, TARGET).udp(80, TARGET).pods(&[&a2]);
    cluster.apply(&last)?;
    cluster.reaches_soon(&client, SocketAddr::new(last.cluster_ip(Family::V4), 80), "a2")?;
    eventually("it being ready", || Ok((asked(&cluster.node, "readyz")?.0 == 200).then_some(())))?;

    let complaints: Vec<_> = cluster.agent.log_since_mark().into_iter().filter(is_complaint).collect();
    let about = |what: &str| complaints.iter().filter(|line| line.mentions(what)).count();
    // The log is the second agent's.
    ensure!(about("perhaps") == 1 && about("lastTransitionTime") == 0, "{complaints:#?}");
    ensure!(about("cannot be read") == 0 && about("api_error") == 0, "{complaints:#?}");
    cluster.agent.mark();
    cluster.control.kubectl(&["annotate", "service", "odd", "kubernetes.io/elb.pass-through-"])?.success()?;
    cluster.agent.wait_log("it being named no more", DEADLINE, |line| {
        line.level == "INFO" && line.mentions("resolved") && line.mentions("perhaps")
    })?;
    Ok(())
}

/// Status and body of an answer of the agent's health server.
fn asked(node: &Node, path: &str) -> Result<(u16, String)> {
    let url = format!("http://127.0.0.1:10256/{path}");
    let output = node.run(&["curl", "-sS", "--max-time", "3", "-w", "\n%{http_code}", &url])?.success()?;
    let (body, status) =
        output.trim_end().rsplit_once('\n').with_context(|| format!("no status: {output}"))?;
    Ok((status.parse()?, body.to_owned()))
}

/// Waits until a new connection takes the way: HAProxy counts it, or not.
fn way_becomes(elb: &kproxy_lab::Elb, client: &Client, long: bool) -> Result<()> {
    for vip in elb.vips() {
        eventually(&format!("the long way to {vip} being {long}"), || {
            let before = elb.connections("web")?;
            let answer = client.worker.ask_tcp(SocketAddr::new(*vip, 80))?;
            ensure!(answer.server == "a2", "{answer:?}");
            let counted = elb.connections("web")? - before;
            let seen_as_elb = answer.client.ip().to_canonical() == elb.v4();
            ensure!(seen_as_elb == (counted == 1), "counted {counted}, and {answer:?}");
            Ok((seen_as_elb == long).then_some(()))
        })?;
    }
    Ok(())
}

/// The dataplane goes on without the API server; what happened there arrives afterwards.
fn outage(cluster: &mut Cluster, client: &Client, web: &Service, later: &Service) -> Result<()> {
    let to = SocketAddr::new(web.cluster_ip(Family::V4), 80);
    let worker = cluster.lab.pod("a1")?.worker()?;
    let open = worker.tcp_connect(to)?;
    let burst = worker.burst_start(BurstSpec::new(to))?;
    cluster.agent.mark();
    cluster.control.stop_api_server()?;
    cluster.agent.wait_log("it noticing", DEADLINE, is_complaint)?;
    client.reaches(Transport::Tcp, to, &["a2"])?;
    cluster.control.start_api_server()?;
    cluster.apply(later)?;
    cluster.reaches_soon(client, SocketAddr::new(later.cluster_ip(Family::V4), 80), "a2")?;
    worker.tcp_ask(open.id, "still there")?;
    let report = worker.burst_stop(burst)?;
    ensure!(report.ok > 0 && report.failures() == 0, "{report:?}");
    // One clear complaint for each resource, and no stream of them.
    let complaints: Vec<_> = cluster.agent.log_since_mark().into_iter().filter(is_complaint).collect();
    ensure!(complaints.len() < 20, "{} complaints about one outage", complaints.len());
    // In kproxy's words alone: its library would say the same for each try.
    let own = |line: &LogLine| line.field("target").is_some_and(|target| target.starts_with("kproxy"));
    ensure!(complaints.iter().all(own), "{complaints:#?}");
    Ok(())
}

/// It has no list: it writes nothing, and above all deletes nothing.
fn starts_during_an_outage(cluster: &mut Cluster, client: &Client, web: &Service) -> Result<()> {
    let to = SocketAddr::new(web.cluster_ip(Family::V4), 80);
    let before = service_view(&cluster.node, "web")?["frontends"].clone();
    cluster.control.stop_api_server()?;
    cluster.agent.restart()?;
    cluster.agent.wait_log("it saying that it cannot reach the API server", DEADLINE, |line| {
        is_complaint(line) && line.mentions("192.0.2.2")
    })?;
    client.reaches(Transport::Tcp, to, &["a2"])?;
    let numbers = |frontends: &serde_json::Value| -> Vec<_> {
        let all = frontends.as_array().into_iter().flatten();
        all.map(|one| (one["address"].clone(), one["number"].clone(), one["mode"].clone())).collect()
    };
    let now = service_view(&cluster.node, "web")?["frontends"].clone();
    ensure!(numbers(&before) == numbers(&now), "before: {before:#}, now: {now:#}");
    cluster.control.start_api_server()?;
    let line =
        cluster.agent.wait_log("the agent being synced", DEADLINE * 2, |line| line.message == "synced")?;
    ensure!(line.field("writes").as_deref() == Some("0"), "{line:?}");
    Ok(())
}

/// `--api-server` beats the kubeconfig's server, and is a list.
fn dialled_in_turn(cluster: &mut Cluster, client: &Client, web: &Service) -> Result<()> {
    let access = cluster.control.kubeconfig_for_service_account("kube-system", "kproxy")?;
    let wrong = fs::read_to_string(&access)?.replace(&cluster.control.url(), "https://192.0.2.250:6443");
    let elsewhere = access.with_extension("elsewhere");
    fs::write(&elsewhere, wrong)?;
    // The first is a node that serves no API: it refuses at once.
    let servers = format!("https://{}:6443,{}", cluster.node.v4(), cluster.control.url());
    cluster.agent.kill(Signal::SIGTERM)?;
    cluster.agent = cluster.node.agent().kubeconfig(&elsewhere).args(["--api-server", &servers]).start()?;
    cluster.agent.wait_log("the agent being synced", DEADLINE * 2, |line| line.message == "synced")?;
    client.reaches(Transport::Tcp, SocketAddr::new(web.cluster_ip(Family::V4), 80), &["a2"])
}

/// By its annotation, as long as that is there; what the Pod's kubelet would write is written for it.
fn opted_out(cluster: &Cluster, later: &Service) -> Result<()> {
    let pod = cluster.lab.pod("a1")?;
    cluster.control.kubectl(&["create", "serviceaccount", "default"])?;
    let object = pod_object(pod, None).replace("containers: []", "containers: [{name: c, image: none}]");
    cluster.control.apply(&object)?;
    let ips = format!("[{{\"ip\": \"{}\"}}, {{\"ip\": \"{}\"}}]", pod.v4(), pod.v6());
    let status =
        format!("{{\"status\": {{\"phase\": \"Running\", \"podIP\": \"{}\", \"podIPs\": {ips}}}}}", pod.v4());
    let patch = ["patch", "pod", "a1", "--subresource=status", "--type=merge", "-p", &status];
    cluster.control.kubectl(&patch)?.success()?;
    becomes(pod, later, Seen::Backend(TARGET))?;
    for (annotation, seen) in [
        ("kproxy.io/socket-hooks=false", Seen::Service),
        ("kproxy.io/socket-hooks-", Seen::Backend(TARGET)),
        ("kproxy.io/socket-hooks=false", Seen::Service),
    ] {
        cluster.control.kubectl(&["annotate", "pod", "a1", annotation])?.success()?;
        becomes(pod, later, seen)?;
    }
    cluster.control.kubectl(&["delete", "pod", "a1", "--grace-period=0", "--force"])?.success()?;
    becomes(pod, later, Seen::Backend(TARGET))
}

fn is_complaint(line: &LogLine) -> bool {
    matches!(line.level.as_str(), "WARN" | "ERROR")
}
