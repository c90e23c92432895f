//! The configuration space (virtio 1.2, section 5.2.4).

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    little_endian::{U16, U32, U64},
};

/// Bytes of a sector, whatever the block size is: the unit of the protocol.
pub const SECTOR_BYTES: u64 = 512;

/// Most data segments of a request. Two less than the 128 descriptors of the queues that QEMU and cloud-hypervisor
/// set up: a request must not be longer than its queue, indirect or not (2.7.5.3.1).
pub const MAX_SEGMENTS: u32 = 126;

/// Longest data segment. Drivers take a request to hold `MAX_SEGMENTS` of them, and SeaBIOS counts its blocks in 16
/// bits: with more than 65535 it asks for none at all, for ever.
pub const MAX_SEGMENT_BYTES: u32 = 256 << 10;
const _: () = assert!(MAX_SEGMENTS as u64 * MAX_SEGMENT_BYTES as u64 / SECTOR_BYTES <= u16::MAX as u64);

/// Longest range of a discard or write-zeroes command. Such a command may keep a worker busy for as long as its
/// range has clusters: 1 GiB is 16384 clusters of the usual size.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// Most ranges of a discard or write-zeroes command: what fits a page of the driver.
pub const MAX_RANGES: u32 = 256;

/// "Device configuration layout" (5.2.4), without what belongs to features that are not offered (secure erase,
/// zones).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct RawConfig {
    pub(crate) capacity_sectors: U64,
    pub(crate) size_max_bytes: U32,
    pub(crate) seg_max: U32,
    pub(crate) geometry_cylinders: U16,
    pub(crate) geometry_heads: u8,
    pub(crate) geometry_sectors: u8,
    pub(crate) blk_size_bytes: U32,
    pub(crate) physical_block_exp: u8,
    pub(crate) alignment_offset_blocks: u8,
    pub(crate) min_io_size_blocks: U16,
    pub(crate) opt_io_size_blocks: U32,
    pub(crate) writeback: u8,
    pub(crate) unused0: u8,
    pub(crate) num_queues: U16,
    pub(crate) max_discard_sectors: U32,
    pub(crate) max_discard_seg: U32,
    pub(crate) discard_alignment_sectors: U32,
    pub(crate) max_write_zeroes_sectors: U32,
    pub(crate) max_write_zeroes_seg: U32,
    pub(crate) write_zeroes_may_unmap: u8,
    pub(crate) unused1: [u8; 3],
}
const _: () = assert!(size_of::<RawConfig>() == CONFIG_BYTES);

/// Bytes of the configuration space.
pub const CONFIG_BYTES: usize = 60;

/// Where `writeback` is: the one field that a driver may write.
pub const WRITEBACK_AT_BYTES: usize = std::mem::offset_of!(RawConfig, writeback);

/// What the configuration says of a disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct ConfigValues {
    pub(super) size_bytes: u64,
    pub(super) block_bytes: u32,
    /// Power of two, at least `block_bytes`: smaller discards are worth nothing.
    pub(super) discard_bytes: u64,
    pub(super) queues: u16,
    pub(super) writeback: bool,
}

impl ConfigValues {
    pub(super) fn encode(&self) -> RawConfig {
        let alignment_sectors = u32::try_from(self.discard_bytes / SECTOR_BYTES).unwrap_or(1).max(1);
        RawConfig {
            capacity_sectors: (self.size_bytes / SECTOR_BYTES).into(),
            size_max_bytes: MAX_SEGMENT_BYTES.into(),
            seg_max: MAX_SEGMENTS.into(),
            geometry_cylinders: U16::ZERO,
            geometry_heads: 0,
            geometry_sectors: 0,
            blk_size_bytes: self.block_bytes.into(),
            physical_block_exp: 0,
            alignment_offset_blocks: 0,
            min_io_size_blocks: U16::new(1),
            opt_io_size_blocks: U32::new(1),
            writeback: u8::from(self.writeback),
            unused0: 0,
            num_queues: self.queues.into(),
            max_discard_sectors: MAX_RANGE_SECTORS.into(),
            max_discard_seg: MAX_RANGES.into(),
            discard_alignment_sectors: alignment_sectors.into(),
            max_write_zeroes_sectors: MAX_RANGE_SECTORS.into(),
            max_write_zeroes_seg: MAX_RANGES.into(),
            write_zeroes_may_unmap: 1,
            unused1: [0; 3],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The offsets of section 5.2.4, as the Linux header has them.
    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let values = ConfigValues {
            size_bytes: 3 << 30,
            block_bytes: 4096,
            discard_bytes: 65536,
            queues: 4,
            writeback: true,
        };
        let raw = values.encode();
        let bytes = raw.as_bytes();
        assert_eq!(bytes[0..8], ((3u64 << 30) / 512).to_le_bytes());
        assert_eq!(bytes[12..16], 126u32.to_le_bytes());
        assert_eq!(bytes[20..24], 4096u32.to_le_bytes());
        assert_eq!(bytes[32], 1);
        assert_eq!(WRITEBACK_AT_BYTES, 32);
        assert_eq!(bytes[34..36], 4u16.to_le_bytes());
        assert_eq!(bytes[36..40], MAX_RANGE_SECTORS.to_le_bytes());
        assert_eq!(bytes[44..48], 128u32.to_le_bytes());
        assert_eq!(bytes[52..56], MAX_RANGES.to_le_bytes());
        assert_eq!(bytes[56], 1);
    }
}
