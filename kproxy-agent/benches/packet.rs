//! What the packet programs cost: nanoseconds of each on its main paths, under BPF_PROG_TEST_RUN, less those of a
//! program that does nothing; and how many instructions are run there.
//!
//! `cargo bench --profile dev -p kproxy-agent --bench packet` (the kernel measures, and the programs are optimised in every
//! profile); needs root, and KPROXY_TEST_OBJECT from `cargo xtask build` for the
//! program that does nothing.

#[path = "../tests/packets/answers.rs"]
mod answers;
#[path = "../tests/packets/cluster.rs"]
#[expect(dead_code, reason = "the tests use all of it")]
mod cluster;
#[path = "../tests/packets/frame.rs"]
#[expect(dead_code, reason = "the tests use all of it")]
mod frame;
mod machine;
#[path = "../tests/support/map_fds.rs"]
mod map_fds;
#[path = "../tests/packets/world.rs"]
#[expect(dead_code, reason = "the tests use all of it")]
mod world;

use aya::{
    Ebpf,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use kproxy::programs::{OBJECT, Programs};
use kproxy_common::{PacketVerdict, Protocol};
use serde_json::json;

use cluster::{Family, Port, Ports, Service, Who};
use frame::{ACK, Frame, Link, PSH, SYN};
use machine::Machine;
use map_fds::fd_of;
use world::{Action, At, Device, ROOM, World, context, device, in_world, program};

/// Rounds of which the median is taken; in each, every path has its turn.
const ROUNDS: usize = 41;
/// Runs a round where the packet comes out as it came in, or comes back after two.
const REPEAT: u32 = 20_000;
/// First packets a round: each from a port of its own.
const FIRST: u16 = 300;

const CLIENT: Who = Who::Here(5);

/// One way through one program.
struct Path {
    what: String,
    at: At,
    packets: Packets,
    /// Nanoseconds of each round.
    times: Vec<f64>,
}

enum Packets {
    /// The same again and again.
    Same(Vec<u8>),
    /// Each from another port than any before.
    First { protocol: Protocol, family: Family, to: (Who, u16), then: Option<At> },
}

fn main() {
    // `cargo test --benches` runs this too, and wants to know only that it builds.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let Some(object) = std::env::var_os("KPROXY_TEST_OBJECT") else {
        println!("skipped: KPROXY_TEST_OBJECT does not name the test object; `cargo xtask build` makes it");
        return;
    };
    let object = std::fs::read(object).expect("the test object can be read");
    in_world(ROOM, |world| {
        let mut nothing = Ebpf::load(&object).expect("the test object loads");
        let nothing: &mut SchedClassifier = nothing.program_mut("empty").unwrap().try_into().unwrap();
        nothing.load().expect("the empty program loads");
        measure(world, nothing);
    });
}

fn measure(world: &mut World, nothing: &SchedClassifier) {
    world.have(&services());
    let mut paths = paths(world);
    let mut machine = Machine::new(OBJECT);
    let mut port = 1_024;
    let counts: Vec<String> =
        paths.iter().map(|path| path.instructions(world, &mut machine, &mut port)).collect();
    let (mut empty_loop, mut empty_loop_again, mut empty_once) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let packet = foreign(Family::V4).bytes();
        empty_loop.push(run(nothing, &packet, REPEAT));
        for path in &mut paths {
            let time = path.round(world, &mut port);
            path.times.push(time);
        }
        empty_loop_again.push(run(nothing, &packet, REPEAT));
        empty_once.push(median(&mut (0..FIRST).map(|_| run(nothing, &packet, 1)).collect::<Vec<_>>()));
    }
    let (looped, again, once) =
        (median(&mut empty_loop), median(&mut empty_loop_again), median(&mut empty_once));
    println!("load of the machine: {}", std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim());
    println!("an empty program, in a loop: {looped:.0} ns, again: {again:.0} ns; alone: {once:.0} ns");
    println!("{:<15} {:<52} {:>8}  instructions run", "program", "packet", "ns");
    for (path, instructions) in paths.iter_mut().zip(&counts) {
        let less = if matches!(path.packets, Packets::Same(_)) { looped } else { once };
        let time = median(&mut path.times) - less;
        let program = program(path.measured_at(), Link::Ethernet);
        println!("{program:<15} {:<52} {time:>8.0}  {instructions}", path.what);
    }
    println!();
    println!("{:<15} {:>10} {:>10}", "program", "loaded", "walked");
    let programs = Programs::load_unpinned(&ROOM).expect("the programs load");
    for (name, loaded, walked) in programs.sizes() {
        println!("{name:<15} {loaded:>10} {:>10}", walked.unwrap_or(0));
    }
}

