//! Lanes, workers and those who wake them, in schedules that are chosen: at each lock and each atomic of what they hand
//! to each other another one may go on. A wake-up that is lost is a deadlock, which the explorer tells; a request is
//! ended once, no two changes that touch each other are under way, and none is while the disk is paused.
//!
//! These are the sources of `blk-backend`, with locks of the explorer and a bell that is one of its condition
//! variables. The lane is a loop of the same steps as `blk-backend`'s.
//!
//! Schedules are drawn as in the tests of images: half of them at random, half mostly in order with few preemptions.
//! `IMG_TEST_CASES` says how many are tried, and `IMG_TEST_SEED` which.

use std::{collections::VecDeque, ops::Range, sync::Arc, task::Waker};

use shuttle::{
    Config, Runner,
    scheduler::{PctScheduler, RandomScheduler},
    sync::mpsc::{Receiver, Sender, channel},
    thread,
};

use self::{
    flight::Flight,
    mailbox::{Content, Finished, LaneWaker, Mailbox},
    pause::Pauses,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

#[path = "../../../blk-backend/src/engine/flight.rs"]
mod flight;
#[allow(dead_code, unreachable_pub, reason = "some of it is for the disk, and for other crates")]
#[path = "../../../blk-backend/src/engine/mailbox.rs"]
mod mailbox;
#[path = "../../../blk-backend/src/engine/pause.rs"]
mod pause;

/// In place of `blk-backend/src/sync.rs`.
mod sync {
    pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard, atomic};
}

/// In place of an eventfd that a ring or an epoll instance watches: each ring of it ends one sleep, now or later.
mod bell {
    use rustix::io::Errno;
    use shuttle::sync::{Condvar, Mutex};

    #[derive(Debug, Default)]
    pub(crate) struct Bell {
        rung: Mutex<bool>,
        changed: Condvar,
    }

    impl Bell {
        pub(crate) fn new() -> Result<Self, Errno> {
            Ok(Self::default())
        }

        pub(crate) fn ring(&self) {
            *self.rung.lock().expect("no panic") = true;
            self.changed.notify_one();
        }

        pub(crate) fn wait(&self) {
            let mut rung = self.rung.lock().expect("no panic");
            while !std::mem::take(&mut *rung) {
                rung = self.changed.wait(rung).expect("no panic");
            }
        }
    }
}

/// The memory of a request: nobody moves bytes here.
mod memory {
    #[derive(Debug, Default)]
    pub(crate) struct Runs;
}

/// Nobody counts.
mod stats {
    #[derive(Debug, Default)]
    pub(crate) struct LaneStats {
        _nothing: (),
    }
    #[derive(Debug)]
    pub(crate) struct LaneSnapshot;

    impl LaneStats {
        pub(crate) fn snapshot(&self) -> LaneSnapshot {
            LaneSnapshot
        }
    }
}

/// Preemptions of a schedule that is mostly in order.
const PREEMPTIONS: usize = 3;
const CLUSTERS: usize = 4;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Runs `test` in so many schedules of each kind.
fn explore(schedules: u64, test: fn()) {
    let schedules = usize::try_from(number("IMG_TEST_CASES", schedules)).expect("a number of schedules");
    let seed = number("IMG_TEST_SEED", 1);
    Runner::new(RandomScheduler::new_from_seed(seed, schedules), Config::new()).run(test);
    Runner::new(PctScheduler::new_from_seed(seed, PREEMPTIONS, schedules), Config::new()).run(test);
}

/// What lanes share.
#[derive(Default)]
struct World {
    flight: Flight,
    pauses: Pauses,
    lanes: Mutex<Vec<Arc<Mailbox>>>,
    /// Who changes a cluster.
    clusters: [Mutex<bool>; CLUSTERS],
}

