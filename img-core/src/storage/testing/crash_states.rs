//! From the log of a [`CrashRecorder`](super::CrashRecorder) to the states that a crash may leave.
//!
//! A crash moment is a place in the log. The changes before it whose file was not flushed since are
//! *pending*. Each has some bits (one a sector, one for a length that grew) and a state is a choice of
//! bits for every pending change. States that differ only in the moment are made once: at a moment
//! behind a change at least one bit of that change is chosen. Behind a mark all are made again.

use std::{ops::Range, sync::Arc};

use super::{
    crash::{Change, Entry, Log},
    random::Random,
};
use crate::storage::{MemoryStorage, Preallocation, Storage};

/// What a disk writes whole or not at all.
const SECTOR_BYTES: u64 = 512;

/// One state after a crash.
#[derive(Debug)]
pub struct CrashState {
    /// The recorded files, in the order in which they were recorded.
    pub files: Vec<MemoryStorage>,
    /// How many changes, flushes and marks were before the crash.
    pub moment: usize,
    /// The last [mark](super::CrashRecorder::mark) before the crash.
    pub mark: Option<u64>,
    /// What became of the pending changes, to reproduce a failure by eye.
    pub description: String,
}

/// An iterator of [`CrashState`]s, in the order of the moments.
#[derive(Debug)]
pub struct CrashStates {
    log: Log,
    /// What is durable at `moment`, file by file.
    durable: Vec<MemoryStorage>,
    /// The entry that the crash follows: 0 is the crash before anything happened.
    moment: usize,
    mark: Option<u64>,
    /// The changes not flushed, oldest first.
    pending: Vec<(usize, Arc<Change>)>,
    /// How the states of this moment are chosen.
    plan: Plan,
    /// How many states remain at this moment.
    left: u64,
    /// How many of this moment were made.
    made: u64,
    random: Random,
}

#[derive(Debug)]
enum Plan {
    /// All choices, counted through.
    Exhaustive,
    /// So many for each of the remaining moments.
    Sampled { quota: Vec<u64> },
}

/// Which sectors of a change happened, and whether its new length did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Nothing,
    All,
    /// Bit by bit: sector 0 is bit 0; the length follows the sectors.
    Bits(u64),
    /// The first so many sectors.
    Front(u64),
    /// Each sector by the throw of a coin.
    Coins(u64),
}

impl CrashStates {
    pub(super) fn new(log: Log, seed: u64, limit: usize) -> Self {
        let mut random = Random::new(seed);
        let limit = (limit as u64).min(1 << 40); // below what the saturating counts end at
        let counts = counts(&log);
        let total = counts.iter().fold(0u64, |sum, &count| sum.saturating_add(count));
        let plan = if total <= limit {
            Plan::Exhaustive
        } else {
            Plan::Sampled { quota: quota(&counts, limit, &mut random) }
        };
        let durable = log.bases.iter().map(|base| base.snapshot()).collect();
        let mut states =
            Self { log, durable, moment: 0, mark: None, pending: Vec::new(), plan, left: 0, made: 0, random };
        states.left = states.states_here(1);
        states
    }

    /// How many states to make at this moment, of which `count` are possible.
    fn states_here(&self, count: u64) -> u64 {
        match &self.plan {
            Plan::Exhaustive => count,
            Plan::Sampled { quota } => quota[self.moment],
        }
    }

    /// Goes on to the next moment; `None` at the end of the log.
    fn step(&mut self) -> Option<()> {
        let entry = self.log.entries.get(self.moment)?.clone();
        self.moment += 1;
        let count = match entry {
            Entry::Change { file, change } => {
                self.pending.push((file, change));
                count(&self.pending, true)
            }
            Entry::Flushed { file } => {
                for (_, change) in self.pending.extract_if(.., |(pending, _)| *pending == file) {
                    apply(&self.durable[file], &change, Part::All);
                }
                1
            }
            Entry::Mark(value) => {
                self.mark = Some(value);
                count(&self.pending, false)
            }
        };
        (self.left, self.made) = (self.states_here(count), 0);
        Some(())
    }

