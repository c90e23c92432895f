//! Making changes durable, in the order that keeps every crash harmless.
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

use std::ops::Range;

use super::{
    alloc::{Freed, State},
    entry::Cluster,
    layer::Qcow2Layer,
    overlap::Kind,
};
use crate::{Result, format::Layer, storage::Flush};

impl Qcow2Layer {
    /// Makes all changes durable.
    pub(super) fn drain(&self) -> Result<()> {
        let mut state = self.state();
        let result = self.drain_locked(&mut state);
        self.guard(result)
    }

    /// A drain by whoever holds the state.
    pub(super) fn drain_locked(&self, state: &mut State) -> Result<()> {
        if !self.mode.writes() {
            return Ok(());
        }
        self.check_writable()?;
        let lazy = self.is_lazy() && self.refcount_blocks.dirty_bytes() < self.runtime.refcount_cache_bytes;
        self.drain_steps(state, lazy)
    }

    /// The last drain: counts are written under lazy refcounts too, and the dirty bit is cleared.
    pub(super) fn finish(&self, state: &mut State) -> Result<()> {
        self.check_writable()?;
        self.drain_steps(state, false)?;
        if self.header().incompatible & super::feature::incompatible::DIRTY != 0 {
            // The counts of step 4 too must be durable before the bit goes.
            self.image_file().flush(Flush::Data)?;
            self.clear_dirty()?;
        }
        Ok(())
    }

    fn drain_steps(&self, state: &mut State, keep_counts: bool) -> Result<()> {
        let file = self.image_file();
        let (l1, l2) = (&self.map.l1, &self.map.l2);
        let references = l1.is_dirty(|_| true) || l2.is_dirty(|_| true);
        // 1. counts and new tables
        if !keep_counts {
            self.write_refcount_blocks()?;
        }
        let cluster = !(self.geometry.cluster_bytes() - 1);
        let new_tables = &state.new_tables;
        let allow_l2 = |host| self.check_overlap(&host, Some(Kind::ActiveL2));
        l2.write_back(file, |at| new_tables.contains(&(at & cluster)), allow_l2)?;
        let table = !keep_counts && self.refcount_table.is_dirty(|_| true);
        if state.barrier && (table || references) {
            self.sync()?;
        }
        // 2. refcount table
        if table {
            let allow = |host| self.check_overlap(&host, Some(Kind::RefcountTable));
            self.refcount_table.write_back(file, |_| true, allow)?;
            if references {
                file.flush(Flush::Data)?;
            }
        }
        // 3. references
        l2.write_back(file, |_| true, allow_l2)?;
        l1.write_back(file, |_| true, |host| self.check_overlap(&host, Some(Kind::ActiveL1)))?;
        self.sync()?;
        state.new_tables.clear();
        state.barrier = false;
        // 4. drops
        let pending = state.take_pending();
        if !pending.is_empty() {
            state.wait_for_leases(self.epochs.close(), pending);
        }
        self.release(state)?;
        if !keep_counts {
            self.write_refcount_blocks()?;
        }
        Ok(())
    }

    /// Makes everything written so far durable, guest data included.
    fn sync(&self) -> Result<()> {
        if let Some(data) = &self.data_file {
            data.flush(Flush::Data)?;
        }
        self.image_file().flush(Flush::Data)
    }

    /// Step 4: what nobody can reach any more is counted down and given back.
    pub(super) fn release(&self, state: &mut State) -> Result<()> {
        while let Some((epoch, _)) = state.limbo.front() {
            if !self.epochs.all_gone(*epoch) {
                break;
            }
            let (_, mut freed) = state.limbo.pop_front().expect("it has a front");
            freed.sort_by_key(|freed| (freed.in_data_file, freed.host.start));
            let mut holes: Vec<Freed> = Vec::new();
            for freed in freed {
                for cluster in self.clusters_of(&freed.host) {
                    let host = cluster << self.geometry.cluster_bits;
                    let host = host..host + self.geometry.cluster_bytes();
                    if freed.in_data_file {
                        if !self.is_in_use_again(state, &host)? {
                            note_hole(&mut holes, Freed { host, ..freed.clone() });
                        }
                    } else if freed.is_shared && self.refcount_of(cluster)? == 1 {
                        // Somebody else's.
                    } else if self.count_down(cluster)? == 0 {
                        // At once: where a later step fails, its count is zero and all that is known of it
                        // must agree. Nobody gets it before the hole is punched, as the state is held.
                        self.cluster_is_free(state, cluster);
                        note_hole(&mut holes, Freed::clusters(host, freed.punch));
                    }
                }
            }
            for hole in holes {
                self.punch(&hole)?;
            }
        }
        Ok(())
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
