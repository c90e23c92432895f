//! An opened QED image: what all rooms share, and the [`Layer`] that the rest of the library sees.

use std::{
    fmt,
    ops::Range,
    path::Path,
    sync::{Arc, PoisonError},
};

use serde_json::Value;

use super::{
    Qed,
    alloc::State,
    header::{Header, feature},
    map::TableMap,
    tables::Tables,
};
use crate::{
    Error, Result,
    format::{
        Backing, CheckReport, CheckWatch, Driver, Extent, Finding, HostFile, Layer, LayerWriter,
        MissingTable, OpenContext, OpenMode, OptionSet, Repair,
        halt::Halt,
        table_cache::{SliceCache, lock},
        unwatched,
        waiters::Waiters,
    },
    storage::{Flush, Storage},
    sync::{
        Mutex, MutexGuard, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering},
    },
};

/// Tables are cached in pieces of this size.
const SLICE_BYTES: u64 = 4096;
/// The bound of what is kept of L1: with the default sizes all of it, 128 times over.
const L1_CACHE_BYTES: u64 = 32 << 20;
/// The bound of what is kept of L2 tables; half of it may wait to be written.
const L2_CACHE_BYTES: u64 = 32 << 20;

/// An opened image.
///
/// Lock order: `state`, `tables`, `header`, then those inside the caches. Readers of the map take none of the first.
pub(super) struct QedLayer {
    pub(super) mode: OpenMode,
    pub(super) map: TableMap,
    /// So many bytes of changed L2 slices are written before more are changed.
    pub(super) dirty_limit_bytes: u64,
    backing: Option<Backing>,
    header: RwLock<Header>,
    virtual_size_bytes: AtomicU64,
    state: Mutex<State>,
    /// A prepared write has ended.
    pub(super) landed: Waiters,
    /// Where tables stand, once someone wants to write.
    pub(super) tables: RwLock<Option<Tables>>,
    /// The map is changed up to here: the size, or one that is being grown to.
    pub(super) reach_bytes: AtomicU64,
    /// Whether anything is written any more.
    halt: Halt,
}

impl fmt::Debug for QedLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QedLayer")
            .field("file", &self.path())
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl QedLayer {
    /// Opens the image on `storage`.
    pub(super) fn open(storage: Arc<dyn Storage>, context: &OpenContext<'_>) -> Result<Self> {
        refuse_options(context.options)?;
        Self::open_with_cache(storage, context.mode, L2_CACHE_BYTES)
    }

    /// [`Self::open`] with another bound for L2 tables in memory.
    pub(super) fn open_with_cache(
        storage: Arc<dyn Storage>,
        mode: OpenMode,
        l2_cache_bytes: u64,
    ) -> Result<Self> {
        let mut header = Header::read(&*storage)?;
        if mode.writes() {
            forget_unknown_extras(&*storage, &mut header)?;
        }
        if mode == OpenMode::Write && header.features & feature::NEED_CHECK != 0 {
            repair(&*storage, &mut header)?;
        }
        let geometry = header.geometry;
        let map = TableMap {
            geometry,
            l1_offset: header.l1_offset,
            first_bytes: header.header_bytes(),
            end_bytes: AtomicU64::new(geometry.cluster_start(storage.len_bytes()?)),
            writable: mode == OpenMode::Write,
            l1: SliceCache::new(SLICE_BYTES, L1_CACHE_BYTES),
            l2: SliceCache::new(SLICE_BYTES, l2_cache_bytes),
            file: storage,
        };
        Ok(Self {
            mode,
            map,
            dirty_limit_bytes: l2_cache_bytes / 2,
            backing: header.backing.clone(),
            virtual_size_bytes: AtomicU64::new(header.virtual_size_bytes),
            reach_bytes: AtomicU64::new(header.virtual_size_bytes),
            header: RwLock::new(header),
            state: Mutex::default(),
            landed: Waiters::default(),
            tables: RwLock::new(None),
            halt: Halt::default(),
        })
    }

    /// The storage of the image file.
    pub(super) fn file(&self) -> &dyn Storage {
        &*self.map.file
    }

    /// The image file's name.
    pub(super) fn path(&self) -> &Path {
        self.map.file.path()
    }

    /// The header as it is in memory and on disk.
    pub(super) fn header(&self) -> RwLockReadGuard<'_, Header> {
        self.header.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts another backing file, or none, into the header.
    pub(super) fn record_backing(&self, backing: Option<&Backing>) -> Result<()> {
        let mut changed = self.header().clone();
        let name = changed.set_backing(backing)?;
        if let Some((at_bytes, name)) = name {
            // The name is durable, away from the old one, before the header leads to it.
            self.file().write_at(&name, at_bytes)?;
            self.file().flush(Flush::Data)?;
        }
        self.update_header(|header| *header = changed)
    }

    /// Changes the header and makes it durable. When that fails nobody can tell which header is on disk:
    /// nothing is written any more.
    pub(super) fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut header = self.header.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = header.clone();
        change(&mut changed);
        let written = changed.write(self.file()).and_then(|()| self.file().flush(Flush::Data));
        self.halt.or_halt(written)?;
        self.virtual_size_bytes.store(changed.virtual_size_bytes, Ordering::SeqCst);
        *header = changed;
        Ok(())
    }

    /// The state of the changing side.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Refuses when nothing may be written.
    pub(super) fn check_writable(&self) -> Result<()> {
        if !self.mode.writes() {
            return Err(Error::ReadOnly { file: self.path().to_owned() });
        }
        self.halt.check(self.path())
    }
}

