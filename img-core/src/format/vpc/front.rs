//! VHDs to a pipe. Dynamic: footer's copy, header, table, the blocks in guest order, footer. Fixed: the data, the
//! footer.

use zerocopy::IntoBytes as _;

use super::{
    create,
    footer::{DiskType, RawFooter, SizeRule},
    geometry::SECTOR_BYTES,
    header::{DEFAULT_BLOCK_BYTES, ENTRY_BYTES, HEADER_BYTES, RawHeader, UNUSED},
};
use crate::{
    Error, Result,
    format::{FrontRequest, FrontWriter, LookAhead, raw::front::put_at, refuse_file_options},
    storage::Pipe,
};

/// Bytes of the bitmap in front of a block of the usual size.
const BITMAP_BYTES: u64 = 512;
const _: () = assert!(BITMAP_BYTES * 8 * SECTOR_BYTES == DEFAULT_BLOCK_BYTES as u64);

/// As much of a fixed disk as a pipe takes at once.
const FIXED_UNIT_BYTES: u64 = 64 << 10;

/// The writer for the kind of VHD that the options name.
///
/// # Errors
/// As creating one in a file; a parent is refused by name.
pub(super) fn new(request: &FrontRequest<'_>) -> Result<Box<dyn FrontWriter>> {
    refuse_file_options(request.options)?;
    request.options.check_names(&[create::CREATE_OPTIONS])?;
    let force_size = request.options.switch("force_size")?.unwrap_or(false);
    let disk_type = create::type_without_parent(request.options)?;
    let footer = create::new_footer(disk_type, request.virtual_size_bytes, force_size)?;
    Ok(match disk_type {
        DiskType::Fixed => Box::new(FixedFront { footer }),
        DiskType::Dynamic | DiskType::Differencing => Box::new(DynamicFront::new(footer)),
    })
}

struct FixedFront {
    footer: RawFooter,
}

impl FrontWriter for FixedFront {
    fn unit_bytes(&self) -> u64 {
        FIXED_UNIT_BYTES
    }

    fn head(&mut self, _pipe: &mut Pipe) -> Result<()> {
        Ok(())
    }

    fn unit(&mut self, guest: u64, stored: &[u8], pipe: &mut Pipe) -> Result<()> {
        put_at(guest, stored, self.footer.current_size.get(), pipe)
    }

    fn finish(&mut self, pipe: &mut Pipe) -> Result<()> {
        pipe.pad_to(self.footer.current_size.get())?;
        pipe.put(self.footer.as_bytes())
    }
}

struct DynamicFront {
    footer: RawFooter,
    /// Sectors; at most 4 MiB of them.
    table: Vec<u32>,
    /// Where the next block goes.
    next_at: u64,
}

impl DynamicFront {
    fn new(footer: RawFooter) -> Self {
        let disk_bytes = footer.virtual_sectors(SizeRule::Creator) * SECTOR_BYTES; // at most 2040 GiB
        let entries = disk_bytes.div_ceil(u64::from(DEFAULT_BLOCK_BYTES));
        let table = vec![UNUSED; usize::try_from(entries).expect("at most 2^20")];
        let mut front = Self { footer, table, next_at: 0 };
        front.next_at = front.table_at() + front.table_bytes();
        front
    }

    fn table_at(&self) -> u64 {
        (self.footer.as_bytes().len() + HEADER_BYTES) as u64
    }

    fn table_bytes(&self) -> u64 {
        (self.table.len() as u64 * ENTRY_BYTES).next_multiple_of(SECTOR_BYTES)
    }
}

/// The block that begins at a guest byte.
fn block_at(guest: u64) -> usize {
    usize::try_from(guest / u64::from(DEFAULT_BLOCK_BYTES)).expect("at most 2^20 blocks")
}

impl FrontWriter for DynamicFront {
    fn unit_bytes(&self) -> u64 {
        DEFAULT_BLOCK_BYTES.into()
    }

    fn look_ahead(&self) -> LookAhead {
        LookAhead::Units
    }

    fn survey(&mut self, guest: u64, _stored_bytes: u32) -> Result<()> {
        let sector = u32::try_from(self.next_at / SECTOR_BYTES).expect("at most 2040 GiB and their bitmaps");
        self.table[block_at(guest)] = sector;
        self.next_at += BITMAP_BYTES + u64::from(DEFAULT_BLOCK_BYTES);
        Ok(())
    }

    fn head(&mut self, pipe: &mut Pipe) -> Result<()> {
        pipe.put(self.footer.as_bytes())?;
        let mut header = RawHeader::empty();
        header.table_offset = self.table_at().into();
        header.max_table_entries = u32::try_from(self.table.len()).expect("at most 2^20").into();
        pipe.put(header.summed().as_bytes())?;
        let mut bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize(usize::try_from(self.table_bytes()).expect("at most 4 MiB"), 0xff);
        pipe.put(&bytes)
    }

    fn unit(&mut self, guest: u64, stored: &[u8], pipe: &mut Pipe) -> Result<()> {
        let place = u64::from(self.table[block_at(guest)]) * SECTOR_BYTES;
        if place != pipe.written_bytes() {
            return Err(Error::Invalid(format!(
                "the block at byte {guest} of the source was not there when the source was first looked at"
            )));
        }
        // Sectors that are there hold the disk's bytes, behind its end too.
        pipe.put(&[0xff; 512])?;
        pipe.put(stored)
    }

    fn finish(&mut self, pipe: &mut Pipe) -> Result<()> {
        pipe.put(self.footer.as_bytes())
    }
}
