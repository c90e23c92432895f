//! The guest memory of a load: rings, headers and data of each queue, in a file that the device maps too.

use std::{fs::File, sync::Arc};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    io::Errno,
};
use vm_memory::{Address as _, FileOffset, GuestAddress};

use super::MOST_DESCRIPTORS;
use crate::{
    bench::{job::Job, run::BenchError},
    virtio::{
        Features, GuestRam,
        config::{MAX_SEGMENTS, RawConfig},
        ring::RingLayout,
    },
};

/// A page: data begins at one.
const PAGE_BYTES: u64 = 4096;

/// Where the status byte of a request is, behind its header of 16 bytes.
const STATUS_AT: u64 = 16;
/// Where the one range of a discard is (5.2.6).
const RANGE_AT: u64 = 32;
/// Where its indirect table is.
const TABLE_AT: u64 = 48;

/// How a queue is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueuePlan {
    /// Of the ring.
    pub(super) descriptors: u16,
    /// Of the longest chain.
    pub(super) per_request: u16,
    /// Whether chains are in tables of their own.
    pub(super) indirect: bool,
    /// Bytes of a data segment, but for the last one.
    pub(super) segment_bytes: u64,
    /// Bytes of what a request has besides its data.
    control_bytes: u64,
    block_bytes: u64,
    depth: u64,
}

/// The places of one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotPlaces {
    pub(super) header: GuestAddress,
    pub(super) status: GuestAddress,
    pub(super) range: GuestAddress,
    pub(super) table: GuestAddress,
    pub(super) data: GuestAddress,
}

/// Bytes of a segment, and segments of a request, that the device takes.
fn limits(features: Features, config: &RawConfig) -> (u64, u64) {
    // 0 is what qemu-storage-daemon says for a size without limit.
    let segment_bytes = match config.size_max_bytes.get() {
        most if most > 0 && features.has(Features::SIZE_MAX) => most,
        _ => u32::MAX / 4096 * 4096,
    };
    let segments = if features.has(Features::SEG_MAX) { config.seg_max.get() } else { 1 };
    // More would be of no use: blocks are contiguous in memory.
    (segment_bytes.into(), segments.clamp(1, MAX_SEGMENTS).into())
}

/// The most bytes of a request.
pub(super) fn most_block_bytes(features: Features, config: &RawConfig) -> u64 {
    let (segment_bytes, segments) = limits(features, config);
    segment_bytes * segments
}

impl QueuePlan {
    /// The queues for `job`.
    ///
    /// # Errors
    /// [`BenchError::Job`] when its requests are more, or longer, than the device takes.
    pub(super) fn new(job: &Job, features: Features, config: &RawConfig) -> Result<Self, BenchError> {
        let refuse = |why: String| BenchError::Job(why);
        let (segment_bytes, most_segments) = limits(features, config);
        let segments = job.block_bytes.div_ceil(segment_bytes);
        if segments > most_segments {
            return Err(refuse(format!(
                "blocks of {} bytes, and the device takes {most_segments} segments of {segment_bytes}",
                job.block_bytes
            )));
        }
        let per_request = u16::try_from(segments + 2).expect("at most MAX_SEGMENTS");
        let indirect = features.has(Features::INDIRECT_DESC);
        let of_ring = if indirect { 1 } else { u32::from(per_request) };
        // A chain must not be longer than its queue, indirect or not (2.7.5.3.1).
        let needed = job.depth.saturating_mul(of_ring).max(per_request.into());
        let descriptors = u16::try_from(needed)
            .ok()
            .and_then(u16::checked_next_power_of_two)
            .filter(|count| *count <= MOST_DESCRIPTORS)
            .ok_or_else(|| {
                refuse(format!(
                    "depth {} needs a queue of {needed} descriptors, and {MOST_DESCRIPTORS} are the most",
                    job.depth
                ))
            })?;
        Ok(Self {
            descriptors,
            per_request,
            indirect,
            segment_bytes,
            control_bytes: (TABLE_AT + 16 * u64::from(per_request)).next_multiple_of(64),
            block_bytes: job.block_bytes,
            depth: job.depth.into(),
        })
    }

    /// Where the rings of queue `number` are.
    pub(super) fn rings(&self, number: u32) -> RingLayout {
        RingLayout::packed_at(GuestAddress(u64::from(number) * self.queue_bytes()), self.descriptors)
    }

    /// Where request `slot` of queue `number` is.
    pub(super) fn places(&self, number: u32, slot: u64) -> SlotPlaces {
        let control = self.rings(number).end().0.next_multiple_of(64);
        let at = GuestAddress(control + slot * self.control_bytes);
        let data = (control + self.depth * self.control_bytes).next_multiple_of(PAGE_BYTES);
        SlotPlaces {
            header: at,
            status: at.unchecked_add(STATUS_AT),
            range: at.unchecked_add(RANGE_AT),
            table: at.unchecked_add(TABLE_AT),
            data: GuestAddress(data + slot * self.block_bytes.next_multiple_of(PAGE_BYTES)),
        }
    }

