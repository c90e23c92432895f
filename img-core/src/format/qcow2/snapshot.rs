//! Internal snapshots: taken, applied, deleted, looked at ("Snapshots").
//!
//! A snapshot is a copy of the L1 table; what it shares with the active disk has a reference count above
//! one, and no copied flag. Each change works in bulk on an image that nobody else uses: caches drained,
//! tables streamed, counts changed in runs, caches reloaded.
//!
//! **Create.** Until step 3 nothing refers to the new table, so a crash leaves leaks, and in between counts
//! and flags that disagree in the harmless direction (a cluster counted twice has one user). Version 3 covers
//! that with the dirty bit; in version 2 `check` names it, and no data is at risk.
//! 1. the dirty bit (version 3), durable;
//! 2. L1 copy and snapshot table in new clusters; all counts up, all copied flags cleared; a sync;
//! 3. the header names the new table, the dirty bit goes, durable;
//! 4. the old table's clusters are counted down; no sync, as a count too high is a leak.
//!
//! **Apply.** Counts and flags agree throughout, a crash leaves leaks only:
//! 1. counts of the snapshot's tree up, copied flags in it cleared, an L1 copy in new clusters; a sync;
//! 2. the header names the new L1 with the snapshot's disk size, durable;
//! 3. counts of the old tree down, its free space punched out; a sync.
//!
//! Tables that both trees have in the same place are left out of 1 and 3.
//!
//! **Delete.**
//! 1. the shorter table in new clusters, durable;
//! 2. the header names it and takes the dirty bit (version 3), durable;
//! 3. counts of the snapshot's tree and of the old table down; a sync in version 2, so that a flag is never
//!    set ahead of its count; copied flags set where counts are one now; a sync;
//! 4. the dirty bit goes, durable.
//!
//! Where a step fails and what came before it cannot be undone, writing stops ([`Qcow2Layer::halt`]): the image
//! is then what a power cut at that step leaves, dirty bit included, and repaired when it is opened again.

use std::{collections::HashSet, io, sync::Arc};

use super::{
    create_layout::Run,
    feature::incompatible,
    header::{Header, MAX_SNAPSHOTS},
    layer::Qcow2Layer,
    overlap::Kind,
    snapshot_counts::Counts,
    snapshot_table::{MAX_TABLE_BYTES, NewSnapshot, Snapshot, encode_table, read_table},
    snapshot_tree::{L1, clear_copied, data_runs, set_copied, visit_tables, write_changed},
};
use crate::{
    Error, Result,
    format::{Layer, OpenMode, SnapshotInfo, Snapshots},
    storage::Flush,
};

impl Snapshots for Qcow2Layer {
    fn list(&self) -> Result<Vec<SnapshotInfo>> {
        let table = read_table(self.image_file(), &self.header())?;
        Ok(table.into_iter().map(|snapshot| snapshot.info).collect())
    }

    fn create(&self, name: &str, date: (u32, u32)) -> Result<()> {
        self.exclusively(|| self.create_snapshot(name, date))
    }

    fn apply(&self, id_or_name: &str) -> Result<()> {
        self.exclusively(|| self.apply_snapshot(id_or_name))
    }

    fn delete(&self, id_or_name: &str) -> Result<()> {
        // Also where snapshots cannot be used at all, the first thing to say is that there is none of that name.
        self.find(&read_table(self.image_file(), &self.header())?, id_or_name)?;
        self.exclusively(|| self.delete_snapshot(id_or_name))
    }

    fn view(&self, id_or_name: &str) -> Result<Arc<dyn Layer>> {
        let mut header = self.header().clone();
        let table = read_table(self.image_file(), &header)?;
        let snapshot = &table[self.find(&table, id_or_name)?];
        snapshot.check_l1(self.geometry)?;
        // The disk keeps its present size: what the snapshot's table does not reach is unallocated, and what it
        // has beyond the disk's end is not shown. The reference loads a snapshot for reading the same way.
        header.l1_offset = snapshot.l1_offset;
        header.l1_entries = snapshot.l1_entries;
        let (file, data) = (Arc::clone(self.storage()), self.data_file.clone());
        Ok(Arc::new(Self::assemble(OpenMode::Read, file, header, self.runtime.clone(), data)?))
    }
}

