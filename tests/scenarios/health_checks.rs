//! healthCheckNodePort: what load balancers ask, and what they do with the answer.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kproxy_lab::{Check, Context, Family, Frontend, Lab, Member, Worker};
use serde_json::Value;

use crate::Scenario;
use crate::cluster::{Cluster, DEADLINE, Steps, eventually, usual, web};
use crate::objects::{Endpoint, Service};

pub const SCENARIOS: &[Scenario] = &[
    ("kproxy::health_checks_tell_where_the_endpoints_are", health_checks),
    ("kproxy::health_checks_follow_addresses_and_ports", listeners),
];

const NODE_PORT: u16 = 30_080;
const HEALTH_PORT: u16 = 32_000;

/// What curl got.
#[derive(Debug)]
struct Response {
    status: u16,
    head: String,
    body: String,
}

impl Response {
    fn header(&self, name: &str) -> Option<&str> {
        let headers = self.head.lines().filter_map(|line| line.split_once(": "));
        headers.into_iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }

    /// The answer of a node with so many endpoints.
    fn is_of(&self, service: &str, endpoints: usize) -> Result<()> {
        let status = if endpoints > 0 { 200 } else { 503 };
        ensure!(self.status == status, "{self:?} of a node with {endpoints} endpoints");
        let weight = self.header("X-Load-Balancing-Endpoint-Weight");
        ensure!(weight == Some(&endpoints.to_string()), "{self:?} of a node with {endpoints} endpoints");
        ensure!(self.header("Content-Type") == Some("application/json"), "{self:?}");
        let body: Value = serde_json::from_str(&self.body).with_context(|| format!("{self:?}"))?;
        ensure!(body["service"]["namespace"] == "default" && body["service"]["name"] == service, "{self:?}");
        ensure!(body["localEndpoints"] == endpoints && body["serviceProxyHealthy"] == true, "{self:?}");
        Ok(())
    }
}

/// Asks over HTTP; an error where there is no connection.
fn get(member: &Member, to: SocketAddr, path: &str) -> Result<Response> {
    let url = format!("http://{to}{path}");
    let output = member.run(&["curl", "-sS", "-i", "--max-time", "3", &url])?.success()?;
    let (head, body) = output.split_once("\r\n\r\n").with_context(|| format!("no HTTP: {output}"))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok(Response {
        status: status.with_context(|| format!("no HTTP: {output}"))?,
        head: head.to_owned(),
        body: body.to_owned(),
    })
}

fn checked(lab: &Lab) -> Result<Service> {
    Ok(web(lab, NODE_PORT)?.health_check_node_port(HEALTH_PORT))
}

fn health_checks(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(usual)?;
    let web = checked(&lab)?;
    let (a1, a2, b1) = (lab.pod("a1")?.clone(), lab.pod("a2")?.clone(), lab.pod("b1")?.clone());
    let services = [web.clone().pods(&[&a2])];
    let mut cluster = Cluster::start(lab, &["node-a", "node-b"], &[], &services)?;
    let _servers = cluster.servers(&["a1", "a2", "b1"])?;
    let client = cluster.lab.host("client")?.clone();
    let elb = cluster.lab.elb()?.clone();
    let at = |cluster: &Cluster, node: &str, family| -> Result<SocketAddr> {
        Ok(SocketAddr::new(cluster.node(node)?.ip(family), HEALTH_PORT))
    };
    let tells = |cluster: &Cluster, counts: [usize; 2]| -> Result<()> {
        for (node, count) in ["node-a", "node-b"].into_iter().zip(counts) {
            for family in Family::BOTH {
                let to = at(cluster, node, family)?;
                eventually(&format!("{to} telling of {count} endpoints"), || {
                    Ok(get(&client, to, "/").and_then(|answer| answer.is_of("web", count)).ok())
                })?;
            }
        }
        Ok(())
    };
    let mut steps = Steps::new();

    steps.step("the node with the endpoint and the node without", || tells(&cluster, [1, 0]));
    steps.step("any path, any method", || {
        for family in Family::BOTH {
            get(&client, at(&cluster, "node-a", family)?, "/healthz?verbose=1")?.is_of("web", 1)?;
            let url = format!("http://{}/", at(&cluster, "node-a", family)?);
            let post = ["curl", "-sS", "-X", "POST", "-w", "%{http_code}", "-o", "/dev/null", &url];
            ensure!(client.run(&post)?.success()? == "200", "POST is answered otherwise");
        }
        Ok(())
    });
    steps.step("asked by the node itself and by a pod", || {
        for member in [&**cluster.node("node-a")?, &*a1] {
            get(member, at(&cluster, "node-a", Family::V4)?, "/")?.is_of("web", 1)?;
        }
        Ok(())
    });
    steps.step("the load balancer sends where the endpoints are", || {
        let check = Check::Http { port: HEALTH_PORT, path: "/".to_owned() };
        let mut frontend = Frontend::new("web").bind_all(elb.vips(), 80).check(check);
        for name in ["node-a", "node-b"] {
            frontend = frontend.server(name, SocketAddr::new(cluster.node(name)?.v4().into(), NODE_PORT));
        }
        elb.configure(&[frontend])?;
        elb.wait_servers_up("web", &["node-a"], DEADLINE)?;
        asks(&client.worker()?, elb.vips()[0], &["a2"])
    });
    steps.step("endpoints come", || {
        cluster.put(&web.clone().pods(&[&a1, &a2, &b1]))?;
        tells(&cluster, [2, 1])?;
        elb.wait_servers_up("web", &["node-a", "node-b"], DEADLINE)
    });
    steps.step("endpoints are not ready, and go", || {
        cluster.put(&web.clone().endpoints([Endpoint::of(&a1).not_ready(), Endpoint::of(&b1)]))?;
        tells(&cluster, [0, 1])?;
        elb.wait_servers_up("web", &["node-b"], DEADLINE)?;
        asks(&client.worker()?, elb.vips()[0], &["b1"])
    });
    steps.step("without endpoints anywhere", || {
        cluster.put(&web.clone().pods(&[]))?;
        tells(&cluster, [0, 0])?;
        elb.wait_servers_up("web", &[], DEADLINE)
    });
    steps.step("a pass-through Service is checked like any other", || {
        let passed = web.clone().annotation("kubernetes.io/elb.pass-through", "true").pods(&[&a2]);
        cluster.put(&passed)?;
        tells(&cluster, [1, 0])?;
        elb.wait_servers_up("web", &["node-a"], DEADLINE)
    });
    steps.step("policy Cluster has no health check", || {
        cluster.put(&web.clone().cluster().pods(&[&a2]))?;
        for family in Family::BOTH {
            is_closed(&client, at(&cluster, "node-a", family)?)?;
        }
        cluster.put(&web.clone().pods(&[&a2]))?;
        tells(&cluster, [1, 0])
    });
    steps.step("the port changes", || {
        cluster.put(&web.clone().health_check_node_port(HEALTH_PORT + 1).pods(&[&a2]))?;
        is_closed(&client, at(&cluster, "node-a", Family::V4)?)?;
        let to = SocketAddr::new(cluster.node("node-a")?.v4().into(), HEALTH_PORT + 1);
        eventually("the new port", || {
            Ok(get(&client, to, "/").and_then(|answer| answer.is_of("web", 1)).ok())
        })
    });
    steps.step("the Service goes", || {
        cluster.delete(&web)?;
        is_closed(&client, SocketAddr::new(cluster.node("node-a")?.v4().into(), HEALTH_PORT + 1))
    });
    steps.done()
}

