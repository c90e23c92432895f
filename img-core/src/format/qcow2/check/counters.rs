//! How often each host cluster is referenced, counted in as little memory as the counts need.
//!
//! A file may claim 2^31 clusters while it holds a few kilobytes, so nothing here is sized by the file's
//! apparent length but a table of chunks. A chunk covers [`CHUNK_CLUSTERS`] clusters, appears with the
//! first reference into it, and starts with two bits a cluster: enough for an image without snapshots.

use std::{collections::HashMap, ops::Range};

/// Clusters that one chunk covers.
pub(super) const CHUNK_CLUSTERS: u64 = 4096;
/// Two-bit counts in a word.
pub(super) const LANES: u64 = 32;
/// A one in every lane.
const ONES: u64 = 0x5555_5555_5555_5555;
/// Counts from here on stand in a side table.
const LARGE: u16 = u16::MAX;
/// Most memory that counts may take: what the reference needs for the largest file that it accepts
/// (16-bit counts of 2^31 clusters).
const MAX_BYTES: u64 = 4 << 30;

/// The counts would need more memory than they may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooManyCounts;

/// Counts of [`CHUNK_CLUSTERS`] clusters.
enum Chunk {
    Untouched,
    /// Lane `i` of word `w` belongs to cluster `32 w + i`.
    Two(Box<[u64; 128]>),
    Byte(Box<[u8; 4096]>),
    Half(Box<[u16; 4096]>),
}

/// Counts of all clusters of a file.
pub(super) struct Counters {
    chunks: Vec<Chunk>,
    clusters: u64,
    large: HashMap<u64, u64>,
    bytes: u64,
}

impl Counters {
    /// All zero.
    pub(super) fn new(clusters: u64) -> Self {
        let mut counters = Self { chunks: Vec::new(), clusters: 0, large: HashMap::new(), bytes: 0 };
        counters.grow(clusters);
        counters
    }

    /// How many clusters are counted.
    pub(super) fn clusters(&self) -> u64 {
        self.clusters
    }

    /// Counts at least `clusters` clusters from now on.
    pub(super) fn grow(&mut self, clusters: u64) {
        if clusters > self.clusters {
            self.clusters = clusters;
            let chunks = index(clusters.div_ceil(CHUNK_CLUSTERS));
            self.chunks.resize_with(chunks, || Chunk::Untouched);
        }
    }

    /// Adds `weight` references to each cluster of a range, growing where it reaches past the end.
    pub(super) fn add(&mut self, clusters: Range<u64>, weight: u64) -> Result<(), TooManyCounts> {
        if clusters.is_empty() || weight == 0 {
            return Ok(());
        }
        self.grow(clusters.end);
        let mut at = clusters.start;
        while at < clusters.end {
            let chunk = index(at / CHUNK_CLUSTERS);
            let base = at - at % CHUNK_CLUSTERS;
            let end = clusters.end.min(base + CHUNK_CLUSTERS);
            match self.chunks[chunk].try_add(index(at - base)..index(end - base), weight) {
                Ok(()) => at = end,
                Err(done) => {
                    at = base + done as u64;
                    if let Chunk::Half(counts) = &mut self.chunks[chunk] {
                        // This one cluster does not fit sixteen bits.
                        let count = &mut counts[done];
                        let before = if *count == LARGE { self.large[&at] } else { u64::from(*count) };
                        *count = LARGE;
                        self.large.insert(at, before.saturating_add(weight));
                        self.bytes += 32;
                        at += 1;
                    } else {
                        self.widen(chunk, weight);
                    }
                    if self.bytes > MAX_BYTES {
                        return Err(TooManyCounts);
                    }
                }
            }
        }
        Ok(())
    }

