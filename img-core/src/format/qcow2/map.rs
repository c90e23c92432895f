//! The question where guest bytes live: L1, L2, extent.
//!
//! [`TableMap`] holds the cached tables of one image and walks any L1 of it: the active one, or a
//! snapshot's. Small questions are answered from cached slices. Where a walk wants half of an L2 table or
//! more, it reads the whole into a buffer of its own, so that it neither thrashes the cache nor asks the
//! host 16 times, and lays the cached slices, which may be newer than the file, over it.

use std::{ops::Range, sync::Arc};

use super::{
    entry::{COMPRESSED, COPIED, Cluster, L1Entry, L2Entry, OFFSET_MASK, ZERO, like_the_first},
    extension::be64,
    geometry::Geometry,
};
use crate::{
    Error, Result,
    format::{
        Codec, Extent, HostFile, HostOffset, MissingTable, Place,
        table_cache::SliceCache,
        two_levels::{Entries, TwoLevels},
    },
    storage::Storage,
    sync::atomic::{AtomicU64, Ordering},
};

/// The external data file among a layer's files.
pub(super) const DATA_FILE: HostFile = HostFile(1);

/// Where a walk begins: an L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Root {
    /// Host offset of the table.
    pub(super) l1_offset: u64,
    /// Its entries.
    pub(super) l1_entries: u64,
    /// Whether clusters with the copied flag may be overwritten.
    pub(super) writable: bool,
}

impl Root {
    /// The same below an L1 entry: in a table that others use too nothing may be overwritten.
    fn under(self, entry: L1Entry) -> Self {
        Self { writable: self.writable && entry.is_copied(), ..self }
    }
}

/// The tables of an image.
#[derive(Debug)]
pub(super) struct TableMap {
    pub(super) file: Arc<dyn Storage>,
    pub(super) geometry: Geometry,
    pub(super) codec: Codec,
    pub(super) l1: SliceCache,
    pub(super) l2: SliceCache,
    /// Tables end here at the latest: the end of the file, or of what was allocated behind it. It grows before an
    /// entry names what is new, so it is looked at after the entry.
    pub(super) end_bytes: Arc<AtomicU64>,
}

/// An L2 entry and where it stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) entry: L2Entry,
    pub(super) at: u64,
}

impl TableMap {
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

    /// The L1 entry of index `l1_index`; empty past the end of the table.
    pub(super) fn l1_entry(&self, root: Root, l1_index: u64) -> Result<L1Entry> {
        if l1_index >= root.l1_entries {
            return Ok(L1Entry(0));
        }
        let (slice, within) = self.l1.get(&*self.file, root.l1_offset + l1_index * 8)?;
        Ok(L1Entry(be64(&slice, within)))
    }

    /// Host offset of the L2 table an L1 entry names, checked.
    pub(super) fn checked_table(&self, root: Root, l1_index: u64, entry: L1Entry) -> Result<Option<u64>> {
        let Some(table) = entry.table() else { return Ok(None) };
        let at = root.l1_offset + l1_index * 8;
        if self.geometry.in_cluster(table) != 0 {
            return Err(self.corrupt("L1 entry", at, "an L2 table at the start of a cluster", table));
        }
        let end = self.end_bytes.load(Ordering::Relaxed);
        if table >= end {
            let expected = format_args!("an L2 table inside the file, below {end:#x}");
            return Err(self.corrupt("L1 entry", at, expected, table));
        }
        Ok(Some(table))
    }

    /// The L2 entry of a guest offset; `None` where there is no L2 table.
    pub(super) fn l2_entry(&self, root: Root, guest: u64) -> Result<Option<Found>> {
        let l1_index = self.geometry.l1_index(guest);
        let entry = self.l1_entry(root, l1_index)?;
        let Some(table) = self.checked_table(root, l1_index, entry)? else { return Ok(None) };
        let mut found = self.entry_at(table, self.geometry.l2_index(guest))?;
        if !entry.is_copied() {
            // Whoever shares the table shares what it names.
            found.entry.word &= !COPIED;
        }
        Ok(Some(found))
    }

    /// Entry `index` of the table at `table`.
    pub(super) fn entry_at(&self, table: u64, index: u64) -> Result<Found> {
        let bytes = self.geometry.l2_entry_bytes();
        let at = table + index * bytes;
        let (slice, within) = self.l2.get(&*self.file, at)?;
        let in_slice = within / usize::try_from(bytes).expect("8 or 16");
        let entry = L2Entry::read(&slice, in_slice, self.geometry);
        Ok(Found { entry, at })
    }

