//! Whatever one object holds, at whatever place: the others arrive, the version advances, it is named once, and it
//! is named no more when it is mended. Through the real watch, as lists and as events.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::fake_api::FakeApi;
use super::tests::{Client, node, service, url};
use crate::model::Problem;
use crate::source::ProblemKind;
use crate::source::object::Kind;

/// How the odd object comes.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Way {
    StreamingList,
    PagedList,
    Event { bookmarks: bool },
}

/// The kinds, each with what the API calls it.
const KINDS: [(Kind, &str); 5] = [
    (Kind::Service, "services"),
    (Kind::EndpointSlice, "endpointslices"),
    (Kind::Node, "nodes"),
    (Kind::ServiceCidr, "servicecidrs"),
    (Kind::Pod, "pods"),
];

/// Objects as a cluster has them, with all that nobody reads.
fn sound(kind: Kind, name: &str) -> Value {
    let fields = json!([{
        "manager": "kube-controller-manager", "operation": "Update", "apiVersion": "v1",
        "time": "2026-01-01T00:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {"f:ports": {}}},
    }]);
    let conditions = json!([{
        "type": "Ready", "status": "True", "reason": "R", "message": "m", "observedGeneration": 1,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }]);
    let mut object = match kind {
        Kind::Service => json!({
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.96.7.7", "clusterIPs": ["10.96.7.7", "fd00:10:96::7"],
                "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack", "selector": {"app": "a"},
                "externalIPs": ["198.51.100.7"], "loadBalancerSourceRanges": ["203.0.113.0/24"],
                "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
                "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local", "healthCheckNodePort": 32007,
                "allocateLoadBalancerNodePorts": true, "publishNotReadyAddresses": false,
                "ports": [
                    {"name": "a", "port": 80, "nodePort": 30080, "protocol": "TCP", "targetPort": "http"},
                    {"name": "b", "port": 53, "nodePort": 30053, "protocol": "UDP", "targetPort": 53},
                ],
            },
            "status": {
                "loadBalancer": {"ingress": [{"ip": "203.0.113.7", "ipMode": "VIP", "ports": [{"port": 80}]}]},
                "conditions": conditions,
            },
        }),
        Kind::EndpointSlice => json!({
            "addressType": "IPv4",
            "ports": [{"name": "a", "port": 8080, "protocol": "TCP", "appProtocol": "http"}],
            "endpoints": [{
                "addresses": ["10.244.1.7"], "nodeName": "node-a", "zone": "z", "deprecatedTopology": {"a": "b"},
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "hints": {"forZones": [{"name": "z"}], "forNodes": [{"name": "node-a"}]},
                "targetRef": {"kind": "Pod", "name": "p", "namespace": "default", "uid": "u"},
            }],
        }),
        Kind::Node => json!({
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"], "taints": [{"key": "k", "effect": "NoSchedule"}]},
            "status": {
                "addresses": [{"type": "InternalIP", "address": "192.0.2.11"}, {"type": "Hostname", "address": "node-a"}],
                "conditions": conditions, "capacity": {"cpu": "2"}, "images": [{"names": ["a"], "sizeBytes": 1}],
            },
        }),
        Kind::ServiceCidr => {
            json!({"spec": {"cidrs": ["10.96.0.0/16"]}, "status": {"conditions": conditions}})
        }
        Kind::Pod => json!({
            "spec": {"nodeName": "node-a", "hostNetwork": false, "containers": [{"name": "c", "image": "i", "resources": {}}]},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.7"}], "conditions": conditions},
        }),
    };
    object["metadata"] = json!({
        "name": name, "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z", "generation": 1, "resourceVersion": "0",
        "labels": {"app": "a", "kubernetes.io/service-name": "s", "topology.kubernetes.io/zone": "z"},
        "annotations": {"kproxy.io/pass-through": "false", "kproxy.io/socket-hooks": "false", "other": "o"},
        "ownerReferences": [{"kind": "Service", "name": "s"}], "managedFields": fields,
    });
    if !matches!(kind, Kind::Node | Kind::ServiceCidr) {
        object["metadata"]["namespace"] = json!("default");
    }
    object
}

