//! What changes the image as a whole, with all requests held back: size, snapshots, the end.

use std::ops::Range;

use super::Image;
use crate::{
    Error, Result,
    format::{Extent, HostFile, LayerWriter, Place, Snapshots},
    storage::Preallocation,
};

impl Image {
    /// Changes the guest-visible size; what is new reads as zeroes even over a longer backing file.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; when the format refuses the size, or the file cannot be changed.
    pub fn resize(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.change_size(|writer| writer.resize(virtual_size_bytes, preallocation))
    }

    /// Grows the disk as [`Self::resize`] does, and maps what is new without setting space aside for it.
    ///
    /// # Errors
    /// As [`Self::resize`]; [`Error::Invalid`] for formats without a map.
    pub fn grow_mapped(&self, virtual_size_bytes: u64) -> Result<()> {
        self.change_size(|writer| writer.grow_mapped(virtual_size_bytes))
    }

    fn change_size(&self, change: impl FnOnce(&dyn LayerWriter) -> Result<()>) -> Result<()> {
        let _alone = self.gate.drain();
        let old = self.virtual_size_bytes();
        change(self.writer()?)?;
        let new = self.virtual_size_bytes();
        if new <= old {
            return Ok(());
        }
        self.clear_old_tail(old..new)?;
        // The backing file below is as long as the layer directly under the top: what is further down does
        // not show through behind its end.
        let backing = self.layers.get(1).map_or(0, |layer| layer.virtual_size_bytes());
        self.hide_backing(old..new.min(backing))
    }

    /// The last cluster of the old size may hold bytes from before an earlier shrink.
    fn clear_old_tail(&self, grown: Range<u64>) -> Result<()> {
        let granule = self.writer()?.zero_granularity_bytes().max(1);
        let Some(granule_end) = grown.start.checked_next_multiple_of(granule) else { return Ok(()) };
        let tail = grown.start..granule_end.min(grown.end);
        if tail.is_empty() {
            return Ok(());
        }
        let mut extents: Vec<Extent> = Vec::new();
        self.layers[0].map_range(tail.clone(), &mut extents)?;
        if extents.iter().all(|extent| matches!(extent.place, Place::Zero { .. } | Place::Unallocated)) {
            return Ok(());
        }
        self.zero_alone(tail)
    }

    /// Makes what the top does not hold read as zeroes.
    fn hide_backing(&self, grown: Range<u64>) -> Result<()> {
        if grown.is_empty() { Ok(()) } else { self.zero_alone(grown) }
    }

    /// Takes an internal snapshot with all requests drained. `date` is in seconds and nanoseconds since 1970.
    ///
    /// # Errors
    /// When the format has none, or the image cannot be changed.
    pub fn snapshot_create(&self, name: &str, date: (u32, u32)) -> Result<()> {
        let _alone = self.gate.drain();
        self.snapshots_to_change()?.create(name, date)
    }

    /// Makes the disk as it was when the snapshot was taken. See [`Self::snapshot_create`].
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`], and as [`Self::snapshot_create`].
    pub fn snapshot_apply(&self, id_or_name: &str) -> Result<()> {
        let _alone = self.gate.drain();
        self.decoded.begin_generation();
        self.snapshots_to_change()?.apply(id_or_name)
    }

    /// Forgets a snapshot. See [`Self::snapshot_create`].
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`], and as [`Self::snapshot_create`].
    pub fn snapshot_delete(&self, id_or_name: &str) -> Result<()> {
        let _alone = self.gate.drain();
        self.snapshots_to_change()?.delete(id_or_name)
    }

    fn snapshots_to_change(&self) -> Result<&dyn Snapshots> {
        self.writer()?;
        let top = &self.layers[0];
        top.snapshots().ok_or_else(|| {
            let feature = format_args!("internal snapshots of {} images", top.driver().name()).to_string();
            match top.file(HostFile::IMAGE) {
                Some(file) => Error::unsupported(file.path(), feature),
                None => Error::Invalid(format!("{feature} are not supported")),
            }
        })
    }

    /// Flushes and marks the image clean. An image that is dropped instead is as after a crash: nothing
    /// flushed is lost, nothing else is promised.
    ///
    /// # Errors
    /// When metadata or data cannot be written or flushed.
    pub fn close(self) -> Result<()> {
        let _alone = self.gate.drain();
        self.layers[0].writer().map_or(Ok(()), |writer| writer.close())
    }
}
