//! The two tables of flows, and what is done with one entry in them.
//!
//! A key belongs to one flow at a time, whichever CPUs want it at the same instant: else two
//! clients would be behind one port of a mask, and get each other's answers. A flow holds a key
//! from when it adds its entry to the table of flows that are opening or closing until it ends.
//! Between, the entry moves: to the established ones when the flow is, and back when it has ended.
//! It is added where it goes before it is removed from where it was, so that a packet finds it; but
//! who looks into both tables for a key that is free can miss it on its way.

use super::{Conversation, Flow, FlowKey, REST, Role, is_over};
use crate::{elapsed, map_names};

/// One of the two tables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum FlowTable {
    /// Flows whose ends have answered each other.
    Established,
    /// Flows that are being opened, and those that have ended.
    Transient,
}

impl FlowTable {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Established, Self::Transient];

    /// The map's name.
    pub const fn map(self) -> &'static str {
        match self {
            Self::Established => map_names::FLOW,
            Self::Transient => map_names::FLOW_TRANSIENT,
        }
    }

    /// The word for it in output.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::Transient => "transient",
        }
    }
}

/// What an entry is given in place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Marks {
    bits: u32,
}

impl Marks {
    /// When it was last seen.
    pub const SEEN: Self = Self { bits: 1 };
    /// How far it has come.
    pub const STATE: Self = Self { bits: 2 };
    /// What its client has said about its end.
    pub const CLIENT: Self = Self { bits: 4 };
    /// What its backend has.
    pub const BACKEND: Self = Self { bits: 8 };
    /// What both have.
    pub const ENDS: Self = Self { bits: 12 };

    /// These and others.
    #[inline(always)]
    pub const fn and(self, other: Self) -> Self {
        Self { bits: self.bits | other.bits }
    }

    /// As a number that a function of a program can be called with.
    #[inline(always)]
    pub const fn bits(self) -> u32 {
        self.bits
    }

    /// From [`bits`](Self::bits).
    #[inline(always)]
    pub const fn from_bits(bits: u32) -> Self {
        Self { bits }
    }

    #[inline(always)]
    const fn has(self, other: Self) -> bool {
        self.bits & other.bits == other.bits
    }
}

/// What is done with one entry of a flow. Each says whether it was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// [`take`].
    Take {
        /// How long the flow that has held the key must have been silent, in nanoseconds.
        rest: u64,
    },
    /// [`put`].
    Put,
    /// [`establish`].
    Establish,
    /// [`end`].
    End,
    /// [`step_aside`].
    StepAside,
    /// [`mark`].
    Mark(FlowTable, Marks),
    /// [`keep`].
    Keep(FlowTable, Marks),
}

/// Does something with each entry that a flow has; what it says of the request's.
#[inline(always)]
pub fn for_all(whole: &Conversation, act: impl Fn(Role) -> bool) -> bool {
    let done = act(Role::Request);
    act(Role::Reply);
    if whole.is_masked() {
        act(Role::Forwarded);
        act(Role::Return);
    }
    done
}

/// The same where entries may be missing: one that hides a client is put back only while the flow
/// holds its port. Once that was evicted, another flow may have it.
#[inline(always)]
pub fn keep_all(whole: &Conversation, act: impl Fn(Role) -> bool) -> bool {
    let done = act(Role::Request);
    act(Role::Reply);
    if whole.is_masked() && act(Role::Return) {
        act(Role::Forwarded);
    }
    done
}

