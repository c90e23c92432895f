//! An opened qcow2 image: what all rooms share, and the [`Layer`] that the rest of the library sees.

use std::{
    fmt,
    ops::Range,
    path::Path,
    sync::{Arc, OnceLock, PoisonError, TryLockError},
};

use serde_json::Value;

use super::{
    Qcow2,
    alloc::State,
    bitmap_track::Tracking,
    feature::{compatible, incompatible},
    geometry::Geometry,
    header::{CryptMethod, Header},
    lease::Epochs,
    map::{DATA_FILE, Root, TableMap},
    overlap::{Kind, Places},
    runtime::Runtime,
};
use crate::{
    Error, Result,
    format::{
        Backing, Bitmaps, CheckReport, CheckWatch, Codec, Driver, Extent, Finding, HostFile, HostOffset,
        HostUse, Layer, LayerWriter, LeaseToken, MissingTable, OpenContext, OpenMode, Repair, Snapshots,
        halt::Halt,
        table_cache::{SliceCache, lock},
        waiters::Waiters,
    },
    storage::{Flush, Storage},
    sync::{
        Mutex, MutexGuard, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// An opened image.
///
/// Lock order: `state`, `tracking`, `header_turn`, `header`, `places`, then those inside the caches. Readers of the map
/// take none of the first.
pub(super) struct Qcow2Layer {
    pub(super) mode: OpenMode,
    pub(super) geometry: Geometry,
    pub(super) runtime: Runtime,
    backing: Option<Backing>,
    pub(super) data_file: Option<Arc<dyn Storage>>,
    header: RwLock<Header>,
    /// Grows whenever `header` changes; see [`Layer::map_changes`].
    header_changes: AtomicU64,
    /// Held by who changes the header, on disk and then in memory; who reads it does not wait for the disk.
    header_turn: Mutex<()>,
    virtual_size_bytes: AtomicU64,
    pub(super) map: TableMap,
    pub(super) refcount_table: SliceCache,
    pub(super) refcount_blocks: SliceCache,
    pub(super) epochs: Epochs,
    state: Mutex<State>,
    /// A prepared write, or a drain, has ended.
    pub(super) landed: Waiters,
    pub(super) places: RwLock<Places>,
    /// How many are zeroing a raw data file: see [`super::zero`].
    pub(super) zeroing: AtomicU64,
    /// Whether `places` has been filled.
    pub(super) places_known: AtomicBool,
    /// Nothing is written any more: the image turned out to be corrupt.
    broken: AtomicBool,
    /// Whether anything is written any more.
    pub(super) halt: Halt,
    /// Tables end here at the latest; see [`TableMap::end_bytes`].
    pub(super) end_bytes: Arc<AtomicU64>,
    has_sparse_data: OnceLock<bool>,
    /// The bitmaps that are kept in memory while the disk changes.
    pub(super) tracking: Tracking,
}

impl fmt::Debug for Qcow2Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2Layer")
            .field("file", &self.path())
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

/// The bound of what is kept of L1 and of the refcount table: their own limits, so that nothing of them
/// is read twice.
const TOP_TABLE_BYTES: u64 = 32 << 20;

impl Qcow2Layer {
    /// Opens the image on `storage`.
    pub(super) fn open(storage: Arc<dyn Storage>, context: &OpenContext<'_>) -> Result<Self> {
        let header = Header::read(&*storage, context.mode)?;
        let geometry = header.geometry;
        if matches!(context.mode, OpenMode::Read | OpenMode::Write) {
            // As the reference, which uses no image whose lists cannot be read, and tells of it and audits it.
            super::snapshot_table::check_table(&*storage, &header)?;
            if let Some(extension) = header.bitmaps {
                super::bitmap::read_directory(&*storage, geometry, extension)?;
            }
        }
        let runtime = Runtime::parse(context.options, geometry)?;
        let data_file = match (&header.data_file, context.mode) {
            (_, OpenMode::Inspect) => None,
            (Some(name), mode) if geometry.external_data => Some((context.open_file)(name, mode)?),
            (None, _) if geometry.external_data => {
                return Err(Error::Invalid("'data-file' is required for this image".to_owned()));
            }
            _ => None,
        };
        let layer = Self::assemble(context.mode, storage, header, runtime, data_file)?;
        if context.mode == OpenMode::Write {
            layer.make_writable()?;
        }
        Ok(layer)
    }

    /// The external data file, where it has one with a name.
    pub(super) fn data_file_name(&self) -> Option<String> {
        self.header().data_file.clone().filter(|_| self.geometry.external_data)
    }

    /// A layer with empty caches.
    pub(super) fn assemble(
        mode: OpenMode,
        storage: Arc<dyn Storage>,
        header: Header,
        runtime: Runtime,
        data_file: Option<Arc<dyn Storage>>,
    ) -> Result<Self> {
        let geometry = header.geometry;
        let end_bytes = Arc::new(AtomicU64::new(storage.len_bytes()?));
        Ok(Self {
            mode,
            geometry,
            backing: header.backing.clone(),
            data_file,
            virtual_size_bytes: AtomicU64::new(header.virtual_size_bytes),
            map: TableMap {
                file: storage,
                geometry,
                codec: header.compression,
                l1: SliceCache::new(runtime.slice_bytes, TOP_TABLE_BYTES),
                l2: SliceCache::new(runtime.l2_slice_bytes, runtime.l2_cache_bytes),
                end_bytes: Arc::clone(&end_bytes),
            },
            refcount_table: SliceCache::new(runtime.slice_bytes, TOP_TABLE_BYTES),
            refcount_blocks: SliceCache::new(runtime.slice_bytes, runtime.refcount_cache_bytes),
            epochs: Epochs::default(),
            state: Mutex::default(),
            landed: Waiters::default(),
            places: RwLock::new(Places::new(geometry, runtime.overlap)),
            zeroing: AtomicU64::new(0),
            places_known: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            halt: Halt::default(),
            end_bytes,
            has_sparse_data: OnceLock::new(),
            tracking: Tracking::default(),
            header_changes: AtomicU64::new(0),
            header_turn: Mutex::default(),
            runtime,
            header: RwLock::new(header),
        })
    }

    /// The steps before the first write: a corrupt image is refused, a dirty one repaired, and the autoclear
    /// bits of extensions that this build would let go stale are cleared.
    fn make_writable(&self) -> Result<()> {
        let (is_corrupt, is_dirty) = {
            let header = self.header();
            (header.incompatible & incompatible::CORRUPT != 0, header.incompatible & incompatible::DIRTY != 0)
        };
        if is_corrupt {
            return Err(Error::Invalid("qcow2: Image is corrupt; cannot be opened read/write".to_owned()));
        }
        if is_dirty {
            self.repair_dirty()?;
        }
        let mut prepared = self.header().clone();
        if prepared.prepare_for_writing() {
            self.update_header(|header| *header = prepared)?;
        }
        Ok(())
    }

    /// What a crash under lazy refcounts left: counts are made right again before anything is allocated.
    fn repair_dirty(&self) -> Result<()> {
        // Who left the image dirty may have been killed between a write and its flush: what is read here and
        // not durable may be gone after a power cut, and what it replaced must not be overwritten before.
        self.image_file().flush(Flush::Data)?;
        let mut header = self.header().clone();
        let report = super::check::repair_after_death(self.storage(), &mut header)?;
        if report.check_errors != 0 || report.corruptions != 0 {
            return Err(Error::Invalid("Could not repair dirty image".to_owned()));
        }
        self.reload()?;
        self.clear_dirty()
    }

    /// The storage of the image file.
    pub(super) fn image_file(&self) -> &dyn Storage {
        &*self.map.file
    }

    /// The storage of the image file.
    pub(super) fn storage(&self) -> &Arc<dyn Storage> {
        &self.map.file
    }

    /// The image file's name.
    pub(super) fn path(&self) -> &Path {
        self.map.file.path()
    }

    /// The header as it is in memory and on disk.
    pub(super) fn header(&self) -> RwLockReadGuard<'_, Header> {
        self.header.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the header and makes it durable. When that fails nobody can tell which header is on disk, and
    /// what would be written by the one in memory might be lost: nothing is written any more.
    pub(super) fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let _turn = lock(&self.header_turn);
        let mut changed = self.header().clone();
        change(&mut changed);
        let written = changed.write(self.image_file()).and_then(|()| self.image_file().flush(Flush::Data));
        self.or_halt(written)?;
        self.replace_header(changed);
        Ok(())
    }

    /// Sets the dirty bit, durably, unless it is set.
    pub(super) fn set_dirty(&self) -> Result<()> {
        if self.header().incompatible & incompatible::DIRTY == 0 {
            self.update_header(|header| header.incompatible |= incompatible::DIRTY)?;
        }
        Ok(())
    }

    /// Clears the dirty bit if it is set. Everything else is durable already.
    pub(super) fn clear_dirty(&self) -> Result<()> {
        if self.header().incompatible & incompatible::DIRTY != 0 {
            self.update_header(|header| header.incompatible &= !incompatible::DIRTY)?;
        }
        Ok(())
    }

    /// Whether refcounts may lag behind, the dirty bit being set.
    pub(super) fn is_lazy(&self) -> bool {
        let lazy = self.header().compatible & compatible::LAZY_REFCOUNTS != 0;
        self.geometry.version >= 3 && self.runtime.lazy_refcounts.unwrap_or(lazy)
    }

    /// The state of the changing side.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The state, when nobody holds it.
    pub(super) fn try_state(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The active L1 table.
    pub(super) fn root(&self) -> Root {
        let header = self.header();
        Root {
            l1_offset: header.l1_offset,
            l1_entries: u64::from(header.l1_entries),
            writable: self.mode == OpenMode::Write,
        }
    }

    /// Forgets all cached tables and reads the header again. Nothing may wait to be written.
    pub(super) fn reload(&self) -> Result<()> {
        let header = Header::read(self.image_file(), self.mode)?;
        let mut state = self.quiet_state();
        self.map.l1.clear();
        self.map.l2.clear();
        self.refcount_table.clear();
        self.refcount_blocks.clear();
        *state = State::default();
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        *places = Places::new(self.geometry, self.runtime.overlap);
        self.places_known.store(false, Ordering::SeqCst);
        self.end_bytes.store(self.image_file().len_bytes()?, Ordering::Relaxed);
        self.replace_header(header);
        Ok(())
    }

    /// Makes a header that is on disk the one in memory.
    fn replace_header(&self, header: Header) {
        self.virtual_size_bytes.store(header.virtual_size_bytes, Ordering::SeqCst);
        let mut present = self.header.write().unwrap_or_else(PoisonError::into_inner);
        self.header_changes.fetch_add(1, Ordering::SeqCst);
        *present = header;
    }

    /// See [`Halt::is_halted`].
    pub(super) fn is_halted(&self) -> bool {
        self.halt.is_halted()
    }

    /// See [`Halt::or_halt`].
    pub(super) fn or_halt<T>(&self, result: Result<T>) -> Result<T> {
        self.halt.or_halt(result)
    }

    /// Refuses when nothing may be written.
    pub(super) fn check_writable(&self) -> Result<()> {
        if !self.mode.writes() {
            return Err(Error::ReadOnly { file: self.path().to_owned() });
        }
        self.halt.check(self.path())?;
        if self.broken.load(Ordering::SeqCst) {
            return Err(Error::corrupt(
                self.path(),
                "image",
                0,
                "no corruption met since it was opened",
                "one that stopped all writing",
            ));
        }
        Ok(())
    }

    /// Passes a result on; if it says that the image is corrupt, and the image is being written, marks the
    /// image and stops writing.
    pub(super) fn guard<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(Error::Corrupt { .. } | Error::Overlap { .. }) = &result
            && self.mode == OpenMode::Write
            && !self.broken.swap(true, Ordering::SeqCst)
            && self.geometry.version >= 3
        {
            self.update_header(|header| header.incompatible |= incompatible::CORRUPT)?;
        }
        result
    }

    /// Refuses a write to `host` that would damage a structure of another kind than `own`.
    pub(super) fn check_overlap(&self, host: &Range<u64>, own: Option<Kind>) -> Result<()> {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        self.check_overlap_with(&places, host, own)
    }

    /// [`Self::check_overlap`] for who looks at the places anyway.
    pub(super) fn check_overlap_with(
        &self,
        places: &Places,
        host: &Range<u64>,
        own: Option<Kind>,
    ) -> Result<()> {
        if host.is_empty() {
            // The table of a disk without a byte: it stands nowhere, whatever place the header gives it.
            return Ok(());
        }
        let hit = if host.start < self.geometry.cluster_bytes() && own != Some(Kind::MainHeader) {
            Some("qcow2_header")
        } else {
            places.hit(host, own)
        };
        match hit {
            None => Ok(()),
            Some(structure) => Err(Error::Overlap {
                file: self.path().to_owned(),
                structure,
                at_bytes: host.start,
                length_bytes: host.end - host.start,
            }),
        }
    }
}

impl Layer for Qcow2Layer {
    fn driver(&self) -> &'static dyn Driver {
        &Qcow2
    }

    fn virtual_size_bytes(&self) -> u64 {
        self.virtual_size_bytes.load(Ordering::SeqCst)
    }

    fn cluster_size_bytes(&self) -> Option<u32> {
        Some(u32::try_from(self.geometry.cluster_bytes()).expect("at most 2 MiB"))
    }

    fn file(&self, file: HostFile) -> Option<&Arc<dyn Storage>> {
        match file {
            HostFile::IMAGE => Some(self.storage()),
            DATA_FILE => self.data_file.as_ref(),
            _ => None,
        }
    }

    fn compression(&self) -> Option<Codec> {
        (!self.geometry.external_data).then_some(self.map.codec)
    }

    fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    fn has_sparse_data(&self) -> bool {
        // It only decides how closely holes are looked at: counts that cannot be read decide nothing.
        *self.has_sparse_data.get_or_init(|| self.is_preallocated().unwrap_or(false))
    }

    fn details(&self) -> Result<Option<Value>> {
        super::details::details(self.image_file(), &self.header()).map(Some)
    }

    fn is_dirty(&self) -> bool {
        self.header().incompatible & incompatible::DIRTY != 0
    }

    fn is_marked_corrupt(&self) -> bool {
        self.header().is(incompatible::CORRUPT)
    }

    fn encryption(&self) -> Option<&'static str> {
        match self.header().crypt_method {
            CryptMethod::None => None,
            CryptMethod::Aes => Some("aes"),
            CryptMethod::Luks => Some("luks"),
        }
    }

    /// Clusters are given up by discards, zero writes and snapshots, and given out again.
    fn reuses_places(&self) -> bool {
        self.writer().is_some()
    }

    fn begin_lease(&self) -> LeaseToken {
        LeaseToken(self.epochs.pin().into_epoch())
    }

    fn end_lease(&self, token: LeaseToken) {
        self.epochs.unpin(token.0);
    }

    fn map_range(&self, guest_bytes: Range<u64>, extents: &mut Vec<Extent>) -> Result<()> {
        // No table that the walk is in may become something else meanwhile.
        let _pin = self.epochs.pin();
        self.guard(self.map.map_range(self.root(), guest_bytes, extents))
    }

    fn try_map_range(&self, guest_bytes: Range<u64>, found: &mut dyn FnMut(Extent)) -> Result<bool> {
        self.map.map_cached(self.root(), guest_bytes, found)
    }

    fn map_changes(&self) -> Option<u64> {
        Some(self.map.levels().changes().wrapping_add(self.header_changes.load(Ordering::SeqCst)))
    }

    fn missing_table(&self, guest_bytes: Range<u64>) -> Option<MissingTable> {
        // What is wrong is met and told by who may wait.
        self.map.missing(self.root(), guest_bytes).ok().flatten()
    }

    fn offer_table(&self, missing: &MissingTable, bytes: Box<[u8]>) -> bool {
        self.map.levels().offer(missing, bytes)
    }

    fn kept_behind(&self, guest_bytes: Range<u64>) -> Result<(u64, Option<(HostFile, HostOffset)>)> {
        if !self.geometry.extended_l2 {
            return Ok((guest_bytes.end - guest_bytes.start, None));
        }
        let _pin = self.epochs.pin();
        let (end, kept) = self.guard(self.map.kept_behind(self.root(), &guest_bytes))?;
        Ok((end - guest_bytes.start, kept))
    }

    fn check_watched(
        &self,
        repair: Repair,
        findings: &mut dyn FnMut(Finding),
        watch: &CheckWatch<'_>,
    ) -> Result<CheckReport> {
        // The audit looks at the file, not at what is cached of it, lazy counts included.
        if self.mode == OpenMode::Write {
            self.guard(self.settle())?;
        } else {
            self.drain()?;
        }
        let mut header = self.header().clone();
        let report = super::check::check(self.storage(), &mut header, repair, findings, watch);
        if repair != Repair::Nothing {
            self.reload()?;
        }
        report
    }

    fn host_uses(&self, visit: &mut dyn FnMut(HostUse, Range<u64>)) -> Result<bool> {
        self.visit_uses(visit).map(|()| true)
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        (self.geometry.version >= 3).then_some(self)
    }

    fn writer(&self) -> Option<&dyn LayerWriter> {
        (self.mode == OpenMode::Write).then_some(self as &dyn LayerWriter)
    }
}
