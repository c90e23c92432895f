//! How other threads reach a lane: what they leave for it, and how they wake it.
//!
//! Leaving something is two steps: it is put in the box, then `posted` is set. Going to sleep is two steps as
//! well: `asleep` is set, then `posted` is looked at once more. Either the lane sees what was left, or whoever
//! left it sees that the lane is asleep and rings its bell. All four are sequentially consistent.

use std::{
    sync::{Arc, PoisonError},
    task::Wake,
};

use rustix::io::Errno;

use super::{
    bell::Bell,
    memory::Runs,
    stats::{LaneSnapshot, LaneStats},
};
use crate::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering::SeqCst},
};

/// What belongs to a lane and is seen by other threads.
#[derive(Debug)]
pub(crate) struct Mailbox {
    content: Mutex<Content>,
    /// Something is in the box, or somebody wants the lane to look around.
    posted: AtomicBool,
    /// Something ended that may have made requests of this lane busy.
    progressed: AtomicBool,
    /// A front end's own wish to be woken.
    called: AtomicBool,
    asleep: AtomicBool,
    bell: Bell,
    active: AtomicBool,
    pub(super) stats: LaneStats,
}

/// What was left for the lane.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// Ended on a worker.
    pub(super) finished: Vec<Finished>,
    /// Parked changes that have entered.
    pub(super) released: Vec<u32>,
}

/// A request that a worker has ended.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) slot: u32,
    pub(super) result: Result<(), Errno>,
    /// Given back, for its memory.
    pub(super) runs: Runs,
}

impl Mailbox {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self {
            content: Mutex::default(),
            posted: AtomicBool::new(false),
            progressed: AtomicBool::new(false),
            called: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            bell: Bell::new()?,
            active: AtomicBool::new(false),
            stats: LaneStats::default(),
        })
    }

    /// From a worker: a request has ended.
    pub(super) fn finish(&self, finished: Finished) {
        self.content().finished.push(finished);
        self.ring();
    }

    /// From [`Flight`](super::Flight): a parked change has entered.
    pub(super) fn release(&self, slot: u32) {
        self.content().released.push(slot);
        self.ring();
    }

    /// Makes the lane look around.
    pub(crate) fn ring(&self) {
        self.posted.store(true, SeqCst);
        if self.asleep.swap(false, SeqCst) {
            self.bell.ring();
        }
    }

    /// The lane's turn: takes what was left. False when there is nothing.
    pub(super) fn take(&self, content: &mut Content) -> bool {
        if !self.posted.load(SeqCst) || !self.posted.swap(false, SeqCst) {
            return false;
        }
        let mut here = self.content();
        content.finished.append(&mut here.finished);
        content.released.append(&mut here.released);
        true
    }

    /// Whether something ended that may have made requests busy, since last asked.
    pub(super) fn take_progress(&self) -> bool {
        self.progressed.load(SeqCst) && self.progressed.swap(false, SeqCst)
    }

    /// Whether a front end called, since last asked.
    pub(super) fn take_call(&self) -> bool {
        self.called.load(SeqCst) && self.called.swap(false, SeqCst)
    }

    /// The lane is about to sleep on [`Self::bell`]. False when it must not: something was left.
    pub(super) fn fall_asleep(&self) -> bool {
        self.asleep.store(true, SeqCst);
        if self.posted.load(SeqCst) {
            self.asleep.store(false, SeqCst);
            return false;
        }
        true
    }

    /// The lane is awake.
    pub(super) fn awake(&self) {
        self.asleep.store(false, SeqCst);
    }

    /// Rings the lane out of its sleep.
    pub(super) fn bell(&self) -> &Bell {
        &self.bell
    }

    /// Whether requests are under way; see [`Disk::pause`](crate::disk::Disk::pause).
    pub(crate) fn is_active(&self) -> bool {
        self.active.load(SeqCst)
    }

    pub(super) fn set_active(&self, active: bool) {
        self.active.store(active, SeqCst);
    }

    pub(crate) fn snapshot(&self) -> LaneSnapshot {
        self.stats.snapshot()
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn take_released(&self) -> Vec<u32> {
        let mut content = Content::default();
        self.take(&mut content);
        content.released
    }
}

/// Woken by the image when something has ended; see [`Image::wake_on_progress`](img_core::image::Image).
impl Wake for Mailbox {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.progressed.store(true, SeqCst);
        self.ring();
    }
}

/// Wakes one lane from any thread.
#[derive(Clone, Debug)]
pub struct LaneWaker(pub(super) Arc<Mailbox>);

impl LaneWaker {
    /// Makes [`Lane::run_once`](super::Lane::run_once) return [`Event::Woken`](super::Event::Woken), now or as soon
    /// as it is called. Several calls may make one event.
    pub fn wake(&self) {
        self.0.called.store(true, SeqCst);
        self.0.ring();
    }
}
