//! Where new clusters live, and when old ones may be used again.
//!
//! Clusters are given out first fit from a moving index, as the reference does, so that images are laid
//! out alike. A freed cluster goes through three stages: *pending* while a table on disk may still refer
//! to it, *limbo* while someone may still hold a map answer that names it, and then its count goes down, its
//! space is given back to the host, and the index moves down to it.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ops::Range,
    sync::atomic::Ordering,
};

use super::{
    counts::{next_free, next_used},
    geometry::Geometry,
    layer::Qcow2Layer,
    overlap::Kind,
    refcount::{Counted, usize_of},
    write::Write,
};
use crate::{Error, Result, format::in_flight::GuestRanges};

/// Rather than allocating while this many bytes wait to become free, they are made free.
const PENDING_LIMIT_BYTES: u64 = 64 << 20;
/// So many separate runs that wait to become free are made free, to bound the memory they take.
const PENDING_LIMIT_RUNS: usize = 1 << 18;
/// When so many separate runs wait for leases to end, they are joined, to bound the memory they take ...
const LIMBO_LIMIT_RUNS: usize = 1 << 18;
/// ... and no more are kept than these. What was given up beyond stays counted: a leak, which `check` gives back.
const LIMBO_KEPT_RUNS: usize = 1 << 17;
/// So many clusters in use behind the end of the file are not what a crash leaves: counts are made up.
const MAX_LOST_CLUSTERS: u64 = 1 << 26;
/// Host offsets have 56 bits.
const HOST_LIMIT_BYTES: u64 = 1 << 56;

/// What the changing side of an image knows; one lock around it all.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The search for free clusters starts here. No cluster below it is free.
    pub(super) free_index: u64,
    /// No cluster below it is given out, free or not; 0 where all may be. See [`Self::search_start`].
    pub(super) floor: u64,
    /// Where the next compressed cluster may start, inside a cluster that is partly filled; 0 for none.
    pub(super) free_byte: u64,
    /// What no table in memory refers to any more, while those on disk still may.
    pub(super) pending: Vec<Freed>,
    pending_bytes: u64,
    /// What no table refers to, while someone may still have a map answer of the epoch or an earlier one.
    pub(super) limbo: VecDeque<(u64, Vec<Freed>)>,
    /// L2 tables that L1 on disk does not refer to yet.
    pub(super) new_tables: HashSet<u64>,
    /// Tables in memory refer to data or counts that may not be durable.
    pub(super) barrier: bool,
    /// Drains that have begun since the image was opened.
    pub(super) drains_begun: u64,
    /// The number of the last drain that made its generation durable.
    pub(super) drained: u64,
    /// A drain writes and syncs without the state lock.
    pub(super) draining: bool,
    /// A change failed only because a drain runs. Whoever made it tries again when that has ended.
    pub(super) stalled: bool,
    /// Prepared writes by token.
    pub(super) writes: HashMap<u64, Write>,
    /// Guest ranges of prepared writes, in whole clusters.
    pub(super) in_flight: GuestRanges,
    pub(super) next_token: u64,
}

/// A run of bytes that is given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    pub(super) host: Range<u64>,
    /// Guest data in the external file, which has no counts.
    pub(super) in_data_file: bool,
    /// Give the space back to the host when the count reaches zero.
    pub(super) punch: bool,
    /// The reference had no copied flag: by its own word others refer to it too, so the last count is not this
    /// one's to take. An image whose counts deny that keeps a leak, not a reference to what is free.
    pub(super) is_shared: bool,
}

impl Freed {
    /// Clusters of the image file, each of which loses one reference.
    pub(super) fn clusters(host: Range<u64>, punch: bool) -> Self {
        Self { host, in_data_file: false, punch, is_shared: false }
    }
}

impl Freed {
    /// What lost one reference of many.
    pub(super) fn shared(self) -> Self {
        Self { is_shared: true, ..self }
    }

    /// Whether all but the place is the same.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let kind = |freed: &Self| (freed.in_data_file, freed.punch, freed.is_shared);
        kind(self) == kind(other)
    }
}

impl State {
    /// Where to look for free clusters: there are none before it, or none that may be given out.
    pub(super) fn search_start(&self) -> u64 {
        self.free_index.max(self.floor)
    }

    /// The next search starts at `next`, for which all from [`Self::search_start`] on was looked at.
    pub(super) fn search_on_from(&mut self, next: u64) {
        // What is free below the floor is found when that is gone.
        let start = if self.floor > self.free_index { &mut self.floor } else { &mut self.free_index };
        *start = next;
    }

