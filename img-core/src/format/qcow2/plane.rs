//! Writes that are prepared from memory alone, for threads that must not wait.
//!
//! What is in the caches is enough for most writes: over what is there, or to new clusters, where the L2 table is
//! there, unshared, and cached, and so are the counts around the free index; over what is there once its count has been
//! looked at. What is around the bytes of a write in its clusters is filled by whoever moves the bytes, where the map
//! knows in which places it stands. Anything else (a table to be made, copied or read, a cluster to be decoded, a drain
//! that is due, the dirty bit of lazy refcounts, a lock that is held) is left to [`Qcow2Layer::prepare`], which may
//! wait. The order of a crash is that of all writes: counts and entries change in memory here, and a drain makes them
//! durable one before the other.

use std::{ops::Range, sync::atomic::Ordering};

use super::{
    alloc::State,
    entry::{Cluster, L2Entry},
    feature::incompatible,
    geometry::{refcount_get, refcount_set},
    layer::Qcow2Layer,
    map::Found,
    refcount::usize_of,
    write::{Alike, Shape, Way, Write},
};
use crate::{
    Result,
    format::{Attempt, Below, HostOffset, Layer, WriteStep, WriteToken},
};

/// So many slices of counts are searched for free clusters: 8192 counts of two bytes.
const SEARCHED_SLICES: u32 = 4;

/// Says from memory what the layers below have in a guest range.
type AskBelow<'a> = dyn Fn(Range<u64>) -> Below + 'a;

/// A prefix of a write.
struct Piece {
    step: WriteStep,
    /// What it changes of the map when it is committed.
    write: Option<Write>,
}

impl Qcow2Layer {
    pub(super) fn try_prepare(
        &self,
        guest: &Range<u64>,
        below: &AskBelow<'_>,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<Option<WriteToken>>> {
        self.check_writable()?;
        // Noted even if nothing comes of it: whoever does the write instead notes it again.
        if !self.places_known.load(Ordering::Acquire) || !self.try_note_change(guest) {
            return Ok(Attempt::Blocks);
        }
        let known = steps.len();
        match self.steps_in_place(guest, steps)? {
            None => return Ok(Attempt::Blocks),
            Some(true) if !self.is_zeroing() => return Ok(Attempt::Done(None)),
            Some(_) => steps.truncate(known),
        }
        let Some(mut state) = self.try_state() else { return Ok(Attempt::Blocks) };
        self.reserve(&mut state, guest, below, steps)
    }

    /// Whether all of a range can be written over what is there: then the steps that do it are appended. `None`
    /// when the caches do not tell.
    fn steps_in_place(&self, guest: &Range<u64>, steps: &mut Vec<WriteStep>) -> Result<Option<bool>> {
        let known = steps.len();
        let over = WriteStep::over_what_is_there(guest, steps, |found| {
            self.map.map_cached(self.root(), guest.clone(), found)
        })?;
        if over == Some(true) {
            for step in &steps[known..] {
                if !self.may_overwrite(&step.host_bytes())? {
                    return Ok(None);
                }
            }
        }
        Ok(over)
    }

    /// All of a range, piece by piece; or nothing.
    fn reserve(
        &self,
        state: &mut State,
        guest: &Range<u64>,
        below: &AskBelow<'_>,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<Option<WriteToken>>> {
        let geometry = self.geometry;
        let last_end = geometry.cluster_start(guest.end - 1) + geometry.cluster_bytes();
        if state.in_flight.overlaps(&(geometry.cluster_start(guest.start)..last_end)) {
            return Ok(Attempt::Busy);
        }
        if self.is_drain_due(state, true) || self.has_releasable(state) || self.lacks_dirty_bit() {
            return Ok(Attempt::Blocks);
        }
        let mut at = guest.start;
        let mut chain = None;
        while at < guest.end {
            match self.piece(state, at..guest.end, below) {
                Ok(Some(Piece { step, write })) => {
                    at = step.guest_bytes.end;
                    step.push_to(steps);
                    if let Some(write) = write {
                        chain = Some(state.begin(Write { also: chain, ..write }).0);
                    }
                }
                failed => {
                    if let Some(token) = chain {
                        // What was just counted is in the cache still: this does no I/O.
                        self.give_up(state, WriteToken(token))?;
                    }
                    return failed.map(|_| Attempt::Blocks);
                }
            }
        }
        Ok(Attempt::Done(chain.map(WriteToken)))
    }

