//! The protocol between two of us, and with running programs of the reference in both directions.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use super::*;
use crate::storage::{FileOptions, FileStorage, Preallocation, Storage};

const KINDS: [Use; 8] = [
    Use::Nothing,
    Use::Inspect,
    Use::Read,
    Use::Write,
    Use::Create,
    Use::SharedRead,
    Use::SharedWrite,
    Use::SharedResize,
];

fn open(path: &Path) -> FileStorage {
    FileOptions::new().write(true).open(path).expect("the image opens")
}

/// A directory with an image of that format, and the image's path.
fn image(format: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    run("qemu-img", &["create", "-q", "-f", format, path.to_str().expect("UTF-8"), "1M"]).expect("an image");
    (dir, path)
}

/// Runs a program of the reference: its standard error is the failure.
fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} (Debian package qemu-utils) must be installed: {error}"));
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// A daemon of the reference that is ready when `start` returns and ends when dropped.
struct Daemon {
    pid: rustix::process::Pid,
}

impl Daemon {
    fn start(program: &str, arguments: &[&str], pid_file: &Path) -> Self {
        run(program, arguments).expect("the daemon starts");
        let pid = std::fs::read_to_string(pid_file).expect("a daemon that is ready has written its id");
        let pid = pid.trim().parse().ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
        Self { pid }
    }

    fn nbd(dir: &Path, image: &Path, format: &str, read_only: bool) -> Self {
        let (pid_file, socket) = (dir.join("pid"), dir.join("socket"));
        let mut arguments = vec!["--fork", "--persistent", "-f", format, "--pid-file", text(&pid_file)];
        arguments.extend(["-k", text(&socket), text(image)]);
        if read_only {
            arguments.push("--read-only");
        }
        Self::start("qemu-nbd", &arguments, &pid_file)
    }

