//! Leases on the map: a freed cluster is given out again only when everyone who may still hold an answer
//! that names it is gone.
//!
//! Time is cut into epochs. [`Epochs::pin`] counts the asker in the present one; a free happens at the end
//! of an epoch ([`Epochs::close`]) and is released when no pin of that epoch or an earlier one is left
//! ([`Epochs::all_gone`]).

use crate::{
    format::{table_cache::lock, waiters::Waiters},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

/// Epochs whose pins are counted apart. When the oldest of them is still pinned, an epoch lasts longer.
const SLOTS: usize = 8;

/// The counters of one image.
#[derive(Debug, Default)]
pub(super) struct Epochs {
    present: AtomicU64,
    pins: [AtomicU64; SLOTS],
    /// How many wait for pins to end: without any, ending one takes no lock.
    waiting: AtomicU64,
    turn: Mutex<()>,
    ended: Waiters,
}

/// A pin; ends when dropped.
#[derive(Debug)]
pub(super) struct Pin<'a> {
    epochs: &'a Epochs,
    epoch: u64,
}

impl Epochs {
    /// Pins the present epoch. Never blocks.
    pub(super) fn pin(&self) -> Pin<'_> {
        loop {
            let epoch = self.present.load(Ordering::SeqCst);
            self.slot(epoch).fetch_add(1, Ordering::SeqCst);
            // If the epoch ended in between, whoever ended it may not have seen this pin.
            if self.present.load(Ordering::SeqCst) == epoch {
                return Pin { epochs: self, epoch };
            }
            self.leave(epoch);
        }
    }

    /// Ends the present epoch if the next one's counter is free, and names the epoch that every pin taken
    /// so far belongs to or precedes.
    pub(super) fn close(&self) -> u64 {
        let epoch = self.present.load(Ordering::SeqCst);
        if self.slot(epoch + 1).load(Ordering::SeqCst) == 0 {
            // If somebody else ended it meanwhile, it has ended.
            let next = epoch + 1;
            self.present.compare_exchange(epoch, next, Ordering::SeqCst, Ordering::SeqCst).ok();
        }
        epoch
    }

    /// Waits until every pin taken before the call has ended. The caller holds none.
    pub(super) fn wait_for_older(&self) {
        // From here on whoever ends a pin tells.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut turn = lock(&self.turn);
        let mut epoch = self.close();
        while !self.all_gone(epoch) {
            turn = self.ended.wait(turn);
            if self.present.load(Ordering::SeqCst) == epoch {
                epoch = self.close();
            }
        }
        drop(turn);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether no pin of `epoch` or an earlier one is left.
    pub(super) fn all_gone(&self, epoch: u64) -> bool {
        let present = self.present.load(Ordering::SeqCst);
        if present == epoch {
            // The epoch could not be ended. A pin that arrives from here on sees the map after the free.
            return self.pins.iter().all(|pins| pins.load(Ordering::SeqCst) == 0);
        }
        // Slots of the epochs after `epoch`, up to the present one, do not matter.
        let younger = usize::try_from((present - epoch).min(SLOTS as u64)).expect("at most SLOTS");
        (younger..SLOTS).all(|back| self.slot(present.wrapping_sub(back as u64)).load(Ordering::SeqCst) == 0)
    }

    fn leave(&self, epoch: u64) {
        self.slot(epoch).fetch_sub(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            let _turn = lock(&self.turn);
            self.ended.notify_all();
        }
    }

    fn slot(&self, epoch: u64) -> &AtomicU64 {
        &self.pins[usize::try_from(epoch % SLOTS as u64).expect("below SLOTS")]
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.epochs.leave(self.epoch);
    }
}

impl Pin<'_> {
    /// Gives the pin up for a number that [`Epochs::unpin`] takes back.
    pub(super) fn into_epoch(self) -> u64 {
        let epoch = self.epoch;
        std::mem::forget(self);
        epoch
    }
}

impl Epochs {
    /// Ends a pin that was turned into its epoch.
    pub(super) fn unpin(&self, epoch: u64) {
        drop(Pin { epochs: self, epoch });
    }
}
