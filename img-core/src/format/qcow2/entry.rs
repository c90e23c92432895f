//! Table entries: what 8 (or 16) bytes of an L1 or L2 table say.
//!
//! Raw words are parsed into [`L1Entry`] and [`L2Entry`] here and nowhere else; the spec sections are
//! "L1 table entry", "L2 table entry", "Standard Cluster Descriptor", "Compressed Clusters Descriptor" and
//! "Extended L2 Entries".

use super::geometry::Geometry;

/// Bit 63 of L1 and L2 entries: the reference count of what it points to is exactly one.
pub(super) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: a compressed cluster.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry in version 3: reads as zeroes.
pub(super) const ZERO: u64 = 1;
/// Bits 9 to 55: a host offset in L1 and standard L2 entries.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an L1 entry that must be zero.
pub(super) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of a standard L2 entry that must be zero.
pub(super) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits of a refcount table entry that must be zero.
pub(super) const REFCOUNT_TABLE_RESERVED: u64 = 0x1ff;
/// Sectors in which the stored length of a compressed cluster is counted.
pub(super) const COMPRESSED_SECTOR_BYTES: u64 = 512;

/// A parsed L1 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct L1Entry(pub(super) u64);

impl L1Entry {
    /// Host offset of the L2 table, or `None` when there is none.
    pub(super) fn table(self) -> Option<u64> {
        let offset = self.0 & OFFSET_MASK;
        (offset != 0).then_some(offset)
    }

    /// Whether the table's reference count is said to be one.
    pub(super) fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Bits that must be zero and are not.
    pub(super) fn reserved(self) -> u64 {
        self.0 & L1_RESERVED
    }
}

/// An L2 entry as it stands in the table: the descriptor word, and the subcluster bitmap (0 without
/// extended entries; bits 0 to 31 "allocated", 32 to 63 "reads as zeroes").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct L2Entry {
    pub(super) word: u64,
    pub(super) bitmap: u64,
}

/// What an L2 entry means for a whole cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// Nothing here: the backing file shows through.
    Unallocated,
    /// Reads as zeroes; `reserved` is the preallocated host cluster behind it.
    Zero { reserved: Option<u64> },
    /// Bytes at this host offset.
    Standard { at: u64 },
    /// `stored_bytes` from `at` on, to the end of their last sector.
    Compressed { at: u64, stored_bytes: u32 },
    /// Extended entry: per subcluster. `at` is absent when nothing is allocated behind it.
    Subclusters { at: Option<u64>, allocated: u32, zero: u32 },
}

impl L2Entry {
    /// Decodes the entry. Offsets are *not* checked against anything here but masked to their bits.
    ///
    /// In version 2 the zero bit is reserved: readers refuse such an entry, the audit takes it for its cluster.
    /// With an external data file offset 0 is a valid place, told from "unallocated" by the copied flag.
    pub(super) fn cluster(self, geometry: Geometry) -> Cluster {
        if self.word & COMPRESSED != 0 {
            return self.compressed(geometry);
        }
        let offset = self.word & OFFSET_MASK;
        let placed = offset != 0 || (geometry.external_data && self.word & COPIED != 0);
        let at = placed.then_some(offset);
        if geometry.extended_l2 {
            #[expect(clippy::cast_possible_truncation, reason = "the two halves of the bitmap")]
            let (allocated, zero) = (self.bitmap as u32, (self.bitmap >> 32) as u32);
            return match (at, allocated, zero) {
                (None, 0, 0) => Cluster::Unallocated,
                (_, 0, u32::MAX) => Cluster::Zero { reserved: at },
                (Some(at), u32::MAX, 0) => Cluster::Standard { at },
                _ => Cluster::Subclusters { at, allocated, zero },
            };
        }
        if geometry.version >= 3 && self.word & ZERO != 0 {
            return Cluster::Zero { reserved: at };
        }
        at.map_or(Cluster::Unallocated, |at| Cluster::Standard { at })
    }

    fn compressed(self, geometry: Geometry) -> Cluster {
        let offset_bits = geometry.compressed_offset_bits();
        let at = self.word & ((1 << offset_bits) - 1);
        // Additional sectors: 62 - offset_bits = cluster_bits - 8 bits, so at most 13 bits.
        let sectors = ((self.word & (COMPRESSED - 1)) >> offset_bits) + 1;
        let stored = sectors * COMPRESSED_SECTOR_BYTES - (at % COMPRESSED_SECTOR_BYTES);
        Cluster::Compressed { at, stored_bytes: u32::try_from(stored).expect("at most 2^13 sectors of 2^9") }
    }

    /// The entry of a standard cluster.
    pub(super) fn standard(at: u64, copied: bool, geometry: Geometry) -> Self {
        debug_assert_eq!(at & !OFFSET_MASK, 0);
        let bitmap = if geometry.extended_l2 { u64::from(u32::MAX) } else { 0 };
        Self { word: at | if copied { COPIED } else { 0 }, bitmap }
    }

