//! Stream-optimized extents: written once, front to back, so that they can be sent while they are made
//! ("Virtual Disk Format 5.0", "Stream-Optimized Compressed Sparse Extents").
//!
//! ```text
//! header (directory: at the end), descriptor, up to 64 KiB
//! marker+grain, marker+grain, …, marker, grain table      for each table that has grains
//! marker, grain directory, marker, footer (the header, with the directory's place), end-of-stream marker
//! ```
//!
//! Crash order: nothing of a stream counts before its end-of-stream marker. One that breaks off is refused by
//! name when it is opened, never taken for a shorter or an empty disk. [`finish`](VmdkLayer::finish_stream)
//! makes grains and tables durable before the footer that shows them.

use std::collections::BTreeMap;

use zerocopy::{
    FromBytes, IntoBytes,
    little_endian::{U32, U64},
};

use super::{
    header::{
        DIRECTORY_AT_END, GRAIN_MARKER_BYTES, Header, MAGIC, RawHeader, RawMarker, SECTOR_BYTES, flag, marker,
    },
    layer::VmdkLayer,
    sparse::{Directory, KeptTable, Sparse, usize_of},
    write::{Growth, State},
};
use crate::{
    Error, Result,
    storage::{Flush, Preallocation, Storage},
};

/// Marker, footer and end-of-stream marker.
const TAIL_BYTES: u64 = 3 * SECTOR_BYTES;

/// Where the first grain of a new stream stands.
pub(super) const STREAM_OVERHEAD_SECTORS: u64 = 128;

/// Tables that are kept in memory for a stream whose footer is lost: 256 MiB, a disk of 4 TiB.
const MAX_SCANNED_TABLES: usize = 1 << 17;

/// The footer at the end of the file and where its directory stands; `None` when the file does not end in one.
///
/// # Errors
/// [`Error::Corrupt`] when it describes another disk than the header, or has no directory either.
pub(super) fn footer(
    storage: &dyn Storage,
    head: &RawHeader,
    header: &Header,
) -> Result<Option<(Header, u64)>> {
    let file_bytes = storage.len_bytes()?;
    let Some(at) = file_bytes.checked_sub(TAIL_BYTES).filter(|at| *at >= SECTOR_BYTES) else {
        return Ok(None);
    };
    let mut tail = [0; 3 * 512];
    storage.read_at(&mut tail, at)?;
    let (first, rest) = tail.split_at(512);
    let (middle, last) = rest.split_at(512);
    let lead = RawMarker::read_from_bytes(first).expect("a sector");
    let end = RawMarker::read_from_bytes(last).expect("a sector");
    let raw = RawHeader::read_from_bytes(middle).expect("a sector");
    let is_footer = lead.kind.get() == marker::FOOTER && lead.size_bytes.get() == 0 && raw.magic == MAGIC;
    let is_end = end.value.get() == 0 && end.size_bytes.get() == 0 && end.kind.get() == marker::END_OF_STREAM;
    if !is_footer || !is_end {
        return Ok(None);
    }
    let footer_at = at + SECTOR_BYTES;
    let footer = raw.check(storage.path(), footer_at)?;
    let same = |a: &RawHeader, b: &RawHeader| {
        (a.version, a.flags, a.capacity_sectors, a.grain_sectors, a.table_entries, a.compress_algorithm)
            == (
                b.version,
                b.flags,
                b.capacity_sectors,
                b.grain_sectors,
                b.table_entries,
                b.compress_algorithm,
            )
    };
    if !same(&raw, head) {
        let expected = format!(
            "the same disk as in the header, {} sectors in grains of {}",
            header.capacity_sectors, header.grain_sectors
        );
        let found = format!("{} sectors in grains of {}", footer.capacity_sectors, footer.grain_sectors);
        return Err(Error::corrupt(storage.path(), "footer", footer_at, expected, found));
    }
    match footer.directory_at {
        Some(directory) => Ok(Some((footer, directory))),
        None => Err(Error::corrupt(storage.path(), "footer.gdOffset", footer_at + 56, "a sector", "none")),
    }
}

