//! How often the guest left to this process, and how far it had come by then.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

/// Why the guest left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    PortRead,
    PortWrite,
    MmioRead,
    MmioWrite,
    /// Signals to the runner's own threads.
    Interrupted,
    Other,
}

/// The reasons in their order, as people are told of them.
const REASONS: [&str; 6] = ["port-read", "port-write", "mmio-read", "mmio-write", "interrupted", "other"];

/// Exits to this process, by reason: relaxed counters, as nothing is decided by them. And the moments of the guest's
/// start.
#[derive(Debug, Default)]
pub struct ExitCounts {
    /// By [`Reason`].
    counts: [AtomicU64; REASONS.len()],
    entered: OnceLock<Instant>,
    init: OnceLock<InitReached>,
}

/// What a guest took to get to its init.
#[derive(Clone, Copy, Debug)]
pub struct InitReached {
    /// When it said so.
    pub at: Instant,
    /// Exits up to that one, as [`ExitCounts::by_reason`] gives them.
    pub by_reason: [(&'static str, u64); REASONS.len()],
}

impl ExitCounts {
    pub(super) fn count(&self, reason: Reason) {
        self.counts[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// A processor is about to enter the guest.
    pub(super) fn enter(&self) {
        self.entered.get_or_init(Instant::now);
    }

    /// The guest says that its init runs. The first time counts.
    pub fn reach_init(&self) {
        self.init.get_or_init(|| InitReached { at: Instant::now(), by_reason: self.by_reason() });
    }

    /// Name and count of each reason.
    #[must_use]
    pub fn by_reason(&self) -> [(&'static str, u64); REASONS.len()] {
        let mut counts = REASONS.map(|name| (name, 0));
        for ((_, count), counter) in counts.iter_mut().zip(&self.counts) {
            *count = counter.load(Ordering::Relaxed);
        }
        counts
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.by_reason().iter().map(|(_, count)| count).sum()
    }

    /// When the first processor was about to enter the guest.
    #[must_use]
    pub fn entered(&self) -> Option<Instant> {
        self.entered.get().copied()
    }

    /// When and after how many exits the guest said that its init runs, where it did.
    #[must_use]
    pub fn init(&self) -> Option<InitReached> {
        self.init.get().copied()
    }
}
