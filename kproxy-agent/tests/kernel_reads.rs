//! A program reads on one CPU while the agent's own code rewrites the tables as fast as it can on another: it
//! never sees another Service's backend, half of one, or a miss of a frontend that was there all along.

#[path = "support/map_fds.rs"]
mod map_fds;
#[path = "support/test_object.rs"]
mod test_object;

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

use aya::{
    maps::PerCpuArray,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use kproxy::{
    maps::{Reconciler, kernel::KernelMaps},
    wanted::{
        PassThroughRule, ServiceKey, WantedBackend, WantedFrontend, WantedPort, WantedService, WantedSide,
    },
};
use kproxy_common::{
    Address, BackendState, FrontendKey, FrontendKind, Location, Mode, Protocol, ServiceKind, TrafficPolicy,
};
use map_fds::fd_of;

/// The reader goes on until it has made this many reads, and the writer this many writes meanwhile: which of the
/// two is the faster one depends on the machine.
const READS: u64 = 10_000_000;
const WRITES: u64 = 20_000;
const READS_A_CALL: u32 = 500_000;
/// A hundred times what a loaded machine takes.
const PATIENCE: Duration = Duration::from_secs(300);
/// As `read_stress` in the test object has it.
const STANDING: u32 = 64;

#[test]
fn a_reader_never_sees_half_of_a_change() {
    let Some(mut ebpf) = test_object::load() else { return };
    let mut maps = KernelMaps::from_fds(|name| fd_of(&ebpf, name)).unwrap();
    let (tables, problems) = maps.restore().unwrap();
    assert!(problems.is_empty(), "{problems:?}");
    let mut reconciler = Reconciler::new(tables);
    let all = (0..STANDING).map(|which| (key(which), service(which, 1 + which % 7))).collect();
    reconciler.want_all(all, SystemTime::now());
    let report = reconciler.run(&mut maps, SystemTime::now());
    assert!(report.failed.is_empty(), "{:?}", report.failed);

    let program: &mut SchedClassifier = ebpf.program_mut("read_stress").unwrap().try_into().unwrap();
    program.load().unwrap();
    let (done, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let graces = thread::scope(|scope| {
        let writer = scope.spawn(|| rewrite(&mut reconciler, &mut maps, &written, &done));
        let deadline = Instant::now() + PATIENCE;
        let mut reads = 0;
        let enough = |reads| reads >= READS && written.load(Ordering::Relaxed) >= WRITES;
        let mut outcome = Ok(());
        while outcome.is_ok() && !enough(reads) && !writer.is_finished() && Instant::now() < deadline {
            outcome = read(program);
            reads += u64::from(READS_A_CALL);
        }
        // Before anything can fail here: the scope ends only when the writer does.
        done.store(true, Ordering::Relaxed);
        outcome.expect("the program runs");
        writer.join().unwrap()
    });
    let writes = written.into_inner();

    let seen: PerCpuArray<_, u64> = PerCpuArray::try_from(ebpf.map("seen").unwrap()).unwrap();
    let [right, missed, foreign, torn, empty] =
        [0, 1, 2, 3, 4].map(|index| seen.get(&index, 0).unwrap().iter().sum::<u64>());
    println!(
        "{right} reads right, {missed} missed, {foreign} of another Service, {torn} torn, {empty} empty, during \
         {writes} writes and {graces} grace periods"
    );
    assert!(right >= READS, "{right} reads");
    assert_eq!([missed, foreign, torn, empty], [0; 4]);
    assert!(writes >= WRITES, "only {writes} writes in {PATIENCE:?}: the writer is stuck");
}

fn read(program: &SchedClassifier) -> Result<(), aya::programs::ProgramError> {
    let packet = [0; 64];
    let options = TestRunOptions { data_in: Some(&packet), repeat: READS_A_CALL, ..TestRunOptions::new() };
    program.test_run(options).map(drop)
}

/// Other backends for standing Services, and others that come and go, until the reader is done. Returns
/// how many grace periods passed.
fn rewrite(
    reconciler: &mut Reconciler,
    maps: &mut KernelMaps,
    written: &AtomicU64,
    done: &AtomicBool,
) -> u64 {
    let (mut graces, mut round) = (0, 0_u32);
    while !done.load(Ordering::Relaxed) {
        round = round.wrapping_add(1);
        let mut changes = BTreeMap::new();
        for step in 0..24 {
            // An odd multiplier visits every Service, in an order that is no pattern of the slots.
            let which = round.wrapping_mul(24).wrapping_add(step).wrapping_mul(2_654_435_761) >> 26;
            changes.insert(key(which), Some(service(which, 1 + (round + step) % 40)));
        }
        for step in 0..8 {
            let which = STANDING + (round * 8 + step) % 128;
            let wanted = (round / 16).is_multiple_of(2).then(|| service(which, 1 + step));
            changes.insert(key(which), wanted);
        }
        reconciler.want(changes, SystemTime::now());
        let report = reconciler.run(maps, SystemTime::now());
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        let settled = reconciler.settle(maps, SystemTime::now());
        assert!(settled.failed.is_empty(), "{:?}", settled.failed);
        for counts in [report.counts, settled.counts] {
            written.fetch_add(counts.writes(), Ordering::Relaxed);
            graces += counts.graces;
        }
    }
    graces
}

fn key(which: u32) -> ServiceKey {
    ServiceKey { namespace: "stress".into(), name: format!("s{which}") }
}

fn address(word: u32) -> Address {
    Address::from(std::net::IpAddr::V4(word.into()))
}

/// `10.96.0.<which>:80`, whose backends have the port `1000 + which` and addresses that end in `which`.
fn service(which: u32, backends: u32) -> WantedService {
    let backends: Vec<WantedBackend> = (0..backends)
        .map(|index| WantedBackend {
            address: address(0x0ac8_0000 | index << 8 | which),
            port: (1_000 + which) as u16,
            location: Location::Remote,
            state: BackendState::Ready,
        })
        .collect();
    let count = backends.len() as u16;
    let side = WantedSide { offset: 0, count, mode: Mode::Forward, options: 0 };
    let frontend = WantedFrontend {
        key: FrontendKey::new(address(0x0a60_0000 | which), 80, Protocol::Tcp),
        kind: FrontendKind::ClusterIp,
        policy: TrafficPolicy::Cluster,
        inside: side,
        outside: side,
        source_ranges: Vec::new(),
        pass_through_rule: PassThroughRule::NotApplicable,
    };
    WantedService {
        key: key(which),
        kind: ServiceKind::ClusterIp,
        ports: vec![WantedPort {
            name: String::new(),
            protocol: Protocol::Tcp,
            affinity_timeout: 0,
            backends,
            in_sets: count,
            frontends: vec![frontend],
        }],
        addresses: Vec::new(),
    }
}