/// The tables of a stream without a footer at its end, from the markers of its grains up to the end-of-stream
/// marker.
///
/// # Errors
/// [`Error::Corrupt`] at the first marker that is none, in particular where the stream breaks off.
pub(super) fn scan(storage: &dyn Storage, header: &Header) -> Result<BTreeMap<u64, KeptTable>> {
    let file_bytes = storage.len_bytes()?;
    let wrong = |at: u64, expected: &str, found: &dyn std::fmt::Display| {
        Err(Error::corrupt(storage.path(), "stream marker", at, expected, found))
    };
    if !header.markers || !header.compressed {
        return wrong(file_bytes, "a footer behind a directory at the end", &"the end of the file");
    }
    let table_entries = u64::from(header.table_entries);
    let mut tables: BTreeMap<u64, KeptTable> = BTreeMap::new();
    let mut at = header.overhead_bytes.max(header.descriptor.as_ref().map_or(0, |place| place.end));
    let mut sector = [0; 512];
    loop {
        if at.checked_add(SECTOR_BYTES).is_none_or(|end| end > file_bytes) {
            return wrong(at, "an end-of-stream marker", &"the end of the file: the stream is not complete");
        }
        storage.read_at(&mut sector, at)?;
        let marker = RawMarker::read_from_bytes(&sector).expect("a sector");
        let (value, size_bytes, kind) = (marker.value.get(), marker.size_bytes.get(), marker.kind.get());
        if size_bytes == 0 {
            match kind {
                marker::END_OF_STREAM if value == 0 => return Ok(tables),
                marker::GRAIN_TABLE | marker::GRAIN_DIRECTORY | marker::FOOTER => {
                    let next = value.checked_mul(512).and_then(|bytes| bytes.checked_add(at + SECTOR_BYTES));
                    let Some(next) = next else { return wrong(at, "a number of sectors", &value) };
                    at = next;
                }
                other => return wrong(at, "one of the five kinds", &other),
            }
            continue;
        }
        let is_grain = value % header.grain_sectors == 0 && value < header.capacity_sectors;
        if !is_grain || u64::from(size_bytes) > 2 * header.grain_bytes() {
            let found = format!("{size_bytes} bytes for sector {value}");
            return wrong(at, "a grain of the disk", &found);
        }
        let grain = value / header.grain_sectors;
        let Ok(place) = u32::try_from(at / SECTOR_BYTES) else {
            return wrong(at, "a grain in the first 2 TiB of the file", &at);
        };
        if tables.len() == MAX_SCANNED_TABLES && !tables.contains_key(&(grain / table_entries)) {
            return Err(Error::unsupported(storage.path(), "a stream of more than 4 TiB without its footer"));
        }
        let empty = || KeptTable::Entries(vec![0; header.table_entries as usize].into_boxed_slice());
        if let KeptTable::Entries(entries) = tables.entry(grain / table_entries).or_insert_with(empty) {
            entries[usize_of(grain % table_entries)] = place;
        }
        at += (GRAIN_MARKER_BYTES as u64 + u64::from(size_bytes)).next_multiple_of(SECTOR_BYTES);
    }
}

/// A stream that is being written.
#[derive(Debug)]
pub(super) struct Stream {
    /// The end of the stream.
    next_at: u64,
    /// The table whose grains are written now.
    table: Option<u64>,
    /// A place was reserved and given up: there is a hole in the stream.
    broken: bool,
}

/// Where a compressed grain goes, and the marker in front of it.
pub(super) struct GrainPlace {
    /// Of the marker.
    pub(super) at: u64,
    pub(super) marker: [u8; GRAIN_MARKER_BYTES],
    /// Zeroes that fill the last sector.
    pub(super) pad_bytes: u32,
}

impl GrainPlace {
    /// `stored_bytes` of the grain that begins at `guest` of its extent.
    pub(super) fn new(at: u64, guest: u64, stored_bytes: u32) -> Self {
        let mut marker = [0; GRAIN_MARKER_BYTES];
        marker[..8].copy_from_slice(&(guest / SECTOR_BYTES).to_le_bytes());
        marker[8..].copy_from_slice(&stored_bytes.to_le_bytes());
        let end = GRAIN_MARKER_BYTES as u64 + u64::from(stored_bytes);
        let pad = end.next_multiple_of(SECTOR_BYTES) - end;
        Self { at, marker, pad_bytes: u32::try_from(pad).expect("less than a sector") }
    }

    /// Bytes of marker, stream and padding.
    pub(super) fn len_bytes(stored_bytes: u32) -> u64 {
        (GRAIN_MARKER_BYTES as u64 + u64::from(stored_bytes)).next_multiple_of(SECTOR_BYTES)
    }
}

/// A place in a 32-bit table.
///
/// # Errors
/// [`Error::Unsupported`] from 2 TiB on.
pub(super) fn sector_entry(sparse: &Sparse, at: u64) -> Result<u32> {
    u32::try_from(at / SECTOR_BYTES)
        .map_err(|_| Error::unsupported(sparse.storage.path(), "a sparse extent file of more than 2 TiB"))
}

impl VmdkLayer {
    /// Turns a new, empty extent into the beginning of a stream: what is behind the descriptor goes.
    pub(super) fn begin_stream(&self, sparse: &Sparse) -> Result<Stream> {
        let storage = &*sparse.storage;
        let (mut raw, header) = Header::read(storage)?;
        let overhead_bytes = STREAM_OVERHEAD_SECTORS * SECTOR_BYTES;
        let kept = header.descriptor.map_or(SECTOR_BYTES, |place| place.end).min(overhead_bytes);
        raw.flags = U32::new(raw.flags.get() & !flag::REDUNDANT_DIRECTORY);
        raw.directory_sector = U64::new(DIRECTORY_AT_END);
        raw.redundant_directory_sector = U64::new(0);
        raw.overhead_sectors = U64::new(STREAM_OVERHEAD_SECTORS);
        storage.write_at(raw.as_bytes(), 0)?;
        storage.resize(kept, Preallocation::Off)?;
        storage.resize(overhead_bytes, Preallocation::Off)?;
        *sparse.directory_for_change() = Directory::Kept(BTreeMap::new());
        Ok(Stream { next_at: overhead_bytes, table: None, broken: false })
    }

