//! An opened dynamic or differencing disk: what all rooms share, and the [`Layer`] that the rest of the library
//! sees.

use std::{
    fmt,
    ops::Range,
    path::Path,
    sync::{Arc, PoisonError},
};

use serde_json::Value;

use super::{
    Vpc,
    alloc::State,
    footer::{Copies, Copy, DiskType, Footer, RawFooter, SizeRule},
    geometry::SECTOR_BYTES,
    header::Header,
    locator,
    map::{BlockMap, read_checked_table, read_table},
    places::Places,
};
use crate::{
    Error, Result,
    format::{
        Backing, CheckReport, CheckWatch, Driver, Extent, Finding, HostFile, Layer, LayerWriter, OpenMode,
        Place, Repair, halt::Halt, table_cache::lock, waiters::Waiters,
    },
    storage::{Flush, Storage},
    sync::{
        Mutex, MutexGuard, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering},
    },
};

/// An opened image.
///
/// Lock order: `state`, `descriptors`, then those inside the map. Who asks the map takes only the last.
pub(super) struct SparseLayer {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) mode: OpenMode,
    pub(super) disk_type: DiskType,
    pub(super) rule: SizeRule,
    pub(super) map: BlockMap,
    pub(super) virtual_size_bytes: AtomicU64,
    pub(super) descriptors: RwLock<Descriptors>,
    backing: Option<Backing>,
    /// Other names of the parent.
    other_names: Vec<String>,
    state: Mutex<State>,
    /// A prepared write has ended.
    pub(super) landed: Waiters,
    /// Whether anything is written any more.
    halt: Halt,
}

/// Footer and header as they are on disk.
#[derive(Clone)]
pub(super) struct Descriptors {
    pub(super) footer: RawFooter,
    pub(super) header: Header,
}

impl fmt::Debug for SparseLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SparseLayer")
            .field("file", &self.path())
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl SparseLayer {
    /// Opens the disk that `footer` describes.
    pub(super) fn open(
        storage: Arc<dyn Storage>,
        mode: OpenMode,
        rule: SizeRule,
        copies: &Copies,
        footer: Footer,
    ) -> Result<Self> {
        let virtual_size_bytes = footer.virtual_size_bytes(storage.path(), rule)?;
        let header = Header::read(&*storage, footer.raw.data_offset.get(), virtual_size_bytes)?;
        let blocks = usize::try_from(virtual_size_bytes.div_ceil(header.block_bytes))
            .expect("no more than the table has, at most 2^24");
        let entries = match mode {
            // An audit names each entry that is wrong.
            OpenMode::Check { .. } => read_table(&*storage, &header, blocks, |_, _| Ok(()))?,
            OpenMode::Inspect | OpenMode::Read | OpenMode::Write => {
                read_checked_table(&*storage, &header, blocks)?
            }
        };
        let (backing, other_names) = match footer.disk_type {
            DiskType::Differencing => {
                let mut names = locator::candidates(&*storage, &header)?;
                let name = names.remove(0);
                (Some(Backing { name, format: Some("vpc".to_owned()) }), names)
            }
            DiskType::Fixed | DiskType::Dynamic => (None, Vec::new()),
        };
        let layer = Self {
            mode,
            disk_type: footer.disk_type,
            rule,
            map: BlockMap::new(&header, entries),
            virtual_size_bytes: AtomicU64::new(virtual_size_bytes),
            descriptors: RwLock::new(Descriptors { footer: footer.raw, header }),
            backing,
            other_names,
            state: Mutex::default(),
            landed: Waiters::default(),
            halt: Halt::default(),
            storage,
        };
        if mode == OpenMode::Write {
            layer.make_writable(copies)?;
        }
        Ok(layer)
    }

    /// The steps before the first write: an image whose structures overlap is refused, and the copies of the
    /// footer are made equal.
    fn make_writable(&self, copies: &Copies) -> Result<()> {
        let Descriptors { footer, header } = self.descriptors().clone();
        if !header.is_intact {
            return Err(Error::corrupt(
                self.path(),
                "header.checksum",
                header.at_bytes + 36,
                format_args!("{:#010x}", header.raw.summed().checksum.get()),
                format_args!("{:#010x}", header.raw.checksum.get()),
            ));
        }
        let places = Places::collect(&*self.storage, &header, self.disk_type)?;
        if let Some(at) = places.broken_locators.first() {
            let rule = "a name inside the file";
            return Err(Error::corrupt(self.path(), "header.parent_locators", *at, rule, "one outside"));
        }
        if let Some(overlap) = places.overlaps().first() {
            return Err(Error::corrupt(
                self.path(),
                "block allocation table",
                overlap.entry_at,
                "a block of its own",
                format_args!("one at {:#x} that overlaps {}", overlap.at_bytes, overlap.with),
            ));
        }
        if copies.front != Copy::Intact(footer) {
            // The front is the truth from now on.
            self.write_footer(&footer, 0)?;
            self.storage.flush(Flush::Data)?;
        }
        let next_free = places.next_free(copies);
        if copies.back != Copy::Intact(footer) || copies.back_at != next_free {
            self.write_footer(&footer, next_free)?;
            self.storage.flush(Flush::Data)?;
        }
        self.state().next_free = next_free;
        Ok(())
    }

    /// Writes a copy of the footer.
    pub(super) fn write_footer(&self, footer: &RawFooter, at_bytes: u64) -> Result<()> {
        self.storage.write_at(zerocopy::IntoBytes::as_bytes(footer), at_bytes)
    }

    pub(super) fn path(&self) -> &Path {
        self.storage.path()
    }

    pub(super) fn descriptors(&self) -> RwLockReadGuard<'_, Descriptors> {
        self.descriptors.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of the changing side.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// What a sector is that the image does not hold.
    pub(super) fn absent(&self) -> Place {
        match self.disk_type {
            DiskType::Differencing => Place::Unallocated,
            DiskType::Fixed | DiskType::Dynamic => Place::Zero { reserved: None },
        }
    }

    /// Passes a result on; when it is an error, nothing is written until the image is opened again. A flush
    /// that failed may have lost what it was to make durable, and what follows must not refer to that.
    pub(super) fn or_halt<T>(&self, result: Result<T>) -> Result<T> {
        self.halt.or_halt(result)
    }

    /// Refuses when nothing may be written.
    pub(super) fn check_writable(&self) -> Result<()> {
        if self.mode != OpenMode::Write {
            return Err(Error::ReadOnly { file: self.path().to_owned() });
        }
        self.halt.check(self.path())
    }
}

