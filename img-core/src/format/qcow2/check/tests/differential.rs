//! Every field of every structure set to every kind of wrong value: lines, counts and exits agree.

use std::{fs, path::Path, sync::Mutex, thread};

use super::oracle::{Recipe, Verdict, contents, load, open, ours, theirs};
use crate::format::Repair;

const RECIPES: &[Recipe] = &[
    Recipe {
        name: "plain",
        options: "cluster_size=65536",
        size: "8M",
        steps: &["io write -P 1 0 200k", "io write -z 1M 64k", "io write -P 2 4M 64k"],
    },
    Recipe {
        name: "small",
        options: "cluster_size=512,refcount_bits=64",
        size: "200k",
        steps: &["io write -P 1 0 20k", "io write -P 3 100k 9k"],
    },
    Recipe {
        name: "v2",
        options: "compat=0.10,cluster_size=4096",
        size: "4M",
        steps: &["io write -P 1 0 40k", "snapshot -c one IMAGE", "io write -P 2 4k 8k"],
    },
    Recipe {
        name: "bit",
        options: "cluster_size=4096,refcount_bits=1",
        size: "1M",
        steps: &["io write -P 1 0 40k", "io write -P 1 500k 4k"],
    },
    Recipe {
        name: "byte",
        options: "cluster_size=4096,refcount_bits=8,lazy_refcounts=on",
        size: "4M",
        steps: &[
            "io write -P 1 0 40k",
            "snapshot -c one IMAGE",
            "snapshot -c two IMAGE",
            "io write -P 2 4k 8k",
            "io write -z 64k 12k",
        ],
    },
    Recipe {
        name: "compressed",
        options: "cluster_size=4096",
        size: "1M",
        steps: &[
            "io write -c -P 1 0 4k",
            "io write -c -P 2 4k 4k",
            "io write -c -P 3 32k 4k",
            "io write -P 4 64k 8k",
        ],
    },
    Recipe {
        name: "extended",
        options: "cluster_size=16384,extended_l2=on",
        size: "4M",
        steps: &[
            "io write -P 1 0 16k",
            "io write -P 2 33k 3k",
            "io write -z 64k 2k",
            "snapshot -c one IMAGE",
            "io write -P 5 0 1k",
        ],
    },
    Recipe {
        name: "external",
        options: "cluster_size=65536,data_file=DATA",
        size: "4M",
        steps: &["io write -P 1 0 128k", "io write -P 2 1M 64k"],
    },
    Recipe {
        name: "bitmaps",
        options: "cluster_size=4096",
        size: "4M",
        steps: &["bitmap --add -g 4096 IMAGE one", "io write -P 1 0 40k", "bitmap --add IMAGE two"],
    },
];

/// Bytes to put somewhere.
#[derive(Clone, Debug)]
struct Patch {
    what: String,
    at: u64,
    bytes: Vec<u8>,
}

