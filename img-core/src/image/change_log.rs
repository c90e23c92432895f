//! Changes of the map that are not durable, told to somebody who outlives this process.
//!
//! Tables are written when the disk is flushed. A process that dies before takes with it where bytes stand that it has
//! written and acknowledged; a guest that lives on would miss them. A [`ChangeLog`] is told of each such change
//! before anyone can see it: once it is seen, others write to the same place and are told nothing. It is told when
//! the change has happened, as no flush that began before covers it for certain, and of each flush, after which the
//! changes before it need not be known any more. It is no journal: power cuts are what the order of writes is for,
//! and the log may be lost with them.

use std::{
    fmt,
    ops::Range,
    sync::{Arc, PoisonError},
};

use super::Image;
use crate::{
    Result,
    format::{HostFile, LayerWriter, Mapping},
    storage::Identity,
    sync::RwLock,
};

/// A change of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// Guest bytes stand, all of them, where it says.
    Mapped(&'a Mapping),
    /// Guest bytes read as zeroes.
    Zeroed(&'a Range<u64>),
    /// Guest bytes were discarded.
    Discarded(&'a Range<u64>),
}

/// The name of a note in its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoteId(pub u64);

/// Where changes are noted. Called by any thread; never waits.
pub trait ChangeLog: Send + Sync + fmt::Debug {
    /// What comes is of this image, whose changes so far are durable.
    fn begin(&self, image: Option<Identity>);

    /// A change is about to happen.
    fn begins(&self, change: Change<'_>) -> NoteId;

    /// It has; or it has not, and the note is void.
    fn ended(&self, note: NoteId, has_happened: bool);

    /// A flush begins. Gives it a name: it will cover the changes that have happened so far.
    fn flush_begins(&self) -> u64;

    /// The flush of that name has succeeded.
    fn flushed(&self, begun: u64);
}

/// The log of an image, if there is one.
#[derive(Debug, Default)]
pub(super) struct Noted(RwLock<Option<Arc<dyn ChangeLog>>>);

impl Noted {
    pub(super) fn note(&self, note: impl FnOnce(&dyn ChangeLog)) {
        if let Some(log) = &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            note(&**log);
        }
    }

    pub(super) fn is_kept(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    pub(super) fn begins(&self, change: Change<'_>) -> Option<NoteId> {
        let mut id = None;
        self.note(|log| id = Some(log.begins(change)));
        id
    }

    pub(super) fn ended(&self, id: Option<NoteId>, has_happened: bool) {
        if let Some(id) = id {
            self.note(|log| log.ended(id, has_happened));
        }
    }

    /// Does what changes the map, and says whether it did.
    pub(super) fn around(&self, change: Change<'_>, act: impl FnOnce() -> Result<bool>) -> Result<bool> {
        let id = self.begins(change);
        let result = act();
        self.ended(id, matches!(result, Ok(true)));
        result
    }
}

impl Image {
    /// Tells `log` from now on of each change of the map, or nobody; no request is under way, and all is flushed. What
    /// an image without a map writes is where the next process looks for it, and needs no log.
    pub fn keep_change_log(&self, log: Option<Arc<dyn ChangeLog>>) {
        if let Some(log) = &log {
            log.begin(self.storage(0, HostFile::IMAGE).and_then(|file| file.identity()));
        }
        let log = log.filter(|_| self.layers[0].cluster_size_bytes().is_some());
        *self.noted.0.write().unwrap_or_else(PoisonError::into_inner) = log;
    }

    /// From now on nothing new is put into the part of the file that there is now, or, with false, it is again: what
    /// no table names there may be what the notes of a process that died speak of.
    ///
    /// # Errors
    /// When the length of the file cannot be had.
    pub fn keep_off_what_is_there(&self, keeps_off: bool) -> Result<()> {
        self.layers[0].writer().map_or(Ok(()), |writer| writer.keep_off_what_is_there(keeps_off))
    }

    /// Whether changes of the map are told to a log.
    #[must_use]
    pub fn notes_changes(&self) -> bool {
        self.noted.is_kept()
    }

    /// [`Self::flush`] for who holds a pass.
    pub(super) fn flush_inside(&self) -> Result<()> {
        let begun = self.flush_begins();
        let result = self.layers[0].writer().map_or(Ok(()), LayerWriter::flush);
        self.gate.progressed();
        result?;
        self.flush_has_ended(begun);
        Ok(())
    }

    /// Names a flush in the log, if there is one. All that is changed by now is made durable after that.
    pub(super) fn flush_begins(&self) -> Option<u64> {
        let mut begun = None;
        self.noted.note(|log| begun = Some(log.flush_begins()));
        begun
    }

    /// The flush of that name has succeeded.
    pub(super) fn flush_has_ended(&self, begun: Option<u64>) {
        self.noted.note(|log| {
            if let Some(begun) = begun {
                log.flushed(begun);
            }
        });
    }
}
