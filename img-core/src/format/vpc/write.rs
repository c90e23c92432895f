//! Guest writes: prepare (where the bytes will live), commit (the map points there), abort.
//!
//! A write to sectors that are there changes no table and takes no lock but those of the map. Any other write is
//! prepared under the state lock, and whoever wants one of its sectors (of its block, when that is new) waits
//! until it has landed.

use std::ops::Range;

use super::{alloc::State, footer::DiskType, geometry::SECTOR_BYTES, layer::SparseLayer};
use crate::{
    Error, Result,
    format::{
        Attempt, Below, HostFile, HostOffset, Layer, LayerWriter, PreparedWrite, WritePlan, WriteStep,
        WriteToken,
    },
    storage::Preallocation,
};

/// The token of writes that change no table.
const IN_PLACE: u64 = u64::MAX;

/// A prepared write that changes the map when it is committed.
#[derive(Clone, Debug)]
pub(super) struct Write {
    /// What others wait for: whole sectors, or the whole block.
    held: Range<u64>,
    /// Whole sectors that will be there.
    guest: Range<u64>,
    block: u32,
    /// Where the block stands, or will.
    at_bytes: u64,
    is_new: bool,
}

/// What a write that starts at some byte meets.
enum Met {
    /// Sectors that are there, up to the end of the range.
    There { at_bytes: u64, guest: Range<u64> },
    /// Sectors of a block that is there, which are not.
    NotThere { at_bytes: u64, guest: Range<u64> },
    /// No block.
    NoBlock,
}

/// What is there when a write is done.
#[derive(Clone, Copy)]
enum Mapped {
    /// Its sectors, after the rest of the first and of the last was filled with what the guest reads there now.
    Sectors,
    /// All of its block, which reads as zeroes on the host.
    Block,
}

impl SparseLayer {
    /// What the first sectors of `guest` are; all in one block.
    fn meet(&self, block: u32, guest: &Range<u64>) -> Result<Met> {
        let Some(at_bytes) = self.map.place(block) else { return Ok(Met::NoBlock) };
        let run = self.map.run(&*self.storage, block, at_bytes, guest)?;
        let first = guest.start - guest.start % SECTOR_BYTES;
        let guest = guest.start..guest.end.min(first + u64::from(run.sectors) * SECTOR_BYTES);
        Ok(match run.is_there {
            true => Met::There { at_bytes, guest },
            false => Met::NotThere { at_bytes, guest },
        })
    }

    fn prepare(&self, guest: Range<u64>) -> Result<(WriteToken, WritePlan)> {
        self.check_writable()?;
        let block = self.map.block_of(guest.start);
        let block_guest = self.map.guest_of(block);
        let guest = guest.start..guest.end.min(block_guest.end);
        if let Met::There { at_bytes, guest } = self.meet(block, &guest)? {
            return Ok((WriteToken(IN_PLACE), self.plan_in_place(at_bytes, guest)));
        }
        let mut state = self.state();
        if self.map.bitmaps.wants_writing() {
            self.drain(&mut state)?;
        }
        loop {
            // Someone else's write may have changed what is there meanwhile.
            let (held, mapped, at_bytes, guest) = match self.meet(block, &guest)? {
                Met::There { at_bytes, guest } => {
                    return Ok((WriteToken(IN_PLACE), self.plan_in_place(at_bytes, guest)));
                }
                Met::NotThere { at_bytes, guest } => {
                    (whole_sectors(&guest), Mapped::Sectors, Some(at_bytes), guest)
                }
                Met::NoBlock if self.disk_type == DiskType::Differencing => {
                    (block_guest.clone(), Mapped::Sectors, None, guest.clone())
                }
                // The new block is there as a whole, and reads as zeroes.
                Met::NoBlock => (block_guest.clone(), Mapped::Block, None, guest.clone()),
            };
            if state.in_flight.overlaps(&held) {
                state = self.landed.wait(state);
                continue;
            }
            let is_new = at_bytes.is_none();
            let at_bytes = match at_bytes {
                Some(at_bytes) => at_bytes,
                None => self.reserve(&mut state)?,
            };
            let write = Write { held, guest: whole_sectors(&guest), block, at_bytes, is_new };
            return Ok((begin(&mut state, write), self.plan(at_bytes, guest, mapped)));
        }
    }

    /// The plan of a write over what is there, inside a block at `at_bytes`.
    fn plan_in_place(&self, at_bytes: u64, guest: Range<u64>) -> WritePlan {
        let at = HostOffset(self.map.data_at(at_bytes, guest.start));
        WritePlan::in_place(guest, HostFile::IMAGE, at)
    }

    /// The plan of a write that changes the map, inside a block at `at_bytes`.
    fn plan(&self, at_bytes: u64, guest: Range<u64>, mapped: Mapped) -> WritePlan {
        let sectors = whole_sectors(&guest);
        let mut plan = self.plan_in_place(at_bytes, guest.clone());
        match mapped {
            Mapped::Sectors => {
                plan.step.fill_before_bytes = guest.start - sectors.start;
                plan.step.fill_after_bytes = sectors.end - guest.end;
                plan.step.maps = sectors;
            }
            Mapped::Block => plan.step.maps = self.map.guest_of(self.map.block_of(guest.start)),
        }
        plan
    }

