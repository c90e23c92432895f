//! A daemon serves also when standard output leads nowhere: whoever started it may be gone, or the disk of its log full.

use std::{
    fs::File,
    io::{PipeWriter, pipe},
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Stdio},
};

use img_tests::{
    command::{blk_backend_binary, img},
    peer::wait_until,
};
use rustix::process::{Pid, Signal, kill_process};

/// A pipe that nobody reads.
fn unread() -> PipeWriter {
    pipe().expect("a pipe").1
}

/// Starts the daemon with that output, and asks it to end when it listens. What it said on standard error.
fn ended(directory: &Path, serve: &[&str], output: Stdio) -> String {
    let daemon = Command::new(blk_backend_binary())
        .args(serve)
        .args(["--image", "disk", "--metrics", "tcp:0"])
        .current_dir(directory)
        .stdout(output)
        .stderr(Stdio::piped())
        .spawn()
        .expect("it was built");
    wait_until("it listens", || UnixStream::connect(directory.join("socket")).is_ok());
    kill_process(Pid::from_child(&daemon), Signal::TERM).expect("it is there");
    let output = daemon.wait_with_output().expect("our own child");
    let said = String::from_utf8(output.stderr).expect("text");
    assert!(output.status.success(), "{serve:?}: {said}");
    said
}

#[test]
fn whoever_started_it_may_be_gone() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    img(directory, ["create", "-q", "-f", "qcow2", "disk", "1M"]).output().success();
    for serve in [&["nbd", "--listen", "unix:socket"][..], &["vhost-user", "--socket", "socket"]] {
        let said = ended(directory, serve, unread().into());
        assert!(!said.contains("standard output"), "{said}");
        let full = File::options().write(true).open("/dev/full").expect("a device");
        let said = ended(directory, serve, full.into());
        assert!(said.contains("standard output: No space left on device"), "{said}");
    }
}
