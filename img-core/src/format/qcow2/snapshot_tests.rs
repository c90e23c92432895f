//! Snapshots made by us read by the reference, and the reverse.

use std::{path::Path, sync::Arc};

use super::{
    Qcow2,
    oracle::{self, assert_same_bytes, file, qemu_img, qemu_io, try_qemu_img},
};
use crate::{
    Error,
    format::{Driver, Layer, OpenContext, OpenMode, OptionSet, Place, Repair, Snapshots},
    storage::{Storage, testing::CrashRecorder},
};

const DATE: (u32, u32) = (1_700_000_000, 5000);

fn open(path: &Path, mode: OpenMode) -> Arc<dyn Layer> {
    open_storage(file(path), mode)
}

fn open_storage(storage: Arc<dyn Storage>, mode: OpenMode) -> Arc<dyn Layer> {
    let options = OptionSet::new();
    let open_file = |name: &str, _| Ok(file(Path::new(name)));
    let context = OpenContext { mode, options: &options, open_file: &open_file };
    Qcow2.open(storage, &context).unwrap_or_else(|error| panic!("{error}"))
}

fn with<T>(path: &Path, act: impl FnOnce(&dyn Snapshots) -> T) -> T {
    let layer = open(path, OpenMode::Write);
    act(layer.snapshots().expect("qcow2 has snapshots"))
}

/// Images of many shapes with some data of many kinds.
fn images(directory: &Path, mut each: impl FnMut(&Path)) {
    qemu_img(directory, &["create", "-q", "-f", "raw", "base", "64M"]);
    for options in [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
        "lazy_refcounts=on,refcount_bits=64",
        "cluster_size=2M,compression_type=zstd",
        "backing_file=base,backing_fmt=raw",
        "refcount_bits=32",
    ] {
        qemu_img(directory, &["create", "-q", "-f", "qcow2", "-o", options, "x", "24M"]);
        let commands = [
            "write -P 1 0 300k",
            "write -c -P 2 4M 2M",
            "write -z 8M 1M",
            "write -P 3 9M 5k",
            "write -P 4 23M 1M",
        ];
        qemu_io(directory, "x", &commands);
        each(&directory.join("x"));
        std::fs::remove_file(directory.join("x")).expect("it is there");
    }
}

fn check(directory: &Path) {
    let (ok, out, err) = try_qemu_img(directory, &["check", "x"]);
    assert!(ok, "{out}{err}");
}

#[test]
fn ours_are_taken_as_the_reference_takes_them() {
    let directory = oracle::directory();
    images(directory.path(), |path| {
        std::fs::copy(path, path.with_file_name("theirs")).unwrap();
        with(path, |snapshots| snapshots.create("one", DATE)).unwrap();
        check(directory.path());
        qemu_img(directory.path(), &["snapshot", "-c", "one", "theirs"]);
        // The same bytes, but for the date.
        let theirs = open(&path.with_file_name("theirs"), OpenMode::Write);
        let header = super::header::Header::read(&*file(path), OpenMode::Read).unwrap();
        let storage = file(&path.with_file_name("theirs"));
        let mut date = DATE.0.to_be_bytes().to_vec();
        date.extend(DATE.1.to_be_bytes());
        storage.write_at(&date, header.snapshots_offset + 16).unwrap();
        drop(theirs);
        let ours = file(path);
        let end = ours.len_bytes().unwrap().max(storage.len_bytes().unwrap());
        for storage in [&ours, &storage] {
            storage.resize(end, crate::storage::Preallocation::Off).unwrap();
        }
        assert_same_bytes(&*ours, &*storage, "snapshot");
    });
}