    fn commit(&self, token: WriteToken) -> Result<()> {
        if token.0 == IN_PLACE {
            return Ok(());
        }
        let mut state = self.state();
        let write = end(&mut state, token);
        let result = self.check_writable().and_then(|()| self.link(&mut state, &write));
        if result.is_err() && write.is_new {
            state.spare.push(write.at_bytes);
        }
        self.landed.notify_all();
        result
    }

    /// Makes the map point at the sectors of a write: the bitmap first, as whoever finds the block asks for it.
    fn link(&self, state: &mut State, write: &Write) -> Result<()> {
        let sectors = self.map.sectors_of(&write.guest);
        if !write.is_new {
            return self.map.bitmaps.set(&*self.storage, write.block, write.at_bytes, sectors);
        }
        let named = (self.disk_type == DiskType::Differencing).then_some(sectors);
        self.map.bitmaps.set_new(write.block, named);
        self.map.link(write.block, write.at_bytes);
        state.changed_entries.insert(write.block);
        Ok(())
    }

    fn abort(&self, token: WriteToken) {
        if token.0 == IN_PLACE {
            return;
        }
        let mut state = self.state();
        let write = end(&mut state, token);
        if write.is_new {
            state.spare.push(write.at_bytes);
        }
        self.landed.notify_all();
    }
}

fn begin(state: &mut State, write: Write) -> WriteToken {
    let token = state.next_token;
    state.next_token += 1; // far from IN_PLACE for as long as anyone writes
    state.in_flight.insert(&write.held);
    state.writes.insert(token, write);
    WriteToken(token)
}

fn end(state: &mut State, token: WriteToken) -> Write {
    let write = state.writes.remove(&token.0).expect("each token is ended once");
    state.in_flight.remove(&write.held);
    write
}

fn whole_sectors(guest: &Range<u64>) -> Range<u64> {
    guest.start - guest.start % SECTOR_BYTES..guest.end.next_multiple_of(SECTOR_BYTES)
}

impl LayerWriter for SparseLayer {
    fn prepare_write(&self, guest_bytes: Range<u64>) -> Result<PreparedWrite<'_>> {
        let (token, plan) = self.prepare(guest_bytes)?;
        Ok(PreparedWrite::new(self, token, plan))
    }

    fn prepare_compressed(&self, _guest_offset: u64, _stored_bytes: u32) -> Result<PreparedWrite<'_>> {
        Err(Error::unsupported(self.path(), "writing compressed clusters to a VHD"))
    }

    /// A write over sectors that are there; any other is for who may wait.
    fn try_prepare_write(
        &self,
        guest_bytes: Range<u64>,
        _below: &dyn Fn(Range<u64>) -> Below,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<Option<WriteToken>>> {
        self.check_writable()?;
        let over = WriteStep::over_what_is_there(&guest_bytes, steps, |found| {
            self.try_map_range(guest_bytes.clone(), found)
        })?;
        Ok(if over == Some(true) { Attempt::Done(None) } else { Attempt::Blocks })
    }

    fn commit_write(&self, token: WriteToken) -> Result<()> {
        self.commit(token)
    }

    fn abort_write(&self, token: WriteToken) {
        self.abort(token);
    }

    fn zero_granularity_bytes(&self) -> u64 {
        SECTOR_BYTES
    }

    /// Sectors that the image does not hold are zeroes already in a dynamic disk. In a differencing one they have
    /// to be there to hide the parent's.
    fn write_zeroes(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<bool> {
        self.check_writable()?;
        if self.disk_type != DiskType::Differencing {
            self.for_each_run_there(guest_bytes, |host| self.storage.write_zeroes(host, may_unmap))?;
            return Ok(true);
        }
        let mut at = guest_bytes.start;
        while at < guest_bytes.end {
            let prepared = self.prepare_write(at..guest_bytes.end)?;
            let step = prepared.step();
            let len = step.guest_bytes.end - step.guest_bytes.start;
            self.storage.write_zeroes(step.at.0..step.at.0 + len, may_unmap)?;
            at = step.guest_bytes.end;
            prepared.commit()?;
        }
        Ok(true)
    }

    /// Space goes back to the host, inside the blocks: the file stays as long as it is, and no table changes.
    fn discard(&self, guest_bytes: Range<u64>) -> Result<()> {
        self.check_writable()?;
        if !self.storage.limits().can_punch {
            return Ok(());
        }
        self.for_each_run_there(guest_bytes, |host| self.storage.punch_hole(host))
    }

    fn flush(&self) -> Result<()> {
        self.check_writable()?;
        self.drain(&mut self.state())
    }

    fn resize(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.check_writable()?;
        self.grow(virtual_size_bytes, preallocation)
    }

    fn close(&self) -> Result<()> {
        self.flush()?;
        self.drop_spare_end()
    }
}

impl SparseLayer {
    /// Calls `change` with the host bytes of each run of sectors that is there.
    pub(super) fn for_each_run_there(
        &self,
        guest_bytes: Range<u64>,
        mut change: impl FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let mut extents = Vec::new();
        let mut at = guest_bytes.start;
        while at < guest_bytes.end {
            let end = self.map.guest_of(self.map.block_of(at)).end.min(guest_bytes.end);
            extents.clear();
            self.map_range(at..end, &mut extents)?;
            for extent in &extents {
                if let crate::format::Place::Data { at, .. } = extent.place {
                    change(at.0..at.0 + extent.len_bytes)?;
                }
            }
            at = end;
        }
        Ok(())
    }
}
