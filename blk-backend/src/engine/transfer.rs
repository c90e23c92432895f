//! The fast way of a request: its extents become transfers of the ring, one each, and one countdown.
//!
//! A request goes this way whole or not at all: when any part needs a worker, nothing of it is submitted. A
//! transfer that moved less than asked goes on where it stopped; the end of a file reads as zeroes. The request ends
//! when the last of its transfers has, whatever became of the others: until then the kernel may touch its memory.
#![allow(unsafe_code)]

use std::{ops::Range, sync::Arc};

use img_core::{
    format::{Attempt, HostFile, HostOffset, Place, WriteStep},
    image::{FlushTicket, Image, ImageExtent, Lookaside, TableTicket, Ticket, WriteTicket},
};

use super::{
    fill::{Buffer, Buffers},
    memory::{Memory, RunLists},
    ring::{Ring, RingFile},
    slot::{Slot, Slots},
};
use crate::request::Errno;

/// What a request holds while its bytes are moved.
#[derive(Debug)]
pub(super) enum Hold {
    Read(#[expect(dead_code, reason = "held for its drop")] Ticket),
    /// For a read: a piece of a table that it lacks is on its way to the buffer.
    Table(TableTicket, Buffer),
    /// With the buffer of what is written around the guest's bytes.
    Write(WriteTicket, #[expect(dead_code, reason = "held for its drop")] Option<Buffer>),
    /// For a write: what stands around the guest's bytes is on its way to the buffer.
    Fill(WriteTicket, Buffer),
    /// For a flush, or a write that is durable before it is done: files are being synced.
    Flush(FlushTicket),
}

/// What came of trying the fast way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Its transfers are pushed; none is left where all of it read as zeroes.
    Pushed,
    /// Somebody who will soon be done is in the way.
    Busy,
    /// For a worker.
    Blocks,
}

/// What came of the answer to a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The request has more to wait for.
    More,
    /// This was the last transfer of the request in that slot.
    Last(u32),
}

/// One run of host bytes that the kernel reads or writes.
#[derive(Debug)]
struct Transfer {
    slot: u32,
    file: File,
    what: What,
    at_bytes: u64,
    /// Where in [`Slot::lists`] its memory is named.
    runs: Range<usize>,
    left_bytes: u64,
}

/// What a transfer does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Read,
    Write,
    /// Moves nothing: what was written before becomes durable.
    Sync,
}

/// A run of host bytes that is to be moved, and is not yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostRun {
    pub(super) file: File,
    pub(super) at_bytes: u64,
    pub(super) len_bytes: u64,
}

/// A host file as the ring knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct File {
    ring: RingFile,
    /// Offsets, lengths and addresses are multiples of this.
    unit_bytes: u64,
}

/// The transfers of one lane, and what is reused from request to request.
#[derive(Debug, Default)]
pub(super) struct Transfers {
    all: Vec<Transfer>,
    free: Vec<u32>,
    /// By depth and number of the file: what the ring calls it; `None` where it cannot be used.
    files: Vec<Vec<Option<File>>>,
    pub(super) extents: Vec<ImageExtent>,
    pub(super) steps: Vec<WriteStep>,
    pub(super) places: Vec<HostRun>,
    pub(super) buffers: Buffers,
}

impl Transfers {
    /// The image was exchanged: nothing of the old one is used any more. No transfer is under way.
    pub(super) fn forget_files(&mut self, ring: &mut Ring) {
        self.files.clear();
        ring.forget_files();
    }

    /// Whether a range is known to be written over what is there, in the top layer.
    pub(super) fn is_in_place(&mut self, image: &Arc<Image>, guest_bytes: &Range<u64>) -> bool {
        matches!(image.try_map(guest_bytes.clone(), &mut self.extents), Ok(Attempt::Done(_)))
            && self
                .extents
                .iter()
                .all(|extent| extent.depth == 0 && matches!(extent.place, Place::Data { writable: true, .. }))
    }

    /// Tries to read without a worker.
    pub(super) fn read(
        &mut self,
        ring: &mut Ring,
        lookaside: &mut Lookaside,
        index: u32,
        slot: &mut Slot,
    ) -> Way {
        let ticket = match lookaside.try_map(slot.guest_bytes.clone(), &mut self.extents) {
            Ok(Attempt::Done(ticket)) => ticket,
            Ok(Attempt::Busy) => return Way::Busy,
            // What is wrong is told by the worker.
            Ok(Attempt::Blocks) | Err(_) => return Way::Blocks,
        };
        self.places.clear();
        slot.lists.clear();
        slot.pending = 0;
        if !self.plan_read(ring, lookaside.image(), &mut slot.lists, Memory::Request(&slot.runs), 0) {
            return Way::Blocks;
        }
        slot.hold = Some(Hold::Read(ticket));
        self.push_all(ring, index, slot, 0, What::Read)
    }

