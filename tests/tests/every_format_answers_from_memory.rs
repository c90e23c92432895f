//! Whatever the format: what a thread that must not wait is told from memory is what the disk holds, and it is told
//! so once the tables were read. (Histories of qcow2, which allocates from memory too, are told elsewhere.)

use std::{fs, path::Path, sync::Arc};

use img_core::{
    Result,
    format::{Attempt, Backing, OpenMode, OptionSet, Place, Repair, registry},
    image::{Image, ImageExtent, ImageName},
    job::create::{CreateImage, create},
};
use img_tests::{
    command::img,
    open, proptest_config,
    queue::{Count, Queue},
    read_all,
};
use proptest::{
    collection::vec,
    prelude::{Just, Strategy, prop_oneof},
    test_runner::{TestCaseError, TestRunner},
};

/// An image that is made.
#[derive(Clone, Copy, Debug)]
struct Kind {
    format: &'static str,
    options: &'static [(&'static str, &'static str)],
    has_parent: bool,
}

const fn kind(format: &'static str, options: &'static [(&'static str, &'static str)]) -> Kind {
    Kind { format, options, has_parent: false }
}

const KINDS: &[Kind] = &[
    kind("raw", &[]),
    kind("qed", &[("cluster_size", "4096"), ("table_size", "1")]),
    Kind { has_parent: true, ..kind("qed", &[]) },
    kind("vpc", &[("subformat", "fixed")]),
    kind("vpc", &[("subformat", "dynamic")]),
    Kind { has_parent: true, ..kind("vpc", &[]) },
    kind("vmdk", &[("subformat", "monolithicSparse")]),
    kind("vmdk", &[("subformat", "monolithicFlat")]),
    kind("vmdk", &[("subformat", "twoGbMaxExtentSparse"), ("zeroed_grain", "on")]),
    kind("vmdk", &[("subformat", "twoGbMaxExtentFlat")]),
    Kind { has_parent: true, ..kind("vmdk", &[("zeroed_grain", "on")]) },
];

/// More than one table of the smallest QED, and more than one block of a VHD.
const DISK_BYTES: u64 = 5 << 20;

/// What a parent holds at a guest offset.
fn parent_byte(at: usize) -> u8 {
    u8::try_from((at >> 12) % 251 + 1).expect("a byte")
}

fn new_image(dir: &Path, name: &str, kind: Kind, virtual_size_bytes: u64, backing: Option<&str>) {
    let path = dir.join(name);
    let mut options = OptionSet::new();
    for (name, value) in kind.options {
        options.set(*name, *value);
    }
    create(&CreateImage {
        name: &ImageName::from_path(path.to_str().expect("a plain name")),
        driver: registry::by_name(kind.format).expect("every build has it"),
        virtual_size_bytes,
        backing: backing.map(|backing| Backing {
            name: dir.join(backing).to_str().expect("a plain name").to_owned(),
            format: Some(kind.format.to_owned()),
        }),
        options,
    })
    .expect("created");
}

/// An image of `kind`, and what it reads as.
fn new_disk(dir: &Path, kind: Kind) -> Vec<u8> {
    if !kind.has_parent {
        new_image(dir, "disk", kind, DISK_BYTES, None);
        let image = open(&dir.join("disk"), Some(kind.format), OpenMode::Read).expect("opens");
        // Of a VHD, whole cylinders.
        return vec![0; usize::try_from(image.virtual_size_bytes()).expect("small")];
    }
    new_image(dir, "parent", kind, DISK_BYTES, None);
    let parent = open(&dir.join("parent"), Some(kind.format), OpenMode::Write).expect("opens");
    let size = usize::try_from(parent.virtual_size_bytes()).expect("small");
    let model: Vec<u8> = (0..size).map(parent_byte).collect();
    parent.write_at(&model, 0).expect("written");
    parent.close().expect("closed");
    new_image(dir, "disk", kind, model.len() as u64, Some("parent"));
    model
}

fn open_disk(dir: &Path, kind: Kind) -> Arc<Image> {
    Arc::new(open(&dir.join("disk"), Some(kind.format), OpenMode::Write).expect("opens"))
}

fn close(image: Arc<Image>) -> Result<()> {
    Arc::try_unwrap(image).expect("nobody else holds it").close()
}

/// The same map in the same pieces: extents that go on where the one before ends are one.
fn joined(extents: &[ImageExtent]) -> Vec<ImageExtent> {
    let mut joined: Vec<ImageExtent> = Vec::new();
    for extent in extents {
        if let Some(last) = joined.last_mut()
            && last.depth == extent.depth
            && last.place.continues(last.len_bytes, extent.place)
        {
            last.len_bytes += extent.len_bytes;
        } else {
            joined.push(*extent);
        }
    }
    joined
}

