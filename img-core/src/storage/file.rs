//! A regular file, block device or character device of the host, opened once.
//!
//! [`FileOptions`] opens, [`FileStorage`] does the I/O. The calls that give and take space are in `space`,
//! the way past the page cache is in `direct`, what is different on a block device in `block`.
//! The hot path is one system call an I/O: nothing here asks for the length before it reads or writes.

use std::{
    io::{IoSlice, IoSliceMut},
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicI32, Ordering},
    },
};

use rustix::io::Errno;

use super::{
    CacheMode, Flush, Identity, Limits, Preallocation, Storage, Watcher, block, direct::Direct, lock,
    offload, space, transfer,
};
use crate::{Error, Result, limits};

mod open;
mod set_aside;

pub use open::FileOptions;

/// A write at least this long is worth a sleep of those who wait for it.
const LONG_WRITE_BYTES: u64 = 64 << 10;

/// What the descriptor stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Has a length that changes.
    Regular,
    /// Has a size that stays.
    Block,
    /// `/dev/null` and the like: as in the reference, a device of no bytes.
    Character,
}

/// An open host file.
#[derive(Debug)]
pub struct FileStorage {
    path: PathBuf,
    fd: OwnedFd,
    kind: Kind,
    /// Past the page cache: how.
    direct: Option<Direct>,
    identity: Identity,
    block_bytes: u32,
    writable: bool,
    cache: CacheMode,
    /// Until the file system says that it cannot.
    punches: AtomicBool,
    /// Held by a long buffered write. The kernel lets one such write into a file at a time, and those who wait for
    /// that spin on their cores; here they sleep.
    long_write: Mutex<()>,
    /// Whether space is taken before it is written; unset until somebody is about to write much.
    reserves: AtomicBool,
    /// The errno of the first flush that failed, else 0. The kernel reports a lost page once; what the
    /// page cache holds afterwards is not what the disk holds, so no later flush may succeed.
    failed_flush: AtomicI32,
    /// Who is told of long writing for the sake of space.
    watcher: OnceLock<Arc<dyn Watcher>>,
    locks: lock::Locks,
}

impl FileStorage {
    /// The cache mode that it was opened with.
    pub fn cache(&self) -> CacheMode {
        self.cache
    }

    /// Whether this is a file with a length that changes, not a device.
    pub fn is_regular(&self) -> bool {
        self.kind == Kind::Regular
    }

    /// Asks the file system not to copy on write (btrfs). Only works on an empty file.
    ///
    /// # Errors
    /// When the file system has no such attribute.
    pub fn turn_off_copy_on_write(&self) -> Result<()> {
        let flags = rustix::fs::ioctl_getflags(&self.fd);
        flags
            .and_then(|flags| rustix::fs::ioctl_setflags(&self.fd, flags | rustix::fs::IFlags::NOCOW))
            .map_err(|errno| Error::io(&self.path, "turn off copy-on-write", errno))
    }

    /// Asks the file system to give space in pieces of `bytes` (XFS); 0 for no wish.
    ///
    /// # Errors
    /// When the file system has no such hints or not this one.
    pub fn set_extent_size_hint(&self, bytes: u32) -> Result<()> {
        super::sys::set_extent_size_hint(self.fd.as_fd(), bytes)
            .map_err(|errno| Error::io(&self.path, "set extent size hint", errno))
    }

    /// The extent size hint, where the file system has such hints and there is one.
    pub fn extent_size_hint(&self) -> Option<u32> {
        super::sys::extent_size_hint(self.fd.as_fd()).ok().filter(|bytes| *bytes > 0)
    }

