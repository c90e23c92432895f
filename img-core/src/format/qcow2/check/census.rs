//! Counting all references, quietly and on all cores.
//!
//! The order in which an audit tells its findings is the order of a slow walk: table after table, entry
//! after entry. Counts do not depend on the order. So everything is counted first, each distinct L2 table
//! once with the number of times that it is referenced (fifty snapshots share most of theirs, and a
//! crafted image can name one table four million times). Tables that deserve a line are only noted; the
//! [narrator](super::narrate) reads those again in order.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use super::{
    super::entry::{COMPRESSED, COPIED, L2_RESERVED, L2Entry, OFFSET_MASK, ZERO},
    Subject,
    blocks::Singles,
    counters::{Counters, TooManyCounts, index},
    fault::Fault,
    table::{Kind, Rules, Visitor, kind, region, visit_entry},
    walk::Walker,
};
use crate::{Error, Result};

/// Tables that a worker takes at once.
const TABLES_AT_ONCE: usize = 32;
/// Neighbouring tables are read together up to this size.
const READ_BYTES: u64 = 1 << 20;
/// L2 bytes below which a second thread does not pay.
const PARALLEL_BYTES: u64 = 4 << 20;
/// Entries of misplaced L2 tables that are followed. Tables of a cluster may overlap in 4096 ways when
/// they need not be aligned, and be as many as L1 has entries; aligned ones are bounded by the file.
const UNALIGNED_ENTRIES_MAX: u64 = 1 << 28;
/// References to tables that are gathered before equal ones are merged.
const GATHER: usize = 1 << 16;

/// An L2 table and how often it is referenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TableUse {
    /// Host offset.
    pub(super) offset: u64,
    /// By how many L1 entries.
    pub(super) references: u64,
    /// By how many of the active L1 table.
    pub(super) active: u64,
}

/// All that the quiet walk learns.
pub(super) struct Census {
    pub(super) counters: Counters,
    /// Distinct tables by offset.
    pub(super) tables: Vec<TableUse>,
    /// Offsets of the tables that deserve a line, ascending.
    pub(super) faulty: Vec<u64>,
    /// Offsets of active tables with copied flags that may disagree with the counts in the file, ascending.
    pub(super) uncopied: Vec<u64>,
    /// Something outside the L2 tables deserves a line.
    pub(super) is_region_faulty: bool,
    /// There are references that were not counted: those of a table that cannot be read as one, and those of
    /// entries that the audit does not follow.
    pub(super) has_uncounted: bool,
    /// Of the virtual disk, each as often as it is referenced.
    pub(super) clusters: Clusters,
}

/// Counts of guest clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Clusters {
    pub(super) allocated: u64,
    pub(super) fragmented: u64,
    pub(super) compressed: u64,
}

/// Gathers references outside the L2 tables.
pub(super) struct Gatherer {
    rules: Rules,
    counters: Counters,
    tables: Vec<TableUse>,
    merged: usize,
    is_faulty: bool,
    has_uncounted: bool,
    overflow: Option<TooManyCounts>,
}

impl Gatherer {
    pub(super) fn new(rules: Rules, clusters: u64) -> Self {
        let counters = Counters::new(clusters);
        Self {
            rules,
            counters,
            tables: Vec::new(),
            merged: 0,
            is_faulty: false,
            has_uncounted: false,
            overflow: None,
        }
    }

    /// Makes equal tables one.
    fn merge(&mut self) {
        self.tables.sort_unstable_by_key(|table| table.offset);
        self.tables.dedup_by(|next, kept| {
            let is_same = next.offset == kept.offset;
            if is_same {
                kept.references += next.references;
                kept.active += next.active;
            }
            is_same
        });
        self.merged = self.tables.len();
    }

