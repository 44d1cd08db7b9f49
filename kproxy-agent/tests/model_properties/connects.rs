//! What connect gets, beside what a first datagram gets: the same, but for UDP to a port that a ClusterIP does not have.

use kproxy::model::NodeConfig;
use kproxy::plan::View;
use kproxy_common::{Protocol, Reason, SocketCall, SocketVerdict, socket_connection};
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
