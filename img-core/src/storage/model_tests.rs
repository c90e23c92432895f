//! Every storage against a flat vector, whatever the order of operations and the alignment.

use std::{io::IoSlice, io::IoSliceMut, ops::Range, path::PathBuf};

use proptest::{collection::vec, prelude::*};

use super::{CacheMode, FileOptions, FileStorage, Flush, MemoryStorage, Preallocation, Storage};
use crate::Result;

/// Offsets stay below this: a few pages, so that operations meet.
const REACH_BYTES: u64 = 40_000;

#[derive(Clone, Debug)]
enum Step {
    /// Writes `fill` from memory that is `skew` bytes off a page, in slices that end at `cuts`.
    Write {
        range: Range<u64>,
        skew: usize,
        cuts: Vec<usize>,
        fill: u8,
    },
    Zero {
        range: Range<u64>,
        may_unmap: bool,
    },
    Punch {
        range: Range<u64>,
    },
    Resize {
        len: u64,
        preallocation: Preallocation,
    },
    Preallocate {
        range: Range<u64>,
        preallocation: Preallocation,
    },
    Read {
        range: Range<u64>,
        skew: usize,
        cuts: Vec<usize>,
    },
    Flush,
}

/// Any offset, or one that is a multiple of a sector, or of a page.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..REACH_BYTES,
        (0..REACH_BYTES / 512).prop_map(|sector| sector * 512),
        (0..REACH_BYTES / 4096).prop_map(|page| page * 4096),
    ]
}

fn range() -> impl Strategy<Value = Range<u64>> {
    (offset(), offset()).prop_map(|(a, b)| a.min(b)..a.max(b))
}

fn skew() -> impl Strategy<Value = usize> {
    prop_oneof![Just(0usize), Just(512), 0..4096usize]
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    vec(prop_oneof![0..40_000usize, (0..78usize).prop_map(|sector| sector * 512)], 0..3)
}

fn step() -> impl Strategy<Value = Step> {
    let preallocation =
        || prop_oneof![Just(Preallocation::Off), Just(Preallocation::Falloc), Just(Preallocation::Full)];
    prop_oneof![
        4 => (range(), skew(), cuts(), 1u8..)
            .prop_map(|(range, skew, cuts, fill)| Step::Write { range, skew, cuts, fill }),
        2 => (range(), any::<bool>()).prop_map(|(range, may_unmap)| Step::Zero { range, may_unmap }),
        1 => range().prop_map(|range| Step::Punch { range }),
        1 => (offset(), preallocation()).prop_map(|(len, preallocation)| Step::Resize { len, preallocation }),
        1 => (range(), preallocation())
            .prop_map(|(range, preallocation)| Step::Preallocate { range, preallocation }),
        2 => (range(), skew(), cuts()).prop_map(|(range, skew, cuts)| Step::Read { range, skew, cuts }),
        1 => Just(Step::Flush),
    ]
}

fn index(at: u64) -> usize {
    usize::try_from(at).expect("a small test")
}

/// What makes bytes next to each other differ, so that a shifted transfer is seen.
fn twist(at: usize) -> u8 {
    u8::try_from(at % 251).expect("less than 251")
}

/// The lengths of the slices that `cuts` make of `len` bytes.
fn slice_lengths(len: usize, cuts: &[usize]) -> Vec<usize> {
    let mut ends: Vec<usize> = cuts.iter().map(|&cut| cut.min(len)).chain([len]).collect();
    ends.sort_unstable();
    ends.iter().scan(0, |start, &end| Some(end - std::mem::replace(start, end))).collect()
}

/// Where in `memory` the first byte stands that is `skew` bytes behind a page.
fn skewed(memory: &[u8], skew: usize) -> usize {
    memory.as_ptr().align_offset(4096) + skew
}

