//! Bytes that nobody meant, and storage that fails: the audit answers, and a repair changes no guest data
//! that was not broken.

use std::{
    io::{IoSlice, IoSliceMut},
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::oracle::{Recipe, contents, load, ours, theirs};
use crate::{
    Error, Result,
    format::Repair,
    storage::{Flush, Identity, Limits, MemoryStorage, Preallocation, Storage},
};

/// A storage whose writes, flushes and holes all fail after the first `left`.
#[derive(Debug)]
struct Failing {
    inner: Arc<MemoryStorage>,
    left: AtomicU64,
}

impl Failing {
    fn spend(&self) -> Result<()> {
        let spent = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        spent.map(drop).map_err(|_| Error::io(self.path(), "write", rustix::io::Errno::NOSPC))
    }
}

impl Storage for Failing {
    fn path(&self) -> &Path {
        self.inner.path()
    }
    fn len_bytes(&self) -> Result<u64> {
        self.inner.len_bytes()
    }
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], at_bytes: u64) -> Result<()> {
        self.inner.read_vectored_at(bufs, at_bytes)
    }
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<()> {
        self.spend()?;
        self.inner.write_vectored_at(bufs, at_bytes)
    }
    fn flush(&self, what: Flush) -> Result<()> {
        self.spend()?;
        self.inner.flush(what)
    }
    fn resize(&self, len_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.spend()?;
        self.inner.resize(len_bytes, preallocation)
    }
    fn preallocate(&self, range_bytes: Range<u64>, preallocation: Preallocation) -> Result<()> {
        self.spend()?;
        self.inner.preallocate(range_bytes, preallocation)
    }
    fn punch_hole(&self, range_bytes: Range<u64>) -> Result<()> {
        self.spend()?;
        self.inner.punch_hole(range_bytes)
    }
    fn write_zeroes(&self, range_bytes: Range<u64>, may_unmap: bool) -> Result<()> {
        self.spend()?;
        self.inner.write_zeroes(range_bytes, may_unmap)
    }
    fn next_allocated(&self, from_bytes: u64) -> Result<Option<Range<u64>>> {
        self.inner.next_allocated(from_bytes)
    }
    fn allocated_bytes(&self) -> Result<u64> {
        self.inner.allocated_bytes()
    }
    fn identity(&self) -> Option<Identity> {
        self.inner.identity()
    }
    fn limits(&self) -> Limits {
        self.inner.limits()
    }
    fn is_writable(&self) -> bool {
        true
    }
}

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

#[test]
fn a_repair_that_fails_anywhere_leaves_nothing_worse() {
    let directory = tempfile::tempdir().unwrap();
    let path = SNAPSHOTS.make(directory.path());
    let expected = contents(&path);
    assert!(expected.is_some());
    let whole = std::fs::read(&path).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(whole[at..at + 8].try_into().unwrap());
    for (what, pointers, bytes) in BREAKS {
        // The header's pointer, then the first entry of each table.
        let mut at = 0;
        for field in *pointers {
            at =
                usize::try_from(be64(at + usize::try_from(*field).unwrap()) & 0x00ff_ffff_ffff_fe00).unwrap();
        }
        let mut broken = whole.clone();
        broken[at..at + bytes.len()].copy_from_slice(bytes);
        for writes in 0.. {
            let inner = Arc::new(MemoryStorage::from_bytes("image", &broken));
            let failing: Arc<dyn Storage> =
                Arc::new(Failing { inner: Arc::clone(&inner), left: AtomicU64::new(writes) });
            let result = ours(&failing, Repair::All);
            let is_done = result.as_ref().is_ok_and(|verdict| verdict.failure.is_none());
            // What is left reads as before, and a repair that is let through makes it clean.
            let left = directory.path().join("left.qcow2");
            std::fs::write(&left, inner.to_vec()).unwrap();
            if writes % 3 == 0 || is_done {
                assert_eq!(contents(&left), expected, "{what}: after {writes} writes");
            }
            let storage: Arc<dyn Storage> = inner;
            ours(&storage, Repair::All).unwrap();
            let again = ours(&storage, Repair::Nothing).unwrap();
            assert_eq!(again.lines, Vec::<String>::new(), "{what}: after {writes} writes");
            if is_done {
                let after = theirs(&left, None).unwrap();
                assert_eq!(after.lines, Vec::<String>::new(), "{what}");
                break;
            }
        }
    }
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
