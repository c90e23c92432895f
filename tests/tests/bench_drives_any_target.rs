//! The load generator puts the same jobs on an image of its own process, on devices behind vhost-user sockets and on
//! NBD exports, ours and the reference's, and what it writes is where it says.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use img_tests::{
    command::{Output, Run, blk_backend_binary, img},
    daemon::Daemon,
    peer::Peer,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const NBD: &str = "nbd+unix:///?socket=socket";

fn bench(directory: &Path, arguments: &[&str]) -> Output {
    Run::new(blk_backend_binary(), directory).arg("bench").args(arguments).output()
}

/// Runs a job, and returns its JSON.
#[track_caller]
fn run(directory: &Path, target: &[&str], job: &[&str]) -> Value {
    let json = ["--json", "result"];
    bench(directory, &[&["run"], target, job, &json[..]].concat()).success();
    let text = std::fs::read_to_string(directory.join("result")).expect("it was written");
    serde_json::from_str(&text).expect("JSON")
}

/// Somebody who serves `disk`, with how to reach it.
struct Served {
    name: &'static str,
    target: Vec<String>,
    ours: Option<Daemon>,
    _theirs: Option<Peer>,
}

impl Drop for Served {
    /// The next one to serve finds the image closed.
    fn drop(&mut self) {
        if let Some(daemon) = self.ours.take() {
            let ended = daemon.terminate();
            assert!(ended.code == Some(0) || std::thread::panicking(), "{}: {ended:?}", self.name);
        }
    }
}

impl Served {
    fn target(&self) -> Vec<&str> {
        self.target.iter().map(String::as_str).collect()
    }
}

const DEVICES: [&str; 2] = ["our vhost-user", "their vhost-user"];
const ALL: [&str; 6] = ["image", DEVICES[0], DEVICES[1], "our nbd", "our nbd, tcp", "their nbd"];

/// Begins to serve the image `disk` in the way called `name`.
fn serve(directory: &Path, format: &str, name: &'static str) -> Served {
    // Who was killed leaves its socket.
    std::fs::remove_file(directory.join("socket")).ok();
    let image = ["--image", "disk", "--format", format];
    let ours = |serve: &[&str]| Some(Daemon::start(directory, serve.iter().chain(&image)));
    let theirs = |tool, arguments: &[&str]| Some(Peer::start(directory, tool, arguments));
    let (target, ours, theirs) = match name {
        "image" => (image.map(str::to_owned).to_vec(), None, None),
        "our vhost-user" => {
            let daemon = ours(&["vhost-user", "--socket", "socket", "--queues", "2"]);
            (words(&["--vhost-user", "socket"]), daemon, None)
        }
        "their vhost-user" => {
            let node =
                format!("driver={format},node-name=disk,discard=unmap,file.driver=file,file.filename=disk");
            let export = "vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=socket,\
                          num-queues=2,writable=on";
            let daemon = theirs("qemu-storage-daemon", &["--blockdev", &node, "--export", export]);
            (words(&["--vhost-user", "socket"]), None, daemon)
        }
        "our nbd" => (words(&["--nbd", NBD]), ours(&["nbd", "--listen", "unix:socket"]), None),
        "our nbd, tcp" => {
            let daemon = ours(&["nbd", "--listen", "tcp:0", "--name", "a disk"]).expect("started");
            let address = daemon.address.strip_prefix("tcp:").expect("tcp");
            (words(&["--nbd", &format!("nbd://{address}/a%20disk")]), Some(daemon), None)
        }
        _ => {
            let socket = directory.join("socket").display().to_string();
            let daemon = theirs("qemu-nbd", &["-k", &socket, "-t", "-e", "4", "-f", format, "disk"]);
            (words(&["--nbd", NBD]), None, daemon)
        }
    };
    Served { name, target, ours, _theirs: theirs }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn create(directory: &Path, format: &str) {
    img(directory, ["create", "-q", "-f", format, "disk", "16M"]).output().success();
}

#[test]
fn every_job_on_every_target() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    create(directory, "raw");
    for name in ALL {
        let served = serve(directory, "raw", name);
        for pattern in ["read", "write", "randread", "randwrite", "randrw", "discard"] {
            let job = [
                "--pattern",
                pattern,
                "--queues",
                "2",
                "--depth",
                "8",
                "--count",
                "200",
                "--flush-every",
                "20",
            ];
            let result = run(directory, &served.target(), &job);
            let what = format!("{name}, {pattern}: {result:#}");
            let count = |name: &str| {
                let op = result["ops"].as_array().expect("a list").iter().find(|op| op["op"] == name);
                op.map_or(0, |op| {
                    let requests = op["requests"].as_u64().expect("a count");
                    let bytes = if name == "flush" { 0 } else { 4096 };
                    assert_eq!(op["bytes"], requests * bytes, "{what}");
                    requests
                })
            };
            let (reads, writes, flushes) = (count("read"), count("write"), count("flush"));
            let counts = match pattern {
                "read" | "randread" => [400, 0, 0, 0],
                // After each 20 changes of a queue there is a flush.
                "write" | "randwrite" => [0, 382, 0, 18],
                "discard" => [0, 0, 382, 18],
                _ => [reads, 400 - reads - flushes, 0, flushes],
            };
            assert_eq!([reads, writes, count("discard"), flushes], counts, "{what}");
            if pattern == "randrw" {
                assert!(reads > 100 && writes > 100 && flushes > 3, "{what}");
            }
            let cpu = &result["backend-cpu-seconds"];
            // So little work may end before the kernel has accounted for any of it.
            let is_right = if name == "our nbd, tcp" { cpu.is_null() } else { cpu.as_f64() >= Some(0.0) };
            assert!(is_right, "{what}");
        }
    }
}