fn be64(image: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    image.get(at..at + 8).map_or(0, |bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
}

fn be32(image: &[u8], at: u64) -> u32 {
    u32::try_from(be64(image, at) >> 32).unwrap()
}

/// Wrong values for a pointer to a cluster.
fn pointers(image: &[u8], what: &str, at: u64, patches: &mut Vec<Patch>) {
    let cluster = 1_u64 << be32(image, 20);
    let end = (image.len() as u64).next_multiple_of(cluster);
    let word = be64(image, at);
    let values = [
        ("zero", 0),
        ("unaligned", word ^ 0x200),
        ("at the end", (word & (1 << 63)) | end),
        ("past the end", (word & (1 << 63)) | (end + 3 * cluster)),
        ("far away", (word & (1 << 63)) | 0x00ff_ffff_ffff_0000 & !(cluster - 1)),
        ("on the header", word & (1 << 63)),
        ("on cluster 1", (word & (1 << 63)) | cluster),
        ("on cluster 4", (word & (1 << 63)) | (4 * cluster)),
        ("copied toggled", word ^ (1 << 63)),
        ("compressed toggled", word ^ (1 << 62)),
        ("zero toggled", word ^ 1),
        ("high reserved", word ^ (1 << 60)),
        ("low reserved", word ^ 4),
        ("sign", word | (1 << 63) | (1 << 61)),
    ];
    for (how, value) in values {
        if value != word {
            patches.push(Patch { what: format!("{what}: {how}"), at, bytes: value.to_be_bytes().to_vec() });
        }
    }
}

/// All patches of an image.
fn patches(image: &[u8]) -> Vec<Patch> {
    let mut patches = Vec::new();
    let cluster = 1_u64 << be32(image, 20);
    let l1 = be64(image, 40);
    let l2 = be64(image, l1) & 0x00ff_ffff_ffff_fe00;
    let table = be64(image, 48);
    let block = be64(image, table);
    let is_extended = be32(image, 4) == 3 && be64(image, 72) & 16 != 0;
    let entry = if is_extended { 16 } else { 8 };
    pointers(image, "L1 entry 0", l1, &mut patches);
    for number in [0, 1, 2, 8, 16] {
        pointers(image, &format!("L2 entry {number}"), l2 + number * entry, &mut patches);
    }
    if is_extended {
        for number in [0, 2, 4, 5] {
            for (how, value) in [
                ("zero", 0),
                ("ones", u64::MAX),
                ("both", 0x3_0000_0001),
                ("some", 0xff),
                ("zeroes", 0xff << 32),
            ] {
                let what = format!("bitmap {number}: {how}");
                patches.push(Patch {
                    what,
                    at: l2 + number * 16 + 8,
                    bytes: u64::to_be_bytes(value).to_vec(),
                });
            }
        }
    }
    pointers(image, "refcount table entry 0", table, &mut patches);
    pointers(image, "refcount table entry 1", table + 8, &mut patches);
    for at in [0, 1, 3, 7, 9, 10, 11, 13, 16, 40, 63, 200, cluster - 1] {
        for byte in [0, 1, 2, 0xff] {
            if image[usize::try_from(block + at).unwrap()] != byte {
                patches.push(Patch {
                    what: format!("refcount byte {at}: {byte}"),
                    at: block + at,
                    bytes: vec![byte],
                });
            }
        }
    }
    patches.push(Patch { what: "no refcount table".to_owned(), at: 48, bytes: vec![0; 12] });
    let elsewhere = (3 * cluster).to_be_bytes();
    patches.push(Patch { what: "another refcount table".to_owned(), at: 48, bytes: elsewhere.to_vec() });
    let beyond = (image.len() as u64 * 2).next_multiple_of(cluster).to_be_bytes();
    patches.push(Patch { what: "refcount table behind the end".to_owned(), at: 48, bytes: beyond.to_vec() });
    patches.push(Patch { what: "L1 behind the end".to_owned(), at: 40, bytes: beyond.to_vec() });
    snapshots(image, &mut patches);
    for (how, value) in [("1", 1_u32), ("65536", 65536), ("65537", 65537), ("all", u32::MAX)] {
        patches.push(Patch {
            what: format!("snapshots: {how}"),
            at: 60,
            bytes: value.to_be_bytes().to_vec(),
        });
    }
    patches
}

fn snapshots(image: &[u8], patches: &mut Vec<Patch>) {
    let cluster = 1_u64 << be32(image, 20);
    let at = be64(image, 64);
    if be32(image, 60) == 0 {
        return;
    }
    pointers(image, "snapshot L1", at, patches);
    let l1 = be64(image, at);
    pointers(image, "snapshot L1 entry", l1, patches);
    for (how, value) in
        [("0", 0_u32), ("1000", 1000), ("max", 4 << 20), ("over", (4 << 20) + 1), ("all", u32::MAX)]
    {
        patches.push(Patch {
            what: format!("snapshot L1 size {how}"),
            at: at + 8,
            bytes: value.to_be_bytes().to_vec(),
        });
    }
    for (how, value) in
        [("0", 0_u32), ("8", 8), ("17", 17), ("1024", 1024), ("1025", 1025), ("all", u32::MAX)]
    {
        patches.push(Patch {
            what: format!("snapshot extra {how}"),
            at: at + 36,
            bytes: value.to_be_bytes().to_vec(),
        });
    }
    for value in [at ^ 0x200, 1 << 62, at + cluster] {
        patches.push(Patch {
            what: format!("snapshots at {value:x}"),
            at: 64,
            bytes: value.to_be_bytes().to_vec(),
        });
    }
}

/// Applies `test` to all patches of all images on all cores and gathers what it says.
fn for_all(every: usize, test: impl Fn(&Recipe, &Path, &[u8], &Patch) -> Option<String> + Sync) {
    let directory = tempfile::tempdir().unwrap();
    let mut work = Vec::new();
    for recipe in RECIPES {
        let path = recipe.make(directory.path());
        let image = fs::read(&path).unwrap();
        for patch in patches(&image).into_iter().step_by(every) {
            work.push((recipe, image.clone(), patch));
        }
    }
    let next = Mutex::new(work.into_iter().enumerate());
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for worker in 0..2 {
            let (next, failures, test, directory) = (&next, &failures, &test, directory.path());
            scope.spawn(move || {
                let path = directory.join(format!("patched-{worker}.qcow2"));
                loop {
                    let Some((_, (recipe, mut image, patch))) = next.lock().unwrap().next() else { return };
                    let at = usize::try_from(patch.at).unwrap();
                    if image.len() < at + patch.bytes.len() {
                        image.resize(at + patch.bytes.len(), 0);
                    }
                    image[at..at + patch.bytes.len()].copy_from_slice(&patch.bytes);
                    fs::write(&path, &image).unwrap();
                    if let Some(difference) = test(recipe, &path, &image, &patch) {
                        let text = format!("{}: {}:\n{difference}", recipe.name, patch.what);
                        failures.lock().unwrap().push(text);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} differences\n{}", failures.len(), failures.join("\n\n"));
}

fn compare(theirs: &Verdict, ours: &Verdict) -> Option<String> {
    let differs = theirs != ours;
    differs.then(|| {
        let at = theirs.lines.iter().zip(&ours.lines).take_while(|(a, b)| a == b).count();
        let show = |verdict: &Verdict| {
            format!(
                "{:?} {:?}, {} lines: {:#?}",
                verdict.report,
                verdict.failure,
                verdict.lines.len(),
                verdict.lines.iter().skip(at).take(5).collect::<Vec<_>>()
            )
        };
        format!("theirs {}\nours {}", show(theirs), show(ours))
    })
}

/// Each `default`-th patch, so that the suite stays quick; `IMG_TEST_EVERY=1` takes them all.
fn every(default: usize) -> usize {
    std::env::var("IMG_TEST_EVERY").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn findings_and_counts_agree() {
    for_all(every(5), |_, path, _, _| {
        let theirs = theirs(path, None)?;
        if theirs.failure.as_deref() == Some("Cannot allocate memory") {
            // A negative offset, which the reference takes for a huge count of clusters.
            return None;
        }
        match ours(&load(path), Repair::Nothing) {
            Ok(ours) => compare(&theirs, &ours),
            Err(error) => Some(format!("we do not open it: {error}")),
        }
    });
}
/// Held while the one external data file is in use.
static EXTERNAL: Mutex<()> = Mutex::new(());

/// Our repair of a broken image leaves one that is clean for both, tells what the reference's tells, and
/// reads as the reference's repair does.
fn repairs_agree(repair: Repair, word: &str) {
    for_all(every(23), |recipe, path, image, patch| {
        // Not comparable: an offset that the reference takes for negative; 65536 snapshots of garbage, which
        // take it minutes; a header that it rewrites at open, forgetting the snapshots.
        let is_snapshots = patch.what.starts_with("snapshot");
        if is_snapshots
            && (patch.what.ends_with("sign")
                || patch.what.starts_with("snapshots: ")
                || recipe.name == "bitmaps")
        {
            return None;
        }
        // There is one data file, and its lock.
        let _alone = (recipe.name == "external").then(|| EXTERNAL.lock().unwrap());
        let mine = path.with_extension("mine");
        fs::write(&mine, image).unwrap();
        let reference = theirs(path, Some(word))?;
        let our = match ours(&open(&mine), repair) {
            Ok(verdict) => verdict,
            Err(error) => return Some(format!("we do not open it: {error}")),
        };
        let after = theirs(&mine, None);
        let is_clean = |verdict: &Verdict| {
            verdict
                .report
                .as_ref()
                .is_some_and(|report| report.corruptions + report.check_errors + report.leaks == 0)
        };
        let Some(after) = after else {
            return Some("cannot be opened after our repair".to_owned());
        };
        if is_clean(&reference) || is_clean(&our) {
            if !is_clean(&after) {
                return Some(format!("not clean after our repair: {after:#?}\nours {our:#?}"));
            }
            if is_clean(&reference) && contents(path) != contents(&mine) {
                return Some("reads differently after our repair".to_owned());
            }
        }
        if our.failure.is_none() && reference.failure.is_some() || is_clean(&our) && !is_clean(&reference) {
            return None; // The reference gave up where we did not.
        }
        let is_bitmap_trouble = recipe.name == "bitmaps" && our.lines.len() < reference.lines.len();
        if is_bitmap_trouble && reference.lines.starts_with(&our.lines) && our.report == reference.report {
            return None; // What follows is about its own writing of the bitmaps.
        }
        if freed_what_was_not_counted(&reference, &our) {
            return None;
        }
        compare(&reference, &our)
    });
}

/// Whether the reference freed leaks and we kept them: where a table cannot be read, what it refers to looks
/// like a leak. All else must be the same.
fn freed_what_was_not_counted(reference: &Verdict, our: &Verdict) -> bool {
    let (Some(theirs), Some(ours)) = (&reference.report, &our.report) else { return false };
    let uncounted = ["exceeding the end", "is not cluster aligned", "is too large"];
    theirs.leaks_fixed > 0
        && ours.leaks == theirs.leaks + theirs.leaks_fixed
        && (ours.leaks_fixed, ours.check_errors) == (0, theirs.check_errors)
        && our.lines.iter().any(|line| {
            uncounted.iter().any(|text| line.contains(text)) || line.contains("subcluster allocation bitmap")
        })
}

#[test]
fn repair_of_leaks_agrees() {
    repairs_agree(Repair::Leaks, "leaks");
}

#[test]
fn repair_of_all_agrees() {
    repairs_agree(Repair::All, "all");
}
