//! Where new clusters live: behind the last one. The file's length says what is allocated ("Specification"),
//! and nothing is ever freed but what a write that did not happen had set aside.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    sync::atomic::Ordering,
};

use super::{header::feature, layer::QedLayer};
use crate::{Error, Result, format::in_flight::GuestRanges};

/// A prepared write to clusters that are newly allocated.
#[derive(Clone, Debug)]
pub(super) struct Write {
    /// The guest clusters it covers, in bytes.
    pub(super) clusters: Range<u64>,
    /// Where the first of them will stand.
    pub(super) host: u64,
}

/// What the changing side of an image knows; one lock around it all.
#[derive(Debug, Default)]
pub(super) struct State {
    /// L2 tables that L1 on disk does not name yet.
    pub(super) new_tables: BTreeSet<u64>,
    /// Runs of clusters that nothing names: end by start, neighbours merged.
    free: BTreeMap<u64, u64>,
    /// Clusters at the end were given back, and what was written there may still make the file longer.
    pub(super) has_loose_end: bool,
    /// The file reaches up to here before a table on disk may say so.
    pub(super) used_end_bytes: u64,
    /// Tables in memory refer to data, or to tables, that may not be durable.
    pub(super) barrier: bool,
    /// Prepared writes by token.
    writes: HashMap<u64, Write>,
    /// Guest ranges of prepared writes, in whole clusters.
    pub(super) in_flight: GuestRanges,
    next_token: u64,
}

impl State {
    /// Notes a prepared write.
    pub(super) fn begin(&mut self, write: Write) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.in_flight.insert(&write.clusters);
        self.writes.insert(token, write);
        token
    }

    /// Takes a prepared write that ends.
    pub(super) fn end(&mut self, token: u64) -> Write {
        let write = self.writes.remove(&token).expect("each prepared write ends once");
        self.in_flight.remove(&write.clusters);
        write
    }

    /// Gives back clusters that nothing names.
    fn release(&mut self, host: Range<u64>) {
        if host.is_empty() {
            return;
        }
        let (mut start, mut end) = (host.start, host.end);
        if let Some((&before, &before_end)) = self.free.range(..start).next_back()
            && before_end == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(behind_end) = self.free.remove(&end) {
            end = behind_end;
        }
        self.free.insert(start, end);
    }

    /// The first free run of `len` bytes, taken.
    fn take_free(&mut self, len: u64) -> Option<u64> {
        let (&start, &end) = self.free.iter().find(|&(start, end)| end - start >= len)?;
        self.free.remove(&start);
        if end - start > len {
            self.free.insert(start + len, end);
        }
        Some(start)
    }

    /// The start of the free run that ends at `end`, taken.
    fn take_free_tail(&mut self, end: u64) -> Option<u64> {
        let (&start, _) = self.free.iter().next_back().filter(|&(_, &run_end)| run_end == end)?;
        self.free.remove(&start);
        Some(start)
    }
}

impl QedLayer {
    /// What precedes every change of the map: the bit that says that a crash from here on may leave clusters
    /// that nobody names is durable first ("Consistency checking").
    pub(super) fn before_changing_tables(&self) -> Result<()> {
        if self.header().features & feature::NEED_CHECK == 0 {
            self.update_header(|header| header.features |= feature::NEED_CHECK)?;
        }
        Ok(())
    }

    /// Sets `clusters` clusters in a row aside and returns the host offset of the first.
    pub(super) fn allocate(&self, state: &mut State, clusters: u64) -> Result<u64> {
        let host = self.take_place(state, clusters)?;
        self.map.reach(host.end);
        Ok(host.start)
    }

    /// Takes a place for clusters in a row. Entries may name it once the map [reaches](super::map::TableMap::reach) it.
    pub(super) fn take_place(&self, state: &mut State, clusters: u64) -> Result<Range<u64>> {
        let geometry = self.map.geometry;
        let full = || Error::Invalid(format!("{}: no host offset below 2^63 is free", self.path().display()));
        let len = clusters.checked_mul(geometry.cluster_bytes()).ok_or_else(full)?;
        let host = state.take_free(len).unwrap_or_else(|| self.map.end());
        let end = host.checked_add(len).filter(|end| i64::try_from(*end).is_ok()).ok_or_else(full)?;
        Ok(host..end)
    }

    /// Gives back clusters that nothing names: at the end they cease to be allocated, elsewhere they are the
    /// next to be used. What is left of them when the image is closed is leaked, as after a crash.
    pub(super) fn release(&self, state: &mut State, host: Range<u64>) {
        state.release(host);
        if let Some(start) = state.take_free_tail(self.map.end()) {
            self.map.end_bytes.store(start, Ordering::Release);
            state.has_loose_end = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_runs_merge_and_are_taken_again() {
        let mut state = State::default();
        for host in [0..10, 20..30, 10..20, 50..60, 30..30] {
            state.release(host);
        }
        assert_eq!(state.take_free(40), None);
        assert_eq!(state.take_free(25), Some(0));
        assert_eq!(state.take_free(10), Some(50));
        assert_eq!(state.take_free_tail(60), None);
        assert_eq!(state.take_free_tail(30), Some(25));
        assert_eq!(state.take_free(1), None);
    }
}
