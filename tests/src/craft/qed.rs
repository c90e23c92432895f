//! QED images made byte by byte ([`Crafted`] again; all numbers are little-endian here).

use super::{CLUSTER, Crafted, DISK, FILL};

/// Offsets of header fields ("Header", QEMU docs/interop/qed_spec.rst).
pub mod header {
    /// u32, bytes.
    pub const CLUSTER_SIZE: usize = 4;
    /// u32, clusters.
    pub const TABLE_SIZE: usize = 8;
    /// u32, clusters.
    pub const HEADER_SIZE: usize = 12;
    /// u64.
    pub const FEATURES: usize = 16;
    /// u64.
    pub const COMPAT_FEATURES: usize = 24;
    /// u64.
    pub const AUTOCLEAR_FEATURES: usize = 32;
    /// u64.
    pub const L1_OFFSET: usize = 40;
    /// u64.
    pub const IMAGE_SIZE: usize = 48;
    /// u32.
    pub const BACKING_OFFSET: usize = 56;
    /// u32.
    pub const BACKING_SIZE: usize = 60;
}

/// The L1 table of a new crafted image: two clusters, as every table in it.
pub const L1: usize = CLUSTER;
/// The one L2 table.
pub const L2: usize = 3 * CLUSTER;
/// The data of guest cluster 0, all bytes [`FILL`].
pub const DATA: usize = 5 * CLUSTER;
/// The whole file.
pub const END: usize = 6 * CLUSTER;

impl Crafted {
    /// A clean QED image: guest cluster 0 is data, cluster 1 is zero, the rest unallocated.
    #[must_use]
    pub fn new_qed() -> Self {
        let mut image = Self { bytes: vec![0; END] }
            .put(0, b"QED\0")
            .le32(header::CLUSTER_SIZE, CLUSTER as u64)
            .le32(header::TABLE_SIZE, 2)
            .le32(header::HEADER_SIZE, 1)
            .le64(header::L1_OFFSET, L1 as u64)
            .le64(header::IMAGE_SIZE, DISK as u64)
            .le64(L1, L2 as u64)
            .le64(L2, DATA as u64)
            .le64(L2 + 8, 1);
        image.bytes[DATA..].fill(FILL);
        image
    }

    /// Puts the low half of a number, little-endian, at a byte offset.
    #[must_use]
    pub fn le32(self, at: usize, value: u64) -> Self {
        self.put(at, &value.to_le_bytes()[..4])
    }

    /// As [`Self::le32`], the whole number.
    #[must_use]
    pub fn le64(self, at: usize, value: u64) -> Self {
        self.put(at, &value.to_le_bytes())
    }
}
