//! Guest writes: prepare (where the bytes will live), commit (the table points there), abort.
//!
//! # Crash order
//! 1. A new content id is durable before the first guest byte changes: a child never takes a changed parent for
//!    the one that it was made on.
//! 2. A grain's data are durable before an entry that names it; a new table, full of zeroes, is durable before
//!    the directory names it.
//! 3. The entries of both directories' tables are written together, in one pass over the file.
//!
//! So a power cut leaves grains that nobody names, and never an entry whose grain is not there.

use std::{collections::HashMap, ops::Range, sync::atomic::Ordering};

use super::{
    header::SECTOR_BYTES,
    layer::{GuestExtent, Kind, VmdkLayer},
    sparse::{Grain, Sparse},
    stream::{GrainPlace, Stream, sector_entry},
};
use crate::{
    Error, Result,
    format::{
        Attempt, Below, HostOffset, Layer as _, LayerWriter, Place, PreparedWrite, WritePlan, WriteStep,
        WriteToken, in_flight::GuestRanges,
    },
    storage::{Flush, Preallocation},
};

/// A write over what is there already: it changes no table.
const IN_PLACE: WriteToken = WriteToken(u64::MAX);

/// Changed tables are written before more than this waits in memory.
const MAX_DIRTY_BYTES: u64 = 4 << 20;

/// What changes while the image is written, under one lock.
#[derive(Debug)]
pub(super) struct State {
    /// Whole grains that someone is writing.
    in_flight: GuestRanges,
    writes: HashMap<u64, Write>,
    next_token: u64,
    /// By extent: the first byte of its file that nothing takes; `None` until the first allocation.
    pub(super) next_free: Vec<Option<u64>>,
    pub(super) growth: Growth,
}

/// How a compressed extent grows.
#[derive(Debug)]
pub(super) enum Growth {
    /// Grains go to the end, entries into the tables that are there.
    Tables,
    /// It holds nothing: the first grain makes it a stream.
    Fresh,
    /// Front to back.
    Streaming(Stream),
    /// The stream is complete and does not change any more.
    Finished,
}

/// A prepared write that changes tables when it is committed.
#[derive(Clone, Debug)]
struct Write {
    extent: usize,
    /// Guest bytes of the whole grains, cut at the end of the extent.
    guest: Range<u64>,
    /// Where the first of them will stand.
    host: u64,
    /// Bytes of the file that were taken.
    taken_bytes: u64,
    /// Whether committing sets entries; those of a stream stand in memory already.
    sets_entries: bool,
}

impl State {
    pub(super) fn new(extents: &[GuestExtent]) -> Self {
        let compressed = extents.iter().find_map(|extent| match &extent.kind {
            Kind::Sparse(sparse) if sparse.compressed => Some(sparse),
            _ => None,
        });
        let growth = match compressed {
            Some(sparse) if !sparse.writable => Growth::Finished,
            Some(sparse) if sparse.markers && sparse.opened_bytes <= sparse.overhead_bytes => Growth::Fresh,
            _ => Growth::Tables,
        };
        Self {
            in_flight: GuestRanges::default(),
            writes: HashMap::new(),
            next_token: 0,
            next_free: vec![None; extents.len()],
            growth,
        }
    }

    fn begin(&mut self, write: Write) -> WriteToken {
        let token = self.next_token;
        self.next_token += 1;
        self.in_flight.insert(&write.guest);
        self.writes.insert(token, write);
        WriteToken(token)
    }

    fn end(&mut self, token: WriteToken) -> Write {
        let write = self.writes.remove(&token.0).expect("each prepared write ends once");
        self.in_flight.remove(&write.guest);
        write
    }

    /// Whether someone is writing a part of `guest`.
    pub(super) fn is_in_flight(&self, guest: &Range<u64>) -> bool {
        self.in_flight.overlaps(guest)
    }
}

impl VmdkLayer {
    /// Crash order 1. Called before every change of guest bytes up to `end`. What reaches behind the end of the disk is
    /// done while it grows, and changes nothing that a child was made on.
    pub(super) fn before_guest_change(&self, end: u64) -> Result<()> {
        self.check_not_halted()?;
        if self.is_content_renewed() || end > self.virtual_size_bytes() {
            return Ok(());
        }
        let mut content = self.content();
        if self.is_content_renewed() {
            return Ok(());
        }
        let (cid, digits) = content.descriptor.new_cid(super::random());
        let at = content.at_bytes + content.descriptor.cid_digits.start;
        self.files[0].write_at(digits.as_bytes(), at)?;
        let len_bytes = self.files[0].len_bytes()?;
        if content.at_bytes == 0 && !len_bytes.is_multiple_of(SECTOR_BYTES) {
            // A text that stands alone ends on a sector from its first change on, as with the reference.
            self.files[0].resize(len_bytes.next_multiple_of(SECTOR_BYTES), Preallocation::Off)?;
        }
        self.files[0].flush(Flush::Data)?;
        content.descriptor.cid = cid;
        self.content_renewed.store(true, Ordering::Release);
        Ok(())
    }

