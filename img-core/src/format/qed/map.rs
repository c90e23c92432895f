//! The question where guest bytes live: L1, L2, extent ("Tables").
//!
//! A place that an entry named as data stays the guest cluster's own for good: nothing in this format frees a
//! cluster. So answers need no lease, and lookups take only the short locks of the caches.

use std::{ops::Range, sync::Arc};

use super::{
    geometry::Geometry,
    table::{Cluster, ENTRY_BYTES, PIECE_BYTES, entries, entry_at},
};
use crate::{
    Error, Result,
    format::{
        Extent, HostFile, HostOffset, MissingTable, Place,
        table_cache::SliceCache,
        two_levels::{Entries, TwoLevels},
    },
    storage::Storage,
    sync::atomic::{AtomicU64, Ordering},
};

/// A walk over at least this much of a table reads it in large pieces, past the cache.
const LONG_WALK_BYTES: u64 = 64 << 10;

/// The tables of an image.
#[derive(Debug)]
pub(super) struct TableMap {
    pub(super) file: Arc<dyn Storage>,
    pub(super) geometry: Geometry,
    /// Host offset of L1, which stands inside the file.
    pub(super) l1_offset: u64,
    /// Clusters stand here at the earliest: behind the header.
    pub(super) first_bytes: u64,
    /// And they end here at the latest: whole clusters of the file, or of what was allocated behind it.
    pub(super) end_bytes: AtomicU64,
    /// Whether data may be overwritten in place.
    pub(super) writable: bool,
    pub(super) l1: SliceCache,
    pub(super) l2: SliceCache,
}

impl TableMap {
    /// Where allocated clusters end.
    pub(super) fn end(&self) -> u64 {
        self.end_bytes.load(Ordering::Acquire)
    }

    /// Allocated clusters end at `end` or behind it.
    pub(super) fn reach(&self, end: u64) {
        self.end_bytes.fetch_max(end, Ordering::AcqRel);
    }

    /// An [`Error::Corrupt`] of this image.
    pub(super) fn corrupt(
        &self,
        structure: &'static str,
        at: u64,
        expected: impl std::fmt::Display,
        found: u64,
    ) -> Error {
        Error::corrupt(self.file.path(), structure, at, expected, format_args!("{found:#x}"))
    }

    /// Host offset of an entry of L1.
    pub(super) fn l1_entry_at(&self, l1_index: u64) -> u64 {
        self.l1_offset + l1_index * ENTRY_BYTES
    }

    /// Host offset of the L2 table of an L1 index, checked; `None` where there is none.
    pub(super) fn table(&self, l1_index: u64) -> Result<Option<u64>> {
        let (slice, within) = self.l1.get(&*self.file, self.l1_entry_at(l1_index))?;
        self.checked_table(l1_index, entry_at(&slice, within))
    }

    /// Host offset of the L2 table that an L1 entry names, checked; `None` where it names none.
    fn checked_table(&self, l1_index: u64, entry: u64) -> Result<Option<u64>> {
        if entry == 0 {
            return Ok(None);
        }
        self.check_place("L1 entry", self.l1_entry_at(l1_index), entry, self.geometry.table_clusters())?;
        Ok(Some(entry))
    }

    /// What is said of a guest offset in the table at `table`.
    pub(super) fn cluster(&self, table: u64, guest: u64) -> Result<Cluster> {
        let at = table + self.geometry.l2_index(guest) * ENTRY_BYTES;
        let (slice, within) = self.l2.get(&*self.file, at)?;
        let cluster = Cluster::from_entry(entry_at(&slice, within));
        self.checked(cluster, at)
    }

    /// `cluster`, whose entry stands at `at`, if it names a place where data can be.
    fn checked(&self, cluster: Cluster, at: u64) -> Result<Cluster> {
        if let Cluster::Data(host) = cluster {
            self.check_place("L2 entry", at, host, 1)?;
        }
        Ok(cluster)
    }

