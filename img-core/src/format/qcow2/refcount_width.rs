//! Reference counts of another width: a whole new structure beside the old one.
//!
//! The new blocks and the table that finds them stand in one run of clusters that the old structure counts as free.
//! They count themselves, and no longer count the old structure. (1) They are written, durable; (2) the header names
//! them and their width, durable; (3) the space of the old structure is given back to the host. Until (2) the image
//! is what it was and the run is free; from then on the old structure's clusters are. No moment has a leak.

use std::{collections::BTreeSet, ops::Range};

use super::{
    counts::{read_counts, write_counts},
    create_layout::Run,
    geometry::Geometry,
    header::MAX_REFCOUNT_TABLE_BYTES,
    layer::Qcow2Layer,
    refcount::usize_of,
};
use crate::{Error, Result, storage::Flush};

/// Counts that are looked at together, at most; as all tables have a power of two of them, no part crosses a block.
const PART_COUNTS: u64 = 4096;
/// New blocks are written together up to this size.
const WRITE_BYTES: u64 = 1 << 20;

/// The counts as they are in the file, less those of their own structure.
struct OldCounts<'a> {
    layer: &'a Qcow2Layer,
    /// Host offsets of the blocks, by index; 0 where there is none.
    blocks: Vec<u64>,
    /// Host clusters of the refcount table and of its blocks, one for each reference, in order.
    structure: Vec<u64>,
    /// The block that was read last, and its index.
    held: (Vec<u8>, Option<u64>),
}

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
        let mut old = OldCounts::new(self)?;
        let kept = old.kept_blocks(geometry)?;

        // The run counts itself, which may take more blocks, and these a larger table.
        let per_block = geometry.refcounts_per_block();
        let entries_per_cluster = geometry.cluster_bytes() / 8;
        let (mut clusters, mut table_clusters) = (1, 1);
        state.free_index = 0;
        let (run, blocks) = loop {
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
            state.free_index = run.start; // before it there is no room for fewer
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
        let (total, cluster) = (blocks.len() as u64, geometry.cluster_bytes());
        let table_offset = host.start + total * cluster;
        let mut table = vec![0; usize_of(table_bytes)];
        self.image_file().will_write(host.clone());
        let together = WRITE_BYTES.div_ceil(cluster);
        let mut bytes = vec![0; usize_of(together.min(total) * cluster)];
        for (position, &index) in (0..).zip(&blocks) {
            progress(position, total);
            let within = position % together;
            let (from, to) = (usize_of(within * cluster), usize_of((within + 1) * cluster));
            old.convert(geometry, index, run, &mut bytes[from..to])?;
            let offset = host.start + position * cluster;
            table[usize_of(index) * 8..][..8].copy_from_slice(&offset.to_be_bytes());
            if within + 1 == together || position + 1 == total {
                self.image_file().write_at(&bytes[..to], offset - within * cluster)?;
            }
        }
        self.image_file().write_at(&table, table_offset)?;
        self.image_file().flush(Flush::Data)?;
        let freed = self.only_in(&old.structure)?;
        // (2)
        self.update_header(|header| {
            header.geometry.refcount_order = order;
            header.refcount_table_offset = table_offset;
            header.refcount_table_clusters = u32::try_from(table_clusters).expect("at most 8 MiB");
        })?;
        self.halt.halt(|| "its reference counts have another width".to_owned());
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

impl<'a> OldCounts<'a> {
    /// Those of `layer`, of which nothing waits to be written.
    fn new(layer: &'a Qcow2Layer) -> Result<Self> {
        let header = layer.header().clone();
        let bits = layer.geometry.cluster_bits;
        let start = header.refcount_table_offset >> bits;
        let mut structure: Vec<u64> = (start..start + u64::from(header.refcount_table_clusters)).collect();
        let bytes = u64::from(header.refcount_table_clusters) * layer.geometry.cluster_bytes();
        let table = header.refcount_table_offset..header.refcount_table_offset + bytes;
        let mut blocks = Vec::new();
        layer.scan_words(&table, |at, word| {
            if let Some(block) = layer.checked_refcount_block(at, word)? {
                blocks.resize(usize_of((at - table.start) / 8), 0); // at most 2^20 of them
                blocks.push(block);
                structure.push(block >> bits);
            }
            Ok(())
        })?;
        structure.sort_unstable();
        Ok(Self { layer, blocks, structure, held: (Vec::new(), None) })
    }

    /// How many counts are looked at together when they become those of `geometry`.
    fn part_counts(&self, geometry: Geometry) -> u64 {
        PART_COUNTS.min(geometry.refcounts_per_block()).min(self.layer.geometry.refcounts_per_block())
    }

    /// Fills `counts`, a part, from cluster `first` on; false where all are 0 as no block counts them.
    fn read(&mut self, first: u64, counts: &mut [u64]) -> Result<bool> {
        let geometry = self.layer.geometry;
        let index = first / geometry.refcounts_per_block();
        let Some(&block) = self.blocks.get(usize_of(index)).filter(|block| **block != 0) else {
            return Ok(false);
        };
        let (bytes, held) = &mut self.held;
        if *held != Some(index) {
            bytes.resize(usize_of(geometry.cluster_bytes()), 0);
            *held = None;
            self.layer.image_file().read_at(bytes, block)?;
            *held = Some(index);
        }
        let within = usize_of(first % geometry.refcounts_per_block());
        read_counts(bytes, geometry.refcount_order, within, counts);
        let end = first + counts.len() as u64;
        let own = self.structure.partition_point(|&cluster| cluster < first);
        for &cluster in self.structure[own..].iter().take_while(|&&cluster| cluster < end) {
            let count = &mut counts[usize_of(cluster - first)];
            *count = count.saturating_sub(1);
        }
        Ok(true)
    }

    /// Indices of the blocks of `geometry` that have something to count beside the new structure.
    fn kept_blocks(&mut self, geometry: Geometry) -> Result<BTreeSet<u64>> {
        let mut counts = vec![0; usize_of(self.part_counts(geometry))];
        let per_block = self.layer.geometry.refcounts_per_block();
        let mut kept = BTreeSet::new();
        for block in 0..self.blocks.len() as u64 {
            for first in (block * per_block..(block + 1) * per_block).step_by(counts.len()) {
                if !self.read(first, &mut counts)? {
                    break;
                }
                if counts.iter().any(|count| *count > geometry.refcount_max()) {
                    return Err(self.too_large(geometry, first, &counts));
                }
                if counts.iter().any(|count| *count > 0) {
                    kept.insert(first / geometry.refcounts_per_block());
                }
            }
        }
        Ok(kept)
    }

    /// Says of the first of `counts` that does not fit that it does not.
    fn too_large(&self, geometry: Geometry, first: u64, counts: &[u64]) -> Error {
        let found = (first..).zip(counts).find(|(_, count)| **count > geometry.refcount_max());
        let (cluster, count) = found.expect("the caller found one");
        Error::Invalid(format!(
            "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has a refcount of {count}",
            1 << geometry.refcount_order,
            cluster << geometry.cluster_bits
        ))
    }

    /// Makes `bytes` the block number `index` of `geometry`, which counts the clusters of `run`, too.
    fn convert(&mut self, geometry: Geometry, index: u64, run: Run, bytes: &mut [u8]) -> Result<()> {
        let mut counts = vec![0; usize_of(self.part_counts(geometry))];
        let (per_block, order) = (geometry.refcounts_per_block(), geometry.refcount_order);
        for within in (0..per_block).step_by(counts.len()) {
            let first = index * per_block + within;
            if !self.read(first, &mut counts)? {
                counts.fill(0);
            }
            let end = first + counts.len() as u64;
            for cluster in run.start.max(first)..(run.start + run.clusters).min(end) {
                counts[usize_of(cluster - first)] = 1;
            }
            write_counts(bytes, order, usize_of(within), &counts);
        }
        Ok(())
    }
}
