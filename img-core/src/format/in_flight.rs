//! Guest ranges that someone is changing: whoever wants a part of one waits until it has landed.

use std::{collections::BTreeMap, ops::Range};

/// Ranges of guest bytes, none of which overlaps another.
#[derive(Debug, Default)]
pub(super) struct GuestRanges {
    /// End by start.
    ends: BTreeMap<u64, u64>,
}

impl GuestRanges {
    /// Whether any of them holds a byte of `guest`.
    pub(super) fn overlaps(&self, guest: &Range<u64>) -> bool {
        self.ends.range(..guest.end).next_back().is_some_and(|(_, &end)| end > guest.start)
    }

    /// Adds a range that overlaps none of them.
    pub(super) fn insert(&mut self, guest: &Range<u64>) {
        debug_assert!(!self.overlaps(guest), "{guest:?} is in flight already");
        self.ends.insert(guest.start, guest.end);
    }

    /// Takes out a range that was added.
    pub(super) fn remove(&mut self, guest: &Range<u64>) {
        self.ends.remove(&guest.start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_do_not_overlap() {
        let mut ranges = GuestRanges::default();
        ranges.insert(&(10..20));
        ranges.insert(&(20..30));
        for (guest, overlaps) in
            [(0..10, false), (0..11, true), (19..20, true), (29..40, true), (30..31, false)]
        {
            assert_eq!(ranges.overlaps(&guest), overlaps, "{guest:?}");
        }
        ranges.remove(&(10..20));
        assert!(!ranges.overlaps(&(0..20)) && ranges.overlaps(&(0..21)));
    }
}
