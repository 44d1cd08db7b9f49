//! Drops and refusals as they happen, for whoever listens: `kproxy drops`.
//!
//! Programs look at one word; unless it says that somebody listens, a drop costs nothing more. A listener moves that
//! word ahead of the clock again and again, so that one that was killed is forgotten within seconds.

use crate::{Address, PacketMeta, Reason, elapsed};

/// How many events a CPU writes in a second, and at once: more would cost the node what the drops do not.
pub const DROPS_PER_SECOND: u64 = 500;

const SECOND: u64 = 1_000_000_000;

/// Value of `drop_listener`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DropListener {
    /// Until when somebody listens, in nanoseconds since boot.
    pub until: u64,
}

/// Value of `drop_budget`: how many events this CPU may still write, and how many it had to write so far.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct DropBudget {
    /// The next event's [`DropEvent::sequence`].
    pub sequence: u64,
    /// When tokens were last added, in nanoseconds since boot.
    pub refilled: u64,
    /// Events that may be written at once.
    pub tokens: u64,
}

impl DropBudget {
    /// Takes a token, if there is one at `now` (nanoseconds since boot). Whether there was.
    #[inline(always)]
    pub fn take(&mut self, now: u64) -> bool {
        let elapsed = elapsed(now, self.refilled);
        if elapsed >= SECOND {
            self.refilled = now;
            self.tokens = DROPS_PER_SECOND;
        } else {
            let fresh = elapsed * DROPS_PER_SECOND / SECOND;
            // Only the time that was turned into whole tokens has passed.
            self.refilled += fresh * (SECOND / DROPS_PER_SECOND);
            self.tokens += fresh;
            if self.tokens > DROPS_PER_SECOND {
                self.tokens = DROPS_PER_SECOND;
            }
        }
        if self.tokens == 0 {
            return false;
        }
        self.tokens -= 1;
        true
    }
}

/// Which of a CPU's two budgets: packet hooks can interrupt socket hooks.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DropPath {
    /// Packet hooks.
    Packet = 0,
    /// Socket hooks.
    Socket = 1,
}

impl DropPath {
    /// How many there are.
    pub const COUNT: u32 = 2;
}

/// What `drop_event` carries.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DropEvent {
    /// When, in nanoseconds since boot.
    pub time: u64,
    /// Counts up with every event of the same [`stream`](Self::stream), also those that were not written: a gap says
    /// how many.
    pub sequence: u64,
    /// Source address; unspecified for sockets, which may have none yet, and for packets that could not be parsed.
    pub source: Address,
    /// Destination address, as the program saw it; unspecified for packets that could not be parsed.
    pub destination: Address,
    /// Source port, host order.
    pub source_port: u16,
    /// Destination port, host order.
    pub destination_port: u16,
    /// Transport protocol (IANA number); 0 if the packet could not be parsed.
    pub protocol: u8,
    /// [`Reason`] as a number.
    pub reason: u8,
    /// 1: refused (the other side was told); 0: dropped.
    pub refused: u8,
    /// Zero.
    pub _pad: u8,
    /// The interface's index; 0 for sockets.
    pub device: u32,
    /// The CPU times [`DropPath::COUNT`], plus the [`DropPath`].
    pub stream: u32,
}

impl DropEvent {
    /// Fills in what a packet tells.
    #[inline(always)]
    pub fn describe(&mut self, packet: &PacketMeta) {
        self.source = packet.source;
        self.destination = packet.destination;
        self.source_port = packet.source_port;
        self.destination_port = packet.destination_port;
        self.protocol = packet.protocol as u8;
    }

    /// Why.
    pub fn reason(&self) -> Option<Reason> {
        Reason::ALL.get(usize::from(self.reason)).copied()
    }
}

const _: () = {
    assert!(size_of::<DropListener>() == 8);
    assert!(size_of::<DropBudget>() == 24);
    assert!(size_of::<DropEvent>() == 64);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_allows_a_burst_and_then_its_rate() {
        let mut budget = DropBudget::default();
        let start = 7 * SECOND;
        assert_eq!((0..2_000).filter(|_| budget.take(start)).count() as u64, DROPS_PER_SECOND);
        // A packet every microsecond for two seconds.
        let taken = (0..2_000_000).filter(|n| budget.take(start + n * 1_000)).count() as u64;
        assert!((2 * DROPS_PER_SECOND - 1..=2 * DROPS_PER_SECOND).contains(&taken), "{taken}");
        // After silence a burst again, and no more than one.
        let taken = (0..2_000).filter(|_| budget.take(start + 100 * SECOND)).count() as u64;
        assert_eq!(taken, DROPS_PER_SECOND);
    }

    #[test]
    fn a_clock_that_lags_between_cpus_gives_nothing_away() {
        let mut budget = DropBudget::default();
        while budget.take(5 * SECOND) {}
        assert!(!budget.take(4 * SECOND));
    }
}
