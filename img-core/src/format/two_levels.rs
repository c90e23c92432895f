//! A map of two levels, of which both tables are cached: which piece of it is not in memory.

use std::ops::Range;

use super::{MissingTable, table_cache::SliceCache};
use crate::Result;

/// The caches by the name that [`MissingTable`] knows them by.
const L1: u8 = 1;
const L2: u8 = 2;

/// The caches of a map.
pub(super) struct TwoLevels<'a> {
    pub(super) l1: &'a SliceCache,
    pub(super) l2: &'a SliceCache,
}

/// What answers for guest bytes, by its place in the file.
pub(super) enum Entries {
    /// The L1 entry, which is not in memory.
    L1(Range<u64>),
    /// These of an L2 table.
    L2(Range<u64>),
    /// There is no L2 table.
    None,
}

impl TwoLevels<'_> {
    /// The first slice that is not in memory and answers for a part of `guest`. `look` says what answers for the first
    /// of the bytes that it is given, and up to where.
    pub(super) fn missing(
        &self,
        guest: Range<u64>,
        look: impl Fn(Range<u64>) -> Result<(Entries, u64)>,
    ) -> Result<Option<MissingTable>> {
        let (l1_age, l2_age) = (self.l1.age(), self.l2.age());
        let mut at = guest.start;
        while at < guest.end {
            let (entries, end) = look(at..guest.end)?;
            let missing = match entries {
                Entries::L1(entry) => return Ok(self.l1.missing(L1, entry, l1_age)),
                Entries::L2(entries) => self.l2.missing(L2, entries, l2_age),
                Entries::None => None,
            };
            if missing.is_some() {
                return Ok(missing);
            }
            at = end;
        }
        Ok(None)
    }

    /// Counts the changes of both; see [`Layer::map_changes`](super::Layer::map_changes).
    pub(super) fn changes(&self) -> u64 {
        // Each of them only grows: the sum is what it was when both are.
        self.l1.changes().wrapping_add(self.l2.changes())
    }

    /// Takes a missing slice.
    pub(super) fn offer(&self, missing: &MissingTable, bytes: Box<[u8]>) -> bool {
        if missing.level == L1 { self.l1.offer(missing, bytes) } else { self.l2.offer(missing, bytes) }
    }
}
