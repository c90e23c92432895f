//! Holding the requests of all lanes back, and waiting for those under way.
//!
//! A lane becomes active and looks for a pause then; whoever pauses says so and looks for active lanes then. Either he
//! sees that the lane is active, or the lane sees the pause. All four are sequentially consistent.

use std::sync::PoisonError;

use super::Mailbox;
use crate::sync::{
    Condvar, Mutex,
    atomic::{AtomicU64, Ordering::SeqCst},
};

/// The pauses of one disk.
#[derive(Debug, Default)]
pub(crate) struct Pauses {
    /// How many have begun and not ended.
    begun: AtomicU64,
    quiet: Mutex<()>,
    quieter: Condvar,
}

impl Pauses {
    /// Holds new requests back, and returns when no lane is active. `any_is_active` looks at all of them.
    pub(crate) fn begin(&self, any_is_active: impl Fn() -> bool) {
        self.begun.fetch_add(1, SeqCst);
        let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        while any_is_active() {
            quiet = self.quieter.wait(quiet).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends one. Whether it was the last: then all lanes are to be [rung](Mailbox::ring).
    #[must_use]
    pub(crate) fn end(&self) -> bool {
        self.begun.fetch_sub(1, SeqCst) == 1
    }

    /// Whether requests are held back.
    pub(crate) fn is_any(&self) -> bool {
        self.begun.load(SeqCst) > 0
    }

    /// Makes a lane active that has nothing under way, unless requests are held back.
    pub(crate) fn admit(&self, lane: &Mailbox) -> bool {
        if self.is_any() {
            return false;
        }
        lane.set_active(true);
        if self.is_any() {
            self.leave(lane);
            return false;
        }
        true
    }

    /// A lane has nothing under way any more; somebody may be waiting for that.
    pub(crate) fn leave(&self, lane: &Mailbox) {
        lane.set_active(false);
        if self.is_any() {
            // Not between his look at the lanes and his sleep.
            let _quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
            self.quieter.notify_all();
        }
    }
}