    /// Gives up a run. It can be used again after the next drain.
    pub(super) fn free(&mut self, freed: Freed) {
        self.pending_bytes += freed.host.end - freed.host.start;
        if let Some(last) = self.pending.last_mut()
            && last.host.end == freed.host.start
            && last.is_like(&freed)
        {
            last.host.end = freed.host.end;
            return;
        }
        self.pending.push(freed);
    }

    /// Keeps what a drain has made unreachable until the leases of `epoch` and before are gone. While the oldest
    /// of them is held no further epochs end, so that all but a few lists are one.
    pub(super) fn wait_for_leases(&mut self, epoch: u64, freed: Vec<Freed>) {
        match self.limbo.back_mut() {
            Some((last, waiting)) if *last == epoch => waiting.extend(freed),
            _ => self.limbo.push_back((epoch, freed)),
        }
        if self.limbo_runs() > LIMBO_LIMIT_RUNS {
            for (_, waiting) in &mut self.limbo {
                merge(waiting);
            }
            let mut excess = self.limbo_runs().saturating_sub(LIMBO_KEPT_RUNS);
            for (_, waiting) in self.limbo.iter_mut().rev() {
                let cut = excess.min(waiting.len());
                waiting.truncate(waiting.len() - cut);
                excess -= cut;
            }
        }
    }

    fn limbo_runs(&self) -> usize {
        self.limbo.iter().map(|(_, waiting)| waiting.len()).sum()
    }

    /// Takes all that is pending.
    pub(super) fn take_pending(&mut self) -> Vec<Freed> {
        self.pending_bytes = 0;
        std::mem::take(&mut self.pending)
    }

    /// Starts the next compressed cluster elsewhere than in a cluster that is to be free.
    pub(super) fn forget_free_byte(&mut self, cluster: u64, geometry: Geometry) {
        if self.free_byte >> geometry.cluster_bits == cluster {
            self.free_byte = 0;
        }
    }

    /// Whether so much is pending that a drain is due, or is due before anything is allocated.
    pub(super) fn is_full(&self, allocates: bool) -> bool {
        self.pending.len() >= PENDING_LIMIT_RUNS || (allocates && self.pending_bytes >= PENDING_LIMIT_BYTES)
    }
}

/// Joins runs that continue each other. One that was given up twice stays twice.
fn merge(freed: &mut Vec<Freed>) {
    freed.sort_by_key(|freed| (freed.in_data_file, freed.host.start));
    freed.dedup_by(|next, last| {
        let joins = last.host.end == next.host.start && last.is_like(next);
        if joins {
            last.host.end = next.host.end;
        }
        joins
    });
}

impl Qcow2Layer {
    /// Allocates `count` clusters in a row, with a count of one each in memory, and returns the first one's
    /// host offset.
    pub(super) fn allocate_clusters(&self, count: u64) -> Result<u64> {
        self.check_writable()?;
        let mut state = self.state();
        self.guard(self.allocate(&mut state, count))
    }

    /// Gives up one reference to each of `count` clusters. They are used again only after a drain.
    pub(super) fn free_clusters(&self, host_offset: u64, count: u64) {
        let host = host_offset..host_offset + count * self.geometry.cluster_bytes();
        self.state().free(Freed::clusters(host, self.runtime.discard_other));
    }

    /// [`Self::allocate_clusters`] for those who hold the state.
    pub(super) fn allocate(&self, state: &mut State, count: u64) -> Result<u64> {
        self.before_allocating(state)?;
        self.allocate_searching(state, count)
    }

    /// The search itself; see [`Self::before_allocating`].
    pub(super) fn allocate_searching(&self, state: &mut State, count: u64) -> Result<u64> {
        loop {
            let first = self.find_free(state, count)?;
            let host = self.host_range(first, count)?;
            self.check_overlap(&host, None)?;
            if self.count_up(state, first..first + count)? == Counted::Done {
                self.note_allocated(host.end);
                return Ok(host.start);
            }
        }
    }

    /// What precedes every allocation: known places, the dirty bit of lazy refcounts, released clusters.
    pub(super) fn before_allocating(&self, state: &mut State) -> Result<()> {
        self.know_places()?;
        if self.is_lazy() {
            self.set_dirty()?;
        }
        self.release(state)
    }

    /// Undoes an allocation that nothing refers to.
    pub(super) fn unallocate(&self, state: &mut State, host: Range<u64>) -> Result<()> {
        for cluster in self.clusters_of(&host) {
            if self.count_down(cluster)? == 0 {
                self.cluster_is_free(state, cluster);
            }
        }
        Ok(())
    }

    /// Lets a cluster whose count is zero be found.
    pub(super) fn cluster_is_free(&self, state: &mut State, cluster: u64) {
        state.free_index = state.free_index.min(cluster);
        state.forget_free_byte(cluster, self.geometry);
    }