impl Qcow2Layer {
    /// Runs a change with the reference's refusals before it, and with caches as the file is after it.
    fn exclusively(&self, change: impl FnOnce() -> Result<()>) -> Result<()> {
        self.check_writable()?;
        if self.geometry.external_data {
            let source = io::Error::from_raw_os_error(libc::ENOTSUP);
            return Err(Error::io(self.path(), "use snapshots with an external data file", source));
        }
        let result = self.check_structures().and_then(|()| change());
        let result = self.guard(result);
        if result.is_err() && self.check_writable().is_ok() {
            // What waited from before is not lost, lazy counts included; where the change got to the file, nothing
            // waits.
            self.or_halt(self.settle())?;
        }
        if self.map.l1.is_dirty(|_| true) || self.map.l2.is_dirty(|_| true) {
            // It failed early, and writing stopped: what was written before can still be read.
            return result;
        }
        // Copied flags and counts in memory may be those from before the change.
        let reloaded = self.or_halt(self.reload());
        result.and(reloaded)
    }

    /// Tables are changed in the file itself: none may stand where another structure does.
    pub(super) fn check_structures(&self) -> Result<()> {
        self.know_places()?;
        let cluster = self.geometry.cluster_bytes();
        let header = self.header().clone();
        let l1 = header.l1_offset..header.l1_offset + u64::from(header.l1_entries) * 8;
        self.check_overlap(&l1, Some(Kind::ActiveL1))?;
        let table = header.refcount_table_offset
            ..header.refcount_table_offset + u64::from(header.refcount_table_clusters) * cluster;
        self.scan_words(&table, |at, word| match self.checked_refcount_block(at, word)? {
            Some(block) => self.check_overlap(&(block..block + cluster), Some(Kind::RefcountBlock)),
            None => Ok(()),
        })
    }

    /// Refuses an L2 table, active or not, that stands where another structure does.
    pub(super) fn check_l2_place(&self, offset: u64) -> Result<()> {
        let host = offset..offset + self.geometry.cluster_bytes();
        match self.check_overlap(&host, Some(Kind::ActiveL2)) {
            Err(Error::Overlap { structure, .. }) if structure == Kind::InactiveL2.name() => Ok(()),
            result => result,
        }
    }

    /// The reference looks through the ids first, then through the names.
    fn find(&self, table: &[Snapshot], id_or_name: &str) -> Result<usize> {
        let by_id = table.iter().position(|snapshot| snapshot.info.id == id_or_name);
        by_id
            .or_else(|| table.iter().position(|snapshot| snapshot.info.name == id_or_name))
            .ok_or_else(|| self.no_such_snapshot(id_or_name))
    }

    fn no_such_snapshot(&self, name: &str) -> Error {
        Error::NoSuchSnapshot { file: self.path().to_owned(), name: name.to_owned() }
    }

    /// New clusters for a structure; 0 for an empty one.
    fn allocate_room(&self, bytes: u64) -> Result<u64> {
        match self.geometry.clusters_for(bytes) {
            0 => Ok(0),
            clusters => self.allocate_clusters(clusters),
        }
    }

    /// Everything in caches goes to disk, the counts of new clusters too.
    pub(super) fn settle(&self) -> Result<()> {
        self.finish(&mut self.quiet_state())
    }

    /// The clusters of a structure.
    fn run_of(&self, offset: u64, bytes: u64) -> Run {
        Run { start: offset >> self.geometry.cluster_bits, clusters: self.geometry.clusters_for(bytes) }
    }

    /// Gives back clusters that nothing refers to after a change failed.
    fn give_back(&self, structures: &[(u64, u64)]) -> Result<()> {
        for &(offset, bytes) in structures.iter().filter(|(_, bytes)| *bytes > 0) {
            self.free_clusters(offset, self.geometry.clusters_for(bytes));
        }
        self.settle()
    }

    /// The bit that stands for "counts and flags may disagree", where the version has it.
    fn dirty_bit(&self) -> u64 {
        if self.geometry.version >= 3 { incompatible::DIRTY } else { 0 }
    }