    /// The longest prefix of a range that is written alike and stands in one slice of L2 entries. `None` when that
    /// takes more than memory.
    fn piece(&self, state: &mut State, guest: Range<u64>, below: &AskBelow<'_>) -> Result<Option<Piece>> {
        let (geometry, root) = (self.geometry, self.root());
        let l1_index = geometry.l1_index(guest.start);
        let Some(entry) = self.map.cached_l1_entry(root, l1_index) else { return Ok(None) };
        let Some(table) = self.map.checked_table(root, l1_index, entry)? else { return Ok(None) };
        if !entry.is_copied() {
            return Ok(None);
        }
        let entry_bytes = geometry.l2_entry_bytes();
        let first_at = table + geometry.l2_index(guest.start) * entry_bytes;
        let Some((slice, within)) = self.map.l2.peek_at(first_at) else { return Ok(None) };
        let alike = {
            let start = geometry.cluster_start(guest.start);
            let entries = (slice.len() - within) as u64 / entry_bytes;
            let limit = guest.end.min(start.saturating_add(entries * geometry.cluster_bytes()));
            self.alike(state, guest.start..limit, |at| {
                let index = (at - start) / geometry.cluster_bytes();
                let entry = L2Entry::read(&slice[within..], usize_of(index), geometry);
                Ok(Found { entry, at: first_at + index * entry_bytes })
            })?
        };
        let Some(alike) = alike else { return Ok(None) };
        let in_first = geometry.in_cluster(alike.guest.start);
        let in_place = |host: u64| {
            WriteStep::in_place(alike.guest.clone(), self.map.data_file(), HostOffset(host + in_first))
        };
        if let Way::InPlace(host) = alike.way {
            let at = host + in_first;
            let may_overwrite = self.may_overwrite(&(at..at + (alike.guest.end - alike.guest.start)))?;
            return Ok(may_overwrite.then(|| Piece { step: in_place(host), write: None }));
        }
        if !self.is_counted_once(table >> geometry.cluster_bits) {
            return Ok(None);
        }
        let Shape { clusters, fill, kind } = self.shape(&alike)?;
        let Some((host, is_filled)) = self.place(state, &alike, &clusters, &fill, below)? else {
            return Ok(None);
        };
        let (fill_before_bytes, fill_after_bytes) =
            if is_filled { (alike.guest.start - fill.start, fill.end - alike.guest.end) } else { (0, 0) };
        let step = WriteStep { maps: fill, fill_before_bytes, fill_after_bytes, ..in_place(host) };
        Ok(Some(Piece { step, write: Some(Write { clusters, host, kind, also: None }) }))
    }

    /// Finds host clusters for a write that is not in place, and says whether what is around it has to be written.
    fn place(
        &self,
        state: &mut State,
        alike: &Alike,
        clusters: &Range<u64>,
        fill: &Range<u64>,
        below: &AskBelow<'_>,
    ) -> Result<Option<(u64, bool)>> {
        let geometry = self.geometry;
        let (before, after) = (fill.start..alike.guest.start, alike.guest.end..fill.end);
        let needs_fill = !before.is_empty() || !after.is_empty();
        let fills = [(alike.first, before), (alike.last, after)];
        let mut is_zero = true;
        for (found, fill) in fills {
            match self.around(found, fill, below)? {
                Below::Zeroes => {}
                Below::Plain => is_zero = false,
                Below::Unknown => return Ok(None),
            }
        }
        let length = clusters.end - clusters.start;
        match alike.way {
            // Old bytes stand there, or may.
            Way::Reuse(host) => Ok(self.may_overwrite(&(host..host + length))?.then_some((host, needs_fill))),
            _ if geometry.external_data => Ok(Some((clusters.start, needs_fill))),
            _ => {
                let known_end = self.end_bytes.load(Ordering::Relaxed);
                let host = self.allocate_cached(state, length >> geometry.cluster_bits)?;
                // Behind the end the host has never held anything.
                Ok(host.map(|host| (host, needs_fill && !(is_zero && host >= known_end))))
            }
        }
    }