/// What memory says of a range, where it says anything, is what the map says.
fn compare_maps(image: &Arc<Image>, range: std::ops::Range<u64>) -> Result<(), TestCaseError> {
    let (mut from_memory, mut from_tables) = (Vec::new(), Vec::new());
    if let Attempt::Done(_ticket) = image.try_map(range.clone(), &mut from_memory).expect("inside") {
        image.map_range(range.clone(), &mut from_tables).expect("mapped");
        let (from_memory, from_tables) = (joined(&from_memory), joined(&from_tables));
        if from_memory != from_tables {
            let text = format!("{range:?}: memory says {from_memory:?}, tables {from_tables:?}");
            return Err(TestCaseError::fail(text));
        }
    }
    Ok(())
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Map(u64, u64),
    Flush,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let any_byte = || 0..1_u64 << 32;
    let at =
        || prop_oneof![any_byte(), any_byte().prop_map(|at| at << 9), any_byte().prop_map(|at| at << 12)];
    let len =
        || prop_oneof![1..10_000_u64, (1..600_u64).prop_map(|n| n << 9), (1..40_u64).prop_map(|n| n << 16)];
    prop_oneof![
        6 => (at(), len(), 1..=255_u8).prop_map(|(at, len, byte)| Step::Write(at, len, byte)),
        2 => (at(), len()).prop_map(|(at, len)| Step::Zero(at, len)),
        3 => (at(), len()).prop_map(|(at, len)| Step::Map(at, len)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ]
}

fn try_history(kind: Kind, steps: &[Step]) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().expect("a directory");
    let mut model = new_disk(dir.path(), kind);
    let size = model.len() as u64;
    let mut image = open_disk(dir.path(), kind);
    let fail = |error: img_core::Error| TestCaseError::fail(error.to_string());
    let mut guest = vec![0; model.len()];
    for step in steps {
        let inside = |at: u64, len: u64| {
            let at = at % size;
            at..(at + len).min(size)
        };
        let part = |range: &std::ops::Range<u64>| {
            usize::try_from(range.start).expect("small")..usize::try_from(range.end).expect("small")
        };
        match *step {
            Step::Write(at, len, byte) => {
                let range = inside(at, len);
                model[part(&range)].fill(byte);
                Queue::new(&image).write(&model[part(&range)], range.start).map_err(fail)?;
            }
            Step::Zero(at, len) => {
                let range = inside(at, len);
                model[part(&range)].fill(0);
                image.write_zeroes(range, at % 2 == 0).map_err(fail)?;
            }
            Step::Map(at, len) => compare_maps(&image, inside(at, len))?,
            Step::Flush => image.flush().map_err(fail)?,
            Step::Reopen => {
                close(image).map_err(fail)?;
                image = open_disk(dir.path(), kind);
            }
        }
        Queue::new(&image).read(&mut guest, 0).map_err(fail)?;
        if guest != model {
            let at = guest.iter().zip(&model).position(|(found, expected)| found != expected);
            return Err(TestCaseError::fail(format!("after {step:x?} byte {at:x?} is wrong")));
        }
        compare_maps(&image, 0..size)?;
    }
    close(image).map_err(fail)?;
    if registry::by_name(kind.format).is_some_and(|driver| driver.can_check()) {
        let mode = OpenMode::Check { repair: false };
        let image = open(&dir.path().join("disk"), Some(kind.format), mode).expect("opens");
        let report = image.check(Repair::Nothing, &mut |_| {}).expect("checked");
        if (report.corruptions, report.check_errors) != (0, 0) {
            return Err(TestCaseError::fail(format!("{report:?}")));
        }
    }
    Ok(())
}

/// Whatever the history, a queue that asks memory first reads and writes the flat model.
#[test]
fn a_queue_reads_and_writes_the_model() {
    for kind in KINDS {
        let mut runner = TestRunner::new(proptest_config(4, "every_format_answers_from_memory"));
        if let Err(failure) = runner.run(&vec(step(), 1..16), |steps| try_history(*kind, &steps)) {
            panic!("{kind:?}: {failure}");
        }
    }
}

/// Read and written once by calls that may block, the same bytes are read and overwritten from memory alone.
#[test]
fn what_is_warm_does_not_block() {
    for kind in KINDS {
        let dir = tempfile::tempdir().expect("a directory");
        let mut model = new_disk(dir.path(), *kind);
        let written = 700_000..3_200_000;
        model[written.clone()].fill(7);
        let image = open_disk(dir.path(), *kind);
        image.write_at(&model[written.clone()], written.start as u64).expect("written");
        // Over what is there by now: what is to be known before is known then.
        image.write_at(&model[written.clone()], written.start as u64).expect("written");
        let mut queue = Queue::new(&image);
        let mut guest = vec![0; model.len()];
        queue.read(&mut guest, 0).expect("read");
        assert!(guest == model, "{kind:?}");
        queue.count = Count::default();
        for at in written.clone().step_by(100_001) {
            let end = (at + 100_001).min(written.end);
            model[at..end].fill(9);
            queue.write(&model[at..end], at as u64).expect("written");
        }
        for at in (0..model.len()).step_by(65_536) {
            let end = (at + 65_536).min(model.len());
            queue.read(&mut guest[at..end], at as u64).expect("read");
        }
        assert!(guest == model, "{kind:?}");
        assert_eq!((queue.count.blocked, queue.count.busy), (0, 0), "{kind:?}");
        drop(queue);
        close(image).expect("closed");
        let image = open(&dir.path().join("disk"), Some(kind.format), OpenMode::Read).expect("opens");
        assert!(read_all(&image).expect("read") == model, "{kind:?}");
    }
}

/// A stream's grains take a decoder: they are never answered from memory, and are read all the same.
#[test]
fn compressed_grains_are_for_who_may_wait() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    fs::write(dir.path().join("plain"), vec![5; 200_000]).expect("written");
    let convert = "convert -f raw -O vmdk -o subformat=streamOptimized plain disk";
    img(dir.path(), convert.split(' ')).output().success();
    let image = Arc::new(open(&path, Some("vmdk"), OpenMode::Read).expect("opens"));
    let mut queue = Queue::new(&image);
    let mut guest = vec![0; 4096];
    for _ in 0..2 {
        queue.read(&mut guest, 0).expect("read");
        assert_eq!(guest, [5; 4096]);
    }
    assert_eq!(queue.count, Count { done: 0, busy: 0, blocked: 2, tables: 0 });
    let mut extents = Vec::new();
    image.map_range(0..4096, &mut extents).expect("mapped");
    assert!(matches!(extents[0].place, Place::Encoded { .. }));
}
