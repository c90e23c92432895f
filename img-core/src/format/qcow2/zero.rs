//! Zeroes without writing them, and discard: entries change, host space is given back.
//!
//! | the cluster was | zeroes, may unmap | zeroes, keep | discard |
//! | --- | --- | --- | --- |
//! | unallocated | zero | zero | zero over a backing file, else untouched |
//! | data or reserved | zero, space freed | zero, space kept behind it | zero (version 2: unallocated), space freed |
//! | compressed | zero, space freed | zero, space freed | zero (version 2: unallocated), space freed |
//!
//! Version 2 has no zero clusters: there zeroes are said by "unallocated" where no backing file shows
//! through, and not at all otherwise.
//!
//! A raw data file reads as the guest does, so its bytes are zeroed too, and no write may come between them and
//! the map. [`Zeroing`] keeps the clusters: (1) it is counted, and writes in place, which ask nobody, look for
//! what is in flight from then on; (2) the clusters are in flight; (3) writes in place that began before have
//! ended. Whoever pins an epoch and then finds the count at zero is seen by step 3.

use std::{ops::Range, sync::atomic::Ordering};

use super::{
    alloc::State,
    entry::{Cluster, L2Entry, ZERO},
    layer::Qcow2Layer,
    write::{bitmap, mask},
};
use crate::{Result, format::Layer};

/// What is done to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Reads as zeroes from now on.
    Zero { may_unmap: bool },
    /// The user does not need it any more; reads as zeroes.
    Discard,
    /// It ceases to exist: unallocated.
    Forget,
}

/// Clusters that are being zeroed in the raw data file and in the map, and that nobody writes meanwhile.
#[must_use]
struct Zeroing<'a> {
    layer: &'a Qcow2Layer,
    clusters: Range<u64>,
}

impl<'a> Zeroing<'a> {
    /// Waits for the writes to `clusters` (whole ones, guest bytes) that have begun. The caller holds no lease.
    fn begin(layer: &'a Qcow2Layer, clusters: Range<u64>) -> Self {
        // (1)
        layer.zeroing.fetch_add(1, Ordering::SeqCst);
        // (2)
        let mut state = layer.state();
        while state.in_flight.overlaps(&clusters) {
            state = layer.landed.wait(state);
        }
        state.in_flight.insert(&clusters);
        drop(state);
        // (3)
        layer.epochs.wait_for_older();
        Self { layer, clusters }
    }
}

impl Drop for Zeroing<'_> {
    fn drop(&mut self) {
        self.layer.state().in_flight.remove(&self.clusters);
        self.layer.zeroing.fetch_sub(1, Ordering::SeqCst);
        self.layer.landed.notify_all();
    }
}

impl Qcow2Layer {
    /// Whether writes in place have to look for what is in flight: see [`Zeroing`]. Asked under a pin.
    pub(super) fn is_zeroing(&self) -> bool {
        self.zeroing.load(Ordering::SeqCst) > 0
    }

    pub(super) fn zero(&self, guest: Range<u64>, may_unmap: bool) -> Result<bool> {
        self.check_writable()?;
        if self.geometry.version < 3 {
            if self.backing().is_some() || !may_unmap {
                return Ok(false);
            }
            self.change(guest, Change::Discard, false)?;
            return Ok(true);
        }
        if self.has_compressed_edge(&guest)? {
            return Ok(false);
        }
        if self.is_raw_data() {
            self.zero_raw_data(guest, may_unmap, Change::Zero { may_unmap })?;
        } else {
            self.change(guest, Change::Zero { may_unmap }, false)?;
        }
        Ok(true)
    }

    pub(super) fn discard_range(&self, guest: Range<u64>) -> Result<()> {
        self.check_writable()?;
        if self.geometry.version < 3 && self.backing().is_some() {
            // Older data would show through.
            return Ok(());
        }
        let cluster = self.geometry.cluster_bytes();
        let start = guest.start.next_multiple_of(cluster);
        let end = if guest.end == self.virtual_size_bytes() {
            guest.end
        } else {
            self.geometry.cluster_start(guest.end)
        };
        if start >= end {
            return Ok(());
        }
        if self.is_raw_data() {
            return self.zero_raw_data(start..end, true, Change::Zero { may_unmap: false });
        }
        self.change(start..end, Change::Discard, false)
    }

    /// Makes clusters unallocated, whatever they were; for a disk that shrinks.
    pub(super) fn forget_range(&self, guest: Range<u64>) -> Result<()> {
        self.change(guest, Change::Forget, false)
    }

    /// Whether the external data file must read as the guest does.
    pub(super) fn is_raw_data(&self) -> bool {
        self.geometry.external_data && self.header().autoclear & super::feature::autoclear::RAW_DATA != 0
    }

    /// Zeroes the bytes of the raw data file, then the map: a crash between the two leaves zeroes.
    fn zero_raw_data(&self, guest: Range<u64>, may_unmap: bool, change: Change) -> Result<()> {
        let cluster = self.geometry.cluster_bytes();
        let data = self.data_file.as_ref().expect("opened for writing");
        let clusters = self.geometry.cluster_start(guest.start)..guest.end.next_multiple_of(cluster);
        let _zeroing = Zeroing::begin(self, clusters);
        data.write_zeroes(guest.clone(), may_unmap)?;
        self.change(guest, change, true)
    }