    /// Plans to read [`Self::extents`], one behind the other, to `memory` from `at_bytes` on: what stands somewhere is
    /// added to [`Self::places`], and its memory to `lists`; what does not is zeroed. False where the ring cannot.
    pub(super) fn plan_read(
        &mut self,
        ring: &mut Ring,
        image: &Image,
        lists: &mut RunLists,
        memory: Memory<'_>,
        mut at_bytes: u64,
    ) -> bool {
        for index in 0..self.extents.len() {
            let ImageExtent { depth, place, len_bytes, .. } = self.extents[index];
            match place {
                Place::Zero { .. } | Place::Unallocated => memory.zero(at_bytes, len_bytes),
                Place::Data { file, at: HostOffset(host_bytes), .. } => {
                    let Some(file) = self.file(ring, image, depth, file) else { return false };
                    if !file.takes(host_bytes, memory, at_bytes, len_bytes) {
                        return false;
                    }
                    lists.add(memory, at_bytes, len_bytes);
                    self.places.push(HostRun { file, at_bytes: host_bytes, len_bytes });
                }
                Place::Encoded { .. } => return false,
            }
            at_bytes += len_bytes;
        }
        true
    }

    /// Tries to write without a worker.
    pub(super) fn write(&mut self, ring: &mut Ring, image: &Arc<Image>, index: u32, slot: &mut Slot) -> Way {
        let mut steps = std::mem::take(&mut self.steps);
        let attempt = image.try_prepare_write(slot.guest_bytes.clone(), &mut steps);
        self.steps = steps;
        let ticket = match attempt {
            Ok(Attempt::Done(ticket)) => ticket,
            Ok(Attempt::Busy) => return Way::Busy,
            Ok(Attempt::Blocks) | Err(_) => return Way::Blocks,
        };
        self.places.clear();
        slot.lists.clear();
        slot.pending = 0;
        if self.steps.iter().any(WriteStep::fills) {
            return self.read_around(ring, image, index, slot, ticket);
        }
        for at in 0..self.steps.len() {
            let WriteStep { file, at: HostOffset(at), ref guest_bytes, .. } = self.steps[at];
            let request_at = guest_bytes.start - slot.guest_bytes.start;
            let len_bytes = guest_bytes.end - guest_bytes.start;
            let Some(file) = self.file(ring, image, 0, file) else { return Way::Blocks };
            let memory = Memory::Request(&slot.runs);
            if !file.takes(at, memory, request_at, len_bytes) {
                return Way::Blocks;
            }
            self.places.push(HostRun { file, at_bytes: at, len_bytes });
            slot.lists.add(memory, request_at, len_bytes);
        }
        slot.hold = Some(Hold::Write(ticket, None));
        self.push_all(ring, index, slot, 0, What::Write)
    }

    /// Tries to make durable what was written, without a worker.
    pub(super) fn flush(&mut self, ring: &mut Ring, image: &Arc<Image>, index: u32, slot: &mut Slot) -> Way {
        // Somebody who has the image alone is waited for by the worker.
        let Attempt::Done(ticket) = image.try_flush() else { return Way::Blocks };
        self.places.clear();
        slot.lists.clear();
        slot.pending = 0;
        for file in ticket.files() {
            let is_known = image.storage(0, *file).is_some_and(|storage| storage.flushes_by_sync());
            let Some(file) = self.file(ring, image, 0, *file).filter(|_| is_known) else {
                return Way::Blocks;
            };
            slot.lists.end();
            self.places.push(HostRun { file, at_bytes: 0, len_bytes: 0 });
        }
        slot.hold = Some(Hold::Flush(ticket));
        self.push_all(ring, index, slot, 0, What::Sync)
    }

