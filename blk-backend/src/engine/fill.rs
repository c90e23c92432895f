//! What is written around a guest's bytes in clusters that are new to it: read first, and written together with them.
//!
//! | step | what moves | ends in |
//! | --- | --- | --- |
//! | 1 | what stands around the guest's bytes now, into a buffer | [`Transfers::write_filled`] |
//! | 2 | the buffer's parts and the guest's bytes, as one piece | the commit |
//!
//! The write is prepared before the first step and committed after the second. Whoever wants one of its clusters
//! waits as for any other write, so that what was read stays true; a crash between the steps leaves clusters that
//! nothing refers to.

use std::{
    cell::{Cell, RefCell},
    ops::{Deref, DerefMut, Range},
    rc::Rc,
    sync::Arc,
};

use img_core::{
    format::WriteStep,
    image::{Image, WriteTicket},
};

use super::{
    memory::{Memory, OwnMemory},
    ring::Ring,
    slot::Slot,
    transfer::{Hold, HostRun, Transfers, Way, What},
};

/// The most bytes that the requests of a lane may have in buffers. What needs more is for workers.
const MOST_BYTES: usize = 4 << 20;

/// The most bytes that wait in buffers for the next requests.
const KEPT_BYTES: usize = 1 << 20;

/// Two parts of a cluster that have no more than this between them are read as one: a call costs more than the bytes.
const JOINED_BYTES: u64 = 16 << 10;

/// The buffers of a lane.
#[derive(Debug, Default)]
pub(super) struct Buffers(Rc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    #[expect(clippy::vec_box, reason = "boxes go in and out as they are, and nothing is allocated")]
    spare: RefCell<Vec<Box<Content>>>,
    spare_bytes: Cell<usize>,
    taken_bytes: Cell<usize>,
}

/// A buffer that a request has until this is dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    /// Always there, but at the end of its drop.
    content: Option<Box<Content>>,
    shared: Rc<Shared>,
}

#[derive(Debug, Default)]
pub(super) struct Content {
    memory: OwnMemory,
    /// What step 2 writes, and which of the lists of the slot is the first one of these.
    writes: Vec<HostRun>,
    first_list: usize,
}

impl Buffers {
    /// A buffer of that size; `None` where too much is taken.
    pub(super) fn take(&self, length: usize) -> Option<Buffer> {
        let Self(shared) = self;
        if shared.taken_bytes.get() + OwnMemory::ALIGNMENT_BYTES + length > MOST_BYTES {
            return None;
        }
        let mut content = shared.spare.borrow_mut().pop().unwrap_or_default();
        shared.spare_bytes.set(shared.spare_bytes.get() - content.memory.taken_bytes());
        content.memory.grow(length);
        content.writes.clear();
        shared.taken_bytes.set(shared.taken_bytes.get() + content.memory.taken_bytes());
        Some(Buffer { content: Some(content), shared: Rc::clone(shared) })
    }
}

impl Buffer {
    /// At least as long as was asked for.
    pub(super) fn memory(&self) -> &OwnMemory {
        &self.memory
    }
}

impl Deref for Buffer {
    type Target = Content;

    fn deref(&self) -> &Content {
        self.content.as_ref().expect("until it is dropped")
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Content {
        self.content.as_mut().expect("until it is dropped")
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(content) = self.content.take() else { return };
        let Shared { spare, spare_bytes, taken_bytes } = &*self.shared;
        let bytes = content.memory.taken_bytes();
        taken_bytes.set(taken_bytes.get() - bytes);
        if spare_bytes.get() + bytes <= KEPT_BYTES {
            spare_bytes.set(spare_bytes.get() + bytes);
            spare.borrow_mut().push(content);
        }
    }
}

/// What a step fills, and where in a buffer it goes.
struct Around {
    before: Range<u64>,
    after: Range<u64>,
    /// What lies between is read, too.
    is_joined: bool,
}

impl Around {
    fn of(step: &WriteStep) -> Self {
        let Range { start, end } = step.guest_bytes;
        let is_joined =
            step.fill_before_bytes > 0 && step.fill_after_bytes > 0 && end - start <= JOINED_BYTES;
        Self {
            before: start - step.fill_before_bytes..start,
            after: end..end + step.fill_after_bytes,
            is_joined,
        }
    }

    /// Where the buffer holds what comes after, counted from its first byte.
    fn after_at(&self) -> u64 {
        if self.is_joined {
            self.after.start - self.before.start
        } else {
            self.before.end - self.before.start
        }
    }

    fn buffered_bytes(&self) -> u64 {
        self.after_at() + (self.after.end - self.after.start)
    }

    /// What is read, and where in the buffer to.
    fn reads(&self) -> impl Iterator<Item = (Range<u64>, u64)> {
        let all = if self.is_joined {
            [(self.before.start..self.after.end, 0), (0..0, 0)]
        } else {
            [(self.before.clone(), 0), (self.after.clone(), self.after_at())]
        };
        all.into_iter().filter(|(guest, _)| !guest.is_empty())
    }
}

impl Transfers {
    /// Begins a write some of whose [`steps`](Self::steps) fill: step 1.
    pub(super) fn read_around(
        &mut self,
        ring: &mut Ring,
        image: &Arc<Image>,
        index: u32,
        slot: &mut Slot,
        ticket: WriteTicket,
    ) -> Way {
        let steps = std::mem::take(&mut self.steps);
        let buffer = self.buffer_for(ring, image, slot, &ticket, &steps);
        self.steps = steps;
        let Some(buffer) = buffer else { return Way::Blocks };
        slot.hold = Some(Hold::Fill(ticket, buffer));
        self.push_all(ring, index, slot, 0, What::Read)
    }

