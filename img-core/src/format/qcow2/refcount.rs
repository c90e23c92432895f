//! Reference counts of host clusters: reading, changing, and making room for more of them.
//!
//! Counts stand in refcount blocks, found through the refcount table. Counting up happens in memory at
//! once; counting down only when the dropped reference is durable (see `flush`). New blocks are placed
//! where the reference places them: directly behind the run whose counting needed them.

use std::{ops::Range, sync::atomic::Ordering};

use super::{
    alloc::{Freed, State},
    entry::{OFFSET_MASK, REFCOUNT_TABLE_RESERVED},
    extension::be64,
    geometry::{refcount_get, refcount_set},
    header::MAX_REFCOUNT_TABLE_BYTES,
    layer::Qcow2Layer,
    overlap::Kind,
};
use crate::{Error, Result, storage::Flush};

/// What counting up came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counted {
    /// Done.
    Done,
    /// Nothing was counted, as a refcount block had to be made first, which may stand where the caller
    /// wanted to go: search again.
    SearchAgain,
}

impl Qcow2Layer {
    /// The count of the host cluster at `host_offset`.
    pub(super) fn refcount(&self, host_offset: u64) -> Result<u64> {
        self.refcount_of(host_offset >> self.geometry.cluster_bits)
    }

    /// The count of host cluster number `cluster`.
    pub(super) fn refcount_of(&self, cluster: u64) -> Result<u64> {
        let Some(block) = self.refcount_block_of(cluster)? else { return Ok(0) };
        let (at, index) = self.refcount_place(block, cluster);
        let (slice, _) = self.refcount_blocks.get(self.image_file(), at)?;
        Ok(refcount_get(&slice, self.geometry.refcount_order, index))
    }