    /// The host clusters that a byte range touches.
    pub(super) fn clusters_of(&self, host: &Range<u64>) -> Range<u64> {
        host.start >> self.geometry.cluster_bits..host.end.div_ceil(self.geometry.cluster_bytes())
    }

    /// The first cluster at or after the free index that starts a run of `count` free ones; moves the index
    /// behind that run. Counts nothing.
    pub(super) fn find_free(&self, state: &mut State, count: u64) -> Result<u64> {
        let order = self.geometry.refcount_order;
        let limit = HOST_LIMIT_BYTES >> self.geometry.cluster_bits;
        let file_end = self.end_bytes.load(Ordering::Relaxed) >> self.geometry.cluster_bits;
        let from = state.search_start();
        let mut start = from;
        let mut is_lost = false;
        self.visit_refcounts(from..limit, |clusters, counts| {
            if let Some((bytes, first)) = counts {
                let end = first + usize_of(clusters.end - clusters.start);
                let cluster_at = |index: usize| clusters.start + (index - first) as u64;
                let mut free = first;
                loop {
                    let used = next_used(bytes, order, free..end);
                    if cluster_at(used) - start >= count {
                        return false;
                    }
                    if used == end {
                        break;
                    }
                    free = next_free(bytes, order, used..end);
                    start = cluster_at(free);
                }
            }
            is_lost = start > file_end.saturating_add(MAX_LOST_CLUSTERS).max(from);
            clusters.end - start < count && !is_lost
        })?;
        if is_lost {
            let at = start << self.geometry.cluster_bits;
            return Err(self.map.corrupt("refcounts", at, "free clusters behind the end of the file", start));
        }
        if limit.saturating_sub(start) < count {
            return Err(Error::Invalid(format!(
                "{}: no host offset below 2^56 is free",
                self.path().display()
            )));
        }
        state.search_on_from(start + count);
        Ok(start)
    }

    /// Gives out no cluster any more that the file has now, or all of them again.
    pub(super) fn keep_off_what_is_there(&self, keeps_off: bool) {
        let mut state = self.state();
        let end = self.end_bytes.load(Ordering::Relaxed);
        state.floor = 0;
        if keeps_off {
            state.floor = end.div_ceil(self.geometry.cluster_bytes());
            // The rest of a cluster that is partly filled is a place as well.
            state.free_byte = 0;
        }
    }

    /// Remembers that the file, in memory at least, reaches to `end`.
    pub(super) fn note_allocated(&self, end: u64) {
        self.end_bytes.fetch_max(end, Ordering::Relaxed);
    }

    fn host_range(&self, first: u64, count: u64) -> Result<Range<u64>> {
        let bits = self.geometry.cluster_bits;
        let limit = HOST_LIMIT_BYTES >> bits;
        if first.checked_add(count).is_none_or(|end| end > limit) {
            return Err(Error::Invalid(format!(
                "{}: no host offset below 2^56 is free",
                self.path().display()
            )));
        }
        Ok(first << bits..(first + count) << bits)
    }

    /// Notes where a structure stands, once places are known.
    pub(super) fn note_place(&self, kind: Kind, host: Range<u64>) {
        self.places.write().unwrap_or_else(std::sync::PoisonError::into_inner).add(kind, host);
    }

    /// Forgets where a structure stood.
    pub(super) fn forget_place(&self, kind: Kind, host: Range<u64>) {
        self.places.write().unwrap_or_else(std::sync::PoisonError::into_inner).remove(kind, host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(cluster: u64) -> Vec<Freed> {
        vec![Freed::clusters(cluster << 16..(cluster + 1) << 16, true)]
    }

    /// However long a lease is held, what waits for it takes bounded memory: runs are joined first, and only what
    /// cannot be joined is left to leak.
    #[test]
    fn what_waits_for_a_lease_is_bounded() {
        let mut joined = State::default();
        // Every other cluster, then those between them, and one that is too much.
        let clusters = LIMBO_LIMIT_RUNS as u64;
        for cluster in (0..clusters).step_by(2).chain((1..clusters).step_by(2)).chain([clusters]) {
            joined.wait_for_leases(7, one(cluster));
        }
        let whole = Freed::clusters(0..(clusters + 1) << 16, true);
        assert_eq!(joined.limbo, [(7, vec![whole])]);

        let mut apart = State::default();
        for epoch in 1..4 {
            let first = epoch * clusters * 4;
            apart.wait_for_leases(epoch, (0..clusters).flat_map(|index| one(first + index * 2)).collect());
            assert!(apart.limbo_runs() <= LIMBO_LIMIT_RUNS);
        }
        assert_eq!(apart.limbo[0].1.len(), LIMBO_KEPT_RUNS, "the oldest are kept");
    }
}
