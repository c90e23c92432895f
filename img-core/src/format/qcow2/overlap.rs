//! What must not be overwritten: every metadata and data write is held against the places of all known
//! structures before it is made.
//!
//! The places are collected when an image is first changed (a walk over L1, the refcount table and the L1
//! tables of the snapshots) and kept up to date as tables come and go. A write that would hit a structure
//! of another kind is refused, the image is marked corrupt, and nothing is written any more.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
};

use super::{counted_once::CountedOnce, geometry::Geometry};
use crate::{Error, Result, format::OptionSet};

/// The kinds of structure, as the `overlap-check` options name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    MainHeader,
    ActiveL1,
    ActiveL2,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    InactiveL1,
    InactiveL2,
    BitmapDirectory,
}

use Kind::{
    ActiveL1, ActiveL2, BitmapDirectory, InactiveL1, InactiveL2, MainHeader, RefcountBlock, RefcountTable,
    SnapshotTable,
};

/// All kinds, in the order in which a hit is reported: option, and name in messages.
const KINDS: [(Kind, &str, &str); 9] = [
    (MainHeader, "main-header", "qcow2_header"),
    (ActiveL1, "active-l1", "active L1 table"),
    (ActiveL2, "active-l2", "active L2 table"),
    (RefcountTable, "refcount-table", "refcount table"),
    (RefcountBlock, "refcount-block", "refcount block"),
    (SnapshotTable, "snapshot-table", "snapshot table"),
    (InactiveL1, "inactive-l1", "inactive L1 table"),
    (InactiveL2, "inactive-l2", "inactive L2 table"),
    (BitmapDirectory, "bitmap-directory", "bitmap directory"),
];

impl Kind {
    fn bit(self) -> u16 {
        1 << self as u16
    }

    /// What messages call it.
    pub(super) fn name(self) -> &'static str {
        KINDS[self as usize].2
    }
}

/// A set of kinds that are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Classes(u16);

impl Classes {
    const NONE: Self = Self(0);
    /// What never moves.
    const CONSTANT: u16 = 1 << MainHeader as u16
        | 1 << ActiveL1 as u16
        | 1 << RefcountTable as u16
        | 1 << SnapshotTable as u16
        | 1 << BitmapDirectory as u16;
    /// What is known without further reading: all but the L2 tables of snapshots.
    const CACHED: u16 =
        Self::CONSTANT | 1 << ActiveL2 as u16 | 1 << RefcountBlock as u16 | 1 << InactiveL1 as u16;
    const ALL: u16 = Self::CACHED | 1 << InactiveL2 as u16;

    /// Reads `overlap-check`, `overlap-check.template` and the switches of single kinds.
    pub(super) fn parse(options: &OptionSet) -> Result<Self> {
        let (short, long) = (options.get("overlap-check"), options.get("overlap-check.template"));
        if let (Some(short), Some(long)) = (short, long)
            && short != long
        {
            return Err(Error::Invalid(format!(
                "Conflicting values for qcow2 options 'overlap-check' ('{short}') and 'overlap-check.template' ('{long}')"
            )));
        }
        let mut classes = match short.or(long).unwrap_or("cached") {
            "none" => Self::NONE,
            "constant" => Self(Self::CONSTANT),
            "cached" => Self(Self::CACHED),
            "all" => Self(Self::ALL),
            other => {
                return Err(Error::Invalid(format!(
                    "Unsupported value '{other}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, all"
                )));
            }
        };
        for (kind, name, _) in KINDS {
            match options.switch(&format!("overlap-check.{name}"))? {
                Some(true) => classes.0 |= kind.bit(),
                Some(false) => classes.0 &= !kind.bit(),
                None => {}
            }
        }
        Ok(classes)
    }

    /// Whether [`Self::parse`] reads the option.
    pub(super) fn is_option(name: &str) -> bool {
        name == "overlap-check"
            || name
                .strip_prefix("overlap-check.")
                .is_some_and(|rest| rest == "template" || KINDS.iter().any(|(_, known, _)| rest == *known))
    }

    /// Whether `kind` is checked.
    pub(super) fn has(self, kind: Kind) -> bool {
        self.0 & kind.bit() != 0
    }
}

/// The clusters of all known structures.
#[derive(Debug)]
pub(super) struct Places {
    geometry: Geometry,
    classes: Classes,
    /// Structures of a single cluster, of which there are many: kinds by host cluster.
    clusters: HashMap<u64, u16>,
    /// Longer ones, for each kind: end by start, in clusters; those of a kind do not overlap.
    runs: [BTreeMap<u64, u64>; KINDS.len()],
    /// Clusters that guest data may be written over, if no structure stands there. A write in place asks for both.
    pub(super) counted_once: CountedOnce,
}

impl Places {
    /// No structure known yet.
    pub(super) fn new(geometry: Geometry, classes: Classes) -> Self {
        Self {
            geometry,
            classes,
            clusters: HashMap::new(),
            runs: Default::default(),
            counted_once: CountedOnce::default(),
        }
    }

