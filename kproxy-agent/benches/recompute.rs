//! What the pure core costs: model and plan of 10,000 Services of ten endpoints each, from scratch and after one
//! EndpointSlice changed; and one question to `kproxy explain` among them. No kernel, no root.
//!
//! `cargo bench -p kproxy-agent --bench recompute`

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use divan::{Bencher, black_box};
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kproxy::explain::{Hooks, Planned, Query, explain};
use kproxy::maps::Reconciler;
use kproxy::maps::memory::Memory;
use kproxy::model::{Change, Model, NodeConfig, Update};
use kproxy::plan::{Capacity, Changes, Tables, plan};
use kproxy::wanted::{ServiceKey, WantedService};
use kproxy_common::{Address, Protocol};

const SERVICES: [u32; 2] = [10, 10_000];
const ENDPOINTS: u32 = 10;
const CAPACITY: Capacity =
    Capacity { frontends: 32_768, backends: 262_144, addresses: 32_768, source_ranges: 65_536 };

fn main() {
    divan::main();
}

/// Parsing all objects and computing what every Service wants.
#[divan::bench(args = SERVICES, sample_count = 20, sample_size = 1)]
fn model_from_scratch(bencher: Bencher<'_, '_>, services: u32) {
    bencher.with_inputs(|| objects(services)).bench_values(|changes| {
        let mut model = empty();
        changes.into_iter().for_each(|change| model.apply(change));
        (model.recompute(), model)
    });
}

/// Parsing one EndpointSlice, with one endpoint more or less, and computing what follows.
#[divan::bench(args = SERVICES, sample_count = 1_000, sample_size = 1)]
fn model_one_slice_changed(bencher: Bencher<'_, '_>, services: u32) {
    let model = RefCell::new(full(services).0);
    let turn = Cell::new(0);
    bencher.with_inputs(|| next_slice(&turn, services)).bench_local_values(|change| {
        let mut model = model.borrow_mut();
        model.apply(change);
        let update = model.recompute();
        assert_eq!(update.services.len(), 1);
        update
    });
}

/// From what all Services want to the writes.
#[divan::bench(args = SERVICES, sample_count = 20, sample_size = 1)]
fn plan_from_scratch(bencher: Bencher<'_, '_>, services: u32) {
    let (_, update) = full(services);
    bencher
        .with_inputs(|| (Tables::new(CAPACITY), update.services.clone()))
        .bench_values(|(mut tables, all)| (plan(&mut tables, &changes(&all, true)), tables));
}

/// From what one Service wants to the writes, over full tables.
#[divan::bench(args = SERVICES, sample_count = 1_000, sample_size = 1)]
fn plan_one_slice_changed(bencher: Bencher<'_, '_>, services: u32) {
    let (mut model, update) = full(services);
    let mut reconciler = Reconciler::new(Tables::new(CAPACITY));
    let all = update.services.into_iter().filter_map(|(key, wanted)| Some((key, wanted?))).collect();
    reconciler.want_all(all, std::time::SystemTime::UNIX_EPOCH);
    let report = reconciler.run(&mut Memory::new(CAPACITY), std::time::SystemTime::UNIX_EPOCH);
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    let mut tables = reconciler.into_tables();
    model.apply(slice(services / 2, ENDPOINTS + 1));
    let changed = model.recompute().services;
    assert_eq!(changed.len(), 1);
    bencher.bench_local(|| plan(&mut tables, black_box(&changes(&changed, false))));
}

/// One question over full tables, answered in full.
#[divan::bench(args = SERVICES, sample_count = 1_000, sample_size = 1)]
fn explain_one_question(bencher: Bencher<'_, '_>, services: u32) {
    let (model, _) = full(services);
    let hooks = Hooks { loopback_node_ports: true, host_sockets_only: false };
    let planned = Planned::new(&model, hooks, CAPACITY);
    let to = IpAddr::V4(cluster_ip(services / 2)).to_string() + ":80";
    let query = Query::new("10.244.1.7", &to, None).expect("it is right");
    assert_eq!(query.protocol, Protocol::Tcp);
    bencher.bench_local(|| explain(&planned, black_box(&query)).expect("memory can be read"));
}

fn changes(services: &BTreeMap<ServiceKey, Option<WantedService>>, complete: bool) -> Changes<'_> {
    Changes { services, node_addresses: None, complete, now: 0 }
}

fn empty() -> Model {
    Model::new(NodeConfig {
        node_name: "node-0".to_owned(),
        node_addresses: vec![Address::from(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 11)))],
        ..NodeConfig::default()
    })
}

fn full(services: u32) -> (Model, Update) {
    let mut model = empty();
    objects(services).into_iter().for_each(|change| model.apply(change));
    let update = model.recompute();
    assert_eq!(update.services.len(), services as usize);
    (model, update)
}

fn objects(services: u32) -> Vec<Change> {
    (0..services).flat_map(|number| [service(number), slice(number, ENDPOINTS)]).collect()
}

/// One Service after the other, far apart, and with an endpoint more than at its last turn, or one less.
fn next_slice(turn: &Cell<u32>, services: u32) -> Change {
    let at = turn.replace(turn.get().wrapping_add(1));
    slice(at.wrapping_mul(7_919) % services, ENDPOINTS + 1 - at / services % 2)
}

fn service(number: u32) -> Change {
    let spec = ServiceSpec {
        cluster_ips: Some(vec![cluster_ip(number).to_string()]),
        ports: Some(vec![ServicePort { name: Some("http".to_owned()), port: 80, ..ServicePort::default() }]),
        ..ServiceSpec::default()
    };
    let service = Service { spec: Some(spec), ..Service::default() };
    Change::Service(key(number, "service"), Some(lean(service)))
}

fn slice(number: u32, endpoints: u32) -> Change {
    let endpoint = |place: u32| Endpoint {
        addresses: vec![Ipv4Addr::from(0x0a80_0000 + number * 16 + place).to_string()],
        node_name: Some(format!("node-{place}")),
        ..Endpoint::default()
    };
    let label = ("kubernetes.io/service-name".to_owned(), key(number, "service").name);
    let slice = EndpointSlice {
        address_type: "IPv4".to_owned(),
        endpoints: Some((0..endpoints).map(endpoint).collect()),
        metadata: ObjectMeta { labels: Some([label].into()), ..ObjectMeta::default() },
        ports: Some(vec![EndpointPort {
            name: Some("http".to_owned()),
            port: Some(8080),
            ..EndpointPort::default()
        }]),
    };
    Change::EndpointSlice(key(number, "slice"), Some(lean(slice)))
}

fn key(number: u32, what: &str) -> ServiceKey {
    ServiceKey { namespace: format!("namespace-{}", number % 100), name: format!("{what}-{number}") }
}

fn cluster_ip(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a60_0000 + number)
}

/// The object as kproxy reads it.
fn lean<T: serde::de::DeserializeOwned>(object: impl serde::Serialize) -> Box<T> {
    let tree = serde_json::to_value(object).expect("it has a form");
    Box::new(serde_json::from_value(tree).expect("it is an object"))
}
