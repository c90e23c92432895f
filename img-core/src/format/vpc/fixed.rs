//! A fixed disk: all guest bytes at their own offsets, then the footer.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use serde_json::Value;
use zerocopy::IntoBytes as _;

use super::{
    Vpc,
    footer::{Footer, SizeRule},
    geometry::SECTOR_BYTES,
    resize::resized,
};
use crate::{
    Error, Result,
    format::{
        Attempt, Backing, CheckReport, Driver, Extent, Finding, HostFile, HostOffset, Layer, LayerWriter,
        OpenMode, Place, PreparedWrite, Repair, WritePlan, WriteStep, WriteToken, table_cache::lock,
    },
    storage::{Flush, Preallocation, Storage},
};

/// An opened image.
pub(super) struct FixedLayer {
    storage: Arc<dyn Storage>,
    mode: OpenMode,
    rule: SizeRule,
    virtual_size_bytes: AtomicU64,
    footer: Mutex<Footer>,
}

impl fmt::Debug for FixedLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FixedLayer")
            .field("storage", &self.storage)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl FixedLayer {
    /// Opens the disk that `footer` describes.
    pub(super) fn open(
        storage: Arc<dyn Storage>,
        mode: OpenMode,
        rule: SizeRule,
        footer: Footer,
    ) -> Result<Self> {
        let virtual_size_bytes = AtomicU64::new(footer.virtual_size_bytes(storage.path(), rule)?);
        Ok(Self { storage, mode, rule, virtual_size_bytes, footer: Mutex::new(footer) })
    }

    /// The extent of a range; `None` for an empty one.
    fn extent(&self, guest_bytes: &Range<u64>) -> Option<Extent> {
        let len_bytes = guest_bytes.end.checked_sub(guest_bytes.start).filter(|len| *len > 0)?;
        let writable = self.mode == OpenMode::Write;
        let place = Place::Data { file: HostFile::IMAGE, at: HostOffset(guest_bytes.start), writable };
        Some(Extent { len_bytes, place })
    }
}

impl Layer for FixedLayer {
    fn driver(&self) -> &'static dyn Driver {
        &Vpc
    }

    fn virtual_size_bytes(&self) -> u64 {
        self.virtual_size_bytes.load(Ordering::SeqCst)
    }

    fn cluster_size_bytes(&self) -> Option<u32> {
        None
    }

    fn file(&self, file: HostFile) -> Option<&Arc<dyn Storage>> {
        (file == HostFile::IMAGE).then_some(&self.storage)
    }

    fn backing(&self) -> Option<&Backing> {
        None
    }

    fn has_sparse_data(&self) -> bool {
        true
    }

    fn details(&self) -> Result<Option<Value>> {
        Ok(None)
    }

    fn map_range(&self, guest_bytes: Range<u64>, extents: &mut Vec<Extent>) -> Result<()> {
        if let Some(extent) = self.extent(&guest_bytes) {
            extent.push_to(extents);
        }
        Ok(())
    }

    fn try_map_range(&self, guest_bytes: Range<u64>, found: &mut dyn FnMut(Extent)) -> Result<bool> {
        if let Some(extent) = self.extent(&guest_bytes) {
            found(extent);
        }
        Ok(true)
    }

    fn writer(&self) -> Option<&dyn LayerWriter> {
        (self.mode == OpenMode::Write).then_some(self)
    }

    fn check(&self, repair: Repair, findings: &mut dyn FnMut(Finding)) -> Result<CheckReport> {
        super::check::check(&*self.storage, self.rule, repair, findings)
    }
}

impl LayerWriter for FixedLayer {
    fn prepare_write(&self, guest_bytes: Range<u64>) -> Result<PreparedWrite<'_>> {
        let at = HostOffset(guest_bytes.start);
        let plan = WritePlan::in_place(guest_bytes, HostFile::IMAGE, at);
        Ok(PreparedWrite::new(self, WriteToken(0), plan))
    }

    fn prepare_compressed(&self, _guest_offset: u64, _stored_bytes: u32) -> Result<PreparedWrite<'_>> {
        Err(Error::unsupported(self.storage.path(), "writing compressed clusters to a VHD"))
    }

    fn try_prepare_write(
        &self,
        guest_bytes: Range<u64>,
        _zeroes_below: &dyn Fn(Range<u64>) -> bool,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<Option<WriteToken>>> {
        let at = HostOffset(guest_bytes.start);
        WriteStep::in_place(guest_bytes, HostFile::IMAGE, at).push_to(steps);
        Ok(Attempt::Done(None))
    }

    fn commit_write(&self, _token: WriteToken) -> Result<()> {
        Ok(())
    }

    fn abort_write(&self, _token: WriteToken) {}

    fn zero_granularity_bytes(&self) -> u64 {
        1
    }

    fn write_zeroes(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<bool> {
        self.storage.write_zeroes(guest_bytes, may_unmap)?;
        Ok(true)
    }

    /// A host that cannot give space back leaves the bytes as they are: a discard is a wish.
    fn discard(&self, guest_bytes: Range<u64>) -> Result<()> {
        if self.storage.limits().can_punch { self.storage.punch_hole(guest_bytes) } else { Ok(()) }
    }

    fn flush(&self) -> Result<()> {
        self.storage.flush(Flush::Data)
    }

    /// The footer moves to the new end. To grow:
    ///
    /// 1. The new footer is written behind the new data, which is a hole, and made durable.
    /// 2. The old one becomes part of the disk, and is zeroed.
    ///
    /// A cut between them leaves the disk at its new size, with the old footer in the part that is new. To
    /// shrink, the new footer is made durable inside what is cut off before the file gets shorter: a cut between
    /// leaves the old size.
    fn resize(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        let mut footer = lock(&self.footer);
        let (raw, new_bytes) = resized(self.storage.path(), &footer.raw, self.rule, virtual_size_bytes)?;
        let old_at = footer.at_bytes;
        if new_bytes == old_at {
            return Ok(());
        }
        self.storage.write_at(raw.as_bytes(), new_bytes)?;
        self.storage.flush(Flush::Data)?;
        let end = new_bytes + SECTOR_BYTES;
        if new_bytes > old_at {
            self.storage.write_zeroes(old_at..new_bytes.min(old_at + SECTOR_BYTES), false)?;
            if preallocation != Preallocation::Off {
                self.storage.preallocate(old_at..new_bytes, preallocation)?;
            }
        } else {
            self.storage.resize(end, Preallocation::Off)?;
        }
        self.storage.flush(Flush::Data)?;
        *footer = Footer { raw, at_bytes: new_bytes, ..*footer };
        self.virtual_size_bytes.store(new_bytes, Ordering::SeqCst);
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.storage.flush(Flush::Data)
    }
}
