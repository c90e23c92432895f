//! Dirty bitmaps: which parts of a disk changed since some moment, and where formats keep them.
//!
//! A [`DirtyMap`] is such a set in memory; [`Bitmaps`] is the side of a layer that lists, reads and stores
//! them. Memory follows what is dirty, not the size of the disk, up to [`MAX_MAP_BYTES`].

use std::{
    fmt,
    ops::Range,
    sync::{Arc, OnceLock},
};

use super::table_cache::lock;
use crate::{
    Error, Result,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// What is known of a dirty bitmap that an image keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Unique in its image.
    pub name: String,
    /// Guest bytes that a bit stands for; a power of two.
    pub granularity_bytes: u64,
    /// Changes of the disk are noted in it.
    pub enabled: bool,
    /// It may have missed changes: whoever should have kept it did not come to store it.
    pub inconsistent: bool,
}

/// A bitmap to be stored.
#[derive(Clone, Copy, Debug)]
pub struct NewBitmap<'a> {
    /// Its name.
    pub name: &'a str,
    /// Whether changes of the disk are to be noted in it.
    pub enabled: bool,
    /// Its granularity and its bits; as long as the disk.
    pub map: &'a DirtyMap,
}

/// The dirty bitmaps that an image keeps. Those methods that change the image need a layer opened for writing
/// and no request in flight, and are durable when they return.
///
/// While a layer is written, it notes changes in the enabled bitmaps in memory and stores them when it is
/// closed; until then they are marked inconsistent in the file.
pub trait Bitmaps {
    /// All of them, in the order of the image. Those that are being kept are not inconsistent.
    fn list(&self) -> Result<Vec<BitmapInfo>>;

    /// One of them, with the changes noted so far.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is none of that name, or it is inconsistent; [`Error::Corrupt`].
    fn read(&self, name: &str) -> Result<DirtyMap>;

