//! What changes the image as a whole, with all requests held back: size, snapshots, the end.

use std::{ops::Range, sync::Arc};

use super::Image;
use crate::{
    Error, Result,
    format::{Amended, Extent, HostFile, LayerWriter, OptionSet, Place, Snapshots},
    storage::{Preallocation, Watcher},
};

impl Image {
    /// Changes the guest-visible size; what is new reads as zeroes even over a longer backing file.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; when the format refuses the size, or the file cannot be changed.
    pub fn resize(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.change_size(virtual_size_bytes, |writer| writer.resize(virtual_size_bytes, preallocation))
    }

    /// Grows the disk as [`Self::resize`] does, and maps what is new without setting space aside for it.
    ///
    /// # Errors
    /// As [`Self::resize`]; [`Error::Invalid`] for formats without a map.
    pub fn grow_mapped(&self, virtual_size_bytes: u64) -> Result<()> {
        self.change_size(virtual_size_bytes, |writer| writer.grow_mapped(virtual_size_bytes))
    }

    /// From now on `watcher` is told of each piece that [`Preallocation::Full`] writes in [`Self::resize`], and may stop
    /// that: the disk keeps its old size then.
    pub fn watch_filling(&self, watcher: &Arc<dyn Watcher>) {
        for storage in (0..).map_while(|number| self.layers[0].file(HostFile(number))) {
            storage.watch_filling(watcher);
        }
    }

    /// Crash order of growing: (1) what the new size would show is made zero, durably; (2) the new size. A
    /// crash between the two leaves the old disk, with zeroes behind its end.
    fn change_size(&self, new: u64, change: impl FnOnce(&dyn LayerWriter) -> Result<()>) -> Result<()> {
        let _alone = self.gate.drain();
        let old = self.virtual_size_bytes();
        // (1) The layer makes it durable before the size.
        if new > old {
            self.hide(old..new)?;
        }
        // (2)
        change(self.writer()?)
    }

    /// Makes guest bytes behind the end of the disk read as zeroes when the disk grows over them: what a longer
    /// backing file has there, and what the last cluster holds from before an earlier shrink.
    fn hide(&self, grown: Range<u64>) -> Result<()> {
        // The backing file is as long as the layer directly under the top: what is further down does not show
        // through behind its end.
        let backing = self.layers.get(1).map_or(0, |layer| layer.virtual_size_bytes());
        let shown = grown.start..grown.end.min(backing);
        let writer = self.writer()?;
        if !writer.prepare_growth(grown.end)? {
            return if shown.is_empty() {
                Ok(())
            } else {
                // The reference's words.
                Err(Error::Invalid("Block driver does not support requested flags".to_owned()))
            };
        }
        let cluster = self.layers[0].cluster_size_bytes().map_or(1, u64::from);
        let tail = grown.start..up_to(grown.start, cluster).min(up_to(grown.end, cluster));
        let mut hidden = shown;
        if self.holds_data(&tail)? {
            hidden.end = hidden.end.max(tail.end);
        }
        if hidden.is_empty() {
            return Ok(());
        }
        self.zero_alone(hidden.start..up_to(hidden.end, writer.zero_granularity_bytes().max(1)))
    }

    /// Whether the top holds anything but zeroes in a range, which may lie behind the end.
    fn holds_data(&self, guest_bytes: &Range<u64>) -> Result<bool> {
        let mut extents: Vec<Extent> = Vec::new();
        if !guest_bytes.is_empty() {
            self.layers[0].map_range(guest_bytes.clone(), &mut extents)?;
        }
        let is_data = |extent: &Extent| !matches!(extent.place, Place::Zero { .. } | Place::Unallocated);
        Ok(extents.iter().any(is_data))
    }

    /// Goes on towards a top layer that has the options `wanted` as far as it can be gone with the image open;
    /// true when the image has to be dropped, not closed, and opened again for the rest.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; [`Error::Invalid`], in the reference's words, when an option cannot be changed so.
    pub fn amend(&self, wanted: &OptionSet, progress: &mut dyn FnMut(u64, u64)) -> Result<bool> {
        loop {
            let amended = {
                let _alone = self.gate.drain();
                self.decoded.begin_generation();
                self.writer()?.amend(wanted, progress)?
            };
            match amended {
                Amended::Complete => return Ok(false),
                Amended::OpenAgain => return Ok(true),
                Amended::Resize(bytes) => self.resize(bytes, Preallocation::Off)?,
            }
        }
    }

    /// Makes the top layer silent all over, so that the disk reads as the layers below, with all requests drained;
    /// false where its format cannot.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; when the image cannot be changed.
    pub fn make_empty(&self) -> Result<bool> {
        let _alone = self.gate.drain();
        self.decoded.begin_generation();
        self.writer()?.make_empty()
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

/// The next multiple of `unit`, itself included.
fn up_to(bytes: u64, unit: u64) -> u64 {
    bytes.checked_next_multiple_of(unit).unwrap_or(u64::MAX)
}
