//! Where a repair must not write: the image's own structures, by their pointers and not by their counts.

use std::ops::Range;

use super::{super::header::MAX_L1_BYTES, Image, blocks::Block, counters::Counters};

/// Host ranges that are metadata.
pub(super) struct Guard {
    /// Sorted by start, merged.
    ranges: Vec<Range<u64>>,
    cluster_bits: u32,
}

impl Guard {
    /// The header, tables, blocks and directories of an image. L2 tables are left to the counts: those
    /// rewritten by a repair are rewritten in place.
    pub(super) fn new(image: &Image<'_>) -> Self {
        let subject = &image.subject;
        let mut guard = Self { ranges: Vec::new(), cluster_bits: subject.geometry.cluster_bits };
        let mut regions = vec![
            (0, subject.geometry.cluster_bytes()),
            (image.header.l1_offset, u64::from(image.header.l1_entries) * 8),
            (image.blocks.table_offset, image.blocks.entries.len() as u64 * 8),
            (image.snapshots.offset, image.snapshots.table_bytes),
        ];
        let snapshots = image.snapshots.list.iter().filter(|snapshot| {
            subject.geometry.in_cluster(snapshot.l1_offset) == 0
                && u64::from(snapshot.l1_entries) * 8 <= MAX_L1_BYTES
        });
        regions.extend(snapshots.map(|snapshot| (snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8)));
        if let Some(bitmaps) = image.header.bitmaps {
            regions.push((bitmaps.directory_offset, bitmaps.directory_bytes));
        }
        for number in 0..image.blocks.entries.len() as u64 {
            if let Block::At(offset) = image.blocks.block(subject, number) {
                regions.push((offset, subject.geometry.cluster_bytes()));
            }
        }
        guard.add(&regions);
        guard
    }

    /// Guards more regions, given as offset and length.
    pub(super) fn add(&mut self, regions: &[(u64, u64)]) {
        let cluster = 1 << self.cluster_bits;
        self.ranges.extend(regions.iter().filter(|(_, bytes)| *bytes > 0).map(|(offset, bytes)| {
            let end = offset.saturating_add(*bytes);
            offset & !(cluster - 1)..end.checked_next_multiple_of(cluster).unwrap_or(u64::MAX)
        }));
        self.ranges.sort_unstable_by_key(|range| range.start);
        self.ranges.dedup_by(|next, kept| {
            let touches = next.start <= kept.end;
            if touches {
                kept.end = kept.end.max(next.end);
            }
            touches
        });
    }

    /// Whether a range touches something guarded.
    pub(super) fn overlaps(&self, range: Range<u64>) -> bool {
        let after = self.ranges.partition_point(|known| known.end <= range.start);
        self.ranges.get(after).is_some_and(|known| known.start < range.end)
    }

    /// The first cluster behind what guards `cluster`, if anything does.
    pub(super) fn cluster_behind(&self, cluster: u64) -> Option<u64> {
        let at = cluster << self.cluster_bits;
        let after = self.ranges.partition_point(|known| known.end <= at);
        let known = self.ranges.get(after).filter(|known| known.start <= at)?;
        Some((known.end >> self.cluster_bits).max(cluster + 1))
    }

    /// Whether a cluster may be taken: nothing refers to it, and no structure is known to be there.
    pub(super) fn is_free(&self, counters: &Counters, cluster: u64) -> bool {
        let start = cluster << self.cluster_bits;
        counters.get(cluster) == 0 && !self.overlaps(start..start + (1 << self.cluster_bits))
    }
}