fn read(storage: &dyn Storage, range: &Range<u64>, skew: usize, cuts: &[usize]) -> Result<Vec<u8>> {
    let len = index(range.end - range.start);
    let mut memory = vec![0xee; len + 3 * 4096];
    let start = skewed(&memory, skew);
    let mut rest = &mut memory[start..start + len];
    let mut bufs = Vec::new();
    for length in slice_lengths(len, cuts) {
        let (buf, behind) = std::mem::take(&mut rest).split_at_mut(length);
        bufs.push(IoSliceMut::new(buf));
        rest = behind;
    }
    storage.read_vectored_at(&mut bufs, range.start)?;
    Ok(memory[start..start + len].to_vec())
}

fn write(storage: &dyn Storage, range: &Range<u64>, skew: usize, cuts: &[usize], fill: u8) -> Result<()> {
    let len = index(range.end - range.start);
    let mut memory = vec![fill; len + 3 * 4096];
    let start = skewed(&memory, skew);
    memory[start..].iter_mut().enumerate().for_each(|(at, byte)| *byte ^= twist(at));
    let mut rest = &memory[start..start + len];
    let mut bufs = Vec::new();
    for length in slice_lengths(len, cuts) {
        let (buf, behind) = rest.split_at(length);
        bufs.push(IoSlice::new(buf));
        rest = behind;
    }
    storage.write_vectored_at(&bufs, range.start)
}

fn padded(model: &[u8], range: &Range<u64>) -> Vec<u8> {
    (index(range.start)..index(range.end)).map(|at| model.get(at).copied().unwrap_or(0)).collect()
}

fn grow(model: &mut Vec<u8>, end: u64) {
    model.resize(model.len().max(index(end)), 0);
}

impl Step {
    fn apply(&self, storage: &dyn Storage, model: &mut Vec<u8>) -> Result<(), TestCaseError> {
        let fail = |error: crate::Error| TestCaseError::fail(error.to_string());
        match self {
            Self::Write { range, skew, cuts, fill } => {
                write(storage, range, *skew, cuts, *fill).map_err(fail)?;
                if !range.is_empty() {
                    grow(model, range.end);
                    let place = &mut model[index(range.start)..index(range.end)];
                    place.iter_mut().enumerate().for_each(|(at, byte)| *byte = fill ^ twist(at));
                }
            }
            Self::Zero { range, may_unmap } => {
                storage.write_zeroes(range.clone(), *may_unmap).map_err(fail)?;
                if !range.is_empty() {
                    grow(model, range.end);
                    model[index(range.start)..index(range.end)].fill(0);
                }
            }
            Self::Punch { range } => {
                storage.punch_hole(range.clone()).map_err(fail)?;
                let inside = model.len();
                model[index(range.start).min(inside)..index(range.end).min(inside)].fill(0);
            }
            Self::Resize { len, preallocation } => {
                let shrinks = index(*len) < model.len();
                let resized = storage.resize(*len, *preallocation);
                if shrinks && *preallocation != Preallocation::Off {
                    prop_assert!(resized.is_err());
                } else {
                    resized.map_err(fail)?;
                    model.resize(index(*len), 0);
                }
            }
            Self::Preallocate { range, preallocation } => {
                storage.preallocate(range.clone(), *preallocation).map_err(fail)?;
                if !range.is_empty() {
                    grow(model, range.end);
                }
            }
            Self::Read { range, skew, cuts } => {
                let bytes = read(storage, range, *skew, cuts).map_err(fail)?;
                prop_assert!(bytes == padded(model, range), "{self:?} differs");
            }
            Self::Flush => storage.flush(Flush::Data).map_err(fail)?,
        }
        prop_assert_eq!(storage.len_bytes().map_err(fail)?, model.len() as u64, "length after {:?}", self);
        Ok(())
    }
}

fn play(storage: &dyn Storage, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut model = Vec::new();
    for step in steps {
        step.apply(storage, &mut model)?;
    }
    let fail = |error: crate::Error| TestCaseError::fail(error.to_string());
    let whole = 0..REACH_BYTES + 5000;
    let bytes = read(storage, &whole, 0, &[]).map_err(fail)?;
    prop_assert!(bytes == padded(&model, &whole), "content differs");
    // What is not allocated reads as zeroes.
    let mut at = 0;
    while at < model.len() as u64 {
        let data = storage.next_allocated(at).map_err(fail)?.unwrap_or(model.len() as u64..u64::MAX);
        prop_assert!(data.start >= at && data.end > data.start);
        let hole = index(at)..index(data.start).min(model.len());
        prop_assert!(model[hole].iter().all(|&byte| byte == 0), "data in a hole");
        at = data.end;
    }
    Ok(())
}

