//! Another size for a disk: its last extent grows.
//!
//! # Crash order
//! Each step is durable before the next:
//! 1. What the new size would show of the last extent reads as zeroes: the rest of its last grain, entries behind its
//!    last one, or what a plain file has behind the extent's end. A plain file gets its new length.
//! 2. Where the grain directories have no entries for what is new, longer copies of them stand at the end of the
//!    file, with a table behind each new entry: the reference takes a missing table for one at the start of the file.
//! 3. The sector of the header names them, and has the old size still.
//! 4. What a longer parent would show is made zero by the image above, through these tables, in the order of guest
//!    writes.
//! 5. The sector of the header has the new size: so has a sparse extent.
//! 6. The extent's line in the descriptor, inside one sector: a plain extent has its new size.
//!
//! So a power cut leaves the old disk, or the new one; between 5 and 6 the line is behind the header, which counts.
//! The content id stays: what a child was made on has not changed.

use zerocopy::IntoBytes as _;

use super::{
    descriptor::{self, Descriptor, LineEdit},
    header::{Header, MAX_CAPACITY_SECTORS, MAX_DIRECTORY_ENTRIES, RawHeader, SECTOR_BYTES},
    layer::{GuestExtent, Kind, VmdkLayer},
    open,
    sparse::{Grain, Sparse, usize_of},
    stream::sector_entry,
    write::State,
};
use crate::{
    Error, Result,
    format::{HostFile, Layer as _},
    storage::{Flush, Preallocation},
};

/// The extents of a disk that is split are at most so long.
pub(super) const SPLIT_BYTES: u64 = 2 << 30;

/// Directories are copied in pieces of this size.
const COPY_BYTES: u64 = 1 << 20;

/// Entries of extents that can be written.
const ENTRY_BYTES: u64 = 4;

/// A larger size that the disk can have.
struct Larger<'a> {
    /// That size.
    bytes: u64,
    /// The extent that grows, the last one, and its number.
    extent: &'a GuestExtent,
    index: usize,
    /// The change of its line in the descriptor.
    edit: Option<LineEdit>,
}

impl VmdkLayer {
    /// What precedes growing over a parent: the map answers up to `virtual_size_bytes` and the end of that grain. False
    /// where it does not, as nothing of a parent shows.
    ///
    /// # Errors
    /// As [`Self::grow`].
    pub(super) fn reach_behind(&self, virtual_size_bytes: u64) -> Result<bool> {
        if !self.has_backing() {
            return Ok(false);
        }
        let Some(Larger { bytes, index, extent, .. }) = self.larger(virtual_size_bytes)? else {
            return Ok(false);
        };
        let Kind::Sparse(sparse) = &extent.kind else { return Ok(false) };
        self.reach(&mut self.state(), index, sparse, bytes)?;
        Ok(true)
    }

    /// Makes the disk larger. Nothing is in flight.
    ///
    /// # Errors
    /// [`Error::Unsupported`] to shrink, for kinds that are complete once they are made, past the end of the last
    /// part of a split disk, and where the descriptor cannot be changed in one step; [`Error::Invalid`] for a size
    /// that the format does not have.
    pub(super) fn grow(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        let Some(Larger { bytes, index, extent, edit }) = self.larger(virtual_size_bytes)? else {
            return Ok(());
        };
        let refuse = |what: &str| Err(Error::unsupported(self.path(), what));
        let len_bytes = bytes - extent.start_bytes;
        let mut state = self.state();
        self.drain(&mut state)?;
        match &extent.kind {
            Kind::Zero if preallocation != Preallocation::Off => {
                return refuse("preallocation in a ZERO extent");
            }
            Kind::Zero => {}
            Kind::Flat { file, at_bytes } => {
                self.grow_flat(extent, *file, *at_bytes, len_bytes, preallocation)?;
            }
            Kind::Sparse(_) if preallocation != Preallocation::Off => {
                return refuse("preallocation in a sparse VMDK");
            }
            Kind::Sparse(sparse) => {
                self.reach(&mut state, index, sparse, bytes)?;
                self.write_capacity(sparse, len_bytes)?;
            }
        }
        let written = edit.map_or(Ok(()), |edit| self.write_line(&edit));
        self.or_halt(written)?;
        extent.set_end_bytes(bytes);
        Ok(())
    }

