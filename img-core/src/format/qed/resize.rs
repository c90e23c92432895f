//! Changing the virtual size: the header's field, nothing else. Tables for what is new are made when it is
//! written.
//!
//! Growing: (1) data behind the old end, which no writer of this format leaves, is made zero, and the image
//! above makes zero what would show of a backing file, drain; (2) the size in the header, sync.

use std::sync::atomic::Ordering;

use super::{header::SECTOR_BYTES, layer::QedLayer};
use crate::{Error, Result, format::Layer, storage::Preallocation};

impl QedLayer {
    /// What precedes growing to `bytes`: the map answers so far, and holds no data behind the end of the disk but
    /// in the last cluster.
    pub(super) fn reach_behind(&self, bytes: u64) -> Result<()> {
        self.check_new_size(bytes)?;
        self.reach_to(bytes)?;
        let end = self.virtual_size_bytes().next_multiple_of(self.map.geometry.cluster_bytes());
        if end >= bytes {
            return Ok(());
        }
        for host in self.places(&(end..bytes))? {
            self.check_overlap(&host)?;
            self.file().write_zeroes(host, true)?;
        }
        Ok(())
    }

    /// Grows the disk.
    pub(super) fn change_size(&self, bytes: u64, preallocation: Preallocation) -> Result<()> {
        let refuse = |text: &str| Err(Error::Invalid(text.to_owned()));
        match preallocation {
            Preallocation::Off => {}
            Preallocation::Falloc => return refuse("Unsupported preallocation mode 'falloc'"),
            Preallocation::Full => return refuse("Unsupported preallocation mode 'full'"),
        }
        self.check_new_size(bytes)?;
        self.reach_to(bytes)?;
        // (1)
        self.drain()?;
        // (2)
        self.update_header(|header| header.virtual_size_bytes = bytes)
    }

    fn check_new_size(&self, bytes: u64) -> Result<()> {
        self.check_writable()?;
        let most = self.map.geometry.max_virtual_bytes();
        if !bytes.is_multiple_of(SECTOR_BYTES) || i64::try_from(bytes).is_err() || u128::from(bytes) > most {
            return Err(Error::Invalid("Invalid image size specified".to_owned()));
        }
        if bytes < self.virtual_size_bytes() {
            return Err(Error::Invalid("Shrinking images is currently not supported".to_owned()));
        }
        Ok(())
    }

    /// Tables that count for a disk of `bytes`, and did not before, are looked at.
    fn reach_to(&self, bytes: u64) -> Result<()> {
        if self.reach_bytes.fetch_max(bytes, Ordering::SeqCst) < bytes {
            // They are looked for in the file.
            self.drain()?;
            self.forget_tables();
        }
        self.know_tables()
    }
}
