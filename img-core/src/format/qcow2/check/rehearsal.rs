//! A repair is played through in memory before anything of it is written.
//!
//! In an image whose structures overlap, mending one of them damages another: how much, nobody knows before
//! it is done. So changes are held back here, with their order, while the repair reads what it would have
//! written; then they are either carried out, flush by flush as they came, or forgotten. Where the structures
//! are known to be apart nothing is held back, and a repair may be of any size.

use std::{
    collections::BTreeMap,
    io::{IoSlice, IoSliceMut},
    ops::Range,
    path::Path,
    sync::{PoisonError, RwLock},
};

use crate::{
    Error, Result,
    storage::{Flush, Identity, Limits, Preallocation, Storage},
};

/// The unit in which changed bytes are kept.
const PAGE_BYTES: u64 = 4096;
const PAGE_LEN: usize = 4096;
/// Memory for changes held back. The refcount blocks of a terabyte of small clusters fit.
const MAX_HELD_BYTES: u64 = 512 << 20;
/// What a change costs beside its bytes, roughly.
const CHANGE_BYTES: u64 = 64;

/// A change, in the order in which it was asked for.
#[derive(Debug)]
enum Change {
    Write { at: u64, bytes: Vec<u8> },
    Resize(u64),
    Punch(Range<u64>),
    Flush(Flush),
}

/// A storage that holds changes back.
#[derive(Debug)]
pub(super) struct Rehearsal<'a> {
    base: &'a dyn Storage,
    /// `None`: changes are carried out at once.
    held: RwLock<Option<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    len_bytes: u64,
    changes: Vec<Change>,
    pages: BTreeMap<u64, Box<[u8; PAGE_LEN]>>,
    /// Start and end of ranges that read as zeroes where there is no page; apart from each other.
    punched: BTreeMap<u64, u64>,
    held_bytes: u64,
}

impl<'a> Rehearsal<'a> {
    /// Over `base`, holding back.
    pub(super) fn new(base: &'a dyn Storage) -> Result<Self> {
        let held = Held { len_bytes: base.len_bytes()?, ..Held::default() };
        Ok(Self { base, held: RwLock::new(Some(held)) })
    }

    /// Whether changes are still held back.
    pub(super) fn is_held(&self) -> bool {
        self.held.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Whether there is anything to carry out.
    pub(super) fn has_changes(&self) -> bool {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.as_ref()
            .is_some_and(|held| held.changes.iter().any(|change| !matches!(change, Change::Flush(_))))
    }

    /// Carries out what was held back, in its order, and holds nothing back from now on.
    pub(super) fn perform(&self) -> Result<()> {
        let held = self.held.write().unwrap_or_else(PoisonError::into_inner).take();
        for change in held.into_iter().flat_map(|held| held.changes) {
            match change {
                Change::Write { at, bytes } => self.base.write_at(&bytes, at)?,
                Change::Resize(len_bytes) => self.base.resize(len_bytes, Preallocation::Off)?,
                Change::Punch(range) => self.base.punch_hole(range)?,
                Change::Flush(what) => self.base.flush(what)?,
            }
        }
        Ok(())
    }

    /// Ranges whose bytes would no longer be what they are, ascending and apart.
    pub(super) fn changed(&self) -> Result<Vec<Range<u64>>> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let Some(held) = held.as_ref() else { return Ok(Vec::new()) };
        let mut changed: Vec<Range<u64>> = held.punched.iter().map(|(start, end)| *start..*end).collect();
        let mut before = [0; PAGE_LEN];
        for (number, page) in &held.pages {
            self.base.read_at(&mut before, number * PAGE_BYTES)?;
            let mut at = 0;
            while let Some(first) = (at..PAGE_LEN).find(|at| before[*at] != page[*at]) {
                let end = (first..PAGE_LEN).find(|at| before[*at] == page[*at]).unwrap_or(PAGE_LEN);
                changed.push(number * PAGE_BYTES + first as u64..number * PAGE_BYTES + end as u64);
                at = end;
            }
        }
        changed.sort_unstable_by_key(|range| range.start);
        Ok(changed)
    }

    /// Does it now, or notes it down.
    fn change(
        &self,
        change: Change,
        now: impl FnOnce(&dyn Storage) -> Result<()>,
        note: impl FnOnce(&mut Held, &dyn Storage) -> Result<()>,
    ) -> Result<()> {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        let Some(held) = held.as_mut() else { return now(self.base) };
        if !self.base.is_writable() {
            return Err(Error::ReadOnly { file: self.base.path().to_owned() });
        }
        note(held, self.base)?;
        held.held_bytes += CHANGE_BYTES;
        held.changes.push(change);
        if held.held_bytes > MAX_HELD_BYTES {
            return Err(Error::io(self.base.path(), "check", rustix::io::Errno::NOMEM));
        }
        Ok(())
    }
}