    /// What a larger size means for the last extent, without changing anything; `None` for the size that the disk has.
    fn larger(&self, virtual_size_bytes: u64) -> Result<Option<Larger<'_>>> {
        let refuse = |what: &str| Err(Error::unsupported(self.path(), what));
        let bytes = virtual_size_bytes
            .checked_next_multiple_of(SECTOR_BYTES)
            .filter(|bytes| bytes / SECTOR_BYTES <= MAX_CAPACITY_SECTORS)
            .ok_or_else(|| Error::Invalid("The image size is too large".to_owned()))?;
        let old_bytes = self.virtual_size_bytes();
        if bytes < old_bytes {
            return refuse("shrinking a VMDK");
        }
        if bytes == old_bytes {
            return Ok(None);
        }
        let Some(index) = self.extents.len().checked_sub(1) else {
            return refuse("resizing a VMDK without extents");
        };
        let extent = self.writable_extent(index)?;
        let len_bytes = bytes - extent.start_bytes;
        if matches!(&extent.kind, Kind::Sparse(sparse) if sparse.compressed) {
            return refuse("resizing a streamOptimized VMDK, which is complete,");
        }
        if self.create_type.starts_with("twoGbMaxExtent") && len_bytes > SPLIT_BYTES {
            return refuse(
                "growing a split VMDK past the 2 GiB of its last extent, which takes another file,",
            );
        }
        let edit = self.line_of_last_extent(len_bytes / SECTOR_BYTES)?;
        Ok(Some(Larger { bytes, index, extent, edit }))
    }

    /// Step 1 for a plain extent.
    fn grow_flat(
        &self,
        extent: &GuestExtent,
        file: HostFile,
        at_bytes: u64,
        len_bytes: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        let storage = self.storage(file);
        let old_end = at_bytes + (extent.end_bytes() - extent.start_bytes);
        let end = at_bytes
            .checked_add(len_bytes)
            .filter(|end| i64::try_from(*end).is_ok())
            .ok_or_else(|| Error::Invalid("The image size is too large".to_owned()))?;
        let is_behind = |other: &GuestExtent| matches!(other.kind, Kind::Flat { file: its, at_bytes: at } if its == file && at >= old_end);
        if self.extents.iter().any(is_behind) {
            let feature = "growing an extent in whose file another one follows";
            return Err(Error::unsupported(storage.path(), feature));
        }
        let file_bytes = storage.len_bytes()?;
        if file_bytes > old_end {
            storage.write_zeroes(old_end..file_bytes.min(end), preallocation == Preallocation::Off)?;
        }
        if file_bytes < end {
            storage.resize(end, preallocation)?;
        }
        storage.flush(Flush::All)
    }

    /// Steps 1 to 3 for grains, unless the map answers up to the guest byte `end` and the end of its grain already.
    fn reach(&self, state: &mut State, index: usize, sparse: &Sparse, end: u64) -> Result<()> {
        let extent = &self.extents[index];
        let len_bytes = (end - extent.start_bytes).next_multiple_of(sparse.grain_bytes);
        let reach_bytes = extent.start_bytes + len_bytes;
        if extent.reach_bytes() >= reach_bytes {
            return Ok(());
        }
        let storage = &*sparse.storage;
        let entries = (len_bytes / sparse.grain_bytes).div_ceil(sparse.table_entries);
        if entries > MAX_DIRECTORY_ENTRIES {
            return Err(Error::Invalid(format!(
                "{}: grains of {} bytes make a disk of at most {} bytes",
                storage.path().display(),
                sparse.grain_bytes,
                u128::from(sparse.grain_bytes * sparse.table_entries) * u128::from(MAX_DIRECTORY_ENTRIES)
            )));
        }
        let (mut raw, header) = Header::read(storage)?;
        self.clear_behind_end(sparse)?;
        self.drain(state)?; // 1.
        if entries > sparse.directory_entries() {
            let mut directories = [header.directory_at, header.redundant_at];
            for directory in directories.iter_mut().flatten() {
                *directory = self.copy_directory(state, index, sparse, *directory, entries)?;
            }
            storage.flush(Flush::Data)?; // 2.
            let [primary, redundant] = directories.map(|at| at.map(|at| at / SECTOR_BYTES));
            if let Some(sector) = primary {
                raw.directory_sector = sector.into();
            }
            if let Some(sector) = redundant {
                raw.redundant_directory_sector = sector.into();
            }
            self.write_header(sparse, &raw)?; // 3.
            sparse.take_shape(sparse.capacity_bytes(), entries, directories);
        }
        extent.set_reach_bytes(reach_bytes);
        Ok(())
    }

    /// Step 5.
    fn write_capacity(&self, sparse: &Sparse, len_bytes: u64) -> Result<()> {
        let (mut raw, _) = Header::read(&*sparse.storage)?;
        raw.capacity_sectors = (len_bytes / SECTOR_BYTES).into();
        self.write_header(sparse, &raw)?;
        let entries = (len_bytes.div_ceil(sparse.grain_bytes)).div_ceil(sparse.table_entries);
        sparse.take_shape(len_bytes, entries, [None, None]);
        Ok(())
    }

    fn write_header(&self, sparse: &Sparse, raw: &RawHeader) -> Result<()> {
        let storage = &*sparse.storage;
        raw.check(storage.path(), 0)?;
        self.or_halt(storage.write_at(raw.as_bytes(), 0).and_then(|()| storage.flush(Flush::Data)))
    }

    /// Makes zero what other programs left behind the end of the extent, in its last grain and its last table.
    fn clear_behind_end(&self, sparse: &Sparse) -> Result<()> {
        let old_bytes = sparse.capacity_bytes();
        let within = old_bytes % sparse.grain_bytes;
        if within != 0
            && let Grain::At(host) = sparse.look_up(old_bytes / sparse.grain_bytes)?
        {
            sparse.check_grain_place(host)?;
            sparse.storage.write_zeroes(host + within..host + sparse.grain_bytes, true)?;
        }
        let grains = sparse.grains();
        for grain in grains..grains.next_multiple_of(sparse.table_entries) {
            sparse.set_entry(grain, 0)?;
        }
        Ok(())
    }

    /// A longer copy of a directory at the end of the file, where nothing names it yet, and empty tables behind it for
    /// what is new.
    fn copy_directory(
        &self,
        state: &mut State,
        index: usize,
        sparse: &Sparse,
        from: u64,
        entries: u64,
    ) -> Result<u64> {
        let storage = &*sparse.storage;
        let old_entries = sparse.directory_entries();
        let table_bytes = sparse.table_bytes().next_multiple_of(SECTOR_BYTES);
        let len_bytes = (entries * ENTRY_BYTES).next_multiple_of(SECTOR_BYTES); // at most 2^25 × 4
        let tables_bytes = (entries - old_entries) * table_bytes; // at most 2^25 × 2^11
        let to = self.take_place(state, index, sparse, len_bytes, SECTOR_BYTES)?;
        let tables = self.take_place(state, index, sparse, tables_bytes, SECTOR_BYTES)?;
        storage.write_zeroes(to..tables + tables_bytes, true)?;
        let mut done = 0;
        while done < old_entries * ENTRY_BYTES {
            let mut piece = vec![0; usize_of(COPY_BYTES.min(old_entries * ENTRY_BYTES - done))];
            storage.read_at(&mut piece, from + done)?;
            storage.write_at(&piece, to + done)?;
            done += piece.len() as u64;
        }
        let mut entry = old_entries;
        while entry < entries {
            let end = entries.min(entry + COPY_BYTES / ENTRY_BYTES);
            let mut piece = Vec::with_capacity(usize_of((end - entry) * ENTRY_BYTES));
            for new in entry..end {
                let sector = sector_entry(sparse, tables + (new - old_entries) * table_bytes)?;
                piece.extend(sector.to_le_bytes());
            }
            storage.write_at(&piece, to + entry * ENTRY_BYTES)?;
            entry = end;
        }
        sparse.tables.forget(to..tables + tables_bytes);
        Ok(to)
    }

    /// How the descriptor says that its last extent has so many sectors; `None` where it names no extent, which one
    /// that stands in its extent need not.
    fn line_of_last_extent(&self, sectors: u64) -> Result<Option<LineEdit>> {
        let (text, at, room_bytes) = self.text()?;
        let path = self.path();
        let lines = descriptor::extents(&text, path, at)?;
        let is_only_history = lines.len() != self.extents.len();
        if is_only_history && at != 0 {
            return Ok(None);
        }
        let edit = LineEdit::new(&text, at, room_bytes, sectors).ok_or_else(|| {
            Error::unsupported(path, "resizing a VMDK whose descriptor cannot be changed within one sector")
        })?;
        Ok(Some(edit))
    }

    /// The change that the descriptor needs to say of its last extent what the extent's header says; `None` where it
    /// says so, names other extents, or cannot be changed in one step, as the header counts anyway.
    pub(super) fn line_out_of_step(&self, sectors: u64) -> Result<Option<LineEdit>> {
        let (text, at, room_bytes) = self.text()?;
        let lines = descriptor::extents(&text, self.path(), at)?;
        let is_in_step = lines.last().is_none_or(|line| line.sectors == sectors);
        if is_in_step || lines.len() != self.extents.len() {
            return Ok(None);
        }
        Ok(LineEdit::new(&text, at, room_bytes, sectors))
    }

    /// The descriptor as it stands in the file, where, and how long it may become.
    fn text(&self) -> Result<(Vec<u8>, u64, u64)> {
        let storage = &*self.files[0];
        let at = self.content().at_bytes;
        if at == 0 {
            let (text, at) = open::described_text(storage)?;
            return Ok((text, at, descriptor::MAX_BYTES));
        }
        let (_, header) = Header::read(storage)?;
        let (text, at) = open::embedded_text(storage, &header)?;
        let room_bytes = text.len() as u64;
        Ok((text, at, room_bytes))
    }

    /// Step 6.
    pub(super) fn write_line(&self, edit: &LineEdit) -> Result<()> {
        let storage = &*self.files[0];
        storage.write_at(&edit.bytes, edit.at_bytes)?;
        storage.flush(Flush::All)?;
        let (text, at, _) = self.text()?;
        self.content().descriptor = Descriptor::parse(&text, self.path(), at)?;
        Ok(())
    }
}
