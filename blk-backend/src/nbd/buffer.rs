//! Memory for the bytes of requests: lent to a lane while it moves them, reused, and bounded for each connection.
//!
//! A [`Buffer`] is either idle, and may be looked at, or [`Lent`], and may not: the kernel and the lane's workers
//! write to it at any moment. The only way back is [`Lent::take_back`], when the lane has answered.
#![allow(unsafe_code)]

use std::{mem::ManuallyDrop, ptr::NonNull};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::wire::MAX_PAYLOAD_BYTES;
use crate::request::{Segments, iovec};

/// Buffers consist of whole pages at their own addresses: files opened without the page cache take them as they are.
const PAGE_BYTES: usize = 4096;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// Memory that nobody else uses.
pub(super) struct Buffer(Box<[Page]>);

impl Buffer {
    /// `None` when the system has no memory for it.
    fn new(len_bytes: usize) -> Option<Self> {
        let pages = Page::new_vec_zeroed(len_bytes.div_ceil(PAGE_BYTES)).ok()?;
        Some(Self(pages.into_boxed_slice()))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_bytes()
    }

    fn capacity_bytes(&self) -> usize {
        self.0.len() * PAGE_BYTES
    }

    /// Gives the memory to a lane.
    pub(super) fn lend(self) -> Lent {
        let pages = self.0.len();
        let start = NonNull::new(Box::into_raw(self.0).cast::<Page>()).expect("a box is not null");
        Lent { start, pages }
    }
}

/// Memory that a lane may be writing to. There is no reference to it while it is lent. Dropping it leaks it: whoever
/// still writes there harms nobody.
#[must_use = "memory that is not taken back is leaked"]
pub(super) struct Lent {
    start: NonNull<Page>,
    pages: usize,
}

impl Lent {
    /// One run of this memory, as a list for [`Self::segments`].
    ///
    /// # Panics
    /// When it is not inside the memory.
    pub(super) fn run(&self, len_bytes: usize) -> [iovec; 1] {
        assert!(len_bytes <= self.pages * PAGE_BYTES, "the buffer was taken for this request");
        [iovec { iov_base: self.start.as_ptr().cast(), iov_len: len_bytes }]
    }

    /// The memory as a request takes it. `run` comes from [`Self::run`].
    ///
    /// # Panics
    /// When it does not.
    pub(super) fn segments<'a>(&self, run: &'a [iovec; 1]) -> Segments<'a> {
        let is_own = run[0].iov_base == self.start.as_ptr().cast();
        assert!(is_own && run[0].iov_len <= self.pages * PAGE_BYTES, "the run of this memory");
        // SAFETY: `run` lies inside the memory, which stays allocated until `take_back`, whose caller promises that the
        // lane has answered, and to which no reference exists before. Dropping `self` leaks.
        unsafe { Segments::new(run) }
    }

    /// The memory, for us alone again.
    ///
    /// # Safety
    /// Every request that was submitted with its [`segments`](Self::segments) was answered, or its lane was reset or
    /// dropped.
    pub(super) unsafe fn take_back(self) -> Buffer {
        let this = ManuallyDrop::new(self);
        let slice = std::ptr::slice_from_raw_parts_mut(this.start.as_ptr(), this.pages);
        // SAFETY: pointer and length came from `Box::into_raw`, nobody else writes there any more, and a `Lent` is
        // made back into a box once.
        Buffer(unsafe { Box::from_raw(slice) })
    }
}

/// Sizes of buffers: powers of two from a page to the longest payload.
const CLASSES: usize = (MAX_PAYLOAD_BYTES as usize / PAGE_BYTES).ilog2() as usize + 1;

/// What the requests of one connection hold at once, or one that is longer; requests beyond wait in the socket. It
/// keeps fast disks busy, and is little enough that data is still in a cache when it is sent on.
const BUSY_BYTES: usize = 4 << 20;

/// The same while the client does not take its replies: one that says everything before it listens gets through.
const MAX_BYTES: usize = 2 * MAX_PAYLOAD_BYTES as usize;

/// What is kept for the next requests of a connection that is busy: making memory anew costs as much as filling it.
const MAX_SPARE_BYTES: usize = BUSY_BYTES;

/// What is kept for a connection that is idle.
const IDLE_SPARE_BYTES: usize = 1 << 20;