    fn create_snapshot(&self, name: &str, date: (u32, u32)) -> Result<()> {
        let before = self.header().clone();
        let mut table = read_table(self.image_file(), &before)?;
        if table.len() >= MAX_SNAPSHOTS as usize {
            return Err(Error::io(self.path(), "add a snapshot", io::Error::from_raw_os_error(libc::EFBIG)));
        }
        let ids = table.iter().map(|snapshot| leading_number(&snapshot.info.id));
        let mut new = NewSnapshot {
            id: ids.max().unwrap_or(0).saturating_add(1),
            name,
            date,
            virtual_size_bytes: before.virtual_size_bytes,
            l1_offset: 0,
            l1_entries: before.l1_entries,
        };
        let old_bytes = encode_table(&table).len() as u64;
        let l1_bytes = u64::from(before.l1_entries) * 8;
        table.push(Snapshot::new(&new));
        let table_bytes = encode_table(&table).len();
        if table_bytes > MAX_TABLE_BYTES {
            return Err(Error::io(self.path(), "add a snapshot", io::Error::from_raw_os_error(libc::EFBIG)));
        }
        let table_bytes = table_bytes as u64;
        new.l1_offset = self.allocate_room(l1_bytes)?;
        let table_offset = match self.allocate_room(table_bytes) {
            Ok(offset) => offset,
            Err(error) => {
                self.give_back(&[(new.l1_offset, l1_bytes)])?;
                return Err(error);
            }
        };
        self.settle()?;
        // 1.
        if self.dirty_bit() != 0 {
            self.set_dirty()?;
        }
        // 2.
        let header = self.header().clone();
        *table.last_mut().expect("just pushed") = Snapshot::new(&new);
        let bytes = encode_table(&table);
        let shared = self
            .image_file()
            .write_at(&bytes, table_offset)
            .and_then(|()| self.share_active(&header, new.l1_offset));
        if let Err(error) = shared {
            if !self.is_halted() {
                self.clear_dirty()?;
                self.reload()?;
                self.give_back(&[(new.l1_offset, l1_bytes), (table_offset, table_bytes)])?;
            }
            return Err(error);
        }
        self.or_halt(self.image_file().flush(Flush::Data))?;
        // 3.
        let count = u32::try_from(table.len()).expect("at most MAX_SNAPSHOTS");
        let dirty = self.dirty_bit();
        self.update_header(|header| {
            header.snapshots_offset = table_offset;
            header.snapshot_count = count;
            header.incompatible &= !dirty;
        })?;
        // 4.
        let mut counts = Counts::new(self.image_file(), &header, self.runtime.discard_snapshots)?;
        counts.add(self.run_of(before.snapshots_offset, old_bytes), false, &mut 0)?;
        counts.write()?;
        counts.punch_freed()
    }

    /// Step 2 of creating: the active tree is counted once more and loses its copied flags, and its L1 table
    /// is copied. On failure all of it is undone, or writing stops.
    fn share_active(&self, header: &Header, l1_copy: u64) -> Result<()> {
        let file = self.image_file();
        let mut l1 = L1::read(file, header.l1_offset, header.l1_entries)?;
        let tables = l1.tables(file, self.geometry)?;
        let offsets: Vec<u64> = tables.iter().map(|&(_, offset)| offset).collect();
        offsets.iter().try_for_each(|&offset| self.check_l2_place(offset))?;
        if !l1.bytes.is_empty() {
            file.write_at(&l1.bytes, l1_copy)?;
        }
        let mut counts = Counts::new(file, header, self.runtime.discard_snapshots)?;
        if let Err(error) = self.count_up_tree(&mut counts, &offsets, true) {
            if !self.is_halted() {
                let undone = self.set_flags(&mut counts, header).and_then(|()| counts.write());
                self.or_halt(undone.and_then(|()| file.flush(Flush::Data)))?;
            }
            return Err(error);
        }
        let before = l1.bytes.clone();
        for &(index, _) in &tables {
            l1.set_copied(index, false);
        }
        let written = write_changed(file, header.l1_offset, &before, &l1.bytes);
        self.or_halt(written.and_then(|()| counts.write()))
    }

