//! Sector bitmaps: which sectors of a block it holds ("Block Allocation Table and Data Blocks").
//!
//! Each block begins with a bitmap of its sectors, the most significant bit of the first byte first. A sector
//! whose bit is clear was never written: it reads as zeroes in a dynamic disk, and as the parent's in a
//! differencing one. Most blocks are full, which takes one bit to remember; of the others the bitmaps are kept
//! within [`KEPT_BYTES`]. Changed ones stay until they were written.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    sync::PoisonError,
};

use super::geometry::SECTOR_BYTES;
use crate::{
    Result,
    format::table_cache::lock,
    storage::Storage,
    sync::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

/// Bitmaps that are kept in memory without need.
const KEPT_BYTES: usize = 8 << 20;

/// Changed bitmaps are written before there are more of them than this.
const DIRTY_BYTES: usize = 4 << 20;

/// The bitmaps of an image.
///
/// Lock order: `loading`, `kept`. The second is never held across I/O.
#[derive(Debug)]
pub(super) struct SectorBitmaps {
    /// Sectors in a block.
    block_sectors: u32,
    /// Host bytes of a bitmap.
    bitmap_bytes: usize,
    /// Held by who takes bitmaps from the file: nobody can put an old one beside a newer.
    loading: Mutex<()>,
    kept: RwLock<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// One bit a block: all of its sectors are there.
    full: Vec<u64>,
    partial: HashMap<u32, Box<[u8]>>,
    /// Blocks whose bitmaps differ from those in the file.
    dirty: BTreeSet<u32>,
}

/// A run of sectors of a block that are all there, or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) is_there: bool,
    pub(super) sectors: u32,
}

impl SectorBitmaps {
    /// For blocks of that many sectors, none of which is known.
    pub(super) fn new(block_sectors: u32, bitmap_bytes: u64) -> Self {
        Self {
            block_sectors,
            bitmap_bytes: usize::try_from(bitmap_bytes).expect("at most 512 KiB"),
            loading: Mutex::default(),
            kept: RwLock::default(),
        }
    }

    /// The run that starts with the first of `sectors` in a block whose bitmap stands at `at_bytes`, up to the
    /// last of them. `sectors` is not empty.
    pub(super) fn run(
        &self,
        storage: &dyn Storage,
        block: u32,
        at_bytes: u64,
        sectors: Range<u32>,
    ) -> Result<Run> {
        if let Some(run) = self.known_run(block, sectors.clone()) {
            return Ok(run);
        }
        let _loading = lock(&self.loading);
        let kept = self.load(storage, block, at_bytes)?;
        Ok(kept.run(block, &sectors).expect("it was kept just now"))
    }

    /// [`Self::run`] where the bitmap is in memory.
    pub(super) fn known_run(&self, block: u32, sectors: Range<u32>) -> Option<Run> {
        self.look().run(block, &sectors)
    }

    /// Notes that these sectors are there, in a block whose bitmap stands at `at_bytes`.
    pub(super) fn set(
        &self,
        storage: &dyn Storage,
        block: u32,
        at_bytes: u64,
        sectors: Range<u32>,
    ) -> Result<()> {
        let _loading = lock(&self.loading);
        let mut kept = self.load(storage, block, at_bytes)?;
        kept.set(block, sectors, self.block_sectors);
        Ok(())
    }

    /// Gives a new block its bitmap: all sectors, or those named.
    pub(super) fn set_new(&self, block: u32, sectors: Option<Range<u32>>) {
        let mut kept = self.kept();
        match sectors {
            None => {
                kept.set_full(block);
                kept.dirty.insert(block);
            }
            Some(sectors) => {
                kept.partial.insert(block, vec![0; self.bitmap_bytes].into_boxed_slice());
                kept.set(block, sectors, self.block_sectors);
            }
        }
    }

    /// Whether changed bitmaps should be written soon.
    pub(super) fn wants_writing(&self) -> bool {
        self.look().dirty.len().saturating_mul(self.bitmap_bytes) >= DIRTY_BYTES
    }

    /// The changed bitmaps with their bytes, by block. They stay changed until [`Self::written`].
    pub(super) fn changed(&self) -> BTreeMap<u32, Box<[u8]>> {
        let kept = self.look();
        let full = || vec![0xff; self.bitmap_bytes].into_boxed_slice();
        kept.dirty
            .iter()
            .map(|block| (*block, kept.partial.get(block).cloned().unwrap_or_else(full)))
            .collect()
    }

    /// Notes that these bitmaps stand in the file as they were given out. No one changed them meanwhile.
    pub(super) fn written(&self, blocks: impl Iterator<Item = u32>) {
        let mut kept = self.kept();
        for block in blocks {
            kept.dirty.remove(&block);
        }
    }

    fn look(&self) -> RwLockReadGuard<'_, Kept> {
        self.kept.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> RwLockWriteGuard<'_, Kept> {
        self.kept.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the bitmap of a block from the file, unless it is in memory, and gives back the lock under which it
    /// still is. Called with `loading` held.
    fn load(&self, storage: &dyn Storage, block: u32, at_bytes: u64) -> Result<RwLockWriteGuard<'_, Kept>> {
        let kept = self.kept();
        if kept.is_known(block) {
            return Ok(kept);
        }
        drop(kept);
        let mut bits = vec![0; self.bitmap_bytes].into_boxed_slice();
        storage.read_at(&mut bits, at_bytes)?;
        let mut kept = self.kept();
        if is_full(&bits, self.block_sectors) {
            kept.set_full(block);
            return Ok(kept);
        }
        if (kept.partial.len() + 1).saturating_mul(self.bitmap_bytes) > KEPT_BYTES {
            let Kept { partial, dirty, .. } = &mut *kept;
            partial.retain(|block, _| dirty.contains(block));
        }
        kept.partial.insert(block, bits);
        Ok(kept)
    }
}