/// Fields that are read, and hold one value: nothing else can stand there unnamed.
fn is_read(kind: Kind, field: &str) -> bool {
    let fields: &[&str] = match kind {
        Kind::Service => &[
            "metadata.creationTimestamp",
            "metadata.annotations[kproxy.io/pass-through]",
            "spec.type",
            "spec.clusterIPs[0]",
            "spec.ipFamilies[1]",
            "spec.externalIPs[0]",
            "spec.loadBalancerSourceRanges[0]",
            "spec.sessionAffinity",
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            "spec.externalTrafficPolicy",
            "spec.internalTrafficPolicy",
            "spec.healthCheckNodePort",
            "spec.ports[0].name",
            "spec.ports[0].port",
            "spec.ports[1].nodePort",
            "spec.ports[1].protocol",
            "status.loadBalancer.ingress[0].ip",
            "status.loadBalancer.ingress[0].ipMode",
        ],
        Kind::EndpointSlice => &[
            "metadata.labels[kubernetes.io/service-name]",
            "addressType",
            "ports[0].name",
            "ports[0].port",
            "ports[0].protocol",
            "endpoints[0].addresses[0]",
            "endpoints[0].nodeName",
            "endpoints[0].conditions.ready",
            "endpoints[0].conditions.serving",
            "endpoints[0].conditions.terminating",
            "endpoints[0].hints.forZones[0].name",
            "endpoints[0].hints.forNodes[0].name",
        ],
        Kind::Node => &[
            "metadata.name",
            "metadata.labels[topology.kubernetes.io/zone]",
            "status.addresses[0].type",
            "status.addresses[0].address",
        ],
        Kind::ServiceCidr => &["metadata.name", "spec.cidrs[0]"],
        Kind::Pod => &[
            "metadata.namespace",
            "metadata.annotations[kproxy.io/socket-hooks]",
            "spec.nodeName",
            "status.phase",
            "status.podIPs[0].ip",
        ],
    };
    fields.contains(&field)
}

/// Every place of a tree: as a JSON pointer, and as problems name it.
fn places(value: &Value, pointer: String, field: String, found: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let pointer = format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1"));
                let is_map = field == "metadata.labels" || field == "metadata.annotations";
                let field = match field.as_str() {
                    "" => key.clone(),
                    map if is_map => format!("{map}[{key}]"),
                    field => format!("{field}.{key}"),
                };
                places(value, pointer, field, found);
            }
        }
        Value::Array(items) => {
            for (at, value) in items.iter().enumerate() {
                places(value, format!("{pointer}/{at}"), format!("{field}[{at}]"), found);
            }
        }
        _ => {}
    }
    found.push((pointer, field));
}

/// What stands in the place: any text that is JSON by its grammar.
fn absurd() -> impl Strategy<Value = String> {
    let deep = |open: &str, close: &str, depth: usize| open.repeat(depth) + "0" + &close.repeat(depth);
    select(vec![
        "null".to_owned(),
        "true".to_owned(),
        "0".to_owned(),
        "-1".to_owned(),
        "70000".to_owned(),
        "0.5".to_owned(),
        "1e999".to_owned(),
        "123456789012345678901234567890".to_owned(),
        r#""""#.to_owned(),
        r#""text""#.to_owned(),
        r#""\ud800""#.to_owned(),
        r#""\u0000\u202e""#.to_owned(),
        format!("\"{}\"", "é".repeat(50_000)),
        "[]".to_owned(),
        "{}".to_owned(),
        "[null]".to_owned(),
        r#"[[],{},null,"",0]"#.to_owned(),
        r#"{"":null,"a":{"a":[]},"name":7}"#.to_owned(),
        r#"{"name":"a","name":null,"name":[]}"#.to_owned(),
        deep("[", "]", 20_000),
        deep(r#"{"a":"#, "}", 20_000),
        deep(r#"[{"spec":"#, "}]", 5_000),
    ])
}

/// The text of `object` with `absurd` at a place.
fn with(object: &Value, version: String, pointer: &str, absurd: &str) -> String {
    const MARK: &str = "here is the odd one";
    let mut object = object.clone();
    object["metadata"]["resourceVersion"] = json!(version);
    if let Some(place) = object.pointer_mut(pointer) {
        *place = json!(MARK);
    }
    object.to_string().replace(&format!("\"{MARK}\""), absurd)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_odd_object_harms_no_other(
        (kind, plural) in select(KINDS.to_vec()),
        way in select(vec![
            Way::StreamingList,
            Way::PagedList,
            Way::Event { bookmarks: true },
            Way::Event { bookmarks: false },
        ]),
        place in any::<Index>(),
        absurd in absurd(),
    ) {
        let name = if kind == Kind::Node { "node-a" } else { "odd" };
        let object = sound(kind, name);
        let mut all = Vec::new();
        places(&object, String::new(), String::new(), &mut all);
        let (pointer, field) = &all[place.index(all.len())];
        // An API server keeps objects by these: they may be unreadable, but are never another's.
        let is_identity = field == "metadata.name" || field == "metadata.namespace";
        prop_assume!(!(is_identity && absurd.starts_with('"')));
        let names_it = ["", "metadata", "metadata.name"].contains(&field.as_str());
        // Without a Node the first lists wait for half a minute: told elsewhere.
        let hides_node = kind == Kind::Node && (names_it || absurd.contains("e999") || absurd.contains("ud800"));
        prop_assume!(!hides_node || matches!(way, Way::Event { .. }));

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(history(kind, plural, way, &object, pointer, field, &absurd))?;
    }
}

fn problems_of<'a>(client: &'a Client, name: &str) -> impl Iterator<Item = &'a Problem> {
    client.model.problems().filter(move |problem| problem.object.name == name)
}