    /// Whether a cluster that the range covers in part is compressed, and so cannot become zero in part.
    fn has_compressed_edge(&self, guest: &Range<u64>) -> Result<bool> {
        let geometry = self.geometry;
        let _pin = self.epochs.pin();
        for (edge, is_partial) in [
            (guest.start, geometry.in_cluster(guest.start) != 0),
            (guest.end - 1, geometry.in_cluster(guest.end) != 0 && guest.end != self.virtual_size_bytes()),
        ] {
            if is_partial
                && let Some(found) = self.map.l2_entry(self.root(), edge)?
                && matches!(found.entry.cluster(geometry), Cluster::Compressed { .. })
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Changes the map, and waits for writes to each part of it unless the caller has it `in_flight`.
    fn change(&self, guest: Range<u64>, change: Change, in_flight: bool) -> Result<()> {
        let geometry = self.geometry;
        self.know_places()?;
        let end = if guest.end >= self.virtual_size_bytes() {
            guest.end.next_multiple_of(geometry.cluster_bytes())
        } else {
            guest.end
        };
        let mut at = guest.start;
        while at < end {
            let table_end = (geometry.l1_index(at) + 1).saturating_mul(geometry.l2_span_bytes());
            let part = at..end.min(table_end);
            let clusters = (!in_flight).then(|| part.clone());
            self.change_map(clusters, false, |state| self.change_in_table(state, part.clone(), change))?;
            at = end.min(table_end);
        }
        Ok(())
    }

    /// The part of a change that one L2 table covers.
    fn change_in_table(&self, state: &mut State, guest: Range<u64>, change: Change) -> Result<()> {
        let geometry = self.geometry;
        let root = self.root();
        let l1_index = geometry.l1_index(guest.start);
        let entry = self.map.l1_entry(root, l1_index)?;
        let is_silent = self.map.checked_table(root, l1_index, entry)?.is_none();
        let silence_is_kept = match change {
            Change::Zero { .. } => false,
            Change::Discard => self.backing().is_none(),
            Change::Forget => true,
        };
        if is_silent && silence_is_kept {
            return Ok(());
        }
        self.before_allocating(state)?;
        let table = self.table_for_writing(state, l1_index)?;
        let mut at = guest.start;
        while at < guest.end {
            let start = geometry.cluster_start(at);
            let end = (start + geometry.cluster_bytes()).min(guest.end);
            let found = self.map.entry_at(table, geometry.l2_index(start))?;
            let was = self.map.checked(found, start)?;
            let is_whole = at == start && end == start + geometry.cluster_bytes();
            let (entry, frees) = if is_whole {
                self.changed(found.entry, was, change)
            } else {
                (self.partly_zero(found.entry, was, at..end), false)
            };
            if entry != found.entry {
                if frees {
                    self.check_given_up(was)?;
                }
                self.set_entry(table, start, entry)?;
                if frees {
                    let punch = match change {
                        Change::Discard => self.runtime.discard_requests,
                        Change::Zero { .. } | Change::Forget => self.runtime.discard_other,
                    };
                    self.free_entry(state, found.entry, was, punch && !self.is_raw_data());
                }
            }
            at = end;
        }
        Ok(())
    }

    /// The new entry of a whole cluster, and whether what the old one referred to is given up.
    fn changed(&self, old: L2Entry, was: Cluster, change: Change) -> (L2Entry, bool) {
        let geometry = self.geometry;
        let zero = |word: u64| {
            if geometry.extended_l2 {
                L2Entry { word, bitmap: bitmap(0, u32::MAX) }
            } else {
                L2Entry { word: word | if geometry.version >= 3 { ZERO } else { 0 }, bitmap: 0 }
            }
        };
        let is_compressed = matches!(was, Cluster::Compressed { .. });
        let is_placed = match was {
            Cluster::Standard { .. } | Cluster::Compressed { .. } => true,
            Cluster::Zero { reserved } => reserved.is_some(),
            Cluster::Subclusters { at, .. } => at.is_some(),
            Cluster::Unallocated => false,
        };
        let keeps = self.runtime.discard_no_unref && !is_compressed;
        match change {
            Change::Forget => (L2Entry::default(), is_placed),
            Change::Discard if !is_placed && self.backing().is_none() => (old, false),
            Change::Discard if keeps && is_placed => (zero(old.word), false),
            Change::Discard => (zero(0), is_placed),
            Change::Zero { may_unmap } => {
                if is_compressed || (may_unmap && is_placed && !keeps) {
                    (zero(0), true)
                } else if is_placed {
                    (zero(old.word), false)
                } else {
                    (zero(0), false)
                }
            }
        }
    }

    /// The entry of a cluster of which some subclusters become zero. The cluster is not compressed.
    fn partly_zero(&self, old: L2Entry, was: Cluster, guest: Range<u64>) -> L2Entry {
        let sub = self.geometry.subcluster_bytes();
        let start = self.geometry.cluster_start(guest.start);
        let part = mask((guest.start - start) / sub..(guest.end - start).div_ceil(sub));
        let (allocated, zero) = match was {
            Cluster::Standard { .. } => (u32::MAX, 0),
            Cluster::Zero { .. } => (0, u32::MAX),
            Cluster::Subclusters { allocated, zero, .. } => (allocated, zero),
            Cluster::Unallocated => (0, 0),
            Cluster::Compressed { .. } => return old,
        };
        L2Entry { word: old.word, bitmap: bitmap(allocated & !part, zero | part) }
    }
}
