//! Jobs run on a small image, and their results shown.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use img_core::image::ImageName;
use serde_json::Value;

use super::*;
use crate::{
    disk::{Disk, DiskOptions},
    engine::{EngineChoice, LaneOptions},
    request::Op,
};

/// What [`disk`] makes.
const DISK_BYTES: u64 = 1 << 20;

fn disk(dir: &tempfile::TempDir, read_only: bool) -> Arc<Disk> {
    let path = dir.path().join("disk.raw");
    if !path.exists() {
        std::fs::write(&path, vec![0; 1 << 20]).expect("made");
    }
    let name = ImageName::parse(path.to_str().expect("UTF-8")).expect("a name");
    let options = DiskOptions { format: Some("raw".to_owned()), read_only, ..DiskOptions::default() };
    Disk::open(&name, &options).expect("it opens")
}

fn job(pattern: Pattern) -> Job {
    Job {
        pattern,
        read_percent: 50,
        block_bytes: 4096,
        depth: 8,
        queues: 2,
        rate: None,
        flush_every: None,
        limit: Limit { time: None, requests: Some(100) },
        seed: 7,
    }
}

fn target(disk: &Arc<Disk>) -> ImageTarget {
    ImageTarget::new(disk, LaneOptions { engine: EngineChoice::Threads, ..LaneOptions::default() })
}

fn run_on(disk: &Arc<Disk>, job: &Job) -> Result<RunResult, BenchError> {
    run(&target(disk), job, None)
}

fn requests(result: &RunResult) -> u64 {
    result.ops.iter().map(|op| op.latency_ns.len()).sum()
}

#[test]
fn every_request_is_counted_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = disk(&dir, false);
    for (pattern, name) in Pattern::ALL {
        let result = run_on(&disk, &job(pattern)).expect("it runs");
        assert_eq!(requests(&result), 200, "{name}");
        for op in &result.ops {
            assert_eq!(op.bytes, op.latency_ns.len() * 4096, "{name}: {}", op.name);
            // No request takes less than a hundred nanoseconds, and none longer than all of them.
            let most = u64::try_from(result.elapsed.as_nanos()).expect("seconds");
            let (least, longest) = (op.latency_ns.min(), op.latency_ns.max());
            assert!(least > 100 && longest <= most + most / 100, "{name}: {least} to {longest} of {most} ns");
            assert!(name.ends_with(op.name) || pattern == Pattern::RandRw, "{name}: {}", op.name);
        }
    }
    // A time that no clock reaches is no limit.
    let limit = Limit { time: Some(Duration::MAX), requests: Some(100) };
    let flushed = Job { flush_every: Some(9), limit, ..job(Pattern::RandWrite) };
    let result = run_on(&disk, &flushed).expect("it runs");
    let count = |name| result.ops.iter().find(|op| op.name == name).map_or(0, |op| op.latency_ns.len());
    assert_eq!((count("write"), count("flush")), (180, 20));
    disk.close().expect("closed");
}

#[test]
fn writes_in_order_reach_all_of_the_disk() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = disk(&dir, false);
    let whole = Limit { time: None, requests: Some(DISK_BYTES / 4096 / 2) };
    run_on(&disk, &Job { limit: whole, ..job(Pattern::Write) }).expect("it runs");
    disk.close().expect("closed");
    let bytes = std::fs::read(dir.path().join("disk.raw")).expect("read");
    let is_zero = bytes.chunks(4096).position(|block| block.iter().all(|byte| *byte == 0));
    assert_eq!(is_zero, None, "a block was not written");
}

#[test]
fn a_rate_is_kept_and_what_cannot_be_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = disk(&dir, true);
    let limit = Limit { time: None, requests: Some(20) };
    let slow = Job { rate: Some(1000.0), queues: 1, limit, ..job(Pattern::RandRead) };
    let result = run_on(&disk, &slow).expect("it runs");
    // The first is due at once, the last after 19 intervals.
    assert!(result.elapsed >= Duration::from_millis(19), "{:?}", result.elapsed);
    for refused in [
        job(Pattern::Write),
        Job { block_bytes: DISK_BYTES, ..job(Pattern::Read) },
        Job { queues: 0, ..job(Pattern::Read) },
    ] {
        assert!(matches!(run_on(&disk, &refused), Err(BenchError::Job(_))), "{refused:?}");
    }
    disk.close().expect("closed");
}

