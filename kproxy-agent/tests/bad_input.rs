//! Bad input: whatever an object holds, nothing panics, what is good in it is served, every entry that is skipped is
//! named, and no other object is the worse for it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    LoadBalancerIngress, LoadBalancerStatus, Service, ServicePort, ServiceSpec, ServiceStatus,
};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kproxy::model::{Change, Model, NodeConfig, Problem, parse};
use kproxy::wanted::ServiceKey;
use kproxy_common::{Address, Cidr};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};

fn runs(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// An entry of a list: good, with what should be read, or bad.
type Entry<T, G> = (T, Option<G>);

proptest! {
    #![proptest_config(runs(10_000))]

    /// Of every list of a Service what is good is read, in its order, and what is bad is named by its place.
    #[test]
    fn services_keep_what_is_good_and_name_what_is_not(
        external_ips in entries(ip_entry(0), 24),
        ingress in entries(ip_entry(1), 24),
        ranges in entries(range_entry(), 48),
        ports in entries(port_entry(), 24),
        words in vec(option::of(bad_text()), 4),
    ) {
        let [internal, external, affinity, kind] = words.try_into().expect("four");
        let is_odd = |word: &Option<String>, known: &[&str]| {
            word.as_deref().is_some_and(|word| !word.is_empty() && !known.contains(&word))
        };
        let odd = [
            ("spec.internalTrafficPolicy", is_odd(&internal, &["Cluster", "Local"])),
            ("spec.externalTrafficPolicy", is_odd(&external, &["Cluster", "Local"])),
            ("spec.sessionAffinity", is_odd(&affinity, &["None", "ClientIP"])),
            ("spec.type", is_odd(&kind, &["ClusterIP", "NodePort", "LoadBalancer"])),
        ];
        prop_assume!(kind.as_deref() != Some("ExternalName"));
        let texts = |entries: &[Entry<String, Address>]| entries.iter().map(|(text, _)| text.clone()).collect();
        let to_ingress = |(text, _): &Entry<String, Address>| {
            LoadBalancerIngress { ip: Some(text.clone()), ..LoadBalancerIngress::default() }
        };
        let status = LoadBalancerStatus { ingress: Some(ingress.iter().map(to_ingress).collect()) };
        let service = Service {
            spec: Some(ServiceSpec {
                cluster_ips: Some(vec!["10.96.0.1".to_owned(), "fd00:10:96::1".to_owned()]),
                external_ips: Some(texts(&external_ips)),
                load_balancer_source_ranges: Some(ranges.iter().map(|(text, _)| text.clone()).collect()),
                ports: Some(ports.iter().map(|(port, _)| port.clone()).collect()),
                internal_traffic_policy: internal,
                external_traffic_policy: external,
                session_affinity: affinity,
                type_: kind,
                ..ServiceSpec::default()
            }),
            status: Some(ServiceStatus { load_balancer: Some(status), ..ServiceStatus::default() }),
            ..Service::default()
        };
        let parsed = parse::service(&Arc::new(key("s")), &lean(&service), &[]);
        let value = &parsed.value;
        prop_assert_eq!(value.external_ips.to_vec(), good(&external_ips));
        prop_assert_eq!(value.load_balancers.iter().map(|lb| lb.address).collect::<Vec<_>>(), good(&ingress));
        let by_place = |ranges: Vec<Cidr>| -> BTreeSet<_> {
            ranges.into_iter().map(|range| (range.address(), range.prefix_length())).collect()
        };
        prop_assert_eq!(by_place(value.source_ranges.to_vec()), by_place(good(&ranges)));
        let read: Vec<_> = value.ports.iter().map(|port| (port.name.to_string(), port.port)).collect();
        prop_assert_eq!(read, good(&ports));
        let mut named: BTreeSet<String> = odd.iter().filter(|(_, is)| *is).map(|(f, _)| (*f).to_owned()).collect();
        named.extend(bad(&external_ips, |at| format!("spec.externalIPs[{at}]")));
        named.extend(bad(&ingress, |at| format!("status.loadBalancer.ingress[{at}].ip")));
        named.extend(bad(&ranges, |at| format!("spec.loadBalancerSourceRanges[{at}]")));
        named.extend(bad(&ports, |at| format!("spec.ports[{at}]")));
        prop_assert_eq!(fields(&parsed.problems), named);
    }

    /// So it is with EndpointSlices.
    #[test]
    fn slices_keep_what_is_good_and_name_what_is_not(
        endpoints in entries(ip_entry(2), 64),
        ports in entries(slice_port_entry(), 8),
    ) {
        let to_endpoint = |(text, _): &Entry<String, Address>| {
            let addresses = if text.is_empty() { Vec::new() } else { vec![text.clone(), "never read".to_owned()] };
            Endpoint { addresses, ..Endpoint::default() }
        };
        let label = ("kubernetes.io/service-name".to_owned(), "s".to_owned());
        let slice = EndpointSlice {
            address_type: "IPv4".to_owned(),
            endpoints: Some(endpoints.iter().map(to_endpoint).collect()),
            metadata: ObjectMeta { labels: Some([label].into()), ..ObjectMeta::default() },
            ports: Some(ports.iter().map(|(port, _)| port.clone()).collect()),
        };
        let parsed = parse::endpoint_slice(&key("e"), &lean(&slice));
        let Some(value) = parsed.value else { return Err(TestCaseError::fail("the slice is good")) };
        prop_assert_eq!(value.endpoints.iter().map(|e| e.address).collect::<Vec<_>>(), good(&endpoints));
        prop_assert_eq!(value.ports.iter().map(|port| port.number).collect::<Vec<_>>(), good(&ports));
        let mut named: BTreeSet<String> = bad(&endpoints, |at| format!("endpoints[{at}]")).collect();
        // What has no number is no error: Kubernetes says that it is ignored.
        let is_said = |port: &EndpointPort| port.port.is_some_and(|number| number != 0);
        let said = ports.iter().enumerate().filter(|(_, (port, read))| read.is_none() && is_said(port));
        named.extend(said.map(|(at, _)| format!("ports[{at}]")));
        prop_assert_eq!(fields(&parsed.problems), named);
    }

    /// Objects as a server could send them that knows other rules: any field of any type, or none. What cannot be
    /// read at all the source names; the rest goes through the model, and the sound Service stays as it is.
    #[test]
    fn any_json_leaves_the_sound_service_alone(
        mutations in vec((select(vec!["Service", "EndpointSlice", "Node"]), vec((any::<Index>(), any_json()), 1..4)), 1..6),
    ) {
        let mut model = Model::new(NodeConfig { node_name: "node-a".to_owned(), ..NodeConfig::default() });
        model.apply(read(Change::Service, "sound", sound("Service", "sound", "10.96.0.200")));
        model.apply(read(Change::EndpointSlice, "sound-1", sound("EndpointSlice", "sound", "10.244.0.200")));
        let wanted = |model: &Model| model.services().find(|service| service.key.name == "sound").cloned();
        model.recompute();
        let before = wanted(&model);
        prop_assert!(before.is_some());
        for (number, (kind, places)) in mutations.into_iter().enumerate() {
            let name = format!("odd-{number}");
            let mut object = sound(kind, &name, "10.96.0.7");
            for (place, value) in places {
                put(&mut object, &place, value);
            }
            let change = match kind {
                "Service" => serde_json::from_value(object).ok().map(|o| Change::Service(key(&name), Some(o))),
                "EndpointSlice" => {
                    serde_json::from_value(object).ok().map(|o| Change::EndpointSlice(key(&name), Some(o)))
                }
                _ => serde_json::from_value(object).ok().map(|o| Change::Node(Some(o))),
            };
            if let Some(change) = change {
                model.apply(change);
                model.recompute();
            }
        }
        prop_assert_eq!(wanted(&model), before);
    }
}

/// Ten thousand source ranges, of which every third is bad: all that are good bind, and all that are bad are named.
#[test]
fn ten_thousand_source_ranges() {
    let text = |n: u32| match n % 3 {
        0 => format!("\u{1f980}{n}/24"),
        _ => format!("{}/32", Ipv4Addr::from(0x0b00_0000 + n)),
    };
    let service = Service {
        spec: Some(ServiceSpec {
            cluster_ips: Some(vec!["10.96.0.1".to_owned()]),
            load_balancer_source_ranges: Some((0..10_000).map(text).collect()),
            ports: Some(vec![ServicePort { port: 80, ..ServicePort::default() }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    };
    let parsed = parse::service(&Arc::new(key("s")), &lean(&service), &[]);
    assert_eq!(parsed.value.source_ranges.len(), 6_666);
    assert_eq!(fields(&parsed.problems).len(), 3_334);
    assert!(parsed.problems.iter().all(|problem| problem.message.len() < 300), "messages stay short");
}

/// The object as kproxy reads it.
fn lean<T: serde::de::DeserializeOwned>(object: impl serde::Serialize) -> Box<T> {
    let tree = serde_json::to_value(object).expect("it has a form");
    Box::new(serde_json::from_value(tree).expect("it is an object"))
}

fn key(name: &str) -> ServiceKey {
    ServiceKey { namespace: "n".to_owned(), name: name.to_owned() }
}

fn read<T: serde::de::DeserializeOwned>(
    change: impl Fn(ServiceKey, Option<Box<T>>) -> Change,
    name: &str,
    object: Value,
) -> Change {
    change(key(name), Some(Box::new(serde_json::from_value(object).expect("it is sound"))))
}

fn sound(kind: &str, name: &str, ip: &str) -> Value {
    match kind {
        "Service" => json!({
            "metadata": {
                "name": name, "labels": {"a": "b"}, "annotations": {"kproxy.io/pass-through": "false"},
                // The older keeps what both claim.
                "creationTimestamp": if name == "sound" { "2020-01-01T00:00:00Z" } else { "2026-01-01T00:00:00Z" },
            },
            "spec": {
                "type": "LoadBalancer", "clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"],
                "externalIPs": ["198.51.100.7"], "loadBalancerSourceRanges": ["203.0.113.0/24"],
                "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
                "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Cluster", "healthCheckNodePort": 32000,
                "ports": [{"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.7", "ipMode": "VIP"}]}},
        }),
        "EndpointSlice" => json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{
                "addresses": [ip], "nodeName": "node-a",
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "hints": {"forZones": [{"name": "z1"}], "forNodes": [{"name": "node-a"}]},
            }],
        }),
        _ => json!({
            "metadata": {"name": "node-a", "labels": {"a": "b"}},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.11"}]},
        }),
    }
}

