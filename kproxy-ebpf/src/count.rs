//! Verdicts, counted by their reason.

use kproxy_common::Reason;

use crate::maps;

/// Counts a verdict. What is nobody's business is not counted: it would be the costliest counter of all.
#[inline(always)]
pub fn count_reason(reason: Reason) {
    if matches!(reason, Reason::NotAService | Reason::NoFlow) {
        return;
    }
    if let Some(count) = maps::REASON.get_ptr_mut(reason as u32) {
        // SAFETY: the element is this CPU's, and the pointer valid for the program's run.
        unsafe { *count = (*count).wrapping_add(1) };
    }
}