#[test]
fn results_are_shown_written_and_compared() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = disk(&dir, false);
    let job = job(Pattern::RandRw);
    let result = run_on(&disk, &job).expect("it runs");
    disk.close().expect("closed");
    let mut table = Vec::new();
    write_table(&job, &result, &mut table).expect("written");
    let table = String::from_utf8(table).expect("text");
    assert!(table.contains("randrw: blocks of 4096 bytes") && table.contains("p99.9"), "{table}");

    let text = to_json("disk.raw", &job, &result).to_string();
    let read: Value = serde_json::from_str(&text).expect("JSON");
    for op in read["ops"].as_array().expect("a list") {
        let counts = op["latency-ns"]["histogram"]["counts"].as_array().expect("a list");
        let sum: u64 = counts.iter().map(|step| step[1].as_u64().expect("a count")).sum();
        assert_eq!(op["requests"], sum, "the histogram has all of them");
    }
    let mut shown = Vec::new();
    compare(&read, &read, &mut shown).expect("compared");
    let shown = String::from_utf8(shown).expect("text");
    assert!(shown.contains("IO per CPU-s") && !shown.contains("jobs differ"), "{shown}");
    assert_eq!(shown.lines().filter(|line| line.ends_with(" 1.000")).count(), 12, "{shown}");
    assert!(compare(&read, &Value::Null, &mut Vec::new()).is_err());
}

/// A disk in memory whose write number `forgets` never arrives.
struct Forgetful {
    bytes: Mutex<Vec<u8>>,
    writes: Mutex<u64>,
    forgets: u64,
}

impl Forgetful {
    fn new(forgets: u64) -> Self {
        Self { bytes: Mutex::new(vec![0; 1 << 20]), writes: Mutex::new(0), forgets }
    }
}

impl Target for Forgetful {
    fn facts(&self) -> Facts {
        Facts {
            size_bytes: DISK_BYTES,
            read_only: false,
            most_queues: (1, "it is a small disk"),
            most_block_bytes: DISK_BYTES,
            can_flush: true,
            most_discard_bytes: 0,
        }
    }

    fn queue<'a>(&'a self, _: u32, shape: &Shape) -> Result<Box<dyn TargetQueue + 'a>, BenchError> {
        let slots = vec![vec![0; shape.block_bytes]; shape.depth];
        Ok(Box::new(ForgetfulQueue { disk: self, slots, ended: Vec::new() }))
    }

    fn backend_cpu(&self) -> Result<Option<Duration>, BenchError> {
        Ok(None)
    }
}

struct ForgetfulQueue<'a> {
    disk: &'a Forgetful,
    slots: Vec<Vec<u8>>,
    ended: Vec<Done>,
}

impl TargetQueue for ForgetfulQueue<'_> {
    fn submit(&mut self, slot: usize, op: Op, offset: u64, len_bytes: u64) -> Result<(), BenchError> {
        let mut bytes = self.disk.bytes.lock().expect("no panic");
        let place =
            usize::try_from(offset).expect("small")..usize::try_from(offset + len_bytes).expect("small");
        match op {
            Op::Read => self.slots[slot].copy_from_slice(&bytes[place]),
            Op::Write { .. } => {
                let mut writes = self.disk.writes.lock().expect("no panic");
                *writes += 1;
                if *writes != self.disk.forgets {
                    bytes[place].copy_from_slice(&self.slots[slot]);
                }
            }
            _ => {}
        }
        self.ended.push((slot, Ok(())));
        Ok(())
    }

    fn wait(&mut self, _: Option<Instant>, done: &mut Vec<Done>) -> Result<(), BenchError> {
        done.append(&mut self.ended);
        Ok(())
    }

    fn fill(&mut self, slot: usize, bytes: &[u8]) {
        self.slots[slot].copy_from_slice(bytes);
    }

    fn copy(&self, slot: usize, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.slots[slot]);
    }
}

#[test]
fn a_disk_that_forgets_a_write_is_found_out() {
    // In order, so that no block is written twice: only reading again in the end shows what is missing.
    let job = Job { queues: 1, flush_every: Some(10), ..job(Pattern::Write) };
    let verified = |forgets| {
        let verify = Verify::new(None).expect("a number");
        run(&Forgetful::new(forgets), &job, Some(&verify)).map(|result| result.verified_blocks)
    };
    let writes = 91;
    assert_eq!(verified(0).expect("it forgets nothing"), Some(writes));
    for forgets in 1..=writes {
        let error = verified(forgets).expect_err("a write is missing");
        assert!(matches!(error, BenchError::Mismatch(_)), "{error}");
    }
}
