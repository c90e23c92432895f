//! streamOptimized to a pipe: header, descriptor, grains with their markers, each table behind its grains, then
//! directory, footer and end-of-stream marker (see [`stream`](super::stream), whose bytes these are).

use zerocopy::{
    IntoBytes as _,
    little_endian::{U16, U32, U64},
};

use super::{
    create::{self, DESCRIPTOR_SECTORS, GRAIN_SECTORS, TABLE_ENTRIES},
    header::{DEFLATE, DIRECTORY_AT_END, MAGIC, NEWLINES, RawHeader, RawMarker, SECTOR_BYTES, flag, marker},
    sparse::usize_of,
    stream::{GrainPlace, STREAM_OVERHEAD_SECTORS},
};
use crate::{
    Error, Result,
    format::{Codec, FrontRequest, FrontWriter, refuse_file_options},
    storage::Pipe,
    text,
};

/// The directory is held: 16 MiB, a disk of 128 TiB.
const MAX_TABLES: u64 = 4 << 20;

/// Guest bytes of a grain.
const GRAIN_BYTES: u64 = GRAIN_SECTORS * SECTOR_BYTES;

/// What the extent is called in its descriptor. No reader looks for it: the extent is the file itself.
const EXTENT_NAME: &str = "disk.vmdk";

/// See the module.
pub(super) struct StreamFront {
    header: RawHeader,
    descriptor: Vec<u8>,
    /// Sectors of the tables; 0 for those without grains.
    directory: Vec<u32>,
    /// The table of the grains that are written now, and its index.
    table: Option<(usize, Vec<u32>)>,
}

impl StreamFront {
    /// # Errors
    /// [`Error::Invalid`] for other subformats, which are not laid out front to back, and as `create`.
    pub(super) fn new(request: &FrontRequest<'_>) -> Result<Self> {
        refuse_file_options(request.options)?;
        if request.options.get("subformat") != Some("streamOptimized") {
            let name = request.options.get("subformat").unwrap_or("monolithicSparse");
            return Err(Error::Invalid(format!(
                "a {name} VMDK cannot be written to a pipe: subformat=streamOptimized can"
            )));
        }
        let capacity_sectors = request.virtual_size_bytes / SECTOR_BYTES;
        let tables = capacity_sectors.div_ceil(GRAIN_SECTORS * TABLE_ENTRIES);
        if tables > MAX_TABLES {
            return Err(Error::Invalid("a streamOptimized VMDK in a pipe holds at most 128 TiB".to_owned()));
        }
        let line = format!("RW {capacity_sectors} SPARSE \"{EXTENT_NAME}\"\n");
        let (descriptor, has_zeroed_grains) =
            create::stream_descriptor(request.options, request.virtual_size_bytes, &line)?;
        let zeroed = if has_zeroed_grains { flag::ZEROED_GRAINS } else { 0 };
        let header = RawHeader {
            magic: MAGIC,
            version: U32::new(3),
            flags: U32::new(flag::NEWLINE_TEST | flag::COMPRESSED | flag::MARKERS | zeroed),
            capacity_sectors: U64::new(capacity_sectors),
            grain_sectors: U64::new(GRAIN_SECTORS),
            descriptor_sector: U64::new(1),
            descriptor_sectors: U64::new(DESCRIPTOR_SECTORS),
            table_entries: U32::new(u32::try_from(TABLE_ENTRIES).expect("512")),
            redundant_directory_sector: U64::new(0),
            directory_sector: U64::new(DIRECTORY_AT_END),
            overhead_sectors: U64::new(STREAM_OVERHEAD_SECTORS),
            unclean_shutdown: 0,
            newline_test: NEWLINES,
            compress_algorithm: U16::new(DEFLATE),
            padding: [0; 433],
        };
        let directory = vec![0; usize_of(tables)];
        Ok(Self { header, descriptor: text::to_bytes(&descriptor).into_owned(), directory, table: None })
    }

    /// Writes the table of the grains so far.
    fn end_table(&mut self, pipe: &mut Pipe) -> Result<()> {
        let Some((index, entries)) = self.table.take() else { return Ok(()) };
        self.directory[index] = append(&entries, marker::GRAIN_TABLE, pipe)?;
        Ok(())
    }
}

impl FrontWriter for StreamFront {
    fn unit_bytes(&self) -> u64 {
        GRAIN_BYTES
    }

    fn codec(&self) -> Option<Codec> {
        Some(Codec::Zlib)
    }

    fn head(&mut self, pipe: &mut Pipe) -> Result<()> {
        pipe.put(self.header.as_bytes())?;
        pipe.put(&self.descriptor)?;
        pipe.pad_to(STREAM_OVERHEAD_SECTORS * SECTOR_BYTES)
    }

    fn unit(&mut self, guest: u64, stored: &[u8], pipe: &mut Pipe) -> Result<()> {
        let grain = guest / GRAIN_BYTES;
        let index = usize_of(grain / TABLE_ENTRIES);
        if self.table.as_ref().is_none_or(|(current, _)| *current != index) {
            self.end_table(pipe)?;
        }
        let sector = sector(pipe)?;
        let entries = &mut self.table.get_or_insert_with(|| (index, vec![0; usize_of(TABLE_ENTRIES)])).1;
        entries[usize_of(grain % TABLE_ENTRIES)] = sector;
        let stored_bytes = u32::try_from(stored.len()).expect("a compressed grain");
        let place = GrainPlace::new(pipe.written_bytes(), guest, stored_bytes);
        pipe.put(&place.marker)?;
        pipe.put(stored)?;
        pipe.pad_to(pipe.written_bytes() + u64::from(place.pad_bytes))
    }

    fn finish(&mut self, pipe: &mut Pipe) -> Result<()> {
        self.end_table(pipe)?;
        let directory = append(&self.directory, marker::GRAIN_DIRECTORY, pipe)?;
        self.header.directory_sector = U64::new(directory.into());
        pipe.put(RawMarker::new(marker::FOOTER, 1).as_bytes())?;
        pipe.put(self.header.as_bytes())?;
        pipe.put(RawMarker::new(marker::END_OF_STREAM, 0).as_bytes())
    }
}

/// Writes a marker and `entries`, filled up to whole sectors; the sector of the first entry.
fn append(entries: &[u32], kind: u32, pipe: &mut Pipe) -> Result<u32> {
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let sectors = (bytes.len() as u64).div_ceil(SECTOR_BYTES);
    pipe.put(RawMarker::new(kind, sectors).as_bytes())?;
    let at = sector(pipe)?;
    let end = pipe.written_bytes() + sectors * SECTOR_BYTES;
    pipe.put(&bytes)?;
    pipe.pad_to(end)?;
    Ok(at)
}

/// The sector that is written next, which a table of 32-bit numbers has to name.
fn sector(pipe: &Pipe) -> Result<u32> {
    u32::try_from(pipe.written_bytes() / SECTOR_BYTES)
        .map_err(|_| Error::unsupported(pipe.path(), "a sparse extent file of more than 2 TiB"))
}
