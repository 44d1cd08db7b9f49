//! Random objects. The tame ones come from few names and addresses, so that they meet; some of their values
//! are broken. The wild ones are anything. Large strategies are boxed: proptest keeps them on the stack.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{
    ClientIPConfig, LoadBalancerIngress, LoadBalancerStatus, Node, NodeAddress, NodeStatus, Pod, PodIP,
    PodSpec, PodStatus, Service, ServicePort, ServiceSpec, ServiceStatus, SessionAffinityConfig,
};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::api::networking::v1::{ServiceCIDR, ServiceCIDRSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kproxy::model::{
    Change, LocalAddresses, NodeConfig, NodePortAddresses, PassThroughConfig, PassThroughScope, parse,
};
use kproxy::wanted::ServiceKey;
use kproxy_common::{Address, FrontendKey, Protocol};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

pub const NODE: &str = "node-a";
pub const EXTRA_ANNOTATION: &str = "example.com/pass-through";

/// Something that happens to one object.
#[derive(Clone, Debug)]
pub enum Event {
    Service(ServiceKey, Option<Box<Service>>),
    Slice(ServiceKey, Option<EndpointSlice>),
    Node(Option<Box<Node>>),
    ServiceCidr(String, Option<ServiceCIDR>),
    Pod(ServiceKey, Option<Box<Pod>>),
    Local(LocalAddresses),
    Listeners(Option<BTreeSet<FrontendKey>>),
}

/// All objects that there are.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub services: BTreeMap<ServiceKey, Service>,
    pub slices: BTreeMap<ServiceKey, EndpointSlice>,
    pub node: Option<Node>,
    pub service_cidrs: BTreeMap<String, ServiceCIDR>,
    pub pods: BTreeMap<ServiceKey, Pod>,
    local: Option<LocalAddresses>,
    listeners: Option<Option<BTreeSet<FrontendKey>>>,
}

impl Event {
    pub fn change(&self) -> Change {
        match self.clone() {
            Self::Service(key, service) => Change::Service(key, service.map(lean)),
            Self::Slice(key, slice) => Change::EndpointSlice(key, slice.map(lean)),
            Self::Node(node) => Change::Node(node.map(lean)),
            Self::ServiceCidr(name, object) => Change::ServiceCidr(name, object.map(lean)),
            Self::Pod(key, pod) => Change::Pod(key, pod.map(lean)),
            Self::Local(addresses) => Change::LocalAddresses(addresses),
            Self::Listeners(listeners) => Change::Listeners(listeners),
        }
    }
}

/// The object as kproxy reads it.
fn lean<T: serde::de::DeserializeOwned>(object: impl serde::Serialize) -> Box<T> {
    let tree = serde_json::to_value(object).expect("it has a form");
    Box::new(serde_json::from_value(tree).expect("it is an object"))
}

