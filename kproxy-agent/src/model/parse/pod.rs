//! Pods, as far as they are opted out of the socket hooks.

use kproxy_common::Address;

use super::values::{address, quoted};
use super::{Parsed, Report};
use crate::api;
use crate::model::config::NodeConfig;
use crate::model::problem::{ObjectRef, ProblemKind};
use crate::wanted::ServiceKey;

const ANNOTATION: &str = "kproxy.io/socket-hooks";

/// The addresses of a Pod that is to be opted out of the socket hooks: by these its network namespace is found. `None`
/// of all others: of another node, without the annotation, over, without an address yet, or that cannot be opted out.
pub type OptedOutPod = Option<Box<[Address]>>;

/// The Pod `pod` with namespace and name `key`.
pub fn pod(key: &ServiceKey, pod: &api::Pod, config: &NodeConfig) -> Parsed<OptedOutPod> {
    let mut report = Report::new(ObjectRef::pod(key));
    let value = opted_out(&mut report, pod, config);
    report.parsed(value)
}

fn opted_out(report: &mut Report, pod: &api::Pod, config: &NodeConfig) -> OptedOutPod {
    let spec = report.read("spec", &pod.spec)?;
    let status = report.read("status", &pod.status);
    let node_name = report.text("spec.nodeName", &spec.node_name);
    if node_name != Some(config.node_name.as_str()) || is_over(report, status) {
        return None;
    }
    let field = || format!("metadata.annotations[{ANNOTATION}]");
    let metadata = report.read("metadata", &pod.metadata)?;
    let annotation = report.read("metadata.annotations", &metadata.annotations)?.get(ANNOTATION)?;
    match report.text(field(), annotation)? {
        "false" => {}
        "true" => return None,
        other => {
            let message = format!(
                "{} is none of \"true\" and \"false\"; the annotation does not decide",
                quoted(other)
            );
            report.add(ProblemKind::Value, field(), message);
            return None;
        }
    }
    if report.read("spec.hostNetwork", &spec.host_network) == Some(&true) {
        let message = "a Pod of the host's network cannot be told from other processes of the node, whose sockets are \
                       served: it is not opted out";
        report.add(ProblemKind::CannotOptOut, field(), message);
        return None;
    }
    if !config.has_netns_cookies {
        let message = "this kernel (before 5.14) does not tell whose a network namespace is: it is not opted out; \
                       --socket-hooks host opts out all Pods of the node";
        report.add(ProblemKind::CannotOptOut, field(), message);
        return None;
    }
    let written = report.entries("status.podIPs", &status?.pod_ips).into_iter();
    let parsed = written.filter_map(|(at, entry)| {
        let field = format_args!("status.podIPs[{at}].ip");
        let text = report.text(field, &entry.ip)?;
        address(report, field, text)
    });
    let addresses: Box<[Address]> = parsed.collect();
    (!addresses.is_empty()).then_some(addresses)
}

/// Whether its containers have ended for good: its address may be another's by now.
fn is_over(report: &mut Report, status: Option<&api::PodStatus>) -> bool {
    let phase = status.and_then(|status| report.text("status.phase", &status.phase));
    matches!(phase, Some("Succeeded" | "Failed"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// What is found in a Pod of this node that is fit to be opted out, after `change`: its addresses, and the kinds of
    /// problems.
    fn parsed(change: impl FnOnce(&mut Value, &mut NodeConfig)) -> (Option<Vec<String>>, Vec<ProblemKind>) {
        let mut object = json!({
            "metadata": {"name": "mesh", "annotations": {ANNOTATION: "false"}},
            "spec": {"nodeName": "node-a", "containers": []},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.7"}, {"ip": "2001:db8::7"}]},
        });
        let mut config =
            NodeConfig { node_name: "node-a".to_owned(), has_netns_cookies: true, ..NodeConfig::default() };
        change(&mut object, &mut config);
        let key = ServiceKey { namespace: "shop".to_owned(), name: "mesh".to_owned() };
        let Parsed { value, problems } = pod(&key, &serde_json::from_value(object).unwrap(), &config);
        assert!(problems.iter().all(|problem| problem.object.to_string() == "Pod shop/mesh"), "{problems:?}");
        let texts = |addresses: Box<[Address]>| addresses.iter().map(ToString::to_string).collect();
        (value.map(texts), problems.into_iter().map(|problem| problem.kind).collect())
    }

    #[test]
    fn a_pod_is_opted_out_by_its_annotation() {
        let both = Some(vec!["10.244.1.7".to_owned(), "2001:db8::7".to_owned()]);
        assert_eq!(parsed(|_, _| {}), (both.clone(), vec![]));
        let annotated = |value: Value| parsed(|pod, _| pod["metadata"]["annotations"][ANNOTATION] = value);
        assert_eq!(annotated(json!("true")), (None, vec![]));
        assert_eq!(annotated(json!("off")), (None, vec![ProblemKind::Value]));
        assert_eq!(annotated(json!("")), (None, vec![ProblemKind::Value]));
        assert_eq!(parsed(|pod, _| pod["metadata"]["annotations"] = json!({})), (None, vec![]));
        assert_eq!(parsed(|pod, _| pod["metadata"]["annotations"] = Value::Null), (None, vec![]));
        let pending = parsed(|pod, _| pod["status"]["phase"] = json!("Pending"));
        assert_eq!(pending, (both, vec![]), "an init container may speak already");
    }

    #[test]
    fn others_are_not() {
        let elsewhere = parsed(|pod, _| pod["spec"]["nodeName"] = json!("node-b"));
        assert_eq!(elsewhere, (None, vec![]));
        assert_eq!(parsed(|pod, _| pod["spec"]["nodeName"] = Value::Null), (None, vec![]), "not scheduled");
        for over in ["Succeeded", "Failed"] {
            assert_eq!(parsed(|pod, _| pod["status"]["phase"] = json!(over)), (None, vec![]));
        }
        let without_address = parsed(|pod, _| pod["status"]["podIPs"] = Value::Null);
        assert_eq!(without_address, (None, vec![]), "it comes yet");
        let odd = parsed(|pod, _| pod["status"]["podIPs"][0]["ip"] = json!("bogus"));
        assert_eq!(odd, (Some(vec!["2001:db8::7".to_owned()]), vec![ProblemKind::Address]));
    }

    #[test]
    fn what_cannot_be_is_said() {
        let host = parsed(|pod, _| pod["spec"]["hostNetwork"] = json!(true));
        assert_eq!(host, (None, vec![ProblemKind::CannotOptOut]));
        let old = parsed(|_, config| config.has_netns_cookies = false);
        assert_eq!(old, (None, vec![ProblemKind::CannotOptOut]));
        // Who does not ask is not told.
        let host = parsed(|pod, config| {
            pod["spec"]["hostNetwork"] = json!(true);
            pod["metadata"]["annotations"] = json!({});
            config.has_netns_cookies = false;
        });
        assert_eq!(host, (None, vec![]));
    }
}
