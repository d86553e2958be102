//! Large buffers, lent per thread.
//!
//! An idle connection holds no buffer at all: it borrows one while bytes move and gives it back. So ten
//! thousand idle connections cost ten thousand sockets, and memory follows what is busy.

use std::cell::RefCell;

use crate::RELAY_CHUNK;

/// Buffers kept per thread for the next borrower: enough for the connections that are busy at the same
/// moment on one thread (they take turns, each within one poll), not for a burst's peak.
const KEPT: usize = 8;

thread_local! {
    static FREE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`RELAY_CHUNK`] bytes, returned to this thread when dropped.
#[derive(Debug)]
pub(crate) struct Scratch(Vec<u8>);

impl Scratch {
    pub(crate) fn take() -> Self {
        let kept = FREE.with_borrow_mut(Vec::pop);
        Self(kept.unwrap_or_else(|| vec![0; RELAY_CHUNK]))
    }
}

impl std::ops::Deref for Scratch {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl std::ops::DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        // The thread may be ending: then the buffer just goes.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT {
                free.push(buffer);
            }
        });
    }
}
