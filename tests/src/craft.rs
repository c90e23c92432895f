//! Images made byte by byte, so that each rule can be broken alone: qcow2 here, others in rooms of their own.
//!
//! [`Crafted::new`] is a valid image; tests then overwrite single fields. Nothing here uses the library.

pub mod qed;
pub mod vhd;

use std::{fs, path::Path};

/// Offsets of header fields ("Header", QEMU docs/interop/qcow2.rst).
pub mod header {
    /// u32.
    pub const MAGIC: usize = 0;
    /// u32: 2 or 3.
    pub const VERSION: usize = 4;
    /// u64.
    pub const BACKING_OFFSET: usize = 8;
    /// u32.
    pub const BACKING_SIZE: usize = 16;
    /// u32.
    pub const CLUSTER_BITS: usize = 20;
    /// u64.
    pub const SIZE: usize = 24;
    /// u32.
    pub const CRYPT_METHOD: usize = 32;
    /// u32, entries.
    pub const L1_SIZE: usize = 36;
    /// u64.
    pub const L1_OFFSET: usize = 40;
    /// u64.
    pub const REFCOUNT_TABLE_OFFSET: usize = 48;
    /// u32.
    pub const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    /// u32.
    pub const SNAPSHOT_COUNT: usize = 60;
    /// u64.
    pub const SNAPSHOTS_OFFSET: usize = 64;
    /// u64.
    pub const INCOMPATIBLE: usize = 72;
    /// u64.
    pub const COMPATIBLE: usize = 80;
    /// u64.
    pub const AUTOCLEAR: usize = 88;
    /// u32.
    pub const REFCOUNT_ORDER: usize = 96;
    /// u32.
    pub const HEADER_LENGTH: usize = 100;
    /// u8.
    pub const COMPRESSION_TYPE: usize = 104;
    /// First header extension.
    pub const EXTENSIONS: usize = 112;
}

/// Set in table entries whose target has a refcount of exactly one.
pub const COPIED: u64 = 1 << 63;
/// Set in L2 entries of compressed clusters.
pub const COMPRESSED: u64 = 1 << 62;

/// Bytes of a cluster of a new crafted image.
pub const CLUSTER: usize = 4096;
/// Guest bytes of a new crafted image: 16 clusters.
pub const DISK: usize = 16 * CLUSTER;
/// Where things stand in a new crafted image.
pub const REFCOUNT_TABLE: usize = CLUSTER;
/// The one refcount block.
pub const REFCOUNT_BLOCK: usize = 2 * CLUSTER;
/// The active L1 table.
pub const L1: usize = 3 * CLUSTER;
/// The one L2 table.
pub const L2: usize = 4 * CLUSTER;
/// The data of guest cluster 0, all bytes [`FILL`].
pub const DATA: usize = 5 * CLUSTER;
/// The byte in guest cluster 0.
pub const FILL: u8 = 0xa7;

/// An image as bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crafted {
    /// The whole file.
    pub bytes: Vec<u8>,
}

impl Default for Crafted {
    fn default() -> Self {
        Self::new()
    }
}

impl Crafted {
    /// A clean version 3 image with 16-bit refcounts: guest cluster 0 is data, the rest unallocated.
    #[must_use]
    pub fn new() -> Self {
        let mut image = Self { bytes: vec![0; 6 * CLUSTER] }
            .u32(header::MAGIC, u32::from_be_bytes(*b"QFI\xfb"))
            .u32(header::VERSION, 3)
            .u32(header::CLUSTER_BITS, CLUSTER.trailing_zeros())
            .u64(header::SIZE, DISK as u64)
            .u32(header::L1_SIZE, 1)
            .u64(header::L1_OFFSET, L1 as u64)
            .u64(header::REFCOUNT_TABLE_OFFSET, REFCOUNT_TABLE as u64)
            .u32(header::REFCOUNT_TABLE_CLUSTERS, 1)
            .u32(header::REFCOUNT_ORDER, 4)
            .u32(header::HEADER_LENGTH, 112)
            .u64(REFCOUNT_TABLE, REFCOUNT_BLOCK as u64)
            .u64(L1, COPIED | L2 as u64)
            .u64(L2, COPIED | DATA as u64);
        for cluster in 0..6 {
            image = image.refcount(cluster, 1);
        }
        image.bytes[DATA..].fill(FILL);
        image
    }

