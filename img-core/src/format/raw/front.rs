//! Raw to a pipe: every byte of the disk, zeroes written out.

use crate::{
    Result,
    format::{FILE_OPTIONS, FrontRequest, FrontWriter},
    storage::Pipe,
};

/// As much as a pipe takes at once.
const UNIT_BYTES: u64 = 64 << 10;

/// See the module.
pub(super) struct RawFront {
    virtual_size_bytes: u64,
}

impl RawFront {
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for any option: those of raw images are about files.
    pub(super) fn new(request: &FrontRequest<'_>) -> Result<Self> {
        crate::format::refuse_file_options(request.options)?;
        request.options.check_names(&[FILE_OPTIONS])?;
        Ok(Self { virtual_size_bytes: request.virtual_size_bytes })
    }
}

impl FrontWriter for RawFront {
    fn unit_bytes(&self) -> u64 {
        UNIT_BYTES
    }

    fn head(&mut self, _pipe: &mut Pipe) -> Result<()> {
        Ok(())
    }

    fn unit(&mut self, guest: u64, stored: &[u8], pipe: &mut Pipe) -> Result<()> {
        put_at(guest, stored, self.virtual_size_bytes, pipe)
    }

    fn finish(&mut self, pipe: &mut Pipe) -> Result<()> {
        pipe.pad_to(self.virtual_size_bytes)
    }
}

/// Puts guest bytes at their own offset, cut at the end of the disk.
pub(in super::super) fn put_at(guest: u64, bytes: &[u8], disk_bytes: u64, pipe: &mut Pipe) -> Result<()> {
    pipe.pad_to(guest)?;
    let inside = usize::try_from(disk_bytes - guest).unwrap_or(usize::MAX).min(bytes.len());
    pipe.put(&bytes[..inside])
}
