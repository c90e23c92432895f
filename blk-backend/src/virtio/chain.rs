//! A descriptor chain: which guest memory a request is made of (virtio 1.2, sections 2.7.4 and 2.7.5).
//!
//! The chain is walked here and not by `virtio_queue`'s iterator, which ends silently at whatever is wrong: a
//! request whose chain is broken must not pass for a shorter one. Nothing here trusts the guest: a descriptor is
//! copied out of its memory once, then checked, then used.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::GuestRam;
use crate::request::iovec;

/// Most descriptors of a chain through an indirect table. The kernel takes no more runs of memory in one call
/// (`IOV_MAX`), and drivers stay far below it.
pub const MAX_INDIRECT_DESCRIPTORS: u32 = 1024;

/// Bytes of a descriptor (2.7.5).
const DESCRIPTOR_BYTES: u32 = 16;
const _: () = assert!(size_of::<Descriptor>() == DESCRIPTOR_BYTES as usize);

/// `VIRTQ_DESC_F_NEXT` and `VIRTQ_DESC_F_INDIRECT` together: not allowed (2.7.5.3.1).
const NEXT_AND_INDIRECT: u16 = 1 | 4;

/// A run of guest memory as the guest names it. Not checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First byte.
    pub start: GuestAddress,
    /// How many; never 0.
    pub len_bytes: u32,
}

/// Why the driver's ring or a chain of it cannot be followed. There is no status byte to say so in: the device
/// needs a reset (2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The available ring names a descriptor that the table does not have.
    #[error("the available ring names descriptor {head} of a table of {size}")]
    Head {
        /// As named.
        head: u16,
        /// Descriptors of the table.
        size: u16,
    },
    /// The available ring names a chain again that was not used yet.
    #[error("the available ring names descriptor {0} while the device still has it")]
    HeadInUse(u16),
    /// More chains are available than the ring has places.
    #[error("the available ring is ahead of the device by more than its size")]
    TooManyAvailable,
    /// `next` is outside the table.
    #[error("descriptor {0} is named as the next of a chain and is outside its table")]
    Next(u16),
    /// The chain is longer than its table, so it comes back to where it was.
    #[error("a chain is longer than its table")]
    Loop,
    /// A descriptor is not in the guest's memory.
    #[error("a descriptor table at {0:#x} is outside guest memory")]
    TableOutside(u64),
    /// An indirect table without the feature, within another, or followed by another descriptor.
    #[error("an indirect descriptor where none may be")]
    Indirect,
    /// An indirect table of no, of broken or of too many descriptors.
    #[error("an indirect table of {0} bytes")]
    IndirectSize(u32),
    /// No byte that the device may write, or not in the guest's memory.
    #[error("a chain has no byte for the status")]
    NoStatus,
    /// A ring itself is outside the guest's memory.
    #[error("a ring is outside guest memory")]
    RingOutside,
}

/// The memory of one request, in the order of the chain. Kept and filled again, so that its room is taken once.
#[derive(Debug, Default)]
pub struct Chain {
    /// What the driver filled.
    pub readable: Vec<GuestRange>,
    /// What the device may fill.
    pub writable: Vec<GuestRange>,
    /// Readable memory came behind writable memory, which a driver must not do (2.7.4.2).
    pub out_of_order: bool,
}

/// Where a chain's descriptors are.
#[derive(Clone, Copy, Debug)]
pub struct DescriptorTable {
    /// First descriptor.
    pub at: GuestAddress,
    /// How many.
    pub size: u16,
    /// Whether indirect descriptors were negotiated.
    pub indirect: bool,
}

