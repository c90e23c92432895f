//! What is different on a block device: its size, and zeroing by whole sectors.

use std::{ops::Range, os::fd::BorrowedFd};

use rustix::{
    fs::{FallocateFlags, SeekFrom},
    io::Errno,
};

use super::{FileStorage, Storage, space, transfer};
use crate::Result;

/// The size of the device. The end of its address space is where the kernel keeps `BLKGETSIZE64`.
pub(super) fn len_bytes(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    rustix::fs::seek(fd, SeekFrom::End(0))
}

/// The unit of zeroing: a logical sector.
pub(super) fn granularity_bytes(fd: BorrowedFd<'_>) -> Result<u32, Errno> {
    Ok(rustix::fs::ioctl_blksszget(fd)?.max(512))
}

/// Zeroes a range and gives its space back; `false` when the device cannot promise both.
pub(super) fn punch(device: &FileStorage, sector: u32, range: &Range<u64>) -> Result<bool> {
    // On a device this is "write zeroes, unmapping, or fail": unlike BLKDISCARD it says what reads return.
    by_sectors(device, sector, range, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE)
}

/// Zeroes a range and keeps its space; `false` when the device has no quick way.
pub(super) fn zero(device: &FileStorage, sector: u32, range: &Range<u64>) -> Result<bool> {
    by_sectors(device, sector, range, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE)
}

fn by_sectors(device: &FileStorage, sector: u32, range: &Range<u64>, how: FallocateFlags) -> Result<bool> {
    let sector = u64::from(sector);
    let start = range.start.next_multiple_of(sector); // at most the device's end, a multiple itself
    let end = range.end / sector * sector;
    if start < end {
        let done = device.change("write zeroes", start..end, |fd| space::fallocate(fd, how, start..end))?;
        if !done {
            return Ok(false);
        }
    }
    let (head, tail) = (range.start..start.min(range.end), end.max(start.min(range.end))..range.end);
    for edge in [head, tail] {
        transfer::write_zeroes_by(edge, |bufs, at| device.write_vectored_at(bufs, at))?;
    }
    Ok(true)
}