#[test]
fn ours_can_be_applied_and_deleted_by_the_reference() {
    let directory = oracle::directory();
    images(directory.path(), |path| {
        with(path, |snapshots| snapshots.create("one", DATE)).unwrap();
        qemu_io(directory.path(), "x", &["write -P 9 0 1M", "write -P 9 5M 100k"]);
        with(path, |snapshots| snapshots.create("two", DATE)).unwrap();
        check(directory.path());
        qemu_io(directory.path(), "x", &["write -P 8 0 64k"]);
        let list = qemu_img(directory.path(), &["snapshot", "-l", "x"]);
        assert!(list.contains("one") && list.contains("two"), "{list}");
        qemu_img(directory.path(), &["snapshot", "-a", "one", "x"]);
        qemu_io(directory.path(), "x", &["read -P 1 0 300k", "read -P 2 4M 2M", "read -P 0 8M 1M"]);
        qemu_img(directory.path(), &["snapshot", "-a", "two", "x"]);
        qemu_io(directory.path(), "x", &["read -P 9 0 1M", "read -P 9 5M 100k", "read -P 4 23M 1M"]);
        qemu_img(directory.path(), &["snapshot", "-d", "one", "x"]);
        qemu_img(directory.path(), &["snapshot", "-d", "two", "x"]);
        check(directory.path());
    });
}

#[test]
fn theirs_are_applied_and_deleted_by_us() {
    let directory = oracle::directory();
    images(directory.path(), |path| {
        let io = |commands: &[&str]| qemu_io(directory.path(), "x", commands);
        qemu_img(directory.path(), &["snapshot", "-c", "one", "x"]);
        io(&["write -P 9 0 1M", "write -P 9 5M 100k"]);
        qemu_img(directory.path(), &["snapshot", "-c", "two", "x"]);
        io(&["write -P 8 0 64k"]);
        let names: Vec<_> = with(path, |snapshots| snapshots.list())
            .unwrap()
            .into_iter()
            .map(|snapshot| (snapshot.id, snapshot.name, snapshot.virtual_size_bytes))
            .collect();
        let expected = [("1", "one"), ("2", "two")].map(|(id, name)| (id.into(), name.into(), 24 << 20));
        assert_eq!(names, expected);
        with(path, |snapshots| snapshots.apply("1")).unwrap();
        check(directory.path());
        io(&["read -P 1 0 300k", "read -P 2 4M 2M", "read -P 0 8M 1M", "read -P 4 23M 1M"]);
        io(&["write -P 7 0 64k"]);
        with(path, |snapshots| snapshots.apply("two")).unwrap();
        check(directory.path());
        io(&["read -P 9 0 1M", "read -P 9 5M 100k", "read -P 4 23M 1M"]);
        with(path, |snapshots| snapshots.delete("one")).unwrap();
        check(directory.path());
        io(&["read -P 9 0 1M", "read -P 9 5M 100k", "read -P 4 23M 1M"]);
        with(path, |snapshots| snapshots.delete("two")).unwrap();
        check(directory.path());
        io(&["read -P 9 0 1M", "read -P 9 5M 100k", "read -P 4 23M 1M", "write -P 6 0 24M"]);
        check(directory.path());
    });
}

#[test]
fn sizes_change_with_snapshots() {
    let directory = oracle::directory();
    let path = directory.path().join("x");
    qemu_img(directory.path(), &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "x", "8M"]);
    qemu_io(directory.path(), "x", &["write -P 1 0 8M"]);
    with(&path, |snapshots| snapshots.create("small", DATE)).unwrap();
    qemu_img(directory.path(), &["resize", "-q", "x", "50M"]);
    qemu_io(directory.path(), "x", &["write -P 2 40M 1M"]);
    with(&path, |snapshots| snapshots.create("big", DATE)).unwrap();
    for (name, size) in [("small", 8 << 20), ("big", 50 << 20), ("small", 8 << 20)] {
        with(&path, |snapshots| snapshots.apply(name)).unwrap();
        check(directory.path());
        assert_eq!(open(&path, OpenMode::Read).virtual_size_bytes(), size);
    }
    qemu_io(directory.path(), "x", &["read -P 1 0 8M"]);
    qemu_img(directory.path(), &["snapshot", "-a", "big", "x"]);
    qemu_io(directory.path(), "x", &["read -P 1 0 8M", "read -P 2 40M 1M"]);
    let view = with(&path, |snapshots| snapshots.view("small")).unwrap();
    assert_eq!(view.virtual_size_bytes(), 50 << 20);
    let mut extents = Vec::new();
    view.map_range(0..8 << 20, &mut extents).unwrap();
    assert!(extents.iter().all(|extent| matches!(extent.place, Place::Data { writable: false, .. })));
    extents.clear();
    view.map_range(8 << 20..50 << 20, &mut extents).unwrap();
    assert!(extents.iter().all(|extent| extent.place == Place::Unallocated), "{extents:?}");
}

