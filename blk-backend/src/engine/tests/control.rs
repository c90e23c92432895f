//! What happens around requests: pause, reset, waking, watching, changes of the whole disk.

use std::{
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use img_core::{
    format::{OpenContext, OpenMode, OptionSet, registry},
    image::Image,
    storage::{
        MemoryStorage, Storage,
        testing::{Gated, Operation},
    },
};
use rustix::event::{EventfdFlags, eventfd};

use super::client::{Client, engines, fresh_disk, image};
use crate::{
    disk::{Disk, DiskOptions},
    engine::{EngineChoice, Event, LaneOptions, Poll, Wait},
    request::Op,
};

const MIB: u64 = 1 << 20;

/// A qcow2 disk in memory whose operations can be stopped.
fn gated_disk() -> (Arc<Gated>, Arc<Disk>) {
    let driver = registry::by_name("qcow2").expect("a known format");
    let gated = Arc::new(Gated::new(Arc::new(MemoryStorage::new("disk"))));
    let storage: Arc<dyn Storage> = Arc::<Gated>::clone(&gated);
    let open_file = |_: &str, _: OpenMode| unreachable!("one file");
    let request = img_core::format::CreateRequest {
        virtual_size_bytes: 8 * MIB,
        backing: None,
        options: &OptionSet::new(),
        open_file: &open_file,
    };
    driver.create(&storage, &request).expect("a fresh image");
    let context = OpenContext { mode: OpenMode::Write, options: &OptionSet::new(), open_file: &open_file };
    let layer = driver.open(storage, &context).expect("it was just made");
    let image = Image::from_layers(vec![layer]).expect("one layer");
    (gated, Disk::over(image, &DiskOptions::default()))
}

#[test]
fn overlapping_allocations_wait_as_values_and_go_in_order() {
    for engine in engines() {
        let (gated, disk) = gated_disk();
        let (mut one, mut other) = (Client::new(&disk, engine), Client::new(&disk, engine));
        let gate = gated.close(|request| {
            request.operation == Operation::Write
                && request.range_bytes.end - request.range_bytes.start >= 4096
        });
        let first = one.submit_write(0, &[1; 4096]);
        gate.wait_until_reached();
        let second = other.submit_write(2048, &[2; 2048]);
        let third = one.submit_write(4096, &[3; 4096]);
        let elsewhere = other.submit_write(MIB, &[4; 4096]);
        assert_eq!(other.wait(elsewhere).0, Ok(()));
        assert_eq!(disk.stats().parked, 2);
        gate.open();
        assert_eq!(one.wait(first).0, Ok(()));
        assert_eq!(other.wait(second).0, Ok(()));
        assert_eq!(one.wait(third).0, Ok(()));
        let expected = [vec![1; 2048], vec![2; 2048], vec![3; 4096]].concat();
        assert_eq!(one.read(0, 8192), Ok(expected));
    }
}

/// What is answered in the call is waited for, too, and does not tell how soon somebody comes with more.
#[test]
fn requests_that_are_answered_at_once_are_no_reason_to_poll() {
    let Some(dir) = tempfile::tempdir_in("/dev/shm").ok().filter(|_| engines().contains(&EngineChoice::Ring))
    else {
        return;
    };
    let name = image(dir.path(), "disk", "raw", &[], MIB, None);
    let disk = Disk::open(&name, &DiskOptions::default()).expect("it was just made");
    let options = LaneOptions { depth: 16, poll: Poll::ADAPTIVE, engine: EngineChoice::Ring };
    let mut client = Client::with(&disk, &options);
    for _ in 0..4 {
        client.read(0, 4096).expect("read");
        assert_eq!(client.lane.poller.span(), Duration::ZERO);
    }
}

#[test]
fn a_paused_disk_holds_requests_back_and_loses_none() {
    for engine in engines() {
        let (_dir, disk) = fresh_disk("qcow2", MIB);
        let mut client = Client::new(&disk, engine);
        disk.pause();
        let tags: Vec<_> =
            (0..8u8).map(|at| client.submit_write(u64::from(at) * 4096, &[at + 1; 4096])).collect();
        client.run(Wait::No);
        assert!(!client.is_idle());
        assert_eq!(disk.image().virtual_size_bytes(), MIB);
        let resumed = thread::scope(|scope| {
            scope.spawn(|| disk.resume());
            tags.into_iter().all(|tag| client.wait(tag).0.is_ok())
        });
        assert!(resumed);
        assert_eq!(client.read(7 * 4096, 4096), Ok(vec![8; 4096]));
    }
}

#[test]
fn a_pause_waits_for_what_is_under_way() {
    for engine in engines() {
        let (gated, disk) = gated_disk();
        let mut client = Client::new(&disk, engine);
        let gate = gated.close(|request| request.operation == Operation::Write);
        let tag = client.submit_write(0, &[1; 65536]);
        gate.wait_until_reached();
        let order = AtomicU64::new(0);
        thread::scope(|scope| {
            let paused = scope.spawn(|| {
                disk.pause();
                order.fetch_add(1, Ordering::SeqCst)
            });
            gate.open();
            // The lane is not run yet: the request has not ended, whatever the worker did.
            assert_eq!(order.fetch_add(1, Ordering::SeqCst), 0);
            assert_eq!(client.wait(tag).0, Ok(()));
            assert_eq!(paused.join().expect("no panic"), 1);
        });
        disk.resume();
    }
}

#[test]
fn a_reset_lane_forgets_its_requests_and_goes_on() {
    for engine in engines() {
        let (gated, disk) = gated_disk();
        let (mut one, mut other) = (Client::new(&disk, engine), Client::new(&disk, engine));
        let gate = gated.close(|request| request.operation == Operation::Write);
        let kept = one.submit_write(0, &[1; 65536]);
        gate.wait_until_reached();
        other.submit_write(0, &[2; 65536]);
        other.submit_write(0, &[3; 65536]);
        other.reset();
        assert_eq!(other.lane.depth(), 0);
        gate.open();
        assert_eq!(one.wait(kept).0, Ok(()));
        assert_eq!(other.read(0, 65536), Ok(vec![1; 65536]), "what was parked has not happened");
    }
}

#[test]
fn a_lane_is_woken_and_watches_descriptors() {
    for engine in engines() {
        let (_dir, disk) = fresh_disk("raw", MIB);
        let mut client = Client::new(&disk, engine);
        let waker = client.lane.waker();
        thread::scope(|scope| {
            scope.spawn(|| waker.wake());
            while client.others.is_empty() {
                client.run(Wait::Event);
            }
        });
        assert_eq!(client.others, [Event::Woken]);
        client.others.clear();

        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        client.lane.watch(kick.as_fd(), 5).expect("watched");
        for _ in 0..3 {
            // Never read: every write is told.
            rustix::io::write(&kick, &1u64.to_ne_bytes()).expect("written");
            while client.others.is_empty() {
                client.run(Wait::Event);
            }
            assert_eq!(client.others, [Event::Ready { token: 5 }]);
            client.others.clear();
        }
        client.lane.unwatch(kick.as_fd()).expect("was watched");
        rustix::io::write(&kick, &1u64.to_ne_bytes()).expect("written");
        client.run(Wait::Until(Instant::now()));
        assert_eq!(client.others, []);
    }
}

#[test]
fn size_and_snapshots_change_under_load_and_observers_are_told() {
    for engine in engines() {
        let (_dir, disk) = fresh_disk("qcow2", MIB);
        let told = Arc::new(AtomicU64::new(0));
        let teller = Arc::clone(&told);
        let _watch = disk.observe(move |event| {
            let crate::disk::DiskEvent::Resized { size_bytes } = event;
            teller.store(size_bytes, Ordering::SeqCst);
        });
        thread::scope(|scope| {
            let changes = scope.spawn(|| {
                disk.snapshot_create("before", (1, 0))?;
                disk.resize(2 * MIB)?;
                disk.snapshot_create("after", (2, 0))?;
                disk.snapshot_delete("before")
            });
            let mut client = Client::new(&disk, engine);
            let mut round = 0u8;
            while !changes.is_finished() {
                round = round.wrapping_add(1);
                let tags: Vec<_> =
                    (0..8).map(|at| client.submit_write(at * 65536, &[round; 65536])).collect();
                for tag in tags {
                    assert_eq!(client.wait(tag).0, Ok(()));
                }
            }
            assert_eq!(changes.join().expect("no panic").map_err(|error| error.to_string()), Ok(()));
            assert_eq!(told.load(Ordering::SeqCst), 2 * MIB);
            assert_eq!(client.write(2 * MIB - 512, &[5; 512]), Ok(()));
            assert_eq!(client.change(Op::Flush, 0, 0), Ok(()));
        });
        disk.close().expect("it closes");
        let report =
            disk.image().check(img_core::format::Repair::Nothing, &mut |finding| panic!("{finding:?}"));
        let report = report.expect("it can be checked");
        assert_eq!((report.corruptions, report.leaks), (0, 0));
    }
}

#[test]
fn a_disk_knows_its_lanes_and_what_they_spend() {
    for engine in engines() {
        let (_dir, disk) = fresh_disk("raw", MIB);
        let before = disk.lanes_cpu();
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut client = Client::new(&disk, engine);
                for _ in 0..50 {
                    assert_eq!(client.read(0, 65536), Ok(vec![0; 65536]));
                }
                let [lane] = &disk.lane_reports()[..] else { panic!("one lane") };
                let in_use = client.lane.engine();
                assert_eq!((lane.number, &lane.engine), (0, in_use));
                assert!(lane.cpu > before, "{lane:?}");
            });
        });
        assert_eq!(disk.lane_reports(), [], "the lane is gone");
        let spent = disk.lanes_cpu();
        assert!(spent > before);
        let client = Client::new(&disk, engine);
        assert_eq!(disk.lane_reports()[0].number, 1);
        drop(client);
        assert!(disk.lanes_cpu() >= spent, "what was spent stays");
    }
}

