//! Setting space aside, by the file system's word or by writing zeroes.

use std::{ops::Range, os::fd::AsFd};

use rustix::io::Errno;

use super::{FileStorage, Kind};
use crate::{
    Error, Result, limits,
    storage::{Preallocation, Storage, space, transfer},
};

impl FileStorage {
    /// [`Storage::preallocate`].
    pub(super) fn set_aside(&self, range_bytes: Range<u64>, preallocation: Preallocation) -> Result<()> {
        if range_bytes.is_empty() {
            return Ok(());
        }
        self.check_change("preallocate", &range_bytes)?;
        if self.kind != Kind::Regular {
            return Ok(()); // a device has its space
        }
        let old = self.len_bytes()?;
        let inside = range_bytes.start.min(old)..range_bytes.end.min(old);
        let behind = range_bytes.start.max(old)..range_bytes.end;
        match preallocation {
            Preallocation::Off => self.grow_to(range_bytes.end),
            Preallocation::Falloc => {
                limits::take_output(&self.path, range_bytes.end - range_bytes.start)?;
                if self.reserve(range_bytes)? {
                    return self.settle();
                }
                self.refuse_to_overwrite(&inside)?;
                self.take_by_writing(behind)
            }
            Preallocation::Full => {
                self.fill_holes(inside)?;
                self.fill(behind)
            }
        }
    }

    /// Takes space for `old..len` of a file that has just grown to `len`.
    pub(super) fn fill_growth(&self, old: u64, len: u64, preallocation: Preallocation) -> Result<()> {
        match preallocation {
            Preallocation::Off => Ok(()),
            Preallocation::Falloc => {
                limits::take_output(&self.path, len - old)?;
                if self.reserve(old..len)? { Ok(()) } else { self.take_by_writing(old..len) }
            }
            Preallocation::Full => self.fill(old..len),
        }
    }

    /// Has the file system set space aside; false where it cannot, and only writing takes space.
    fn reserve(&self, range_bytes: Range<u64>) -> Result<bool> {
        self.change("preallocate", range_bytes.clone(), |fd| space::reserve(fd, range_bytes))
    }

    /// Writing zeroes over what is there would lose it.
    fn refuse_to_overwrite(&self, inside: &Range<u64>) -> Result<()> {
        if inside.is_empty() {
            Ok(())
        } else {
            Err(self.failed("preallocate", inside.start)(Errno::OPNOTSUPP))
        }
    }

    /// Writes zeroes to have their space, and tells who watches.
    fn take_by_writing(&self, range_bytes: Range<u64>) -> Result<()> {
        transfer::write_zeroes_by(range_bytes, |bufs, at| {
            self.write_vectored_at(bufs, at)?;
            self.watcher.get().map_or(Ok(()), |watcher| watcher.filled(transfer::total(bufs)))
        })
    }

    /// Takes space by writing where a range of the file has holes; what is there stays.
    fn fill_holes(&self, range_bytes: Range<u64>) -> Result<()> {
        let Range { start: mut at, end } = range_bytes;
        while at < end {
            let data = match space::next_data(self.fd.as_fd(), at).map_err(self.failed("find data", at))? {
                space::Found::Data(data) => data.start.min(end)..data.end.min(end),
                space::Found::HolesOnly => end..end,
                space::Found::CannotTell => {
                    let rest = at..end;
                    return if self.reserve(rest.clone())? {
                        Ok(())
                    } else {
                        self.refuse_to_overwrite(&rest)
                    };
                }
            };
            self.fill(at..data.start)?;
            at = data.end;
        }
        Ok(())
    }

    /// The same, in the reference's words where it fails.
    fn fill(&self, range_bytes: Range<u64>) -> Result<()> {
        self.take_by_writing(range_bytes).map_err(|error| match error {
            Error::Io { file, at_bytes, source, .. } => {
                Error::Io { file, operation: "write zeros for preallocation", at_bytes, source }
            }
            other => other,
        })
    }
}
