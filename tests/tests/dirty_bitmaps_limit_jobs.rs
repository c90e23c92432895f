//! `convert`, `compare` and `map` with `--dirty-bitmap` look at what a persistent bitmap marks, and at nothing else.
//! The marks are those of the reference, which writes while it keeps the bitmap.

use std::{fs, ops::Range, path::Path};

use img_tests::{
    command::{img, qemu_img, qemu_io},
    pattern::Random,
};
use serde_json::Value;

const DISK: u64 = 8 << 20;
const SECTOR: u64 = 512;

/// Makes `full.raw`, a copy of the disk, and then changes the disk under the bitmap `b`. Returns the changed ranges.
fn changed_disk(directory: &Path, seed: u64, granularity: u64) -> Vec<Range<u64>> {
    let disk = DISK.to_string();
    qemu_img(directory, ["create", "-q", "-f", "raw", "below", &disk]).output().success();
    qemu_io(directory, "raw", "below", &["write -q -P 7 0 8M"]).output().success();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "-b", "below", "-F", "raw", "disk"])
        .output()
        .success();
    qemu_io(directory, "qcow2", "disk", &["write -q -P 1 1M 3M", "write -q -z 5M 1M"]).output().success();
    qemu_img(directory, ["convert", "-O", "raw", "disk", "full.raw"]).output().success();
    let granularity = granularity.to_string();
    qemu_img(directory, ["bitmap", "--add", "-g", &granularity, "disk", "b"]).output().success();
    let mut random = Random::new(seed);
    let mut ranges = Vec::new();
    let mut commands = Vec::new();
    for step in 0..12_u64 {
        let start = random.below(DISK / SECTOR) * SECTOR;
        let len = ((random.below(400) + 1) * SECTOR).min(DISK - start);
        let what = if step % 3 == 2 { "-z".to_owned() } else { format!("-P {}", step + 20) };
        commands.push(format!("write -q {what} {start} {len}"));
        ranges.push(start..start + len);
    }
    qemu_io(directory, "qcow2", "disk", &commands).output().success();
    ranges
}

/// The granules that the ranges touch.
fn model(ranges: &[Range<u64>], granularity: u64) -> Vec<bool> {
    let mut marks = vec![false; usize::try_from(DISK.div_ceil(granularity)).expect("few")];
    for range in ranges {
        for granule in range.start / granularity..range.end.div_ceil(granularity) {
            marks[usize::try_from(granule).expect("few")] = true;
        }
    }
    marks
}

/// Which granules the entries of a map cover, none of them in part.
fn covered(entries: &[Value], granularity: u64) -> Vec<bool> {
    let ranges: Vec<Range<u64>> = entries
        .iter()
        .map(|entry| {
            let start = entry["start"].as_u64().expect("a number");
            start..start + entry["length"].as_u64().expect("a number")
        })
        .collect();
    let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let granules = model(&ranges, granularity);
    assert_eq!(total, granules.iter().filter(|is_covered| **is_covered).count() as u64 * granularity);
    granules
}

fn map(directory: &Path, arguments: &[&str]) -> Vec<Value> {
    let text = img(directory, [&["map", "--output=json"], arguments].concat()).output().success();
    serde_json::from_str(&text).expect("an array")
}

