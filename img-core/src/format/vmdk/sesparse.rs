//! seSparse extents: the sparse format of VMFS 6 snapshots, read only.
//!
//! No document of its maker describes it; the layout is the one that all readers agree on. Two header sectors,
//! then areas for the journal, directory, tables, bitmaps and grains. Grains are 4 KiB, entries 64 bits whose
//! highest four say what they are.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned, little_endian::U64};

use super::{
    header::{MAX_CAPACITY_SECTORS, SECTOR_BYTES},
    sparse::{Directory, EntryForm, Grain, Shape},
};
use crate::{Error, Result, storage::Storage};

const CONSTANT_MAGIC: u64 = 0x0000_0000_cafe_babe;
const VOLATILE_MAGIC: u64 = 0x0000_0000_cafe_cafe;
/// Version 2.1, the only one.
const VERSION: u64 = 0x0000_0002_0000_0001;
/// The only grain: 4 KiB.
const GRAIN_SECTORS: u64 = 8;
/// The only table: 4096 entries.
const TABLE_SECTORS: u64 = 64;
/// Directory sectors at most: they name the tables of a 64 TiB disk, the largest there is, and twice as many.
const MAX_DIRECTORY_SECTORS: u64 = 2 << 17;

/// The first sector. What it says never changes.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawConstantHeader {
    magic: U64,
    version: U64,
    capacity_sectors: U64,
    grain_sectors: U64,
    table_sectors: U64,
    flags: U64,
    reserved: [U64; 4],
    volatile_header: RawArea,
    journal_header: RawArea,
    journal: RawArea,
    directory: RawArea,
    tables: RawArea,
    free_bitmap: RawArea,
    backmap: RawArea,
    grains: RawArea,
    padding: [u8; 304],
}
const _: () = assert!(size_of::<RawConstantHeader>() == 512);

/// A part of the file, in sectors.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawArea {
    sector: U64,
    sectors: U64,
}

/// The sector that changes while the extent is written.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawVolatileHeader {
    magic: U64,
    free_table: U64,
    next_transaction: U64,
    replay_journal: U64,
    padding: [u8; 480],
}
const _: () = assert!(size_of::<RawVolatileHeader>() == 512);

/// Where tables and grains are counted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bases {
    tables_at: u64,
    grains_at: u64,
}

impl Bases {
    /// The table that a directory entry names: 0x1 in the highest four bits, the table's number in the low 32.
    pub(super) fn table(self, entry: u64, table_bytes: u64) -> Option<u64> {
        if entry >> 32 != 0x1000_0000 {
            return None;
        }
        self.tables_at.checked_add((entry & 0xffff_ffff) * table_bytes) // 2^32 × 2^15
    }

    /// What a table entry says. The number of an allocated grain has its low 12 bits behind the type and the
    /// others below them.
    pub(super) fn grain(self, entry: u64) -> Option<Grain> {
        match entry >> 60 {
            0 if entry == 0 => Some(Grain::Unallocated),
            // Unmapped by the guest: as if never written.
            1 => Some(Grain::Unallocated),
            2 => Some(Grain::Zero),
            3 => {
                let number = (entry & 0x0fff_0000_0000_0000) >> 48 | (entry & 0x0000_ffff_ffff_ffff) << 12;
                let bytes = number.checked_mul(GRAIN_SECTORS * SECTOR_BYTES)?;
                self.grains_at.checked_add(bytes).map(Grain::At)
            }
            _ => None,
        }
    }
}

