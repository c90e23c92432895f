//! Reference counts as they stand in the file: the refcount table and its blocks.
//!
//! Spec: "Refcount table entry", "Refcount block entry".

use std::{ops::Range, thread};

use super::{
    super::{entry::REFCOUNT_TABLE_RESERVED, geometry::refcount_get},
    Subject,
    counters::index,
};
use crate::Result;

/// Clusters that one piece of [`Singles`] covers.
const PIECE_CLUSTERS: u64 = 4096;
/// Clusters below which a second thread does not pay.
const PARALLEL_CLUSTERS: u64 = 1 << 18;

/// Where a refcount block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// Nowhere: all its counts are 0.
    Absent,
    /// At an offset that no block can have.
    Unaligned(u64),
    /// Too far away for any file.
    Unreadable,
    /// Here, perhaps behind the end of the file, where counts read as 0.
    At(u64),
}

/// The refcount table, read into memory (8 MiB at most: the header is checked).
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    /// Host offset of the table.
    pub(super) table_offset: u64,
    /// Its entries, reserved bits included.
    pub(super) entries: Vec<u64>,
}

impl Blocks {
    /// Reads the table.
    pub(super) fn read(subject: &Subject<'_>, table_offset: u64, table_bytes: u64) -> Result<Self> {
        let mut bytes = vec![0; index(table_bytes)];
        subject.read(&mut bytes, table_offset)?;
        let entries = bytes
            .chunks_exact(8)
            .map(|entry| u64::from_be_bytes(entry.try_into().expect("eight bytes")))
            .collect();
        Ok(Self { table_offset, entries })
    }

    /// Where block `number` is.
    pub(super) fn block(&self, subject: &Subject<'_>, number: u64) -> Block {
        let entry = usize::try_from(number).ok().and_then(|number| self.entries.get(number));
        let offset = entry.map_or(0, |entry| entry & !REFCOUNT_TABLE_RESERVED);
        if offset == 0 {
            Block::Absent
        } else if subject.geometry.in_cluster(offset) != 0 {
            Block::Unaligned(offset)
        } else if offset > i64::MAX.unsigned_abs() - subject.geometry.cluster_bytes() {
            Block::Unreadable
        } else {
            Block::At(offset)
        }
    }

    /// Whether every block that counts clusters of the file can be read.
    pub(super) fn are_readable(&self, subject: &Subject<'_>) -> bool {
        let blocks = subject.clusters().div_ceil(subject.geometry.refcounts_per_block());
        let known = blocks.min(self.entries.len() as u64);
        (0..known).all(|number| matches!(self.block(subject, number), Block::Absent | Block::At(_)))
    }
}

/// Looks up single counts, keeping the last block.
pub(super) struct Lookup<'a> {
    subject: &'a Subject<'a>,
    blocks: &'a Blocks,
    held: Option<u64>,
    bytes: Vec<u8>,
}

impl<'a> Lookup<'a> {
    pub(super) fn new(subject: &'a Subject<'a>, blocks: &'a Blocks) -> Self {
        Self { subject, blocks, held: None, bytes: vec![0; index(subject.geometry.cluster_bytes())] }
    }

    /// The count of a cluster, `None` where the block cannot be had.
    pub(super) fn get(&mut self, cluster: u64) -> Result<Option<u64>> {
        let per_block = self.subject.geometry.refcounts_per_block();
        let offset = match self.blocks.block(self.subject, cluster / per_block) {
            Block::Absent => return Ok(Some(0)),
            Block::Unaligned(_) | Block::Unreadable => return Ok(None),
            Block::At(offset) => offset,
        };
        if self.held != Some(offset) {
            self.held = None;
            self.subject.read(&mut self.bytes, offset)?;
            self.held = Some(offset);
        }
        let order = self.subject.geometry.refcount_order;
        Ok(Some(refcount_get(&self.bytes, order, index(cluster % per_block))))
    }
}

/// Which clusters have a count of exactly one in the file: all that the copied flags depend on.
pub(super) struct Singles {
    pieces: Vec<Option<Box<[u64; 64]>>>,
    clusters: u64,
}

