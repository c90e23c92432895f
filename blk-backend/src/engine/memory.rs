//! The bytes of somebody else: copied by address, never behind a reference.
//!
//! A guest writes its memory whenever it likes, also while a request on it is under way. What is read here may
//! therefore be torn between two of its writes; that is the guest's affair, and nothing is decided by these bytes.
#![allow(unsafe_code)]

use std::ops::Range;

use crate::request::{Segments, iovec};

/// The runs of memory of one request, kept by the engine from submission to answer.
///
/// The promise of [`Segments::new`] covers them; whoever holds a `Runs` answers the request only afterwards.
#[derive(Debug, Default)]
pub(super) struct Runs(Vec<iovec>);

// SAFETY: the addresses are not used to make references, and the promise of `Segments::new` holds on any thread.
unsafe impl Send for Runs {}

impl Runs {
    /// Takes the runs of a request over, in the memory that is here already.
    pub(super) fn set(&mut self, segments: Segments<'_>) {
        self.0.clear();
        self.0.extend_from_slice(segments.vectors());
    }

    /// Forgets them, keeping the memory of the list.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Copies `bytes` to `at_bytes` of the request's memory. What does not fit is left out.
    pub(super) fn put(&self, at_bytes: u64, bytes: &[u8]) {
        let mut rest = bytes;
        self.each(at_bytes, bytes.len() as u64, |address, length| {
            let (now, later) = rest.split_at(length);
            // SAFETY: `each` gives runs inside the segments, which are writable until the request is answered;
            // `now` is ours and does not lie in a guest's memory.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), address, length) };
            rest = later;
        });
    }

    /// Fills `bytes` from `at_bytes` of the request's memory.
    pub(super) fn get(&self, at_bytes: u64, bytes: &mut [u8]) {
        let mut done = 0;
        self.each(at_bytes, bytes.len() as u64, |address, length| {
            let to = &mut bytes[done..done + length];
            // SAFETY: as in `put`; the segments are readable.
            unsafe { std::ptr::copy_nonoverlapping(address, to.as_mut_ptr(), length) };
            done += length;
        });
    }

    /// The parts of memory that hold the bytes `at_bytes..at_bytes + length_bytes` of the request.
    fn each(&self, at_bytes: u64, length_bytes: u64, mut part: impl FnMut(*mut u8, usize)) {
        let (mut skip, mut left) = (at_bytes, length_bytes);
        for run in &self.0 {
            if left == 0 {
                return;
            }
            let run_bytes = run.iov_len as u64;
            if skip >= run_bytes {
                skip -= run_bytes;
                continue;
            }
            let length = (run_bytes - skip).min(left);
            let (from, count) = (usize_of(skip), usize_of(length));
            // SAFETY: `skip` < the length of the run, which is one mapped object.
            let address = unsafe { run.iov_base.cast::<u8>().add(from) };
            part(address, count);
            skip = 0;
            left -= length;
        }
    }
}

/// Memory that the kernel moves bytes to or from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Memory<'a> {
    /// That of a request.
    Request(&'a Runs),
    /// The engine's own.
    Own(&'a OwnMemory),
}

impl Memory<'_> {
    /// Fills `length_bytes` from `at_bytes` on with zeroes.
    pub(super) fn zero(self, at_bytes: u64, length_bytes: u64) {
        self.each(at_bytes, length_bytes, |address, length| {
            // SAFETY: as in `Runs::put`; or a part of an `OwnMemory`, to which nobody has a reference.
            unsafe { std::ptr::write_bytes(address, 0, length) };
        });
    }

    /// Whether the addresses and lengths of a part are multiples of `unit_bytes`.
    pub(super) fn is_aligned(self, at_bytes: u64, length_bytes: u64, unit_bytes: u64) -> bool {
        let mut is = true;
        self.each(at_bytes, length_bytes, |address, length| {
            is &= (address.addr() as u64).is_multiple_of(unit_bytes);
            is &= (length as u64).is_multiple_of(unit_bytes);
        });
        is
    }

    /// The runs of a part, none of them empty.
    fn each(self, at_bytes: u64, length_bytes: u64, mut part: impl FnMut(*mut u8, usize)) {
        match self {
            Self::Request(runs) => runs.each(at_bytes, length_bytes, part),
            Self::Own(_) if length_bytes == 0 => {}
            Self::Own(memory) => {
                let length = usize_of(length_bytes);
                part(memory.address(usize_of(at_bytes), length), length);
            }
        }
    }
}

/// The memory of a request in lists, one for each part that the kernel moves by itself. They stay where they are
/// until [`Self::clear`] or [`Self::add`].
#[derive(Debug, Default)]
pub(super) struct RunLists {
    runs: Vec<iovec>,
    /// Where each list ends in `runs`.
    ends: Vec<usize>,
}

impl RunLists {
    /// No lists, in the memory that is here already.
    pub(super) fn clear(&mut self) {
        self.runs.clear();
        self.ends.clear();
    }

