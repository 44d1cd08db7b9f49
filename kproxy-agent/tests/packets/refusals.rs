//! Refusals of all sorts of packets.

use std::time::{Duration, Instant};

use aya::programs::{TestRun as _, TestRunOptions};
use kproxy_common::{PacketVerdict, Protocol, Reason};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

use crate::{
    cluster::{Family, Service, Who},
    frame::{Frame, Link, SYN},
    seldom,
    world::{Action, At, Device, ROOM, in_world},
};

/// Where packets are refused, and whose.
const PLACES: [(At, Who); 3] = [
    (At::In(Device::Pod), Who::Here(5)),
    (At::In(Device::Uplink), Who::Client(1)),
    (At::Out(Device::Uplink), Who::Node),
];

/// What is answered, [`crate::answers`] looks at.
#[test]
fn options_and_extension_headers_keep_nobody_from_being_refused() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[])]);
        for (at, who) in PLACES {
            for family in [Family::V4, Family::V6] {
                for link in Link::ALL {
                    if link == Link::Ip && at == At::In(Device::Pod) {
                        continue;
                    }
                    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                        let (from, to) = (who.at(family, 20_000), Who::ClusterIp(1).at(family, 81));
                        let plain = Frame::of(protocol, link, from, to, SYN);
                        for (number, length) in (0..seldom::COUNT).flat_map(|one| [(one, 16), (one, 1_000)]) {
                            let packet = plain.clone().with_payload(&vec![0x5a; length]);
                            let packet = seldom::headers(packet, number);
                            let (verdict, _) = world.meet(at, link, &packet);
                            let expected = match (at, protocol) {
                                (At::Out(_), Protocol::Sctp) => {
                                    PacketVerdict::Drop { reason: Reason::Unserved }
                                }
                                _ => PacketVerdict::Refuse { reason: Reason::UndefinedPort },
                            };
                            assert_eq!(verdict, expected, "{at:?} {family:?} {link:?} {protocol:?} {number}");
                        }
                    }
                }
            }
        }
    });
}

/// How many refusals a processor sends in a period, and how long that is, in nanoseconds as a power of two.
const LIMIT: u64 = 10_000;
const PERIOD: u32 = 30;
/// TC_ACT_REDIRECT.
const REDIRECT: u32 = 7;
/// Within this long a processor gets to send more than it may, on a loaded machine too.
const PATIENCE: Duration = Duration::from_secs(60);

/// The period of the clock that programs read.
fn period() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("there is a clock");
    (now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64) >> PERIOD
}

/// This thread runs on one of the processors that it may run on, as long as there are so many.
fn run_on(number: usize) -> bool {
    let this = Pid::from_raw(0);
    let all = sched_getaffinity(Pid::this()).expect("a process may ask");
    let mut allowed = (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu).unwrap_or(false));
    let Some(cpu) = allowed.nth(number) else {
        return false;
    };
    let mut one = CpuSet::new();
    one.set(cpu).expect("it is one of them");
    sched_setaffinity(this, &one).expect("a thread may choose");
    true
}

/// A flood is answered in part. What is not, is dropped and counted, on that processor and for the rest of that second.
#[test]
fn a_processor_refuses_so_many_a_second() {
    in_world(ROOM, |world| {
        world.have(&[Service::new(1, &[])]);
        assert!(run_on(0), "there is a processor");
        let at = At::In(Device::Pod);
        let (from, to) = (Who::Here(5).at(Family::V4, 20_000), Who::ClusterIp(1).at(Family::V4, 81));
        let packet = Frame::of(Protocol::Udp, Link::Ethernet, from, to, SYN).bytes();
        let (start, first) = (Instant::now(), period());
        let mut answered = 0;
        let program = world.program(at, Link::Ethernet);
        let options = || TestRunOptions { data_in: Some(&packet), ..TestRunOptions::new() };
        while program.test_run(options()).expect("it runs").return_value == REDIRECT {
            answered += 1;
            assert!(start.elapsed() < PATIENCE, "{answered} answered, none dropped");
        }
        let periods = period() - first + 1;
        assert!(answered >= LIMIT && answered <= LIMIT * periods, "{answered} in {periods} periods");
        assert_eq!(
            world.newly_counted(),
            [(Reason::UndefinedPort, answered), (Reason::RefusalsLimited, 1)],
            "in the order of their numbers"
        );
        // Nothing else is limited.
        let elsewhere =
            Frame::of(Protocol::Udp, Link::Ethernet, from, Who::Elsewhere.at(Family::V4, 81), SYN);
        assert_eq!(
            world.meet(at, Link::Ethernet, &elsewhere).0,
            PacketVerdict::Pass { reason: Reason::NotAService }
        );
        if run_on(1) {
            assert_eq!(world.run(at, Link::Ethernet, &packet).action, Action::Answer, "on another processor");
            run_on(0);
        }
        let start = Instant::now();
        while world.run(at, Link::Ethernet, &packet).action != Action::Answer {
            assert!(start.elapsed() < PATIENCE, "in the next period it is answered again");
        }
    });
}