    /// Counts what the L2 tables refer to. With `singles` copied flags are compared as well.
    pub(super) fn count(mut self, subject: &Subject<'_>, singles: Option<&Singles>) -> Result<Census> {
        self.merge();
        if self.overflow.is_some() {
            return Err(subject.failure(rustix::io::Errno::NOMEM));
        }
        let tables = without_holes(subject, std::mem::take(&mut self.tables))?;
        let cluster = subject.geometry.cluster_bytes();
        let mut misplaced = tables.iter().filter(|table| table.offset % cluster != 0).count() as u64;
        misplaced = misplaced.saturating_mul(subject.geometry.l2_entries());
        if misplaced > UNALIGNED_ENTRIES_MAX {
            return Err(subject.failure(rustix::io::Errno::FBIG));
        }
        let bytes = (tables.len() as u64).saturating_mul(cluster);
        let workers = if bytes < PARALLEL_BYTES { 1 } else { subject.workers() };
        let next = AtomicUsize::new(0);
        let failed = Mutex::new(None);
        let rules = self.rules;
        let clusters = subject.clusters();
        let results: Vec<Worker<'_>> = thread::scope(|scope| {
            let started: Vec<_> = (0..workers)
                .map(|_| {
                    scope.spawn(|| {
                        let mut worker = Worker::new(rules, clusters, singles);
                        if let Err(error) = worker.run(subject, &tables, &next) {
                            next.store(tables.len(), Ordering::Relaxed);
                            *failed.lock().expect("no worker panics") = Some(error);
                        }
                        worker
                    })
                })
                .collect();
            started.into_iter().map(|worker| worker.join().expect("the worker does not panic")).collect()
        });
        if let Some(error) = failed.into_inner().expect("no worker panics") {
            return Err(error);
        }
        (subject.watch)(bytes, bytes)?;
        let mut census = Census {
            counters: self.counters,
            tables: Vec::new(),
            faulty: Vec::new(),
            uncopied: Vec::new(),
            is_region_faulty: self.is_faulty,
            has_uncounted: self.has_uncounted,
            clusters: Clusters::default(),
        };
        for worker in results {
            let nomem = |_| subject.failure(rustix::io::Errno::NOMEM);
            census.counters.absorb(worker.counters).map_err(nomem)?;
            census.faulty.extend(worker.faulty);
            census.uncopied.extend(worker.uncopied);
            census.has_uncounted |= worker.has_uncounted;
            census.clusters.allocated += worker.clusters.allocated;
            census.clusters.fragmented += worker.clusters.fragmented;
            census.clusters.compressed += worker.clusters.compressed;
        }
        census.faulty.sort_unstable();
        census.uncopied.sort_unstable();
        census.tables = tables;
        Ok(census)
    }
}

impl Walker for Gatherer {
    fn region(&mut self, offset: u64, bytes: u64) {
        match region(self.rules, offset, bytes) {
            Some(clusters) => {
                if let Err(error) = self.counters.add(clusters, 1) {
                    self.overflow = Some(error);
                }
            }
            None => {
                self.is_faulty = true;
                self.has_uncounted = true;
            }
        }
    }

    fn fault(&mut self, fault: Fault) {
        self.is_faulty = true;
        // With reserved bits, or beside a data file, a table is followed all the same.
        self.has_uncounted |= !matches!(fault, Fault::L1Reserved { .. } | Fault::ExternalSnapshots { .. });
    }

    fn unreadable(&mut self, _what: &'static str) {
        self.is_faulty = true;
        self.has_uncounted = true;
    }

    fn table(&mut self, offset: u64, is_active: bool) -> Result<()> {
        self.tables.push(TableUse { offset, references: 1, active: u64::from(is_active) });
        if self.tables.len() >= self.merged * 2 + GATHER {
            self.merge();
        }
        Ok(())
    }
}

