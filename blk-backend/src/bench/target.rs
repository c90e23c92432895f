//! What a load is put on, whatever carries the requests.

use std::time::{Duration, Instant};

use super::run::BenchError;
use crate::request::{Errno, Op};

/// A disk to put a load on.
pub trait Target: Sync {
    /// What it says of itself.
    fn facts(&self) -> Facts;

    /// Queue number `number`, for the thread that calls. Each is made once.
    ///
    /// # Errors
    /// [`BenchError`]: the system or the other side refuses.
    fn queue<'a>(&'a self, number: u32, shape: &Shape) -> Result<Box<dyn TargetQueue + 'a>, BenchError>;

    /// CPU time that whoever does the work has taken so far; `None` where nobody knows who that is.
    ///
    /// # Errors
    /// [`BenchError::Gone`] when the process is not there any more.
    fn backend_cpu(&self) -> Result<Option<Duration>, BenchError>;
}

/// What a target says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Guest-visible size.
    pub size_bytes: u64,
    /// Whether changes are refused.
    pub read_only: bool,
    /// The most queues at a time, and why there are no more.
    pub most_queues: (u32, &'static str),
    /// The most bytes of one request.
    pub most_block_bytes: u64,
    /// Whether there are flushes.
    pub can_flush: bool,
    /// The most bytes of one discard; 0 where there are none.
    pub most_discard_bytes: u64,
}

/// The requests that a queue must hold.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Under way at once; their slots are numbered from 0 on.
    pub depth: usize,
    /// Bytes of each; the memory of a slot.
    pub block_bytes: usize,
    /// The bytes that are written follow from it.
    pub seed: u64,
}

/// How the request of a slot ended.
pub type Done = (usize, Result<(), Errno>);

/// One queue of a target. It stays on its thread.
pub trait TargetQueue {
    /// Takes a request with the memory of `slot`, which has none under way. Does not wait for anybody.
    ///
    /// # Errors
    /// [`BenchError`]: the queue is of no use any more.
    fn submit(&mut self, slot: usize, op: Op, offset: u64, len_bytes: u64) -> Result<(), BenchError>;

    /// Passes on what was submitted, waits until something has ended or that moment has come, and appends what has
    /// ended. May return early with nothing.
    ///
    /// # Errors
    /// [`BenchError`]: the queue is of no use any more.
    fn wait(&mut self, until: Option<Instant>, done: &mut Vec<Done>) -> Result<(), BenchError>;

    /// Fills the memory of a slot that has no request under way.
    fn fill(&mut self, slot: usize, bytes: &[u8]);

    /// Copies the memory of a slot that has no request under way.
    fn copy(&self, slot: usize, bytes: &mut [u8]);
}
