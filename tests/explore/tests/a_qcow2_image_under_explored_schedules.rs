//! Threads on one qcow2 image, in schedules that are chosen: at each lock and each atomic of `img-core` another one may
//! go on. What it promises holds in all of them.
//!
//! Half of the schedules are random; the others are mostly in order, with few preemptions, in places drawn so that each
//! bug that takes no more of them is found with a known probability (PCT). `IMG_TEST_CASES` says how many are tried, and
//! `IMG_TEST_SEED` which.

use std::{
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Wake, Waker},
};

use img_core_explored::{
    format::{Attempt, Layer, OpenContext, OpenMode, OptionSet, Place, WriteStep, registry},
    image::{Commit, Image, ImageExtent, WriteTicket},
    storage::{MemoryStorage, Storage, testing::CrashRecorder},
};
use shuttle::{
    Config, Runner,
    scheduler::{PctScheduler, RandomScheduler},
    thread::{self, Thread},
};

const CLUSTER: u64 = 512;
/// Of two L2 tables.
const DISK_BYTES: u64 = 128 * CLUSTER;
/// Preemptions of a schedule that is mostly in order.
const PREEMPTIONS: usize = 3;
/// Calls go deeper than the explorer expects.
const STACK_BYTES: usize = 1 << 20;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Runs `test` in so many schedules of each kind.
fn explore(schedules: u64, test: fn()) {
    let schedules = usize::try_from(number("IMG_TEST_CASES", schedules)).expect("a number of schedules");
    let seed = number("IMG_TEST_SEED", 1);
    let config = || {
        let mut config = Config::new();
        config.stack_size = STACK_BYTES;
        config
    };
    Runner::new(RandomScheduler::new_from_seed(seed, schedules), config()).run(test);
    Runner::new(PctScheduler::new_from_seed(seed, PREEMPTIONS, schedules), config()).run(test);
}

/// The bytes of an empty image. Made once, by the library as it is.
fn empty_image() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let memory = Arc::new(img_core::storage::MemoryStorage::new("explored.qcow2"));
        let storage: Arc<dyn img_core::storage::Storage> = Arc::clone(&memory) as _;
        let mut options = img_core::format::OptionSet::new();
        options.set("cluster_size", CLUSTER.to_string());
        let request = img_core::format::CreateRequest {
            virtual_size_bytes: DISK_BYTES,
            backing: None,
            options: &options,
            open_file: &|_, _| unreachable!("one file"),
        };
        let driver = img_core::format::registry::by_name("qcow2").expect("a known format");
        driver.create(&storage, &request).expect("created");
        memory.to_vec()
    })
}

/// An image with the least of caches: tables are read and dropped all the time.
fn open(storage: Arc<dyn Storage>) -> Arc<Image> {
    let mut options = OptionSet::new();
    for name in ["l2-cache-size", "refcount-cache-size", "l2-cache-entry-size"] {
        options.set(name, "512");
    }
    let context =
        OpenContext { mode: OpenMode::Write, options: &options, open_file: &|_, _| unreachable!("one file") };
    let driver = registry::by_name("qcow2").expect("a known format");
    let layer: Arc<dyn Layer> = driver.open(storage, &context).expect("it is valid");
    Arc::new(Image::from_layers(vec![layer]).expect("one layer"))
}

fn new_image() -> (Arc<MemoryStorage>, Arc<Image>) {
    let memory = Arc::new(MemoryStorage::from_bytes("explored.qcow2", empty_image()));
    let image = open(Arc::clone(&memory) as _);
    (memory, image)
}

