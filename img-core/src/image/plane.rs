//! The image for threads that must not wait: a queue of a guest, an event loop.
//!
//! [`Image::try_map`] and [`Image::try_prepare_write`] answer from memory, at once, or say why not. They do no I/O,
//! wait for no lock that somebody holds across I/O, and take no memory once everything is warm. The bytes are moved by
//! the caller, who holds a ticket meanwhile. The ticket is the request's pass and lease: the image is not resized,
//! snapshotted or closed before it ends, and no place that was named for it is given to anyone else. Tickets may go to
//! other threads, and must not be kept for longer than the request takes.
//!
//! | answer | then |
//! | --- | --- |
//! | [`Attempt::Done`] | move the bytes, for a write with [what is around them](WriteTicket::map_fill); commit a write; drop the ticket |
//! | [`Attempt::Busy`] | park the request, [ask to be woken](Image::wake_on_progress), try again |
//! | [`Attempt::Blocks`] | hand the request to a thread that may block, which calls [`Image::read_vectored_at`] or [`Image::write_vectored_at`] |
//!
//! A thread that asks often asks through a [`Lookaside`](super::Lookaside). Where a read blocks for lack of a piece of a table, [`Image::missing_table`] names it: the caller may move those bytes as
//! any others, offer them, and try again.
//!
//! [`Image::try_flush`] answers alike where a flush is nothing but syncs of files, which the caller does.
//!
//! A thread that holds a ticket must not call what waits for requests to end ([`Image::resize`],
//! [`Image::write_zeroes`], snapshots, [`Image::check`]).

use std::{ops::Range, sync::Arc, task::Waker};

use rustix::io::Errno;

use super::{Change, Image, ImageExtent, NoteId};
use crate::{
    Result,
    format::{
        Attempt, Below, Extent, HostFile, HostOffset, LeaseToken, Mapping, MissingTable, Place, WriteStep,
        WriteToken,
    },
    storage::{DetectZeroes, Storage},
};

/// A request that is inside the image, and the lease on what its map answers named. Ends when dropped.
#[must_use = "the map's answer is valid while the ticket lives"]
#[derive(Debug)]
pub struct Ticket {
    image: Arc<Image>,
    lease: LeaseToken,
}

/// A prepared write. Its bytes are moved as its steps say, and then it is committed; dropped, it is undone: the map
/// does not change, though bytes that were written in place stay.
#[must_use = "a prepared write that is dropped is undone"]
#[derive(Debug)]
pub struct WriteTicket {
    /// What is to be committed; nothing for a write in place.
    token: Option<WriteToken>,
    /// What the commit will change, where somebody is told.
    changes: Vec<Mapping>,
    /// That they are about to happen, in the log.
    notes: Vec<NoteId>,
    ticket: Ticket,
}

/// A flush that is nothing but syncs of files, which its holder does. Dropped, nothing is promised.
#[must_use = "nothing is durable before the files are synced"]
#[derive(Debug)]
pub struct FlushTicket {
    files: &'static [HostFile],
    /// Its name in the log, where somebody is told.
    begun: Option<u64>,
    ticket: Ticket,
}

/// A piece of a table that memory lacks, which its holder reads and offers. The ticket is taken before the piece was
/// found missing, so that its place becomes nothing else before it is offered.
#[must_use = "the piece is still missing"]
#[derive(Debug)]
pub struct TableTicket {
    depth: usize,
    missing: MissingTable,
    ticket: Ticket,
}

/// What came of committing without waiting.
#[must_use = "a write that is not committed yet is undone when it is dropped"]
#[derive(Debug)]
pub enum Commit {
    /// The map points at the bytes.
    Done,
    /// For a thread that may block, to be ended with [`WriteTicket::commit`].
    Blocks(WriteTicket),
}

