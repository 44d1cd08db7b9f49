//! How long flows live without a packet.

use super::{Ends, FlowState};
use crate::{Protocol, elapsed};

const SECOND: u64 = 1_000_000_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;

/// How often a flow's last packet is noted, in nanoseconds: stores about once a second instead of
/// with each packet. What takes back a FIN or RST must come as long after it, so that no packet
/// that was overtaken on its way does.
pub const NOTE_EVERY: u64 = SECOND;

/// Whoever talks is heard within this time, in nanoseconds: TCP sends again what is not
/// acknowledged after less.
pub const QUIET: u64 = 5 * SECOND;

/// How long the port of a flow that has ended rests before another client gets it, in nanoseconds.
/// The backend may keep the connection in TIME_WAIT for as long (Linux' TCP_TIMEWAIT_LEN), and
/// another client's timestamps are none that it takes there.
pub const REST: u64 = MINUTE;

/// The same where no port that has rested was found, and the packet would be dropped else. A
/// backend may drop it as well, but only if it closed first.
pub const HURRIED_REST: u64 = SECOND;

/// How long a flow may be silent before it is over, in nanoseconds. As conntrack has it where
/// kube-proxy has set its timeouts: established TCP a day, half closed an hour
/// (`nf_conntrack_tcp_timeout_close_wait`), opening or closed two minutes (`…_syn_sent`,
/// `…_time_wait`), answered but not taken up one (`…_syn_recv`); UDP 30 s until client and backend
/// have answered each other, then 180 s. SCTP as TCP.
///
/// One that a single RST has broken off may live still: conntrack knows by its sequence number
/// whether the receiver took it, no hook does. Its ends show that they do by talking, which takes
/// those that idle as long as it takes until one asks whether the other is there. Ten minutes is
/// twice what load balancers, proxies and their clients wait for that; the port of a masked flow is
/// kept only until another client needs it ([`REST`]).
#[inline(always)]
pub const fn lifetime(protocol: Protocol, state: FlowState, ends: Ends) -> u64 {
    match (protocol, state) {
        (Protocol::Udp, FlowState::Opening | FlowState::Answered) => 30 * SECOND,
        (Protocol::Udp, FlowState::Established) => 3 * MINUTE,
        (Protocol::Tcp | Protocol::Sctp, _) if ends.is_done() => 2 * MINUTE,
        (Protocol::Tcp | Protocol::Sctp, _) if ends.is_closed() => 10 * MINUTE,
        (Protocol::Tcp | Protocol::Sctp, FlowState::Opening) => 2 * MINUTE,
        (Protocol::Tcp | Protocol::Sctp, FlowState::Answered) => MINUTE,
        (Protocol::Tcp | Protocol::Sctp, FlowState::Established) if ends.is_half_closed() => HOUR,
        (Protocol::Tcp | Protocol::Sctp, FlowState::Established) => 24 * HOUR,
    }
}

/// Whether a flow, or an entry, that was last seen then (nanoseconds since boot) has been silent
/// for longer than it may.
#[inline(always)]
pub const fn is_over(protocol: Protocol, state: FlowState, ends: Ends, last_seen: u64, now: u64) -> bool {
    elapsed(now, last_seen) > lifetime(protocol, state, ends)
}