    fn failed(&self, operation: &'static str, at_bytes: u64) -> impl Fn(Errno) -> Error + '_ {
        move |errno| Error::io_at(&self.path, operation, at_bytes, errno)
    }

    /// Refuses a change of `range_bytes` that is not allowed or cannot be.
    fn check_change(&self, operation: &'static str, range_bytes: &Range<u64>) -> Result<()> {
        if !self.writable {
            return Err(Error::ReadOnly { file: self.path.clone() });
        }
        if range_bytes.end > transfer::MAX_LEN_BYTES {
            return Err(Error::io_at(&self.path, operation, range_bytes.start, Errno::FBIG));
        }
        match self.kind {
            Kind::Regular => Ok(()),
            Kind::Block | Kind::Character => {
                if range_bytes.end > self.len_bytes()? {
                    return Err(Error::io_at(&self.path, operation, range_bytes.start, Errno::NOSPC));
                }
                Ok(())
            }
        }
    }

    /// Runs a system call that changes `range_bytes` (or the end of the file) in another way than by
    /// writing, with no direct write of the same blocks under way.
    pub(super) fn change<T>(
        &self,
        operation: &'static str,
        range_bytes: Range<u64>,
        call: impl FnOnce(BorrowedFd<'_>) -> Result<T, Errno>,
    ) -> Result<T> {
        let (fd, at) = (self.fd.as_fd(), range_bytes.start);
        let changed = match &self.direct {
            Some(direct) => direct.alone(fd, range_bytes, || call(fd)),
            None => call(fd),
        };
        changed.map_err(self.failed(operation, at))
    }

    /// After a change by `fallocate`: such calls do not heed `O_DSYNC` on every file system.
    fn settle(&self) -> Result<()> {
        if self.cache.writes_through() { self.flush(Flush::Data) } else { Ok(()) }
    }

    fn write_zeroes_plainly(&self, range_bytes: Range<u64>) -> Result<()> {
        transfer::write_zeroes_by(range_bytes, |bufs, at| self.write_vectored_at(bufs, at))
    }

    /// Lets a file end no earlier than `end_bytes`. Unlike `ftruncate` it can never cut off what
    /// another thread has just appended.
    fn grow_to(&self, end_bytes: u64) -> Result<()> {
        if self.kind != Kind::Regular || self.len_bytes()? >= end_bytes {
            return Ok(());
        }
        // `end_bytes` > the length >= 0, and the last byte is inside the range that is to read as zeroes.
        let last = end_bytes - 1..end_bytes;
        if self.change("grow", last.clone(), |fd| space::zero_range(fd, last))? {
            return Ok(());
        }
        self.write_at(&[0], end_bytes - 1)
    }

    fn stat(&self) -> Result<rustix::fs::Stat> {
        rustix::fs::fstat(&self.fd).map_err(|errno| Error::io(&self.path, "stat", errno))
    }
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        self.locks.give_back(self.fd.as_fd());
    }
}

impl Storage for FileStorage {
    fn path(&self) -> &Path {
        &self.path
    }

