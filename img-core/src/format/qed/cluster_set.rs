//! A set of cluster numbers in as little memory as its members need.
//!
//! A file may claim 2^50 clusters while it holds a few kilobytes, so nothing here is sized by the file's
//! apparent length: a chunk of 4096 clusters appears with its first member, as a short list, and becomes a
//! bitmap when the list is as long as that.

use std::{collections::HashMap, ops::Range};

/// Clusters that one chunk covers.
const CHUNK_CLUSTERS: u64 = 4096;
/// A list of so many takes as much memory as a bitmap.
const LIST_LIMIT: usize = 256;

/// Members of one chunk, by number in it.
#[derive(Debug)]
enum Chunk {
    List(Vec<u16>),
    Bitmap(Box<[u64; 64]>),
}

impl Chunk {
    /// Adds one; false if it is in there.
    fn insert(&mut self, member: u16) -> bool {
        match self {
            Self::List(members) => {
                let Err(at) = members.binary_search(&member) else { return false };
                members.insert(at, member);
                if members.len() > LIST_LIMIT {
                    let mut bitmap = Box::new([0; 64]);
                    for member in &*members {
                        bitmap[usize::from(member / 64)] |= 1_u64 << (member % 64);
                    }
                    *self = Self::Bitmap(bitmap);
                }
                true
            }
            Self::Bitmap(bitmap) => {
                let word = &mut bitmap[usize::from(member / 64)];
                let bit = 1 << (member % 64);
                let is_new = *word & bit == 0;
                *word |= bit;
                is_new
            }
        }
    }
}

/// The set.
#[derive(Debug, Default)]
pub(super) struct ClusterSet {
    chunks: HashMap<u64, Chunk>,
    len: u64,
}

impl ClusterSet {
    /// How many are in it.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Whether a cluster is in it.
    pub(super) fn contains(&self, cluster: u64) -> bool {
        let member = u16::try_from(cluster % CHUNK_CLUSTERS).expect("below 4096");
        match self.chunks.get(&(cluster / CHUNK_CLUSTERS)) {
            None => false,
            Some(Chunk::List(members)) => members.binary_search(&member).is_ok(),
            Some(Chunk::Bitmap(bitmap)) => bitmap[usize::from(member / 64)] >> (member % 64) & 1 == 1,
        }
    }

    /// Adds a range, and returns how many of it were in the set before.
    pub(super) fn insert(&mut self, clusters: Range<u64>) -> u64 {
        let mut present = 0;
        for cluster in clusters {
            let chunk = self.chunks.entry(cluster / CHUNK_CLUSTERS).or_insert(Chunk::List(Vec::new()));
            let member = u16::try_from(cluster % CHUNK_CLUSTERS).expect("below 4096");
            if chunk.insert(member) {
                self.len += 1;
            } else {
                present += 1;
            }
        }
        present
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is put in, it holds what a plain set holds.
        #[test]
        fn it_equals_a_plain_set(
            ranges in proptest::collection::vec((prop_oneof![0_u64..20_000, Just(1 << 50)], 0_u64..600), 0..40),
        ) {
            let (mut set, mut model) = (ClusterSet::default(), BTreeSet::new());
            for (start, len) in ranges {
                let present = (start..start + len).filter(|cluster| !model.insert(*cluster)).count();
                prop_assert_eq!(set.insert(start..start + len), present as u64);
                prop_assert_eq!(set.len(), model.len() as u64);
            }
            for cluster in (0..30_000).chain(1 << 50..(1 << 50) + 700) {
                prop_assert_eq!(set.contains(cluster), model.contains(&cluster));
            }
        }
    }
}
