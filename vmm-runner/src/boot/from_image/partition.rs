//! Partitions: GPT (UEFI 2.10, section 5.3) by a library, MBR with its chain of logical ones here.

use std::{
    io::{self, Read, Seek, SeekFrom, Write},
    ops::Range,
    sync::Arc,
};

use gpt::{GptConfig, disk::LogicalBlockSize};
use img_core::image::Image;

use crate::{Error, Result};

const SECTOR: u64 = 512;
/// The same, as the length of a buffer.
const SECTOR_BYTES: usize = 512;
/// The last two bytes of a sector with a table, or with code.
const SIGNATURE: [u8; 2] = [0x55, 0xAA];
/// Code comes first, before the disk's own number and the table.
const BOOT_CODE_BYTES: usize = 440;
/// A partition table has no more entries in practice; the library would believe any number.
const MAX_GPT_ENTRIES: u32 = 1024;
/// Where a GPT header says how many entries there are.
const GPT_COUNT_AT: usize = 80;
/// Logical partitions are a chain; it may be a circle.
const MAX_LOGICAL: usize = 64;
/// Type of the MBR entry that stands for a GPT.
const TYPE_GPT: u8 = 0xEE;
/// Types of the MBR entries that lead to logical partitions.
const TYPES_EXTENDED: [u8; 3] = [0x05, 0x0F, 0x85];

/// A part of a disk that may hold a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// What to call it.
    pub(super) name: String,
    /// Where it is on the disk.
    pub(super) bytes: Range<u64>,
}

/// All partitions; the whole disk where there is no table.
pub(super) fn list(image: &Arc<Image>) -> Result<Vec<Part>> {
    let size = image.virtual_size_bytes();
    let whole = Part { name: "the disk".to_owned(), bytes: 0..size };
    let Some(table) = read_table(image, 0)? else { return Ok(vec![whole]) };
    if table.iter().any(|entry| entry.kind == TYPE_GPT) {
        return gpt_parts(image);
    }
    let mut parts = Vec::new();
    for (number, entry) in (1..).zip(&table) {
        if TYPES_EXTENDED.contains(&entry.kind) {
            logical_parts(image, entry.bytes(0), &mut parts)?;
        } else {
            push(&mut parts, number, entry.bytes(0), size);
        }
    }
    // A boot sector of a file system ends in the same signature as a partition table.
    parts.push(whole);
    Ok(parts)
}

fn push(parts: &mut Vec<Part>, number: usize, bytes: Range<u64>, disk_bytes: u64) {
    if !bytes.is_empty() && bytes.end <= disk_bytes {
        parts.push(Part { name: format!("partition {number}"), bytes });
    }
}

/// One entry of a table in an MBR.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    kind: u8,
    first_sector: u32,
    sectors: u32,
}

impl Entry {
    /// Where it is, counted from `base` bytes.
    fn bytes(&self, base: u64) -> Range<u64> {
        let start = base.saturating_add(u64::from(self.first_sector) * SECTOR);
        if self.kind == 0 {
            start..start
        } else {
            start..start.saturating_add(u64::from(self.sectors) * SECTOR)
        }
    }
}

/// Whether there is code where a PC starts a disk: a sector with the signature that is not a table alone.
pub(super) fn has_boot_code(image: &Image) -> Result<bool> {
    let mut sector = [0; SECTOR_BYTES];
    if image.virtual_size_bytes() < SECTOR {
        return Ok(false);
    }
    image.read_at(&mut sector, 0)?;
    Ok(sector[510..] == SIGNATURE && sector[..BOOT_CODE_BYTES].iter().any(|byte| *byte != 0))
}

/// The four entries at a place; `None` where there is no signature.
fn read_table(image: &Image, at: u64) -> Result<Option<[Entry; 4]>> {
    let mut sector = [0; SECTOR_BYTES];
    if at.checked_add(SECTOR).is_none_or(|end| end > image.virtual_size_bytes()) {
        return Ok(None);
    }
    image.read_at(&mut sector, at)?;
    if sector[510..] != SIGNATURE {
        return Ok(None);
    }
    let mut entries = [Entry::default(); 4];
    for (entry, bytes) in entries.iter_mut().zip(sector[446..510].chunks_exact(16)) {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        *entry = Entry { kind: bytes[4], first_sector: word(8), sectors: word(12) };
    }
    Ok(Some(entries))
}

/// The chain of logical partitions: each link has one, and names the next link from the start of the chain.
fn logical_parts(image: &Image, extended: Range<u64>, parts: &mut Vec<Part>) -> Result<()> {
    let mut at = extended.start;
    for number in 5..5 + MAX_LOGICAL {
        let Some([own, next, ..]) = read_table(image, at)? else { break };
        push(parts, number, own.bytes(at), image.virtual_size_bytes());
        if !TYPES_EXTENDED.contains(&next.kind) {
            break;
        }
        at = next.bytes(extended.start).start;
    }
    Ok(())
}

fn gpt_parts(image: &Arc<Image>) -> Result<Vec<Part>> {
    let size = image.virtual_size_bytes();
    let bad = |why: String| Error::Invalid(format!("the disk's partition table cannot be read: {why}"));
    // The table is good if either copy is; both must be bounded before the library reads one.
    for at in [SECTOR, size.saturating_sub(SECTOR)] {
        let mut header = [0; SECTOR_BYTES];
        image.read_at(&mut header, at.min(size.saturating_sub(SECTOR)))?;
        let count =
            u32::from_le_bytes(header[GPT_COUNT_AT..GPT_COUNT_AT + 4].try_into().expect("four bytes"));
        if header.starts_with(b"EFI PART") && count > MAX_GPT_ENTRIES {
            return Err(bad(format!("{count} entries, more than {MAX_GPT_ENTRIES}")));
        }
    }
    let device = Device { image: Arc::clone(image), at: 0 };
    let config = GptConfig::new()
        .writable(false)
        .only_valid_headers(false)
        .logical_block_size(LogicalBlockSize::Lb512);
    let disk = config.open_from_device(device).map_err(|error| bad(error.to_string()))?;
    let mut parts = Vec::new();
    for (&number, partition) in disk.partitions() {
        let sectors = partition.first_lba..partition.last_lba.saturating_add(1);
        let bytes = sectors.start.saturating_mul(SECTOR)..sectors.end.saturating_mul(SECTOR);
        push(&mut parts, number as usize, bytes, size);
    }
    Ok(parts)
}

/// A disk as the library wants it; it cannot be written.
#[derive(Debug)]
pub(super) struct Device {
    image: Arc<Image>,
    at: u64,
}

impl Read for Device {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.image.virtual_size_bytes().saturating_sub(self.at);
        let count = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.image.read_at(&mut buf[..count], self.at).map_err(io::Error::other)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Device {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let size = self.image.virtual_size_bytes();
        self.at = seek(self.at, size, to)?;
        Ok(self.at)
    }
}

impl Write for Device {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A new place in something of `size` bytes.
pub(super) fn seek(at: u64, size: u64, to: SeekFrom) -> io::Result<u64> {
    let place = match to {
        SeekFrom::Start(at) => Some(at),
        SeekFrom::End(by) => size.checked_add_signed(by),
        SeekFrom::Current(by) => at.checked_add_signed(by),
    };
    place.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
