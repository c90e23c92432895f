//! Reference counts of another width: a whole new structure beside the old one.
//!
//! The new blocks and the table that finds them stand in one run of clusters that the old structure counts as free.
//! They count themselves, and no longer count the old structure. (1) They are written, durable; (2) the header names
//! them and their width, durable; (3) the space of the old structure is given back to the host. Until (2) the image
//! is what it was and the run is free; from then on the old structure's clusters are. No moment has a leak.

use std::{collections::BTreeSet, ops::Range};

use super::{
    create_layout::Run,
    geometry::{Geometry, refcount_get, refcount_set},
    header::MAX_REFCOUNT_TABLE_BYTES,
    layer::Qcow2Layer,
    refcount::usize_of,
};
use crate::{Error, Result, storage::Flush};

impl Qcow2Layer {
    /// Changes the width to 2 to the power of `order` bits. Nothing is written by this layer afterwards.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a count does not fit or the table would be too large.
    pub(super) fn change_refcount_width(&self, order: u32, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        self.check_structures()?;
        self.settle()?;
        let mut state = self.quiet_state();
        let geometry = Geometry { refcount_order: order, ..self.geometry };
        let mut old = self.old_structure()?;
        old.sort_unstable();
        let kept = self.kept_blocks(geometry, &old)?;

        // The run counts itself, which may take more blocks, and these a larger table.
        let per_block = geometry.refcounts_per_block();
        let entries_per_cluster = geometry.cluster_bytes() / 8;
        let (mut clusters, mut table_clusters) = (1, 1);
        let (run, blocks) = loop {
            state.free_index = 0;
            let run = Run { start: self.find_free(&mut state, clusters)?, clusters };
            let mut blocks = kept.clone();
            blocks.extend(run.start / per_block..=(run.start + clusters - 1) / per_block);
            let last = *blocks.last().expect("the run has a block");
            table_clusters = (last + 1).div_ceil(entries_per_cluster).max(table_clusters);
            let needed = blocks.len() as u64 + table_clusters;
            if needed <= clusters {
                break (run, blocks);
            }
            clusters = needed;
        };
        let table_bytes = table_clusters * geometry.cluster_bytes();
        if table_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::unsupported(
                self.path(),
                format_args!(
                    "a refcount table of {table_bytes} bytes (more than {MAX_REFCOUNT_TABLE_BYTES})"
                ),
            ));
        }
        // Where the run had to move it may be longer than needed: the rest is free.
        let run = Run { clusters: blocks.len() as u64 + table_clusters, ..run };
        let bits = geometry.cluster_bits;
        let host = run.start << bits..(run.start + run.clusters) << bits;
        self.check_overlap(&host, None)?;

        // (1)
        let total = blocks.len() as u64;
        let table_offset = host.start + total * geometry.cluster_bytes();
        let mut table = vec![0; usize_of(table_bytes)];
        for (position, &index) in (0..).zip(&blocks) {
            progress(position, total);
            let offset = host.start + position * geometry.cluster_bytes();
            let block = self.converted_block(geometry, index, &old, run)?;
            self.image_file().write_at(&block, offset)?;
            table[usize_of(index) * 8..][..8].copy_from_slice(&offset.to_be_bytes());
        }
        self.image_file().write_at(&table, table_offset)?;
        self.image_file().flush(Flush::Data)?;
        let freed = self.only_in(&old)?;
        // (2)
        self.update_header(|header| {
            header.geometry.refcount_order = order;
            header.refcount_table_offset = table_offset;
            header.refcount_table_clusters = u32::try_from(table_clusters).expect("at most 8 MiB");
        })?;
        self.halt();
        // (3)
        self.punch_clusters(&freed)
    }

    /// Those of the old structure's clusters that nothing else uses, in order.
    fn only_in(&self, old: &[u64]) -> Result<Vec<u64>> {
        let mut clusters = Vec::new();
        for same in old.chunk_by(|one, next| one == next) {
            if self.refcount_of(same[0])? <= same.len() as u64 {
                clusters.push(same[0]);
            }
        }
        Ok(clusters)
    }

    /// Host clusters of the refcount table and of its blocks, one for each reference.
    fn old_structure(&self) -> Result<Vec<u64>> {
        let header = self.header().clone();
        let start = header.refcount_table_offset >> self.geometry.cluster_bits;
        let mut clusters: Vec<u64> = (start..start + u64::from(header.refcount_table_clusters)).collect();
        let bytes = u64::from(header.refcount_table_clusters) * self.geometry.cluster_bytes();
        let table = header.refcount_table_offset..header.refcount_table_offset + bytes;
        self.scan_words(&table, |at, word| {
            clusters.extend(
                self.checked_refcount_block(at, word)?.map(|block| block >> self.geometry.cluster_bits),
            );
            Ok(())
        })?;
        Ok(clusters)
    }

    /// Indices of the new blocks that have something to count beside the new structure.
    fn kept_blocks(&self, geometry: Geometry, old: &[u64]) -> Result<BTreeSet<u64>> {
        let (per_block, max) = (geometry.refcounts_per_block(), geometry.refcount_max());
        let mut blocks = BTreeSet::new();
        let mut too_large = None;
        let covered = self.covered_clusters();
        self.visit_refcounts(0..covered, |clusters, counts| {
            let Some((bytes, first)) = counts else { return true };
            for (at, cluster) in clusters.enumerate() {
                let count = self.new_count(bytes, first + at, cluster, old);
                if count > max {
                    too_large = Some((cluster, count));
                    return false;
                }
                if count > 0 {
                    blocks.insert(cluster / per_block);
                }
            }
            true
        })?;
        match too_large {
            None => Ok(blocks),
            Some((cluster, count)) => Err(Error::Invalid(format!(
                "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has a refcount of \
                 {count}",
                1 << geometry.refcount_order,
                cluster << geometry.cluster_bits
            ))),
        }
    }

    /// What is left of a count when the old structure is gone.
    fn new_count(&self, bytes: &[u8], index: usize, cluster: u64, old: &[u64]) -> u64 {
        let count = refcount_get(bytes, self.geometry.refcount_order, index);
        if count == 0 {
            return 0;
        }
        let first = old.partition_point(|&other| other < cluster);
        let lost = old[first..].iter().take_while(|&&other| other == cluster).count();
        count.saturating_sub(lost as u64)
    }

    /// The bytes of the new block number `block`.
    fn converted_block(&self, geometry: Geometry, block: u64, old: &[u64], run: Run) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize_of(geometry.cluster_bytes())];
        let per_block = geometry.refcounts_per_block();
        let counted = block * per_block..(block + 1) * per_block;
        let order = geometry.refcount_order;
        self.visit_refcounts(counted.clone(), |clusters, counts| {
            let Some((source, first)) = counts else { return true };
            for (at, cluster) in clusters.enumerate() {
                let count = self.new_count(source, first + at, cluster, old);
                if count > 0 {
                    refcount_set(&mut bytes, order, usize_of(cluster - counted.start), count);
                }
            }
            true
        })?;
        for cluster in run.start.max(counted.start)..(run.start + run.clusters).min(counted.end) {
            refcount_set(&mut bytes, order, usize_of(cluster - counted.start), 1);
        }
        Ok(bytes)
    }

    /// Gives the host space of clusters back, which are in order.
    fn punch_clusters(&self, clusters: &[u64]) -> Result<()> {
        let file = self.image_file();
        if !self.runtime.discard_other || !file.limits().can_punch {
            return Ok(());
        }
        let (bits, file_end) = (self.geometry.cluster_bits, file.len_bytes()?);
        for run in clusters.chunk_by(|one, next| one + 1 == *next) {
            let host: Range<u64> = run[0] << bits..((run[0] + run.len() as u64) << bits).min(file_end);
            if !host.is_empty() {
                file.punch_hole(host)?;
            }
        }
        Ok(())
    }
}