/// The library as it is finds nothing wrong with the image, or nothing but leaks, and reads it.
fn audited(bytes: &[u8], leaks: bool) -> Result<Vec<u8>, String> {
    use img_core::{format, image::Image};
    let storage: Arc<dyn img_core::storage::Storage> =
        Arc::new(img_core::storage::MemoryStorage::from_bytes("explored.qcow2", bytes));
    let open = |mode| {
        let options = format::OptionSet::new();
        let context =
            format::OpenContext { mode, options: &options, open_file: &|_, _| unreachable!("one file") };
        let driver = format::registry::by_name("qcow2").expect("a known format");
        let layer = driver.open(Arc::clone(&storage), &context).map_err(|error| error.to_string())?;
        Image::from_layers(vec![layer]).map_err(|error| error.to_string())
    };
    let mut findings = Vec::new();
    let report = open(format::OpenMode::Check { repair: false })?
        .check(format::Repair::Nothing, &mut |finding| findings.push(finding.text))
        .map_err(|error| error.to_string())?;
    if (report.corruptions, report.check_errors) != (0, 0) || (report.leaks != 0 && !leaks) {
        return Err(format!("{findings:#?}"));
    }
    let mut guest = vec![0; usize::try_from(DISK_BYTES).expect("small")];
    open(format::OpenMode::Read)?.read_at(&mut guest, 0).map_err(|error| error.to_string())?;
    Ok(guest)
}

/// Wakes a thread of the explorer.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Tries until nobody is in the way, parked in between: a wake-up that is lost is a deadlock, which the explorer tells.
fn when_free<T>(image: &Image, mut attempt: impl FnMut() -> Attempt<T>) -> Attempt<T> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        match attempt() {
            Attempt::Busy => {}
            other => return other,
        }
        image.wake_on_progress(&waker);
        match attempt() {
            Attempt::Busy => thread::park(),
            other => return other,
        }
    }
}

/// Writes as a queue does: from memory where that is enough.
fn write(image: &Arc<Image>, guest: Range<u64>, byte: u8) {
    let bytes = vec![byte; usize::try_from(guest.end - guest.start).expect("small")];
    let mut steps = Vec::new();
    let attempt = when_free(image, || image.try_prepare_write(guest.clone(), &mut steps).expect("inside"));
    let Attempt::Done(ticket) = attempt else {
        return image.write_at(&bytes, guest.start).expect("written");
    };
    for step in &steps {
        let WriteStep { guest_bytes, file, at, fill_before_bytes, fill_after_bytes, .. } = step;
        let before = filled(image, &ticket, guest_bytes.start - fill_before_bytes..guest_bytes.start);
        let after = filled(image, &ticket, guest_bytes.end..guest_bytes.end + fill_after_bytes);
        let (Some(before), Some(after)) = (before, after) else {
            drop(ticket);
            return image.write_at(&bytes, guest.start).expect("written");
        };
        let len = usize::try_from(guest_bytes.end - guest_bytes.start).expect("small");
        thread::yield_now();
        let all = [&before, &bytes[..len], &after].concat();
        image.storage(0, *file).expect("open").write_at(&all, at.0 - fill_before_bytes).expect("written");
    }
    match ticket.try_commit() {
        Commit::Done => {}
        Commit::Blocks(ticket) => ticket.commit().expect("committed"),
    }
}

/// What a step of a write fills, with time between the answer and the bytes.
fn filled(image: &Arc<Image>, ticket: &WriteTicket, guest: Range<u64>) -> Option<Vec<u8>> {
    let mut bytes = vec![0xee; usize::try_from(guest.end - guest.start).expect("small")];
    let mut extents = Vec::new();
    ticket.map_fill(guest.clone(), &mut extents).then(|| fill(image, &extents, guest.start, &mut bytes))?;
    Some(bytes)
}

/// Reads as a queue does, with time between the answer and the bytes.
fn read(image: &Arc<Image>, guest: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(guest.end - guest.start).expect("small")];
    let mut extents = Vec::new();
    let attempt = when_free(image, || image.try_map(guest.clone(), &mut extents).expect("inside"));
    let Attempt::Done(_ticket) = attempt else {
        image.read_at(&mut bytes, guest.start).expect("read");
        return bytes;
    };
    fill(image, &extents, guest.start, &mut bytes);
    bytes
}

