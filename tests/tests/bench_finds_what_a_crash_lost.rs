//! A verified load on a daemon that is killed: what was flushed is there when it comes back, and the load generator
//! would know if it were not.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
};

use img_tests::{
    command::{Output, Run, blk_backend_binary, img, qemu_img},
    daemon::Daemon,
    peer::wait_until,
};

fn bench(directory: &Path, arguments: &[&str]) -> Output {
    Run::new(blk_backend_binary(), directory).arg("bench").args(arguments).output()
}

/// How many blocks a journal knows by the words of `bench verify`, none of which is wrong.
#[track_caller]
fn flushed_and_right(told: &str) -> u64 {
    let (count, rest) = told.split_once(' ').expect("words");
    assert!(rest.starts_with("blocks were flushed: 0 are wrong"), "{told}");
    count.parse().expect("a number")
}

/// A daemon, the target that it is for a load, and the image it serves.
struct Case {
    create: &'static [&'static str],
    serve: &'static [&'static str],
    target: [&'static str; 2],
}

fn killed_under_load(case: &Case) {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    qemu_img(directory, ["create", "-q"].iter().chain(case.create).chain(&["disk", "32M"]))
        .output()
        .success();
    let serve =
        || Daemon::start(directory, case.serve.iter().chain(&["--image", "disk", "--wait-for-lock", "60"]));
    for round in 1..=3 {
        // Where there is none there was no round before.
        fs::remove_file(directory.join("journal")).ok();
        let daemon = serve();
        let load = Command::new(blk_backend_binary())
            .args([
                "bench",
                "run",
                "--pattern",
                "randrw",
                "--read-percent",
                "30",
                "--queues",
                "2",
                "--depth",
                "16",
            ])
            .args(["--verify", "--journal", "journal", "--flush-every", "40", "--time", "3600"])
            .args(case.target)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it was built");
        let enough = round * 10_000;
        wait_until("the journal", || {
            fs::metadata(directory.join("journal")).is_ok_and(|journal| journal.len() > enough)
        });
        assert_eq!(daemon.kill().code, None);
        let ended = load.wait_with_output().expect("our child");
        let told = String::from_utf8_lossy(&ended.stderr);
        let is_gone = ["closed the connection", "Connection reset", "Broken pipe"];
        assert!(!ended.status.success() && is_gone.iter().any(|words| told.contains(words)), "{told}");

        fs::remove_file(directory.join("socket")).expect("a killed daemon leaves it");
        let daemon = serve();
        let verify = ["verify", "--journal", "journal", case.target[0], case.target[1]];
        let blocks = flushed_and_right(&bench(directory, &verify).success());
        assert!(blocks > 100, "{blocks} blocks were flushed");
        assert_eq!(daemon.terminate().code, Some(0));
        let text = bench(directory, &["verify", "--journal", "journal", "--image", "disk"]).success();
        assert_eq!(flushed_and_right(&text), blocks);
    }
    if case.create[1] != "raw" {
        // Nothing worse than clusters that were reserved when it died.
        let checked = qemu_img(directory, ["check", "-q", "disk"]).output();
        assert!([0, 3].contains(&checked.code), "{checked}");
    }
}

const DEVICE: &[&str] = &["vhost-user", "--socket", "socket", "--queues", "2"];
const DEVICE_TARGET: [&str; 2] = ["--vhost-user", "socket"];
const EXPORT: &[&str] = &["nbd", "--listen", "unix:socket"];
const EXPORT_TARGET: [&str; 2] = ["--nbd", "nbd+unix:///?socket=socket"];

#[test]
fn a_device_of_a_qcow2_image() {
    killed_under_load(&Case { create: &["-f", "qcow2"], serve: DEVICE, target: DEVICE_TARGET });
}

#[test]
fn a_device_of_an_image_whose_clusters_have_subclusters() {
    let create = &["-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k"];
    killed_under_load(&Case { create, serve: DEVICE, target: DEVICE_TARGET });
}

#[test]
fn an_export_of_a_qcow2_image() {
    killed_under_load(&Case { create: &["-f", "qcow2"], serve: EXPORT, target: EXPORT_TARGET });
}

#[test]
fn a_raw_file_that_nobody_probes() {
    let serve = &["vhost-user", "--socket", "socket", "--queues", "2", "--format", "raw"];
    let case = Case { create: &["-f", "raw"], serve, target: DEVICE_TARGET };
    killed_under_load(&case);
}

/// Bytes of the disk whose every byte is verified.
const WHOLE: u64 = 1 << 20;

/// A raw disk, written from beginning to end `times` times.
fn written(directory: &Path, times: u64) -> File {
    img(directory, ["create", "-q", "-f", "raw", "disk", &WHOLE.to_string()]).output().success();
    let count = (times * WHOLE / 4096).to_string();
    let job = ["--pattern", "write", "--depth", "4", "--count", &count, "--verify", "--journal", "journal"];
    bench(directory, &[&["run", "--image", "disk", "--format", "raw"], &job[..]].concat()).success();
    File::options().read(true).write(true).open(directory.join("disk")).expect("it was made")
}

fn verify(directory: &Path) -> Output {
    bench(directory, &["verify", "--journal", "journal", "--image", "disk", "--format", "raw"])
}

#[test]
fn a_byte_that_is_wrong_is_found_and_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    let disk = written(directory, 2);
    assert_eq!(flushed_and_right(&verify(directory).success()), WHOLE / 4096);
    for at in [0, 0x12345, 0x3f000, WHOLE - 1] {
        let mut byte = [0];
        disk.read_exact_at(&mut byte, at).expect("read");
        disk.write_all_at(&[byte[0] ^ 0x40], at).expect("written");
        let Output { code, stdout, .. } = verify(directory);
        let named = format!("byte {at:#x} of the disk: {:#04x} is here", byte[0] ^ 0x40);
        assert!(code == 1 && stdout.contains(&named) && stdout.contains(": 1 are wrong"), "{stdout}");
        disk.write_all_at(&byte, at).expect("written");
    }
    flushed_and_right(&verify(directory).success());
}

#[test]
fn writes_that_were_lost_or_went_elsewhere_are_found() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    let old = {
        let disk = written(directory, 1);
        let mut old = vec![0; 4096];
        disk.read_exact_at(&mut old, 8192).expect("read");
        old
    };
    let disk = written(directory, 2);
    let mut new = vec![0; 4096];
    disk.read_exact_at(&mut new, 8192).expect("read");
    for (bytes, at, why) in [
        (&old, 8192, "byte 0x2000 of the disk: another run wrote what is here"),
        (&new, 4096, "byte 0x1000 of the disk: what is here was written at 0x2000"),
        (&vec![0; 4096], 8192, "byte 0x2000 of the disk: zeroes are here, and generation 2 was written"),
    ] {
        let mut right = vec![0; 4096];
        disk.read_exact_at(&mut right, at).expect("read");
        disk.write_all_at(bytes, at).expect("written");
        let Output { code, stdout, .. } = verify(directory);
        assert!(code == 1 && stdout.contains(why), "{stdout}");
        disk.write_all_at(&right, at).expect("written");
    }
    // A disk that forgets under a running load: what it reads is not what it wrote.
    disk.set_len(WHOLE / 2).expect("cut");
    let Output { code, stderr, .. } = verify(directory);
    assert!(code == 1 && stderr.contains("the disk has 524288 bytes"), "{stderr}");
}
