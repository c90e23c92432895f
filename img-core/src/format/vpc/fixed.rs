//! A fixed disk: all guest bytes at their own offsets, then the footer.

use std::{
    fmt,
    ops::Range,
    sync::{Arc, atomic::Ordering},
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
        Attempt, Backing, Below, CheckReport, CheckWatch, Driver, Extent, Finding, HostFile, Layer,
        LayerWriter, OpenMode, PreparedWrite, Repair, WriteStep, WriteToken, raw::RawLayer,
        table_cache::lock,
    },
    storage::{Flush, Preallocation, Storage},
    sync::Mutex,
};

/// An opened image: a raw disk, and the footer behind it.
pub(super) struct FixedLayer {
    disk: RawLayer,
    rule: SizeRule,
    footer: Mutex<Footer>,
}

impl fmt::Debug for FixedLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FixedLayer").field("disk", &self.disk).finish_non_exhaustive()
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
        let virtual_size_bytes = footer.virtual_size_bytes(storage.path(), rule)?;
        let disk = RawLayer::at_the_start(storage, virtual_size_bytes, mode == OpenMode::Write);
        Ok(Self { disk, rule, footer: Mutex::new(footer) })
    }

    fn storage(&self) -> &dyn Storage {
        &*self.disk.storage
    }
}

impl Layer for FixedLayer {
    fn driver(&self) -> &'static dyn Driver {
        &Vpc
    }

    fn virtual_size_bytes(&self) -> u64 {
        self.disk.virtual_size_bytes()
    }

    fn cluster_size_bytes(&self) -> Option<u32> {
        None
    }

    fn file(&self, file: HostFile) -> Option<&Arc<dyn Storage>> {
        self.disk.file(file)
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
        self.disk.map_range(guest_bytes, extents)
    }

    fn try_map_range(&self, guest_bytes: Range<u64>, found: &mut dyn FnMut(Extent)) -> Result<bool> {
        self.disk.try_map_range(guest_bytes, found)
    }

    fn writer(&self) -> Option<&dyn LayerWriter> {
        self.disk.writer().map(|_| self as &dyn LayerWriter)
    }

    fn check_watched(
        &self,
        repair: Repair,
        findings: &mut dyn FnMut(Finding),
        watch: &CheckWatch<'_>,
    ) -> Result<CheckReport> {
        super::check::check(self.storage(), self.rule, repair, findings, watch)
    }
}

impl LayerWriter for FixedLayer {
    fn prepare_write(&self, guest_bytes: Range<u64>) -> Result<PreparedWrite<'_>> {
        self.disk.prepare_write(guest_bytes)
    }

    fn prepare_compressed(&self, _guest_offset: u64, _stored_bytes: u32) -> Result<PreparedWrite<'_>> {
        Err(Error::unsupported(self.storage().path(), "writing compressed clusters to a VHD"))
    }

    fn try_prepare_write(
        &self,
        guest_bytes: Range<u64>,
        below: &dyn Fn(Range<u64>) -> Below,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<Option<WriteToken>>> {
        self.disk.try_prepare_write(guest_bytes, below, steps)
    }

    fn commit_write(&self, token: WriteToken) -> Result<()> {
        self.disk.commit_write(token)
    }

    fn abort_write(&self, token: WriteToken) {
        self.disk.abort_write(token);
    }

    fn zero_granularity_bytes(&self) -> u64 {
        self.disk.zero_granularity_bytes()
    }

    fn write_zeroes(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<bool> {
        self.disk.write_zeroes(guest_bytes, may_unmap)
    }

    fn discard(&self, guest_bytes: Range<u64>) -> Result<()> {
        self.disk.discard(guest_bytes)
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn files_to_sync(&self) -> Option<&'static [HostFile]> {
        self.disk.files_to_sync()
    }

    /// The footer moves to the new end. In order, each made durable before the next:
    ///
    /// 1. What other programs left between the disk and the footer, and would come into view, becomes zeroes.
    /// 2. The new footer. Where the disk ends behind the old one, that becomes part of the disk, and is zeroed; where
    ///    it ends before, the file gets shorter.
    ///
    /// A cut in step 2 leaves a larger disk at its new size, with the old footer in the part that is new; a smaller one
    /// keeps its old size until the file is shorter.
    fn resize(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        let storage = self.storage();
        let mut footer = lock(&self.footer);
        let (raw, new_bytes) = resized(storage.path(), &footer.raw, self.rule, virtual_size_bytes)?;
        let (old_bytes, old_at) = (self.virtual_size_bytes(), footer.at_bytes);
        if (new_bytes, new_bytes) == (old_bytes, old_at) {
            return Ok(());
        }
        // 1.
        let hidden = old_bytes..new_bytes.min(old_at);
        if !hidden.is_empty() {
            storage.write_zeroes(hidden, false)?;
            storage.flush(Flush::Data)?;
        }
        // 2.
        storage.write_at(raw.as_bytes(), new_bytes)?;
        storage.flush(Flush::Data)?;
        if new_bytes > old_at {
            storage.write_zeroes(old_at..new_bytes.min(old_at + SECTOR_BYTES), false)?;
            let filled = match preallocation {
                Preallocation::Off => Ok(()),
                how => storage.preallocate(old_at..new_bytes, how),
            };
            if let Err(error) = filled {
                // Who asked for space gets it or nothing: back as in shrinking. A host that refuses that too leaves
                // the larger disk; what is told is why it was not filled.
                let undone = storage
                    .write_at(footer.raw.as_bytes(), old_at)
                    .and_then(|()| storage.flush(Flush::Data))
                    .and_then(|()| storage.resize(old_at + SECTOR_BYTES, Preallocation::Off));
                if undone.is_err() {
                    *footer = Footer { raw, at_bytes: new_bytes, ..*footer };
                    self.disk.virtual_size_bytes.store(new_bytes, Ordering::Relaxed);
                }
                return Err(error);
            }
        } else if new_bytes < old_at {
            storage.resize(new_bytes + SECTOR_BYTES, Preallocation::Off)?;
        }
        storage.flush(Flush::Data)?;
        *footer = Footer { raw, at_bytes: new_bytes, ..*footer };
        self.disk.virtual_size_bytes.store(new_bytes, Ordering::Relaxed);
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.disk.close()
    }
}
