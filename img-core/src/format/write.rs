//! Changing a map in two steps: prepare, move bytes, commit.

use std::{fmt, ops::Range};

use super::{Backing, Extent, HostFile, HostOffset, OptionSet, Place};
use crate::{Error, Result, storage::Preallocation};

/// Where prepared guest bytes will live, and what must be written there before the commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WritePlan {
    /// The part of the request that this plan covers, a prefix, and where it goes.
    pub step: WriteStep,
    /// See [`PreparedWrite::fill_is_zeroed`].
    pub fill_is_zeroed: bool,
}

impl WritePlan {
    /// For layers: a write over what is there, without fills.
    #[must_use]
    pub fn in_place(guest_bytes: Range<u64>, file: HostFile, at: HostOffset) -> Self {
        Self { step: WriteStep::in_place(guest_bytes, file, at), fill_is_zeroed: false }
    }
}

/// Guest bytes, and where they stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Not empty.
    pub guest_bytes: Range<u64>,
    /// The file of the layer.
    pub file: HostFile,
    /// Where `guest_bytes.start` stands.
    pub at: HostOffset,
}

/// What is left to be done after a step of [`LayerWriter::amend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amended {
    /// Nothing.
    Complete,
    /// The disk has to get this size, in bytes, and the next step follows.
    Resize(u64),
    /// The layer writes nothing any more and is dropped without being closed; the next step is one of the image
    /// opened anew.
    OpenAgain,
}

/// Names a prepared write inside its layer. Made and understood by the layer only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WriteToken(pub u64);

/// What came of trying to do something at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt<T> {
    /// It is done.
    Done(T),
    /// Somebody who will be done soon is in the way: a write to the same clusters between its two steps, or whoever
    /// has the image alone. To be tried again when that has ended.
    Busy,
    /// It takes I/O, a copy, a decoder or a lock that somebody holds: for a thread that may block.
    Blocks,
}

/// What memory knows of a guest range in the layers below the top one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// It reads as zeroes.
    Zeroes,
    /// Where all of it stands, as it is or as zeroes.
    Plain,
    /// Too little, or that it has to be decoded.
    Unknown,
}

/// A part of a write, and where its bytes go. The file is one of the top layer's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteStep {
    /// Not empty.
    pub guest_bytes: Range<u64>,
    /// The file of the layer.
    pub file: HostFile,
    /// Where `guest_bytes.start` will stand.
    pub at: HostOffset,
    /// This many bytes before `at` are written too, with what the guest reads there now.
    pub fill_before_bytes: u64,
    /// This many bytes behind the written ones likewise.
    pub fill_after_bytes: u64,
    /// Guest bytes that the commit gives a new place, `guest_bytes` and what is filled among them, standing in one
    /// piece on the host. Empty for a write in place, and for the compressed form of a cluster.
    pub maps: Range<u64>,
}

impl WriteStep {
    /// For layers: a write over what is there.
    #[must_use]
    pub fn in_place(guest_bytes: Range<u64>, file: HostFile, at: HostOffset) -> Self {
        Self {
            maps: guest_bytes.start..guest_bytes.start,
            guest_bytes,
            file,
            at,
            fill_before_bytes: 0,
            fill_after_bytes: 0,
        }
    }

    /// Whether more is written than the guest's bytes.
    #[must_use]
    pub fn fills(&self) -> bool {
        self.fill_before_bytes > 0 || self.fill_after_bytes > 0
    }

    /// The part of the map that the commit changes.
    #[must_use]
    pub fn mapping(&self) -> Option<Mapping> {
        (!self.maps.is_empty()).then(|| {
            let before_bytes = self.guest_bytes.start - self.maps.start;
            Mapping {
                guest_bytes: self.maps.clone(),
                file: self.file,
                at: HostOffset(self.at.0 - before_bytes),
            }
        })
    }

