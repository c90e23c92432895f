//! I/O past the page cache (`O_DIRECT`): any request at any address, bounced only where it must be.
//!
//! Offsets and lengths on the device are multiples of a unit, addresses multiples of another. What
//! stands so goes straight through. Of the rest only the blocks at the edges are copied when the
//! middle can go straight, else all of it, in pieces. Blocks that are written in part are read
//! first; [`InFlight`] keeps writers of the same block from losing each other's bytes.

use std::{
    io::{IoSlice, IoSliceMut},
    ops::Range,
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{AtFlags, StatxFlags},
    io::Errno,
};

use super::{
    in_flight::{InFlight, Pass},
    transfer,
};

/// Bounced requests are served in pieces of at most this, so that memory does not follow their size.
const BOUNCE_BYTES: u64 = 1 << 20;

/// `STATX_DIOALIGN`: the kernel (6.1) and the file system tell the alignments.
const STATX_DIOALIGN: StatxFlags = StatxFlags::from_bits_retain(0x2000);

/// What is assumed of a file system that does not tell and cannot be tried.
const SAFE_UNIT_BYTES: u32 = 4096;

/// The rules of one file, and the writes under way.
#[derive(Debug)]
pub(super) struct Direct {
    /// Offsets and lengths are multiples of this; a power of two.
    unit_bytes: u64,
    /// Addresses are multiples of this; a power of two.
    address_bytes: usize,
    /// The unit of exclusion: at least a page, because `fallocate` zeroes the edges of its range through
    /// the page cache, and at least a block of the file system.
    granule_bytes: u64,
    /// Where the file ended when last seen; `None` for a device, which does not grow. A write that may
    /// move the end excludes all others at and behind it.
    end_bytes: Option<AtomicU64>,
    in_flight: InFlight,
}

impl Direct {
    /// Finds the rules of an open file. `block_bytes` is its `st_blksize` or sector size; `len_bytes` its
    /// length, if it is one that changes.
    pub(super) fn find(fd: BorrowedFd<'_>, block_bytes: u32, len_bytes: Option<u64>) -> Result<Self, Errno> {
        let (unit, address) = told(fd)?.unwrap_or_else(|| (tried(fd), SAFE_UNIT_BYTES));
        if unit == 0 || address == 0 || !unit.is_power_of_two() || !address.is_power_of_two() {
            return Err(Errno::INVAL);
        }
        let granule = u64::from(block_bytes.max(unit).max(4096)).next_power_of_two();
        Ok(Self {
            unit_bytes: u64::from(unit),
            address_bytes: usize::try_from(address).map_err(|_| Errno::INVAL)?,
            granule_bytes: granule,
            end_bytes: len_bytes.map(AtomicU64::new),
            in_flight: InFlight::default(),
        })
    }

    /// The unit of offsets and lengths.
    pub(super) fn unit_bytes(&self) -> u32 {
        u32::try_from(self.unit_bytes).expect("was a u32")
    }

    /// Fills `bufs`; zeroes behind the end.
    pub(super) fn read(
        &self,
        fd: BorrowedFd<'_>,
        bufs: &mut [IoSliceMut<'_>],
        at_bytes: u64,
    ) -> Result<(), Errno> {
        let end = at_bytes + transfer::total_mut(bufs); // the caller keeps it below MAX_LEN_BYTES
        if self.is_unit(at_bytes) && bufs.iter().all(|buf| self.is_straight(buf)) {
            return self.read_straight(fd, bufs, at_bytes);
        }
        let core = self.up(at_bytes)..self.down(end);
        if core.start < core.end {
            let mut middle = transfer::cut_mut(bufs, core.start - at_bytes, core.end - at_bytes);
            if middle.iter().all(|buf| self.is_straight(buf)) {
                self.read_straight(fd, &mut middle, core.start)?;
                self.read_bounced(fd, bufs, at_bytes, at_bytes..core.start)?;
                return self.read_bounced(fd, bufs, at_bytes, core.end..end);
            }
        }
        self.read_bounced(fd, bufs, at_bytes, at_bytes..end)
    }

    fn read_straight(&self, fd: BorrowedFd<'_>, bufs: &mut [IoSliceMut<'_>], at: u64) -> Result<(), Errno> {
        let done = transfer::read_fully(fd, bufs, at, self.unit_bytes)?;
        transfer::zero_from(bufs, done);
        Ok(())
    }