    /// A choice for every pending change.
    fn choose(&mut self) -> Vec<Part> {
        let entry = self.moment.checked_sub(1).map(|at| &self.log.entries[at]);
        let (new, all) = match entry {
            Some(Entry::Change { .. }) => (true, true),
            Some(Entry::Mark(_)) => (false, true),
            // The states with pending changes were made before.
            Some(Entry::Flushed { .. }) | None => (false, false),
        };
        let random = &mut self.random;
        match &self.plan {
            Plan::Exhaustive if all => {
                let mut code = self.made;
                let newest = self.pending.len().checked_sub(1).filter(|_| new);
                // The newest change has the lowest digits, less the choice of nothing.
                let digits = self.pending.iter().enumerate().rev().map(|(place, (_, change))| {
                    let choices = 1u64 << bits(change);
                    let nothing = u64::from(newest == Some(place));
                    let digit = code % (choices - nothing) + nothing;
                    code /= choices - nothing;
                    Part::Bits(digit)
                });
                let mut parts: Vec<Part> = digits.collect();
                parts.reverse();
                parts
            }
            Plan::Exhaustive => vec![Part::All; self.pending.len()],
            Plan::Sampled { .. } => match random.below(8) {
                0 => vec![Part::All; self.pending.len()],
                1 => vec![Part::Nothing; self.pending.len()],
                2 => {
                    // All but one.
                    let mut parts = vec![Part::All; self.pending.len()];
                    if !parts.is_empty() {
                        parts[usize::try_from(random.below(self.pending.len() as u64)).expect("an index")] =
                            Part::Nothing;
                    }
                    parts
                }
                3 => {
                    // Only one: the newest things often arrive first.
                    let mut parts = vec![Part::Nothing; self.pending.len()];
                    if !parts.is_empty() {
                        parts[usize::try_from(random.below(self.pending.len() as u64)).expect("an index")] =
                            Part::All;
                    }
                    parts
                }
                _ => self.pending.iter().map(|(_, change)| any_part(change, random)).collect(),
            },
        }
    }
}

impl Iterator for CrashStates {
    type Item = CrashState;

    fn next(&mut self) -> Option<CrashState> {
        while self.left == 0 {
            self.step()?;
        }
        let parts = self.choose();
        self.left -= 1;
        self.made += 1;
        let files: Vec<MemoryStorage> = self.durable.iter().map(MemoryStorage::snapshot).collect();
        let mut description = Vec::new();
        for ((file, change), part) in self.pending.iter().zip(parts) {
            apply(&files[*file], change, part);
            description.push(format!("file {file}: {} {part:?}", describe(change)));
        }
        let description =
            if description.is_empty() { "all is durable".into() } else { description.join("; ") };
        Some(CrashState { files, moment: self.moment, mark: self.mark, description })
    }
}

fn any_part(change: &Change, random: &mut Random) -> Part {
    match random.below(4) {
        0 => Part::Nothing,
        1 => Part::All,
        2 => Part::Front(random.below(sectors(&reach(change)) + 1)),
        _ => Part::Coins(random.next()),
    }
}

/// How many new states each moment has: saturating, it is only compared.
fn counts(log: &Log) -> Vec<u64> {
    let mut pending: Vec<(usize, Arc<Change>)> = Vec::new();
    let mut counts = vec![1];
    for entry in &log.entries {
        counts.push(match entry {
            Entry::Change { file, change } => {
                pending.push((*file, Arc::clone(change)));
                count(&pending, true)
            }
            Entry::Flushed { file } => {
                pending.retain(|(pending, _)| pending != file);
                1
            }
            Entry::Mark(_) => count(&pending, false),
        });
    }
    counts
}

/// The choices for `pending`, less those in which nothing of the last happened when that is `new`.
fn count(pending: &[(usize, Arc<Change>)], new: bool) -> u64 {
    let Some(((_, last), before)) = pending.split_last() else { return 1 };
    let power =
        |bits: u64| u32::try_from(bits).ok().and_then(|bits| 1u64.checked_shl(bits)).unwrap_or(u64::MAX);
    let before = before.iter().fold(0u64, |sum, (_, change)| sum.saturating_add(bits(change)));
    (power(bits(last)) - u64::from(new)).saturating_mul(power(before))
}

