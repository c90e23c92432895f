//! The way of a request through a lane: admitted, begun, moved or handed over, ended.
//!
//! | stage | waits for | goes on in |
//! | --- | --- | --- |
//! | held | the end of a pause | [`Lane::begin`] |
//! | parked | its clusters | [`Lane::begin`] |
//! | busy | somebody who is in the way for a short time | [`Lane::begin`] |
//! | moving | the ring, for its bytes or a table that names them | [`Lane::end_moving`] |
//! | working | a worker | [`Lane::end`] |

use std::{ops::Range, sync::Arc, time::Instant};

use img_core::{
    format::HostFile,
    image::{Commit, Image, Lookaside},
    storage::Limits,
};

use super::{
    backend::EngineInUse,
    lane::{Event, Lane},
    ring::Ring,
    slot::{Stage, is_mended_by_worker},
    transfer::{Hold, Progress, Way},
    worker::{Job, Task},
};
use crate::request::{Errno, Op};

impl Lane {
    /// Whether a request may begin; if so it counts as under way.
    pub(super) fn admit(&mut self) -> bool {
        if self.under_way > 0 {
            if self.disk.pauses.is_any() {
                return false;
            }
        } else if !self.disk.pauses.admit(&self.mailbox) {
            return false;
        } else if self.disk.generation() != self.generation {
            self.change_image();
        }
        self.under_way += 1;
        self.mailbox.stats.depth_is(self.under_way);
        true
    }

    /// The disk has another image; nothing is under way.
    fn change_image(&mut self) {
        self.generation = self.disk.generation();
        self.lookaside = Lookaside::of(&self.disk.image());
        self.direct = Direct::of(self.lookaside.image());
        if let Some(ring) = self.backend.ring() {
            self.transfers.forget_files(ring);
        }
    }

    /// Begins a request that was admitted, or goes on with one that was parked.
    pub(super) fn begin(&mut self, index: u32) {
        let size = self.lookaside.image().virtual_size_bytes();
        let slot = self.slots.get(index);
        let (op, range) = (slot.op, slot.guest_bytes.clone());
        if range.end > size {
            return self.end(index, Err(if op.changes() { Errno::NOSPC } else { Errno::INVAL }));
        }
        if op.changes() && self.disk.is_read_only() {
            return self.end(index, Err(Errno::ROFS));
        }
        if range.is_empty() && op != Op::Flush && !op.is_fua() {
            return self.end(index, Ok(()));
        }
        match op {
            Op::Read => self.read(index),
            Op::Write { .. } => self.write(index),
            Op::Flush => self.flush(index),
            Op::Cache => self.hand_over(index, Task::All(op)),
            Op::Discard { .. } | Op::WriteZeroes { .. } => self.change(index),
        }
    }

    fn read(&mut self, index: u32) {
        let Some(ring) = self.backend.ring() else { return self.hand_over(index, Task::All(Op::Read)) };
        let slot = self.slots.get(index);
        let mut way = self.transfers.read(ring, &mut self.lookaside, index, slot);
        if way == Way::Busy {
            // Whoever ends from here on wakes the lane; who has ended already is not in the way any more.
            self.lookaside.image().wake_on_progress(&self.progress);
            way = self.transfers.read(ring, &mut self.lookaside, index, slot);
        }
        match way {
            Way::Pushed => self.begin_moving(index),
            Way::Busy => self.wait_for_progress(index),
            Way::Blocks => self.read_lacking(index),
        }
    }

    /// A read that memory does not answer: where it is a table that is lacking, the ring reads it.
    fn read_lacking(&mut self, index: u32) {
        let ring = self.backend.ring().expect("it is in use");
        let slot = self.slots.get(index);
        if self.transfers.read_table(ring, self.lookaside.image(), index, slot) == Way::Pushed {
            self.mailbox.stats.table_reads.add(1);
            self.begin_moving(index);
        } else {
            self.mailbox.stats.misses.add(1);
            self.hand_over(index, Task::All(Op::Read));
        }
    }

    fn write(&mut self, index: u32) {
        if self.engine != EngineInUse::Ring {
            return self.write_by_worker(index);
        }
        if let Some(direct) = self.direct {
            if !direct.ring_writes {
                return self.change(index);
            }
            if !self.slots.get(index).entered && !self.enter(index) {
                return;
            }
        }
        let ring = self.backend.ring().expect("it is in use");
        let slot = self.slots.get(index);
        let mut way = self.transfers.write(ring, self.lookaside.image(), index, slot);
        if way == Way::Busy {
            self.lookaside.image().wake_on_progress(&self.progress);
            way = self.transfers.write(ring, self.lookaside.image(), index, slot);
        }
        match way {
            Way::Pushed => self.begin_moving(index),
            Way::Busy => self.wait_for_progress(index),
            Way::Blocks => {
                self.mailbox.stats.misses.add(1);
                self.change(index);
            }
        }
    }

