//! The copied flags: set exactly where the count in the file is one.
//!
//! Repairs run after the counts are durable: a flag that promises "yours alone" must not be there before
//! the count says so. Each entry is rewritten by itself, in place.

use std::collections::HashMap;

use super::{
    super::entry::{COPIED, L1Entry, L2Entry, OFFSET_MASK},
    Image,
    blocks::Lookup,
    counters::index,
    fault::{Fault, Teller},
    guard::Guard,
    table::{Kind, kind},
    walk::for_each_word,
};
use crate::{Error, Result, storage::Flush};

/// L2 entries that are read again because their table is referenced again; see [`super::narrate`].
const REPEATED_ENTRIES_MAX: u64 = 1 << 28;

/// Which L2 tables to look into, ascending: the others are known to be right.
#[derive(Clone, Copy)]
pub(super) struct Tables<'a>(pub(super) &'a [u64]);

/// Compares all flags of the active L1 table and of its L2 tables; with `guard` it repairs them.
pub(super) fn check(
    image: &Image<'_>,
    tables: Tables<'_>,
    guard: Option<&Guard>,
    teller: &mut Teller<'_>,
) -> Result<()> {
    let subject = &image.subject;
    let mut flags = Flags {
        image,
        guard,
        teller,
        lookup: Lookup::new(subject, &image.blocks),
        bytes: vec![0; index(subject.geometry.cluster_bytes())],
        faults: HashMap::new(),
        repeated_entries: 0,
    };
    for_each_word(image, image.header.l1_offset, u64::from(image.header.l1_entries), |number, word| {
        let Some(table) = L1Entry(word).table() else { return Ok(()) };
        let Some(count) = flags.lookup.get(table >> subject.geometry.cluster_bits)? else { return Ok(()) };
        if (count == 1) != L1Entry(word).is_copied() {
            let fault = Fault::TableCopied { index: index(number), word, count };
            flags.teller.line(fault.text(guard.is_some()));
            if guard.is_some() {
                let at = image.header.l1_offset + number * 8;
                subject.storage.write_at(&flag(word, count == 1).to_be_bytes(), at)?;
            }
            flags.tell(1);
        }
        if tables.0.binary_search(&table).is_err() {
            return Ok(());
        }
        flags.table(table)
    })?;
    if guard.is_some() { subject.storage.flush(Flush::Data) } else { Ok(()) }
}

/// A word with or without the flag.
fn flag(word: u64, is_copied: bool) -> u64 {
    if is_copied { word | COPIED } else { word & !COPIED }
}

struct Flags<'a, 'b, 't> {
    image: &'a Image<'a>,
    guard: Option<&'a Guard>,
    teller: &'t mut Teller<'b>,
    lookup: Lookup<'a>,
    bytes: Vec<u8>,
    /// Faults of the tables seen.
    faults: HashMap<u64, u64>,
    repeated_entries: u64,
}

impl Flags<'_, '_, '_> {
    fn tell(&mut self, faults: u64) {
        if self.guard.is_some() {
            self.teller.report.corruptions_fixed += faults;
        } else {
            self.teller.report.corruptions += faults;
        }
    }

    fn table(&mut self, table: u64) -> Result<()> {
        let geometry = self.image.subject.geometry;
        if let Some(faults) = self.faults.get(&table).copied() {
            self.repeated_entries += geometry.l2_entries();
            if faults == 0 || self.guard.is_some() {
                return Ok(());
            }
            if self.repeated_entries > REPEATED_ENTRIES_MAX {
                self.tell(faults);
                return Ok(());
            }
        }
        self.image.subject.read(&mut self.bytes, table)?;
        let mut changed = Vec::new();
        let mut faults = 0;
        for number in 0..index(geometry.l2_entries()) {
            let mut entry = L2Entry::read(&self.bytes, number, geometry);
            if !matches!(kind(entry.word, geometry), Kind::Normal | Kind::ZeroReserved) {
                continue;
            }
            let cluster = (entry.word & OFFSET_MASK) >> geometry.cluster_bits;
            let count = if geometry.external_data { Some(1) } else { self.lookup.get(cluster)? };
            let Some(count) = count else { continue };
            if (count == 1) != entry.is_copied() {
                let fault = Fault::DataCopied { word: entry.word, count };
                self.teller.line(fault.text(self.guard.is_some()));
                faults += 1;
                if self.guard.is_some() {
                    entry.word = flag(entry.word, count == 1);
                    entry.write(&mut self.bytes, number, geometry);
                    changed.push(number);
                }
            }
        }
        self.write(table, &changed)?;
        self.faults.insert(table, faults);
        self.tell(faults);
        Ok(())
    }

    /// Writes the descriptor words that changed.
    fn write(&mut self, table: u64, changed: &[usize]) -> Result<()> {
        let (Some(guard), false) = (self.guard, changed.is_empty()) else { return Ok(()) };
        let subject = &self.image.subject;
        let range = table..table + subject.geometry.cluster_bytes();
        guard.permit(range, subject, self.teller).inspect_err(|_| {
            let text = "ERROR: Could not write L2 table; metadata overlap check failed: Input/output error";
            self.teller.line(text.to_owned());
            self.teller.report.check_errors += 1;
        })?;
        for number in changed {
            let within = number * index(subject.geometry.l2_entry_bytes());
            let result = subject.storage.write_at(&self.bytes[within..within + 8], table + within as u64);
            result.inspect_err(|error: &Error| {
                self.teller.line(format!("ERROR: Could not write L2 table: {error}"));
            })?;
        }
        Ok(())
    }
}
