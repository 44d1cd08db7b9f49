//! The loaded program and the decision on the host agree: the same tables, written by the agent's own code into the
//! kernel's maps and read there by a classifier that wraps the decision alone; the same questions, with affinity
//! that both remember for themselves.

use aya::Ebpf;
use aya::maps::Array;
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use kproxy::maps::Reconciler;
use kproxy::maps::kernel::KernelMaps;
use kproxy::plan::View;
use kproxy_common::{Address, Choice, Client, ClientKind, Connection, Resolution, choose, resolve};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config as Runs, TestRunner};

use crate::decision::{History, Stage, affine, first_affine, stage};
use crate::map_fds::fd_of;
use crate::{generate, test_object};

const HISTORIES: u32 = 150;
/// How often each question is asked.
const TURNS: u32 = 10;

/// As `Answer` in the test object, as far as it has a meaning.
#[derive(PartialEq, Eq, Debug)]
struct Answer {
    /// 1 pass, 2 reject, 3 drop, 4 balance with a backend, 5 balance without one.
    verdict: u32,
    /// Unless there is a backend.
    reason: u32,
    number: u32,
    backend: Option<(Address, u32, u32)>,
}

#[test]
fn the_loaded_program_decides_as_the_host() {
    let Some(mut ebpf) = test_object::load() else { return };
    let mut maps = Some(kernel_maps(&ebpf));
    let (tables, problems) = maps.as_mut().unwrap().restore().unwrap();
    assert!(problems.is_empty(), "{problems:?}");
    let mut reconciler = Some(Reconciler::new(tables));
    let mut program = Loaded::new(&mut ebpf);

    let mut runner = TestRunner::new(Runs { failure_persistence: None, ..Runs::default() });
    let histories = (generate::config(), stages());
    let (mut asked, mut forwarded, mut tables_written) = (0, 0, 0);
    let mut remembered: Option<View<'static>> = None;
    for _ in 0..HISTORIES {
        let (config, stages) = histories.new_tree(&mut runner).unwrap().current();
        let (before, writer) = (reconciler.take().unwrap(), maps.take().unwrap());
        let mut history = History::over(&config, before, writer);
        for (events, questions) in &stages {
            let written = history.write(events);
            history.writer().write_config(&written.config).unwrap();
            tables_written += 1;
            // Leaked, since what the host remembers outlives them all; a few megabytes.
            let tables = Box::leak(Box::new(written.tables));
            let view = match remembered.take() {
                Some(view) => view.over(tables).with_config(written.config),
                None => View::new(tables, written.config),
            };
            for (turn, (question, _, pick)) in
                (0..TURNS).flat_map(|turn| questions.iter().map(move |q| (turn, q)))
            {
                // Other dice each time, and mostly the same clients: an odd multiplier reaches every number.
                let pick = pick.wrapping_add(turn).wrapping_mul(2_654_435_761);
                let client = Client {
                    kind: question.behind,
                    address: question.client,
                    netns_cookie: match question.behind {
                        ClientKind::Outside => 0,
                        ClientKind::Pod | ClientKind::Host => u64::from(pick >> 8) % 3,
                    },
                };
                let (destination, port, protocol) = (question.destination, question.port, question.protocol);
                let connection = Connection { client, destination, port, protocol };
                let kernel = program.ask(&connection, pick);
                view.set_now(monotonic());
                let host = on_host(&view, &connection, pick);
                assert_eq!(
                    kernel, host,
                    "the kernel and the host differ about {connection:?} with {pick:#x}, {config:?}, {stages:#?}"
                );
                asked += 1;
                forwarded += u32::from(host.verdict == 4);
            }
            remembered = Some(view);
        }
        let (after, writer) = history.into_parts();
        (reconciler, maps) = (Some(after), Some(writer));
    }
    println!("{asked} questions over {tables_written} tables, {forwarded} of them to a backend");
    assert!(forwarded > 2_000, "only {forwarded} of {asked} questions led to a backend");
}

fn stages() -> impl Strategy<Value = Vec<Stage>> {
    let of_affinity = (first_affine(), vec(affine(), 1..4));
    prop_oneof![
        1 => vec(stage(), 1..4),
        1 => of_affinity.prop_map(|(first, then)| std::iter::once(first).chain(then).collect()),
    ]
}

/// The program, loaded, and the maps by which it is asked.
struct Loaded<'a> {
    program: &'a mut SchedClassifier,
    question: Array<aya::maps::MapData, [u8; 64]>,
    answer: Array<aya::maps::MapData, [u8; 48]>,
}

impl<'a> Loaded<'a> {
    fn new(ebpf: &'a mut Ebpf) -> Self {
        let question = Array::try_from(ebpf.take_map("question").unwrap()).unwrap();
        let answer = Array::try_from(ebpf.take_map("answer").unwrap()).unwrap();
        let program: &mut SchedClassifier = ebpf.program_mut("decide").unwrap().try_into().unwrap();
        program.load().unwrap();
        Self { program, question, answer }
    }

    fn ask(&mut self, connection: &Connection, pick: u32) -> Answer {
        let Connection { client, destination, port, protocol } = connection;
        let kind: u32 = match client.kind {
            ClientKind::Pod => 0,
            ClientKind::Host => 1,
            ClientKind::Outside => 2,
        };
        let mut bytes = [0; 64];
        bytes[..16].copy_from_slice(&client.address.octets());
        bytes[16..32].copy_from_slice(&destination.octets());
        bytes[32..40].copy_from_slice(&client.netns_cookie.to_ne_bytes());
        let words = [kind, u32::from(*port), *protocol as u32, pick];
        for (place, word) in bytes[40..56].chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        self.answer.set(0, [0; 48], 0).unwrap();
        self.question.set(0, bytes, 0).unwrap();
        let packet = [0; 64];
        self.program.test_run(TestRunOptions { data_in: Some(&packet), ..TestRunOptions::new() }).unwrap();
        let bytes = self.answer.get(&0, 0).unwrap();
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        let verdict = word(16);
        let address = Address::new(bytes[..16].try_into().unwrap());
        Answer {
            verdict,
            reason: if verdict == 4 { 0 } else { word(20) },
            number: word(24),
            backend: (verdict == 4).then(|| (address, word(32), word(28))),
        }
    }
}

fn on_host(view: &View<'_>, connection: &Connection, pick: u32) -> Answer {
    let refused = |verdict, reason, number: Option<u32>| Answer {
        verdict,
        reason: reason as u32,
        number: number.unwrap_or(u32::MAX),
        backend: None,
    };
    match resolve(view, connection) {
        Resolution::Pass { reason, number } => refused(1, reason, number),
        Resolution::Reject { reason, number } => refused(2, reason, number),
        Resolution::Drop { reason, number } => refused(3, reason, number),
        Resolution::Balance(balance) => {
            let choice = choose(view, &balance, &connection.client, pick);
            let backend =
                choice.map(|Choice { backend, slot }| (backend.address(), u32::from(backend.port()), slot));
            let verdict = if backend.is_some() { 4 } else { 5 };
            Answer { verdict, reason: 0, number: balance.number, backend }
        }
    }
}

fn kernel_maps(ebpf: &Ebpf) -> KernelMaps {
    KernelMaps::from_fds(|name| fd_of(ebpf, name)).unwrap()
}

/// What bpf_ktime_get_ns tells.
fn monotonic() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}
