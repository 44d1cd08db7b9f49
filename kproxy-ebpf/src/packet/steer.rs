//! Answers on nodes that route what their backends send by its source: they leave by the interface that their clients'
//! packets came in by, as the node's own would.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as Lookup},
    helpers::bpf_fib_lookup,
    programs::TcContext,
};
use kproxy_common::{Address, RETURN_MARK};

use crate::maps;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Whether there are such rules.
#[inline(always)]
pub fn routes_by_source() -> bool {
    maps::CONFIG.get(0).is_some_and(|config| config.routes_by_source != 0)
}

/// Marks an answer of `backend` to `client` if it would leave by another interface than what this node sends to the client
/// from `node`, the address that the client or its mask has asked.
#[inline(always)]
pub fn back(ctx: &TcContext, backend: &Address, node: &Address, client: &Address) {
    let skb = ctx.skb.skb;
    let (as_backend, as_node) = (leaves_by(skb, backend, client), leaves_by(skb, node, client));
    if as_backend != 0 && as_node != 0 && as_backend != as_node {
        // SAFETY: the context is valid for the program's run, and a classifier may write this field.
        unsafe { (*skb).mark |= RETURN_MARK };
    }
}

/// The interface by which a packet from one to the other leaves that came in where this one did; 0 if by none, or if nobody
/// knows.
#[inline(never)]
fn leaves_by(skb: *mut __sk_buff, from: &Address, to: &Address) -> u32 {
    // SAFETY: the structure is numbers only, for which zero is a value.
    let mut lookup: Lookup = unsafe { core::mem::zeroed() };
    if to.is_v4() {
        lookup.family = AF_INET;
        lookup.__bindgen_anon_3.ipv4_src = from.v4_word();
        lookup.__bindgen_anon_4.ipv4_dst = to.v4_word();
    } else {
        lookup.family = AF_INET6;
        lookup.__bindgen_anon_3.ipv6_src = from.words();
        lookup.__bindgen_anon_4.ipv6_dst = to.words();
    }
    // SAFETY: the context is valid for the program's run, and the structure as long as the helper is told.
    let result = unsafe {
        lookup.ifindex = (*skb).ifindex;
        bpf_fib_lookup(skb.cast(), &raw mut lookup, size_of::<Lookup>() as i32, 0)
    };
    // Without a neighbour the interface is known all the same.
    let is_known =
        result == i64::from(BPF_FIB_LKUP_RET_SUCCESS) || result == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH);
    if is_known { lookup.ifindex } else { 0 }
}
