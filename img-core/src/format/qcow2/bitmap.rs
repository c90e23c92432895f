//! Persistent dirty bitmaps: their directory, their clusters, and how they are kept honest ("Bitmaps").
//!
//! This build does not track changes in bitmaps. An enabled bitmap (flag `auto`) must reflect every change
//! of the disk, so before the first change its flag `in_use` is set, durably: every reader then knows that
//! it is out of date. Disabled bitmaps, and all bitmaps of an image that is only read, stay as they are, and
//! so does the autoclear bit, which says that the directory itself is sound.

use std::{ops::Range, path::Path};

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
const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// Bytes of a bitmap's data (the reference's limit).
const MAX_DATA_BYTES: u64 = 0x2000_0000;
/// The reference's limit of names.
const MAX_NAME_BYTES: u16 = 1023;
/// The reference's granularities: 512 bytes to 2 GiB.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Bits of a table entry that must be zero.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Tables are read in pieces of this size.
const PIECE_BYTES: u64 = 1 << 20;

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
}

impl Bitmap {
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
        bitmaps.push(entry.parse(geometry, name)?);
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

    fn parse(&self, geometry: Geometry, name: String) -> Result<Bitmap> {
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
        Ok(Bitmap { entry_at: self.at, table_offset, table_entries, flags, granularity_bits, name })
    }
}

/// What a bitmap's clusters hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owned {
    /// The directory.
    Directory,
    /// A bitmap's table.
    Table,
    /// A bitmap's data.
    Data,
}

/// Tells all host ranges that bitmaps own: the directory, each table, each cluster of data.
///
/// # Errors
/// What reading the directory and the tables meets, and what `visit` returns.
pub(super) fn visit_host_ranges(
    storage: &dyn Storage,
    geometry: Geometry,
    extension: BitmapsExtension,
    visit: &mut dyn FnMut(Owned, Range<u64>) -> Result<()>,
) -> Result<()> {
    let directory = extension.directory_offset;
    visit(Owned::Directory, directory..directory + extension.directory_bytes)?;
    for bitmap in read_directory(storage, geometry, extension)? {
        let table = bitmap.table_offset..bitmap.table_offset + u64::from(bitmap.table_entries) * 8;
        visit(Owned::Table, table.clone())?;
        let mut at = table.start;
        while at < table.end {
            let mut piece = vec![0; usize::try_from((table.end - at).min(PIECE_BYTES)).expect("1 MiB")];
            storage.read_at(&mut piece, at)?;
            for word in piece.chunks_exact(8).map(|word| be64(word, 0)) {
                let offset = word & OFFSET_MASK;
                let misplaced = offset != 0 && (word & 1 != 0 || geometry.in_cluster(offset) != 0);
                if word & TABLE_RESERVED != 0 || misplaced {
                    let expected = "a multiple of the cluster size and no reserved bits";
                    let found = format!("{word:#x}");
                    return Err(Error::corrupt(storage.path(), "bitmap table entry", at, expected, found));
                }
                if offset != 0 {
                    visit(Owned::Data, offset..offset + geometry.cluster_bytes())?;
                }
                at += 8;
            }
        }
    }
    Ok(())
}

/// Says of every enabled bitmap, durably, that it may be out of date. Done before the first change of the
/// disk; a crash while at it leaves some of them marked, which costs those bitmaps and nothing else.
/// Returns whether there was anything to mark.
pub(super) fn mark_in_use(
    storage: &dyn Storage,
    geometry: Geometry,
    extension: BitmapsExtension,
) -> Result<bool> {
    let bitmaps = read_directory(storage, geometry, extension)?;
    let enabled = bitmaps.iter().filter(|bitmap| bitmap.is_auto() && !bitmap.is_in_use());
    let mut marked = false;
    for bitmap in enabled {
        // Four aligned bytes: never torn.
        storage.write_at(&(bitmap.flags | IN_USE).to_be_bytes(), bitmap.entry_at + 12)?;
        marked = true;
    }
    if marked {
        storage.flush(Flush::Data)?;
    }
    Ok(marked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{
        OpenMode,
        qcow2::{
            header::Header,
            oracle::{self, file, qemu_img, qemu_io},
        },
    };

    fn image_with_bitmaps(directory: &Path) -> std::sync::Arc<dyn Storage> {
        qemu_img(directory, &["create", "-q", "-f", "qcow2", "x", "64M"]);
        qemu_img(directory, &["bitmap", "--add", "x", "on"]);
        qemu_img(directory, &["bitmap", "--add", "--disable", "-g", "4096", "x", "off"]);
        qemu_io(directory, "x", &["write 0 1M", "write 20M 1k"]);
        file(&directory.join("x"))
    }

    #[test]
    fn enabled_bitmaps_are_marked_and_the_others_left_alone() {
        let directory = oracle::directory();
        let storage = image_with_bitmaps(directory.path());
        let header = Header::read(&*storage, OpenMode::Write).unwrap();
        let extension = header.bitmaps.expect("a bitmaps extension");
        let before = read_directory(&*storage, header.geometry, extension).unwrap();
        let names: Vec<_> = before.iter().map(|bitmap| (bitmap.name.as_str(), bitmap.is_auto())).collect();
        assert_eq!(names, [("on", true), ("off", false)]);
        assert!(before.iter().all(|bitmap| !bitmap.is_in_use()));
        assert!(mark_in_use(&*storage, header.geometry, extension).unwrap());
        assert!(!mark_in_use(&*storage, header.geometry, extension).unwrap(), "once is enough");
        let info = qemu_img(directory.path(), &["info", "--output=json", "x"]);
        assert_eq!(info.matches("in-use").count(), 1, "{info}");
        qemu_img(directory.path(), &["check", "x"]);
    }

    #[test]
    fn all_clusters_of_bitmaps_are_told() {
        let directory = oracle::directory();
        let storage = image_with_bitmaps(directory.path());
        let header = Header::read(&*storage, OpenMode::Read).unwrap();
        let mut seen = Vec::new();
        let extension = header.bitmaps.expect("a bitmaps extension");
        visit_host_ranges(&*storage, header.geometry, extension, &mut |owned, range| {
            seen.push((owned, range));
            Ok(())
        })
        .unwrap();
        let count = |wanted| seen.iter().filter(|(owned, _)| *owned == wanted).count();
        assert_eq!((count(Owned::Directory), count(Owned::Table)), (1, 2));
        assert!(count(Owned::Data) >= 1, "{seen:?}");
    }
}
