//! Pods whose sockets are left alone: the socket hooks open nothing for them, and everything for everyone else as
//! before.

use std::collections::BTreeSet;

use kproxy::model::NodeConfig;
use kproxy::plan::View;
use kproxy_common::{
    Address, Client, ClientKind, Config, Connection, Reason, SocketCall, SocketRecords, SocketVerdict,
    socket_connection,
};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::decision::{History, Stage, stage};
use crate::generate;
use crate::runs;
use crate::verdict::Question;

/// The cookie of a pod's network namespace.
const OPTED_OUT: u64 = 7;

proptest! {
    #![proptest_config(runs(2_000))]

    #[test]
    fn sockets_of_pods_can_be_left_alone(config in generate::config(), stages in vec(stage(), 1..3)) {
        check(&config, &stages)?;
    }
}

fn check(config: &NodeConfig, stages: &[Stage]) -> Result<(), TestCaseError> {
    let mut history = History::in_memory(config);
    for (events, questions) in stages {
        let written = history.write(events);
        let programs = Config { udp_timeout: 1, ..written.config };
        let all = View::new(&written.tables, programs);
        let host = View::new(&written.tables, Config { host_sockets_only: 1, ..programs });
        let some = View::new(&written.tables, Config { some_opted_out: 1, ..programs });
        let some = some.with_opted_out(BTreeSet::from([OPTED_OUT]));
        for (question, _, pick) in questions {
            let Some(connection) = connection(question) else { continue };
            // One pod, and nobody else.
            let of = |netns_cookie| Connection {
                client: Client { netns_cookie, ..connection.client },
                ..connection
            };
            for (asked, like) in [(of(OPTED_OUT), &host), (of(OPTED_OUT + 1), &all)] {
                let is = socket_connection(&some, &asked, SocketCall::Connect, || *pick);
                prop_assert_eq!(
                    is,
                    socket_connection(like, &asked, SocketCall::Connect, || *pick),
                    "{:?}",
                    asked
                );
            }
            let mut records = SocketRecords::new();
            let before = socket_connection(&all, &connection, SocketCall::Send(None), || *pick);
            let now = socket_connection(&host, &connection, SocketCall::Send(Some(&mut records)), || *pick);
            let expected = match before {
                _ if connection.client.kind == ClientKind::Host => before,
                // Nobody translates it, and it is counted where it was.
                SocketVerdict::Leave { .. } => before,
                SocketVerdict::Refuse { .. } | SocketVerdict::Translate { .. } => {
                    SocketVerdict::Leave { reason: Reason::LeftToPackets, number: None }
                }
            };
            prop_assert_eq!(now, expected, "{:?}", question);
            // What a socket began before goes on.
            if let SocketVerdict::Translate { record, .. } = before {
                records.insert(record);
                let now =
                    socket_connection(&host, &connection, SocketCall::Send(Some(&mut records)), || *pick);
                prop_assert_eq!(now, SocketVerdict::Translate { record, fresh: false }, "{:?}", question);
            }
        }
    }
    Ok(())
}

/// As a socket hook asks; nobody outside has a socket here.
pub fn connection(question: &Question) -> Option<Connection> {
    let Question { behind, client: _, destination, port, protocol } = *question;
    if behind == ClientKind::Outside {
        return None;
    }
    let client = Client { kind: behind, address: Address::UNSPECIFIED, netns_cookie: 0 };
    Some(Connection { client, destination, port, protocol })
}