impl World {
    /// Changes clusters, which are nobody else's meanwhile.
    fn change(&self, range: &Range<u64>) {
        let part = || range.clone().map(|at| &self.clusters[usize::try_from(at).expect("small")]);
        for cluster in part() {
            assert!(!std::mem::replace(&mut *cluster.lock().expect("no panic"), true), "two changes meet");
        }
        thread::yield_now();
        for cluster in part() {
            *cluster.lock().expect("no panic") = false;
        }
    }
}

/// As [`Disk`](blk_backend::disk::Disk) does it.
impl World {
    fn pause(&self) {
        let lanes = || self.lanes.lock().expect("no panic");
        self.pauses.begin(|| lanes().iter().any(|lane| lane.is_active()));
    }

    fn resume(&self) {
        if self.pauses.end() {
            self.lanes.lock().expect("no panic").iter().for_each(|lane| lane.ring());
        }
    }

    /// Nobody changes anything, however long one looks.
    fn assert_quiet(&self) {
        for cluster in self.clusters.iter().chain(&self.clusters) {
            assert!(!*cluster.lock().expect("no panic"), "a change is under way in a pause");
        }
        let mailbox = Arc::new(Mailbox::new().expect("a bell"));
        assert!(self.flight.enter(0..u64::MAX, &mailbox, 0), "a change is under way in a pause");
        self.flight.leave(&mailbox, 0);
    }
}

/// A change for a worker.
struct Job {
    owner: Arc<Mailbox>,
    slot: u32,
    range: Range<u64>,
}

/// The life of a worker.
fn work(world: &World, jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().expect("no panic").recv();
        let Ok(Job { owner, slot, range }) = job else { return };
        world.change(&range);
        world.flight.leave(&owner, slot);
        owner.finish(Finished { slot, result: Ok(()), runs: memory::Runs });
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The disk is paused.
    Held,
    Parked,
    /// A worker has it.
    Working,
    /// The lane moves its bytes.
    Moving,
    Ended,
    /// Taken back before it began.
    Forgotten,
}

struct Lane {
    world: Arc<World>,
    mailbox: Arc<Mailbox>,
    jobs: Sender<Job>,
    requests: Vec<(Range<u64>, Stage)>,
    held: VecDeque<u32>,
    under_way: usize,
    moving: VecDeque<u32>,
    content: Content,
}

impl Lane {
    fn new(world: &Arc<World>, jobs: &Sender<Job>) -> Self {
        let mailbox = Arc::new(Mailbox::new().expect("a bell"));
        world.lanes.lock().expect("no panic").push(Arc::clone(&mailbox));
        Self {
            world: Arc::clone(world),
            mailbox,
            jobs: jobs.clone(),
            requests: Vec::new(),
            held: VecDeque::new(),
            under_way: 0,
            moving: VecDeque::new(),
            content: Content::default(),
        }
    }

    fn submit(&mut self, range: Range<u64>) {
        let slot = u32::try_from(self.requests.len()).expect("few");
        self.requests.push((range, Stage::Held));
        if self.held.is_empty() && self.admit() {
            self.enter(slot);
        } else {
            self.held.push_back(slot);
        }
    }

    /// As [`Lane::admit`](blk_backend::engine::Lane).
    fn admit(&mut self) -> bool {
        let pauses = &self.world.pauses;
        let is_admitted = if self.under_way > 0 { !pauses.is_any() } else { pauses.admit(&self.mailbox) };
        self.under_way += usize::from(is_admitted);
        is_admitted
    }

    fn leave(&mut self) {
        self.under_way -= 1;
        if self.under_way == 0 {
            self.world.pauses.leave(&self.mailbox);
        }
    }

    fn enter(&mut self, slot: u32) {
        let (range, stage) = &mut self.requests[slot as usize];
        *stage = Stage::Parked;
        if self.world.flight.enter(range.clone(), &self.mailbox, slot) {
            self.begin(slot);
        }
    }

