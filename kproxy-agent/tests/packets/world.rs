//! The loaded programs over maps that the agent's own code fills, and the same decision on the host, side by side.

use std::{
    collections::BTreeMap,
    mem::offset_of,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant, SystemTime},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, PerCpuArray, PerCpuValues, ProgramArray},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use kproxy::{
    flows::{Keeper, Serving, Step},
    maps::{
        Reconciler,
        kernel::{DeviceMap, FlowMaps, KernelMaps},
        memory::{FlowView, Flows},
    },
    model::{Change, Model, NodeConfig, parse},
    programs::{Capacities, DeviceMask, Programs},
    wanted::ServiceKey,
};
use kproxy_common::{
    Address, Behind, Cidr, Config, DeviceAddresses, Flow, FlowEnd, FlowKey, FlowStore as _, FlowTable, Hook,
    IcmpMeta, IcmpVerdict, MAX_CIDRS, NOTE_EVERY, PACKET_PARTS, PacketMeta, PacketVerdict, Protocol, Reason,
    elapsed, follow_fragment, map_names, on_egress, on_icmp, on_ingress, on_other_protocol,
};
use nix::{
    sched::{CloneFlags, CpuSet, sched_getcpu, sched_setaffinity, unshare},
    unistd::Pid,
};

use crate::{
    answers,
    cluster::{CLUSTER_CIDRS, Family, NODE_NAME, Ports, SERVICE_CIDRS, Service, Who},
    frame::{Frame, Link},
    map_fds::fd_of,
};

/// The first of the ports that clients are masked with, and how many there are.
pub const MASK_PORTS: (u16, u16) = (61_000, 4_000);

/// An interface of the namespace that tests run in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Device {
    /// Towards other nodes and the outside; it has the node's address.
    Uplink,
    /// Another such one, with an address of its own.
    Aside,
    /// Towards a pod of this node.
    Pod,
}

/// A hook: where a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum At {
    In(Device),
    Out(Device),
}

/// What a program said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    Next,
    Drop,
    /// Is sent back by the interface, as an answer.
    Answer,
}

impl Action {
    /// What a program's return value says, if it is one of ours.
    pub fn of(value: i32) -> Option<Self> {
        match value {
            -1 => Some(Self::Next),
            2 => Some(Self::Drop),
            7 => Some(Self::Answer),
            _ => None,
        }
    }
}

/// A packet after a program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    pub action: Action,
    pub bytes: Vec<u8>,
}

pub struct World {
    programs: Programs,
    maps: KernelMaps,
    model: Model,
    reconciler: Reconciler,
    config: Config,
    host: Flows,
    /// How far the host's clock is ahead of the programs'.
    ahead: Duration,
    devices: [u32; 3],
    is_synced: bool,
    /// The counters of verdicts, when they were last read.
    counted: BTreeMap<Reason, u64>,
    buffer: Vec<u8>,
}

