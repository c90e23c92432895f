//! The end of a prepared write: the map points at its bytes, or what was set aside for it is taken back.

use super::{
    alloc::State,
    entry::{COPIED, Cluster, L2Entry, ZERO},
    geometry::Geometry,
    layer::Qcow2Layer,
    map::Found,
    refcount::usize_of,
    write::{IN_PLACE, Write, WriteKind, bitmap},
};
use crate::{Result, format::WriteToken};

impl Qcow2Layer {
    pub(super) fn commit(&self, token: WriteToken) -> Result<()> {
        if token.0 & IN_PLACE != 0 {
            self.epochs.unpin(token.0 & !IN_PLACE);
            return Ok(());
        }
        let mut state = self.state();
        let mut result = self.check_writable();
        let mut next = Some(token.0);
        while let Some(number) = next {
            let write = state.end(WriteToken(number));
            let mut linked = 0;
            if result.is_ok() {
                result = self.link(&mut state, &write, &mut linked);
            }
            if result.is_err() {
                result = self.take_back(&mut state, &write, linked).and(result);
            }
            next = write.also;
        }
        self.landed.notify_all();
        result
    }

    /// [`Self::commit`] from memory alone and without waiting; returns the token of what is left to be done.
    pub(super) fn try_commit(&self, token: WriteToken) -> Option<WriteToken> {
        if token.0 & IN_PLACE != 0 {
            self.epochs.unpin(token.0 & !IN_PLACE);
            return None;
        }
        let Some(mut state) = self.try_state() else { return Some(token) };
        let mut next = Some(token.0);
        while let Some(number) = next {
            let write = state.writes[&number].clone();
            // What is wrong will be met again, and told, by who commits the rest.
            if self.check_writable().is_err() || !self.link_cached(&mut state, &write).unwrap_or(false) {
                break;
            }
            state.end(WriteToken(number));
            next = write.also;
        }
        self.landed.notify_all();
        next.map(WriteToken)
    }

    pub(super) fn abort(&self, token: WriteToken) {
        if token.0 & IN_PLACE != 0 {
            self.epochs.unpin(token.0 & !IN_PLACE);
            return;
        }
        let mut state = self.state();
        // There is nobody to tell: the counts stay too high, a leak, which is what a crash here leaves too.
        // A corrupt image is marked, and the next write says so.
        self.guard(self.give_up(&mut state, token)).ok();
        self.landed.notify_all();
    }

    /// Ends a prepared write, and what ends with it, without changing the map.
    pub(super) fn give_up(&self, state: &mut State, token: WriteToken) -> Result<()> {
        let mut result = Ok(());
        let mut next = Some(token.0);
        while let Some(number) = next {
            let write = state.end(WriteToken(number));
            result = result.and(self.take_back(state, &write, 0));
            next = write.also;
        }
        result
    }

    /// Frees what was allocated for a write that does not happen, but for its first `linked` clusters: the map
    /// points there already.
    fn take_back(&self, state: &mut State, write: &Write, linked: u64) -> Result<()> {
        let cluster = self.geometry.cluster_bytes();
        match write.kind {
            WriteKind::Reuse { .. } => Ok(()),
            WriteKind::Fresh { .. } if self.geometry.external_data => Ok(()),
            WriteKind::Fresh { .. } => {
                let bytes = write.clusters.end - write.clusters.start;
                debug_assert_eq!(bytes % cluster, 0);
                self.unallocate(state, write.host + linked * cluster..write.host + bytes)
            }
            WriteKind::Compressed { .. } if linked > 0 => Ok(()),
            WriteKind::Compressed { stored_bytes } => {
                self.unallocate(state, write.host..write.host + u64::from(stored_bytes))
            }
        }
    }

