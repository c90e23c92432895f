//! `--progress=json`: one object a line, from commands that take long; and a full disk, which ends them, is named, and
//! leaves what they read as it was.

use std::{fs, path::Path};

use img_tests::command::{Output, Run, img, img_binary, qemu_img, qemu_io};
use serde_json::Value;

fn make(directory: &Path) {
    qemu_img(directory, ["create", "-q", "-f", "raw", "below", "8M"]).output().success();
    qemu_io(directory, "raw", "below", &["write -q -P 1 0 8M"]).output().success();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "-b", "below", "-F", "raw", "x"]).output().success();
    qemu_io(directory, "qcow2", "x", &["write -q -P 2 1M 4M"]).output().success();
    qemu_img(directory, ["create", "-q", "-f", "raw", "other", "8M"]).output().success();
    qemu_io(directory, "raw", "other", &["write -q -P 7 0 8M"]).output().success();
}

#[test]
fn progress_is_told_as_json() {
    for arguments in [
        &["convert", "--progress=json", "-O", "qcow2", "x", "new"][..],
        &["compare", "--progress=json", "x", "x"],
        &["rebase", "--progress=json", "-b", "other", "-F", "raw", "x"],
        &["commit", "--progress=json", "x"],
        &["amend", "--progress=json", "-o", "refcount_bits=64", "x"],
        &["check", "--progress=json", "x"],
        &["bench", "--progress=json", "-c", "300", "x"],
    ] {
        let directory = tempfile::tempdir().expect("a temporary directory");
        make(directory.path());
        let told = img(directory.path(), arguments).output().success();
        let events: Vec<Value> = told
            .lines()
            .filter(|line| line.starts_with('{'))
            .map(|line| serde_json::from_str(line).expect("an object"))
            .collect();
        let last = events.last().unwrap_or_else(|| panic!("{arguments:?}: nothing is told: {told}"));
        assert_eq!(last["event"], "finished", "{arguments:?}: {told}");
        assert_eq!(last["percent"].as_f64(), Some(100.0), "{arguments:?}: {told}");
        for pair in events.windows(2) {
            assert!(pair[0]["percent"].as_f64() <= pair[1]["percent"].as_f64(), "{arguments:?}: {told}");
        }
        assert!(events.iter().all(|event| event["done"].as_u64() <= event["total"].as_u64()), "{told}");
        // Under `-q` nothing is told.
        let mut quiet = arguments.to_vec();
        quiet.insert(1, "-q");
        let again = tempfile::tempdir().expect("a temporary directory");
        make(again.path());
        let told = img(again.path(), &quiet).output().success();
        // What `bench` prints is its result.
        assert!(told.is_empty() || quiet[0] == "bench" && !told.contains('{'), "{quiet:?}: {told}");
    }
}

/// Commands whose answer is what they print tell it behind the progress, and it is the same.
#[test]
fn progress_changes_no_answer() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    make(directory);
    for format in ["qed", "vmdk", "vpc"] {
        img(directory, ["convert", "-O", format, "x", format]).output().success();
    }
    for arguments in [
        &["measure", "-O", "qcow2", "x"][..],
        &["check", "x"],
        &["check", "qed"],
        &["check", "vmdk"],
        &["check", "vpc"],
        &["dd", "if=x", "of=new"],
    ] {
        let plain = img(directory, arguments).output().success();
        let mut watched = arguments.to_vec();
        watched.insert(1, "--progress=json");
        let told = img(directory, &watched).output().success();
        let (events, answer): (Vec<&str>, Vec<&str>) = told.lines().partition(|line| line.starts_with('{'));
        assert_eq!(answer, plain.lines().collect::<Vec<_>>(), "{watched:?}");
        assert!(events.len() > 1, "{watched:?} tells nothing on its way: {told}");
        let last: Value = serde_json::from_str(events[events.len() - 1]).expect("an object");
        assert_eq!(
            (&last["event"], &last["done"]),
            (&"finished".into(), &last["total"]),
            "{watched:?}: {told}"
        );
        // As a line that is overwritten.
        watched[1] = "--progress";
        let told = img(directory, &watched).output().success();
        assert!(told.contains("    (100.00/100%)\r\n"), "{watched:?}: {told:?}");
    }
    // The reference has no such option.
    for command in ["check", "dd", "bench", "measure"] {
        let run = img(directory, [command, "-p", "x"]).output();
        assert_ne!(run.code, 0, "{run}");
    }
}

/// Runs `img` where no file may grow past so many KiB: the host's answer to a write behind it is an error, as that of a
/// full disk.
fn img_limited(directory: &Path, limit_kib: u32, arguments: &[&str]) -> Output {
    // The limit's signal is ignored, so that the write fails instead.
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", limit_kib * 2);
    Run::new("sh", directory).args(["-c", &script, "sh"]).arg(img_binary()).args(arguments).output()
}

#[test]
fn a_disk_that_fills_up_leaves_the_source_alone_and_is_named() {
    for (arguments, source, target) in [
        (&["convert", "-O", "raw", "x", "new"][..], "x", Some("new")),
        (&["convert", "-O", "qcow2", "x", "new"], "x", Some("new")),
        (&["convert", "-O", "vmdk", "x", "new"], "x", Some("new")),
        (&["convert", "-O", "vpc", "x", "new"], "x", Some("new")),
        (&["convert", "-O", "qed", "x", "new"], "x", Some("new")),
        (&["convert", "-n", "-O", "qcow2", "other", "small"], "other", None),
        (&["dd", "if=x", "of=new", "bs=1M"], "x", Some("new")),
        (&["rebase", "-b", "other", "-F", "raw", "x"], "below", None),
        (&["commit", "-b", "thin", "top"], "top", None),
        (&["create", "-q", "-f", "qcow2", "-o", "preallocation=full", "new", "64M"], "x", Some("new")),
        (&["resize", "-q", "--preallocation=full", "small", "64M"], "x", None),
    ] {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let directory = directory.path();
        make(directory);
        qemu_img(directory, ["create", "-q", "-f", "qcow2", "small", "8M"]).output().success();
        qemu_img(directory, ["create", "-q", "-f", "qcow2", "thin", "8M"]).output().success();
        qemu_img(directory, ["create", "-q", "-f", "qcow2", "-b", "thin", "-F", "qcow2", "top"])
            .output()
            .success();
        qemu_io(directory, "qcow2", "top", &["write -q -P 5 0 6M"]).output().success();
        let before = fs::read(directory.join(source)).expect("the source");
        let disk_before = qemu_img(directory, ["convert", "-O", "raw", "x", "before.raw"]).output();
        disk_before.success();

        let run = img_limited(directory, 5 << 10, arguments);
        assert_ne!(run.code, 0, "{arguments:?}: {run}");
        assert!(run.stderr.contains("too large"), "{arguments:?} does not say why: {run}");
        let after = fs::read(directory.join(source)).expect("the source");
        assert!(before == after, "{arguments:?}: {source} changed");
        // An image that was made goes, one that was there is sound, and the disk reads as it did.
        match target {
            Some(target) => assert!(!directory.join(target).exists(), "{arguments:?}: {target} is left"),
            None => {
                for image in ["x", "small", "thin", "top"] {
                    let check = img(directory, ["check", image]).output();
                    assert!([0, 3].contains(&check.code), "{arguments:?}, {image}: {check}");
                }
            }
        }
        qemu_img(directory, ["compare", "-F", "raw", "x", "before.raw"]).output().success();
    }
}
