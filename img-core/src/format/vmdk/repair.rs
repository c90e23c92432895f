//! Mending: the two grain directories brought in step, and the mark of a writer that did not end.
//!
//! A table counts as sound when it lies inside the file and each of its entries is one that readers take. Where both
//! directories have one, the first directory's counts, as for every reader; where its own is broken, the second's
//! takes its place. Where none is sound nothing is mended, and the audit that follows says so.
//!
//! # Crash order
//! 1. The new table, with all its entries, is durable at the end of the file, where nothing names it.
//! 2. The directory's entry names it.
//! 3. After an audit that found nothing: the mark in the header, and the descriptor's line.
//!
//! No table is changed where it stands: a hostile one may lie over something else.

use std::ops::Range;

use super::{
    header::{Header, RawHeader, SECTOR_BYTES},
    layer::{Kind, VmdkLayer},
    sparse::{EntryForm, Grain, Sparse, usize_of},
    stream::sector_entry,
};
use crate::{
    Error, Result,
    format::{Finding, Layer as _},
    storage::Flush,
};

/// What one directory says of a table.
#[derive(Debug, PartialEq, Eq)]
enum Table {
    Absent,
    Sound { at: u64, entries: Vec<u64> },
    Broken,
}

/// Brings the directories of all extents in step, and returns how many tables were mended.
///
/// # Errors
/// [`Error::Unsupported`] where a directory lies over something that it would be mended by overwriting.
pub(super) fn mend(layer: &VmdkLayer, findings: &mut dyn FnMut(Finding)) -> Result<u64> {
    let mut fixed = 0;
    for (index, extent) in layer.extents.iter().enumerate() {
        let Kind::Sparse(sparse) = &extent.kind else { continue };
        let directories: Vec<u64> = sparse.directories().collect();
        let [primary, redundant] = directories[..] else { continue };
        let has_words = matches!(sparse.form, EntryForm::Sectors { .. });
        if sparse.compressed || !sparse.writable || !has_words || primary == redundant {
            continue;
        }
        let plan = sparse.out_of_step(primary, redundant)?;
        if plan.is_empty() {
            continue;
        }
        sparse.check_directories_alone(primary, redundant)?;
        let mut state = layer.state();
        for (directory, table, from) in plan {
            let entry = match sparse.table_at(from, table)? {
                Table::Sound { entries, .. } => {
                    let bytes: Vec<u8> = entries
                        .iter()
                        .flat_map(|entry| u32::try_from(*entry).expect("read from 32 bits").to_le_bytes())
                        .collect();
                    let len_bytes = sparse.table_bytes().next_multiple_of(SECTOR_BYTES);
                    let at = layer.take_place(&mut state, index, sparse, len_bytes, SECTOR_BYTES)?;
                    sparse.storage.write_zeroes(at..at + len_bytes, false)?;
                    sparse.storage.write_at(&bytes, at)?;
                    sparse.tables.forget(at..at + len_bytes);
                    sector_entry(sparse, at)?
                }
                Table::Absent | Table::Broken => 0,
            };
            sparse.storage.flush(Flush::Data)?; // 1.
            sparse.put(directory + table * sparse.entry_bytes(), entry)?;
            let which = if directory == primary { "grain" } else { "redundant grain" };
            let text = format!("Repairing {which} table {table} of '{}'", name(sparse));
            findings(Finding { text, with_program_name: false });
            fixed += 1;
        }
        layer.drain(&mut state)?; // 2.
    }
    Ok(fixed)
}

