//! Counts in the file against references that exist, and their repair in place.
//!
//! Repair writes whole blocks, each with counts that are true for every cluster of it. No table changes,
//! so a crash in between leaves an image that is at most as wrong as before. Space is given back only
//! after the counts that free it are durable.

use std::ops::Range;

use super::{
    super::geometry::{refcount_get, refcount_set},
    Mode, Subject,
    blocks::{Block, Blocks, SIXTEEN_BIT_ONES},
    counters::{Counters, LANES, index},
    fault::{Alternate, Teller},
};
use crate::{Result, storage::Flush};

/// Freed ranges that are gathered before their space is given back.
const MAX_FREED: usize = 1 << 16;
/// One in each two-bit lane.
const LANES_OF_ONE: u64 = 0x5555_5555_5555_5555;

/// What a comparison says beside its lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Compared {
    /// The last cluster that is counted or referenced.
    pub(super) highest: u64,
    /// A referenced cluster has no count: the blocks cannot be repaired in place.
    pub(super) must_rebuild: bool,
    /// Counts were changed.
    pub(super) has_written: bool,
}

/// Compares, and repairs what `mode` allows.
pub(super) fn compare(
    subject: &Subject<'_>,
    blocks: &Blocks,
    counters: &Counters,
    mode: Mode,
    teller: &mut Teller<'_>,
) -> Result<Compared> {
    let mut comparison = Comparison {
        subject,
        counters,
        mode,
        teller,
        result: Compared::default(),
        block: vec![0; index(subject.geometry.cluster_bytes())],
        is_changed: false,
        freed: Vec::new(),
    };
    let per_block = subject.geometry.refcounts_per_block();
    let clusters = counters.clusters();
    let mut at = 0;
    while at < clusters {
        let number = at / per_block;
        let range = at..clusters.min((number + 1) * per_block);
        at = range.end;
        match blocks.block(subject, number) {
            Block::Absent => comparison.absent(range),
            Block::At(offset) => comparison.block(offset, range)?,
            Block::Unaligned(offset) => comparison.unknown(Some(offset), number, range),
            Block::Unreadable => comparison.unknown(None, number, range),
        }
    }
    comparison.give_back()?;
    Ok(comparison.result)
}

struct Comparison<'a, 'b, 't> {
    subject: &'a Subject<'a>,
    counters: &'a Counters,
    mode: Mode,
    teller: &'t mut Teller<'b>,
    result: Compared,
    block: Vec<u8>,
    is_changed: bool,
    freed: Vec<Range<u64>>,
}

impl Comparison<'_, '_, '_> {
    /// Clusters without a block: every reference is one too many.
    fn absent(&mut self, clusters: Range<u64>) {
        let mut at = clusters.start;
        loop {
            at = self.counters.next_touched(at, clusters.end);
            if at >= clusters.end {
                return;
            }
            let references = self.counters.get(at);
            if references > 0 {
                self.result.highest = at;
                self.result.must_rebuild = true;
                self.mismatch(at, 0, references);
            }
            at += 1;
        }
    }

    /// Clusters whose block cannot be had.
    fn unknown(&mut self, offset: Option<u64>, number: u64, clusters: Range<u64>) {
        if let Some(offset) = offset {
            let index = Alternate(number);
            let what = format!("Refblock offset {offset:#x} unaligned (reftable index: {index})");
            self.teller.signal_corruption(&what);
        }
        for cluster in clusters {
            self.teller.line(format!("Can't get refcount for cluster {cluster}: Input/output error"));
            self.teller.report.check_errors += 1;
        }
    }

    fn block(&mut self, offset: u64, clusters: Range<u64>) -> Result<()> {
        let geometry = self.subject.geometry;
        if offset < self.subject.file_bytes {
            self.subject.read(&mut self.block, offset)?;
        } else {
            self.block.fill(0);
        }
        self.is_changed = false;
        let start = clusters.start;
        let mut at = start;
        while at < clusters.end {
            if geometry.refcount_order == 4 && at.is_multiple_of(LANES) && at + LANES <= clusters.end {
                let within = index(at - start) * 2;
                let counts = &self.block[within..within + 64];
                match self.counters.lanes(at) {
                    Some(LANES_OF_ONE) if *counts == SIXTEEN_BIT_ONES[..64] => {
                        at += LANES;
                        self.result.highest = at - 1;
                        continue;
                    }
                    Some(0) if counts == [0; 64] => {
                        at += LANES;
                        continue;
                    }
                    _ => {}
                }
            }
            let end = clusters.end.min((at / LANES + 1) * LANES);
            for cluster in at..end {
                self.cluster(cluster, index(cluster - start));
            }
            at = end;
        }
        if self.is_changed {
            self.subject.storage.write_at(&self.block, offset)?;
            self.result.has_written = true;
            if self.freed.len() > MAX_FREED {
                self.give_back()?;
            }
        }
        Ok(())
    }

    fn cluster(&mut self, cluster: u64, entry: usize) {
        let order = self.subject.geometry.refcount_order;
        let count = refcount_get(&self.block, order, entry);
        let references = self.counters.get(cluster);
        if count > 0 || references > 0 {
            self.result.highest = cluster;
        }
        if count == references {
            return;
        }
        if count == 0 {
            self.result.must_rebuild = true;
        } else if count > references && self.mode.leaks {
            self.repair(cluster, entry, count, references);
            self.teller.report.leaks_fixed += 1;
            return;
        } else if count < references && self.mode.errors {
            self.repair(cluster, entry, count, references);
            self.teller.report.corruptions_fixed += 1;
            return;
        }
        self.mismatch(cluster, count, references);
    }

    fn mismatch(&mut self, cluster: u64, count: u64, references: u64) {
        let what = if count < references {
            self.teller.report.corruptions += 1;
            "ERROR"
        } else {
            self.teller.report.leaks += 1;
            "Leaked"
        };
        self.teller.line(format!("{what} cluster {cluster} refcount={count} reference={references}"));
    }

    fn repair(&mut self, cluster: u64, entry: usize, count: u64, references: u64) {
        self.teller.line(format!("Repairing cluster {cluster} refcount={count} reference={references}"));
        refcount_set(&mut self.block, self.subject.geometry.refcount_order, entry, references);
        self.is_changed = true;
        if references == 0 {
            match self.freed.last_mut() {
                Some(last) if last.end == cluster => last.end += 1,
                _ => self.freed.push(cluster..cluster + 1),
            }
        }
    }

    /// Punches what was freed, once its counts are durable.
    fn give_back(&mut self) -> Result<()> {
        if self.result.has_written {
            self.subject.storage.flush(Flush::Data)?;
        }
        let bits = self.subject.geometry.cluster_bits;
        for freed in self.freed.drain(..) {
            let bytes = freed.start << bits..(freed.end << bits).min(self.subject.file_bytes);
            if self.subject.storage.limits().can_punch && !bytes.is_empty() {
                self.subject.storage.punch_hole(bytes)?;
            }
        }
        Ok(())
    }
}