impl World {
    pub fn apply(&mut self, event: Event) {
        fn put<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) {
            match value {
                Some(value) => map.insert(key, value),
                None => map.remove(&key),
            };
        }
        match event {
            Event::Service(key, service) => put(&mut self.services, key, service.map(|service| *service)),
            Event::Slice(key, slice) => put(&mut self.slices, key, slice),
            Event::ServiceCidr(name, object) => put(&mut self.service_cidrs, name, object),
            Event::Pod(key, pod) => put(&mut self.pods, key, pod.map(|pod| *pod)),
            // Another node's object is none of our business.
            Event::Node(Some(node)) if node.metadata.name.as_deref() != Some(NODE) => {}
            Event::Node(node) => self.node = node.map(|node| *node),
            Event::Local(addresses) => self.local = Some(addresses),
            Event::Listeners(listeners) => self.listeners = Some(listeners),
        }
    }

    /// The addresses on this node's interfaces.
    pub fn local(&self, config: &NodeConfig) -> BTreeSet<Address> {
        self.local.as_ref().unwrap_or(&config.local_addresses).iter().copied().collect()
    }

    /// Whether a process of this node listens there, or may.
    pub fn is_listened_on(&self, key: &FrontendKey) -> bool {
        match &self.listeners {
            None => false,
            Some(listeners) => listeners.as_ref().is_none_or(|keys| keys.contains(key)),
        }
    }

    /// Changes that make this world out of nothing, in an order that `seed` says.
    pub fn changes(&self, seed: usize) -> Vec<Change> {
        let services = self
            .services
            .iter()
            .map(|(key, service)| Event::Service(key.clone(), Some(Box::new(service.clone()))));
        let slices = self.slices.iter().map(|(key, slice)| Event::Slice(key.clone(), Some(slice.clone())));
        let cidrs =
            self.service_cidrs.iter().map(|(name, o)| Event::ServiceCidr(name.clone(), Some(o.clone())));
        let node = self.node.iter().map(|node| Event::Node(Some(Box::new(node.clone()))));
        let local = self.local.iter().map(|addresses| Event::Local(addresses.clone()));
        let listeners = self.listeners.iter().map(|listeners| Event::Listeners(listeners.clone()));
        let local = local.chain(listeners);
        let pods = self.pods.iter().map(|(key, pod)| Event::Pod(key.clone(), Some(Box::new(pod.clone()))));
        let mut left: Vec<_> =
            services.chain(slices).chain(cidrs).chain(node).chain(pods).chain(local).collect();
        let mut changes = Vec::new();
        let mut seed = seed;
        while !left.is_empty() {
            changes.push(left.remove(seed % left.len()).change());
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).rotate_left(17).wrapping_add(1);
        }
        changes
    }
}

pub fn config() -> impl Strategy<Value = NodeConfig> {
    let scope = select(vec![PassThroughScope::All, PassThroughScope::Pods, PassThroughScope::Nodes]);
    let node_ports = select(vec![
        NodePortAddresses::Primary,
        NodePortAddresses::Cidrs(vec![parse::cidr("10.0.0.0/30").unwrap()]),
    ]);
    (local(), local(), any::<[bool; 7]>(), scope, node_ports).prop_map(
        |(own, local, flags, scope, node_ports)| {
            let [
                default,
                masquerade_all,
                disable_external_ips,
                has_cluster_cidr,
                has_own,
                has_service_cidr,
                has_netns_cookies,
            ] = flags;
            let cidrs = |is: bool, text| is.then(|| parse::cidr(text).unwrap()).into_iter().collect();
            NodeConfig {
                node_name: NODE.to_owned(),
                node_addresses: if has_own { own.iter().copied().collect() } else { Vec::new() },
                cluster_cidrs: cidrs(has_cluster_cidr, "10.244.0.0/16"),
                service_cidrs: cidrs(has_service_cidr, "10.96.0.0/16"),
                nodeport_addresses: node_ports,
                masquerade_all,
                disable_external_ips,
                pass_through: PassThroughConfig {
                    default,
                    scope,
                    extra_annotations: vec![EXTRA_ANNOTATION.to_owned()],
                },
                has_netns_cookies,
                local_addresses: local,
            }
        },
    )
}

pub fn event() -> BoxedStrategy<Event> {
    prop_oneof![
        4 => (service_key(), option::weighted(0.8, service().prop_map(Box::new))).prop_map(|(key, s)| Event::Service(key, s)),
        4 => (slice_key(), option::weighted(0.8, slice())).prop_map(|(key, s)| Event::Slice(key, s)),
        2 => option::weighted(0.9, node().prop_map(Box::new)).prop_map(Event::Node),
        1 => (select(vec!["one", "two"]), option::weighted(0.8, service_cidr()))
            .prop_map(|(name, object)| Event::ServiceCidr(name.to_owned(), object)),
        1 => (select(vec!["p0", "p1"]), option::weighted(0.8, pod().prop_map(Box::new)))
            .prop_map(|(name, pod)| Event::Pod(ServiceKey { namespace: "n".to_owned(), name: name.to_owned() }, pod)),
        1 => local().prop_map(Event::Local),
        1 => option::weighted(0.8, listeners()).prop_map(Event::Listeners),
    ]
    .boxed()
}