    /// The count of a cluster; 0 past the end.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let within = index(cluster % CHUNK_CLUSTERS);
        match self.chunks.get(index(cluster / CHUNK_CLUSTERS)) {
            None | Some(Chunk::Untouched) => 0,
            Some(Chunk::Two(words)) => (words[within / 32] >> (within % 32 * 2)) & 3,
            Some(Chunk::Byte(counts)) => u64::from(counts[within]),
            Some(Chunk::Half(counts)) if counts[within] == LARGE => self.large[&cluster],
            Some(Chunk::Half(counts)) => u64::from(counts[within]),
        }
    }

    /// The [`LANES`] two-bit counts from `first` (a multiple of that) on, where they are kept so.
    pub(super) fn lanes(&self, first: u64) -> Option<u64> {
        match self.chunks.get(index(first / CHUNK_CLUSTERS)) {
            None | Some(Chunk::Untouched) => Some(0),
            Some(Chunk::Two(words)) => Some(words[index(first % CHUNK_CLUSTERS / LANES)]),
            Some(_) => None,
        }
    }

    /// The first cluster from `from` on, and before `end`, that may have references: whole chunks without
    /// any are passed over.
    pub(super) fn next_touched(&self, from: u64, end: u64) -> u64 {
        let mut at = from;
        while at < end && matches!(self.chunks.get(index(at / CHUNK_CLUSTERS)), None | Some(Chunk::Untouched))
        {
            at = (at / CHUNK_CLUSTERS + 1) * CHUNK_CLUSTERS;
        }
        at.min(end)
    }

    /// Whether some cluster has more than `limit` references.
    pub(super) fn any_above(&self, limit: u64) -> bool {
        self.large.values().any(|count| *count > limit)
            || self.chunks.iter().any(|chunk| match chunk {
                Chunk::Untouched => false,
                Chunk::Two(words) => match limit {
                    0 => words.iter().any(|word| *word != 0),
                    1 => words.iter().any(|word| word & !ONES != 0),
                    2 => words.iter().any(|word| word & (word >> 1) & ONES != 0),
                    _ => false,
                },
                Chunk::Byte(counts) => limit < 255 && counts.iter().any(|count| u64::from(*count) > limit),
                Chunk::Half(counts) => limit < 65535 && counts.iter().any(|count| u64::from(*count) > limit),
            })
    }

    /// Adds everything that `other` counted.
    pub(super) fn absorb(&mut self, other: Self) -> Result<(), TooManyCounts> {
        self.grow(other.clusters);
        let large = other.large;
        for (position, chunk) in other.chunks.into_iter().enumerate() {
            if matches!(chunk, Chunk::Untouched) {
                continue;
            }
            if matches!(self.chunks[position], Chunk::Untouched) {
                self.bytes += chunk.bytes();
                self.chunks[position] = chunk;
                continue;
            }
            if let (Chunk::Two(mine), Chunk::Two(theirs)) = (&mut self.chunks[position], &chunk)
                && mine.iter().zip(theirs.iter()).all(|(a, b)| lanes_fit(*a, *b))
            {
                mine.iter_mut().zip(theirs.iter()).for_each(|(a, b)| *a += b);
                continue;
            }
            let base = position as u64 * CHUNK_CLUSTERS;
            for within in 0..CHUNK_CLUSTERS {
                let count = match chunk.small(index(within)) {
                    LARGE => 0, // added below
                    count => u64::from(count),
                };
                self.add(base + within..base + within + 1, count)?;
            }
        }
        for (cluster, count) in large {
            let chunk = &self.chunks[index(cluster / CHUNK_CLUSTERS)];
            let is_marked =
                chunk.small(index(cluster % CHUNK_CLUSTERS)) == LARGE && matches!(chunk, Chunk::Half(_));
            if is_marked && !self.large.contains_key(&cluster) {
                // Its chunk was moved here as a whole.
                self.large.insert(cluster, count);
                self.bytes += 32;
            } else {
                self.add(cluster..cluster + 1, count)?;
            }
        }
        if self.bytes > MAX_BYTES { Err(TooManyCounts) } else { Ok(()) }
    }

    /// Makes a chunk able to hold more than it can, for adding `weight`.
    fn widen(&mut self, position: usize, weight: u64) {
        let chunk = &mut self.chunks[position];
        let before = chunk.bytes();
        *chunk = match chunk {
            Chunk::Untouched if weight <= 3 => Chunk::Two(Box::new([0; 128])),
            Chunk::Untouched | Chunk::Two(_) if weight <= 250 => {
                let mut counts = Box::new([0_u8; 4096]);
                for (within, count) in counts.iter_mut().enumerate() {
                    *count = u8::try_from(chunk.small(within)).expect("two bits fit a byte");
                }
                Chunk::Byte(counts)
            }
            _ => {
                let mut counts = Box::new([0_u16; 4096]);
                for (within, count) in counts.iter_mut().enumerate() {
                    *count = chunk.small(within);
                }
                Chunk::Half(counts)
            }
        };
        self.bytes = self.bytes - before + self.chunks[position].bytes();
    }
}