    /// Puts a big-endian number at a byte offset, growing the file where needed.
    #[must_use]
    pub fn u32(self, at: usize, value: u32) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    /// As [`Self::u32`].
    #[must_use]
    pub fn u64(self, at: usize, value: u64) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    /// Puts bytes at a byte offset, growing the file where needed.
    #[must_use]
    pub fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        let end = at + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end.next_multiple_of(CLUSTER), 0);
        }
        self.bytes[at..end].copy_from_slice(bytes);
        self
    }

    /// Sets the 16-bit refcount of a host cluster.
    #[must_use]
    pub fn refcount(self, cluster: usize, count: u16) -> Self {
        self.put(REFCOUNT_BLOCK + 2 * cluster, &count.to_be_bytes())
    }

    /// Adds a header extension as the first one.
    #[must_use]
    pub fn extension(self, kind: u32, len_bytes: u32, data: &[u8]) -> Self {
        self.u32(header::EXTENSIONS, kind)
            .u32(header::EXTENSIONS + 4, len_bytes)
            .put(header::EXTENSIONS + 8, data)
    }

    /// Names a backing file, with its format in an extension.
    #[must_use]
    pub fn backing(self, name: &[u8], format: &str) -> Self {
        let at = 1024;
        let len = u32::try_from(format.len()).expect("a short name");
        let name_len = u32::try_from(name.len()).expect("a short name");
        self.extension(0xe279_2aca, len, format.as_bytes())
            .put(at, name)
            .u64(header::BACKING_OFFSET, at as u64)
            .u32(header::BACKING_SIZE, name_len)
    }

    /// Adds a snapshot table of one entry at cluster 6 (refcounts included): its L1 is the active one's place.
    #[must_use]
    pub fn snapshot(self, extra_bytes: u32, id: &[u8], name: &[u8]) -> Self {
        let at = 6 * CLUSTER;
        let entry = snapshot_entry(L1 as u64, 1, extra_bytes, id, name);
        self.put(at, &entry)
            .u32(header::SNAPSHOT_COUNT, 1)
            .u64(header::SNAPSHOTS_OFFSET, at as u64)
            .refcount(6, 1)
    }

    /// Writes the file.
    ///
    /// # Panics
    /// When it cannot.
    pub fn save(&self, path: &Path) {
        fs::write(path, &self.bytes).expect("the temporary directory is writable");
    }
}

/// One entry of the snapshot table ("Snapshots"), whose lengths may lie.
#[must_use]
pub fn snapshot_entry(l1_offset: u64, l1_entries: u32, extra_bytes: u32, id: &[u8], name: &[u8]) -> Vec<u8> {
    let mut entry = Vec::new();
    entry.extend(l1_offset.to_be_bytes());
    entry.extend(l1_entries.to_be_bytes());
    entry.extend(u16::try_from(id.len()).expect("a short id").to_be_bytes());
    entry.extend(u16::try_from(name.len()).expect("a short name").to_be_bytes());
    entry.extend([0; 4 + 4 + 8 + 4]); // seconds, nanoseconds, guest clock, machine state
    entry.extend(extra_bytes.to_be_bytes());
    let extra = [0_u64.to_be_bytes(), (DISK as u64).to_be_bytes()].concat();
    entry.extend((0..extra_bytes.min(4096) as usize).map(|at| extra.get(at).copied().unwrap_or(0)));
    entry.extend(id);
    entry.extend(name);
    entry
}
