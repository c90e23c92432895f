//! New refcount structures from nothing but the references.
//!
//! Order: the new blocks and the new table go to clusters that nothing refers to; they are made durable;
//! then twelve bytes of the header, inside one sector, point to them. Until that write the image is what
//! it was; after it the old structures are leaks.

use super::{
    super::{geometry::refcount_set, header::MAX_REFCOUNT_TABLE_BYTES},
    MAX_CLUSTERS, Subject,
    blocks::Blocks,
    counters::{Counters, LANES, index},
    fault::Teller,
    guard::Guard,
};
use crate::{Result, storage::Flush};

/// Where the offset and size of the refcount table stand in the header.
const TABLE_AT: u64 = 48;

/// Writes new structures for `counters`, which gain the clusters that they take.
pub(super) fn rebuild(
    subject: &mut Subject<'_>,
    counters: &mut Counters,
    guard: &Guard,
    teller: &mut Teller<'_>,
) -> Result<Blocks> {
    let builder = Builder { subject, counters, guard, table: Vec::new() };
    let end = builder.counters.clusters();
    let result = builder.build(end);
    let (table_offset, table) = match result {
        Ok(built) => built,
        Err(error) => {
            teller.report.check_errors += 1;
            teller.error("ERROR writing refblock".to_owned());
            return Err(error);
        }
    };
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    let storage = subject.storage;
    storage.write_at(&bytes, table_offset)?;
    storage.flush(Flush::Data)?;
    let clusters = subject.geometry.clusters_for(bytes.len() as u64);
    let clusters = u32::try_from(clusters).expect("a table has at most 8 MiB");
    let mut pointer = table_offset.to_be_bytes().to_vec();
    pointer.extend(clusters.to_be_bytes());
    storage.write_at(&pointer, TABLE_AT)?;
    storage.flush(Flush::Data)?;
    subject.file_bytes = storage.len_bytes()?;
    Ok(Blocks { table_offset, entries: table })
}

struct Builder<'a, 's> {
    subject: &'a Subject<'s>,
    counters: &'a mut Counters,
    guard: &'a Guard,
    table: Vec<u64>,
}

impl Builder<'_, '_> {
    /// Writes all blocks; gives the offset and the entries of the table that finds them.
    fn build(mut self, clusters: u64) -> Result<(u64, Vec<u64>)> {
        self.write_blocks(0, clusters)?;
        loop {
            // The table's own clusters are counted too, and their blocks may make the table grow: then it
            // moves, and what it leaves is given back by the pass that follows.
            let clusters = self.subject.geometry.clusters_for(self.table.len() as u64 * 8);
            let first = self.take(clusters, &mut 0)?;
            if !self.write_blocks(first, first + clusters)? {
                return Ok((first << self.subject.geometry.cluster_bits, self.table));
            }
        }
    }

    /// Writes the blocks of all referenced clusters of a range, and of those that the blocks take. Says
    /// whether the table grew.
    fn write_blocks(&mut self, first: u64, end: u64) -> Result<bool> {
        let geometry = self.subject.geometry;
        let per_block = geometry.refcounts_per_block();
        let mut end = end;
        let mut free_from = 0;
        let mut has_grown = false;
        let mut at = first;
        loop {
            at = self.counters.next_touched(at, end);
            if at >= end {
                return Ok(has_grown);
            }
            if self.counters.get(at) == 0 {
                at += 1;
                continue;
            }
            let number = at / per_block;
            let offset = match self.table.get(index(number)) {
                Some(offset) if *offset != 0 => *offset,
                _ => {
                    // Blocks before this one are written: their counts must not change any more.
                    free_from = free_from.max(number * per_block);
                    let cluster = self.take(1, &mut free_from)?;
                    end = end.max(cluster + 1);
                    has_grown |= self.enter(number, cluster << geometry.cluster_bits)?;
                    cluster << geometry.cluster_bits
                }
            };
            let block = self.encode(number);
            self.subject.storage.write_at(&block, offset)?;
            at = (number + 1) * per_block;
        }
    }

    /// Enters a block into the table. Says whether the table grew.
    fn enter(&mut self, number: u64, offset: u64) -> Result<bool> {
        let geometry = self.subject.geometry;
        let has_grown = number >= self.table.len() as u64;
        if has_grown {
            let bytes = ((number + 1) * 8).next_multiple_of(geometry.cluster_bytes());
            if bytes > MAX_REFCOUNT_TABLE_BYTES {
                return Err(self.subject.failure(rustix::io::Errno::FBIG));
            }
            self.table.resize(index(bytes / 8), 0);
        }
        self.table[index(number)] = offset;
        Ok(has_grown)
    }

    /// The bytes of a block.
    fn encode(&self, number: u64) -> Vec<u8> {
        let geometry = self.subject.geometry;
        let mut block = vec![0; index(geometry.cluster_bytes())];
        let first = number * geometry.refcounts_per_block();
        let mut entry = 0;
        while entry < geometry.refcounts_per_block() {
            if (first + entry).is_multiple_of(LANES) && self.counters.lanes(first + entry) == Some(0) {
                entry += LANES;
                continue;
            }
            let count = self.counters.get(first + entry).min(geometry.refcount_max());
            if count > 0 {
                refcount_set(&mut block, geometry.refcount_order, index(entry), count);
            }
            entry += 1;
        }
        block
    }

    /// Takes neighbouring free clusters, the first from `free_from` on that fit, and leaves `free_from` at
    /// the first gap.
    fn take(&mut self, clusters: u64, free_from: &mut u64) -> Result<u64> {
        let mut at = *free_from;
        let mut run = 0;
        let mut first_gap = None;
        // Past the counted clusters everything unguarded is free.
        while run < clusters {
            if at > MAX_CLUSTERS {
                return Err(self.subject.failure(rustix::io::Errno::FBIG));
            }
            if let Some(end) = self.guard.cluster_behind(at) {
                run = 0;
                at = end;
                continue;
            }
            if self.counters.get(at) == 0 {
                first_gap = first_gap.or(Some(at));
                run += 1;
            } else {
                run = 0;
            }
            at += 1;
        }
        if let Some(gap) = first_gap {
            *free_from = gap;
        }
        let first = at - clusters;
        self.counters.add(first..at, 1).map_err(|_| self.subject.failure(rustix::io::Errno::NOMEM))?;
        Ok(first)
    }
}
