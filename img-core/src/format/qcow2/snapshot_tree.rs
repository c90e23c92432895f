//! All L2 tables below an L1 table, read in large pieces, and the host clusters they refer to.

use std::ops::Range;

use super::{
    create_layout::Run,
    entry::{COPIED, Cluster, L1_RESERVED, L2_RESERVED, L2Entry, OFFSET_MASK, like_the_first},
    extension::be64,
    geometry::Geometry,
};
use crate::{Error, Result, storage::Storage};

/// Tables that follow each other are read together up to this size.
const BATCH_BYTES: u64 = 4 << 20;
/// Changed tables are written in multiples of this.
const PAGE_BYTES: usize = 4096;

/// An L1 table: its words in the order of the file, at most 32 MiB.
#[derive(Clone, Debug)]
pub(super) struct L1 {
    /// As they stand, big-endian.
    pub(super) bytes: Vec<u8>,
    at: u64,
}

impl L1 {
    /// Reads `entries` entries from `at` on.
    pub(super) fn read(storage: &dyn Storage, at: u64, entries: u32) -> Result<Self> {
        let mut bytes = vec![0; usize::try_from(u64::from(entries) * 8).expect("at most 32 MiB")];
        storage.read_at(&mut bytes, at)?;
        Ok(Self { bytes, at })
    }

    /// Offsets of the L2 tables, each with its index, checked.
    pub(super) fn tables(&self, storage: &dyn Storage, geometry: Geometry) -> Result<Vec<(usize, u64)>> {
        let mut tables = Vec::new();
        for (index, word) in self.bytes.chunks_exact(8).map(|word| be64(word, 0)).enumerate() {
            let offset = word & OFFSET_MASK;
            if word & L1_RESERVED != 0 || geometry.in_cluster(offset) != 0 {
                return Err(Error::corrupt(
                    storage.path(),
                    "L1 entry",
                    self.at + index as u64 * 8,
                    "a multiple of the cluster size and no reserved bits",
                    format_args!("{word:#x}"),
                ));
            }
            if offset != 0 {
                tables.push((index, offset));
            }
        }
        Ok(tables)
    }

    /// Sets or clears the copied flag of an entry.
    pub(super) fn set_copied(&mut self, index: usize, copied: bool) {
        let word = be64(&self.bytes, index * 8);
        let word = if copied { word | COPIED } else { word & !COPIED };
        self.bytes[index * 8..index * 8 + 8].copy_from_slice(&word.to_be_bytes());
    }
}

/// What [`visit_tables`] calls: position in the list, host offset, bytes.
type Visit<'a> = dyn FnMut(usize, u64, &mut [u8]) -> Result<()> + 'a;

/// Shows the tables at `offsets` to `visit` one after the other: position in `offsets`, host offset, bytes.
/// Pages of tables that `visit` changed are written back; not durable before a flush.
pub(super) fn visit_tables(
    storage: &dyn Storage,
    geometry: Geometry,
    offsets: &[u64],
    visit: &mut Visit<'_>,
) -> Result<()> {
    let cluster = geometry.cluster_bytes();
    let cluster_len = usize::try_from(cluster).expect("at most 2 MiB");
    let most = usize::try_from(BATCH_BYTES / cluster).expect("small").max(1);
    let (mut bytes, mut before) = (Vec::new(), Vec::new());
    let mut first = 0;
    while first < offsets.len() {
        let mut count = 1;
        while count < most
            && offsets.get(first + count).is_some_and(|&next| next == offsets[first + count - 1] + cluster)
        {
            count += 1;
        }
        bytes.resize(count * cluster_len, 0);
        storage.read_at(&mut bytes, offsets[first])?;
        before.clone_from(&bytes);
        for (index, table) in bytes.chunks_exact_mut(cluster_len).enumerate() {
            visit(first + index, offsets[first + index], table)?;
        }
        write_changed(storage, offsets[first], &before, &bytes)?;
        first += count;
    }
    Ok(())
}

/// Writes the pages in which `now` differs from `before`, runs of them together.
pub(super) fn write_changed(storage: &dyn Storage, at: u64, before: &[u8], now: &[u8]) -> Result<()> {
    let mut start = None;
    let pages = before.chunks(PAGE_BYTES).zip(now.chunks(PAGE_BYTES));
    let mut position = 0;
    for (old, new) in pages {
        match (old != new, start) {
            (true, None) => start = Some(position),
            (false, Some(from)) => {
                storage.write_at(&now[from..position], at + from as u64)?;
                start = None;
            }
            _ => {}
        }
        position += new.len();
    }
    match start {
        Some(from) => storage.write_at(&now[from..], at + from as u64),
        None => Ok(()),
    }
}

