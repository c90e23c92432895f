//! A process inside the fences. The tests run this program again, for that one test alone: there is no way back.

use std::{
    env, fs,
    io::{self, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::{
        net::{UnixListener, UnixStream},
        process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{Command, Output},
};

use super::{Sandbox, enter, restrict_thread};
use crate::{
    disk::{Disk, DiskOptions},
    engine::{Event, Lane, LaneOptions, Wait},
    request::{Op, Request, Segments, Submitted},
};

/// Set for the process that goes inside: the directory that it keeps.
const INSIDE: &str = "BLK_BACKEND_TEST_SANDBOX";

#[test]
fn inside_images_are_served_and_nothing_else_is_reached() {
    if let Some(directory) = env::var_os(INSIDE) {
        return inside(Path::new(&directory));
    }
    let directory = tempfile::tempdir().expect("a directory");
    let run = again("inside_images_are_served_and_nothing_else_is_reached", directory.path());
    let text = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
}

/// Runs one test of this program in a process of its own.
fn again(test: &str, directory: &Path) -> Output {
    Command::new(env::current_exe().expect("this program"))
        .args(["--exact", &format!("sandbox::tests::{test}"), "--nocapture", "--test-threads=1"])
        .env(INSIDE, directory)
        .output()
        .expect("it runs")
}

fn enter_empty() {
    enter(&Sandbox { calls: vec![libc::SYS_connect], ..Sandbox::default() }).expect("entered");
}

#[test]
fn another_program_is_the_end() {
    if env::var_os(INSIDE).is_some() {
        enter_empty();
        panic!("{}", Command::new("/bin/true").exec());
    }
    let run = again("another_program_is_the_end", Path::new("/"));
    assert_eq!(run.status.signal(), Some(libc::SIGSYS), "{run:?}");
}

#[test]
fn a_thread_of_a_guest_opens_nothing_and_connects_to_nobody() {
    if let Some(directory) = env::var_os(INSIDE) {
        let directory = Path::new(&directory);
        enter(&Sandbox {
            directories: vec![directory.to_owned()],
            calls: vec![libc::SYS_connect, libc::SYS_seccomp],
            ..Sandbox::default()
        })
        .expect("entered");
        let file = directory.join("file");
        fs::write(&file, b"1").expect("it may");
        restrict_thread().expect("restricted");
        // Threads that it starts are no better off.
        let read = std::thread::spawn(move || fs::read(file)).join().expect("no panic");
        assert_eq!(read.expect_err("refused").kind(), io::ErrorKind::PermissionDenied);
        io::stdout().write_all(b"so far\n").expect("a pipe");
        panic!("{:?}", UnixStream::connect(directory.join("socket")));
    }
    let directory = tempfile::tempdir().expect("a directory");
    let run = again("a_thread_of_a_guest_opens_nothing_and_connects_to_nobody", directory.path());
    assert!(String::from_utf8_lossy(&run.stdout).contains("so far"), "{run:?}");
    assert_eq!(run.status.signal(), Some(libc::SIGSYS), "{run:?}");
}

fn inside(directory: &Path) {
    let image = |name: &str| {
        let path = directory.join(name);
        img_core::image::ImageName::from_path(path.to_str().expect("a plain name"))
    };
    crate::engine::tests::image(directory, "disk", "qcow2", &[], 1 << 20, None);
    let disk = Disk::open(&image("disk"), &DiskOptions::default()).expect("opens");
    let far = TcpListener::bind("127.0.0.1:0").expect("bound").local_addr().expect("an address");
    let fences =
        enter(&Sandbox { directories: vec![directory.to_owned()], ..Sandbox::default() }).expect("entered");
    let status = fs::read_to_string("/proc/self/status").expect("it is allowed");
    assert_eq!(fences.seccomp, status.contains("\nSeccomp:\t2\n"), "{status}");
    assert!(fences.seccomp, "there is a list for the processors that this is tested on");

    // A lane with its ring and its workers, a live snapshot, and a socket: all of it begins only now.
    let mut lane = Lane::new(&disk, &LaneOptions::default()).expect("a lane");
    let zeroes = Op::WriteZeroes { may_unmap: true, fast_only: false, fua: true };
    for (tag, op, len_bytes) in
        [(1, zeroes, 1 << 20), (2, Op::Discard { fua: false }, 65536), (3, Op::Flush, 0)]
    {
        let request = Request { tag, op, offset: 0, len_bytes, segments: Segments::NONE };
        assert_eq!(lane.submit(&request), Submitted::Taken);
        let mut events = Vec::new();
        while events.is_empty() {
            lane.run_once(Wait::Event, &mut events).expect("the lane runs");
        }
        assert_eq!(events, [Event::Done { tag, result: Ok(()) }]);
    }
    drop(lane);
    disk.snapshot_external(&image("overlay"), "qcow2", false).expect("an overlay");
    disk.close().expect("closed");
    UnixListener::bind(directory.join("socket")).expect("a socket");
    fs::remove_file(directory.join("socket")).expect("removed");

    let refused = |result: io::Result<()>| result.expect_err("it is refused").kind();
    assert_eq!(refused(Command::new("/bin/true").status().map(drop)), io::ErrorKind::Unsupported);
    if fences.landlock {
        let denied = io::ErrorKind::PermissionDenied;
        assert_eq!(refused(fs::read("/etc/passwd").map(drop)), denied);
        assert_eq!(refused(fs::write("/tmp/outside", b"")), denied);
    }
    // Only `connect` itself is missing: it is not on the list.
    assert_eq!(refused(TcpStream::connect(far).map(drop)), io::ErrorKind::Unsupported);
}