impl Held {
    /// Fills `buf` with what would be there.
    fn read(&self, base: &dyn Storage, buf: &mut [u8], at: u64) -> Result<()> {
        base.read_at(buf, at)?;
        let end = at.saturating_add(buf.len() as u64);
        let within = |position: u64| usize::try_from(position - at).expect("inside the buffer");
        // Past the end there are zeroes, also where the file was longer once.
        if self.len_bytes < end {
            buf[within(self.len_bytes.max(at))..].fill(0);
        }
        let first = self.punched.range(..=at).next_back().map_or(at, |(start, _)| *start);
        for (start, stop) in self.punched.range(first..end) {
            if *stop > at {
                buf[within((*start).max(at))..within((*stop).min(end))].fill(0);
            }
        }
        for (number, page) in self.pages.range(at / PAGE_BYTES..end.div_ceil(PAGE_BYTES)) {
            let start = number * PAGE_BYTES;
            let (from, to) = (start.max(at), (start + PAGE_BYTES).min(end));
            let of_page = |position: u64| usize::try_from(position - start).expect("inside the page");
            buf[within(from)..within(to)].copy_from_slice(&page[of_page(from)..of_page(to)]);
        }
        Ok(())
    }

    /// Puts bytes over what is there.
    fn write(&mut self, base: &dyn Storage, bytes: &[u8], at: u64) -> Result<()> {
        let end = at
            .checked_add(bytes.len() as u64)
            .filter(|end| *end <= i64::MAX.unsigned_abs())
            .ok_or_else(|| Error::io_at(base.path(), "write", at, rustix::io::Errno::FBIG))?;
        let mut done = 0;
        while done < bytes.len() {
            let position = at + done as u64;
            let number = position / PAGE_BYTES;
            let from = usize::try_from(position % PAGE_BYTES).expect("inside a page");
            let count = (PAGE_LEN - from).min(bytes.len() - done);
            if !self.pages.contains_key(&number) {
                let mut page = Box::new([0; PAGE_LEN]);
                self.read(base, &mut page[..], number * PAGE_BYTES)?;
                self.pages.insert(number, page);
                self.held_bytes += PAGE_BYTES + CHANGE_BYTES;
            }
            let page = self.pages.get_mut(&number).expect("just made");
            page[from..from + count].copy_from_slice(&bytes[done..done + count]);
            done += count;
        }
        self.len_bytes = self.len_bytes.max(end);
        Ok(())
    }

    /// Makes a range read as zeroes.
    fn punch(&mut self, mut range: Range<u64>) {
        for (number, page) in self.pages.range_mut(range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)) {
            let start = number * PAGE_BYTES;
            let of_page = |position: u64| usize::try_from(position - start).expect("inside the page");
            let (from, to) = (range.start.max(start), range.end.min(start + PAGE_BYTES));
            page[of_page(from)..of_page(to)].fill(0);
        }
        // Merged with what it touches.
        while let Some((start, end)) = self.punched.range(..=range.end).next_back().map(|(s, e)| (*s, *e)) {
            if end < range.start {
                break;
            }
            self.punched.remove(&start);
            range = range.start.min(start)..range.end.max(end);
        }
        self.punched.insert(range.start, range.end);
    }
}

