//! Whole-image work: convert, compare, map; with progress and cancellation.

pub mod compare;
pub mod convert;
pub mod create;
pub mod map;

/// Where a running job tells how far it is and asks whether to stop. Called from several threads.
pub trait Progress: Sync {
    /// `done` of `total` units are behind us. `total` may change.
    fn advance(&self, done: u64, total: u64);

    /// Whether the job should stop with [`Error::Cancelled`](crate::Error::Cancelled).
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// No one watches.
#[derive(Clone, Copy, Debug)]
pub struct Unwatched;

impl Progress for Unwatched {
    fn advance(&self, _done: u64, _total: u64) {}
}
