//! A chain, understood: one request of section 5.2.6, checked against the disk.

use vm_memory::GuestAddress;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    little_endian::{U32, U64},
};

use super::{
    GuestRam,
    chain::{Chain, RingError, TakeError, take_front, take_last_byte, total_bytes},
    config::{MAX_RANGE_SECTORS, MAX_RANGES, SECTOR_BYTES},
};

/// What the status byte says (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`.
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`: the device or the driver failed.
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported = 2,
}

/// The head of `struct virtio_blk_req` (5.2.6).
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct RawHeader {
    /// One of [`kind`].
    pub(crate) kind: U32,
    pub(crate) reserved: U32,
    pub(crate) sector: U64,
}
const _: () = assert!(size_of::<RawHeader>() == 16);

/// `struct virtio_blk_discard_write_zeroes` (5.2.6).
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct RawRange {
    pub(crate) sector: U64,
    pub(crate) num_sectors: U32,
    pub(crate) flags: U32,
}
const RANGE_BYTES: u64 = size_of::<RawRange>() as u64;
const _: () = assert!(RANGE_BYTES == 16);

/// `unmap` of `flags`.
const UNMAP: u32 = 1;

/// `VIRTIO_BLK_T_...` (5.2.6).
pub(crate) mod kind {
    pub(crate) const IN: u32 = 0;
    pub(crate) const OUT: u32 = 1;
    pub(crate) const FLUSH: u32 = 4;
    pub(crate) const GET_ID: u32 = 8;
    pub(crate) const DISCARD: u32 = 11;
    pub(crate) const WRITE_ZEROES: u32 = 13;
}

/// What a request wants. Its data memory is what is left in the chain: `writable` for reads and the id, `readable`
/// for writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read from `at_bytes` on into the writable memory.
    In {
        /// Guest offset.
        at_bytes: u64,
        /// Of the data.
        len_bytes: u64,
    },
    /// Write the readable memory from `at_bytes` on.
    Out {
        /// Guest offset.
        at_bytes: u64,
        /// Of the data.
        len_bytes: u64,
    },
    /// Make what was written durable.
    Flush,
    /// Tell the serial number.
    GetId,
    /// Discard the ranges.
    Discard,
    /// Zero the ranges.
    WriteZeroes,
}

/// One range of a discard or write-zeroes command, inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRange {
    /// First byte.
    pub at_bytes: u64,
    /// How many.
    pub len_bytes: u64,
    /// Whether the space may be given back. Always for a discard.
    pub may_unmap: bool,
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub struct DiskShape {
    /// Size, a multiple of [`SECTOR_BYTES`] or not: a last part of a sector cannot be reached.
    pub size_bytes: u64,
    /// Every offset and length is a multiple of it. A power of two, at least [`SECTOR_BYTES`].
    pub block_bytes: u32,
    /// Whether writes fail.
    pub read_only: bool,
}

impl DiskShape {
    /// The range in bytes, when it is made of whole blocks and lies inside the disk.
    fn range(&self, sector: u64, len_bytes: u64) -> Option<u64> {
        let at_bytes = sector.checked_mul(SECTOR_BYTES)?;
        let end = at_bytes.checked_add(len_bytes)?;
        let usable = self.size_bytes - self.size_bytes % SECTOR_BYTES;
        let is_whole = (at_bytes | len_bytes).is_multiple_of(u64::from(self.block_bytes));
        (is_whole && end <= usable).then_some(at_bytes)
    }
}

/// A chain understood as far as it could be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Where the answer goes.
    pub status_at: GuestAddress,
    /// What to do, or the answer where nothing is to be done.
    pub command: Result<Command, Status>,
}

/// Takes header and status byte off `chain` and says what it wants. `ranges` is filled for discards and zeroes.
///
/// The framing is free (2.7.4): header, data and status may be cut and joined in any way.
///
/// # Errors
/// [`RingError::NoStatus`] when there is nowhere to answer.
pub fn parse(
    ram: &GuestRam,
    chain: &mut Chain,
    disk: DiskShape,
    ranges: &mut Vec<DiskRange>,
) -> Result<Parsed, RingError> {
    use vm_memory::GuestMemoryBackend;
    let status_at = take_last_byte(&mut chain.writable).ok_or(RingError::NoStatus)?;
    if !ram.address_in_range(status_at) {
        return Err(RingError::NoStatus);
    }
    Ok(Parsed { status_at, command: command(ram, chain, disk, ranges) })
}

fn command(
    ram: &GuestRam,
    chain: &mut Chain,
    disk: DiskShape,
    ranges: &mut Vec<DiskRange>,
) -> Result<Command, Status> {
    if chain.out_of_order {
        return Err(Status::IoError);
    }
    let mut header = RawHeader::default();
    take_front(ram, &mut chain.readable, header.as_mut_bytes()).map_err(broken)?;
    let sector = header.sector.get();
    match header.kind.get() {
        kind::IN => {
            nothing_in(&chain.readable)?;
            let len_bytes = total_bytes(&chain.writable);
            let at_bytes = disk.range(sector, len_bytes).ok_or(Status::IoError)?;
            Ok(Command::In { at_bytes, len_bytes })
        }
        kind::OUT => {
            nothing_in(&chain.writable)?;
            let len_bytes = total_bytes(&chain.readable);
            let at_bytes = disk.range(sector, len_bytes).ok_or(Status::IoError)?;
            if disk.read_only {
                return Err(Status::IoError); // 5.2.6.2
            }
            Ok(Command::Out { at_bytes, len_bytes })
        }
        kind::FLUSH => Ok(Command::Flush),
        kind::GET_ID => nothing_in(&chain.readable).map(|()| Command::GetId),
        kind::DISCARD => read_ranges(ram, chain, disk, ranges, false).map(|()| Command::Discard),
        kind::WRITE_ZEROES => read_ranges(ram, chain, disk, ranges, true).map(|()| Command::WriteZeroes),
        _ => Err(Status::Unsupported),
    }
}

/// Memory of the other direction than the command's is the driver's error.
fn nothing_in(others: &[super::chain::GuestRange]) -> Result<(), Status> {
    if others.is_empty() { Ok(()) } else { Err(Status::IoError) }
}

fn broken(_: TakeError) -> Status {
    Status::IoError
}

fn read_ranges(
    ram: &GuestRam,
    chain: &mut Chain,
    disk: DiskShape,
    ranges: &mut Vec<DiskRange>,
    zeroes: bool,
) -> Result<(), Status> {
    nothing_in(&chain.writable)?;
    let len_bytes = total_bytes(&chain.readable);
    let count = len_bytes / RANGE_BYTES;
    let is_whole = len_bytes.is_multiple_of(RANGE_BYTES) && (1..=u64::from(MAX_RANGES)).contains(&count);
    if !is_whole || disk.read_only {
        return Err(Status::IoError);
    }
    ranges.clear();
    let mut is_inside = true;
    for _ in 0..count {
        let mut raw = RawRange::default();
        take_front(ram, &mut chain.readable, raw.as_mut_bytes()).map_err(broken)?;
        let flags = raw.flags.get();
        // 5.2.6.2: unknown flags, and `unmap` of a discard, are not supported, whatever else is wrong.
        if flags & !UNMAP != 0 || (flags & UNMAP != 0 && !zeroes) {
            return Err(Status::Unsupported);
        }
        let len_bytes = u64::from(raw.num_sectors.get()) * SECTOR_BYTES; // below 2^41
        match disk.range(raw.sector.get(), len_bytes) {
            Some(at_bytes) if raw.num_sectors.get() <= MAX_RANGE_SECTORS => {
                ranges.push(DiskRange { at_bytes, len_bytes, may_unmap: !zeroes || flags & UNMAP != 0 });
            }
            _ => is_inside = false,
        }
    }
    // Nothing of the command is done when a part of it cannot be.
    if is_inside { Ok(()) } else { Err(Status::IoError) }
}
