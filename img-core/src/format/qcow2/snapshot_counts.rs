//! Reference counts changed in bulk, straight on disk, while nobody else uses the image.
//!
//! A snapshot changes the count of every cluster of the disk by one. [`Counts`] takes runs of host clusters,
//! keeps the refcount blocks it meets in a bounded buffer, and writes them back in the order of the file.
//! The layer's own caches are drained before and reloaded after.

use std::{collections::BTreeMap, ops::Range};

use super::{
    counts::{add_to_each, all_one, any_is},
    create_layout::Run,
    entry::REFCOUNT_TABLE_RESERVED,
    extension::be64,
    geometry::{Geometry, refcount_get},
    header::Header,
};
use crate::{Error, Result, storage::Storage};

/// Bound of the blocks kept in memory.
const BLOCKS_BYTES: u64 = 8 << 20;
/// So many freed runs are collected before their space is given back.
const MAX_FREED_RUNS: usize = 1 << 16;

/// One refcount block.
#[derive(Debug)]
struct Block {
    offset: u64,
    bytes: Vec<u8>,
    changed: bool,
}

/// The reference counts of an image at rest.
pub(super) struct Counts<'a> {
    storage: &'a dyn Storage,
    geometry: Geometry,
    table_offset: u64,
    /// Entries of the refcount table.
    table: Vec<u8>,
    blocks: BTreeMap<u64, Block>,
    /// Clusters whose count went to zero.
    freed: Vec<Run>,
    /// Their space is given back to the host.
    punches: bool,
}

impl<'a> Counts<'a> {
    /// Reads the refcount table, at most 8 MiB. With `punches` the space of clusters whose count goes to zero
    /// is given back to the host.
    pub(super) fn new(storage: &'a dyn Storage, header: &Header, punches: bool) -> Result<Self> {
        let geometry = header.geometry;
        let bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_bytes();
        let mut table = vec![0; usize::try_from(bytes).expect("the header's check: at most 8 MiB")];
        storage.read_at(&mut table, header.refcount_table_offset)?;
        let table_offset = header.refcount_table_offset;
        let (blocks, freed) = (BTreeMap::new(), Vec::new());
        Ok(Self { storage, geometry, table_offset, table, blocks, freed, punches })
    }

    /// The count of a host cluster.
    pub(super) fn get(&mut self, cluster: u64) -> Result<u64> {
        let per_block = self.geometry.refcounts_per_block();
        let order = self.geometry.refcount_order;
        let index = usize::try_from(cluster % per_block).expect("inside a block");
        Ok(self.block(cluster / per_block)?.map_or(0, |block| refcount_get(&block.bytes, order, index)))
    }

