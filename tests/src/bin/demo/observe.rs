//! One request, looked at from both sides: what the client was told, and what the load balancer
//! counted meanwhile.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context as _, Result};
use kproxy_lab::{Elb, Member, NginxAnswer};

/// A request that was made while nobody else used the load balancer.
#[derive(Clone, Debug)]
pub struct Observation {
    /// Who asked.
    pub client: String,
    /// The client's own address, of the family it asked by.
    pub address: IpAddr,
    /// What came back, or why nothing did.
    pub answer: Result<NginxAnswer, String>,
    /// Connections that the load balancer had counted before.
    pub before: u64,
    /// And after.
    pub after: u64,
    /// Nodes that the load balancer sent connections to meanwhile.
    pub nodes: Vec<String>,
}

/// What a request must look like.
#[derive(Clone, Debug)]
pub enum Expected {
    /// Straight to a pod, which sees the client's own address; the load balancer counts nothing.
    Direct,
    /// Through the load balancer and the NodePort of a node, to a pod there, which sees the load
    /// balancer's address.
    ThroughElb {
        /// The load balancer's address towards the nodes.
        elb: IpAddr,
        /// The pods with nginx, and their nodes.
        backends: BTreeMap<String, String>,
    },
    /// On a connection that is open already: the answer is as before, the load balancer counts
    /// nothing new.
    AsBefore(NginxAnswer),
}

/// Makes a request, with a look at a frontend of the load balancer before and after.
///
/// # Errors
/// When the load balancer does not tell its counts. That the request failed is an observation.
pub fn observe(
    elb: &Elb,
    frontend: &str,
    client: &str,
    address: IpAddr,
    request: impl FnOnce() -> Result<String>,
) -> Result<Observation> {
    let before = elb.connections(frontend)?;
    let servers_before = elb.server_connections(frontend)?;
    let answer = request().and_then(|text| NginxAnswer::parse(&text));
    let after = elb.connections(frontend)?;
    let servers_after = elb.server_connections(frontend)?;
    let nodes = servers_after.into_iter().filter(|(name, count)| servers_before.get(name) != Some(count));
    Ok(Observation {
        client: client.to_owned(),
        address,
        answer: answer.map_err(|error| format!("{error:#}")),
        before,
        after,
        nodes: nodes.map(|(name, _)| name).collect(),
    })
}

/// A request on a connection of its own, by curl in the client.
pub fn curl(client: &Member, url: &str) -> Result<String> {
    // The answer of a load balancer without servers would be a closed connection, or nothing.
    let output = client.run(&["curl", "--silent", "--show-error", "--fail", "--max-time", "3", url])?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = output.stderr.lines().next().map(str::to_owned);
    Err(anyhow::Error::msg(said.context("curl failed and said nothing")?))
}

impl Observation {
    /// The way the request took, as far as it can be told.
    pub fn way(&self) -> String {
        let mut stations = vec![self.client.as_str()];
        if self.after != self.before {
            stations.push("ELB");
            stations.extend(self.nodes.iter().map(String::as_str));
        }
        stations.push(self.answered_by());
        stations.join(" → ")
    }

    /// The pod that answered.
    pub fn answered_by(&self) -> &str {
        self.answer.as_ref().map_or("nobody", |answer| &answer.pod)
    }

    /// The client's address as the pod saw it.
    pub fn seen(&self) -> &str {
        self.answer.as_ref().map_or("-", |answer| &answer.client)
    }

    /// The load balancer's count, before and after.
    pub fn count(&self) -> String {
        format!("{} → {}", self.before, self.after)
    }

    /// What is not as it must be; `None` where all is.
    pub fn fault(&self, expected: &Expected) -> Option<String> {
        let answer = match &self.answer {
            Ok(answer) => answer,
            Err(why) => return Some(why.clone()),
        };
        let counted = self.after.abs_diff(self.before);
        let (connections, client) = match expected {
            Expected::Direct => (0, self.address.to_string()),
            Expected::ThroughElb { elb, backends } => {
                let pod = &answer.pod;
                if counted == 1 && self.nodes.iter().ne(backends.get(pod)) {
                    return Some(format!("the ELB asked {}, but {pod} answered", self.nodes.join(", ")));
                }
                (1, elb.to_string())
            }
            Expected::AsBefore(first) if answer != first => {
                return Some(format!("before, the answer was from {} to {}", first.pod, first.client));
            }
            Expected::AsBefore(first) => (0, first.client.clone()),
        };
        if counted != connections {
            return Some(format!("the ELB counted {counted}, not {connections}"));
        }
        if answer.client != client {
            return Some(format!("{} saw {}, not {client}", answer.pod, answer.client));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observation(client: &str, counted: u64, nodes: &[&str]) -> Observation {
        Observation {
            client: String::from("client-c"),
            address: "10.244.3.10".parse().unwrap(),
            answer: Ok(NginxAnswer {
                pod: String::from("web-2"),
                client: client.to_owned(),
                server: String::from("10.244.2.10"),
            }),
            before: 4,
            after: 4 + counted,
            nodes: nodes.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn a_short_circuit_is_told_from_the_way_through() {
        let backends = BTreeMap::from(
            [("web-2", "node-b"), ("web-1", "node-a")].map(|(pod, node)| (pod.to_owned(), node.to_owned())),
        );
        let through = Expected::ThroughElb { elb: "192.0.2.50".parse().unwrap(), backends };

        let direct = observation("10.244.3.10", 0, &[]);
        assert_eq!(direct.way(), "client-c → web-2");
        assert_eq!(direct.fault(&Expected::Direct), None);
        assert!(direct.fault(&through).unwrap().contains("counted 0, not 1"));

        let passed = observation("192.0.2.50", 1, &["node-b"]);
        assert_eq!(passed.way(), "client-c → ELB → node-b → web-2");
        assert_eq!(passed.fault(&through), None);
        assert!(passed.fault(&Expected::Direct).unwrap().contains("counted 1, not 0"));

        let masked = observation("192.0.2.12", 1, &["node-b"]);
        assert!(masked.fault(&through).unwrap().contains("saw 192.0.2.12"));
        let strayed = observation("192.0.2.50", 1, &["node-a"]);
        assert!(strayed.fault(&through).unwrap().contains("node-a"));
    }

    #[test]
    fn an_open_connection_must_not_move() {
        let first = observation("10.244.3.10", 0, &[]).answer.unwrap();
        let as_before = Expected::AsBefore(first);
        let later = observation("10.244.3.10", 0, &[]);
        assert_eq!(later.fault(&as_before), None);
        let moved = observation("192.0.2.50", 0, &[]);
        assert!(moved.fault(&as_before).is_some());
        let mut lost = later;
        lost.answer = Err(String::from("curl: (7) refused"));
        assert_eq!(lost.fault(&as_before).as_deref(), Some("curl: (7) refused"));
        assert_eq!((lost.answered_by(), lost.seen()), ("nobody", "-"));
    }
}
