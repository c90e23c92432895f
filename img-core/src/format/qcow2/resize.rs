//! Changing the virtual size.
//!
//! Growing: (1) a larger L1 table is written in a new place, its counts durable, sync; (2) the header that names
//! it, sync; (3) the old table is freed; (4) what stands behind the old end is forgotten, and the image above
//! makes zero what would show of a backing file, drain; (5) the size in the header, sync; (6) the new part is
//! preallocated as asked, and where that fails the disk shrinks again. Shrinking: (1) the size in the header, sync;
//! (2) what lies behind the new end is forgotten and its space freed, drain; (3) the file is cut behind the last
//! cluster in use. A crash leaves the old disk or the new one: what may stand behind its end does not show, and step 4
//! forgets it.

use std::{collections::HashSet, ops::Range, sync::atomic::Ordering};

use super::{
    alloc::{Freed, State},
    entry::{COPIED, L2Entry},
    extension::be64,
    geometry::refcount_get,
    header::MAX_L1_BYTES,
    layer::Qcow2Layer,
    overlap::Kind,
    refcount::usize_of,
};
use crate::{
    Error, Result,
    format::{Extent, Layer, Place},
    storage::{Flush, Preallocation},
};

impl Qcow2Layer {
    /// With `mapped` the new clusters are mapped even where no space is set aside for them.
    pub(super) fn change_size(&self, bytes: u64, preallocation: Preallocation, mapped: bool) -> Result<()> {
        self.check_new_size(bytes)?;
        self.know_places()?;
        let old = self.virtual_size_bytes();
        if bytes < old {
            if mapped || preallocation != Preallocation::Off {
                return Err(Error::Invalid("Preallocation can't be used for shrinking an image".to_owned()));
            }
            return self.shrink(bytes, old);
        }
        self.reach(bytes)?;
        self.drain()?;
        if let Some(data) = &self.data_file
            && (self.is_raw_data() || data.len_bytes()? < bytes)
        {
            data.resize(bytes, preallocation)?;
        }
        // (5)
        self.update_header(|header| header.virtual_size_bytes = bytes)?;
        // (6)
        if mapped || preallocation != Preallocation::Off || self.is_raw_data() {
            let filled = self
                .first_to_preallocate(old)
                .and_then(|first| self.preallocate(first..bytes, preallocation))
                .and_then(|()| self.drain());
            if let Err(error) = filled {
                // Who asked for space gets it or nothing. A host that refuses this too leaves the larger disk, of
                // which the new part reads as zeroes; what is told is why it was not filled.
                drop(self.shrink(old, bytes));
                return Err(error);
            }
        }
        Ok(())
    }

    /// What precedes growing to `bytes`: the map reaches so far, and holds nothing behind the end of the disk but
    /// in the last cluster.
    pub(super) fn reach_behind(&self, bytes: u64) -> Result<()> {
        self.check_new_size(bytes)?;
        self.know_places()?;
        self.reach(bytes)?;
        let end = self.virtual_size_bytes().next_multiple_of(self.geometry.cluster_bytes());
        self.forget_leftovers(end..bytes)
    }

    fn check_new_size(&self, bytes: u64) -> Result<()> {
        self.check_writable()?;
        // The size is counted in sectors where it matters: the reference refuses others.
        if !bytes.is_multiple_of(512) {
            return Err(Error::Invalid("The new size must be a multiple of 512".to_owned()));
        }
        if self.geometry.version < 3 && self.header().snapshot_count != 0 {
            return Err(Error::Invalid("Can't resize a v2 image which has snapshots".to_owned()));
        }
        Ok(())
    }

    /// Steps 1 to 3 of growing, where L1 is too short for a disk of `bytes`.
    fn reach(&self, bytes: u64) -> Result<()> {
        let entries = self.geometry.l1_entries_for(bytes);
        if entries * 8 > MAX_L1_BYTES {
            return Err(Error::Invalid("Failed to grow the L1 table: File too large".to_owned()));
        }
        if entries > u64::from(self.header().l1_entries) {
            self.grow_l1(&mut self.quiet_state(), entries)?;
        }
        Ok(())
    }

