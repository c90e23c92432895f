//! The system-facing rules of one file.

use rustix::fs::{FileType, Mode};

use super::*;

fn new_file(dir: &tempfile::TempDir) -> Result<FileStorage> {
    FileOptions::new().create_new(true).open(dir.path().join("disk"))
}

#[test]
fn bytes_past_the_end_read_as_zeroes() -> Result<()> {
    let dir = tempfile::tempdir().expect("a directory");
    let file = new_file(&dir)?;
    file.write_at(b"abc", 5)?;
    let mut buf = [1; 16];
    file.read_at(&mut buf, 0)?;
    assert_eq!(&buf, b"\0\0\0\0\0abc\0\0\0\0\0\0\0\0");
    for at in [8, 1 << 40, transfer::MAX_LEN_BYTES - 3, u64::MAX] {
        buf.fill(1);
        file.read_at(&mut buf, at)?;
        assert_eq!(buf, [0; 16], "at {at}");
    }
    assert!(file.write_at(b"abc", transfer::MAX_LEN_BYTES - 1).is_err());
    Ok(())
}

#[test]
fn a_write_through_the_cache_commits_no_more_than_it_needs() -> Result<()> {
    let dir = tempfile::tempdir().expect("a directory");
    for (cache, flag) in [(CacheMode::Writethrough, libc::O_DSYNC), (CacheMode::Writeback, 0)] {
        let file = FileOptions::new().create(true).cache(cache).open(dir.path().join("disk"))?;
        let flags = rustix::fs::fcntl_getfl(&file.fd).expect("it is open").bits().cast_signed();
        assert_eq!(flags & libc::O_SYNC, flag, "{cache:?}: {flags:#o}");
    }
    Ok(())
}

#[test]
fn more_slices_than_a_call_takes_are_transferred() -> Result<()> {
    let dir = tempfile::tempdir().expect("a directory");
    let file = new_file(&dir)?;
    let bytes: Vec<u8> = (0..3000u32).map(|i| u8::try_from(i % 251).expect("a byte")).collect();
    let bufs: Vec<_> = bytes.chunks(1).map(IoSlice::new).collect();
    file.write_vectored_at(&bufs, 10)?;
    let mut back = vec![0; 3100];
    let mut bufs: Vec<_> = back.chunks_mut(1).map(IoSliceMut::new).collect();
    file.read_vectored_at(&mut bufs, 10)?;
    assert_eq!(&back[..3000], &bytes[..]);
    assert_eq!(back[3000..], [0; 100]);
    Ok(())
}

#[test]
fn what_is_no_file_is_refused_in_the_reference_s_words() {
    let dir = tempfile::tempdir().expect("a directory");
    let error = FileOptions::new().open(dir.path()).expect_err("a directory");
    assert_eq!(
        error.to_string(),
        format!("'file' driver requires '{}' to be a regular file", dir.path().display())
    );
    let missing = dir.path().join("none");
    let error = FileOptions::new().open(&missing).expect_err("nothing there");
    assert_eq!(
        error.to_string(),
        format!("Could not open '{}': No such file or directory", missing.display())
    );
    let pipe = dir.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a pipe");
    for write in [false, true] {
        let error = FileOptions::new().write(write).open(&pipe).expect_err("a pipe");
        assert!(error.to_string().contains("to be a regular file"), "{error}");
    }
}

#[test]
fn the_null_device_has_no_bytes() -> Result<()> {
    let null = FileOptions::new().write(true).open("/dev/null")?;
    assert_eq!(null.len_bytes()?, 0);
    let error = null.resize(1, Preallocation::Off).expect_err("it cannot grow");
    assert_eq!(error.to_string(), "Cannot grow device files");
    assert!(null.write_at(b"x", 0).is_err());
    Ok(())
}

#[test]
fn a_read_only_file_refuses_every_change() -> Result<()> {
    let dir = tempfile::tempdir().expect("a directory");
    new_file(&dir)?.write_at(&[1; 8192], 0)?;
    let file = FileOptions::new().open(dir.path().join("disk"))?;
    let refusals = [
        file.write_at(b"x", 0),
        file.punch_hole(0..4096),
        file.write_zeroes(0..4096, true),
        file.resize(1, Preallocation::Off),
        file.preallocate(0..1, Preallocation::Falloc),
    ];
    for refusal in refusals {
        assert!(matches!(refusal, Err(Error::ReadOnly { .. })), "{refusal:?}");
    }
    Ok(())
}