/// Step 3. Returns how much was mended.
pub(super) fn end(layer: &VmdkLayer, findings: &mut dyn FnMut(Finding)) -> Result<u64> {
    let mut fixed = 0;
    for sparse in layer.sparse_extents().filter(|sparse| sparse.writable && !sparse.compressed) {
        let mut raw = RawHeader::read(&*sparse.storage, 0)?;
        if raw.unclean_shutdown == 0 || raw.magic != super::header::MAGIC {
            continue;
        }
        raw.unclean_shutdown = 0;
        sparse.storage.write_at(zerocopy::IntoBytes::as_bytes(&raw), 0)?;
        sparse.storage.flush(Flush::Data)?;
        let text = format!("Repairing mark of an unclean shutdown of '{}'", name(sparse));
        findings(Finding { text, with_program_name: false });
        fixed += 1;
    }
    let Some(last) = layer.extents.last() else { return Ok(fixed) };
    if matches!(last.kind, Kind::Sparse(_)) && layer.writer().is_some() {
        let sectors = (last.end_bytes() - last.start_bytes) / SECTOR_BYTES;
        if let Some(edit) = layer.line_out_of_step(sectors)? {
            layer.write_line(&edit)?;
            let text = format!("Repairing size of the last extent in the descriptor: {sectors} sectors");
            findings(Finding { text, with_program_name: false });
            fixed += 1;
        }
    }
    Ok(fixed)
}

fn name(sparse: &Sparse) -> String {
    crate::text::from_path(sparse.storage.path())
}

impl Sparse {
    /// The tables to be mended: the directory whose entry changes, which table, and the directory that is right.
    fn out_of_step(&self, primary: u64, redundant: u64) -> Result<Vec<(u64, u64, u64)>> {
        let mut plan = Vec::new();
        for table in 0..self.directory_entries() {
            match (self.table_at(primary, table)?, self.table_at(redundant, table)?) {
                (Table::Broken, Table::Sound { .. }) => plan.push((primary, table, redundant)),
                (Table::Broken, _) | (Table::Absent, Table::Absent) => {}
                (Table::Sound { entries, .. }, Table::Sound { entries: others, .. }) if entries == others => {
                }
                (Table::Sound { .. } | Table::Absent, _) => plan.push((redundant, table, primary)),
            }
        }
        Ok(plan)
    }

    /// What the directory at `directory` says of a table. Entries behind the end of the extent are whatever they are.
    fn table_at(&self, directory: u64, table: u64) -> Result<Table> {
        let at = match self.table_in(directory, table) {
            Ok(None) => return Ok(Table::Absent),
            Ok(Some(at)) => at,
            Err(Error::Corrupt { .. }) => return Ok(Table::Broken),
            Err(error) => return Err(error),
        };
        let count = self.table_entries.min(self.grains() - table * self.table_entries);
        let mut entries = Vec::with_capacity(usize_of(count));
        self.words(at, count, &mut entries)?;
        let is_sound = entries.iter().all(|entry| self.read_entry(*entry).is_ok());
        Ok(if is_sound { Table::Sound { at, entries } } else { Table::Broken })
    }

    /// Refuses to change directories that share bytes with each other, the header, the descriptor, tables or grains.
    fn check_directories_alone(&self, primary: u64, redundant: u64) -> Result<()> {
        let len_bytes = self.directory_entries() * self.entry_bytes();
        let directories = [primary..primary + len_bytes, redundant..redundant + len_bytes];
        let refuse = |what: &str| {
            let feature = format!("repairing an extent whose directories share bytes with {what}");
            Err(Error::unsupported(self.storage.path(), feature))
        };
        let shared = |other: &Range<u64>| {
            directories.iter().any(|directory| directory.start < other.end && other.start < directory.end)
        };
        if directories[0].start < directories[1].end && directories[1].start < directories[0].end {
            return refuse("each other");
        }
        let (_, header) = Header::read(&*self.storage)?;
        if [Some(0..SECTOR_BYTES), header.descriptor].iter().flatten().any(shared) {
            return refuse("the header or the descriptor");
        }
        for directory in [primary, redundant] {
            for table in 0..self.directory_entries() {
                let Table::Sound { at, entries } = self.table_at(directory, table)? else { continue };
                if shared(&(at..at + self.table_bytes())) {
                    return refuse("a table");
                }
                for entry in entries {
                    if let Ok(Grain::At(host)) = self.read_entry(entry)
                        && shared(&(host..host + self.grain_bytes))
                    {
                        return refuse("a grain");
                    }
                }
            }
        }
        Ok(())
    }
}