    /// Makes whole clusters behind the end of the disk unallocated. There are such after a crash between two steps
    /// of another size, and where a snapshot was applied that has the state of a machine.
    fn forget_leftovers(&self, guest: Range<u64>) -> Result<()> {
        let geometry = self.geometry;
        let root = self.root();
        let tables = geometry.l1_index(guest.start)..root.l1_entries.min(geometry.l1_entries_for(guest.end));
        let mut are_tables_checked = false;
        let mut extents: Vec<Extent> = Vec::new();
        for l1_index in tables {
            let entry = self.map.l1_entry(root, l1_index)?;
            if self.map.checked_table(root, l1_index, entry)?.is_none() {
                continue;
            }
            let start = guest.start.max(l1_index * geometry.l2_span_bytes());
            let end = guest.end.min((l1_index + 1).saturating_mul(geometry.l2_span_bytes()));
            extents.clear();
            self.map.map_range(root, start..end, &mut extents)?;
            if extents.iter().all(|extent| extent.place == Place::Unallocated) {
                continue;
            }
            if !are_tables_checked {
                self.check_cut_tables(l1_index)?;
                are_tables_checked = true;
            }
            self.forget_range(start..end)?;
        }
        Ok(())
    }

    fn grow_l1(&self, state: &mut State, entries: u64) -> Result<()> {
        let cluster = self.geometry.cluster_bytes();
        let (old_offset, old_entries) = {
            let header = self.header();
            (header.l1_offset, u64::from(header.l1_entries))
        };
        let clusters = (entries * 8).div_ceil(cluster);
        let table = self.allocate(state, clusters)?;
        let host = table..table + clusters * cluster;
        self.map.l1.forget(host.clone());
        self.map.l1.fill_with_zeroes(host.clone());
        let mut at = 0;
        while at < old_entries * 8 {
            let (slice, _) = self.map.l1.get(self.image_file(), old_offset + at)?;
            let used = usize_of((old_entries * 8 - at).min(self.map.l1.slice_bytes()));
            self.map.l1.update(self.image_file(), table + at, |new, _| {
                new[..used].copy_from_slice(&slice[..used])
            })?;
            at += self.map.l1.slice_bytes();
        }
        self.note_place(Kind::ActiveL1, host);
        // (1) Counts, the table, and their order are those of a drain: L1 is its last step.
        self.drain_locked(state)?;
        // (2)
        self.update_header(|header| {
            header.l1_offset = table;
            header.l1_entries = u32::try_from(entries).expect("at most 32 MiB of entries");
        })?;
        // (3)
        let old = old_offset..old_offset + old_entries * 8;
        self.map.l1.forget(old.start..old.end.next_multiple_of(self.map.l1.slice_bytes()));
        self.forget_place(Kind::ActiveL1, old.clone());
        if old_entries > 0 {
            state.free(Freed::clusters(old, self.runtime.discard_other));
        }
        Ok(())
    }

    /// Where the clusters begin that a disk of `old` bytes needs when it grows: with the last one of the old disk where
    /// that ends inside of it, the cluster has no place yet, and nothing in it or below it is read.
    fn first_to_preallocate(&self, old: u64) -> Result<u64> {
        let cluster = self.geometry.cluster_bytes();
        let (last, next) = (old - old % cluster, old.next_multiple_of(cluster));
        let mut extents: Vec<Extent> = Vec::new();
        if last < next {
            self.map.map_range(self.root(), last..next, &mut extents)?;
        }
        let is_backed = self.backing().is_some();
        let is_placeless = |extent: &Extent| match extent.place {
            Place::Zero { reserved } => reserved.is_none(),
            Place::Unallocated => !is_backed,
            Place::Data { .. } | Place::Encoded { .. } => false,
        };
        Ok(if extents.iter().all(is_placeless) { last } else { next })
    }

