//! Guest writes: prepare (where the bytes will live), commit (the map points there), abort.
//!
//! A write to clusters that may be overwritten in place changes no table: it takes no lock but those of the
//! caches, and holds a lease until it ends, so that a discard meanwhile does not give the clusters to
//! someone else. Any other write is prepared under the state lock: its clusters are allocated, its guest
//! range is in flight, and whoever wants one of those clusters waits until it has landed.

use std::ops::Range;

use super::{
    alloc::{Freed, State},
    entry::{COPIED, Cluster, L2Entry},
    layer::Qcow2Layer,
    map::{DATA_FILE, Found},
    overlap::Kind,
    refcount::usize_of,
};
use crate::{
    Result,
    format::{
        Amended, Attempt, Backing, Below, HostFile, HostOffset, Layer, LayerWriter, OptionSet, PreparedWrite,
        WritePlan, WriteStep, WriteToken,
    },
    storage::Preallocation,
};

/// Tokens with this bit are writes in place; the others bits are the epoch of their lease.
pub(super) const IN_PLACE: u64 = 1 << 63;

/// The byte of [`COPIED`] in an entry as it stands on disk, big-endian.
const COPIED_BYTE: u8 = COPIED.to_be_bytes()[0];

/// A prepared write that changes the map when it is committed.
#[derive(Clone, Debug)]
pub(super) struct Write {
    /// The guest clusters it covers, in bytes.
    pub(super) clusters: Range<u64>,
    /// Where the first of them will stand.
    pub(super) host: u64,
    pub(super) kind: WriteKind,
    /// The token of another write of the same request, which ends with this one.
    pub(super) also: Option<u64>,
}

/// What committing does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteKind {
    /// The clusters move to newly allocated ones. The masks are the subclusters that are written in the
    /// first and in the last cluster.
    Fresh { first: u32, last: u32 },
    /// The clusters stay where they are, and the written subclusters begin to count.
    Reuse { first: u32, last: u32 },
    /// One cluster becomes a compressed one of so many bytes.
    Compressed { stored_bytes: u32 },
}

/// How one guest cluster can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Over what is there.
    InPlace(u64),
    /// In the cluster that is there, which does not count in full yet.
    Reuse(u64),
    /// Somewhere else.
    Fresh,
}

impl Way {
    /// How a cluster that stands `by` bytes behind this one must be written to be written together with it.
    fn further_on(self, by: u64) -> Self {
        match self {
            Self::InPlace(host) => Self::InPlace(host + by),
            Self::Reuse(host) => Self::Reuse(host + by),
            Self::Fresh => Self::Fresh,
        }
    }
}

/// A guest range, all clusters of which can be written in the same way.
#[derive(Debug)]
pub(super) struct Alike {
    pub(super) guest: Range<u64>,
    /// That of the first cluster.
    pub(super) way: Way,
    pub(super) first: Found,
    pub(super) last: Found,
}

/// What a write that changes the map covers.
#[derive(Debug)]
pub(super) struct Shape {
    /// Whole clusters, in guest bytes.
    pub(super) clusters: Range<u64>,
    /// What stands written afterwards, in guest bytes: the write, and what is filled around it.
    pub(super) fill: Range<u64>,
    pub(super) kind: WriteKind,
}

impl Qcow2Layer {
    pub(super) fn prepare(&self, guest: Range<u64>) -> Result<(WriteToken, WritePlan)> {
        self.check_writable()?;
        self.know_places()?;
        let pin = self.epochs.pin();
        if !self.is_zeroing()
            && let Some(plan) = self.in_place(&guest, false)?
        {
            return Ok((WriteToken(IN_PLACE | pin.into_epoch()), plan));
        }
        drop(pin);
        let first = self.geometry.cluster_start(guest.start);
        self.change_map(Some(first..first + self.geometry.cluster_bytes()), true, |state| {
            // Someone else's write may have made it writable meanwhile; what is being zeroed is left alone.
            let part = self.settle_flags(&state.in_flight.part_before(&guest))?;
            let pin = self.epochs.pin();
            if let Some(plan) = self.in_place(&part, true)? {
                return Ok((WriteToken(IN_PLACE | pin.into_epoch()), plan));
            }
            drop(pin);
            self.prepare_locked(state, guest.clone())
        })
    }