/// The buffers of one connection.
#[derive(Default)]
pub(super) struct Pool {
    spare: [Vec<Buffer>; CLASSES],
    spare_bytes: usize,
    used_bytes: usize,
}

impl Pool {
    /// A buffer of at least `len_bytes`, its content unspecified (but never another connection's). `None` when the
    /// connection holds as much as it may, or there is no memory: to be tried again when a buffer was given back. The
    /// only buffer of a connection may be of any size.
    pub(super) fn take(&mut self, len_bytes: usize, client_is_deaf: bool) -> Option<Buffer> {
        let class = class_of(len_bytes);
        let bytes = PAGE_BYTES << class;
        let most = if client_is_deaf { MAX_BYTES } else { BUSY_BYTES };
        if !self.is_unused() && self.used_bytes + bytes > most {
            return None;
        }
        let buffer = match self.spare[class].pop() {
            Some(spare) => {
                self.spare_bytes -= bytes;
                spare
            }
            None => Buffer::new(bytes)?,
        };
        self.used_bytes += bytes;
        Some(buffer)
    }

    pub(super) fn give(&mut self, buffer: Buffer) {
        let bytes = buffer.capacity_bytes();
        self.used_bytes -= bytes;
        if self.spare_bytes + bytes <= MAX_SPARE_BYTES {
            self.spare_bytes += bytes;
            self.spare[class_of(bytes)].push(buffer);
        }
    }

    /// Whether more is kept than an idle connection should have.
    pub(super) fn is_generous(&self) -> bool {
        self.spare_bytes > IDLE_SPARE_BYTES
    }

    /// Gives back to the system what an idle connection should not keep; the largest go first.
    pub(super) fn trim(&mut self) {
        for (class, spare) in self.spare.iter_mut().enumerate().rev() {
            while self.spare_bytes > IDLE_SPARE_BYTES && spare.pop().is_some() {
                self.spare_bytes -= PAGE_BYTES << class;
            }
        }
    }

    /// Whether nothing is out: then a [`take`](Self::take) that fails means that the system has no memory.
    pub(super) fn is_unused(&self) -> bool {
        self.used_bytes == 0
    }
}

/// The smallest class that holds so many bytes, at most the longest payload.
fn class_of(len_bytes: usize) -> usize {
    let pages = len_bytes.div_ceil(PAGE_BYTES).max(1).next_power_of_two();
    let class = pages.ilog2() as usize;
    assert!(class < CLASSES, "longer requests are refused");
    class
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn a_connection_holds_no_more_than_it_may() {
        let mut pool = Pool::default();
        let alone = pool.take(MAX_PAYLOAD_BYTES as usize, false).unwrap();
        assert!(pool.take(1, false).is_none());
        let more = pool.take(MAX_PAYLOAD_BYTES as usize, true).unwrap();
        assert!(pool.take(1, true).is_none());
        pool.give(more);
        pool.give(alone);
        assert_eq!(pool.spare_bytes, 0, "too large to be kept");
        let (one, two) =
            (pool.take(BUSY_BYTES / 2, false).unwrap(), pool.take(BUSY_BYTES / 2, false).unwrap());
        assert!(pool.take(1, false).is_none());
        pool.give(one);
        let small = pool.take(1, false).unwrap();
        assert_eq!(small.bytes().len(), PAGE_BYTES);
        pool.give(small);
        pool.give(two);
        assert!(pool.is_unused() && pool.spare_bytes <= MAX_SPARE_BYTES && pool.is_generous());
        pool.trim();
        assert!(!pool.is_generous() && pool.spare_bytes == PAGE_BYTES);
    }

    #[test]
    fn memory_comes_back_with_what_was_written_there() {
        let lent = Pool::default().take(5000, false).unwrap().lend();
        let run = lent.run(5000);
        let longer = [iovec { iov_len: 8193, ..run[0] }];
        assert!(catch_unwind(AssertUnwindSafe(|| lent.segments(&longer))).is_err(), "two pages were taken");
        let segments = lent.segments(&run);
        let first = segments.vectors()[0].iov_base.cast::<u8>();
        // SAFETY: the memory is lent to nobody but this test.
        unsafe { first.add(4999).write(7) };
        // SAFETY: nothing was submitted.
        let buffer = unsafe { lent.take_back() };
        assert_eq!(buffer.bytes()[4999], 7);
        assert_eq!(buffer.bytes().as_ptr().addr() % PAGE_BYTES, 0);
    }
}