    /// Maps the clusters of a guest range, which read as zeroes, to new ones that do so too.
    fn preallocate(&self, guest: Range<u64>, how: Preallocation) -> Result<()> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_bytes();
        let mut at = guest.start;
        while at < guest.end {
            let table_end = (geometry.l1_index(at) + 1).saturating_mul(geometry.l2_span_bytes());
            let end = guest.end.min(table_end);
            let count = (end - at).div_ceil(cluster);
            // No request is in flight.
            self.change_map(None, true, |state| self.preallocate_in_table(state, at, count, how))?;
            at = end;
        }
        Ok(())
    }

    /// The part of preallocation that one L2 table covers: `count` clusters from guest byte `at` on.
    fn preallocate_in_table(&self, state: &mut State, at: u64, count: u64, how: Preallocation) -> Result<()> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_bytes();
        self.before_allocating(state)?;
        let table = self.table_for_writing(state, geometry.l1_index(at))?;
        let host = if geometry.external_data {
            at
        } else {
            // Behind the end, where the file has never held anything.
            let file_end = self.clusters_of(&(0..self.end_bytes.load(Ordering::Relaxed))).end;
            let index = state.free_index;
            state.free_index = index.max(file_end);
            let host = self.allocate_searching(state, count);
            state.free_index = index;
            let host = host?;
            let range = host..host + count * cluster;
            let file = self.image_file();
            let old_end = file.len_bytes()?;
            if let Err(error) = self.set_aside(range.clone(), how) {
                // What could be had goes back: what undoes the rest takes room too.
                state.free(Freed::clusters(range, false));
                if file.len_bytes()? > old_end {
                    file.resize(old_end, Preallocation::Off)?;
                }
                return Err(error);
            }
            host
        };
        for index in 0..count {
            let entry = L2Entry::standard(host + index * cluster, true, geometry);
            debug_assert_ne!(entry.word & COPIED, 0);
            let guest = at + index * cluster;
            let found = self.map.entry_at(table, geometry.l2_index(guest))?;
            let was = self.map.checked(found, guest)?;
            self.check_given_up(was)?;
            self.set_entry(table, guest, entry)?;
            if !geometry.external_data {
                self.free_entry(state, found.entry, was, self.runtime.discard_other);
            }
        }
        Ok(())
    }

    pub(super) fn set_aside(&self, host: Range<u64>, how: Preallocation) -> Result<()> {
        let file = self.image_file();
        let old_end = file.len_bytes()?;
        if host.start < old_end {
            // A block device, or another writer's data behind the clusters in use.
            file.write_zeroes(host.start..host.end.min(old_end), how == Preallocation::Off)?;
        }
        if how == Preallocation::Off {
            if host.end > old_end && self.storage().identity().is_none_or(|identity| identity.inode != 0) {
                file.resize(host.end, Preallocation::Off)?;
            }
            return Ok(());
        }
        file.preallocate(host, how)
    }

    fn shrink(&self, bytes: u64, old: u64) -> Result<()> {
        let geometry = self.geometry;
        self.check_cut_tables(geometry.l1_entries_for(bytes))?;
        // (1)
        self.drain()?;
        self.update_header(|header| header.virtual_size_bytes = bytes)?;
        // (2)
        let start = bytes.next_multiple_of(geometry.cluster_bytes());
        if start < old {
            self.forget_range(start..old)?;
        }
        {
            let mut state = self.quiet_state();
            self.cut_l1(&mut state, geometry.l1_entries_for(bytes))?;
            self.drain_locked(&mut state)?;
        }
        // (3)
        if let Some(data) = &self.data_file
            && (self.is_raw_data() || data.len_bytes()? > bytes)
        {
            data.resize(bytes, Preallocation::Off)?;
        }
        let mut state = self.quiet_state();
        // Blocks that the file still names are free in memory until this is durable.
        self.or_halt(self.cut_refcount_blocks(&mut state))?;
        self.cut_file()
    }

    /// Refuses to change or give up the L2 tables of L1 entries from `entries` on where one of them is named twice: it
    /// would be given to someone else while it is still in use.
    fn check_cut_tables(&self, entries: u64) -> Result<()> {
        let root = self.root();
        let mut cut = HashSet::new();
        for index in (0..root.l1_entries).rev() {
            let entry = self.map.l1_entry(root, index)?;
            let Some(table) = self.map.checked_table(root, index, entry)? else { continue };
            let is_named_twice = if index >= entries { !cut.insert(table) } else { cut.contains(&table) };
            if is_named_twice {
                let at = root.l1_offset + index * 8;
                return Err(self.map.corrupt("L1 entry", at, "an L2 table of its own", table));
            }
        }
        Ok(())
    }

    /// Frees the L2 tables of L1 entries from `entries` on.
    fn cut_l1(&self, state: &mut State, entries: u64) -> Result<()> {
        let root = self.root();
        let cluster = self.geometry.cluster_bytes();
        for index in entries..root.l1_entries {
            let entry = self.map.l1_entry(root, index)?;
            let Some(table) = self.map.checked_table(root, index, entry)? else { continue };
            self.map.l1.update(self.image_file(), root.l1_offset + index * 8, |bytes, within| {
                bytes[within..within + 8].fill(0);
            })?;
            self.map.l2.forget(table..table + cluster);
            state.new_tables.remove(&table);
            self.forget_place(Kind::ActiveL2, table..table + cluster);
            let freed = Freed::clusters(table..table + cluster, self.runtime.discard_other);
            state.free(if entry.is_copied() { freed } else { freed.shared() });
        }
        Ok(())
    }

    /// Takes refcount blocks that count nothing but themselves out of the refcount table.
    fn cut_refcount_blocks(&self, state: &mut State) -> Result<()> {
        let per_block = self.geometry.refcounts_per_block();
        let cluster = self.geometry.cluster_bytes();
        let table = self.header().refcount_table_offset;
        let entries = u64::from(self.header().refcount_table_clusters) * cluster / 8;
        for index in 0..entries {
            let at = table + index * 8;
            let (slice, within) = self.refcount_table.get(self.image_file(), at)?;
            let word = be64(&slice, within);
            let Some(block) = self.checked_refcount_block(at, word)? else { continue };
            let own = block >> self.geometry.cluster_bits;
            let (mut used, order) = (0, self.geometry.refcount_order);
            self.visit_refcounts(index * per_block..(index + 1) * per_block, |clusters, counts| {
                if let Some((bytes, first)) = counts {
                    used += clusters
                        .enumerate()
                        .filter(|&(at, cluster)| {
                            cluster != own && refcount_get(bytes, order, first + at) != 0
                        })
                        .count();
                }
                used == 0
            })?;
            if used > 0 {
                continue;
            }
            self.refcount_table.update(self.image_file(), at, |bytes, within| {
                bytes[within..within + 8].fill(0);
            })?;
            self.refcount_blocks.forget(block..block + cluster);
            self.forget_place(Kind::RefcountBlock, block..block + cluster);
            if own / per_block != index {
                state.free(Freed::clusters(block..block + cluster, self.runtime.discard_other));
            } else {
                self.cluster_is_free(state, own);
            }
        }
        self.drain_locked(state)
    }

    /// Cuts the file behind the last cluster in use.
    pub(super) fn cut_file(&self) -> Result<()> {
        let len = self.image_file().len_bytes()?;
        let clusters = self.clusters_of(&(0..len)).end;
        let order = self.geometry.refcount_order;
        let mut end = 0;
        self.visit_refcounts(0..clusters, |clusters, counts| {
            if let Some((bytes, first)) = counts {
                for (at, cluster) in clusters.enumerate() {
                    if refcount_get(bytes, order, first + at) != 0 {
                        end = cluster + 1;
                    }
                }
            }
            true
        })?;
        let end_bytes = end << self.geometry.cluster_bits;
        if end_bytes != 0 && end_bytes < len {
            self.image_file().resize(end_bytes, Preallocation::Off)?;
            self.image_file().flush(Flush::All)?;
            self.end_bytes.store(end_bytes, Ordering::Relaxed);
        }
        Ok(())
    }
}
