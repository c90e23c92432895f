//! Persistent dirty bitmaps: their directory, their clusters, and how they are kept honest ("Bitmaps").
//!
//! This build does not track changes in bitmaps. An enabled bitmap (flag `auto`) must reflect every change
//! of the disk, so before the first change its flag `in_use` is set, durably: every reader then knows that
//! it is out of date. Disabled bitmaps, and all bitmaps of an image that is only read, stay as they are, and
//! so does the autoclear bit, which says that the directory itself is sound.

use std::{path::Path, sync::atomic::Ordering};

use super::{
    entry::OFFSET_MASK,
    extension::{BitmapsExtension, be32, be64, text},
    geometry::Geometry,
    layer::Qcow2Layer,
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

/// Which bitmaps a change of the image puts out of date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stale {
    /// Those that must reflect all changes of guest data.
    Enabled,
    /// All of them: the disk gets another size, which every bitmap depends on.
    All,
}

/// Says of bitmaps, durably, that they may be out of date. Done before the change; a crash while at it leaves
/// some of them marked, which costs those bitmaps and nothing else. Returns whether there was anything to
/// mark.
pub(super) fn mark_in_use(
    storage: &dyn Storage,
    geometry: Geometry,
    extension: BitmapsExtension,
    stale: Stale,
) -> Result<bool> {
    let bitmaps = read_directory(storage, geometry, extension)?;
    let wanted = |bitmap: &&Bitmap| !bitmap.is_in_use() && (bitmap.is_auto() || stale == Stale::All);
    let mut marked = false;
    for bitmap in bitmaps.iter().filter(wanted) {
        // Four aligned bytes: never torn.
        storage.write_at(&(bitmap.flags | IN_USE).to_be_bytes(), bitmap.entry_at + 12)?;
        marked = true;
    }
    if marked {
        storage.flush(Flush::Data)?;
    }
    Ok(marked)
}

impl Qcow2Layer {
    /// To be called before guest data changes: the first time, enabled bitmaps are marked out of date.
    pub(super) fn before_guest_change(&self) -> Result<()> {
        if self.bitmaps_marked.load(Ordering::Acquire) {
            return Ok(());
        }
        self.check_writable()?;
        // Whoever comes second must not go on before the marks are durable.
        let _state = self.state();
        if !self.bitmaps_marked.load(Ordering::Acquire) {
            self.mark_bitmaps(Stale::Enabled)?;
            self.bitmaps_marked.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// To be called before the disk gets another size: all bitmaps are marked out of date.
    pub(super) fn before_resize(&self) -> Result<()> {
        self.check_writable()?;
        self.mark_bitmaps(Stale::All)
    }

    fn mark_bitmaps(&self, stale: Stale) -> Result<()> {
        let extension = self.header().bitmaps;
        if let Some(extension) = extension {
            mark_in_use(self.image_file(), self.geometry, extension, stale)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{
        Driver, OpenContext, OpenMode, OptionSet,
        qcow2::{
            Qcow2,
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
        assert!(mark_in_use(&*storage, header.geometry, extension, Stale::Enabled).unwrap());
        assert!(
            !mark_in_use(&*storage, header.geometry, extension, Stale::Enabled).unwrap(),
            "once is enough"
        );
        let info = qemu_img(directory.path(), &["info", "--output=json", "x"]);
        assert_eq!(info.matches("in-use").count(), 1, "{info}");
        qemu_img(directory.path(), &["check", "x"]);
    }

    /// A write, in place or not, marks the enabled bitmap; a new size marks both; reading marks none.
    #[test]
    fn changes_of_the_disk_mark_bitmaps() {
        let directory = oracle::directory();
        drop(image_with_bitmaps(directory.path()));
        let path = directory.path().join("x");
        let in_use = || qemu_img(directory.path(), &["info", "--output=json", "x"]).matches("in-use").count();
        let options = OptionSet::new();
        let open_file = |name: &str, _| Ok(file(Path::new(name)));
        let open = || {
            let context = OpenContext { mode: OpenMode::Write, options: &options, open_file: &open_file };
            Qcow2.open(file(&path), &context).unwrap()
        };
        let layer = open();
        layer.map_range(0..1 << 20, &mut Vec::new()).unwrap();
        layer.snapshots().unwrap().create("s", (1, 2)).unwrap();
        layer.writer().unwrap().close().unwrap();
        assert_eq!(in_use(), 0);
        let layer = open();
        drop(layer.writer().unwrap().prepare_write(0..512).unwrap());
        assert_eq!(in_use(), 1);
        layer.writer().unwrap().resize(96 << 20, crate::storage::Preallocation::Off).unwrap();
        layer.writer().unwrap().close().unwrap();
        assert_eq!(in_use(), 2);
        qemu_img(directory.path(), &["check", "x"]);
    }
}