impl Kept {
    fn is_known(&self, block: u32) -> bool {
        self.is_full(block) || self.partial.contains_key(&block)
    }

    fn is_full(&self, block: u32) -> bool {
        self.full.get(block as usize / 64).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    fn set_full(&mut self, block: u32) {
        let word = block as usize / 64;
        if self.full.len() <= word {
            self.full.resize(word + 1, 0);
        }
        self.full[word] |= 1 << (block % 64);
    }

    /// Sets bits of a bitmap that is in memory; a block that is full has them all.
    fn set(&mut self, block: u32, sectors: Range<u32>, block_sectors: u32) {
        let Some(bits) = self.partial.get_mut(&block) else { return };
        for sector in sectors {
            bits[(sector / 8) as usize] |= 0x80 >> (sector % 8);
        }
        if is_full(bits, block_sectors) {
            self.partial.remove(&block);
            self.set_full(block);
        }
        self.dirty.insert(block);
    }

    fn run(&self, block: u32, sectors: &Range<u32>) -> Option<Run> {
        if self.is_full(block) {
            return Some(Run { is_there: true, sectors: sectors.end - sectors.start });
        }
        self.partial.get(&block).map(|bits| run_in(bits, sectors))
    }
}

fn is_there(bits: &[u8], sector: u32) -> bool {
    bits[(sector / 8) as usize] & (0x80 >> (sector % 8)) != 0
}

/// Whether all sectors of a block are there.
fn is_full(bits: &[u8], block_sectors: u32) -> bool {
    let run = run_in(bits, &(0..block_sectors));
    run.is_there && run.sectors == block_sectors
}

fn run_in(bits: &[u8], sectors: &Range<u32>) -> Run {
    let is = is_there(bits, sectors.start);
    let whole = if is { 0xff } else { 0 };
    let mut at = sectors.start + 1;
    while at < sectors.end {
        if at.is_multiple_of(8) && bits[(at / 8) as usize] == whole {
            at += 8;
        } else if is_there(bits, at) == is {
            at += 1;
        } else {
            break;
        }
    }
    Run { is_there: is, sectors: at.min(sectors.end) - sectors.start }
}

/// The runs of sectors that are there, among the first `sectors` of a block with that bitmap.
pub(super) fn runs_there(bits: &[u8], sectors: u32) -> impl Iterator<Item = Range<u32>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < sectors {
            let run = run_in(bits, &(at..sectors));
            let start = at;
            at += run.sectors;
            if run.is_there {
                return Some(start..at);
            }
        }
        None
    })
}

/// Sectors in that many bytes of a block.
pub(super) fn sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR_BYTES).expect("at most a block")
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::storage::MemoryStorage;

    proptest! {
        /// Bitmaps equal a list of flags, whether in memory, written, or read again.
        #[test]
        fn bitmaps_equal_a_list_of_flags(
            block_bits in 0_u32..8,
            first in vec(any::<u8>(), 512),
            steps in vec((any::<u32>(), any::<u32>(), any::<bool>()), 0..12),
        ) {
            let block_sectors = 1_u32 << block_bits;
            let storage = MemoryStorage::from_bytes("bits", &first);
            let flag = |sector: u32| first[(sector / 8) as usize] & (0x80 >> (sector % 8)) != 0;
            let mut model: Vec<bool> = (0..block_sectors).map(flag).collect();
            let mut bitmaps = SectorBitmaps::new(block_sectors, 512);
            for (start, len, reopen) in steps {
                let start = start % block_sectors;
                let end = start + 1 + len % (block_sectors - start);
                bitmaps.set(&storage, 3, 0, start..end).unwrap();
                model[start as usize..end as usize].fill(true);
                if reopen {
                    for (block, bits) in bitmaps.changed() {
                        prop_assert_eq!(block, 3);
                        storage.write_at(&bits, 0).unwrap();
                    }
                    bitmaps = SectorBitmaps::new(block_sectors, 512);
                }
                let mut at = 0;
                while at < block_sectors {
                    let run = bitmaps.run(&storage, 3, 0, at..block_sectors).unwrap();
                    let flags = &model[at as usize..(at + run.sectors) as usize];
                    prop_assert!(run.sectors > 0 && flags.iter().all(|flag| *flag == run.is_there));
                    at += run.sectors;
                    prop_assert!(model.get(at as usize).is_none_or(|flag| *flag != run.is_there));
                }
            }
        }
    }

    #[test]
    fn the_first_sector_is_the_most_significant_bit() {
        let mut bits = [0; 512];
        bits[..2].copy_from_slice(&[0b1010_0000, 0b1000_0000]);
        assert_eq!(run_in(&bits, &(0..16)), Run { is_there: true, sectors: 1 });
        assert_eq!(run_in(&bits, &(3..16)), Run { is_there: false, sectors: 5 });
    }
}
