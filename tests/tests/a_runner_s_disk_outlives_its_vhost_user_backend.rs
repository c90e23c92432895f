//! The runner's vhost-user disk, as the transport drives it: backends of ours and of the reference serve it, are
//! killed and come back, and the guest sees a disk.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use img_tests::{
    command::{img, oracle},
    daemon::Daemon,
    guest::{
        Ask, GuestQueue, SECTOR, SharedRam,
        busy::{BusyGuest, QUEUES, SIZE, SLOTS},
        model::DiskModel,
        vhost::event,
    },
    pattern::Random,
};
use rustix::process::{Pid, Signal, kill_process};
use vmm_runner::virtio::{ConfigNotifier, QueueSetup, VhostUserBlock, VirtioDevice as _};

/// What the device told, to be waited for.
#[derive(Debug, Default)]
struct Told {
    lines: Mutex<Vec<String>>,
    more: Condvar,
}

impl Told {
    fn add(&self, line: &str) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line.to_owned());
        self.more.notify_all();
    }

    fn count(&self, text: &str) -> usize {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter(|line| line.contains(text)).count()
    }

    /// Waits until so many lines have the text.
    #[track_caller]
    fn wait(&self, text: &str, count: usize) {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let wanting =
            |lines: &mut Vec<String>| lines.iter().filter(|line| line.contains(text)).count() < count;
        let (lines, late) = self
            .more
            .wait_timeout_while(lines, Duration::from_secs(60), wanting)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!late.timed_out(), "not told {count} times of {text:?}: {lines:?}");
    }
}

impl ConfigNotifier for Told {
    fn config_changed(&self) {
        self.add("event: configuration");
    }

    fn needs_reset(&self) {
        self.add("event: reset");
    }
}

/// A device on `socket`, as soon as there is a backend.
fn connect(socket: &Path, told: &Arc<Told>) -> VhostUserBlock {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let lines = Arc::clone(told);
        match VhostUserBlock::connect(socket, QUEUES, Arc::new(move |line| lines.add(line))) {
            Ok(mut device) => {
                device.set_config_notifier(told.clone());
                return device;
            }
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        std::thread::yield_now();
    }
}

/// What the transport says of `queues` when the driver is ready.
fn setups(queues: &[GuestQueue]) -> Vec<QueueSetup> {
    let setup = |(index, queue): (u16, &GuestQueue)| {
        let rings = queue.layout();
        QueueSetup {
            index,
            size: rings.size,
            descriptors: rings.descriptors.0,
            available: rings.available.0,
            used: rings.used.0,
            kick: event(&queue.kick),
            call: Arc::new(event(&queue.call)),
        }
    };
    (0..).zip(queues).map(setup).collect()
}

fn ours(directory: &Path, more: &[&str]) -> Daemon {
    let arguments = ["vhost-user", "--socket", "socket", "--image", "disk", "--queues", "2"];
    Daemon::start(directory, arguments.iter().chain(&["--wait-for-lock", "60"]).chain(more))
}

fn make_disk(directory: &Path) {
    img(directory, ["create", "-q", "-f", "qcow2", "base", "32M"]).output().success();
    img(directory, ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base", "disk"]).output().success();
}

#[test]
fn backends_that_are_killed_under_load_are_replaced() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    img(directory, ["create", "-q", "-f", "raw", "disk", "32M"]).output().success();
    let ram = SharedRam::for_queues(QUEUES, SLOTS);
    let mut guest = BusyGuest::new(&ram, 1);
    let mut daemon = ours(directory, &["--format", "raw"]);
    let told = Arc::new(Told::default());
    let mut device = connect(&directory.join("socket"), &told);
    assert_eq!(device.queue_sizes().len(), usize::from(QUEUES));
    device.activate(&ram.ram, device.features(), setups(&guest.queues)).expect("a backend");
    for kills in 1..=4 {
        let until = guest.answers + guest.random.below(400);
        while guest.answers < until {
            guest.ask();
            guest.take();
        }
        guest.ask();
        assert_eq!(daemon.kill().code, None);
        told.wait("the backend is gone", kills);
        daemon = ours(directory, &["--format", "raw"]);
        told.wait("a backend is back", kills);
    }
    guest.settle();
    guest.check_all();
    assert_eq!(told.count("event:"), 0, "{told:?}");
    device.reset();
    drop(device);
    assert_eq!(daemon.terminate().code, Some(0));
}

#[test]
fn the_guest_learns_of_a_resize_and_keeps_its_cache_mode() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    make_disk(directory);
    let daemon = ours(directory, &["--qmp", "unix:qmp"]);
    let told = Arc::new(Told::default());
    let mut device = connect(&directory.join("socket"), &told);
    let capacity = |device: &VhostUserBlock| {
        let mut bytes = [0; 8];
        device.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes) * 512
    };
    let writeback = |device: &VhostUserBlock| {
        let mut byte = [0xFF];
        device.read_config(32, &mut byte);
        byte[0]
    };
    assert_eq!((capacity(&device), writeback(&device)), (32 << 20, 1));
    device.write_config(32, &[0]);
    device.write_config(0, &[9; 8]);
    device.write_config(32, &[7]);
    assert_eq!((capacity(&device), writeback(&device)), (32 << 20, 0));
    let mut monitor = UnixStream::connect(directory.join("qmp")).expect("it listens");
    let resize = r#"{"execute":"block_resize","arguments":{"device":"disk0","size":67108864}}"#;
    writeln!(monitor, "{{\"execute\":\"qmp_capabilities\"}}\n{resize}").expect("it reads");
    let answers: Vec<_> = BufReader::new(&monitor).lines().take(3).map(|line| line.expect("text")).collect();
    assert!(answers[2].contains("return"), "{answers:?}");
    told.wait("event: configuration", 1);
    assert_eq!((capacity(&device), writeback(&device)), (64 << 20, 0));
    // The next backend is told what the driver chose.
    assert_eq!(daemon.kill().code, None);
    let _next = ours(directory, &[]);
    told.wait("a backend is back", 1);
    assert_eq!((capacity(&device), writeback(&device)), (64 << 20, 0));
}

