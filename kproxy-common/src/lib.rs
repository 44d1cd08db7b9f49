//! What both sides of kproxy share: how the tables are laid out in BPF maps, and the decision about a
//! connection.
//!
//! The eBPF programs compile this crate against the kernel's maps; the agent compiles it to write those
//! maps, to print them, and to decide on in-memory tables in tests. It allocates nothing, waits for nothing
//! and depends on nothing.
#![no_std]

mod address;
mod arrival;
mod clock;
mod crc32c;
mod decision;
mod drops;
mod flow;
mod layout;
mod packet;
mod reason;
mod socket;

pub use address::{Address, Cidr};
pub use arrival::{in_cluster_cidr, is_masked};
pub use clock::{elapsed, is_before};
pub use crc32c::crc32c_change;
pub use decision::{
    Balance, Choice, Client, ClientKind, Connection, Resolution, Tables, Wanted, choose, resolve, search,
    still_serves,
};
pub use drops::{DROPS_PER_SECOND, DropBudget, DropEvent, DropListener, DropPath};
pub use flow::{
    Action, Conversation, Ends, Flow, FlowEnd, FlowKey, FlowState, FlowStore, FlowTable, HURRIED_REST, Hook,
    Marks, NOTE_EVERY, QUIET, REST, Role, is_over, lifetime, store as flow_store,
};
pub use layout::{
    AddressEntry, AddressKind, AffinityKey, AffinityValue, Backend, BackendSlots, BackendState, Behind,
    Block, Config, Counters, DeviceAddresses, DeviceKey, FrontendKey, FrontendKind, FrontendScope,
    InvalidLayout, LAYOUT_VERSION, Location, MASQUERADED, MAX_CIDRS, Mode, NAME_LENGTH, OptedOut, Options,
    Owner, PACKET_PARTS, Protocol, RETURN_MARK, ServiceEntry, ServiceIdentity, ServiceInfo, ServiceKind,
    Side, SourceRangeKey, TrafficPolicy, map_names, masqueraded_index,
};
pub use packet::{
    FRAGMENT_TIMEOUT, FlowTables, FragmentKey, FragmentPorts, Hit, IcmpKind, IcmpMeta, IcmpVerdict, New,
    PacketMeta, PacketVerdict, Piece, Quick, TcpFlags, WAITING, answered_frontend, follow_fragment,
    known_egress, known_ingress, new_egress, new_ingress, node_egress, on_egress, on_icmp, on_ingress,
    on_other_protocol, open_ingress, quick_egress, quick_ingress,
};
pub use reason::Reason;
pub use socket::{
    ConnectedSocket, SOCKET_RECORDS, SocketCall, SocketIdentity, SocketRecord, SocketRecords, SocketVerdict,
    answered, is_alive, original_address, socket_connection,
};