    /// Makes a change that concerns `clusters` (guest bytes; `None` where the caller has them in flight) with the state
    /// held: none of them in flight, and no drain due. `change` undoes itself when it fails, and may be called again
    /// when it failed because of a drain. With `allocates` a drain is due as well when much space waits to be used
    /// again.
    pub(super) fn change_map<T>(
        &self,
        clusters: Option<Range<u64>>,
        allocates: bool,
        mut change: impl FnMut(&mut State) -> Result<T>,
    ) -> Result<T> {
        let mut state = self.state();
        loop {
            if clusters.as_ref().is_some_and(|clusters| state.in_flight.overlaps(clusters)) {
                state = self.landed.wait(state);
            } else if self.is_drain_due(&state, allocates) {
                self.drain_when(state, |state| self.is_drain_due(state, allocates))?;
                state = self.state();
            } else {
                let result = change(&mut state);
                if result.is_ok() || !std::mem::take(&mut state.stalled) {
                    return result;
                }
                state = self.wait_until_quiet(state);
            }
        }
    }

    /// The plan of a write over what is there; `None` when the first cluster cannot be written so, or not all of them
    /// are known to be counted once. Where the flags are [settled](Self::settle_flags) that is not asked.
    fn in_place(&self, guest: &Range<u64>, is_settled: bool) -> Result<Option<WritePlan>> {
        let geometry = self.geometry;
        let root = self.root();
        let mut start = None;
        let mut at = guest.start;
        while at < guest.end {
            let end = (geometry.cluster_start(at) + geometry.cluster_bytes()).min(guest.end);
            let Some(found) = self.map.l2_entry(root, at)? else { break };
            let Way::InPlace(host) = self.way(found, &(at..end))? else { break };
            let host = host + geometry.in_cluster(at);
            if host != *start.get_or_insert(host) + (at - guest.start) {
                break;
            }
            at = end;
        }
        let Some(host) = start.filter(|_| at > guest.start) else { return Ok(None) };
        let guest_bytes = guest.start..at;
        let may_overwrite = self.may_overwrite(&(host..host + (at - guest.start)))?;
        let plan = || WritePlan::in_place(guest_bytes, self.map.data_file(), HostOffset(host));
        Ok((may_overwrite || is_settled).then(plan))
    }

    pub(super) fn check_data_write(&self, host: &Range<u64>) -> Result<()> {
        if self.geometry.external_data { Ok(()) } else { self.check_overlap(host, None) }
    }

    /// How the part `guest` of one cluster can be written, by its entry.
    pub(super) fn way(&self, found: Found, guest: &Range<u64>) -> Result<Way> {
        let cluster = self.map.checked(found, self.geometry.cluster_start(guest.start))?;
        let copied = found.entry.is_copied();
        Ok(match cluster {
            Cluster::Standard { at } if copied => Way::InPlace(at),
            Cluster::Zero { reserved: Some(at) } if copied => Way::Reuse(at),
            Cluster::Subclusters { at: Some(at), allocated, .. } if copied => {
                let touched = self.subclusters_of(guest);
                if allocated & touched == touched { Way::InPlace(at) } else { Way::Reuse(at) }
            }
            _ => Way::Fresh,
        })
    }

    /// The subclusters that a range inside one cluster touches.
    pub(super) fn subclusters_of(&self, guest: &Range<u64>) -> u32 {
        let sub = self.geometry.subcluster_bytes();
        let start = self.geometry.cluster_start(guest.start);
        mask((guest.start - start) / sub..(guest.end - start).div_ceil(sub))
    }

    /// Prepares a write whose first cluster is not in flight and cannot be written in place.
    fn prepare_locked(&self, state: &mut State, guest: Range<u64>) -> Result<(WriteToken, WritePlan)> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_bytes();
        self.before_allocating(state)?;
        let table = self.table_for_writing(state, geometry.l1_index(guest.start))?;