/// Leaves out tables that are holes of the file, when there are more tables than the file has bytes for:
/// a crafted L1 table can name terabytes of holes, which say nothing and take long to read.
fn without_holes(subject: &Subject<'_>, tables: Vec<TableUse>) -> Result<Vec<TableUse>> {
    let cluster = subject.geometry.cluster_bytes();
    let bytes = (tables.len() as u64).saturating_mul(cluster);
    if bytes <= subject.storage.allocated_bytes()?.saturating_add(READ_BYTES) {
        return Ok(tables);
    }
    let mut allocated = 0..0;
    let mut is_end = false;
    let mut kept = Vec::new();
    for table in tables {
        while !is_end && allocated.end <= table.offset {
            match subject.storage.next_allocated(table.offset)? {
                // Guard against an answer that does not move on.
                Some(range) if range.end > table.offset => allocated = range,
                _ => is_end = true,
            }
        }
        if !is_end && allocated.start < table.offset.saturating_add(cluster) {
            kept.push(table);
        }
    }
    Ok(kept)
}

/// One thread's share.
struct Worker<'a> {
    rules: Rules,
    singles: Option<&'a Singles>,
    counters: Counters,
    clusters: Clusters,
    faulty: Vec<u64>,
    uncopied: Vec<u64>,
    has_uncounted: bool,
    overflow: Option<TooManyCounts>,
    /// Of the table at hand.
    table: TableUse,
    of_table: Clusters,
    next_offset: u64,
    is_faulty: bool,
    is_uncopied: bool,
}

impl<'a> Worker<'a> {
    fn new(rules: Rules, clusters: u64, singles: Option<&'a Singles>) -> Self {
        Self {
            rules,
            singles,
            counters: Counters::new(clusters),
            clusters: Clusters::default(),
            faulty: Vec::new(),
            uncopied: Vec::new(),
            has_uncounted: false,
            overflow: None,
            table: TableUse { offset: 0, references: 0, active: 0 },
            of_table: Clusters::default(),
            next_offset: 0,
            is_faulty: false,
            is_uncopied: false,
        }
    }

    /// Takes tables until none are left.
    fn run(&mut self, subject: &Subject<'_>, tables: &[TableUse], next: &AtomicUsize) -> Result<()> {
        let cluster = self.rules.geometry.cluster_bytes();
        let mut buffer = Vec::new();
        loop {
            let start = next.fetch_add(TABLES_AT_ONCE, Ordering::Relaxed);
            if start >= tables.len() {
                return Ok(());
            }
            let mut share = &tables[start..tables.len().min(start + TABLES_AT_ONCE)];
            while let Some(first) = share.first() {
                let follows = |(at, table): &(usize, &TableUse)| {
                    let distance = *at as u64 * cluster;
                    table.offset - first.offset == distance && (distance == 0 || distance < READ_BYTES)
                };
                let run = share.iter().enumerate().take_while(follows).count();
                buffer.resize(run * index(cluster), 0);
                subject.read(&mut buffer, first.offset)?;
                for (table, bytes) in share[..run].iter().zip(buffer.chunks_exact(index(cluster))) {
                    self.count_table(*table, bytes);
                    if self.overflow.is_some() {
                        return Err(no_memory(subject));
                    }
                }
                share = &share[run..];
            }
            let done = tables.len().min(start + TABLES_AT_ONCE) as u64;
            (subject.watch)(done * cluster, tables.len() as u64 * cluster)?;
        }
    }

    /// Counts one table.
    fn count_table(&mut self, table: TableUse, bytes: &[u8]) {
        self.table = table;
        self.of_table = Clusters::default();
        self.next_offset = 0;
        self.is_faulty = false;
        self.is_uncopied = false;
        let geometry = self.rules.geometry;
        if geometry.extended_l2 || geometry.external_data {
            for number in 0..index(geometry.l2_entries()) {
                self.entry(number, L2Entry::read(bytes, number, geometry));
            }
        } else {
            self.runs(bytes);
        }
        if self.is_faulty {
            self.faulty.push(table.offset);
        }
        if self.is_uncopied && table.active > 0 {
            self.uncopied.push(table.offset);
        }
        self.clusters.allocated += self.of_table.allocated.saturating_mul(table.active);
        self.clusters.fragmented += self.of_table.fragmented.saturating_mul(table.active);
        self.clusters.compressed += self.of_table.compressed.saturating_mul(table.active);
    }