impl Chain {
    /// Fills `self` with the chain that starts at `head`.
    ///
    /// # Errors
    /// What keeps the chain from being followed to its end.
    pub fn walk(&mut self, ram: &GuestRam, table: DescriptorTable, head: u16) -> Result<(), RingError> {
        self.readable.clear();
        self.writable.clear();
        self.out_of_order = false;
        if head >= table.size {
            return Err(RingError::Head { head, size: table.size });
        }
        let (mut at, mut size, mut index) = (table.at, u32::from(table.size), u32::from(head));
        let mut is_indirect = false;
        let mut left = size;
        loop {
            left = left.checked_sub(1).ok_or(RingError::Loop)?;
            let descriptor = read_descriptor(ram, at, index)?;
            if descriptor.refers_to_indirect_table() {
                if !table.indirect
                    || is_indirect
                    || descriptor.flags() & NEXT_AND_INDIRECT == NEXT_AND_INDIRECT
                {
                    return Err(RingError::Indirect);
                }
                let len_bytes = descriptor.len();
                size = len_bytes / DESCRIPTOR_BYTES;
                if len_bytes % DESCRIPTOR_BYTES != 0 || size == 0 || size > MAX_INDIRECT_DESCRIPTORS {
                    return Err(RingError::IndirectSize(len_bytes));
                }
                (at, index, left, is_indirect) = (descriptor.addr(), 0, size, true);
                continue;
            }
            self.push(descriptor);
            if !descriptor.has_next() {
                return Ok(());
            }
            index = u32::from(descriptor.next());
            if index >= size {
                return Err(RingError::Next(descriptor.next()));
            }
        }
    }

    fn push(&mut self, descriptor: Descriptor) {
        if descriptor.len() == 0 {
            return;
        }
        let range = GuestRange { start: descriptor.addr(), len_bytes: descriptor.len() };
        if descriptor.is_write_only() {
            self.writable.push(range);
        } else {
            self.out_of_order |= !self.writable.is_empty();
            self.readable.push(range);
        }
    }
}

fn read_descriptor(ram: &GuestRam, table: GuestAddress, index: u32) -> Result<Descriptor, RingError> {
    let outside = || RingError::TableOutside(table.raw_value());
    let at = table.checked_add(u64::from(index) * u64::from(DESCRIPTOR_BYTES)).ok_or_else(outside)?;
    ram.read_obj(at).map_err(|_| outside())
}

/// Bytes of all `ranges`.
#[must_use]
pub fn total_bytes(ranges: &[GuestRange]) -> u64 {
    ranges.iter().map(|range| u64::from(range.len_bytes)).sum() // at most 32768 of less than 2^32
}

/// Takes the last byte off `ranges` and says where it is.
pub(super) fn take_last_byte(ranges: &mut Vec<GuestRange>) -> Option<GuestAddress> {
    let last = ranges.last_mut()?;
    let at = last.start.checked_add(u64::from(last.len_bytes) - 1)?;
    last.len_bytes -= 1;
    if last.len_bytes == 0 {
        ranges.pop();
    }
    Some(at)
}

/// Why bytes could not be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TakeError {
    /// There are fewer.
    TooShort,
    /// They are outside the guest's memory.
    Outside,
}

/// Takes the first bytes off `ranges`, which may be cut anywhere (2.7.4), into `bytes`.
pub(super) fn take_front(
    ram: &GuestRam,
    ranges: &mut Vec<GuestRange>,
    mut bytes: &mut [u8],
) -> Result<(), TakeError> {
    let mut taken = 0;
    while !bytes.is_empty() {
        let Some(range) = ranges.get_mut(taken) else { return Err(TakeError::TooShort) };
        let here = bytes.len().min(usize::try_from(range.len_bytes).expect("u32 fits usize"));
        let (now, rest) = bytes.split_at_mut(here);
        ram.read_slice(now, range.start).map_err(|_| TakeError::Outside)?;
        bytes = rest;
        let here = u32::try_from(here).expect("at most a u32");
        if here == range.len_bytes {
            taken += 1;
        } else {
            range.start = range.start.unchecked_add(u64::from(here)); // what was read before did not wrap
            range.len_bytes -= here;
        }
    }
    ranges.drain(..taken);
    Ok(())
}

/// Appends the runs of host memory behind `ranges`, in order. False, with `runs` in any state, when a byte of them
/// is outside the guest's memory.
#[must_use]
pub(super) fn resolve(ram: &GuestRam, ranges: &[GuestRange], runs: &mut Vec<iovec>) -> bool {
    ranges.iter().all(|range| {
        let mut at = range.start;
        let mut left = u64::from(range.len_bytes);
        while left > 0 {
            let Some((region, within)) = ram.to_region_addr(at) else { return false };
            let here = left.min(region.len() - within.raw_value());
            let Ok(host) = region.get_host_address(within) else { return false };
            let len = usize::try_from(here).expect("at most a u32");
            runs.push(iovec { iov_base: host.cast(), iov_len: len });
            left -= here;
            match at.checked_add(here) {
                Some(next) => at = next,
                None => return left == 0,
            }
        }
        true
    })
}
