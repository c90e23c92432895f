//! Where new blocks live, and the order in which changes reach the disk.
//!
//! A new block takes the place of the footer at the end of the file: its bitmap comes where the footer was, its
//! data behind that, where the file ended and reads as zeroes. What a power cut may leave follows from this
//! order, whose numbers the tests use:
//!
//! 1. The footer is written behind the new block. The old one still stands, as does the copy at the front, which
//!    counts as the truth throughout.
//! 2. The data is written.
//! 3. *flush:* data, and the length of the file.
//! 4. The sector bitmap is written, over the old footer if the block is new: it names only sectors whose data
//!    is durable.
//! 5. *flush:* bitmaps.
//! 6. The entry of the block allocation table is written: it names only blocks whose bitmap and data are
//!    durable.
//! 7. *flush:* the table.
//!
//! A cut before 6 leaves space that nothing refers to, at the end of the file; between 1 and 4 the end may be
//! without a footer, which opening for writing puts back. Blocks are never moved nor freed while an image is
//! open: a map answer stays true.

use std::collections::{BTreeSet, HashMap};

use super::{geometry::SECTOR_BYTES, header::UNUSED, layer::SparseLayer, write::Write};
use crate::{Error, Result, format::in_flight::GuestRanges};

/// The changing side of an image.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Where the footer at the end stands, and the next block will.
    pub(super) next_free: u64,
    /// Places of blocks that were reserved and given up; what stands there means nothing.
    pub(super) spare: Vec<u64>,
    /// Guest sectors between prepare and commit.
    pub(super) in_flight: GuestRanges,
    pub(super) writes: HashMap<u64, Write>,
    pub(super) next_token: u64,
    /// Blocks whose entries in the file are not those in memory.
    pub(super) changed_entries: BTreeSet<u32>,
}

impl SparseLayer {
    /// Reserves the place of a new block, whose data reads as zeroes (step 1).
    pub(super) fn reserve(&self, state: &mut State) -> Result<u64> {
        let stored_bytes = self.map.bitmap_bytes + self.map.block_bytes;
        if let Some(at) = state.spare.last().copied() {
            self.storage.write_zeroes(at + self.map.bitmap_bytes..at + stored_bytes, true)?;
            state.spare.pop();
            return Ok(at);
        }
        let at = state.next_free;
        if at / SECTOR_BYTES >= u64::from(UNUSED) {
            return Err(Error::unsupported(self.path(), "a block behind 2 TiB of the file"));
        }
        let end = at + stored_bytes;
        let footer = self.descriptors().footer;
        self.write_footer(&footer, end)?;
        state.next_free = end;
        Ok(at)
    }
}