    fn len_bytes(&self) -> Result<u64> {
        match self.kind {
            Kind::Regular => Ok(u64::try_from(self.stat()?.st_size).unwrap_or(0)),
            Kind::Block => {
                block::len_bytes(self.fd.as_fd()).map_err(|errno| Error::io(&self.path, "size", errno))
            }
            Kind::Character => Ok(0),
        }
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], at_bytes: u64) -> Result<()> {
        let wanted = transfer::total_mut(bufs);
        if self.kind == Kind::Character || at_bytes >= transfer::MAX_LEN_BYTES {
            transfer::zero_from(bufs, 0);
            return Ok(());
        }
        let possible = transfer::MAX_LEN_BYTES - at_bytes;
        if wanted > possible {
            transfer::zero_from(bufs, possible);
            return self.read_vectored_at(&mut transfer::cut_mut(bufs, 0, possible), at_bytes);
        }
        let read = match &self.direct {
            Some(direct) => direct.read(self.fd.as_fd(), bufs, at_bytes),
            None => transfer::read_fully(self.fd.as_fd(), bufs, at_bytes, 1).map(|done| {
                if done < wanted {
                    transfer::zero_from(bufs, done);
                }
            }),
        };
        read.map_err(self.failed("read", at_bytes))
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<()> {
        let end = at_bytes.saturating_add(transfer::total(bufs));
        if end == at_bytes {
            return Ok(());
        }
        // The hot path has nothing to ask first: at the end of a device the kernel says so.
        if !self.writable || self.kind == Kind::Character || end > transfer::MAX_LEN_BYTES {
            self.check_change("write", &(at_bytes..end))?;
        }
        limits::take_output(&self.path, end - at_bytes)?;
        let written = match &self.direct {
            Some(direct) => direct.write(self.fd.as_fd(), bufs, at_bytes),
            None => {
                // Guards nothing but the order of waiting, so a panic elsewhere spoils nothing.
                let _turn = (end - at_bytes >= LONG_WRITE_BYTES)
                    .then(|| self.long_write.lock().unwrap_or_else(PoisonError::into_inner));
                transfer::write_fully(self.fd.as_fd(), bufs, at_bytes)
            }
        };
        written.map_err(self.failed("write", at_bytes))
    }

    fn flush(&self, what: Flush) -> Result<()> {
        if !self.writable || self.cache == CacheMode::Unsafe || self.kind == Kind::Character {
            return Ok(());
        }
        let failed = |errno: Errno| Error::io(&self.path, "flush", errno);
        let earlier = self.failed_flush.load(Ordering::Relaxed);
        if earlier != 0 {
            return Err(failed(Errno::from_raw_os_error(earlier)));
        }
        let flushed = rustix::io::retry_on_intr(|| match what {
            Flush::Data => rustix::fs::fdatasync(&self.fd),
            Flush::All => rustix::fs::fsync(&self.fd),
        });
        flushed.map_err(|errno| {
            self.sync_failed(errno);
            failed(errno)
        })
    }

    fn flushes_by_sync(&self) -> bool {
        self.writable
            && self.cache != CacheMode::Unsafe
            && self.kind != Kind::Character
            && self.failed_flush.load(Ordering::Relaxed) == 0
    }

    fn sync_failed(&self, errno: Errno) {
        self.failed_flush.store(errno.raw_os_error(), Ordering::Relaxed);
    }

    fn resize(&self, len_bytes: u64, preallocation: Preallocation) -> Result<()> {
        if !self.writable {
            return Err(Error::ReadOnly { file: self.path.clone() });
        }
        let old = self.len_bytes()?;
        if self.kind != Kind::Regular {
            // The reference's words; a device may hold a shorter image than it could.
            return if len_bytes > old {
                Err(Error::Invalid("Cannot grow device files".into()))
            } else {
                Ok(())
            };
        }
        if len_bytes > transfer::MAX_LEN_BYTES {
            return Err(Error::io_at(&self.path, "resize", len_bytes, Errno::FBIG));
        }
        if len_bytes < old && preallocation != Preallocation::Off {
            return Err(Error::Invalid("Preallocation can't be used for shrinking files".into()));
        }
        let truncate = |len: u64| {
            self.change("resize", len.min(old)..transfer::MAX_LEN_BYTES, |fd| {
                rustix::io::retry_on_intr(|| rustix::fs::ftruncate(fd, len))
            })
        };
        if len_bytes != old {
            truncate(len_bytes)?;
        }
        if let Err(error) = self.fill_growth(old, len_bytes, preallocation) {
            truncate(old)?; // what could be had is given back: a full disk stays usable
            return Err(error);
        }
        self.settle()
    }

    fn preallocate(&self, range_bytes: Range<u64>, preallocation: Preallocation) -> Result<()> {
        self.set_aside(range_bytes, preallocation)
    }

    fn watch_filling(&self, watcher: &Arc<dyn Watcher>) {
        self.watcher.get_or_init(|| Arc::clone(watcher));
    }

    fn will_write(&self, range_bytes: Range<u64>) {
        let len_bytes = range_bytes.end.saturating_sub(range_bytes.start);
        if len_bytes < space::WORTH_RESERVING_BYTES || !self.reserves.load(Ordering::Relaxed) {
            return;
        }
        let _turn = self.long_write.lock().unwrap_or_else(PoisonError::into_inner);
        // A refusal costs nothing: the write takes its space by itself, or tells why it cannot.
        if !matches!(space::reserve_kept_size(self.fd.as_fd(), range_bytes), Ok(true)) {
            self.reserves.store(false, Ordering::Relaxed);
        }
    }

    fn punch_hole(&self, range_bytes: Range<u64>) -> Result<()> {
        let range = range_bytes.start..range_bytes.end.min(self.len_bytes()?);
        if range.is_empty() {
            return if self.writable { Ok(()) } else { Err(Error::ReadOnly { file: self.path.clone() }) };
        }
        self.check_change("punch hole", &range)?;
        if self.punches.load(Ordering::Relaxed) {
            let done = match self.kind {
                Kind::Block => block::punch(self, self.block_bytes, &range)?,
                Kind::Regular | Kind::Character => {
                    self.change("punch hole", range.clone(), |fd| space::punch(fd, range.clone()))?
                }
            };
            if done {
                return self.settle();
            }
            self.punches.store(false, Ordering::Relaxed);
        }
        self.write_zeroes(range, false)
    }

    fn write_zeroes(&self, range_bytes: Range<u64>, may_unmap: bool) -> Result<()> {
        if range_bytes.is_empty() {
            return Ok(());
        }
        self.check_change("write zeroes", &range_bytes)?;
        if may_unmap && self.punches.load(Ordering::Relaxed) {
            self.punch_hole(range_bytes.clone())?;
            return self.grow_to(range_bytes.end);
        }
        // Where the host has no short way they are counted once more, as they are written.
        limits::take_output(&self.path, range_bytes.end - range_bytes.start)?;
        let done = match self.kind {
            Kind::Block => block::zero(self, self.block_bytes, &range_bytes)?,
            Kind::Regular | Kind::Character => self.change("write zeroes", range_bytes.clone(), |fd| {
                space::zero_range(fd, range_bytes.clone())
            })?,
        };
        if done { self.settle() } else { self.write_zeroes_plainly(range_bytes) }
    }

    fn next_allocated(&self, from_bytes: u64) -> Result<Option<Range<u64>>> {
        let found = match self.kind {
            Kind::Character => return Ok(None),
            Kind::Block | Kind::Regular if from_bytes > transfer::MAX_LEN_BYTES => return Ok(None),
            Kind::Block | Kind::Regular => space::next_data(self.fd.as_fd(), from_bytes),
        };
        match found.map_err(self.failed("find data", from_bytes))? {
            space::Found::Data(range) => Ok(Some(range)),
            space::Found::HolesOnly => Ok(None),
            space::Found::CannotTell => {
                let len = self.len_bytes()?;
                Ok((from_bytes < len).then_some(from_bytes..len))
            }
        }
    }

    fn allocated_bytes(&self) -> Result<u64> {
        // POSIX leaves the unit open; Linux counts 512-byte units whatever the block size.
        Ok(u64::try_from(self.stat()?.st_blocks).unwrap_or(0).saturating_mul(512))
    }

    fn modified_unix_seconds(&self) -> Result<Option<i64>> {
        Ok(Some(self.stat()?.st_mtime))
    }

    fn identity(&self) -> Option<Identity> {
        Some(self.identity)
    }

    fn limits(&self) -> Limits {
        Limits {
            alignment_bytes: self.direct.as_ref().map_or(1, Direct::unit_bytes),
            block_bytes: self.block_bytes,
            can_punch: self.punches.load(Ordering::Relaxed),
        }
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }

    fn copy_from(
        &self,
        source: &dyn Storage,
        source_at_bytes: u64,
        at_bytes: u64,
        len_bytes: u64,
    ) -> Result<u64> {
        let end = at_bytes.saturating_add(len_bytes);
        self.check_change("copy", &(at_bytes..end))?;
        let Some(source_fd) = source.as_fd() else { return Ok(0) };
        // Past the page cache the kernel has no shorter way than reading and writing.
        if self.kind != Kind::Regular || self.direct.is_some() || source_at_bytes > transfer::MAX_LEN_BYTES {
            return Ok(0);
        }
        let copied = offload::copy(source_fd, source_at_bytes, self.fd.as_fd(), at_bytes, len_bytes)
            .map_err(self.failed("copy", at_bytes))?;
        limits::take_output(&self.path, copied)?;
        self.settle()?;
        Ok(copied)
    }

    fn lock(&self, wanted: lock::Use) -> Result<()> {
        self.locks.change(self.fd.as_fd(), &self.path, wanted)
    }
}

#[cfg(test)]
mod tests;
