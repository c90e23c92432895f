//! The memory of a queue's requests: one block for each that may be under way.
#![allow(unsafe_code, reason = "requests are given addresses")]

use std::ptr::NonNull;

use super::noise::Noise;
use crate::request::{Segments, iovec};

/// Direct I/O wants memory aligned like pages.
const PAGE_BYTES: usize = 4096;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// Blocks of memory, by number. They are never looked at through references after they were made.
#[derive(Debug)]
pub(super) struct Blocks {
    first: NonNull<Page>,
    pages: usize,
    pages_per_block: usize,
    block_bytes: usize,
}

impl Blocks {
    /// `count` blocks of `block_bytes`, full of numbers that follow from `seed`.
    pub(super) fn new(count: usize, block_bytes: usize, seed: u64) -> Self {
        let pages_per_block = block_bytes.div_ceil(PAGE_BYTES).max(1);
        let mut pages = vec![Page([0; PAGE_BYTES]); count * pages_per_block];
        let mut noise = Noise::new(seed);
        pages.iter_mut().for_each(|page| noise.fill(&mut page.0));
        let pages = Box::leak(pages.into_boxed_slice());
        let count = pages.len();
        Self { first: NonNull::from(pages).cast(), pages: count, pages_per_block, block_bytes }
    }

    /// Block number `index`, as the one run of a request.
    pub(super) fn run(&self, index: usize) -> iovec {
        let page = index * self.pages_per_block;
        assert!(page < self.pages, "there are as many blocks as requests");
        // SAFETY: inside the allocation, by the assertion.
        let start = unsafe { self.first.add(page) };
        iovec { iov_base: start.as_ptr().cast(), iov_len: self.block_bytes }
    }

    /// The memory of a request.
    ///
    /// # Safety
    /// `run` comes from [`Self::run`], and these blocks are dropped after the lane that the request is given to.
    pub(super) unsafe fn segments<'a>(&self, run: &'a [iovec; 1]) -> Segments<'a> {
        // SAFETY: the caller sees to it that the memory is there until the lane, which waits for what it has when it is
        // dropped, is done with it; no reference to it exists.
        unsafe { Segments::new(run) }
    }
}

impl Blocks {
    /// Fills a block that no request has.
    ///
    /// # Panics
    /// When `bytes` is longer than a block.
    pub(super) fn fill(&mut self, index: usize, bytes: &[u8]) {
        let run = self.run(index);
        assert!(bytes.len() <= run.iov_len, "{} bytes into a block of {}", bytes.len(), run.iov_len);
        // SAFETY: inside the block, by the assertion; `bytes` is other memory, as nothing lends these blocks out.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), run.iov_base.cast(), bytes.len()) };
    }

    /// Copies the beginning of a block that no request has.
    ///
    /// # Panics
    /// When `bytes` is longer than a block.
    pub(super) fn copy(&self, index: usize, bytes: &mut [u8]) {
        let run = self.run(index);
        assert!(bytes.len() <= run.iov_len, "{} bytes of a block of {}", bytes.len(), run.iov_len);
        // SAFETY: as in `fill`; the block was filled when it was made.
        unsafe { std::ptr::copy_nonoverlapping(run.iov_base.cast(), bytes.as_mut_ptr(), bytes.len()) };
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        let pages = NonNull::slice_from_raw_parts(self.first, self.pages);
        // SAFETY: it was leaked by `new`, and is given back once.
        drop(unsafe { Box::from_raw(pages.as_ptr()) });
    }
}