/// Fills `bytes`, which start at `start` of the guest's disk, from where the map says.
fn fill(image: &Arc<Image>, extents: &[ImageExtent], start: u64, bytes: &mut [u8]) {
    for extent in extents {
        let from = usize::try_from(extent.guest_offset - start).expect("small");
        let part = &mut bytes[from..from + usize::try_from(extent.len_bytes).expect("small")];
        thread::yield_now();
        match extent.place {
            Place::Data { file, at, .. } => {
                image.storage(extent.depth, file).expect("open").read_at(part, at.0).expect("read");
            }
            Place::Zero { .. } | Place::Unallocated => part.fill(0),
            Place::Encoded { .. } => unreachable!("nothing is compressed"),
        }
    }
}

fn spawn(image: &Arc<Image>, work: impl FnOnce(&Arc<Image>) + Send + 'static) -> thread::JoinHandle<()> {
    let image = Arc::clone(image);
    thread::spawn(move || work(&image))
}

fn join(threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().expect("it ends"));
}

fn close(image: Arc<Image>) {
    Arc::into_inner(image).expect("nobody else holds it").close().expect("closed");
}

/// Reservations of the allocator: writes that meet in a cluster, whole ones beside it, tables that are made, and flushes.
/// Every byte is where it was put, each cluster has one owner, and nothing is leaked.
#[test]
fn allocations_have_their_clusters_to_themselves() {
    explore(150, || {
        let (memory, image) = new_image();
        let middle = 2 * CLUSTER + 200;
        let threads = [
            spawn(&image, move |image| write(image, 100..middle, 1)),
            spawn(&image, move |image| write(image, middle..5 * CLUSTER, 2)),
            spawn(&image, |image| {
                // In the other table.
                write(image, 100 * CLUSTER..103 * CLUSTER, 3);
                image.flush().expect("flushed");
            }),
        ];
        join(threads);
        close(image);
        let guest = audited(&memory.to_vec(), false).expect("a sound image");
        let mut expected = vec![0; guest.len()];
        for (range, byte) in [(100..middle, 1), (middle..5 * CLUSTER, 2), (100 * CLUSTER..103 * CLUSTER, 3)] {
            let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            expected[range].fill(byte);
        }
        assert!(guest == expected, "the image is not what was written");
    });
}

/// The table cache: slices are read, changed, frozen by a flush, copied and dropped under readers. A reader sees what
/// was there before a write or after it, and never goes back.
#[test]
fn readers_see_writes_once_and_for_all() {
    explore(150, || {
        let (memory, image) = new_image();
        write(&image, 0..CLUSTER, 1);
        image.flush().expect("flushed");
        let threads = [
            spawn(&image, |image| {
                for byte in 2..4 {
                    write(image, 0..CLUSTER, byte);
                    write(image, (60 + u64::from(byte)) * CLUSTER..(62 + u64::from(byte)) * CLUSTER, byte);
                }
            }),
            spawn(&image, |image| {
                image.flush().expect("flushed");
                image.flush().expect("flushed");
            }),
            spawn(&image, |image| {
                let mut seen = 1;
                for _ in 0..3 {
                    let bytes = read(image, 0..CLUSTER);
                    let now = bytes[0];
                    assert!(bytes.iter().all(|byte| *byte == now), "a whole write");
                    assert!((seen..4).contains(&now), "{now} after {seen}");
                    seen = now;
                    // Another table, so that the first one's slice makes room.
                    let other = read(image, 63 * CLUSTER..64 * CLUSTER)[0];
                    assert!([0, 2, 3].contains(&other), "{other}");
                }
            }),
        ];
        join(threads);
        close(image);
        audited(&memory.to_vec(), false).expect("a sound image");
    });
}

