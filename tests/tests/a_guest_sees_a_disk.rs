//! A guest that asks for everything at once, on several queues, sees a disk: what it wrote, where it wrote it.

use std::{collections::HashMap, path::Path, sync::Arc};

use blk_backend::{
    disk::{Disk, DiskOptions},
    in_process::QueueThread,
    virtio::{Device, DeviceOptions, Features, setup::QueueSetup},
};
use img_core::image::ImageName;
use img_tests::{
    command::img,
    guest::{
        Ask, GuestQueue, SharedRam,
        model::{DiskModel, next_ask},
    },
    pattern::Random,
};
use tempfile::TempDir;

const SECTORS: u64 = 16 << 11;
const SLOTS: u16 = 24;
const SIZE: u16 = 128;

fn disk(directory: &Path, format: &str, options: &DiskOptions) -> Arc<Disk> {
    let path = directory.join("disk");
    if !path.exists() {
        img(directory, ["create", "-q", "-f", format, "disk", "16M"]).output().success();
    }
    let name = ImageName::parse(path.to_str().expect("UTF-8")).expect("a plain name");
    Disk::open(&name, &DiskOptions { format: Some(format.to_owned()), ..options.clone() }).expect("it opens")
}

struct Machine {
    device: Arc<Device>,
    queues: Vec<(GuestQueue, QueueThread)>,
    ram: SharedRam,
}

fn machine(disk: &Arc<Disk>, queues: u16, features: impl Fn(Features) -> Features) -> Machine {
    let options =
        DeviceOptions { queues, serial: "twenty characters it".to_owned(), ..DeviceOptions::default() };
    let device = Device::new(disk, &options).expect("a device");
    let features = features(device.offered());
    device.negotiate(features).expect("what was offered");
    let ram = SharedRam::for_queues(queues, SLOTS);
    let queues = (0..queues)
        .map(|index| {
            let guest = GuestQueue::new(&ram, index, SIZE, SLOTS, features.has(Features::EVENT_IDX));
            let thread = start(&device, &ram, &guest, 0);
            (guest, thread)
        })
        .collect();
    Machine { device, queues, ram }
}

fn start(device: &Arc<Device>, ram: &SharedRam, guest: &GuestQueue, next_avail: u16) -> QueueThread {
    let setup = QueueSetup {
        ram: Arc::clone(&ram.ram),
        rings: guest.layout(),
        next_avail,
        features: device.negotiated(),
        kick: Some(guest.kick.try_clone().expect("a descriptor")),
        call: Some(guest.call.try_clone().expect("a descriptor")),
        error: None,
        inflight: None,
        redo: None,
        log: None,
        paused: false,
    };
    QueueThread::start(device, "queue", setup).expect("a queue")
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

/// Many requests at once on one queue; none overlaps another that is under way, so the model knows each answer.
fn play(guest: &mut GuestQueue, seed: u64, first: u64, sectors: u64, rounds: u32) -> DiskModel {
    let mut random = Random::new(seed);
    let mut model = DiskModel::new(usize::try_from(SECTORS).expect("small"));
    for _ in 0..rounds {
        // Each request of a round has a part of the disk of its own.
        let parts = u64::from(SLOTS);
        let part = sectors / parts;
        let mut asked = HashMap::new();
        for index in 0..parts {
            let ask = next_ask(&mut random, first + index * part, part);
            asked.insert(guest.submit(&ask), ask);
            if random.below(4) == 0 {
                guest.publish();
            }
        }
        guest.publish();
        while !asked.is_empty() {
            let answer = guest.wait();
            let ask = asked.remove(&answer.token).expect("asked once");
            model.apply(&ask);
            model.check_answer(&ask, &answer);
        }
    }
    model
}

fn two_queues_see_a_disk(format: &str, features: impl Fn(Features) -> Features) {
    let directory = directory();
    let disk = disk(directory.path(), format, &DiskOptions::default());
    let mut machine = machine(&disk, 2, features);
    let half = SECTORS / 2;
    let models: Vec<DiskModel> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0u64..)
            .zip(&mut machine.queues)
            .map(|(index, (guest, _))| scope.spawn(move || play(guest, 7 + index, index * half, half, 40)))
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("it plays")).collect()
    });
    // Each queue reads what the other wrote.
    for (reader, writer) in [(0, 1usize), (1, 0)] {
        for sector in (writer as u64 * half..(writer as u64 + 1) * half).step_by(256) {
            let data = machine.queues[reader].0.read(sector, 256);
            models[writer].check(sector, &data);
        }
    }
    let guest = &mut machine.queues[0].0;
    assert_eq!(guest.ask(&Ask::Flush).status, 0);
    for (_, queue) in machine.queues {
        assert!(!queue.stop().expect("it stops").is_broken);
    }
    assert!(!machine.device.needs_reset());
    disk.close().expect("it closes");
    drop((disk, machine.device));
    if format != "raw" {
        img(directory.path(), ["check", "-f", format, "disk"]).output().success();
    }
}

