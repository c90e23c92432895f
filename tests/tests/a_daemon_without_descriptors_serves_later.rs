//! Who comes while a daemon has no descriptors left waits, and is served when it has some again.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    process::{Command, Stdio},
};

use img_tests::command::{blk_backend_binary, img};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

/// "A vhost-user message": GET_FEATURES (1), version 1, without a payload.
const GET_FEATURES: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn a_front_end_waits() {
    let directory = tempfile::tempdir().expect("a directory");
    img(directory.path(), ["create", "-q", "-f", "qcow2", "disk", "1M"]).output().success();
    let mut daemon = Command::new(blk_backend_binary())
        .args(["vhost-user", "--socket", "socket", "--image", "disk"])
        .current_dir(directory.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it was built");
    let mut stdout = BufReader::new(daemon.stdout.take().expect("piped"));
    let mut stderr = BufReader::new(daemon.stderr.take().expect("piped"));
    let mut line = String::new();
    stdout.read_line(&mut line).expect("a pipe");
    assert!(line.starts_with("listening on "), "{line}");

    let limit = |current| {
        let pid = Some(Pid::from_child(&daemon));
        let maximum = getrlimit(Resource::Nofile).maximum;
        prlimit(pid, Resource::Nofile, Rlimit { current: Some(current), maximum }).expect("our own child");
    };
    // Those that it has it keeps.
    limit(3);
    let mut front_end = UnixStream::connect(directory.path().join("socket")).expect("it listens");
    line.clear();
    while !line.contains("a front end has to wait: Too many open files") {
        line.clear();
        assert_ne!(stderr.read_line(&mut line).expect("a pipe"), 0, "it has ended");
    }
    limit(1000);
    front_end.write_all(&GET_FEATURES).expect("it is there");
    let mut answer = [0; 20];
    front_end.read_exact(&mut answer).expect("it serves");
    assert_eq!(answer[..12], [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0], "a reply of eight bytes");
    daemon.kill().expect("it is there");
    daemon.wait().expect("our own child");
}