/// A count that cannot grow stops the snapshot, and the image is as it was.
#[test]
fn narrow_counts_are_refused_without_harm() {
    let directory = oracle::directory();
    let path = directory.path().join("x");
    let options = "refcount_bits=1,cluster_size=512";
    qemu_img(directory.path(), &["create", "-q", "-f", "qcow2", "-o", options, "x", "8M"]);
    qemu_io(directory.path(), "x", &["write -P 1 0 3M"]);
    let error = with(&path, |snapshots| snapshots.create("one", DATE)).expect_err("1-bit counts");
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{error}");
    let (ok, out, err) = try_qemu_img(directory.path(), &["check", "x"]);
    assert!(ok, "{out}{err}");
    assert!(with(&path, |snapshots| snapshots.list()).unwrap().is_empty());
    qemu_io(directory.path(), "x", &["read -P 1 0 3M"]);
    // Two bits: two snapshots fit, the third does not.
    let options = "refcount_bits=2,cluster_size=512";
    qemu_img(directory.path(), &["create", "-q", "-f", "qcow2", "-o", options, "x", "8M"]);
    qemu_io(directory.path(), "x", &["write -P 1 0 3M"]);
    with(&path, |snapshots| snapshots.create("one", DATE)).unwrap();
    with(&path, |snapshots| snapshots.create("two", DATE)).unwrap();
    with(&path, |snapshots| snapshots.create("three", DATE)).expect_err("2-bit counts");
    check(directory.path());
}

#[test]
fn names_ids_and_refusals() {
    let directory = oracle::directory();
    let path = directory.path().join("x");
    qemu_img(directory.path(), &["create", "-q", "-f", "qcow2", "x", "8M"]);
    let long = "é".repeat(200);
    for name in ["a", "a", "1", "", &long] {
        with(&path, |snapshots| snapshots.create(name, DATE)).unwrap();
    }
    let list = with(&path, |snapshots| snapshots.list()).unwrap();
    let ids: Vec<_> = list.iter().map(|snapshot| snapshot.id.as_str()).collect();
    assert_eq!(ids, ["1", "2", "3", "4", "5"]);
    assert_eq!(list[4].name.len(), 254, "cut between characters");
    // By name only, the first of that name.
    let gone = with(&path, |snapshots| snapshots.delete("5")).expect_err("an id is not a name");
    assert!(matches!(gone, Error::NoSuchSnapshot { .. }), "{gone}");
    with(&path, |snapshots| snapshots.delete("a")).unwrap();
    let list = with(&path, |snapshots| snapshots.list()).unwrap();
    assert_eq!(list[0].id, "2");
    check(directory.path());
    let none = with(&path, |snapshots| snapshots.apply("nope")).expect_err("no such");
    assert!(matches!(none, Error::NoSuchSnapshot { .. }), "{none}");
    qemu_img(directory.path(), &["bitmap", "--add", "x", "b"]);
    let refused = with(&path, |snapshots| snapshots.apply("1")).expect_err("bitmaps");
    assert_eq!(refused.to_string(), "Device has active dirty bitmaps");
}

/// What a disk without compressed clusters reads as.
fn content(layer: &dyn Layer) -> Vec<u8> {
    let size = layer.virtual_size_bytes();
    let mut extents = Vec::new();
    layer.map_range(0..size, &mut extents).unwrap();
    let mut bytes = Vec::new();
    for extent in extents {
        let mut part = vec![0; usize::try_from(extent.len_bytes).unwrap()];
        if let Place::Data { file, at, .. } = extent.place {
            layer.file(file).expect("the image file").read_at(&mut part, at.0).unwrap();
        }
        bytes.extend(part);
    }
    bytes
}