    /// Makes durable what was written before, for a flush or at the end of a write.
    fn flush(&mut self, index: u32) {
        let slot = self.slots.get(index);
        let way = match self.backend.ring() {
            Some(ring) => self.transfers.flush(ring, self.lookaside.image(), index, slot),
            None => Way::Blocks,
        };
        match way {
            Way::Pushed => self.begin_moving(index),
            Way::Busy | Way::Blocks => self.hand_over(index, Task::All(Op::Flush)),
        }
    }

    /// Overwriting what is there is in nobody's way; any other write waits for its clusters.
    fn write_by_worker(&mut self, index: u32) {
        let slot = self.slots.get(index);
        if slot.entered || self.transfers.is_in_place(self.lookaside.image(), &slot.guest_bytes) {
            let op = slot.op;
            return self.hand_over(index, Task::All(op));
        }
        self.change(index);
    }

    /// A change by a worker, who has its clusters to itself.
    fn change(&mut self, index: u32) {
        if self.slots.get(index).entered || self.enter(index) {
            let op = self.slots.get(index).op;
            self.hand_over(index, Task::All(op));
        }
    }

    /// Makes the clusters of a change its own, where changes can be in each other's way. False when it is parked.
    fn enter(&mut self, index: u32) -> bool {
        let cluster = self.lookaside.image().layers()[0].cluster_size_bytes().map(u64::from);
        let granule = self.direct.map(|direct| direct.granule_bytes);
        let Some(unit) = cluster.max(granule) else { return true };
        let slot = self.slots.get(index);
        let Range { start, end } = slot.guest_bytes;
        let clusters = match self.direct {
            // A storage that writes a part of a block past the end of the file cuts the file off behind it.
            Some(direct) if !(start | end).is_multiple_of(direct.unit_bytes) => 0..u64::MAX,
            _ => start - start % unit..end.checked_next_multiple_of(unit).unwrap_or(u64::MAX),
        };
        slot.stage = Stage::Parked;
        slot.entered = self.disk.flight.enter(clusters, &self.mailbox, index);
        if !slot.entered {
            self.mailbox.stats.parked.add(1);
        }
        slot.entered
    }

    fn wait_for_progress(&mut self, index: u32) {
        let slot = self.slots.get(index);
        if slot.stage != Stage::Busy {
            slot.stage = Stage::Busy;
            self.mailbox.stats.parked.add(1);
        }
        self.busy.push(index);
    }

    fn begin_moving(&mut self, index: u32) {
        let slot = self.slots.get(index);
        slot.stage = Stage::Moving;
        if slot.pending == 0 {
            self.end_moving(index);
        } else if matches!(slot.hold, Some(Hold::Fill(..))) {
            // A buffer that was filled in the call is written, and free for the next request, while it is in the
            // processor's cache.
            while let Some((transfer, result)) = self.backend.ring().and_then(Ring::next_moved) {
                self.moved(transfer, result);
            }
        }
    }

    /// The kernel has answered a transfer.
    pub(super) fn moved(&mut self, transfer: u32, result: Result<u32, Errno>) {
        let ring = self.backend.ring().expect("only a ring moves bytes");
        if let Progress::Last(index) = self.transfers.moved(ring, &mut self.slots, transfer, result) {
            self.end_moving(index);
        }
    }

