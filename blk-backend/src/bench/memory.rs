//! The memory of a queue's requests: one block for each that may be under way.
#![allow(unsafe_code, reason = "requests are given addresses")]

use std::ptr::NonNull;

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
        let mut state = seed | 1;
        for word in pages.iter_mut().flat_map(|page| page.0.chunks_exact_mut(8)) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
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

    /// The memory of a request that ends before these blocks are dropped. (`run` drains its lane, or drops it, which
    /// waits for what is under way, before it drops them.)
    pub(super) fn segments<'a>(&self, run: &'a [iovec; 1]) -> Segments<'a> {
        // SAFETY: the blocks live until the lane is done with them, and no reference to them exists.
        unsafe { Segments::new(run) }
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        let pages = NonNull::slice_from_raw_parts(self.first, self.pages);
        // SAFETY: it was leaked by `new`, and is given back once.
        drop(unsafe { Box::from_raw(pages.as_ptr()) });
    }
}