/// A directory in the file system of the build, which is a real one where that for temporary files may
/// be memory.
fn directory() -> tempfile::TempDir {
    let program = std::env::current_exe().expect("a test program");
    tempfile::tempdir_in(program.parent().expect("in a directory")).expect("a directory")
}

fn new_file(cache: CacheMode) -> (tempfile::TempDir, Result<FileStorage>) {
    let dir = directory();
    let path: PathBuf = dir.path().join("disk");
    let file = FileOptions::new().create_new(true).cache(cache).open(path);
    (dir, file)
}

/// A file past the page cache; `None` where the file system cannot, and says so.
fn direct_file(cache: CacheMode) -> Option<(tempfile::TempDir, FileStorage)> {
    match new_file(cache) {
        (dir, Ok(file)) => Some((dir, file)),
        (_, Err(error)) => {
            let text = error.to_string();
            assert!(text.ends_with("filesystem does not support O_DIRECT"), "{text}");
            None
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn memory_equals_a_flat_vector(steps in vec(step(), 1..40)) {
        play(&MemoryStorage::new("memory"), &steps)?;
    }

    #[test]
    fn a_file_equals_a_flat_vector(steps in vec(step(), 1..40)) {
        let (_dir, file) = new_file(CacheMode::Unsafe);
        play(&file.expect("a new file"), &steps)?;
    }

    #[test]
    fn a_file_past_the_page_cache_equals_a_flat_vector(steps in vec(step(), 1..40)) {
        if let Some((_dir, file)) = direct_file(CacheMode::None) {
            play(&file, &steps)?;
        }
    }
}

#[test]
fn a_request_larger_than_the_bounce_buffer_is_served() -> Result<()> {
    let Some((_dir, file)) = direct_file(CacheMode::Directsync) else { return Ok(()) };
    let range = 100..(5 << 20) + 77;
    write(&file, &range, 3, &[1 << 20, 70_000], 9)?;
    assert_eq!(file.len_bytes()?, range.end);
    let expected: Vec<u8> = (0..index(range.end - range.start)).map(|at| 9 ^ twist(at)).collect();
    assert!(read(&file, &range, 5, &[33])? == expected);
    Ok(())
}

#[test]
fn a_memory_file_system_is_served_or_refused_in_words() -> Result<()> {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return Ok(()) };
    let options = FileOptions::new().create_new(true).cache(CacheMode::None);
    match options.open(dir.path().join("disk")) {
        Ok(file) => {
            write(&file, &(100..10_000), 7, &[600], 3)?;
            let expected: Vec<u8> = (0..9900).map(|at| 3 ^ twist(at)).collect();
            assert!(read(&file, &(100..10_000), 1, &[])? == expected);
            assert_eq!(file.len_bytes()?, 10_000);
            file.write_zeroes(50..20_000, false)?;
            assert_eq!(read(&file, &(0..20_000), 0, &[])?, vec![0; 20_000]);
        }
        Err(error) => assert!(error.to_string().ends_with("filesystem does not support O_DIRECT"), "{error}"),
    }
    Ok(())
}

#[test]
fn neighbours_in_a_block_lose_nothing_to_each_other() {
    const THREADS: usize = 4;
    const PIECE: usize = 100;
    const PIECES: usize = 400;
    let Some((_dir, file)) = direct_file(CacheMode::None) else { return };
    let fill = |piece: usize| u8::try_from(piece % 255).expect("less than 255") + 1;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let file = &file;
            scope.spawn(move || {
                for piece in (thread..PIECES).step_by(THREADS) {
                    file.write_at(&[fill(piece); PIECE], (piece * PIECE) as u64).expect("a write");
                }
            });
        }
    });
    let bytes = read(&file, &(0..(PIECES * PIECE) as u64), 0, &[]).expect("a read");
    assert_eq!(file.len_bytes().expect("a length"), (PIECES * PIECE) as u64);
    for (piece, bytes) in bytes.chunks(PIECE).enumerate() {
        assert!(bytes.iter().all(|&byte| byte == fill(piece)), "piece {piece}");
    }
}