#[test]
fn rings_that_are_nowhere_are_refused_and_a_reset_helps() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    make_disk(directory);
    let _daemon = ours(directory, &[]);
    let told = Arc::new(Told::default());
    let mut device = connect(&directory.join("socket"), &told);
    let ram = SharedRam::for_queues(QUEUES, SLOTS);
    let mut queues: Vec<_> =
        (0..QUEUES).map(|index| GuestQueue::new(&ram, index, SIZE, SLOTS, true)).collect();
    for address in [u64::MAX, u64::MAX - 15, ram.len_bytes - 16, 0x7100_0000_0000, 3] {
        for part in 0..3 {
            let mut setups = setups(&queues);
            let QueueSetup { descriptors, available, used, .. } = &mut setups[1];
            *[descriptors, available, used][part] = address;
            let error = device.activate(&ram.ram, device.features(), setups).expect_err("it is nowhere");
            assert_eq!(error.to_string(), "the guest stopped: queue 1: its rings are not in memory");
            device.reset();
        }
    }
    for _ in 0..2 {
        device.activate(&ram.ram, device.features(), setups(&queues)).expect("rings in memory");
        assert_eq!(queues[0].ask(&Ask::Flush).status, 0);
        device.reset();
        queues = (0..QUEUES).map(|index| GuestQueue::new(&ram, index, SIZE, SLOTS, true)).collect();
        for queue in &queues {
            // As a driver does: its rings begin at nothing.
            use vm_memory::Bytes as _;
            for ring in [queue.layout().available, queue.layout().used] {
                ram.ram.write_slice(&[0; 4], ring).expect("in memory");
            }
        }
    }
    let nowhere = VhostUserBlock::connect(&directory.join("nobody"), 1, Arc::new(|_| {}));
    let error = nowhere.expect_err("nobody listens").to_string();
    assert!(
        error.starts_with("vhost-user ") && error.ends_with("No such file or directory (os error 2)"),
        "{error}"
    );
}

/// The reference's daemon. Killed when it is dropped.
struct Reference(Child);

impl Reference {
    fn start(directory: &Path) -> Self {
        let export =
            "vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=theirs,num-queues=2,writable=on";
        // A socket that a dead one left is in its way.
        std::fs::remove_file(directory.join("theirs")).ok();
        let child = Command::new(oracle("qemu-storage-daemon"))
            .args(["--blockdev", "driver=qcow2,node-name=disk,file.driver=file,file.filename=disk"])
            .args(["--export", export])
            .current_dir(directory)
            .spawn()
            .expect("it is installed");
        Self(child)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).expect("it was not waited for");
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        // Where it is gone already there is nothing to kill.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// It keeps no notes of its requests, or of what is not flushed: whoever waited for an answer when it died must reset
/// the device.
#[test]
fn the_reference_s_backend_serves_it_and_may_be_replaced_while_idle() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    make_disk(directory);
    let ram = SharedRam::for_queues(QUEUES, SLOTS);
    let mut queues: Vec<_> =
        (0..QUEUES).map(|index| GuestQueue::new(&ram, index, SIZE, SLOTS, true)).collect();
    let mut model = DiskModel::new(16 << 11);
    let mut random = Random::new(1);
    let mut work = |queues: &mut Vec<GuestQueue>, count| {
        for _ in 0..count {
            let mut data = vec![0; SECTOR * 8];
            random.fill(&mut data);
            let sector = random.below((16 << 11) - 8);
            let queue = &mut queues[usize::try_from(random.below(2)).expect("one of two")];
            let write = Ask::Write { sector, data };
            assert_eq!(queue.ask(&write).status, 0);
            model.apply(&write);
            let sector = random.below((16 << 11) - 8);
            model.check(sector, &queue.read(sector, 8));
        }
    };
    let theirs = Reference::start(directory);
    let told = Arc::new(Told::default());
    let mut device = connect(&directory.join("theirs"), &told);
    device.activate(&ram.ram, device.features(), setups(&queues)).expect("a backend");
    work(&mut queues, 100);
    drop(theirs);
    told.wait("the backend is gone", 1);
    let theirs = Reference::start(directory);
    told.wait("a backend is back", 1);
    // What was not flushed was in the memory of the one that was killed.
    assert_eq!(told.count("event:"), 0, "{told:?}");
    assert_eq!(queues[0].ask(&Ask::Read { sector: 0, sectors: 8 }).status, 0);
    theirs.signal(Signal::STOP);
    for queue in &mut queues {
        queue.submit(&Ask::Flush);
        queue.publish();
    }
    drop(theirs);
    told.wait("the backend is gone", 2);
    let _theirs = Reference::start(directory);
    told.wait("event: reset", 1);
}