    /// Appends the extents of a guest range.
    pub(super) fn map_range(&self, root: Root, guest: Range<u64>, extents: &mut Vec<Extent>) -> Result<()> {
        let geometry = self.geometry;
        let found = &mut |extent: Extent| extent.push_to(extents);
        let mut buffer = Vec::new();
        let mut at = guest.start;
        while at < guest.end {
            let l1_index = geometry.l1_index(at);
            let table_end = end_of_table(geometry, l1_index).min(guest.end);
            let entry = self.l1_entry(root, l1_index)?;
            match self.checked_table(root, l1_index, entry)? {
                Some(table) if table_end - at >= geometry.l2_span_bytes() / 2 => {
                    self.read_table(table, &mut buffer)?;
                    let first = geometry.l2_index(at);
                    let skip = usize::try_from(first * geometry.l2_entry_bytes()).expect("inside a cluster");
                    let root = root.under(entry);
                    let mut walk = Walk { map: self, root, at, end: table_end, found };
                    walk.entries(&buffer[skip..], table + skip as u64)?;
                    at = table_end;
                }
                Some(table) => {
                    self.map_by_slices(root.under(entry), table, at..table_end, found)?;
                    at = table_end;
                }
                None => {
                    let end = self.silent_until(root, l1_index, guest.end)?;
                    found(Extent { len_bytes: end - at, place: Place::Unallocated });
                    at = end;
                }
            }
        }
        Ok(())
    }

    /// The part of a guest range that one table covers, slice by slice.
    fn map_by_slices(
        &self,
        root: Root,
        table: u64,
        guest: Range<u64>,
        found: &mut dyn FnMut(Extent),
    ) -> Result<()> {
        let geometry = self.geometry;
        let mut walk = Walk { map: self, root, at: guest.start, end: guest.end, found };
        while walk.at < walk.end {
            let entry_at = table + geometry.l2_index(walk.at) * geometry.l2_entry_bytes();
            let (slice, within) = self.l2.get(&*self.file, entry_at)?;
            walk.entries(&slice[within..], entry_at)?;
        }
        Ok(())
    }

    /// [`Self::map_range`] from the caches alone; false where a table is not there.
    pub(super) fn map_cached(
        &self,
        root: Root,
        guest: Range<u64>,
        found: &mut dyn FnMut(Extent),
    ) -> Result<bool> {
        let geometry = self.geometry;
        let mut walk = Walk { map: self, root, at: guest.start, end: guest.end, found };
        while walk.at < guest.end {
            let l1_index = geometry.l1_index(walk.at);
            walk.end = end_of_table(geometry, l1_index).min(guest.end);
            let Some(entry) = self.cached_l1_entry(root, l1_index) else { return Ok(false) };
            let Some(table) = self.checked_table(root, l1_index, entry)? else {
                (walk.found)(Extent { len_bytes: walk.end - walk.at, place: Place::Unallocated });
                walk.at = walk.end;
                continue;
            };
            walk.root = root.under(entry);
            while walk.at < walk.end {
                let entry_at = table + geometry.l2_index(walk.at) * geometry.l2_entry_bytes();
                let entries = |bytes: &[u8], within: usize| walk.entries(&bytes[within..], entry_at);
                let Some(result) = self.l2.look_at(entry_at, entries) else { return Ok(false) };
                result?;
            }
        }
        Ok(true)
    }

    /// The first slice of a table that [`Self::map_cached`] lacks.
    pub(super) fn missing(&self, root: Root, guest: Range<u64>) -> Result<Option<MissingTable>> {
        let geometry = self.geometry;
        self.levels().missing(guest, |guest| {
            let l1_index = geometry.l1_index(guest.start);
            let end = end_of_table(geometry, l1_index).min(guest.end);
            let Some(entry) = self.cached_l1_entry(root, l1_index) else {
                let entry_at = root.l1_offset + l1_index * 8;
                return Ok((Entries::L1(entry_at..entry_at + 8), end));
            };
            let entries = self.checked_table(root, l1_index, entry)?.map_or(Entries::None, |table| {
                let entry_at = |guest| table + geometry.l2_index(guest) * geometry.l2_entry_bytes();
                Entries::L2(entry_at(guest.start)..entry_at(end - 1) + geometry.l2_entry_bytes())
            });
            Ok((entries, end))
        })
    }

