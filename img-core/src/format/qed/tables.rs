//! Where tables stand, so that no guest write is let near one: an entry that names a table as data would let
//! the guest write its own map, and with it read and write what is not its own.

use std::{
    collections::BTreeSet,
    ops::Range,
    sync::{PoisonError, atomic::Ordering},
};

use super::{
    layer::QedLayer,
    table::{ENTRY_BYTES, entries, for_each_piece},
};
use crate::Result;

/// The tables of an image, by host offset; none overlaps another.
#[derive(Debug)]
pub(super) struct Tables {
    starts: BTreeSet<u64>,
    table_bytes: u64,
}

impl Tables {
    /// L1 alone.
    fn new(l1_offset: u64, table_bytes: u64) -> Self {
        Self { starts: BTreeSet::from([l1_offset]), table_bytes }
    }

    /// Whether a host range touches a table.
    fn hits(&self, host: &Range<u64>) -> bool {
        let before = self.starts.range(..host.end).next_back();
        before.is_some_and(|table| table + self.table_bytes > host.start)
    }

    /// Adds the table at `table`; false when one stands there.
    fn add(&mut self, table: u64) -> bool {
        let is_free = !self.hits(&(table..table + self.table_bytes));
        is_free && self.starts.insert(table)
    }
}

impl QedLayer {
    /// Learns where tables stand, unless that is known. The state is not held.
    ///
    /// # Errors
    /// [`Error::Corrupt`](crate::Error::Corrupt) for tables that overlap: nothing could be written safely.
    pub(super) fn know_tables(&self) -> Result<()> {
        if self.tables.read().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Ok(());
        }
        let _state = self.state();
        let mut known = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        if known.is_some() {
            return Ok(());
        }
        let map = &self.map;
        let used = map.geometry.l1_entries_for(self.reach_bytes.load(Ordering::SeqCst));
        let mut tables = Tables::new(map.l1_offset, map.geometry.table_bytes());
        // Nothing waits to be written: L1 in the file is L1.
        for_each_piece(self.file(), map.l1_offset, used * ENTRY_BYTES, |first, bytes| {
            for (index, _) in (first..).zip(entries(bytes)).filter(|(_, entry)| *entry != 0) {
                let Some(table) = map.table(index)? else { continue };
                if !tables.add(table) {
                    let at = map.l1_entry_at(index);
                    return Err(map.corrupt("L1 entry", at, "an L2 table that overlaps no other", table));
                }
            }
            Ok(false)
        })?;
        *known = Some(tables);
        Ok(())
    }

    /// Forgets where tables stand: the disk is about to grow, and more of L1 counts.
    pub(super) fn forget_tables(&self) {
        *self.tables.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Notes a new table, which is to stand where nothing stood.
    pub(super) fn note_table(&self, table: u64) {
        if let Some(tables) = &mut *self.tables.write().unwrap_or_else(PoisonError::into_inner) {
            let is_new = tables.add(table);
            debug_assert!(is_new, "an L2 table was allocated over another at {table:#x}");
        }
    }

    /// Forgets a table that came to nothing.
    pub(super) fn forget_table(&self, table: u64) {
        if let Some(tables) = &mut *self.tables.write().unwrap_or_else(PoisonError::into_inner) {
            tables.starts.remove(&table);
        }
    }

    /// Whether it is known, without waiting, that a guest write to `host` damages no table.
    pub(super) fn is_known_free(&self, host: &Range<u64>) -> bool {
        let Ok(tables) = self.tables.try_read() else { return false };
        tables.as_ref().is_some_and(|tables| !tables.hits(host))
    }

    /// Refuses a guest write to `host` that would damage a table. The tables are known.
    pub(super) fn check_overlap(&self, host: &Range<u64>) -> Result<()> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        match &*tables {
            Some(tables) if !tables.hits(host) => Ok(()),
            _ => Err(self.map.corrupt("L2 entry", host.start, "a place where no table stands", host.start)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_keep_their_whole_length() {
        let mut tables = Tables::new(100, 50);
        assert!(tables.add(200) && tables.add(150) && !tables.add(249) && !tables.add(60));
        for (host, hit) in
            [(0..100, false), (99..101, true), (199..200, true), (249..250, true), (250..260, false)]
        {
            assert_eq!(tables.hits(&host), hit, "{host:?}");
        }
    }
}
