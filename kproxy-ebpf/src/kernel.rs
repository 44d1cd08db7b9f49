//! The decision's tables, as the kernel holds them.

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock_tuple},
    btf_maps::lpm_trie::Key,
    helpers::{bpf_ktime_get_ns, bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp},
};
use kproxy_common::{
    Action, Address, AddressKind, AffinityKey, AffinityValue, Backend, BackendSlots, Block, ClientKind,
    Config, Conversation, DeviceAddresses, DeviceKey, FlowTables, FragmentKey, FragmentPorts, FrontendKey,
    Hit, Hook, PacketMeta, Protocol, Role, ServiceIdentity, Side, SourceRangeKey, Tables, Wanted,
    in_cluster_cidr, masqueraded_index, search,
};

use crate::{
    keys::{self, Entry},
    maps,
};

const ANY: u64 = 0;

/// In which network namespace sockets are looked up: that of the packet's device.
const THIS_NAMESPACE: u64 = u64::MAX;

/// The kernel's maps, and, for a packet, its host's sockets.
pub struct Kernel {
    skb: *mut __sk_buff,
}

/// The kernel's maps.
pub const KERNEL: Kernel = Kernel { skb: core::ptr::null_mut() };

impl Kernel {
    /// The maps, and the sockets of the host that has this packet.
    #[inline(always)]
    pub const fn of(skb: *mut __sk_buff) -> Self {
        Self { skb }
    }

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
        // A copy: what a helper is given a pointer to stays in memory, and with it all that it is part of.
        let address = Address::from_words(address.words());
        // SAFETY: as for `frontend`.
        unsafe { maps::ADDRESS.get(&address) }.map(|entry| entry.kind())
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
    fn slots_of(&self, backend: u32) -> Option<BackendSlots> {
        let slots = maps::BACKEND_SLOT.get_ptr(backend)?.cast::<u64>();
        // SAFETY: an element is one aligned word, which the agent changes by one store.
        Some(BackendSlots::from_word(unsafe { core::ptr::read_volatile(slots) }))
    }

    #[inline(always)]
    fn source_allowed(&self, number: u32, client: &Address) -> bool {
        let range = maps::SourceRange { number, address: *client };
        maps::SOURCE_RANGE.get(&Key::new(SourceRangeKey::NUMBER_BITS + 128, range)).is_some()
    }

