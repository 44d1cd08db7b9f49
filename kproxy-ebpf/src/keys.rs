//! Keys of flows, which one flow holds at a time, whichever processors want one at the same instant: else two clients
//! would be behind one port of a mask, and get each other's answers.
//!
//! A flow holds a key from when it adds its entry to `flow_transient` until it ends. Between, the entry moves: to `flow`
//! when the flow is established, and back when it ends. It is added where it goes before it is removed from where it was,
//! so that a packet finds it; but who looks into both tables for a key that is free can miss it on its way.
//!
//! The functions here are global ones: the verifier checks each once, and not again for every try of every caller.

use kproxy_common::{Conversation, Flow, FlowKey, FlowState, Role};

use crate::maps;

const ANY: u64 = 0;
const NOEXIST: u64 = 1;
const EXIST: u64 = 2;

/// One entry of a flow, in a place of its own beside the whole.
pub struct Entry {
    pub key: &'static mut FlowKey,
    pub flow: &'static mut Flow,
}

impl Entry {
    #[inline(always)]
    pub fn of(whole: &Conversation, role: Role) -> Option<Self> {
        if write(whole, role) { Self::get() } else { None }
    }

    /// The one that was written last.
    #[inline(always)]
    fn get() -> Option<Self> {
        let place = maps::ENTRY.get_ptr_mut(0)?.cast::<maps::FlowEntry>();
        // SAFETY: the element is this CPU's, as long as the structure, and used by one caller at a time: each use is
        // over before the next begins. Packet programs run with bottom halves disabled, so that none interrupts
        // another on its CPU.
        let (key, flow) = unsafe { (&mut (*place).key, &mut (*place).flow) };
        Some(Self { key, flow })
    }
}

#[inline(never)]
fn write(whole: &Conversation, role: Role) -> bool {
    match Entry::get() {
        Some(Entry { key, flow }) => {
            whole.write_entry(role, key, flow);
            true
        }
        None => false,
    }
}

/// Adds the entry to `flow_transient`, if no flow holds its key; whether it did.
#[inline(always)]
pub fn take(whole: &Conversation, role: Role) -> bool {
    write(whole, role) && take_key() != 0
}

/// Notes state and time in the entry of `flow_transient`, if there is one that leads where the flow does; whether there
/// is.
#[inline(always)]
pub fn mark(whole: &Conversation, role: Role) -> bool {
    write(whole, role) && mark_key() != 0
}

/// Moves the entry to `flow`.
#[inline(always)]
pub fn establish(whole: &Conversation, role: Role) {
    if write(whole, role) {
        move_to_flow();
    }
}

/// Moves the entry of a flow that has ended to `flow_transient`, or only removes it where another flow has its key there.
#[inline(always)]
pub fn end(whole: &Conversation, role: Role) {
    if write(whole, role) {
        move_from_flow();
    }
}

