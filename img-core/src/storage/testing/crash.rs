//! The crash recorder: remembers every change and flush of one or several storages.

use std::{
    io::{IoSlice, IoSliceMut},
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::crash_states::CrashStates;
use crate::{
    Result,
    storage::{Flush, Identity, Limits, MemoryStorage, Preallocation, Storage, lock, transfer},
};

/// Remembers, in order, what is done to the storages that it [records](Self::record), and makes the
/// [states](Self::states) in which a power cut may leave them.
///
/// What such a state may be: everything that was done to a file before its last completed flush is
/// there. Of what came after, each operation happened, happened not, or happened in some of its 512-byte
/// sectors; a file that grew has its new length or not, whether or not the bytes arrived.
///
/// ```
/// # use std::sync::Arc;
/// # use img_core::storage::{Flush, MemoryStorage, Storage, testing::CrashRecorder};
/// let recorder = CrashRecorder::new();
/// let disk = recorder.record(Arc::new(MemoryStorage::new("disk")))?;
/// disk.write_at(b"data", 0)?;
/// disk.flush(Flush::Data)?;
/// recorder.mark(1); // from here on a crash must not lose the data
/// for state in recorder.states(42, 100) {
///     if state.mark == Some(1) {
///         assert_eq!(state.files[0].to_vec(), b"data");
///     }
/// }
/// # Ok::<(), img_core::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct CrashRecorder {
    log: Arc<Mutex<Log>>,
}

/// All that happened since recording began.
#[derive(Clone, Debug, Default)]
pub(super) struct Log {
    /// The files as they were when recording began: durable.
    pub(super) bases: Vec<Arc<MemoryStorage>>,
    pub(super) entries: Vec<Entry>,
}

/// One thing that happened.
#[derive(Clone, Debug)]
pub(super) enum Entry {
    /// A change of file number `file`.
    Change { file: usize, change: Arc<Change> },
    /// A flush of that file has returned.
    Flushed { file: usize },
    /// The test said where it is.
    Mark(u64),
}

/// A change of bytes or length.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Bytes; `grows` when the file became longer.
    Write { at: u64, bytes: Vec<u8>, grows: bool },
    /// Zeroes or a hole.
    Zero { range: Range<u64>, grows: bool },
    /// A new length.
    Resize { len: u64 },
}

impl CrashRecorder {
    /// Nothing recorded.
    pub fn new() -> Self {
        Self::default()
    }

    /// `inner`, recorded from now on; its present content counts as durable and is copied to memory. The
    /// files are numbered in the order of these calls.
    ///
    /// # Errors
    /// Those of reading `inner`.
    pub fn record(&self, inner: Arc<dyn Storage>) -> Result<Arc<dyn Storage>> {
        let base = copy_to_memory(&*inner)?;
        let mut log = self.log();
        log.bases.push(Arc::new(base));
        let file = log.bases.len() - 1;
        Ok(Arc::new(Recorded { inner, file, log: Arc::clone(&self.log) }))
    }

    /// Notes that the test has come to a point, such as "step 3 is flushed": [`super::CrashState::mark`] of later
    /// crashes is this value.
    pub fn mark(&self, value: u64) {
        self.log().entries.push(Entry::Mark(value));
    }

    /// How many changes and flushes were recorded.
    pub fn operations(&self) -> usize {
        self.log().entries.iter().filter(|entry| !matches!(entry, Entry::Mark(_))).count()
    }

    /// States after a crash at any moment so far: all of them when they are no more than `limit`, else
    /// `limit` of them chosen by `seed`, spread over all moments.
    pub fn states(&self, seed: u64, limit: usize) -> CrashStates {
        CrashStates::new(self.log().clone(), seed, limit)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Copies what is allocated.
fn copy_to_memory(storage: &dyn Storage) -> Result<MemoryStorage> {
    let copy = MemoryStorage::new(storage.path());
    let len = storage.len_bytes()?;
    copy.resize(len, Preallocation::Off)?;
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    while let Some(data) = storage.next_allocated(at)?.filter(|data| data.start < len) {
        at = data.start;
        let end = data.end.min(len);
        while at < end {
            let step = (end - at).min(buf.len() as u64);
            let piece = &mut buf[..usize::try_from(step).expect("at most the buffer")];
            storage.read_at(piece, at)?;
            if piece.iter().any(|&byte| byte != 0) {
                copy.write_at(piece, at)?;
            }
            at += step;
        }
    }
    Ok(copy)
}

/// A storage whose changes are noted. The log is locked while the change happens, so that it has the
/// order in which things happened.
#[derive(Debug)]
struct Recorded {
    inner: Arc<dyn Storage>,
    file: usize,
    log: Arc<Mutex<Log>>,
}

impl Recorded {
    /// Does `operation`, which changes bytes before `end`, and notes it. A change that failed on the way
    /// is noted too: some of it may have happened.
    fn note(
        &self,
        end: u64,
        change: impl FnOnce(u64) -> Change,
        operation: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let old_len = self.inner.len_bytes()?;
        let result = operation();
        let refused = !self.inner.is_writable() || end > transfer::MAX_LEN_BYTES;
        if result.is_ok() || !refused {
            log.entries.push(Entry::Change { file: self.file, change: Arc::new(change(old_len)) });
        }
        result
    }
}

impl Storage for Recorded {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn len_bytes(&self) -> Result<u64> {
        self.inner.len_bytes()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], at_bytes: u64) -> Result<()> {
        self.inner.read_vectored_at(bufs, at_bytes)
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(transfer::total(bufs)).expect("it is in memory")];
        transfer::gather(bufs, &mut bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        let end = at_bytes.saturating_add(bytes.len() as u64);
        self.note(
            end,
            |old_len| Change::Write { at: at_bytes, bytes, grows: end > old_len },
            || self.inner.write_vectored_at(bufs, at_bytes),
        )
    }

    fn flush(&self, what: Flush) -> Result<()> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.flush(what)?;
        log.entries.push(Entry::Flushed { file: self.file });
        Ok(())
    }

    fn resize(&self, len_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.note(
            len_bytes,
            |_| Change::Resize { len: len_bytes },
            || self.inner.resize(len_bytes, preallocation),
        )
    }

    fn preallocate(&self, range_bytes: Range<u64>, preallocation: Preallocation) -> Result<()> {
        if range_bytes.is_empty() {
            return Ok(());
        }
        // Only the length can be lost: what the range reads as does not change.
        self.note(
            range_bytes.end,
            |old_len| Change::Resize { len: old_len.max(range_bytes.end) },
            || self.inner.preallocate(range_bytes.clone(), preallocation),
        )
    }

    fn punch_hole(&self, range_bytes: Range<u64>) -> Result<()> {
        let range = range_bytes.clone();
        self.note(
            0, // what is behind the end is left alone
            |old_len| Change::Zero { range: range.start.min(old_len)..range.end.min(old_len), grows: false },
            || self.inner.punch_hole(range_bytes),
        )
    }

    fn write_zeroes(&self, range_bytes: Range<u64>, may_unmap: bool) -> Result<()> {
        if range_bytes.is_empty() {
            return Ok(());
        }
        let range = range_bytes.clone();
        self.note(
            range.end,
            |old_len| Change::Zero { grows: range.end > old_len, range },
            || self.inner.write_zeroes(range_bytes, may_unmap),
        )
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

    fn lock(&self, wanted: lock::Use) -> Result<()> {
        self.inner.lock(wanted)
    }
}