impl Storage for Rehearsal<'_> {
    fn path(&self) -> &Path {
        self.base.path()
    }

    fn len_bytes(&self) -> Result<u64> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.as_ref().map_or_else(|| self.base.len_bytes(), |held| Ok(held.len_bytes))
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], at_bytes: u64) -> Result<()> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let Some(held) = held.as_ref() else { return self.base.read_vectored_at(bufs, at_bytes) };
        let mut at = at_bytes;
        for buf in bufs {
            held.read(self.base, buf, at)?;
            at = at.saturating_add(buf.len() as u64);
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<()> {
        let bytes: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        let copy = bytes.clone();
        self.change(
            Change::Write { at: at_bytes, bytes },
            |base| base.write_vectored_at(bufs, at_bytes),
            |held, base| {
                held.held_bytes += copy.len() as u64;
                held.write(base, &copy, at_bytes)
            },
        )
    }

    fn flush(&self, what: Flush) -> Result<()> {
        self.change(Change::Flush(what), |base| base.flush(what), |_, _| Ok(()))
    }

    fn resize(&self, len_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.change(
            Change::Resize(len_bytes),
            |base| base.resize(len_bytes, preallocation),
            |held, base| {
                // A repair only grows the file.
                if len_bytes < held.len_bytes || preallocation != Preallocation::Off {
                    return Err(Error::io(base.path(), "resize", rustix::io::Errno::OPNOTSUPP));
                }
                held.len_bytes = len_bytes;
                Ok(())
            },
        )
    }

    fn preallocate(&self, _range_bytes: Range<u64>, _preallocation: Preallocation) -> Result<()> {
        Err(Error::io(self.base.path(), "preallocate", rustix::io::Errno::OPNOTSUPP))
    }

    fn punch_hole(&self, range_bytes: Range<u64>) -> Result<()> {
        let range = range_bytes.clone();
        self.change(
            Change::Punch(range_bytes.clone()),
            |base| base.punch_hole(range_bytes),
            |held, _| {
                held.punch(range);
                Ok(())
            },
        )
    }

    fn write_zeroes(&self, _range_bytes: Range<u64>, _may_unmap: bool) -> Result<()> {
        Err(Error::io(self.base.path(), "write zeroes", rustix::io::Errno::OPNOTSUPP))
    }

    fn next_allocated(&self, from_bytes: u64) -> Result<Option<Range<u64>>> {
        let below = self.base.next_allocated(from_bytes)?;
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let page = held.as_ref().and_then(|held| {
            let (number, _) = held.pages.range(from_bytes / PAGE_BYTES..).next()?;
            Some((number * PAGE_BYTES).max(from_bytes)..(number + 1) * PAGE_BYTES)
        });
        Ok(match (below, page) {
            (Some(below), Some(page)) if page.start < below.start => Some(page),
            (None, page) => page,
            (below, _) => below,
        })
    }

    fn allocated_bytes(&self) -> Result<u64> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let pages = held.as_ref().map_or(0, |held| held.pages.len() as u64 * PAGE_BYTES);
        Ok(self.base.allocated_bytes()?.saturating_add(pages))
    }

    fn identity(&self) -> Option<Identity> {
        self.base.identity()
    }

    fn limits(&self) -> Limits {
        self.base.limits()
    }

    fn is_writable(&self) -> bool {
        self.base.is_writable()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::storage::MemoryStorage;

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, Vec<u8>),
        Punch(u64, u64),
        Grow(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0_u64..40_000, proptest::collection::vec(1_u8.., 1..6000))
                .prop_map(|(at, bytes)| Step::Write(at, bytes)),
            (0_u64..40_000, 1_u64..9000).prop_map(|(at, len)| Step::Punch(at, len)),
            (0_u64..9000).prop_map(Step::Grow),
        ]
    }

    proptest! {
        /// What is held back reads as what is carried out, and until then nothing is changed.
        #[test]
        fn a_rehearsal_reads_as_the_performance(steps in proptest::collection::vec(step(), 0..16)) {
            let old: Vec<u8> = (0..30_000_u32).map(|at| at.to_le_bytes()[0] | 1).collect();
            let base = MemoryStorage::from_bytes("image", &old);
            let model = base.snapshot();
            let rehearsal = Rehearsal::new(&base).unwrap();
            for step in steps {
                for storage in [&rehearsal as &dyn Storage, &model] {
                    let len = storage.len_bytes().unwrap();
                    match &step {
                        Step::Write(at, bytes) => storage.write_at(bytes, *at).unwrap(),
                        Step::Punch(at, bytes) if *at < len => {
                            storage.punch_hole(*at..len.min(at + bytes)).unwrap();
                        }
                        Step::Punch(..) => {}
                        Step::Grow(by) => storage.resize(len + by, Preallocation::Off).unwrap(),
                    }
                }
                prop_assert_eq!(rehearsal.len_bytes().unwrap(), model.len_bytes().unwrap());
            }
            let expected = model.to_vec();
            let mut read = vec![0xee; expected.len() + 5000];
            rehearsal.read_at(&mut read, 0).unwrap();
            prop_assert!(read[..expected.len()] == expected && read[expected.len()..].iter().all(|byte| *byte == 0));
            prop_assert!(base.to_vec() == old);
            let changed = rehearsal.changed().unwrap();
            for (at, byte) in expected.iter().enumerate() {
                let before = old.get(at).copied().unwrap_or(0);
                let is_named = changed.iter().any(|range| range.contains(&(at as u64)));
                prop_assert!(is_named || before == *byte, "{at} is not among {changed:?}");
            }
            rehearsal.perform().unwrap();
            prop_assert!(base.to_vec() == expected);
        }
    }
}
