//! The header of a hosted sparse extent, and the markers of a compressed stream ("Virtual Disk Format 5.0",
//! sections "Hosted Sparse Extent Header" and "Stream-Optimized Compressed Sparse Extents").

use std::{ops::Range, path::Path};

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use crate::{Error, Result, storage::Storage};

/// Everything on disk is counted in these.
pub(super) const SECTOR_BYTES: u64 = 512;

/// First bytes of a hosted sparse extent.
pub(super) const MAGIC: [u8; 4] = *b"KDMV";

/// The directory's place in a header whose footer knows better.
pub(super) const DIRECTORY_AT_END: u64 = u64::MAX;

/// Bits of `flags`.
pub(super) mod flag {
    /// The four newline bytes are there to be compared.
    pub(in super::super) const NEWLINE_TEST: u32 = 1;
    /// `redundant_directory_sector` counts.
    pub(in super::super) const REDUNDANT_DIRECTORY: u32 = 1 << 1;
    /// Grain table entries of 1 read as zeroes.
    pub(in super::super) const ZEROED_GRAINS: u32 = 1 << 2;
    /// Grains are compressed.
    pub(in super::super) const COMPRESSED: u32 = 1 << 16;
    /// Grains and tables have markers in front of them.
    pub(in super::super) const MARKERS: u32 = 1 << 17;
}

/// `compress_algorithm`: zlib streams.
pub(super) const DEFLATE: u16 = 1;

/// What `newline_test` must hold; a transfer as text changes it.
pub(super) const NEWLINES: [u8; 4] = [b'\n', b' ', b'\r', b'\n'];

/// `SparseExtentHeader`: the first sector of an extent, and the footer of a stream. Little-endian.
#[derive(Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) magic: [u8; 4],
    pub(super) version: U32,
    pub(super) flags: U32,
    pub(super) capacity_sectors: U64,
    pub(super) grain_sectors: U64,
    pub(super) descriptor_sector: U64,
    pub(super) descriptor_sectors: U64,
    pub(super) table_entries: U32,
    pub(super) redundant_directory_sector: U64,
    pub(super) directory_sector: U64,
    pub(super) overhead_sectors: U64,
    pub(super) unclean_shutdown: u8,
    pub(super) newline_test: [u8; 4],
    pub(super) compress_algorithm: U16,
    pub(super) padding: [u8; 433],
}
const _: () = assert!(size_of::<RawHeader>() == 512);

/// The sector in front of a grain, a table, or the footer of a stream. A grain's data begin directly behind
/// the first 12 bytes.
#[derive(Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawMarker {
    /// Sectors of what follows; for a grain its first guest sector.
    pub(super) value: U64,
    /// Stored bytes of a grain; 0 for everything else.
    pub(super) size_bytes: U32,
    /// What follows, where it is no grain.
    pub(super) kind: U32,
    pub(super) padding: [u8; 496],
}
const _: () = assert!(size_of::<RawMarker>() == 512);

/// What a grain's marker takes of the sector.
pub(super) const GRAIN_MARKER_BYTES: usize = 12;

/// `kind` of a [`RawMarker`].
pub(super) mod marker {
    /// The stream ends here.
    pub(in super::super) const END_OF_STREAM: u32 = 0;
    /// A grain table.
    pub(in super::super) const GRAIN_TABLE: u32 = 1;
    /// The grain directory.
    pub(in super::super) const GRAIN_DIRECTORY: u32 = 2;
    /// The footer.
    pub(in super::super) const FOOTER: u32 = 3;
}

impl RawMarker {
    /// A marker that is no grain's.
    pub(super) fn new(kind: u32, sectors: u64) -> Self {
        Self { value: U64::new(sectors), size_bytes: U32::new(0), kind: U32::new(kind), padding: [0; 496] }
    }
}

/// The largest grain (the reference's limit): 1 GiB.
const MAX_GRAIN_SECTORS: u64 = 0x20_0000;

/// The largest compressed grain that is decoded: the unit is held in memory, and no product makes any but
/// 64 KiB.
pub(super) const MAX_COMPRESSED_GRAIN_BYTES: u64 = 2 << 20;