    /// Pushes a transfer for each of [`Self::places`], whose memory stands in the lists of the slot from `first_list`
    /// on, in order. All lists are there: they must not move once a transfer names them.
    pub(super) fn push_all(
        &mut self,
        ring: &mut Ring,
        index: u32,
        slot: &mut Slot,
        first_list: usize,
        what: What,
    ) -> Way {
        for at in 0..self.places.len() {
            let HostRun { file, at_bytes, len_bytes: left_bytes } = self.places[at];
            let runs = slot.lists.range(first_list + at);
            let transfer = Transfer { slot: index, file, what, at_bytes, runs, left_bytes };
            let number = match self.free.pop() {
                Some(number) => {
                    self.all[number as usize] = transfer;
                    number
                }
                None => {
                    self.all.push(transfer);
                    u32::try_from(self.all.len() - 1).expect("a few for each slot")
                }
            };
            if !push(ring, number, &self.all[number as usize], slot) {
                self.free.push(number);
                break;
            }
            slot.pending += 1;
        }
        if slot.pending == 0 && slot.failure.take().is_some() {
            slot.hold = None;
            return Way::Blocks;
        }
        Way::Pushed
    }

    /// Takes an answer. What is left of a transfer goes on by itself.
    pub(super) fn moved(
        &mut self,
        ring: &mut Ring,
        slots: &mut Slots,
        number: u32,
        result: Result<u32, Errno>,
    ) -> Progress {
        let transfer = &mut self.all[number as usize];
        let slot = slots.get(transfer.slot);
        match result {
            Ok(0) if transfer.what == What::Write => slot.fail(Errno::IO),
            Err(errno) => slot.fail(errno),
            Ok(moved) => {
                let moved = u64::from(moved).min(transfer.left_bytes);
                transfer.left_bytes -= moved;
                transfer.at_bytes += moved;
                if transfer.left_bytes > 0 {
                    slot.lists.advance(transfer.runs.clone(), moved);
                    // Past the cache a file ends where less than whole units come.
                    let ends = moved == 0 || !moved.is_multiple_of(transfer.file.unit_bytes);
                    if transfer.what == What::Write || !ends {
                        if push(ring, number, transfer, slot) {
                            return Progress::More;
                        }
                    } else {
                        slot.lists.zero(transfer.runs.clone());
                    }
                }
            }
        }
        let index = transfer.slot;
        self.free.push(number);
        slot.pending -= 1;
        if slot.pending == 0 { Progress::Last(index) } else { Progress::More }
    }

    /// What the ring calls a file of the image; `None` where it has no descriptor or the table no room.
    pub(super) fn file(
        &mut self,
        ring: &mut Ring,
        image: &Image,
        depth: usize,
        file: HostFile,
    ) -> Option<File> {
        let known = self.files.get(depth).and_then(|files| files.get(file.0 as usize));
        if let Some(known) = known {
            return *known;
        }
        if self.files.len() <= depth {
            self.files.resize_with(depth + 1, Vec::new);
        }
        while self.files[depth].len() <= file.0 as usize {
            let next = HostFile(u32::try_from(self.files[depth].len()).expect("at most file.0"));
            let found = image.storage(depth, next).and_then(|storage| {
                let unit_bytes = u64::from(storage.limits().alignment_bytes.max(1));
                // Where the table takes no more, workers read and write the file.
                let ring = ring.add_file(storage.as_fd()?).ok()??;
                Some(File { ring, unit_bytes })
            });
            self.files[depth].push(found);
        }
        self.files[depth][file.0 as usize]
    }
}

impl File {
    /// Whether the kernel moves bytes between the file, from `at_bytes` on, and a part of `memory` as it is. (Alignment
    /// is decided here alone: what does not fit goes to a worker, and the storage bounces it.)
    pub(super) fn takes(
        self,
        at_bytes: u64,
        memory: Memory<'_>,
        memory_at_bytes: u64,
        len_bytes: u64,
    ) -> bool {
        let unit = self.unit_bytes;
        unit == 1
            || at_bytes.is_multiple_of(unit)
                && len_bytes.is_multiple_of(unit)
                && memory.is_aligned(memory_at_bytes, len_bytes, unit)
    }
}

/// Gives what is left of a transfer to the ring. Where it takes nothing the request fails as one that is to be tried
/// again, by a worker.
fn push(ring: &mut Ring, number: u32, transfer: &Transfer, slot: &mut Slot) -> bool {
    let &Transfer { file: File { ring: file, .. }, what, at_bytes, .. } = transfer;
    let runs = slot.lists.get(transfer.runs.clone());
    let pushed = match what {
        What::Sync => ring.sync(number, file),
        // SAFETY: the list stands in the slot, and is not changed before the answer; the memory is that of the slot's
        // request, which is answered when none of its transfers is pending, or of the buffer that it holds until then.
        What::Read | What::Write => unsafe {
            ring.transfer(number, what == What::Write, file, at_bytes, runs)
        },
    };
    if pushed.is_err() {
        slot.fail(Errno::AGAIN);
    }
    pushed.is_ok()
}
