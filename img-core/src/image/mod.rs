//! What users hold: an opened chain of layers, read and written as one disk.

mod name;
mod open;

pub use name::ImageName;
pub use open::{CacheMode, OpenOptions, Warning};

use std::{ops::Range, sync::Arc};

use crate::{
    Result,
    format::{CheckReport, Finding, Layer, Place, Repair},
    storage::Preallocation,
};

/// The deepest chain that is opened: far beyond what people build, far below what exhausts descriptors.
pub const MAX_CHAIN_DEPTH: usize = 1000;

/// An opened disk: a top layer and all layers below it. Shared by many threads.
#[derive(Debug)]
pub struct Image {
    layers: Vec<Arc<dyn Layer>>,
}

/// A run of guest bytes and the layer that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageExtent {
    /// First guest byte.
    pub guest_offset: u64,
    /// How many.
    pub len_bytes: u64,
    /// Index into [`Image::layers`] of the layer that answers; the top is 0. For `Unallocated`, see `place`.
    pub depth: usize,
    /// Where in that layer. [`Place::Unallocated`] when no layer says anything (reads as zeroes).
    pub place: Place,
}

impl Image {
    /// Opens the disk called `name` with its chain.
    pub fn open(name: &ImageName, options: &OpenOptions) -> Result<Self> {
        open::open(name, options)
    }

    /// Like [`Self::open`], from an internal snapshot of the top layer, read-only.
    pub fn open_snapshot(name: &ImageName, options: &OpenOptions, id_or_name: &str) -> Result<Self> {
        let _ = (name, options, id_or_name);
        todo!()
    }

    /// A disk of layers that the caller opened, top first: images in memory, for tests and fuzzers.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) without any layer.
    pub fn from_layers(layers: Vec<Arc<dyn Layer>>) -> Result<Self> {
        if layers.is_empty() {
            return Err(crate::Error::Invalid("a disk has at least one layer".to_owned()));
        }
        Ok(Self { layers })
    }

    /// The layers, top first.
    #[must_use]
    pub fn layers(&self) -> &[Arc<dyn Layer>] {
        &self.layers
    }

    /// What was worth a warning at open, for the caller to print.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        todo!()
    }

    /// Guest-visible size.
    #[must_use]
    pub fn virtual_size_bytes(&self) -> u64 {
        self.layers[0].virtual_size_bytes()
    }

    /// Fills `buf` with guest bytes. The range lies inside the disk.
    pub fn read_at(&self, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let _ = (buf, guest_offset);
        todo!()
    }

    /// Writes guest bytes. The range lies inside the disk.
    pub fn write_at(&self, buf: &[u8], guest_offset: u64) -> Result<()> {
        let _ = (buf, guest_offset);
        todo!()
    }

    /// Stores the compressed form of one whole cluster (shorter only at the end of the disk).
    pub fn write_compressed(&self, stored: &[u8], guest_offset: u64) -> Result<()> {
        let _ = (stored, guest_offset);
        todo!()
    }

    /// Makes a range read as zeroes; with `may_unmap` its space may be given back.
    pub fn write_zeroes(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<()> {
        let _ = (guest_bytes, may_unmap);
        todo!()
    }

    /// Gives space back where whole clusters are covered; what is not covered stays as it is.
    pub fn discard(&self, guest_bytes: Range<u64>) -> Result<()> {
        let _ = guest_bytes;
        todo!()
    }

    /// The extents that cover `guest_bytes`, merged over all layers, appended to `extents`.
    pub fn map_range(&self, guest_bytes: Range<u64>, extents: &mut Vec<ImageExtent>) -> Result<()> {
        let _ = (guest_bytes, extents);
        todo!()
    }

    /// Makes everything written durable.
    pub fn flush(&self) -> Result<()> {
        todo!()
    }

    /// Changes the guest-visible size; what is new reads as zeroes even over a longer backing file.
    pub fn resize(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        let _ = (virtual_size_bytes, preallocation);
        todo!()
    }

    /// Takes, applies and deletes internal snapshots with all requests drained.
    pub fn snapshot_create(&self, name: &str, date: (u32, u32)) -> Result<()> {
        let _ = (name, date);
        todo!()
    }

    /// See [`Self::snapshot_create`].
    pub fn snapshot_apply(&self, id_or_name: &str) -> Result<()> {
        let _ = id_or_name;
        todo!()
    }

    /// See [`Self::snapshot_create`].
    pub fn snapshot_delete(&self, id_or_name: &str) -> Result<()> {
        let _ = id_or_name;
        todo!()
    }

    /// Audits the top layer; see [`Layer::check`].
    pub fn check(&self, repair: Repair, findings: &mut dyn FnMut(Finding)) -> Result<CheckReport> {
        self.layers[0].check(repair, findings)
    }

    /// Flushes and marks the image clean. An image that is dropped instead is as after a crash: nothing
    /// flushed is lost, nothing else is promised.
    pub fn close(self) -> Result<()> {
        todo!()
    }
}