    #[inline(always)]
    fn opted_out(&self, netns_cookie: u64) -> bool {
        is_opted_out(netns_cookie)
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
    fn is_in_cluster(&self, address: &Address) -> bool {
        let [a, b, c, d] = address.words();
        let (high, low) = (u64::from(a) << 32 | u64::from(b), u64::from(c) << 32 | u64::from(d));
        in_cluster(high, low) != 0
    }

    #[inline(always)]
    fn locate(&self, wanted: &Wanted) -> Option<u32> {
        let [a, b, c, d] = wanted.address.words();
        let slot = locate_backend(
            u64::from(a) << 32 | u64::from(b),
            u64::from(c) << 32 | u64::from(d),
            u64::from(wanted.service) << 32 | u64::from(wanted.port),
            u64::from(wanted.first) << 32 | u64::from(wanted.count),
            wanted.backend,
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
    fn flow(&self, packet: &PacketMeta, hook: Hook) -> Option<Hit> {
        let scratch = Scratch::of(packet, hook)?;
        // SAFETY: copied at once. Should the element be reused just then, a packet of an evicted flow goes astray,
        // as it would without the flow.
        unsafe { maps::FLOW.get(&scratch.key) }.map(Hit::from)
    }

    #[inline(always)]
    fn transient(&self, packet: &PacketMeta, hook: Hook) -> Option<Hit> {
        let scratch = Scratch::of(packet, hook)?;
        // SAFETY: as for `flow`.
        unsafe { maps::FLOW_TRANSIENT.get(&scratch.key) }.map(Hit::from)
    }

    #[inline(always)]
    fn with_flow<R>(
        &self,
        packet: &PacketMeta,
        hook: Hook,
        act: impl FnOnce(&mut Conversation) -> R,
    ) -> Option<R> {
        let scratch = Scratch::of(packet, hook)?;
        // SAFETY: as for `flow`.
        let flow = unsafe { maps::FLOW.get(&scratch.key) }?;
        scratch.whole.read_entry(&scratch.key, flow);
        Some(act(&mut scratch.whole))
    }

    #[inline(always)]
    fn with_transient<R>(
        &self,
        packet: &PacketMeta,
        hook: Hook,
        act: impl FnOnce(&mut Conversation) -> R,
    ) -> Option<R> {
        let scratch = Scratch::of(packet, hook)?;
        // SAFETY: as for `flow`.
        let flow = unsafe { maps::FLOW_TRANSIENT.get(&scratch.key) }?;
        scratch.whole.read_entry(&scratch.key, flow);
        Some(act(&mut scratch.whole))
    }

    #[inline(always)]
    fn with_new(&self, act: impl FnOnce(&mut Conversation) -> u32) -> u32 {
        match Scratch::get() {
            Some(scratch) => act(&mut scratch.whole),
            None => 0,
        }
    }

    #[inline(always)]
    fn act(&self, whole: &Conversation, role: Role, action: Action) -> bool {
        keys::act(whole, role, action)
    }

    #[inline(always)]
    fn take_return(&self, _: &Conversation, rest: u64) -> bool {
        !self.skb.is_null() && take_return(self.skb, rest) != 0
    }

    #[inline(always)]
    fn act_all(&self, whole: &Conversation, action: Action) -> bool {
        keys::act_all(whole, action)
    }

    #[inline(always)]
    fn occupant(&self, whole: &Conversation, role: Role) -> Option<Hit> {
        let Entry { key, .. } = Entry::of(whole, role)?;
        // SAFETY: as for `flow`.
        let found = unsafe { maps::FLOW.get(&*key) };
        // SAFETY: as for `flow`.
        found.or_else(|| unsafe { maps::FLOW_TRANSIENT.get(&*key) }).map(Hit::from)
    }

    #[inline(always)]
    fn wait(&self, whole: &mut Conversation) -> bool {
        keys::wait(whole)
    }

    #[inline(always)]
    fn mask_address(&self, device: u32, like: &Address) -> Option<Address> {
        let addresses = addresses_of(device)?;
        let address = if like.is_v4() { addresses.v4 } else { addresses.v6 };
        (!address.is_unspecified()).then_some(address)
    }

    #[inline(always)]
    fn clients_behind(&self, device: u32) -> ClientKind {
        addresses_of(device).map_or(ClientKind::Outside, DeviceAddresses::clients)
    }

    #[inline(always)]
    fn shares_bridge(&self, device: u32, like: &Address) -> bool {
        let Some(addresses) = addresses_of(device) else {
            return false;
        };
        let bridged = if like.is_v4() { addresses.bridged_v4 } else { addresses.bridged_v6 };
        bridged != 0
    }

    #[inline(always)]
    fn has_socket(&self, whole: &Conversation) -> bool {
        !self.skb.is_null() && has_socket(self.skb, whole)
    }

    #[inline(always)]
    fn masquerades_towards(&self, address: &Address, port: u16) -> bool {
        maps::MASQUERADED_TOWARDS.get(masqueraded_index(address, port)).is_some_and(|word| *word != 0)
    }

    #[inline(always)]
    fn note_masqueraded(&self, address: &Address, port: u16) {
        if let Some(word) = maps::MASQUERADED_TOWARDS.get_ptr_mut(masqueraded_index(address, port)) {
            // SAFETY: the pointer is valid for the program's run; all store the same word.
            unsafe { core::ptr::write_volatile(word, 1) };
        }
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        // SAFETY: copied at once; should the element be reused just then, the fragment finds no flow.
        unsafe { maps::FRAGMENT.get(key) }.copied()
    }

    #[inline(always)]
    fn remember_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) {
        // Without room the rest of the datagram is lost, as it is without a first fragment.
        let _ = maps::FRAGMENT.insert(key, ports, ANY);
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

/// What packet programs put together that their 512 octets of stack have no room for. Packet programs run with
/// bottom halves disabled, so that none interrupts another on its CPU.
struct Scratch;

impl Scratch {
    #[inline(always)]
    fn get() -> Option<&'static mut maps::Scratch> {
        let place = maps::SCRATCH.get_ptr_mut(0)?.cast::<maps::Scratch>();
        // SAFETY: the element is this CPU's, as long as the structure, and used by one caller at a time: nothing
        // that is called while the whole of a flow is held touches it.
        Some(unsafe { &mut *place })
    }

    /// With the key of this packet.
    #[inline(always)]
    fn of(packet: &PacketMeta, hook: Hook) -> Option<&'static mut maps::Scratch> {
        let scratch = Self::get()?;
        packet.write_key(hook, &mut scratch.key);
        Some(scratch)
    }
}

/// What is known of an interface. The order of the two is [`DeviceKey`]'s.
#[inline(always)]
fn addresses_of(interface: u32) -> Option<&'static DeviceAddresses> {
    // SAFETY: elements of this map are never replaced, and not reused within a grace period.
    let copy = |copy| unsafe { maps::DEVICE.get(&DeviceKey { interface, copy }) };
    copy(0).or_else(|| copy(1))
}

/// A function of its own, so that a socket program pays for it only where somebody is opted out.
#[inline(never)]
fn is_opted_out(netns_cookie: u64) -> bool {
    // SAFETY: nothing is read through the pointer: it is only asked whether there is one.
    unsafe { maps::OPTED_OUT.get(netns_cookie) }.is_some()
}

/// [`FlowTables::take_return`] of the whole in `scratch`, as a global function: the verifier checks it once, and not
/// again for each port that is tried.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take_return(skb: *mut __sk_buff, rest: u64) -> u64 {
    let Some(scratch) = Scratch::get() else {
        return 0;
    };
    u64::from(
        !has_socket(skb, &scratch.whole)
            && keys::act(&scratch.whole, scratch.whole.port_holder(), Action::Take { rest }),
    )
}

