//! Tables in memory: slices of 4 KiB (a cluster where clusters are smaller), found by host offset.
//!
//! A lookup that hits takes one short shared lock. A miss reads under the load lock of its shard, so that
//! a slice is read at most once and a slow reader can never put an old slice beside a newer one. Slices are
//! changed only by whoever holds the layer's writer lock; changed slices stay until they were written, clean
//! ones make room for others by the clock rule.
//!
//! Who takes a [`Slice`] along has it as it was at that moment: a change is made in place where nobody has the slice,
//! and else to a copy, which takes its place in the cache.
//!
//! Who must not wait for a miss reads the slice himself, without that lock, and offers it
//! ([`SliceCache::missing`], [`SliceCache::offer`]). It is kept only where nothing can have become of the slice meanwhile.
//!
//! What waits to be written is taken along, too ([`SliceCache::take_changes`], under the writer lock), and written
//! without that lock. Whoever changes such a slice meanwhile changes a copy, which waits for the next time.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    hash::{BuildHasher, Hasher, RandomState},
    io::IoSlice,
    ops::Range,
    sync::{Arc, PoisonError},
};

use super::{HostFile, HostOffset, MissingTable};
use crate::{
    Result,
    storage::Storage,
    sync::{
        Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// Shards of a cache: more than the threads that look tables up at once.
const SHARDS: usize = 16;
/// The longest single write of neighbouring slices.
const WRITE_BACK_BYTES: u64 = 1 << 20;

/// A piece of a table as it was when it was asked for.
pub(super) type Slice = Arc<[u8]>;

/// A slice in the cache.
#[derive(Debug)]
struct Kept {
    slice: Slice,
    /// Looked at since the clock hand last passed.
    used: AtomicBool,
}

impl Kept {
    fn new(slice: Slice) -> Self {
        Self { slice, used: AtomicBool::new(true) }
    }

    fn look(&self) -> &Slice {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        &self.slice
    }

    /// Whether somebody has taken it along: it is being written, or will be looked at.
    fn is_taken(&self) -> bool {
        Arc::strong_count(&self.slice) > 1
    }
}

type Slices = HashMap<u64, Kept, OffsetHash>;

#[derive(Debug, Default)]
struct Shard {
    slices: RwLock<Slices>,
    load: Mutex<()>,
}

impl Shard {
    fn read(&self) -> RwLockReadGuard<'_, Slices> {
        self.slices.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Slices> {
        self.slices.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hashes host offsets in a few instructions. The factor is odd, and nobody knows it who makes an image.
#[derive(Clone, Debug)]
struct OffsetHash {
    factor: u64,
}

impl Default for OffsetHash {
    fn default() -> Self {
        Self { factor: RandomState::new().hash_one(0) | 1 }
    }
}

impl BuildHasher for OffsetHash {
    type Hasher = OffsetHasher;

    fn build_hasher(&self) -> OffsetHasher {
        OffsetHasher { factor: self.factor, hash: 0 }
    }
}

struct OffsetHasher {
    factor: u64,
    hash: u64,
}

impl Hasher for OffsetHasher {
    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("offsets are numbers");
    }

    fn write_u64(&mut self, offset: u64) {
        // The upper bits depend on all of the offset, whose lower ones are zero.
        self.hash = offset.wrapping_mul(self.factor).rotate_left(32);
    }

    fn finish(&self) -> u64 {
        self.hash
    }
}

/// Slices of one kind of table.
///
/// Lock order: a shard's `load`, its `slices`, `dirty`.
#[derive(Debug)]
pub(super) struct SliceCache {
    shards: Box<[Shard]>,
    slice_bytes: u64,
    slices_per_shard: usize,
    /// Host offsets of the slices that differ from the file.
    dirty: Mutex<BTreeSet<u64>>,
    /// Counts what makes bytes old that somebody has read from the file: writes of slices that have begun, and slices
    /// that were forgotten.
    age: AtomicU64,
    /// Counts what may change what is found here, before it can be found.
    changes: AtomicU64,
}

impl SliceCache {
    /// A cache of up to `capacity_bytes` of clean slices of `slice_bytes`, a power of two.
    pub(super) fn new(slice_bytes: u64, capacity_bytes: u64) -> Self {
        let per_shard = (capacity_bytes / slice_bytes).div_ceil(SHARDS as u64).max(2);
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            slice_bytes,
            slices_per_shard: usize::try_from(per_shard).unwrap_or(usize::MAX),
            dirty: Mutex::default(),
            age: AtomicU64::new(0),
            changes: AtomicU64::new(0),
        }
    }

    /// Bytes in a slice.
    pub(super) fn slice_bytes(&self) -> u64 {
        self.slice_bytes
    }

    /// The slice that holds host byte `at`, and where in it that byte stands. Reads on a miss.
    pub(super) fn get(&self, storage: &dyn Storage, at: u64) -> Result<(Slice, usize)> {
        let (start, within) = self.place(at);
        if let Some(slice) = self.peek(start) {
            return Ok((slice, within));
        }
        let shard = self.shard(start);
        let _load = lock(&shard.load);
        if let Some(slice) = self.peek(start) {
            return Ok((slice, within));
        }
        let slice = self.load(storage, shard, start)?;
        Ok((slice, within))
    }

    /// The slice that starts at `start`, when it is here.
    pub(super) fn peek(&self, start: u64) -> Option<Slice> {
        Some(Arc::clone(self.shard(start).read().get(&start)?.look()))
    }

    /// Shows `look` the slice that holds host byte `at`, when it is here, and where in it that byte stands. Nobody can
    /// put slices into its shard, or change one there, meanwhile.
    pub(super) fn look_at<T>(&self, at: u64, look: impl FnOnce(&[u8], usize) -> T) -> Option<T> {
        let (start, within) = self.place(at);
        Some(look(self.shard(start).read().get(&start)?.look(), within))
    }

    /// The slice that holds host byte `at`, when it is here, and where in it that byte stands.
    pub(super) fn peek_at(&self, at: u64) -> Option<(Slice, usize)> {
        let (start, within) = self.place(at);
        Some((self.peek(start)?, within))
    }

    /// Fills `bytes`, whole slices from `start` on, with what they are now: one read of the file, over which the slices
    /// that are here, and may be newer, are laid. Keeps none, unless slices are written meanwhile.
    pub(super) fn read_past(&self, storage: &dyn Storage, start: u64, bytes: &mut [u8]) -> Result<()> {
        let slice_len = usize::try_from(self.slice_bytes).expect("a slice is small");
        let age = self.age();
        // Taken before the read: a slice that is changed, written and dropped meanwhile is kept here.
        let starts = (start..start + bytes.len() as u64).step_by(slice_len);
        let cached: Vec<_> = starts.map(|start| (start, self.peek(start))).collect();
        if cached.iter().any(|(_, slice)| slice.is_none()) {
            storage.read_at(bytes, start)?;
        }
        // What was not here was not being written either. Where a write has begun since, the read may have met it half
        // done: such slices are read again in a way that no write gets in between.
        let may_be_torn = self.age() != age;
        for ((start, slice), bytes) in cached.into_iter().zip(bytes.chunks_exact_mut(slice_len)) {
            let slice = match slice {
                None if may_be_torn => Some(self.get(storage, start)?.0),
                slice => slice,
            };
            if let Some(slice) = slice {
                bytes.copy_from_slice(&slice);
            }
        }
        Ok(())
    }

    /// Grows before what is found here changes. Where it has not grown since before a look, the look would find the same.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    /// Grows with all that may make bytes old that were read from the file before.
    pub(super) fn age(&self) -> u64 {
        self.age.load(Ordering::SeqCst)
    }

    /// The first slice that holds a part of `range` and is not here. `age` is the cache's from before the caller learnt
    /// that there are tables in `range`; `level` is the caller's name for this cache.
    pub(super) fn missing(&self, level: u8, range: Range<u64>, age: u64) -> Option<MissingTable> {
        let first = range.start & !(self.slice_bytes - 1);
        let start = (first..range.end).step_by(self.slice_len()).find(|start| self.peek(*start).is_none())?;
        let len_bytes = u32::try_from(self.slice_bytes).expect("slices are at most a cluster");
        Some(MissingTable { file: HostFile::IMAGE, at: HostOffset(start), len_bytes, level, age })
    }

    /// Keeps `bytes`, which somebody has read from the file since the slice was found [missing](Self::missing). Whether it
    /// does: not where the slice is here by now, where it may have been here, changed, written and dropped meanwhile,
    /// and where somebody reads a slice into its shard just now. No I/O, and no wait for any.
    pub(super) fn offer(&self, missing: &MissingTable, bytes: Box<[u8]>) -> bool {
        let start = missing.at.0;
        let shard = self.shard(start);
        // From here on nobody puts the slice in, so nobody changes it, and no write of it begins.
        let Ok(_load) = shard.load.try_lock() else { return false };
        if self.age() != missing.age || bytes.len() != self.slice_len() || self.peek(start).is_some() {
            return false;
        }
        self.keep(shard, start, bytes.into());
        true
    }

    /// Changes the slice that holds host byte `at` and remembers that it must be written. `change` gets the
    /// slice's bytes and where in them that byte stands, and looks at nothing else in this cache. Reads on a miss.
    pub(super) fn update<T>(
        &self,
        storage: &dyn Storage,
        at: u64,
        change: impl FnOnce(&mut [u8], usize) -> T,
    ) -> Result<T> {
        let (start, within) = self.place(at);
        let shard = self.shard(start);
        let mut slices = loop {
            let slices = self.begin_change(shard);
            if slices.contains_key(&start) {
                break slices;
            }
            drop(slices);
            let _load = lock(&shard.load);
            if self.peek(start).is_none() {
                self.load(storage, shard, start)?;
            }
        };
        let slice = self.slice_to_change(&mut slices, start).expect("it is here");
        Ok(change(slice, within))
    }

    /// [`Self::update`] where the slice is here; `None`, and `change` is not called, where it is not. No I/O.
    pub(super) fn update_cached<T>(&self, at: u64, change: impl FnOnce(&mut [u8], usize) -> T) -> Option<T> {
        let (start, within) = self.place(at);
        let mut slices = self.begin_change(self.shard(start));
        Some(change(self.slice_to_change(&mut slices, start)?, within))
    }

    /// The slices of a shard, to be changed. Counted when nobody can look at them any more.
    fn begin_change<'a>(&self, shard: &'a Shard) -> RwLockWriteGuard<'a, Slices> {
        let slices = shard.write();
        self.changes.fetch_add(1, Ordering::SeqCst);
        slices
    }

    /// The slice that starts at `start`, when it is here, marked as changed, which keeps it here.
    fn slice_to_change<'a>(&self, slices: &'a mut Slices, start: u64) -> Option<&'a mut [u8]> {
        let kept = slices.get_mut(&start)?;
        self.lock_dirty().insert(start);
        Some(Arc::make_mut(&mut kept.slice))
    }

    /// Puts zeroes, to be written, where `range` stood. Both ends are multiples of a slice.
    pub(super) fn fill_with_zeroes(&self, range: Range<u64>) {
        let mut start = range.start;
        while start < range.end {
            let shard = self.shard(start);
            let _load = lock(&shard.load);
            self.lock_dirty().insert(start);
            self.begin_change(shard).insert(start, Kept::new(self.zeroes()));
            start += self.slice_bytes;
        }
    }

    /// Forgets the slices of `range`, changed ones too.
    pub(super) fn forget(&self, range: Range<u64>) {
        self.age.fetch_add(1, Ordering::SeqCst);
        let mut start = range.start;
        while start < range.end {
            let shard = self.shard(start);
            let _load = lock(&shard.load);
            self.begin_change(shard).remove(&start);
            self.lock_dirty().remove(&start);
            start += self.slice_bytes;
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        self.age.fetch_add(1, Ordering::SeqCst);
        for shard in &self.shards {
            let _load = lock(&shard.load);
            self.begin_change(shard).clear();
        }
        self.lock_dirty().clear();
    }

    /// How many bytes wait to be written.
    pub(super) fn dirty_bytes(&self) -> u64 {
        self.lock_dirty().len() as u64 * self.slice_bytes
    }

    /// Whether any slice for which `wanted` holds waits to be written.
    pub(super) fn is_dirty(&self, wanted: impl Fn(u64) -> bool) -> bool {
        self.lock_dirty().iter().any(|&start| wanted(start))
    }

    /// Writes the changed slices for which `wanted` holds, neighbours together, each piece after `allow`
    /// agreed to its range. What fails to be written stays changed. Returns whether anything was written.
    pub(super) fn write_back(
        &self,
        storage: &dyn Storage,
        wanted: impl Fn(u64) -> bool,
        allow: impl Fn(Range<u64>) -> Result<()>,
    ) -> Result<bool> {
        self.take_changes(wanted).write(storage, allow)
    }

    /// Takes the changed slices for which `wanted` holds as they are now. Called under the writer lock; there is
    /// no more than one set of a slice at a time, or an older one might be written over a newer.
    pub(super) fn take_changes(&self, wanted: impl Fn(u64) -> bool) -> Changes<'_> {
        let starts: Vec<u64> = self.lock_dirty().iter().copied().filter(|&start| wanted(start)).collect();
        let kept = |start| (start, self.peek(start).expect("a changed slice is kept"));
        let slices: VecDeque<(u64, Slice)> = starts.into_iter().map(kept).collect();
        // They are taken by now: who makes room leaves them, as it did before.
        let mut dirty = self.lock_dirty();
        slices.iter().for_each(|(start, _)| _ = dirty.remove(start));
        drop(dirty);
        Changes { cache: self, slices }
    }

    fn slice_len(&self) -> usize {
        usize::try_from(self.slice_bytes).expect("slices are at most a cluster")
    }

    fn shard(&self, start: u64) -> &Shard {
        let index = (start >> self.slice_bytes.trailing_zeros()) % SHARDS as u64;
        &self.shards[usize::try_from(index).expect("below the number of shards")]
    }

    /// Where the slice that holds host byte `at` starts, and where in it that byte stands.
    fn place(&self, at: u64) -> (u64, usize) {
        let start = at & !(self.slice_bytes - 1);
        (start, usize::try_from(at - start).expect("inside a slice"))
    }

    fn zeroes(&self) -> Slice {
        std::iter::repeat_n(0, self.slice_len()).collect()
    }

    fn lock_dirty(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        lock(&self.dirty)
    }

    /// Reads a slice; the caller holds the shard's load lock.
    fn load(&self, storage: &dyn Storage, shard: &Shard, start: u64) -> Result<Slice> {
        let mut slice = self.zeroes();
        storage.read_at(Arc::get_mut(&mut slice).expect("nobody else has it"), start)?;
        self.keep(shard, start, Arc::clone(&slice));
        Ok(slice)
    }

    /// Puts a slice in as the file has it; the caller holds the shard's load lock, and it is not here.
    fn keep(&self, shard: &Shard, start: u64, slice: Slice) {
        let mut slices = shard.write();
        if slices.len() >= self.slices_per_shard {
            self.evict(&mut slices);
        }
        slices.insert(start, Kept::new(slice));
    }

    /// Drops a quarter of a full shard: clean slices not looked at since the last time first.
    fn evict(&self, slices: &mut Slices) {
        let dirty = self.lock_dirty();
        let keep = self.slices_per_shard - self.slices_per_shard.div_ceil(4);
        for second_round in [false, true] {
            let mut surplus = slices.len().saturating_sub(keep);
            slices.retain(|start, kept| {
                if surplus == 0 || dirty.contains(start) || kept.is_taken() {
                    return true;
                }
                if kept.used.swap(false, Ordering::Relaxed) && !second_round {
                    return true;
                }
                surplus -= 1;
                false
            });
        }
    }
}

