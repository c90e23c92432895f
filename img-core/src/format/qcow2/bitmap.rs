//! Persistent dirty bitmaps: their directory ("Bitmaps").
//!
//! An entry of the directory names a bitmap, its flags and its table. `bitmap_store` reads and writes what
//! the tables lead to, `bitmap_track` keeps enabled bitmaps up to date while the disk changes.

use std::path::Path;

use super::{
    entry::OFFSET_MASK,
    extension::{BitmapsExtension, be32, be64, text},
    geometry::Geometry,
};
use crate::{
    Error, Result,
    storage::{Flush, Storage},
};

/// The fixed part of a directory entry.
const ENTRY_BYTES: usize = 24;
/// Flag: the bitmap may be out of date.
const IN_USE: u32 = 1;
/// Flag: enabled, must reflect all changes.
const AUTO: u32 = 2;
/// Flag: the bitmap may be used in spite of unknown extra data.
const EXTRA_DATA_COMPATIBLE: u32 = 4;
/// "type": a dirty tracking bitmap.
const DIRTY_TRACKING: u8 = 1;
/// Entries of a bitmap table (the reference's limit).
pub(super) const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// Bytes of a bitmap's data (the reference's limit).
pub(super) const MAX_DATA_BYTES: u64 = 0x2000_0000;
/// The reference's limit of names.
pub(super) const MAX_NAME_BYTES: u16 = 1023;
/// The reference's granularities: 512 bytes to 2 GiB.
pub(super) const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

/// A bitmap as the directory describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bitmap {
    /// Host offset of its directory entry.
    entry_at: u64,
    /// Host offset of its table, aligned to clusters.
    pub(super) table_offset: u64,
    /// Entries of the table, one a cluster of data.
    pub(super) table_entries: u32,
    flags: u32,
    granularity_bits: u8,
    /// Its name.
    pub(super) name: String,
    /// The entry as it stands in the directory, without padding.
    raw: Vec<u8>,
}

impl Bitmap {
    /// An entry without a table yet. Granularity and name are within their limits.
    pub(super) fn new(name: &str, granularity_bytes: u64) -> Self {
        let granularity_bits = u8::try_from(granularity_bytes.trailing_zeros()).expect("at most 64");
        let name_bytes = u16::try_from(name.len()).expect("checked: at most MAX_NAME_BYTES");
        let mut raw = vec![0; ENTRY_BYTES];
        raw[16] = DIRTY_TRACKING;
        raw[17] = granularity_bits;
        raw[18..20].copy_from_slice(&name_bytes.to_be_bytes());
        raw.extend_from_slice(name.as_bytes());
        let name = name.to_owned();
        Self { entry_at: 0, table_offset: 0, table_entries: 0, flags: 0, granularity_bits, name, raw }
    }

    /// Makes the entry one of a bitmap that is up to date, with another table.
    pub(super) fn put(&mut self, table_offset: u64, table_entries: u32, enabled: bool) {
        self.flags = self.flags & EXTRA_DATA_COMPATIBLE | if enabled { AUTO } else { 0 };
        (self.table_offset, self.table_entries) = (table_offset, table_entries);
        self.raw[..8].copy_from_slice(&table_offset.to_be_bytes());
        self.raw[8..12].copy_from_slice(&table_entries.to_be_bytes());
        self.raw[12..16].copy_from_slice(&self.flags.to_be_bytes());
    }

    /// Whether its bits mean something: it is up to date, and nothing unknown changes their meaning.
    pub(super) fn is_usable(&self) -> bool {
        let has_extra = be32(&self.raw, 20) != 0;
        !self.is_in_use() && (!has_extra || self.flags & EXTRA_DATA_COMPATIBLE != 0)
    }

    /// Whether it may be out of date.
    pub(super) fn is_in_use(&self) -> bool {
        self.flags & IN_USE != 0
    }

    /// Whether it must reflect all changes.
    pub(super) fn is_auto(&self) -> bool {
        self.flags & AUTO != 0
    }

    /// Bytes of disk that a bit stands for.
    pub(super) fn granularity_bytes(&self) -> u64 {
        1 << self.granularity_bits
    }
}

