//! Where new grains and tables live: at the end of the extent's file, and nowhere else.
//!
//! Places are never given back, so none is ever given out twice. The tables of both directories are made before
//! a grain is placed; see the crash order in [`write`](super::write).

use std::{ops::Range, sync::PoisonError};

use super::{
    header::{Header, SECTOR_BYTES},
    layer::VmdkLayer,
    sparse::{Sparse, usize_of},
    stream::sector_entry,
    write::State,
};
use crate::{Error, Result, storage::Flush, sync::RwLockWriteGuard};

/// Runs of metadata that are kept apart. Every known product puts tables one behind the other: one run.
const MAX_METADATA_RUNS: usize = 1 << 20;

impl VmdkLayer {
    /// Takes `bytes` at the end of the extent's file, on a multiple of `alignment`.
    pub(super) fn take_place(
        &self,
        state: &mut State,
        index: usize,
        sparse: &Sparse,
        bytes: u64,
        alignment: u64,
    ) -> Result<u64> {
        let free = match state.next_free[index] {
            Some(free) => free,
            // The last grain may be there in part only: what was not written of it reads as zeroes.
            None => {
                let end = sparse.storage.len_bytes()?.max(sparse.overhead_bytes);
                if sparse.compressed { end } else { end.next_multiple_of(sparse.grain_bytes) }
            }
        };
        let at = free.next_multiple_of(alignment); // a file offset and at most 1 GiB
        sector_entry(sparse, at + bytes)?;
        state.next_free[index] = Some(at + bytes);
        Ok(at)
    }

    /// The tables at `table` of the directory, and of the redundant one: made where there are none.
    pub(super) fn tables_for_writing(
        &self,
        state: &mut State,
        index: usize,
        sparse: &Sparse,
        table: u64,
    ) -> Result<Vec<u64>> {
        let mut tables = Vec::with_capacity(2);
        for directory in sparse.directories() {
            let found = match sparse.table_in(directory, table)? {
                Some(found) => found,
                None => self.make_table(state, index, sparse, directory, table)?,
            };
            tables.push(found);
        }
        Ok(tables)
    }

    /// An empty table, durable before the directory's entry is written.
    fn make_table(
        &self,
        state: &mut State,
        index: usize,
        sparse: &Sparse,
        directory: u64,
        table: u64,
    ) -> Result<u64> {
        let bytes = sparse.table_bytes();
        let at = self.take_place(state, index, sparse, bytes.next_multiple_of(SECTOR_BYTES), SECTOR_BYTES)?;
        let entry = sector_entry(sparse, at)?;
        sparse.note_metadata(at..at + bytes)?;
        sparse.storage.write_at(&vec![0; usize_of(bytes.next_multiple_of(SECTOR_BYTES))], at)?;
        sparse.storage.flush(Flush::Data)?;
        sparse.tables.forget(at..at + bytes.next_multiple_of(SECTOR_BYTES));
        sparse.put(directory + table * 4, entry)?;
        Ok(at)
    }
}

impl Sparse {
    /// Changes the entry of a grain in the tables of both directories, which are there.
    pub(super) fn set_entry(&self, grain: u64, entry: u32) -> Result<()> {
        let (table, within) = (grain / self.table_entries, grain % self.table_entries);
        for directory in self.directories() {
            if let Some(at) = self.table_in(directory, table)? {
                self.put(at + within * 4, entry)?;
            }
        }
        Ok(())
    }

    /// Changes one 32-bit word of a table.
    pub(super) fn put(&self, at: u64, entry: u32) -> Result<()> {
        self.tables.update(&*self.storage, at, |bytes, within| {
            bytes[within..within + 4].copy_from_slice(&entry.to_le_bytes());
        })
    }