/// Any value where another stands, as deep as `place` says; never the namespace and name that the key has.
fn put(object: &mut Value, place: &Index, value: Value) {
    fn walk<'a>(value: &'a mut Value, left: &mut usize) -> Option<&'a mut Value> {
        if *left == 0 {
            return Some(value);
        }
        *left -= 1;
        match value {
            Value::Object(fields) => fields.values_mut().find_map(|field| walk(field, left)),
            Value::Array(items) => items.iter_mut().find_map(|item| walk(item, left)),
            _ => None,
        }
    }
    let mut left = place.index(48);
    if let Some(place) = walk(object, &mut left) {
        *place = value;
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        select(vec![
            0_i64,
            1,
            -1,
            65_535,
            65_536,
            70_000,
            i64::from(i32::MAX),
            i64::from(i32::MIN),
            i64::MAX
        ])
        .prop_map(Value::from),
        bad_text().prop_map(Value::from),
        select(vec!["10.96.0.200", "Local", "UDP", "None", "IPv6", "ExternalName", "http"])
            .prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            (bad_text(), inner).prop_map(|(name, value)| json!({name: value})),
        ]
    })
}

/// Up to `most` entries, seldom many.
fn entries<T: std::fmt::Debug + Clone, G: std::fmt::Debug + Clone>(
    entry: impl Strategy<Value = Entry<T, G>>,
    most: usize,
) -> impl Strategy<Value = Vec<Entry<T, G>>>
where
    Vec<Entry<T, G>>: Unique,
{
    vec(entry, 0..most).prop_map(Unique::unique)
}