/// Reads the directory that `extension` names.
///
/// # Errors
/// [`Error::Corrupt`] for the first entry that breaks a rule or a limit.
pub(super) fn read_directory(
    storage: &dyn Storage,
    geometry: Geometry,
    extension: BitmapsExtension,
) -> Result<Vec<Bitmap>> {
    let file = storage.path();
    let base = extension.directory_offset;
    let length = storage.len_bytes()?;
    // At most 64 MiB by the header's check, and never more than the file has.
    if base.checked_add(extension.directory_bytes).is_none_or(|end| end > length) {
        return Err(Error::corrupt(
            file,
            "bitmap directory",
            base,
            format_args!("an end inside the file of {length} bytes"),
            format_args!("{} bytes", extension.directory_bytes),
        ));
    }
    let mut directory = vec![0; usize::try_from(extension.directory_bytes).expect("at most 64 MiB")];
    storage.read_at(&mut directory, base)?;
    let mut bitmaps = Vec::new();
    let mut rest = &directory[..];
    for _ in 0..extension.count {
        let at = base + (directory.len() - rest.len()) as u64;
        let Some(fixed) = rest.first_chunk::<ENTRY_BYTES>() else {
            return Err(Error::corrupt(
                file,
                "bitmap directory",
                at,
                format_args!("{} bitmaps in {} bytes", extension.count, directory.len()),
                format_args!("room for {}", bitmaps.len()),
            ));
        };
        let entry = Entry { file, at, fixed };
        let name_bytes = usize::from(entry.u16(18));
        let extra_bytes = usize::try_from(be32(fixed, 20)).expect("u32 fits usize");
        let bytes = ENTRY_BYTES.checked_add(extra_bytes).and_then(|sum| sum.checked_add(name_bytes));
        let Some(body) = bytes.and_then(|bytes| rest.get(..bytes)) else {
            return entry.corrupt(
                "bitmap directory entry, sizes",
                18,
                "an end inside the directory",
                extra_bytes,
            );
        };
        let name = text(&body[ENTRY_BYTES + extra_bytes..], file, "bitmap name", at)?;
        bitmaps.push(entry.parse(geometry, name, body.to_vec())?);
        rest = rest.get(body.len().next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(bitmaps)
}

/// An entry of the directory, being checked.
struct Entry<'a> {
    file: &'a Path,
    at: u64,
    fixed: &'a [u8; ENTRY_BYTES],
}

impl Entry<'_> {
    fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.fixed[at], self.fixed[at + 1]])
    }

    fn corrupt<T>(
        &self,
        field: &'static str,
        offset: u64,
        expected: impl std::fmt::Display,
        found: impl std::fmt::Display,
    ) -> Result<T> {
        Err(Error::corrupt(self.file, field, self.at + offset, expected, found))
    }

    fn parse(&self, geometry: Geometry, name: String, raw: Vec<u8>) -> Result<Bitmap> {
        let table_offset = be64(self.fixed, 0);
        let in_file = table_offset != 0 && table_offset & !OFFSET_MASK == 0;
        if !in_file || geometry.in_cluster(table_offset) != 0 {
            let found = format!("{table_offset:#x}");
            return self.corrupt("bitmap_table_offset", 0, "a multiple of the cluster size, not 0", found);
        }
        let table_entries = be32(self.fixed, 8);
        let data_bytes = u64::from(table_entries) << geometry.cluster_bits; // at most 2^(32 + 21)
        if table_entries == 0 || table_entries > MAX_TABLE_ENTRIES || data_bytes > MAX_DATA_BYTES {
            let most = MAX_DATA_BYTES >> geometry.cluster_bits;
            return self.corrupt("bitmap_table_size", 8, format_args!("1 to {most}"), table_entries);
        }
        let flags = be32(self.fixed, 12);
        if flags & !(IN_USE | AUTO | EXTRA_DATA_COMPATIBLE) != 0 {
            return self.corrupt("bitmap flags", 12, "no reserved bits", format_args!("{flags:#x}"));
        }
        let (kind, granularity_bits) = (self.fixed[16], self.fixed[17]);
        if kind != DIRTY_TRACKING {
            return self.corrupt("bitmap type", 16, DIRTY_TRACKING, kind);
        }
        if !GRANULARITY_BITS.contains(&granularity_bits) {
            return self.corrupt("bitmap granularity_bits", 17, "9 to 31", granularity_bits);
        }
        if !(1..=MAX_NAME_BYTES).contains(&self.u16(18)) {
            return self.corrupt("bitmap name_size", 18, format_args!("1 to {MAX_NAME_BYTES}"), self.u16(18));
        }
        let entry_at = self.at;
        Ok(Bitmap { entry_at, table_offset, table_entries, flags, granularity_bits, name, raw })
    }
}

/// The bytes of a directory.
pub(super) fn encode_directory(bitmaps: &[Bitmap]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for bitmap in bitmaps {
        bytes.extend_from_slice(&bitmap.raw);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

/// Says of the `wanted` bitmaps, durably, that they may be out of date. Done before the change; a crash while
/// at it leaves some of them marked, which costs those bitmaps and nothing else.
pub(super) fn mark_in_use(
    storage: &dyn Storage,
    bitmaps: &[Bitmap],
    wanted: impl Fn(&Bitmap) -> bool,
) -> Result<()> {
    let mut marked = false;
    for bitmap in bitmaps.iter().filter(|bitmap| !bitmap.is_in_use() && wanted(bitmap)) {
        // Four aligned bytes: never torn.
        storage.write_at(&(bitmap.flags | IN_USE).to_be_bytes(), bitmap.entry_at + 12)?;
        marked = true;
    }
    if marked {
        storage.flush(Flush::Data)?;
    }
    Ok(())
}