    /// Appends `self` to `steps`, merging it with the last one where it continues it.
    pub(crate) fn push_to(self, steps: &mut Vec<Self>) {
        if let Some(last) = steps.last_mut()
            && last.guest_bytes.end == self.guest_bytes.start
            && last.file == self.file
            && last.at.0 + (last.guest_bytes.end - last.guest_bytes.start) == self.at.0
            && last.maps.is_empty() == self.maps.is_empty()
            && (last.fill_after_bytes, self.fill_before_bytes) == (0, 0)
        {
            last.guest_bytes.end = self.guest_bytes.end;
            last.fill_after_bytes = self.fill_after_bytes;
            if !self.maps.is_empty() {
                last.maps.end = self.maps.end;
            }
            return;
        }
        steps.push(self);
    }

    /// The steps of a write over what is there, appended to `steps`: one for each extent of `guest_bytes` that `map`
    /// tells, all of which are to be data that may be overwritten; `map` says whether it knows. `None` when it does
    /// not, and false when something else is there: what was appended is then good for nothing.
    pub(super) fn over_what_is_there(
        guest_bytes: &Range<u64>,
        steps: &mut Vec<Self>,
        map: impl FnOnce(&mut dyn FnMut(Extent)) -> Result<bool>,
    ) -> Result<Option<bool>> {
        let (mut at, mut is_whole) = (guest_bytes.start, true);
        let is_known = map(&mut |extent| {
            let guest_bytes = at..at + extent.len_bytes;
            at = guest_bytes.end;
            match extent.place {
                Place::Data { file, at, writable: true } => {
                    Self::in_place(guest_bytes, file, at).push_to(steps)
                }
                _ => is_whole = false,
            }
        })?;
        Ok(is_known.then_some(is_whole))
    }

    /// The host bytes that it writes.
    pub(super) fn host_bytes(&self) -> Range<u64> {
        self.at.0..self.at.0 + (self.guest_bytes.end - self.guest_bytes.start)
    }
}

/// A write whose place is reserved and whose bytes may be moved. [`commit`](Self::commit) makes the map
/// point there; dropping it undoes the reservation. While it lives, other writes to the same clusters wait
/// and the place is not given to anyone else. A thread that holds one must not prepare another write to
/// the same clusters.
#[must_use = "a prepared write that is dropped is undone"]
pub struct PreparedWrite<'a> {
    layer: &'a dyn LayerWriter,
    token: Option<WriteToken>,
    plan: WritePlan,
    frame: Frame,
}

/// What a format stores around the bytes of a prepared write: they are written together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    lead: [u8; Self::MAX_LEAD_BYTES],
    lead_bytes: usize,
    /// How many zeroes stand directly behind the bytes.
    pub pad_bytes: u32,
}

impl Frame {
    /// The longest lead that any format has.
    const MAX_LEAD_BYTES: usize = 12;

    /// What stands directly before the bytes, that is, before the plan's `at`.
    #[must_use]
    pub fn lead(&self) -> &[u8] {
        &self.lead[..self.lead_bytes]
    }
}

impl<'a> PreparedWrite<'a> {
    /// For layers.
    pub fn new(layer: &'a dyn LayerWriter, token: WriteToken, plan: WritePlan) -> Self {
        Self { layer, token: Some(token), plan, frame: Frame::default() }
    }

    /// For layers: the same with a frame around its bytes.
    ///
    /// # Panics
    /// When `lead` is longer than 12 bytes.
    pub fn framed(mut self, lead: &[u8], pad_bytes: u32) -> Self {
        self.frame.lead[..lead.len()].copy_from_slice(lead);
        self.frame.lead_bytes = lead.len();
        self.frame.pad_bytes = pad_bytes;
        self
    }

    /// What to write around the bytes.
    #[must_use]
    pub fn frame(&self) -> &Frame {
        &self.frame
    }

    /// What to write where.
    #[must_use]
    pub fn step(&self) -> &WriteStep {
        &self.plan.step
    }

    /// Whether what is to be filled reads as zeroes on the host already: a fill with zeroes may be left out.
    #[must_use]
    pub fn fill_is_zeroed(&self) -> bool {
        self.plan.fill_is_zeroed
    }

    /// Makes the map point at the written bytes.
    ///
    /// # Errors
    /// When tables cannot be read or a rule of the format is broken; the map is then unchanged.
    pub fn commit(mut self) -> Result<()> {
        let token = self.token.take().expect("taken only here and in drop");
        self.layer.commit_write(token)
    }
}

