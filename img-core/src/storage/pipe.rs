//! A place that is written front to back, once: standard output, a pipe.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use crate::{Error, Result, limits};

/// Zeroes that fill gaps.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// What is written without ever going back.
pub struct Pipe {
    out: Box<dyn io::Write + Send>,
    name: PathBuf,
    written_bytes: u64,
}

impl fmt::Debug for Pipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipe")
            .field("name", &self.name)
            .field("written_bytes", &self.written_bytes)
            .finish_non_exhaustive()
    }
}

impl Pipe {
    /// What is written goes to `out`, called `name` in errors.
    pub fn new(out: Box<dyn io::Write + Send>, name: impl Into<PathBuf>) -> Self {
        Self { out, name: name.into(), written_bytes: 0 }
    }

    /// The name used in error messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.name
    }

    /// How much was written so far.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Writes all of `bytes` behind what is there.
    ///
    /// # Errors
    /// [`Error::Io`] with the place, a reader that has gone included: whoever waits for an image must know that it
    /// is not whole.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        limits::take_output(&self.name, bytes.len() as u64)?;
        self.out
            .write_all(bytes)
            .map_err(|error| Error::io_at(&self.name, "write", self.written_bytes, error))?;
        self.written_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Writes zeroes up to `at_bytes`.
    ///
    /// # Errors
    /// [`Error::Io`] as [`Self::put`].
    ///
    /// # Panics
    /// Behind `at_bytes`: a layout that goes back is a mistake of ours.
    pub fn pad_to(&mut self, at_bytes: u64) -> Result<()> {
        assert!(self.written_bytes <= at_bytes, "a layout never goes back");
        while self.written_bytes < at_bytes {
            let left = usize::try_from(at_bytes - self.written_bytes).unwrap_or(usize::MAX);
            self.put(&ZEROES[..left.min(ZEROES.len())])?;
        }
        Ok(())
    }

    /// Hands on what was written.
    ///
    /// # Errors
    /// [`Error::Io`] as [`Self::put`].
    pub fn flush(&mut self) -> Result<()> {
        self.out.flush().map_err(|error| Error::io(&self.name, "flush", error))
    }
}