/// Spreads `limit` states over the moments: evenly, and no more to any than it has. What remains, or is
/// too little for all, goes where the seed says.
fn quota(counts: &[u64], limit: u64, random: &mut Random) -> Vec<u64> {
    let even = limit / counts.len() as u64;
    let mut quota: Vec<u64> = counts.iter().map(|&count| count.min(even)).collect();
    let mut left = limit - quota.iter().sum::<u64>();
    // The total of the counts is above the limit, so room for all that is left exists.
    while left > 0 {
        let place = usize::try_from(random.below(counts.len() as u64)).expect("an index");
        // The next moment from there on with room.
        let with_room = (place..counts.len()).chain(0..place).find(|&at| quota[at] < counts[at]);
        let Some(at) = with_room else { break };
        let more = (counts[at] - quota[at]).min(left).min(even.max(1));
        quota[at] += more;
        left -= more;
    }
    quota
}

/// The bytes that a change touches; a resize has none.
fn reach(change: &Change) -> Range<u64> {
    match change {
        Change::Write { at, bytes, .. } => *at..*at + bytes.len() as u64,
        Change::Zero { range, .. } => range.clone(),
        Change::Resize { .. } => 0..0,
    }
}

/// How many sectors a range touches.
fn sectors(range: &Range<u64>) -> u64 {
    if range.is_empty() { 0 } else { range.end.div_ceil(SECTOR_BYTES) - range.start / SECTOR_BYTES }
}

/// The bits of a change; at least one, so that "it happened" and "it did not" are two states.
fn bits(change: &Change) -> u64 {
    match change {
        Change::Write { grows, .. } | Change::Zero { grows, .. } => {
            (sectors(&reach(change)) + u64::from(*grows)).max(1)
        }
        Change::Resize { .. } => 1,
    }
}

fn describe(change: &Change) -> String {
    let range = reach(change);
    match change {
        Change::Write { .. } => format!("write {:#x}..{:#x}", range.start, range.end),
        Change::Zero { .. } => format!("zero {:#x}..{:#x}", range.start, range.end),
        Change::Resize { len } => format!("resize to {len:#x}"),
    }
}

/// Does `part` of a change to a file in memory.
fn apply(file: &MemoryStorage, change: &Change, part: Part) {
    let done = match change {
        Change::Resize { len } => match part {
            Part::Nothing | Part::Bits(0) | Part::Front(0) => Ok(()),
            Part::Coins(coins) if coins % 2 == 0 => Ok(()),
            _ => file.resize(*len, Preallocation::Off),
        },
        Change::Write { at, bytes, grows } => {
            let range = reach(change);
            for_each_run(&range, part, |run| {
                let place = |offset: u64| usize::try_from(offset - at).expect("inside the bytes");
                file.write_at(&bytes[place(run.start)..place(run.end)], run.start)
            })
            .and_then(|()| grow(file, &range, *grows, part))
        }
        Change::Zero { range, grows } => for_each_run(range, part, |run| {
            // A hole cannot be longer than what a lost growth has left of the file.
            if *grows { file.write_zeroes(run, true) } else { file.punch_hole(run) }
        })
        .and_then(|()| grow(file, range, *grows, part)),
    };
    // The recorded storage took the change, so memory does.
    done.expect("memory takes any change that a recorded storage was given");
}

/// The new length, when it was chosen apart from the bytes.
fn grow(file: &MemoryStorage, range: &Range<u64>, grows: bool, part: Part) -> crate::Result<()> {
    if grows && has(part, sectors(range)) && file.len_bytes()? < range.end {
        file.resize(range.end, Preallocation::Off)?;
    }
    Ok(())
}

/// Whether sector number `sector` of a change happened.
fn has(part: Part, sector: u64) -> bool {
    match part {
        Part::Nothing => false,
        Part::All => true,
        Part::Bits(bits) => {
            u32::try_from(sector).ok().and_then(|sector| bits.checked_shr(sector)).unwrap_or(0) & 1 != 0
        }
        Part::Front(count) => sector < count,
        Part::Coins(seed) => Random::new(seed ^ sector.wrapping_mul(0x2545_f491_4f6c_dd1d)).next() & 1 != 0,
    }
}