/// The same good entry twice counts once, and says nothing: that is another rule's.
trait Unique {
    fn unique(self) -> Self;
}

impl Unique for Vec<Entry<String, Address>> {
    fn unique(mut self) -> Self {
        let mut seen = BTreeSet::new();
        self.retain(|(_, good)| good.is_none_or(|good| seen.insert(good)));
        self
    }
}

impl Unique for Vec<Entry<String, Cidr>> {
    fn unique(self) -> Self {
        self
    }
}

impl Unique for Vec<Entry<ServicePort, (String, u16)>> {
    fn unique(self) -> Self {
        // Each has a name of its own.
        let named = self.into_iter().enumerate().map(|(at, (port, good))| {
            let name = format!("p{at}");
            let port = ServicePort { name: Some(name.clone()), ..port };
            (port, good.map(|(_, number)| (name, number)))
        });
        named.collect()
    }
}

impl Unique for Vec<Entry<EndpointPort, u16>> {
    fn unique(self) -> Self {
        self
    }
}

/// `net` keeps the lists of one object apart.
fn ip_entry(net: u8) -> impl Strategy<Value = Entry<String, Address>> {
    let good = any::<u8>().prop_map(move |last| {
        let ip = Ipv4Addr::new(198, 51, 100 + net, last);
        (ip.to_string(), Some(Address::from(IpAddr::V4(ip))))
    });
    let bad = prop_oneof![
        bad_text(),
        select(vec![
            "10.0.0.256",
            "10.0.0",
            "10.0.0.0/8",
            " 10.0.0.1",
            "0.0.0.0",
            "127.0.0.1",
            "255.255.255.255",
            "224.0.0.251",
            "::",
            "::1",
            "ff02::1",
            "fe80::1%eth0",
            "[10.0.0.1]",
            "10.0.0.1:80",
        ])
        .prop_map(str::to_owned),
    ];
    // Without any text there is nothing to be named: a host name may stand beside it.
    let bad = bad.prop_filter("it is empty", |text| !text.is_empty());
    prop_oneof![2 => good, 1 => bad.prop_map(|text| (text, None))]
}