/// A power cut at any moment of taking, applying and deleting leaves an image that opens, reads as before or
/// after, disk and snapshots, and has leaks at worst, or the dirty bit, which opening for write repairs.
#[test]
fn a_power_cut_leaves_leaks_or_the_dirty_bit() {
    for options in ["cluster_size=512", "cluster_size=512,lazy_refcounts=on,refcount_bits=32"] {
        let directory = oracle::directory();
        let path = directory.path().join("x");
        qemu_img(directory.path(), &["create", "-q", "-f", "qcow2", "-o", options, "x", "1M"]);
        qemu_io(directory.path(), "x", &["write -P 1 0 200k", "write -z 300k 20k"]);
        qemu_img(directory.path(), &["snapshot", "-c", "zero", "x"]);
        qemu_io(directory.path(), "x", &["write -P 2 100k 300k"]);
        let layer = open(&path, OpenMode::Read);
        let now = content(&*layer);
        let zero = content(&*layer.snapshots().unwrap().view("zero").unwrap());
        drop(layer);

        let recorder = CrashRecorder::new();
        let layer = open_storage(recorder.record(file(&path)).unwrap(), OpenMode::Write);
        let snapshots = layer.snapshots().expect("qcow2 has snapshots");
        recorder.mark(0);
        snapshots.create("one", DATE).unwrap();
        recorder.mark(1);
        snapshots.apply("zero").unwrap();
        recorder.mark(2);
        snapshots.delete("zero").unwrap();
        recorder.mark(3);
        // The disk and the snapshots after each.
        let steps: [(&[u8], &[&str]); 4] =
            [(&now, &["zero"]), (&now, &["zero", "one"]), (&zero, &["zero", "one"]), (&zero, &["one"])];

        for mut state in recorder.states(5, 400) {
            let Some(mark) = state.mark else { continue };
            let done = usize::try_from(mark).unwrap();
            let what = format!("{options}, after step {done}: {}", state.description);
            let storage: Arc<dyn Storage> = Arc::new(state.files.pop().expect("one file"));
            let mut layer = open_storage(Arc::clone(&storage), OpenMode::Read);
            if layer.is_dirty() {
                drop(layer);
                drop(open_storage(Arc::clone(&storage), OpenMode::Write));
                layer = open_storage(storage, OpenMode::Read);
                assert!(!layer.is_dirty(), "{what}");
            }
            let report = layer.check(Repair::Nothing, &mut |_| {}).unwrap();
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}");
            let snapshots = layer.snapshots().expect("qcow2 has snapshots");
            let names: Vec<String> = snapshots.list().unwrap().into_iter().map(|one| one.name).collect();
            let disk = content(&*layer);
            let allowed = &steps[done..=(done + 1).min(3)];
            assert!(allowed.iter().any(|(expected, _)| disk == *expected), "{what}: the disk");
            assert!(allowed.iter().any(|(_, expected)| names == *expected), "{what}: {names:?}");
            for name in names {
                let expected = if name == "zero" { &zero } else { &now };
                assert!(content(&*snapshots.view(&name).unwrap()) == *expected, "{what}: snapshot {name}");
            }
        }
    }
}

/// `pass-discard-snapshot` decides whether the space of a deleted snapshot goes back to the host.
#[test]
fn deleting_gives_space_back_as_asked() {
    for (option, gives_back) in [(None, true), (Some("on"), true), (Some("off"), false)] {
        let directory = oracle::directory();
        let path = directory.path().join("x");
        qemu_img(directory.path(), &["create", "-q", "-f", "qcow2", "x", "8M"]);
        qemu_io(directory.path(), "x", &["write -P 1 0 4M"]);
        qemu_img(directory.path(), &["snapshot", "-c", "s", "x"]);
        qemu_io(directory.path(), "x", &["write -P 2 0 4M"]);
        let mut options = OptionSet::new();
        if let Some(value) = option {
            options.set("pass-discard-snapshot", value);
        }
        let storage = oracle::file(&path);
        let before = storage.allocated_bytes().unwrap();
        let open_file = |name: &str, _| Ok(oracle::file(Path::new(name)));
        let context = OpenContext { mode: OpenMode::Write, options: &options, open_file: &open_file };
        let layer = Qcow2.open(std::sync::Arc::clone(&storage), &context).unwrap();
        layer.snapshots().unwrap().delete("s").unwrap();
        layer.writer().unwrap().close().unwrap();
        let given_back = before.saturating_sub(storage.allocated_bytes().unwrap());
        assert_eq!(given_back >= 4 << 20, gives_back, "{option:?}: {given_back} bytes");
        qemu_img(directory.path(), &["check", "x"]);
    }
}
