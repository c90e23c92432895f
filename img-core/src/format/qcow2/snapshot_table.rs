//! The snapshot table: its entries read, checked, and kept byte for byte ("Snapshots").

use super::{
    extension::{be32, be64, name},
    geometry::Geometry,
    header::{Header, MAX_L1_BYTES, SNAPSHOT_HEADER_BYTES},
};
use crate::{Error, Result, format::SnapshotInfo, storage::Storage, text::to_bytes};

/// The fixed part of an entry.
const FIXED_BYTES: usize = 40;
const _: () = assert!(SNAPSHOT_HEADER_BYTES == 40);
/// Bytes of the whole table (the reference's limit: 1 KiB for each of the most snapshots).
pub(super) const MAX_TABLE_BYTES: usize = 64 << 20;
/// Extra data of an entry (the reference's limit).
const MAX_EXTRA_BYTES: usize = 1024;
/// Extra data of an entry of ours: large VM state size, disk size, instruction count.
const EXTRA_BYTES: u32 = 24;
/// Extra data that version 3 demands: large VM state size, disk size.
const VERSION_3_EXTRA_BYTES: usize = 16;
/// The table is read in pieces of this size.
const PIECE_BYTES: usize = 64 << 10;
/// Longer ids and names are cut, as the reference's buffers do.
const MAX_NAME_BYTES: usize = 255;

/// An entry of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    /// Host offset of its L1 table; not to be used before [`Self::check_l1`].
    pub(super) l1_offset: u64,
    /// Entries of that table; not to be used before [`Self::check_l1`].
    pub(super) l1_entries: u32,
    /// What users see.
    pub(super) info: SnapshotInfo,
    /// The entry as it stands in the file, without padding.
    raw: Vec<u8>,
}

/// What a new entry says.
#[derive(Clone, Debug)]
pub(super) struct NewSnapshot<'a> {
    pub(super) id: u64,
    pub(super) name: &'a str,
    pub(super) date: (u32, u32),
    pub(super) virtual_size_bytes: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
}

impl Snapshot {
    /// A new entry, with the extra data that version 3 demands.
    pub(super) fn new(new: &NewSnapshot<'_>) -> Self {
        let id = new.id.to_string();
        let mut name = new.name;
        let stored = loop {
            let bytes = to_bytes(name);
            if bytes.len() <= MAX_NAME_BYTES {
                break bytes;
            }
            let last = name.char_indices().next_back().map_or(0, |(at, _)| at);
            name = &name[..last];
        };
        let length = |bytes: &[u8]| u16::try_from(bytes.len()).expect("at most 255 bytes").to_be_bytes();
        let mut raw = Vec::with_capacity(FIXED_BYTES + 24 + id.len() + stored.len());
        raw.extend(new.l1_offset.to_be_bytes());
        raw.extend(new.l1_entries.to_be_bytes());
        raw.extend(length(id.as_bytes()));
        raw.extend(length(&stored));
        raw.extend(new.date.0.to_be_bytes());
        raw.extend(new.date.1.to_be_bytes());
        raw.extend(0_u64.to_be_bytes()); // guest clock
        raw.extend(0_u32.to_be_bytes()); // VM state
        raw.extend(EXTRA_BYTES.to_be_bytes());
        raw.extend(0_u64.to_be_bytes()); // VM state
        raw.extend(new.virtual_size_bytes.to_be_bytes());
        raw.extend(0_u64.to_be_bytes()); // instruction count
        raw.extend(id.as_bytes());
        raw.extend(&*stored);
        let info = SnapshotInfo {
            id,
            name: name.to_owned(),
            vm_state_bytes: 0,
            date: new.date,
            vm_clock_nsec: 0,
            icount: Some(0),
            virtual_size_bytes: new.virtual_size_bytes,
        };
        Self { l1_offset: new.l1_offset, l1_entries: new.l1_entries, info, raw }
    }

    /// The same with the extra data that version 3 demands, where it has less.
    pub(super) fn with_extra_data(&self) -> Self {
        let sizes = Sizes::of(&self.raw);
        if sizes.extra >= VERSION_3_EXTRA_BYTES {
            return self.clone();
        }
        let mut raw = self.raw[..FIXED_BYTES].to_vec();
        raw[36..40].copy_from_slice(&EXTRA_BYTES.to_be_bytes());
        raw.extend(self.info.vm_state_bytes.to_be_bytes());
        raw.extend(self.info.virtual_size_bytes.to_be_bytes());
        raw.extend(self.info.icount.unwrap_or(u64::MAX).to_be_bytes());
        raw.extend(&self.raw[FIXED_BYTES + sizes.extra..]);
        Self { raw, ..self.clone() }
    }

    /// Reads one entry from the start of `bytes`, as it stands.
    fn parse(bytes: &[u8], header: &Header) -> Self {
        let sizes = Sizes::of(bytes);
        let (l1_offset, l1_entries) = (be64(bytes, 0), be32(bytes, 8));
        let extra = &bytes[FIXED_BYTES..FIXED_BYTES + sizes.extra];
        let word = |index: usize| extra.get(index * 8..index * 8 + 8).map(|word| be64(word, 0));
        let virtual_size_bytes = word(1).unwrap_or(header.virtual_size_bytes);
        let id_at = FIXED_BYTES + sizes.extra;
        let name_at = id_at + sizes.id;
        let info = SnapshotInfo {
            id: name(&bytes[id_at..name_at]),
            name: name(&bytes[name_at..name_at + sizes.name]),
            vm_state_bytes: word(0).unwrap_or_else(|| be32(bytes, 32).into()),
            date: (be32(bytes, 16), be32(bytes, 20)),
            vm_clock_nsec: be64(bytes, 24),
            icount: word(2).filter(|&count| count != u64::MAX),
            virtual_size_bytes,
        };
        Self { l1_offset, l1_entries, info, raw: bytes[..sizes.total()].to_vec() }
    }