#[test]
fn space_is_given_and_taken() -> Result<()> {
    let dir = tempfile::tempdir().expect("a directory");
    let file = new_file(&dir)?;
    file.resize(1 << 20, Preallocation::Falloc)?;
    assert!(file.allocated_bytes()? >= 1 << 20);
    file.write_at(&[7; 1 << 16], 0)?;
    file.punch_hole(0..1 << 20)?;
    assert_eq!((file.len_bytes()?, file.allocated_bytes()?), (1 << 20, 0));
    assert_eq!(file.next_allocated(0)?, None);
    file.write_at(&[7; 4096], 1 << 16)?;
    assert_eq!(file.next_allocated(0)?, Some(1 << 16..(1 << 16) + 4096));
    assert_eq!(file.next_allocated((1 << 16) + 5)?, Some((1 << 16) + 5..(1 << 16) + 4096));
    file.write_zeroes((1 << 20) - 10..(1 << 20) + 10, true)?;
    assert_eq!(file.len_bytes()?, (1 << 20) + 10);
    file.preallocate(0..2 << 20, Preallocation::Full)?;
    assert_eq!(file.len_bytes()?, 2 << 20);
    assert!(file.allocated_bytes()? >= 2 << 20);
    let mut buf = [0; 4096];
    file.read_at(&mut buf, 1 << 16)?;
    assert_eq!(buf, [7; 4096]);
    Ok(())
}

#[test]
fn full_space_is_written_also_inside_a_file() -> Result<()> {
    let dir = tempfile::tempdir().expect("a directory");
    let file = new_file(&dir)?;
    file.resize(4 << 20, Preallocation::Off)?;
    file.write_at(&[7; 4096], 1 << 20)?;
    file.preallocate(64 << 10..6 << 20, Preallocation::Full)?;
    assert_eq!(file.len_bytes()?, 6 << 20);
    // Space that is only set aside counts as a hole, where the file system has holes.
    assert_eq!(file.next_allocated(64 << 10)?, Some(64 << 10..6 << 20));
    let mut bytes = vec![0; 3 << 12];
    file.read_at(&mut bytes, (1 << 20) - 4096)?;
    assert_eq!(bytes, [[0; 4096], [7; 4096], [0; 4096]].concat());
    Ok(())
}

#[test]
fn the_kernel_copies_between_files() -> Result<()> {
    let dir = tempfile::tempdir().expect("a directory");
    let source = new_file(&dir)?;
    let target = FileOptions::new().create_new(true).open(dir.path().join("copy"))?;
    let bytes: Vec<u8> = (0..300_000u32).map(|at| u8::try_from(at % 253).expect("a byte")).collect();
    source.write_at(&bytes, 0)?;
    let copied = target.copy_from(&source, 1000, 77, 299_000)?;
    if copied > 0 {
        assert_eq!(copied, 299_000);
        let mut back = vec![0; 299_000];
        target.read_at(&mut back, 77)?;
        assert!(back == bytes[1000..]);
        assert_eq!(target.copy_from(&source, 290_000, 0, 1 << 20)?, 10_000, "up to the end of the source");
    }
    assert_eq!(target.copy_from(&crate::storage::MemoryStorage::new("m"), 0, 0, 5)?, 0);
    assert!(source.copy_from(&target, 0, u64::MAX - 5, 5).is_err());
    Ok(())
}

#[test]
fn a_failed_flush_is_not_forgotten() -> Result<()> {
    let dir = tempfile::tempdir().expect("a directory");
    let file = new_file(&dir)?;
    file.flush(Flush::Data)?;
    file.failed_flush.store(Errno::IO.raw_os_error(), Ordering::Relaxed);
    assert_eq!(
        file.flush(Flush::Data).expect_err("lost pages").raw_os_error(),
        Some(Errno::IO.raw_os_error())
    );
    Ok(())
}