impl Drop for PreparedWrite<'_> {
    fn drop(&mut self) {
        if let Some(token) = self.token.take() {
            self.layer.abort_write(token);
        }
    }
}

impl fmt::Debug for PreparedWrite<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PreparedWrite").field("token", &self.token).field("plan", &self.plan).finish()
    }
}

/// The changing side of a layer. Changes are visible to [`map_range`](super::Layer::map_range) at once and
/// durable after [`flush`](Self::flush).
pub trait LayerWriter: Send + Sync {
    /// Reserves where a prefix of `guest_bytes` (not empty, inside the disk) will live. Waits while another
    /// write to one of its clusters is between prepare and commit.
    fn prepare_write(&self, guest_bytes: Range<u64>) -> Result<PreparedWrite<'_>>;

    /// Reserves `stored_bytes` for the compressed form of the whole cluster that starts at `guest_offset`, a
    /// byte inside the disk. The plan's `guest_bytes` is that cluster; exactly `stored_bytes` are to be written at
    /// `at`, no fill.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) when the image cannot hold compressed clusters.
    fn prepare_compressed(&self, guest_offset: u64, stored_bytes: u32) -> Result<PreparedWrite<'_>>;

    /// Finds or reserves places for all of `guest_bytes` (not empty, inside the disk), from memory alone and without
    /// waiting, and appends them to `steps`: bytes are overwritten in place, or they take new clusters whole, or in
    /// part. In that case the rest is [filled](WriteStep::fill_before_bytes) by the caller, unless it reads as zeroes
    /// and so does the host there; the map tells from memory what it reads as. `below` says the same of the layers
    /// below.
    ///
    /// The caller holds a lease from before the call until the bytes are written. Without a token there is nothing
    /// to commit. When it is not done, nothing is reserved, and what `steps` holds is good for nothing.
    ///
    /// An error is one that [`Self::prepare_write`] will meet again, and is not acted upon here.
    fn try_prepare_write(
        &self,
        guest_bytes: Range<u64>,
        below: &dyn Fn(Range<u64>) -> Below,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<Option<WriteToken>>> {
        let (_, _, _) = (guest_bytes, below, steps);
        Ok(Attempt::Blocks)
    }

    /// Ends a write that [`Self::try_prepare_write`] prepared, from memory alone and without waiting. What is left
    /// to be done is named by the token that comes back, for [`Self::commit_write`].
    fn try_commit_write(&self, token: WriteToken) -> Option<WriteToken> {
        Some(token)
    }

    /// Ends a prepared write; called by [`PreparedWrite::commit`].
    fn commit_write(&self, token: WriteToken) -> Result<()>;

    /// Undoes a prepared write; called when a [`PreparedWrite`] is dropped.
    fn abort_write(&self, token: WriteToken);

    /// Ranges given to [`write_zeroes`](Self::write_zeroes) and [`discard`](Self::discard) start and end on
    /// multiples of this, or at the end of the disk. No I/O.
    fn zero_granularity_bytes(&self) -> u64;

    /// Makes an aligned range read as zeroes without moving data. With `may_unmap` its space is given back.
    /// Returns false, having changed nothing, where the image has no way to say so (a version 2 qcow2 over
    /// a backing file): the caller then writes zeroes.
    fn write_zeroes(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<bool>;

    /// Gives the space of an aligned range back. What it reads as afterwards is the format's choice (zeroes
    /// here), never old data of someone else.
    fn discard(&self, guest_bytes: Range<u64>) -> Result<()>;

    /// Writes all changed metadata in its safe order and makes data and metadata durable.
    fn flush(&self) -> Result<()>;

    /// The files of the layer that are to be synced (`fdatasync`), where that is all that [`Self::flush`] would do now:
    /// whoever asks may do it instead. `None` where more is to be done, or memory does not tell. No I/O, never waits.
    fn files_to_sync(&self) -> Option<&'static [HostFile]> {
        None
    }

    /// From now on nothing new is put where the file ends or before, though nothing may stand there; or, with false, it
    /// is again. Formats that put everything behind the end anyway have nothing to do.
    ///
    /// # Errors
    /// When the length of the file cannot be had.
    fn keep_off_what_is_there(&self, keeps_off: bool) -> Result<()> {
        let _ = keeps_off;
        Ok(())
    }

    /// Comes before [`Self::resize`] to a larger size. When it returns true, the map may be asked about, and
    /// changed for, guest bytes up to `virtual_size_bytes` and the end of their cluster: what the new size
    /// would show, of the layers below or of an earlier and larger disk, can be made zero before it shows.
    /// The size stays as it is. False where the map has nothing behind the end and takes nothing there.
    fn prepare_growth(&self, virtual_size_bytes: u64) -> Result<bool> {
        let _ = virtual_size_bytes;
        Ok(false)
    }

    /// Changes the virtual size. No request is in flight. New guest bytes are unallocated unless they were
    /// changed since [`Self::prepare_growth`], or set aside as asked. Metadata preallocation maps them as
    /// well. The new size is durable after all changes before it.
    fn resize(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()>;

    /// Grows the disk as [`Self::resize`] does and maps the new guest bytes, but sets no space aside for them.
    /// Formats without a map refuse.
    fn grow_mapped(&self, virtual_size_bytes: u64) -> Result<()> {
        let _ = virtual_size_bytes;
        Err(Error::Invalid("Unsupported preallocation mode: metadata".to_owned()))
    }

    /// Records another backing file, or none, and makes that durable. What the layer holds stays as it is, and so
    /// does the chain that is open: the name counts when the image is opened the next time.
    ///
    /// # Errors
    /// [`Error::Invalid`], in the reference's words, when the format cannot record it.
    fn set_backing(&self, backing: Option<&Backing>) -> Result<()> {
        let _ = backing;
        Err(Error::Invalid("Operation not supported".to_owned()))
    }

    /// Goes a step towards an image that has the options `wanted`, whose names are those of
    /// [`Driver::amend_options`](super::Driver::amend_options), and makes it durable. All of `wanted` is judged before
    /// the first change. No request is in flight. `progress` is told how much is done of all that is left, this step
    /// included.
    ///
    /// # Errors
    /// [`Error::Invalid`], in the reference's words, when an option cannot be changed so.
    fn amend(&self, wanted: &OptionSet, progress: &mut dyn FnMut(u64, u64)) -> Result<Amended> {
        let (_, _) = (wanted, progress);
        Err(Error::Invalid("the format has no options that can be changed".to_owned()))
    }

    /// Makes the layer silent all over, so that the layers below show through, and gives its space back. No
    /// request is in flight. Returns false, having changed nothing, where the format has no way to do so.
    fn make_empty(&self) -> Result<bool> {
        Ok(false)
    }

    /// Last flush before the layer is dropped; afterwards the image is marked clean. No request is in
    /// flight, and none follows.
    fn close(&self) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_continue_each_other_are_one_and_keep_what_they_map() {
        let in_place =
            |start: u64| WriteStep::in_place(start..start + 512, HostFile::IMAGE, HostOffset(65536 + start));
        let mut steps = Vec::new();
        (0..3).for_each(|number| in_place(512 * number).push_to(&mut steps));
        assert_eq!(steps.len(), 1);
        assert_eq!(steps[0].mapping(), None, "nothing of the map changes");
        // The next one takes a new cluster, of which it fills the end.
        WriteStep { maps: 1536..4096, ..in_place(1536) }.push_to(&mut steps);
        WriteStep { maps: 4096..8192, fill_after_bytes: 512, ..in_place(2048) }.push_to(&mut steps);
        assert_eq!(steps.len(), 2);
        assert_eq!((steps[1].fills(), steps[1].fill_after_bytes), (true, 512));
        // Between two guest bytes that are written together nothing else is.
        WriteStep { maps: 8192..9216, ..in_place(2560) }.push_to(&mut steps);
        assert_eq!(steps.len(), 3);
        WriteStep { maps: 9216..9728, fill_before_bytes: 512, ..in_place(3072) }.push_to(&mut steps);
        assert_eq!(steps.len(), 4);
        let mapping =
            Mapping { guest_bytes: 1536..8192, file: HostFile::IMAGE, at: HostOffset(65536 + 1536) };
        assert_eq!(steps[1].mapping(), Some(mapping));
    }
}
