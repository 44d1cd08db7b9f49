//! Nodes that route what pods send by its source, as AWS's VPC CNI does it for pods on its second interfaces: a pod's answer
//! would leave by another interface than its client's packets came in by, and the network drops it there.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use kproxy_lab::{Context, Family, HostSpec, NodeSpec, RpFilter};

use crate::Scenario;
use crate::cluster::{Client, Cluster, DEADLINE, Steps, TARGET, Transport, ask_from, check, eventually};
use crate::objects::Service;

pub const SCENARIOS: &[Scenario] = &[("kproxy::answers_of_pods_leave_where_their_clients_came_in", answers)];

const NODE_PORT: u16 = 30_080;
/// More than one link takes.
const LARGE: usize = 4_000;

fn answers(ctx: &Context) -> Result<()> {
    let lab = ctx.lab(|lab| {
        // Strict filtering would drop what comes in for such a pod, with any proxy.
        lab.node(NodeSpec::new("node-a", 1, &["a1", "a2"]).rp_filter(RpFilter::Loose))
            .client("client")
            .host(HostSpec::new("second", 101))
    })?;
    let (node, pod) = (lab.node("node-a")?.clone(), lab.pod("a2")?.clone());
    let second = lab.host("second")?.clone();
    // The second uplink leads to somebody who sends nothing on.
    node.ip_command("link add eth1 type veth peer name far netns second")?;
    for (member, device, v4, v6) in [
        (&*node, "eth1", "198.18.1.1/24", "2001:db8:99::1/64"),
        (&second, "far", "198.18.1.2/24", "2001:db8:99::2/64"),
    ] {
        member.ip_command(&format!("address add {v4} dev {device}"))?;
        member.ip_command(&format!("address add {v6} dev {device} nodad"))?;
        member.ip_command(&format!("link set {device} up"))?;
    }
    node.ip_command("route add default via 198.18.1.2 dev eth1 table 100")?;
    node.ip_command("-6 route add default via 2001:db8:99::2 dev eth1 table 100")?;
    let rules = |word: &str| -> Result<()> {
        node.ip_command(&format!("rule {word} from {} lookup 100 pref 1536", pod.v4()))?;
        node.ip_command(&format!("-6 rule {word} from {} lookup 100 pref 1536", pod.v6()))?;
        Ok(())
    };
    let own_rules = || -> Result<usize> {
        let all = [node.ip_command("rule show")?, node.ip_command("-6 rule show")?].concat();
        Ok(all.lines().filter(|line| line.contains("fwmark 0x1000/0x1000 lookup main")).count())
    };
    let web = Service::new("web", 10).tcp(80, TARGET).udp(80, TARGET).node_port(NODE_PORT).local();
    let web = web.pods(&[&pod]);
    let mut cluster = Cluster::start(lab, &["node-a"], &[], [&web])?;
    let _servers = cluster.servers(&["a2"])?;
    let outside = cluster.lab.host("client")?.clone();
    for family in Family::BOTH {
        outside.ip_command(&format!("route add {} via {}", web.cluster_ip(family), node.ip(family)))?;
    }
    let client = Client::at(&outside)?;
    let is_reached = || -> Result<()> {
        for family in Family::BOTH {
            let to = SocketAddr::new(node.ip(family), NODE_PORT);
            Transport::ALL.iter().try_for_each(|transport| client.reaches(*transport, to, &["a2"]))?;
            // Masqueraded, since it asks a ClusterIP from outside of the cluster.
            let to = SocketAddr::new(web.cluster_ip(family), 80);
            let (answer, _) = ask_from(&client.worker, Transport::Tcp, to)?;
            ensure!(node.own_addresses()?.contains(&answer.client.ip()), "{answer:?}");
        }
        Ok(())
    };
    let mut steps = Steps::new();
    steps.step("without rules", || {
        is_reached()?;
        ensure!(own_rules()? == 0, "there is a rule that nobody needs");
        let (status, detail) = check(&node, "routing by source")?;
        ensure!(status == "ok", "{detail}");
        Ok(())
    });
    steps.step("a rule for a pod's source comes", || {
        rules("add")?;
        let agent = cluster.agent("node-a")?;
        let said = pod.v4().to_string();
        agent.wait_log("it saying so", DEADLINE, |line| {
            line.level == "WARN" && line.message.contains(&said) && line.message.contains("table 100")
        })?;
        eventually("rules of its own", || Ok((own_rules()? == 2).then_some(())))?;
        is_reached()
    });
    steps.step("also in fragments", || {
        for family in Family::BOTH {
            let socket = client.worker.udp_socket(family)?;
            let to = SocketAddr::new(node.ip(family), NODE_PORT);
            client.worker.udp_send_to(socket.id, to, &"x".repeat(LARGE))?;
            let answer = client.worker.udp_receive(socket.id, Duration::from_secs(2))?;
            ensure!(
                answer.from == to && answer.data.len() > LARGE,
                "{} octets from {}",
                answer.data.len(),
                answer.from
            );
            client.worker.close(socket.id)?;
        }
        Ok(())
    });
    steps.step("what the pod itself asks leaves as its rule says", || {
        let mut seen = second.capture("far", &format!("tcp and src host {}", pod.v4()))?;
        let worker = pod.worker()?;
        let to = SocketAddr::new(outside.ip(Family::V4), 9);
        ensure!(worker.tcp_connect_with(to, None, Duration::from_millis(300)).is_err(), "it was connected");
        ensure!(seen.stop()? > 0, "it went elsewhere: {:?}", seen.packets()?);
        Ok(())
    });
    steps.step("kproxy check says so", || {
        let (status, detail) = check(&node, "routing by source")?;
        ensure!(status == "warning" && detail.contains(&pod.v4().to_string()), "{status}: {detail}");
        Ok(())
    });
    steps.step("an agent that comes again keeps one rule", || {
        cluster.start_agents(&["node-a"], &[])?;
        eventually("rules of its own", || Ok((own_rules()? == 2).then_some(())))?;
        is_reached()
    });
    steps.step("with the last rule for pods its own go", || {
        rules("del")?;
        eventually("no rules of its own", || Ok((own_rules()? == 0).then_some(())))?;
        is_reached()
    });
    steps.step("cleanup takes them away", || {
        rules("add")?;
        eventually("rules of its own", || Ok((own_rules()? == 2).then_some(())))?;
        cluster.forget_agent("node-a");
        let cgroup = node.cgroup_root().display().to_string();
        node.kproxy(&["cleanup", "--cgroup-root", &cgroup])?.success()?;
        ensure!(own_rules()? == 0, "{}", node.ip_command("rule show")?);
        Ok(())
    });
    steps.done()
}