/// Runs a test where it can be run: as root, in a network namespace that ends with it.
pub fn in_world(capacities: Capacities, test: impl FnOnce(&mut World) + Send) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: loading programs takes root");
        return;
    }
    std::thread::scope(|scope| {
        let run = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("root can make a network namespace");
            stay_on_one_cpu();
            test(&mut World::new(capacities));
        };
        if let Err(panic) = scope.spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// What programs keep for each CPU is kept in one place on the host.
fn stay_on_one_cpu() {
    let mut one = CpuSet::new();
    let cpu = sched_getcpu().expect("it is known where this runs");
    one.set(cpu).expect("it is one of those that there are");
    sched_setaffinity(Pid::from_raw(0), &one).expect("it is allowed to run there");
}

/// Enough for every test that is not about room.
pub const ROOM: Capacities =
    Capacities { frontends: 512, backends: 4_096, source_ranges: 4_096, flows: 65_536, affinity: 4_096 };

impl World {
    fn new(capacities: Capacities) -> Self {
        let devices = make_devices();
        let mut programs = Programs::load_unpinned(&capacities).expect("the programs load");
        let object = programs.object();
        let maps = KernelMaps::from_fds(|name| fd_of(object, name));
        let mut maps = maps.expect("the maps are what this version expects");
        let (tables, problems) = maps.restore().expect("the maps can be read");
        assert!(problems.is_empty(), "{problems:?}");
        let cidrs = |texts: [&str; 2]| texts.map(|text| parse::cidr(text).expect("a CIDR")).to_vec();
        let node = [Family::V4, Family::V6].map(|family| Address::from(Who::Node.ip(family)));
        let model = Model::new(NodeConfig {
            node_name: NODE_NAME.to_owned(),
            node_addresses: node.to_vec(),
            cluster_cidrs: cidrs(CLUSTER_CIDRS),
            service_cidrs: cidrs(SERVICE_CIDRS),
            local_addresses: node.into_iter().collect(),
            ..NodeConfig::default()
        });
        let table = |cidrs: Vec<Cidr>| {
            let mut table = [Cidr::NONE; MAX_CIDRS];
            for (place, cidr) in table.iter_mut().zip(cidrs) {
                *place = cidr;
            }
            table
        };
        let config = Config {
            host_netns_cookie: 1,
            udp_timeout: 180_000_000_000,
            hash_seed: [0x0bad_cafe, 0x0011_2233],
            loopback_node_ports: 1,
            routes_by_source: 0,
            remember_peer: 1,
            host_sockets_only: 0,
            some_opted_out: 0,
            mask_ports_first: MASK_PORTS.0.into(),
            mask_ports_count: MASK_PORTS.1.into(),
            reserved_ports_first: MASK_PORTS.0.into(),
            reserved_ports_count: 100,
            node_addresses: [Who::Node, Who::NodeAside]
                .into_iter()
                .flat_map(|who| [Family::V4, Family::V6].map(|family| Address::from(who.ip(family)).bit()))
                .fold(0, |bits, bit| bits | bit),
            udp_node_ports_first: Ports::of(Protocol::Udp).node_port(0),
            udp_node_ports_last: Ports::of(Protocol::Udp).node_port(u8::MAX),
            _pad: 0,
            service_cidrs: table(cidrs(SERVICE_CIDRS)),
            cluster_cidrs: table(cidrs(CLUSTER_CIDRS)),
        };
        maps.write_config(&config).expect("the configuration is written");
        let addresses = [Who::Node, Who::NodeAside, Who::Node];
        let addresses = devices.into_iter().zip(addresses);
        let of = |who: Who, family| Some(who.ip(family));
        let masks = addresses.clone().map(|(index, who)| {
            let (v4, v6) = (of(who, Family::V4), of(who, Family::V6));
            let leads_to_pods = index == devices[Device::Pod as usize];
            (index, DeviceMask { v4, v6, leads_to_pods, ..DeviceMask::default() })
        });
        programs.masks(&masks.collect()).expect("the interfaces' addresses are written");
        let mut host = Flows::default();
        host.devices = addresses
            .map(|(index, who)| {
                let of = |family| Address::from(who.ip(family));
                let behind =
                    if index == devices[Device::Pod as usize] { Behind::Pods } else { Behind::Outside };
                let (v4, v6) = (of(Family::V4), of(Family::V6));
                (index, DeviceAddresses { v4, v6, bridged_v4: 0, bridged_v6: 0, behind, _pad: [0; 3] })
            })
            .collect();
        Self {
            programs,
            maps,
            model,
            reconciler: Reconciler::new(tables),
            config,
            host,
            ahead: Duration::ZERO,
            devices,
            is_synced: false,
            counted: Reason::ALL.iter().map(|reason| (*reason, 0)).collect(),
            buffer: vec![0; 70_000],
        }
    }

    /// These Services are there now.
    pub fn have(&mut self, services: &[Service]) {
        self.apply(services.iter().flat_map(Service::changes));
    }

    /// These are gone.
    pub fn lose(&mut self, services: &[Service]) {
        self.apply(services.iter().flat_map(Service::gone));
    }

    fn apply(&mut self, changes: impl Iterator<Item = Change>) {
        changes.for_each(|change| self.model.apply(change));
        let update = self.model.recompute();
        assert_eq!(update.new_problems, [], "the cluster is as it should be");
        let now = SystemTime::now();
        if std::mem::replace(&mut self.is_synced, true) {
            self.reconciler.want(update.services, now);
        } else {
            let all = update.services.into_iter().filter_map(|(key, wanted)| Some((key, wanted?)));
            self.reconciler.want_all(all.collect(), now);
        }
        if let Some(node) = update.node {
            self.reconciler.want_node_addresses(node.node_port_addresses, now);
        }
        let report = self.reconciler.run(&mut self.maps, now);
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        self.reconciler.settle(&mut self.maps, now);
    }

    /// Clients are masked with these ports from now on: the first, and how many.
    pub fn use_mask_ports(&mut self, (first, count): (u16, u16)) {
        (self.config.mask_ports_first, self.config.mask_ports_count) = (first.into(), count.into());
        let reserved = (first.into(), u32::from(count).min(100));
        (self.config.reserved_ports_first, self.config.reserved_ports_count) = reserved;
        self.maps.write_config(&self.config).expect("the configuration is written");
    }

    /// Whether rules of the node route what backends send by its source.
    pub fn route_by_source(&mut self, is_on: bool) {
        self.config.routes_by_source = is_on.into();
        self.maps.write_config(&self.config).expect("the configuration is written");
    }

    /// The map `device`, for another thread to write.
    pub fn device_map(&self) -> DeviceMap {
        self.programs.device_map().expect("the map is in the object")
    }

    /// An interface of this namespace has this address, and sockets can have it.
    pub fn have_address(&self, device: Device, address: IpAddr) {
        let index = self.index(device);
        let name = nix::net::if_::if_indextoname(index).expect("the interface is there");
        let name = name.to_str().expect("it was named here");
        ip(&["link", "set", name, "up"]);
        // Without duplicate address detection, which there is nobody for.
        let flags: &[&str] = if address.is_ipv6() { &["nodad"] } else { &[] };
        ip(&[&["address", "add", &address.to_string(), "dev", name][..], flags].concat());
    }

    /// The host's decision is to know of these sockets; the programs see them.
    pub fn know_sockets(&mut self, bound: &[SocketAddr]) {
        self.host.sockets.extend(bound.iter().map(|socket| (socket.ip().into(), socket.port())));
    }

    pub fn index(&self, device: Device) -> u32 {
        self.devices[device as usize]
    }

    /// The programs and maps, as they are loaded.
    pub fn object(&mut self) -> &Ebpf {
        self.programs.object()
    }

    /// Runs a program on these bytes, and nothing else.
    pub fn run(&mut self, at: At, link: Link, bytes: &[u8]) -> Outcome {
        self.wait_for_one_opinion(at, link, bytes);
        let index = self.index(device(at));
        let program =
            self.programs.object().program(program(at, link)).expect("the program is in the object");
        let program: &SchedClassifier = program.try_into().expect("it is a classifier");
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(bytes),
                data_out: Some(&mut self.buffer),
                ctx_in: Some(&context(index)),
                ..TestRunOptions::new()
            })
            .unwrap_or_else(|error| panic!("{at:?} does not run on {bytes:02x?}: {error}"));
        let action = Action::of(result.return_value as i32)
            .unwrap_or_else(|| panic!("{at:?} returned {} for {bytes:02x?}", result.return_value));
        Outcome { action, bytes: self.buffer[..result.data_size_out as usize].to_vec() }
    }

    /// Where a moment decides what becomes of a packet, the program and the host, which are asked one after the other, can
    /// have two opinions: waits until it has passed for both.
    fn wait_for_one_opinion(&mut self, at: At, link: Link, bytes: &[u8]) {
        const BEFORE: u64 = NOTE_EVERY - 100_000_000;
        const AFTER: u64 = NOTE_EVERY + 20_000_000;
        let Ok(frame) = Frame::parse(link, bytes) else { return };
        let mut key = FlowKey::EMPTY;
        let hook = if matches!(at, At::In(_)) { Hook::Ingress } else { Hook::Egress };
        frame.meta().write_key(hook, &mut key);
        for table in FlowTable::BOTH {
            let seen = self.host.read(table, &key, |flow| flow.last_seen);
            let Some(age) = seen.map(|seen| elapsed(self.host_now(), seen)) else { continue };
            if (BEFORE..AFTER).contains(&age) {
                std::thread::sleep(Duration::from_nanos(AFTER - age));
            }
        }
    }

    /// The program at a hook.
    pub fn program(&mut self, at: At, link: Link) -> &SchedClassifier {
        let program =
            self.programs.object().program(program(at, link)).expect("the program is in the object");
        program.try_into().expect("it is a classifier")
    }

    /// Whether this kernel's test runs take a packet as long as this one; tried where no program changes it.
    pub fn can_run(&mut self, bytes: &[u8]) -> bool {
        let mut foreign = bytes.to_vec();
        foreign[12..14].fill(0);
        let program = self.program(At::Out(Device::Uplink), Link::Ethernet);
        program.test_run(TestRunOptions { data_in: Some(&foreign), ..TestRunOptions::new() }).is_ok()
    }

    /// What the host decides about this packet, having met all packets before.
    pub fn decide(&mut self, at: At, frame: &Frame) -> PacketVerdict {
        self.decide_about(at, &frame.meta())
    }

    /// The same, about what was read of it.
    pub fn decide_about(&mut self, at: At, meta: &PacketMeta) -> PacketVerdict {
        self.host.now = self.host_now();
        let view: FlowView<'_> = self.host.over(self.reconciler.tables(), &self.config);
        match at {
            At::In(device) => on_ingress(&view, meta, self.devices[device as usize]),
            At::Out(device) => on_egress(&view, meta, self.devices[device as usize]),
        }
    }

    /// What the host decides about a fragment with this identification, having met all packets before. It gives a later
    /// one its ports.
    pub fn decide_about_fragment(&mut self, at: At, meta: &mut PacketMeta, id: u32) -> PacketVerdict {
        self.host.now = self.host_now();
        let view: FlowView<'_> = self.host.over(self.reconciler.tables(), &self.config);
        let hook = if matches!(at, At::In(_)) { Hook::Ingress } else { Hook::Egress };
        match follow_fragment(&view, meta, hook, id) {
            Some(verdict) => verdict,
            None => self.decide_about(at, meta),
        }
    }

    /// What the host decides about a packet of a protocol without ports.
    pub fn decide_about_other(&mut self, destination: &Address) -> PacketVerdict {
        on_other_protocol(&self.host.over(self.reconciler.tables(), &self.config), destination)
    }

    /// What the host decides about an ICMP message, having met all packets before.
    pub fn decide_about_message(&self, at: At, meta: &IcmpMeta) -> IcmpVerdict {
        let hook = if matches!(at, At::In(_)) { Hook::Ingress } else { Hook::Egress };
        on_icmp(&self.host.over(self.reconciler.tables(), &self.config), meta, hook)
    }

    /// Lets the program and the host decide about this packet, both must agree to the last bit. The verdict, and
    /// the packet as it goes on, if it does.
    pub fn meet(&mut self, at: At, link: Link, frame: &Frame) -> (PacketVerdict, Option<Frame>) {
        let bytes = frame.bytes();
        let outcome = self.run(at, link, &bytes);
        let verdict = self.decide(at, frame);
        let about = || format!("{at:?} {link:?} {} to {}: {verdict:?}", frame.source(), frame.destination());
        let (action, expected, reason) = match verdict {
            PacketVerdict::Pass { reason } => (Action::Next, frame.clone(), reason),
            PacketVerdict::Drop { reason } => (Action::Drop, frame.clone(), reason),
            PacketVerdict::Refuse { reason } => (Action::Answer, frame.clone(), reason),
            PacketVerdict::SetDestination { address, port, client_port } => {
                let to = SocketAddr::new(address.into(), port);
                let mut frame = frame.clone().with_destination(to);
                if client_port != 0 {
                    let from = SocketAddr::new(frame.source().ip(), client_port);
                    frame = frame.with_source(from);
                }
                (Action::Next, frame, Reason::Forwarded)
            }
            PacketVerdict::SetSource { address, port, client_port } => {
                let from = SocketAddr::new(address.into(), port);
                let mut frame = frame.clone().with_source(from);
                if client_port != 0 {
                    let to = SocketAddr::new(frame.destination().ip(), client_port);
                    frame = frame.with_destination(to);
                }
                (Action::Next, frame, Reason::Forwarded)
            }
        };
        assert_eq!(outcome.action, action, "{}", about());
        if matches!(verdict, PacketVerdict::Pass { .. } | PacketVerdict::Drop { .. }) {
            assert_eq!(outcome.bytes, bytes, "{}", about());
        } else if matches!(verdict, PacketVerdict::Refuse { .. }) {
            if let Err(wrong) = answers::check_refusal(link, &bytes, &outcome.bytes) {
                panic!("{}: {wrong}: {:02x?}", about(), outcome.bytes);
            }
        } else if !expected.is(&outcome.bytes) {
            let read = Frame::read(link, &outcome.bytes);
            panic!("{}:\n{:02x?} expected\n{:02x?}, {read:?}", about(), expected.bytes(), outcome.bytes);
        }
        let counted = self.newly_counted();
        let is_counted = !matches!(reason, Reason::NotAService | Reason::NoFlow);
        assert_eq!(counted, Vec::from_iter(is_counted.then_some((reason, 1))), "{}", about());
        (verdict, (action == Action::Next).then_some(expected))
    }

    /// No packet was ever met.
    pub fn forget(&mut self) {
        for map in [map_names::FLOW, map_names::FLOW_TRANSIENT] {
            let map = self.programs.object().map_mut(map).expect("the map is in the object");
            let mut map: HashMap<_, [u8; 40], [u8; 64]> = HashMap::try_from(map).expect("it is a hash");
            let keys: Vec<[u8; 40]> = map.keys().collect::<Result<_, _>>().expect("it can be read");
            keys.iter().for_each(|key| map.remove(key).expect("it is there"));
        }
        let map = self.programs.object().map_mut("waiting").expect("the map is in the object");
        let mut waiting: PerCpuArray<_, [u64; 5]> = PerCpuArray::try_from(map).expect("one for each CPU");
        let cpus = aya::util::nr_cpus().expect("it is known how many CPUs there are");
        for index in 0..waiting.len() {
            let nobody = PerCpuValues::try_from(vec![[0; 5]; cpus]).expect("one for each CPU");
            waiting.set(index, nobody, 0).expect("it is there");
        }
        let map = self.programs.object().map_mut(map_names::FRAGMENT).expect("the map is in the object");
        let mut map: HashMap<_, [u8; 40], [u8; 16]> = HashMap::try_from(map).expect("it is a hash");
        let keys: Vec<[u8; 40]> = map.keys().collect::<Result<_, _>>().expect("it can be read");
        keys.iter().for_each(|key| map.remove(key).expect("it is there"));
        let map = self.programs.object().map_mut(map_names::MASQUERADED).expect("the map is in the object");
        let mut map: Array<_, u64> = Array::try_from(map).expect("it is an array");
        let set: Vec<u32> =
            (0..map.len()).filter(|index| map.get(index, 0).is_ok_and(|word| word != 0)).collect();
        set.iter().for_each(|index| map.set(*index, 0, 0).expect("it is in the array"));
        let devices = std::mem::take(&mut self.host.devices);
        self.host = Flows::default();
        self.host.devices = devices;
    }

    /// The same, and there is no Service.
    pub fn reset(&mut self) {
        self.forget();
        let services: Vec<_> = self.reconciler.tables().services().cloned().collect();
        let gone = services.into_iter().flat_map(|key| {
            let slices = ["v4", "v6"].map(|family| {
                let key = ServiceKey { name: format!("{}-{family}", key.name), ..key.clone() };
                Change::EndpointSlice(key, None)
            });
            [Change::Service(key, None)].into_iter().chain(slices)
        });
        self.apply(gone.collect::<Vec<_>>().into_iter());
    }

    /// How often each verdict was given since this was last asked, by its reason.
    pub fn newly_counted(&mut self) -> Vec<(Reason, u64)> {
        let reasons = self.maps.reasons().expect("the counters can be read");
        let reasons = reasons.into_iter().map(|(reason, cpus)| (reason, cpus.iter().sum())).collect();
        let before = std::mem::replace(&mut self.counted, reasons);
        let new = self.counted.iter().map(|(reason, count)| (*reason, count - before[reason]));
        new.filter(|(_, count)| *count != 0).collect()
    }

    /// Programs cannot go on in this part.
    pub fn take_part_out(&mut self, index: u32) {
        self.parts().clear_index(&index).expect("it is there");
    }

    /// They can again.
    pub fn put_part_back(&mut self, index: u32) {
        let program = self.programs.object().program(PACKET_PARTS[index as usize]);
        let program: &SchedClassifier =
            program.expect("it is in the object").try_into().expect("a classifier");
        let program = program.fd().and_then(|program| Ok(program.try_clone()?)).expect("it is loaded");
        self.parts().set(index, &program, 0).expect("it fits");
    }

    fn parts(&mut self) -> ProgramArray<&mut MapData> {
        let map = self.programs.object().map_mut(map_names::PROGRAMS).expect("the map is in the object");
        ProgramArray::try_from(map).expect("it is an array of programs")
    }

    /// All entries of flows.
    pub fn all_entries(&mut self) -> [BTreeMap<FlowKey, Flow>; 2] {
        [map_names::FLOW, map_names::FLOW_TRANSIENT].map(|map| self.entries(map))
    }

    /// The entries in `flow` or `flow_transient`.
    pub fn entries(&mut self, map: &'static str) -> BTreeMap<FlowKey, Flow> {
        let map = self.programs.object().map(map).expect("the map is in the object");
        let map: HashMap<_, [u8; 40], [u8; 64]> = HashMap::try_from(map).expect("it is a hash");
        map.iter().map(|entry| entry.expect("it can be read")).map(flow_of).collect()
    }

    /// So much time passes, in which no packet comes: all that was noted is so much older, however short the machine
    /// has been up.
    pub fn let_pass(&mut self, time: Duration) {
        for map in [map_names::FLOW, map_names::FLOW_TRANSIENT] {
            let map = self.programs.object().map_mut(map).expect("the map is in the object");
            let mut map: HashMap<_, [u8; 40], [u8; 64]> = HashMap::try_from(map).expect("it is a hash");
            let entries: Vec<([u8; 40], [u8; 64])> =
                map.iter().collect::<Result<_, _>>().expect("it can be read");
            for (key, mut flow) in entries {
                let (_, Flow { last_seen, .. }) = flow_of((key, flow));
                let earlier = last_seen.wrapping_sub(time.as_nanos() as u64);
                flow[offset_of!(Flow, last_seen)..].copy_from_slice(&earlier.to_ne_bytes());
                map.insert(key, flow, 0).expect("it is there");
            }
        }
        // The programs' clock cannot be set, the host's can.
        self.ahead += time;
    }

    /// Established flows that are there already say of their ends what these say.
    pub fn restore_ends(&mut self, like: &BTreeMap<FlowKey, Flow>) {
        self.edit(like, |flow, like| flow.ends = like.ends);
    }

    /// The clients of these established flows have finished.
    pub fn finish_clients(&mut self, flows: &BTreeMap<FlowKey, Flow>) {
        self.edit(flows, |flow, _| flow.ends.client = FlowEnd::Finished);
    }

    fn edit(&mut self, flows: &BTreeMap<FlowKey, Flow>, edit: impl Fn(&mut Flow, &Flow)) {
        let mut entries = self.entries(map_names::FLOW);
        let map = self.programs.object().map_mut(map_names::FLOW).expect("the map is in the object");
        let mut map: HashMap<_, [u8; 40], [u8; 64]> = HashMap::try_from(map).expect("it is a hash");
        for (key, like) in flows {
            let flow = entries.get_mut(key).expect("it is there");
            edit(flow, like);
            map.insert(key.to_bytes(), flow.to_bytes(), 0).expect("it is there");
            let is_changed = self.host.change(FlowTable::Established, key, |flow| {
                edit(flow, like);
                true
            });
            assert!(is_changed, "the host has it as well");
        }
    }

    /// The entry under this key makes room for others.
    pub fn evict(&mut self, evicted: &FlowKey) {
        self.host.evict(evicted);
        for map in [map_names::FLOW, map_names::FLOW_TRANSIENT] {
            let map = self.programs.object().map_mut(map).expect("the map is in the object");
            let mut map: HashMap<_, [u8; 40], [u8; 64]> = HashMap::try_from(map).expect("it is a hash");
            let entries: Vec<_> = map.iter().collect::<Result<_, _>>().expect("it can be read");
            for (key, flow) in entries {
                if flow_of((key, flow)).0 == *evicted {
                    map.remove(&key).expect("it is there");
                }
            }
        }
    }

    /// The agent sweeps the tables of flows, once from end to end; the host's lose what these do.
    pub fn sweep(&mut self) {
        let before = self.all_entries();
        self.sweep_maps();
        for (before, after) in before.into_iter().zip(self.all_entries()) {
            before.keys().filter(|key| !after.contains_key(key)).for_each(|key| self.host.evict(key));
        }
    }

    fn sweep_maps(&mut self) {
        let object = self.object();
        let maps = FlowMaps::from_fds(|name| fd_of(object, name));
        let mut now = Instant::now();
        let mut keeper = Keeper::over(maps.expect("the maps are what this version expects"), now);
        loop {
            now = keeper.next_step().max(now);
            let step = keeper.step(&Serving::default(), now, crate::world::now()).expect("it sweeps");
            if matches!(step, Step::Swept { table: FlowTable::Transient, .. }) {
                return;
            }
        }
    }

    /// Both tables of flows are the host's, and so is what they note of times, but for what a busy machine takes between
    /// one and the other.
    pub fn compare_ages(&mut self) {
        self.compare_flows();
        let (now, host_now) = (now(), self.host_now());
        let host: BTreeMap<FlowKey, Flow> =
            self.host.established().into_iter().chain(self.host.transient()).collect();
        for map in [map_names::FLOW, map_names::FLOW_TRANSIENT] {
            for (key, flow) in self.entries(map) {
                let (age, host_age) = (elapsed(now, flow.last_seen), elapsed(host_now, host[&key].last_seen));
                assert!(age.abs_diff(host_age) < 10_000_000_000, "{key:?}: {age}, on the host {host_age}");
            }
        }
    }

    fn host_now(&self) -> u64 {
        now() + self.ahead.as_nanos() as u64
    }

    /// Both tables of flows are the host's, but for times.
    pub fn compare_flows(&mut self) {
        let timeless = |entries: BTreeMap<FlowKey, Flow>| -> BTreeMap<FlowKey, Flow> {
            entries.into_iter().map(|(key, flow)| (key, Flow { last_seen: 0, ..flow })).collect()
        };
        assert_eq!(timeless(self.entries(map_names::FLOW)), timeless(self.host.established()));
        assert_eq!(timeless(self.entries(map_names::FLOW_TRANSIENT)), timeless(self.host.transient()));
    }
}

