//! The dynamic disk header: 1024 bytes that say where the blocks of a dynamic or differencing disk are
//! ("Dynamic Disk Header Format").

use std::{ops::Range, path::Path};

use zerocopy::{
    FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U32, U64},
};

use super::{
    footer::{FOOTER_BYTES, UniqueId, checksum},
    geometry::SECTOR_BYTES,
};
use crate::{Error, Result, storage::Storage};

/// All fields, big-endian.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) cookie: [u8; 8],
    /// Unused: all ones.
    pub(super) data_offset: U64,
    pub(super) table_offset: U64,
    pub(super) version: U32,
    pub(super) max_table_entries: U32,
    pub(super) block_size: U32,
    pub(super) checksum: U32,
    pub(super) parent_unique_id: UniqueId,
    pub(super) parent_timestamp: U32,
    pub(super) reserved: U32,
    /// UTF-16, big-endian.
    pub(super) parent_name: [u8; 512],
    pub(super) locators: [RawLocator; 8],
    pub(super) padding: [u8; 256],
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

/// One place where a name of the parent stands ("Parent Locator Entry").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawLocator {
    pub(super) platform_code: [u8; 4],
    /// Space that the name may take. The specification counts sectors, most programs bytes.
    pub(super) data_space: U32,
    /// Bytes of the name.
    pub(super) data_length: U32,
    pub(super) reserved: U32,
    pub(super) data_offset: U64,
}

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 1024;
/// The first bytes of every header.
pub(super) const COOKIE: [u8; 8] = *b"cxsparse";
/// Version 1.0.
pub(super) const VERSION: u32 = 0x0001_0000;
/// What every writer chooses.
pub(super) const DEFAULT_BLOCK_BYTES: u32 = 2 << 20;
/// Bytes of an entry of the block allocation table.
pub(super) const ENTRY_BYTES: u64 = 4;
/// An entry without a block.
pub(super) const UNUSED: u32 = u32::MAX;
/// The table is held in memory: 64 MiB, enough for a disk of 2040 GiB in blocks of 128 KiB. Blocks are 2 MiB,
/// seldom 512 KiB, wherever such disks are made.
const MAX_TABLE_ENTRIES: u32 = 1 << 24;
/// Where the sum stands.
const CHECKSUM_AT: usize = 36;

/// What the rest of the driver works with.
#[derive(Clone)]
pub(super) struct Header {
    /// Host offset of the header.
    pub(super) at_bytes: u64,
    /// Host offset of the block allocation table; a multiple of 512.
    pub(super) table_at: u64,
    /// Entries of the table: enough for the disk.
    pub(super) table_entries: u32,
    /// Guest bytes of a block; a power of two, at least 512.
    pub(super) block_bytes: u64,
    /// Whether the sum is right. The fields were checked one by one in any case.
    pub(super) is_intact: bool,
    pub(super) raw: RawHeader,
}

impl RawHeader {
    /// All zeroes but what is the same in every header that is made here.
    pub(super) fn empty() -> Self {
        Self {
            cookie: COOKIE,
            data_offset: u64::MAX.into(),
            version: VERSION.into(),
            block_size: DEFAULT_BLOCK_BYTES.into(),
            ..Self::new_zeroed()
        }
    }

    /// The same with the sum that belongs to the other fields.
    pub(super) fn summed(mut self) -> Self {
        self.checksum = checksum(self.as_bytes(), CHECKSUM_AT).into();
        self
    }
}