/// Entries of a grain table at most (the reference's limit; every product has 512).
const MAX_TABLE_ENTRIES: u32 = 512;

/// Entries of a grain directory at most (the reference's limit).
pub(super) const MAX_DIRECTORY_ENTRIES: u64 = 32 << 20;

/// Disks are at most so big: byte offsets stay below 2^63.
pub(super) const MAX_CAPACITY_SECTORS: u64 = (i64::MAX as u64) / SECTOR_BYTES;

/// The newest version there is.
const MAX_VERSION: u32 = 3;

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) capacity_sectors: u64,
    pub(super) grain_sectors: u64,
    pub(super) table_entries: u32,
    /// How many tables the directory names.
    pub(super) directory_entries: u64,
    /// Host offset; `None` when the footer has it.
    pub(super) directory_at: Option<u64>,
    pub(super) redundant_at: Option<u64>,
    /// Where the embedded descriptor stands, if there is room for one.
    pub(super) descriptor: Option<Range<u64>>,
    /// What metadata takes at the start.
    pub(super) overhead_bytes: u64,
    pub(super) compressed: bool,
    pub(super) markers: bool,
    pub(super) zeroed_grains: bool,
}

impl Header {
    /// Reads the header at the start of an extent.
    ///
    /// # Errors
    /// [`Error::WrongFormat`] for another magic; else as [`RawHeader::check`].
    pub(super) fn read(storage: &dyn Storage) -> Result<(RawHeader, Self)> {
        let raw = RawHeader::read(storage, 0)?;
        if raw.magic != MAGIC {
            return Err(Error::WrongFormat { file: storage.path().to_owned(), format: "vmdk" });
        }
        let header = raw.check(storage.path(), 0)?;
        Ok((raw, header))
    }

    /// Bytes of a grain.
    pub(super) fn grain_bytes(&self) -> u64 {
        self.grain_sectors * SECTOR_BYTES // at most 1 GiB
    }

    /// Bytes of the disk.
    pub(super) fn capacity_bytes(&self) -> u64 {
        self.capacity_sectors * SECTOR_BYTES // checked: below 2^63
    }
}

impl RawHeader {
    pub(super) fn read(storage: &dyn Storage, at: u64) -> Result<Self> {
        let mut bytes = [0; 512];
        storage.read_at(&mut bytes, at)?;
        Ok(Self::read_from_bytes(&bytes).expect("as long as the struct"))
    }

