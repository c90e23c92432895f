//! The promise of the design, in every state that a power cut may leave: the image opens; every byte that was
//! flushed is there; the audit finds nothing, or leaks only, or a dirty bit that opening for write repairs.
//!
//! Random histories run on a storage that records every write and flush. Then each recorded moment is a power
//! cut: what was flushed is there, of what was not, any subset, torn at 512 bytes. CI tries some thousand states;
//! `IMG_TEST_CASES=5000 IMG_TEST_SEED=7 cargo test --release -p img-tests
//! --test a_power_cut_loses_nothing_that_was_flushed -- --nocapture` tries some hundred times as many.

use std::{
    collections::BTreeSet,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use img_core::{
    Error,
    format::{OpenMode, OptionSet, Repair},
    image::Image,
    storage::{
        MemoryStorage, Preallocation, Storage,
        testing::{CrashRecorder, CrashState, Gated},
    },
};
use img_tests::{
    memory, number_from_environment,
    pattern::Random,
    proptest_config,
    queue::Queue,
    read_all,
    scenario::{
        Layout, Model, Op, Plan, Qcow2, Scenario, apply, qcow2_layout, qed_layout, scenario, vmdk_layout,
    },
};
use proptest::{prelude::*, test_runner::TestCaseError};

/// What is compared as a whole before it is looked at byte by byte.
const PIECE: usize = 4096;

/// How many states were tried, for the line at the end.
static TRIED: AtomicU64 = AtomicU64::new(0);

/// Power cuts tried in each history; a longer search draws more histories instead.
const STATES: usize = 150;

#[test]
fn a_power_cut_loses_nothing_that_was_flushed() {
    try_histories(qcow2_layout(), true, proptest_config(60, "crash"));
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed_to_qed() {
    try_histories(qed_layout(), true, proptest_config(40, "crash_qed"));
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed_to_vmdk() {
    try_histories(vmdk_layout(), false, proptest_config(24, "crash_vmdk"));
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed_to_vpc() {
    try_histories(Just(Layout::Vpc), false, proptest_config(12, "crash_vpc"));
}

/// With `chains`, half of the images have a raw file below them, whose name is all that they know of it.
fn try_histories(layouts: impl Strategy<Value = Layout>, chains: bool, config: ProptestConfig) {
    let seed = number_from_environment("IMG_TEST_SEED").unwrap_or(1);
    let small = scenario(layouts, 16, chains).prop_map(in_small_clusters);
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let outcome = runner.run(&small, |scenario| try_history(&scenario, seed));
    report(&format!("{} states after a power cut tried", TRIED.load(Ordering::Relaxed)));
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

/// The same while others change the disk beside a flush, which stops at one of its operations for that: what was
/// written before the flush began is there once it has returned, and nothing made meanwhile breaks the order.
#[test]
fn a_power_cut_beside_a_flush_loses_nothing() {
    let seed = number_from_environment("IMG_TEST_SEED").unwrap_or(1);
    let small = scenario(qcow2_layout(), 24, true).prop_map(in_small_clusters);
    let mut runner = proptest::test_runner::TestRunner::new(proptest_config(60, "crash_beside"));
    let outcome = runner.run(&small, |scenario| try_history_beside(&scenario, seed));
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

/// A disk that grows over a longer backing file, and over what it held itself before it shrank, shows neither:
/// not at any moment. Sizes end inside clusters and subclusters.
#[test]
fn a_disk_that_grows_never_shows_old_bytes() {
    let layout = |version, cluster_bits, extended_l2| {
        Layout::Qcow2(Qcow2 {
            version,
            cluster_bits,
            refcount_bits: 16,
            extended_l2,
            zstd: false,
            lazy_refcounts: false,
        })
    };
    for layout in [layout(3, 10, false), layout(3, 14, true), layout(3, 16, false), layout(2, 10, false)] {
        let cluster = layout.cluster_bytes();
        let (first, small, large) = (cluster * 3 + 512, cluster + cluster / 2, cluster * 40 + 512);
        let old = vec![0xee; usize::try_from(cluster * 30).expect("small")];
        let below: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("below.raw", &old));
        let recorder = CrashRecorder::new();
        let storage = recorder.record(Arc::new(MemoryStorage::new("grows.qcow2"))).expect("recorded");
        memory::create_over(&storage, &layout, first, Some(&below)).expect("created");
        let open = |storage, mode| memory::open_over(storage, Some(&below), mode, &OptionSet::new());
        let image = open(storage, OpenMode::Write).expect("it opens");
        image.write_at(&[0xdd; 2000], small - 1000).expect("written");
        image.flush().expect("flushed");
        recorder.mark(0);
        image.resize(small, Preallocation::Off).expect("shrunk");
        recorder.mark(1);
        image.resize(large, Preallocation::Off).expect("grown");
        recorder.mark(2);
        for state in recorder.states(1, 1500) {
            let Some(mark) = state.mark else { continue };
            let [file] = <[MemoryStorage; 1]>::try_from(state.files).expect("one file is recorded");
            let image = open(Arc::new(file), OpenMode::Read).expect("it opens");
            let sizes = [[first, small], [small, large], [large; 2]][usize::try_from(mark).unwrap()];
            let size = image.virtual_size_bytes();
            assert!(sizes.contains(&size), "{layout:?}: {size} bytes after step {mark}");
            if size != first {
                let guest = read_all(&image).expect("it reads");
                let end = usize::try_from(small).expect("small");
                let shown = guest[end..].iter().position(|byte| *byte != 0);
                assert_eq!(shown, None, "{layout:?}, step {mark}: old bytes\n{}", state.description);
                assert_eq!(guest[end - 1000..end], [0xdd; 1000], "{layout:?}: what was flushed");
            }
        }
    }
}

#[expect(clippy::print_stdout, reason = "the number of states tried is part of the result")]
fn report(line: &str) {
    println!("{line}");
}

fn in_small_clusters(scenario: Scenario) -> Scenario {
    let layout = scenario.layout.in_small_clusters();
    Scenario { layout, size: scenario.size % 256, ours_alone: true, ..scenario }
}

fn try_history(scenario: &Scenario, seed: u64) -> Result<(), TestCaseError> {
    let plan = scenario.plan();
    let below = backing_file(&plan);
    let recorder =
        record(scenario, &plan, below.as_ref()).map_err(|error| TestCaseError::fail(error.to_string()))?;
    for state in recorder.states(seed, STATES) {
        TRIED.fetch_add(1, Ordering::Relaxed);
        // Before the first mark the image is still being made, and no one was promised anything.
        let Some(done) = state.mark.and_then(|mark| usize::try_from(mark).ok()) else { continue };
        let durable =
            (0..=done).rev().find(|&done| done == 0 || is_durable(&plan.ops[done - 1])).unwrap_or(0);
        judge(scenario, &plan, below.as_ref(), durable..done, state)?;
    }
    Ok(())
}

/// [`try_history`] with operations beside flushes.
fn try_history_beside(scenario: &Scenario, seed: u64) -> Result<(), TestCaseError> {
    let plan = scenario.plan();
    let below = backing_file(&plan);
    let recorder = record_beside(scenario, &plan, below.as_ref(), seed)
        .map_err(|error| TestCaseError::fail(error.to_string()))?;
    for state in recorder.states(seed, STATES) {
        let Some(mark) = state.mark else { continue };
        judge(scenario, &plan, below.as_ref(), since(mark), state)?;
    }
    Ok(())
}

/// Operations up to `since.start` are durable, those up to `since.end` have ended.
fn judge(
    scenario: &Scenario,
    plan: &Plan,
    below: Option<&Arc<dyn Storage>>,
    since: Range<usize>,
    state: CrashState,
) -> Result<(), TestCaseError> {
    let running = (since.end + 1).min(plan.ops.len());
    let since_ops = &plan.ops[since.start..running];
    let allowed = Allowed {
        below,
        since: &plan.models[since.start..=running],
        copied_flags_may_lag: scenario.layout.is_version_2() && since_ops.iter().any(is_about_snapshots),
    };
    let [file] = <[MemoryStorage; 1]>::try_from(state.files).expect("one file is recorded");
    allowed.judge(file).map_err(|text| {
        TestCaseError::fail(format!(
            "{text}\ndurable up to {:?}, cut during {:?} or after\n{}",
            plan.ops[..since.start].last(),
            plan.ops.get(since.end),
            state.description
        ))
    })
}

/// A mark that says which operations are durable and which have ended.
fn mark(since: &Range<usize>) -> u64 {
    (since.start as u64) << 32 | since.end as u64
}

/// What a [`mark`] says.
fn since(mark: u64) -> Range<usize> {
    let count = |bits: u64| usize::try_from(bits).expect("a history is short");
    count(mark >> 32)..count(mark & u64::from(u32::MAX))
}

/// Runs the history on a recorded image. Where operations follow a flush that need not wait for requests to end, the
/// flush stops at one of its operations, and they are done beside it; some writes and flushes as a queue does them.
fn record_beside(
    scenario: &Scenario,
    plan: &Plan,
    below: Option<&Arc<dyn Storage>>,
    seed: u64,
) -> Result<CrashRecorder, Error> {
    let mut random = Random::new(seed ^ plan.size_bytes);
    let recorder = CrashRecorder::new();
    let recorded = recorder.record(Arc::new(MemoryStorage::new("crash.qcow2")))?;
    let gated = Arc::new(Gated::new(recorded));
    let storage: Arc<dyn Storage> = gated.clone();
    memory::create_over(&storage, &scenario.layout, plan.size_bytes, below)?;
    // Caches have room: a drain that is due would wait for the one that stands at the gate.
    let open =
        || memory::open_over(Arc::clone(&storage), below, OpenMode::Write, &OptionSet::new()).map(Arc::new);
    let mut image = open()?;
    image.flush()?;
    let mut since = 0..0;
    recorder.mark(mark(&since));
    while let Some(op) = plan.ops.get(since.end) {
        let done = since.end + 1;
        match op {
            Op::Reopen => {
                Arc::try_unwrap(image).expect("no queue holds it").close()?;
                image = open()?;
                since = done..done;
            }
            Op::Flush => {
                let beside = plan.ops[done..].iter().take(4);
                let beside = beside.take_while(|op| goes_on_beside(op, &scenario.layout)).count();
                since.end = done;
                recorder.mark(mark(&since));
                let passed = AtomicU64::new(0);
                let stop = random.below(6);
                let by_queue = random.below(2) == 0;
                let gate = gated.close(move |request| {
                    request.operation.is_change() && passed.fetch_add(1, Ordering::SeqCst) == stop
                });
                std::thread::scope(|scope| {
                    let flush = scope.spawn(|| {
                        let flushed = if by_queue { Queue::new(&image).flush() } else { image.flush() };
                        gate.let_pass();
                        flushed
                    });
                    let changed = match gate.wait() {
                        Some(_) => plan.ops[done..done + beside].iter().try_for_each(|op| {
                            apply_beside(&image, op, &scenario.layout, &mut random)?;
                            since.end += 1;
                            recorder.mark(mark(&since));
                            Ok(())
                        }),
                        None => Ok(()),
                    };
                    gate.let_pass();
                    flush.join().expect("no panic").and(changed)
                })?;
                since.start = done;
            }
            op => {
                apply_beside(&image, op, &scenario.layout, &mut random)?;
                since.end = done;
                if is_durable(op) {
                    since.start = done;
                }
            }
        }
        recorder.mark(mark(&since));
    }
    drop(image);
    Ok(recorder)
}

/// Whether an operation neither makes the disk durable nor waits for requests to end.
fn goes_on_beside(op: &Op, layout: &Layout) -> bool {
    let cluster = layout.cluster_bytes();
    match op {
        Op::Write { .. } | Op::Compress { .. } | Op::Discard { .. } => true,
        Op::Zero { at, len, .. } => at % cluster == 0 && (at + len) % cluster == 0,
        _ => false,
    }
}

/// [`apply`], where half of the writes are prepared and committed from memory if that is possible.
fn apply_beside(image: &Arc<Image>, op: &Op, layout: &Layout, random: &mut Random) -> Result<(), Error> {
    match op {
        Op::Write { at, len, byte } if random.below(2) == 0 => {
            Queue::new(image).write(&vec![*byte; usize::try_from(*len).expect("small")], *at)
        }
        op => apply(image, op, layout),
    }
}

/// Runs the history on a recorded image; mark `n` stands behind operation `n`, mark 0 behind creation.
fn record(
    scenario: &Scenario,
    plan: &Plan,
    below: Option<&Arc<dyn Storage>>,
) -> Result<CrashRecorder, Error> {
    let recorder = CrashRecorder::new();
    let storage = recorder.record(Arc::new(MemoryStorage::new("crash.qcow2")))?;
    memory::create_over(&storage, &scenario.layout, plan.size_bytes, below)?;
    let options = if scenario.size % 2 == 1 { scenario.layout.smallest_caches() } else { OptionSet::new() };
    let open = || memory::open_over(Arc::clone(&storage), below, OpenMode::Write, &options);
    let mut image = open()?;
    image.flush()?;
    recorder.mark(0);
    for (op, mark) in plan.ops.iter().zip(1..) {
        if *op == Op::Reopen {
            image.close()?;
            image = open()?;
        } else {
            apply(&image, op, &scenario.layout)?;
        }
        recorder.mark(mark);
    }
    // What follows the last operation is a crash as well: nothing is closed.
    drop(image);
    Ok(recorder)
}

/// The backing file, which nobody writes to.
fn backing_file(plan: &Plan) -> Option<Arc<dyn Storage>> {
    plan.below
        .as_ref()
        .map(|bytes| Arc::new(MemoryStorage::from_bytes("below.raw", bytes)) as Arc<dyn Storage>)
}

fn is_about_snapshots(op: &Op) -> bool {
    matches!(op, Op::SnapshotCreate(_) | Op::SnapshotApply(_) | Op::SnapshotDelete(_))
}

/// Whether everything before and in `op` is safe once it has returned.
fn is_durable(op: &Op) -> bool {
    matches!(op, Op::Flush | Op::Reopen) || is_about_snapshots(op)
}

/// What may be read after a power cut: the first model is durable, every later one may have happened in part.
struct Allowed<'a> {
    below: Option<&'a Arc<dyn Storage>>,
    since: &'a [Model],
    /// A version 2 image in the middle of a snapshot operation: it has no dirty bit to warn of copied flags that
    /// do not fit the refcounts yet. The audit may name those, and only those, and repairs them.
    copied_flags_may_lag: bool,
}

impl Allowed<'_> {
    fn judge(&self, state: MemoryStorage) -> Result<(), String> {
        let storage: Arc<dyn Storage> = Arc::new(state);
        let dirty = self.judge_audit(&storage)?;
        if dirty {
            let image = memory::open(Arc::clone(&storage), OpenMode::Write)
                .map_err(|error| format!("dirty, and opening for write fails: {error}"))?;
            image.close().map_err(|error| format!("dirty, and closing fails: {error}"))?;
            if self.judge_audit(&storage)? {
                return Err("opening for write left the dirty bit".to_owned());
            }
        }
        let image = memory::open_over(storage, self.below, OpenMode::Read, &OptionSet::new())
            .map_err(|error| format!("does not open: {error}"))?;
        self.judge_guest(&image)?;
        self.judge_snapshots(&image)
    }

    /// Whether the image is marked dirty; an error when it is not and more than leaks is wrong.
    fn judge_audit(&self, storage: &Arc<dyn Storage>) -> Result<bool, String> {
        let image = memory::open(Arc::clone(storage), OpenMode::Check { repair: false })
            .map_err(|error| format!("does not open for an audit: {error}"))?;
        if image.layers()[0].is_dirty() {
            return Ok(true);
        }
        let mut texts = Vec::new();
        let report = image
            .check(Repair::Nothing, &mut |finding| texts.push(finding.text))
            .map_err(|error| format!("no audit: {error}"))?;
        let only_flags = texts.iter().all(|text| text.starts_with("Leaked") || text.contains("OFLAG_COPIED"));
        if self.copied_flags_may_lag && report.check_errors == 0 && report.corruptions > 0 && only_flags {
            drop(image);
            return repair(storage).map(|()| false);
        }
        if report.corruptions > 0 || report.check_errors > 0 {
            return Err(format!("{report:?}: {texts:#?}"));
        }
        Ok(false)
    }

    fn judge_guest(&self, image: &Image) -> Result<(), String> {
        let guest = read_all(image).map_err(|error| format!("does not read: {error}"))?;
        if !self.since.iter().any(|model| model.guest.len() == guest.len()) {
            return Err(format!("a size of {} bytes, which the disk never had since", guest.len()));
        }
        // Going back to a snapshot or changing the size is one step: the bytes of before or of after.
        let is_one_of_them = |piece: &(usize, &[u8])| {
            let range = piece.0 * PIECE..piece.0 * PIECE + piece.1.len();
            self.since.iter().any(|model| model.guest.get(range.clone()) == Some(piece.1))
        };
        let mixed = guest.chunks(PIECE).enumerate().filter(|piece| !is_one_of_them(piece));
        let bytes = mixed.flat_map(|(index, piece)| (index * PIECE..).zip(piece));
        for (at, &byte) in bytes {
            let mut allowed = self.since.iter().map(|model| model.guest.get(at).copied().unwrap_or(0));
            if !allowed.any(|allowed| allowed == byte) {
                let expected: BTreeSet<u8> =
                    self.since.iter().filter_map(|model| model.guest.get(at).copied()).collect();
                return Err(format!("guest byte {at:#x} is {byte:#x}, may be {expected:02x?}"));
            }
        }
        Ok(())
    }

    /// A snapshot that is in all states since is there; one that is in none is not; each reads as taken.
    fn judge_snapshots(&self, image: &Image) -> Result<(), String> {
        let Some(snapshots) = image.layers()[0].snapshots() else { return Ok(()) };
        let list = snapshots.list().map_err(|error| format!("no list of snapshots: {error}"))?;
        let names = |model: &Model| -> BTreeSet<String> {
            model.snapshots.iter().map(|(name, _)| name.clone()).collect()
        };
        let found: BTreeSet<String> = list.iter().map(|snapshot| snapshot.name.clone()).collect();
        if !self.since.iter().any(|model| names(model) == found) {
            return Err(format!("snapshots {found:?}, which were never those since"));
        }
        for snapshot in &list {
            let taken =
                self.since.iter().flat_map(|model| &model.snapshots).find(|(name, _)| *name == snapshot.name);
            let (_, guest) = taken.ok_or("a snapshot that was never taken")?;
            let below = image.layers()[1..].iter().cloned();
            let view = snapshots
                .view(&snapshot.id)
                .and_then(|layer| Image::from_layers([layer].into_iter().chain(below).collect()));
            let seen = view.and_then(|view| read_all(&view));
            let seen = seen.map_err(|error| format!("snapshot {} does not read: {error}", snapshot.name))?;
            let shown = seen.len().min(guest.len());
            if seen[..shown] != guest[..shown] {
                return Err(format!("snapshot {} reads differently from when it was taken", snapshot.name));
            }
        }
        Ok(())
    }
}

/// Repairs what an audit found, which must leave nothing.
fn repair(storage: &Arc<dyn Storage>) -> Result<(), String> {
    for repair in [Repair::All, Repair::Nothing] {
        let mode = OpenMode::Check { repair: repair != Repair::Nothing };
        let image = memory::open(Arc::clone(storage), mode).map_err(|error| error.to_string())?;
        let report = image.check(repair, &mut |_| {}).map_err(|error| error.to_string())?;
        if repair == Repair::Nothing && (report.corruptions, report.leaks) != (0, 0) {
            return Err(format!("after the repair: {report:?}"));
        }
        image.close().map_err(|error| error.to_string())?;
    }
    Ok(())
}
