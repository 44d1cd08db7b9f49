//! An established flow, and the four places where its packets are met.

use std::net::SocketAddr;

use kproxy_common::Protocol;

use crate::{
    cluster::{Family, Ports, Service, Who},
    frame::{ACK, Frame, Link, SYN},
    world::{At, Device, World},
};

/// Who asks whom: a client outside, masked or not, and a pod of this node whose sockets nobody sees.
pub const PAIRS: [(Who, Who); 4] = [
    (Who::Client(1), Who::There(1)),
    (Who::Client(1), Who::Here(1)),
    (Who::Here(5), Who::There(1)),
    (Who::Here(5), Who::Here(1)),
];

pub struct Flow {
    pub family: Family,
    link: Link,
    pub protocol: Protocol,
    pub client: SocketAddr,
    pub client_device: Device,
    /// The client as the host sees it between its hooks: by another port, where a flow to the same backend has its own.
    pub inner: SocketAddr,
    pub frontend: SocketAddr,
    pub backend: SocketAddr,
    pub backend_device: Device,
    /// Who the backend thinks that it talks to.
    pub peer: SocketAddr,
}

impl Flow {
    /// One of each sort: pairs, families, links where there is a choice; then another one from the client's same port to the
    /// same backend, by another Service.
    pub fn each(world: &mut World, protocols: &[Protocol], mut test: impl FnMut(&mut World, &Self)) {
        for (number, (client, backend)) in PAIRS.into_iter().enumerate() {
            let numbers = [number as u8 + 1, number as u8 + 1 + PAIRS.len() as u8];
            world.have(&numbers.map(|number| Service::new(number, &[backend])));
            for family in [Family::V4, Family::V6] {
                for link in Link::ALL {
                    if link == Link::Ip && [client, backend].iter().all(|who| matches!(who, Who::Here(_))) {
                        continue;
                    }
                    for protocol in protocols {
                        for number in numbers {
                            let flow = Self::open(world, family, link, *protocol, client, (number, backend));
                            assert_eq!(flow.inner == flow.client, number == numbers[0], "{}", flow.about());
                            test(world, &flow);
                        }
                    }
                }
            }
        }
    }

    /// Through the Service with this number, which has this backend, and answers.
    pub fn open(
        world: &mut World,
        family: Family,
        link: Link,
        protocol: Protocol,
        client: Who,
        to: (u8, Who),
    ) -> Self {
        let flow = Self::ask(world, family, link, protocol, client, to);
        let sent = flow.pass(world, At::In(flow.backend_device), flow.backend, flow.peer, SYN | ACK);
        assert_eq!(sent.destination(), flow.inner);
        let sent = flow.pass(world, At::Out(flow.client_device), flow.backend, flow.inner, SYN | ACK);
        assert_eq!((sent.source(), sent.destination()), (flow.frontend, flow.client));
        flow
    }

    /// Its first packet.
    pub fn ask(
        world: &mut World,
        family: Family,
        link: Link,
        protocol: Protocol,
        client: Who,
        (number, backend): (u8, Who),
    ) -> Self {
        let ports = Ports::of(protocol);
        let device = |who| if matches!(who, Who::Here(_)) { Device::Pod } else { Device::Uplink };
        let port = if link == Link::Ip { 20_001 } else { 20_000 };
        let mut flow = Self {
            family,
            link,
            protocol,
            client: client.at(family, port),
            client_device: device(client),
            inner: client.at(family, port),
            frontend: Who::Node.at(family, ports.node_port(number)),
            backend: backend.at(family, ports.target),
            backend_device: device(backend),
            peer: client.at(family, port),
        };
        let sent = flow.pass(world, At::In(flow.client_device), flow.client, flow.frontend, SYN);
        assert_eq!(sent.destination(), flow.backend);
        flow.inner = sent.source();
        flow.peer = flow.pass(world, At::Out(flow.backend_device), flow.inner, flow.backend, SYN).source();
        flow
    }

    fn pass(&self, world: &mut World, at: At, from: SocketAddr, to: SocketAddr, flags: u8) -> Frame {
        let link = self.link_at(at);
        let packet = Frame::of(self.protocol, link, from, to, flags);
        let (verdict, sent) = world.meet(at, link, &packet);
        sent.unwrap_or_else(|| panic!("{at:?} {from} to {to}: {verdict:?}"))
    }

    /// What packets begin with where this hook is.
    pub fn link_at(&self, at: At) -> Link {
        match at {
            At::In(Device::Pod) | At::Out(Device::Pod) => Link::Ethernet,
            At::In(_) | At::Out(_) => self.link,
        }
    }

    /// Where packets of the flow are met: the hook, from whom to whom they are there, and from whom to whom afterwards.
    pub fn places(&self) -> [(At, [SocketAddr; 2], [SocketAddr; 2]); 4] {
        let Self { client, client_device, inner, frontend, backend, backend_device, peer, .. } = *self;
        [
            (At::In(client_device), [client, frontend], [inner, backend]),
            (At::Out(backend_device), [inner, backend], [peer, backend]),
            (At::In(backend_device), [backend, peer], [backend, inner]),
            (At::Out(client_device), [backend, inner], [frontend, client]),
        ]
    }

    /// Whether the backend sees this node instead of the client.
    pub fn is_masked(&self) -> bool {
        self.peer != self.inner
    }

    pub fn about(&self) -> String {
        let Self { link, protocol, client, frontend, backend, peer, .. } = self;
        format!("{link:?} {protocol:?} {client} to {frontend} at {backend}, which sees {peer}")
    }
}
