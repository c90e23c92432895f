//! COWD extents: the sparse files of ESX hosts, `vmfsSparse` ("Virtual Disk Format 5.0", "ESXi Host Sparse
//! Extents"), read only.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned, little_endian::U32};

use super::{
    header::SECTOR_BYTES,
    sparse::{Directory, EntryForm, Shape},
};
use crate::{Error, Result, storage::Storage};

/// First bytes of a COWD extent.
pub(super) const MAGIC: [u8; 4] = *b"COWD";

/// Entries of a COWD grain table, always.
const TABLE_ENTRIES: u64 = 4096;

/// The largest grain (the reference's limit): 1 GiB.
const MAX_GRAIN_SECTORS: u32 = 0x20_0000;

/// Entries of a directory at most: what a disk of 2^32 sectors needs with grains of one sector.
const MAX_DIRECTORY_ENTRIES: u32 = 1 << 20;

/// `COWDisk_Header`, the part that readers need. The root and parent fields that follow are history: names
/// and generations that no reader uses.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U32,
    flags: U32,
    capacity_sectors: U32,
    grain_sectors: U32,
    directory_sector: U32,
    directory_entries: U32,
    free_sector: U32,
    rest: [u8; 480],
}
const _: () = assert!(size_of::<RawHeader>() == 512);

/// Reads the header of the extent on `storage`.
///
/// # Errors
/// [`Error::WrongFormat`] for another magic, [`Error::Corrupt`] for the first field outside its limits.
pub(super) fn read(storage: &dyn Storage) -> Result<Shape> {
    let file = storage.path();
    let mut bytes = [0; 512];
    storage.read_at(&mut bytes, 0)?;
    let header = RawHeader::read_from_bytes(&bytes).expect("as long as the struct");
    if header.magic != MAGIC {
        return Err(Error::WrongFormat { file: file.to_owned(), format: "COWD" });
    }
    let grain_sectors = header.grain_sectors.get();
    if !(1..=MAX_GRAIN_SECTORS).contains(&grain_sectors) {
        return Err(Error::corrupt(file, "header.granularity", 16, "1 to 2097152 sectors", grain_sectors));
    }
    let capacity_sectors = u64::from(header.capacity_sectors.get());
    let directory_entries = header.directory_entries.get();
    let needed = capacity_sectors.div_ceil(TABLE_ENTRIES * u64::from(grain_sectors));
    if directory_entries > MAX_DIRECTORY_ENTRIES || u64::from(directory_entries) < needed {
        let expected = format!("{needed} to {MAX_DIRECTORY_ENTRIES} entries");
        return Err(Error::corrupt(file, "header.numGDEntries", 24, expected, directory_entries));
    }
    Ok(Shape {
        capacity_bytes: capacity_sectors * SECTOR_BYTES,
        grain_bytes: u64::from(grain_sectors) * SECTOR_BYTES,
        table_entries: TABLE_ENTRIES,
        directory_entries: directory_entries.into(),
        directory: Directory::File(u64::from(header.directory_sector.get()) * SECTOR_BYTES),
        redundant_at: None,
        form: EntryForm::Sectors { zeroed_grains: false },
        compressed: false,
        markers: false,
        overhead_bytes: 0,
    })
}
