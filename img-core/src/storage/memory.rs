//! A sparse storage in memory, for tests, fuzzers and the crash recorder.

use std::{
    collections::BTreeMap,
    io::{IoSlice, IoSliceMut},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use super::{Flush, Identity, Limits, Preallocation, Storage, transfer};
use crate::{Error, Result};

/// The unit of allocation: a chunk is there or it is a hole.
const CHUNK_BYTES: u64 = 4096;
const CHUNK_LEN: usize = 4096;

type Chunk = Arc<[u8; CHUNK_LEN]>;

/// Bytes in memory with holes. A [`snapshot`](Self::snapshot) shares all chunks until one side writes.
#[derive(Debug)]
pub struct MemoryStorage {
    path: PathBuf,
    writable: bool,
    alignment_bytes: u32,
    content: RwLock<Content>,
}

/// The bytes themselves; bytes of a chunk behind the length are always zero.
#[derive(Clone, Debug, Default)]
struct Content {
    len_bytes: u64,
    chunks: BTreeMap<u64, Chunk>,
}

impl MemoryStorage {
    /// An empty, writable storage. `name` stands in error messages.
    pub fn new(name: impl Into<PathBuf>) -> Self {
        Self::of(name.into(), Content::default())
    }

    /// A writable storage with these bytes; runs of zeroes become holes.
    pub fn from_bytes(name: impl Into<PathBuf>, bytes: &[u8]) -> Self {
        let mut content = Content { len_bytes: bytes.len() as u64, chunks: BTreeMap::new() };
        for (index, part) in (0u64..).zip(bytes.chunks(CHUNK_LEN)) {
            if part.iter().any(|&byte| byte != 0) {
                let mut chunk = [0; CHUNK_LEN];
                chunk[..part.len()].copy_from_slice(part);
                content.chunks.insert(index, Arc::new(chunk));
            }
        }
        Self::of(name.into(), content)
    }

    fn of(path: PathBuf, content: Content) -> Self {
        Self { path, writable: true, alignment_bytes: 1, content: RwLock::new(content) }
    }

    /// The same bytes, refusing changes.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.writable = false;
        self
    }

    /// The same bytes, with [limits](Limits::alignment_bytes) as of a file that is not read through the page cache. Any
    /// request is taken nevertheless.
    #[must_use]
    pub fn aligned_to(mut self, alignment_bytes: u32) -> Self {
        self.alignment_bytes = alignment_bytes;
        self
    }

    /// An independent, writable copy of the present state; costs a pointer for each chunk.
    #[must_use]
    pub fn snapshot(&self) -> Self {
        Self::of(self.path.clone(), self.read().clone())
    }

    /// All bytes. Meant for small test images: holes are filled in.
    ///
    /// # Panics
    /// When the length does not fit the address space.
    pub fn to_vec(&self) -> Vec<u8> {
        let content = self.read();
        let mut bytes = vec![0; usize::try_from(content.len_bytes).expect("a small test image")];
        content.read(&mut bytes, 0);
        bytes
    }

    fn read(&self) -> RwLockReadGuard<'_, Content> {
        // A panic of another thread inside the lock leaves whole chunks: the content stays usable.
        self.content.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> Result<RwLockWriteGuard<'_, Content>> {
        if !self.writable {
            return Err(Error::ReadOnly { file: self.path.clone() });
        }
        Ok(self.content.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// `start..end` when no byte of it is past the longest possible file.
    fn checked(&self, operation: &'static str, at_bytes: u64, len_bytes: u64) -> Result<Range<u64>> {
        match at_bytes.checked_add(len_bytes) {
            Some(end) if end <= transfer::MAX_LEN_BYTES => Ok(at_bytes..end),
            _ => Err(Error::io_at(&self.path, operation, at_bytes, rustix::io::Errno::FBIG)),
        }
    }
}

impl Storage for MemoryStorage {
    fn path(&self) -> &Path {
        &self.path
    }

    fn len_bytes(&self) -> Result<u64> {
        Ok(self.read().len_bytes)
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], at_bytes: u64) -> Result<()> {
        let content = self.read();
        let mut at = at_bytes;
        for buf in bufs {
            content.read(buf, at);
            at = at.saturating_add(buf.len() as u64);
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<()> {
        let range = self.checked("write", at_bytes, transfer::total(bufs))?;
        let mut content = self.write()?;
        let mut at = range.start;
        for buf in bufs {
            content.write(buf, at);
            at += buf.len() as u64;
        }
        Ok(())
    }

    fn flush(&self, _what: Flush) -> Result<()> {
        Ok(())
    }

    fn resize(&self, len_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.checked("resize", len_bytes, 0)?;
        let mut content = self.write()?;
        let old = content.len_bytes;
        if len_bytes < old && preallocation != Preallocation::Off {
            return Err(Error::Invalid("Preallocation can't be used for shrinking files".into()));
        }
        content.set_len(len_bytes);
        if preallocation != Preallocation::Off {
            content.fill_holes(old..len_bytes);
        }
        Ok(())
    }

    fn preallocate(&self, range_bytes: Range<u64>, preallocation: Preallocation) -> Result<()> {
        if range_bytes.is_empty() {
            return Ok(());
        }
        self.checked("preallocate", range_bytes.end, 0)?;
        let mut content = self.write()?;
        let len_bytes = content.len_bytes.max(range_bytes.end);
        content.set_len(len_bytes);
        if preallocation != Preallocation::Off {
            content.fill_holes(range_bytes);
        }
        Ok(())
    }

    fn punch_hole(&self, range_bytes: Range<u64>) -> Result<()> {
        self.write()?.zero(range_bytes, true);
        Ok(())
    }

    fn write_zeroes(&self, range_bytes: Range<u64>, may_unmap: bool) -> Result<()> {
        if range_bytes.is_empty() {
            return Ok(());
        }
        self.checked("write zeroes", range_bytes.end, 0)?;
        let mut content = self.write()?;
        let len_bytes = content.len_bytes.max(range_bytes.end);
        content.set_len(len_bytes);
        content.zero(range_bytes.clone(), may_unmap);
        if !may_unmap {
            content.fill_holes(range_bytes);
        }
        Ok(())
    }

    fn next_allocated(&self, from_bytes: u64) -> Result<Option<Range<u64>>> {
        let content = self.read();
        let mut chunks = content.chunks.range(from_bytes / CHUNK_BYTES..).map(|(&index, _)| index);
        let Some(first) = chunks.next() else { return Ok(None) };
        let last = chunks.zip(first + 1..).take_while(|(index, next)| index == next).last();
        let end = last.map_or(first, |(index, _)| index) + 1;
        let range = (first * CHUNK_BYTES).max(from_bytes)..(end * CHUNK_BYTES).min(content.len_bytes);
        Ok((!range.is_empty()).then_some(range))
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.read().chunks.len() as u64 * CHUNK_BYTES)
    }

    fn identity(&self) -> Option<Identity> {
        None
    }

    fn limits(&self) -> Limits {
        Limits { alignment_bytes: self.alignment_bytes, block_bytes: 4096, can_punch: true }
    }

    fn is_writable(&self) -> bool {
        self.writable
    }
}

impl Content {
    /// The pieces of `at_bytes..at_bytes + len` chunk by chunk: chunk index, place in the chunk, place in
    /// the buffer.
    fn pieces(at_bytes: u64, len: usize) -> impl Iterator<Item = (u64, usize, Range<usize>)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let at = at_bytes.checked_add(done as u64).filter(|_| done < len)?;
            let start = usize::try_from(at % CHUNK_BYTES).expect("less than a chunk");
            let piece = done..len.min(done + (CHUNK_LEN - start));
            done = piece.end;
            Some((at / CHUNK_BYTES, start, piece))
        })
    }

    fn read(&self, buf: &mut [u8], at_bytes: u64) {
        buf.fill(0);
        for (index, start, piece) in Self::pieces(at_bytes, buf.len()) {
            if let Some(chunk) = self.chunks.get(&index) {
                let piece = &mut buf[piece];
                piece.copy_from_slice(&chunk[start..start + piece.len()]);
            }
        }
    }

    fn write(&mut self, buf: &[u8], at_bytes: u64) {
        for (index, start, piece) in Self::pieces(at_bytes, buf.len()) {
            let piece = &buf[piece];
            self.chunk_mut(index)[start..start + piece.len()].copy_from_slice(piece);
        }
        if !buf.is_empty() {
            self.len_bytes = self.len_bytes.max(at_bytes + buf.len() as u64);
        }
    }

    fn chunk_mut(&mut self, index: u64) -> &mut [u8; CHUNK_LEN] {
        Arc::make_mut(self.chunks.entry(index).or_insert_with(|| Arc::new([0; CHUNK_LEN])))
    }

    fn set_len(&mut self, len_bytes: u64) {
        if len_bytes < self.len_bytes {
            self.zero(len_bytes..self.len_bytes, true);
            self.chunks.split_off(&len_bytes.div_ceil(CHUNK_BYTES));
        }
        self.len_bytes = len_bytes;
    }

    /// Zeroes what is inside the length; whole chunks are dropped when `unmap`.
    fn zero(&mut self, range: Range<u64>, unmap: bool) {
        let (start, end) = (range.start, range.end.min(self.len_bytes));
        if start >= end {
            return;
        }
        let touched: Vec<u64> = self
            .chunks
            .range(start / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES))
            .map(|(&index, _)| index)
            .collect();
        for index in touched {
            let chunk = index * CHUNK_BYTES;
            // The bytes behind the length are zero anyway: they count as covered.
            let whole = start <= chunk && (chunk + CHUNK_BYTES <= end || end == self.len_bytes);
            if unmap && whole {
                self.chunks.remove(&index);
            } else {
                let inside = |at: u64| usize::try_from(at - chunk).expect("at most a chunk");
                let (low, high) = (inside(start.max(chunk)), inside(end.min(chunk + CHUNK_BYTES)));
                self.chunk_mut(index)[low..high].fill(0);
            }
        }
    }

    fn fill_holes(&mut self, range: Range<u64>) {
        for index in range.start / CHUNK_BYTES..range.end.div_ceil(CHUNK_BYTES) {
            self.chunk_mut(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_found_and_made() -> Result<()> {
        let storage = MemoryStorage::new("m");
        storage.write_at(b"x", 3 * CHUNK_BYTES)?;
        storage.write_at(b"y", 4 * CHUNK_BYTES + 7)?;
        assert_eq!(storage.next_allocated(0)?, Some(3 * CHUNK_BYTES..4 * CHUNK_BYTES + 8));
        assert_eq!(
            storage.next_allocated(4 * CHUNK_BYTES + 3)?,
            Some(4 * CHUNK_BYTES + 3..4 * CHUNK_BYTES + 8)
        );
        assert_eq!(storage.next_allocated(5 * CHUNK_BYTES)?, None);
        storage.punch_hole(0..u64::MAX)?;
        assert_eq!(storage.next_allocated(0)?, None);
        assert_eq!(storage.len_bytes()?, 4 * CHUNK_BYTES + 8);
        Ok(())
    }

    #[test]
    fn a_snapshot_is_independent() -> Result<()> {
        let storage = MemoryStorage::from_bytes("m", b"before");
        let snapshot = storage.snapshot();
        storage.write_at(b"after!", 0)?;
        assert_eq!((snapshot.to_vec(), storage.to_vec()), (b"before".to_vec(), b"after!".to_vec()));
        Ok(())
    }

    #[test]
    fn the_longest_file_has_an_end() {
        let storage = MemoryStorage::new("m");
        assert!(storage.write_at(b"x", u64::MAX).is_err());
        assert!(storage.write_at(b"x", transfer::MAX_LEN_BYTES).is_err());
        let mut buf = [1; 8];
        storage.read_at(&mut buf, u64::MAX - 3).expect("reads past the end give zeroes");
        assert_eq!(buf, [0; 8]);
    }
}