pub fn wild_event() -> BoxedStrategy<Event> {
    prop_oneof![
        (service_key(), wild_service())
            .prop_map(|(key, service)| Event::Service(key, Some(Box::new(service)))),
        (slice_key(), wild_slice()).prop_map(|(key, slice)| Event::Slice(key, Some(slice))),
    ]
    .boxed()
}

/// A Service and slices that give it `count` ready endpoints.
pub fn service_with_endpoints(count: u32) -> Vec<Event> {
    let key = |name: &str| ServiceKey { namespace: "n".to_owned(), name: name.to_owned() };
    let port = ServicePort { port: 80, ..ServicePort::default() };
    let spec = ServiceSpec {
        cluster_ips: Some(vec!["10.96.0.1".to_owned()]),
        ports: Some(vec![port]),
        ..ServiceSpec::default()
    };
    let service = Service { spec: Some(spec), ..Service::default() };
    let mut events = vec![Event::Service(key("s0"), Some(Box::new(service)))];
    let addresses: Vec<_> =
        (0..count).map(|at| std::net::Ipv4Addr::from(0x0a40_0000 + at).to_string()).collect();
    for (at, addresses) in addresses.chunks(1_000).enumerate() {
        let endpoint =
            |address: &String| Endpoint { addresses: vec![address.clone()], ..Endpoint::default() };
        let label = ("kubernetes.io/service-name".to_owned(), "s0".to_owned());
        let slice = EndpointSlice {
            address_type: "IPv4".to_owned(),
            endpoints: Some(addresses.iter().map(endpoint).collect()),
            metadata: ObjectMeta { labels: Some([label].into()), ..ObjectMeta::default() },
            ports: Some(vec![EndpointPort {
                name: Some(String::new()),
                port: Some(8080),
                ..EndpointPort::default()
            }]),
        };
        events.push(Event::Slice(key(&format!("slice-{at}")), Some(slice)));
    }
    events
}

fn one_of(texts: &'static [&'static str]) -> impl Strategy<Value = String> {
    select(texts).prop_map(str::to_owned)
}

fn maybe(texts: &'static [&'static str]) -> impl Strategy<Value = Option<String>> {
    option::of(one_of(texts))
}

fn service_key() -> impl Strategy<Value = ServiceKey> {
    one_of(&["s0", "s0", "s1", "s2"]).prop_map(|name| ServiceKey { namespace: "n".to_owned(), name })
}

fn slice_key() -> impl Strategy<Value = ServiceKey> {
    one_of(&["e0", "e1", "e2", "e3", "e4"]).prop_map(|name| ServiceKey { namespace: "n".to_owned(), name })
}

fn service_ip() -> impl Strategy<Value = String> {
    prop_oneof![
        40 => one_of(&["10.96.0.1", "10.96.0.2", "10.96.0.3", "fd00:10:96::1", "fd00:10:96::2", "10.0.0.1"]),
        1 => one_of(&["", "bogus", "0.0.0.0", "::1", "None", "::ffff:10.96.0.1"]),
    ]
}

fn local() -> impl Strategy<Value = LocalAddresses> {
    let pool = ["10.0.0.1", "10.0.0.9", "127.0.0.1", "10.96.0.1", "2001:db8::1", "::1", "203.0.113.1"];
    let interface = select(vec!["eth0", "eth0", "eth0", "kube-ipvs0"]);
    btree_map(select(pool.to_vec()), interface, 0..4)
        .prop_map(|map| map.into_iter().map(|(ip, on)| (parse::ip(ip).unwrap(), on)).collect())
}

