//! Where bytes stand that the guest was told are written, and that no table of the image says yet: kept in the memory
//! that outlives the device, next to the [inflight](super::inflight) heads.
//!
//! Tables of an image are written when the guest flushes. Until then a new cluster is known to the device alone, and
//! would be lost with it under a guest that lives on. So each change of the map is noted here before anyone sees it
//! ([`ChangeLog`]), and the device that takes the place of a dead one does it again ([`RedoLog::replay`]): it reads
//! the bytes from where they stand in the file, and writes them anew. Writes in place are not noted: what they wrote
//! stands in a cluster that a note names as a whole, or that a flush made durable. Zeroes that a format puts in place
//! (QED, VHD, VMDK) are such writes, though they are noted: only what is not stored is made zero again. The order, by
//! number of the note:
//!
//! 1. A note's place is taken; 2. the note is written as one of a change to come; 3. its number is: from now on it
//!    counts. 4. The map is changed. 5. The note is one of a change that has happened, or is void when it has not.
//! 6. After a flush, `tail` passes the notes that were there when it began, up to the first of a change to come.
//!
//! Dead before 5, the request was not answered, and is among the inflight heads; all of its bytes stand there since
//! 1, and doing the note again gives the other bytes of its clusters to whoever wrote them after 4. Dead between a
//! flush and 6, notes are done again that need not be, with the same bytes.
//!
//! Dead while notes are done again, all of them are done once more. So none of the places that they name is taken until
//! the last of them is durable: new clusters are put behind the end of the file meanwhile
//! ([`Image::keep_off_what_is_there`]), and nothing is written over them but what they have.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use img_core::{
    Error,
    format::HostFile,
    image::{Change, ChangeLog, Image, NoteId},
    storage::Identity,
};
use vm_memory::{MmapRegion, VolatileMemory};

use self::outcome::{Became, Outcome};

mod outcome;

/// Notes that there is room for. A flush is asked for when a quarter of them is taken, and new requests wait from the
/// half on, so that those under way find room.
const NOTES: u64 = NOTE_PLACES as u64;
const NOTE_PLACES: usize = 65536;

/// Bytes that notes may speak of before a flush is asked for: so long a guest waits, at most about, for them to be moved
/// when its device has died.
const MOST_BYTES: u64 = 256 << 20;

/// "REDOLOG1".
const MAGIC: u64 = u64::from_le_bytes(*b"REDOLOG1");

// Words of the header.
const AT_MAGIC: usize = 0;
const AT_DEVICE: usize = 8;
const AT_INODE: usize = 16;
const AT_HEAD: usize = 24;
const AT_TAIL: usize = 32;
const AT_OVERFLOWED: usize = 40;
const HEADER_BYTES: usize = 64;

// Words of a note.
const NUMBER: usize = 0;
const KIND: usize = 8;
const START: usize = 16;
const LENGTH: usize = 24;
const PLACE: usize = 32;
const NOTE_BYTES: usize = 40;

// The kind of a note: its low byte; for `MAPPED` the file above it; a flag.
const VOID: u64 = 0;
const MAPPED: u64 = 1;
const ZEROED: u64 = 2;
const DISCARDED: u64 = 3;
const FILE_SHIFT: u32 = 8;
/// The change is still to come.
const TO_COME: u64 = 1 << 63;

/// The number of a note that there was no room for.
const NO_ROOM: NoteId = NoteId(u64::MAX);

/// The log in a part of shared memory.
#[derive(Debug)]
pub struct RedoLog {
    memory: Arc<MmapRegion<()>>,
    at: usize,
    /// That notes spoke of since the last flush began.
    bytes: AtomicU64,
}