#[test]
fn a_lane_that_polls_finds_work_before_it_sleeps() {
    for engine in engines() {
        let (_dir, disk) = fresh_disk("raw", MIB);
        let long = Poll::For(Duration::from_secs(60));
        let mut client = Client::with(&disk, &LaneOptions { depth: 16, poll: long, engine });
        let waker = client.lane.waker();
        thread::scope(|scope| {
            // It polls by now, or will: either way it does not sleep.
            scope.spawn(|| waker.wake());
            while client.others.is_empty() {
                client.run(Wait::Event);
            }
        });
        assert_eq!((client.others.as_slice(), disk.stats().sleeps), (&[Event::Woken][..], 0));
    }
}

/// One that is there already and stands for itself would take the disk away from its guest.
#[test]
fn an_existing_overlay_lets_the_disk_show() {
    let (dir, disk) = fresh_disk("qcow2", MIB);
    let mut client = Client::new(&disk, EngineChoice::Threads);
    assert_eq!(client.write(4096, &[7; 4096]), Ok(()));
    let dynamic: &[_] = &[("subformat", "dynamic"), ("force_size", "on")];
    let flat: &[_] = &[("subformat", "monolithicFlat")];
    let sparse: &[_] = &[("subformat", "monolithicSparse")];
    let hiding = [("raw", &[][..]), ("vpc", dynamic), ("vmdk", flat)].map(|kind| (kind, false));
    let others = [("vmdk", sparse), ("qed", &[]), ("qcow2", &[])].map(|kind| (kind, true));
    for (number, ((format, options), is_taken)) in hiding.into_iter().chain(others).enumerate() {
        let name = image(dir.path(), &format!("overlay{number}"), format, options, MIB, None);
        let result = disk.snapshot_external(&name, format, true);
        assert_eq!(result.is_ok(), is_taken, "{format} {options:?}: {result:?}");
        assert_eq!(client.read(4096, 4096), Ok(vec![7; 4096]), "{format} {options:?}");
    }
}