/// The reference has no option for an opened image.
fn refuse_options(options: &OptionSet) -> Result<()> {
    match options.iter().next() {
        None => Ok(()),
        Some((name, _)) => {
            Err(Error::Invalid(format!("Block format 'qed' does not support the option '{name}'")))
        }
    }
}

/// Clears what a writer that does not know it must clear ("Header", `autoclear_features`), durably, before
/// anything else is changed.
fn forget_unknown_extras(storage: &dyn Storage, header: &mut Header) -> Result<()> {
    if header.autoclear_features == 0 {
        return Ok(());
    }
    header.autoclear_features = 0;
    header.write(storage)?;
    storage.flush(Flush::Data)
}

/// "Consistency checking": what a writer that did not come to its end left is made good before anything is
/// written. What cannot be made good must not be written to.
fn repair(storage: &dyn Storage, header: &mut Header) -> Result<()> {
    // Whoever left the image so may have been killed between a write and its flush: what is read here and not
    // durable may be gone after a power cut, and nothing may be built on it before.
    storage.flush(Flush::Data)?;
    let report = super::check::check(storage, header, Repair::All, &unwatched)?;
    if report.corruptions != 0 || report.check_errors != 0 {
        return Err(Error::Invalid("Could not repair dirty image".to_owned()));
    }
    Ok(())
}

impl Layer for QedLayer {
    fn driver(&self) -> &'static dyn Driver {
        &Qed
    }

    fn virtual_size_bytes(&self) -> u64 {
        self.virtual_size_bytes.load(Ordering::SeqCst)
    }

    fn cluster_size_bytes(&self) -> Option<u32> {
        Some(u32::try_from(self.map.geometry.cluster_bytes()).expect("at most 64 MiB"))
    }

    fn zeroes_in_place(&self) -> bool {
        true
    }

    fn file(&self, file: HostFile) -> Option<&Arc<dyn Storage>> {
        (file == HostFile::IMAGE).then_some(&self.map.file)
    }

    fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    fn has_sparse_data(&self) -> bool {
        false
    }

    fn details(&self) -> Result<Option<Value>> {
        Ok(None)
    }

    fn is_dirty(&self) -> bool {
        self.header().features & feature::NEED_CHECK != 0
    }

    fn map_range(&self, guest_bytes: Range<u64>, extents: &mut Vec<Extent>) -> Result<()> {
        self.map.map_range(guest_bytes, extents)
    }

    fn try_map_range(&self, guest_bytes: Range<u64>, found: &mut dyn FnMut(Extent)) -> Result<bool> {
        self.map.map_cached(guest_bytes, found)
    }

    fn map_changes(&self) -> Option<u64> {
        Some(self.map.levels().changes())
    }

    fn missing_table(&self, guest_bytes: Range<u64>) -> Option<MissingTable> {
        // What is wrong is met and told by who may wait.
        self.map.missing(guest_bytes).ok().flatten()
    }

    fn offer_table(&self, missing: &MissingTable, bytes: Box<[u8]>) -> bool {
        self.map.levels().offer(missing, bytes)
    }

    fn check_watched(
        &self,
        repair: Repair,
        _findings: &mut dyn FnMut(Finding),
        watch: &CheckWatch<'_>,
    ) -> Result<CheckReport> {
        // The audit looks at the file, not at what is cached of it.
        if self.mode == OpenMode::Write {
            self.settle()?;
        }
        let mut header = self.header.write().unwrap_or_else(PoisonError::into_inner);
        let report = super::check::check(self.file(), &mut header, repair, watch);
        if repair != Repair::Nothing {
            self.map.l1.clear();
            self.map.l2.clear();
            drop(header);
            self.forget_tables();
        }
        report
    }

    fn writer(&self) -> Option<&dyn LayerWriter> {
        (self.mode == OpenMode::Write).then_some(self as &dyn LayerWriter)
    }
}
