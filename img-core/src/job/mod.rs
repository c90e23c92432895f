//! Whole-image work: convert, compare, commit, rebase, map, bitmaps; with progress and cancellation.
//!
//! Each job is one walk over an image's map (`status`) whose pieces are shared out to plain threads. What must
//! come out the same at any number of threads goes through `ordered`. `target` moves many prepared writes at once,
//! `compress` makes compressed clusters, `throttle` slows down. Nothing here knows a format or a command line.

pub mod amend;
pub mod bench;
pub mod bitmaps;
pub mod check;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod create;
pub mod inspect;
pub mod map;
pub mod measure;
pub mod plot;
pub mod rebase;

#[cfg(test)]
mod chain_tests;
mod compress;
mod ordered;
mod status;
mod target;
#[cfg(test)]
mod testing;
mod throttle;

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{Error, Result, storage::Watcher, sync};

/// Where long work tells how far it is and asks whether to stop. Called from several threads.
pub trait Progress: Sync {
    /// `done` of `total` bytes are behind us. `total` may change.
    fn advance(&self, done: u64, total: u64);

    /// Whether the work should stop with [`Error::Cancelled`].
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

impl<P: Progress + Send + ?Sized> Progress for Arc<P> {
    fn advance(&self, done: u64, total: u64) {
        (**self).advance(done, total);
    }

    fn is_cancelled(&self) -> bool {
        (**self).is_cancelled()
    }
}

/// Tells of space that is taken by writing as of a job that writes so many bytes.
#[derive(Debug)]
pub struct Filling<P> {
    progress: P,
    total_bytes: u64,
    done_bytes: AtomicU64,
}

impl<P: Progress> Filling<P> {
    /// Tells `progress` of about so many bytes.
    pub fn new(progress: P, total_bytes: u64) -> Self {
        Self { progress, total_bytes, done_bytes: AtomicU64::new(0) }
    }
}

impl<P: Progress + Send + fmt::Debug> Watcher for Filling<P> {
    fn filled(&self, bytes: u64) -> Result<()> {
        let done = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.progress.advance(done.min(self.total_bytes), self.total_bytes);
        if self.progress.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// The most threads a job starts, however many cores there are: the reference's bound on `-m`, and what
/// keeps the buffers of a job below their limit.
const MAX_THREADS: usize = 16;

/// How many cores this process may use, at most [`MAX_THREADS`].
fn cores() -> usize {
    sync::cores().min(MAX_THREADS)
}

/// How much of a disk is mapped at once by jobs that change it: few enough extents to hold, even where each
/// sector is one. Small where schedules are explored, so that threads have a window each of a small disk.
const WINDOW_BYTES: u64 = if cfg!(explore) { 16 << 10 } else { 16 << 20 };

/// `range` in parts that end on multiples of `part_bytes`.
fn windows(range: Range<u64>, part_bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let part = start..(start / part_bytes + 1).saturating_mul(part_bytes).min(range.end);
        start = part.end;
        (!part.is_empty()).then_some(part)
    })
}