fn listeners() -> impl Strategy<Value = BTreeSet<FrontendKey>> {
    let ip = select(vec!["10.96.0.1", "10.96.0.1", "10.0.0.1", "fd00:10:96::1"]);
    let key = (ip, select(vec![80, 443]), select(vec![Protocol::Tcp, Protocol::Udp]));
    btree_set(
        key.prop_map(|(ip, port, protocol)| FrontendKey::new(parse::ip(ip).unwrap(), port, protocol)),
        0..3,
    )
}

fn service() -> BoxedStrategy<Service> {
    let cluster_ips = prop_oneof![9 => vec(service_ip(), 1..3), 1 => vec(service_ip(), 0..1)];
    let addresses = (cluster_ips, vec(service_ip(), 0..3), vec(ingress(), 0..3));
    let policies = (maybe(&["Cluster", "Local", "odd"]), maybe(&["Cluster", "Local", "Local"]));
    let affinity = (maybe(&["ClientIP", "None"]), option::of(select(vec![1, 60, 0, 86_401])));
    let ranges = vec(
        one_of(&["10.0.0.0/8", "0.0.0.0/0", "2001:db8::/32", " 192.0.2.0/24 ", "bogus", "10.0.0.1"]),
        0..3,
    );
    let kind =
        prop_oneof![9 => maybe(&["ClusterIP", "NodePort", "LoadBalancer"]), 1 => maybe(&["ExternalName"])];
    let meta = (annotations(), option::weighted(0.1, Just(())), option::of(select(vec![1_i64, 2])));
    let health_port = select(vec![None, Some(32_000), Some(32_000), Some(30_080), Some(0), Some(70_000)]);
    (addresses, vec(service_port(), 1..4), policies, affinity, ranges, (kind, health_port), meta)
        .prop_map(|((cluster_ips, external_ips, ingress), ports, policies, affinity, ranges, kind, meta)| {
            let (kind, health_check_node_port) = kind;
            let (annotations, other_proxy, created) = meta;
            let label = || [("service.kubernetes.io/service-proxy-name".to_owned(), "x".to_owned())].into();
            let client_ip = ClientIPConfig { timeout_seconds: affinity.1 };
            Service {
                metadata: ObjectMeta {
                    annotations: Some(annotations),
                    labels: other_proxy.map(|()| label()),
                    creation_timestamp: created.map(|second| Time(Timestamp::from_second(second).unwrap())),
                    ..ObjectMeta::default()
                },
                spec: Some(ServiceSpec {
                    cluster_ips: Some(cluster_ips),
                    external_ips: Some(external_ips),
                    ports: Some(ports),
                    internal_traffic_policy: policies.0,
                    external_traffic_policy: policies.1,
                    session_affinity: affinity.0,
                    session_affinity_config: Some(SessionAffinityConfig { client_ip: Some(client_ip) }),
                    load_balancer_source_ranges: Some(ranges),
                    health_check_node_port,
                    type_: kind,
                    ..ServiceSpec::default()
                }),
                status: Some(ServiceStatus {
                    load_balancer: Some(LoadBalancerStatus { ingress: Some(ingress) }),
                    ..ServiceStatus::default()
                }),
            }
        })
        .boxed()
}

fn ingress() -> impl Strategy<Value = LoadBalancerIngress> {
    let ip = option::weighted(
        0.9,
        prop_oneof![one_of(&["203.0.113.1", "203.0.113.2", "2001:db8::9"]), service_ip()],
    );
    (ip, maybe(&["VIP", "Proxy", "odd"])).prop_map(|(ip, ip_mode)| LoadBalancerIngress {
        ip,
        ip_mode,
        ..LoadBalancerIngress::default()
    })
}