/// Leases: while a reader may still be at a cluster, a discard does not make it somebody else's, whatever is flushed and
/// allocated meanwhile.
#[test]
fn a_reader_never_sees_what_was_written_for_another_place() {
    explore(150, || {
        let (memory, image) = new_image();
        write(&image, 0..4 * CLUSTER, 1);
        image.flush().expect("flushed");
        let threads = [
            spawn(&image, |image| {
                for _ in 0..2 {
                    for byte in read(image, 0..4 * CLUSTER) {
                        assert!(byte <= 1, "it was discarded or not, and never {byte}");
                    }
                }
            }),
            spawn(&image, |image| {
                image.discard(0..4 * CLUSTER).expect("discarded");
                image.flush().expect("flushed");
                write(image, 20 * CLUSTER..24 * CLUSTER, 2);
                image.flush().expect("flushed");
            }),
            spawn(&image, |image| {
                image.flush().expect("flushed");
                write(image, 30 * CLUSTER..32 * CLUSTER, 3);
            }),
        ];
        join(threads);
        close(image);
        let guest = audited(&memory.to_vec(), false).expect("a sound image");
        let at = |cluster: u64| guest[usize::try_from(cluster * CLUSTER).expect("small")];
        assert_eq!((at(0), at(20), at(30)), (0, 2, 3));
    });
}

/// Writes in flight that are parked for one who wants the image alone: a snapshot waits for them, they for it, and
/// nobody for ever.
#[test]
fn snapshots_and_parked_writes_wait_for_each_other_and_end() {
    explore(100, || {
        let (memory, image) = new_image();
        write(&image, 0..2 * CLUSTER, 1);
        let threads = [
            spawn(&image, |image| write(image, 100..CLUSTER + 100, 2)),
            spawn(&image, |image| write(image, CLUSTER + 100..3 * CLUSTER, 3)),
            spawn(&image, |image| image.snapshot_create("s", (1, 0)).expect("taken")),
        ];
        join(threads);
        let now = read(&image, 0..3 * CLUSTER);
        let middle = usize::try_from(CLUSTER).expect("small") + 100;
        assert!(now[..100].iter().all(|byte| *byte == 1));
        assert!(
            now[100..middle].iter().all(|byte| *byte == 2) && now[middle..].iter().all(|byte| *byte == 3)
        );
        close(image);
        audited(&memory.to_vec(), false).expect("a sound image");
    });
}

/// Generations of flushes: what a thread wrote before its flush began is there after a power cut at any moment after the
/// flush returned, also when it met the flush of another.
#[test]
fn a_flush_answers_for_what_came_before_it() {
    explore(40, || {
        let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("explored.qcow2", empty_image()));
        let recorder = Arc::new(CrashRecorder::new());
        let image = open(recorder.record(memory).expect("recorded"));
        // A bit for each flush that has returned. The explorer does not know of this: noting it is no step.
        let flushed = Arc::new(AtomicU64::new(0));
        let threads = (0..3).map(|index| {
            let (recorder, flushed) = (Arc::clone(&recorder), Arc::clone(&flushed));
            spawn(&image, move |image| {
                let start = index * 40 * CLUSTER;
                write(image, start..start + 2 * CLUSTER, 7);
                image.flush().expect("flushed");
                let bit = 1 << index;
                recorder.mark(flushed.fetch_or(bit, Ordering::SeqCst) | bit);
                write(image, start + 2 * CLUSTER..start + 3 * CLUSTER, 8);
            })
        });
        join(threads.collect::<Vec<_>>());
        drop(image);
        for state in recorder.states(1, 10) {
            let [file] = &state.files[..] else { panic!("one file") };
            let guest = audited(&file.to_vec(), true)
                .unwrap_or_else(|why| panic!("{why}\nat {}\n{}", state.moment, state.description));
            let flushed = state.mark.unwrap_or(0);
            for index in (0..3).filter(|index| flushed >> index & 1 == 1) {
                let start = usize::try_from(index * 40 * CLUSTER).expect("small");
                let bytes = &guest[start..start + usize::try_from(2 * CLUSTER).expect("small")];
                assert!(
                    bytes.iter().all(|byte| *byte == 7),
                    "what thread {index} flushed is gone at {}\n{}",
                    state.moment,
                    state.description
                );
            }
        }
    });
}
