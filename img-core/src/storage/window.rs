//! A part of another storage, as a raw node between a format and its file shows it, or all of it; writes of zeroes
//! may be told from others on the way.

use std::{
    io::{IoSlice, IoSliceMut},
    ops::Range,
    os::fd::BorrowedFd,
    path::Path,
    sync::Arc,
};

use rustix::io::Errno;

use super::{Flush, Identity, Limits, Preallocation, Storage, Watcher, lock::Use, transfer};
use crate::{Error, Result, zeroes::is_zero};

/// A window's size is a multiple of this.
const SECTOR_BYTES: u64 = 512;

/// What becomes of a write that has nothing but zeroes in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// It is written like any other.
    #[default]
    Off,
    /// It becomes zeroes that keep their space.
    On,
    /// It becomes zeroes that may give their space back.
    Unmap,
}

impl DetectZeroes {
    /// Whether `bufs` become zeroes instead of being written: then whether their space may be given back.
    pub(crate) fn unmaps(self, bufs: &[IoSlice<'_>]) -> Option<bool> {
        (self != Self::Off && bufs.iter().all(|buf| is_zero(buf))).then_some(self == Self::Unmap)
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Window {
    inner: Arc<dyn Storage>,
    start_bytes: u64,
    /// `None`: up to the end of the storage, wherever that is.
    size_bytes: Option<u64>,
    zeroes: DetectZeroes,
    /// No space is given back.
    keeps_space: bool,
}

/// The length of a window on `file_bytes`, checked.
///
/// # Errors
/// [`Error::Invalid`] in the reference's words where it does not lie inside, or is no whole number of sectors.
pub(crate) fn window_bytes(file_bytes: u64, start_bytes: u64, size_bytes: Option<u64>) -> Result<u64> {
    let rest_bytes = file_bytes.checked_sub(start_bytes).ok_or_else(|| {
        Error::Invalid(format!(
            "Offset ({start_bytes}) cannot be greater than size of the containing file ({file_bytes})"
        ))
    })?;
    let Some(size) = size_bytes else { return Ok(rest_bytes) };
    if size > rest_bytes {
        return Err(Error::Invalid(format!(
            "The sum of offset ({start_bytes}) and size ({size}) has to be smaller or equal to the  actual size of \
             the containing file ({file_bytes})"
        )));
    }
    if !size.is_multiple_of(SECTOR_BYTES) {
        return Err(Error::Invalid(format!("Specified size is not multiple of {SECTOR_BYTES}")));
    }
    Ok(size)
}

impl Window {
    /// # Errors
    /// As [`window_bytes`].
    pub(crate) fn new(
        inner: Arc<dyn Storage>,
        start_bytes: u64,
        size_bytes: Option<u64>,
        zeroes: DetectZeroes,
    ) -> Result<Self> {
        window_bytes(inner.len_bytes()?, start_bytes, size_bytes)?;
        Ok(Self { inner, start_bytes, size_bytes, zeroes, keeps_space: false })
    }

    /// The same over a host that cannot give space back, as far as can be seen.
    pub(crate) fn keeping_space(self) -> Self {
        Self { keeps_space: true, ..self }
    }

    /// Where a range that is to be changed stands. Behind a fixed end there is no space.
    fn inside(&self, action: &'static str, range: &Range<u64>) -> Result<Range<u64>> {
        let place = |at: u64| at.checked_add(self.start_bytes).filter(|at| *at <= transfer::MAX_LEN_BYTES);
        let is_behind = self.size_bytes.is_some_and(|size| range.end > size);
        match (place(range.start), place(range.end)) {
            (Some(start), Some(end)) if !is_behind => Ok(start..end),
            _ => {
                let full = std::io::Error::from_raw_os_error(Errno::NOSPC.raw_os_error());
                Err(Error::io_at(self.path(), action, range.start, full))
            }
        }
    }
}

impl Storage for Window {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn len_bytes(&self) -> Result<u64> {
        match self.size_bytes {
            Some(size) => Ok(size),
            None => Ok(self.inner.len_bytes()?.saturating_sub(self.start_bytes)),
        }
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], at_bytes: u64) -> Result<()> {
        let here = self.start_bytes.saturating_add(at_bytes);
        let left = self.size_bytes.map_or(u64::MAX, |size| size.saturating_sub(at_bytes));
        if transfer::total_mut(bufs) <= left {
            return self.inner.read_vectored_at(bufs, here);
        }
        self.inner.read_vectored_at(&mut transfer::cut_mut(bufs, 0, left), here)?;
        transfer::zero_from(bufs, left);
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<()> {
        let range = at_bytes..at_bytes.saturating_add(transfer::total(bufs));
        let place = self.inside("write", &range)?;
        match self.zeroes.unmaps(bufs) {
            Some(may_unmap) if !place.is_empty() => {
                self.inner.write_zeroes(place, may_unmap && !self.keeps_space)
            }
            _ => self.inner.write_vectored_at(bufs, place.start),
        }
    }

    fn flush(&self, what: Flush) -> Result<()> {
        self.inner.flush(what)
    }

    fn resize(&self, len_bytes: u64, preallocation: Preallocation) -> Result<()> {
        if self.size_bytes.is_some() {
            return Err(Error::Invalid("Cannot resize fixed-size raw disks".to_owned()));
        }
        let end = len_bytes
            .checked_add(self.start_bytes)
            .ok_or_else(|| Error::Invalid("Disk size too large".to_owned()))?;
        self.inner.resize(end, preallocation)
    }

    fn watch_filling(&self, watcher: &Arc<dyn Watcher>) {
        self.inner.watch_filling(watcher);
    }

    fn preallocate(&self, range_bytes: Range<u64>, preallocation: Preallocation) -> Result<()> {
        self.inner.preallocate(self.inside("preallocate", &range_bytes)?, preallocation)
    }

    fn will_write(&self, range_bytes: Range<u64>) {
        if let Ok(place) = self.inside("write", &range_bytes) {
            self.inner.will_write(place);
        }
    }

    fn punch_hole(&self, range_bytes: Range<u64>) -> Result<()> {
        let place = self.inside("punch hole", &range_bytes)?;
        if self.keeps_space { self.inner.write_zeroes(place, false) } else { self.inner.punch_hole(place) }
    }

    fn write_zeroes(&self, range_bytes: Range<u64>, may_unmap: bool) -> Result<()> {
        let may_unmap = may_unmap && !self.keeps_space;
        self.inner.write_zeroes(self.inside("write zeroes", &range_bytes)?, may_unmap)
    }

    fn next_allocated(&self, from_bytes: u64) -> Result<Option<Range<u64>>> {
        let end = self.len_bytes()?;
        if from_bytes >= end {
            return Ok(None);
        }
        let found = self.inner.next_allocated(self.start_bytes.saturating_add(from_bytes))?;
        let here = |at: u64| at.saturating_sub(self.start_bytes).min(end);
        Ok(found.map(|found| here(found.start)..here(found.end)).filter(|found| !found.is_empty()))
    }

    fn holes_read_as_zeroes(&self) -> bool {
        self.inner.holes_read_as_zeroes()
    }

    fn allocated_bytes(&self) -> Result<u64> {
        self.inner.allocated_bytes()
    }

    fn modified_unix_seconds(&self) -> Result<Option<i64>> {
        self.inner.modified_unix_seconds()
    }

    fn identity(&self) -> Option<Identity> {
        self.inner.identity()
    }

    fn origin(&self) -> Option<(Identity, u64)> {
        let (identity, at) = self.inner.origin().filter(|_| self.size_bytes.is_none())?;
        Some((identity, at.checked_add(self.start_bytes)?))
    }

    fn limits(&self) -> Limits {
        let limits = self.inner.limits();
        Limits { can_punch: limits.can_punch && !self.keeps_space, ..limits }
    }

    fn is_writable(&self) -> bool {
        self.inner.is_writable()
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        // Nobody else knows of the window.
        let is_all = self.start_bytes == 0 && self.size_bytes.is_none() && self.zeroes == DetectZeroes::Off;
        is_all.then(|| self.inner.as_fd()).flatten()
    }

    fn copy_from(
        &self,
        source: &dyn Storage,
        source_at_bytes: u64,
        at_bytes: u64,
        len_bytes: u64,
    ) -> Result<u64> {
        if self.zeroes != DetectZeroes::Off {
            return Ok(0); // they are told apart in this process
        }
        let place = self.inside("write", &(at_bytes..at_bytes.saturating_add(len_bytes)))?;
        self.inner.copy_from(source, source_at_bytes, place.start, len_bytes)
    }

    fn lock(&self, wanted: Use) -> Result<()> {
        self.inner.lock(wanted)
    }

    fn below(&self) -> Option<(&dyn Storage, u64)> {
        Some((&*self.inner, self.start_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    fn window(size: Option<u64>, zeroes: DetectZeroes) -> (Arc<MemoryStorage>, Window) {
        let memory = Arc::new(MemoryStorage::from_bytes("m", &[7; 2048]));
        let window = Window::new(memory.clone(), 512, size, zeroes).expect("it lies inside");
        (memory, window)
    }

    #[test]
    fn nothing_outside_is_read_or_written() {
        let (memory, window) = window(Some(1024), DetectZeroes::Off);
        assert_eq!(window.len_bytes().unwrap(), 1024);
        let mut bytes = [1; 600];
        window.read_at(&mut bytes, 512).unwrap();
        assert!(bytes[..512].iter().all(|byte| *byte == 7) && bytes[512..].iter().all(|byte| *byte == 0));
        for (at, len) in [(1000, 25), (1024, 1), (u64::MAX - 1, 2)] {
            let bytes = vec![1; len];
            assert!(window.write_at(&bytes, at).is_err(), "{at}");
            assert!(window.write_zeroes(at..at.saturating_add(len as u64), false).is_err(), "{at}");
        }
        assert!(window.resize(512, Preallocation::Off).is_err());
        window.write_at(&[9; 1024], 0).unwrap();
        let expected = [[7; 512], [9; 512], [9; 512], [7; 512]].concat();
        assert_eq!(memory.to_vec(), expected);
        assert_eq!(window.next_allocated(0).unwrap(), Some(0..1024));
        assert_eq!(window.next_allocated(1024).unwrap(), None);
    }

    #[test]
    fn without_a_size_it_ends_where_the_file_ends() {
        let (memory, window) = window(None, DetectZeroes::Off);
        window.write_at(&[9; 10], 1536).unwrap();
        assert_eq!(window.len_bytes().unwrap(), 1546);
        window.resize(100, Preallocation::Off).unwrap();
        assert_eq!(memory.to_vec(), [7; 612]);
        assert!(window.write_at(&[9], u64::MAX - 600).is_err());
    }

    #[test]
    fn windows_lie_inside_in_whole_sectors() {
        let refused = |start, size| window_bytes(2048, start, size).unwrap_err().to_string();
        assert_eq!(
            refused(2049, None),
            "Offset (2049) cannot be greater than size of the containing file (2048)"
        );
        assert_eq!(
            refused(1024, Some(1536)),
            "The sum of offset (1024) and size (1536) has to be smaller or equal to the  actual size of the \
             containing file (2048)"
        );
        assert_eq!(refused(0, Some(1000)), "Specified size is not multiple of 512");
        assert_eq!(window_bytes(2048, 24, None).unwrap(), 2024);
    }

    #[test]
    fn one_that_keeps_space_gives_none_back() {
        for keeps_space in [false, true] {
            let memory = Arc::new(MemoryStorage::from_bytes("m", &[7; 1 << 20]));
            let window = Window::new(memory.clone(), 0, None, DetectZeroes::Unmap).expect("it is all of it");
            let window = if keeps_space { window.keeping_space() } else { window };
            assert_eq!(window.limits().can_punch, !keeps_space);
            let before = memory.allocated_bytes().unwrap();
            let changes: [&dyn Fn() -> Result<()>; 3] = [
                &|| window.write_zeroes(0..1 << 18, true),
                &|| window.write_at(&[0; 1 << 18], 1 << 18),
                &|| window.punch_hole(1 << 19..3 << 18),
            ];
            for (index, change) in changes.iter().enumerate() {
                let was = memory.allocated_bytes().unwrap();
                change().unwrap();
                assert_eq!(memory.allocated_bytes().unwrap() < was, !keeps_space, "change {index}");
            }
            assert_eq!(memory.allocated_bytes().unwrap() == before, keeps_space);
            let bytes = memory.to_vec();
            assert!(
                bytes[..3 << 18].iter().all(|byte| *byte == 0)
                    && bytes[3 << 18..].iter().all(|byte| *byte == 7)
            );
        }
    }

    #[test]
    fn zeroes_are_told_from_other_writes() {
        use crate::storage::testing::{Gated, Operation};

        for (zeroes, becomes) in [
            (DetectZeroes::Off, Operation::Write),
            (DetectZeroes::On, Operation::Zero),
            (DetectZeroes::Unmap, Operation::Zero),
        ] {
            let memory = Arc::new(MemoryStorage::from_bytes("m", &[7; 2048]));
            let gated = Arc::new(Gated::new(memory.clone()));
            let window = Window::new(gated.clone(), 0, None, zeroes).expect("it is all of it");
            window.write_vectored_at(&[IoSlice::new(&[0; 9]), IoSlice::new(&[1])], 0).unwrap();
            let gate = gated.close(|request| request.operation.is_change());
            std::thread::scope(|scope| {
                let writing = scope.spawn(|| window.write_at(&[0; 512], 512));
                assert_eq!(gate.wait_until_reached().operation, becomes, "{zeroes:?}");
                gate.let_pass();
                writing.join().expect("no panic").unwrap();
            });
            assert_eq!(memory.to_vec()[512..1024], [0; 512]);
        }
    }
}
