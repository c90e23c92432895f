//! The daemon is killed directly after it said that a live snapshot was taken, under load, with nothing flushed by the
//! guest: both images are good, the new one goes on where the guest was, and the old one is not changed any more.

use std::{fs, path::Path};

use img_core::{
    format::OpenMode,
    image::{Image, ImageName, OpenOptions},
};
use img_tests::{
    command::{img, qemu_img},
    daemon::Daemon,
    guest::{
        SharedRam,
        busy::{BusyGuest, QUEUES, SLOTS},
        vhost::{FrontEnd, Inflight, Wishes},
    },
    number_from_environment, open_options,
    qmp::Monitor,
    read_all,
};
use serde_json::json;

fn start(directory: &Path, image: &str) -> Daemon {
    let arguments = ["vhost-user", "--socket", "socket", "--image", image, "--queues", "2"];
    Daemon::start(directory, arguments.iter().chain(&["--qmp", "unix:qmp", "--wait-for-lock", "60"]))
}

/// Takes a snapshot of the disk into `overlay`, and returns when the daemon says that it is taken.
fn snapshot(directory: &Path, overlay: &str) {
    let file = directory.join(overlay);
    let arguments = json!({"device": "disk0", "snapshot-file": file.to_str().expect("UTF-8")});
    let mut qmp = Monitor::negotiated(&directory.join("qmp"));
    assert_eq!(qmp.success("blockdev-snapshot-sync", arguments), json!({}));
}

/// All guest bytes of an image that the last requests of the dead daemon may still keep locked, though none of them
/// goes there.
fn contents(image: &Path) -> Vec<u8> {
    let name = ImageName::from_path(image.to_str().expect("UTF-8"));
    let options = OpenOptions { force_share: true, ..open_options(Some("qcow2"), OpenMode::Read) };
    read_all(&Image::open(&name, &options).expect("it opens")).expect("it reads")
}

/// Nothing worse than leaks.
#[track_caller]
fn check(directory: &Path, image: &str) {
    let check = qemu_img(directory, ["check", "-U", "-f", "qcow2", image]).output();
    assert!(matches!(check.code, 0 | 3), "{image}: {check}");
}

#[test]
fn killed_after_snapshots_under_load() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    img(directory, ["create", "-q", "-f", "qcow2", "top0", "32M"]).output().success();
    let ram = SharedRam::for_queues(QUEUES, SLOTS);
    let seed = number_from_environment("IMG_TEST_SEED").unwrap_or(1);
    let mut guest = BusyGuest::new(&ram, seed);
    let socket = directory.join("socket");
    let mut inflight: Option<Inflight> = None;
    // What the images below held when they came to be there.
    let mut below: Vec<(String, Vec<u8>)> = Vec::new();
    let rounds = number_from_environment("IMG_TEST_CASES").unwrap_or(5);
    for round in 0..rounds {
        let (old, new) = (format!("top{round}"), format!("top{}", round + 1));
        let daemon = start(directory, &old);
        let front_end = FrontEnd::start(&socket, &ram, &guest.queues, inflight.take(), Wishes::default());
        let until = guest.answers + guest.random.below(300);
        while guest.answers < until {
            guest.ask();
            guest.take();
        }
        guest.ask();
        std::thread::scope(|scope| {
            let taken = scope.spawn(|| snapshot(directory, &new));
            // The load goes on, most of the time over the snapshot.
            while !taken.is_finished() {
                guest.take();
                guest.ask();
            }
        });
        let ended = daemon.kill();
        assert_eq!(ended.code, None, "it lived until it was killed: {}", ended.stderr);
        guest.take();
        inflight = front_end.inflight;
        check(directory, &old);
        check(directory, &new);
        let info = qemu_img(directory, ["info", "-U", "--output=json", &new]).output().success();
        let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
        let backing = info["full-backing-filename"].as_str().expect("it has a backing file");
        assert_eq!(
            fs::canonicalize(directory.join(backing)).unwrap(),
            fs::canonicalize(directory.join(&old)).unwrap()
        );
        below.push((old.clone(), contents(&directory.join(old))));
    }
    let top = format!("top{rounds}");
    guest.end_at(start(directory, &top), &socket, &ram, inflight);
    check(directory, &top);
    for (name, bytes) in below {
        assert!(contents(&directory.join(&name)) == bytes, "{name} was changed under its overlay");
    }
}
