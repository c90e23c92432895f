//! Host clusters that are known to be counted once: guest data and tables in them may be changed in place.
//!
//! An entry says by its copied flag that nobody else uses what it names. A damaged or hostile one says so of a cluster
//! that is free, which the allocator gives to somebody else, or of one that a snapshot shares. The count decides: it is
//! looked at before the first write in place, and what it said is kept until the count changes. So a write in place
//! asks memory alone, and what was allocated here is known from the start.
//!
//! Whoever changes a count, or learns of it, holds the state lock: a cluster is in the set only while its count is one.

use std::{collections::HashMap, ops::Range, sync::PoisonError};

use super::{
    entry::{COPIED, L2Entry},
    geometry::refcount_get,
    layer::Qcow2Layer,
    write::Way,
};
use crate::Result;

/// Words that are kept, of 64 clusters each: those of 1 TiB with clusters of 64 KiB. Rather than taking more memory
/// all are forgotten, and counts are looked at again.
const MAX_WORDS: usize = 1 << 18;

/// A set of host clusters.
#[derive(Debug, Default)]
pub(super) struct CountedOnce {
    /// By cluster number / 64, the least significant bit first. None is zero.
    words: HashMap<u64, u64>,
}

impl CountedOnce {
    /// Whether all of `clusters` are known to be counted once.
    fn holds(&self, clusters: Range<u64>) -> bool {
        masks(clusters).all(|(word, mask)| self.words.get(&word).is_some_and(|known| known & mask == mask))
    }

    fn add(&mut self, clusters: Range<u64>) {
        masks(clusters).for_each(|(word, mask)| self.add_word(word, mask));
    }

    fn add_word(&mut self, word: u64, mask: u64) {
        if mask == 0 {
            return;
        }
        if self.words.len() >= MAX_WORDS {
            self.words.clear();
        }
        *self.words.entry(word).or_default() |= mask;
    }

    fn remove(&mut self, clusters: Range<u64>) {
        for (word, mask) in masks(clusters) {
            if let Some(known) = self.words.get_mut(&word) {
                *known &= !mask;
                if *known == 0 {
                    self.words.remove(&word);
                }
            }
        }
    }
}

/// The words that hold `clusters`, with their bits.
fn masks(clusters: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    let words = clusters.start / 64..clusters.end.div_ceil(64);
    words.map(move |word| {
        let first = clusters.start.max(word * 64) - word * 64;
        let behind = clusters.end.min(word * 64 + 64) - word * 64;
        (word, u64::MAX << first & u64::MAX >> (64 - behind))
    })
}

impl Qcow2Layer {
    /// Whether guest data may be written over what is in `host`, as far as is known: no structure stands there, and
    /// its clusters are counted once. [`Self::settle_flags`] finds out what is not known.
    pub(super) fn may_overwrite(&self, host: &Range<u64>) -> Result<bool> {
        if self.geometry.external_data {
            return Ok(true);
        }
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        self.check_overlap_with(&places, host, None)?;
        Ok(places.counted_once.holds(self.clusters_of(host)))
    }

    /// For whoever holds the state, and has counted `clusters` up to one.
    pub(super) fn note_counted_once(&self, clusters: Range<u64>) {
        self.places.write().unwrap_or_else(PoisonError::into_inner).counted_once.add(clusters);
    }

    /// For whoever holds the state, before the counts of `clusters` change.
    pub(super) fn forget_counted_once(&self, clusters: Range<u64>) {
        self.places.write().unwrap_or_else(PoisonError::into_inner).counted_once.remove(clusters);
    }

    /// Holds the copied flags of a part of `guest`, which no write is in flight to, against the counts, and returns
    /// that part: what one L2 table covers. For whoever holds the state, and while it is held the flags of that part
    /// may be trusted. Where a count says that others use the cluster too, the flag goes, and with it the way to
    /// overwrite.
    ///
    /// # Errors
    /// [`Error::Corrupt`](crate::Error::Corrupt) where an entry that would be written over names a free cluster.
    pub(super) fn settle_flags(&self, guest: &Range<u64>) -> Result<Range<u64>> {
        let (geometry, root) = (self.geometry, self.root());
        let l1_index = geometry.l1_index(guest.start);
        let table_end = (l1_index + 1).saturating_mul(geometry.l2_span_bytes());
        let part = guest.start..guest.end.min(table_end);
        let entry = self.map.l1_entry(root, l1_index)?;
        let table = self.map.checked_table(root, l1_index, entry)?.filter(|_| entry.is_copied());
        let Some(table) = table.filter(|_| !geometry.external_data) else { return Ok(part) };
        let mut at = part.start;
        while at < part.end {
            let start = geometry.cluster_start(at);
            let end = (start + geometry.cluster_bytes()).min(part.end);
            let found = self.map.entry_at(table, geometry.l2_index(start))?;
            if let Way::InPlace(host) | Way::Reuse(host) = self.way(found, &(at..end))? {
                match self.look_at_count(host >> geometry.cluster_bits)? {
                    0 => {
                        let expected = "a cluster that is in use by its count, which is 0";
                        return Err(self.map.corrupt("L2 entry", found.at, expected, host));
                    }
                    1 => {}
                    _ => {
                        let entry = L2Entry { word: found.entry.word & !COPIED, ..found.entry };
                        self.set_entry(table, start, entry)?;
                    }
                }
            }
            at = end;
        }
        Ok(part)
    }

    /// Whether a cluster is known to be counted once.
    pub(super) fn is_counted_once(&self, cluster: u64) -> bool {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        places.counted_once.holds(cluster..cluster + 1)
    }

    /// The count of a cluster, for whoever holds the state. Where it is not known yet, those of its neighbours are
    /// noted too.
    pub(super) fn look_at_count(&self, cluster: u64) -> Result<u64> {
        if self.is_counted_once(cluster) {
            return Ok(1);
        }
        let (word, order) = (cluster / 64, self.geometry.refcount_order);
        let (mut count, mut once) = (0, 0);
        self.visit_refcounts(word * 64..word * 64 + 64, |run, counts| {
            let Some((bytes, first)) = counts else { return true };
            for (number, index) in run.zip(first..) {
                let found = refcount_get(bytes, order, index);
                once |= u64::from(found == 1) << (number % 64);
                if number == cluster {
                    count = found;
                }
            }
            true
        })?;
        self.places.write().unwrap_or_else(PoisonError::into_inner).counted_once.add_word(word, once);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// It is a set, also across the borders of words.
        #[test]
        fn clusters_come_and_go(
            steps in proptest::collection::vec((0_u64..200, 1_u64..140, any::<bool>()), 1..20),
            asked in 0_u64..200,
            length in 1_u64..140,
        ) {
            let (mut set, mut model) = (CountedOnce::default(), HashSet::new());
            for (start, length, adds) in steps {
                let clusters = start..start + length;
                if adds {
                    set.add(clusters.clone());
                    model.extend(clusters);
                } else {
                    set.remove(clusters.clone());
                    model.retain(|cluster| !clusters.contains(cluster));
                }
            }
            prop_assert_eq!(set.holds(asked..asked + length), (asked..asked + length).all(|at| model.contains(&at)));
            prop_assert!(set.words.values().all(|word| *word != 0));
        }
    }

    #[test]
    fn memory_is_bounded() {
        let mut set = CountedOnce::default();
        (0..=MAX_WORDS as u64).for_each(|word| set.add(word * 64..word * 64 + 1));
        assert_eq!(set.words.len(), 1);
        assert!(set.holds(MAX_WORDS as u64 * 64..MAX_WORDS as u64 * 64 + 1) && !set.holds(0..1));
    }
}