fn annotations() -> impl Strategy<Value = BTreeMap<String, String>> {
    let keys = one_of(&["kproxy.io/pass-through", "kubernetes.io/elb.pass-through", EXTRA_ANNOTATION]);
    btree_map(keys, one_of(&["true", "false", "onlyLocal", "odd"]), 0..3)
}

fn service_port() -> impl Strategy<Value = ServicePort> {
    let number = prop_oneof![12 => select(vec![80, 443]), 1 => select(vec![0, -1, 70_000])];
    let node_port = select(vec![None, None, Some(30_080), Some(30_080), Some(30_081), Some(0), Some(70_000)]);
    (option::weighted(0.7, port_name()), number, node_port, protocol()).prop_map(
        |(name, port, node_port, protocol)| ServicePort {
            name,
            port,
            node_port,
            protocol,
            ..ServicePort::default()
        },
    )
}

fn protocol() -> impl Strategy<Value = Option<String>> {
    prop_oneof![14 => Just(None), 4 => maybe(&["TCP", "UDP", "SCTP"]), 1 => maybe(&["ICMP", "tcp"])]
}

fn slice() -> BoxedStrategy<EndpointSlice> {
    let labels = (option::weighted(0.9, one_of(&["s0", "s0", "s1", "s2"])), prop::bool::weighted(0.05));
    let kind = prop_oneof![10 => Just("IPv4".to_owned()), 4 => Just("IPv6".to_owned()), 1 => one_of(&["FQDN", "odd"])];
    (labels, kind, vec(slice_port(), 1..4), endpoints())
        .prop_map(|((service, is_headless), address_type, ports, endpoints)| {
            let mut labels = BTreeMap::new();
            labels.extend(service.map(|service| ("kubernetes.io/service-name".to_owned(), service)));
            if is_headless {
                labels.insert("service.kubernetes.io/headless".to_owned(), String::new());
            }
            EndpointSlice {
                address_type,
                endpoints: Some(endpoints),
                metadata: ObjectMeta { labels: Some(labels), ..ObjectMeta::default() },
                ports: Some(ports),
            }
        })
        .boxed()
}

fn slice_port() -> impl Strategy<Value = EndpointPort> {
    let number = prop_oneof![
        12 => select(vec![Some(8080), Some(8080), Some(9090)]),
        1 => select(vec![None, Some(0), Some(-1), Some(70_000)]),
    ];
    let name = option::weighted(0.95, port_name());
    (name, number, protocol()).prop_map(|(name, port, protocol)| EndpointPort {
        name,
        port,
        protocol,
        ..EndpointPort::default()
    })
}

fn port_name() -> impl Strategy<Value = String> {
    one_of(&["", "", "", "", "a", "a", "b"])
}

/// Endpoints of one slice. Hints and readiness are given to most of a slice alike, as controllers do: rules
/// that ask about all endpoints would otherwise hardly ever hold.
fn endpoints() -> impl Strategy<Value = Vec<Endpoint>> {
    (select(vec![0.1, 0.9, 0.999]), select(vec![0.1, 0.9, 0.999]), select(vec![0.1, 0.5, 0.9]))
        .prop_flat_map(|(node_hints, zone_hints, ready)| vec(endpoint(node_hints, zone_hints, ready), 0..7))
}