    /// Reads the bytes `part` of the file into their places in `bufs`, which begin at `at_bytes`.
    fn read_bounced(
        &self,
        fd: BorrowedFd<'_>,
        bufs: &mut [IoSliceMut<'_>],
        at_bytes: u64,
        part: Range<u64>,
    ) -> Result<(), Errno> {
        for piece in self.pieces(&part) {
            let mut bounce = self.bounce(piece.end - piece.start);
            self.read_straight(fd, &mut [IoSliceMut::new(bounce.bytes())], piece.start)?;
            let wanted = piece.start.max(part.start)..piece.end.min(part.end);
            let mut places = transfer::cut_mut(bufs, wanted.start - at_bytes, wanted.end - at_bytes);
            transfer::scatter(bounce.part(wanted.start - piece.start..wanted.end - piece.start), &mut places);
        }
        Ok(())
    }

    /// Writes all of `bufs`.
    pub(super) fn write(&self, fd: BorrowedFd<'_>, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<(), Errno> {
        let end = at_bytes + transfer::total(bufs); // the caller keeps it below MAX_LEN_BYTES
        let straight = self.is_unit(at_bytes) && bufs.iter().all(|buf| self.is_straight(buf));
        if straight && let Some(_pass) = self.enter_inside(at_bytes..end) {
            return transfer::write_fully(fd, bufs, at_bytes);
        }
        // Whole blocks are written: without care the file would end at the end of a block.
        let (_pass, reaches_end) = self.enter_alone(at_bytes..self.up(end));
        let moves_end = self.end_bytes.as_ref().filter(|_| reaches_end);
        let old_end = match moves_end {
            Some(_) => file_len(fd)?, // others may have made it longer; it must not be cut to what we saw
            None => 0,
        };
        if straight {
            transfer::write_fully(fd, bufs, at_bytes)?;
        } else {
            self.write_around(fd, bufs, at_bytes..end)?;
        }
        if let Some(seen) = moves_end {
            let new_end = old_end.max(end);
            if self.up(end) > new_end {
                rustix::io::retry_on_intr(|| rustix::fs::ftruncate(fd, new_end))?;
            }
            seen.store(new_end, Ordering::Release);
        }
        Ok(())
    }

    /// Writes `range`, straight in the middle where possible. The caller excludes other writers.
    fn write_around(&self, fd: BorrowedFd<'_>, bufs: &[IoSlice<'_>], range: Range<u64>) -> Result<(), Errno> {
        let core = self.up(range.start)..self.down(range.end);
        if core.start < core.end {
            let middle = transfer::cut(bufs, core.start - range.start, core.end - range.start);
            if middle.iter().all(|buf| self.is_straight(buf)) {
                transfer::write_fully(fd, &middle, core.start)?;
                self.write_bounced(fd, bufs, range.start, range.start..core.start)?;
                return self.write_bounced(fd, bufs, range.start, core.end..range.end);
            }
        }
        self.write_bounced(fd, bufs, range.start, range)
    }

    /// Writes the bytes `part` of the file from their places in `bufs`, which begin at `at_bytes`.
    fn write_bounced(
        &self,
        fd: BorrowedFd<'_>,
        bufs: &[IoSlice<'_>],
        at_bytes: u64,
        part: Range<u64>,
    ) -> Result<(), Errno> {
        for piece in self.pieces(&part) {
            let mut bounce = self.bounce(piece.end - piece.start);
            let last = piece.end - self.unit_bytes;
            if piece.start < part.start || (last == piece.start && part.end < piece.end) {
                let first = bounce.part_mut(0..self.unit_bytes);
                self.read_straight(fd, &mut [IoSliceMut::new(first)], piece.start)?;
            }
            if part.end < piece.end && last != piece.start {
                let block = bounce.part_mut(last - piece.start..piece.end - piece.start);
                self.read_straight(fd, &mut [IoSliceMut::new(block)], last)?;
            }
            let changed = piece.start.max(part.start)..piece.end.min(part.end);
            let source = transfer::cut(bufs, changed.start - at_bytes, changed.end - at_bytes);
            let place = changed.start - piece.start..changed.end - piece.start;
            transfer::gather(&source, bounce.part_mut(place));
            transfer::write_fully(fd, &[IoSlice::new(bounce.bytes())], piece.start)?;
        }
        Ok(())
    }

    /// Excludes all writers of `range` (and of all behind it, when it reaches the end) while `change`
    /// changes the file by other means than [`Self::write`].
    pub(super) fn alone<T>(
        &self,
        fd: BorrowedFd<'_>,
        range: Range<u64>,
        change: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let (_pass, reaches_end) = self.enter_alone(range);
        let changed = change();
        if reaches_end && let Some(seen) = &self.end_bytes {
            seen.store(file_len(fd)?, Ordering::Release);
        }
        changed
    }

    /// Lets a write of whole blocks in if it stays inside the file.
    fn enter_inside(&self, range: Range<u64>) -> Option<Pass<'_>> {
        let inside = || self.end_bytes.as_ref().is_none_or(|seen| range.end <= seen.load(Ordering::Acquire));
        if !inside() {
            return None;
        }
        let pass = self.in_flight.enter(self.granules(range.clone()), false);
        inside().then_some(pass) // the file may have been cut while we waited
    }

