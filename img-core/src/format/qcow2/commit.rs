//! The end of a prepared write: the map points at its bytes, or what was set aside for it is taken back.

use super::{
    alloc::State,
    entry::{COPIED, Cluster, L2Entry, ZERO},
    layer::Qcow2Layer,
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
        let write = state.end(token);
        let mut linked = 0;
        let result = self.check_writable().and_then(|()| self.link(&mut state, &write, &mut linked));
        let result = match result {
            Ok(()) => Ok(()),
            Err(error) => self.take_back(&mut state, &write, linked).and(Err(error)),
        };
        self.landed.notify_all();
        result
    }

    pub(super) fn abort(&self, token: WriteToken) {
        if token.0 & IN_PLACE != 0 {
            self.epochs.unpin(token.0 & !IN_PLACE);
            return;
        }
        let mut state = self.state();
        let write = state.end(token);
        // There is nobody to tell: the counts stay too high, a leak, which is what a crash here leaves too.
        // A corrupt image is marked, and the next write says so.
        self.guard(self.take_back(&mut state, &write, 0)).ok();
        self.landed.notify_all();
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
        let last = old.len() - 1;
        state.barrier = true;
        for (index, (old, was)) in old.into_iter().enumerate() {
            let guest = write.clusters.start + index as u64 * cluster;
            let host = write.host + index as u64 * cluster;
            let mask_of = |first: u32, last_mask: u32| {
                if index == 0 {
                    first
                } else if index == last {
                    last_mask
                } else {
                    u32::MAX
                }
            };
            let (entry, frees) = match write.kind {
                WriteKind::Fresh { first, last } => {
                    (moved(was, host, mask_of(first, last), geometry.extended_l2), true)
                }
                WriteKind::Reuse { first, last } => {
                    (begun(old, was, mask_of(first, last), geometry.extended_l2), false)
                }
                WriteKind::Compressed { stored_bytes } => {
                    (L2Entry::for_compressed(host, stored_bytes, geometry), true)
                }
            };
            self.set_entry(table, guest, entry)?;
            *linked += 1;
            // In an external data file the cluster has its one place and stays there.
            if frees && (!geometry.external_data || matches!(was, Cluster::Compressed { .. })) {
                self.free_entry(state, was, self.runtime.discard_other);
            }
        }
        Ok(())
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