    /// The quick way through a table of short entries: neighbours in the disk that are neighbours in the
    /// file are counted together.
    fn runs(&mut self, bytes: &[u8]) {
        let geometry = self.rules.geometry;
        let cluster = geometry.cluster_bytes();
        // A run ends before the end of the file, and before an offset needs more than its bits.
        let end_of_runs = self.rules.file_bytes.min(OFFSET_MASK);
        let unusual = COMPRESSED | L2_RESERVED | ZERO;
        let entries = bytes.len() / 8;
        let word_at = |number: usize| {
            u64::from_be_bytes(bytes[number * 8..number * 8 + 8].try_into().expect("eight bytes"))
        };
        let mut number = 0;
        while number < entries {
            let word = word_at(number);
            if word == 0 {
                number += 1;
                continue;
            }
            let offset = word & OFFSET_MASK;
            if word & unusual != 0 || offset == 0 || geometry.in_cluster(offset) != 0 || offset >= end_of_runs
            {
                self.entry(number, L2Entry { word, bitmap: 0 });
                number += 1;
                continue;
            }
            let longest = (end_of_runs - offset).div_ceil(cluster);
            let longest = usize::try_from(longest).unwrap_or(usize::MAX).min(entries - number);
            let mut run = 1;
            let mut expected = word + cluster;
            while run < longest && word_at(number + run) == expected {
                run += 1;
                expected = expected.wrapping_add(cluster);
            }
            let first = offset >> geometry.cluster_bits;
            let clusters = first..first + run as u64;
            if let Some(singles) = self.singles
                && self.table.active > 0
                && !singles.all(clusters.clone(), word & COPIED != 0)
            {
                self.is_uncopied = true;
            }
            self.add(clusters);
            self.placed(offset);
            self.of_table.allocated += run as u64 - 1;
            self.next_offset = offset + run as u64 * cluster;
            number += run;
        }
    }

    /// The full rules for one entry.
    fn entry(&mut self, number: usize, entry: L2Entry) {
        if entry == L2Entry::default() {
            return;
        }
        let geometry = self.rules.geometry;
        if let Some(singles) = self.singles
            && self.table.active > 0
            && matches!(kind(entry.word, geometry), Kind::Normal | Kind::ZeroReserved)
        {
            let cluster = (entry.word & OFFSET_MASK) >> geometry.cluster_bits;
            let is_single = if geometry.external_data { Some(true) } else { singles.get(cluster) };
            // Where it cannot be told here it is looked at again.
            self.is_uncopied |= is_single != Some(entry.is_copied());
        }
        visit_entry(self.rules, number, entry, self);
    }

    fn add(&mut self, clusters: std::ops::Range<u64>) {
        if let Err(error) = self.counters.add(clusters, self.table.references) {
            self.overflow = Some(error);
        }
    }
}

impl Visitor for Worker<'_> {
    fn refer(&mut self, offset: u64, bytes: u64) {
        match region(self.rules, offset, bytes) {
            Some(clusters) => self.add(clusters),
            None => {
                self.is_faulty = true;
                // The end of it is behind the file, the start may well hold data.
                self.has_uncounted |= offset < self.rules.file_bytes;
            }
        }
    }

    fn fault(&mut self, fault: Fault) {
        self.is_faulty = true;
        self.has_uncounted |= matches!(fault, Fault::CompressedSubclusters { .. });
    }

    fn reserved_unaligned(&mut self, _index: usize, _offset: u64) {
        self.is_faulty = true;
    }

    fn compressed(&mut self) {
        // Compressed clusters count as fragmented: reading neighbours still reads sectors twice.
        self.of_table.allocated += 1;
        self.of_table.compressed += 1;
        self.of_table.fragmented += 1;
    }

    fn placed(&mut self, offset: u64) {
        self.of_table.allocated += 1;
        if self.next_offset != 0 && offset != self.next_offset {
            self.of_table.fragmented += 1;
        }
        self.next_offset = offset + self.rules.geometry.cluster_bytes();
    }
}

fn no_memory(subject: &Subject<'_>) -> Error {
    subject.failure(rustix::io::Errno::NOMEM)
}
