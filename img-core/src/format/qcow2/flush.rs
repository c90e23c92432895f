//! Making changes durable, in the order that keeps every crash harmless, while more changes are made.
//!
//! Guest data is written by others before a commit refers to it. A *drain* then takes these steps; a crash
//! between any two leaves leaked clusters at worst:
//!
//! 1. **counts and new tables**: changed refcount blocks (which only count up), refcount blocks that the
//!    refcount table does not name yet, and L2 tables that L1 does not name yet. Then a sync, which makes
//!    the guest data durable too.
//! 2. **refcount table**: its changed entries, if there are any. Then a sync.
//! 3. **references**: changed slices of L2 tables that L1 names, and of L1. Then a sync.
//! 4. **drops**: what lost its last reference in step 3 is counted down, punched out and may be used again,
//!    once all leases from before are gone. The counts are written; no sync, as a count that is too high
//!    is only a leak.
//!
//! Where a step has nothing to write its sync is left out: after guest data alone there is one sync, and so
//! there is after references that depend on nothing new. Under lazy refcounts steps 1 and 2 leave the counts
//! in memory, and [`Qcow2Layer::finish`] writes them before it clears the dirty bit.
//!
//! Nobody who writes waits for the disk. Under the state lock a drain only takes its *generation*: all that
//! is changed at that moment, in all caches at once, the clusters given up by then, and the tables that are new by
//! then. It writes and syncs that without the lock, and takes the lock again to publish what came of it.
//! Allocations, prepares and commits go on meanwhile, and the order holds for them as well:
//!
//! - A slice of the generation is written as it was when the generation was taken; whoever changes it later changes
//!   a copy. So a reference that is written in step 3 was there when the generation was taken, and with it
//!   were, in memory, the counts and tables it depends on: they are of this generation, and were made durable
//!   in step 1, or of an earlier one. A reference made during the drain is in the copy, with its count, and
//!   both wait for the next drain. The same holds for the entries of L1 and of the refcount table.
//! - A cluster that is given up during the drain is not of the generation: its count stays until the drain after that
//!   has made the drop durable.
//! - A table that was new when the generation was taken is named by L1 on disk when the drain has ended, and only
//!   then counts as old. One that is made meanwhile is new to the next drain.
//! - What a drain does not get written waits again, beside what came later, and its order begins anew with step 1.
//!
//! There is one drain at a time, or an older slice might be written over a newer one. For the same reason a new
//! refcount table, which is written outside of drains, waits until there is none ([`State::stalled`]), and so do
//! changes of the whole image, which drain with the state held.

use std::{collections::HashSet, mem, ops::Range};

use super::{
    alloc::{Freed, State},
    entry::Cluster,
    layer::Qcow2Layer,
    overlap::Kind,
};
use crate::{
    Result,
    format::{
        Layer,
        table_cache::{Changes, SliceCache},
    },
    storage::Flush,
    sync::MutexGuard,
};

/// What of the tables a drain writes.
struct Tables<'a> {
    /// Counts, and what names their blocks; left alone under lazy refcounts.
    counts: Option<(Changes<'a>, Changes<'a>)>,
    /// L2 tables that L1 on disk does not name.
    new_l2: Changes<'a>,
    l2: Changes<'a>,
    l1: Changes<'a>,
    /// These depend on data or counts that may not be durable.
    barrier: bool,
}

/// What is true once the tables of a generation are durable.
struct Promise {
    /// This drain's number.
    number: u64,
    /// L1 on disk names these.
    new_tables: HashSet<u64>,
    /// No table on disk refers to these.
    given_up: Vec<Freed>,
}

/// What is on its way to be used again.
#[derive(Default)]
struct GivenBack {
    /// Anything left limbo.
    is_any: bool,
    /// Host clusters that are still counted once.
    clusters: Vec<u64>,
    /// Clusters of the external data file, in flight so that nobody writes them.
    kept: Vec<Range<u64>>,
    /// To be punched out.
    holes: Vec<Freed>,
}

/// A drain that runs without the state lock; ends when dropped, also by a panic.
struct Running<'a>(&'a Qcow2Layer);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.state().draining = false;
        self.0.landed.notify_all();
    }
}

