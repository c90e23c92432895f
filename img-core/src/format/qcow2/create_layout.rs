//! Where everything stands in a new image: the reference's allocator, played through in memory.
//!
//! Scripts patch metadata of new images at fixed places, so a new image is laid out cluster for cluster as
//! the reference does it. Its layout is the outcome of a history (allocate the header, the first refcount
//! block, the L1 table, then L2 tables and data in turn, refcount blocks whenever the next is needed), which
//! [`Layout`] repeats on sets of runs instead of on disk: 4 TiB of preallocated metadata are 130,000 steps
//! and no I/O.

use std::collections::BTreeMap;

use super::{geometry::Geometry, header::MAX_REFCOUNT_TABLE_BYTES};
use crate::{Error, Result};

/// Host cluster numbers, one run behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) clusters: u64,
}

/// The clusters in use, as disjoint runs that never touch: start → end.
#[derive(Debug, Default)]
struct RunSet(BTreeMap<u64, u64>);

impl RunSet {
    /// The end of the run that `cluster` is in, or `None` when it is free.
    fn end_of(&self, cluster: u64) -> Option<u64> {
        let (_, &end) = self.0.range(..=cluster).next_back()?;
        (end > cluster).then_some(end)
    }

    /// Free clusters from `cluster` on, which is free; `u64::MAX` when nothing follows.
    fn free_after(&self, cluster: u64) -> u64 {
        self.0.range(cluster..).next().map_or(u64::MAX, |(&start, _)| start - cluster)
    }

    /// Adds free clusters.
    fn insert(&mut self, run: Run) {
        let (mut start, mut end) = (run.start, run.start + run.clusters);
        if let Some((&before, &before_end)) = self.0.range(..=start).next_back()
            && before_end == start
        {
            self.0.remove(&before);
            start = before;
        }
        if let Some(after_end) = self.0.remove(&end) {
            end = after_end;
        }
        self.0.insert(start, end);
    }

    /// Takes out clusters that are all in one run.
    fn remove(&mut self, run: Run) {
        let (&start, &end) = self.0.range(..=run.start).next_back().expect("the run is in the set");
        self.0.remove(&start);
        if start < run.start {
            self.0.insert(start, run.start);
        }
        if run.start + run.clusters < end {
            self.0.insert(run.start + run.clusters, end);
        }
    }

    /// The end of the last run.
    fn end(&self) -> u64 {
        self.0.last_key_value().map_or(0, |(_, &end)| end)
    }
}

/// What is allocated in a new image, and its refcount structures.
#[derive(Debug)]
pub(super) struct Layout {
    geometry: Geometry,
    used: RunSet,
    /// Where the search for free clusters goes on.
    next_free: u64,
    /// Cluster number of the refcount table.
    table_start: u64,
    /// Its length.
    table_clusters: u64,
    /// Refcount table index → cluster number of the block.
    blocks: BTreeMap<u64, u64>,
    abandoned: Vec<OldTable>,
}

/// A refcount table that was too short. Its clusters are free, or something else now; where they are free
/// the reference leaves the old bytes, and so do we.
#[derive(Debug)]
pub(super) struct OldTable {
    pub(super) table: Run,
    /// What it said: index → cluster number of the block.
    pub(super) blocks: BTreeMap<u64, u64>,
}

/// An allocation step has to be tried again, since it allocated a refcount block on its way.
struct Again;

impl Layout {
    /// Header, refcount table and first refcount block: clusters 0, 1, 2.
    pub(super) fn new(geometry: Geometry) -> Self {
        let mut layout = Self {
            geometry,
            used: RunSet::default(),
            next_free: 0,
            table_start: 1,
            table_clusters: 1,
            blocks: BTreeMap::from([(0, 2)]),
            abandoned: Vec::new(),
        };
        layout.used.insert(Run { start: 0, clusters: 3 });
        layout.next_free = 3;
        layout
    }

    /// Takes `clusters` (not 0) free clusters in a row.
    pub(super) fn allocate(&mut self, clusters: u64) -> Result<u64> {
        loop {
            let start = self.find(clusters);
            if self.count(Run { start, clusters })?.is_ok() {
                return Ok(start);
            }
        }
    }

    /// Takes as many of `clusters` at `start` as are free; the search for free clusters does not move.
    pub(super) fn allocate_at(&mut self, start: u64, clusters: u64) -> Result<u64> {
        loop {
            let free = if self.used.end_of(start).is_some() { 0 } else { self.used.free_after(start) };
            let clusters = clusters.min(free);
            if clusters == 0 || self.count(Run { start, clusters })?.is_ok() {
                return Ok(clusters);
            }
        }
    }

    /// A new refcount table and the blocks it needs behind `start`, which is behind everything in use, with
    /// room for `additional` clusters behind them. Returns the first cluster behind the new structures.
    pub(super) fn refcount_area(&mut self, start: u64, additional: u64, exact: bool) -> Result<u64> {
        self.area(start, additional, exact, None)
    }

    /// The end of the last cluster in use.
    pub(super) fn end(&self) -> u64 {
        self.used.end()
    }

    /// The refcount table: its first cluster and its length.
    pub(super) fn table(&self) -> Run {
        Run { start: self.table_start, clusters: self.table_clusters }
    }

