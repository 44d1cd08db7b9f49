//! What planning and writing cost: a first load, one changed endpoint and a restart, with 10,000 Services of ten
//! endpoints each and with ten of them, over maps that no program reads.
//!
//! `cargo bench -p kproxy-agent --bench s10k`; needs CAP_BPF.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant, SystemTime},
};

use kproxy::{
    maps::{MapWriter as _, Reconciler, Report, kernel::KernelMaps},
    plan::{Capacity, Changes, Tables, plan},
    wanted::{
        PassThroughRule, ServiceKey, WantedBackend, WantedFrontend, WantedPort, WantedService, WantedSide,
    },
};
use kproxy_common::{
    Address, AddressKind, BackendState, FrontendKey, FrontendKind, Location, Mode, Protocol, ServiceKind,
    TrafficPolicy,
};

const CAPACITY: Capacity =
    Capacity { frontends: 32_768, backends: 262_144, addresses: 32_768, source_ranges: 65_536 };
const ENDPOINTS: u16 = 10;
const CHANGES: u32 = 1_000;

fn main() {
    // `cargo test --benches` runs this too, and wants to know only that it builds.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    for services in [10, 10_000] {
        println!("{services} Services x {ENDPOINTS} endpoints");
        let mut maps = match KernelMaps::create(&CAPACITY) {
            Ok(maps) => maps,
            Err(error) => {
                println!("  skipped: {error}");
                return;
            }
        };
        let wanted: BTreeMap<_, _> = (0..services).map(|number| service(number, ENDPOINTS)).collect();
        let mut reconciler = first_load(&wanted, &mut maps);
        changes(services, &mut reconciler, &mut maps);
        restart(&wanted, &mut maps);
    }
}

fn first_load(wanted: &BTreeMap<ServiceKey, WantedService>, maps: &mut KernelMaps) -> Reconciler {
    let changes = wanted.iter().map(|(key, wanted)| (key.clone(), Some(wanted.clone()))).collect();
    let changes = Changes { services: &changes, node_addresses: None, complete: true, now: 0 };
    let mut tables = Tables::new(CAPACITY);
    let start = Instant::now();
    let planned = plan(&mut tables, &changes);
    let planning = start.elapsed();
    drop((planned, tables));

    let calls = maps.calls();
    let mut reconciler = Reconciler::new(Tables::new(CAPACITY));
    reconciler.want_all(wanted.clone(), now());
    let start = Instant::now();
    let report = reconciler.run(maps, now());
    let all = start.elapsed();
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    let writing: Duration = report.times.iter().map(|step| step.time).sum();
    println!("  first load: plan {planning:.1?}, write {writing:.1?}, all {all:.1?}; {}", what(&report));
    for step in &report.times {
        println!("    {:<22} {:>10.1?}", step.step, step.time);
    }
    println!("    bpf() calls: {}", maps.calls() - calls);
    reconciler
}

/// One endpoint more or less, of one Service after the other, and the grace period that frees its old block.
fn changes(services: u32, reconciler: &mut Reconciler, maps: &mut KernelMaps) {
    let (mut times, mut settles, mut calls) = (Vec::new(), Vec::new(), 0);
    for change in 0..CHANGES {
        let (key, wanted) =
            service(change.wrapping_mul(7_919) % services, ENDPOINTS + 1 - (change / services % 2) as u16);
        let start = Instant::now();
        reconciler.want(BTreeMap::from([(key, Some(wanted))]), now());
        let report = reconciler.run(maps, now());
        times.push(start.elapsed());
        calls = calls.max(report.calls);
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        let start = Instant::now();
        reconciler.settle(maps, now());
        settles.push(start.elapsed());
    }
    println!("  one endpoint changed: {}; at most {calls} bpf() calls", quantiles(&mut times));
    println!("  settling afterwards:  {}", quantiles(&mut settles));
    // Back to the first state, for the restart.
    let all: BTreeMap<_, _> = (0..services).map(|number| service(number, ENDPOINTS)).collect();
    reconciler.want_all(all, now());
    reconciler.run(maps, now());
    reconciler.settle(maps, now());
}

fn restart(wanted: &BTreeMap<ServiceKey, WantedService>, maps: &mut KernelMaps) {
    let start = Instant::now();
    let (tables, problems) = maps.restore().expect("the maps can be read");
    let reading = start.elapsed();
    assert!(problems.is_empty(), "{problems:?}");
    let mut reconciler = Reconciler::new(tables);
    reconciler.want_all(wanted.clone(), now());
    let start = Instant::now();
    let report = reconciler.run(maps, now());
    println!("  restart: read {reading:.1?}, plan and write {:.1?}; {}", start.elapsed(), what(&report));
}

fn what(report: &Report) -> String {
    format!(
        "{} writes, {} bpf() calls, {} grace periods",
        report.counts.writes(),
        report.calls,
        report.counts.graces
    )
}

fn quantiles(times: &mut [Duration]) -> String {
    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    format!("p50 {:.1?}, p99 {:.1?}, max {:.1?}", at(0.5), at(0.99), at(1.0))
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH
}

fn service(number: u32, endpoints: u16) -> (ServiceKey, WantedService) {
    let [_, a, b, c] = number.to_be_bytes();
    let key =
        ServiceKey { namespace: format!("namespace-{}", number % 100), name: format!("service-{number}") };
    let cluster_ip = Address::from(IpAddr::from([10, 96 + a, b, c]));
    let backend = |endpoint: u16| WantedBackend {
        address: IpAddr::from([10, endpoint as u8, b, c]).into(),
        port: 8_080,
        location: if endpoint == 0 { Location::Local } else { Location::Remote },
        state: BackendState::Ready,
    };
    let side = WantedSide { offset: 0, count: endpoints, mode: Mode::Forward, options: 0 };
    let port = WantedPort {
        name: "http".to_owned(),
        protocol: Protocol::Tcp,
        affinity_timeout: 0,
        backends: (0..endpoints).map(backend).collect(),
        in_sets: endpoints,
        frontends: vec![WantedFrontend {
            key: FrontendKey::new(cluster_ip, 80, Protocol::Tcp),
            kind: FrontendKind::ClusterIp,
            policy: TrafficPolicy::Cluster,
            inside: side,
            outside: side,
            source_ranges: Vec::new(),
            pass_through_rule: PassThroughRule::NotApplicable,
        }],
    };
    let addresses = vec![(cluster_ip, AddressKind::ClusterIp)];
    (key.clone(), WantedService { key, kind: ServiceKind::ClusterIp, ports: vec![port], addresses })
}
