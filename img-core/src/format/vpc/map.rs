//! Where guest bytes live: the block allocation table, held in memory, and the sector bitmaps.

use std::{ops::Range, sync::PoisonError};

use super::{
    bitmap::{Run, SectorBitmaps, sectors},
    geometry::SECTOR_BYTES,
    header::{ENTRY_BYTES, Header, UNUSED, checked_block},
};
use crate::{
    Result,
    format::{Extent, HostFile, HostOffset, Place},
    storage::Storage,
    sync::RwLock,
};

/// The table is read in pieces of this size.
const READ_BYTES: usize = 1 << 20;

/// The map of a dynamic or differencing disk.
#[derive(Debug)]
pub(super) struct BlockMap {
    /// Guest bytes of a block.
    pub(super) block_bytes: u64,
    /// Host bytes of the bitmap in front of each block.
    pub(super) bitmap_bytes: u64,
    /// One entry a block of the disk: the host sector of its bitmap, or [`UNUSED`].
    entries: RwLock<Vec<u32>>,
    pub(super) bitmaps: SectorBitmaps,
}

impl BlockMap {
    pub(super) fn new(header: &Header, entries: Vec<u32>) -> Self {
        Self {
            block_bytes: header.block_bytes,
            bitmap_bytes: header.bitmap_bytes(),
            entries: RwLock::new(entries),
            bitmaps: SectorBitmaps::new(sectors(header.block_bytes), header.bitmap_bytes()),
        }
    }

    /// The block that holds a guest byte, which lies inside the disk.
    pub(super) fn block_of(&self, guest_offset: u64) -> u32 {
        u32::try_from(guest_offset / self.block_bytes).expect("at most 2^24 blocks")
    }

    /// The guest bytes of a block, those behind the end of the disk included.
    pub(super) fn guest_of(&self, block: u32) -> Range<u64> {
        let start = u64::from(block) * self.block_bytes; // at most 2^24 blocks of 2^31 bytes
        start..start + self.block_bytes
    }