impl Qcow2Layer {
    /// Makes all changes durable that were made before the call. A drain that began after it, by whomever, is enough.
    pub(super) fn drain(&self) -> Result<()> {
        let state = self.state();
        let begun = state.drains_begun;
        self.drain_when(state, |state| state.drained <= begun)
    }

    /// Drains when no other drain runs, if `is_due` holds then.
    pub(super) fn drain_when(
        &self,
        state: MutexGuard<'_, State>,
        is_due: impl FnOnce(&State) -> bool,
    ) -> Result<()> {
        let state = self.wait_until_quiet(state);
        if !self.mode.writes() || !is_due(&state) {
            return Ok(());
        }
        let result = self.check_writable().and_then(|()| self.drain_beside(state));
        self.guard(result)
    }

    /// Whether a drain would sync and do nothing else, as far as memory tells without waiting.
    pub(super) fn is_drained(&self) -> bool {
        let Some(state) = self.try_state() else { return false };
        let are_clean = |tables: [&SliceCache; 2]| tables.iter().all(|table| table.dirty_bytes() == 0);
        self.check_writable().is_ok()
            // What a drain has taken is durable when it has ended, or waits again.
            && !state.draining
            && state.new_tables.is_empty()
            && state.pending.is_empty()
            && !self.has_releasable(&state)
            && are_clean([&self.map.l1, &self.map.l2])
            && (self.keeps_counts() || are_clean([&self.refcount_table, &self.refcount_blocks]))
    }

    /// A drain beside which others change the image.
    fn drain_beside(&self, mut state: MutexGuard<'_, State>) -> Result<()> {
        let keep_counts = self.keeps_counts();
        let (tables, promise) = self.take_generation(&mut state, keep_counts);
        state.draining = true;
        drop(state);
        let running = Running(self);
        let written = self.write_tables(tables);
        // 4. drops
        let mut given_back = GivenBack::default();
        {
            let mut state = self.state();
            self.publish(&mut state, promise, written)?;
            if let Err(error) = self.begin_release(&mut state, &mut given_back) {
                return self.end_release(&mut state, given_back, Err(error));
            }
        }
        let punched = self.punch_holes(&given_back);
        let is_any = given_back.is_any;
        let counts = {
            let mut state = self.state();
            self.end_release(&mut state, given_back, punched)?;
            (is_any && !keep_counts).then(|| self.refcount_blocks.take_changes(|_| true))
        };
        let result = counts.map_or(Ok(()), |counts| self.write_counts(counts));
        drop(running);
        result
    }

    /// A drain by whoever holds the state, while there is no other.
    pub(super) fn drain_locked(&self, state: &mut State) -> Result<()> {
        if !self.mode.writes() {
            return Ok(());
        }
        self.check_writable()?;
        self.drain_alone(state, self.keeps_counts())
    }

    /// The last drain: counts are written under lazy refcounts too, and the dirty bit is cleared.
    pub(super) fn finish(&self, state: &mut State) -> Result<()> {
        self.check_writable()?;
        self.drain_alone(state, false)?;
        if self.header().incompatible & super::feature::incompatible::DIRTY != 0 {
            // The counts of step 4 too must be durable before the bit goes.
            self.image_file().flush(Flush::Data)?;
            self.clear_dirty()?;
        }
        Ok(())
    }

    fn drain_alone(&self, state: &mut State, keep_counts: bool) -> Result<()> {
        debug_assert!(!state.draining, "there is one drain at a time");
        let (tables, promise) = self.take_generation(state, keep_counts);
        let written = self.write_tables(tables);
        self.publish(state, promise, written)?;
        self.release(state)?;
        if keep_counts { Ok(()) } else { self.write_counts(self.refcount_blocks.take_changes(|_| true)) }
    }

    /// Whether counts stay in memory for now, the dirty bit being set.
    fn keeps_counts(&self) -> bool {
        self.is_lazy() && self.refcount_blocks.dirty_bytes() < self.runtime.refcount_cache_bytes
    }

