//! A storage that asks a hook before every operation.

use std::{
    fmt,
    io::{IoSlice, IoSliceMut},
    ops::Range,
    os::fd::BorrowedFd,
    path::Path,
    sync::Arc,
};

use crate::{
    Result,
    storage::{Flush, Identity, Limits, Preallocation, Storage, lock, transfer},
};

/// The kinds of operations on a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Reading bytes.
    Read,
    /// Writing bytes.
    Write,
    /// Writing zeroes.
    Zero,
    /// Punching a hole.
    Punch,
    /// Changing the length.
    Resize,
    /// Setting space aside.
    Preallocate,
    /// Making durable.
    Flush,
}

impl Operation {
    /// Whether it changes bytes, length, space or durability: all but reading.
    pub fn is_change(self) -> bool {
        self != Self::Read
    }

    /// The word for error messages.
    pub(super) fn verb(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Zero => "write zeroes",
            Self::Punch => "punch hole",
            Self::Resize => "resize",
            Self::Preallocate => "preallocate",
            Self::Flush => "flush",
        }
    }
}

/// One operation that is about to happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What.
    pub operation: Operation,
    /// Where; for a resize from the new length on, for a flush everything.
    pub range_bytes: Range<u64>,
}

/// Looks at every operation before it happens.
pub(super) trait Hook: Send + Sync + fmt::Debug {
    /// Waits, fails, or lets the operation happen.
    fn before(&self, path: &Path, request: &Request) -> Result<()>;
}

/// `inner` behind a hook.
#[derive(Debug)]
pub(super) struct Interposed<H> {
    pub(super) inner: Arc<dyn Storage>,
    pub(super) hook: H,
}

impl<H: Hook> Interposed<H> {
    fn ask(&self, operation: Operation, range_bytes: Range<u64>) -> Result<()> {
        self.hook.before(self.inner.path(), &Request { operation, range_bytes })
    }
}

impl<H: Hook> Storage for Interposed<H> {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn len_bytes(&self) -> Result<u64> {
        self.inner.len_bytes()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], at_bytes: u64) -> Result<()> {
        self.ask(Operation::Read, at_bytes..at_bytes.saturating_add(transfer::total_mut(bufs)))?;
        self.inner.read_vectored_at(bufs, at_bytes)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<()> {
        self.ask(Operation::Write, at_bytes..at_bytes.saturating_add(transfer::total(bufs)))?;
        self.inner.write_vectored_at(bufs, at_bytes)
    }

    fn flush(&self, what: Flush) -> Result<()> {
        self.ask(Operation::Flush, 0..u64::MAX)?;
        self.inner.flush(what)
    }

    fn resize(&self, len_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.ask(Operation::Resize, len_bytes..u64::MAX)?;
        self.inner.resize(len_bytes, preallocation)
    }

    fn preallocate(&self, range_bytes: Range<u64>, preallocation: Preallocation) -> Result<()> {
        self.ask(Operation::Preallocate, range_bytes.clone())?;
        self.inner.preallocate(range_bytes, preallocation)
    }

    fn punch_hole(&self, range_bytes: Range<u64>) -> Result<()> {
        self.ask(Operation::Punch, range_bytes.clone())?;
        self.inner.punch_hole(range_bytes)
    }

    fn write_zeroes(&self, range_bytes: Range<u64>, may_unmap: bool) -> Result<()> {
        self.ask(Operation::Zero, range_bytes.clone())?;
        self.inner.write_zeroes(range_bytes, may_unmap)
    }

    fn next_allocated(&self, from_bytes: u64) -> Result<Option<Range<u64>>> {
        self.inner.next_allocated(from_bytes)
    }

    fn allocated_bytes(&self) -> Result<u64> {
        self.inner.allocated_bytes()
    }

    fn identity(&self) -> Option<Identity> {
        self.inner.identity()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn is_writable(&self) -> bool {
        self.inner.is_writable()
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None // I/O on the descriptor would pass the hook by
    }

    fn lock(&self, wanted: lock::Use) -> Result<()> {
        self.inner.lock(wanted)
    }
}

/// Implements [`Storage`] for a public wrapper by its field `storage`.
macro_rules! delegate_storage {
    ($wrapper:ty) => {
        impl $crate::storage::Storage for $wrapper {
            fn path(&self) -> &std::path::Path {
                self.storage.path()
            }
            fn len_bytes(&self) -> $crate::Result<u64> {
                self.storage.len_bytes()
            }
            fn read_vectored_at(
                &self,
                bufs: &mut [std::io::IoSliceMut<'_>],
                at_bytes: u64,
            ) -> $crate::Result<()> {
                self.storage.read_vectored_at(bufs, at_bytes)
            }
            fn write_vectored_at(&self, bufs: &[std::io::IoSlice<'_>], at_bytes: u64) -> $crate::Result<()> {
                self.storage.write_vectored_at(bufs, at_bytes)
            }
            fn flush(&self, what: $crate::storage::Flush) -> $crate::Result<()> {
                self.storage.flush(what)
            }
            fn resize(&self, len: u64, how: $crate::storage::Preallocation) -> $crate::Result<()> {
                self.storage.resize(len, how)
            }
            fn preallocate(
                &self,
                range: std::ops::Range<u64>,
                how: $crate::storage::Preallocation,
            ) -> $crate::Result<()> {
                self.storage.preallocate(range, how)
            }
            fn punch_hole(&self, range: std::ops::Range<u64>) -> $crate::Result<()> {
                self.storage.punch_hole(range)
            }
            fn write_zeroes(&self, range: std::ops::Range<u64>, may_unmap: bool) -> $crate::Result<()> {
                self.storage.write_zeroes(range, may_unmap)
            }
            fn next_allocated(&self, from: u64) -> $crate::Result<Option<std::ops::Range<u64>>> {
                self.storage.next_allocated(from)
            }
            fn allocated_bytes(&self) -> $crate::Result<u64> {
                self.storage.allocated_bytes()
            }
            fn identity(&self) -> Option<$crate::storage::Identity> {
                self.storage.identity()
            }
            fn limits(&self) -> $crate::storage::Limits {
                self.storage.limits()
            }
            fn is_writable(&self) -> bool {
                self.storage.is_writable()
            }
            fn lock(&self, wanted: $crate::storage::lock::Use) -> $crate::Result<()> {
                self.storage.lock(wanted)
            }
        }
    };
}
pub(super) use delegate_storage;
