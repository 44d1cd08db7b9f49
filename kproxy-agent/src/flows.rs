//! Flows of the packet path, as the agent and the operator see them: how far a flow has come, and how long it may
//! idle. Programs make, note and retire flows; what is here only trims what they leave behind.

mod keeper;
mod serving;
pub mod sizes;

use std::time::Duration;

use kproxy_common::{Conversation, Flow, FlowKey, FlowState, Protocol, Role, elapsed, is_before};

pub use self::{
    keeper::{Keeper, Step},
    serving::Serving,
};

/// The roles that a flow can have entries in, the most telling first.
pub const ROLES: [Role; 4] = [Role::Request, Role::Reply, Role::Forwarded, Role::Return];

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;

/// How long a flow may idle, as conntrack lets it where kube-proxy has set its timeouts: established TCP a day, half
/// closed an hour (`nf_conntrack_tcp_timeout_close_wait`), opening or closed two minutes
/// (`…_syn_sent`, `…_time_wait`), answered but not taken up one (`…_syn_recv`); UDP 30 s until client and backend have answered
/// each other, then 180 s. SCTP as TCP.
pub const fn lifetime(protocol: Protocol, state: FlowState) -> Duration {
    let seconds = match (protocol, state) {
        (Protocol::Udp, FlowState::Opening | FlowState::Answered) => 30,
        (Protocol::Udp, _) => 3 * MINUTE,
        (Protocol::Tcp | Protocol::Sctp, FlowState::Answered) => MINUTE,
        (Protocol::Tcp | Protocol::Sctp, FlowState::Opening | FlowState::Closed) => 2 * MINUTE,
        (Protocol::Tcp | Protocol::Sctp, FlowState::Established) => 24 * HOUR,
        (Protocol::Tcp | Protocol::Sctp, FlowState::Finished) => HOUR,
    };
    Duration::from_secs(seconds)
}

/// A flow as far as some of its entries tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    protocol: Protocol,
    state: FlowState,
    last_seen: u64,
}

impl Progress {
    /// As one entry tells.
    pub fn of(key: &FlowKey, flow: &Flow) -> Self {
        Self { protocol: key.protocol, state: flow.state, last_seen: flow.last_seen }
    }

    /// As this and another entry of the same flow tell: as far as either direction has come, and as lately used.
    pub fn and(self, other: &Flow) -> Self {
        let state = if rank(other.state) > rank(self.state) { other.state } else { self.state };
        let is_older = is_before(self.last_seen, other.last_seen);
        let last_seen = if is_older { other.last_seen } else { self.last_seen };
        Self { state, last_seen, ..self }
    }

    /// How far the flow has come.
    pub fn state(&self) -> FlowState {
        self.state
    }

    /// How long ago the last packet was noted, by the programs' clock (nanoseconds since boot). Packets are noted
    /// about once a second.
    pub fn idle(&self, now: u64) -> Duration {
        Duration::from_nanos(elapsed(now, self.last_seen))
    }

    /// Whether it has idled for as long as it may. Where this says no of a single entry, it is no for its flow.
    pub fn is_over(&self, now: u64) -> bool {
        self.idle(now) > lifetime(self.protocol, self.state)
    }
}

/// The word for a state in output.
pub const fn state_word(protocol: Protocol, state: FlowState) -> &'static str {
    match (protocol, state) {
        (Protocol::Udp, FlowState::Opening) => "unreplied",
        (_, FlowState::Opening) => "opening",
        (_, FlowState::Answered) => "answered",
        (_, FlowState::Established) => "established",
        (_, FlowState::Finished) => "half-closed",
        (_, FlowState::Closed) => "closed",
    }
}

/// Whether an entry belongs to this flow: its key can stand for another one by now.
pub fn belongs(whole: &Conversation, key: &FlowKey, flow: &Flow) -> bool {
    let mut other = Conversation::EMPTY;
    other.read_entry(key, flow);
    // An entry that was written before a mask was chosen does not know it.
    let masks_agree = other.mask_port == 0
        || whole.mask_port == 0
        || (other.mask, other.mask_port) == (whole.mask, whole.mask_port);
    masks_agree
        && (other.client, other.client_port) == (whole.client, whole.client_port)
        && (other.frontend, other.frontend_port) == (whole.frontend, whole.frontend_port)
        && (other.backend, other.backend_port) == (whole.backend, whole.backend_port)
        && other.protocol == whole.protocol
}

const fn rank(state: FlowState) -> u8 {
    match state {
        FlowState::Opening => 0,
        FlowState::Answered => 1,
        FlowState::Established => 2,
        FlowState::Finished => 3,
        FlowState::Closed => 4,
    }
}

/// Nanoseconds since boot, as the programs count them (CLOCK_MONOTONIC).
pub fn now() -> std::io::Result<u64> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(u64::try_from(time.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn entry(protocol: Protocol, state: FlowState, last_seen: u64) -> (FlowKey, Flow) {
        (FlowKey { protocol, ..FlowKey::EMPTY }, Flow { state, last_seen, ..Flow::EMPTY })
    }

    #[test]
    fn a_flow_lives_as_long_as_conntrack_would_keep_it() {
        for (protocol, state, seconds) in [
            (Protocol::Tcp, FlowState::Opening, 120),
            (Protocol::Tcp, FlowState::Answered, 60),
            (Protocol::Tcp, FlowState::Established, 86_400),
            (Protocol::Tcp, FlowState::Finished, 3_600),
            (Protocol::Tcp, FlowState::Closed, 120),
            (Protocol::Sctp, FlowState::Established, 86_400),
            (Protocol::Udp, FlowState::Opening, 30),
            (Protocol::Udp, FlowState::Answered, 30),
            (Protocol::Udp, FlowState::Established, 180),
        ] {
            let begun = 5 * SECOND;
            let (key, flow) = entry(protocol, state, begun);
            let progress = Progress::of(&key, &flow);
            assert!(!progress.is_over(begun + seconds * SECOND), "{protocol:?} {state:?} at its end");
            assert!(progress.is_over(begun + seconds * SECOND + 1), "{protocol:?} {state:?} past its end");
        }
    }

    #[test]
    fn both_directions_count() {
        let (key, asked) = entry(Protocol::Tcp, FlowState::Finished, 10 * SECOND);
        let (_, answered) = entry(Protocol::Tcp, FlowState::Established, 4_000 * SECOND);
        let now = 5_000 * SECOND;
        let one = Progress::of(&key, &asked);
        assert!(one.is_over(now), "the direction that sent FIN has been silent for more than an hour");
        let both = one.and(&answered);
        assert!(!both.is_over(now), "the other one speaks still");
        assert_eq!(both.state(), FlowState::Finished, "half closed it is, whichever entry is asked first");
        assert_eq!(Progress::of(&key, &answered).and(&asked), both);
        assert!(both.is_over(4_000 * SECOND + 3_601 * SECOND));
    }

    #[test]
    fn a_clock_before_the_last_packet_is_no_idleness() {
        let (key, flow) = entry(Protocol::Udp, FlowState::Established, 10);
        assert_eq!(Progress::of(&key, &flow).idle(5), Duration::ZERO);
    }
}