    /// Counts L2 tables and what they refer to once more, clearing copied flags in them where asked. On
    /// failure the counts are as before, or writing stops; flags are not.
    fn count_up_tree(&self, counts: &mut Counts<'_>, tables: &[u64], clear_flags: bool) -> Result<()> {
        let mut done = 0;
        let result = self.count_tree(counts, tables, true, clear_flags, &mut done);
        if result.is_err() {
            let (file, geometry) = (self.image_file(), self.geometry);
            let mut parts = done;
            let undone = visit_tables(file, geometry, tables, &mut |_, offset, table| {
                counts.undo(self.run_of(offset, 1), &mut parts)?;
                let undone =
                    data_runs(file, geometry, offset, table, &mut |run| counts.undo(run, &mut parts));
                // The entry that stopped the counting stops this as well, with nothing left to undo.
                if parts == 0 { Ok(()) } else { undone }
            });
            self.or_halt(undone)?;
        }
        result
    }

    fn count_tree(
        &self,
        counts: &mut Counts<'_>,
        tables: &[u64],
        up: bool,
        clear_flags: bool,
        done: &mut u64,
    ) -> Result<()> {
        let (file, geometry) = (self.image_file(), self.geometry);
        let bits = geometry.cluster_bits;
        visit_tables(file, geometry, tables, &mut |_, offset, table| {
            self.check_l2_place(offset)?;
            counts.add(self.run_of(offset, 1), up, done)?;
            data_runs(file, geometry, offset, table, &mut |run| {
                // Where this is the last reference its space is punched out.
                self.check_overlap(&(run.start << bits..(run.start + run.clusters) << bits), None)?;
                counts.add(run, up, done)
            })?;
            if clear_flags {
                clear_copied(geometry, table);
            }
            Ok(())
        })
    }

    /// Makes all copied flags of the active tree say what the counts say. Tables with more than one user are
    /// passed over: what they refer to has as many.
    fn set_flags(&self, counts: &mut Counts<'_>, header: &Header) -> Result<()> {
        let (file, geometry) = (self.image_file(), self.geometry);
        let mut l1 = L1::read(file, header.l1_offset, header.l1_entries)?;
        let before = l1.bytes.clone();
        let mut own = Vec::new();
        for (index, offset) in l1.tables(file, geometry)? {
            let copied = counts.get(offset >> geometry.cluster_bits)? == 1;
            l1.set_copied(index, copied);
            if copied {
                self.check_l2_place(offset)?;
                own.push(offset);
            }
        }
        visit_tables(file, geometry, &own, &mut |_, _, table| {
            set_copied(geometry, table, &mut |run| counts.all_one(run))
        })?;
        write_changed(file, header.l1_offset, &before, &l1.bytes)
    }

