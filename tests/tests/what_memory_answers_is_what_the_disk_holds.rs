//! Requests that are served from memory, by threads that must not wait, read and write the same disk as calls that
//! may block: whatever the history, and beside snapshots, other sizes, discards and flushes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Wake, Waker},
};

use img_core::{
    Error, Result,
    format::{Attempt, OpenMode, OptionSet, Repair},
    image::{Commit, Image},
    storage::{MemoryStorage, Preallocation, Storage},
};
use img_tests::{
    memory,
    pattern::Random,
    proptest_config,
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
    assert_eq!(queue.count, Count { done: 5, busy: 0, blocked: 0, tables: 0 });
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

/// What a ticket's answer named is given to nobody else while the ticket lives.
#[test]
fn a_ticket_keeps_what_its_answer_named() {
    let (storage, image) = new_image(&layout(), 1 << 20);
    image.write_at(&[1; 65_536], 0).expect("written");
    image.flush().expect("flushed");
    let place = |guest: u64| {
        let mut extents = Vec::new();
        image.map_range(guest..guest + 1, &mut extents).expect("mapped");
        extents[0].place
    };
    let mut extents = Vec::new();
    let Ok(Attempt::Done(ticket)) = image.try_map(0..512, &mut extents) else { panic!("it is in memory") };
    let held = extents[0].place;
    image.discard(0..CLUSTER).expect("discarded");
    image.flush().expect("flushed");
    image.write_at(&[2; 65_536], CLUSTER).expect("written");
    assert_ne!(place(CLUSTER), held, "given out while a reader may still be at it");
    drop(ticket);
    image.flush().expect("flushed");
    image.write_at(&[3; 65_536], CLUSTER * 2).expect("written");
    assert_eq!(place(CLUSTER * 2), held, "free again");
    close(image).expect("closed");
    audit(&storage);
}

/// A piece of a table that is changed, written and dropped to make room between its reading and its offer: what is
/// offered is old, and hides no write.
#[test]
fn a_table_that_is_offered_late_hides_no_write() {
    const SPAN: u64 = 64 * 512;
    const TABLES: u64 = 64;
    let Layout::Qcow2(shape) = layout() else { unreachable!("see above") };
    let layout = Layout::Qcow2(Qcow2 { cluster_bits: 9, ..shape });
    let (storage, image) = new_image(&layout, TABLES * SPAN);
    for table in 0..TABLES {
        image.write_at(&[1; 512], table * SPAN + 512).expect("written");
    }
    close(image).expect("closed");
    let options = layout.smallest_caches();
    let open = memory::open_with(Arc::clone(&storage), OpenMode::Write, &options);
    let image = Arc::new(open.expect("it opens"));
    let missing = || {
        let ticket = image.missing_table(0..512).expect("it is not in memory");
        let mut bytes = vec![0; 512].into_boxed_slice();
        storage.read_at(&mut bytes, ticket.at().0).expect("read");
        (ticket, bytes)
    };
    let (ticket, l1) = missing();
    assert!(ticket.offer(l1), "nothing has become of it");
    let (ticket, l2) = missing();
    image.write_at(&[2; 512], 0).expect("written");
    image.flush().expect("flushed");
    for table in 1..TABLES {
        image.read_at(&mut [0; 512], table * SPAN + 512).expect("read");
    }
    let (_, new) = missing();
    assert_ne!(new, l2);
    assert!(!ticket.offer(l2));
    let mut guest = [0; 512];
    Queue::new(&image).read(&mut guest, 0).expect("read");
    assert_eq!(guest, [2; 512]);
    close(image).expect("closed");
    audit(&storage);
}

/// Whoever wants the image alone waits for tickets; others are told that it is busy meanwhile, and woken afterwards.
#[test]
fn a_change_of_the_whole_waits_for_tickets() {
    struct Woken(AtomicBool);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let (storage, image) = new_image(&layout(), 1 << 20);
    image.write_at(&[1; 512], 0).expect("written");
    let (mut steps, mut extents) = (Vec::new(), Vec::new());
    let Ok(Attempt::Done(ticket)) = image.try_prepare_write(CLUSTER..CLUSTER * 2, &mut steps) else {
        panic!("the tables are in memory");
    };
    let woken = Arc::new(Woken(AtomicBool::new(false)));
    std::thread::scope(|scope| {
        let snapshot = scope.spawn(|| image.snapshot_create("s", (1, 0)));
        // Until the thread has come so far.
        while !matches!(image.try_map(0..512, &mut extents), Ok(Attempt::Busy)) {
            std::thread::yield_now();
        }
        image.wake_on_progress(&Waker::from(Arc::clone(&woken)));
        assert!(matches!(image.try_prepare_write(0..512, &mut Vec::new()), Ok(Attempt::Busy)));
        assert!(!snapshot.is_finished(), "a write is under way");
        let host = image.storage(0, steps[0].file).expect("it is open");
        host.write_at(&[7; 65_536], steps[0].at.0).expect("written");
        assert!(matches!(ticket.try_commit(), Commit::Done));
        snapshot.join().expect("no panic").expect("taken");
    });
    assert!(woken.0.load(Ordering::SeqCst));
    let view = image.layers()[0].snapshots().expect("it has some").view("s").expect("it is there");
    let view = Arc::new(Image::from_layers(vec![view]).expect("a disk"));
    let mut guest = vec![0; 65_536];
    Queue::new(&view).read(&mut guest, CLUSTER).expect("read");
    assert!(guest.iter().all(|byte| *byte == 7), "the snapshot has the write that it waited for");
    drop(view);
    close(image).expect("closed");
    audit(&storage);
}

/// Queues on threads of their own, in clusters and tables that they share, beside flushes, snapshots and other sizes.
#[test]
fn queues_do_not_disturb_each_other() {
    const THREADS: u64 = 4;
    const STRIPES: u64 = 48;
    for (cluster_bits, extended_l2, lazy_refcounts) in
        [(9, false, false), (12, false, true), (14, true, false), (16, false, false)]
    {
        let layout = Layout::Qcow2(Qcow2 {
            version: 3,
            cluster_bits,
            refcount_bits: 16,
            extended_l2,
            zstd: false,
            lazy_refcounts,
        });
        let cluster = layout.cluster_bytes();
        // Stripes smaller than a cluster first, where neighbours meet in clusters; then stripes of whole ones.
        let small = cluster * 3 / 8;
        let second_half = (small * THREADS * STRIPES).next_multiple_of(cluster);
        let stripe = move |thread: u64, index: u64| {
            let (half, index) = (index / STRIPES, index % STRIPES);
            let number = index * THREADS + thread;
            if half == 0 { (number * small, small) } else { (second_half + number * cluster, cluster) }
        };
        let size = second_half + THREADS * STRIPES * cluster;
        let (storage, image) = new_image(&layout, size);
        let ended = AtomicU64::new(0);
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let (image, ended) = (&image, &ended);
            let history = move |thread: u64| {
                let mut random = Random::new(thread + 1);
                let mut queue = Queue::new(image);
                let mut model = vec![0_u8; usize::try_from(STRIPES * 2).expect("small")];
                let mut guest = Vec::new();
                for round in 0..300_u64 {
                    let index = random.below(STRIPES * 2);
                    let (at, len) = stripe(thread, index);
                    let mut byte = u8::try_from(round % 255 + 1).expect("a byte");
                    let bytes = vec![byte; usize::try_from(len).expect("small")];
                    match random.below(10) {
                        0 if index >= STRIPES => {
                            image.discard(at..at + len).expect("discarded");
                            byte = 0;
                        }
                        1 => {
                            image.write_zeroes(at..at + len, round % 2 == 0).expect("zeroed");
                            byte = 0;
                        }
                        2 => image.write_at(&bytes, at).expect("written"),
                        _ => queue.write(&bytes, at).expect("written"),
                    }
                    model[usize::try_from(index).expect("small")] = byte;
                    let index = if round % 2 == 0 { index } else { random.below(STRIPES * 2) };
                    let (at, len) = stripe(thread, index);
                    guest.resize(usize::try_from(len).expect("small"), 0);
                    queue.read(&mut guest, at).expect("read");
                    let expected = model[usize::try_from(index).expect("small")];
                    let wrong = guest.iter().position(|found| *found != expected);
                    assert_eq!(wrong, None, "{layout:?}: stripe {index} of {thread} is not {expected}");
                }
                ended.fetch_add(1, Ordering::SeqCst);
                model
            };
            let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || history(thread))).collect();
            let mut round = 0;
            while ended.load(Ordering::SeqCst) < THREADS && !threads.iter().any(|thread| thread.is_finished())
            {
                image.flush().expect("flushed");
                image.snapshot_create("s", (round, 0)).expect("taken");
                image.flush().expect("flushed");
                image.resize(size + u64::from(round % 3 + 1) * cluster, Preallocation::Off).expect("grown");
                image.snapshot_delete("s").expect("forgotten");
                image.resize(size, Preallocation::Off).expect("shrunk");
                round += 1;
            }
            threads.into_iter().map(|thread| thread.join().expect("it ends")).collect()
        });
        let guest = read_all(&image).expect("read");
        for (thread, model) in (0..).zip(&models) {
            for (index, byte) in (0..).zip(model) {
                let (at, len) = stripe(thread, index);
                let found = &guest[usize::try_from(at).unwrap()..][..usize::try_from(len).unwrap()];
                assert!(found.iter().all(|found| found == byte), "{layout:?}: stripe {index} of {thread}");
            }
        }
        close(image).expect("closed");
        audit(&storage);
    }
}