fn endpoint(node_hints: f64, zone_hints: f64, ready: f64) -> BoxedStrategy<Endpoint> {
    let ip = || {
        prop_oneof![
            12 => one_of(&["10.244.0.1", "10.244.0.2", "10.244.0.3", "10.244.0.4"]),
            6 => one_of(&["fd00:10:244::1", "fd00:10:244::2"]),
            1 => one_of(&["", "bogus", "::", "127.0.0.1"]),
        ]
    };
    let ready = option::weighted(0.9, prop::bool::weighted(ready));
    let conditions = option::weighted(0.9, (ready, option::of(any::<bool>()), option::of(any::<bool>())));
    let hints = |weight: f64, names: &'static [&'static str]| {
        option::weighted(weight, vec(one_of(names), 1..3)).prop_map(Option::unwrap_or_default)
    };
    let hints =
        option::weighted(0.97, (hints(node_hints, &[NODE, "node-b"]), hints(zone_hints, &["z1", "z2"])));
    let addresses = prop_oneof![12 => vec(ip(), 1..3), 1 => vec(ip(), 0..1)];
    (addresses, conditions, maybe(&[NODE, NODE, "node-b"]), hints)
        .prop_map(|(addresses, conditions, node_name, hints)| Endpoint {
            addresses,
            conditions: conditions.map(|(ready, serving, terminating)| EndpointConditions {
                ready,
                serving,
                terminating,
            }),
            node_name,
            hints: hints.map(|(nodes, zones)| EndpointHints {
                for_nodes: Some(nodes.into_iter().map(|name| ForNode { name }).collect()),
                for_zones: Some(zones.into_iter().map(|name| ForZone { name }).collect()),
            }),
            ..Endpoint::default()
        })
        .boxed()
}

fn node() -> impl Strategy<Value = Node> {
    let address = (
        one_of(&["InternalIP", "ExternalIP", "Hostname"]),
        one_of(&["10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8::2", "bogus"]),
    );
    (
        one_of(&[NODE, NODE, NODE, "node-b"]),
        option::weighted(0.9, one_of(&["z1", "z1", "z2", ""])),
        vec(address, 0..4),
    )
        .prop_map(|(name, zone, addresses)| {
            let labels = zone.map(|zone| [("topology.kubernetes.io/zone".to_owned(), zone)].into());
            let addresses =
                addresses.into_iter().map(|(type_, address)| NodeAddress { address, type_ }).collect();
            Node {
                metadata: ObjectMeta { name: Some(name), labels, ..ObjectMeta::default() },
                status: Some(NodeStatus { addresses: Some(addresses), ..NodeStatus::default() }),
                ..Node::default()
            }
        })
}

fn service_cidr() -> impl Strategy<Value = ServiceCIDR> {
    vec(one_of(&["10.96.0.0/16", "10.96.1.0/24", "10.97.0.0/16", "fd00:10:96::/112", "bogus"]), 0..3)
        .prop_map(|cidrs| ServiceCIDR {
            spec: Some(ServiceCIDRSpec { cidrs: Some(cidrs) }),
            ..ServiceCIDR::default()
        })
}

fn pod() -> impl Strategy<Value = Pod> {
    let ips = vec(one_of(&["10.244.0.7", "10.244.0.8", "fd00:10:244::7", "bogus"]), 0..3);
    let annotation = option::weighted(0.8, one_of(&["false", "false", "false", "true", "off"]));
    let phase = option::weighted(0.9, one_of(&["Pending", "Running", "Running", "Succeeded", "Failed"]));
    let host_network = option::weighted(0.5, prop::bool::weighted(0.2));
    (annotation, option::weighted(0.9, one_of(&[NODE, NODE, "node-b"])), host_network, phase, ips).prop_map(
        |(annotation, node_name, host_network, phase, ips)| Pod {
            metadata: ObjectMeta {
                annotations: annotation.map(|value| [("kproxy.io/socket-hooks".to_owned(), value)].into()),
                ..ObjectMeta::default()
            },
            spec: Some(PodSpec { node_name, host_network, ..PodSpec::default() }),
            status: Some(PodStatus {
                phase,
                pod_ips: Some(ips.into_iter().map(|ip| PodIP { ip }).collect()),
                ..PodStatus::default()
            }),
        },
    )
}

/// Any text, often one that is nearly right.
fn wild_text() -> BoxedStrategy<String> {
    prop_oneof![
        any::<String>(),
        "[0-9a-f.:/ ]{0,40}",
        any::<std::net::IpAddr>().prop_map(|ip| ip.to_string()),
        (any::<std::net::IpAddr>(), any::<u8>()).prop_map(|(ip, length)| format!("{ip}/{length}")),
        one_of(&["true", "Local", "Proxy", "ClientIP", "UDP", "IPv4", "IPv6", "NodePort", "None"]),
        one_of(&["10.96.0.1", "s0", "s1", NODE]),
    ]
    .boxed()
}

