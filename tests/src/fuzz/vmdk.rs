//! The VMDK target: a small image of any kind, patches anywhere, and everything that can be asked of it.

use img_core::{
    format::{OpenMode, Repair},
    storage::Preallocation,
};

use super::{
    script::Script,
    targets::{assert_covered, assert_reads_alike, ranges},
};
use crate::vmdk::{Files, cowd, descriptor, sesparse};

/// A grain of 64 KiB as zlib stores it.
fn grain(byte: u8) -> Vec<u8> {
    let mut stored = vec![0; 1 << 17];
    let len = libdeflater::Compressor::new(libdeflater::CompressionLvl::default())
        .zlib_compress(&[byte; 65536], &mut stored)
        .expect("room enough");
    stored.truncate(len);
    stored
}

/// A valid image to start from, and the file that is patched.
fn base(which: u8) -> (Files, &'static str) {
    const SIZE: u64 = (40 << 20) + 512;
    match which % 6 {
        0 => {
            let files = Files::create("monolithicSparse", SIZE, true);
            let image = files.open(OpenMode::Write).expect("new");
            image.write_at(&[1; 70_000], 60_000).expect("written");
            image.write_zeroes(1 << 20..2 << 20, true).expect("zeroed");
            image.close().expect("closed");
            (files, "d.vmdk")
        }
        1 => {
            let files = Files::create("streamOptimized", SIZE, false);
            let image = files.open(OpenMode::Write).expect("new");
            for at in [0, 65536, 39 << 20] {
                image.write_compressed(&grain(3), at).expect("written");
            }
            image.close().expect("closed");
            (files, "d.vmdk")
        }
        2 => (Files::create("twoGbMaxExtentSparse", SIZE, false), "d-s001.vmdk"),
        3 => (Files::create("monolithicFlat", 1 << 20, false), "d.vmdk"),
        4 => {
            let files = Files::default();
            files.put("d.vmdk", &descriptor("vmfsSparse", "RW 4098 VMFSSPARSE \"x\""));
            files.put("x", &cowd().0);
            (files, "x")
        }
        _ => {
            let files = Files::default();
            files.put("d.vmdk", &descriptor("seSparse", "RW 32776 SESPARSE \"x\""));
            files.put("x", &sesparse().0);
            (files, "x")
        }
    }
}

/// Changes 4 or 8 bytes of the file, in its metadata mostly, or cuts it.
fn patch(bytes: &mut Vec<u8>, script: &mut Script<'_>) {
    let (kind, place, value) = (script.byte(), usize::from(script.u16()), script.tricky());
    let len = if kind & 1 == 0 { 4 } else { 8 };
    let at = match kind % 6 {
        0 | 1 => place % 600,
        2 | 3 => 512 * 4 + place % (512 * 60) / 4 * 4,
        // The footer of a stream and what stands before it.
        4 => bytes.len().saturating_sub(4096) + place % 4096,
        _ => {
            let half = bytes.len() / 2 + place % (bytes.len() / 2 + 1);
            bytes.truncate(half);
            return;
        }
    };
    if let Some(field) = bytes.get_mut(at..at + len) {
        field.copy_from_slice(&value.to_le_bytes()[..len]);
    }
}

/// Opens in every mode; maps, reads, audits and writes. The map covers what it was asked for, what is read is the
/// same twice, what is written reads back, and an audit changes nothing.
pub fn vmdk(input: &[u8]) {
    let mut script = Script::new(input);
    let (files, patched) = base(script.byte());
    let mut bytes = files.bytes(patched);
    for _ in 0..script.byte() % 8 {
        patch(&mut bytes, &mut script);
    }
    files.put(patched, &bytes);
    for mode in [OpenMode::Inspect, OpenMode::Read] {
        let Ok(image) = files.open(mode) else { continue };
        drop(image.layers()[0].details());
        for range in ranges(&image, &mut script) {
            assert_covered(&image, &range);
            assert_reads_alike(&image, &range);
        }
    }
    if let Ok(image) = files.open(OpenMode::Check { repair: false }) {
        drop(image.check(Repair::Nothing, &mut |_| {}));
    }
    assert!(files.bytes(patched) == bytes, "reading changed the image");
    let Ok(image) = files.open(OpenMode::Write) else { return };
    for range in ranges(&image, &mut script) {
        let data = vec![0xa5; usize::try_from(range.end - range.start).expect("at most 1 MiB")];
        if image.write_at(&data, range.start).is_err() {
            break;
        }
        let mut back = vec![0; data.len()];
        image.read_at(&mut back, range.start).expect("what was just written can be read");
        assert!(back == data, "{range:?} does not read as written");
    }
    drop(image.write_compressed(&grain(9), script.tricky() & !0xffff));
    drop(image.close());
    grow(&files, &mut script);
    files.put(patched, &bytes);
    mend(&files);
}

/// What can be read of the first and the last grains.
fn readable(files: &Files, size: u64) -> Vec<Option<Vec<u8>>> {
    let Ok(image) = files.open(OpenMode::Read) else { return Vec::new() };
    let size = size.min(image.virtual_size_bytes());
    let starts = (0..size.min(4 << 16)).step_by(1 << 16).chain([size.saturating_sub(1 << 16)]);
    let read = |at: u64| {
        let mut guest = vec![0; usize::try_from((size - at).min(1 << 16)).expect("at most 64 KiB")];
        image.read_at(&mut guest, at).ok().map(|()| guest)
    };
    starts.map(read).collect()
}

/// A disk that grew reads as before, with zeroes behind; one that did not is as it was.
fn grow(files: &Files, script: &mut Script<'_>) {
    let Ok(image) = files.open(OpenMode::Write) else { return };
    let old = image.virtual_size_bytes();
    let before = readable(files, old);
    let more = 1 << (script.byte() % 28);
    let grown = image.resize(old.saturating_add(more), Preallocation::Off);
    drop(image.close());
    for (number, (old, new)) in before.iter().zip(readable(files, old)).enumerate() {
        assert!(old.is_none() || *old == new, "{grown:?} changed what is read, {number}");
    }
    if grown.is_ok() {
        let image = files.open(OpenMode::Read).expect("a disk that grew opens");
        let new = image.virtual_size_bytes();
        assert!(new > old);
        let mut tail = vec![0xee; usize::try_from((new - old).min(1 << 20)).expect("at most 1 MiB")];
        if image.read_at(&mut tail, old).is_ok() {
            assert!(tail.iter().all(|byte| *byte == 0), "something shows behind the old end");
        }
    }
}

/// Mending leaves every byte that could be read, and finds nothing more to do after it succeeded.
fn mend(files: &Files) {
    let before = readable(files, u64::MAX);
    let audit = |repair| {
        let image = files.open(OpenMode::Check { repair: true })?;
        let report = image.check(repair, &mut |_| {})?;
        image.close().map(|()| report)
    };
    let first = audit(Repair::All);
    for (number, (old, new)) in before.iter().zip(readable(files, u64::MAX)).enumerate() {
        assert!(old.is_none() || *old == new, "{first:?} changed what is read, {number}");
    }
    if first.is_ok() {
        let second = audit(Repair::All).expect("what was mended is sound");
        assert_eq!(second.corruptions_fixed, 0, "{first:?}");
    }
}