    /// What stands around the guest's bytes has come: step 2.
    pub(super) fn write_filled(
        &mut self,
        ring: &mut Ring,
        index: u32,
        slot: &mut Slot,
        ticket: WriteTicket,
        buffer: Buffer,
    ) -> Way {
        self.places.clear();
        self.places.extend_from_slice(&buffer.writes);
        let first_list = buffer.first_list;
        slot.hold = Some(Hold::Write(ticket, Some(buffer)));
        self.push_all(ring, index, slot, first_list, What::Write)
    }

    /// A buffer for what the steps fill. What is read stands in [`Self::places`], what is written in the buffer, and
    /// the lists of memory for both in the slot. `None` where the ring cannot do it.
    fn buffer_for(
        &mut self,
        ring: &mut Ring,
        image: &Arc<Image>,
        slot: &mut Slot,
        ticket: &WriteTicket,
        steps: &[WriteStep],
    ) -> Option<Buffer> {
        let length: u64 = steps.iter().map(|step| Around::of(step).buffered_bytes()).sum();
        let mut buffer = self.buffers.take(usize::try_from(length).ok()?)?;
        let mut at = 0;
        for around in steps.iter().map(Around::of) {
            for (guest, to) in around.reads() {
                let is_known = ticket.map_fill(guest, &mut self.extents);
                let memory = Memory::Own(&buffer.memory);
                if !is_known || !self.plan_read(ring, image, &mut slot.lists, memory, at + to) {
                    return None;
                }
            }
            at += around.buffered_bytes();
        }
        buffer.first_list = self.places.len();
        at = 0;
        for step in steps {
            let around = Around::of(step);
            let file = self.file(ring, image, 0, step.file)?;
            let request_at = step.guest_bytes.start - slot.guest_bytes.start;
            let len_bytes = step.guest_bytes.end - step.guest_bytes.start;
            let own = Memory::Own(&buffer.memory);
            let at_bytes = step.at.0 - step.fill_before_bytes;
            let mut end_bytes = at_bytes;
            for (memory, memory_at, len_bytes) in [
                (own, at, step.fill_before_bytes),
                (Memory::Request(&slot.runs), request_at, len_bytes),
                (own, at + around.after_at(), step.fill_after_bytes),
            ] {
                if !file.takes(end_bytes, memory, memory_at, len_bytes) {
                    return None;
                }
                slot.lists.push(memory, memory_at, len_bytes);
                end_bytes += len_bytes;
            }
            slot.lists.end();
            buffer.writes.push(HostRun { file, at_bytes, len_bytes: end_bytes - at_bytes });
            at += around.buffered_bytes();
        }
        Some(buffer)
    }
}

#[cfg(test)]
mod tests {
    use img_core::format::{HostFile, HostOffset};

    use super::*;

    fn step(guest: Range<u64>, before: u64, after: u64) -> WriteStep {
        let in_place = WriteStep::in_place(guest, HostFile::IMAGE, HostOffset(1 << 20));
        WriteStep { fill_before_bytes: before, fill_after_bytes: after, ..in_place }
    }

    #[test]
    fn near_parts_are_read_as_one_and_far_ones_apart() {
        let reads = |step: WriteStep| Around::of(&step).reads().collect::<Vec<_>>();
        assert_eq!(reads(step(4096..8192, 4096, 57_344)), [(0..65_536, 0)]);
        let far = step(4096..4097 + JOINED_BYTES, 4096, 1000);
        assert_eq!(reads(far.clone()), [(0..4096, 0), (4097 + JOINED_BYTES..5097 + JOINED_BYTES, 4096)]);
        assert_eq!(Around::of(&far).buffered_bytes(), 5096);
        assert_eq!(reads(step(4096..8192, 0, 100)), [(8192..8292, 0)]);
        assert_eq!(reads(step(4096..8192, 100, 0)), [(3996..4096, 0)]);
        assert_eq!(reads(step(4096..8192, 0, 0)), []);
    }

    #[test]
    fn buffers_are_bounded_and_used_again() {
        let buffers = Buffers::default();
        let mut taken: Vec<_> = std::iter::from_fn(|| buffers.take(1 << 20)).collect();
        assert_eq!(taken.len(), 3, "with its alignment a fourth would be too much");
        assert!(buffers.take(MOST_BYTES).is_none());
        assert!(taken[0].memory.address(0, 1).addr().is_multiple_of(OwnMemory::ALIGNMENT_BYTES));
        taken.clear();
        assert_eq!(buffers.0.taken_bytes.get(), 0);
        assert!(buffers.0.spare_bytes.get() <= KEPT_BYTES);
        let small: Vec<_> = (0..2).map(|_| buffers.take(1000).expect("room")).collect();
        drop(small);
        assert_eq!(buffers.0.spare.borrow().len(), 2);
        let first = buffers.take(1000).expect("room");
        assert_eq!(buffers.0.spare.borrow().len(), 1);
        drop(first);
    }
}