    /// What precedes every use of the L1 table. An entry that breaks these rules can be listed and kept all the
    /// same, as in the reference.
    ///
    /// # Errors
    /// [`Error::Invalid`] in the reference's words for a table outside its limits.
    pub(super) fn check_l1(&self, geometry: Geometry) -> Result<()> {
        let size_bytes = u64::from(self.l1_entries) * 8; // u32 × 8 fits
        if size_bytes > MAX_L1_BYTES {
            return refuse("Snapshot L1 table too large");
        }
        if self.l1_offset > i64::MAX as u64 - size_bytes || geometry.in_cluster(self.l1_offset) != 0 {
            return refuse("Snapshot L1 table offset invalid");
        }
        Ok(())
    }

    /// What precedes the use of the size of the disk; see [`Self::check_l1`].
    ///
    /// # Errors
    /// [`Error::Invalid`] in the reference's words for a size that no disk can have.
    pub(super) fn check_size(&self, geometry: Geometry) -> Result<()> {
        if i64::try_from(self.info.virtual_size_bytes).is_err() {
            return refuse("Image size cannot be negative");
        }
        if geometry.l1_entries_for(self.info.virtual_size_bytes) > MAX_L1_BYTES / 8 {
            return refuse("Failed to grow the L1 table: File too large");
        }
        Ok(())
    }
}

fn refuse(text: &str) -> Result<()> {
    Err(Error::Invalid(text.to_owned()))
}

/// Lengths of the parts of an entry.
#[derive(Clone, Copy)]
struct Sizes {
    extra: usize,
    id: usize,
    name: usize,
}

impl Sizes {
    /// From the fixed part.
    fn of(fixed: &[u8]) -> Self {
        let be16 = |at: usize| usize::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
        Self {
            extra: usize::try_from(be32(fixed, 36)).expect("u32 fits usize"),
            id: be16(12),
            name: be16(14),
        }
    }

    /// Of the entry, without padding. `extra` has been checked.
    fn total(self) -> usize {
        FIXED_BYTES + self.extra + self.id + self.name
    }
}

/// Reads the table that the header names, at most [`MAX_TABLE_BYTES`] of it.
///
/// # Errors
/// [`Error::Corrupt`] for lengths outside their limits.
pub(super) fn read_table(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>> {
    let mut snapshots = Vec::new();
    for_each_entry(storage, header, |entry| snapshots.push(Snapshot::parse(entry, header)))?;
    Ok(snapshots)
}

/// Follows the table from entry to entry, without looking at what they say.
///
/// # Errors
/// [`Error::Corrupt`] for lengths outside their limits.
pub(super) fn check_table(storage: &dyn Storage, header: &Header) -> Result<()> {
    for_each_entry(storage, header, |_| ())
}

fn for_each_entry(storage: &dyn Storage, header: &Header, mut each: impl FnMut(&[u8])) -> Result<()> {
    let mut source = Source { storage, start: header.snapshots_offset, bytes: Vec::new() };
    let mut position = 0;
    for _ in 0..header.snapshot_count {
        let at = header.snapshots_offset.saturating_add(position as u64);
        let sizes = Sizes::of(source.get(position, FIXED_BYTES)?);
        if sizes.extra > MAX_EXTRA_BYTES {
            let expected = format!("at most {MAX_EXTRA_BYTES} bytes");
            return Err(Error::corrupt(
                storage.path(),
                "snapshot, extra data",
                at.saturating_add(36),
                expected,
                sizes.extra,
            ));
        }
        each(source.get(position, sizes.total())?);
        position += sizes.total().next_multiple_of(8);
    }
    Ok(())
}

/// The bytes of a table of these snapshots.
pub(super) fn encode_table(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut table = Vec::new();
    for snapshot in snapshots {
        table.resize(table.len().next_multiple_of(8), 0);
        table.extend(&snapshot.raw);
    }
    table
}

/// The table, read as far as it was asked for.
struct Source<'a> {
    storage: &'a dyn Storage,
    start: u64,
    bytes: Vec<u8>,
}

impl Source<'_> {
    fn get(&mut self, position: usize, length: usize) -> Result<&[u8]> {
        let end = position + length; // below MAX_TABLE_BYTES plus the largest entry
        let known = self.bytes.len();
        if end > known {
            let at = self.start.saturating_add(known as u64);
            let file_end = self.storage.len_bytes()?;
            let table_end = self.start.checked_add(end as u64);
            if end > MAX_TABLE_BYTES || table_end.is_none_or(|table_end| table_end > file_end) {
                return Err(Error::corrupt(
                    self.storage.path(),
                    "snapshot table",
                    at,
                    format_args!("at most {MAX_TABLE_BYTES} bytes, inside the file of {file_end} bytes"),
                    format_args!("{end} bytes and more"),
                ));
            }
            self.bytes.resize(end.next_multiple_of(PIECE_BYTES), 0);
            self.storage.read_at(&mut self.bytes[known..], at)?;
        }
        Ok(&self.bytes[position..end])
    }
}