    /// Stores bitmaps, all of them or none. Those that have the name of one of them already are replaced; the
    /// others are appended in this order.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the format cannot hold one of them.
    fn store(&self, bitmaps: &[NewBitmap<'_>]) -> Result<()>;

    /// Takes one out of the image and gives its space back.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is none of that name.
    fn remove(&self, name: &str) -> Result<()>;
}

/// Words of a chunk, the unit in which maps take memory.
const CHUNK_WORDS: usize = 512;
/// Bits of a chunk.
const CHUNK_BITS: u64 = CHUNK_WORDS as u64 * 64;
const CHUNK_BYTES: u64 = CHUNK_WORDS as u64 * 8;
/// Bits of a map: what qcow2 can store (512 MiB of them). The list of a map's chunks then takes 2 MiB.
const MAX_BITS: u64 = 1 << 32;
/// Memory that the bits of a map take at most: every bit of a disk of 32 TiB at 64 KiB.
pub const MAX_MAP_BYTES: u64 = 64 << 20;

type Chunk = [AtomicU64; CHUNK_WORDS];

/// A set of granules of a disk. Granules are added from many threads at once.
pub struct DirtyMap {
    disk_bytes: u64,
    granularity_bits: u32,
    chunks: Vec<OnceLock<Box<Chunk>>>,
    /// Held by who makes a chunk.
    making: Mutex<()>,
    /// Bytes that may still be taken for chunks, by all maps that share it.
    room: Arc<AtomicU64>,
    /// There was no room for a chunk: granules are missing.
    incomplete: AtomicBool,
}

impl fmt::Debug for DirtyMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyMap")
            .field("disk_bytes", &self.disk_bytes)
            .field("granularity_bytes", &self.granularity_bytes())
            .field("dirty", &self.ranges().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl DirtyMap {
    /// An empty set for a disk of that size.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the granularity is not a power of two, or so small that there would be more
    /// than 2^32 granules.
    pub fn new(disk_bytes: u64, granularity_bytes: u64) -> Result<Self> {
        Self::sharing(disk_bytes, granularity_bytes, &Self::room())
    }

    /// The memory of one map, or of several that share it.
    pub(super) fn room() -> Arc<AtomicU64> {
        Arc::new(AtomicU64::new(MAX_MAP_BYTES))
    }

    /// The room that this map shares.
    pub(super) fn shared_room(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.room)
    }

    /// [`Self::new`], with memory out of a `room` that others use as well.
    pub(super) fn sharing(disk_bytes: u64, granularity_bytes: u64, room: &Arc<AtomicU64>) -> Result<Self> {
        if !granularity_bytes.is_power_of_two() {
            return Err(Error::Invalid(format!(
                "a bitmap granularity of {granularity_bytes} bytes is not a power of two"
            )));
        }
        let mut map = Self {
            disk_bytes: 0,
            granularity_bits: granularity_bytes.trailing_zeros(),
            chunks: Vec::new(),
            making: Mutex::default(),
            room: Arc::clone(room),
            incomplete: AtomicBool::new(false),
        };
        map.resize(disk_bytes)?;
        Ok(map)
    }

    /// Size of the disk.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    /// Guest bytes that a bit stands for.
    #[must_use]
    pub fn granularity_bytes(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Granules of the disk.
    pub(super) fn bits(&self) -> u64 {
        self.disk_bytes.div_ceil(self.granularity_bytes())
    }

    /// Whether granules are missing, since they had no room.
    pub(super) fn is_incomplete(&self) -> bool {
        self.incomplete.load(Ordering::Relaxed)
    }

    /// Adds the granules that a range touches; what lies behind the end of the disk is passed over.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the set would take more memory than [`MAX_MAP_BYTES`]. Some of the granules
    /// are then missing.
    pub fn set(&self, guest_bytes: Range<u64>) -> Result<()> {
        let end = guest_bytes.end.min(self.disk_bytes);
        if guest_bytes.start >= end {
            return Ok(());
        }
        let bits = guest_bytes.start >> self.granularity_bits..((end - 1) >> self.granularity_bits) + 1;
        let mut bit = bits.start;
        while bit < bits.end {
            let word_end = (bit / 64 + 1) * 64;
            let upto = bits.end.min(word_end);
            let mask = u64::MAX << (bit % 64) & u64::MAX >> (word_end - upto);
            self.or_word(bit / 64, mask)?;
            bit = upto;
        }
        Ok(())
    }

    /// Adds the granules of `mask` in word number `word`.
    fn or_word(&self, word: u64, mask: u64) -> Result<()> {
        let (chunk, index) = place(word);
        let slot = &self.chunks[chunk];
        let words = match slot.get() {
            Some(words) => words,
            None => self.make_chunk(slot)?,
        };
        // Most writes go where something was written before: then nothing is stored.
        if words[index].load(Ordering::Relaxed) & mask != mask {
            words[index].fetch_or(mask, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The words of a chunk that is to be made. Room is taken for what is made and for nothing else, not even for a
    /// moment: whoever comes for the last room finds it taken, or the chunk made.
    fn make_chunk<'a>(&self, slot: &'a OnceLock<Box<Chunk>>) -> Result<&'a Chunk> {
        let _turn = lock(&self.making);
        if slot.get().is_none() {
            self.take_room()?;
        }
        Ok(slot.get_or_init(|| Box::new([const { AtomicU64::new(0) }; CHUNK_WORDS])))
    }

    fn take_room(&self) -> Result<()> {
        let take = |room: u64| room.checked_sub(CHUNK_BYTES);
        if self.room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
            return Ok(());
        }
        self.incomplete.store(true, Ordering::Relaxed);
        Err(Error::Invalid(format!("dirty bitmaps take more than {MAX_MAP_BYTES} bytes of memory")))
    }

    fn word(&self, word: u64) -> u64 {
        let (chunk, index) = place(word);
        let words = self.chunks.get(chunk).and_then(OnceLock::get);
        words.map_or(0, |words| words[index].load(Ordering::Relaxed))
    }

    /// Whether the granule of that byte is in the set.
    #[must_use]
    pub fn is_dirty(&self, guest_offset: u64) -> bool {
        let bit = guest_offset >> self.granularity_bits;
        guest_offset < self.disk_bytes && self.word(bit / 64) >> (bit % 64) & 1 == 1
    }

    /// The first run of granules in the set at or behind a byte, as bytes of the disk.
    #[must_use]
    pub fn next_dirty(&self, from: u64) -> Option<Range<u64>> {
        if from >= self.disk_bytes {
            return None;
        }
        let first = self.find(from >> self.granularity_bits, false)?;
        let last = self.find(first, true).unwrap_or(self.bits());
        let start = (first << self.granularity_bits).max(from);
        let end = if last == self.bits() { self.disk_bytes } else { last << self.granularity_bits };
        Some(start..end)
    }

    /// All runs of granules in the set, in order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let range = self.next_dirty(from)?;
            from = range.end;
            Some(range)
        })
    }

