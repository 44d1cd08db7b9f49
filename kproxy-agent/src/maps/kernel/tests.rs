//! The kernel's maps against their twin in memory. The maps are made for the test and belong to nobody else;
//! no program is loaded.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    os::fd::AsFd as _,
    time::{Duration, SystemTime},
};

use kproxy_common::{
    AddressKind, BackendState, Cidr, Config, Counters, FrontendKind, LAYOUT_VERSION, Location, MAX_CIDRS,
    Mode, Options, Owner, Protocol, Reason, ServiceKind, TrafficPolicy,
};

use super::{
    super::sys::{self, MapAttributes},
    *,
};
use crate::{
    maps::{Reconciler, memory::Memory},
    plan::{Tables, restore},
    wanted::{
        PassThroughRule, ServiceKey, WantedBackend, WantedFrontend, WantedPort, WantedService, WantedSide,
    },
};

const CAPACITY: Capacity = Capacity { frontends: 64, backends: 512, addresses: 64, source_ranges: 32 };

/// Maps of this capacity; none, with the reason printed, where the test may not make any.
fn maps(capacity: &Capacity) -> Option<KernelMaps> {
    match KernelMaps::create(capacity) {
        Ok(maps) => Some(maps),
        Err(MapError::Call { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {
            println!("skipped: making maps needs CAP_BPF: {source}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn address(last: u16) -> Address {
    IpAddr::from([10, 96, (last >> 8) as u8, last as u8]).into()
}

fn key(last: u16) -> FrontendKey {
    FrontendKey::new(address(last), 80, Protocol::Tcp)
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
}

/// A Service with one port and this many endpoints, whose backends all clients reach.
fn service(number: u16, endpoints: u16) -> (ServiceKey, WantedService) {
    let key = ServiceKey { namespace: "default".to_owned(), name: format!("service-{number}") };
    let backend = |endpoint: u16| WantedBackend {
        address: IpAddr::from([10, 244, number as u8, endpoint as u8]).into(),
        port: 8_080,
        location: Location::Remote,
        state: BackendState::Ready,
    };
    let side =
        WantedSide { offset: 0, count: endpoints, mode: Mode::Forward, options: Options::SOURCE_RANGES };
    let port = WantedPort {
        name: "http".to_owned(),
        protocol: Protocol::Tcp,
        affinity_timeout: 0,
        backends: (0..endpoints).map(backend).collect(),
        in_sets: endpoints,
        frontends: vec![WantedFrontend {
            key: self::key(number),
            kind: FrontendKind::ClusterIp,
            policy: TrafficPolicy::Cluster,
            inside: side,
            outside: side,
            source_ranges: vec![Cidr::new(address(number), 96 + 24)],
            pass_through_rule: PassThroughRule::NotApplicable,
        }],
    };
    let addresses = vec![(address(number), AddressKind::ClusterIp)];
    (key.clone(), WantedService { key, kind: ServiceKind::ClusterIp, ports: vec![port], addresses })
}

#[test]
fn kernel_and_twin_hold_the_same() {
    let Some(mut maps) = maps(&CAPACITY) else { return };
    let mut memory = Memory::new(CAPACITY);
    let (mut real, mut twin) =
        (Reconciler::new(Tables::new(CAPACITY)), Reconciler::new(Tables::new(CAPACITY)));
    let steps: [Vec<(u16, u16)>; 4] = [
        (1..20).map(|number| (number, 10)).collect(),
        vec![(3, 0), (4, 9), (5, 11), (30, 1)],
        vec![(3, 2), (30, 1)],
        vec![(31, 7)],
    ];
    for (step, services) in steps.into_iter().enumerate() {
        let mut wanted: BTreeMap<_, _> = services
            .into_iter()
            .map(|(number, endpoints)| service(number, endpoints))
            .map(|(k, w)| (k, Some(w)))
            .collect();
        if step == 2 {
            wanted.extend((6..12).map(|number| (service(number, 0).0, None)));
        }
        for (reconciler, writer) in [(&mut real, &mut maps as &mut dyn MapWriter), (&mut twin, &mut memory)] {
            reconciler.want(wanted.clone(), now());
            let report = reconciler.run(writer, now());
            assert!(report.failed.is_empty(), "{report:?}");
            reconciler.settle(writer, now());
        }
        assert_eq!(maps.read_all().unwrap(), memory.snapshot());
        assert_eq!(real.tables().snapshot(), memory.snapshot());
    }

    // What another agent finds is complete, and it has nothing to write.
    let (tables, problems) = maps.restore().unwrap();
    assert_eq!(problems, Vec::<String>::new());
    let mut restarted = Reconciler::new(tables);
    let all = [1, 2].into_iter().chain(12..20).map(|number| service(number, 10));
    let changed = [(3, 2), (4, 9), (5, 11), (30, 1), (31, 7)];
    let changed = changed.into_iter().map(|(number, endpoints)| service(number, endpoints));
    restarted.want_all(all.chain(changed).collect(), now());
    let report = restarted.run(&mut maps, now());
    assert_eq!((report.counts.writes(), report.failed.len()), (0, 0), "{report:?}");
}

#[test]
fn a_full_map_fails_those_that_do_not_fit() {
    let small = Capacity { frontends: 8, ..CAPACITY };
    let Some(mut maps) = maps(&small) else { return };
    for batches in [true, false] {
        if !batches {
            maps.batches = Batches::without_support();
        }
        let wanted: Vec<_> = (1..=10_u16).map(|number| (key(number), u32::from(number))).collect();
        let results = maps.insert_frontends(&wanted);
        let (done, failed): (Vec<_>, Vec<_>) =
            results.iter().enumerate().partition(|(_, result)| result.is_ok());
        assert_eq!(done.len(), 8);
        assert!(failed.iter().all(|(_, result)| result.as_ref().unwrap_err().to_string().contains("full")));
        let mut should: Vec<_> = done.iter().map(|(at, _)| wanted[*at]).collect();
        should.sort();
        assert_eq!(maps.read_all().unwrap().frontends, should);

        // Those in the middle that are not there do not stop the rest.
        let all: Vec<_> = (1..=12).map(key).collect();
        assert!(maps.delete_frontends(&all).iter().all(Result::is_ok));
        assert!(maps.read_all().unwrap().frontends.is_empty());
    }
}

#[test]
fn a_key_that_is_there_is_never_replaced_one_by_one() {
    let Some(mut maps) = maps(&CAPACITY) else { return };
    assert_eq!(maps.insert_frontends(&[(key(1), 1)]), [Ok(())]);
    let error = maps.insert_frontends(&[(key(1), 2)]).remove(0).unwrap_err();
    assert!(error.to_string().contains("something else"), "{error}");
    assert_eq!(maps.read_all().unwrap().frontends, [(key(1), 1)]);
}

#[test]
fn ten_thousand_elements_take_a_few_calls() {
    let large = Capacity { frontends: 10_000, ..CAPACITY };
    let Some(mut maps) = maps(&large) else { return };
    if !probe_batches().unwrap() {
        println!("skipped: this kernel has no batches");
        return;
    }
    let wanted: Vec<_> = (0..10_000_u16).map(|number| (key(number), u32::from(number))).collect();
    assert!(maps.insert_frontends(&wanted).iter().all(Result::is_ok));
    assert_eq!(maps.calls(), 1);
    let mut read = maps.read_all().unwrap().frontends;
    read.sort_by_key(|(_, number)| *number);
    assert_eq!(read, wanted);
    let keys: Vec<_> = wanted.iter().map(|(key, _)| *key).collect();
    assert!(maps.delete_frontends(&keys).iter().all(Result::is_ok));
    assert_eq!(maps.calls(), 2);
}

#[test]
fn the_configuration_is_written_where_it_differs() {
    let Some(mut maps) = maps(&CAPACITY) else { return };
    let cidr = |third: u8, bits: u32| Cidr::new(IpAddr::from([10, third, 0, 0]).into(), 96 + bits);
    let mut wanted = Config {
        host_netns_cookie: 7,
        udp_timeout: 30_000_000_000,
        hash_seed: [0x0102_0304, 0x0506_0708],
        loopback_node_ports: 1,
        routes_by_source: 1,
        remember_peer: 0,
        host_sockets_only: 0,
        some_opted_out: 0,
        mask_ports_first: 30_000,
        mask_ports_count: 2_000,
        reserved_ports_first: 31_000,
        reserved_ports_count: 500,
        node_addresses: 0x8000_0000_0000_0001,
        udp_node_ports_first: 30_000,
        udp_node_ports_last: 30_100,
        _pad: 0,
        service_cidrs: [Cidr::NONE; MAX_CIDRS],
        cluster_cidrs: [Cidr::NONE; MAX_CIDRS],
    };
    wanted.service_cidrs[0] = cidr(96, 12);
    wanted.cluster_cidrs[0] = cidr(244, 16);
    wanted.cluster_cidrs[1] = cidr(245, 16);
    for change in 0..5 {
        match change {
            1 => wanted.cluster_cidrs[0] = cidr(246, 17),
            2 => wanted.cluster_cidrs[1] = Cidr::NONE,
            3 => (wanted.remember_peer, wanted.service_cidrs[0]) = (1, cidr(96, 16)),
            4 => (wanted.host_sockets_only, wanted.some_opted_out) = (1, 1),
            _ => {}
        }
        maps.write_config(&wanted).unwrap();
        assert_eq!(config(&maps), bytes_of(&wanted), "change {change}");
        assert_eq!(maps.hash_seed().unwrap(), wanted.hash_seed);
        let read = maps.read_config().unwrap();
        assert_eq!(
            (read.remember_peer, read.host_sockets_only, read.some_opted_out),
            (wanted.remember_peer, wanted.host_sockets_only, wanted.some_opted_out)
        );
    }
}

/// What a program would see; the addresses of unused places do not count.
fn config(maps: &KernelMaps) -> Vec<u8> {
    let mut bytes = vec![0; size_of::<Config>()];
    maps.config.read(0, 0, &mut bytes).unwrap();
    let (head, cidrs) = bytes.split_at_mut(std::mem::offset_of!(Config, service_cidrs));
    assert!(!head.is_empty());
    for cidr in cidrs.chunks_exact_mut(20).filter(|cidr| cidr[16..] == u32::MAX.to_ne_bytes()) {
        cidr[..16].fill(0);
    }
    bytes
}

/// The configuration as the compiler lays it out, field by field.
fn bytes_of(config: &Config) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(config.host_netns_cookie.to_ne_bytes());
    bytes.extend(config.udp_timeout.to_ne_bytes());
    let [first, second] = config.hash_seed;
    bytes.extend([first, second].into_iter().flat_map(u32::to_ne_bytes));
    bytes
        .extend([config.loopback_node_ports, config.routes_by_source].into_iter().flat_map(u16::to_ne_bytes));
    bytes.extend(config.remember_peer.to_ne_bytes());
    bytes.extend([config.host_sockets_only, config.some_opted_out]);
    bytes.extend([config.mask_ports_first, config.mask_ports_count].into_iter().flat_map(u32::to_ne_bytes));
    let reserved = [config.reserved_ports_first, config.reserved_ports_count];
    bytes.extend(reserved.into_iter().flat_map(u32::to_ne_bytes));
    bytes.extend(config.node_addresses.to_ne_bytes());
    bytes.extend(
        [config.udp_node_ports_first, config.udp_node_ports_last].into_iter().flat_map(u16::to_ne_bytes),
    );
    bytes.extend(config._pad.to_ne_bytes());
    for cidr in config.service_cidrs.iter().chain(&config.cluster_cidrs) {
        bytes.extend(cidr.address().octets());
        bytes.extend(cidr.prefix_length().to_ne_bytes());
    }
    bytes
}

#[test]
fn counters_are_read_and_reset_and_the_owner_is_known() {
    let Some(mut maps) = maps(&CAPACITY) else { return };
    for number in [3_u32, 4] {
        let mut value = [0; 16];
        value[..8].copy_from_slice(&u64::from(number).to_ne_bytes());
        value[8..].copy_from_slice(&9_u64.to_ne_bytes());
        maps.counter.update(&number.to_ne_bytes(), &value, sys::BPF_ANY).unwrap();
    }
    assert!(maps.reset_counters(&[4, 5]).iter().all(Result::is_ok));
    let counters = maps.counters().unwrap();
    assert_eq!(counters.len(), 64);
    assert_eq!(counters[3], Counters { connections: 3, pass_through: 9 });
    assert_eq!(counters[4], Counters::default());

    let cpus = vec![5_u64.to_ne_bytes(); maps.reason.value_bytes() / 8].concat();
    maps.reason.update(&(Reason::Forwarded as u32).to_ne_bytes(), &cpus, sys::BPF_ANY).unwrap();
    let reasons: BTreeMap<_, _> = maps.reasons().unwrap().into_iter().collect();
    assert_eq!(reasons.len(), Reason::ALL.len());
    assert!(
        !reasons[&Reason::Forwarded].is_empty()
            && reasons[&Reason::Forwarded].iter().all(|count| *count == 5)
    );
    assert!(reasons[&Reason::PassThrough].iter().all(|count| *count == 0));

    assert_eq!(maps.read_owner().unwrap(), None);
    let mut owner = Owner {
        layout_version: LAYOUT_VERSION,
        pid: 42,
        started: 1_700_000_000,
        node: [0; 64],
        version: [0; 16],
    };
    owner.node[..4].copy_from_slice(b"node");
    maps.write_owner(&owner).unwrap();
    assert_eq!(maps.read_owner().unwrap(), Some(owner));
}

#[test]
fn maps_of_another_shape_are_refused() {
    if maps(&CAPACITY).is_none() {
        return;
    }
    let other = |name: &'static str| {
        let expected = shape::with_capacity(name, &CAPACITY);
        let value_size = if name == map_names::BACKEND { 40 } else { expected.value_size };
        let map = Map::create(MapAttributes { value_size, ..expected })?;
        map.as_fd().try_clone_to_owned()
    };
    let error = KernelMaps::from_fds(other).unwrap_err().to_string();
    assert!(error.contains("backend") && error.contains("value size") && error.contains("40"), "{error}");

    let maps = maps(&CAPACITY).unwrap();
    assert_eq!(maps.check_capacity(&CAPACITY), Ok(()));
    let error = maps.check_capacity(&Capacity { backends: 1_024, ..CAPACITY }).unwrap_err().to_string();
    assert!(error.contains("512") && error.contains("1024"), "{error}");
}

#[test]
fn what_is_read_without_batches_is_the_same() {
    let Some(mut maps) = maps(&CAPACITY) else { return };
    let wanted: Vec<_> = (1..40_u16).map(|number| (key(number), u32::from(number))).collect();
    maps.batches = Batches::without_support();
    assert!(maps.insert_frontends(&wanted).iter().all(Result::is_ok));
    assert_eq!(maps.calls(), 39);
    let mut keys = Vec::new();
    let mut next = maps.frontend.next_key(None).unwrap();
    while let Some(key) = next {
        next = maps.frontend.next_key(Some(&key)).unwrap();
        keys.push(FrontendKey::from_bytes(&key.try_into().unwrap()).unwrap());
    }
    keys.sort();
    let should: Vec<_> = wanted.iter().map(|(key, _)| *key).collect();
    assert_eq!(keys, should);
    let (tables, problems) = restore(&maps.read_all().unwrap(), CAPACITY);
    assert_eq!((tables.frontends().count(), problems.len()), (39, 78), "no entry and no owner for any");
}

#[test]
fn a_first_load_takes_three_calls_and_a_changed_endpoint_none() {
    let large = Capacity { frontends: 1_000, backends: 8_192, addresses: 1_000, ..CAPACITY };
    let Some(mut maps) = maps(&large) else { return };
    if !probe_batches().unwrap() {
        println!("skipped: this kernel has no batches");
        return;
    }
    let plain = |number: u16, endpoints: u16| {
        let (key, mut wanted) = service(number, endpoints);
        let frontend = &mut wanted.ports[0].frontends[0];
        (frontend.inside.options, frontend.outside.options) = (0, 0);
        (key, wanted)
    };
    let mut reconciler = Reconciler::new(Tables::new(large));
    reconciler.want_all((0..1_000).map(|number| plain(number, 4)).collect(), now());
    let report = reconciler.run(&mut maps, now());
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    assert_eq!(report.calls, 3, "counters, frontends, addresses");

    let (key, wanted) = plain(500, 5);
    reconciler.want(BTreeMap::from([(key, Some(wanted))]), now());
    let report = reconciler.run(&mut maps, now());
    assert_eq!((report.calls, report.counts.backends), (0, 5));
}
