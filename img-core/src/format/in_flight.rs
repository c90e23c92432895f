//! Guest ranges that someone is changing: whoever wants a part of one waits until it has landed.

use std::ops::Range;

/// Ranges of guest bytes, none of which overlaps another.
#[derive(Debug, Default)]
pub(super) struct GuestRanges {
    /// In order. There are few at a time, and the list keeps its memory.
    ranges: Vec<Range<u64>>,
}

impl GuestRanges {
    /// Whether any of them holds a byte of `guest`.
    pub(super) fn overlaps(&self, guest: &Range<u64>) -> bool {
        let after = self.ranges.partition_point(|range| range.start < guest.end);
        self.ranges[..after].last().is_some_and(|range| range.end > guest.start)
    }

    /// The part of `guest` before the first of them; none of them holds its first byte.
    pub(super) fn part_before(&self, guest: &Range<u64>) -> Range<u64> {
        let behind = self.ranges.partition_point(|range| range.start <= guest.start);
        let end = self.ranges.get(behind).map_or(guest.end, |next| next.start.min(guest.end));
        guest.start..end
    }

    /// Adds a range that overlaps none of them.
    pub(super) fn insert(&mut self, guest: &Range<u64>) {
        debug_assert!(!self.overlaps(guest), "{guest:?} is in flight already");
        let at = self.ranges.partition_point(|range| range.start < guest.start);
        self.ranges.insert(at, guest.clone());
    }

    /// Takes out a range that was added.
    pub(super) fn remove(&mut self, guest: &Range<u64>) {
        if let Ok(at) = self.ranges.binary_search_by_key(&guest.start, |range| range.start) {
            self.ranges.remove(at);
        }
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
        for (guest, part) in [(0..5, 0..5), (0..25, 0..10), (30..40, 30..40)] {
            assert_eq!(ranges.part_before(&guest), part);
        }
        ranges.remove(&(10..20));
        assert!(!ranges.overlaps(&(0..20)) && ranges.overlaps(&(0..21)));
    }
}
