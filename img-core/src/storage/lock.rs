//! QEMU's image locking protocol: what a process does with a file, and what it lets others do.
//!
//! Each permission is one bit. A shared lock on byte `100 + bit` says "I use it", one on `200 + bit`
//! says "I do not let others use it". After taking its own locks a process looks for locks of others
//! that contradict them. Nothing is ever locked exclusively, so no process can be kept waiting.

use std::{
    os::fd::BorrowedFd,
    path::Path,
    sync::{Mutex, PoisonError},
};

use rustix::io::Errno;

use super::sys;
use crate::{Error, Result};

/// What can be done with an image: bit by bit, in the reference's order and words.
const PERMISSIONS: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];
const CONSISTENT_READ: u8 = 1 << 0;
const WRITE: u8 = 1 << 1;
const RESIZE: u8 = 1 << 3;

/// The byte that says "I use permission 0".
const USED_AT: u8 = 100;
/// The byte that says "I do not share permission 0".
const UNSHARED_AT: u8 = 200;

/// How an opened file is used towards other processes.
///
/// The sets are those that the reference was seen to lock. A format with metadata keeps others from
/// writing; raw has none, and the reference lets others do what they like with it except in `convert`
/// and `create`: the `Shared…` kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Nothing is locked and nothing is probed (`-U`; `info` of raw).
    Nothing,
    /// Metadata is looked at, data is not read (`info`): others may not resize or write.
    Inspect,
    /// Data is read; others may read and share, not write (any layer with metadata; the source of
    /// `convert` in any format).
    Read,
    /// Data is written: exclusive (any layer with metadata).
    Write,
    /// The file is being created and formatted.
    Create,
    /// Raw data is read; others may write it meanwhile (`map`, `check`, `compare`, `measure`, `dd`,
    /// raw backing files).
    SharedRead,
    /// Raw data is written, by others too (`convert -n` into raw).
    SharedWrite,
    /// A raw file is resized, and may be written by others (`resize`).
    SharedResize,
}

/// Bit sets over [`PERMISSIONS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Claim {
    uses: u8,
    unshared: u8,
}

impl Use {
    fn claim(self) -> Claim {
        let (uses, unshared) = match self {
            Self::Nothing => (0, 0),
            Self::Inspect => (0, WRITE | RESIZE),
            Self::Read => (CONSISTENT_READ, WRITE | RESIZE),
            Self::Write => (CONSISTENT_READ | WRITE | RESIZE, WRITE | RESIZE),
            Self::Create => (WRITE | RESIZE, RESIZE),
            Self::SharedRead => (CONSISTENT_READ, 0),
            Self::SharedWrite => (CONSISTENT_READ | WRITE, 0),
            Self::SharedResize => (CONSISTENT_READ | WRITE | RESIZE, 0),
        };
        Claim { uses, unshared }
    }
}

impl Claim {
    /// The bytes to lock, in the reference's order.
    fn bytes(self) -> impl Iterator<Item = u8> {
        bits(self.uses).map(|bit| USED_AT + bit).chain(bits(self.unshared).map(|bit| UNSHARED_AT + bit))
    }
}

fn bits(set: u8) -> impl Iterator<Item = u8> {
    (0u8..4).filter(move |bit| set & (1 << bit) != 0)
}

/// The locks held on one open file. They belong to the open file description: two openings in one
/// process exclude each other too.
#[derive(Debug, Default)]
pub(super) struct Locks {
    held: Mutex<Claim>,
}

impl Locks {
    /// Goes over to `wanted`. On failure what was held before is held still.
    ///
    /// # Errors
    /// [`Error::Locked`] for the first permission that another open file contradicts.
    pub(super) fn change(&self, fd: BorrowedFd<'_>, path: &Path, wanted: Use) -> Result<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = wanted.claim();
        // Our own wishes are visible before we look at those of others: of two processes that start at
        // the same time at least one sees the other.
        let taken = take(fd, path, *held, wanted).and_then(|()| find_conflict(fd, path, wanted));
        // What is locked now is `held` and a part of `wanted`; what stays is one of the two.
        let (kept, dropped) = if taken.is_ok() { (wanted, *held) } else { (*held, wanted) };
        for byte in dropped.bytes().filter(|byte| kept.bytes().all(|kept| kept != *byte)) {
            sys::unlock_byte(fd, byte).map_err(|errno| Error::io_at(path, "unlock", byte.into(), errno))?;
        }
        *held = kept;
        taken
    }

    /// Unlocks all before the file is closed. Closing alone would leave the locks in force for as long as
    /// a child process has a copy of the descriptor, which it has between `fork` and `exec`.
    pub(super) fn give_back(&mut self, fd: BorrowedFd<'_>) {
        let held = std::mem::take(self.held.get_mut().unwrap_or_else(PoisonError::into_inner));
        for byte in held.bytes() {
            if sys::unlock_byte(fd, byte).is_err() {
                return; // nobody to tell; closing does the same a moment later
            }
        }
    }
}

fn take(fd: BorrowedFd<'_>, path: &Path, held: Claim, wanted: Claim) -> Result<()> {
    for byte in wanted.bytes().filter(|byte| held.bytes().all(|held| held != *byte)) {
        sys::lock_byte(fd, byte).map_err(|errno| match errno {
            // Somebody outside the protocol holds the file exclusively.
            Errno::AGAIN | Errno::ACCESS => locked(path, byte),
            errno => Error::io_at(path, "lock", byte.into(), errno),
        })?;
    }
    Ok(())
}

/// Looks for others that do not share what we use, or use what we do not share.
fn find_conflict(fd: BorrowedFd<'_>, path: &Path, wanted: Claim) -> Result<()> {
    let contradicting = Claim { uses: wanted.unshared, unshared: wanted.uses };
    let probed = bits(contradicting.unshared)
        .map(|bit| (UNSHARED_AT + bit, USED_AT + bit))
        .chain(bits(contradicting.uses).map(|bit| (USED_AT + bit, UNSHARED_AT + bit)));
    for (theirs, ours) in probed {
        let taken = sys::others_lock_byte(fd, theirs)
            .map_err(|errno| Error::io_at(path, "probe lock", theirs.into(), errno))?;
        if taken {
            return Err(locked(path, ours));
        }
    }
    Ok(())
}

/// We could not have what locking `byte` says.
fn locked(path: &Path, byte: u8) -> Error {
    let (first, shared) = if byte >= UNSHARED_AT { (UNSHARED_AT, true) } else { (USED_AT, false) };
    Error::Locked { file: path.to_owned(), permission: PERMISSIONS[usize::from(byte - first)], shared }
}

#[cfg(test)]
mod tests;
