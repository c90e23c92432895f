//! `amend` goes from version to version and from width to width in steps. Wherever the power is cut, the image
//! opens, the disk and every snapshot read as before, and an audit finds leaks at worst, or the dirty bit; amending
//! it again gets where the first time was going.

use std::sync::Arc;

use img_core::{
    Result,
    format::{OpenMode, OptionSet, Repair},
    image::Image,
    job::{Unwatched, amend::amend},
    storage::{MemoryStorage, Storage, testing::CrashRecorder},
};
use img_tests::{
    memory, number_from_environment, proptest_config, read_all,
    scenario::{Layout, Qcow2},
};
use proptest::{prelude::*, test_runner::TestCaseError};

const DISK: u64 = 96 << 10;
/// Power cuts tried in each history.
const STATES: usize = 100;

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, len: u64, byte: u8 },
    Zero { at: u64, len: u64, may_unmap: bool },
    Snapshot,
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..DISK - 1, 1..9000_u64).prop_map(|(at, len)| (at, len.min(DISK - at)));
    prop_oneof![
        4 => (range.clone(), 1..=255_u8).prop_map(|((at, len), byte)| Step::Write { at, len, byte }),
        3 => (range, any::<bool>()).prop_map(|((at, len), may_unmap)| Step::Zero { at, len, may_unmap }),
        1 => Just(Step::Snapshot),
    ]
}

/// Options, one amend behind the other. No snapshot is shared by more than three tables.
fn amends() -> impl Strategy<Value = Vec<&'static str>> {
    let one = prop::sample::select(vec![
        "compat=0.10,refcount_bits=16,lazy_refcounts=off",
        "compat=1.1,refcount_bits=64",
        "compat=1.1,refcount_bits=4,lazy_refcounts=on",
        "compat=1.1,refcount_bits=8",
        "compat=1.1,refcount_bits=32,lazy_refcounts=off",
    ]);
    prop::collection::vec(one, 1..4)
}

fn options(list: &str) -> OptionSet {
    let mut options = OptionSet::new();
    for option in list.split(',') {
        let (name, value) = option.split_once('=').expect("name=value");
        options.set(name, value);
    }
    options
}

/// The disk and each snapshot, as a guest reads them.
fn contents(storage: &Arc<dyn Storage>, below: Option<&Arc<dyn Storage>>) -> Result<Vec<(String, Vec<u8>)>> {
    let image = memory::open_over(Arc::clone(storage), below, OpenMode::Read, &OptionSet::new())?;
    let mut all = vec![(String::new(), read_all(&image)?)];
    let snapshots = image.layers()[0].snapshots().expect("qcow2 has snapshots");
    for snapshot in snapshots.list()? {
        let mut layers = vec![snapshots.view(&snapshot.name)?];
        layers.extend_from_slice(&image.layers()[1..]);
        all.push((snapshot.name, read_all(&Image::from_layers(layers)?)?));
    }
    Ok(all)
}

fn make(
    storage: &Arc<dyn Storage>,
    below: Option<&Arc<dyn Storage>>,
    layout: &Layout,
    steps: &[Step],
) -> Result<()> {
    memory::create_over(storage, layout, DISK, below)?;
    let image = memory::open_over(Arc::clone(storage), below, OpenMode::Write, &OptionSet::new())?;
    let mut snapshots = 0;
    for step in steps {
        match *step {
            Step::Write { at, len, byte } => {
                image.write_at(&vec![byte; usize::try_from(len).expect("small")], at)?;
            }
            Step::Zero { at, len, may_unmap } => image.write_zeroes(at..at + len, may_unmap)?,
            Step::Snapshot if snapshots < 3 => {
                snapshots += 1;
                image.snapshot_create(&format!("s{snapshots}"), (1, 2))?;
            }
            Step::Snapshot => {}
        }
    }
    image.close()
}

fn change(storage: &Arc<dyn Storage>, below: Option<&Arc<dyn Storage>>, list: &str) -> Result<()> {
    let open = || memory::open_over(Arc::clone(storage), below, OpenMode::Write, &OptionSet::new());
    amend(open, &options(list), &Unwatched)
}

