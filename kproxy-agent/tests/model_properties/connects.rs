//! What connect gets, beside what a first datagram gets: the same, but for UDP to a port that a ClusterIP does not have.
//! And what a client gets that names the key of a NodePort instead of an address: its own loopback address.

use kproxy::model::NodeConfig;
use kproxy::plan::View;
use kproxy_common::{
    Address, Client, ClientKind, Config, Connection, Protocol, Reason, Resolution, SocketCall, SocketVerdict,
    resolve, socket_connection,
};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::decision::{History, Stage, stage};
use crate::generate;
use crate::opted_out::connection;
use crate::runs;

proptest! {
    #![proptest_config(runs(1_000))]

    #[test]
    fn connecting_gets_what_sending_gets_but_for_undefined_ports_of_udp(
        config in generate::config(),
        stages in vec(stage(), 1..3),
    ) {
        check(&config, &stages)?;
    }
}

proptest! {
    #![proptest_config(runs(1_000))]

    /// Whatever stands in the tables, and whether or not NodePorts answer on loopback addresses.
    #[test]
    fn no_client_can_name_the_key_of_a_node_port(
        config in generate::config(),
        stages in vec(stage(), 1..3),
        loopback_node_ports in 0_u16..2,
        pick: u32,
    ) {
        let mut history = History::in_memory(&config);
        for (events, _) in &stages {
            let written = history.write(events);
            let programs = Config { loopback_node_ports, ..written.config };
            let view = View::new(&written.tables, programs);
            for (key, _) in written.tables.frontends().filter(|(key, _)| key.address().is_unspecified()) {
                let of = |kind, destination| Connection {
                    client: Client { kind, address: destination, netns_cookie: 0 },
                    destination,
                    port: key.port(),
                    protocol: key.protocol(),
                };
                for kind in [ClientKind::Pod, ClientKind::Host, ClientKind::Outside] {
                    let is = resolve(&view, &of(kind, key.address()));
                    let left = Resolution::Pass { reason: Reason::NotAService, number: None };
                    prop_assert_eq!(is, left, "{:?} from {:?}", key, kind);
                }
                for kind in [ClientKind::Pod, ClientKind::Host] {
                    let text = if key.address().is_v4() { "127.0.0.1" } else { "::1" };
                    let loopback = Address::from(text.parse::<std::net::IpAddr>().unwrap());
                    for call in [|| SocketCall::Connect, || SocketCall::Send(None)] {
                        let ask = |to| socket_connection(&view, &of(kind, to), call(), || pick);
                        let (is, should) = (ask(key.address()), ask(loopback));
                        prop_assert_eq!(is, should, "{:?} from {:?}", key, kind);
                        let is_left = matches!(is, SocketVerdict::Leave { number: None, .. });
                        let must_be_left = kind == ClientKind::Pod || loopback_node_ports == 0;
                        prop_assert!(is_left || !must_be_left, "{:?} from {:?}: {:?}", key, kind, is);
                    }
                }
            }
        }
    }
}

fn check(config: &NodeConfig, stages: &[Stage]) -> Result<(), TestCaseError> {
    let mut history = History::in_memory(config);
    for (events, questions) in stages {
        let written = history.write(events);
        let view = View::new(&written.tables, written.config);
        for (question, _, pick) in questions {
            let Some(connection) = connection(question) else { continue };
            let sent = socket_connection(&view, &connection, SocketCall::Send(None), || *pick);
            let connected = socket_connection(&view, &connection, SocketCall::Connect, || *pick);
            let expected = match (sent, connection.protocol) {
                (SocketVerdict::Refuse { reason: Reason::UndefinedPort }, Protocol::Udp) => {
                    SocketVerdict::Leave { reason: Reason::LeftToPackets, number: None }
                }
                _ => sent,
            };
            prop_assert_eq!(connected, expected, "{:?}", question);
        }
    }
    Ok(())
}
