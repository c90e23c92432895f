//! Telling what is wrong in the reference's order, and repairing what is repaired on the way.
//!
//! Runs only when the quiet count found something. Tables without faults are passed over, unless counts
//! overflow: then everything is counted once more, one by one, because the place where a count overflows
//! depends on the order.

use std::collections::{HashMap, HashSet};

use super::{
    super::entry::L2Entry,
    Image, Subject,
    counters::{Counters, index},
    fault::{Fault, Teller},
    guard::Guard,
    table::{Rules, Visitor, region, visit_table, without_place},
    walk::Walker,
};
use crate::{Error, Result};

/// L2 entries that are read again because their table is referenced again. Without a bound a crafted L1
/// table would have one faulty table told four million times.
const REPEATED_ENTRIES_MAX: u64 = 1 << 28;
/// References behind the end of the file that are remembered, to keep repairs from writing there.
const PAST_END_MAX: usize = 1 << 20;

/// Regions as offset and length.
pub(super) type Regions = Vec<(u64, u64)>;

/// The slow walk.
pub(super) struct Narrator<'a, 'b> {
    subject: &'a Subject<'a>,
    rules: Rules,
    teller: &'a mut Teller<'b>,
    faulty: &'a [u64],
    /// Counts up to the largest storable one, when some do not fit.
    saturating: Option<Saturating>,
    /// Where misplaced entries may be rewritten, when they are to be repaired.
    guard: Option<&'a Guard>,
    seen: HashSet<u64>,
    repeated_entries: u64,
    bytes: Vec<u8>,
    /// Faults of tables that are not told again.
    of_table: HashMap<u64, u64>,
    /// Regions behind the end of the file.
    pub(super) past_end: Regions,
    failure: Option<Error>,
}

struct Saturating {
    counters: Counters,
    limit: u64,
}

impl<'a, 'b> Narrator<'a, 'b> {
    /// `faulty` are the tables to tell of, ascending; `limit` is the largest storable count when some
    /// cluster has more references.
    pub(super) fn new(
        image: &'a Image<'_>,
        rules: Rules,
        teller: &'a mut Teller<'b>,
        faulty: &'a [u64],
        limit: Option<u64>,
        guard: Option<&'a Guard>,
    ) -> Self {
        let subject = &image.subject;
        let saturating = limit.map(|limit| Saturating { counters: Counters::new(subject.clusters()), limit });
        Self {
            subject,
            rules,
            teller,
            faulty,
            saturating,
            guard,
            seen: HashSet::new(),
            repeated_entries: 0,
            bytes: vec![0; index(subject.geometry.cluster_bytes())],
            of_table: HashMap::new(),
            past_end: Vec::new(),
            failure: None,
        }
    }

    /// The end of the walk: the counts, where they were counted again.
    pub(super) fn finish(self) -> Result<(Option<Counters>, Regions)> {
        match self.failure {
            Some(error) => Err(error),
            None => Ok((self.saturating.map(|saturating| saturating.counters), self.past_end)),
        }
    }

    fn count(&mut self, offset: u64, bytes: u64) {
        let Some(clusters) = region(self.rules, offset, bytes) else {
            if self.past_end.len() < PAST_END_MAX {
                self.past_end.push((offset, bytes));
            } else if self.guard.is_some() && self.failure.is_none() {
                // Repairs would not know any more where not to write.
                self.failure = Some(self.subject.failure(rustix::io::Errno::FBIG));
            }
            self.teller.corruption(&Fault::PastEnd { offset, bytes });
            return;
        };
        let Some(saturating) = &mut self.saturating else { return };
        for cluster in clusters {
            if saturating.counters.get(cluster) == saturating.limit {
                let offset = cluster << self.rules.geometry.cluster_bits;
                self.teller.corruption(&Fault::Overflow { offset });
            } else if saturating.counters.add(cluster..cluster + 1, 1).is_err() {
                self.failure = Some(self.subject.failure(rustix::io::Errno::NOMEM));
            }
        }
    }