#[test]
fn what_one_has_written_all_others_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    for (writer, block) in ALL.into_iter().zip(["512", "4096", "65536"].into_iter().cycle()) {
        create(directory, "qcow2");
        let job =
            ["--pattern", "randrw", "--queues", "2", "--depth", "8", "--count", "300", "--flush-every", "50"];
        let verify = ["--block-size", block, "--verify", "--journal", "journal"];
        {
            let served = serve(directory, "qcow2", writer);
            let result = run(directory, &served.target(), &[&job[..], &verify].concat());
            assert!(result["verified-blocks"].as_u64() > Some(100), "{writer}: {result}");
        }
        for reader in ALL {
            let served = serve(directory, "qcow2", reader);
            let target = served.target();
            let told =
                bench(directory, &[&["verify", "--journal", "journal"], &target[..]].concat()).success();
            let is_right = told.contains(": 0 are wrong, 0 have been written again");
            assert!(is_right, "{writer}, {reader}: {told}");
        }
    }
}

#[test]
fn a_device_is_driven_with_and_without_each_feature() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    create(directory, "qcow2");
    for name in DEVICES {
        let served = serve(directory, "qcow2", name);
        for options in [
            &["--without", "event-idx"][..],
            &["--without", "indirect"],
            &["--without", "inflight", "--poll", "50"],
            &["--memory", "slots"],
            &["--without", "event-idx", "--without", "indirect", "--memory", "slots"],
        ] {
            // More than one segment of the longest that our device takes.
            for (block, depth) in [("4096", "16"), ("1048576", "4")] {
                let job = [
                    "--pattern",
                    "randrw",
                    "--verify",
                    "--count",
                    "60",
                    "--block-size",
                    block,
                    "--depth",
                    depth,
                ];
                let result = run(directory, &served.target(), &[options, &job].concat());
                assert!(result["verified-blocks"].as_u64() > Some(0), "{name} {options:?}: {result}");
            }
        }
    }
}

#[test]
fn sizes_have_suffixes_and_times_fractions() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    create(directory, "raw");
    let image = ["--image", "disk", "--format", "raw"];
    let result = run(directory, &image, &["--time", "0.1", "--block-size", "64k"]);
    let op = &result["ops"][0];
    let requests = op["requests"].as_u64().expect("a count");
    assert!(requests > 0 && op["bytes"] == requests * 65536, "{result}");
    assert!(result["elapsed-seconds"].as_f64() >= Some(0.1), "{result}");
}