/// The tables of flows: all that is ever done to them.
pub trait FlowStore {
    /// What `read` says of the entry under a key, if there is one. Where it stands: a program's
    /// stack has no room for copies.
    fn read<R>(&self, table: FlowTable, key: &FlowKey, read: impl FnOnce(&Flow) -> R) -> Option<R>;
    /// Adds an entry if there is none; whether it did. Of several that do at the same time, one
    /// does.
    fn insert(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool;
    /// Replaces an entry if there is one; whether it did.
    fn replace(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool;
    /// Removes an entry; whether there was one.
    fn remove(&self, table: FlowTable, key: &FlowKey) -> bool;
    /// Lets `change` write single fields of an entry in place, by one store each; what that says,
    /// or false if there is no entry.
    fn change(&self, table: FlowTable, key: &FlowKey, change: impl FnOnce(&mut Flow) -> bool) -> bool;
    /// Claims a key, if nobody else has: whoever has claimed it sees all that was done before it
    /// was released.
    fn claim(&self, key: &FlowKey) -> bool;
    /// Gives a claim back.
    fn release(&self, key: &FlowKey);
    /// Nanoseconds since boot.
    fn time(&self) -> u64;
}

/// Adds an entry of a flow that is being opened, if its key is free: nobody has it, or a flow that
/// has ended, and has rested since.
#[inline(always)]
pub fn take<S: FlowStore>(store: &S, key: &FlowKey, flow: &Flow, rest: u64) -> bool {
    let now = store.time();
    let standing = is_free_in(store, FlowTable::Transient, key, flow, rest, now);
    if let Some(is_free) = is_free_in(store, FlowTable::Established, key, flow, rest, now) {
        // One that was forgotten there: nobody sweeps, or its end is still waited for.
        if !is_free || !store.claim(key) {
            return false;
        }
        let is_free = is_free_in(store, FlowTable::Established, key, flow, rest, now);
        let is_removed = is_free == Some(true) && store.remove(FlowTable::Established, key);
        store.release(key);
        if !is_removed {
            return false;
        }
    }
    let is_added = match standing {
        None => store.insert(FlowTable::Transient, key, flow),
        Some(false) => false,
        // Of those that have found it free, one at a time looks once more. Swept just now, it is
        // left to those who find none.
        Some(true) => {
            if !store.claim(key) {
                return false;
            }
            let is_free = is_free_in(store, FlowTable::Transient, key, flow, rest, now);
            let is_replaced = is_free == Some(true) && store.replace(FlowTable::Transient, key, flow);
            store.release(key);
            is_replaced
        }
    };
    if !is_added {
        return false;
    }
    // Whoever held the key when it was looked for can have been established since.
    if store.read(FlowTable::Established, key, |_| ()).is_some() {
        store.remove(FlowTable::Transient, key);
        return false;
    }
    true
}

#[inline(always)]
fn is_free_in<S: FlowStore>(
    store: &S,
    table: FlowTable,
    key: &FlowKey,
    flow: &Flow,
    rest: u64,
    now: u64,
) -> Option<bool> {
    store.read(table, key, |standing| is_free(key, standing, flow, rest, now))
}

/// Whether an entry makes room for another flow's. A client that comes back by the same port to the
/// same frontend is for the backend what it would be without us, and finds its place at once; the
/// backend tells all others from the connection before only when that is forgotten there.
#[inline(always)]
fn is_free(key: &FlowKey, standing: &Flow, flow: &Flow, rest: u64, now: u64) -> bool {
    let Flow { state, ends, last_seen, .. } = *standing;
    let silent = elapsed(now, last_seen);
    if ends.is_done() || is_over(key.protocol, state, ends, last_seen, now) {
        return silent >= rest || standing.is_of_same_ends(flow);
    }
    // One that perhaps a stranger has said to be over is not hurried.
    ends.is_closed() && silent >= REST
}

/// Adds or replaces an entry of a flow that is being opened.
#[inline(always)]
pub fn put<S: FlowStore>(store: &S, key: &FlowKey, flow: &Flow) -> bool {
    store.insert(FlowTable::Transient, key, flow) || store.replace(FlowTable::Transient, key, flow)
}

/// Moves an entry to the established flows, or adds it there if it is missing and nobody else has
/// its key. Packets find it on its way.
#[inline(always)]
pub fn establish<S: FlowStore>(store: &S, key: &FlowKey, flow: &Flow) -> bool {
    let is_its = match store.read(FlowTable::Transient, key, |standing| standing.leads_like(flow)) {
        // It was evicted: another flow can have taken the key.
        None => take(store, key, flow, REST),
        // Nobody else takes the key of a client that is to be masked; but two first packets at a
        // time can get a mask each.
        Some(leads_like) => leads_like || matches!(flow.role, Role::Forwarded),
    };
    if !is_its {
        return false;
    }
    // An LRU map makes room; if it cannot, the flow stays where it is and is moved by its client's
    // next packet.
    let is_there =
        store.insert(FlowTable::Established, key, flow) || store.replace(FlowTable::Established, key, flow);
    is_there && store.remove(FlowTable::Transient, key)
}

/// Moves an entry of a flow that has ended back, since its last packets are still to come; or only
/// removes it, where another flow has its key there.
#[inline(always)]
pub fn end<S: FlowStore>(store: &S, key: &FlowKey, flow: &Flow) -> bool {
    let is_its = store.read(FlowTable::Established, key, |standing| standing.leads_like(flow));
    if matches!(is_its, Some(false)) {
        // Where it was evicted, another flow has taken the key.
        return false;
    }
    let is_established = matches!(is_its, Some(true));
    if !is_established || !store.insert(FlowTable::Transient, key, flow) {
        // One of its own from before it was established: it ends without ever having been, or it
        // began anew where others were evicted. What has ended is there for others to take.
        let is_own =
            store.read(FlowTable::Transient, key, |other| !other.ends.is_closed() && other.leads_like(flow));
        if is_own == Some(true) {
            store.replace(FlowTable::Transient, key, flow);
        }
    }
    !is_established || store.remove(FlowTable::Established, key)
}

/// Removes an entry of a flow that has ended, if it has.
#[inline(always)]
pub fn step_aside<S: FlowStore>(store: &S, key: &FlowKey) -> bool {
    if !store.claim(key) {
        return false;
    }
    let one = remove_closed(store, FlowTable::Established, key);
    let other = remove_closed(store, FlowTable::Transient, key);
    store.release(key);
    one || other
}

#[inline(always)]
fn remove_closed<S: FlowStore>(store: &S, table: FlowTable, key: &FlowKey) -> bool {
    store.read(table, key, |flow| flow.ends.is_closed()) == Some(true) && store.remove(table, key)
}

/// Writes into an entry in place; adds it where it is missing and nobody else has its key.
#[inline(always)]
pub fn keep<S: FlowStore>(store: &S, table: FlowTable, key: &FlowKey, flow: &Flow, marks: Marks) -> bool {
    mark(store, table, key, flow, marks)
        || match table {
            FlowTable::Established => establish(store, key, flow),
            FlowTable::Transient => take(store, key, flow, REST),
        }
}

/// Writes into an entry in place, if it is there and leads where the flow does.
#[inline(always)]
pub fn mark<S: FlowStore>(store: &S, table: FlowTable, key: &FlowKey, flow: &Flow, marks: Marks) -> bool {
    store.change(table, key, |standing| {
        if !standing.leads_like(flow) {
            return false;
        }
        if marks.has(Marks::STATE) {
            standing.state = flow.state;
        }
        if marks.has(Marks::CLIENT) {
            standing.ends.client = flow.ends.client;
        }
        if marks.has(Marks::BACKEND) {
            standing.ends.backend = flow.ends.backend;
        }
        if marks.has(Marks::SEEN) {
            standing.last_seen = flow.last_seen;
        }
        true
    })
}
