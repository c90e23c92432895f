//! Verified runs, and looking at a disk again after a crash.

use std::{
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::rand::{GetRandomFlags, getrandom};

use super::{
    job::Job,
    journal::{Durable, Journal, JournalWriter},
    ledger::read_blocks,
    run::BenchError,
    stamp::{self, Mismatch},
    target::{Facts, Shape, Target},
};

/// The mismatches that are told one by one.
const MOST_TOLD: usize = 16;

/// What makes a run a verified one.
#[derive(Debug)]
pub struct Verify {
    /// In every sector that it writes, so that those of other runs are told apart.
    run_id: u64,
    journal: Option<Mutex<JournalWriter>>,
}

impl Verify {
    /// For one run. When that begins, a journal is made at `journal`, or made anew.
    ///
    /// # Errors
    /// [`BenchError::System`]: the system has no random numbers.
    pub fn new(journal: Option<&Path>) -> Result<Self, BenchError> {
        let mut run_id = [0; 8];
        getrandom(&mut run_id, GetRandomFlags::empty()).map_err(std::io::Error::from)?;
        let journal = journal.map(JournalWriter::new).map(Mutex::new);
        Ok(Self { run_id: u64::from_le_bytes(run_id), journal })
    }

    pub(super) fn run_id(&self) -> u64 {
        self.run_id
    }

    pub(super) fn begin(&self, facts: &Facts, job: &Job) -> Result<(), BenchError> {
        if let Some(mut journal) = self.journal() {
            journal.begin(self.run_id, job.block_bytes, facts.size_bytes)?;
        }
        Ok(())
    }

    /// Returns when it stands in the journal.
    pub(super) fn note_durable(&self, durable: &[Durable]) -> Result<(), BenchError> {
        if let Some(mut journal) = self.journal()
            && !durable.is_empty()
        {
            journal.note(durable)?;
        }
        Ok(())
    }

    /// All that was written is durable.
    pub(super) fn finish(&self) -> Result<(), BenchError> {
        if let Some(mut journal) = self.journal() {
            journal.finish()?;
        }
        Ok(())
    }

    fn journal(&self) -> Option<MutexGuard<'_, JournalWriter>> {
        Some(self.journal.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What came of [`verify`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Blocks that were read.
    pub blocks: u64,
    /// Those of them that have more than was flushed: writes that were under way, or not flushed yet.
    pub newer: u64,
    /// Blocks that are not right.
    pub wrong: u64,
    /// The first of those, one byte of each.
    pub mismatches: Vec<Mismatch>,
}

/// Reads all blocks that stand in the journal of a verified run. Each must be what was flushed last, or what was
/// written after that; after a run that came to its end nothing was. Of
/// `job`, for which `target` was made, the depth counts.
///
/// # Errors
/// [`BenchError`]: the disk is another one, or cannot be read. Blocks that are not right are no error here.
pub fn verify(target: &dyn Target, journal: &Journal, job: &Job) -> Result<Verified, BenchError> {
    let size_bytes = target.facts().size_bytes;
    if size_bytes < journal.size_bytes {
        return Err(BenchError::Job(format!(
            "the disk has {size_bytes} bytes, and had {} when the journal was written",
            journal.size_bytes
        )));
    }
    let block_bytes = usize::try_from(journal.block_bytes)
        .map_err(|_| BenchError::Job("blocks too big for this machine".to_owned()))?;
    let depth = usize::try_from(job.depth).unwrap_or(usize::MAX);
    let mut queue = target.queue(0, &Shape { depth, block_bytes, seed: 0 })?;
    let mut found = Verified { blocks: 0, newer: 0, wrong: 0, mismatches: Vec::new() };
    let blocks = journal.flushed.keys().copied();
    let mut memory = vec![0; block_bytes];
    found.blocks = read_blocks(&mut *queue, depth, &mut memory, blocks, |block, bytes| {
        let flushed = journal.flushed[&block];
        let last = if journal.finished { flushed } else { u64::MAX };
        match stamp::check(bytes, journal.run_id, block * journal.block_bytes, &(flushed..=last)) {
            Ok(newest) => found.newer += u64::from(newest > flushed),
            Err(mismatch) => {
                found.wrong += 1;
                if found.mismatches.len() < MOST_TOLD {
                    found.mismatches.push(mismatch);
                }
            }
        }
        Ok(())
    })?;
    found.mismatches.sort_by_key(|mismatch| mismatch.at);
    Ok(found)
}
