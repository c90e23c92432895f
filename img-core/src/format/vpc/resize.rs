//! Another size for a disk.

use std::{
    path::Path,
    sync::{PoisonError, atomic::Ordering},
};

use zerocopy::IntoBytes as _;

use super::{
    footer::{DiskType, FOOTER_BYTES, RawFooter, SizeRule},
    geometry::{Chs, MAX_SECTORS, SECTOR_BYTES},
    header::{ENTRY_BYTES, Header, UNUSED, check_table_entries},
    layer::SparseLayer,
};
use crate::{
    Error, Result,
    storage::{Flush, Preallocation},
};

/// The footer of the disk at another size, and that size: the geometry that holds the bytes asked for where the
/// geometry is what counts, as when a disk is made.
///
/// # Errors
/// [`Error::Unsupported`] above 2040 GiB.
pub(super) fn resized(
    path: &Path,
    footer: &RawFooter,
    rule: SizeRule,
    virtual_size_bytes: u64,
) -> Result<(RawFooter, u64)> {
    let asked = virtual_size_bytes.div_ceil(SECTOR_BYTES);
    if asked > MAX_SECTORS {
        return Err(Error::unsupported(path, format_args!("a disk of {asked} sectors")));
    }
    let size_counts = footer.size_counts(rule);
    let chs = if size_counts && footer.chs() == Chs::MAX { Chs::MAX } else { Chs::holding(asked) };
    let sectors = if size_counts || chs == Chs::MAX { asked } else { chs.span_sectors() };
    let mut raw = *footer;
    raw.cylinders = chs.cylinders.into();
    raw.heads = chs.heads;
    raw.sectors_per_track = chs.sectors;
    raw.current_size = (sectors * SECTOR_BYTES).into(); // at most 2040 GiB
    Ok((raw.summed(), sectors * SECTOR_BYTES))
}

impl SparseLayer {
    /// Makes the disk larger. Nothing is in flight. In order, each made durable before the next:
    ///
    /// 1. Zeroes in the part of the last block that comes into view, and entries for the new blocks: in the table where it has room for them, else in a new table at the end of
    ///    the file, in front of a footer of the old size.
    /// 2. The sector of the header that names the table.
    /// 3. The footer at the front: from here on the disk has its new size.
    /// 4. The footer at the end.
    ///
    /// # Errors
    /// [`Error::Unsupported`] to shrink, for a differencing disk, whose size is its parent's, and for
    /// preallocation, as a block that is there is not a hole of the file.
    pub(super) fn grow(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        let refuse = |what: &str| Err(Error::unsupported(self.path(), what));
        if self.disk_type == DiskType::Differencing {
            return refuse("resizing a differencing VHD, which has the size of its parent,");
        }
        if preallocation != Preallocation::Off {
            return refuse("preallocation in a dynamic VHD");
        }
        let old = self.descriptors().clone();
        let (footer, new_bytes) = resized(self.path(), &old.footer, self.rule, virtual_size_bytes)?;
        let old_bytes = self.virtual_size_bytes.load(Ordering::SeqCst);
        if new_bytes < old_bytes {
            return refuse("shrinking a dynamic VHD");
        }
        if new_bytes == old_bytes {
            return Ok(());
        }
        // What another program left behind the end, in the last block, must not show.
        let last_block_end = old_bytes.next_multiple_of(old.header.block_bytes);
        let tail = old_bytes..last_block_end.min(new_bytes);
        self.for_each_run_there(tail, |host| self.storage.write_zeroes(host, true))?;
        let mut state = self.state();
        self.drain(&mut state)?;
        let blocks = |bytes: u64| u32::try_from(bytes.div_ceil(old.header.block_bytes)).unwrap_or(u32::MAX);
        let (old_blocks, new_blocks) = (blocks(old_bytes), blocks(new_bytes));
        let mut header = old.header.clone();
        // The sum is that of the new fields from here on.
        let written =
            self.write_new_entries(&mut state.next_free, &mut header, old_blocks, new_blocks, &old.footer);
        let written = written.and_then(|()| self.write_descriptors(&header, &footer, state.next_free));
        self.or_halt(written)?;
        header.raw = header.raw.summed();
        self.map.set_blocks(new_blocks as usize);
        let mut descriptors = self.descriptors.write().unwrap_or_else(PoisonError::into_inner);
        descriptors.footer = footer;
        descriptors.header = header;
        self.virtual_size_bytes.store(new_bytes, Ordering::SeqCst);
        Ok(())
    }

    /// Step 1.
    fn write_new_entries(
        &self,
        next_free: &mut u64,
        header: &mut Header,
        old_blocks: u32,
        new_blocks: u32,
        footer: &RawFooter,
    ) -> Result<()> {
        let unused = |count: u32| vec![UNUSED; count as usize];
        let (at, entries) = if new_blocks <= header.table_entries {
            (header.entry_at(old_blocks), unused(new_blocks - old_blocks))
        } else {
            let at = *next_free;
            let bytes = (u64::from(new_blocks) * ENTRY_BYTES).next_multiple_of(SECTOR_BYTES);
            header.raw.table_offset = at.into();
            header.raw.max_table_entries = new_blocks.into();
            check_table_entries(self.path(), new_blocks)?;
            header.table_at = at;
            header.table_entries = new_blocks;
            *next_free = at + bytes;
            self.write_footer(footer, *next_free)?;
            let mut entries = self.map.entries(0..old_blocks as usize);
            entries.resize((bytes / ENTRY_BYTES) as usize, UNUSED);
            (at, entries)
        };
        let bytes: Vec<u8> = entries.into_iter().flat_map(u32::to_be_bytes).collect();
        self.storage.write_at(&bytes, at)?;
        self.storage.flush(Flush::Data)
    }

    /// Steps 2 to 4.
    fn write_descriptors(&self, header: &Header, footer: &RawFooter, end_bytes: u64) -> Result<()> {
        let raw = header.raw.summed();
        // All that changed is in the first sector, which is written whole or not at all.
        self.storage.write_at(&raw.as_bytes()[..FOOTER_BYTES], header.at_bytes)?;
        self.storage.flush(Flush::Data)?;
        for at in [0, end_bytes] {
            self.write_footer(footer, at)?;
            self.storage.flush(Flush::Data)?;
        }
        Ok(())
    }
}