    /// What the map knows of a part of a cluster that is not written by the guest.
    fn around(&self, found: Found, fill: Range<u64>, below: &AskBelow<'_>) -> Result<Below> {
        // Behind the end of the disk there is nothing to keep.
        let fill = fill.start..fill.end.min(self.virtual_size_bytes());
        if fill.is_empty() {
            return Ok(Below::Zeroes);
        }
        Ok(match self.map.checked(found, self.geometry.cluster_start(fill.start))? {
            Cluster::Zero { .. } => Below::Zeroes,
            Cluster::Standard { .. } => Below::Plain,
            Cluster::Compressed { .. } => Below::Unknown,
            Cluster::Unallocated | Cluster::Subclusters { allocated: 0, .. } => below(fill),
            // Some of it stands here.
            Cluster::Subclusters { .. } => match below(fill) {
                Below::Zeroes | Below::Plain => Below::Plain,
                Below::Unknown => Below::Unknown,
            },
        })
    }

    /// Allocates clusters in a row, with a count of one each in memory, where counts in the cache tell which are
    /// free. `None` when that is not to be had.
    fn allocate_cached(&self, state: &mut State, count: u64) -> Result<Option<u64>> {
        let bits = self.geometry.cluster_bits;
        let Some(first) = self.find_free_cached(state, count)? else { return Ok(None) };
        let host = first << bits..(first + count) << bits;
        self.check_overlap(&host, None)?;
        let Some((at, index)) = self.cached_refcount_place(first)? else { return Ok(None) };
        let order = self.geometry.refcount_order;
        let counted = self.refcount_blocks.update_cached(at, |bytes, _| {
            for index in index..index + usize_of(count) {
                refcount_set(bytes, order, index, 1);
            }
        });
        if counted.is_none() {
            return Ok(None);
        }
        self.note_counted_once(first..first + count);
        state.barrier = true;
        state.search_on_from(first + count);
        self.note_allocated(host.end);
        Ok(Some(host.start))
    }

    /// The first run of `count` free clusters behind the free index whose counts stand in one cached slice. Passes
    /// over slices without a free cluster, but over no free run that is too short and may go on in the next slice.
    fn find_free_cached(&self, state: &State, count: u64) -> Result<Option<u64>> {
        let order = self.geometry.refcount_order;
        let mut slice_first = state.search_start();
        for _ in 0..SEARCHED_SLICES {
            let Some((at, index)) = self.cached_refcount_place(slice_first)? else { return Ok(None) };
            let Some((slice, _)) = self.refcount_blocks.peek_at(at) else { return Ok(None) };
            let per_slice = (slice.len() * 8) >> order;
            let mut start = index;
            for here in index..per_slice {
                if refcount_get(&slice, order, here) != 0 {
                    start = here + 1;
                } else if here + 1 - start >= usize_of(count) {
                    return Ok(Some(slice_first + (start - index) as u64));
                }
            }
            if start < per_slice {
                return Ok(None);
            }
            slice_first += (per_slice - index) as u64;
        }
        Ok(None)
    }

    /// Whether the bit that lazy refcounts need is still to be set.
    fn lacks_dirty_bit(&self) -> bool {
        self.is_lazy() && self.header().incompatible & incompatible::DIRTY == 0
    }
}