/// Ports that others have, and addresses that come and go.
fn listeners(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(usual)?;
    let web = checked(&lab)?.pods(&[lab.pod("a2")?]);
    let node = lab.node("node-a")?.clone();
    let (near, far) = (SocketAddr::new(node.v4().into(), HEALTH_PORT), "198.51.100.77".parse::<IpAddr>()?);
    // Somebody else has the port before the agent wants it.
    let squatter = node.echo(HEALTH_PORT)?;
    let arguments = ["--nodeport-addresses", "192.0.2.0/24,198.51.100.0/24,2001:db8::/32"];
    let mut cluster = Cluster::start(lab, &["node-a"], &arguments, [&web])?;
    let client = cluster.lab.host("client")?.clone();
    let mut steps = Steps::new();

    steps.step("a taken port is told", || {
        let agent = cluster.agent("node-a")?;
        let line = agent.wait_log("it saying what it cannot bind", DEADLINE, |line| {
            line.mentions("default/web") && line.mentions(&near.to_string())
        })?;
        ensure!(line.level == "ERROR" && line.mentions("Free that port"), "{line:?}");
        eventually("both families in the metrics", || Ok((unbound(&node)? == Some(2)).then_some(())))
    });
    steps.step("it is answered as soon as it is free", || {
        drop(squatter);
        for family in Family::BOTH {
            let to = SocketAddr::new(node.ip(family), HEALTH_PORT);
            eventually(&format!("an answer at {to}"), || {
                Ok(get(&client, to, "/").and_then(|answer| answer.is_of("web", 1)).ok())
            })?;
        }
        ensure!(unbound(&node)? == Some(0), "the metrics still say {:?}", unbound(&node)?);
        let agent = cluster.agent("node-a")?;
        let told = agent.log().iter().filter(|line| line.mentions("Free that port")).count();
        ensure!(told == 2, "told {told} times where there are two families");
        Ok(())
    });
    steps.step("an address that comes is answered on, and let go with it", || {
        let device = "lo";
        node.ip_command(&format!("address add {far}/32 dev {device}"))?;
        let to = SocketAddr::new(far, HEALTH_PORT);
        eventually("an answer on the new address", || {
            Ok(get(&node, to, "/").and_then(|answer| answer.is_of("web", 1)).ok())
        })?;
        node.ip_command(&format!("address del {far}/32 dev {device}"))?;
        eventually("no listener there", || {
            let sockets = node.run(&["ss", "-Htln"])?.success()?;
            Ok((!sockets.contains(&to.to_string())).then_some(()))
        })
    });
    steps.done()
}

/// What is asked by way of the load balancer is answered by one of these.
fn asks(worker: &Worker, vip: IpAddr, servers: &[&str]) -> Result<()> {
    for _ in 0..5 {
        let answer = worker.ask_tcp(SocketAddr::new(vip, 80))?;
        ensure!(servers.contains(&answer.server.as_str()), "{answer:?}");
    }
    Ok(())
}

fn is_closed(client: &Member, to: SocketAddr) -> Result<()> {
    let worker = client.worker()?;
    eventually(&format!("nobody listening at {to}"), || {
        let refused = worker
            .tcp_connect_with(to, None, Duration::from_secs(1))
            .is_err_and(|error| error.errno() == Some(nix::errno::Errno::ECONNREFUSED));
        Ok(refused.then_some(()))
    })
}

/// How many listeners the metrics say cannot be bound.
fn unbound(node: &Member) -> Result<Option<u64>> {
    let metrics =
        node.run(&["curl", "-sS", "--max-time", "3", "http://127.0.0.1:10249/metrics"])?.success()?;
    let name = "kproxy_problems{kind=\"health-check-node-port\",origin=\"server\"} ";
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    line.map(|count| count.parse().with_context(|| format!("no number: {count}"))).transpose()
}