    /// Adds one to each count of a run, or takes one away. The parts of the run that lie in one block each
    /// are changed whole or not at all; `done` counts those that were changed.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where a cluster in use has a count of zero; [`Error::Io`] with `EINVAL`, as the
    /// reference has it, where a count cannot grow.
    pub(super) fn add(&mut self, run: Run, up: bool, done: &mut u64) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        let end = run.start + run.clusters;
        let mut start = run.start;
        while start < end {
            let part_end = end.min((start / per_block + 1) * per_block);
            self.add_part(Run { start, clusters: part_end - start }, up)?;
            *done += 1;
            start = part_end;
        }
        Ok(())
    }

    /// The first `parts` parts of a run, as [`Self::add`] cuts it, counted down again.
    pub(super) fn undo(&mut self, run: Run, parts: &mut u64) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        let end = run.start + run.clusters;
        let mut start = run.start;
        while start < end && *parts > 0 {
            let part_end = end.min((start / per_block + 1) * per_block);
            self.add_part(Run { start, clusters: part_end - start }, false)?;
            *parts -= 1;
            start = part_end;
        }
        Ok(())
    }

    /// Whether all clusters of a run have a count of one.
    pub(super) fn all_one(&mut self, run: Run) -> Result<bool> {
        let per_block = self.geometry.refcounts_per_block();
        let order = self.geometry.refcount_order;
        let end = run.start + run.clusters;
        let mut start = run.start;
        while start < end {
            let part_end = end.min((start / per_block + 1) * per_block);
            let Some(block) = self.block(start / per_block)? else { return Ok(false) };
            if !all_one(&block.bytes, order, part_of(start..part_end, per_block)) {
                return Ok(false);
            }
            start = part_end;
        }
        Ok(true)
    }

    fn add_part(&mut self, run: Run, up: bool) -> Result<()> {
        let (storage, geometry) = (self.storage, self.geometry);
        let (order, max) = (geometry.refcount_order, geometry.refcount_max());
        let per_block = geometry.refcounts_per_block();
        let unused = |cluster: u64| {
            let at = cluster << geometry.cluster_bits;
            Error::corrupt(storage.path(), "reference count of a cluster in use", at, "at least 1", 0)
        };
        let part = part_of(run.start..run.start + run.clusters, per_block);
        let Some(block) = self.block(run.start / per_block)? else { return Err(unused(run.start)) };
        if any_is(&block.bytes, order, part.clone(), [0, if up { max } else { 0 }]) {
            for (index, cluster) in part.clone().zip(run.start..) {
                match refcount_get(&block.bytes, order, index) {
                    0 => return Err(unused(cluster)),
                    count if up && count == max => {
                        // EINVAL is what the reference reports.
                        let source = std::io::Error::from_raw_os_error(libc::EINVAL);
                        return Err(Error::io(
                            storage.path(),
                            "count one more reference to a cluster",
                            source,
                        ));
                    }
                    _ => {}
                }
            }
        }
        block.changed = true;
        add_to_each(&mut block.bytes, order, part.clone(), up);
        if up || !any_is(&block.bytes, order, part.clone(), [0, 0]) {
            return Ok(());
        }
        let mut freed: Vec<u64> = Vec::new();
        for (index, cluster) in part.zip(run.start..) {
            if refcount_get(&block.bytes, order, index) == 0 {
                freed.push(cluster);
            }
        }
        for cluster in freed {
            match self.freed.last_mut() {
                Some(last) if last.start + last.clusters == cluster => last.clusters += 1,
                _ => self.freed.push(Run { start: cluster, clusters: 1 }),
            }
        }
        if self.freed.len() >= MAX_FREED_RUNS {
            self.punch_freed()?;
        }
        Ok(())
    }

    /// The block of that index, read where it is not in memory; `None` where the table has none.
    fn block(&mut self, index: u64) -> Result<Option<&mut Block>> {
        if !self.blocks.contains_key(&index) {
            let at = usize::try_from(index).ok().and_then(|index| index.checked_mul(8));
            let Some(at) = at.filter(|at| *at < self.table.len()) else { return Ok(None) };
            let offset = be64(&self.table, at);
            if offset == 0 {
                return Ok(None);
            }
            let misplaced = offset & REFCOUNT_TABLE_RESERVED != 0 || self.geometry.in_cluster(offset) != 0;
            if misplaced || i64::try_from(offset).is_err() {
                return Err(Error::corrupt(
                    self.storage.path(),
                    "refcount table entry",
                    self.table_offset + at as u64,
                    "a multiple of the cluster size",
                    format_args!("{offset:#x}"),
                ));
            }
            if (self.blocks.len() as u64 + 1) * self.geometry.cluster_bytes() > BLOCKS_BYTES {
                self.write()?;
                self.blocks.clear();
            }
            let mut bytes = vec![0; usize::try_from(self.geometry.cluster_bytes()).expect("at most 2 MiB")];
            self.storage.read_at(&mut bytes, offset)?;
            self.blocks.insert(index, Block { offset, bytes, changed: false });
        }
        Ok(self.blocks.get_mut(&index))
    }

    /// Writes what changed. Not durable before a flush.
    pub(super) fn write(&mut self) -> Result<()> {
        for block in self.blocks.values_mut().filter(|block| block.changed) {
            self.storage.write_at(&block.bytes, block.offset)?;
            block.changed = false;
        }
        Ok(())
    }

    /// Gives the space of freed clusters back to the host, where that is wanted. Whatever referred to them is durably
    /// gone already; the counts need not be durable, since a cluster counted too high is only a leak.
    pub(super) fn punch_freed(&mut self) -> Result<()> {
        if !self.punches || !self.storage.limits().can_punch {
            self.freed.clear();
            return Ok(());
        }
        let bits = self.geometry.cluster_bits;
        let file_end = self.storage.len_bytes()?;
        self.freed.sort_unstable_by_key(|run| run.start);
        for run in self.freed.drain(..) {
            let (start, end) = (run.start << bits, ((run.start + run.clusters) << bits).min(file_end));
            if start < end {
                self.storage.punch_hole(start..end)?;
            }
        }
        Ok(())
    }
}

/// The indices in their block of clusters that share one.
fn part_of(clusters: Range<u64>, per_block: u64) -> Range<usize> {
    let first = usize::try_from(clusters.start % per_block).expect("inside a block");
    first..first + usize::try_from(clusters.end - clusters.start).expect("inside a block")
}
