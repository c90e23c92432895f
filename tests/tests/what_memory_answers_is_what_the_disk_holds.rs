//! Requests that are served from memory, by threads that must not wait, read and write the same disk as calls that
//! may block: whatever the history, and beside snapshots, other sizes, discards and flushes.

use std::sync::Arc;

use img_core::{
    Error, Result,
    format::{Attempt, OpenMode, OptionSet, Repair},
    image::Image,
    storage::{MemoryStorage, Storage},
};
use img_tests::{
    memory, proptest_config,
    queue::{Count, Queue},
    read_all,
    scenario::{Layout, Op, Qcow2, Scenario, apply, qcow2_layout, qed_layout, scenario},
};
use proptest::{
    prelude::{ProptestConfig, Strategy},
    test_runner::{TestCaseError, TestRunner},
};

const CLUSTER: u64 = 65_536;

fn layout() -> Layout {
    Layout::Qcow2(Qcow2 {
        version: 3,
        cluster_bits: 16,
        refcount_bits: 16,
        extended_l2: false,
        zstd: false,
        lazy_refcounts: false,
    })
}

fn new_image(layout: &Layout, size: u64) -> (Arc<dyn Storage>, Arc<Image>) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("plane.qcow2"));
    memory::create(&storage, layout, size).expect("created");
    let image = memory::open(Arc::clone(&storage), OpenMode::Write).expect("it opens");
    (storage, Arc::new(image))
}

fn close(image: Arc<Image>) -> Result<()> {
    Arc::try_unwrap(image).expect("nobody else holds it").close()
}

fn audit(storage: &Arc<dyn Storage>) {
    let image = memory::open(Arc::clone(storage), OpenMode::Check { repair: false }).expect("it opens");
    let mut texts = Vec::new();
    let report = image.check(Repair::Nothing, &mut |finding| texts.push(finding.text)).expect("checked");
    assert_eq!((report.corruptions, report.check_errors, report.leaks), (0, 0, 0), "{texts:#?}");
}

/// Once the first write has made tables, small writes to new clusters at the end of the file, whole clusters, writes
/// in place and reads all are answered from memory.
#[test]
fn what_is_warm_does_not_block() {
    let (storage, image) = new_image(&layout(), 64 << 20);
    image.write_at(&[1; 512], 0).expect("written");
    let mut queue = Queue::new(&image);
    let mut model = vec![0; 64 << 20];
    model[..512].fill(1);
    let mut write = |queue: &mut Queue, at: u64, len: usize, byte: u8| {
        queue.write(&vec![byte; len], at).expect("written");
        model[usize::try_from(at).unwrap()..][..len].fill(byte);
    };
    write(&mut queue, CLUSTER * 10 + 4096, 4096, 2); // a new cluster, in part
    write(&mut queue, CLUSTER * 10 + 8192, 4096, 3); // the same, in place
    write(&mut queue, CLUSTER * 20, 1 << 20, 4); // whole clusters
    write(&mut queue, CLUSTER * 19 + 100, 1 << 20, 5); // new in part, in place
    write(&mut queue, CLUSTER * 600, 300_000, 6); // in another slice of the table
    assert_eq!(queue.count, Count { done: 5, busy: 0, blocked: 0 });
    let mut guest = vec![0xff; 1 << 20];
    for at in (0..64 << 20).step_by(1 << 20) {
        queue.read(&mut guest, at).expect("read");
        let start = usize::try_from(at).unwrap();
        assert!(guest == model[start..start + (1 << 20)], "at {at:#x}");
    }
    assert_eq!(queue.count.blocked, 0, "reads");
    drop(queue);
    assert!(read_all(&image).expect("read") == model);
    close(image).expect("closed");
    audit(&storage);
    let image = memory::open(storage, OpenMode::Read).expect("it opens");
    assert!(read_all(&image).expect("read") == model);
}

