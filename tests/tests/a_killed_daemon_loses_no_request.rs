//! The daemon is killed at any moment under load, and started again: the front end reconnects with the inflight
//! memory, and every request is answered once. What is read is what the guest wrote, in an order that it can have
//! meant.

use std::path::Path;

use img_tests::{
    command::{img, qemu_img, qemu_io},
    daemon::Daemon,
    guest::{
        Ask, GuestQueue, SharedRam,
        busy::{BusyGuest, QUEUES, SLOTS},
        vhost::{FrontEnd, Inflight, Wishes},
    },
    number_from_environment,
    qmp::Monitor,
};
use serde_json::json;

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
    let mut guest = BusyGuest::new(&ram, seed);
    let socket = directory.join("socket");
    let mut inflight: Option<Inflight> = None;
    let mut done_again = 0;
    for left in (0..number_from_environment("IMG_TEST_CASES").unwrap_or(6)).rev() {
        let daemon = start(directory, disk);
        let front_end = FrontEnd::start(&socket, &ram, &guest.queues, inflight.take(), Wishes::default());
        // Killed after so many answers, in the middle of whatever it does then.
        let until = guest.answers + guest.random.below(400);
        while guest.answers < until {
            guest.ask();
            guest.take();
        }
        if left == 0 {
            // However fast it is: what is asked from here on is under way when it dies.
            daemon.halt();
            guest.take();
        }
        guest.ask();
        let ended = daemon.kill();
        assert_eq!(ended.code, None, "it lived until it was killed: {}", ended.stderr);
        assert_tells_only_of_notes(&ended.stderr);
        guest.take();
        done_again += guest.under_way();
        inflight = front_end.inflight;
    }
    assert!(done_again > 0, "some request was under way at some kill");
    let ended = guest.end_at(start(directory, disk), &socket, &ram, inflight);
    assert_tells_only_of_notes(&ended.stderr);
    // Leaks are all that a kill may leave.
    let format = disk.create[1];
    if format != "raw" {
        let check = img(directory, ["check", "-f", format, "disk"]).output();
        assert!(matches!(check.code, 0 | 3), "{check}");
    }
    if format == "qcow2" {
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

/// Where the dead daemon wrote, and no table says so, is known once the guest's front end has come. An NBD client that
/// comes before it takes none of these places.
#[test]
fn with_a_client_that_comes_before_the_guest() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    img(directory, ["create", "-q", "-f", "qcow2", "disk", "32M"]).output().success();
    let ram = SharedRam::for_queues(1, SLOTS);
    let mut queues = vec![GuestQueue::new(&ram, 0, 128, SLOTS, true)];
    let socket = directory.join("socket");
    let disk = Disk { create: &[], serve: &["--qmp", "unix:qmp"] };
    let daemon = start(directory, &disk);
    let front_end = FrontEnd::start(&socket, &ram, &queues, None, Wishes::default());
    for part in 0..16 {
        assert_eq!(queues[0].ask(&Ask::Write { sector: part * 128, data: vec![1; 65536] }).status, 0);
    }
    let ended = daemon.kill();
    assert_eq!(ended.code, None, "it lived until it was killed: {}", ended.stderr);
    let daemon = start(directory, &disk);
    let mut qmp = Monitor::negotiated(&directory.join("qmp"));
    let address = json!({"type": "unix", "data": {"path": "nbd"}});
    qmp.success("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "client", "node-name": "disk0", "name": "", "writable": true});
    qmp.success("block-export-add", export);
    let write = ["write -P 7 16M 1M", "flush"];
    qemu_io(directory, "raw", "nbd+unix:///?socket=nbd", &write).output().success();
    let front_end = FrontEnd::start(&socket, &ram, &queues, front_end.inflight, Wishes::default());
    for part in 0..16 {
        assert!(queues[0].read(part * 128, 128) == [1; 65536], "part {part} is something else");
        assert!(queues[0].read((16 << 11) + part * 128, 128) == [7; 65536], "part {part} of the client");
    }
    drop(front_end);
    assert_tells_only_of_notes(&daemon.terminate().stderr);
    qemu_img(directory, ["check", "-f", "qcow2", "disk"]).output().success();
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

/// Counts are made right when it is opened, before the notes are done again.
#[test]
fn with_a_qcow2_image_of_lazy_refcounts() {
    let create = &["-f", "qcow2", "-o", "lazy_refcounts=on"];
    killed_under_load(&Disk { create, serve: &[] }, seed() + 400);
}

#[test]
fn with_a_qcow2_image_of_subclusters() {
    let create = &["-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k"];
    killed_under_load(&Disk { create, serve: &[] }, seed() + 500);
}

#[test]
fn with_a_qcow2_image_that_keeps_its_data_elsewhere() {
    let create = &["-f", "qcow2", "-o", "data_file=data"];
    killed_under_load(&Disk { create, serve: &[] }, seed() + 600);
}

#[test]
fn with_a_qed_image() {
    killed_under_load(&Disk { create: &["-f", "qed"], serve: &[] }, seed() + 700);
}

#[test]
fn with_a_vmdk_image() {
    killed_under_load(&Disk { create: &["-f", "vmdk"], serve: &[] }, seed() + 800);
}

#[test]
fn with_a_vhd() {
    let create = &["-f", "vpc", "-o", "force_size=on"];
    killed_under_load(&Disk { create, serve: &["--format", "vpc"] }, seed() + 900);
}

#[test]
fn with_a_raw_image() {
    let disk = Disk { create: &["-f", "raw"], serve: &["--format", "raw"] };
    killed_under_load(&disk, seed() + 300);
}
