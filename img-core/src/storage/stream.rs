//! Bytes that arrive front to back, once: standard input, a pipe, what comes out of a decompressor.
//!
//! A reader that asks in the order of the stream gets what a file would give it. What has passed is gone, but for the
//! first [`HEAD_BYTES`], where formats have their tables, and the last [`TAIL_BYTES`].

use std::{
    collections::VecDeque,
    fmt,
    io::{self, IoSlice, IoSliceMut},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{Flush, Identity, Limits, Preallocation, Storage};
use crate::{Error, Result};

/// What is kept of the start.
const HEAD_BYTES: usize = 16 << 20;

/// What is kept of what passed last: more than a stored cluster may take, and as far as packed clusters usually lie
/// behind their neighbours.
const TAIL_BYTES: usize = 16 << 20;

/// How much is read at once.
const READ_BYTES: usize = 256 << 10;

/// See the module.
pub struct StreamStorage {
    path: PathBuf,
    state: Mutex<State>,
}

struct State {
    input: Box<dyn io::Read + Send>,
    /// What one read brings.
    buffer: Vec<u8>,
    head: Vec<u8>,
    tail: VecDeque<u8>,
    /// How much was read.
    at_bytes: u64,
    has_ended: bool,
}

impl fmt::Debug for StreamStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamStorage").field("path", &self.path).finish_non_exhaustive()
    }
}

impl StreamStorage {
    /// What `input` gives, called `name` in errors.
    pub fn new(input: Box<dyn io::Read + Send>, name: impl Into<PathBuf>) -> Self {
        let (buffer, head, tail) = (Vec::new(), Vec::new(), VecDeque::new());
        let state = State { input, buffer, head, tail, at_bytes: 0, has_ended: false };
        Self { path: name.into(), state: Mutex::new(state) }
    }

    /// How many of the `len_bytes` from `at_bytes` on there are: fewer only where the stream ends. They are kept for
    /// the next read.
    ///
    /// # Errors
    /// [`Error::Io`] when the input cannot be read.
    ///
    /// # Panics
    /// When more is asked for than can be kept.
    pub fn available(&self, at_bytes: u64, len_bytes: usize) -> Result<usize> {
        assert!(len_bytes <= TAIL_BYTES - READ_BYTES, "more than is kept");
        let mut state = self.state();
        let end = at_bytes.saturating_add(len_bytes as u64);
        state.advance(end).map_err(|error| Error::io_at(&self.path, "read", state.at_bytes, error))?;
        Ok(usize::try_from(state.at_bytes.saturating_sub(at_bytes)).unwrap_or(usize::MAX).min(len_bytes))
    }

    /// Reads what is left and drops it; the length of the whole stream.
    ///
    /// # Errors
    /// [`Error::Io`] when the input cannot be read: a compressed stream whose sum is wrong, say.
    pub fn drain(&self) -> Result<u64> {
        let mut state = self.state();
        while !state.has_ended {
            let next = state.at_bytes + READ_BYTES as u64;
            state.advance(next).map_err(|error| Error::io_at(&self.path, "read", state.at_bytes, error))?;
        }
        Ok(state.at_bytes)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse(&self, what: &'static str) -> Error {
        let read_only = rustix::io::Errno::BADF.raw_os_error();
        Error::io(&self.path, what, io::Error::from_raw_os_error(read_only))
    }
}

impl State {
    /// Reads until `end` is behind us, or the stream has ended.
    fn advance(&mut self, end: u64) -> io::Result<()> {
        self.buffer.resize(READ_BYTES, 0);
        while self.at_bytes < end && !self.has_ended {
            let count = match self.input.read(&mut self.buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.has_ended = count == 0;
            self.at_bytes += count as u64;
            self.keep(count);
        }
        Ok(())
    }

    /// Keeps the first `count` bytes of the buffer, and no more of what passed than is to be kept.
    fn keep(&mut self, count: usize) {
        let read = &self.buffer[..count];
        self.head.extend_from_slice(&read[..count.min(HEAD_BYTES - self.head.len())]);
        let over = (self.tail.len() + count).saturating_sub(TAIL_BYTES);
        self.tail.drain(..over);
        let wanted = self.tail.len() + count;
        if wanted > self.tail.capacity() {
            // By doubling, as it would itself, but not beyond what is ever in it.
            self.tail.reserve_exact((2 * wanted).min(TAIL_BYTES) - self.tail.len());
        }
        self.tail.extend(read);
    }

    /// Copies from what is kept; `None` when some of it is gone. All of it was read.
    fn copy(&self, buf: &mut [u8], at_bytes: u64) -> Option<()> {
        let tail_at = self.at_bytes - self.tail.len() as u64;
        if let Some(from) = at_bytes.checked_sub(tail_at) {
            let from = usize::try_from(from).ok()?;
            let (front, back) = self.tail.as_slices();
            let in_front = front.len().saturating_sub(from).min(buf.len());
            let (first, second) = buf.split_at_mut(in_front);
            if !first.is_empty() {
                first.copy_from_slice(&front[from..from + in_front]);
            }
            let from = (from + in_front) - front.len().min(from + in_front);
            second.copy_from_slice(back.get(from..from + second.len())?);
            return Some(());
        }
        let from = usize::try_from(at_bytes).ok()?;
        buf.copy_from_slice(self.head.get(from..from.checked_add(buf.len())?)?);
        Some(())
    }
}

impl Storage for StreamStorage {
    fn path(&self) -> &Path {
        &self.path
    }

