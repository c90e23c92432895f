//! What changes the place of an image in its chain: another backing file, and giving up all that it holds.

use std::ops::Range;

use super::{header::MAX_BACKING_NAME_BYTES, layer::Qcow2Layer};
use crate::{Error, Result, format::Backing, text};

impl Qcow2Layer {
    /// Puts another name, or none, into the header. Everything that was written before is durable before it: the
    /// header may only name a backing file that the clusters of this image stand on.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the name is too long, the header has no room, or the data file has to read as the
    /// guest does by itself.
    pub(super) fn record_backing(&self, backing: Option<&Backing>) -> Result<()> {
        self.check_writable()?;
        if let Some(backing) = backing {
            let name_bytes = text::to_bytes(&backing.name).len() as u64;
            if name_bytes > MAX_BACKING_NAME_BYTES || self.is_raw_data() {
                return Err(Error::Invalid("Invalid argument".to_owned()));
            }
        }
        let mut changed = self.header().clone();
        changed.backing = backing.cloned();
        if changed.encode().is_err() {
            return Err(Error::Invalid("No space left in the file header".to_owned()));
        }
        self.settle()?;
        self.update_header(|header| header.backing = backing.cloned())
    }

    /// Makes every cluster of the disk unallocated and cuts the file behind the last one that is left in use.
    /// Clusters are given up as in a discard: no order of the two sides of a reference differs from there.
    pub(super) fn forget_all(&self, guest: Range<u64>) -> Result<()> {
        if guest.is_empty() {
            return Ok(());
        }
        self.forget_range(guest)?;
        self.settle()?;
        self.cut_file()
    }
}