    fn storage_daemon(dir: &Path, image: &Path) -> Self {
        let (pid_file, socket) = (dir.join("pid"), dir.join("socket"));
        let file = format!("driver=file,node-name=file,filename={}", text(image));
        let server = format!("addr.type=unix,addr.path={}", text(&socket));
        let arguments = [
            "--daemonize",
            "--pidfile",
            text(&pid_file),
            "--blockdev",
            &file,
            "--blockdev",
            "driver=qcow2,node-name=disk,file=file",
            "--nbd-server",
            &server,
            "--export",
            "type=nbd,id=export,node-name=disk,writable=on",
        ];
        Self::start("qemu-storage-daemon", &arguments, &pid_file)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Not TERM: qemu-nbd misses one that comes right after it has said that it is ready.
        rustix::process::kill_process(self.pid, rustix::process::Signal::KILL)
            .expect("the daemon runs still");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is UTF-8")
}

fn refusal(path: &Path, wanted: Use) -> Option<String> {
    open(path).lock(wanted).err().map(|error| error.to_string())
}

fn words(lock: &str, path: &Path) -> String {
    format!("Failed to get {lock} lock\nIs another process using the image [{}]?", path.display())
}

#[test]
fn two_openings_exclude_each_other_where_their_wishes_contradict() {
    let (_dir, path) = image("raw");
    for mine in KINDS {
        for theirs in KINDS {
            let (first, second) = (open(&path), open(&path));
            first.lock(mine).expect("nobody else is there");
            let (a, b) = (mine.claim(), theirs.claim());
            let contradict = a.uses & b.unshared != 0 || b.uses & a.unshared != 0;
            assert_eq!(second.lock(theirs).is_err(), contradict, "{theirs:?} after {mine:?}");
        }
    }
}

#[test]
fn a_refused_change_keeps_the_locks_that_were_held() {
    let (_dir, path) = image("raw");
    let (mine, other) = (open(&path), open(&path));
    mine.lock(Use::Read).expect("free");
    other.lock(Use::Read).expect("readers share");
    assert!(matches!(mine.lock(Use::Write), Err(Error::Locked { permission: "write", shared: false, .. })));
    assert_eq!(refusal(&path, Use::Read), None, "a reader is welcome");
    drop(other);
    assert_eq!(refusal(&path, Use::Write), Some(words("\"write\"", &path)), "the first lock is held");
    mine.lock(Use::Write).expect("the other is gone");
    mine.lock(Use::Nothing).expect("giving back cannot fail");
    assert_eq!(refusal(&path, Use::Write), None);
}

#[test]
fn a_file_locked_as_a_whole_by_a_stranger_is_refused() {
    let (_dir, path) = image("raw");
    let stranger = open(&path);
    let lock = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    rustix::fs::fcntl_lock(stranger.as_fd().expect("a file"), lock).expect("free");
    assert_eq!(refusal(&path, Use::Read), Some(words("\"consistent read\"", &path)));
}

#[test]
fn a_running_nbd_server_keeps_us_out() {
    let (dir, path) = image("qcow2");
    let _server = Daemon::nbd(dir.path(), &path, "qcow2", false);
    assert_eq!(refusal(&path, Use::Nothing), None);
    assert_eq!(refusal(&path, Use::Inspect), Some(words("shared \"write\"", &path)));
    assert_eq!(refusal(&path, Use::Read), Some(words("shared \"write\"", &path)));
    assert_eq!(refusal(&path, Use::Write), Some(words("\"write\"", &path)));
    assert_eq!(refusal(&path, Use::Create), Some(words("\"write\"", &path)));
}

#[test]
fn a_running_read_only_nbd_server_lets_us_read() {
    let (dir, path) = image("qcow2");
    let _server = Daemon::nbd(dir.path(), &path, "qcow2", true);
    for welcome in [Use::Inspect, Use::Read, Use::SharedRead] {
        assert_eq!(refusal(&path, welcome), None, "{welcome:?}");
    }
    assert_eq!(refusal(&path, Use::Write), Some(words("\"write\"", &path)));
}

#[test]
fn a_raw_image_of_a_running_nbd_server_may_be_looked_at() {
    let (dir, path) = image("raw");
    let _server = Daemon::nbd(dir.path(), &path, "raw", false);
    for welcome in [Use::SharedRead, Use::SharedWrite] {
        assert_eq!(refusal(&path, welcome), None, "{welcome:?}");
    }
    assert_eq!(refusal(&path, Use::Read), Some(words("shared \"write\"", &path)));
    assert_eq!(refusal(&path, Use::SharedResize), Some(words("\"resize\"", &path)));
    assert_eq!(refusal(&path, Use::Create), Some(words("\"resize\"", &path)));
}

#[test]
fn a_running_storage_daemon_keeps_us_out() {
    let (dir, path) = image("qcow2");
    let _daemon = Daemon::storage_daemon(dir.path(), &path);
    assert_eq!(refusal(&path, Use::Inspect), Some(words("shared \"write\"", &path)));
    assert_eq!(refusal(&path, Use::Write), Some(words("\"write\"", &path)));
}

#[test]
fn the_reference_is_kept_out_by_us() {
    let (_dir, path) = image("qcow2");
    let mine = open(&path);
    let read = |program, arguments: &[&str]| run(program, &[arguments, &[text(&path)]].concat());
    mine.lock(Use::Write).expect("free");
    let error = read("qemu-img", &["info"]).expect_err("we write");
    assert!(error.ends_with(&format!("{}\n", words("shared \"write\"", &path))), "{error}");
    let error = read("qemu-io", &["-f", "qcow2", "-c", "write 0 512"]).expect_err("we write");
    assert!(error.ends_with(&format!("{}\n", words("\"write\"", &path))), "{error}");
    read("qemu-img", &["info", "-U"]).expect("sharing by force is allowed");

    mine.lock(Use::Read).expect("fewer wishes");
    read("qemu-img", &["check", "-q"]).expect("readers share");
    let error = read("qemu-io", &["-f", "qcow2", "-c", "write 0 512"]).expect_err("we read");
    assert!(error.ends_with(&format!("{}\n", words("\"write\"", &path))), "{error}");

    mine.lock(Use::Nothing).expect("no wishes");
    read("qemu-io", &["-f", "qcow2", "-c", "write 0 512"]).expect("nobody minds");
}

#[test]
fn a_new_image_that_we_format_is_kept_from_the_reference() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("new");
    let mine = FileOptions::new().create_new(true).open(&path).expect("a new file");
    mine.lock(Use::Create).expect("nobody knows it");
    mine.resize(1 << 20, Preallocation::Off).expect("room");
    let error = run("qemu-img", &["create", "-f", "raw", text(&path), "1M"]).expect_err("we create it");
    assert!(error.ends_with(&format!("{}\n", words("\"resize\"", &path))), "{error}");
}