    /// Refcount blocks in order of their index: (index, cluster).
    pub(super) fn blocks(&self) -> impl Iterator<Item = (u64, u64)> {
        self.blocks.iter().map(|(&index, &cluster)| (index, cluster))
    }

    /// Earlier refcount tables, oldest first.
    pub(super) fn abandoned_tables(&self) -> &[OldTable] {
        &self.abandoned
    }

    /// The parts of the refcount block `index` whose counts are one.
    pub(super) fn counted(&self, index: u64) -> impl Iterator<Item = Run> {
        let per_block = self.geometry.refcounts_per_block();
        let (first, last) = (index * per_block, (index + 1) * per_block);
        let reaching_in = self.used.0.range(..first).next_back();
        reaching_in.into_iter().chain(self.used.0.range(first..last)).filter_map(move |(&start, &end)| {
            let (start, end) = (start.max(first), end.min(last));
            (start < end).then(|| Run { start: start - first, clusters: end - start })
        })
    }

    /// The first run of free clusters at or behind the search position, which moves behind it.
    fn find(&mut self, clusters: u64) -> u64 {
        let mut start = self.next_free;
        loop {
            if let Some(end) = self.used.end_of(start) {
                start = end;
                continue;
            }
            let free = self.used.free_after(start);
            if free >= clusters {
                self.next_free = start + clusters;
                return start;
            }
            start += free;
        }
    }

    /// Marks free clusters as used, allocating refcount blocks first where they are missing.
    fn count(&mut self, run: Run) -> Result<Result<(), Again>> {
        let per_block = self.geometry.refcounts_per_block();
        for index in run.start / per_block..=(run.start + run.clusters - 1) / per_block {
            if !self.blocks.contains_key(&index) {
                let first = run.start.max(index * per_block);
                self.allocate_block(index, first)?;
                self.next_free = self.next_free.min(run.start);
                return Ok(Err(Again));
            }
        }
        self.used.insert(run);
        Ok(Ok(()))
    }

    /// Allocates the refcount block `index`, which is missed when counting `cluster`; grows the table where
    /// it is too short.
    fn allocate_block(&mut self, index: u64, cluster: u64) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        let block = self.find(1);
        if block / per_block == index {
            self.used.insert(Run { start: block, clusters: 1 });
        } else {
            // Counted somewhere else, which may in turn need a block; that one counts itself.
            let run = Run { start: block, clusters: 1 };
            if self.count(run)?.is_err() {
                // The caller starts over, with one block more.
                return Ok(());
            }
        }
        if index < self.table_entries() {
            self.blocks.insert(index, block);
            return Ok(());
        }
        let blocks_used = (cluster + 1).max(block).div_ceil(per_block);
        self.area(blocks_used * per_block, 0, false, Some((index, block)))?;
        Ok(())
    }

    fn table_entries(&self) -> u64 {
        self.table_clusters * self.entries_per_cluster()
    }

    fn entries_per_cluster(&self) -> u64 {
        self.geometry.cluster_bytes() / 8
    }

    fn area(&mut self, start: u64, additional: u64, exact: bool, new: Option<(u64, u64)>) -> Result<u64> {
        let per_block = self.geometry.refcounts_per_block();
        let total_blocks = blocks_needed(self.geometry, start + additional, !exact);
        let entries = if exact { total_blocks } else { total_blocks + total_blocks.div_ceil(2) };
        let table_clusters = entries.div_ceil(self.entries_per_cluster());
        if table_clusters * self.geometry.cluster_bytes() > MAX_REFCOUNT_TABLE_BYTES {
            return Err(too_large());
        }
        self.abandoned.push(OldTable { table: self.table(), blocks: self.blocks.clone() });
        self.blocks.extend(new);
        let mut block = start;
        for index in start / per_block..total_blocks {
            self.blocks.entry(index).or_insert_with(|| {
                block += 1;
                block - 1
            });
        }
        let table_start = block;
        let end = table_start + table_clusters;
        self.used.insert(Run { start, clusters: end - start });
        let old = self.table();
        (self.table_start, self.table_clusters) = (table_start, table_clusters);
        self.used.remove(old);
        self.next_free = self.next_free.min(old.start);
        Ok(end)
    }
}

/// Refcount blocks that count `clusters`, themselves, and their table.
pub(super) fn blocks_needed(geometry: Geometry, mut clusters: u64, mut generous: bool) -> u64 {
    let per_table_cluster = geometry.cluster_bytes() / 8;
    let (mut table, mut blocks, mut total) = (0_u64, 0_u64, 0);
    loop {
        let last = total;
        blocks = (clusters + table + blocks).div_ceil(geometry.refcounts_per_block());
        table = blocks.div_ceil(per_table_cluster);
        total = clusters + blocks + table;
        if total == last {
            if !generous {
                return blocks;
            }
            clusters += table.div_ceil(2);
            total = 0;
            generous = false;
        }
    }
}

/// The reference's words for a size that tables cannot describe.
pub(super) fn too_large() -> Error {
    Error::Invalid(
        "The image size is too large for file format 'qcow2' (try using a larger cluster size)".to_owned(),
    )
}
