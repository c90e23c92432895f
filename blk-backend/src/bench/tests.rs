//! Jobs run on a small image, and their results shown.

use std::{sync::Arc, time::Duration};

use img_core::image::ImageName;
use serde_json::Value;

use super::*;
use crate::{
    disk::{Disk, DiskOptions},
    engine::{EngineChoice, LaneOptions},
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

fn threads() -> LaneOptions {
    LaneOptions { engine: EngineChoice::Threads, ..LaneOptions::default() }
}

fn requests(result: &RunResult) -> u64 {
    result.ops.iter().map(|op| op.latency_ns.len()).sum()
}

#[test]
fn every_request_is_counted_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = disk(&dir, false);
    for (pattern, name) in Pattern::ALL {
        let result = run(&disk, &job(pattern), &threads()).expect("it runs");
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
    let flushed = Job { flush_every: Some(9), ..job(Pattern::RandWrite) };
    let result = run(&disk, &flushed, &threads()).expect("it runs");
    let count = |name| result.ops.iter().find(|op| op.name == name).map_or(0, |op| op.latency_ns.len());
    assert_eq!((count("write"), count("flush")), (180, 20));
    disk.close().expect("closed");
}

#[test]
fn writes_in_order_reach_all_of_the_disk() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = disk(&dir, false);
    let whole = Limit { time: None, requests: Some(DISK_BYTES / 4096 / 2) };
    run(&disk, &Job { limit: whole, ..job(Pattern::Write) }, &threads()).expect("it runs");
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
    let result = run(&disk, &slow, &threads()).expect("it runs");
    // The first is due at once, the last after 19 intervals.
    assert!(result.elapsed >= Duration::from_millis(19), "{:?}", result.elapsed);
    for refused in [
        job(Pattern::Write),
        Job { block_bytes: DISK_BYTES, ..job(Pattern::Read) },
        Job { queues: 0, ..job(Pattern::Read) },
    ] {
        assert!(matches!(run(&disk, &refused, &threads()), Err(BenchError::Job(_))), "{refused:?}");
    }
    disk.close().expect("closed");
}

#[test]
fn results_are_shown_written_and_compared() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = disk(&dir, false);
    let job = job(Pattern::RandRw);
    let result = run(&disk, &job, &threads()).expect("it runs");
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