    /// The kernel has answered all transfers of a request.
    pub(super) fn end_moving(&mut self, index: u32) {
        let slot = self.slots.get(index);
        let hold = slot.hold.take();
        match (slot.failure.take(), hold) {
            (Some(errno), hold) if is_mended_by_worker(errno) => {
                let is_flush = matches!(hold, Some(Hold::Flush(_)));
                drop(hold);
                if is_flush {
                    self.hand_over(index, Task::All(Op::Flush));
                } else if slot.op == Op::Read {
                    self.hand_over(index, Task::All(Op::Read));
                } else {
                    self.change(index);
                }
            }
            (Some(errno), Some(Hold::Flush(ticket))) => {
                ticket.failed(errno);
                self.end(index, Err(errno));
            }
            (Some(errno), _) => self.end(index, Err(errno)),
            (None, Some(Hold::Flush(ticket))) => {
                ticket.synced();
                self.end(index, Ok(()));
            }
            (None, Some(Hold::Table(ticket, buffer))) => {
                buffer.offer(ticket);
                self.begin(index);
            }
            (None, Some(Hold::Fill(ticket, buffer))) => {
                let ring = self.backend.ring().expect("it has moved bytes");
                match self.transfers.write_filled(ring, index, slot, ticket, buffer) {
                    Way::Pushed => self.begin_moving(index),
                    Way::Busy | Way::Blocks => self.change(index),
                }
            }
            (None, Some(Hold::Write(ticket, _))) => {
                let fua = slot.op.is_fua();
                match ticket.try_commit() {
                    Commit::Blocks(ticket) => self.hand_over(index, Task::Commit { ticket, fua }),
                    Commit::Done if fua => self.flush(index),
                    Commit::Done => self.end(index, Ok(())),
                }
            }
            (None, Some(Hold::Read(_)) | None) => self.end(index, Ok(())),
        }
    }

    fn hand_over(&mut self, index: u32, task: Task) {
        let slot = self.slots.get(index);
        slot.stage = Stage::Working;
        let job = Job {
            image: Arc::clone(self.lookaside.image()),
            owner: Arc::clone(&self.mailbox),
            slot: index,
            task,
            guest_bytes: slot.guest_bytes.clone(),
            runs: std::mem::take(&mut slot.runs),
            entered: std::mem::take(&mut slot.entered).then(|| Arc::clone(&self.disk.flight)),
        };
        self.mailbox.stats.handed_over.add(1);
        self.disk.workers.give(job);
    }

    /// A request that was under way has ended.
    pub(super) fn end(&mut self, index: u32, result: Result<(), Errno>) {
        self.answer(index, result);
        self.leave();
    }

    /// A request that was under way is given up.
    pub(super) fn retire(&mut self, index: u32) {
        self.slots.give(index);
        self.leave();
    }

    fn leave(&mut self) {
        self.under_way -= 1;
        self.mailbox.stats.depth_is(self.under_way);
        if self.under_way == 0 {
            self.disk.pauses.leave(&self.mailbox);
        }
    }

    /// Tells how a request ended, and frees its slot.
    pub(super) fn answer(&mut self, index: u32, result: Result<(), Errno>) {
        let slot = self.slots.get(index);
        let bytes = slot.guest_bytes.end - slot.guest_bytes.start;
        let took = self.now.get_or_insert_with(Instant::now).saturating_duration_since(slot.began);
        self.mailbox.stats.done(slot.op, bytes, took, result.is_ok());
        self.events.push(Event::Done { tag: slot.tag, result });
        if slot.entered {
            self.disk.flight.leave(&self.mailbox, index);
        }
        self.slots.give(index);
    }
}

/// What is different where the ring writes past the page cache. The storage keeps its own writers of one block
/// apart, those that must read a block first too; the writes of a ring do not pass there. So all changes enter the
/// [`Flight`](super::Flight), in whole blocks. Tables need no such care: they share no block with guest bytes where
/// `ring_writes`, and make a file longer by whole clusters, so that the storage has nothing to cut off.
#[derive(Clone, Copy, Debug)]
pub(super) struct Direct {
    /// What is written past the cache is a multiple of this.
    unit_bytes: u64,
    /// The storage's unit of exclusion.
    granule_bytes: u64,
    /// False where a block holds data and tables, which the format writes.
    ring_writes: bool,
}

impl Direct {
    /// `None` where the top layer is written through the page cache, or not at all.
    pub(super) fn of(image: &Image) -> Option<Self> {
        let top = &image.layers()[0];
        // Guest bytes may stand in other files than the image's own, on other file systems.
        let limits: Vec<Limits> =
            (0..).map_while(|file| top.file(HostFile(file))).map(|storage| storage.limits()).collect();
        let unit_bytes = limits.iter().map(|limits| u64::from(limits.alignment_bytes)).max()?;
        if unit_bytes <= 1 || top.writer().is_none() {
            return None;
        }
        let block_bytes = limits.iter().map(|limits| u64::from(limits.block_bytes)).max()?;
        let granule_bytes = unit_bytes.max(block_bytes).max(4096).next_power_of_two();
        let cluster = top.cluster_size_bytes().map(u64::from);
        Some(Self {
            unit_bytes,
            granule_bytes,
            ring_writes: cluster.is_none_or(|cluster| cluster.is_multiple_of(granule_bytes)),
        })
    }

    #[cfg(test)]
    pub(super) fn unit_bytes(self) -> u64 {
        self.unit_bytes
    }
}
