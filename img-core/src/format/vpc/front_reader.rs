//! VHDs from a stream. Dynamic ones begin with a copy of their footer, header and table; their blocks are read in
//! the order in which they stand, and the footer has to be there at the end. Fixed ones are known by their footer at
//! the end, so that the format has to be named.

use std::sync::Arc;

use super::{
    bitmap::{runs_there, sectors},
    footer::{self, Copies, Copy, DiskType, FOOTER_BYTES, Footer, RawFooter, SizeRule},
    geometry::SECTOR_BYTES,
    header::Header,
    map::read_table,
};
use crate::{
    Error, Result,
    format::{FrontReader, FrontRun, HostFile, HostOffset, Place, raw::front_reader::push_run},
    storage::{Storage as _, StreamStorage},
};

/// Blocks that are kept in the order of the file: 16 MiB of them. Disks of 2040 GiB have half as many.
const MAX_BLOCKS: usize = 2 << 20;

/// How much of a fixed disk is read at once.
const PIECE_BYTES: usize = 1 << 20;

/// The reader for the kind of VHD that the first sector speaks of.
///
/// # Errors
/// [`Error::Unsupported`] for a differencing disk; [`Error::Corrupt`].
pub(super) fn new(stream: Arc<StreamStorage>) -> Result<Box<dyn FrontReader>> {
    let mut sector = [0; FOOTER_BYTES];
    stream.read_at(&mut sector, 0)?;
    let front = Copy::parse(&sector);
    if front == Copy::Absent {
        return Ok(Box::new(FixedStream { stream, at: 0 }));
    }
    // The end is looked at when it comes.
    let copies = Copies { front, back: Copy::Absent, back_at: u64::MAX, file_bytes: u64::MAX };
    let footer = copies.choose(stream.path())?;
    if footer.disk_type == DiskType::Differencing {
        return Err(Error::unsupported(stream.path(), "reading a differencing VHD from a pipe"));
    }
    Ok(Box::new(DynamicStream::new(stream, footer)?))
}

struct FixedStream {
    stream: Arc<StreamStorage>,
    at: u64,
}

impl FrontReader for FixedStream {
    fn virtual_size_bytes(&self) -> Option<u64> {
        None
    }

    fn next(&mut self, runs: &mut Vec<FrontRun>) -> Result<()> {
        // The last sector is no part of the disk.
        let ahead = self.stream.available(self.at, PIECE_BYTES + FOOTER_BYTES)?;
        let len = ahead.saturating_sub(FOOTER_BYTES);
        push_run(self.at, len, runs);
        self.at += len as u64;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let end = self.stream.drain()?;
        let mut sector = [0; FOOTER_BYTES];
        if let Some(at) = end.checked_sub(SECTOR_BYTES) {
            self.stream.read_at(&mut sector, at)?;
        }
        if footer::ends_fixed_disk(&sector, end) {
            return Ok(());
        }
        let rule = "the footer of a fixed VHD of that size";
        let found = "another sector: no fixed VHD, or not all of one";
        Err(Error::corrupt(self.stream.path(), "footer", end.saturating_sub(SECTOR_BYTES), rule, found))
    }
}

struct DynamicStream {
    stream: Arc<StreamStorage>,
    footer: RawFooter,
    header: Header,
    virtual_size_bytes: u64,
    /// Sector and block, in the order of the file, last first.
    blocks: Vec<(u32, u32)>,
    /// Where the last block ended.
    at: u64,
}

impl DynamicStream {
    fn new(stream: Arc<StreamStorage>, footer: Footer) -> Result<Self> {
        let virtual_size_bytes = footer.virtual_size_bytes(stream.path(), SizeRule::Creator)?;
        let header = Header::read(&*stream, footer.raw.data_offset.get(), virtual_size_bytes)?;
        let in_disk = virtual_size_bytes.div_ceil(header.block_bytes);
        let mut blocks = Vec::new();
        read_table(&*stream, &header, 0, |block, sector| {
            if u64::from(block) >= in_disk {
                return Ok(());
            }
            if blocks.len() == MAX_BLOCKS {
                let feature = format!("reading a VHD of more than {MAX_BLOCKS} blocks from a pipe");
                return Err(Error::unsupported(stream.path(), feature));
            }
            blocks.push((sector, block));
            Ok(())
        })?;
        blocks.sort_unstable_by(|one, other| other.cmp(one));
        let at = header.table().end;
        Ok(Self { footer: footer.raw, virtual_size_bytes, blocks, at, header, stream })
    }
}

impl FrontReader for DynamicStream {
    fn virtual_size_bytes(&self) -> Option<u64> {
        Some(self.virtual_size_bytes)
    }

    fn next(&mut self, runs: &mut Vec<FrontRun>) -> Result<()> {
        while runs.is_empty() {
            let Some((sector, block)) = self.blocks.pop() else { return Ok(()) };
            let start = u64::from(sector) * SECTOR_BYTES;
            if start < self.at {
                return Err(Error::corrupt(
                    self.stream.path(),
                    "block allocation table",
                    self.header.entry_at(block),
                    format_args!("a block of its own, behind byte {:#x}", self.at),
                    format_args!("one at {start:#x}"),
                ));
            }
            let bitmap_bytes = self.header.bitmap_bytes();
            self.at = start + self.header.stored_block_bytes();
            let mut bitmap = vec![0; usize::try_from(bitmap_bytes).expect("at most 512 KiB")];
            self.stream.read_at(&mut bitmap, start)?;
            let guest = u64::from(block) * self.header.block_bytes;
            let end = (guest + self.header.block_bytes).min(self.virtual_size_bytes);
            for there in runs_there(&bitmap, sectors(end - guest)) {
                let from = u64::from(there.start) * SECTOR_BYTES;
                let place = Place::Data {
                    file: HostFile::IMAGE,
                    at: HostOffset(start + bitmap_bytes + from),
                    writable: false,
                };
                let len_bytes = u64::from(there.end - there.start) * SECTOR_BYTES;
                runs.push(FrontRun { guest_offset: guest + from, len_bytes, place });
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let end = self.stream.drain()?;
        let at = end.checked_sub(SECTOR_BYTES).filter(|at| *at >= self.at);
        let mut sector = [0; FOOTER_BYTES];
        if let Some(at) = at {
            self.stream.read_at(&mut sector, at)?;
        }
        if Copy::parse(&sector) == Copy::Intact(self.footer) {
            return Ok(());
        }
        let rule = "the footer, behind the last block";
        Err(Error::corrupt(
            self.stream.path(),
            "footer",
            end,
            rule,
            "the end of the stream: it is not complete",
        ))
    }
}
