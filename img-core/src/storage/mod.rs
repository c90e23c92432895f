//! Bytes of one host object.
//!
//! A [`Storage`] is a flat run of bytes that can be read, written, resized and flushed by position,
//! from many threads at once. It knows nothing of disk image formats. The implementations are a
//! regular file or block device, memory, and the crash recorder of the tests.

use std::{
    fmt,
    io::{IoSlice, IoSliceMut},
    ops::Range,
    os::fd::BorrowedFd,
    path::Path,
    sync::Arc,
};

use rustix::io::Errno;

use crate::Result;

mod block;
mod direct;
mod file;
mod in_flight;
pub mod lock;
mod memory;
#[cfg(test)]
mod model_tests;
mod null;
mod offload;
mod pipe;
mod space;
mod stream;
mod sys;
pub mod testing;
pub(crate) mod transfer;
mod unwrap;
mod window;

pub use file::{FileOptions, FileStorage};
pub use memory::MemoryStorage;
pub(crate) use null::NullStorage;
pub use pipe::Pipe;
pub use stream::StreamStorage;
pub use unwrap::{UnwrapOptions, Wrapper, unwrap};
pub use window::DetectZeroes;
pub(crate) use window::{Window, window_bytes};

/// How the host page cache is used, by the reference's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// O_DIRECT; flushes are honoured.
    None,
    /// Page cache; flushes are honoured.
    #[default]
    Writeback,
    /// Page cache; every write is flushed.
    Writethrough,
    /// O_DIRECT; every write is flushed.
    Directsync,
    /// Page cache; flushes are ignored.
    Unsafe,
}

impl CacheMode {
    /// Whether the page cache is bypassed.
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether a write returns only when it is durable.
    pub fn writes_through(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }

    /// The mode of that name (`none`, `writeback`, `writethrough`, `directsync`, `unsafe`; `off` is the
    /// reference's old word for `none`).
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "none" | "off" => Self::None,
            "writeback" => Self::Writeback,
            "writethrough" => Self::Writethrough,
            "directsync" => Self::Directsync,
            "unsafe" => Self::Unsafe,
            _ => return None,
        })
    }
}

/// What a flush must make durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// File contents, and the metadata needed to read them back (`fdatasync`).
    Data,
    /// Everything, time stamps included (`fsync`).
    All,
}

/// How host space is set aside for a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preallocation {
    /// No space is taken: the range may be a hole.
    Off,
    /// Space is reserved by the file system, unwritten (`fallocate`).
    Falloc,
    /// Zeroes are written.
    Full,
}

/// Who watches while space is taken by writing.
pub trait Watcher: Send + Sync + fmt::Debug {
    /// So many bytes more are written.
    ///
    /// # Errors
    /// [`Error::Cancelled`](crate::Error::Cancelled) where it is to stop.
    fn filled(&self, bytes: u64) -> Result<()>;
}

/// What makes two host objects the same one, however they are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// `st_dev`, or `st_rdev` for a block device.
    pub device: u64,
    /// `st_ino`, or 0 for a block device.
    pub inode: u64,
}

/// Alignment rules and sizes of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of direct I/O are multiples of this; 1 when any byte will do. Callers may
    /// ignore it: an unaligned request is served through a bounce buffer at its edges.
    pub alignment_bytes: u32,
    /// The unit in which the host allocates and punches holes (`st_blksize`, or the discard granularity).
    pub block_bytes: u32,
    /// Whether a hole can be punched or a range discarded to give space back.
    pub can_punch: bool,
}

/// Bytes of one host object, by position. All methods may block on I/O; all may be called from many
/// threads at once. Overlapping concurrent writes leave one or the other in each byte.
pub trait Storage: Send + Sync + fmt::Debug {
    /// The name used in error messages.
    fn path(&self) -> &Path;