impl Layer for SparseLayer {
    fn driver(&self) -> &'static dyn Driver {
        &Vpc
    }

    fn virtual_size_bytes(&self) -> u64 {
        self.virtual_size_bytes.load(Ordering::SeqCst)
    }

    fn cluster_size_bytes(&self) -> Option<u32> {
        Some(u32::try_from(self.map.block_bytes).expect("read from 32 bits"))
    }

    fn zeroes_in_place(&self) -> bool {
        true
    }

    /// Between a sector, which a map may change at, and a block, which it nearly always does.
    fn extent_granularity_bytes(&self) -> Option<u32> {
        const USUAL_BYTES: u64 = 8 * SECTOR_BYTES;
        Some(u32::try_from(self.map.block_bytes.min(USUAL_BYTES)).expect("at most 4096"))
    }

    fn file(&self, file: HostFile) -> Option<&Arc<dyn Storage>> {
        (file == HostFile::IMAGE).then_some(&self.storage)
    }

    fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    fn other_backing_names(&self) -> &[String] {
        &self.other_names
    }

    fn check_backing(&self, below: &dyn Layer) -> Result<Option<String>> {
        super::parent::check(self.path(), &self.descriptors().header, below)
    }

    fn has_sparse_data(&self) -> bool {
        false
    }

    fn details(&self) -> Result<Option<Value>> {
        let descriptors = self.descriptors();
        Ok(super::details::details(self.disk_type, &descriptors.footer, &descriptors.header))
    }

    fn map_range(&self, guest_bytes: Range<u64>, extents: &mut Vec<Extent>) -> Result<()> {
        let writable = self.mode == OpenMode::Write;
        self.map.map_range(&*self.storage, guest_bytes, self.absent(), writable, extents)
    }

    fn try_map_range(&self, guest_bytes: Range<u64>, found: &mut dyn FnMut(Extent)) -> Result<bool> {
        let writable = self.mode == OpenMode::Write;
        self.map.map_cached(guest_bytes, self.absent(), writable, found)
    }

    fn writer(&self) -> Option<&dyn LayerWriter> {
        (self.mode == OpenMode::Write).then_some(self)
    }

    fn check_watched(
        &self,
        repair: Repair,
        findings: &mut dyn FnMut(Finding),
        watch: &CheckWatch<'_>,
    ) -> Result<CheckReport> {
        super::check::check(&*self.storage, self.rule, repair, findings, watch)
    }
}