impl Singles {
    /// Reads all blocks that count clusters of the file; all are readable.
    pub(super) fn read(subject: &Subject<'_>, blocks: &Blocks) -> Result<Self> {
        let clusters = subject.clusters();
        let mut pieces = Vec::new();
        pieces.resize_with(index(clusters.div_ceil(PIECE_CLUSTERS)), || None);
        let workers = if clusters < PARALLEL_CLUSTERS { 1 } else { subject.workers() as u64 };
        // Whole blocks and whole pieces to each worker; both are powers of two.
        let unit = PIECE_CLUSTERS.max(subject.geometry.refcounts_per_block());
        let share = clusters.div_ceil(workers).next_multiple_of(unit);
        let results: Vec<Result<()>> = thread::scope(|scope| {
            let started: Vec<_> = pieces
                .chunks_mut(index(share / PIECE_CLUSTERS).max(1))
                .enumerate()
                .map(|(part, pieces)| {
                    let start = part as u64 * share;
                    let range = start..clusters.min(start + share);
                    scope.spawn(move || fill(subject, blocks, range, pieces))
                })
                .collect();
            started.into_iter().map(|worker| worker.join().expect("the worker does not panic")).collect()
        });
        results.into_iter().collect::<Result<()>>()?;
        Ok(Self { pieces, clusters })
    }

    /// Whether a cluster's count is one; `None` past the clusters of the file.
    pub(super) fn get(&self, cluster: u64) -> Option<bool> {
        (cluster < self.clusters).then(|| self.word(cluster) >> (cluster % 64) & 1 == 1)
    }

    /// Whether all clusters of a range, which lies inside the file, answer `expected`.
    pub(super) fn all(&self, clusters: Range<u64>, expected: bool) -> bool {
        let mut at = clusters.start;
        while at < clusters.end {
            let end = clusters.end.min((at / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (end - at))) << (at % 64);
            let found = self.word(at) & mask;
            if found != if expected { mask } else { 0 } {
                return false;
            }
            at = end;
        }
        true
    }

    fn word(&self, cluster: u64) -> u64 {
        let piece = self.pieces[index(cluster / PIECE_CLUSTERS)].as_ref();
        piece.map_or(0, |words| words[index(cluster % PIECE_CLUSTERS / 64)])
    }
}

/// Fills the pieces of a range of clusters.
fn fill(
    subject: &Subject<'_>,
    blocks: &Blocks,
    range: Range<u64>,
    pieces: &mut [Option<Box<[u64; 64]>>],
) -> Result<()> {
    let geometry = subject.geometry;
    let per_block = geometry.refcounts_per_block();
    let mut bytes = vec![0; index(geometry.cluster_bytes())];
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min((at / per_block + 1) * per_block);
        if let Block::At(offset) = blocks.block(subject, at / per_block)
            && offset < subject.file_bytes
        {
            subject.read(&mut bytes, offset)?;
            for first in (at..end).step_by(64) {
                let count = (end - first).min(64);
                let word = singles(&bytes, geometry.refcount_order, index(first % per_block), index(count));
                if word != 0 {
                    let within = first - range.start;
                    let piece = &mut pieces[index(within / PIECE_CLUSTERS)];
                    let piece = piece.get_or_insert_with(|| Box::new([0; 64]));
                    piece[index(within % PIECE_CLUSTERS / 64)] |= word << (first % 64);
                }
            }
        }
        at = end;
    }
    Ok(())
}

/// A bit for each of `count` (at most 64) counts from entry `first` on: whether it is one.
fn singles(block: &[u8], order: u32, first: usize, count: usize) -> u64 {
    if order == 4 && count == 64 {
        let run = &block[first * 2..first * 2 + 128];
        if run == SIXTEEN_BIT_ONES {
            return u64::MAX;
        }
        if run == [0; 128] {
            return 0;
        }
    }
    (0..count).fold(0, |word, bit| word | u64::from(refcount_get(block, order, first + bit) == 1) << bit)
}

/// 64 sixteen-bit counts of one.
pub(super) const SIXTEEN_BIT_ONES: [u8; 128] = {
    let mut bytes = [0; 128];
    let mut at = 1;
    while at < 128 {
        bytes[at] = 1;
        at += 2;
    }
    bytes
};