/// Calls `act` with every run of bytes of `range` whose sectors happened.
fn for_each_run(
    range: &Range<u64>,
    part: Part,
    mut act: impl FnMut(Range<u64>) -> crate::Result<()>,
) -> crate::Result<()> {
    if part == Part::All {
        return if range.is_empty() { Ok(()) } else { act(range.clone()) };
    }
    let first = range.start / SECTOR_BYTES;
    let count = sectors(range);
    let mut at = 0;
    while at < count {
        let end = (at..count).find(|&sector| !has(part, sector)).unwrap_or(count);
        if end > at {
            act(
                ((first + at) * SECTOR_BYTES).max(range.start)..((first + end) * SECTOR_BYTES).min(range.end)
            )?;
        }
        at = end + 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{Result, storage::Flush, storage::testing::CrashRecorder};

    fn recorded() -> Result<(CrashRecorder, Arc<dyn Storage>)> {
        let recorder = CrashRecorder::new();
        let disk = recorder.record(Arc::new(MemoryStorage::from_bytes("disk", &[b'.'; 1024])))?;
        Ok((recorder, disk))
    }

    /// The first byte of every sector, state by state.
    fn pictures(recorder: &CrashRecorder, seed: u64, limit: usize) -> Vec<String> {
        let picture = |state: CrashState| -> String {
            let bytes = state.files[0].to_vec();
            bytes.chunks(512).map(|sector| if sector[0] == 0 { '0' } else { char::from(sector[0]) }).collect()
        };
        recorder.states(seed, limit).map(picture).collect()
    }

    #[test]
    fn every_subset_of_sectors_is_made_once() -> Result<()> {
        let (recorder, disk) = recorded()?;
        disk.write_at(&[b'a'; 1024], 0)?;
        disk.write_at(&[b'b'; 512], 0)?;
        let pictures = pictures(&recorder, 0, 100);
        assert_eq!(pictures, ["..", "a.", ".a", "aa", "b.", "b.", "ba", "ba"]);
        Ok(())
    }

    #[test]
    fn what_was_flushed_is_there() -> Result<()> {
        let (recorder, disk) = recorded()?;
        disk.write_at(&[b'a'; 512], 0)?;
        disk.flush(Flush::Data)?;
        recorder.mark(7);
        disk.write_at(&[b'b'; 512], 512)?;
        let states: Vec<_> = recorder.states(0, 100).collect();
        let marked: Vec<_> = states.iter().filter(|state| state.mark == Some(7)).collect();
        assert_eq!((states.len(), marked.len()), (5, 2));
        assert!(marked.iter().all(|state| state.files[0].to_vec()[..512] == [b'a'; 512]));
        Ok(())
    }

    #[test]
    fn a_length_arrives_with_or_without_its_bytes() -> Result<()> {
        let (recorder, disk) = recorded()?;
        disk.write_at(&[b'a'; 10], 1024)?;
        disk.resize(512, Preallocation::Off)?;
        let found: BTreeSet<_> = pictures(&recorder, 0, 100).into_iter().collect();
        let expected: BTreeSet<_> = ["..", "..a", "..0", "."].map(String::from).into();
        assert_eq!(found, expected);
        Ok(())
    }

    #[test]
    fn files_are_flushed_one_by_one() -> Result<()> {
        let recorder = CrashRecorder::new();
        let first = recorder.record(Arc::new(MemoryStorage::new("first")))?;
        let second = recorder.record(Arc::new(MemoryStorage::new("second")))?;
        first.write_at(b"1", 0)?;
        second.write_at(b"2", 0)?;
        second.flush(Flush::Data)?;
        recorder.mark(1);
        second.write_at(b"3", 0)?;
        let after: Vec<_> = recorder.states(0, 1000).filter(|state| state.mark == Some(1)).collect();
        assert!(after.iter().all(|state| state.files[1].to_vec() != b""));
        assert!(after.iter().any(|state| state.files[0].to_vec() == b""));
        assert!(after.iter().any(|state| state.files[0].to_vec() == b"1"));
        Ok(())
    }

    #[test]
    fn samples_are_as_many_as_asked_and_the_same_for_a_seed() -> Result<()> {
        let (recorder, disk) = recorded()?;
        for step in 0..50u64 {
            disk.write_at(&[b'a'; 4096], step * 1000)?;
            disk.write_zeroes(step * 700..step * 700 + 5000, true)?;
            if step % 10 == 9 {
                disk.flush(Flush::Data)?;
            }
        }
        let first = pictures(&recorder, 3, 500);
        assert_eq!(first.len(), 500);
        assert_eq!(first, pictures(&recorder, 3, 500));
        assert_ne!(first, pictures(&recorder, 4, 500));
        let moments: BTreeSet<_> = recorder.states(3, 500).map(|state| state.moment).collect();
        assert_eq!(moments.len(), recorder.operations() + 1, "every moment is tried");
        Ok(())
    }
}
