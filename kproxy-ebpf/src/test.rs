//! For tests only: the decision behind classifiers that BPF_PROG_TEST_RUN can run. Never attached.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "an atomic add has no stable form on this target")]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "a key that is passed by value is copied to the stack, which has no room for it"
)]

#[expect(dead_code, reason = "of packets these here decide nothing")]
mod kernel;
mod keys;
#[expect(dead_code, reason = "the maps are those of the programs, of which these here use some")]
mod maps;

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_UNSPEC},
    btf_maps::{Array, PerCpuArray},
    helpers::{bpf_get_prandom_u32, bpf_get_smp_processor_id},
    macros::{btf_map, classifier},
    programs::TcContext,
};
use kernel::KERNEL;
use keys::Entry;
use kproxy_common::{
    Action, Address, Choice, Client, ClientKind, Connection, Conversation, Ends, FlowState, FlowTables as _,
    Protocol, Resolution, Role, Tables as _, choose, resolve,
};

/// A connection to decide about. 64 octets, as the test writes them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Question {
    client: Address,
    destination: Address,
    netns_cookie: u64,
    client_kind: u32,
    port: u32,
    protocol: u32,
    pick: u32,
    _pad: [u32; 2],
}

/// What was decided. 48 octets, as the test reads them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Answer {
    backend: Address,
    /// 1 pass, 2 reject, 3 drop, 4 balance with a backend, 5 balance without one.
    verdict: u32,
    reason: u32,
    number: u32,
    slot: u32,
    port: u32,
    _pad: [u32; 3],
}

#[btf_map(name = "question")]
static QUESTION: Array<Question, 1> = Array::new();
#[btf_map(name = "answer")]
static ANSWER: Array<Answer, 1> = Array::new();

/// What [`read_stress`] saw, in this order: right answers, misses of a frontend that was there all along,
/// backends of another Service, torn backends, empty answers.
#[btf_map(name = "seen")]
static SEEN: PerCpuArray<u64, 5> = PerCpuArray::new();

/// How many flows hold each of the ports that [`hold_stress`] asks for, as their processors say.
#[btf_map(name = "holders")]
static HOLDERS: Array<u64, PORTS> = Array::new();

/// What [`hold_stress`] saw, in this order: ports that were given out, asked for in vain, held by two flows at a time,
/// and held by one whose entry was not there or another's.
#[btf_map(name = "holds")]
static HOLDS: PerCpuArray<u64, 4> = PerCpuArray::new();

/// As few as there can be, for every processor to want the same.
const PORTS: usize = 2;

/// Answers the question.
#[classifier]
pub fn decide(_ctx: TcContext) -> i32 {
    if let (Some(question), Some(answer)) = (QUESTION.get(0), ANSWER.get_ptr_mut(0))
        && let Some(decided) = answer_of(question)
    {
        // SAFETY: the pointer is to the map's element, valid for the program's run.
        unsafe { *answer = decided };
    }
    TC_ACT_OK
}

/// Asks for one of 64 frontends, `10.96.0.<i>:80`, whose backends all have the port `1000 + i` and addresses
/// that end in `<i>`, and counts what it gets.
#[classifier]
pub fn read_stress(_ctx: TcContext) -> i32 {
    // SAFETY: the helper has no conditions.
    let (which, pick) = unsafe { (bpf_get_prandom_u32() & 63, bpf_get_prandom_u32()) };
    let connection = Connection {
        client: Client { kind: ClientKind::Pod, address: Address::UNSPECIFIED, netns_cookie: 1 },
        destination: Address::from_v4_word((0x0a60_0000 | which).to_be()),
        port: 80,
        protocol: Protocol::Tcp,
    };
    let seen = match resolve(&KERNEL, &connection) {
        Resolution::Balance(balance) => match choose(&KERNEL, &balance, &connection.client, pick) {
            Some(Choice { backend, .. }) => {
                let (port, end) =
                    (u32::from(backend.port()), u32::from_be(backend.address().v4_word()) & 0xff);
                if port == 1_000 + which && end == which {
                    0
                } else if port == 1_000 + end {
                    2
                } else {
                    3
                }
            }
            None => 4,
        },
        _ => 1,
    };
    if let Some(count) = SEEN.get_ptr_mut(seen) {
        // SAFETY: the element is this CPU's, and the pointer valid for the program's run.
        unsafe { *count += 1 };
    }
    TC_ACT_OK
}

/// A flow asks for one of two ports of a mask towards one backend; if it gets it, it is established, ends, and leaves
/// its entry behind; or it is never answered, and swept; or its entry is evicted, and it is established and ends all the
/// same. All on one processor, while others do the same.
#[classifier]
pub fn hold_stress(_ctx: TcContext) -> i32 {
    // SAFETY: the helpers have no conditions.
    let (dice, processor) = unsafe { (bpf_get_prandom_u32(), bpf_get_smp_processor_id()) };
    let port = dice & (PORTS as u32 - 1);
    KERNEL.with_new(|whole| {
        hold_port(whole, dice, processor, port);
        0
    });
    TC_ACT_OK
}

