//! Events at a real API server: what an operator must know, where an operator looks.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Agent, Context, ControlPlane, ElbSpec, Family, Lab, Node, NodeSpec};
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Client, DEADLINE, Steps, TARGET, Transport, eventually};
use crate::control::manifests;
use crate::objects::{Service, cluster_ip};

pub const SCENARIOS: &[Scenario] = &[
    ("kubernetes::events_tell_what_is_wrong_with_a_service", events),
    ("kubernetes::an_agent_that_may_not_write_events_says_so_once", forbidden),
];

const HEALTH_PORT: u16 = 32_000;
const ELB: &str = "kubernetes.io/elb.pass-through";

fn start(ctx: &Context) -> Result<(Lab, ControlPlane)> {
    let lab = ctx.lab(|lab| {
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]))
            .node(NodeSpec::new("node-b", 2, &["b1"]))
            .elb(ElbSpec::new())
            .control()
    })?;
    let control = ControlPlane::start(&lab, &ControlPlane::assets()?)?;
    for file in manifests()? {
        control.apply(&fs::read_to_string(&file)?).with_context(|| file.display().to_string())?;
    }
    for node in lab.nodes() {
        let name = node.name();
        control.apply(&format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n"))?;
    }
    Ok((lab, control))
}

fn agent(control: &ControlPlane, node: &Node) -> Result<Agent> {
    // What the manifests allow is all that it has.
    let access = control.kubeconfig_for_service_account("kube-system", "kproxy")?;
    let mut agent = node.agent().kubeconfig(&access).start()?;
    agent.wait_synced()?;
    Ok(agent)
}

fn apply(control: &ControlPlane, service: &Service) -> Result<()> {
    control.apply(&service.yaml())?;
    let patch = format!("{{\"status\": {}}}", service.status());
    let arguments =
        ["patch", "service", service.name(), "--subresource=status", "--type=merge", "-p", &patch];
    control.kubectl(&arguments)?.success()?;
    Ok(())
}

/// All Events with this reason on this object.
fn events_on(control: &ControlPlane, object: &str, reason: &str) -> Result<Vec<Value>> {
    let text = control.kubectl(&["get", "events.v1.events.k8s.io", "-A", "-o", "json"])?.success()?;
    let list: Value = serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))?;
    let is = |event: &&Value| event["regarding"]["name"] == object && event["reason"] == reason;
    Ok(list["items"].as_array().into_iter().flatten().filter(is).cloned().collect())
}

/// Waits for an Event; its note must say this.
fn told(control: &ControlPlane, object: &str, reason: &str, words: &[&str]) -> Result<Value> {
    let event = eventually(&format!("an Event {reason} on {object}"), || {
        Ok(events_on(control, object, reason)?.into_iter().next())
    })?;
    let note = event["note"].as_str().unwrap_or_default();
    for word in words {
        ensure!(note.contains(word), "no {word:?} in {event:#}");
    }
    ensure!(event["type"] == "Warning" && event["reportingController"] == "kproxy", "{event:#}");
    Ok(event)
}

