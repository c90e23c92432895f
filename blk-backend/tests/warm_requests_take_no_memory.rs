//! Once a lane is warm, requests that are answered from tables in memory take none: not for reads, not for writes
//! in place, not for zeroes, on any kind of image and with several extents to a request.
#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use blk_backend::{
    disk::{Disk, DiskOptions},
    engine::{EngineChoice, Event, Lane, LaneOptions, Wait, ring_support},
    request::{Op, Request, Segments, Submitted, iovec},
};
use img_core::{
    format::{OptionSet, registry},
    image::ImageName,
    job::create::{CreateImage, create},
};

/// The system's allocator, counted.
struct Counting;

static TAKEN: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.fetch_add(1, SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const MIB: u64 = 1 << 20;
const DEPTH: u64 = 16;
/// Crosses from a written cluster to one that was never written, and back.
const REQUEST_BYTES: usize = 192 << 10;

struct Load {
    lane: Lane,
    memory: Vec<u8>,
    events: Vec<Event>,
}

impl Load {
    /// A batch of requests from submission to answer.
    fn round(&mut self, op: Op, offset: u64, length: usize) {
        for tag in 0..DEPTH {
            let at = usize::try_from(tag).expect("small") * REQUEST_BYTES;
            let part = &mut self.memory[at..at + length];
            let vectors = [iovec { iov_base: part.as_mut_ptr().cast(), iov_len: length }];
            // SAFETY: `memory` is not touched before all are answered, below.
            let segments = unsafe { Segments::new(&vectors) };
            let offset = offset + tag * 4096;
            let request = Request { tag, op, offset, len_bytes: length as u64, segments };
            assert_eq!(self.lane.submit(&request), Submitted::Taken);
        }
        let mut answered = 0;
        while answered < DEPTH {
            self.lane.run_once(Wait::Event, &mut self.events).expect("the lane runs");
            for event in self.events.drain(..) {
                if let Event::Done { result, .. } = event {
                    assert_eq!(result, Ok(()));
                    answered += 1;
                }
            }
        }
    }
}

#[test]
fn warm_requests_take_no_memory() {
    if ring_support().is_err() {
        // Without a ring every request goes through a worker, which may take memory.
        assert!(Lane::new(&disk("raw", &[]).1, &options(EngineChoice::Ring)).is_err());
        return;
    }
    let metadata = [("preallocation", "metadata")];
    for (format, create_options) in [("raw", &[][..]), ("qcow2", &[]), ("qcow2", &metadata)] {
        let (_dir, disk) = disk(format, create_options);
        let mut load = Load {
            lane: Lane::new(&disk, &options(EngineChoice::Ring)).expect("a lane"),
            memory: vec![7; usize::try_from(DEPTH).expect("small") * REQUEST_BYTES],
            events: Vec::new(),
        };
        // Every other MiB is written.
        for at in [0, 2, 4] {
            load.round(Op::Write { fua: false }, at * MIB, 4096);
        }
        let kinds = [
            (Op::Read, 0, 4096),
            (Op::Read, 3 * MIB, 4096),
            (Op::Read, 2 * MIB - 100_000, REQUEST_BYTES),
            (Op::Write { fua: false }, 2 * MIB, 4096),
            (Op::Write { fua: false }, 4 * MIB, 512),
        ];
        for _ in 0..3 {
            kinds.into_iter().for_each(|(op, offset, length)| load.round(op, offset, length));
        }
        let before_stats = disk.stats();
        let before = TAKEN.load(SeqCst);
        for _ in 0..10 {
            kinds.into_iter().for_each(|(op, offset, length)| load.round(op, offset, length));
        }
        let taken = TAKEN.load(SeqCst) - before;
        let handed_over = disk.stats().handed_over - before_stats.handed_over;
        assert_eq!((taken, handed_over), (0, 0), "{format} {create_options:?}: takes, hand-overs");
    }
}

fn options(engine: EngineChoice) -> LaneOptions {
    LaneOptions { depth: 32, engine, ..LaneOptions::default() }
}

fn disk(format: &str, create_options: &[(&str, &str)]) -> (tempfile::TempDir, Arc<Disk>) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    let name = ImageName::from_path(path.to_str().expect("a plain name"));
    let mut set = OptionSet::new();
    create_options.iter().for_each(|(name, value)| set.set(*name, *value));
    create(&CreateImage {
        name: &name,
        driver: registry::by_name(format).expect("a known format"),
        virtual_size_bytes: 8 * MIB,
        backing: None,
        options: set,
    })
    .expect("made");
    let open = DiskOptions { format: Some(format.to_owned()), ..DiskOptions::default() };
    (dir, Disk::open(&name, &open).expect("it was just made"))
}