/// Changed slices of one cache as they were at one moment, to be written. What was not written when this is dropped
/// waits to be written again.
#[must_use = "nothing is written until `write` is called"]
pub(super) struct Changes<'a> {
    cache: &'a SliceCache,
    /// By host offset, in order.
    slices: VecDeque<(u64, Slice)>,
}

impl Changes<'_> {
    /// Whether there is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }

    /// Writes them, neighbours together, each piece after `allow` agreed to its range. Takes no lock that a reader
    /// of the cache, or whoever changes it, would wait for. Returns whether anything was written.
    pub(super) fn write(
        mut self,
        storage: &dyn Storage,
        allow: impl Fn(Range<u64>) -> Result<()>,
    ) -> Result<bool> {
        let wrote = !self.is_empty();
        let slice_bytes = self.cache.slice_bytes;
        let limit = (WRITE_BACK_BYTES / slice_bytes).max(1);
        while let Some(&(first, _)) = self.slices.front() {
            let in_a_row = |(index, (start, _)): &(u64, &(u64, _))| *start == first + index * slice_bytes;
            let run = (0..limit).zip(&self.slices).take_while(in_a_row).count();
            allow(first..first + run as u64 * slice_bytes)?;
            self.cache.age.fetch_add(1, Ordering::SeqCst);
            let bufs: Vec<IoSlice<'_>> =
                self.slices.iter().take(run).map(|(_, slice)| IoSlice::new(slice)).collect();
            storage.write_vectored_at(&bufs, first)?;
            self.slices.drain(..run);
        }
        Ok(wrote)
    }
}

impl Drop for Changes<'_> {
    fn drop(&mut self) {
        for (start, slice) in &self.slices {
            let slices = self.cache.shard(*start).read();
            // Where a copy took its place the copy waits already; what was forgotten stays so.
            if slices.get(start).is_some_and(|present| Arc::ptr_eq(&present.slice, slice)) {
                self.cache.lock_dirty().insert(*start);
            }
        }
    }
}

/// Locks a mutex whose data stays sound when a thread panics while holding it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