fn events(ctx: &Context) -> Result<()> {
    let (lab, control) = start(ctx)?;
    let (node_a, node_b) = (lab.node("node-a")?.clone(), lab.node("node-b")?.clone());
    let elb = lab.elb()?.clone();
    let vip = elb.vips()[0].to_string();
    let web = Service::new("web", 10).tcp(80, TARGET).load_balancers(elb.vips()).local();
    let web = web.health_check_node_port(HEALTH_PORT).pods(&[lab.pod("a2")?]);
    apply(&control, &web)?;
    // The health check's port is taken on one node.
    let squatter = node_a.echo(HEALTH_PORT)?;
    let mut agents = vec![agent(&control, &node_a)?, agent(&control, &node_b)?];
    let mut steps = Steps::new();

    steps.step("a health port that cannot be bound", || {
        let reason = "FailedToStartServiceHealthcheck";
        let event = told(&control, "web", reason, &[&format!("{}:{HEALTH_PORT}", node_a.v4()), "in use"])?;
        ensure!(event["reportingInstance"] == "kproxy-node-a" && event["action"] == "Listen", "{event:#}");
        ensure!(
            events_on(&control, "web", reason)?.iter().all(|one| one["reportingInstance"] == "kproxy-node-a")
        );
        Ok(())
    });
    steps.step("a frontend that two Services claim: one Event of all nodes", || {
        let taker = Service::new("taker", 11).tcp(80, TARGET).load_balancers(elb.vips());
        apply(&control, &taker)?;
        let event = told(&control, "taker", "FrontendClaimed", &[&vip, "default/web"])?;
        ensure!(
            event["regarding"]["kind"] == "Service" && event["metadata"]["namespace"] == "default",
            "{event:#}"
        );
        // Both agents have said it by the time that both have said the next thing.
        let fails = Service::new("fails", 12).tcp(80, TARGET).annotation(ELB, "yes");
        apply(&control, &fails)?;
        told(&control, "fails", "InvalidValue", &[ELB, "\"yes\""])?;
        for agent in &mut agents {
            agent.wait_log("it saying so", DEADLINE, |line| line.mentions("default/fails"))?;
        }
        let found = events_on(&control, "taker", "FrontendClaimed")?;
        ensure!(found.len() == 1, "{} Events from two agents: {found:#?}", found.len());
        Ok(())
    });
    steps.step("source ranges that pass-through leaves to the load balancer", || {
        let passed = web.clone().annotation(ELB, "true").source_range("192.0.2.0/24");
        apply(&control, &passed)?;
        told(&control, "web", "SourceRangesNotEnforced", &[&vip, "loadBalancerSourceRanges"]).map(drop)
    });
    steps.step("kubectl shows them", || {
        let table = control.kubectl(&["get", "events"])?.success()?;
        for reason in ["FrontendClaimed", "SourceRangesNotEnforced", "InvalidValue"] {
            ensure!(table.contains(reason), "no {reason} in {table}");
        }
        // By the object's UID, as it looks for them.
        let described = control.kubectl(&["describe", "service", "taker"])?.success()?;
        ensure!(described.contains("FrontendClaimed"), "{described}");
        Ok(())
    });
    steps.step("a restarted agent repeats none", || {
        let count = |reason| Ok::<_, anyhow::Error>(events_on(&control, "taker", reason)?.len());
        let restarted = &mut agents[0];
        restarted.restart()?;
        restarted.wait_synced()?;
        let late = Service::new("late", 13).tcp(80, TARGET).annotation(ELB, "late");
        apply(&control, &late)?;
        told(&control, "late", "InvalidValue", &["\"late\""])?;
        ensure!(count("FrontendClaimed")? == 1, "{} Events", count("FrontendClaimed")?);
        Ok(())
    });
    steps.step("tables that are full, and the agent's own servers", || {
        agents.truncate(1);
        let access = control.kubeconfig_for_service_account("kube-system", "kproxy")?;
        let taken = node_b.echo(10_256)?;
        let mut small = node_b.agent().kubeconfig(&access).args(["--max-frontends", "16"]).start()?;
        small.wait_synced()?;
        let mut many = Service::new("many", 14);
        for port in 1..=20 {
            many = many.tcp(port, TARGET);
        }
        apply(&control, &many)?;
        let event = told(&control, "many", "TablesFull", &["frontends do not fit", "--max-frontends"])?;
        ensure!(event["reportingInstance"] == "kproxy-node-b", "{event:#}");
        let event = told(&control, "node-b", "FailedToStartProxierHealthcheck", &["10256", "in use"])?;
        ensure!(
            event["regarding"]["kind"] == "Node" && event["metadata"]["namespace"] == "default",
            "{event:#}"
        );
        drop(taken);
        Ok(())
    });
    drop(squatter);
    steps.done()
}

/// Without the right to write Events everything works, and nothing is asked again and again.
fn forbidden(ctx: &Context) -> Result<()> {
    let (lab, control) = start(ctx)?;
    let rules = "[{\"op\": \"replace\", \"path\": \"/rules\", \"value\": [\
        {\"apiGroups\": [\"\"], \"resources\": [\"services\", \"nodes\"], \"verbs\": [\"list\", \"watch\"]},\
        {\"apiGroups\": [\"discovery.k8s.io\"], \"resources\": [\"endpointslices\"], \"verbs\": [\"list\", \"watch\"]},\
        {\"apiGroups\": [\"networking.k8s.io\"], \"resources\": [\"servicecidrs\"], \"verbs\": [\"list\", \"watch\"]}]}]";
    control.kubectl(&["patch", "clusterrole", "kproxy", "--type=json", "-p", rules])?.success()?;
    let node = lab.node("node-a")?.clone();
    let _server = lab.pod("a2")?.echo(TARGET)?;
    for number in 20..26 {
        let name = format!("bad-{number}");
        apply(&control, &Service::new(&name, number).tcp(80, TARGET).annotation(ELB, "bad"))?;
    }
    let mut agent = agent(&control, &node)?;
    let is_warning = |line: &kproxy_lab::LogLine| line.mentions("Events cannot be written");
    let line = agent.wait_log("it saying that it may not", DEADLINE, is_warning)?;
    ensure!(line.level == "WARN" && line.mentions("events.k8s.io") && line.mentions("create"), "{line:?}");
    // Nor may it list Pods, which costs what it says.
    let is_about_pods = |line: &kproxy_lab::LogLine| line.mentions("kproxy.io/socket-hooks");
    let line = agent.wait_log("it saying that it reads no Pods", DEADLINE, is_about_pods)?;
    ensure!(line.level == "WARN" && line.mentions("[\"pods\"]"), "{line:?}");
    apply(&control, &Service::new("web", 10).tcp(80, TARGET).annotation(ELB, "bad").pods(&[lab.pod("a2")?]))?;
    let client = Client::at(lab.pod("a1")?)?;
    let to = std::net::SocketAddr::new(cluster_ip(10, Family::V4), 80);
    eventually("the Service being served", || Ok(client.reaches(Transport::Tcp, to, &["a2"]).ok()))?;
    agent.wait_log("its problem in the log", DEADLINE, |line| line.mentions("default/web"))?;
    let told = agent.log().iter().filter(|line| is_warning(line)).count();
    ensure!(told == 1, "told {told} times");
    Ok(())
}