    /// The header that stands at byte `at`, past whose border numbers are believed.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for the first field outside its limits, [`Error::Unsupported`] for a newer version.
    pub(super) fn check(&self, file: &Path, at: u64) -> Result<Header> {
        let wrong = |structure: &'static str, offset: u64, expected: &str, found: u64| {
            Err(Error::corrupt(file, structure, at + offset, expected, found))
        };
        let version = self.version.get();
        if version > MAX_VERSION {
            return Err(Error::unsupported(file, format_args!("VMDK version {version}")));
        }
        let capacity_sectors = self.capacity_sectors.get();
        if capacity_sectors > MAX_CAPACITY_SECTORS {
            return wrong("header.capacity", 12, "less than 2^54 sectors", capacity_sectors);
        }
        let grain_sectors = self.grain_sectors.get();
        if !(1..=MAX_GRAIN_SECTORS).contains(&grain_sectors) {
            return wrong("header.grainSize", 20, "1 to 2097152 sectors", grain_sectors);
        }
        let table_entries = self.table_entries.get();
        if !(1..=MAX_TABLE_ENTRIES).contains(&table_entries) {
            return wrong("header.numGTEsPerGT", 44, "1 to 512 entries", table_entries.into());
        }
        let table_sectors = u64::from(table_entries) * grain_sectors; // at most 2^9 × 2^21
        let directory_entries = capacity_sectors.div_ceil(table_sectors);
        if directory_entries > MAX_DIRECTORY_ENTRIES {
            return wrong("grain directory", 12, "at most 33554432 entries", directory_entries);
        }
        let flags = self.flags.get();
        let compressed = match self.compress_algorithm.get() {
            0 => false,
            DEFLATE => true,
            other => {
                return Err(Error::unsupported(file, format_args!("compression algorithm {other}")));
            }
        };
        if compressed && grain_sectors * SECTOR_BYTES > MAX_COMPRESSED_GRAIN_BYTES {
            return Err(Error::unsupported(
                file,
                format_args!("a compressed grain of {grain_sectors} sectors"),
            ));
        }
        let bytes = |structure: &'static str, offset: u64, sectors: u64| match sectors.checked_mul(512) {
            Some(bytes) if bytes <= i64::MAX as u64 => Ok(bytes),
            _ => Err(Error::corrupt(file, structure, at + offset, "less than 2^54 sectors", sectors)),
        };
        let directory_at = match self.directory_sector.get() {
            DIRECTORY_AT_END => None,
            sector => Some(bytes("header.gdOffset", 56, sector)?),
        };
        let redundant_at = match self.redundant_directory_sector.get() {
            sector if flags & flag::REDUNDANT_DIRECTORY != 0 && sector != DIRECTORY_AT_END => {
                Some(bytes("header.rgdOffset", 48, sector)?)
            }
            _ => None,
        };
        let descriptor = match self.descriptor_sector.get() {
            0 => None,
            sector => {
                let start = bytes("header.descriptorOffset", 28, sector)?;
                let len = bytes("header.descriptorSize", 36, self.descriptor_sectors.get())?;
                Some(start..start + len) // both below 2^63
            }
        };
        Ok(Header {
            version,
            capacity_sectors,
            grain_sectors,
            table_entries,
            directory_entries,
            directory_at,
            redundant_at,
            descriptor,
            overhead_bytes: bytes("header.overHead", 64, self.overhead_sectors.get())?,
            compressed,
            markers: flags & flag::MARKERS != 0,
            zeroed_grains: flags & flag::ZEROED_GRAINS != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> RawHeader {
        RawHeader {
            magic: MAGIC,
            version: U32::new(1),
            flags: U32::new(3),
            capacity_sectors: U64::new(20480),
            grain_sectors: U64::new(128),
            descriptor_sector: U64::new(1),
            descriptor_sectors: U64::new(20),
            table_entries: U32::new(512),
            redundant_directory_sector: U64::new(21),
            directory_sector: U64::new(26),
            overhead_sectors: U64::new(128),
            unclean_shutdown: 0,
            newline_test: NEWLINES,
            compress_algorithm: U16::new(0),
            padding: [0; 433],
        }
    }

    #[test]
    fn a_valid_header_becomes_bytes_and_counts() {
        let header = valid().check(Path::new("d"), 0).expect("valid");
        assert_eq!(header.capacity_bytes(), 10 << 20);
        assert_eq!(header.grain_bytes(), 65536);
        assert_eq!(header.directory_entries, 1);
        assert_eq!(header.directory_at, Some(26 * 512));
        assert_eq!(header.redundant_at, Some(21 * 512));
        assert_eq!(header.descriptor, Some(512..21 * 512));
    }

    #[test]
    fn each_number_outside_its_limits_is_refused_by_name() {
        type Break = fn(&mut RawHeader);
        let cases: [(Break, &str); 10] = [
            (|h| h.version = U32::new(4), "VMDK version 4"),
            (|h| h.capacity_sectors = U64::new(1 << 55), "header.capacity"),
            (|h| h.grain_sectors = U64::new(0), "header.grainSize"),
            (|h| h.grain_sectors = U64::new(0x20_0001), "header.grainSize"),
            (|h| h.table_entries = U32::new(0), "header.numGTEsPerGT"),
            (|h| h.table_entries = U32::new(513), "header.numGTEsPerGT"),
            (|h| h.compress_algorithm = U16::new(2), "compression algorithm 2"),
            (|h| h.directory_sector = U64::new(1 << 60), "header.gdOffset"),
            (|h| h.descriptor_sectors = U64::new(1 << 60), "header.descriptorSize"),
            (
                |h| {
                    h.capacity_sectors = U64::new(1 << 50);
                    h.grain_sectors = U64::new(1);
                },
                "grain directory",
            ),
        ];
        for (break_it, name) in cases {
            let mut raw = valid();
            break_it(&mut raw);
            let error = raw.check(Path::new("d"), 0).expect_err(name).to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
    }
}
