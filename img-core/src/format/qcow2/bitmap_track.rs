//! Keeping persistent bitmaps up to date while the disk changes.
//!
//! Before the first change of guest data the enabled bitmaps are read into memory and marked `in_use` in the
//! file, durably: a crash costs those bitmaps, and every reader knows it. From then on every change is noted in
//! memory, and [`close`](crate::format::LayerWriter::close) stores them (see `bitmap_store` for the order). A
//! change is noted when it is prepared: one that fails may have changed a part, and counts as the reference
//! counts it. A new size of the disk concerns disabled bitmaps as well, since their tables depend on it.
//!
//! What cannot be kept stays marked: a bitmap that was marked before or cannot be read, and those that would
//! take more memory than [`MAX_MAP_BYTES`](crate::format::MAX_MAP_BYTES) together.

use std::{ops::Range, sync::PoisonError};

use super::{
    alloc::State,
    bitmap::{Bitmap, mark_in_use},
    layer::Qcow2Layer,
};
use crate::{
    Error, Result,
    format::{BitmapInfo, Bitmaps, DirtyMap, Layer, NewBitmap},
    sync::{
        RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// The bitmaps in memory.
#[derive(Debug, Default)]
pub(super) struct Tracking {
    /// The enabled bitmaps are marked in the file, and in memory if they can be kept.
    begun: AtomicBool,
    /// There is something to note changes in.
    is_wanted: AtomicBool,
    maps: RwLock<Vec<Tracked>>,
}

#[derive(Debug)]
struct Tracked {
    name: String,
    enabled: bool,
    map: DirtyMap,
}

/// Which bitmaps a change of the image concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Concerned {
    /// Those that must reflect all changes of guest data.
    Enabled,
    /// All of them.
    All,
}

impl Tracking {
    fn read(&self) -> crate::sync::RwLockReadGuard<'_, Vec<Tracked>> {
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> crate::sync::RwLockWriteGuard<'_, Vec<Tracked>> {
        self.maps.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Qcow2Layer {
    /// To be called before guest data changes: the first time, enabled bitmaps are read and marked.
    pub(super) fn before_guest_change(&self) -> Result<()> {
        if self.tracking.begun.load(Ordering::Acquire) {
            return Ok(());
        }
        self.check_writable()?;
        // Whoever comes second must not go on before the marks are durable.
        let _state = self.state();
        if !self.tracking.begun.load(Ordering::Acquire) {
            self.begin_tracking(Concerned::Enabled)?;
            self.tracking.begun.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Notes a change of guest data, prepared or done.
    pub(super) fn note_change(&self, guest_bytes: &Range<u64>) {
        if !self.tracking.is_wanted.load(Ordering::Acquire) {
            return;
        }
        note(&self.tracking.read(), guest_bytes);
    }

    /// [`Self::before_guest_change`] and [`Self::note_change`] where neither has to wait; false, and nothing may be
    /// changed, where one has.
    pub(super) fn try_note_change(&self, guest_bytes: &Range<u64>) -> bool {
        if !self.tracking.begun.load(Ordering::Acquire) {
            return false;
        }
        if !self.tracking.is_wanted.load(Ordering::Acquire) {
            return true;
        }
        let Ok(maps) = self.tracking.maps.try_read() else { return false };
        note(&maps, guest_bytes);
        true
    }

    /// To be called before the disk gets another size: all bitmaps are read and marked.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a bitmap is inconsistent.
    pub(super) fn before_resize(&self) -> Result<()> {
        self.check_writable()?;
        let _state = self.state();
        let is_tracked = |bitmap: &Bitmap| self.tracking.read().iter().any(|map| map.name == bitmap.name);
        for bitmap in self.bitmap_directory()? {
            if !bitmap.is_usable() && !is_tracked(&bitmap) {
                return Err(inconsistent(&bitmap.name));
            }
        }
        self.begin_tracking(Concerned::All)?;
        self.tracking.begun.store(true, Ordering::Release);
        Ok(())
    }

    /// To be called when the disk has got another size, or not. New bytes are not noted as changed.
    pub(super) fn after_resize(&self) {
        let bytes = self.virtual_size_bytes();
        // One that the new disk is too big for stays as it is, of the wrong size, and is not stored.
        self.tracking.write().retain_mut(|tracked| tracked.map.resize(bytes).is_ok());
    }

    /// Reads the bitmaps concerned, and then marks them. The caller holds the state.
    fn begin_tracking(&self, concerned: Concerned) -> Result<()> {
        let directory = self.bitmap_directory()?;
        let wanted = |bitmap: &Bitmap| bitmap.is_auto() || concerned == Concerned::All;
        let mut maps = self.tracking.write();
        let room = maps.first().map_or_else(DirtyMap::room, |tracked| tracked.map.shared_room());
        for bitmap in directory.iter().filter(|bitmap| bitmap.is_usable() && wanted(bitmap)) {
            if maps.iter().any(|tracked| tracked.name == bitmap.name) {
                continue;
            }
            match self.read_bits(bitmap, &room) {
                Ok(map) => {
                    let (name, enabled) = (bitmap.name.clone(), bitmap.is_auto());
                    maps.push(Tracked { name, enabled, map });
                }
                // Its mark will say that it is lost.
                Err(Error::Corrupt { .. } | Error::Invalid(_)) => {}
                Err(error) => return Err(error),
            }
        }
        mark_in_use(self.image_file(), &directory, wanted)?;
        self.tracking.is_wanted.store(maps.iter().any(|tracked| tracked.enabled), Ordering::Release);
        Ok(())
    }

    /// Stores what was kept, and ends keeping it.
    pub(super) fn store_tracked(&self, state: &mut State) -> Result<()> {
        self.store_with(state, &[], None)
    }

    /// Stores what was kept and `more`, without `removed`. The next change begins anew; after a failure
    /// keeping goes on as it was.
    fn store_with(&self, state: &mut State, more: &[NewBitmap<'_>], removed: Option<&str>) -> Result<()> {
        let mut maps = self.tracking.write();
        let is_kept = |tracked: &&Tracked| {
            let is_replaced = more.iter().any(|put| put.name == tracked.name);
            let is_whole = !tracked.map.is_incomplete()
                && tracked.map.disk_bytes() == self.virtual_size_bytes()
                && self.bitmap_table_entries(&tracked.map).is_some();
            is_whole && !is_replaced && removed != Some(&tracked.name)
        };
        let mut puts: Vec<NewBitmap<'_>> = maps
            .iter()
            .filter(is_kept)
            .map(|Tracked { name, enabled, map }| NewBitmap { name, enabled: *enabled, map })
            .collect();
        puts.extend_from_slice(more);
        if !puts.is_empty() || removed.is_some() {
            self.rewrite_bitmaps(state, &puts, removed)?;
        }
        maps.clear();
        self.tracking.is_wanted.store(false, Ordering::Release);
        self.tracking.begun.store(false, Ordering::Release);
        Ok(())
    }

    /// A change of the bitmaps themselves, durable when it returns.
    fn change_bitmaps(&self, more: &[NewBitmap<'_>], removed: Option<&str>) -> Result<()> {
        self.check_writable()?;
        let mut state = self.quiet_state();
        let result = self.store_with(&mut state, more, removed).and_then(|()| self.drain_locked(&mut state));
        self.guard(result)
    }
}

/// Adds a changed range to the enabled maps.
fn note(maps: &[Tracked], guest_bytes: &Range<u64>) {
    for tracked in maps.iter().filter(|tracked| tracked.enabled) {
        // A map without room remembers it, and is not stored.
        tracked.map.set(guest_bytes.clone()).ok();
    }
}

fn inconsistent(name: &str) -> Error {
    Error::Invalid(format!(
        "Bitmap '{name}' is inconsistent and cannot be used\n\
         Try block-dirty-bitmap-remove to delete this bitmap from disk"
    ))
}

fn not_found(name: &str) -> Error {
    Error::Invalid(format!("Dirty bitmap '{name}' not found"))
}

impl Bitmaps for Qcow2Layer {
    fn list(&self) -> Result<Vec<BitmapInfo>> {
        let directory = self.bitmap_directory()?;
        let maps = self.tracking.read();
        let info = |bitmap: Bitmap| BitmapInfo {
            granularity_bytes: bitmap.granularity_bytes(),
            enabled: bitmap.is_auto(),
            inconsistent: !bitmap.is_usable() && !maps.iter().any(|tracked| tracked.name == bitmap.name),
            name: bitmap.name,
        };
        Ok(directory.into_iter().map(info).collect())
    }

    fn read(&self, name: &str) -> Result<DirtyMap> {
        if let Some(tracked) = self.tracking.read().iter().find(|tracked| tracked.name == name) {
            let copy = DirtyMap::new(tracked.map.disk_bytes(), tracked.map.granularity_bytes())?;
            copy.merge(&tracked.map)?;
            return if tracked.map.is_incomplete() { Err(inconsistent(name)) } else { Ok(copy) };
        }
        let directory = self.bitmap_directory()?;
        let bitmap = directory.iter().find(|bitmap| bitmap.name == name).ok_or_else(|| not_found(name))?;
        if bitmap.is_usable() { self.read_bits(bitmap, &DirtyMap::room()) } else { Err(inconsistent(name)) }
    }

    fn store(&self, bitmaps: &[NewBitmap<'_>]) -> Result<()> {
        self.change_bitmaps(bitmaps, None)
    }

    fn remove(&self, name: &str) -> Result<()> {
        if !self.bitmap_directory()?.iter().any(|bitmap| bitmap.name == name) {
            return Err(not_found(name));
        }
        self.change_bitmaps(&[], Some(name))
    }
}
