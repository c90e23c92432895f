//! What a queue is made of, what can be wrong with it, and what is left of it.

use std::{io, os::fd::OwnedFd, sync::Arc};

use super::{
    GuestRam,
    chain::RingError,
    dirty_log::{NotInLog, QueueLog},
    features::Features,
    inflight::{InflightError, InflightQueue},
    redo::RedoLog,
    ring::RingLayout,
};

/// Largest queue that is served, as in QEMU: a chain of all its descriptors fits one call of the kernel
/// (`IOV_MAX`).
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// What a queue is made of.
#[derive(Debug)]
pub struct QueueSetup {
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// Where the rings are.
    pub rings: RingLayout,
    /// The next entry of the available ring, where no [`inflight`](Self::inflight) memory says better.
    pub next_avail: u16,
    /// What was negotiated.
    pub features: Features,
    /// Readable when the driver has made something available. Without one the ring is looked at every
    /// 200 microseconds.
    pub kick: Option<OwnedFd>,
    /// Written to tell the driver that something was used.
    pub call: Option<OwnedFd>,
    /// Written when the queue breaks.
    pub error: Option<OwnedFd>,
    /// What an earlier worker of this queue had, and where this one keeps it.
    pub inflight: Option<InflightQueue>,
    /// Where changes are noted that no flush has made durable: it has to be flushed in time.
    pub redo: Option<Arc<RedoLog>>,
    /// Where pages that are written are noted.
    pub log: Option<QueueLog>,
    /// Whether it begins paused.
    pub paused: bool,
}

/// Why a queue does not work.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Its size.
    #[error("a queue has a power of two of descriptors, up to {MAX_QUEUE_SIZE}, not {0}")]
    Size(u16),
    /// What the driver wrote.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// What an earlier device left.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// A page that cannot be logged.
    #[error(transparent)]
    Log(#[from] NotInLog),
    /// The system.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What is left of a queue that was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// The next entry of the available ring.
    pub next_avail: u16,
    /// The next entry of the used ring.
    pub next_used: u16,
    /// Whether it broke.
    pub is_broken: bool,
}
