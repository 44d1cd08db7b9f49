//! The tables of flows: [`kproxy_common::flow_store`] over the kernel's maps.
//!
//! The functions here are global ones: the verifier checks each once, and not again for every try
//! of every caller.

use aya_ebpf::{btf_maps::LruHashMap, helpers::bpf_ktime_get_ns};
use kproxy_common::{
    Action, Conversation, Flow, FlowKey, FlowStore, FlowTable, Marks, REST, Role, WAITING,
    flow_store as store,
};

use crate::maps;

const NOEXIST: u64 = 1;
const EXIST: u64 = 2;

/// One entry of a flow, in a place of its own beside the whole.
pub struct Entry {
    pub key: &'static mut FlowKey,
    pub flow: &'static mut Flow,
}

impl Entry {
    /// Of the flow that the caller holds: always the one in `scratch`.
    #[inline(always)]
    pub fn of(_: &Conversation, role: Role) -> Option<Self> {
        if write_role(role as u32) != 0 { Self::get() } else { None }
    }

    /// The one that was written last.
    #[inline(always)]
    fn get() -> Option<Self> {
        let place = maps::ENTRY.get_ptr_mut(0)?.cast::<maps::FlowEntry>();
        // SAFETY: the element is this CPU's, as long as the structure, and used by one caller at a
        // time: each use is over before the next begins. Packet programs run with bottom halves
        // disabled, so that none interrupts another on its CPU.
        let (key, flow) = unsafe { (&mut (*place).key, &mut (*place).flow) };
        Some(Self { key, flow })
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn write_role(role: u32) -> u64 {
    let (Some(place), Some(Entry { key, flow })) = (maps::SCRATCH.get_ptr(0), Entry::get()) else {
        return 0;
    };
    // SAFETY: the element is this CPU's, as long as the structure; whoever calls has put a flow
    // there, and waits.
    let whole = unsafe { &(*place.cast::<maps::Scratch>()).whole };
    let role = match role {
        1 => Role::Request,
        2 => Role::Forwarded,
        3 => Role::Return,
        5 => Role::NodeRequest,
        6 => Role::NodeReply,
        _ => Role::Reply,
    };
    whole.write_entry(role, key, flow);
    1
}

/// Does something with one entry of a flow; whether it was done.
#[inline(always)]
pub fn act(whole: &Conversation, role: Role, action: Action) -> bool {
    if Entry::of(whole, role).is_none() {
        return false;
    }
    let done = match action {
        Action::Take { rest } => take_key(rest),
        Action::Put => put_key(),
        Action::Establish => establish_key(),
        Action::End => end_key(),
        Action::StepAside => step_aside_key(),
        Action::Mark(table, marks) => mark_key(number(table), marks.bits()),
        Action::Keep(table, marks) => u64::from(
            mark_key(number(table), marks.bits()) != 0
                || match table {
                    FlowTable::Established => establish_key() != 0,
                    FlowTable::Transient => take_key(REST) != 0,
                },
        ),
    };
    done != 0
}

/// The same with each entry of a flow.
#[inline(always)]
pub fn act_all(whole: &Conversation, action: Action) -> bool {
    let done = match action {
        Action::Establish => establish_flow(),
        Action::End => end_flow(),
        Action::Mark(table, marks) => mark_flow(number(table), marks.bits()),
        Action::Keep(FlowTable::Established, marks) => keep_flow(marks.bits()),
        Action::Keep(FlowTable::Transient, marks) => keep_transient_flow(marks.bits()),
        Action::Take { .. } | Action::Put | Action::StepAside => {
            u64::from(store::for_all(whole, |role| act(whole, role, action)))
        }
    };
    done != 0
}

#[inline(always)]
fn number(table: FlowTable) -> u32 {
    match table {
        FlowTable::Established => 1,
        FlowTable::Transient => 0,
    }
}

#[inline(always)]
fn for_flow(action: Action) -> u64 {
    let Some(place) = maps::SCRATCH.get_ptr(0) else {
        return 0;
    };
    // SAFETY: the element is this CPU's, as long as the structure; whoever calls has put a flow
    // there, and waits.
    let whole = unsafe { &(*place.cast::<maps::Scratch>()).whole };
    u64::from(match action {
        Action::Keep(..) => store::keep_all(whole, |role| act(whole, role, action)),
        _ => store::for_all(whole, |role| act(whole, role, action)),
    })
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn establish_flow() -> u64 {
    for_flow(Action::Establish)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn end_flow() -> u64 {
    for_flow(Action::End)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mark_flow(is_established: u32, marks: u32) -> u64 {
    let table = if is_established != 0 { FlowTable::Established } else { FlowTable::Transient };
    for_flow(Action::Mark(table, Marks::from_bits(marks)))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn keep_flow(marks: u32) -> u64 {
    for_flow(Action::Keep(FlowTable::Established, Marks::from_bits(marks)))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn keep_transient_flow(marks: u32) -> u64 {
    for_flow(Action::Keep(FlowTable::Transient, Marks::from_bits(marks)))
}

/// See [`kproxy_common::FlowTables::wait`].
#[inline(always)]
pub fn wait(whole: &mut Conversation) -> bool {
    let Some(Entry { key, .. }) = Entry::of(whole, Role::Request) else {
        return false;
    };
    if exchange_key() == 0 {
        return false;
    }
    // SAFETY: what is read of it is read at once. Should the element be reused just then, another
    // flow of this CPU's that has ended is looked at, which the caller asks about.
    match unsafe { maps::FLOW.get(&*key) } {
        Some(flow) => {
            whole.read_entry(key, flow);
            true
        }
        None => false,
    }
}

/// Puts the key that was written into the ring, and the one that has stood there for longest in its
/// place; whether there was one.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn exchange_key() -> u64 {
    const WORDS: usize = size_of::<FlowKey>() / 8;
    let (Some(Entry { key, .. }), Some(count)) = (Entry::get(), maps::WAITING.get_ptr_mut(WAITING)) else {
        return 0;
    };
    // SAFETY: the element is this CPU's.
    let place = unsafe {
        let count = count.cast::<u64>();
        let place = *count % u64::from(WAITING);
        *count = place + 1;
        place as u32
    };
    let Some(waiting) = maps::WAITING.get_ptr_mut(place) else {
        return 0;
    };
    let (waiting, key) = (waiting.cast::<u64>(), core::ptr::from_mut(key).cast::<u64>());
    let mut any = 0;
    let mut i = 0;
    while i < WORDS {
        // SAFETY: both are as many words, aligned, of this CPU's.
        unsafe {
            let before = core::ptr::read_volatile(waiting.add(i));
            core::ptr::write_volatile(waiting.add(i), core::ptr::read_volatile(key.add(i)));
            core::ptr::write_volatile(key.add(i), before);
            any |= before;
        }
        i += 1;
    }
    u64::from(any != 0)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take_key(rest: u64) -> u64 {
    with_entry(|key, flow| store::take(&Maps, key, flow, rest))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn put_key() -> u64 {
    with_entry(|key, flow| store::put(&Maps, key, flow))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn establish_key() -> u64 {
    with_entry(|key, flow| store::establish(&Maps, key, flow))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn end_key() -> u64 {
    with_entry(|key, flow| store::end(&Maps, key, flow))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_aside_key() -> u64 {
    with_entry(|key, _| store::step_aside(&Maps, key))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn mark_key(is_established: u32, marks: u32) -> u64 {
    let marks = Marks::from_bits(marks);
    with_entry(|key, flow| {
        if is_established != 0 {
            store::mark(&Maps, FlowTable::Established, key, flow, marks)
        } else {
            store::mark(&Maps, FlowTable::Transient, key, flow, marks)
        }
    })
}

#[inline(always)]
fn with_entry(act: impl FnOnce(&FlowKey, &Flow) -> bool) -> u64 {
    match Entry::get() {
        Some(Entry { key, flow }) => u64::from(act(key, flow)),
        None => 0,
    }
}

/// The kernel's maps.
struct Maps;

impl Maps {
    #[inline(always)]
    fn table(table: FlowTable) -> &'static LruHashMap<FlowKey, Flow, { maps::FLOWS }> {
        match table {
            FlowTable::Established => &maps::FLOW,
            FlowTable::Transient => &maps::FLOW_TRANSIENT,
        }
    }
}

impl FlowStore for Maps {
    #[inline(always)]
    fn read<R>(&self, table: FlowTable, key: &FlowKey, read: impl FnOnce(&Flow) -> R) -> Option<R> {
        // SAFETY: what is read of it is read at once. Should the element be reused just then, for
        // another key, the insertion that follows fails or finds that key's own entry in its place.
        unsafe { Self::table(table).get(key) }.map(read)
    }

    #[inline(always)]
    fn insert(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool {
        Self::table(table).insert(key, flow, NOEXIST).is_ok()
    }

    #[inline(always)]
    fn replace(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool {
        Self::table(table).insert(key, flow, EXIST).is_ok()
    }

    #[inline(always)]
    fn remove(&self, table: FlowTable, key: &FlowKey) -> bool {
        Self::table(table).remove(key).is_ok()
    }

    #[inline(always)]
    fn change(&self, table: FlowTable, key: &FlowKey, change: impl FnOnce(&mut Flow) -> bool) -> bool {
        match Self::table(table).get_ptr_mut(key) {
            // SAFETY: the pointer is valid for the program's run. Should the element be reused just
            // then, a flow that is being opened passes for one that was answered, or is kept for
            // longer.
            Some(flow) => change(unsafe { &mut *flow }),
            None => false,
        }
    }

    /// An entry of a hash, since whoever inserts it sees all that was done before it was deleted,
    /// on every CPU; an atomic add would not promise that.
    #[inline(always)]
    fn claim(&self, key: &FlowKey) -> bool {
        maps::CLAIM.insert(key, &1, NOEXIST).is_ok()
    }

    #[inline(always)]
    fn release(&self, key: &FlowKey) {
        let _ = maps::CLAIM.remove(key);
    }

    #[inline(always)]
    fn time(&self) -> u64 {
        // SAFETY: the helper has no conditions.
        unsafe { bpf_ktime_get_ns() }
    }
}