        let table_end = (geometry.l1_index(guest.start) + 1).saturating_mul(geometry.l2_span_bytes());
        let limit = guest.end.min(table_end);
        let entry_of = |start| self.map.entry_at(table, geometry.l2_index(start));
        let alike = self.alike(state, guest.start..limit, entry_of)?;
        let alike = alike.expect("the first cluster is not in flight");
        let Shape { clusters, fill, kind } = self.shape(&alike)?;
        let Alike { way, guest, .. } = alike;
        let first = clusters.start;
        let count = (clusters.end - clusters.start) / cluster;
        let fill_before_bytes = guest.start.saturating_sub(fill.start);
        let fill_after_bytes = fill.end.saturating_sub(guest.end);

        let host = match way {
            Way::Reuse(host) => {
                self.check_data_write(&(host..host + count * cluster))?;
                host
            }
            _ if geometry.external_data => first,
            _ => {
                let host = self.allocate_searching(state, count)?;
                self.note_counted_once(self.clusters_of(&(host..host + count * cluster)));
                host
            }
        };
        let data = if geometry.external_data {
            self.data_file.as_ref().expect("opened for writing")
        } else {
            self.storage()
        };
        let fills = fill_before_bytes + fill_after_bytes > 0;
        let fill_is_zeroed = fills && way == Way::Fresh && host >= data.len_bytes()?;
        let at = HostOffset(host + (guest.start - first));
        let token = state.begin(Write { clusters, host, kind, also: None });
        let file = self.map.data_file();
        let step =
            WriteStep { guest_bytes: guest, file, at, fill_before_bytes, fill_after_bytes, maps: fill };
        Ok((token, WritePlan { step, fill_is_zeroed }))
    }

    /// The longest prefix of a range inside one L2 table that can be written alike, by the entries that `entry_of`
    /// finds for the starts of clusters; `None` where the first cluster is in flight.
    pub(super) fn alike(
        &self,
        state: &State,
        guest: Range<u64>,
        entry_of: impl Fn(u64) -> Result<Found>,
    ) -> Result<Option<Alike>> {
        let geometry = self.geometry;
        let first_start = geometry.cluster_start(guest.start);
        let mut alike: Option<Alike> = None;
        let mut at = guest.start;
        while at < guest.end {
            let start = geometry.cluster_start(at);
            let end = (start + geometry.cluster_bytes()).min(guest.end);
            if state.in_flight.overlaps(&(start..start + geometry.cluster_bytes())) {
                break;
            }
            let found = entry_of(start)?;
            let here = self.way(found, &(at..end))?;
            let so_far =
                alike.get_or_insert(Alike { guest: guest.start..at, way: here, first: found, last: found });
            if here != so_far.way.further_on(start - first_start) {
                break;
            }
            so_far.last = found;
            so_far.guest.end = end;
            at = end;
        }
        Ok(alike)
    }

    /// The clusters of a write, and what of them stands written afterwards.
    pub(super) fn shape(&self, alike: &Alike) -> Result<Shape> {
        let Alike { guest, way, first, last } = alike;
        let cluster = self.geometry.cluster_bytes();
        let start = self.geometry.cluster_start(guest.start);
        let clusters = start..self.geometry.cluster_start(guest.end - 1) + cluster;
        let is_fresh = *way == Way::Fresh;
        // What has to be filled, in the first and in the last cluster.
        let first_end = guest.end.min(start + cluster);
        let last_start = guest.start.max(clusters.end - cluster);
        let first_fill = self.filled(*first, &(guest.start..first_end), is_fresh)?;
        let last_fill = self.filled(*last, &(last_start..guest.end), is_fresh)?;
        let first_mask = self.subclusters_of(&first_fill);
        let last_mask = self.subclusters_of(&last_fill);
        let (first, last) = if clusters.end - clusters.start == cluster {
            let both = first_mask | last_mask;
            (both, both)
        } else {
            (first_mask, last_mask)
        };
        let kind = if is_fresh { WriteKind::Fresh { first, last } } else { WriteKind::Reuse { first, last } };
        Ok(Shape { clusters, fill: first_fill.start..last_fill.end, kind })
    }

    /// The part of a cluster that stands written after a write of `guest` in it: fills included.
    fn filled(&self, found: Found, guest: &Range<u64>, is_fresh: bool) -> Result<Range<u64>> {
        let geometry = self.geometry;
        let start = geometry.cluster_start(guest.start);
        let whole = start..start + geometry.cluster_bytes();
        if !geometry.extended_l2 {
            return Ok(whole);
        }
        let sub = geometry.subcluster_bytes();
        let touched = (guest.start - start) / sub..(guest.end - start).div_ceil(sub);
        let cluster = self.map.checked(found, start)?;
        let (allocated, is_compressed) = match cluster {
            Cluster::Standard { .. } => (u32::MAX, false),
            Cluster::Subclusters { allocated, .. } => (allocated, false),
            Cluster::Compressed { .. } => (0, true),
            Cluster::Unallocated | Cluster::Zero { .. } => (0, false),
        };
        if is_compressed {
            return Ok(whole);
        }
        let (mut first, mut last) = (touched.start, touched.end);
        if is_fresh {
            // What was allocated moves along.
            if allocated != 0 {
                first = first.min(u64::from(allocated.trailing_zeros()));
                last = last.max(u64::from(32 - allocated.leading_zeros()));
            }
            return Ok(start + first * sub..start + last * sub);
        }
        // A subcluster that is there needs no filling.
        let is_there = |index: u64| allocated >> index & 1 == 1;
        let from = if is_there(first) { guest.start } else { start + first * sub };
        let to = if is_there(last - 1) { guest.end } else { start + last * sub };
        Ok(from..to)
    }

    /// Host offset of the L2 table of an L1 index, which nobody else refers to: made or copied where needed.
    pub(super) fn table_for_writing(&self, state: &mut State, l1_index: u64) -> Result<u64> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_bytes();
        let root = self.root();
        let entry = self.map.l1_entry(root, l1_index)?;
        let old = self.map.checked_table(root, l1_index, entry)?;
        if let Some(table) = old
            && entry.is_copied()
        {
            match self.look_at_count(table >> geometry.cluster_bits)? {
                0 => {
                    let expected = "a table that is in use by its count, which is 0";
                    return Err(self.map.corrupt("L1 entry", root.l1_offset + l1_index * 8, expected, table));
                }
                1 => return Ok(table),
                // A snapshot uses it too, whatever the flag says.
                _ => {}
            }
        }
        let table = self.allocate_searching(state, 1)?;
        let result = self.fill_table(table, old).and_then(|()| {
            self.map.l1.update(self.image_file(), root.l1_offset + l1_index * 8, |bytes, within| {
                bytes[within..within + 8].copy_from_slice(&(table | COPIED).to_be_bytes());
            })
        });
        if let Err(error) = result {
            self.map.l2.forget(table..table + cluster);
            self.unallocate(state, table..table + cluster)?;
            return Err(error);
        }
        state.new_tables.insert(table);
        // In this order: a hostile entry that names the table as data is refused before it could be believed.
        self.note_place(Kind::ActiveL2, table..table + cluster);
        self.note_counted_once(self.clusters_of(&(table..table + cluster)));
        if let Some(old) = old {
            self.forget_place(Kind::ActiveL2, old..old + cluster);
            let freed = Freed::clusters(old..old + cluster, self.runtime.discard_other);
            state.free(freed.shared());
        }
        Ok(table)
    }

    /// Puts the entries of `old`, or none, into a new table. Whoever shares the old table shares what it names: no
    /// entry of the new one has the copied flag.
    fn fill_table(&self, table: u64, old: Option<u64>) -> Result<()> {
        let cluster = self.geometry.cluster_bytes();
        let l2 = &self.map.l2;
        l2.forget(table..table + cluster);
        l2.fill_with_zeroes(table..table + cluster);
        let Some(old) = old else { return Ok(()) };
        let mut bytes = Vec::new();
        self.map.read_table(old, &mut bytes)?;
        for (index, piece) in bytes.chunks_exact(usize_of(l2.slice_bytes())).enumerate() {
            let at = table + index as u64 * l2.slice_bytes();
            l2.update(self.image_file(), at, |slice, _| {
                slice.copy_from_slice(piece);
                for entry in slice.chunks_exact_mut(usize_of(self.geometry.l2_entry_bytes())) {
                    entry[0] &= !COPIED_BYTE;
                }
            })?;
        }
        Ok(())
    }

    /// Changes the entry of a guest cluster in its table.
    pub(super) fn set_entry(&self, table: u64, guest: u64, entry: L2Entry) -> Result<()> {
        let geometry = self.geometry;
        let at = table + geometry.l2_index(guest) * geometry.l2_entry_bytes();
        self.map.l2.update(self.image_file(), at, |bytes, within| {
            entry.write(bytes, within / usize_of(geometry.l2_entry_bytes()), geometry);
        })
    }

    /// Gives up what an entry referred to.
    pub(super) fn free_entry(&self, state: &mut State, entry: L2Entry, cluster: Cluster, punch: bool) {
        if let Some((host, in_data_file)) = self.place_of(cluster) {
            // Compressed clusters never have the flag.
            let is_shared = !entry.is_copied() && !matches!(cluster, Cluster::Compressed { .. });
            state.free(Freed { host, in_data_file, punch, is_shared });
        }
    }

    /// Refuses to give up what an entry refers to where a table stands there: its space would be punched out
    /// and given to someone else.
    pub(super) fn check_given_up(&self, cluster: Cluster) -> Result<()> {
        match self.place_of(cluster) {
            Some((host, false)) => self.check_overlap(&host, None),
            Some((_, true)) | None => Ok(()),
        }
    }

    /// The host clusters that an entry refers to, and whether they are in the external data file.
    fn place_of(&self, cluster: Cluster) -> Option<(Range<u64>, bool)> {
        Some(match cluster {
            Cluster::Unallocated
            | Cluster::Zero { reserved: None }
            | Cluster::Subclusters { at: None, .. } => return None,
            Cluster::Standard { at }
            | Cluster::Zero { reserved: Some(at) }
            | Cluster::Subclusters { at: Some(at), .. } => {
                (at..at + self.geometry.cluster_bytes(), self.geometry.external_data)
            }
            Cluster::Compressed { at, stored_bytes } => {
                let touched = self.clusters_of(&(at..at + u64::from(stored_bytes)));
                let bits = self.geometry.cluster_bits;
                (touched.start << bits..touched.end << bits, false)
            }
        })
    }

    /// Whether so much was changed or freed in memory that it must be written before there is more; see
    /// [`Self::change_map`].
    pub(super) fn is_drain_due(&self, state: &State, allocates: bool) -> bool {
        let l2_full = self.map.l2.dirty_bytes() >= self.runtime.l2_cache_bytes / 2;
        let counts_full = self.refcount_blocks.dirty_bytes() >= self.runtime.refcount_cache_bytes;
        l2_full || counts_full || state.is_full(allocates)
    }
}