    fn prepare(&self, guest: Range<u64>) -> Result<(WriteToken, WritePlan)> {
        let index = self.extent_index(guest.start);
        let extent = self.writable_extent(index)?;
        let guest = guest.start..guest.end.min(extent.reach_bytes());
        let inside = guest.start - extent.start_bytes..guest.end - extent.start_bytes;
        match &extent.kind {
            Kind::Zero => Err(Error::unsupported(self.path(), "writing to a ZERO extent")),
            Kind::Flat { file, at_bytes } => {
                self.before_guest_change(guest.end)?;
                Ok((IN_PLACE, WritePlan::in_place(guest, *file, HostOffset(at_bytes + inside.start))))
            }
            Kind::Sparse(sparse) if sparse.compressed => {
                Err(Error::unsupported(self.path(), "writing uncompressed data to a streamOptimized image"))
            }
            Kind::Sparse(sparse) => {
                self.before_guest_change(guest.end)?;
                self.prepare_sparse(index, sparse, guest, inside)
            }
        }
    }

    /// An extent that may be changed.
    pub(super) fn writable_extent(&self, index: usize) -> Result<&GuestExtent> {
        let extent = &self.extents[index];
        if extent.read_only {
            let feature = format_args!("writing to extent {index}, which the descriptor calls RDONLY");
            return Err(Error::unsupported(self.path(), feature));
        }
        Ok(extent)
    }

    fn prepare_sparse(
        &self,
        index: usize,
        sparse: &Sparse,
        guest: Range<u64>,
        inside: Range<u64>,
    ) -> Result<(WriteToken, WritePlan)> {
        if let Some(plan) = self.in_place(sparse, &guest, &inside)? {
            return Ok((IN_PLACE, plan));
        }
        let mut state = self.state();
        let first = inside.start / sparse.grain_bytes;
        while state.is_in_flight(&self.guest_of(index, sparse, first..first + 1)) {
            state = self.landed.wait(state);
        }
        // Someone else's write may have put it there meanwhile.
        if let Some(plan) = self.in_place(sparse, &guest, &inside)? {
            return Ok((IN_PLACE, plan));
        }
        self.make_room(&mut state)?;
        let tables = self.tables_for_writing(&mut state, index, sparse, first / sparse.table_entries)?;

        // As many grains as have no place yet and stand in the same table.
        let table_end = (first / sparse.table_entries + 1) * sparse.table_entries;
        let wanted = inside.end.div_ceil(sparse.grain_bytes).min(table_end);
        let mut entries = Vec::new();
        sparse.entries(first, wanted - first, &mut entries)?;
        let mut end = first;
        for entry in entries {
            let is_placed = matches!(sparse.grain(end, entry)?, Grain::At(_));
            if is_placed || state.is_in_flight(&self.guest_of(index, sparse, end..end + 1)) {
                break;
            }
            end += 1;
        }
        debug_assert!(end > first && !tables.is_empty(), "the first grain was looked at");
        let taken_bytes = (end - first) * sparse.grain_bytes;
        let host = self.take_place(&mut state, index, sparse, taken_bytes, sparse.grain_bytes)?;

        let grains = self.guest_of(index, sparse, first..end);
        let written = guest.start..guest.end.min(grains.end);
        let step = WriteStep {
            guest_bytes: written.clone(),
            file: sparse.file,
            at: HostOffset(host + (written.start - grains.start)),
            fill_before_bytes: written.start - grains.start,
            fill_after_bytes: grains.end - written.end,
            maps: grains.clone(),
        };
        let plan = WritePlan { step, fill_is_zeroed: host >= sparse.storage.len_bytes()? };
        let write = Write { extent: index, guest: grains, host, taken_bytes, sets_entries: true };
        Ok((state.begin(write), plan))
    }

    /// Guest bytes of grains of an extent, cut where its map ends.
    pub(super) fn guest_of(&self, index: usize, sparse: &Sparse, grains: Range<u64>) -> Range<u64> {
        let extent = &self.extents[index];
        let end = extent.start_bytes + grains.end * sparse.grain_bytes;
        extent.start_bytes + grains.start * sparse.grain_bytes..end.min(extent.reach_bytes())
    }

