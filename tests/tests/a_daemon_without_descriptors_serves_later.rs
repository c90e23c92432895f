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
    // A reply of eight bytes.
    let features = [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0];
    waits(&["vhost-user", "--socket", "socket"], "a front end has to wait", &GET_FEATURES, &features);
}

#[test]
fn a_client_waits() {
    waits(&["nbd", "--listen", "unix:socket"], "no client is served for now", &[], b"NBDMAGICIHAVEOPT");
}

/// Who connects without descriptors left is `told` of; with some again it asks, and gets an answer that begins so.
fn waits(command: &[&str], told: &str, question: &[u8], answer: &[u8]) {
    let directory = tempfile::tempdir().expect("a directory");
    img(directory.path(), ["create", "-q", "-f", "qcow2", "disk", "1M"]).output().success();
    let mut daemon = Command::new(blk_backend_binary())
        .args(command)
        .args(["--image", "disk"])
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
    let mut client = UnixStream::connect(directory.path().join("socket")).expect("it listens");
    line.clear();
    while !line.contains(&format!("{told}: Too many open files")) {
        line.clear();
        assert_ne!(stderr.read_line(&mut line).expect("a pipe"), 0, "it has ended");
    }
    limit(1000);
    client.write_all(question).expect("it is there");
    let mut found = vec![0; answer.len()];
    client.read_exact(&mut found).expect("it serves");
    assert_eq!(found, answer);
    daemon.kill().expect("it is there");
    daemon.wait().expect("our own child");
}