    /// Waits for sole use of `range`. When that may move the end of the file (`true`), of all behind it
    /// too: only then may the end be looked at and set.
    fn enter_alone(&self, range: Range<u64>) -> (Pass<'_>, bool) {
        loop {
            let end = self.end_bytes.as_ref().map_or(u64::MAX, |seen| seen.load(Ordering::Acquire));
            let reaches_end = range.end > end;
            let wanted =
                if reaches_end { range.start.min(end)..transfer::MAX_LEN_BYTES } else { range.clone() };
            let pass = self.in_flight.enter(self.granules(wanted), true);
            let moved = self.end_bytes.as_ref().is_some_and(|seen| seen.load(Ordering::Acquire) != end);
            if !moved {
                return (pass, reaches_end);
            }
        }
    }

    /// `part`, widened to whole units, in pieces that fit the bounce buffer.
    fn pieces(&self, part: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let (mut at, end) = if part.is_empty() { (0, 0) } else { (self.down(part.start), self.up(part.end)) };
        std::iter::from_fn(move || {
            let piece = at..end.min(at + BOUNCE_BYTES);
            at = piece.end;
            (!piece.is_empty()).then_some(piece)
        })
    }

    fn bounce(&self, len_bytes: u64) -> Bounce {
        let len = usize::try_from(len_bytes).expect("at most a piece");
        let memory = vec![0; len + self.address_bytes];
        let start = memory.as_ptr().align_offset(self.address_bytes);
        Bounce { memory, start, len }
    }

    fn is_unit(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.unit_bytes)
    }

    fn is_straight(&self, buf: &[u8]) -> bool {
        self.is_unit(buf.len() as u64) && buf.as_ptr().addr().is_multiple_of(self.address_bytes)
    }

    fn down(&self, offset: u64) -> u64 {
        offset - offset % self.unit_bytes
    }

    fn up(&self, offset: u64) -> u64 {
        offset.next_multiple_of(self.unit_bytes) // offsets are at most i64::MAX
    }

    fn granules(&self, range: Range<u64>) -> Range<u64> {
        range.start - range.start % self.granule_bytes..range.end.next_multiple_of(self.granule_bytes)
    }
}

/// Memory at an address that direct I/O takes.
struct Bounce {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Bounce {
    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }

    fn part_mut(&mut self, range: Range<u64>) -> &mut [u8] {
        let place = |at: u64| usize::try_from(at).expect("inside a piece");
        &mut self.bytes()[place(range.start)..place(range.end)]
    }

    fn part(&mut self, range: Range<u64>) -> &[u8] {
        self.part_mut(range)
    }
}

fn file_len(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    Ok(u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0))
}

/// The alignments of offsets and of addresses, where the kernel tells them. It tells 0 where direct
/// I/O is not possible.
fn told(fd: BorrowedFd<'_>) -> Result<Option<(u32, u32)>, Errno> {
    match rustix::fs::statx(fd.as_fd(), "", AtFlags::EMPTY_PATH, STATX_DIOALIGN) {
        Ok(stat) if stat.stx_mask & STATX_DIOALIGN.bits() != 0 => {
            Ok(Some((stat.stx_dio_offset_align, stat.stx_dio_mem_align)))
        }
        Ok(_) | Err(Errno::NOSYS) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The unit found by reading: 512 when such a read is answered.
fn tried(fd: BorrowedFd<'_>) -> u32 {
    let mut memory = vec![0; 512 + SAFE_UNIT_BYTES as usize];
    let start = memory.as_ptr().align_offset(SAFE_UNIT_BYTES as usize);
    // A short or failed read proves nothing (an empty file takes any): the larger unit always works.
    match rustix::io::pread(fd, &mut memory[start..start + 512], 0) {
        Ok(512) => 512,
        Ok(_) | Err(_) => SAFE_UNIT_BYTES,
    }
}
