//! The promise of the design, in every state that a power cut may leave: the image opens; every byte that was
//! flushed is there; the audit finds nothing, or leaks only, or a dirty bit that opening for write repairs.
//!
//! Random histories run on a storage that records every write and flush. Then each recorded moment is a power
//! cut: what was flushed is there, of what was not, any subset, torn at 512 bytes. CI tries some thousand states;
//! `IMG_TEST_CASES=5000 IMG_TEST_SEED=7 cargo test --release -p img-tests
//! --test a_power_cut_loses_nothing_that_was_flushed -- --nocapture` tries some hundred times as many.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use img_core::{
    Error,
    format::{OpenMode, OptionSet, Repair},
    image::Image,
    storage::{MemoryStorage, Storage, testing::CrashRecorder},
};
use img_tests::{
    memory, number_from_environment, proptest_config, read_all,
    scenario::{Layout, Model, Op, Plan, Scenario, apply, scenario},
};
use proptest::{prelude::*, test_runner::TestCaseError};

/// How many states were tried, for the line at the end.
static TRIED: AtomicU64 = AtomicU64::new(0);

/// Power cuts tried in each history; a longer search draws more histories instead.
const STATES: usize = 150;

#[test]
fn a_power_cut_loses_nothing_that_was_flushed() {
    let seed = number_from_environment("IMG_TEST_SEED").unwrap_or(1);
    let small = scenario(16, false).prop_map(in_small_clusters);
    let mut runner = proptest::test_runner::TestRunner::new(proptest_config(60, "crash"));
    let outcome = runner.run(&small, |scenario| try_history(&scenario, seed));
    report(&format!("{} states after a power cut tried", TRIED.load(Ordering::Relaxed)));
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

#[expect(clippy::print_stdout, reason = "the number of states tried is part of the result")]
fn report(line: &str) {
    println!("{line}");
}

/// Small images have as many kinds of tables as large ones and thousands of their states can be tried.
fn in_small_clusters(scenario: Scenario) -> Scenario {
    let old = scenario.layout;
    let cluster_bits = if old.extended_l2 { 14 } else { 9 + old.cluster_bits % 4 };
    Scenario { layout: Layout { cluster_bits, ..old }, size: scenario.size % 256, ..scenario }
}

fn try_history(scenario: &Scenario, seed: u64) -> Result<(), TestCaseError> {
    let plan = scenario.plan();
    let recorder = record(scenario, &plan).map_err(|error| TestCaseError::fail(error.to_string()))?;
    for state in recorder.states(seed, STATES) {
        TRIED.fetch_add(1, Ordering::Relaxed);
        // Before the first mark the image is still being made, and no one was promised anything.
        let Some(done) = state.mark.and_then(|mark| usize::try_from(mark).ok()) else { continue };
        let durable =
            (0..=done).rev().find(|&done| done == 0 || is_durable(&plan.ops[done - 1])).unwrap_or(0);
        let running = (done + 1).min(plan.ops.len());
        let since_ops = &plan.ops[durable..running];
        let allowed = Allowed {
            since: &plan.models[durable..=running],
            copied_flags_may_lag: scenario.layout.version == 2 && since_ops.iter().any(is_about_snapshots),
        };
        let [file] = <[MemoryStorage; 1]>::try_from(state.files).expect("one file is recorded");
        allowed.judge(file).map_err(|text| {
            TestCaseError::fail(format!(
                "{text}\ndurable up to {:?}, cut during {:?} or after\n{}",
                plan.ops[..durable].last(),
                plan.ops.get(done),
                state.description
            ))
        })?;
    }
    Ok(())
}

/// Runs the history on a recorded image; mark `n` stands behind operation `n`, mark 0 behind creation.
fn record(scenario: &Scenario, plan: &Plan) -> Result<CrashRecorder, Error> {
    let recorder = CrashRecorder::new();
    let storage = recorder.record(Arc::new(MemoryStorage::new("crash.qcow2")))?;
    memory::create(&storage, &scenario.layout, plan.size_bytes)?;
    let options = if scenario.size % 2 == 1 { memory::smallest_caches() } else { OptionSet::new() };
    let open = || memory::open_with(Arc::clone(&storage), OpenMode::Write, &options);
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

fn is_about_snapshots(op: &Op) -> bool {
    matches!(op, Op::SnapshotCreate(_) | Op::SnapshotApply(_) | Op::SnapshotDelete(_))
}

/// Whether everything before and in `op` is safe once it has returned.
fn is_durable(op: &Op) -> bool {
    matches!(op, Op::Flush | Op::Reopen) || is_about_snapshots(op)
}

/// What may be read after a power cut: the first model is durable, every later one may have happened in part.
struct Allowed<'a> {
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
        let image =
            memory::open(storage, OpenMode::Read).map_err(|error| format!("does not open: {error}"))?;
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
        for (at, &byte) in guest.iter().enumerate() {
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
        let snapshots = image.layers()[0].snapshots().ok_or("no snapshots at all")?;
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
            let view = snapshots.view(&snapshot.id).and_then(|layer| Image::from_layers(vec![layer]));
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