/// Service 1 has itself as its backend, its two ports each leading to the other: a packet that is translated is again
/// one of a known flow, as often as a test run repeats. Service 2 is an ordinary one, service 3 is passed through.
fn services() -> Vec<Service> {
    let port = |port, node_port, target, protocol| Port { port, node_port, target, protocol };
    let mut mirror = Service::new(1, &[Who::ClusterIp(1)]);
    mirror.ports = vec![
        port(80, 30_001, 81, "TCP"),
        port(81, 30_002, 80, "TCP"),
        port(80, 30_001, 81, "UDP"),
        port(81, 30_002, 80, "UDP"),
    ];
    vec![
        mirror,
        Service::new(2, &[Who::There(1), Who::There(2)]),
        Service::new(3, &[Who::There(1)]).with_annotations(json!({"kproxy.io/pass-through": "true"})),
        Service::new(4, &[Who::There(1), Who::There(2)]).with_spec(json!({"sessionAffinity": "ClientIP"})),
    ]
}

fn paths(world: &mut World) -> Vec<Path> {
    let (pod, uplink, out) = (At::In(Device::Pod), At::In(Device::Uplink), At::Out(Device::Pod));
    let mut paths = Vec::new();
    let mut same = |what: &str, at, packet: Frame| {
        paths.push(Path {
            what: what.to_owned(),
            at,
            packets: Packets::Same(packet.bytes()),
            times: Vec::new(),
        });
    };
    for family in [Family::V4, Family::V6] {
        let tcp = |from, to, flags| Frame::of(Protocol::Tcp, Link::Ethernet, from, to, flags);
        let (here, there) = (CLIENT.at(family, 40_000), Who::There(9).at(family, 443));
        for at in [pod, uplink, out] {
            let (from, to) = if at == pod { (here, there) } else { (there, here) };
            same(&format!("not ours, TCP under way, {family:?}"), at, tcp(from, to, ACK | PSH));
            same(&format!("not ours, TCP SYN, {family:?}"), at, tcp(from, to, SYN));
            same(
                &format!("not ours, UDP, {family:?}"),
                at,
                Frame::of(Protocol::Udp, Link::Ethernet, from, to, 0),
            );
        }
        let left = Who::LoadBalancer(3).at(family, 80);
        same(&format!("pass-through, TCP SYN, {family:?}"), pod, tcp(here, left, SYN));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let client = CLIENT.at(family, 20_000);
            for port in [80, 81] {
                let frontend = Who::ClusterIp(1).at(family, port);
                let first = Frame::of(protocol, Link::Ethernet, client, frontend, SYN);
                let (_, sent) = world.meet(pod, Link::Ethernet, &first);
                let backend = sent.expect("it goes on").destination();
                let answer = Frame::of(protocol, Link::Ethernet, backend, client, SYN | ACK);
                let (verdict, _) = world.meet(out, Link::Ethernet, &answer);
                assert!(matches!(verdict, PacketVerdict::SetSource { .. }), "{verdict:?}");
            }
            let frontend = Who::ClusterIp(1).at(family, 80);
            let request = Frame::of(protocol, Link::Ethernet, client, frontend, ACK | PSH);
            let (verdict, sent) = world.meet(pod, Link::Ethernet, &request);
            assert!(matches!(verdict, PacketVerdict::SetDestination { .. }), "{verdict:?}");
            let (verdict, _) = world.meet(pod, Link::Ethernet, &sent.expect("it goes on"));
            assert!(
                matches!(verdict, PacketVerdict::SetDestination { .. }),
                "it is not its own mirror: {verdict:?}"
            );
            same(&format!("known flow, request, {protocol:?}, {family:?}"), pod, request);
            let reply = Frame::of(protocol, Link::Ethernet, frontend, client, ACK | PSH);
            same(&format!("known flow, reply, {protocol:?}, {family:?}"), out, reply);
        }
    }
    for family in [Family::V4, Family::V6] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let ports = Ports::of(protocol);
            let (port, node_port) = (ports.port, ports.node_port(2));
            let mut first = |what: &str, at, to, then| {
                let what = format!("{what}, {protocol:?}, {family:?}");
                let packets = Packets::First { protocol, family, to, then };
                paths.push(Path { what, at, packets, times: Vec::new() });
            };
            first("first packet to a ClusterIP", pod, (Who::ClusterIp(2), port), None);
            first("first packet, with affinity", pod, (Who::ClusterIp(4), port), None);
            first("first packet to a NodePort, to be masked", uplink, (Who::Node, node_port), None);
            let masked = Some(At::Out(Device::Uplink));
            first("the same as it leaves: a port is found", uplink, (Who::Node, node_port), masked);
        }
    }
    paths
}