    /// Every other request is moved by the lane itself.
    fn begin(&mut self, slot: u32) {
        let (range, stage) = &mut self.requests[slot as usize];
        assert_eq!(*stage, Stage::Parked, "begun once");
        if slot.is_multiple_of(2) {
            *stage = Stage::Working;
            let job = Job { owner: Arc::clone(&self.mailbox), slot, range: range.clone() };
            self.jobs.send(job).expect("workers live longer");
        } else {
            *stage = Stage::Moving;
            self.moving.push_back(slot);
        }
    }

    fn end(&mut self, slot: u32, was: Stage) {
        let stage = &mut self.requests[slot as usize].1;
        assert_eq!(*stage, was, "ended once, and after it has begun");
        *stage = Stage::Ended;
        if was == Stage::Moving {
            self.world.flight.leave(&self.mailbox, slot);
        }
        self.leave();
    }

    fn is_busy(&self) -> bool {
        self.requests.iter().any(|(_, stage)| !matches!(stage, Stage::Ended | Stage::Forgotten))
    }

    /// Takes what others left. Whether there was something.
    fn look_around(&mut self) -> bool {
        let mut content = std::mem::take(&mut self.content);
        let took = self.mailbox.take(&mut content);
        for Finished { slot, result, runs: memory::Runs } in content.finished.drain(..) {
            assert_eq!(result, Ok(()));
            self.end(slot, Stage::Working);
        }
        content.released.drain(..).for_each(|slot| self.begin(slot));
        self.content = content;
        while !self.held.is_empty() && self.admit() {
            let slot = self.held.pop_front().expect("it is not empty");
            self.enter(slot);
        }
        took
    }

    fn run_once(&mut self) {
        let took = self.look_around();
        if let Some(slot) = self.moving.pop_front() {
            self.world.change(&self.requests[slot as usize].0);
            self.end(slot, Stage::Moving);
        } else if !took {
            self.sleep();
        }
    }

    fn sleep(&self) {
        if self.mailbox.fall_asleep() {
            self.mailbox.bell().wait();
            self.mailbox.awake();
        }
    }

    fn run_until_idle(&mut self) {
        while self.is_busy() {
            self.run_once();
        }
    }

    /// Gives up what has not begun.
    fn reset(&mut self) {
        for slot in std::mem::take(&mut self.held) {
            self.requests[slot as usize].1 = Stage::Forgotten;
        }
        for slot in 0..self.requests.len() {
            let number = u32::try_from(slot).expect("few");
            if self.requests[slot].1 == Stage::Parked && self.world.flight.forget(&self.mailbox, number) {
                self.requests[slot].1 = Stage::Forgotten;
                self.leave();
            }
        }
        self.run_until_idle();
    }
}

/// Lanes on threads of their own, and workers; `lives` is what the lanes do.
fn with_lanes(lives: Vec<fn(&mut Lane)>) {
    with_lanes_and(lives, |_| {});
}

/// The same, while somebody does something with all of them.
fn with_lanes_and(lives: Vec<fn(&mut Lane)>, meanwhile: fn(&World)) {
    let world: Arc<World> = Arc::default();
    let (jobs, queue) = channel();
    let queue = Arc::new(Mutex::new(queue));
    let workers: Vec<_> = (0..2)
        .map(|_| {
            let (world, queue) = (Arc::clone(&world), Arc::clone(&queue));
            thread::spawn(move || work(&world, &queue))
        })
        .collect();
    let lanes: Vec<_> = lives
        .into_iter()
        .map(|life| {
            let (world, jobs) = (Arc::clone(&world), jobs.clone());
            thread::spawn(move || life(&mut Lane::new(&world, &jobs)))
        })
        .collect();
    drop(jobs);
    meanwhile(&world);
    lanes.into_iter().chain(workers).for_each(|thread| thread.join().expect("it ends"));
    let mailbox = Arc::new(Mailbox::new().expect("a bell"));
    assert!(world.flight.enter(0..u64::MAX, &mailbox, 0), "nothing is left behind");
}

