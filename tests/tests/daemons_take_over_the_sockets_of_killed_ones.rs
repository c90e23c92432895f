//! A daemon that was killed leaves its sockets behind; the next one listens there, and not where somebody still does. All
//! are their owner's alone.

use std::{fs, os::unix::fs::PermissionsExt};

use img_tests::{command::img, daemon::Daemon};

const SOCKETS: [&str; 3] = ["socket", "qmp", "metrics"];

fn taken_over(serve: &[&str]) {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    img(directory, ["create", "-q", "-f", "qcow2", "disk", "1M"]).output().success();
    let control = ["--image", "disk", "--read-only", "--qmp", "unix:qmp", "--metrics", "unix:metrics"];
    let arguments = || serve.iter().chain(&control);
    let first = Daemon::start(directory, arguments());
    let second = Daemon::try_start(directory, arguments()).expect_err("somebody listens there");
    assert_eq!(second.code, Some(1), "{}", second.stderr);
    assert_eq!(first.kill().code, None);
    let third = Daemon::start(directory, arguments());
    for socket in SOCKETS {
        let mode = fs::metadata(directory.join(socket)).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{socket}");
    }
    let ended = third.terminate();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    for socket in SOCKETS {
        assert!(!directory.join(socket).exists(), "{socket} is taken away in the end");
    }
}

#[test]
fn over_nbd() {
    taken_over(&["nbd", "--listen", "unix:socket"]);
}

#[test]
fn over_vhost_user() {
    taken_over(&["vhost-user", "--socket", "socket"]);
}
