//! The maps, with BTF for their keys and values. What each maps, who writes it and what a miss means stands
//! with its name in `kproxy_common::map_names`. Sizes are defaults: the agent sets them when it loads.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, RingBuf, SkStorage},
    macros::btf_map,
};
use kproxy_common::{
    Address, AddressEntry, AffinityKey, AffinityValue, Backend, BackendSlots, Config, Conversation, Counters,
    DeviceAddresses, DeviceKey, DropBudget, DropEvent, DropListener, DropPath, Flow, FlowKey, FragmentKey,
    FragmentPorts, FrontendKey, MASQUERADED, OptedOut, Owner, PACKET_PARTS, Reason, ServiceEntry,
    ServiceInfo, SocketRecords, WAITING as WAITING_FLOWS,
};

const FRONTENDS: usize = 32_768;
const BACKENDS: usize = 262_144;
pub const FLOWS: usize = 65_536;
/// Octets. An event takes 72: some 3,600 of them, a few seconds of what a CPU may write.
const DROP_EVENTS: usize = 256 * 1024;
const MAPPED: usize = BPF_F_MMAPABLE as usize;

/// The part of a `source_range` key that prefixes count in.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SourceRange {
    pub number: u32,
    pub address: Address,
}

/// Key of `socket_overflow`: a socket and a backend that it was sent to.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct OverflowKey {
    pub socket_cookie: u64,
    pub address: Address,
    pub port: u32,
    pub _pad: u32,
}

/// Value of `socket_overflow`: what the process had asked for.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct OverflowValue {
    pub socket_cookie: u64,
    pub address: Address,
    pub port: u32,
    pub _pad: u32,
    /// The last datagram, either way, in nanoseconds since boot.
    pub last_used: u64,
}

/// What lies in `entry`: an entry of a flow that is being written.
#[repr(C)]
pub struct FlowEntry {
    pub key: FlowKey,
    pub flow: Flow,
}

/// What lies in `scratch`: the key of the packet, and the whole of its flow.
#[repr(C)]
pub struct Scratch {
    pub key: FlowKey,
    pub whole: Conversation,
}

#[btf_map(name = "frontend")]
pub static FRONTEND: HashMap<FrontendKey, u32, FRONTENDS> = HashMap::new();
#[btf_map(name = "service")]
pub static SERVICE: Array<ServiceEntry, FRONTENDS, MAPPED> = Array::new();
#[btf_map(name = "service_info")]
pub static SERVICE_INFO: Array<ServiceInfo, FRONTENDS, MAPPED> = Array::new();
#[btf_map(name = "backend")]
pub static BACKEND: Array<Backend, BACKENDS, MAPPED> = Array::new();
#[btf_map(name = "backend_slot")]
pub static BACKEND_SLOT: Array<BackendSlots, BACKENDS, MAPPED> = Array::new();
#[btf_map(name = "address")]
pub static ADDRESS: HashMap<Address, AddressEntry, FRONTENDS> = HashMap::new();
#[btf_map(name = "source_range")]
pub static SOURCE_RANGE: LpmTrie<SourceRange, u32, FLOWS, { BPF_F_NO_PREALLOC as usize }> = LpmTrie::new();
#[btf_map(name = "affinity")]
pub static AFFINITY: LruHashMap<AffinityKey, AffinityValue, FLOWS> = LruHashMap::new();
#[btf_map(name = "flow")]
pub static FLOW: LruHashMap<FlowKey, Flow, FLOWS> = LruHashMap::new();
#[btf_map(name = "flow_transient")]
pub static FLOW_TRANSIENT: LruHashMap<FlowKey, Flow, FLOWS> = LruHashMap::new();
// More than there are processors: each claims one at a time.
#[btf_map(name = "claim")]
pub static CLAIM: HashMap<FlowKey, u32, 1_024> = HashMap::new();
#[btf_map(name = "fragment")]
pub static FRAGMENT: LruHashMap<FragmentKey, FragmentPorts, 16_384> = LruHashMap::new();
#[btf_map(name = "socket")]
pub static SOCKET: SkStorage<SocketRecords> = SkStorage::new();
#[btf_map(name = "socket_overflow")]
pub static SOCKET_OVERFLOW: LruHashMap<OverflowKey, OverflowValue, 16_384> = LruHashMap::new();
#[btf_map(name = "counter")]
pub static COUNTER: Array<Counters, FRONTENDS> = Array::new();
#[btf_map(name = "reason")]
pub static REASON: PerCpuArray<u64, { Reason::ALL.len() }> = PerCpuArray::new();
#[btf_map(name = "drop_event")]
pub static DROP_EVENT: RingBuf<DropEvent, DROP_EVENTS> = RingBuf::new();
#[btf_map(name = "drop_listener")]
pub static DROP_LISTENER: Array<DropListener, 1, MAPPED> = Array::new();
#[btf_map(name = "drop_budget")]
pub static DROP_BUDGET: PerCpuArray<DropBudget, { DropPath::COUNT as usize }> = PerCpuArray::new();
#[btf_map(name = "config")]
pub static CONFIG: Array<Config, 1, MAPPED> = Array::new();
// Plain words: no BTF is made for a structure that is only pointed into.
#[btf_map(name = "scratch")]
pub static SCRATCH: PerCpuArray<[u64; size_of::<Scratch>().div_ceil(8)], 1> = PerCpuArray::new();
#[btf_map(name = "entry")]
pub static ENTRY: PerCpuArray<[u64; size_of::<FlowEntry>().div_ceil(8)], 1> = PerCpuArray::new();
// A ring of keys, and behind it how many there were.
#[btf_map(name = "waiting")]
pub static WAITING: PerCpuArray<[u64; size_of::<FlowKey>() / 8], { WAITING_FLOWS as usize + 1 }> =
    PerCpuArray::new();
#[btf_map(name = "parsed")]
pub static PARSED: PerCpuArray<[u64; 12], 1> = PerCpuArray::new();
#[btf_map(name = "message")]
pub static MESSAGE: PerCpuArray<[u64; 16], 1> = PerCpuArray::new();
#[btf_map(name = "refusal")]
pub static REFUSAL: PerCpuArray<[u64; 32], 1> = PerCpuArray::new();
// Filled by the agent before it attaches; see `kproxy_common::PACKET_PARTS`.
#[btf_map(name = "programs")]
pub static PROGRAMS: ProgramArray<{ PACKET_PARTS.len() }> = ProgramArray::new();
// Of 4,096 interfaces, each of which has two while it changes.
#[btf_map(name = "device")]
pub static DEVICE: HashMap<DeviceKey, DeviceAddresses, 8_192> = HashMap::new();
#[btf_map(name = "masqueraded")]
pub static MASQUERADED_TOWARDS: Array<u64, { MASQUERADED as usize }> = Array::new();
#[btf_map(name = "opted_out")]
pub static OPTED_OUT: HashMap<u64, OptedOut, 1_024> = HashMap::new();
#[btf_map(name = "owner")]
pub static OWNER: Array<Owner, 1> = Array::new();
