//! Making changes durable in the order that [`alloc`](super::alloc) sets out.

use super::{alloc::State, geometry::SECTOR_BYTES, header::ENTRY_BYTES, layer::SparseLayer};
use crate::{
    Result,
    storage::{Flush, Preallocation},
};

/// Entries of the table that share a sector, and so reach the disk together.
const SECTOR_ENTRIES: u32 = 128;
const _: () = assert!(SECTOR_ENTRIES as u64 * ENTRY_BYTES == SECTOR_BYTES);

impl SparseLayer {
    /// Steps 3 to 7 for all that was committed. Whoever would commit more waits meanwhile.
    pub(super) fn drain(&self, state: &mut State) -> Result<()> {
        let drained = self.drain_in_order(state);
        self.or_halt(drained)
    }

    fn drain_in_order(&self, state: &mut State) -> Result<()> {
        self.storage.flush(Flush::Data)?; // 3
        let bitmaps = self.map.bitmaps.changed();
        if !bitmaps.is_empty() {
            for (block, bits) in &bitmaps {
                let at = self.map.place(*block).expect("bitmaps are of blocks that are there");
                self.storage.write_at(bits, at)?; // 4
            }
            self.storage.flush(Flush::Data)?; // 5
            self.map.bitmaps.written(bitmaps.keys().copied());
        }
        if !state.changed_entries.is_empty() {
            self.write_entries(state)?; // 6
            self.storage.flush(Flush::Data)?; // 7
            state.changed_entries.clear();
        }
        Ok(())
    }

    /// Writes the changed entries, those of a sector at once. All between them are as in the file.
    fn write_entries(&self, state: &State) -> Result<()> {
        let mut changed = state.changed_entries.iter().copied().peekable();
        while let Some(first) = changed.next() {
            let mut last = first;
            while let Some(next) = changed.next_if(|next| next / SECTOR_ENTRIES == first / SECTOR_ENTRIES) {
                last = next;
            }
            let entries = self.map.entries(first as usize..last as usize + 1);
            let bytes: Vec<u8> = entries.into_iter().flat_map(u32::to_be_bytes).collect();
            let at = self.descriptors().header.entry_at(first);
            self.storage.write_at(&bytes, at)?;
        }
        Ok(())
    }

    /// Gives back the places at the end of the file that were reserved in vain. Everything is durable.
    pub(super) fn drop_spare_end(&self) -> Result<()> {
        let mut state = self.state();
        let stored_bytes = self.map.bitmap_bytes + self.map.block_bytes;
        let mut end = state.next_free;
        while let Some(at) = state.spare.iter().position(|at| at + stored_bytes == end) {
            end = state.spare.swap_remove(at);
        }
        if end == state.next_free {
            return Ok(());
        }
        let footer = self.descriptors().footer;
        self.write_footer(&footer, end)?;
        self.storage.flush(Flush::Data)?;
        self.storage.resize(end + SECTOR_BYTES, Preallocation::Off)?;
        self.storage.flush(Flush::Data)?;
        state.next_free = end;
        Ok(())
    }
}