    /// Refuses a place that is not at a cluster, in the header, or not inside the file to its end.
    fn check_place(&self, structure: &'static str, at: u64, host: u64, clusters: u64) -> Result<()> {
        let len = clusters << self.geometry.cluster_bits; // at most 1 GiB
        let (first, end) = (self.first_bytes, self.end());
        let fits = host.checked_add(len).is_some_and(|host_end| host >= first && host_end <= end);
        if fits && self.geometry.in_cluster(host) == 0 {
            return Ok(());
        }
        let expected = format_args!(
            "0, or {len:#x} bytes at a multiple of the cluster size between {first:#x} and {end:#x}"
        );
        Err(self.corrupt(structure, at, expected, host))
    }

    /// Appends the extents of a guest range.
    pub(super) fn map_range(&self, guest: Range<u64>, extents: &mut Vec<Extent>) -> Result<()> {
        let geometry = self.geometry;
        let found = &mut |extent: Extent| extent.push_to(extents);
        let mut at = guest.start;
        while at < guest.end {
            let l1_index = geometry.l1_index(at);
            let Some(table) = self.table(l1_index)? else {
                let end = self.silent_until(l1_index, guest.end)?;
                found(Extent { len_bytes: end - at, place: Place::Unallocated });
                at = end;
                continue;
            };
            let end = geometry.end_of_table(l1_index).min(guest.end);
            let entries = geometry.clusters_touched(&(at..end));
            let mut walk = Walk { map: self, at, end, found };
            if entries * ENTRY_BYTES >= LONG_WALK_BYTES {
                walk.pieces(table)?;
            } else {
                walk.slices(table)?;
            }
            at = end;
        }
        Ok(())
    }

    /// [`Self::map_range`] from the caches alone; false where a table is not there.
    pub(super) fn map_cached(&self, guest: Range<u64>, found: &mut dyn FnMut(Extent)) -> Result<bool> {
        let mut walk = Walk { map: self, at: guest.start, end: guest.end, found };
        while walk.at < guest.end {
            let l1_index = self.geometry.l1_index(walk.at);
            walk.end = self.geometry.end_of_table(l1_index).min(guest.end);
            let Some(entry) = self.l1.look_at(self.l1_entry_at(l1_index), entry_at) else { return Ok(false) };
            let Some(table) = self.checked_table(l1_index, entry)? else {
                (walk.found)(Extent { len_bytes: walk.end - walk.at, place: Place::Unallocated });
                walk.at = walk.end;
                continue;
            };
            while walk.at < walk.end {
                let host = walk.entry_place(table);
                let entries = |bytes: &[u8], within: usize| walk.entries(&bytes[within..], host);
                let Some(result) = self.l2.look_at(host, entries) else { return Ok(false) };
                result?;
            }
        }
        Ok(true)
    }

    /// The first slice of a table that [`Self::map_cached`] lacks.
    pub(super) fn missing(&self, guest: Range<u64>) -> Result<Option<MissingTable>> {
        let geometry = self.geometry;
        self.levels().missing(guest, |guest| {
            let l1_index = geometry.l1_index(guest.start);
            let end = geometry.end_of_table(l1_index).min(guest.end);
            let in_l1 = self.l1_entry_at(l1_index);
            let Some(entry) = self.l1.look_at(in_l1, entry_at) else {
                return Ok((Entries::L1(in_l1..in_l1 + ENTRY_BYTES), end));
            };
            let table = self.checked_table(l1_index, entry)?;
            let entries = table.map_or(Entries::None, |table| {
                let in_table = |guest| table + geometry.l2_index(guest) * ENTRY_BYTES;
                Entries::L2(in_table(guest.start)..in_table(end - 1) + ENTRY_BYTES)
            });
            Ok((entries, end))
        })
    }

    pub(super) fn levels(&self) -> TwoLevels<'_> {
        TwoLevels { l1: &self.l1, l2: &self.l2 }
    }

    /// The guest offset up to which L1 stays empty after `l1_index`, at most `end`.
    fn silent_until(&self, l1_index: u64, end: u64) -> Result<u64> {
        let last = self.geometry.l1_index(end - 1);
        let mut index = l1_index + 1;
        while index <= last {
            let (slice, within) = self.l1.get(&*self.file, self.l1_entry_at(index))?;
            for entry in entries(&slice[within..]) {
                if index > last {
                    break;
                }
                if entry != 0 {
                    return Ok(self.geometry.end_of_table(index - 1).min(end));
                }
                index += 1;
            }
        }
        Ok(end)
    }
}

