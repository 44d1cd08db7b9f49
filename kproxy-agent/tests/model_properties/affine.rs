//! One Service with affinity whose endpoints come, go and come back, and clients that ask again and again: what
//! hardly ever happens among objects that are random in every way.

use k8s_openapi::api::core::v1::{
    ClientIPConfig, Service, ServicePort, ServiceSpec, ServiceStatus, SessionAffinityConfig,
};
use k8s_openapi::api::core::v1::{LoadBalancerIngress, LoadBalancerStatus};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kproxy::model::parse;
use kproxy::wanted::ServiceKey;
use kproxy_common::{ClientKind, Protocol};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use crate::generate::{Event, NODE};
use crate::verdict::Question;

const CLUSTER_IP: &str = "10.96.0.1";
const EXTERNAL_IP: &str = "10.96.0.3";
const VIP: &str = "203.0.113.1";
/// Where each endpoint always is.
const ENDPOINTS: [(&str, &str); 4] =
    [("10.244.0.1", NODE), ("10.244.0.2", NODE), ("10.244.0.3", "node-b"), ("10.244.0.4", "node-b")];

/// What happens first: the Service is there, with affinity.
pub fn first() -> impl Strategy<Value = Vec<Event>> {
    (service(0.95), slice()).prop_map(|(service, slice)| vec![service, slice])
}

/// What happens then: mostly to the endpoints.
pub fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        6 => slice(),
        1 => service(0.7),
        1 => Just(Event::Service(key("s0"), None)),
    ];
    vec(event, 1..3)
}

/// Who asks: few clients, at every address that the Service has.
pub fn question() -> impl Strategy<Value = Question> {
    let behind = select(vec![ClientKind::Pod, ClientKind::Outside, ClientKind::Outside]);
    let client = select(vec!["198.51.100.9", "198.51.100.10"]);
    let at = select(vec![(CLUSTER_IP, 80), (EXTERNAL_IP, 80), (VIP, 80), ("10.0.0.1", 30_080)]);
    (behind, client, at).prop_map(|(behind, client, (destination, port))| Question {
        behind,
        client: parse::ip(client).unwrap(),
        destination: parse::ip(destination).unwrap(),
        port,
        protocol: Protocol::Tcp,
    })
}

fn key(name: &str) -> ServiceKey {
    ServiceKey { namespace: "n".to_owned(), name: name.to_owned() }
}

fn service(affinity: f64) -> impl Strategy<Value = Event> {
    let policies = (select(vec!["Cluster", "Local"]), select(vec!["Cluster", "Local", "Local"]));
    let timeout = option::weighted(affinity, select(vec![1, 60, 60, 10_800]));
    (policies, timeout).prop_map(|((internal, external), timeout)| {
        let client_ip = ClientIPConfig { timeout_seconds: timeout };
        let spec = ServiceSpec {
            cluster_ips: Some(vec![CLUSTER_IP.to_owned()]),
            external_ips: Some(vec![EXTERNAL_IP.to_owned()]),
            internal_traffic_policy: Some(internal.to_owned()),
            external_traffic_policy: Some(external.to_owned()),
            session_affinity: Some(if timeout.is_some() { "ClientIP" } else { "None" }.to_owned()),
            session_affinity_config: Some(SessionAffinityConfig { client_ip: Some(client_ip) }),
            ports: Some(vec![ServicePort { port: 80, node_port: Some(30_080), ..ServicePort::default() }]),
            ..ServiceSpec::default()
        };
        let ingress = LoadBalancerIngress { ip: Some(VIP.to_owned()), ..LoadBalancerIngress::default() };
        let status = ServiceStatus {
            load_balancer: Some(LoadBalancerStatus { ingress: Some(vec![ingress]) }),
            ..ServiceStatus::default()
        };
        let service = Service { spec: Some(spec), status: Some(status), ..Service::default() };
        Event::Service(key("s0"), Some(Box::new(service)))
    })
}

fn slice() -> impl Strategy<Value = Event> {
    // Ready, terminating and serving, serving alone, or not there.
    let states = vec(select(vec![0, 0, 0, 1, 2, 3]), ENDPOINTS.len());
    states.prop_map(|states| {
        let there = ENDPOINTS.iter().zip(states).filter(|(_, state)| *state < 3);
        let endpoints = there.map(|((address, node), state)| Endpoint {
            addresses: vec![(*address).to_owned()],
            node_name: Some((*node).to_owned()),
            conditions: Some(EndpointConditions {
                ready: Some(state == 0),
                serving: Some(true),
                terminating: Some(state == 1),
            }),
            ..Endpoint::default()
        });
        let label = ("kubernetes.io/service-name".to_owned(), "s0".to_owned());
        let slice = EndpointSlice {
            address_type: "IPv4".to_owned(),
            endpoints: Some(endpoints.collect()),
            metadata: ObjectMeta { labels: Some([label].into()), ..ObjectMeta::default() },
            ports: Some(vec![EndpointPort {
                name: Some(String::new()),
                port: Some(8080),
                ..EndpointPort::default()
            }]),
        };
        Event::Slice(key("e0"), Some(slice))
    })
}