/// What an entry refers to on the host.
enum Target {
    Nothing,
    /// A cluster of its own, or one reserved for it.
    Cluster(u64),
    /// Every host cluster that the stored bytes touch.
    Compressed(Run),
    /// What no entry may say.
    Corrupt,
}

/// What the entry at `index` refers to, and how many entries from there on do the same, each a cluster
/// further: at least 1.
fn target(geometry: Geometry, table: &[u8], index: usize) -> (Target, usize) {
    let entry = L2Entry::read(table, index, geometry);
    if let Cluster::Compressed { at, stored_bytes } = entry.cluster(geometry) {
        let end = at + u64::from(stored_bytes) - 1; // at most 2^62 + 2^22
        let start = at >> geometry.cluster_bits;
        let run = Run { start, clusters: (end >> geometry.cluster_bits) - start + 1 };
        return (if end >> 56 == 0 { Target::Compressed(run) } else { Target::Corrupt }, 1);
    }
    let at = entry.word & OFFSET_MASK;
    if entry.word & L2_RESERVED != 0 || geometry.in_cluster(at) != 0 {
        return (Target::Corrupt, 1);
    }
    let alike =
        if geometry.extended_l2 { 1 } else { like_the_first(&table.as_chunks().0[index..], geometry) };
    let target = if at == 0 { Target::Nothing } else { Target::Cluster(at >> geometry.cluster_bits) };
    (target, alike)
}

fn entries(geometry: Geometry) -> usize {
    usize::try_from(geometry.l2_entries()).expect("at most 2^18")
}

/// Tells the host clusters that the entries of one table refer to, as runs in the order of the entries. A
/// compressed cluster refers to every host cluster it touches.
pub(super) fn data_runs(
    storage: &dyn Storage,
    geometry: Geometry,
    table_offset: u64,
    table: &[u8],
    visit: &mut dyn FnMut(Run) -> Result<()>,
) -> Result<()> {
    let mut run = Run { start: 0, clusters: 0 };
    let mut index = 0;
    while index < entries(geometry) {
        let (target, alike) = target(geometry, table, index);
        let next = match target {
            Target::Nothing => None,
            Target::Cluster(start) => Some(Run { start, clusters: alike as u64 }),
            Target::Compressed(run) => Some(run),
            Target::Corrupt => {
                return Err(Error::corrupt(
                    storage.path(),
                    "L2 entry",
                    table_offset + index as u64 * geometry.l2_entry_bytes(),
                    "a host offset below 2^56, aligned to clusters, and no reserved bits",
                    format_args!("{:#x}", L2Entry::read(table, index, geometry).word),
                ));
            }
        };
        match next {
            None => {}
            Some(next) if run.start + run.clusters == next.start => run.clusters += next.clusters,
            Some(next) => {
                if run.clusters > 0 {
                    visit(run)?;
                }
                run = next;
            }
        }
        index += alike;
    }
    if run.clusters > 0 { visit(run) } else { Ok(()) }
}

/// Clears the copied flag of every entry.
pub(super) fn clear_copied(geometry: Geometry, table: &mut [u8]) {
    let rest = u64::from_ne_bytes((!COPIED).to_be_bytes());
    let clear = |word: &mut [u8; 8]| *word = (u64::from_ne_bytes(*word) & rest).to_ne_bytes();
    let words = table.as_chunks_mut().0.iter_mut();
    if geometry.extended_l2 {
        words.step_by(2).for_each(clear);
    } else {
        words.for_each(clear);
    }
}

/// Makes the copied flag of every entry say whether its host cluster has a count of one, which `all_one`
/// tells of runs; those of compressed and unallocated ones are cleared. Corrupt entries stay as they are.
pub(super) fn set_copied(
    geometry: Geometry,
    table: &mut [u8],
    all_one: &mut dyn FnMut(Run) -> Result<bool>,
) -> Result<()> {
    let entry_len = usize::try_from(geometry.l2_entry_bytes()).expect("8 or 16");
    let mut index = 0;
    while index < entries(geometry) {
        let (target, alike) = target(geometry, table, index);
        let end = index + alike;
        let mut mark = |entries: Range<usize>, copied: bool| {
            for index in entries {
                // The flag is the highest bit of a big-endian word.
                let first = &mut table[index * entry_len];
                *first = if copied { *first | 0x80 } else { *first & 0x7f };
            }
        };
        match target {
            Target::Cluster(start) => {
                let run = Run { start, clusters: alike as u64 };
                if all_one(run)? {
                    mark(index..end, true);
                } else {
                    for (index, start) in (index..end).zip(start..) {
                        mark(index..index + 1, all_one(Run { start, clusters: 1 })?);
                    }
                }
            }
            Target::Nothing | Target::Compressed(_) => mark(index..end, false),
            Target::Corrupt => {}
        }
        index = end;
    }
    Ok(())
}
