//! A Service of 5,000 endpoints, some of which change: clients with affinity, and sockets that send, stay with their
//! backends as long as these are there, however often the others change in between.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::SystemTime;

use kproxy::maps::Reconciler;
use kproxy::maps::memory::Memory;
use kproxy::plan::{Capacity, Tables, View};
use kproxy::wanted::{
    PassThroughRule, ServiceKey, WantedBackend, WantedFrontend, WantedPort, WantedService, WantedSide,
};
use kproxy_common::{
    Address, BackendState, Client, ClientKind, Config, Connection, FrontendKey, FrontendKind, Location, Mode,
    Options, Protocol, Resolution, ServiceKind, SocketCall, SocketRecords, SocketVerdict, TrafficPolicy,
    choose, resolve, socket_connection,
};

const ENDPOINTS: u32 = 5_000;
const CLIENTS: u32 = 2_000;
const SOCKETS: u32 = 500;
const CAPACITY: Capacity = Capacity { frontends: 16, backends: 20_000, addresses: 16, source_ranges: 16 };

fn address(word: u32) -> Address {
    IpAddr::from(word.to_be_bytes()).into()
}

fn endpoint(number: u32) -> WantedBackend {
    WantedBackend {
        address: address(0x0af4_0000 + number),
        port: 8_080,
        location: Location::Remote,
        state: BackendState::Ready,
    }
}

/// With these endpoints.
fn service(endpoints: impl Iterator<Item = u32>, affinity: bool) -> WantedService {
    let backends: Vec<_> = endpoints.map(endpoint).collect();
    let count = u16::try_from(backends.len()).unwrap();
    let options = if affinity { Options::AFFINITY } else { 0 };
    let side = WantedSide { offset: 0, count, mode: Mode::Forward, options };
    WantedService {
        key: ServiceKey { namespace: "n".to_owned(), name: "large".to_owned() },
        kind: ServiceKind::ClusterIp,
        ports: vec![WantedPort {
            name: String::new(),
            protocol: Protocol::Udp,
            affinity_timeout: if affinity { 10_800 } else { 0 },
            backends,
            in_sets: count,
            frontends: vec![WantedFrontend {
                key: FrontendKey::new(address(0x0a60_0001), 53, Protocol::Udp),
                kind: FrontendKind::ClusterIp,
                policy: TrafficPolicy::Cluster,
                inside: side,
                outside: side,
                source_ranges: Vec::new(),
                pass_through_rule: PassThroughRule::NotApplicable,
            }],
        }],
        addresses: Vec::new(),
    }
}

fn connection(kind: ClientKind, client: Address) -> Connection {
    Connection {
        client: Client { kind, address: client, netns_cookie: 0 },
        destination: address(0x0a60_0001),
        port: 53,
        protocol: Protocol::Udp,
    }
}

/// Where each client, and each socket, is sent.
struct Asked {
    clients: BTreeMap<u32, Address>,
    sockets: Vec<(SocketRecords, Address)>,
    dice: u32,
}

impl Asked {
    fn roll(&mut self) -> u32 {
        self.dice = self.dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.dice
    }

    /// The clients of this share ask; nobody moves whose endpoint is there.
    fn ask(&mut self, view: &View<'_>, share: impl Fn(u32) -> bool, is_there: impl Fn(&Address) -> bool) {
        for number in (0..CLIENTS).filter(|number| share(*number)) {
            let asks = connection(ClientKind::Outside, address(0xc633_0000 + number));
            let Resolution::Balance(balance) = resolve(view, &asks) else { panic!("not balanced") };
            let choice = choose(view, &balance, &asks.client, self.roll()).unwrap();
            let goes = choice.backend.address();
            if let Some(before) = self.clients.insert(number, goes)
                && is_there(&before)
            {
                assert_eq!(goes, before, "the client {number} has moved");
            }
        }
    }

    fn send(&mut self, view: &View<'_>, share: impl Fn(u32) -> bool, is_there: impl Fn(&Address) -> bool) {
        for number in (0..SOCKETS).filter(|number| share(*number)) {
            let pick = self.roll();
            let (records, before) = &mut self.sockets[number as usize];
            let asks = connection(ClientKind::Pod, Address::UNSPECIFIED);
            let verdict = socket_connection(view, &asks, SocketCall::Send(Some(records)), || pick);
            let SocketVerdict::Translate { record, fresh } = verdict else { panic!("{verdict:?}") };
            assert!(!fresh || !is_there(before), "the socket {number} has moved");
            if fresh {
                records.insert(record);
            }
            *before = record.backend_address;
        }
    }
}

#[test]
fn nobody_moves_whose_endpoint_stays() {
    for affinity in [true, false] {
        let now = SystemTime::UNIX_EPOCH;
        let mut reconciler = Reconciler::new(Tables::new(CAPACITY));
        let mut memory = Memory::new(CAPACITY);
        let config = Config { udp_timeout: 30_000_000_000, ..Config::EMPTY };
        let first = service(0..ENDPOINTS, affinity);
        reconciler.want_all([(first.key.clone(), first)].into(), now);
        assert!(reconciler.run(&mut memory, now).failed.is_empty());

        let mut asked = Asked {
            clients: BTreeMap::new(),
            sockets: vec![(SocketRecords::new(), Address::UNSPECIFIED); SOCKETS as usize],
            dice: 1,
        };
        // Each change takes some away and adds one, so that all that are left stand elsewhere; most clients do not
        // ask in between.
        let ranges: Vec<_> = (0..6).map(|change| change * 7..ENDPOINTS + change).collect();
        let mut written = vec![reconciler.tables().clone()];
        for range in &ranges[1..] {
            let changed = service(range.clone(), affinity);
            reconciler.want([(changed.key.clone(), Some(changed))].into(), now);
            let report = reconciler.run(&mut memory, now);
            assert!(report.failed.is_empty(), "{:?}", report.failed);
            reconciler.settle(&mut memory, now);
            written.push(reconciler.tables().clone());
        }
        let mut view = View::new(&written[0], config);
        for (change, (tables, range)) in (0..).zip(written.iter().zip(&ranges)) {
            view = view.over(tables);
            let first = endpoint(range.start).address..=endpoint(range.end - 1).address;
            let is_there = |at: &Address| change > 0 && first.contains(at);
            let share = |number: u32| change == 0 || change == 5 || number % 5 == change;
            if affinity {
                asked.ask(&view, share, is_there);
            }
            asked.send(&view, share, is_there);
        }
    }
}
