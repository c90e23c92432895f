//! Where bytes stand that the guest was told are written, and that no table of the image says yet: kept in the memory
//! that outlives the device, next to the [inflight](super::inflight) heads.
//!
//! Tables of an image are written when the guest flushes. Until then a new cluster is known to the device alone, and
//! would be lost with it under a guest that lives on. So each change of the map is noted here before anyone sees it
//! ([`ChangeLog`]), and the device that takes the place of a dead one does it again ([`RedoLog::replay`]): it reads
//! the bytes from where they stand in the file, and writes them anew. Writes in place are not noted: what they wrote
//! stands in a cluster that a note names as a whole, or that a flush made durable. The order, by number of the note:
//!
//! 1. A note's place is taken; 2. the note is written as one of a change to come; 3. its number is: from now on it
//!    counts. 4. The map is changed. 5. The note is one of a change that has happened, or is void when it has not.
//! 6. After a flush, `tail` passes the notes that were there when it began, up to the first of a change to come.
//!
//! Dead before 5, the request was not answered, and is among the inflight heads; all of its bytes stand there since
//! 1, and doing the note again gives the other bytes of its clusters to whoever wrote them after 4. Dead between a
//! flush and 6, notes are done again that need not be, with the same bytes. The notes are read as a whole before
//! the first is done: doing one may take a cluster that another names.

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

/// Notes that there is room for. A flush is asked for when a quarter of them is taken, and new requests wait from the
/// half on, so that those under way find room.
const NOTES: u64 = NOTE_PLACES as u64;
const NOTE_PLACES: usize = 65536;

/// Bytes that notes may speak of before a flush is asked for: they are read into memory to be done again.
const MOST_BYTES: u64 = 256 << 20;

/// Bytes that are read for notes at most: those of requests under way come on top of [`MOST_BYTES`].
const MOST_REPLAYED_BYTES: u64 = 1 << 30;

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
    #[error(transparent)]
    Image(#[from] Error),
}

/// One note that counts.
enum Note {
    Mapped { guest_bytes: Range<u64>, bytes: Vec<u8> },
    Zeroed(Range<u64>),
    Discarded(Range<u64>),
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
    /// [`RedoError`]; the notes are forgotten then as well.
    pub fn replay(&self, image: &Image) -> Result<u64, RedoError> {
        let identity = image.storage(0, HostFile::IMAGE).and_then(|storage| storage.identity());
        let result = if self.load(AT_MAGIC) == MAGIC {
            let known = (self.load(AT_DEVICE), self.load(AT_INODE));
            self.replay_for(image, known == numbers(identity))
        } else {
            Ok(0)
        };
        self.begin(identity);
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
        let mut notes = Vec::new();
        let mut left_bytes = MOST_REPLAYED_BYTES;
        for number in 0..count {
            notes.extend(self.read(tail.wrapping_add(number), image, &mut left_bytes)?);
        }
        for note in &notes {
            match note {
                Note::Mapped { guest_bytes, bytes } => image.write_at(bytes, guest_bytes.start)?,
                Note::Zeroed(guest_bytes) => image.write_zeroes(guest_bytes.clone(), true)?,
                Note::Discarded(guest_bytes) => image.discard(guest_bytes.clone())?,
            }
        }
        image.flush()?;
        Ok(notes.len() as u64)
    }