fn wild_list() -> impl Strategy<Value = Option<Vec<String>>> {
    option::of(prop_oneof![8 => vec(wild_text(), 0..5), 1 => vec(wild_text(), 300..301)])
}

fn wild_map() -> impl Strategy<Value = Option<BTreeMap<String, String>>> {
    let key = prop_oneof![
        wild_text(),
        one_of(&["kproxy.io/pass-through", "kubernetes.io/elb.pass-through", EXTRA_ANNOTATION]),
        one_of(&["kubernetes.io/service-name"]),
    ];
    option::of(btree_map(key, wild_text(), 0..4))
}

fn wild_service() -> BoxedStrategy<Service> {
    let port = (option::of(wild_text()), any::<i32>(), option::of(any::<i32>()), option::of(wild_text()));
    let port = port.prop_map(|(name, port, node_port, protocol)| ServicePort {
        name,
        port,
        node_port,
        protocol,
        ..ServicePort::default()
    });
    let ports = vec(prop_oneof![port, service_port()], 0..6);
    let ingress = (option::of(wild_text()), option::of(wild_text()))
        .prop_map(|(ip, ip_mode)| LoadBalancerIngress { ip, ip_mode, ..LoadBalancerIngress::default() });
    let texts =
        (option::of(wild_text()), option::of(wild_text()), option::of(wild_text()), option::of(wild_text()));
    let lists = (wild_list(), wild_list(), wild_list(), wild_list());
    (lists, texts, option::of(ports), option::of(vec(ingress, 0..6)), wild_map(), wild_map(), any::<i32>())
        .prop_map(|(lists, texts, ports, ingress, annotations, labels, timeout)| Service {
            metadata: ObjectMeta { annotations, labels, ..ObjectMeta::default() },
            spec: Some(ServiceSpec {
                cluster_ips: lists.0,
                external_ips: lists.1,
                load_balancer_source_ranges: lists.2,
                ip_families: lists.3,
                health_check_node_port: Some(timeout),
                cluster_ip: texts.0.clone(),
                internal_traffic_policy: texts.0,
                external_traffic_policy: texts.1,
                session_affinity: texts.2,
                type_: texts.3,
                session_affinity_config: Some(SessionAffinityConfig {
                    client_ip: Some(ClientIPConfig { timeout_seconds: Some(timeout) }),
                }),
                ports,
                ..ServiceSpec::default()
            }),
            status: Some(ServiceStatus {
                load_balancer: Some(LoadBalancerStatus { ingress }),
                ..ServiceStatus::default()
            }),
        })
        .boxed()
}

fn wild_slice() -> BoxedStrategy<EndpointSlice> {
    let endpoint = (vec(wild_text(), 0..3), endpoint(0.5, 0.5, 0.5))
        .prop_map(|(addresses, endpoint)| Endpoint { addresses, ..endpoint });
    let port = (option::of(wild_text()), option::of(any::<i32>()), option::of(wild_text()))
        .prop_map(|(name, port, protocol)| EndpointPort { name, port, protocol, ..EndpointPort::default() });
    (slice(), wild_map(), vec(endpoint, 0..40), vec(port, 0..4))
        .prop_map(|(slice, labels, endpoints, mut ports)| {
            let labels = labels.or_else(|| slice.metadata.labels.clone());
            ports.extend(slice.ports.into_iter().flatten());
            EndpointSlice {
                metadata: ObjectMeta { labels, ..ObjectMeta::default() },
                endpoints: Some(endpoints),
                ports: Some(ports),
                ..slice
            }
        })
        .boxed()
}