    pub(super) fn levels(&self) -> TwoLevels<'_> {
        TwoLevels { l1: &self.l1, l2: &self.l2 }
    }

    /// Where the space behind the first byte of `guest` stands, whose subcluster is not allocated although its cluster
    /// may be, and the end of what that answer holds for.
    pub(super) fn kept_behind(
        &self,
        root: Root,
        guest: &Range<u64>,
    ) -> Result<(u64, Option<(HostFile, HostOffset)>)> {
        let geometry = self.geometry;
        let mut at = guest.start;
        while at < guest.end {
            let start = geometry.cluster_start(at);
            let Some(found) = self.l2_entry(root, at)? else {
                at = end_of_table(geometry, geometry.l1_index(at)).min(guest.end);
                continue;
            };
            let end = (start + geometry.cluster_bytes()).min(guest.end);
            if let Cluster::Subclusters { at: Some(host), .. } = self.checked(found, start)? {
                if at > guest.start {
                    break;
                }
                return Ok((end, Some((self.data_file(), HostOffset(host + geometry.in_cluster(at))))));
            }
            at = end;
        }
        Ok((at, None))
    }

    /// [`Self::l1_entry`] from the cache alone.
    pub(super) fn cached_l1_entry(&self, root: Root, l1_index: u64) -> Option<L1Entry> {
        if l1_index >= root.l1_entries {
            return Some(L1Entry(0));
        }
        self.l1.look_at(root.l1_offset + l1_index * 8, be64).map(L1Entry)
    }

    /// The guest offset up to which L1 stays empty after `l1_index`, at most `end`.
    fn silent_until(&self, root: Root, l1_index: u64, end: u64) -> Result<u64> {
        let mut index = l1_index + 1;
        while index < root.l1_entries && end_of_table(self.geometry, index - 1) < end {
            let (slice, within) = self.l1.get(&*self.file, root.l1_offset + index * 8)?;
            let left = usize::try_from(root.l1_entries - index).unwrap_or(usize::MAX);
            let words = slice[within..].as_chunks::<8>().0;
            let words = &words[..words.len().min(left)];
            let silent = words.iter().take_while(|&&word| u64::from_be_bytes(word) & OFFSET_MASK == 0);
            let silent = silent.count();
            index += silent as u64;
            if silent < words.len() {
                return Ok(end_of_table(self.geometry, index - 1).min(end));
            }
        }
        if index >= root.l1_entries {
            return Ok(end);
        }
        Ok(end_of_table(self.geometry, index - 1).min(end))
    }

    /// A whole L2 table as it is now.
    pub(super) fn read_table(&self, table: u64, buffer: &mut Vec<u8>) -> Result<()> {
        let cluster = self.geometry.cluster_bytes();
        buffer.resize(usize::try_from(cluster).expect("at most 2 MiB"), 0);
        self.l2.read_past(&*self.file, table, buffer)
    }

    /// The host cluster behind an entry, checked against the rules that hold for every entry.
    pub(super) fn checked(&self, found: Found, guest_cluster: u64) -> Result<Cluster> {
        let geometry = self.geometry;
        if geometry.version < 3 && found.entry.word & (COMPRESSED | ZERO) == ZERO {
            let expected = "no zero flag, which version 2 does not have";
            return Err(self.corrupt("L2 entry", found.at, expected, found.entry.word));
        }
        let cluster = found.entry.cluster(geometry);
        let at = match cluster {
            Cluster::Unallocated | Cluster::Zero { reserved: None } => return Ok(cluster),
            Cluster::Compressed { .. } if geometry.external_data => {
                let expected = "no compressed cluster, as guest data is in an external file";
                return Err(self.corrupt("L2 entry", found.at, expected, found.entry.word));
            }
            Cluster::Compressed { .. } => return Ok(cluster),
            Cluster::Subclusters { at, allocated, zero } => {
                if allocated & zero != 0 || (at.is_none() && allocated != 0) {
                    let expected = "subclusters that are either allocated or zero";
                    return Err(self.corrupt("L2 bitmap", found.at + 8, expected, found.entry.bitmap));
                }
                match at {
                    None => return Ok(cluster),
                    Some(at) => at,
                }
            }
            Cluster::Zero { reserved: Some(at) } | Cluster::Standard { at } => at,
        };
        if geometry.in_cluster(at) != 0 {
            let expected = "a host offset at the start of a cluster";
            return Err(self.corrupt("L2 entry", found.at, expected, at));
        }
        if geometry.external_data && at != guest_cluster {
            let expected =
                format_args!("the guest's own offset {guest_cluster:#x} in the external data file");
            return Err(self.corrupt("L2 entry", found.at, expected, at));
        }
        Ok(cluster)
    }

    /// The file that guest data is in.
    pub(super) fn data_file(&self) -> HostFile {
        if self.geometry.external_data { DATA_FILE } else { HostFile::IMAGE }
    }
}

