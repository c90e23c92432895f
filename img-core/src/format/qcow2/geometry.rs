//! Shapes that follow from a checked header: sizes of clusters, tables and reference counts.

use std::ops::Range;

/// Sizes of an image, all checked. Everything past the header works with these instead of raw numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// 2 or 3.
    pub(super) version: u32,
    /// log2 of the cluster size: 9 to 21.
    pub(super) cluster_bits: u32,
    /// log2 of the width of a reference count in bits: 0 to 6. Version 2: 4.
    pub(super) refcount_order: u32,
    /// 16-byte L2 entries with 32 subclusters each.
    pub(super) extended_l2: bool,
    /// Guest data stands in another file; its clusters have no reference counts.
    pub(super) external_data: bool,
}

impl Geometry {
    /// Bytes in a cluster.
    pub(super) fn cluster_bytes(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes in an L2 entry.
    pub(super) fn l2_entry_bytes(self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// log2 of the entries in an L2 table.
    pub(super) fn l2_bits(self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// Entries in an L2 table, which fills one cluster.
    pub(super) fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// Guest bytes that one L2 table covers. At most 2^(21 + 18).
    pub(super) fn l2_span_bytes(self) -> u64 {
        self.cluster_bytes() << self.l2_bits()
    }

    /// Bytes of a subcluster; of a cluster without extended L2 entries.
    pub(super) fn subcluster_bytes(self) -> u64 {
        if self.extended_l2 { self.cluster_bytes() / 32 } else { self.cluster_bytes() }
    }

    /// Reference counts in one refcount block, which fills one cluster.
    pub(super) fn refcounts_per_block(self) -> u64 {
        (self.cluster_bytes() * 8) >> self.refcount_order
    }

    /// The largest reference count that can be stored.
    pub(super) fn refcount_max(self) -> u64 {
        if self.refcount_order == 6 { u64::MAX } else { (1 << (1 << self.refcount_order)) - 1 }
    }

    /// Clusters needed for `bytes`.
    pub(super) fn clusters_for(self, bytes: u64) -> u64 {
        (bytes >> self.cluster_bits) + u64::from(self.in_cluster(bytes) > 0)
    }

    /// L1 entries needed for a disk of `virtual_size_bytes`.
    pub(super) fn l1_entries_for(self, virtual_size_bytes: u64) -> u64 {
        virtual_size_bytes.div_ceil(self.l2_span_bytes())
    }

    /// `offset` rounded down to a cluster.
    pub(super) fn cluster_start(self, offset: u64) -> u64 {
        offset & !(self.cluster_bytes() - 1)
    }

    /// Where `offset` stands inside its cluster.
    pub(super) fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_bytes() - 1)
    }

    /// Index into L1 of a guest offset.
    pub(super) fn l1_index(self, guest_offset: u64) -> u64 {
        guest_offset >> (self.cluster_bits + self.l2_bits())
    }

    /// Index into its L2 table of a guest offset.
    pub(super) fn l2_index(self, guest_offset: u64) -> u64 {
        (guest_offset >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// Bits of a compressed descriptor that hold the host offset; the sector count stands above them
    /// ("Compressed Clusters Descriptor").
    pub(super) fn compressed_offset_bits(self) -> u32 {
        62 - (self.cluster_bits - 8)
    }
}

/// Reads the `index`-th reference count of a refcount block ("Refcount block entries": widths below a byte
/// are counted from the least significant bit).
pub(super) fn refcount_get(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let width = 1_usize << order;
            let per_byte = 8 / width;
            let byte = block[index / per_byte];
            let mask = u8::MAX >> (8 - width);
            u64::from((byte >> ((index % per_byte) * width)) & mask)
        }
        3 => u64::from(block[index]),
        4 => u64::from(u16::from_be_bytes(array(block, index))),
        5 => u64::from(u32::from_be_bytes(array(block, index))),
        _ => u64::from_be_bytes(array(block, index)),
    }
}

/// Writes the `index`-th reference count; `count` fits the width.
pub(super) fn refcount_set(block: &mut [u8], order: u32, index: usize, count: u64) {
    let fits = "the caller checked the count against the width";
    match order {
        0..=2 => {
            let width = 1_usize << order;
            let per_byte = 8 / width;
            let shift = (index % per_byte) * width;
            let mask = (u8::MAX >> (8 - width)) << shift;
            let count = u8::try_from(count).expect(fits) << shift;
            assert_eq!(count & !mask, 0, "{fits}");
            let byte = &mut block[index / per_byte];
            *byte = (*byte & !mask) | count;
        }
        3 => block[index] = u8::try_from(count).expect(fits),
        4 => block[entry(index, 2)].copy_from_slice(&u16::try_from(count).expect(fits).to_be_bytes()),
        5 => block[entry(index, 4)].copy_from_slice(&u32::try_from(count).expect(fits).to_be_bytes()),
        _ => block[entry(index, 8)].copy_from_slice(&count.to_be_bytes()),
    }
}

fn entry(index: usize, bytes: usize) -> Range<usize> {
    index * bytes..(index + 1) * bytes
}

fn array<const N: usize>(block: &[u8], index: usize) -> [u8; N] {
    block[entry(index, N)].try_into().expect("the slice has N bytes")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A count that is set is read back, and its neighbours stay as they were.
        #[test]
        fn refcounts_of_every_width(
            order in 0_u32..=6,
            sets in proptest::collection::vec((0_usize..64, any::<u64>()), 1..200),
        ) {
            let mut block = vec![0_u8; 512];
            let mut model = vec![0_u64; 64];
            let max = if order == 6 { u64::MAX } else { (1 << (1_u32 << order)) - 1 };
            for (index, count) in sets {
                let count = count & max;
                refcount_set(&mut block, order, index, count);
                model[index] = count;
                for (at, expected) in model.iter().enumerate() {
                    prop_assert_eq!(refcount_get(&block, order, at), *expected, "entry {}", at);
                }
            }
        }
    }
}
