//! Over all sockets that have records: tells the agent which UDP sockets are connected to a service address, in every
//! network namespace at once. Socket storage cannot be walked from outside.

use aya_ebpf::helpers::bpf_seq_write;
use kproxy_common::{ConnectedSocket, SocketRecords};

/// `struct bpf_iter__bpf_sk_storage_map` of the kernel (5.9), 64-bit pointers all.
#[repr(C)]
pub struct Context {
    meta: *const Meta,
    map: *const u8,
    socket: *const u8,
    records: *const SocketRecords,
}

/// `struct bpf_iter_meta` of the kernel, as far as it is needed.
#[repr(C)]
struct Meta {
    sequence_file: *mut aya_ebpf::bindings::seq_file,
}

/// Writes a [`ConnectedSocket`] for each.
///
/// # Safety
///
/// The kernel calls it, with a context that is valid for the program's run.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
pub unsafe extern "C" fn connected_sockets(context: *const Context) -> i32 {
    // SAFETY: the context is the kernel's; the last call has no socket, and its pointer to records is null.
    let Some(records) = (unsafe { (*context).records.as_ref() }) else {
        return 0;
    };
    if let Some(connected) = records.connected() {
        // SAFETY: the kernel's own file, and as many octets as the helper is told. What does not fit any more is asked
        // for again with the next read.
        unsafe {
            bpf_seq_write(
                (*(*context).meta).sequence_file,
                core::ptr::from_ref(&connected).cast_mut().cast(),
                size_of::<ConnectedSocket>() as u32,
            );
        }
    }
    0
}
