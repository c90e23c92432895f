//! Bytes that nobody meant, and storage that fails: the audit answers, and a repair changes no guest data
//! that was not broken.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::oracle::{Recipe, contents, load, ours, theirs};
use crate::{
    format::Repair,
    storage::{
        MemoryStorage, Preallocation, Storage,
        testing::{CrashRecorder, FailAt, Operation},
    },
};

const SNAPSHOTS: Recipe = Recipe {
    name: "snapshots",
    options: "cluster_size=4096,refcount_bits=8",
    size: "2M",
    steps: &[
        "io write -P 1 0 40k",
        "snapshot -c one IMAGE",
        "io write -P 2 4k 8k",
        "io write -c -P 3 512k 4k",
        "io write -z 64k 12k",
    ],
};

/// Breaks, each of which needs another repair: offset of a pointer to follow (0 for none), bytes.
const BREAKS: &[(&str, &[u64], &[u8])] = &[
    ("refcount table lost", &[48], &[0; 8]),
    ("refcount block lost", &[48, 0], &[0; 64]),
    ("leaks and shortages", &[48, 0], &[1, 9, 1, 9, 1, 9, 1, 9, 1, 9, 1, 9, 1, 9, 1, 9]),
    ("copied flags", &[40], &[0]),
];

/// The image of [`SNAPSHOTS`], broken in one of the [`BREAKS`].
fn broken(whole: &[u8], pointers: &[u64], bytes: &[u8]) -> Vec<u8> {
    let be64 = |at: usize| u64::from_be_bytes(whole[at..at + 8].try_into().unwrap());
    // The header's pointer, then the first entry of each table.
    let mut at = 0;
    for field in pointers {
        at = usize::try_from(be64(at + usize::try_from(*field).unwrap()) & 0x00ff_ffff_ffff_fe00).unwrap();
    }
    let mut broken = whole.to_vec();
    broken[at..at + bytes.len()].copy_from_slice(bytes);
    broken
}

/// What is left reads as before, and a repair that is let through makes it clean.
fn is_no_worse(left: &MemoryStorage, expected: Option<&[u8]>, directory: &Path, what: &str) {
    if let Some(expected) = expected {
        let path = directory.join("left.qcow2");
        std::fs::write(&path, left.to_vec()).unwrap();
        assert!(contents(&path).as_deref() == Some(expected), "{what}: reads differently");
    }
    let storage: Arc<dyn Storage> = Arc::new(left.snapshot());
    ours(&storage, Repair::All).unwrap();
    let again = ours(&storage, Repair::Nothing).unwrap();
    assert_eq!(again.lines, Vec::<String>::new(), "{what}");
}

