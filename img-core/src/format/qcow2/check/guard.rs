//! Where a repair must not write: the image's own structures, by their pointers and not by their counts.

use std::ops::Range;

use super::{
    super::header::MAX_L1_BYTES, Image, Subject, blocks::Block, counters::Counters, fault::Teller,
    snapshots::Snapshot,
};
use crate::Result;

/// Host ranges that are metadata.
pub(super) struct Guard {
    /// Sorted by start, merged.
    ranges: Vec<Range<u64>>,
    /// As they are, with the reference's names, in the order in which it looks at them.
    named: Vec<(Range<u64>, &'static str)>,
    cluster_bits: u32,
}

impl Guard {
    /// The header, tables, blocks and directories of an image. L2 tables are left to the counts: those
    /// rewritten by a repair are rewritten in place.
    pub(super) fn new(image: &Image<'_>) -> Self {
        let subject = &image.subject;
        let cluster = subject.geometry.cluster_bytes();
        let mut regions = vec![
            (0, cluster, "qcow2_header"),
            (image.header.l1_offset, u64::from(image.header.l1_entries) * 8, "active L1 table"),
            (image.blocks.table_offset, image.blocks.entries.len() as u64 * 8, "refcount table"),
            (image.snapshots.offset, image.snapshots.table_bytes, "snapshot table"),
        ];
        // Those that the walk follows: others would guard what no file has.
        let snapshots = image.snapshots.list.iter().filter(|snapshot| {
            subject.geometry.in_cluster(snapshot.l1_offset) == 0
                && u64::from(snapshot.l1_entries) * 8 <= MAX_L1_BYTES
        });
        let inactive = |snapshot: &Snapshot| {
            (snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8, "inactive L1 table")
        };
        regions.extend(snapshots.map(inactive));
        for number in 0..image.blocks.entries.len() as u64 {
            if let Block::At(offset) = image.blocks.block(subject, number) {
                regions.push((offset, cluster, "refcount block"));
            }
        }
        if let Some(bitmaps) = image.header.bitmaps {
            regions.push((bitmaps.directory_offset, bitmaps.directory_bytes, "bitmap directory"));
        }
        let mut guard =
            Self { ranges: Vec::new(), named: Vec::new(), cluster_bits: subject.geometry.cluster_bits };
        let plain: Vec<(u64, u64)> = regions.iter().map(|(offset, bytes, _)| (*offset, *bytes)).collect();
        guard.add(&plain);
        let named = regions.into_iter().filter(|(_, bytes, _)| *bytes > 0);
        guard.named =
            named.map(|(offset, bytes, name)| (guard.whole_clusters(offset, bytes), name)).collect();
        guard
    }

    fn whole_clusters(&self, offset: u64, bytes: u64) -> Range<u64> {
        let cluster = 1 << self.cluster_bits;
        let end = offset.saturating_add(bytes).checked_next_multiple_of(cluster);
        offset & !(cluster - 1)..end.unwrap_or(u64::MAX)
    }

    /// Checks that a range may be written.
    ///
    /// # Errors
    /// `EIO`, after the corruption was told.
    pub(super) fn permit(
        &self,
        range: Range<u64>,
        subject: &Subject<'_>,
        teller: &mut Teller<'_>,
    ) -> Result<()> {
        if !self.overlaps(range.clone()) {
            return Ok(());
        }
        let hit = self.named.iter().find(|(known, _)| known.start < range.end && range.start < known.end);
        let name = hit.map_or("something behind the end of the file", |(_, name)| name);
        teller.signal_corruption(&format!("Preventing invalid write on metadata (overlaps with {name})"));
        Err(subject.failure(rustix::io::Errno::IO))
    }

    /// Guards more regions, given as offset and length.
    pub(super) fn add(&mut self, regions: &[(u64, u64)]) {
        let wanted = regions.iter().filter(|(_, bytes)| *bytes > 0);
        let ranges: Vec<_> = wanted.map(|(offset, bytes)| self.whole_clusters(*offset, *bytes)).collect();
        self.ranges.extend(ranges);
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