fn range_entry() -> impl Strategy<Value = Entry<String, Cidr>> {
    let good = (any::<[u8; 4]>(), 1_u32..=32).prop_map(|(octets, length)| {
        let text = format!(" {}/{length}\t", Ipv4Addr::from(octets));
        let masked = u32::from_be_bytes(octets) & (u32::MAX << (32 - length));
        (text, Some(Cidr::new(Address::from(IpAddr::V4(Ipv4Addr::from(masked))), 96 + length)))
    });
    let bad = prop_oneof![
        bad_text(),
        select(vec![
            "10.0.0.0",
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "10.0.0.0/+8",
            "10.0.0.0/",
            "/8",
            "::/129",
            "10/8",
            ""
        ])
        .prop_map(str::to_owned),
    ];
    prop_oneof![2 => good, 1 => bad.prop_map(|text| (text, None))]
}

fn port_entry() -> impl Strategy<Value = Entry<ServicePort, (String, u16)>> {
    let good = any::<u16>().prop_filter("0 is no port", |port| *port > 0);
    let good = good.prop_map(|number| {
        let port = ServicePort { port: i32::from(number), ..ServicePort::default() };
        (port, Some((String::new(), number)))
    });
    let number = select(vec![0, -1, 65_536, 70_000, i32::MIN, i32::MAX]);
    let by_number = number.prop_map(|port| (ServicePort { port, ..ServicePort::default() }, None));
    let odd = bad_text()
        .prop_filter("it is a protocol", |text| !["", "TCP", "UDP", "SCTP"].contains(&text.as_str()));
    let by_protocol =
        odd.prop_map(|text| (ServicePort { port: 80, protocol: Some(text), ..ServicePort::default() }, None));
    prop_oneof![3 => good, 1 => by_number, 1 => by_protocol]
}

fn slice_port_entry() -> impl Strategy<Value = Entry<EndpointPort, u16>> {
    let port = |name: Option<&str>, number: Option<i32>| EndpointPort {
        name: name.map(str::to_owned),
        port: number,
        ..EndpointPort::default()
    };
    let good = any::<u16>().prop_filter("0 is no port", |port| *port > 0);
    let good = good.prop_map(move |number| (port(Some("http"), Some(i32::from(number))), Some(number)));
    let good = prop_oneof![2 => good, 1 => Just((port(None, Some(80)), Some(80)))];
    let silent = select(vec![port(None, None), port(Some(""), None), port(Some(""), Some(0))]);
    let bad =
        select(vec![port(Some(""), Some(-1)), port(Some("a"), Some(70_000)), port(Some(""), Some(i32::MIN))]);
    prop_oneof![3 => good, 1 => prop_oneof![silent, bad].prop_map(|port| (port, None))]
}

/// Text that is no address, no range and no word that is known; in any script, and sometimes long.
fn bad_text() -> impl Strategy<Value = String> {
    let text = prop_oneof![
        4 => any::<String>(),
        2 => "[0-9a-fx.:/ -]{0,24}",
        1 => select(vec!["\u{0}", "\u{202e}txt", "１０.0.0.1", "10.0.0.1\n", "é".repeat(5_000).leak(), "\u{feff}"])
            .prop_map(str::to_owned),
    ];
    text.prop_filter("it is right by chance", |text| {
        parse::ip(text).is_none() && parse::cidr(text.trim()).is_none()
    })
}

fn good<T, G: Clone>(entries: &[Entry<T, G>]) -> Vec<G> {
    entries.iter().filter_map(|(_, good)| good.clone()).collect()
}

fn bad<T, G>(entries: &[Entry<T, G>], field: impl Fn(usize) -> String) -> impl Iterator<Item = String> {
    entries.iter().enumerate().filter(|(_, (_, good))| good.is_none()).map(move |(at, _)| field(at))
}

/// What is named, without what follows a place in a list of objects (`spec.ports[1].port`).
fn fields(problems: &[Problem]) -> BTreeSet<String> {
    let mut by_field: BTreeMap<String, usize> = BTreeMap::new();
    for problem in problems {
        let field = &problem.field;
        let whole = ["spec.ports[", "ports[", "endpoints["].iter().any(|list| field.starts_with(list));
        let end = if whole { field.find(']').map_or(field.len(), |at| at + 1) } else { field.len() };
        *by_field.entry(field[..end].to_owned()).or_default() += 1;
    }
    by_field.into_keys().collect()
}
