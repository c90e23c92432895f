//! What must not be overwritten: every metadata and data write is held against the places of all known
//! structures before it is made.
//!
//! The places are collected when an image is first changed (a walk over L1, the refcount table and the L1
//! tables of the snapshots) and kept up to date as tables come and go. A write that would hit a structure
//! of another kind is refused, the image is marked corrupt, and nothing is written any more.

use std::{collections::HashMap, ops::Range};

use super::geometry::Geometry;
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
    /// Kinds by host cluster.
    clusters: HashMap<u64, u16>,
}

impl Places {
    /// No structure known yet.
    pub(super) fn new(geometry: Geometry, classes: Classes) -> Self {
        Self { geometry, classes, clusters: HashMap::new() }
    }

    /// Notes a structure.
    pub(super) fn add(&mut self, kind: Kind, host: Range<u64>) {
        for cluster in self.clusters_of(&host) {
            *self.clusters.entry(cluster).or_default() |= kind.bit();
        }
    }

    /// Forgets a structure.
    pub(super) fn remove(&mut self, kind: Kind, host: Range<u64>) {
        for cluster in self.clusters_of(&host) {
            if let Some(kinds) = self.clusters.get_mut(&cluster) {
                *kinds &= !kind.bit();
                if *kinds == 0 {
                    self.clusters.remove(&cluster);
                }
            }
        }
    }

    /// The name of a structure that a write to `host` would damage. `own` is the kind that is written;
    /// `None` for guest data.
    pub(super) fn hit(&self, host: &Range<u64>, own: Option<Kind>) -> Option<&'static str> {
        let others = self.classes.0 & !own.map_or(0, Kind::bit);
        let clusters = self.clusters_of(host);
        let hit = if clusters.end - clusters.start > self.clusters.len() as u64 {
            self.clusters
                .iter()
                .filter(|(cluster, _)| clusters.contains(cluster))
                .map(|(_, kinds)| kinds & others)
                .find(|&kinds| kinds != 0)
        } else {
            clusters
                .filter_map(|cluster| self.clusters.get(&cluster))
                .map(|kinds| kinds & others)
                .find(|&kinds| kinds != 0)
        };
        hit.and_then(|kinds| {
            KINDS.iter().find(|(kind, ..)| kinds & kind.bit() != 0).map(|&(_, _, name)| name)
        })
    }

    fn clusters_of(&self, host: &Range<u64>) -> Range<u64> {
        host.start >> self.geometry.cluster_bits..host.end.div_ceil(self.geometry.cluster_bytes())
    }
}
