//! Persistent bitmaps against the reference and against a model.

use std::{path::Path, sync::Arc};

use proptest::{collection::vec, prelude::*};

use super::{
    Qcow2, layer_tests,
    oracle::{self, directory, file, qemu_img, qemu_io, try_qemu_img},
};
use crate::{
    Error, Result,
    format::{
        BitmapInfo, Bitmaps, DirtyMap, Driver, Layer, NewBitmap, OpenContext, OpenMode, OptionSet, Repair,
    },
    image::Image,
    storage::{
        Preallocation, Storage,
        testing::{CrashRecorder, FailAt, Operation},
    },
};

fn open_as(path: &Path, mode: OpenMode) -> Arc<dyn Layer> {
    let options = OptionSet::new();
    let open_file = |name: &str, _| Ok(file(Path::new(name)));
    let context = OpenContext { mode, options: &options, open_file: &open_file };
    Qcow2.open(file(path), &context).expect("opened")
}

fn open(path: &Path) -> Image {
    Image::from_layers(vec![open_as(path, OpenMode::Write)]).expect("a disk")
}

fn bitmaps(image: &Image) -> &dyn Bitmaps {
    image.layers()[0].bitmaps().expect("version 3")
}

fn put(image: &Image, name: &str, enabled: bool, map: &DirtyMap) -> Result<()> {
    bitmaps(image).store(&[NewBitmap { name, enabled, map }])
}

fn info(name: &str, granularity_bytes: u64, enabled: bool) -> BitmapInfo {
    BitmapInfo { name: name.to_owned(), granularity_bytes, enabled, inconsistent: false }
}

/// What every bitmap of an image says.
fn contents(path: &Path) -> Vec<(BitmapInfo, Vec<std::ops::Range<u64>>)> {
    let layer = open_as(path, OpenMode::Read);
    let bitmaps = layer.bitmaps().expect("version 3");
    let list = bitmaps.list().expect("a list").into_iter();
    list.map(|info| {
        let map = bitmaps.read(&info.name).expect("bits");
        (info, map.ranges().collect())
    })
    .collect()
}

const SETUP: &[&[&str]] = &[
    &["bitmap", "--add", "x", "on"],
    &["bitmap", "--add", "--disable", "-g", "4096", "x", "off"],
    &["bitmap", "--add", "-g", "512", "x", "fine"],
];

fn make(directory: &Path, size: &str, options: &str) {
    qemu_img(directory, &["create", "-q", "-f", "qcow2", "-o", options, "x", size]);
    for line in SETUP {
        qemu_img(directory, line);
    }
}

