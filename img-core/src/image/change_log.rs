//! Changes of the map that are not durable, told to somebody who outlives this process.
//!
//! Tables are written when the disk is flushed. A process that dies before takes with it where bytes stand that it has
//! written and acknowledged; a guest that lives on would miss them. A [`ChangeLog`] is told of each such change
//! before its request ends, and of each flush, after which the changes before it need not be known any more. It is no
//! journal: power cuts are what the order of writes is for, and the log may be lost with them.

use std::{
    fmt,
    ops::Range,
    sync::{Arc, PoisonError, RwLock},
};

use super::Image;
use crate::{
    Result,
    format::{HostFile, LayerWriter, WriteStep},
    storage::Identity,
};

/// Where changes are noted. Called by any thread; never waits.
pub trait ChangeLog: Send + Sync + fmt::Debug {
    /// What comes is of this image, whose changes so far are durable.
    fn begin(&self, image: Option<Identity>);

    /// Guest bytes stand where the step says.
    fn mapped(&self, step: &WriteStep);

    /// Guest bytes read as zeroes.
    fn zeroed(&self, guest_bytes: &Range<u64>);

    /// Guest bytes were discarded.
    fn discarded(&self, guest_bytes: &Range<u64>);

    /// A flush begins. Gives it a name: it will cover what was noted so far.
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

    /// [`Self::flush`] for who holds a pass.
    pub(super) fn flush_inside(&self) -> Result<()> {
        let mut begun = None;
        self.noted.note(|log| begun = Some(log.flush_begins()));
        let result = self.layers[0].writer().map_or(Ok(()), LayerWriter::flush);
        self.gate.progressed();
        result?;
        self.noted.note(|log| {
            if let Some(begun) = begun {
                log.flushed(begun);
            }
        });
        Ok(())
    }
}