    /// Calls `visit` with the counts of `clusters`, run by run: `None` where no block stands, or the bytes
    /// of a slice, the first index in it and how many. Stops when `visit` returns false.
    pub(super) fn visit_refcounts(
        &self,
        clusters: Range<u64>,
        mut visit: impl FnMut(Range<u64>, Option<(&[u8], usize)>) -> bool,
    ) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        let per_slice = (self.refcount_blocks.slice_bytes() * 8) >> self.geometry.refcount_order;
        let covered = self.refcount_table_entries() * per_block;
        let mut next = clusters.start;
        while next < clusters.end {
            let go_on = if next >= covered {
                let rest = next..clusters.end;
                next = clusters.end;
                visit(rest, None)
            } else if let Some(block) = self.refcount_block_of(next)? {
                let end = ((next / per_slice + 1) * per_slice).min(clusters.end);
                let (at, index) = self.refcount_place(block, next);
                let (slice, _) = self.refcount_blocks.get(self.image_file(), at)?;
                let go_on = visit(next..end, Some((&slice[..], index)));
                next = end;
                go_on
            } else {
                let end = (next / per_block).saturating_add(1).saturating_mul(per_block).min(clusters.end);
                let go_on = visit(next..end, None);
                next = end;
                go_on
            };
            if !go_on {
                break;
            }
        }
        Ok(())
    }

    /// Host offset of the slice with the count of `cluster` in `block`, and the index in that slice.
    fn refcount_place(&self, block: u64, cluster: u64) -> (u64, usize) {
        let slice_bytes = self.refcount_blocks.slice_bytes();
        let per_slice = (slice_bytes * 8) >> self.geometry.refcount_order;
        let in_block = cluster % self.geometry.refcounts_per_block();
        let index = usize::try_from(in_block % per_slice).expect("inside a slice");
        (block + in_block / per_slice * slice_bytes, index)
    }

    fn refcount_table_entries(&self) -> u64 {
        u64::from(self.header().refcount_table_clusters) * self.geometry.cluster_bytes() / 8
    }

    /// Where the count of `cluster` stands, by what is cached of the refcount table: the slice's host offset and the
    /// index in it. `None` where there is no block, or the table is not in memory there.
    pub(super) fn cached_refcount_place(&self, cluster: u64) -> Result<Option<(u64, usize)>> {
        let index = cluster / self.geometry.refcounts_per_block();
        if index >= self.refcount_table_entries() {
            return Ok(None);
        }
        let at = self.header().refcount_table_offset + index * 8;
        let Some(word) = self.refcount_table.look_at(at, be64) else { return Ok(None) };
        let block = self.checked_refcount_block(at, word)?;
        Ok(block.map(|block| self.refcount_place(block, cluster)))
    }

    /// Host offset of the block that counts `cluster`, checked; `None` where there is none.
    fn refcount_block_of(&self, cluster: u64) -> Result<Option<u64>> {
        let index = cluster / self.geometry.refcounts_per_block();
        if index >= self.refcount_table_entries() {
            return Ok(None);
        }
        let at = self.header().refcount_table_offset + index * 8;
        let (slice, within) = self.refcount_table.get(self.image_file(), at)?;
        let word = be64(&slice, within);
        self.checked_refcount_block(at, word)
    }

    /// A refcount table entry that stands at `at`, checked.
    pub(super) fn checked_refcount_block(&self, at: u64, word: u64) -> Result<Option<u64>> {
        let block = word & !REFCOUNT_TABLE_RESERVED;
        if block == 0 {
            return Ok(None);
        }
        if self.geometry.in_cluster(block) != 0 || block & !OFFSET_MASK != 0 {
            let expected = "a refcount block at the start of a cluster";
            return Err(self.map.corrupt("refcount table entry", at, expected, word));
        }
        let end = self.end_bytes.load(Ordering::Relaxed);
        if block >= end {
            let expected = format_args!("a refcount block inside the file, below {end:#x}");
            return Err(self.map.corrupt("refcount table entry", at, expected, word));
        }
        Ok(Some(block))
    }

    /// Sets the count of a cluster that has a block.
    fn set_refcount(&self, block: u64, cluster: u64, count: u64) -> Result<()> {
        let (at, index) = self.refcount_place(block, cluster);
        let order = self.geometry.refcount_order;
        self.refcount_blocks
            .update(self.image_file(), at, |bytes, _| refcount_set(bytes, order, index, count))
    }

    /// Counts every cluster of `clusters` up by one.
    pub(super) fn count_up(&self, state: &mut State, clusters: Range<u64>) -> Result<Counted> {
        // Blocks first, so that nothing has to be undone when one is missing.
        let per_block = self.geometry.refcounts_per_block();
        let mut next = clusters.start;
        while next < clusters.end {
            if self.refcount_block_of(next)?.is_none() {
                let made = self.make_refcount_block(state, next);
                // The search starts over where it was, as the reference's does.
                state.free_index = state.free_index.min(clusters.start);
                return made.map(|()| Counted::SearchAgain);
            }
            next = (next / per_block + 1) * per_block;
        }
        let (max, order) = (self.geometry.refcount_max(), self.geometry.refcount_order);
        let mut full = None;
        self.visit_refcounts(clusters.clone(), |run, counts| {
            let (bytes, first) = counts.expect("every block was made above");
            full = run.enumerate().find(|(at, _)| refcount_get(bytes, order, first + at) >= max);
            full.is_none()
        })?;
        if let Some((_, cluster)) = full {
            return Err(Error::Invalid(format!(
                "{}: host cluster {cluster} would be referenced more than {max} times, which {}-bit reference counts cannot hold",
                self.path().display(),
                1 << order
            )));
        }
        self.forget_counted_once(clusters.clone());
        let per_slice = (self.refcount_blocks.slice_bytes() * 8) >> order;
        let mut next = clusters.start;
        while next < clusters.end {
            let end = ((next / per_slice + 1) * per_slice).min(clusters.end);
            let block = self.refcount_block_of(next)?.expect("made above");
            let (at, first) = self.refcount_place(block, next);
            self.refcount_blocks.update(self.image_file(), at, |bytes, _| {
                for index in first..first + usize_of(end - next) {
                    let count = refcount_get(bytes, order, index);
                    refcount_set(bytes, order, index, count + 1);
                }
            })?;
            next = end;
        }
        state.barrier = true;
        Ok(Counted::Done)
    }

    /// Counts a cluster down by one and returns what is left.
    pub(super) fn count_down(&self, cluster: u64) -> Result<u64> {
        let count = self.refcount_of(cluster)?;
        let block = self.refcount_block_of(cluster)?;
        let (Some(block), Some(left)) = (block, count.checked_sub(1)) else {
            let at = cluster << self.geometry.cluster_bits;
            return Err(self.map.corrupt("refcount of the cluster", at, "at least 1, as it was in use", 0));
        };
        self.forget_counted_once(cluster..cluster + 1);
        self.set_refcount(block, cluster, left)?;
        Ok(left)
    }

    /// Makes the block that counts `cluster`.
    fn make_refcount_block(&self, state: &mut State, cluster: u64) -> Result<()> {
        let geometry = self.geometry;
        let per_block = geometry.refcounts_per_block();
        if state.draining && cluster / per_block >= self.refcount_table_entries() {
            state.stalled = true;
            return Err(Error::Invalid(format!(
                "{}: the refcount table cannot grow beside a flush",
                self.path().display()
            )));
        }
        let new = self.find_free(state, 1)?;
        let block = new << geometry.cluster_bits;
        self.check_overlap(&(block..block + geometry.cluster_bytes()), None)?;
        self.note_allocated(block + geometry.cluster_bytes());
        let host = block..block + geometry.cluster_bytes();
        self.refcount_blocks.fill_with_zeroes(host.clone());
        let index = cluster / per_block;
        let counts_itself = new / per_block == index;
        let counted = if counts_itself {
            self.set_refcount(block, new, 1).map(|()| Counted::Done)
        } else {
            self.count_up(state, new..new + 1)
        };
        if !matches!(counted, Ok(Counted::Done)) {
            // The block for the block came first; this one is made when the caller comes back.
            self.refcount_blocks.forget(host);
            return counted.map(|_| ());
        }
        self.note_place(Kind::RefcountBlock, host.clone());
        state.barrier = true;
        let linked = if index < self.refcount_table_entries() {
            let table = self.header().refcount_table_offset;
            self.set_table_entry(table, index, block)
        } else {
            self.grow_refcount_table(state, index, block, cluster.max(new) + 1)
        };
        if linked.is_err() && !self.is_halted() {
            // Nothing names the block: what is known of it in memory must not reach the file.
            self.refcount_blocks.forget(host.clone());
            self.forget_place(Kind::RefcountBlock, host);
            if !counts_itself {
                self.count_down(new)?;
            }
            self.cluster_is_free(state, new);
        }
        linked
    }

    fn set_table_entry(&self, table: u64, index: u64, block: u64) -> Result<()> {
        self.refcount_table.update(self.image_file(), table + index * 8, |bytes, within| {
            bytes[within..within + 8].copy_from_slice(&block.to_be_bytes());
        })
    }

    /// Moves to a larger refcount table, which has `block` at `index`. The new table and the blocks that
    /// count it stand in an area of their own, at the first cluster behind `used` clusters that starts a
    /// block. Crash order: (1) all refcount blocks and the whole new table, sync; (2) the header, sync;
    /// (3) the old table is freed.
    fn grow_refcount_table(&self, state: &mut State, index: u64, block: u64, used: u64) -> Result<()> {
        let geometry = self.geometry;
        let cluster_bytes = geometry.cluster_bytes();
        let per_block = geometry.refcounts_per_block();
        let start = used.div_ceil(per_block) * per_block;
        let (mut blocks, mut table_clusters) = (1_u64, 1_u64);
        loop {
            let total = (start + blocks + table_clusters).div_ceil(per_block);
            let entries = total + total.div_ceil(2);
            let next = ((blocks + table_clusters).div_ceil(per_block), (entries * 8).div_ceil(cluster_bytes));
            if next == (blocks, table_clusters) {
                break;
            }
            (blocks, table_clusters) = (next.0.max(blocks), next.1.max(table_clusters));
        }
        let table_bytes = table_clusters * cluster_bytes;
        if table_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::unsupported(
                self.path(),
                format_args!(
                    "a refcount table of {table_bytes} bytes (more than {MAX_REFCOUNT_TABLE_BYTES})"
                ),
            ));
        }
        let first_block = start << geometry.cluster_bits;
        let table = first_block + blocks * cluster_bytes;
        let area = first_block..table + table_bytes;
        self.check_overlap(&area, None)?;
        self.note_allocated(area.end);
        let old = self.header().refcount_table_offset;
        let old = old..old + self.refcount_table_entries() * 8;
        // (1)
        let written = self.write_larger_table(&area, table, (index, block), &old);
        if let Err(error) = written {
            // Nothing names the new table: what is known of it in memory must not reach the file.
            self.refcount_blocks.forget(first_block..table);
            self.refcount_table.forget(table..area.end);
            self.forget_place(Kind::RefcountBlock, first_block..table);
            self.forget_place(Kind::RefcountTable, table..area.end);
            return Err(error);
        }
        // (2)
        self.update_header(|header| {
            header.refcount_table_offset = table;
            header.refcount_table_clusters = u32::try_from(table_clusters).expect("at most 8 MiB");
        })?;
        // (3)
        self.refcount_table.forget(old.clone());
        self.forget_place(Kind::RefcountTable, old.clone());
        state.free(Freed::clusters(old, self.runtime.discard_other));
        Ok(())
    }

    /// Step 1 of a larger refcount table, which stands at `table` behind its own blocks in `area`: it has the
    /// entries of the one at `old`, those of its blocks, and `added`.
    fn write_larger_table(
        &self,
        area: &Range<u64>,
        table: u64,
        added: (u64, u64),
        old: &Range<u64>,
    ) -> Result<()> {
        let geometry = self.geometry;
        let (cluster_bytes, per_block) = (geometry.cluster_bytes(), geometry.refcounts_per_block());
        let first_block = area.start;
        let (start, end) = (first_block >> geometry.cluster_bits, area.end >> geometry.cluster_bits);
        self.refcount_blocks.fill_with_zeroes(first_block..table);
        for cluster in start..end {
            let own = first_block + ((cluster - start) / per_block) * cluster_bytes;
            self.set_refcount(own, cluster, 1)?;
        }
        self.note_place(Kind::RefcountBlock, first_block..table);
        self.refcount_table.fill_with_zeroes(table..area.end);
        for (index, at) in (old.start..old.end).step_by(8).enumerate() {
            let (slice, within) = self.refcount_table.get(self.image_file(), at)?;
            let word = be64(&slice, within);
            if word != 0 {
                self.set_table_entry(table, index as u64, word)?;
            }
        }
        self.set_table_entry(table, added.0, added.1)?;
        for (new, at) in (first_block..table).step_by(usize_of(cluster_bytes)).enumerate() {
            self.set_table_entry(table, start / per_block + new as u64, at)?;
        }
        self.note_place(Kind::RefcountTable, table..area.end);
        self.write_refcount_blocks()?;
        self.refcount_table.write_back(
            self.image_file(),
            |at| (table..area.end).contains(&at),
            |host| self.check_overlap(&host, Some(Kind::RefcountTable)),
        )?;
        self.image_file().flush(Flush::Data)
    }

    /// Whether far more clusters are in use than the file takes host space for: then clusters were
    /// preallocated with their metadata only, and holes under data are worth asking for. (The reference's
    /// rule: at least a ninth more, and at least two.)
    pub(super) fn is_preallocated(&self) -> Result<bool> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let real = self.image_file().allocated_bytes()? / cluster_bytes;
        let threshold = (real * 10 / 9).max(real + 2);
        let clusters = self.image_file().len_bytes()? / cluster_bytes;
        let order = self.geometry.refcount_order;
        let mut in_use = 0;
        self.visit_refcounts(0..clusters, |clusters, counts| {
            if let Some((bytes, first)) = counts {
                let count = usize_of(clusters.end - clusters.start);
                in_use +=
                    (first..first + count).filter(|&at| refcount_get(bytes, order, at) != 0).count() as u64;
            }
            in_use < threshold
        })?;
        Ok(in_use >= threshold)
    }
}

/// A number that counts bytes of a buffer, or entries in it.
pub(super) fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("bounded by a cluster or a cache slice")
}