    /// Nobody knows before the end: as long as a file may be.
    fn len_bytes(&self) -> Result<u64> {
        Ok(i64::MAX as u64)
    }

    /// A stream that ends before is an error, not zeroes.
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], at_bytes: u64) -> Result<()> {
        let mut at_bytes = at_bytes;
        let mut state = self.state();
        for buf in bufs {
            let end = at_bytes.saturating_add(buf.len() as u64);
            state.advance(end).map_err(|error| Error::io_at(&self.path, "read", state.at_bytes, error))?;
            if state.at_bytes < end {
                return Err(Error::corrupt(
                    &self.path,
                    "stream",
                    state.at_bytes,
                    format_args!("data up to byte {end:#x}"),
                    "the end of the stream: the image is not complete",
                ));
            }
            if state.copy(buf, at_bytes).is_none() {
                return Err(Error::unsupported(
                    &self.path,
                    format_args!(
                        "an image that is not laid out front to back: its byte {at_bytes:#x} is asked for when {:#x} \
                         have passed; reading it from a pipe (a file, or --spool DIR, can be read in any order)",
                        state.at_bytes
                    ),
                ));
            }
            at_bytes = end;
        }
        Ok(())
    }

    fn write_vectored_at(&self, _bufs: &[IoSlice<'_>], _at_bytes: u64) -> Result<()> {
        Err(self.refuse("write"))
    }

    fn flush(&self, _what: Flush) -> Result<()> {
        Ok(())
    }

    fn resize(&self, _len_bytes: u64, _preallocation: Preallocation) -> Result<()> {
        Err(self.refuse("resize"))
    }

    fn preallocate(&self, _range_bytes: Range<u64>, _preallocation: Preallocation) -> Result<()> {
        Err(self.refuse("preallocate"))
    }

    fn punch_hole(&self, _range_bytes: Range<u64>) -> Result<()> {
        Err(self.refuse("punch a hole"))
    }

    fn write_zeroes(&self, _range_bytes: Range<u64>, _may_unmap: bool) -> Result<()> {
        Err(self.refuse("write zeroes"))
    }

    fn next_allocated(&self, from_bytes: u64) -> Result<Option<Range<u64>>> {
        Ok(Some(from_bytes..i64::MAX as u64))
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(0)
    }

    fn identity(&self) -> Option<Identity> {
        None
    }

    fn limits(&self) -> Limits {
        Limits { alignment_bytes: 1, block_bytes: 4096, can_punch: false }
    }

    fn is_writable(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at / 7).to_le_bytes()[0] ^ (at / 4099).to_le_bytes()[0]).collect()
    }

    /// Gives a prime number of bytes at a time.
    struct Drops(io::Cursor<Vec<u8>>);

    impl io::Read for Drops {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let most = buf.len().min(65_521);
            self.0.read(&mut buf[..most])
        }
    }

    #[test]
    fn what_is_kept_is_what_passed_and_the_rest_is_gone() {
        let bytes = counted(60 << 20);
        let stream = StreamStorage::new(Box::new(Drops(io::Cursor::new(bytes.clone()))), "stream");
        let read = |at: usize, len: usize| {
            let mut buf = vec![0; len];
            stream.read_at(&mut buf, at as u64).map(|()| assert!(buf == bytes[at..at + len], "{at} {len}"))
        };
        read(1000, 100_000).expect("the start");
        read(50 << 20, 1 << 20).expect("forward");
        read((50 << 20) - (1 << 20), 2 << 20).expect("a little back");
        read(5, 16 << 20).expect_err("the head and more");
        read(5, (16 << 20) - 5).expect("the head");
        read(16 << 20, 1).expect_err("gone");
        assert_eq!(stream.available(59 << 20, 2 << 20).expect("readable"), 1 << 20);
        read(59 << 20, 1 << 20).expect("kept");
        read(59 << 20, (1 << 20) + 1).expect_err("the end is no zero");
        assert_eq!(stream.drain().expect("readable"), 60 << 20);
    }
}