impl Header {
    /// Reads and checks the header at `at_bytes` for a disk of `virtual_size_bytes`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for the first field outside its limits; [`Error::Unsupported`] for a table that is
    /// too large.
    pub(super) fn read(storage: &dyn Storage, at_bytes: u64, virtual_size_bytes: u64) -> Result<Self> {
        let path = storage.path();
        let file_bytes = storage.len_bytes()?;
        let inside = |start: u64, len: u64| start.checked_add(len).is_some_and(|end| end <= file_bytes);
        if at_bytes < FOOTER_BYTES as u64 || !inside(at_bytes, HEADER_BYTES as u64) {
            let rule = format_args!("the header between the footers of {file_bytes} bytes").to_string();
            return Err(Error::corrupt(path, "footer.data_offset", 16, rule, at_bytes));
        }
        let mut raw = RawHeader::new_zeroed();
        storage.read_at(raw.as_mut_bytes(), at_bytes)?;
        let corrupt = |structure, offset: u64, expected: String, found: String| {
            Err(Error::corrupt(path, structure, at_bytes + offset, expected, found))
        };
        if raw.cookie != COOKIE {
            return corrupt(
                "header.cookie",
                0,
                "cxsparse".to_owned(),
                String::from_utf8_lossy(&raw.cookie).escape_default().to_string(),
            );
        }
        if raw.version.get() >> 16 != VERSION >> 16 {
            return corrupt("header.version", 24, "1.x".to_owned(), format!("{:#x}", raw.version.get()));
        }
        let block = raw.block_size.get();
        if !block.is_power_of_two() || u64::from(block) < SECTOR_BYTES {
            return corrupt(
                "header.block_size",
                32,
                "a power of two, 512 or more".to_owned(),
                block.to_string(),
            );
        }
        let block_bytes = u64::from(block);
        let entries = raw.max_table_entries.get();
        let needed = virtual_size_bytes.div_ceil(block_bytes);
        if u64::from(entries) < needed {
            let rule = format!("{needed} blocks for {virtual_size_bytes} bytes");
            return corrupt("header.max_table_entries", 28, rule, entries.to_string());
        }
        check_table_entries(path, entries)?;
        let table_at = raw.table_offset.get();
        let table_bytes = u64::from(entries) * ENTRY_BYTES; // at most 64 MiB
        if !table_at.is_multiple_of(SECTOR_BYTES) || !inside(table_at, table_bytes) {
            let rule = format!("a multiple of 512, {table_bytes} bytes before the end of {file_bytes}");
            return corrupt("header.table_offset", 16, rule, table_at.to_string());
        }
        let header = Self {
            at_bytes,
            table_at,
            table_entries: entries,
            block_bytes,
            is_intact: raw.checksum == raw.summed().checksum,
            raw,
        };
        let table = header.table();
        let taken = at_bytes..at_bytes + HEADER_BYTES as u64;
        if table.start < FOOTER_BYTES as u64 || (table.start < taken.end && taken.start < table.end) {
            let rule = format!("no overlap with the footer and the header at {at_bytes}");
            return corrupt("header.table_offset", 16, rule, table_at.to_string());
        }
        Ok(header)
    }

    /// Where the table stands, up to the end of its last sector.
    pub(super) fn table(&self) -> Range<u64> {
        let bytes = u64::from(self.table_entries) * ENTRY_BYTES;
        self.table_at..self.table_at + bytes.next_multiple_of(SECTOR_BYTES) // behind the file's end by 511 at most
    }

    /// Host bytes of the sector bitmap in front of each block.
    pub(super) fn bitmap_bytes(&self) -> u64 {
        (self.block_bytes / SECTOR_BYTES).div_ceil(8).next_multiple_of(SECTOR_BYTES)
    }

    /// Host bytes that a block takes with its bitmap.
    pub(super) fn stored_block_bytes(&self) -> u64 {
        self.bitmap_bytes() + self.block_bytes
    }

    /// Host offset of an entry of the table.
    pub(super) fn entry_at(&self, block: u32) -> u64 {
        self.table_at + u64::from(block) * ENTRY_BYTES
    }
}

/// Refuses tables that are too large to be held.
pub(super) fn check_table_entries(path: &Path, entries: u32) -> Result<()> {
    if entries > MAX_TABLE_ENTRIES {
        return Err(Error::unsupported(path, format_args!("a table of {entries} blocks")));
    }
    Ok(())
}

/// Where the block that `entry` names stands with its bitmap: inside the file, or an error that names the entry.
pub(super) fn checked_block(
    header: &Header,
    path: &Path,
    file_bytes: u64,
    block: u32,
    entry: u32,
) -> Result<u64> {
    let start = u64::from(entry) * SECTOR_BYTES;
    if start + header.stored_block_bytes() <= file_bytes {
        return Ok(start);
    }
    Err(Error::corrupt(
        path,
        "block allocation table",
        header.entry_at(block),
        format_args!("a block of {} bytes inside the {file_bytes} of the file", header.stored_block_bytes()),
        format_args!("one at {start:#x}"),
    ))
}