    /// Where a block stands with its bitmap.
    pub(super) fn place(&self, block: u32) -> Option<u64> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.get(block as usize).copied().filter(|entry| *entry != UNUSED)?;
        Some(u64::from(entry) * SECTOR_BYTES)
    }

    /// Points the map at a block whose bitmap is known.
    pub(super) fn link(&self, block: u32, at_bytes: u64) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let sector = u32::try_from(at_bytes / SECTOR_BYTES).expect("checked when it was reserved");
        if let Some(entry) = entries.get_mut(block as usize) {
            *entry = sector;
        }
    }

    /// Gives the disk another number of blocks; new ones are not there.
    pub(super) fn set_blocks(&self, blocks: usize) {
        self.entries.write().unwrap_or_else(PoisonError::into_inner).resize(blocks, UNUSED);
    }

    /// A copy of some entries.
    pub(super) fn entries(&self, blocks: Range<usize>) -> Vec<u32> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        blocks.map(|block| entries.get(block).copied().unwrap_or(UNUSED)).collect()
    }

    /// The run of sectors that starts with the one of `guest.start`, up to the end of `guest`, which lies inside
    /// one block that stands at `at_bytes`.
    pub(super) fn run(
        &self,
        storage: &dyn Storage,
        block: u32,
        at_bytes: u64,
        guest: &Range<u64>,
    ) -> Result<Run> {
        self.bitmaps.run(storage, block, at_bytes, self.sectors_of(guest))
    }

    /// The sectors of its block that a guest range touches.
    pub(super) fn sectors_of(&self, guest: &Range<u64>) -> Range<u32> {
        let block_start = guest.start - guest.start % self.block_bytes;
        sectors(guest.start - block_start)..sectors((guest.end - block_start).next_multiple_of(SECTOR_BYTES))
    }

    /// Where a guest byte of a block at `at_bytes` stands.
    pub(super) fn data_at(&self, at_bytes: u64, guest_offset: u64) -> u64 {
        at_bytes + self.bitmap_bytes + guest_offset % self.block_bytes
    }

    /// Appends the extents of a guest range. `absent` is what a sector is that the image does not hold.
    pub(super) fn map_range(
        &self,
        storage: &dyn Storage,
        guest: Range<u64>,
        absent: Place,
        writable: bool,
        extents: &mut Vec<Extent>,
    ) -> Result<()> {
        let run = |block, at_bytes, guest: &Range<u64>| self.run(storage, block, at_bytes, guest).map(Some);
        self.walk(guest, absent, writable, run, &mut |extent| extent.push_to(extents)).map(drop)
    }

    /// [`Self::map_range`] from memory alone; false where a bitmap is not there.
    pub(super) fn map_cached(
        &self,
        guest: Range<u64>,
        absent: Place,
        writable: bool,
        found: &mut dyn FnMut(Extent),
    ) -> Result<bool> {
        let run = |block, _, guest: &Range<u64>| Ok(self.bitmaps.known_run(block, self.sectors_of(guest)));
        self.walk(guest, absent, writable, run, found)
    }

    /// Tells the extents of a guest range, until `run` does not know the sectors of a block, which stands at the host
    /// offset that it is given.
    fn walk(
        &self,
        guest: Range<u64>,
        absent: Place,
        writable: bool,
        run: impl Fn(u32, u64, &Range<u64>) -> Result<Option<Run>>,
        found: &mut dyn FnMut(Extent),
    ) -> Result<bool> {
        let mut at = guest.start;
        while at < guest.end {
            let block = self.block_of(at);
            let end = self.guest_of(block).end.min(guest.end);
            let Some(place) = self.place(block) else {
                found(Extent { len_bytes: end - at, place: absent });
                at = end;
                continue;
            };
            while at < end {
                let Some(run) = run(block, place, &(at..end))? else { return Ok(false) };
                // Runs are counted from the start of the sector that `at` is in.
                let until = (at - at % SECTOR_BYTES + u64::from(run.sectors) * SECTOR_BYTES).min(end);
                let host = HostOffset(self.data_at(place, at));
                let place = match run.is_there {
                    true => Place::Data { file: HostFile::IMAGE, at: host, writable },
                    false => absent,
                };
                found(Extent { len_bytes: until - at, place });
                at = until;
            }
        }
        Ok(true)
    }
}

/// Reads the table, calling `visit` with the number of each block that is there and its entry, and gives back
/// the entries of the first `blocks`.
pub(super) fn read_table(
    storage: &dyn Storage,
    header: &Header,
    blocks: usize,
    mut visit: impl FnMut(u32, u32) -> Result<()>,
) -> Result<Vec<u32>> {
    let mut entries = Vec::with_capacity(blocks);
    let mut left = u64::from(header.table_entries) * ENTRY_BYTES;
    let mut at = header.table_at;
    let mut buffer = Vec::new();
    let mut block = 0;
    while left > 0 {
        buffer.resize(READ_BYTES.min(usize::try_from(left).unwrap_or(READ_BYTES)), 0);
        storage.read_at(&mut buffer, at)?;
        for word in buffer.as_chunks::<4>().0 {
            let entry = u32::from_be_bytes(*word);
            if entry != UNUSED {
                visit(block, entry)?;
            }
            if entries.len() < blocks {
                entries.push(entry);
            }
            block += 1;
        }
        at += buffer.len() as u64;
        left -= buffer.len() as u64;
    }
    Ok(entries)
}

/// [`read_table`], where every block has to lie inside the file.
pub(super) fn read_checked_table(storage: &dyn Storage, header: &Header, blocks: usize) -> Result<Vec<u32>> {
    let file_bytes = storage.len_bytes()?;
    read_table(storage, header, blocks, |block, entry| {
        checked_block(header, storage.path(), file_bytes, block, entry).map(|_| ())
    })
}
