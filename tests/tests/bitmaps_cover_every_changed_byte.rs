//! Whatever is written, zeroed, discarded, stored compressed or given up half way, at whatever borders: the bitmaps
//! that an image keeps name every byte that has changed since they were made, in every granularity, while the image is
//! open and after it was opened again, through changes of its size, and in a base that an overlay is committed into.
//! What the reference marks for the same writes and zeroes is marked as well.

use std::{fs, ops::Range, path::Path, sync::Arc};

use img_core::{
    format::{Attempt, DirtyMap, NewBitmap, OpenMode, OptionSet, WriteStep},
    image::Image,
    storage::{MemoryStorage, Preallocation, Storage},
};
use img_tests::{
    command::{img, qemu_img, qemu_io},
    memory,
    pattern::Random,
    queue,
    scenario::{Layout, Op, Qcow2, apply},
};
use proptest::{collection::vec, prelude::*};

/// Not whole clusters.
const DISK_BYTES: u64 = (1 << 20) + 3 * 512;
const GRANULARITIES: [u64; 4] = [512, 4096, 64 << 10, 1 << 20];

#[derive(Clone, Debug)]
enum Step {
    Write(Range<u64>),
    Zero(Range<u64>, bool),
    Discard(Range<u64>),
    Compress(u64),
    /// As a queue writes: so many of its steps are moved before it is given up, or all, and it is committed.
    Queue(Range<u64>, Option<usize>),
    Resize(u64),
    Flush,
    Reopen,
}

/// Ranges with any borders, and such that touch or cross a border by a byte.
fn range() -> impl Strategy<Value = Range<u64>> {
    let near = |order: u32| {
        (0..DISK_BYTES >> order, 0..3_u64).prop_map(move |(at, by)| ((at << order) + by).max(1) - 1)
    };
    let start = prop_oneof![0..DISK_BYTES, near(9), near(12), near(16)];
    let len = prop_oneof![1..3_u64, 1..5000_u64, 1..200_000_u64, (1..30_u64).prop_map(|len| len << 12)];
    (start, len).prop_map(|(start, len)| start..start + len)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => range().prop_map(Step::Write),
        3 => (range(), any::<bool>()).prop_map(|(range, unmap)| Step::Zero(range, unmap)),
        2 => range().prop_map(Step::Discard),
        1 => (0..DISK_BYTES).prop_map(Step::Compress),
        3 => (range(), proptest::option::of(0..3_usize)).prop_map(|(range, end)| Step::Queue(range, end)),
        1 => (1..5000_u64).prop_map(|sectors| Step::Resize(sectors * 512)),
        1 => Just(Step::Flush),
        2 => Just(Step::Reopen),
    ]
}

fn layout() -> impl Strategy<Value = Layout> {
    (any::<bool>(), 0..3_u32).prop_map(|(extended_l2, order)| {
        let cluster_bits = if extended_l2 { 14 + order } else { 9 + 3 * order };
        qcow2(cluster_bits, extended_l2)
    })
}

const fn qcow2(cluster_bits: u32, extended_l2: bool) -> Layout {
    let (version, refcount_bits) = (3, 16);
    Layout::Qcow2(Qcow2 {
        version,
        cluster_bits,
        refcount_bits,
        extended_l2,
        zstd: false,
        lazy_refcounts: false,
    })
}

fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("small")
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; usize_of(image.virtual_size_bytes())];
    image.read_at(&mut bytes, 0).expect("readable");
    bytes
}

/// Gives the image an empty bitmap of each granularity.
fn add_bitmaps(image: &Image) {
    for granularity in GRANULARITIES {
        let map = DirtyMap::new(image.virtual_size_bytes(), granularity).expect("small");
        let bitmap = NewBitmap { name: &granularity.to_string(), enabled: true, map: &map };
        image.layers()[0].bitmaps().expect("version 3").store(&[bitmap]).expect("stored");
    }
}

fn bitmap(image: &Image, granularity: u64) -> DirtyMap {
    let bitmaps = image.layers()[0].bitmaps().expect("version 3");
    bitmaps.read(&granularity.to_string()).expect("it is kept")
}

/// Every byte that is not what it was is marked.
fn assert_covered(image: &Image, was: &[u8], when: &str) {
    let now = read_all(image);
    assert_eq!(now.len(), was.len(), "{when}");
    for granularity in GRANULARITIES {
        let map = bitmap(image, granularity);
        for (at, (was, now)) in (0..).step_by(512).zip(was.chunks(512).zip(now.chunks(512))) {
            assert!(
                was == now || map.is_dirty(at),
                "{when}: sector {at:#x} has changed, granularity {granularity}"
            );
        }
    }
}