    /// Appends a list of `length_bytes` of the memory from `at_bytes` on.
    pub(super) fn add(&mut self, memory: Memory<'_>, at_bytes: u64, length_bytes: u64) {
        self.push(memory, at_bytes, length_bytes);
        self.end();
    }

    /// Adds that memory to the list that is being made, which [`Self::end`] ends.
    pub(super) fn push(&mut self, memory: Memory<'_>, at_bytes: u64, length_bytes: u64) {
        memory.each(at_bytes, length_bytes, |address, length| {
            self.runs.push(iovec { iov_base: address.cast(), iov_len: length });
        });
    }

    /// Ends the list that is being made.
    pub(super) fn end(&mut self) {
        self.ends.push(self.runs.len());
    }

    /// Where list `index` stands.
    pub(super) fn range(&self, index: usize) -> Range<usize> {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        start..self.ends[index]
    }

    /// A list, without the runs at its start that are used up.
    pub(super) fn get(&self, list: Range<usize>) -> &[iovec] {
        let runs = &self.runs[list];
        let used = runs.iter().take_while(|run| run.iov_len == 0).count();
        &runs[used..]
    }

    /// Uses up the first bytes of a list.
    pub(super) fn advance(&mut self, list: Range<usize>, bytes: u64) {
        let mut left = bytes;
        for run in &mut self.runs[list] {
            let now = left.min(run.iov_len as u64);
            // SAFETY: at most the length of the run, which is one mapped object.
            run.iov_base = unsafe { run.iov_base.cast::<u8>().add(usize_of(now)) }.cast();
            run.iov_len -= usize_of(now);
            left -= now;
        }
    }

    /// Fills what is left of a list with zeroes.
    pub(super) fn zero(&self, list: Range<usize>) {
        for run in &self.runs[list] {
            // SAFETY: the lists of a request name its own memory, which is writable for a read, or parts of an
            // `OwnMemory` that the request holds.
            unsafe { std::ptr::write_bytes(run.iov_base.cast::<u8>(), 0, run.iov_len) };
        }
    }
}

/// Memory of the engine's own, for bytes on their way from file to file. It is reached by address alone: the kernel
/// writes it, too.
#[derive(Debug)]
pub(super) struct OwnMemory {
    bytes: Vec<u8>,
    /// The first aligned one.
    start: *mut u8,
    /// Bytes from there on.
    length: usize,
}

impl Default for OwnMemory {
    fn default() -> Self {
        Self { bytes: Vec::new(), start: std::ptr::null_mut(), length: 0 }
    }
}

impl OwnMemory {
    /// Enough for any file that is read past the cache.
    pub(super) const ALIGNMENT_BYTES: usize = 4096;

    /// What it takes of the process's memory.
    pub(super) fn taken_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Makes it at least so long. No part of it is in use.
    pub(super) fn grow(&mut self, length: usize) {
        if self.length < length {
            self.bytes.resize(length + Self::ALIGNMENT_BYTES, 0);
            let skipped = self.bytes.as_ptr().align_offset(Self::ALIGNMENT_BYTES);
            self.start = self.bytes.as_mut_ptr().wrapping_add(skipped);
            self.length = length;
        }
    }

    /// A copy of its first bytes, which nobody writes just now.
    ///
    /// # Panics
    /// As [`Self::address`].
    pub(super) fn copied(&self, length: usize) -> Box<[u8]> {
        let mut copy = vec![0; length].into_boxed_slice();
        // SAFETY: so many bytes of `bytes`, which are initialised, and to which nobody has a reference.
        unsafe { std::ptr::copy_nonoverlapping(self.address(0, length), copy.as_mut_ptr(), length) };
        copy
    }

    /// Where a part of it stands.
    ///
    /// # Panics
    /// When it is shorter than that.
    pub(super) fn address(&self, at: usize, length: usize) -> *mut u8 {
        let is_inside = at.checked_add(length).is_some_and(|end| end <= self.length);
        assert!(is_inside, "{length} bytes from {at} on of {}", self.length);
        self.start.wrapping_add(at)
    }
}

/// Lengths of memory of this process.
fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("it is a part of a usize")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_through_the_runs_in_order() {
        let mut memory = [0u8; 10];
        let start = memory.as_mut_ptr();
        let run = |from: usize, length| {
            // SAFETY: inside `memory`.
            iovec { iov_base: unsafe { start.add(from) }.cast(), iov_len: length }
        };
        let vectors = [run(6, 4), run(0, 0), run(1, 3)];
        let mut runs = Runs::default();
        // SAFETY: `memory` lives to the end of the test.
        runs.set(unsafe { Segments::new(&vectors) });
        runs.put(2, b"abcd");
        let mut back = [0; 4];
        runs.get(2, &mut back);
        assert_eq!(&back, b"abcd");
        runs.put(6, b"zTOO LONG");
        assert_eq!(&memory, b"\0cdz\0\0\0\0ab");
    }
}
