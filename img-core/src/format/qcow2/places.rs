//! Collecting the places of all structures of an image for the overlap checks.

use std::{
    ops::Range,
    sync::{PoisonError, atomic::Ordering},
};

use super::{
    entry::L1Entry,
    header::{Header, SNAPSHOT_HEADER_BYTES},
    layer::Qcow2Layer,
    overlap::{Kind, Places},
    refcount::usize_of,
};
use crate::Result;

/// Tables are scanned in pieces of this size.
const SCAN_BYTES: u64 = 1 << 20;

/// The fixed part of a snapshot table entry.
const FIXED_BYTES: usize = 40;
const _: () = assert!(FIXED_BYTES as u64 == SNAPSHOT_HEADER_BYTES);

impl Qcow2Layer {
    /// Collects the places of all structures, once, before the first change.
    pub(super) fn know_places(&self) -> Result<()> {
        if self.places_known.load(Ordering::Acquire) {
            return Ok(());
        }
        let geometry = self.geometry;
        let mut places = Places::new(geometry, self.runtime.overlap);
        let header = self.header().clone();
        let cluster = geometry.cluster_bytes();
        places.add(Kind::MainHeader, 0..cluster);
        let l1 = header.l1_offset..header.l1_offset + u64::from(header.l1_entries) * 8;
        self.scan_words(&l1, |_, word| {
            if let Some(table) = L1Entry(word).table() {
                places.add(Kind::ActiveL2, table..table + cluster);
            }
            Ok(())
        })?;
        places.add(Kind::ActiveL1, l1);
        let table = header.refcount_table_offset
            ..header.refcount_table_offset + u64::from(header.refcount_table_clusters) * cluster;
        self.scan_words(&table, |at, word| {
            if let Some(block) = self.checked_refcount_block(at, word)? {
                places.add(Kind::RefcountBlock, block..block + cluster);
            }
            Ok(())
        })?;
        places.add(Kind::RefcountTable, table);
        self.add_snapshots(&header, &mut places)?;
        if let Some(bitmaps) = &header.bitmaps {
            let directory =
                bitmaps.directory_offset..bitmaps.directory_offset.saturating_add(bitmaps.directory_bytes);
            places.add(Kind::BitmapDirectory, directory);
        }
        let mut known = self.places.write().unwrap_or_else(PoisonError::into_inner);
        if !self.places_known.load(Ordering::Acquire) {
            *known = places;
            self.places_known.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The snapshot table ("Snapshots"), the L1 tables it names, and if they are checked, the L2 tables
    /// that those name.
    fn add_snapshots(&self, header: &Header, places: &mut Places) -> Result<()> {
        let cluster = self.geometry.cluster_bytes();
        let start = header.snapshots_offset;
        let file_end = self.end_bytes.load(Ordering::Relaxed);
        let mut at = start;
        for _ in 0..header.snapshot_count {
            if at >= file_end {
                // Entries behind the end of the file read as zeroes and name nothing.
                break;
            }
            let mut entry = [0; FIXED_BYTES];
            self.image_file().read_at(&mut entry, at)?;
            let be32 = |at: usize| u32::from_be_bytes(entry[at..at + 4].try_into().expect("four bytes"));
            let be16 = |at: usize| u16::from_be_bytes(entry[at..at + 2].try_into().expect("two bytes"));
            let l1_offset = u64::from_be_bytes(entry[..8].try_into().expect("eight bytes"));
            // 40 + 2^32 + 2 * 2^16 bytes an entry: no overflow for 2^16 entries from a 56-bit offset on.
            let bytes =
                SNAPSHOT_HEADER_BYTES + u64::from(be32(36)) + u64::from(be16(12)) + u64::from(be16(14));
            at += bytes.next_multiple_of(8);
            let l1 = l1_offset..l1_offset.saturating_add(u64::from(be32(8)) * 8);
            if self.runtime.overlap.has(Kind::InactiveL2) {
                self.scan_words(&l1, |_, word| {
                    if let Some(table) = L1Entry(word).table() {
                        places.add(Kind::InactiveL2, table..table + cluster);
                    }
                    Ok(())
                })?;
            }
            if l1.start < l1.end {
                places.add(Kind::InactiveL1, l1);
            }
        }
        if at > start {
            places.add(Kind::SnapshotTable, start..at);
        }
        Ok(())
    }

    /// Calls `visit` with every nonzero word of a table on disk and its host offset. Nothing of the table
    /// waits to be written.
    pub(super) fn scan_words(
        &self,
        table: &Range<u64>,
        mut visit: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let end = table.end.min(self.end_bytes.load(Ordering::Relaxed));
        let mut at = table.start;
        let mut buffer = Vec::new();
        while at < end {
            buffer.resize(usize_of((end - at).min(SCAN_BYTES)), 0);
            self.image_file().read_at(&mut buffer, at)?;
            for (index, word) in buffer.as_chunks::<8>().0.iter().enumerate() {
                let word = u64::from_be_bytes(*word);
                if word != 0 {
                    visit(at + index as u64 * 8, word)?;
                }
            }
            at += buffer.len() as u64;
        }
        Ok(())
    }
}
