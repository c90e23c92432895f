//! Changing guest bytes: prepare, move bytes, commit.

use std::{
    io::{self, IoSlice},
    ops::Range,
    path::Path,
    sync::PoisonError,
};

use super::{Change, Image, ImageExtent};
use crate::{
    Error, Result,
    format::{HostFile, LayerWriter, Lease, PreparedWrite, registry},
    storage::{DetectZeroes, Storage, transfer},
};

/// A disk whose format was guessed to be raw is guarded over this much at either end.
const END_SECTOR_BYTES: usize = 512;

/// Zeroes are written in pieces of this size where the map cannot say them.
const ZERO_WRITE_BYTES: usize = 1 << 20;

impl Image {
    /// Writes guest bytes. The range lies inside the disk.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; when tables or data cannot be read or written, or a rule of the format is
    /// broken; when the range is not inside the disk. What was written before the error stays.
    pub fn write_at(&self, buf: &[u8], guest_offset: u64) -> Result<()> {
        self.write_vectored_at(&[IoSlice::new(buf)], guest_offset)
    }

    /// Writes all of `bufs`, one behind the other.
    ///
    /// # Errors
    /// As [`Self::write_at`].
    pub fn write_vectored_at(&self, bufs: &[IoSlice<'_>], guest_offset: u64) -> Result<()> {
        if let Some(may_unmap) = self.zeroes.unmaps(bufs) {
            let end = guest_offset.saturating_add(transfer::total(bufs));
            return self.write_zeroes(guest_offset..end, may_unmap);
        }
        let _pass = self.gate.enter();
        self.range_inside(guest_offset, bufs.iter().map(|buf| buf.len()).sum())?;
        self.write_inside(bufs, guest_offset)?;
        self.after_write()
    }

    /// Stores the compressed form of one whole cluster (shorter only at the end of the disk).
    ///
    /// # Errors
    /// As [`Self::write_at`], also when the cluster begins at the end of the disk; [`Error::Unsupported`] when the
    /// image cannot hold compressed clusters.
    pub fn write_compressed(&self, stored: &[u8], guest_offset: u64) -> Result<()> {
        let _pass = self.gate.enter();
        // Its first byte: an empty range would be inside at the very end too, where no map has an entry.
        self.range_inside(guest_offset, 1)?;
        let stored_bytes = u32::try_from(stored.len())
            .map_err(|_| Error::Invalid("a compressed cluster of 4 GiB or more".to_owned()))?;
        let prepared = self.writer()?.prepare_compressed(guest_offset, stored_bytes)?;
        let (step, frame) = (prepared.step(), prepared.frame());
        let pad = vec![0; frame.pad_bytes as usize];
        let slices = [IoSlice::new(frame.lead()), IoSlice::new(stored), IoSlice::new(&pad)];
        let at = step.at.0 - frame.lead().len() as u64; // the format set it aside
        self.host_file(0, step.file)?.write_vectored_at(&slices, at)?;
        // Before the map points there; see `DecodedUnits`.
        self.decoded.begin_generation();
        prepared.commit()?;
        self.after_write()
    }

    /// Makes a range read as zeroes; with `may_unmap` its space may be given back, unless the image's name has
    /// `discard=ignore`.
    ///
    /// # Errors
    /// As [`Self::write_at`].
    pub fn write_zeroes(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<()> {
        let may_unmap = may_unmap && self.discards;
        let (head, middle, tail) = {
            let _pass = self.gate.enter();
            self.check_inside(&guest_bytes)?;
            let (head, middle, tail) = self.split_at_granules(&guest_bytes)?;
            if !middle.is_empty() {
                self.zero_granules(middle.clone(), may_unmap)?;
            }
            (head, middle, tail)
        };
        debug_assert!(head.end <= middle.start || middle.is_empty());
        for edge in [head, tail] {
            self.zero_edge(edge, may_unmap)?;
        }
        let _pass = self.gate.enter();
        self.after_write()
    }

    /// [`Self::write_zeroes`] where the map can say it: returns false, having changed nothing, where bytes would
    /// have to be written.
    ///
    /// # Errors
    /// As [`Self::write_at`].
    pub fn write_zeroes_fast(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<bool> {
        let may_unmap = may_unmap && self.discards;
        let _pass = self.gate.enter();
        self.check_inside(&guest_bytes)?;
        let (head, middle, tail) = self.split_at_granules(&guest_bytes)?;
        if !head.is_empty() || !tail.is_empty() {
            return Ok(false);
        }
        if !middle.is_empty() && !self.zero_mapped(&middle, may_unmap)? {
            return Ok(false);
        }
        self.after_write()?;
        Ok(true)
    }

    /// Gives space back where whole clusters are covered; what is not covered stays as it is. Does nothing where the
    /// image's name has `discard=ignore`.
    ///
    /// # Errors
    /// As [`Self::write_at`].
    pub fn discard(&self, guest_bytes: Range<u64>) -> Result<()> {
        let _pass = self.gate.enter();
        self.check_inside(&guest_bytes)?;
        let (_, middle, _) = self.split_at_granules(&guest_bytes)?;
        if middle.is_empty() || !self.discards {
            return Ok(());
        }
        let writer = self.writer()?;
        let result =
            self.noted.around(Change::Discarded(&middle), || writer.discard(middle.clone()).map(|()| true));
        self.gate.progressed();
        result?;
        self.after_write()
    }

    /// Makes everything written durable.
    ///
    /// # Errors
    /// When metadata or data cannot be written or flushed.
    pub fn flush(&self) -> Result<()> {
        let _pass = self.gate.enter();
        self.flush_inside()
    }

    pub(super) fn writer(&self) -> Result<&dyn LayerWriter> {
        self.layers[0].writer().ok_or_else(|| Error::ReadOnly { file: self.names[0].clone().into() })
    }

    fn after_write(&self) -> Result<()> {
        if self.writes_through { self.flush_inside() } else { Ok(()) }
    }

    /// [`Self::write_at`] for who holds a pass or has the image alone.
    fn write_inside(&self, bufs: &[IoSlice<'_>], guest_offset: u64) -> Result<()> {
        self.writer()?;
        if !self.touches_guarded(&(guest_offset..guest_offset + transfer::total(bufs))) {
            return self.write_unguarded(bufs, guest_offset);
        }
        let _alone = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_first_sector(bufs, guest_offset)?;
        self.check_last_sector(bufs, guest_offset)?;
        self.write_unguarded(bufs, guest_offset)
    }

    /// Whether a write is more than preparing it, moving its bytes and committing: what it holds or where it goes is
    /// looked at, or it is flushed.
    pub(crate) fn looks_at_writes(&self) -> bool {
        self.guards_ends || self.writes_through || self.zeroes != DetectZeroes::Off
    }

    /// Whether a write to that range has to be looked at: see [`Self::check_first_sector`].
    pub(super) fn touches_guarded(&self, guest_bytes: &Range<u64>) -> bool {
        let last_sector = self.virtual_size_bytes().saturating_sub(END_SECTOR_BYTES as u64);
        let touches_end = guest_bytes.start < END_SECTOR_BYTES as u64 || guest_bytes.end > last_sector;
        self.guards_ends && touches_end && !guest_bytes.is_empty()
    }

    fn write_unguarded(&self, bufs: &[IoSlice<'_>], guest_offset: u64) -> Result<()> {
        let writer = self.writer()?;
        let end = guest_offset + transfer::total(bufs); // inside the disk
        let mut at = guest_offset;
        while at < end {
            let prepared = writer.prepare_write(at..end)?;
            let covered = at..prepared.step().guest_bytes.end.min(end);
            if covered.is_empty() {
                return Err(Error::Invalid(format!("{}: a prepared write covers nothing", self.names[0])));
            }
            at = covered.end;
            let result = if covered == (guest_offset..end) {
                self.write_prepared(bufs, prepared)
            } else {
                let part = transfer::cut(bufs, covered.start - guest_offset, covered.end - guest_offset);
                self.write_prepared(&part, prepared)
            };
            self.gate.progressed();
            result?;
        }
        Ok(())
    }

    /// Moves the bytes of one prepared write, with what its clusters held around them, in one system call.
    fn write_prepared(&self, bufs: &[IoSlice<'_>], prepared: PreparedWrite<'_>) -> Result<()> {
        let step = prepared.step();
        let Range { start, end } = step.guest_bytes;
        let storage = self.host_file(0, step.file)?;
        if !step.fills() {
            storage.write_vectored_at(bufs, step.at.0)?;
            return self.commit_noted(prepared);
        }
        let before = start.checked_sub(step.fill_before_bytes).ok_or_else(|| {
            Error::Invalid(format!("{}: a prepared write fills before the start of the disk", self.names[0]))
        })?;
        let is_zeroed = prepared.fill_is_zeroed();
        let head = self.fill(before..start, is_zeroed)?;
        let tail = self.fill(end..end.saturating_add(step.fill_after_bytes), is_zeroed)?;
        let at = step.at.0 - head.len() as u64; // the cluster holds all of it
        let mut slices = vec![IoSlice::new(&head)];
        slices.extend_from_slice(bufs);
        slices.push(IoSlice::new(&tail));
        storage.write_vectored_at(&slices, at)?;
        self.commit_noted(prepared)
    }

    fn commit_noted(&self, prepared: PreparedWrite<'_>) -> Result<()> {
        match prepared.step().mapping() {
            None => prepared.commit(),
            Some(mapping) => self
                .noted
                .around(Change::Mapped(&mapping), || prepared.commit().map(|()| true))
                .map(|_has_happened| ()),
        }
    }

    /// What the guest reads in a range now, behind the end of the disk zeroes. Empty when these are zeroes and
    /// `is_zeroed` says that nothing has to be written for them.
    fn fill(&self, guest_bytes: Range<u64>, is_zeroed: bool) -> Result<Vec<u8>> {
        if guest_bytes.is_empty() {
            return Ok(Vec::new());
        }
        let inside = guest_bytes.start..guest_bytes.end.min(self.virtual_size_bytes()).max(guest_bytes.start);
        let zeroes = self.reads_as_zeroes(inside.clone())?;
        if zeroes && is_zeroed {
            return Ok(Vec::new());
        }
        let length = |range: &Range<u64>| usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let mut bytes = vec![0; length(&guest_bytes)]; // part of one cluster
        if !zeroes {
            self.read_inside(&mut bytes[..length(&inside)], inside.start)?;
        }
        Ok(bytes)
    }

    /// Whether the map says that a range reads as zeroes.
    fn reads_as_zeroes(&self, guest_bytes: Range<u64>) -> Result<bool> {
        if guest_bytes.is_empty() {
            return Ok(true);
        }
        let _lease = Lease::of(&*self.layers[0]);
        let mut extents = Vec::new();
        self.map_inside(guest_bytes, &mut extents)?;
        Ok(extents.iter().all(ImageExtent::reads_as_zeroes))
    }

    /// The whole granules inside a range, and what is left before and behind them.
    fn split_at_granules(&self, range: &Range<u64>) -> Result<(Range<u64>, Range<u64>, Range<u64>)> {
        let granule = self.writer()?.zero_granularity_bytes().max(1);
        let start = range.start.checked_next_multiple_of(granule).unwrap_or(u64::MAX);
        let end = match range.end {
            end if end == self.virtual_size_bytes() => end,
            end => end - end % granule,
        };
        if start < end {
            return Ok((range.start..start, start..end, end..range.end));
        }
        // Nothing whole: one edge, or two where the range crosses a border.
        let border = range.end - range.end % granule;
        let border = if border > range.start { border } else { range.end };
        Ok((range.start..border, border..border, border..range.end))
    }

    fn zero_granules(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<()> {
        if self.zero_mapped(&guest_bytes, may_unmap)? { Ok(()) } else { self.write_zero_bytes(guest_bytes) }
    }

    /// Lets the map say that a range of whole granules is zero; false where it cannot.
    fn zero_mapped(&self, guest_bytes: &Range<u64>, may_unmap: bool) -> Result<bool> {
        let writer = self.writer()?;
        let result = self
            .noted
            .around(Change::Zeroed(guest_bytes), || writer.write_zeroes(guest_bytes.clone(), may_unmap));
        self.gate.progressed();
        result
    }

    fn write_zero_bytes(&self, guest_bytes: Range<u64>) -> Result<()> {
        let length = usize::try_from(guest_bytes.end - guest_bytes.start).unwrap_or(usize::MAX);
        let zeroes = vec![0; length.min(ZERO_WRITE_BYTES)];
        let mut at = guest_bytes.start;
        while at < guest_bytes.end {
            let left = usize::try_from(guest_bytes.end - at).unwrap_or(usize::MAX);
            let now = &zeroes[..zeroes.len().min(left)];
            self.write_inside(&[IoSlice::new(now)], at)?;
            at += now.len() as u64;
        }
        Ok(())
    }

    /// [`Self::write_zeroes`] for who has the image alone.
    pub(super) fn zero_alone(&self, guest_bytes: Range<u64>) -> Result<()> {
        let (head, middle, tail) = self.split_at_granules(&guest_bytes)?;
        if !middle.is_empty() {
            self.zero_granules(middle, true)?;
        }
        for edge in [head, tail] {
            if !edge.is_empty() {
                self.zero_edge_alone(edge, true)?;
            }
        }
        Ok(())
    }

    /// Zeroes a part of one granule. Where the rest of it reads as zeroes the whole granule becomes a zero
    /// granule; nobody may write to the rest between the question and the change, so that is done alone.
    fn zero_edge(&self, edge: Range<u64>, may_unmap: bool) -> Result<()> {
        if edge.is_empty() {
            return Ok(());
        }
        {
            let _pass = self.gate.enter();
            self.check_inside(&edge)?;
            if !self.rest_reads_as_zeroes(&edge)? {
                return self.write_zero_bytes(edge);
            }
        }
        let _alone = self.gate.drain();
        self.check_inside(&edge)?;
        self.zero_edge_alone(edge, may_unmap)
    }

    fn zero_edge_alone(&self, edge: Range<u64>, may_unmap: bool) -> Result<()> {
        if self.rest_reads_as_zeroes(&edge)? {
            self.zero_granules(self.granule_around(&edge)?, may_unmap)
        } else {
            self.write_zero_bytes(edge)
        }
    }

    /// Whether all of the granule but `edge` reads as zeroes.
    fn rest_reads_as_zeroes(&self, edge: &Range<u64>) -> Result<bool> {
        let whole = self.granule_around(edge)?;
        Ok(self.reads_as_zeroes(whole.start..edge.start)? && self.reads_as_zeroes(edge.end..whole.end)?)
    }

    fn granule_around(&self, edge: &Range<u64>) -> Result<Range<u64>> {
        let granule = self.writer()?.zero_granularity_bytes().max(1);
        let start = edge.start - edge.start % granule;
        Ok(start..start.saturating_add(granule).min(self.virtual_size_bytes()).max(edge.end))
    }

    /// Refuses a write after which the disk would be taken for another format by its first bytes.
    fn check_first_sector(&self, bufs: &[IoSlice<'_>], guest_offset: u64) -> Result<()> {
        let (sector, storage) = self.sector_after(bufs, guest_offset, 0)?;
        if registry::probe(&sector, Path::new(storage.path())).name() == self.layers[0].driver().name() {
            return Ok(());
        }
        let refused = io::Error::from_raw_os_error(rustix::io::Errno::PERM.raw_os_error());
        Err(Error::io_at(storage.path(), "write to the guarded first sector", guest_offset, refused))
    }

    /// The same for its last bytes.
    fn check_last_sector(&self, bufs: &[IoSlice<'_>], guest_offset: u64) -> Result<()> {
        let size = self.virtual_size_bytes();
        let Some(start) = size.checked_sub(END_SECTOR_BYTES as u64) else { return Ok(()) };
        let (sector, storage) = self.sector_after(bufs, guest_offset, start)?;
        if registry::probe_tail(&sector, size).is_none() {
            return Ok(());
        }
        let refused = io::Error::from_raw_os_error(rustix::io::Errno::PERM.raw_os_error());
        Err(Error::io_at(storage.path(), "write to the guarded last sector", guest_offset, refused))
    }

    /// What the sector at `start` of a raw disk would be after a write, and the file that holds it.
    fn sector_after(
        &self,
        bufs: &[IoSlice<'_>],
        guest_offset: u64,
        start: u64,
    ) -> Result<([u8; END_SECTOR_BYTES], &dyn Storage)> {
        let storage = self.host_file(0, HostFile::IMAGE)?;
        let mut sector = [0; END_SECTOR_BYTES];
        storage.read_at(&mut sector, start)?;
        let end = start + END_SECTOR_BYTES as u64; // inside the disk, or the disk is shorter than a sector
        let written = guest_offset.max(start)..(guest_offset + transfer::total(bufs)).min(end);
        if !written.is_empty() {
            let part = transfer::cut(bufs, written.start - guest_offset, written.end - guest_offset);
            let mut rest = &mut sector[usize::try_from(written.start - start).unwrap_or(END_SECTOR_BYTES)..];
            for buf in &*part {
                let (changed, behind) = rest.split_at_mut(buf.len().min(rest.len()));
                changed.copy_from_slice(&buf[..changed.len()]);
                rest = behind;
            }
        }
        Ok((sector, &**storage))
    }
}