impl Chunk {
    /// Adds `weight` to a range, up to the first count that cannot hold it: `Err` names that one.
    fn try_add(&mut self, range: Range<usize>, weight: u64) -> Result<(), usize> {
        match self {
            Self::Untouched => Err(range.start),
            Self::Two(words) => {
                if weight > 3 {
                    return Err(range.start);
                }
                let mut at = range.start;
                while at < range.end {
                    let end = range.end.min((at / 32 + 1) * 32);
                    let addend = lane_mask(at % 32, end - at) & (ONES * weight);
                    let word = &mut words[at / 32];
                    if !lanes_fit(*word, addend) {
                        return Err(at);
                    }
                    *word += addend;
                    at = end;
                }
                Ok(())
            }
            Self::Byte(counts) => {
                let Ok(weight) = u8::try_from(weight) else { return Err(range.start) };
                for at in range {
                    counts[at] = counts[at].checked_add(weight).ok_or(at)?;
                }
                Ok(())
            }
            Self::Half(counts) => {
                for at in range {
                    let sum = u64::from(counts[at]).saturating_add(weight);
                    counts[at] = u16::try_from(sum).ok().filter(|sum| *sum != LARGE).ok_or(at)?;
                }
                Ok(())
            }
        }
    }

    /// A count, [`LARGE`] where it stands in the side table.
    fn small(&self, within: usize) -> u16 {
        match self {
            Self::Untouched => 0,
            Self::Two(words) => {
                u16::try_from((words[within / 32] >> (within % 32 * 2)) & 3).expect("two bits")
            }
            Self::Byte(counts) => u16::from(counts[within]),
            Self::Half(counts) => counts[within],
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Untouched => 0,
            Self::Two(_) => CHUNK_CLUSTERS / 4,
            Self::Byte(_) => CHUNK_CLUSTERS,
            Self::Half(_) => CHUNK_CLUSTERS * 2,
        }
    }
}

/// Both bits of `count` lanes (1 to 32) from lane `first` on.
fn lane_mask(first: usize, count: usize) -> u64 {
    (u64::MAX >> (64 - count * 2)) << (first * 2)
}

/// Whether adding `b` to `a` lane by lane stays below four in each.
fn lanes_fit(a: u64, b: u64) -> bool {
    let carry_low = a & b & ONES;
    let (a_high, b_high) = ((a >> 1) & ONES, (b >> 1) & ONES);
    (a_high & b_high) | (carry_low & (a_high | b_high)) == 0
}

/// An index into a table that was sized with the same number.
pub(super) fn index(number: u64) -> usize {
    usize::try_from(number).expect("a table index")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is added in whatever pieces, by one counter or two merged ones, the sums are right.
        #[test]
        fn counts_equal_a_plain_array(
            adds in proptest::collection::vec(
                (0_u64..9000, 0_u64..200, prop_oneof![Just(1_u64), Just(2), Just(3), 1_u64..300, Just(70_000)], any::<bool>()),
                1..60,
            ),
        ) {
            let mut model = vec![0_u64; 9200];
            let (mut one, mut two) = (Counters::new(100), Counters::new(9000));
            for (start, count, weight, which) in adds {
                let target = if which { &mut one } else { &mut two };
                target.add(start..start + count, weight).unwrap();
                for cluster in start..start + count {
                    model[index(cluster)] += weight;
                }
            }
            one.absorb(two).unwrap();
            for (cluster, expected) in model.iter().enumerate() {
                prop_assert_eq!(one.get(cluster as u64), *expected, "cluster {}", cluster);
            }
            for limit in [0, 1, 2, 3, 254, 255, 65534, 65535, 1 << 40] {
                prop_assert_eq!(one.any_above(limit), model.iter().any(|count| *count > limit), "above {}", limit);
            }
            for first in (0..9200).step_by(32) {
                if let Some(lanes) = one.lanes(first) {
                    for lane in 0..32.min(9200 - first) {
                        prop_assert_eq!((lanes >> (lane * 2)) & 3, model[index(first + lane)]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_huge_file_without_references_takes_little() {
        let mut counters = Counters::new(1 << 31);
        counters.add((1 << 30)..(1 << 30) + 1, 1).unwrap();
        assert_eq!(counters.bytes, 1024);
        assert_eq!(counters.next_touched(0, 1 << 31), 1 << 30);
        assert_eq!(counters.next_touched((1 << 30) + 4096, 1 << 31), 1 << 31);
    }
}