/// Why notes of an earlier device were not done again.
#[derive(Debug, thiserror::Error)]
pub enum RedoError {
    /// They are of another image.
    #[error("the front end's memory is of a device with another image")]
    OtherImage,
    /// There were more than there is room for.
    #[error("changes that were not flushed are lost with the device that died: it had no room to note them")]
    Overflowed,
    /// What they say cannot be.
    #[error("the front end's memory holds a note that cannot be: {0}")]
    Invalid(&'static str),
    /// The image.
    #[error("changes of a device that died cannot be done again: {0}")]
    Image(#[from] Error),
}

impl RedoLog {
    /// Bytes of shared memory for a log.
    pub const BYTES: usize = HEADER_BYTES + NOTE_BYTES * NOTE_PLACES;

    /// The log `at` bytes into `memory`, a multiple of 8; all of [`Self::BYTES`] are there.
    #[must_use]
    pub(super) fn new(memory: Arc<MmapRegion<()>>, at: usize) -> Self {
        Self { memory, at, bytes: AtomicU64::new(0) }
    }

    /// Does again what an earlier device noted and nobody flushed, durably, and forgets it: how many notes.
    ///
    /// # Errors
    /// [`RedoError`]; the notes are forgotten then as well, but for [`RedoError::Image`]: they are kept, and so are the
    /// places that they name, for the next try.
    pub fn replay(&self, image: &Image) -> Result<u64, RedoError> {
        let identity = image.storage(0, HostFile::IMAGE).and_then(|storage| storage.identity());
        let result = if self.load(AT_MAGIC) == MAGIC {
            let known = (self.load(AT_DEVICE), self.load(AT_INODE));
            image.keep_off_what_is_there(true)?;
            self.replay_for(image, known == numbers(identity))
        } else {
            Ok(0)
        };
        if !matches!(result, Err(RedoError::Image(_))) {
            self.begin(identity);
            image.keep_off_what_is_there(false)?;
        }
        result
    }

    fn replay_for(&self, image: &Image, is_same: bool) -> Result<u64, RedoError> {
        let (tail, head) = (self.load(AT_TAIL), self.load(AT_HEAD));
        let count = head.wrapping_sub(tail);
        if count == 0 {
            return Ok(0);
        }
        if !is_same {
            return Err(RedoError::OtherImage);
        }
        if self.load(AT_OVERFLOWED) != 0 || count > NOTES {
            return Err(RedoError::Overflowed);
        }
        let in_place = image.layers()[0].zeroes_in_place();
        let (mut outcome, mut found) = (Outcome::default(), 0);
        for number in 0..count {
            if let Some((guest_bytes, became)) = self.read(tail.wrapping_add(number), image)? {
                outcome.add(guest_bytes, became, in_place);
                found += 1;
            }
        }
        outcome.bring_about(image)?;
        image.flush()?;
        Ok(found)
    }

    /// The note of that number. `None` when it was not finished, or lies behind the end of a disk that shrank.
    fn read(&self, number: u64, image: &Image) -> Result<Option<(Range<u64>, Became)>, RedoError> {
        let at = note(number);
        if self.load(at + NUMBER) != number.wrapping_add(1) {
            return Ok(None);
        }
        let start = self.load(at + START);
        let end = start.checked_add(self.load(at + LENGTH)).ok_or(RedoError::Invalid("its range wraps"))?;
        let guest_bytes = start..end.min(image.virtual_size_bytes());
        if guest_bytes.is_empty() {
            return Ok(None);
        }
        let kind = self.load(at + KIND) & !TO_COME;
        let became = match kind & 0xff {
            VOID => return Ok(None),
            ZEROED => Became::Zeroed,
            DISCARDED => Became::Discarded,
            MAPPED => {
                let number = u32::try_from(kind >> FILE_SHIFT).map_err(|_| RedoError::Invalid("its file"))?;
                let file = HostFile(number);
                let storage = image.storage(0, file).ok_or(RedoError::Invalid("its file"))?;
                let place = self.load(at + PLACE);
                let inside = place.checked_add(guest_bytes.end - guest_bytes.start).is_some_and(|end| {
                    storage.len_bytes().is_ok_and(|file_bytes| end <= file_bytes.next_multiple_of(1 << 21))
                });
                if !inside {
                    return Err(RedoError::Invalid("its place is behind the end of the file"));
                }
                Became::Mapped { file, place }
            }
            _ => return Err(RedoError::Invalid("its kind")),
        };
        Ok(Some((guest_bytes, became)))
    }

    /// Whether it is time for a flush.
    #[must_use]
    pub fn wants_flush(&self) -> bool {
        self.taken() >= NOTES / 4 || self.bytes.load(Ordering::Relaxed) >= MOST_BYTES
    }

    /// Whether no more requests should begin before there was one.
    #[must_use]
    pub fn is_nearly_full(&self) -> bool {
        self.taken() >= NOTES / 2 || self.bytes.load(Ordering::Relaxed) >= 2 * MOST_BYTES
    }

    fn taken(&self) -> u64 {
        self.load(AT_HEAD).wrapping_sub(self.load(AT_TAIL))
    }

    /// Takes the place of a note. `None` when there is no room.
    fn take_number(&self) -> Option<u64> {
        let head = self.word(AT_HEAD);
        let has_room = |number: u64| number.wrapping_sub(self.load(AT_TAIL)) < NOTES;
        head.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |number| {
            has_room(number).then(|| number.wrapping_add(1))
        })
        .ok()
    }

    /// Whether the change of that note has happened, or never will.
    fn is_settled(&self, number: u64) -> bool {
        let at = note(number);
        self.load(at + NUMBER) == number.wrapping_add(1) && self.load(at + KIND) & TO_COME == 0
    }

    /// A word of the log. All offsets are inside: see [`Self::new`].
    fn word(&self, offset: usize) -> &AtomicU64 {
        self.memory.get_atomic_ref(self.at + offset).expect("inside the mapping, and aligned")
    }

    fn load(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::SeqCst)
    }