    /// Makes the map point at the bytes of a write. `linked` counts the clusters for which it does, of which
    /// there may be some when a table cannot be read again.
    fn link(&self, state: &mut State, write: &Write, linked: &mut u64) -> Result<()> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_bytes();
        let root = self.root();
        let l1_index = geometry.l1_index(write.clusters.start);
        let entry = self.map.l1_entry(root, l1_index)?;
        let table = self.map.checked_table(root, l1_index, entry)?;
        let table = table.filter(|_| entry.is_copied()).expect("made when the write was prepared");
        // Everything is read before anything is changed.
        let mut old = Vec::new();
        for guest in write.clusters.clone().step_by(usize_of(cluster)) {
            let found = self.map.entry_at(table, geometry.l2_index(guest))?;
            let was = self.map.checked(found, guest)?;
            if !matches!(write.kind, WriteKind::Reuse { .. }) {
                self.check_given_up(was)?;
            }
            old.push((found.entry, was));
        }
        state.barrier = true;
        for (guest, (old, was)) in write.clusters.clone().step_by(usize_of(cluster)).zip(old) {
            self.set_entry(table, guest, write.entry(guest, old, was, geometry))?;
            *linked += 1;
            self.free_replaced(state, write, old, was);
        }
        Ok(())
    }

    /// [`Self::link`] where all entries stand in one slice, and that slice is here; false where it is not, or an
    /// entry may not be changed.
    fn link_cached(&self, state: &mut State, write: &Write) -> Result<bool> {
        let geometry = self.geometry;
        let root = self.root();
        let start = write.clusters.start;
        let l1_index = geometry.l1_index(start);
        let Some(entry) = self.map.cached_l1_entry(root, l1_index) else { return Ok(false) };
        let table = self.map.checked_table(root, l1_index, entry)?;
        let Some(table) = table.filter(|_| entry.is_copied()) else { return Ok(false) };
        let entry_bytes = geometry.l2_entry_bytes();
        let first_at = table + geometry.l2_index(start) * entry_bytes;
        let guests = write.clusters.clone().step_by(usize_of(geometry.cluster_bytes()));
        let Some((slice, within)) = self.map.l2.peek_at(first_at) else { return Ok(false) };
        let first = within / usize_of(entry_bytes);
        if usize_of(geometry.clusters_for(write.clusters.end - start))
            > slice.len() / usize_of(entry_bytes) - first
        {
            return Ok(false);
        }
        for (index, guest) in guests.clone().enumerate() {
            let entry = L2Entry::read(&slice, first + index, geometry);
            let was = self.map.checked(Found { entry, at: first_at + index as u64 * entry_bytes }, guest)?;
            if !matches!(write.kind, WriteKind::Reuse { .. }) {
                self.check_given_up(was)?;
            }
        }
        // Nobody changes entries while the state is held: those that were checked are those that are replaced, in place
        // when nobody has taken them along.
        drop(slice);
        state.barrier = true;
        let changed = self.map.l2.update_cached(first_at, |bytes, _| {
            for (index, guest) in guests.enumerate() {
                let old = L2Entry::read(bytes, first + index, geometry);
                let was = old.cluster(geometry);
                write.entry(guest, old, was, geometry).write(bytes, first + index, geometry);
                self.free_replaced(state, write, old, was);
            }
        });
        Ok(changed.is_some())
    }

    /// Gives up what an entry referred to before `write` replaced it.
    fn free_replaced(&self, state: &mut State, write: &Write, old: L2Entry, was: Cluster) {
        let is_moved = match write.kind {
            WriteKind::Reuse { .. } => false,
            // In an external data file the cluster has its one place and stays there.
            WriteKind::Fresh { .. } | WriteKind::Compressed { .. } => {
                !self.geometry.external_data || matches!(was, Cluster::Compressed { .. })
            }
        };
        if is_moved {
            self.free_entry(state, old, was, self.runtime.discard_other);
        }
    }
}

impl Write {
    /// The entry of the guest cluster at `guest`, which was `old` and meant `was`.
    fn entry(&self, guest: u64, old: L2Entry, was: Cluster, geometry: Geometry) -> L2Entry {
        let host = self.host + (guest - self.clusters.start);
        let mask_of = |first: u32, last: u32| {
            if guest == self.clusters.start {
                first
            } else if guest + geometry.cluster_bytes() == self.clusters.end {
                last
            } else {
                u32::MAX
            }
        };
        match self.kind {
            WriteKind::Fresh { first, last } => moved(was, host, mask_of(first, last), geometry.extended_l2),
            WriteKind::Reuse { first, last } => begun(old, was, mask_of(first, last), geometry.extended_l2),
            WriteKind::Compressed { stored_bytes } => L2Entry::for_compressed(host, stored_bytes, geometry),
        }
    }
}

/// The entry of a cluster that moved to `host`, with the subclusters of `written` in it.
fn moved(was: Cluster, host: u64, written: u32, extended: bool) -> L2Entry {
    let bitmap = if extended {
        let zero = match was {
            Cluster::Zero { .. } => u32::MAX,
            Cluster::Subclusters { zero, .. } => zero,
            _ => 0,
        };
        bitmap(written, zero & !written)
    } else {
        0
    };
    L2Entry { word: host | COPIED, bitmap }
}

/// The entry of a cluster that stays, with the subclusters of `written` in use from now on.
fn begun(old: L2Entry, was: Cluster, written: u32, extended: bool) -> L2Entry {
    if !extended {
        return L2Entry { word: old.word & !ZERO, bitmap: 0 };
    }
    let (allocated, zero) = match was {
        Cluster::Zero { .. } => (0, u32::MAX),
        Cluster::Subclusters { allocated, zero, .. } => (allocated, zero),
        _ => (u32::MAX, 0),
    };
    L2Entry { word: old.word, bitmap: bitmap(allocated | written, zero & !written) }
}
