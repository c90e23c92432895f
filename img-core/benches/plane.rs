//! What a request costs a queue's thread before and after its bytes are moved: `cargo bench -p img-core --bench plane`.
//!
//! An image in memory, tables cached. Each figure is the least of several rounds, in nanoseconds a call.
#![allow(clippy::print_stdout, missing_docs, reason = "a bench prints its figures")]

use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use img_core::{
    format::{Attempt, CreateRequest, OpenContext, OpenMode, OptionSet, registry},
    image::{Commit, Image},
    storage::{MemoryStorage, Preallocation, Storage},
};

const DISK_BYTES: u64 = 1 << 30;
const BLOCK_BYTES: u64 = 4096;
const CALLS: u32 = 200_000;
const ROUNDS: u32 = 7;

fn image(format: &str) -> Arc<Image> {
    let driver = registry::by_name(format).expect("it is there");
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("bench"));
    let refuse = |_: &str, _: OpenMode| unreachable!("it names no file");
    let options = OptionSet::new();
    let request = CreateRequest {
        virtual_size_bytes: DISK_BYTES,
        backing: None,
        options: &options,
        open_file: &refuse,
    };
    driver.create(&storage, &request).expect("created");
    let context = OpenContext { mode: OpenMode::Write, options: &options, open_file: &refuse };
    let layer = driver.open(storage, &context).expect("it opens");
    Arc::new(Image::from_layers(vec![layer]).expect("a disk"))
}

/// Offsets of blocks, in no order.
fn offsets() -> impl Iterator<Item = u64> {
    let mut state = 1_u64;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % (DISK_BYTES / BLOCK_BYTES) * BLOCK_BYTES
    })
}

fn report(what: &str, mut call: impl FnMut(u64)) {
    let round = |_| {
        let mut at = offsets();
        let start = Instant::now();
        for _ in 0..CALLS {
            call(at.next().expect("endless"));
        }
        start.elapsed()
    };
    let least = (0..ROUNDS).map(round).min().unwrap_or(Duration::ZERO);
    println!("{what:40} {:6.0} ns", least.as_secs_f64() * 1e9 / f64::from(CALLS));
}

fn main() {
    for format in ["raw", "qcow2"] {
        let image = image(format);
        if format == "qcow2" {
            image.resize(DISK_BYTES * 2, Preallocation::Off).expect("grown");
            image.grow_mapped(DISK_BYTES * 3).expect("mapped");
        }
        // The part of the disk that is mapped.
        let base = if format == "qcow2" { DISK_BYTES * 2 } else { 0 };
        let mut extents = Vec::new();
        let mut steps = Vec::new();
        image.write_at(&[1; 512], base).expect("written");
        for at in (base..base + DISK_BYTES).step_by(1 << 16) {
            // Over what is there: the tables are read, and the counts looked at.
            image.write_at(&[1; 512], at).expect("written");
        }
        report(&format!("{format}: try_map"), |at| {
            let attempt = image.try_map(base + at..base + at + BLOCK_BYTES, &mut extents).expect("inside");
            assert!(matches!(black_box(attempt), Attempt::Done(_)));
        });
        report(&format!("{format}: try_prepare_write in place, commit"), |at| {
            let attempt =
                image.try_prepare_write(base + at..base + at + BLOCK_BYTES, &mut steps).expect("inside");
            let Attempt::Done(ticket) = attempt else { panic!("it is in memory") };
            assert!(matches!(black_box(ticket).try_commit(), Commit::Done));
        });
        if format == "raw" {
            continue;
        }
        image.write_at(&[1; 512], 0).expect("written");
        image.write_at(&[1; 512], DISK_BYTES / 2).expect("written");
        let (mut next, mut blocked) = (0, 0);
        let start = Instant::now();
        while next < DISK_BYTES {
            match image.try_prepare_write(next..next + BLOCK_BYTES, &mut steps).expect("inside") {
                Attempt::Done(ticket) => assert!(matches!(black_box(ticket).try_commit(), Commit::Done)),
                _ => {
                    blocked += 1;
                    image.write_at(&[1; 4096], next).expect("written");
                }
            }
            next += 1 << 16;
        }
        let calls = DISK_BYTES >> 16;
        println!(
            "{:40} {:6.0} ns, {blocked} of {calls} left to who may block",
            format!("{format}: try_prepare_write of new, commit"),
            start.elapsed().as_secs_f64() * 1e9 / calls as f64
        );
    }
}