    fn store(&self, offset: usize, value: u64) {
        self.word(offset).store(value, Ordering::SeqCst);
    }
}

/// Where the note of that number is.
fn note(number: u64) -> usize {
    HEADER_BYTES + NOTE_BYTES * usize::try_from(number % NOTES).expect("below 65536")
}

fn numbers(identity: Option<Identity>) -> (u64, u64) {
    identity.map_or((0, 0), |identity| (identity.device, identity.inode))
}

impl ChangeLog for RedoLog {
    fn begin(&self, image: Option<Identity>) {
        let (device, inode) = numbers(image);
        self.store(AT_TAIL, self.load(AT_HEAD));
        self.store(AT_OVERFLOWED, 0);
        self.store(AT_DEVICE, device);
        self.store(AT_INODE, inode);
        self.store(AT_MAGIC, MAGIC);
    }

    fn begins(&self, change: Change<'_>) -> NoteId {
        let (kind, guest_bytes, place) = match change {
            Change::Mapped(mapping) => {
                let kind = MAPPED | u64::from(mapping.file.0) << FILE_SHIFT;
                (kind, &mapping.guest_bytes, mapping.at.0)
            }
            Change::Zeroed(guest_bytes) => (ZEROED, guest_bytes, 0),
            Change::Discarded(guest_bytes) => (DISCARDED, guest_bytes, 0),
        };
        let Some(number) = self.take_number() else {
            self.store(AT_OVERFLOWED, 1);
            return NO_ROOM;
        };
        let at = note(number);
        let len_bytes = guest_bytes.end - guest_bytes.start;
        self.store(at + KIND, kind | TO_COME);
        self.store(at + START, guest_bytes.start);
        self.store(at + LENGTH, len_bytes);
        self.store(at + PLACE, place);
        self.store(at + NUMBER, number.wrapping_add(1));
        if kind & 0xff == MAPPED {
            self.bytes.fetch_add(len_bytes, Ordering::Relaxed);
        }
        NoteId(number)
    }

    fn ended(&self, id: NoteId, has_happened: bool) {
        if id == NO_ROOM {
            // A flush that began before the change may have ended the overflow, and does not cover it.
            self.store(AT_OVERFLOWED, 1);
        } else if has_happened {
            self.word(note(id.0) + KIND).fetch_and(!TO_COME, Ordering::SeqCst);
        } else {
            self.store(note(id.0) + KIND, VOID);
        }
    }

    fn flush_begins(&self) -> u64 {
        self.bytes.store(0, Ordering::Relaxed);
        let (tail, head) = (self.load(AT_TAIL), self.load(AT_HEAD));
        let count = head.wrapping_sub(tail).min(NOTES);
        (0..count)
            .map(|number| tail.wrapping_add(number))
            .find(|number| !self.is_settled(*number))
            .unwrap_or(tail.wrapping_add(count))
    }

    fn flushed(&self, begun: u64) {
        // Of several flushes the latest counts. An overflow is over when what it lost is durable.
        let tail = self.word(AT_TAIL);
        let mut seen = tail.load(Ordering::SeqCst);
        while begun > seen {
            match tail.compare_exchange(seen, begun, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => break,
                Err(now) => seen = now,
            }
        }
        if self.taken() == 0 {
            self.store(AT_OVERFLOWED, 0);
        }
    }
}

#[cfg(test)]
mod tests;