    /// The word of a compressed cluster whose `stored_bytes` begin at host offset `at`.
    pub(super) fn for_compressed(at: u64, stored_bytes: u32, geometry: Geometry) -> Self {
        let first = at / COMPRESSED_SECTOR_BYTES;
        let last = (at + u64::from(stored_bytes) - 1) / COMPRESSED_SECTOR_BYTES;
        let word = COMPRESSED | ((last - first) << geometry.compressed_offset_bits()) | at;
        Self { word, bitmap: 0 }
    }

    /// Reads entry `index` of a table slice.
    pub(super) fn read(table: &[u8], index: usize, geometry: Geometry) -> Self {
        let word = |at: usize| u64::from_be_bytes(table[at..at + 8].try_into().expect("eight bytes"));
        if geometry.extended_l2 {
            Self { word: word(index * 16), bitmap: word(index * 16 + 8) }
        } else {
            Self { word: word(index * 8), bitmap: 0 }
        }
    }

    /// Writes entry `index` of a table slice.
    pub(super) fn write(self, table: &mut [u8], index: usize, geometry: Geometry) {
        if geometry.extended_l2 {
            table[index * 16..index * 16 + 8].copy_from_slice(&self.word.to_be_bytes());
            table[index * 16 + 8..index * 16 + 16].copy_from_slice(&self.bitmap.to_be_bytes());
        } else {
            table[index * 8..index * 8 + 8].copy_from_slice(&self.word.to_be_bytes());
        }
    }

    /// Whether the cluster's reference count is said to be one.
    pub(super) fn is_copied(self) -> bool {
        self.word & COPIED != 0
    }
}

/// How many entries from the first on say the same, each a cluster further: at least 1. The table has entries
/// of 8 bytes, and the first is no compressed cluster.
pub(super) fn like_the_first(entries: &[[u8; 8]], geometry: Geometry) -> usize {
    /// Entries compared without a branch between them.
    const CHUNK: usize = 16;
    let first = u64::from_be_bytes(entries[0]);
    let placed = first & OFFSET_MASK != 0 || (geometry.external_data && first & COPIED != 0);
    let (step, most) = if placed {
        // A sum that leaves the bits of the offset is not the next cluster.
        let step = geometry.cluster_bytes();
        (step, (OFFSET_MASK - (first & OFFSET_MASK)) / step + 1)
    } else {
        (0, u64::MAX)
    };
    let entries = &entries[..entries.len().min(usize::try_from(most).unwrap_or(usize::MAX))];
    let differs = |entry: &[u8; 8], index: usize| u64::from_be_bytes(*entry) ^ (first + index as u64 * step);
    if entries.get(1).is_none_or(|entry| differs(entry, 1) != 0) {
        return 1;
    }
    let chunks = entries[1..].as_chunks::<CHUNK>().0.iter().zip((1..).step_by(CHUNK));
    let alike = chunks.take_while(|(chunk, at)| {
        chunk.iter().zip(*at..).fold(0, |bits, (entry, index)| bits | differs(entry, index)) == 0
    });
    let run = 1 + alike.count() * CHUNK;
    let rest = entries[run..].iter().zip(run..);
    run + rest.take_while(|(entry, index)| differs(entry, *index) == 0).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A run ends where a comparison one by one ends it.
        #[test]
        fn runs_of_entries(
            first in prop_oneof![
                Just(0), Just(ZERO), Just(COPIED), Just(COPIED | 0x50000), Just(0x50000 | ZERO),
                Just(OFFSET_MASK & !0xffff), Just((OFFSET_MASK & !0xffff) - 0x10_0000),
            ],
            length in 1_usize..100,
            broken in proptest::option::of((1_usize..100, 0_u32..64)),
            external_data: bool,
        ) {
            let geometry =
                Geometry { version: 3, cluster_bits: 16, refcount_order: 4, extended_l2: false, external_data };
            let placed = first & OFFSET_MASK != 0 || (external_data && first & COPIED != 0);
            let step = if placed { 0x10000 } else { 0 };
            let mut entries: Vec<[u8; 8]> =
                (0..length as u64).map(|index| (first.wrapping_add(index * step)).to_be_bytes()).collect();
            if let Some((index, bit)) = broken && index < length {
                entries[index] = (u64::from_be_bytes(entries[index]) ^ (1 << bit)).to_be_bytes();
            }
            let expected = (1..length).take_while(|&index| {
                let word = first.wrapping_add(index as u64 * step);
                u64::from_be_bytes(entries[index]) == word && (word ^ first) & !OFFSET_MASK == 0
            });
            prop_assert_eq!(like_the_first(&entries, geometry), expected.count() + 1);
        }
    }
}