    /// Memory of one queue: at most 2^10 requests of 2^37 bytes.
    fn queue_bytes(&self) -> u64 {
        let rings = RingLayout::packed_at(GuestAddress(0), self.descriptors).end().0.next_multiple_of(64);
        (rings + self.depth * self.control_bytes).next_multiple_of(PAGE_BYTES)
            + self.depth * self.block_bytes.next_multiple_of(PAGE_BYTES)
    }
}

/// Memory that the device shares.
#[derive(Debug)]
pub(super) struct SharedMemory {
    /// As mapped here, at guest addresses from 0 on.
    pub(super) ram: Arc<GuestRam>,
    /// What it is in.
    pub(super) file: File,
    pub(super) len_bytes: u64,
}

impl SharedMemory {
    /// Memory for so many queues.
    ///
    /// # Errors
    /// [`BenchError::System`] when there is none.
    pub(super) fn new(plan: &QueuePlan, queues: u32) -> Result<Self, BenchError> {
        let none = |_| BenchError::System(Errno::NOMEM.into());
        let len_bytes = u64::from(queues).checked_mul(plan.queue_bytes()).ok_or_else(|| none(()))?;
        let file =
            File::from(memfd_create("blk-backend-bench", MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?);
        ftruncate(&file, len_bytes).map_err(std::io::Error::from)?;
        let backing = Some(FileOffset::new(file.try_clone()?, 0));
        let size = usize::try_from(len_bytes).map_err(|_| none(()))?;
        let ram = GuestRam::from_ranges_with_files([(GuestAddress(0), size, backing)])
            .map_err(|error| BenchError::System(std::io::Error::other(error)))?;
        Ok(Self { ram: Arc::new(ram), file, len_bytes })
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros as _;

    use super::*;
    use crate::bench::job::{Limit, Pattern};

    fn job(depth: u32, block_bytes: u64) -> Job {
        let limit = Limit { time: None, requests: None };
        Job {
            pattern: Pattern::RandRead,
            read_percent: 0,
            block_bytes,
            depth,
            queues: 2,
            rate: None,
            flush_every: None,
            limit,
            seed: 0,
        }
    }

    fn config(segment_bytes: u32, segments: u32) -> RawConfig {
        RawConfig {
            size_max_bytes: segment_bytes.into(),
            seg_max: segments.into(),
            ..RawConfig::new_zeroed()
        }
    }

    #[test]
    fn nothing_of_a_queue_overlaps() {
        let limited = Features::SIZE_MAX.with(Features::SEG_MAX);
        for (features, depth, block) in [
            (limited, 32, 512),
            (limited.with(Features::INDIRECT_DESC), 33, 12 << 10),
            (limited.with(Features::INDIRECT_DESC), 1, 20 << 10),
        ] {
            let plan = QueuePlan::new(&job(depth, block), features, &config(4096, 126)).expect("a plan");
            let mut spans = Vec::new();
            for number in 0..2 {
                let rings = plan.rings(number);
                spans.push((rings.descriptors.0, rings.end().0));
                for slot in 0..u64::from(depth) {
                    let places = plan.places(number, slot);
                    let table_bytes = 16 * u64::from(plan.per_request);
                    spans.push((places.header.0, places.header.0 + 16));
                    spans.push((places.status.0, places.status.0 + 1));
                    spans.push((places.range.0, places.range.0 + 16));
                    spans.push((places.table.0, places.table.0 + table_bytes));
                    spans.push((places.data.0, places.data.0 + block));
                }
            }
            spans.sort_unstable();
            for pair in spans.windows(2) {
                assert!(pair[0].1 <= pair[1].0, "{pair:x?}");
            }
            assert!(spans.last().expect("some").1 <= 2 * plan.queue_bytes());
        }
    }

    #[test]
    fn a_queue_holds_what_is_asked_or_says_why_not() {
        let all = Features::SIZE_MAX.with(Features::SEG_MAX).with(Features::INDIRECT_DESC);
        let plan = |job: &Job, features| QueuePlan::new(job, features, &config(256 << 10, 126));
        assert_eq!(plan(&job(32, 4096), all).expect("a plan").descriptors, 32);
        assert_eq!(plan(&job(1, 4096), all).expect("a plan").descriptors, 4);
        let direct = all.without(Features::INDIRECT_DESC);
        assert_eq!(plan(&job(32, 1 << 20), direct).expect("a plan").descriptors, 256);
        assert!(plan(&job(1025, 4096), all).is_err());
        assert!(plan(&job(512, 4096), direct).is_err());
        assert!(plan(&job(1, 64 << 20), all).is_err());
        // Without its own word a device takes one segment, of any size.
        assert_eq!(plan(&job(1, 64 << 20), Features::INDIRECT_DESC).expect("a plan").per_request, 3);
    }
}
