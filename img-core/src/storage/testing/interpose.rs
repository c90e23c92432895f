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

/// An operation that changes a storage, and all that it takes to do it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Action<'a> {
    /// Bytes, from a place on.
    Write(&'a [IoSlice<'a>], u64),
    /// Durability.
    Flush(Flush),
    /// A length.
    Resize(u64, Preallocation),
    /// Space for a range.
    Preallocate(&'a Range<u64>, Preallocation),
    /// No space for a range.
    Punch(&'a Range<u64>),
    /// Zeroes in a range; whether its space may be given back.
    Zero(&'a Range<u64>, bool),
}

impl Action<'_> {
    /// What it is, without its bytes.
    pub(super) fn request(&self) -> Request {
        let (operation, range_bytes) = match *self {
            Self::Write(bufs, at) => (Operation::Write, at..at.saturating_add(transfer::total(bufs))),
            Self::Flush(_) => (Operation::Flush, 0..u64::MAX),
            Self::Resize(len_bytes, _) => (Operation::Resize, len_bytes..u64::MAX),
            Self::Preallocate(range, _) => (Operation::Preallocate, range.clone()),
            Self::Punch(range) => (Operation::Punch, range.clone()),
            Self::Zero(range, _) => (Operation::Zero, range.clone()),
        };
        Request { operation, range_bytes }
    }

    /// Does it.
    pub(super) fn apply(self, storage: &dyn Storage) -> Result<()> {
        match self {
            Self::Write(bufs, at) => storage.write_vectored_at(bufs, at),
            Self::Flush(what) => storage.flush(what),
            Self::Resize(len_bytes, preallocation) => storage.resize(len_bytes, preallocation),
            Self::Preallocate(range, preallocation) => storage.preallocate(range.clone(), preallocation),
            Self::Punch(range) => storage.punch_hole(range.clone()),
            Self::Zero(range, may_unmap) => storage.write_zeroes(range.clone(), may_unmap),
        }
    }
}

/// Looks at every operation before it happens.
pub(super) trait Hook: Send + Sync + fmt::Debug {
    /// Waits, fails, or lets the operation happen.
    fn before(&self, path: &Path, request: &Request) -> Result<()> {
        let (_, _) = (path, request);
        Ok(())
    }

    /// Does it to `storage`, or not.
    fn act(&self, storage: &dyn Storage, action: Action<'_>) -> Result<()> {
        self.before(storage.path(), &action.request())?;
        action.apply(storage)
    }
}

/// `inner` behind a hook.
#[derive(Debug)]
pub(super) struct Interposed<H> {
    pub(super) inner: Arc<dyn Storage>,
    pub(super) hook: H,
}

impl<H: Hook> Interposed<H> {
    fn act(&self, action: Action<'_>) -> Result<()> {
        self.hook.act(&*self.inner, action)
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
        let range_bytes = at_bytes..at_bytes.saturating_add(transfer::total_mut(bufs));
        self.hook.before(self.inner.path(), &Request { operation: Operation::Read, range_bytes })?;
        self.inner.read_vectored_at(bufs, at_bytes)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<()> {
        self.act(Action::Write(bufs, at_bytes))
    }

    fn flush(&self, what: Flush) -> Result<()> {
        self.act(Action::Flush(what))
    }

    fn resize(&self, len_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.act(Action::Resize(len_bytes, preallocation))
    }

    fn preallocate(&self, range_bytes: Range<u64>, preallocation: Preallocation) -> Result<()> {
        self.act(Action::Preallocate(&range_bytes, preallocation))
    }

    fn punch_hole(&self, range_bytes: Range<u64>) -> Result<()> {
        self.act(Action::Punch(&range_bytes))
    }

    fn write_zeroes(&self, range_bytes: Range<u64>, may_unmap: bool) -> Result<()> {
        self.act(Action::Zero(&range_bytes, may_unmap))
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