/// Changes that meet, within a lane and between two: each is ended once, and its lane hears of it.
#[test]
fn every_change_has_its_turn_alone() {
    explore(3_000, || {
        with_lanes(vec![
            |lane| {
                for range in [0..2, 1..3, 0..1, 2..4] {
                    lane.submit(range);
                }
                lane.run_until_idle();
            },
            |lane| {
                for range in [1..2, 0..4, 3..4] {
                    lane.submit(range);
                }
                lane.run_until_idle();
            },
        ]);
    });
}

/// A lane gives up its parked changes while others let them in: each of them is taken back or has begun, never both,
/// and whoever stood behind it goes on.
#[test]
fn a_change_is_taken_back_or_has_begun() {
    explore(3_000, || {
        with_lanes(vec![
            |lane| {
                for range in [0..2, 0..4, 2..3, 3..4] {
                    lane.submit(range);
                }
                lane.reset();
                lane.submit(1..3);
                lane.run_until_idle();
            },
            |lane| {
                for range in [1..4, 0..1, 2..4] {
                    lane.submit(range);
                    lane.run_once_if_begun();
                }
                lane.run_until_idle();
            },
        ]);
    });
}

/// Two pause the disk, the one over the other's pause too: nothing is under way then, all that was held back goes on
/// afterwards, and a lane that gives its requests up does not hold the pause up.
#[test]
fn nothing_is_under_way_in_a_pause() {
    explore(3_000, || {
        let lives: Vec<fn(&mut Lane)> = vec![
            |lane| {
                for range in [0..2, 1..3, 3..4] {
                    lane.submit(range);
                }
                lane.run_until_idle();
                lane.submit(0..4);
                lane.run_until_idle();
            },
            |lane| {
                for range in [1..2, 0..4] {
                    lane.submit(range);
                }
                lane.reset();
                lane.submit(2..4);
                lane.run_until_idle();
            },
        ];
        with_lanes_and(lives, |world| {
            for _ in 0..2 {
                world.pause();
                world.assert_quiet();
                world.pause();
                world.resume();
                world.assert_quiet();
                world.resume();
            }
        });
    });
}

impl Lane {
    /// A turn, where it does not sleep for others.
    fn run_once_if_begun(&mut self) {
        if !self.look_around() && !self.moving.is_empty() {
            self.run_once();
        }
    }
}

/// Whoever calls a lane, or tells it of progress, is heard, however the lane goes to sleep meanwhile.
#[test]
fn no_call_is_lost() {
    explore(10_000, || {
        let mailbox = Arc::new(Mailbox::new().expect("a bell"));
        let said: Arc<(AtomicU64, AtomicBool)> = Arc::default();
        let callers: Vec<_> = (0..2)
            .map(|_| {
                let (waker, said) = (LaneWaker(Arc::clone(&mailbox)), Arc::clone(&said));
                thread::spawn(move || {
                    for _ in 0..2 {
                        said.0.fetch_add(1, SeqCst);
                        waker.wake();
                    }
                })
            })
            .collect();
        let progress = {
            let (waker, said) = (Waker::from(Arc::clone(&mailbox)), Arc::clone(&said));
            thread::spawn(move || {
                said.1.store(true, SeqCst);
                waker.wake();
            })
        };
        let (mut heard, mut progressed) = (0, false);
        let mut content = Content::default();
        while heard < 4 || !progressed {
            if mailbox.take(&mut content) {
                // What was said before the call is known once the call is taken.
                if mailbox.take_progress() {
                    progressed = said.1.load(SeqCst);
                    assert!(progressed);
                }
                if mailbox.take_call() {
                    heard = said.0.load(SeqCst);
                }
            } else if mailbox.fall_asleep() {
                mailbox.bell().wait();
                mailbox.awake();
            }
        }
        callers.into_iter().for_each(|caller| caller.join().expect("it ends"));
        progress.join().expect("it ends");
    });
}