    /// Makes misplaced preallocated clusters of the table at hand plain zeroes.
    fn repair(&mut self, table: u64, misplaced: &[usize]) -> Result<()> {
        let geometry = self.rules.geometry;
        for number in misplaced {
            let entry_bytes = geometry.l2_entry_bytes();
            let at = table + *number as u64 * entry_bytes;
            let entry = L2Entry::read(&self.bytes, *number, geometry);
            without_place(entry, geometry).write(&mut self.bytes, *number, geometry);
            let within = *number * index(entry_bytes);
            self.subject.storage.write_at(&self.bytes[within..within + index(entry_bytes)], at)?;
            self.teller.report.corruptions -= 1;
            self.teller.report.corruptions_fixed += 1;
        }
        Ok(())
    }
}

impl Walker for Narrator<'_, '_> {
    fn region(&mut self, offset: u64, bytes: u64) {
        self.count(offset, bytes);
    }

    fn fault(&mut self, fault: Fault) {
        self.teller.corruption(&fault);
    }

    fn unreadable(&mut self, what: &'static str) {
        self.teller.line(what.to_owned());
        self.teller.report.check_errors += 1;
    }

    fn table(&mut self, offset: u64, _is_active: bool) -> Result<()> {
        if self.saturating.is_none() && self.faulty.binary_search(&offset).is_err() {
            return Ok(());
        }
        let is_first = self.seen.insert(offset);
        if !is_first {
            self.repeated_entries += self.rules.geometry.l2_entries();
            if self.repeated_entries > REPEATED_ENTRIES_MAX && self.saturating.is_none() {
                // Told often enough: counted only.
                self.teller.report.corruptions += self.of_table.get(&offset).copied().unwrap_or(0);
                return Ok(());
            }
            if self.repeated_entries > REPEATED_ENTRIES_MAX {
                self.teller.report.check_errors += 1;
                return Err(self.subject.failure(rustix::io::Errno::FBIG));
            }
        }
        self.subject.read(&mut self.bytes, offset)?;
        let before = self.teller.report.corruptions;
        let bytes = std::mem::take(&mut self.bytes);
        let mut visit = Visit { table: offset, misplaced: Vec::new(), narrator: self };
        visit_table(visit.narrator.rules, &bytes, &mut visit);
        let misplaced = visit.misplaced;
        self.bytes = bytes;
        self.repair(offset, &misplaced)?;
        self.of_table.insert(offset, self.teller.report.corruptions - before);
        match self.failure.take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// One table's visit.
struct Visit<'n, 'a, 'b> {
    narrator: &'n mut Narrator<'a, 'b>,
    table: u64,
    misplaced: Vec<usize>,
}

impl Visitor for Visit<'_, '_, '_> {
    fn refer(&mut self, offset: u64, bytes: u64) {
        if self.narrator.failure.is_none() {
            self.narrator.count(offset, bytes);
        }
    }

    fn fault(&mut self, fault: Fault) {
        if self.narrator.failure.is_none() {
            self.narrator.teller.corruption(&fault);
        }
    }

    fn reserved_unaligned(&mut self, index: usize, offset: u64) {
        if self.narrator.failure.is_some() {
            return;
        }
        let guard = self.narrator.guard;
        let narrator = &mut *self.narrator;
        narrator.teller.report.corruptions += 1;
        narrator.teller.line(Fault::ReservedUnaligned { offset }.text(guard.is_some()));
        let Some(guard) = guard else { return };
        let entry_bytes = narrator.rules.geometry.l2_entry_bytes();
        let at = self.table + index as u64 * entry_bytes;
        match guard.permit(at..at + entry_bytes, narrator.subject, narrator.teller) {
            Ok(()) => self.misplaced.push(index),
            Err(error) => {
                // The table is something else as well: nothing of it is to be believed.
                narrator.teller.line("ERROR: Overlap check failed".to_owned());
                narrator.teller.report.check_errors += 1;
                narrator.failure = Some(error);
            }
        }
    }
}
