//! What moves a guest's bytes is chosen on the command line, shown in the metrics, and told at start where it is not
//! what would be chosen.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use blk_backend::engine;
use img_tests::{
    command::qemu_img,
    daemon::{Daemon, Ended},
    nbd::{Client, Framing, command},
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

fn serve(directory: &Path, more: &[&str]) -> Result<Daemon, Ended> {
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
    let base = ["nbd", "--listen", "unix:socket", "--image", "disk", "--metrics", "unix:metrics"];
    Daemon::try_start(directory, base.iter().chain(more))
}

/// Writes and reads, and gives the metrics back as they are while the connection is there.
fn use_it(directory: &Path) -> String {
    let mut client = Client::connect(&directory.join("socket"), "", Framing::Structured, &[]).unwrap();
    for at in [0, 1 << 16, 5 << 20] {
        assert_eq!(client.call(command::WRITE, 0, at, 4096, &[7; 4096]).unwrap().error, 0);
        let read = client.call(command::READ, 0, at, 4096, &[]).unwrap();
        assert_eq!((read.error, &read.data[..]), (0, &[7; 4096][..]));
    }
    let mut stream = UnixStream::connect(directory.join("metrics")).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Does something on a thread, and with programs that it starts, that have no `io_uring`: the kernel says `errno`.
fn without_ring<T: Send>(errno: i32, what: impl FnOnce() -> T + Send) -> T {
    let filter = SeccompFilter::new(
        [(libc::SYS_io_uring_setup, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.unsigned_abs()),
        TargetArch::try_from(std::env::consts::ARCH).expect("a processor that is filtered"),
    );
    let program: BpfProgram = filter.and_then(BpfProgram::try_from).expect("a filter");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            seccompiler::apply_filter(&program).expect("the kernel has filters");
            what()
        });
        thread.join().expect("it ends")
    })
}

#[test]
fn the_engine_in_use_is_shown() {
    let mut engines = vec![("threads", "threads")];
    if engine::ring_support().is_ok() {
        engines.extend([("io_uring", "io_uring"), ("auto", "io_uring")]);
    }
    for (chosen, in_use) in engines {
        let directory = tempfile::tempdir().unwrap();
        let daemon = serve(directory.path(), &["--engine", chosen]).unwrap();
        let metrics = use_it(directory.path());
        let lane = format!("blk_lane_cpu_seconds_total{{disk=\"disk0\",lane=\"0\",engine=\"{in_use}\"}} ");
        let cpu = metrics.lines().find_map(|line| line.strip_prefix(&lane)).expect(&metrics);
        assert!(cpu.parse::<f64>().unwrap() > 0.0, "{cpu}");
        let ended = daemon.terminate();
        assert_eq!(ended.code, Some(0));
        // What was asked for is no news.
        assert!(!ended.stderr.contains("io_uring"), "{}", ended.stderr);
    }
}

#[test]
fn threads_that_take_over_say_so_and_why() {
    for (errno, why) in [
        (libc::EPERM, "a filter of system calls, a security module or kernel.io_uring_disabled forbids it"),
        (libc::ENOSYS, "the kernel has none, or a filter of system calls hides it"),
    ] {
        without_ring(errno, || {
            let directory = tempfile::tempdir().unwrap();
            let daemon = serve(directory.path(), &[]).unwrap();
            assert!(use_it(directory.path()).contains("engine=\"threads\""));
            let ended = daemon.terminate();
            let told =
                format!("blk-backend: threads serve the requests, as there is no io_uring to use: {why}");
            assert!(ended.stderr.starts_with(&told), "{}", ended.stderr);

            let ended = serve(directory.path(), &["--engine", "io_uring"]).expect_err("it was asked for");
            assert_eq!(ended.code, Some(1));
            let told = format!("blk-backend: there is no io_uring to use: {why}");
            assert!(ended.stderr.starts_with(&told), "{}", ended.stderr);
        });
    }
}

#[test]
fn polling_is_chosen_and_bounded() {
    let directory = tempfile::tempdir().unwrap();
    for poll in ["off", "20", "adaptive", "adaptive:100"] {
        let daemon = serve(directory.path(), &["--poll", poll]).unwrap();
        let metrics = use_it(directory.path());
        let hits = metrics.lines().find_map(|line| line.strip_prefix("blk_poll_hits_total{disk=\"disk0\"} "));
        let hits: u64 = hits.expect(&metrics).parse().unwrap();
        assert!(poll != "off" || hits == 0, "{hits}");
        assert_eq!(daemon.terminate().code, Some(0));
    }
    for poll in ["on", "-1", "10001", "adaptive:", "adaptive:10001"] {
        let ended = serve(directory.path(), &["--poll", poll]).expect_err(poll);
        assert_eq!(ended.code, Some(2), "{poll}");
    }
    let ended = serve(directory.path(), &["--engine", "steam"]).expect_err("there is no such engine");
    assert!(ended.stderr.contains("expected auto, io_uring or threads"), "{}", ended.stderr);
}