/// The program that runs at a hook.
pub fn program(at: At, link: Link) -> &'static str {
    match (at, link) {
        (At::In(_), Link::Ethernet) => "in_eth",
        (At::In(_), Link::Ip) => "in_ip",
        (At::Out(_), Link::Ethernet) => "out_eth",
        (At::Out(_), Link::Ip) => "out_ip",
    }
}

pub fn device(at: At) -> Device {
    match at {
        At::In(device) | At::Out(device) => device,
    }
}

/// Whether a test run takes it: not without a whole IP header behind where an Ethernet header ends. Such packets the
/// kernel's own receive path does not take either.
pub fn is_long_enough(bytes: &[u8]) -> bool {
    match bytes.get(12..14) {
        Some([0x08, 0x00]) => bytes.len() >= 14 + 20,
        Some([0x86, 0xdd]) => bytes.len() >= 14 + 40,
        kind => kind.is_some(),
    }
}

/// `struct __sk_buff` with an interface and nothing else.
pub fn context(index: u32) -> [u8; 192] {
    const IFINDEX: usize = 40;
    let mut context = [0; 192];
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&index.to_ne_bytes());
    context
}

fn flow_of((key, flow): ([u8; 40], [u8; 64])) -> (FlowKey, Flow) {
    (FlowKey::from_bytes(&key).expect("a key"), Flow::from_bytes(&flow).expect("an entry"))
}

fn now() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("there is a clock");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// Pairs of interfaces, of which the near ends are the node's.
fn make_devices() -> [u32; 3] {
    ["uplink", "aside", "pod"].map(|name| {
        ip(&["link", "add", name, "type", "veth", "peer", "name", &format!("{name}-far")]);
        nix::net::if_::if_nametoindex(name).expect("it was just made")
    })
}

/// In this thread's namespace.
fn ip(words: &[&str]) {
    let status = std::process::Command::new("ip").args(words).status().expect("iproute2 is installed");
    assert!(status.success(), "ip {words:?} failed");
}
