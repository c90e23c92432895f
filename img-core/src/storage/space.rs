//! Giving and taking host space of a regular file: `fallocate` and `SEEK_DATA`.
//!
//! Each function says by `false` that the file system does not do it; falling back is the caller's.

use std::{ops::Range, os::fd::BorrowedFd};

use rustix::{
    fs::{FallocateFlags, SeekFrom},
    io::Errno,
};

/// Frees the space of a range inside the file; it then reads as zeroes.
pub(super) fn punch(fd: BorrowedFd<'_>, range: Range<u64>) -> Result<bool, Errno> {
    fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range)
}

/// Zeroes a range and keeps or takes its space, growing the file.
pub(super) fn zero_range(fd: BorrowedFd<'_>, range: Range<u64>) -> Result<bool, Errno> {
    fallocate(fd, FallocateFlags::ZERO_RANGE, range)
}

/// Takes space for a range without changing what is there, growing the file.
pub(super) fn reserve(fd: BorrowedFd<'_>, range: Range<u64>) -> Result<bool, Errno> {
    if range.is_empty() {
        return Ok(true);
    }
    fallocate(fd, FallocateFlags::empty(), range)
}

/// Below this a call of its own costs more than it saves.
pub(super) const WORTH_RESERVING_BYTES: u64 = 64 << 10;

/// Whether the file system takes space more cheaply in one go than write by write. ext4 delays allocation
/// and then accounts for it block by block; others do as well either way, and tmpfs would clear pages.
pub(super) fn is_cheaper_reserved(fd: BorrowedFd<'_>) -> bool {
    /// `f_type` of ext2, ext3 and ext4 (linux/magic.h).
    const EXT4_SUPER_MAGIC: u64 = 0xef53;
    rustix::fs::fstatfs(fd).is_ok_and(|stat| u64::try_from(stat.f_type) == Ok(EXT4_SUPER_MAGIC))
}

/// Takes space for a range that is about to be written, leaving the length as it is.
pub(super) fn reserve_kept_size(fd: BorrowedFd<'_>, range: Range<u64>) -> Result<bool, Errno> {
    fallocate(fd, FallocateFlags::KEEP_SIZE, range)
}

pub(super) fn fallocate(fd: BorrowedFd<'_>, how: FallocateFlags, range: Range<u64>) -> Result<bool, Errno> {
    match rustix::io::retry_on_intr(|| rustix::fs::fallocate(fd, how, range.start, range.end - range.start)) {
        Ok(()) => Ok(true),
        // INVAL and NODEV: what some file systems and devices answer instead of OPNOTSUPP.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// What `SEEK_DATA` says.
pub(super) enum Found {
    /// The next run of data.
    Data(Range<u64>),
    /// None follows.
    HolesOnly,
    /// The file system keeps no such record.
    CannotTell,
}

/// The first data at or after `from`.
pub(super) fn next_data(fd: BorrowedFd<'_>, from: u64) -> Result<Found, Errno> {
    // These calls move the shared file position, which nothing here uses.
    let start = match rustix::fs::seek(fd, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(Found::HolesOnly),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Found::CannotTell),
        Err(errno) => return Err(errno),
    };
    match rustix::fs::seek(fd, SeekFrom::Hole(start)) {
        // A hole where data was a moment ago: another thread punched it. Call the byte data.
        Ok(end) => Ok(Found::Data(start..end.max(start.saturating_add(1)))),
        Err(Errno::NXIO) => Ok(Found::HolesOnly), // cut off meanwhile
        Err(errno) => Err(errno),
    }
}