impl Image {
    /// The extents that cover `guest_bytes`, as [`Self::map_range`] finds them, put into `extents` in place of what it
    /// held. Encoded ones are not among them: [`Attempt::Blocks`] is the answer where a decoder is needed.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) when the range is not inside the disk. What is wrong with the
    /// image is met and told by the thread that may block.
    pub fn try_map(
        self: &Arc<Self>,
        guest_bytes: Range<u64>,
        extents: &mut Vec<ImageExtent>,
    ) -> Result<Attempt<Ticket>> {
        extents.clear();
        let Some(ticket) = self.try_enter() else { return Ok(Attempt::Busy) };
        self.check_inside(&guest_bytes)?;
        Ok(self.map_entered(ticket, guest_bytes, extents))
    }

    /// The first piece of a table for lack of which [`Self::try_map`] answers [`Attempt::Blocks`]. `None` where that has
    /// another reason, and while someone has, or wants, the image alone.
    pub fn missing_table(self: &Arc<Self>, guest_bytes: Range<u64>) -> Option<TableTicket> {
        let ticket = self.try_enter()?;
        self.check_inside(&guest_bytes).ok()?;
        let (depth, missing) = self.first_missing(guest_bytes)?;
        Some(TableTicket { depth, missing, ticket })
    }

    /// Finds or reserves places for all of `guest_bytes` and puts the steps of the write into `steps`, in place of what
    /// it held: clusters are overwritten in place, or allocated. What a step fills the caller reads where
    /// [`WriteTicket::map_fill`] says.
    ///
    /// [`Attempt::Blocks`] also where every write must be durable when it returns, where zeroes are told from other
    /// bytes, and for a first or last sector that is guarded.
    ///
    /// # Errors
    /// [`Error::ReadOnly`](crate::Error::ReadOnly); otherwise as [`Self::try_map`].
    pub fn try_prepare_write(
        self: &Arc<Self>,
        guest_bytes: Range<u64>,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<WriteTicket>> {
        steps.clear();
        let writer = self.writer()?;
        let looks_at_bytes = self.touches_guarded(&guest_bytes) || self.zeroes != DetectZeroes::Off;
        if looks_at_bytes || self.writes_through {
            return Ok(Attempt::Blocks);
        }
        let Some(ticket) = self.try_enter() else { return Ok(Attempt::Busy) };
        self.check_inside(&guest_bytes)?;
        if guest_bytes.is_empty() {
            return Ok(Attempt::Done(WriteTicket::new(ticket, None)));
        }
        let attempt = writer
            .try_prepare_write(guest_bytes, &|range| self.below(range), steps)
            .unwrap_or(Attempt::Blocks);
        Ok(match attempt {
            Attempt::Done(token) => {
                let mut ticket = WriteTicket::new(ticket, token);
                if token.is_some() && self.noted.is_kept() {
                    ticket.changes.extend(steps.iter().filter_map(WriteStep::mapping));
                }
                return Ok(Attempt::Done(ticket));
            }
            Attempt::Busy => {
                steps.clear();
                Attempt::Busy
            }
            Attempt::Blocks => {
                steps.clear();
                Attempt::Blocks
            }
        })
    }

    /// Begins to make everything written so far durable, where that takes syncs alone: the caller syncs the
    /// [files](FlushTicket::files) and says [so](FlushTicket::synced).
    pub fn try_flush(self: &Arc<Self>) -> Attempt<FlushTicket> {
        let Some(writer) = self.layers[0].writer() else { return Attempt::Blocks };
        let Some(ticket) = self.try_enter() else { return Attempt::Busy };
        // Before the layer is asked: it answers for the changes that have happened by now.
        let begun = self.flush_begins();
        match writer.files_to_sync() {
            Some(files) => Attempt::Done(FlushTicket { files, begun, ticket }),
            None => Attempt::Blocks,
        }
    }

    /// Wakes `waker` once, when something has ended after this call that may have made others
    /// [busy](Attempt::Busy). To miss nothing: ask, try again, and only then park.
    pub fn wake_on_progress(&self, waker: &Waker) {
        self.gate.wake_on_progress(waker);
    }

    /// A host file of the layer at `depth`, as map answers name it.
    #[must_use]
    pub fn storage(&self, depth: usize, file: HostFile) -> Option<&Arc<dyn Storage>> {
        self.layers.get(depth)?.file(file)
    }

    /// [`Self::try_map`] for who has a ticket, and no extents yet.
    pub(super) fn map_entered(
        &self,
        ticket: Ticket,
        guest_bytes: Range<u64>,
        extents: &mut Vec<ImageExtent>,
    ) -> Attempt<Ticket> {
        if self.map_cached(guest_bytes, &mut |extent| extent.push_to(extents)) {
            return Self::answer(ticket, extents);
        }
        extents.clear();
        Attempt::Blocks
    }

    /// The answer where the map has told all extents.
    pub(super) fn answer(ticket: Ticket, extents: &mut Vec<ImageExtent>) -> Attempt<Ticket> {
        if extents.iter().all(|extent| !matches!(extent.place, Place::Encoded { .. })) {
            return Attempt::Done(ticket);
        }
        extents.clear();
        Attempt::Blocks
    }

    /// [`Layer::map_changes`](crate::format::Layer::map_changes) of the whole chain.
    pub(super) fn map_changes(&self) -> Option<u64> {
        let top = &self.layers[0];
        if top.writer().is_some() { top.map_changes() } else { Some(0) }
    }

    /// `None` while someone has, or wants, the image alone.
    pub(super) fn try_enter(self: &Arc<Self>) -> Option<Ticket> {
        self.gate.try_enter()?.keep();
        // Before the map is asked; see `Lease`.
        let lease = self.layers[0].begin_lease();
        Some(Ticket { image: Arc::clone(self), lease })
    }

    /// [`Self::map_range`] from memory alone; false where that is not enough, or something is wrong.
    pub(super) fn map_cached(&self, guest_bytes: Range<u64>, found: &mut dyn FnMut(ImageExtent)) -> bool {
        if self.layers[0].writer().is_none() {
            return self.frozen.map_cached(guest_bytes, found).unwrap_or(false);
        }
        let mut guest_offset = guest_bytes.start;
        let mut is_known = true;
        let top = self.layers[0].try_map_range(guest_bytes, &mut |Extent { len_bytes, place }| {
            let end = guest_offset + len_bytes;
            if place == Place::Unallocated && self.layers.len() > 1 {
                is_known = is_known && self.frozen.map_cached(guest_offset..end, found).unwrap_or(false);
            } else {
                found(ImageExtent { guest_offset, len_bytes, depth: 0, place });
            }
            guest_offset = end;
        });
        top.unwrap_or(false) && is_known
    }

    /// What [`Self::map_cached`] lacks first, and at which depth.
    fn first_missing(&self, guest_bytes: Range<u64>) -> Option<(usize, MissingTable)> {
        let top = &self.layers[0];
        if top.writer().is_none() {
            return self.frozen.missing_table(guest_bytes);
        }
        let mut guest_offset = guest_bytes.start;
        let mut below = None;
        let is_known = top.try_map_range(guest_bytes.clone(), &mut |Extent { len_bytes, place }| {
            let end = guest_offset + len_bytes;
            if place == Place::Unallocated && below.is_none() {
                below = self.frozen.missing_table(guest_offset..end);
            }
            guest_offset = end;
        });
        match is_known {
            Ok(true) => below,
            _ => top.missing_table(guest_bytes).map(|missing| (0, missing)),
        }
    }

    /// What memory knows of the layers below the top.
    fn below(&self, guest_bytes: Range<u64>) -> Below {
        let (mut is_zero, mut is_plain) = (true, true);
        let is_known = self.frozen.map_cached(guest_bytes, &mut |extent| {
            is_zero &= extent.reads_as_zeroes();
            is_plain &= !matches!(extent.place, Place::Encoded { .. });
        });
        match is_known {
            Ok(true) if is_zero => Below::Zeroes,
            Ok(true) if is_plain => Below::Plain,
            // What is wrong is met and told by the thread that may block.
            _ => Below::Unknown,
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.image.layers[0].end_lease(self.lease);
        self.image.gate.leave();
    }
}

impl TableTicket {
    /// The depth of the layer whose table it is, as [`Image::storage`] takes it.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// The file of that layer in which it stands.
    #[must_use]
    pub fn file(&self) -> HostFile {
        self.missing.file
    }

    /// Where in the file.
    #[must_use]
    pub fn at(&self) -> HostOffset {
        self.missing.at
    }

    /// How long it is. Bytes behind the end of the file are zeroes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.missing.len_bytes.into()
    }

    /// Gives the bytes, all of them read after the ticket was given out. Whether they are kept: not where they may be
    /// old by now.
    pub fn offer(self, bytes: Box<[u8]>) -> bool {
        self.ticket.image.layers[self.depth].offer_table(&self.missing, bytes)
    }
}

impl FlushTicket {
    /// Those of the top layer's files that are to be synced, in any order.
    #[must_use]
    pub fn files(&self) -> &'static [HostFile] {
        self.files
    }

