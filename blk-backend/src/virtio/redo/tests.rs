//! Notes as they are left by devices that die, and as front ends give them back.

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

/// All words of the log, and how they are put back.
fn words(log: &RedoLog) -> Vec<u64> {
    (0..RedoLog::BYTES).step_by(8).map(|at| log.load(at)).collect()
}

fn put_back(log: &RedoLog, words: &[u64]) {
    (0..).step_by(8).zip(words).for_each(|(at, word)| log.store(at, *word));
}

/// Dead directly before the notes are forgotten, after the tables were written that their replay made: what they
/// name is still there. The first write takes a place and gives it up, so that the others stand elsewhere the second
/// time.
#[test]
fn notes_that_were_done_again_may_be_done_once_more() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("disk");
    let name = crate::engine::tests::image(directory.path(), "disk", "qcow2", &[], DISK_BYTES, None);
    let open = || Arc::new(Image::open(&name, &OpenOptions::new(OpenMode::Write)).expect("it opens"));
    let image = open();
    image.write_at(&[1; 4096], 512 << 10).expect("inside");
    image.flush().expect("space");
    let log = Arc::new(log());
    log.replay(&image).expect("new memory");
    image.keep_change_log(Some(Arc::clone(&log) as Arc<dyn ChangeLog>));
    let mut steps = Vec::new();
    let attempt = image.try_prepare_write(0..65536, &mut steps).expect("inside");
    let Attempt::Done(ticket) = attempt else { panic!("all is in memory") };
    let written = [(2, 128 << 10), (3, 256 << 10), (4, 384 << 10)];
    for (byte, at) in written {
        image.write_at(&[byte; 65536], at).expect("inside");
    }
    drop(ticket);
    let (mut file, notes) = (std::fs::read(&path).expect("it is there"), words(&log));
    drop(image);
    for time in 0..3 {
        // As if it had not been closed.
        std::fs::write(&path, &file).expect("space");
        put_back(&log, &notes);
        let image = open();
        assert_eq!(log.replay(&image).expect("its own notes"), 3);
        for (byte, at) in written {
            let mut bytes = [0; 65536];
            image.read_at(&mut bytes, at).expect("inside");
            assert!(bytes == [byte; 65536], "{time}: {at} reads {}, not {byte}", bytes[0]);
        }
        file = std::fs::read(&path).expect("it is there");
    }
}

/// The file of a QED image that nobody flushed ends inside its last cluster, which is spoken for all the same.
#[test]
fn a_last_cluster_that_is_there_in_part_is_not_taken() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("disk");
    let name = crate::engine::tests::image(directory.path(), "disk", "qed", &[], DISK_BYTES, None);
    let open = || Arc::new(Image::open(&name, &OpenOptions::new(OpenMode::Write)).expect("it opens"));
    let (image, log) = (open(), Arc::new(log()));
    image.write_at(&[1; 4096], 512 << 10).expect("inside");
    image.flush().expect("space");
    log.replay(&image).expect("new memory");
    image.keep_change_log(Some(Arc::clone(&log) as Arc<dyn ChangeLog>));
    let written = [(2, 0), (3, 128 << 10), (4, 256 << 10)];
    for (byte, at) in written {
        image.write_at(&[byte; 4096], at).expect("inside");
    }
    let file = std::fs::read(&path).expect("it is there");
    drop(image);
    std::fs::write(&path, file).expect("space");
    let image = open();
    assert_eq!(log.replay(&image).expect("its own notes"), 3);
    for (byte, at) in written {
        let mut bytes = [0; 4096];
        image.read_at(&mut bytes, at).expect("inside");
        assert!(bytes == [byte; 4096], "{at} reads {}, not {byte}", bytes[0]);
    }
}