/// A subcluster bitmap.
pub(super) fn bitmap(allocated: u32, zero: u32) -> u64 {
    u64::from(zero) << 32 | u64::from(allocated)
}

/// Bits `range` of a word.
pub(super) fn mask(range: Range<u64>) -> u32 {
    let below = |bits: u64| if bits >= 32 { u32::MAX } else { (1 << bits) - 1 };
    below(range.end) & !below(range.start)
}

impl State {
    /// Whether a prepared write covers a part of `guest`, in whole clusters.
    pub(super) fn is_in_flight(&self, guest: Range<u64>) -> bool {
        self.in_flight.overlaps(&guest)
    }

    /// Notes a prepared write.
    pub(super) fn begin(&mut self, write: Write) -> WriteToken {
        let token = self.next_token;
        self.next_token += 1;
        self.in_flight.insert(&write.clusters);
        self.writes.insert(token, write);
        WriteToken(token)
    }

    /// Takes a prepared write that ends.
    pub(super) fn end(&mut self, token: WriteToken) -> Write {
        let write = self.writes.remove(&token.0).expect("each prepared write ends once");
        self.in_flight.remove(&write.clusters);
        write
    }
}

impl LayerWriter for Qcow2Layer {
    fn prepare_write(&self, guest_bytes: Range<u64>) -> Result<PreparedWrite<'_>> {
        self.before_guest_change()?;
        let (token, plan) = self.guard(self.prepare(guest_bytes))?;
        self.note_change(&plan.step.guest_bytes);
        Ok(PreparedWrite::new(self, token, plan))
    }

    fn prepare_compressed(&self, guest_offset: u64, stored_bytes: u32) -> Result<PreparedWrite<'_>> {
        self.before_guest_change()?;
        let (token, plan) = self.guard(self.prepare_packed(guest_offset, stored_bytes))?;
        self.note_change(&plan.step.guest_bytes);
        Ok(PreparedWrite::new(self, token, plan))
    }

    fn try_prepare_write(
        &self,
        guest_bytes: Range<u64>,
        below: &dyn Fn(Range<u64>) -> Below,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<Option<WriteToken>>> {
        self.try_prepare(&guest_bytes, below, steps)
    }

    fn try_commit_write(&self, token: WriteToken) -> Option<WriteToken> {
        self.try_commit(token)
    }

    fn commit_write(&self, token: WriteToken) -> Result<()> {
        self.guard(self.commit(token))
    }

    fn abort_write(&self, token: WriteToken) {
        self.abort(token);
    }

    fn zero_granularity_bytes(&self) -> u64 {
        self.geometry.subcluster_bytes()
    }

    fn write_zeroes(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<bool> {
        self.before_guest_change()?;
        let result = self.guard(self.zero(guest_bytes.clone(), may_unmap));
        // One that failed may have changed a part.
        if !matches!(result, Ok(false)) {
            self.note_change(&guest_bytes);
        }
        result
    }

    fn set_backing(&self, backing: Option<&Backing>) -> Result<()> {
        self.guard(self.record_backing(backing))
    }

    fn amend(&self, wanted: &OptionSet, progress: &mut dyn FnMut(u64, u64)) -> Result<Amended> {
        self.guard(self.amend_options(wanted, progress))
    }

    fn make_empty(&self) -> Result<bool> {
        self.before_guest_change()?;
        let guest = 0..self.virtual_size_bytes();
        self.note_change(&guest);
        self.guard(self.forget_all(guest)).map(|()| true)
    }

    fn discard(&self, guest_bytes: Range<u64>) -> Result<()> {
        self.before_guest_change()?;
        self.note_change(&guest_bytes);
        self.guard(self.discard_range(guest_bytes))
    }

    fn flush(&self) -> Result<()> {
        self.drain()
    }

    fn files_to_sync(&self) -> Option<&'static [HostFile]> {
        self.is_drained().then_some(if self.data_file.is_some() {
            &[DATA_FILE, HostFile::IMAGE]
        } else {
            &[HostFile::IMAGE]
        })
    }

    fn keep_off_what_is_there(&self, keeps_off: bool) -> Result<()> {
        self.keep_off_what_is_there(keeps_off);
        Ok(())
    }

    fn prepare_growth(&self, virtual_size_bytes: u64) -> Result<bool> {
        self.before_resize()?;
        self.guard(self.reach_behind(virtual_size_bytes)).map(|()| true)
    }

    fn resize(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.before_resize()?;
        let result = self.guard(self.change_size(virtual_size_bytes, preallocation, false));
        self.after_resize();
        result
    }

    fn grow_mapped(&self, virtual_size_bytes: u64) -> Result<()> {
        self.before_resize()?;
        let result = self.guard(self.change_size(virtual_size_bytes, Preallocation::Off, true));
        self.after_resize();
        result
    }

    fn close(&self) -> Result<()> {
        let mut state = self.quiet_state();
        let stored = self.store_tracked(&mut state);
        let finished = self.finish(&mut state);
        self.guard(finished.and(stored))
    }
}
