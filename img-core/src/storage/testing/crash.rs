//! The crash recorder: remembers every change and flush of one or several storages.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    crash_states::CrashStates,
    interpose::{Action, Hook, Interposed},
};
use crate::{
    Result,
    storage::{MemoryStorage, Preallocation, Storage, transfer},
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
        Ok(Arc::new(Interposed { inner, hook: Recording { file, log: Arc::clone(&self.log) } }))
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

/// Notes what changes a storage. The log is locked while it happens, so that it has the order in which things happened.
#[derive(Debug)]
struct Recording {
    file: usize,
    log: Arc<Mutex<Log>>,
}

impl Hook for Recording {
    /// A change that failed on the way is noted too: some of it may have happened.
    fn act(&self, storage: &dyn Storage, action: Action<'_>) -> Result<()> {
        let file = self.file;
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Action::Flush(_) = action {
            action.apply(storage)?;
            log.entries.push(Entry::Flushed { file });
            return Ok(());
        }
        let change = change_of(action, storage.len_bytes()?);
        let result = action.apply(storage);
        let is_refused = !storage.is_writable() || end_of(action) > transfer::MAX_LEN_BYTES;
        if let Some(change) = change.filter(|_| result.is_ok() || !is_refused) {
            log.entries.push(Entry::Change { file, change: Arc::new(change) });
        }
        result
    }
}

/// What an action makes of a file of that length; `None` where it changes nothing.
fn change_of(action: Action<'_>, old_len: u64) -> Option<Change> {
    if action.request().range_bytes.is_empty() {
        return None;
    }
    let end = end_of(action);
    Some(match action {
        Action::Flush(_) => return None,
        Action::Write(bufs, at) => {
            let mut bytes = vec![0; usize::try_from(transfer::total(bufs)).expect("it is in memory")];
            transfer::gather(bufs, &mut bytes);
            Change::Write { at, bytes, grows: end > old_len }
        }
        Action::Resize(len, _) => Change::Resize { len },
        // Only the length can be lost: what the range reads as does not change.
        Action::Preallocate(..) => Change::Resize { len: old_len.max(end) },
        Action::Punch(range) => {
            Change::Zero { range: range.start.min(old_len)..range.end.min(old_len), grows: false }
        }
        Action::Zero(range, _) => Change::Zero { range: range.clone(), grows: end > old_len },
    })
}

/// How far an action reaches that may make the file longer. What is behind the end is left alone by a hole.
fn end_of(action: Action<'_>) -> u64 {
    match action {
        Action::Flush(_) | Action::Punch(_) => 0,
        Action::Resize(len, _) => len,
        Action::Write(..) | Action::Preallocate(..) | Action::Zero(..) => action.request().range_bytes.end,
    }
}