    /// The note of that number with the bytes that it speaks of. `None` when it was not finished, or lies behind the
    /// end of a disk that shrank.
    fn read(&self, number: u64, image: &Image, left_bytes: &mut u64) -> Result<Option<Note>, RedoError> {
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
        Ok(Some(match kind & 0xff {
            VOID => return Ok(None),
            ZEROED => Note::Zeroed(guest_bytes),
            DISCARDED => Note::Discarded(guest_bytes),
            MAPPED => {
                let len_bytes = guest_bytes.end - guest_bytes.start;
                *left_bytes = left_bytes
                    .checked_sub(len_bytes)
                    .ok_or(RedoError::Invalid("it speaks of too many bytes"))?;
                let file = u32::try_from(kind >> FILE_SHIFT).map_err(|_| RedoError::Invalid("its file"))?;
                let file = image.storage(0, HostFile(file)).ok_or(RedoError::Invalid("its file"))?;
                let place = self.load(at + PLACE);
                let inside = place.checked_add(len_bytes).is_some_and(|end| {
                    file.len_bytes().is_ok_and(|file_bytes| end <= file_bytes.next_multiple_of(1 << 21))
                });
                if !inside {
                    return Err(RedoError::Invalid("its place is behind the end of the file"));
                }
                let mut bytes =
                    vec![0; usize::try_from(len_bytes).map_err(|_| RedoError::Invalid("its length"))?];
                file.read_at(&mut bytes, place)?;
                Note::Mapped { guest_bytes, bytes }
            }
            _ => return Err(RedoError::Invalid("its kind")),
        }))
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
mod tests {
    use img_core::{
        format::{Attempt, HostOffset, Mapping, OpenMode},
        image::{Commit, ImageName, OpenOptions},
    };
    use proptest::{collection::vec, prelude::*};
    use vm_memory::Bytes;

    use super::*;

    const DISK_BYTES: u64 = 1 << 20;

    fn image() -> (tempfile::NamedTempFile, Image) {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(DISK_BYTES).expect("space");
        let name = ImageName::parse(file.path().to_str().expect("UTF-8")).expect("a plain name");
        let options = OpenOptions { format: Some("raw".to_owned()), ..OpenOptions::new(OpenMode::Write) };
        let image = Image::open(&name, &options).expect("it opens");
        (file, image)
    }

    fn log() -> RedoLog {
        RedoLog::new(Arc::new(MmapRegion::new(RedoLog::BYTES + 8).expect("memory")), 8)
    }

    fn happens(log: &RedoLog, change: Change<'_>) {
        log.ended(log.begins(change), true);
    }

    fn mapping(start: u64, len_bytes: u64, at: u64) -> Mapping {
        Mapping { guest_bytes: start..start + len_bytes, file: HostFile::IMAGE, at: HostOffset(at) }
    }

    /// A raw file stands in for an image that lost its tables: places are other guest bytes.
    #[test]
    fn what_was_noted_and_not_flushed_is_done_again_in_order() {
        let (_file, image) = image();
        image.write_at(&[7; 512], 0).expect("inside");
        image.write_at(&[8; 512], 512).expect("inside");
        let log = log();
        assert_eq!(log.replay(&image).expect("new memory"), 0);
        happens(&log, Change::Mapped(&mapping(8192, 512, 0)));
        let begun = log.flush_begins();
        happens(&log, Change::Mapped(&mapping(4096, 1024, 0)));
        happens(&log, Change::Zeroed(&(4096..4608)));
        // Reads the place as it was before the notes are done: not what the first note put there.
        happens(&log, Change::Mapped(&mapping(0, 512, 512)));
        log.flushed(begun);
        assert_eq!(log.replay(&image).expect("its own notes"), 3);
        let mut bytes = vec![0; 9216];
        image.read_at(&mut bytes, 0).expect("inside");
        assert!(bytes[..512].iter().all(|&byte| byte == 8));
        assert!(bytes[4096..4608].iter().all(|&byte| byte == 0));
        assert!(bytes[4608..5120].iter().all(|&byte| byte == 8));
        assert!(bytes[8192..8704].iter().all(|&byte| byte == 0), "a flush covered it");
        assert_eq!(log.replay(&image).expect("no notes"), 0);
    }

    #[test]
    fn more_notes_than_there_is_room_for_are_told() {
        let (_file, image) = image();
        let log = log();
        log.replay(&image).expect("new memory");
        (0..NOTES / 4).for_each(|_| happens(&log, Change::Zeroed(&(0..512))));
        assert!(log.wants_flush() && !log.is_nearly_full());
        (0..NOTES).for_each(|_| happens(&log, Change::Zeroed(&(0..512))));
        assert!(log.is_nearly_full());
        assert!(matches!(log.replay(&image), Err(RedoError::Overflowed)));
        happens(&log, Change::Zeroed(&(0..512)));
        assert_eq!(log.replay(&image).expect("room again"), 1);
    }

    #[test]
    fn a_flush_covers_no_change_that_is_still_to_come() {
        let (_file, image) = image();
        let log = log();
        log.replay(&image).expect("new memory");
        happens(&log, Change::Zeroed(&(0..512)));
        let to_come = log.begins(Change::Zeroed(&(512..1024)));
        happens(&log, Change::Zeroed(&(1024..1536)));
        log.flushed(log.flush_begins());
        assert_eq!(log.taken(), 2, "the one to come, and the one behind it");
        log.ended(to_come, true);
        log.flushed(log.flush_begins());
        assert_eq!(log.taken(), 0);
        let void = log.begins(Change::Zeroed(&(0..512)));
        log.ended(void, false);
        assert_eq!(log.replay(&image).expect("its own notes"), 0, "what never happened is not done");
    }

    /// A write into a new cluster is noted, with the zeroes around it; the write next to it in the same cluster is in
    /// place, and is not. Both are there again when the device died before the table was written.
    #[test]
    fn what_is_written_in_place_into_a_noted_cluster_is_not_lost() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk");
        let name = crate::engine::tests::image(directory.path(), "disk", "qcow2", &[], DISK_BYTES, None);
        let open = || Arc::new(Image::open(&name, &OpenOptions::new(OpenMode::Write)).expect("it opens"));
        for through_memory in [false, true] {
            let image = open();
            let write = |byte, at| {
                let bytes = [byte; 4096];
                if !through_memory {
                    return image.write_at(&bytes, at).expect("inside");
                }
                let mut steps = Vec::new();
                let attempt = image.try_prepare_write(at..at + 4096, &mut steps).expect("inside");
                let Attempt::Done(ticket) = attempt else { panic!("all is in memory") };
                let file = image.storage(0, steps[0].file).expect("it has it");
                file.write_at(&bytes, steps[0].at.0).expect("space");
                assert!(matches!(ticket.try_commit(), Commit::Done));
            };
            // From here on memory knows the table and the counts.
            let first = if through_memory { 128 << 10 } else { 0 };
            image.write_at(&[1; 4096], first + (512 << 10)).expect("inside");
            image.flush().expect("space");
            let log = Arc::new(log());
            log.replay(&image).expect("new memory");
            image.keep_change_log(Some(Arc::clone(&log) as Arc<dyn ChangeLog>));
            write(2, first + 8192);
            write(3, first);
            write(4, first + (60 << 10));
            assert_eq!(log.taken(), 1);
            let file = std::fs::read(&path).expect("it is there");
            drop(image);
            // As if it had not been closed.
            std::fs::write(&path, file).expect("space");
            let image = open();
            assert_eq!(log.replay(&image).expect("its own notes"), 1);
            for (byte, at) in [(2, 8192), (3, 0), (4, 60 << 10), (0, 4096), (0, 64 << 10)] {
                let mut bytes = [9; 4096];
                image.read_at(&mut bytes, first + at).expect("inside");
                assert!(bytes.iter().all(|&found| found == byte), "{at} reads {}, not {byte}", bytes[0]);
            }
        }
    }

    #[test]
    fn notes_of_another_image_are_refused() {
        let ((_one, one), (_other, other)) = (image(), image());
        let log = log();
        log.replay(&one).expect("new memory");
        happens(&log, Change::Zeroed(&(0..512)));
        assert!(matches!(log.replay(&other), Err(RedoError::OtherImage)));
    }

    proptest! {
        /// Whatever a front end gives back: an answer.
        #[test]
        fn hostile_notes_are_done_or_refused(words in vec(prop_oneof![0u64..4096, any::<u64>()], 0..64), sane: bool) {
            let (_file, image) = image();
            let log = log();
            log.replay(&image).expect("new memory");
            let view = log.memory.get_slice(8, RedoLog::BYTES).expect("inside");
            let from = if sane { HEADER_BYTES } else { AT_HEAD };
            for (at, word) in words.iter().enumerate() {
                view.write_obj(*word, from + 8 * at).expect("inside");
            }
            if sane {
                log.store(AT_HEAD, 8);
                (0..8).for_each(|number| log.store(note(number) + NUMBER, number + 1));
                (0..8).for_each(|number| log.store(note(number) + KIND, number % 5));
            }
            let _told_by_the_caller = log.replay(&image);
            prop_assert_eq!(log.replay(&image).expect("no notes"), 0);
        }
    }
}
