//! The daemon is killed at any moment under load, and started again: the front end reconnects with the inflight
//! memory, and every request is answered once. What is read is what the guest wrote, in an order that it can have
//! meant.

use std::path::Path;

use img_tests::{
    command::{img, qemu_img},
    daemon::Daemon,
    guest::{
        Answer, Ask, GuestQueue, SharedRam,
        model::{DiskModel, next_ask},
        vhost::{FrontEnd, Inflight, Wishes},
    },
    number_from_environment,
    pattern::Random,
};

const SLOTS: u16 = 32;
const SIZE: u16 = 128;
const SECTORS: u64 = 32 << 11;
const QUEUES: u16 = 2;

/// Parts of the disk of each queue: one request each at a time, so that none overlaps another.
const PARTS: u64 = 24;
const PART_SECTORS: u64 = SECTORS / (QUEUES as u64 * PARTS);

/// A request that is not answered.
struct Asked {
    token: u64,
    ask: Ask,
}

/// A guest that always has requests under way.
struct Guest {
    queues: Vec<GuestQueue>,
    /// By queue and part.
    asked: Vec<Vec<Option<Asked>>>,
    model: DiskModel,
    random: Random,
    answers: u64,
}

impl Guest {
    fn new(ram: &SharedRam, seed: u64) -> Self {
        Self {
            queues: (0..QUEUES).map(|index| GuestQueue::new(ram, index, SIZE, SLOTS, true)).collect(),
            asked: (0..QUEUES).map(|_| (0..PARTS).map(|_| None).collect()).collect(),
            model: DiskModel::new(usize::try_from(SECTORS).expect("small")),
            random: Random::new(seed),
            answers: 0,
        }
    }

    fn under_way(&self) -> usize {
        self.queues.iter().map(GuestQueue::pending).sum()
    }

    /// Asks for something in each part where nothing is under way.
    fn ask(&mut self) {
        for (number, (queue, asked)) in (0u64..).zip(self.queues.iter_mut().zip(&mut self.asked)) {
            for (index, slot) in (0u64..).zip(asked) {
                if slot.is_none() {
                    let first = (number * PARTS + index) * PART_SECTORS;
                    let ask = next_ask(&mut self.random, first, PART_SECTORS);
                    *slot = Some(Asked { token: queue.submit(&ask), ask });
                }
            }
            queue.publish();
        }
    }

    /// Takes the answers that are there.
    fn take(&mut self) {
        for number in 0..self.queues.len() {
            while let Some(answer) = self.queues[number].answer() {
                self.answered(number, &answer);
            }
        }
    }

    /// Waits until all that is under way is answered.
    fn settle(&mut self) {
        for number in 0..self.queues.len() {
            while self.queues[number].pending() > 0 {
                let answer = self.queues[number].wait();
                self.answered(number, &answer);
            }
        }
    }

    fn answered(&mut self, number: usize, answer: &Answer) {
        let is_it =
            |slot: &&mut Option<Asked>| slot.as_ref().is_some_and(|asked| asked.token == answer.token);
        let slot = self.asked[number].iter_mut().find(is_it).expect("a request is answered once");
        let Asked { ask, .. } = slot.take().expect("it was found");
        self.model.apply(&ask);
        self.model.check_answer(&ask, answer);
        self.answers += 1;
    }
}

/// One kind of disk.
struct Disk {
    create: &'static [&'static str],
    serve: &'static [&'static str],
}

fn start(directory: &Path, disk: &Disk) -> Daemon {
    let arguments = ["vhost-user", "--socket", "socket", "--image", "disk", "--queues", "2"];
    Daemon::start(directory, arguments.iter().chain(disk.serve).chain(&["--wait-for-lock", "60"]))
}

fn killed_under_load(disk: &Disk, seed: u64) {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    img(directory, ["create", "-q"].iter().chain(disk.create).chain(&["disk", "32M"])).output().success();
    let ram = SharedRam::for_queues(QUEUES, SLOTS);
    let mut guest = Guest::new(&ram, seed);
    let socket = directory.join("socket");
    let mut inflight: Option<Inflight> = None;
    let mut done_again = 0;
    for _ in 0..number_from_environment("IMG_TEST_CASES").unwrap_or(6) {
        let daemon = start(directory, disk);
        done_again += guest.under_way();
        let front_end = FrontEnd::start(&socket, &ram, &guest.queues, inflight.take(), Wishes::default());
        // Killed after so many answers, in the middle of whatever it does then.
        let until = guest.answers + guest.random.below(400);
        while guest.answers < until {
            guest.ask();
            guest.take();
        }
        guest.ask();
        let ended = daemon.kill();
        assert_eq!(ended.code, None, "it lived until it was killed: {}", ended.stderr);
        assert_tells_only_of_notes(&ended.stderr);
        guest.take();
        inflight = front_end.inflight;
    }
    assert!(done_again > 0, "some request was under way at some kill");
    let daemon = start(directory, disk);
    let front_end = FrontEnd::start(&socket, &ram, &guest.queues, inflight, Wishes::default());
    guest.settle();
    assert_eq!(guest.queues[0].ask(&Ask::Flush).status, 0);
    for sector in (0..SECTORS).step_by(512) {
        let data = guest.queues[1].read(sector, 512);
        guest.model.check(sector, &data);
    }
    drop(front_end);
    let ended = daemon.terminate();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_tells_only_of_notes(&ended.stderr);
    if disk.create.contains(&"qcow2") {
        // Leaks are all that a kill may leave.
        let check = qemu_img(directory, ["check", "-f", "qcow2", "disk"]).output();
        assert!(matches!(check.code, 0 | 3), "{check}");
    }
}

/// Changes of tables that were in nobody's memory any more were done again, and in the end the daemon says what it
/// did; nothing else was worth telling.
fn assert_tells_only_of_notes(stderr: &str) {
    let is_expected = |line: &str| {
        line.ends_with("changes of a device that died were done again")
            || line.starts_with("blk-backend: disk0: ")
            || line.starts_with("blk-backend: CPU time ")
    };
    assert!(stderr.lines().all(is_expected), "{stderr}");
}

fn seed() -> u64 {
    number_from_environment("IMG_TEST_SEED").unwrap_or(1)
}

#[test]
fn with_a_qcow2_image() {
    killed_under_load(&Disk { create: &["-f", "qcow2"], serve: &[] }, seed());
}

#[test]
fn with_a_qcow2_image_of_small_clusters() {
    let create = &["-f", "qcow2", "-o", "cluster_size=4k"];
    killed_under_load(&Disk { create, serve: &[] }, seed() + 100);
}

#[test]
fn with_a_qcow2_image_that_is_written_through() {
    let serve = &["--cache", "writethrough"];
    killed_under_load(&Disk { create: &["-f", "qcow2"], serve }, seed() + 200);
}

#[test]
fn with_a_raw_image() {
    let disk = Disk { create: &["-f", "raw"], serve: &["--format", "raw"] };
    killed_under_load(&disk, seed() + 300);
}