    /// Takes the next place of the stream for a grain. From here on it is on the map: nobody is told that the
    /// grain is there before it is committed, and who looks earlier gets an error for an answer.
    pub(super) fn append_grain(
        &self,
        sparse: &Sparse,
        stream: &mut Stream,
        grain: u64,
        stored_bytes: u32,
    ) -> Result<GrainPlace> {
        let (index, within) = (grain / sparse.table_entries, grain % sparse.table_entries);
        if stream.table.is_some_and(|table| index < table) {
            return Err(Error::Invalid(format!(
                "{}: a stream is written in order: its tables up to grain {} are done, grain {grain} comes too late",
                sparse.storage.path().display(),
                stream.table.unwrap_or(0) * sparse.table_entries,
            )));
        }
        if stream.table != Some(index) {
            self.end_table(sparse, stream)?;
            stream.table = Some(index);
            let empty = vec![0; usize_of(sparse.table_entries)].into_boxed_slice();
            if let Directory::Kept(tables) = &mut *sparse.directory_for_change() {
                tables.insert(index, KeptTable::Entries(empty));
            }
        }
        let entry = sector_entry(sparse, stream.next_at)?;
        if let Directory::Kept(tables) = &mut *sparse.directory_for_change()
            && let Some(KeptTable::Entries(entries)) = tables.get_mut(&index)
        {
            entries[usize_of(within)] = entry;
        }
        let place = GrainPlace::new(stream.next_at, grain * sparse.grain_bytes, stored_bytes);
        stream.next_at += GrainPlace::len_bytes(stored_bytes);
        Ok(place)
    }

    /// Writes the table of the grains so far.
    fn end_table(&self, sparse: &Sparse, stream: &mut Stream) -> Result<()> {
        let Some(index) = stream.table.take() else { return Ok(()) };
        let mut directory = sparse.directory_for_change();
        let Directory::Kept(tables) = &mut *directory else { return Ok(()) };
        let Some(KeptTable::Entries(entries)) = tables.get(&index) else { return Ok(()) };
        let words: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let at = append(sparse, stream, marker::GRAIN_TABLE, &words)?;
        tables.insert(index, KeptTable::Stored(at));
        Ok(())
    }

    /// Writes what comes behind the last grain. Order:
    /// 1. grains, tables and directory are durable;
    /// 2. footer and end-of-stream marker are.
    pub(super) fn finish_stream(&self, sparse: &Sparse, state: &mut State) -> Result<()> {
        let Growth::Streaming(stream) = &mut state.growth else { return Ok(()) };
        let storage = &*sparse.storage;
        if stream.broken {
            return Err(Error::Invalid(format!(
                "{}: the stream cannot be finished: a grain that was announced was not written",
                storage.path().display()
            )));
        }
        self.end_table(sparse, stream)?;
        let mut entries = vec![0; usize_of(sparse.directory_entries() * 4)];
        if let Directory::Kept(tables) = &*sparse.directory() {
            for (index, table) in tables {
                let KeptTable::Stored(at) = table else { continue };
                let start = usize_of(index * 4);
                entries[start..start + 4].copy_from_slice(&sector_entry(sparse, *at)?.to_le_bytes());
            }
        }
        let directory_at = append(sparse, stream, marker::GRAIN_DIRECTORY, &entries)?;
        storage.flush(Flush::Data)?; // 1.
        let mut footer = RawHeader::read(storage, 0)?;
        footer.directory_sector = U64::new(directory_at / SECTOR_BYTES);
        append(sparse, stream, marker::FOOTER, footer.as_bytes())?;
        let end = RawMarker::new(marker::END_OF_STREAM, 0);
        storage.write_at(end.as_bytes(), stream.next_at)?;
        storage.flush(Flush::Data)?; // 2.
        state.growth = Growth::Finished;
        Ok(())
    }
}

impl Stream {
    /// A reserved place was given up.
    pub(super) fn leave_hole(&mut self) {
        self.broken = true;
    }
}

/// Puts a marker and `bytes`, filled up to whole sectors, at the end of the stream; where the bytes begin.
fn append(sparse: &Sparse, stream: &mut Stream, kind: u32, bytes: &[u8]) -> Result<u64> {
    let sectors = (bytes.len() as u64).div_ceil(SECTOR_BYTES);
    let mut all = Vec::with_capacity(usize_of((sectors + 1) * SECTOR_BYTES));
    all.extend_from_slice(RawMarker::new(kind, sectors).as_bytes());
    all.extend_from_slice(bytes);
    all.resize(usize_of((sectors + 1) * SECTOR_BYTES), 0);
    sector_entry(sparse, stream.next_at + all.len() as u64)?;
    sparse.storage.write_at(&all, stream.next_at)?;
    let at = stream.next_at + SECTOR_BYTES;
    stream.next_at += all.len() as u64;
    Ok(at)
}