    /// The plan of a write over grains that have their places; `None` when the first has none.
    fn in_place(
        &self,
        sparse: &Sparse,
        guest: &Range<u64>,
        inside: &Range<u64>,
    ) -> Result<Option<WritePlan>> {
        let first = inside.start / sparse.grain_bytes;
        let table_end = (first / sparse.table_entries + 1) * sparse.table_entries;
        let wanted = inside.end.div_ceil(sparse.grain_bytes).min(table_end);
        let mut entries = Vec::new();
        if !sparse.entries(first, wanted - first, &mut entries)? {
            return Ok(None);
        }
        let mut start = None;
        let mut end = first;
        for entry in entries {
            let Grain::At(host) = sparse.grain(end, entry)? else { break };
            if host != *start.get_or_insert(host) + (end - first) * sparse.grain_bytes {
                break;
            }
            sparse.check_grain_place(host)?;
            end += 1;
        }
        let Some(host) = start else { return Ok(None) };
        let len = inside.end.min(end * sparse.grain_bytes) - inside.start;
        let at = host + (inside.start - first * sparse.grain_bytes);
        Ok(Some(WritePlan::in_place(guest.start..guest.start + len, sparse.file, HostOffset(at))))
    }

    /// A write over what is there, from memory alone; any other is for who may wait.
    fn try_in_place(
        &self,
        guest: &Range<u64>,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<Option<WriteToken>>> {
        if !self.is_content_renewed() {
            return Ok(Attempt::Blocks);
        }
        let (mut at, mut are_good) = (guest.start, true);
        let over = WriteStep::over_what_is_there(guest, steps, |found| {
            self.try_map_range(guest.clone(), &mut |extent| {
                are_good = are_good && self.is_known_good_place(at, extent.place);
                at += extent.len_bytes;
                found(extent);
            })
        })?;
        Ok(if over == Some(true) && are_good { Attempt::Done(None) } else { Attempt::Blocks })
    }

    /// Whether it is known, without waiting, that the grain of which guest byte `guest` stands at `place` holds guest
    /// data alone.
    fn is_known_good_place(&self, guest: u64, place: Place) -> bool {
        let extent = &self.extents[self.extent_index(guest)];
        match (&extent.kind, place) {
            (Kind::Sparse(sparse), Place::Data { at: HostOffset(host), .. }) => {
                sparse.is_known_good_place(host - (guest - extent.start_bytes) % sparse.grain_bytes)
            }
            _ => true,
        }
    }

    fn prepare_grain(&self, guest: u64, stored_bytes: u32) -> Result<(WriteToken, WritePlan, GrainPlace)> {
        let index = self.extent_index(guest);
        let extent = self.writable_extent(index)?;
        let Kind::Sparse(sparse) = &extent.kind else {
            return Err(Error::unsupported(self.path(), "writing compressed grains to a flat extent"));
        };
        if !sparse.compressed || !sparse.markers {
            return Err(Error::unsupported(self.path(), "writing compressed grains to this kind of VMDK"));
        }
        let inside = guest - extent.start_bytes;
        let grain = inside / sparse.grain_bytes;
        if stored_bytes == 0
            || u64::from(stored_bytes) > 2 * sparse.grain_bytes
            || !inside.is_multiple_of(sparse.grain_bytes)
        {
            return Err(Error::Invalid(format!(
                "{}: {stored_bytes} bytes at {guest:#x} are not a compressed grain",
                self.path().display()
            )));
        }
        let mut state = self.state();
        if matches!(state.growth, Growth::Finished) {
            return Err(Error::unsupported(
                self.path(),
                "writing to a streamOptimized image that is complete",
            ));
        }
        let range = self.guest_of(index, sparse, grain..grain + 1);
        while state.is_in_flight(&range) {
            state = self.landed.wait(state);
        }
        if matches!(sparse.look_up(grain)?, Grain::At(_)) {
            return Err(Error::unsupported(
                self.path(),
                format_args!("overwriting the compressed grain at {guest:#x}"),
            ));
        }
        self.before_guest_change(range.end)?;
        if matches!(state.growth, Growth::Fresh) {
            state.growth = Growth::Streaming(self.begin_stream(sparse)?);
        }
        let taken_bytes = GrainPlace::len_bytes(stored_bytes);
        let (place, sets_entries) = if let Growth::Streaming(stream) = &mut state.growth {
            (self.append_grain(sparse, stream, grain, stored_bytes)?, false)
        } else {
            self.make_room(&mut state)?;
            self.tables_for_writing(&mut state, index, sparse, grain / sparse.table_entries)?;
            let at = self.take_place(&mut state, index, sparse, taken_bytes, SECTOR_BYTES)?;
            (GrainPlace::new(at, inside, stored_bytes), true)
        };
        let at = HostOffset(place.at + sparse.lead_bytes());
        let plan = WritePlan::in_place(range.clone(), sparse.file, at);
        let write = Write { extent: index, guest: range, host: place.at, taken_bytes, sets_entries };
        Ok((state.begin(write), plan, place))
    }

    /// Crash order 2 and 3.
    pub(super) fn drain(&self, state: &mut State) -> Result<()> {
        self.check_not_halted()?;
        if let Growth::Streaming(_) = state.growth
            && let Some(sparse) = self.sparse_extents().next()
        {
            return self.finish_stream(sparse, state);
        }
        for file in self.files.iter().filter(|file| file.is_writable()) {
            file.flush(Flush::Data)?; // 2.
        }
        for sparse in self.sparse_extents() {
            if sparse.tables.write_back(&*sparse.storage, |_| true, |_| Ok(()))? {
                sparse.storage.flush(Flush::Data)?; // 3.
            }
        }
        Ok(())
    }

    /// Drains before too many changed tables wait.
    pub(super) fn make_room(&self, state: &mut State) -> Result<()> {
        let dirty: u64 = self.sparse_extents().map(|sparse| sparse.tables.dirty_bytes()).sum();
        if dirty >= MAX_DIRTY_BYTES { self.drain(state) } else { Ok(()) }
    }
}

impl LayerWriter for VmdkLayer {
    fn prepare_write(&self, guest_bytes: Range<u64>) -> Result<PreparedWrite<'_>> {
        let (token, plan) = self.prepare(guest_bytes)?;
        Ok(PreparedWrite::new(self, token, plan))
    }

