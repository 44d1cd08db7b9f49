//! One table of flows: who asks for what, and what becomes of it. The host's decision and the loaded programs both
//! must agree with it, at every hook that a packet of the flow meets, in both families and on devices with and
//! without an Ethernet header.

use std::net::SocketAddr;

use kproxy_common::{Ends, FlowEnd, FlowState, PacketVerdict, Protocol, Reason, map_names};
use serde_json::json;

use crate::{
    cluster::{Endpoint, Family, Ports, Service, Who},
    frame::{ACK, FIN, Frame, Link, PSH, RST, SYN},
    world::{At, Device, MASK_PORTS, ROOM, World, in_world},
};

/// A way to ask for a Service.
#[derive(Clone, Copy, Debug)]
enum Frontend {
    ClusterIp(u8),
    LoadBalancer(u8),
    External(u8),
    NodePort(u8),
    /// The node's other address, which answers no NodePorts.
    NodePortAside(u8),
    /// A port of the ClusterIP that the Service does not have.
    UndefinedPort(u8),
    /// One of the load-balancer address.
    UndefinedBalancerPort(u8),
    Unallocated,
    Elsewhere,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expect {
    /// To one of these, which sees the client's own address.
    To(&'static [Who]),
    /// To one of these; those on another node see this node instead of the client.
    Masked(&'static [Who]),
    /// To one of these, which sees this node instead of the client, wherever it is.
    Hidden(&'static [Who]),
    Drop(Reason),
    Refuse(Reason),
    Pass(Reason),
}

struct Row {
    client: Who,
    asks: Frontend,
    expect: Expect,
}

const fn row(client: Who, asks: Frontend, expect: Expect) -> Row {
    Row { client, asks, expect }
}

use Expect::{Drop, Hidden, Masked, Pass, Refuse, To};
use Frontend::{
    ClusterIp, Elsewhere, External, LoadBalancer, NodePort, NodePortAside, Unallocated,
    UndefinedBalancerPort, UndefinedPort,
};
use Who::{Client, Here, There};

const BOTH: &[Who] = &[Here(1), There(1)];

/// The Services by number; each has port 80 of TCP, 53 of UDP.
fn services() -> Vec<Service> {
    let local = json!({"externalTrafficPolicy": "Local"});
    vec![
        Service::new(1, BOTH),
        Service::new(2, BOTH).with_spec(local.clone()),
        Service::new(3, &[There(1)]).with_spec(local),
        Service::new(4, &[]),
        Service::new(5, BOTH)
            .with_spec(json!({"loadBalancerSourceRanges": ["8.0.200.0/28", "2001:db8:86dd:200::/124"]})),
        Service::new(6, BOTH).with_annotations(json!({"kubernetes.io/elb.pass-through": "true"})),
        Service::new(7, BOTH).with_spec(json!({"sessionAffinity": "ClientIP"})),
        Service::new(8, &[There(1)]).with_spec(json!({"internalTrafficPolicy": "Local"})),
        Service::new(9, &[Here(2), Here(3)]),
        Service::new(10, &[There(2), There(3)]),
        Service::new(11, BOTH).with_spec(json!({"internalTrafficPolicy": "Local"})),
        Service::new(12, &[There(100)]),
        Service { endpoints: vec![Endpoint::Terminating(Here(1))], ..Service::new(13, &[]) },
        Service::new(14, &[Here(5)]),
    ]
}

/// `semantics.md` 3, as far as packets go.
const TABLE: &[Row] = &[
    // From outside: the client is masked where the backend is on another node, never under policy Local.
    row(Client(1), NodePort(1), Masked(BOTH)),
    row(Client(1), LoadBalancer(1), Masked(BOTH)),
    row(Client(1), External(1), Masked(BOTH)),
    // A ClusterIP from outside of --cluster-cidr is asked through this node: the answer must come back through it.
    row(Client(1), ClusterIp(1), Hidden(BOTH)),
    row(Client(1), ClusterIp(9), Hidden(&[Here(2), Here(3)])),
    row(Client(1), NodePort(9), To(&[Here(2), Here(3)])),
    row(Client(1), NodePort(10), Masked(&[There(2), There(3)])),
    // The mask is the address of the interface by which the packet leaves.
    row(Client(1), NodePort(12), Masked(&[There(100)])),
    row(Here(5), NodePort(12), To(&[There(100)])),
    row(Client(1), NodePort(2), To(&[Here(1)])),
    row(Client(1), LoadBalancer(2), To(&[Here(1)])),
    row(Client(1), External(2), To(&[Here(1)])),
    row(Client(1), NodePort(3), Drop(Reason::NoLocalEndpoints)),
    row(Client(1), LoadBalancer(3), Drop(Reason::NoLocalEndpoints)),
    // Policy Local is short-circuited inside.
    row(Here(5), NodePort(2), To(BOTH)),
    row(Here(5), LoadBalancer(2), To(BOTH)),
    row(Here(5), NodePort(3), To(&[There(1)])),
    // From a pod of this node that sockets do not serve: its own address everywhere.
    row(Here(5), ClusterIp(1), To(BOTH)),
    row(Here(5), NodePort(1), To(BOTH)),
    row(Here(5), LoadBalancer(1), To(BOTH)),
    row(Here(5), External(1), To(BOTH)),
    // A pod that is its own backend sees the node, since it would take a packet from itself for a forged one.
    row(Here(5), ClusterIp(14), Hidden(&[Here(5)])),
    row(Here(5), NodePort(14), Hidden(&[Here(5)])),
    // A pod of another node asks this one: outside, but no stranger to the cluster, who would be masked always.
    row(There(5), ClusterIp(1), Masked(BOTH)),
    row(There(5), NodePort(1), Masked(BOTH)),
    row(There(5), NodePort(3), Drop(Reason::NoLocalEndpoints)),
    row(There(5), NodePort(2), To(&[Here(1)])),
    // internalTrafficPolicy.
    row(Here(5), ClusterIp(8), Drop(Reason::NoLocalEndpoints)),
    row(Here(5), ClusterIp(11), To(&[Here(1)])),
    row(Here(5), NodePort(8), To(&[There(1)])),
    // Where none is ready, those serve that end.
    row(Here(5), ClusterIp(13), To(&[Here(1)])),
    row(Client(1), NodePort(13), To(&[Here(1)])),
    // No endpoint at all.
    row(Here(5), ClusterIp(4), Refuse(Reason::NoEndpoints)),
    row(Client(1), NodePort(4), Refuse(Reason::NoEndpoints)),
    // Source ranges bind the load-balancer address alone.
    row(Client(1), LoadBalancer(5), Masked(BOTH)),
    row(Client(99), LoadBalancer(5), Drop(Reason::SourceRange)),
    row(Here(5), LoadBalancer(5), Drop(Reason::SourceRange)),
    row(Client(99), NodePort(5), Masked(BOTH)),
    row(Client(99), External(5), Masked(BOTH)),
    row(Here(5), ClusterIp(5), To(BOTH)),
    // Pass-through is left alone, on this address only.
    row(Client(1), LoadBalancer(6), Pass(Reason::PassThrough)),
    row(Here(5), LoadBalancer(6), Pass(Reason::PassThrough)),
    row(Client(1), NodePort(6), Masked(BOTH)),
    row(Here(5), ClusterIp(6), To(BOTH)),
    // Affinity.
    row(Client(1), NodePort(7), Masked(BOTH)),
    row(Here(5), ClusterIp(7), To(BOTH)),
    // Nothing of ours, or nothing that is served.
    row(Here(5), UndefinedPort(1), Refuse(Reason::UndefinedPort)),
    row(Client(1), UndefinedPort(1), Refuse(Reason::UndefinedPort)),
    row(Client(1), UndefinedBalancerPort(1), Pass(Reason::NotAService)),
    row(Here(5), Unallocated, Drop(Reason::UnallocatedAddress)),
    row(Client(1), Unallocated, Drop(Reason::UnallocatedAddress)),
    row(Client(1), NodePortAside(1), Pass(Reason::NotAService)),
    row(Here(5), Elsewhere, Pass(Reason::NotAService)),
    row(Client(1), Elsewhere, Pass(Reason::NotAService)),
];

/// What the host sends that no socket hook has translated, as it leaves. Of SCTP nothing is refused there.
const FROM_THE_HOST: &[(Frontend, Expect)] = &[
    (ClusterIp(1), Drop(Reason::Unserved)),
    (ClusterIp(4), Drop(Reason::Unserved)),
    (UndefinedPort(1), Refuse(Reason::UndefinedPort)),
    (Unallocated, Drop(Reason::UnallocatedAddress)),
    (ClusterIp(8), Drop(Reason::NoLocalEndpoints)),
    (LoadBalancer(1), Pass(Reason::Unserved)),
    (External(1), Pass(Reason::Unserved)),
    (LoadBalancer(6), Pass(Reason::PassThrough)),
    (Elsewhere, Pass(Reason::NotAService)),
];

/// How far a flow has come, and who has ended it.
type State = (FlowState, Ends);

const OPENING: State = (FlowState::Opening, Ends::OPEN);
const ANSWERED: State = (FlowState::Answered, Ends::OPEN);
const ESTABLISHED: State = (FlowState::Established, Ends::OPEN);
const FINISHED: State =
    (FlowState::Established, Ends { client: FlowEnd::Finished, backend: FlowEnd::Finished });

/// How far a flow of TCP is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// The client closes, then the backend.
    ClientFirst,
    BackendFirst,
    ClientResets,
    BackendResets,
    /// The backend answers the SYN with RST.
    Refused,
}

#[test]
fn flows_are_translated_as_the_table_says() {
    in_world(ROOM, |world| {
        world.have(&services());
        let mut port = 20_000;
        for (number, row) in TABLE.iter().enumerate() {
            // What stands in the tables is looked through after each packet.
            world.forget();
            for (family, link, protocol) in ways(row.client) {
                let ends: &[End] = match protocol {
                    Protocol::Tcp => &[
                        End::ClientFirst,
                        End::BackendFirst,
                        End::ClientResets,
                        End::BackendResets,
                        End::Refused,
                    ],
                    // What closes SCTP is a SHUTDOWN COMPLETE, an end at once as an ABORT is.
                    Protocol::Sctp => &[End::ClientResets, End::BackendResets, End::Refused],
                    Protocol::Udp => &[End::ClientFirst],
                };
                for end in ends {
                    port += 1;
                    let flow = Conversation::new(row, family, link, protocol, port);
                    let about = format!(
                        "row {number}, {:?} asks {:?}: {family:?} {link:?} {protocol:?} {end:?}",
                        row.client, row.asks
                    );
                    flow.hold(world, row.expect, *end, &about);
                }
            }
        }
    });
}

#[test]
fn what_the_host_sends_untranslated_does_not_leave() {
    in_world(ROOM, |world| {
        world.have(&services());
        for (asks, expect) in FROM_THE_HOST {
            for (family, link, protocol) in ways(Who::Node) {
                let to = asks.at(family, protocol);
                for flags in [SYN, ACK] {
                    let packet = Frame::of(protocol, link, Who::Node.at(family, 33_000), to, flags);
                    let (verdict, _) = world.meet(At::Out(Device::Uplink), link, &packet);
                    // TCP that opens nothing is not looked up: what it belongs to was opened before.
                    let expect = match (protocol, flags) {
                        (Protocol::Tcp | Protocol::Sctp, ACK) => Pass(Reason::NoFlow),
                        (Protocol::Sctp, _) if matches!(expect, Refuse(_)) => Drop(Reason::Unserved),
                        _ => *expect,
                    };
                    let about = format!("{asks:?}: {family:?} {link:?} {protocol:?} {flags}");
                    match expect {
                        Drop(reason) => assert_eq!(verdict, PacketVerdict::Drop { reason }, "{about}"),
                        Pass(reason) => assert_eq!(verdict, PacketVerdict::Pass { reason }, "{about}"),
                        Refuse(reason) => assert_eq!(verdict, PacketVerdict::Refuse { reason }, "{about}"),
                        To(_) | Masked(_) | Hidden(_) => {
                            panic!("the host's packets are never translated")
                        }
                    }
                }
            }
        }
        world.compare_flows();
    });
}

#[test]
fn a_flow_outlives_its_service() {
    in_world(ROOM, |world| {
        let expect = [(Here(5), ClusterIp(1), To(BOTH)), (Client(1), NodePort(1), Masked(BOTH))];
        for (asker, asks, expect) in expect {
            for (family, link, protocol) in ways(asker) {
                world.have(&services());
                let row = row(asker, asks, expect);
                let about = format!("{asker:?} asks {asks:?}: {family:?} {link:?} {protocol:?}");
                let flow = Conversation::new(&row, family, link, protocol, 40_000);
                let way = flow.open(world, expect, &about).expect("it is forwarded");
                flow.reply(world, way, SYN | ACK, &about);
                world.lose(&services());
                flow.request(world, way, ACK | PSH, &about);
                flow.reply(world, way, ACK | PSH, &about);
                // Another one finds nothing.
                let late = Frame::of(protocol, link, asker.at(family, 40_001), flow.frontend, SYN);
                let (verdict, _) = world.meet(At::In(flow.client_device), link, &late);
                let reason = verdict_without_service(asks);
                assert_eq!(verdict, reason, "{about}");
                flow.request(world, way, ACK | FIN, &about);
                flow.reply(world, way, ACK | FIN, &about);
            }
        }
        world.compare_flows();
    });
}

/// What becomes of a new flow when the Service is gone.
fn verdict_without_service(asks: Frontend) -> PacketVerdict {
    match asks {
        ClusterIp(_) => PacketVerdict::Drop { reason: Reason::UnallocatedAddress },
        _ => PacketVerdict::Pass { reason: Reason::NotAService },
    }
}

/// Families, links and protocols in which a row is tried.
fn ways(client: Who) -> Vec<(Family, Link, Protocol)> {
    let mut ways = Vec::new();
    for family in [Family::V4, Family::V6] {
        for link in Link::ALL {
            // Devices without an Ethernet header never lead to a pod.
            if matches!((client, link), (Here(_), Link::Ip)) {
                continue;
            }
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                ways.push((family, link, protocol));
            }
        }
    }
    ways
}

impl Frontend {
    fn at(self, family: Family, protocol: Protocol) -> SocketAddr {
        let ports = Ports::of(protocol);
        let port = ports.port;
        match self {
            Self::ClusterIp(n) => Who::ClusterIp(n).at(family, port),
            Self::LoadBalancer(n) => Who::LoadBalancer(n).at(family, port),
            Self::External(n) => Who::External(n).at(family, port),
            Self::NodePort(n) => Who::Node.at(family, ports.node_port(n)),
            Self::NodePortAside(n) => Who::NodeAside.at(family, ports.node_port(n)),
            Self::UndefinedPort(n) => Who::ClusterIp(n).at(family, 81),
            Self::UndefinedBalancerPort(n) => Who::LoadBalancer(n).at(family, 81),
            Self::Unallocated => Who::Unallocated.at(family, port),
            Self::Elsewhere => Who::Elsewhere.at(family, port),
        }
    }
}

/// The interface that leads to somebody.
fn device_of(who: Who) -> Device {
    match who {
        Here(_) => Device::Pod,
        There(100..) => Device::Aside,
        _ => Device::Uplink,
    }
}

/// The link of packets on an interface, where others are on `link`.
fn link_of(device: Device, link: Link) -> Link {
    if device == Device::Pod { Link::Ethernet } else { link }
}

struct Conversation {
    family: Family,
    link: Link,
    protocol: Protocol,
    client: SocketAddr,
    client_device: Device,
    frontend: SocketAddr,
}

/// Where a flow went.
#[derive(Clone, Copy)]
struct Way {
    backend: SocketAddr,
    backend_device: Device,
    /// Who the backend thinks that it talks to.
    peer: SocketAddr,
}

impl Conversation {
    fn new(row: &Row, family: Family, link: Link, protocol: Protocol, port: u16) -> Self {
        Self {
            family,
            link,
            protocol,
            client: row.client.at(family, port),
            client_device: device_of(row.client),
            frontend: row.asks.at(family, protocol),
        }
    }

    /// The first packet, at both hooks; `None` if it does not get further, as expected.
    fn open(&self, world: &mut World, expect: Expect, about: &str) -> Option<Way> {
        let first = Frame::of(self.protocol, self.link, self.client, self.frontend, SYN);
        let (verdict, sent) = world.meet(At::In(self.client_device), self.link, &first);
        let (among, is_masked): (_, fn(Who) -> bool) = match expect {
            Drop(reason) => {
                assert_eq!(verdict, PacketVerdict::Drop { reason }, "{about}");
                return None;
            }
            Pass(reason) => {
                assert_eq!(verdict, PacketVerdict::Pass { reason }, "{about}");
                return None;
            }
            Refuse(reason) => {
                assert_eq!(verdict, PacketVerdict::Refuse { reason }, "{about}");
                return None;
            }
            To(among) => (among, |_| false),
            Masked(among) => (among, |who| matches!(who, There(_))),
            Hidden(among) => (among, |_| true),
        };
        let sent = sent.unwrap_or_else(|| panic!("{about}: {verdict:?}"));
        let backend = sent.destination();
        let target = Ports::of(self.protocol).target;
        let who = among.iter().copied().find(|who| who.at(self.family, target) == backend);
        let who = who.unwrap_or_else(|| panic!("{about}: went to {backend}, not one of {among:?}"));
        let backend_device = device_of(who);

        let (verdict, arrived) =
            world.meet(At::Out(backend_device), self.link_at(backend_device), &self.on(backend_device, sent));
        let peer = arrived.unwrap_or_else(|| panic!("{about}: is not let out: {verdict:?}")).source();
        if is_masked(who) {
            let mask = if backend_device == Device::Aside { Who::NodeAside } else { Who::Node };
            assert_eq!(peer.ip(), mask.ip(self.family), "{about}");
            assert!((MASK_PORTS.0..MASK_PORTS.0 + MASK_PORTS.1).contains(&peer.port()), "{about}: {peer}");
        } else {
            assert_eq!(peer, self.client, "{about}");
        }
        Some(Way { backend, backend_device, peer })
    }

    fn hold(&self, world: &mut World, expect: Expect, end: End, about: &str) {
        let Some(way) = self.open(world, expect, about) else { return };
        self.states(world, map_names::FLOW_TRANSIENT, way, OPENING, about);
        // A retransmission goes the same way.
        self.request(world, way, SYN, about);

        if end == End::Refused {
            self.reply(world, way, RST | ACK, about);
            return self.states(
                world,
                map_names::FLOW_TRANSIENT,
                way,
                (FlowState::Opening, Ends::RESET),
                about,
            );
        }
        self.reply(world, way, SYN | ACK, about);
        self.states(world, map_names::FLOW_TRANSIENT, way, ANSWERED, about);
        self.request(world, way, ACK, about);
        self.states(world, map_names::FLOW, way, ESTABLISHED, about);
        self.request(world, way, ACK | PSH, about);
        self.reply(world, way, ACK | PSH, about);
        if self.protocol == Protocol::Udp {
            return self.states(world, map_names::FLOW, way, ESTABLISHED, about);
        }
        match end {
            End::ClientFirst => {
                self.request(world, way, ACK | FIN, about);
                // Half closed: the backend may go on for long.
                self.reply(world, way, ACK | PSH, about);
                self.request(world, way, ACK, about);
                self.reply(world, way, ACK | FIN, about);
                self.states(world, map_names::FLOW_TRANSIENT, way, FINISHED, about);
                self.request(world, way, ACK, about);
            }
            End::BackendFirst => {
                self.reply(world, way, ACK | FIN, about);
                self.request(world, way, ACK | PSH, about);
                self.request(world, way, ACK | FIN, about);
                self.states(world, map_names::FLOW_TRANSIENT, way, FINISHED, about);
                self.reply(world, way, ACK, about);
            }
            // Who has not said it may have been spoken for by a stranger: the flow stays where it is.
            End::ClientResets => {
                self.request(world, way, RST, about);
                let ends = Ends { client: FlowEnd::Reset, ..Ends::OPEN };
                self.states(world, map_names::FLOW, way, (FlowState::Established, ends), about);
                self.reply(world, way, RST, about);
            }
            End::BackendResets => {
                self.reply(world, way, RST | ACK, about);
                let ends = Ends { backend: FlowEnd::Reset, ..Ends::OPEN };
                self.states(world, map_names::FLOW, way, (FlowState::Established, ends), about);
                self.request(world, way, RST, about);
            }
            End::Refused => {}
        }
        let is_reset = matches!(end, End::ClientResets | End::BackendResets);
        let done = if is_reset { (FlowState::Established, Ends::RESET) } else { FINISHED };
        self.states(world, map_names::FLOW_TRANSIENT, way, done, about);
        world.compare_flows();
    }

    /// A packet of the client comes to the backend, by both hooks.
    fn request(&self, world: &mut World, way: Way, flags: u8, about: &str) {
        let packet = Frame::of(self.protocol, self.link, self.client, self.frontend, flags);
        let (verdict, sent) = world.meet(At::In(self.client_device), self.link, &packet);
        let sent = sent.unwrap_or_else(|| panic!("{about}: a request is lost: {verdict:?}"));
        assert_eq!(sent.destination(), way.backend, "{about}: the flow changes its backend");
        let sent = self.on(way.backend_device, sent);
        let (verdict, arrived) =
            world.meet(At::Out(way.backend_device), self.link_at(way.backend_device), &sent);
        let arrived = arrived.unwrap_or_else(|| panic!("{about}: a request is lost: {verdict:?}"));
        assert_eq!((arrived.source(), arrived.destination()), (way.peer, way.backend), "{about}");
    }

    /// A packet of the backend comes to the client, by both hooks.
    fn reply(&self, world: &mut World, way: Way, flags: u8, about: &str) {
        let link = self.link_at(way.backend_device);
        let packet = Frame::of(self.protocol, link, way.backend, way.peer, flags);
        let (verdict, sent) = world.meet(At::In(way.backend_device), link, &packet);
        let sent = sent.unwrap_or_else(|| panic!("{about}: a reply is lost: {verdict:?}"));
        assert_eq!(sent.destination(), self.client, "{about}");
        let sent = self.on(self.client_device, sent);
        let (verdict, arrived) =
            world.meet(At::Out(self.client_device), self.link_at(self.client_device), &sent);
        let arrived = arrived.unwrap_or_else(|| panic!("{about}: a reply is lost: {verdict:?}"));
        assert_eq!((arrived.source(), arrived.destination()), (self.frontend, self.client), "{about}");
    }

    fn link_at(&self, device: Device) -> Link {
        link_of(device, self.link)
    }

    /// The packet as the host has it for this interface: with an Ethernet header or without.
    fn on(&self, device: Device, packet: Frame) -> Frame {
        let link = self.link_at(device);
        let template = Frame::of(packet.protocol(), link, packet.source(), packet.destination(), 0);
        Frame { ethernet: template.ethernet, ..packet }
    }

    /// All entries of the flow stand in this table, in this state, and in the other one is none.
    fn states(&self, world: &mut World, table: &'static str, way: Way, state: State, about: &str) {
        let (client, frontend) = (ends(self.client), ends(self.frontend));
        let (backend, peer) = (ends(way.backend), ends(way.peer));
        let mut ours = vec![(client, frontend), (backend, client)];
        if peer != client {
            ours.extend([(client, backend), (backend, peer)]);
        }
        for map in [map_names::FLOW, map_names::FLOW_TRANSIENT] {
            let entries = world.entries(map);
            let entries = entries.iter().filter(|(key, _)| {
                let key_ends = ((key.source, key.source_port), (key.destination, key.destination_port));
                key.protocol == self.protocol && ours.contains(&key_ends)
            });
            let states: Vec<State> = entries.map(|(_, flow)| (flow.state, flow.ends)).collect();
            let expected = if map == table { vec![state; ours.len()] } else { Vec::new() };
            assert_eq!(states, expected, "{about}: {map}");
        }
    }
}

fn ends(end: SocketAddr) -> (kproxy_common::Address, u16) {
    (end.ip().into(), end.port())
}