/// Whether a socket of this host would get what the flow's backend sends to its mask. A listening one counts too: it
/// would answer.
#[inline(never)]
fn has_socket(skb: *mut __sk_buff, whole: &Conversation) -> bool {
    // SAFETY: a tuple is words only, for which zero is a value.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let (from, to) = (whole.backend_port.to_be(), whole.mask_port.to_be());
    let size = if whole.mask.is_v4() {
        // SAFETY: all of the union's forms are words.
        let v4 = unsafe { &mut tuple.__bindgen_anon_1.ipv4 };
        (v4.saddr, v4.daddr) = (whole.backend.v4_word(), whole.mask.v4_word());
        (v4.sport, v4.dport) = (from, to);
        12
    } else {
        // SAFETY: as above.
        let v6 = unsafe { &mut tuple.__bindgen_anon_1.ipv6 };
        (v6.saddr, v6.daddr) = (whole.backend.words(), whole.mask.words());
        (v6.sport, v6.dport) = (from, to);
        36
    };
    // SAFETY: the tuple is longer than the size that the helpers are told; what they return is given back.
    unsafe {
        let socket = match whole.protocol {
            Protocol::Tcp => bpf_skc_lookup_tcp(skb.cast(), &raw mut tuple, size, THIS_NAMESPACE, 0),
            Protocol::Udp => bpf_sk_lookup_udp(skb.cast(), &raw mut tuple, size, THIS_NAMESPACE, 0),
            Protocol::Sctp => core::ptr::null_mut(),
        };
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket.cast());
    }
    true
}

/// The search for a backend that may have moved, as a global function: the verifier checks it once, and
/// not again for every state of every caller. Its arguments are scalars, which is all that kernels before 5.12
/// accept there.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn locate_backend(high: u64, low: u64, service_and_port: u64, range: u64, backend: u32) -> u64 {
    let wanted = Wanted {
        address: Address::from_words([(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32]),
        port: service_and_port as u16,
        service: (service_and_port >> 32) as u32,
        backend,
        first: (range >> 32) as u32,
        count: range as u16,
    };
    match search(&KERNEL, &wanted) {
        Some(slot) => u64::from(slot),
        None => u64::MAX,
    }
}

/// Whether `--cluster-cidr` has this address within, as a global function for the same reason.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn in_cluster(high: u64, low: u64) -> u64 {
    let words = [(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32];
    in_cluster_cidr(&KERNEL, &Address::from_words(words)).into()
}