#[test]
fn on_qcow2() {
    two_queues_see_a_disk("qcow2", |offered| offered);
}

#[test]
fn on_raw() {
    two_queues_see_a_disk("raw", |offered| offered);
}

#[test]
fn without_event_index_and_write_back() {
    two_queues_see_a_disk("qcow2", |offered| {
        offered.without(Features::EVENT_IDX.with(Features::FLUSH).with(Features::CONFIG_WCE))
    });
}

#[test]
fn the_serial_number_is_the_one_chosen() {
    let directory = directory();
    let disk = disk(directory.path(), "qcow2", &DiskOptions::default());
    let mut machine = machine(&disk, 1, |offered| offered);
    let answer = machine.queues[0].0.ask(&Ask::Id);
    assert_eq!((answer.status, answer.data.as_slice()), (0, &b"twenty characters it"[..]));
    assert_eq!(answer.written_bytes, 21);
}

#[test]
fn a_read_only_disk_is_read_only() {
    let directory = directory();
    drop(disk(directory.path(), "qcow2", &DiskOptions::default()));
    let read_only = DiskOptions { read_only: true, ..DiskOptions::default() };
    let disk = disk(directory.path(), "qcow2", &read_only);
    let mut machine = machine(&disk, 1, |offered| offered);
    assert!(machine.device.offered().has(Features::RO));
    let guest = &mut machine.queues[0].0;
    assert_eq!(guest.read(0, 8), vec![0; 4096]);
    assert_eq!(guest.ask(&Ask::Write { sector: 0, data: vec![1; 512] }).status, 1);
    assert_eq!(guest.ask(&Ask::Zero(vec![(0, 8, true)])).status, 1);
    assert_eq!(guest.ask(&Ask::Discard(vec![(0, 8)])).status, 1);
    assert_eq!(guest.ask(&Ask::Flush).status, 0);
    assert_eq!(guest.read(0, 8), vec![0; 4096]);
}

#[test]
fn a_queue_that_is_paused_does_nothing_and_forgets_nothing() {
    let directory = directory();
    let disk = disk(directory.path(), "raw", &DiskOptions::default());
    let mut machine = machine(&disk, 1, |offered| offered);
    let (guest, queue) = &mut machine.queues[0];
    queue.pause().expect("it pauses");
    guest.submit(&Ask::Write { sector: 1, data: vec![5; 512] });
    guest.publish();
    // What is paused has looked at its orders at least once more when it answers the next one.
    queue.pause().expect("it pauses");
    assert_eq!(guest.answer(), None);
    queue.resume();
    assert_eq!(guest.wait().status, 0);
    assert_eq!(guest.read(1, 1), vec![5; 512]);
}

#[test]
fn a_queue_goes_on_where_it_stopped() {
    let directory = directory();
    let disk = disk(directory.path(), "raw", &DiskOptions::default());
    let mut machine = machine(&disk, 1, |offered| offered);
    let (mut guest, queue) = machine.queues.pop().expect("one");
    for sector in 0..5 {
        assert_eq!(guest.ask(&Ask::Write { sector, data: vec![5; 512] }).status, 0);
    }
    let state = queue.stop().expect("it stops");
    assert_eq!((state.next_avail, state.is_broken), (5, false));
    let token = guest.submit(&Ask::Read { sector: 4, sectors: 1 });
    guest.publish();
    let queue = start(&machine.device, &machine.ram, &guest, state.next_avail);
    let answer = guest.wait();
    assert_eq!((answer.token, answer.data), (token, vec![5; 512]));
    queue.stop().expect("it stops");
}
