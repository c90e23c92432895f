//! A storage that keeps nothing: the protocols `null-co` and `null-aio` of the reference, to measure everything but
//! the host's disk with.

use std::{
    io::{IoSlice, IoSliceMut},
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Flush, Identity, Limits, Preallocation, Storage};
use crate::{Error, Result};

/// What one is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NullStorage {
    /// How it is named in messages.
    pub(crate) name: PathBuf,
    /// The protocol that it is opened as.
    pub(crate) protocol: &'static str,
    pub(crate) len_bytes: u64,
    /// Whether zeroes are promised. Without, the reference's readers get what was in their memory; ours get zeroes
    /// too, and nobody is told that they would.
    pub(crate) reads_zeroes: bool,
    /// How long each read, write and flush takes.
    pub(crate) latency: Duration,
    pub(crate) writable: bool,
}

impl NullStorage {
    /// The time that the host's disk would have taken.
    fn wait(&self) {
        if !self.latency.is_zero() {
            std::thread::sleep(self.latency);
        }
    }

    fn change(&self) -> Result<()> {
        if !self.writable {
            return Err(Error::ReadOnly { file: self.name.clone() });
        }
        self.wait();
        Ok(())
    }
}

impl Storage for NullStorage {
    fn path(&self) -> &Path {
        &self.name
    }

    fn protocol(&self) -> &'static str {
        self.protocol
    }

    fn len_bytes(&self) -> Result<u64> {
        Ok(self.len_bytes)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], _at_bytes: u64) -> Result<()> {
        self.wait();
        bufs.iter_mut().for_each(|buf| buf.fill(0));
        Ok(())
    }

    fn write_vectored_at(&self, _bufs: &[IoSlice<'_>], _at_bytes: u64) -> Result<()> {
        self.change()
    }

    fn flush(&self, _what: Flush) -> Result<()> {
        self.wait();
        Ok(())
    }

    fn resize(&self, len_bytes: u64, _preallocation: Preallocation) -> Result<()> {
        if len_bytes == self.len_bytes {
            return Ok(());
        }
        Err(Error::Invalid("Image format driver does not support resize".to_owned()))
    }

    fn preallocate(&self, _range_bytes: Range<u64>, _preallocation: Preallocation) -> Result<()> {
        self.change()
    }

    fn punch_hole(&self, _range_bytes: Range<u64>) -> Result<()> {
        self.change()
    }

    fn write_zeroes(&self, _range_bytes: Range<u64>, _may_unmap: bool) -> Result<()> {
        self.change()
    }

    fn next_allocated(&self, _from_bytes: u64) -> Result<Option<Range<u64>>> {
        Ok(None)
    }

    fn holes_read_as_zeroes(&self) -> bool {
        self.reads_zeroes
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(0)
    }

    fn identity(&self) -> Option<Identity> {
        None
    }

    fn limits(&self) -> Limits {
        Limits { alignment_bytes: 1, block_bytes: 4096, can_punch: true }
    }

    fn is_writable(&self) -> bool {
        self.writable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null(writable: bool) -> NullStorage {
        NullStorage {
            name: "null-co://".into(),
            protocol: "null-co",
            len_bytes: 4096,
            reads_zeroes: false,
            latency: Duration::from_millis(2),
            writable,
        }
    }

    #[test]
    fn nothing_is_kept_and_everything_takes_its_time() -> Result<()> {
        let storage = null(true);
        let before = std::time::Instant::now();
        storage.write_at(b"x", 0)?;
        let mut buf = [1; 2];
        storage.read_at(&mut buf, 0)?;
        storage.flush(Flush::Data)?;
        assert_eq!(buf, [0; 2]);
        assert!(before.elapsed() >= Duration::from_millis(6));
        assert_eq!((storage.len_bytes()?, storage.next_allocated(0)?), (4096, None));
        assert!(storage.resize(8192, Preallocation::Off).is_err());
        Ok(())
    }

    #[test]
    fn one_that_is_read_is_not_written() {
        let storage = null(false);
        assert!(matches!(storage.write_at(b"x", 0), Err(Error::ReadOnly { .. })));
        assert!(matches!(storage.punch_hole(0..512), Err(Error::ReadOnly { .. })));
    }
}
