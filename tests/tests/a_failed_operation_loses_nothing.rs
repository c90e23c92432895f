//! An operation of the host that fails once, anywhere, costs what was being done at that time and nothing else:
//! what a later flush vouches for is there, after a power cut too, and the image is sound.

use std::sync::Arc;

use img_core::{
    Error,
    format::{OpenMode, OptionSet, Repair},
    image::Image,
    storage::{
        MemoryStorage, Storage,
        testing::{CrashRecorder, FailAt, Operation},
    },
};
use img_tests::{
    memory, number_from_environment, proptest_config, read_all,
    scenario::{Layout, Model, Op, Plan, Qcow2, Scenario, apply, qcow2_layout, qed_layout, scenario},
};
use proptest::{prelude::*, test_runner::TestCaseError};

/// Power cuts tried after each failure.
const STATES: usize = 6;

#[test]
fn a_failed_operation_loses_nothing() {
    try_histories(qcow2_layout(), proptest_config(12, "failed"));
}

#[test]
fn a_failed_operation_loses_nothing_in_qed() {
    try_histories(qed_layout(), proptest_config(12, "failed_qed"));
}

fn try_histories(layouts: impl Strategy<Value = Layout>, config: ProptestConfig) {
    let seed = number_from_environment("IMG_TEST_SEED").unwrap_or(1);
    let small = scenario(layouts, 14, false).prop_map(in_small_clusters);
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let outcome = runner.run(&small, |scenario| {
        let plan = scenario.plan();
        let mut nth = 0;
        while History::fails_at(&scenario.layout, &plan, nth, seed)? {
            nth += 1;
        }
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

fn in_small_clusters(scenario: Scenario) -> Scenario {
    Scenario { layout: scenario.layout.in_small_clusters(), size: scenario.size % 64, ..scenario }
}

/// A history in which one operation of the host fails.
struct History<'a> {
    layout: &'a Layout,
    small_caches: bool,
    recorder: CrashRecorder,
    failing: Arc<FailAt>,
    /// What the disk read as, from creation on.
    versions: Vec<Model>,
    /// The last of them that was durable, by mark.
    durable: Vec<usize>,
}

impl<'a> History<'a> {
    /// Whether the `nth` operation of the host was reached, and so failed.
    fn fails_at(layout: &'a Layout, plan: &Plan, nth: u64, seed: u64) -> Result<bool, TestCaseError> {
        let fail = |error: Error| TestCaseError::fail(format!("before anything failed: {error}"));
        let recorder = CrashRecorder::new();
        let storage = recorder.record(Arc::new(MemoryStorage::new("failing.qcow2"))).map_err(fail)?;
        memory::create(&storage, layout, plan.size_bytes).map_err(fail)?;
        storage.flush(img_core::storage::Flush::All).map_err(fail)?;
        recorder.mark(0);
        let failing = Arc::new(FailAt::once(storage, |_| true, nth));
        let mut history = Self {
            layout,
            small_caches: nth % 2 == 1,
            recorder,
            failing,
            versions: vec![plan.models[0].clone()],
            durable: vec![0],
        };
        let result = history.run(plan).and_then(|()| history.judge(seed));
        result.map_err(|text| {
            TestCaseError::fail(format!("operation {nth} of the host failed; then {text}"))
        })?;
        Ok(history.failing.seen() > nth)
    }

    fn open(&self) -> Result<Image, String> {
        let options = if self.small_caches { self.layout.smallest_caches() } else { OptionSet::new() };
        let storage = || Arc::clone(&self.failing) as Arc<dyn Storage>;
        let open = || memory::open_with(storage(), OpenMode::Write, &options);
        // The failure may meet the opening.
        open().or_else(|_| open()).map_err(|error| format!("it does not open: {error}"))
    }

    fn run(&mut self, plan: &Plan) -> Result<(), String> {
        let mut image = self.open()?;
        let mut failed = false;
        for op in &plan.ops {
            let before = self.versions.last().expect("there is a first").clone();
            if failed && !is_still_possible(op, &before, self.layout) {
                continue;
            }
            let result = if *op == Op::Reopen {
                let closed = image.close();
                image = self.open()?;
                closed
            } else {
                apply(&image, op, self.layout)
            };
            let mut after = before;
            after.apply(op, self.layout, false);
            if let Err(error) = &result {
                if failed {
                    // An image that cannot tell how things stand may refuse to go on until it is opened again.
                    return match error {
                        Error::Halted { .. } => Ok(()),
                        _ => Err(format!("{op:?} fails too: {error}")),
                    };
                }
                failed = true;
                self.versions.push(after);
                // Who closes in vain and opens again finds what a crash leaves, without the power cut.
                let since = if *op == Op::Reopen { *self.durable.last().expect("first") } else { usize::MAX };
                let since = &self.versions[since.min(self.versions.len() - 2)..];
                let found = found(&image, since).map_err(|text| format!("{op:?}: {text}"))?;
                self.versions.push(found);
            } else {
                self.versions.push(after);
            }
            let lasts = result.is_ok() && matches!(op, Op::Flush | Op::Reopen);
            let last = if lasts { self.versions.len() - 1 } else { *self.durable.last().expect("first") };
            self.durable.push(last);
            self.recorder.mark(self.durable.len() as u64 - 1);
        }
        Ok(())
    }

    /// Power cuts anywhere, and the file as it was left at the end.
    fn judge(&self, seed: u64) -> Result<(), String> {
        for mut state in self.recorder.states(seed, STATES) {
            let Some(mark) = state.mark.and_then(|mark| usize::try_from(mark).ok()) else { continue };
            let since = &self.versions[self.durable[mark]..];
            let storage: Arc<dyn Storage> = Arc::new(state.files.remove(0));
            sound(&storage, self.layout)
                .and_then(|()| reads_as(&storage, since))
                .map_err(|text| format!("after a power cut behind operation {mark}: {text}"))?;
        }
        Ok(())
    }
}

/// Whether an operation that was planned for a disk makes sense for what a failure made of it.
fn is_still_possible(op: &Op, disk: &Model, layout: &Layout) -> bool {
    match op {
        Op::Write { at, len, .. } | Op::Zero { at, len, .. } | Op::Discard { at, len } => {
            at + len <= disk.guest.len() as u64
        }
        Op::SnapshotApply(name) => {
            // What the failure leaked counts as well.
            layout.refcount_bits().is_some_and(|bits| bits >= 8)
                && disk.snapshots.iter().any(|(known, _)| known == name)
        }
        Op::SnapshotDelete(name) => disk.snapshots.iter().any(|(known, _)| known == name),
        Op::Flush | Op::Reopen => true,
        // More snapshots than planned may be more than the counts can hold, or than a new size allows.
        Op::Compress { .. } | Op::SnapshotCreate(_) | Op::Resize(_) => false,
    }
}

/// What an image reads as after an operation that failed: each byte as in one of the versions.
fn found(image: &Image, since: &[Model]) -> Result<Model, String> {
    let guest = read_all(image).map_err(|error| format!("it does not read: {error}"))?;
    if since.iter().all(|model| model.guest.len() != guest.len()) {
        return Err(format!("its size is {}", guest.len()));
    }
    for (at, byte) in guest.iter().enumerate() {
        let known = |model: &Model| model.guest.get(at).copied().unwrap_or(0) == *byte;
        if !since.iter().any(known) {
            return Err(format!("byte {at:#x} is {byte:#x}"));
        }
    }
    let list = image.layers()[0].snapshots().map_or(Ok(Vec::new()), |snapshots| snapshots.list());
    let names: Vec<String> =
        list.map_err(|error| format!("no snapshots: {error}"))?.into_iter().map(|info| info.name).collect();
    let model = since
        .iter()
        .find(|model| model.snapshots.iter().map(|(name, _)| name).eq(names.iter()))
        .ok_or_else(|| format!("its snapshots are {names:?}"))?;
    Ok(Model { guest: Arc::new(guest), snapshots: model.snapshots.clone() })
}

/// Nothing but leaks, or a dirty bit and nothing but leaks once it was opened.
fn sound(storage: &Arc<dyn Storage>, layout: &Layout) -> Result<(), String> {
    for round in ["as it was left", "after opening a dirty image"] {
        let image = memory::open(Arc::clone(storage), OpenMode::Check { repair: false })
            .map_err(|error| format!("{round} it does not open: {error}"))?;
        if image.layers()[0].is_dirty() && round == "as it was left" {
            drop(image);
            let image = memory::open(Arc::clone(storage), OpenMode::Write)
                .map_err(|error| format!("dirty, and it does not open: {error}"))?;
            image.close().map_err(|error| format!("dirty, and it does not close: {error}"))?;
            continue;
        }
        let mut texts = Vec::new();
        let report = image
            .check(Repair::Nothing, &mut |finding| texts.push(finding.text))
            .map_err(|error| format!("{round} it cannot be checked: {error}"))?;
        // Version 2 has no dirty bit to warn of flags that do not fit the counts.
        let flags = |text: &String| text.starts_with("Leaked") || text.contains("OFLAG_COPIED");
        let excused = layout.is_version_2() && texts.iter().all(flags);
        if (report.corruptions, report.check_errors) != (0, 0) && !excused {
            return Err(format!("{round}: {report:?} {texts:#?}"));
        }
        return Ok(());
    }
    Err("opening for writing left the dirty bit".to_owned())
}

fn reads_as(storage: &Arc<dyn Storage>, since: &[Model]) -> Result<(), String> {
    let image = memory::open(Arc::clone(storage), OpenMode::Read).map_err(|error| error.to_string())?;
    let guest = read_all(&image).map_err(|error| format!("it does not read: {error}"))?;
    for (at, byte) in guest.iter().enumerate() {
        if !since.iter().any(|model| model.guest.get(at).copied().unwrap_or(0) == *byte) {
            return Err(format!("byte {at:#x} is {byte:#x}, which it never was since the last flush"));
        }
    }
    let Some(snapshots) = image.layers()[0].snapshots() else { return Ok(()) };
    for info in snapshots.list().map_err(|error| format!("no snapshots: {error}"))? {
        let taken = since.iter().flat_map(|model| &model.snapshots).find(|(name, _)| *name == info.name);
        let Some((_, then)) = taken else { return Err(format!("snapshot {} was never taken", info.name)) };
        let view = snapshots.view(&info.id).and_then(|layer| Image::from_layers(vec![layer]));
        let seen = view.and_then(|view| read_all(&view));
        let seen = seen.map_err(|error| format!("snapshot {} does not read: {error}", info.name))?;
        let shown = seen.len().min(then.len());
        if seen[..shown] != then[..shown] {
            return Err(format!("snapshot {} reads differently", info.name));
        }
    }
    Ok(())
}

fn layout(cluster_bits: u32) -> Layout {
    Layout::Qcow2(Qcow2 {
        version: 3,
        cluster_bits,
        refcount_bits: 16,
        extended_l2: false,
        zstd: false,
        lazy_refcounts: false,
    })
}

/// A host that cannot punch a hole once does not make the room be given out twice.
#[test]
fn room_whose_hole_failed_is_given_out_once() {
    let layout = layout(12);
    let cluster = layout.cluster_bytes();
    let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::new("packed.qcow2"));
    memory::create(&memory, &layout, 1 << 20).expect("created");
    let failing = Arc::new(FailAt::once(memory, |operation| operation == Operation::Punch, 0));
    let image = memory::open(failing.clone(), OpenMode::Write).expect("it opens");
    let write = |index: u64, byte: u8| {
        apply(&image, &Op::Write { at: index * cluster, len: cluster, byte }, &layout).expect("written");
    };
    let compress = |index: u64, byte: u8| {
        apply(&image, &Op::Compress { at: index * cluster, len: cluster, byte }, &layout).expect("written");
    };
    write(1, 1);
    compress(0, 2);
    image.flush().expect("flushed");
    image.discard(0..cluster).expect("discarded");
    assert!(image.flush().is_err(), "the hole fails");
    image.discard(cluster..2 * cluster).expect("discarded");
    image.flush().expect("flushed");
    write(2, 3);
    write(3, 4);
    compress(4, 5);
    compress(5, 6);
    let guest = read_all(&image).expect("it reads");
    for (index, byte) in [(0, 0), (1, 0), (2, 3), (3, 4), (4, 5), (5, 6)] {
        let at = usize::try_from(index * cluster).expect("small");
        assert!(guest[at..at + 4096].iter().all(|&found| found == byte), "cluster {index}");
    }
    image.close().expect("closed");
}

/// A cluster of an external data file that was discarded and written again before the flush keeps its bytes.
#[test]
fn a_cluster_discarded_and_written_again_keeps_its_bytes() {
    let data: Arc<dyn Storage> = Arc::new(MemoryStorage::new("data"));
    let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new("image.qcow2"));
    let layout = layout(16);
    memory::create_beside(&file, &layout, 1 << 20, Some(&data)).expect("created");
    let image = memory::open_beside(file, Some(&data), OpenMode::Write, &OptionSet::new()).expect("it opens");
    image.write_at(&[1; 3 << 16], 0).expect("written");
    image.flush().expect("flushed");
    image.discard(0..3 << 16).expect("discarded");
    image.write_at(&[2; 1 << 16], 1 << 16).expect("written");
    image.flush().expect("flushed");
    image.flush().expect("flushed");
    let guest = read_all(&image).expect("it reads");
    assert!(guest[..1 << 16].iter().all(|&byte| byte == 0), "the first cluster");
    assert!(guest[1 << 16..2 << 16].iter().all(|&byte| byte == 2), "the second cluster");
    let mut left = vec![9; 1 << 16];
    data.read_at(&mut left, 0).expect("readable");
    assert!(left.iter().all(|&byte| byte == 0), "its space was given back");
    image.close().expect("closed");
}
