//! The programs in the kernel: loading them over the pinned maps, and attaching them so that they stay when
//! the agent goes.
//!
//! Links are pinned. A restart puts its programs into the links that are there (one atomic exchange, nothing
//! is ever detached in between), after the maps are filled.

mod attach;
pub mod filters;
mod load;
mod pins;
mod refusal;
mod sockets;
mod sys;

pub use attach::{Attached, DeviceProgram, Hook, detach, is_packet_program};
pub use load::{
    Capacities, DeviceMask, Features, LoadError, OBJECT, Programs, check_bpf_root, check_on_bpffs,
    has_set_retval, has_tcx, pinned_maps,
};
pub use pins::remove_next;
pub use refusal::{Refusal, cut};
pub use sockets::SocketIterator;
pub use sys::namespace_cookie;