/// One change that both sides can make, on borders that mean the same to both.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
    Grow(u64),
    Shrink(u64),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0_u64..12 << 20, 1_u64..300_000);
    let clusters = || (0_u64..180, 1_u64..20).prop_map(|(at, count)| (at << 16, count << 16));
    prop_oneof![
        4 => range().prop_map(|(at, bytes)| Step::Write(at, bytes)),
        2 => clusters().prop_map(|(at, bytes)| Step::Zero(at, bytes)),
        2 => clusters().prop_map(|(at, bytes)| Step::Discard(at, bytes)),
        1 => (1_u64..100).prop_map(|more| Step::Grow(more << 16)),
        1 => (1_u64..20).prop_map(|less| Step::Shrink(less << 16)),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// After any history the enabled bitmaps hold what was changed, as the reference keeps them, and the image
    /// checks clean.
    #[test]
    fn bitmaps_are_kept_as_the_reference_keeps_them(steps in vec(step(), 1..12)) {
        let (ours, theirs) = (directory(), directory());
        for side in [&ours, &theirs] {
            make(side.path(), "12M", "cluster_size=64k");
        }
        let path = ours.path().join("x");
        let mut size = 12_u64 << 20;
        let mut model = ["on", "fine"].map(|name| {
            (name, DirtyMap::new(size, if name == "on" { 65536 } else { 512 }).unwrap())
        });
        let mut image = open(&path);
        let mut commands: Vec<String> = Vec::new();
        let inside = |size: u64, at: u64, bytes: u64| (at.min(size), bytes.min(size - at.min(size)));
        for step in steps.into_iter().chain([Step::Reopen]) {
            let changed = match step {
                Step::Write(at, bytes) => {
                    let (at, bytes) = inside(size, at, bytes);
                    image.write_at(&vec![7; usize::try_from(bytes).unwrap()], at).unwrap();
                    commands.push(format!("write -P 7 {at} {bytes}"));
                    at..at + bytes
                }
                Step::Zero(at, bytes) => {
                    let (at, bytes) = inside(size, at, bytes);
                    image.write_zeroes(at..at + bytes, true).unwrap();
                    commands.push(format!("write -z -u {at} {bytes}"));
                    at..at + bytes
                }
                Step::Discard(at, bytes) => {
                    let (at, bytes) = inside(size, at, bytes);
                    image.discard(at..at + bytes).unwrap();
                    commands.push(format!("discard {at} {bytes}"));
                    at..at + bytes
                }
                Step::Grow(_) | Step::Shrink(_) | Step::Reopen => {
                    let commands: Vec<_> = std::mem::take(&mut commands);
                    let commands: Vec<_> = commands.iter().filter(|c| !c.ends_with(" 0")).map(String::as_str).collect();
                    if !commands.is_empty() {
                        qemu_io(theirs.path(), "x", &commands);
                    }
                    match step {
                        Step::Grow(more) => size += more,
                        Step::Shrink(less) => size = size.saturating_sub(less).max(1 << 20),
                        _ => {
                            image.close().unwrap();
                            image = open(&path);
                            continue;
                        }
                    }
                    image.resize(size, Preallocation::Off).unwrap();
                    qemu_img(theirs.path(), &["resize", "-q", "--shrink", "x", &size.to_string()]);
                    for (_, map) in &mut model {
                        map.resize(size).unwrap();
                    }
                    continue;
                }
            };
            for (name, map) in &model {
                map.set(changed.clone()).unwrap();
                prop_assert_eq!(&bitmaps(&image).read(name).unwrap(), map, "{} while open", name);
            }
        }
        image.close().unwrap();
        qemu_img(ours.path(), &["check", "x"]);
        prop_assert_eq!(contents(&path), contents(&theirs.path().join("x")));
        for (name, map) in &model {
            let layer = open_as(&path, OpenMode::Read);
            prop_assert_eq!(&layer.bitmaps().unwrap().read(name).unwrap(), map, "{} stored", name);
        }
        // The reference reads them at open, and would refuse.
        qemu_io(ours.path(), "x", &["read 0 512"]);
        let list = contents(&path).into_iter().map(|(info, _)| info).collect::<Vec<_>>();
        prop_assert_eq!(list, [info("on", 65536, true), info("off", 4096, false), info("fine", 512, true)]);
    }
}

