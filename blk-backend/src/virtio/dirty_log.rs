//! Which pages of the guest the device wrote, for whoever moves the guest to another host ("Migration" of the
//! vhost-user protocol).

use std::{fs::File, io, sync::atomic::AtomicU8, sync::atomic::Ordering};

use vm_memory::{FileOffset, GuestAddress, MmapRegion, VolatileMemory};

use super::{chain::GuestRange, ring::RingLayout};

/// Bytes of a page of the log, whatever the guest's pages are.
pub const LOG_PAGE_BYTES: u64 = 4096;

/// A bit for each page of guest memory, shared with the front end, which clears bits as it copies pages.
#[derive(Debug)]
pub struct DirtyLog {
    bits: MmapRegion<()>,
}

/// A page that the log has no bit for: what is written there would be lost on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the dirty log of {log_bytes} bytes has no bit for guest address {address:#x}")]
pub struct NotInLog {
    /// The page's address.
    pub address: u64,
    /// Size of the log.
    pub log_bytes: usize,
}

impl DirtyLog {
    /// The log in `len_bytes` of `file` from `offset` on.
    ///
    /// # Errors
    /// When the file is shorter, or cannot be mapped.
    pub fn map(file: File, offset: u64, len_bytes: u64) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let size = usize::try_from(len_bytes).map_err(|_| invalid("dirty log: larger than memory"))?;
        let file_bytes = file.metadata()?.len();
        if size == 0 || offset.checked_add(len_bytes).is_none_or(|end| end > file_bytes) {
            return Err(invalid("dirty log: its file is shorter than the log"));
        }
        let bits = MmapRegion::from_file(FileOffset::new(file, offset), size).map_err(io::Error::other)?;
        Ok(Self { bits })
    }

    /// Sets the bits of all pages that `len_bytes` (not 0) from `start` on touch.
    ///
    /// # Errors
    /// [`NotInLog`] for the first page without a bit.
    pub fn mark(&self, start: GuestAddress, len_bytes: u64) -> Result<(), NotInLog> {
        let last = start.0.saturating_add(len_bytes.saturating_sub(1)) / LOG_PAGE_BYTES;
        for page in start.0 / LOG_PAGE_BYTES..=last {
            let missing = NotInLog { address: page * LOG_PAGE_BYTES, log_bytes: self.bits.size() };
            let at = usize::try_from(page / 8).map_err(|_| missing)?;
            if at >= self.bits.size() {
                return Err(missing);
            }
            let byte = self.bits.get_atomic_ref::<AtomicU8>(at).map_err(|_| missing)?;
            byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
        Ok(())
    }
}

/// The log as one queue uses it.
#[derive(Clone, Debug)]
pub struct QueueLog {
    /// The bits.
    pub log: std::sync::Arc<DirtyLog>,
    /// The address under which writes to the used ring are logged, where that is wanted.
    pub used_at: Option<GuestAddress>,
}

impl QueueLog {
    /// What the device wrote for a request.
    ///
    /// # Errors
    /// [`NotInLog`].
    pub fn mark_ranges(&self, ranges: &[GuestRange]) -> Result<(), NotInLog> {
        ranges.iter().try_for_each(|range| self.log.mark(range.start, range.len_bytes.into()))
    }

    /// The used ring of a queue of `size`. It is small: all of it, rather than a page here and there.
    ///
    /// # Errors
    /// [`NotInLog`].
    pub fn mark_used_ring(&self, size: u16) -> Result<(), NotInLog> {
        self.used_at.map_or(Ok(()), |at| self.log.mark(at, RingLayout::used_bytes(size)))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _};

    use super::*;

    #[test]
    fn every_page_that_is_touched_has_its_bit() {
        let mut file = tempfile::tempfile().expect("a file");
        file.set_len(8192).expect("space");
        let log = DirtyLog::map(file.try_clone().expect("a file"), 4096, 4).expect("inside the file");
        log.mark(GuestAddress(4095), 2).expect("pages 0 and 1");
        log.mark(GuestAddress(9 * 4096), 4096).expect("page 9");
        log.mark(GuestAddress(31 * 4096), 1).expect("the last page");
        let missing = NotInLog { address: 32 * 4096, log_bytes: 4 };
        assert_eq!(log.mark(GuestAddress(31 * 4096 + 4095), 2), Err(missing));
        assert!(log.mark(GuestAddress(u64::MAX), 1).is_err());
        let mut bytes = [0; 5];
        file.seek(io::SeekFrom::Start(4096)).expect("seek");
        file.read_exact(&mut bytes).expect("the log");
        assert_eq!(bytes, [0b11, 0b10, 0, 0x80, 0]);
        assert!(DirtyLog::map(file, 8190, 4).is_err(), "behind the end of the file");
    }
}