    /// All of them were synced, each after the ticket was given out.
    pub fn synced(self) {
        self.ticket.image.flush_has_ended(self.begun);
    }

    /// One of them could not be synced: no later flush succeeds.
    pub fn failed(self, errno: Errno) {
        let storages = self.files.iter().filter_map(|file| self.ticket.image.storage(0, *file));
        storages.for_each(|storage| storage.sync_failed(errno));
    }
}

impl WriteTicket {
    fn new(ticket: Ticket, token: Option<WriteToken>) -> Self {
        Self { token, changes: Vec::new(), notes: Vec::new(), ticket }
    }

    /// Where the bytes stand that a step fills, put into `extents` in place of what it held; behind the end of the disk
    /// there are zeroes. They stay there until the commit. False where memory does not tell any more, or a decoder is
    /// needed: the ticket is then to be dropped, and the write left to a thread that may block.
    pub fn map_fill(&self, guest_bytes: Range<u64>, extents: &mut Vec<ImageExtent>) -> bool {
        extents.clear();
        let image = &self.ticket.image;
        // The size stays while there are tickets.
        let end = guest_bytes.end.min(image.virtual_size_bytes()).max(guest_bytes.start);
        let mut is_plain = true;
        let is_known = image.map_cached(guest_bytes.start..end, &mut |extent| {
            is_plain &= !matches!(extent.place, Place::Encoded { .. });
            extent.push_to(extents);
        });
        if end < guest_bytes.end {
            let place = Place::Zero { reserved: None };
            extents.push(ImageExtent {
                guest_offset: end,
                len_bytes: guest_bytes.end - end,
                depth: 0,
                place,
            });
        }
        is_known && is_plain
    }