/// Removes the entry of a flow that has ended, if it has.
#[inline(always)]
pub fn forget(whole: &Conversation, role: Role) {
    if write(whole, role) {
        forget_key();
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take_key() -> u64 {
    let Some(Entry { key, flow }) = Entry::get() else {
        return 0;
    };
    let standing = transient(key).map(|flow| flow.state);
    if is_established(key) {
        return 0;
    }
    let is_added = match standing {
        // Of those that find none, the kernel lets one through.
        None => maps::FLOW_TRANSIENT.insert(&*key, &*flow, NOEXIST).is_ok(),
        Some(FlowState::Closed) => replace_ended(key, flow),
        Some(FlowState::Opening | FlowState::Answered | FlowState::Established | FlowState::Finished) => {
            false
        }
    };
    if !is_added {
        return 0;
    }
    // Whoever held the key when it was looked for in `flow` can have been established since.
    if is_established(key) {
        let _ = maps::FLOW_TRANSIENT.remove(&*key);
        return 0;
    }
    1
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn forget_key() -> u64 {
    let Some(Entry { key, .. }) = Entry::get() else {
        return 0;
    };
    u64::from(claimed(key, || maps::FLOW_TRANSIENT.remove(&*key).is_ok()))
}

/// Puts an entry in the place of one that has ended. Swept just now, that is left to those who find none.
#[inline(always)]
fn replace_ended(key: &FlowKey, flow: &Flow) -> bool {
    claimed(key, || maps::FLOW_TRANSIENT.insert(key, flow, EXIST).is_ok())
}

/// Of those that have found a flow ended, one at a time looks once more and acts: who holds the claim on its key. That is
/// an entry of a hash, since whoever inserts it sees all that was done before it was deleted, on every processor; an atomic
/// add would not promise that.
#[inline(always)]
fn claimed(key: &FlowKey, act: impl FnOnce() -> bool) -> bool {
    if maps::CLAIM.insert(key, &1, NOEXIST).is_err() {
        return false;
    }
    let done = transient(key).is_some_and(|flow| matches!(flow.state, FlowState::Closed)) && act();
    let _ = maps::CLAIM.remove(key);
    done
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mark_key() -> u64 {
    let Some(Entry { key, flow }) = Entry::get() else {
        return 0;
    };
    let Some(standing) = maps::FLOW_TRANSIENT.get_ptr_mut(&*key) else {
        return 0;
    };
    // SAFETY: the pointer is valid for the program's run. Should the element be reused just then, a flow that is being
    // opened passes for one that was answered, or is kept for longer; both fields are written by one store each.
    unsafe {
        if !leads_alike(&*standing, flow) {
            return 0;
        }
        (*standing).state = flow.state;
        (*standing).last_seen = flow.last_seen;
    }
    1
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn move_to_flow() -> u64 {
    let Some(Entry { key, flow }) = Entry::get() else {
        return 0;
    };
    // Where it was evicted, another flow can have taken the key.
    let is_its = match transient(key) {
        None => take_key() != 0,
        // Nobody else takes the key of a client that is to be masked; but two first packets at a time can get a mask each.
        Some(standing) => leads_alike(standing, flow) || matches!(flow.role, Role::Forwarded),
    };
    // An LRU map makes room; if it cannot, the flow stays transient and is moved by its client's next packet.
    if !is_its || maps::FLOW.insert(&*key, &*flow, ANY).is_err() {
        return 0;
    }
    let _ = maps::FLOW_TRANSIENT.remove(&*key);
    1
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn move_from_flow() -> u64 {
    let Some(Entry { key, flow }) = Entry::get() else {
        return 0;
    };
    // SAFETY: as in `transient`.
    let is_its = unsafe { maps::FLOW.get(&*key) }.map(|standing| leads_alike(standing, flow));
    if matches!(is_its, Some(false)) {
        // Where it was evicted, another flow has taken the key.
        return 0;
    }
    let is_established = matches!(is_its, Some(true));
    if !is_established || maps::FLOW_TRANSIENT.insert(&*key, &*flow, NOEXIST).is_err() {
        // One of its own from before it was established: it ends without ever having been, or it began anew where others
        // were evicted. What has ended is there for others to take.
        let is_own = transient(key)
            .is_some_and(|other| !matches!(other.state, FlowState::Closed) && leads_alike(other, flow));
        if is_own {
            let _ = maps::FLOW_TRANSIENT.insert(&*key, &*flow, EXIST);
        }
    }
    if is_established {
        let _ = maps::FLOW.remove(&*key);
    }
    1
}

#[inline(always)]
fn leads_alike(one: &Flow, other: &Flow) -> bool {
    (one.address, one.port, one.client_port) == (other.address, other.port, other.client_port)
}

#[inline(always)]
fn transient(key: &FlowKey) -> Option<&'static Flow> {
    // SAFETY: what is read of it is read at once. Should the element be reused just then, for another key, the insertion
    // that follows fails or finds that key's own entry in its place.
    unsafe { maps::FLOW_TRANSIENT.get(key) }
}

#[inline(always)]
fn is_established(key: &FlowKey) -> bool {
    // SAFETY: nothing is read through the pointer: it is only asked whether there is one.
    unsafe { maps::FLOW.get(key) }.is_some()
}
