//! The sizes that follow from the header.

use std::ops::Range;

/// Sizes of an image, within the limits of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// log2 of the bytes in a cluster: 12 to 26.
    pub(super) cluster_bits: u32,
    /// log2 of the clusters in a table: 0 to 4.
    pub(super) table_bits: u32,
}

impl Geometry {
    /// Bytes in a cluster: 4 KiB to 64 MiB.
    pub(super) fn cluster_bytes(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Clusters in a table, L1 or L2.
    pub(super) fn table_clusters(self) -> u64 {
        1 << self.table_bits
    }

    /// Bytes in a table, L1 or L2: 4 KiB to 1 GiB.
    pub(super) fn table_bytes(self) -> u64 {
        self.cluster_bytes() << self.table_bits
    }

    /// Entries in a table: at most 2^27.
    pub(super) fn table_entries(self) -> u64 {
        self.table_bytes() / 8
    }

    /// Guest bytes that one L2 table covers: at most 2^53.
    pub(super) fn l2_span_bytes(self) -> u64 {
        self.table_entries() << self.cluster_bits
    }

    /// The largest disk that L1 can root: up to 2^80 bytes.
    pub(super) fn max_virtual_bytes(self) -> u128 {
        u128::from(self.l2_span_bytes()) * u128::from(self.table_entries())
    }

    /// `offset` rounded down to a cluster.
    pub(super) fn cluster_start(self, offset: u64) -> u64 {
        offset & !(self.cluster_bytes() - 1)
    }

    /// Where `offset` stands inside its cluster.
    pub(super) fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_bytes() - 1)
    }

    /// How many clusters a range that is not empty touches.
    pub(super) fn clusters_touched(self, guest: &Range<u64>) -> u64 {
        ((guest.end - 1) >> self.cluster_bits) - (guest.start >> self.cluster_bits) + 1
    }

    /// Index into L1 of a guest offset.
    pub(super) fn l1_index(self, guest: u64) -> u64 {
        guest / self.l2_span_bytes()
    }

    /// Index into its L2 table of a guest offset.
    pub(super) fn l2_index(self, guest: u64) -> u64 {
        (guest >> self.cluster_bits) & (self.table_entries() - 1)
    }

    /// The first guest offset behind what L2 table `l1_index` covers.
    pub(super) fn end_of_table(self, l1_index: u64) -> u64 {
        (l1_index + 1).saturating_mul(self.l2_span_bytes())
    }

    /// L1 entries that a disk of so many bytes uses.
    pub(super) fn l1_entries_for(self, virtual_size_bytes: u64) -> u64 {
        virtual_size_bytes.div_ceil(self.l2_span_bytes())
    }
}
