//! Where everything stands in an image that is written front to back.
//!
//! ```text
//! header, refcount table, L1 table, refcount blocks of what is full by now
//! L2 table, its clusters; L2 table, its clusters; …
//! ```
//! Host space falls into spans, each counted by one refcount block. The block of a span stands in its last
//! cluster, when all its counts are known, so that one block is all that is kept; the last one stands behind the
//! last cluster in use. Compressed clusters are packed, but never across a block. The same steps are taken twice,
//! first without a pipe to learn where the tables will stand.

use super::{
    create_layout::too_large,
    geometry::{Geometry, refcount_get, refcount_set},
    header::MAX_REFCOUNT_TABLE_BYTES,
};
use crate::{Result, storage::Pipe};

/// The part in front of all data.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    /// Clusters of the refcount table, which is the second cluster.
    pub(super) table_clusters: u64,
    /// Refcount blocks behind the L1 table.
    pub(super) blocks: u64,
    /// Where they begin, in clusters.
    pub(super) blocks_at: u64,
    /// Clusters of all.
    pub(super) clusters: u64,
}

impl Head {
    /// For a disk of so many clusters and L1 entries.
    ///
    /// # Errors
    /// When its refcount table would be larger than the format allows.
    pub(super) fn new(geometry: Geometry, guest_clusters: u64, l1_entries: u64) -> Result<Self> {
        let span = geometry.refcounts_per_block();
        let l1_clusters = geometry.clusters_for(l1_entries * 8);
        // Each cluster of the disk and each table takes at most one, and may leave the rest of one unused.
        let most = 2 * (guest_clusters + l1_entries) + l1_clusters + 2;
        let mut head = Self { table_clusters: 1, blocks: 0, blocks_at: 0, clusters: 0 };
        loop {
            head.blocks_at = 1 + head.table_clusters + l1_clusters;
            head.clusters = head.blocks_at + head.blocks;
            let table_clusters =
                geometry.clusters_for(8 * ((most + head.clusters).div_ceil(span - 2) + 1)).max(1);
            let blocks = head.clusters / span;
            if table_clusters * geometry.cluster_bytes() > MAX_REFCOUNT_TABLE_BYTES {
                return Err(too_large());
            }
            if (table_clusters, blocks) == (head.table_clusters, head.blocks) {
                return Ok(head);
            }
            // Both only grow with each other, and the table is bounded.
            head.table_clusters = table_clusters.max(head.table_clusters);
            head.blocks = blocks.max(head.blocks);
        }
    }
}

/// The place that is given out next, and the counts of its span.
#[derive(Clone, Debug)]
pub(super) struct Places {
    geometry: Geometry,
    next: u64,
    span: u64,
    counts: Vec<u8>,
}

impl Places {
    /// Behind the head.
    pub(super) fn behind(head: &Head, geometry: Geometry) -> Self {
        let counts = vec![0; usize::try_from(geometry.cluster_bytes()).expect("at most 2 MiB")];
        let span = head.clusters / geometry.refcounts_per_block();
        let mut places = Self { geometry, next: head.clusters << geometry.cluster_bits, span, counts };
        for cluster in span * geometry.refcounts_per_block()..head.clusters {
            places.add(cluster);
        }
        places
    }

    /// Takes a whole cluster.
    pub(super) fn cluster(&mut self, mut pipe: Option<&mut Pipe>) -> Result<u64> {
        self.align();
        if self.next == self.block_at() {
            self.end_span(pipe.as_deref_mut())?;
        }
        let at = self.next;
        self.add(at >> self.geometry.cluster_bits);
        self.next += self.geometry.cluster_bytes();
        advance(pipe, at)?;
        Ok(at)
    }

    /// Takes so many bytes, less than a cluster, for a compressed one.
    pub(super) fn compressed(&mut self, stored_bytes: u32, mut pipe: Option<&mut Pipe>) -> Result<u64> {
        let bits = self.geometry.cluster_bits;
        loop {
            let (at, end) = (self.next, self.next + u64::from(stored_bytes));
            let clusters = at >> bits..=(end - 1) >> bits;
            if *clusters.end() >= self.block_at() >> bits {
                self.end_span(pipe.as_deref_mut())?;
            } else if self.count(*clusters.start()) == self.geometry.refcount_max() {
                self.next += 1;
                self.align();
            } else {
                clusters.for_each(|cluster| self.add(cluster));
                self.next = end;
                advance(pipe, at)?;
                return Ok(at);
            }
        }
    }

    /// The block of the last span, behind everything, and how many spans there are. Nothing is given out after it.
    pub(super) fn end(&mut self, pipe: Option<&mut Pipe>) -> Result<LastSpan> {
        self.align();
        let is_empty = self.next == self.span_start();
        let block_at = self.next;
        if !is_empty {
            self.put_block(block_at, pipe)?;
        }
        Ok(LastSpan { block_at, spans: self.span + u64::from(!is_empty) })
    }

    /// Where the block of a span stands that is followed by others.
    pub(super) fn block_of(geometry: Geometry, span: u64) -> u64 {
        ((span + 1) * geometry.refcounts_per_block() - 1) << geometry.cluster_bits
    }

    fn block_at(&self) -> u64 {
        Self::block_of(self.geometry, self.span)
    }

    fn span_start(&self) -> u64 {
        (self.span * self.geometry.refcounts_per_block()) << self.geometry.cluster_bits
    }

    fn end_span(&mut self, pipe: Option<&mut Pipe>) -> Result<()> {
        let at = self.block_at();
        self.put_block(at, pipe)?;
        self.span += 1;
        self.next = at + self.geometry.cluster_bytes();
        self.counts.fill(0);
        Ok(())
    }

    fn put_block(&mut self, at: u64, pipe: Option<&mut Pipe>) -> Result<()> {
        self.add(at >> self.geometry.cluster_bits);
        if let Some(pipe) = pipe {
            pipe.pad_to(at)?;
            pipe.put(&self.counts)?;
        }
        Ok(())
    }

    fn align(&mut self) {
        // Host offsets stay below 2^56: the refcount table is bounded.
        self.next = self.next.next_multiple_of(self.geometry.cluster_bytes());
    }

    fn index(&self, cluster: u64) -> usize {
        usize::try_from(cluster % self.geometry.refcounts_per_block()).expect("at most 2^24 counts")
    }

    fn count(&self, cluster: u64) -> u64 {
        refcount_get(&self.counts, self.geometry.refcount_order, self.index(cluster))
    }

    fn add(&mut self, cluster: u64) {
        let (index, count) = (self.index(cluster), self.count(cluster));
        refcount_set(&mut self.counts, self.geometry.refcount_order, index, count + 1);
    }
}

/// See [`Places::end`].
#[derive(Clone, Copy, Debug)]
pub(super) struct LastSpan {
    pub(super) block_at: u64,
    pub(super) spans: u64,
}

fn advance(pipe: Option<&mut Pipe>, at: u64) -> Result<()> {
    pipe.map_or(Ok(()), |pipe| pipe.pad_to(at))
}
