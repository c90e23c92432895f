//! Where all structures of a dynamic disk stand: for the checks before the first write, and for the audit.

use std::{mem::offset_of, ops::Range};

use super::{
    footer::{Copies, Copy, DiskType, FOOTER_BYTES},
    geometry::SECTOR_BYTES,
    header::{HEADER_BYTES, Header, RawHeader, RawLocator},
    map::read_table,
};
use crate::{Result, storage::Storage};

/// XenServer keeps a second bitmap, of blocks, behind the table: 512 bytes of header, then the map. It only says
/// which blocks are full, so that leaving it alone is safe; it must not be overwritten.
const BATMAP_COOKIE: [u8; 8] = *b"tdbatmap";

/// The places of an image.
#[derive(Debug)]
pub(super) struct Places {
    /// Everything but blocks, by name.
    structures: Vec<(&'static str, Range<u64>)>,
    /// Host offsets in the header of locators that lead outside the file. They would lead into blocks once the file
    /// has grown.
    pub(super) broken_locators: Vec<u64>,
    /// Host sector and number of each block, by sector.
    blocks: Vec<(u32, u32)>,
    stored_block_bytes: u64,
    table_at: u64,
}

/// A block that has not its place for itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overlap {
    pub(super) block: u32,
    /// Where its entry stands.
    pub(super) entry_at: u64,
    /// Where the block stands.
    pub(super) at_bytes: u64,
    /// What else stands there.
    pub(super) with: &'static str,
}

impl Places {
    /// Collects them. Blocks may lie outside the file. Locators mean something in differencing disks alone.
    pub(super) fn collect(storage: &dyn Storage, header: &Header, disk_type: DiskType) -> Result<Self> {
        let mut structures = vec![
            ("the footer's copy", 0..FOOTER_BYTES as u64),
            ("the header", header.at_bytes..header.at_bytes + HEADER_BYTES as u64),
            ("the block allocation table", header.table()),
        ];
        let file_bytes = storage.len_bytes()?;
        let mut broken_locators = Vec::new();
        let locators = header.raw.locators.iter().enumerate();
        for (index, locator) in locators.filter(|_| disk_type == DiskType::Differencing) {
            let (at, len) = (locator.data_offset.get(), u64::from(locator.data_length.get()));
            if locator.platform_code == [0; 4] || len == 0 {
                continue;
            }
            match at.checked_add(len).filter(|end| *end <= file_bytes) {
                Some(end) => structures.push(("a parent locator", at..end)),
                None => {
                    let field = offset_of!(RawHeader, locators) + index * size_of::<RawLocator>();
                    broken_locators.push(header.at_bytes + field as u64);
                }
            }
        }
        structures.extend(batmap(storage, header)?.map(|place| ("the map of full blocks", place)));
        let mut blocks = Vec::new();
        read_table(storage, header, 0, |block, entry| {
            blocks.push((entry, block));
            Ok(())
        })?;
        blocks.sort_unstable();
        Ok(Self {
            structures,
            broken_locators,
            blocks,
            stored_block_bytes: header.stored_block_bytes(),
            table_at: header.table_at,
        })
    }

    /// Every block that overlaps something, by place.
    pub(super) fn overlaps(&self) -> Vec<Overlap> {
        let mut found = Vec::new();
        let mut last_end = 0;
        for &(sector, block) in &self.blocks {
            let place = self.block_place(sector);
            let hit =
                self.structures.iter().find(|(_, range)| range.start < place.end && place.start < range.end);
            let with = match hit {
                Some((name, _)) => Some(*name),
                None => (place.start < last_end).then_some("another block"),
            };
            if let Some(with) = with {
                let entry_at = self.table_at + u64::from(block) * 4;
                found.push(Overlap { block, entry_at, at_bytes: place.start, with });
            }
            last_end = place.end;
        }
        found
    }

    fn block_place(&self, sector: u32) -> Range<u64> {
        let start = u64::from(sector) * SECTOR_BYTES;
        start..start + self.stored_block_bytes // below 2^41 + 2^32
    }

    /// The end of the last structure or block, rounded up to a sector.
    pub(super) fn used_end(&self) -> u64 {
        let structures = self.structures.iter().map(|(_, range)| range.end).max().unwrap_or(0);
        let blocks = self.blocks.last().map_or(0, |(sector, _)| self.block_place(*sector).end);
        structures.max(blocks).next_multiple_of(SECTOR_BYTES)
    }

    /// Where new blocks go: the place of the footer at the end, which moves behind them; without one, the end of
    /// the file. Nothing that stands in the file is overwritten, whether or not it is known here.
    pub(super) fn next_free(&self, copies: &Copies) -> u64 {
        let is_footer = copies.back != Copy::Absent && copies.back_at.is_multiple_of(SECTOR_BYTES);
        if is_footer && copies.back_at >= self.used_end() {
            return copies.back_at;
        }
        copies.file_bytes.next_multiple_of(SECTOR_BYTES).max(self.used_end())
    }

    /// How many blocks are there.
    pub(super) fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// How many of the blocks do not directly follow the one before them on the disk.
    pub(super) fn fragmented(&self) -> usize {
        let mut by_number: Vec<(u32, u32)> =
            self.blocks.iter().map(|(sector, block)| (*block, *sector)).collect();
        by_number.sort_unstable();
        let is_gap = |pair: &[(u32, u32)]| {
            u64::from(pair[1].1) * SECTOR_BYTES
                != u64::from(pair[0].1) * SECTOR_BYTES + self.stored_block_bytes
        };
        by_number.windows(2).filter(|pair| is_gap(pair)).count()
    }
}

/// The place of XenServer's map, where there is one.
fn batmap(storage: &dyn Storage, header: &Header) -> Result<Option<Range<u64>>> {
    let start = header.table().end;
    let file_bytes = storage.len_bytes()?;
    if start + SECTOR_BYTES > file_bytes {
        return Ok(None);
    }
    let mut head = [0; 20];
    storage.read_at(&mut head, start)?;
    if head[..8] != BATMAP_COOKIE {
        return Ok(None);
    }
    let at = u64::from_be_bytes(head[8..16].try_into().expect("eight bytes"));
    let sectors = u32::from_be_bytes(head[16..20].try_into().expect("four bytes"));
    let end = at.checked_add(u64::from(sectors) * SECTOR_BYTES);
    Ok(Some(start..end.filter(|end| at >= start && *end <= file_bytes).unwrap_or(start + SECTOR_BYTES)))
}
