//! Changing the virtual size: the header's field, nothing else. Tables for what is new are made when it is
//! written.

use super::{header::SECTOR_BYTES, layer::QedLayer};
use crate::{Error, Result, format::Layer, storage::Preallocation};

impl QedLayer {
    /// Grows the disk. The caller sees to it that what is new reads as zeroes.
    pub(super) fn change_size(&self, bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.check_writable()?;
        let refuse = |text: String| Err(Error::Invalid(text));
        match preallocation {
            Preallocation::Off => {}
            Preallocation::Falloc => return refuse("Unsupported preallocation mode 'falloc'".to_owned()),
            Preallocation::Full => return refuse("Unsupported preallocation mode 'full'".to_owned()),
        }
        let most = self.map.geometry.max_virtual_bytes();
        if !bytes.is_multiple_of(SECTOR_BYTES) || i64::try_from(bytes).is_err() || u128::from(bytes) > most {
            return refuse("Invalid image size specified".to_owned());
        }
        if bytes < self.virtual_size_bytes() {
            return refuse("Shrinking images is currently not supported".to_owned());
        }
        // Tables that count from now on have not been looked at.
        self.drain()?;
        self.forget_tables();
        self.update_header(|header| header.virtual_size_bytes = bytes)
    }
}