    /// What the reference calls the way in which it is reached.
    fn protocol(&self) -> &'static str {
        "file"
    }

    /// The present length.
    fn len_bytes(&self) -> Result<u64>;

    /// Fills all of `bufs` from `at` on. Bytes past the end read as zeroes.
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], at_bytes: u64) -> Result<()>;

    /// Writes all of `bufs` from `at` on, growing a file where needed (a gap reads as zeroes).
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<()>;

    /// Returns when everything written before the call is durable. A no-op in cache mode `unsafe`.
    fn flush(&self, what: Flush) -> Result<()>;

    /// Sets the length. New bytes read as zeroes and are set aside as `preallocation` says.
    fn resize(&self, len_bytes: u64, preallocation: Preallocation) -> Result<()>;

    /// Sets space aside for a range without changing what it reads as, growing the file where needed.
    fn preallocate(&self, range_bytes: Range<u64>, preallocation: Preallocation) -> Result<()>;

    /// From now on `watcher` is told of each piece that [`Preallocation::Full`] writes. Where it stops the work, that
    /// fails as on a full disk. The first watcher stays.
    fn watch_filling(&self, watcher: &Arc<dyn Watcher>) {
        let _ = watcher;
    }

    /// Hint: all of the range is about to be written, in order. A storage may take its space at once where that is
    /// cheaper than block by block. Never changes what is there or the length, and never fails: a disk that is
    /// full says so to the write.
    fn will_write(&self, range_bytes: Range<u64>) {
        let _ = range_bytes;
    }

    /// Gives the host space of a range back; afterwards it reads as zeroes. Never changes the length.
    fn punch_hole(&self, range_bytes: Range<u64>) -> Result<()>;

    /// Makes a range read as zeroes, growing the file where needed. With `may_unmap` its space may be
    /// given back; without, it stays allocated.
    fn write_zeroes(&self, range_bytes: Range<u64>, may_unmap: bool) -> Result<()>;

    /// The first run of allocated bytes at or after `from_bytes`, cut at the start: `None` when only
    /// holes follow. A storage that cannot tell calls everything up to its end allocated.
    fn next_allocated(&self, from_bytes: u64) -> Result<Option<Range<u64>>>;

    /// Whether bytes that are not allocated are promised to be zeroes.
    fn holes_read_as_zeroes(&self) -> bool {
        true
    }

    /// Host space taken, as `st_blocks` counts it.
    fn allocated_bytes(&self) -> Result<u64>;

    /// When the contents were last changed, in seconds since 1970; `None` for memory.
    fn modified_unix_seconds(&self) -> Result<Option<i64>> {
        Ok(None)
    }

    /// The identity of the host object; `None` for memory.
    fn identity(&self) -> Option<Identity>;

    /// The host object and the place in it of the first byte, where equal places of equal origins hold the same
    /// bytes; `None` where that is not known.
    fn origin(&self) -> Option<(Identity, u64)> {
        self.identity().map(|identity| (identity, 0))
    }

    /// Alignment and hole-punching rules.
    fn limits(&self) -> Limits;

    /// Whether it was opened for writing.
    fn is_writable(&self) -> bool;

    /// The descriptor, where there is one, for copy offload between files and for a data plane.
    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Whether a [flush](Self::flush) of data is now one `fdatasync` of the descriptor, which a data plane may do
    /// instead. It tells [`Self::sync_failed`] when that failed.
    fn flushes_by_sync(&self) -> bool {
        false
    }

    /// A sync that was done instead of a flush has failed with `errno`: no later flush succeeds.
    fn sync_failed(&self, errno: Errno) {
        let _ = errno;
    }

    /// Copies up to `len_bytes` from `source` without taking them through this process, and returns how
    /// many were copied, counted from the front. Fewer, or none, where the host cannot do it or the source
    /// ends: the caller reads and writes the rest.
    fn copy_from(
        &self,
        source: &dyn Storage,
        source_at_bytes: u64,
        at_bytes: u64,
        len_bytes: u64,
    ) -> Result<u64> {
        let _ = (source, source_at_bytes, at_bytes, len_bytes);
        Ok(0)
    }

    /// The storage that this one is a view of, and where its first byte stands there; `None` for one of its own.
    fn below(&self) -> Option<(&dyn Storage, u64)> {
        None
    }

    /// Takes up changed wishes towards other processes (QEMU's byte-range locks); see
    /// [`lock`]. A storage without locks agrees to everything.
    fn lock(&self, _use: lock::Use) -> Result<()> {
        Ok(())
    }

    /// [`Self::read_vectored_at`] into one buffer.
    fn read_at(&self, buf: &mut [u8], at_bytes: u64) -> Result<()> {
        self.read_vectored_at(&mut [IoSliceMut::new(buf)], at_bytes)
    }

    /// [`Self::write_vectored_at`] from one buffer.
    fn write_at(&self, buf: &[u8], at_bytes: u64) -> Result<()> {
        self.write_vectored_at(&[IoSlice::new(buf)], at_bytes)
    }
}
