//! What every format promises to threads that change one image: each finds what it left, also in clusters that it
//! shares with others, nothing else changes, the image is sound, and what was flushed outlives a power cut.

use std::{
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use img_core_explored::{
    image::Image,
    storage::{MemoryStorage, Storage, testing::CrashRecorder},
};
use shuttle::rand::{Rng, thread_rng};

use super::harness::{self, Audited, Bytes, close, explore, flush, join, read, spawn, write};

const THREADS: u64 = 3;
/// What each thread does.
const OPS: usize = 4;
/// What the parent holds where threads write.
const BELOW: u8 = 0x55;
/// Bytes of a shared cluster that belong to one thread, from odd places on.
const LANE_BYTES: u64 = 1000;
const FIRST_LANE: u64 = 37;

/// A kind of image. Its disk has `clusters` clusters, the last ones of which stand in another table.
struct Kind {
    format: &'static str,
    options: &'static [(&'static str, &'static str)],
    cluster_bytes: u64,
    clusters: u64,
    images: OnceLock<(Bytes, Bytes)>,
    has_parent: bool,
}

const fn kind(
    format: &'static str,
    options: &'static [(&'static str, &'static str)],
    cluster_bytes: u64,
    clusters: u64,
    has_parent: bool,
) -> Kind {
    Kind { format, options, cluster_bytes, clusters, images: OnceLock::new(), has_parent }
}

const QCOW2: &[(&str, &str)] = &[("cluster_size", "4096")];
const QED: &[(&str, &str)] = &[("cluster_size", "4096"), ("table_size", "1")];
const SMALL_CACHES: &[(&str, &str)] =
    &[("l2-cache-size", "4096"), ("refcount-cache-size", "4096"), ("l2-cache-entry-size", "4096")];

static KINDS: [Kind; 8] = [
    kind("qcow2", QCOW2, 4096, 520, false),
    kind("qcow2", QCOW2, 4096, 520, true),
    kind("qed", QED, 4096, 520, false),
    kind("qed", QED, 4096, 520, true),
    kind("vmdk", &[], 64 << 10, 520, false),
    kind("vmdk", &[("zeroed_grain", "on")], 64 << 10, 520, true),
    kind("vpc", &[("force_size", "on")], 2 << 20, 16, false),
    kind("vpc", &[("force_size", "on")], 2 << 20, 16, true),
];

impl Kind {
    fn disk_bytes(&self) -> u64 {
        self.cluster_bytes * self.clusters
    }

    /// An empty image, and its parent.
    fn images(&self) -> (Bytes, Option<Bytes>) {
        let (top, parent) = self.images.get_or_init(|| {
            let size = self.disk_bytes();
            if !self.has_parent {
                return (harness::create(self.format, size, self.options, None), &[]);
            }
            let parent = harness::create(self.format, size, self.options, None);
            let parent = harness::filled(self.format, parent, &self.touched(), BELOW);
            // A VHD takes the size of its parent as it is.
            let options = if self.format == "vpc" { &[] } else { self.options };
            (harness::create(self.format, size, options, Some(parent)), parent)
        });
        (top, self.has_parent.then_some(parent))
    }

    fn open(&self, top: Arc<dyn Storage>) -> Arc<Image> {
        let caches = if self.format == "qcow2" { SMALL_CACHES } else { &[] };
        let (_, parent) = self.images();
        let parent = parent.map(|bytes| Arc::new(MemoryStorage::from_bytes("parent", bytes)) as _);
        harness::open(self.format, caches, top, parent)
    }

    fn new_image(&self) -> (Arc<MemoryStorage>, Arc<Image>) {
        let memory = Arc::new(MemoryStorage::from_bytes("explored", self.images().0));
        let image = self.open(Arc::clone(&memory) as _);
        (memory, image)
    }

    /// What the guest reads where nobody has written.
    fn initial(&self) -> u8 {
        if self.has_parent { BELOW } else { 0 }
    }

    fn cluster(&self, index: u64) -> Range<u64> {
        index * self.cluster_bytes..(index + 1) * self.cluster_bytes
    }

    /// The clusters that threads share: two neighbours, and one in another table.
    fn shared(&self) -> [Range<u64>; 3] {
        [0, 1, self.clusters - 1].map(|index| self.cluster(index))
    }

    /// What belongs to a thread: a part of each shared cluster, and a whole one.
    fn lanes(&self, thread: u64) -> Vec<Range<u64>> {
        let lane = |cluster: Range<u64>| {
            let start = cluster.start + FIRST_LANE + thread * LANE_BYTES;
            start..start + LANE_BYTES
        };
        let whole = self.cluster(2 + thread);
        // Blocks of many megabytes are not written as a whole, but sectors of them are.
        let whole = whole.start..whole.end.min(whole.start + (16 << 10));
        self.shared().into_iter().map(lane).chain([whole]).collect()
    }

    /// All that a test reads.
    fn touched(&self) -> Vec<Range<u64>> {
        let start = |cluster: Range<u64>| cluster.start..cluster.start + 4096;
        let whole = (0..THREADS).map(|thread| self.lanes(thread).remove(3));
        self.shared().into_iter().map(start).chain(whole).collect()
    }
}

/// What one thread may find in its lanes.
struct Model {
    thread: u64,
    lanes: Vec<(Range<u64>, Vec<u8>)>,
}

impl Model {
    fn new(kind: &Kind, thread: u64) -> Self {
        let lanes = kind.lanes(thread).into_iter().map(|lane| (lane, vec![kind.initial()]));
        Self { thread, lanes: lanes.collect() }
    }

    /// One operation, and what it leaves.
    fn step(&mut self, image: &Arc<Image>, number: usize) {
        let mut random = thread_rng();
        let at = random.gen_range(0..self.lanes.len());
        let (lane, may_be) = &mut self.lanes[at];
        let byte = u8::try_from(self.thread * 16 + 1 + number as u64).expect("small");
        match random.gen_range(0..10_u32) {
            what @ 0..6 => {
                if what == 0 {
                    give_up(image, lane.clone(), random.gen_bool(0.5));
                }
                write(image, lane.clone(), byte);
                *may_be = vec![byte];
            }
            what @ 6..8 => {
                image.write_zeroes(lane.clone(), what == 6).expect("zeroed");
                *may_be = vec![0];
            }
            8 => {
                image.discard(lane.clone()).expect("discarded");
                may_be.push(0);
            }
            _ => flush(image),
        }
        let found = read(image, lane.clone());
        self.compare(at, &found, "at once");
    }

    fn compare(&self, lane: usize, found: &[u8], when: &str) {
        let (range, may_be) = &self.lanes[lane];
        let wrong = found.iter().position(|byte| !may_be.contains(byte));
        assert!(
            wrong.is_none(),
            "{when}: thread {} finds {:#x} in {range:#x?}, {wrong:?} bytes on, not one of {may_be:#x?}",
            self.thread,
            found[wrong.unwrap_or(0)]
        );
    }
}

/// Prepares a write that comes to nothing, and puts other bytes where its own would have been. Nobody who waits is
/// told: that is for the image, which the caller makes do something.
fn give_up(image: &Image, guest: Range<u64>, writes: bool) {
    let writer = image.layers()[0].writer().expect("opened for writing");
    let prepared = writer.prepare_write(guest).expect("prepared");
    let step = prepared.step();
    if writes && step.mapping().is_some() {
        let storage = image.storage(0, step.file).expect("open");
        storage.write_at(&[0xee; 700], step.at.0).expect("written");
    }
}

/// Histories of writes, zeroes, discards, writes that are given up, and flushes.
fn histories(kind: &'static Kind, schedules: u64) {
    explore(schedules, move || {
        let (memory, image) = kind.new_image();
        let models: Vec<_> = (0..THREADS)
            .map(|thread| {
                let image = Arc::clone(&image);
                shuttle::thread::spawn(move || {
                    let mut model = Model::new(kind, thread);
                    (0..OPS).for_each(|number| model.step(&image, number));
                    model
                })
            })
            .collect();
        let models: Vec<_> = models.into_iter().map(|thread| thread.join().expect("it ends")).collect();
        close(image);
        // Formats without counts keep what was given up in the middle of the file.
        let leaks = kind.format != "qcow2";
        let image = Audited::new(kind.format, &memory.to_vec(), kind.images().1, false, leaks)
            .unwrap_or_else(|why| panic!("{why}"));
        let mut nobodys = kind.touched();
        for model in &models {
            for (at, (lane, _)) in model.lanes.iter().enumerate() {
                model.compare(at, &image.read(lane.clone()).expect("read"), "at the end");
                nobodys = nobodys.into_iter().flat_map(|range| without(range, lane)).collect();
            }
        }
        for range in nobodys {
            let found = image.read(range.clone()).expect("read");
            assert!(
                found.iter().all(|byte| *byte == kind.initial()),
                "{range:#x?} is nobody's, and has changed"
            );
        }
    });
}

/// What is left of a range.
fn without(range: Range<u64>, taken: &Range<u64>) -> Vec<Range<u64>> {
    let before = range.start..range.end.min(taken.start);
    let behind = range.start.max(taken.end)..range.end;
    [before, behind].into_iter().filter(|part| !part.is_empty()).collect()
}

/// What a thread wrote before its flush began is there after a power cut at any moment after the flush returned.
fn flushes(kind: &'static Kind, schedules: u64) {
    explore(schedules, move || {
        let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("explored", kind.images().0));
        let recorder = Arc::new(CrashRecorder::new());
        let image = kind.open(recorder.record(memory).expect("recorded"));
        // A bit for each flush that has returned. The explorer does not know of this: noting it is no step.
        let flushed = Arc::new(AtomicU64::new(0));
        let threads = (0..THREADS).map(|thread| {
            let (recorder, flushed) = (Arc::clone(&recorder), Arc::clone(&flushed));
            spawn(&image, move |image| {
                let lanes = kind.lanes(thread);
                write(image, lanes[0].clone(), 7);
                write(image, lanes[2].clone(), 7);
                flush(image);
                let bit = 1 << thread;
                recorder.mark(flushed.fetch_or(bit, Ordering::SeqCst) | bit);
                write(image, lanes[1].clone(), 8);
                image.write_zeroes(lanes[3].clone(), true).expect("zeroed");
            })
        });
        join(threads.collect::<Vec<_>>());
        drop(image);
        for state in recorder.states(1, 10) {
            let [file] = &state.files[..] else { panic!("one file") };
            let repairs = kind.format != "qcow2";
            let told = |why| format!("{why}\nat {}\n{}", state.moment, state.description);
            let image = Audited::new(kind.format, &file.to_vec(), kind.images().1, repairs, true)
                .unwrap_or_else(|why| panic!("{}", told(why)));
            let flushed = state.mark.unwrap_or(0);
            for thread in (0..THREADS).filter(|thread| flushed >> thread & 1 == 1) {
                for lane in [0, 2] {
                    let found = image.read(kind.lanes(thread)[lane].clone()).expect("read");
                    let is_there = found.iter().all(|byte| *byte == 7);
                    assert!(is_there, "{}", told(format!("what thread {thread} flushed is gone")));
                }
            }
        }
    });
}

/// A test of its own for each kind, so that one that fails says which.
macro_rules! for_every_kind {
    ($($name:ident: $at:literal,)*) => {
        mod histories {
            $(#[test]
            fn $name() {
                super::histories(&super::KINDS[$at], 60);
            })*
        }

        mod flushes {
            $(#[test]
            fn $name() {
                super::flushes(&super::KINDS[$at], 20);
            })*
        }
    };
}

for_every_kind! {
    qcow2: 0,
    qcow2_over_a_parent: 1,
    qed: 2,
    qed_over_a_parent: 3,
    vmdk: 4,
    vmdk_over_a_parent: 5,
    vpc: 6,
    vpc_over_a_parent: 7,
}