    fn apply_snapshot(&self, id_or_name: &str) -> Result<()> {
        if self.header().bitmaps.is_some() {
            return Err(Error::Invalid("Device has active dirty bitmaps".to_owned()));
        }
        let table = read_table(self.image_file(), &self.header())?;
        let snapshot = &table[self.find(&table, id_or_name)?];
        snapshot.check_l1(self.geometry)?;
        snapshot.check_size(self.geometry)?;
        let (file, geometry) = (self.image_file(), self.geometry);
        let size = snapshot.info.virtual_size_bytes;
        let entries = geometry.l1_entries_for(size).max(snapshot.l1_entries.into());
        let l1_bytes = entries * 8;
        let l1_offset = self.allocate_room(l1_bytes)?;
        self.settle()?;
        // 1.
        let header = self.header().clone();
        let old = L1::read(file, header.l1_offset, header.l1_entries)?;
        let mut new = L1::read(file, snapshot.l1_offset, snapshot.l1_entries)?;
        let mut counts = Counts::new(file, &header, self.runtime.discard_snapshots)?;
        let prepared = (|| {
            let old_tables = old.tables(file, geometry)?;
            let new_tables = new.tables(file, geometry)?;
            let in_old: HashSet<_> = old_tables.iter().collect();
            let in_new: HashSet<_> = new_tables.iter().collect();
            let only = |tables: &[(usize, u64)], other: &HashSet<&(usize, u64)>| -> Vec<u64> {
                tables.iter().filter(|table| !other.contains(table)).map(|&(_, offset)| offset).collect()
            };
            let (going, coming) = (only(&old_tables, &in_new), only(&new_tables, &in_old));
            self.count_up_tree(&mut counts, &coming, true)?;
            for &(index, _) in &new_tables {
                new.set_copied(index, false);
            }
            new.bytes.resize(usize::try_from(l1_bytes).expect("at most 32 MiB"), 0);
            if !new.bytes.is_empty() {
                file.write_at(&new.bytes, l1_offset)?;
            }
            counts.write()?;
            file.flush(Flush::Data)?;
            Ok(going)
        })();
        let going = match prepared {
            Ok(going) => going,
            Err(error) => {
                counts.write()?;
                self.reload()?;
                self.give_back(&[(l1_offset, l1_bytes)])?;
                return Err(error);
            }
        };
        // 2.
        self.update_header(|header| {
            header.l1_offset = l1_offset;
            header.l1_entries = u32::try_from(entries).expect("at most 2^22");
            header.virtual_size_bytes = size;
        })?;
        // 3.
        self.count_tree(&mut counts, &going, false, false, &mut 0)?;
        counts.add(self.run_of(header.l1_offset, u64::from(header.l1_entries) * 8), false, &mut 0)?;
        counts.write()?;
        counts.punch_freed()?;
        file.flush(Flush::Data)
    }

    fn delete_snapshot(&self, name: &str) -> Result<()> {
        let before = self.header().clone();
        let mut table = read_table(self.image_file(), &before)?;
        let old_bytes = encode_table(&table).len() as u64;
        // The reference deletes by name only.
        let index = table.iter().position(|snapshot| snapshot.info.name == name);
        let snapshot = table.remove(index.ok_or_else(|| self.no_such_snapshot(name))?);
        snapshot.check_l1(self.geometry)?;
        // 1.
        let bytes = encode_table(&table);
        let table_offset = self.allocate_room(bytes.len() as u64)?;
        if !bytes.is_empty() {
            self.image_file().write_at(&bytes, table_offset)?;
        }
        self.settle()?;
        // 2.
        let dirty = self.dirty_bit();
        self.update_header(|header| {
            header.snapshots_offset = table_offset;
            header.snapshot_count -= 1;
            header.incompatible |= dirty;
        })?;
        // 3. and 4.
        self.or_halt(self.forget_tree(&snapshot, (before.snapshots_offset, old_bytes)))
    }

    /// Steps 3 and 4 of deleting a snapshot; `old_table` is where the snapshot table stood.
    fn forget_tree(&self, snapshot: &Snapshot, old_table: (u64, u64)) -> Result<()> {
        // 3.
        let header = self.header().clone();
        let (file, geometry) = (self.image_file(), self.geometry);
        let mut counts = Counts::new(file, &header, self.runtime.discard_snapshots)?;
        let l1 = L1::read(file, snapshot.l1_offset, snapshot.l1_entries)?;
        let tables: Vec<u64> = l1.tables(file, geometry)?.iter().map(|&(_, offset)| offset).collect();
        self.count_tree(&mut counts, &tables, false, false, &mut 0)?;
        counts.add(self.run_of(snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8), false, &mut 0)?;
        counts.add(self.run_of(old_table.0, old_table.1), false, &mut 0)?;
        counts.write()?;
        if self.dirty_bit() == 0 {
            file.flush(Flush::Data)?;
        }
        self.set_flags(&mut counts, &header)?;
        counts.punch_freed()?;
        file.flush(Flush::Data)?;
        // 4.
        self.clear_dirty()
    }
}

/// The number that an id begins with, 0 without one.
fn leading_number(id: &str) -> u64 {
    let end = id.find(|c: char| !c.is_ascii_digit()).unwrap_or(id.len());
    id[..end].parse().unwrap_or(0)
}