#[test]
fn what_a_bitmap_marks_is_converted_compared_and_mapped() {
    for (seed, granularity) in [(1, 65536), (2, 4096), (3, 512), (4, 262_144)] {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let directory = directory.path();
        let ranges = changed_disk(directory, seed, granularity);
        let marks = model(&ranges, granularity);

        assert_eq!(covered(&map(directory, &["--dirty-bitmap", "b", "disk"]), granularity), marks);
        let half = (DISK / 2).to_string();
        let mut marks_of_half = marks.clone();
        marks_of_half[..marks.len() / 2].fill(false);
        let entries = map(directory, &["--dirty-bitmap=b", "--start-offset", &half, "disk"]);
        assert_eq!(covered(&entries, granularity), marks_of_half);

        // An increment on top of the copy.
        let target = ["-O", "qcow2", "-B", "full.raw", "-F", "raw", "disk", "increment"];
        img(directory, [&["convert", "--dirty-bitmap", "b"], &target[..]].concat()).output().success();
        let same = |other: &str| qemu_img(directory, ["compare", "disk", other]).output().success();
        same("increment");
        qemu_img(directory, ["check", "-q", "increment"]).output().success();
        let own: Vec<Value> =
            map(directory, &["increment"]).into_iter().filter(|entry| entry["depth"] == 0).collect();
        let clusters = covered(&own, 65536);
        for (cluster, is_there) in clusters.into_iter().enumerate() {
            let start = cluster as u64 * 65536;
            let is_marked = (start..start + 65536)
                .step_by(512)
                .any(|at| marks[usize::try_from(at / granularity).expect("few")]);
            assert_eq!(is_there, is_marked, "seed {seed}: the increment's cluster {cluster}");
        }
        // The same, compressed.
        img(directory, [&["convert", "-c", "--dirty-bitmap", "b"], &target[..7], &["small"]].concat())
            .output()
            .success();
        same("small");

        // A target of its own has the marked parts, and zeroes.
        img(directory, ["convert", "--dirty-bitmap", "b", "-O", "raw", "disk", "alone.raw"])
            .output()
            .success();
        qemu_img(directory, ["convert", "-O", "raw", "disk", "now.raw"]).output().success();
        let [now, alone] =
            ["now.raw", "alone.raw"].map(|name| fs::read(directory.join(name)).expect("a copy"));
        for (granule, is_marked) in marks.iter().enumerate() {
            let at = granule * usize::try_from(granularity).expect("small");
            let bytes = at..at + usize::try_from(granularity).expect("small");
            let expected = if *is_marked { now[bytes.clone()].to_vec() } else { vec![0; bytes.len()] };
            assert!(alone[bytes] == expected[..], "seed {seed}, granule {granule}");
        }

        // What is not marked does not count when comparing.
        let compare = |other: &str, code: i32| {
            let run = img(directory, ["compare", "--dirty-bitmap", "b", "disk", other]).output();
            assert_eq!(run.code, code, "{run}");
        };
        compare("alone.raw", 0);
        compare("full.raw", 1);
        assert_eq!(qemu_img(directory, ["compare", "disk", "alone.raw"]).output().code, 1);

        // The copy is brought up to date in place.
        img(directory, ["convert", "-n", "--dirty-bitmap", "b", "-O", "raw", "disk", "full.raw"])
            .output()
            .success();
        same("full.raw");
        compare("full.raw", 0);
    }
}

#[test]
fn what_cannot_be_limited_is_refused() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "a", "1M"]).output().success();
    qemu_img(directory, ["create", "-q", "-f", "raw", "r", "1M"]).output().success();
    qemu_img(directory, ["bitmap", "--add", "a", "b"]).output().success();
    for (arguments, why) in [
        (&["map", "--dirty-bitmap", "none", "a"][..], "none"),
        (&["map", "-f", "raw", "--dirty-bitmap", "b", "r"], "Format driver 'raw' does not support bitmaps"),
        (&["compare", "--dirty-bitmap", "none", "a", "a"], "none"),
        (&["convert", "--dirty-bitmap", "none", "a", "new"], "none"),
        (&["convert", "--dirty-bitmap", "b", "a", "a", "new"], "single source"),
        (&["convert", "--dirty-bitmap", "b", "-l", "s", "a", "new"], "does not go with -l"),
        (&["convert", "--dirty-bitmap", "b", "a", "-"], "not possible in a pipe"),
    ] {
        let run = img(directory, arguments).output();
        assert!(run.code != 0 && run.stderr.contains(why), "{run}");
        assert!(!directory.join("new").exists(), "{run}");
    }
    // A bitmap that marks nothing.
    assert_eq!(
        img(directory, ["map", "--output=json", "--dirty-bitmap", "b", "a"]).output().success(),
        "[]\n"
    );
}
