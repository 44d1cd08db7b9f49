//! Flows of the packet path, as the agent and the operator see them: how far a flow has come, and how long it may
//! idle. Programs make, note and retire flows; what is here only trims what they leave behind.

mod keeper;
mod serving;
pub mod sizes;

use std::time::Duration;

use kproxy_common::{
    Conversation, Ends, Flow, FlowKey, FlowState, Protocol, Role, elapsed, is_before, is_over,
};

pub use self::{
    keeper::{Keeper, Step},
    serving::Serving,
};

/// The roles that a flow can have entries in, the most telling first.
pub const ROLES: [Role; 6] =
    [Role::Request, Role::Reply, Role::Forwarded, Role::Return, Role::NodeRequest, Role::NodeReply];

/// A flow as far as some of its entries tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    protocol: Protocol,
    state: FlowState,
    ends: Ends,
    last_seen: u64,
}

impl Progress {
    /// As one entry tells.
    pub fn of(key: &FlowKey, flow: &Flow) -> Self {
        Self { protocol: key.protocol, state: flow.state, ends: flow.ends, last_seen: flow.last_seen }
    }

    /// As this and another entry of the same flow tell: as far as it has come, whatever its ends have said, and as lately
    /// used. Entries of one flow say the same, but for what two CPUs write at the same instant, or an eviction has left.
    pub fn and(self, other: &Flow) -> Self {
        let state = if rank(other.state) > rank(self.state) { other.state } else { self.state };
        let is_older = is_before(self.last_seen, other.last_seen);
        let last_seen = if is_older { other.last_seen } else { self.last_seen };
        let ends = Ends {
            client: self.ends.client.max(other.ends.client),
            backend: self.ends.backend.max(other.ends.backend),
        };
        Self { state, ends, last_seen, ..self }
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

    /// Whether it has idled for as long as it may.
    pub fn is_over(&self, now: u64) -> bool {
        is_over(self.protocol, self.state, self.ends, self.last_seen, now)
    }

    /// Whether the flow may be over of which this is one entry. Of one that is, an entry says so.
    pub fn may_be_over(&self, now: u64) -> bool {
        let other = if self.ends.is_half_closed() { Ends::RESET } else { self.ends };
        Self { ends: other, ..*self }.is_over(now)
    }

    /// The word for how far it has come, in output.
    pub fn word(&self) -> &'static str {
        match (self.protocol, self.state) {
            _ if self.ends.is_closed() => "closed",
            _ if self.ends.is_half_closed() => "half-closed",
            (Protocol::Udp, FlowState::Opening) => "unreplied",
            (_, FlowState::Opening) => "opening",
            (_, FlowState::Answered) => "answered",
            (_, FlowState::Established) => "established",
        }
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
    }
}

/// Nanoseconds since boot, as the programs count them (CLOCK_MONOTONIC).
pub fn now() -> std::io::Result<u64> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(u64::try_from(time.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use kproxy_common::FlowEnd;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    const FINISHED: Ends = Ends { client: FlowEnd::Finished, ..Ends::OPEN };
    const BROKEN_OFF: Ends = Ends { client: FlowEnd::Reset, ..Ends::OPEN };
    const DONE: Ends = Ends { client: FlowEnd::Finished, backend: FlowEnd::Finished };

    fn entry(protocol: Protocol, state: FlowState, ends: Ends, last_seen: u64) -> (FlowKey, Flow) {
        (FlowKey { protocol, ..FlowKey::EMPTY }, Flow { state, ends, last_seen, ..Flow::EMPTY })
    }

    #[test]
    fn a_flow_lives_as_long_as_conntrack_would_keep_it() {
        use FlowState::{Answered, Established, Opening};
        for (protocol, state, ends, seconds) in [
            (Protocol::Tcp, Opening, Ends::OPEN, 120),
            (Protocol::Tcp, Answered, Ends::OPEN, 60),
            (Protocol::Tcp, Established, Ends::OPEN, 86_400),
            (Protocol::Tcp, Established, FINISHED, 3_600),
            (Protocol::Tcp, Established, BROKEN_OFF, 600),
            (Protocol::Tcp, Established, DONE, 120),
            (Protocol::Tcp, Opening, Ends::RESET, 120),
            (Protocol::Sctp, Established, Ends::OPEN, 86_400),
            (Protocol::Udp, Opening, Ends::OPEN, 30),
            (Protocol::Udp, Answered, Ends::OPEN, 30),
            (Protocol::Udp, Established, Ends::OPEN, 180),
        ] {
            for begun in [5 * SECOND, 5_u64.wrapping_sub(10 * SECOND)] {
                let (key, flow) = entry(protocol, state, ends, begun);
                let progress = Progress::of(&key, &flow);
                let end = begun.wrapping_add(seconds * SECOND);
                assert!(!progress.is_over(end), "{protocol:?} {state:?} {ends:?} at its end");
                assert!(
                    progress.is_over(end.wrapping_add(1)),
                    "{protocol:?} {state:?} {ends:?} past its end"
                );
            }
        }
    }

    #[test]
    fn a_flow_is_as_old_as_its_youngest_entry() {
        let (key, asked) = entry(Protocol::Tcp, FlowState::Established, FINISHED, 10 * SECOND);
        let (_, answered) = entry(Protocol::Tcp, FlowState::Established, Ends::OPEN, 4_000 * SECOND);
        let now = 5_000 * SECOND;
        let one = Progress::of(&key, &asked);
        assert!(one.is_over(now), "this entry was seen more than an hour ago");
        let both = one.and(&answered);
        assert!(!both.is_over(now), "the other one later");
        assert_eq!(both.word(), "half-closed", "whichever entry is asked first");
        assert_eq!(Progress::of(&key, &answered).and(&asked), both);
        assert!(both.is_over(4_000 * SECOND + 3_601 * SECOND));
    }

    /// Two FINs at the same instant, on two CPUs: each entry knows of one.
    #[test]
    fn what_two_entries_say_of_its_end_counts_together() {
        let (key, asked) = entry(Protocol::Tcp, FlowState::Established, FINISHED, SECOND);
        let other = Ends { backend: FlowEnd::Finished, ..Ends::OPEN };
        let (_, answered) = entry(Protocol::Tcp, FlowState::Established, other, SECOND);
        let (one, now) = (Progress::of(&key, &asked), 122 * SECOND);
        assert!(!one.is_over(now) && one.may_be_over(now));
        assert_eq!((one.and(&answered).is_over(now), one.and(&answered).word()), (true, "closed"));
    }

    #[test]
    fn a_clock_before_the_last_packet_is_no_idleness() {
        let (key, flow) = entry(Protocol::Udp, FlowState::Established, Ends::OPEN, 10);
        assert_eq!(Progress::of(&key, &flow).idle(5), Duration::ZERO);
    }
}
