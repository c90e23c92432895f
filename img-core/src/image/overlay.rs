//! Putting a new layer over an open disk: what a live external snapshot does.

use super::{Image, full_backing_name, protocol};
use crate::{
    Error, Result,
    format::{HostFile, Place},
    storage::lock::Use,
    text,
};

/// How much of a map is looked at together. Sizes are far enough below 2^64 for one more.
const LOOK_BYTES: usize = 1 << 30;

impl Image {
    /// The disk of `overlay`, which was opened alone for writing and holds nothing yet, over all layers of this one.
    /// This image's top is made durable, marked clean and shared with readers; from then on it is a layer below and
    /// nothing may change it, so nobody uses this `Image` any more unless the call fails.
    ///
    /// What a power cut leaves: the old disk with all its bytes, and beside it an overlay that stands on it.
    ///
    /// # Errors
    /// When the old top cannot be flushed; [`Error::Invalid`] when the overlay has another size, cannot be written, has
    /// layers of its own, or stands for itself: nothing of the disk would be seen any more.
    pub fn with_overlay(&self, overlay: Self) -> Result<Self> {
        let _alone = self.gate.drain();
        let refused = |why: String| Error::Invalid(format!("{}: {why}", overlay.names[0]));
        if overlay.layers.len() != 1 {
            return Err(refused("the overlay was opened with layers below it".to_owned()));
        }
        overlay.writer()?;
        let (old, new) = (self.virtual_size_bytes(), overlay.virtual_size_bytes());
        if old != new {
            return Err(refused(format!("the overlay is a disk of {new} bytes over one of {old}")));
        }
        if overlay.layers[0].backing().is_none() && !overlay.lets_through()? {
            let why = "nothing of the disk would show through it: it names no backing file, and reads as zeroes where \
                       nothing was written";
            return Err(refused(why.to_owned()));
        }
        // 1. the new layer's file, 2. all that was written to the old one: a flush of the new disk speaks for both.
        overlay.flush()?;
        if let Some(writer) = self.layers[0].writer() {
            writer.close()?;
        }
        for file in (0..).map_while(|number| self.layers[0].file(HostFile(number))) {
            file.lock(Use::Read)?;
        }
        let mut layers = overlay.layers.clone();
        layers.extend(self.layers.iter().cloned());
        let mut names = overlay.names.clone();
        names.extend(self.names.iter().cloned());
        Ok(Self { writes_through: self.writes_through, ..Self::over(layers, names) })
    }

    /// Whether what is below may show anywhere.
    fn lets_through(&self) -> Result<bool> {
        let size = self.virtual_size_bytes();
        let mut extents = Vec::new();
        for start in (0..size).step_by(LOOK_BYTES) {
            extents.clear();
            self.map_range(start..size.min(start + LOOK_BYTES as u64), &mut extents)?;
            if extents.iter().any(|extent| extent.place == Place::Unallocated) {
                return Ok(true);
            }
        }
        Ok(size == 0)
    }

    /// What a new image at the path `overlay` calls this one as its backing file: the name by which this one was
    /// opened, as the reference has it, where that leads here from the directory of `overlay` too. Elsewhere the
    /// reference's overlay would stand on nothing, or on another image; there it is the path from the root.
    ///
    /// # Errors
    /// When this image's file is no longer at its name.
    pub fn backing_name_for(&self, overlay: &str) -> Result<String> {
        let given = self.layer_name(0);
        let Some(file) = self.layers[0].file(HostFile::IMAGE).filter(|_| protocol(given).is_none()) else {
            return Ok(given.to_owned());
        };
        let path = file.path();
        let here = path.canonicalize().map_err(|error| Error::io(path, "find", error))?;
        let there = text::to_path(&full_backing_name(overlay, given)).canonicalize();
        let leads_here = there.is_ok_and(|there| there == here);
        Ok(if leads_here { given.to_owned() } else { text::from_path(&here) })
    }
}