    /// Notes a structure. Takes memory for each structure, not for each of its clusters.
    pub(super) fn add(&mut self, kind: Kind, host: Range<u64>) {
        let clusters = self.clusters_of(&host);
        if clusters.end == clusters.start + 1 {
            *self.clusters.entry(clusters.start).or_default() |= kind.bit();
            return;
        }
        let runs = &mut self.runs[kind as usize];
        let (mut start, mut end) = (clusters.start, clusters.end);
        // Takes in what it touches, so that a kind's runs stay apart whatever an image says.
        while let Some((&before, &before_end)) =
            runs.range(..=end).next_back().filter(|(_, last)| **last >= start)
        {
            runs.remove(&before);
            (start, end) = (start.min(before), end.max(before_end));
        }
        if start < end {
            runs.insert(start, end);
        }
    }

    /// Forgets a structure.
    pub(super) fn remove(&mut self, kind: Kind, host: Range<u64>) {
        let clusters = self.clusters_of(&host);
        let runs = &mut self.runs[kind as usize];
        if let Some((&start, &end)) =
            runs.range(..clusters.end).next_back().filter(|(_, end)| **end > clusters.start)
        {
            runs.remove(&start);
            for rest in [start..clusters.start, clusters.end..end] {
                if rest.start < rest.end {
                    runs.insert(rest.start, rest.end);
                }
            }
        }
        for cluster in clusters.start..clusters.end.min(clusters.start + 1) {
            if let Some(kinds) = self.clusters.get_mut(&cluster) {
                *kinds &= !kind.bit();
                if *kinds == 0 {
                    self.clusters.remove(&cluster);
                }
            }
        }
    }

    /// Tells all of them. A cluster that several structures share is told for the first of their kinds.
    pub(super) fn visit(&self, visit: &mut dyn FnMut(Kind, Range<u64>)) {
        for (&cluster, &kinds) in &self.clusters {
            if let Some((kind, ..)) = KINDS.iter().find(|(kind, ..)| kinds & kind.bit() != 0) {
                visit(*kind, cluster..cluster + 1);
            }
        }
        for (runs, (kind, ..)) in self.runs.iter().zip(KINDS) {
            for (&start, &end) in runs {
                visit(kind, start..end);
            }
        }
    }

    /// The name of a structure that a write to `host` would damage. `own` is the kind that is written;
    /// `None` for guest data.
    pub(super) fn hit(&self, host: &Range<u64>, own: Option<Kind>) -> Option<&'static str> {
        let others = self.classes.0 & !own.map_or(0, Kind::bit);
        let clusters = self.clusters_of(host);
        let singles = if clusters.end - clusters.start > self.clusters.len() as u64 {
            self.clusters
                .iter()
                .filter(|(cluster, _)| clusters.contains(cluster))
                .fold(0, |kinds, (_, more)| kinds | more)
        } else {
            clusters
                .clone()
                .filter_map(|cluster| self.clusters.get(&cluster))
                .fold(0, |kinds, more| kinds | more)
        };
        let is_hit = |kind: Kind| {
            others & kind.bit() != 0
                && (singles & kind.bit() != 0
                    || self.runs[kind as usize]
                        .range(..clusters.end)
                        .next_back()
                        .is_some_and(|(_, &end)| end > clusters.start))
        };
        KINDS.iter().find(|(kind, ..)| is_hit(*kind)).map(|&(_, _, name)| name)
    }

    fn clusters_of(&self, host: &Range<u64>) -> Range<u64> {
        host.start >> self.geometry.cluster_bits..host.end.div_ceil(self.geometry.cluster_bytes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KIND_LIST: [Kind; 3] = [ActiveL2, InactiveL1, RefcountBlock];

    proptest! {
        /// Whatever comes and goes, a hit is found exactly where a structure of another kind stands.
        #[test]
        fn hits_are_where_structures_are(
            steps in proptest::collection::vec((0_usize..3, 0_u64..40, 1_u64..5, any::<bool>()), 1..30),
            start in 0_u64..40,
            len in 1_u64..50,
        ) {
            let geometry = Geometry {
                version: 3,
                cluster_bits: 9,
                refcount_order: 4,
                extended_l2: false,
                external_data: false,
            };
            let mut places = Places::new(geometry, Classes(Classes::ALL));
            let mut model = [[false; 64]; 3];
            for (kind, start, len, adds) in steps {
                // Only the runs of snapshots' tables touch each other.
                let len = if kind == 1 { len + 1 } else { 1 };
                let start = if kind == 1 { start } else { start + 1 };
                let host = start * 512..(start + len) * 512;
                let all = (start..start + len).all(|at| model[kind][usize::try_from(at).unwrap()]);
                if adds {
                    places.add(KIND_LIST[kind], host);
                } else if all {
                    places.remove(KIND_LIST[kind], host);
                } else {
                    continue;
                }
                for at in start..start + len {
                    model[kind][usize::try_from(at).unwrap()] = adds;
                }
            }
            let end = (start + len).min(60);
            let expected = |kind: usize| (start..end).any(|at| model[kind][usize::try_from(at).unwrap()]);
            let host = start * 512..end * 512;
            prop_assert_eq!(places.hit(&host, None).is_some(), (0..3).any(expected));
            let others = (0..3).filter(|&kind| kind != 1).any(expected);
            prop_assert_eq!(places.hit(&host, Some(InactiveL1)).is_some(), others);
        }
    }
}