/// A loop device over a new file of that length, taken down when dropped.
struct LoopDevice {
    _dir: tempfile::TempDir,
    path: String,
}

impl LoopDevice {
    /// `None` where the machine gives out no loop devices (without privileges, in most containers).
    fn new(len_bytes: u64) -> Option<Self> {
        let (dir, file) = new_file(CacheMode::Writeback);
        let file = file.expect("a new file");
        file.resize(len_bytes, Preallocation::Off).expect("room");
        let output =
            std::process::Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output();
        let output = output.ok().filter(|output| output.status.success())?;
        let path = String::from_utf8(output.stdout).expect("a device name").trim().to_owned();
        Some(Self { _dir: dir, path })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let status = std::process::Command::new("losetup").args(["--detach", &self.path]).status();
        assert!(status.is_ok_and(|status| status.success()), "{} stays", self.path);
    }
}

#[test]
fn a_block_device_equals_a_flat_vector() -> Result<()> {
    const LEN_BYTES: u64 = 1 << 20;
    let Some(device) = LoopDevice::new(LEN_BYTES) else { return Ok(()) };
    for cache in [CacheMode::Writeback, CacheMode::None] {
        let disk = FileOptions::new().write(true).cache(cache).open(&device.path)?;
        let mut model = vec![0; index(LEN_BYTES)];
        assert_eq!(disk.len_bytes()?, LEN_BYTES);
        write(&disk, &(0..LEN_BYTES), 0, &[], 5)?;
        model.iter_mut().enumerate().for_each(|(at, byte)| *byte = 5 ^ twist(at));
        let mut change = |range: Range<u64>, act: &dyn Fn(Range<u64>) -> Result<()>| -> Result<()> {
            act(range.clone())?;
            model[index(range.start)..index(range.end)].fill(0);
            Ok(())
        };
        change(4096..8192, &|range| disk.punch_hole(range))?;
        change(10_000..30_001, &|range| disk.punch_hole(range))?;
        change(40_001..40_002, &|range| disk.punch_hole(range))?;
        change(50_000..50_600, &|range| disk.write_zeroes(range, false))?;
        change(60_001..90_000, &|range| disk.write_zeroes(range, true))?;
        change(LEN_BYTES - 777..LEN_BYTES, &|range| disk.write_zeroes(range, true))?;
        write(&disk, &(65_001..65_107), 1, &[50], 8)?;
        (0..106).for_each(|at| model[65_001 + at] = 8 ^ twist(at));
        let bytes = read(&disk, &(0..LEN_BYTES + 100), 0, &[])?;
        assert!(bytes == padded(&model, &(0..LEN_BYTES + 100)), "{cache:?}");
        disk.flush(Flush::All)?;
        for past in [disk.write_at(b"x", LEN_BYTES), disk.write_zeroes(0..LEN_BYTES + 1, true)] {
            assert_eq!(past.expect_err("a device does not grow").raw_os_error(), Some(28));
        }
        assert!(disk.resize(LEN_BYTES + 1, Preallocation::Off).is_err());
        disk.resize(LEN_BYTES, Preallocation::Off)?;
        assert_eq!(disk.next_allocated(5)?, Some(5..LEN_BYTES));
    }
    Ok(())
}

#[test]
fn two_openings_of_a_file_agree_on_its_end() -> Result<()> {
    let Some((dir, direct)) = direct_file(CacheMode::None) else { return Ok(()) };
    let cached = FileOptions::new().write(true).open(dir.path().join("disk"))?;
    cached.write_at(&[1; 100_000], 0)?;
    direct.write_at(&[2; 10], 5)?; // it saw an empty file when it was opened
    assert_eq!(cached.len_bytes()?, 100_000);
    let bytes = read(&cached, &(0..100_000), 0, &[])?;
    assert!(bytes.iter().enumerate().all(|(at, &byte)| byte == if (5..15).contains(&at) { 2 } else { 1 }));
    Ok(())
}