    /// The first bit from `bit` on that is set, or with `clear` is not.
    fn find(&self, mut bit: u64, clear: bool) -> Option<u64> {
        let bits = self.bits();
        while bit < bits {
            let (chunk, _) = place(bit / 64);
            if self.chunks[chunk].get().is_none() {
                if clear {
                    return Some(bit);
                }
                bit = (bit / CHUNK_BITS + 1) * CHUNK_BITS;
                continue;
            }
            let word = if clear { !self.word(bit / 64) } else { self.word(bit / 64) };
            let rest = word >> (bit % 64);
            if rest != 0 {
                return Some(bit + u64::from(rest.trailing_zeros())).filter(|found| *found < bits);
            }
            bit = (bit / 64 + 1) * 64;
        }
        None
    }

    /// Adds all of another set, whatever its granularity.
    ///
    /// # Errors
    /// [`Error::Invalid`] when they are of disks of different sizes, in the reference's words; as
    /// [`Self::set`].
    pub fn merge(&self, other: &Self) -> Result<()> {
        if self.disk_bytes != other.disk_bytes {
            return Err(Error::Invalid(format!(
                "Bitmaps are of different sizes (destination size is {}, source size is {}) and can't be merged",
                self.disk_bytes, other.disk_bytes
            )));
        }
        other.ranges().try_for_each(|range| self.set(range))
    }

    /// Makes the set one of a disk of another size; granules behind a new end are gone, new ones are not in
    /// the set.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there would be too many granules; the set is then unchanged.
    pub(super) fn resize(&mut self, disk_bytes: u64) -> Result<()> {
        let bits = disk_bytes.div_ceil(self.granularity_bytes());
        if bits > MAX_BITS {
            return Err(Error::Invalid(format!(
                "a disk of {disk_bytes} bytes has more than {MAX_BITS} granules of {} bytes",
                self.granularity_bytes()
            )));
        }
        self.disk_bytes = disk_bytes;
        let chunks = usize::try_from(bits.div_ceil(CHUNK_BITS)).expect("at most 2^17");
        let gone = self.chunks.drain(chunks.min(self.chunks.len())..).filter(|slot| slot.get().is_some());
        let gone = gone.count() as u64;
        self.room.fetch_add(gone * CHUNK_BYTES, Ordering::Relaxed);
        self.chunks.resize_with(chunks, OnceLock::new);
        if let Some(last) = self.chunks.last_mut().and_then(OnceLock::get_mut) {
            let used = bits - (chunks as u64 - 1) * CHUNK_BITS;
            for (index, word) in last.iter_mut().enumerate() {
                let below = used.saturating_sub(index as u64 * 64);
                let keep = if below >= 64 { u64::MAX } else { (1 << below) - 1 };
                *word.get_mut() &= keep;
            }
        }
        Ok(())
    }

    /// The first granule of the set at or behind granule number `bit`.
    pub(super) fn next_bit(&self, bit: u64) -> Option<u64> {
        self.find(bit, false)
    }

    /// Puts words from `first` on into `bytes`, the least significant bit of the first byte first.
    pub(super) fn write_words(&self, first: u64, bytes: &mut [u8]) {
        for (word, bytes) in (first..).zip(bytes.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&self.word(word).to_le_bytes());
        }
    }

    /// Adds the bits of `bytes` as [`Self::write_words`] lays them out, from word `first` on. Bits behind the
    /// end of the disk are passed over.
    pub(super) fn add_words(&self, first: u64, bytes: &[u8]) -> Result<()> {
        let bits = self.bits();
        for (word, bytes) in (first..).zip(bytes.as_chunks::<8>().0) {
            let below = bits.saturating_sub(word.saturating_mul(64));
            if below == 0 {
                break;
            }
            let keep = if below >= 64 { u64::MAX } else { (1 << below) - 1 };
            let value = u64::from_le_bytes(*bytes) & keep;
            if value != 0 {
                self.or_word(word, value)?;
            }
        }
        Ok(())
    }
}