    /// Whether [`Self::check_grain_place`] is known, without waiting, to find nothing wrong.
    pub(super) fn is_known_good_place(&self, host: u64) -> bool {
        let grain = host..host + self.grain_bytes; // inside a file
        let Ok(known) = self.metadata.try_read() else { return false };
        !self.has_unknown_end(&grain) && known.as_ref().is_some_and(|runs| !overlaps(runs, &grain))
    }

    /// Whether the next grain may begin before the end of one that stands there.
    fn has_unknown_end(&self, grain: &Range<u64>) -> bool {
        grain.end > self.opened_bytes
            && grain.start < self.opened_bytes
            && !grain.start.is_multiple_of(self.grain_bytes)
    }

    /// Refuses to write guest bytes to a grain that holds metadata, or whose end nobody can tell.
    pub(super) fn check_grain_place(&self, host: u64) -> Result<()> {
        let grain = host..host + self.grain_bytes; // inside a file
        let corrupt = |expected: &str, found: &str| {
            let found = format!("{found} at {host:#x}");
            Err(Error::corrupt(self.storage.path(), "grain table entry", host, expected, found))
        };
        if self.has_unknown_end(&grain) {
            return corrupt("a whole grain inside the file", "a grain that reaches behind its end");
        }
        let known = self.metadata.read().unwrap_or_else(PoisonError::into_inner);
        let holds_metadata = match &*known {
            Some(runs) => overlaps(runs, &grain),
            None => {
                drop(known);
                overlaps(self.known_metadata()?.get_or_insert_default(), &grain)
            }
        };
        if holds_metadata {
            corrupt("a grain that holds no metadata", "header, descriptor or tables")
        } else {
            Ok(())
        }
    }

    /// Header, descriptor, directories and tables, sorted and joined.
    fn find_metadata(&self) -> Result<Vec<Range<u64>>> {
        let (_, header) = Header::read(&*self.storage)?;
        let mut runs: Vec<Range<u64>> =
            [Some(0..SECTOR_BYTES), header.descriptor].into_iter().flatten().collect();
        for directory in self.directories() {
            runs.push(directory..directory + self.directory_entries() * 4);
            for index in 0..self.directory_entries() {
                let Some(table) = self.table_in(directory, index)? else { continue };
                match runs.last_mut() {
                    Some(last) if last.end == table => last.end += self.table_bytes(),
                    _ => runs.push(table..table + self.table_bytes()),
                }
                if runs.len() > MAX_METADATA_RUNS {
                    let feature = "writing to an extent whose tables are scattered in more than 2^20 pieces";
                    return Err(Error::unsupported(self.storage.path(), feature));
                }
            }
        }
        runs.sort_unstable_by_key(|run| run.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for run in runs {
            match joined.last_mut() {
                Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                _ => joined.push(run),
            }
        }
        Ok(joined)
    }

    /// [`Self::metadata`], found if need be. Under the lock: no table is made between the search and what it finds.
    fn known_metadata(&self) -> Result<RwLockWriteGuard<'_, Option<Vec<Range<u64>>>>> {
        let mut known = self.metadata.write().unwrap_or_else(PoisonError::into_inner);
        if known.is_none() {
            *known = Some(self.find_metadata()?);
        }
        Ok(known)
    }

    /// A table is about to be made: nothing else may be written there. Called before the file reaches up to it, so that
    /// whoever finds that an entry names a place inside the file finds, behind that, what stands there.
    fn note_metadata(&self, run: Range<u64>) -> Result<()> {
        if self.compressed {
            return Ok(()); // no grain is written twice
        }
        let mut known = self.known_metadata()?;
        let runs = known.get_or_insert_default();
        let at = runs.partition_point(|known| known.start < run.start);
        runs.insert(at, run);
        Ok(())
    }
}

/// Whether one of the sorted, disjoint `runs` shares a byte with `range`.
fn overlaps(runs: &[Range<u64>], range: &Range<u64>) -> bool {
    let before_end = runs.partition_point(|run| run.start < range.end);
    before_end > 0 && runs[before_end - 1].end > range.start
}