    fn prepare_compressed(&self, guest_offset: u64, stored_bytes: u32) -> Result<PreparedWrite<'_>> {
        let (token, plan, place) = self.prepare_grain(guest_offset, stored_bytes)?;
        Ok(PreparedWrite::new(self, token, plan).framed(&place.marker, place.pad_bytes))
    }

    fn try_prepare_write(
        &self,
        guest_bytes: Range<u64>,
        _below: &dyn Fn(Range<u64>) -> Below,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<Option<WriteToken>>> {
        self.try_in_place(&guest_bytes, steps)
    }

    fn commit_write(&self, token: WriteToken) -> Result<()> {
        if token == IN_PLACE {
            return Ok(());
        }
        let mut state = self.state();
        let write = state.end(token);
        self.landed.notify_all();
        let Kind::Sparse(sparse) = &self.extents[write.extent].kind else { return Ok(()) };
        if !write.sets_entries {
            return Ok(());
        }
        let start = write.guest.start - self.extents[write.extent].start_bytes;
        let first = start / sparse.grain_bytes;
        let count = (write.guest.end - write.guest.start).div_ceil(sparse.grain_bytes);
        for index in 0..count {
            let entry = sector_entry(sparse, write.host + index * sparse.grain_bytes)?;
            sparse.set_entry(first + index, entry)?;
        }
        Ok(())
    }

    fn abort_write(&self, token: WriteToken) {
        if token == IN_PLACE {
            return;
        }
        let mut state = self.state();
        let write = state.end(token);
        if let Growth::Streaming(stream) = &mut state.growth {
            stream.leave_hole();
        } else if state.next_free[write.extent] == Some(write.host + write.taken_bytes) {
            // The last one taken: the next takes its place.
            state.next_free[write.extent] = Some(write.host);
        }
        self.landed.notify_all();
    }

    fn zero_granularity_bytes(&self) -> u64 {
        self.zero_granule_bytes()
    }

    fn write_zeroes(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<bool> {
        self.zero(guest_bytes, may_unmap)
    }

    fn discard(&self, guest_bytes: Range<u64>) -> Result<()> {
        self.punch(guest_bytes)
    }

    fn flush(&self) -> Result<()> {
        let mut state = self.state();
        self.drain(&mut state)
    }

    fn prepare_growth(&self, virtual_size_bytes: u64) -> Result<bool> {
        self.reach_behind(virtual_size_bytes)
    }

    fn resize(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.grow(virtual_size_bytes, preallocation)
    }

    fn close(&self) -> Result<()> {
        LayerWriter::flush(self)
    }
}