impl Path {
    /// How many instructions are run, of each program on the way. The kernel makes the same of the same packet.
    fn instructions(&self, world: &mut World, machine: &mut Machine, port: &mut u16) -> String {
        let at = self.measured_at();
        let bytes = match &self.packets {
            Packets::Same(bytes) => bytes.clone(),
            Packets::First { then, .. } => {
                let first = self.first(port).expect("it has first packets");
                if then.is_some() { world.run(self.at, Link::Ethernet, &first).bytes } else { first }
            }
        };
        let object = world.object();
        machine.copy(|name| fd_of(object, name).expect("the map is there"));
        let ran = machine.run(program(at, Link::Ethernet), &bytes, world.index(device(at)));
        let outcome = world.run(at, Link::Ethernet, &bytes);
        assert_eq!(
            (Action::of(ran.action), ran.bytes),
            (Some(outcome.action), outcome.bytes),
            "{}",
            self.what
        );
        let total: u64 = ran.instructions.iter().map(|(_, count)| count).sum();
        let parts: Vec<_> = ran.instructions.iter().map(|(name, count)| format!("{count} {name}")).collect();
        format!("{total:>5} = {}", parts.join(" + "))
    }

    /// A first packet, from a port of its own.
    fn first(&self, port: &mut u16) -> Option<Vec<u8>> {
        let Packets::First { protocol, family, to, .. } = &self.packets else {
            return None;
        };
        let client = if self.at == At::In(Device::Pod) { CLIENT } else { Who::Client(1) };
        *port = port.checked_add(1).unwrap_or(1_024);
        let (from, to) = (client.at(*family, *port), to.0.at(*family, to.1));
        Some(Frame::of(*protocol, Link::Ethernet, from, to, SYN).bytes())
    }

    /// The hook whose time counts.
    fn measured_at(&self) -> At {
        match &self.packets {
            Packets::First { then: Some(then), .. } => *then,
            Packets::First { then: None, .. } | Packets::Same(_) => self.at,
        }
    }

    /// Nanoseconds a packet.
    fn round(&mut self, world: &mut World, port: &mut u16) -> f64 {
        match &self.packets {
            Packets::Same(bytes) => {
                let index = world.index(match self.at {
                    At::In(device) | At::Out(device) => device,
                });
                let program = world.program(self.at, Link::Ethernet);
                run_on(program, bytes, REPEAT, index)
            }
            Packets::First { then, .. } => {
                let then = *then;
                let mut times = Vec::new();
                for _ in 0..FIRST {
                    let Some(packet) = self.first(port) else { continue };
                    let (time, bytes) = once(world, self.at, &packet);
                    let time = then.map_or(time, |then| once(world, then, &bytes).0);
                    times.push(time);
                }
                median(&mut times)
            }
        }
    }
}

fn once(world: &mut World, at: At, bytes: &[u8]) -> (f64, Vec<u8>) {
    let device = match at {
        At::In(device) | At::Out(device) => device,
    };
    let index = world.index(device);
    let mut out = [0; 256];
    let result = world
        .program(at, Link::Ethernet)
        .test_run(TestRunOptions {
            data_in: Some(bytes),
            data_out: Some(&mut out),
            ctx_in: Some(&context(index)),
            ..TestRunOptions::new()
        })
        .expect("it runs");
    (result.duration.as_nanos() as f64, out[..result.data_size_out as usize].to_vec())
}

fn run(program: &SchedClassifier, bytes: &[u8], repeat: u32) -> f64 {
    run_on(program, bytes, repeat, 1)
}

fn run_on(program: &SchedClassifier, bytes: &[u8], repeat: u32, index: u32) -> f64 {
    let options = TestRunOptions {
        data_in: Some(bytes),
        ctx_in: Some(&context(index)),
        repeat,
        ..TestRunOptions::new()
    };
    program.test_run(options).expect("it runs").duration.as_nanos() as f64
}

fn foreign(family: Family) -> Frame {
    Frame::of(Protocol::Udp, Link::Ethernet, CLIENT.at(family, 1), Who::Elsewhere.at(family, 1), 0)
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
