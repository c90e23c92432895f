//! An opened raw image, or a window of one.

use std::{ops::Range, sync::Arc};

use serde_json::Value;

use super::{Raw, SECTOR_BYTES};
use crate::{
    Error, Result,
    format::{Backing, Driver, Extent, HostFile, HostOffset, Layer, LayerWriter, OpenMode, OptionSet, Place},
    storage::{Storage, window_bytes},
    sync::atomic::{AtomicU64, Ordering},
};

/// A raw image: guest byte `g` stands at `start_bytes + g`.
#[derive(Debug)]
pub(in crate::format) struct RawLayer {
    pub(in crate::format) storage: Arc<dyn Storage>,
    pub(super) start_bytes: u64,
    /// Whole sectors; the last may reach past the end of the file, where bytes read as zeroes.
    pub(in crate::format) virtual_size_bytes: AtomicU64,
    /// Whether the option `size` fixed the size.
    pub(super) fixed_size: bool,
    writable: bool,
    /// Whose layer it is.
    driver: &'static dyn Driver,
}

impl RawLayer {
    pub(in crate::format) fn open(
        storage: Arc<dyn Storage>,
        mode: OpenMode,
        options: &OptionSet,
    ) -> Result<Self> {
        super::check_options(options)?;
        let file_bytes = storage.len_bytes()?;
        let start_bytes = options.size("offset")?.unwrap_or(0);
        let given_bytes = options.size("size")?;
        let virtual_size_bytes = window_bytes(file_bytes, start_bytes, given_bytes)?;
        let virtual_size_bytes = virtual_size_bytes
            .checked_next_multiple_of(SECTOR_BYTES)
            .ok_or_else(|| Error::unsupported(storage.path(), "a file of 2^64 bytes"))?;
        let writable = mode.writes() && storage.is_writable();
        Ok(Self {
            storage,
            start_bytes,
            virtual_size_bytes: AtomicU64::new(virtual_size_bytes),
            fixed_size: given_bytes.is_some(),
            writable,
            driver: &Raw,
        })
    }
}

impl RawLayer {
    /// The disk of so many bytes, whole sectors, at the start of a file that holds more.
    pub(in crate::format) fn at_the_start(
        storage: Arc<dyn Storage>,
        virtual_size_bytes: u64,
        writable: bool,
    ) -> Self {
        let virtual_size_bytes = AtomicU64::new(virtual_size_bytes);
        Self { storage, start_bytes: 0, virtual_size_bytes, fixed_size: true, writable, driver: &Raw }
    }

    /// The same as the layer of another driver, whose guest bytes stand at their own offsets too.
    pub(in crate::format) fn called(self, driver: &'static dyn Driver) -> Self {
        Self { driver, ..self }
    }

    /// The extent of a range; `None` for an empty one.
    fn extent(&self, guest_bytes: &Range<u64>) -> Option<Extent> {
        let len_bytes = guest_bytes.end.checked_sub(guest_bytes.start).filter(|len| *len > 0)?;
        let at = HostOffset(self.start_bytes + guest_bytes.start); // inside the file, checked at open
        let place = Place::Data { file: HostFile::IMAGE, at, writable: self.writable };
        Some(Extent { len_bytes, place })
    }
}

impl Layer for RawLayer {
    fn driver(&self) -> &'static dyn Driver {
        self.driver
    }

    fn virtual_size_bytes(&self) -> u64 {
        self.virtual_size_bytes.load(Ordering::Relaxed)
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

    fn is_its_file(&self) -> bool {
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
        self.writable.then_some(self)
    }
}
