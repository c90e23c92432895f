//! Which ranges of a file are being written: lets through what does not collide, parks what does.

use std::{
    ops::Range,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

/// The ranges under way. Few at a time: as many as there are threads writing.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    ranges: Mutex<Vec<Entry>>,
    left: Condvar,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    range: Range<u64>,
    alone: bool,
}

/// Leave to write a range, until dropped.
#[must_use]
pub(super) struct Pass<'a> {
    gate: &'a InFlight,
    entry: Entry,
}

impl InFlight {
    /// Waits until nobody is in `range` who wants to be `alone`, or nobody at all when the caller does.
    pub(super) fn enter(&self, range: Range<u64>, alone: bool) -> Pass<'_> {
        let collides = |entry: &Entry| {
            (alone || entry.alone) && entry.range.start < range.end && range.start < entry.range.end
        };
        let mut ranges = self.ranges();
        while ranges.iter().any(collides) {
            ranges = self.left.wait(ranges).unwrap_or_else(PoisonError::into_inner);
        }
        let entry = Entry { range, alone };
        ranges.push(entry.clone());
        Pass { gate: self, entry }
    }

    fn ranges(&self) -> MutexGuard<'_, Vec<Entry>> {
        // Nothing that can panic happens under the lock.
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut ranges = self.gate.ranges();
        // Equal entries stand for each other.
        if let Some(place) = ranges.iter().position(|entry| *entry == self.entry) {
            ranges.swap_remove(place);
        }
        drop(ranges);
        self.gate.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn sharers_pass_and_loners_wait() {
        let gate = InFlight::default();
        let first = gate.enter(0..10, false);
        drop(gate.enter(5..15, false));
        drop(gate.enter(10..20, true));
        let (entered, order) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _pass = gate.enter(9..12, true);
                entered.send("loner").expect("somebody listens");
            });
            entered.send("first").expect("somebody listens");
            drop(first);
        });
        assert_eq!(order.iter().take(2).collect::<Vec<_>>(), ["first", "loner"]);
    }
}