/// A walk over the entries of one table.
struct Walk<'a> {
    map: &'a TableMap,
    /// The next guest byte.
    at: u64,
    end: u64,
    found: &'a mut dyn FnMut(Extent),
}

impl Walk<'_> {
    fn entry_place(&self, table: u64) -> u64 {
        table + self.map.geometry.l2_index(self.at) * ENTRY_BYTES
    }

    /// Through the cache, slice by slice.
    fn slices(&mut self, table: u64) -> Result<()> {
        while self.at < self.end {
            let host = self.entry_place(table);
            let (slice, within) = self.map.l2.get(&*self.map.file, host)?;
            self.entries(&slice[within..], host)?;
        }
        Ok(())
    }

    /// In large pieces, over which the cached slices, which may be newer than the file, are laid.
    fn pieces(&mut self, table: u64) -> Result<()> {
        let (map, slice_bytes) = (self.map, self.map.l2.slice_bytes());
        let table_end = table + map.geometry.table_bytes();
        let mut bytes = Vec::new();
        while self.at < self.end {
            let host = self.entry_place(table);
            let start = host & !(slice_bytes - 1);
            let entries = map.geometry.clusters_touched(&(self.at..self.end));
            let until = (host + entries * ENTRY_BYTES).next_multiple_of(slice_bytes);
            let until = until.min(start + PIECE_BYTES).min(table_end);
            if !map.writable && self.skip_hole(host, until)? {
                continue;
            }
            bytes.resize(usize::try_from(until - start).expect("a piece"), 0);
            map.l2.read_past(&*map.file, start, &mut bytes)?;
            self.entries(&bytes[usize::try_from(host - start).expect("in the piece")..], host)?;
        }
        Ok(())
    }

    /// Passes over entries from `host` on that a hole of the host holds, if it holds all of them up to `until`:
    /// they are zeroes. In images that are not written, whose caches hold nothing newer than the file.
    fn skip_hole(&mut self, host: u64, until: u64) -> Result<bool> {
        let next = self.map.file.next_allocated(host)?.map_or(u64::MAX, |allocated| allocated.start);
        if next < until {
            return Ok(false);
        }
        let silent = (next - host) / ENTRY_BYTES;
        let geometry = self.map.geometry;
        let guest = geometry.cluster_start(self.at);
        let end = silent.saturating_mul(geometry.cluster_bytes()).saturating_add(guest).min(self.end);
        (self.found)(Extent { len_bytes: end - self.at, place: Place::Unallocated });
        self.at = end;
        Ok(true)
    }

    /// Takes the entries in `bytes`, the first of which stands at host offset `host` and covers `self.at`,
    /// until they or the range end.
    fn entries(&mut self, bytes: &[u8], host: u64) -> Result<()> {
        let geometry = self.map.geometry;
        let cluster_bytes = geometry.cluster_bytes();
        let mut entries = (host..).step_by(8).zip(entries(bytes)).peekable();
        while self.at < self.end {
            let Some((at, entry)) = entries.next() else { break };
            let first = self.map.checked(Cluster::from_entry(entry), at)?;
            let (mut last, mut last_at, mut count) = (first, at, 1);
            let start = geometry.cluster_start(self.at);
            while start + (count << geometry.cluster_bits) < self.end {
                let next = last.next(cluster_bytes);
                match entries.next_if(|(_, entry)| *entry == next.entry()) {
                    Some((at, _)) => (last, last_at, count) = (next, at, count + 1),
                    None => break,
                }
            }
            // Every place between the first and the last is good if these are.
            self.map.checked(last, last_at)?;
            let end = (start + (count << geometry.cluster_bits)).min(self.end);
            let place = match first {
                Cluster::Unallocated => Place::Unallocated,
                Cluster::Zero => Place::Zero { reserved: None },
                Cluster::Data(host) => Place::Data {
                    file: HostFile::IMAGE,
                    at: HostOffset(host + geometry.in_cluster(self.at)),
                    writable: self.map.writable,
                },
            };
            (self.found)(Extent { len_bytes: end - self.at, place });
            self.at = end;
        }
        Ok(())
    }
}
