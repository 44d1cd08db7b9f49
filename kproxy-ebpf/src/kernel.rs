//! The decision's tables, as the kernel holds them.

use aya_ebpf::{btf_maps::lpm_trie::Key, helpers::bpf_ktime_get_ns};
use kproxy_common::{
    Address, AddressKind, AffinityKey, AffinityValue, Backend, Block, ClientKind, Config, Flow, FlowKey,
    FlowState, FlowTables, FrontendKey, ServiceIdentity, Side, SourceRangeKey, Tables, Wanted, search,
};

use crate::maps;

const ANY: u64 = 0;

/// The kernel's maps.
pub struct Kernel;

impl Kernel {
    /// One of the four words of a service entry, read at once.
    #[inline(always)]
    fn word(number: u32, index: usize) -> Option<u64> {
        let entry = maps::SERVICE.get_ptr(number)?.cast::<u64>();
        // SAFETY: an entry is four aligned words; the agent changes each by one store.
        Some(unsafe { core::ptr::read_volatile(entry.add(index)) })
    }
}

impl Tables for Kernel {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        maps::CONFIG.get(0)
    }

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<u32> {
        // SAFETY: elements of this map are never replaced, and not reused within a grace period.
        unsafe { maps::FRONTEND.get(key) }.copied()
    }

    #[inline(always)]
    fn address(&self, address: &Address) -> Option<AddressKind> {
        // SAFETY: as for `frontend`.
        unsafe { maps::ADDRESS.get(address) }.map(|entry| entry.kind())
    }

    #[inline(always)]
    fn side(&self, number: u32, from: ClientKind) -> Option<Side> {
        let index = if matches!(from, ClientKind::Outside) { 1 } else { 0 };
        Side::from_word(Self::word(number, index)?).ok()
    }

    #[inline(always)]
    fn identity(&self, number: u32) -> Option<ServiceIdentity> {
        Some(ServiceIdentity::from_word(Self::word(number, 2)?))
    }

    #[inline(always)]
    fn block(&self, number: u32) -> Option<Block> {
        Some(Block::from_word(Self::word(number, 3)?))
    }

    #[inline(always)]
    fn backend(&self, slot: u32) -> Option<Backend> {
        maps::BACKEND.get(slot).copied()
    }

    #[inline(always)]
    fn source_allowed(&self, number: u32, client: &Address) -> bool {
        let range = maps::SourceRange { number, address: *client };
        maps::SOURCE_RANGE.get(&Key::new(SourceRangeKey::NUMBER_BITS + 128, range)).is_some()
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<AffinityValue> {
        // SAFETY: copied at once; the value carries the service, which the decision compares.
        unsafe { maps::AFFINITY.get(key) }.copied()
    }

    #[inline(always)]
    fn remember(&self, key: &AffinityKey, value: &AffinityValue) {
        // Without room the next connection is balanced anew: nothing else depends on it.
        let _ = maps::AFFINITY.insert(key, value, ANY);
    }

    #[inline(always)]
    fn locate(&self, wanted: &Wanted) -> Option<u32> {
        let [a, b, c, d] = wanted.address.words();
        let slot = locate_backend(
            u64::from(a) << 32 | u64::from(b),
            u64::from(c) << 32 | u64::from(d),
            u64::from(wanted.service) << 32 | u64::from(wanted.port),
            u64::from(wanted.first) << 32 | u64::from(wanted.count),
            wanted.hint,
        );
        u32::try_from(slot).ok()
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: the helper has no conditions.
        unsafe { bpf_ktime_get_ns() }
    }
}

impl FlowTables for Kernel {
    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        // SAFETY: copied at once. Should the element be reused just then, the packet of an evicted flow goes
        // astray, as it would without the flow.
        unsafe { maps::FLOW.get(key) }.copied()
    }

    #[inline(always)]
    fn transient(&self, key: &FlowKey) -> Option<Flow> {
        // SAFETY: as for `flow`.
        unsafe { maps::FLOW_TRANSIENT.get(key) }.copied()
    }

    #[inline(always)]
    fn insert_flow(&self, key: &FlowKey, flow: &Flow) {
        // An LRU map makes room; if it cannot, the flow stays transient and is moved by its next answer.
        let _ = maps::FLOW.insert(key, flow, ANY);
    }

    #[inline(always)]
    fn insert_transient(&self, key: &FlowKey, flow: &Flow) {
        // Without an entry the next packet of the same 5-tuple is hashed to the same backend.
        let _ = maps::FLOW_TRANSIENT.insert(key, flow, ANY);
    }

    #[inline(always)]
    fn remove_flow(&self, key: &FlowKey) {
        // Gone already is as good.
        let _ = maps::FLOW.remove(key);
    }

    #[inline(always)]
    fn remove_transient(&self, key: &FlowKey) {
        let _ = maps::FLOW_TRANSIENT.remove(key);
    }

    #[inline(always)]
    fn note(&self, key: &FlowKey, state: FlowState, last_seen: u64) {
        if let Some(flow) = maps::FLOW.get_ptr_mut(key) {
            // SAFETY: the pointer is valid for the program's run; both fields are written by one store each.
            unsafe {
                (*flow).state = state;
                (*flow).last_seen = last_seen;
            }
        }
    }

    #[inline(always)]
    fn count(&self, number: u32, forwarded: bool) {
        let Some(counters) = maps::COUNTER.get_ptr_mut(number) else {
            return;
        };
        // SAFETY: the pointer is valid for the program's run; CPUs add to the same counter atomically.
        unsafe {
            let counter =
                if forwarded { &raw mut (*counters).connections } else { &raw mut (*counters).pass_through };
            core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(
                counter, 1,
            );
        }
    }
}

/// The search for a backend that may have moved, as a global function: the verifier checks its loop once, and
/// not again for every state of every caller. Its arguments are scalars, which is all that kernels before 5.12
/// accept there.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn locate_backend(high: u64, low: u64, service_and_port: u64, range: u64, hint: u32) -> u64 {
    let wanted = Wanted {
        address: Address::from_words([(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32]),
        port: service_and_port as u16,
        service: (service_and_port >> 32) as u32,
        hint,
        first: (range >> 32) as u32,
        count: range as u16,
    };
    match search(&Kernel, &wanted) {
        Some(slot) => u64::from(slot),
        None => u64::MAX,
    }
}