#[inline(always)]
fn hold_port(whole: &mut Conversation, dice: u32, processor: u32, port: u32) {
    *whole = Conversation::EMPTY;
    whole.client = Address::from_v4_word(1 + processor);
    whole.backend = Address::from_v4_word(u32::MAX);
    whole.mask = Address::from_v4_word(u32::MAX - 1);
    (whole.client_port, whole.inner_port) = (20_000, 20_000);
    whole.mask_port = 61_000 + port as u16;
    // While it lives it must not be taken for one that has been silent for too long, however long the machine runs.
    whole.last_seen = KERNEL.now();
    if !KERNEL.act(whole, Role::Return, Action::Take { rest: 0 }) {
        hold(1);
        return;
    }
    hold(0);
    if holders(port, 1) != 1 {
        hold(2);
    }
    check_held(whole);
    if dice & 0x100 == 0 {
        holders(port, u64::MAX);
        if let Some(entry) = Entry::of(whole, Role::Return) {
            let _ = maps::FLOW_TRANSIENT.remove(&*entry.key);
        }
        return;
    }
    if dice & 0xe00 == 0 {
        // Evicted, it holds nothing, and does not know.
        holders(port, u64::MAX);
        if let Some(entry) = Entry::of(whole, Role::Return) {
            let _ = maps::FLOW_TRANSIENT.remove(&*entry.key);
        }
        if dice & 0x1000 == 0 {
            whole.state = FlowState::Established;
            KERNEL.act(whole, Role::Return, Action::Establish);
        }
        whole.ends = Ends::RESET;
        KERNEL.act(whole, Role::Return, Action::End);
        return;
    }
    whole.state = FlowState::Established;
    KERNEL.act(whole, Role::Return, Action::Establish);
    check_held(whole);
    holders(port, u64::MAX);
    whole.ends = Ends::RESET;
    KERNEL.act(whole, Role::Return, Action::End);
}

#[inline(always)]
fn check_held(whole: &Conversation) {
    if KERNEL.occupant(whole, Role::Return).is_none_or(|entry| entry.address != whole.client) {
        hold(3);
    }
}

#[inline(always)]
fn hold(what: u32) {
    if let Some(count) = HOLDS.get_ptr_mut(what) {
        // SAFETY: the element is this CPU's, and the pointer valid for the program's run.
        unsafe { *count += 1 };
    }
}

/// Adds to the holders of a port; how many there are then.
#[inline(always)]
fn holders(port: u32, more: u64) -> u64 {
    let Some(holders) = HOLDERS.get_ptr_mut(port) else {
        return 0;
    };
    // SAFETY: the pointer is valid for the program's run; all add to it atomically.
    unsafe {
        core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(
            holders, more,
        );
        core::ptr::read_volatile(holders)
    }
}

/// Nothing: what a test run itself costs.
#[classifier]
pub fn empty(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[inline(always)]
fn answer_of(question: &Question) -> Option<Answer> {
    let connection = Connection {
        client: Client {
            kind: match question.client_kind {
                0 => ClientKind::Pod,
                1 => ClientKind::Host,
                _ => ClientKind::Outside,
            },
            address: question.client,
            netns_cookie: question.netns_cookie,
        },
        destination: question.destination,
        port: question.port as u16,
        protocol: Protocol::try_from(question.protocol as u8).ok()?,
    };
    let mut answer = Answer {
        backend: Address::UNSPECIFIED,
        verdict: 0,
        reason: 0,
        number: u32::MAX,
        slot: 0,
        port: 0,
        _pad: [0; 3],
    };
    let mut refuse = |verdict, reason, number: Option<u32>| {
        answer.verdict = verdict;
        answer.reason = reason as u32;
        answer.number = number.unwrap_or(u32::MAX);
    };
    match resolve(&KERNEL, &connection) {
        Resolution::Pass { reason, number } => refuse(1, reason, number),
        Resolution::Reject { reason, number } => refuse(2, reason, number),
        Resolution::Drop { reason, number } => refuse(3, reason, number),
        Resolution::Balance(balance) => {
            answer.number = balance.number;
            match choose(&KERNEL, &balance, &connection.client, question.pick) {
                Some(Choice { backend, slot }) => {
                    answer.verdict = 4;
                    answer.backend = backend.address();
                    answer.port = u32::from(backend.port());
                    answer.slot = slot;
                }
                None => answer.verdict = 5,
            }
        }
    }
    Some(answer)
}

/// Helpers for packets and sockets are open to GPL-compatible programs only.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier would refuse a program that could get here and not return.
    loop {}
}
