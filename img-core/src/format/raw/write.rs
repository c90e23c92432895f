//! Writing a raw image: every byte has its place already.

use std::{ops::Range, sync::atomic::Ordering};

use super::{SECTOR_BYTES, layer::RawLayer};
use crate::{
    Error, Result,
    format::{
        Attempt, Below, HostFile, HostOffset, LayerWriter, PreparedWrite, WritePlan, WriteStep, WriteToken,
        first_block,
    },
    storage::{Flush, Preallocation},
};

impl RawLayer {
    /// Where a guest range stands in the file. Inside the disk, whose end was checked to fit.
    fn host(&self, guest_bytes: &Range<u64>) -> Range<u64> {
        self.start_bytes + guest_bytes.start..self.start_bytes + guest_bytes.end
    }
}

impl LayerWriter for RawLayer {
    fn prepare_write(&self, guest_bytes: Range<u64>) -> Result<PreparedWrite<'_>> {
        let at = HostOffset(self.start_bytes + guest_bytes.start);
        let plan = WritePlan::in_place(guest_bytes, HostFile::IMAGE, at);
        Ok(PreparedWrite::new(self, WriteToken(0), plan))
    }

    fn try_prepare_write(
        &self,
        guest_bytes: Range<u64>,
        _below: &dyn Fn(Range<u64>) -> Below,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<Option<WriteToken>>> {
        let at = HostOffset(self.start_bytes + guest_bytes.start);
        WriteStep::in_place(guest_bytes, HostFile::IMAGE, at).push_to(steps);
        Ok(Attempt::Done(None))
    }

    fn prepare_compressed(&self, _guest_offset: u64, _stored_bytes: u32) -> Result<PreparedWrite<'_>> {
        Err(Error::unsupported(self.storage.path(), "writing compressed clusters to a raw image"))
    }

    fn commit_write(&self, _token: WriteToken) -> Result<()> {
        Ok(())
    }

    fn abort_write(&self, _token: WriteToken) {}

    fn zero_granularity_bytes(&self) -> u64 {
        1
    }

    fn write_zeroes(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<bool> {
        self.storage.write_zeroes(self.host(&guest_bytes), may_unmap)?;
        Ok(true)
    }

    /// A host that cannot give space back leaves the bytes as they are: a discard is a wish.
    fn discard(&self, guest_bytes: Range<u64>) -> Result<()> {
        if !self.storage.limits().can_punch {
            return Ok(());
        }
        let host = self.host(&guest_bytes);
        // The last sector may reach past the end of the file, where there is nothing to give back.
        let end = host.end.min(self.storage.len_bytes()?);
        if host.start < end { self.storage.punch_hole(host.start..end) } else { Ok(()) }
    }

    fn flush(&self) -> Result<()> {
        self.storage.flush(Flush::Data)
    }

    fn files_to_sync(&self) -> Option<&'static [HostFile]> {
        Some(&[HostFile::IMAGE])
    }

    /// The file gets exactly the size asked for; the disk ends with the sector that holds its last byte.
    fn resize(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        if self.fixed_size {
            return Err(Error::Invalid("Cannot resize fixed-size raw disks".to_owned()));
        }
        let too_big = || Error::Invalid("Disk size too large".to_owned());
        let end = self.start_bytes.checked_add(virtual_size_bytes).ok_or_else(too_big)?;
        let rounded = virtual_size_bytes.checked_next_multiple_of(SECTOR_BYTES).ok_or_else(too_big)?;
        let was = self.storage.len_bytes()?;
        let is_device = self.storage.identity().is_some_and(|identity| identity.inode == 0);
        if is_device && end != was {
            return Err(Error::Invalid("Cannot resize device files".to_owned()));
        }
        self.storage.resize(end, preallocation)?;
        if was == 0 && preallocation != Preallocation::Full {
            first_block(&*self.storage, end)?;
        }
        self.virtual_size_bytes.store(rounded, Ordering::Relaxed);
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.storage.flush(Flush::Data)
    }
}