    /// The state, when no drain runs. None begins while it is held.
    pub(super) fn quiet_state(&self) -> MutexGuard<'_, State> {
        self.wait_until_quiet(self.state())
    }

    /// Gives the state up until no drain runs.
    pub(super) fn wait_until_quiet<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while state.draining {
            state = self.landed.wait(state);
        }
        state
    }

    /// All that is changed now, and what is true when it is durable.
    fn take_generation(&self, state: &mut State, keep_counts: bool) -> (Tables<'_>, Promise) {
        let cluster = !(self.geometry.cluster_bytes() - 1);
        let new_tables = mem::take(&mut state.new_tables);
        state.drains_begun += 1;
        let tables = Tables {
            counts: (!keep_counts).then(|| {
                (self.refcount_blocks.take_changes(|_| true), self.refcount_table.take_changes(|_| true))
            }),
            new_l2: self.map.l2.take_changes(|at| new_tables.contains(&(at & cluster))),
            l2: self.map.l2.take_changes(|_| true),
            l1: self.map.l1.take_changes(|_| true),
            barrier: mem::take(&mut state.barrier),
        };
        let promise = Promise { number: state.drains_begun, new_tables, given_up: state.take_pending() };
        (tables, promise)
    }

    /// Steps 1 to 3. What fails to be written waits again.
    fn write_tables(&self, tables: Tables<'_>) -> Result<()> {
        let file = self.image_file();
        let Tables { counts, new_l2, l2, l1, barrier } = tables;
        let has_references = !(new_l2.is_empty() && l2.is_empty() && l1.is_empty());
        let allow_l2 = |host| self.check_overlap(&host, Some(Kind::ActiveL2));
        // 1. counts and new tables
        let mut table = None;
        if let Some((blocks, refcount_table)) = counts {
            self.write_counts(blocks)?;
            table = Some(refcount_table).filter(|table| !table.is_empty());
        }
        new_l2.write(file, allow_l2)?;
        if barrier && (table.is_some() || has_references) {
            self.sync()?;
        }
        // 2. refcount table
        if let Some(table) = table {
            table.write(file, |host| self.check_overlap(&host, Some(Kind::RefcountTable)))?;
            if has_references {
                file.flush(Flush::Data)?;
            }
        }
        // 3. references
        l2.write(file, allow_l2)?;
        l1.write(file, |host| self.check_overlap(&host, Some(Kind::ActiveL1)))?;
        self.sync()
    }

    /// What follows from the tables having been written, or not.
    fn publish(&self, state: &mut State, promise: Promise, written: Result<()>) -> Result<()> {
        if let Err(error) = written {
            state.new_tables.extend(promise.new_tables);
            state.barrier = true;
            promise.given_up.into_iter().for_each(|freed| state.free(freed));
            return Err(error);
        }
        state.drained = promise.number;
        if !promise.given_up.is_empty() {
            state.wait_for_leases(self.epochs.close(), promise.given_up);
        }
        Ok(())
    }

    /// Writes refcount blocks. At any time but the end of a drain they differ from the file by counts that are too
    /// high at most.
    fn write_counts(&self, blocks: Changes<'_>) -> Result<()> {
        blocks
            .write(self.image_file(), |host| self.check_overlap(&host, Some(Kind::RefcountBlock)))
            .map(|_| ())
    }

    /// Writes all changed refcount blocks; no drain runs.
    pub(super) fn write_refcount_blocks(&self) -> Result<()> {
        self.write_counts(self.refcount_blocks.take_changes(|_| true))
    }

    /// Makes everything written so far durable, guest data included.
    fn sync(&self) -> Result<()> {
        if let Some(data) = &self.data_file {
            data.flush(Flush::Data)?;
        }
        self.image_file().flush(Flush::Data)
    }

    /// Step 4: what nobody can reach any more is given back.
    pub(super) fn release(&self, state: &mut State) -> Result<()> {
        let mut given_back = GivenBack::default();
        let begun = self.begin_release(state, &mut given_back);
        let punched = begun.and_then(|()| self.punch_holes(&given_back));
        self.end_release(state, given_back, punched)
    }

    /// The beginning of step 4: what loses one reference of several is counted down; what loses its last one is kept
    /// from others until its hole is punched.
    fn begin_release(&self, state: &mut State, given_back: &mut GivenBack) -> Result<()> {
        while let Some((epoch, _)) = state.limbo.front() {
            if !self.epochs.all_gone(*epoch) {
                break;
            }
            let (_, mut freed) = state.limbo.pop_front().expect("it has a front");
            given_back.is_any = true;
            freed.sort_by_key(|freed| (freed.in_data_file, freed.host.start));
            for freed in freed {
                for cluster in self.clusters_of(&freed.host) {
                    let host = cluster << self.geometry.cluster_bits;
                    let host = host..host + self.geometry.cluster_bytes();
                    if freed.in_data_file {
                        if !self.is_in_use_again(state, &host)? {
                            // There a guest cluster has its own place: whoever writes it waits.
                            state.in_flight.insert(&host);
                            given_back.kept.push(host.clone());
                            note_hole(&mut given_back.holes, Freed { host, ..freed.clone() });
                        }
                        continue;
                    }
                    match self.refcount_of(cluster)? {
                        // Somebody else's.
                        1 if freed.is_shared => {}
                        1 => {
                            // It stays counted, and nothing is packed into it.
                            state.forget_free_byte(cluster, self.geometry);
                            given_back.clusters.push(cluster);
                            note_hole(&mut given_back.holes, Freed::clusters(host, freed.punch));
                        }
                        _ => {
                            self.count_down(cluster)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn punch_holes(&self, given_back: &GivenBack) -> Result<()> {
        given_back.holes.iter().try_for_each(|hole| self.punch(hole))
    }

    /// The end of step 4, also where a hole could not be punched: its cluster is as free as the others.
    fn end_release(&self, state: &mut State, given_back: GivenBack, punched: Result<()>) -> Result<()> {
        let mut result = punched;
        for cluster in given_back.clusters {
            let counted = self.count_down(cluster).map(|_| self.cluster_is_free(state, cluster));
            result = result.and(counted);
        }
        for host in given_back.kept {
            state.in_flight.remove(&host);
        }
        self.landed.notify_all();
        result
    }

    /// Whether there is something that [`Self::release`] would give back.
    pub(super) fn has_releasable(&self, state: &State) -> bool {
        state.limbo.front().is_some_and(|(epoch, _)| self.epochs.all_gone(*epoch))
    }

    /// Whether a cluster of the external data file, where each has its one place, was given up and has been
    /// written again since, or is being written.
    fn is_in_use_again(&self, state: &State, host: &Range<u64>) -> Result<bool> {
        if state.is_in_flight(host.clone()) {
            return Ok(true);
        }
        if host.start >= self.virtual_size_bytes() {
            return Ok(false);
        }
        let Some(found) = self.map.l2_entry(self.root(), host.start)? else { return Ok(false) };
        Ok(match self.map.checked(found, host.start)? {
            Cluster::Standard { .. }
            | Cluster::Zero { reserved: Some(_) }
            | Cluster::Subclusters { at: Some(_), .. } => true,
            Cluster::Unallocated
            | Cluster::Zero { reserved: None }
            | Cluster::Compressed { .. }
            | Cluster::Subclusters { at: None, .. } => false,
        })
    }

    fn punch(&self, hole: &Freed) -> Result<()> {
        let storage = match &self.data_file {
            Some(data) if hole.in_data_file => data,
            _ => self.storage(),
        };
        let end = hole.host.end.min(storage.len_bytes()?);
        if hole.punch && storage.limits().can_punch && hole.host.start < end {
            storage.punch_hole(hole.host.start..end)?;
        }
        Ok(())
    }
}

/// Appends a hole, to the last one where it continues it.
fn note_hole(holes: &mut Vec<Freed>, hole: Freed) {
    match holes.last_mut() {
        Some(last) if last.host.end == hole.host.start && last.is_like(&hole) => {
            last.host.end = hole.host.end;
        }
        _ => holes.push(hole),
    }
}