/// Reading marks none; a write marks those that are enabled, and closing stores them.
#[test]
fn marks_are_there_only_while_changes_are_not_stored() {
    let directory = oracle::directory();
    make(directory.path(), "64M", "lazy_refcounts=on");
    let path = directory.path().join("x");
    let in_use =
        || qemu_img(directory.path(), &["info", "-U", "--output=json", "x"]).matches("in-use").count();
    let image = open(&path);
    image.read_at(&mut [0; 512], 0).unwrap();
    image.layers()[0].snapshots().unwrap().create("s", (1, 2)).unwrap();
    image.close().unwrap();
    assert_eq!(in_use(), 0);
    let image = open(&path);
    image.write_at(&[1; 512], 5 << 20).unwrap();
    image.flush().unwrap();
    assert_eq!(in_use(), 2);
    image.layers()[0].snapshots().unwrap().create("t", (1, 2)).unwrap();
    image.close().unwrap();
    assert_eq!(in_use(), 0);
    qemu_img(directory.path(), &["check", "x"]);
    // As after a crash.
    let image = open(&path);
    image.write_at(&[1; 512], 5 << 20).unwrap();
    image.flush().unwrap();
    drop(image);
    assert_eq!(in_use(), 2);
    let image = open(&path);
    let list = bitmaps(&image).list().unwrap();
    assert_eq!(list.iter().map(|info| info.inconsistent).collect::<Vec<_>>(), [true, false, true]);
    let refused = bitmaps(&image).read("on").expect_err("inconsistent").to_string();
    assert!(refused.starts_with("Bitmap 'on' is inconsistent and cannot be used\nTry "), "{refused}");
    let refused = image.resize(96 << 20, Preallocation::Off).expect_err("inconsistent").to_string();
    // It writes its bitmaps anew even so: on a copy.
    std::fs::copy(&path, directory.path().join("copy")).unwrap();
    let (_, _, theirs) = try_qemu_img(directory.path(), &["resize", "copy", "96M"]);
    assert_eq!(theirs.trim_end(), format!("qemu-img: {refused}"));
    // What is lost stays lost, and the others are kept.
    image.write_at(&[1; 512], 6 << 20).unwrap();
    bitmaps(&image).remove("fine").unwrap();
    image.close().unwrap();
    assert_eq!(in_use(), 1);
    qemu_img(directory.path(), &["check", "-r", "all", "x"]);
}

/// Stored, replaced and removed bitmaps are what the reference finds.
#[test]
fn bitmaps_are_stored_and_removed() -> Result<()> {
    let directory = oracle::directory();
    qemu_img(directory.path(), &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "x", "1G"]);
    let path = directory.path().join("x");
    let image = open(&path);
    let map = DirtyMap::new(1 << 30, 512)?;
    map.set(3 << 20..5 << 20)?;
    map.set((1 << 30) - 1..1 << 30)?;
    put(&image, "a", true, &map)?;
    put(&image, "b", false, &DirtyMap::new(1 << 30, 1 << 31)?)?;
    image.write_at(&[1; 10], 0)?;
    // Stored while another one is being kept, which goes on.
    put(&image, "c", true, &DirtyMap::new(1 << 30, 65536)?)?;
    image.write_at(&[1; 10], 1 << 20)?;
    assert!(matches!(put(&image, "", true, &map), Err(Error::Invalid(_))));
    assert!(matches!(put(&image, "d", true, &DirtyMap::new(1, 512)?), Err(Error::Invalid(_))));
    assert!(matches!(put(&image, "d", true, &DirtyMap::new(1 << 30, 256)?), Err(Error::Invalid(_))));
    image.close()?;
    map.set(0..1)?;
    map.set(1 << 20..(1 << 20) + 1)?;
    let expected = vec![
        (info("a", 512, true), map.ranges().collect()),
        (info("b", 1 << 31, false), vec![]),
        (info("c", 65536, true), std::iter::once(1 << 20..(1 << 20) + 65536).collect()),
    ];
    assert_eq!(contents(&path), expected);
    qemu_img(directory.path(), &["check", "x"]);
    // The reference rewrites them from what it read.
    qemu_io(directory.path(), "x", &["write 3M 1M"]);
    assert_eq!(contents(&path)[0], expected[0]);
    let image = open(&path);
    for name in ["b", "a", "c"] {
        bitmaps(&image).remove(name)?;
    }
    assert!(bitmaps(&image).remove("c").is_err() && bitmaps(&image).list()?.is_empty());
    image.close()?;
    qemu_img(directory.path(), &["check", "x"]);
    assert!(!qemu_img(directory.path(), &["info", "x"]).contains("bitmaps"));
    Ok(())
}

