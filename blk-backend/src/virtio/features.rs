//! Feature bits (virtio 1.2, sections 5.2.3 and 6).

use std::fmt;

/// A set of feature bits.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// `size_max` is valid.
    pub const SIZE_MAX: Self = Self(1 << 1);
    /// `seg_max` is valid.
    pub const SEG_MAX: Self = Self(1 << 2);
    /// The disk is read-only.
    pub const RO: Self = Self(1 << 5);
    /// `blk_size` is valid.
    pub const BLK_SIZE: Self = Self(1 << 6);
    /// The flush command.
    pub const FLUSH: Self = Self(1 << 9);
    /// `topology` is valid.
    pub const TOPOLOGY: Self = Self(1 << 10);
    /// `writeback` may be read and written.
    pub const CONFIG_WCE: Self = Self(1 << 11);
    /// More than one queue.
    pub const MQ: Self = Self(1 << 12);
    /// The discard command.
    pub const DISCARD: Self = Self(1 << 13);
    /// The write-zeroes command.
    pub const WRITE_ZEROES: Self = Self(1 << 14);
    /// Indirect descriptors (2.7.5.3).
    pub const INDIRECT_DESC: Self = Self(1 << 28);
    /// `used_event` and `avail_event` (2.7.7, 2.7.10).
    pub const EVENT_IDX: Self = Self(1 << 29);
    /// Not a legacy device (6.1).
    pub const VERSION_1: Self = Self(1 << 32);
    /// One queue can be reset (2.6.1).
    pub const RING_RESET: Self = Self(1 << 40);

    /// What a block device here always offers. [`RO`](Self::RO) and [`MQ`](Self::MQ) come from what it stands on.
    pub const BLOCK_DEVICE: Self = Self(
        Self::SIZE_MAX.0
            | Self::SEG_MAX.0
            | Self::BLK_SIZE.0
            | Self::FLUSH.0
            | Self::TOPOLOGY.0
            | Self::CONFIG_WCE.0
            | Self::DISCARD.0
            | Self::WRITE_ZEROES.0
            | Self::INDIRECT_DESC.0
            | Self::EVENT_IDX.0
            | Self::VERSION_1.0
            | Self::RING_RESET.0,
    );

    /// Whether all of `other` is in it.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is in it and not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({:#x})", self.0)
    }
}

impl fmt::LowerHex for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}
