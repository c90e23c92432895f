//! Zeroes and discard: what can be said in tables is said there; nothing is ever moved or given to another.

use std::ops::Range;

use super::{
    layer::{Kind, VmdkLayer},
    sparse::{EntryForm, Grain, Sparse, ZEROED_GRAIN},
};
use crate::{Error, Result, format::Layer as _};

impl VmdkLayer {
    /// The grain, where all extents agree on one and begin on a multiple of it; else any byte.
    pub(super) fn zero_granule_bytes(&self) -> u64 {
        let grain = self.cluster_size_bytes().map_or(1, u64::from);
        let aligned = self.extents.iter().all(|extent| extent.start_bytes.is_multiple_of(grain));
        if aligned { grain } else { 1 }
    }

    /// Makes a range of whole granules read as zeroes. A grain that has its place keeps it, and zeroes are put
    /// there; one without becomes a zeroed grain, where the format and a parent make that necessary. False,
    /// with nothing changed, where neither is possible.
    pub(super) fn zero(&self, guest: Range<u64>, may_unmap: bool) -> Result<bool> {
        if !self.can_zero(&guest)? {
            return Ok(false);
        }
        self.before_guest_change(guest.end)?;
        self.each_part(&guest, |index, inside| {
            let extent = &self.extents[index];
            match &extent.kind {
                Kind::Zero => Ok(()),
                Kind::Flat { file, at_bytes } => {
                    let host = at_bytes + inside.start..at_bytes + inside.end;
                    self.storage(*file).write_zeroes(host, may_unmap)
                }
                Kind::Sparse(sparse) => self.zero_grains(index, sparse, inside, may_unmap),
            }
        })?;
        Ok(true)
    }

    /// Whether every part of the range has a way to read as zeroes.
    fn can_zero(&self, guest: &Range<u64>) -> Result<bool> {
        let mut can = true;
        self.each_part(guest, |index, inside| {
            let extent = &self.extents[index];
            can &= !extent.read_only;
            let Kind::Sparse(sparse) = &extent.kind else { return Ok(()) };
            // Parts of grains, of which the table cannot speak.
            let parts = inside.start % sparse.grain_bytes != 0
                || (inside.end % sparse.grain_bytes != 0 && inside.end != sparse.capacity_bytes());
            let says_zero = sparse.form == EntryForm::Sectors { zeroed_grains: true } && !parts;
            sparse.each_grain(&inside, |_, found| {
                can &= match found {
                    Grain::Zero => true,
                    Grain::Unallocated => !self.has_backing() || (says_zero && !sparse.compressed),
                    Grain::At(_) => !sparse.compressed,
                };
                Ok(())
            })
        })?;
        Ok(can)
    }

    fn zero_grains(&self, index: usize, sparse: &Sparse, inside: Range<u64>, may_unmap: bool) -> Result<()> {
        let mut first = inside.start / sparse.grain_bytes;
        while first * sparse.grain_bytes < inside.end {
            let mut state = self.state();
            while state.is_in_flight(&self.guest_of(index, sparse, first..first + 1)) {
                state = self.landed.wait(state);
            }
            let start = (first * sparse.grain_bytes).max(inside.start);
            let end = ((first + 1) * sparse.grain_bytes).min(inside.end);
            match sparse.look_up(first)? {
                Grain::Zero => {}
                Grain::Unallocated if !self.has_backing() => {}
                Grain::Unallocated => {
                    self.make_room(&mut state)?;
                    self.tables_for_writing(&mut state, index, sparse, first / sparse.table_entries)?;
                    sparse.set_entry(first, ZEROED_GRAIN)?;
                }
                Grain::At(host) => {
                    sparse.check_grain_place(host)?;
                    drop(state); // its place is its own for good
                    let at = host + (start - first * sparse.grain_bytes);
                    sparse.storage.write_zeroes(at..at + (end - start), may_unmap)?;
                }
            }
            first += 1;
        }
        Ok(())
    }

    /// Gives host space back where the host can. Grains keep their places and read as zeroes.
    pub(super) fn punch(&self, guest: Range<u64>) -> Result<()> {
        self.before_guest_change(guest.end)?;
        self.each_part(&guest, |index, inside| {
            let extent = &self.extents[index];
            if extent.read_only {
                return Ok(());
            }
            match &extent.kind {
                Kind::Zero => Ok(()),
                Kind::Flat { file, at_bytes } => {
                    let storage = self.storage(*file);
                    let end = (at_bytes + inside.end).min(storage.len_bytes()?);
                    let host = at_bytes + inside.start..end;
                    if host.is_empty() || !storage.limits().can_punch {
                        return Ok(());
                    }
                    storage.punch_hole(host)
                }
                Kind::Sparse(sparse) if sparse.compressed || !sparse.storage.limits().can_punch => Ok(()),
                Kind::Sparse(sparse) => sparse.each_grain(&inside, |grain, found| {
                    let Grain::At(host) = found else { return Ok(()) };
                    let from = (grain * sparse.grain_bytes).max(inside.start);
                    let to = ((grain + 1) * sparse.grain_bytes).min(inside.end);
                    sparse.check_grain_place(host)?;
                    let at = host + (from - grain * sparse.grain_bytes);
                    let end = (at + (to - from)).min(sparse.storage.len_bytes()?);
                    if at < end { sparse.storage.punch_hole(at..end) } else { Ok(()) }
                }),
            }
        })
    }

    /// The parts of a guest range, by extent and in the extent's own offsets.
    pub(super) fn each_part(
        &self,
        guest: &Range<u64>,
        mut part: impl FnMut(usize, Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let mut at = guest.start;
        while at < guest.end {
            let index = self.extent_index(at);
            let extent = &self.extents[index];
            let end = guest.end.min(extent.reach_bytes());
            part(index, at - extent.start_bytes..end - extent.start_bytes)?;
            at = end;
        }
        Ok(())
    }
}

impl Sparse {
    /// What the tables say of each grain that `inside` touches.
    fn each_grain(
        &self,
        inside: &Range<u64>,
        mut grain: impl FnMut(u64, Grain) -> Result<(), Error>,
    ) -> Result<()> {
        let mut entries = Vec::new();
        let mut first = inside.start / self.grain_bytes;
        let end = inside.end.div_ceil(self.grain_bytes);
        while first < end {
            let count = (self.table_entries - first % self.table_entries).min(end - first);
            let has_table = self.entries(first, count, &mut entries)?;
            for index in 0..count {
                let found = match entries.get(super::sparse::usize_of(index)) {
                    Some(entry) if has_table => self.grain(first + index, *entry)?,
                    _ => Grain::Unallocated,
                };
                grain(first + index, found)?;
            }
            first += count;
        }
        Ok(())
    }
}
