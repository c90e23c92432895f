//! Where bytes stand that the guest was told are written, and that no table of the image says yet: kept in the memory
//! that outlives the device, next to the [inflight](super::inflight) heads.
//!
//! Tables of an image are written when the guest flushes. Until then a new cluster is known to the device alone, and
//! would be lost with it under a guest that lives on. So each change of the map is noted here before its request is
//! answered ([`ChangeLog`]), and the device that takes the place of a dead one does it again ([`RedoLog::replay`]):
//! it reads the bytes from where they stand in the file, and writes them anew. The order, by number of the note:
//!
//! 1. A note's place is taken; 2. the note is written; 3. its number is: from now on it counts.
//! 4. After a flush, `tail` passes all notes that were there when it began.
//!
//! Dead between 1 and 3, the request was not answered, and is among the inflight heads. Dead between a flush and 4,
//! notes are done again that need not be, with the same bytes. The notes are read as a whole before the first is
//! done: doing one may take a cluster that another names.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use img_core::{
    Error,
    format::{HostFile, HostOffset, WriteStep},
    image::{ChangeLog, Image},
    storage::Identity,
};
use vm_memory::{MmapRegion, VolatileMemory};

/// Notes that there is room for. A flush is asked for when a quarter of them is taken, and new requests wait from the
/// half on, so that those under way find room.
const NOTES: u64 = NOTE_PLACES as u64;
const NOTE_PLACES: usize = 65536;

/// Bytes that notes may speak of before a flush is asked for: they are read into memory to be done again.
const MOST_BYTES: u64 = 64 << 20;

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

const MAPPED: u64 = 1;
const ZEROED: u64 = 2;
const DISCARDED: u64 = 3;

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
        let kind = self.load(at + KIND);
        Ok(Some(match kind & 0xff {
            ZEROED => Note::Zeroed(guest_bytes),
            DISCARDED => Note::Discarded(guest_bytes),
            MAPPED => {
                let len_bytes = guest_bytes.end - guest_bytes.start;
                *left_bytes = left_bytes
                    .checked_sub(len_bytes)
                    .ok_or(RedoError::Invalid("it speaks of too many bytes"))?;
                let file = u32::try_from(kind >> 8).map_err(|_| RedoError::Invalid("its file"))?;
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

    fn note(&self, kind: u64, guest_bytes: &Range<u64>, place: HostOffset) {
        let head = self.word(AT_HEAD);
        let number = head.fetch_add(1, Ordering::SeqCst);
        if number.wrapping_sub(self.load(AT_TAIL)) >= NOTES {
            self.store(AT_OVERFLOWED, 1);
            return;
        }
        let at = note(number);
        let len_bytes = guest_bytes.end - guest_bytes.start;
        self.store(at + KIND, kind);
        self.store(at + START, guest_bytes.start);
        self.store(at + LENGTH, len_bytes);
        self.store(at + PLACE, place.0);
        self.store(at + NUMBER, number.wrapping_add(1));
        if kind & 0xff == MAPPED {
            self.bytes.fetch_add(len_bytes, Ordering::Relaxed);
        }
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

    fn mapped(&self, step: &WriteStep) {
        self.note(MAPPED | u64::from(step.file.0) << 8, &step.guest_bytes, step.at);
    }

    fn zeroed(&self, guest_bytes: &Range<u64>) {
        self.note(ZEROED, guest_bytes, HostOffset(0));
    }

    fn discarded(&self, guest_bytes: &Range<u64>) {
        self.note(DISCARDED, guest_bytes, HostOffset(0));
    }

    fn flush_begins(&self) -> u64 {
        self.bytes.store(0, Ordering::Relaxed);
        self.load(AT_HEAD)
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
        format::OpenMode,
        image::{ImageName, OpenOptions},
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

    fn step(start: u64, len_bytes: u64, at: u64) -> WriteStep {
        WriteStep { guest_bytes: start..start + len_bytes, file: HostFile::IMAGE, at: HostOffset(at) }
    }

    /// A raw file stands in for an image that lost its tables: places are other guest bytes.
    #[test]
    fn what_was_noted_and_not_flushed_is_done_again_in_order() {
        let (_file, image) = image();
        image.write_at(&[7; 512], 0).expect("inside");
        image.write_at(&[8; 512], 512).expect("inside");
        let log = log();
        assert_eq!(log.replay(&image).expect("new memory"), 0);
        log.mapped(&step(8192, 512, 0));
        let begun = log.flush_begins();
        log.mapped(&step(4096, 1024, 0));
        log.zeroed(&(4096..4608));
        // Reads the place as it was before the notes are done: not what the first note put there.
        log.mapped(&step(0, 512, 512));
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
        (0..NOTES / 4).for_each(|_| log.zeroed(&(0..512)));
        assert!(log.wants_flush() && !log.is_nearly_full());
        (0..NOTES).for_each(|_| log.zeroed(&(0..512)));
        assert!(log.is_nearly_full());
        assert!(matches!(log.replay(&image), Err(RedoError::Overflowed)));
        log.zeroed(&(0..512));
        assert_eq!(log.replay(&image).expect("room again"), 1);
    }

    #[test]
    fn notes_of_another_image_are_refused() {
        let ((_one, one), (_other, other)) = (image(), image());
        let log = log();
        log.replay(&one).expect("new memory");
        log.zeroed(&(0..512));
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