    /// Makes the map point at the bytes, which were written. Never waits.
    pub fn try_commit(mut self) -> Commit {
        let Some(token) = self.token.take() else { return Commit::Done };
        self.begin_notes();
        let Ok(writer) = self.ticket.image.writer() else { unreachable!("it was prepared by a writer") };
        self.token = writer.try_commit_write(token);
        if self.token.is_some() {
            return Commit::Blocks(self);
        }
        self.end_notes(true);
        self.ticket.image.gate.progressed();
        Commit::Done
    }

    /// Makes the map point at the bytes, which were written. May wait for locks and for tables to be read.
    ///
    /// # Errors
    /// When tables cannot be read or a rule of the format is broken; the map then does not point there.
    pub fn commit(mut self) -> Result<()> {
        let Some(token) = self.token.take() else { return Ok(()) };
        self.begin_notes();
        let result = self.ticket.image.writer().and_then(|writer| writer.commit_write(token));
        self.end_notes(result.is_ok());
        self.ticket.image.gate.progressed();
        result
    }
}

impl WriteTicket {
    /// Notes what is about to change, once.
    fn begin_notes(&mut self) {
        let noted = &self.ticket.image.noted;
        self.notes
            .extend(self.changes.drain(..).filter_map(|mapping| noted.begins(Change::Mapped(&mapping))));
    }

    fn end_notes(&mut self, has_happened: bool) {
        let noted = &self.ticket.image.noted;
        self.notes.drain(..).for_each(|id| noted.ended(Some(id), has_happened));
    }
}

impl Drop for WriteTicket {
    fn drop(&mut self) {
        let Some(token) = self.token.take() else { return };
        if let Ok(writer) = self.ticket.image.writer() {
            writer.abort_write(token);
        }
        self.end_notes(false);
        self.ticket.image.gate.progressed();
    }
}