fn take(image: &Arc<Image>, step: &Step, byte: u8, layout: &Layout) {
    let size = image.virtual_size_bytes();
    let inside = |range: &Range<u64>| range.start.min(size)..range.end.min(size);
    match step {
        Step::Write(range) => {
            let range = inside(range);
            image.write_at(&vec![byte; usize_of(range.end - range.start)], range.start).expect("written");
        }
        Step::Zero(range, unmap) => image.write_zeroes(inside(range), *unmap).expect("zeroed"),
        Step::Discard(range) => image.discard(inside(range)).expect("discarded"),
        Step::Compress(at) => {
            let at = (at % size) / layout.cluster_bytes() * layout.cluster_bytes();
            let len = layout.cluster_bytes().min(size - at);
            apply(image, &Op::Compress { at, len, byte }, layout).expect("stored");
        }
        Step::Queue(range, end) => {
            let mut steps = Vec::new();
            let attempt = image.try_prepare_write(inside(range), &mut steps).expect("inside");
            let Attempt::Done(ticket) = attempt else { return };
            let mut extents = Vec::new();
            for step in steps.iter().take(end.unwrap_or(usize::MAX)) {
                let filled = queue::filled(image, &ticket, step, &mut extents).expect("readable");
                let Some([before, after]) = filled else { return };
                let WriteStep { guest_bytes, file, at, .. } = step;
                let bytes = vec![byte; usize_of(guest_bytes.end - guest_bytes.start)];
                let all = [&before[..], &bytes, &after].concat();
                let at = at.0 - before.len() as u64;
                image.storage(0, *file).expect("open").write_at(&all, at).expect("written");
            }
            if end.is_none() {
                ticket.commit().expect("committed");
            }
        }
        Step::Resize(size) => image.resize(*size, Preallocation::Off).expect("resized"),
        Step::Flush => image.flush().expect("flushed"),
        Step::Reopen => unreachable!("done by who holds the image"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn while_open_and_when_opened_again(
        layout in layout(),
        has_below in any::<bool>(),
        steps in vec(step(), 1..24),
    ) {
        let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new("image"));
        let below: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("below", &vec![0x77; usize_of(DISK_BYTES)]));
        let below = has_below.then_some(&below);
        memory::create_over(&file, &layout, DISK_BYTES, below).expect("created");
        let open = || {
            let image = memory::open_over(Arc::clone(&file), below, OpenMode::Write, &OptionSet::new());
            Arc::new(image.expect("it opens"))
        };
        let mut image = open();
        image.write_at(&vec![0x11; 300_000], 100_000).expect("written");
        image.write_zeroes(200_000..250_000, true).expect("zeroed");
        add_bitmaps(&image);
        let mut was = read_all(&image);
        for (number, step) in (0_u8..).zip(&steps) {
            if let Step::Reopen = step {
                Arc::into_inner(image).expect("nobody else holds it").close().expect("closed");
                image = open();
            } else {
                take(&image, step, 0x80 + number, &layout);
            }
            // New bytes are zeroes, and not changed.
            was.resize(usize_of(image.virtual_size_bytes()), 0);
            assert_covered(&image, &was, &format!("after {step:?}"));
        }
        Arc::into_inner(image).expect("nobody else holds it").close().expect("closed");
        assert_covered(&open(), &was, "at the end");
    }
}

/// The image in a file, opened from a copy in memory.
fn copy_of(path: &Path, mode: OpenMode) -> Image {
    let bytes = fs::read(path).expect("readable");
    memory::open(Arc::new(MemoryStorage::from_bytes("copy", &bytes)), mode).expect("it opens")
}

/// What one marks the other marks.
fn assert_marks(ours: &Image, theirs: &Image, seed: u64) {
    for granularity in GRANULARITIES {
        let [ours, theirs] = [ours, theirs].map(|image| bitmap(image, granularity));
        for range in theirs.ranges() {
            let missing = range.clone().step_by(512).find(|at| !ours.is_dirty(*at));
            assert_eq!(
                missing, None,
                "seed {seed}, granularity {granularity}: the reference marks {range:x?}"
            );
        }
    }
}

/// A history at any borders, as commands of qemu-io and as steps, of so many kinds; the last kind are discards.
fn history(seed: u64, kinds: u64) -> (Vec<String>, Vec<Step>) {
    let mut random = Random::new(seed);
    (0..10_u64)
        .map(|number| {
            let start = random.below(DISK_BYTES);
            let len = (random.below(100_000) + 1).min(DISK_BYTES - start);
            let range = start..start + len;
            match random.below(kinds) {
                0 => (format!("write -q -z {start} {len}"), Step::Zero(range, false)),
                1 => (format!("write -q -z -u {start} {len}"), Step::Zero(range, true)),
                3 => (format!("discard -q {start} {len}"), Step::Discard(range)),
                _ => (format!("write -q -P {} {start} {len}", 0x80 + number), Step::Write(range)),
            }
        })
        .unzip()
}

/// A disk with bitmaps that the reference made.
fn create(directory: &Path, name: &str) {
    let (disk, options) = (DISK_BYTES.to_string(), "cluster_size=4k");
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "-o", options, name, &disk]).output().success();
    qemu_io(directory, "qcow2", name, &["write -q -P 1 100000 300000"]).output().success();
    for granularity in GRANULARITIES.map(|granularity| granularity.to_string()) {
        qemu_img(directory, ["bitmap", "--add", "-g", &granularity, name, &granularity]).output().success();
    }
}

/// But for discards, of which the reference marks the borders as well that it leaves as they are.
#[test]
fn as_the_reference_marks_them() {
    for seed in 0..12 {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let directory = directory.path();
        create(directory, "disk");
        let ours = Arc::new(copy_of(&directory.join("disk"), OpenMode::Write));
        let (commands, steps) = history(seed, 3);
        qemu_io(directory, "qcow2", "disk", &commands).output().success();
        for (number, step) in (0..).zip(&steps) {
            take(&ours, step, 0x80 + number, &qcow2(12, false));
        }
        assert_marks(&ours, &copy_of(&directory.join("disk"), OpenMode::Read), seed);
    }
}

#[test]
fn in_a_base_that_is_committed_into() {
    for seed in 100..104 {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let directory = directory.path();
        create(directory, "base");
        let was = read_all(&copy_of(&directory.join("base"), OpenMode::Read));
        qemu_img(directory, ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"])
            .output()
            .success();
        qemu_io(directory, "qcow2", "top", &history(seed, 4).0).output().success();
        img(directory, ["commit", "-q", "top"]).output().success();
        let base = copy_of(&directory.join("base"), OpenMode::Read);
        assert_ne!(read_all(&base), was, "seed {seed}: something was committed");
        assert_covered(&base, &was, &format!("seed {seed}"));
    }
}