/// Reads both headers of the extent on `storage`.
///
/// # Errors
/// [`Error::Corrupt`] for the first field outside its limits; [`Error::Unsupported`] for another version, for
/// flags, and while a journal waits to be replayed.
pub(super) fn read(storage: &dyn Storage) -> Result<Shape> {
    let file = storage.path();
    let mut bytes = [0; 512];
    storage.read_at(&mut bytes, 0)?;
    let header = RawConstantHeader::read_from_bytes(&bytes).expect("as long as the struct");
    let wrong = |structure, at: u64, expected: &str, found: u64| {
        Err(Error::corrupt(file, structure, at, expected, format_args!("{found:#x}")))
    };
    if header.magic.get() != CONSTANT_MAGIC {
        return Err(Error::WrongFormat { file: file.to_owned(), format: "seSparse" });
    }
    if header.version.get() != VERSION {
        let version = header.version.get();
        return Err(Error::unsupported(file, format_args!("seSparse version {version:#x}")));
    }
    let capacity_sectors = header.capacity_sectors.get();
    if capacity_sectors > MAX_CAPACITY_SECTORS {
        return wrong("header.capacity", 16, "less than 2^54 sectors", capacity_sectors);
    }
    if header.grain_sectors.get() != GRAIN_SECTORS {
        return wrong("header.grain_size", 24, "8 sectors", header.grain_sectors.get());
    }
    if header.table_sectors.get() != TABLE_SECTORS {
        return wrong("header.grain_table_size", 32, "64 sectors", header.table_sectors.get());
    }
    if header.flags.get() != 0 {
        return Err(Error::unsupported(file, format_args!("seSparse flags {:#x}", header.flags.get())));
    }
    if header.reserved.iter().any(|word| word.get() != 0) {
        return Err(Error::unsupported(file, "an seSparse header with reserved fields in use"));
    }
    let bytes_of = |structure, at: u64, sector: u64| match sector.checked_mul(SECTOR_BYTES) {
        Some(bytes) if sector <= MAX_CAPACITY_SECTORS => Ok(bytes),
        _ => Err(Error::corrupt(file, structure, at, "less than 2^54 sectors", sector)),
    };
    let volatile_at = bytes_of("header.volatile_header_offset", 80, header.volatile_header.sector.get())?;
    check_volatile(storage, volatile_at)?;

    let table_entries = TABLE_SECTORS * SECTOR_BYTES / 8;
    let directory_sectors = header.directory.sectors.get();
    if directory_sectors > MAX_DIRECTORY_SECTORS {
        return wrong("header.grain_dir_size", 136, "at most 262144 sectors", directory_sectors);
    }
    let directory_entries = directory_sectors * SECTOR_BYTES / 8;
    let needed = capacity_sectors.div_ceil(table_entries * GRAIN_SECTORS);
    if directory_entries < needed {
        return wrong("header.grain_dir_size", 136, "room for a table for each 16 MiB", directory_sectors);
    }
    Ok(Shape {
        capacity_bytes: capacity_sectors * SECTOR_BYTES,
        grain_bytes: GRAIN_SECTORS * SECTOR_BYTES,
        table_entries,
        directory_entries,
        directory: Directory::File(bytes_of("header.grain_dir_offset", 128, header.directory.sector.get())?),
        redundant_at: None,
        form: EntryForm::SeSparse(Bases {
            tables_at: bytes_of("header.grain_tables_offset", 144, header.tables.sector.get())?,
            grains_at: bytes_of("header.grains_offset", 192, header.grains.sector.get())?,
        }),
        compressed: false,
        markers: false,
        overhead_bytes: 0,
    })
}

fn check_volatile(storage: &dyn Storage, at: u64) -> Result<()> {
    let mut bytes = [0; 512];
    storage.read_at(&mut bytes, at)?;
    let header = RawVolatileHeader::read_from_bytes(&bytes).expect("as long as the struct");
    if header.magic.get() != VOLATILE_MAGIC {
        let found = format_args!("{:#x}", header.magic.get()).to_string();
        return Err(Error::corrupt(storage.path(), "volatile header", at, "0xcafecafe", found));
    }
    if header.replay_journal.get() != 0 {
        return Err(Error::unsupported(storage.path(), "an seSparse journal that waits to be replayed"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_each_type() {
        let bases = Bases { tables_at: 1 << 20, grains_at: 1 << 30 };
        assert_eq!(bases.grain(0), Some(Grain::Unallocated));
        assert_eq!(bases.grain(1), None);
        assert_eq!(bases.grain(0x1000_0000_0000_0000), Some(Grain::Unallocated));
        assert_eq!(bases.grain(0x2000_0000_0000_0000), Some(Grain::Zero));
        assert_eq!(bases.grain(0x3005_0000_0000_0000), Some(Grain::At((1 << 30) + 5 * 4096)));
        assert_eq!(bases.grain(0x3005_0000_0000_0001), Some(Grain::At((1 << 30) + (4096 + 5) * 4096)));
        assert_eq!(bases.grain(0x3fff_ffff_ffff_ffff), None);
        assert_eq!(bases.grain(0x4000_0000_0000_0000), None);
        assert_eq!(bases.table(0x1000_0000_0000_0003, 32768), Some((1 << 20) + 3 * 32768));
        assert_eq!(bases.table(0x1000_0001_0000_0003, 32768), None);
        assert_eq!(bases.table(3, 32768), None);
    }
}