async fn history(
    kind: Kind,
    plural: &str,
    way: Way,
    object: &Value,
    pointer: &str,
    field: &str,
    absurd: &str,
) -> Result<(), TestCaseError> {
    let name = object["metadata"]["name"].as_str().expect("a name");
    let what = format!("{plural} {way:?} {field} {absurd:.80}");
    let api = FakeApi::start().await;
    api.state().no_streaming = way == Way::PagedList;
    api.state().no_bookmarks = way == Way::Event { bookmarks: false };
    api.put("nodes", node("node-a"));
    api.put("services", service("first"));
    let odd = || api.put_text(plural, name, |version| with(object, version, pointer, absurd));
    if !matches!(way, Way::Event { .. }) {
        odd();
    }
    api.put("services", service("second"));
    let mut client = Client::of(&[url(&api)]).await;
    client.until(&format!("the first lists: {what}"), |client| client.synced).await;
    if matches!(way, Way::Event { .. }) {
        odd();
    }
    // Others of the kind, and of another, come after it.
    api.put("services", service("third"));
    if !matches!(kind, Kind::Service | Kind::Node) {
        api.put(plural, sound(kind, "after"));
    }
    let arrived = |client: &Client| {
        let services = client.of_kind(Kind::Service);
        let after = matches!(kind, Kind::Service | Kind::Node) || client.of_kind(kind).contains_key("after");
        ["first", "second", "third"].iter().all(|name| services.contains_key(*name)) && after
    };
    client.until(&format!("the others: {what}"), arrived).await;
    client.wait(5).await;

    // It is named, where it is read; and never is anything else, nor the same twice.
    let by_source: Vec<_> = client.problems.iter().cloned().collect();
    prop_assert!(by_source.len() <= 1, "{what}: {by_source:?}");
    prop_assert!(by_source.iter().all(|problem| problem.kind == ProblemKind::InvalidObject), "{by_source:?}");
    let fields: BTreeSet<_> = problems_of(&client, name).map(|problem| problem.field.clone()).collect();
    let is_about = |named: &String| {
        named.starts_with(field) || field.starts_with(named.as_str())
            // Where all of it is gone, what has to be there is missing.
            || (kind == Kind::Service && ["", "spec"].contains(&field))
            || (kind == Kind::Pod && field == "spec.hostNetwork")
    };
    prop_assert!(fields.iter().all(is_about), "{what}: {fields:?}");
    let is_named = !by_source.is_empty() || !fields.is_empty();
    if is_read(kind, field) && absurd.starts_with(['[', '{']) {
        prop_assert!(is_named, "{what} is not named");
    }
    let announced: BTreeSet<_> = client.announced.iter().collect();
    prop_assert_eq!(announced.len(), client.announced.len(), "{}: {:?}", what, client.announced);

    // The version has advanced: a watch that ends goes on behind the odd one. Its own version may be what is odd, then
    // the next object or bookmark brings one.
    let is_last = kind == Kind::Node && way == (Way::Event { bookmarks: false });
    if !is_last || !(field.is_empty() || field.starts_with("metadata")) {
        let version = api.names(plural).values().filter_map(|version| version.parse::<u64>().ok()).max();
        let before = api.state().requests.len();
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            api.end_watches();
            client.wait(5).await;
            let requests = api.state().requests[before..].to_vec();
            let mut of_kind = requests.iter().filter(|request| request.contains(&format!("/{plural}?")));
            let goes_on = |request: &String| {
                let from = request.split("resourceVersion=").nth(1).and_then(|rest| rest.split('&').next());
                from.and_then(|from| from.parse().ok()) >= version
            };
            if of_kind.clone().any(goes_on) {
                let lists = of_kind
                    .find(|request| ["sendInitial", "limit="].iter().any(|list| request.contains(list)));
                prop_assert_eq!(lists, None, "{}", what);
                break;
            }
            prop_assert!(Instant::now() < deadline, "{what}: the watch does not go on: {requests:?}");
        }
    }

    // Mended, it is there like any other, and named no more.
    api.put(plural, object.clone());
    let version = api.names(plural)[name].clone();
    let key = if kind == Kind::Node { String::new() } else { name.to_owned() };
    client
        .until(&format!("the mended one: {what}"), |client| client.of_kind(kind).get(&key) == Some(&version))
        .await;
    // What has no name is known to be gone by a list only.
    api.compact();
    api.end_watches();
    client
        .until(&format!("the end of the problems: {what}"), |client| {
            client.problems.iter().next().is_none() && problems_of(client, name).next().is_none()
        })
        .await;
    prop_assert!(arrived(&client), "{what}");
    Ok(())
}
