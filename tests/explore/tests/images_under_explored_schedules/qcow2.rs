//! What qcow2 alone has: tables that are shared with snapshots, counts, leases, drains beside writers.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering},
};

use img_core_explored::{
    format::{DirtyMap, MAX_MAP_BYTES},
    image::{Image, Lookaside},
    storage::{MemoryStorage, Storage, testing::CrashRecorder},
};

use shuttle::sync::atomic::AtomicBool;

use super::harness::{
    self, Audited, Bytes, Tear, close, explore, flush, join, read, read_remembering, spawn, write,
};

const CLUSTER: u64 = 512;
/// Of two L2 tables.
const DISK_BYTES: u64 = 128 * CLUSTER;

/// The bytes of an empty image.
fn empty_image() -> Bytes {
    static BYTES: OnceLock<Bytes> = OnceLock::new();
    BYTES.get_or_init(|| harness::create("qcow2", DISK_BYTES, &[("cluster_size", "512")], None))
}

/// An image with the least of caches: tables are read and dropped all the time.
fn open(storage: Arc<dyn Storage>) -> Arc<Image> {
    let caches = ["l2-cache-size", "refcount-cache-size", "l2-cache-entry-size"].map(|name| (name, "512"));
    harness::open("qcow2", &caches, storage, None)
}

fn new_image() -> (Arc<MemoryStorage>, Arc<Image>) {
    let memory = Arc::new(MemoryStorage::from_bytes("explored.qcow2", empty_image()));
    let image = open(Arc::clone(&memory) as _);
    (memory, image)
}

/// What the guest reads in an image that is sound, but for leaks.
fn audited(bytes: &[u8], leaks: bool) -> Result<Vec<u8>, String> {
    Audited::new("qcow2", bytes, None, false, leaks)?.read(0..DISK_BYTES)
}

/// Reservations of the allocator: writes that meet in a cluster, whole ones beside it, tables that are made, and
/// flushes. Every byte is where it was put, each cluster has one owner, and nothing is leaked.
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
                flush(image);
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