/// What no crash and no failure may break: a bitmap that claims to be consistent holds every change, and the
/// image has no corruption.
fn judge(storage: &Arc<dyn Storage>, written: &[std::ops::Range<u64>]) {
    let mode = OpenMode::Check { repair: false };
    let layer = layer_tests::open(storage, mode, &OptionSet::new()).expect("it opens");
    let mut findings = Vec::new();
    let report = layer.check(Repair::Nothing, &mut |finding| findings.push(finding.text)).expect("an audit");
    // Under lazy refcounts the dirty bit says that counts are behind.
    if !layer.is_dirty() {
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{findings:#?}");
    }
    let bitmaps = layer.bitmaps().expect("version 3");
    for info in bitmaps.list().expect("a list") {
        if info.inconsistent {
            assert!(info.enabled, "nothing happened to {}", info.name);
            continue;
        }
        let map = bitmaps.read(&info.name).expect("bits");
        let dirty: Vec<_> = map.ranges().collect();
        for range in written.iter().filter(|_| info.enabled) {
            let bytes = layer_tests::read(&layer, range.clone());
            for at in range.clone().step_by(512) {
                let index = usize::try_from(at - range.start).unwrap();
                assert!(bytes[index] == 0 || map.is_dirty(at), "{}: {at:#x} changed, {dirty:x?}", info.name);
            }
        }
    }
}

const WRITTEN: [std::ops::Range<u64>; 3] = [0..9000, 100_000..130_000, 400_000..400_512];

/// Two bitmaps in a new image.
fn small_image(shape: &'static str) -> Arc<dyn Storage> {
    let storage = layer_tests::new_image(shape);
    let layer = layer_tests::open(&storage, OpenMode::Write, &OptionSet::new()).expect("it opens");
    // A part is overwritten in place later: then nothing but the mark is durable before the data.
    layer_tests::write(&layer, 400_000, &[0; 512]).unwrap();
    let size = layer.virtual_size_bytes();
    let (on, off) = (DirtyMap::new(size, 512).unwrap(), DirtyMap::new(size, 4096).unwrap());
    off.set(0..size).unwrap();
    let new = |name, enabled, map| NewBitmap { name, enabled, map };
    Bitmaps::store(&layer, &[new("on", true, &on), new("off", false, &off)]).unwrap();
    layer.writer().unwrap().close().unwrap();
    storage
}

/// Writes the ranges in two sessions, each of which stores the bitmap.
fn change(storage: &Arc<dyn Storage>) -> Result<()> {
    for ranges in [&WRITTEN[..2], &WRITTEN[2..]] {
        let layer = layer_tests::open(storage, OpenMode::Write, &OptionSet::new())?;
        for range in ranges {
            layer_tests::write(
                &layer,
                range.start,
                &vec![5; usize::try_from(range.end - range.start).unwrap()],
            )?;
        }
        layer.writer().unwrap().close()?;
    }
    Ok(())
}

const SHAPES: [&str; 2] = ["cluster_size=512", "cluster_size=4k,lazy_refcounts=on,refcount_bits=1"];

#[test]
fn a_power_cut_costs_marked_bitmaps_only() {
    for shape in SHAPES {
        let recorder = CrashRecorder::new();
        let storage = recorder.record(small_image(shape)).unwrap();
        change(&storage).unwrap();
        recorder.mark(1);
        for state in recorder.states(3, 400) {
            for file in state.files {
                let storage: Arc<dyn Storage> = Arc::new(file);
                judge(&storage, &WRITTEN);
                if state.mark == Some(1) {
                    let layer = layer_tests::open(&storage, OpenMode::Read, &OptionSet::new()).unwrap();
                    assert!(Bitmaps::list(&layer).unwrap().iter().all(|info| !info.inconsistent));
                }
            }
        }
    }
}

#[test]
fn a_failed_operation_costs_marked_bitmaps_only() {
    for shape in SHAPES {
        for nth in 0.. {
            let inner = small_image(shape);
            let failing = Arc::new(FailAt::once(Arc::clone(&inner), Operation::is_change, nth));
            let storage: Arc<dyn Storage> = failing.clone();
            let result = change(&storage);
            judge(&inner, &WRITTEN);
            if failing.seen() <= nth {
                result.unwrap();
                break;
            }
        }
    }
}
