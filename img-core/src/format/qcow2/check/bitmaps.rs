//! Persistent bitmaps: directory, tables and data are referenced (spec: "Bitmaps").

use super::{
    super::entry::OFFSET_MASK,
    Image,
    counters::index,
    walk::{Walker, for_each_word},
};
use crate::Result;

/// Fixed part of a directory entry.
const ENTRY_BYTES: usize = 24;
/// Entries of one bitmap table.
const MAX_TABLE_ENTRIES: u32 = 1 << 27;
/// Bytes of one bitmap.
const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// Entries of all bitmap tables together that are followed. Directory entries may name the same table
/// over and over.
const MAX_ENTRIES: u64 = 1 << 26;
/// Bits of a table entry that must be zero.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;

/// Meets what the bitmaps refer to. A directory or table that breaks the rules ends the audit, as it
/// does the reference's.
pub(super) fn walk(image: &Image<'_>, walker: &mut impl Walker) -> Result<()> {
    let Some(bitmaps) = image.header.bitmaps else { return Ok(()) };
    let subject = &image.subject;
    let invalid = || subject.failure(rustix::io::Errno::INVAL);
    walker.region(bitmaps.directory_offset, bitmaps.directory_bytes);
    // The header's rules bound the directory to 64 MiB.
    let mut directory = vec![0; index(bitmaps.directory_bytes)];
    subject.read(&mut directory, bitmaps.directory_offset)?;
    let tables = tables(image, &directory, bitmaps.count).ok_or_else(invalid)?;
    let mut budget = MAX_ENTRIES;
    for (offset, entries) in tables {
        walker.region(offset, u64::from(entries) * 8);
        budget =
            budget.checked_sub(u64::from(entries)).ok_or_else(|| subject.failure(rustix::io::Errno::FBIG))?;
        // The reference refuses a table as a whole before it counts any of its entries.
        for_each_word(image, offset, u64::from(entries), |_, word| {
            let place = word & OFFSET_MASK;
            let is_misplaced = place != 0 && (word & 1 != 0 || subject.geometry.in_cluster(place) != 0);
            if word & TABLE_RESERVED != 0 || is_misplaced { Err(invalid()) } else { Ok(()) }
        })?;
        for_each_word(image, offset, u64::from(entries), |_, word| {
            if word & OFFSET_MASK != 0 {
                walker.region(word & OFFSET_MASK, subject.geometry.cluster_bytes());
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Offset and entries of each bitmap's table; `None` when the directory breaks a rule.
fn tables(image: &Image<'_>, directory: &[u8], count: u32) -> Option<Vec<(u64, u32)>> {
    let geometry = image.subject.geometry;
    let mut tables = Vec::new();
    let mut at = 0;
    while at < directory.len() {
        let fixed: &[u8; ENTRY_BYTES] = directory.get(at..at + ENTRY_BYTES)?.try_into().ok()?;
        let be32 = |from: usize| u32::from_be_bytes(fixed[from..from + 4].try_into().expect("four bytes"));
        let offset = u64::from_be_bytes(fixed[..8].try_into().expect("eight bytes"));
        let (entries, flags, kind, granularity_bits) = (be32(8), be32(12), fixed[16], fixed[17]);
        let name_bytes = u16::from_be_bytes([fixed[18], fixed[19]]);
        let extra_bytes = be32(20);
        let bytes = u64::from(entries).checked_mul(geometry.cluster_bytes())?;
        let is_in_use = flags & 1 != 0;
        let is_right = offset != 0
            && geometry.in_cluster(offset) == 0
            && (1..=MAX_TABLE_ENTRIES).contains(&entries)
            && bytes <= MAX_BITMAP_BYTES
            && flags & !3 == 0
            && kind == 1
            && (9..=31).contains(&granularity_bits)
            && name_bytes <= 1023
            && extra_bytes == 0
            && (is_in_use
                || u128::from(image.header.virtual_size_bytes) <= u128::from(bytes * 8) << granularity_bits);
        if !is_right || tables.len() as u64 >= u64::from(count) {
            return None;
        }
        tables.push((offset, entries));
        at += (ENTRY_BYTES + usize::from(name_bytes)).next_multiple_of(8);
    }
    (at == directory.len() && tables.len() as u64 == u64::from(count)).then_some(tables)
}