/// The table cache: slices are read, changed, taken along by a flush, copied and dropped under readers. A reader sees what
/// was there before a write or after it, and never goes back.
#[test]
fn readers_see_writes_once_and_for_all() {
    explore(150, || {
        let (memory, image) = new_image();
        write(&image, 0..CLUSTER, 1);
        flush(&image);
        let threads = [
            spawn(&image, |image| {
                for byte in 2..4 {
                    write(image, 0..CLUSTER, byte);
                    write(image, (60 + u64::from(byte)) * CLUSTER..(62 + u64::from(byte)) * CLUSTER, byte);
                }
            }),
            spawn(&image, |image| {
                flush(image);
                flush(image);
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

/// Whole tables that are read past the cache: an entry of two words that is changed and written during the read is as
/// it was before or after, and never half of each.
#[test]
fn a_table_that_is_read_whole_has_no_torn_entry() {
    const WIDE: u64 = 16 << 10;
    const TABLE_SPAN: u64 = 1024 * WIDE;
    static BYTES: OnceLock<Bytes> = OnceLock::new();
    let bytes = *BYTES.get_or_init(|| {
        let options = [("cluster_size", "16384"), ("extended_l2", "on")];
        let empty = harness::create("qcow2", TABLE_SPAN, &options, None);
        let other = std::slice::from_ref(&(5 * WIDE..6 * WIDE));
        harness::filled("qcow2", empty, other, 1)
    });
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    // The first entry of the table: its cluster, its bitmap.
    let table = word(harness::usize_of(word(40))) & !(1 << 63);
    assert_eq!(word(harness::usize_of(table)), 0, "nothing there yet");
    explore(100, move || {
        let memory = Arc::new(MemoryStorage::from_bytes("explored.qcow2", bytes));
        let is_written = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&is_written);
        let tear = Tear { longer_than_bytes: 4096, at_bytes: table + 8, until };
        let image = harness::open_torn("qcow2", &[("l2-cache-entry-size", "512")], memory, tear);
        let threads = [
            spawn(&image, move |image| {
                write(image, 0..512, 2);
                image.flush().expect("flushed");
                is_written.store(true, Ordering::SeqCst);
            }),
            spawn(&image, |image| {
                // By the layer itself, in one go.
                let mut extents = Vec::new();
                image.layers()[0].map_range(0..TABLE_SPAN, &mut extents).expect("a sound table");
                assert_eq!(extents.iter().map(|extent| extent.len_bytes).sum::<u64>(), TABLE_SPAN);
            }),
        ];
        join(threads);
        close(image);
    });
}

/// The last room for a chunk of a bitmap: of two threads that come for the same chunk neither is refused.
#[test]
fn one_chunk_of_a_bitmap_takes_the_room_of_one() {
    const GRANULE: u64 = 512;
    /// What a chunk covers.
    const CHUNK: u64 = 4096 * 8 * GRANULE;
    const CHUNKS: u64 = MAX_MAP_BYTES / 4096;
    explore(10, || {
        let map = Arc::new(DirtyMap::new((CHUNKS + 1) * CHUNK, GRANULE).expect("a map"));
        (1..CHUNKS).for_each(|chunk| map.set(chunk * CHUNK..chunk * CHUNK + 1).expect("room"));
        let threads = [0, GRANULE].map(|at| {
            let map = Arc::clone(&map);
            shuttle::thread::spawn(move || map.set(at..at + 1).expect("room for the last chunk"))
        });
        join(threads);
        assert!(map.is_dirty(0) && map.is_dirty(GRANULE));
        map.set(CHUNKS * CHUNK..CHUNKS * CHUNK + 1).expect_err("no room for another one");
    });
}

/// Leases: while a reader may still be at a cluster, a discard does not make it somebody else's, whatever is flushed
/// and allocated meanwhile.
#[test]
fn a_reader_never_sees_what_was_written_for_another_place() {
    explore(150, || {
        let (memory, image) = new_image();
        write(&image, 0..4 * CLUSTER, 1);
        flush(&image);
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
                flush(image);
                write(image, 20 * CLUSTER..24 * CLUSTER, 2);
                flush(image);
            }),
            spawn(&image, |image| {
                flush(image);
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

/// What a queue remembers of the map: a discard that has returned is seen, and what stood there before is not taken for
/// what somebody else has put into the place since.
#[test]
fn what_is_remembered_is_forgotten_before_its_place_is_given_out() {
    explore(150, || {
        let (memory, image) = new_image();
        let unit = 0..8 * CLUSTER;
        write(&image, unit.clone(), 1);
        flush(&image);
        let discarded = Arc::new(AtomicBool::new(false));
        let is_discarded = Arc::clone(&discarded);
        let threads = [
            spawn(&image, move |image| {
                let mut lookaside = Lookaside::of(image);
                for _ in 0..4 {
                    let was_discarded = discarded.load(Ordering::SeqCst);
                    let seen = read_remembering(&mut lookaside, CLUSTER..3 * CLUSTER);
                    assert!(seen.iter().all(|byte| *byte <= u8::from(!was_discarded)), "{seen:?}");
                }
            }),
            spawn(&image, move |image| {
                image.discard(unit).expect("discarded");
                is_discarded.store(true, Ordering::SeqCst);
                flush(image);
                write(image, 20 * CLUSTER..28 * CLUSTER, 2);
                flush(image);
            }),
        ];
        join(threads);
        close(image);
        let guest = audited(&memory.to_vec(), false).expect("a sound image");
        let at = |cluster: u64| guest[usize::try_from(cluster * CLUSTER).expect("small")];
        assert_eq!((at(0), at(20), at(27)), (0, 2, 2));
    });
}

/// What is remembered, and clusters that a write moves, as a snapshot has them.
#[test]
fn what_is_remembered_follows_a_write_that_moves_it() {
    explore(150, || {
        let (memory, image) = new_image();
        write(&image, 0..8 * CLUSTER, 1);
        let written = Arc::new(AtomicBool::new(false));
        let is_written = Arc::clone(&written);
        let threads = [
            spawn(&image, move |image| {
                let mut lookaside = Lookaside::of(image);
                for _ in 0..4 {
                    let least = if written.load(Ordering::SeqCst) { 2 } else { 1 };
                    let seen = read_remembering(&mut lookaside, CLUSTER..2 * CLUSTER);
                    assert!(seen.iter().all(|byte| (least..=2).contains(byte)), "{seen:?}, not {least}");
                }
            }),
            spawn(&image, move |image| {
                image.snapshot_create("s", (1, 0)).expect("taken");
                write(image, 0..8 * CLUSTER, 2);
                is_written.store(true, Ordering::SeqCst);
            }),
        ];
        join(threads);
        close(image);
        audited(&memory.to_vec(), false).expect("a sound image");
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

/// Generations of flushes: what a thread wrote before its flush began is there after a power cut at any moment after
/// the flush returned, also when it met the flush of another.
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
                // Over nothing, and over what another flush may be making durable.
                for (step, byte) in [(0, 6), (3, 7)] {
                    write(image, start..start + 2 * CLUSTER, byte);
                    flush(image);
                    let bit = 1 << (index + step);
                    recorder.mark(flushed.fetch_or(bit, Ordering::SeqCst) | bit);
                }
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
                let is_second = flushed >> (index + 3) & 1 == 1;
                assert!(
                    bytes.iter().all(|byte| *byte == 7 || (*byte == 6 && !is_second)),
                    "what thread {index} flushed is gone at {}\n{}",
                    state.moment,
                    state.description
                );
            }
        }
    });
}