/// Tables may reach the disk without a flush: then what is noted is there already, and what was noted before that is past.
#[test]
fn notes_of_what_is_there_already_harm_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("disk");
    let name = crate::engine::tests::image(directory.path(), "disk", "qcow2", &[], DISK_BYTES, None);
    let open = || Arc::new(Image::open(&name, &OpenOptions::new(OpenMode::Write)).expect("it opens"));
    let (image, log) = (open(), Arc::new(log()));
    log.replay(&image).expect("new memory");
    image.keep_change_log(Some(Arc::clone(&log) as Arc<dyn ChangeLog>));
    image.write_at(&[2; 65536], 0).expect("inside");
    image.discard(0..65536).expect("inside");
    image.write_at(&[3; 65536], 0).expect("inside");
    image.keep_change_log(None);
    image.flush().expect("space");
    let (mut file, notes) = (std::fs::read(&path).expect("it is there"), words(&log));
    drop(image);
    for time in 0..3 {
        std::fs::write(&path, &file).expect("space");
        put_back(&log, &notes);
        let image = open();
        assert_eq!(log.replay(&image).expect("its own notes"), 3);
        let mut bytes = [0; 65536];
        image.read_at(&mut bytes, 0).expect("inside");
        assert!(bytes == [3; 65536], "{time}: reads {}", bytes[0]);
        file = std::fs::read(&path).expect("it is there");
    }
}

/// Formats that put zeroes in place tell nobody of what is written over them.
#[test]
fn what_is_written_over_zeroes_is_not_lost() {
    let formats: [(&str, &[(&str, &str)]); 4] =
        [("qcow2", &[]), ("qed", &[]), ("vmdk", &[]), ("vpc", &[("force_size", "on")])];
    for (format, options) in formats {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk");
        let name = crate::engine::tests::image(directory.path(), "disk", format, options, DISK_BYTES, None);
        let options = OpenOptions { format: Some(format.to_owned()), ..OpenOptions::new(OpenMode::Write) };
        let open = || Arc::new(Image::open(&name, &options).expect("it opens"));
        let (image, log) = (open(), Arc::new(log()));
        log.replay(&image).expect("new memory");
        image.keep_change_log(Some(Arc::clone(&log) as Arc<dyn ChangeLog>));
        image.write_at(&[2; 131_072], 0).expect("inside");
        image.write_zeroes(0..65536, true).expect("inside");
        image.discard(65536..131_072).expect("inside");
        image.write_zeroes(262_144..327_680, true).expect("inside");
        for at in [0, 65536, 262_144] {
            image.write_at(&[3; 4096], at).expect("inside");
        }
        let file = std::fs::read(&path).expect("it is there");
        drop(image);
        // As if it had not been closed.
        std::fs::write(&path, file).expect("space");
        let image = open();
        log.replay(&image).expect("its own notes");
        for at in [0, 65536, 262_144] {
            let mut bytes = [9; 65536];
            image.read_at(&mut bytes, at).expect("inside");
            assert!(bytes[..4096] == [3; 4096], "{format}: {at} reads {}", bytes[0]);
            assert!(bytes[4096..] == [0; 61_440], "{format}: behind {at} are no zeroes");
        }
    }
}

/// Whatever the host refuses now it may allow later.
#[test]
fn notes_that_could_not_be_done_again_are_kept() {
    let (file, image) = image();
    image.write_at(&[7; 512], 0).expect("inside");
    let log = log();
    log.replay(&image).expect("new memory");
    happens(&log, Change::Mapped(&mapping(8192, 512, 0)));
    let name = ImageName::parse(file.path().to_str().expect("UTF-8")).expect("a plain name");
    let options = OpenOptions { format: Some("raw".to_owned()), ..OpenOptions::new(OpenMode::Read) };
    drop(image);
    let refused = log.replay(&Image::open(&name, &options).expect("it opens"));
    assert!(matches!(refused, Err(RedoError::Image(_))), "{refused:?}");
    let options = OpenOptions { format: Some("raw".to_owned()), ..OpenOptions::new(OpenMode::Write) };
    let image = Image::open(&name, &options).expect("it opens");
    assert_eq!(log.replay(&image).expect("it can be written"), 1);
    let mut bytes = [0; 512];
    image.read_at(&mut bytes, 8192).expect("inside");
    assert_eq!(bytes, [7; 512]);
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