/// A cluster between prepare and commit is busy for others; dropped, the write never happened and its place is free.
#[test]
fn a_write_that_is_dropped_never_happened() {
    let (storage, image) = new_image(&layout(), 1 << 20);
    image.write_at(&[1; 512], 0).expect("written");
    let (mut steps, mut others) = (Vec::new(), Vec::new());
    let Ok(Attempt::Done(ticket)) = image.try_prepare_write(CLUSTER..CLUSTER * 2, &mut steps) else {
        panic!("the tables are in memory");
    };
    let overlap = image.try_prepare_write(CLUSTER + 512..CLUSTER + 1024, &mut others);
    assert!(matches!(overlap, Ok(Attempt::Busy)), "{overlap:?}");
    let place = (steps[0].file, steps[0].at);
    drop(ticket);
    let Ok(Attempt::Done(ticket)) = image.try_prepare_write(CLUSTER * 3..CLUSTER * 4, &mut others) else {
        panic!("the tables are in memory");
    };
    assert_eq!((others[0].file, others[0].at), place, "free again");
    drop(ticket);
    assert!(read_all(&image).expect("read")[512..].iter().all(|byte| *byte == 0));
    close(image).expect("closed");
    audit(&storage);
}

/// What must not be answered from memory is not: writes that must be durable at once, and ranges outside the disk.
#[test]
fn what_is_wrong_is_said() {
    let (storage, image) = new_image(&layout(), 1 << 20);
    let (mut steps, mut extents) = (Vec::new(), Vec::new());
    for range in [(1 << 20) - 1..(1 << 20) + 1, u64::MAX - 1..u64::MAX] {
        assert!(matches!(image.try_map(range.clone(), &mut extents), Err(Error::Invalid(_))));
        assert!(matches!(image.try_prepare_write(range, &mut steps), Err(Error::Invalid(_))));
    }
    close(image).expect("closed");
    let image = Arc::new(memory::open(storage, OpenMode::Read).expect("it opens"));
    assert!(matches!(image.try_prepare_write(0..512, &mut steps), Err(Error::ReadOnly { .. })));
}

#[test]
fn whatever_the_history() {
    try_histories(qcow2_layout(), proptest_config(150, "plane"));
}

#[test]
fn whatever_the_history_of_qed() {
    try_histories(qed_layout(), proptest_config(50, "plane_qed"));
}

fn try_histories(layouts: impl Strategy<Value = Layout>, config: ProptestConfig) {
    let mut runner = TestRunner::new(config);
    let outcome = runner.run(&scenario(layouts, 24, false), |scenario| {
        try_history(&scenario).map_err(|error| TestCaseError::fail(error.to_string()))
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

/// Writes and reads through a queue, everything else through calls that may block.
fn try_history(scenario: &Scenario) -> Result<()> {
    let plan = scenario.plan();
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("plane.qcow2"));
    memory::create(&storage, &scenario.layout, plan.size_bytes)?;
    let options = if scenario.size % 2 == 1 { scenario.layout.smallest_caches() } else { OptionSet::new() };
    let open = || memory::open_with(Arc::clone(&storage), OpenMode::Write, &options).map(Arc::new);
    let mut image = open()?;
    for (op, model) in plan.ops.iter().zip(&plan.models[1..]) {
        match op {
            Op::Write { at, len, byte } => {
                Queue::new(&image).write(&vec![*byte; usize::try_from(*len).expect("small")], *at)?;
            }
            Op::Reopen => {
                close(image)?;
                image = open()?;
            }
            op => apply(&image, op, &scenario.layout)?,
        }
        let mut guest = vec![0; model.guest.len()];
        Queue::new(&image).read(&mut guest, 0)?;
        if guest != *model.guest {
            let at = guest.iter().zip(&*model.guest).position(|(found, expected)| found != expected);
            return Err(Error::Invalid(format!("after {op:?} byte {at:x?} is wrong")));
        }
    }
    close(image)?;
    audit(&storage);
    Ok(())
}