impl PartialEq for DirtyMap {
    fn eq(&self, other: &Self) -> bool {
        (self.disk_bytes, self.granularity_bits) == (other.disk_bytes, other.granularity_bits)
            && self.ranges().eq(other.ranges())
    }
}

impl Eq for DirtyMap {}

/// The chunk of a word, and where in it.
fn place(word: u64) -> (usize, usize) {
    let word = usize::try_from(word).expect("at most 2^26 words");
    (word / CHUNK_WORDS, word % CHUNK_WORDS)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        /// A map is the set of the granules that its ranges touch, through resizing and its bytes too.
        #[test]
        fn a_map_equals_a_list_of_flags(
            disk in 1_u64..300_000_000,
            granularity_bits in 9_u32..14,
            steps in vec((any::<u64>(), 0_u64..5_000_000, 0_u8..8), 1..12),
        ) {
            let granularity = 1_u64 << granularity_bits;
            let mut map = DirtyMap::new(disk, granularity).unwrap();
            let mut model = vec![false; usize::try_from(disk.div_ceil(granularity)).unwrap()];
            for (start, length, what) in steps {
                let size = map.disk_bytes();
                if what == 0 {
                    let size = start % 400_000_000;
                    map.resize(size).unwrap();
                    model.resize(usize::try_from(size.div_ceil(granularity)).unwrap(), false);
                    continue;
                }
                let start = start % size.max(1);
                map.set(start..start + length).unwrap();
                for at in (start / granularity..).take_while(|at| length > 0 && at * granularity < start + length) {
                    if let Some(flag) = model.get_mut(usize::try_from(at).unwrap()) {
                        *flag = true;
                    }
                }
            }
            let size = map.disk_bytes();
            let dirty: Vec<bool> = (0..model.len() as u64).map(|at| map.is_dirty(at * granularity)).collect();
            prop_assert_eq!(&dirty, &model);
            let mut from_ranges = vec![false; model.len()];
            for range in map.ranges() {
                prop_assert!(range.end <= size && range.start < range.end);
                for at in range.start / granularity..range.end.div_ceil(granularity) {
                    from_ranges[usize::try_from(at).unwrap()] = true;
                }
            }
            prop_assert_eq!(&from_ranges, &model);
            let mut bytes = vec![0; model.len().div_ceil(64) * 8];
            map.write_words(0, &mut bytes);
            let again = DirtyMap::new(size, granularity).unwrap();
            again.add_words(0, &bytes).unwrap();
            prop_assert_eq!(&again, &map);
            prop_assert_eq!(map.next_bit(0).is_some(), model.contains(&true));
        }
    }

    #[test]
    fn memory_is_bounded_and_what_is_missing_is_known() {
        let room = Arc::new(AtomicU64::new(2 * CHUNK_BYTES));
        let map = DirtyMap::sharing(1 << 40, 512, &room).unwrap();
        let step = CHUNK_BITS * 512;
        map.set(0..1).unwrap();
        map.set(step..step + 1).unwrap();
        assert!(!map.is_incomplete());
        assert!(map.set(2 * step..2 * step + 1).is_err() && map.is_incomplete());
        assert!(DirtyMap::new(u64::MAX, 512).is_err());
        assert!(DirtyMap::new(1 << 20, 1000).is_err());
    }

    #[test]
    fn merging_widens_to_the_coarser_granules() {
        let fine = DirtyMap::new(1 << 20, 512).unwrap();
        fine.set(70_000..70_001).unwrap();
        let coarse = DirtyMap::new(1 << 20, 65536).unwrap();
        coarse.merge(&fine).unwrap();
        assert!(coarse.ranges().eq(std::iter::once(65536..131_072)));
        assert!(coarse.merge(&DirtyMap::new(1 << 21, 512).unwrap()).is_err());
    }
}