fn try_cuts(
    cluster_bits: u32,
    has_backing: bool,
    steps: &[Step],
    amends: &[&'static str],
    seed: u64,
) -> Result<()> {
    let layout = Layout::Qcow2(Qcow2 {
        version: 3,
        cluster_bits,
        refcount_bits: 16,
        extended_l2: false,
        zstd: false,
        lazy_refcounts: false,
    });
    let below: Option<Arc<dyn Storage>> = has_backing.then(|| {
        Arc::new(MemoryStorage::from_bytes("below.raw", &vec![0xbb; usize::try_from(DISK).expect("small")]))
            as Arc<dyn Storage>
    });
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("amended.qcow2"));
    make(&storage, below.as_ref(), &layout, steps)?;
    let expected = contents(&storage, below.as_ref())?;
    let recorder = CrashRecorder::new();
    let recorded = recorder.record(storage)?;
    recorder.mark(0);
    for (list, mark) in amends.iter().zip(1..) {
        change(&recorded, below.as_ref(), list)?;
        recorder.mark(mark);
    }
    for mut state in recorder.states(seed, STATES) {
        let Some(mark) = state.mark.and_then(|mark| usize::try_from(mark).ok()) else { continue };
        let what = format!("after {mark} of {amends:?}\n{}", state.description);
        let storage: Arc<dyn Storage> = Arc::new(state.files.pop().expect("one file is recorded"));
        let read = contents(&storage, below.as_ref()).expect(&what);
        assert!(read == expected, "what is read differs {what}");
        let image = memory::open(Arc::clone(&storage), OpenMode::Check { repair: false })?;
        let report = image.check(Repair::Nothing, &mut |_| {})?;
        let is_dirty = image.layers()[0].is_dirty();
        assert!(is_dirty || (report.corruptions, report.check_errors) == (0, 0), "{report:?} {what}");
        drop(image);
        // What was interrupted is begun again.
        let list = amends[mark.min(amends.len() - 1)];
        change(&storage, below.as_ref(), list).expect(&what);
        assert!(
            contents(&storage, below.as_ref())? == expected,
            "amended again, what is read differs {what}"
        );
        let image = memory::open(storage, OpenMode::Check { repair: false })?;
        let report = image.check(Repair::Nothing, &mut |_| {})?;
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "amended again {what}");
    }
    Ok(())
}

#[test]
fn a_power_cut_inside_amend_loses_nothing() {
    let seed = number_from_environment("IMG_TEST_SEED").unwrap_or(1);
    let strategy = (9..=12_u32, any::<bool>(), prop::collection::vec(step(), 1..25), amends());
    let mut runner = proptest::test_runner::TestRunner::new(proptest_config(40, "crash_amend"));
    let outcome = runner.run(&strategy, |(cluster_bits, has_backing, steps, amends)| {
        try_cuts(cluster_bits, has_backing, &steps, &amends, seed)
            .map_err(|error| TestCaseError::fail(error.to_string()))
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

/// Zeroes over a backing file, some of which keep a cluster that a snapshot's data stand in.
#[test]
fn zeroes_that_a_snapshot_has_data_behind_stay_zeroes_and_data() {
    let write = |at, len, byte| Step::Write { at, len, byte };
    let zero = |at, len, may_unmap| Step::Zero { at, len, may_unmap };
    let steps = [
        write(0, 40 << 10, 1),
        Step::Snapshot,
        zero(0, 8 << 10, false),
        zero(16 << 10, 8 << 10, true),
        zero(60 << 10, 8 << 10, true),
        Step::Snapshot,
        zero(30 << 10, 20 << 10, false),
        write(62 << 10, 1 << 10, 2),
    ];
    for has_backing in [false, true] {
        for bits in [9, 12] {
            try_cuts(bits, has_backing, &steps, &["compat=0.10", "compat=1.1"], 3).expect("it is amended");
        }
    }
}