#[test]
fn a_repair_that_fails_anywhere_leaves_nothing_worse() {
    let directory = tempfile::tempdir().unwrap();
    let path = SNAPSHOTS.make(directory.path());
    let expected = contents(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    for (what, pointers, bytes) in BREAKS {
        let broken = broken(&whole, pointers, bytes);
        for writes in 0.. {
            let inner = Arc::new(MemoryStorage::from_bytes("image", &broken));
            let failing: Arc<dyn Storage> = Arc::new(FailAt::for_good(
                Arc::clone(&inner) as Arc<dyn Storage>,
                Operation::is_change,
                writes,
            ));
            let result = ours(&failing, Repair::All);
            let is_done = result.as_ref().is_ok_and(|verdict| verdict.failure.is_none());
            let expected = (writes % 3 == 0 || is_done).then_some(expected.as_slice());
            is_no_worse(&inner, expected, directory.path(), &format!("{what}: after {writes} changes"));
            if is_done {
                let after = theirs(&directory.path().join("left.qcow2"), None).unwrap();
                assert_eq!(after.lines, Vec::<String>::new(), "{what}");
                break;
            }
        }
    }
}

/// A read that fails once, anywhere, is told: what could not be counted is not called a leak.
#[test]
fn an_audit_that_could_not_read_all_gives_no_verdict() {
    let directory = tempfile::tempdir().unwrap();
    let whole = load(&SNAPSHOTS.make(directory.path()));
    let sound = ours(&whole, Repair::Nothing).unwrap();
    let mut nth = 0;
    loop {
        let failing =
            Arc::new(FailAt::once(Arc::clone(&whole), |operation| operation == Operation::Read, nth));
        // Opening may be what fails.
        let verdict = ours(&(Arc::clone(&failing) as _), Repair::Nothing);
        if failing.seen() <= nth {
            break;
        }
        if let Ok(verdict) = verdict
            && let Some(report) = &verdict.report
        {
            let is_told = report.check_errors > 0;
            assert!(is_told || *report == *sound.report.as_ref().unwrap(), "read {nth}: {report:?}");
        }
        nth += 1;
    }
    assert!(nth > 5, "only {nth} reads");
}

#[test]
fn a_power_cut_in_a_repair_leaves_nothing_worse() {
    let directory = tempfile::tempdir().unwrap();
    let path = SNAPSHOTS.make(directory.path());
    let expected = contents(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let mut tried = 0;
    for (what, pointers, bytes) in BREAKS {
        let inner: Arc<dyn Storage> =
            Arc::new(MemoryStorage::from_bytes("image", &broken(&whole, pointers, bytes)));
        let recorder = CrashRecorder::new();
        let recorded = recorder.record(inner).unwrap();
        assert_eq!(ours(&recorded, Repair::All).unwrap().failure, None, "{what}");
        for (number, state) in recorder.states(1, 150).enumerate() {
            let expected = (number % 25 == 0).then_some(expected.as_slice());
            is_no_worse(
                &state.files[0],
                expected,
                directory.path(),
                &format!("{what}: {}", state.description),
            );
            tried += 1;
        }
    }
    assert!(tried > 100, "only {tried} states");
}

#[test]
fn a_sparse_file_of_many_clusters_is_audited_in_little_time() {
    let directory = tempfile::tempdir().unwrap();
    let recipe =
        Recipe { name: "sparse", options: "cluster_size=512", size: "64k", steps: &["io write 0 4k"] };
    let path = recipe.make(directory.path());
    let storage = load(&path);
    // One cluster short of what is refused.
    storage.resize((i32::MAX as u64) * 512, Preallocation::Off).unwrap();
    let started = Instant::now();
    let verdict = ours(&storage, Repair::Nothing).unwrap();
    assert_eq!(verdict.lines, Vec::<String>::new());
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    storage.resize((i32::MAX as u64 + 1) * 512, Preallocation::Off).unwrap();
    assert_eq!(ours(&storage, Repair::Nothing).unwrap().failure.as_deref(), Some("File too large"));
    storage.resize(1 << 60, Preallocation::Off).unwrap();
    assert_eq!(ours(&storage, Repair::All).unwrap().failure.as_deref(), Some("File too large"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    /// Random bytes in the metadata of a small image: an answer, in time, from audit and repair; what a
    /// repair calls clean stays clean.
    #[test]
    fn random_bytes_get_an_answer(
        patches in proptest::collection::vec((0_usize..90 * 1024, any::<[u8; 2]>(), any::<bool>()), 1..12),
    ) {
        static IMAGE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let image = IMAGE.get_or_init(|| {
            let directory = tempfile::tempdir().unwrap();
            std::fs::read(SNAPSHOTS.make(directory.path())).unwrap()
        });
        let mut bytes = image.clone();
        for (at, value, is_wide) in patches {
            let at = at % (bytes.len() - 2);
            bytes[at] = value[0];
            if is_wide {
                bytes[at + 1] = value[1];
            }
        }
        let started = Instant::now();
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("image", &bytes));
        if ours(&storage, Repair::Nothing).is_ok() {
            let first = ours(&storage, Repair::All).unwrap();
            let second = ours(&storage, Repair::Nothing).unwrap();
            if first.report.as_ref().is_some_and(|report| report.corruptions + report.leaks + report.check_errors == 0) {
                prop_assert_eq!(second.lines, Vec::<String>::new());
            }
        }
        prop_assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    }
}