#[test]
fn a_rate_is_kept_and_the_backend_may_be_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    create(directory, "raw");
    let daemon = Daemon::start(directory, ["nbd", "--listen", "tcp:0", "--image", "disk", "--format", "raw"]);
    let uri = format!("nbd://{}", daemon.address.strip_prefix("tcp:").expect("tcp"));
    let pid = daemon.pid().as_raw_nonzero().to_string();
    let target = ["--nbd", &uri, "--backend-pid", &pid];
    let result = run(directory, &target, &["--rate", "1000", "--count", "50"]);
    // The first is due at once, the last after 49 intervals.
    assert!(result["elapsed-seconds"].as_f64() >= Some(0.049), "{result}");
    assert!(result["backend-cpu-seconds"].as_f64() > Some(0.0), "{result}");
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    create(directory, "raw");
    let serve = ["vhost-user", "--socket", "socket", "--image", "disk", "--format", "raw", "--read-only"];
    let _daemon = Daemon::start(directory, serve);
    let device = ["run", "--vhost-user", "socket"];
    let image = ["run", "--image", "disk", "--format", "raw"];
    for (target, options, why) in [
        (&device[..], &["--queues", "2"][..], "the device has 1"),
        (&device, &["--depth", "1025"], "1024 are the most"),
        (&device, &["--pattern", "write"], "the disk is read-only"),
        (&device, &["--block-size", "33554432"], "segments of"),
        (&device, &["--cache", "none"], "cannot be used with"),
        (&image, &["--memory", "slots"], "cannot be used with"),
        (&image, &["--backend-pid", "1"], "cannot be used with"),
        (&image, &["--nbd", "nbd://localhost"], "cannot be used with"),
        (&image, &["--journal", "journal"], "--verify"),
        (&image, &["--verify"], "writes nothing"),
        (&image, &["--verify", "--pattern", "discard"], "writes nothing"),
        (&image, &["--verify", "--pattern", "write", "--block-size", "8388608"], "as many blocks of its own"),
        (&image, &["--block-size", "4q"], "not a number of bytes"),
        (&image, &["--time", "0"], "not a number of seconds above 0"),
        (&image, &["--json", "missing/result"], "missing/result: No such file"),
        (&["run", "--nbd", "nbds://localhost"], &[], "'nbds' is not supported"),
        (&["run", "--nbd", "nbd://localhost", "--poll", "1"], &[], "cannot be used with"),
        (&["run", "--nbd", "nbd+unix:///?socket=nobody"], &[], "No such file"),
        (&["run", "--vhost-user", "nobody"], &[], "nobody: No such file"),
        (&["run"], &[], "required"),
        (&["verify", "--journal", "disk", "--image", "disk"], &[], "does not begin like one"),
    ] {
        let Output { code, stderr, .. } = bench(directory, &[target, options].concat());
        assert!(code != 0 && stderr.contains(why), "{target:?} {options:?}: {stderr}");
    }
}

/// Somebody ends a run of ten minutes: what it did until then is told, and verified.
#[test]
fn a_run_that_is_ended_early_has_a_result() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    img(directory, ["create", "-q", "-f", "qcow2", "disk", "16M"]).output().success();
    let job = ["--image", "disk", "--pattern", "randwrite", "--time", "600", "--flush-every", "10"];
    let verify = ["--verify", "--journal", "journal", "--json", "result"];
    let child = Command::new(blk_backend_binary())
        .args(["bench", "run"].iter().chain(&job).chain(&verify))
        .current_dir(directory)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it was built");
    let journal = directory.join("journal");
    // The first flush of the run has been noted.
    while std::fs::metadata(&journal).map_or(0, |found| found.len()) <= 32 {
        std::thread::yield_now();
    }
    kill_process(Pid::from_child(&child), Signal::INT).expect("it runs");
    let ended = child.wait_with_output().expect("its end");
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("the run was ended before its time"), "{stderr}");
    let stdout = String::from_utf8_lossy(&ended.stdout);
    assert!(stdout.contains("write ") && stdout.contains("verified: "), "{stdout}");
    let text = std::fs::read_to_string(directory.join("result")).expect("it was written");
    let result: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(result["interrupted"], true);
    assert!(result["verified-blocks"].as_u64().is_some_and(|blocks| blocks > 0), "{text}");
    // A job that is refused leaves the journal of this one alone.
    let before = std::fs::read(&journal).expect("it is there");
    let refused = ["run", "--image", "disk", "--pattern", "read", "--verify", "--journal", "journal"];
    assert_eq!(bench(directory, &refused).code, 1);
    assert!(std::fs::read(&journal).expect("it is there") == before);
    let verified = ["verify", "--image", "disk", "--journal", "journal"];
    assert!(bench(directory, &verified).success().contains(" 0 are wrong"));
}
