//! The rules of one L2 table: each entry is looked at by itself.
//!
//! Spec: "L2 table entry", "Standard Cluster Descriptor", "Compressed Clusters Descriptor", "Extended L2
//! Entries". Entries are read as the reference's audit reads them, which is not how the guest's reads do:
//! the zero bit counts in version 2 as well, and an extended entry is placed or not whatever its bitmap
//! says.

use super::{
    super::{
        entry::{COMPRESSED, COPIED, L2_RESERVED, L2Entry, OFFSET_MASK, ZERO},
        geometry::Geometry,
    },
    counters::index,
    fault::Fault,
};

/// Allocated subclusters of a bitmap.
const BITMAP_ALLOCATED: u64 = 0xffff_ffff;

/// What the rules need to know of the image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) geometry: Geometry,
    /// Length of the image file.
    pub(super) file_bytes: u64,
    /// Misplaced preallocated clusters are about to be repaired: they are not referenced.
    pub(super) repair_reserved: bool,
}

/// How an entry refers to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Unallocated,
    ZeroPlain,
    ZeroReserved,
    Normal,
    Compressed,
}

/// The kind of an entry, from its descriptor word alone.
pub(super) fn kind(word: u64, geometry: Geometry) -> Kind {
    let placed = word & OFFSET_MASK != 0;
    if word & COMPRESSED != 0 {
        Kind::Compressed
    } else if word & ZERO != 0 && !geometry.extended_l2 {
        if placed { Kind::ZeroReserved } else { Kind::ZeroPlain }
    } else if placed || (geometry.external_data && word & COPIED != 0) {
        Kind::Normal
    } else {
        Kind::Unallocated
    }
}

/// Takes what a table says, in the order of its entries.
pub(super) trait Visitor {
    /// Host bytes are referenced.
    fn refer(&mut self, offset: u64, bytes: u64);
    /// Something is wrong.
    fn fault(&mut self, fault: Fault);
    /// Something is wrong with entry `index` that is repaired by making it a plain zero cluster.
    fn reserved_unaligned(&mut self, index: usize, offset: u64);
    /// A compressed cluster of the virtual disk.
    fn compressed(&mut self) {}
    /// A cluster of the virtual disk that stands at `offset`.
    fn placed(&mut self, offset: u64) {
        let _: u64 = offset;
    }
}

/// Audits entry `number` of a table.
pub(super) fn visit_entry(rules: Rules, number: usize, entry: L2Entry, visitor: &mut impl Visitor) {
    let geometry = rules.geometry;
    let L2Entry { mut word, bitmap } = entry;
    let kind = kind(word, geometry);
    if kind != Kind::Compressed && word & L2_RESERVED != 0 {
        visitor.fault(Fault::L2Reserved { word });
    }
    match kind {
        Kind::Compressed => {
            let offset_mask = (1 << geometry.compressed_offset_bits()) - 1;
            if word & COPIED != 0 {
                visitor.fault(Fault::CompressedCopied { offset: word & offset_mask });
                word &= !COPIED;
            }
            if geometry.external_data {
                visitor.fault(Fault::CompressedExternal { index: number, word });
                return;
            }
            if bitmap != 0 {
                visitor.fault(Fault::CompressedSubclusters { index: number, word });
                return;
            }
            let (offset, bytes) = compressed_place(word, geometry);
            visitor.refer(offset, bytes);
            visitor.compressed();
        }
        Kind::ZeroReserved | Kind::Normal => {
            let offset = word & OFFSET_MASK;
            if (bitmap >> 32) & bitmap != 0 {
                visitor.fault(Fault::SubclusterConflict { offset });
            }
            if geometry.in_cluster(offset) != 0 {
                let has_data =
                    if geometry.extended_l2 { bitmap & BITMAP_ALLOCATED != 0 } else { kind == Kind::Normal };
                if has_data {
                    visitor.fault(Fault::DataUnaligned { offset });
                } else {
                    visitor.reserved_unaligned(number, offset);
                    if rules.repair_reserved {
                        return;
                    }
                }
            }
            visitor.placed(offset);
            if !geometry.external_data {
                visitor.refer(offset, geometry.cluster_bytes());
            }
        }
        Kind::ZeroPlain => {}
        Kind::Unallocated => {
            if bitmap & BITMAP_ALLOCATED != 0 {
                visitor.fault(Fault::UnallocatedSubclusters);
            }
        }
    }
}

/// Offset and length of what a compressed cluster takes.
pub(super) fn compressed_place(word: u64, geometry: Geometry) -> (u64, u64) {
    let offset = word & ((1 << geometry.compressed_offset_bits()) - 1);
    let sectors = ((word & (COMPRESSED - 1)) >> geometry.compressed_offset_bits()) + 1;
    (offset, sectors * 512 - offset % 512)
}

/// Audits a whole table.
pub(super) fn visit_table(rules: Rules, table: &[u8], visitor: &mut impl Visitor) {
    for number in 0..index(rules.geometry.l2_entries()) {
        let entry = L2Entry::read(table, number, rules.geometry);
        if entry != L2Entry::default() {
            visit_entry(rules, number, entry, visitor);
        }
    }
}

/// What a misplaced preallocated cluster becomes: it reads as zeroes, and has no place.
pub(super) fn without_place(entry: L2Entry, geometry: Geometry) -> L2Entry {
    if geometry.extended_l2 {
        // Allocated subclusters (there are none here) and zero ones alike read as zeroes.
        let zeroes = (entry.bitmap | (entry.bitmap << 32)) & !BITMAP_ALLOCATED;
        L2Entry { word: 0, bitmap: zeroes }
    } else {
        L2Entry { word: ZERO, bitmap: 0 }
    }
}

/// The clusters that a region touches, as the reference counts them: a region may end less than a cluster
/// behind the end of the file, because the last cluster of a file may be cut short. `None` is too far.
pub(super) fn region(rules: Rules, offset: u64, bytes: u64) -> Option<std::ops::Range<u64>> {
    if bytes == 0 {
        return Some(0..0);
    }
    let end = offset.checked_add(bytes)?;
    // Sums of two numbers below 2^63 cannot overflow.
    let limit = rules.file_bytes.checked_add(rules.geometry.cluster_bytes())?;
    if end >= limit || end > i64::MAX.unsigned_abs() {
        return None;
    }
    Some(offset >> rules.geometry.cluster_bits..((end - 1) >> rules.geometry.cluster_bits) + 1)
}