/// The first guest offset behind what L2 table `l1_index` covers.
fn end_of_table(geometry: Geometry, l1_index: u64) -> u64 {
    (l1_index + 1).saturating_mul(geometry.l2_span_bytes())
}

/// A walk over the entries of one table.
struct Walk<'a> {
    map: &'a TableMap,
    root: Root,
    /// The next guest byte.
    at: u64,
    end: u64,
    found: &'a mut dyn FnMut(Extent),
}

impl Walk<'_> {
    /// Takes the entries in `bytes`, the first of which stands at host offset `host` and covers
    /// `self.at`, until they or the range end.
    fn entries(&mut self, bytes: &[u8], host: u64) -> Result<()> {
        let geometry = self.map.geometry;
        let entry_bytes = usize::try_from(geometry.l2_entry_bytes()).expect("8 or 16");
        let left_bytes = self.end.saturating_sub(geometry.cluster_start(self.at));
        let wanted = geometry.clusters_for(left_bytes);
        let count = (bytes.len() / entry_bytes).min(usize::try_from(wanted).unwrap_or(usize::MAX));
        // Runs go no further than they are asked for.
        let bytes = &bytes[..count * entry_bytes];
        let mut index = 0;
        while index < count && self.at < self.end {
            let entry = L2Entry::read(bytes, index, geometry);
            let found = Found { entry, at: host + (index * entry_bytes) as u64 };
            let cluster = self.map.checked(found, geometry.cluster_start(self.at))?;
            let run = if geometry.extended_l2 || entry.word & COMPRESSED != 0 {
                1
            } else {
                like_the_first(&bytes.as_chunks().0[index..], geometry)
            };
            // The first cluster of the run may be cut at the start, the last one at the end.
            let run_end = geometry.cluster_start(self.at) + run as u64 * geometry.cluster_bytes();
            let end = run_end.min(self.end);
            self.cluster(cluster, entry.is_copied(), end);
            self.at = end;
            index += run;
        }
        Ok(())
    }

    /// Appends what `cluster`, or a run that continues it, says about the bytes up to `end`.
    fn cluster(&mut self, cluster: Cluster, copied: bool, end: u64) {
        let within = self.map.geometry.in_cluster(self.at);
        let file = self.map.data_file();
        let writable = copied && self.root.writable;
        let place = match cluster {
            Cluster::Unallocated => Place::Unallocated,
            Cluster::Zero { reserved } => {
                Place::Zero { reserved: reserved.map(|at| (file, HostOffset(at + within))) }
            }
            Cluster::Standard { at } => Place::Data { file, at: HostOffset(at + within), writable },
            Cluster::Compressed { at, stored_bytes } => Place::Encoded {
                file: HostFile::IMAGE,
                at: HostOffset(at),
                stored_bytes,
                decoded_bytes: u32::try_from(self.map.geometry.cluster_bytes()).expect("at most 2 MiB"),
                skip_bytes: u32::try_from(within).expect("inside a cluster"),
                how: self.map.codec,
            },
            Cluster::Subclusters { at, allocated, zero } => {
                return self.subclusters(at, allocated, zero, writable, end);
            }
        };
        (self.found)(Extent { len_bytes: end - self.at, place });
    }

    fn subclusters(&mut self, at: Option<u64>, allocated: u32, zero: u32, writable: bool, end: u64) {
        let geometry = self.map.geometry;
        let file = self.map.data_file();
        let mut guest = self.at;
        while guest < end {
            let within = geometry.in_cluster(guest);
            let bit = within / geometry.subcluster_bytes();
            let here = at.map(|at| (file, HostOffset(at + within)));
            let place = match (allocated >> bit & 1, zero >> bit & 1, here) {
                (0, 0, _) => Place::Unallocated,
                (0, _, reserved) => Place::Zero { reserved },
                (_, _, Some((file, at))) => Place::Data { file, at, writable },
                (_, _, None) => unreachable!("checked when the entry was read"),
            };
            let next = (geometry.cluster_start(guest) + (bit + 1) * geometry.subcluster_bytes()).min(end);
            (self.found)(Extent { len_bytes: next - guest, place });
            guest = next;
        }
    }
}
